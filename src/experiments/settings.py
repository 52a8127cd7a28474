"""The methods of a study, typed: a wrong key or option stops before hours of work."""

from dataclasses import dataclass, field
from typing import Any, Literal

from src.data.row_source import Sources
from src.errors import InputError
from src.merge import registry  # noqa: F401 - the subclasses of MergeMethod are the registry
from src.merge.base import MergeMethod
from src.merge.combination import Combination
from src.merge.forms import Form
from src.merge.settings import with_option
from src.merge.sweep import shortest, strengths

BASE_FISHER = "base_fisher"
"""A method's option for Fisher files measured at the base, and the role of the cell that a study makes of them."""
SAFETY_ROWS = "safety_rows"


@dataclass
class Strengths:
    """A method's strength parameter and its path.

    Args:
        option: ``alpha``; an option of the method (or ``combine.NAME``) that is swept; ``safety_rows`` for the number
            of safety rows of mixed training; ``none`` for a method without one (a single value stands for it).
        values: The path, rising from gentle to strong where the parameter has such an order.
    """

    option: str = "alpha"
    values: list[float] = field(default_factory=lambda: [0.25, 0.5, 0.75, 1.0, 1.25, 1.5])


@dataclass
class FirstStep:
    """The merge that a second step of re-learned coefficients goes on from.

    Args:
        method: How its patch is derived.
        alpha: Its strength.
        first: The step before it, where it is not the first itself.
    """

    method: MergeMethod
    alpha: float = 1.0
    first: "FirstStep | None" = None


