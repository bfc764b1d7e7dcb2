"""
What claims about latent attention need beyond training the model's own variants: changes to a model
that it does not offer, and measurements of other kinds. tools/compare.py installs and calls them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from model import GPT, Cache, GPTConfig
from tools.bench import Timed, alternate, fill

COMMANDS: dict[str, Callable[[Any, str], list[str]]] = {}
CHANGES: dict[str, Callable[[], None]] = {}


def install(name: str) -> None:
    """Change what GPT builds in this process from here on."""
    CHANGES[name]()


@torch.inference_mode()
def decode_rates(rows: list[dict[str, Any]], context: int, device: str) -> dict[str, float]:
    """
    Tokens/s of greedy decoding at a context, batch 1, float32, in turn, by variant.

    The models have the variants' shapes with a longer context; their weights are random, as the
    time does not depend on them.
    """
    shapes = {row["variant"]: row["model"] for row in rows if "model" in row}
    if not context or not shapes:
        return {}
    n, entries = 8, []
    token = torch.zeros(1, 1, dtype=torch.int64, device=device)

    def decode(model: GPT, cache: Cache) -> None:
        cache.rewind(context - n)
        for _ in range(n):
            model(token, cache=cache)[0][:, -1].argmax(-1)

    for name, shape in shapes.items():
        config = dataclasses.replace(GPTConfig(**shape), block_size=context)
        model = GPT(config).to(device).eval()
        cache = fill(model.make_cache(1, context), context - n)
        run = lambda model=model, cache=cache: decode(model, cache)
        entries.append(Timed(name, run, steps=n))
    took = alternate(entries, 9, device)
    return {name: 1 / entry.seconds for name, entry in took.items()}
