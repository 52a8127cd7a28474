"""Bases and adapters on the hub: the revision that an adapter was trained on, what is fetched, why nothing could be."""

import json
import logging
from contextlib import ExitStack
from fnmatch import fnmatch
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import errors
from safetensors.torch import load_file, save_file

from src.adapters.base_weights import open_base
from src.adapters.checks import check_compatible
from src.adapters.pairs import LowRankPair
from src.adapters.peft_files import read_adapter, trained_weights, write_adapter
from src.errors import InputError
from src.merge.aligned import _read_aligned
from src.merge.combinations.task_arithmetic import TaskArithmetic
from src.merge.fishers import _beside_base
from src.merge.stage import merge
from src.models.base import BaseSpec, check_trained_on, load_tokenizer
from src.models.expert import ExpertModule
from src.models.lora import LoraSpec
from tests.tiny import make_model

NAME, MODULE = "org/base", "model.layers.0.self_attn.q_proj"
VALUES = {None: 1.0, "v2": 2.0}
"""What a base's weights are at each revision."""


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A stand-in for the hub with the base at two revisions; what it was asked for, and gave."""
    root = tmp_path / "hub"
    given = []

    def fetch(name, allow_patterns, revision=None):
        source, target = root / "remote" / name / str(revision), root / "cache" / name / str(revision)
        if not source.is_dir():
            raise errors.RevisionNotFoundError("404", response=answer(404))
        target.mkdir(parents=True, exist_ok=True)
        for path in sorted(source.iterdir()):
            if any(fnmatch(path.name, pattern) for pattern in allow_patterns) and not (target / path.name).exists():
                (target / path.name).write_bytes(path.read_bytes())
                given.append((name, revision, path.name))
        return str(target)

    for revision, value in VALUES.items():
        remote(root, NAME, revision, **{"model.safetensors": value})
    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    return SimpleNamespace(root=root, given=given)


def remote(root, name, revision=None, **files):
    """A repository: weights with these values in these files."""
    folder = root / "remote" / name / str(revision)
    folder.mkdir(parents=True)
    for file, value in files.items():
        if file.endswith(".json"):
            (folder / file).write_text(json.dumps(value))
        else:
            save_file({f"{MODULE}.weight": torch.full((4, 3), value)}, folder / file)
    return folder


def answer(status):
    """The HTTP client's response, whichever the client is."""
    client = client_module()
    return client.Response(status, request=client.Request("GET", "https://hub"))


def client_module():
    return import_module(errors.HTTPError.__module__.partition(".")[0])


def adapter(folder, *, base=NAME, revision=None, fingerprint=None):
    pairs = {MODULE: LowRankPair(torch.ones(1, 3), torch.ones(4, 1))}
    made = {"base": {"name": base, "fingerprint": fingerprint}}
    write_adapter(folder, pairs, base=base, manifest=made, seen=frozenset(), card="", revision=revision)
    return str(folder)


def revision_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())["revision"]


@pytest.mark.parametrize("base", [None, NAME, "Org/Base"])
@pytest.mark.parametrize("revision", VALUES)
def test_whole_weights_are_those_of_the_revision_that_the_adapter_names(hub, tmp_path, base, revision):
    if base == "Org/Base":
        (hub.root / "remote" / "Org").symlink_to(hub.root / "remote" / "org")
        (hub.root / "remote" / "org" / "Base").symlink_to(hub.root / "remote" / NAME)
    utility, out = adapter(tmp_path / "a", revision=revision), tmp_path / "m"
    merge(utility=utility, output=str(out), full_model=True, base=base, dry_run=True)
    merge(utility=utility, output=str(out), full_model=True, base=base)
    weight = load_file(out / "model.safetensors")[f"{MODULE}.weight"]
    assert torch.equal(weight, torch.full((4, 3), VALUES[revision] + 1.0))
    assert {asked for _, asked, _ in hub.given} == {revision}
    assert json.loads((out / "manifest.json").read_text())["base_weights"].get("revision") == revision


def test_another_name_given_by_hand_and_a_directory_have_no_revision(hub, tmp_path):
    folder = remote(hub.root, "other/copy", **{"model.safetensors": 5.0})
    for base in ("other/copy", str(folder)):
        utility, out = adapter(tmp_path / "a", revision="v2"), tmp_path / "m"
        with pytest.raises(InputError, match=f"trained on the base '{NAME}'; --base is '{base}'; .*give --aliases"):
            merge(utility=utility, output=str(out), full_model=True, base=base, overwrite=True)
        merge(utility=utility, output=str(out), full_model=True, base=base, aliases=[NAME], overwrite=True)
        assert load_file(out / "model.safetensors")[f"{MODULE}.weight"].eq(6.0).all()
        assert "revision" not in json.loads((out / "manifest.json").read_text())["base_weights"]


