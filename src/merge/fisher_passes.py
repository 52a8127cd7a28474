"""One Fisher file of a merge, read and checked: its pass, its form, its adapters, its coordinates."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from src.adapters.checks import check_base
from src.adapters.peft_files import Adapter
from src.errors import InputError
from src.files import sha256_file
from src.fisher.files import FisherFile, load_fisher
from src.merge.base import MergeMethod
from src.models.patch_at import is_patched, reference_point

NEEDED = ("pass", "base", "basis_sha256", "safety", "seen", "utility")
"""Keys of a record that every merge reads."""
NEEDED_OF = {"base": ("name", "fingerprint"), "safety": ("path", "sha256"), "utility": ("path", "sha256", "weight")}
"""Keys of what lies under some of them: a mapping, or a list of mappings."""
RELEARN = "re-learned coefficients need a run with `--model.relearn true`"


@dataclass(frozen=True)
class Pass:
    """One Fisher file.

    Attributes:
        path: Where it lies.
        file: What it holds.
        weight: Its weight in a mean.
    """

    path: Path
    file: FisherFile
    weight: float = 1.0

    @property
    def entry(self) -> dict[str, Any]:
        """What the manifest says of it."""
        record = self.file.record
        kept = {key: record.get(key) for key in ("pass", "representation", "coordinates", "labels", "reference")}
        at = [entry["weight"] for entry in record["utility"]]
        found = {"path": str(self.path), "sha256": sha256_file(self.path), "weight": self.weight, "utility_weights": at}
        return found | kept | {"examples": self.file.fisher.count}

    def mean_scores(self) -> torch.Tensor:
        """(D,) mean scores.

        Raises:
            InputError: the file holds none.
        """
        if self.file.mean is None:
            raise InputError(f"{self.path}: holds no mean scores; {RELEARN}")
        return self.file.mean

    def start(self) -> torch.Tensor | None:
        """(D,) coefficients at the point where mean scores were taken; nothing where they are the whole patch's.

        Raises:
            InputError: that point is no patch of the utility adapters in the core space.
        """
        check_keys(self, ("reference",))
        at = self.file.record["reference"]
        if self.file.start is None and not is_patched(at):
            raise InputError(
                f"{self.path}: mean scores of the point {at}, which is no patch in the safety adapter's core space; "
                "expected --model.reference_safety patched, or a merged adapter of these very adapters by Sst"
            )
        return self.file.start

    def check_by_row(self) -> None:
        """Check that its scores are of rows, as mean scores are: a step weighs one against the other.

        Raises:
            InputError: they are of tokens.
        """
        unit = self.file.record["granularity"]
        if unit != "sequence":
            raise InputError(
                f"{self.path}: granularity is {unit}, and mean scores are of rows; re-learned coefficients need a run "
                "with --model.granularity sequence"
            )

    @property
    def fitted_before(self) -> bool:
        """Whether the point that it was measured at was made with its rows; so, too, where the file does not say."""
        record = self.file.record
        at = record["reference"]
        named = not isinstance(at, str) and not set(at) <= {"utility", "safety"}
        return bool(record.get("fitted_before", named))

    def check_base(self, adapter: Adapter) -> None:
        """Check that it was measured on the adapter's base."""
        base = self.file.record["base"]
        check_base(adapter, base["name"], base["fingerprint"], what=f"the base of {self.path}")

    def check_base_of(self, first: "Pass") -> None:
        """Check that it was measured on the base of another one.

        Raises:
            InputError: their fingerprints differ.
        """
        one, two = (each.file.record["base"] for each in (self, first))
        if one["fingerprint"] and two["fingerprint"] and one["fingerprint"] != two["fingerprint"]:
            raise InputError(
                f"{self.path}: measured on the base {one['name']!r}, {first.path} on {two['name']!r} with other "
                "weights; measure both on one base, in one number format"
            )

    def check_adapters(self, experts: Sequence[Adapter], safety: Adapter) -> None:
        """Check that it was measured for these adapters.

        Raises:
            InputError: it was not.
        """
        record = self.file.record
        # Of the very adapter that was measured, the name of its base says no more.
        if not _same(record["safety"], safety):
            self.check_base(safety)
            raise InputError(
                f"{self.path}: measured for the safety adapter {record['safety']['path']}, not {safety.name}"
            )
        measured = record["utility"]
        if len(measured) != len(experts) or not all(map(_same, measured, experts)):
            names = ", ".join(entry["path"] for entry in record["utility"])
            # What says the same in another order has weights in another order, too.
            turned = len(measured) == len(experts) and all(
                any(_same(each, one) for one in experts) for each in measured
            )
            how = "are these in another order" if turned else "have other weights or another scaling"
            raise InputError(f"{self.path}: measured at the utility adapters {names}; those of this merge {how}")

    def check_expert(self, expert: Adapter) -> None:
        """Check that it was measured at one expert alone.

        Raises:
            InputError: it was not, or does not say where.
        """
        check_keys(self, ("reference",))
        record = self.file.record
        measured = record["utility"]
        alone = len(measured) == 1 and _same(measured[0], expert) and measured[0]["weight"] == 1.0
        if not alone or reference_point(record["reference"]) != {"utility": 1.0}:
            self.check_base(expert)
            raise InputError(
                f"{self.path}: not measured at {expert.name} alone; expected a run of `python -m src fisher` with "
                f"--model.utility {expert.name} and --model.reference_utility utility"
            )

    def check_coordinates(self, first: "Pass") -> None:
        """Check that its coordinates are those of another one.

        Raises:
            InputError: they are not.
        """
        records = self.file.record, first.file.record
        # Of weight coordinates the basis is no part: they are the weights.
        weights = all(record["coordinates"] == "weight" for record in records)
        same = weights or records[0]["basis_sha256"] == records[1]["basis_sha256"]
        if not same or self.file.shapes != first.file.shapes:
            raise InputError(
                f"{self.path}: in other coordinates than {first.path}; measure both with the same adapters and the "
                "same --model.basis"
            )


