"""Do these adapters belong together? Each answer is one clear error line."""

import json
import logging
import re
from collections.abc import Sequence
from functools import cache
from itertools import combinations
from pathlib import Path

import torch

from src.adapters.base_weights import HUB, BaseWeights, on_hub
from src.adapters.peft_files import Adapter, read_base
from src.errors import InputError

log = logging.getLogger(__name__)
SNAPSHOT = re.compile(r"(.*/)?models--(?P<id>[^/]+)/snapshots/[^/]+")
"""Where the hub's cache keeps a revision of a model."""


def same_base_name(first: str, second: str) -> bool:
    """Whether two base names mean one model.

    They are equal or the same path; or a hub id and a directory of that name; or two spellings of one hub id, in other
    capitals, with a slash at the end, or as a path into the hub's cache.
    """
    one, two = _spelled(first), _spelled(second)
    if one == two or not (one and two):
        return one == two
    here = Path(one).exists(), Path(two).exists()
    if all(here):
        return Path(one).resolve() == Path(two).resolve()
    if any(here):
        return Path(one).name == Path(two).name
    return all(map(HUB.fullmatch, (one, two))) and one.casefold() == two.casefold()


def _spelled(name: str) -> str:
    """A base's name without a slash at its end; the hub id of a path into the hub's cache."""
    plain = name.rstrip("/")
    cached = SNAPSHOT.fullmatch(plain)
    return plain if cached is None else cached["id"].replace("--", "/", 1)


@cache
def _tell_by_folder(adapter: str, known: str, base: str) -> None:
    """Say once where nothing but the name of a directory tells that two bases are one model."""
    one, two = _spelled(known), _spelled(base)
    if one and two and same_base_name(one, two) and (Path(one).exists() != Path(two).exists()):
        log.info("%s: its base %r is taken to be %r, by the directory's name", adapter, known, base)


def has_name(name: str, names: Sequence[str]) -> bool:
    """Whether a base's name means the same model as one of these."""
    return any(same_base_name(name, one) for one in names)


def base_revision(adapters: Sequence[Adapter], name: str) -> str | None:
    """The git revision of a base that adapters name; unset where none does, and for a base that lies here.

    Args:
        adapters: The adapters; those of another base say nothing.
        name: Name of the base.

    Raises:
        InputError: they name two, and no fingerprints say that the weights are the same.
    """
    stated = [adapter for adapter in adapters if adapter.revision and same_base_name(adapter.base, name)]
    for one, two in combinations(stated, 2):
        same = one.fingerprint and one.fingerprint == two.fingerprint
        if one.revision != two.revision and not same:
            raise InputError(
                f"{two.name}: trained on the revision {two.revision!r} of the base {two.base!r}, {one.name} on "
                f"{one.revision!r}; expected one (if these are the same weights, change revision in an "
                "adapter_config.json)"
            )
    return stated[0].revision if stated and on_hub(name) else None


def revision_for(base: str, folders: Sequence[str]) -> str | None:
    """The git revision of a base that adapters name, before their updates are read.

    Args:
        base: Name of the base.
        folders: PEFT LoRA directories or hub ids.

    Raises:
        InputError: see :func:`base_revision`; or a configuration cannot be read.
    """
    return base_revision([read_base(folder) for folder in folders], base) if on_hub(base) else None


def _check_revisions(adapters: Sequence[Adapter]) -> None:
    """Check that adapters name one revision of a base; warn of those that name none, as PEFT writes unless told.

    Raises:
        InputError: see :func:`base_revision`.
    """
    known = {adapter.fingerprint for adapter in adapters if adapter.revision}
    for adapter in adapters:
        revision = base_revision(adapters, adapter.base)
        told = adapter.revision or (adapter.fingerprint and adapter.fingerprint in known)
        if revision is not None and not told:
            log.warning("%s: names no revision of its base, of which others name %r", adapter.name, revision)


