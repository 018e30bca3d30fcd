"""``tools/jacobian.py``: spectra of averaged Jacobians of several models on the same tokens."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from torch import Tensor

from vqmoe_ds.checkpoint.load_model import LoadedModel
from vqmoe_ds.config.routers import add_plugin_option
from vqmoe_ds.evaluation.page import make_report
from vqmoe_ds.evaluation.plots import draw_spectra
from vqmoe_ds.evaluation.probe import BATCH, check_tokens, load_routed, read_probe, visit_layers
from vqmoe_ds.evaluation.routing_report import about
from vqmoe_ds.experiments.jacobian import RANK_THRESHOLDS, MeanJacobian, gate_share, spectrum, token_jacobians
from vqmoe_ds.runtime.errors import CheckpointError

SINGLE_TOKENS = 16
"""Tokens, of the first batch, whose own Jacobians are looked at."""


def build_parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoints", metavar="CHECKPOINT", nargs="+", help="as tools/inspect_routing.py takes them")
    add(
        "--data",
        metavar="PATH",
        help="raw text or prefix of prepared data (default: the first run's held-out text)",
    )
    add("--tokens", type=int, default=4096, help="tokens of the text to average over (default 4096)")
    add("--tokenizer", metavar="PATH", help="the models' tokenizer, where it is not found beside checkpoints or data")
    add("--exact", action="store_true", help="with moe.code_blend > 0: the exact derivative, not straight-through")
    add("--out", metavar="DIR", required=True, help="folder for jacobian.html and jacobian.json")
    add_plugin_option(parser)
    return parser


def main(options: argparse.Namespace) -> int:
    """Measure and write the report; the exit code."""
    told = (options.checkpoints, options.data, options.tokens, options.tokenizer, not options.exact)
    return make_report("jacobian", options.out, lambda: study(*told), _figures, _text)


def study(
    checkpoints: list[str],
    data: str | None = None,
    tokens: int = 4096,
    tokenizer: str | None = None,
    straight_through: bool = True,
) -> dict[str, Any]:
    """Spectra of every MoE layer of every checkpoint, all on the same tokens.

    Args:
        checkpoints: anything ``load_model`` takes.
        data: as ``read_probe``, of the first checkpoint.
        tokens: how many to average over.
        tokenizer: as ``load_model``.
        straight_through: how discrete experts' inputs are differentiated (``jacobian``).

    Raises:
        CheckpointError: one cannot be read, is dense, has shared experts or a norm before its discrete experts, or
            reads other tokens than the first.
        ConfigError: no tokens are asked for.
        DataError: the text cannot be read.
    """
    check_tokens(tokens)
    models = [load_routed(path, tokenizer) for path in checkpoints]
    for path, model in zip(checkpoints, models, strict=True):
        _check_terms(path, model)
    for model in models[1:]:
        _check_same_tokens(models[0], model)
    tokens_BS = read_probe(models[0], data, tokens)
    where = data or "the held-out part of the first run's data"
    return {
        "probe": {"data": where, "windows": tokens_BS.shape[0], "tokens": tokens_BS.numel()},
        "rank_thresholds": list(RANK_THRESHOLDS),
        "models": [
            {**about(model), "name": name, "layers": _layers(model, tokens_BS, straight_through)}
            | {"straight_through": straight_through if model.config.moe.code_blend else None}
            for name, model in zip(_names(checkpoints), models, strict=True)
        ],
    }


def _layers(loaded: LoadedModel, tokens_BS: Tensor, straight_through: bool) -> list[dict[str, Any]]:
    means = [MeanJacobian(layer, straight_through) for layer in loaded.model.moe_layers()]
    single: dict[int, list[float]] = {}
    for start in range(0, len(tokens_BS), BATCH):
        for visit in visit_layers(loaded.model, tokens_BS[start : start + BATCH]):
            means[visit.index].add(visit)
            if start == 0:
                tokens = list(range(0, len(visit.x_TD), max(1, len(visit.x_TD) // SINGLE_TOKENS)))[:SINGLE_TOKENS]
                jacobians_PDD = token_jacobians(visit, tokens, straight_through)
                single[visit.index] = [spectrum(one_DD)["effective_rank"] for one_DD in jacobians_PDD]
    rows = []
    for index, (mean, layer) in enumerate(zip(means, loaded.model.moe_layers(), strict=True)):
        terms = mean.terms()
        row: dict[str, Any] = {"layer": index, **{name: spectrum(term_DD) for name, term_DD in terms.items()}}
        row["gate_share"] = gate_share(layer, terms["router"])
        ranks = single[index]
        row["single_tokens"] = {"effective_rank": sum(ranks) / len(ranks), "tokens": len(ranks)}
        rows.append(row)
    return rows


def _check_terms(path: str, loaded: LoadedModel) -> None:
    moe = loaded.config.moe
    input_norm = moe.input_norm and moe.facts.uses_codebook
    if input_norm or moe.shared_experts:
        what = "moe.input_norm=true" if input_norm else f"moe.shared_experts={moe.shared_experts}"
        raise CheckpointError(
            f"{path} has {what}, whose derivative is not among the terms of this report; use a model without them"
        )


def _check_same_tokens(first: LoadedModel, other: LoadedModel) -> None:
    one, two = (
        (m.config.model.sequence_length, m.config.model.vocab_size, m.tokenizer_checksum) for m in (first, other)
    )
    if one != two:
        raise CheckpointError(
            f"{other.path} reads windows of {two[0]} tokens of a vocabulary of {two[1]}, {first.path} windows of "
            f"{one[0]} of {one[1]}, or their tokenizers differ: Jacobians compare on the same tokens only"
        )


def _names(checkpoints: list[str]) -> list[str]:
    """The last parts of the paths by which they differ."""
    parts = [Path(path).parts for path in checkpoints]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            break
    return names


def _figures(report: dict[str, Any]) -> dict[str, Any]:
    return {"spectra": draw_spectra(report["models"])}


def _text(report: dict[str, Any]) -> str:
    lines = []
    for model in report["models"]:
        for row in model["layers"]:
            terms = [
                f"{name}: norm {row[name]['frobenius_norm']:.3f}, effective rank {row[name]['effective_rank']:.1f}, "
                f"numerical {'/'.join(str(rank) for rank in row[name]['numerical_rank'].values())}"
                for name in ("total", "experts", "router")
            ]
            lines.append(f"{model['name']} layer {row['layer']}: " + "; ".join(terms))
    return "\n".join(lines)
