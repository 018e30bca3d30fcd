"""A Hugging Face Mixture-of-Experts model (Mixtral) becomes a VQMoE whose codes take its router's place.

Attention, experts and, beside the codes, the router are those of the source. Each expert has one code: the mean of what
the code source shows of the tokens that the old router sends to it, measured on a calibration text. How often the new
route agrees with the old one, and what the change costs, is measured on text that was held out.

Legend: T tokens, S sequence, C code width, D width, N experts (and codes), L layers, k experts of a token.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vqmoe_ds.checkpoint.huggingface import settled_codebook
from vqmoe_ds.checkpoint.upcycle import DenseSource, UpcycledReader, UpcycleOptions
from vqmoe_ds.config.schema import CodeSource, Router, RunConfig
from vqmoe_ds.errors import CheckpointError, ConfigError, DataError

GATE_BIAS = 2.0
"""Path gate at the start: the linear router's path weighs 98 %, so that little is lost before training."""
HELD_OUT = 10
"""One in this many calibration windows measures."""


class MixtralSource(DenseSource):
    """A Mixtral in a Hugging Face folder; see ``DenseSource``."""

    model_types = ("mixtral",)

    @property
    def experts(self) -> int:
        return self._number("num_local_experts")

    @property
    def top_k(self) -> int:
        return self._number("num_experts_per_tok")

    def mlp_names(self) -> list[str]:
        experts = [f"block_sparse_moe.experts.{e}.{w}.weight" for e in range(self.experts) for w in ("w1", "w2", "w3")]
        return ["block_sparse_moe.gate.weight", *experts]


class RoutedReader(UpcycledReader):
    """The source's own experts and router under any router of ours.

    Args:
        source: the Mixtral.
        config: of ``routed_config``.
        buffers: codebook to start with; None: fresh.
    """

    def __init__(self, source: MixtralSource, config: RunConfig, buffers: dict[str, Tensor] | None = None) -> None:
        super().__init__(source, config, UpcycleOptions())
        self._given = buffers

    def buffers(self) -> dict[str, Tensor]:
        return super().buffers() if self._given is None else self._given

    def _expert(self, start: str, matrix: str, block: int, expert: int) -> Tensor:
        weight = self._source.tensor(f"{start}block_sparse_moe.experts.{expert}.{matrix}.weight")
        return weight * self._source.stream_scale if matrix == "w2" else weight

    def _router(self, part: str, block: int) -> Tensor:
        if part.endswith("path_gate.weight"):
            return torch.zeros(2, self._source.width)
        if part.endswith("path_gate.bias"):
            return torch.tensor([GATE_BIAS, -GATE_BIAS])
        return self._source.tensor(f"model.layers.{block}.block_sparse_moe.gate.weight")


