"""LoRA: the tools get the model that weights and adapters make together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.checkpoint.layouts import Layout, write_one
from tests.distributed import run_ranks
from tests.finetune.small import FIXED_BS, Finetuning
from vqmoe_ds.checkpoint.load_model import load_model
from vqmoe_ds.checkpoint.open import open_checkpoint
from vqmoe_ds.checkpoint.views.adapters import merged
from vqmoe_ds.checkpoint.views.discrete import DiscreteOnly

ONE = Layout(0, 1, 1)


def _adapt(rank: int, world: int, folder: str) -> torch.Tensor:
    """Logits of a language model whose adapters do something, saved as ``adapted``."""
    source = Path(folder) / "source"
    source.mkdir()
    write_one(rank, world, str(source), ONE, {})
    tuning = Finetuning(Path(folder), ONE, rank, source, task="lm", **{"finetune.lora_rank": 3})
    with torch.no_grad():
        for name, param in tuning.session.model.named_parameters():
            if ".lora_B." in name:
                param.normal_()
    tuning.save(Path(folder) / "adapted")
    return tuning.session.model.eval()(FIXED_BS)[0].detach()


def test_merged_weights_give_the_logits_of_weights_and_adapters(tmp_path):
    pytest.importorskip("peft")
    (logits,) = run_ranks(1, _adapt, str(tmp_path))
    loaded = load_model(tmp_path / "adapted", tokenizer=None)
    assert not any("lora" in name for name, _ in loaded.model.named_parameters())
    assert torch.allclose(loaded.model(FIXED_BS)[0], logits, atol=1e-4)
    view = merged(open_checkpoint(tmp_path / "adapted"))
    name = "blocks.1.attention.qkv.weight"
    assert not torch.equal(view.tensor(name), open_checkpoint(tmp_path / "source").tensor(name))
    whole = view.tensor(name).flatten()
    assert torch.equal(view.read(name, "fp32", 21, 100), whole[21:121])
    assert torch.equal(DiscreteOnly(view).tensor(name), view.tensor(name))
