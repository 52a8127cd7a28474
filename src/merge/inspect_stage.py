"""The inspect command: a table of adapters and of their angles, and a heat map."""

import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict
from math import isnan
from pathlib import Path

import torch

from src.adapters.checks import check_compatible
from src.adapters.read_together import read_adapters
from src.files import check_output, new_directory, write_atomically, write_json, write_text
from src.merge.inspection import Comparison, Summary, inspect_adapters

log = logging.getLogger(__name__)
PANELS = {
    "cosine of the updates": "cosines",
    "overlap of column spaces": "columns",
    "overlap of row spaces": "rows",
}


def inspect_stage(*, adapters: list[str], output: str | None = None, overwrite: bool = False) -> None:
    """Show ranks, norms, effective ranks, cosines and principal angles of adapters.

    Args:
        adapters: Adapter directories or hub ids, of one base model.
        output: Directory for ``table.md``, ``inspect.json`` and ``angles.png``; unset prints the table only.
        overwrite: Replace an output that exists.
    """
    if output is not None:
        check_output(Path(output), overwrite=overwrite)
    read = read_adapters(adapters)
    check_compatible(read)
    summaries, comparison = inspect_adapters(read)
    table = tables(summaries, comparison)
    sys.stdout.write(table)
    if output is None:
        return
    with new_directory(Path(output)) as folder:
        write_text(folder / "table.md", table)
        matrices = {key: _plain(getattr(comparison, key)) for key in PANELS.values()}
        write_json(folder / "inspect.json", {"adapters": [asdict(s) for s in summaries], **matrices})
        draw_angles(comparison, folder / "angles.png")
    log.info("table and heat map written to %s", output)


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
        for title, key in PANELS.items():
            lines += ["", *_square(title, getattr(comparison, key))]
    return "\n".join(lines) + "\n"


def _square(title: str, matrix: torch.Tensor) -> list[str]:
    numbers = range(1, len(matrix) + 1)
    head = [f"| {title} | {' | '.join(map(str, numbers))} |", f"|---|{'---:|' * len(matrix)}"]
    cells = [[_number(value, 3) for value in row] for row in matrix.tolist()]
    rows = [f"| {i} | {' | '.join(row)} |" for i, row in zip(numbers, cells, strict=True)]
    return head + rows


def _number(value: float, digits: int) -> str:
    """A number in a table; a dash where adapters have nothing to compare."""
    return "—" if isnan(value) else f"{value:.{digits}f}"


def draw_angles(comparison: Comparison, path: Path) -> None:
    """Draw the comparisons as a PNG with the values in the cells."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    count = len(comparison.cosines)
    size = max(3.2, 0.6 * count + 1.6)
    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(size * len(PANELS), size), squeeze=False)
    for axis, (title, key) in zip(axes[0], PANELS.items(), strict=True):
        matrix = getattr(comparison, key).numpy()
        axis.imshow(matrix, cmap="RdBu_r", vmin=-1, vmax=1)
        axis.set(title=title, xticks=range(count), yticks=range(count))
        axis.set_xticklabels(range(1, count + 1))
        axis.set_yticklabels(range(1, count + 1))
        for i in range(count):
            for j in range(count):
                colour = "white" if abs(matrix[i, j]) > 0.6 else "black"
                axis.text(j, i, _number(matrix[i, j], 2), ha="center", va="center", fontsize=8, color=colour)
    figure.tight_layout()
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=150, format="png"))
    pyplot.close(figure)
