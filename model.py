"""
The whole model: a GPT whose attention block is causal self-attention (MHA) or multi-head latent
attention (MLA), either with its values in a low-rank subspace (SVD), chosen by GPTConfig.

Letters: B batch, T new tokens, S cached and new tokens, C = n_embd, nh heads, hs = C / nh head
size, L latent numbers per group, G groups, m = nh / G heads per group, r rotary numbers, rv value
rank, V vocabulary.

MLA is from DeepSeek-V2 (arXiv:2405.04434, section 2.1); where its names differ they stand in [].
Only a latent c_j [compressed kv] and one rotary key kr_j [k_pe] are kept of every token j:

    c_j = norm(W_down x_j)      kr_j = rope(W_kr x_j, j)
    k_hj = [W_UK_h c_j ; kr_j]  v_hj = W_UV_h c_j        scores scaled by 1 / sqrt(hs)

The same function is computed in two ways. Expanded: build k and v for every head, then attend.
Absorbed: move W_UK to the query and W_UV behind the average, so that all heads attend over the
cached rows themselves:

    q'_h = [W_UK_h^T q_h ; q_rope_h]    s_hj = q'_h . [c_j ; kr_j]    o_h = W_UV_h sum_j p_hj c_j

nanomla/kernels/reference.py defines attend and linear.
"""

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nanomla.kernels import attend, linear

Rotation = tuple[Tensor, Tensor]  # cos and sin of T positions x frequencies, each (T, dim / 2)


@dataclass
class GPTConfig:
    """The model's shape. Raises ValueError naming the field, its value and what would work."""

    block_size: Annotated[int, "#model", "longest context, in tokens", ">= 1"] = 1024
    vocab_size: Annotated[int, "token ids the model knows", ">= 1"] = 50304
    n_layer: Annotated[int, "transformer blocks", ">= 1"] = 12
    n_head: Annotated[int, "attention heads per block", ">= 1"] = 12
    n_embd: Annotated[int, "width of the residual stream", ">= 1"] = 768
    dropout: Annotated[float, "share of values dropped", ">= 0", "< 1", "decides the run"] = 0.0
    bias: Annotated[bool, "biases in linear layers and layer norms, as in GPT-2"] = True
    gelu: Annotated[Literal["exact", "tanh"], "the MLP's activation; GPT-2's is tanh"] = "exact"
    pos_emb: Annotated[Literal["learned", "rope"], "a table as in GPT-2, or rotary"] = "learned"
    rope_theta: Annotated[float, "rotary base, usually 10000.0", "> 0"] = 10000.0
    use_mla: Annotated[bool, "#attention", "keys and values through a cached latent"] = False
    mla_latent_dim: Annotated[int | None, "latent's width; None: a 4x smaller cache", ">= 1"] = None
    mla_groups: Annotated[int, "latents per token, each for n_head / mla_groups heads", ">= 1"] = 1
    mla_rope_dim: Annotated[int | None, "rotary key's width; None: half a head with rope"] = None
    mla_q_latent_dim: Annotated[int | None, "rank of low-rank queries; None: full", ">= 1"] = None
    mla_norm: Annotated[Literal["rmsnorm", "layernorm", "none"], "norm on the latent"] = "rmsnorm"
    mla_share_latent: Annotated[bool, "all layers use layer 0's down-projection"] = False
    use_svd: Annotated[bool, "keep every head's values in a subspace of rank svd_rank"] = False
    svd_rank: Annotated[int | None, "that rank; None: full, as without use_svd", ">= 1"] = None
    svd_method: Annotated[Literal["exact", "randomized"], "how value maps are factorised"] = "exact"

    def __post_init__(self) -> None:
        from nanomla.settings import check
        check(self)  # types and ranges, as declared above
        C, nh, hs = self.n_embd, self.n_head, self.hs
        _require(C % nh == 0, "n_head", nh, f"a divisor of n_embd={C}: {_divisors(C)}")
        even = self.use_mla or self.pos_emb == "learned" or hs % 2 == 0
        _require(even, "n_head", nh, f"one that leaves an even head size, not {hs}")
        if self.use_mla:
            self._resolve_mla()
        if self.use_svd:
            rv = self.svd_rank = hs if self.svd_rank is None else self.svd_rank
            _require(rv <= hs, "svd_rank", rv, f"from 1 to the head size {hs}")

    def _resolve_mla(self) -> None:
        """Replace None by what it stands for, and check MLA's sizes against each other."""
        nh, hs, G, full = self.n_head, self.hs, self.mla_groups, 2 * self.n_embd
        _require(nh % G == 0, "mla_groups", G, f"a divisor of n_head={nh}: {_divisors(nh)}")
        if self.mla_latent_dim is None:
            _require(hs > 1, "mla_latent_dim", None, f"a number, as head size {hs} has no half")
            self.mla_latent_dim = nh // G * (hs // 2)
        if self.mla_rope_dim is None:
            self.mla_rope_dim = hs // 2 // 2 * 2 if self.pos_emb == "rope" else 0
        L, r, rope = self.mla_latent_dim, self.mla_rope_dim, self.pos_emb == "rope"
        even = 0 <= r < hs and r % 2 == 0
        _require(even, "mla_rope_dim", r, f"None or an even number below the head size {hs}")
        _require(r == 0 or rope, "mla_rope_dim", r, "0 with pos_emb='learned', or pos_emb='rope'")
        count = f"{G} x {L} + {r} cached numbers a token would not be fewer than MHA's {full}"
        _require(G * L + r < full, "mla_latent_dim", L, f"at most {(full - 1 - r) // G}: {count}")

    @property
    def hs(self) -> int:
        """Head size."""
        return self.n_embd // self.n_head

    @property
    def attention(self) -> str:
        """Which attention this is: a key of ATTENTION."""
        return "mla" if self.use_mla else "mha"

    @property
    def rotary_dim(self) -> int:
        """How many numbers of a query are rotated by its position."""
        return 0 if self.pos_emb == "learned" else self.mla_rope_dim if self.use_mla else self.hs


