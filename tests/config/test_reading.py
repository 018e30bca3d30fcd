"""Any bytes become plain values, or one sentence, in little time."""

import json
import os
import time

import pytest

from vqmoe_ds.config.load import load_config, parse_override, to_yaml
from vqmoe_ds.config.reading import DEEPEST, LARGEST, parse_yaml, read_json, read_yaml
from vqmoe_ds.runtime.errors import LONGEST, ConfigError, UserError, one_line, reason_of, shown

LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a: 1\na: 2", "the key 'a' stands twice"),
        ("a: {<<: {b: 1}, <<: {b: 2}}", "the key '<<' stands twice"),
        ("&a [*a]", "stands within what it names"),
        (LAUGHS, "grows past"),
        ("[" * (DEEPEST + 1), "nested deeper"),
        ("[" * 500_000, "nested deeper"),
        ("a: 1e999", "a is inf, which is no finite number"),
        ("a: [.nan]", "a.0 is nan"),
        (f"a: {10**20}", "more than 64 bits hold"),
        ("a: " + "9" * 10_000, "a number of 10,000 digits"),
        ('a: "\\0"', "characters in it that no name or path can have"),
        ("a: \x00", "control characters are not allowed"),
        ("!!int x", "marked with (!!)"),
        ("!!binary x", "could not determine a constructor"),
        ("!!python/object/apply:os.system [id]", "could not determine a constructor"),
        ("*b", "undefined alias"),
        ("{a: 1}: 2", "unhashable key"),
    ],
    ids=lambda text: text[:20],
)
def test_bad_yaml_is_one_sentence_at_once(text, sentence):
    started = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, "it")
    assert sentence in str(caught.value)
    assert str(caught.value).isprintable()
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1:30", "1:30"),
        ("2001-99-99", "2001-99-99"),
        ("0x_", "0x_"),
        ("010", 10),
        ("1_000", 1000),
        ("3e-4", 3e-4),
        ("-.5", -0.5),
        ("'1e3'", "1e3"),
        ("true", True),
        ("", None),
        ("a: &a {x: 1}\nb: {<<: *a, y: 2}", {"a": {"x": 1}, "b": {"x": 1, "y": 2}}),
    ],
)
def test_numbers_are_those_of_yaml_1_2_and_dates_are_text(text, value):
    read = parse_yaml(text, "it")
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize("name", ["1e3", "010", "1:30", "2001-01-01", "null", "yes", "0x10", "1_0", ".5", "é", "a: b"])
def test_text_that_looks_like_a_number_stays_text_in_what_is_written(name, tmp_path):
    config = load_config("tiny", None, {"run.run_dir": name}).config
    path = tmp_path / "c.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert load_config("tiny", str(path)).config == config


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"\xff\xfe{}", "is not UTF-8 text: byte 0"),
        (b'{"a": NaN}', "NaN is no number in JSON"),
        (b'{"a": -Infinity}', "-Infinity is no number in JSON"),
        (b'{"a": 1e999}', "a is inf"),
        (b'{"a": 1, "a": 2}', "the key 'a' stands twice"),
        (b'{"a": ' + b"9" * 5000 + b"}", "a number of 5,000 digits"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[" * 40 + b"]" * 40, f"nested deeper than {DEEPEST}"),
        (b'{"a": "\\ud800"}', "characters in it"),
        (b"", "not valid JSON"),
        (b" " * (LARGEST + 1), "bytes that such a file may have"),
    ],
    ids=lambda content: repr(content[:12]),
)
def test_bad_json_is_one_sentence(tmp_path, content, sentence):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_json(str(path), "it")
    assert sentence in str(caught.value)


def test_a_byte_order_mark_is_passed_over(tmp_path):
    (tmp_path / "x.json").write_bytes(b"\xef\xbb\xbf" + json.dumps({"a": 1}).encode())
    assert read_json(str(tmp_path / "x.json"), "it") == {"a": 1}


