"""Style and behaviour of the page: light and dark, wide and narrow, screen and print; sorting and values on hover."""

STYLE = """
:root{--bg:#fff;--fg:#1b1d21;--soft:#565b64;--line:#d5d9e0;--raise:#f5f6f8;--link:#0b57d0;
--c0:#0b57d0;--c1:#b3261e;--c2:#146c2e;--c3:#7b4e00;--c4:#6b3fa0;--c5:#00677d;--c6:#a1006b;--c7:#4d4f55}
@media (prefers-color-scheme:dark){:root{--bg:#14161a;--fg:#e8eaed;--soft:#a9afb9;--line:#3a3f48;--raise:#1e2127;
--link:#8ab4f8;--c0:#8ab4f8;--c1:#f2938c;--c2:#81c995;--c3:#e8b75a;--c4:#c6a5f2;--c5:#6fd0e4;--c6:#f48fc5;--c7:#c0c4cc}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--fg);font:16px/1.5 system-ui,sans-serif}
main{max-width:72rem;margin:0 auto;padding:1rem}
h1{font-size:1.6rem;line-height:1.2}h2{font-size:1.2rem;margin:2rem 0 .4rem}h4{margin:0;font-size:.85rem}
h4,.note,.notes,.interval{color:var(--soft)}.interval,.note,.notes{font-size:.85rem}
.summary{font-size:1.1rem;overflow-wrap:anywhere}
p,li,summary,pre,h1,h2,h3,h4{overflow-wrap:anywhere}
figure{margin:0}.front{width:100%;max-width:52rem;height:auto;display:block}
.front text{fill:var(--soft);font-size:13px}.grid{stroke:var(--line);stroke-width:1}
.c0{color:var(--c0)}.c1{color:var(--c1)}.c2{color:var(--c2)}.c3{color:var(--c3)}.c4{color:var(--c4)}.c5{color:var(--c5)}
.c6{color:var(--c6)}.c7{color:var(--c7)}
polyline{fill:none;stroke:currentColor;stroke-width:1.5}.whisker{stroke:currentColor;opacity:.25}
.ours polyline{stroke-width:3}.ours .whisker{opacity:.6}.touch{fill:transparent}
.mark{fill:currentColor}.ring{fill:var(--bg);stroke:currentColor;stroke-width:2}.cross{stroke:currentColor;stroke-width:2.5}
.panels{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,20rem),1fr));gap:1rem}
h3{font-size:1rem;margin:.4rem 0}.panel{max-width:30rem}.dashed polyline,polyline.dashed{stroke-dasharray:5 4}
.tile{fill:currentColor;stroke:var(--line);stroke-width:.5}.tile.none{fill:none;stroke-dasharray:2 2}
.point:focus .tile,.point:hover .tile{stroke:var(--fg);stroke-width:2}
.point:focus{outline:2px solid var(--fg)}.point:hover .whisker,.point:focus .whisker{opacity:1;stroke-width:2}
.legend{list-style:none;padding:0;margin:.3rem 0;display:flex;flex-wrap:wrap;gap:.2rem 1rem;font-size:.9rem}
.key{vertical-align:-3px;margin-right:.3rem}
.scroll{overflow-x:auto;border:1px solid var(--line);border-radius:6px}
td:first-child,th:first-child{position:sticky;left:0;background:var(--bg)}th:first-child{background:var(--raise)}
table{border-collapse:collapse;width:100%;font-size:.9rem}
th,td{padding:.35rem .6rem;text-align:left;border-bottom:1px solid var(--line);white-space:nowrap}
th,td.long{white-space:normal}th{vertical-align:bottom}td.long{min-width:11rem}
td.number{text-align:right;font-variant-numeric:tabular-nums}tbody tr:last-child td{border-bottom:0}
@media (max-width:40rem){.front:not(.panel) text{font-size:18px}td:first-child,th:first-child{white-space:normal;
min-width:7rem;max-width:9rem;border-right:1px solid var(--line)}td.long:not(:first-child){min-width:8rem}}
th{background:var(--raise)}th button{all:unset;cursor:pointer;font-weight:600}
th button:focus-visible,summary:focus-visible,.scroll:focus-visible,pre:focus-visible{outline:2px solid var(--link)}
th[aria-sort=ascending] button::after{content:" ▲"}th[aria-sort=descending] button::after{content:" ▼"}
details{border:1px solid var(--line);border-radius:6px;margin:.5rem 0;padding:.4rem .7rem}summary{cursor:pointer}
.prompt{white-space:pre-wrap;border-left:3px solid var(--line);padding-left:.6rem}
.answers{display:grid;grid-template-columns:repeat(auto-fill,minmax(15rem,1fr));gap:.6rem}
.answers div{background:var(--raise);border-radius:6px;padding:.5rem}.answers p{margin:.2rem 0 0;white-space:pre-wrap}
pre{overflow-x:auto;font-size:.8rem;max-height:30rem}
#tip{position:fixed;display:none;max-width:20rem;padding:.4rem .6rem;background:var(--fg);color:var(--bg);
border-radius:6px;font-size:.85rem;pointer-events:none;z-index:2}
@media print{:root{--bg:#fff;--fg:#000;--soft:#444;--line:#bbb;--raise:#fff;
--c0:#0b57d0;--c1:#b3261e;--c2:#146c2e;--c3:#7b4e00;--c4:#6b3fa0;--c5:#00677d;--c6:#a1006b;--c7:#4d4f55}#tip{display:none!important}
.scroll{overflow:visible;border:0}th,td{white-space:normal}section,figure,tr{break-inside:avoid}}
"""

