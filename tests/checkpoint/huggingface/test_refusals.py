"""Folders and options that are refused in one sentence; the model card."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed: pip install -r requirements-dev.txt")

from safetensors.torch import load_file, save_file

import vqmoe_ds.models.hf  # noqa: F401 (registers the model)
from tests.huggingface import ModelReader, config_of, edit, export, load_back, model_of, tokens_of
from vqmoe_ds.checkpoint.formats.huggingface.folder import ExportOptions, export_hf, open_hf, run_config
from vqmoe_ds.runtime.errors import CheckpointError, ConfigError, UserError


def test_a_folder_that_exists_is_left_alone_without_force(tmp_path: Path) -> None:
    model, folder = model_of(config_of("dense")), tmp_path / "hf"
    folder.mkdir()
    (folder / "precious").write_text("x")
    with pytest.raises(CheckpointError, match="exists; choose another folder, or give --force"):
        export(model, folder)
    assert [p.name for p in tmp_path.iterdir()] == ["hf"] and (folder / "precious").exists()
    export(model, folder, force=True)
    assert not (folder / "precious").exists() and open_hf(folder).step == 7
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_a_failure_half_way_leaves_nothing(tmp_path: Path) -> None:
    class Failing(ModelReader):
        def read(self, name: str, kind: str, start: int, count: int) -> torch.Tensor:
            if name == "blocks.3.attention.out.weight":
                raise OSError(28, "No space left on device")
            return super().read(name, kind, start, count)

    with pytest.raises(CheckpointError, match="No space left on device"):
        export_hf(Failing(model_of(config_of("context"))), tmp_path / "hf", ExportOptions(tokenizer="none"))
    assert not list(tmp_path.iterdir())


def test_a_configuration_of_an_unknown_router_leads_to_its_plug_in(tmp_path: Path) -> None:
    for saved, sentence in (
        ({"moe": {"router": "mine"}}, "cannot be: moe.router='mine' is unknown; .* --plugin FILE.py"),
        ({"model": {"layers": 0}}, "cannot be: model.layers=0: input should be"),
    ):
        with pytest.raises(CheckpointError, match=sentence):
            run_config(saved, tmp_path)


@pytest.mark.parametrize(
    ("options", "kind", "reason"),
    [
        ({"max_shard": "many"}, ConfigError, "--max_shard 'many' is no size"),
        ({"dtype": "int4"}, CheckpointError, "'int4' is none of float32, bfloat16"),
        ({"arch": "gpt"}, CheckpointError, "'gpt' is none of vqmoe, mixtral, llama"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    options: dict[str, str], kind: type[UserError], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=reason):
        export(model_of(config_of("dense")), tmp_path / "hf", **options)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_with_another_tensor_is_refused(tmp_path: Path) -> None:
    reader = ModelReader(model_of(config_of("context")))
    del reader._parameters["norm.weight"]
    with pytest.raises(CheckpointError, match="norm.weight is missing"):
        export_hf(reader, tmp_path / "hf", ExportOptions(tokenizer="none"))
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "hf"
    export(model_of(config_of("context")), folder, max_shard="30KB")
    return folder


def _damage(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "hf"))


def test_damaged_folders_are_refused_in_one_sentence(whole: Path, tmp_path: Path) -> None:
    shard = "model-00002-of-00004.safetensors"
    names = json.loads((whole / "model.safetensors.index.json").read_text())["weight_map"]

    def drop(folder: Path) -> None:
        (folder / shard).unlink()

    def cut(folder: Path) -> None:
        (folder / shard).write_bytes((whole / shard).read_bytes()[:-10])

    def lie(folder: Path) -> None:
        (folder / shard).write_bytes((1 << 60).to_bytes(8, "little") + b"{}")

    def climb(folder: Path) -> None:
        edit(folder / "model.safetensors.index.json", weight_map={**names, "x": "../../secret.safetensors"})

    def other(folder: Path) -> None:
        edit(folder / "config.json", hidden_size=48)

    def newer(folder: Path) -> None:
        edit(folder / "vqmoe_training.json", format=99)

    def pickled(folder: Path) -> None:
        (folder / "model.safetensors.index.json").unlink()
        (folder / "pytorch_model.bin").write_bytes(b"")

    def kind(folder: Path) -> None:
        edit(folder / "config.json", model_type="gpt2")

    def text(folder: Path) -> None:
        (folder / "config.json").write_text("{")

    for number, (harm, reason) in enumerate(
        [
            (drop, "is missing"),
            (cut, "refused: its header"),
            (lie, "its header claims"),
            (climb, "lies outside the folder"),
            (other, "does config.json belong to these weights"),
            (newer, "newer format; update vqmoe_ds"),
            (pickled, "only safetensors are read, pickles are not"),
            (kind, "model of type gpt2"),
            (text, "is not valid JSON"),
        ]
    ):
        folder = Path(shutil.copytree(whole, tmp_path / str(number)))
        harm(folder)
        with pytest.raises(CheckpointError, match=reason) as caught:
            open_hf(folder)
        assert "\n" not in str(caught.value), harm.__name__


@pytest.mark.parametrize(
    ("case", "options", "change", "reason"),
    [
        ("context", {"quantization_config": {"quant_method": "bitsandbytes"}}, {}, "its weights are quantised"),
        ("dense", {}, {"model.norm.weight": torch.int8}, r"model.norm.weight holds whole numbers \(int8\)"),
        ("tied embeddings", {}, {"lm_head.weight": 1}, None),
        ("tied embeddings", {}, {"lm_head.weight": 2}, "tie_word_embeddings is true, and lm_head.weight is not the em"),
    ],
)
def test_weights_that_are_not_the_models_as_they_stand_are_refused(
    case: str, options: dict[str, Any], change: dict[str, Any], reason: str | None, tmp_path: Path
) -> None:
    model = model_of(config_of(case))
    export(model, tmp_path / "hf", arch="llama" if case == "dense" else "vqmoe")
    edit(tmp_path / "hf" / "config.json", **options)
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    for name, how in change.items():
        old = weights.get(name, weights["model.embed_tokens.weight"])
        weights[name] = old.to(how) if isinstance(how, torch.dtype) else old * how
    save_file(weights, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    if reason is None:
        assert torch.equal(load_back(open_hf(tmp_path / "hf"))(tokens_of())[0], model(tokens_of())[0])
        return
    with pytest.raises(CheckpointError, match=reason):
        open_hf(tmp_path / "hf")


HARMS: dict[str, tuple[str, Any, str]] = {
    "an expert too many": ("code_map", lambda t: t.fill_(4), "must hold experts from 0 to 3 as int64"),
    "a negative expert": ("code_map", lambda t: t.fill_(-1), "must hold experts from 0 to 3 as int64"),
    "experts as floats": ("code_map", lambda t: t.float(), "must hold experts from 0 to 3 as int64"),
    "fewer layers": ("code_map", lambda t: t[:3].clone(), r"has shape \[3, 9\] instead of \[4, 9\]"),
    "fewer codes": ("codes", lambda t: t[:, :8].clone(), r"has shape \[4, 8, 24\] instead of \[4, 9, 24\]"),
    "codes that are no numbers": ("codes", lambda t: t.fill_(torch.nan), "must hold finite float32"),
    "rounded codes": ("codes", lambda t: t.bfloat16(), "must hold finite float32"),
}


@pytest.mark.parametrize("harm", HARMS)
def test_tables_are_checked_before_anything_is_looked_up_in_them(harm: str, tmp_path: Path) -> None:
    name, change, reason = HARMS[harm]
    export(model_of(config_of("context")), tmp_path / "hf")
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    weights[f"model.codebook.{name}"] = change(weights[f"model.codebook.{name}"])
    save_file(weights, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"model.codebook.{name} {reason}"):
        open_hf(tmp_path / "hf")


def test_damaged_tables_are_not_exported(tmp_path: Path) -> None:
    model = model_of(config_of("context"))
    assert model.bank is not None
    model.bank.code_map_LK[2, 3] = 4
    with pytest.raises(CheckpointError, match="model.codebook.code_map must hold experts from 0 to 3"):
        export(model, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_tables_of_tokens_and_of_learning_are_checked_too(tmp_path: Path) -> None:
    export(model_of(config_of("hash of tokens")), tmp_path / "hash")
    weights = load_file(tmp_path / "hash" / "model.safetensors")
    weights["model.token_table"][1, 3] = 4
    save_file(weights, tmp_path / "hash" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="model.token_table must hold experts from 0 to 3"):
        open_hf(tmp_path / "hash")
    export(model_of(config_of("context")), tmp_path / "hf")
    file = tmp_path / "hf" / "vqmoe_training.safetensors"
    learning = load_file(file)
    for name, tensor in (("bank.ema_count_LK", torch.zeros(2, 2)), ("bank.code_map_LK", torch.full((4, 9), 99))):
        save_file({**learning, name: tensor}, file)
        with pytest.raises(CheckpointError, match=f"{name} is not of this model"):
            open_hf(tmp_path / "hf").buffers()


def test_weights_without_codes_are_refused(tmp_path: Path) -> None:
    export(model_of(config_of("context")), tmp_path / "hf")
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    del weights["model.codebook.codes"]
    save_file(weights, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="model.codebook.codes is missing"):
        open_hf(tmp_path / "hf")


# ------------------------------------------------------------ the card


def test_the_card_tells_routing_and_only_figures_that_exist(tmp_path: Path) -> None:
    model = model_of(config_of("context, discrete only", vocab=257))
    export(model, tmp_path / "hf", tokenizer="auto")
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "the nearest of 9 learned vectors" in card and "window 4, decay 0.7" in card
    assert "The expert of the code is the only one" in card and "None were found" in card
    run = tmp_path / "run"
    (run / "checkpoints" / "global_step0000007").mkdir(parents=True)
    counts = {"stored": 12345, "active": 678}
    summary = {"steps": 7, "validation_bits_per_byte": 1.9403, "tokens": 999, "parameters": counts}
    (run / "summary.json").write_text(json.dumps(summary))
    for step, figures in ((7, "1.9403 bits/byte"), (6, "None were found")):
        reader = ModelReader(model, run / "checkpoints" / "global_step0000007", step)
        export_hf(reader, tmp_path / f"hf{step}", ExportOptions())
        card = (tmp_path / f"hf{step}" / "README.md").read_text()
        assert figures in card and ("12,345 stored" in card) == (step == 7)


def test_the_commands_of_the_card_run(tmp_path: Path) -> None:
    export(model_of(config_of("layer state", vocab=257, length=80)), tmp_path / "hf", tokenizer="auto")
    card = (tmp_path / "hf" / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0].replace("THIS_FOLDER", str(tmp_path / "hf"))
    exec(compile(code, "card", "exec"), {})
