"""A checkpoint of any kind as a plain model with its tokenizer, for everything that reads but does not train.

There is no engine and no optimizer: weights are streamed from the files into the model. Experts may be spread over
ranks; every other weight is whole on each.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vqmoe_ds.checkpoint.formats.huggingface.folder import run_config
from vqmoe_ds.checkpoint.load_experts import bind, check_place, open_store
from vqmoe_ds.checkpoint.open import open_checkpoint
from vqmoe_ds.checkpoint.reader import CheckpointReader, of_images, require_language_model, sound
from vqmoe_ds.checkpoint.resume.restore import check_same_model, fill_buffers, first_value
from vqmoe_ds.checkpoint.views.adapters import merged
from vqmoe_ds.checkpoint.whereabouts import gives_ids_of, kept_tokenizer, tokenizer_of_data, with_own_data
from vqmoe_ds.config.gpu import check_widths
from vqmoe_ds.config.schema import RunConfig
from vqmoe_ds.data.indexed import UNKNOWN
from vqmoe_ds.data.json_tokenizer import FILE, read_json_tokenizer
from vqmoe_ds.data.tokenizer_base import Tokenizer
from vqmoe_ds.data.tokenizers import ByteTokenizer, are_bytes, load_tokenizer
from vqmoe_ds.models.build import bare_model
from vqmoe_ds.models.transformer import MoETransformer
from vqmoe_ds.moe.expert_store import ExpertStore, StoredMoELayer
from vqmoe_ds.moe.layer import MoELayer
from vqmoe_ds.runtime.device import check_precision
from vqmoe_ds.runtime.errors import CheckpointError, ConfigError, DataError
from vqmoe_ds.runtime.memory import check_room

_SMALL = 1 << 24
"""Values that may be built in vain: ``check_same_model`` says which tensor differs."""
PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode and what belongs to it.

    Attributes:
        config: run configuration of the checkpoint.
        model: in evaluation mode, its parameters without gradients.
        tokenizer: that of the training data; None where it cannot be found.
        step: optimizer steps of the run that wrote the checkpoint.
        path: the checkpoint's folder (of a run, that of the tag taken).
        kind: as ``CheckpointReader.kind``.
        store: where the experts are, if they stay in the checkpoint's files.
    """

    config: RunConfig
    model: MoETransformer
    tokenizer: Tokenizer | None
    step: int
    path: Path
    kind: str
    store: ExpertStore | None = None

    @property
    def device(self) -> torch.device:
        return self.model.norm.weight.device

    @property
    def tokenizer_checksum(self) -> str | None:
        """Checksum of the tokenizer whose ids the model reads; None where it is not known."""
        noted = self.config.data.tokenizer_sha256
        return self.tokenizer.checksum if self.tokenizer is not None else None if noted == UNKNOWN else noted

    def close(self) -> None:
        """End the threads that read experts; the model computes nothing afterwards if it has any."""
        if self.store is not None:
            self.store.close()

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without the end of a document.

        Raises:
            CheckpointError: the tokenizer is not known.
        """
        return self.need_tokenizer().encode(text).tolist()

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; raises as ``encode``."""
        return self.need_tokenizer().decode(ids)

    def need_data(self) -> None:
        """Refuse to read the data of the run itself where the checkpoint does not say which they are.

        Raises:
            DataError: it does not.
        """
        data = self.config.data
        # Other formats leave out where the data lay, and so may what was made of them: ``data.path=None`` means the
        # default text, which is read as bytes.
        if self.kind not in ("deepspeed", "portable") or (data.path is None and data.tokenizer_sha256 is not None):
            raise DataError(f"{self.path} does not say what it was trained on; name a text with --data")

    def need_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise _not_found(self.path, self.config)
        return self.tokenizer


