"""Tied embeddings are one parameter: in the model, in the optimizer, in every kind of checkpoint, in the plan."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.layouts import Layout, load_natively, move, write_sources
from tests.checkpoint.test_restore import assert_equal_state
from tests.distributed import run_ranks
from tests.finetune.small import finetune_config
from vqmoe_ds.checkpoint.convert import build_parser, main
from vqmoe_ds.checkpoint.io.archive import load_archive
from vqmoe_ds.checkpoint.load_model import load_model
from vqmoe_ds.checkpoint.open import open_checkpoint
from vqmoe_ds.config.load import load_config
from vqmoe_ds.config.schema import RunConfig
from vqmoe_ds.models.build import build_model, learns
from vqmoe_ds.models.parameter_groups import parameter_groups
from vqmoe_ds.models.transformer import MoETransformer
from vqmoe_ds.planning.parameters import count

TIED: dict[str, Any] = {"model.tie_embeddings": True, "model.sliding_window": 6, "codebook.source_momentum": 0.0}
SOURCES = [Layout(3, 2, 2, extra="p"), Layout(0, 2, 2, "bf16")]
TARGETS = [Layout(0, 2, 2), Layout(1, 1, 2), Layout(2, 2, 2), Layout(3, 1, 2), Layout(3, 2, 2, "bf16")]
STEPS = 6


def _config(**more: Any) -> RunConfig:
    return load_config("tiny", None, {**TIED, "model.width": 64, "model.layers": 2, **more}).config


def _convert(src: Path, dst: Path, *options: str) -> None:
    assert main(build_parser("").parse_args([str(src), str(dst), *options])) == 0


# ------------------------------------------------------------------ model


def test_head_and_embedding_are_one_parameter_of_one_group() -> None:
    model = MoETransformer(_config())
    assert model.head.weight is model.embed.weight
    names = [name for name, _ in model.named_parameters()]
    assert "embed.weight" in names and "head.weight" not in names
    assert not [name for name in model.state_dict() if name.startswith("head")]
    found = [p for group in parameter_groups(model, 0.1) for p in group["params"] if p is model.embed.weight]
    assert len(found) == 1
    other = MoETransformer(_config(**{"train.seed": 5}))
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(other.head.weight, model.embed.weight)


def test_logits_at_the_start_are_those_of_a_head_of_its_own() -> None:
    """Of unit size, embeddings would make logits of deviation sqrt(D), and a loss far above that of guessing."""
    losses = {}
    for tied in (False, True):
        model = MoETransformer(_config(**{"model.tie_embeddings": tied})).eval()
        tokens_BS = torch.randint(0, 256, (8, 65), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            losses[tied] = float(model(tokens_BS[:, :-1], tokens_BS[:, 1:])[0])
    assert float(model.embed.weight.detach().std()) == pytest.approx(0.5 / 8, rel=0.05)
    assert losses[True] == pytest.approx(losses[False], abs=0.1) and losses[True] < math.log(256) + 0.3


def test_the_gradient_is_that_of_both_uses_and_none_of_the_codes() -> None:
    """Codes look at embeddings: with the head's product and the lookup taken apart, nothing is left over."""
    model = MoETransformer(_config(**{"codebook.source": "token_embedding"}))
    apart = MoETransformer(_config(**{"codebook.source": "token_embedding", "model.tie_embeddings": False}))
    apart.load_state_dict({**model.state_dict(), "head.weight": model.embed.weight.detach()})
    tokens_BS = torch.randint(0, 256, (2, 33), generator=torch.Generator().manual_seed(1))
    for each in (model, apart):
        loss, aux = each(tokens_BS[:, :-1], tokens_BS[:, 1:])
        (loss + aux).backward()
    assert (model.embed.weight.grad - apart.embed.weight.grad - apart.head.weight.grad).abs().max() < 1e-6


def test_the_plan_counts_the_weight_once_and_its_product_as_ever() -> None:
    tied, apart = count(_config()), count(_config(**{"model.tie_embeddings": False}))
    assert apart.stored - tied.stored == apart.active - tied.active == 256 * 64
    assert tied.forward_flops_per_token == apart.forward_flops_per_token
    assert tied.stored == sum(p.numel() for p in MoETransformer(_config()).parameters())


