"""What the cells of a study are made from, typed: base model, experts, Fisher passes, suites."""

from dataclasses import dataclass, field
from typing import Any, Literal

from src.data.row_source import Sources
from src.data.suite import Suite
from src.errors import InputError
from src.experiments.content import place, sources
from src.judges import registry  # noqa: F401 - the subclasses of Judge are the registry
from src.models.base import BaseSpec


@dataclass
class ExpertSpec:
    """An expert: how it is trained, or where it is.

    Args:
        train: Training rows.
        val: Rows to choose the best checkpoint by, disjoint from them.
        config: YAML of ``fit`` that everything else comes from.
        settings: Settings over those of ``config``, nested like it.
        adapter: A PEFT LoRA directory, or a hub repository of that form, to take in place of a training: the same for
            every seed. ``train``, ``val`` and the rest are then read by methods alone that train another one.
    """

    train: Sources | None = None
    val: Sources | None = None
    config: str = "expert.yaml"
    settings: dict[str, Any] = field(default_factory=dict)
    adapter: str | None = None

    def training_rows(self, what: str) -> tuple[Sources, Sources]:
        """Training and validation rows.

        Args:
            what: The expert and who asks, for the message.

        Raises:
            InputError: it has none.
        """
        if self.train is None or self.val is None:
            there = " and adapter alone is there" if self.adapter is not None else ""
            raise InputError(f"{what}: expected train and val{there}")
        return self.train, self.val


@dataclass
class FisherSpec:
    """The Fisher passes.

    Args:
        safety: Harmful prompts with refusals.
        utility: Benign prompts with answers. Of both a source with ``seed``, ``limit`` and no ``skip``, from a file
            that no expert is trained on, draws other rows for every seed of the study; with ``redraw`` ``experts``
            every source with a ``seed`` does.
        config: YAML of ``fisher`` that everything else comes from.
        settings: Settings over those of ``config``, nested like it.
    """

    safety: Sources
    utility: Sources
    config: str = "fisher.yaml"
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass
class EvaluationSpec:
    """The evaluation.

    Args:
        suites: Suites of prompts; every model of the study answers all of them.
        further: Suites that only report: no strength is chosen on them, so all of their rows are test rows. They are
            answered by commands of their own, one for each suite; a finished study that is given more of them goes on
            from its answers.
        settings: Further settings of ``test``, nested like its YAML, such as ``data: {batch_size: 80}``.
    """

    suites: list[Suite]
    settings: dict[str, Any] = field(default_factory=dict)
    further: list[Suite] = field(default_factory=list)

    def check(self) -> None:
        """Stop where a suite's settings contradict each other, or two share a name: answers are kept under it."""
        names = [suite.name for suite in (*self.suites, *self.further)]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            said = ", ".join(twice)
            raise InputError(f"recipe.evaluation: several suites are named {said}; expected different names")
        for suite in (*self.suites, *self.further):
            suite.check()
            if suite.kind == "code" and 1 not in suite.k:
                raise InputError(f"suite {suite.name}: k is {suite.k}; expected 1 in it, as studies compare pass@1")


@dataclass
class Recipe:
    """Everything that a grid is made from, apart from what a study varies.

    Args:
        base: The base model.
        safety: The safety expert.
        evaluation: The suites.
        utility: The utility expert; unset where a study makes its own.
        fisher: The Fisher passes; unset where no method needs them.
        redraw: What every seed of the study draws anew. ``calibration``: the order of training rows, and rows of the
            Fisher passes from files that no expert is trained on; all trainings begin with the same adapter and read
            the same rows. ``experts``: each expert has initial weights of its own as well, as experts from different
            hands have (methods that train begin with those of the utility expert), and every source with a ``seed``
            gives other rows; parts of one file (``skip``, ``limit``) stay apart.
    """

    base: BaseSpec
    safety: ExpertSpec
    evaluation: EvaluationSpec
    utility: ExpertSpec | None = None
    fisher: FisherSpec | None = None
    redraw: Literal["calibration", "experts"] = "calibration"

    @property
    def learnt(self) -> list[Sources]:
        """Rows of trainings and rows that choose their checkpoints, of both experts."""
        experts = [spec for spec in (self.utility, self.safety) if spec is not None]
        return [rows for spec in experts for rows in (spec.train, spec.val) if rows is not None]

    def check(self) -> None:
        """Stop at suites that cannot be asked, or whose rows a seed's trainings and passes might draw.

        Raises:
            InputError: see above.
        """
        self.evaluation.check()
        if self.redraw == "calibration":
            return
        learnt = [*self.learnt, *([] if self.fisher is None else [self.fisher.safety, self.fisher.utility])]
        taken = {place(source) for rows in learnt for source in sources(rows) if source.seed is not None}
        for suite in (*self.evaluation.suites, *self.evaluation.further):
            for source in sources(suite.rows):
                if place(source) in taken:
                    what = f"recipe.redraw experts: suite {suite.name} has rows of {source.path}"
                    raise InputError(
                        f"{what}, other rows of which every seed's experts or passes draw; expected another file"
                    )
