"""Losses of a model on text, clean and damaged, over several seeds of the damage, and on texts of other domains.

Damaged text is scored twice from one pass. *Inputs only*: the model reads the damaged text, and is asked for the clean
tokens; compared with the same tokens in the clean text. *Inputs and targets*: it is asked for the damaged text itself,
as published for WikiText-103, so that a part of the rise is that the damage cannot be foretold.

Legend: N tokens, K targets per position (1 clean; 2 damaged).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np

from vqmoe_ds.checkpoint.load_model import LoadedModel
from vqmoe_ds.data.batches import MASKED
from vqmoe_ds.evaluation.corruption import Corruption, Damage
from vqmoe_ds.evaluation.perplexity import bits_per_byte
from vqmoe_ds.evaluation.statistics import mean_of
from vqmoe_ds.evaluation.texts import Text, still_there
from vqmoe_ds.evaluation.window import fitting_batch, score, windows_of
from vqmoe_ds.runtime.errors import ConfigError, DataError

MODES = ("inputs", "inputs_and_targets")
Tell = Callable[[int], Any]


@dataclass(frozen=True)
class Options:
    """Settings of an evaluation.

    Attributes:
        stride: targets scored per window, at most the context; None: half of it.
        batch_size: windows per forward pass; None: as many as 128 MiB of logits hold, at most 32.
        corruptions: kinds of damage.
        seeds: number of draws of each kind (seeds 0, 1, …).
    """

    stride: int | None = None
    batch_size: int | None = None
    corruptions: tuple[Corruption, ...] = ()
    seeds: int = 3


class Score(NamedTuple):
    """Sums over scored tokens; ``None`` where bytes or words are not known."""

    nats: float
    tokens: int
    bytes: int | None
    words: int | None

    def figures(self) -> dict[str, float | None]:
        """``nats_per_token``, ``perplexity`` (per token), ``word_perplexity`` and ``bits_per_byte``."""
        nats = self.nats / self.tokens if self.tokens else None
        return {
            "bits_per_byte": bits_per_byte(nats, self.bytes / self.tokens if self.bytes and self.tokens else None),
            "nats_per_token": nats,
            "perplexity": _perplexity(nats),
            "word_perplexity": _perplexity(self.nats / self.words if self.words else None),
        }


@dataclass
class Evaluation:
    """Results of an evaluation, ready for JSON.

    Attributes:
        model: checkpoint, step, router and sizes.
        setting: context, stride and data.
        clean: figures and counts of the clean text.
        corrupted: for each kind, rate and mode the figures of every seed, and their mean and standard error.
        shifted: for each text of another domain its figures, and their rise over the clean text.
    """

    model: dict[str, Any]
    setting: dict[str, Any]
    clean: dict[str, Any]
    corrupted: list[dict[str, Any]] = field(default_factory=list)
    shifted: list[dict[str, Any]] = field(default_factory=list)

    def lines(self) -> list[str]:
        """Figures for the user."""
        return table(asdict(self))


def evaluate(
    loaded: LoadedModel,
    texts: Sequence[Text],
    options: Options | None = None,
    rank: int = 0,
    world: int = 1,
    progress: Callable[[str, int], Tell] | None = None,
    shifted: Mapping[str, Sequence[Text]] | None = None,
) -> Evaluation:
    """Score documents, clean and under every corruption, and others; deterministic, and the same on all ranks.

    Args:
        loaded: of ``load_model``; with experts or sequences on several ranks all of them call this together.
        texts: of ``open_texts``.
        options: see there.
        rank, world: this process among those that share the windows.
        progress: given a name and the number of windows, returns what is told about windows done.
        shifted: documents of other domains, by the name of their row.

    Raises:
        ConfigError: a router that sees later tokens, or a stride that is longer than the context.
        DataError: damage was asked for, and no text is known to damage.
    """
    options = options or Options()
    # All targets of a window are scored in one pass: a router that sees later tokens would be told what is asked for.
    loaded.config.require_causal("scoring text")
    if options.corruptions and any(text.tokenizer is None for text in texts):
        raise DataError("the tokenizer of the data is unknown, so its text cannot be damaged; name it with --tokenizer")
    passes = _Passes(loaded, texts, options, rank, world, progress)
    clean = passes.clean
    result = Evaluation(about_model(loaded), passes.setting, {**clean.figures(), **_counts(clean)})
    for corruption in options.corruptions:
        seeds = [passes.damaged(corruption, seed) for seed in range(options.seeds)]
        for mode, rows in zip(MODES, zip(*seeds, strict=True), strict=True):
            result.corrupted.append(_summary(corruption, mode, list(rows)))
    for name, others in (shifted or {}).items():
        here = _score_of(others, passes.undamaged(name, others))
        result.shifted.append({"text": name, **here.figures(), **_counts(here), **_rise(here, clean)})
    return result


class _Passes:
    """Passes of one model over the same documents; the clean one is made at once."""

    def __init__(
        self,
        loaded: LoadedModel,
        texts: Sequence[Text],
        options: Options,
        rank: int,
        world: int,
        progress: Callable[[str, int], Tell] | None,
    ) -> None:
        model = loaded.config.model
        self.model, self.texts, self.context = loaded.model, texts, model.sequence_length
        self.stride = checked_stride(options.stride, self.context)
        # Where ranks share windows each has the logits of its own positions alone.
        here = self.context if self.model.share is None else self.context // self.model.share.size
        self.batch_size = options.batch_size or fitting_batch(here, model.vocab_size)
        self.rank, self.world, self.progress = rank, world, progress
        self.setting = {"context": self.context, "stride": self.stride, "documents": len(texts)}
        self.clean_N = self.undamaged("clean", texts)
        self.clean = _score_of(texts, self.clean_N)

    def _nats(self, name: str, texts: Sequence[Text], targets: list[np.ndarray]) -> np.ndarray:
        """Nats of every target, ``[K, N]`` over all documents."""
        windows = windows_of([len(text.ids_N) for text in texts], self.context, self.stride)
        tell = self.progress(name, len(windows)) if self.progress is not None else None
        joined = np.concatenate([text.ids_N for text in texts]), np.concatenate(targets, axis=1)
        return score(self.model, *joined, windows, self.batch_size, self.rank, self.world, tell).nats_KN

    def undamaged(self, name: str, texts: Sequence[Text]) -> np.ndarray:
        """Nats of every target of texts as they are, ``[N]`` over all of them."""
        return self._nats(name, texts, [text.ids_N[None] for text in texts])[0]

    def damaged(self, corruption: Corruption, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Figures of one draw of the damage, for each of ``MODES``."""
        # By the number among all documents, not among those of a rank: every rank damages all of them alike.
        damages = [text.damage(corruption, seed, number) for number, text in enumerate(self.texts)]
        damaged = [text.damaged(damage.edits) for text, damage in zip(self.texts, damages, strict=True)]
        sources = [_sources(*each) for each in zip(self.texts, damaged, damages, strict=True)]
        targets = [_targets(*each) for each in zip(self.texts, damaged, sources, strict=True)]
        nats_KN = self._nats(f"{corruption}, seed {seed}", damaged, targets)
        changed = sum(len(damage.edits) for damage in damages) / max(1, sum(damage.units for damage in damages))
        pairs = (self._inputs_only(sources, nats_KN[0]), (_score_of(damaged, nats_KN[1]), self.clean))
        # In the order of ``MODES``.
        only, both = (
            {"seed": seed, "changed": changed, **here.figures(), **_counts(here), **_rise(here, clean)}
            for here, clean in pairs
        )
        return only, both

    def _inputs_only(self, sources: list[np.ndarray], nats_N: np.ndarray) -> tuple[Score, Score]:
        """Scores of the clean tokens that can be asked for: in the damaged text, and the same ones in the clean one."""
        begins = np.cumsum([0, *(len(text.ids_N) for text in self.texts)])
        asked = [source[source >= 0] for source in sources]
        tokens = sum(map(len, asked))
        size = sum(int(sizes[part].sum()) for sizes, part in zip(map(_sizes, self.texts), asked, strict=True))
        # A token is no word: how many words are asked for is known only where all of them are.
        words = self.clean.words if tokens == self.clean.tokens else None
        nats = sum(float(self.clean_N[begin + part].sum()) for begin, part in zip(begins, asked, strict=False))
        return Score(float(nats_N.sum()), tokens, size, words), Score(nats, tokens, size, words)


