"""
Claims: a bfloat16 or int8 cache loses nothing (SnapMLA, arXiv:2602.10718: FP8 latents near parity).
Decoding in the absorbed form costs 3% of perplexity (mlx-lm, pull request 1037, with 4-bit
weights).

Finding: the loss token by token through a bfloat16 cache differs by at most 0.0001 from that
without a cache, through an int8 cache by at most 0.0016. In float32 it is the same, to six digits,
over 32,768 tokens: the absorbed form is the same function, and the 3% come from quantised weights.
(The works of Shakespeare, 2 layers, 128 wide, 300 iterations, the best of three learning rates, one
seed.)

    python -m experiments.cached_loss
"""

from typing import Any

import torch
from torch import Tensor

from experiments.training import MLA, SHAPE, compare, start
from model import GPT, GPTConfig
from nanomla.cache import dtype_name
from nanomla.errors import run_script
from nanomla.evaluate import next_token_losses
from tools.bench.timing import table

TOKENS = 2**15
VARIANTS = {
    "MLA RMSNorm": MLA,
    "MLA LayerNorm": {**MLA, "mla_norm": "layernorm"},
    "MLA no norm": {**MLA, "mla_norm": "none"},
    "MLA one down-projection": {**MLA, "mla_share_latent": True},
    "MLA rotary latent": {
        **MLA, "mla_rope": "latent", "mla_latent_dim": 32, "mla_rope_dim": 32,
    },
    "MHA": {**SHAPE, "pos_emb": "rope"},
    "16 latent tokens": {**SHAPE, "use_latent_tokens": True, "n_latent_tokens": 16},
}


def main(argv: list[str] | None = None) -> None:
    """The command line; see the top of this file."""
    cfg, data, vocab_size = start(__name__, argv)
    variants = {name: (GPTConfig(vocab_size=vocab_size, **s), GPT) for name, s in VARIANTS.items()}
    batches = []
    for x, y in data.spread("val", TOKENS, 128):
        batches.append((x.to(cfg.device), y.to(cfg.device)))
    rows = []
    for name, model in compare(variants, cfg, data).items():
        whole = loss(model, batches)
        row = {"variant": name, "without a cache": f"{whole:.6f}"}
        for dtype in (torch.float32, torch.bfloat16, torch.int8):
            if model.make_cache(1, 1).grows or dtype != torch.int8:  # which a state cannot be
                row[dtype_name(dtype)] = f"{loss(model, batches, True, dtype) - whole:+.6f}"
        rows.append(row)
    table("Loss token by token through the cache, less that without one", rows)


def loss(model: GPT, batches: list[tuple[Tensor, Tensor]], *how: Any) -> float:
    """
    Mean cross-entropy of y (B, T) after x (B, T), of all batches. how: next_token_losses's further
    arguments.
    """
    losses = [next_token_losses(model, x, y, *how).double().mean().item() for x, y in batches]
    return sum(losses) / len(losses)


if __name__ == "__main__":
    run_script(main)
