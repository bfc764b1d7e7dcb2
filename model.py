"""
The whole model: a GPT whose attention block is causal self-attention (MHA), multi-head latent attention (MLA), or
either with its values kept in a low-rank subspace (SVD), chosen by GPTConfig.

Letters: B batch, T new tokens, S cached and new tokens, C = n_embd, nh heads, hs = C / nh head size,
L latent numbers per group, G groups, m = nh / G heads per group, r rotary numbers, rv value rank, V vocabulary.

MLA is from DeepSeek-V2 (arXiv:2405.04434, section 2.1); where names differ, DeepSeek's stand in brackets.
Only a latent c_j [compressed kv] and one rotary key kr_j [k_pe] are kept of every token j:

    c_j = norm(W_down x_j)      kr_j = rope(W_kr x_j, j)
    k_hj = [W_UK_h c_j ; kr_j]  v_hj = W_UV_h c_j        scores scaled by 1 / sqrt(hs)

The same function is computed in two ways. Expanded: build k and v for every head, then attend. Absorbed: move W_UK to
the query and W_UV behind the average, so that all heads attend over the cached rows themselves:

    q'_h = [W_UK_h^T q_h ; q_rope_h]    s_hj = q'_h . [c_j ; kr_j]    o_h = W_UV_h sum_j p_hj c_j
"""

import contextlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

