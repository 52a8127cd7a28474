"""Terms that training adds to the loss of an expert, so that fine-tuning leaves safety alone.

AlignGuard (2508.02079), with Δ = s·B·A the update that is being trained, F the safety Fisher matrix and P the projector
on its k leading eigenvectors p_i with eigenvalues λ_i, all in the core space of a safety adapter:

    Δ_A = P Δ,   Δ_T = Δ − Δ_A
    penalty = w_A ‖F^½ Δ_A‖² + w_T ‖Δ_T‖² + w_C Σ_m [ b Σ_ij |Δ_A||Δ_T| + (1 − b) cos²(Δ_A,m, Δ_T,m) ]

‖F^½ Δ_A‖² = Σ λ_i (p_iᵀ c)² for the core coordinates c of Δ. The paper's trust region ‖H^½ Δ_T‖² is taken with H = I.
Its weights of single coordinates in the overlap could not be read and are 1 (a reproduction by others,
``Sirhan1/modelFineTuneRiskAssessment``, has 1 + β σ(|Δ_ij| − τ): for small updates nearly the constant 1 + β/2, which b
and w_C hold as well); default weights are this project's.

Legend of shapes: D core coordinates, K directions, p and q sides of a module's core.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from src.adapters.basis import CoreBasis
from src.errors import InputError
from src.files import sha256_file
from src.fisher.files import load_fisher
from src.fisher.lowrank import LowRankFisher
from src.gevp.leading import leading_directions

TINY = 1e-30


class Regularizer(ABC):
    """A term of the loss that depends on the adapter's weights alone.

    Attributes:
        sources: Files that it was made of, as ``path`` and ``sha256``; known once it is bound.
        seen: Hashes of the prompts that these were measured on.
    """

    sources: tuple[dict[str, str], ...] = ()
    seen: frozenset[str] = frozenset()

    @abstractmethod
    def bind(self, model: Any, fingerprint: str) -> None:
        """Take hold of the adapter's weights, once the PEFT model stands.

        Args:
            model: The PEFT model.
            fingerprint: Of its base.
        """

    @abstractmethod
    def penalty(self) -> torch.Tensor:
        """The term, differentiable by the adapter's weights."""


@dataclass(frozen=True)
class Layer:
    """The factors of one trained update, ``scale · B A``."""

    a: torch.nn.Parameter
    b: torch.nn.Parameter
    scale: float

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B in float32 at least, differentiable by both."""
        dtype = torch.promote_types(self.a.dtype, torch.float32)
        return self.a.to(dtype), self.b.to(dtype)

    def squared_norm(self) -> torch.Tensor:
        """‖Δ‖², without forming it."""
        a, b = self.factors()
        return self.scale**2 * ((b.T @ b) * (a @ a.T)).sum()

    def core(self, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """(p, q) ``Uᵀ Δ V``."""
        a, b = self.factors()
        return self.scale * (u.T @ b) @ (a @ v)


def trained_layers(model: Any) -> dict[str, Layer]:
    """The LoRA layers of a PEFT model (adapter ``default``) by the names of the base model's modules."""
    found = {}
    for name, module in model.get_base_model().named_modules():
        if "default" in getattr(module, "lora_A", {}):
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            found[name] = Layer(a, b, float(module.scaling["default"]))
    return found


