"""What every artifact records about how it was made."""

import platform
from importlib.metadata import version

from src import __version__

PACKAGES = ("torch", "lightning", "transformers", "peft", "datasets", "torchmetrics", "safetensors")


def versions() -> dict[str, str]:
    """Versions of this project, Python and the packages that numbers depend on."""
    found = {"sst-merge": __version__, "python": platform.python_version()}
    return found | {package: version(package) for package in PACKAGES}
