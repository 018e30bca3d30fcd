"""Filling a running engine of any layout from a checkpoint of any other.

Every ZeRO stage keeps its master weights and moments as flat rows over some stretch of each parameter. ``_slots`` finds
those stretches for the engine at hand; each rank then reads exactly these, so no whole model ever stands in memory.
DeepSpeed's universal checkpoint is not used: at ZeRO-3 it loses Adam's step.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vqmoe_ds.checkpoint.reader import MOMENTS, CheckpointReader
from vqmoe_ds.models.session import Session
from vqmoe_ds.moe.codebook import CodebookBank, add_adam_steps
from vqmoe_ds.runtime.errors import CheckpointError
from vqmoe_ds.runtime.ranks import several_ranks


class _Slot(NamedTuple):
    """``length`` values of ``name`` from ``start`` on (whole tensor), at ``begin`` in the master row ``flat``."""

    name: str
    start: int
    length: int
    flat: Tensor
    begin: int


def restore_any_layout(session: Session, reader: CheckpointReader) -> int:
    """Restore weights, Adam's moments and step, codebooks and DeepSpeed's counters; returns the step.

    Collective: all ranks call it, and all fail together. Without an optimizer in the checkpoint (an export of weights)
    Adam starts anew.

    Args:
        session: built for the run that goes on; its layout and precision are free.
        reader: the checkpoint.

    Raises:
        CheckpointError: another model, or a file that cannot be read; the session must not be trained on then.
    """
    error: CheckpointError | None = None
    optimizer = session.engine.optimizer
    if hasattr(optimizer, "checkpoint_event_prologue"):  # ZeRO-3: all parameters in parts
        optimizer.checkpoint_event_prologue()
    # The epilogue and _fail_together are collectives: all ranks come to both, also one that failed. Masters come first,
    # as at stage 3 the weights are cast down from them.
    try:
        check_same_model(session.model, session.config.ep_size, reader)
        _fill_masters(session, reader)
        _fill_weights(session, reader)
        fill_buffers(session.model, reader)
        _set_counters(session.engine, reader)
    except CheckpointError as caught:
        error = caught
    if hasattr(optimizer, "checkpoint_event_epilogue"):
        optimizer.checkpoint_event_epilogue()
    _fail_together(error)
    return reader.step


def _fail_together(error: CheckpointError | None) -> None:
    if several_ranks():
        sentences: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(sentences, str(error) if error else None)
        first = next((sentence for sentence in sentences if sentence), None)
        if first and error is None:
            raise CheckpointError(first)
    if error is not None:
        raise error


def check_same_model(model: nn.Module, ep_size: int, reader: CheckpointReader) -> None:
    """Refuse a checkpoint whose parameters are not those of a model that holds one of ``ep_size`` shares of experts.

    Raises:
        CheckpointError: naming the first difference.
    """
    ours, theirs = whole_shapes(model, ep_size), reader.shapes
    for name in sorted(ours.keys() ^ theirs.keys()):
        where = ("this run", "the checkpoint") if name in ours else ("the checkpoint", "this run")
        raise CheckpointError(
            f"{reader.path} holds another model: {name} is a parameter of {where[0]}, not of {where[1]}"
        )
    for name, shape in ours.items():
        if theirs[name] != shape:
            raise CheckpointError(
                f"{reader.path} holds another model: {name} is {list(theirs[name])} there, {list(shape)} here"
            )


def whole_shapes(model: nn.Module, ep_size: int) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter, experts stacked over all ranks, of a model that holds one of ``ep_size`` shares."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, param in model.named_parameters():
        # ZeRO-3 leaves an empty tensor in a parameter's place, and its shape in ds_shape.
        first, *rest = getattr(param, "ds_shape", param.shape)
        shapes[name] = (first * ep_size if ".experts." in name else first, *rest)
    return shapes


# ---------------------------------------------------------------------- master weights and moments


@torch.no_grad()
def _fill_masters(session: Session, reader: CheckpointReader) -> None:
    wrapper = session.engine.optimizer
    adam = getattr(wrapper, "optimizer", wrapper)
    step = reader.optimizer_step() if reader.has_optimizer else 0
    started: set[int] = set()
    for slot in _slots(session):
        row = slot.flat.data.view(-1)
        # Several slots share a row, which is zeroed before the first of them alone.
        if id(slot.flat) not in started:
            started.add(id(slot.flat))
            _start_row(adam, slot.flat, step)
        _copy(reader, slot, "fp32", row)
        for kind in MOMENTS if step else ():
            _copy(reader, slot, kind, adam.state[slot.flat][kind].view(-1))


def _start_row(adam: Any, flat: Tensor, step: int) -> None:
    """Zero a master row (what pads it stays zero) and give it Adam's state; without a step Adam makes its own."""
    # The row is filled and never replaced: the optimizer finds its state by this very tensor.
    flat.data.zero_()
    if not step:
        adam.state.pop(flat, None)
        return
    state = adam.state[flat]
    # PyTorch's Adam counts in a tensor, DeepSpeed's in an integer.
    state["step"] = _step_tensor(adam, flat, step) if isinstance(adam, torch.optim.Adam) else step
    for kind in MOMENTS:
        if kind in state:
            state[kind].zero_()
        else:
            state[kind] = torch.zeros_like(flat.data)


