"""A Hugging Face Mixture-of-Experts model becomes a VQMoE whose codes take its router's place.

Mixtral, OLMoE, Qwen2-MoE, Qwen3-MoE and Granite-MoE differ in what their weights and options are called, in the norms
and biases of queries and keys, in whether the weights of a token's experts sum to 1, in shared experts and multipliers.

Attention, experts and, beside the codes, the router are those of the source. Each expert has one code: the mean of what
the code source shows of the tokens that the old router sends to it, measured on a calibration text. How often the new
route agrees with the old one, and what the change costs, is measured on text that was held out.

Legend: T tokens, S sequence, C code width, D width, N experts (and codes), L layers, k experts of a token.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vqmoe_ds.checkpoint.formats.huggingface.folder import settled_codebook
from vqmoe_ds.checkpoint.formats.huggingface.names import placement_of
from vqmoe_ds.checkpoint.formats.huggingface.stock import softmax_over_of
from vqmoe_ds.checkpoint.load_model import build_model
from vqmoe_ds.config.load import load_config
from vqmoe_ds.config.schema import CodeSource, RunConfig, SoftmaxOver
from vqmoe_ds.data.tokenizers import load_tokenizer
from vqmoe_ds.models.transformer import MoETransformer
from vqmoe_ds.moe.routers import Routing
from vqmoe_ds.runtime.errors import CheckpointError, ConfigError, DataError
from vqmoe_ds.runtime.files import open_regular
from vqmoe_ds.upcycle.dense import MATRICES, DenseSource, UpcycledReader, UpcycleOptions

GATE_BIAS = 2.0
"""Path gate at the start: the linear router's path weighs 98 %, so that little is lost before training."""
MOST_CALIBRATION = 10_000_000
"""Tokens: some hundreds for each of the experts there are anywhere, and more than an hour's work."""
SHARED = {
    "qwen2_moe": {
        **{f"{name}.weight": f"mlp.shared_expert.{name}_proj.weight" for name in ("gate", "up", "down")},
        "scale.weight": "mlp.shared_expert_gate.weight",
    },
    "granitemoeshared": {
        **dict.fromkeys(("gate.weight", "up.weight"), "shared_mlp.input_linear.weight"),
        "down.weight": "shared_mlp.output_linear.weight",
    },
}
"""Matrices of shared experts, ours and theirs, by family; Granite has gate and up projection in one."""
HELD_OUT = 10
"""One in this many calibration windows measures."""


class RoutedSource(DenseSource):
    """A model with experts, of a family in ``ROUTED``, in a Hugging Face folder; see ``DenseSource``."""

    @property
    def like_mixtral(self) -> bool:
        """Whether experts are named and weighted as in a Mixtral."""
        return self.kind == "mixtral" or self.kind.startswith("granitemoe")

    @property
    def shared_names(self) -> dict[str, str]:
        """Matrices of a block's shared expert: ours and theirs; none where there is none."""
        return SHARED.get(self.kind, {}) if self.shared_experts else {}

    @property
    def experts(self) -> int:
        return self._number("num_experts" if "num_experts" in self.options else "num_local_experts")

    @property
    def top_k(self) -> int:
        return self._number("num_experts_per_tok")

    @property
    def expert_hidden(self) -> int:
        return self._number("moe_intermediate_size") if self.kind in ("qwen2_moe", "qwen3_moe") else self.hidden

    @property
    def shared_experts(self) -> int:
        """Experts of the routed ones' width that the shared one is as wide as."""
        if self.kind not in SHARED:
            return 0
        moe = "expert_" if self.kind == "qwen2_moe" else ""
        together = self._number(f"shared_{moe}intermediate_size")
        if together % self.expert_hidden:
            raise CheckpointError(
                f"{self.path} has a shared expert of width {together}, which is no multiple of the routed ones' "
                f"{self.expert_hidden}, as it is in this trainer"
            )
        return together // self.expert_hidden

    @property
    def softmax_over(self) -> SoftmaxOver:
        """Over which experts the weights of the chosen sum to 1."""
        return softmax_over_of(self.like_mixtral or bool(self.options.get("norm_topk_prob", False)), self.top_k)

    @property
    def sparse_blocks(self) -> list[int]:
        """Blocks with experts."""
        step, dense = int(self.options.get("decoder_sparse_step", 1)), self.options.get("mlp_only_layers") or []
        return [block for block in range(self.layers) if block not in dense and (block + 1) % step == 0]

    def model_section(self) -> dict[str, Any]:
        placement = placement_of(self.sparse_blocks, self.layers)
        if placement is None:
            raise CheckpointError(
                f"{self.path} has experts in blocks {self.sparse_blocks} alone (mlp_only_layers, decoder_sparse_step); "
                "this trainer has them in the last of every n blocks, after the first k"
            )
        return super().model_section() | {
            **{f"model.{name}": value for name, value in placement.items()},
            "model.dense_hidden": 0 if len(self.sparse_blocks) == self.layers else self.hidden,
            "moe.num_experts": self.experts,
            "moe.expert_hidden": self.expert_hidden,
            "moe.shared_experts": self.shared_experts,
            "moe.shared_gate": "scale.weight" in self.shared_names,
        }

    def mlp_names(self, layer: int) -> list[str]:
        if layer not in self.sparse_blocks:
            return super().mlp_names(layer)
        routed = [self.expert_name(e, w) for e in range(self.experts) for w in MATRICES]
        return [self.router_name(), *routed, *self.shared_names.values()]

    def router_name(self) -> str:
        """The linear router of a block."""
        return "block_sparse_moe.gate.weight" if self.like_mixtral else "mlp.gate.weight"

    def expert_name(self, expert: int, matrix: str) -> str:
        """One matrix (``w1``, ``w2``, ``w3``) of one expert of a block."""
        if self.like_mixtral:
            return f"block_sparse_moe.experts.{expert}.{matrix}.weight"
        return f"mlp.experts.{expert}.{MATRICES[matrix]}.weight"


