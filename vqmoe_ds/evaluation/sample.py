"""A text sample from the model, for a person to read."""

from __future__ import annotations

from itertools import islice

from vqmoe_ds.evaluation.generate import Sampling, generate
from vqmoe_ds.models.session import Session


def sample_tokens(session: Session, prompt: list[int], length: int, vocab_size: int) -> list[int]:
    """Continue the ids of ``prompt`` by ``length`` ids under ``vocab_size``; all ranks take part, all get the same.

    Every id takes one forward pass over itself and the keys and values kept of those before (``generate``).

    Raises:
        ConfigError: the router looks at later tokens.
    """
    session.config.run.require_causal("generating text")
    sampling, context = Sampling(), session.config.run.model.sequence_length
    session.engine.eval()
    # Every rank draws for itself: equal logits and one seed give all the same ids, and so the same next pass.
    new = generate(
        session.engine, prompt, sampling, context, vocab_size, session.model.new_cache, device=session.device
    )
    tokens = [*prompt, *islice(new, length)]
    session.engine.train()
    return tokens
