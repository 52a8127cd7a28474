"""The merge stage: adapters and Fisher files in, merged PEFT adapters or models out.

θ0 + ΔW_u + α · patch,   ΔW_u = combine(experts),   patch = method(ΔW_u, ΔW_s)

Low-rank results are written as the exact concatenation of factors (rank r_u + rank of the patch). Where the method
solved a pencil, ``pencil.png`` shows it: one beside the merged adapter, or, as strength changes nothing in it, one
beside the directories of a list of strengths.
"""

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path
from typing import Any

from src.adapters.base_weights import BESIDE, BaseWeights, open_base, weight_files
from src.adapters.checks import base_revision, check_weights, revision_for
from src.adapters.deltas import Delta, Deltas, combined, is_lowrank
from src.adapters.peft_files import CARD, SEEN
from src.errors import InputError
from src.files import check_apart, check_output, new_directory
from src.merge.base import MergeMethod, Patch, check_patch
from src.merge.card import check_licence
from src.merge.combination import Combination, Combined, KeyedDeltas
from src.merge.combinations.linear import Linear
from src.merge.combinations.task_arithmetic import TaskArithmetic
from src.merge.dry_run import describe, outline
from src.merge.evaluation import Evaluation
from src.merge.forms import Form
from src.merge.inputs import Calibrated, Inputs, read_inputs
from src.merge.parallel import one_thread_each
from src.merge.pencil_plot import PLOT, plot_pencil
from src.merge.record import manifest
from src.merge.sweep import Variant, point_name, strengths, variants
from src.merge.write import Target, write
from src.models.base import weights_folder
from src.own_files import check_own

log = logging.getLogger(__name__)

OWN = ("*.safetensors", PLOT, CARD, SEEN, "merges.txt", "vocab.txt", *(set(BESIDE) - {"*.txt", "*.py"}))
"""Files that a merge writes: what else lies in an output is nothing to be replaced."""


