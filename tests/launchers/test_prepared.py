"""The launcher on prepared corpora: blended, killed on two ranks, resumed on one, and refused where it must be."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from tests import warm
from tests.data.test_tokenizers import train_json_tokenizer
from tests.launchers.test_pretrain import LAUNCHER, ROOT, SMALL, _free_port, _wait_for, environment, losses, run
from tests.prepared import write_sequences, write_texts
from vqmoe_ds.data.prepare import build_parser as prepare_parser
from vqmoe_ds.data.prepare import main as prepare_main
from vqmoe_ds.upcycle.command import build_parser as upcycle_parser
from vqmoe_ds.upcycle.command import main as upcycle_main


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("prepared")
    stories = [f"{i} little words make {i * i % 97} long stories, each of them a document. " for i in range(600)]
    write_texts(path / "stories", stories)
    write_texts(path / "numbers", [" ".join(map(str, range(i, i + 30))) for i in range(200)])
    write_sequences(path / "nameless", [range(200)] * 20)
    (path / "text.txt").write_text("".join(stories))
    (path / "small.yaml").write_text(SMALL)
    optimizer = {"type": "AdamW", "params": {"lr": "auto", "torch_adam": True}}
    values = {"optimizer": optimizer, "zero_optimization": {"stage": 0}, "train_micro_batch_size_per_gpu": 2}
    (path / "ds.json").write_text(json.dumps(values))
    return path


@pytest.fixture(scope="module")
def arguments(folder) -> list[str]:
    data = [f"0.7:{folder / 'stories'}", f"0.3:{folder / 'numbers'}"]
    return ["--ds_config", str(folder / "ds.json"), "--config", str(folder / "small.yaml"), "--data", *data]


@pytest.fixture(scope="module")
def finished(arguments, folder) -> tuple[Path, str]:
    """One run on one rank that nothing disturbed."""
    run_dir = folder / "finished"
    result = run([*arguments, "--run_dir", str(run_dir)])
    assert result.returncode == 0, result.stderr
    return run_dir, result.stdout


def test_the_vocabulary_the_checksum_and_the_bytes_are_those_of_the_tokenizer(finished, folder):
    run_dir, output = finished
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    checksum = json.loads((folder / "stories.json").read_text())["tokenizer"]["checksum"]
    assert config["model"]["vocab_size"] == 257
    assert config["data"]["tokenizer_sha256"] == checksum
    manifest = json.loads((run_dir / "checkpoints/global_step0000012/manifest.json").read_text())
    assert manifest["config"]["data"]["tokenizer_sha256"] == checksum
    assert "stories (70%)" in output and "numbers (30%)" in output and "bytes tokenizer" in output
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert all(0 <= row["data_share"] < 1 for row in rows if "loss" in row)
    last = rows[-1]
    assert last["validation_bits_per_byte"] > last["validation_loss"] / 0.6932, "the ends of documents are no bytes"
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["validation_bits_per_byte"] == last["validation_bits_per_byte"]
    assert summary["sample"].startswith("The ")
    assert list((run_dir / "data_index").iterdir())


def test_killed_on_two_ranks_it_goes_on_on_one_with_the_losses_of_a_run_never_stopped(arguments, finished, folder):
    run_dir = folder / "killed"
    command = [*LAUNCHER, *arguments, "--run_dir", str(run_dir)]
    ranks = warm.start_ranks(2, command, _free_port(), environment(), stdout=subprocess.DEVNULL)
    _wait_for(lambda: (run_dir / "checkpoints/global_step0000004/manifest.json").exists(), ranks[0])
    for rank in ranks:
        rank.kill()
    for rank in ranks:
        rank.wait()
    result = run([*arguments, "--run_dir", str(run_dir)])
    assert result.returncode == 0, result.stderr
    assert "resumed from" in result.stdout
    expected = losses(finished[0])
    assert losses(run_dir) == pytest.approx(expected, abs=1e-5) and len(expected) == 12


def test_documents_kept_apart_are_trained_on_resumed_and_scored(arguments, finished, folder):
    run_dir, apart = folder / "apart", ["--set", "data.separate_documents=true", "--set", "run.keep_last=0"]
    command = [*arguments, *apart, "--run_dir", str(run_dir)]
    result = run(command)
    assert result.returncode == 0, result.stderr
    expected, packed = losses(run_dir), losses(finished[0])
    assert expected.keys() == packed.keys() and all(abs(expected[step] - packed[step]) > 1e-5 for step in packed)
    validated = json.loads((run_dir / "summary.json").read_text())["validation_loss"]
    assert validated != json.loads((finished[0] / "summary.json").read_text())["validation_loss"]
    other, tag = folder / "apart again", run_dir / "checkpoints/global_step0000004"
    command = [*arguments, *apart, "--run_dir", str(other), "--resume", str(tag)]
    result = run(command)
    assert result.returncode == 0 and f"resumed from {tag}" in result.stdout, result.stderr
    # As if it had been killed after step 8, and the same command given again
    shutil.rmtree(other / "checkpoints/global_step0000012")
    result = run(command)
    assert f"resumed from {other}/checkpoints/global_step0000008" in result.stdout, result.stderr
    assert losses(other) == {step: loss for step, loss in expected.items() if step > 4}
    assert json.loads((other / "summary.json").read_text())["validation_loss"] == validated


def test_a_checkpoint_is_not_resumed_on_data_of_another_tokenizer(arguments, finished, folder):
    plain = [*arguments[:4], "--run_dir", str(finished[0]), "--train_steps", "14"]
    result = run([*plain, "--data", str(folder / "text.txt")])
    assert result.returncode == 2
    assert "was trained on ids of the tokenizer" in result.stderr
    assert "this run's data is made of raw bytes" in result.stderr


@pytest.mark.parametrize(
    ("data", "more", "sentence"),
    [
        (["0.5:stories", "text.txt"], [], "text.txt is raw text"),
        (["0:stories", "1:numbers"], [], "weights of a blend are positive numbers"),
        (["nameless"], [], "is unknown (there is no .json beside it): name it with data.tokenizer"),
        (["stories"], ["--set", "model.vocab_size=256"], "model.vocab_size=256 is too small for the 257 ids"),
        (["stories"], ["--set", "data.tokenizer_sha256=abc"], "data.tokenizer_sha256=abc is not that of the data"),
        (["stories"], ["--set", "data.split=100,0,0"], "leaves no window of 33 tokens to validate on"),
    ],
)
def test_data_that_cannot_work_is_answered_at_once_with_one_sentence(arguments, folder, tmp_path, data, more, sentence):
    started = time.monotonic()
    weights = [text.rpartition(":") for text in data]
    paths = [f"{weight}{colon}{folder / name}" for weight, colon, name in weights]
    words = [*arguments[:4], "--data", *paths, "--run_dir", str(tmp_path / "run"), *more]
    result = run(words, timeout=60, cold=data == ["nameless"])
    assert result.returncode == 2, result.stderr
    assert sentence in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()
    assert time.monotonic() - started < 15, "no heavy import before the check"


def test_a_source_and_a_tokenizer_are_enough(folder, tmp_path):
    """Text of a set of the hub, prepared as the run starts: killed on two ranks, resumed on one, moved and scored."""
    (tmp_path / "set").mkdir()
    rows = [{"story": f"{i} little words make {i * i % 97} long stories. " * 3} for i in range(400)]
    (tmp_path / "set/train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    train_json = tmp_path / "tokenizer"
    train_json.mkdir()
    (train_json / "tokenizer.json").write_text(train_json_tokenizer())
    run_dir = tmp_path / "run"
    source = ["--data", f"hf:{tmp_path / 'set'}", "--tokenizer", str(train_json), "--set", "data.text_key=story"]
    arguments = ["--ds_config", str(folder / "ds.json"), "--config", str(folder / "small.yaml"), *source]
    arguments += ["--set", "data.max_tokens=9000", "--run_dir", str(run_dir)]
    ranks = warm.start_ranks(2, [*LAUNCHER, *arguments], _free_port(), environment(), stdout=subprocess.DEVNULL)
    _wait_for(lambda: (run_dir / "checkpoints/global_step0000004/manifest.json").exists(), ranks[0])
    for rank in ranks:
        rank.kill()
    for rank in ranks:
        rank.wait()
    assert not list((run_dir / "data_index").glob("*.lock"))
    result = run(arguments)
    assert result.returncode == 0, result.stderr
    assert "resumed from" in result.stdout and "preparing" not in result.stdout
    assert len(losses(run_dir)) == 12
    corpus = yaml.safe_load((run_dir / "config.yaml").read_text())["data"]
    assert Path(corpus["path"]).parent == run_dir / "data_index" and corpus["tokenizer"] is None
    described = json.loads(Path(f"{corpus['path']}.json").read_text())
    assert 8900 < described["tokens"] <= 9000 and described["sources"] == [f"hub:{tmp_path / 'set'}"]
    shutil.move(run_dir, tmp_path / "moved")
    scored = run([str(tmp_path / "moved")], [sys.executable, str(ROOT / "launchers/evaluate.py")])
    assert scored.returncode == 0 and "clean" in scored.stdout, scored.stderr


def test_an_upcycled_model_trains_on_text_of_its_own_tokenizer(folder):
    source, start = folder / "llama", folder / "start"
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    dense = LlamaConfig(vocab_size=512, max_position_embeddings=32, rms_norm_eps=1e-6, eos_token_id=500, **shape)
    LlamaForCausalLM(dense).save_pretrained(source)
    (source / "tokenizer.json").write_text(train_json_tokenizer())
    assert upcycle_main(upcycle_parser("").parse_args([str(source), str(start), "--set", "moe.num_experts=4"])) == 0
    (folder / "lines.txt").write_text((folder / "text.txt").read_text().replace(". ", ".\n"))
    prepared = ["--tokenizer", str(source), "--document", "line", "--output", str(folder / "own")]
    assert prepare_main(prepare_parser("").parse_args([str(folder / "lines.txt"), *prepared])) == 0
    command = ["--ds_config", str(folder / "ds.json"), "--config", str(start / "config.yaml"), "--resume", str(start)]
    command += ["--train_steps", "4", "--set", "train.batch_size=4", "--set", "run.sample_tokens=0"]
    result = run([*command, "--data", str(folder / "own"), "--run_dir", str(folder / "upcycled")])
    assert result.returncode == 0, result.stderr
    assert "json tokenizer" in result.stdout and "resumed from" in result.stdout
    result = run([*command, "--data", str(folder / "stories"), "--run_dir", str(folder / "mistaken")])
    assert result.returncode == 2 and "ids of the tokenizer" in result.stderr and result.stderr.count("\n") == 1
