"""Tokenizers of exported models: the same ids, or a refusal."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="transformers is not installed: pip install -r requirements-dev.txt")

from transformers import (
    AutoTokenizer,
)

import vqmoe_ds.models.hf  # noqa: F401 (registers the model)
from tests.huggingface import ModelReader, config_of, export, model_of
from vqmoe_ds.checkpoint.formats.huggingface.folder import ExportOptions, export_hf, open_hf
from vqmoe_ds.data.tokenizers import ByteTokenizer
from vqmoe_ds.runtime.errors import CheckpointError

TEXTS = [
    "plain text, 1 + 1 = 2\r\n\ttab",
    "Käfer, деревня, 日本語, العربية, 🙂👩‍🚀, e\u0301, \u0000\u0001\u007f\u00ff\u0100\ufffd\U0010ffff",
    "<|pad|> and <|endofdocument|> are only words here, as is ÿ",
    "  spaces   stay  ",
    "",
]


@pytest.mark.parametrize("vocab", [256, 257])
def test_bytes_go_round(vocab: int, tmp_path: Path) -> None:
    export(model_of(config_of("dense", vocab=vocab)), tmp_path / "hf", tokenizer="auto")
    tokenizer, ours = AutoTokenizer.from_pretrained(tmp_path / "hf"), ByteTokenizer()
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert ids == ours.encode(text).tolist()
        assert tokenizer.decode(ids) == text and tokenizer.decode(ids, skip_special_tokens=True) == text
    broken = [0xC3, 0x28, 65, 0xF0, 0x9F]
    assert tokenizer.decode(broken) == ours.decode(broken)
    assert tokenizer.eos_token_id == (256 if vocab == 257 else None) and tokenizer.pad_token_id == 255
    saved = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert saved.get("eos_token_id") == tokenizer.eos_token_id and saved["pad_token_id"] == 255
    padded = tokenizer(["ab", "c"], padding=True)
    assert padded["input_ids"] == [[97, 98], [255, 99]] and padded["attention_mask"] == [[1, 1], [0, 1]]


def _sentencepiece(folder: Path, brackets: bool = True, exact: bool = True, **options: Any) -> str:
    """Trained on this file; without ``brackets`` on one in which they do not occur; ``exact``: sums of scores are."""
    import sentencepiece

    from vqmoe_ds.data.tokenizer_training import with_exact_sums

    text = Path(__file__).read_text(encoding="utf-8") + "\n".join(TEXTS[:2]).replace("\u0000", "")
    text = text if brackets else text.replace("<", "").replace("x", "")
    (folder / "text.txt").write_text(text * 3, encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        **{"input": str(folder / "text.txt"), "model_prefix": str(folder / "spm"), "vocab_size": 500},
        **{"byte_fallback": True, "minloglevel": 2, **options},
    )
    model = folder / "spm.model"
    if exact and options["model_type"] == "unigram":
        model.write_bytes(with_exact_sums(model.read_bytes()))
    return str(model)


PLAIN = {"normalization_rule_name": "identity", "add_dummy_prefix": False, "remove_extra_whitespaces": False}


SPELLINGS: dict[str, dict[str, Any]] = {
    "plain": PLAIN,
    "as tools/train_tokenizer.py": {
        **PLAIN,
        "user_defined_symbols": ["\n", "\t"],
        "bos_id": -1,
        "unk_id": 0,
        "eos_id": 1,
    },
    "prefix": {"normalization_rule_name": "identity"},
    "no bytes": {**PLAIN, "byte_fallback": False},
    "prefix, no bytes": {"normalization_rule_name": "identity", "byte_fallback": False},
}
LITERALS = [
    "<unk> and </s> <s>, a<unk>b, </s></s>",
    "<0x41><0x0A> <0xE2><0x96><0x81>",
    "\u2581 \u2581a\u2581\u2581b \u2581",
    " \n \t\n  ",
    "☃☃ <☃>",
]


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("brackets", [True, False])
def test_sentencepiece_models_are_converted_exactly(kind: str, spelling: str, brackets: bool, tmp_path: Path) -> None:
    from vqmoe_ds.data.tokenizers import load_tokenizer

    if kind == "unigram" and not brackets and "no bytes" in spelling:
        pytest.skip("refused: see below")
    ours = load_tokenizer(_sentencepiece(tmp_path, brackets, model_type=kind, **SPELLINGS[spelling]))
    ours.save(tmp_path / "data.tokenizer")
    config = config_of("dense", vocab=ours.vocab_size)
    data = {"path": str(tmp_path / "data"), "tokenizer_sha256": ours.checksum}
    reader = ModelReader(model_of(config))
    reader.config["data"].update(data)
    assert export_hf(reader, tmp_path / "hf", ExportOptions()) == []
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    pieces = [piece.decode(errors="ignore") for piece in ours.pieces()]
    for text in [*TEXTS, *LITERALS, Path(__file__).read_text(encoding="utf-8"), "".join(pieces), " ".join(pieces)]:
        ids = tokenizer(text)["input_ids"]
        assert ids == ours.encode(text).tolist(), text[:40]
        if ours.unknown_id is None:
            assert tokenizer.decode(ids) == ours.decode(ids), text[:40]
    assert tokenizer.eos_token_id == ours.eod
    assert open_hf(tmp_path / "hf").config["data"]["tokenizer_sha256"] == ours.checksum
    assert str(tmp_path) not in (tmp_path / "hf" / "vqmoe_training.json").read_text(), "no paths of this machine"


UNEQUAL: dict[str, tuple[dict[str, Any], bool, str]] = {
    "sentencepiece's own": ({}, True, "its rule nmt_nfkc is applied to other parts"),
    "long symbols": ({**PLAIN, "user_defined_symbols": ["import"]}, True, "its piece 'import' holds a symbol"),
    "spaces after words": ({**PLAIN, "treat_whitespace_as_suffix": True}, True, "it writes spaces after words"),
    "brackets are unknown": ({**PLAIN, "byte_fallback": False}, False, "'<' of its piece '<unk>' is none by itself"),
}


@pytest.mark.parametrize("which", UNEQUAL)
def test_tokenizers_without_an_equal_are_refused(which: str, tmp_path: Path) -> None:
    from vqmoe_ds.data.tokenizers import load_tokenizer

    options, brackets, reason = UNEQUAL[which]
    path = _sentencepiece(tmp_path, brackets, model_type="unigram", **options)
    config = config_of("dense", vocab=load_tokenizer(path).vocab_size)
    with pytest.raises(CheckpointError, match=f"no exact equal in the tokenizers library .*{reason}.*--tokenizer none"):
        export(model_of(config), tmp_path / "hf", tokenizer=path)
    assert not (tmp_path / "hf").exists()


def test_a_unigram_model_whose_sums_are_rounded_is_taken_on_request_alone(tmp_path: Path) -> None:
    from vqmoe_ds.data.tokenizers import load_tokenizer

    path = _sentencepiece(tmp_path, exact=False, model_type="unigram", **PLAIN)
    model = model_of(config_of("dense", vocab=load_tokenizer(path).vocab_size))
    with pytest.raises(CheckpointError, match="scores whose sums are rounded.*--inexact_tokenizer.*--tokenizer none"):
        export(model, tmp_path / "hf", tokenizer=path)
    assert not (tmp_path / "hf").exists()
    export(model, tmp_path / "hf", tokenizer=path, inexact_tokenizer=True)
    assert (tmp_path / "hf" / "tokenizer.json").exists()


@pytest.mark.parametrize("damage", ["pieces of other scores", "control symbols in text"])
def test_a_conversion_that_went_wrong_is_found_at_export(damage: str, tmp_path: Path) -> None:
    import vqmoe_ds.checkpoint.formats.huggingface.tokenizer as module
    from vqmoe_ds.data.tokenizers import load_tokenizer

    def wrong(proto: Any, source: Any) -> tuple[list[float], str]:
        scores = [piece.score for piece in proto.pieces]  # as they are: pieces that are kept apart have the best
        if damage.startswith("pieces"):
            scores = module_scores(proto, source)[0]
            scores[100:] = reversed(scores[100:])
        return scores, ""

    module_scores = module._unigram_scores
    path = _sentencepiece(tmp_path, model_type="unigram", **PLAIN)
    config = config_of("dense", vocab=load_tokenizer(path).vocab_size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_unigram_scores", wrong)
        with pytest.raises(CheckpointError, match="it cuts .* otherwise"):
            export(model_of(config), tmp_path / "hf", tokenizer=path)


def test_cuts_that_score_alike_are_chosen_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """With scores as SentencePiece leaves them the rounding of sums decides, in float32 here and in float64 there."""
    from vqmoe_ds.checkpoint.formats.huggingface.tokenizer import _from_sentencepiece
    from vqmoe_ds.data import tokenizer_training

    sources = sorted((Path(__file__).parents[3] / "vqmoe_ds").rglob("*.py"))
    sample = "".join(source.read_text(encoding="utf-8") for source in sources)[:300_000]
    draw = random.Random(0)
    runs = ["".join(draw.choice("IX=-_a.(") * draw.randint(1, 9) for _ in range(30)) for _ in range(2000)]

    def unlike() -> int:
        ours = tokenizer_training.train_pieces([sample], "unigram", 2500)
        fast, _, _ = _from_sentencepiece(ours, inexact=True)
        fast.encode_special_tokens = True
        texts = [*runs, *(sample[start : start + 3000] for start in range(0, len(sample), 3000)), sample[:60_000]]
        return sum(ours.encode(text).tolist() != fast.encode(text).ids for text in texts)

    assert unlike() == 0
    monkeypatch.setattr(tokenizer_training, "with_exact_sums", lambda model: model)
    assert unlike() > 0


def test_a_tokenizer_json_adds_nothing_that_training_did_not_see(tmp_path: Path) -> None:
    from tokenizers import processors

    from vqmoe_ds.checkpoint.formats.huggingface.tokenizer import _byte_level
    from vqmoe_ds.data.tokenizers import load_tokenizer

    fast = _byte_level(True)
    fast.post_processor = processors.TemplateProcessing(
        single="<|endofdocument|> $A", special_tokens=[("<|endofdocument|>", 256)]
    )
    fast.save(str(tmp_path / "t.json"))
    export(model_of(config_of("dense", vocab=257)), tmp_path / "hf", tokenizer=str(tmp_path / "t.json"))
    tokenizer, ours = AutoTokenizer.from_pretrained(tmp_path / "hf"), load_tokenizer(tmp_path / "t.json")
    for text in TEXTS:
        assert tokenizer(text)["input_ids"] == ours.encode(text).tolist()


def test_an_end_of_document_that_would_have_another_id_is_refused(tmp_path: Path) -> None:
    from vqmoe_ds.checkpoint.formats.huggingface.tokenizer import _byte_level

    _byte_level(False).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text('{"eos_token_id": 299}')
    with pytest.raises(
        CheckpointError, match="end of a document has id 299, and would have 256 there.*--tokenizer none"
    ):
        export(model_of(config_of("dense", vocab=300)), tmp_path / "hf", tokenizer=str(tmp_path / "tokenizer.json"))
    assert not (tmp_path / "hf").exists()


def test_a_tokenizer_that_cannot_be_found_is_said(tmp_path: Path) -> None:
    reader = ModelReader(model_of(config_of("dense")))
    reader.config["data"]["tokenizer_sha256"] = "0" * 64
    remarks = export_hf(reader, tmp_path / "hf", ExportOptions())
    assert len(remarks) == 1 and "name it with --tokenizer" in remarks[0]
    with pytest.raises(CheckpointError, match="does not exist.*--tokenizer none"):
        export_hf(reader, tmp_path / "hf2", ExportOptions(tokenizer="missing.model"))
    with pytest.raises(CheckpointError, match="tokenizer bytes .257 ids. is not the one that this model"):
        export_hf(reader, tmp_path / "hf2", ExportOptions(tokenizer="bytes"))
    assert not (tmp_path / "hf2").exists()
