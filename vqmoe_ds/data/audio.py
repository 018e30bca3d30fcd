"""Audio clips as log-mel spectrogram images: reading, resampling, noise at a given ratio, the mel filterbank.

Mel scale as in HTK: ``mel(f) = 2595 log10(1 + f / 700)`` (O'Shaughnessy 1987; Young et al., The HTK Book).

Legend: T samples, C channels of sound, M mel bands (and pixels of height), F frames (and pixels of width), B frequency
bins, W samples of a window.
"""

from __future__ import annotations

import hashlib
import io
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.io import wavfile
from scipy.signal import resample_poly

from vqmoe_ds.data.units import first_line
from vqmoe_ds.runtime.files import read_small

SUFFIXES = (".wav", ".flac", ".ogg")
RATE = 16_000
"""Samples per second of what is analysed."""
RATES = (4_000, 384_000)
"""Samples per second that a file may have."""
LOWEST = 20.0
"""Hz, where the first mel band begins; the last one ends at ``RATE / 2``."""
RANGE_DB = 50.0
"""Below the loudest pixel of a clip, where black begins: with 80 dB, noise that is hardly heard lights all pixels."""
LOUDEST = 1e6
"""Times full scale, that a sample may have."""
LARGEST = 256 << 20
"""Bytes of a file of one clip."""
TALKERS = 6
"""Clips that are mixed for babble."""


@dataclass(frozen=True)
class Noise:
    """Noise that is added to a clip; the same noise for a clip's name every time.

    Args:
        snr_db: power of the clip over that of the noise, in dB. The clip's is the mean over its own samples, without
            the silence around it, so that a short clip is as noisy as a long one.
        talkers: waveforms of one length that babble is mixed of; none for white noise.
    """

    snr_db: float
    talkers: tuple[np.ndarray, ...] = ()

    def add(self, clip_T: np.ndarray, own: int, name: str) -> np.ndarray:
        """The clip with noise: float64 ``[T]``; a silent clip stays silent.

        Args:
            own: samples of ``clip_T`` that are not padding.
            name: of the clip; the noise follows from it.
        """
        # Not hash(): Python salts the hash of a text, so that every process would draw another noise.
        rng = np.random.default_rng(list(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()))
        noise_T = self._babble(rng, len(clip_T)) if self.talkers else rng.standard_normal(len(clip_T))
        power = float(np.square(clip_T).sum()) / max(own, 1)
        scale = math.sqrt(power / 10 ** (self.snr_db / 10) / float(np.square(noise_T).mean()))
        return clip_T + scale * noise_T

    def _babble(self, rng: np.random.Generator, length: int) -> np.ndarray:
        """Talkers of equal power, each turned by a random number of samples so that they do not start together."""
        chosen = rng.choice(len(self.talkers), min(TALKERS, len(self.talkers)), replace=False)
        voices = [np.roll(self.talkers[i], int(rng.integers(length))) for i in chosen]
        return np.sum([voice_T / math.sqrt(float(np.square(voice_T).mean())) for voice_T in voices], axis=0)


