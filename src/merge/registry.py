"""Every method, imported: ``--method`` and ``--combine`` choose from the subclasses of ``MergeMethod``."""

from src.merge import sst
from src.merge.combinations import (
    breadcrumbs,
    concatenate,
    dare,
    della,
    linear,
    magnitude_prune,
    task_arithmetic,
    ties,
)

__all__ = [
    "breadcrumbs",
    "concatenate",
    "dare",
    "della",
    "linear",
    "magnitude_prune",
    "sst",
    "task_arithmetic",
    "ties",
]
