"""What a study would compute, and how long that takes at the rates of finished cells of the same base model.

seconds = units · Σ seconds of finished cells / Σ their units,   over cells of the same settings, else of the stage;
          their mean seconds where units are not known
"""

from collections.abc import Sequence

from src.experiments.cell import Cell, digest
from src.experiments.store import Store


def time_left(todo: Sequence[Cell], store: Store) -> float | None:
    """Seconds that the cells would take on one process; unknown where no cell of a stage has finished yet."""
    if not todo:
        return 0.0
    bases = [cell.settings.get("model", {}).get("base", {}).get("name") for cell in todo]
    rates = store.rates(next((base for base in bases if base), None))
    total = 0.0
    for cell in (one for one in todo if one.stage != "given"):  # a copy takes no time
        if cell.stage not in rates:
            return None
        per_unit, per_cell = rates.get(digest(cell.settings), rates[cell.stage])
        total += per_unit * cell.units if cell.units and per_unit is not None else per_cell
    return total


def hours(seconds: float | None) -> str:
    """``2 h 05 min``, or that it is not known yet."""
    if seconds is None:
        return "an unknown time (a stage has no finished cell to measure)"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{max(minutes, 1) if seconds else 0} min"


def listing(grid: Sequence[Cell], todo: Sequence[Cell], store: Store) -> str:
    """Every cell with its state, and the time that is left."""
    waiting = {cell.key for cell in todo}
    lines = []
    for cell in grid:
        again = store.has_result(cell) and cell.key in waiting
        state = "weights missing" if again else "to do" if cell.key in waiting else "cached"
        lines.append(f"{cell.key}  {cell.stage:<7}  {state:<15}  {cell.label}")
    known = len(grid) - len(waiting)
    lines.append(f"{len(grid)} cells, {known} cached, {len(waiting)} to do, {hours(time_left(todo, store))} expected")
    return "\n".join(lines)
