"""``tools/compare_routes.py``: do two ways to run a model send its tokens to the same experts?

Where training and inference route differently, a policy is optimized through experts that did not produce its samples.
Ways are precisions, key-value caches, exported models, other checkpoints of the same run and what an inference engine
recorded; routes are compared as sets of experts, token by token and layer by layer.

Legend: L MoE layers, B windows, S positions, T = B * S tokens, R routed rows per token.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vqmoe_ds.checkpoint.formats.huggingface.folder import ExportOptions, export_hf
from vqmoe_ds.checkpoint.formats.huggingface.names import hf_options
from vqmoe_ds.checkpoint.load_model import LoadedModel, load_model
from vqmoe_ds.checkpoint.open import open_checkpoint
from vqmoe_ds.config.routers import add_plugin_option
from vqmoe_ds.config.schema import RunConfig
from vqmoe_ds.evaluation.passes import Passes
from vqmoe_ds.evaluation.plots import drawing, pyplot, save
from vqmoe_ds.evaluation.probe import BATCH, check_tokens, load_routed, read_probe
from vqmoe_ds.evaluation.routing import differing, heard
from vqmoe_ds.experiments.recorded_routes import SUFFIX, read_routes, write_routes
from vqmoe_ds.moe.routers import Routing
from vqmoe_ds.runtime.device import memory_errors
from vqmoe_ds.runtime.errors import CheckpointError, ConfigError, DataError, reports_errors
from vqmoe_ds.runtime.extras import library
from vqmoe_ds.runtime.files import check_targets, write_json

WAYS = ("bf16", "cached", "hf", "mixtral")
"""bf16: weights in bfloat16; cached: token after token from a cache; hf, mixtral: the exported model in fp32."""


def build_parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", metavar="MODEL", help="run folder or checkpoint; its fp32 forward pass is the reference")
    add(
        "others",
        nargs="*",
        metavar="OTHER",
        help="checkpoints of the same model, such as a policy some steps older; or a .jsonl file of recorded routes",
    )
    add("--ways", nargs="*", choices=WAYS, default=["bf16", "cached"], help="of MODEL (default bf16 cached)")
    add("--data", metavar="SPEC", help="text or prepared data (default: what MODEL's run held out)")
    add("--tokens", type=int, default=4096, help="tokens to read (default 4096)")
    add("--tokenizer", metavar="TOKENIZER", help="of MODEL (default: the one it knows)")
    add("--json", metavar="FILE", help="write the figures")
    add("--record", metavar="FILE.jsonl", help="write the tokens and their routes in fp32, one sequence per line")
    add("--figure", metavar="FILE.png", help="draw the shares by layer")
    add_plugin_option(parser)
    return parser


@dataclass(frozen=True)
class Comparison:
    """Routes of one way against the reference."""

    way: str
    tokens: int
    differing: float
    """Share of (token, layer) pairs whose experts differ."""
    touched: float
    """Share of tokens that differ in some layer."""
    by_layer: list[float]
    discrete: float | None = None
    """As ``differing``, of the discrete row alone; None where there is none, or it is the only one."""


@reports_errors
def main(args: argparse.Namespace) -> int:
    """Compare, print a table and write what is asked for; the exit code."""
    check_tokens(args.tokens)
    outputs = {"--json": args.json, "--figure": args.figure, "--record": args.record}
    check_targets(outputs, [args.model, *args.others, args.data])
    with memory_errors(0, torch.device("cpu"), lambda: "give a smaller --tokens"):
        found = compare(args)
    print(table(found))
    if args.json:
        compared = {"model": args.model, "comparisons": [asdict(one) for one in found]}
        write_json(Path(args.json), compared, indent=2)
    if args.figure:
        with drawing(print):
            plot(Path(args.figure), found, args.model)
    return 0


def compare(args: argparse.Namespace) -> list[Comparison]:
    """Routes of every way that is asked for, against those of MODEL in fp32.

    Raises:
        CheckpointError: a model cannot be loaded or exported, or another one has other experts or reads other tokens.
        ConfigError: there is nothing to compare with, or a way is none for this router.
        DataError: as ``read_probe`` and ``read_routes``.
    """
    if not args.ways and not args.others:
        raise ConfigError("there is nothing to compare with; name a way with --ways, or another checkpoint")
    loaded = load_routed(args.model, args.tokenizer)
    for way in args.ways:
        _check_way(way, loaded.config)
    tokens_BS = read_probe(loaded, args.data, args.tokens)
    say = Passes(sys.stderr)
    reference_LTR = routes_of(loaded.model, tokens_BS, say("fp32", len(tokens_BS)))
    if args.record:
        write_routes(Path(args.record), tokens_BS, reference_LTR)
    moe = loaded.config.moe
    apart = moe.facts.uses_codebook and loaded.config.rows_per_token > 1
    found = []
    # Before the ways, which were checked: what they take long to find would be lost by an error here.
    for other in args.others:
        if other.endswith(SUFFIX):
            pair = _recorded(other, loaded, args.tokens)
        else:
            theirs = load_routed(other, args.tokenizer)
            pair = _of_another(theirs, loaded, tokens_BS, reference_LTR, say(other, len(tokens_BS)))
        found.append(against(*pair, other, apart))
    ways = [against(reference_LTR, _routes_by(way, loaded, tokens_BS, say), way, apart) for way in args.ways]
    return [*ways, *found]


def _check_way(way: str, config: RunConfig) -> None:
    """Refuse a way that a model has not, before any is tried."""
    if way == "cached":
        config.require_causal("decoding with a cache")
    elif way != "bf16":
        library("transformers", f"--ways {way}")
        hf_options(config, "vqmoe" if way == "hf" else way)


def _of_another(
    theirs: LoadedModel, ours: LoadedModel, tokens_BS: Tensor, ours_LTR: Tensor, done: Callable[[int], Any]
) -> tuple[Tensor, Tensor]:
    """Routes of our model and of another checkpoint of it, of one shape."""
    difference = _difference(ours, theirs, tokens_BS)
    if difference is None:
        theirs_LTR = routes_of(theirs.model, tokens_BS, done)
        mine, other = ours.config.moe, theirs.config.moe
        # Where k grows over a run, tokens of an earlier checkpoint have fewer experts; else it is another model.
        if (mine.router, mine.top_k) == (other.router, other.top_k):
            ours_LTR, theirs_LTR = padded(ours_LTR, theirs_LTR), padded(theirs_LTR, ours_LTR)
        if ours_LTR.shape == theirs_LTR.shape:
            return ours_LTR, theirs_LTR
        difference = "other layers or experts per token"
    raise CheckpointError(f"{theirs.path} is another model than {ours.path}: {difference}")


def padded(routes_LTR: Tensor, other_LTR: Tensor) -> Tensor:
    """Routes with -1 for the experts that each token has fewer than in others."""
    return F.pad(routes_LTR, (0, max(0, other_LTR.shape[-1] - routes_LTR.shape[-1])), value=-1)


def _recorded(path: str, loaded: LoadedModel, tokens: int) -> tuple[Tensor, Tensor]:
    """Routes of a model's forward pass and those of a file, each ``[L, T, R]``, until there are enough tokens."""
    ours, theirs = [], []
    for tokens_S, experts_LSR in read_routes(path, loaded.config):
        ours.append(routes_of(loaded.model, tokens_S[None]))
        theirs.append(experts_LSR)
        if ours[-1].shape != experts_LSR.shape:
            (layers, _, rows), (others, _, more) = ours[-1].shape, experts_LSR.shape
            raise DataError(
                f"{path} has routes of {others} layers and {more} experts per token; this model has {layers} MoE "
                f"layers and {rows}"
            )
        tokens -= len(tokens_S)
        if tokens <= 0:
            break
    if not ours:
        raise DataError(f"{path} holds no routes")
    return torch.cat(ours, dim=1), torch.cat(theirs, dim=1)


