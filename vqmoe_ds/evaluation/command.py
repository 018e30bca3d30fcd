"""The command line of ``launchers/evaluate.py``."""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vqmoe_ds.config.routers import add_plugin_option
from vqmoe_ds.evaluation.corruption import KINDS, Corruption, all_corruptions, parse_corruption
from vqmoe_ds.evaluation.passes import Passes
from vqmoe_ds.runtime.console import Console
from vqmoe_ds.runtime.device import asked_accelerator, check_precision, memory_errors
from vqmoe_ds.runtime.errors import CheckpointError, ConfigError, UserError, shown
from vqmoe_ds.runtime.files import check_target, write_json
from vqmoe_ds.runtime.leaving import hear_requests, leave_together, watch_peers
from vqmoe_ds.runtime.memory import parse_memory
from vqmoe_ds.runtime.ranks import Place, find_place, from_first, likely_rank

if TYPE_CHECKING:
    import torch

    from vqmoe_ds.checkpoint.load_model import LoadedModel
    from vqmoe_ds.data.images import ImageSet
    from vqmoe_ds.evaluation.images import DamagedSet


def build_parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    what = "run folder, checkpoint of any layout, portable, Hugging Face or Megatron folder"
    add("checkpoint", metavar="CHECKPOINT", help=what)
    what = "text, prepared prefixes, images, or a published folder of damaged ones (default: the run's own data)"
    add("--data", nargs="+", action="extend", metavar="PATH", help=what)
    add(
        "--split",
        default="auto",
        choices=("auto", "valid", "all"),
        help="what of it: the held-out share, all, or (auto) all of raw text that is named and else the held-out share",
    )
    add("--tokenizer", metavar="TOKENIZER", help="of the model, where it is not found: bytes, a folder, .model or .txt")
    add("--stride", type=int, metavar="N", help="tokens scored per window, at most the context (default: half of it)")
    size = "windows, or images, per forward pass (default: windows as memory allows, at most 32; 128 images)"
    add("--batch_size", type=int, metavar="N", help=size)
    add("--max_tokens", type=int, metavar="N", help="read no more tokens than these")
    add(
        "--corrupt",
        action="append",
        default=[],
        metavar="KIND[:RATE]",
        help=f"damage the text as well; repeatable; kinds: {', '.join(KINDS)}; of images docs/vision.md has them",
    )
    add("--corruptions", choices=("all",), help="every kind at its own rate")
    told = "texts of other domains, each scored by itself; their rise is over the data"
    add("--shift", nargs="+", action="extend", default=[], metavar="PATH", help=told)
    told = "of images: give errors in percent of those in this file, which --json wrote for another model (mCE)"
    add("--relative_to", metavar="FILE", help=told)
    told = "of images: tell the model's from others, a file or folder of images or noise (AUROC, AUPR)"
    add("--ood", nargs="+", action="extend", default=[], metavar="PATH", help=told)
    add(
        "--attacks",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help="of images: fgsm, pgd20, spsa20 (docs/vision.md)",
    )
    told = "of attacks: largest change of a value, in 255ths (default: 1 and 2)"
    add("--eps", nargs="+", action="extend", type=float, metavar="N", help=told)
    add("--seeds", type=int, default=3, metavar="N", help="draws of each damage (default 3)")
    add("--json", metavar="FILE", help="write every figure there")
    add("--precision", choices=("bf16", "fp32"), help="of the weights (default: bf16 on a GPU, fp32 on a CPU)")
    add("--expert_memory", metavar="SIZE", help="memory for experts, such as 256MiB; the rest stays in the checkpoint")
    add("--ep_size", type=int, default=1, metavar="N", help="ranks over which the experts are spread (default 1)")
    add("--sp_size", type=int, default=1, metavar="N", help="ranks that share every window (default 1)")
    add(
        "--peer_timeout",
        type=float,
        default=120.0,
        metavar="SECONDS",
        help="a rank that shows no life for so long is missing: the others leave (default 120)",
    )
    # DeepSpeed's launcher appends it to the user's words.
    add("--local_rank", type=int, default=None, help=argparse.SUPPRESS)
    add_plugin_option(parser)
    return parser


