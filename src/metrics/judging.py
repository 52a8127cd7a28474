"""What a judge is: given prompts and answers it says of each answer whether it has one property.

A judge's property is either *refusal* or *harmful compliance*. The two are not each other's opposite: a collapsed,
evasive or useless answer is neither. Attack success is the share of answers that comply harmfully, so only a judge of
harm can give it.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Property = Literal["refusal", "harmful"]


@dataclass(frozen=True)
class Judgement:
    """Whether an answer has the judge's property, the judge's score for it in [0, 1], and what the judge replied."""

    positive: bool
    score: float | None = None
    reply: str = ""


class Judge(ABC):
    """Judges answers. Settings are plain attributes without a leading underscore; they identify the judge."""

    finds: Property

    def load(self, device: str) -> None:  # noqa: B027 - most judges have nothing to load
        """Load what is needed to judge, on a device."""

    @property
    def settings(self) -> dict[str, Any]:
        """Name and settings, as recorded beside every score."""
        return {"judge": type(self).__name__} | {k: v for k, v in vars(self).items() if not k.startswith("_")}

    @property
    def key(self) -> str:
        """First 16 hexadecimal digits of the SHA-256 of the settings: verdicts are kept under it."""
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:16]

    @abstractmethod
    def judge(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Judgement]:
        """One judgement per answer, in order."""
