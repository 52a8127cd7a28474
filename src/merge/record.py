"""The manifest of a merge: everything that it was made from, in JSON."""

from typing import Any

from src.merge.base import Patch
from src.merge.combination import Combined
from src.merge.inputs import Inputs
from src.merge.settings import settings
from src.merge.sweep import Variant
from src.provenance import versions


def manifest(
    point: Variant, inputs: Inputs, total: Combined, patch: Patch, alpha: float | None, name: str | None
) -> dict[str, Any]:
    """Provenance of one merged adapter.

    ``method`` and ``alpha`` are what results are listed under; ``name`` is in place of the method's own.
    """
    method = point.method or point.combine
    listed = name or method.name
    first, safety = inputs.experts[0], inputs.safety
    findings = patch.findings if point.method else total.findings
    return {
        "kind": "merge",
        "method": f"{listed}, {point.label}" if point.label else listed,
        "settings": settings(method),
        "combine": {"method": point.combine.name, "settings": settings(point.combine), "findings": total.findings},
        "utility": [
            {"path": expert.name, "sha256": expert.sha256, "weight": weight}
            for expert, weight in zip(inputs.experts, inputs.weights, strict=True)
        ],
        "safety": {"path": safety.name, "sha256": safety.sha256} if safety else None,
        "fisher": list(inputs.calibration.files),
        "overlap": inputs.calibration.overlap,
        # An adapter of PEFT's knows no fingerprint; what was measured at it does.
        "base": {"name": first.base, "fingerprint": first.fingerprint or inputs.calibration.base_fingerprint},
        "findings": findings,
        "versions": versions(),
        "alpha": alpha,
    }
