"""
What claims about latent attention need beyond training the model's own variants: changes that the
model does not offer (CHANGES), and measurements of other kinds (MEASURES). tools/compare.py applies
the first to a variant with change=NAME, and calls the second for measure="NAME NAME".
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import model as gpt
from experiments import svd_forward, three_step
from model import ATTENTION, GPT, GPTConfig, RMSNorm
from nanomla import checkpoint, costs
from nanomla.attention import Rotation
from nanomla.cache import LayerCache
from nanomla.dataset import Dataset
from nanomla.kernels import attend, dequantise
from tools.bench.timing import Rows, Timed, alternate, fill, markdown


# ---- changes to the model
class RotatedKeys(ATTENTION["mla"]):
    """
    MLA whose keys are expanded from the latent, then rotated, instead of a rotary key beside it.

    W_UK cannot be moved to the query through the rotation, so every step expands all keys.
    """

    def __init__(self, config: GPTConfig, layer: int = 0) -> None:
        super().__init__(config, layer)
        heads = dataclasses.replace(config, attention="mha", use_mla=False)  # rotates whole heads
        self.tables = gpt.rope_tables(
            torch.arange(config.block_size, device="cpu"), heads, torch.float32
        )

    def forward(
        self, x: Tensor, cache: LayerCache | None = None, rotation: Rotation = None,
        absorb: bool | None = None,
    ) -> Tensor:  # fmt: skip
        """x (B, T, C) -> (B, T, C)."""
        T = x.size(1)
        pos = 0 if cache is None else cache.pos
        q, _ = self._split_queries(x, None)
        c, kr = self._latents(x, None)
        if cache is not None:
            c = dequantise(cache.append(c)[0], q.dtype)
            kr = c[..., :0]
        k, v = self._keys_and_values(c, kr)
        cos, sin = (t.to(x.device) for t in self.tables)
        q = gpt.apply_rope(q.transpose(1, 2), (cos[pos : pos + T], sin[pos : pos + T]))
        k = gpt.apply_rope(k.transpose(1, 2), (cos[: pos + T], sin[: pos + T]))
        return self._output(attend(q.transpose(1, 2), k.transpose(1, 2), v, scale=self.scale))


class NormedKeysAndValues(ATTENTION["mla"]):
    """MLA with a norm on every head's expanded keys and values, which cannot be absorbed either."""

    def __init__(self, config: GPTConfig, layer: int = 0) -> None:
        super().__init__(config, layer)
        self.k_norm, self.v_norm = RMSNorm(self.nope, eps=1e-6), RMSNorm(self.hs, eps=1e-6)

    def forward(
        self, x: Tensor, cache: LayerCache | None = None, rotation: Rotation = None,
        absorb: bool | None = None,
    ) -> Tensor:  # fmt: skip
        """x (B, T, C) -> (B, T, C)."""
        return super().forward(x, cache, rotation, absorb=False)

    def _keys_and_values(self, c: Tensor, kr: Tensor) -> tuple[Tensor, Tensor]:
        k, v = super()._keys_and_values(c, kr)
        content, rotary = k.split([self.nope, self.r], dim=-1)
        return torch.cat([self.k_norm(content), rotary], dim=-1), self.v_norm(v)


@contextlib.contextmanager
def _attention(kind: str, attention: type) -> Iterator[None]:
    before = ATTENTION[kind]
    ATTENTION[kind] = attention
    try:
        yield
    finally:
        ATTENTION[kind] = before


@contextlib.contextmanager
def _xavier() -> Iterator[None]:
    """Draw the blocks' matrices with variance 2 / (rows + columns) (Glorot and Bengio, 2010)."""
    before = gpt.init_weights

    def draw(model: nn.Module, n_layer: int) -> None:
        before(model, n_layer)
        for module in model.transformer.h.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_normal_(module.weight)

    gpt.init_weights = draw
    try:
        yield
    finally:
        gpt.init_weights = before