def _require(holds: bool, field: str, value: object, works: str) -> None:
    if not holds:
        raise ValueError(f"{field}={value!r} does not work: {field} must be {works}")


def _divisors(n: int) -> str:
    return ", ".join(str(d) for d in range(1, min(n, 10_000) + 1) if n % d == 0)


# ---- Linear maps, norms, positions
class Linear(nn.Linear):
    """nn.Linear by kernels.linear, which is faster for the few rows of a decoding step."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def per_group(c: Tensor, weight: Tensor) -> Tensor:
    """c (B, T, G, L) through weight (G * d, L), whose g-th d rows read group g: (B, T, G * d)."""
    B, T, G, L = c.shape
    if G == 1:
        return F.linear(c.squeeze(2), weight)
    return torch.einsum("btgl,gdl->btgd", c, weight.view(G, -1, L)).reshape(B, T, -1)


def per_head(x: Tensor, weight: Tensor) -> Tensor:
    """x (B, nh, T, a) through weight (nh, a, b): (B, nh, T, b), each head by its own matrix."""
    B, nh, T, a = x.shape
    x = x.transpose(0, 1).reshape(nh, B * T, a)
    return torch.bmm(x, weight).view(nh, B, T, -1).transpose(0, 1)


class RMSNorm(nn.RMSNorm):
    """arXiv:1910.07467, in the activations' dtype, so that autocast keeps the fused kernel."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def latent_norm(kind: str, width: int) -> nn.Module:
    if kind == "none":
        return nn.Identity()
    return RMSNorm(width, eps=1e-6) if kind == "rmsnorm" else nn.LayerNorm(width, bias=False)


def rope_tables(start: int, end: int, dim: int, theta: float) -> Rotation:
    """cos and sin for positions start to end - 1, float32 on the CPU (arXiv:2104.09864, eq. 15)."""
    exponent = -torch.arange(0, dim, 2, dtype=torch.float64, device="cpu") / dim
    position = torch.arange(start, end, dtype=torch.float64, device="cpu")
    angle = torch.outer(position, theta**exponent)
    return angle.cos().float(), angle.sin().float()


