"""Slow dense twins of the project's mathematics."""

import numpy as np
import scipy.linalg
import torch
from torch.func import functional_call


def dense_pencil(fisher_s, fisher_u, *, rho, rho_s):
    """(F_s + σI, F_u + εI) as dense float64 arrays."""
    dim = fisher_s.shape[0]
    sigma = rho_s * np.trace(fisher_s) / dim
    epsilon = rho * np.trace(fisher_u) / dim
    return fisher_s + sigma * np.eye(dim), fisher_u + epsilon * np.eye(dim)


def dense_eigh(left, right):
    """Eigenvalues descending and eigenvectors with Vᵀ right V = I, by scipy."""
    values, vectors = scipy.linalg.eigh(left, right)
    return values[::-1], vectors[:, ::-1]


def dense_filtered(left, right, patch, phi):
    values, vectors = dense_eigh(left, right)
    return vectors @ (phi(values) * (vectors.T @ (right @ patch)))


def eigenvectors(system):
    """(D, m) dense eigenvectors of a solved pencil."""
    return system.combine(torch.eye(len(system.values), dtype=torch.float64)).T


def autograd_scores(model, batch, u, v, labels=None):
    """(N, D) scores by one autograd call per example: C enters as a parameter, W + U C Vᵀ, at C = 0."""
    weights = {name: model.get_submodule(name).weight for name in u}
    results = []
    for row in range(len(batch.index)):
        length, start = int(batch.lengths[row]), int(batch.answer_starts[row])
        ids = batch.ids[row : row + 1, :length]
        cores = [torch.zeros(u[n].shape[1], v[n].shape[1], dtype=torch.float64, requires_grad=True) for n in u]
        patched = {
            f"{name}.weight": weights[name] + u[name] @ core @ v[name].T for name, core in zip(u, cores, strict=True)
        }
        logits = functional_call(model, patched, (ids,)).logits[0]
        targets = ids[0, start:] if labels is None else labels[row]
        log_p = logits[start - 1 : -1].log_softmax(-1).gather(1, targets[:, None]).sum()
        grads = torch.autograd.grad(log_p, cores)
        results.append(torch.cat([g.reshape(-1) for g in grads]))
    return torch.stack(results)


def autograd_token_scores(model, batch, u, v):
    """(M, D) scores of each answer token's log-probability alone, one autograd call per token, in row-major order."""
    weights = {name: model.get_submodule(name).weight for name in u}
    results = []
    for row in range(len(batch.index)):
        length, start = int(batch.lengths[row]), int(batch.answer_starts[row])
        ids = batch.ids[row : row + 1, :length]
        for t in range(start, length):
            cores = [torch.zeros(u[n].shape[1], v[n].shape[1], dtype=torch.float64, requires_grad=True) for n in u]
            patched = {f"{n}.weight": weights[n] + u[n] @ core @ v[n].T for n, core in zip(u, cores, strict=True)}
            logits = functional_call(model, patched, (ids,)).logits[0]
            grads = torch.autograd.grad(logits[t - 1].log_softmax(-1)[ids[0, t]], cores)
            results.append(torch.cat([g.reshape(-1) for g in grads]))
    return torch.stack(results)


def autograd_weight_scores(model, batch, names):
    """{module: (N, O, I)} gradients of each example's answer log-likelihood in the weights themselves."""
    found = {name: [] for name in names}
    for row in range(len(batch.index)):
        length, start = int(batch.lengths[row]), int(batch.answer_starts[row])
        ids = batch.ids[row : row + 1, :length]
        weights = {f"{n}.weight": model.get_submodule(n).weight.detach().clone().requires_grad_() for n in names}
        logits = functional_call(model, weights, (ids,)).logits[0]
        log_p = logits[start - 1 : -1].log_softmax(-1).gather(1, ids[0, start:, None]).sum()
        for name, gradient in zip(names, torch.autograd.grad(log_p, list(weights.values())), strict=True):
            found[name].append(gradient)
    return {name: torch.stack(parts) for name, parts in found.items()}


def autograd_token_activations(model, batch, names):
    """{module: [(δ (T, O), x (T, I)) per example]}: output gradients and inputs, by zeros added to the outputs."""
    found = {name: [] for name in names}
    for row in range(len(batch.index)):
        length, start = int(batch.lengths[row]), int(batch.answer_starts[row])
        ids = batch.ids[row : row + 1, :length]
        kept = {}

        def keep(name, kept=kept):
            def hook(_, args, out):
                kept[name] = (args[0][0].detach(), torch.zeros_like(out).requires_grad_())
                return out + kept[name][1]

            return hook

        handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
        logits = model(ids).logits[0]
        for handle in handles:
            handle.remove()
        log_p = logits[start - 1 : -1].log_softmax(-1).gather(1, ids[0, start:, None]).sum()
        deltas = torch.autograd.grad(log_p, [kept[name][1] for name in names])
        for name, delta in zip(names, deltas, strict=True):
            found[name].append((delta[0], kept[name][0]))
    return found


def block_diagonal(dense, sizes):
    """A dense matrix with everything outside the modules' blocks set to zero."""
    blocks, start = [], 0
    for size in sizes:
        blocks.append(dense[start : start + size, start : start + size])
        start += size
    return torch.block_diag(*blocks)


def dense_ridged_kronecker(fisher, ridge):
    """Dense ``⊕ (A + π√ε I) ⊗ (B + √ε/π I)``, π² = (tr A/p)/(tr B/q), of a Kronecker Fisher's factors."""
    blocks = []
    for name, (p, q) in fisher.shapes.items():
        a, b = (factor.numpy() for factor in fisher.factors(name))
        pi = np.sqrt((np.trace(a) / p) / (np.trace(b) / q)) if np.trace(a) > 0 and np.trace(b) > 0 else 1.0
        if np.trace(a) == 0 or np.trace(b) == 0:
            a, b = 0 * a, 0 * b
        left = a + pi * np.sqrt(ridge) * np.eye(p)
        blocks.append(np.kron(left, b + np.sqrt(ridge) / pi * np.eye(q)))
    return scipy.linalg.block_diag(*blocks)


def dense_kronecker_ridge(scores, total, shapes, damping):
    """K of :mod:`src.gevp.kronecker_ridge` by its definition: Kronecker products of sums over single rows."""
    blocks, first = [], 0
    for p, q in shapes.values():
        rows = scores[:, first : first + p * q].reshape(-1, p, q)
        first += p * q
        left = sum(row @ row.T for row in rows) / total
        right = sum(row.T @ row for row in rows) / total
        blocks.append(np.kron(left, right) / (np.trace(left) or 1.0))
    each = sum(np.trace(block) for block in blocks) / first
    return scipy.linalg.block_diag(*blocks) / each + damping * np.eye(first)


def dense_relearned(dense_s, dense_benign, dense_u, g_s, g_benign, start, *, tau, trust, sigma, ridge=None):
    """Minimum of the objective of re-learned coefficients, from its normal equations at c itself; ``ridge`` for I."""
    proximal = dense_s + tau * dense_benign + sigma * (np.eye(len(start)) if ridge is None else ridge)
    return np.linalg.solve(proximal + trust * dense_u, proximal @ start + g_s + tau * g_benign)