@dataclass
class MethodSpec:
    """A method of a study.

    Args:
        name: Its name in tables.
        method: How the patch is derived from the safety adapter; unset combines only, or trains.
        combine: How the utility adapters become one update.
        strength: Its strength parameter.
        rank: Largest rank of the merged adapter per module (full-rank methods need ``rank`` or ``energy``).
        energy: Share of the squared norm that the merged adapter keeps.
        train: ``mixed`` trains one adapter on utility and safety rows together, ``utility`` on utility rows alone,
            ``beside_safety`` on utility rows while the safety expert is there and stays (AlignGuard in training, with
            ``model.regularizer`` in ``settings``; its Fisher file is measured at the safety expert); a strength other
            than ``safety_rows`` is then a dotted key of ``settings``. ``core`` fine-tunes the safety expert's core on
            the rows of the Fisher passes beside the utility expert; ``method`` then merges what came out.
        rows: Rows to learn from as well, drawn anew for every seed as those of the Fisher passes: what a calibration
            has seen, for a baseline that trains on it. What ``train`` other than ``core`` makes learns them; of a merge
            its safety expert, which is one of its own then.
        settings: Settings of the training, nested as in the YAML of ``fit``.
        fisher: Settings of this method's Fisher passes, over those of the study.
        control: A control: shown, and no competitor.
        first: For re-learned coefficients: a merge at which the Fisher passes are taken, in place of the whole patch's
            point; the method's step goes on from there. It may have a ``first`` of its own.
    """

    name: str
    method: MergeMethod | None = None
    combine: Combination | None = None
    strength: Strengths = field(default_factory=Strengths)
    rank: int | None = None
    energy: float | None = None
    train: Literal["mixed", "utility", "beside_safety", "core"] | None = None
    rows: Sources | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    fisher: dict[str, Any] = field(default_factory=dict)
    control: bool = False
    first: FirstStep | None = None

    def title(self, value: float) -> str:
        """A point of the path in words: ``TIES, alpha = 0.5``."""
        return (
            self.name if self.strength.option == "none" else f"{self.name}, {self.strength.option} = {shortest(value)}"
        )

    def shown(self, value: float) -> float | None:
        """A strength as tables name it: none for a method without one."""
        return None if self.strength.option == "none" else value

    def check(self) -> None:
        """Stop where options contradict each other."""
        if not self.strength.values or len(set(self.strength.values)) < len(self.strength.values):
            raise InputError(
                f"method {self.name}: strength.values is {self.strength.values}; expected different values"
            )
        self._check_train()
        self._check_option()
        self._check_read()
        if self.train is None and self.method is None and self.combine is None:
            raise InputError(f"method {self.name}: expected one of method, combine and train")
        if self.train is None and self.method is None and self.strength.option == "alpha":
            raise InputError(
                f"method {self.name}: combine alone has no alpha; expected strength option none or combine.NAME"
            )
        if self.first is not None and (self.method is None or not self.method.relearns):
            raise InputError(f"method {self.name}: first is for a method with coefficients relearn")
        if getattr(self.method, BASE_FISHER, None) is not None:
            raise InputError(f"method {self.name}: leave {BASE_FISHER} out; a study measures at the base itself")
        if self.first is not None and "reference_safety" in self.fisher.get("model", {}):
            raise InputError(f"method {self.name}: expected first or fisher.model.reference_safety, not both")
        if self.strength.option == "none" and len(self.strength.values) > 1:
            raise InputError(f"method {self.name}: {len(self.strength.values)} values of strength option none")
        self._check_form()

    @property
    def _merges(self) -> bool:
        """Whether its models are merges along its path, by ``method`` and ``combine``."""
        return self.train in (None, "core")

    def _check_option(self) -> None:
        """Stop where the method has no such option, or takes no such value: merges would say so after all trainings."""
        named, where = self.strength.option, f"method {self.name}: strength "
        if not self._merges:
            if named == "alpha":
                expected = f"{'safety_rows, ' if self.train == 'mixed' else ''}none or a dotted key of settings"
                raise InputError(f"{where}alpha: train {self.train} has none; expected {expected}")
            if named == SAFETY_ROWS and self.train != "mixed":
                raise InputError(f"{where}safety_rows is for train mixed, not {self.train}")
            return
        if named == "alpha":
            try:
                strengths(self.strength.values)
            except InputError as error:
                raise InputError(f"{where}{error}") from None
        if named in ("alpha", "none"):
            return
        head, dot, rest = named.partition(".")
        changed, option = (self.combine, rest) if head == "combine" and dot else (self.method, named)
        if changed is None:
            missing = "combine" if dot else "method (an option of combine is combine.NAME)"
            raise InputError(f"{where}{named}: expected a {missing}")
        for value in self.strength.values:
            with_option(changed, option, value, prefix=where)

    def _check_train(self) -> None:
        if self.train == "core" and self.method is None:
            raise InputError(f"method {self.name}: train core needs a method that merges the tuned safety expert")
        if not self._merges and (self.method is not None or self.combine is not None):
            raise InputError(f"method {self.name}: train takes neither method nor combine")
        if self.rows is not None and self._merges and (self.method is None or not self.method.needs_safety):
            raise InputError(f"method {self.name}: rows are for trainings and for merges with a safety expert")

    def _check_read(self) -> None:
        """Stop where nothing would read an option."""
        if self.settings and self.train is None:
            raise InputError(f"method {self.name}: settings are those of a training; expected train")
        if not self._merges and (self.rank, self.energy) != (None, None):
            raise InputError(f"method {self.name}: rank and energy are for merges, not for train {self.train}")
        guarded = "regularizer" in self.settings.get("model", {}) or "model.regularizer" in self.strength.option
        measures = guarded if self.train == "beside_safety" else self.method is not None and self.method.needs_fisher
        if self.fisher and not measures:
            needy = "a method that needs Fisher files, or train beside_safety with model.regularizer in settings"
            raise InputError(f"method {self.name}: fisher is for {needy}")

    def _check_form(self) -> None:
        """Stop where no adapter holds the merge: merges would say so after all trainings."""
        try:
            form = Form(self.rank, self.energy)
        except InputError as error:
            raise InputError(f"method {self.name}: {error}") from None
        full = [type(one).__name__ for one in (self.method, self.combine) if one and one.full_rank]
        if full and form.exact:
            raise InputError(f"method {self.name}: {full[0]} gives full-rank updates; expected rank or energy")
