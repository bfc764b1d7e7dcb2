"""
Train a GPT, in one process or in several under torchrun.

    python train.py config/train_mla.py --mla_latent_dim=32
    python train.py config/train_mla.py --init_from=resume
    python train.py config/train_mla.py --lr_find    (short runs that suggest a learning rate)
    torchrun --standalone --nproc_per_node=2 train.py config/train_mla.py
"""

import contextlib
import dataclasses
import math
import os
import signal
import sys
import time
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from tqdm import tqdm

from model import GPT, GPTConfig
from nanomla import checkpoint, costs, distributed, optim, settings
from nanomla.checkpoint import Checkpoint
from nanomla.checks import Count, Natural, NonNegative, Seed, Share, UpToOne, check
from nanomla.dataset import Dataset
from nanomla.distributed import World, print0, warn0
from nanomla.errors import Steady, UsageError, UserError, run_script
from nanomla.runlog import RunLog, clock, draw_sweep, evaluation_text
from nanomla.start import (
    check_model,
    nothing_left,
    open_model,
    open_teacher,
    run_folder,
    with_stored_settings,
)
from nanomla.tokenizer import Tokenizer

NANOGPT_HINTS = {
    "always_save_checkpoint": ": leave it out, ckpt.pt is always the latest and best.pt the best"
}

SWEEP = (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8)  # what lr_find multiplies the learning rates by


