"""The refusal matcher: start-anchored, or one of the published lists."""

import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from src.files import sha256_file
from src.metrics import refusal, refusal_lists
from src.metrics.judging import Judge, Judgement, Property
from src.metrics.refusal_lists import RefusalList, matches


class Refusal(Judge):
    """Finds refusals by their words.

    Args:
        phrases: ``openings`` is this project's start-anchored matcher; the others are published lists.
    """

    finds: Property = "refusal"

    def __init__(self, phrases: RefusalList = "openings") -> None:
        self.phrases = phrases

    @property
    def content(self) -> str:
        """Digest of the lists and of how they are matched."""
        return _lists_digest()

    def judge(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Judgement]:
        """One judgement per answer; prompts are not read."""
        return [Judgement(matches(answer, self.phrases)) for answer in answers]


@cache
def _lists_digest() -> str:
    files = [sha256_file(Path(str(module.__file__))) for module in (refusal, refusal_lists)]
    return hashlib.sha256("".join(files).encode()).hexdigest()
