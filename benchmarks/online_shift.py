#!/usr/bin/env python
"""Recovery of models when the data they are trained on change their domain, and how far their routes move.

    python benchmarks/online_shift.py --domains data/wikitext2 data/shakespeare --steps 60 --rounds 2 --seeds 3 \
        --model "VQ, frozen codebook=runs/vq" --model "VQ, moving codebook=runs/vq,codebook.learning=ema" \
        --model "top-2=runs/topk" --out runs/shift

Every model goes on from its checkpoint through a stream that takes its text from the domains in turn, --steps optimizer
steps from each, --rounds times around; the domain of pretraining comes first. Each window is seen once and its loss is
taken before it is learned from. After a change of domain the table has the loss of the first steps and of the last
ones, the steps until nine tenths of the fall between them are made, the share of fixed held-out tokens of that
domain whose expert moved meanwhile, the perplexity of the codes of all tokens in between, and what the stretch ended
with on data held out from that domain. Text is prepared with the tokenizer of the checkpoints, and codes are taken
without their continuous path, as in fine-tuning; classifiers of images (spectrograms too) go on as they are, their
losses are in nats per image and what is held out counts in percent of right answers.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from measuring import table, write_json

from vqmoe_ds.checkpoint.reader import CheckpointReader
from vqmoe_ds.config.deepspeed_json import resolve
from vqmoe_ds.config.load import LoadedConfig, load_config
from vqmoe_ds.data.batches import Batch, Batches
from vqmoe_ds.data.images import ImageSet, open_images
from vqmoe_ds.evaluation.classification import classify
from vqmoe_ds.evaluation.images import check_classes
from vqmoe_ds.evaluation.perplexity import bits_per_byte, validate
from vqmoe_ds.evaluation.plots import pyplot, save
from vqmoe_ds.evaluation.routing import RoutingHealth
from vqmoe_ds.evaluation.statistics import mean_of, paired_difference
from vqmoe_ds.models.session import Session
from vqmoe_ds.runtime.errors import ConfigError, reports_errors
from vqmoe_ds.runtime.ranks import find_place
from vqmoe_ds.runtime.torch_setup import set_up_torch
from vqmoe_ds.train.engine import build_session
from vqmoe_ds.train.loop import Callback, StepResult, Trainer

ROOT = Path(__file__).resolve().parent.parent
DS_CONFIG = str(ROOT / "ds_configs" / "zero0.json")
HELD_OUT = 8
"""Batches of held-out text that are scored at every change."""
IMAGES = 2000
"""Held-out images that are."""
ENDS = 5
"""Steps that count as the first of a stretch; three times as many count as its last."""
COLUMNS = {
    "first": f"first {ENDS} steps",
    "last": f"last {3 * ENDS} steps",
    "mean": "all steps",
    "recovery": "steps to recover",
    "moved": "routes moved",
    "codes": "codes in use",
    "held_out": "held out, at the end",
}


@dataclass
class Stream:
    """Training batches of the domains in turn, each going on where it was left; a ``Batches``."""

    parts: Sequence[Batches]
    steps: int
    batch_size: int

    @property
    def masked(self) -> bool:
        return any(part.masked for part in self.parts)

    def domain(self, step: int) -> int:
        return step // self.steps % len(self.parts)

    def micro_batches(self, first: int, rank: int, world: int, size: int) -> list[Batch]:
        step = first // self.batch_size
        seen = step // (self.steps * len(self.parts)) * self.steps + step % self.steps
        return self.parts[self.domain(step)].micro_batches(seen * self.batch_size, rank, world, size)

    def epoch(self, samples: int) -> float:
        return self.parts[0].epoch(samples)


@dataclass
class Watch(Callback):
    """Loss of every step, and at every change of domain the routes of fixed tokens and the loss on all domains."""

    stream: Stream
    windows: Sequence[Any]
    losses: list[float] = field(default_factory=list)
    moved: list[list[float]] = field(default_factory=list)
    """Share of each domain's probe that changed an expert in each stretch, mean over layers, by stretch and domain."""
    codes: list[float] = field(default_factory=list)
    """Perplexity of the codes of each stretch's tokens, mean over layers, by stretch."""
    held_out: list[list[float | None]] = field(default_factory=list)

    def on_start(self, trainer: Trainer) -> None:
        self._probes = [RoutingHealth(trainer.session, windows, 4096) for windows in self.windows]
        self._look(trainer.session)

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        in_bytes = bits_per_byte(result.loss, result.bytes_per_token)
        self.losses.append(result.loss if in_bytes is None else in_bytes)
        if result.step % self.stream.steps == 0:
            self._look(trainer.session)

    def _look(self, session: Session) -> None:
        found = [probe.measure() for probe in self._probes]
        if all("fluctuation" in row for row in found):  # not at the start, nor in a dense model
            self.moved.append([float(np.mean(row["fluctuation"])) for row in found])
            if "code_perplexity" in found[0]:  # the others come when the counts have been taken
                self.codes.append(float(np.mean(found[0]["code_perplexity"])))
        self.held_out.append([_held_out(session, windows) for windows in self.windows])


