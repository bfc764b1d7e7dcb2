"""What a model costs: parameters, cached numbers, operations, and how much of a GPU it uses."""

import dataclasses
import re
from collections.abc import Iterator

import torch
from torch import nn

from model import GPT, GPTConfig, MixtureOfExperts
from nanomla.attention import cached_numbers_at

# Dense bfloat16 matrix peak, FLOP/s, from the vendors' data sheets; float16 has the same rate.
GPU_PEAKS = {
    "B200": 2250e12, "H200": 989e12, "H100": 989e12, "H100 PCIe": 756e12, "A100": 312e12,
    "L40S": 362e12, "A10": 125e12, "V100": 125e12, "L4": 121e12, "T4": 65e12, "RTX 5090": 209.5e12,
    "RTX 4090": 165.2e12, "RTX 3090": 71e12,
}


def on_meta(config: GPTConfig) -> GPT:
    """A model without memory for its weights, to be counted."""
    with torch.device("meta"):
        return GPT(config)


def parameters(config: GPTConfig) -> int:
    """The model's parameters, shared ones once."""

    def count(n_layer: int) -> int:
        block_size = config.block_size if config.pos_emb == "learned" else 2
        shape = dataclasses.replace(config, n_layer=n_layer, block_size=block_size)
        return sum(p.numel() for p in on_meta(shape).parameters())

    if isinstance(config.mla_latent_dim, tuple) or config.moe_experts:  # layers differ
        return count(config.n_layer)
    first = count(1)
    return first + (config.n_layer - 1) * (count(2) - first)


def idle_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Parameters of as many experts as a token does not pass, in a model or a part of one."""
    for layer in model.modules():
        if isinstance(layer, MixtureOfExperts):
            yield from layer.experts[layer.config.moe_active :].parameters()


def training_bytes(config: GPTConfig, sequences: int, moments: int) -> int:
    """
    What training on so many sequences at a time takes at least, in bytes: weights, gradients and
    an optimizer's moments, logits and their gradient, and the residual stream before every layer.
    """
    tokens = sequences * config.block_size
    losses = 1 + config.n_predict
    numbers = tokens * (2 * losses * config.vocab_size + config.n_layer * config.n_embd)
    return 4 * ((2 + moments) * parameters(config) + numbers)  # float32


def cached_numbers(model: GPT) -> float:
    """Numbers that one more token takes in the cache of the average layer; 0 for a state."""
    attentions = [block.attn for block in model.transformer.h]
    more = sum(cached_numbers_at(attn, 2) - cached_numbers_at(attn, 1) for attn in attentions)
    return more / len(attentions)


def cache_in_words(model: GPT) -> str:
    """What the cache holds, beside MHA's of the same width, for people to read."""
    context = model.config.block_size
    ratio = model.get_memory_savings(context)
    numbers = cached_numbers(model)
    if numbers:
        words = f"{numbers:g} cached numbers per token and layer"
    else:
        words = f"a state of {cached_numbers_at(model.transformer.h[0].attn, 1)} numbers per layer"
    if f"{ratio:.3g}" == "1":
        return words
    beside = f"{ratio:.3g}x fewer than MHA" if ratio > 1 else f"{1 / ratio:.3g}x more than MHA"
    if not numbers:
        beside += f" at {context} tokens"
    return f"{words}, {beside}"


def count_kv_parameters(model: GPT) -> int:
    """How many numbers make keys and values in a GPT; shared ones count once."""
    counts = {}
    for block in model.transformer.h:
        counts |= block.attn.key_value_parameters()
    return sum(counts.values())


def flops_per_token(model: GPT, context: int, absorbed: bool = False) -> int:
    """
    Floating-point operations of the forward pass for one token that attends over `context` keys:
    two per weight of every matrix that it passes and two per key, head and number in scores and
    averages.

    absorbed: as in decoding, where MLA attends over latents and values stay in SVD's subspace; else
    as in training, over expanded keys and by value maps that are multiplied out.
    """
    flops = 2 * model.lm_head.weight.numel()
    blocks = list(model.transformer.h)
    if model.config.n_predict and not absorbed:  # it does not decode
        flops += 2 * model.lm_head.weight.numel() + 2 * model.predictor.eh_proj.weight.numel()
        blocks.append(model.predictor.h)
    for block in blocks:
        flops += 2 * sum(p.numel() for p in block.mlp.parameters() if p.dim() > 1)
        flops -= 2 * sum(p.numel() for p in idle_parameters(block) if p.dim() > 1)
        flops += block.attn.flops_per_token(absorbed)
        flops += block.attn.flops_per_key(absorbed) * context
    return flops


def mfu(
    model: GPT, context: int, tokens_per_s: float, device_type: str, dtype: str
) -> float | None:
    """
    Share of the GPU's peak that goes into the model's arithmetic, three times the forward pass;
    None where the peak is not known.
    """
    if device_type != "cuda" or dtype == "float32":
        return None
    name = torch.cuda.get_device_name()
    named = [key for key in GPU_PEAKS if re.search(rf"\b{key}\b", name)]
    if not named:
        return None
    peak = GPU_PEAKS[max(named, key=len)]  # the longest name, as "H100 PCIe" is slower than "H100"
    return 3 * flops_per_token(model, context) * tokens_per_s / peak
