"""Stock exports in llama.cpp: its tokenizer and its converter's GGUF give the trainer's ids and logits.

``LLAMA_CPP=DIR`` names a checkout of llama.cpp, or ``vendor/llama.cpp`` in the sources of ``llama-cpp-python``, whose
installed package runs the models. Without them a copy of llama.cpp's tokenizer stands for it.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from tests.huggingface import ROPE, ModelReader, config_of, model_of, tokens_of
from vqmoe_ds.checkpoint.formats.huggingface.folder import ExportOptions, export_hf
from vqmoe_ds.checkpoint.formats.huggingface.tokenizer import PROBES, _probes
from vqmoe_ds.config.schema import RunConfig
from vqmoe_ds.data.tokenizer_base import SPACE_MARK, Tokenizer
from vqmoe_ds.data.tokenizer_training import train_pieces
from vqmoe_ds.data.tokenizers import SentencePieceTokenizer, load_tokenizer, sentencepiece_proto
from vqmoe_ds.models.transformer import MoETransformer

LENGTH = 24
SHAPES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mixtral": ("mixtral", "top-2", {}),
    "mixtral, grouped queries": ("mixtral", "top-2", {"heads": 4, "kv_heads": 2, "head_width": 8}),
    "mixtral, llama3 positions": ("mixtral", "top-2", ROPE | {"rope_scaling": "llama3", "head_width": 16}),
    "mixtral, yarn positions": ("mixtral", "top-2", ROPE | {"rope_scaling": "yarn", "head_width": 16}),
    "mixtral, linear positions": ("mixtral", "top-2", {"rope_scaling": "linear", "rope_factor": 2.0}),
    "llama": ("llama", "dense", {"rope_theta": 777.0}),
    "llama, one key-value head": ("llama", "dense", {"heads": 4, "kv_heads": 1, "head_width": 8, "dense_hidden": 40}),
}


def _texts(tokenizer: Tokenizer) -> list[str]:
    """Texts that tell tokenizers apart, without the symbol that llama.cpp takes for a space."""
    pieces = [piece.decode(errors="ignore") for piece in tokenizer.pieces()]
    return [text.replace(SPACE_MARK, "") for text in _probes(pieces)]


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    text = (Path(__file__).parents[2] / "README.md").read_text("utf-8")
    folder = tmp_path_factory.mktemp("bpe") / "bpe.tokenizer"
    train_pieces(text.splitlines(keepends=True), "bpe", 512).save(folder)
    return folder


def _exported(folder: Path, shape: str, tokenizer: str) -> tuple[MoETransformer, list[str]]:
    arch, case, changes = SHAPES[shape]
    vocabulary = {"none": 61, "bytes": 257}.get(tokenizer) or load_tokenizer(tokenizer).vocab_size
    config = config_of(case, vocabulary, LENGTH).model_dump()
    config["model"].update(changes)
    model = model_of(RunConfig(**config))
    return model, export_hf(ModelReader(model), folder, ExportOptions(arch=arch, tokenizer=tokenizer))


def _merged(text: str, pieces: dict[str, tuple[int, float]]) -> list[int]:
    """llama.cpp's ``llm_tokenizer_spm_session``: the leftmost pair of the best score first, bytes for the rest."""
    symbols = list(text.replace(" ", SPACE_MARK))
    while True:
        joined = enumerate(a + b for a, b in pairwise(symbols))
        pairs = [(-pieces[text][1], i) for i, text in joined if text in pieces]
        if not pairs:
            break
        _, i = min(pairs)
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
    known = [[symbol] if symbol in pieces else [f"<0x{b:02X}>" for b in symbol.encode()] for symbol in symbols]
    return [pieces[name][0] for names in known for name in names]


def _sentencepiece(bpe: Path, folder: Path, end: str = "</s>", **changes: bool) -> str:
    """The same pieces under other rules, and without an end of a document where ``end`` is none of them."""
    proto = sentencepiece_proto((bpe / "spm.model").read_bytes())
    proto.trainer_spec.eos_piece = end
    for name, value in changes.items():
        setattr(proto.normalizer_spec, name, value)
    (folder / "changed.model").write_bytes(proto.SerializeToString())
    return str(folder / "changed.model")


