"""Run by a test with one and with two threads: every method. Arguments: threads, experts and Fishers, output."""

import inspect
import sys
from pathlib import Path

import torch

from src.merge import registry  # noqa: F401 - fills the registry
from src.merge.base import MergeMethod
from src.merge.stage import merge
from tests.merging import anchored


def concrete(kind):
    """Every class below a class that can be made."""
    found = [c for c in kind.__subclasses__() if not inspect.isabstract(c)]
    deeper = [d for c in kind.__subclasses__() for d in concrete(c)]
    return list(dict.fromkeys([*found, *deeper]))


def main(threads, folder, output):
    torch.set_num_threads(threads)
    for cls in concrete(MergeMethod):
        fisher = folder / "fisher" / cls.__name__
        merge(
            utility=str(folder / "utility"),
            safety=str(folder / "safety"),
            method=anchored(cls(), fisher),
            fisher=str(fisher),
            base=str(folder / "base"),
            rank=5,
            warn_below=0.0,
            output=str(output / cls.__name__),
        )
    assert torch.get_num_threads() == threads


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
