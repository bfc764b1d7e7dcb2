"""
The whole model: a GPT whose attention is causal self-attention (MHA), multi-head latent attention
(MLA), MLA with a rotary latent, or latent tokens, chosen by GPTConfig. All but the last can keep
their values in a low-rank subspace (SVD).

Letters: B sequences, T new tokens, S cached and new tokens, C = n_embd, nh heads, nkv key/value
heads, hs head size, L latent numbers per group, G groups, r rotary numbers, rv value rank.

MLA is from DeepSeek-V2 (arXiv:2405.04434, section 2.1); where its names differ they stand in [].
Only a latent c_j [compressed kv] and one rotary key kr_j [k_pe] are kept of every token j:

    c_j = norm(W_down x_j)      kr_j = rope(W_kr x_j, j)
    k_hj = [W_UK_h c_j ; kr_j]  v_hj = W_UV_h c_j        scores scaled by 1 / sqrt(hs)

The same function is computed in two ways. Expanded: build k and v for every head, then attend.
Absorbed: move W_UK to the query and W_UV behind the average, so that all heads attend over the
cached latents themselves:

    q'_h = [W_UK_h^T q_h ; q_rope_h]    s_hj = q'_h . [c_j ; kr_j]    o_h = W_UV_h sum_j p_hj c_j

nanomla/kernels computes attend, softmax(q k^T) v, and Linear. nanomla/cache.py keeps past tokens; a
cache whose sequences hold different numbers of them has these as lengths (B,). nanomla/generate.py
draws tokens.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nanomla.attention import (
    Attention,
    Rotation,
    cached_numbers_at,
    init_weights,
    mha_key_value_parameters,
)
from nanomla.cache import Cache, LayerCache
from nanomla.checks import Count, Positive, Several, Share, check, require
from nanomla.generate import Sampler, check_shape, stream_tokens
from nanomla.kernels import Linear, Quantized, attend, causal_weights, dequantise
from nanomla.latent_tokens import LatentTokenAttention
from nanomla.memory import require_memory

# The names of attention that a flag of GPTConfig stands for.
NAMES_OF_FLAGS = {"use_mla": ("mla", "rotary_latent"), "use_latent_tokens": ("latent_tokens",)}


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
        "pos_emb='rope' and for 0 without. With mla_rope='latent' it is how many numbers of the "
        "latent are rotated, and None stands for all.",
    ] = None
    mla_nope_dim: Annotated[
        Count | None,
        "The width of the part of a query that has no position. None stands for the rest of the "
        "head size.",
    ] = None
    mla_rope: Annotated[
        Literal["decoupled", "latent"],
        "What is rotated by the position: with decoupled a rotary key beside the latent, with "
        "latent the latent itself, which is then called a rotary latent.",
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

    attention: Annotated[
        str | None,
        "The attention of every block, by its name in the table of model.py. None stands for what "
        "use_mla, mla_rope and use_latent_tokens say.",
    ] = None

    def __post_init__(self) -> None:
        check(self)  # types and ranges, as declared above
        allowed = f"None or one of {', '.join(ATTENTION)}"
        require(self.attention in (None, *ATTENTION), "attention", self.attention, allowed)
        self._set_flags()
        if self.head_dim is None:
            allowed = f"a divisor of n_embd={self.n_embd}: {_divisors(self.n_embd)}"
            allowed += "; or set head_dim"
            require(self.n_embd % self.n_head == 0, "n_head", self.n_head, allowed)
        allowed = f"a divisor of n_head={self.n_head}: {_divisors(self.n_head)}"
        require(self.n_head % self.nkv == 0, "n_kv_head", self.nkv, allowed)
        ATTENTION[self.attention_name].check(self)
        if self.pos_emb == "rope" and self.rope_freqs:
            pairs = self.rotary_dim // 2
            allowed = f"None or {pairs} numbers, one per rotary pair"
            require(len(self.rope_freqs) == pairs, "rope_freqs", self.rope_freqs, allowed)
        if self.use_svd:
            if self.svd_rank is None:
                self.svd_rank = self.hs
            allowed = f"from 1 to the head size {self.hs}"
            require(self.svd_rank <= self.hs, "svd_rank", self.svd_rank, allowed)

    def _set_flags(self) -> None:
        """
        Write a name that flags can say as these flags, so that one model has one config, whichever
        way it was asked for. Only the name of an attention without flags stays.
        """
        if self.attention is None:
            return
        for flag, names in NAMES_OF_FLAGS.items():
            if self.attention in names:
                setattr(self, flag, True)
            else:
                allowed = f"False with attention={self.attention!r}"
                require(not getattr(self, flag), flag, True, allowed)
        if self.attention == "mla":
            decoupled = self.mla_rope == "decoupled"
            require(decoupled, "mla_rope", self.mla_rope, "'decoupled' with attention='mla'")
        if self.attention == "rotary_latent":
            self.mla_rope = "latent"
        if self.attention in ("mha", "mla", "rotary_latent", "latent_tokens"):
            self.attention = None

    @property
    def attention_name(self) -> str:
        """The attention's key in ATTENTION, whether a name or flags said it."""
        if self.attention is not None:
            return self.attention
        if self.use_latent_tokens:  # whose check refuses use_mla
            return "latent_tokens"
        if self.use_mla and self.mla_rope == "latent":
            return "rotary_latent"
        if self.use_mla:
            return "mla"
        return "mha"

    @property
    def hs(self) -> int:
        """Head size."""
        if self.head_dim is None:
            return self.n_embd // self.n_head
        return self.head_dim

    @property
    def nkv(self) -> int:
        """Key/value heads of MHA."""
        if self.n_kv_head is None:
            return self.n_head
        return self.n_kv_head

    @property
    def hidden(self) -> int:
        """The MLP's inner width; with swiglu three matrices have about as many weights as two."""
        if self.mlp_hidden is not None:
            return self.mlp_hidden
        if self.mlp == "gelu":
            return 4 * self.n_embd
        return max(round(self.n_embd / 24), 1) * 64

    @property
    def nope(self) -> int:
        """Width of MLA's queries without position."""
        if self.mla_nope_dim is None:
            return self.hs - self.mla_rope_dim
        return self.mla_nope_dim

    @property
    def rotary_dim(self) -> int:
        """How many numbers of a query are rotated by its position."""
        if self.pos_emb == "learned":
            return 0
        return ATTENTION[self.attention_name].rotary_dim(self)

    @property
    def frequencies(self) -> Tensor:
        """Radians per token of every rotary pair, (rotary_dim / 2,) float64 on the CPU."""
        dim = self.rotary_dim
        if self.rope_freqs and dim:
            return torch.tensor(self.rope_freqs, dtype=torch.float64, device="cpu")
        pair = torch.arange(0, dim, 2, dtype=torch.float64, device="cpu")
        return self.rope_theta ** (-pair / dim)

    def latent_dim(self, layer: int) -> int:
        """The width of a layer's latents."""
        if isinstance(self.mla_latent_dim, tuple):
            return self.mla_latent_dim[layer]
        return self.mla_latent_dim