def test_what_is_no_file_is_never_waited_for(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    for path in (tmp_path / "fifo", tmp_path / "dangling", tmp_path, "/dev/zero", "a\0b"):
        for read in (read_json, read_yaml):
            with pytest.raises(ConfigError, match="cannot be read"):
                read(str(path), "it")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("model.layers=1000000000", "less than or equal to 1024"),
        ("train.seed=4294967296", "less than or equal to 4294967295"),
        ("model.layers=true", "model.layers=True: input should be a number"),
        ("train.grad_clip=yes", "input should be a number"),
        ("model.layers=null", "model.layers=None"),
        ("model.layers=[]", "model.layers=[]"),
        ("run.start_timeout=1e12", "less than or equal to 604800"),
        ("train.steps=1000000000000", None),
        ("moe.num_experts=16385", "less than or equal to 16384"),
        ("codebook.context_window=16777216", "less than or equal to 4096"),
        ("train.dtype=bf16", "did you mean train.precision?"),
        ("train.micro_batch_size=4", "train_micro_batch_size_per_gpu of the DeepSpeed JSON"),
        ("train.lr=1", "did you mean train.learning_rate?"),
        ("lr=1", "did you mean train.learning_rate?"),
        ("model.hidden_size=1", "did you mean model.width?"),
        ("x" * 100_000 + ".y=1", "no such field"),
        ("model.layers=" + "9" * 5000, "5,000 digits"),
    ],
    ids=lambda text: (text or "")[:30],
)
def test_a_value_of_set_out_of_bounds_or_unknown(text, sentence):
    if sentence is None:
        load_config("tiny", None, dict([parse_override(text)]))
        return
    with pytest.raises(ConfigError) as caught:
        load_config("tiny", None, dict([parse_override(text)]))
    assert sentence in str(caught.value)
    assert len(str(caught.value)) < 2 * LONGEST


def test_products_have_bounds_too():
    with pytest.raises(ConfigError, match="counters of 64 bits"):
        load_config("tiny", None, {"train.steps": 10**12, "train.batch_size": 2**30})
    with pytest.raises(ConfigError, match="131,072 are the most"):
        load_config("tiny", None, {"model.layers": 1000, "moe.num_experts": 1000})
    with pytest.raises(ConfigError, match="1,048,576 features"):
        load_config("tiny", None, {"model.heads": 2000, "model.head_width": 2000})


def test_a_sentence_is_short_and_safe_to_print():
    assert len(str(UserError("x" * 10**7))) < 2 * LONGEST
    assert str(UserError("a\x1b[2J\n\ud800é")) == "a\\x1b[2J\\n\\ud800é"
    assert one_line("ab" * 100, 10) == "ababa [...] babab"
    assert reason_of(ValueError("a\nb")) == "a" and reason_of(ValueError()) == "ValueError"
    loop: list = []
    loop.append(loop)
    for value in (10**5000, "x" * 10**6, [["x" * 10**6] * 10**4] * 9, {"a": {"b": {"c": {}}}}, loop):
        assert len(shown(value)) < 1000
    assert shown(3) == "3"
    assert shown("a") == "'a'"


@pytest.mark.parametrize(
    ("encoding", "told"),
    [
        ("ascii", "the encoding of this locale (ascii) does not have; set LC_ALL=C.UTF-8"),
        ("utf-8", "is no UTF-8; rename what is called so"),
    ],
)
def test_words_that_python_could_not_decode_are_refused_for_that_reason(monkeypatch, encoding, told):
    monkeypatch.setattr("sys.getfilesystemencoding", lambda: encoding)
    with pytest.raises(ConfigError) as caught:
        load_config("tiny", None, {"data.path": "caf\udcc3\udca9.txt"})
    assert str(caught.value).startswith("configuration: data.path is 'caf\\udcc3\\udca9.txt', which ")
    assert told in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        parse_override("data.path=caf\udcc3\udca9.txt")
    assert str(caught.value).startswith("--set data.path=caf\\udcc3\\udca9.txt holds text which ")
    assert told in str(caught.value)
