"""``tools/inspect_routing.py``: which tokens go to which experts and codes, and the effect on their states.

Legend: B windows, S positions, T = B * S tokens, D width, N experts, K codes, M routed rows, P tokens sampled.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vqmoe_ds.checkpoint.load_model import LoadedModel
from vqmoe_ds.config.routers import add_plugin_option
from vqmoe_ds.evaluation.balance import busiest, gini, perplexity, variation
from vqmoe_ds.evaluation.collapse import (
    centred_spectrum,
    class_scatter,
    effective_rank,
    output_likeness,
    weight_likeness,
)
from vqmoe_ds.evaluation.information import information
from vqmoe_ds.evaluation.page import make_report
from vqmoe_ds.evaluation.probe import BATCH, Rows, check_tokens, load_routed, read_probe, rows_of, visit_layers
from vqmoe_ds.evaluation.token_labels import Labels, kinds, parts_of_speech, pieces_of, readable
from vqmoe_ds.models.transformer import MoETransformer
from vqmoe_ds.moe.layer import MoELayer
from vqmoe_ds.runtime.errors import CheckpointError

STATES = 4096
"""Number of tokens, drawn evenly, whose states are kept for ranks and scatter."""
LIKENESS_TOKENS = 512
"""Number of tokens that every expert runs on."""
TOP, RAREST = 12, 5
"""Number of tokens listed for an expert or a code; occurrences there that a token needs to be ranked by lift."""


def build_parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="run folder, tag, portable, Hugging Face or Megatron folder")
    add("--data", metavar="PATH", help="raw text or the prefix of prepared data (default: the run's held-out text)")
    add("--against", metavar="CHECKPOINT2", help="another checkpoint of the same run, to measure fluctuation")
    add("--tokens", type=int, default=16384, help="tokens of the text to read (default 16384)")
    add("--tokenizer", metavar="PATH", help="the model's tokenizer, where it is not found beside checkpoint or data")
    add("--out", metavar="DIR", required=True, help="folder for routing.html and routing.json")
    add_plugin_option(parser)
    return parser


def main(options: argparse.Namespace) -> int:
    """Measure and write the report; the exit code."""
    told = (options.checkpoint, options.data, options.against, options.tokens, options.tokenizer)
    return make_report("routing", options.out, lambda: inspect_routing(*told), _text)


def inspect_routing(
    checkpoint: str,
    data: str | None = None,
    against: str | None = None,
    tokens: int = 16384,
    tokenizer: str | None = None,
) -> dict[str, Any]:
    """All measures of docs/routing-report.md, for JSON and for the page.

    Args:
        checkpoint: anything ``load_model`` takes.
        data: as ``read_probe``.
        against: a checkpoint of the same run.
        tokens: number of tokens to read.
        tokenizer: as ``load_model``.

    Raises:
        CheckpointError: one cannot be read, is dense, or the two are not of one run.
        ConfigError: no tokens are asked for.
        DataError: the text cannot be read.
    """
    check_tokens(tokens)
    loaded = load_routed(checkpoint, tokenizer)
    other = load_routed(against, tokenizer) if against is not None else None
    if other is not None:
        check_same_run(loaded, other)
    tokens_BS = read_probe(loaded, data, tokens)
    pieces = pieces_of(loaded.tokenizer, loaded.config.model.vocab_size)
    names = readable(pieces, loaded.tokenizer.eod if loaded.tokenizer is not None else None)
    labels = label_tokens(tokens_BS, pieces)
    traces = trace_layers(loaded.model, tokens_BS)
    layers = [measure_layer(trace, tokens_BS.flatten(), labels, names) for trace in traces]
    if other is not None:
        for row, here, there in zip(layers, traces, trace_layers(other.model, tokens_BS, 0), strict=True):
            row["fluctuation"] = fluctuation(here, there)
    return {
        "checkpoint": about(loaded),
        "against": about(other) if other is not None else None,
        "probe": {
            "data": data or "held-out part of the run's data",
            "windows": tokens_BS.shape[0],
            "sequence_length": tokens_BS.shape[1],
            "tokens": tokens_BS.numel(),
        },
        "labels": {name: label.names for name, label in labels.items() if label.names},
        "layers": layers,
    }


def about(loaded: LoadedModel) -> dict[str, Any]:
    """Description of a checkpoint, in a few words."""
    config, bank = loaded.config, loaded.model.bank
    return {
        "path": str(loaded.path),
        "kind": loaded.kind,
        "step": loaded.step,
        "router": config.moe.router,
        "top_k": config.moe.top_k,
        "num_experts": config.moe.num_experts,
        "num_codes": bank.num_codes if bank is not None else None,
        "moe_layers": len(loaded.model.moe_layers()),
        "width": config.model.width,
        "tokenizer": loaded.tokenizer.kind if loaded.tokenizer is not None else None,
    }


def check_same_run(first: LoadedModel, second: LoadedModel) -> None:
    """Refuse checkpoints of different runs: numbers of experts mean the same only within one.

    Raises:
        CheckpointError: the two differ in model, experts, codes or seed.
    """
    for section, fields in {"moe": None, "model": None, "router": None, "codebook": None, "train": {"seed"}}.items():
        here, there = (getattr(c.config, section).model_dump(include=fields) for c in (first, second))
        for name in here:
            if here[name] != there[name]:
                raise CheckpointError(
                    f"{second.path} has {section}.{name}={there[name]}, {first.path} {here[name]}: fluctuation is "
                    "measured between checkpoints of one run"
                )


def label_tokens(tokens_BS: Tensor, pieces: list[bytes]) -> dict[str, Labels]:
    """Labels of every token: id, id before, position, kind, and its part of speech where there is a tagger."""
    before_BS = tokens_BS.roll(1, dims=1)
    before_BS[:, 0] = len(pieces)  # none
    positions_BS = torch.arange(tokens_BS.shape[1]).expand_as(tokens_BS)
    of_ids = {"token id": tokens_BS, "token before": before_BS, "position": positions_BS}
    labels = {name: Labels(ids_BS, []) for name, ids_BS in of_ids.items()}
    if any(pieces):
        labels["kind"] = kinds(tokens_BS, pieces)
        parts = parts_of_speech(tokens_BS, pieces)
        if parts is not None:
            labels["part of speech"] = parts
    return labels


# ---------------------------------------------------------------- what the layers did


@dataclass(frozen=True)
class Trace:
    """One MoE layer over the whole probe."""

    layer: MoELayer
    tokens: int
    rows: Rows
    codes_T: Tensor | None
    num_codes: int
    sampled_P: Tensor
    states: dict[str, Tensor]
    """States of the sampled tokens ``[P, D]``: ``before``, ``after`` (residual stream), ``input`` and ``output``."""

    def code_experts_T(self) -> Tensor:
        """The expert of every token's code: its discrete row is the last."""
        return self.rows.experts_M[self.rows.slots_M == self.rows.slots_M.max()]


