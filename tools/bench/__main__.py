"""
Time the attention variants against each other, against this machine's limits and transformers.

    python -m tools.bench decode [--vs_hf] [--vs_compiled]
                                            one layer at 32,768 tokens, a 124M GPT, a long batch; on
                                            a GPU also how many rows fit in MHA's memory
    python -m tools.bench kernel            attention over cached latents alone, in GB/s
    python -m tools.bench prefill           time and memory of prompts of 512 to 32,768 tokens
    python -m tools.bench train [--vs_hf]   one training iteration of every variant
    python -m tools.bench lengths           what a token costs in training, 512 to 16,384 of them
    python -m tools.bench serve             tokens/s of tools.serve for 1 client and for 16
    python -m tools.bench svd               exact against randomized factors
    python -m tools.bench profile config/train_mla.py
                                            where an iteration of a config's run goes
    python -m tools.bench config/train_mla.py --report
                                            a config's parameters, bytes and FLOPs beside MHA's

All that is compared runs in turn in one process, round after round; figures are medians over the
rounds, but for prefill's last table, of one pass each. --json=FILE writes them to a file too.
"""

import dataclasses
import functools
import importlib
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from model import ATTENTION, GPT, GPTConfig, factorise
from nanomla import checkpoint, costs, formats
from nanomla.cache import Cache
from nanomla.checks import Count, Natural, check
from nanomla.dataset import Dataset
from nanomla.distributed import resolve_device, resolve_dtype, warn0
from nanomla.errors import UsageError, UserError, cause, run_script
from nanomla.generate import PREFILL_CHUNK, DecodingStep, next_logits
from nanomla.kernels import on_gpu
from nanomla.memory import free_memory, in_units, require_memory
from nanomla.optim import make_optimizers
from nanomla.settings import configure, declared, run_config_file
from nanomla.start import padded_vocab
from tools.bench import kernel
from tools.bench.timing import (
    Limits,
    Rows,
    Timed,
    alternate,
    fill,
    in_ms,
    machine,
    measure_bandwidth,
    measure_limits,
    name_of,
    peak_bytes,
    table,
    write_json,
)
from train import TrainConfig

Rounds = Annotated[Count, Field(le=10_000)]


@dataclass
class BenchConfig:
    """The settings of `svd`, and of every command that times something."""

    headings: ClassVar[dict[str, str]] = {"device": "bench"}

    device: Annotated[str, "The device to run on: auto, cpu, cuda, cuda:1, ... or mps."] = "auto"
    seed: Annotated[Natural, Field(le=10**18), "The seed of weights and inputs."] = 1337
    json: Annotated[str | None, "A file that the figures are written to as well."] = None

    def __post_init__(self) -> None:
        check(self)


@dataclass
class RoundsConfig(BenchConfig):
    """The settings of `kernel`, `prefill` and `lengths`."""

    rounds: Annotated[Rounds, "The number of rounds that the medians are taken over."] = 15


@dataclass
class TimingConfig(RoundsConfig):
    """The settings of `train`, and with one more of `decode`."""

    vs_hf: Annotated[bool, "The GPT-2 and DeepSeek-V3 of transformers are timed too."] = False


@dataclass
class DecodeConfig(TimingConfig):
    """The settings of `decode`."""

    vs_compiled: Annotated[
        bool,
        "MHA over a static cache, compiled by torch.compile as gpt-fast does it, is timed too.",
    ] = False


@dataclass
class LoadConfig(BenchConfig):
    """The settings of `serve`."""

    clients: Annotated[Count, Field(le=1000), "The number of clients at once."] = 16
    tokens: Annotated[
        Count,
        Field(le=4096),
        "The number of tokens that each client asks for; of the 124M model, a quarter of it.",
    ] = 128
    rounds: Annotated[Rounds, "The number of rounds that the medians are taken over."] = 5


@dataclass
class ReportConfig:
    """The settings of --report: a model's, and what it is counted at."""

    headings: ClassVar[dict[str, str]] = {"report": "report"}

    model: GPTConfig = field(default_factory=lambda: GPTConfig(bias=False))
    report: Annotated[bool, "The model is counted and nothing is timed."] = False
    init_from: Annotated[
        str | None, "A run, an export or other weights whose model is counted instead."
    ] = None
    vocab_size: Annotated[
        Count | None, "The number of token ids of the model. None stands for the dataset's."
    ] = None
    dataset: Annotated[
        str | None,
        "The dataset: a folder below data/, or a path. None stands for the token ids of GPT-2.",
    ] = None
    context: Annotated[
        Annotated[Count, Field(le=10**9)] | None,
        "The number of tokens that a decoded token attends to. None stands for block_size.",
    ] = None
    json: Annotated[str | None, "A file that the figures are written to as well."] = None

    def __post_init__(self) -> None:
        check(self)


@dataclass
class ProfileConfig:
    """The settings of `profile`: a run's."""

    headings: ClassVar[dict[str, str]] = {"rounds": "profile"}

    train: TrainConfig = field(default_factory=TrainConfig)
    rounds: Annotated[Rounds, "The number of iterations that the medians are taken over."] = 60
    json: Annotated[str | None, "A file that the figures are written to as well."] = None

    def __post_init__(self) -> None:
        check(self)

    @property
    def device(self) -> str:
        return self.train.device

    @property
    def seed(self) -> int:
        return self.train.seed


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    commands = {
        "decode": (DecodeConfig, bench_decode),
        "kernel": (RoundsConfig, bench_kernel),
        "prefill": (RoundsConfig, bench_prefill),
        "train": (TimingConfig, bench_train),
        "lengths": (RoundsConfig, bench_lengths),
        "serve": (LoadConfig, bench_serve),
        "svd": (BenchConfig, bench_svd),
        "profile": (ProfileConfig, bench_profile),
        "--report": (ReportConfig, report),
    }
    given = [arg for arg in argv if arg.removesuffix("=True") in commands]
    if len(given) != 1 and not {"--help", "-h"} & set(argv):
        raise UsageError(f"say one of: {', '.join(commands)}")
    config_class, command = commands[given[0].removesuffix("=True") if given else "decode"]
    rest = [arg for arg in argv if arg not in commands]
    cfg, origins = configure(config_class, rest, ignored_in_files=declared(TrainConfig))
    parts = {name: declared(config_class)[name].part for name in origins}
    shape = [n for n, part in parts.items() if part == "model" or n in ("vocab_size", "dataset")]
    if command is report and cfg.init_from and shape:
        raise UsageError(f"init_from has its own {shape[0]}; leave out one of them")
    if getattr(cfg, "vs_hf", False):
        importlib.import_module("transformers")  # or one line that says how to install it
    device = resolve_device(getattr(cfg, "device", "cpu"))
    if isinstance(cfg, ProfileConfig):
        known = dataclasses.replace(cfg.train.model, vocab_size=cfg.train.vocab_size or 1)
        least = costs.training_bytes(known, cfg.train.batch_size, optimizer_bytes_per_parameter=4)
        require_memory(least, "the run", device, "use a smaller model or --batch_size")
    if command is not report:
        print(f"{machine(device)}, torch {torch.__version__}, seed {cfg.seed}")
        torch.manual_seed(cfg.seed)
    rows = command(cfg, device)
    if cfg.json:
        write_json(cfg.json, device, rows)


