"""Text from a model: with and without a cache, past the context, and as its users start it."""

from __future__ import annotations

import io
import os
import pty
import re
import signal
import subprocess
import sys
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import warm
from tests.evaluation.routed_models import LENGTH, VOCAB, model_of
from tests.fake_gpu import fake_gpus
from tests.huggingface import ModelReader
from tests.models.test_cache import CAUSAL, MORE, build
from vqmoe_ds.checkpoint import load_model
from vqmoe_ds.checkpoint.formats.portable import write_portable
from vqmoe_ds.data.tokenizers import ByteTokenizer, WordTokenizer
from vqmoe_ds.evaluation.generate import Sampling, generate, pieces_of_text
from vqmoe_ds.evaluation.generate_command import _printable, build_parser, main
from vqmoe_ds.models.transformer import MoETransformer
from vqmoe_ds.runtime.errors import ConfigError
from vqmoe_ds.runtime.files import new_folder

TOOL = Path(__file__).resolve().parents[2] / "tools/generate.py"
PROMPT = [84, 104, 101, 32]


def _ids(model: MoETransformer, count: int, cached: bool = True, **sampling: Any) -> list[int]:
    cache = model.new_cache if cached else None
    return list(islice(generate(model, PROMPT, Sampling(**sampling), LENGTH, VOCAB, cache), count))


@pytest.mark.parametrize("case", [*CAUSAL, *MORE])
def test_a_cache_changes_no_token_up_to_and_past_the_context(case: str) -> None:
    model, count = build(case), LENGTH + 8  # the cache is filled anew twice
    assert _ids(model, count, temperature=0) == _ids(model, count, cached=False, temperature=0)


def test_a_seed_fixes_the_text_with_and_without_a_cache_and_another_changes_it() -> None:
    model = build("vq")
    text = _ids(model, 40, seed=5, top_p=0.9)
    assert text == _ids(model, 40, seed=5, top_p=0.9) == _ids(model, 40, seed=5, top_p=0.9, cached=False)
    assert text != _ids(model, 40, seed=6, top_p=0.9)


def test_past_the_context_the_model_goes_on_from_its_last_half() -> None:
    model, read = build("vq"), []

    def watched(tokens_BS: Tensor, cache: Any) -> tuple[Tensor, Tensor]:
        read.append((tokens_BS[0].tolist(), cache.length if cache else None))
        return model(tokens_BS, cache=cache)

    new = generate(watched, PROMPT, Sampling(), LENGTH, VOCAB, model.new_cache)
    ids = [*PROMPT, *islice(new, 2 * LENGTH)]
    assert [len(part) for part, _ in read] == [4, *[1] * 12, 8, *[1] * 8, 8, *[1] * 8, 8]
    assert [kept for _, kept in read[:14]] == [0, *range(4, LENGTH), 0]
    assert read[13][0] == ids[9:17]
    read.clear()
    long = list(range(LENGTH + 5))
    list(islice(generate(watched, long, Sampling(), LENGTH, VOCAB), 1))
    assert read == [(long[-8:], None)]


def test_top_p_draws_among_the_likeliest_and_a_low_temperature_takes_the_first() -> None:
    generator = torch.Generator().manual_seed(0)
    logits_V = torch.tensor([0.1, 0.4, 0.3, 0.2]).log()

    def drawn(**options: float) -> set[int]:
        return {Sampling(**options).draw(logits_V.clone(), generator) for _ in range(300)}

    assert drawn(temperature=1, top_p=0.69) == {1, 2}
    assert drawn(temperature=1, top_p=0.71) == {1, 2, 3}
    assert drawn(temperature=1, top_p=1e-6) == drawn(temperature=1e-30) == drawn(temperature=0) == {1}
    assert drawn(temperature=1, top_p=1e-300) == drawn(temperature=1e-320) == {1}, "which float32 has not"
    assert drawn(temperature=1) == {0, 1, 2, 3}


def test_a_character_is_written_when_it_is_whole() -> None:
    coder = ByteTokenizer()
    assert list(pieces_of_text(coder.encode("hé€").tolist(), coder)) == ["h", "", "é", "", "", "€"]
    assert "".join(pieces_of_text([0xE2, 0x82, 65, 0xFF, coder.eod, 66, 0xC3], coder)) == "\ufffdA\ufffdB"
    words = WordTokenizer(["a", "cat"])
    assert "".join(pieces_of_text(words.encode("a cat\na").tolist(), words)) == " a cat \n a"
    assert _printable("a\x1b[2J\té\n") == "a\ufffd[2J\té\n"


