"""The one exception that a wrong input raises: the command line prints it as one line and exits with code 2.

Only the standard library is imported here: programs are run in a sandbox by Pythons without any other package.
"""


class InputError(ValueError):
    """What a user gave is wrong or partial. The message names the file, the key and what was expected."""


def one_line(error: BaseException) -> str:
    """An error's message on one line of at most 200 characters."""
    return " ".join(str(error).split())[:200]
