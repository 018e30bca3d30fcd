"""Documents, the bytes of their tokens, and what of them a damaged text can still be asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from tests.huggingface import config_of, model_of
from tests.prepared import write_sequences, write_texts
from vqmoe_ds.checkpoint.formats.huggingface.tokenizer import write_tokenizer
from vqmoe_ds.checkpoint.load_model import LoadedModel
from vqmoe_ds.config.schema import RunConfig
from vqmoe_ds.data.json_tokenizer import read_json_tokenizer
from vqmoe_ds.data.raw_text import open_raw_text
from vqmoe_ds.data.tokenizer_base import Tokenizer
from vqmoe_ds.data.tokenizers import ByteTokenizer, SentencePieceTokenizer, WordTokenizer
from vqmoe_ds.evaluation.corruption import KINDS, Corruption, Edit
from vqmoe_ds.evaluation.texts import Text, encode, open_texts, still_there
from vqmoe_ds.runtime.errors import CheckpointError, DataError

STORY = "the old captain of the harbour had never seen a ship like that , said Käfer .\n many ships came\n" * 8


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("tokenizers")
    (folder / "text").write_text(STORY * 4)
    found: dict[str, Tokenizer] = {"bytes": ByteTokenizer(), "word": WordTokenizer(sorted(set(STORY.split()))[5:])}
    exact = {"add_dummy_prefix": False, "remove_extra_whitespaces": False, "normalization_rule_name": "identity"}
    options = {"exact": {**exact, "byte_fallback": True, "vocab_size": 320}, "normalising": {"vocab_size": 60}}
    for name, option in options.items():
        prefix = str(folder / name)
        training = {"input": str(folder / "text"), "minloglevel": 2, "hard_vocab_limit": False}
        sentencepiece.SentencePieceTrainer.train(model_prefix=prefix, **training, **option)
        found[name] = SentencePieceTokenizer(Path(f"{prefix}.model").read_bytes())
    (folder / "json").mkdir()
    write_tokenizer(folder / "json", found["exact"], found["exact"].vocab_size, 64, inexact=True)
    found["json"] = read_json_tokenizer(folder / "json")
    return found


@pytest.mark.parametrize("name", ["bytes", "word", "exact", "normalising", "json"])
def test_tokens_begin_where_their_text_does(tokenizers, name):
    tokenizer, raw = tokenizers[name], f"{STORY}  ½ zzz 🙂 ﬁne\n".encode()
    text = encode(tokenizer, raw, tokenizer.eod)
    assert text.ids_N.tolist() == [*tokenizer.encode(raw.decode()).tolist(), tokenizer.eod]
    assert (np.diff(text.starts_N) >= 0).all() and text.starts_N[0] == 0 and text.starts_N[-1] == len(raw)
    assert text.bytes_of_tokens().sum() == len(raw)
    pieces, ends = tokenizer.pieces(), [*text.starts_N[1:], len(raw)]
    placed = zip(text.ids_N, text.starts_N, ends, strict=True)
    met = [raw[a:b].strip() == pieces[i].strip() for i, a, b in placed if i != tokenizer.unknown_id]
    assert len(met) > 50 and np.mean(met) >= (0.95 if name == "normalising" else 1.0)
    assert text.words() == len(STORY.split()) + 4 + STORY.count("\n") + 1
    cut = text.first(10)
    assert len(cut.ids_N) == 10 and cut.bytes_of_tokens().sum() == text.starts_N[10] and cut.end is None


@pytest.mark.parametrize("name", ["exact", "json"])
def test_a_cut_never_falls_into_a_character(tokenizers, name):
    text = encode(tokenizers[name], "the old 🙂🙂 harbour".encode())
    for tokens in range(len(text.ids_N) + 1):
        cut = text.first(tokens)
        assert tokens - 4 < len(cut.ids_N) <= tokens and np.array_equal(cut.damaged([]).ids_N, cut.ids_N)


@pytest.mark.parametrize("name", ["bytes", "word", "exact", "json"])
def test_all_but_the_end_of_a_document_is_its_whole_text(tokenizers, name):
    text = encode(tokenizers[name], "the old harbour 🙂".encode(), tokenizers[name].eod)
    cut = text.first(len(text.ids_N) - 1)
    assert np.array_equal(cut.ids_N, text.ids_N[:-1]) and cut.raw == text.raw


def test_json_and_sentencepiece_give_the_same_tokens(tokenizers):
    ours, theirs = (encode(tokenizers[name], STORY.encode()) for name in ("exact", "json"))
    assert np.array_equal(ours.ids_N, theirs.ids_N) and np.array_equal(ours.starts_N, theirs.starts_N)


@pytest.mark.parametrize("kind", KINDS)
def test_of_bytes_all_is_asked_for_but_what_follows_the_first_of_a_change(tokenizers, kind):
    clean = encode(tokenizers["bytes"], STORY.encode(), 256)
    edits = Corruption(kind, 0.2).damage(clean.raw, 0).edits
    damaged = clean.damaged(edits)
    expected, place, done = np.full(len(damaged.ids_N), -1), 0, 0
    for start, end, replacement in [*edits, Edit(len(clean.raw), len(clean.raw) + 1, b"x")]:
        for byte in range(done, start):
            expected[place] = byte
            place += 1
        if replacement:
            expected[place] = start
        place, done = place + len(replacement), end
    assert np.array_equal(still_there(clean, damaged, edits), expected)


@pytest.mark.parametrize("kind", ["word_swap", "word_swap_line", "char_noise"])
def test_of_whole_words_every_clean_token_is_asked_for(tokenizers, kind):
    clean = encode(tokenizers["word"], STORY.encode(), tokenizers["word"].eod)
    damage = Corruption(kind, 0.1).damage(clean.raw, 1)
    whole = [edit for edit in damage.edits if edit.replacement or kind != "char_noise"]
    damaged = clean.damaged(whole)
    if len(damaged.ids_N) == len(clean.ids_N):
        assert still_there(clean, damaged, whole).tolist() == list(range(len(clean.ids_N)))
    changed = clean.ids_N != damaged.ids_N
    assert changed.any() and (damaged.ids_N[changed] == tokenizers["word"].unknown_id).all()


@pytest.mark.parametrize("name", ["exact", "normalising", "json"])
@pytest.mark.parametrize("kind", KINDS)
def test_of_pieces_most_is_asked_for_and_only_what_stands_there(tokenizers, name, kind):
    clean = encode(tokenizers[name], STORY.encode())
    edits = Corruption(kind, 0.05).damage(clean.raw, 1).edits
    damaged = clean.damaged(edits)
    source = still_there(clean, damaged, edits)
    asked = source >= 0
    assert asked.mean() > 0.6 and (np.diff(source[asked]) > 0).all()
    changed = np.zeros(len(clean.raw) + 1, dtype=bool)
    for start, end, _ in edits:
        changed[start + 1 : end] = True
    assert not changed[clean.starts_N[source[asked]]].any(), "within a change only its first token"
    assert np.mean(clean.ids_N[source[asked]] == damaged.ids_N[asked]) > 0.7
    assert still_there(clean, clean, []).tolist() == list(range(len(clean.ids_N)))


# ---------------------------------------------------------------- where they come from


def _loaded(tokenizer: Tokenizer | None, kind: str = "portable", **data) -> LoadedModel:
    config = config_of("context", vocab=tokenizer.vocab_size if tokenizer else 50)
    config = RunConfig(**{**config.model_dump(mode="json"), "data": data})
    return LoadedModel(config, model_of(config), tokenizer, 7, Path("run"), kind)


def test_raw_text_that_is_named_is_scored_whole_and_the_runs_own_where_it_was_held_out(tmp_path):
    (tmp_path / "text").write_text(STORY * 10)
    loaded = _loaded(ByteTokenizer(), path=str(tmp_path / "text"), holdout_every=4)
    whole = open_texts(loaded, [str(tmp_path / "text")])
    assert [text.raw for text in whole] == [(STORY * 10).encode()]
    held_out = open_texts(loaded, None)
    assert [text.raw for text in held_out] == [t.raw for t in open_texts(loaded, [str(tmp_path / "text")], "valid")]
    windows = open_raw_text(loaded.config).valid
    trained = windows.read(np.arange(len(windows))).targets_BS.flatten()
    assert np.concatenate([text.ids_N[1:] for text in held_out]).tolist() == trained.tolist()
    assert sum(len(t.ids_N) for t in open_texts(loaded, [str(tmp_path / "text")], max_tokens=100)) == 100


@pytest.mark.parametrize("kind", ["bytes", "word", "prepared"])
def test_no_more_is_read_than_is_asked_for(tmp_path, tokenizers, monkeypatch, kind):
    for number in range(4):
        (tmp_path / f"{number}.txt").write_text(STORY * 10)
    tokenizer = tokenizers["word" if kind == "word" else "bytes"]
    data = write_texts(tmp_path / "corpus", [STORY] * 40) if kind == "prepared" else str(tmp_path)
    loaded, read = _loaded(tokenizer), []
    whole = open_texts(loaded, [data], "all")
    first = whole[0].first(50)
    monkeypatch.setattr(Text, "first", lambda text, tokens, first=Text.first: read.append(text) or first(text, tokens))
    monkeypatch.setattr("vqmoe_ds.runtime.memory.free_bytes", lambda: 24 * 2 * len(STORY * 10))
    (found,) = open_texts(loaded, [data], "all", 50)
    assert len(read) == 1 and np.array_equal(found.ids_N, first.ids_N) and found.raw == first.raw
    with pytest.raises(DataError, match=r"of the data needs .* left; read less \(--max_tokens\)"):
        open_texts(loaded, [data], "all")


def test_held_out_stretches_are_cut_at_the_ends_of_files_where_documents_are_kept_apart(tmp_path):
    for number in range(40):
        (tmp_path / f"{number:02}.txt").write_text(chr(ord("a") + number % 26) * (number % 7 + 20))
    joined, apart = (
        [text.raw for text in open_texts(_loaded(ByteTokenizer(), path=str(tmp_path), separate_documents=on), None)]
        for on in (False, True)
    )
    assert b"".join(apart) == b"".join(joined) and len(apart) > len(joined)
    assert all(len(set(raw)) == 1 for raw in apart) and not all(len(set(raw)) == 1 for raw in joined)


def test_prepared_sequences_are_documents_of_the_held_out_share(tmp_path):
    texts = [f"story {i} " * (i % 5 + 3) for i in range(40)]
    prefix = write_texts(tmp_path / "corpus", texts)
    loaded = _loaded(ByteTokenizer(), split="75,25,0")
    found = [text.raw.decode() for text in open_texts(loaded, [prefix])]
    assert len(found) == 10 and set(found) < set(texts)
    everything = open_texts(loaded, [prefix], "all")
    assert [text.raw.decode() for text in everything] == texts
    assert all(text.ids_N[-1] == 256 == text.end and text.bytes_of_tokens()[-1] == 0 for text in everything)
    raw_bytes = _loaded(None)
    raw_bytes = LoadedModel(
        config_of("context", vocab=256), raw_bytes.model, ByteTokenizer(), 7, Path("run"), "portable"
    )
    assert open_texts(raw_bytes, [prefix], "all")[0].ids_N.max() < 256, "a model of raw bytes has no end of a document"


def test_bad_data_is_refused_in_one_sentence(tmp_path, tokenizers):
    words = tokenizers["word"]
    words.save(tmp_path / "words")
    loaded, wordy = _loaded(ByteTokenizer()), _loaded(words, tokenizer_sha256=words.checksum)
    corpus = write_texts(tmp_path / "corpus", ["some text " * 9] * 9)
    nameless = write_sequences(tmp_path / "nameless", [range(300)] * 9)
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "one").write_bytes(b"x")
    (tmp_path / "latin").write_bytes("Käfer".encode("latin-1"))
    cases = [
        (loaded, ["missing"], DataError, "data path missing does not exist"),
        (loaded, [str(tmp_path / "empty")], DataError, "holds no bytes"),
        (loaded, [str(tmp_path / "one")], DataError, "no document of two or more tokens"),
        (loaded, [nameless], DataError, "has the id 299, past the vocabulary of 257"),
        (wordy, [corpus], DataError, "corpus was made by the tokenizer .*, the model of run was trained with"),
        # As of a Hugging Face folder, whose configuration notes no checksum
        (_loaded(words), [corpus], DataError, "corpus was made by the tokenizer .*, the model of run was trained with"),
        (wordy, [str(tmp_path / "latin")], DataError, "not UTF-8 .byte 1."),
        (_loaded(None), [str(tmp_path / "one")], CheckpointError, "name it with --tokenizer"),
        (_loaded(ByteTokenizer(), "hf"), None, DataError, "does not say what it was trained on"),
        (wordy, None, DataError, "does not say what it was trained on"),
    ]
    for model, paths, error, sentence in cases:
        with pytest.raises(error, match=sentence):
            open_texts(model, paths, "all" if paths else "auto")
