"""The merge stage: adapters and Fisher files in, merged PEFT adapter out.

θ0 + ΔW_u + α · patch,   written as the exact concatenation of factors (rank r_u + rank of the patch)
"""

import logging
from pathlib import Path
from typing import Any

from src.adapters.basis import CoreBasis
from src.adapters.checks import check_base, check_compatible
from src.adapters.pairs import weighted_sum
from src.adapters.peft_files import Adapter, read_adapter, write_adapter
from src.errors import InputError
from src.files import check_output, new_directory
from src.fisher.files import FisherFile, load_fisher
from src.merge.base import FisherPair, MergeMethod, Patch
from src.merge.card import merge_card
from src.provenance import versions

log = logging.getLogger(__name__)


def merge(
    *,
    method: MergeMethod,
    utility: list[str] | str,
    safety: str,
    output: str,
    alpha: list[float] | float = 1.0,
    utility_weights: list[float] | None = None,
    fisher: str | None = None,
    overwrite: bool = False,
) -> None:
    """Merge a safety adapter into utility adapters and write the result as a PEFT adapter.

    Args:
        method: How the patch is derived from the safety adapter, such as ``TaskArithmetic`` or ``Sst``.
        utility: Utility adapter, or a list of them (directories or hub ids).
        safety: Safety adapter (directory or hub id).
        output: Directory to write; with several strengths, one sub-directory ``alpha-…`` each.
        alpha: Strength of the patch, at least 0; a list writes one merged adapter per strength. 0 gives the utility
            adapter alone.
        utility_weights: Weight of each utility adapter; unset means 1 for each.
        fisher: Directory with ``safety.safetensors`` and ``utility.safetensors``, as written by the fisher command.
        overwrite: Replace an output that exists.
    """
    strengths = alpha if isinstance(alpha, list) else [alpha]
    for value in strengths:
        if not 0 <= value < float("inf"):
            raise InputError(f"alpha is {value}; expected a finite number of at least 0")
    if not strengths or len(set(strengths)) < len(strengths):
        raise InputError(f"alpha is {alpha}; expected one strength or several different ones")
    check_output(Path(output), overwrite=overwrite)
    experts = [read_adapter(path) for path in ([utility] if isinstance(utility, str) else utility)]
    weights = utility_weights or [1.0] * len(experts)
    if len(weights) != len(experts):
        raise InputError(f"utility_weights: {len(weights)} weights for {len(experts)} adapters")
    patcher = read_adapter(safety)
    check_compatible([*experts, patcher])
    pair, seen = None, set[str]()
    if method.needs_fisher:
        pair, seen = _fisher_pair(fisher, experts, patcher)

    total = weighted_sum([expert.pairs for expert in experts], weights)
    patch = method.patch(total, patcher.pairs, pair)
    manifest = _manifest(method, experts, weights, patcher, patch)
    known = frozenset(seen).union(patcher.seen, *(expert.seen for expert in experts))
    with new_directory(Path(output)) as folder:
        for value in strengths:
            target = folder / f"alpha-{value:g}" if isinstance(alpha, list) else folder
            merged = weighted_sum([total, patch.pairs], [1.0, value])
            made = manifest | {"alpha": value}
            write_adapter(target, merged, base=patcher.base, manifest=made, seen=known, card=merge_card(made))
    log.info("%s: %d merged adapter(s) in %s", method.name, len(strengths), output)


def _fisher_pair(folder: str | None, experts: list[Adapter], safety: Adapter) -> tuple[FisherPair, set[str]]:
    """Both Fisher matrices, checked to belong to these adapters."""
    if folder is None:
        raise InputError(
            "this method needs both Fisher files: pass --fisher DIRECTORY (made by `python -m src fisher`)"
        )
    files = {name: load_fisher(Path(folder) / f"{name}.safetensors") for name in ("safety", "utility")}
    hashes = [expert.sha256 for expert in experts]
    for name, file in files.items():
        path = Path(folder) / f"{name}.safetensors"
        if file.record["pass"] != name:
            raise InputError(f"{path}: holds the {file.record['pass']} pass; expected the {name} pass")
        check_base(safety, file.record["base"]["name"], file.record["base"]["fingerprint"], what=f"the base of {path}")
        if file.record["safety"]["sha256"] != safety.sha256:
            raise InputError(
                f"{path}: measured for the safety adapter {file.record['safety']['path']}, not {safety.name}"
            )
        if [entry["sha256"] for entry in file.record["utility"]] != hashes:
            names = ", ".join(entry["path"] for entry in file.record["utility"])
            raise InputError(
                f"{path}: measured at the utility adapters {names}; those of this merge have other weights"
            )
    one, two = files["safety"], files["utility"]
    if one.record["basis_sha256"] != two.record["basis_sha256"]:
        raise InputError(f"{folder}: the two Fisher files use different coordinates; measure both in one run")
    seen = {prompt for file in files.values() for prompt in file.record["seen"]}
    return FisherPair(one.fisher, two.fisher, _basis(one)), seen


def _basis(file: FisherFile) -> CoreBasis:
    return CoreBasis(file.u, file.v)


def _settings(method: MergeMethod) -> dict[str, Any]:
    return {key: value for key, value in vars(method).items() if not key.startswith("_")}


def _manifest(
    method: MergeMethod, experts: list[Adapter], weights: list[float], safety: Adapter, patch: Patch
) -> dict[str, Any]:
    return {
        "kind": "merge",
        "method": method.name,
        "settings": _settings(method),
        "utility": [
            {"path": expert.name, "sha256": expert.sha256, "weight": weight}
            for expert, weight in zip(experts, weights, strict=True)
        ],
        "safety": {"path": safety.name, "sha256": safety.sha256},
        "base": {"name": safety.base, "fingerprint": safety.fingerprint},
        "findings": patch.findings,
        "versions": versions(),
    }