class RoutedReader(UpcycledReader):
    """The source's own experts and router under any router of ours.

    Args:
        source: a model with experts.
        config: of ``routed_config``.
        buffers: codebook to start with; None: fresh.
        scales: factor on the outputs of the experts, by block; 1 where none is given.
    """

    _source: RoutedSource

    def __init__(
        self,
        source: RoutedSource,
        config: RunConfig,
        buffers: dict[str, Tensor] | None = None,
        scales: dict[int, float] | None = None,
    ) -> None:
        super().__init__(source, config, UpcycleOptions())
        self._given, self._scales = buffers, scales or {}

    def buffers(self) -> dict[str, Tensor]:
        return super().buffers() if self._given is None else self._given

    def _expert(self, start: str, matrix: str, block: int, expert: int) -> Tensor:
        weight = self._source.tensor(start + self._source.expert_name(expert, matrix))
        return weight * (self._source.branch_scale * self._scales.get(block, 1.0)) if matrix == "w2" else weight

    def _shared(self, part: str, block: int) -> Tensor:
        names = self._source.shared_names
        weight = self._source.tensor(f"model.layers.{block}.{names[part]}")
        if part == "down.weight":
            return weight * self._source.branch_scale
        # input_linear of Granite's GraniteMoeSharedMLP: its product is cut by chunk(2), the gate first.
        together = names["gate.weight"] == names["up.weight"] == names[part]
        return weight.chunk(2)[part == "up.weight"] if together else weight

    def _router(self, part: str, block: int) -> Tensor:
        if part.endswith("path_gate.weight"):
            # The bias alone decides, so that no token begins with less of the router's path than GATE_BIAS says.
            return torch.zeros(2, self._source.width)
        if part.endswith("path_gate.bias"):
            # The linear router's path comes first: so DualRouter.beside reads the gate.
            return torch.tensor([GATE_BIAS, -GATE_BIAS])
        if part.startswith("mlp.shared."):
            return self._shared(part.removeprefix("mlp.shared."), block)
        return self._source.tensor(f"model.layers.{block}.{self._source.router_name()}")


@dataclass
class Report:
    """Effect of the change of routers, on held-out calibration text.

    Attributes:
        tokens: that the codes were made of.
        first_choice: share of tokens, by layer, whose code names the old router's first choice.
        any_choice: share whose code names one of its k choices.
        loss_before, loss_after: nats a token.
        unused: experts, by layer, that received no token and whose code is one token drawn at random.
    """

    tokens: int
    first_choice: list[float] = field(default_factory=list)
    any_choice: list[float] = field(default_factory=list)
    loss_before: float = 0.0
    loss_after: float = 0.0
    unused: list[int] = field(default_factory=list)

    def lines(self) -> list[str]:
        """Lines to print for the user."""
        return [
            f"codes are means of {self.tokens:,} tokens; experts without a token, by layer: {self.unused}",
            f"the code names the router's first choice for {_percent(self.first_choice)} of tokens, by layer",
            f"the code names one of the router's choices for {_percent(self.any_choice)} of tokens, by layer",
            f"loss {self.loss_before:.4f} before, {self.loss_after:.4f} after (nats a token, held-out text)",
        ]


def _percent(shares: list[float]) -> str:
    return ", ".join(f"{100 * share:.1f}" for share in shares) + " %"


