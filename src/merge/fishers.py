"""The Fisher files that a merge works on, read and checked to belong to its adapters.

A safety method takes F_s of one directory and F_u of one or of several,

    F_u = Σ_k w_k F_u,k / Σ_k w_k

all measured at the same reference points in the same coordinates: several benign sets, or the sets of several utility
experts, each at the common reference. A combination that weighs experts by their own statistics takes one directory
per expert, each with the ``utility`` pass of that expert alone.
"""

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from src.adapters.base_weights import BaseWeights, open_base
from src.adapters.basis import CoreBasis
from src.adapters.checks import base_revision
from src.adapters.peft_files import Adapter
from src.errors import InputError
from src.fisher.base import Fisher
from src.gevp.overlap import overlap
from src.merge.base import FisherBesideBase, FisherPair, MergeMethod
from src.merge.base_point import EXPERTS, check_reference, read_at_base, weights_of
from src.merge.combination import Combination
from src.merge.fisher_passes import Pass, check_keys, read_pass
from src.merge.patched_fishers import mean_fisher, patched
from src.models.base import weights_folder
from src.models.patch_at import reference_point

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Calibration:
    """What the Fisher files of a merge hold.

    Attributes:
        pair: Both Fisher matrices, for a method that needs them.
        statistics: The Fisher matrix of each expert, for a combination that needs them; else empty.
        seen: Hashes of the prompts that they were measured on.
        files: What the manifest says of each file: path, weight, pass, form, labels, reference point, examples.
        base_fingerprint: That of the base that they were measured on, where it has one.
    """

    pair: FisherPair | None = None
    statistics: tuple[Fisher, ...] = ()
    seen: frozenset[str] = frozenset()
    files: tuple[dict[str, Any], ...] = ()
    base_fingerprint: str | None = None

    @cached_property
    def overlap(self) -> dict[str, Any] | None:
        """Principal angles and rank correlation of F_s and F_u, computed once.

        None without both, for unlike representations, and in weight coordinates (they have no small core space).
        """
        pair = self.pair
        if pair is None or not pair.basis.modules or pair.safety.representation != pair.utility.representation:
            return None
        return overlap(pair.safety, pair.utility)


NONE = Calibration()


def read_pair(
    folders: Sequence[str],
    weights: Sequence[float] | None,
    experts: Sequence[Adapter],
    safety: Adapter,
    method: MergeMethod,
    base: BaseWeights | None = None,
) -> Calibration:
    """Both Fisher matrices of a safety method.

    Args:
        folders: Directories as written by the fisher command. F_s, and the mean scores of refusals, come from the
            first; F_u, and for re-learned coefficients the benign pass, are weighted means over all.
        weights: Weight of each directory in F_u, at least 0; unset means 1 for each.
        experts: Utility adapters of the merge.
        safety: Its safety adapter.
        method: The method, which names the coordinates and representations that it can work with.
        base: The base's weights, where the user named them.

    Raises:
        InputError: a file is missing, of another pass, of other adapters or coordinates, or of a form that the method
            cannot work with; or directories were measured at different points, labels or granularities.
    """
    _check_no_biases(method, [*experts, safety])
    shares, at = checked_weights(folders, weights), method.base_folder()
    if at is not None and len(folders) > 1:
        raise InputError(f"fisher: {len(folders)} directories; {type(method).__name__} takes one, for one at the base")
    first = read_pass(folders[0], "safety", method)
    utilities = [read_pass(folder, "utility", method, share) for folder, share in zip(folders, shares, strict=True)]
    benign = [
        read_pass(folder, "benign", method, share)
        for folder, share in zip(folders, shares, strict=True)
        if method.relearns
    ]
    at_base = [] if at is None else read_at_base(at, [first, *utilities], method)
    passes = [first, *utilities, *benign, *at_base]
    for one in passes:
        one.check_adapters(experts, safety)
        one.check_coordinates(first)
        one.check_base_of(first)
    if isinstance(method, Combination):
        # The experts are combined, so each is measured at itself.
        for one in (first, *utilities):
            check_keys(one, ("reference",))
            check_reference(one, EXPERTS[one.file.record["pass"]])
    for group in (utilities, benign):
        _check_alike(group)
    _tell_points(first, utilities, method)
    basis, f_u = CoreBasis(first.file.u, first.file.v), mean_fisher(utilities)
    pair = FisherPair(first.file.fisher, f_u, basis)
    if method.relearns:
        _check_alike([first, *benign], ("reference", "reference_identity", "utility weights"))
        for one in passes:
            one.check_by_row()
        pair = replace(patched(basis, first, utilities, benign), start=first.start())
        if any(one.fitted_before for one in (first, *utilities, *benign)):
            pair = replace(pair, halves=None)  # rows that have made the start are held out from nothing
    if at_base:
        pair = _beside_base(pair, at_base, [*experts, safety], base)
    return _calibration(passes, pair=pair)


