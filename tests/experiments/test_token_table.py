"""Token tables: balanced, deterministic, read back, trained with, and equal to the codes they were taken from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from vqmoe_ds.commands import usage
from vqmoe_ds.config.schema import RunConfig
from vqmoe_ds.evaluation.probe import visit_layers
from vqmoe_ds.experiments import token_table
from vqmoe_ds.models.transformer import MoETransformer
from vqmoe_ds.moe import token_tables
from vqmoe_ds.moe.routers.token_table import NAME, read_table
from vqmoe_ds.runtime.errors import CheckpointError, ConfigError

VOCAB, EXPERTS, LAYERS = 600, 8, 3


def _counts(most: int = 2000) -> np.ndarray:
    """Zipf's law, and a tail that never occurs."""
    counts_V = (most / np.arange(3, VOCAB + 3)).astype(np.int64)
    counts_V[-50:] = 0
    return np.random.default_rng(1).permutation(counts_V)


def _embeddings(counts_V: np.ndarray) -> torch.Tensor:
    """Twelve groups of tokens that are alike."""
    generator = torch.Generator().manual_seed(3)
    centres = torch.randn(12, 16, generator=generator)
    return centres[torch.arange(len(counts_V)) % 12] + 0.1 * torch.randn(len(counts_V), 16, generator=generator)


def _table(method: str, counts_V: np.ndarray, seed: int = 0) -> torch.Tensor:
    if method == "embedding":
        return token_tables.embedding_table(_embeddings(counts_V), counts_V, EXPERTS, LAYERS, seed)
    return token_tables.random_table(counts_V, EXPERTS, LAYERS, seed)


@pytest.mark.parametrize("method", ["embedding", "random"])
def test_tables_are_balanced_deterministic_and_differ_between_layers_and_seeds(method: str) -> None:
    counts_V = _counts()
    table_LV = _table(method, counts_V)
    assert table_LV.shape == (LAYERS, VOCAB) and table_LV.min() >= 0 and table_LV.max() < EXPERTS
    assert counts_V.max() / counts_V.sum() * EXPERTS < 1.1
    assert max(token_tables.busiest(table_LV, counts_V, EXPERTS)) <= 1.1
    assert torch.equal(table_LV, _table(method, counts_V))
    assert not torch.equal(table_LV[0], table_LV[1])
    assert not torch.equal(table_LV, _table(method, counts_V, seed=1))


@pytest.mark.parametrize("method", ["embedding", "random"])
def test_a_token_that_is_more_than_a_share_has_an_expert_almost_to_itself(method: str) -> None:
    counts_V = _counts()
    counts_V[7] = counts_V.sum()
    table_LV, frequent = _table(method, counts_V), counts_V[7] / counts_V.sum() * EXPERTS
    assert max(token_tables.busiest(table_LV, counts_V, EXPERTS)) == pytest.approx(frequent, rel=0.01)
    counts_V[7] = 0
    loads_N = torch.bincount(table_LV[0], torch.from_numpy(counts_V).double(), EXPERTS)
    assert loads_N.max() <= 1.1 * loads_N.sum() / (EXPERTS - 1), "the others share the rest evenly"


def test_like_tokens_meet_in_one_expert() -> None:
    """Of two tokens of a group more share an expert than of two at random."""
    counts_V = _counts()
    group_V = torch.arange(VOCAB) % 12
    alike = group_V.unsqueeze(0) == group_V.unsqueeze(1)
    shares = {}
    for method in ("embedding", "random"):
        table_V = _table(method, counts_V)[0]
        together = table_V.unsqueeze(0) == table_V.unsqueeze(1)
        shares[method] = float(together[alike].float().mean())
    assert shares["embedding"] > 2 * shares["random"]


def test_round_robin_follows_the_rank() -> None:
    counts_V = np.array([5, 9, 1, 7])
    assert token_tables.round_robin_table(counts_V, 3, 2).tolist() == [[2, 0, 0, 1], [0, 1, 1, 2]]


