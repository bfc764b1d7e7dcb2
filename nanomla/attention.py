"""What every token of a text looks at: the weights of one layer's attention, for pictures."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import model as gpt
from nanomla.kernels import by_head
from nanomla.kernels.reference import causal_mask


@torch.inference_mode()
def attention_weights(model: gpt.GPT, tokens: list[int], layer: int) -> Tensor:
    """
    The weights of a layer's heads over a text, (nh, T, T) float32 on the CPU: row i is what token i
    reads of tokens 0 to i. They sum to 1; with latent tokens, of which the first hold nothing yet,
    to less, and a weight is that of a token in the slots times that of the slots.

    They are computed as in training, from keys of every head or from rotated latents. Not while
    another thread runs a model. Raises ValueError for a layer or a text that the model cannot have.
    """
    layers, T, most = len(model.transformer.h), len(tokens), model.config.block_size
    if layer not in range(layers):
        raise ValueError(f"layer={layer} does not work: layer must be from 0 to {layers - 1}")
    if not 0 < T <= most:
        raise ValueError(f"{T} tokens do not work: there must be from 1 to block_size={most}")
    idx = torch.tensor([tokens], device=model.lm_head.weight.device)
    kernel = "slot_attention" if model.config.attention == "latent_tokens" else "attend"
    with _calls_of(kernel) as calls:
        model(idx)
    weights = (_of_slots if kernel == "slot_attention" else _of_keys)(*calls[layer])
    return weights.float().cpu()


@contextmanager
def _calls_of(name: str) -> Iterator[list[tuple]]:
    """What model.py gives one of its kernels inside, call by call, which is layer by layer."""
    calls, kernel = [], getattr(gpt, name)

    def noted(*args: Any, **how: Any) -> Any:
        calls.append(args)
        return kernel(*args, **how)

    setattr(gpt, name, noted)
    try:
        yield calls
    finally:
        setattr(gpt, name, kernel)


def _of_keys(q: Tensor, k: Tensor, _v: Tensor | None, T: int, scale: float) -> Tensor:
    """Softmax over the keys, for the arguments of nanomla.kernels.attend on a whole text."""
    scores = q.float() @ k.float().mT * scale  # (1, X, T * m, T)
    mask = causal_mask(T, T, q.size(2) // T, q.device)
    return by_head(scores.masked_fill(~mask, float("-inf")).softmax(dim=-1), T)[0]


def _of_slots(_state: Tensor, q: Tensor, kv: Tensor, log_a: Tensor, scale: float) -> Tensor:
    """
    For the arguments of slots.slot_attention: slot i holds (1 - a_j) a_(j+1) ... a_t of token j at
    time t, and a query reads the slots by the softmax of their keys.
    """
    (heads, T, _), k = q.shape, kv[..., : q.size(-1)]
    decay = log_a.cumsum(dim=1).transpose(1, 2)  # (nh, m, T)
    seen = causal_mask(T, T, 1, q.device)
    kept = (decay[..., :, None] - decay[..., None, :]).masked_fill(~seen, float("-inf")).exp()
    share = kept * -torch.expm1(log_a).transpose(1, 2)[:, :, None, :]  # (nh, m, T, T)
    keys = share @ k[:, None]  # (nh, m, T, hs): the slots' keys at every time
    p = (torch.einsum("hmtd,htd->hmt", keys, q) * scale).softmax(dim=1)
    return torch.einsum("hmt,hmts->hts", p, share).view(heads, T, T)
