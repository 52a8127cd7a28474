"""Which classes an option may name, and the whole explanation of one of them: ``--method Ties --method.help``.

jsonargparse prints a docstring's first paragraph; a method's paper, its Fisher files and what alpha means for it stand
below.
"""

import inspect
import re
from collections.abc import Iterator, Sequence
from typing import Any

SECTION = re.compile(r"^(Args|Attributes|Raises|Returns|Yields):$", re.MULTILINE)


def choices(kinds: Sequence[Any]) -> dict[str, type]:
    """This project's classes below some base classes, by name, in alphabetical order."""
    found = {cls.__name__: cls for kind in kinds if isinstance(kind, type) for cls in _below(kind)}
    return dict(sorted(found.items()))


def _below(kind: type) -> Iterator[type]:
    below: list[type] = kind.__subclasses__()
    for cls in below:
        if cls.__module__.startswith("src.") and not inspect.isabstract(cls):
            yield cls
        yield from _below(cls)


def explanation(cls: type) -> str:
    """A class's docstring before its settings, and what its kind adds to it (``USE``)."""
    own = SECTION.split(inspect.getdoc(cls) or "")[0].strip()
    return "\n\n".join(filter(None, [own, getattr(cls, "USE", "")]))


def overview(kinds: Sequence[Any]) -> str:
    """One line for each class: its name and what its docstring begins with."""
    found = choices(kinds)
    width = max(map(len, found))
    return "\n".join(f"  {name:<{width}}  {explanation(cls).partition(chr(10))[0]}" for name, cls in found.items())


def page(usage: str, option: str, cls: type, options: str) -> str:
    """The page of one class.

    Args:
        usage: The command with the option that names the class.
        option: That option.
        cls: The class.
        options: Its settings as the parser prints them; may be empty.
    """
    more = f" [{option}.OPTION VALUE …]" if options.strip() else ""
    return f"usage: {usage}{more} …\n\n{explanation(cls)}\n\n{options.strip() or 'no options'}\n"
