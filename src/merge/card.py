"""Model cards, in the hub's format, of merged adapters and of experts."""

import json
from typing import Any

import yaml


def _front(base: str, tags: list[str]) -> str:
    # Only a hub id may stand under base_model; a local path there makes the hub reject the card.
    meta: dict[str, Any] = {"library_name": "peft", "tags": ["lora", *tags]}
    if "://" not in base and base.count("/") == 1 and not base.startswith((".", "/")):
        meta["base_model"] = base
    return f"---\n{yaml.safe_dump(meta, sort_keys=True)}---\n"


def merge_card(manifest: dict[str, Any]) -> str:
    """The card of a merged adapter, from its manifest."""
    experts = "\n".join(
        f"| utility, weight {entry['weight']:g} | `{entry['path']}` | `{entry['sha256']}` |"
        for entry in manifest["utility"]
    )
    safety = manifest["safety"]
    settings = json.dumps(manifest["settings"])
    return f"""{_front(manifest["base"]["name"], ["sst-merge", "merge", "safety"])}
# Merged LoRA adapter

Made by SST-Merge: `base + utility + {manifest["alpha"]:g} * patch`, where the method **{manifest["method"]}** derives
the patch from the safety adapter. The update is exact (factors are concatenated, nothing is truncated); scaling is 1.

| role | adapter | SHA-256 of its weights |
|---|---|---|
{experts}
| safety | `{safety["path"]}` | `{safety["sha256"]}` |

* Base model: `{manifest["base"]["name"]}`
* Settings: `{settings}`
* All provenance: `manifest.json`

The licences of the base model, the adapters and their data apply to this adapter too.
"""


def expert_card(manifest: dict[str, Any]) -> str:
    """The card of a trained expert, from its manifest."""
    lora = manifest["settings"]["lora"]
    loss = "not measured" if manifest["val_loss"] is None else f"{manifest['val_loss']:.4f} nats per token"
    return f"""{_front(manifest["base"]["name"], ["sst-merge"])}
# LoRA expert

Trained by SST-Merge on `{manifest["base"]["name"]}`: rank {lora["rank"]}, alpha {lora["alpha"]:g}, loss on
answer tokens only. Validation loss of the kept checkpoint: {loss}.

* Rows: {manifest["rows"]["train"]} for training, {manifest["rows"]["val"]} for the choice of the checkpoint
* All provenance: `manifest.json`

The licences of the base model and of the training data apply to this adapter too.
"""