@dataclass
class TrainConfig:
    """
    The settings of a run: its model's, by their own names on the command line, and the loop's.

    Raises ValueError naming the setting, its value and what would work.
    """

    # Settings of tools.compare, so that the config file of a comparison is one of a run, too.
    ignored_in_files: ClassVar[tuple[str, ...]] = (
        "title", "variants", "lr_factors", "seeds", "equal_parameters", "measure", "cache_budget",
        "decode_context", "eval_tokens",
    )  # fmt: skip
    headings: ClassVar[dict[str, str]] = {
        "vocab_size": "model", "out_dir": "run", "batch_size": "batch", "optimizer": "optimizer",
        "learning_rate": "learning rate", "eval_interval": "evaluation", "log_interval": "logging",
        "device": "device",
    }  # fmt: skip
    # A resumed run in which one of these has changed is another run than the one it continues.
    decides_run: ClassVar[tuple[str, ...]] = (
        "dropout", "distill", "dataset", "seed", "batch_size", "gradient_accumulation_steps",
        "weight_decay", "beta1", "beta2", "muon_weight_decay", "grad_clip", "learning_rate",
        "muon_learning_rate", "decay_lr", "decay_shape", "wsd_decay", "warmup_iters", "min_lr",
        "dtype",
    )  # fmt: skip
    model: GPTConfig = field(default_factory=lambda: GPTConfig(bias=False))
    vocab_size: Annotated[
        Count | None, "The number of token ids that the model knows. None stands for the dataset's."
    ] = None

    out_dir: Annotated[str, "The folder for checkpoints and logs."] = "out"
    init_from: Annotated[
        str,
        "The weights to start with: scratch for new ones, resume to go on with the run in out_dir, "
        "or a checkpoint file, the folder of another run, gpt2, gpt2-medium, gpt2-large, gpt2-xl, "
        "or a folder of safetensors.",
    ] = "scratch"
    distill: Annotated[
        str | None,
        "The weights of a teacher, named as for init_from. The KL divergence from its predictions "
        "is added to the training loss.",
    ] = None
    dataset: Annotated[str, "The dataset: a folder below data/, or a path."] = "openwebtext"
    seed: Annotated[Seed, "The seed of new weights, batches and dropout."] = 1337
    max_iters: Annotated[Natural, "The number of iterations of the whole run."] = 600000
    verify: Annotated[
        bool,
        "Checkpoints that are read are compared with their checksums. False starts huge ones "
        "sooner.",
    ] = True
    checkpoint_interval: Annotated[
        Natural, "The number of iterations between extra checkpoints. 0 writes none."
    ] = 0

    batch_size: Annotated[Count, "The number of sequences in a micro-step."] = 12
    gradient_accumulation_steps: Annotated[
        Count,
        Field(le=1_000_000),
        "The number of micro-steps in an iteration, counted over all processes.",
    ] = 40

    optimizer: Annotated[
        Literal["adamw", "muon"],
        "The optimizer. With muon, Muon trains the blocks' matrices and AdamW all else.",
    ] = "adamw"
    weight_decay: Annotated[
        NonNegative, "The weight decay of AdamW. It applies to matrices and not to vectors."
    ] = 0.1
    beta1: Annotated[Share, "The rate at which AdamW's mean gradient decays."] = 0.9
    beta2: Annotated[Share, "The rate at which AdamW's mean squared gradient decays."] = 0.95
    muon_weight_decay: Annotated[NonNegative, "The weight decay of Muon."] = 0.01
    grad_clip: Annotated[
        NonNegative, "The largest norm of the gradient. Larger ones are scaled down; 0 allows any."
    ] = 1.0

    learning_rate: Annotated[
        NonNegative, Field(le=1e100), "The highest learning rate of AdamW."
    ] = 6e-4
    muon_learning_rate: Annotated[
        NonNegative,
        Field(le=1e100),
        "The highest learning rate of Muon, whose steps are scaled to the size of AdamW's.",
    ] = 0.01
    decay_lr: Annotated[
        bool, "The learning rate warms up and decays. With False it is constant."
    ] = True
    decay_shape: Annotated[
        Literal["cosine", "wsd"],
        "The shape of the decay. With wsd the rate warms up, stays, and decays linearly at the "
        "end, so that a run can be made longer until the decay begins.",
    ] = "cosine"
    wsd_decay: Annotated[
        UpToOne, "The share of the iterations in which wsd decays."
    ] = 0.2
    warmup_iters: Annotated[Natural, "The number of iterations of linear warm-up."] = 2000
    lr_decay_iters: Annotated[
        Natural | None, "The iteration at which the decay ends. None stands for max_iters."
    ] = None
    min_lr: Annotated[
        NonNegative | None,
        "AdamW's learning rate at the end of the decay; Muon's falls in proportion. None stands "
        "for a tenth of learning_rate.",
    ] = None

    lr_find: Annotated[
        bool,
        "Short runs at an eighth to eight times the learning rates take the place of the run. They "
        "end in a table, lr_find.png and a suggestion; a long run needs lower rates than a short "
        "one.",
    ] = False
    lr_find_iters: Annotated[
        int, Field(ge=10), "The number of iterations in each run of lr_find."
    ] = 100

    eval_interval: Annotated[Count, "The number of iterations between evaluations."] = 2000
    eval_iters: Annotated[
        Count, "The number of batches of each split in an evaluation. They are always the same."
    ] = 200
    eval_only: Annotated[bool, "The model is evaluated once and not trained."] = False
    sample_interval: Annotated[
        Natural, "The number of evaluations between printed samples. 0 prints none."
    ] = 0

    log_interval: Annotated[Count, "The number of iterations between log lines."] = 1
    wandb_log: Annotated[bool, "The run is also logged to Weights & Biases (wandb)."] = False
    wandb_project: Annotated[str, "The name of the project in wandb."] = "nanomla"
    wandb_run_name: Annotated[
        str | None, "The name of the run in wandb. None stands for the name of out_dir."
    ] = None
    tensorboard: Annotated[
        bool, "The run is also logged to out_dir/tensorboard, for tensorboard --logdir."
    ] = False

    device: Annotated[str, "The device to train on: auto, cpu, cuda, cuda:1, ... or mps."] = "auto"
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        "The number format of matrix products (AMP). auto takes what runs well on the device.",
    ] = "auto"
    compile: Annotated[bool, "The model is compiled by torch.compile."] = False
    grad_checkpoint: Annotated[
        bool, "Activations are recomputed in the backward pass, which takes less memory."
    ] = False
    parallel: Annotated[
        Literal["ddp", "fsdp"],
        "How processes share the model: ddp gives each a copy, fsdp gives each a part.",
    ] = "ddp"
    backend: Annotated[
        Literal["auto", "nccl", "gloo"],
        "The backend of torch.distributed. auto takes nccl on CUDA and gloo elsewhere.",
    ] = "auto"

    def __post_init__(self) -> None:
        check(self)
        for name in ("out_dir", "init_from", "dataset"):
            if not getattr(self, name):
                raise ValueError(f"{name}='' does not work: {name} must be some text")
        if self.lr_find and (self.eval_only or self.init_from == "resume"):
            raise ValueError("lr_find starts new runs: leave out eval_only and init_from=resume")
        rates = (self.learning_rate, self.muon_learning_rate or self.optimizer == "adamw")
        if self.lr_find and not all(rates):
            raise ValueError("lr_find multiplies the learning rates, which must be above 0")

    def lr_factor(self, it: int) -> float:
        """The learning rate at an iteration, as a share of the highest."""
        return optim.lr_factor(self, it)


