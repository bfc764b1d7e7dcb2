"""
Time the attention variants against each other, against this machine's limits and transformers.

    python -m tools.bench decode [--vs_hf]  one layer at 32,768 tokens, a 124M GPT, a long batch
    python -m tools.bench train [--vs_hf]   one training iteration of every variant
    python -m tools.bench svd               exact against randomized factors
    python -m tools.bench config/train_mla.py --report
                                            a config's parameters, bytes and FLOPs beside MHA's

All that is compared runs in turn in one process, round after round; figures are medians over the
rounds. --json=FILE writes them to a file too.
"""

import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model import GPT, Cache, GPTConfig
from nanomla import costs
from nanomla.distributed import resolve_device
from nanomla.optim import make_optimizers
from nanomla.settings import UsageError, UserError, check, configure, declared, run_script
from nanomla.surgery import factorise
from train import TrainConfig

Rows = list[dict[str, Any]]


@dataclass
class SvdConfig:
    """The settings of `svd`, and of all commands that time something."""

    device: Annotated[str, "#bench", "auto, cpu, cuda, cuda:1, mps"] = "auto"
    seed: Annotated[int, "of weights and inputs", ">= 0"] = 1337
    json: Annotated[str | None, "write the figures to this file too"] = None

    def __post_init__(self) -> None:
        check(self)


@dataclass
class TimingConfig(SvdConfig):
    """The settings of `decode` and `train`."""

    rounds: Annotated[int, "#bench", "rounds that the medians are taken over", ">= 1"] = 15
    vs_hf: Annotated[bool, "time transformers' GPT-2 and DeepSeek-V3 attention too"] = False


@dataclass
class ReportConfig:
    """The settings of --report: a model's, and what it is counted at."""

    model: GPTConfig = field(default_factory=lambda: GPTConfig(bias=False))
    report: Annotated[bool, "#report", "count instead of timing"] = False
    context: Annotated[int, "tokens of context that a decoded token is counted at", ">= 1"] = 1000
    json: Annotated[str | None, "write the figures to this file too"] = None

    def __post_init__(self) -> None:
        check(self)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    commands = {
        "decode": (TimingConfig, bench_decode),
        "train": (TimingConfig, bench_train),
        "svd": (SvdConfig, bench_svd),
        "--report": (ReportConfig, report),
    }
    given = [arg for arg in argv if arg.removesuffix("=True") in commands]
    if len(given) != 1 and not {"--help", "-h"} & set(argv):
        raise UsageError("say one of: decode, train, svd, or --report with a config file")
    config_class, command = commands[given[0].removesuffix("=True") if given else "decode"]
    rest = [arg for arg in argv if arg not in commands]
    cfg, _ = configure(config_class, rest, ignored_in_files=declared(TrainConfig))
    device = resolve_device(getattr(cfg, "device", "cpu"))
    if command is not report:
        print(f"{machine(device)}, torch {torch.__version__}, seed {cfg.seed}")
        torch.manual_seed(cfg.seed)
    rows = command(cfg, device)
    if cfg.json:
        figures = {"machine": machine(device), "torch": torch.__version__, "rows": rows}
        try:
            with open(cfg.json, "w", encoding="utf-8") as file:
                json.dump(figures, file, indent=1)
        except OSError as error:
            raise UserError(f"--json={cfg.json}: cannot be written ({error.strerror})") from None


# ---- timing


@dataclass
class Timed:
    """One thing that is timed, and what its row in the table needs besides the time."""

    name: str
    run: Callable[[], Any]
    slow: bool = False  # runs in 3 rounds only
    cache: Cache | None = None
    nbytes: float = 0.0  # that have to be read, for the roofline
    flops: float = 0.0  # that have to be computed; 0: no roofline
    baseline: str = ""  # the name of what its time is divided by
    parameters: int = 0
    steps: int = 1  # tokens or iterations in one run
    seconds: float = 0.0  # the measured median of one step


