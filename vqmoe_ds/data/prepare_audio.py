"""A folder of labelled clips as a folder of spectrogram images, which training reads (docs/audio.md).

Legend: T samples.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from vqmoe_ds.data.audio import RATE, SUFFIXES, Noise, fitted, read_clip, spectrogram, talkers
from vqmoe_ds.data.image_files import HELD_OUT_NAMES
from vqmoe_ds.runtime.errors import ConfigError, DataError, reports_errors
from vqmoe_ds.runtime.extras import library
from vqmoe_ds.runtime.files import list_tree, new_folder, write_json

POOL = 64
"""Clips of a split that babble is mixed of, at most."""
SPEAKER = "^([^_]+)_"
"""What names the speaker in the name of a file; that of Speech Commands (``0a7c2a8d_nohash_0.wav``)."""


@dataclass(frozen=True)
class Clip:
    """A file, and ``CLASS/FILE`` that its image is named after."""

    file: Path

    @property
    def label(self) -> str:
        return self.file.parent.name

    @property
    def name(self) -> str:
        return f"{self.label}/{self.file.name}"


def build_parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER", help="with CLASS/NAME.wav (.flac, .ogg), or train/ and test/ of it")
    parser.add_argument("--output", required=True, help="folder of the images, which must not exist yet")
    parser.add_argument("--size", type=int, default=32, help="mel bands and frames, as model.image_size (32)")
    parser.add_argument("--seconds", type=float, default=1.0, help="of a clip: its middle, or it amid silence (1)")
    parser.add_argument("--speaker", default=SPEAKER, help=f"regular expression whose group is the speaker ({SPEAKER})")
    parser.add_argument("--test_every", type=int, default=5, help="one speaker in so many is for the test (5)")
    parser.add_argument("--noise", type=float, metavar="SNR_DB", help="add noise with this ratio of signal to noise")
    parser.add_argument("--noise_kind", choices=["white", "babble"], default="white")
    return parser


@reports_errors
def main(options: argparse.Namespace) -> int:
    """Prepare a folder, or say what is wrong in one sentence; the exit code."""
    print(prepare(options))
    return 0


def prepare(options: argparse.Namespace) -> str:
    """Write the images; a line on what was written, and one with the options that train on it.

    Raises:
        ConfigError: options that make no sense, or an output folder that exists.
        DataError: no clips, one class, damaged clips, or no test split.
    """
    _check(options)
    splits = find_clips(Path(options.folder), options.speaker, options.test_every)
    classes = sorted({clip.label for clip in splits["train"]})
    output = Path(options.output)
    with new_folder(output, force=False, kind=DataError) as folder:
        for split, clips in splits.items():
            _write(folder / split, clips, options)
        told = {**vars(options), "classes": classes, "clips": {split: len(clips) for split, clips in splits.items()}}
        write_json(folder / "audio.json", told, indent=2)
    return (
        f"wrote {len(splits['train']):,} training and {len(splits['test']):,} test images of {len(classes)} classes, "
        f"{options.size} x {options.size}, to {output}\n"
        f"train with: --data {output} --set model.image_size={options.size} --set model.channels=1 "
        "--set data.augment=crop"
    )


def _check(options: argparse.Namespace) -> None:
    if not 8 <= options.size <= 256:
        raise ConfigError(f"--size {options.size} makes no image; give 8 to 256")
    if not options.size * 8 / RATE <= options.seconds <= 60:
        raise ConfigError(f"--seconds {options.seconds:g} is too short or too long for a clip; give up to 60")
    if options.test_every < 2:
        raise ConfigError(f"--test_every {options.test_every} leaves no speaker to train on; give 2 or more")
    if options.noise is not None and not -60 <= options.noise <= 100:
        raise ConfigError(f"--noise {options.noise:g} is no ratio in dB that can be heard; give -60 to 100")
    if options.noise is None and options.noise_kind != "white":
        raise ConfigError(f"--noise_kind {options.noise_kind} is of noise that is added; give its --noise, such as 10")
    try:
        if re.compile(options.speaker).groups != 1:
            raise ConfigError(f"--speaker {options.speaker} has not one group; put what names the speaker in brackets")
    except re.error as error:
        raise ConfigError(f"--speaker {options.speaker} is no regular expression: {error}") from None
    if not Path(options.output).name:
        raise ConfigError(f"--output {options.output!r} is no name of a folder; give one")
    if os.path.lexists(options.output):
        raise ConfigError(f"--output {options.output} exists; give another name, or delete it")


# ---------------------------------------------------------------- clips and their splits


def find_clips(folder: Path, speaker: str, test_every: int) -> dict[str, list[Clip]]:
    """Clips of the splits ``train`` and ``test``, which share no speaker unless the folder says so itself.

    Raises:
        DataError: it holds no clips, one class, names without a speaker, or a class in one split only.
    """
    if not os.path.isdir(folder):
        raise DataError(f"{folder} is no folder; give one with a folder of {', '.join(SUFFIXES)} files for each class")
    if (folder / "train").is_dir():
        test = next((folder / name for name in HELD_OUT_NAMES if (folder / name).is_dir()), None)
        if test is None:
            raise DataError(f"{folder} has train/ and no test/; add it, or give {folder / 'train'}")
        splits = {"train": _clips(folder / "train"), "test": _clips(test)}
    else:
        splits = _apart(folder, _clips(folder), speaker, test_every)
    labels = {split: {clip.label for clip in clips} for split, clips in splits.items()}
    one_sided = sorted(labels["train"] ^ labels["test"])
    if one_sided:
        raise DataError(
            f"{folder} has clips of {one_sided[0]!r} in one of training and test set only; "
            "add clips of more speakers, or look at --speaker and --test_every"
        )
    if len(labels["train"]) < 2:
        raise DataError(f"{folder} has clips of one class ({splits['train'][0].label}); add a folder of another")
    return splits


def _clips(folder: Path) -> list[Clip]:
    shown = (file for file in folder.glob("*/*") if "." not in (file.name[0], file.parent.name[0]))
    files = sorted(file for file in shown if file.suffix.lower() in SUFFIXES)
    if not files:
        raise DataError(f"{folder} holds no clips; give a folder with a folder of {', '.join(SUFFIXES)} for each class")
    others = (name for name in list_tree(folder)[0] if name.lower().endswith(SUFFIXES) and name.count(os.sep) != 1)
    if other := next(others, None):
        raise DataError(f"{folder / other} is not in the folder of a class; move it to {folder}/CLASS/FILE")
    return [Clip(file) for file in files]


def _apart(folder: Path, clips: Sequence[Clip], speaker: str, test_every: int) -> dict[str, list[Clip]]:
    """One speaker in ``test_every`` for the test, in the order of a hash of their names."""
    found = [re.search(speaker, clip.file.name) for clip in clips]
    unnamed = [clip.name for clip, match in zip(clips, found, strict=True) if match is None or match[1] is None]
    if unnamed:
        raise DataError(
            f"{folder} has {len(unnamed):,} clips whose name --speaker {speaker} does not fit, such as {unnamed[0]}; "
            "give an expression that finds the speaker, or make folders train/ and test/"
        )
    names = [match[1] for match in found if match]
    # Not hash(), which Python salts anew in every process.
    ranked = sorted(set(names), key=lambda name: hashlib.sha256(os.fsencode(name)).digest())
    held = set(ranked[::test_every])
    if len(ranked) < 2:
        raise DataError(f"{folder} has clips of one speaker ({ranked[0]}) by --speaker {speaker}; none is left to test")
    splits: dict[str, list[Clip]] = {"train": [], "test": []}
    for clip, name in zip(clips, names, strict=True):
        splits["test" if name in held else "train"].append(clip)
    return splits


# ---------------------------------------------------------------- images


def _write(folder: Path, clips: Sequence[Clip], options: argparse.Namespace) -> None:
    """``CLASS/FILE.png`` of each clip.

    Raises:
        DataError: clips that cannot be read: how many, the first three, and why.
    """
    pillow = library("PIL.Image", "writing spectrograms", DataError)
    length = round(options.seconds * RATE)
    noise = _noise(clips, length, options)
    bad: list[str] = []
    for label in sorted({clip.label for clip in clips}):
        (folder / label).mkdir(parents=True)
    for clip in tqdm(clips, desc=folder.name, unit="clip", disable=None, leave=False):
        try:
            clip_T, own = fitted(read_clip(clip.file), length)
        except ValueError as error:
            bad.append(f"{clip.file}: {error}")
            continue
        # Drawn by the name, not by a place in the list, which other clips would move.
        clip_T = noise.add(clip_T, own, clip.name) if noise else clip_T
        image = pillow.fromarray(np.ascontiguousarray(spectrogram(clip_T, options.size)))
        # The suffix of the clip stays: a.wav and a.flac of one class are two images.
        image.save(folder / f"{clip.name}.png")
    if bad:
        raise DataError(
            f"{len(bad):,} of {len(clips):,} clips cannot be read ({'; '.join(bad[:3])}); nothing was written: "
            "copy them again, or delete them"
        )


def _noise(clips: Sequence[Clip], length: int, options: argparse.Namespace) -> Noise | None:
    """The noise of a split; babble is of its own speakers, so that no test speaker is heard in training."""
    if options.noise is None or options.noise_kind == "white":
        return None if options.noise is None else Noise(options.noise)
    heard = []
    for clip in sorted(clips, key=lambda clip: hashlib.sha256(os.fsencode(clip.name)).digest())[:POOL]:
        try:
            heard.append(read_clip(clip.file))
        except ValueError:
            continue  # it is told of with the others
    voices = talkers(heard, length)
    if not voices:
        raise DataError(f"{options.folder} has no clip with a sound in it to make babble of; give --noise_kind white")
    return Noise(options.noise, voices)
