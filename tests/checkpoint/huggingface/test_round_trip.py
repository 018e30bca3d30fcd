"""Export to Hugging Face folders and back: exact weights, code that travels along, classifiers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed: pip install -r requirements-dev.txt")

from safetensors import safe_open
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    pipeline,
)

import vqmoe_ds.models.hf  # noqa: F401 (registers the model)
from tests.checkpoint.layouts import Layout, Training
from tests.distributed import run_ranks
from tests.huggingface import CASES, ModelReader, config_of, edit, export, load_back, model_of, tokens_of
from vqmoe_ds.checkpoint.convert import build_parser, main
from vqmoe_ds.checkpoint.formats.huggingface.folder import ExportOptions, export_hf, open_hf
from vqmoe_ds.checkpoint.formats.huggingface.names import CODE_FILES, NEWER
from vqmoe_ds.config.schema import RunConfig
from vqmoe_ds.models.classifier import Classifier
from vqmoe_ds.runtime.errors import CheckpointError

QK_NORMS: dict[str, dict[str, Any]] = {
    "none": {},
    "heads": {"model.qk_norm": "heads", "model.head_width": 12},
    "full": {"model.qk_norm": "full"},
}


@pytest.mark.parametrize("case", CASES)
def test_back_again_is_bit_exact(case: str, tmp_path: Path) -> None:
    model = model_of(config_of(case))
    export(model, tmp_path / "hf", max_shard="20KB")
    reader = open_hf(tmp_path / "hf")
    assert reader.names() == [name for name, _ in model.named_parameters()]
    assert reader.step == 7 and not reader.has_optimizer
    assert reader.config == model.config.model_dump(mode="json")
    back = load_back(reader).state_dict()
    assert list(back) == list(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, back[name]) and tensor.dtype == back[name].dtype, name
    export(load_back(reader), tmp_path / "again", max_shard="20KB")
    for file in sorted((tmp_path / "hf").iterdir()):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), file.name


def _logits(training: Training) -> torch.Tensor:
    training.session.engine.eval()
    with torch.no_grad():
        return training.session.engine(tokens_of(2, 16, 61))[0].clone()


def _trained(rank: int, world: int, folder: str) -> list[torch.Tensor]:
    """Train a model with each norm of queries and keys and save it; its logits."""
    answers = []
    for name, changes in QK_NORMS.items():
        training = Training(folder, Layout(2, 2, 2), rank, **changes)
        training.train(3)
        training.save(f"{folder}/{name}")
        answers.append(_logits(training))
        training.close()
    return answers


def _restored(rank: int, world: int, folder: str) -> list[torch.Tensor]:
    answers = []
    for name, changes in QK_NORMS.items():
        training = Training(folder, Layout(3, 1, 2), rank, **changes)
        training.restore(f"{folder}/{name}-back")
        answers.append(_logits(training))
        training.close()
    return answers


def test_deepspeed_to_hugging_face_to_deepspeed(tmp_path: Path) -> None:
    trained = run_ranks(2, _trained, str(tmp_path))[0]
    for (name, changes), logits in zip(QK_NORMS.items(), trained, strict=True):
        there, back = [tmp_path / name, tmp_path / f"{name}-hf"], [tmp_path / f"{name}-hf", tmp_path / f"{name}-back"]
        assert main(build_parser("").parse_args([*map(str, there), "--to", "hf", "--tokenizer", "none"])) == 0
        layout = ["--to", "deepspeed", "--zero", "3", "--ep", "1", "--world", "2"]
        assert main(build_parser("").parse_args([*map(str, back), *layout])) == 0
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / f"{name}-hf")
        assert theirs.config.qk_norm == name and theirs.config.head_dim == changes.get("model.head_width", 8)
        with torch.no_grad():
            assert (theirs(tokens_of(2, 16, 61)).logits - logits).abs().max() < 1e-5
    for logits, again in zip(trained, run_ranks(2, _restored, str(tmp_path))[0], strict=True):
        assert (again - logits).abs().max() < 1e-5


def test_shards_are_of_the_size_that_was_asked_for(tmp_path: Path) -> None:
    model = model_of(config_of("context"))
    export(model, tmp_path / "hf", max_shard="20KB")
    shards = sorted((tmp_path / "hf").glob("model-*.safetensors"))
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert len(shards) > 3 and set(index["weight_map"].values()) == {shard.name for shard in shards}
    for shard in shards:
        with safe_open(shard, "pt") as file:  # the library's own reader
            assert file.metadata() == {"format": "pt"}
            sizes = [file.get_tensor(name).nbytes for name in file.keys()]  # noqa: SIM118 (no iterator there)
        assert sum(sizes) <= 20_000 or len(sizes) == 1
    assert index["metadata"]["total_size"] == sum(t.nbytes for shard in shards for t in load_file(shard).values())
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    with torch.no_grad():
        assert (theirs(tokens_of()).logits - model(tokens_of())[0]).abs().max() < 1e-5


def test_memory_is_bounded_by_a_stretch_whatever_the_tensor(tmp_path: Path) -> None:
    model = model_of(config_of("context"))

    class Counting(ModelReader):
        largest = 0

        def read(self, name: str, kind: str, start: int, count: int) -> torch.Tensor:
            Counting.largest = max(Counting.largest, count)
            return super().read(name, kind, start, count)

        def tensor(self, name: str, kind: str = "fp32") -> torch.Tensor:
            raise AssertionError("whole tensors are not asked for")

    import vqmoe_ds.checkpoint.reader as module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK", 100)
        export_hf(Counting(model), tmp_path / "hf", ExportOptions(tokenizer="none"))
    assert Counting.largest == 100
    back = load_back(open_hf(tmp_path / "hf")).state_dict()
    assert all(torch.equal(tensor, back[name]) for name, tensor in model.state_dict().items())


def test_what_training_left_out_is_made_anew_with_codes_that_stay(tmp_path: Path) -> None:
    model = model_of(config_of("context, averaged table"))
    export(model, tmp_path / "hf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    theirs.save_pretrained(tmp_path / "saved")  # as after fine-tuning there
    assert not (tmp_path / "saved" / "vqmoe_training.json").exists()
    assert all((tmp_path / "saved" / name).exists() for name in CODE_FILES), "the code travels along"
    back = load_back(open_hf(tmp_path / "saved"))
    assert back.config.model == model.config.model.model_copy(update={"dense_hidden": 12})
    for name, tensor in model.state_dict().items():
        if not any(word in name for word in ("ema_", "updates", "born_at")):
            assert torch.equal(tensor, back.state_dict()[name]), name
    bank = back.bank
    assert bank is not None and bank.initialized and not bank.initialization_due and not bank.dead_codes().any()
    with torch.no_grad():
        assert torch.equal(back(tokens_of())[0], model(tokens_of())[0])
    before = bank.codes_LKC.clone()
    bank.update(torch.zeros(*bank.codes_LKC.shape[:2], bank.codes_LKC.shape[2] + 1, dtype=torch.float64))
    assert torch.allclose(bank.codes_LKC, before, atol=1e-6), "the running sums fit the codes"


def test_folders_of_earlier_versions_come_back_as_they_were(tmp_path: Path) -> None:
    model = model_of(config_of("context"))
    export(model, tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    options = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in options.items() if name not in NEWER}))
    assert open_hf(tmp_path / "hf").config == model.config.model_dump(mode="json")
    (tmp_path / "hf" / "vqmoe_training.json").unlink()
    back = load_back(open_hf(tmp_path / "hf"))
    assert back.config.model == model.config.model.model_copy(update={"dense_hidden": 24})
    assert back.config.router == model.config.router
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
        assert (theirs(tokens_of()).logits - model(tokens_of())[0]).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("case", "arch"),
    [("every second, wide dense", "vqmoe"), ("top-2, tied embeddings", "mixtral"), ("dense", "llama")],
)
def test_options_changed_there_count_here(case: str, arch: str, tmp_path: Path) -> None:
    model = model_of(config_of(case))
    export(model, tmp_path / "hf", arch=arch)
    AutoModelForCausalLM.from_pretrained(tmp_path / "hf").save_pretrained(tmp_path / "saved")
    back = load_back(open_hf(tmp_path / "saved"))
    with torch.no_grad():
        assert torch.equal(back(tokens_of())[0], model(tokens_of())[0])
    # What transformers writes otherwise is no change.
    edit(tmp_path / "hf" / "config.json", **json.loads((tmp_path / "saved" / "config.json").read_text()))
    assert open_hf(tmp_path / "hf").config == model.config.model_dump(mode="json")
    edit(tmp_path / "hf" / "config.json", rope_theta=123.0, rope_parameters={"rope_theta": 123.0})
    assert open_hf(tmp_path / "hf").config["model"]["rope_theta"] == 123.0


def test_bfloat16_rounds_weights_and_leaves_codes(tmp_path: Path) -> None:
    model = model_of(config_of("context"))
    export(model, tmp_path / "hf", dtype="bfloat16")
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    assert model.bank is not None
    assert torch.equal(weights["model.codebook.codes"], model.bank.codes_LKC)
    assert torch.equal(weights["lm_head.weight"], model.head.weight.bfloat16())
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "bfloat16"
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert theirs.dtype is torch.bfloat16 and theirs.model.codebook.codes.dtype is torch.float32
    back = open_hf(tmp_path / "hf").tensor("head.weight")
    assert back.dtype is torch.float32 and torch.equal(back, model.head.weight.bfloat16().float())


# ------------------------------------------------------------ without this package

STRANGER = """
import sys, torch
for name in ("vqmoe_ds", "deepspeed", "pydantic_settings"):
    sys.modules[name] = None  # as if it were not installed, also to those who only ask
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
folder = sys.argv[1]
AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True, num_labels=3)  # to fine-tune it
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)  # or it asks, and waits for an answer
batch = tokenizer(["The quick", "Käfer"], return_tensors="pt", padding=True)
new = model.generate(**batch, max_new_tokens=5, do_sample=False)
with torch.no_grad():
    torch.save({"logits": model(batch["input_ids"][:1]).logits, "ids": batch, "new": new}, sys.argv[2])