def apply_rope(x: Tensor, rotation: Rotation | None) -> Tensor:
    """Rotate x (B, T, n, dim), or not; the first half of dim pairs with the second half."""
    if rotation is None:
        return x
    cos, sin = (t[:, None].to(x.dtype) for t in rotation)  # (T, 1, dim / 2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class LowRankValues(NamedTuple):
    """The value maps of all heads in a subspace of rank rv: head h's map is up[h] @ down[h]."""

    down: Tensor  # (nh * rv, in)
    up: Tensor  # (nh, hs, rv)

    def dense(self) -> Tensor:
        """The maps multiplied out, (nh * hs, in): in training faster than both per token."""
        nh, _, rank = self.up.shape
        return torch.bmm(self.up, self.down.view(nh, rank, -1)).flatten(0, 1)

    def expand(self, y: Tensor) -> Tensor:
        """From coordinates in the subspace, (B, nh, T, rv), to values, (B, nh, T, hs)."""
        return per_head(y, self.up.to(y.dtype).mT)


# ---- What all attention shares
class Cache:
    """
    What attention keeps of the tokens it has seen, in all layers; allocated once, and the caller's.
    pos tokens are held; only advance and truncate change that. layout alone decides what is kept.
    """

    DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

    def __init__(
        self, config: GPTConfig, batch_size: int, max_len: int, dtype=torch.float32, device="cpu"
    ) -> None:
        for name, size in (("batch_size", batch_size), ("max_len", max_len)):
            _require(size >= 1, name, size, "at least 1")
        _require(dtype in self.DTYPES, "dtype", dtype, "float32, bfloat16, float16 or float64")
        self.batch_size, self.max_len, self.dtype, self._pos = batch_size, max_len, dtype, 0
        rows, like = (config.n_layer, batch_size), {"dtype": dtype, "device": device}
        self.tensors = [torch.zeros(*rows, h, max_len, w, **like) for h, w in self.layout(config)]

    @staticmethod
    def layout(config: GPTConfig) -> list[tuple[int, int]]:
        """(heads, numbers per head) of each tensor that keeps a token in one layer."""
        raise TypeError("use KVCache or LatentCache")

    @property
    def pos(self) -> int:
        """How many tokens are held."""
        return self._pos

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token of one row in all layers."""
        return sum(t.nbytes for t in self.tensors) // (self.batch_size * self.max_len)

    @property
    def nbytes(self) -> int:
        """Bytes of all layers and rows, as allocated."""
        return self.nbytes_at(self.max_len)

    def nbytes_at(self, n: int) -> int:
        """Bytes that n tokens take in all layers and rows."""
        return n * self.batch_size * self.bytes_per_token

    def advance(self, T: int) -> None:
        """Count T more tokens as held, after every layer has written them."""
        _require(0 <= T <= self.max_len - self.pos, "T", T, f"from 0 to {self.max_len - self.pos}")
        self._pos += T

    def truncate(self, pos: int) -> None:
        """Forget all but the first pos tokens."""
        _require(0 <= pos <= self.pos, "pos", pos, f"from 0 to the {self.pos} tokens held")
        self._pos = pos

    def row(self, i: int) -> "Cache":
        """A cache for row i that shares this one's memory; it has its own pos."""
        view = copy.copy(self)
        view.batch_size, view.tensors = 1, [t[:, i : i + 1] for t in self.tensors]
        return view

    def broadcast_row(self, i: int) -> None:
        """Copy the tokens held in row i to all rows."""
        for t in self.tensors:
            t[:, :, :, : self.pos] = t[:, i : i + 1, :, : self.pos].clone()

    def check(self, config: GPTConfig, B: int, T: int, device: torch.device) -> None:
        """Raise ValueError if this model cannot write T tokens of B rows, before it writes any."""
        kind, needs = type(self), ATTENTION[config.attention].Cache
        if kind is not needs:
            raise ValueError(f"this model needs a {needs.__name__}, not a {kind.__name__}")
        has = [(t.size(0), t.size(2), t.size(4)) for t in self.tensors]  # layers, heads, width
        if has != (wants := [(config.n_layer, *sizes) for sizes in self.layout(config)]):
            raise ValueError(f"the cache was made for another model: it has {has}, not {wants}")
        if (where := self.tensors[0].device) != device:
            raise ValueError(f"the cache is on {where}, the model on {device}")
        if self.batch_size != B:
            raise ValueError(f"the cache has {self.batch_size} rows, the input {B}; make another")
        if self.pos + T > self.max_len:
            full = f"{self.pos} tokens held, {T} to add, max_len={self.max_len}"
            raise ValueError(f"the cache is full: {full}; truncate it, or make a longer one")

    @staticmethod
    def pack(*parts: Tensor) -> tuple[Tensor, ...]:
        """The parts of new tokens, (B, heads, T, width), as the tensors that layout names."""
        return parts

    def update(self, layer: int, *parts: Tensor) -> tuple[Tensor, ...]:
        """Write the parts of T new tokens in one layer; returns all S tokens, packed, uncopied."""
        if torch.is_grad_enabled():
            raise RuntimeError("a cache is for inference; use torch.no_grad or inference_mode")
        end = self.pos + parts[0].size(2)
        for t, new in zip(self.tensors, self.pack(*parts), strict=True):
            t[layer, :, :, self.pos : end] = new
        return tuple(t[layer, :, :, :end] for t in self.tensors)


