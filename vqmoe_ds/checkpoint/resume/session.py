"""Saving and resuming a running session through DeepSpeed's own checkpoint files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from vqmoe_ds.checkpoint.io.store import Found, find_newest, read_manifest, step_of, tag_name, tags, verify
from vqmoe_ds.checkpoint.open import open_checkpoint
from vqmoe_ds.checkpoint.reader import of_images
from vqmoe_ds.checkpoint.resume.recovery import write_script
from vqmoe_ds.checkpoint.resume.restore import restore_any_layout
from vqmoe_ds.checkpoint.resume.restricted import without_pickles
from vqmoe_ds.checkpoint.resume.retention import clear_leftovers
from vqmoe_ds.checkpoint.resume.sealing import Sealing, as_halted, written_to
from vqmoe_ds.config.deepspeed_json import EngineConfig, kind_of_optimizer
from vqmoe_ds.config.deepspeed_values import ADAMS
from vqmoe_ds.config.schema import RunConfig
from vqmoe_ds.data.fingerprint import HELD_OUT
from vqmoe_ds.data.indexed import UNKNOWN
from vqmoe_ds.data.tokenizers import nothing_known
from vqmoe_ds.models.session import Session
from vqmoe_ds.runtime.errors import CheckpointError
from vqmoe_ds.runtime.ranks import from_first, several_ranks

STRUCTURE = {
    "model": None,
    "train": ("decay_gates",),
    "moe": (
        *("router", "num_experts", "expert_hidden", "shared_experts", "shared_gate", "top_k", "code_blend"),
        *("input_norm", "output_norm"),
    ),
    "codebook": (
        *("num_codes", "source", "context_window", "context_decay", "code_dim", "distance", "learning", "groups"),
    ),
}
"""Fields that decide whether a checkpoint fits a model (None: the whole section); routers add theirs."""


def begin_save(
    session: Session,
    folder: Path,
    step: int,
    keep_last: int,
    samples: int | None = None,
    keep_every: int = 0,
    on_sealed: Callable[[], None] | None = None,
) -> Sealing:
    """Write a checkpoint of all ranks; it is sealed and made current while training goes on.

    The last one's sealing must have ended. Old checkpoints go when this one reads back whole.

    Args:
        step: optimizer steps finished.
        keep_last: as ``run.keep_last``.
        samples: training samples consumed; None: ``step`` batches.
        keep_every: as ``run.keep_every``.
        on_sealed: called on rank 0, in a thread, when the checkpoint exists.

    Raises:
        TrainingHalted: the files could not be written; what was saved before is untouched.
    """
    tag = folder / tag_name(step)
    if session.place.rank == 0:
        clear_leftovers(folder)
    # Else rank 0 would delete what others have begun to write under the same name.
    _barrier()
    config = session.config
    consumed = step * config.run.train.batch_size if samples is None else samples
    run = config.run.model_dump(mode="json")
    state = {"step": step, "samples": consumed, "layout": config.layout(), "config": run}
    if session.fingerprint:
        state["data"] = session.fingerprint
    if session.begun_from is not None:
        state["begun_from"] = session.begun_from
    frozen = [name for name, param in session.model.named_parameters() if not param.requires_grad]
    if frozen:
        state["frozen"] = frozen
    engine = session.engine
    # On this engine alone: others of the process keep DeepSpeed's own.
    engine._copy_recovery_script = write_script
    try:
        name = written_to(tag).name
        # publish writes latest, once the tag has its name.
        engine.save_checkpoint(str(folder), tag=name, client_state={"vqmoe_ds": state}, save_latest=False)
        if engine.checkpoint_engine.is_decoupled():  # its files are whole once they are committed
            engine._commit_decoupled_checkpoint()
        # Next every rank lists the folder, for its share of the checksums.
        _barrier()
    except (OSError, RuntimeError) as error:
        raise as_halted(error, tag) from error
    return Sealing(tag, state, session.place, keep_last, keep_every, on_sealed)


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
            # As text: raised here, the error would leave the other ranks waiting for the answer.
            answer[2] = str(error)
    answer = from_first(answer)
    if answer[2] is not None:
        raise CheckpointError(answer[2])
    return answer[0], answer[1]


def _choose_here(folder: Path, resume: str) -> tuple[Path | None, list[str]]:
    if resume == "auto":
        found = _newest_or_refuse(folder)
        return found.path, found.passed_over
    own = find_newest(folder)
    # The same command once more, as a requeued job gives it: the run has gone on since.
    if own.path is not None and read_manifest(own.path).get("begun_from") == begun_from(resume, None):
        return own.path, own.passed_over
    tag, passed_over = _named(resume)
    step = int(read_manifest(tag)["step"])
    # It would count as the run's newest: what the run saves would go first, and the next --resume auto take that one.
    if own.path is not None and (step_of(own.path.name) or 0) > step:
        raise CheckpointError(
            f"{tag} is of step {step}, and the run folder holds newer checkpoints, up to {own.path}, which a run from "
            "there would mix with its own; go on from the newest with --resume auto, or give another --run_dir"
        )
    return tag, passed_over


def begun_from(resume: str, tag: Path | None) -> str | None:
    """The whole path of the checkpoint that a run began with; None: with none.

    Args:
        resume: as of ``choose``.
        tag: what ``choose`` chose.
    """
    if resume not in ("auto", "never"):
        return str(Path(resume).resolve())
    return None if tag is None else read_manifest(tag).get("begun_from")


def _named(resume: str) -> tuple[Path, list[str]]:
    path = Path(resume)
    # A tag holds no tags, and is verified by itself below.
    for candidates in (path, path / "checkpoints"):
        found = _newest_or_refuse(candidates)
        if found.path is not None:
            return found.path, found.passed_over
    if not path.exists():
        raise CheckpointError(f"--resume {resume}: no such folder")
    verify(path)
    return path, []


def _newest_or_refuse(folder: Path) -> Found:
    """``find_newest``; a folder without any tag is a new run's, but one of damaged tags is for its user to judge.

    Raises:
        CheckpointError: there are tags, and none verifies.
    """
    found = find_newest(folder)
    if found.path is None and found.passed_over:
        names = [tag.name for tag in tags(folder)]
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        raise CheckpointError(
            f"none of the checkpoints in {folder} verifies ({', '.join(names[:5])}{more}; the newest: "
            f"{found.passed_over[0]}); give --resume the path of another checkpoint, or start anew with --resume never "
            "and another --run_dir"
        )
    return found


def load(session: Session, tag: Path) -> int:
    """Restore weights, optimizer, codebooks and step from a tag of any layout; returns the step.

    DeepSpeed's own loading is left to fp16, whose loss scale only it restores, and to optimizers that are no Adam: it
    takes the same layout only.

    Raises:
        CheckpointError: ``check_fits`` or the files say why it cannot be.
    """
    check_fits(session.config, tag)
    if _takes_one_layout(session.config) is not None:
        open_checkpoint(tag)  # its sentences come first
        with without_pickles():
            session.engine.load_checkpoint(str(tag.parent), tag=tag.name)
        return int(read_manifest(tag)["step"])
    return restore_any_layout(session, open_checkpoint(tag))


def consumed_samples(tag: Path) -> int:
    """Training samples consumed before a tag was written."""
    manifest = read_manifest(tag)
    return int(manifest.get("samples", manifest["step"] * manifest["config"]["train"]["batch_size"]))


def check_fits(config: EngineConfig, tag: Path) -> None:
    """Refuse, by name, a tag of another tokenizer or architecture, or of images, and where only the same layout can go
    on one of another, or one that no run wrote.

    Raises:
        CheckpointError: naming the first difference.
    """
    manifest = read_manifest(tag)
    check_kind(config.run, manifest["config"], tag)
    check_tokenizer(config.run, manifest["config"], tag)
    check_structure(config.run, manifest["config"], tag)
    kind = _takes_one_layout(config)
    if kind is None:
        return
    # Every checkpoint of a run has an owner.
    if "owner" not in manifest:
        raise CheckpointError(
            f"{tag} was written by a tool, not by a run, and {kind} resumes from checkpoints of runs alone; give "
            "--resume a folder global_step… of a run, or train with AdamW in fp32 or bf16"
        )
    for name, value in config.layout().items():
        if manifest["layout"][name] != value:
            raise CheckpointError(
                f"{tag} was written with {name}={manifest['layout'][name]}, this run has {name}={value}; {kind} "
                "resumes on the layout it was written with only"
            )


def _takes_one_layout(config: EngineConfig) -> str | None:
    """What makes a run resume on the layout of its checkpoint only; None: it resumes on any."""
    if config.precision == "fp16":
        return "fp16"
    kind = kind_of_optimizer(config.deepspeed)
    return None if kind in ADAMS else f"optimizer {config.deepspeed['optimizer']['type']}"


def check_data(here: dict[str, str], tag: Path, allowed: bool) -> str | None:
    """Compare what this run reads with what the run of a checkpoint read.

    Args:
        here: as ``Session.fingerprint``.
        allowed: a change is meant.

    Returns:
        A sentence for the user where it changed and may; None: it is the same, or the checkpoint does not know.

    Raises:
        CheckpointError: it changed.
    """
    manifest = read_manifest(tag)
    there = manifest.get("data")
    if not isinstance(there, dict):
        return None
    if "training text" in there and HELD_OUT not in there:  # written before it was kept
        saved = manifest["config"].get("data", {})
        there = {**there, HELD_OUT: "0" if saved.get("valid_path") else str(saved.get("holdout_every"))}
    changed = [name for name in sorted({*here, *there}) if here.get(name) != there.get(name)]
    if not changed:
        return None
    if allowed:
        return f"{', '.join(changed)}: not what {tag.name} was trained with; it goes on at the same number of samples"
    raise CheckpointError(
        f"{tag} was trained with other inputs (changed: {', '.join(changed)}), and its run would go on in the middle "
        "of these; bring them back, start in another --run_dir, or say --allow_changed_data if that is meant"
    )


def check_kind(run: RunConfig, saved: dict[str, Any], tag: Path) -> None:
    """Refuse a checkpoint of text for a run on images, and the other way round."""
    theirs, ours = of_images(saved), bool(run.model.image_size)
    if theirs != ours:
        kinds = {True: "images", False: "text"}
        raise CheckpointError(
            f"{tag} is of a model of {kinds[theirs]}, and this run trains one of {kinds[ours]} (model.image_size="
            f"{run.model.image_size}); start in another --run_dir"
        )


def check_tokenizer(run: RunConfig, saved: dict[str, Any], tag: Path) -> None:
    """Refuse a checkpoint whose ids mean something else than those of this run's data."""
    theirs, ours = saved.get("data", {}).get("tokenizer_sha256"), run.data.tokenizer_sha256
    if theirs != ours and not (ours and nothing_known(theirs, run.model.vocab_size)):
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
    facts = run.moe.facts
    defaults["router"] = facts.Options().model_dump(mode="json")
    # Where no code is looked up, the codebook's options may differ: nothing in the model depends on them.
    reads_codebook = facts.uses_codebook or facts.reads_source
    parts = STRUCTURE | {"router": facts.structure} | ({} if reads_codebook else {"codebook": ()})
    for section, names in parts.items():
        for name in here[section] if names is None else names:
            theirs, ours = saved.get(section, {}).get(name, defaults[section][name]), here[section][name]
            if theirs != ours:
                raise CheckpointError(
                    f"{tag} holds another model: {section}.{name}={theirs} there, {ours} here; "
                    f"set {section}.{name}={theirs} or start in another --run_dir"
                )


def _barrier() -> None:
    if several_ranks():
        dist.barrier()
