"""The command line of ``tools/generate.py``."""

from __future__ import annotations

import argparse
import io
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing
from itertools import chain, islice, takewhile
from typing import TYPE_CHECKING

from vqmoe_ds.config.routers import add_plugin_option
from vqmoe_ds.data.compressed import DAMAGES, SUFFIXES, decompressed, kind_of_bytes
from vqmoe_ds.runtime.device import ACCELERATOR, bind_single, memory_errors
from vqmoe_ds.runtime.errors import ConfigError, DataError, reports_errors, shown
from vqmoe_ds.runtime.memory import parse_memory

if TYPE_CHECKING:
    from vqmoe_ds.checkpoint.load_model import LoadedModel
    from vqmoe_ds.evaluation.generate import Sampling

MOST_TOKENS = 1_000_000_000
"""Tokens of a text, at most: more than a machine draws in a year."""
LONGEST_PROMPT = 16 << 20
"""Bytes of a prompt, at most: of a longer one the model would read only the last part, as long as its context."""


def build_parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    what = "run folder, checkpoint of any layout, portable, Hugging Face or Megatron folder"
    add("checkpoint", metavar="CHECKPOINT", help=what)
    add("--prompt", metavar="TEXT", help="text to go on from (default: standard input, or asked for on a terminal)")
    add("--tokens", type=int, default=200, metavar="N", help="tokens at most; an end of document comes first (200)")
    add("--temperature", type=float, default=0.8, metavar="X", help="0: always the likeliest token (default 0.8)")
    add("--top_p", type=float, default=1.0, metavar="P", help="draw among the likeliest that sum to P (default 1: all)")
    add("--seed", type=int, default=0, metavar="N", help="the same seed gives the same text (default 0)")
    add("--tokenizer", metavar="TOKENIZER", help="of the model, where it is not found: bytes, a folder, .model or .txt")
    add("--precision", choices=("bf16", "fp32"), help="of the weights (default: bf16 on a GPU, fp32 on a CPU)")
    add("--expert_memory", metavar="SIZE", help="memory for experts, such as 256MiB; the rest stays in the checkpoint")
    add("--no_cache", action="store_true", help="read the whole context anew for every token")
    add("--timing", action="store_true", help="tokens per second of every text, on standard error")
    add_plugin_option(parser)
    return parser


@reports_errors
def main(options: argparse.Namespace) -> int:
    """Write text; the exit code."""
    with closing(_Writer(options)) as writer:
        writer.run()
    return 0


class _Writer:
    """One model that answers prompts."""

    def __init__(self, options: argparse.Namespace) -> None:
        if not 1 <= options.tokens <= MOST_TOKENS:
            raise ConfigError(f"--tokens {shown(options.tokens)} must lie between 1 and {MOST_TOKENS:,}")
        self.memory = parse_memory(options.expert_memory, "--expert_memory")
        self.options, self.device = options, bind_single()
        # Heavy imports only now: bad options have been answered, and DeepSpeed knows the device.
        from vqmoe_ds.evaluation.generate import Sampling

        self.sampling: Sampling = Sampling(options.temperature, options.top_p, options.seed)
        with self._memory_errors():
            self.loaded = self._load()

    def _memory_errors(self) -> AbstractContextManager[None]:
        remedy = f"try --precision bf16, a larger GPU, or the CPU ({ACCELERATOR}=cpu)"
        return memory_errors(0, self.device, lambda: remedy)

    def _load(self) -> LoadedModel:
        from vqmoe_ds.checkpoint.load_model import load_model

        options = self.options
        how = {"device": self.device, "precision": options.precision, "expert_memory": self.memory}
        loaded = load_model(options.checkpoint, options.tokenizer, **how)
        loaded.config.require_causal("generating text")
        # Here already, before a prompt is typed.
        loaded.need_tokenizer()
        return loaded

    def close(self) -> None:
        self.loaded.close()

    def run(self) -> None:
        with self._memory_errors():
            if self.options.prompt is not None:
                self.answer(self.options.prompt)
            elif sys.stdin.isatty():
                self._converse()
            else:
                self.answer(_piped().removesuffix("\n"))

    def _converse(self) -> None:
        """Answer prompts of a terminal, each on its own, until Ctrl-D."""
        import readline  # noqa: F401 (lines can be edited and recalled)

        print("one prompt per line; Ctrl-D or Ctrl-C leaves", file=sys.stderr)
        while True:
            try:
                self.answer(input("> "))
            except EOFError:
                print(file=sys.stderr)
                return
            except DataError as error:
                print(f"error: {error}", file=sys.stderr)

    def answer(self, prompt: str) -> None:
        """Write a prompt and what follows it, as it comes."""
        from vqmoe_ds.evaluation.generate import pieces_of_text

        started, count = time.perf_counter(), -1  # the prompt is no new token
        for text in chain([prompt], pieces_of_text(self._ids(prompt), self.loaded.need_tokenizer())):
            count += 1
            # A file or a pipe gets what the model wrote, to the character.
            sys.stdout.write(_printable(text) if sys.stdout.isatty() else text)
            sys.stdout.flush()
        print(flush=True)
        if self.options.timing:
            spent = time.perf_counter() - started
            print(f"{count} tokens in {spent:.2f} s: {count / spent:.1f} tokens/s", file=sys.stderr)
            if self.loaded.store is not None:
                print(self.loaded.store.summary(), file=sys.stderr)

    def _ids(self, prompt: str) -> Iterator[int]:
        from vqmoe_ds.evaluation.generate import generate

        loaded, tokenizer, model = self.loaded, self.loaded.need_tokenizer(), self.loaded.config.model
        ids = tokenizer.encode(prompt).tolist()
        if not ids:
            raise DataError(f"the prompt {shown(prompt)} encodes to no token; give some text")
        unknown = tokenizer.count_unknown(prompt, tokenizer.encode(prompt))
        if unknown:
            print(f"{unknown} symbol(s) of the prompt are outside the vocabulary", file=sys.stderr)
        size, cache = min(tokenizer.vocab_size, model.vocab_size), None
        if not self.options.no_cache:
            cache = loaded.model.new_cache
        new = generate(loaded.model, ids, self.sampling, model.sequence_length, size, cache, loaded.device)
        return takewhile(lambda i: i != tokenizer.eod, islice(new, self.options.tokens))


def _piped() -> str:
    """The prompt on standard input.

    Raises:
        DataError: too long, or not UTF-8.
    """
    # One byte more than allowed tells that it is too long, and no more is held; likewise once decompressed, for some
    # kilobytes may hold gigabytes.
    raw = sys.stdin.buffer.read(LONGEST_PROMPT + 1)
    packed, kind = io.BufferedReader(io.BytesIO(raw)), kind_of_bytes(raw)
    try:
        raw = decompressed(packed, kind if kind in SUFFIXES else "").read(LONGEST_PROMPT + 1)
    except DAMAGES as error:
        raise DataError(f"the prompt on standard input cannot be decompressed ({error}); fetch it again") from None
    if len(raw) > LONGEST_PROMPT:
        raise DataError(f"the prompt has more than {LONGEST_PROMPT >> 20} MiB; give its end alone (tail -c 1M)")
    try:
        return raw.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise DataError(f"the prompt is not UTF-8 (byte {error.start}); convert it (iconv -t UTF-8)") from None


def _printable(text: str) -> str:
    """The text without the control characters that models of bytes may write and that could upset a terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