def _divisors(n: int) -> str:
    """The divisors of n up to 10,000."""
    return ", ".join(str(d) for d in range(1, min(n, 10_000) + 1) if n % d == 0)


# ---- Norms, positions, maps that differ by head
class RMSNorm(nn.RMSNorm):
    """arXiv:1910.07467, in the activations' dtype, so that autocast keeps the fused kernel."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def latent_norm(kind: str, width: int) -> nn.Module:
    """The norm on a latent of so many numbers."""
    if kind == "none":
        return nn.Identity()
    if kind == "layernorm":
        return nn.LayerNorm(width, bias=False)
    return RMSNorm(width, eps=1e-6)


def block_norm(config: GPTConfig) -> nn.Module:
    """The norm before attention, MLP and head."""
    if config.norm == "rmsnorm":
        return RMSNorm(config.n_embd, eps=config.norm_eps)
    return nn.LayerNorm(config.n_embd, eps=config.norm_eps, bias=config.bias)


def rope_tables(positions: Tensor, config: GPTConfig, dtype: torch.dtype) -> Rotation:
    """cos and sin (..., dim / 2) of positions (...) (arXiv:2104.09864, eq. 15), on the CPU."""
    angle = positions.double().cpu().unsqueeze(-1) * config.frequencies
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotation_alone(config: GPTConfig, x: Tensor, cache: LayerCache | None) -> Rotation:
    """The rotation of x (B, T, C), which continues a cache, for attention used without a GPT."""
    if config.rotary_dim == 0:
        return None
    positions = torch.arange(x.size(1))
    if cache is not None and cache.lengths is None:
        positions = positions + cache.pos
    elif cache is not None:
        positions = cache.positions(x.size(1))
    dtype = torch.promote_types(x.dtype, torch.float32)
    cos, sin = rope_tables(positions, config, dtype)
    return cos.to(x.device), sin.to(x.device)


def apply_rope(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate x (B, T, n, dim), or not; the first half of dim pairs with the second half."""
    if rotation is None:
        return x
    cos, sin = rotation
    cos = cos.unsqueeze(-2).to(x.dtype)  # (..., T, 1, dim / 2)
    sin = sin.unsqueeze(-2).to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def per_head(x: Tensor, weight: Tensor) -> Tensor:
    """x (B, nh, T, a) through weight (nh, a, b): (B, nh, T, b), each head by its own matrix."""
    B, nh, T, a = x.shape
    x = x.transpose(0, 1).reshape(nh, B * T, a)
    return torch.bmm(x, weight).view(nh, B, T, -1).transpose(0, 1)


def per_group(c: Tensor, weight: Tensor) -> Tensor:
    """c (B, S, G, L) through weight (G * d, L), whose g-th d rows read group g: (B, S, G * d)."""
    B, S, G, L = c.shape
    if G == 1:
        return F.linear(c.squeeze(2), weight)
    return torch.einsum("bsgl,gdl->bsgd", c, weight.view(G, -1, L)).reshape(B, S, -1)


# ---- Values in a low-rank subspace (SVD)
#
# Head h's value map W_h (hs, in) is kept as up_h down_h, of rank rv. Many tokens go through the
# product of the two, which is faster. With a cache MHA keeps down_h x, rv numbers a head, and MLA,
# absorbed, reads its average of latents by down_h; up_h comes last, behind the average.
def dense_values(down: Tensor, up: Tensor) -> Tensor:
    """down (nh * rv, in) and up (nh, hs, rv) multiplied out: (nh * hs, in)."""
    heads, _, rank = up.shape
    return torch.bmm(up, down.view(heads, rank, -1)).flatten(0, 1)


