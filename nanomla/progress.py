"""What a run reports while it trains: lines on the terminal, a progress bar, entries in its log."""

import math
import sys
import time
from dataclasses import dataclass
from typing import Self

import torch
from tqdm import tqdm

from model import GPT
from nanomla import costs, optim
from nanomla.dataset import Dataset
from nanomla.distributed import World, print0
from nanomla.errors import UserError
from nanomla.runlog import RunLog, clock, evaluation_text
from nanomla.tokenizer import Tokenizer


@dataclass
class Progress:
    """
    Reports the iterations and evaluations of a run.

    As a context manager it keeps the progress bar and the log open.
    """

    cfg: optim.Settings
    world: World
    model: GPT
    data: Dataset
    dtype: str  # of its matrix products
    first: int  # the iteration that the run starts at
    tokens_per_iter: int
    began: float  # time.perf_counter() at the start of the run
    log: RunLog | None  # on rank 0 alone
    seconds: float = 0.0  # in iterations after the first one, which is slower
    skipped: int = 0  # updates that float16 left out
    evaluations: int = 0

    def __enter__(self) -> Self:
        hidden = not (self.world.is_main and sys.stderr.isatty())
        total = self.cfg.max_iters
        self.bar = tqdm(total=total, initial=self.first, unit="iter", disable=hidden)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.bar.close()
        if self.log is not None:
            self.log.close(at_once=kind is KeyboardInterrupt)

    def iteration(self, it: int, loss: float, norm: float, seconds: float) -> None:
        """Count an iteration and, every log_interval, print and log it."""
        cfg = self.cfg
        self.bar.update()
        if it > self.first:
            self.seconds += seconds
        if not math.isfinite(norm):
            self.skipped += 1
        if it % cfg.log_interval:
            return

        rate = self.tokens_per_iter / seconds  # tokens per second
        if self.seconds:
            rate = self.tokens_per_iter * (it - self.first) / self.seconds
        left = clock((cfg.max_iters - it - 1) * self.tokens_per_iter / rate)
        lr = optim.lr_factor(cfg, it) * cfg.learning_rate
        ms = seconds * 1e3
        line = f"iter {it}: loss {loss:.4f}, norm {norm:.3f}, lr {lr:.2e}, {ms:.1f} ms, "
        line += f"{rate:,.0f} tokens/s, ETA {left}"
        per_rank = rate / self.world.size
        context = self.model.config.block_size
        mfu = costs.mfu(self.model, context, per_rank, self.world.device_type, self.dtype)
        if mfu:
            line += f", MFU {mfu:.1%}"
        if self.skipped:
            line += f", {self.skipped} skipped"
        print0(line)
        if self.log is not None:
            self.log.write(iter=it, loss=loss, grad_norm=norm, lr=lr, ms=ms, tokens_per_s=rate)

    def evaluation(self, it: int, measures: dict[str, float]) -> None:
        """Print and log an evaluation, redraw loss.png, and print a sample if one is due."""
        seconds = round(time.perf_counter() - self.began, 2)
        print0(f"iteration {it}: {evaluation_text(measures)} ({clock(seconds)})")
        if self.log is not None:
            self.log.write(iter=it, **measures, seconds=seconds)
            self.log.plot()
        every = self.cfg.sample_interval
        if every and self.evaluations % every == 0:
            print_sample(self.model, self.data)
        self.evaluations += 1


def print_sample(model: GPT, data: Dataset) -> None:
    """Print 100 tokens that the model adds to the start of the validation text."""
    if data.tokenizer is None:
        return
    device = model.lm_head.weight.device
    training = model.training
    prompt = data.eval_batch("val", 0, 1, 1)[0][:, : min(16, data.block_size)].to(device)
    generator = torch.Generator(device).manual_seed(0)  # so that training's state stays as it is
    model.eval()
    out = model.generate(prompt, 100, temperature=0.8, generator=generator)
    model.train(training)
    print0("sample: " + repr(Tokenizer(data.tokenizer).decode(out[0].tolist())))


def diverged(cfg: optim.Settings, it: int, losses: str, last_checkpoint: str) -> UserError:
    """The error that ends a run whose loss or gradient norm is not finite."""
    lr = optim.lr_factor(cfg, it) * cfg.learning_rate
    return UserError(
        f"iteration {it}: {losses}, at learning rate {lr:.3g}; last good checkpoint: "
        f"{last_checkpoint}; try a lower learning rate, or dtype=float32"
    )
