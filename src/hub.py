"""What the hub's client raises where it cannot fetch something, and why that is, in words."""

# The base class of the HTTP client's errors: httpx's before huggingface_hub 2, httpx2's since.
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    GatedRepoError,
    HTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from src.errors import one_line

UNREACHABLE = (OSError, ValueError, RuntimeError, HTTPError)
"""What a fetch raises: a proxy's refusal is the HTTP client's own error, and hf_xet's failures are RuntimeErrors."""


def reason(error: BaseException) -> str:
    """Why nothing was fetched, on one line of at most 120 characters."""
    if isinstance(error, GatedRepoError):
        return "gated: hf auth login, and ask for access on its page"
    if isinstance(error, RepositoryNotFoundError):
        return "no such repository, or a private one"
    if isinstance(error, RevisionNotFoundError):
        return "it has no such revision"
    return one_line(error)[:120] or type(error).__name__
