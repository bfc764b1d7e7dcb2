"""
Train a GPT on one process, or on many under torchrun.

    python train.py config/train_mla.py --mla_latent_dim=32
    python train.py config/train_mla.py --init_from=resume
    torchrun --standalone --nproc_per_node=2 train.py config/train_mla.py
"""

import contextlib
import dataclasses
import math
import os
import re
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

import checkpoint as ckpt
from configurator import UsageError, UserError, configure, describe, run_script
from data.loader import Dataset
from data.tokenizer import Tokenizer
from model import GPT, GPTConfig
from parallel import World, gradient_sync, load_optimizer_state, one_voice, whole, wrap
from runlog import RunLog

GPT_SETTINGS = [f.name for f in dataclasses.fields(GPTConfig)]
NANOGPT_HINTS = {"always_save_checkpoint": ": leave it out, ckpt.pt is always the latest and best.pt the best"}


@dataclass
class TrainConfig(GPTConfig):
    """Everything a run can be told: GPTConfig's fields and the loop's. Raises ValueError as GPTConfig does."""

    bias: Annotated[bool, "biases in linear layers and layer norms, as GPT-2"] = False
    vocab_size: Annotated[int | None, "token ids the model knows; None: the dataset's"] = None

    out_dir: Annotated[str, "folder for checkpoints and logs"] = "out"
    init_from: Annotated[
        str, "scratch, resume, a checkpoint (file or run folder), gpt2[-medium|-large|-xl], or a folder of safetensors"
    ] = "scratch"
    dataset: Annotated[str, "a folder below data/, or a path"] = "openwebtext"
    seed: Annotated[int, "of the initial weights, batches and dropout"] = 1337

    batch_size: Annotated[int, "sequences per micro-step"] = 12
    gradient_accumulation_steps: Annotated[int, "micro-steps per iteration, over all ranks"] = 40
    max_iters: Annotated[int, "iterations of the whole run"] = 600000

    optimizer: Annotated[Literal["adamw", "muon"], "muon: for the blocks' 2-D weights, AdamW for the rest"] = "adamw"
    learning_rate: Annotated[float, "AdamW's highest learning rate"] = 6e-4
    weight_decay: Annotated[float, "AdamW's, on tensors of two or more dimensions"] = 0.1
    beta1: Annotated[float, "AdamW's decay of the mean gradient"] = 0.9
    beta2: Annotated[float, "AdamW's decay of the mean square"] = 0.95
    muon_learning_rate: Annotated[float, "Muon's highest learning rate, matched to AdamW's root mean square"] = 0.01
    muon_weight_decay: Annotated[float, "Muon's"] = 0.01
    grad_clip: Annotated[float, "largest gradient norm; 0: no clipping"] = 1.0
    decay_lr: Annotated[bool, "warm up and decay by a cosine; False: constant"] = True
    warmup_iters: Annotated[int, "iterations of linear warm-up"] = 2000
    lr_decay_iters: Annotated[int | None, "where the cosine ends; None: max_iters"] = None
    min_lr: Annotated[float | None, "where the cosine ends; None: learning_rate / 10. Muon's follows in proportion"] = None

    eval_interval: Annotated[int, "iterations between evaluations"] = 2000
    eval_iters: Annotated[int, "batches per evaluation and split, the same ones every time"] = 200
    eval_only: Annotated[bool, "evaluate once and stop"] = False
    log_interval: Annotated[int, "iterations between log lines"] = 1
    checkpoint_interval: Annotated[int, "iterations between checkpoints besides those at evaluations; 0: none"] = 0
    sample_interval: Annotated[int, "print a short sample at every N-th evaluation; 0: never"] = 0

    device: Annotated[str, "auto, cpu, cuda, cuda:1, mps"] = "auto"
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], "of matrix products (AMP); auto: what runs well on the device"
    ] = "auto"
    compile: Annotated[bool, "torch.compile the model"] = False
    grad_checkpoint: Annotated[bool, "recompute activations in the backward pass, to save memory"] = False
    parallel: Annotated[Literal["ddp", "fsdp"], "under torchrun: replicate the model, or shard it"] = "ddp"
    backend: Annotated[Literal["auto", "nccl", "gloo"], "of torch.distributed; auto: nccl on CUDA, else gloo"] = "auto"

    wandb_log: Annotated[bool, "log to Weights & Biases too"] = False
    wandb_project: Annotated[str, "its project"] = "nanomla"
    wandb_run_name: Annotated[str | None, "its run name; None: out_dir"] = None

    def __post_init__(self) -> None:
        at_least = {"batch_size": 1, "gradient_accumulation_steps": 1, "eval_interval": 1, "eval_iters": 1}
        at_least |= {"log_interval": 1, "max_iters": 0, "warmup_iters": 0, "checkpoint_interval": 0, "seed": 0}
        at_least |= {"sample_interval": 0, "learning_rate": 0, "weight_decay": 0, "grad_clip": 0}
        at_least |= {"muon_learning_rate": 0, "muon_weight_decay": 0}
        for name, least in at_least.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)!r} does not work: {name} must be at least {least}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r} does not work: {name} must be from 0 to below 1")
        self.model_config(self.vocab_size or 1)  # a shape that cannot be is found before anything is read

    def model_config(self, vocab_size: int) -> GPTConfig:
        return GPTConfig(**{**{name: getattr(self, name) for name in GPT_SETTINGS}, "vocab_size": vocab_size})

    def lr_factor(self, it: int) -> float:
        """The learning rate at an iteration, as a share of the highest: linear warm-up, cosine, then constant."""
        if not self.decay_lr:
            return 1.0
        end = self.max_iters if self.lr_decay_iters is None else self.lr_decay_iters
        floor = 0.1 if self.min_lr is None or self.learning_rate == 0 else self.min_lr / self.learning_rate
        if it < self.warmup_iters:
            return (it + 1) / (self.warmup_iters + 1)
        if it >= end:
            return floor
        ratio = (it - self.warmup_iters) / (end - self.warmup_iters)
        return floor + 0.5 * (1 + math.cos(math.pi * ratio)) * (1 - floor)


