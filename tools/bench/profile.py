"""Where the time of a training iteration goes."""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from model import GPT
from nanomla.cache import dtype_name
from nanomla.dataset import Dataset
from nanomla.distributed import resolve_dtype
from nanomla.optim import make_optimizers
from nanomla.start import padded_vocab
from tools.bench.timing import Rows, table
from train import TrainConfig

WARM_UP = 5  # iterations


def measure(device: str, rounds: int, recipe: TrainConfig) -> Rows:
    """Medians of an iteration's parts over consecutive iterations of this run."""
    kind = device.partition(":")[0]
    data = Dataset(recipe.dataset, recipe.model.block_size)
    vocab_size = recipe.vocab_size or padded_vocab(data)
    data.model_vocab_size = vocab_size
    config = dataclasses.replace(recipe.model, vocab_size=vocab_size)
    model = GPT(config).to(device)
    optimizers = make_optimizers(model, recipe, kind)
    dtype = getattr(torch, resolve_dtype(recipe.dtype, kind, config.n_embd))
    parts = ["batch", "forward", "backward", "clipping", *optimizers]
    times: dict[str, list[float]] = {part: [] for part in parts}  # of every iteration

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

    for it in range(WARM_UP + rounds):
        for part in parts:
            times[part].append(0.0)
        for micro in range(recipe.gradient_accumulation_steps):
            first = micro * recipe.batch_size
            batch = (recipe.seed, it, range(first, first + recipe.batch_size))
            x, y = timed("batch", lambda batch=batch: data.batch(*batch))
            loss = timed("forward", lambda x=x, y=y: forward(x, y))
            timed("backward", (loss / recipe.gradient_accumulation_steps).backward)
        timed("clipping", lambda: nn.utils.clip_grad_norm_(model.parameters(), recipe.grad_clip))
        for name, optimizer in optimizers.items():
            timed(name, optimizer.step)
            optimizer.zero_grad(set_to_none=True)
    medians = {part: statistics.median(seconds[WARM_UP:]) for part, seconds in times.items()}
    whole = sum(medians.values())
    rows = []
    for part, seconds in (medians | {"all": whole}).items():
        rows.append({"part": part, "ms": f"{seconds * 1e3:.2f}", "share": f"{seconds / whole:.0%}"})
    size = f"{model.get_num_params():,} parameters, {recipe.gradient_accumulation_steps} x "
    size += f"{recipe.batch_size} x {config.block_size} tokens, {dtype_name(dtype)}"
    return table(f"An iteration of {size}", rows)