def routed_config(
    source: RoutedSource, overrides: dict[str, Any], file: str | None = None, router: str = "vq"
) -> RunConfig:
    """The run configuration: the source's shape and experts; unless set, its top_k and codes in the layer's state.

    Raises:
        ConfigError: a field contradicts the source, or the code source has no meaning before training.
        CheckpointError: blocks with and without experts follow each other as they cannot with us.
    """
    forced = source.model_section() | {
        "moe.router": router,
        # One code for each expert, under mod and without groups: the index of a code is that of its expert.
        "codebook.num_codes": source.experts,
        "codebook.code_map": "mod",
        "codebook.groups": 1,
    }
    for name, value in forced.items():
        # Under topk the source itself is rebuilt to be measured, and nothing of that is the user's to set.
        if router == "vq" and overrides.get(name, value) != value:
            raise ConfigError(f"{name}={overrides[name]} contradicts what SRC becomes ({value}); leave it out")
    asked = load_config("tiny", file, {**overrides, **forced})
    asked.print_notes()
    routing = {"moe.top_k": source.top_k, "router.softmax_over": source.softmax_over.value}
    defaults = routing | {"codebook.source": "layer_state"} | source.default_section()
    defaults["model.sequence_length"] = min(defaults["model.sequence_length"], 4096)
    free = {name: value for name, value in defaults.items() if name not in asked.explicit}
    if router == "topk":
        forced |= routing
    config = load_config("tiny", file, {**overrides, **free, **forced}).config
    source.check_length(config.model.sequence_length)
    if config.codebook.source is CodeSource.EARLY_BLOCK or config.codebook.source_momentum:
        raise ConfigError(
            "codes cannot be calibrated with codebook.source=early_block or codebook.source_momentum; use "
            "codebook.source=layer_state or context"
        )
    return config


