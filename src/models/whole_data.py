"""Results are of all rows or none: a Trainer that leaves batches out is refused."""

from src.errors import InputError


def check_whole(limit: float, option: str, result: str) -> None:
    """Check that a loop goes over all its batches.

    Args:
        limit: The Trainer's limit: a number of batches (int) or a share of them.
        option: The Trainer's option, for the message.
        result: What a part of the batches is not.

    Raises:
        InputError: it is limited.
    """
    if isinstance(limit, int) or limit != 1.0:
        raise InputError(
            f"trainer.{option} is {limit}: a part of the batches is no {result}; leave it out (rows have limits of "
            "their own)"
        )
