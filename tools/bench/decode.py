"""What one more token takes: a layer on a long cache, a 124M GPT, and several long sequences."""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from model import GPT, GPTConfig
from nanomla import costs
from nanomla.cache import dtype_name
from nanomla.generate import DecodingStep
from tools.bench import comparison
from tools.bench.timing import (
    Limits,
    Rows,
    Timed,
    alternate,
    fill,
    measure_limits,
    table,
)

MLA = {"use_mla": True, "mla_latent_dim": 192}
LAYERS = {  # what is timed alone; MHA and MLA come first
    "MHA": {},
    "MLA": MLA,
    "GQA, 6 key/value heads": {"n_kv_head": 6},
    "MQA": {"n_kv_head": 1},
    "MLA, 4 groups": {"use_mla": True, "mla_latent_dim": 48, "mla_groups": 4},
    "MLA + SVD": MLA | {"use_svd": True, "svd_rank": 16},
    "MLA, rotary latent": MLA | {"pos_emb": "rope", "mla_rope": "latent"},
    "64 latent tokens": {"use_latent_tokens": True, "n_latent_tokens": 64},
}
MODELS = {
    "MHA": {},
    "GQA, 3 key/value heads": {"n_kv_head": 3},
    "MLA, L = 192": MLA,
    "MLA, L = 192, rotary 32": MLA | {"pos_emb": "rope", "mla_rope_dim": 32},
    "MLA, rotary latent, L = 192": MLA | {"pos_emb": "rope", "mla_rope": "latent"},
}