class Costs:
    """Analysis of a GPT or an attention block, against MHA of the same n_embd and n_head."""

    def get_compression_ratio(self) -> float:
        """Key and value parameters of MHA over this module's; shared ones count once."""
        from nanomla import costs
        return costs.compression_ratio(self)

    def get_memory_savings(self, sequence_length: int) -> float:
        """MHA cache bytes at that length over this module's."""
        from nanomla import costs
        return costs.memory_savings(self.config, sequence_length)

    def get_cache_size_ratio(self) -> float:
        """This module's cache bytes over MHA's."""
        return 1 / self.get_memory_savings(1)


class Attention(Costs, nn.Module):
    """What every attention block has: its shape, low-rank values, the way back to the stream."""

    Cache: type[Cache]  # keeps its past

    def __init__(self, config: GPTConfig, layer: int = 0) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.nh, self.hs, self.scale = config.n_head, config.hs, 1 / math.sqrt(config.hs)

    def _add_output(self, value_in: int) -> None:
        """Register what follows the average, in nanoGPT's order, which optimizer states rely on."""
        config = self.config
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        if config.use_svd:
            self.v_down = Linear(value_in, self.nh * config.svd_rank, bias=False)
            self.v_up = nn.Parameter(torch.empty(self.nh, self.hs, config.svd_rank))

    @property
    def values(self) -> LowRankValues | None:
        """The value maps under use_svd."""
        return LowRankValues(self.v_down.weight, self.v_up) if self.config.use_svd else None

    def _rotation(self, x: Tensor, pos: int, given: Rotation | None) -> Rotation | None:
        """The tables for x (B, T, C) from position pos on: GPT's, or made here when used alone."""
        if given is not None or not self.config.rotary_dim:
            return given
        tables = rope_tables(pos, pos + x.size(1), self.config.rotary_dim, self.config.rope_theta)
        return tables[0].to(x.device), tables[1].to(x.device)

    def _output(self, y: Tensor) -> Tensor:
        """Heads side by side, y (B, nh, T, hs) -> (B, T, C), and back into the residual stream."""
        B, nh, T, hs = y.shape
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, nh * hs)))


# ---- MHA
class KVCache(Cache):
    """MHA's cache: keys of width hs and values of width rv (hs without SVD) for every head."""

    @staticmethod
    def layout(config: GPTConfig) -> list[tuple[int, int]]:
        rv = config.svd_rank if config.use_svd else config.hs
        return [(config.n_head, config.hs), (config.n_head, rv)]


