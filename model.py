"""
The whole model: a GPT whose attention block is causal self-attention (MHA), multi-head latent
attention (MLA), a latent that rotates, or latent tokens, chosen by GPTConfig. All but the last can
keep their values in a low-rank subspace (SVD).

Letters: B batch, T new tokens, S cached and new tokens, C = n_embd, nh heads, nkv key/value heads,
hs head size, L latent numbers per group, G groups, m heads per group or latent tokens per head,
r rotary numbers, rv value rank, V vocabulary.

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
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nanomla.checks import Count, Positive, Several, Share, check
from nanomla.kernels import Quantized, attend, by_group, by_head, dequantise, linear, quantise
from nanomla.kernels.slots import slot_attention

# cos and sin, each (T, dim / 2), or (B, T, dim / 2) if rows differ; None: nothing is rotated
Rotation = tuple[Tensor, Tensor] | None


@dataclass
class GPTConfig:
    """The model's shape. Raises ValueError naming the field, its value and what would work."""

    headings: ClassVar[dict[str, str]] = {"block_size": "model", "n_kv_head": "attention"}

    block_size: Annotated[Count, "The longest context of the model, in tokens."] = 1024
    vocab_size: Annotated[Count, "The number of token ids that the model knows."] = 50304
    n_layer: Annotated[Count, "The number of transformer blocks."] = 12
    n_head: Annotated[Count, "The number of attention heads in every block."] = 12
    n_embd: Annotated[Count, "The width of the residual stream."] = 768
    dropout: Annotated[Share, "The share of values that dropout sets to 0 in training."] = 0.0
    bias: Annotated[bool, "Linear layers and layer norms have biases, as in GPT-2."] = True
    norm: Annotated[
        Literal["layernorm", "rmsnorm"], "The norm before attention, before the MLP and at the end."
    ] = "layernorm"
    norm_eps: Annotated[Positive, "The number that these norms add to the variance."] = 1e-5
    mlp: Annotated[
        Literal["gelu", "swiglu"], "The MLP: gelu has two matrices, swiglu has three and a gate."
    ] = "gelu"
    mlp_hidden: Annotated[
        Count | None,
        "The inner width of the MLP. None stands for 4 x n_embd with gelu and about 8/3 x n_embd "
        "with swiglu.",
    ] = None
    gelu: Annotated[
        Literal["exact", "tanh"], "The formula of GELU: exact, or GPT-2's approximation by tanh."
    ] = "exact"
    tie_weights: Annotated[bool, "The output layer shares the token embedding's weights."] = True
    pos_emb: Annotated[
        Literal["learned", "rope"],
        "How the model sees positions: by a learned table, as in GPT-2, or by rotary embedding.",
    ] = "learned"
    rope_theta: Annotated[Positive, "The base of the rotary frequencies."] = 10000.0
    rope_freqs: Annotated[
        Several[Positive] | None,
        "The radians per token of every rotary pair. None computes them from rope_theta.",
    ] = None

    n_kv_head: Annotated[
        Count | None, "The number of key/value heads of ordinary attention. None stands for n_head."
    ] = None
    head_dim: Annotated[
        Count | None, "The size of an attention head. None stands for n_embd / n_head."
    ] = None
    use_mla: Annotated[bool, "Keys and values are computed from a latent, which is cached."] = False
    mla_latent_dim: Annotated[
        Count | Several[Count] | None,
        "The width of the latent, or of each layer's. None stands for half a head size per head.",
    ] = None
    mla_groups: Annotated[
        Count, "The number of latents per token, each for n_head / mla_groups heads."
    ] = 1
    mla_rope_dim: Annotated[
        int | None,
        "The width of the rotary key beside the latent. None stands for half a head size with "
        "pos_emb='rope' and for 0 without.",
    ] = None
    mla_nope_dim: Annotated[
        Count | None,
        "The width of the part of a query that has no position. None stands for the rest of the "
        "head size.",
    ] = None
    mla_rope: Annotated[
        Literal["decoupled", "latent"],
        "What rotates with the position: a key beside the latent, or the latent itself.",
    ] = "decoupled"
    mla_q_latent_dim: Annotated[
        Count | None, "The rank of low-rank queries. None keeps queries of full rank."
    ] = None
    mla_norm: Annotated[
        Literal["rmsnorm", "layernorm", "none"], "The norm that is applied to the latent."
    ] = "rmsnorm"
    mla_share_latent: Annotated[bool, "All layers use the down-projection of layer 0."] = False
    use_latent_tokens: Annotated[
        bool, "Every head attends to n_latent_tokens slots that summarise the past."
    ] = False
    n_latent_tokens: Annotated[
        Count | None, "The number of latent tokens of every head, which use_latent_tokens needs."
    ] = None
    use_svd: Annotated[bool, "Every head's values stay in a subspace of rank svd_rank."] = False
    svd_rank: Annotated[Count | None, "The rank of that subspace. None is full rank."] = None
    svd_method: Annotated[
        Literal["exact", "randomized"], "The method that factorises the value maps."
    ] = "exact"

    def __post_init__(self) -> None:
        check(self)  # types and ranges, as declared above
        C, nh, rope = self.n_embd, self.n_head, self.pos_emb == "rope"
        fits = self.head_dim is not None or C % nh == 0
        _require(fits, "n_head", nh, f"a divisor of n_embd={C}: {_divisors(C)}; or set head_dim")
        works = f"a divisor of n_head={nh}: {_divisors(nh)}"
        _require(nh % self.nkv == 0, "n_kv_head", self.nkv, works)
        if self.use_latent_tokens:
            m = self.n_latent_tokens
            _require(m is not None, "n_latent_tokens", m, "a number, such as 16")
            for name, needs in (("use_mla", False), ("use_svd", False), ("pos_emb", "learned")):
                has = getattr(self, name)
                _require(has == needs, name, has, f"{needs!r} with use_latent_tokens")
        elif self.use_mla:
            (self._resolve_mla if self.mla_rope == "decoupled" else self._resolve_rotary_latent)()
        elif rope:
            name, works = "head_dim" if self.head_dim else "n_head", "one for an even head size"
            _require(self.hs % 2 == 0, name, getattr(self, name), f"{works}, not {self.hs}")
        pairs, wants = len(self.rope_freqs or ()), self.rotary_dim // 2
        works = f"None or {wants} numbers, one per rotary pair"
        _require(pairs in (0, wants) or not rope, "rope_freqs", self.rope_freqs, works)
        if self.use_svd:
            rv = self.svd_rank = self.hs if self.svd_rank is None else self.svd_rank
            _require(rv <= self.hs, "svd_rank", rv, f"from 1 to the head size {self.hs}")

    def _resolve_mla(self) -> None:
        """Replace None by what it stands for, and check MLA's sizes against each other."""
        hs, rope = self.hs, self.pos_emb == "rope"
        r = self.mla_rope_dim
        if r is None:
            r = self.mla_rope_dim = hs // 2 // 2 * 2 if rope else 0
            works = f"2 with mla_nope_dim={hs}, or 0 for no positions: half of {hs} is no pair"
            _require(r > 0 or not rope, "mla_rope_dim", None, works)
        _require(r >= 0 and r % 2 == 0, "mla_rope_dim", r, "None or an even number")
        fits = r < hs or self.mla_nope_dim is not None
        _require(fits, "mla_rope_dim", r, f"an even number below the head size {hs}")
        _require(r == 0 or rope, "mla_rope_dim", r, "0 with pos_emb='learned', or pos_emb='rope'")
        self._check_latent(r, self.nope + r + hs)

    def _resolve_rotary_latent(self) -> None:
        """The same for a latent that is key and value at once and turns with its position."""
        nope = self.mla_nope_dim
        _require(self.pos_emb == "rope", "mla_rope", "latent", "'decoupled' without pos_emb='rope'")
        _require(nope is None, "mla_nope_dim", nope, "None with mla_rope='latent'")
        L = self._check_latent(0, 2 * self.hs)
        if self.mla_rope_dim is None:
            _require(L % 2 == 0, "mla_latent_dim", L, "an even number; or set mla_rope_dim")
        r = self.mla_rope_dim = L if self.mla_rope_dim is None else self.mla_rope_dim
        works = f"an even number up to the latent's {L}"
        _require(0 < r <= L and r % 2 == 0, "mla_rope_dim", r, works)

    def _check_latent(self, beside: int, per_head: int) -> int:
        """A latent and what is beside it must be less than MHA's cache. Returns the narrowest."""
        nh, G, full = self.n_head, self.mla_groups, self.n_head * per_head
        _require(nh % G == 0, "mla_groups", G, f"a divisor of n_head={nh}: {_divisors(nh)}")
        if self.mla_latent_dim is None:
            works = f"a number, as head size {self.hs} has no half"
            _require(self.hs > 1, "mla_latent_dim", None, works)
            self.mla_latent_dim = nh // G * (self.hs // 2)
        dims, n = self.mla_latent_dim, 1 if self.mla_share_latent else self.n_layer
        if isinstance(dims, tuple):
            fits = len(dims) == self.n_layer and len(set(dims)) <= n
            works = f"one number{f', or one for each of {n} layers' * (n > 1)}"
            _require(fits, "mla_latent_dim", [*dims], works)
            self.mla_latent_dim = dims if len(set(dims)) > 1 else dims[0]
        least, L = (min(dims), max(dims)) if isinstance(dims, tuple) else (dims, dims)
        works = f"at most {(full - 1 - beside) // G}: {G} x {L} + {beside} cached numbers a token"
        fewer = f"{works} would not be fewer than MHA's {full}"
        _require(G * L + beside < full, "mla_latent_dim", L, fewer)
        return least

    @property
    def hs(self) -> int:
        """Head size."""
        return self.n_embd // self.n_head if self.head_dim is None else self.head_dim

    @property
    def nkv(self) -> int:
        """Key/value heads of MHA."""
        return self.n_head if self.n_kv_head is None else self.n_kv_head

    @property
    def hidden(self) -> int:
        """The MLP's inner width; with swiglu three matrices have about as many weights as two."""
        gelu, swiglu = 4 * self.n_embd, max(round(self.n_embd / 24), 1) * 64
        return self.mlp_hidden or (gelu if self.mlp == "gelu" else swiglu)

    @property
    def nope(self) -> int:
        """Width of MLA's queries without position."""
        return self.hs - self.mla_rope_dim if self.mla_nope_dim is None else self.mla_nope_dim

    @property
    def attention(self) -> str:
        """Which attention this is: a key of ATTENTION."""
        if self.use_mla:
            return "mla" if self.mla_rope == "decoupled" else "rotary_latent"
        return "latent_tokens" if self.use_latent_tokens else "mha"

    @property
    def rotary_dim(self) -> int:
        """How many numbers of a query are rotated by its position."""
        return 0 if self.pos_emb == "learned" else self.mla_rope_dim if self.use_mla else self.hs

    @property
    def frequencies(self) -> Tensor:
        """Radians per token of every rotary pair, (rotary_dim / 2,) float64 on the CPU."""
        plain, dim = {"dtype": torch.float64, "device": "cpu"}, self.rotary_dim
        if self.rope_freqs and dim:
            return torch.tensor(self.rope_freqs, **plain)
        return self.rope_theta ** (-torch.arange(0, dim, 2, **plain) / dim)

    @property
    def spans(self) -> list[tuple["GPTConfig", int]]:
        """(config, number of layers) of runs of one shape: all, or each layer if latents differ."""
        n = 1 if isinstance(self.mla_latent_dim, tuple) else self.n_layer
        return [(self.of_layer(i), n) for i in range(0, self.n_layer, n)]

    def of_layer(self, layer: int) -> "GPTConfig":
        """This config with one latent width, that of this layer."""
        L = self.mla_latent_dim
        return dataclasses.replace(self, mla_latent_dim=L[layer]) if isinstance(L, tuple) else self


