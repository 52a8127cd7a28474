"""Plots of a merge by SST, from the findings in its manifest.

Three panels: the spectrum (log λ over rank); the safety energy that a growing subspace keeps against the utility tax it
pays, on held-out rows; and a map of the share of the patch that was kept, layer by module. Re-learned coefficients have
no spectrum, and may be larger than the patch's: their map is of its norm beside the safety patch's.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from src.files import write_atomically

PLOT = "pencil.png"
ROUNDING = 1e-12
"""Eigenvalues under this share of the largest are rounding, and would squeeze all others on a log axis: not drawn."""
MOST_LABELS = 16
"""Most layers that are named."""
LAYER = re.compile(r"(?:^|\.)(\d+)\.(.+)$")


class MapWords(NamedTuple):
    """What a map says of its numbers: the norm of each module's patch over that of the whole safety patch there.

    Attributes:
        title: Its title.
        scale: The name of its scale.
        one: What a module's number is, with a place for it.
        whole: The same of the whole patch's.
        csv: The name of a number in tables, in front of its module's.
    """

    title: str
    scale: str
    one: str
    whole: str
    csv: str


FILTERED = MapWords(
    "Norm kept over norm of the patch", "norm kept", "{} kept", "kept {} of the patch's norm", "kept of"
)
RELEARNED = MapWords(
    "Re-learned patch",
    "norm over that of the safety patch",
    "{} times the safety patch's norm",
    "has {} times the safety patch's norm",
    "norm over that of the safety patch, of",
)


def map_words(findings: Mapping[str, Any]) -> MapWords:
    """The words for a merge: a filter keeps a part of the patch, re-learned coefficients may be larger than it.

    Args:
        findings: Findings of :class:`src.merge.sst.Sst`, or what a study keeps of them. ``dim`` is the size of the
            pencil that a filter solved; re-learned coefficients solve none.
    """
    return RELEARNED if findings.get("dim") is None else FILTERED


def plot_pencil(findings: Mapping[str, Any], path: Path) -> None:
    """Draw the panels that the findings have data for, as one PNG.

    Args:
        findings: Findings of :class:`src.merge.sst.Sst`; ``kept_by_module`` always, ``spectrum`` and
            ``held_out_curve`` where they were measured.
        path: The PNG.
    """
    from matplotlib.figure import Figure

    panels = [draw for key, draw in PANELS.items() if findings.get(key) is not None]
    figure = Figure(figsize=(5.6 * len(panels), 5.0))
    axes = figure.subplots(1, len(panels), squeeze=False)
    for axis, draw in zip(axes[0], panels, strict=True):
        draw(axis, findings)
    figure.tight_layout()
    # An explicit format: the temporary file's name does not end in .png.
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=150, format="png"))


def _spectrum(axis: Any, findings: Mapping[str, Any]) -> None:
    data = findings["spectrum"]
    # What is smaller than this is rounding: on a logarithmic axis it would squeeze everything else.
    least = ROUNDING * max(data["value"])
    points = [(rank, value) for rank, value in zip(data["rank"], data["value"], strict=True) if value > least]
    axis.plot(*zip(*points, strict=True), color="#0072B2", marker=".", markersize=3, linestyle="-")
    if len(points) < len(data["rank"]):
        axis.plot([], [], " ", label="λ = 0 beyond")
    if findings.get("unknown"):
        axis.plot([], [], " ", label=f"{findings['unknown']} smaller ones not computed")
    axis.set(yscale="log", xlabel="rank", ylabel="λ, safety energy per utility energy", title="Spectrum of the pencil")
    if findings.get("complement_eigenvalue"):
        axis.axhline(findings["complement_eigenvalue"], color="#D55E00", linestyle="--", label="unseen directions")
    if (findings.get("directions_kept") or findings["dim"]) < findings["dim"]:
        axis.axvline(findings["directions_kept"], color="#009E73", linestyle=":", label="kept to the left")
    if axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False)
    axis.grid(alpha=0.25)


def _curve(axis: Any, findings: Mapping[str, Any]) -> None:
    data = findings["held_out_curve"]
    axis.plot(data["utility_tax_kept"], data["safety_energy_kept"], color="#0072B2", marker=".", label="k largest λ")
    axis.plot([0, 1], [0, 1], color="#666666", linestyle="--", label="shrinking the patch")
    if chosen := findings.get("held_out"):
        axis.plot(
            chosen["utility_tax_kept"], chosen["safety_energy_kept"], "*", color="#D55E00", ms=14, label="this merge"
        )
    axis.set(
        xlabel="share of the utility tax paid  (lower is better)",
        ylabel="share of the safety energy kept  (higher is better)",
        title="Held-out calibration rows",
    )
    axis.legend(frameon=False)
    axis.grid(alpha=0.25)


def module_grid(kept: Mapping[str, float | None]) -> tuple[list[int], list[str], list[list[float]]]:
    """Layers, module names and the shares (layers, modules); NaN where a layer has no such module.

    A module outside any numbered layer stands in layer −1.
    """
    cells: dict[tuple[int, str], float] = {}
    for name, share in kept.items():
        match = LAYER.search(name)
        place = (int(match[1]), match[2]) if match else (-1, name)
        cells[place] = float("nan") if share is None else share
    layers = sorted({layer for layer, _ in cells})
    modules = list(dict.fromkeys(module for _, module in cells))
    grid = [[cells.get((layer, module), float("nan")) for module in modules] for layer in layers]
    return layers, modules, grid


def _modules(axis: Any, findings: Mapping[str, Any]) -> None:
    layers, modules, grid = module_grid(findings["kept_by_module"])
    image = axis.imshow(grid, aspect="auto", cmap="viridis", vmin=0.0, interpolation="none")
    words = map_words(findings)
    axis.figure.colorbar(image, ax=axis, label=words.scale)
    step = max(1, -(-len(layers) // MOST_LABELS))
    axis.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    axis.set_xticks(range(len(modules)), modules, rotation=45, ha="right", fontsize=8)
    axis.set(ylabel="layer", title=f"{words.title}, by module")


PANELS: dict[str, Callable[[Any, Mapping[str, Any]], None]] = {
    "spectrum": _spectrum,
    "held_out_curve": _curve,
    "kept_by_module": _modules,
}