def load_model(
    path: str | Path,
    tokenizer: str | Path | None = None,
    ep_size: int = 1,
    ep_rank: int = 0,
    device: torch.device | str = "cpu",
    precision: str | None = None,
    expert_memory: int | None = None,
    images: bool = False,
) -> LoadedModel:
    """Load a run folder, a DeepSpeed tag of any layout, a portable, Hugging Face, Megatron or native folder.

    Args:
        path: anything ``open_checkpoint`` takes; of a run folder it is the tag that that one takes.
        tokenizer: what ``load_tokenizer`` takes, or a Hugging Face folder; None: that of the checkpoint or of
            the run's data, if it is still there.
        ep_size: ranks over which the experts are spread; above 1 the default process group must be up, all its ranks
            call this together, and forward passes are collective.
        ep_rank: this rank's place among those, ``rank % ep_size``.
        device: where the model lives.
        precision: of its parameters, bf16 or fp32; None: bf16 on a GPU, else fp32. Buffers (codebooks, the state of
            routers) stay float32, as in training.
        expert_memory: bytes of experts in memory, at most: they stay in the files, and each is read before its layer
            needs it (on a CPU, by threads that end with ``LoadedModel.close``). None: all are in memory.
        images: take a classifier of images, too; without it one is refused.

    Raises:
        CheckpointError: nothing there, damaged, a classifier, another model than its configuration says, or another
            tokenizer.
        ConfigError: ``ep_size`` does not divide the experts, the precision is none of the two, the GPU takes not
            that precision or those widths, or ``expert_memory`` is less than one expert or of no use there.
        DataError: the tokenizer named cannot be read.
    """
    reader = merged(open_checkpoint(path))
    with sound(reader.path):
        if not (images and of_images(reader.config)):
            require_language_model(reader, "this")
        config = with_own_data(run_config(reader.config, reader.path), reader.path)
        place = torch.device(device)
        if expert_memory is not None:
            check_place(config, place, ep_size)
        experts = config.moe.num_experts
        if experts % ep_size:
            raise ConfigError(f"--ep_size {ep_size} does not divide the {experts} experts of {reader.path}")
        dtype = _precision(config, place, precision, ep_size)
        # Before the weights, which take long: a wrong --tokenizer shows at once.
        found = None if config.model.image_size else find_tokenizer(reader, config, tokenizer)
        model = build_model(reader, config, ep_size, ep_rank, expert_memory)
        for param in model.parameters():
            # Not model.to(dtype): it would cast the buffers, too.
            param.data = param.data.to(dtype)
        if expert_memory is not None:
            store = open_store(reader, config, dtype, expert_memory)
            bind(model, store)
            return LoadedModel(config, model, found, reader.step, Path(reader.path), reader.kind, store)
        model.to(place)
        if ep_size > 1:
            # Makes process groups, which is a collective of all ranks.
            for layer in model.moe_layers():
                layer.set_deepspeed_parallelism()  # type: ignore[operator]
        return LoadedModel(config, model, found, reader.step, Path(reader.path), reader.kind)


def _precision(config: RunConfig, device: torch.device, asked: str | None, ep_size: int) -> torch.dtype:
    """The type of parameters, checked against the device."""
    name = asked or ("bf16" if device.type == "cuda" else "fp32")
    if name not in PRECISIONS:
        raise ConfigError(f"precision {name!r} is unknown; give {' or '.join(PRECISIONS)}")
    if device.type == "cuda":
        check_precision(device, name, "choose precision fp32")
        check_widths(config, name, ep_size)
    return PRECISIONS[name]


@torch.no_grad()
def build_model(
    reader: CheckpointReader, config: RunConfig, ep_size: int = 1, ep_rank: int = 0, expert_memory: int | None = None
) -> MoETransformer:
    """The model of a checkpoint in evaluation mode, with this rank's share of the experts, read in small stretches.

    Args:
        reader, config, ep_size, ep_rank: as of ``load_model``.
        expert_memory: bytes that the experts will have; they are not read now. None: all are read.

    Raises:
        CheckpointError: tensors are missing or of other shapes.
    """
    check_size(config, reader, expert_memory)
    layer_class: type[MoELayer] = MoELayer if expert_memory is None else StoredMoELayer
    if ep_size > 1:  # DeepSpeed makes their groups
        from vqmoe_ds.moe.deepspeed_layer import DeepSpeedMoELayer

        layer_class = DeepSpeedMoELayer
    model = bare_model(config, ep_size, ep_rank, layer_class).eval().requires_grad_(False)
    check_same_model(model, ep_size, reader)
    for name, param in model.named_parameters():
        # On meta are the experts of StoredMoELayer, which stay in the files.
        if not param.is_meta:
            reader.fill(param.data.view(-1), name, start=first_value(name, param, ep_rank))
    fill_buffers(model, reader)
    return model