# ------------------------------------------------------------------ checkpoints


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[Layout, list[float]]]:
    folder = tmp_path_factory.mktemp("tied")
    return folder, run_ranks(2, write_sources, str(folder), SOURCES, STEPS, TIED, timeout=300)[0]


def test_a_tied_run_goes_on_anywhere_from_one_tensor(run: Any) -> None:
    folder, stayed = run
    for source in SOURCES:
        _convert(folder / str(source), folder / f"portable-{source}", "--to", "portable", "--verify")
        assert "head.weight" not in open_checkpoint(folder / str(source)).names()
        assert_equal_state(open_checkpoint(folder / str(source)), open_checkpoint(folder / f"portable-{source}"))
    portable = f"portable-{SOURCES[0]}"
    for layout in TARGETS:
        options = ("--zero", str(layout.stage), "--ep", str(layout.ep), "--world", "2", "--precision", layout.precision)
        _convert(folder / portable, folder / f"tag-{layout}", "--to", "deepspeed", *options)
        assert_equal_state(open_checkpoint(folder / portable), open_checkpoint(folder / f"tag-{layout}"))
    tags, jobs = [(f"tag-{layout}", layout) for layout in TARGETS], [(portable, layout) for layout in TARGETS]
    native = run_ranks(2, load_natively, str(folder), tags, STEPS, TIED, timeout=300)[0]
    jobs += [(str(SOURCES[1]), Layout(2, 1, 2, "bf16"))]
    moved = run_ranks(2, move, str(folder), jobs, STEPS, "", TIED, timeout=300)[0]
    assert native == moved[:-1]
    for layout, losses in zip(TARGETS, native, strict=True):
        assert losses == pytest.approx(stayed[SOURCES[0]], abs=1e-5 if layout.precision == "fp32" else 0.02), layout
    assert moved[-1] == pytest.approx(stayed[SOURCES[1]], abs=0.02)


def test_the_tag_names_the_pair_as_deepspeed_does(run: Any) -> None:
    folder, _ = run
    options = ("--zero", "3", "--ep", "2", "--world", "2")
    _convert(folder / str(SOURCES[0]), folder / "named", "--to", "deepspeed", *options)
    for name in (str(SOURCES[0]), "named"):
        path = open_checkpoint(folder / name).path / "zero_pp_rank_0_mp_rank_00_model_states.pt"
        assert dict(load_archive(path)["shared_params"]) == {"head.weight": "embed.weight"}


def test_it_is_evaluated_and_fine_tuned(run: Any) -> None:
    folder, _ = run
    reader = open_checkpoint(folder / str(SOURCES[0]))
    model = load_model(reader.path).model
    assert model.head.weight is model.embed.weight
    text, classes = (finetune_config(reader, task).config for task in ("lm", "sst2"))
    assert text.ties_head and not classes.ties_head
    assert learns("embed.weight", text) and not learns("embed.weight", classes) and learns("head.weight", classes)
    assert text.codebook.source_momentum == 1, "codes look at a copy that stays while the head learns"
    assert classes.codebook.source_momentum == 0
    assert build_model(text).head.weight.requires_grad
    classifier = build_model(classes)
    assert classifier.head.weight.shape == (3, 16) and not classifier.embed.weight.requires_grad


def _finetuned(rank: int, world: int, folder: str, source: str) -> dict[str, Any]:
    from tests.finetune.small import Finetuning

    found = {}
    for layout in (Layout(2, 2, 2), Layout(3, 1, 2, extra="p")):
        finetuning = Finetuning(Path(folder), layout, rank, Path(source))
        found[str(layout)] = finetuning.train(8)
        finetuning.session.engine.destroy()
    return found


def test_a_classifier_of_a_tied_model_learns(run: Any, tmp_path: Path) -> None:
    found = run_ranks(2, _finetuned, str(tmp_path), str(open_checkpoint(run[0] / str(SOURCES[0])).path))[0]
    first, second = found.values()
    assert first == pytest.approx(second, abs=1e-5) and first[-1] < first[0]