def _require(holds: bool, field: str, value: object, works: str) -> None:
    if not holds:
        raise ValueError(f"{field}={value!r} does not work: {field} must be {works}")


def _divisors(n: int, most: int = 24) -> str:
    """The smallest divisors of n, as many as fit a line."""
    found = [str(d) for d in range(1, min(n, 10_000) + 1) if n % d == 0]
    return ", ".join(found[:most]) + ", ..." * (len(found) > most)


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


def block_norm(config: GPTConfig) -> nn.Module:
    if config.norm == "rmsnorm":
        return RMSNorm(config.n_embd, eps=config.norm_eps)
    return nn.LayerNorm(config.n_embd, eps=config.norm_eps, bias=config.bias)


def rope_tables(start: int, end: int, config: GPTConfig, dtype: torch.dtype) -> Rotation:
    """cos and sin for positions start to end - 1, on the CPU (arXiv:2104.09864, eq. 15)."""
    position = torch.arange(start, end, dtype=torch.float64, device="cpu")
    angle = torch.outer(position, config.frequencies)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def apply_rope(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate x (B, T, n, dim), or not; the first half of dim pairs with the second half."""
    if rotation is None:
        return x
    cos, sin = (t.unsqueeze(-2).to(x.dtype) for t in rotation)  # (..., T, 1, dim / 2)
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
    What attention keeps of the tokens it has seen, in all layers. It is allocated once and belongs
    to the caller. It holds pos tokens, which only its methods change; layout decides what is kept.
    """

    DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8)
    grows = True  # with every token; else it is a state of n_latent_tokens rows
    lengths: Tensor | None = None  # (B,) tokens held of every row, where they differ; pos: the most
    layout: Callable[[GPTConfig], list[tuple[int, int]]]  # (heads, width) of a layer's tensors

    def __init__(
        self, config: GPTConfig, batch_size: int, max_len: int, dtype=torch.float32, device="cpu"
    ) -> None:
        from nanomla import costs
        for name, size in (("batch_size", batch_size), ("max_len", max_len)):
            _require(size >= 1, name, size, "at least 1")
        works = "one of " + ", ".join(str(known).removeprefix("torch.") for known in self.DTYPES)
        _require(dtype in self.DTYPES, "dtype", dtype, works)
        self.batch_size, self.max_len, self.dtype, self._pos = batch_size, max_len, dtype, 0
        self.config = config
        kinds = itertools.cycle([dtype] if dtype != torch.int8 else [dtype, torch.float16])
        shapes = [*zip(self.shapes(config), kinds, strict=False)]
        nbytes = sum(math.prod(shape) * kind.itemsize for shape, kind in shapes)
        remedy = "make it for fewer rows or tokens, or of a narrower dtype"
        costs.require_memory(nbytes, "the cache", device, remedy)
        self.tensors = [torch.zeros(*shape, dtype=kind, device=device) for shape, kind in shapes]
        self.parts = len(self.tensors) // len(config.spans)  # tensors that hold a layer

    def shapes(self, config: GPTConfig) -> list[tuple[int, ...]]:
        """(layers, B, heads, rows, width) of every tensor; with int8 its scales follow each."""
        rows = self.max_len if self.grows else config.n_latent_tokens
        scale = [1] if self.dtype == torch.int8 else []
        parts = [(n, h, w) for of, n in config.spans for h, w in self.layout(of)]
        widths = [(n, h, width) for n, h, w in parts for width in [w, *scale]]
        return [(n, self.batch_size, h, rows, w) for n, h, w in widths]

    @classmethod
    def numbers_at(cls, config: GPTConfig, n: int) -> int:
        """Numbers that n tokens take in all layers."""
        rows = n if cls.grows else config.n_latent_tokens
        return rows * sum(n * h * w for of, n in config.spans for h, w in cls.layout(of))

    def of_layer(self, layer: int) -> list[Tensor]:
        """What is held in one layer, each (B, heads, rows, width)."""
        span, i = divmod(layer, self.tensors[0].size(0))
        return [t[i] for t in self.tensors[span * self.parts : (span + 1) * self.parts]]

    @property
    def pos(self) -> int:
        """How many tokens are held."""
        return self._pos

    def positions(self, T: int) -> slice | Tensor:
        """Those of T new tokens: the same for all rows, or (B, T)."""
        if self.lengths is None:
            return slice(self.pos, self.pos + T)
        return self.lengths[:, None] + torch.arange(T, device=self.lengths.device)

    def nbytes_at(self, n: int) -> int:
        """Bytes that n tokens take in all layers and rows."""
        return sum(t.nbytes // t.size(3) * (n if self.grows else t.size(3)) for t in self.tensors)

    @property
    def nbytes(self) -> int:
        """Bytes of all layers and rows, as allocated."""
        return self.nbytes_at(self.max_len)

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one more token of one row takes in all layers."""
        return (self.nbytes_at(1) - self.nbytes_at(0)) // self.batch_size

    def advance(self, T: int) -> None:
        """Count T more tokens as held, after every layer has written them."""
        _require(0 <= T <= self.max_len - self.pos, "T", T, f"from 0 to {self.max_len - self.pos}")
        self._pos += T
        self.lengths = None if self.lengths is None else self.lengths + T

    def truncate(self, pos: int) -> None:
        """Forget all but the first pos tokens; a state can only forget all."""
        can = range(self.pos + 1) if self.grows else (0, self.pos)
        works = f"from 0 to the {self.pos} tokens held" if self.grows else f"0 or {self.pos}"
        _require(pos in can, "pos", pos, works)
        self._pos = int(pos)

    def rewind(self, pos: int) -> None:
        """Forget all but the first pos tokens, or all of them where that is impossible."""
        self.truncate(min(pos, self.pos) if self.grows or pos >= self.pos else 0)

    def row(self, i: int) -> "Cache":
        """A cache for row i that shares this one's memory; it has its own pos."""
        _require(i in range(self.batch_size), "i", i, f"from 0 to {self.batch_size - 1}")
        view = copy.copy(self)
        view.batch_size, view.tensors = 1, [t[:, i : i + 1] for t in self.tensors]
        return view

    def rows(self, lengths: list[int] | Tensor) -> "Cache":
        """The first rows, in the same memory, row i with lengths[i] tokens: for passes only."""
        view, n = copy.copy(self), len(lengths)
        _require(0 < n <= self.batch_size, "lengths", lengths, f"1 to {self.batch_size} numbers")
        view.batch_size, view.tensors = n, [t[:, :n] for t in self.tensors]
        told = not isinstance(lengths, Tensor)  # what is in a tensor only kernels read
        view._pos, same = max(lengths) if told else self.max_len - 1, told and len({*lengths}) == 1
        view.lengths = None if same else torch.as_tensor(lengths, device=self.tensors[0].device)
        return view

    def copy_from(self, row: "Cache") -> None:
        """Hold in every row what a cache of one row holds."""
        self._pos, end = row.pos, row.pos if self.grows else None
        for t, new in zip(self.tensors, row.tensors, strict=True):
            t[:, :, :, :end] = new[:, :, :, :end].clone()

    def broadcast_row(self, i: int) -> None:
        """Copy the tokens held in row i to all rows."""
        self.copy_from(self.row(i))

    def check(self, config: GPTConfig, B: int, T: int, device: torch.device) -> None:
        """Raise ValueError if this model cannot write T tokens of B rows, before it writes any."""
        kind, needs = type(self), ATTENTION[config.attention].Cache
        if kind is not needs:
            raise ValueError(f"this model needs a {needs.__name__}, not a {kind.__name__}")
        has = [tuple(t.shape) for t in self.tensors]
        if config is not self.config and has != (wants := self.shapes(config)):
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
        """Write the parts of T new tokens in one layer; returns what there is to attend to then."""
        if torch.is_grad_enabled():
            raise RuntimeError("a cache is for inference; use torch.no_grad or inference_mode")
        return self._write(layer, *parts)

    def _write(self, layer: int, *parts: Tensor) -> tuple[Tensor, ...]:
        """Returns all S tokens, packed, uncopied."""
        end, parts = self.pos + parts[0].size(2), self.pack(*parts)
        if self.dtype == torch.int8:
            parts = [t for part in parts for t in quantise(part)]
        tensors, at = self.of_layer(layer), self.positions(parts[0].size(2))
        for t, new in zip(tensors, parts, strict=True):
            if self.lengths is None:
                t[:, :, at] = new
            else:
                row = torch.arange(len(at), device=at.device)[:, None]
                t[row, :, at] = new.transpose(1, 2).to(t.dtype)
        rows = tuple(t[:, :, :end] for t in tensors)
        return rows if self.dtype != torch.int8 else tuple(map(Quantized, rows[::2], rows[1::2]))


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

    Cache: type[Cache]  # what keeps the past tokens of this attention
    # Multiplications per head: of a query with a key, in score and average; and of a new token.
    numbers_per_key: dict[str, int]  # "training", "decoding"
    numbers_per_token = 0

    def __init__(self, config: GPTConfig, layer: int, query_width: int) -> None:
        super().__init__()
        self.config, self.layer = config.of_layer(layer), layer
        self.nh, self.hs, self.scale = config.n_head, config.hs, 1 / math.sqrt(query_width)

    def _add_output(self, value_in: int, value_heads: int) -> None:
        """Register c_proj and low-rank values, in the order that optimizer states rely on."""
        config = self.config
        self.c_proj = Linear(self.nh * self.hs, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        if config.use_svd:
            self.v_down = Linear(value_in, value_heads * config.svd_rank, bias=False)
            self.v_up = nn.Parameter(torch.zeros(value_heads, self.hs, config.svd_rank))

    @property
    def values(self) -> LowRankValues | None:
        """The value maps under use_svd."""
        return LowRankValues(self.v_down.weight, self.v_up) if self.config.use_svd else None

    def _rotation(self, x: Tensor, pos: int, given: Rotation) -> Rotation:
        """The tables for x (B, T, C) from position pos on: GPT's, or made here when used alone."""
        if given is not None or not self.config.rotary_dim:
            return given
        dtype = torch.promote_types(x.dtype, torch.float32)
        tables = rope_tables(pos, pos + x.size(1), self.config, dtype)
        return tuple(t.to(x.device) for t in tables)

    def _output(self, y: Tensor) -> Tensor:
        """Heads side by side, y (B, nh, T, hs) -> (B, T, C), and back into the residual stream."""
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).flatten(2)))


