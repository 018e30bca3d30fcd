"""A model loaded without an engine computes what the engine that saved it computed, from any kind of checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.checkpoint.layouts import Layout, Training
from tests.distributed import run_ranks
from tests.fake_gpu import fake_gpus
from tests.huggingface import ModelReader, config_of, model_of, tokens_of
from vqmoe_ds.checkpoint.formats.huggingface.folder import ExportOptions, export_hf
from vqmoe_ds.checkpoint.formats.portable import write_portable
from vqmoe_ds.checkpoint.io.store import read_manifest, write_manifest
from vqmoe_ds.checkpoint.load_model import load_model
from vqmoe_ds.checkpoint.open import open_checkpoint
from vqmoe_ds.data.tokenizers import WordTokenizer
from vqmoe_ds.runtime.errors import CheckpointError, ConfigError
from vqmoe_ds.runtime.files import new_folder

SAVED = {
    "zero0-ep2": (Layout(0, 2, 2), {}),
    "zero2-ep1": (Layout(2, 1, 2), {"moe.router": "stablemoe"}),
    "zero3-ep2": (Layout(3, 2, 2), {"moe.router": "expert_bias", "moe.top_k": 2, "moe.output_norm": False}),
    "zero3-bf16": (Layout(3, 2, 2, "bf16"), {}),
}
TOKENS = tokens_of(2, 16, 61)


def _save_all(rank, world, folder):
    """Logits of each engine on the same tokens, and what the same checkpoint gives with experts on two ranks."""
    answers = {}
    for name, (layout, changes) in SAVED.items():
        training = Training(folder, layout, rank, **changes)
        training.train(2)
        training.save(Path(folder) / name)
        training.session.engine.eval()
        with torch.no_grad():
            there = training.session.engine(TOKENS)[0]
        training.close()
        spread = load_model(Path(folder) / name, ep_size=2, ep_rank=rank).model
        assert spread.moe_layers()[0].experts.w1.shape[0] == 2
        answers[name] = (there, spread(TOKENS)[0])
    return answers


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("load_model")
    return folder, run_ranks(2, _save_all, str(folder), timeout=150)[0]


@pytest.mark.parametrize("name", SAVED)
def test_tags_of_every_layout_load_without_an_engine(saved, name):
    folder, answers = saved
    engine, spread = answers[name]
    loaded = load_model(folder / name)
    here = loaded.model(TOKENS)[0]
    assert torch.equal(here, load_model(folder / name).model(TOKENS)[0])
    assert torch.allclose(here, spread, atol=1e-6)
    assert torch.allclose(here, engine.float(), atol=0.05 if "bf16" in name else 1e-5)
    assert (loaded.step, loaded.kind, loaded.path.name) == (2, "deepspeed", "global_step0000002")
    assert not loaded.model.training and not any(p.requires_grad for p in loaded.model.parameters())


@pytest.mark.parametrize("name", SAVED)
def test_experts_may_stay_in_the_files_of_every_layout(saved, name):
    whole = load_model(saved[0] / name)
    stored = load_model(saved[0] / name, expert_memory=2 * 4 * 3 * 16 * 12)
    with torch.no_grad():
        assert torch.equal(stored.model(TOKENS)[0], whole.model(TOKENS)[0])
    stored.close()
    assert stored.store.rooms == 2 and stored.store.reads > 2


def test_a_portable_folder_and_a_run_folder_give_the_same(saved, tmp_path):
    folder, _ = saved
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(folder / "zero3-ep2")
    with new_folder(tmp_path / "portable", False) as portable:
        write_portable(open_checkpoint(folder / "zero3-ep2"), portable)
    logits = [load_model(path).model(TOKENS)[0] for path in (tmp_path / "run", tmp_path / "portable")]
    assert torch.equal(*logits)


@pytest.mark.parametrize("case", ["context", "context, averaged table", "top-2", "hash of tokens"])
def test_an_exported_folder_computes_the_same_and_knows_its_tokenizer(case, tmp_path):
    model = model_of(config_of(case, vocab=257))
    export_hf(ModelReader(model), tmp_path / "hf", ExportOptions())
    loaded = load_model(tmp_path / "hf")
    tokens = tokens_of(vocab=257)
    assert torch.equal(loaded.model(tokens)[0], model(tokens)[0])
    assert loaded.decode(loaded.encode("Käfer")) == "Käfer"
    assert (loaded.kind, loaded.step) == ("hf", 7)


def _portable(tmp_path, tokenizer, vocab=50, data=None):
    """A portable checkpoint whose run was trained on ids of a tokenizer."""
    config = config_of("top-2", vocab=vocab)
    told = {"tokenizer_sha256": tokenizer.checksum if tokenizer else None, **(data or {})}
    config = config.model_copy(update={"data": config.data.model_copy(update=told)})
    reader = ModelReader(model_of(config))
    with new_folder(tmp_path / "portable", False) as folder:
        write_portable(reader, folder)
    return tmp_path / "portable"


def test_the_tokenizer_is_that_of_the_runs_data_or_the_one_that_is_named(tmp_path):
    words = WordTokenizer(["a", "cat"])
    words.save(tmp_path / "corpus.tokenizer")
    folder = _portable(tmp_path, words, data={"path": [str(tmp_path / "corpus")]})
    assert load_model(folder).encode("a cat a") == [0, 1, 0]
    (tmp_path / "corpus.tokenizer").rename(tmp_path / "moved")
    lost = load_model(folder)
    with pytest.raises(CheckpointError, match="was not found .vocabulary 50.; name it with --tokenizer"):
        lost.encode("a")
    assert load_model(folder, tmp_path / "moved").encode("cat") == [1]
    with pytest.raises(CheckpointError, match="is not the one that .* was trained with"):
        load_model(folder, "bytes")
    WordTokenizer(["a", "dog"]).save(tmp_path / "other")
    with pytest.raises(CheckpointError, match="is not the one that .* was trained with"):
        load_model(folder, tmp_path / "other")


def test_what_cannot_be_is_refused_in_one_sentence(saved, tmp_path):
    folder, _ = saved
    with pytest.raises(CheckpointError, match="no such checkpoint folder"):
        load_model(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="--ep_size 3 does not divide the 4 experts"):
        load_model(folder / "zero0-ep2", ep_size=3)
    other = _portable(tmp_path, None)
    state = json.loads((other / "state.json").read_text())
    state["config"]["moe"]["expert_hidden"] = 24
    (other / "state.json").write_text(json.dumps(state))
    manifest = read_manifest(other)
    manifest["files"]["state.json"]["bytes"] = (other / "state.json").stat().st_size
    write_manifest(other, manifest, manifest.pop("files"))
    with pytest.raises(CheckpointError, match="holds another model: .*w1 is .* there, .* here"):
        load_model(other)


def test_precision_is_that_of_parameters_and_never_of_codebooks_or_of_a_routers_state(saved):
    folder, _ = saved
    for name in SAVED:
        low, full = load_model(folder / name, precision="bf16").model, load_model(folder / name).model
        assert {param.dtype for param in low.parameters()} == {torch.bfloat16}
        assert {param.dtype for param in full.parameters()} == {torch.float32}
        assert [b.dtype for b in low.buffers()] == [b.dtype for b in full.buffers()]
        assert torch.allclose(low(TOKENS)[0].float(), full(TOKENS)[0], atol=0.15)
    with pytest.raises(ConfigError, match="precision 'int8' is unknown; give bf16 or fp32"):
        load_model(folder / "zero0-ep2", precision="int8")


@pytest.mark.parametrize(
    ("gpus", "sentence"),
    [
        ({"capability": (7, 0)}, "compute capability 7.0; bf16 needs 8.0"),
        ({}, "moe.expert_hidden=12 is not a multiple of 8, .* in bf16; use 16"),
    ],
)
def test_a_gpu_gets_bf16_and_refuses_what_it_cannot_do(saved, gpus, sentence):
    with fake_gpus(**gpus), pytest.raises(ConfigError, match=sentence):
        load_model(saved[0] / "zero0-ep2", device="cuda:0")