CHANGES: dict[str, Callable[[], contextlib.AbstractContextManager]] = {
    "rotated_keys": lambda: _attention("mla", RotatedKeys),
    "normed_kv": lambda: _attention("mla", NormedKeysAndValues),
    "xavier": _xavier,
}


def changed(name: str | None) -> contextlib.AbstractContextManager:
    """A context in which GPT builds its models with this change; None: without one."""
    return CHANGES[name]() if name else contextlib.nullcontext()


# ---- measurements
@torch.inference_mode()
def decode_rates(
    shapes: dict[str, tuple[dict[str, Any], str | None]], context: int, device: str, n: int = 8
) -> dict[str, float]:
    """
    Tokens/s of greedy decoding at a context, batch 1, float32, in turn, by name.

    shapes: a model's config and its change. The context may be longer than the config's. Weights
    are random, as the time does not depend on them.
    """
    entries = []
    for name, (shape, change) in shapes.items():
        with changed(change):
            config = dataclasses.replace(GPTConfig(**shape), block_size=context)
            model = GPT(config).to(device).eval()
        entries.append(_decoding(name, model, 1, context, n))
    took = alternate(entries, 9, device)
    return {name: 1 / entry.seconds for name, entry in took.items()}


def _decoding(name: str, model: GPT, B: int, context: int, n: int) -> Timed:
    """n steps of B rows that end at a context of so many tokens."""
    cache = fill(model.make_cache(B, context), context - n)
    token = torch.zeros(B, 1, dtype=torch.int64, device=model.lm_head.weight.device)

    def run() -> None:
        cache.rewind(context - n)
        for _ in range(n):
            model(token, cache=cache)[0][:, -1].argmax(-1)

    return Timed(name, run, cache=cache, steps=n)


def measure_costs(cfg: Any, device: str, variants: dict[str, GPTConfig], rows: Rows) -> list[str]:
    """Counted: attention parameters, cache and the arithmetic of attention, beside the first's."""
    table: Rows = []
    first: list[float] = []
    context = cfg.decode_context
    for name, config in variants.items():
        with torch.device("meta"):
            model = GPT(config)
        attns = [block.attn for block in model.transformer.h]
        per_layer = sum(p.numel() for p in attns[0].parameters())
        numbers = costs.cached_numbers(model)
        # a query meets half of a context's keys on average
        weights = sum(p.numel() for p in attns[0].parameters() if p.dim() > 1)
        own = attns[0].flops_per_token(False) / 2 - weights
        arithmetic = attns[0].flops_per_key(False) / 2 * context / 2 + own
        figures = [per_layer, numbers, arithmetic]
        first = first or figures
        row = {"variant": name, "attention parameters a layer": f"{per_layer:,}"}
        row["fewer"] = f"{1 - per_layer / first[0]:.0%}"
        row["cached numbers"] = f"{numbers:g}" if numbers else "a state"
        row["smaller"] = f"{first[1] / numbers:.3g}x" if numbers else ""
        row[f"products per token at {context:,} tokens"] = f"{arithmetic:,.0f}"
        row["less"] = f"{first[2] / arithmetic:.3g}x"
        table.append(row)
    return ["", "## Counted", "", *markdown(table)]


