"""``tools/inspect_routing.py``: which tokens or patches go to which experts and codes, and the effect on their states.

Legend: B windows, S positions, T = B * S tokens, D width, N experts, K codes, M routed rows, P tokens sampled.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import numpy as np
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
from vqmoe_ds.evaluation.image_patches import draw_patches, top_patches
from vqmoe_ds.evaluation.images import open_split
from vqmoe_ds.evaluation.information import information
from vqmoe_ds.evaluation.page import make_report, routing_figures
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
    data = "raw text, the prefix of prepared data, or images (default: what the run holds out)"
    add("--data", metavar="PATH", help=data)
    add("--against", metavar="CHECKPOINT2", help="another checkpoint of the same run, to measure fluctuation")
    add("--tokens", type=int, default=16384, help="tokens of the text, or patches, to read (default 16384)")
    add("--tokenizer", metavar="PATH", help="the model's tokenizer, where it is not found beside checkpoint or data")
    add("--out", metavar="DIR", required=True, help="folder for routing.html and routing.json")
    add_plugin_option(parser)
    return parser


def main(options: argparse.Namespace) -> int:
    """Measure and write the report; the exit code."""
    told = (options.checkpoint, options.data, options.against, options.tokens, options.tokenizer)
    return make_report("routing", options.out, lambda: inspect_routing(*told), routing_figures, _text)


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
    loaded = load_routed(checkpoint, tokenizer, images=True)
    other = load_routed(against, tokenizer, images=True) if against is not None else None
    if other is not None:
        check_same_run(loaded, other)
    measure = _of_images if loaded.config.model.image_size else _of_text
    report, inputs, traces = measure(loaded, data, tokens)
    if other is not None:
        # Routes alone are compared, so that of the other model no states are kept.
        for row, here, there in zip(report["layers"], traces, trace_layers(other.model, inputs, 0), strict=True):
            row["fluctuation"] = fluctuation(here, there)
    return {
        "checkpoint": about(loaded),
        "against": about(other) if other is not None else None,
        **report,
    }


def _of_text(loaded: LoadedModel, data: str | None, tokens: int) -> tuple[dict[str, Any], Tensor, list[Trace]]:
    """(what is read, its labels and the measures of each layer, the tokens, what the layers did)."""
    tokens_BS = read_probe(loaded, data, tokens)
    pieces = pieces_of(loaded.tokenizer, loaded.config.model.vocab_size)
    names = readable(pieces, loaded.tokenizer.eod if loaded.tokenizer is not None else None)
    labels = label_tokens(tokens_BS, pieces)
    traces = trace_layers(loaded.model, tokens_BS)
    report = {
        "probe": {
            "data": data or "held-out part of the run's data",
            "windows": tokens_BS.shape[0],
            "sequence_length": tokens_BS.shape[1],
            "tokens": tokens_BS.numel(),
        },
        "labels": {name: label.names for name, label in labels.items() if label.names},
        "layers": [measure_layer(trace, tokens_BS.flatten(), labels, names) for trace in traces],
    }
    return report, tokens_BS, traces


def _of_images(loaded: LoadedModel, data: str | None, tokens: int) -> tuple[dict[str, Any], Tensor, list[Trace]]:
    """As ``_of_text`` of images, and under ``pictures`` the patches of each code and expert by layer."""
    side = loaded.config.model.patch_size
    images, told = open_split(loaded, None if data is None else [data], "auto")
    images = images.evenly(-(-tokens // images.patches))
    batch = images.read(np.arange(len(images)))
    images_BHHC, labels_B = torch.from_numpy(batch.inputs_BS), torch.from_numpy(batch.targets_BS)
    places_BS = torch.arange(images.patches).expand(len(images), -1)
    labels = {
        "class": Labels(labels_B.unsqueeze(1).expand_as(places_BS), list(images.classes)),
        "place": Labels(places_BS, []),
    }
    traces = trace_layers(loaded.model, images_BHHC)
    layers, pictures = [measure_layer(trace, None, labels, []) for trace in traces], []
    for row, trace in zip(layers, traces, strict=True):
        strips = {}
        for name, choices in _choices(trace).items():
            found = top_patches(*choices, labels["class"].ids_BS.flatten(), images)
            row[f"{name}_patches"] = found
            strips[name] = [draw_patches(one["patches"], batch.inputs_BS, side) for one in found]
        pictures.append(strips)
    probe = {"data": told, "windows": len(images), "sequence_length": images.patches, "tokens": places_BS.numel()}
    report = {
        "probe": {**probe, "kind": "images"},
        "labels": {"class": list(images.classes)},
        "layers": layers,
        "pictures": {"patches": pictures},
    }
    return report, images_BHHC, traces


def _choices(trace: Trace) -> dict[str, tuple[Tensor, Tensor, Tensor, int]]:
    """Choices, who chose, how much, and how many there are: of experts by weight, of codes by nearness."""
    rows = trace.rows
    found = {"expert": (rows.experts_M, rows.tokens_M, rows.weights_M, trace.layer.num_experts)}
    if trace.codes_T is not None and trace.code_distances_T is not None:
        found["code"] = trace.codes_T, torch.arange(trace.tokens), -trace.code_distances_T, trace.num_codes
    return found


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
    # ``moe`` before ``router``: the options of another router have other names.
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
    code_distances_T: Tensor | None
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
        tokens_BS: the probe, ids or images.
        states: tokens whose states are kept.
    """
    length = tokens_BS.shape[1] if tokens_BS.dim() == 2 else model.config.model.sequence_length
    tokens = len(tokens_BS) * length
    # Not every n-th: that would be always the same positions of a window.
    drawn = torch.randperm(tokens, generator=torch.Generator().manual_seed(0))[:states]
    sampled_T = torch.zeros(tokens, dtype=torch.bool)
    sampled_T[drawn] = True
    parts: list[list[Any]] = [[] for _ in model.moe_layers()]
    for begin in range(0, len(tokens_BS), BATCH):
        here_T = sampled_T[begin * length : (begin + BATCH) * length]
        for visit in visit_layers(model, tokens_BS[begin : begin + BATCH]):
            rows = rows_of(visit.routing)
            # A visit counts the tokens of its own windows from 0.
            rows = Rows(rows.tokens_M + begin * length, rows.slots_M, rows.experts_M, rows.weights_M)
            before_PD, output_PD = visit.stream_TD[here_T], visit.y_TD[here_T]
            kept = {"before": before_PD, "input": visit.x_TD[here_T], "output": output_PD}
            # As ``Block`` adds them: between the layer and the next block's norm nothing could be hooked.
            kept["after"] = before_PD + output_PD
            parts[visit.index].append((rows, visit.codes_T, visit.code_distances_T, kept))
    sampled_P = sampled_T.nonzero().flatten()
    num_codes = model.bank.num_codes if model.bank is not None else 0
    return [
        _joined(layer, tokens, num_codes, sampled_P, some)
        for layer, some in zip(model.moe_layers(), parts, strict=True)
    ]


