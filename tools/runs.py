"""
The runs of a comparison: what each is asked for, the processes that train them side by side, and
what is measured of a trained one.
"""

import dataclasses
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field

import train
from model import GPT, GPTConfig
from nanomla import checkpoint, costs, runlog
from nanomla.checks import Count, Natural, NonNegative, Number, check
from nanomla.dataset import Dataset, locked
from nanomla.distributed import print0, resolve_device, resolve_dtype, warn0
from nanomla.errors import UserError
from nanomla.files import read_record, write_text
from nanomla.settings import configure
from nanomla.start import stored_settings
from nanomla.tokenizer import ends_of_text
from tools.bench.decode import decoding
from tools.bench.timing import alternate

LONGEST_WAIT = 120  # seconds, for a run of a comparison that was killed

# Iteration, seconds until then and validation loss.
Point = Annotated[list[int | float], Field(min_length=3, max_length=3)]


@dataclass
class Order:
    """What job.json asks the process of a run for."""

    flags: list[str]  # train.py's
    eval_tokens: Count

    def __post_init__(self) -> None:
        check(self)


@dataclass
class Result:
    """What is measured of a run, in result.json."""

    eval_tokens: Count
    val_loss: Number  # nats per token, over about so many tokens
    iterations: Natural
    tokens: Natural
    parameters: Natural
    attention_parameters: Natural
    cached_numbers: NonNegative  # per token and layer
    # per token, of all layers; a constant state is shared out over a full context
    cache_bytes: NonNegative
    training_flops: Natural | NonNegative  # of an iteration
    ms: float | None  # of an iteration
    curve: list[Point]
    dataset: str
    model: dict[str, Any]  # the fields of GPTConfig

    def __post_init__(self) -> None:
        check(self)
        self.model = dataclasses.asdict(GPTConfig(**self.model))


@dataclass(frozen=True)
class Job:
    """One run."""

    variant: str
    equal: str  # "tokens" or "parameters": what it has in common with the first variant's
    lr_factor: float
    seed: int
    flags: tuple[str, ...]  # train.py's, all but out_dir
    eval_tokens: int
    folder: Path

    @property
    def result(self) -> dict[str, Any] | None:
        """What its process measured; None until it has ended. A wrong file is a warning."""
        path = self.folder / "result.json"
        if not path.is_file():
            return None
        try:
            result = read_record(path, Result)
        except UserError as error:
            warn0(f"{error}; it is made again")
            return None
        if result.eval_tokens != self.eval_tokens:  # of an earlier comparison
            return None
        return vars(result)

    def __str__(self) -> str:
        name = self.variant
        if self.equal == "parameters":
            name += ", equal parameters"
        return f"{name}, rate x {self.lr_factor:g}, seed {self.seed}"