class Diverged(UserError):
    """A loss or gradient that is not finite."""


class Run:
    """
    A training run: its data, model and optimizers, and what the loop in train() does with them.

    As a context manager it keeps the log and the progress bar open. evaluate(), step() and save()
    exchange data between the ranks, so all ranks must call them together.
    """

    def __init__(self, cfg: TrainConfig, origins: dict[str, str], world: World) -> None:
        self.cfg, self.world, self.started = cfg, world, time.perf_counter()
        shape = (cfg.gradient_accumulation_steps, cfg.batch_size, cfg.model.block_size)
        rows, rest = divmod(math.prod(shape[:2]), world.size)
        if rest:
            raise UsageError(
                f"the {math.prod(shape[:2])} sequences of an iteration (batch_size x "
                f"gradient_accumulation_steps) cannot be shared out evenly over {world.size} "
                "processes"
            )
        self.rows = range(rows * world.rank, rows * (world.rank + 1))

        # data and model
        self.data = Dataset(cfg.dataset, cfg.model.block_size)
        self.settings = settings.describe(cfg, origins, most=1000)
        print0("settings:", *(f"  {line}" for line in settings.describe(cfg, origins)))
        torch.manual_seed(cfg.seed)
        self.read = self._latest_file()
        self.model, ckpt = open_model(cfg, origins, self.data)
        config = self.model.config
        if config.block_size != self.data.block_size:
            self.data = Dataset(cfg.dataset, config.block_size)
        check_model(config, cfg, self.data)
        self.teacher = open_teacher(cfg.distill, config, world.device)

        # precision and processes
        self.dtype = distributed.resolve_dtype(cfg.dtype, world.device_type, config.n_embd)
        self.amp = contextlib.nullcontext()
        if self.dtype != "float32":
            self.amp = torch.autocast(world.device_type, getattr(torch, self.dtype))
        # float16 loses small gradients, so its loss is scaled up for the backward pass
        self.scaler = torch.amp.GradScaler(world.device_type, enabled=self.dtype == "float16")
        if world.device_type == "cuda":
            torch.set_float32_matmul_precision("high")  # TF32 for what stays float32
        self.model.grad_checkpoint = cfg.grad_checkpoint
        if cfg.compile:
            print0("compiling the model (the first iterations take a minute or more)")
        blocks = self.model.transformer.h
        self.net = distributed.wrap(self.model, blocks, world, cfg.parallel, cfg.compile).train()

        # optimizers, and what else a resumed run goes on from
        self.optimizers = optim.make_optimizers(self.model, cfg, world.device_type)
        if ckpt.optimizer is not None:
            optim.restore_optimizers(self.optimizers, ckpt.optimizer, ckpt.source)
        if ckpt.scaler:
            self.scaler.load_state_dict(ckpt.scaler)
        self.first, self.best_val_loss = ckpt.iter_num, ckpt.best_val_loss
        self.wandb_run_id = ckpt.wandb_run_id
        # iterations of the last attempt to save, and of the checkpoint that is there
        self.saved_at = self.on_disk = self.first if cfg.init_from == "resume" else None
        self.stopping, self.evaluations, self.skipped, self.seconds = False, 0, 0, 0.0

        shape = (*shape[:2], config.block_size)
        self.tokens_per_iter = math.prod(shape)
        print0(
            f"model: {self.model.get_num_params():,} parameters, {costs.cache_in_words(self.model)}",
            f"run: {world.device}, {self.dtype}, {world.size} process{'es' * (world.size > 1)}, "
            f"{self.tokens_per_iter:,} tokens per iteration ({' x '.join(map(str, shape))}), "
            f"iterations {self.first} to {cfg.max_iters}",
        )

    def __enter__(self) -> Self:
        cfg, resume, self.log = self.cfg, self.cfg.init_from == "resume", None
        self.world.barrier()  # all ranks have read their checkpoint, which a new run may move
        self.folder = contextlib.ExitStack()
        if self.world.is_main:
            self.folder.enter_context(run_folder(cfg.out_dir, keep=resume))
            if resume and self._latest_file() != self.read:
                raise UserError(f"{cfg.out_dir} changed while it was read; run this again")
            if resume and math.isfinite(self.best_val_loss) and not self._has_best():
                checkpoint.keep_as_best(cfg.out_dir)  # nanoGPT's ckpt.pt is the best
            self.log = RunLog(cfg.out_dir, self.first if resume else 0, self.settings)
            if cfg.wandb_log:
                self.wandb_run_id = self.log.start_wandb(
                    cfg.wandb_project, cfg.wandb_run_name, settings.flat(cfg), self.wandb_run_id
                )
            if cfg.tensorboard:
                self.log.start_tensorboard(self.first)
        self.world.barrier()
        hidden = not (self.world.is_main and sys.stderr.isatty())
        self.bar = tqdm(total=cfg.max_iters, initial=self.first, unit="iter", disable=hidden)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, _: object) -> None:
        self.bar.close()
        if self.log:
            self.log.close(at_once=kind is KeyboardInterrupt)
        self.folder.close()
        if isinstance(error, Exception):
            error.add_note(f"last checkpoint: {self.last_checkpoint()}")

    def _latest_file(self) -> tuple[int, int] | None:
        """What tells ckpt.pt from another one of that name; None without one."""
        with contextlib.suppress(OSError):
            found = os.stat(os.path.join(self.cfg.out_dir, checkpoint.LATEST))
            return found.st_ino, found.st_mtime_ns
        return None

    def _has_best(self) -> bool:
        return os.path.isfile(os.path.join(self.cfg.out_dir, checkpoint.BEST))

    def last_checkpoint(self) -> str:
        """The file of the latest checkpoint that is on the disk, or "none yet"."""
        with contextlib.suppress(UserError, OSError):
            return str(checkpoint.find(self.cfg.out_dir))
        return "none yet"

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """
        The mean losses over fixed windows of each split, as train_loss and val_loss, on every rank.

        Also val_loss as perplexity and, if the dataset records the bytes of its text, as
        bits_per_byte.
        """
        count, size, device = self.cfg.eval_iters, self.world.size, self.world.device
        means = {}
        self.net.eval()
        for split in ("train", "val"):
            losses = torch.zeros(count, dtype=torch.float64)
            for first in range(0, count, size):
                i = first + self.world.rank
                # Under FSDP all ranks must run the model together. A rank for which no batch is
                # left runs the last one again and does not count it.
                x, y = self.data.eval_batch(split, min(i, count - 1), count, self.cfg.batch_size)
                with self.amp:
                    loss = self.net(x.to(device), y.to(device))[1].item()
                if i < count:
                    losses[i] = loss
            means[split] = sum(self.world.sum(*losses)) / count
        self.net.train()

        measures = {"train_loss": means["train"], "val_loss": means["val"]}
        measures["perplexity"] = math.exp(min(means["val"], 700))  # exp(710) overflows
        bytes_per_token = self.data.bytes_per_token("val")
        if bytes_per_token:
            measures["bits_per_byte"] = means["val"] / math.log(2) / bytes_per_token
        return measures

    def step(self, it: int, signal_received: int) -> tuple[float, float, float]:
        """
        Forward, backward and update of one iteration; returns its loss, gradient norm and seconds.

        The loss is the mean over the rows of all ranks. `stopping` becomes True on every
        rank if any has received a signal. A checkpoint that is due is written before the update.
        Raises UserError if loss or norm is not finite.
        """
        began = time.perf_counter()
        loss_sum = self._accumulate_gradients(it)
        for optimizer in self.optimizers.values():
            self.scaler.unscale_(optimizer)
        limit = self.cfg.grad_clip or math.inf
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        norm = float(distributed.full(norm))
        total, signals = self.world.sum(loss_sum, signal_received)
        loss, self.stopping = total / self.world.size, signals > 0
        finite = math.isfinite(norm)

        # float16's gradients may overflow until the loss scale has come down to 1
        if not math.isfinite(loss) or not (finite or self.scaler.get_scale() > 1):
            raise self.diverged(it, f"loss {loss}, gradient norm {norm}")

        # save before the update, as these weights are known to have a finite loss
        every = self.cfg.checkpoint_interval
        if every and it % every == 0 and it > self.first and it != self.saved_at:
            self.save(it)

        if finite:  # else all optimizers skip this step together
            for optimizer in self.optimizers.values():
                self.scaler.step(optimizer)
        self.skipped += not finite
        self.scaler.update()
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        if self.world.device_type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        self.seconds += seconds if it > self.first else 0.0  # the first iteration is slower
        self.bar.update()
        return loss, norm, seconds

    def _accumulate_gradients(self, it: int) -> Tensor:
        """Add up the gradients of this rank's rows; returns their mean loss, a tensor."""
        cfg, world, rows = self.cfg, self.world, self.rows
        loss_sum = torch.zeros((), device=world.device)
        steps = -(-len(rows) // cfg.batch_size)
        for i in range(steps):
            micro = rows[i * len(rows) // steps : (i + 1) * len(rows) // steps]
            x, y = self.data.batch(cfg.seed, it, micro)
            if cfg.model.dropout:  # it depends on the same three numbers as the batch, on no others
                seeds = np.random.SeedSequence([cfg.seed, it, micro.start])
                torch.manual_seed(int(seeds.generate_state(1, np.uint64)[0] >> 1))
            with distributed.gradient_sync(self.net, now=i == steps - 1), self.amp:
                loss = self._loss(x.to(world.device), y.to(world.device)) * (len(micro) / len(rows))
                self.scaler.scale(loss).backward()
            loss_sum += loss.detach()
        return loss_sum

    def _loss(self, x: Tensor, y: Tensor) -> Tensor:
        """The mean cross-entropy, plus with a teacher the mean KL divergence, in nats per token."""
        logits, loss = self.net(x, y)
        if self.teacher is None:
            return loss
        with torch.no_grad():
            # given targets, a model returns the logits of all positions
            target = self.teacher(x, y)[0].float().log_softmax(-1)
        kl = F.kl_div(logits.float().log_softmax(-1), target, reduction="sum", log_target=True)
        return loss + kl / y.numel()

    def save(self, it: int, val_loss: float = math.inf) -> None:
        """
        Write ckpt.pt and, if this validation loss is the lowest so far, best.pt. If that fails,
        warn and go on; the lowest loss is that of weights which are on the disk.
        """
        self.saved_at, keep = it, self.world.is_main
        best_val_loss = min(val_loss, self.best_val_loss)
        is_best, written = val_loss < self.best_val_loss, False
        weights = distributed.full_state_dict(self.model.state_dict(), keep)
        moments = distributed.full_state_dict(optim.optimizer_state(self.optimizers), keep)
        if self.world.is_main:
            state = Checkpoint(
                model=weights,
                model_args=dataclasses.asdict(self.model.config),
                optimizer=moments,
                scaler=self.scaler.state_dict(),
                iter_num=it,
                best_val_loss=best_val_loss,
                config=settings.flat(self.cfg),
                tokenizer=self.data.tokenizer,
                wandb_run_id=self.wandb_run_id,
            )
            try:
                checkpoint.save(self.cfg.out_dir, state, is_best)
                written = True
            except UserError as error:
                warn0(f"{error}; training goes on")
        if self.world.sum(written) == [1.0]:
            self.on_disk, self.best_val_loss = it, best_val_loss

    def require_checkpoint(self, it: int) -> str:
        """
        What is on the disk at the end of a run, in words: the checkpoint of this iteration, tried
        once more if it failed, or an earlier one. Raises UserError if there is none.
        """
        if self.on_disk != it:
            self.save(it)
        folder = self.cfg.out_dir
        if self.world.is_main and self.last_checkpoint() == "none yet":
            raise UserError(f"iteration {it} is done, but there is no checkpoint in {folder}")
        if self.on_disk != it:
            return f"but the checkpoint in {folder} is of iteration {self.on_disk}"
        return f"checkpoints in {folder}"

    def report(self, it: int, loss: float, norm: float, seconds: float) -> None:
        """Print and log an iteration."""
        cfg, world, tokens = self.cfg, self.world, self.tokens_per_iter
        rate = tokens * (it - self.first) / self.seconds if self.seconds else tokens / seconds
        eta = (cfg.max_iters - it - 1) * tokens / rate
        lr, ms = cfg.lr_factor(it) * cfg.learning_rate, seconds * 1e3
        tokens_per_s = rate / world.size
        context, kind = self.data.block_size, world.device_type
        use = costs.mfu(self.model, context, tokens_per_s, kind, self.dtype)
        print0(
            f"iter {it}: loss {loss:.4f}, norm {norm:.3f}, lr {lr:.2e}, {ms:.1f} ms, "
            f"{rate:,.0f} tokens/s, ETA {clock(eta)}"
            + (f", MFU {use:.1%}" if use else "")
            + (f", {self.skipped} skipped" if self.skipped else "")
        )
        if self.log:
            grad_norm = norm if math.isfinite(norm) else None  # JSON has no infinity
            rates = {"lr": lr, "ms": ms, "tokens_per_s": rate}
            self.log.write(iter=it, loss=loss, grad_norm=grad_norm, **rates)

    def report_evaluation(self, it: int, measures: dict[str, float]) -> float:
        """
        Print and log what evaluate() returned, redraw loss.png, and print a sample if one is due.

        Returns the validation loss. Raises UserError if a loss is not finite.
        """
        train_loss, val_loss = measures["train_loss"], measures["val_loss"]
        if not math.isfinite(train_loss + val_loss):
            what = f"evaluation gave train loss {train_loss}, val loss {val_loss}"
            raise self.diverged(it, what)
        seconds = round(time.perf_counter() - self.started, 2)
        print0(f"iteration {it}: {evaluation_text(measures)} ({clock(seconds)})")
        if self.log:
            self.log.write(iter=it, **measures, seconds=seconds)
            self.log.plot()
        if self.cfg.sample_interval and self.evaluations % self.cfg.sample_interval == 0:
            print_sample(self.model, self.data)
        self.evaluations += 1
        return val_loss

    def diverged(self, it: int, what: str) -> "Diverged":
        """The error that ends a run whose losses or gradients are not finite."""
        lr = self.cfg.lr_factor(it) * self.cfg.learning_rate
        return Diverged(
            f"iteration {it}: {what}, at learning rate {lr:.3g}; last good checkpoint: "
            f"{self.last_checkpoint()}; try a lower learning rate, or dtype=float32"
        )


def train(cfg: TrainConfig, origins: dict[str, str], world: World) -> None:
    """One run, until max_iters or a signal. `origins` is what settings.configure returned."""
    run = Run(cfg, origins, world)
    it = run.first
    if cfg.eval_only:
        print0(f"iteration {it}: {evaluation_text(run.evaluate())}")
        return
    if nothing_left(cfg, it):
        print0(f"nothing to do: iteration {it} of {cfg.max_iters}; raise --max_iters")
        return
    with run, distributed.StopSignals(announce=world.is_main) as stop:
        while True:
            # set the learning rates of this iteration
            optim.set_learning_rates(run.optimizers, cfg.lr_factor(it))

            # evaluate, and save what that shows
            if it % cfg.eval_interval == 0 or it >= cfg.max_iters:
                val_loss = run.report_evaluation(it, run.evaluate())
                # a resumed run's start is saved already
                if it and (it > run.first or val_loss < run.best_val_loss):
                    run.save(it, val_loss)
            if it >= cfg.max_iters:
                break

            # forward, backward, update
            loss, norm, seconds = run.step(it, stop.received)

            # log
            if it % cfg.log_interval == 0:
                run.report(it, loss, norm, seconds)
            it += 1

            # save and stop after a signal to any rank
            if run.stopping:
                run.save(it)
                there = run.require_checkpoint(it)
                print0(f"stopped before iteration {it}; go on with --init_from=resume, {there}")
                raise SystemExit(128 + (stop.received or signal.SIGTERM))
        there = run.require_checkpoint(it) if it else "nothing was trained"
        best = min(run.best_val_loss, val_loss) if it == 0 else run.best_val_loss
        print0(f"done: best validation loss {best:.4f}, {there}{world.peak_memory()}")


def find_learning_rate(cfg: TrainConfig, origins: dict[str, str], world: World) -> None:
    """
    Short runs at several learning rates instead of a long one; prints which rates to train with.

    All start from the same weights, have the same batches, and warm up and decay within
    lr_find_iters. Only lr_find.png is written to out_dir. Raises UserError if all runs diverge.
    """
    run, iters = Run(cfg, origins, world), cfg.lr_find_iters
    if world.is_main:
        with run_folder(cfg.out_dir, keep=True):
            pass  # before the runs, to find out whether the picture can be written
    names = ["muon_learning_rate"] * ("muon" in run.optimizers) + ["learning_rate"]
    names += ["min_lr"] * (cfg.decay_lr and cfg.min_lr is not None)
    print0(f"lr_find: {len(SWEEP)} runs of {iters} iterations")
    print0("  ".join(["factor", *names, "val_loss"]))
    schedule = {"max_iters": iters, "lr_decay_iters": None, "warmup_iters": iters // 10}
    start = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    run.bar, losses = tqdm(disable=True), []
    for factor in SWEEP:
        rates = {name: factor * getattr(cfg, name) for name in names}
        run.cfg = dataclasses.replace(cfg, **schedule, **rates, checkpoint_interval=0)
        run.model.load_state_dict(start)
        run.model.zero_grad(set_to_none=True)  # a run that diverges leaves its gradients
        run.scaler = torch.amp.GradScaler(world.device_type, enabled=run.scaler.is_enabled())
        run.optimizers = optim.make_optimizers(run.model, run.cfg, world.device_type)
        loss = math.inf
        with contextlib.suppress(Diverged):
            for it in range(iters):
                optim.set_learning_rates(run.optimizers, run.cfg.lr_factor(it))
                run.step(it, signal_received=0)
            loss = run.evaluate()["val_loss"]
        losses.append(loss if math.isfinite(loss) else math.inf)
        columns = "".join(f"{rate:>{len(name) + 2}.2g}" for name, rate in rates.items())
        outcome = f"{loss:.4f}" if math.isfinite(loss) else "diverged"
        print0(f"{factor:>6g}{columns}  {outcome:>8}")

    lowest = optim.lowest_point(SWEEP, losses)
    if lowest in (SWEEP[0], SWEEP[-1]):
        print0("the lowest is at the edge of these: repeat lr_find with other rates")
    # The best rate of 100, 400 and 700 iterations fell like their root: docs/results.md.
    factor = lowest * math.sqrt(min(iters / max(cfg.max_iters, 1), 1))
    if world.is_main:
        highest = getattr(cfg, names[0])
        tried = [f * highest for f in SWEEP]
        draw_sweep(f"{cfg.out_dir}/lr_find.png", names[0], tried, losses, lowest * highest)
    flags = " ".join(f"--{n}={factor * getattr(cfg, n):.2g}" for n in names)
    print0(
        f"lowest at a factor of {lowest:.2g} over {iters} iterations; over {cfg.max_iters}, "
        f"{factor:.2g} is expected",
        f"suggestion: {flags}",
    )


def main(argv: list[str] | None = None) -> None:
    """The command line; see the top of this file."""
    with distributed.report_errors_once():
        argv = sys.argv[1:] if argv is None else argv
        cfg, origins = settings.configure(TrainConfig, argv, NANOGPT_HINTS)
        sys.stdout, sys.stderr = Steady(sys.stdout), Steady(sys.stderr)
        if cfg.init_from == "resume":
            cfg, origins = with_stored_settings(cfg, origins)
        with World(cfg.device, cfg.backend) as world:
            (find_learning_rate if cfg.lr_find else train)(cfg, origins, world)


def print_sample(model: GPT, data: Dataset) -> None:
    """Print 100 tokens that the model adds to the start of the validation text."""
    if data.tokenizer is None:
        return
    device, training = model.lm_head.weight.device, model.training
    prompt = data.eval_batch("val", 0, 1, 1)[0][:, : min(16, data.block_size)].to(device)
    generator = torch.Generator(device).manual_seed(0)  # so that training's state stays as it is
    model.eval()
    out = model.generate(prompt, 100, temperature=0.8, generator=generator)
    model.train(training)
    print0("sample: " + repr(Tokenizer(data.tokenizer).decode(out[0].tolist())))


if __name__ == "__main__":
    run_script(main)