# ---- MHA
class KVCache(Cache):
    """MHA's cache: keys of width hs, values of width rv (hs without SVD), for nkv heads."""

    @staticmethod
    def layout(config: GPTConfig) -> list[tuple[int, int]]:
        rv = config.svd_rank if config.use_svd else config.hs
        return [(config.nkv, config.hs), (config.nkv, rv)]


class CausalSelfAttention(Attention):
    """
    GPT-2's attention (MHA), with rotary positions where the config says so. With fewer key/value
    heads, nh / nkv query heads share each: grouped queries (arXiv:2305.13245), multi-query with 1.
    """

    Cache = KVCache

    def __init__(self, config: GPTConfig, layer: int = 0) -> None:
        super().__init__(config, layer, config.hs)
        self.nkv = config.nkv
        keys = self.nkv * self.hs  # as many numbers as values, which are apart if they are low-rank
        self.parts = [self.nh * self.hs, keys] + [keys] * (not config.use_svd)
        self.c_attn = Linear(config.n_embd, sum(self.parts), bias=config.bias)
        self._add_output(config.n_embd, self.nkv)
        rv = config.svd_rank if config.use_svd else self.hs
        self.numbers_per_key = {"training": 2 * self.hs, "decoding": self.hs + rv}

    def forward(self, x: Tensor, cache: KVCache | None = None, rotation: Rotation = None) -> Tensor:
        """x (B, T, C) -> (B, T, C). With a cache, x continues it, and the caller advances it."""
        (B, T, _), pos = x.shape, 0 if cache is None else cache.pos
        values, rotation = self.values, self._rotation(x, pos, rotation)
        q, k, *v = self.c_attn(x).split(self.parts, dim=2)
        q, k = (apply_rope(t.view(B, T, -1, self.hs), rotation) for t in (q, k))
        if values is not None:  # with a cache, the coordinates in the subspace that it keeps
            v = [F.linear(x, values.dense()) if cache is None else self.v_down(x)]
        v = v[0].view(B, T, self.nkv, -1)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, nh, T, hs), (B, nkv, T, .)
        if cache is not None:
            past = cache.update(self.layer, k, v)
        if pos > 0:
            q = by_group(q, self.nkv)  # each key is read once for its m heads
            y = attend(q, *past, T, self.scale, held=cache.lengths).to(x.dtype)
            return self._output(by_head(y if values is None else values.expand(y), T))
        if cache is not None and values is not None:
            v = values.expand(v)  # the new tokens are all there is, and need no rounding
        if self.nkv < self.nh:
            k, v = (t.repeat_interleave(self.nh // self.nkv, dim=1) for t in (k, v))
        dropout = self.config.dropout * self.training
        return self._output(attend(q, k, v, T, self.scale, dropout=dropout))


# ---- MLA
class LatentCache(Cache):
    """
    MLA's cache: G * L latent numbers after their norm and, unless they rotate themselves, r rotary
    numbers after their rotation. With one group they lie side by side, [c ; kr]: a row is read once
    as key and value. With several, each group's latents are contiguous, the rotary key kept once.
    """

    @staticmethod
    def layout(config: GPTConfig) -> list[tuple[int, int]]:
        G, L, r = config.mla_groups, config.mla_latent_dim, config.mla_rope_dim
        r = r if config.mla_rope == "decoupled" else 0
        return [(1, L + r)] if G == 1 else [(G, L)] + [(1, r)] * (r > 0)

    @staticmethod
    def pack(c: Tensor, *kr: Tensor) -> tuple[Tensor, ...]:
        """c (B, G, T, L) and, with r > 0, kr (B, 1, T, r) as rows and what is kept beside them."""
        return (torch.cat([c, *kr], dim=-1),) if kr and c.size(1) == 1 else (c, *kr)


class LatentAttention(Attention):
    """What attention through a latent has in common: its projections, and values out of latents."""

    def _add_projections(self, query_width: int, beside: int, nope: int) -> None:
        """Register queries of every head, latents with what is cached beside them, expansions."""
        config, C, bias = self.config, self.config.n_embd, self.config.bias
        self.G, self.L, self.r = config.mla_groups, config.mla_latent_dim, config.mla_rope_dim
        self._add_output(self.L, self.nh)
        if (width := config.mla_q_latent_dim) is None:
            self.q_proj = Linear(C, self.nh * query_width, bias=bias)
        else:
            self.q_latent_proj = Linear(C, width, bias=False)  # [q_a_proj]
            self.q_latent_norm = latent_norm(config.mla_norm, width)
            self.q_expand = Linear(width, self.nh * query_width, bias=False)  # [q_b_proj]
        self.kv_latent_proj = Linear(C, self.G * self.L + beside, bias=bias)  # [kv_a_proj_with_mqa]
        self.latent_norm = latent_norm(config.mla_norm, self.L)
        if nope:
            self.k_expand = Linear(self.L, self.nh * nope, bias=False)  # W_UK [kv_b_proj]
        if not config.use_svd:
            self.v_expand = Linear(self.L, self.nh * self.hs, bias=False)  # W_UV [kv_b_proj]

    def _queries(self, x: Tensor) -> Tensor:
        """x (B, T, C) -> (B, T, nh, .)."""
        full = self.config.mla_q_latent_dim is None
        q = self.q_proj(x) if full else self.q_expand(self.q_latent_norm(self.q_latent_proj(x)))
        return q.view(*x.shape[:2], self.nh, -1)

    def _read_values(self, o: Tensor) -> Tensor:
        """From every head's average of latents, (B, nh, T, L), to its values, (B, nh, T, hs)."""
        values = self.values
        if values is None:
            return per_head(o, self.v_expand.weight.view(self.nh, self.hs, self.L).mT)
        return values.expand(per_head(o, values.down.view(self.nh, -1, self.L).mT))


class MultiHeadLatentAttention(LatentAttention):
    """
    MLA: keys and values are functions of a cached latent and one shared rotary key; the equations
    are on top of this file. With groups, head h reads latent h // m (arXiv:2505.21487).
    """

    Cache = LatentCache

    def __init__(self, config: GPTConfig, layer: int = 0) -> None:
        self.nope = config.nope  # [qk_nope_head_dim]
        super().__init__(config, layer, self.nope + config.mla_rope_dim)
        self._add_projections(self.nope + config.mla_rope_dim, config.mla_rope_dim, self.nope)
        self.numbers_per_key = {"training": 2 * self.hs, "decoding": 2 * self.L + self.r}

    def forward(
        self, x: Tensor, cache: LatentCache | None = None, rotation: Rotation = None,
        absorb: bool | None = None,
    ) -> Tensor:  # fmt: skip
        """
        x (B, T, C) -> (B, T, C). With a cache, x continues it, and the caller advances it.
        absorb: attend over latents (True) or expanded keys (False); None: the cheaper with a cache.
        """
        T, pos = x.size(1), 0 if cache is None else cache.pos
        q, *latent = self._project(x, self._rotation(x, pos, rotation))
        if absorb is None:
            absorb = cache is not None and self.absorbing_is_cheaper(T, pos + T)
        if cache is not None:
            packed = cache.update(self.layer, *latent)
        elif absorb:
            packed = LatentCache.pack(*latent)
        held = None if cache is None else cache.lengths
        if absorb:
            return self._output(self._absorbed(q, held, *packed))
        if pos > 0:  # the keys and values of earlier tokens have to be built again
            latent = [dequantise(t, q.dtype) for t in packed]
            if self.G == 1 and self.r > 0:  # laid side by side by pack
                latent = latent[0].split([self.L, self.r], dim=-1)
        k, v = self._expand(*latent)
        dropout = self.config.dropout * (self.training and pos == 0)
        return self._output(attend(q, k, v, T, self.scale, dropout=dropout, held=held))

    def absorbing_is_cheaper(self, T: int, S: int) -> bool:
        """
        Multiplications per head, with D = nope + hs rows of W_UK and W_UV: per pair of a query and
        a key it sees, 2 max(nope + r, hs) expanded, as values are padded to the keys' width, and
        2 (L + r) absorbed; besides S L D and T L D. docs/results.md has the times of both.
        """
        D, pairs = self.nope + self.hs, T * (2 * S - T + 1) // 2
        expanded = S * self.L * D + 2 * pairs * max(self.nope + self.r, self.hs)
        return T * self.L * D + 2 * pairs * (self.L + self.r) < expanded

    def _project(self, x: Tensor, rotation: Rotation) -> tuple[Tensor, ...]:
        """q (B, nh, T, nope + r), c (B, G, T, L) after its norm; with r > 0, kr (B, 1, T, r)."""
        (B, T, _), q = x.shape, self._queries(x)
        c, kr = self.kv_latent_proj(x).split([self.G * self.L, self.r], dim=-1)
        c = self.latent_norm(c.reshape(B, T, self.G, self.L)).transpose(1, 2)
        if self.r == 0:
            return q.transpose(1, 2), c
        content, q_rope = q.split([self.nope, self.r], dim=-1)
        q = torch.cat([content, apply_rope(q_rope, rotation)], dim=-1)
        return q.transpose(1, 2), c, apply_rope(kr.unsqueeze(2), rotation).transpose(1, 2)

    def _expand(self, c: Tensor, kr: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """c (B, G, S, L), kr (B, 1, S, r) -> keys (B, nh, S, nope + r), values (B, nh, S, hs)."""
        c, values = c.transpose(1, 2), self.values  # (B, S, G, L)
        B, S = c.shape[:2]
        k = per_group(c, self.k_expand.weight).view(B, S, self.nh, self.nope)
        if kr is not None:
            k = torch.cat([k, kr.transpose(1, 2).expand(-1, -1, self.nh, -1)], dim=-1)
        v = per_group(c, self.v_expand.weight if values is None else values.dense())
        return k.transpose(1, 2), v.view(B, S, self.nh, self.hs).transpose(1, 2)

    def _absorbed(self, q: Tensor, held: Tensor | None, rows: Tensor, *kr: Tensor) -> Tensor:
        """q (B, nh, T, nope + r) against S packed tokens -> (B, nh, T, hs)."""
        T, G = q.size(2), self.G
        q, q_rope = q.split([self.nope, self.r], dim=-1)
        q = per_head(q, self.k_expand.weight.view(self.nh, -1, self.L))  # W_UK_h^T q_h
        if self.r:
            q = torch.cat([q, q_rope], dim=-1)
        o = attend(by_group(q, G), rows, None, T, self.scale, *kr, held=held)[..., : self.L]
        return self._read_values(by_head(o.to(q.dtype), T))  # from (B, G, T * m, L)


class RotaryLatentAttention(LatentAttention):
    """
    The latent is key and value at once and carries the position itself (DeepSeek-V4's shared
    key-value): row_j = R_j norm(W_down x_j), R_j rotating the last r numbers by position j, and

        s_hij = (R_i q_hi) . row_j / sqrt(L)    o_hi = W_UV_h R_i^-1 sum_j p_hij row_j

    so that both scores and values depend on the distance i - j. There is no expanded form.
    """

    Cache = LatentCache

    def __init__(self, config: GPTConfig, layer: int = 0) -> None:
        L = config.of_layer(layer).mla_latent_dim
        super().__init__(config, layer, L)
        self._add_projections(L, 0, 0)
        self.numbers_per_key = dict.fromkeys(("training", "decoding"), 2 * L)

    def forward(self, x: Tensor, cache: Cache | None = None, rotation: Rotation = None) -> Tensor:
        """x (B, T, C) -> (B, T, C). With a cache, x continues it, and the caller advances it."""
        (B, T, _), pos = x.shape, 0 if cache is None else cache.pos
        cos, sin = self._rotation(x, pos, rotation)
        rows = self.latent_norm(self.kv_latent_proj(x).view(B, T, self.G, self.L))
        rows = self._turn(rows, (cos, sin)).transpose(1, 2)  # (B, G, T, L)
        q = self._turn(self._queries(x), (cos, sin)).transpose(1, 2)  # (B, nh, T, L)
        if cache is not None:
            (past,) = cache.update(self.layer, rows)
        rows = past if pos > 0 else rows  # new tokens that are all there is need no rounding
        dropout = self.config.dropout * (self.training and pos == 0)
        held = None if cache is None else cache.lengths
        o = attend(by_group(q, self.G), rows, None, T, self.scale, dropout=dropout, held=held)
        o = by_head(o.to(x.dtype), T)
        o = self._turn(o.transpose(1, 2), (cos, -sin)).transpose(1, 2)
        return self._output(self._read_values(o))

    def _turn(self, x: Tensor, rotation: Rotation) -> Tensor:
        """Rotate the last r of L numbers of x (B, T, n, L)."""
        still, turned = x.split([self.L - self.r, self.r], dim=-1)
        return torch.cat([still, apply_rope(turned, rotation)], dim=-1)


# ---- Latent tokens
class LatentTokenCache(Cache):
    """
    A state of m slots of 2 hs numbers per head, [K~ ; V~], however long the context. A pass leaves
    its new state in pending until advance, so that a pass that is repeated counts no token twice.
    A row shares the state: once it has moved on, broadcast it or truncate this cache.
    """

    DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # rounded at each token
    grows = False
    pending: dict[int, Tensor] | None = None  # by layer

    @staticmethod
    def layout(config: GPTConfig) -> list[tuple[int, int]]:
        return [(config.n_head, 2 * config.hs)]

    def advance(self, T: int) -> None:
        """Count T more tokens as held: the pending state is the state now."""
        super().advance(T)
        for layer, state in (self.pending or {}).items():
            self.tensors[0][layer] = state
        self.pending = None

    def truncate(self, pos: int) -> None:
        """Forget all tokens, with pos 0, or none, with the current pos."""
        super().truncate(pos)
        self.pending = None
        if pos == 0:
            self.tensors[0].zero_()

    def _write(self, layer: int, state: Tensor) -> tuple[Tensor]:
        """Take state (B, nh, m, 2 hs) as that of the next advance."""
        self.pending = {**(self.pending or {}), layer: state}
        return (state,)


class LatentTokenAttention(Attention):
    """
    Gated slot attention (arXiv:2409.07146, section 3): m latent tokens per head, the slots K~ and
    V~ (m, hs), summarise the past. With gates a_t = sigmoid(W_a x_t)^(1/8) in (0, 1)^m,

        K~_t = diag(a_t) K~_{t-1} + (1 - a_t) k_t^T, V~ alike
        o_t = V~_t^T softmax(K~_t q_t / sqrt(hs))
    """

    Cache = LatentTokenCache

    def __init__(self, config: GPTConfig, layer: int = 0) -> None:
        super().__init__(config, layer, config.hs)
        self.m = config.n_latent_tokens
        self.c_attn = Linear(config.n_embd, 3 * self.nh * self.hs, bias=config.bias)
        self._add_output(config.n_embd, self.nh)
        self.gate = Linear(config.n_embd, self.nh * self.m)
        self.numbers_per_key = dict.fromkeys(("training", "decoding"), 0)
        self.numbers_per_token = 4 * self.m * self.hs  # into the slots, and out of them

    def forward(self, x: Tensor, cache: Cache | None = None, rotation: Rotation = None) -> Tensor:
        """x (B, T, C) -> (B, T, C). With a cache, x continues it, and the caller advances it."""
        (B, T, _), nh, hs, m = x.shape, self.nh, self.hs, self.m
        qkv = self.c_attn(x).view(B, T, 3, nh, hs).permute(2, 0, 3, 1, 4)  # (3, B, nh, T, hs)
        gate = self.gate(x).view(B, T, nh, m).transpose(1, 2).flatten(0, 1)
        dtype = torch.promote_types(x.dtype, torch.float32)  # as these sums run over all the past
        with torch.autocast(x.device.type, enabled=False):
            q, k, v = qkv.to(dtype).flatten(1, 2)  # (B * nh, T, hs)
            log_a = F.logsigmoid(gate.to(dtype)) / 8
            state = q.new_zeros(B * nh, m, 2 * hs)
            if cache is not None:
                state = cache.tensors[0][self.layer].to(dtype).flatten(0, 1)
            y, state = slot_attention(state, q, torch.cat([k, v], dim=-1), log_a, self.scale)
        if cache is not None:
            cache.update(self.layer, state.view(B, nh, m, 2 * hs))
        return self._output(y.view(B, nh, T, hs).to(qkv.dtype))


# A new attention is a class above, its cache if it needs a new one, and an entry here.
ATTENTION = {
    "mha": CausalSelfAttention,
    "mla": MultiHeadLatentAttention,
    "rotary_latent": RotaryLatentAttention,
    "latent_tokens": LatentTokenAttention,
}


# ---- The transformer
class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        C, hidden = config.n_embd, config.hidden
        self.c_fc = Linear(C, hidden, bias=config.bias)
        if config.mlp == "swiglu":  # arXiv:2002.05202
            self.c_gate = Linear(C, hidden, bias=config.bias)
        self.c_proj = Linear(hidden, C, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)
        self.gated = config.mlp == "swiglu"
        self.approximate = "tanh" if config.gelu == "tanh" else "none"  # torch's names

    def forward(self, x: Tensor) -> Tensor:
        if self.gated:
            return self.dropout(self.c_proj(F.silu(self.c_gate(x)) * self.c_fc(x)))
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate=self.approximate)))


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = block_norm(config)
        self.attn = ATTENTION[config.attention](config, layer)
        self.ln_2 = block_norm(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cache: Cache | None = None, rotation: Rotation = None) -> Tensor:
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
            "ln_f": block_norm(config),
        }
        if config.pos_emb == "rope":  # built first, so that a seed draws the other weights alike
            del parts["wpe"]
        self.transformer = nn.ModuleDict(parts)
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        cos, sin = rope_tables(0, config.block_size, config, torch.float32)
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
        Draw every weight. Matrices and embeddings are normal, standard deviation 0.02, but c_proj's
        0.02 / sqrt(2 n_layer), which keeps the residual stream's variance over depth (GPT-2).
        v_down and v_up factorise a value map drawn with 0.02. Biases 0, norms 1.
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
        if self.config.tie_weights:
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
        x, rotation = self.transformer.wte(idx), None  # (B, T, C)
        at = slice(T) if cache is None else cache.positions(T)
        if cfg.pos_emb == "learned":
            x = x + self.transformer.wpe.weight[at]
        else:
            kept = self.rope_cos, self.rope_sin
            tables = kept if x.dtype != torch.float64 else rope_tables(0, pos + T, cfg, x.dtype)
            rotation = tuple(t.to(x.device)[at] for t in tables)
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
        An empty cache for max_len tokens of batch_size rows. dtype None: that of the activations,
        but at least float32 for a state, which every token rounds again. Raises ValueError for a
        max_len over block_size or a dtype not in Cache.DTYPES, UserError if memory is short.
        """
        limit, weight = self.config.block_size, self.lm_head.weight
        kind = ATTENTION[self.config.attention].Cache
        _require(1 <= max_len <= limit, "max_len", max_len, f"from 1 to block_size={limit}")
        if dtype is None:
            autocast = torch.is_autocast_enabled(weight.device.type)
            dtype = torch.get_autocast_dtype(weight.device.type) if autocast else weight.dtype
            dtype = dtype if kind.grows else torch.promote_types(dtype, torch.float32)
        return kind(self.config, batch_size, max_len, dtype, weight.device)

    def generate(
        self, idx: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None,
        top_p: float | None = None, stop: int | Iterable[int] | None = None, use_cache: bool = True,
        generator: torch.Generator | None = None, cache_dtype: torch.dtype | None = None,
        cache: Cache | None = None,
    ) -> Tensor:  # fmt: skip
        """
        Continue idx (B, T), T >= 1, by n <= max_new_tokens tokens: (B, T + n), without dropout.

        temperature 0 is argmax; top_k None or 0 and top_p None or 1 are off. stop: token ids; a row
        that drew one repeats it, and when all have, generation ends. use_cache=False recomputes a
        sliding window every step. A given cache holds the first cache.pos tokens of idx, and then
        all of the result but its last, or the newest if it cannot hold them; cache_dtype is that of
        the cache made otherwise. Raises ValueError for arguments out of range.
        """
        from nanomla.sampling import Sampler, stream_tokens
        sampler = Sampler(temperature, top_k, top_p, generator)
        how = (use_cache, cache_dtype, cache, stop)
        return torch.cat([idx, *stream_tokens(self, idx, max_new_tokens, sampler, *how)], dim=1)

    def get_num_params(self, non_embedding: bool = True) -> int:
        """Parameters, shared ones once; non_embedding omits the position table, as in nanoGPT."""
        n = sum(p.numel() for p in self.parameters())
        learned = non_embedding and self.config.pos_emb == "learned"
        return n - self.transformer.wpe.weight.numel() if learned else n