# ---------------------------------------------------------------- the command


def _save(folder: Path, model: MoETransformer, **data: Any) -> str:
    model.config = model.config.model_copy(update={"data": model.config.data.model_copy(update=data)})
    with new_folder(folder, False) as into:
        write_portable(ModelReader(model), into)
    return str(folder)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return _save(tmp_path_factory.mktemp("generate") / "model", model_of("vq"))


def _run(*arguments: str) -> int:
    return main(build_parser("").parse_args(list(arguments)))


def test_one_prompt(checkpoint, capsys, monkeypatch):
    told = [checkpoint, "--tokens", "40", "--seed", "4", "--top_p", "0.9"]
    assert _run(*told, "--prompt", "The ", "--timing") == 0
    found = capsys.readouterr()
    ids = _ids(model_of("vq"), 40, seed=4, top_p=0.9)
    ids = ids[: ids.index(256)] if 256 in ids else ids
    assert found.out == "The " + "".join(pieces_of_text(ids, ByteTokenizer())) + "\n"
    assert f"{len(ids)} tokens in" in found.err and "tokens/s" in found.err and len(found.err.splitlines()) == 1
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"The \n")))
    assert _run(*told, "--no_cache") == 0
    assert capsys.readouterr().out == found.out


def test_weights_may_be_bf16(checkpoint, capsys):
    assert _run(checkpoint, "--tokens", "30", "--temperature", "0", "--prompt", "The ", "--precision", "bf16") == 0
    model = model_of("vq")
    for param in model.parameters():
        param.data = param.data.bfloat16()
    ids = _ids(model, 30, temperature=0)
    ids = ids[: ids.index(256)] if 256 in ids else ids
    assert capsys.readouterr().out == "The " + "".join(pieces_of_text(ids, ByteTokenizer())) + "\n"


def test_an_end_of_document_ends_the_text(tmp_path, capsys):
    model = model_of("topk")
    model.head.weight.zero_()
    model.head.weight[ByteTokenizer.eod] = 100 * model.states(torch.tensor([PROMPT]))[0][0, -1]
    assert _run(_save(tmp_path / "model", model), "--prompt", "The ", "--temperature", "0") == 0
    assert capsys.readouterr().out == "The \n"


@pytest.mark.parametrize(
    "arguments, part",
    [
        (["--tokens", "0"], "--tokens 0 must lie between 1 and"),
        (["--temperature", "-1"], "--temperature -1 must be finite, 0"),
        (["--temperature", "nan"], "--temperature nan must be finite, 0"),
        (["--top_p", "0"], "--top_p 0 must lie above 0"),
        (["--seed", "-3"], "--seed -3 must lie between"),
        (["--prompt", ""], "the prompt '' encodes to no token"),
        (["--tokenizer", "nowhere"], "tokenizer nowhere does not exist"),
    ],
)
def test_bad_input_is_one_sentence(checkpoint, capsys, arguments, part):
    assert _run(checkpoint, "--prompt", "x", *arguments) == 2
    error = capsys.readouterr().err
    assert part in error and error.count("\n") == 1


def test_models_that_cannot_write_say_why(tmp_path, capsys):
    classes = model_of("vq").config.finetune.model_copy(update={"classes": ("no", "yes")})
    from vqmoe_ds.models.classifier import Classifier

    classifier = Classifier(model_of("vq").config.model_copy(update={"finetune": classes}))
    for name, model, data, part in (
        ("ahead", model_of("expert_choice"), {}, "generating text needs a router that sees no later token"),
        ("lost", model_of("vq", vocab=40), {"tokenizer_sha256": "0" * 64}, "name it with --tokenizer"),
        ("classes", classifier, {}, "needs a language model, and "),
    ):
        assert _run(_save(tmp_path / name, model, **data), "--prompt", "x") == 2
        error = capsys.readouterr().err
        assert part in error and error.count("\n") == 1, error


