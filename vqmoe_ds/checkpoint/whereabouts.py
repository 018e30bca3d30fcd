"""Absolute paths and the tokenizer of a run, so that its folder is of use from any directory and after a move."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from vqmoe_ds.config.schema import RunConfig
from vqmoe_ds.data.image_tables import HUB
from vqmoe_ds.data.indexed import UNKNOWN, is_indexed, weighted_entry, with_changed, without_ending
from vqmoe_ds.data.labelled import KNOWN_SETS
from vqmoe_ds.data.tokenizer_base import Tokenizer
from vqmoe_ds.data.tokenizers import ByteTokenizer, load_tokenizer
from vqmoe_ds.runtime.errors import UserError

FOLDER = "tokenizer"
"""Folder in a run folder with a copy of its tokenizer."""
INDEX_FOLDER = "data_index"
"""Folder in a run folder with the order of prepared data, and with data that were prepared when it started."""


def with_whole_paths(config: RunConfig) -> RunConfig:
    """The configuration with every path of data, tokenizer and source as seen from the root of the file system."""
    data, tuned = config.data, config.finetune
    paths: dict[str, Any] = {name: _whole(getattr(data, name)) for name in ("path", "valid_path", "cache_dir")}
    if data.tokenizer not in (None, ByteTokenizer.kind):
        paths["tokenizer"] = os.path.abspath(str(data.tokenizer))
    about = {"checkpoint": _whole(tuned.checkpoint), "task": whole_task(tuned.task)}
    router = config.router
    if "path" in type(router).model_fields:
        router = router.model_copy(update={"path": _whole(getattr(router, "path", None))})
    sections: dict[str, Any] = {
        "router": router,
        "data": data.model_copy(update=paths),
        "finetune": tuned.model_copy(update=about),
    }
    return config.model_copy(update=sections)


def without_paths(saved: dict[str, Any]) -> dict[str, Any]:
    """A run configuration as saved, for others to see: no data and no run folder but for the tokenizer's checksum.

    Of other paths the last name stays, as that there is one tells how the model was made.
    """
    run = {name: section for name, section in saved.items() if name not in ("data", "run")}
    for section, field in (("finetune", "checkpoint"), ("finetune", "task"), ("router", "path")):
        if isinstance(path := run.get(section, {}).get(field), str):
            name, equals, _ = path.partition("=")
            run[section] = {**run[section], field: name if equals and field == "task" else Path(path).name}
    # With it the trainer refuses data of another tokenizer on the way back.
    checksum = saved.get("data", {}).get("tokenizer_sha256")
    return run if checksum is None else {**run, "data": {"tokenizer_sha256": checksum}}


def whole_task(task: str | None) -> str | None:
    """``NAME=PATH`` or the path of a labelled set with the whole path; what is known by name alone as it is."""
    if task is None or task == "lm" or task in KNOWN_SETS:
        return task
    name, equals, place = task.partition("=")
    return f"{name}={os.path.abspath(place)}" if equals else os.path.abspath(task)


def _whole(path: Any) -> Any:
    return with_changed(path, lambda source: source if source.startswith(HUB) else os.path.abspath(source))


def with_own_data(config: RunConfig, checkpoint: Path) -> RunConfig:
    """The configuration with the data that were prepared in the run's folder where that folder is now."""

    def found(prefix: str) -> str:
        if Path(prefix).parent.name != INDEX_FOLDER or is_indexed(prefix):
            return prefix
        # A tag lies in RUN/checkpoints: the run's folder is the second above it.
        places = [folder / INDEX_FOLDER / Path(prefix).name for folder in checkpoint.absolute().parents[:2]]
        return next((str(place) for place in places if is_indexed(str(place))), prefix)

    data = config.data
    moved = {name: with_changed(getattr(data, name), found) for name in ("path", "valid_path")}
    return config.model_copy(update={"data": data.model_copy(update=moved)})


def keep_tokenizer(config: RunConfig, run_dir: Path, most_bytes: int = 64 << 20) -> None:
    """Copy the tokenizer of a run's data into its folder, if it is known and of no more than ``most_bytes``.

    Raises:
        DataError: it cannot be written.
    """
    checksum = config.data.tokenizer_sha256
    if checksum in (None, UNKNOWN, ByteTokenizer.checksum) or _kept_in(run_dir, checksum) is not None:
        return
    tokenizer = tokenizer_of_data(config.data.model_dump(mode="json"), str(checksum))
    if tokenizer is not None and tokenizer.size <= most_bytes:
        tokenizer.save(run_dir / FOLDER)


def gives_ids_of(tokenizer: Tokenizer, checksum: str | None, vocab_size: int) -> bool:
    """Whether a tokenizer may be that of a model, by the checksum of the model's own, if known, and its vocabulary."""
    needed = 256 if isinstance(tokenizer, ByteTokenizer) else tokenizer.vocab_size
    return needed <= vocab_size and checksum in (None, UNKNOWN, tokenizer.checksum)


def tokenizer_of_data(data: dict[str, Any], checksum: str) -> Any:
    """The tokenizer with this checksum that the run's data names or that lies beside it, or None."""
    paths = data.get("path") or []
    prefixes = [paths] if isinstance(paths, str) else list(paths)
    sources = [without_ending(weighted_entry(entry)[0]) for entry in prefixes]
    places = [data.get("tokenizer"), *(f"{source}.tokenizer" for source in sources)]
    for place in places:
        if place and (place == "bytes" or Path(place).exists()):
            tokenizer = load_tokenizer(place)
            if tokenizer.checksum == checksum:
                return tokenizer
    return None


def kept_tokenizer(path: Path, checksum: str | None) -> Tokenizer | None:
    """The copy with this checksum in a run folder, given that folder or a checkpoint in it; or None."""
    # A tag lies in RUN/checkpoints: the run's folder is the second above it.
    copies = (_kept_in(folder, checksum) for folder in (path, *path.absolute().parents[:2]))
    return next((copy for copy in copies if copy is not None), None)


def _kept_in(run_dir: Path, checksum: str | None) -> Tokenizer | None:
    try:
        if (run_dir / FOLDER).is_dir() and (tokenizer := load_tokenizer(run_dir / FOLDER)).checksum == checksum:
            return tokenizer
    except (UserError, OSError):  # the recorded path is asked next
        pass
    return None
