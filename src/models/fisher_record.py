"""What a Fisher pass records about itself, and the key by which its unfinished parts are known."""

import hashlib
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.adapters.peft_files import Adapter
from src.data.rows import rows_sha256
from src.fisher.accumulate import MeanScores
from src.fisher.base import Fisher
from src.fisher.files import FisherFile
from src.models.fisher_weights import pass_weights
from src.models.reference import named_adapters
from src.provenance import code_hash, versions

if TYPE_CHECKING:
    from src.models.fisher import FisherModule

log = logging.getLogger(__name__)

CODE = (
    "fisher/*.py",
    "models/fisher*.py",
    "models/kept_buffers.py",
    "models/logits.py",
    "models/packing.py",
    "models/patch_at.py",
    "models/reference.py",
    "models/speed.py",
    "adapters/attach.py",
    "adapters/basis.py",
    "adapters/constant_input.py",
    "adapters/pairs.py",
    "adapters/read_together.py",
    "data/batches.py",
)
"""What computes Fisher matrices and mean scores."""


def pass_record(module: "FisherModule", name: str) -> dict[str, Any]:
    """Provenance of one pass."""

    def entry(adapter: Adapter, weight: float) -> dict[str, Any]:
        return {"path": adapter.name, "sha256": adapter.sha256, "identity": adapter.identity, "weight": weight}

    rows, named = module.data.rows[name], named_adapters(module.references[name])
    hashes = {row.prompt_hash for row in rows}
    at_point: set[str] = set().union(*(adapter.seen for adapter in named.values()))
    # A merge may be fitted to rows that its experts were trained on as well: what it has seen is not held out from it.
    merged = any(a.manifest.get("kind") == "merge" and not hashes.isdisjoint(a.seen) for a in named.values())
    of_experts = module.safety.seen.union(*(adapter.seen for adapter in module.utility))
    return {
        "pass": name,
        "labels": module.labels[name],
        "draws": module.draws if module.labels[name] == "model" else 1,
        "granularity": module.granularity,
        "seed": module.seed,
        "reference": module.references[name],
        "utility": [entry(a, w) for a, w in zip(module.utility, module.weights, strict=True)],
        "safety": entry(module.safety, 1.0),
        "base": {"name": module.base.name, "fingerprint": module.base_fingerprint},
        "basis_sha256": module.core.digest(),
        "reference_identity": {name: adapter.identity for name, adapter in named.items()},
        "rows": [row.id for row in rows],
        "rows_sha256": rows_sha256(rows),
        # Rows and template alone do not say it: a length cuts answers, and sources have weights.
        "measured_sha256": _measured_sha256(module, name),
        "seen": sorted(hashes | at_point),
        # Whether the point was made with rows of this pass, which then hold nothing out from it.
        "fitted_before": merged or not hashes.isdisjoint(at_point - of_experts),
        "versions": versions(),
    }


def _measured_sha256(module: "FisherModule", name: str) -> str:
    """SHA-256 of the tokens of a pass, where its answers begin, and what each row weighs."""
    tokens = [(encoded.ids, encoded.answer_start) for encoded in module.data.encoded[name]]
    weights = {unit: each.tolist() for unit, each in pass_weights(module, name).items()}
    return hashlib.sha256(json.dumps([tokens, weights]).encode()).hexdigest()


def write_pass(module: "FisherModule", name: str, fisher: Fisher, means: MeanScores | None, path: Path) -> None:
    """Write the file of one pass, with its record.

    Args:
        module: What measured.
        name: The pass.
        fisher: Its Fisher matrix.
        means: Mean scores, where they were measured.
        path: The file.
    """
    record = pass_record(module, name) | {"trace": fisher.trace(), "settings": module.settings}
    u, v = (module.core.u, module.core.v) if module.coordinates == "core" else ({}, {})
    mean, halves = (None, None) if means is None else (means.mean, means.halves)
    FisherFile(fisher, u, v, record, mean, halves, None if means is None else module.start).save(path)
    log.info("F_%s: n = %d, D = %d, trace %.4g", name, fisher.count, fisher.dim, record["trace"])


def pass_key(module: "FisherModule", name: str) -> str:
    """SHA-256 of everything that the numbers of a pass, and the cut of its parts, depend on."""
    rows = [(encoded.row.id, encoded.ids, encoded.answer_start) for encoded in module.data.encoded[name]]
    settings = {
        "batch_size": module.data.batch_size,
        "world_size": module.trainer.world_size,
        "shard_rows": module.shard_rows,
        "representation": module.representation,
        "coordinates": module.coordinates,
        "relearn": module.relearn,
        "halves": module.halves,
        "code": code_hash(CODE),
        "base": module.base_digest,
        "dtype": module.base.dtype,
        "quantization": module.base.quantization,
        "precision": str(module.trainer.precision),
        "matmul": [module.matmul, module.max_matmul_error, module.matmul_chosen],
        "weights": [weights.tolist() for weights in pass_weights(module, name).values()],
    }
    whole = json.dumps([pass_record(module, name), rows, settings])
    return hashlib.sha256(whole.encode()).hexdigest()