def _joined(layer: MoELayer, tokens: int, num_codes: int, sampled_P: Tensor, parts: list[Any]) -> Trace:
    all_rows, all_codes, all_distances, all_states = zip(*parts, strict=True)
    rows = Rows(*(torch.cat(some) for some in zip(*(vars(rows).values() for rows in all_rows), strict=True)))
    codes_T, distances_T = (torch.cat(some) if num_codes else None for some in (all_codes, all_distances))
    states = {name: torch.cat([some[name] for some in all_states]) for name in all_states[0]}
    return Trace(layer, tokens, rows, codes_T, distances_T, num_codes, sampled_P, states)


# ---------------------------------------------------------------- measures


def measure_layer(trace: Trace, ids_T: Tensor | None, labels: dict[str, Labels], names: list[str]) -> dict[str, Any]:
    """Every measure of one layer but fluctuation.

    Args:
        trace: what the layer did.
        ids_T: token ids of the probe; None of images, whose report has no tables of tokens.
        labels: of the probe's tokens, by name.
        names: readable text of every id.
    """
    rows, experts = trace.rows, trace.layer.num_experts
    report: dict[str, Any] = {"layer": trace.layer.layer, "experts": use_of(rows.experts_M, experts)}
    slots = int(rows.slots_M.max()) + 1
    if len(rows.tokens_M) == slots * trace.tokens:  # not where experts choose
        report["mean_weights"] = [float(rows.weights_M[rows.slots_M == slot].mean()) for slot in range(slots)]
    if ids_T is not None:
        report["expert_tokens"] = top_tokens(rows.experts_M, ids_T[rows.tokens_M], experts, names)
    routed = _router_rows(trace)
    report["information"] = {"expert": _information(rows.experts_M[routed], rows.tokens_M[routed], labels)}
    if trace.codes_T is not None:
        report["codes"] = use_of(trace.codes_T, trace.num_codes)
        if ids_T is not None:
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