@torch.inference_mode()
def measure_decoding(
    cfg: Any, device: str, variants: dict[str, GPTConfig], rows: Rows
) -> list[str]:
    """Tokens/s at batch 1, and with the largest batch whose caches fit a budget, in turn."""
    context, entries, batches = cfg.decode_context, [], {}
    for name, config in variants.items():
        model = GPT(dataclasses.replace(config, block_size=context)).to(device).eval()
        per_row = model.make_cache(1, context).nbytes
        batches[name] = max(int(cfg.cache_budget * 2**20 // per_row), 1)
        entries.append(_decoding(name, model, 1, context, 4))
        entries.append(_decoding(f"{name}, batched", model, batches[name], context, 4))
    took = alternate(entries, 7, device)
    alone = [took[name].seconds for name in variants]
    table: Rows = []
    for name, seconds in zip(variants, alone, strict=True):
        batched = batches[name] / took[f"{name}, batched"].seconds
        base = batches[next(iter(variants))] / took[f"{next(iter(variants))}, batched"].seconds
        row = {"variant": name, "tokens/s, batch 1": f"{1 / seconds:.1f}"}
        row["faster"] = f"{alone[0] / seconds:.2f}x"
        row["largest batch"] = str(batches[name])
        row["tokens/s with it"] = f"{batched:.1f}"
        table.append(row | {"more": f"{batched / base:.2f}x"})
    what = f"Decoding at {context:,} tokens, float32; batches whose caches fit"
    return ["", f"## {what} {cfg.cache_budget:g} MB", "", *markdown(table)]


@torch.no_grad()
def measure_cached_loss(
    cfg: Any, device: str, variants: dict[str, GPTConfig], rows: Rows
) -> list[str]:
    """The trained models' loss token by token through the cache, in several formats of it."""
    table: Rows = []
    for name in variants:
        mine = [r for r in rows if r["variant"] == name and r["best_rate"] and "val_loss" in r]
        if not mine or mine[0].get("change"):
            continue
        loaded, _ = checkpoint.build(checkpoint.load(Path(mine[0]["folder"]) / checkpoint.LATEST))
        loaded.to(device).eval()
        data = Dataset(mine[0]["dataset"], loaded.config.block_size)
        batches = data.spread("val", 2**15, 128)
        batches = [(x.to(device), y.to(device)) for x, y in batches]
        whole = sum(loaded(x, y)[1].item() for x, y in batches) / len(batches)
        row = {"variant": name, "without a cache": f"{whole:.6f}"}
        for dtype in (torch.float32, torch.bfloat16, torch.int8):
            if dtype == torch.int8 and not loaded.make_cache(1, 1).grows:
                continue
            loss = sum(_cached_loss(loaded, x, y, dtype) for x, y in batches) / len(batches)
            row[str(dtype).removeprefix("torch.")] = f"{loss - whole:+.6f}"
        table.append(row)
    title = "## Loss token by token through the cache, less that without one"
    return ["", title, "", *markdown(table)]


def _cached_loss(model: GPT, x: Tensor, y: Tensor, dtype: torch.dtype) -> float:
    """Mean cross-entropy of y (B, T) by T decoding steps over x (B, T)."""
    cache, total = model.make_cache(len(x), x.size(1), dtype), 0.0
    for t in range(x.size(1)):
        logits = model(x[:, t : t + 1], cache=cache)[0][:, -1]
        total += nn.functional.cross_entropy(logits, y[:, t]).item()
    return total / x.size(1)


def measure_three_step(cfg: Any, device: str, *_: Any) -> list[str]:
    """The bidirectional block of tools/three_step.py: cost, losses, leak."""
    own = three_step.ThreeStepConfig(**_short(cfg, device), longest=2048, rounds=5)
    return _tables(three_step.measure(own))


def measure_svd_forward(cfg: Any, device: str, *_: Any) -> list[str]:
    """The SVD of value activations of tools/svd_forward.py: cost, losses, leak."""
    own = svd_forward.SvdForwardConfig(**_short(cfg, device))
    return _tables(svd_forward.measure(own))


def _short(cfg: Any, device: str) -> dict[str, Any]:
    return {"dataset": cfg.train.dataset, "device": device, "max_iters": 400}


def _tables(rows: Rows) -> list[str]:
    """The lines of tables whose rows name theirs, as tools.bench.table returns them."""
    lines = []
    for title in dict.fromkeys(row["table"] for row in rows):
        mine = [row for row in rows if row["table"] == title]
        lines += ["", f"## {title}", ""]
        lines += markdown([{k: v for k, v in row.items() if k != "table"} for row in mine])
    return lines


MEASURES: dict[str, Callable[..., list[str]]] = {
    "costs": measure_costs,
    "decoding": measure_decoding,
    "cached_loss": measure_cached_loss,
    "three_step": measure_three_step,
    "svd_forward": measure_svd_forward,
}