def alternate(entries: list[Timed], rounds: int, device: str) -> dict[str, Timed]:
    """Time each entry in turn, round after round; returns them by name, with median seconds."""
    times: dict[str, list[float]] = {entry.name: [] for entry in entries}
    for i in range(-1, rounds):  # the first round warms up
        for entry in entries:
            if entry.slow and i >= 3:
                continue
            began = time.perf_counter()
            entry.run()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            if i >= 0:
                times[entry.name].append(time.perf_counter() - began)
    for entry in entries:
        entry.seconds = statistics.median(times[entry.name]) / entry.steps
    return {entry.name: entry for entry in entries}


@dataclass
class Limits:
    """What this machine can do, measured: bytes per second (read and written), and FLOP/s."""

    bandwidth: float
    rate: dict[torch.dtype, float]

    def seconds(self, nbytes: float, flops: float, dtype: torch.dtype) -> float:
        """The roofline: no less time than the bytes take to move or the operations to compute."""
        return max(nbytes / self.bandwidth, flops / self.rate[dtype])


def measure_limits(device: str) -> Limits:
    a = torch.ones(2**26, device=device)  # 256 MB, beyond any cache
    b, n = torch.empty_like(a), 2048
    dtypes = (torch.float32, torch.bfloat16)
    square = {dtype: torch.randn(n, n, device=device).to(dtype) for dtype in dtypes}
    entries = [Timed("copy", lambda: b.copy_(a))]
    entries += [Timed(str(dtype), lambda m=m: m @ m) for dtype, m in square.items()]
    took = alternate(entries, 7, device)
    rate = {dtype: 2 * n**3 / took[str(dtype)].seconds for dtype in dtypes}
    limits = Limits(2 * a.nbytes / took["copy"].seconds, rate)
    fp32, bf16 = (f"{rate[dtype] / 1e9:.0f}" for dtype in dtypes)
    products = f"matrix products {fp32} GFLOP/s in float32, {bf16} in bfloat16"
    print(f"limits: copy {limits.bandwidth / 1e9:.1f} GB/s, {products}")
    return limits


