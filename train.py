"""
Train a GPT, in one process or in several under torchrun.

    python train.py config/train_mla.py --mla_latent_dim=32
    python train.py config/train_mla.py --init_from=resume
    torchrun --standalone --nproc_per_node=2 train.py config/train_mla.py
"""

import dataclasses
import math
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from model import GPT, GPTConfig
from nanomla import costs, distributed, experts, optim, settings
from nanomla.checkpoint import Checkpoint
from nanomla.checks import Count, Natural, NonNegative, Seed, Share, Text, UpToOne, check
from nanomla.dataset import Dataset
from nanomla.distributed import StopSignals, World, print0
from nanomla.errors import UsageError, run_script
from nanomla.progress import Progress, diverged
from nanomla.runfolder import RunFolder
from nanomla.runlog import RunLog, evaluation_text
from nanomla.start import (
    check_model,
    keep_the_later,
    nothing_left,
    open_model,
    open_teacher,
    resumed_settings,
)

# What the error says of settings that nanoGPT or an earlier version has.
LR_FIND = ", which is gone: python -m tools.compare CONFIG --lr_factors=0.5,1,2 compares rates"
HINTS = {
    "always_save_checkpoint": ": leave it out, ckpt.pt is always the latest and best.pt the best",
    "lr_find": LR_FIND,
    "lr_find_iters": LR_FIND,
    "tensorboard": ", which is gone: the numbers are in log.jsonl, and in wandb with --wandb_log",
}


@dataclass
class TrainConfig:
    """
    The settings of a run: its model's, by their own names on the command line, and the loop's.

    Raises ValueError naming the setting, its value and what would work.
    """

    # Settings of tools.compare, so that the config file of a comparison is one of a run, too.
    ignored_in_files: ClassVar[tuple[str, ...]] = (
        "title", "variants", "lr_factors", "seeds", "equal_parameters",
        "decode_context", "eval_tokens",
    )
    headings: ClassVar[dict[str, str]] = {
        "vocab_size": "model", "out_dir": "run", "batch_size": "batch", "optimizer": "optimizer",
        "learning_rate": "learning rate", "eval_interval": "evaluation", "log_interval": "logging",
        "device": "device",
    }
    # A resumed run in which one of these has changed is another run than the one it continues.
    decides_run: ClassVar[tuple[str, ...]] = (
        "dropout", "distill", "predict_weight", "dataset", "within_documents", "seed", "batch_size",
        "gradient_accumulation_steps",
        "weight_decay", "beta1", "beta2", "muon_weight_decay", "grad_clip", "learning_rate",
        "muon_learning_rate", "decay_lr", "decay_shape", "wsd_decay", "warmup_iters", "min_lr",
        "dtype", "moe_balance_step",
    )
    model: GPTConfig = field(default_factory=lambda: GPTConfig(bias=False))
    vocab_size: Annotated[
        Count | None, "The number of token ids that the model knows. None stands for the dataset's."
    ] = None

    out_dir: Annotated[Text, "The folder for checkpoints and logs."] = "out"
    init_from: Annotated[
        Text,
        "The weights to start with: scratch for new ones, resume to go on with the run in out_dir, "
        "or a checkpoint file, the folder of another run, gpt2, gpt2-medium, gpt2-large, gpt2-xl, "
        "or a folder of safetensors.",
    ] = "scratch"
    distill: Annotated[
        Text | None,
        "The weights of a teacher, named as for init_from. The KL divergence from its predictions "
        "is added to the training loss.",
    ] = None
    predict_weight: Annotated[
        NonNegative,
        "The weight of the loss of the token after the next, which n_predict=1 adds.",
    ] = 0.3
    dataset: Annotated[Text, "The dataset: a folder below data/, or a path."] = "openwebtext"
    within_documents: Annotated[
        bool,
        "Sequences are cut at the tokens that end a document, and positions begin anew, so that no "
        "document sees the one before it. The parts are padded to the longest, which takes time.",
    ] = False
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

    moe_balance_step: Annotated[
        NonNegative,
        "The step by which the router's bias rises after an iteration for an expert with fewer "
        "tokens than the mean, and falls for the others. 0 leaves the loads as they are.",
    ] = 0.001

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

    eval_interval: Annotated[Count, "The number of iterations between evaluations."] = 2000
    eval_iters: Annotated[
        Count,
        "The number of batches of each split in an evaluation, always the same. Losses compare "
        "where this times batch_size and block_size is the same.",
    ] = 200
    eval_only: Annotated[bool, "The model is evaluated once and not trained."] = False
    sample_interval: Annotated[
        Natural, "The number of evaluations between printed samples. 0 prints none."
    ] = 0

    log_interval: Annotated[Count, "The number of iterations between log lines."] = 1
    wandb_log: Annotated[bool, "The run is also logged to Weights & Biases (wandb)."] = False
    wandb_project: Annotated[Text, "The name of the project in wandb."] = "nanomla"
    wandb_run_name: Annotated[
        Text | None, "The name of the run in wandb. None stands for the name of out_dir."
    ] = None

    device: Annotated[Text, "The device to train on: auto, cpu, cuda, cuda:1, ... or mps."] = "auto"
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
        if self.within_documents and self.distill:
            raise ValueError("within_documents does not go with distill; leave out one of them")