def _held_out(session: Session, windows: Any) -> float | None:
    """Bits/byte, or right answers in percent."""
    if isinstance(windows, ImageSet):
        return 100 * classify(session, windows.evenly(IMAGES)).accuracy
    return validate(session, windows, HELD_OUT).bits_per_byte


def run(name: str, spec: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Send one model through the stream; its curve and what ``Watch`` saw."""
    from vqmoe_ds.checkpoint.open import open_checkpoint
    from vqmoe_ds.finetune.run import begin

    path, *overrides = spec.split(",")
    steps = args.steps * len(args.domains) * args.rounds
    common = ["train.min_learning_rate_ratio=1", "train.warmup_steps=5", *overrides]
    reader, place = open_checkpoint(path), find_place(None)
    prepare = _prepare_images if reader.config["model"].get("image_size") else _prepare_text
    loaded, data = prepare(reader, common, steps, seed, args.domains)
    config = resolve(DS_CONFIG, loaded, place.world_size, None)
    opened = [
        each.open(_with_data(config.run, d), args.out / "index") for each, d in zip(data, args.domains, strict=True)
    ]
    session = build_session(config, place, DS_CONFIG)
    begin(session, reader)
    stream = Stream([batches for batches, _ in opened], args.steps, config.run.train.batch_size)
    watch = Watch(stream, [windows for _, windows in opened])
    Trainer(session, stream, [watch]).run()
    session.engine.destroy()
    seen = {key: getattr(watch, key) for key in ("losses", "moved", "codes", "held_out")}
    return {"model": name, "seed": seed, **seen}


def _prepare_text(
    reader: CheckpointReader, settings: list[str], steps: int, seed: int, domains: list[str]
) -> tuple[LoadedConfig, list[Any]]:
    """The configuration of a language model that goes on, and the text of every domain."""
    from vqmoe_ds.checkpoint.formats.huggingface.folder import run_config
    from vqmoe_ds.finetune.cli import build_parser
    from vqmoe_ds.finetune.config import language_model_config, starting_config
    from vqmoe_ds.finetune.language import open_text

    given = ["train.batch_size=8", "finetune.trainable=all", *settings]
    words = [f"--checkpoint={reader.path}", "--task=lm", f"--data={domains[0]}", f"--train_steps={steps}"]
    parsed = build_parser("", DS_CONFIG).parse_args([*words, f"--seed={seed}", *(f"--set={text}" for text in given)])
    loaded, source = starting_config(parsed, reader), run_config(reader.config, reader.path)
    each = [replace(loaded, config=_with_data(loaded.config, domain)) for domain in domains]
    texts = [open_text(one, source, reader).data for one in each]
    return language_model_config(loaded, texts[0].tokenizer_sha256), texts


def _prepare_images(
    reader: CheckpointReader, settings: list[str], steps: int, seed: int, domains: list[str]
) -> tuple[LoadedConfig, list[Any]]:
    """The configuration of a classifier that goes on, and the images of every domain."""
    given = {"train.steps": str(steps), "train.seed": str(seed), "finetune.discrete": "false"}
    for setting in settings:
        name, given[name] = setting.split("=", 1)
    loaded = load_config(base=reader.config, overrides={name: yaml.safe_load(text) for name, text in given.items()})
    images = [open_images(_with_data(loaded.config, domain)) for domain in domains]
    for each in images:
        check_classes(each.files, loaded.config.data.classes, reader.path)
    return loaded, images


def _with_data(run_config: Any, domain: str) -> Any:
    return run_config.model_copy(update={"data": run_config.data.model_copy(update={"path": domain})})


def stretches(found: dict[str, Any], steps: int, domains: int) -> dict[int, dict[str, float]]:
    """The measures of ``COLUMNS`` by domain, averaged over its stretches after the very first, which is no change."""
    rows: dict[int, list[dict[str, float]]] = {}
    for number in range(1, len(found["losses"]) // steps):
        losses = np.array(found["losses"][number * steps : (number + 1) * steps])
        first, last = losses[:ENDS].mean(), losses[-3 * ENDS :].mean()
        smooth = np.convolve(losses, np.ones(ENDS) / ENDS, mode="valid")
        below = np.flatnonzero(smooth <= last + 0.1 * (first - last))
        row = {
            "first": first,
            "last": last,
            "mean": losses.mean(),
            "recovery": float(below[0]) if len(below) else steps,
        }
        if found["moved"]:
            row["moved"] = found["moved"][number][number % domains]
        if found["codes"]:
            row["codes"] = found["codes"][number]
        held = found["held_out"][number + 1][number % domains]
        if held is not None:
            row["held_out"] = held
        rows.setdefault(number % domains, []).append(row)
    return {d: {key: float(np.mean([row[key] for row in some])) for key in some[0]} for d, some in rows.items()}


def report(results: list[dict[str, Any]], args: argparse.Namespace) -> str:
    """Markdown: a table for each domain, mean ± standard error over seeds, and differences to the first model."""
    lines = []
    measured = [(row["model"], row["seed"], stretches(row, args.steps, len(args.domains))) for row in results]
    for domain, where in enumerate(args.domains):
        values: dict[str, dict[int, dict[str, float]]] = {}
        for name, seed, found in measured:
            if domain in found:
                values.setdefault(name, {})[seed] = found[domain]
        if values:
            first = next(iter(values))
            rows = [[name, *_cells(seeds, values[first])] for name, seeds in values.items()]
            columns = ["model", *COLUMNS.values(), f"all steps, minus {first}"]
            lines += [f"### When the data change to {Path(where).name}", "", table(columns, rows), ""]
    return "\n".join(lines)


def _cells(seeds: dict[int, dict[str, float]], base: dict[int, dict[str, float]]) -> list[str]:
    cells = [_cell([found[key] for found in seeds.values() if key in found]) for key in COLUMNS]
    ours, theirs = ({seed: found["mean"] for seed, found in each.items()} for each in (seeds, base))
    difference = paired_difference(ours, theirs)
    if seeds is base or difference is None or difference.low is None:
        return [*cells, ""]
    return [*cells, difference.show()]


def _cell(values: list[float]) -> str:
    return mean_of(values).show(".4g", ".2g") if values else "–"


def draw(results: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """The curves, mean over seeds, with the changes of domain."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(9, 4))
    for name in dict.fromkeys(row["model"] for row in results):
        curves = np.array([row["losses"] for row in results if row["model"] == name])
        axes.plot(np.arange(1, curves.shape[1] + 1), curves.mean(axis=0), label=name, linewidth=1)
    for change in range(args.steps, args.steps * len(args.domains) * args.rounds, args.steps):
        axes.axvline(change + 0.5, color="grey", linewidth=0.5)
    axes.set(xlabel="optimizer step", ylabel="loss before the step")
    axes.legend()
    save(figure, args.out / "shift.png")


@reports_errors
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--domains",
        nargs="+",
        required=True,
        metavar="DATA",
        help="text or images, that of pretraining first",
    )
    add("--model", action="append", required=True, metavar="NAME=CHECKPOINT[,SECTION.FIELD=VALUE,...]")
    add("--steps", type=int, default=60, help="optimizer steps on one domain before the next (default 60)")
    add("--rounds", type=int, default=2, help="times around all domains (default 2)")
    add("--seeds", type=int, default=3, help="orders of the data (default 3)")
    add("--out", type=Path, default=Path("runs/shift"), help="folder for report.md, report.json and shift.png")
    args = parser.parse_args()
    models = dict(model.split("=", 1) for model in args.model if "=" in model)
    if len(models) < len(args.model) or len(args.domains) < 2 or args.steps < 4 * ENDS:
        raise ConfigError(f"give two or more --domains, {4 * ENDS} or more --steps, and --model NAME=CHECKPOINT")
    (args.out / "index").mkdir(parents=True, exist_ok=True)
    set_up_torch(find_place(None))
    results = []
    for seed in range(1, args.seeds + 1):
        for name, spec in models.items():
            results.append(run(name, spec, seed, args))
            print(
                f"{name}, seed {seed}: {json.dumps(stretches(results[-1], args.steps, len(args.domains)))}",
                flush=True,
            )
    write_json(str(args.out / "report.json"), results)
    text = report(results, args)
    (args.out / "report.md").write_text(text, encoding="utf-8")
    draw(results, args)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