def with_codes(source: RoutedSource, config: RunConfig, ids: Tensor) -> tuple[RoutedReader, Report]:
    """The new model, its codes made of calibration tokens.

    Args:
        source: the old model; it is held in memory while it is measured.
        config: of ``routed_config``.
        ids: tokens in order, int64 ``[T]``.

    Raises:
        DataError: too few tokens.
    """
    length = min(config.model.sequence_length, 512)
    windows = ids[: len(ids) // (length + 1) * (length + 1)].view(-1, length + 1)
    if len(windows) < 2:
        raise DataError(f"{len(ids)} calibration tokens are too few; give at least {2 * (length + 1)}")
    # However few the windows are, one measures and one, at least, makes codes.
    held = torch.arange(len(windows)) % min(HELD_OUT, len(windows)) == 1
    report = Report(int((~held).sum()) * length)
    old = _load(RoutedReader(source, routed_config(source, _same_shape(config), router="topk")))
    means = _means(old, config, windows[~held])
    codes_LKC, report.unused = means.codes_LKC, means.unused
    buffers = settled_codebook(config, codes_LKC, torch.arange(source.experts).repeat(len(codes_LKC), 1))
    _compare(old, config, codes_LKC, windows[held], report)
    # Before the new model is built: no two of them need to be in memory.
    del old
    # Where the old weights do not sum to 1, an expert that stands alone gives what they gave together on average.
    scales = {} if config.moe.top_k else dict(zip(source.sparse_blocks, means.weight_L, strict=True))
    reader = RoutedReader(source, config, buffers, scales)
    report.loss_after = _loss(_load(reader), windows[held])
    return reader, report


def _same_shape(config: RunConfig) -> dict[str, Any]:
    return {"model.sequence_length": config.model.sequence_length}


def _load(reader: RoutedReader) -> MoETransformer:
    return build_model(reader, RunConfig(**reader.config))


class _Watcher:
    """Runs the old model and tells, layer by layer, what codes would look at and where the router sends it."""

    def __init__(self, model: MoETransformer, config: RunConfig) -> None:
        from vqmoe_ds.moe.codebook import CodebookBank
        from vqmoe_ds.moe.sources import EmbeddingSource

        shape, book = config.model, config.codebook
        self.model, self.book, self.layers = model, book, model.moe_layers()
        # settled_codebook makes the bank that is saved with the same seed, and so with the same projection.
        self.bank = CodebookBank(book, len(self.layers), config.moe.num_experts, shape.width, config.train.seed)
        self.source = EmbeddingSource(book, shape.vocab_size, shape.width, shape.sequence_length)
        self._seen: dict[int, tuple[Tensor, Routing]] = {}
        for index, layer in enumerate(self.layers):
            assert layer.router is not None
            layer.router.register_forward_hook(
                lambda _, inputs, routing, index=index: self._seen.update({index: (inputs[0], routing)})
            )

    @torch.no_grad()
    def run(self, tokens_BS: Tensor) -> list[tuple[Tensor, Routing]]:
        """Vectors that are compared with codes, ``[T, C]``, and the router's choices, best first, for every layer."""
        self.model(tokens_BS)
        seen = [self._seen[index] for index in range(len(self.layers))]
        sources = [x_TD for x_TD, _ in seen]
        if self.book.source is not CodeSource.LAYER_STATE:
            sources = [self.source(tokens_BS, self.model.embed(tokens_BS)).flatten(0, 1)] * len(self.layers)
        return [(self.bank.prepare(source), routing) for source, (_, routing) in zip(sources, seen, strict=True)]


@dataclass
class _Means:
    """Mean of the tokens of each expert, experts of each layer that had none, mean weight of a token's k experts."""

    codes_LKC: Tensor
    unused: list[int]
    weight_L: list[float]


def _means(model: MoETransformer, config: RunConfig, windows: Tensor) -> _Means:
    watcher = _Watcher(model, config)
    # float64: with k choices of MOST_CALIBRATION tokens counts pass the 2^24 that float32 holds exactly.
    sums = torch.zeros(watcher.bank.codes_LKC.shape, dtype=torch.float64)
    counts = torch.zeros(sums.shape[:2], dtype=torch.float64)
    weight_L = torch.zeros(len(sums), dtype=torch.float64)
    spare: list[Tensor] = []
    for batch in windows.split(4):
        spare = []
        for layer, (z_TC, routing) in enumerate(watcher.run(batch[:, :-1])):
            assert routing.weights_TR is not None
            weight_L[layer] += routing.weights_TR.sum(dtype=torch.float64)
            for ids_T in routing.expert_ids_TR.unbind(dim=1):
                sums[layer].index_add_(0, ids_T, z_TC.double())
                counts[layer] += torch.bincount(ids_T, minlength=counts.shape[1])
            spare.append(z_TC)
    codes = sums / counts.clamp_min(1).unsqueeze(-1)
    for layer, expert in (counts == 0).nonzero().tolist():
        # A prime spreads experts over the batch without a generator: the same tokens every time.
        codes[layer, expert] = spare[layer][(expert * 7919) % len(spare[layer])].double()
    # A mean of unit vectors is shorter than they are, and lookups by cosine rely on codes of unit length.
    codes = F.normalize(codes, dim=-1) if config.codebook.distance == "cosine" else codes
    return _Means(codes.float(), (counts == 0).sum(dim=1).tolist(), (weight_L / windows[:, :-1].numel()).tolist())


def _compare(model: MoETransformer, config: RunConfig, codes_LKC: Tensor, windows: Tensor, report: Report) -> None:
    watcher = _Watcher(model, config)
    watcher.bank.codes_LKC.copy_(codes_LKC)
    first, any_one = torch.zeros(len(codes_LKC)), torch.zeros(len(codes_LKC))
    for batch in windows.split(4):
        for layer, (z_TC, routing) in enumerate(watcher.run(batch[:, :-1])):
            # The index of a code is that of its expert: routed_config forces it.
            agrees_Tk = watcher.bank.lookup(layer, z_TC).unsqueeze(1) == routing.expert_ids_TR
            first[layer] += agrees_Tk[:, 0].sum()
            any_one[layer] += agrees_Tk.any(dim=1).sum()
    tokens = windows[:, :-1].numel()
    report.first_choice, report.any_choice = (first / tokens).tolist(), (any_one / tokens).tolist()
    report.loss_before = _loss(model, windows)


@torch.no_grad()
def _loss(model: MoETransformer, windows: Tensor) -> float:
    losses = [float(model(batch[:, :-1], batch[:, 1:])[0]) * len(batch) for batch in windows.split(4)]
    return sum(losses) / len(windows)


def calibration_ids(file: str, tokenizer: str, count: int, config: RunConfig) -> Tensor:
    """The first ``count`` tokens of a text, int64.

    Args:
        file: UTF-8 text.
        tokenizer: a Hugging Face folder, or what ``load_tokenizer`` takes.

    Raises:
        DataError: no such text or tokenizer, or ids that the model lacks.
    """
    if not 1 <= count <= MOST_CALIBRATION:
        raise ConfigError(f"--calibration_tokens {count} must lie between 1 and {MOST_CALIBRATION:,}")
    try:
        with io.TextIOWrapper(open_regular(file, links=True), encoding="utf-8-sig", errors="replace") as stream:
            text = stream.read(count * 8)  # characters; a token is rarely longer
    except OSError as error:
        raise DataError(f"calibration text {file} cannot be read: {error.strerror}") from None
    ids = torch.as_tensor(load_tokenizer(tokenizer).encode(text)[:count], dtype=torch.int64)
    if len(ids) and int(ids.max()) >= config.model.vocab_size:
        raise DataError(f"tokenizer {tokenizer} gives id {int(ids.max())}, the model knows {config.model.vocab_size}")
    return ids