@dataclass
class Report:
    """What the change of routers did, on held-out calibration text.

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
        """For the user."""
        return [
            f"codes are means of {self.tokens:,} tokens; experts without a token, by layer: {self.unused}",
            f"the code names the router's first choice for {_percent(self.first_choice)} of tokens, by layer",
            f"the code names one of the router's choices for {_percent(self.any_choice)} of tokens, by layer",
            f"loss {self.loss_before:.4f} before, {self.loss_after:.4f} after (nats a token, held-out text)",
        ]


def _percent(shares: list[float]) -> str:
    return ", ".join(f"{100 * share:.1f}" for share in shares) + " %"


def routed_config(
    source: MixtralSource, overrides: dict[str, Any], file: str | None = None, router: Router = Router.VQ
) -> RunConfig:
    """The run configuration: the source's shape and experts; unless set, its top_k and codes in the layer's state.

    Raises:
        ConfigError: a field contradicts the source, or the code source has no meaning before training.
    """
    from vqmoe_ds.config.load import load_config

    forced = source.model_section() | {
        "model.moe_every": 1,
        "moe.router": router.value,
        "moe.num_experts": source.experts,
        "moe.expert_hidden": source.hidden,
        "codebook.num_codes": source.experts,
        "codebook.code_map": "mod",
    }
    for name, value in forced.items():
        if router is Router.VQ and overrides.get(name, value) != value:
            raise ConfigError(f"{name}={overrides[name]} contradicts what SRC becomes ({value}); leave it out")
    asked = load_config("tiny", file, {**overrides, **forced})
    length = int(source.options.get("max_position_embeddings", 2048))
    defaults = {"moe.top_k": source.top_k, "codebook.source": "layer_state", "model.sequence_length": min(length, 4096)}
    free = {name: value for name, value in defaults.items() if name not in asked.explicit}
    if router is Router.TOPK:
        free["moe.top_k"] = source.top_k
        forced["moe.top_k"] = source.top_k
    config = load_config("tiny", file, {**overrides, **free, **forced}).config
    source.check_length(config.model.sequence_length)
    if config.codebook.source is CodeSource.EARLY_BLOCK or config.codebook.source_momentum:
        raise ConfigError(
            "codes cannot be calibrated with codebook.source=early_block or codebook.source_momentum; use "
            "codebook.source=layer_state or context"
        )
    if source.top_k == 1 and source.experts > 1:
        raise CheckpointError(f"{source.path} has num_experts_per_tok=1, weighted by 1 there and otherwise here")
    return config


def with_codes(source: MixtralSource, config: RunConfig, ids: Tensor) -> tuple[RoutedReader, Report]:
    """The new model, its codes made of calibration tokens.

    Args:
        source: the Mixtral; it is held in memory while it is measured.
        config: of ``routed_config``.
        ids: tokens in order, int64 ``[T]``.

    Raises:
        DataError: too few tokens.
    """
    length = min(config.model.sequence_length, 512)
    windows = ids[: len(ids) // (length + 1) * (length + 1)].view(-1, length + 1)
    if len(windows) < 2:
        raise DataError(f"{len(ids)} calibration tokens are too few; give at least {2 * (length + 1)}")
    held = torch.arange(len(windows)) % min(HELD_OUT, len(windows)) == 1
    report = Report(int((~held).sum()) * length)
    old = _load(RoutedReader(source, routed_config(source, _same_shape(config), router=Router.TOPK)))
    codes_LKC, report.unused = _means(old, config, windows[~held])
    buffers = settled_codebook(config, codes_LKC, torch.arange(source.experts).repeat(len(codes_LKC), 1))
    _compare(old, config, codes_LKC, windows[held], report)
    del old
    reader = RoutedReader(source, config, buffers)
    report.loss_after = _loss(_load(reader), windows[held])
    return reader, report


def _same_shape(config: RunConfig) -> dict[str, Any]:
    return {"model.sequence_length": config.model.sequence_length}


def _load(reader: RoutedReader) -> Any:
    from vqmoe_ds.models.transformer import MoETransformer

    model = MoETransformer(RunConfig(**reader.config)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(reader.tensor(name))
    model.load_state_dict(reader.buffers(), strict=False)
    return model


class _Watcher:
    """Runs the old model and tells, layer by layer, what codes would look at and where the router sends it."""

    def __init__(self, model: Any, config: RunConfig) -> None:
        from vqmoe_ds.moe.codebook import CodebookBank
        from vqmoe_ds.moe.sources import EmbeddingSource

        shape, book = config.model, config.codebook
        self.model, self.book, self.layers = model, book, model.moe_layers()
        self.bank = CodebookBank(book, len(self.layers), config.moe.num_experts, shape.width, config.train.seed)
        self.source = EmbeddingSource(book, shape.vocab_size, shape.width, shape.sequence_length)
        self._seen: dict[int, Tensor] = {}
        for index, layer in enumerate(self.layers):
            layer.watch = True
            layer.register_forward_pre_hook(lambda _, inputs, index=index: self._seen.update({index: inputs[0]}))

    @torch.no_grad()
    def run(self, tokens_BS: Tensor) -> list[tuple[Tensor, Tensor]]:
        """For every layer what is compared with codes, ``[T, C]``, and the router's choices, best first, ``[T, k]``."""
        self.model(tokens_BS)
        sources = [self._seen[index] for index in range(len(self.layers))]
        if self.book.source is not CodeSource.LAYER_STATE:
            sources = [self.source(tokens_BS, self.model.embed(tokens_BS))] * len(self.layers)
        compared = [self.bank.prepare(source.flatten(0, 1)) for source in sources]
        return [(z_TC, layer.watched) for z_TC, layer in zip(compared, self.layers, strict=True)]


