"""Per-example scores of the core coordinates, from activations; no parameter ever needs a gradient.

For a linear layer with inputs x_t and output gradients δ_t the score of C in ``P = U C Vᵀ`` is

    g = Σ_t (Uᵀ δ_t) (Vᵀ x_t)ᵀ

two thin projections of tensors that the backward pass produces anyway (the same identity
as in K-FAC, 1503.05671). In weight coordinates U and V are the identity, and nothing is projected. Legend of shapes:
N examples, T tokens, M answer tokens of a batch, D coordinates, p and q sides of a core.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch

from src.errors import InputError

Granularity = Literal["sequence", "token"]
Sink = Callable[[str, torch.Tensor, torch.Tensor], None]
"""Takes a module's name, its projected output gradients (N, T, p) and its projected inputs (N, T, q)."""


def core_score(delta: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """(N, p·q) scores from projected output gradients ``delta`` (N, T, p) and inputs ``x`` (N, T, q)."""
    return torch.einsum("ntp,ntq->npq", delta, x).flatten(1)


def together(*sinks: Sink) -> Sink:
    """One sink that hands everything to several."""

    def update(name: str, delta: torch.Tensor, x: torch.Tensor) -> None:
        for sink in sinks:
            sink(name, delta, x)

    return update


def backward_parts(
    log_p: torch.Tensor, rows: torch.Tensor, count: int, granularity: Granularity
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The scalars whose gradients are the scores, one backward pass each.

    ``sequence``: one scalar, the sum over all answer tokens. A row's score is ``g_i = Σ_t g_{i,t}``.

    ``token``: the j-th scalar sums the j-th answer token of every row that has one; rows do not see each other, so
    its gradients are exactly the scores ``g_{i,j} = ∇_c log p(y_j | x, y_<j)``, earlier positions reached through
    attention included. As many passes as the longest answer has tokens. With labels drawn from the model at
    teacher-forced contexts the g_{i,j} of a row are independent with mean zero, so that
    ``E Σ_i g_i g_iᵀ = E Σ_{i,j} g_{i,j} g_{i,j}ᵀ``: n times the one Fisher matrix is M times the other.

    Args:
        log_p: (M,) log-probabilities of the answer tokens.
        rows: (M,) row of the batch that each belongs to, ascending.
        count: N, rows of the batch.
        granularity: What an example is.

    Returns:
        Scalars, and (N,) bool, which rows each is about.
    """
    totals = torch.bincount(rows, minlength=count)
    if granularity == "sequence":
        return [(log_p.sum(), totals > 0)]
    position = torch.arange(len(rows), device=rows.device) - (totals.cumsum(0) - totals)[rows]
    return [(log_p[position == j].sum(), totals > j) for j in range(int(totals.max()) if len(rows) else 0)]


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The format of what is handed on."""
    return torch.promote_types(dtype, torch.float32)


class ScoreRecorder:
    """Hooks on a model that turn one backward pass into projected activations, module by module.

    Register it after any hook that changes a layer's output. Everything handed on is float32 at least, under autocast
    too. Under gradient checkpointing a layer runs forward twice but meets its gradient once, so nothing counts twice:
    the first run's hook (``use_reentrant=False``) or the recomputation's (``True``) sees it, never both.

    Args:
        model: The language model; the named modules must be linear layers.
        u: (O, p) orthonormal output basis of each module, in the order of the coordinates; None is the identity.
        v: (I, q) orthonormal input basis of each module; None is the identity. A basis of I + 1 rows sees a last input
            that is always 1 (:mod:`src.adapters.constant_input`).

    Attributes:
        sink: What becomes of a module's projected gradients and inputs; to be set before each backward pass.
    """

    sink: Sink

    def __init__(
        self,
        model: torch.nn.Module,
        u: Mapping[str, torch.Tensor | None],
        v: Mapping[str, torch.Tensor | None],
    ) -> None:
        self.modules = {name: model.get_submodule(name) for name in u}
        self.u, self.v = dict(u), dict(v)
        self._answers: torch.Tensor | None = None
        self._seen: set[str] = set()
        self._ready: dict[tuple[str, bool], torch.Tensor] = {}

    @contextmanager
    def recording(self, answers: torch.Tensor | None = None) -> Iterator[None]:
        """Record while the block runs; forward and backward both belong inside.

        Args:
            answers: (N, T) bool, the M places of the batch that the output layer sees in place of all, in row-major
                order (:func:`src.models.logits.answer_logits`). Unset means that every layer sees (N, T, ·).
        """
        self._answers = answers
        handles = [module.register_forward_hook(self._hook(name)) for name, module in self.modules.items()]
        self._seen = set()
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def complete(self) -> None:
        """Check that a backward pass has met every module, once; call it after each.

        Raises:
            InputError: a module's output had no part in the loss.
        """
        if missing := [name for name in self.modules if name not in self._seen]:
            raise InputError(
                f"no gradient reached {missing[0]}: the text does not pass it (as in a tower for images or sound), so "
                "it has no Fisher pass; expected adapters that leave it out"
            )
        self._seen = set()

    def _basis(self, name: str, like: torch.Tensor, *, output: bool) -> torch.Tensor | None:
        """A module's basis in the working format, converted once; None is the identity."""
        basis = (self.u if output else self.v)[name]
        if basis is None:
            return None
        ready, dtype = self._ready.get((name, output)), _wide(like.dtype)
        if ready is None or (ready.device, ready.dtype) != (like.device, dtype):
            ready = self._ready[name, output] = basis.to(like.device, dtype)
        return ready

    def _project(self, name: str, tensor: torch.Tensor, *, output: bool) -> torch.Tensor:
        # Autocast would round these small products to bfloat16, and their sums over tokens with them.
        with torch.no_grad(), torch.autocast(tensor.device.type, enabled=False):
            seen = tensor.detach()
            basis = self._basis(name, seen, output=output)
            if basis is None:
                return seen  # no copy: layers that get the same input keep one
            seen = seen.to(basis.dtype)
            if len(basis) == seen.shape[-1] + 1:
                return seen @ basis[:-1] + basis[-1]
            return seen @ basis

    def _by_row(self, name: str, seen: torch.Tensor) -> torch.Tensor:
        """What a layer saw or gave, (N, T, ·): of a batch's tokens one after the other (N·T, ·), or of M (1, M, ·).

        Those M are laid at the beginning of their rows, zeros behind them: scores are sums over a row's tokens.

        Raises:
            InputError: it is of another shape, from which rows cannot be told.
        """
        if self._answers is None:
            return seen
        rows, tokens = self._answers.shape
        if seen.dim() == 3 and len(seen) == rows:
            return seen
        if seen.dim() == 2 and len(seen) == rows * tokens:
            return seen.view(rows, tokens, -1)
        counts = self._answers.sum(1)
        if seen.shape[:-1] == (1, int(counts.sum())):
            places = torch.arange(int(counts.max()), device=counts.device) < counts[:, None]
            laid = seen.new_zeros(*places.shape, seen.shape[-1])
            laid[places] = seen[0]
            return laid
        raise InputError(
            f"{name}: sees {tuple(seen.shape)} in a batch of {rows} rows of {tokens} tokens, and whose they are cannot "
            "be told (a routed expert sees some of them), so it has no Fisher pass; expected adapters that leave it out"
        )

    def _hook(self, name: str):  # type: ignore[no-untyped-def]
        def record(_: object, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
            if not out.requires_grad:
                return
            x = self._by_row(name, self._project(name, args[0], output=False))

            def store(grad: torch.Tensor) -> None:
                if name in self._seen:
                    raise InputError(
                        f"{name} met two gradients in one backward pass: the model uses it more than once, so it has "
                        "no Fisher pass; expected adapters that leave it out"
                    )
                self._seen.add(name)
                with torch.autocast(grad.device.type, enabled=False):
                    delta = self._by_row(name, self._project(name, grad, output=True))
                    self.sink(name, delta.to(_wide(delta.dtype)), x.to(_wide(x.dtype)))

            out.register_hook(store)

        return record