def main(args: argparse.Namespace) -> int:
    """Evaluate, print a table and write JSON; the exit code."""
    try:
        place = find_place(args.local_rank)
    except UserError as error:
        return Console(likely_rank(), __name__).fail(error)
    console = Console(place.rank, __name__)
    hear_requests(place, console, "nothing was written; start it again")
    try:
        corruptions = _check(args, place)
    except UserError as error:
        return leave_together(console.fail(error), place)
    # What DeepSpeed and gloo print is kept where an error is a defect, for what came before may explain it.
    handle, log = tempfile.mkstemp(prefix="vqmoe_evaluate_", suffix=".log")
    os.close(handle)
    console.capture(Path(log), of_defects=True)
    try:
        result, seconds = _evaluate(args, corruptions, place, console)
        _report(args, result, seconds, console)
    except BaseException as error:
        # Peers may sit in a collective: leave without waiting for them; the launcher ends them.
        os._exit(leave_together(console.fail(error), place))
    console.drop_log()
    return 0


def _check(args: argparse.Namespace, place: Place) -> tuple[Corruption, ...]:
    """Refuse what can be refused before anything heavy is loaded; returns the corruptions asked for."""
    # DeepSpeed would answer a wrong variable with a traceback, at its import.
    asked_accelerator()
    least_of = {"stride": 1, "batch_size": 1, "max_tokens": 2, "seeds": 1, "ep_size": 1, "sp_size": 1}
    for name, least in least_of.items():
        value = getattr(args, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name} {value} is too small; the least is {least}")
    if args.peer_timeout <= 0:
        raise ConfigError(f"--peer_timeout {args.peer_timeout:g} is too small; give seconds, such as 120")
    parse_memory(args.expert_memory, "--expert_memory")
    if args.eps is not None and not args.attacks:
        raise ConfigError("--eps is the size of attacks, and none is asked for; add --attacks, such as --attacks fgsm")
    if args.attacks:
        check_attacks(args.attacks, args.eps or ())
    for name in ("ep_size", "sp_size"):
        size = getattr(args, name)
        if place.world_size % size:
            raise ConfigError(
                f"--{name} {size} does not divide the {place.world_size} rank(s); start them with "
                f"deepspeed --num_gpus {size} launchers/evaluate.py ..."
            )
    if not os.path.exists(args.checkpoint):
        raise CheckpointError(f"checkpoint {args.checkpoint} does not exist; give a run folder or a checkpoint")
    check_target("--json", args.json)
    asked = [parse_corruption(spec) for spec in args.corrupt if not _is_of_images(spec)] + (
        all_corruptions() if args.corruptions else []
    )
    return tuple(dict.fromkeys(asked))


def check_attacks(names: Sequence[str], eps: Sequence[float]) -> None:
    """Refuse what is no attack.

    Raises:
        ConfigError: an unknown name, or a size out of its range.
    """
    from vqmoe_ds.evaluation.attacks import ATTACKS

    for name in names:
        if name not in ATTACKS:
            raise ConfigError(f"--attacks {shown(name)} is none; choose among {', '.join(ATTACKS)}")
    for size in eps:
        if not 0 < size < 255:
            raise ConfigError(f"--eps {size:g} must lie between 0 and 255: the largest change of a value, in 255ths")


def _is_of_images(spec: str) -> bool:
    """Whether a ``--corrupt`` is of a kind of damage to images; whether the model is of images is known later.

    Raises:
        ConfigError: it is of no kind at all.
    """
    from vqmoe_ds.evaluation.image_damage import KINDS as KINDS_OF_IMAGES

    kind = spec.partition(":")[0]
    if kind not in (*KINDS, *KINDS_OF_IMAGES):
        raise ConfigError(
            f"--corrupt {spec}: the kind {kind!r} is unknown; known are {', '.join(KINDS)} of text, and "
            f"{', '.join(KINDS_OF_IMAGES)} of images"
        )
    return kind in KINDS_OF_IMAGES


