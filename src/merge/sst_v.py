"""SST without data: the patch against the utility update, element by element.

r = P² / (ΔW_u² + ε)
"""

import torch

from src.merge.masked import RatioMask


class SstV(RatioMask):
    """SST-V: keep the patch where it is large against the utility update, ``r = P² / (ΔW_u² + ε)``. No data.

    The published data-free variant of SST-Merge (no arXiv id), except that each module keeps its own share, and ε only
    keeps the division sound: the published code adds 1e-6 to both squares, and takes the top share over all modules.
    Where ΔW_s is zero, as in modules that only the utility adapter has, r is 0 in either form: ``interpolating`` would
    find r = 1 in all of it, with nothing to tell one weight from another. Full rank.
    """

    def parts(
        self, patch: torch.Tensor, safety: torch.Tensor, utility: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``P²`` and ``ΔW_u²``; nothing where the safety adapter changes nothing."""
        return patch.square() * (safety != 0), utility.square()
