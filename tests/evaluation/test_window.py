"""Sliding windows against a slow reference that scores every token by a forward pass of its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.huggingface import LENGTH, VOCAB, config_of, model_of
from vqmoe_ds.data.batches import MASKED
from vqmoe_ds.evaluation.window import score, windows_of

LENGTHS = [1, 2, LENGTH, LENGTH + 1, LENGTH + 2, 3 * LENGTH + 5, 0, 7]


def _ids(lengths: list[int]) -> np.ndarray:
    return np.random.default_rng(3).integers(0, VOCAB, sum(lengths))


def _reference(model, lengths: list[int], stride: int) -> np.ndarray:
    """Nats of every token: find the window that the rule gives it, cut it after the token, and look at the end."""
    ids, nats, start = _ids(lengths), np.zeros(sum(lengths)), 0
    for length in lengths:
        for place in range(1, length):
            steps = 0 if place <= LENGTH else -(-(place - LENGTH) // stride)
            end = min(LENGTH + steps * stride, length - 1)  # last target of its window
            begin = max(0, end - LENGTH)
            window = torch.from_numpy(ids[start + begin : start + place]).unsqueeze(0)
            logits_V = model(window)[0][0, -1].double()
            nats[start + place] = float(logits_V.logsumexp(0) - logits_V[ids[start + place]])
        start += length
    return nats


@pytest.mark.parametrize("stride", [1, 5, LENGTH])
@pytest.mark.parametrize("case", ["context", "top-2"])
def test_every_token_is_scored_as_a_forward_pass_of_its_own_would(case, stride):
    model = model_of(config_of(case))
    ids = _ids(LENGTHS)
    scored = score(model, ids, ids[None], windows_of(LENGTHS, LENGTH, stride), batch_size=3)
    with torch.no_grad():
        expected = _reference(model, LENGTHS, stride)
    assert np.abs(scored.nats_KN[0] - expected).max() < 2e-5


@pytest.mark.parametrize("stride", [1, 2, 7, LENGTH - 1, LENGTH])
def test_each_token_but_a_documents_first_is_scored_once_with_enough_before_it(stride):
    times = np.zeros(sum(LENGTHS), dtype=int)
    firsts = np.cumsum([0, *LENGTHS])
    for begin, first, end in windows_of(LENGTHS, LENGTH, stride):
        times[first : end + 1] += 1
        document = np.searchsorted(firsts, begin, side="right") - 1
        assert end < firsts[document + 1] and 1 <= end - begin <= LENGTH
        at_start = begin == firsts[document]
        assert at_start or first - begin > LENGTH - stride
    expected = np.ones(sum(LENGTHS), dtype=int)
    expected[[first for first, length in zip(firsts, LENGTHS, strict=False) if length]] = 0
    assert np.array_equal(times, expected)


def test_several_targets_a_place_and_masked_ones():
    model, ids = model_of(config_of("context")), _ids([30])
    windows = windows_of([30], LENGTH, 8)
    other = (ids + 1) % VOCAB
    hidden = np.where(np.arange(30) % 3 == 0, MASKED, ids)
    both = score(model, ids, np.stack([ids, other, hidden]), windows, 2)
    assert np.array_equal(both.nats_KN[0], score(model, ids, ids[None], windows, 2).nats_KN[0])
    assert np.array_equal(both.nats_KN[1], score(model, ids, other[None], windows, 2).nats_KN[0])
    assert np.array_equal(both.nats_KN[2] == 0, (np.arange(30) % 3 == 0))
    best = model(torch.from_numpy(ids[:-1]).unsqueeze(0)[:, :LENGTH])[0][0].argmax(-1)
    told = score(model, ids, np.append(0, best.numpy())[None], windows_of([LENGTH + 1], LENGTH, 8), 2)
    assert told.first_choice_KN[0, 1:].all()


def test_a_pass_is_told_and_batches_do_not_matter():
    model, ids = model_of(config_of("context")), _ids(LENGTHS)
    windows, told = windows_of(LENGTHS, LENGTH, 4), []
    one = score(model, ids, ids[None], windows, 1, tell=told.append)
    assert sum(told) == len(windows)
    assert np.abs(one.nats_KN - score(model, ids, ids[None], windows, 64).nats_KN).max() < 2e-5
