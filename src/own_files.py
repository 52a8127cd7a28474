"""What a command may replace: a directory of files that it wrote itself."""

from collections.abc import Sequence
from pathlib import Path

from src.errors import InputError


def check_own(output: Path, patterns: Sequence[str]) -> None:
    """Refuse to replace a directory that holds files of others, at any depth; hidden ones of it are nobody's.

    Args:
        output: The output, which may be absent.
        patterns: Those of the names of files that the command writes.

    Raises:
        InputError: there is another file.
    """
    for file in output.resolve().rglob("*"):
        if not file.is_dir() and not file.name.startswith(".") and not any(map(file.match, patterns)):
            raise InputError(f"--output {output}: {file} is not this command's, and would be lost")