def _same(entry: Mapping[str, Any], adapter: Adapter) -> bool:
    """Whether a record's adapter is this one; records from before ``identity`` was kept tell by the weights alone."""
    return entry["sha256"] == adapter.sha256 and entry.get("identity", adapter.identity) == adapter.identity


def check_keys(one: Pass, keys: Sequence[str]) -> None:
    """Check that a record has some keys.

    Raises:
        InputError: one is missing, or null; the message names file and key.
    """
    record = one.file.record
    missing = [repr(key) for key in keys if record.get(key) is None]
    for key, own in NEEDED_OF.items():
        under = record.get(key, [])
        for each in under if isinstance(under, list) else [under]:
            held = each if isinstance(each, dict) else {}
            missing += [f"{part!r} in {key!r}" for part in own if part not in held]
    if missing:
        raise InputError(
            f"{one.path}: its record has no {missing[0]}; expected a file written by `python -m src fisher`"
        )


def read_pass(folder: str, name: str, method: MergeMethod, weight: float = 1.0) -> Pass:
    """Read one pass of a directory.

    Raises:
        InputError: the file is missing or of another pass, its record lacks a key, or the method cannot work with its
            form.
    """
    path = Path(folder) / f"{name}.safetensors"
    if name == "benign" and not path.is_file():
        raise InputError(f"{path}: no such file; {RELEARN}")
    file = load_fisher(path)
    one = Pass(path, file, weight)
    check_keys(one, NEEDED)
    if file.record["pass"] != name:
        raise InputError(f"{path}: holds the {file.record['pass']} pass; expected the {name} pass")
    coordinates, found = file.record["coordinates"], file.fisher.representation
    if coordinates != method.coordinates or found not in method.representations:
        raise InputError(
            f"{path}: {found} in {coordinates} coordinates; {type(method).__name__} needs "
            f"{' or '.join(method.representations)} in {method.coordinates} coordinates: `python -m src fisher "
            f"--model.coordinates {method.coordinates} --model.representation {method.representations[0]}"
            f"{''.join(f' --model.{key} {value}' for key, value in method.measured.items())}`"
        )
    check_keys(one, tuple(method.measured))
    for key, value in method.measured.items():
        if file.record[key] != value:
            raise InputError(
                f"{path}: measured with {key} {file.record[key]}; {type(method).__name__} needs --model.{key} {value}"
            )
    return one