class AttentionWithValues(Attention):
    """What MHA and MLA share: c_proj, and values that use_svd keeps in a low-rank subspace."""

    dense_values_in_training = True  # their factors multiplied out

    def _add_output_and_values(self, value_in: int, value_heads: int) -> None:
        """Register c_proj and low-rank values, in the order that optimizer states rely on."""
        config = self.config
        self.low_rank = config.use_svd
        self.value_heads = value_heads
        self.value_width = self.hs  # of what is averaged when values stay in the subspace
        if self.low_rank:
            self.value_width = config.svd_rank
        self.c_proj = Linear(self.nh * self.hs, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        if self.low_rank:
            self.v_down = Linear(value_in, value_heads * config.svd_rank, bias=False)
            self.v_up = nn.Parameter(torch.zeros(value_heads, self.hs, config.svd_rank))

    def _dropout(self, cache: LayerCache | None) -> float:
        """The share of attention weights that are dropped: in training, which has no cache."""
        if self.training and cache is None:
            return self.config.dropout
        return 0.0

    def _output(self, y: Tensor) -> Tensor:
        """Heads side by side, y (B, nh, T, hs) -> (B, T, C), and back into the residual stream."""
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).flatten(2)))

    @torch.no_grad()
    def init_values(self) -> None:
        """Factorise value maps that are drawn as any other matrix."""
        if self.low_rank:
            size = (self.value_heads, self.hs, self.v_down.in_features)
            dense = torch.randn(size, device=self.v_up.device) * 0.02
            down, up, _ = factorise(dense, self.config.svd_rank, self.config.svd_method)
            self.v_down.weight.copy_(down)
            self.v_up.copy_(up)

    @property
    def words(self) -> str:
        if self.low_rank:
            return f"{self._words()}, values of rank {self.config.svd_rank}"
        return self._words()

    def flops_per_token(self, decoding: bool) -> int:
        """Two per weight of every matrix, the value maps in the form that is used."""
        if not self.low_rank:
            return super().flops_per_token(decoding)
        factors = self.v_down.weight.numel() + self.v_up.numel()
        if self.dense_values_in_training and not decoding:
            used = self.value_heads * self.hs * self.v_down.in_features
        else:
            up_for_every_query = self.v_up.numel() * (self.nh // self.value_heads)
            used = self.v_down.weight.numel() + up_for_every_query
        return super().flops_per_token(decoding) + 2 * (used - factors)


# ---- MHA
class CausalSelfAttention(AttentionWithValues):
    """
    GPT-2's attention (MHA), with rotary positions where the config says so. With fewer key/value
    heads, nh / nkv query heads share each: grouped queries (arXiv:2305.13245), multi-query with 1.
    """

    reads = ("n_kv_head",)

    @staticmethod
    def check(config: GPTConfig) -> None:
        if config.pos_emb == "rope":
            name = "head_dim" if config.head_dim else "n_head"
            allowed = f"one for an even head size, not {config.hs}"
            require(config.hs % 2 == 0, name, getattr(config, name), allowed)

    def __init__(self, config: GPTConfig, layer: int = 0) -> None:
        super().__init__(config, layer)
        self.nkv = config.nkv
        self.scale = 1 / math.sqrt(self.hs)
        keys = self.nkv * self.hs
        self.parts = [self.nh * self.hs, keys]  # of c_attn's output
        if not config.use_svd:  # else values have maps of their own
            self.parts.append(keys)
        self.c_attn = Linear(config.n_embd, sum(self.parts), bias=config.bias)
        self._add_output_and_values(config.n_embd, self.nkv)
        self.init_alone()

    def new_cache(self, batch_size: int, max_len: int, dtype=torch.float32, device="cpu"):
        """Keys, and values or their coordinates in the subspace, of every key/value head."""
        sizes = [(self.nkv, self.hs), (self.nkv, self.value_width)]
        return LayerCache(sizes, batch_size, max_len, dtype, device)

    def forward(
        self, x: Tensor, cache: LayerCache | None = None, rotation: Rotation = None
    ) -> Tensor:
        q, k, v = self._project(x, cache, rotation)
        if cache is None:
            return self._output(self._attend(q, k, v, None, self._dropout(cache)))
        cached_k, cached_v = cache.append(k, v)  # (B, nkv, S, hs), (B, nkv, S, hs or rv)
        if cache.pos == 0:  # not advanced yet: the new tokens are all there is, unrounded
            if self.low_rank:
                v = per_head(v, self.v_up.to(v.dtype).mT)  # from (B, nkv, T, rv) to its hs numbers
            return self._output(self._attend(q, k, v))
        y = self._attend(q, cached_k, cached_v, cache.lengths).to(x.dtype)
        if self.low_rank:
            up = self.v_up.to(y.dtype).repeat_interleave(self.nh // self.nkv, dim=0)
            y = per_head(y, up.mT)  # from (B, nh, T, rv) to (B, nh, T, hs)
        return self._output(y)

    def _attend(
        self,
        q: Tensor,
        k: Tensor | Quantized,
        v: Tensor | Quantized,
        lengths: Tensor | None = None,
        dropout: float = 0.0,
    ) -> Tensor:
        """The last T of S tokens over all: q (B, nh, T, hs), k and v (B, nkv, S, .)."""
        return attend(q, k, v, scale=self.scale, lengths=lengths, dropout=dropout)

    def _project(
        self, x: Tensor, cache: LayerCache | None, rotation: Rotation
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, nh, T, hs), k (B, nkv, T, hs) and values, or with a cache what it keeps of them."""
        B, T, _ = x.shape
        if rotation is None:
            rotation = rotation_alone(self.config, x, cache)
        if not self.low_rank:
            q, k, v = self.c_attn(x).split(self.parts, dim=2)
        else:
            q, k = self.c_attn(x).split(self.parts, dim=2)
            if cache is None:
                v = F.linear(x, dense_values(self.v_down.weight, self.v_up))
            else:
                v = self.v_down(x)
        q = apply_rope(q.view(B, T, self.nh, self.hs), rotation)
        k = apply_rope(k.view(B, T, self.nkv, self.hs), rotation)
        v = v.view(B, T, self.nkv, -1)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def weights(self, x: Tensor, rotation: Rotation = None) -> Tensor:
        q, k, _ = self._project(x, None, rotation)
        k = k.repeat_interleave(self.nh // self.nkv, dim=1)
        return causal_weights(q, k, self.scale)

    def _words(self) -> str:
        if self.nkv == self.nh:
            return f"MHA, {self.nh} heads of {self.hs}"
        if self.nkv == 1:
            return f"MQA, {self.nh} heads of {self.hs} on 1"
        return f"GQA, {self.nh} heads of {self.hs} on {self.nkv}"

    def flops_per_key(self, decoding: bool) -> int:
        """Of scores and averages, values in the subspace when decoding."""
        if decoding:
            return 2 * self.nh * (self.hs + self.value_width)
        return 2 * self.nh * (self.hs + self.hs)


# ---- MLA
def check_latent(config: GPTConfig, beside: int, full: int) -> int:
    """
    A token's latents and what is cached beside them must be fewer numbers than `full`, MHA's.
    Fills in mla_latent_dim; returns the narrowest layer's.
    """
    groups = config.mla_groups
    allowed = f"a divisor of n_head={config.n_head}: {_divisors(config.n_head)}"
    require(config.n_head % groups == 0, "mla_groups", groups, allowed)
    if config.mla_latent_dim is None:
        config.mla_latent_dim = config.n_head // groups * (config.hs // 2)
    widths = config.mla_latent_dim
    if not isinstance(widths, tuple):
        widths = (widths,)
    else:
        allowed = f"one number, or one for each of {config.n_layer} layers"
        require(len(widths) == config.n_layer, "mla_latent_dim", list(widths), allowed)
        equal = len(set(widths)) == 1
        allowed = "one number with mla_share_latent=True"
        require(equal or not config.mla_share_latent, "mla_latent_dim", list(widths), allowed)
        if equal:
            config.mla_latent_dim = widths[0]
    L = max(widths)
    most = (full - 1 - beside) // groups
    allowed = (
        f"at most {most}: {groups} x {L} + {beside} cached numbers a token "
        f"would not be fewer than MHA's {full}"
    )
    require(groups * L + beside < full, "mla_latent_dim", L, allowed)
    return min(widths)


class LatentAttention(AttentionWithValues):
    """What attention through a latent has in common: its projections, and values out of latents."""

    reads = ("mla_",)

    @staticmethod
    def rotary_dim(config: GPTConfig) -> int:
        return config.mla_rope_dim

    def _add_projections(self, layer: int, query_width: int, key_width: int, nope: int) -> None:
        """Register queries of every head, latents with a rotary key of key_width, expansions."""
        config = self.config
        C = config.n_embd
        self.G = config.mla_groups
        self.L = config.latent_dim(layer)
        self.r = config.mla_rope_dim
        self.query_width = query_width
        self.key_width = key_width
        self._add_output_and_values(self.L, self.nh)
        if config.mla_q_latent_dim is None:
            self.q_proj = Linear(C, self.nh * query_width, bias=config.bias)
        else:
            width = config.mla_q_latent_dim
            self.q_latent_proj = Linear(C, width, bias=False)  # [q_a_proj]
            self.q_latent_norm = latent_norm(config.mla_norm, width)
            self.q_expand = Linear(width, self.nh * query_width, bias=False)  # [q_b_proj]
        latents = self.G * self.L + key_width
        self.kv_latent_proj = Linear(C, latents, bias=config.bias)  # [kv_a_proj_with_mqa]
        self.latent_norm = latent_norm(config.mla_norm, self.L)
        if nope:
            self.k_expand = Linear(self.L, self.nh * nope, bias=False)  # W_UK [kv_b_proj]
        if not config.use_svd:
            self.v_expand = Linear(self.L, self.nh * self.hs, bias=False)  # W_UV [kv_b_proj]

    def _queries(self, x: Tensor) -> Tensor:
        """x (B, T, C) -> (B, T, nh, query_width)."""
        B, T, _ = x.shape
        if self.config.mla_q_latent_dim is None:
            q = self.q_proj(x)
        else:
            q = self.q_expand(self.q_latent_norm(self.q_latent_proj(x)))
        return q.view(B, T, self.nh, self.query_width)

    def _read_values(self, o: Tensor) -> Tensor:
        """From every head's average of latents, (B, nh, T, L), to its values, (B, nh, T, hs)."""
        if not self.low_rank:
            W_UV = self.v_expand.weight.view(self.nh, self.hs, self.L)
            return per_head(o, W_UV.mT)
        down = self.v_down.weight.view(self.nh, -1, self.L)
        return per_head(per_head(o, down.mT), self.v_up.to(o.dtype).mT)

    def _latent_words(self) -> str:
        """The sizes of what is cached, for people to read."""
        widths = self.config.mla_latent_dim
        if isinstance(widths, tuple):
            widths = "/".join(map(str, widths))
        words = f"L = {widths}"
        if self.key_width:
            words += f", r = {self.r}"
        if self.G > 1:
            words += f", {self.G} groups"
        return words


class MultiHeadLatentAttention(LatentAttention):
    """
    MLA: keys and values are functions of a cached latent and one shared, decoupled rotary key; the
    equations are on top of this file. With groups, head h reads latent h // (nh / G)
    (arXiv:2505.21487).
    """

    @staticmethod
    def check(config: GPTConfig) -> None:
        hs = config.hs
        rope = config.pos_emb == "rope"
        if config.mla_rope_dim is None:
            config.mla_rope_dim = 0
            if rope:
                config.mla_rope_dim = hs // 2 // 2 * 2
            allowed = f"2 with mla_nope_dim={hs}, or 0 for no positions: half of {hs} is no pair"
            require(config.mla_rope_dim > 0 or not rope, "mla_rope_dim", None, allowed)
        r = config.mla_rope_dim
        require(r >= 0 and r % 2 == 0, "mla_rope_dim", r, "None or an even number")
        if config.mla_nope_dim is None:
            require(r < hs, "mla_rope_dim", r, f"an even number below the head size {hs}")
        allowed = "0 with pos_emb='learned', or pos_emb='rope'"
        require(r == 0 or rope, "mla_rope_dim", r, allowed)
        check_latent(config, beside=r, full=config.n_head * (config.nope + r + hs))

    def __init__(self, config: GPTConfig, layer: int = 0) -> None:
        super().__init__(config, layer)
        self.nope = config.nope  # [qk_nope_head_dim]
        r = config.mla_rope_dim
        self.scale = 1 / math.sqrt(self.nope + r)
        self._add_projections(layer, query_width=self.nope + r, key_width=r, nope=self.nope)
        self.init_alone()

    def new_cache(self, batch_size: int, max_len: int, dtype=torch.float32, device="cpu"):
        """Latents after their norm, and the rotary key, after its rotation, that heads share."""
        if self.G == 1:
            sizes = [(1, self.L + self.r)]
        elif self.r == 0:
            sizes = [(self.G, self.L)]
        else:
            sizes = [(self.G, self.L), (1, self.r)]
        return LayerCache(sizes, batch_size, max_len, dtype, device)

    def forward(
        self,
        x: Tensor,
        cache: LayerCache | None = None,
        rotation: Rotation = None,
        absorb: bool | None = None,
    ) -> Tensor:
        """
        x (B, T, C) -> (B, T, C). With a cache, x continues it, and the caller advances it.
        absorb: attend over latents (True) or expanded keys (False); None: the cheaper with a cache.
        """
        T = x.size(1)
        pos = 0
        lengths = None
        if cache is not None:
            pos = cache.pos
            lengths = cache.lengths
        if rotation is None:
            rotation = rotation_alone(self.config, x, cache)
        q_nope, q_rope = self._split_queries(x, rotation)  # (B, nh, T, nope), (B, nh, T, r)
        c, kr = self._latents(x, rotation)  # (B, G, T, L), (B, 1, T, r)
        if absorb is None:
            absorb = cache is not None and self.absorbing_is_cheaper(T, pos + T)

        packed, beside = self._pack(c, kr)
        if cache is not None:
            packed, beside = cache.append(packed, beside)  # now of all S tokens
        if absorb:
            return self._output(self._absorbed(q_nope, q_rope, packed, beside, lengths))
        if pos > 0:  # else the new tokens are all there is, and need no rounding
            c, kr = self._unpack(packed, beside, q_nope.dtype)
        dropout = self._dropout(cache)
        return self._output(self._expanded(q_nope, q_rope, c, kr, lengths, dropout))

    def _pack(self, c: Tensor, kr: Tensor) -> tuple[Tensor, Tensor | None]:
        """
        What is cached, and attended to when absorbed. With one group [c ; kr] lie side by side, so
        that they are read once as key and value; with several, kr is kept once beside them.
        """
        if self.G == 1:
            return torch.cat([c, kr], dim=-1), None
        if self.r == 0:
            return c, None
        return c, kr

    def _unpack(
        self, packed: Tensor | Quantized, beside: Tensor | Quantized | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """c (B, G, S, L) and kr (B, 1, S, r) again."""
        packed = dequantise(packed, dtype)
        if beside is not None:
            return packed, dequantise(beside, dtype)
        return packed[..., : self.L], packed[..., self.L :]

    def _split_queries(self, x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """Queries without position (B, nh, T, nope), and rotated ones (B, nh, T, r)."""
        q_nope, q_rope = self._queries(x).split([self.nope, self.r], dim=-1)
        if self.r:
            q_rope = apply_rope(q_rope, rotation)
        return q_nope.transpose(1, 2), q_rope.transpose(1, 2)

    def _latents(self, x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """c (B, G, T, L) after its norm, and the rotary key kr (B, 1, T, r)."""
        B, T, _ = x.shape
        c, kr = self.kv_latent_proj(x).split([self.G * self.L, self.r], dim=-1)
        c = self.latent_norm(c.reshape(B, T, self.G, self.L))
        kr = kr.unsqueeze(2)
        if self.r:
            kr = apply_rope(kr, rotation)
        return c.transpose(1, 2), kr.transpose(1, 2)

    def _expanded(
        self,
        q_nope: Tensor,
        q_rope: Tensor,
        c: Tensor,
        kr: Tensor,
        lengths: Tensor | None,
        dropout: float,
    ) -> Tensor:
        """Build keys and values of every head, then attend: (B, nh, T, hs)."""
        k, v = self._keys_and_values(c, kr)  # (B, nh, S, nope + r), (B, nh, S, hs)
        q = q_nope
        if self.r:
            q = torch.cat([q, q_rope], dim=-1)  # (B, nh, T, nope + r)
        return attend(q, k, v, scale=self.scale, lengths=lengths, dropout=dropout)

    def _keys_and_values(self, c: Tensor, kr: Tensor) -> tuple[Tensor, Tensor]:
        """c (B, G, S, L), kr (B, 1, S, r) -> keys (B, nh, S, nope + r), values (B, nh, S, hs)."""
        B, _, S, _ = c.shape
        c = c.transpose(1, 2)  # (B, S, G, L)
        k = per_group(c, self.k_expand.weight).view(B, S, self.nh, self.nope)
        if self.low_rank:
            W_UV = dense_values(self.v_down.weight, self.v_up)
        else:
            W_UV = self.v_expand.weight
        v = per_group(c, W_UV).view(B, S, self.nh, self.hs)
        if self.r:
            kr = kr.transpose(1, 2).expand(-1, -1, self.nh, -1)  # (B, S, nh, r)
            k = torch.cat([k, kr], dim=-1)
        return k.transpose(1, 2), v.transpose(1, 2)

    def _absorbed(
        self,
        q_nope: Tensor,
        q_rope: Tensor,
        packed: Tensor | Quantized,
        beside: Tensor | Quantized | None,
        lengths: Tensor | None,
    ) -> Tensor:
        """Move W_UK to the query and W_UV behind the average of latents: (B, nh, T, hs)."""
        W_UK = self.k_expand.weight.view(self.nh, self.nope, self.L)
        q = per_head(q_nope, W_UK)  # W_UK_h^T q_h, (B, nh, T, L)
        if self.r:
            q = torch.cat([q, q_rope], dim=-1)  # (B, nh, T, L + r)
        o = attend(q, packed, scale=self.scale, beside=beside, lengths=lengths)  # keys are values
        return self._read_values(o[..., : self.L].to(q.dtype))

    def absorbing_is_cheaper(self, T: int, S: int) -> bool:
        """
        Multiplications per head, with D = nope + hs rows of W_UK and W_UV: per pair of a query and
        a key it sees, 2 max(nope + r, hs) expanded, as values are padded to the keys' width, and
        2 (L + r) absorbed; and once S L D to expand, or T L D to absorb.
        """
        D = self.nope + self.hs
        pairs = T * (2 * S - T + 1) // 2
        expanded = S * self.L * D + 2 * pairs * max(self.nope + self.r, self.hs)
        absorbed = T * self.L * D + 2 * pairs * (self.L + self.r)
        return absorbed < expanded

    def weights(self, x: Tensor, rotation: Rotation = None) -> Tensor:
        if rotation is None:
            rotation = rotation_alone(self.config, x, None)
        q_nope, q_rope = self._split_queries(x, rotation)
        c, kr = self._latents(x, rotation)
        k, _ = self._keys_and_values(c, kr)
        return causal_weights(torch.cat([q_nope, q_rope], dim=-1), k, self.scale)

    def _words(self) -> str:
        return f"MLA, {self._latent_words()}"

    def flops_per_key(self, decoding: bool) -> int:
        """Over latents when decoding, else over expanded keys and values."""
        if decoding:
            return 2 * self.nh * (2 * self.L + self.r)
        return 2 * self.nh * (self.nope + self.r + self.hs)


class RotaryLatentAttention(LatentAttention):
    """
    MLA with a rotary latent, which is key and value at once and carries the position itself (the
    shared key-value of DeepSeek-V4, arXiv:2606.19348): c_j = R_j norm(W_down x_j), where R_j
    rotates the last r numbers by position j, and

        s_hij = (R_i q_hi) . c_j / sqrt(L)    o_hi = W_UV_h R_i^-1 sum_j p_hij c_j

    so that both scores and values depend on the distance i - j. There is no expanded form.
    """

    dense_values_in_training = False

    @staticmethod
    def check(config: GPTConfig) -> None:
        allowed = "'rope' with mla_rope='latent', which attention='rotary_latent' stands for"
        require(config.pos_emb == "rope", "pos_emb", config.pos_emb, allowed)
        nope = config.mla_nope_dim
        require(nope is None, "mla_nope_dim", nope, "None with mla_rope='latent'")
        L = check_latent(config, beside=0, full=config.n_head * 2 * config.hs)
        if config.mla_rope_dim is None:
            config.mla_rope_dim = L
        r = config.mla_rope_dim
        allowed = f"an even number up to the latent's {L}"
        require(0 < r <= L and r % 2 == 0, "mla_rope_dim", r, allowed)

    def __init__(self, config: GPTConfig, layer: int = 0) -> None:
        super().__init__(config, layer)
        L = config.latent_dim(layer)
        self.scale = 1 / math.sqrt(L)
        self._add_projections(layer, query_width=L, key_width=0, nope=0)
        self.init_alone()

    def new_cache(self, batch_size: int, max_len: int, dtype=torch.float32, device="cpu"):
        """Rotary latents, those of every group."""
        return LayerCache([(self.G, self.L)], batch_size, max_len, dtype, device)

    def forward(
        self, x: Tensor, cache: LayerCache | None = None, rotation: Rotation = None
    ) -> Tensor:
        if rotation is None:
            rotation = rotation_alone(self.config, x, cache)
        q, c = self._project(x, rotation)  # (B, nh, T, L), (B, G, T, L)
        lengths = None
        if cache is not None:
            cached, _ = cache.append(c)
            lengths = cache.lengths
            if cache.pos > 0:  # else the new tokens are all there is, and need no rounding
                c = cached
        o = attend(q, c, scale=self.scale, lengths=lengths, dropout=self._dropout(cache))
        cos, sin = rotation
        o = self._rotate(o.to(x.dtype).transpose(1, 2), (cos, -sin)).transpose(1, 2)  # R_i^-1
        return self._output(self._read_values(o))

    def _project(self, x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """Rotated queries (B, nh, T, L) and rotary latents (B, G, T, L)."""
        B, T, _ = x.shape
        c = self.latent_norm(self.kv_latent_proj(x).view(B, T, self.G, self.L))
        c = self._rotate(c, rotation)
        q = self._rotate(self._queries(x), rotation)
        return q.transpose(1, 2), c.transpose(1, 2)

    def _rotate(self, x: Tensor, rotation: Rotation) -> Tensor:
        """Rotate the last r of L numbers of x (B, T, n, L)."""
        still, turned = x.split([self.L - self.r, self.r], dim=-1)
        return torch.cat([still, apply_rope(turned, rotation)], dim=-1)

    def weights(self, x: Tensor, rotation: Rotation = None) -> Tensor:
        if rotation is None:
            rotation = rotation_alone(self.config, x, None)
        q, c = self._project(x, rotation)
        c = c.repeat_interleave(self.nh // self.G, dim=1)
        return causal_weights(q, c, self.scale)

    def _words(self) -> str:
        return f"MLA with a rotary latent, {self._latent_words()}"

    def flops_per_key(self, decoding: bool) -> int:
        """Over latents, in training too."""
        return 2 * self.nh * 2 * self.L


# A new attention is a class above, or in a file of its own, and an entry here: docs/extending.md.
ATTENTION: dict[str, type[Attention]] = {
    "mha": CausalSelfAttention,
    "mla": MultiHeadLatentAttention,
    "rotary_latent": RotaryLatentAttention,
    "latent_tokens": LatentTokenAttention,
}


# ---- Factors of value maps
def factorise(W: Tensor, rank: int, method: str = "exact") -> tuple[Tensor, Tensor, float]:
    """
    Truncated SVD of every head's value map, the singular values split evenly between the factors.

    W: (nh, hs, in), from the attention's input (C numbers, or L with MLA) to the head's values.
    rank: from 1 to hs. method: 'exact' is torch.linalg.svd, 'randomized' is Halko's range finder
    (arXiv:0909.4061) with a fixed seed; both compute in float64.
    Returns down (nh * rank, in) and up (nh, hs, rank), so that up[h] @ down[h] is the best
    approximation of W[h] of that rank, and the share of the squared singular values that is kept.
    """
    nh, _, width = W.shape
    W64 = W.detach().double()
    U, singular, Vh = truncated_svd(W64, rank, method)
    root = singular[:, :rank].sqrt()  # (nh, min(rank, width))
    up = U[:, :, :rank].clone()  # (nh, hs, rank)
    down = W64.new_zeros(nh, rank, width)
    # With rank > width there are only `width` singular values. The rows of down beyond them stay
    # zero, while the columns of up keep their directions, so that training can use them.
    down[:, : root.size(1)] = Vh[:, : root.size(1)] * root[:, :, None]
    up[:, :, : root.size(1)] *= root[:, None, :]
    total = W64.square().sum()
    share = 1.0
    if total > 0:
        share = float(singular[:, :rank].square().sum() / total)
    return down.reshape(nh * rank, width).to(W), up.to(W), share


def truncated_svd(W: Tensor, rank: int, method: str) -> tuple[Tensor, Tensor, Tensor]:
    """U, the singular values and V^T of matrices (..., m, n); 'randomized': about rank of them."""
    smaller = min(W.shape[-2:])
    if method == "exact" or rank >= smaller:
        return torch.linalg.svd(W, full_matrices=rank > W.size(-1))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        U, singular, V = torch.svd_lowrank(W.cpu(), q=min(rank + 8, smaller), niter=4)
    return U.to(W.device), singular.to(W.device), V.mT.to(W.device)


# ---- The transformer
class MLP(nn.Module):
    """Two matrices with a GELU between them, or three with a gate: x (B, T, C) -> (B, T, C)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        C = config.n_embd
        self.gated = config.mlp == "swiglu"  # arXiv:2002.05202
        self.approximate = {"exact": "none", "tanh": "tanh"}[config.gelu]  # torch's names
        self.c_fc = Linear(C, config.hidden, bias=config.bias)
        if self.gated:
            self.c_gate = Linear(C, config.hidden, bias=config.bias)
        self.c_proj = Linear(config.hidden, C, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        if self.gated:
            h = F.silu(self.c_gate(x)) * self.c_fc(x)
        else:
            h = F.gelu(self.c_fc(x), approximate=self.approximate)
        return self.dropout(self.c_proj(h))


class Block(nn.Module):
    """Attention and MLP, each added to the residual stream."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = block_norm(config)
        self.attn = ATTENTION[config.attention_name](config, layer)
        self.ln_2 = block_norm(config)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, cache: LayerCache | None = None, rotation: Rotation = None
    ) -> Tensor:
        """x (B, T, C) -> (B, T, C). With a cache, x continues it, and the caller advances it."""
        x = x + self.attn(self.ln_1(x), cache, rotation)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
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
        if config.pos_emb == "rope":  # wpe is built all the same: what a seed draws stays
            del parts["wpe"]
        self.transformer = nn.ModuleDict(parts)
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        cos, sin = self._rotary_tables()
        self.register_buffer("rope_cos", cos, persistent=False)  # one table for all layers
        self.register_buffer("rope_sin", sin, persistent=False)
        if not self.lm_head.weight.is_meta:
            init_weights(self, config.n_layer)
        self.tie_weights()

    @classmethod
    def from_pretrained(cls, source: str, override_args: dict[str, Any] | None = None) -> "GPT":
        """
        The model of gpt2[-medium|-large|-xl], a Hugging Face folder, an export, a run or a file.
        override_args: dropout and the svd settings. Raises UserError for what cannot be read.
        """
        from nanomla.checkpoint import build
        from nanomla.formats import open_weights

        model, _ = build(open_weights(source, prefer_best=True), **(override_args or {}))
        return model

    def _rotary_tables(self) -> tuple[Tensor, Tensor]:
        """cos and sin of every position, (block_size, rotary_dim / 2), in float32, or of none."""
        count = self.config.block_size
        if self.config.pos_emb == "learned":
            count = 0  # a block_size that weights do not have takes no memory
        positions = torch.arange(count, device="cpu")
        return rope_tables(positions, self.config, torch.float32)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "GPT":
        """Move or convert the model; its rotary tables stay float32, so that none is rounded."""
        super()._apply(fn, recurse)
        cos, sin = self._rotary_tables()
        self.rope_cos = cos.to(self.rope_cos.device)
        self.rope_sin = sin.to(self.rope_sin.device)
        return self

    def tie_weights(self) -> None:
        """Let shared weights be one parameter: lm_head and wte, and all latent projections."""
        if self.config.tie_weights:
            self.transformer.wte.weight = self.lm_head.weight  # arXiv:1608.05859
        first = self.transformer.h[0].attn
        if isinstance(first, LatentAttention) and self.config.mla_share_latent:
            for block in self.transformer.h:
                block.attn.kv_latent_proj = first.kv_latent_proj

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        cache: Cache | None = None,
        all_logits: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """
        idx (B, T) int64. With targets (B, T): logits (B, T, V) and the mean cross-entropy over all
        but -1. Without: logits of the last position, (B, 1, V), or with all_logits of all, and
        None. With a cache, idx goes on from what it holds. Raises ValueError for an idx without a
        token, for targets of another shape, and for a context or a cache that does not fit.
        """
        check_shape(idx)
        if targets is not None:
            allowed = f"the shape of idx, {tuple(idx.shape)}"
            require(targets.shape == idx.shape, "targets.shape", tuple(targets.shape), allowed)
        if cache is not None:
            self._check_made_for(cache)  # nothing is written before the cache is known to fit
            cache.check(*idx.shape, self.lm_head.weight.device)
        x, rotation = self._embed(idx, cache)  # (B, T, C)
        layer_caches = [None] * self.config.n_layer
        if cache is not None:
            layer_caches = cache.layers
        for block, layer_cache in zip(self.transformer.h, layer_caches, strict=True):
            if self.grad_checkpoint and torch.is_grad_enabled():
                x = checkpoint(block, x, layer_cache, rotation, use_reentrant=False)
            else:
                x = block(x, layer_cache, rotation)
        if cache is not None:
            cache.advance(idx.size(1))  # once, after all layers have written at the old position
        if targets is None and not all_logits:
            x = x[:, -1:]
        logits = self.lm_head(self.transformer.ln_f(x))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    def _embed(self, idx: Tensor, cache: Cache | None) -> tuple[Tensor, Rotation]:
        """The residual stream before the first block, (B, T, C), and the rotation of positions."""
        end = idx.size(1)
        at = slice(end)  # positions
        if cache is not None:
            end = cache.pos + idx.size(1)
            at = cache.positions(idx.size(1))
        limit = self.config.block_size
        if end > limit:
            raise ValueError(f"{end} tokens do not fit block_size={limit}; crop them")
        x = self.transformer.wte(idx)
        rotation = None
        if self.config.pos_emb == "learned":
            x = x + self.transformer.wpe.weight[at]
        elif x.dtype == torch.float64:
            cos, sin = rope_tables(torch.arange(end), self.config, x.dtype)
            rotation = cos.to(x.device)[at], sin.to(x.device)[at]
        else:
            rotation = self.rope_cos[at].to(x.dtype), self.rope_sin[at].to(x.dtype)
        return self.transformer.drop(x), rotation

    @torch.no_grad()
    def attention_weights(self, idx: Tensor, layer: int) -> Tensor:
        """
        What every token of idx (B, T) reads of all in one layer, for pictures: (B, nh, T, T), row i
        what token i reads of tokens 0 to i. For a model in evaluation mode. Raises ValueError for a
        layer that is not there, or an idx without a token.
        """
        check_shape(idx)
        blocks = self.transformer.h
        require(layer in range(len(blocks)), "layer", layer, f"from 0 to {len(blocks) - 1}")
        x, rotation = self._embed(idx, None)
        for block in blocks[:layer]:
            x = block(x, rotation=rotation)
        block = blocks[layer]
        return block.attn.weights(block.ln_1(x), rotation)

    def make_cache(self, batch_size: int, max_len: int, dtype: torch.dtype | None = None) -> Cache:
        """
        An empty cache for max_len tokens of batch_size sequences. dtype None: that of the
        activations, but at least float32 for a state, which every token rounds again. Raises
        ValueError for a max_len over block_size or a dtype that this attention cannot keep,
        UserError if memory is short.
        """
        limit = self.config.block_size
        device = self.lm_head.weight.device
        require(1 <= max_len <= limit, "max_len", max_len, f"from 1 to block_size={limit}")
        if dtype is None:
            dtype = self.lm_head.weight.dtype
            if torch.is_autocast_enabled(device.type):
                dtype = torch.get_autocast_dtype(device.type)
            if not self._new_cache(1, 1, dtype, "meta").grows:
                dtype = torch.promote_types(dtype, torch.float32)
        nbytes = self._new_cache(batch_size, max_len, dtype, "meta").nbytes
        remedy = "make it for fewer rows or tokens, or of a narrower dtype"
        require_memory(nbytes, "the cache", device, remedy)
        return self._new_cache(batch_size, max_len, dtype, device)

    def _new_cache(
        self, batch_size: int, max_len: int, dtype: torch.dtype, device: torch.device | str
    ) -> Cache:
        layers = []
        for block in self.transformer.h:
            layers.append(block.attn.new_cache(batch_size, max_len, dtype, device))
        return Cache(layers, made_for=self.config)

    def _check_made_for(self, cache: Cache) -> None:
        """Raise ValueError for a cache that a model of another shape made."""
        if cache.made_for is self.config:
            return
        own = self._new_cache(1, 1, cache.dtype, "meta")
        has = [cache.made_for.attention_name, *cache.sizes()]
        needs = [self.config.attention_name, *own.sizes()]
        if has != needs:
            raise ValueError(f"the cache was made for another model: {has}, not {needs}")

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
        cache_dtype: torch.dtype | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """
        Continue idx (B, T), T >= 1, by n <= max_new_tokens tokens: (B, T + n), without dropout.

        temperature 0 is argmax; top_k None or 0 and top_p None or 1 are off. stop: token ids; a
        sequence that drew one repeats it, and when all have, generation ends. use_cache=False
        recomputes a sliding window every step. A given cache holds the first cache.pos tokens of
        idx, and then all of the result but its last, or the newest if it cannot hold them;
        cache_dtype is that of the cache made otherwise. Raises ValueError for arguments out of
        range.
        """
        if cache is not None:  # before it is made ready, which may empty it
            self._check_made_for(cache)
        sampler = Sampler(temperature, top_k, top_p, generator)
        for token in stream_tokens(
            self, idx, max_new_tokens, sampler, use_cache, cache_dtype, cache, stop
        ):
            idx = torch.cat([idx, token], dim=1)
        return idx

    def get_num_params(self, non_embedding: bool = True) -> int:
        """Parameters, shared ones once; non_embedding omits the position table, as in nanoGPT."""
        n = sum(p.numel() for p in self.parameters())
        if non_embedding and self.config.pos_emb == "learned":
            n -= self.transformer.wpe.weight.numel()
        return n

    def get_compression_ratio(self) -> float:
        """Key and value parameters of MHA over this model's; shared ones count once."""
        counts = {}
        for block in self.transformer.h:
            counts |= block.attn.key_value_parameters()
        mha = len(self.transformer.h) * mha_key_value_parameters(self.config)
        return mha / sum(counts.values())

    def get_memory_savings(self, sequence_length: int) -> float:
        """MHA cache bytes at that length, at least 1, over this model's."""
        numbers = sum(cached_numbers_at(b.attn, sequence_length) for b in self.transformer.h)
        mha = 2 * self.config.n_layer * self.config.n_head * self.config.hs * sequence_length
        return mha / numbers

    def get_cache_size_ratio(self) -> float:
        """This model's cache bytes over MHA's, at one token."""
        return 1 / self.get_memory_savings(1)