def machine(device: str) -> str:
    """What this runs on, in words."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    has = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    name = f"{device} {has.get('cpu_name', '')}".strip()
    return f"{name}, {torch.get_num_threads()} threads"


def table(title: str, rows: Rows) -> Rows:
    """Print rows, whose keys are the columns, as a Markdown table; returns them with the title."""
    print(f"\n{title}\n")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns] + [[str(row.get(c, "")) for c in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for n, line in enumerate(cells):
        print("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |")
        if n == 0:
            print("|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return [{"table": title, **row} for row in rows]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---- decode


@torch.inference_mode()
def bench_decode(cfg: TimingConfig, device: str) -> Rows:
    """The tables of `decode`."""
    limits = measure_limits(device)
    rows: Rows = []
    for dtype in (torch.float32, torch.bfloat16):
        rows += bench_layer(cfg, device, dtype, limits)
    for dtype in (torch.float32, torch.bfloat16):
        rows += bench_gpt(cfg, device, dtype, limits)
    return rows + bench_long(cfg, device, limits)


def fill(cache: Cache, pos: int) -> Cache:
    """A cache of `pos` random tokens: the time of a step does not depend on what they are."""
    for t in cache.tensors:
        t.normal_()
    cache.advance(pos)
    return cache


def bench_layer(cfg: TimingConfig, device: str, dtype: torch.dtype, limits: Limits) -> Rows:
    """One attention layer of 24 heads of 32, one new token on 32,768 cached ones; L = 192."""
    S, L, C, nh = 32768, 192, 768, 24
    base = {"block_size": S, "vocab_size": 64, "n_layer": 1, "n_head": nh, "bias": False}
    latent = {"use_mla": True, "mla_latent_dim": L}
    variants = {
        "MHA": {},
        "MLA": latent,
        "MLA, 4 groups": {"use_mla": True, "mla_latent_dim": L // 4, "mla_groups": 4},
        "MLA + SVD": latent | {"use_svd": True, "svd_rank": 16},
    }
    x = torch.randn(1, 1, C, device=device, dtype=dtype)
    entries, attns = [], {}
    for name, extra in variants.items():
        model = GPT(GPTConfig(**base, **extra)).to(device, dtype).eval()
        attn, cache = model.transformer.h[0].attn, fill(model.make_cache(1, S), S - 1)
        flops = 2 * nh * attn.numbers_per_key(decoding=True) * S
        run = lambda attn=attn, cache=cache: attn(x, cache)
        entries.append(Timed(name, run, cache=cache, nbytes=cache.nbytes, flops=flops))
        attns[name] = attn
    mha, mla = entries[0], entries[1]
    k, v = (t[0] for t in mha.cache.tensors)

    def plain() -> Tensor:  # what most code does with a cache; it writes nothing, which favours it
        q = attns["MHA"].c_attn(x).split(C, dim=2)[0].view(1, 1, nh, C // nh).transpose(1, 2)
        return attns["MHA"].c_proj(F.scaled_dot_product_attention(q, k, v).view(1, 1, C))

    def expand() -> Tensor:
        return attns["MLA"](x, mla.cache, absorb=False)

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
            row["cache MB"] = f"{e.cache.nbytes / 1e6:.1f}"
        if e.flops:
            row["x roofline"] = f"{e.seconds / limits.seconds(e.nbytes, e.flops, dtype):.2f}"
        rows.append(row)
    what = "One layer, 24 heads of 32, L = 192, 32,768 cached tokens, one new one"
    return table(f"{what}, {name_of(dtype)}", rows)


def bench_gpt(cfg: TimingConfig, device: str, dtype: torch.dtype, limits: Limits) -> Rows:
    """A 124M GPT, batch 1, 8 greedy tokens from a context of 1,000."""
    context, n = 1000, 8
    rotary = {"pos_emb": "rope", "mla_rope_dim": 32}
    variants = {
        "MHA": {},
        "MLA, L = 192": {"use_mla": True, "mla_latent_dim": 192},
        "MLA, L = 192, rotary 32": {"use_mla": True, "mla_latent_dim": 192, **rotary},
    }
    idx, entries, models = torch.randint(50257, (1, context), device=device), [], []

    def decode(model: GPT, cache: Cache) -> None:
        cache.truncate(context - 1)
        token = idx[:, -1:]
        for _ in range(n):
            token = model(token, cache=cache)[0][:, -1].argmax(-1, keepdim=True)

    for name, extra in variants.items():
        model = GPT(GPTConfig(**extra)).to(device, dtype).eval()
        cache = fill(model.make_cache(1, 1024), context - 1)
        nbytes = sum(p.nbytes for p in model.parameters()) + cache.nbytes_at(context)
        flops = costs.flops_per_token(model, context, absorbed=True)
        run = lambda model=model, cache=cache: decode(model, cache)
        entries.append(Timed(name, run, cache=cache, nbytes=nbytes, flops=flops, steps=n))
        models.append(model)
    mha = entries[0]
    whole = Timed("MHA, no cache (1 token)", lambda: models[0](idx)[0].argmax(-1), slow=True)
    entries.append(whole)
    hf = None
    if cfg.vs_hf:
        run = hf_gpt2(device, dtype, idx, n)
        hf = Timed("transformers GPT2LMHeadModel.generate", run, steps=n)
        entries.append(hf)
    alternate(entries, cfg.rounds, device)
    rows = []
    for e in entries:
        row = {"model": e.name, "ms/token": f"{e.seconds * 1e3:.1f}"}
        row["tokens/s"] = f"{1 / e.seconds:.1f}"
        row["MHA / this"] = f"{mha.seconds / e.seconds:.2f}"
        if hf:
            row["transformers / this"] = f"{hf.seconds / e.seconds:.2f}"
        if e.cache is not None:
            row["cache bytes/token"] = f"{e.cache.bytes_per_token:,}"
            row["x roofline"] = f"{e.seconds / limits.seconds(e.nbytes, e.flops, dtype):.2f}"
        rows.append(row)
    return table(f"A 124M GPT, context 1,000, batch 1, greedy, {name_of(dtype)}", rows)


def bench_long(cfg: TimingConfig, device: str, limits: Limits) -> Rows:
    """A 124M GPT with rotary positions, 8 rows at 8,192 tokens of context, one step."""
    S, B = 8192, 8
    variants = {
        "MHA": {},
        "MLA, L = 160, rotary 32": {"use_mla": True, "mla_latent_dim": 160, "mla_rope_dim": 32},
    }
    token, entries = torch.randint(50257, (B, 1), device=device), []

    def step(model: GPT, cache: Cache) -> None:
        cache.truncate(S - 1)
        model(token, cache=cache)

    for name, extra in variants.items():
        model = GPT(GPTConfig(block_size=S, pos_emb="rope", **extra)).to(device).eval()
        cache = fill(model.make_cache(B, S), S - 1)
        nbytes = sum(p.nbytes for p in model.parameters()) + cache.nbytes
        flops = B * costs.flops_per_token(model, S, absorbed=True)
        run = lambda model=model, cache=cache: step(model, cache)
        entries.append(Timed(name, run, cache=cache, nbytes=nbytes, flops=flops))
    alternate(entries, max(cfg.rounds // 3, 3), device)
    rows = []
    for e in entries:
        row = {"model": e.name, "ms/step": f"{e.seconds * 1e3:.0f}"}
        row["tokens/s"] = f"{B / e.seconds:.1f}"
        row["MHA / this"] = f"{entries[0].seconds / e.seconds:.2f}"
        row["cache MB"] = f"{e.cache.nbytes / 1e6:,.0f}"
        least = limits.seconds(e.nbytes, e.flops, torch.float32)
        rows.append(row | {"x roofline": f"{e.seconds / least:.2f}"})
    return table("The same at 8,192 tokens of context, batch 8, rotary, float32", rows)


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
    kinds = {"MHA": {}, "MHA + SVD": svd, "MLA": latent, "MLA + SVD": latent | svd}
    variants = [(name, dataclasses.replace(base, **kind), "MHA") for name, kind in kinds.items()]
    for name, kind in kinds.items():
        if name != "MHA + SVD":
            rope = {"pos_emb": "rope"} | ({"mla_rope_dim": 16} if "use_mla" in kind else {})
            config = dataclasses.replace(base, **kind, **rope)
            variants.append((f"{name}, rotary", config, "MHA, rotary"))
    return variants


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


# ---- svd and --report


def bench_svd(cfg: SvdConfig, device: str) -> Rows:
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
    config = cfg.model
    models = GPT(config), GPT(dataclasses.replace(config, use_mla=False, use_svd=False))

    def count(model: GPT, part: str) -> int:
        return sum(p.numel() for name, p in model.named_parameters() if part in name)

    def bytes_per_token(model: GPT, dtype: torch.dtype) -> int:
        return model.make_cache(1, 1, dtype).bytes_per_token

    lines: list[tuple[str, Callable[[GPT], float]]] = [
        ("parameters: embeddings and lm_head", lambda m: count(m, ".wte.") + count(m, ".wpe.")),
        ("parameters: attention", lambda m: count(m, ".attn.")),
        ("parameters: MLPs", lambda m: count(m, ".mlp.")),
        ("parameters: all", lambda m: m.get_num_params(non_embedding=False)),
        ("of these, making keys and values", costs.count_kv_parameters),
        ("cache bytes per token, float32", lambda m: bytes_per_token(m, torch.float32)),
        ("cache bytes per token, bfloat16", lambda m: bytes_per_token(m, torch.bfloat16)),
        (
            f"FLOPs per decoded token at {cfg.context:,}",
            lambda m: costs.flops_per_token(m, cfg.context, absorbed=True),
        ),
        (
            "FLOPs per trained token (forward and backward)",
            lambda m: 3 * costs.flops_per_token(m, config.block_size),
        ),
    ]
    rows = []
    for what, figure in lines:
        mine, theirs = (figure(model) for model in models)
        row = {"": what, "this config": f"{mine:,}", "MHA": f"{theirs:,}"}
        rows.append(row | {"MHA / this": f"{theirs / mine:.2f}"})
    return table("Counted from the tensors themselves", rows)


if __name__ == "__main__":
    run_script(main)
