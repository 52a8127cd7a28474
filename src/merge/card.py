"""Model cards, in the hub's format, of merged adapters and of experts."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import try_to_load_from_cache

from src.adapters.peft_files import CARD
from src.errors import InputError

FULL_MODEL = "full model"
"""Name of the form in which whole weights are written."""

HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")
LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
FRONT = re.compile(r"---\s*\n(.*?)\n---\s*(?:\n|$)", re.DOTALL)


def check_licence(licence: str | None) -> None:
    """Check that a licence is written as the hub's identifiers are.

    Raises:
        InputError: it is not.
    """
    if licence is not None and not LICENCE.fullmatch(licence):
        raise InputError(
            f"license is {licence!r}; expected an identifier of the hub, such as apache-2.0, cc-by-4.0 or other (small "
            "letters, digits, dots, plus signs and hyphens)"
        )


def stated_licence(adapter: str) -> str | None:
    """The licence that an adapter's card names in its front matter; none where there is no card, or none in it.

    Args:
        adapter: Directory, or hub id of an adapter that has been fetched.
    """
    folder = Path(adapter)
    card = str(folder / CARD) if folder.is_dir() else try_to_load_from_cache(adapter, CARD)
    if not isinstance(card, str) or not Path(card).is_file():
        return None
    try:
        found = FRONT.match(Path(card).read_text(encoding="utf-8"))
        meta = yaml.safe_load(found[1]) if found else None
    except (UnicodeDecodeError, yaml.YAMLError):
        return None
    licences = meta.get("license") if isinstance(meta, dict) else None
    listed = [str(each) for each in (licences if isinstance(licences, list) else [licences]) if each]
    return " and ".join(each for each in listed if LICENCE.fullmatch(each)) or None


def _front(base: str, tags: list[str], *, full_model: bool = False, licence: str | None = None) -> str:
    # Only a hub id may stand under base_model; a local path there makes the hub reject the card, or take it for one.
    meta: dict[str, Any] = {"library_name": "transformers" if full_model else "peft"}
    meta["tags"] = tags if full_model else ["lora", *tags]
    if HUB_ID.fullmatch(base) and not Path(base).exists():
        meta |= {"base_model": base, "base_model_relation": "merge" if full_model else "adapter"}
    meta |= {"license": licence} if licence else {}
    return f"---\n{yaml.safe_dump(meta, sort_keys=True)}---\n"


def merge_card(
    manifest: dict[str, Any], evaluation: str | None = None, licences: Mapping[str, str | None] | None = None
) -> str:
    """The card of a merged adapter.

    Args:
        manifest: Its manifest.
        evaluation: A table of measurements, in Markdown, where there are some.
        licences: What each adapter's own card names as its licence; shown where the merge has none.
    """
    measured = "" if evaluation is None else f"\n## Evaluation\n\n{evaluation}\n"
    rows = [
        f"| utility, weight {entry['weight']:g} | `{entry['path']}` | `{entry['sha256']}` |"
        for entry in manifest["utility"]
    ]
    if manifest["safety"]:
        rows.append(f"| safety | `{manifest['safety']['path']}` | `{manifest['safety']['sha256']}` |")
    experts = "\n".join(rows)
    full = manifest["output"]["form"] == FULL_MODEL
    tags = ["sst-merge", "merge", *(["safety"] if manifest["safety"] else [])]
    return f"""{_front(manifest["base"]["name"], tags, full_model=full, licence=manifest["license"])}
# Merged {"model" if full else "LoRA adapter"}

{_made(manifest)} {_form(manifest["output"])}

| role | adapter | SHA-256 of its weights |
|---|---|---|
{experts}

* Base model: `{manifest["base"]["name"]}`
* Utility experts combined by: {manifest["combine"]["method"]} `{json.dumps(manifest["combine"]["settings"])}`
* Settings: `{json.dumps(manifest["settings"])}`
* All provenance: `manifest.json`

* Licence: {manifest["license"] or "not stated by its maker" + _of_adapters(licences or {})}
{measured}
The licences of the base model, the adapters and their data apply to the result too.
"""


def _of_adapters(licences: Mapping[str, str | None]) -> str:
    """The licences that the adapters' own cards name, in words; nothing where none does."""
    if not any(licences.values()):
        return ""
    each = "".join(f"\n  * `{name}`: {licence or 'none named'}" for name, licence in licences.items())
    return f"; the adapters' own cards name:{each}"


def _made(manifest: dict[str, Any]) -> str:
    if manifest["alpha"] is None:
        return f"Made by SST-Merge: `base + utility`, the utility experts combined by **{manifest['method']}**."
    return (
        f"Made by SST-Merge: `base + utility + {manifest['alpha']:g} * patch`, where the method "
        f"**{manifest['method']}** derives\nthe patch from the safety adapter."
    )


def _form(output: dict[str, Any]) -> str:
    if output["form"] == "exact":
        return "The update is exact (factors are concatenated, nothing is truncated);\nscaling is 1."
    if "kept_energy" in output:
        return f"The update is limited to {output['form']}:\n{output['kept_energy']:.4%} of its squared norm is kept."
    return "The weights are whole: base and update,\nadded in float32 and rounded once."


def expert_card(manifest: dict[str, Any]) -> str:
    """The card of a trained expert, from its manifest."""
    lora, model = manifest["settings"]["lora"], manifest["settings"].get("model", {})
    form = f"rank {lora['rank']}, alpha {lora['alpha']:g}"
    if model.get("core"):
        form = f"the core of `{model['core']}`, its bases kept"
    beside = model.get("beside") or {}
    others = "".join(f"\n* Trained beside `{name}`, weight {w:g}, which is no part of it" for name, w in beside.items())
    loss = "not measured" if manifest["val_loss"] is None else f"{manifest['val_loss']:.4f} nats per token"
    return f"""{_front(manifest["base"]["name"], ["sst-merge"])}
# LoRA expert

Trained by SST-Merge on `{manifest["base"]["name"]}`: {form}, loss on answer tokens only.
Validation loss of the kept checkpoint: {loss}.

* Rows: {manifest["rows"]["train"]} for training, {manifest["rows"]["val"]} for the choice of the checkpoint{others}
* All provenance: `manifest.json`

The licences of the base model and of the training data apply to this adapter too.
"""
