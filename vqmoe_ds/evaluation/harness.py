"""The lm-evaluation-harness (EleutherAI, ``pip install '.[eval]'``) on checkpoints of this trainer.

    python -m vqmoe_ds.evaluation.harness run --model vqmoe --model_args checkpoint=runs/pretrain --tasks TASK

is its own command ``lm_eval`` with one more model. The harness knows no plugins, so the model is registered before it
starts; whoever calls the harness from Python imports this module first.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from vqmoe_ds.checkpoint.load_model import load_model
from vqmoe_ds.evaluation.generate import Sampling
from vqmoe_ds.evaluation.window import Scored, Window, fitting_batch, score, windows_of
from vqmoe_ds.runtime.device import ACCELERATOR, bind_single, memory_errors, uses_gpu
from vqmoe_ds.runtime.errors import ConfigError, reports_errors
from vqmoe_ds.runtime.extras import library
from vqmoe_ds.runtime.terminal import run_tool

try:
    # The class below needs its base at the import, so ``python -m`` has to refuse here; a program gets the error.
    library("lm_eval", "this command")
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
except ConfigError as error:
    if __name__ == "__main__":
        sys.exit(error.report())
    raise


@register_model("vqmoe")
class HarnessModel(TemplateLM):
    """A checkpoint behind the harness's interface; one process, no key-value cache.

    Args:
        checkpoint: anything ``load_model`` takes.
        tokenizer: of the model, where it is not found.
        batch_size: sequences per forward pass; ``auto``: as many as 128 MiB of logits hold.
        device: of the GPU; without one, the CPU.
        precision: of the weights, bf16 or fp32; none: bf16 on a GPU, fp32 on a CPU.
        seed: of sampling, where a task asks for it.

    Raises:
        CheckpointError: as ``load_model``, or the tokenizer is unknown.
        ConfigError: a router that sees later tokens, or a GPU is asked for and there is none.
    """

    def __init__(
        self,
        checkpoint: str = "",
        tokenizer: str | None = None,
        batch_size: int | str | None = "auto",
        device: str | None = None,
        seed: int = 0,
        max_batch_size: int | None = None,
        precision: str | None = None,
    ) -> None:
        super().__init__()
        if not checkpoint:
            raise ConfigError("--model_args names no checkpoint; give checkpoint=PATH")
        # The harness names a GPU by default, whether or not there is one.
        self._device = bind_single()
        if device and self._device.type == "cuda":
            self._device = torch.device(device)
            if self._device.index is not None:
                torch.cuda.set_device(self._device)  # the kernels' launches follow the current one
        self.loaded = load_model(checkpoint, tokenizer, device=self._device, precision=precision)
        self._tokenizer = self.loaded.need_tokenizer()
        self.loaded.config.require_causal("the harness")
        self.context = self.loaded.config.model.sequence_length
        self.vocab_size = min(self._tokenizer.vocab_size, self.loaded.config.model.vocab_size)
        # ``auto:N`` would look for a size N times; the context of this model decides it once.
        number = str(batch_size or "auto").partition(":")[0]
        fitting = fitting_batch(self.context, self.loaded.config.model.vocab_size)
        self.batch_size = fitting if number == "auto" else int(number)
        self._generator = torch.Generator().manual_seed(int(seed))

    @property
    def eot_token_id(self) -> int:
        """The end of a document; a model of raw bytes has none, so -1, which no id is."""
        return self._tokenizer.eod if self._tokenizer.eod < self.loaded.config.model.vocab_size else -1

    @property
    def prefix_token_id(self) -> int:
        """Id put before a text that nothing precedes: a line break, since the token after the end of a document is
        never learned in training."""
        ids = self.tok_encode("\n")
        return ids[-1] if ids else self.eot_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self.loaded.encode(string)

    # ---------------------------------------------------------------- scoring

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        texts = [context + continuation for _, context, continuation in requests]
        windows = [self._windows(len(request[1]), len(text)) for request, text in zip(requests, texts, strict=True)]
        scored, begins = self._score(texts, windows, disable_tqdm)
        answers = []
        for (pair, context, _), text, begin in zip(requests, texts, begins, strict=True):
            asked = slice(begin + len(context), begin + len(text))
            answers.append((-float(scored.nats_KN[0, asked].sum()), bool(scored.first_choice_KN[0, asked].all())))
            self.cache_hook.add_partial("loglikelihood", pair, answers[-1])
        return answers

    def _windows(self, first: int, length: int) -> list[Window]:
        """Windows that score the tokens from ``first`` on, with as much as the context holds before them."""
        # One pass serves if the window that ends with the text also holds the input of the first token asked for.
        begin = max(0, length - 1 - self.context)
        if begin < first:
            return [Window(begin, first, length - 1)]
        rolling = windows_of([length], self.context, max(1, self.context // 2))
        return [window._replace(first=max(window.first, first)) for window in rolling if window.end >= first]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Nats, negative, of whole texts, each token once, in windows that do not overlap but for a full last one."""
        texts = [[self.prefix_token_id, *self.tok_encode(request.args[0])] for request in requests]
        windows = [windows_of([len(text)], self.context, self.context) for text in texts]
        scored, begins = self._score(texts, windows, disable_tqdm)
        ends = [*begins[1:], scored.nats_KN.shape[1]]
        answers = [-float(scored.nats_KN[0, begin:end].sum()) for begin, end in zip(begins, ends, strict=True)]
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, answer)
        return answers

    def _score(self, texts: list[list[int]], windows: list[list[Window]], hidden: bool) -> tuple[Scored, list[int]]:
        """Texts end to end, and where each begins."""
        begins = np.cumsum([0, *map(len, texts)]).tolist()
        placed = [
            Window(*(begin + place for place in window))
            for begin, part in zip(begins[:-1], windows, strict=True)
            for window in part
        ]
        ids_N = np.concatenate([np.zeros(0, dtype=np.int64), *(np.array(text, dtype=np.int64) for text in texts)])
        # One call for all requests, so that windows of one length share a batch.
        with tqdm(total=len(placed), desc="scoring", unit="window", disable=hidden) as bar:
            return score(self.loaded.model, ids_N, ids_N[None], placed, self.batch_size, tell=bar.update), begins[:-1]

    # ---------------------------------------------------------------- generating

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations, greedy unless a task asks for sampling, up to a stop string or ``max_gen_toks``."""
        answers = []
        for request in tqdm(requests, desc="generating", disable=disable_tqdm):
            prompt, options = request.args
            answers.append(self._continue(prompt, dict(options)))
            self.cache_hook.add_partial("generate_until", request.args, answers[-1])
        return answers

    @torch.no_grad()
    def _continue(self, prompt: str, options: dict[str, Any]) -> str:
        stops = options.get("until") or []
        stops = [stops] if isinstance(stops, str) else list(stops)
        limit = next((int(options[n]) for n in ("max_gen_toks", "max_new_tokens", "max_tokens") if n in options), 256)
        sampling = Sampling(float(options.get("temperature") or 0.0) if options.get("do_sample", True) else 0.0)
        tokens, text = self.tok_encode(prompt) or [self.prefix_token_id], ""
        given = len(tokens)
        while len(tokens) - given < limit:
            window = torch.tensor([tokens[-self.context :]], device=self._device)
            logits_V = self.loaded.model(window)[0][0, -1, : self.vocab_size].float().cpu()
            token = sampling.draw(logits_V, self._generator)
            if token == self.eot_token_id:
                break
            tokens.append(token)
            # All new tokens together: characters and stop strings may begin in one token and end in another.
            text = self.loaded.decode(tokens[given:])
            if any(stop in text for stop in stops):
                return text[: min(text.find(stop) for stop in stops if stop in text)]
        return text


@reports_errors
def main() -> int:
    """The harness's own command line; the exit code."""
    from lm_eval.__main__ import cli_evaluate

    remedy = f"lower --batch_size, or use the CPU ({ACCELERATOR}=cpu)"
    with memory_errors(0, torch.device("cuda" if uses_gpu() else "cpu"), lambda: remedy):
        cli_evaluate()
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