def check_size(config: RunConfig, reader: CheckpointReader, expert_memory: int | None = None) -> None:
    """Refuse, before anything is built, a model that its files cannot hold or this machine has no memory for.

    Args:
        config, reader: of the checkpoint.
        expert_memory: bytes that the experts have; None: all they need.

    Raises:
        CheckpointError: it is; what a configuration says of itself may be anything.
    """
    model, moe, book, path = config.model, config.moe, config.codebook, reader.path
    stored = sum(math.prod(shape) for shape in reader.shapes.values())
    layers = 0 if not moe.facts.has_experts else len(model.moe_blocks)
    experts = 3 * layers * moe.num_experts * moe.expert_hidden * model.width
    attention = 2 * model.layers * model.width * (model.attention_width + model.kv_width)
    # A lower bound: norms, gates, routers and dense MLPs are left out.
    values = model.vocab_size * model.width + attention + experts
    if values > stored + _SMALL:
        raise CheckpointError(
            f"{path} holds another model: {values:,} values or more by its configuration, {stored:,} in its files"
        )
    codes = layers * (book.num_codes or moe.num_experts) * (book.code_dim or config.source_width)
    positions = model.sequence_length * (model.width + model.attention_width)
    tables = model.vocab_size * (model.width + 2 * layers) + positions
    what = f"the model of {path} (model.sequence_length={model.sequence_length}, codebook.num_codes={book.num_codes})"
    # Weights are read in float32 and cast afterwards, so that four bytes count for every precision.
    left_out = 0 if expert_memory is None else max(0, 4 * experts - expert_memory)
    check_room(
        4 * (max(stored, values) + 3 * codes + tables) - left_out,
        what,
        "use a machine with more, or a smaller model",
        CheckpointError,
    )


def find_tokenizer(reader: CheckpointReader, config: RunConfig, given: str | Path | None = None) -> Tokenizer | None:
    """The tokenizer named, or else the one the checkpoint was trained with; None where that is not to be found.

    It is looked for beside the checkpoint, beside the one it was fine-tuned from, in the run folder, and in the run's
    data.

    Raises:
        CheckpointError: it gives other ids than the model was trained on.
        DataError: it cannot be read.
    """
    checksum, vocab_size = config.data.tokenizer_sha256, config.model.vocab_size
    tokenizer: Any = None
    beside = [path for path in (reader.path, config.finetune.checkpoint) if path and os.path.exists(Path(path) / FILE)]
    if given is not None:
        exported = os.path.exists(Path(given) / "config.json")
        tokenizer = read_json_tokenizer(given, checksum) if exported else load_tokenizer(given)
    elif are_bytes(checksum, vocab_size):
        tokenizer = ByteTokenizer()
    elif beside:
        tokenizer = read_json_tokenizer(beside[0], checksum)
    elif checksum not in (None, UNKNOWN):
        data = reader.config.get("data", {})
        tokenizer = kept_tokenizer(reader.path, checksum) or tokenizer_of_data(data, str(checksum))
    if tokenizer is None:
        return None
    if not gives_ids_of(tokenizer, checksum, vocab_size):
        raise CheckpointError(
            f"the tokenizer {given or 'beside it'} ({tokenizer.kind}, {tokenizer.vocab_size} ids) is not the one that "
            f"{reader.path} (vocabulary {vocab_size}) was trained with; name that one with --tokenizer"
        )
    return tokenizer


def require_tokenizer(reader: CheckpointReader, config: RunConfig, given: str | Path | None = None) -> Tokenizer:
    """``find_tokenizer``, where one that is not to be found is a ``CheckpointError`` as well."""
    found = find_tokenizer(reader, config, given)
    if found is None:
        raise _not_found(reader.path, config)
    return found


def _not_found(path: Path, config: RunConfig) -> CheckpointError:
    vocab_size = config.model.vocab_size
    return CheckpointError(f"the tokenizer of {path} was not found (vocabulary {vocab_size}); name it with --tokenizer")