def _means(model: Any, config: RunConfig, windows: Tensor) -> tuple[Tensor, list[int]]:
    """Mean of the tokens of each expert, ``[L, N, C]``, and how many experts of each layer had none."""
    watcher = _Watcher(model, config)
    sums = torch.zeros(watcher.bank.codes_LKC.shape, dtype=torch.float64)
    counts = torch.zeros(sums.shape[:2], dtype=torch.float64)
    spare: list[Tensor] = []
    for batch in windows.split(4):
        spare = []
        for layer, (z_TC, ids_Tk) in enumerate(watcher.run(batch[:, :-1])):
            for ids_T in ids_Tk.unbind(dim=1):
                sums[layer].index_add_(0, ids_T, z_TC.double())
                counts[layer] += torch.bincount(ids_T, minlength=counts.shape[1])
            spare.append(z_TC)
    codes = sums / counts.clamp_min(1).unsqueeze(-1)
    for layer, expert in (counts == 0).nonzero().tolist():
        codes[layer, expert] = spare[layer][(expert * 7919) % len(spare[layer])].double()
    codes = F.normalize(codes, dim=-1) if config.codebook.distance == "cosine" else codes
    return codes.float(), (counts == 0).sum(dim=1).tolist()


def _compare(model: Any, config: RunConfig, codes_LKC: Tensor, windows: Tensor, report: Report) -> None:
    watcher = _Watcher(model, config)
    watcher.bank.codes_LKC.copy_(codes_LKC)
    first, any_one = torch.zeros(len(codes_LKC)), torch.zeros(len(codes_LKC))
    for batch in windows.split(4):
        for layer, (z_TC, ids_Tk) in enumerate(watcher.run(batch[:, :-1])):
            agrees_Tk = watcher.bank.lookup(layer, z_TC).unsqueeze(1) == ids_Tk
            first[layer] += agrees_Tk[:, 0].sum()
            any_one[layer] += agrees_Tk.any(dim=1).sum()
    tokens = windows[:, :-1].numel()
    report.first_choice, report.any_choice = (first / tokens).tolist(), (any_one / tokens).tolist()
    report.loss_before = _loss(model, windows)


@torch.no_grad()
def _loss(model: Any, windows: Tensor) -> float:
    losses = [float(model(batch[:, :-1], batch[:, 1:])[0]) * len(batch) for batch in windows.split(4)]
    return sum(losses) / len(windows)


# ---------------------------------------------------------------- the tool


def from_command_line(args: argparse.Namespace, overrides: dict[str, Any]) -> int:
    """What ``tools/upcycle.py`` does with a source that has experts; the exit code."""
    from vqmoe_ds.checkpoint.portable import new_folder, write_portable

    if args.granularity != 1 or args.noise:
        raise ConfigError("--granularity and --noise are for dense sources; SRC has experts of its own")
    if not args.calibration:
        raise ConfigError("SRC has experts, so its codes need --calibration FILE, a text like that of training")
    source = MixtralSource(args.source)
    config = routed_config(source, overrides, args.config)
    ids = calibration_ids(args.calibration, args.tokenizer or args.source, args.calibration_tokens, config)
    with new_folder(Path(args.target), args.force) as folder:
        reader, report = with_codes(source, config, ids)
        write_portable(reader, folder)
    print("\n".join([f"{args.target}: {source.experts} experts a layer, one code for each", *report.lines()]))
    return 0


def calibration_ids(file: str, tokenizer: str, count: int, config: RunConfig) -> Tensor:
    """The first ``count`` tokens of a text, int64.

    Args:
        file: UTF-8 text.
        tokenizer: a Hugging Face folder, or what ``load_tokenizer`` takes.

    Raises:
        DataError: no such text or tokenizer, or ids that the model lacks.
    """
    try:
        with open(file, encoding="utf-8", errors="replace") as stream:
            text = stream.read(count * 8)  # characters; a token is rarely longer
    except OSError as error:
        raise DataError(f"calibration text {file} cannot be read: {error.strerror}") from None
    ids = torch.as_tensor(_encode(text, tokenizer)[:count], dtype=torch.int64)
    if len(ids) and int(ids.max()) >= config.model.vocab_size:
        raise DataError(f"tokenizer {tokenizer} gives id {int(ids.max())}, the model knows {config.model.vocab_size}")
    return ids


def _encode(text: str, tokenizer: str) -> Any:
    if (Path(tokenizer) / "config.json").exists():
        if not (Path(tokenizer) / "tokenizer.json").exists():
            raise DataError(f"{tokenizer} has no tokenizer.json; name the model's tokenizer with --tokenizer")
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(Path(tokenizer) / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    from vqmoe_ds.data.tokenizers import load_tokenizer

    return load_tokenizer(tokenizer).encode(text)
