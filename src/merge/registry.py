"""Every method, imported: ``--method`` and ``--combine`` choose from the subclasses of ``MergeMethod``."""

from src.merge import align_guard, closest_safe_update, resta, safe_lora, safe_merge, sst, sst_m, sst_v
from src.merge.combinations import (
    breadcrumbs,
    concatenate,
    core_space,
    dare,
    della,
    iso_c,
    knots,
    linear,
    magnitude_prune,
    task_arithmetic,
    ties,
    tsv_m,
)

__all__ = [
    "align_guard",
    "breadcrumbs",
    "closest_safe_update",
    "concatenate",
    "core_space",
    "dare",
    "della",
    "iso_c",
    "knots",
    "linear",
    "magnitude_prune",
    "resta",
    "safe_lora",
    "safe_merge",
    "sst",
    "sst_m",
    "sst_v",
    "task_arithmetic",
    "ties",
    "tsv_m",
]
