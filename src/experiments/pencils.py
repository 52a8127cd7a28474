"""What a study keeps of the pencil that a merge solved, and what its page shows of it.

The merged adapters of a study are removed once they are evaluated, and their manifests with them; so a merge cell keeps
a few numbers: at most ``POINTS`` eigenvalues, the held-out curve, and the share of the patch that was kept by module.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from src.experiments.cell import Cell
from src.experiments.document import Document, column, table
from src.experiments.grid import Model
from src.experiments.store import Store
from src.merge.pencil_plot import module_grid
from src.merge.sst import Sst

POINTS = 64
"""Most eigenvalues that a cell keeps."""
DIGITS = 5
SCALARS = ("dim", "complement_eigenvalue", "directions_kept", "effective_rank", "patch_norm_kept")


def kept_pencil(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The compact pencil and overlap of a merge's manifest: keys ``pencil`` and ``overlap``, where it has them."""
    findings: Mapping[str, Any] = manifest.get("findings") or {}
    found: dict[str, Any] = {}
    if "kept_by_module" in findings:
        layers, modules, grid = module_grid(findings["kept_by_module"])
        shares = [[None if math.isnan(share) else _short(share) for share in row] for row in grid]
        found["pencil"] = {
            **{key: _short(findings.get(key)) for key in SCALARS},
            "spectrum": _spectrum(findings.get("spectrum")),
            "curve": _values(findings.get("held_out_curve")),
            "held_out": _values(findings.get("held_out")),
            "map": {"layers": layers, "modules": modules, "kept": shares},
        }
    if manifest.get("overlap"):
        found["overlap"] = _values(manifest["overlap"])
    return found


def _spectrum(given: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Evenly spaced eigenvalues, the first and the last among them."""
    if given is None:
        return None
    last = len(given["rank"]) - 1
    places = [round(i * last / (POINTS - 1)) for i in range(POINTS)] if last >= POINTS else range(last + 1)
    return {"rank": [given["rank"][i] for i in places], "value": [_short(given["value"][i]) for i in places]}


def _values(given: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if given is None:
        return None
    return {k: [_short(one) for one in v] if isinstance(v, list) else _short(v) for k, v in given.items()}


def _short(value: Any) -> Any:
    """A number with five digits."""
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def pencils(points: Mapping[str, Sequence[Model]], store: Store) -> list[Document]:
    """The pencils of points, each of the first seed; an SST merge whose cell kept none says so, others are left out.

    Args:
        points: Name to models, one for each seed.
        store: The results.
    """
    found = []
    for name, seeds in points.items():
        made = seeds[0].made
        if made is None or not _solves(made) or not store.has_result(made):
            continue
        pencil = store.read(made)["found"].get("pencil")
        if pencil is not None and _fitted_before(made):
            pencil = pencil | {"held_out": None}
        found.append({"model": name, "seed": seeds[0].seed, "seeds": len(seeds), "cell": made.key, "pencil": pencil})
    return found


def _fitted_before(cell: Cell) -> bool:
    """Whether a merge starts from one that was fitted to the same rows, which are held out from nothing then."""
    firsts = [first for fisher in cell.needs.get("fisher", ()) for first in fisher.needs.get("first", ())]
    return any("fisher" in first.needs for first in firsts)


def _solves(cell: Cell) -> bool:
    """Whether a cell is a merge by :class:`Sst`."""
    return (cell.settings.get("method") or {}).get("class_path") == f"{Sst.__module__}.{Sst.__name__}"


def overlap_table(methods: Mapping[str, Sequence[Model]], store: Store) -> Document:
    """Overlap of F_s and F_u: a row for each pair of Fisher matrices, with the methods that use it."""
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for method, models in methods.items():
        for model in models:
            made = model.made
            if made is None or not made.needs.get("fisher") or not store.has_result(made):
                continue
            known = store.read(made)["found"].get("overlap")
            if known is None:
                continue
            key = (made.needs["fisher"][0].key, model.seed)
            row = rows.setdefault(key, {"methods": [], "seed": model.seed} | _overlap_cells(known))
            row["methods"] += [method] if method not in row["methods"] else []
    shown = [row | {"methods": "; ".join(row["methods"])} for row in rows.values()]
    columns = [column("methods", "Fisher matrices of"), column("seed", "seed"), column("directions", "directions")]
    columns += [column("least", "smallest angle (°)"), column("median", "median angle (°)")]
    columns += [column("greatest", "largest angle (°)"), column("shared", "mean cos²"), column("chance", "by chance")]
    columns += [column("spearman", "Spearman, diagonals")]
    note = (
        "Principal angles between the leading eigenspaces of F_s and F_u (0° is a shared direction), the mean of their "
        "squared cosines beside that of random spaces, and the rank correlation of the diagonals."
    )
    return table("Overlap of F_s and F_u", columns, shown, note=note)


def _overlap_cells(known: Mapping[str, Any]) -> dict[str, Any]:
    angles = known["angles"]
    spread = {"least": min(angles), "median": median(angles), "greatest": max(angles)}
    return spread | {key: known[key] for key in ("directions", "shared", "chance", "spearman")}
