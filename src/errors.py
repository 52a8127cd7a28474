"""The one exception that a wrong input raises: the command line prints it as one line and exits with code 2.

Only the standard library is imported here: programs are run in a sandbox by Pythons without any other package.
"""

import re
from collections.abc import Iterable
from typing import Any

REQUEST = re.compile(r"\(Request ID:[^)]*\)")
"""What the hub puts into its messages, of no use to a reader."""


class InputError(ValueError):
    """What a user gave is wrong or partial. The message names the file, the key and what was expected."""


def check_keys(found: Any, keys: Iterable[str], place: object, what: str) -> None:
    """Stop at what is no mapping with these keys: at ``place``, ``what`` was expected."""
    for key in keys:
        if not isinstance(found, dict) or key not in found:
            raise InputError(f"{place}: no key {key!r}; expected {what}")


def one_line(error: BaseException) -> str:
    """An error's message on one line of at most 200 characters."""
    return " ".join(REQUEST.sub("", str(error)).split())[:200]
