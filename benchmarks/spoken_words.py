"""Make a set of spoken words with espeak-ng, an honest synthetic set for docs/audio.md: 20 words by 40 voices.

    apt-get install espeak-ng
    python benchmarks/spoken_words.py data/spoken-words
    python tools/prepare_audio.py data/spoken-words --output data/words

Writes WORD/VOICE_ACCENT-SPEED-PITCH.wav. A voice is a variant of espeak-ng (its formants, breath and intonation); all
accents, speeds and pitches of a voice are one speaker for ``prepare_audio.py``.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COMMANDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")
WORDS = DIGITS + COMMANDS
"""Those of Speech Commands (Warden 2018): its ten digits and ten commands."""
VOICES = (
    *("f1", "f2", "f3", "f4", "f5", "m1", "m2", "m3", "m4", "m5", "m6", "m7", "m8"),
    *("adam", "Alex", "Alicia", "Andrea", "Andy", "anika", "Annie", "belinda", "benjamin", "boris", "caleb", "david"),
    *("ed", "Gene", "grandma", "grandpa", "iven", "john", "Lee", "linda", "Mario", "max", "Michael", "paul", "quincy"),
    *("steph", "victor"),
)
ACCENTS = ("en", "en-us", "en-gb-scotland")
"""British, American, Scottish; under the name ``en-gb`` espeak-ng 1.51 leaves the variant out."""
SPEEDS = (140, 190)
"""Words per minute."""
PITCHES = (35, 60)
"""Of 0 to 99."""


def speak(folder: Path, program: list[str], word: str, voice: str, accent: str, speed: int, pitch: int) -> None:
    """Write one clip."""
    file = folder / word / f"{voice}_{accent}-{speed}-{pitch}.wav"
    options = ["-v", f"{accent}+{voice}", "-s", str(speed), "-p", str(pitch), "-w", str(file)]
    subprocess.run([*program, *options, word], check=True, capture_output=True, text=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--program", nargs="+", default=["espeak-ng"], help="espeak-ng, and options before ours")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    if shutil.which(options.program[0]) is None:
        print(f"error: there is no program {options.program[0]}; apt-get install espeak-ng", file=sys.stderr)
        return 2
    for word in WORDS:
        (options.folder / word).mkdir(parents=True, exist_ok=True)
    clips = list(itertools.product(WORDS, VOICES, ACCENTS, SPEEDS, PITCHES))
    try:
        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(lambda clip: speak(options.folder, options.program, *clip), clips))
    except subprocess.CalledProcessError as error:
        print(f"error: espeak-ng does not speak {error.cmd[-1]!r}: {error.stderr.strip()}", file=sys.stderr)
        return 2
    different = {hashlib.sha256(file.read_bytes()).digest() for file in options.folder.glob("*/*.wav")}
    if len(different) < len(clips):  # espeak-ng takes the plain voice for one that it lacks, and says nothing
        print(f"error: only {len(different):,} of {len(clips):,} clips differ: a voice is missing", file=sys.stderr)
        return 2
    print(f"wrote {len(clips):,} clips of {len(WORDS)} words by {len(VOICES)} voices to {options.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