def _step_tensor(adam: torch.optim.Adam, flat: Tensor, step: int) -> Tensor:
    # As in PyTorch's own states: only these kernels read the step on the device, the others on the host.
    beside = any(group.get("fused") or group.get("capturable") for group in adam.param_groups)
    return torch.tensor(float(step), device=flat.device if beside else "cpu")


def _copy(reader: CheckpointReader, slot: _Slot, kind: str, row: Tensor) -> None:
    reader.fill(row[slot.begin : slot.begin + slot.length], slot.name, kind, slot.start)


def _slots(session: Session) -> Iterator[_Slot]:
    """Every stretch of master weights this rank holds, whatever engine holds it."""
    optimizer = session.engine.optimizer
    names = {id(param): name for name, param in session.model.named_parameters()}

    ep_rank = session.config.ep_rank(session.place.rank)

    def place(param: Tensor) -> tuple[str, int]:
        return names[id(param)], first_value(names[id(param)], param, ep_rank)

    if session.config.zero_stage == 3:
        yield from _stage3_slots(optimizer, place)
    elif hasattr(optimizer, "single_partition_of_fp32_groups"):  # ZeRO 1 and 2
        yield from _partitioned_slots(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, place)
    elif hasattr(optimizer, "fp32_groups_flat_partition"):  # bfloat16 with float32 accumulation
        yield from _partitioned_slots(optimizer.bf16_groups, optimizer.fp32_groups_flat_partition, place)
    elif hasattr(optimizer, "fp32_groups_flat"):  # stage 0, half precision, fused Adam
        for params, flat in zip(optimizer.fp16_groups, optimizer.fp32_groups_flat, strict=True):
            begin = 0
            for param in params:
                yield _Slot(*place(param), param.numel(), flat, begin)
                begin += param.numel()
    elif hasattr(optimizer, "fp32_groups"):  # stage 0, half precision
        for params, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for param, master in zip(params, masters, strict=True):
                yield _Slot(*place(param), param.numel(), master, 0)
    else:  # stage 0, float32: the weights are their own masters
        for param in session.model.parameters():
            if param.requires_grad:
                yield _Slot(*place(param), param.numel(), param, 0)


def _partitioned_slots(groups: Any, rows: Any, place: Any) -> Iterator[_Slot]:
    for params, flat in zip(groups, rows, strict=True):
        for param in params:
            fragment = param._hp_mapping  # None where other ranks hold all of it
            if fragment is not None:
                name, first = place(param)
                # lp counts from the parameter's first value, hp from the first of this rank's row.
                here, there = fragment.lp_fragment_address, fragment.hp_fragment_address
                yield _Slot(name, first + here.start, here.numel, flat, there.start)


def _stage3_slots(optimizer: Any, place: Any) -> Iterator[_Slot]:
    for params, flat in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
        begin = 0
        for param in params:
            name, first = place(param)
            part = param.partition_numel()
            # Experts are cut over the ranks that hold the same ones, all else over all.
            start = dist.get_rank(group=optimizer._get_param_partition_group(param)) * part
            count = max(0, min(part, param.ds_numel - start))
            if count:
                yield _Slot(name, first + start, count, flat, begin)
            # The last parts are shorter or empty, and have their whole room in the row all the same.
            begin += part


