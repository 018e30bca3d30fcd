"""One epoch of prepared corpora, shuffled and cut into windows by megatron-core.

``GPTDataset`` shuffles by the number of samples asked for; asking for one epoch at a time makes its order a function of
the data and the seed, however long a run is. Import this only for training: megatron-core takes seconds to load.
"""

from __future__ import annotations

import logging
import shutil
import types
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from vqmoe_ds.data.index_cache import Shapes, publish, read_array, why_unsound, work_folder
from vqmoe_ds.data.portions import HELD_OUT, Portion, members
from vqmoe_ds.runtime.errors import DataError
from vqmoe_ds.runtime.extras import library
from vqmoe_ds.runtime.ranks import from_first, several_ranks

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # about optional GPU libraries
    library("megatron.core", "prepared data", DataError)
    from megatron.core.datasets import blended_dataset, gpt_dataset
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig


logging.getLogger("megatron").setLevel(logging.ERROR)

# Both read their indices by numpy.load(..., allow_pickle=True), which runs whatever lies there.
_numpy = types.ModuleType("numpy")
vars(_numpy).update(vars(np), load=read_array)
gpt_dataset.numpy = blended_dataset.numpy = _numpy


class DocumentDataset(GPTDataset):
    """``GPTDataset`` of a spread share that also masks the first token of every stored sequence.

    Sequences are shuffled, so what stands before one is another text, whether or not the end-of-document id closes it.
    """

    def __init__(self, dataset: Any, path: str, indices: np.ndarray, samples: None, split: Any, config: Any) -> None:
        if len(dataset.sequence_lengths) and dataset.sequence_lengths.min() < 0:
            # The compiled loop that cuts windows adds the lengths up, and would walk past the end.
            raise DataError(f"{path}.idx has sequences of fewer than no tokens: it is damaged, prepare it again")
        # With split="1" the indices are those of all sequences, so that only their number counts.
        super().__init__(dataset, path, members(len(indices), config.share), samples, split, config)
        _check_values(self, path)

    def __getitem__(self, idx: int | None) -> dict[str, Any]:
        sample = super().__getitem__(idx)
        row = self.shuffle_index[idx or 0]
        (first, offset), (last, _) = self.sample_index[row], self.sample_index[row + 1]
        if first != last:
            # The target one place before a sequence starts is its first token, which nothing there foretells.
            starts = np.cumsum(self.dataset.sequence_lengths[self.document_index[first:last]]) - offset
            sample["loss_mask"][starts[starts > 0] - 1] = 0.0
        return sample


def _check_values(dataset: Any, path: str) -> None:
    """Check that the windows of a corpus lie end to end within its sequences, and that the shuffle names no others.

    Raises:
        DataError: an index that somebody forged, checksums and all.
    """
    order, samples, shuffle = dataset.document_index, dataset.sample_index, dataset.shuffle_index
    whole = not len(order) or (order.min() >= 0 and order.max() < len(dataset.dataset.sequence_lengths))
    if whole:
        # In int64: a forged index is to be found out, not wrapped around into range.
        lengths = dataset.dataset.sequence_lengths[order].astype(np.int64)
        starts, (places, offsets) = np.cumsum(lengths) - lengths, samples.T.astype(np.int64)
        whole = places.min() >= 0 and places.max() < len(lengths)
    if whole:
        within = (offsets >= 0) & (offsets <= lengths[places])
        end_to_end = starts[places] + offsets == np.arange(len(places)) * dataset.config.sequence_length
        whole = bool((within & end_to_end).all()) and shuffle.min() >= 0 and shuffle.max() < len(places) - 1
    if not whole:
        where = f"{path} in {dataset.config.path_to_cache}"
        raise DataError(f"the index of {where} is not that of its data; remove it", local=True)


class _EndOfDocument:
    """The part of a tokenizer that ``GPTDataset`` reads; -2, which no id is, where the end of a document is unknown."""

    # GPTDatasetConfig would derive the number type of the ids from it; with None that of the .idx holds.
    vocab_size = None
    # GPTDataset makes 0 of this id and masks its targets. Of -1, its own choice, a block of 0xFF in the .bin is full;
    # every window is whole, so that none is padded.
    pad = int(np.iinfo(np.int64).min)

    def __init__(self, eod: int | None) -> None:
        self.eod = -2 if eod is None else eod

    @property
    def unique_identifiers(self) -> dict[str, Any]:
        return {"eod": self.eod}


