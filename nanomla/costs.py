"""What a model costs: parameters, cached numbers, operations, and how much of a GPU it uses."""

import re

import torch
from torch import nn

from model import ATTENTION, GPT, Attention, GPTConfig

# Dense bfloat16 matrix peak, FLOP/s, from the vendors' data sheets; float16 has the same rate.
GPU_PEAKS = {
    "B200": 2250e12, "H200": 989e12, "H100": 989e12, "H100 PCIe": 756e12, "A100": 312e12,
    "L40S": 362e12, "A10": 125e12, "V100": 125e12, "L4": 121e12, "T4": 65e12, "RTX 5090": 209.5e12,
    "RTX 4090": 165.2e12, "RTX 3090": 71e12,
}  # fmt: skip


def cached_numbers(config: GPTConfig) -> float:
    """Numbers that one more token takes in the cache of the average layer; 0 for a state."""
    cache = ATTENTION[config.attention].Cache
    return (cache.numbers_at(config, 1) - cache.numbers_at(config, 0)) / config.n_layer


def cache_in_words(config: GPTConfig) -> str:
    """What the cache holds, beside MHA's of the same width, for people to read."""
    fewer = f"{memory_savings(config, config.block_size):.3g}x fewer than MHA"
    numbers = cached_numbers(config)
    if numbers:
        return f"{numbers:g} cached numbers per token and layer, {fewer}"
    state = ATTENTION[config.attention].Cache.numbers_at(config, 1) // config.n_layer
    return f"a state of {state} numbers per layer, {fewer} at {config.block_size} tokens"


def count_kv_parameters(module: nn.Module) -> int:
    """How many numbers make keys and values in a GPT or an attention block; shared ones once."""
    counts: dict[nn.Parameter, int] = {}
    for block in (m for m in module.modules() if isinstance(m, Attention)):
        for name, p in block.named_parameters():
            if name.startswith("c_attn"):  # its first nh * hs rows make queries
                counts[p] = p.numel() // p.size(0) * (p.size(0) - block.nh * block.hs)
            elif not name.startswith(("q_", "c_proj")):
                counts[p] = p.numel()
    return sum(counts.values())


def compression_ratio(module: nn.Module) -> float:
    """MHA's key and value parameters over those of a GPT or an attention block."""
    blocks, config = sum(isinstance(m, Attention) for m in module.modules()), module.config
    dense = 2 * config.n_head * config.hs * (config.n_embd + config.bias)
    return blocks * dense / count_kv_parameters(module)


def memory_savings(config: GPTConfig, sequence_length: int) -> float:
    """MHA's cache bytes at that length, at least 1, over this config's."""
    if sequence_length < 1:
        raise ValueError(f"sequence_length={sequence_length} does not work: it must be at least 1")
    dense = 2 * config.n_layer * config.n_head * config.hs * sequence_length
    return dense / ATTENTION[config.attention].Cache.numbers_at(config, sequence_length)


def flops_per_token(model: GPT, context: int, absorbed: bool = False) -> int:
    """
    Floating-point operations of the forward pass for one token that attends over `context` keys:
    two per weight of every matrix and two per key, head and number in scores and average.

    absorbed: MLA attends over latents, as in decoding; else over expanded keys, as in training.
    """
    weights = model.lm_head.weight.numel()
    for block in model.transformer.h:
        weights += sum(p.numel() for p in block.parameters() if p.dim() > 1)
    attns = [block.attn for block in model.transformer.h]
    per_head = sum(attn.numbers_per_key(decoding=absorbed) * context for attn in attns)
    per_head += sum(attn.numbers_per_token() for attn in attns)
    return 2 * weights + 2 * model.config.n_head * per_head


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
