"""The inspect command: a table of adapters and of their angles, and a heat map."""

import logging
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from math import isnan
from pathlib import Path
from typing import Any

import torch

from src.adapters.base_weights import open_base
from src.adapters.checks import check_compatible, check_weights, revision_for
from src.adapters.peft_files import CONFIG
from src.adapters.read_together import read_adapters
from src.files import check_apart, check_output, new_directory, write_atomically, write_json, write_text
from src.merge.inspection import Angles, Comparison, Summary, inspect_adapters
from src.models.base import weights_folder
from src.models.discovery import find_adapters
from src.own_files import check_own

log = logging.getLogger(__name__)
SHARES = {
    "cosine of the updates": "cosines",
    "overlap of column spaces": "columns",
    "overlap of row spaces": "rows",
}
ANGLES = {
    "median principal angle of column spaces, degrees": "column_angles",
    "median principal angle of row spaces, degrees": "row_angles",
}


def inspect_stage(
    *,
    adapters: list[str],
    base: str | None = None,
    aliases: list[str] | None = None,
    output: str | None = None,
    overwrite: bool = False,
) -> None:
    """Show ranks, norms, effective ranks, cosines and principal angles of adapters.

    Args:
        adapters: Adapter directories, folders of them or hub ids, of one base model.
        base: Directory or hub id with the base model's safetensors files, or a GGUF file: needed for adapters with DoRA
            or fully trained modules, whose updates are full-rank.
        aliases: Names that all mean the adapters' base, where they name it differently.
        output: Directory for ``table.md``, ``inspect.json`` and ``angles.png``; unset prints the table only.
        overwrite: Replace an output that exists.
    """
    adapters = [path for name in adapters for path in _below(name)]
    if output is not None:
        check_output(Path(output), overwrite=overwrite)
        check_own(Path(output), ("table.md", "inspect.json", "angles.png"))
        check_apart(Path(output), [*adapters, *([] if base is None else [base])])
    revision = None if base is None else revision_for(base, adapters)
    with nullcontext() if base is None else open_base(weights_folder(base), revision) as weights:
        read = read_adapters(adapters, weights)
        check_compatible(read, aliases or ())
        if weights is not None:
            check_weights(read, weights, str(base), aliases or ())
        summaries, comparison = inspect_adapters(read)
    table = tables(summaries, comparison)
    if output is not None:
        with new_directory(Path(output)) as folder:
            _write(folder, table, summaries, comparison)
    sys.stdout.write(table)
    if output is not None:
        log.info("table and heat map written to %s", output)


def _write(folder: Path, table: str, summaries: Sequence[Summary], comparison: Comparison) -> None:
    write_text(folder / "table.md", table)
    matrices = {key: _plain(getattr(comparison, key)) for key in (SHARES | ANGLES).values()}
    angles = [asdict(pair) for pair in comparison.angles]
    write_json(folder / "inspect.json", {"adapters": list(map(asdict, summaries)), **matrices, "angles": angles})
    draw_angles([summary.name for summary in summaries], comparison, folder / "angles.png")


def _below(name: str) -> list[str]:
    """The adapters below a folder that is none itself; else what was named."""
    folder = Path(name)
    inner = find_adapters(folder) if folder.is_dir() and not (folder / CONFIG).exists() else []
    return [str(path) for path in inner] or [name]


def _plain(matrix: torch.Tensor) -> list[list[float | None]]:
    """Rows of numbers; nothing (JSON knows no NaN) for adapters that cannot be compared."""
    return [[None if isnan(value) else value for value in row] for row in matrix.tolist()]


def tables(summaries: Sequence[Summary], comparison: Comparison) -> str:
    """Markdown: one table of adapters and one for each comparison."""
    lines = [
        "| | adapter | modules | rank | norm | effective rank | largest update |",
        "|---|---|---:|---:|---:|---:|---|",
    ]
    for number, s in enumerate(summaries, 1):
        ranks = str(s.ranks[0]) if s.ranks[0] == s.ranks[1] else f"{s.ranks[0]} to {s.ranks[1]}"
        lines.append(
            f"| {number} | {s.name} | {s.modules} | {ranks} | {s.norm:.4g} | {s.effective_rank:.2f} | {s.largest} |"
        )
    if len(summaries) > 1:
        for title, key in SHARES.items():
            lines += ["", *_square(title, getattr(comparison, key), 3)]
        lines += ["", *_angle_table(comparison.angles)]
    return "\n".join(lines) + "\n"


