"""
Latent tokens: gated slot attention (arXiv:2409.07146, section 3) as a GPT's attention.

In every head m latent tokens, the slots K~ and V~ (m, hs), summarise the past, so that the state is
constant however long the context. With gates a_t = sigmoid(W_a x_t)^(1/8) in (0, 1)^m,

    K~_t = diag(a_t) K~_{t-1} + (1 - a_t) k_t^T, V~ alike
    o_t = V~_t^T softmax(K~_t q_t / sqrt(hs))

Letters: B sequences, T tokens, nh heads, hs head size, m slots, N = B * nh. A state (N, m, 2 hs)
holds a key and a value side by side in each slot, and so does kv_t = [k_t ; v_t].
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanomla.attention import Attention, Rotation
from nanomla.cache import FLOATS, LayerCache
from nanomla.checks import require
from nanomla.kernels import Linear
from nanomla.kernels.reference import causal_mask


class SlotCache(LayerCache):
    """
    A state of m slots of 2 hs numbers per head, [K~ ; V~]. A pass leaves its new state in pending
    until advance, so that a pass that is repeated counts no token twice. A view of some sequences
    shares the state: once it has moved on, broadcast it or truncate this cache.
    """

    DTYPES = FLOATS  # rounded at each token, so not int8
    grows = False

    def __init__(
        self,
        sizes: list[tuple[int, int]],
        m: int,
        batch_size: int,
        max_len: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__(sizes, batch_size, m, dtype, device)
        self.max_len = max_len
        self.pending: Tensor | None = None

    @property
    def state(self) -> Tensor:
        """(B, nh, m, 2 hs)"""
        return self.tensors[0]

    def advance(self, T: int) -> None:
        """Count T more tokens as held: the pending state is the state now."""
        super().advance(T)
        if self.pending is not None:
            self.state.copy_(self.pending)
        self.pending = None

    def truncate(self, pos: int) -> None:
        """Forget all tokens, with pos 0, or none, with the current pos."""
        require(pos in (0, self.pos), "pos", pos, f"0 or {self.pos}")
        super().truncate(pos)
        self.pending = None
        if pos == 0:
            self.state.zero_()

    def sequences(self, first: int, count: int) -> LayerCache:
        """A cache of so many sequences from the first on, in the same memory, with its own pos."""
        view = super().sequences(first, count)
        view.pending = None
        return view

    def copy_from(self, one: LayerCache) -> None:
        """Hold in every sequence what a cache of one sequence holds."""
        self.pos = one.pos
        self.state.copy_(one.state.clone())  # they may be the same

    def sizes(self) -> list[tuple[int, ...]]:
        """(heads, slots, width) of the state."""
        return [tuple(self.state.shape[1:])]

    def nbytes_at(self, n: int) -> int:
        """Bytes of the state, whatever n is."""
        return self.state.nbytes


class LatentTokenAttention(Attention):
    """Gated slot attention; the equations are on top of this file."""

    reads = ("n_latent_tokens",)

    @staticmethod
    def check(config: Any) -> None:
        m = config.n_latent_tokens
        require(m is not None, "n_latent_tokens", m, "a number, such as 16")
        require(not config.use_mla, "use_mla", True, "False with use_latent_tokens")
        require(not config.use_svd, "use_svd", True, "False with use_latent_tokens")
        learned = config.pos_emb == "learned"
        require(learned, "pos_emb", config.pos_emb, "'learned' with use_latent_tokens")

    def __init__(self, config: Any, layer: int = 0) -> None:
        super().__init__(config, layer)
        self.m = config.n_latent_tokens
        self.scale = 1 / math.sqrt(self.hs)
        self.c_attn = Linear(config.n_embd, 3 * self.nh * self.hs, bias=config.bias)
        self.c_proj = Linear(self.nh * self.hs, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.gate = Linear(config.n_embd, self.nh * self.m)
        self.init_alone()

    def new_cache(self, batch_size: int, max_len: int, dtype=torch.float32, device="cpu"):
        """An empty state of batch_size sequences, at least of float32 unless a dtype is asked."""
        sizes = [(self.nh, 2 * self.hs)]
        return SlotCache(sizes, self.m, batch_size, max_len, dtype, device)

    def forward(
        self, x: Tensor, cache: LayerCache | None = None, rotation: Rotation = None
    ) -> Tensor:
        B, T, _ = x.shape
        dtype = torch.promote_types(x.dtype, torch.float32)  # as these sums run over all the past
        qkv = self.c_attn(x)
        gate = self.gate(x)
        with torch.autocast(x.device.type, enabled=False):
            q, kv, log_a = self._by_head(qkv, gate, dtype)
            if cache is None:
                state = q.new_zeros(B * self.nh, self.m, 2 * self.hs)
            else:
                state = cache.state.to(dtype).flatten(0, 1)
            y, state = slot_attention(state, q, kv, log_a, self.scale)
        if cache is not None:
            if torch.is_grad_enabled():
                raise RuntimeError("a cache is for inference; use torch.no_grad or inference_mode")
            cache.pending = state.view(B, self.nh, self.m, 2 * self.hs)
        y = y.view(B, self.nh, T, self.hs).to(qkv.dtype)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).flatten(2)))

    def _by_head(self, qkv: Tensor, gate: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Queries (N, T, hs), keys and values (N, T, 2 hs), log gates (N, T, m)."""
        B, T, _ = qkv.shape
        qkv = qkv.view(B, T, 3, self.nh, self.hs).permute(2, 0, 3, 1, 4)  # (3, B, nh, T, hs)
        q, k, v = qkv.to(dtype).flatten(1, 2)  # (N, T, hs)
        gate = gate.view(B, T, self.nh, self.m).transpose(1, 2).flatten(0, 1)
        log_a = F.logsigmoid(gate.to(dtype)) / 8
        return q, torch.cat([k, v], dim=-1), log_a

    def weights(self, x: Tensor, rotation: Rotation = None) -> Tensor:
        """
        What every token of x (B, T, C) reads of all, (B, nh, T, T): the share of a token in the
        slots times the weights of the slots. Slot i holds (1 - a_j) a_(j+1) ... a_t of token j at
        time t. They sum to less than 1 while slots hold little.
        """
        B, T, _ = x.shape
        dtype = torch.promote_types(x.dtype, torch.float32)
        q, kv, log_a = self._by_head(self.c_attn(x), self.gate(x), dtype)
        k = kv[..., : self.hs]
        decay = log_a.cumsum(dim=1).transpose(1, 2)  # (N, m, T)
        seen = causal_mask(T, T, 1, x.device)
        left = (decay[..., :, None] - decay[..., None, :]).masked_fill(~seen, float("-inf")).exp()
        share = left * -torch.expm1(log_a).transpose(1, 2)[:, :, None, :]  # (N, m, T, T)
        keys = share @ k[:, None]  # (N, m, T, hs): the slots' keys at every time
        p = (torch.einsum("nmtd,ntd->nmt", keys, q) * self.scale).softmax(dim=1)
        return torch.einsum("nmt,nmts->nts", p, share).view(B, self.nh, T, T)

    @property
    def words(self) -> str:
        return f"latent tokens, m = {self.m}"

    def flops_per_key(self, decoding: bool) -> int:
        """None: a token reads the slots, however many tokens came before."""
        return 0

    def flops_per_token(self, decoding: bool) -> int:
        """
        Those of the matrices, of writing into the slots and of reading them; in training also those
        of the pairs of tokens in a chunk.
        """
        products = 4 * self.m * self.hs
        if not decoding:
            products += 2 * CHUNK * (self.m + self.hs)
        return super().flops_per_token(decoding) + 2 * self.nh * products