def _evaluate(
    args: argparse.Namespace, corruptions: tuple[Corruption, ...], place: Place, console: Console
) -> tuple[Any, float]:
    from vqmoe_ds.runtime.allocator import tune_allocator

    tune_allocator()
    # Heavy imports only now: bad options have been answered, and their chatter goes to the log.
    from vqmoe_ds.runtime.torch_setup import set_up_torch

    # bf16 is the default of ``load_model`` on a GPU. A refusal is told at the ranks' meeting: none waits for another.
    check = partial(check_precision, precision=args.precision or "bf16", remedy="choose --precision fp32")
    device = set_up_torch(place, check=check)
    remedy = "lower --batch_size, or spread experts (--ep_size) or windows (--sp_size) over more ranks"
    with (
        watch_peers(place, console, args.peer_timeout, "start it again"),
        memory_errors(place.rank, device, lambda: remedy),
    ):
        result, seconds = _score(args, corruptions, place, console, device)
        result.setting["max_tokens"] = args.max_tokens
        return result, seconds


def _score(
    args: argparse.Namespace,
    corruptions: tuple[Corruption, ...],
    place: Place,
    console: Console,
    device: torch.device,
) -> tuple[Any, float]:
    from vqmoe_ds.checkpoint.load_model import load_model
    from vqmoe_ds.checkpoint.open import open_checkpoint
    from vqmoe_ds.evaluation.evaluate import Options, checked_stride, evaluate
    from vqmoe_ds.evaluation.images import refuse_images
    from vqmoe_ds.evaluation.texts import open_texts

    # DeepSpeed's expert-parallel groups are consecutive ranks.
    ep_rank = place.rank % args.ep_size
    memory = parse_memory(args.expert_memory, "--expert_memory")
    path = args.checkpoint
    if place.world_size > 1:
        # Of a run that still saves, ranks might load other tags.
        path = from_first(open_checkpoint(path).path if place.rank == 0 else None)
    loaded = load_model(path, args.tokenizer, args.ep_size, ep_rank, device, args.precision, memory, images=True)
    if loaded.config.model.image_size:
        with _closing(loaded, console):
            return _score_images(args, loaded, place, console)
    refuse_images(loaded, [*(args.data or ()), *args.shift])
    _refuse_options_of_images(args)
    # ``evaluate`` checks it too, but only after the data has been read.
    checked_stride(args.stride, loaded.config.model.sequence_length)
    share_windows(loaded, args.sp_size, place)
    asked = [args.data, *([path] for path in args.shift)]
    texts, *others = (open_texts(loaded, paths, args.split, args.max_tokens) for paths in asked)
    options = Options(args.stride, args.batch_size, corruptions, args.seeds)
    shifted = dict(zip(args.shift, others, strict=True))
    if place.world_size > 1:
        console.say(f"{place.world_size} ranks score {args.checkpoint}")
    started = time.monotonic()
    progress = Passes(console.err, hidden=console.rank != 0)
    with _closing(loaded, console):
        result = evaluate(loaded, texts, options, place.rank, place.world_size, progress, shifted)
    result.setting["data"] = args.data or "the run's own"
    result.setting["split"] = args.split
    return result, time.monotonic() - started


@contextmanager
def _closing(loaded: LoadedModel, console: Console) -> Iterator[None]:
    with closing(loaded):
        yield
    if loaded.store is not None:
        console.say(loaded.store.summary())


def _refuse_options_of_images(args: argparse.Namespace) -> None:
    for name in ("attacks", "ood", "relative_to"):
        if getattr(args, name):
            verb = "is" if name == "relative_to" else "are"
            raise ConfigError(f"--{name} {verb} for classifiers of images, and {args.checkpoint} is a model of text")
    for spec in args.corrupt:
        parse_corruption(spec)  # one of images is unknown to text