def _config(router: dict[str, Any], path: Path | None = None) -> RunConfig:
    model = {"vocab_size": VOCAB, "layers": LAYERS, "width": 16, "heads": 2, "sequence_length": 12}
    options = {} if path is None else {"path": str(path)}
    return RunConfig(model=model, moe={"num_experts": EXPERTS, "expert_hidden": 8, **router}, router=options,
                     codebook={"source": "token_embedding", "num_codes": 24})  # fmt: skip


def test_the_table_of_a_run_with_codes_gives_its_routes_to_the_bit(tmp_path: Path) -> None:
    codes = MoETransformer(_config({"router": "vq", "top_k": 0})).eval()
    codes.bank.code_map_LK.copy_(torch.randint(0, EXPERTS, codes.bank.code_map_LK.shape))
    token_table.write(tmp_path / "t.safetensors", token_table.table_of_codes(codes), "table", "")
    table = MoETransformer(_config({"router": "token_table"}, tmp_path / "t.safetensors")).eval()
    tokens_BS = torch.randint(0, VOCAB, (5, 12))
    for a, b in zip(visit_layers(codes, tokens_BS), visit_layers(table, tokens_BS), strict=True):
        assert torch.equal(a.routing.expert_ids_TR, b.routing.expert_ids_TR)
    with pytest.raises(CheckpointError, match="codebook.source=context"):
        token_table.table_of_codes(MoETransformer(_config({"router": "vq"}).model_copy(
            update={"codebook": RunConfig().codebook})))  # fmt: skip


def test_the_command_counts_writes_both_forms_and_says_how_balanced(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 50)
    words = ["--method", "random", "--tokenizer", "bytes", "--experts", "4", "--layers", "2"]
    words += ["--data", str(tmp_path / "text.txt")]
    for form in ("table", "gate"):
        out = tmp_path / f"{form}.safetensors"
        parser = token_table.build_parser(usage(""))
        assert token_table.main(parser.parse_args([*words, "--form", form, "--out", str(out)])) == 0
    assert "busiest expert by layer, times the mean of 2,250 tokens" in capsys.readouterr().out
    table_LV = read_table(tmp_path / "table.safetensors", 2, 257, 4)
    gates = load_file(tmp_path / "gate.safetensors")
    assert sorted(gates) == [f"model.layers.{layer}.mlp.gate.tid2eid" for layer in (0, 1)]
    for layer, gate_V1 in enumerate(gates.values()):
        assert gate_V1.dtype == torch.int64 and torch.equal(gate_V1[:, 0], table_LV[layer])


@pytest.mark.parametrize(
    ("tensor", "part"),
    [
        (None, "does not exist"),
        (b"no header", "cannot be read as a token table"),
        (torch.zeros(2, VOCAB, dtype=torch.int32), f"is [2, {VOCAB}], and the model has 3 MoE layer(s)"),
        (torch.zeros(LAYERS, VOCAB), "holds torch.float32, not whole numbers"),
        (torch.full((LAYERS, VOCAB), 8), "names expert 8, and moe.num_experts=8"),
        (torch.full((VOCAB,), -1), "names expert -1"),
    ],
)
def test_a_table_that_cannot_be_is_refused_in_a_sentence(tensor: Any, part: str, tmp_path: Path) -> None:
    file = tmp_path / "t.safetensors"
    if isinstance(tensor, bytes):
        file.write_bytes(tensor)
    elif tensor is not None:
        save_file({NAME: tensor}, file)
    with pytest.raises(ConfigError) as refusal:
        config = _config({"router": "token_table"}, file)
        config.moe.facts.check_start(config, LAYERS)
    assert part in str(refusal.value) and "\n" not in str(refusal.value)


def test_one_table_serves_all_layers(tmp_path: Path) -> None:
    save_file({NAME: torch.arange(VOCAB, dtype=torch.int32) % EXPERTS}, tmp_path / "t.safetensors")
    model = MoETransformer(_config({"router": "token_table"}, tmp_path / "t.safetensors"))
    assert model.token_table_LV.shape == (LAYERS, VOCAB)
    assert torch.equal(model.token_table_LV[2], torch.arange(VOCAB) % EXPERTS)
    unread = MoETransformer(_config({"router": "token_table"}))
    unread.load_state_dict(model.state_dict())
    assert torch.equal(unread.token_table_LV, model.token_table_LV), "a checkpoint brings its table"
