"""A text sample from the model, to see with one's own eyes what it has learned."""

from __future__ import annotations

import torch

from vqmoe_ds.moe.routers import require_causal
from vqmoe_ds.train.engine import Session


@torch.no_grad()
def sample_tokens(
    session: Session, prompt: list[int], length: int, vocab_size: int, temperature: float = 0.8, seed: int = 0
) -> list[int]:
    """Continue the ids of ``prompt`` by ``length`` ids under ``vocab_size``; all ranks take part, all get the same.

    The context is the last ``sequence_length`` tokens; there is no key-value cache here.

    Raises:
        ConfigError: the router looks at later tokens.
    """
    require_causal(session.config.run, "generating text")
    generator = torch.Generator().manual_seed(seed)
    context = session.config.run.model.sequence_length
    tokens = list(prompt)
    session.engine.eval()
    for _ in range(length):
        window = torch.tensor([tokens[-context:]], device=session.device)
        logits_V = session.engine(window)[0][0, -1].float().cpu()[:vocab_size]
        probabilities = (logits_V / temperature).softmax(dim=-1)
        tokens.append(int(torch.multinomial(probabilities, 1, generator=generator)))
    session.engine.train()
    return tokens
