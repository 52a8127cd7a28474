import datasets
import huggingface_hub
import pytest
from datasets.arrow_writer import ArrowWriter

from src.data.tables import load_table
from src.errors import InputError

NAME = "openai/gsm8k"
FIRST, SECOND = "1" * 40, "2" * 40


def keep(folder, commit, questions):
    """A copy of a revision in the cache of ``datasets``, as it is when the hub was asked."""
    place = folder / "datasets" / "openai___gsm8k" / "main" / "0.0.0" / commit
    place.mkdir(parents=True)
    with ArrowWriter(path=str(place / "gsm8k-train.arrow")) as writer:
        for question in questions:
            writer.write({"question": question})
        count, size = writer.finalize()
    train = {"name": "train", "num_bytes": size, "num_examples": count, "dataset_name": "gsm8k"}
    datasets.DatasetInfo(
        features=datasets.Features({"question": datasets.Value("string")}),
        builder_name="parquet",
        dataset_name="gsm8k",
        config_name="main",
        version="0.0.0",
        splits={"train": train},
    ).write_to_directory(str(place))


def refer(folder, name, commit):
    path = folder / "hub" / "datasets--openai--gsm8k" / "refs" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(commit)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for module in (datasets.config, huggingface_hub.constants):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", True)
    return tmp_path


def questions(folder, revision):
    table = load_table(NAME, folder / NAME, subset="main", split="train", revision=revision, text=())
    return list(table["question"])


def test_without_the_hub_the_copy_of_a_revision_is_read_and_no_other(cache):
    keep(cache, FIRST, ["of main"])
    keep(cache, SECOND, ["of v2", "too"])
    refer(cache, "main", FIRST)
    refer(cache, "v2", SECOND)
    refer(cache, "v3", "3" * 40)
    assert questions(cache, None) == questions(cache, "main") == questions(cache, FIRST) == ["of main"]
    assert questions(cache, "v2") == questions(cache, SECOND) == ["of v2", "too"]
    for absent in ("v3", "v4", "4" * 40):
        with pytest.raises(
            InputError, match=rf"^openai/gsm8k: .*kept of {FIRST}, {SECOND}; expected one of .*{absent}"
        ):
            questions(cache, absent)


def test_without_the_hub_the_only_copy_is_main_where_nothing_says_otherwise(cache):
    keep(cache, FIRST, ["the only one"])
    assert questions(cache, None) == ["the only one"]
    with pytest.raises(InputError, match=f"kept of {FIRST}; expected one of revision v2, or name its commit"):
        questions(cache, "v2")
    refer(cache, "main", SECOND)
    with pytest.raises(InputError, match=rf"kept of {FIRST}; expected one of revision main \({SECOND}\)"):
        questions(cache, None)