# ---- decode


@torch.inference_mode()
def bench_decode(cfg: DecodeConfig, device: str) -> Rows:
    """The tables of `decode`."""
    if cfg.vs_compiled:
        require_compiler(device)
    limits = measure_limits(device)
    rows: Rows = []
    if not device.startswith("cuda"):  # where `kernel` times a layer without Python's launches
        for dtype in (torch.float32, torch.bfloat16):
            rows += bench_layer(cfg, device, dtype, limits)
    for dtype in (torch.float32, torch.bfloat16):
        rows += bench_gpt(cfg, device, dtype, limits)
    rows += bench_long(cfg, device, limits, 8192, 8, torch.float32)
    if device.startswith("cuda"):  # takes minutes on a CPU
        rows += bench_long(cfg, device, limits, 32768, 1, torch.bfloat16)
        rows += bench_equal_memory(cfg, device, GPTConfig(block_size=8192), 16)
    return rows


def layer_variants(L: int) -> dict[str, dict[str, Any]]:
    """The settings of every attention that is timed alone; MHA and MLA come first."""
    latent = {"use_mla": True, "mla_latent_dim": L}
    return {
        "MHA": {},
        "MLA": latent,
        "GQA, 6 key/value heads": {"n_kv_head": 6},
        "MQA": {"n_kv_head": 1},
        "MLA, 4 groups": {"use_mla": True, "mla_latent_dim": L // 4, "mla_groups": 4},
        "MLA + SVD": latent | {"use_svd": True, "svd_rank": 16},
        "MLA, rotary latent": latent | {"pos_emb": "rope", "mla_rope": "latent"},
        "64 latent tokens": {"use_latent_tokens": True, "n_latent_tokens": 64},
    }


def bench_layer(cfg: DecodeConfig, device: str, dtype: torch.dtype, limits: Limits) -> Rows:
    """One attention layer of 24 heads of 32, one new token on 32,768 cached ones; L = 192."""
    S, L, C, nh = 32768, 192, 768, 24
    base = {"block_size": S, "vocab_size": 64, "n_layer": 1, "n_head": nh, "bias": False}
    x = torch.randn(1, 1, C, device=device, dtype=dtype)
    entries, models = [], {}
    for name, extra in layer_variants(L).items():
        models[name] = model = GPT(GPTConfig(**base, **extra)).to(device, dtype).eval()
        attn, cache = model.transformer.h[0].attn, fill(model.make_cache(1, S), S - 1)
        weights = sum(p.numel() for p in attn.parameters() if p.dim() > 1)
        flops = attn.flops_per_key(True) * S + attn.flops_per_token(True) - 2 * weights
        turn = (model.rope_cos[-1:], model.rope_sin[-1:]) if model.config.rotary_dim else None
        run = lambda attn=attn, kept=cache.layers[0], turn=turn: attn(x, kept, turn)
        entries.append(Timed(name, run, cache=cache, nbytes=cache.nbytes, flops=flops))
    mha, mla = entries[0], entries[1]
    for e in (mha, mla):
        attn = models[e.name].transformer.h[0].attn
        cache = fill(models[e.name].make_cache(1, S, torch.int8), S - 1)
        run = lambda attn=attn, kept=cache.layers[0]: attn(x, kept)
        name, nbytes = f"{e.name}, int8 cache", cache.nbytes
        entries.append(dataclasses.replace(e, name=name, run=run, cache=cache, nbytes=nbytes))
    dense, latent = (models[e.name].transformer.h[0].attn for e in (mha, mla))
    k, v = mha.cache.tensors

    def plain() -> Tensor:  # what most code does with a cache; it writes nothing, which favours it
        q = dense.c_attn(x).split(C, dim=2)[0].view(1, 1, nh, C // nh).transpose(1, 2)
        return dense.c_proj(F.scaled_dot_product_attention(q, k, v).view(1, 1, C))

    def expand() -> Tensor:
        return latent(x, mla.cache.layers[0], absorb=False)

    name = "MHA by scaled_dot_product_attention"
    entries.append(dataclasses.replace(mha, name=name, run=plain))
    name = "MLA, expanding every step"
    entries.append(dataclasses.replace(mla, name=name, run=expand, slow=True, flops=0))
    if cfg.vs_hf:
        run = hf_deepseek(nh, S, L, x)
        entries.append(Timed("transformers DeepseekV3Attention", run, slow=True))
    alternate(entries, cfg.rounds, device)
    rows = []
    for e in entries:
        row = {"attention": e.name, "ms": f"{e.seconds * 1e3:.2f}"}
        row["MHA / this"] = f"{mha.seconds / e.seconds:.2f}"
        row["this / MLA"] = f"{e.seconds / mla.seconds:.1f}"
        if e.cache is not None:
            row["cache bytes/token"] = f"{e.cache.bytes_per_token:,}"
        if e.flops:
            row["x roofline"] = f"{e.seconds / limits.seconds(e.nbytes, e.flops, dtype):.2f}"
        rows.append(row)
    what = "One layer, 24 heads of 32, L = 192, 32,768 cached tokens, one new one"
    return table(f"{what}, {name_of(dtype)}", rows)


def decode(model: GPT, cache: Cache, token: Tensor, end: int, n: int) -> Callable[[], None]:
    """
    A function of n greedy steps from token (B, 1), after which a cache of random tokens holds
    `end`, as model.generate takes them.
    """
    fill(cache, end)
    step = lambda token: model(token, cache=cache)[0]
    if DecodingStep.is_faster(model, cache):
        step = DecodingStep(model, cache)

    def run() -> None:
        cache.rewind(end - n)
        new = token
        for _ in range(n):
            new = step(new)[:, -1].argmax(-1, keepdim=True)

    return run


def bench_gpt(cfg: DecodeConfig, device: str, dtype: torch.dtype, limits: Limits) -> Rows:
    """A 124M GPT, batch 1, 8 greedy tokens from a context of 1,000."""
    context, n = 1000, 8
    rotary = {"pos_emb": "rope", "mla_rope_dim": 32}
    latent = {"use_mla": True, "mla_latent_dim": 192}
    variants = {
        "MHA": {},
        "GQA, 3 key/value heads": {"n_kv_head": 3},
        "MLA, L = 192": latent,
        "MLA, L = 192, rotary 32": {**latent, **rotary},
        "MLA, rotary latent, L = 192": {**latent, "pos_emb": "rope", "mla_rope": "latent"},
    }
    idx, entries, models = torch.randint(50257, (1, context), device=device), [], []
    for name, extra in variants.items():
        model = GPT(GPTConfig(**extra)).to(device, dtype).eval()
        cache = model.make_cache(1, 1024)
        run = decode(model, cache, idx[:, -1:], context - 1 + n, n)
        nbytes = sum(p.nbytes for p in model.parameters()) + cache.nbytes_at(context)
        flops = costs.flops_per_token(model, context, absorbed=True)
        entries.append(Timed(name, run, cache=cache, nbytes=nbytes, flops=flops, steps=n))
        models.append(model)
    mha, others = entries[0], {}
    uncached = lambda: models[0](idx)[0].argmax(-1)
    entries.append(Timed("MHA, no cache (1 token)", uncached, slow=True))
    if cfg.vs_hf:
        run = hf_gpt2(device, dtype, idx, n)
        others["transformers"] = Timed("transformers GPT2LMHeadModel.generate", run, steps=n)
    if cfg.vs_compiled:
        run = compiled_decode(models[0], idx, n)
        name = "MHA, static cache, torch.compile (as gpt-fast)"
        others["compiled MHA"] = Timed(name, run, steps=n)
    entries += others.values()
    alternate(entries, cfg.rounds, device)
    rows = []
    for e in entries:
        row = {"model": e.name, "ms/token": in_ms(e.seconds)}
        row["tokens/s"] = f"{1 / e.seconds:.1f}"
        row["MHA / this"] = f"{mha.seconds / e.seconds:.2f}"
        for name, other in others.items():
            row[f"{name} / this"] = f"{other.seconds / e.seconds:.2f}"
        if e.cache is not None:
            row["cache bytes/token"] = f"{e.cache.bytes_per_token:,}"
            row["x roofline"] = f"{e.seconds / limits.seconds(e.nbytes, e.flops, dtype):.2f}"
        rows.append(row)
    return table(f"A 124M GPT, context 1,000, batch 1, greedy, {name_of(dtype)}", rows)


def bench_long(
    cfg: DecodeConfig, device: str, limits: Limits, S: int, B: int, dtype: torch.dtype
) -> Rows:
    """A 124M GPT with rotary positions, B rows at S tokens of context."""
    n = 8 if device.startswith("cuda") else 1  # steps in a run; a CPU takes seconds for one
    variants = {
        "MHA": {},
        "MLA, L = 160, rotary 32": {"use_mla": True, "mla_latent_dim": 160, "mla_rope_dim": 32},
    }
    token, entries = torch.randint(50257, (B, 1), device=device), []
    for name, extra in variants.items():
        model = GPT(GPTConfig(block_size=S, pos_emb="rope", **extra)).to(device, dtype).eval()
        cache = model.make_cache(B, S)
        run = decode(model, cache, token, S, n)
        nbytes = sum(p.nbytes for p in model.parameters()) + cache.nbytes
        flops = B * costs.flops_per_token(model, S, absorbed=True)
        entries.append(Timed(name, run, cache=cache, nbytes=nbytes, flops=flops, steps=n))
    alternate(entries, max(cfg.rounds // 3, 3), device)
    rows = []
    for e in entries:
        row = {"model": e.name, "ms/step": in_ms(e.seconds)}
        row["tokens/s"] = f"{B / e.seconds:.1f}"
        row["MHA / this"] = f"{entries[0].seconds / e.seconds:.2f}"
        row["cache bytes/token"] = f"{e.cache.bytes_per_token:,}"
        least = limits.seconds(e.nbytes, e.flops, dtype)
        rows.append(row | {"x roofline": f"{e.seconds / least:.2f}"})
    what = f"The same at {S:,} tokens of context, batch {B}, rotary"
    return table(f"{what}, {name_of(dtype)}", rows)


def bench_equal_memory(cfg: DecodeConfig, device: str, base: GPTConfig, rows: int) -> Rows:
    """
    A model with rotary positions at base.block_size tokens of context, bfloat16: MHA with so many
    rows, or fewer where two such caches take over half of the free memory, and MLA of an eighth
    of the numbers with as many rows as fit in the bytes of MHA's cache.
    """
    S, C, dtype, n = base.block_size, base.n_embd, torch.bfloat16, min(8, base.block_size)
    mha = dataclasses.replace(base, pos_emb="rope")
    latent = {"mla_latent_dim": C // 4 - C // 24, "mla_rope_dim": C // 24}
    mla = dataclasses.replace(mha, use_mla=True, **latent)
    row_bytes = [costs.on_meta(c).make_cache(1, S, dtype).nbytes for c in (mha, mla)]
    free = free_memory(device) or 2**60
    while rows > 1 and 2 * rows * row_bytes[0] > free / 2:
        rows //= 2
    entries, parallel = [], [rows, rows * row_bytes[0] // row_bytes[1]]
    names = ["MHA", f"MLA, L = {mla.mla_latent_dim}, rotary {mla.mla_rope_dim}"]
    for name, config, B in zip(names, (mha, mla), parallel, strict=True):
        model = GPT(config).to(device, dtype).eval()
        token = torch.randint(config.vocab_size, (B, 1), device=device)
        cache = model.make_cache(B, S)
        run = decode(model, cache, token, S, n)
        entries.append(Timed(name, run, cache=cache, steps=n))
    alternate(entries, max(cfg.rounds // 3, 3), device)
    figures, rates = [], [B / e.seconds for B, e in zip(parallel, entries, strict=True)]
    for e, B, rate in zip(entries, parallel, rates, strict=True):
        row = {"model": e.name, "rows": f"{B:,}", "cache": in_units(e.cache.nbytes)}
        row |= {"ms/step": in_ms(e.seconds), "tokens/s": f"{rate:,.0f}"}
        figures.append(row | {"this / MHA": f"{rate / rates[0]:.2f}"})
    shape = f"{base.n_layer} layers, {C} wide, {S:,} tokens of context"
    return table(f"Throughput at equal memory, {shape}, rotary, {name_of(dtype)}", figures)


class StaticMHA(nn.Module):
    """
    One step of an MHA model with learned positions over a cache of fixed shape, in plain torch: all
    max_len rows take part, those after the token behind a mask, so that torch.compile can take it
    as a whole. It shares the model's weights.
    """

    def __init__(self, model: GPT, max_len: int) -> None:
        super().__init__()
        self.model, self.max_len = model, max_len
        shape = 1, model.config.n_head, max_len, model.config.hs
        for i in range(model.config.n_layer):  # each a buffer of its own, which is written in place
            self.register_buffer(f"keys{i}", model.lm_head.weight.new_zeros(shape))
            self.register_buffer(f"values{i}", model.lm_head.weight.new_zeros(shape))

    def forward(self, token: Tensor, pos: Tensor) -> Tensor:
        """The logits (1, 1, V) after token (1, 1), which is number pos (1,)."""
        parts, act = self.model.transformer, self.model.transformer.h[0].mlp.approximate
        seen = torch.arange(self.max_len, device=pos.device) <= pos  # (S,)
        x = F.embedding(token, parts.wte.weight) + F.embedding(pos, parts.wpe.weight)
        for i, block in enumerate(parts.h):
            keys, values = getattr(self, f"keys{i}"), getattr(self, f"values{i}")
            y = dense(normed(x, block.ln_1), block.attn.c_attn)
            q, k, v = y.view(1, 1, 3, block.attn.nh, -1).permute(2, 0, 3, 1, 4)  # (1, nh, 1, hs)
            keys.index_copy_(2, pos, k)
            values.index_copy_(2, pos, v)
            y = F.scaled_dot_product_attention(q, keys, values, attn_mask=seen[None])
            x = x + dense(y.transpose(1, 2).flatten(2), block.attn.c_proj)
            y = F.gelu(dense(normed(x, block.ln_2), block.mlp.c_fc), approximate=act)
            x = x + dense(y, block.mlp.c_proj)
        return F.linear(normed(x, parts.ln_f), self.model.lm_head.weight)

    def next_token(self, token: Tensor, pos: Tensor) -> Tensor:
        """The likeliest token after token, (1, 1)."""
        return self(token, pos)[:, -1].argmax(-1, keepdim=True)


def dense(x: Tensor, layer: nn.Linear) -> Tensor:
    return F.linear(x, layer.weight, layer.bias)


def normed(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def compiled(step: Callable[..., Tensor], device: str) -> Callable[..., Tensor]:
    """
    A step as gpt-fast compiles its own: as a whole, on a GPU into a CUDA graph, with tiles that are
    tried out and attention that Inductor writes.
    """
    if not device.startswith("cuda"):
        return torch.compile(step, fullgraph=True)
    options = {"triton.cudagraphs": True, "coordinate_descent_tuning": True}
    fast = torch.compile(step, fullgraph=True, options=options)

    def run(*args: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return fast(*args)

    return run


def compiled_decode(model: GPT, idx: Tensor, n: int) -> Callable[[], None]:
    """n greedy tokens after idx (1, S) by a compiled StaticMHA, its cache no longer than needed."""
    first = idx.size(1) - 1
    static = StaticMHA(model, -(-(first + n) // 8) * 8)
    for rows in static.buffers(recurse=False):
        rows.normal_()
    step = compiled(static.next_token, idx.device.type)
    last = idx[:, -1:].clone(memory_format=torch.contiguous_format)  # else it is compiled twice

    def run() -> None:
        token, pos = last, torch.tensor([first], device=idx.device)
        for _ in range(n):
            token = step(token, pos).clone()  # the next step overwrites what a CUDA graph returns
            pos += 1

    return run


def require_compiler(device: str) -> None:
    """Raise UserError where torch.compile does not work."""
    try:
        compiled(lambda x: x.exp() + 1, device)(torch.zeros(9, device=device))
    except RuntimeError as error:
        remedy = "install a C++ compiler (on a GPU also Triton), or leave it out"
        raise UserError(f"--vs_compiled: torch.compile fails ({cause(error)}); {remedy}") from None


def hf_deepseek(nh: int, S: int, L: int, x: Tensor) -> Callable[[], Any]:
    """transformers' MLA layer of the same sizes, with what its own cache keeps."""
    from transformers import DeepseekV3Config, DynamicCache
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek

    hs = x.size(-1) // nh
    config = DeepseekV3Config(
        hidden_size=x.size(-1), num_attention_heads=nh, num_key_value_heads=nh, q_lora_rank=None,
        kv_lora_rank=L, qk_rope_head_dim=2, qk_nope_head_dim=hs - 2, v_head_dim=hs,
        rope_interleave=False, num_hidden_layers=1, max_position_embeddings=S,
        attn_implementation="sdpa",
    )  # fmt: skip
    layer = deepseek.DeepseekV3Attention(config, 0).to(x.device, x.dtype).eval()
    position = torch.tensor([[S - 1]], device=x.device)
    rotary = deepseek.DeepseekV3RotaryEmbedding(config).to(x.device)(x, position)
    inputs = {"position_embeddings": rotary, "attention_mask": None}
    probe = DynamicCache(config=config)  # to see the shapes that it caches
    layer(x, past_key_values=probe, **inputs)
    shapes = [t.shape for t in (probe.layers[0].keys, probe.layers[0].values)]
    cache, like = DynamicCache(config=config), {"device": x.device, "dtype": x.dtype}
    cache.update(*(torch.randn(*shape[:2], S - 1, shape[3], **like) for shape in shapes), 0)

    def run() -> None:
        layer(x, past_key_values=cache, **inputs)
        cache.crop(-1)  # the token just added

    return run


def hf_gpt2(device: str, dtype: torch.dtype, idx: Tensor, n: int) -> Callable[[], Any]:
    """transformers' GPT-2 with its cache, prefilled with all of idx but the last token."""
    from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    config = GPT2Config(vocab_size=50304, bos_token_id=None, eos_token_id=None, pad_token_id=0)
    model = GPT2LMHeadModel(config).to(device, dtype).eval()
    cache = DynamicCache(config=model.config)
    model(idx[:, :-1], past_key_values=cache, use_cache=True)
    how = {"max_new_tokens": n, "do_sample": False, "use_cache": True}

    def run() -> None:
        model.generate(idx, past_key_values=cache, **how)
        cache.crop(-n)  # what the call added

    return run


# ---- kernel


@torch.inference_mode()
def bench_kernel(cfg: RoundsConfig, device: str) -> Rows:
    """
    Attention of one new token over cached latents, beside other ways to compute it. GB/s are the
    bytes of the cached rows, each counted once, over the time.
    """
    bandwidth, tables = measure_bandwidth(device), {}
    for case in kernel.cases(device):
        row = kernel.figures(case, time_ways(case, device, cfg.rounds), bandwidth)
        tables.setdefault(case.dtype, []).append(row)
    rows, by = [], "Triton" if on_gpu(torch.device(device)) else "torch"
    print(f"a copy reads and writes {bandwidth / 1e9:,.1f} GB/s, both counted")
    for dtype, lines in tables.items():
        what = f"One new token over cached latents, {name_of(dtype)}, by nanomla.kernels with {by}"
        rows += table(what, lines)
    return rows


def time_ways(case: kernel.Case, device: str, rounds: int) -> dict[str, float | None]:
    """Seconds of every way to compute a case, others in 3 rounds; None where it is impossible."""
    copies, ways = case.rows(device), kernel.ways(case, device)  # kept while graphs use them
    launches = {"this": kernel.repeated(ways["this"], copies, device)}
    for name, way in ways.items():
        if name not in launches and (launch := kernel.possible(way, copies, device)):
            launches[name] = launch
    entries = [Timed(name, run, name != "this", steps=n) for name, (run, n) in launches.items()]
    took = alternate(entries, rounds, device)
    return {name: took[name].seconds if name in took else None for name in ways}


# ---- prefill

FORMS = ["expanded", "absorbed"]


@torch.inference_mode()
def bench_prefill(cfg: RoundsConfig, device: str) -> Rows:
    """The tables of `prefill`; long prompts are timed in fewer rounds."""
    rows = [
        row
        for T in (512, 1024, 2048, 4096, 8192)
        for row in bench_prompt(device, T, min(cfg.rounds, max(2**13 // T, 2)))
    ]
    return rows + bench_chunks(device, 32768, PREFILL_CHUNK)


def bench_prompt(device: str, T: int, rounds: int) -> Rows:
    """One layer, 768 wide, T tokens into an empty cache: MLA in both forms and which it chooses."""
    base = {"block_size": T, "vocab_size": 64, "n_layer": 1, "bias": False}
    latent, rotary = {"use_mla": True, "mla_latent_dim": 192}, {"pos_emb": "rope"}
    grouped = {"use_mla": True, "mla_latent_dim": 48, "mla_groups": 4}
    variants = {
        "MHA": {},
        "MLA": latent,
        "MLA, rotary 32": latent | rotary | {"mla_rope_dim": 32},
        "MLA, 4 groups": grouped,
        "MLA, 4 groups, rotary 32": grouped | rotary | {"mla_rope_dim": 32},
        "MLA, 12 groups": grouped | {"mla_latent_dim": 32, "mla_groups": 12},
        "MLA, rotary latent": latent | rotary | {"mla_rope": "latent"},
        "64 latent tokens": {"use_latent_tokens": True, "n_latent_tokens": 64},
    }
    x, entries, peaks = torch.randn(1, T, 768, device=device), [], {}
    attns = {}

    def run(name: str, forward: Callable[[], Tensor]) -> None:
        if name in peaks:
            forward()
        else:  # in the round that warms up
            peaks[name] = peak_bytes(forward, device)

    for name, extra in variants.items():
        model = GPT(GPTConfig(**base, **extra)).to(device).eval()
        attns[name] = attn = model.transformer.h[0].attn
        turn = (model.rope_cos, model.rope_sin) if model.config.rotary_dim else None
        call = functools.partial(attn, x, model.make_cache(1, T).layers[0], turn)
        calls = {"": call}
        if hasattr(attn, "absorbing_is_cheaper"):
            calls = {form: functools.partial(call, absorb=form == "absorbed") for form in FORMS}
        for form, forward in calls.items():
            entries.append(Timed(name + form, functools.partial(run, name + form, forward)))
    took = alternate(entries, rounds, device)
    rows = []
    for name, attn in attns.items():
        forms = [""] if name in took else FORMS
        chosen = forms[-1 if len(forms) == 1 or attn.absorbing_is_cheaper(T, T) else 0]
        seconds = {form: took[name + form].seconds for form in forms}
        row = {"attention": name, "ms": f"{seconds[chosen] * 1e3:.1f}"}
        row["MB"] = f"{peaks[name + chosen] / 1e6:.1f}"
        if chosen:
            row |= {f"{form}, ms": f"{s * 1e3:.1f}" for form, s in seconds.items()}
            row |= {f"{form}, MB": f"{peaks[name + form] / 1e6:.1f}" for form in forms}
            ratio = seconds[chosen] / min(seconds.values())
            row |= {"chosen": chosen, "chosen / better": f"{ratio:.2f}"}
        rows.append(row)
    return table(f"Prefill of {T:,} tokens, one layer, 12 heads of 64, batch 1, float32", rows)


def bench_chunks(device: str, T: int, chunk: int) -> Rows:
    """
    A prompt of T tokens, at once and in chunks, through a block as wide as GPT-2's: what one pass
    takes, and the most memory that it needs besides weights and cache.
    """
    base = GPTConfig(block_size=T, n_layer=1, bias=False, pos_emb="rope")
    latent = {"use_mla": True, "mla_latent_dim": 160, "mla_rope_dim": 32}
    turning = {"use_mla": True, "mla_latent_dim": 192, "mla_rope": "latent"}
    variants = {"MHA": {}, "MLA, L = 160, rotary 32": latent}
    variants["MLA, rotary latent, L = 192"] = turning
    idx, rows = torch.randint(50257, (1, T), device=device), []
    for name, extra in variants.items():
        model = GPT(dataclasses.replace(base, **extra)).to(device).eval()
        cache = model.make_cache(1, T)
        row = {"attention": name, "cache MB": f"{cache.nbytes / 1e6:.0f}"}
        for what, size in (("at once", None), (f"{chunk:,} tokens at a time", chunk)):
            read = functools.partial(next_logits, model, idx, cache, size, None)
            row[f"{what}, MB"] = f"{peak_bytes(read, device) / 1e6:.0f}"  # and warms up
            cache.truncate(0)
            began = time.perf_counter()
            float(read()[0, 0])  # waits for it
            row[f"{what}, s"] = f"{time.perf_counter() - began:.1f}"
            cache.truncate(0)
        rows.append(row)
    return table(f"A prompt of {T:,} tokens through one block, 768 wide, batch 1, float32", rows)


# ---- train


def bench_train(cfg: TimingConfig, device: str) -> Rows:
    """The tables of `train`: nanoGPT's CPU size, then its baby GPT's width in two precisions."""
    small = GPTConfig(64, 65, n_layer=4, n_head=4, n_embd=128, bias=False)
    wide = GPTConfig(256, 65, n_layer=6, n_head=6, n_embd=384, bias=False)
    rows = bench_iteration(cfg, device, small, 12, torch.float32, cfg.rounds * 3)
    for dtype in (torch.float32, torch.bfloat16):
        rows += bench_iteration(cfg, device, wide, 8, dtype, max(cfg.rounds // 2, 3))
    return rows


def training_variants(base: GPTConfig) -> list[tuple[str, GPTConfig, str]]:
    """(name, config, the name of MHA with the same positions) of every variant that train times."""
    latent = {"use_mla": True, "mla_latent_dim": base.n_embd // 4}
    svd = {"use_svd": True, "svd_rank": base.hs // 2}
    kinds = {"MHA": {}, "MHA + SVD": svd, "MQA": {"n_kv_head": 1}}
    kinds |= {"MLA": latent, "MLA + SVD": latent | svd}
    variants = [(name, dataclasses.replace(base, **kind), "MHA") for name, kind in kinds.items()]
    for name, kind in kinds.items():
        if name != "MHA + SVD":
            rope = {"pos_emb": "rope"} | ({"mla_rope_dim": 16} if "use_mla" in kind else {})
            config = dataclasses.replace(base, **kind, **rope)
            variants.append((f"{name}, rotary", config, "MHA, rotary"))
    turning = dataclasses.replace(base, pos_emb="rope", mla_rope="latent", **latent)
    slots = dataclasses.replace(base, use_latent_tokens=True, n_latent_tokens=16)
    variants.append(("MLA, rotary latent", turning, "MHA, rotary"))
    return [*variants, ("16 latent tokens", slots, "MHA")]


def bench_iteration(
    cfg: TimingConfig, device: str, base: GPTConfig, B: int, dtype: torch.dtype, rounds: int
) -> Rows:
    """Forward, backward, clipping and AdamW on one batch, for every variant."""
    T, C, kind = base.block_size, base.n_embd, device.partition(":")[0]
    x, y = torch.randint(65, (2, B, T), device=device)
    entries = []

    def iterate(
        loss_of: Callable[[], Tensor], params: list[Tensor], opts: list[torch.optim.Optimizer]
    ) -> None:
        with torch.autocast(kind, dtype, enabled=dtype != torch.float32):
            loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad(set_to_none=True)

    for name, config, baseline in training_variants(base):
        model = GPT(config).to(device)
        opts = list(make_optimizers(model, TrainConfig(), kind).values())
        run = lambda m=model, o=opts: iterate(lambda: m(x, y)[1], list(m.parameters()), o)
        n = model.get_num_params()
        entries.append(Timed(name, run, baseline=baseline, parameters=n))
    if cfg.vs_hf:
        loss_of, theirs, adamw = hf_gpt2_loss(base, x, y)
        run = lambda: iterate(loss_of, list(theirs.parameters()), [adamw])
        name, n = "transformers GPT2LMHeadModel", theirs.num_parameters()
        entries.append(Timed(name, run, baseline="MHA", parameters=n))
    took = alternate(entries, rounds, device)
    rows = []
    for e in entries:
        row = {"model": e.name, "parameters": f"{e.parameters:,}"}
        row |= {"ms/iteration": f"{e.seconds * 1e3:.1f}", "tokens/s": f"{B * T / e.seconds:,.0f}"}
        ratio = e.seconds / took[e.baseline].seconds
        rows.append(row | {"this / MHA of the same positions": f"{ratio:.3f}"})
    size = f"{base.n_layer} layers, {C} wide, batch {B} x {T}"
    return table(f"Training iteration, {size}, {name_of(dtype)}, AdamW", rows)


def hf_gpt2_loss(base: GPTConfig, x: Tensor, y: Tensor) -> tuple[Callable[[], Tensor], Any, Any]:
    """transformers' GPT-2 of the same size: a function of its loss, the model and its AdamW."""
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    config = GPT2Config(
        vocab_size=base.vocab_size, n_positions=base.block_size, n_embd=base.n_embd,
        n_layer=base.n_layer, n_head=base.n_head, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).to(x.device)
    adamw = torch.optim.AdamW(model.parameters(), lr=6e-4, fused=True)
    return lambda: F.cross_entropy(model(x).logits.flatten(0, 1), y.flatten()), model, adamw


# ---- profile


def bench_profile(cfg: ProfileConfig, device: str) -> Rows:
    """Where the time of an iteration goes: medians of its parts over consecutive iterations."""
    recipe, kind = cfg.train, device.partition(":")[0]
    data = Dataset(recipe.dataset, recipe.model.block_size)
    vocab_size = recipe.vocab_size or padded_vocab(data)
    model = GPT(dataclasses.replace(recipe.model, vocab_size=vocab_size)).to(device)
    optimizers = make_optimizers(model, recipe, kind)
    dtype = getattr(torch, resolve_dtype(recipe.dtype, kind, model.config.n_embd))
    times: dict[str, list[float]] = {}

    def timed(part: str, run: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        result = run()
        if kind == "cuda":
            torch.cuda.synchronize(device)
        times[part][-1] += time.perf_counter() - began
        return result

    def forward(x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(kind, dtype, enabled=dtype != torch.float32):
            return model(x.to(device), y.to(device))[1]

    for it in range(-5, cfg.rounds):  # the first ones warm up
        for part in ("batch", "forward", "backward", "clipping", *optimizers):
            times[part] = [*times.get(part, []), 0.0] if it > 0 else [0.0]
        for micro in range(recipe.gradient_accumulation_steps):
            first = micro * recipe.batch_size
            batch = (recipe.seed, abs(it), range(first, first + recipe.batch_size))
            x, y = timed("batch", lambda batch=batch: data.batch(*batch))
            loss = timed("forward", lambda x=x, y=y: forward(x, y))
            timed("backward", (loss / recipe.gradient_accumulation_steps).backward)
        timed("clipping", lambda: nn.utils.clip_grad_norm_(model.parameters(), recipe.grad_clip))
        for name, optimizer in optimizers.items():
            timed(name, optimizer.step)
            optimizer.zero_grad(set_to_none=True)
    medians = {part: statistics.median(seconds) * 1e3 for part, seconds in times.items()}
    whole = sum(medians.values())
    medians["all"] = whole
    rows = [
        {"part": part, "ms": f"{ms:.2f}", "share": f"{ms / whole:.0%}"}
        for part, ms in medians.items()
    ]
    size = f"{model.get_num_params():,} parameters, {recipe.gradient_accumulation_steps} x "
    size += f"{recipe.batch_size} x {model.config.block_size} tokens, {name_of(dtype)}"
    return table(f"An iteration of {size}", rows)


# ---- lengths


def bench_lengths(cfg: RoundsConfig, device: str) -> Rows:
    """The tables of `lengths`."""
    dtypes = (torch.float32, torch.bfloat16)
    return [row for dtype in dtypes for row in bench_training_lengths(cfg, device, dtype)]


def bench_training_lengths(cfg: RoundsConfig, device: str, dtype: torch.dtype) -> Rows:
    """What a token costs in the forward and backward pass of one layer, over the length T."""
    lengths = [512, 1024, 2048, 4096, 8192, 16384]
    base = {"block_size": lengths[-1], "n_embd": 128, "n_head": 4, "bias": False}

    def new_layer(config: GPTConfig) -> nn.Module:
        return ATTENTION[config.attention_name](config).to(device)

    layers = {"MHA": new_layer(GPTConfig(**base))}
    for m in (16, 64):
        settings = {"use_latent_tokens": True, "n_latent_tokens": m}
        layers[f"{m} latent tokens"] = new_layer(GPTConfig(**base, **settings))

    def train(layer: nn.Module, x: Tensor) -> None:
        for _ in range(max(4096 // x.size(1), 1)):  # short passes vary, so several are one run
            with torch.autocast(device.partition(":")[0], dtype, enabled=dtype != torch.float32):
                y = layer(x)
            y.float().square().mean().backward()
            layer.zero_grad(set_to_none=True)

    entries = []
    for T in lengths:
        x = torch.randn(1, T, base["n_embd"], device=device, requires_grad=True)
        for name, layer in layers.items():
            run = lambda layer=layer, x=x: train(layer, x)
            entries.append(Timed(f"{name}, {T}", run, steps=max(T, 4096)))
    took = alternate(entries, max(cfg.rounds // 3, 3), device)
    us = {T: [took[f"{name}, {T}"].seconds * 1e6 for name in layers] for T in lengths}
    rows = []
    for T, row in us.items():
        times = {f"{name}, us/token": f"{t:.1f}" for name, t in zip(layers, row, strict=True)}
        others = zip(list(layers)[1:], row[1:], strict=True)
        ratios = {f"MHA / {name}": f"{row[0] / t:.2f}" for name, t in others}
        rows.append({"T": f"{T:,}"} | times | ratios)
    ratios = [b / a for a, b in zip(us[1024], us[16384], strict=True)]
    named = zip(layers, ratios, strict=True)
    rows.append({"T": "16,384 / 1,024"} | {f"{name}, us/token": f"{r:.2f}" for name, r in named})
    what = "Forward and backward of one attention layer, 128 wide, 4 heads, batch 1"
    return table(f"{what}, {name_of(dtype)}", rows)


# ---- serve


def bench_serve(cfg: LoadConfig, device: str) -> Rows:
    """A server of train_mla.py's model and one of a 124M model, each for 1 client and for many."""
    from tools import load

    settings = {**run_config_file(str(load.ROOT / "config/train_mla.py")), "vocab_size": 65}
    small = {name: value for name, value in settings.items() if name in declared(GPTConfig)}
    models = {
        "config/train_mla.py": GPTConfig(bias=False, **small),
        "a 124M GPT with MLA, L = 160, r = 32": GPTConfig(
            bias=False, use_mla=True, mla_latent_dim=160, pos_emb="rope", mla_rope_dim=32
        ),
    }
    rows = []
    for name, config in models.items():
        tokens = cfg.tokens if config.n_embd < 256 else max(cfg.tokens // 4, 1)
        title = f"{name}: {tokens} tokens behind a prompt of 16, {cfg.rounds} rounds"
        rows += table(title, load.measure(config, device, cfg.clients, tokens, cfg.rounds))
    return rows


# ---- svd and --report


def bench_svd(cfg: BenchConfig, device: str) -> Rows:
    """One 1600 x 6400 matrix to rank 64: with a decaying spectrum, and as drawn at the start."""
    U, V = (torch.linalg.qr(torch.randn(n, 1600, device=device))[0] for n in (1600, 6400))
    decaying = (U * 0.99 ** torch.arange(1600, device=device)) @ V.T
    matrices = {"decaying spectrum": decaying, "normal random": torch.randn_like(decaying) * 0.02}
    rows = []
    for kind, W in matrices.items():
        factors: dict[str, tuple[Tensor, Tensor, float]] = {}

        def run(method: str, W: Tensor = W, factors: dict = factors) -> None:
            factors[method] = factorise(W[None], 64, method)

        entries = [Timed(m, lambda m=m, run=run: run(m)) for m in ("exact", "randomized")]
        took = alternate(entries, 1, device)
        for method, (down, up, _) in factors.items():
            seconds = took[method].seconds
            error = float((W - up[0] @ down).norm() / W.norm())
            row = {"matrix": kind, "method": method, "seconds": f"{seconds:.2f}"}
            row |= {"relative error": f"{error:.5f}"}
            rows.append(row | {"exact / this": f"{took['exact'].seconds / seconds:.1f}"})
    return table("1600 x 6400 to rank 64, computed in float64", rows)


def report(cfg: ReportConfig, device: str) -> Rows:
    """Parameters by part, cache bytes per token and FLOPs per token of a config, beside MHA's."""
    if cfg.init_from:
        config = checkpoint.build(formats.open_weights(cfg.init_from, prefer_best=True))[0].config
    else:
        config = dataclasses.replace(cfg.model, vocab_size=token_ids(cfg))
    plain: dict[str, Any] = dict.fromkeys(("use_mla", "use_svd", "use_latent_tokens"), False)
    plain |= {"n_kv_head": None, "rope_freqs": None, "mla_latent_dim": None}
    if config.hs % 2:  # MHA cannot rotate heads of an odd size
        plain["pos_emb"] = "learned"
    context = config.block_size if cfg.context is None else cfg.context
    models = Counted(config), Counted(dataclasses.replace(config, **plain))

    def count(model: GPT, part: str) -> int:
        return sum(p.numel() for name, p in model.named_parameters() if part in name)

    def bytes_per_token(model: GPT, dtype: torch.dtype) -> int:
        return model.make_cache(1, 1, dtype).bytes_per_token

    lines: list[tuple[str, Callable[[GPT], int]]] = [
        ("parameters: embeddings and lm_head", lambda m: count(m, ".wte.") + count(m, ".wpe.")),
        ("parameters: attention", lambda m: count(m, ".attn.")),
        ("parameters: MLPs", lambda m: count(m, ".mlp.")),
        ("parameters: all", lambda m: m.get_num_params(non_embedding=False)),
        ("of these, making keys and values", costs.count_kv_parameters),
        ("cache bytes per token, float32", lambda m: bytes_per_token(m, torch.float32)),
        ("cache bytes per token, bfloat16", lambda m: bytes_per_token(m, torch.bfloat16)),
        (
            f"FLOPs per decoded token at {context:,}",
            lambda m: costs.flops_per_token(m, context, absorbed=True),
        ),
        (
            "FLOPs per trained token (forward and backward)",
            lambda m: 3 * costs.flops_per_token(m, config.block_size),
        ),
    ]
    rows = []
    for what, figure in lines:
        mine, theirs = (model.total(figure) for model in models)
        row = {"": what, "this config": f"{mine:,}", "MHA": f"{theirs:,}"}
        rows.append(row | {"MHA / this": f"{theirs / mine:.2f}" if mine else "constant state"})
    shape = f"{config.n_layer} layers, {config.n_embd} wide, vocabulary {config.vocab_size:,}"
    return table(f"Counted from the tensors themselves: {shape}", rows)


def token_ids(cfg: ReportConfig) -> int:
    """The vocab_size that a run of this config has; GPT-2's, with a warning, without the data."""
    if cfg.vocab_size or not cfg.dataset:
        return cfg.vocab_size or cfg.model.vocab_size
    try:
        return padded_vocab(Dataset(cfg.dataset, 1))
    except UserError as error:
        warn0(f"{error}; counted with a vocabulary of {cfg.model.vocab_size:,}")
        return cfg.model.vocab_size


class Counted:
    """
    A model that is counted without being built: its tensors have shapes only, and of layers that
    are alike, however many, there are two. Raises UserError for sizes beyond those of tensors.
    """

    def __init__(self, config: GPTConfig) -> None:
        if costs.parameters(config) >= 2**60:
            raise UserError("a model of over 2^60 parameters cannot be counted; make it smaller")
        require_memory(
            32 * config.block_size * (1 + config.rotary_dim), "a table of all positions", "cpu",
            "use less --block_size",
        )  # fmt: skip
        self.alike = not isinstance(config.mla_latent_dim, tuple)
        self.layers = config.n_layer
        depths = (1, 2) if self.alike else (config.n_layer,)
        with torch.device("meta"):
            self.models = [GPT(dataclasses.replace(config, n_layer=n)) for n in depths]

    def total(self, figure: Callable[[GPT], int]) -> int:
        """A figure of the whole model that every layer adds to."""
        first, *more = map(figure, self.models)
        return first + sum((self.layers - 1) * (second - first) for second in more)


if __name__ == "__main__":
    run_script(main)