def check_base(
    adapter: Adapter,
    base: str,
    fingerprint: str | None,
    *,
    what: str,
    aliases: Sequence[str] = (),
    option: str | None = None,
    revision: str | None = None,
) -> None:
    """Check that an adapter was trained on this base.

    Args:
        adapter: The adapter.
        base: Name of the base.
        fingerprint: Its fingerprint, where known; it decides if the adapter has one too.
        what: Where ``base`` comes from, for the message.
        aliases: Other names of the base.
        option: The option that takes them, for the message.
        revision: Its git revision, where known; one that the adapter names must be this.

    Raises:
        InputError: it was trained on another one.
    """
    if not (fingerprint and adapter.fingerprint):
        _tell_by_folder(adapter.name, adapter.base, base)
    if fingerprint and adapter.fingerprint:
        if fingerprint != adapter.fingerprint:
            raise InputError(
                f"{adapter.name}: trained on the base {adapter.base!r}; {what} is {base!r} with other weights"
            )
    elif not has_name(adapter.base, [base, *aliases]):
        given = "" if option is None else f" or give {option} '{json.dumps([adapter.base], ensure_ascii=False)}'"
        raise InputError(
            f"{adapter.name}: trained on the base {adapter.base!r}; {what} is {base!r}; if these are one model, change "
            f"base_model_name_or_path in its adapter_config.json{given}"
        )
    elif revision and adapter.revision not in (None, revision) and on_hub(base) and same_base_name(adapter.base, base):
        flag = (option or "").removesuffix("aliases")
        option = f"give {flag}revision {adapter.revision}, or " if what == "base.name" else ""
        raise InputError(
            f"{adapter.name}: trained on the revision {adapter.revision!r} of the base {adapter.base!r}; {what} is "
            f"that at {revision!r}; {option}if these are the same weights, change revision in its adapter_config.json"
        )


def check_no_embeddings(spanning: Sequence[Adapter]) -> None:
    """Check that adapters whose space is measured update no embedding.

    Args:
        spanning: The adapters, the safety adapter last.

    Raises:
        InputError: one does; the message says how to leave it out.
    """
    for adapter in spanning:
        for name in sorted(adapter.layout.embeddings & set(adapter.pairs)):
            spared = "" if adapter is spanning[-1] else " or --model.basis safety, which leaves out its directions"
            raise InputError(
                f"{adapter.name}: updates the embedding {name}, and embeddings have no Fisher pass, which is of linear "
                f"layers; expected an adapter that was trained without it{spared}"
            )


def check_weights(adapters: Sequence[Adapter], base: BaseWeights, name: str, aliases: Sequence[str] = ()) -> str:
    """Check that the weights of a base are those on which adapters were trained, as far as that is known.

    This project's adapters know a fingerprint, others only the base's name. Some architectures' files name weights
    otherwise than the loaded model does, so that equal weights can look different: hence a warning, where fingerprints
    tell, and an error where names do.

    Args:
        adapters: The adapters.
        base: The weights.
        name: What the user calls them.
        aliases: Other names of the base.

    Returns:
        Their fingerprint.

    Raises:
        InputError: no adapter has a fingerprint, and one is of a base of another name.
    """
    found = base.fingerprint()
    known = {adapter.fingerprint: adapter.name for adapter in adapters if adapter.fingerprint}
    # float16 holds fewer of the small numbers: an adapter that was trained on it knows those of the rounded weights.
    if known and found not in known and base.fingerprint(torch.float16) not in known:
        log.warning("%s: other weights than those that %s was trained on", base.folder, next(iter(known.values())))
    for adapter in adapters if not known else []:
        check_base(adapter, name, None, what="--base", aliases=aliases, option="--aliases")
    return found


def check_compatible(
    adapters: Sequence[Adapter], aliases: Sequence[str] = (), option: str | None = "--aliases"
) -> None:
    """Check that adapters share a base, and that common modules have one shape.

    What updates other modules of one base may be merged: a module that an adapter lacks has the update zero. Where they
    name no base, only common modules tell that they are of one.

    Args:
        adapters: The adapters.
        aliases: Names that all mean their base.
        option: The option that takes them, for the message.

    Raises:
        InputError: they do not; the message names both adapters.
    """
    _check_revisions(adapters)
    # Whatever is no alias must be one name.
    first = next((adapter for adapter in adapters if not has_name(adapter.base, aliases)), adapters[0])
    owners: dict[str, Adapter] = {}
    for other in adapters:
        check_base(other, first.base, first.fingerprint, what=f"that of {first.name}", aliases=aliases, option=option)
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