class CausalSelfAttention(Attention):
    """GPT-2's attention (MHA), with rotary positions where the config says so."""

    Cache = KVCache

    def __init__(self, config: GPTConfig, layer: int = 0) -> None:
        super().__init__(config, layer)
        maps = 2 if config.use_svd else 3  # queries, keys and, unless they are low-rank, values
        self.c_attn = Linear(config.n_embd, maps * config.n_embd, bias=config.bias)
        self._add_output(config.n_embd)

    def forward(self, x: Tensor, cache: KVCache | None = None, rotation=None) -> Tensor:
        """x (B, T, C) -> (B, T, C). With a cache, x continues it, and the caller advances it."""
        (B, T, C), pos = x.shape, 0 if cache is None else cache.pos
        values, rotation = self.values, self._rotation(x, pos, rotation)
        q, k, *v = self.c_attn(x).split(C, dim=2)
        q, k = (apply_rope(t.view(B, T, self.nh, self.hs), rotation) for t in (q, k))
        if values is None:
            v = v[0]
        else:  # with a cache, the coordinates in the subspace that it keeps
            v = F.linear(x, values.dense()) if cache is None else self.v_down(x)
        q, k, v = (t.view(B, T, self.nh, -1).transpose(1, 2) for t in (q, k, v))  # (B, nh, T, .)
        if cache is not None:
            past = cache.update(self.layer, k, v)
        if pos > 0:
            y = attend(q.to(cache.dtype), *past, T, self.scale).to(x.dtype)
            return self._output(y if values is None else values.expand(y))
        if cache is not None and values is not None:
            v = values.expand(v)  # the new tokens are all there is, and need no rounding
        dropout = self.config.dropout * self.training
        return self._output(attend(q, k, v, T, self.scale, dropout=dropout))

    def numbers_per_key(self, decoding: bool) -> int:
        """Multiplications per head, key and query, in the score and in the average."""
        return self.hs + (self.config.svd_rank if decoding and self.config.use_svd else self.hs)


# ---- MLA
class LatentCache(Cache):
    """
    MLA's cache: G * L latent numbers after their norm, r rotary numbers after their rotation. With
    one group they lie side by side, [c ; kr], and one pass over a row serves as key and value. With
    several, each group's latents are contiguous and the rotary key is kept once.
    """

    @staticmethod
    def layout(config: GPTConfig) -> list[tuple[int, int]]:
        G, L, r = config.mla_groups, config.mla_latent_dim, config.mla_rope_dim
        return [(1, L + r)] if G == 1 else [(G, L)] + [(1, r)] * (r > 0)

    @staticmethod
    def pack(c: Tensor, *kr: Tensor) -> tuple[Tensor, ...]:
        """c (B, G, T, L) and, with r > 0, kr (B, 1, T, r) as rows and what is kept beside them."""
        return (torch.cat([c, *kr], dim=-1),) if kr and c.size(1) == 1 else (c, *kr)

    @staticmethod
    def unpack(rows: Tensor, *kr: Tensor, L: int) -> tuple[Tensor, ...]:
        """c (B, G, S, L) and, with r > 0, kr (B, 1, S, r) of packed tokens."""
        return (rows, *kr) if rows.size(-1) == L else (rows[..., :L], rows[..., L:])


