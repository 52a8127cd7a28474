"""The base model of a merge as a method sees it: its weights, and what was measured at it on the experts' rows."""

from collections.abc import Mapping, Sequence

from src.adapters.base_weights import BaseWeights
from src.adapters.convert import stored_weight
from src.adapters.deltas import Delta, DenseDelta
from src.errors import InputError
from src.merge.base import MergeMethod
from src.merge.fisher_passes import Pass, check_keys, read_pass
from src.models.patch_at import reference_point

EXPERTS = {"safety": {"safety": 1.0}, "utility": {"utility": 1.0}}
"""Reference point of each expert alone."""
ROWS = "rows_sha256"
"""What the measurements at base and expert must share, in the record."""
TOKENS = "measured_sha256"
"""The same of tokens and weights of rows, which older records lack."""


def read_at_base(folder: str, experts: Sequence[Pass], method: MergeMethod) -> list[Pass]:
    """The passes at the base that belong to passes at the experts.

    Args:
        folder: Directory measured at the base.
        experts: The ``safety`` pass at the safety expert and the ``utility`` pass at the utility expert.
        method: The method, which names coordinates and representations.

    Raises:
        InputError: a pass was taken at another point, base and expert were measured on different rows, or a record
            does not say where and on what it was measured.
    """
    found = []
    for expert in experts:
        name = expert.file.record["pass"]
        base = read_pass(folder, name, method)
        for one in (expert, base):
            check_keys(one, ("reference", ROWS))
        check_reference(expert, EXPERTS[name])
        check_reference(base, {})
        here, there = base.file.record, expert.file.record
        if here[ROWS] != there[ROWS]:
            raise InputError(f"{base.path}: measured with other rows than {expert.path}; measure both alike")
        if TOKENS in here and TOKENS in there and here[TOKENS] != there[TOKENS]:
            raise InputError(
                f"{base.path}: measured with the rows of {expert.path}, and with other tokens or weights of them "
                "(data.max_length, chat_template, utility_weights, …); measure both alike"
            )
        found.append(base)
    return found


def check_reference(one: Pass, wanted: dict[str, float]) -> None:
    """Check that a pass was measured at a point.

    Args:
        one: The pass.
        wanted: Weight of each adapter there; empty for the base.

    Raises:
        InputError: it was measured at another one.
    """
    given = one.file.record["reference"]
    if reference_point(given) != wanted:
        what = next(iter(wanted), "base")
        flag = "base" if what == "base" else f"'{{{what}: 1.0}}'"
        name = one.file.record["pass"]
        raise InputError(
            f"{one.path}: measured at {given}; expected the {what}{'' if what == 'base' else ' expert'} alone: "
            f"`python -m src fisher --model.reference_{name} {flag}`"
        )


def weights_of(base: BaseWeights, modules: Mapping[str, tuple[int, int]]) -> dict[str, Delta]:
    """The base's weight of each module, (O, I), mapped from its file.

    Raises:
        InputError: it has none of that shape.
    """
    return {name: DenseDelta(stored_weight(base, name, shape)) for name, shape in modules.items()}
