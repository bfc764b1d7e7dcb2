"""What a model costs: parameters, cached numbers, operations, and how much of a GPU it uses."""

import re
from pathlib import Path

import torch
from torch import nn

from model import ATTENTION, GPT, Attention, GPTConfig
from nanomla.errors import UserError

MEMINFO, OWN_CGROUPS, CGROUPS = "/proc/meminfo", "/proc/self/cgroup", "/sys/fs/cgroup"

# Dense bfloat16 matrix peak, FLOP/s, from the vendors' data sheets; float16 has the same rate.
GPU_PEAKS = {
    "B200": 2250e12, "H200": 989e12, "H100": 989e12, "H100 PCIe": 756e12, "A100": 312e12,
    "L40S": 362e12, "A10": 125e12, "V100": 125e12, "L4": 121e12, "T4": 65e12, "RTX 5090": 209.5e12,
    "RTX 4090": 165.2e12, "RTX 3090": 71e12,
}  # fmt: skip


def parameters(config: GPTConfig) -> int:
    """The model's parameters, shared ones once, by arithmetic: nothing is built or allocated."""
    C, V, b, inner = config.n_embd, config.vocab_size, int(config.bias), config.hidden
    norm = C if config.norm == "rmsnorm" else C * (1 + b)
    mlp = (3 if config.mlp == "swiglu" else 2) * C * inner + b * C
    mlp += b * inner * (2 if config.mlp == "swiglu" else 1)
    positions = config.block_size * C if config.pos_emb == "learned" else 0
    n = positions + norm + V * C * (1 if config.tie_weights else 2)
    n += config.n_layer * (mlp + 2 * norm)
    n += sum(layers * _attention_parameters(of) for of, layers in config.spans)
    if config.use_mla and config.mla_share_latent:
        n -= (config.n_layer - 1) * _latent_projection(config)
    return n


def _attention_parameters(config: GPTConfig) -> int:
    """Those of one layer's attention."""
    C, b, heads, hs = config.n_embd, int(config.bias), config.n_head * config.hs, config.hs
    n = heads * C + b * C  # c_proj
    if config.attention == "latent_tokens":
        return n + (C + b) * 3 * heads + (C + 1) * config.n_head * config.n_latent_tokens
    value_heads = config.n_head if config.use_mla else config.nkv
    read = config.mla_latent_dim if config.use_mla else C  # what values are computed from
    if config.use_svd:
        n += value_heads * config.svd_rank * (read + hs)
    if not config.use_mla:
        return n + (C + b) * (heads + value_heads * hs * (1 if config.use_svd else 2))
    L, r, decoupled = read, config.mla_rope_dim, config.mla_rope == "decoupled"
    queries = config.n_head * (config.nope + r if decoupled else L)
    width, normed = config.mla_q_latent_dim, config.mla_norm != "none"
    n += (C + b) * queries if width is None else width * (C + normed + queries)
    n += _latent_projection(config) + L * normed
    n += L * config.n_head * config.nope if decoupled else 0
    return n if config.use_svd else n + L * heads


def _latent_projection(config: GPTConfig) -> int:
    beside = config.mla_rope_dim if config.mla_rope == "decoupled" else 0
    out = config.mla_groups * config.mla_latent_dim + beside
    return (config.n_embd + config.bias) * out


def training_bytes(config: GPTConfig, rows: int, optimizer_bytes_per_parameter: int = 8) -> int:
    """
    What training on `rows` sequences at a time takes at least, in bytes: weights, gradients and
    optimizer state, logits and their gradient, and the residual stream before every layer.
    """
    tokens, float32 = rows * config.block_size, 4
    numbers = tokens * (2 * config.vocab_size + config.n_layer * config.n_embd)
    per_parameter = 2 * float32 + optimizer_bytes_per_parameter
    return parameters(config) * per_parameter + numbers * float32


