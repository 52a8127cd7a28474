"""Fine-tuning of an adapter's core alone: C in U C Vᵀ is trained, its bases U and V stay.

It is the control of re-learned coefficients: the same D numbers, found by gradient descent on the rows instead of from
one Fisher pass (LoRA-XS, 2405.17604, trains the same form from the base's singular vectors).

The adapter becomes PEFT's LoRA with A = Vᵀ frozen and B = U C, so training and writing are those of any expert.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn.utils.parametrize import register_parametrization

from src.adapters.attach import check_fits
from src.adapters.basis import CoreBasis, core_basis
from src.adapters.peft_config import lora_settings
from src.adapters.peft_files import Adapter
from src.adapters.peft_weights import ROOT
from src.errors import InputError

STORED = ".parametrizations.weight.original"
"""Where a state dict keeps C in place of ``.weight``, B."""


class _InBasis(torch.nn.Module):
    """``B = U C`` (O, q) for U (O, p) and C (p, q)."""

    def __init__(self, u: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("u", u, persistent=False)
        self.u: torch.Tensor

    def forward(self, core: torch.Tensor) -> torch.Tensor:
        return self.u @ core

    def right_inverse(self, weight: torch.Tensor) -> torch.Tensor:
        return self.u.T @ weight


class Core:
    """The core of an adapter, to be trained.

    Args:
        adapter: The adapter whose bases are kept; training begins at its own C.

    Raises:
        InputError: it updates embeddings or whole modules, which have no core here, or nothing at all.
    """

    def __init__(self, adapter: Adapter) -> None:
        if adapter.full_rank or adapter.layout.embeddings or adapter.layout.constant:
            raise InputError(f"{adapter.name}: model.core takes an adapter of linear layers only, without LoRA biases")
        self.adapter = adapter
        try:
            self.basis: CoreBasis = core_basis([adapter.pairs])
        except ValueError as error:
            raise InputError(f"{adapter.name}: {error}") from None

    def add_to(self, model: Any) -> Any:
        """The PEFT model of which only the cores are trainable."""
        from peft import get_peft_model

        check_fits(model, self.adapter.pairs, self.adapter.name)
        ranks = {name: q for name, (_, q) in self.basis.shapes.items()}
        found = get_peft_model(model, lora_settings(ranks, self.adapter.layout, task_type="CAUSAL_LM"))
        patch = self.basis.patch(self.basis.coordinates(self.adapter.pairs))
        modules = dict(found.get_base_model().named_modules())
        for name, pair in patch.items():
            a, b = modules[name].lora_A["default"], modules[name].lora_B["default"]
            with torch.no_grad():
                a.weight.copy_(pair.a)
                b.weight.copy_(pair.b)
            a.weight.requires_grad_(False)
            register_parametrization(b, "weight", _InBasis(self.basis.u[name].to(b.weight)))
        return found

    def factors(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A state dict's adapter with B in place of C."""
        found = {}
        for key, value in weights.items():
            if key.endswith(STORED):
                name = key.removeprefix(ROOT).partition(".lora_B.")[0]
                found[key.removesuffix(STORED) + ".weight"] = self.basis.u[name].to(value) @ value
            else:
                found[key] = value
        return found
