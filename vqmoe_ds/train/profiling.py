"""A torch profiler trace of some steps (``--profile``), and a table of their costliest operations by parts of ours.

A part is the innermost of our modules that runs an operation. Operations of backward belong to the part whose forward
made their autograd node, which PyTorch tells by the node's sequence number.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from vqmoe_ds.runtime.errors import ConfigError
from vqmoe_ds.runtime.files import make_folder
from vqmoe_ds.train.loop import Callback, StepResult, Trainer

WARM_UP = 2
"""Steps that are let pass where only a number of steps is given: first calls allocate, compile and import."""
MOST_OPERATIONS, MOST_PARTS = 40, 12
"""Rows of the file's table of operations, and lines on the terminal."""


class Profile(Callback):
    """Writes ``profile/rank0.json`` and ``profile/rank0.txt`` (and those of the other ranks) to the run folder.

    Args:
        steps: first and last step; without a first one, how many steps, after two of this session to warm up.
    """

    def __init__(self, steps: tuple[int | None, int], run_dir: Path, rank: int, say: Callable[[str], None]) -> None:
        self.folder, self.rank, self.say = run_dir / "profile", rank, say
        self.first, self.last = steps[0] or 0, steps[1]
        self._profiler: profile | None = None
        self._ranges = ExitStack()
        self._names: set[str] = set()
        self._open: list[record_function] = []

    def on_start(self, trainer: Trainer) -> None:
        if not self.first:
            self.first, self.last = trainer.step + WARM_UP + 1, trainer.step + WARM_UP + self.last
        if not trainer.step < self.first <= self.last <= trainer.total_steps:
            raise ConfigError(
                f"--profile asks for steps {self.first} to {self.last}, but this run takes steps "
                f"{trainer.step + 1} to {trainer.total_steps}; name some of these as --profile FIRST:LAST"
            )

    def before_step(self, trainer: Trainer) -> None:
        if trainer.step + 1 != self.first:
            return
        make_folder(self.folder)
        self._name_parts(trainer)
        on_gpu = trainer.session.device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        self._profiler = profile(activities=activities)
        self._profiler.start()

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        if result.step == self.last:
            self._write(result.step)

    def on_end(self, trainer: Trainer) -> None:
        self._write(trainer.step)  # a request to stop came before the last of the steps

    def _write(self, step: int) -> None:
        if self._profiler is None:
            return
        self._profiler.stop()
        self._ranges.close()
        self._profiler.export_chrome_trace(str(self.folder / f"rank{self.rank}.json"))
        steps = step - self.first + 1
        parts, operations = tables(self._profiler.events(), self._names, steps)
        told = f"profile of steps {self.first} to {step}, rank {self.rank}: milliseconds per step"
        text = "\n".join([told, "", *parts, "", *operations, ""])
        (self.folder / f"rank{self.rank}.txt").write_text(text, encoding="utf-8")
        for line in (told, *parts[: MOST_PARTS + 1]):
            self.say(line)
        self.say(f"traces for chrome://tracing or ui.perfetto.dev, and tables of operations: {self.folder}")
        self._profiler = None

    def _name_parts(self, trainer: Trainer) -> None:
        """Put a named range around our modules and the phases of a step, until ``_ranges`` is closed."""
        session = trainer.session
        for module in session.model.modules():
            ours = type(module).__module__.startswith("vqmoe_ds.") and not isinstance(module, nn.Linear)
            if ours:  # a linear map belongs to the module that has it
                self._hook(module, type(module).__name__)
        for owner, name, part in (
            (trainer.batches, "micro_batches", "reading data"),
            (session.engine, "backward", "gradients"),
            (session.engine, "step", "optimizer"),
            (session.sync, "start", "statistics of routing"),
            (session.sync, "step", "statistics of routing"),
        ):
            self._wrap(owner, name, part)

    def _hook(self, module: nn.Module, part: str) -> None:
        self._names.add(part)

        def enter(*_: Any) -> None:
            self._open.append(record_function(part))
            self._open[-1].__enter__()

        def leave(*_: Any) -> None:
            self._open.pop().__exit__(None, None, None)

        self._ranges.callback(module.register_forward_pre_hook(enter).remove)
        # Always: a recomputation for backward leaves a module by an exception when it has what it needs.
        self._ranges.callback(module.register_forward_hook(leave, always_call=True).remove)

    def _wrap(self, owner: Any, name: str, part: str) -> None:
        self._names.add(part)
        # An attribute of the object may be ours (engine.fix_loss_scaling): it is put back, and not deleted.
        inner, own = getattr(owner, name), name in vars(owner)

        def ranged(*args: Any, **options: Any) -> Any:
            with record_function(part):
                return inner(*args, **options)

        setattr(owner, name, ranged)
        self._ranges.callback(*((setattr, owner, name, inner) if own else (delattr, owner, name)))