def free_memory(device: str | torch.device) -> int | None:
    """Bytes that can still be allocated on a device; None where that cannot be found out."""
    device = torch.device(device)
    if device.type == "cuda":  # what torch holds but does not use is free, too
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type != "cpu" or not Path(MEMINFO).is_file():
        return None
    available = re.search(r"^MemAvailable: *(\d+) kB$", Path(MEMINFO).read_text(), re.MULTILINE)
    return min([int(available[1]) * 1024] * bool(available) + _free_in_cgroups(), default=None)


def _free_in_cgroups() -> list[int]:
    """Bytes left in this process's control group and those around it, where they have a limit."""
    own = Path(OWN_CGROUPS).read_text() if Path(OWN_CGROUPS).is_file() else ""
    inner = re.search(r"^0::/(.*)$", own, re.MULTILINE)
    folder, free = Path(CGROUPS, inner[1] if inner else ""), []
    for group in (folder, *folder.parents):
        if (group / "memory.max").is_file():
            names = (group / f"memory.{name}" for name in ("max", "current", "stat"))
            limit, used, stat = (path.read_text() for path in names)
            files = re.findall(r"^(?:in)?active_file (\d+)$", stat, re.MULTILINE)  # can be dropped
            if limit.strip() != "max":
                free.append(max(int(limit) - int(used) + sum(map(int, files)), 0))
    return free


def require_memory(nbytes: int, what: str, device: str | torch.device, remedy: str) -> None:
    """Raise UserError if a device has less memory free than that."""
    free = free_memory(device)
    if free is not None and nbytes > free:
        needs = f"{what} needs {in_units(nbytes)}, {in_units(free)} are free"
        raise UserError(f"{needs}; {remedy}")


def in_units(nbytes: int) -> str:
    """Bytes for people to read: 4.0 TB."""
    for power, unit in enumerate(("bytes", "kB", "MB", "GB", "TB", "PB", "EB")):
        if nbytes < 1000 ** (power + 1):
            return f"{nbytes / 1000**power:.{min(power, 1)}f} {unit}"
    return "over 1,000 EB"


def cached_numbers(config: GPTConfig) -> float:
    """Numbers that one more token takes in the cache of the average layer; 0 for a state."""
    cache = ATTENTION[config.attention].Cache
    return (cache.numbers_at(config, 1) - cache.numbers_at(config, 0)) / config.n_layer


def cache_in_words(config: GPTConfig) -> str:
    """What the cache holds, beside MHA's of the same width, for people to read."""
    ratio, numbers = memory_savings(config, config.block_size), cached_numbers(config)
    beside = f"{ratio:.3g}x fewer than MHA" if ratio > 1 else f"{1 / ratio:.3g}x more than MHA"
    if numbers:
        words = f"{numbers:g} cached numbers per token and layer"
    else:
        state = ATTENTION[config.attention].Cache.numbers_at(config, 1) // config.n_layer
        words = f"a state of {state} numbers per layer"
        beside += f" at {config.block_size} tokens"
    return words if beside.startswith("1x ") else f"{words}, {beside}"


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

    absorbed: as in decoding, where MLA attends over latents and values stay in SVD's subspace; else
    as in training, over expanded keys and by value maps that are multiplied out.
    """
    weights = model.lm_head.weight.numel()
    for block in model.transformer.h:
        weights += sum(p.numel() for p in block.parameters() if p.dim() > 1)
    attns = [block.attn for block in model.transformer.h]
    weights += sum(_beyond_factors(attn, absorbed) for attn in attns if attn.config.use_svd)
    phase = "decoding" if absorbed else "training"
    per_head = sum(a.numbers_per_key[phase] * context + a.numbers_per_token for a in attns)
    return 2 * weights + 2 * model.config.n_head * per_head


def _beyond_factors(attn: Attention, decoding: bool) -> int:
    """Multiplications per token by SVD's value maps, less the numbers of their factors."""
    down, up = attn.values
    factors, (heads, hs, _) = down.numel() + up.numel(), up.shape
    if decoding or attn.config.attention == "rotary_latent":  # which always reads by its factors
        return up.numel() * (attn.nh // heads) + down.numel() - factors  # up for every query head
    return heads * hs * down.size(1) - factors


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