class MultiHeadLatentAttention(Attention):
    """
    MLA: keys and values are functions of a cached latent and one shared rotary key; the equations
    are on top of this file. With groups, head h reads latent h // m (arXiv:2505.21487).
    """

    Cache = LatentCache

    def __init__(self, config: GPTConfig, layer: int = 0) -> None:
        super().__init__(config, layer)
        self.G, self.L, self.r = config.mla_groups, config.mla_latent_dim, config.mla_rope_dim
        C, nh, hs, L, bias = config.n_embd, self.nh, self.hs, self.L, config.bias
        self._add_output(L)
        if config.mla_q_latent_dim is None:
            self.q_proj = Linear(C, C, bias=bias)
        else:
            self.q_latent_proj = Linear(C, config.mla_q_latent_dim, bias=False)  # [q_a_proj]
            self.q_latent_norm = latent_norm(config.mla_norm, config.mla_q_latent_dim)
            self.q_expand = Linear(config.mla_q_latent_dim, C, bias=False)  # [q_b_proj]
        self.kv_latent_proj = Linear(C, self.G * L + self.r, bias=bias)  # [kv_a_proj_with_mqa]
        self.latent_norm = latent_norm(config.mla_norm, L)
        self.k_expand = Linear(L, nh * (hs - self.r), bias=False)  # W_UK [first rows of kv_b_proj]
        if not config.use_svd:
            self.v_expand = Linear(L, nh * hs, bias=False)  # W_UV [last rows of kv_b_proj]

    def forward(
        self, x: Tensor, cache: LatentCache | None = None, rotation=None, absorb: bool | None = None
    ) -> Tensor:
        """
        x (B, T, C) -> (B, T, C). With a cache, x continues it, and the caller advances it.
        absorb: attend over latents (True), over expanded keys (False), or the cheaper (None).
        """
        T, pos = x.size(1), 0 if cache is None else cache.pos
        q, *latent = self._project(x, self._rotation(x, pos, rotation))
        if absorb is None:
            absorb = cache is not None and self.absorbing_is_cheaper(T, pos + T)
        if cache is not None:
            packed = cache.update(self.layer, *latent)
        elif absorb:
            packed = LatentCache.pack(*latent)
        if absorb:
            return self._output(self._absorbed(q, *packed))
        if pos > 0:  # the keys and values of earlier tokens have to be built again
            latent = [t.to(q.dtype) for t in LatentCache.unpack(*packed, L=self.L)]
        k, v = self._expand(*latent)
        dropout = self.config.dropout * self.training
        return self._output(attend(q, k, v, T, self.scale, dropout=dropout))

    def absorbing_is_cheaper(self, T: int, S: int) -> bool:
        """
        Multiplications per head, D = 2 hs - r rows of W_UK and W_UV: expanded S L D + 2 T S hs,
        absorbed T L D + T S (2 L + r). Measured at L = 192, hs = 32, r = 16, S = 4,096, 2 cores:
        absorbing takes 0.15 of expanding's time at T = 1, 0.7 at 24, 1.3 at 32.
        """
        LD = self.L * (2 * self.hs - self.r)
        return T * (LD + S * (2 * self.L + self.r)) < S * (LD + 2 * T * self.hs)

    def _project(self, x: Tensor, rotation: Rotation | None) -> tuple[Tensor, ...]:
        """q (B, nh, T, hs), c (B, G, T, L) after its norm and, with r > 0, kr (B, 1, T, r)."""
        B, T, _ = x.shape
        full = self.config.mla_q_latent_dim is None
        q = self.q_proj(x) if full else self.q_expand(self.q_latent_norm(self.q_latent_proj(x)))
        q = q.view(B, T, self.nh, self.hs)
        c, kr = self.kv_latent_proj(x).split([self.G * self.L, self.r], dim=-1)
        c = self.latent_norm(c.reshape(B, T, self.G, self.L)).transpose(1, 2)
        if self.r == 0:
            return q.transpose(1, 2), c
        content, q_rope = q.split([self.hs - self.r, self.r], dim=-1)
        q = torch.cat([content, apply_rope(q_rope, rotation)], dim=-1)
        return q.transpose(1, 2), c, apply_rope(kr.unsqueeze(2), rotation).transpose(1, 2)

    def _expand(self, c: Tensor, kr: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """c (B, G, S, L) and kr (B, 1, S, r) -> every head's keys and values, (B, nh, S, hs)."""
        c, values = c.transpose(1, 2), self.values  # (B, S, G, L)
        B, S = c.shape[:2]
        k = per_group(c, self.k_expand.weight).view(B, S, self.nh, self.hs - self.r)
        if kr is not None:
            k = torch.cat([k, kr.transpose(1, 2).expand(-1, -1, self.nh, -1)], dim=-1)
        v = per_group(c, self.v_expand.weight if values is None else values.dense())
        return k.transpose(1, 2), v.view(B, S, self.nh, self.hs).transpose(1, 2)

    def _absorbed(self, q: Tensor, rows: Tensor, kr: Tensor | None = None) -> Tensor:
        """q (B, nh, T, hs) against S packed tokens -> (B, nh, T, hs)."""
        B, nh, T, _ = q.shape
        G, L, m, values = self.G, self.L, nh // self.G, self.values

        def by_group(y: Tensor) -> Tensor:  # (B, nh, T, .) -> (B, G, T * m, .), row t * m + i
            return y.unflatten(1, (G, m)).transpose(2, 3).reshape(B, G, T * m, -1).to(rows.dtype)

        q, q_rope = q.split([self.hs - self.r, self.r], dim=-1)
        q = per_head(q, self.k_expand.weight.view(nh, -1, L))  # W_UK_h^T q_h, (B, nh, T, L)
        extra = None
        if kr is not None:  # one rotary key for all groups, beside their latents
            extra = by_group(q_rope).flatten(1, 2) @ kr.squeeze(1).mT  # (B, G * T * m, S)
            extra = extra.unflatten(1, (G, T * m))
        elif self.r:
            q = torch.cat([q, q_rope], dim=-1)  # as the rows are
        o = attend(by_group(q), rows, None, T, self.scale, extra)[..., :L]  # (B, G, T * m, L)
        o = o.to(q.dtype).unflatten(2, (T, m)).transpose(2, 3).reshape(B, nh, T, L)
        if values is None:
            return per_head(o, self.v_expand.weight.view(nh, self.hs, L).mT)
        return values.expand(per_head(o, values.down.view(nh, -1, L).mT))

    def numbers_per_key(self, decoding: bool) -> int:
        """Multiplications per head, key and query, in the score and in the average."""
        return 2 * self.L + self.r if decoding else 2 * self.hs


# A new attention is a class above, its cache if it needs a new one, and an entry here.
ATTENTION = {"mha": CausalSelfAttention, "mla": MultiHeadLatentAttention}


# ---- The transformer
class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)
        self.approximate = "tanh" if config.gelu == "tanh" else "none"  # torch's names

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate=self.approximate)))


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = ATTENTION[config.attention](config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cache: Cache | None = None, rotation=None) -> Tensor:
        x = x + self.attn(self.ln_1(x), cache, rotation)
        return x + self.mlp(self.ln_2(x))


