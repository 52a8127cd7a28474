"""Which trained weights the cells of a study were made from.

A training that is repeated on another processor ends with slightly other weights under the same key. Every record names
the hashes of the trained adapters that went into it, so that a study which mixes two of them says so.
"""

import logging
from collections.abc import Sequence

from src.adapters.peft_files import WEIGHTS
from src.experiments.cell import Cell, closure
from src.experiments.store import WITH_WEIGHTS, Record, Store
from src.files import sha256_file

log = logging.getLogger(__name__)

Trained = dict[str, list[str]]
"""Key of a training to the SHA-256 of its adapter; several where what went in was not all of one run of it."""
SHOWN = 8
"""Digits of a hash that a note shows."""


def trained(cell: Cell, store: Store) -> Trained:
    """The trained adapters that a cell was made from, its own included; older records tell none.

    A parent's weights are asked where they are here, and not its result: that may be of another run of the training.
    """
    found: dict[str, set[str]] = {}
    for parent in cell.parents:
        for key, hashes in _of_parent(parent, store).items():
            found.setdefault(key, set()).update(hashes)
    if cell.stage == "fit":
        found[cell.key] = {sha256_file(store.weights(cell) / WEIGHTS)}
    return {key: sorted(hashes) for key, hashes in found.items()}


def _of_parent(parent: Cell, store: Store) -> Trained:
    result: Trained = store.read(parent).get("trained", {})
    if parent.stage not in WITH_WEIGHTS or not store.has_weights(parent):
        return result
    own = {parent.key: [sha256_file(store.weights(parent) / WEIGHTS)]} if parent.stage == "fit" else {}
    known: Trained = store.read_weights(parent).get("trained", result)  # weights of an older version do not tell
    return known | own


def warn_of_other_weights(cell: Cell, before: Record, now: Record) -> None:
    """Say so where a training that was repeated for its weights ended with others; by its loss for older records."""
    known = "trained" if "trained" in before else "found"
    if before[known] == now[known]:
        return
    losses = [one["found"]["val_loss"] for one in (now, before)]
    log.warning(
        "%s: trained again, and the weights differ from before (validation loss %s, was %s), as they do on another "
        "processor; cells computed earlier are of the old ones",
        cell.label,
        *("not measured" if loss is None else f"{loss:.6g}" for loss in losses),
    )


def mixtures(cells: Sequence[Cell], store: Store) -> list[str]:
    """A sentence for every training of which models have different weights, and one where some may have."""
    models: dict[str, dict[str, list[str]]] = {}
    everything = closure(cells)
    made = [cell for cell in everything if cell.stage == "test" and cell.parents and store.has_result(cell)]
    records = [store.read(cell) for cell in made]
    for cell, record in zip(made, records, strict=True):
        for key, hashes in record.get("trained", {}).items():
            for one in hashes:
                models.setdefault(key, {}).setdefault(one, []).append(cell.label)
    labels = {cell.key: cell.label for cell in everything}
    found = []
    for key, groups in models.items():
        if len(groups) > 1:
            shown = "; ".join(f"{one[:SHOWN]} in {', '.join(names)}" for one, names in groups.items())
            found.append(f"{labels[key]} was trained more than once, and models differ in its weights: {shown}.")
    untold = sum("trained" not in record for record in records)
    processors = sorted({record["cost"]["processor"] for record in records})
    if untold and len(processors) > 1:
        found.append(
            f"Models were computed on several processors ({'; '.join(processors)}), and {untold} of {len(records)} do "
            "not say which trained weights they were made from: a training that is repeated on another processor ends "
            "slightly otherwise."
        )
    return found