CACHE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class GPTConfig:
    """The model's shape. Raises ValueError naming the field, its value and what would work."""

    block_size: Annotated[int, "longest context, in tokens"] = 1024
    vocab_size: Annotated[int, "token ids the model knows"] = 50304
    n_layer: Annotated[int, "transformer blocks"] = 12
    n_head: Annotated[int, "attention heads per block"] = 12
    n_embd: Annotated[int, "width of the residual stream"] = 768
    dropout: Annotated[float, "share of activations dropped in training"] = 0.0
    bias: Annotated[bool, "biases in linear layers and layer norms, as GPT-2"] = True
    gelu: Annotated[Literal["exact", "tanh"], "the MLP's activation; GPT-2's own weights want its tanh formula"] = "exact"
    pos_emb: Annotated[Literal["learned", "rope"], "positions: a learned table (GPT-2) or rotary"] = "learned"
    rope_theta: Annotated[float, "rotary base"] = 10000.0
    use_mla: Annotated[bool, "attend through a latent instead of full keys and values"] = False
    mla_latent_dim: Annotated[int | None, "latent numbers cached per token and group; None: a 4x smaller cache"] = None
    mla_groups: Annotated[int, "latents per token, each shared by n_head / mla_groups heads"] = 1
    mla_rope_dim: Annotated[int | None, "width of the shared rotary key; None: about half a head with rope, else 0"] = None
    mla_q_latent_dim: Annotated[int | None, "rank of low-rank queries; None: full"] = None
    mla_norm: Annotated[Literal["rmsnorm", "layernorm", "none"], "norm on the latent before it is cached"] = "rmsnorm"
    mla_share_latent: Annotated[bool, "all layers use layer 0's down-projection"] = False
    use_svd: Annotated[bool, "keep every head's values in a subspace of rank svd_rank"] = False
    svd_rank: Annotated[int | None, "that rank; None: full, the same function as use_svd=False"] = None
    svd_method: Annotated[Literal["exact", "randomized"], "how dense weights are factorised"] = "exact"

    def __post_init__(self) -> None:
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "mla_groups"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "a whole number of at least 1")
        for name in ("mla_latent_dim", "mla_q_latent_dim", "svd_rank"):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, value, "None or a whole number of at least 1")
        _require(0 <= self.dropout < 1, "dropout", self.dropout, "from 0.0 to below 1.0")
        _require(self.rope_theta > 0, "rope_theta", self.rope_theta, "a positive number, usually 10000.0")
        choices = {"gelu": ("exact", "tanh"), "pos_emb": ("learned", "rope"), "mla_norm": ("rmsnorm", "layernorm", "none")}
        for name, allowed in {**choices, "svd_method": ("exact", "randomized")}.items():
            _require(getattr(self, name) in allowed, name, getattr(self, name), "one of " + ", ".join(allowed))
        fits = ", ".join(str(n) for n in range(1, self.n_embd + 1) if self.n_embd % n == 0)
        _require(self.n_embd % self.n_head == 0, "n_head", self.n_head, f"a divisor of n_embd={self.n_embd}: {fits}")
        if self.use_mla:
            self._resolve_mla()
        elif self.pos_emb == "rope":
            _require(self.hs % 2 == 0, "n_head", self.n_head, f"one that leaves an even head size, not {self.hs}")
        if self.use_svd:
            self.svd_rank = self.hs if self.svd_rank is None else self.svd_rank
            _require(self.svd_rank <= self.hs, "svd_rank", self.svd_rank, f"from 1 to the head size {self.hs}")

    @property
    def hs(self) -> int:
        """Head size."""
        return self.n_embd // self.n_head

    def _resolve_mla(self) -> None:
        hs, groups = self.hs, self.mla_groups
        fits = ", ".join(str(n) for n in range(1, self.n_head + 1) if self.n_head % n == 0)
        _require(self.n_head % groups == 0, "mla_groups", groups, f"a divisor of n_head={self.n_head}: {fits}")
        if self.mla_latent_dim is None:
            self.mla_latent_dim = (self.n_head // groups) * (hs // 2)
            _require(self.mla_latent_dim >= 1, "mla_latent_dim", None, f"a number, as head size {hs} cannot be halved")
        r = self.mla_rope_dim
        if r is None:
            r = self.mla_rope_dim = hs // 2 // 2 * 2 if self.pos_emb == "rope" else 0
        _require(r >= 0 and r % 2 == 0, "mla_rope_dim", r, "an even number, or None")
        _require(r < hs, "mla_rope_dim", r, f"an even number below the head size {hs}")
        _require(r == 0 or self.pos_emb == "rope", "mla_rope_dim", r, "0 with pos_emb='learned', or pos_emb='rope'")
        width, full = groups * self.mla_latent_dim + r, 2 * self.n_embd
        _require(
            width < full,
            "mla_latent_dim",
            self.mla_latent_dim,
            f"at most {(full - 1 - r) // groups}: {groups} x {self.mla_latent_dim} + {r} cached numbers a token would "
            f"not be fewer than MHA's {full}",
        )

    def without_effect(self) -> list[str]:
        """The settings that differ from their default but do nothing under this configuration."""
        idle = [] if self.use_mla else [n for n in GPTConfig.__dataclass_fields__ if n.startswith("mla_")]
        idle += [] if self.use_svd else ["svd_rank", "svd_method"]
        idle += [] if self.pos_emb == "rope" else ["rope_theta"]
        return [name for name in idle if getattr(self, name) != GPTConfig.__dataclass_fields__[name].default]


def _require(holds: bool, field: str, value: object, works: str) -> None:
    if not holds:
        raise ValueError(f"{field}={value!r} does not work: {field} must be {works}")


# ----------------------------------------------------------------------------------------------------------------------
# Caches: owned by the caller, preallocated, never copied to grow. `pos` tokens are valid; setting it back rewinds.


class _Cache:
    """What both caches share: the position, the checks, the size. `tensors` hold (n_layer, B, heads, max_len, width)."""

    def __init__(self, batch_size: int, max_len: int, tensors: list[Tensor]) -> None:
        self.batch_size, self.max_len, self.tensors, self.pos = batch_size, max_len, tensors, 0

    @property
    def dtype(self) -> torch.dtype:
        return self.tensors[0].dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all layers and rows, as allocated."""
        return sum(t.nbytes for t in self.tensors)

    @property
    def bytes_per_token(self) -> int:
        """Bytes one token of one row takes over all layers."""
        return self.nbytes // (self.batch_size * self.max_len)

    def reset(self) -> None:
        self.pos = 0

    def row(self, i: int) -> "_Cache":
        """A cache for one row that shares this one's memory; it has its own pos."""
        view = object.__new__(type(self))
        _Cache.__init__(view, 1, self.max_len, [t[:, i : i + 1] for t in self.tensors])
        view.pos = self.pos
        return view

    def repeat_first_row(self, pos: int) -> None:
        """Copy the first `pos` tokens of row 0 to all rows: a prompt that all rows share is prefilled once."""
        for t in self.tensors:
            t[:, 1:, :, :pos] = t[:, :1, :, :pos]
        self.pos = pos

    def _write(self, i: int, layer: int, new: Tensor) -> Tensor:
        """Put new (B, heads, T, width) behind the cached tokens of a layer; returns all S of them, uncopied."""
        full, end = self.tensors[i][layer], self.pos + new.size(2)
        full[:, :, self.pos : end] = new.detach()
        return full[:, :, :end]


def _check_cache_size(batch_size: int, max_len: int, dtype: torch.dtype) -> None:
    _require(batch_size >= 1, "batch_size", batch_size, "at least 1")
    _require(max_len >= 1, "max_len", max_len, "at least 1")
    _require(dtype in CACHE_DTYPES, "dtype", dtype, "float32, bfloat16 or float16")


class KVCache(_Cache):
    """MHA's cache: keys of width hs and values of width rv (hs without SVD) for every head."""

    def __init__(
        self, config: GPTConfig, batch_size: int, max_len: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        _check_cache_size(batch_size, max_len, dtype)
        rows = (config.n_layer, batch_size, config.n_head, max_len)
        rv = config.svd_rank if config.use_svd else config.hs
        super().__init__(
            batch_size, max_len, [torch.zeros(*rows, w, dtype=dtype, device=device) for w in (config.hs, rv)]
        )

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k (B, nh, T, hs), v (B, nh, T, rv) -> all cached keys and values, (B, nh, S, .)."""
        return self._write(0, layer, k), self._write(1, layer, v)


class LatentCache(_Cache):
    """
    MLA's cache: G * L latent numbers after their norm and r rotary numbers after their rotation, per token and layer.

    With one group the two lie side by side, [c ; kr], so that one pass over a row serves as key and as value. With
    several, each group's latents are contiguous and the rotary key is kept once beside them.
    """

    def __init__(
        self, config: GPTConfig, batch_size: int, max_len: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        _check_cache_size(batch_size, max_len, dtype)
        G, L, r = config.mla_groups, config.mla_latent_dim, config.mla_rope_dim
        shapes = [(1, L + r)] if G == 1 else [(G, L)] + ([(1, r)] if r else [])
        super().__init__(
            batch_size,
            max_len,
            [torch.zeros(config.n_layer, batch_size, g, max_len, w, dtype=dtype, device=device) for g, w in shapes],
        )

    def update(self, layer: int, c: Tensor, kr: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """c (B, G, T, L), kr (B, 1, T, r) -> all cached rows: (B, 1, S, L + r), None or (B, G, S, L), (B, 1, S, r)."""
        if c.size(1) == 1:
            return self._write(0, layer, c if kr is None else torch.cat([c, kr], dim=-1)), None
        return self._write(0, layer, c), None if kr is None else self._write(1, layer, kr)


# ----------------------------------------------------------------------------------------------------------------------
# Attention over more keys than queries. Queries are (B, X, T * m, .), row t * m + i being token t's head i of m;
# keys (B, X, S, .) end with the T new tokens.


def _causal_mask(T: int, S: int, m: int, device: torch.device) -> Tensor:
    """(T * m, S) bool, True where the t-th of the last T tokens may look: the lower-right corner, m rows a token."""
    last = torch.arange(S - T, S, device=device).repeat_interleave(m)
    return torch.arange(S, device=device) <= last[:, None]


def _attend_matmul(q: Tensor, k: Tensor, v: Tensor, T: int, scale: float, extra: Tensor | None = None) -> Tensor:
    """softmax(q k^T scale + extra) v by two matrix products. extra: scores to add before scaling."""
    if q.shape[:2] == (1, 1) and extra is None:  # a batch of one matrix is slower than the matrix: 4x in bfloat16
        return _attend_matmul(q[0, 0], k[0, 0], v[0, 0], T, scale)[None, None]
    scores = (q * scale) @ k.transpose(-1, -2)  # (B, X, T * m, S); the queries are scaled as they are fewer than keys
    if extra is not None:
        scores = scores + extra * scale
    if T > 1:
        mask = _causal_mask(T, k.size(-2), q.size(-2) // T, q.device)
        scores = scores.masked_fill(~mask, float("-inf"))
    return F.softmax(scores, dim=-1) @ v  # softmax computes in float32 whatever it reads and writes


def _attend_split(q: Tensor, rows: Tensor, T: int, scale: float, chunks: int) -> Tensor:
    """
    One query block against rows (B, 1, S, W) that are keys and values at once, on all cores.

    The CPU kernel gives a query block to one core. So the old keys are cut into chunks that pose as heads, each
    chunk's output comes with its log-sum-exp, and the chunks are merged by it, as flash-decoding does. The new tokens,
    which alone need a mask, form a last chunk together with what the division leaves over.
    """
    size = (rows.size(2) - T) // chunks
    old = rows[:, 0, : chunks * size].unflatten(1, (chunks, size))  # (B, chunks, size, W), no copy
    tail = rows[:, :, chunks * size :]
    mask = None
    if T > 1:
        seen = _causal_mask(T, tail.size(2), q.size(2) // T, q.device)
        mask = torch.zeros_like(seen, dtype=q.dtype).masked_fill_(~seen, float("-inf"))
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out_old, lse_old = flash(q.expand(-1, chunks, -1, -1), old, old, scale=scale)  # (B, chunks, T*m, W), (.., T*m)
    out_tail, lse_tail = flash(q, tail, tail, attn_mask=mask, scale=scale)
    share = torch.cat([lse_old, lse_tail], dim=1).softmax(dim=1).unsqueeze(-1).to(q.dtype)
    return (torch.cat([out_old, out_tail], dim=1) * share).sum(dim=1, keepdim=True)


def _attend(q: Tensor, k: Tensor, v: Tensor, T: int, scale: float) -> Tensor:
    """Causal attention of the last T of S tokens, the fastest way this device has. k may be v itself (latent rows)."""
    S = k.size(-2)
    if q.device.type == "cpu" and T <= 8 and not torch.is_grad_enabled():
        if k is not v or k.dtype != torch.float32:
            # Measured, one token: flash on CPU is 1.3x (float32) to 4x (bfloat16) slower than two matrix products on
            # MHA's keys and 1.3x slower on bfloat16 latents; only on float32 latents is it 1.4x faster.
            return _attend_matmul(q, k, v, T, scale)
        chunks = min(4 * torch.get_num_threads(), (S - T) // 256)  # fewer than 256 keys do not repay the merge
        if q.size(0) < torch.get_num_threads() and chunks > 1:  # else the rows of the batch already fill the cores
            return _attend_split(q, k, T, scale, chunks)
    mask = None if T == 1 else _causal_mask(T, S, q.size(-2) // T, q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


# ----------------------------------------------------------------------------------------------------------------------
# Building blocks


class Linear(nn.Linear):
    """nn.Linear that reads its weight with all cores when a CPU decodes: a few float32 rows, no gradient."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.numel() // self.in_features
        decoding = rows <= 16 and self.weight.numel() >= 2**16 and not torch.is_grad_enabled()
        if not decoding or x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        # One row against a matrix runs on one core there; row blocks of the matrix posing as a batch run on all of
        # them. Measured on two cores: 1.6x at 1 row, 1.9x at 4, 1.4x at 16, 1.2x at 32; in bfloat16 nothing is gained.
        blocks = math.gcd(self.out_features, 4 * torch.get_num_threads())
        if blocks == 1 or self.weight.dtype != torch.float32:
            return super().forward(x)
        weight = self.weight.view(blocks, -1, self.in_features).mT  # (blocks, in, out / blocks)
        y = torch.bmm(x.reshape(1, rows, -1).expand(blocks, -1, -1), weight)  # (blocks, rows, out / blocks)
        y = y.transpose(0, 1).reshape(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias


def rope_tables(length: int, dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of position x frequency, each (length, dim / 2) float32 (RoFormer, arXiv:2104.09864, eq. 15)."""
    frequency = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = torch.outer(torch.arange(length, dtype=torch.float64), frequency)
    return angle.cos().float(), angle.sin().float()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (..., T, n, dim) by cos, sin (T, dim / 2); the first half of dim pairs with the second half."""
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)  # (T, 1, dim / 2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def per_group(c: Tensor, weight: Tensor) -> Tensor:
    """c (B, T, G, L) through weight (G * d, L), whose g-th d rows read group g: (B, T, G * d)."""
    B, T, G, L = c.shape
    if G == 1:
        return F.linear(c.squeeze(2), weight)
    out = torch.einsum("btgl,gdl->btgd", c, weight.view(G, -1, L))
    return out.reshape(B, T, -1)


def per_head(x: Tensor, weight: Tensor) -> Tensor:
    """x (B, nh, T, a) through weight (nh, a, b): (B, nh, T, b), each head by its own matrix."""
    B, nh, T, a = x.shape
    x = x.transpose(0, 1).reshape(nh, B * T, a)
    return torch.bmm(x, weight).view(nh, B, T, -1).transpose(0, 1)


def factorise(W: Tensor, rank: int, method: str = "exact") -> tuple[Tensor, Tensor, float]:
    """
    Truncated SVD of every head's value map, the singular values split evenly between the factors.

    W: (nh, hs, in). Returns v_down (nh * rank, in), v_up (nh, hs, rank), so that v_up[h] @ v_down[h] is the best
    approximation of W[h] of that rank, and the share of the squared singular values kept.
    method 'exact' is torch.linalg.svd, 'randomized' Halko's range finder (arXiv:0909.4061), seeded.
    """
    nh, hs, width = W.shape
    W64 = W.detach().double()
    if method == "randomized" and rank < min(hs, width):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            U, sv, V = torch.svd_lowrank(W64.cpu(), q=min(rank + 8, hs, width), niter=4)
        U, sv, Vh = U.to(W.device), sv.to(W.device), V.mT.to(W.device)
    else:
        U, sv, Vh = torch.linalg.svd(W64, full_matrices=rank > width)
    root = sv[:, :rank].sqrt()  # (nh, min(rank, width))
    v_up = U[:, :, :rank].clone()
    v_down = W64.new_zeros(nh, rank, width)
    v_down[:, : root.size(1)] = Vh[:, : root.size(1)] * root[:, :, None]
    v_up[:, :, : root.size(1)] *= root[:, None, :]  # beyond the width, directions wait in v_up with nothing in v_down
    total = W64.square().sum()
    kept = float(sv[:, :rank].square().sum() / total) if total > 0 else 1.0
    return v_down.reshape(nh * rank, width).to(W), v_up.to(W), kept


class _Attention(nn.Module):
    """What every attention block has: its shape, its output projection, and how values come out of their subspace."""

    def __init__(self, config: GPTConfig, layer: int, value_in: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.nh, self.hs = config.n_head, config.hs
        self.scale = 1 / math.sqrt(self.hs)
        if not config.use_mla:  # before c_proj, as in nanoGPT: optimizer states know parameters by their position only
            self.c_attn = Linear(config.n_embd, (2 if config.use_svd else 3) * config.n_embd, bias=config.bias)
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        if config.use_svd:
            self.v_down = Linear(value_in, self.nh * config.svd_rank, bias=False)
            self.v_up = nn.Parameter(torch.empty(self.nh, self.hs, config.svd_rank))

    def init_factors(self) -> None:
        """Start the value factors from the SVD of what a dense initialisation would have drawn."""
        dense = torch.randn(self.nh, self.hs, self.v_down.in_features, device=self.v_up.device) * 0.02
        v_down, v_up, _ = factorise(dense, self.config.svd_rank, self.config.svd_method)
        self.v_down.weight.data.copy_(v_down)
        self.v_up.data.copy_(v_up)

    def composed_values(self) -> Tensor:
        """B_h A_h of every head as one dense value map, (nh * hs, in): in training one product per layer costs less
        time than a second one per token (measured at 128 and 384 wide: 0.95 of it)."""
        nh, _, rank = self.v_up.shape
        return torch.bmm(self.v_up, self.v_down.weight.view(nh, rank, -1)).flatten(0, 1)

    def _rope(self, dim: int) -> None:
        """Rotary tables for every position; not part of the state dict, since the config says all of it."""
        cos, sin = rope_tables(self.config.block_size, dim, self.config.rope_theta)
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)

    def _rotate(self, x: Tensor, pos: int) -> Tensor:
        T = x.size(1)
        return apply_rope(x, self.rope_cos[pos : pos + T], self.rope_sin[pos : pos + T])

    def _causal(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As many queries as keys: q, k (B, nh, T, hs), v (B, nh, T, hs) -> (B, nh, T, hs)."""
        dropout = self.config.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, scale=self.scale)

    def _output(self, y: Tensor) -> Tensor:
        """Heads side by side, y (B, nh, T, hs) -> (B, T, C), and back into the residual stream."""
        B, nh, T, hs = y.shape
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, nh * hs)))

    # Analysis: counted from real tensors, against MHA of the same n_embd and n_head.

    def kv_parameters(self) -> list[Tensor]:
        """The parameters that make keys and values."""
        raise TypeError(f"{type(self).__name__} does not say what makes its keys and values")

    def kv_count(self) -> int:
        """How many numbers those parameters hold."""
        return sum(p.numel() for p in self.kv_parameters())

    def mha_kv_count(self) -> int:
        """The same of dense MHA."""
        return 2 * self.config.n_embd * (self.config.n_embd + self.config.bias)

    def get_compression_ratio(self) -> float:
        """Key and value parameters of MHA over this module's."""
        return self.mha_kv_count() / self.kv_count()

    def get_memory_savings(self, sequence_length: int) -> float:
        """MHA cache bytes at that length over this module's."""
        dense = GPTConfig(n_layer=1, n_head=self.config.n_head, n_embd=self.config.n_embd)
        mine, size = _layer_config(self.config), (1, sequence_length, torch.float32, "meta")
        return KVCache(dense, *size).nbytes / _cache_class(mine)(mine, *size).nbytes

    def get_cache_size_ratio(self) -> float:
        """This module's cache bytes over MHA's."""
        return 1 / self.get_memory_savings(1)


class CausalSelfAttention(_Attention):
    """GPT-2's attention (MHA), with rotary positions where the config says so; with SVD, values live in rank rv."""

    def __init__(self, config: GPTConfig, layer: int = 0) -> None:
        super().__init__(config, layer, config.n_embd)
        if config.pos_emb == "rope":
            self._rope(self.hs)

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        """x (B, T, C) -> (B, T, C). With a cache, x continues it; GPT.forward advances its position."""
        B, T, C = x.shape
        pos = 0 if cache is None else cache.pos
        parts = self.c_attn(x).split(C, dim=2)
        q, k = (p.view(B, T, self.nh, self.hs) for p in parts[:2])
        if self.config.pos_emb == "rope":
            q, k = self._rotate(q, pos), self._rotate(k, pos)
        if not self.config.use_svd:
            v = parts[2]
        elif cache is None:
            v = F.linear(x, self.composed_values())
        else:
            v = self.v_down(x)  # what the cache keeps
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.view(B, T, self.nh, -1).transpose(1, 2)  # (B, nh, T, .)
        if cache is not None:
            k_all, v_all = cache.update(self.layer, k, v)
        if pos > 0:
            y = _attend(q.to(k_all.dtype), k_all, v_all, T, self.scale).to(x.dtype)
            if self.config.use_svd:
                y = per_head(y, self.v_up.to(y.dtype).mT)
        else:  # nothing came before: the new tokens are all there is
            coordinates = self.config.use_svd and cache is not None
            y = self._causal(q, k, per_head(v, self.v_up.mT) if coordinates else v)
        return self._output(y)

    def kv_parameters(self) -> list[Tensor]:
        start = self.config.n_embd  # the first C rows of c_attn make queries
        parts = [self.c_attn.weight[start:]] + ([] if self.c_attn.bias is None else [self.c_attn.bias[start:]])
        return parts + ([self.v_down.weight, self.v_up] if self.config.use_svd else [])


class MultiHeadLatentAttention(_Attention):
    """
    MLA: keys and values are functions of a cached latent and one shared rotary key (the equations are on top of this
    file). With groups, head h reads latent h // m (grouped latent attention, arXiv:2505.21487).
    """

    def __init__(self, config: GPTConfig, layer: int = 0) -> None:
        self.G, self.L, self.r = config.mla_groups, config.mla_latent_dim, config.mla_rope_dim
        super().__init__(config, layer, self.L)
        C, nh, hs = config.n_embd, self.nh, self.hs
        if config.mla_q_latent_dim is None:
            self.q_proj = Linear(C, C, bias=config.bias)
        else:
            self.q_latent_proj = Linear(C, config.mla_q_latent_dim, bias=False)  # [q_a_proj]
            self.q_latent_norm = _latent_norm(config.mla_norm, config.mla_q_latent_dim)
            self.q_expand = Linear(config.mla_q_latent_dim, C, bias=False)  # [q_b_proj]
        self.kv_latent_proj = Linear(C, self.G * self.L + self.r, bias=config.bias)  # [kv_a_proj_with_mqa]
        self.latent_norm = _latent_norm(config.mla_norm, self.L)
        self.k_expand = Linear(self.L, nh * (hs - self.r), bias=False)  # W_UK [first rows of kv_b_proj]
        if not config.use_svd:
            self.v_expand = Linear(self.L, nh * hs, bias=False)  # W_UV [last rows of kv_b_proj]
        if self.r:
            self._rope(self.r)

    def forward(self, x: Tensor, cache: LatentCache | None = None, absorb: bool | None = None) -> Tensor:
        """
        x (B, T, C) -> (B, T, C). With a cache, x continues it; GPT.forward advances its position.
        absorb: attend in latent space (True), over expanded keys and values (False), or whichever costs less (None).
        """
        T = x.size(1)
        pos = 0 if cache is None else cache.pos
        q, c, kr = self._project(x, pos)
        if absorb is None:
            absorb = cache is not None and self.absorbing_is_cheaper(T, pos + T)
        dtype = x.dtype if cache is None else cache.dtype
        rows = (c.transpose(1, 2), None if kr is None else kr.transpose(1, 2))  # (B, G, T, L), (B, 1, T, r)
        if cache is not None:
            rows = cache.update(self.layer, *rows)
        elif self.G == 1 and kr is not None:
            rows = (torch.cat(rows, dim=-1), None)
        if absorb:
            return self._output(self._absorbed(q, *rows, dtype))
        if pos > 0:  # the rows of earlier tokens have to be expanded again
            c, kr = self._split_rows(*rows, c.dtype)
        k, v = self._expand(c, kr)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, nh, T or S, hs)
        y = self._causal(q, k, v) if pos == 0 else _attend(q, k, v, T, self.scale)
        return self._output(y)

    def absorbing_is_cheaper(self, T: int, S: int) -> bool:
        """
        Multiplications per head with T queries on S keys, D = 2 hs - r being the rows W_UK and W_UV have per head:
        expanded S L D + 2 T S hs, absorbed T L D + T S (2 L + r). So absorbing wins up to
        T = S L D / (L D + S (2 L + r - 2 hs)), about L D / (2 L + r - 2 hs) queries on a long cache.
        Measured on two cores at L = 192, hs = 32, r = 16, S = 4,096, where that is 27: absorbing takes 0.15 of
        expanding's time at T = 1, 0.3 at 8, 0.7 at 24 and 1.3 at 32.
        """
        LD = self.L * (2 * self.hs - self.r)
        return T * (LD + S * (2 * self.L + self.r)) < S * (LD + 2 * T * self.hs)

    def _project(self, x: Tensor, pos: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Queries (B, T, nh, hs), latents (B, T, G, L) after their norm, rotary keys (B, T, 1, r) after rotation."""
        B, T, _ = x.shape
        q = self.q_proj(x) if self.config.mla_q_latent_dim is None else self.q_expand(
            self.q_latent_norm(self.q_latent_proj(x))
        )
        q = q.view(B, T, self.nh, self.hs)
        c, kr = self.kv_latent_proj(x), None
        if self.r:
            c, kr = c.split([self.G * self.L, self.r], dim=-1)
            kr = self._rotate(kr.unsqueeze(2), pos)
            q = torch.cat([q[..., : -self.r], self._rotate(q[..., -self.r :], pos)], dim=-1)
        return q, self.latent_norm(c.reshape(B, T, self.G, self.L)), kr

    def _split_rows(self, rows: Tensor, kr: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Cached rows back as latents (B, S, G, L) and rotary keys (B, S, 1, r)."""
        if self.G == 1 and self.r:
            rows, kr = rows.split([self.L, self.r], dim=-1)
        return rows.transpose(1, 2).to(dtype), None if kr is None else kr.transpose(1, 2).to(dtype)

    def _expand(self, c: Tensor, kr: Tensor | None) -> tuple[Tensor, Tensor]:
        """Latents (B, S, G, L) and rotary keys (B, S, 1, r) -> keys and values of every head, (B, S, nh, hs)."""
        B, S = c.shape[:2]
        k = per_group(c, self.k_expand.weight).view(B, S, self.nh, self.hs - self.r)
        if kr is not None:
            k = torch.cat([k, kr.expand(-1, -1, self.nh, -1)], dim=-1)
        values = self.composed_values() if self.config.use_svd else self.v_expand.weight
        return k, per_group(c, values).view(B, S, self.nh, self.hs)

    def _absorbed(self, q: Tensor, rows: Tensor, kr: Tensor | None, dtype: torch.dtype) -> Tensor:
        """q (B, T, nh, hs) against rows as LatentCache.update gives them -> (B, nh, T, hs)."""
        B, T, nh, _ = q.shape
        G, L, r, m = self.G, self.L, self.r, nh // self.G

        def by_group(y: Tensor) -> Tensor:  # (B, nh, T, .) -> (B, G, T * m, .), row t * m + i
            return y.unflatten(1, (G, m)).transpose(2, 3).reshape(B, G, T * m, -1)

        q = q.transpose(1, 2)  # (B, nh, T, hs)
        q_latent = per_head(q[..., : self.hs - r], self.k_expand.weight.view(nh, self.hs - r, L))  # W_UK_h^T q_h
        q_rope = q[..., self.hs - r :]
        if G == 1:
            q_row = by_group(torch.cat([q_latent, q_rope], dim=-1) if r else q_latent).to(dtype)
            o = _attend(q_row, rows, rows, T, self.scale)[..., :L]  # (B, 1, T * m, L)
        else:
            extra = None
            if r:  # one rotary key for all groups
                extra = by_group(q_rope).to(dtype).flatten(1, 2) @ kr.squeeze(1).mT  # (B, G * T * m, S)
                extra = extra.unflatten(1, (G, T * m))
            o = _attend_matmul(by_group(q_latent).to(dtype), rows, rows, T, self.scale, extra)
        o = o.to(q.dtype).unflatten(2, (T, m)).transpose(2, 3).reshape(B, nh, T, L)
        if not self.config.use_svd:
            return per_head(o, self.v_expand.weight.view(nh, self.hs, L).mT)
        return per_head(per_head(o, self.v_down.weight.view(nh, -1, L).mT), self.v_up.mT)

    def kv_parameters(self) -> list[Tensor]:
        modules = [self.kv_latent_proj, self.latent_norm, self.k_expand]
        modules += [self.v_down] if self.config.use_svd else [self.v_expand]
        return [p for module in modules for p in module.parameters()] + ([self.v_up] if self.config.use_svd else [])


class RMSNorm(nn.RMSNorm):
    """arXiv:1910.07467, in the activations' dtype, so that autocast keeps the fused kernel."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def _latent_norm(kind: str, width: int) -> nn.Module:
    if kind == "none":
        return nn.Identity()
    return RMSNorm(width, eps=1e-6) if kind == "rmsnorm" else nn.LayerNorm(width, bias=False)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)
        self.approximate = "tanh" if config.gelu == "tanh" else "none"  # torch's words

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate=self.approximate)))


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = (MultiHeadLatentAttention if config.use_mla else CausalSelfAttention)(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cache: KVCache | LatentCache | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


# ----------------------------------------------------------------------------------------------------------------------


class _NoDraws(TorchFunctionMode):
    """Within it, torch.nn draws no random weights; norms and everything else are set as always."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_):
            return None
        return func(*args, **(kwargs or {}))


class GPT(nn.Module):
    """
    GPT-2's architecture around any of the attention blocks. With MHA the state dict is nanoGPT's, name by name.

    init=False leaves the weights as the memory was, for a caller who fills them all: drawing GPT-2's 124 million takes
    seconds.
    """

    def __init__(self, config: GPTConfig, init: bool = True) -> None:
        super().__init__()
        self.config = config
        self.grad_checkpoint = False  # recompute each block in the backward pass instead of keeping its activations
        with contextlib.nullcontext() if init else _NoDraws():
            parts = {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "drop": nn.Dropout(config.dropout),
                "h": nn.ModuleList([Block(config, layer) for layer in range(config.n_layer)]),
                "ln_f": nn.LayerNorm(config.n_embd, bias=config.bias),
            }
            if config.pos_emb == "rope":
                del parts["wpe"]
            self.transformer = nn.ModuleDict(parts)
            self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight  # https://paperswithcode.com/method/weight-tying
        if init:
            self._init_weights()
        if config.use_mla and config.mla_share_latent:
            for block in self.transformer.h:
                block.attn.kv_latent_proj = self.transformer.h[0].attn.kv_latent_proj

    @classmethod
    def from_pretrained(cls, name_or_folder: str, override_args: dict[str, Any] | None = None) -> "GPT":
        """
        The model behind gpt2, gpt2-medium, gpt2-large, gpt2-xl, a Hugging Face GPT-2 folder or one of export.py.

        override_args: dropout, use_svd, svd_rank and svd_method may differ from what is stored.
        Raises UserError saying what cannot be read and what would help.
        """
        from checkpoint import build_model, read_pretrained  # files are its business; it imports this module

        return build_model(read_pretrained(name_or_folder), name_or_folder, **(override_args or {}))[0]

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):  # GPT-2: keep the residual stream's variance over depth
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.config.n_layer))
        if self.config.use_svd:
            for block in self.transformer.h:
                block.attn.init_factors()

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, cache: KVCache | LatentCache | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """
        idx (B, T) int64. Returns (logits, loss): with targets (B, T), logits (B, T, V) and the mean cross-entropy over
        targets other than -1; without, logits of the last position, (B, 1, V), and None.
        With a cache, idx continues what it holds, and its pos advances by T.
        Raises ValueError for a context over block_size and for a cache that is full or was made for another model.
        """
        B, T = idx.shape
        pos = 0 if cache is None else cache.pos
        if cache is not None:
            self._check_cache(cache, B, T)
        if pos + T > self.config.block_size:
            raise ValueError(f"{pos + T} tokens do not fit block_size={self.config.block_size}; crop the context")
        x = self.transformer.wte(idx)  # (B, T, C)
        if self.config.pos_emb == "learned":
            x = x + self.transformer.wpe.weight[pos : pos + T]
        x = self.transformer.drop(x)
        for block in self.transformer.h:
            if self.grad_checkpoint and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x, cache)
        if cache is not None:
            cache.pos += T  # once, after all layers have written at the old position
        if targets is None:
            return self.lm_head(self.transformer.ln_f(x[:, -1:])), None
        logits = self.lm_head(self.transformer.ln_f(x))
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    # Caches

    def make_cache(self, batch_size: int, max_len: int, dtype: torch.dtype | None = None) -> KVCache | LatentCache:
        """
        An empty cache of max_len tokens for batch_size rows on this model's device. dtype: float32, bfloat16 or
        float16; None: that of the activations. Raises ValueError if max_len is over block_size.
        """
        if not 1 <= max_len <= self.config.block_size:
            raise ValueError(f"max_len={max_len} does not work: it must be from 1 to block_size={self.config.block_size}")
        weight = self.lm_head.weight
        if dtype is None:
            autocast = torch.is_autocast_enabled(weight.device.type)
            dtype = torch.get_autocast_dtype(weight.device.type) if autocast else weight.dtype
        return _cache_class(self.config)(self.config, batch_size, max_len, dtype, weight.device)

    def _check_cache(self, cache: KVCache | LatentCache, B: int, T: int) -> None:
        """Everything that can be wrong with a cache, found before anything is written to it."""
        fits = _cache_class(self.config)
        if not isinstance(cache, fits):
            wrong = f"this model needs a {fits.__name__}, not a {type(cache).__name__}; use model.make_cache"
            raise ValueError(wrong)  # noqa: TRY004  a cache of another kind is as wrong as one of another shape
        wanted = fits(self.config, cache.batch_size, cache.max_len, cache.dtype, "meta").tensors
        if [t.shape for t in cache.tensors] != [t.shape for t in wanted]:
            raise ValueError(
                f"the cache was made for another model: it holds {[tuple(t.shape) for t in cache.tensors]}, "
                f"this one needs {[tuple(t.shape) for t in wanted]}; use model.make_cache"
            )
        if cache.tensors[0].device != self.lm_head.weight.device:
            raise ValueError(f"the cache is on {cache.tensors[0].device}, the model on {self.lm_head.weight.device}")
        if cache.batch_size != B:
            raise ValueError(f"the cache has {cache.batch_size} rows, the input {B}; make a cache of batch size {B}")
        if not 0 <= cache.pos <= cache.max_len - T:
            raise ValueError(
                f"the cache is full: {cache.pos} tokens held, {T} to add, max_len={cache.max_len}; "
                "set cache.pos back, or make a longer one"
            )

    # Generation

    def generate(
        self,
        idx: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        stop: int | Iterable[int] | None = None,
        use_cache: bool = True,
        generator: torch.Generator | None = None,
        stream: bool = False,
        cache_dtype: torch.dtype | None = None,
        cache: KVCache | LatentCache | None = None,
    ) -> Tensor | Iterator[Tensor]:
        """
        Continue idx (B, T), T >= 1, by n <= max_new_tokens tokens: (B, T + n), or with stream=True an iterator over the
        new tokens, each (B, 1).

        temperature 0 is argmax; top_k None or 0 and top_p None or 1 are off. stop: token ids; a row that drew one
        repeats it, and generation ends when every row has. use_cache=False recomputes a sliding window every step,
        as nanoGPT does. With the cache, a full context keeps its last block_size // 2 tokens and prefills those again.
        cache: go on with one that holds the first cache.pos tokens of idx; afterwards it holds the last cache.pos of
        all tokens but the very last. cache_dtype: of the cache made otherwise.
        """
        if idx.dim() != 2 or idx.size(1) < 1:
            raise ValueError(f"idx of shape {tuple(idx.shape)} does not work: it must be (B, T) with at least one token")
        if temperature < 0:
            raise ValueError(f"temperature={temperature} does not work: it must be 0 (greedy) or more")
        if top_k is not None and top_k < 0:
            raise ValueError(f"top_k={top_k} does not work: it must be at least 1, or None or 0 for off")
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"top_p={top_p} does not work: it must be above 0 and at most 1, or None for off")
        stops = () if stop is None else (stop,) if isinstance(stop, int) else tuple(stop)
        sampling = (temperature, top_k, top_p, generator)
        if cache is not None and not 0 <= cache.pos <= idx.size(1) <= cache.max_len:
            raise ValueError(
                f"the cache holds {cache.pos} of at most {cache.max_len} tokens, idx has {idx.size(1)}: it must begin "
                "with those and fit"
            )
        if cache is None and use_cache and max_new_tokens > 0:
            length = min(self.config.block_size, idx.size(1) + max_new_tokens)
            cache = self.make_cache(idx.size(0), length, cache_dtype)
        tokens = self._generate(idx, max_new_tokens, sampling, stops, cache)
        return tokens if stream else torch.cat([idx, *tokens], dim=1)

    @torch.inference_mode()
    def _generate(
        self, idx: Tensor, n: int, sampling: tuple, stops: tuple[int, ...], cache: KVCache | LatentCache | None
    ) -> Iterator[Tensor]:
        block_size = self.config.block_size
        window = idx[:, -block_size:]  # what the model sees next
        done = torch.zeros(idx.size(0), 1, dtype=torch.bool, device=idx.device)
        if cache is not None:
            cache.pos = min(cache.pos, window.size(1) - 1)  # the last token is computed again if it was held already
        new = last = window if cache is None else window[:, cache.pos :]  # of the window, what the cache lacks
        for _ in range(n):
            if cache is None:
                logits = self(window)[0]
            else:
                if cache.pos + new.size(1) > cache.max_len:
                    window = new = window[:, -max(block_size // 2, 1) :]
                    cache.reset()
                logits = self._prefill(new, cache) if cache.pos == 0 else self(new, cache=cache)[0]
            new = _sample(logits[:, -1].float(), *sampling)  # (B, 1)
            if stops:
                new = torch.where(done, last, new) if bool(done.any()) else new
                last, done = new, done | torch.isin(new, torch.tensor(stops, device=new.device))
            yield new
            window = torch.cat([window, new], dim=1)[:, -block_size:]
            if stops and bool(done.all()):
                return

    def _prefill(self, prompt: Tensor, cache: KVCache | LatentCache) -> Tensor:
        """Fill an empty cache; a prompt that all rows share is computed once."""
        B, T = prompt.shape
        if B == 1 or not bool((prompt == prompt[:1]).all()):
            return self(prompt, cache=cache)[0]
        logits = self(prompt[:1], cache=cache.row(0))[0]
        cache.repeat_first_row(T)
        return logits.expand(B, -1, -1)

    # Size and cost

    def get_num_params(self, non_embedding: bool = True) -> int:
        """Parameters, shared ones once; non_embedding leaves out the position table, as nanoGPT counts."""
        n = sum(p.numel() for p in self.parameters())
        if non_embedding and self.config.pos_emb == "learned":
            n -= self.transformer.wpe.weight.numel()
        return n

    def flops_per_token(self, context: int, absorbed: bool = False) -> int:
        """
        Floating-point operations of the forward pass for one token that attends over `context` keys: two per weight of
        every matrix and two per key, head and number in scores and average. absorbed: MLA attends in latent space,
        as in decoding; else over expanded keys and values, as in training.
        """
        weights = self.lm_head.weight.numel()
        for block in self.transformer.h:
            weights += sum(p.numel() for p in block.parameters() if p.dim() > 1)
        cfg = self.config
        per_key = 2 * cfg.hs
        if absorbed and cfg.use_mla:
            per_key = 2 * cfg.mla_latent_dim + cfg.mla_rope_dim
        elif absorbed and cfg.use_svd:
            per_key = cfg.hs + cfg.svd_rank
        return 2 * weights + 2 * cfg.n_layer * cfg.n_head * per_key * context

    def get_compression_ratio(self) -> float:
        """Key and value parameters of MHA over this model's, over all layers; shared ones count once."""
        attns = [block.attn for block in self.transformer.h]
        shared = attns[0].kv_latent_proj if self.config.use_mla and self.config.mla_share_latent else None
        again = (len(attns) - 1) * sum(p.numel() for p in shared.parameters()) if shared is not None else 0
        return sum(a.mha_kv_count() for a in attns) / (sum(a.kv_count() for a in attns) - again)

    def get_memory_savings(self, sequence_length: int) -> float:
        """MHA cache bytes at that length over this model's, over all layers."""
        return self.transformer.h[0].attn.get_memory_savings(sequence_length)  # all layers are alike

    def get_cache_size_ratio(self) -> float:
        """This model's cache bytes over MHA's."""
        return self.transformer.h[0].attn.get_cache_size_ratio()

    # Surgery

    def crop_block_size(self, block_size: int) -> None:
        """Shorten the context, e.g. of GPT-2 weights. Raises ValueError if block_size is longer than the model's."""
        if not 1 <= block_size <= self.config.block_size:
            raise ValueError(f"block_size={block_size} does not work: this model has {self.config.block_size} positions")
        self.config.block_size = block_size
        if self.config.pos_emb == "learned":
            self.transformer.wpe.weight = nn.Parameter(self.transformer.wpe.weight[:block_size].detach().clone())


def _cache_class(config: GPTConfig) -> type[KVCache] | type[LatentCache]:
    return LatentCache if config.use_mla else KVCache


def _layer_config(config: GPTConfig) -> GPTConfig:
    """The same config with one layer."""
    return GPTConfig(**{**config.__dict__, "n_layer": 1})


def _sample(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None
) -> Tensor:
    """One token per row from logits (B, V): (B, 1) int64."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits / temperature
    if top_k:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        probs = ordered.softmax(dim=-1)
        before = probs.cumsum(dim=-1) - probs  # the mass of likelier tokens; the likeliest is always kept
        logits = logits.scatter(-1, order, ordered.masked_fill(before >= top_p, float("-inf")))
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)


def factorise_values(state: dict[str, Tensor], config: GPTConfig) -> tuple[dict[str, Tensor], float]:
    """
    The state dict of a model trained without SVD, or with a higher svd_rank, as one for `config` (use_svd=True).

    Every head's value map becomes its truncated SVD. A value bias passes through attention unchanged, as the weights
    of the average sum to one, so it moves into c_proj's bias. Returns the new dict and the share of squared singular
    values kept. Raises ValueError if the checkpoint holds a lower rank than asked for.
    """
    state, C, shares = dict(state), config.n_embd, []
    for i in range(config.n_layer):
        at = f"transformer.h.{i}.attn."
        if at + "v_up" in state:
            v_up = state.pop(at + "v_up")
            v_down = state.pop(at + "v_down.weight").view(config.n_head, v_up.size(2), -1)
            if config.svd_rank > v_up.size(2):
                raise ValueError(f"svd_rank={config.svd_rank} does not work: the checkpoint holds rank {v_up.size(2)}")
            dense = v_up.float() @ v_down.float()
        elif config.use_mla:
            dense = state.pop(at + "v_expand.weight")
        else:
            dense = state[at + "c_attn.weight"][2 * C :]
            state[at + "c_attn.weight"] = state[at + "c_attn.weight"][: 2 * C].clone()
            if at + "c_attn.bias" in state:
                bias = state[at + "c_attn.bias"]
                state[at + "c_attn.bias"] = bias[: 2 * C].clone()
                state[at + "c_proj.bias"] = state[at + "c_proj.bias"] + state[at + "c_proj.weight"] @ bias[2 * C :]
        dense = dense.reshape(config.n_head, config.hs, -1)
        v_down, state[at + "v_up"], share = factorise(dense, config.svd_rank, config.svd_method)
        state[at + "v_down.weight"] = v_down
        shares.append(share)
    return state, sum(shares) / len(shares)