@pytest.mark.parametrize("failing", ["load_model", "generate"])
def test_generation_goes_to_the_gpu_and_memory_that_it_lacks_is_one_sentence(checkpoint, capsys, monkeypatch, failing):
    devices: list[Any] = []

    def fail(*args: Any, device: Any = None, **_: Any) -> None:
        devices.append(device)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")

    real = load_model.load_model
    if failing == "load_model":
        monkeypatch.setattr(load_model, "load_model", fail)
    else:
        monkeypatch.setattr("vqmoe_ds.evaluation.generate.generate", fail)
        monkeypatch.setattr(load_model, "load_model", lambda *a, device, **k: devices.append(device) or real(*a, **k))
    with fake_gpus(1) as events:
        assert _run(checkpoint, "--prompt", "abc") == 2
    assert events == ["bound to 0"] and devices[0] == torch.device("cuda", 0)
    said = capsys.readouterr().err
    assert "cuda:0 has too little memory (CUDA out of memory: Tried to allocate 2.00 GiB); try --precision bf16" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(("asked", "code"), [(None, 0), ("cuda", 2)])
def test_the_tool_finds_its_processor_and_says_only_what_matters(checkpoint, asked, code):
    place = {k: v for k, v in os.environ.items() if k != "DS_ACCELERATOR"} | (
        {"DS_ACCELERATOR": asked} if asked else {}
    )
    place["CUDA_VISIBLE_DEVICES"] = ""
    line = [sys.executable, str(TOOL), checkpoint, "--prompt", "abc", "--tokens", "3"]
    result = subprocess.run(line, capture_output=True, timeout=120, env=place)
    assert result.returncode == code
    assert b"accelerator" not in result.stdout
    if code:
        assert result.stderr.startswith(b"error: DS_ACCELERATOR=cuda asks for a GPU") and result.stdout == b""
    assert result.stderr.count(b"\n") == (1 if code else 0)


def _at_a_terminal(checkpoint: str) -> tuple[warm.Popen, int]:
    ours, theirs = pty.openpty()
    process = warm.Popen(
        [sys.executable, str(TOOL), checkpoint, "--tokens", "5"],
        **{"stdin": theirs, "stdout": theirs, "stderr": theirs, "start_new_session": True},
        # Tests that a shell started in the background ignore Ctrl-C, and so would their children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    os.close(theirs)
    return process, ours


def _to_the_prompt(terminal: int, typed: bytes = b"") -> bytes:
    os.write(terminal, typed)
    seen = b""
    while b"> " not in seen:
        seen += os.read(terminal, 1000)
    return seen


def test_a_terminal_is_asked_for_prompts_and_left_politely(checkpoint):
    """One process is left by Ctrl-D, the other, beside it, by Ctrl-C."""
    (first, one), (second, two) = _at_a_terminal(checkpoint), _at_a_terminal(checkpoint)
    _to_the_prompt(one)
    assert b"encodes to no token; give some text" in _to_the_prompt(one, b"\n")
    assert len(_to_the_prompt(one, b"Some words\n").partition(b"Some words")[2]) > 5
    os.write(one, b"\x04")
    assert first.wait(timeout=60) == 0
    _to_the_prompt(two)
    for _ in range(3):  # one that comes between the prompt and the read behind it waits for a key: Python's, not ours
        os.kill(second.pid, signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            second.wait(timeout=20)
            break
    assert second.returncode == 130
    assert b"Traceback" not in os.read(two, 10000)
    os.close(one)
    os.close(two)


def test_sampling_beyond_its_range_is_refused() -> None:
    for options in ({"temperature": float("inf")}, {"top_p": 1.5}, {"seed": 1 << 63}):
        with pytest.raises(ConfigError):
            Sampling(**options)


@pytest.mark.parametrize(
    "raw, sentence",
    [(b"caf\xe9", "not UTF-8 .byte 3."), (b"x" * ((16 << 20) + 1), "more than 16 MiB"), (b"", "encodes to no token")],
)
def test_any_bytes_for_a_prompt(raw: bytes, sentence: str, checkpoint, capsys, monkeypatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(raw)))
    assert _run(checkpoint, "--tokens", "2") == 2
    assert re.search(sentence, capsys.readouterr().err)


@pytest.mark.parametrize("tokens", [0, -1, 10**9 + 1, 10**30])
def test_numbers_of_tokens_have_bounds(tokens: int, checkpoint, capsys) -> None:
    assert _run(checkpoint, "--tokens", str(tokens), "--prompt", "x") == 2
    assert "must lie between 1 and 1,000,000,000" in capsys.readouterr().err
