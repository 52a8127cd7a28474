"""The demo's rows, which stand in the shipped configurations: who names rows of their own rarely wants them beside."""

import logging
from collections.abc import Mapping
from pathlib import Path

from src.data.row_source import Sources, as_sources, find_file

log = logging.getLogger(__name__)
DEMO = Path(__file__).parent / "demo"


def warn_of_demo_rows(named: Mapping[str, Sources | None]) -> None:
    """Warn where all rows of one option are the demo's and no row of another is.

    Args:
        named: Sources by the option that names them, such as ``data.val``.
    """
    sources = {option: as_sources(value) for option, value in named.items() if value is not None}
    own = [option for option, found in sources.items() if found and not any(_of_demo(one.path) for one in found)]
    for option, found in sources.items():
        if own and found and all(_of_demo(one.path) for one in found):
            log.warning(
                "%s: the rows are the demo's (%s), those of %s are not; name it too, unless the demo's are meant",
                option,
                ", ".join(Path(one.path).name for one in found),
                " and ".join(own),
            )


def _of_demo(name: str) -> bool:
    """Whether a source is a file of the demo."""
    path = find_file(name)
    return path is not None and path.resolve().parent == DEMO.resolve()
