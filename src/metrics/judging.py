"""What a judge is: given prompts and answers it says of each answer whether it has one property.

A judge's property is either *refusal* or *harmful compliance*. The two are not each other's opposite: a collapsed,
evasive or useless answer is neither. Attack success is the share of answers that comply harmfully, so only a judge of
harm can give it.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from src.errors import InputError

Property = Literal["refusal", "harmful"]
UNDECIDED = "undecided"
"""Beginning of the reply of a judge that would not say yes or no, where that is counted as no."""


@dataclass(frozen=True)
class Judgement:
    """Whether an answer has the judge's property, the judge's score for it in [0, 1], and what the judge replied."""

    positive: bool
    score: float | None = None
    reply: str = ""


class Unfinished(InputError):
    """A judge failed on some answers; ``found`` are its judgements of others, by position."""

    def __init__(self, message: str, found: Mapping[int, Judgement] | None = None) -> None:
        super().__init__(message)
        self.found = dict(found or {})


class Judge(ABC):
    """Judges answers. Settings are plain attributes without a leading underscore; with the content they identify it."""

    finds: Property
    counting: ClassVar[frozenset[str]] = frozenset()
    """Settings that say how verdicts are counted, and by which no other is given: verdicts are kept for all of them."""

    def load(self, device: str) -> None:  # noqa: B027 - most judges have nothing to load
        """Load what is needed to judge, on a device."""

    def unload(self) -> None:  # noqa: B027
        """Let go of what was loaded."""

    def check(self) -> None:
        """Try whether this judge can judge, and keep nothing: answers are generated for hours before it is needed.

        A model is loaded on the CPU and let go, so that it takes no memory while answers are generated.

        Raises:
            InputError: it cannot.
        """
        self.load("cpu")
        self.unload()

    @property
    def settings(self) -> dict[str, Any]:
        """Name and settings, as recorded beside every score."""
        return {"judge": type(self).__name__} | {k: v for k, v in vars(self).items() if not k.startswith("_")}

    @property
    def content(self) -> str:
        """What settings only name: a digest of the model's files or of the lists; empty where they name nothing."""
        return ""

    @property
    def key(self) -> str:
        """First 16 hexadecimal digits of the SHA-256 of settings and content: verdicts are kept under it."""
        given = {name: value for name, value in self.settings.items() if name not in self.counting}
        identity = given | ({"content": self.content} if self.content else {})
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]

    def stands(self, verdict: Mapping[str, Any]) -> bool:
        """Whether a verdict of an earlier run, as it was kept, is one of this judge as it is set now."""
        return True

    @abstractmethod
    def judge(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Judgement]:
        """One judgement per answer, in order.

        Raises:
            Unfinished: the judge failed on the way.
        """