# ---- The recurrence, token by token and many tokens at a time

CHUNK = 16  # tokens; 8 takes as long and keeps twice the states, 32 takes 1.2 to 1.4 times as long
NUMBERS = 2**20  # of WithinChunk's E at a time, so that a CPU's cache holds it; 64 x on a GPU


def slot_attention(
    state: Tensor, q: Tensor, kv: Tensor, log_a: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """
    From state (N, m, 2 hs) on, q (N, T, hs), kv (N, T, 2 hs) and log_a (N, T, m) <= 0: the averages
    o (N, T, hs) and the last state. Work and memory are O(N T (m hs + CHUNK (m + hs))): chunks of
    tokens are computed at once, as many at a time as NUMBERS allows.
    """
    N, T, m = log_a.shape
    if T == 1:
        return one_token(state, q, kv, log_a, scale)
    filled = [0, 0, 0, -T % CHUNK]  # up to whole chunks; log_a 0 adds nothing
    q = F.pad(q * scale, filled)
    kv = F.pad(kv, filled)
    log_a = F.pad(log_a, filled)
    numbers = NUMBERS if q.device.type == "cpu" else 64 * NUMBERS
    tokens = CHUNK * max(numbers // (N * CHUNK * CHUNK * m), 1)
    outs = []
    for first in range(0, q.size(1), tokens):
        part = slice(first, first + tokens)
        y, state = whole_chunks(state, by_chunk(q[:, part]), by_chunk(kv[:, part]),
                                by_chunk(log_a[:, part]))
        outs.append(y)
    return torch.cat(outs, dim=1)[:, :T], state


def one_token(
    state: Tensor, q: Tensor, kv: Tensor, log_a: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """slot_attention of one token, by its definition."""
    new = -torch.expm1(log_a.mT)  # 1 - a, exact also for a near 1
    state = torch.lerp(state, kv, new)
    k, v = state.chunk(2, dim=-1)
    return (q @ k.mT * scale).softmax(dim=-1) @ v, state


def by_chunk(t: Tensor) -> Tensor:
    """(N, g * CHUNK, width) -> (N, g, CHUNK, width)."""
    return t.unflatten(1, (-1, CHUNK))


def whole_chunks(state: Tensor, q: Tensor, kv: Tensor, log_a: Tensor) -> tuple[Tensor, Tensor]:
    """
    g chunks at once: q (N, g, c, hs), scaled, kv (N, g, c, 2 hs), log_a (N, g, c, m). With b_t the
    sum of a chunk's log_a up to t, its t-th token finds

        state_t = exp(b_t) state_0 + sum_{j <= t} exp(b_t - b_j) (1 - a_j) kv_j

    No exponent is above 0, so nothing overflows.
    """
    b = log_a.cumsum(dim=2)
    new = -torch.expm1(log_a)  # 1 - a
    since = b.exp()  # the share of the state before the chunk
    added = ((b[:, :, -1:] - b).exp() * new).mT @ kv  # (N, g, m, 2 hs)
    states = [state]
    for chunk in range(q.size(1)):
        left = since[:, chunk, -1, :, None]  # of the state, at the end of the chunk
        states.append(torch.addcmul(added[:, chunk], left, states[-1]))
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
        E = WithinChunk.decay(b, e)
        dw = dw.tril()
        ds = p * (dp + (dw.unsqueeze(-2) @ E).squeeze(-2))
        ds = ds - p * ds.sum(dim=-1, keepdim=True)  # of the softmax's argument
        dqk = (E @ ds.unsqueeze(-1)).squeeze(-1).tril()
        dE = (qk.unsqueeze(-1) * ds.unsqueeze(-2)).addcmul_(dw.unsqueeze(-1), p.unsqueeze(-2))
        itself = dE.mul_(E).diagonal(dim1=-3, dim2=-2)  # j = t, where b_t - b_j is 0 whatever b is
        of_itself = itself.mT.clone()
        itself.zero_()  # so that no rounding error of the two b is left
        of_e = dE.sum(dim=-3)
        return dE.sum(dim=-2) - of_e, of_e + of_itself, dqk, ds