def main(argv: list[str] | None = None) -> None:
    with one_voice():
        cfg, origins = configure(TrainConfig, sys.argv[1:] if argv is None else argv, NANOGPT_HINTS)
        with World(cfg.device, cfg.backend) as world:
            try:
                train(cfg, origins, world)
            except torch.OutOfMemoryError as error:
                remedy = "less --batch_size with more --gradient_accumulation_steps, --grad_checkpoint or --dtype=bfloat16"
                raise UserError(f"out of memory on {world.device} ({str(error).splitlines()[0]}); try {remedy}") from None


def train(cfg: TrainConfig, origins: dict[str, str], world: World) -> None:
    """One run: set up, loop, clean up. `origins` says where each given setting came from."""

    def say(*lines: str) -> None:
        if world.main:
            for line in lines:
                tqdm.write(line, file=sys.stdout)  # goes around the progress bar
            sys.stdout.flush()

    def warn(line: str) -> None:
        if world.main:
            print(f"warning: {line}", file=sys.stderr)

    started = time.perf_counter()
    accum, odd = divmod(cfg.gradient_accumulation_steps, world.size)
    if odd:
        raise UsageError(
            f"gradient_accumulation_steps={cfg.gradient_accumulation_steps} counts micro-steps over all ranks and must "
            f"divide by their number, {world.size}"
        )
    data = Dataset(cfg.dataset, cfg.block_size)
    say("settings:", *(f"  {line}" for line in describe(cfg, origins)))
    torch.manual_seed(cfg.seed)
    start = open_model(cfg, origins, data, warn)
    model = start.model
    if model.config.block_size != cfg.block_size:
        data = Dataset(cfg.dataset, model.config.block_size)
    if data.vocab_size and data.vocab_size > model.config.vocab_size:
        raise UserError(
            f"dataset {cfg.dataset} has token ids up to {data.vocab_size - 1}, the model only vocab_size="
            f"{model.config.vocab_size}; use --vocab_size={data.vocab_size} or more"
        )
    idle = model.config.without_effect()
    if idle:
        warn("without effect in this model: " + ", ".join(f"{name}={getattr(model.config, name)!r}" for name in idle))

    # Device, precision, wrappers, optimizers
    device_type = world.device.partition(":")[0]
    dtype = resolve_dtype(cfg.dtype, device_type, model.config.n_embd)
    amp = contextlib.nullcontext() if dtype == "float32" else torch.autocast(device_type, getattr(torch, dtype))
    scaler = torch.amp.GradScaler(device_type, enabled=dtype == "float16")
    if device_type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for what stays float32
    model.grad_checkpoint = cfg.grad_checkpoint
    if cfg.compile:
        say("compiling the model (the first iterations take a minute or more)")
    net = wrap(model, model.transformer.h, world, cfg.parallel, cfg.compile)
    optimizers = make_optimizers(model, cfg, device_type)
    if start.optimizer is not None:
        restore_optimizers(optimizers, start.optimizer, ckpt.find(cfg.out_dir))
    if start.scaler:
        scaler.load_state_dict(start.scaler)
    params = [p for p in model.parameters() if p.requires_grad]

    tokens_per_iter = cfg.gradient_accumulation_steps * cfg.batch_size * data.block_size
    cached = model.make_cache(1, 1, torch.float32).bytes_per_token // 4
    say(
        f"model: {model.get_num_params():,} parameters, {cached} cached numbers a token, "
        f"{model.get_memory_savings(1):.3g}x fewer than MHA",
        f"run: {world.device}, {dtype}, {world.size} process{'es' * (world.size > 1)}, {tokens_per_iter:,} tokens per "
        f"iteration ({cfg.gradient_accumulation_steps} x {cfg.batch_size} x {data.block_size}), "
        f"iterations {start.iter_num} to {cfg.max_iters}",
    )

    @torch.no_grad()
    def evaluate() -> dict[str, float]:
        """Mean loss over each split's fixed windows; ranks share the batches and all get the same numbers."""
        net.eval()
        means = {}
        for split in ("train", "val"):
            losses = torch.zeros(cfg.eval_iters, dtype=torch.float64)
            for turn in range(-(-cfg.eval_iters // world.size)):
                i = turn * world.size + world.rank
                # With FSDP all ranks go through the model together: one without a batch left repeats the last, unseen.
                x, y = data.eval_batch(split, min(i, cfg.eval_iters - 1), cfg.eval_iters, cfg.batch_size)
                with amp:
                    loss = net(x.to(world.device), y.to(world.device))[1].item()
                if i < cfg.eval_iters:
                    losses[i] = loss
            means[split] = sum(world.sum(*losses)) / cfg.eval_iters
        net.train()
        return means

    def broken(it: int, what: str) -> UserError:
        lr = cfg.lr_factor(it) * cfg.learning_rate
        return UserError(
            f"iteration {it}: {what}, at learning rate {lr:.3g}; last good checkpoint: {last_good(cfg.out_dir)}; "
            "try a lower learning rate, or dtype=float32"
        )

    if cfg.eval_only:
        losses = evaluate()
        say(f"iteration {start.iter_num}: " + eval_text(losses, data))
        return

    log = None
    world.barrier()  # all have read the checkpoint they start from, which a new run may move aside
    if world.main:
        prepare_out_dir(cfg.out_dir, keep=cfg.init_from == "resume", say=say)
        log = RunLog(cfg.out_dir, resume_at=start.iter_num if cfg.init_from == "resume" else 0)
        if cfg.wandb_log:
            name = cfg.wandb_run_name or os.path.basename(os.path.normpath(cfg.out_dir))
            start.wandb_run_id = log.start_wandb(cfg.wandb_project, name, dataclasses.asdict(cfg), start.wandb_run_id)
    world.barrier()

    best, saved_at = start.best_val_loss, None

    def save(it: int, is_best: bool = False) -> None:
        nonlocal saved_at
        saved_at = it
        state = {
            "model": whole(model.state_dict(), world.main),
            "optimizer": whole(optimizer_state(optimizers), world.main),
            "scaler": scaler.state_dict(),
            "model_args": dataclasses.asdict(model.config),
            "iter_num": it,
            "best_val_loss": best,
            "config": dataclasses.asdict(cfg),
            "tokenizer": data.tokenizer,
            "wandb_run_id": start.wandb_run_id,
        }
        if world.main:
            try:
                ckpt.save(cfg.out_dir, state, is_best)
            except UserError as error:
                warn(f"{error}; training goes on")

    it, evals, skipped, spent = start.iter_num, 0, 0, 0.0
    first, tokens_seen = it, 0
    bar = tqdm(total=cfg.max_iters, initial=it, unit="iter", disable=not (world.main and sys.stderr.isatty()))
    stop = StopSignals(world.main)
    net.train()
    try:
        with stop:
            while True:
                factor = cfg.lr_factor(it)
                for group in (g for opt in optimizers.values() for g in opt.param_groups):
                    group["lr"] = factor * group["highest_lr"]

                if it % cfg.eval_interval == 0 or it >= cfg.max_iters:
                    losses = evaluate()
                    if not all(map(math.isfinite, losses.values())):
                        raise broken(it, f"evaluation gave train loss {losses['train']}, val loss {losses['val']}")
                    is_best = losses["val"] < best
                    best = min(best, losses["val"])
                    seconds = round(time.perf_counter() - started, 2)
                    say(f"iteration {it}: " + eval_text(losses, data) + f" ({clock(seconds)})")
                    if it and (it > first or is_best):  # the best even where the run stopped just before evaluating it
                        save(it, is_best)
                    if cfg.sample_interval and evals % cfg.sample_interval == 0:
                        early_look(model, data, say)
                    evals += 1
                    if log:
                        log.write(
                            iter=it, train_loss=losses["train"], val_loss=losses["val"], seconds=seconds,
                            **eval_extras(losses, data),
                        )  # fmt: skip
                        log.plot()
                if it >= cfg.max_iters:
                    break

                began = time.perf_counter()
                loss_sum = torch.zeros((), device=world.device)
                for step in range(accum):
                    micro = step * world.size + world.rank
                    x, y = data.batch(cfg.seed, it, micro, cfg.batch_size)
                    if cfg.dropout:
                        torch.manual_seed(dropout_seed(cfg.seed, it, micro))
                    with gradient_sync(net, step == accum - 1), amp:
                        loss = net(x.to(world.device), y.to(world.device))[1] / accum
                        scaler.scale(loss).backward()
                    loss_sum += loss.detach()
                for opt in optimizers.values():
                    scaler.unscale_(opt)
                limit = cfg.grad_clip or math.inf
                norm = float(whole_norm(nn.utils.clip_grad_norm_(params, limit)))
                total, stopping = world.sum(loss_sum, stop.received)
                mean = total / world.size
                finite = math.isfinite(norm)
                # float16's gradients may overflow until the loss scale, 1 without a scaler, has come down
                if not math.isfinite(mean) or not (finite or scaler.get_scale() > 1):
                    raise broken(it, f"loss {mean}, gradient norm {norm}")
                # Saved before the step that ends this iteration: of these weights it is known that their loss is finite.
                if cfg.checkpoint_interval and it % cfg.checkpoint_interval == 0 and it > first and it != saved_at:
                    save(it)
                if finite:  # else all optimizers skip this step together
                    for opt in optimizers.values():
                        scaler.step(opt)
                skipped += not finite
                scaler.update()
                for opt in optimizers.values():
                    opt.zero_grad(set_to_none=True)
                if device_type == "cuda":
                    torch.cuda.synchronize()
                lap = time.perf_counter() - began
                # The first iteration warms up; it says nothing about the others.
                spent, tokens_seen = (spent + lap, tokens_seen + tokens_per_iter) if it > first else (0.0, 0)

                if it % cfg.log_interval == 0:
                    rate = tokens_seen / spent if spent else tokens_per_iter / lap
                    eta = (cfg.max_iters - it - 1) * tokens_per_iter / rate
                    use = mfu(model, data.block_size, rate / world.size, device_type, dtype)
                    say(
                        f"iter {it}: loss {mean:.4f}, norm {norm:.3f}, lr {factor * cfg.learning_rate:.2e}, "
                        f"{lap * 1e3:.1f} ms, {rate:,.0f} tokens/s, ETA {clock(eta)}"
                        + (f", MFU {use:.1%}" if use else ", MFU n/a")
                        + (f", {skipped} skipped" if skipped else "")
                    )
                    if log:
                        entry = {"loss": mean, "grad_norm": norm if math.isfinite(norm) else None}
                        log.write(iter=it, **entry, lr=factor * cfg.learning_rate, ms=lap * 1e3, tokens_per_s=rate)
                it += 1
                bar.update()
                if stopping:
                    save(it)
                    say(f"stopped before iteration {it}; go on with --init_from=resume")
                    raise SystemExit(128 + (stop.received or signal.SIGTERM))
        peak = f", {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB of GPU memory" if device_type == "cuda" else ""
        say(f"done: best validation loss {best:.4f}, checkpoints in {cfg.out_dir}{peak}")
    finally:
        bar.close()
        if log:
            log.close(at_once=sys.exc_info()[0] is KeyboardInterrupt)


# ----------------------------------------------------------------------------------------------------------------------
# Where a run starts


@dataclass
class Start:
    """A model on the CPU and what is known of the run it continues."""

    model: GPT
    iter_num: int = 0
    best_val_loss: float = math.inf
    optimizer: dict[str, Any] | None = None
    scaler: dict[str, Any] | None = None
    wandb_run_id: str | None = None


def open_model(cfg: TrainConfig, origins: dict[str, str], data: Dataset, warn) -> Start:
    """The model that --init_from asks for, with what else its checkpoint holds."""
    if cfg.init_from == "scratch":
        return Start(GPT(cfg.model_config(cfg.vocab_size or padded_vocab(data))))
    held, source = ckpt.open_source(cfg.init_from) if cfg.init_from != "resume" else latest(cfg.out_dir)
    overrides: dict[str, Any] = {"dropout": cfg.dropout}
    if cfg.use_svd:
        overrides |= {name: getattr(cfg, name) for name in ckpt.SVD_SETTINGS}
    model, note = ckpt.build_model(held, source, **overrides)
    if note:
        warn(note)
    if cfg.init_from != "resume" and "block_size" in origins and cfg.block_size < model.config.block_size:
        model.crop_block_size(cfg.block_size)
    for name in GPT_SETTINGS:
        asked, has = getattr(cfg, name), getattr(model.config, name)
        if name in origins and asked is not None and asked != has:
            warn(f"{name}={asked!r} ({origins[name]}) is overridden by {source}, which has {name}={has!r}")
    if held.get("tokenizer") and data.tokenizer and held["tokenizer"] != data.tokenizer:
        warn(f"{source} was trained with another tokenizer than dataset {cfg.dataset}'s: its token ids mean other text")
    if cfg.init_from != "resume":
        return Start(model)
    start = Start(model, int(held.get("iter_num", 0)), float(held.get("best_val_loss", math.inf)))
    start.wandb_run_id = held.get("wandb_run_id")
    changed = changed_settings(held.get("config") or {}, cfg)
    if changed:
        warn("from here on this is another run than the one it continues: " + ", ".join(changed))
    if note:
        warn("the optimizer starts anew, as the factors are new parameters")
    else:
        start.optimizer, start.scaler = held.get("optimizer"), held.get("scaler")
    return start


def changed_settings(before: dict[str, Any], cfg: TrainConfig) -> list[str]:
    """The settings that decide what a run computes and that are not what they were in the run's checkpoint."""
    now = dataclasses.asdict(cfg)
    names = "dataset seed batch_size gradient_accumulation_steps dropout grad_clip learning_rate weight_decay beta1 beta2"
    names += " decay_lr warmup_iters min_lr muon_learning_rate muon_weight_decay dtype"
    pairs = [(name, before[name], now[name]) for name in names.split() if name in before]
    if cfg.decay_lr and before.get("decay_lr") and "max_iters" in before:
        ends = [c.get("lr_decay_iters") or c["max_iters"] for c in (before, now)]  # where the cosine ends
        pairs.append(("lr_decay_iters", *ends))
    return [f"{name} {was!r}, now {is_!r}" for name, was, is_ in pairs if was != is_]


def latest(out_dir: str) -> tuple[dict[str, Any], Path]:
    """The checkpoint to resume from, and its file."""
    path = ckpt.find(out_dir)
    return ckpt.load(path), path


def padded_vocab(data: Dataset) -> int:
    """The dataset's vocabulary; a large one rounded up to a multiple of 64, which matrix kernels prefer."""
    vocab = data.vocab_size or 50257
    return vocab if vocab <= 1024 else -(-vocab // 64) * 64


def prepare_out_dir(out_dir: str, keep: bool, say) -> None:
    """Make out_dir writable and, unless the run in it goes on, move an earlier one aside."""
    folder = Path(out_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"out_dir {out_dir} cannot be written ({error.strerror})") from None
    earlier = [p for p in folder.iterdir() if p.name in (ckpt.LATEST, ckpt.BEST, "log.jsonl", "loss.png")]
    if keep or not earlier:
        return
    number = 1
    while (folder / f"old-{number}").exists():
        number += 1
    (folder / f"old-{number}").mkdir()
    for path in earlier:
        path.rename(folder / f"old-{number}" / path.name)
    say(f"an earlier run was here: it is now in {folder / f'old-{number}'}")


# ----------------------------------------------------------------------------------------------------------------------
# Optimizers


def make_optimizers(model: GPT, cfg: TrainConfig, device_type: str) -> dict[str, torch.optim.Optimizer]:
    """
    'adamw' as nanoGPT groups it: weight decay on tensors of two or more dimensions. With --optimizer=muon, 'muon' takes
    the blocks' 2-D weights (Muon, kellerjordan.github.io/posts/muon; scaled to AdamW's step as in arXiv:2502.16982).
    Every group carries highest_lr, which the schedule scales.
    """
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    blocks = {n for n, p in named if cfg.optimizer == "muon" and p.dim() == 2 and ".h." in n}
    rest = [p for n, p in named if n not in blocks]
    groups = [
        {"params": [p for p in rest if p.dim() >= 2], "weight_decay": cfg.weight_decay},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
    ]
    fused = device_type in ("cuda", "cpu")
    optimizers: dict[str, torch.optim.Optimizer] = {
        "adamw": torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=(cfg.beta1, cfg.beta2), fused=fused)
    }
    if blocks:
        optimizers["muon"] = torch.optim.Muon(
            [p for n, p in named if n in blocks],
            lr=cfg.muon_learning_rate,
            weight_decay=cfg.muon_weight_decay,
            adjust_lr_fn="match_rms_adamw",
        )
    for name, opt in optimizers.items():
        for group in opt.param_groups:
            group["highest_lr"] = cfg.learning_rate if name == "adamw" else cfg.muon_learning_rate
    return optimizers


def optimizer_state(optimizers: dict[str, torch.optim.Optimizer]) -> dict[str, Any]:
    """AdamW alone as its own state dict, as nanoGPT saves it; with Muon, both by name."""
    states = {name: opt.state_dict() for name, opt in optimizers.items()}
    return states if len(states) > 1 else states["adamw"]


def restore_optimizers(optimizers: dict[str, torch.optim.Optimizer], state: dict[str, Any], source: Path) -> None:
    states = state if "adamw" in state else {"adamw": state}
    if states.keys() != optimizers.keys():
        raise UserError(
            f"{source} was trained with {' + '.join(states)}, this run uses {' + '.join(optimizers)}; "
            "give the same --optimizer, or start a new run from these weights with --init_from=PATH"
        )
    for name, opt in optimizers.items():
        given = [{k: v for k, v in g.items() if k != "params"} for g in opt.param_groups]
        try:
            for i, p in enumerate(p for g in opt.param_groups for p in g["params"]):
                for key, held in states[name]["state"].get(i, {}).items():  # torch would find it in the first step only
                    if torch.is_tensor(held) and held.dim() and held.shape != p.shape:
                        raise ValueError(f"{key} of parameter {i} has shape {tuple(held.shape)}, expected {tuple(p.shape)}")
            load_optimizer_state(opt, states[name])
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise UserError(f"{source}: its optimizer state does not fit this model ({error})") from None
        for group, settings in zip(opt.param_groups, given, strict=True):
            group.update(settings)  # the state is the checkpoint's, the settings are this run's


# ----------------------------------------------------------------------------------------------------------------------
# Small things the loop needs


class StopSignals:
    """Within it, the first SIGINT or SIGTERM is only noted in `received`; a second one stops at once."""

    def __init__(self, aloud: bool) -> None:
        self.received, self.aloud = 0, aloud

    def __enter__(self) -> Self:
        self.old = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _note(self, number: int, _frame: Any) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = number
        if self.aloud:  # not with print, which may be at work in the code that the signal interrupted
            os.write(2, b"\nstopping after this iteration; once more stops at once, without a checkpoint\n")

    def __exit__(self, *_: object) -> None:
        for number, handler in self.old.items():
            signal.signal(number, handler)


def resolve_dtype(dtype: str, device_type: str, n_embd: int) -> str:
    """
    'auto' as what runs well: bfloat16 on CUDA (float16 where it lacks that) and on CPUs with bfloat16 arithmetic from
    a width of 256 on; float32 elsewhere. Measured on two cores of a Zen 4: at width 384
    0.65 of float32's time, at 128 more than float32's.
    """
    if dtype != "auto":
        return dtype
    if device_type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float16"
    if device_type == "cpu" and n_embd >= 256:
        has = torch.cpu.get_capabilities()
        return "bfloat16" if has.get("amx_bf16") or has.get("avx512_bf16") else "float32"
    return "float32"


def dropout_seed(seed: int, it: int, micro: int) -> int:
    """Dropout, like batches, depends on nothing but the seed, the iteration and the micro-batch."""
    return int(np.random.SeedSequence([seed, it, micro]).generate_state(1, np.uint64)[0] >> 1)


def whole_norm(norm: torch.Tensor) -> torch.Tensor:
    """A gradient norm that FSDP left spread over the ranks, as one number."""
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def last_good(out_dir: str) -> str:
    try:
        return str(ckpt.find(out_dir))
    except UserError:
        return "none yet"


def eval_extras(losses: dict[str, float], data: Dataset) -> dict[str, float]:
    """Perplexity, and bits per byte of text where the dataset says how many bytes its tokens stand for."""
    extras = {"perplexity": math.exp(min(losses["val"], 700))}
    per_token = data.bytes_per_token("val")
    if per_token:
        extras["bits_per_byte"] = losses["val"] / math.log(2) / per_token
    return extras


def eval_text(losses: dict[str, float], data: Dataset) -> str:
    extras = eval_extras(losses, data)
    text = f"train loss {losses['train']:.4f}, val loss {losses['val']:.4f}, perplexity {extras['perplexity']:.2f}"
    return text + (f", {extras['bits_per_byte']:.3f} bits per byte" if "bits_per_byte" in extras else "")


def early_look(model: GPT, data: Dataset, say) -> None:
    """A short sample from the model as it is, with its own random numbers."""
    if data.tokenizer is None:
        return
    tokenizer = Tokenizer(data.tokenizer)
    device = model.lm_head.weight.device
    prompt, _ = data.eval_batch("val", 0, 1, 1)
    prompt = prompt[:, : min(16, data.block_size)].to(device)
    training = model.training
    model.eval()
    out = model.generate(prompt, 100, temperature=0.8, generator=torch.Generator(device).manual_seed(0))
    model.train(training)
    say("sample: " + repr(tokenizer.decode(out[0].tolist())))


# Dense bfloat16 matrix peak by name, FLOP/s, from the vendors' data sheets; float16 runs at the same rate.
GPU_PEAKS = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12}
GPU_PEAKS |= {"H100 PCIe": 756e12, "A10": 125e12, "V100": 125e12, "T4": 65e12, "RTX 5090": 209.5e12, "RTX 4090": 165.2e12, "RTX 3090": 71e12}


def mfu(model: GPT, context: int, tokens_per_s: float, device_type: str, dtype: str) -> float | None:
    """Share of the GPU's peak that goes into the model's arithmetic (three times the forward pass); None if unknown."""
    if device_type != "cuda" or dtype == "float32":
        return None
    name = torch.cuda.get_device_name()
    named = [key for key in sorted(GPU_PEAKS, key=len) if re.search(rf"\b{key}\b", name)]
    peak = GPU_PEAKS[named[-1]] if named else None  # the longest name: "H100 PCIe" is slower than "H100"
    return 3 * model.flops_per_token(context) * tokens_per_s / peak if peak else None


def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


if __name__ == "__main__":
    run_script(main)