def share_windows(loaded: LoadedModel, size: int, place: Place) -> None:
    """Let so many consecutive ranks share every window.

    Raises:
        ConfigError: heads or positions do not divide, or experts depend on tokens of other ranks.
    """
    from vqmoe_ds.config.deepspeed_json import check_sequence_parallel
    from vqmoe_ds.models.ulysses import sequence_share

    train = loaded.config.train.model_copy(update={"sequence_parallel_size": size})  # not that of the training
    run = loaded.config.model_copy(update={"train": train})
    check_sequence_parallel(run, place.world_size)
    # Makes process groups, for which all ranks come here in the same order.
    share = sequence_share(run, place.rank)
    if share is not None:
        loaded.model.share_sequences(share)


def _score_images(args: argparse.Namespace, loaded: LoadedModel, place: Place, console: Console) -> tuple[Any, float]:
    from vqmoe_ds.evaluation.corruption_error import read_reference
    from vqmoe_ds.evaluation.images import evaluate_images, open_published, open_split
    from vqmoe_ds.evaluation.out_of_distribution import open_others

    for name, left_out in (("stride", None), ("tokenizer", None), ("sp_size", 1), ("shift", [])):
        if getattr(args, name) != left_out:
            raise ConfigError(f"--{name} is for text, and {args.checkpoint} classifies images; leave it out")
    reference = read_reference(args.relative_to) if args.relative_to is not None else None
    attacks = list(dict.fromkeys(product(args.attacks, args.eps or (1.0, 2.0))))
    data, published = open_published(loaded, args.data)
    images, told = open_split(loaded, data, args.split)
    if args.max_tokens is not None:
        images = images.evenly(max(1, args.max_tokens // images.patches))
    damaged = _damaged(args, images, published)
    if reference is not None:
        counts = Counter(images.classes[label] for label in images.labels)
        reference.check([(each.kind, each.severity) for each in damaged], counts, bool(published))
    # Opened before anything is scored: what is refused is refused at once, not after the clean images.
    others = [open_others(loaded, name, len(images)) for name in args.ood]
    started = time.monotonic()
    progress = Passes(console.err, "image", hidden=console.rank != 0)
    layout = (args.batch_size, place.rank, place.world_size)
    result = evaluate_images(loaded, images, told, *layout, progress, damaged, attacks, others)
    if damaged:
        result.setting["damage"] = "published" if published else "made here"
    if reference is not None:
        result.relative = reference.corruption_errors(1 - result.clean["accuracy"], result.corrupted)
    return result, time.monotonic() - started


def _damaged(args: argparse.Namespace, images: ImageSet, published: list[DamagedSet]) -> list[DamagedSet]:
    """The damaged images to score: the published ones, as many of each as of the clean ones, or what is asked for."""
    from vqmoe_ds.evaluation.image_damage import KINDS as KINDS_OF_IMAGES
    from vqmoe_ds.evaluation.image_damage import parse_image_corruption
    from vqmoe_ds.evaluation.images import damaged_here

    specs = [*args.corrupt, *(KINDS_OF_IMAGES if args.corruptions else ())]
    if published and specs:
        raise ConfigError("--data names a folder of published damage; leave out --corrupt and --corruptions")
    if args.relative_to is not None and not (published or specs):
        raise ConfigError("--relative_to compares errors on damaged images; add --corruptions all")
    corruptions = dict.fromkeys(each for spec in specs for each in parse_image_corruption(spec))
    if args.max_tokens is not None:
        # As many, evenly spaced alike: of CIFAR-10-C these are the damaged copies of the clean images that are scored.
        published = [each.evenly(len(images)) for each in published]
    return [*published, *damaged_here(images, corruptions)]


def _report(args: argparse.Namespace, result: Any, seconds: float, console: Console) -> None:
    if console.rank != 0:
        return
    if args.json is not None:
        try:
            write_json(Path(args.json), asdict(result))
        except OSError as error:
            raise ConfigError(f"--json {args.json} could not be written ({error.strerror})") from None
    for line in result.lines():
        console.say(line)
    console.say(f"scored in {seconds:.0f} s" + (f"; every figure is in {args.json}" if args.json else ""))