"""


def test_the_folder_alone_is_enough(tmp_path: Path) -> None:
    model = model_of(config_of("context", vocab=257, length=32))
    assert export(model, tmp_path / "hf", tokenizer="auto") == []
    run = subprocess.run(
        [sys.executable, "-c", STRANGER, str(tmp_path / "hf"), str(tmp_path / "out.pt")],
        cwd=tmp_path,
        env={"PATH": "", "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    out = torch.load(tmp_path / "out.pt", weights_only=False)
    ids = torch.tensor([list(b"The quick")])
    assert out["ids"]["input_ids"].tolist() == [list(b"The quick"), [255] * 3 + list("Käfer".encode())]
    with torch.no_grad():
        assert (out["logits"] - model(ids)[0]).abs().max() < 1e-5
        for _ in range(5):
            ids = torch.cat([ids, model(ids)[0][:, -1:].argmax(-1)], dim=1)
    assert out["new"][0].tolist() == ids[0].tolist()


# ------------------------------------------------------------ classifiers

CLASSES = ("bad", "good", "ünsure")


def _classifier(case: str, pool: str, vocab: int = 257) -> Classifier:
    base = config_of(case, vocab=vocab, length=32).model_dump()
    base["finetune"].update(classes=CLASSES, pool=pool)
    model = Classifier(RunConfig(**base)).eval()
    with torch.no_grad():
        model.head.weight.normal_()
    return model


@pytest.mark.parametrize("pool", ["mean", "last"])
@pytest.mark.parametrize("case", ["context, discrete only", "layer state", "top-2", "dense"])
def test_classifiers_run_in_a_pipeline_and_come_back(case: str, pool: str, tmp_path: Path) -> None:
    model, texts = _classifier(case, pool), ["a text", "Käfer, a longer one 🙂", "x", "far too long " * 9]
    assert export(model, tmp_path / "hf", tokenizer="auto") == []
    classify = pipeline("text-classification", str(tmp_path / "hf"), device="cpu")
    ids = [torch.tensor([list(text.encode())[:32]]) for text in texts]
    with torch.no_grad():
        want = torch.cat([model(row)[0] for row in ids]).softmax(dim=-1)
        for size in (1, 4):
            found = classify(texts, truncation=True, top_k=None, batch_size=size)
            got = torch.tensor([[{p["label"]: p["score"] for p in text}[name] for name in CLASSES] for text in found])
            assert (got - want).abs().max() < 1e-5
        theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf")
        padded = torch.nn.utils.rnn.pad_sequence([row[0] for row in ids], batch_first=True, padding_value=255)
        assert (theirs(padded).logits.softmax(dim=-1) - want).abs().max() < 1e-5, "padding by its id"
    labels = torch.tensor([0, 1, 2, 0])
    loss = torch.nn.functional.cross_entropy(theirs(padded).logits, labels)
    assert torch.allclose(theirs(padded, labels=labels).loss, loss)
    theirs.save_pretrained(tmp_path / "saved")
    for folder, config in (("hf", model.config), ("saved", None)):
        reader = open_hf(tmp_path / folder)
        back = Classifier(RunConfig(**reader.config)).eval()
        back.load_state_dict({name: reader.tensor(name) for name in reader.names()} | reader.buffers())
        assert tuple(back.config.finetune.classes) == CLASSES and back.config.finetune.pool == pool
        assert config is None or back.config == config
        with torch.no_grad():
            assert torch.equal(back(ids[1])[0], model(ids[1])[0])


def test_a_classifier_is_no_mixtral_and_its_card_is_of_a_classifier(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="it is a classifier, which pools its states otherwise"):
        export(_classifier("top-2", "last"), tmp_path / "hf", arch="mixtral")
    export(_classifier("top-2", "last"), tmp_path / "hf", tokenizer="auto")
    card = (tmp_path / "hf" / "README.md").read_text(encoding="utf-8")
    assert "pipeline_tag: text-classification" in card and "bad, good, ünsure" in card
    code = card.split("```python\n")[1].split("```")[0].replace("THIS_FOLDER", str(tmp_path / "hf"))
    exec(compile(code, "card", "exec"), {})