def checked_stride(stride: int | None, context: int) -> int:
    """The stride asked for, or half the context.

    Raises:
        ConfigError: it would leave tokens out.
    """
    if stride is None:
        return max(1, context // 2)
    if not 1 <= stride <= context:
        raise ConfigError(f"--stride {stride} must lie between 1 and the model's context of {context} tokens")
    return stride


# ---------------------------------------------------------------- sums and rows


def _score_of(texts: Sequence[Text], nats_N: np.ndarray) -> Score:
    """Score of texts that are asked for themselves: all tokens but the first of each."""
    words = [text.words() for text in texts]
    told = all(text.starts_N is not None for text in texts)
    return Score(
        nats=float(nats_N.sum()),
        tokens=sum(max(0, len(text.ids_N) - 1) for text in texts),
        bytes=sum(int(_sizes(text)[1:].sum()) for text in texts) if told else None,
        words=None if None in words else sum(w or 0 for w in words),
    )


def _sizes(text: Text) -> np.ndarray:
    sizes = text.bytes_of_tokens()
    assert sizes is not None
    return sizes


def _sources(text: Text, damaged: Text, damage: Damage) -> np.ndarray:
    """Clean token asked for at each place of the damaged text; -1 also where either text begins."""
    source_N = still_there(text, damaged, damage.edits)
    source_N[source_N == 0] = -1
    source_N[:1] = -1
    return source_N


def _targets(text: Text, damaged: Text, source_N: np.ndarray) -> np.ndarray:
    # -1 reads the last id, which is not taken.
    clean_N = np.where(source_N >= 0, text.ids_N[source_N], MASKED)
    return np.stack([clean_N, damaged.ids_N])


def _rise(here: Score, clean: Score) -> dict[str, float | None]:
    """Increase of each figure over that of the clean text."""
    pairs = ((name, here.figures()[name], clean.figures()[name]) for name in ("bits_per_byte", "nats_per_token"))
    return {f"{name}_rise": None if a is None or b is None else a - b for name, a, b in pairs}


def _counts(score_: Score) -> dict[str, int | None]:
    return {"tokens": score_.tokens, "bytes": score_.bytes, "words": score_.words}


def _summary(corruption: Corruption, mode: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A row for each kind and mode: means over seeds, their standard errors, and every seed."""
    head = {"kind": corruption.kind, "rate": corruption.rate, "mode": mode}
    columns = [name for name in rows[0] if name != "seed"]
    values = {name: [row[name] for row in rows] for name in columns}
    # A mean over some of the seeds would be set beside means over all.
    known = {name: None if None in column else mean_of(column) for name, column in values.items()}
    mean = {name: found and found.mean for name, found in known.items()}
    error = {name: found and found.error for name, found in known.items()}
    return {**head, "mean": mean, "standard_error": error, "seeds": rows}


def _perplexity(nats: float | None) -> float | None:
    # ``math.exp`` raises an OverflowError above 709.
    return None if nats is None or nats > 700 else math.exp(nats)


def about_model(loaded: LoadedModel) -> dict[str, Any]:
    moe = loaded.config.moe
    return {
        "checkpoint": str(loaded.path),
        "kind": loaded.kind,
        "step": loaded.step,
        "router": moe.router,
        "experts": moe.num_experts,
        "top_k": moe.top_k,
        "tokenizer": loaded.tokenizer.kind if loaded.tokenizer else None,
    }


# ---------------------------------------------------------------- the table for the user

COLUMNS = {
    "bits_per_byte": ("bits/byte", ".4f"),
    "perplexity": ("perplexity", ".3f"),
    "word_perplexity": ("per word", ".2f"),
    "bits_per_byte_rise": ("rise, bits/byte", "+.4f"),
    "changed": ("changed", ".2%"),
}


def table(result: dict[str, Any]) -> list[str]:
    """Figures as lines of a table, means with their standard errors."""
    model, setting, clean = result["model"], result["setting"], result["clean"]
    amount = f"{clean['tokens']:,} tokens" + (f", {clean['bytes']:,} bytes" if clean["bytes"] is not None else "")
    lines = [
        f"{model['checkpoint']}, step {model['step']}: {model['router']}, {model['experts']} experts",
        f"{amount} of {setting['documents']} document(s); context {setting['context']}, stride {setting['stride']}",
    ]
    rows = [["", *(head for head, _ in COLUMNS.values())], ["clean", *_cells(clean, {})]]
    for row in result["corrupted"]:
        name = f"{row['kind']} {row['rate']:g}, {row['mode'].replace('_', ' ')}"
        rows.append([name, *_cells(row["mean"], row["standard_error"])])
    rows += [[row["text"], *_cells(row, {})] for row in result["shifted"]]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    layout = "  ".join([f"{{:<{widths[0]}}}", *(f"{{:>{width}}}" for width in widths[1:])])
    return lines + [layout.format(*row) for row in rows]


def _cells(mean: dict[str, Any], error: dict[str, Any]) -> list[str]:
    cells = []
    for name, (_, layout) in COLUMNS.items():
        value, spread = mean.get(name), error.get(name)
        cell = "-" if value is None else format(value, layout)
        cells.append(cell if spread is None or name == "changed" else f"{cell} ± {format(spread, layout.strip('+'))}")
    return cells