@torch.inference_mode()
def measure(device: str, rounds: int, vs_hf: bool) -> Rows:
    """All tables."""
    limits = measure_limits(device)
    on_gpu = device.startswith("cuda")
    fewer = max(rounds // 3, 3)  # for what takes long
    dtypes = (torch.float32, torch.bfloat16)
    rows: Rows = []
    if not on_gpu:  # where `kernel` times a layer without the time in which Python launches it
        for dtype in dtypes:
            rows += one_layer(device, rounds, dtype, limits, vs_hf)
    for dtype in dtypes:
        rows += gpt(device, rounds, dtype, limits, vs_hf)
    rows += long_context(device, fewer, limits, 8192, 8, torch.float32)
    if on_gpu:  # takes minutes on a CPU
        rows += long_context(device, fewer, limits, 32768, 1, torch.bfloat16)
    return rows


def one_layer(device: str, rounds: int, dtype: torch.dtype, limits: Limits, vs_hf: bool) -> Rows:
    """One attention layer of 24 heads of 32, one new token on 32,768 cached ones; L = 192."""
    S, C, nh = 32768, 768, 24
    base = {"block_size": S, "vocab_size": 64, "n_layer": 1, "n_head": nh, "bias": False}
    x = torch.randn(1, 1, C, device=device, dtype=dtype)
    entries = []
    models = {}
    for name, settings in LAYERS.items():
        model = GPT(GPTConfig(**base, **settings)).to(device, dtype).eval()
        models[name] = model
        attn = model.transformer.h[0].attn
        cache = fill(model.make_cache(1, S), S - 1)
        weights = sum(p.numel() for p in attn.parameters() if p.dim() > 1)
        flops = attn.flops_per_key(True) * S + attn.flops_per_token(True) - 2 * weights
        rotation = None
        if model.config.rotary_dim:
            rotation = (model.rope_cos[-1:], model.rope_sin[-1:])
        run = lambda a=attn, layer=cache.layers[0], rotation=rotation: a(x, layer, rotation)
        entries.append(Timed(name, run, cache=cache, nbytes=cache.nbytes, flops=flops))
    mha, mla = entries[:2]
    dense = models["MHA"].transformer.h[0].attn
    latent = models["MLA"].transformer.h[0].attn
    for entry, attn in ((mha, dense), (mla, latent)):
        cache = fill(models[entry.name].make_cache(1, S, torch.int8), S - 1)
        run = lambda a=attn, layer=cache.layers[0]: a(x, layer)
        name = f"{entry.name}, int8 cache"
        nbytes = cache.nbytes
        entries.append(dataclasses.replace(entry, name=name, run=run, cache=cache, nbytes=nbytes))
    k, v = mha.cache.tensors

    def plain() -> Tensor:  # as most code uses a cache; it writes nothing, which favours it
        q = dense.c_attn(x).split(C, dim=2)[0].view(1, 1, nh, C // nh).transpose(1, 2)
        return dense.c_proj(F.scaled_dot_product_attention(q, k, v).view(1, 1, C))

    def expand() -> Tensor:
        return latent(x, mla.cache.layers[0], absorb=False)

    name = "MHA by scaled_dot_product_attention"
    entries.append(dataclasses.replace(mha, name=name, run=plain))
    name = "MLA, expanding every step"
    entries.append(dataclasses.replace(mla, name=name, run=expand, slow=True, flops=0))
    if vs_hf:
        run = comparison.deepseek_layer(nh, S, MLA["mla_latent_dim"], x)
        entries.append(Timed("transformers DeepseekV3Attention", run, slow=True))
    alternate(entries, rounds, device)
    rows = []
    for e in entries:
        row = {"attention": e.name, "ms": f"{e.seconds * 1e3:.2f}"}
        row["MHA / this"] = f"{mha.seconds / e.seconds:.2f}"
        row["this / MLA"] = f"{e.seconds / mla.seconds:.1f}"
        if e.cache is not None:
            row["cache bytes/token"] = f"{e.cache.bytes_per_token:,}"
        if e.flops:
            row["x roofline"] = limits.beside(e, dtype)
        rows.append(row)
    shape = "One layer, 24 heads of 32, L = 192, 32,768 cached tokens, one new one"
    return table(f"{shape}, {dtype_name(dtype)}", rows)


def decoding(name: str, model: GPT, B: int, context: int, max_len: int, n: int) -> Timed:
    """
    n greedy steps of B sequences with a context of random tokens, in a cache that holds max_len, as
    model.generate takes them; counted as one step at this context.
    """
    cache = model.make_cache(B, max_len)
    end = min(context - 1 + n, max_len)
    first = torch.randint(model.config.vocab_size, (B, 1), device=cache.device)
    fill(cache, end)
    step = lambda token: model(token, cache=cache)[0]
    if DecodingStep.is_faster(model, cache):
        step = DecodingStep(model, cache)

    def run() -> None:
        cache.rewind(end - n)
        token = first
        for _ in range(n):
            token = step(token)[:, -1].argmax(-1, keepdim=True)

    nbytes = sum(p.nbytes for p in model.parameters()) + cache.nbytes_at(context)
    flops = B * costs.flops_per_token(model, context, absorbed=True)
    return Timed(name, run, cache=cache, nbytes=nbytes, flops=flops, steps=n)


def beside_mha(entries: list[Timed], unit: str, limits: Limits, dtype: torch.dtype) -> Rows:
    """Rows of whole models, the first of which is MHA; the last may be of transformers."""
    others = {"MHA": entries[0]}
    if "transformers" in entries[-1].name:
        others["transformers"] = entries[-1]
    rows = []
    for e in entries:
        sequences = 1 if e.cache is None else e.cache.batch_size
        row = {"model": e.name, f"ms/{unit}": f"{e.seconds * 1e3:.2f}"}
        row["tokens/s"] = f"{sequences / e.seconds:.1f}"
        for name, other in others.items():
            row[f"{name} / this"] = f"{other.seconds / e.seconds:.2f}"
        if e.cache is not None:
            row["cache bytes/token"] = f"{e.cache.bytes_per_token:,}"
            row["x roofline"] = limits.beside(e, dtype)
        rows.append(row)
    return rows


def gpt(device: str, rounds: int, dtype: torch.dtype, limits: Limits, vs_hf: bool) -> Rows:
    """A 124M GPT, batch 1, 8 greedy tokens from a context of 1,000."""
    context = 1000
    n = 8
    idx = torch.randint(50257, (1, context), device=device)
    models = {}
    entries = []
    for name, settings in MODELS.items():
        models[name] = GPT(GPTConfig(**settings)).to(device, dtype).eval()
        entries.append(decoding(name, models[name], 1, context, 1024, n))
    uncached = lambda: models["MHA"](idx)[0].argmax(-1)
    entries.append(Timed("MHA, no cache (1 token)", uncached, slow=True))
    if vs_hf:
        run = comparison.gpt2_decoding(device, dtype, idx, n)
        entries.append(Timed("transformers GPT2LMHeadModel.generate", run, steps=n))
    alternate(entries, rounds, device)
    rows = beside_mha(entries, "token", limits, dtype)
    return table(f"A 124M GPT, context 1,000, batch 1, greedy, {dtype_name(dtype)}", rows)


def long_context(
    device: str, rounds: int, limits: Limits, S: int, B: int, dtype: torch.dtype
) -> Rows:
    """A 124M GPT with rotary positions, B sequences at S tokens of context."""
    n = 8 if device.startswith("cuda") else 1  # steps in a run; a CPU takes seconds for one
    mha = GPTConfig(block_size=S, pos_emb="rope")
    mla = dataclasses.replace(mha, use_mla=True, mla_latent_dim=160, mla_rope_dim=32)
    entries = []
    for name, config in (("MHA", mha), ("MLA, L = 160, rotary 32", mla)):
        model = GPT(config).to(device, dtype).eval()
        entries.append(decoding(name, model, B, S, S, n))
    alternate(entries, rounds, device)
    rows = beside_mha(entries, "step", limits, dtype)
    shape = f"The same at {S:,} tokens of context, batch {B}, rotary"
    return table(f"{shape}, {dtype_name(dtype)}", rows)