def merge(
    *,
    utility: list[str] | str,
    output: str,
    combine: Combination | None = None,
    method: MergeMethod | None = None,
    safety: str | None = None,
    alpha: list[float] | float = 1.0,
    utility_weights: list[float] | None = None,
    fisher: list[str] | str | None = None,
    fisher_weights: list[float] | None = None,
    rank: int | None = None,
    energy: float | None = None,
    full_model: bool = False,
    base: str | None = None,
    aliases: list[str] | None = None,
    shard_size: float = 5.0,
    warn_below: float = 0.95,
    sweep: dict[str, list[float]] | None = None,
    name: str | None = None,
    license: str | None = None,
    evaluation: str | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
) -> None:
    """Combine utility adapters, merge a safety adapter into them, and write the result.

    Args:
        utility: Utility adapter, or a list of them (directories or hub ids).
        output: Directory to write; with several strengths, or swept options, a sub-directory for each (``alpha-0.5``,
            ``t-5``).
        combine: How the utility adapters become one update, such as ``Ties`` or ``TsvM``; unset adds them
            (``TaskArithmetic``).
        method: How the patch is derived from the safety adapter, such as ``TaskArithmetic`` or ``Sst``; a combination
            such as ``Ties`` merges the safety adapter as one more expert. Unset writes the combined utility adapters.
        safety: Safety adapter (directory or hub id); some methods need none.
        alpha: Strength of the patch, at least 0; a list writes one merged adapter per strength. 0 gives the utility
            adapter alone.
        utility_weights: Weight of each utility adapter; unset means 1 for each.
        fisher: Directory with ``safety.safetensors`` and ``utility.safetensors`` (and ``benign.safetensors`` for
            re-learned coefficients), as written by the fisher command. Several in one set of coordinates: F_u is the
            mean over all, F_s is that of the first. A combination that needs Fisher files takes one directory per
            utility adapter.
        fisher_weights: Weight of each directory in F_u; unset means 1 for each.
        rank: Largest rank of the written adapter, per module; unset writes factors as they are, exactly.
        energy: Share of each module's squared norm that the written adapter keeps, above 0 to 1, in place of ``rank``.
        full_model: Write whole weights, base and update, instead of an adapter.
        base: Directory or hub id with the base model's safetensors files, or a GGUF file, for ``full_model`` and
            ``Led`` (unset means the base that the adapters name) and to convert DoRA and fully trained modules. A hub
            repository that the adapters name is read at their ``revision`` of it.
        aliases: Names that all mean the adapters' base, where their ``adapter_config.json`` call it differently
            (``base_model_name_or_path``).
        shard_size: Largest file of a full model, in GB (10⁹ bytes).
        warn_below: Kept energy, 0 to 1, under which ``rank`` warns; ``energy`` warns of less than it asks for.
        sweep: Option to list of values: one merged adapter for each; ``combine.NAME`` for the combination's options.
        name: What results are listed under, such as ``SST in two steps``; unset is the method's own name.
        license: The result's licence as the hub names it, such as ``apache-2.0``, for the model card.
        evaluation: ``metrics.json`` of an evaluation of these very adapters, merged before: a table of it goes into
            the model card.
        dry_run: Print shapes, ranks, memory and sizes; write nothing.
        overwrite: Replace an output that exists.
    """
    flags = {key: value for key, value in locals().items() if key not in ("combine", "method")}
    form = Form(rank, energy, full_model, warn_below)
    if not 0 < shard_size < float("inf"):
        raise InputError(f"shard_size is {shard_size}; expected a finite number of GB above 0")
    values, combination = strengths(alpha), combine or TaskArithmetic()
    points = variants(method, combination, sweep)
    _check_stages(method, safety, alpha)
    if safety is not None and method is not None and not method.needs_safety:
        log.warning("%s with these options reads no safety adapter: --safety is not used", type(method).__name__)
        safety = None
    check_output(Path(output), overwrite=overwrite)
    check_own(Path(output), OWN)
    check_apart(Path(output), _paths(utility, safety, fisher, base, evaluation, *vars(method or combination).values()))
    check_licence(license)
    if name is not None and not name.strip():
        raise InputError("name is empty; expected a name for the results")
    _warn_of_unused_fishers(_listed(fisher), fisher_weights, method, combination)
    _warn_of_unread_options(points)
    measured = None if evaluation is None else Evaluation.read(Path(evaluation), form)
    calibrated = Calibrated(_listed(fisher), fisher_weights, method, combination)
    with ExitStack() as stack:
        weights = None
        if base is not None:
            named = _paths(utility, safety)
            weights = stack.enter_context(open_base(weights_folder(base), revision_for(base, named)))
        inputs = read_inputs(_listed(utility), utility_weights, safety, calibrated, weights, aliases or ())
        check_apart(Path(output), [adapter.base for adapter in inputs.adapters])
        count, place = len(points) * len(values), base or inputs.experts[0].base
        revision = base_revision(inputs.adapters, place)
        if weights is None and full_model:
            weights = stack.enter_context(open_base(weights_folder(place), revision))
        extra: dict[str, Any] = {"flags": flags, "license": license}
        if weights is not None:
            fingerprint = check_weights(inputs.adapters, weights, place, aliases or ())
            at = {} if revision is None else {"revision": revision}
            extra["base_weights"] = {"path": place, "fingerprint": fingerprint} | at
        workers = stack.enter_context(one_thread_each())
        whole = weights if full_model else None
        if dry_run:
            sys.stdout.write(_description(points, inputs, form, values, whole, workers) + "\n")
            return
        several, largest = isinstance(alpha, list), int(shard_size * 1e9)
        target = Target(form, whole, largest, workers, several, extra, measured, name)
        folder = stack.enter_context(new_directory(Path(output)))
        for point, total, patch in derived(points, inputs):
            _write_point(folder / point.folder, point, inputs, (total, patch), values if method else [None], target)
    what = name or _title(points[0])
    log.info("%s: %d merged %s(s) in %s", what, count, "model" if full_model else "adapter", output)


def _paths(*given: Any) -> list[str]:
    """Whatever of these may name something that is read."""
    found = [name for each in given for name in (each if isinstance(each, list) else [each])]
    return [name for name in found if isinstance(name, str)]


def _listed(given: list[str] | str | None) -> list[str]:
    return [given] if isinstance(given, str) else given or []


def _description(
    points: Sequence[Variant], inputs: Inputs, form: Form, values: list[Any], base: BaseWeights | None, workers: int
) -> str:
    """What a dry run says, after the checks of a real one, of every point.

    What costs much, such as a pencil, is not solved: its patch is known by shapes and ranks (``MergeMethod.outline``).
    """
    size = 0 if base is None else sum(path.stat().st_size for path in weight_files(base.folder))
    # Element-wise combinations keep the adapters' number format; others may work in float64.
    stages = points[0].combine, points[0].method
    plain = all(isinstance(one, Combination | None) and not (one and one.needs_fisher) for one in stages)
    planned = _planned(points, inputs, form, values)
    outlines = [outline(merged, form, base, size, itemsize=4 if plain else 8) for merged in planned]
    return describe(inputs, outlines, form, workers)


def _planned(points: Sequence[Variant], inputs: Inputs, form: Form, values: list[Any]) -> Iterator[Deltas]:
    """An update of the shapes and ranks of each output."""
    for same, total in _groups(points, inputs):
        for point in same:
            patch = dict[str, Delta]()
            if point.method is not None:
                patch |= point.method.outline(*_both(point.combine, total, inputs), inputs.calibration.pair)
            for alpha in values:
                merged = combined([total.deltas, patch], [1.0, alpha])
                form.check(merged, _title(point))
                yield merged


