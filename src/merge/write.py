"""One merged adapter or model, with its manifest and card."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.adapters.base_weights import BaseWeights
from src.adapters.checks import base_revision
from src.adapters.constant_input import lora_rank
from src.adapters.deltas import Delta
from src.adapters.full_model import write_model
from src.adapters.peft_files import CARD, WEIGHTS, write_adapter, write_provenance
from src.files import sha256_file, write_text
from src.merge.card import merge_card, stated_licence
from src.merge.evaluation import Evaluation
from src.merge.forms import Form
from src.merge.inputs import Inputs
from src.own_classes import check_json


@dataclass(frozen=True)
class Target:
    """What to write.

    Attributes:
        form: The form.
        base: The base's weights, for a full model; else none.
        shard_bytes: Largest file of a full model.
        workers: Threads to use.
        by_alpha: Whether each strength has a directory of its own.
        record: What the manifest holds beside what made the update: the flags and the licence.
        evaluation: Measurements for the card.
        name: What results are listed under, or none.
    """

    form: Form
    base: BaseWeights | None
    shard_bytes: int
    workers: int
    by_alpha: bool
    record: dict[str, Any]
    evaluation: Evaluation | None
    name: str | None


def write(folder: Path, deltas: Mapping[str, Delta], inputs: Inputs, record: dict[str, Any], target: Target) -> None:
    """Write updates in the form asked for.

    Args:
        folder: Directory to fill.
        deltas: The merged update per module.
        inputs: The adapters that it was made from.
        record: Manifest, to which the form is added.
        target: The form.

    Raises:
        InputError: a finding of the method or the combination has no form in JSON.
    """
    for made in (record, record["combine"]):
        check_json(made["findings"], f"method {made['method']}: its finding")
    if target.base is not None:
        write_model(
            folder,
            target.base,
            deltas,
            transposed=inputs.layout.transposed,
            shard_bytes=target.shard_bytes,
            constant=inputs.layout.constant,
        )
        made = record | {"output": {"form": target.form.label}} | target.record
        write_provenance(folder, manifest=made, seen=inputs.seen, card=merge_card(made, licences=_licences(inputs)))
        return
    pairs, report = target.form.adapter(deltas, target.workers)
    constant = inputs.layout.constant
    report["ranks"] = {name: lora_rank(pair, constant=name in constant) for name, pair in pairs.items()}
    made, name = record | {"output": report} | target.record, inputs.experts[0].base
    write_adapter(
        folder,
        pairs,
        base=name,
        revision=base_revision(inputs.adapters, name),
        manifest=made,
        seen=inputs.seen,
        card=merge_card(made, licences=_licences(inputs)),
        layout=inputs.layout,
    )
    if target.evaluation is not None:
        table = target.evaluation.table(sha256_file(folder / WEIGHTS))
        write_text(folder / CARD, merge_card(made, table, _licences(inputs)) + "\n")


def _licences(inputs: Inputs) -> dict[str, str | None]:
    """What the adapters' own cards name as their licences."""
    return {adapter.name: stated_licence(adapter.name) for adapter in inputs.adapters}
