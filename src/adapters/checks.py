"""Do these adapters belong together? Each answer is one clear error line."""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from src.adapters.base_weights import BaseWeights
from src.adapters.peft_files import Adapter
from src.errors import InputError

log = logging.getLogger(__name__)


def same_base_name(first: str, second: str) -> bool:
    """Whether two base names mean one model: equal, the same path, or a hub id and a directory of that name."""
    if first == second:
        return True
    one, two = Path(first), Path(second)
    if one.exists() and two.exists():
        return one.resolve() == two.resolve()
    return (one.exists() or two.exists()) and one.name == two.name


def check_base(adapter: Adapter, base: str, fingerprint: str | None, *, what: str) -> None:
    """Check that an adapter was trained on this base.

    Args:
        adapter: The adapter.
        base: Name of the base.
        fingerprint: Its fingerprint, where known; it decides if the adapter has one too.
        what: Where ``base`` comes from, for the message.

    Raises:
        InputError: it was trained on another one.
    """
    if fingerprint and adapter.fingerprint:
        if fingerprint != adapter.fingerprint:
            raise InputError(f"{adapter.name}: trained on other weights of {adapter.base!r} than those of {what}")
    elif not same_base_name(adapter.base, base):
        raise InputError(f"{adapter.name}: trained on the base {adapter.base!r}; {what} is {base!r}")


def check_weights(adapters: Sequence[Adapter], base: BaseWeights, name: str) -> str:
    """Warn where the weights of a base are not those on which adapters were trained, as far as that is known.

    This project's adapters know a fingerprint, others only the base's name. Some architectures' files name weights
    otherwise than the loaded model does, so that equal weights can look different: hence no error.

    Args:
        adapters: The adapters.
        base: The weights.
        name: What the user calls them.

    Returns:
        Their fingerprint.
    """
    found = base.fingerprint()
    known = {adapter.fingerprint: adapter.name for adapter in adapters if adapter.fingerprint}
    # float16 holds fewer of the small numbers: an adapter that was trained on it knows those of the rounded weights.
    if known and found not in known and base.fingerprint(torch.float16) not in known:
        log.warning("%s: other weights than those that %s was trained on", base.folder, next(iter(known.values())))
    for adapter in adapters if not known else []:
        if not same_base_name(adapter.base, name):
            log.warning("%s: trained on the base %r; the weights are those of %s", adapter.name, adapter.base, name)
    return found


def check_compatible(adapters: Sequence[Adapter]) -> None:
    """Check that adapters share a base, and that common modules have one shape.

    What updates other modules of one base may be merged: a module that an adapter lacks has the update zero. Where they
    name no base, only common modules tell that they are of one.

    Raises:
        InputError: they do not; the message names both adapters.
    """
    first = adapters[0]
    owners: dict[str, Adapter] = {}
    for other in adapters:
        check_base(other, first.base, first.fingerprint, what=f"that of {first.name}")
        for name, update in other.updates.items():
            owner = owners.setdefault(name, other)
            shapes = owner.updates[name].shape, update.shape
            if shapes[0] != shapes[1]:
                raise InputError(f"{owner.name} and {other.name}: {name} has shapes {shapes[0]} and {shapes[1]}")
    for place, one in enumerate(adapters) if not first.base else []:
        rest = [other for number, other in enumerate(adapters) if number != place]
        if rest and not any(name in other.updates for other in rest for name in one.updates):
            names = ", ".join(other.name for other in rest)
            raise InputError(
                f"{one.name} and {names}: adapters with no module in common cannot be merged where they name no base; "
                "expected base_model_name_or_path in their configurations, which tells that they are of one model"
            )