class Trainer:
    """
    A model in training: its data, optimizers and precision, and this rank's share of the work. All
    ranks must call evaluate(), gradients(), clip() and state() together.
    """

    def __init__(
        self,
        cfg: TrainConfig,
        world: World,
        rows: range,
        data: Dataset,
        model: GPT,
        state: Checkpoint,
    ) -> None:
        self.cfg = cfg
        self.world = world
        self.data = data
        self.rows = rows  # this rank's of every iteration
        self.model = model
        self.teacher = open_teacher(cfg.distill, model.config, world.device)
        self.dtype = distributed.resolve_dtype(cfg.dtype, world.device_type, model.config.n_embd)
        # float16 loses small gradients, so its loss is scaled up for the backward pass
        self.scaler = torch.amp.GradScaler(world.device_type, enabled=self.dtype == "float16")
        if world.device_type == "cuda":
            torch.set_float32_matmul_precision("high")  # TF32 for what stays float32
        model.grad_checkpoint = cfg.grad_checkpoint
        if cfg.compile:
            print0("compiling the model (the first iterations take a minute or more)")
            experts.leave_uncompiled(model)
        blocks = model.transformer.h
        self.net = distributed.wrap(model, blocks, world, cfg.parallel, cfg.compile).train()

        self.optimizers = optim.make_optimizers(model, cfg, world.device_type)
        if state.optimizer is not None:
            optim.restore_optimizers(self.optimizers, state.optimizer, state.source)
        if state.scaler:
            self.scaler.load_state_dict(state.scaler)

    def autocast(self) -> Any:
        """A context in which matrix products have the run's dtype."""
        if self.dtype == "float32":
            return nullcontext()
        return torch.autocast(self.world.device_type, getattr(torch, self.dtype))

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """
        The mean losses over fixed windows of each split, on every rank, the second as perplexity
        and, if the dataset records the bytes of its text, as bits per byte too. With n_predict,
        predict_loss is the validation loss of the token after the next; with experts, their shares
        say how much of these tokens single ones get.
        """
        self.net.eval()
        train_loss, *_ = self.mean_losses("train")
        with experts.counted(self.model):
            val_loss, *ahead = self.mean_losses("val")
        self.net.train()
        measures = {"train_loss": train_loss, "val_loss": val_loss}
        if ahead:
            measures["predict_loss"] = ahead[0]
        measures["perplexity"] = math.exp(min(val_loss, 700))  # exp(710) overflows
        bytes_per_token = self.data.bytes_per_token("val")
        if bytes_per_token:
            measures["bits_per_byte"] = val_loss / math.log(2) / bytes_per_token
        if experts.mixtures(self.model):
            measures |= experts.shares(experts.loads(self.model, self.world))
        return measures

    def mean_losses(self, split: str) -> list[float]:
        """The mean of every loss over eval_iters fixed batches, which the ranks share out."""
        world = self.world
        batch_size = self.cfg.batch_size
        count = self.cfg.eval_iters
        losses = torch.zeros(1 + self.model.config.n_predict, count, dtype=torch.float64)
        for first in range(0, count, world.size):
            i = first + world.rank
            # Under FSDP all ranks must run the model together. A rank for which no batch is left
            # runs the last one again and does not count it.
            x, y = self.data.eval_batch(split, min(i, count - 1), count, batch_size)
            if i >= count:
                experts.stop_counting(self.model)
            with self.autocast():
                _, loss = self.net(x.to(world.device), y.to(world.device), all_losses=True)
            loss = loss.cpu()
            if i < count:
                losses[:, i] = loss
        return [sum(world.sum(*of_batches)) / count for of_batches in losses]

    def gradients(self, it: int) -> Tensor:
        """
        Forward and backward passes of this rank's rows; returns their mean loss, without that of
        the token after the next.
        """
        cfg = self.cfg
        rows = self.rows
        device = self.world.device
        mean_loss = torch.zeros((), device=device)
        steps = -(-len(rows) // cfg.batch_size)
        for i in range(steps):
            micro = rows[i * len(rows) // steps : (i + 1) * len(rows) // steps]
            x, y = self.data.batch(cfg.seed, it, micro)
            if cfg.model.dropout:  # it depends on the same three numbers as the batch, on no others
                seeds = np.random.SeedSequence([cfg.seed, it, micro.start])
                torch.manual_seed(int(seeds.generate_state(1, np.uint64)[0] >> 1))
            last = i == steps - 1
            with distributed.gradient_sync(self.net, now=last), self.autocast():
                loss, ahead = self.losses(x.to(device), y.to(device))
                loss = loss * (len(micro) / len(rows))
                total = loss
                if ahead is not None:
                    total = loss + ahead * (cfg.predict_weight * len(micro) / len(rows))
                self.scaler.scale(total).backward()
            mean_loss += loss.detach()
        return mean_loss

    def losses(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor | None]:
        """
        The mean cross-entropy, plus with a teacher the mean KL divergence, in nats per token; and
        the cross-entropy of the token after the next, if the model predicts it.
        """
        ahead = None
        if self.model.config.n_predict:
            logits, both = self.net(x, y, all_losses=True)
            loss, ahead = both.unbind()
        else:
            logits, loss = self.net(x, y)
        if self.teacher is None:
            return loss, ahead
        with torch.no_grad():
            # given targets, a model returns the logits of all positions
            target = self.teacher(x, y)[0].float().log_softmax(-1)
        kl = F.kl_div(logits.float().log_softmax(-1), target, reduction="sum", log_target=True)
        return loss + kl / y.numel(), ahead

    def clip(self) -> float:
        """Clip the gradients at grad_clip; returns their norm before that."""
        for optimizer in self.optimizers.values():
            self.scaler.unscale_(optimizer)
        limit = self.cfg.grad_clip or math.inf
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        return float(distributed.full(norm))

    def update(self, norm: float) -> None:
        """A step of all optimizers, or of none if the gradients' norm is not finite."""
        if math.isfinite(norm):
            for optimizer in self.optimizers.values():
                self.scaler.step(optimizer)
            step = self.cfg.moe_balance_step
            if step and experts.mixtures(self.model):
                experts.balance(self.model, experts.loads(self.model, self.world), step)
        self.scaler.update()
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        if self.world.device_type == "cuda":
            torch.cuda.synchronize()

    def state(self) -> Checkpoint | None:
        """Weights and what a resumed run needs beside them, on rank 0; None on the others."""
        main = self.world.is_main
        weights = distributed.full_state_dict(self.model.state_dict(), main)
        moments = distributed.full_state_dict(optim.optimizer_state(self.optimizers), main)
        if not main:
            return None
        return Checkpoint(
            model=weights,
            model_args=dataclasses.asdict(self.model.config),
            optimizer=moments,
            scaler=self.scaler.state_dict(),
            config=settings.flat(self.cfg),
            tokenizer=self.data.tokenizer,
        )


def rows_of_rank(cfg: TrainConfig, world: World) -> range:
    """This rank's share of an iteration's sequences. Raises UsageError if it is no whole number."""
    count = cfg.gradient_accumulation_steps * cfg.batch_size
    if count % world.size:
        raise UsageError(
            f"the {count} sequences of an iteration (batch_size x gradient_accumulation_steps) "
            f"cannot be shared out evenly over {world.size} processes"
        )
    share = count // world.size
    return range(share * world.rank, share * (world.rank + 1))


def train(cfg: TrainConfig, origins: dict[str, str], world: World) -> None:
    """One run, until max_iters or a signal. origins: where each setting came from."""
    began = time.perf_counter()
    rows = rows_of_rank(cfg, world)

    # data and model
    block_size = 1  # that of other weights is not known before they are opened
    if cfg.init_from in ("scratch", "resume"):
        block_size = cfg.model.block_size
    data = Dataset(cfg.dataset, block_size)
    described = settings.describe(cfg, origins)
    print0("settings:", *(f"  {line}" for line in described))
    torch.manual_seed(cfg.seed)
    folder = RunFolder(cfg.out_dir, cfg.init_from == "resume", world)
    model, state = open_model(cfg, origins, data)
    folder.goes_on_from(state)
    config = model.config
    data = Dataset(cfg.dataset, config.block_size)
    check_model(config, cfg, data)
    trainer = Trainer(cfg, world, rows, data, model, state)
    first = state.iter_num
    del state  # the optimizers have copies of what it holds

    accumulation = cfg.gradient_accumulation_steps
    tokens_per_iter = accumulation * cfg.batch_size * config.block_size
    evaluated = cfg.eval_iters * cfg.batch_size * config.block_size
    processes = "1 process"
    if world.size > 1:
        processes = f"{world.size} processes"
    parameters = f"{model.get_num_params():,} parameters"
    idle = sum(p.numel() for p in costs.idle_parameters(model))
    if idle:
        parameters += f", of which a token passes {model.get_num_params() - idle:,}"
    print0(
        f"model: {parameters}, {costs.cache_in_words(model)}",
        f"run: {world.device}, {trainer.dtype}, {processes}, {tokens_per_iter:,} tokens per "
        f"iteration ({accumulation} x {cfg.batch_size} x {config.block_size}), "
        f"iterations {first} to {cfg.max_iters}",
        f"evaluation: {evaluated:,} tokens of each split "
        f"({cfg.eval_iters} x {cfg.batch_size} x {config.block_size})",
    )
    if cfg.eval_only:
        print0(f"iteration {first}: {evaluation_text(trainer.evaluate())}")
        return
    if nothing_left(cfg, first):
        print0(f"nothing to do: iteration {first} of {cfg.max_iters}; raise --max_iters")
        return

    with folder.training():
        log = None
        if world.is_main:
            log = RunLog(cfg.out_dir, first, described)
            if cfg.wandb_log:
                folder.wandb_run_id = log.start_wandb(
                    cfg.wandb_project, cfg.wandb_run_name, settings.flat(cfg), folder.wandb_run_id
                )
        world.barrier()  # no rank trains before rank 0 has the folder
        progress = Progress(
            cfg, world, model, data, trainer.dtype, first, tokens_per_iter, began, log
        )
        with progress, StopSignals(announce=world.is_main) as stop:
            loop(trainer, folder, progress, stop)


def loop(trainer: Trainer, folder: RunFolder, progress: Progress, stop: StopSignals) -> None:
    """Iterate until max_iters, or a signal to any rank: then save, and raise SystemExit."""
    cfg = trainer.cfg
    world = trainer.world
    it = first = progress.first
    while True:
        # set the learning rates of this iteration
        optim.set_learning_rates(trainer.optimizers, optim.lr_factor(cfg, it))

        # evaluate, and save what that shows
        if it % cfg.eval_interval == 0 or it >= cfg.max_iters:
            measures = trainer.evaluate()
            train_loss = measures["train_loss"]
            val_loss = measures["val_loss"]
            if not math.isfinite(train_loss + val_loss):
                losses = f"evaluation gave train loss {train_loss}, val loss {val_loss}"
                raise diverged(cfg, it, losses, folder.last_checkpoint())
            progress.evaluation(it, measures)
            # a resumed run's start is saved already
            if it and (it > first or val_loss < folder.best_val_loss):
                folder.save(it, trainer.state(), val_loss)
        if it >= cfg.max_iters:
            break

        # forward and backward
        began = time.perf_counter()
        with experts.counted(trainer.model):
            mean_loss = trainer.gradients(it)
        norm = trainer.clip()
        loss_sum, signals = world.sum(mean_loss, stop.received)
        loss = loss_sum / world.size  # the mean over the rows of all ranks
        # float16's gradients may be infinite as long as its loss scale can come down
        norm_works = math.isfinite(norm) or trainer.scaler.get_scale() > 1
        if not math.isfinite(loss) or not norm_works:
            losses = f"loss {loss}, gradient norm {norm}"
            raise diverged(cfg, it, losses, folder.last_checkpoint())

        # save before the update, as these weights are known to have a finite loss
        every = cfg.checkpoint_interval
        if every and it % every == 0 and it > first and it != folder.tried_at:
            folder.save(it, trainer.state())

        # update
        trainer.update(norm)
        progress.iteration(it, loss, norm, seconds=time.perf_counter() - began)
        it += 1

        # stop after a signal to any rank
        if signals:
            saved = save_last(it, trainer, folder)
            print0(f"stopped before iteration {it}; go on with --init_from=resume, {saved}")
            raise SystemExit(128 + (stop.received or signal.SIGTERM))

    best = folder.best_val_loss
    saved = "nothing was trained"
    if it:
        saved = save_last(it, trainer, folder)
    else:
        best = min(best, val_loss)
    print0(f"done: best validation loss {best:.4f}, {saved}{world.peak_memory()}")


def save_last(it: int, trainer: Trainer, folder: RunFolder) -> str:
    """Save the end of a run. Returns what is on the disk; raises UserError if nothing is."""
    if folder.saved_at != it:
        folder.save(it, trainer.state())
    return folder.require_checkpoint(it)


def main(argv: list[str] | None = None) -> None:
    """The command line; see the top of this file."""
    with distributed.report_errors_once():
        if argv is None:
            argv = sys.argv[1:]
        asked, origins = settings.read_arguments(TrainConfig, argv, HINTS)
        keep_the_later(asked, origins)
        if asked.get("init_from") == "resume":
            cfg, origins = resumed_settings(TrainConfig, asked, origins)
        else:
            cfg = settings.build(TrainConfig, asked)
        with World(cfg.device, cfg.backend) as world:
            train(cfg, origins, world)


if __name__ == "__main__":
    run_script(main)