def _difference(ours: LoadedModel, theirs: LoadedModel, tokens_BS: Tensor) -> str | None:
    """Why one model cannot be asked for the routes of the other's tokens; None where it can."""
    experts, others = ours.config.moe.num_experts, theirs.config.moe.num_experts
    if experts != others:
        return f"{others} experts, not {experts}"
    mine, other = ours.tokenizer_checksum, theirs.tokenizer_checksum
    if mine != other and None not in (mine, other):
        return "it reads the ids of another tokenizer"
    if int(tokens_BS.max()) >= theirs.config.model.vocab_size:
        return f"its vocabulary has {theirs.config.model.vocab_size} tokens, not {ours.config.model.vocab_size}"
    length, context = tokens_BS.shape[1], theirs.config.model.sequence_length
    return f"it reads {context} tokens at once, not {length}" if context < length else None


def against(reference_LTR: Tensor, routes_LTR: Tensor, way: str, discrete_apart: bool = False) -> Comparison:
    """Where two routes differ, as sets of experts."""
    differs_LT = differing(reference_LTR, routes_LTR)
    discrete = None
    if discrete_apart:
        discrete = float((reference_LTR[..., -1] != routes_LTR[..., -1]).double().mean())
    by_layer = [float(share) for share in differs_LT.double().mean(dim=1)]
    touched = float(differs_LT.any(dim=0).double().mean())
    return Comparison(way, differs_LT.shape[1], float(differs_LT.double().mean()), touched, by_layer, discrete)


# ---------------------------------------------------------------- ways to run a model


def _routes_by(way: str, loaded: LoadedModel, tokens_BS: Tensor, say: Passes) -> Tensor:
    done = say(way, len(tokens_BS))
    if way == "bf16":
        # Loaded anew: the reference's own weights stay in fp32 for the ways after this one.
        return routes_of(load_model(loaded.path, precision="bf16").model, tokens_BS, done)
    if way == "cached":
        return routes_with_cache(loaded.model, tokens_BS, done)
    return routes_of_export(loaded, way, tokens_BS, done)


def _untold(windows: int) -> None:
    """Stands where nobody is told how many windows were read."""


