"""The refusal matcher: start-anchored, or one of the published lists."""

from collections.abc import Sequence

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

    def judge(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Judgement]:
        """One judgement per answer; prompts are not read."""
        return [Judgement(matches(answer, self.phrases)) for answer in answers]
