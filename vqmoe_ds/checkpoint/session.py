"""Saving and resuming a running session through DeepSpeed's own checkpoint files."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist

from vqmoe_ds.checkpoint.reader import open_checkpoint
from vqmoe_ds.checkpoint.restore import restore_any_layout
from vqmoe_ds.checkpoint.store import (
    checksums,
    find_newest,
    read_manifest,
    remove,
    retired,
    tag_name,
    verify,
    write_manifest,
)
from vqmoe_ds.config.deepspeed_json import EngineConfig
from vqmoe_ds.config.schema import RunConfig
from vqmoe_ds.data.indexed import UNKNOWN
from vqmoe_ds.errors import CheckpointError, TrainingHalted
from vqmoe_ds.files import write_atomically
from vqmoe_ds.train.engine import Session

STRUCTURE = {
    "model": None,
    "moe": ("router", "num_experts", "expert_hidden", "top_k", "code_blend"),
    "router": ("softmax_over", "low_dim", "statistics", "scaling"),
    "codebook": ("num_codes", "source", "context_window", "context_decay", "code_dim", "distance", "learning"),
}
"""Fields that decide whether a checkpoint fits a model (None: the whole section)."""


def save(
    session: Session, folder: Path, step: int, keep_last: int, samples: int | None = None, keep_every: int = 0
) -> Path:
    """Write, seal and only then make current a checkpoint of all ranks; old ones go when it reads back whole.

    All ranks share the reading: every one takes some of the files.

    Args:
        step: optimizer steps finished.
        keep_last: as ``run.keep_last``.
        samples: training samples consumed; None: ``step`` batches.
        keep_every: as ``run.keep_every``.

    Raises:
        TrainingHalted: the files could not be written; what was saved before is untouched.
    """
    tag = folder / tag_name(step)
    first = session.place.rank == 0
    if first and tag.exists():
        shutil.rmtree(tag)
    _barrier()
    config = session.config
    consumed = step * config.run.train.batch_size if samples is None else samples
    run = config.run.model_dump(mode="json")
    state = {"step": step, "samples": consumed, "layout": config.layout(), "config": run}
    try:
        session.engine.save_checkpoint(str(folder), tag=tag.name, client_state={"vqmoe_ds": state}, save_latest=False)
        _barrier()
        files = _shared_checksums(tag, session.place.rank)
        if first:
            write_manifest(tag, state, files)
            write_atomically(folder / "latest", tag.name)
        old = _from_first(retired(folder, keep_last, keep_every) if first else [])
        # Now by another rank: what counts is what the next job will read.
        if old and _shared_checksums(tag, session.place.rank + 1) != files:
            raise OSError("it reads back otherwise than it was written")
        if first:
            remove(old)
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        halted = TrainingHalted(
            f"checkpoint {tag} could not be written ({reason}); earlier checkpoints in {folder} are untouched; "
            "free some space and start again to resume from the newest"
        )
        halted.local = True
        raise halted from error
    _barrier()
    return tag


def _shared_checksums(tag: Path, rank: int) -> dict[str, Any]:
    """``checksums`` of all files, on all ranks."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return checksums(tag)
    world = dist.get_world_size()
    parts: list[Any] = [None] * world
    dist.all_gather_object(parts, checksums(tag, rank % world, world))
    return dict(sorted((name, entry) for part in parts for name, entry in part.items()))


def _from_first(paths: list[Path]) -> list[Path]:
    """Rank 0's answer on all ranks: others may see an older state of the file system."""
    answer: list[Any] = [paths]
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast_object_list(answer, src=0)
    return list(answer[0])


