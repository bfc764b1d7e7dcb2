"""
Time the attention variants against each other, against this machine's limits and against transformers.

    python bench.py decode [--vs-hf] [--json=FILE]    one layer at 32,768 tokens, a 124M GPT, a batch at 8,192 tokens
    python bench.py train [--vs-hf] [--json=FILE]     one training iteration of every variant
    python bench.py svd                               exact against randomized factors
    python bench.py config/train_mla.py --report      parameters, cache bytes and FLOPs of a config beside MHA's

All that is compared runs in turn in one process, round after round; figures are medians over the rounds.
"""

import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from configurator import UsageError, UserError, configure, run_script
from model import GPT, GPTConfig, KVCache, LatentCache, factorise
from parallel import resolve_device
from train import TrainConfig, make_optimizers

COMMANDS = ("decode", "train", "svd")


@dataclass
class BenchConfig(TrainConfig):
    """train.py's settings, so that its config files can be reported on, and these."""

    report: Annotated[bool, "count parameters, cache bytes and FLOPs of the config instead of timing"] = False
    context: Annotated[int, "tokens of context that --report counts a decoded token at"] = 1000
    vs_hf: Annotated[bool, "time transformers' GPT-2 and DeepSeek-V3 attention too"] = False
    rounds: Annotated[int, "rounds the medians are taken over"] = 15
    json: Annotated[str | None, "write the figures to this file too"] = None


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    commands = [arg for arg in argv if arg in COMMANDS]
    cfg, _ = configure(BenchConfig, [arg for arg in argv if arg not in COMMANDS])
    if len(commands) + cfg.report != 1:
        raise UsageError("say one of: decode, train, svd, or --report with a config file")
    device = resolve_device(cfg.device)
    rows: list[dict[str, Any]] = []
    if cfg.report:
        rows = report(cfg)
    else:
        print(f"{machine(device)}, torch {torch.__version__}, seed {cfg.seed}")
        torch.manual_seed(cfg.seed)
        rows = {"decode": bench_decode, "train": bench_train, "svd": bench_svd}[commands[0]](cfg, device)
    if cfg.json:
        try:
            with open(cfg.json, "w", encoding="utf-8") as file:
                json.dump({"machine": machine(device), "torch": torch.__version__, "rows": rows}, file, indent=1)
        except OSError as error:
            raise UserError(f"--json={cfg.json}: cannot be written ({error.strerror})") from None


# ----------------------------------------------------------------------------------------------------------------------
# Timing


def alternate(what: dict[str, Callable[[], Any]], rounds: int, device: str, few: tuple[str, ...] = ()) -> dict[str, float]:
    """Median seconds of each function, run in turn; those named in `few` are slow and run in 3 rounds only."""

    def once(run: Callable[[], Any]) -> float:
        began = time.perf_counter()
        run()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter() - began

    times: dict[str, list[float]] = {name: [] for name in what}
    for i in range(-1, rounds):  # the first round warms up
        for name, run in what.items():
            if i < 3 or name not in few:
                took = once(run)
                times[name] += [took] if i >= 0 else []
    return {name: statistics.median(t) for name, t in times.items()}


@dataclass
class Limits:
    """What this machine can do, measured: bytes per second copied (read and written) and FLOP/s per dtype."""

    bandwidth: float
    rate: dict[torch.dtype, float]

    def seconds(self, nbytes: float, flops: float, dtype: torch.dtype) -> float:
        """The roofline: no less time than the bytes take to move or the operations to compute."""
        return max(nbytes / self.bandwidth, flops / self.rate[dtype])


def measure_limits(device: str) -> Limits:
    a = torch.ones(2**26, device=device)  # 256 MB, beyond any cache
    b, n = torch.empty_like(a), 2048
    square = {dtype: torch.randn(n, n, device=device).to(dtype) for dtype in (torch.float32, torch.bfloat16)}
    runs: dict[str, Callable[[], Any]] = {"copy": lambda: b.copy_(a)}
    runs |= {str(dtype): lambda m=m: m @ m for dtype, m in square.items()}
    took = alternate(runs, 7, device)
    limits = Limits(2 * a.nbytes / took["copy"], {dtype: 2 * n**3 / took[str(dtype)] for dtype in square})
    print(
        f"limits: copy {limits.bandwidth / 1e9:.1f} GB/s, matrix products {limits.rate[torch.float32] / 1e9:.0f} GFLOP/s "
        f"in float32, {limits.rate[torch.bfloat16] / 1e9:.0f} in bfloat16"
    )
    return limits