def trace_layers(model: MoETransformer, tokens_BS: Tensor, states: int = STATES) -> list[Trace]:
    """Read the probe and keep what every MoE layer did.

    Args:
        model: in evaluation mode, with all its experts.
        tokens_BS: the probe.
        states: tokens whose states are kept.
    """
    tokens, length = tokens_BS.numel(), tokens_BS.shape[1]
    # Not every n-th: that would be always the same positions of a window.
    drawn = torch.randperm(tokens, generator=torch.Generator().manual_seed(0))[:states]
    sampled_T = torch.zeros(tokens, dtype=torch.bool)
    sampled_T[drawn] = True
    parts: list[list[Any]] = [[] for _ in model.moe_layers()]
    for begin in range(0, len(tokens_BS), BATCH):
        here_T = sampled_T[begin * length : (begin + BATCH) * length]
        for visit in visit_layers(model, tokens_BS[begin : begin + BATCH]):
            rows = rows_of(visit.routing)
            rows = Rows(rows.tokens_M + begin * length, rows.slots_M, rows.experts_M, rows.weights_M)
            before_PD, output_PD = visit.stream_TD[here_T], visit.y_TD[here_T]
            kept = {"before": before_PD, "input": visit.x_TD[here_T], "output": output_PD}
            parts[visit.index].append((rows, visit.codes_T, kept | {"after": before_PD + output_PD}))
    sampled_P = sampled_T.nonzero().flatten()
    num_codes = model.bank.num_codes if model.bank is not None else 0
    return [
        _joined(layer, tokens, num_codes, sampled_P, some)
        for layer, some in zip(model.moe_layers(), parts, strict=True)
    ]


