"""Clips become spectrograms with the values that hand calculation gives, and noise of the ratio that was asked for."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from scipy.io import wavfile

from vqmoe_ds.data.audio import Noise, fitted, mel, mel_edges, mel_filters, mel_power, read_clip, spectrogram, talkers

RATE = 16_000


def tone(hertz: float, seconds: float = 1.0, rate: int = RATE) -> np.ndarray:
    return np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


def test_the_mel_scale_is_that_of_htk():
    assert mel(0) == 0
    assert mel(700) == pytest.approx(2595 * 0.30103, rel=1e-5)  # log10(2)
    assert mel(6300) == pytest.approx(2595)  # 1 + 6300 / 700 = 10
    assert mel_edges(3)[[0, -1]] == pytest.approx([20, 8000])
    assert [mel(f) for f in mel_edges(3)] == pytest.approx(np.linspace(mel(20), mel(8000), 5))


def test_triangles_rise_from_the_band_below_to_their_peak_and_fall_to_the_band_above():
    edges = mel_edges(4)
    bins = np.concatenate([edges, (edges[1:] + edges[:-1]) / 2])
    weights = mel_filters(4, bins)
    assert weights[:, :6] == pytest.approx(np.eye(6)[1:5], abs=1e-12)
    half = weights[:, 6:]
    assert half == pytest.approx(0.5 * (np.eye(5)[:4] + np.eye(5)[1:5]), abs=1e-12)


@pytest.mark.parametrize("size", [32, 64])
def test_no_band_is_without_a_bin(size):
    noise = np.random.default_rng(0).standard_normal(RATE)
    assert mel_power(noise, size).shape == (size, size)
    assert mel_power(noise, size).min() > 0


@pytest.mark.parametrize("band", [3, 15, 28])
def test_a_tone_lands_in_its_band_and_nowhere_else(band):
    size = 32
    clip = tone(mel_edges(size)[band + 1])
    power = mel_power(clip, size)
    assert (power.argmax(0) == band).all()
    others = np.delete(power, [band - 1, band, band + 1], 0)
    assert others[:, 2:-2].max() < 1e-4 * power[band].max()
    assert (spectrogram(clip, size).argmax(0) == size - 1 - band).all(), "the highest band is the top row"


def test_energies_are_those_of_a_sine():
    # 1 kHz is on a bin (2,048 points: 128 x 7.8125 Hz). Hann's lobe has the power sum w^2 / (sum w)^2 x 2048
    # = 1.5 / 1000 x 2048 = 3.072 times A^2 / 4; the bands around it are linear there, and their weights sum to 1.
    inner = mel_power(0.5 * tone(1000), 32)[:, 4:-4]
    assert inner.sum(0) == pytest.approx(3.072 * 0.5**2 / 4, rel=0.01)
    assert mel_power(5 * tone(1000), 32) == pytest.approx(100 * mel_power(0.5 * tone(1000), 32))


def test_pixels_are_decibels_below_the_loudest():
    louder, quieter = tone(500), 10**-1.25 * tone(4000)  # 25 of 50 dB: half of 255
    image = spectrogram(louder + quieter, 32).astype(int)
    rows = [32 - int(np.searchsorted(mel_edges(32)[1:-1], hertz)) for hertz in (500, 4000)]
    low, high = (image[row - 1 : row + 1, 4:-4].max(0) for row in rows)
    assert low.max() == 255 and low.min() >= 254
    assert np.abs(high - low + 127.5).max() < 25  # bands further up are wider than a lobe, lower ones cut it
    assert np.array_equal(spectrogram(1e-3 * (louder + quieter), 32), image), "however loud the recording"


def test_silence_is_black_and_a_click_is_in_its_frame():
    assert not spectrogram(np.zeros(RATE), 32).any()
    click = np.zeros(RATE)
    click[10 * 500 + 250] = 1.0  # the centre of frame 10
    assert mel_power(click, 32).sum(0).argmax() == 10
    assert set(np.flatnonzero(mel_power(click, 32).sum(0) > 1e-12)) == {10}


def test_short_clips_stand_amid_silence_and_long_ones_lose_their_ends():
    clip, own = fitted(np.ones(3), 8)
    assert (clip.tolist(), own) == ([0, 0, 1, 1, 1, 0, 0, 0], 3)
    clip, own = fitted(np.arange(10.0), 4)
    assert (clip.tolist(), own) == ([3, 4, 5, 6], 4)
    assert fitted(np.arange(4.0), 4)[0].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("rate", [8_000, 44_100])
def test_other_rates_are_resampled_to_the_same_tone(tmp_path, rate):
    wavfile.write(tmp_path / "a.wav", rate, (0.5 * tone(1000, rate=rate)).astype(np.float32))
    clip = read_clip(tmp_path / "a.wav")
    assert len(clip) == RATE
    assert np.abs(clip - 0.5 * tone(1000))[200:-200].max() < 0.01


def test_every_kind_of_samples_is_of_the_same_loudness(tmp_path):
    half = np.array([0.5, -0.5, 0.0])
    for name, stored in {
        "bytes": (128 + 128 * half).astype(np.uint8),
        "words": (32768 * half).astype(np.int16),
        "longs": (2**31 * half).astype(np.int32),
        "floats": half.astype(np.float32),
    }.items():
        wavfile.write(tmp_path / f"{name}.wav", RATE, stored)
        assert read_clip(tmp_path / f"{name}.wav").tolist() == half.tolist()
    wavfile.write(tmp_path / "stereo.wav", RATE, np.stack([half, 0 * half], 1).astype(np.float32))
    assert read_clip(tmp_path / "stereo.wav").tolist() == (half / 2).tolist()


def test_clips_that_cannot_be_used_say_why(tmp_path):
    wavfile.write(tmp_path / "whole.wav", RATE, tone(400).astype(np.float32))
    data = (tmp_path / "whole.wav").read_bytes()
    bad = {"text": b"no sound", "empty": b"", "cut": data[:-4000], "cut amid a sample": data[:-3]}
    for name, content in bad.items():
        (tmp_path / f"{name}.wav").write_bytes(content)
    wavfile.write(tmp_path / "none.wav", RATE, np.zeros(0, np.int16))
    wavfile.write(tmp_path / "slow.wav", 3, np.zeros(9, np.int16))
    wavfile.write(tmp_path / "nan.wav", RATE, np.array([0, np.nan], np.float32))
    wavfile.write(tmp_path / "loud.wav", RATE, np.array([0, 1e200]))
    reasons = {
        "cut": "cut off",
        "cut amid a sample": "cut off",
        "none": "no samples",
        "slow": "3 samples a second",
        "nan": "not finite",
        "loud": "far outside -1 to 1",
        "text": "format",
    }
    for name in [*bad, *reasons]:
        with pytest.raises(ValueError, match=reasons.get(name)) as refused:
            read_clip(tmp_path / f"{name}.wav")
        assert str(refused.value).isprintable()


def test_flac_without_its_library_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "soundfile", None)
    (tmp_path / "a.flac").write_bytes(b"fLaC")
    with pytest.raises(ValueError, match="pip install soundfile"):
        read_clip(tmp_path / "a.flac")


def test_flac_is_read_where_its_library_is(tmp_path):
    soundfile = pytest.importorskip("soundfile")
    soundfile.write(tmp_path / "a.flac", 0.5 * tone(1000), RATE)
    assert np.abs(read_clip(tmp_path / "a.flac") - 0.5 * tone(1000)).max() < 1e-4


@pytest.mark.parametrize("babble", [False, True])
def test_noise_has_the_ratio_to_the_clip_itself_and_follows_from_the_name(babble):
    short, own = fitted(0.3 * tone(440, 0.25), RATE)
    voices = talkers([tone(hertz) for hertz in range(200, 1000, 100)], RATE) if babble else ()
    added = Noise(10.0, voices).add(short, own, "yes/a.wav") - short
    ratio = (0.3**2 / 2) / np.square(added).mean()  # over the quarter of a second that is not silence
    assert 10 * np.log10(ratio) == pytest.approx(10, abs=0.05)
    assert np.array_equal(Noise(10.0, voices).add(short, own, "yes/a.wav") - short, added)
    assert not np.allclose(Noise(10.0, voices).add(short, own, "yes/b.wav") - short, added)
    louder = Noise(0.0, voices).add(short, own, "yes/a.wav") - short
    assert louder == pytest.approx(added * 10**0.5), "the same noise at every ratio"
    assert not Noise(10.0, voices).add(np.zeros(RATE), RATE, "yes/a.wav").any()


def test_babble_is_six_voices_of_equal_power_and_no_silence():
    voices = talkers([np.zeros(9), *(scale * tone(hertz) for scale, hertz in ((1, 500), (0.01, 1500)))], RATE)
    assert len(voices) == 2
    noise = Noise(0.0, voices).add(tone(3000), RATE, "a")
    spectrum = np.square(np.abs(np.fft.rfft(noise)))
    assert spectrum[500] == pytest.approx(spectrum[1500])
    many = talkers([tone(hertz) for hertz in range(200, 1200, 100)], RATE)
    heard = np.square(np.abs(np.fft.rfft(Noise(0.0, many).add(tone(3000), RATE, "a"))))
    assert sum(heard[hertz] > 1 for hertz in range(200, 1200, 100)) == 6


def test_a_clip_that_is_silent_in_the_stretch_that_is_taken_is_no_voice():
    late = np.concatenate([np.zeros(RATE), tone(440)])
    assert len(talkers([late, tone(440)], RATE)) == 1 and not talkers([late], RATE)
