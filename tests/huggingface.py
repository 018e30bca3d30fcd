"""Models and readers for the tests of the Hugging Face side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vqmoe_ds.checkpoint.formats.huggingface.folder import ExportOptions, export_hf
from vqmoe_ds.checkpoint.reader import CheckpointReader, Piece, WeightsReader
from vqmoe_ds.config.schema import RunConfig
from vqmoe_ds.models.transformer import MoETransformer

VOCAB, LENGTH = 50, 16

ROPE = {"rope_factor": 4.0, "rope_original_length": 8}
IN_LAYER = {"source": "layer_state", "normalize_source": False}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "context": ({}, {"num_codes": 9}, {}),
    "context, discrete only": ({"top_k": 0}, {"context_window": 4, "context_decay": 0.7, "num_codes": 9}, {}),
    "context of one token": ({"top_k": 0}, {"context_window": 1}, {}),
    "context, projected": ({"top_k": 2}, {"code_dim": 8, "num_codes": 12}, {}),
    "context, averaged table": ({"top_k": 0}, {"source_momentum": 0.9}, {}),
    "token embedding, cosine": ({"top_k": 0}, {"source": "token_embedding", "distance": "cosine"}, {}),
    "context, two groups": ({"top_k": 0}, {"groups": 2, "num_codes": 9}, {}),
    "token embedding, two groups beside top-1": ({}, {"source": "token_embedding", "groups": 2, "num_codes": 9}, {}),
    "position embedding, a group for each expert": ({"top_k": 0}, {"source": "position_embedding", "groups": 4}, {}),
    "position embedding": ({"top_k": 1}, {"source": "position_embedding", "position_weight": 0.8}, {}),
    "layer state": ({"top_k": 2}, {"source": "layer_state", "num_codes": 7}, {}),
    "layer state, soft output": ({}, {"source": "layer_state", "soft_output": 20.0}, {}),
    "layer state, discrete and soft": ({"top_k": 0}, {"source": "layer_state", "soft_output": 20.0}, {}),
    "the paper's input": ({"code_blend": 1.0, "z_loss_weight": 0.01}, {**IN_LAYER, "commitment_weight": 0.1}, {}),
    "a part of the code": ({"code_blend": 0.3, "top_k": 0}, IN_LAYER, {}),
    "early block": ({"top_k": 0}, {"source": "early_block", "source_block": 1}, {}),
    "early block, every second": ({}, {"source": "early_block", "source_block": 0}, {"moe_every": 2}),
    "every second, wide dense": ({}, {}, {"moe_every": 2, "dense_hidden": 40, "rope_theta": 500.0}),
    "top-1": ({"router": "topk", "top_k": 1}, {}, {}),
    "top-2": ({"router": "topk", "top_k": 2}, {}, {}),
    "top-2, over all experts": ({"router": "topk", "top_k": 2}, {}, {"softmax_over": "all"}),
    "top-1, weight 1": ({"top_k": 1}, {}, {"softmax_over": "chosen"}),
    "norms of heads": ({}, {}, {"qk_norm": "heads"}),
    "norms of wide heads": ({"router": "topk", "top_k": 2}, {}, {"qk_norm": "heads", "head_width": 16}),
    "norms over narrow heads": ({}, {}, {"qk_norm": "full", "head_width": 8}),
    "grouped queries": ({"top_k": 0}, {}, {"heads": 4, "kv_heads": 2}),
    "one key-value head, normed over all": ({}, {}, {"heads": 4, "kv_heads": 1, "qk_norm": "full", "head_width": 8}),
    "llama3 positions": ({"top_k": 0}, {}, ROPE | {"rope_scaling": "llama3"}),
    "yarn positions": ({"router": "topk", "top_k": 2}, {}, ROPE | {"rope_scaling": "yarn"}),
    "linear positions": ({"router": "topk", "top_k": 2}, {}, ROPE | {"rope_scaling": "linear", "head_width": 16}),
    "biased queries, gated shared experts": (
        {"router": "topk", "top_k": 2, "shared_experts": 2, "shared_gate": True},
        {},
        {"qkv_bias": True, "heads": 4, "kv_heads": 2},
    ),
    "first block dense": ({"router": "topk", "top_k": 2}, {}, {"dense_layers": 1, "dense_hidden": 40}),
    "codes after two dense": ({"top_k": 0}, {"num_codes": 9}, {"dense_layers": 2}),
    "shared experts": ({"top_k": 0, "shared_experts": 2}, {}, {}),
    "shared experts, every second": ({"router": "topk", "top_k": 2, "shared_experts": 1}, {}, {"moe_every": 2}),
    "hash of tokens": ({"router": "hash_token"}, {}, {}),
    "hash and code": ({"router": "hash_and_code"}, {"num_codes": 9, "context_window": 2}, {}),
    "hash and code, ungated, averaged table": (
        {"router": "hash_and_code", "output_norm": True},
        {"num_codes": 9, "source": "token_embedding", "source_momentum": 0.9, "code_dim": 8},
        {"gated": False, "moe_every": 2},
    ),
    "hash and code, normed": ({"router": "hash_and_code", "output_norm": True, "shared_experts": 1}, {}, {}),
    "hash of n-grams": ({"router": "hash_ngrams"}, {}, {}),
    "hash of n-grams, three, normed": ({"router": "hash_ngrams", "output_norm": True}, {}, {"ngrams": 3}),
    "hash of n-grams, ungated, sliding window": (
        {"router": "hash_ngrams", "shared_experts": 1},
        {},
        {"gated": False, "ngrams": 4, "sliding_window": 4, "moe_every": 2},
    ),
    "hash of n-grams, one": ({"router": "hash_ngrams"}, {}, {"ngrams": 1}),
    "hash of tokens, normed": ({"router": "hash_token", "output_norm": True}, {}, {}),
    "top-2, normed": ({"router": "topk", "top_k": 2, "output_norm": True, "input_norm": True}, {}, {}),
    "context, normed": ({"output_norm": True}, {"num_codes": 9}, {}),
    "context, discrete only, normed": ({"top_k": 0, "output_norm": True}, {"num_codes": 9}, {}),
    "as released": ({"top_k": 2, "code_blend": 0.05, "input_norm": True, "output_norm": True}, IN_LAYER, {}),
    "dense": ({"router": "dense"}, {}, {}),
    "tied embeddings": ({}, {}, {"tie_embeddings": True}),
    "top-2, tied embeddings": ({"router": "topk", "top_k": 2}, {}, {"tie_embeddings": True, "sliding_window": 7}),
    "sliding window": ({"top_k": 0}, {}, {"sliding_window": 4}),
    "top-2, sliding window": ({"router": "topk", "top_k": 2}, {}, {"sliding_window": 5, "heads": 4, "kv_heads": 2}),
}


def config_of(case: str, vocab: int = VOCAB, length: int = LENGTH) -> RunConfig:
    moe, book, shape = CASES[case]
    model = {"vocab_size": vocab, "layers": 4, "width": 24, "heads": 2, "sequence_length": length, **shape}
    router = {"softmax_over": model.pop("softmax_over", "auto")}
    router |= {name: model.pop(name) for name in ("gated", "ngrams") if name in model}
    return RunConfig(model=model, moe={"num_experts": 4, "expert_hidden": 12, **moe}, codebook=book, router=router)


def model_of(config: RunConfig) -> MoETransformer:
    """A model in evaluation mode whose tables, norms and path gates are none of their initial values."""
    model = MoETransformer(config).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "path_gate" in name or name.endswith("bias"):
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        if model.bank is not None:
            shape = model.bank.code_map_LK.shape
            model.bank.code_map_LK.copy_(torch.randint(0, config.moe.num_experts, shape, generator=generator))
            model.bank.updates.fill_(17)
            model.source.follow(torch.randn(model.embed.weight.shape, generator=generator))
    return model


def tokens_of(batch: int = 3, length: int = LENGTH, vocab: int = VOCAB, seed: int = 0) -> Tensor:
    return torch.randint(0, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


class ModelReader(WeightsReader):
    """A model in memory as a checkpoint."""

    kind = "memory"

    def __init__(self, model: MoETransformer, path: Path = Path("memory"), step: int = 7) -> None:
        super().__init__()
        self.path, self.step = path, step
        self.config = model.config.model_dump(mode="json")
        self._parameters = {name: p.detach() for name, p in model.named_parameters()}
        self._buffers = {name: t for name, t in model.state_dict().items() if name not in self._parameters}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(p.shape) for name, p in self._parameters.items()}

    def buffers(self) -> dict[str, Tensor]:
        return dict(self._buffers)

    def pieces(self, name: str, kind: str = "fp32") -> list[Piece]:
        raise NotImplementedError

    def read(self, name: str, kind: str, start: int, count: int) -> Tensor:
        return self._parameters[name].flatten()[start : start + count].float()


def load_back(reader: CheckpointReader) -> MoETransformer:
    """The trainer's model with the weights and buffers of a reader; every tensor must find its place."""
    model = MoETransformer(RunConfig(**reader.config)).eval()
    state = {name: reader.tensor(name) for name in reader.names()} | reader.buffers()
    model.load_state_dict(state, strict=True)
    return model


def export(model: MoETransformer, folder: Path, **options: Any) -> list[str]:
    """``export_hf`` of a model in memory, by default without a tokenizer."""
    return export_hf(ModelReader(model), folder, ExportOptions(**{"tokenizer": "none", **options}))


def edit(path: Path, **values: Any) -> None:
    """Change values of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