def first_value(name: str, param: Tensor, ep_rank: int) -> int:
    """First value of this rank's share of a parameter in the whole tensor: 0, except for experts."""
    return ep_rank * int(getattr(param, "ds_numel", param.numel())) if ".experts." in name else 0


# ---------------------------------------------------------------------- the weights the model runs on


@torch.no_grad()
def _fill_weights(session: Session, reader: CheckpointReader) -> None:
    optimizer, ep_rank = session.engine.optimizer, session.config.ep_rank(session.place.rank)
    if session.config.zero_stage == 3:
        _refresh_stage3(optimizer)
    # At stage 3 weights follow from the masters; at stage 0 in float32 they are the masters.
    done = session.config.zero_stage == 3 or type(optimizer).__module__.startswith("torch.")
    for name, param in session.model.named_parameters():
        if param.requires_grad and done:
            continue
        # From the file's float32, not from the master row, of which a rank holds a stretch: the casts are the same.
        slot = _Slot(name, first_value(name, param, ep_rank), param.numel(), param, 0)
        if hasattr(param, "ds_id"):
            slot = _frozen_part(slot, param)
        _copy(reader, slot, "fp32", slot.flat.data.view(-1))


def _frozen_part(whole: _Slot, param: Any) -> _Slot:
    """This rank's part of a parameter that ZeRO-3 holds in parts and no optimizer owns."""
    part = param.partition_numel()
    start = dist.get_rank(group=param.ds_process_group) * part
    count = max(0, min(part, param.ds_numel - start))
    return whole._replace(start=whole.start + start, length=count, flat=param.ds_tensor)


def _refresh_stage3(optimizer: Any) -> None:
    """Cast the master rows down into the parameters' parts, as ``DeepSpeedZeroOptimizer_Stage3`` does after a load."""
    for row, flat, parts in zip(
        optimizer.fp32_partitioned_groups_flat,
        optimizer.fp16_partitioned_groups_flat,
        optimizer.fp16_partitioned_groups,
        strict=True,
    ):
        if flat is None:
            raise CheckpointError("a checkpoint of another layout cannot be restored into parameters offloaded to NVMe")
        flat.data.copy_(row.data)
        for part, values in zip(parts, optimizer.unflatten(flat, parts), strict=True):
            part.data = values.data
    if optimizer.persistent_parameters:  # small ones are kept whole: let them go, the epilogue gathers them again
        optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)


def fill_buffers(model: nn.Module, reader: CheckpointReader) -> None:
    """Copy the persistent buffers of a checkpoint into a model.

    Raises:
        CheckpointError: one is missing or of another shape.
    """
    saved = reader.buffers()
    for prefix, module in model.named_modules():
        if isinstance(module, CodebookBank):
            add_adam_steps(saved, f"{prefix}.")
        for name, buffer in module.named_buffers(recurse=False):
            # PyTorch has no public list of the buffers that state_dict leaves out.
            if name in module._non_persistent_buffers_set:
                continue
            full = f"{prefix}.{name}" if prefix else name
            if full not in saved or saved[full].shape != buffer.shape:
                theirs = list(saved[full].shape) if full in saved else "not there"
                raise CheckpointError(
                    f"{reader.path} holds another model: buffer {full} is {theirs}, here {list(buffer.shape)}"
                )
            buffer.copy_(saved[full])


def _set_counters(engine: Any, reader: CheckpointReader) -> None:
    """Set the engine's counters as ``engine.load_checkpoint`` does."""
    engine.global_steps = int(reader.counters.get("global_steps") or reader.step)
    samples = reader.counters.get("global_samples")
    engine.global_samples = int(samples) if samples else engine.global_steps * engine.train_batch_size()
    engine.skipped_steps = int(reader.counters.get("skipped_steps") or 0)
    schedule = reader.counters.get("lr_scheduler")
    if engine.lr_scheduler is not None and schedule is not None:
        engine.lr_scheduler.load_state_dict(schedule)