def test_a_merged_adapter_names_the_revision_of_its_inputs(tmp_path):
    for revision in (None, "v2"):
        one, two = (adapter(tmp_path / name, revision=revision) for name in "ab")
        merge(utility=[one, two], output=str(tmp_path / "m"), overwrite=True)
        assert revision_of(tmp_path / "m") == revision
        assert read_adapter(tmp_path / "m").revision == revision
    local = adapter(tmp_path / "a", base=str(tmp_path), revision="v2")
    assert read_adapter(local).revision is None
    assert read_adapter(adapter(tmp_path / "a", revision="v2")).identity == read_adapter(local).identity


def test_two_revisions_are_one_line_unless_fingerprints_are_equal(hub, tmp_path):
    one, two = adapter(tmp_path / "a", revision="v2", fingerprint="f"), adapter(tmp_path / "b", revision="v3")
    line = f"^{two}: trained on the revision 'v3' of the base '{NAME}', {one} on 'v2'; expected one"
    for more in ({}, {"base": NAME}):
        with pytest.raises(InputError, match=line):
            merge(utility=[one], safety=two, method=TaskArithmetic(), output=str(tmp_path / "m"), **more)
    assert not hub.given
    adapter(tmp_path / "b", revision="v3", fingerprint="f")
    merge(utility=[one], safety=two, method=TaskArithmetic(), output=str(tmp_path / "m"))
    assert revision_of(tmp_path / "m") == "v2"


@pytest.mark.parametrize(("revision", "said"), [("v2", 1), ("main", 0), (None, 0)])
def test_an_adapter_without_a_revision_beside_one_that_has_one_is_a_warning(tmp_path, caplog, revision, said):
    names = [adapter(tmp_path / "a"), adapter(tmp_path / "b", revision=revision)]
    with caplog.at_level(logging.WARNING):
        check_compatible([read_adapter(name) for name in names])
    assert [record.getMessage() for record in caplog.records] == [
        f"{names[0]}: names no revision of its base, of which others name {revision!r}"
    ] * said


def test_weights_at_the_base_and_the_direction_of_an_adapter_are_of_its_revision(hub, tmp_path):
    utility = adapter(tmp_path / "a", revision="v2")
    pair, measured = SimpleNamespace(safety=0, utility=0, basis=0), SimpleNamespace(file=SimpleNamespace(fisher=0))
    found = _beside_base(pair, [measured, measured], [read_adapter(utility)], None)
    assert found.weights[MODULE].dense().eq(2.0).all()
    with _read_aligned(utility, NAME):
        assert {asked for _, asked, _ in hub.given} == {"v2"}


def test_what_unsloth_writes_is_no_revision_and_a_number_is_one_line(tmp_path):
    assert read_adapter(adapter(tmp_path / "a", base="unsloth/tiny", revision="unsloth")).revision is None
    with pytest.raises(InputError, match=r"adapter_config\.json: revision is 5; expected a git revision of the base"):
        read_adapter(adapter(tmp_path / "b", revision=5))


@pytest.mark.parametrize(("name", "written"), [(NAME, "v2"), (None, None)])
def test_a_trained_adapter_names_the_revision_of_a_base_on_the_hub(tmp_path, monkeypatch, name, written):
    monkeypatch.setattr("src.models.expert.load_model", lambda _: make_model(dtype=torch.float32))
    spec = BaseSpec(name or str(tmp_path), revision="v2")
    module = ExpertModule(spec, LoraSpec(rank=1, targets=["q_proj"]), matmul="highest")
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    module._trainer = SimpleNamespace(strategy=strategy, precision="32-true")
    module.configure_model()
    (tmp_path / "out").mkdir()
    module.write_adapter(tmp_path / "out", trained_weights(module.state_dict()))
    assert revision_of(tmp_path / "out") == read_adapter(tmp_path / "out").revision == written