def tables(events: Any, names: set[str], steps: int) -> tuple[list[str], list[str]]:
    """Lines of two tables, costliest first: parts, forward and backward apart; and operations of each part.

    Args:
        events: the profiler's.
        names: of the ranges that are parts.
        steps: that were profiled.
    """
    host = [event for event in events if event.device_type == DeviceType.CPU and not event.is_async]
    part_of = _Parts(host, names)
    times: defaultdict[tuple[str, str], list[float]] = defaultdict(lambda: [0, 0.0, 0.0])
    for event in host:
        sums = times[part_of(event), "(Python)" if event.name in names else event.name]
        for place, value in enumerate((1, event.self_cpu_time_total, event.self_device_time_total)):
            sums[place] += value
    on_gpu = any(device for _, _, device in times.values())
    cost = 2 if on_gpu else 1
    total = sum(sums[cost] for sums in times.values()) or 1.0
    parts: defaultdict[str, list[float]] = defaultdict(lambda: [0, 0.0, 0.0])
    for (part, _), sums in times.items():
        parts[part] = [a + b for a, b in zip(parts[part], sums, strict=True)]

    def line(words: str, sums: list[float]) -> str:
        gpu = f"{sums[2] / steps / 1000:10.2f}" if on_gpu else ""
        return f"{words} {sums[0] / steps:9.0f} {sums[1] / steps / 1000:10.2f}{gpu} {sums[cost] / total:7.1%}"

    head = (
        f"{'events':>9} {'host ms':>10}{'gpu ms':>10} {'share':>7}"
        if on_gpu
        else f"{'events':>9} {'ms':>10} {'share':>7}"
    )
    ranked = sorted(parts.items(), key=lambda item: -item[1][cost])
    costliest = sorted(times.items(), key=lambda item: -item[1][cost])[:MOST_OPERATIONS]
    return (
        [f"{'part':36} {head}", *(line(f"{part:36.36}", sums) for part, sums in ranked)],
        [
            f"{'part':36} {'operation':52} {head}",
            *(line(f"{part:36.36} {name:52.52}", sums) for (part, name), sums in costliest),
        ],
    )


class _Parts:
    """Part of an event, by the ranges around it or around the forward operation that it is the backward of."""

    def __init__(self, events: list[Any], names: set[str]) -> None:
        self.names = names
        # Several operations see the number of the next node; the last of them makes it.
        made = [event for event in events if event.sequence_nr >= 0 and not event.fwd_thread]
        made.sort(key=lambda event: event.time_range.start)
        self._made = {(event.thread, event.sequence_nr): event for event in made}

    def __call__(self, event: Any) -> str:
        while event is not None:
            forward = self._made.get((event.fwd_thread, event.sequence_nr))  # in forward, fwd_thread is 0
            if forward is not None:
                return f"{self(forward)}, backward"
            if event.name in self.names:
                return str(event.name)
            event = event.cpu_parent
        return "other"
