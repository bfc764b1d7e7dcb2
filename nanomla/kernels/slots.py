"""
Gated slot attention (arXiv:2409.07146): token by token, and many tokens at a time.

A state of N heads is (N, m, 2 hs): m slots, a key K~ and a value V~ side by side in each. Token t
has a query q_t, a key and value kv_t = [k_t ; v_t], and a gate a_t in (0, 1)^m:

    state_t = a_t state_{t-1} + (1 - a_t) kv_t      o_t = V~_t^T softmax(scale K~_t q_t)
"""

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 16  # tokens; 8 takes as long and keeps twice the states, 32 takes 1.2 to 1.4 times as long
NUMBERS = 2**20  # of WithinChunk's E at a time, so that a CPU's cache holds it; 64 x on a GPU


def slot_attention(
    state: Tensor, q: Tensor, kv: Tensor, log_a: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """
    From state (N, m, 2 hs) on, q (N, T, hs), kv (N, T, 2 hs) and log_a (N, T, m) <= 0: the averages
    o (N, T, hs) and the last state. Work and memory are O(N T (m hs + CHUNK (m + hs))).
    """
    if q.size(1) == 1:
        return recurrence(state, q, kv, log_a, scale)
    return chunked(state, q, kv, log_a, scale)


def recurrence(
    state: Tensor, q: Tensor, kv: Tensor, log_a: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """slot_attention by its definition, one token after the other."""
    out = []
    for t in range(q.size(1)):
        new = -torch.expm1(log_a[:, t, :, None])  # 1 - a, exact also for a near 1
        state = torch.lerp(state, kv[:, t, None], new)
        k, v = state.chunk(2, dim=-1)
        out.append((q[:, t, None] @ k.mT * scale).softmax(dim=-1) @ v)
    return torch.cat(out, dim=1), state


def chunked(
    state: Tensor, q: Tensor, kv: Tensor, log_a: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """slot_attention in chunks, as many at a time as NUMBERS allows."""
    (N, T, m), c, out = log_a.shape, CHUNK, []
    numbers = NUMBERS if q.device.type == "cpu" else 64 * NUMBERS
    tokens = c * max(numbers // (N * c * c * m), 1)
    padded = [F.pad(t, (0, 0, 0, -T % c)) for t in (q * scale, kv, log_a)]  # log_a 0 adds nothing
    for part in zip(*(t.split(tokens, dim=1) for t in padded), strict=True):
        y, state = whole_chunks(state, *(t.unflatten(1, (-1, c)) for t in part))
        out.append(y)
    return torch.cat(out, dim=1)[:, :T], state


def whole_chunks(state: Tensor, q: Tensor, kv: Tensor, log_a: Tensor) -> tuple[Tensor, Tensor]:
    """
    g chunks at once: q (N, g, c, hs), scaled, kv (N, g, c, 2 hs), log_a (N, g, c, m). With b_t the
    sum of a chunk's log_a up to t, its t-th token finds

        state_t = exp(b_t) state_0 + sum_{j <= t} exp(b_t - b_j) (1 - a_j) kv_j

    No exponent is above 0, so nothing overflows.
    """
    b, new = log_a.cumsum(dim=2), -torch.expm1(log_a)
    since = b.exp()  # the share of the state before the chunk
    added = ((b[:, :, -1:] - b).exp() * new).mT @ kv  # (N, g, m, 2 hs)
    states = [state]
    for kept, more in zip(since[:, :, -1, :, None].unbind(1), added.unbind(1), strict=True):
        states.append(torch.addcmul(more, kept, states[-1]))
    k0, v0 = torch.stack(states[:-1], dim=1).chunk(2, dim=-1)
    k, v = kv.chunk(2, dim=-1)
    e = new.clamp(min=torch.finfo(b.dtype).tiny).log()
    p, w = WithinChunk.apply(b, e, (q @ k.mT).tril(), since * (q @ k0.mT))
    return ((p * since) @ v0 + w @ v).flatten(1, 2), states[-1]


class WithinChunk(torch.autograd.Function):
    """
    How the tokens of a chunk meet each other: with E_tj = exp(b_t - b_j + e_j), m numbers, j <= t,

        p_t = softmax(past_t + sum_j qk_tj E_tj)      w_tj = p_t . E_tj

    The backward pass computes E again: kept, it would be the largest tensor by far.
    """

    @staticmethod
    def decay(b: Tensor, e: Tensor) -> Tensor:
        """E (..., c, c, m). At j > t it is finite and means nothing: qk and w are 0 there."""
        return (b.unsqueeze(-2) - (b - e).unsqueeze(-3)).clamp_(max=0).exp_()

    @staticmethod
    def forward(ctx, b: Tensor, e: Tensor, qk: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        """b, e, past (..., c, m), qk (..., c, c) with 0 at j > t: p (..., c, m), w like qk."""
        E = WithinChunk.decay(b, e)
        p = (past + (qk.unsqueeze(-2) @ E).squeeze(-2)).softmax(dim=-1)
        ctx.save_for_backward(b, e, qk, p)
        return p, (E @ p.unsqueeze(-1)).squeeze(-1).tril()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dp: Tensor, dw: Tensor) -> tuple[Tensor, ...]:
        b, e, qk, p = ctx.saved_tensors
        E, dw = WithinChunk.decay(b, e), dw.tril()
        ds = p * (dp + (dw.unsqueeze(-2) @ E).squeeze(-2))
        ds = ds - p * ds.sum(dim=-1, keepdim=True)  # of the softmax's argument
        dqk = (E @ ds.unsqueeze(-1)).squeeze(-1).tril()
        dE = (qk.unsqueeze(-1) * ds.unsqueeze(-2)).addcmul_(dw.unsqueeze(-1), p.unsqueeze(-2))
        own = dE.mul_(E).diagonal(dim1=-3, dim2=-2)  # j = t, where b_t - b_j is 0 whatever b is
        of_own = own.mT.clone()
        own.zero_()  # so that no rounding error of the two b is left
        of_e = dE.sum(dim=-3)
        return dE.sum(dim=-2) - of_e, of_e + of_own, dqk, ds
