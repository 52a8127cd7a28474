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