SCRIPT = """
"use strict";
document.querySelectorAll("th button").forEach(function (button) {
  button.addEventListener("click", function () {
    var head = button.parentNode, table = head.closest("table"), body = table.tBodies[0];
    var place = Array.prototype.indexOf.call(head.parentNode.children, head);
    var up = head.getAttribute("aria-sort") !== "ascending";
    table.querySelectorAll("th").forEach(function (other) { other.setAttribute("aria-sort", "none"); });
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    var rows = Array.prototype.slice.call(body.rows);
    rows.sort(function (one, two) {
      var a = one.cells[place], b = two.cells[place];
      var empty = (a.dataset.sort === "") - (b.dataset.sort === "");
      if (empty) { return empty; }
      var order = a.dataset.sort === "" ? a.textContent.localeCompare(b.textContent) : a.dataset.sort - b.dataset.sort;
      return up ? order : -order;
    });
    rows.forEach(function (row) { body.appendChild(row); });
  });
});
var tip = document.getElementById("tip");
function show(point) {
  var box = point.getBoundingClientRect();
  tip.textContent = point.dataset.tip;
  tip.style.display = "block";
  tip.style.left = Math.max(4, Math.min(box.left + box.width / 2, window.innerWidth - tip.offsetWidth - 4)) + "px";
  tip.style.top = Math.max(4, box.top - tip.offsetHeight - 6) + "px";
}
function hide() { tip.style.display = "none"; }
document.querySelectorAll(".point").forEach(function (point) {
  var title = point.querySelector("title");
  if (title) { title.remove(); }
  point.addEventListener("mouseenter", function () { show(point); });
  point.addEventListener("focus", function () { show(point); });
  point.addEventListener("mouseleave", hide);
  point.addEventListener("blur", hide);
});
document.querySelectorAll(".reached").forEach(function (group) {
  var points = Array.prototype.slice.call(group.children), columns = Number(group.dataset.columns);
  var steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns };
  group.addEventListener("keydown", function (event) {
    var here = points.indexOf(event.target), there = here + (steps[event.key] || 0);
    if (event.key === "Home") { there = 0; }
    if (event.key === "End") { there = points.length - 1; }
    if (there === here || !points[there]) { return; }
    event.preventDefault();
    points[here].setAttribute("tabindex", "-1");
    points[there].setAttribute("tabindex", "0");
    points[there].focus();
  });
});
"""