def choose(folder: Path, resume: str, rank: int) -> tuple[Path | None, list[str]]:
    """The checkpoint ``--resume`` means, the same on all ranks, and what was passed over.

    Args:
        folder: the run's checkpoint folder.
        resume: ``auto`` (newest that verifies, if any), ``never``, or the path of a tag or of a run folder.
        rank: rank 0 reads and verifies; the others are told.
    """
    answer: list[Any] = [None, [], None]
    if rank == 0 and resume != "never":
        try:
            answer = [*_choose_here(folder, resume), None]
        except CheckpointError as error:
            answer[2] = str(error)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast_object_list(answer, src=0)
    if answer[2] is not None:
        raise CheckpointError(answer[2])
    return answer[0], answer[1]


def _choose_here(folder: Path, resume: str) -> tuple[Path | None, list[str]]:
    if resume == "auto":
        found = find_newest(folder)
        return found.path, found.passed_over
    path = Path(resume)
    for candidates in (path, path / "checkpoints"):
        found = find_newest(candidates)
        if found.path is not None:
            return found.path, found.passed_over
    if not path.exists():
        raise CheckpointError(f"--resume {resume}: no such folder")
    verify(path)
    return path, []


def load(session: Session, tag: Path) -> int:
    """Restore weights, optimizer, codebooks and step from a tag of any layout; returns the step.

    DeepSpeed's own loading is left to fp16, whose loss scale only it restores: it takes the same layout only, and would
    run whatever a pickle says.

    Raises:
        CheckpointError: ``check_fits`` or the files say why it cannot be.
    """
    check_fits(session.config, tag)
    if session.config.precision == "fp16":
        session.engine.load_checkpoint(str(tag.parent), tag=tag.name)
        return int(read_manifest(tag)["step"])
    return restore_any_layout(session, open_checkpoint(tag))


def consumed_samples(tag: Path) -> int:
    """Training samples consumed before a tag was written."""
    manifest = read_manifest(tag)
    return int(manifest.get("samples", manifest["step"] * manifest["config"]["train"]["batch_size"]))


def check_fits(config: EngineConfig, tag: Path) -> None:
    """Refuse, by name, a tag of another tokenizer or another architecture, and in fp16 one of another layout.

    Raises:
        CheckpointError: naming the first difference.
    """
    manifest = read_manifest(tag)
    check_tokenizer(config.run, manifest["config"], tag)
    check_structure(config.run, manifest["config"], tag)
    for name, value in config.layout().items() if config.precision == "fp16" else ():
        if manifest["layout"][name] != value:
            raise CheckpointError(
                f"{tag} was written with {name}={manifest['layout'][name]}, this run has {name}={value}; fp16 resumes "
                "on the layout it was written with only"
            )


def check_tokenizer(run: RunConfig, saved: dict[str, Any], tag: Path) -> None:
    """Refuse a checkpoint whose ids mean something else than those of this run's data."""
    theirs, ours = saved.get("data", {}).get("tokenizer_sha256"), run.data.tokenizer_sha256
    if theirs != ours:
        raise CheckpointError(
            f"{tag} was trained on {_ids_of(theirs)}, this run's data is made of {_ids_of(ours)}; give data of the "
            "same tokenizer or start in another --run_dir"
        )


def _ids_of(checksum: str | None) -> str:
    if checksum is None:
        return "raw bytes"
    return "ids of an unknown tokenizer" if checksum == UNKNOWN else f"ids of the tokenizer {checksum[:12]}"


def check_structure(run: RunConfig, saved: dict[str, Any], tag: Path) -> None:
    """Refuse a checkpoint whose model differs, naming the first field; one older than a field has its default."""
    here, defaults = run.model_dump(mode="json"), RunConfig().model_dump(mode="json")
    for section, names in STRUCTURE.items():
        for name in names or here[section]:
            theirs, ours = saved.get(section, {}).get(name, defaults[section][name]), here[section][name]
            if theirs != ours:
                raise CheckpointError(
                    f"{tag} holds another model: {section}.{name}={theirs} there, {ours} here; "
                    f"set {section}.{name}={theirs} or start in another --run_dir"
                )


def _barrier() -> None:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()