KINDS: dict[str, Callable[[Path, Path], str]] = {
    "bytes": lambda bpe, folder: "bytes",
    "bpe": lambda bpe, folder: str(bpe),
    "bpe after a space": lambda bpe, folder: _sentencepiece(bpe, folder, add_dummy_prefix=True),
    "bpe without an end": lambda bpe, folder: _sentencepiece(bpe, folder, end="<none>"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_tokenizer_model_gives_the_ids_of_training(kind: str, bpe: Path, tmp_path: Path) -> None:
    name = KINDS[kind](bpe, tmp_path)
    _, remarks = _exported(tmp_path / "hf", "mixtral", name)
    assert remarks == []
    proto, ours = sentencepiece_proto((tmp_path / "hf/tokenizer.model").read_bytes()), load_tokenizer(name)
    pieces = {piece.piece: (i, piece.score) for i, piece in enumerate(proto.pieces)}
    assert SentencePieceTokenizer(proto.SerializeToString()).decode(ours.encode(PROBES[0])) == PROBES[0]
    after_space = kind == "bpe after a space"
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in _texts(ours):
        want = ours.encode(text).tolist()
        assert _merged(" " * (after_space and text != "") + text, pieces) == want, text
        assert theirs(text, add_special_tokens=True)["input_ids"] == want, text
    said = json.loads((tmp_path / "hf/tokenizer_config.json").read_text())
    assert said["add_bos_token"] is False and said["add_prefix_space"] is after_space
    assert proto.pieces[ours.eod].piece == said["eos_token"]


def _hugging_face(bpe: Path, tmp_path: Path) -> str:
    _exported(tmp_path / "first", "llama", str(bpe))
    return str(tmp_path / "first/tokenizer.json")


def _unigram(bpe: Path, tmp_path: Path) -> str:
    train_pieces(["a text of few words, and of fewer letters"] * 9, "unigram", 275).save(tmp_path / "u.tokenizer")
    return str(tmp_path / "u.tokenizer")


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (_unigram, "this one is unigram"),
        (_hugging_face, "loses the merges of a BPE with byte fallback"),
        (lambda bpe, folder: _sentencepiece(bpe, folder, remove_extra_whitespaces=True), "keeps spaces that"),
    ],
)
def test_tokenizers_that_llama_cpp_would_get_wrong_are_named(make: Any, reason: str, bpe: Path, tmp_path: Path) -> None:
    _, remarks = _exported(tmp_path / "hf", "mixtral", make(bpe, tmp_path))
    assert len(remarks) == 1 and "make no GGUF of it" in remarks[0] and reason in remarks[0]
    assert not (tmp_path / "hf/tokenizer.model").exists()
    assert f"| llama.cpp (GGUF) | no | {remarks[0].split(': ')[1]} |" in (tmp_path / "hf/README.md").read_text("utf-8")


def test_the_card_says_which_programs_take_the_model(tmp_path: Path) -> None:
    rows = {}
    for case in ("top-2", "dense", "context"):
        export_hf(ModelReader(model_of(config_of(case))), tmp_path / case, ExportOptions(tokenizer="none"))
        card = (tmp_path / case / "README.md").read_text("utf-8")
        rows[case] = next(line for line in card.splitlines() if line.startswith("| llama.cpp"))
    assert "| no |" in rows["top-2"] and "--arch mixtral" in rows["top-2"]
    assert "| no |" in rows["dense"] and "--arch llama" in rows["dense"]
    assert "| no | no model there is equal to it |" in rows["context"]
    _exported(tmp_path / "stock", "llama", "bytes")
    assert "| llama.cpp (GGUF) | yes | `python convert" in (tmp_path / "stock/README.md").read_text("utf-8")


# ------------------------------------------------------------ with llama.cpp


@pytest.fixture(scope="module")
def converter() -> Path:
    folder = os.environ.get("LLAMA_CPP")
    if folder is None:
        pytest.skip("LLAMA_CPP names no folder with llama.cpp's convert_hf_to_gguf.py")
    return Path(folder) / "convert_hf_to_gguf.py"


def _converted(converter: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(converter), str(folder), "--outfile", f"{folder}.gguf", "--outtype", "f32"]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=200, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )


def _opened(path: Path) -> Any:
    llama = pytest.importorskip("llama_cpp")
    kind = {"type_k": 0, "type_v": 0}  # keys and values in float32 too
    sizes = {"n_ctx": LENGTH, "n_batch": LENGTH, "n_ubatch": LENGTH, "n_threads": 1}
    return llama.Llama(str(path), logits_all=True, verbose=False, **kind, **sizes)


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_those_of_the_trainer(shape: str, converter: Path, tmp_path: Path) -> None:
    model, _ = _exported(tmp_path / "hf", shape, "bytes")
    done = _converted(converter, tmp_path / "hf")
    assert done.returncode == 0, done.stderr
    theirs, ids_S = _opened(tmp_path / "hf.gguf"), tokens_of(1, LENGTH, 257)[0]
    theirs.eval(ids_S.tolist())
    got_SV = torch.tensor(theirs.scores[:LENGTH])
    with torch.no_grad():
        want_SV = model(ids_S[None])[0][0]
    assert (got_SV - want_SV).abs().max() < 1e-4 * want_SV.abs().max()
    theirs.close()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_text_is_cut_as_in_training(kind: str, converter: Path, bpe: Path, tmp_path: Path) -> None:
    name = KINDS[kind](bpe, tmp_path)
    _exported(tmp_path / "hf", "mixtral", name)
    done = _converted(converter, tmp_path / "hf")
    assert done.returncode == 0, done.stderr
    theirs, ours = _opened(tmp_path / "hf.gguf"), load_tokenizer(name)
    texts = random.Random(0).sample(_texts(ours), 300)
    for text in texts:
        ids = theirs.tokenize(text.encode())  # with what it would put before a text
        assert ids == ours.encode(text).tolist(), text
        said = theirs.detokenize(ids)
        assert said == text.encode() or (kind == "bpe after a space" and said == b" " + text.encode())
    assert theirs.token_eos() == ours.eod
    theirs.close()


@pytest.mark.slow
def test_the_converter_refuses_a_unigram_tokenizer(converter: Path, bpe: Path, tmp_path: Path) -> None:
    _exported(tmp_path / "hf", "mixtral", _unigram(bpe, tmp_path))
    done = _converted(converter, tmp_path / "hf")
    assert done.returncode != 0 and not (tmp_path / "hf.gguf").exists()