def open_epoch(portion: Portion, seed: tuple[int, ...], eod: int | None, cache: Path) -> Any:
    """Samples of one epoch as ``GPTDataset`` gives them: tokens, labels and loss_mask, each of shape ``[S]``.

    All ranks call it together. Rank 0 builds the index under a temporary name, the others read it, and a rename makes
    it whole: a kill leaves nothing that a later run could take for an index. One that is there already is taken only if
    nothing in it was altered.

    Args:
        portion: what to read.
        seed: (seed, portion, epoch); decides the order.
        eod: id after which nothing is learned; None where it is unknown.
        cache: folder of the indices.

    Raises:
        DataError: the index cannot be written.
    """
    final = _folder(portion, seed, cache)
    try:
        folder = _agreed_folder(final, portion)
        dataset = _build(folder, portion, seed, eod)
        if folder != final:
            _seal(folder, final)
    except Exception as error:
        # On rank 0 of a process group BlendedMegatronDatasetBuilder raises a bare Exception from an OSError.
        cause = error if isinstance(error, OSError) else error.__cause__
        if not isinstance(cause, OSError):
            raise
        sentence = f"the index of the data cannot be kept in {cache} ({cause.strerror}); set data.cache_dir"
        raise DataError(sentence, local=True) from error
    # Which corpus is next, and which of its windows; the rest of the index is what _check_values has seen.
    if hasattr(dataset, "dataset_index"):  # of several corpora
        which, entry = dataset.dataset_index, dataset.dataset_sample_index
        windows = np.array(portion.windows)
        if not ((which >= 0) & (which < len(windows))).all() or not ((entry >= 0) & (entry < windows[which])).all():
            raise DataError(f"the index of the data in {final} is not that of its data; remove it", local=True)
    assert len(dataset) == len(portion), f"{len(dataset)} windows instead of {len(portion)}"
    return dataset


def remove_epoch(portion: Portion, seed: tuple[int, ...], cache: Path) -> None:
    """Remove, on the first rank, the index of an epoch that no rank reads any more; ``open_epoch`` would make it anew.

    Args:
        portion, seed, cache: as of ``open_epoch``.
    """
    # Epoch 0 of a training with seed 0 has the seed of the held-out text, which may be the same portion: it stays.
    if seed != HELD_OUT and not (dist.is_initialized() and dist.get_rank()):
        shutil.rmtree(_folder(portion, seed, cache), ignore_errors=True)


def _folder(portion: Portion, seed: tuple[int, ...], cache: Path) -> Path:
    return cache / "-".join([portion.fingerprint, *map(str, seed)])


def _build(folder: Path, portion: Portion, seed: tuple[int, ...], eod: int | None) -> Any:
    """megatron-core's data set with its index in ``folder``."""
    # Mixed, not added up: else the second epoch of one seed would be the first epoch of the next.
    config = GPTDatasetConfig(
        random_seed=int(np.random.SeedSequence(seed).generate_state(1)[0]),
        sequence_length=portion.sequence_length,
        blend=([prefix.path for prefix in portion.prefixes], None),
        split="1",  # the share is taken by DocumentDataset
        path_to_cache=str(folder),
        tokenizer=_EndOfDocument(eod),
        reset_position_ids=False,
        reset_attention_mask=False,
        # Besides masking it keeps megatron-core from caching the mask of the first sample for all others:
        # DocumentDataset.__getitem__ writes into it.
        eod_mask_loss=True,
        create_attention_mask=False,
    )
    # megatron-core does not name its files after it: the folder's name tells it (Portion.fingerprint).
    config.share = portion.share
    # Samples of None are one epoch of every corpus, which the builder allows without weights only. It builds on rank 0
    # and, behind a barrier, on the others: all ranks must call it. With several corpora there has to be a process
    # group, for BlendedDataset asks for its rank without looking whether there is one.
    return BlendedMegatronDatasetBuilder(DocumentDataset, [None, None, None], lambda: True, config).build()[0]


def _shapes(portion: Portion) -> Shapes:
    """Shapes of the arrays of an index, by their names at megatron-core."""
    first, last = portion.share
    # megatron-core names arrays after the path: a corpus that is named twice, to be read twice, has them once.
    paths = [prefix.path for prefix in portion.prefixes]
    counts = {prefix.path: len(prefix.lengths) for prefix in portion.prefixes}.values()
    windows = dict(zip(paths, portion.windows, strict=True)).values()
    shapes: Shapes = {
        # Rounded as portions.members rounds, or no index would ever be found sound.
        "document_index": [(round(last * float(count)) - round(first * float(count)),) for count in counts],
        "sample_index": [(number + 1, 2) for number in windows],
        "shuffle_index": [(number,) for number in windows],
    }
    if len(paths) > 1:
        shapes["dataset_index"] = shapes["dataset_sample_index"] = [(len(portion),)]
    return shapes


def _agreed_folder(final: Path, portion: Portion) -> Path:
    """The finished index where rank 0 sees one that is sound, else a name of this run's own to build it under."""
    folder: Path | OSError = final
    if not (dist.is_initialized() and dist.get_rank()) and why_unsound(final, _shapes(portion)):
        try:
            folder = work_folder(final)
        except OSError as error:
            folder = error
    # Rank 0 decides for all, also that there is none: ranks may see other states of a shared file system, and would
    # part ways at a barrier, or wait for what rank 0 never says.
    agreed: Path | OSError = from_first(folder)
    if isinstance(agreed, OSError):
        raise agreed
    return agreed


def _seal(folder: Path, final: Path) -> None:
    if several_ranks():
        dist.barrier()  # the others have opened the files
        # They go on before the rename: what they have mapped does not follow the name.
        if dist.get_rank() != 0:
            return
    publish(folder, final)