def _tell_points(safety: Pass, utilities: Sequence[Pass], method: MergeMethod) -> None:
    """Say where Fisher matrices were measured; warn where a method's options ask for another point."""
    at = [one.file.record.get("reference") for one in (safety, utilities[0])]
    log.info("%s: F_s was measured at %s, F_u at %s", safety.path.parent, *at)
    wanted = method.safety_point
    if wanted is not None and at[0] is not None and reference_point(at[0]) != wanted:
        log.warning(
            "%s: measured at %s; with these options %s leads to the safety adapter alone, where F_s belongs: "
            "--model.reference_safety '{safety: 1.0}'",
            safety.path,
            at[0],
            type(method).__name__,
        )


def read_statistics(folders: Sequence[str], experts: Sequence[Adapter], method: MergeMethod) -> Calibration:
    """The Fisher matrix of each expert, from the ``utility`` pass of one directory per expert.

    Args:
        folders: One directory per expert, in the experts' order.
        experts: The experts.
        method: The combination.

    Raises:
        InputError: there are not as many directories as experts, or a file is not of its expert alone.
    """
    _check_no_biases(method, experts)
    if len(folders) != len(experts):
        raise InputError(
            f"fisher: {len(folders)} directories for {len(experts)} utility adapters; {type(method).__name__} needs "
            "one for each, in their order"
        )
    passes = [read_pass(folder, "utility", method) for folder in folders]
    for one, expert in zip(passes, experts, strict=True):
        one.check_expert(expert)
        one.check_base_of(passes[0])
        if one.file.fisher.representation != passes[0].file.fisher.representation:
            raise InputError(f"{one.path}: another representation than {passes[0].path}; measure all experts alike")
    _check_alike(passes, ("labels", "granularity"))
    return _calibration(passes, statistics=tuple(one.file.fisher for one in passes))


def _check_no_biases(method: MergeMethod, adapters: Sequence[Adapter]) -> None:
    """Check that Fisher files of weights can be of these adapters: an update of a layer's bias is no entry of a weight.

    Raises:
        InputError: they cannot.
    """
    if method.coordinates == "weight" and any(adapter.layout.constant for adapter in adapters):
        raise InputError(
            f"{type(method).__name__} works on weights and takes no adapters with biases (lora_bias, or fully trained "
            "ones), which one of these has; train without, or choose a method in core coordinates such as Sst"
        )


def checked_weights(folders: Sequence[str], weights: Sequence[float] | None) -> list[float]:
    """Weight of each directory in F_u.

    Raises:
        InputError: there are not as many as directories, or one is negative, or all are zero.
    """
    given = list(weights or [1.0] * len(folders))
    if len(given) != len(folders):
        raise InputError(f"fisher_weights: {len(given)} weights for {len(folders)} directories")
    if min(given) < 0 or not 0 < sum(given) < float("inf"):
        raise InputError(f"fisher_weights is {given}; expected numbers of at least 0 with a positive sum")
    return given


def _check_alike(passes: Sequence[Pass], keys: Sequence[str] | None = None) -> None:
    """Check that passes over several data sets have a mean: one reference point, one kind of label, one of example.

    Args:
        passes: The passes.
        keys: What must be the same; unset means all of that.

    Raises:
        InputError: they have not.
    """
    for one in passes[1:]:
        for key, wanted in _measure(passes[0]).items():
            if key in (keys or (key,)) and (found := _measure(one)[key]) != wanted:
                raise InputError(
                    f"{one.path}: {key} is {found}, that of {passes[0].path} is {wanted}; expected the same in "
                    "all files that are taken together"
                )


def _measure(one: Pass) -> dict[str, Any]:
    """What the Fisher matrices of a mean must have in common, by its key in the record."""
    record = one.file.record
    given = record.get("reference")
    point = {} if given is None else reference_point(given)
    return {
        "reference": None if given is None else point or "base",
        "reference_identity": record.get("reference_identity") or None,
        "utility weights": [entry.get("weight") for entry in record["utility"]] if "utility" in point else None,
        "labels": record.get("labels"),
        "granularity": record.get("granularity"),
    }


def _calibration(passes: Sequence[Pass], **parts: Any) -> Calibration:
    seen = frozenset(prompt for one in passes for prompt in one.file.record["seen"])
    prints = (one.file.record["base"]["fingerprint"] for one in passes)
    files, known = tuple(one.entry for one in passes), next(filter(None, prints), None)
    return Calibration(**parts, seen=seen, files=files, base_fingerprint=known)


def _beside_base(
    pair: FisherPair, at_base: Sequence[Pass], adapters: Sequence[Adapter], base: BaseWeights | None
) -> FisherBesideBase:
    measured = FisherPair(at_base[0].file.fisher, at_base[1].file.fisher, pair.basis)
    modules = {name: delta.shape for adapter in adapters for name, delta in adapter.updates.items()}
    name = adapters[0].base
    revision = base_revision(adapters, name)
    with nullcontext(base) if base is not None else open_base(weights_folder(name), revision) as opened:
        weights = weights_of(opened, modules)
    return FisherBesideBase(pair.safety, pair.utility, pair.basis, base=measured, weights=weights)
