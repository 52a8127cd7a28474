"""The one exception that a wrong input raises: the command line prints it as one line and exits with code 2."""

from safetensors import SafetensorError

UNLOADABLE = (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError)
"""What transformers raises for a model that it cannot load, packages that are missing among it."""


class InputError(ValueError):
    """What a user gave is wrong or partial. The message names the file, the key and what was expected."""


def one_line(error: BaseException) -> str:
    """An error's message on one line of at most 200 characters."""
    return " ".join(str(error).split())[:200]
