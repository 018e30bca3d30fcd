"""The real lm-evaluation-harness on tasks of a few lines; skipped where it is not installed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("lm_eval", reason="the lm-evaluation-harness is not installed: pip install '.[eval]'")

from lm_eval.api.instance import Instance

from tests.fake_gpu import fake_gpus
from tests.huggingface import LENGTH, ModelReader, config_of, model_of
from vqmoe_ds.checkpoint.formats.portable import write_portable
from vqmoe_ds.evaluation import harness
from vqmoe_ds.evaluation.harness import HarnessModel
from vqmoe_ds.runtime.errors import CheckpointError, ConfigError
from vqmoe_ds.runtime.files import new_folder

DOCUMENTS = [
    {"text": "The old captain.\nHe knew each of them well enough.", "q": "He knew", "a": " each", "b": " zq"},
    {"text": "Many ships came.", "q": "", "a": "Many", "b": "zzzz"},
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: {kind}
test_split: test
doc_to_text: "{text}"
doc_to_target: {target}
metric_list: [{{metric: {metric}}}]
{more}
"""
KINDS = {
    "rolling": ("loglikelihood_rolling", "", "'{{text}}'", "bits_per_byte", ""),
    "choice": ("multiple_choice", "{{q}}", "0", "acc", "doc_to_choice: ['{{a}}', '{{b}}']"),
    "generated": (
        *("generate_until", "x{{q}}", "'{{a}}'", "exact_match"),
        "generation_kwargs: {until: ['\\n'], max_gen_toks: 6, do_sample: false}",
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("harness")
    (path / "documents.jsonl").write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    for name, (kind, text, target, metric, more) in KINDS.items():
        values = {"name": f"tiny_{name}", "file": path / "documents.jsonl", "kind": kind, "text": text}
        (path / f"{name}.yaml").write_text(TASK.format(**values, target=target, metric=metric, more=more))
    with new_folder(path / "model", False) as portable:
        write_portable(ModelReader(model_of(config_of("context", vocab=257))), portable)
    return path


@pytest.fixture(scope="module")
def model(folder) -> HarnessModel:
    return HarnessModel(checkpoint=str(folder / "model"))


def _request(kind: str, *arguments) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def _logprob(model: HarnessModel, before: list[int], token: int) -> float:
    logits_V = model.loaded.model(torch.tensor([before[-LENGTH:]]))[0][0, -1].double()
    return float(logits_V.log_softmax(0)[token])


def test_a_continuation_is_scored_after_its_context(model):
    cases = [("ab", "cd"), ("", "xyz"), ("a long context, past the window", " it")]
    answers = model.loglikelihood([_request("loglikelihood", *case) for case in cases], disable_tqdm=True)
    for (context, continuation), (answer, greedy) in zip(cases, answers, strict=True):
        before, expected, first = list(context.encode()) or [ord("\n")], 0.0, True
        for token in continuation.encode():
            # One window for the whole continuation: it begins where the last token's context begins.
            begin = max(0, len(before) - LENGTH) if len(context) + len(continuation) <= LENGTH + 1 else None
            if begin is not None:
                expected += _logprob(model, before, token)
                first = first and token == int(model.loaded.model(torch.tensor([before]))[0][0, -1].argmax())
            before.append(token)
        if len(context) + len(continuation) <= LENGTH + 1:
            assert answer == pytest.approx(expected, abs=1e-4) and greedy == first
        else:
            whole = list((context + continuation).encode())[-LENGTH - 1 :]
            logits = model.loaded.model(torch.tensor([whole[:-1]]))[0][0].double().log_softmax(-1)
            tail = range(len(whole) - len(continuation), len(whole))
            assert answer == pytest.approx(sum(float(logits[i - 1, whole[i]]) for i in tail), abs=1e-4)


def test_a_continuation_longer_than_the_context_is_scored_whole(model):
    text = "0123456789" * 5
    (long, _), (whole, _) = model.loglikelihood(
        [_request("loglikelihood", "a", text), _request("loglikelihood", "a", text[:LENGTH])], disable_tqdm=True
    )
    assert long < whole < 0
    assert sum(w.end + 1 - w.first for w in model._windows(1, 51)) == 50


def test_a_rolling_score_has_every_token_once(model):
    text = "The old captain of the harbour."
    (answer,) = model.loglikelihood_rolling([_request("loglikelihood_rolling", text)], disable_tqdm=True)
    ids, expected = [ord("\n"), *text.encode()], 0.0
    for place in range(1, len(ids)):
        end = min(-(-place // LENGTH) * LENGTH, len(ids) - 1)
        expected += _logprob(model, ids[max(0, end - LENGTH) : place], ids[place])
    assert answer == pytest.approx(expected, abs=1e-3)


def test_generation_is_greedy_and_stops_where_it_is_told(model):
    whole, cut, none, nearly_greedy = model.generate_until(
        [
            _request("generate_until", "He", {"until": [], "max_gen_toks": 20, "do_sample": False}),
            _request("generate_until", "He", {"until": "\x00never", "max_gen_toks": 5}),
            _request("generate_until", "He", {"until": [], "max_gen_toks": 0}),
            _request("generate_until", "He", {"until": [], "max_gen_toks": 5, "temperature": 1e-42}),
        ],
        disable_tqdm=True,
    )
    ids, expected = list(b"He"), []
    for _ in range(20):
        expected.append(int(model.loaded.model(torch.tensor([ids[-LENGTH:]]))[0][0, -1].argmax()))
        ids.append(expected[-1])
    assert whole == model.loaded.decode(expected) and cut == model.loaded.decode(expected[:5]) and none == ""
    assert nearly_greedy == cut
    options = {"until": [whole[3]], "max_gen_toks": 20}
    assert model.generate_until([_request("generate_until", "He", options)], True) == [whole[: whole.find(whole[3])]]


def test_bad_arguments_are_one_sentence(folder):
    with pytest.raises(ConfigError, match="names no checkpoint; give checkpoint=PATH"):
        HarnessModel()
    with pytest.raises(CheckpointError, match="no such checkpoint folder"):
        HarnessModel(checkpoint=str(folder / "nothing"))


def test_memory_that_a_gpu_lacks_is_one_sentence(monkeypatch, capsys):
    import lm_eval.__main__

    def fail() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")

    monkeypatch.setattr(lm_eval.__main__, "cli_evaluate", fail)
    with fake_gpus(1):
        assert harness.main() == 2
    said = capsys.readouterr().err
    assert "cuda has too little memory (CUDA out of memory: Tried to allocate 2.00 GiB); lower --batch_size" in said


def test_the_command_runs_every_kind_of_task(folder):
    command = [sys.executable, "-m", "vqmoe_ds.evaluation.harness", "run", "--model", "vqmoe"]
    command += ["--model_args", f"checkpoint={folder / 'model'}", "--include_path", str(folder)]
    command += ["--tasks", ",".join(f"tiny_{name}" for name in KINDS), "--output_path", str(folder / "out")]
    place = {"HOME": str(folder), "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    root = Path(__file__).resolve().parents[2]
    run = subprocess.run(command, cwd=root, env={"PATH": "", **place}, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-3000:]
    (file,) = (folder / "out").rglob("results_*.json")
    results = json.loads(file.read_text())["results"]
    assert results["tiny_rolling"]["bits_per_byte,none"] > 0
    assert set(results) == {f"tiny_{name}" for name in KINDS}
