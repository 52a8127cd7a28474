import logging
import os

if "PYTEST_XDIST_WORKER" in os.environ:  # two test processes at once: a thread for each, also in what they start
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest

from tests.fisher_pass import uneven_rows
from tests.tiny import make_base, make_model, make_tokenizer, random_pairs, write_rows


@pytest.fixture(autouse=True)
def _fresh_logging():
    """No test sees what a command of an earlier one did to the project's logger; pytest looks at it before each."""
    ours = logging.getLogger("src")
    ours.handlers, ours.propagate = [], True
    ours.setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """Directory of the tiny base model."""
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def model():
    return make_model()


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def encoded(tokenizer):
    """Seven rows of other lengths."""
    return uneven_rows(tokenizer)


def random_adapter(folder, base, rank, seed, model):
    from src.adapters.peft_files import write_adapter

    manifest = {"kind": "expert", "method": "fit"}
    write_adapter(
        folder, random_pairs(model, rank, seed), base=str(base), manifest=manifest, seen=frozenset(), card="card\n"
    )
    return folder


@pytest.fixture(scope="session")
def adapters(tmp_path_factory, base):
    """A utility adapter of rank 3 and a safety adapter of rank 2 for the tiny base."""
    root = tmp_path_factory.mktemp("adapters")
    tiny = make_model()
    return {
        "utility": random_adapter(root / "utility", base, 3, 1, tiny),
        "safety": random_adapter(root / "safety", base, 2, 2, tiny),
    }


@pytest.fixture(scope="session")
def rows(tmp_path_factory):
    """JSONL files with odd numbers of rows."""
    root = tmp_path_factory.mktemp("rows")
    names = {"task": 13, "val": 5, "harmful": 7, "benign": 9, "eval_harmful": 7, "eval_safe": 5, "eval_task": 9}
    return {name: write_rows(root / f"{name}.jsonl", count, what=name) for name, count in names.items()}