# ---- The process of one run
def run_job(folder: Path) -> None:
    """Train and measure what job.json in this folder says, and write result.json."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    job = read_record(folder / "job.json", Order)
    flags = [*job.flags, f"--out_dir={folder}"]
    if (folder / checkpoint.LATEST).exists():
        flags.append("--init_from=resume")
    train.main(flags)
    result = measure(folder, job.eval_tokens)
    cfg, _ = configure(train.TrainConfig, job.flags)
    if result["iterations"] < cfg.max_iters:  # train.py goes on without one on a full disk
        raise UserError(f"the last checkpoint, of iteration {cfg.max_iters}, could not be written")
    write_text(folder / "result.json", json.dumps(result))


def _end_with_parent() -> None:
    """Stop this run, as a signal would, when the process that started it is gone."""
    os.read(0, 1)  # returns at the end of stdin, which is a pipe from that process
    os.kill(os.getpid(), signal.SIGTERM)


def wait_for_earlier(job: Job) -> None:
    """
    Wait, for at most LONGEST_WAIT seconds, while a run trains in a job's folder: after a comparison
    was killed, its runs end their iteration before they stop.
    """
    waits = False
    deadline = time.monotonic() + LONGEST_WAIT
    while time.monotonic() < deadline:
        try:
            with locked(job.folder, "training in it"):
                return
        except UserError as error:
            if not waits:
                print0(f"{error}; waiting up to {LONGEST_WAIT} s for it to end")
            waits = True
            time.sleep(0.2)


class Pool:
    """
    Runs jobs side by side, each in a process, and prints a line as each of them ends.

    size: how many at a time. None stands for the number of a CPU's cores, at most 4.
    """

    def __init__(self, size: int | None, device: str) -> None:
        cores = os.cpu_count()
        if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
            cores = len(os.sched_getaffinity(0))
        if size is None:
            size = 1
            if resolve_device(device) == "cpu":
                size = min(cores, 4)
        self.size = size
        self.environ = os.environ | {"OMP_NUM_THREADS": str(max(cores // size, 1))}
        self.errors: dict[Path, str] = {}  # why runs have failed, by their folders
        self.seconds: list[float] = []  # that every run took

    def run(self, jobs: list[Job]) -> None:
        """Run all that have no result yet."""
        jobs = list({job.folder: job for job in jobs}.values())  # some are the same run
        waiting = [job for job in jobs if job.result is None]
        if len(waiting) < len(jobs):
            print0(f"{len(jobs) - len(waiting)} of {len(jobs)} runs are done already")
        running: dict[Job, tuple[subprocess.Popen, float]] = {}
        try:
            while waiting or running:
                while waiting and len(running) < self.size:
                    job = waiting.pop(0)
                    running[job] = (self._start(job), time.perf_counter())
                time.sleep(0.05)
                for job, (process, began) in list(running.items()):
                    if process.poll() is not None:
                        del running[job]
                        self.seconds.append(time.perf_counter() - began)
                        outcome = self._outcome(job, process.returncode)
                        left = self._time_left(len(waiting) + len(running))
                        print0(f"{job}: {outcome} ({self.seconds[-1]:.0f} s; {left})")
        finally:
            for process, _ in running.values():
                process.terminate()  # train.py saves its checkpoint, which takes a moment
            for process, _ in running.values():
                process.wait()
            if running:
                print0("stopped; the same command goes on from here")

    def _start(self, job: Job) -> subprocess.Popen:
        job.folder.mkdir(parents=True, exist_ok=True)
        wait_for_earlier(job)
        content = {"flags": job.flags, "eval_tokens": job.eval_tokens}
        write_text(job.folder / "job.json", json.dumps(content))
        with open(job.folder / "output.txt", "wb") as output:
            return subprocess.Popen(
                [sys.executable, "-m", "tools.compare", "--run", str(job.folder)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self.environ,
                start_new_session=True,  # Ctrl-C reaches this process, which ends the others
            )

    def _time_left(self, runs: int) -> str:
        """How many runs of these are left, and about how long they take, in words."""
        if runs == 0:
            return "the last of these"
        seconds = statistics.median(self.seconds) * runs / self.size
        return f"{runs} left of these, about {runlog.clock(seconds)}"

    def _outcome(self, job: Job, status: int) -> str:
        """How a run ended, in words."""
        if status == 0 and job.result is not None:
            return f"loss {job.result['val_loss']:.4f}"
        output = (job.folder / "output.txt").read_text(encoding="utf-8", errors="replace")
        lines = output.strip().splitlines() or [f"exit status {status}"]
        self.errors[job.folder] = re.sub("^[a-z_.]+: error: ", "", lines[-1])
        return f"failed: {self.errors[job.folder]}"


# ---- What a trained run shows
def measure(folder: Path, eval_tokens: int) -> dict[str, Any]:
    """
    The final loss of a run over the validation split, its costs and its learning curve.

    Raises UserError for a folder without a run, or whose dataset is not there.
    """
    stored = checkpoint.load(folder / checkpoint.LATEST)
    model, _ = checkpoint.build(stored)
    config = model.config
    settings = stored_settings(train.TrainConfig, stored)
    if "dataset" not in settings:
        raise UserError(f"{stored.source}: it does not say which dataset it was trained on")
    sequences = settings.get("batch_size", 1) * settings.get("gradient_accumulation_steps", 1)
    tokens = sequences * config.block_size  # of an iteration
    attentions = [block.attn for block in model.transformer.h]
    entries = runlog.read_log(folder / "log.jsonl")
    times = [entry["ms"] for entry in entries if "ms" in entry]
    cache = model.make_cache(1, config.block_size)
    return {
        "eval_tokens": eval_tokens,
        "val_loss": final_loss(model, settings, eval_tokens),
        "iterations": stored.iter_num,
        "tokens": tokens * stored.iter_num,
        "parameters": model.get_num_params(),
        "attention_parameters": sum(p.numel() for attn in attentions for p in attn.parameters()),
        "cached_numbers": costs.cached_numbers(model),
        "cache_bytes": cache.nbytes / config.block_size,
        "training_flops": 3 * costs.flops_per_token(model, config.block_size) * tokens,
        "ms": statistics.median(times) if times else None,
        "curve": learning_curve(entries),
        "dataset": settings["dataset"],
        "model": dataclasses.asdict(config),
    }


@torch.no_grad()
def final_loss(model: GPT, settings: dict[str, Any], eval_tokens: int) -> float:
    """Mean loss over about so many validation tokens, in the dtype of the run's settings."""
    config = model.config
    device = resolve_device(settings.get("device", "auto"))
    device_type = device.partition(":")[0]
    dtype = resolve_dtype(settings.get("dtype", "auto"), device_type, config.n_embd)
    model.to(device).eval()
    data = Dataset(settings["dataset"], config.block_size)
    data.model_vocab_size = config.vocab_size
    if settings.get("within_documents"):
        data.ends = ends_of_text(data.tokenizer)
    losses = []
    for x, y in data.spread("val", eval_tokens, max(1, min(64, 16384 // config.block_size))):
        with torch.autocast(device_type, getattr(torch, dtype), enabled=dtype != "float32"):
            losses.append(model(x.to(device), y.to(device))[1].item())
    return sum(losses) / len(losses)


def learning_curve(entries: list[dict[str, Any]]) -> list[tuple[int, float, float]]:
    """Iteration, seconds until then and validation loss of every evaluation in a log."""
    curve = []
    before = 0.0  # seconds until the run was last resumed, when its clock started anew
    last = 0.0
    for entry in entries:
        if "val_loss" not in entry or "seconds" not in entry:
            continue
        if entry["seconds"] < last:
            before += last
        last = entry["seconds"]
        curve.append((entry["iter"], before + last, entry["val_loss"]))
    return curve


@torch.inference_mode()
def decode_rates(models: dict[str, GPT], context: int, device: str) -> dict[str, float]:
    """Tokens/s of greedy decoding at a context, batch 1, in turn, by name."""
    entries = []
    for name, model in models.items():
        entries.append(decoding(name, model, 1, context, context, 8))
    took = alternate(entries, 9, device)
    return {name: 1 / entry.seconds for name, entry in took.items()}
