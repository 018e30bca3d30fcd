#!/usr/bin/env python
"""Figures of docs/huggingface.md: how equal an exported model is, and what upcycled routers keep.

    python benchmarks/huggingface.py equal runs/pretrain      # a run on raw text: logits, bits/byte, generation
    python benchmarks/huggingface.py upcycle                  # a Mixtral, an OLMoE and a Qwen3-MoE, trained on the spot

Legend: B windows, S positions, V vocabulary.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from transformers import AutoModelForCausalLM, MixtralConfig, OlmoeConfig, Qwen3MoeConfig

import vqmoe_ds.models.hf  # noqa: F401 (registers the model)
from vqmoe_ds.checkpoint.formats.huggingface.folder import DTYPES, ExportOptions, export_hf
from vqmoe_ds.checkpoint.load_model import load_model
from vqmoe_ds.checkpoint.open import open_checkpoint
from vqmoe_ds.config.schema import RunConfig
from vqmoe_ds.data.corpus import open_corpus
from vqmoe_ds.data.raw_text import Split, TrainingBatches, split_corpus
from vqmoe_ds.upcycle.routed import RoutedSource, calibration_ids, routed_config, with_codes

PROMPT, NEW_TOKENS = b"The method returns ", 110
SHAPE: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.05,
    "num_experts_per_tok": 2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
FAMILIES: dict[str, Any] = {
    "Mixtral": MixtralConfig(**SHAPE, num_local_experts=8, sliding_window=None, router_aux_loss_coef=0.02),
    "OLMoE": OlmoeConfig(**SHAPE, num_experts=8, router_aux_loss_coef=0.02),
    "Qwen3-MoE": Qwen3MoeConfig(
        **SHAPE,
        num_experts=8,
        moe_intermediate_size=192,
        head_dim=64,
        norm_topk_prob=True,
        router_aux_loss_coef=0.02,
    ),
}


def equal(run: str, tokens: int) -> None:
    """Compare an export with the trainer's model on held-out text, in float32 and bfloat16."""
    reader, loaded = open_checkpoint(run), load_model(run)
    windows_BS = held_out(loaded.config, tokens)
    inputs_BS, targets_BS = windows_BS[:, :-1], windows_BS[:, 1:]
    print(f"{reader.path.name} of {run}: {targets_BS.numel():,} held-out tokens")
    exact_BSV = logits_of(loaded.model, inputs_BS)
    for name, dtype in DTYPES.items():
        ours = copy.deepcopy(loaded.model)
        for parameter in ours.parameters():  # as DeepSpeed does: parameters alone
            parameter.data = parameter.data.to(dtype)
        with tempfile.TemporaryDirectory() as folder:
            export_hf(reader, Path(folder) / "hf", ExportOptions(dtype=name, tokenizer="none"))
            theirs = AutoModelForCausalLM.from_pretrained(Path(folder) / "hf")
        want_BSV, got_BSV = logits_of(ours, inputs_BS), logits_of(theirs, inputs_BS)
        print(f"{name}: {bits(got_BSV, targets_BS):.4f} bits/byte, the trainer's {bits(want_BSV, targets_BS):.4f}")
        for other, logits_BSV in ((name, want_BSV), ("float32", exact_BSV))[: 1 + (dtype is not torch.float32)]:
            far_BSV, same = (got_BSV - logits_BSV).abs(), got_BSV.argmax(-1) == logits_BSV.argmax(-1)
            print(
                f"  from the trainer's logits in {other} (up to {logits_BSV.abs().max():.0f}): {far_BSV.mean():.1e} on "
                f"average, {far_BSV.max():.1e} at most, {100 * same.double().mean():.2f} % the same most likely byte"
            )
        if name == "float32":
            for cached in (True, False):
                print(f"generate, {'with' if cached else 'without'} the cache: {speed(theirs, cached):.0f} tokens/s")


