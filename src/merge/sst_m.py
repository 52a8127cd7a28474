"""SST by magnitude, the ablation: the safety update against the utility update, without squares or data.

r = |ΔW_s| / (|ΔW_u| + ε)
"""

import torch

from src.merge.masked import RatioMask


class SstM(RatioMask):
    """SST-M, the magnitude ablation: keep the patch where ``|ΔW_s| / (|ΔW_u| + ε)`` is large. No data.

    This project's ablation; no paper. Magnitudes are those of updates: in whole weights the base would make nearly
    every ratio 1. Full rank.
    """

    def parts(
        self, patch: torch.Tensor, safety: torch.Tensor, utility: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``|ΔW_s|`` and ``|ΔW_u|``."""
        return safety.abs(), utility.abs()