def _check_stages(method: MergeMethod | None, safety: str | None, alpha: list[float] | float) -> None:
    if method is None and (safety is not None or alpha != 1.0):
        raise InputError("safety and alpha need a method, such as --method TaskArithmetic; combine alone takes neither")
    if method is not None and method.needs_safety and safety is None:
        raise InputError(f"method {type(method).__name__} needs the safety adapter: pass --safety")


def _warn_of_unused_fishers(
    fisher: Sequence[str], weights: list[float] | None, method: MergeMethod | None, combination: Combination
) -> None:
    """Say that Fisher files are given and not read; what is given must exist all the same."""
    if weights and method is not None and method.needs_fisher and not method.reads_utility_fisher:
        log.warning("%s reads no F_u: --fisher_weights are not used", type(method).__name__)
    if combination.needs_fisher or (method is not None and method.needs_fisher) or not (fisher or weights):
        return
    for folder in fisher:
        if not Path(folder).exists():
            raise InputError(f"fisher {folder}: no such directory")
    names = " and ".join(dict.fromkeys(type(one).__name__ for one in (combination, method) if one is not None))
    log.warning("%s needs no Fisher files: --fisher and --fisher_weights are not used", names)


def _warn_of_unread_options(points: Sequence[Variant]) -> None:
    """Say which options of the method and of the combination are given and not read."""
    unread: dict[str, str] = {}
    for point in points:
        methods = [] if point.method is None else [("method", point.method.unread)]
        for stage, found in [*methods, ("combine", point.combine.unread_by_combine)]:
            unread |= {f"{stage}.{option}": where for option, where in found.items()}
    for option, where in unread.items():
        log.warning("%s has no effect here: it is read with %s", option, where)


def _title(point: Variant) -> str:
    return point.method.name if point.method else point.combine.name


def _write_point(
    folder: Path, point: Variant, inputs: Inputs, made: tuple[Combined, Patch], values: list[Any], target: Target
) -> None:
    total, patch = made
    for alpha in values:
        merged: Deltas = total.deltas if alpha is None else combined([total.deltas, patch.pairs], [1.0, alpha])
        target.form.check(merged, _title(point))
        record = manifest(point, inputs, total, patch, alpha, target.name)
        write(folder / point_name("alpha", alpha) if target.by_alpha else folder, merged, inputs, record, target)
    if "kept_by_module" in patch.findings:
        plot_pencil(patch.findings, folder / PLOT)


def derived(points: Sequence[Variant], inputs: Inputs) -> Iterator[tuple[Variant, Combined, Patch]]:
    """The combination and the patch of each choice of options; what choices share is computed once.

    Raises:
        InputError: a method cannot work on a full-rank combination.
    """
    for same, total in _groups(points, inputs):
        method = same[0].method
        if method is None:
            yield from ((point, total, Patch({})) for point in same)
            continue
        methods = [point.method for point in same if point.method is not None]
        patches = method.patches(methods, *_both(same[0].combine, total, inputs), inputs.calibration.pair)
        for point, patch in zip(same, patches, strict=True):
            check_patch(method, patch, [total.deltas, inputs.safety.updates if inputs.safety else {}])
            yield point, total, patch


def _groups(points: Sequence[Variant], inputs: Inputs) -> Iterator[tuple[list[Variant], Combined]]:
    """The choices of options that share a combination, and what it gives, checked to be what their method takes."""
    for _, group in groupby(points, key=lambda point: id(point.combine)):
        same = list(group)
        total = same[0].combine.combine(inputs.as_experts())
        _check_stages_fit(same[0], total, inputs)
        yield same, total


def _both(combine: Combination, total: Combined, inputs: Inputs) -> tuple[KeyedDeltas, KeyedDeltas]:
    """ΔW_u and ΔW_s as a method takes them."""
    own = inputs.safety
    safety = KeyedDeltas(own.updates, own.identity, own.name) if own else KeyedDeltas({}, "")
    # What has been thinned by an expert's key is drawn by another one: the same draws would drop nothing more of it.
    key = inputs.combined_key
    if not isinstance(combine, TaskArithmetic | Linear):
        key = f"{combine.name}({key})"
    return KeyedDeltas(total.deltas, key, " + ".join(expert.name for expert in inputs.experts)), safety


def _check_stages_fit(point: Variant, total: Combined, inputs: Inputs) -> None:
    method = point.method
    if method is None:
        return
    if not method.takes_full_rank:
        found = {point.combine.name: total.deltas, "the safety adapter": inputs.safety.updates if inputs.safety else {}}
        for what, deltas in found.items():
            if not is_lowrank(deltas):
                raise InputError(
                    f"method {type(method).__name__} needs low-rank updates and those of {what} are full-rank; write "
                    "them with --rank first and merge that"
                )
