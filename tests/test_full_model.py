"""Whole models: what lies beside the base's weights, and bases that store both ends of a tied weight."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from src.adapters.base_weights import open_base
from src.adapters.full_model import write_model
from src.adapters.pairs import LowRankPair

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


def update():
    draw = torch.Generator().manual_seed(0)
    return LowRankPair(torch.randn(2, 16, generator=draw), torch.randn(258, 2, generator=draw) * 0.1)


def write(base, folder, modules):
    with open_base(str(base)) as weights:
        write_model(folder, weights, dict.fromkeys(modules, update()), transposed=False, shard_bytes=10**9)
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize(
    ("modules", "tied"),
    [([], True), (["model.layers.0.self_attn.q_proj"], True), ([HEAD], False), ([EMBEDDING], False)],
)
def test_a_tied_base_is_untied_where_one_end_is_updated(base, tmp_path, both, modules, tied):
    stored = shutil.copytree(base, tmp_path / "base")
    if both:
        weights = load_file(stored / "model.safetensors")
        weights[f"{HEAD}.weight"] = weights[f"{EMBEDDING}.weight"].clone()
        save_file(weights, stored / "model.safetensors", metadata={"format": "pt"})
    if modules and tied:
        shape = load_file(stored / "model.safetensors")[f"{modules[0]}.weight"].shape
        with open_base(str(stored)) as weights:
            pair = LowRankPair(torch.ones(1, shape[1]), torch.ones(shape[0], 1))
            write_model(tmp_path / "m", weights, {modules[0]: pair}, transposed=False, shard_bytes=10**9)
        config = json.loads((tmp_path / "m" / "config.json").read_text())
    else:
        config = write(stored, tmp_path / "m", modules)
    assert config["tie_word_embeddings"] is tied
    written = load_file(tmp_path / "m" / "model.safetensors")
    original = load_file(base / "model.safetensors")[f"{EMBEDDING}.weight"]
    for name in (EMBEDDING, HEAD) if not tied else ():
        expected = original + update().dense() if name in modules else original
        torch.testing.assert_close(written[f"{name}.weight"], expected, rtol=1e-6, atol=1e-6)


def test_code_licence_and_tokenizer_of_the_base_come_along_and_no_index_of_its_weights(base, tmp_path):
    stored = shutil.copytree(base, tmp_path / "base")
    for name in ("modeling_x.py", "LICENSE", "LICENSE.md", "NOTICE.txt", "qwen.tiktoken"):
        (stored / name).write_text(name)
    (stored / "LICENSES").mkdir()
    for name in ("model", "pytorch_model.bin"):
        (stored / f"{name}.index.json").write_text("{}")
    write(stored, tmp_path / "m", [HEAD])
    assert not list((tmp_path / "m").glob("*.index.json"))
    for name in ("modeling_x.py", "LICENSE", "LICENSE.md", "NOTICE.txt", "qwen.tiktoken"):
        assert (tmp_path / "m" / name).read_text() == name
