"""Check 6: a checkpoint written here, read on the CPU and back; both write the same text."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from vqmoe_ds.checkpoint.formats.portable import write_portable
from vqmoe_ds.checkpoint.load_model import LoadedModel, load_model
from vqmoe_ds.checkpoint.open import open_checkpoint
from vqmoe_ds.evaluation.generate import Sampling, generate

from . import training
from .frame import Bench, Finding, attempt, equal, within
from .report import FAILED, PASSED

PROMPT = b"0123456789"
NEW, TIE = 48, 1e-3
"""Tokens written, and the gap between two logits below which rounding may choose."""


def run(bench: Bench) -> Iterator[Finding]:
    folder = bench.folder / "across"
    shutil.rmtree(folder, ignore_errors=True)
    for top_k in (0, 1):
        yield from attempt(f"top_k {top_k}", partial(_compare, bench, folder / str(top_k), top_k))


def _compare(bench: Bench, folder: Path, top_k: int) -> Iterator[Finding]:
    with training.trainer(bench, training.fields(bench, moe__top_k=top_k), training.settings(1, "bf16")) as loop:
        training.losses(loop, 20)
        tag = training.save(loop, folder)
    there, here, case = _load(tag, "cpu"), _load(tag, bench.device), f"top_k {top_k}"
    yield within(f"logits, {case}", {"logits": _apart(_logits(here), _logits(there))}, 1e-3)
    yield from attempt(f"greedy text, {case}", lambda: _same_text(f"greedy text, {case}", there, here))
    yield from attempt(f"there and back, {case}", lambda: _there_and_back(f"there and back, {case}", bench, tag, here))


def _there_and_back(case: str, bench: Bench, tag: Path, here: LoadedModel) -> Finding:
    back = tag.parent / "portable"  # from the CPU into a folder without a layout, and onto the device again
    back.mkdir()
    write_portable(open_checkpoint(tag), back)
    again = _load(back, bench.device)
    same = {
        name: torch.equal(tensor, again.model.state_dict()[name]) for name, tensor in here.model.state_dict().items()
    }
    same["text"] = _greedy(again) == _greedy(here)
    return equal(case, same)


def _load(path: Path, device: torch.device | str) -> LoadedModel:
    """Generate in float32 on both, for bfloat16 may choose another token."""
    return load_model(path, device=device, precision="fp32")


@torch.no_grad()
def _logits(loaded: LoadedModel) -> Tensor:
    logits_BSV: Tensor = loaded.model(torch.tensor([list(PROMPT)], device=loaded.device))[0]
    return logits_BSV.float().cpu()


def _apart(here: Tensor, there: Tensor) -> float:
    return float((here - there).abs().max() / there.abs().max())


def _greedy(loaded: LoadedModel) -> list[int]:
    model = loaded.config.model
    ids = generate(
        loaded.model,
        list(PROMPT),
        Sampling(temperature=0),
        model.sequence_length,
        model.vocab_size,
        loaded.model.new_cache,
        loaded.device,
    )
    return list(islice(ids, NEW))


@torch.no_grad()
def _same_text(case: str, there: LoadedModel, here: LoadedModel) -> Finding:
    """Equal, or parted where the CPU's two best tokens are as good as level."""
    texts = [_greedy(loaded) for loaded in (there, here)]
    parted = next((i for i, (a, b) in enumerate(zip(*texts, strict=True)) if a != b), None)
    figures: dict[str, object] = {"text": bytes(texts[0]).decode(errors="replace"), "equal_tokens": parted or NEW}
    if parted is None:
        return Finding(case, PASSED, figures)
    context = [*PROMPT, *texts[0][:parted]][-there.config.model.sequence_length :]
    best = there.model(torch.tensor([context]))[0][0, -1].float().topk(2).values
    gap = float(best[0] - best[1])
    figures |= {"equal_tokens": parted, "gap": gap}
    return Finding(case, PASSED if gap < TIE else FAILED, figures, "" if gap < TIE else f"parted at token {parted}")
