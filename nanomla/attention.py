"""
What every attention block is asked for. model.py and latent_tokens.py have the blocks themselves;
docs/extending.md adds one.

Letters: B sequences, T new tokens, C = n_embd, nh heads, hs head size.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from nanomla.cache import LayerCache
from nanomla.checks import require

# cos and sin, each (T, dim / 2), or (B, T, dim / 2) if sequences differ; None: nothing is rotated
Rotation = tuple[Tensor, Tensor] | None


# ---- Padding
def real_first(mask: Tensor, B: int, T: int) -> tuple[Tensor, Tensor]:
    """
    The order (B, T) that moves the real tokens among the last T of mask (B, S) before the padding,
    and the number of real ones, (B,).

    A causal attention does not look at what follows. So tokens in this order need no mask, and get
    the positions that they have without padding. Raises ValueError for another shape or dtype.
    """
    fits = mask.dtype == torch.bool and mask.dim() == 2 and len(mask) == B and mask.size(1) >= T
    works = f"bool, ({B}, S) with S of at least {T}"
    require(fits, "mask", f"{mask.dtype} {tuple(mask.shape)}", works)
    new = mask[:, -T:]
    return new.logical_not().byte().argsort(dim=1, stable=True), new.sum(dim=1)


def in_order(x: Tensor, order: Tensor) -> Tensor:
    """The tokens of x (B, T, C) in an order (B, T)."""
    return x.take_along_dim(order.unsqueeze(-1), dim=1)


# ---- The block
class Attention(nn.Module):
    """
    An attention layer: x (B, T, C) -> (B, T, C). config is a GPTConfig.

    A subclass registers its modules in __init__ and ends it with self.init_alone(); it defines
    new_cache, forward, weights, flops_per_key and words, and check if it has settings.
    """

    reads: tuple[str, ...] = ()  # settings of GPTConfig, or beginnings of them, that only it reads

    def __init__(self, config: Any, layer: int = 0) -> None:
        super().__init__()
        self.config = config
        self.nh = config.n_head
        self.hs = config.hs

    @staticmethod
    def check(config: Any) -> None:
        """Fill in what None stands for. Raises ValueError naming field, value and what works."""

    @staticmethod
    def rotary_dim(config: Any) -> int:
        """How many numbers of a query are rotated by its position, under pos_emb='rope'."""
        return config.hs

    def new_cache(self, batch_size: int, max_len: int, dtype=torch.float32, device="cpu"):
        """An empty cache for max_len tokens of batch_size sequences."""
        raise TypeError(f"{type(self).__name__} has no cache")

    def forward(
        self,
        x: Tensor,
        cache: LayerCache | None = None,
        rotation: Rotation = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """
        x (B, T, C) -> (B, T, C). With a cache, x continues it, and the caller advances it.
        rotation: that of the positions of x; None: nothing is rotated, or, under pos_emb='rope',
        attention is used without a GPT and computes it itself.
        mask (B, S) bool: which tokens are real, as in a GPT's forward; without a GPT only.
        """
        raise TypeError(f"{type(self).__name__} has no forward pass")

    def masked(self, x: Tensor, cache: LayerCache | None, mask: Tensor) -> Tensor:
        """forward of x (B, T, C) with padding, without a GPT. What padding gets means nothing."""
        order, real = real_first(mask, *x.shape[:2])
        if cache is not None:
            cache.expect(real)
        y = self(in_order(x, order), cache)
        return in_order(y, order.argsort(dim=1))

    def weights(self, x: Tensor, rotation: Rotation = None) -> Tensor:
        """What every token of x (B, T, C) reads of all: (B, nh, T, T)."""
        raise TypeError(f"{type(self).__name__} does not say what a token reads")

    @property
    def words(self) -> str:
        """What a person calls this attention, with its sizes."""
        return type(self).__name__

    def flops_per_key(self, decoding: bool) -> int:
        """Operations of one new token for every key that it sees, in scores and averages."""
        return 4 * self.nh * self.hs

    def flops_per_token(self, decoding: bool) -> int:
        """Operations of one new token besides: two per weight of every matrix."""
        return 2 * sum(p.numel() for p in self.parameters() if p.dim() > 1)

    def key_value_parameters(self) -> dict[nn.Parameter, int]:
        """Of every parameter, how many numbers make keys and values."""
        counts = {}
        for name, parameter in self.named_parameters():
            if name.startswith("c_attn"):  # its first nh * hs rows make queries
                rows = parameter.size(0)
                counts[parameter] = parameter.numel() // rows * (rows - self.nh * self.hs)
            elif not name.startswith(("q_", "c_proj", "gate_proj")):
                counts[parameter] = parameter.numel()
        return counts

    def get_compression_ratio(self) -> float:
        """Key and value parameters of MHA with as many heads over this block's."""
        return mha_key_value_parameters(self.config) / sum(self.key_value_parameters().values())

    def get_memory_savings(self, sequence_length: int) -> float:
        """MHA's cache bytes at that length over this block's."""
        mha = 2 * self.nh * self.hs * sequence_length
        cached = cached_numbers_at(self, sequence_length)
        if cached == 0:  # it reads another layer's
            return math.inf
        return mha / cached

    def get_cache_size_ratio(self) -> float:
        """This block's cache bytes over MHA's, at one token."""
        return 1 / self.get_memory_savings(1)

    def init_alone(self) -> None:
        """Draw the weights as a GPT does, which draws them again in its own order."""
        if not next(self.parameters()).is_meta:
            with torch.random.fork_rng(devices=[]):
                init_weights(self, self.config.n_layer)

    def init_values(self) -> None:
        """Draw what init_weights leaves: value maps that are kept as factors, if there are any."""


@torch.no_grad()
def init_weights(module: nn.Module, n_layer: int) -> None:
    """
    Draw the weights of linear layers and embeddings: normal, standard deviation 0.02, but c_proj's
    0.02 / sqrt(2 n_layer), which keeps the residual stream's variance over depth (GPT-2). Their
    biases are 0. Norms stay as they are built; init_values draws what is left.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            nn.init.normal_(part.weight, std=0.02)
        if isinstance(part, nn.Linear) and part.bias is not None:
            nn.init.zeros_(part.bias)
    for name, parameter in module.named_parameters():
        if name.endswith("c_proj.weight"):
            nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * n_layer))
    for part in module.modules():
        if isinstance(part, Attention):
            part.init_values()


def mha_key_value_parameters(config: Any) -> int:
    """How many numbers make keys and values in a block of MHA of the same width."""
    return 2 * config.n_head * config.hs * (config.n_embd + config.bias)


def cached_numbers_at(attention: Attention, n: int) -> int:
    """Numbers that n >= 1 tokens take in a block's cache."""
    cache = attention.new_cache(1, n, torch.float32, "meta")
    return cache.nbytes_at(n) // torch.float32.itemsize
