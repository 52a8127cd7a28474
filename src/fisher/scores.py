"""Per-example scores of the core coordinates, from activations; no parameter ever needs a gradient.

For a linear layer with inputs x_t and output gradients δ_t the score of C in ``P = U C Vᵀ`` is

    g = Σ_t (Uᵀ δ_t) (Vᵀ x_t)ᵀ

two thin projections of tensors that the backward pass produces anyway (method.md section 3; the same identity as
in K-FAC, 1503.05671). Legend of shapes: N examples, T tokens, D coordinates, p and q sides of a core.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch


def core_score(delta: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """(N, p·q) scores from projected output gradients ``delta`` (N, T, p) and inputs ``x`` (N, T, q)."""
    return torch.einsum("ntp,ntq->npq", delta, x).flatten(1)


class ScoreRecorder:
    """Hooks on a model that turn one backward pass into the scores of every example of the batch.

    Register it after any hook that changes a layer's output. Scores are accumulated in float32 at least.

    Args:
        model: The language model; the named modules must be linear layers.
        u: (O, p) orthonormal output basis of each module, in the order of the coordinates.
        v: (I, q) orthonormal input basis of each module.
    """

    def __init__(self, model: torch.nn.Module, u: Mapping[str, torch.Tensor], v: Mapping[str, torch.Tensor]) -> None:
        self.modules = {name: model.get_submodule(name) for name in u}
        self.u, self.v = dict(u), dict(v)
        self.parts: dict[str, torch.Tensor] = {}
        self._ready: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record while the block runs; forward and backward both belong inside."""
        handles = [module.register_forward_hook(self._hook(name)) for name, module in self.modules.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def take(self) -> torch.Tensor:
        """(N, D) scores of the last backward pass.

        Raises:
            RuntimeError: a module's output had no part in the loss.
        """
        if missing := [name for name in self.modules if name not in self.parts]:
            raise RuntimeError(f"no gradient reached {missing[0]}: is it part of the forward pass?")
        scores = torch.cat([self.parts[name] for name in self.modules], dim=1)
        self.parts = {}
        return scores

    def _bases(self, name: str, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The module's bases in the working format, converted once."""
        ready = self._ready.get(name)
        if ready is None or ready[0].device != like.device or ready[0].dtype != like.dtype:
            ready = (self.u[name].to(like.device, like.dtype), self.v[name].to(like.device, like.dtype))
            self._ready[name] = ready
        return ready

    def _hook(self, name: str):  # type: ignore[no-untyped-def]
        def record(_: object, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
            if not out.requires_grad:
                return
            wide = torch.promote_types(out.dtype, torch.float32)
            with torch.no_grad():
                projected = args[0].detach() @ self._bases(name, args[0])[1]

            def store(grad: torch.Tensor) -> None:
                delta = grad @ self._bases(name, grad)[0]
                self.parts[name] = core_score(delta.to(wide), projected.to(wide))

            out.register_hook(store)

        return record