def _angle_table(angles: Sequence[Angles]) -> list[str]:
    head = ["| principal angles over all modules, degrees | column spaces | row spaces |", "|---|---:|---:|"]
    return head + [f"| {p.one + 1} and {p.two + 1} | {_spread(p.columns)} | {_spread(p.rows)} |" for p in angles]


def _spread(angles: dict[str, list[float]]) -> str:
    """Smallest, median and largest angle."""
    values = torch.tensor([angle for each in angles.values() for angle in each], dtype=torch.float64)
    if not len(values):
        return "—"
    low, middle, high = (values.quantile(q).item() for q in (0.0, 0.5, 1.0))
    return f"{low:.1f} to {high:.1f}, median {middle:.1f}"


def _square(title: str, matrix: torch.Tensor, digits: int) -> list[str]:
    numbers = range(1, len(matrix) + 1)
    head = [f"| {title} | {' | '.join(map(str, numbers))} |", f"|---|{'---:|' * len(matrix)}"]
    cells = [[_number(value, digits) for value in row] for row in matrix.tolist()]
    rows = [f"| {i} | {' | '.join(row)} |" for i, row in zip(numbers, cells, strict=True)]
    return head + rows


def _number(value: float, digits: int) -> str:
    """A number in a table; a dash where adapters have nothing to compare."""
    return "—" if isnan(value) else f"{value:.{digits}f}"


def draw_angles(names: Sequence[str], comparison: Comparison, path: Path) -> None:
    """Draw the comparisons as a PNG with the values in the cells, and the adapters' names by their numbers."""
    from matplotlib.figure import Figure

    count = len(comparison.cosines)
    size = max(3.2, 0.6 * count + 1.6)
    figure = Figure(figsize=(size * len(SHARES), 2 * size))
    axes = figure.subplots(2, len(SHARES), squeeze=False)
    for axis, (title, key) in zip(axes[0], SHARES.items(), strict=True):
        _heat_map(axis, title, getattr(comparison, key), 2, {"cmap": "RdBu_r", "vmin": -1, "vmax": 1}, (-0.6, 0.6))
    axes[1, 0].axis("off")
    legend = "\n".join(
        f"{number}  …{name[-34:]}" if len(name) > 36 else f"{number}  {name}" for number, name in enumerate(names, 1)
    )
    axes[1, 0].text(0.0, 1.0, legend, va="top", fontsize=8, transform=axes[1, 0].transAxes)
    for axis, (title, key) in zip(axes[1, 1:], ANGLES.items(), strict=True):
        wrapped = title.replace(" of ", "\nof ")
        _heat_map(axis, wrapped, getattr(comparison, key), 1, {"cmap": "Reds_r", "vmin": 0, "vmax": 90}, (36.0, 91.0))
    figure.tight_layout()
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=150, format="png"))


def _heat_map(
    axis: Any, title: str, matrix: torch.Tensor, digits: int, colours: dict[str, Any], light: tuple[float, float]
) -> None:
    """Draw one matrix; its values are black in cells between the two values of ``light``, white in darker ones."""
    count = len(matrix)
    axis.imshow(matrix.numpy(), **colours)
    axis.set_title(title, fontsize=10)
    axis.set(xticks=range(count), yticks=range(count))
    axis.set_xticklabels(range(1, count + 1))
    axis.set_yticklabels(range(1, count + 1))
    for i in range(count):
        for j in range(count):
            value = matrix[i, j].item()
            colour = "white" if value < light[0] or value > light[1] else "black"
            axis.text(j, i, _number(value, digits), ha="center", va="center", fontsize=8, color=colour)