def test_an_adapter_is_not_measured_on_another_revision_than_it_names(tmp_path):
    stated, silent = read_adapter(adapter(tmp_path / "a", revision="v2")), read_adapter(adapter(tmp_path / "b"))
    known = read_adapter(adapter(tmp_path / "c", revision="v2", fingerprint="f"))
    for revision, at in ((None, "main"), ("v3", "v3")):
        with pytest.raises(InputError, match=f"a: trained on the revision 'v2' of .*base.name is that at '{at}'"):
            check_trained_on([stated], BaseSpec(NAME, revision=revision), "f")
        check_trained_on([silent, known], BaseSpec(NAME, revision=revision), "f")
    check_trained_on([stated, read_adapter(adapter(tmp_path / "d", revision="main"))], BaseSpec(NAME, revision="v2"))
    (tmp_path / "base").mkdir()
    check_trained_on([stated], BaseSpec(str(tmp_path / "base")))


SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


@pytest.mark.parametrize("weights", [[*SHARDS, "model.safetensors.index.json"], SHARDS, ["model.safetensors"]])
def test_only_the_files_of_a_bases_weights_are_fetched(hub, weights):
    values = dict.fromkeys([*weights, "consolidated.safetensors", "model-fp16.safetensors"], 3.0)
    if len(weights) == 3:
        values[weights[-1]] = {"weight_map": {f"{MODULE}.weight": SHARDS[0], "lm_head.weight": SHARDS[1]}}
    folder = remote(hub.root, "org/large", **values, **{"config.json": {}, "tokenizer.json": {}})
    save_file({"lm_head.weight": torch.ones(2, 3)}, folder / weights[min(1, len(weights) - 1)])
    with open_base("org/large") as base:
        assert "lm_head.weight" in base.handles
    assert sorted(file for *_, file in hub.given) == sorted([*weights, "config.json", "tokenizer.json"])


def test_an_index_that_names_files_elsewhere_is_one_line(hub):
    files = {"model.safetensors.index.json": {"weight_map": {f"{MODULE}.weight": "/elsewhere/x.safetensors"}}}
    remote(hub.root, "org/odd", **files)
    with pytest.raises(InputError, match=r"/elsewhere/x\.safetensors: no such file; expected a part of the base"):
        READERS["base"]("org/odd")


def test_without_the_hub_a_copy_that_lacks_what_is_not_needed_is_read(hub, monkeypatch):
    folder = remote(hub.root, "org/kept", **{"model.safetensors": 3.0})

    def offline(*_, **__):
        error = errors.LocalEntryNotFoundError("incomplete: LICENSE")
        error.snapshot_path = str(folder)
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with open_base("org/kept") as base:
        assert base.handles.keys() == {f"{MODULE}.weight"}
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"no model\*\.safetensors in it"):
        READERS["base"]("org/kept")


def test_a_repository_whose_weights_have_other_names_is_one_line(hub):
    remote(hub.root, "org/old", **{"consolidated.safetensors": 1.0, "config.json": {}})
    with pytest.raises(InputError, match=r"no model\*\.safetensors in it that makes a model"), ExitStack() as stack:
        stack.enter_context(open_base("org/old"))


def gone(kind, text="401 Client Error. (Request ID: Root=1-6512bd43-0a1b2c3d4e5f;00000000-1111-2222)\n\nno access"):
    return kind(text, response=answer(401))


READERS = {"adapter": read_adapter, "base": lambda name: open_base(name).__enter__()}


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (lambda: client_module().ProxyError("403 Forbidden"), "403 Forbidden"),
        (lambda: client_module().ReadTimeout(""), "ReadTimeout"),
        (lambda: RuntimeError("Data processing error: CAS"), "Data processing error: CAS"),
        (lambda: gone(errors.GatedRepoError), "gated: hf auth login, and ask for access on its page"),
        (lambda: gone(errors.RepositoryNotFoundError), "no such repository, or a private one"),
        (lambda: gone(errors.RevisionNotFoundError), "it has no such revision"),
        (lambda: gone(errors.HfHubHTTPError), "401 Client Error. no access"),
    ],
)
def test_why_nothing_is_fetched_is_one_line(monkeypatch, read, error, reason):
    def fetch(name, allow_patterns):
        raise error()

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    with pytest.raises(InputError) as caught:
        READERS[read]("someone/something")
    assert str(caught.value).endswith(f" fetched now ({reason})")
    assert "\n" not in str(caught.value)


def test_a_proxy_that_refuses_the_model_is_one_line(monkeypatch):
    def fetch(*_, **__):
        raise client_module().ProxyError("403 Forbidden")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", fetch)
    with pytest.raises(
        InputError,
        match=r"^base\.name org/base: its tokenizer cannot be loaded \(org/base is no directory here; 403 Forbidden\)$",
    ):
        load_tokenizer(BaseSpec(NAME))
