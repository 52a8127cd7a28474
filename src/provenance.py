"""What every artifact records about how it was made."""

import hashlib
import platform
from functools import cache
from importlib.metadata import version
from pathlib import Path

from src import __version__

PACKAGES = ("torch", "lightning", "transformers", "peft", "datasets", "torchmetrics", "safetensors")


def versions() -> dict[str, str]:
    """Versions of this project, Python and the packages that numbers depend on."""
    found = {"sst-merge": __version__, "python": platform.python_version()}
    return found | {package: version(package) for package in PACKAGES}


@cache
def code_hash(patterns: tuple[str, ...]) -> str:
    """SHA-256 of source files, by patterns below ``src``: what a killed run has left is of this code only."""
    root = Path(__file__).parent
    files = sorted({file for pattern in patterns for file in root.glob(pattern)})
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