def _joined(layer: MoELayer, tokens: int, num_codes: int, sampled_P: Tensor, parts: list[Any]) -> Trace:
    all_rows, all_codes, all_states = zip(*parts, strict=True)
    rows = Rows(*(torch.cat(some) for some in zip(*(vars(rows).values() for rows in all_rows), strict=True)))
    codes_T = torch.cat(all_codes) if num_codes else None
    states = {name: torch.cat([some[name] for some in all_states]) for name in all_states[0]}
    return Trace(layer, tokens, rows, codes_T, num_codes, sampled_P, states)


# ---------------------------------------------------------------- measures


def measure_layer(trace: Trace, ids_T: Tensor, labels: dict[str, Labels], names: list[str]) -> dict[str, Any]:
    """Every measure of one layer but fluctuation.

    Args:
        trace: what the layer did.
        ids_T: token ids of the probe.
        labels: of the probe's tokens, by name.
        names: readable text of every id.
    """
    rows, experts = trace.rows, trace.layer.num_experts
    report: dict[str, Any] = {"layer": trace.layer.layer, "experts": use_of(rows.experts_M, experts)}
    slots = int(rows.slots_M.max()) + 1
    if len(rows.tokens_M) == slots * trace.tokens:  # not where experts choose
        report["mean_weights"] = [float(rows.weights_M[rows.slots_M == slot].mean()) for slot in range(slots)]
    report["expert_tokens"] = top_tokens(rows.experts_M, ids_T[rows.tokens_M], experts, names)
    routed = _router_rows(trace)
    report["information"] = {"expert": _information(rows.experts_M[routed], rows.tokens_M[routed], labels)}
    if trace.codes_T is not None:
        report["codes"] = use_of(trace.codes_T, trace.num_codes)
        report["code_tokens"] = top_tokens(trace.codes_T, ids_T, trace.num_codes, names)
        report["information"]["code"] = _information(trace.codes_T, torch.arange(trace.tokens), labels)
    report["likeness"] = {
        "weights": weight_likeness(trace.layer.experts)._asdict(),
        "outputs": output_likeness(trace.layer.experts, trace.states["input"][:LIKENESS_TOKENS])._asdict(),
    }
    report["collapse"] = _collapse(trace)
    return report


def use_of(choices_M: Tensor, count: int) -> dict[str, Any]:
    """Measures of how evenly ``count`` experts or codes are used."""
    counts = torch.bincount(choices_M, minlength=count)
    return {
        "counts": counts.tolist(),
        "busiest": float(busiest(counts)),
        "variation": float(variation(counts)),
        "gini": float(gini(counts)),
        "perplexity": perplexity(counts.unsqueeze(0))[0],
        "dead": int((counts == 0).sum()),
    }


def top_tokens(choices_M: Tensor, ids_M: Tensor, count: int, names: list[str]) -> list[dict[str, Any]]:
    """The tokens of each expert or code: most frequent, and most over-represented among those seen ``RAREST`` times.

    ``lift`` is a token's share here over its share everywhere.
    """
    everywhere_V = torch.bincount(ids_M, minlength=len(names))
    answer = []
    for choice in range(count):
        here_V = torch.bincount(ids_M[choices_M == choice], minlength=len(names))
        total = int(here_V.sum())
        lift_V = (here_V / max(1, total)) / (everywhere_V / len(ids_M)).clamp_min(1e-12)
        by_lift_V = torch.where(here_V >= RAREST, lift_V, 0.0)
        row: dict[str, Any] = {"total": total}
        for order, score_V in (("by_count", here_V), ("by_lift", by_lift_V)):
            best = score_V.topk(min(TOP, len(names)))
            chosen = [i for i, score in zip(best.indices.tolist(), best.values.tolist(), strict=True) if score > 0]
            row[order] = [
                {"token": names[i], "id": i, "count": int(here_V[i]), "lift": round(float(lift_V[i]), 3)}
                for i in chosen
            ]
        answer.append(row)
    return answer


