"""A folder of clips becomes images that training reads; speakers stay apart, and bad input is one clear sentence."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.io import wavfile

from vqmoe_ds.data.image_files import find_images
from vqmoe_ds.data.image_splits import Wanted
from vqmoe_ds.data.prepare_audio import build_parser, main

PITCHES = {"high": 2000, "low": 300}


def write_clip(file: Path, hertz: float, seed: int, rate: int = 8000) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    sound = np.sin(2 * np.pi * hertz * np.arange(rate // 2) / rate) + 0.01 * rng.standard_normal(rate // 2)
    wavfile.write(file, rate, (8000 * sound).astype(np.int16))


@pytest.fixture
def clips(tmp_path) -> Path:
    """``CLASS/SPEAKER_NUMBER.wav``: two classes, ten speakers, two clips each."""
    for name, hertz in PITCHES.items():
        for speaker in range(10):
            for number in range(2):
                write_clip(
                    tmp_path / f"clips/{name}/s{speaker}_{number}.wav", hertz + 10 * speaker, 10 * speaker + number
                )
    return tmp_path / "clips"


def run(*words: object) -> int:
    return main(build_parser("").parse_args([str(word) for word in words]))


def images(folder: Path, split: str = "test", size: int = 32) -> np.ndarray:
    found = getattr(find_images(str(folder)), split)
    return np.stack([found.pixels(i).fit(Wanted(size, 1, False))[0] for i in range(len(found.labels_N))]).astype(int)


def speakers(folder: Path) -> set[str]:
    return {file.name.partition("_")[0] for file in folder.glob("*/*.png")}


def test_images_are_what_training_reads_and_no_speaker_is_on_both_sides(clips, tmp_path, capsys):
    assert run(clips, "--output", tmp_path / "out", "--size", 16) == 0
    found = find_images(str(tmp_path / "out"))
    assert found.classes == ("high", "low")
    assert (len(found.train.labels_N), len(found.test.labels_N)) == (32, 8)
    assert images(tmp_path / "out", "train", 16).shape == (32, 16, 16, 1)
    train, test = speakers(tmp_path / "out/train"), speakers(tmp_path / "out/test")
    assert not train & test and len(train) == 8 and len(test) == 2
    rows = images(tmp_path / "out", size=16)[..., 8, 0].argmax(1)  # the loudest band in the middle of the clip
    assert rows[:4].max() < rows[4:].min(), "high tones are above low ones"
    assert json.loads((tmp_path / "out/audio.json").read_text())["clips"] == {"train": 32, "test": 8}
    assert "model.image_size=16" in capsys.readouterr().out


def test_folders_of_the_user_are_kept_as_they_are(clips, tmp_path):
    (tmp_path / "parted").mkdir()
    clips.rename(tmp_path / "parted/train")
    for name in PITCHES:
        write_clip(tmp_path / f"parted/validation/{name}/whoever.wav", PITCHES[name], 0)
    assert run(tmp_path / "parted", "--output", tmp_path / "out") == 0
    found = find_images(str(tmp_path / "out"))
    assert (len(found.train.labels_N), len(found.test.labels_N)) == (40, 2)


def test_hidden_files_and_folders_are_no_clips(clips, tmp_path):
    (clips / "low/._s0_0.wav").write_bytes(b"\0\5\x16\7")
    for speaker in range(3):
        write_clip(clips / f".trash/s{speaker}_0.wav", 700, speaker)
    assert run(clips, "--output", tmp_path / "out") == 0
    assert json.loads((tmp_path / "out/audio.json").read_text())["clips"] == {"train": 32, "test": 8}


@pytest.mark.parametrize("kind", ["white", "babble"])
def test_noise_leaves_names_and_splits_and_is_the_same_again(clips, tmp_path, kind):
    assert run(clips, "--output", tmp_path / "clean") == 0
    for name, ratio in (("noisy", 5), ("again", 5), ("quiet", 60)):
        assert run(clips, "--output", tmp_path / name, "--noise", ratio, "--noise_kind", kind) == 0
    names = [
        [str(file.relative_to(tmp_path / name)) for file in sorted((tmp_path / name).rglob("*.png"))]
        for name in ("clean", "noisy")
    ]
    assert names[0] == names[1]
    clean, noisy, quiet = (images(tmp_path / name) for name in ("clean", "noisy", "quiet"))
    assert np.array_equal(noisy, images(tmp_path / "again"))
    assert np.abs(noisy - clean).mean() > 3 * np.abs(quiet - clean).mean()


def test_an_expression_finds_the_speaker(clips, tmp_path):
    for file in sorted(clips.rglob("*.wav")):
        speaker, number = file.stem.split("_")
        file.rename(file.with_name(f"{number}-{speaker}.wav"))
    assert run(clips, "--output", tmp_path / "out", r"--speaker=-(s\d)", "--test_every", 2) == 0
    sides = [{file.name[2:4] for file in (tmp_path / "out" / split).glob("*/*.png")} for split in ("train", "test")]
    assert [len(side) for side in sides] == [5, 5] and not sides[0] & sides[1]


def spoil(clips: Path, how: str) -> None:
    """Make the folder what ``how`` names."""
    if how == "damaged":
        (clips / "low/s0_0.wav").write_bytes(b"RIFF")
        (clips / "high/s3_1.wav").write_bytes(b"")
    elif how == "no clips":
        for file in clips.rglob("*.wav"):
            file.rename(file.with_suffix(".mp3"))
    elif how in ("below a class", "beside the classes"):
        write_clip(clips / {"below a class": "low/sub", "beside the classes": ""}[how] / "s0_9.wav", 300, 0)
    elif how == "one class":
        for file in (clips / "low").iterdir():
            file.unlink()
    elif how == "new class":
        write_clip(clips / "other/s0_0.wav", 700, 0)
    elif how == "no speaker":
        (clips / "low/s0_0.wav").rename(clips / "low/unnamed.wav")
    elif how == "no test":
        for file in [*clips.iterdir()]:
            (clips / "train").mkdir(exist_ok=True)
            file.rename(clips / "train" / file.name)
    elif how == "silent":
        for file in clips.rglob("*.wav"):
            wavfile.write(file, 8000, np.zeros(4000, np.int16))


@pytest.mark.parametrize(
    ("how", "options", "sentence"),
    [
        ("damaged", [], "clips cannot be read ("),
        ("no clips", [], "holds no clips"),
        ("below a class", [], "clips/low/sub/s0_9.wav is not in the folder of a class; move it to"),
        ("beside the classes", [], "clips/s0_9.wav is not in the folder of a class; move it to"),
        ("one class", [], "clips of one class (high)"),
        ("new class", [], "'other' in one of training and test set only"),
        ("no speaker", [], "1 clips whose name --speaker ^([^_]+)_ does not fit, such as low/unnamed.wav"),
        ("no test", [], "train/ and no test/"),
        ("silent", ["--noise", 3, "--noise_kind", "babble"], "no clip with a sound"),
        ("", ["--speaker", "(s)"], "clips of one speaker (s)"),
        ("", ["--speaker", "s"], "not one group"),
        ("", ["--speaker", "(s"], "no regular expression"),
        ("", ["--size", 4], "--size 4 makes no image"),
        ("", ["--seconds", 0.001], "--seconds 0.001 is too short"),
        ("", ["--seconds", "nan"], "--seconds nan is too short"),
        ("", ["--test_every", 1], "--test_every 1 leaves no speaker"),
        ("", ["--noise", "nan"], "--noise nan is no ratio"),
        ("", ["--noise_kind", "babble"], "--noise_kind babble is of noise that is added; give its --noise"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(clips, tmp_path, capsys, how, options, sentence):
    spoil(clips, how)
    assert run(clips, "--output", tmp_path / "out", *options) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["clips"]


def test_missing_folders_and_existing_outputs_are_refused(clips, tmp_path, capsys):
    assert run(tmp_path / "none", "--output", tmp_path / "out") == 2
    assert "is no folder" in capsys.readouterr().err
    assert run("n" * 300, "--output", tmp_path / "out") == 2
    assert "is no folder" in capsys.readouterr().err
    assert run(clips, "--output", "") == 2
    assert "--output '' is no name of a folder; give one" in capsys.readouterr().err
    assert run(clips, "--output", tmp_path / ("n" * 250)) == 2
    assert "could not be written (File name too long)" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert run(clips, "--output", tmp_path / "file" / "out") == 2
    assert "out could not be written (Not a directory)" in capsys.readouterr().err
    (tmp_path / "out").mkdir()
    assert run(clips, "--output", tmp_path / "out") == 2
    assert "exists; give another name" in capsys.readouterr().err
