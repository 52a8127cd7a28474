"""What a judge is: given prompts and answers it says of each answer whether it has one property.

A judge's property is either *refusal* or *harmful compliance*. The two are not each other's opposite: a collapsed,
evasive or useless answer is neither. Attack success is the share of answers that comply harmfully, so only a judge of
harm can give it.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Literal, get_args
from uuid import uuid4

from src.errors import InputError
from src.own_classes import UNDERSCORE, check_json, is_own, own_sources

Property = Literal["refusal", "harmful"]
CUT = "cut"
"""Reply of a model that read a part of what it judged."""
UNDECIDED = "undecided"
"""Beginning of the reply of a judge that would not say yes or no, where that is counted as no."""


@dataclass(frozen=True)
class Judgement:
    """Whether an answer has the judge's property, the judge's score for it in [0, 1], and what the judge replied."""

    positive: bool
    score: float | None = None
    reply: str = ""


def is_undecided(reply: object) -> bool:
    """Whether it is the reply of a judge that would not say yes or no."""
    return str(reply).startswith(UNDECIDED)


def reservations(replies: Iterable[str]) -> dict[str, int]:
    """Verdicts on a part of an answer, and those that a judge would not give, where there are any."""
    said = list(replies)
    counts = {"cut": said.count(CUT), "undecided": sum(map(is_undecided, said))}
    return {name: count for name, count in counts.items() if count}


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

        A model is loaded on the CPU and let go, so that it takes no memory while answers are generated. A judge of a
        user's own judges a made-up answer, too.

        Raises:
            InputError: it cannot.
        """
        if is_own(type(self)):
            _try(self)
        else:
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
        """First 16 hexadecimal digits of the SHA-256 of settings and content: verdicts are kept under it.

        The source of a judge of a user's own is a part of them.

        Raises:
            InputError: a setting has no form in JSON.
        """
        check_json(self.settings, f"judge {type(self).__name__}: its attribute", UNDERSCORE)
        given = {name: value for name, value in self.settings.items() if name not in self.counting}
        identity = given | ({"content": self.content} if self.content else {})
        if is_own(type(self)):
            # No attribute has a name with spaces.
            identity["source of the class"] = _sources(type(self))
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


@cache
def _sources(kind: type) -> list[str]:
    """The sources of a user's judge, as they are when they are first asked for: later they may not be what runs.

    Of one in a notebook nothing tells two definitions apart but that they are two: its verdicts serve no other.
    """
    return own_sources(kind) or [uuid4().hex]


def _try(judge: Judge) -> None:
    """Let a user's judge judge a made-up answer; a shipped one's model is not asked what it is known to give."""
    before = judge.key
    judge.load("cpu")
    judgements(judge, ["Say hello."], ["Hello!"])
    if judge.key != before:
        expected = "expected a leading underscore where one is no setting"
        raise InputError(f"judge {type(judge).__name__}: its attributes change as it loads or judges; {expected}")


def judgements(judge: Judge, prompts: Sequence[str], answers: Sequence[str]) -> list[Judgement]:
    """What a judge says of answers.

    Raises:
        InputError: it says something else than one judgement per answer.
    """
    check_finds(judge)
    found, name = judge.judge(prompts, answers), type(judge).__name__
    expected = "expected a list with one Judgement per answer"
    if not isinstance(found, list):
        raise InputError(f"judge {name}: judge() gave a value of type {type(found).__name__}; {expected}")
    if len(found) != len(answers):
        raise InputError(f"judge {name}: judge() gave {len(found)} judgements on {len(answers)} answers; {expected}")
    for one in found:
        if type(one) is not Judgement:
            raise InputError(f"judge {name}: judge() gave a list with a {type(one).__name__}; {expected}")
        for key, kind in (("positive", bool), ("score", float | int | None), ("reply", str)):
            if not isinstance(getattr(one, key), kind):
                given = f"a Judgement whose {key} is of type {type(getattr(one, key)).__name__}"
                raise InputError(f"judge {name}: judge() gave {given}; expected {getattr(kind, '__name__', kind)}")
    return found


def check_finds(judge: Judge) -> None:
    """Stop at a judge that does not say what it finds.

    Raises:
        InputError: its attribute ``finds`` is missing, or no property.
    """
    found = getattr(judge, "finds", None)
    if found not in get_args(Property):
        name, expected = type(judge).__name__, " or ".join(map(repr, get_args(Property)))
        raise InputError(f"judge {name}: its attribute finds is {found!r}; expected {expected}")