class AlignGuard(Regularizer):
    """AlignGuard (2508.02079): keep the update out of the directions that the safety data care about.

    Args:
        fisher: Directory with ``safety.safetensors`` of the representation ``lowrank``, measured on the same base.
        k: Number of leading eigenvectors of F that count as alignment-critical, at least 1.
        align: Weight w_A of ‖F^½ Δ_A‖² (nats² per example), at least 0.
        task: Weight w_T of ‖Δ_T‖², at least 0.
        collision: Weight w_C of the collision of both parts, at least 0; above 0 forms each update as a matrix.
        blend: Share b of the coordinate-wise overlap in the collision, 0 to 1; the rest is the cosine's.
    """

    def __init__(
        self,
        fisher: str,
        k: int = 32,
        align: float = 1.0,
        task: float = 0.0,
        collision: float = 0.0,
        blend: float = 0.5,
    ) -> None:
        for key, value in (("align", align), ("task", task), ("collision", collision)):
            if not 0 <= value < float("inf"):
                raise InputError(f"regularizer.{key} is {value}; expected a number of at least 0")
        if k < 1 or not 0 <= blend <= 1:
            raise InputError(f"regularizer: k {k}, blend {blend}; expected k of at least 1 and blend from 0 to 1")
        self.fisher, self.k, self.align, self.task = fisher, k, align, task
        self.collision, self.blend = collision, blend

    def bind(self, model: Any, fingerprint: str) -> None:
        """Read the Fisher file and find the layers.

        Raises:
            InputError: the file is missing, of another form or base, or shares no module with the adapter.
        """
        # Modules are built on the accelerator and in the Trainer's precision; what is read here is of files.
        with torch.device("cpu"):
            self._read(model, fingerprint)

    def _read(self, model: Any, fingerprint: str) -> None:
        path = Path(self.fisher) / "safety.safetensors"
        file = load_fisher(path)
        if not isinstance(file.fisher, LowRankFisher):
            raise InputError(f"{path}: {file.fisher.representation}; AlignGuard needs `--model.representation lowrank`")
        known = file.record["base"]["fingerprint"]
        if known and fingerprint and known != fingerprint:
            raise InputError(f"{path}: measured on other weights of the base than those that are trained here")
        self._layers = trained_layers(model)
        basis = CoreBasis(file.u, file.v)
        if not any(name in self._layers for name in basis.modules):
            raise InputError(f"{path}: no module in common with the adapter that is trained")
        directions = leading_directions(file.fisher, self.k, "model.regularizer.k")
        like = next(iter(self._layers.values())).factors()[0]
        self._eigenvalues = file.fisher.energies(directions.T).to(like)
        self._directions = directions.to(like)
        self._u = {name: u.to(like) for name, u in basis.u.items()}
        # The adapter that is trained has no LoRA biases: nothing at an input that is always 1.
        inputs = {name: layer.a.shape[1] for name, layer in self._layers.items()}
        self._v = {name: v[: inputs.get(name)].to(like) for name, v in basis.v.items()}
        self._shapes = basis.shapes
        self.sources = ({"path": str(path), "sha256": sha256_file(path)},)
        self.seen = frozenset(file.record["seen"])

    def penalty(self) -> torch.Tensor:
        """The weighted sum of the three terms."""
        self._follow()
        zero = self._directions.new_zeros(())
        cores = [self._core(name, shape) for name, shape in self._shapes.items()]
        along = self._directions.T @ torch.cat([core.reshape(-1) for core in cores])
        total = self.align * (self._eigenvalues * along.square()).sum()
        if self.task:
            norms = torch.stack([layer.squared_norm() for layer in self._layers.values()])
            total = total + self.task * (norms.sum() - along.square().sum())
        if self.collision:
            sizes = [p * q for p, q in self._shapes.values()]
            critical = dict(zip(self._shapes, (self._directions @ along).split(sizes), strict=True))
            terms = [self._collision(name, critical[name]) for name in critical if name in self._layers]
            total = total + self.collision * sum(terms, zero)
        return total

    def _follow(self) -> None:
        """Move what was read to where the weights are now: the Trainer moves the model after it is built."""
        like = next(iter(self._layers.values())).factors()[0]
        if (self._directions.device, self._directions.dtype) != (like.device, like.dtype):
            self._directions, self._eigenvalues = self._directions.to(like), self._eigenvalues.to(like)
            self._u, self._v = ({n: m.to(like) for n, m in side.items()} for side in (self._u, self._v))

    def _core(self, name: str, shape: tuple[int, int]) -> torch.Tensor:
        if name not in self._layers:
            return self._directions.new_zeros(shape)
        return self._layers[name].core(self._u[name], self._v[name])

    def _collision(self, name: str, critical: torch.Tensor) -> torch.Tensor:
        layer = self._layers[name]
        part = self._u[name] @ critical.view(self._shapes[name]) @ self._v[name].T
        a, b = layer.factors()
        rest = layer.scale * (b @ a) - part
        overlap = (part.abs() * rest.abs()).sum()
        cosine = (part * rest).sum().square() / (part.square().sum() * rest.square().sum()).clamp(min=TINY)
        return self.blend * overlap + (1 - self.blend) * cosine