def read_clip(file: Path) -> np.ndarray:
    """One clip: float64 ``[T]`` in -1 to 1 at ``RATE``, the mean of its channels.

    Raises:
        ValueError: it cannot be read, or has no samples; the message is the reason.
    """
    try:
        rate, sound = _decoded(file)
    except Exception as error:  # SciPy and libsndfile raise many kinds for damaged files
        raise ValueError(first_line(error)) from None
    if not RATES[0] <= rate <= RATES[1]:
        raise ValueError(f"it has {rate:,} samples a second, and {RATES[0]:,} to {RATES[1]:,} are read")
    if not sound.size:
        raise ValueError("it has no samples")
    clip_T = _floats(sound).reshape(len(sound), -1).mean(1)
    # Of much louder ones the power is beyond what float64 holds.
    if not (np.abs(clip_T) <= LOUDEST).all():
        raise ValueError("it has samples that are not finite, or far outside -1 to 1")
    common = math.gcd(rate, RATE)
    return clip_T if rate == RATE else resample_poly(clip_T, RATE // common, rate // common)


def _decoded(file: Path) -> tuple[int, np.ndarray]:
    """Samples per second, and ``[T]`` or ``[T, C]`` of the file's own type."""
    data = io.BytesIO(read_small(file, LARGEST))
    if file.suffix.lower() == ".wav":
        # Python asks the filter that was added last first: the other way round nothing would be an error.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", wavfile.WavFileWarning)  # chunks of other programs
            warnings.filterwarnings("error", "Reached EOF", wavfile.WavFileWarning)  # a file that is cut off
            try:
                return wavfile.read(data)
            except (ValueError, wavfile.WavFileWarning) as error:
                if "EOF" in str(error) or "buffer size" in str(error):
                    raise ValueError("it is cut off: its header promises more samples") from None
                raise
    try:
        import soundfile
    except ImportError:
        raise ValueError("only soundfile reads it, which is not installed (pip install soundfile)") from None
    sound, rate = soundfile.read(data)
    return rate, sound


def _floats(sound: np.ndarray) -> np.ndarray:
    """Samples as float64 in -1 to 1; bytes are stored with 128 as zero."""
    if sound.dtype == np.uint8:
        return (sound.astype(np.float64) - 128) / 128
    if sound.dtype.kind == "i":
        return sound / -float(np.iinfo(sound.dtype).min)
    return sound.astype(np.float64)


def fitted(clip_T: np.ndarray, length: int) -> tuple[np.ndarray, int]:
    """``[length]``: a longer clip's middle, or a shorter one amid zeros; and how many samples are its own."""
    over = len(clip_T) - length
    if over >= 0:
        return clip_T[over // 2 : over // 2 + length], length
    return np.pad(clip_T, (-over // 2, -over - -over // 2)), len(clip_T)


def mel(hertz: float) -> float:
    return 2595 * math.log10(1 + hertz / 700)


def mel_edges(bands: int) -> np.ndarray:
    """Hz, ``[M + 2]``: band m rises from edge m to m + 1 and falls to m + 2; evenly spaced in mel."""
    mels = np.linspace(mel(LOWEST), mel(RATE / 2), bands + 2)
    return 700 * (10 ** (mels / 2595) - 1)


def mel_filters(bands: int, bins_B: np.ndarray) -> np.ndarray:
    """Weights ``[M, B]`` of triangles with a peak of 1.

    Args:
        bins_B: Hz of each frequency bin.
    """
    edges_M1 = mel_edges(bands)[:, None]
    low_M1, peak_M1, high_M1 = edges_M1[:-2], edges_M1[1:-1], edges_M1[2:]
    rise_MB, fall_MB = (bins_B - low_M1) / (peak_M1 - low_M1), (high_M1 - bins_B) / (high_M1 - peak_M1)
    return np.maximum(0, np.minimum(rise_MB, fall_MB))


def mel_power(clip_T: np.ndarray, size: int) -> np.ndarray:
    """Power of ``size`` mel bands in ``size`` frames: ``[M, F]``, lowest band first.

    Frame f is centred at ``(f + 1/2) T / size`` and twice as long as their distance (Hann, half overlapping). Its
    spectrum is divided by the window's sum, so that a sine of amplitude A has the power A^2 / 4 at its frequency.
    """
    hop = len(clip_T) // size
    # Periodic, not symmetric as np.hanning gives it: windows that overlap by half then add up to 1.
    window_W = np.hanning(2 * hop + 1)[:-1]
    padded_T = np.pad(clip_T, (hop // 2, hop))  # the first and the last window reach over the ends
    frames_FW = np.lib.stride_tricks.sliding_window_view(padded_T, 2 * hop)[::hop][:size] * window_W
    points = 1 << (4 * hop - 1).bit_length()  # at least two bins in the narrowest band
    power_FB = np.square(np.abs(np.fft.rfft(frames_FW, points) / window_W.sum()))
    return mel_filters(size, np.fft.rfftfreq(points, 1 / RATE)) @ power_FB.T


def spectrogram(clip_T: np.ndarray, size: int) -> np.ndarray:
    """Log-mel spectrogram as an image: uint8 ``[size, size]``, the highest band on top, time from left to right.

    White is the loudest pixel, black ``RANGE_DB`` below it or less; silence is black.
    """
    power_MF = mel_power(clip_T, size)
    loudest = float(power_MF.max())
    if loudest < 1e-20:  # no recording is so quiet
        return np.zeros((size, size), np.uint8)
    below_MF = 10 * np.log10(np.maximum(power_MF / loudest, 1e-30))
    return np.rint(255 * np.maximum(0, 1 + below_MF / RANGE_DB)).astype(np.uint8)[::-1]


def talkers(clips: Sequence[np.ndarray], length: int) -> tuple[np.ndarray, ...]:
    """Clips repeated to one length, of which babble is mixed; silent ones are left out."""
    voices = (np.resize(clip_T, length) for clip_T in clips)
    # Asked of what is taken: a long clip may begin with silence, which no scale gives the others' power.
    return tuple(voice_T for voice_T in voices if np.square(voice_T).mean() > 1e-12)