class GPT(Costs, nn.Module):
    """
    GPT-2's architecture around any attention; with MHA the state dict has nanoGPT's names. Built
    under torch.device("meta") it has no weights before load_state_dict(assign=True), tie_weights().
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.grad_checkpoint = False  # recompute each block in the backward pass, to save memory
        parts = {
            "wte": nn.Embedding(config.vocab_size, config.n_embd),
            "wpe": nn.Embedding(config.block_size, config.n_embd),
            "drop": nn.Dropout(config.dropout),
            "h": nn.ModuleList([Block(config, layer) for layer in range(config.n_layer)]),
            "ln_f": nn.LayerNorm(config.n_embd, bias=config.bias),
        }
        if config.pos_emb == "rope":  # it was drawn to give the same seed the same weights
            del parts["wpe"]
        self.transformer = nn.ModuleDict(parts)
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        cos, sin = rope_tables(0, config.block_size, config.rotary_dim, config.rope_theta)
        self.register_buffer("rope_cos", cos, persistent=False)  # one table for all layers
        self.register_buffer("rope_sin", sin, persistent=False)
        if not self.lm_head.weight.is_meta:
            self._init_weights()
        self.tie_weights()

    @classmethod
    def from_pretrained(cls, source: str, override_args: dict[str, Any] | None = None) -> "GPT":
        """
        The model of gpt2[-medium|-large|-xl], a Hugging Face folder, an export, a run or a file.
        override_args: dropout and the svd settings. Raises UserError for what cannot be read.
        """
        from nanomla import checkpoint, formats
        return checkpoint.build(formats.open_weights(source, True), **(override_args or {}))[0]

    @torch.no_grad()
    def _init_weights(self) -> None:
        """
        Draw every weight. Matrices and embeddings are normal, standard deviation 0.02; c_proj of
        attention and MLP 0.02 / sqrt(2 n_layer), which keeps the residual stream's variance over
        depth (GPT-2). v_down and v_up factorise a value map drawn with 0.02. Biases 0, norms 1.
        """
        from nanomla import surgery
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.config.n_layer))
        for block in self.transformer.h if self.config.use_svd else ():
            down, up = block.attn.values
            dense = torch.randn(*up.shape[:2], down.size(1), device=up.device) * 0.02
            factors = surgery.factorise(dense, up.size(2), self.config.svd_method)
            down.copy_(factors[0])
            up.copy_(factors[1])

    def tie_weights(self) -> None:
        """Make one of the weights that are shared: lm_head and wte, and all latent projections."""
        self.transformer.wte.weight = self.lm_head.weight  # arXiv:1608.05859
        if self.config.use_mla and self.config.mla_share_latent:
            for block in self.transformer.h:
                block.attn.kv_latent_proj = self.transformer.h[0].attn.kv_latent_proj

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, cache: Cache | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """
        idx (B, T) int64. With targets (B, T): logits (B, T, V) and the mean cross-entropy over all
        but -1. Without: logits of the last position, (B, 1, V), and None. With a cache, idx goes on
        from what it holds. Raises ValueError for a context or a cache that does not fit.
        """
        (B, T), cfg, pos = idx.shape, self.config, 0 if cache is None else cache.pos
        if cache is not None:
            cache.check(cfg, B, T, self.lm_head.weight.device)
        if pos + T > cfg.block_size:
            raise ValueError(f"{pos + T} tokens do not fit block_size={cfg.block_size}; crop them")
        x = self.transformer.wte(idx)  # (B, T, C)
        if cfg.pos_emb == "learned":
            x, rotation = x + self.transformer.wpe.weight[pos : pos + T], None
        else:
            rotation = self.rope_cos[pos : pos + T], self.rope_sin[pos : pos + T]
        x = self.transformer.drop(x)
        for block in self.transformer.h:
            if self.grad_checkpoint and torch.is_grad_enabled():
                x = checkpoint(block, x, cache, rotation, use_reentrant=False)
            else:
                x = block(x, cache, rotation)
        if cache is not None:
            cache.advance(T)  # once, after all layers have written at the old position
        if targets is None:
            return self.lm_head(self.transformer.ln_f(x[:, -1:])), None
        logits = self.lm_head(self.transformer.ln_f(x))
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    def make_cache(self, batch_size: int, max_len: int, dtype: torch.dtype | None = None) -> Cache:
        """
        An empty cache for max_len tokens of batch_size rows. dtype None: that of the activations.
        Raises ValueError if max_len is over block_size, or for a dtype that Cache.DTYPES lacks.
        """
        limit, weight = self.config.block_size, self.lm_head.weight
        _require(1 <= max_len <= limit, "max_len", max_len, f"from 1 to block_size={limit}")
        if dtype is None:
            autocast = torch.is_autocast_enabled(weight.device.type)
            dtype = torch.get_autocast_dtype(weight.device.type) if autocast else weight.dtype
        kind = ATTENTION[self.config.attention].Cache
        return kind(self.config, batch_size, max_len, dtype, weight.device)

    def generate(
        self, idx: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None,
        top_p: float | None = None, stop: int | Iterable[int] | None = None, use_cache: bool = True,
        generator: torch.Generator | None = None, cache_dtype: torch.dtype | None = None,
        cache: Cache | None = None,
    ) -> Tensor:  # fmt: skip
        """
        Continue idx (B, T), T >= 1, by n <= max_new_tokens tokens: (B, T + n).

        temperature 0 is argmax; top_k None or 0 and top_p None or 1 are off. stop: token ids; a row
        that drew one repeats it, and when all have, generation ends. use_cache=False recomputes a
        sliding window every step. cache holds the first cache.pos tokens of idx, and afterwards the
        last of all but the very last; cache_dtype is that of the cache made otherwise. Raises
        ValueError for arguments out of range.
        """
        from nanomla.engine import Sampler, check_prompt, crop_context
        sampler, block_size = Sampler(temperature, top_k, top_p, generator), self.config.block_size
        B, T = check_prompt(idx, cache)
        if cache is None and use_cache and max_new_tokens > 0:
            cache = self.make_cache(B, min(block_size, T + max_new_tokens), cache_dtype)
        stops = [stop] if isinstance(stop, int) else [*(stop or ())]
        done = torch.zeros(B, 1, dtype=torch.bool, device=idx.device)
        context, tokens = idx[:, -block_size:], [idx]
        with torch.inference_mode():
            if cache is not None:  # the last token is computed again if it is held already
                cache.truncate(min(cache.pos, context.size(1) - 1))
            for _ in range(max_new_tokens):
                context = crop_context(context, cache, block_size)
                logits = self(context if cache is None else context[:, cache.pos :], cache=cache)[0]
                new = torch.where(done, tokens[-1][:, -1:], sampler(logits[:, -1]))  # (B, 1)
                tokens.append(new)
                if stops:
                    done = torch.isin(new, torch.tensor(stops, device=idx.device))
                    if bool(done.all()):
                        break
                context = torch.cat([context, new], dim=1)
        return torch.cat(tokens, dim=1)

    def get_num_params(self, non_embedding: bool = True) -> int:
        """Parameters, shared ones once; non_embedding omits the position table, as in nanoGPT."""
        n = sum(p.numel() for p in self.parameters())
        learned = non_embedding and self.config.pos_emb == "learned"
        return n - self.transformer.wpe.weight.numel() if learned else n
