"""Checkpoints as Hugging Face folders, and back.

A folder holds ``model.safetensors`` (or shards and an index), ``config.json``, ``generation_config.json``, the
tokenizer, a model card, for our own architecture the files of its code, and two files that only ``open_hf`` reads:
``vqmoe_training.json`` (step and run configuration without paths) and ``vqmoe_training.safetensors`` (what codes learn
with). Without these two the model loads as well, and comes back to the trainer with codes that go on from where they
are.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor
from tqdm import tqdm

from vqmoe_ds.checkpoint.formats.huggingface.card import find_summary, model_card
from vqmoe_ds.checkpoint.formats.huggingface.llama_cpp import why_no_gguf
from vqmoe_ds.checkpoint.formats.huggingface.names import (
    ARCHITECTURES,
    CODE_FILES,
    EXPERT_TABLES,
    INFERENCE_BUFFERS,
    Part,
    buffer_shapes,
    hf_options,
    parts_of,
    run_sections,
    shapes_of,
    unstacked,
    why_not_read,
)
from vqmoe_ds.checkpoint.formats.huggingface.stock import stock_sections
from vqmoe_ds.checkpoint.io.safetensors_io import Entry, read_header, write_safetensors
from vqmoe_ds.checkpoint.io.shards import entry_of, read_json, read_weights, write_weights
from vqmoe_ds.checkpoint.reader import CheckpointReader, Piece, WeightsReader, register_format
from vqmoe_ds.checkpoint.whereabouts import gives_ids_of, kept_tokenizer, tokenizer_of_data, without_paths
from vqmoe_ds.config.problems import first_problem
from vqmoe_ds.config.schema import RunConfig
from vqmoe_ds.data.json_tokenizer import data_of_folder
from vqmoe_ds.data.tokenizers import ByteTokenizer, load_tokenizer, nothing_known
from vqmoe_ds.runtime.errors import CheckpointError, DataError
from vqmoe_ds.runtime.files import new_folder, write_json
from vqmoe_ds.runtime.memory import parse_memory

TRAINING, TRAINING_BUFFERS = "vqmoe_training.json", "vqmoe_training.safetensors"
FORMAT = 1
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LOGITS = {
    "float32": "float32. Logits are those of the trainer within float32 rounding.",
    "bfloat16": (
        "bfloat16, codes and tables in float32. Logits are those of the trainer in bfloat16; against float32 weights "
        "they differ by rounding, and a token near the border of two experts may go to the other one."
    ),
}


@dataclass(frozen=True)
class ExportOptions:
    """Options of ``export_hf``.

    Attributes:
        dtype: of the weights, ``float32`` or ``bfloat16``; codes are always float32.
        max_shard: largest file, like ``2GB``; a tensor that is larger has a file of its own.
        arch: ``vqmoe``, or ``mixtral`` or ``llama`` where the stock model is equal.
        tokenizer: ``auto`` (what the run's data names), ``none``, or what ``load_tokenizer`` takes.
        inexact_tokenizer: as ``inexact`` of ``write_tokenizer``.
        force: replace a folder that exists.
    """

    dtype: str = "float32"
    max_shard: str = "2GB"
    arch: str = "vqmoe"
    tokenizer: str = "auto"
    inexact_tokenizer: bool = False
    force: bool = False


def export_hf(reader: CheckpointReader, dst: str | Path, options: ExportOptions | None = None) -> list[str]:
    """Write a checkpoint as a Hugging Face folder, tensor by tensor.

    Args:
        reader: of ``open_checkpoint`` or ``open_hf``.
        dst: the folder; it appears whole or not at all.
        options: see there.

    Returns:
        Remarks for the user, one sentence each.

    Raises:
        CheckpointError: options that do not fit this model or each other, a tensor that is not known, DST exists, no
            space. All but the last are found before anything is written.
        ConfigError: ``max_shard`` is no size.
    """
    dst, options = Path(dst), options or ExportOptions()
    limit = parse_memory(options.max_shard, "--max_shard")
    for value, known in ((options.dtype, tuple(DTYPES)), (options.arch, ARCHITECTURES)):
        if value not in known:
            raise CheckpointError(f"{value!r} is none of {', '.join(known)}")
    config, buffers = run_config(reader.config, reader.path), reader.buffers()
    source_table = bool(buffers.get("source.table_ready", False)) and "source.table_VD" in buffers
    description = hf_options(config, options.arch, source_table)
    _check_tensors(reader, config)
    tokenizer, remarks = _find_tokenizer(reader, config, options.tokenizer)
    no_gguf = why_no_gguf(config, options.arch, tokenizer)
    if no_gguf and options.arch != "vqmoe" and (tokenizer is not None or config.model.sliding_window):
        remarks.append(f"make no GGUF of it, for llama.cpp would do otherwise than training did: {no_gguf}")
    inference, training = _split_buffers(buffers, options.arch, source_table)
    if options.arch == "vqmoe":
        _check_tables(inference, config, Path(reader.path))
    entries = _entries(reader, parts_of(config, options.arch), DTYPES[options.dtype])
    entries += [entry_of(name, tensor) for name, tensor in inference.items()]
    total = sum(entry.nbytes for entry in entries)
    with new_folder(dst, options.force) as folder:
        if tokenizer is not None:
            from vqmoe_ds.checkpoint.formats.huggingface.tokenizer import write_tokenizer

            lengths = config.model.vocab_size, config.model.sequence_length
            stock, inexact = options.arch != "vqmoe", options.inexact_tokenizer
            # Before config.json is written, which holds the ids of its special tokens.
            description.update(write_tokenizer(folder, tokenizer, *lengths, stock=stock, inexact=inexact))
        with tqdm(total=total, unit="B", unit_scale=True, desc=f"writing {dst.name}", disable=None) as bar:
            write_weights(folder, entries, limit, bar.update)
        _write_small_files(folder, reader, config, options, description)
        summary = find_summary(Path(reader.path), reader.step)
        card = model_card(config, options.arch, reader.step, summary, LOGITS[options.dtype], no_gguf)
        (folder / "README.md").write_text(card, encoding="utf-8")
        if training:
            write_safetensors(folder / TRAINING_BUFFERS, [entry_of(*item) for item in training.items()])
    return remarks


def run_config(saved: dict[str, Any], path: Path) -> RunConfig:
    """The run configuration of a checkpoint.

    Raises:
        CheckpointError: it is not one of this version, or of somebody's own model with native DeepSpeed-MoE layers.
    """
    if "native" in saved:
        raise CheckpointError(
            f"{path} is of a model with deepspeed.moe.layer.MoE layers, which only its own code can build; "
            "tools/convert_checkpoint.py moves it to other layouts"
        )
    try:
        return RunConfig(**saved)
    except ValidationError as error:
        first = first_problem(error)
        told = first.message if first.kind == "value_error" else first
        raise CheckpointError(f"{path} has a run configuration that cannot be: {told}") from None


def _check_tensors(reader: CheckpointReader, config: RunConfig) -> None:
    want, have = shapes_of(config), {name: tuple(reader.shape(name)) for name in reader.names()}
    for name in sorted(want.keys() | have.keys()):
        if want.get(name) != have.get(name):
            state = f"has shape {have[name]}" if name in have else "is missing"
            wanted = f"should have {want[name]}" if name in want else "belongs to no model of that configuration"
            raise CheckpointError(f"{reader.path}: {name} {state} and {wanted}")


def _split_buffers(
    buffers: dict[str, Tensor], arch: str, source_table: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Buffers that routes follow from, by their names there, and the rest, by ours."""
    here = dict(INFERENCE_BUFFERS) if arch == "vqmoe" else {}
    # The table is zeros until the average has begun, and no code looks at it: it goes to the file for the way back.
    if not source_table:
        here.pop("source.table_VD", None)
    inference = {here[name]: tensor for name, tensor in buffers.items() if name in here}
    return inference, {name: tensor for name, tensor in buffers.items() if name not in here}


def _entries(reader: CheckpointReader, parts: list[Part], dtype: torch.dtype) -> list[Entry]:
    entries = []
    for part in parts:
        whole = tuple(reader.shape(part.source))
        shape = part.shape(whole)
        values = partial(reader.stream, part.source, "fp32", part.start(whole), math.prod(shape))
        entries.append(Entry(part.name, dtype, shape, values))
    return entries


def _write_small_files(
    folder: Path, reader: CheckpointReader, config: RunConfig, options: ExportOptions, description: dict[str, Any]
) -> None:
    version: dict[str, Any] = {"transformers_version": _transformers_version()}
    tokens: dict[str, Any] = {n: description[n] for n in ("eos_token_id", "pad_token_id") if n in description}
    write_json(folder / "config.json", {**description, "dtype": options.dtype, **version}, indent=2)
    write_json(folder / "generation_config.json", {**tokens, **version}, indent=2)
    run = without_paths(config.model_dump(mode="json"))
    write_json(folder / TRAINING, {"format": FORMAT, "step": reader.step, "config": run}, indent=2)
    if options.arch == "vqmoe":
        code = Path(__file__).resolve().parents[3] / "models" / "hf"
        for name in CODE_FILES:
            shutil.copyfile(code / name, folder / name)


def _transformers_version() -> str:
    try:
        return metadata.version("transformers")
    except metadata.PackageNotFoundError:
        return "5.23.0"  # that of constraints.txt


def _find_tokenizer(reader: CheckpointReader, config: RunConfig, choice: str) -> tuple[Any, list[str]]:
    """The tokenizer of the run's data, or None, and what the user should know about it.

    Raises:
        CheckpointError: the tokenizer asked for is not that of the model.
    """
    if choice == "none":
        return None, ["without tokenizer files, as asked"]
    checksum = config.model_dump(mode="json")["data"].get("tokenizer_sha256")
    try:
        if choice != "auto":
            tokenizer = load_tokenizer(choice)
        elif checksum in (None, ByteTokenizer.checksum):
            tokenizer = ByteTokenizer()
        else:
            data = reader.config.get("data", {})
            tokenizer = kept_tokenizer(reader.path, checksum) or tokenizer_of_data(data, checksum)
    except DataError as error:
        raise CheckpointError(f"{error}; or export without it (--tokenizer none)") from None
    if tokenizer is None or (choice == "auto" and nothing_known(checksum, config.model.vocab_size)):
        return None, [
            f"no tokenizer was found that gives the ids of this model (vocabulary {config.model.vocab_size}); "
            "name it with --tokenizer"
        ]
    if not gives_ids_of(tokenizer, checksum, config.model.vocab_size):
        raise CheckpointError(
            f"tokenizer {choice} ({tokenizer.vocab_size} ids) is not the one that this model (vocabulary "
            f"{config.model.vocab_size}) was trained with; name that one, or export without (--tokenizer none)"
        )
    return tokenizer, []


# ---------------------------------------------------------------- back again


class HFReader(WeightsReader):
    """A Hugging Face folder as a checkpoint without an optimizer.

    Args:
        path: the folder.

    Raises:
        CheckpointError: not one of ours nor a Mixtral or Llama that this trainer can compute, damaged, or incomplete.
    """

    kind = "hf"

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.path = Path(path)
        options = read_json(self.path / "config.json")
        self.arch = str(options.get("model_type"))
        if self.arch not in ARCHITECTURES:
            raise CheckpointError(
                f"{self.path} holds a model of type {self.arch}; this reads {' and '.join(ARCHITECTURES)}, and "
                "tools/upcycle.py makes a VQMoE of models of more types"
            )
        training = read_json(self.path / TRAINING) if (self.path / TRAINING).exists() else {}
        if training.get("format", 0) > FORMAT:
            raise CheckpointError(f"{self.path / TRAINING} is of a newer format; update vqmoe_ds")
        self._run = _with_tokenizer(_merged_config(options, training, self.arch, self.path), self.path)
        self.config = self._run.model_dump(mode="json")
        self.step = int(training.get("step", 0))
        self._weights = unstacked(read_weights(self.path), self.arch)
        if reason := why_not_read(options, self._weights):
            raise CheckpointError(f"{self.path} cannot be read: {reason}")
        self._shapes = shapes_of(self._run)
        self._parts: dict[str, list[Part]] = {name: [] for name in self._shapes}
        for part in parts_of(self._run, self.arch):
            self._parts[part.source].append(part)
        self._check_weights()

    def pieces(self, name: str, kind: str = "fp32") -> list[Piece]:
        if kind != "fp32" or name not in self._parts:
            raise CheckpointError(f"{self.path} holds no {kind} of {name}: Hugging Face folders hold weights alone")
        whole = self._shapes[name]
        parts = sorted(self._parts[name], key=lambda part: part.start(whole))
        return [Piece(p.start(whole), math.prod(p.shape(whole)), self._weights[p.name], 0) for p in parts]

    def buffers(self) -> dict[str, Tensor]:
        """Buffers of the trainer's model; what codes learn with is made anew where the folder lacks it."""
        found = {
            ours: self._weights[theirs].whole() for ours, theirs in INFERENCE_BUFFERS.items() if theirs in self._weights
        }
        settled: dict[str, Tensor] = {}
        if self._run.moe.facts.uses_codebook:
            settled = settled_codebook(self._run, found["bank.codes_LKC"], found["bank.code_map_LK"])
        if (self.path / TRAINING_BUFFERS).exists():
            from vqmoe_ds.moe.codebook import add_adam_steps

            learned: dict[str, Tensor] = {}
            for name, stored in read_header(self.path / TRAINING_BUFFERS).items():
                if name in found or (name in settled and stored.shape != settled[name].shape):
                    raise CheckpointError(
                        f"{self.path / TRAINING_BUFFERS}: {name} is not of this model; export the model again"
                    )
                learned[name] = stored.whole()
            add_adam_steps(learned, "bank.")
            settled |= learned
        return settled | found

    def _check_weights(self) -> None:
        for name, parts in self._parts.items():
            for part in parts:
                stored = self._weights.get(part.name)
                want = part.shape(self._shapes[name])
                if stored is None or stored.shape != want:
                    state = (
                        "is missing" if stored is None else f"has shape {list(stored.shape)} instead of {list(want)}"
                    )
                    raise CheckpointError(
                        f"{self.path}: {part.name} {state}; does config.json belong to these weights?"
                    )
        # Now, not at the first lookup: a number of no expert would be an index out of bounds there.
        tables = {name: stored.whole() for name, stored in self._weights.items() if name in INFERENCE_BUFFERS.values()}
        _check_tables(tables, self._run, self.path)


def _check_tables(tables: dict[str, Tensor], config: RunConfig, path: Path) -> None:
    """The buffers that routes follow from, by their names in a folder: what is looked up in them is there.

    Raises:
        CheckpointError: one is missing, of another shape, no finite float32, or has a number of no expert.
    """
    experts = config.moe.num_experts
    for name, shape in buffer_shapes(config, "model.codebook.source_table" in tables).items():
        table = tables.get(name)
        if table is None or table.shape != shape:
            state = "is missing" if table is None else f"has shape {list(table.shape)} instead of {list(shape)}"
            raise CheckpointError(f"{path}: {name} {state}; export the model again")
        if name in EXPERT_TABLES:
            sound = table.dtype == torch.int64 and bool(((table >= 0) & (table < experts)).all())
            wanted = f"experts from 0 to {experts - 1} as int64"
        else:
            sound, wanted = table.dtype == torch.float32 and bool(table.isfinite().all()), "finite float32"
        if not sound:
            raise CheckpointError(f"{path}: {name} must hold {wanted}; take another checkpoint, or export it again")


def open_hf(path: str | Path) -> HFReader:
    """Open a folder that ``export_hf`` or ``save_pretrained`` wrote; see ``HFReader``."""
    return HFReader(path)


register_format("hf", lambda path: (path / "config.json").exists(), open_hf)


def _merged_config(options: dict[str, Any], training: dict[str, Any], arch: str, path: Path) -> RunConfig:
    """The run's own configuration where it still describes the model of ``config.json``, else one made from that."""
    read = run_sections if arch == "vqmoe" else partial(stock_sections, arch=arch)
    sections = read(options)
    # config.json decides: whoever edits it, or fine-tunes and saves with transformers, means the model it describes.
    kept = training.get("config")
    if isinstance(kept, dict):
        config = run_config(kept, path / TRAINING)
        # By their meaning: transformers and older versions write the same options otherwise, or not at all.
        if read(hf_options(config, arch, bool(options.get("source_table")))) == sections:
            return config
    return run_config(sections, path / "config.json")


def _with_tokenizer(config: RunConfig, folder: Path) -> RunConfig:
    """With the folder's own tokenizer, where nothing else is known of the ids."""
    if not nothing_known(config.data.tokenizer_sha256, config.model.vocab_size):
        return config
    return config.model_copy(update={"data": config.data.model_copy(update=data_of_folder(folder))})


def settled_codebook(config: RunConfig, codes_LKC: Tensor, code_map_LK: Tensor) -> dict[str, Tensor]:
    """Buffers of a codebook whose codes are given: initialized, past its schedules, every code of the same weight.

    Not marked as initialized, the codes would be drawn anew at the first step.
    """
    from vqmoe_ds.moe.codebook import CodebookBank

    book = config.codebook
    # The seed draws the projection: codes from upcycle/routed.py lie in the space of that of its own bank.
    bank = CodebookBank(book, len(codes_LKC), config.moe.num_experts, config.model.width, config.train.seed)
    bank.codes_LKC.copy_(codes_LKC)
    bank.code_map_LK.copy_(code_map_LK)
    # The mean count of a step, at which running counts settle: no code is dead or overused by it.
    bank.ema_count_LK.fill_(config.train.batch_size * config.model.sequence_length / codes_LKC.shape[1])
    # update() sets a code to sum over count, so both must give the code that is there.
    bank.ema_sum_LKC.copy_(codes_LKC * bank.ema_count_LK.unsqueeze(-1))
    bank.born_at.zero_()
    # Past decay_steps the decay is the final one; past reseed_until, if there is one, no code moves onto a token.
    bank.updates.fill_(1 + max(book.decay_steps, book.reseed_until))
    buffers = {f"bank.{name}": tensor for name, tensor in bank.state_dict().items()}
    buffers["source.table_ready"] = torch.tensor(book.source_momentum > 0)
    if book.source_momentum:
        buffers["source.table_VD"] = torch.zeros(config.model.vocab_size, config.model.width)
    return buffers
