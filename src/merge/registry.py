"""Every method, imported: ``--method`` and ``--combine`` choose from the subclasses of ``MergeMethod``."""

from src.merge import (  # noqa: F401 - the subclasses of MergeMethod are the registry
    align_guard,
    closest_safe_update,
    led,
    resta,
    safe_lora,
    safe_merge,
    sst,
    sst_diagonal,
    sst_m,
    sst_v,
)
from src.merge.combinations import (  # noqa: F401
    breadcrumbs,
    compress_then_merge,
    concatenate,
    core_space,
    dare,
    della,
    fisher_average,
    iso_c,
    knots,
    linear,
    magnitude_prune,
    regmean,
    task_arithmetic,
    ties,
    tsv_m,
)