def _in_batches(tokens_BS: Tensor, run: Callable[[Tensor], Tensor], done: Callable[[int], Any]) -> Tensor:
    """What ``run`` gives for a few windows at a time, ``[L, T, R]``: the logits of all would take the memory."""
    found = []
    for batch_BS in tokens_BS.split(BATCH):
        found.append(run(batch_BS))
        done(len(batch_BS))
    return torch.cat(found, dim=1)


def _heard(model: Any, run: Callable[[], Any]) -> Tensor:
    """The experts of every token in a forward pass, by its routers' own answers, int64 ``[L, T, R]``."""

    def pick(router: Any, inputs: Any, routing: Routing) -> Tensor:
        # Not what a layer tells for diagnostics, which has one shape over a run and may leave choices out.
        rows = routing.tokens_M is None and routing.slots is None
        experts_TR: Tensor = routing.expert_ids_TR if rows else router.experts_of_tokens(routing, len(inputs[0]))
        return experts_TR

    with heard([layer.router for layer in model.moe_layers()], pick) as seen:
        run()
    return torch.stack(seen)


@torch.no_grad()
def routes_of(model: Any, tokens_BS: Tensor, done: Callable[[int], Any] = _untold) -> Tensor:
    """Experts of every token in one forward pass over each window, int64 ``[L, T, R]``.

    Args:
        model: ours.
        tokens_BS: windows.
        done: told how many windows were read.
    """
    return _in_batches(tokens_BS, lambda batch_BS: _heard(model, lambda: model(batch_BS)), done)


@torch.no_grad()
def routes_with_cache(model: Any, tokens_BS: Tensor, done: Callable[[int], Any] = _untold) -> Tensor:
    """As ``routes_of``, each token read alone after those before it, as at generation."""

    def decode(batch_BS: Tensor) -> Tensor:
        cache = model.new_cache()
        positions = [_heard(model, partial(model, ids_B1, cache=cache)) for ids_B1 in batch_BS.split(1, dim=1)]
        return torch.stack(positions, dim=2).flatten(1, 2)  # [L, B, S, R]

    return _in_batches(tokens_BS, decode, done)


@torch.no_grad()
def routes_of_export(loaded: LoadedModel, arch: str, tokens_BS: Tensor, done: Callable[[int], Any] = _untold) -> Tensor:
    """As ``routes_of``, of the Hugging Face export: our class, or stock Mixtral where it computes the model."""
    transformers = library("transformers", f"--ways {arch}")
    with tempfile.TemporaryDirectory() as folder:
        place, kind = Path(folder) / "model", "vqmoe" if arch == "hf" else "mixtral"
        # Ids are at hand, and some tokenizers cannot be exported.
        export_hf(open_checkpoint(loaded.path), place, ExportOptions(arch=kind, tokenizer="none"))
        if arch == "mixtral":
            model = transformers.MixtralForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
            top_k = model.config.num_experts_per_tok

            def chosen(batch_BS: Tensor) -> Tensor:
                logits = model(batch_BS, output_router_logits=True).router_logits
                # Mixtral tells its routers' logits and not their choices, which are made here as its router makes them.
                return torch.stack([layer_TN.float().softmax(-1).topk(top_k).indices for layer_TN in logits])

            return _in_batches(tokens_BS, chosen, done)
        from vqmoe_ds.models.hf import VQMoEForCausalLM
        from vqmoe_ds.models.hf.routing_vqmoe import VQMoEExperts

        model = VQMoEForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
        experts = [module for module in model.modules() if isinstance(module, VQMoEExperts)]

        def asked(batch_BS: Tensor) -> Tensor:
            with heard(experts, lambda _layer, inputs, _outputs: inputs[1]) as seen:
                model(batch_BS, use_cache=False)
            return torch.stack(seen)

        return _in_batches(tokens_BS, asked, done)


# ---------------------------------------------------------------- what is shown


def table(found: list[Comparison]) -> str:
    """One line per way: shares that differ, in percent."""
    width = max(len(one.way) for one in found)
    lines = [f"{'way':{width}}  {'tokens':>9}  tokens x layers  tokens touched  discrete row  by layer"]
    for one in found:
        discrete = "-" if one.discrete is None else f"{one.discrete:.3%}"
        layers = " ".join(f"{share:.2%}" for share in one.by_layer)
        shares = f"{one.differing:>15.3%}  {one.touched:>14.3%}  {discrete:>12}  {layers}"
        lines.append(f"{one.way:{width}}  {one.tokens:>9,}  {shares}")
    return "routes that differ from the fp32 forward pass\n" + "\n".join(lines)


def plot(path: Path, found: list[Comparison], model: str) -> None:
    """Shares by layer, a line per way, as PNG."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(8, 4))
    for one in found:
        axes.plot(range(len(one.by_layer)), [100 * share for share in one.by_layer], marker="o", label=one.way)
    axes.set(xlabel="MoE layer", ylabel="tokens whose experts differ, %", title=model)
    axes.set_xticks(range(len(found[0].by_layer)))
    axes.grid(alpha=0.3)
    axes.legend()
    save(figure, path)