def machine(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    name = torch.cpu.get_capabilities().get("cpu_name", "") if hasattr(torch.cpu, "get_capabilities") else ""
    return f"{device} {name}, {torch.get_num_threads()} threads".replace("  ", " ")


def table(title: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Print rows, whose keys are the columns, as a Markdown table; returns them with the title."""
    print(f"\n{title}\n")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns] + [[str(row.get(c, "")) for c in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for n, line in enumerate(cells):
        print("| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |")
        if n == 0:
            print("|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return [{"table": title, **row} for row in rows]


# ----------------------------------------------------------------------------------------------------------------------
# decode


@torch.inference_mode()
def bench_decode(cfg: BenchConfig, device: str) -> list[dict[str, Any]]:
    limits = measure_limits(device)
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        rows += bench_layer(cfg, device, dtype, limits)
    for dtype in (torch.float32, torch.bfloat16):
        rows += bench_gpt(cfg, device, dtype, limits)
    return rows + bench_long(cfg, device, limits)


def fill(cache: KVCache | LatentCache, pos: int) -> KVCache | LatentCache:
    """Pretend that `pos` tokens were prefilled: the time of a step does not depend on what they were."""
    for t in cache.tensors:
        t.normal_()
    cache.pos = pos
    return cache


def bench_layer(cfg: BenchConfig, device: str, dtype: torch.dtype, limits: Limits) -> list[dict[str, Any]]:
    """One attention layer of 24 heads of 32, one new token on 32,768 cached ones; L = 192, no rotary part."""
    S, L, C = 32768, 192, 768
    base = {"block_size": S, "vocab_size": 64, "n_layer": 1, "n_head": 24, "n_embd": C, "bias": False}
    mha, mla, grouped, svd = (
        GPT(GPTConfig(**base, **extra)).to(device, dtype).eval()
        for extra in (
            {},
            {"use_mla": True, "mla_latent_dim": L},
            {"use_mla": True, "mla_latent_dim": L // 4, "mla_groups": 4},
            {"use_mla": True, "mla_latent_dim": L, "use_svd": True, "svd_rank": 16},
        )
    )
    x = torch.randn(1, 1, C, device=device, dtype=dtype)
    runs, caches = {}, {}
    for name, model in (("MHA", mha), ("MLA", mla), ("MLA, 4 groups", grouped), ("MLA + SVD", svd)):
        caches[name] = fill(model.make_cache(1, S), S - 1)
        runs[name] = lambda attn=model.transformer.h[0].attn, cache=caches[name]: attn(x, cache)
    attn, (k, v) = mha.transformer.h[0].attn, (t[0] for t in caches["MHA"].tensors)

    def plain() -> Tensor:  # what most code does with a cache; nothing is written, which only favours it
        q = attn.c_attn(x).split(C, dim=2)[0].view(1, 1, 24, 32).transpose(1, 2)
        return attn.c_proj(F.scaled_dot_product_attention(q, k, v).view(1, 1, C))

    runs["MHA by scaled_dot_product_attention"] = plain
    caches["MHA by scaled_dot_product_attention"] = caches["MHA"]
    caches["MLA, expanding every step"] = caches["MLA"]
    runs["MLA, expanding every step"] = lambda: mla.transformer.h[0].attn(x, caches["MLA"], absorb=False)
    if cfg.vs_hf:
        runs["transformers DeepseekV3Attention"] = hf_deepseek(mla, S, L, x)
    took = alternate(runs, cfg.rounds, device, few=("MLA, expanding every step", "transformers DeepseekV3Attention"))
    rows = []
    for name, seconds in took.items():
        row = {"attention": name, "ms": f"{seconds * 1e3:.2f}", "MHA / this": f"{took['MHA'] / seconds:.2f}"}
        row["this / MLA"] = f"{seconds / took['MLA']:.1f}"
        if name in caches:
            nbytes = caches[name].nbytes
            per_key = 2 * 32 if "MHA" in name else 2 * L // (4 if "groups" in name else 1)
            row["cache MB"] = f"{nbytes / 1e6:.1f}"
            if "expanding" not in name:
                row["x roofline"] = f"{seconds / limits.seconds(nbytes, 2 * 24 * per_key * S, dtype):.2f}"
        rows.append(row)
    return table(f"One layer, 24 heads of 32, L = 192, 32,768 cached tokens, one new one, {name_of(dtype)}", rows)


def bench_gpt(cfg: BenchConfig, device: str, dtype: torch.dtype, limits: Limits) -> list[dict[str, Any]]:
    """A 124M GPT, batch 1, 8 greedy tokens from a context of 1,000."""
    context, n = 1000, 8
    models = {
        "MHA": GPT(GPTConfig()),
        "MLA, L = 192": GPT(GPTConfig(use_mla=True, mla_latent_dim=192)),
        "MLA, L = 192, rotary 32": GPT(GPTConfig(pos_emb="rope", use_mla=True, mla_latent_dim=192, mla_rope_dim=32)),
    }
    runs, caches = {}, {}
    idx = torch.randint(50257, (1, context), device=device)

    def decode(model: GPT, cache: KVCache | LatentCache) -> None:
        token, cache.pos = idx[:, -1:], context - 1
        for _ in range(n):
            token = model(token, cache=cache)[0][:, -1].argmax(-1, keepdim=True)

    for name, model in models.items():
        model.to(device, dtype).eval()
        caches[name] = fill(model.make_cache(1, 1024), context - 1)
        runs[name] = lambda model=model, cache=caches[name]: decode(model, cache)
    runs["MHA, no cache (1 token)"] = lambda: models["MHA"](idx)[0].argmax(-1)
    if cfg.vs_hf:
        runs["transformers GPT2LMHeadModel.generate"] = hf_gpt2(device, dtype, idx, n)
    took = alternate(runs, cfg.rounds, device, few=("MHA, no cache (1 token)",))
    took = {name: t if "1 token" in name else t / n for name, t in took.items()}
    hf = took.get("transformers GPT2LMHeadModel.generate")
    rows = []
    for name, seconds in took.items():
        row = {"model": name, "ms/token": f"{seconds * 1e3:.1f}", "tokens/s": f"{1 / seconds:.1f}"}
        row["MHA / this"] = f"{took['MHA'] / seconds:.2f}"
        if hf:
            row["transformers / this"] = f"{hf / seconds:.2f}"
        if name in caches:
            weights = sum(p.nbytes for p in models[name].parameters()) + caches[name].bytes_per_token * context
            row["cache bytes/token"] = f"{caches[name].bytes_per_token:,}"
            row["x roofline"] = f"{seconds / limits.seconds(weights, models[name].flops_per_token(context, True), dtype):.2f}"
        rows.append(row)
    return table(f"A 124M GPT, context 1,000, batch 1, greedy, {name_of(dtype)}", rows)


def bench_long(cfg: BenchConfig, device: str, limits: Limits) -> list[dict[str, Any]]:
    """A 124M GPT with rotary positions, 8 rows at 8,192 tokens of context, one step; MLA with an 8x smaller cache."""
    base, S, B, rows = {"block_size": 8192, "pos_emb": "rope"}, 8192, 8, []
    variants = {"MHA": {}, "MLA, L = 160, rotary 32": {"use_mla": True, "mla_latent_dim": 160, "mla_rope_dim": 32}}
    runs, caches, models = {}, {}, {}
    token = torch.randint(50257, (B, 1), device=device)

    def step(model: GPT, cache: KVCache | LatentCache) -> None:
        cache.pos = S - 1
        model(token, cache=cache)

    for name, extra in variants.items():
        models[name] = GPT(GPTConfig(**base, **extra)).to(device).eval()
        caches[name] = fill(models[name].make_cache(B, S), S - 1)
        runs[name] = lambda model=models[name], cache=caches[name]: step(model, cache)
    took = alternate(runs, max(cfg.rounds // 3, 3), device)
    for name, seconds in took.items():
        weights = sum(p.nbytes for p in models[name].parameters())
        flops = B * models[name].flops_per_token(S, True)
        row = {"model": name, "ms/step": f"{seconds * 1e3:.0f}", "tokens/s": f"{B / seconds:.1f}"}
        row |= {"MHA / this": f"{took['MHA'] / seconds:.2f}", "cache MB": f"{caches[name].nbytes / 1e6:,.0f}"}
        least = limits.seconds(weights + caches[name].nbytes, flops, torch.float32)
        rows.append(row | {"x roofline": f"{seconds / least:.2f}"})
    return table("The same at 8,192 tokens of context, batch 8, rotary, float32", rows)


def hf_deepseek(mla: GPT, S: int, L: int, x: Tensor) -> Callable[[], Any]:
    """transformers' MLA layer of the same sizes, with whatever its own cache keeps."""
    from transformers import DeepseekV3Config, DynamicCache
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding

    nh, hs, C = 24, 32, mla.config.n_embd
    config = DeepseekV3Config(
        hidden_size=C, num_attention_heads=nh, num_key_value_heads=nh, q_lora_rank=None, kv_lora_rank=L,
        qk_rope_head_dim=2, qk_nope_head_dim=hs - 2, v_head_dim=hs, rope_interleave=False, num_hidden_layers=1,
        max_position_embeddings=S, attn_implementation="sdpa",
    )  # fmt: skip
    layer = DeepseekV3Attention(config, 0).to(x.device, x.dtype).eval()
    rotary = DeepseekV3RotaryEmbedding(config).to(x.device)(x, torch.tensor([[S - 1]], device=x.device))
    cache = DynamicCache(config=config)
    probe = DynamicCache(config=config)  # learns the shapes that it caches
    layer(x, position_embeddings=rotary, attention_mask=None, past_key_values=probe)
    k, v = probe.layers[0].keys, probe.layers[0].values
    cache.update(*(torch.randn(*t.shape[:2], S - 1, t.shape[3], device=x.device, dtype=x.dtype) for t in (k, v)), 0)

    def run() -> None:
        layer(x, position_embeddings=rotary, attention_mask=None, past_key_values=cache)
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

    def run() -> None:
        model.generate(idx, past_key_values=cache, max_new_tokens=n, do_sample=False, use_cache=True)
        cache.crop(-n)  # what the call added

    return run


# ----------------------------------------------------------------------------------------------------------------------
# train


def bench_train(cfg: BenchConfig, device: str) -> list[dict[str, Any]]:
    rows = bench_iteration(cfg, device, 4, 4, 128, 12, 64, torch.float32, cfg.rounds * 3)
    for dtype in (torch.float32, torch.bfloat16):
        rows += bench_iteration(cfg, device, 6, 6, 384, 8, 256, dtype, max(cfg.rounds // 2, 3))
    return rows


def bench_iteration(
    cfg: BenchConfig, device: str, n_layer: int, n_head: int, C: int, B: int, T: int, dtype: torch.dtype, rounds: int
) -> list[dict[str, Any]]:
    """Forward, backward, clipping and AdamW on one batch, for every variant."""
    shape = {"block_size": T, "vocab_size": 65, "n_layer": n_layer, "n_head": n_head, "n_embd": C, "bias": False}
    rope, latent = {"pos_emb": "rope"}, {"use_mla": True, "mla_latent_dim": C // 4}
    svd = {"use_svd": True, "svd_rank": C // n_head // 2}
    variants: dict[str, dict[str, Any]] = {
        "MHA": {}, "MHA + SVD": svd, "MLA": latent, "MLA + SVD": latent | svd, "MHA, rotary": rope,
        "MLA, rotary": rope | latent | {"mla_rope_dim": 16}, "MLA + SVD, rotary": rope | latent | svd | {"mla_rope_dim": 16},
    }  # fmt: skip
    x, y = torch.randint(65, (2, B, T), device=device)
    runs, counts = {}, {}

    def iterate(loss_of: Callable[[], Tensor], params: list[Tensor], optimizers: list[torch.optim.Optimizer]) -> None:
        with torch.autocast(device.partition(":")[0], dtype, enabled=dtype != torch.float32):
            loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        for opt in optimizers:
            opt.step()
            opt.zero_grad(set_to_none=True)

    for name, extra in variants.items():
        model = GPT(GPTConfig(**shape, **extra)).to(device)
        optimizers = list(make_optimizers(model, TrainConfig(), device.partition(":")[0]).values())
        counts[name] = model.get_num_params()
        runs[name] = lambda m=model, o=optimizers: iterate(lambda: m(x, y)[1], list(m.parameters()), o)
    if cfg.vs_hf:
        from transformers import GPT2Config, GPT2LMHeadModel
        from transformers.utils import logging

        logging.set_verbosity_error()
        drop = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": None, "eos_token_id": None}
        theirs = GPT2LMHeadModel(GPT2Config(vocab_size=65, n_positions=T, n_embd=C, n_layer=n_layer, n_head=n_head, **drop)).to(device)
        adamw = torch.optim.AdamW(theirs.parameters(), lr=6e-4, fused=True)
        counts["transformers GPT2LMHeadModel"] = theirs.num_parameters()
        runs["transformers GPT2LMHeadModel"] = lambda: iterate(
            lambda: F.cross_entropy(theirs(x).logits.flatten(0, 1), y.flatten()), list(theirs.parameters()), [adamw]
        )
    took = alternate(runs, rounds, device)
    rows = []
    for name, seconds in took.items():
        beside = took["MHA, rotary" if "rotary" in name else "MHA"]
        row = {"model": name, "parameters": f"{counts[name]:,}", "ms/iteration": f"{seconds * 1e3:.1f}"}
        row |= {"tokens/s": f"{B * T / seconds:,.0f}", "this / MHA of the same positions": f"{seconds / beside:.3f}"}
        rows.append(row)
    return table(f"Training iteration, {n_layer} layers, {C} wide, batch {B} x {T}, {name_of(dtype)}, AdamW", rows)


# ----------------------------------------------------------------------------------------------------------------------
# svd and --report


def bench_svd(cfg: BenchConfig, device: str) -> list[dict[str, Any]]:
    """One 1600 x 6400 matrix to rank 64, once with a spectrum that decays and once as initialised."""
    U, V = (torch.linalg.qr(torch.randn(n, 1600, device=device))[0] for n in (1600, 6400))
    matrices = {"decaying spectrum": (U * 0.99 ** torch.arange(1600, device=device)) @ V.T}
    matrices["normal random"] = torch.randn(1600, 6400, device=device) * 0.02
    rows = []
    for kind, W in matrices.items():
        results: dict[str, tuple[Tensor, Tensor, float]] = {}
        runs = {m: lambda m=m, W=W, out=results: out.update({m: factorise(W[None], 64, m)}) for m in ("exact", "randomized")}
        took = alternate(runs, 1, device)
        for method, (down, up, _) in results.items():
            error = float((W - up[0] @ down).norm() / W.norm())
            rows.append(
                {"matrix": kind, "method": method, "seconds": f"{took[method]:.2f}", "relative error": f"{error:.5f}"}
                | {"exact / this": f"{took['exact'] / took[method]:.1f}"}
            )
    return table("1600 x 6400 to rank 64, computed in float64", rows)


def report(cfg: BenchConfig) -> list[dict[str, Any]]:
    """Parameters by part, cache bytes per token and FLOPs per decoded token of a config, beside MHA's."""
    config = cfg.model_config(cfg.vocab_size or 50304)
    plain = dataclasses.replace(config, use_mla=False, use_svd=False)
    columns = {"this config": GPT(config), "MHA": GPT(plain)}

    def part(model: GPT, name: str) -> int:
        h = model.transformer.h
        if name == "embeddings and lm_head":
            return model.get_num_params(non_embedding=False) - part(model, "blocks") - part(model, "final norm")
        if name == "final norm":
            return sum(p.numel() for p in model.transformer.ln_f.parameters())
        if name == "keys and values":
            attns = [block.attn for block in h]
            return round(sum(a.mha_kv_count() for a in attns) / model.get_compression_ratio())
        wanted = {"attention": ".attn.", "MLPs": ".mlp.", "blocks": ""}[name]
        return sum(p.numel() for n, p in h.named_parameters() if wanted in f".{n}")

    lines: list[tuple[str, Callable[[GPT], float]]] = [
        *((f"parameters: {n}", lambda m, n=n: part(m, n)) for n in ("embeddings and lm_head", "attention", "MLPs")),
        ("parameters: all", lambda m: m.get_num_params(non_embedding=False)),
        ("of these, making keys and values", lambda m: part(m, "keys and values")),
        ("cache bytes per token, float32", lambda m: m.make_cache(1, 1, torch.float32).bytes_per_token),
        ("cache bytes per token, bfloat16", lambda m: m.make_cache(1, 1, torch.bfloat16).bytes_per_token),
        (f"FLOPs per decoded token at {cfg.context:,}", lambda m: m.flops_per_token(cfg.context, absorbed=True)),
        ("FLOPs per trained token (forward and backward)", lambda m: 3 * m.flops_per_token(config.block_size)),
    ]
    rows = []
    for what, count in lines:
        mine, theirs = (count(model) for model in columns.values())
        rows.append({"": what, "this config": f"{mine:,}", "MHA": f"{theirs:,}", "MHA / this": f"{theirs / mine:.2f}"})
    return table("Counted from the tensors themselves", rows)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    run_script(main)