def _router_rows(trace: Trace) -> Tensor:
    """Rows that a router chose: all but the discrete one of a dual path, which the code itself describes better."""
    slots_M = trace.rows.slots_M
    dual = trace.codes_T is not None and slots_M.max() > 0
    return slots_M < slots_M.max() if dual else torch.ones_like(slots_M, dtype=torch.bool)


def _information(choices_M: Tensor, tokens_M: Tensor, labels: dict[str, Labels]) -> dict[str, Any]:
    found = {name: information(label.ids_BS.flatten()[tokens_M], choices_M) for name, label in labels.items()}
    return {name: {**one._asdict(), "explained": one.explained} for name, one in found.items()}


def _collapse(trace: Trace) -> dict[str, Any]:
    main_T = trace.rows.main_expert_T(trace.tokens, trace.layer.num_experts)
    classes = {"expert": main_T[trace.sampled_P]}
    if trace.codes_T is not None:
        classes["code"] = trace.codes_T[trace.sampled_P]
    report: dict[str, Any] = {"tokens": len(trace.sampled_P)}
    for name, x_PD in trace.states.items():
        row: dict[str, Any] = {"effective_rank": effective_rank(centred_spectrum(x_PD))}
        for kind, classes_P in classes.items():
            scatter = class_scatter(x_PD, classes_P)
            row[kind] = {**scatter._asdict(), "between_share": scatter.between_share}
        report[name] = row
    return report


def fluctuation(here: Trace, there: Trace) -> dict[str, float]:
    """Shares of tokens that differ between two checkpoints of a run (routing fluctuation of StableMoE and X-MoE).

    ``experts``: sent to any other expert; ``main_expert``: the expert of largest weight; ``codes`` and
    ``code_experts``: another code, another expert of the code.
    """
    sent = [trace.rows.counts_TN(trace.tokens, trace.layer.num_experts) for trace in (here, there)]
    main = [trace.rows.main_expert_T(trace.tokens, trace.layer.num_experts) for trace in (here, there)]
    report = {
        "experts": _share((sent[0] != sent[1]).any(dim=1)),
        "main_expert": _share(main[0] != main[1]),
    }
    if here.codes_T is not None and there.codes_T is not None:
        report["codes"] = _share(here.codes_T != there.codes_T)
        report["code_experts"] = _share(here.code_experts_T() != there.code_experts_T())
    return report


def _share(changed_T: Tensor) -> float:
    return float(changed_T.double().mean())


def _text(report: dict[str, Any]) -> str:
    top = report["checkpoint"]
    lines = [f"{top['path']}: {top['router']}, step {top['step']}, {report['probe']['tokens']:,} tokens"]
    for row in report["layers"]:
        use, collapse = row["experts"], row["collapse"]
        line = f"  layer {row['layer']}: busiest {use['busiest']:.2f} x mean, CV {use['variation']:.2f}"
        line += f", Gini {use['gini']:.2f}"
        if "codes" in row:
            line += f"; {row['codes']['perplexity']:.1f} of {len(row['codes']['counts'])} codes in use"
        ranks = f"{collapse['before']['effective_rank']:.1f} -> {collapse['after']['effective_rank']:.1f}"
        line += f"; effective rank {ranks}; outputs' cosine {row['likeness']['outputs']['mean']:.2f}"
        if "fluctuation" in row:
            line += f"; fluctuation {row['fluctuation']['experts']:.3f}"
        lines.append(line)
    return "\n".join(lines)