def held_out(config: RunConfig, tokens: int) -> Tensor:
    """Evenly spaced windows of the held-out text of a run on raw text, int64 ``[B, S + 1]``."""
    path, length = config.data.path, config.model.sequence_length
    _, split = split_corpus(open_corpus(path if isinstance(path, str) else None), length, config.data.holdout_every)
    positions = np.linspace(0, len(split) - 1, min(len(split), tokens // length)).astype(int)
    return torch.from_numpy(split.batch(positions))


@torch.no_grad()
def logits_of(model: Any, inputs_BS: Tensor) -> Tensor:
    """Float32 logits ``[B, S, V]`` of our model or of one of transformers."""
    parts = []
    for part_BS in inputs_BS.split(16):
        out = model(part_BS)
        parts.append((out[0] if isinstance(out, tuple) else out.logits).float())
    return torch.cat(parts)


def bits(logits_BSV: Tensor, targets_BS: Tensor) -> float:
    """Bits per token, which is a byte here."""
    return float(F.cross_entropy(logits_BSV.flatten(0, 1), targets_BS.flatten())) / math.log(2)


def speed(model: Any, cached: bool) -> float:
    """Tokens per second of greedy generation, the better of two runs."""
    prompt = torch.tensor([list(PROMPT)])
    best = math.inf
    for _ in range(2):
        started = time.perf_counter()
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            use_cache=cached,
            pad_token_id=0,
        )
        best = min(best, time.perf_counter() - started)
    return NEW_TOKENS / best


def upcycle(steps: int, tokens: int) -> None:
    """Train a small model of each family and give its router's place to codes, beside it and alone."""
    print("| source | codes look at | tokens | first choice, by layer | one of two, by layer | before | both | alone |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        calibration = Path(folder) / "calibration.txt"
        _, split = stdlib_split()
        calibration.write_bytes(split.batch(np.arange(len(split)))[:, :-1].astype(np.uint8).tobytes())
        for name, shape in FAMILIES.items():
            path = Path(folder) / name
            trained(shape, steps).save_pretrained(path)
            for where in ("layer_state", "context"):
                print(row(name, where, path, str(calibration), tokens), flush=True)


def row(name: str, where: str, path: Path, calibration: str, tokens: int) -> str:
    """One line of the table: agreement and losses with codes of one source."""
    source, reports = RoutedSource(path), []
    for top_k in (2, 0):
        config = routed_config(source, {"codebook.source": where, "moe.top_k": top_k})
        reports.append(with_codes(source, config, calibration_ids(calibration, "bytes", tokens, config))[1])
    both, alone = reports
    shares = (", ".join(f"{100 * share:.0f}" for share in some) for some in (both.first_choice, both.any_choice))
    losses = f"{both.loss_before:.4f} | {both.loss_after:.4f} | {alone.loss_after:.4f}"
    return f"| {name} | `{where}` | {both.tokens:,} | {' % | '.join(shares)} % | {losses} |"


def stdlib_split() -> tuple[Split, Split]:
    """The standard library's documentation, a tenth of it held out."""
    return split_corpus(open_corpus(None), SHAPE["max_position_embeddings"], 10)


def trained(shape: Any, steps: int) -> Any:
    """A model of transformers after some steps on the standard library's documentation."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(shape).train()
    batches = TrainingBatches(stdlib_split()[0], 16, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for step in range(steps):
        windows_BS = torch.from_numpy(batches.split.batch(batches.rows(step * 16, 16)))
        out = model(windows_BS[:, :-1], output_router_logits=True)
        loss = F.cross_entropy(out.logits.flatten(0, 1), windows_BS[:, 1:].flatten())
        (loss + shape.router_aux_loss_coef * out.aux_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    jobs = parser.add_subparsers(dest="job", required=True)
    one = jobs.add_parser("equal", help="a run's export beside the trainer's own model")
    one.add_argument("run", help="run folder or checkpoint, trained on raw text")
    one.add_argument("--tokens", type=int, default=16_384, help="held-out tokens")
    other = jobs.add_parser("upcycle", help="Mixtral, OLMoE and Qwen3-MoE to codes")
    other.add_argument("--steps", type=int, default=150, help="of training before")
    other.add_argument("--tokens", type=int, default=100_000, help="of calibration")
    options = parser.parse_args()
    if options.job == "equal":
        equal(options.run, options.tokens)
    else:
        upcycle(options.steps, options.tokens)


if __name__ == "__main__":
    main()
