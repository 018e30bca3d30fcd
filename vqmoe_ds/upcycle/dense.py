"""Upcycling: a dense Hugging Face model of the Llama family becomes a VQMoE that computes the same function.

Every expert starts as a copy of the block's MLP, so whatever the router picks, the layer gives what the MLP gave;
training then lets the copies part (Komatsuzaki 2023). What our transformer lacks is either rewritten exactly (another
epsilon of the norms, multipliers) or refused by name.

Sources with experts of their own (``ROUTED``) are in ``routed.py``.

Legend: D width, H expert hidden width, N experts, G slices an MLP is cut into.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from vqmoe_ds.checkpoint.formats.huggingface.names import (
    is_sparse,
    shapes_of,
    unstacked,
    why_not_exported,
    why_not_read,
)
from vqmoe_ds.checkpoint.formats.huggingface.stock import (
    head_width_of,
    kv_heads_of,
    norm_scale_of,
    rope_of,
    said,
    weighs_over_all,
    window_of,
)
from vqmoe_ds.checkpoint.formats.portable import total_bytes, write_portable
from vqmoe_ds.checkpoint.io.archive import Stored
from vqmoe_ds.checkpoint.io.shards import read_json, read_weights
from vqmoe_ds.checkpoint.reader import Piece, WeightsReader, check_described
from vqmoe_ds.config.load import load_config
from vqmoe_ds.config.schema import QKNorm, RunConfig
from vqmoe_ds.data.json_tokenizer import data_of_folder
from vqmoe_ds.runtime.errors import CheckpointError, ConfigError
from vqmoe_ds.runtime.files import new_folder

DENSE = ("llama", "mistral", "qwen2", "qwen3", "granite")
ROUTED = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "granitemoe", "granitemoeshared")
QKV_BIASES = ("qwen2", "qwen2_moe")
QK_NORMS = {"qwen3": QKNorm.HEADS, "qwen3_moe": QKNorm.HEADS, "olmoe": QKNorm.FULL}
GRANITE_NAMES = {
    "block_sparse_moe.input_linear.weight": "mlp.experts.gate_up_proj",
    "block_sparse_moe.output_linear.weight": "mlp.experts.down_proj",
    "block_sparse_moe.router.layer.weight": "mlp.gate.weight",
}
"""Experts of Granite-MoE by the names that transformers has for the same stacks in a Mixtral."""
LACKING = {
    "kv_lora_rank": "whose attention is latent (kv_lora_rank), and this trainer's projects keys and values directly",
    "n_group": "whose router picks groups of experts first (n_group)",
    "linear_num_value_heads": "whose attention is linear in most blocks (linear_num_value_heads)",
}
"""Options of families that have a part no other model here has, and what it is."""
# A buffer in files of early versions of transformers; it follows from the options.
IGNORED = "rotary_emb.inv_freq"
MATRICES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


@dataclass(frozen=True)
class UpcycleOptions:
    """Options for making the experts.

    Attributes:
        granularity: G, slices that every copy of the MLP is cut into, each an expert of its own.
        noise: standard deviation of what is added to experts, relative to that of each matrix; 0 keeps the function.
    """

    granularity: int = 1
    noise: float = 0.0


class DenseSource:
    """A dense model of the Llama family in a Hugging Face folder, read tensor by tensor.

    Args:
        path: the folder.

    Raises:
        CheckpointError: not of that family, damaged, or with a part that our transformer cannot represent.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.options = read_json(self.path / "config.json")
        self.kind = str(self.options.get("model_type"))
        check_kind(self.options, self.path)
        self.stream_scale = norm_scale_of(self.options)
        self.weights = _by_known_names(read_weights(self.path), self.kind)
        self.qk_norm = QK_NORMS.get(self.kind, QKNorm.NONE)
        self.qkv_bias = self.kind in QKV_BIASES and bool(self.options.get("qkv_bias", True))
        self.width, self.layers = self._number("hidden_size"), self._number("num_hidden_layers")
        check_described({"model": {"layers": self.layers}}, self.weights, self.path)
        self.heads = self._number("num_attention_heads")
        self.kv_heads = int(self.options.get("num_key_value_heads") or self.heads)
        self.hidden = self._number("intermediate_size")
        self._refuse_what_is_lacking()

    @property
    def embed_scale(self) -> float:
        """Factor on the embeddings: Granite multiplies them."""
        return self.stream_scale * self._multiplier("embedding_multiplier")

    @property
    def branch_scale(self) -> float:
        """Factor on what attention, MLPs and experts add to the residual stream: Granite multiplies it."""
        return self.stream_scale * self._multiplier("residual_multiplier")

    @property
    def query_scale(self) -> float:
        """Factor on queries: Granite's scores have a scale of their own instead of 1 / sqrt(head width)."""
        scale = said(self.options, "attention_multiplier", None)
        if scale is None:
            return 1.0
        return float(scale) * math.sqrt(self.options.get("head_dim") or self.width // self.heads)

    def _multiplier(self, name: str) -> float:
        return float(self.options.get(name, 1.0))

    def data_section(self) -> dict[str, Any]:
        """The tokenizer of the source, so that data of another one is refused."""
        return {f"data.{name}": value for name, value in data_of_folder(self.path).items()}

    def model_section(self) -> dict[str, Any]:
        """Fields of the run configuration that the source decides."""
        return {
            "model.vocab_size": self._number("vocab_size"),
            "model.layers": self.layers,
            "model.width": self.width,
            "model.heads": self.heads,
            "model.kv_heads": kv_heads_of(self.options),
            "model.head_width": head_width_of(self.options),
            "model.qk_norm": self.qk_norm.value,
            "model.qkv_bias": self.qkv_bias,
            "model.sliding_window": window_of(self.options),
            **{f"model.{name}": value for name, value in self.rope.items()},
            **({} if self.tied else {"model.tie_embeddings": False}),
        }

    @property
    def tied(self) -> bool:
        """Whether the output layer is the embedding's weight; it stays so unless ``model.tie_embeddings`` is false."""
        return bool(self.options.get("tie_word_embeddings", False)) or "lm_head.weight" not in self.weights

    def default_section(self) -> dict[str, Any]:
        """Fields of the run configuration that the source fills in where they are not set."""
        length = int(self.options.get("max_position_embeddings", 2048))
        # The source's MLP has no norm behind it, and its weights do not bear the rate of a small model from scratch.
        fields = {"model.tie_embeddings": self.tied, "moe.output_norm": False, "train.learning_rate": 0.003}
        return {"model.sequence_length": length, **fields, **self.data_section()}

    def tensor(self, name: str) -> Tensor:
        """A weight in float32.

        Raises:
            CheckpointError: it is not there.
        """
        if name not in self.weights:
            raise CheckpointError(f"{self.path}: {name} is missing; does config.json belong to these weights?")
        return self.weights[name].whole().float()

    def _number(self, name: str) -> int:
        try:
            return int(self.options[name])
        except (KeyError, TypeError, ValueError, OverflowError):
            raise CheckpointError(f"{self.path / 'config.json'} has no number {name}") from None

    def _refuse_what_is_lacking(self) -> None:
        options, clip = self.options, self.options.get("clip_qkv")
        rope = options.get("rope_parameters") or options.get("rope_scaling") or {}
        partial = rope.get("partial_rotary_factor", options.get("partial_rotary_factor", 1.0))
        problems = {
            f"queries, keys and values are clipped (clip_qkv={clip})": clip is not None,
            f"only a part of each head is rotated (partial_rotary_factor={partial})": partial not in (None, 1.0),
            f"hidden_act={options.get('hidden_act')} is not silu": options.get("hidden_act", "silu") != "silu",
            "heads cannot be shared evenly among key-value heads": self.heads % self.kv_heads != 0,
        }
        found = why_not_read(options, self.weights) or next((why for why, there in problems.items() if there), None)
        if found is not None:
            raise CheckpointError(f"{self.path} cannot be represented: {found}")
        try:
            self.rope = rope_of(options)
        except CheckpointError as error:
            raise CheckpointError(f"{self.path} cannot be represented: {error}") from None
        known = set(self._known())
        for name, stored in self.weights.items():
            if name in known or name.endswith(IGNORED):
                continue
            if name.endswith(".bias") and not stored.whole().any():
                continue
            what = "a bias that is not zero" if name.endswith(".bias") else "which our transformer lacks"
            raise CheckpointError(f"{self.path} cannot be represented: it has {name}, {what}")

    def _known(self) -> list[str]:
        names = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
        for layer in range(self.layers):
            start = f"model.layers.{layer}."
            names += [f"{start}{norm}.weight" for norm in ("input_layernorm", "post_attention_layernorm")]
            names += [f"{start}self_attn.{letter}_proj.weight" for letter in "qkvo"]
            if self.qkv_bias:
                names += [f"{start}self_attn.{letter}_proj.bias" for letter in "qkv"]
            if self.qk_norm is not QKNorm.NONE:
                names += [f"{start}self_attn.{letter}_norm.weight" for letter in "qk"]
            names += [start + name for name in self.mlp_names(layer)]
        return names

    def mlp_names(self, layer: int) -> list[str]:
        """Weights of one block's MLP."""
        return [f"mlp.{name}.weight" for name in MATRICES.values()]

    def check_length(self, length: int) -> None:
        """Refuse a context that reaches past a sliding window which some layers alone have."""
        try:
            window_of(self.options, length)
        except CheckpointError as error:
            raise CheckpointError(f"{self.path} cannot be represented: {error}") from None


def check_kind(options: dict[str, Any], path: Path) -> None:
    """Refuse a family that cannot be upcycled before its weights are looked at.

    Raises:
        CheckpointError: it is one; what it has that this trainer lacks is named where that is known.
    """
    kind = str(options.get("model_type"))
    if kind in DENSE + ROUTED:
        return
    lacking = next((f", {what}" for name, what in LACKING.items() if options.get(name)), "")
    raise CheckpointError(
        f"{path} holds a model of type {kind}{lacking}; those that can be upcycled are {', '.join(DENSE + ROUTED)}"
    )


def _by_known_names(weights: dict[str, Stored], kind: str) -> dict[str, Stored]:
    """Weights expert by expert; those of Granite-MoE by the names of Mixtral."""
    if not kind.startswith("granitemoe"):
        return unstacked(weights, kind)
    renamed = {}
    for name, stored in weights.items():
        theirs = next((ending for ending in GRANITE_NAMES if name.endswith(ending)), None)
        renamed[name if theirs is None else name.removesuffix(theirs) + GRANITE_NAMES[theirs]] = stored
    return unstacked(renamed, "mixtral")


def upcycled_config(
    source: DenseSource, options: UpcycleOptions, overrides: dict[str, Any], file: str | None = None
) -> RunConfig:
    """The run configuration of the new model: the source's shape, ``moe`` and the rest as asked.

    Unless set, the router is vq with top_k 2 over 8 experts (for every slice), and the context that of the source.

    Raises:
        ConfigError: a field contradicts the source, or with it the function could not be preserved.
    """
    slices = options.granularity
    if slices < 1 or source.hidden % slices:
        raise ConfigError(f"--granularity {slices} does not divide the MLP's hidden width {source.hidden}")
    forced = source.model_section() | {"moe.expert_hidden": source.hidden // slices}
    # Loaded twice: file and overrides together say which blocks stay dense, and the width of those depends on it.
    asked = load_config("tiny", file, {**overrides, **forced})
    asked.print_notes()
    shape = asked.config.model
    sparse_everywhere = asked.config.moe.facts.has_experts and len(shape.moe_blocks) == shape.layers
    forced["model.dense_hidden"] = 0 if sparse_everywhere else source.hidden
    for name, value in forced.items():
        if overrides.get(name, value) != value:
            raise ConfigError(f"{name}={overrides[name]} contradicts the source, whose model has {value}; leave it out")
    defaults = {"moe.num_experts": 8 * slices, "moe.top_k": 2 * slices, **source.default_section()}
    free = {name: value for name, value in defaults.items() if name not in asked.explicit}
    config = load_config("tiny", file, {**overrides, **free, **forced}).config
    source.check_length(config.model.sequence_length)
    _check_function(config, slices)
    return config


def _check_function(config: RunConfig, slices: int) -> None:
    moe = config.moe
    if moe.shared_experts and moe.facts.has_experts:
        raise ConfigError(
            f"moe.shared_experts={moe.shared_experts} would add to what copies of the MLP give, so the function would "
            "not be preserved; leave it out"
        )
    linear = moe.facts.linear_gate(moe) is not None
    # The probabilities of all experts sum to 1, those of fewer do not.
    if linear and weighs_over_all(config) and moe.top_k < moe.num_experts:
        over = "moe.top_k=1" if moe.top_k == 1 else "router.softmax_over=all"
        raise ConfigError(
            f"with {over} the linear router weights experts by their probabilities among all, which sum to less than "
            "1, so copies of the MLP would not give its function; leave router.softmax_over out and set moe.top_k to 2 "
            "or more, or to 0 with moe.router=vq"
        )
    if moe.facts.uses_codebook and (moe.code_blend or config.codebook.soft_output):
        raise ConfigError(
            "moe.code_blend and codebook.soft_output change what experts give, so the function would not be "
            "preserved; set both to 0"
        )
    rows = moe.facts.rows_per_token(moe, config.router)
    if rows > 1 and not moe.facts.weights_rows(config):
        raise ConfigError(
            f"with moe.router={moe.router} each of the {rows} experts of a token counts as 1 here, so copies of the "
            f"MLP would give {rows} times its function; set router.gated=true"
        )
    if moe.norm is not None:
        raise ConfigError(
            "moe.input_norm and moe.output_norm change what experts see and give, so the function would not be "
            "preserved; set both to false"
        )
    if slices > 1 and not moe.facts.is_stock:
        raise ConfigError(
            f"--granularity {slices} needs moe.router=topk: a code names one expert, and one slice is not the whole MLP"
        )
    if moe.top_k % slices or moe.num_experts % slices:
        raise ConfigError(
            f"with --granularity {slices} moe.top_k={moe.top_k} and moe.num_experts={moe.num_experts} must be "
            f"multiples of {slices}, so that a token's experts make up whole MLPs"
        )


class UpcycledReader(WeightsReader):
    """The new model as a checkpoint of step 0 without an optimizer; one matrix is in memory at a time.

    Args:
        source: the dense model.
        config: of ``upcycled_config``.
        options: how experts are made.
    """

    kind = "upcycled"

    def __init__(self, source: DenseSource, config: RunConfig, options: UpcycleOptions) -> None:
        super().__init__()
        self.path, self.step, self._source, self._options = source.path, 0, source, options
        self._run = config
        self.config = config.model_dump(mode="json")
        self._shapes = shapes_of(config)
        # stream() reads a matrix in stretches, each of which would make it anew. A cache on the method would be shared
        # by all readers and keep them alive.
        self._unit = lru_cache(maxsize=2)(self._make_unit)

    def pieces(self, name: str, kind: str = "fp32") -> list[Piece]:
        raise CheckpointError(f"{name} is computed, not stored")

    def buffers(self) -> dict[str, Tensor]:
        """Fresh codebooks: random codes that are initialized from data at ``codebook.init_step``."""
        return fresh_buffers(self._run)

    def read(self, name: str, kind: str, start: int, count: int) -> Tensor:
        if kind != "fp32":
            raise CheckpointError(f"an upcycled model has no {kind} of {name}")
        whole = self._shapes[name]
        unit = math.prod(whole[1:]) if ".experts." in name else math.prod(whole)  # an expert, or the whole tensor
        stretches = []
        for index in range(start // unit, -(-(start + count) // unit)):
            first, last = max(start - index * unit, 0), min(start + count - index * unit, unit)
            stretches.append(self._unit(name, index)[first:last])
        return torch.cat(stretches)

    def _make_unit(self, name: str, index: int) -> Tensor:
        """One expert's matrix, or the whole of any other tensor, flat."""
        if name in ("embed.weight", "head.weight", "norm.weight"):
            made = self._outside(name)
        else:
            _, block, part = name.split(".", 2)
            made = self._inside(int(block), part, index)
        want = self._shapes[name][1:] if ".experts." in name else self._shapes[name]
        if tuple(made.shape) != want:
            raise CheckpointError(f"{self.path}: what becomes {name} has shape {list(made.shape)}, not {list(want)}")
        return made.contiguous().flatten()

    def _outside(self, name: str) -> Tensor:
        source = self._source
        divisor = float(source.options.get("logits_scaling", 1.0))
        if name == "norm.weight":
            weight = source.tensor("model.norm.weight")
            # A shared weight has the embedding's scale: the norm before the head makes up for it.
            return weight / (divisor * source.embed_scale) if self._run.ties_head else weight
        if name == "embed.weight":
            return source.tensor("model.embed_tokens.weight") * source.embed_scale
        return source.tensor("model.embed_tokens.weight" if source.tied else "lm_head.weight") / divisor

    def _inside(self, block: int, part: str, index: int) -> Tensor:
        source, start = self._source, f"model.layers.{block}."
        if part == "attention_norm.weight":
            return source.tensor(start + "input_layernorm.weight")
        if part == "mlp_norm.weight":
            return source.tensor(start + "post_attention_layernorm.weight")
        if part == "attention.out.weight":
            return source.tensor(start + "self_attn.o_proj.weight") * source.branch_scale
        if part == "attention.qkv.weight":
            return torch.cat([self._heads(start, letter) for letter in "qkv"])
        if part == "attention.qkv_bias":
            return torch.cat([source.tensor(f"{start}self_attn.{letter}_proj.bias") for letter in "qkv"])
        if part in ("attention.q_norm.weight", "attention.k_norm.weight"):
            return source.tensor(f"{start}self_attn.{part.removeprefix('attention.')}")
        if not is_sparse(self._run, block):
            matrix = source.tensor(f"{start}mlp.{part.split('.')[1]}_proj.weight")
            return matrix * source.branch_scale if part == "mlp.down.weight" else matrix
        if part.startswith("mlp.experts."):
            return self._expert(start, part.removeprefix("mlp.experts."), block, index)
        return self._router(part, block)

    def _heads(self, start: str, letter: str) -> Tensor:
        """Query, key or value weights of a block.

        Queries and keys that are normed are scaled, which turns the epsilon of their norm into ours; see
        ``norm_scale_of``.
        """
        source, weight = self._source, self._source.tensor(f"{start}self_attn.{letter}_proj.weight")
        weight = weight * source.query_scale if letter == "q" else weight
        return weight * source.stream_scale if source.qk_norm is not QKNorm.NONE and letter != "v" else weight

    def _expert(self, start: str, matrix: str, block: int, expert: int) -> Tensor:
        """Slice ``expert mod G`` of the MLP.

        A token's k experts are weighted by 1/k on average and make up k/G whole MLPs, so a slice gives G times its own.
        """
        slices, weight = self._options.granularity, self._source.tensor(f"{start}mlp.{MATRICES[matrix]}.weight")
        if matrix == "w2":
            weight = weight.chunk(slices, dim=1)[expert % slices] * (slices * self._source.branch_scale)
        else:
            weight = weight.chunk(slices, dim=0)[expert % slices]
        if self._options.noise:
            # Seeded by its place: an expert is the same however often it is made, and in whatever order.
            generator = self._generator(block, list(MATRICES).index(matrix), expert)
            noise = torch.randn(weight.shape, generator=generator)
            weight = weight + self._options.noise * weight.std() * noise
        return weight

    def _router(self, part: str, block: int) -> Tensor:
        """Small random weights; slices of one copy share a row, so that they are chosen together."""
        shape = self._shapes[f"blocks.{block}.{part}"]
        if part.endswith(".bias"):
            return torch.zeros(shape)
        # 7 is the number of no matrix, so no expert's noise has this seed. Zeros in place of draws would make all
        # logits equal, and leave the choice of experts to how topk breaks ties.
        generator = self._generator(block, 7, int("path_gate" in part))
        slices = 1 if "path_gate" in part else self._options.granularity
        rows = torch.randn(shape[0] // slices, *shape[1:], generator=generator) * shape[-1] ** -0.5
        return rows.repeat_interleave(slices, dim=0)

    def _generator(self, *place: int) -> torch.Generator:
        seed = self._run.train.seed
        for number in place:
            seed = (seed * 1_000_003 + number + 1) % 2**62
        return torch.Generator().manual_seed(seed)


def fresh_buffers(config: RunConfig) -> dict[str, Tensor]:
    """The persistent buffers that a new model of this configuration has.

    Raises:
        CheckpointError: a router whose state cannot be made here.
        ConfigError: what it reads at its start is missing, or not of this model.
    """
    from vqmoe_ds.moe.codebook import CodebookBank
    from vqmoe_ds.moe.sources import EmbeddingSource

    if reason := why_not_exported(config.moe):
        raise CheckpointError(f"a dense model cannot start as this one: {reason.replace('exported', 'upcycled')}")
    model, moe, book, seed = config.model, config.moe, config.codebook, config.train.seed
    layers = sum(is_sparse(config, block) for block in range(model.layers))
    buffers: dict[str, Tensor] = {}
    if moe.facts.uses_token_table:
        moe.facts.check_start(config, layers)
        buffers["token_table_LV"] = moe.facts.token_table(config, layers)
    if not moe.facts.uses_codebook:
        return buffers
    # As MoETransformer makes them, so that training begins with the codes of a new model.
    bank = CodebookBank(book, layers, moe.num_experts, model.width, seed)
    source = EmbeddingSource(book, model.vocab_size, model.width, model.sequence_length)
    buffers |= {f"bank.{name}": tensor for name, tensor in bank.state_dict().items()}
    return buffers | {f"source.{name}": tensor for name, tensor in source.state_dict().items()}


def upcycle(
    source: str | Path,
    target: str | Path,
    options: UpcycleOptions,
    overrides: dict[str, Any] | None = None,
    file: str | None = None,
    force: bool = False,
) -> UpcycledReader:
    """Write a portable checkpoint of step 0 made of a dense model.

    Args:
        source: Hugging Face folder.
        target: the portable folder; it appears whole or not at all.
        options: how experts are made.
        overrides: dotted names of the run configuration and their values.
        file: YAML of a run configuration, below ``overrides``.
        force: replace a target that exists.

    Raises:
        CheckpointError: SRC cannot be represented or DST exists.
        ConfigError: options that contradict SRC or would change the function.
    """
    dense = DenseSource(source)
    reader = UpcycledReader(dense, upcycled_config(dense, options, overrides or {}, file), options)
    target = Path(target)
    bar = tqdm(total=total_bytes(reader), unit="B", unit_scale=True, desc=target.name, disable=None)
    with new_folder(target, force) as folder, bar:
        write_portable(reader, folder, bar.update)
    return reader
