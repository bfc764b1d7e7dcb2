"""
The whole model: a GPT whose attention is causal self-attention (MHA), multi-head latent attention
(MLA), MLA with a rotary latent, or latent tokens, chosen by GPTConfig. All but the last can keep
their values in a low-rank subspace (SVD). Layers have an MLP or a mixture of experts.

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

With n_predict one more block predicts the token after the next, as in DeepSeek-V3; see Predictor.

nanomla/kernels computes attend, softmax(q k^T) v, and Linear. nanomla/cache.py keeps past tokens; a
cache whose sequences hold different numbers of them has these as lengths (B,). nanomla/generate.py
draws tokens.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nanomla.attention import (
    Attention,
    Rotation,
    cached_numbers_at,
    in_order,
    init_weights,
    mha_key_value_parameters,
    real_first,
)
from nanomla.cache import Cache, LayerCache
from nanomla.checks import Count, Natural, Positive, Several, Share, check, require
from nanomla.generate import Sampler, check_shape, stream_tokens
from nanomla.kernels import Linear, Quantized, attend, causal_weights, columns, dequantise
from nanomla.latent_tokens import LatentTokenAttention
from nanomla.memory import require_memory
from nanomla.speculate import Speculation

# What layers leave for others in one pass, by their index; see mla_share_cache.
Shared = dict[int, tuple]

# The names of attention that a flag of GPTConfig stands for.
NAMES_OF_FLAGS = {
    "use_mla": ("mla", "rotary_latent", "split_latents"),
    "use_latent_tokens": ("latent_tokens",),
}


@dataclass
class GPTConfig:
    """The model's shape. Raises ValueError naming the field, its value and what would work."""

    headings: ClassVar[dict[str, str]] = {
        "block_size": "model", "moe_experts": "mixture of experts", "attn_gate": "attention",
    }

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
    n_predict: Annotated[
        Natural,
        Field(le=1),
        "With 1, one more block predicts the token after the next: a second loss in training, and "
        "drafts for --speculate. 0 has none.",
    ] = 0
    pos_emb: Annotated[
        Literal["learned", "rope"],
        "How the model sees positions: by a learned table, as in GPT-2, or by rotary embedding.",
    ] = "learned"
    rope_theta: Annotated[Positive, "The base of the rotary frequencies."] = 10000.0
    rope_freqs: Annotated[
        Several[Positive] | None,
        "The radians per token of every rotary pair. None computes them from rope_theta.",
    ] = None

    moe_experts: Annotated[
        int,
        Field(ge=0, le=4096),
        "The number of routed experts in every layer after the first moe_dense_layers. 0 stands "
        "for an MLP in every layer.",
    ] = 0
    moe_active: Annotated[Count, "The number of routed experts that a token passes."] = 2
    moe_shared: Annotated[Natural, "The number of experts that every token passes besides."] = 1
    moe_hidden: Annotated[
        Count | None,
        "The inner width of an expert. None stands for the multiple of 8 with which the experts "
        "that a token passes are about as wide as the MLP.",
    ] = None
    moe_groups: Annotated[
        Count, "The number of groups that the routed experts stand in, one after the other."
    ] = 1
    moe_active_groups: Annotated[
        Count, "The number of groups in which the routed experts of a token may be."
    ] = 1
    moe_norm: Annotated[
        bool, "The weights of a token's routed experts are divided by their sum."
    ] = True
    moe_scale: Annotated[Positive, "The factor of these weights."] = 1.0
    moe_dense_layers: Annotated[
        Natural, "The number of layers, from the first on, that have an MLP and no experts."
    ] = 1

    attn_gate: Annotated[
        bool,
        "What every head has read is multiplied by a gate, a sigmoid of the token's own, number by "
        "number, before the output projection.",
    ] = False
    qk_norm: Annotated[
        bool,
        "Queries and keys of every head are normed before they are rotated. With use_mla it is "
        "queries and the rotary key, and with mla_rope='latent' queries alone, without weights: "
        "the rest of a key is made of the latent, which has its own norm.",
    ] = False
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
    mla_split: Annotated[
        bool, "Keys and values have latents of their own, both of mla_latent_dim numbers."
    ] = False
    mla_share_latent: Annotated[bool, "All layers use the down-projection of layer 0."] = False
    mla_share_cache: Annotated[
        Count,
        "So many neighbouring layers read the latents of the first of them, and only these are "
        "cached.",
    ] = 1
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
        enough = self.block_size > self.n_predict
        require(enough, "block_size", self.block_size, f"above n_predict={self.n_predict}")
        if self.pos_emb == "rope" and self.rope_freqs:
            pairs = self.rotary_dim // 2
            allowed = f"None or {pairs} numbers, one per rotary pair"
            require(len(self.rope_freqs) == pairs, "rope_freqs", self.rope_freqs, allowed)
        if self.use_svd:
            if self.svd_rank is None:
                self.svd_rank = self.hs
            allowed = f"from 1 to the head size {self.hs}"
            require(self.svd_rank <= self.hs, "svd_rank", self.svd_rank, allowed)
        if self.moe_experts:
            self._check_experts()

    def _check_experts(self) -> None:
        """Raise ValueError for numbers of experts and groups that do not go together."""
        experts = self.moe_experts
        groups = self.moe_groups
        active_groups = self.moe_active_groups
        if groups > 1:  # whose two best experts count
            allowed = f"1 or a divisor of moe_experts={experts} up to its half"
            divides = experts % groups == 0 and experts // groups >= 2
            require(divides, "moe_groups", groups, allowed)
        allowed = f"at most moe_groups={groups}"
        require(active_groups <= groups, "moe_active_groups", active_groups, allowed)
        eligible = experts // groups * active_groups
        allowed = f"at most {eligible}, the experts in {active_groups} of {groups} groups"
        require(self.moe_active <= eligible, "moe_active", self.moe_active, allowed)

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
        if self.attention in ("mla", "split_latents"):
            allowed = f"'decoupled' with attention={self.attention!r}"
            require(self.mla_rope == "decoupled", "mla_rope", self.mla_rope, allowed)
        if self.attention == "mla":
            require(not self.mla_split, "mla_split", True, "False with attention='mla'")
        if self.attention == "rotary_latent":
            self.mla_rope = "latent"
        if self.attention == "split_latents":
            self.mla_split = True
        if self.attention in ("mha", "mla", "rotary_latent", "split_latents", "latent_tokens"):
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
        if self.use_mla and self.mla_split:
            return "split_latents"
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
    def expert_hidden(self) -> int:
        """An expert's inner width; grouped products of other engines need multiples of 8."""
        if self.moe_hidden is not None:
            return self.moe_hidden
        return max(round(self.hidden / (self.moe_active + self.moe_shared) / 8), 1) * 8

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
        if config.attn_gate:  # arXiv:2505.06708
            self.gate_proj = Linear(config.n_embd, self.nh * self.hs, bias=False)
        if self.low_rank:
            self.v_down = Linear(value_in, value_heads * config.svd_rank, bias=False)
            self.v_up = nn.Parameter(torch.zeros(value_heads, self.hs, config.svd_rank))

    def _dropout(self, cache: LayerCache | None) -> float:
        """The share of attention weights that are dropped: in training, which has no cache."""
        if self.training and cache is None:
            return self.config.dropout
        return 0.0

    def _output(self, y: Tensor, x: Tensor) -> Tensor:
        """
        What the heads have read, y (B, nh, T, hs), back into the residual stream, (B, T, C).
        x (B, T, C): the attention's input, which a gate is computed from.
        """
        y = y.transpose(1, 2).flatten(2)  # (B, T, nh * hs)
        if self.config.attn_gate:
            y = y * self.gate_proj(x).sigmoid()
        return self.resid_dropout(self.c_proj(y))

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
        words = self._words()
        if self.low_rank:
            words += f", values of rank {self.config.svd_rank}"
        if self.config.attn_gate:
            words += ", gated"
        if self.config.qk_norm:
            words += ", normed queries and keys"
        return words

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
        if config.qk_norm:  # arXiv:2010.04245, as RMSNorm
            self.q_norm = RMSNorm(self.hs, eps=1e-6)
            self.k_norm = RMSNorm(self.hs, eps=1e-6)
        self.init_alone()

    def new_cache(self, batch_size: int, max_len: int, dtype=torch.float32, device="cpu"):
        """Keys, and values or their coordinates in the subspace, of every key/value head."""
        sizes = [(self.nkv, self.hs), (self.nkv, self.value_width)]
        return LayerCache(sizes, batch_size, max_len, dtype, device)

    def forward(
        self,
        x: Tensor,
        cache: LayerCache | None = None,
        rotation: Rotation = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        if mask is not None:
            return self.masked(x, cache, mask)
        q, k, v = self._project(x, cache, rotation)
        if cache is None:
            return self._output(self._attend(q, k, v, None, self._dropout(cache)), x)
        cached_k, cached_v = cache.append(k, v)  # (B, nkv, S, hs), (B, nkv, S, hs or rv)
        if cache.pos == 0:  # not advanced yet: the new tokens are all there is, unrounded
            if self.low_rank:
                v = per_head(v, self.v_up.to(v.dtype).mT)  # from (B, nkv, T, rv) to its hs numbers
            return self._output(self._attend(q, k, v), x)
        y = self._attend(q, cached_k, cached_v, cache.lengths).to(x.dtype)
        if self.low_rank:
            up = self.v_up.to(y.dtype).repeat_interleave(self.nh // self.nkv, dim=0)
            y = per_head(y, up.mT)  # from (B, nh, T, rv) to (B, nh, T, hs)
        return self._output(y, x)

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
        q = q.view(B, T, self.nh, self.hs)
        k = k.view(B, T, self.nkv, self.hs)
        v = v.view(B, T, self.nkv, -1)
        if self.config.qk_norm:
            q = self.q_norm(q)
            k = self.k_norm(k)
        q = apply_rope(q, rotation)
        k = apply_rope(k, rotation)
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
        allowed = "one number with mla_share_latent or mla_share_cache"
        shared = config.mla_share_latent or config.mla_share_cache > 1
        require(equal or not shared, "mla_latent_dim", list(widths), allowed)
        if equal:
            config.mla_latent_dim = widths[0]
    L = max(widths)
    if config.mla_share_cache > 1:
        one = config.mla_share_latent
        require(not one, "mla_share_latent", one, "False with mla_share_cache")
    latents = groups
    if config.mla_split:
        latents = 2 * groups
    most = (full - 1 - beside) // latents
    allowed = (
        f"at most {most}: {latents} x {L} + {beside} cached numbers a token "
        f"would not be fewer than MHA's {full}"
    )
    require(latents * L + beside < full, "mla_latent_dim", L, allowed)
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
        self.latents = self.G  # of a token
        if config.mla_split:
            self.latents = 2 * self.G
        self.L = config.latent_dim(layer)
        self.r = config.mla_rope_dim
        self.query_width = query_width
        self.key_width = key_width
        self.leader = layer - layer % config.mla_share_cache  # the layer whose latents it reads
        self.leads = self.leader == layer
        self._add_output_and_values(self.L, self.nh)
        if config.mla_q_latent_dim is None:
            self.q_proj = Linear(C, self.nh * query_width, bias=config.bias)
        else:
            width = config.mla_q_latent_dim
            self.q_latent_proj = Linear(C, width, bias=False)  # [q_a_proj]
            self.q_latent_norm = latent_norm(config.mla_norm, width)
            self.q_expand = Linear(width, self.nh * query_width, bias=False)  # [q_b_proj]
        if self.leads:
            latents = self.latents * self.L + key_width
            self.kv_latent_proj = Linear(C, latents, bias=config.bias)  # [kv_a_proj_with_mqa]
            self.latent_norm = latent_norm(config.mla_norm, self.L)
        if nope:
            self.k_expand = Linear(self.L, self.nh * nope, bias=False)  # W_UK [kv_b_proj]
        if not config.use_svd:
            self.v_expand = Linear(self.L, self.nh * self.hs, bias=False)  # W_UV [kv_b_proj]
        if config.qk_norm and nope:
            self.q_norm = RMSNorm(query_width, eps=1e-6)
        elif config.qk_norm:  # of a rotary latent, without weights as in DeepSeek-V4
            self.q_norm = nn.RMSNorm(query_width, eps=1e-6, elementwise_affine=False)
        if config.qk_norm and key_width and self.leads:
            self.k_norm = RMSNorm(key_width, eps=1e-6)

    def _queries(self, x: Tensor) -> Tensor:
        """x (B, T, C) -> (B, T, nh, query_width)."""
        B, T, _ = x.shape
        if self.config.mla_q_latent_dim is None:
            q = self.q_proj(x)
        else:
            q = self.q_expand(self.q_latent_norm(self.q_latent_proj(x)))
        q = q.view(B, T, self.nh, self.query_width)
        if self.config.qk_norm:
            q = self.q_norm(q)
        return q

    def _cached(self, batch_size: int, max_len: int, dtype, device, *sizes) -> LayerCache:
        """A cache of buffers of these sizes, or of none where another layer has the latents."""
        if not self.leads:
            sizes = ()
        return LayerCache(sizes, batch_size, max_len, dtype, device)

    def _own_or_shared(
        self, x: Tensor, cache: LayerCache | None, rotation: Rotation, shared: Shared | None
    ) -> tuple:
        """
        What _read makes of x, or has made of it in the layer whose latents this one reads. shared:
        what the layers before have left in this pass, by their index.
        """
        if self.leads:
            made = self._read(x, cache, rotation)
            if shared is not None:
                shared[self.leader] = made
            return made
        if shared is None:
            problem = f"it reads the latents of layer {self.leader}"
            raise ValueError(f"this layer cannot be used without its GPT: {problem}")
        return shared[self.leader]

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
        return self._cached(batch_size, max_len, dtype, device, *sizes)

    def forward(
        self,
        x: Tensor,
        cache: LayerCache | None = None,
        rotation: Rotation = None,
        mask: Tensor | None = None,
        absorb: bool | None = None,
        shared: Shared | None = None,
    ) -> Tensor:
        """
        x (B, T, C) -> (B, T, C). With a cache, x continues it, and the caller advances it.
        absorb: attend over latents (True) or expanded keys (False); None: the cheaper with a cache.
        """
        if mask is not None:
            return self.masked(x, cache, mask)
        T = x.size(1)
        pos = 0
        lengths = None
        if cache is not None:
            pos = cache.pos
            lengths = cache.lengths
        if rotation is None:
            rotation = rotation_alone(self.config, x, cache)
        q_nope, q_rope = self._split_queries(x, rotation)  # (B, nh, T, nope), (B, nh, T, r)
        c, kr, packed, beside = self._own_or_shared(x, cache, rotation, shared)
        if absorb is None:
            absorb = cache is not None and self.absorbing_is_cheaper(T, pos + T)
        if absorb:
            return self._output(self._absorbed(q_nope, q_rope, packed, beside, lengths), x)
        if pos > 0:  # else the new tokens are all there is, and need no rounding
            c, kr = self._unpack(packed, beside, q_nope.dtype)
        dropout = self._dropout(cache)
        return self._output(self._expanded(q_nope, q_rope, c, kr, lengths, dropout), x)

    def _read(
        self, x: Tensor, cache: LayerCache | None, rotation: Rotation
    ) -> tuple[Tensor, Tensor, Tensor | Quantized, Tensor | Quantized | None]:
        """c (B, G, T, L) and kr (B, 1, T, r) of x, and packed and beside of all S tokens."""
        c, kr = self._latents(x, rotation)
        packed, beside = self._pack(c, kr)
        if cache is not None:
            packed, beside = cache.append(packed, beside)
        return c, kr, packed, beside

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
        c, kr = self.kv_latent_proj(x).split([self.latents * self.L, self.r], dim=-1)
        c = self.latent_norm(c.reshape(B, T, self.latents, self.L))
        kr = kr.unsqueeze(2)
        if self.config.qk_norm and self.r:
            kr = self.k_norm(kr)
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
        c_k, c_v = self._of_keys_and_values(c.transpose(1, 2))  # (B, S, G, L) each
        k = per_group(c_k, self.k_expand.weight).view(B, S, self.nh, self.nope)
        if self.low_rank:
            W_UV = dense_values(self.v_down.weight, self.v_up)
        else:
            W_UV = self.v_expand.weight
        v = per_group(c_v, W_UV).view(B, S, self.nh, self.hs)
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
        k, v = self._as_keys_and_values(packed)
        o = attend(q, k, v, scale=self.scale, beside=beside, lengths=lengths)
        return self._read_values(o[..., : self.L].to(q.dtype))

    def _of_keys_and_values(self, c: Tensor) -> tuple[Tensor, Tensor]:
        """The latents that keys are made of, and those of values: the same."""
        return c, c

    def _as_keys_and_values(
        self, packed: Tensor | Quantized
    ) -> tuple[Tensor | Quantized, Tensor | Quantized | None]:
        """What is cached, as keys and values of the latent's width: keys are values too."""
        return packed, None

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

    def weights(
        self, x: Tensor, rotation: Rotation = None, shared: Shared | None = None
    ) -> Tensor:
        if rotation is None:
            rotation = rotation_alone(self.config, x, None)
        q_nope, q_rope = self._split_queries(x, rotation)
        c, kr, _, _ = self._own_or_shared(x, None, rotation, shared)
        k, _ = self._keys_and_values(c, kr)
        return causal_weights(torch.cat([q_nope, q_rope], dim=-1), k, self.scale)

    def _words(self) -> str:
        return f"MLA, {self._latent_words()}"

    def flops_per_key(self, decoding: bool) -> int:
        """Over latents when decoding, else over expanded keys and values."""
        if decoding:
            return 2 * self.nh * (2 * self.L + self.r)
        return 2 * self.nh * (self.nope + self.r + self.hs)


class SplitLatentAttention(MultiHeadLatentAttention):
    """
    MLA with two latents in every group: keys are made of one, values of the other. They share the
    norm's weights, which k_expand and v_expand could take in.

    kv_latent_proj makes the keys' latents of all groups, those of values, and the rotary key.
    """

    def new_cache(self, batch_size: int, max_len: int, dtype=torch.float32, device="cpu"):
        """Both latents of every group; with one group the rotary key lies between them."""
        sizes = [(self.G, 2 * self.L)]
        if self.G == 1:
            sizes = [(1, 2 * self.L + self.r)]
        elif self.r > 0:
            sizes.append((1, self.r))
        return self._cached(batch_size, max_len, dtype, device, *sizes)

    def _of_keys_and_values(self, c: Tensor) -> tuple[Tensor, Tensor]:
        """c (B, S, 2 G, L) -> (B, S, G, L) each."""
        return c.chunk(2, dim=2)

    def _pack(self, c: Tensor, kr: Tensor) -> tuple[Tensor, Tensor | None]:
        c_k, c_v = c.chunk(2, dim=1)
        if self.G == 1:
            return torch.cat([c_k, kr, c_v], dim=-1), None
        packed = torch.cat([c_k, c_v], dim=-1)
        if self.r == 0:
            return packed, None
        return packed, kr

    def _unpack(
        self, packed: Tensor | Quantized, beside: Tensor | Quantized | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """c (B, 2 G, S, L) and kr (B, 1, S, r) again."""
        packed = dequantise(packed, dtype)
        c = torch.cat([packed[..., : self.L], packed[..., -self.L :]], dim=1)
        if beside is not None:
            return c, dequantise(beside, dtype)
        return c, packed[..., self.L : -self.L]

    def _as_keys_and_values(
        self, packed: Tensor | Quantized
    ) -> tuple[Tensor | Quantized, Tensor | Quantized]:
        """[c_k ; kr] and c_v, which lie side by side."""
        W = packed.size(3)
        return columns(packed, 0, W - self.L), columns(packed, W - self.L, W)

    def _words(self) -> str:
        return f"MLA with latents of their own for keys and values, {self._latent_words()}"


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
        require(not config.mla_split, "mla_split", True, "False with mla_rope='latent'")
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
        return self._cached(batch_size, max_len, dtype, device, (self.G, self.L))

    def forward(
        self,
        x: Tensor,
        cache: LayerCache | None = None,
        rotation: Rotation = None,
        mask: Tensor | None = None,
        shared: Shared | None = None,
    ) -> Tensor:
        if mask is not None:
            return self.masked(x, cache, mask)
        if rotation is None:
            rotation = rotation_alone(self.config, x, cache)
        q = self._rotated_queries(x, rotation)  # (B, nh, T, L)
        c, cached = self._own_or_shared(x, cache, rotation, shared)  # (B, G, T, L), (B, G, S, L)
        lengths = None
        if cache is not None:
            lengths = cache.lengths
            if cache.pos > 0:  # else the new tokens are all there is, and need no rounding
                c = cached
        o = attend(q, c, scale=self.scale, lengths=lengths, dropout=self._dropout(cache))
        cos, sin = rotation
        o = self._rotate(o.to(x.dtype).transpose(1, 2), (cos, -sin)).transpose(1, 2)  # R_i^-1
        return self._output(self._read_values(o), x)

    def _rotated_queries(self, x: Tensor, rotation: Rotation) -> Tensor:
        """(B, nh, T, L)"""
        return self._rotate(self._queries(x), rotation).transpose(1, 2)

    def _read(
        self, x: Tensor, cache: LayerCache | None, rotation: Rotation
    ) -> tuple[Tensor, Tensor | Quantized | None]:
        """Rotary latents of x, (B, G, T, L), and with a cache of all S tokens."""
        B, T, _ = x.shape
        c = self.latent_norm(self.kv_latent_proj(x).view(B, T, self.G, self.L))
        c = self._rotate(c, rotation).transpose(1, 2)
        cached = None
        if cache is not None:
            cached, _ = cache.append(c)
        return c, cached

    def _rotate(self, x: Tensor, rotation: Rotation) -> Tensor:
        """Rotate the last r of L numbers of x (B, T, n, L)."""
        still, turned = x.split([self.L - self.r, self.r], dim=-1)
        return torch.cat([still, apply_rope(turned, rotation)], dim=-1)

    def weights(
        self, x: Tensor, rotation: Rotation = None, shared: Shared | None = None
    ) -> Tensor:
        if rotation is None:
            rotation = rotation_alone(self.config, x, None)
        q = self._rotated_queries(x, rotation)
        c, _ = self._own_or_shared(x, None, rotation, shared)
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
    "split_latents": SplitLatentAttention,
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
    """
    Two matrices with a GELU between them, or three with a gate: x (..., C) -> (..., C).
    hidden: the inner width; None: that of the config.
    """

    def __init__(self, config: GPTConfig, hidden: int | None = None) -> None:
        super().__init__()
        C = config.n_embd
        if hidden is None:
            hidden = config.hidden
        self.gated = config.mlp == "swiglu"  # arXiv:2002.05202
        self.approximate = {"exact": "none", "tanh": "tanh"}[config.gelu]  # torch's names
        self.c_fc = Linear(C, hidden, bias=config.bias)
        if self.gated:
            self.c_gate = Linear(C, hidden, bias=config.bias)
        self.c_proj = Linear(hidden, C, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        if self.gated:
            h = F.silu(self.c_gate(x)) * self.c_fc(x)
        else:
            h = F.gelu(self.c_fc(x), approximate=self.approximate)
        return self.dropout(self.c_proj(h))


class MixtureOfExperts(nn.Module):
    """
    DeepSeek-V3's (arXiv:2412.19437, section 2.1.2), x (B, T, C) -> (B, T, C). Every token passes
    the shared experts, which are one MLP, and k = moe_active of E = moe_experts routed ones:

        s = sigmoid(W_r x)    y = shared(x) + moe_scale sum_e s_e / (s_1 + ... + s_k) expert_e(x)

    over the k largest s + b, of which b, the router's bias, has no part in y. It has no gradient:
    nanomla/experts.py raises it after every step for experts that have had few tokens.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        E = config.moe_experts
        width = config.expert_hidden
        self.router = Linear(config.n_embd, E, bias=False)
        self.router_bias = nn.Parameter(torch.zeros(E), requires_grad=False)
        self.experts = nn.ModuleList([MLP(config, width) for _ in range(E)])
        if config.moe_shared:
            self.shared = MLP(config, config.moe_shared * width)
        self.counting = False  # of the tokens that every expert gets
        loads = torch.zeros(E, dtype=torch.int64, device="cpu")  # also in a model on "meta"
        self.register_buffer("loads", loads, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)  # (N, C)
        weights, choice = self._route(tokens)
        y = self.routed(tokens, weights, choice).view(x.shape)
        if self.config.moe_shared:
            y = y + self.shared(x)
        return y

    def _route(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The weights and the numbers of every token's experts, both (N, k)."""
        config = self.config
        dtype = torch.promote_types(tokens.dtype, torch.float32)  # scores that are close decide
        with torch.autocast(tokens.device.type, enabled=False):
            scores = F.linear(tokens.to(dtype), self.router.weight.to(dtype)).sigmoid()  # (N, E)
        biased = scores.detach() + self.router_bias
        if config.moe_groups > 1:
            grouped = biased.unflatten(1, (config.moe_groups, -1))  # (N, groups, E / groups)
            of_groups = grouped.topk(2).values.sum(dim=-1)
            best = of_groups.topk(config.moe_active_groups).indices
            others = torch.ones_like(of_groups, dtype=torch.bool).scatter(1, best, False)
            biased = grouped.masked_fill(others.unsqueeze(-1), -math.inf).flatten(1)
        choice = biased.topk(config.moe_active).indices
        weights = scores.gather(1, choice)
        if config.moe_norm:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return config.moe_scale * weights, choice

    def routed(self, tokens: Tensor, weights: Tensor, choice: Tensor) -> Tensor:
        """
        What each token's routed experts add up to, (N, C). On a CPU a loop over experts takes 0.7
        to 1.3 times as long as torch's grouped_mm, which has no float64 and no odd widths.
        """
        if len(tokens) == 1 and not torch.is_grad_enabled() and not self.counting:  # decoding
            outputs = torch.cat([self.experts[e](tokens) for e in choice[0].tolist()])
            return weights.to(outputs.dtype) @ outputs
        expert, order = choice.flatten().sort(stable=True)  # pairs of a token and an expert
        numbers = torch.arange(len(self.experts), device=expert.device)
        ends = torch.searchsorted(expert, numbers, right=True)  # of each expert's pairs
        loads = ends.diff(prepend=ends.new_zeros(1))
        if self.counting:
            self.loads += loads
        token = order // choice.size(1)
        inputs = tokens.index_select(0, token).split(loads.tolist())
        outputs = []
        for mlp, x in zip(self.experts, inputs, strict=True):
            if len(x) or torch.is_grad_enabled():  # in training every weight has a gradient
                outputs.append(mlp(x))
        y = torch.cat(outputs)
        y = y * weights.flatten().index_select(0, order).unsqueeze(1).to(y.dtype)
        return y.new_zeros(tokens.shape).index_add(0, token, y)


class Block(nn.Module):
    """Attention and MLP, each added to the residual stream."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = block_norm(config)
        self.attn = ATTENTION[config.attention_name](config, layer)
        self.ln_2 = block_norm(config)
        if config.moe_experts and layer >= config.moe_dense_layers:
            self.mlp = MixtureOfExperts(config)
        else:
            self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        cache: LayerCache | None = None,
        rotation: Rotation = None,
        shared: Shared | None = None,
    ) -> Tensor:
        """x (B, T, C) -> (B, T, C). With a cache, x continues it, and the caller advances it."""
        if shared is None:
            x = x + self.attn(self.ln_1(x), cache, rotation)
        else:
            x = x + self.attn(self.ln_1(x), cache, rotation, shared=shared)
        return x + self.mlp(self.ln_2(x))


class Predictor(nn.Module):
    """
    DeepSeek-V3's module for multi-token prediction (arXiv:2412.19437, section 2.2, eq. 21 to 23).

    What the head reads of token i and the embedding of token i + 1 give, through one more block,
    what the head reads to predict token i + 2. Embedding and head are the model's.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        C = config.n_embd
        # a block like the last one, with latents of its own
        config = dataclasses.replace(config, mla_share_cache=1)
        self.enorm = block_norm(config)
        self.hnorm = block_norm(config)
        self.eh_proj = Linear(2 * C, C, bias=False)
        self.h = Block(config, config.n_layer - 1)
        self.ln_f = block_norm(config)  # [shared_head.norm]

    def forward(
        self,
        hidden: Tensor,
        embedded: Tensor,
        cache: LayerCache | None = None,
        rotation: Rotation = None,
    ) -> Tensor:
        """hidden and embedded (B, T, C) -> (B, T, C)."""
        both = torch.cat([self.enorm(embedded), self.hnorm(hidden)], dim=-1)  # (B, T, 2 C)
        return self.ln_f(self.h(self.eh_proj(both), cache, rotation))


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean over all targets (B, T) but -1, in nats; logits (B, T, V)."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


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
        if config.n_predict:  # drawn last, so that a seed's other weights stay
            self.predictor = Predictor(config)
            if not self.lm_head.weight.is_meta:
                init_weights(self.predictor, config.n_layer)
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
        mask: Tensor | None = None,
        all_losses: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """
        idx (B, T) int64. With targets (B, T): logits (B, T, V) and the mean cross-entropy over all
        but -1. Without: logits of the last position, (B, 1, V), or with all_logits of all, and
        None. With a cache, idx goes on from what it holds.
        all_losses: (1 + n_predict,) losses, the second one that of the token after the next.
        mask (B, S) bool: which of all tokens are real, the new ones last; None: all. The others are
        padding, wherever it stands: it has no position, no part in the loss and no place in the
        cache, and its logits mean nothing. The last position is then that of a sequence's last real
        token.
        Raises ValueError for an idx without a token, for targets or a mask of another shape, and
        for a context or a cache that does not fit.
        """
        check_shape(idx)
        if all_losses and self.config.n_predict:
            allowed = "(B, T) with T of at least 2 for the loss of the token after the next"
            require(idx.size(1) > 1, "idx.shape", tuple(idx.shape), allowed)
        if targets is not None:
            allowed = f"the shape of idx, {tuple(idx.shape)}"
            require(targets.shape == idx.shape, "targets.shape", tuple(targets.shape), allowed)
        if cache is not None:
            self._check_made_for(cache)  # nothing is written before the cache is known to fit
            cache.check(*idx.shape, self.lm_head.weight.device)
        real = None
        if mask is not None:
            order, real = real_first(mask, *idx.shape)
            padding = mask[:, -idx.size(1) :].logical_not()
            idx = idx.masked_fill(padding, 0).gather(1, order)
        if cache is not None:
            cache.expect(real)
        x = self.run_blocks(idx, cache)
        if targets is None and not all_logits:
            if mask is None:
                x = x[:, -1:]
            else:
                x = in_order(x, (real - 1).clamp(min=0).unsqueeze(1))  # of the last real token
        elif mask is not None:
            x = in_order(x, order.argsort(dim=1))
        if mask is not None and targets is not None:
            targets = targets.masked_fill(padding, -1)
        hidden = self.transformer.ln_f(x)
        logits = self.lm_head(hidden)
        if targets is None:
            return logits, None
        loss = cross_entropy(logits, targets)
        if not all_losses:
            return logits, loss
        losses = [loss]
        if self.config.n_predict:
            if mask is not None:
                hidden = in_order(hidden, order)  # as idx is
                targets = targets.gather(1, order)
            ahead = self.predict(hidden[:, :-1], idx[:, 1:])
            losses.append(cross_entropy(self.lm_head(ahead), targets[:, 1:]))
        return logits, torch.stack(losses)

    def run_blocks(self, idx: Tensor, cache: Cache | None = None) -> Tensor:
        """The residual stream of idx (B, T) behind the last block, (B, T, C); else as forward."""
        x, rotation = self._embed(idx, cache)
        shared = self._shared()
        layer_caches = [None] * self.config.n_layer
        if cache is not None:
            layer_caches = cache.layers
        for block, layer_cache in zip(self.transformer.h, layer_caches, strict=True):
            x = self._run(block, x, layer_cache, rotation, shared)
        if cache is not None:
            cache.advance(idx.size(1))  # once, after all layers have written at the old position
        return x

    def _run(self, block: nn.Module, *inputs: Any) -> Tensor:
        """A block's output, without keeping its activations if they are to be recomputed."""
        if self.grad_checkpoint and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def predict(self, hidden: Tensor, following: Tensor, cache: LayerCache | None = None) -> Tensor:
        """
        What the head reads to predict the tokens after the next, (B, T, C), of a model with
        n_predict=1. hidden (B, T, C): what it reads to predict the next ones; following (B, T):
        these. A cache of predictor.h.attn.new_cache goes on from what it holds.
        """
        embedded = self.transformer.wte(following)
        begin = 0
        if cache is not None:
            begin = cache.pos
        end = begin + following.size(1)
        rotation = self._rotation(slice(begin, end), end, embedded.dtype)
        ahead = self._run(self.predictor, hidden, embedded, cache, rotation)
        if cache is not None:
            cache.advance(following.size(1))
        return ahead

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
        if self.config.pos_emb == "learned":
            x = x + self.transformer.wpe.weight[at]
        return self.transformer.drop(x), self._rotation(at, end, x.dtype)

    def _rotation(self, at: slice | Tensor, end: int, dtype: torch.dtype) -> Rotation:
        """The rotation of positions below `end`."""
        if self.config.pos_emb == "learned":
            return None
        if dtype == torch.float64:
            cos, sin = rope_tables(torch.arange(end), self.config, dtype)
            return cos.to(self.rope_cos.device)[at], sin.to(self.rope_sin.device)[at]
        return self.rope_cos[at].to(dtype), self.rope_sin[at].to(dtype)

    def _shared(self) -> Shared | None:
        """Where layers leave their latents for the next ones in one pass, if these read them."""
        if self.config.use_mla and self.config.mla_share_cache > 1:
            return {}
        return None

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
        shared = self._shared()
        for block in blocks[:layer]:
            x = block(x, None, rotation, shared)
        block = blocks[layer]
        if shared is None:
            return block.attn.weights(block.ln_1(x), rotation)
        return block.attn.weights(block.ln_1(x), rotation, shared)

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
        mask: Tensor | None = None,
        speculate: int | None = None,
        draft: "GPT | None" = None,
    ) -> Tensor:
        """
        Continue idx (B, T), T >= 1, by n <= max_new_tokens tokens: (B, T + n), without dropout.

        temperature 0 is argmax; top_k None or 0 and top_p None or 1 are off. stop: token ids; a
        sequence that drew one repeats it, and when all have, generation ends. use_cache=False
        recomputes a sliding window every step. A given cache holds the first cache.pos tokens of
        idx, and then all of the result but its last, or the newest if it cannot hold them;
        cache_dtype is that of the cache made otherwise. mask (B, T) bool: which tokens of idx are
        real, for prompts of unequal lengths with padding on either side; a given cache must then be
        empty. speculate: how many drafts a pass checks at most, for one sequence: tokens that
        `draft`, another model with the same tokens, proposes, or without one this model's
        predictor. Raises ValueError for arguments out of range.
        """
        sampler = Sampler(temperature, top_k, top_p, generator)
        require(speculate is not None or draft is None, "speculate", None, "a number with a draft")
        if speculate is not None:
            if cache is not None or mask is not None or not use_cache:
                own = f"speculate={speculate} has a cache of its own"
                raise ValueError(f"{own}: leave out cache, mask and use_cache")
            speculation = Speculation(self, speculate, draft, cache_dtype)
            tokens = list(speculation.stream(idx, max_new_tokens, sampler, stop))
            return torch.cat([idx, *tokens], dim=1)
        if cache is not None:  # before it is made ready, which may empty it
            self._check_made_for(cache)
        for token in stream_tokens(
            self, idx, max_new_tokens, sampler, use_cache, cache_dtype, cache, stop, mask=mask
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
