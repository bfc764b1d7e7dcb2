"""
Where a run starts: the model and state that --init_from names, and its folder.

`cfg` is train.py's TrainConfig, or any dataclass of settings with the fields model (a GPTConfig),
vocab_size, init_from, out_dir, dataset, batch_size, device, parallel, eval_only, distill,
verify, and those that optim.lr_factor reads.
"""

import contextlib
import dataclasses
import math
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from model import GPT, GPTConfig
from nanomla import checkpoint, costs, formats, optim, settings, surgery
from nanomla.checkpoint import Checkpoint
from nanomla.dataset import Dataset, locked
from nanomla.distributed import print0, resolve_device, warn0
from nanomla.errors import UserError
from nanomla.memory import require_memory
from nanomla.runlog import read_log

OF_THIS_RUN = ("init_from", "out_dir", "verify", "eval_only", "lr_find", "lr_find_iters")
# What nanoGPT writes without meaning it: its defaults for CUDA, on any machine.
NANOGPT_MACHINE = ("device", "dtype", "backend", "compile")


def with_stored_settings(cfg: Any, origins: dict[str, str]) -> tuple[Any, dict[str, str]]:
    """
    The settings of a run that is resumed, and where each came from: what was not given is taken
    from its checkpoint, which may be nanoGPT's.

    Raises UserError if there is no checkpoint, or for a stored setting that does not work.
    """
    ckpt = checkpoint.load(checkpoint.find(cfg.out_dir), verify=False)  # open_model does
    known = settings.declared(type(cfg))
    not_taken = {*origins, *OF_THIS_RUN}
    if is_nanogpts(ckpt):
        not_taken |= {*NANOGPT_MACHINE}
    recipe = {k: v for k, v in ckpt.config.items() if k in known and known[k].part is None}
    shape = {k: v for k, v in ckpt.model_args.items() if k in known and known[k].part == "model"}
    plain = {f.name: f.default for f in dataclasses.fields(GPTConfig)}
    given = {k: v for k, v in settings.flat(cfg).items() if k in origins and k in plain}
    taken = {k: v for k, v in (recipe | shape).items() if k not in not_taken}
    model = plain | shape | given  # not cfg.model, whose other settings are those of no run
    values = {k: v for k, v in taken.items() if k not in model} | {k: model[k] for k in shape}
    cfg = dataclasses.replace(cfg, model=GPTConfig())
    cfg = settings.replace(cfg, values | given, ckpt.source)
    return cfg, {**dict.fromkeys(taken, ckpt.source), **origins}


def nothing_left(cfg: Any, first: int) -> bool:
    """Whether a run that is resumed at this iteration has been trained and evaluated to its end."""
    log = read_log(Path(cfg.out_dir) / "log.jsonl")
    evaluated = any("val_loss" in entry and entry["iter"] >= first for entry in log)
    kept = evaluated and (Path(cfg.out_dir) / checkpoint.BEST).is_file()
    return cfg.init_from == "resume" and first >= cfg.max_iters and (kept or not log)


def open_model(cfg: Any, origins: dict[str, str], data: Dataset) -> tuple[GPT, Checkpoint]:
    """
    The model that --init_from names, on the CPU, and the state of the run that goes on with it.

    The state is a checkpoint without weights, and an empty one unless a run is resumed.
    Raises UserError if the weights cannot be opened.
    """
    new_run = Checkpoint(model={}, model_args={})
    if cfg.init_from == "scratch":
        config = dataclasses.replace(cfg.model, vocab_size=cfg.vocab_size or padded_vocab(data))
        if not cfg.eval_only:
            _require_memory(cfg, config)
        return GPT(config), new_run

    resume, asks_mla = cfg.init_from == "resume", "use_mla" in origins and cfg.model.use_mla
    if asks_mla and cfg.init_from in formats.PRETRAINED:
        raise _not_latent(cfg, origins, cfg.init_from)  # before anything is fetched
    if resume:
        ckpt = checkpoint.load(checkpoint.find(cfg.out_dir), cfg.verify)
    else:
        ckpt = formats.open_weights(cfg.init_from, verify=cfg.verify)
    ordinary = not (ckpt.model_args.get("use_mla") or ckpt.model_args.get("use_latent_tokens"))
    if asks_mla and ordinary:
        raise _not_latent(cfg, origins, ckpt.source)
    overrides: dict[str, Any] = {"dropout": cfg.model.dropout}
    if cfg.model.use_svd:
        # A rank that was not given was resolved for cfg.model's head size, not the checkpoint's.
        rank = cfg.model.svd_rank if "svd_rank" in origins else None
        overrides |= {"use_svd": True, "svd_rank": rank, "svd_method": cfg.model.svd_method}
    model, note = checkpoint.build(ckpt, **overrides)
    if note:
        warn0(note)
    if not resume and "block_size" in origins and cfg.model.block_size < model.config.block_size:
        surgery.crop_block_size(model, cfg.model.block_size)
    asked = settings.flat(cfg)
    for name, has in dataclasses.asdict(model.config).items():
        if name in origins and asked[name] is not None and asked[name] != has:
            given = f"{name}={asked[name]!r} ({origins[name]})"
            warn0(f"{given} is overridden by {ckpt.source}, which has {name}={has!r}")
    if ckpt.tokenizer and data.tokenizer and ckpt.tokenizer != data.tokenizer:
        warn0(
            f"{ckpt.source} was trained with another tokenizer than dataset {cfg.dataset}'s: "
            "its token ids mean other text"
        )
    if not resume:
        return model, new_run

    ckpt.best_val_loss = _best_so_far(cfg, ckpt)
    changed = changed_settings(ckpt.config, cfg, ckpt.iter_num)
    if changed:
        warn0("from here on this is another run than the one it continues: " + ", ".join(changed))
    if note:
        warn0("the optimizer starts anew, as the factors are new parameters")
        ckpt.optimizer, ckpt.scaler = None, None
    return model, dataclasses.replace(ckpt, model={})


def _best_so_far(cfg: Any, ckpt: Checkpoint) -> float:
    """
    The lowest validation loss of a resumed run, if weights that have it are on the disk and it is
    that of the windows which are evaluated from here on; else infinity.
    """
    now = {name: getattr(cfg, name) for name in ("dataset", "eval_iters", "batch_size")}
    if any(ckpt.config.get(name, value) != value for name, value in now.items()):
        warn0("other validation windows than before: the best loss, and best.pt, start anew")
        return math.inf
    kept = (Path(cfg.out_dir) / checkpoint.BEST).is_file() or is_nanogpts(ckpt)
    return ckpt.best_val_loss if kept else math.inf


def is_nanogpts(ckpt: Checkpoint) -> bool:
    """Whether nanoGPT wrote this, its best, checkpoint: every run of ours has parallel."""
    return "parallel" not in ckpt.config


def _require_memory(cfg: Any, config: GPTConfig) -> None:
    """Raise UserError if a new run cannot fit: its shards' share, for all of FSDP's processes."""
    device, remedy = resolve_device(cfg.device), "use a smaller model, batch_size or block_size"
    weights = 4 * costs.parameters(config)
    require_memory(weights, "a model of this size", "cpu", remedy)  # where it is made
    needs = costs.training_bytes(config, cfg.batch_size)
    if cfg.parallel == "fsdp":
        needs -= 4 * weights  # weights, gradients and two moments are shared out
    require_memory(needs, "training this model with this batch", device, remedy)


def _not_latent(cfg: Any, origins: dict[str, str], source: str) -> UserError:
    """The error for use_mla=True on weights with ordinary attention; it names the way out."""
    name = cfg.out_dir if cfg.init_from == "resume" else cfg.init_from
    command = f"python -m tools.convert --init_from={name} --cache=8x --data={cfg.dataset}"
    have = f"use_mla=True ({origins['use_mla']}), but {source} has ordinary attention"
    return UserError(f"{have}; convert it first: {command} --to=FOLDER, then --init_from=FOLDER")


def open_teacher(source: str | None, config: GPTConfig, device: str) -> GPT | None:
    """
    The model of --distill, for reading only; None without one.

    Raises UserError if it cannot be opened, or has another vocab_size or a shorter context than
    `config`.
    """
    if source is None:
        return None
    teacher, _ = checkpoint.build(formats.open_weights(source, prefer_best=True), dropout=0.0)
    has, wants = teacher.config, (config.vocab_size, config.block_size)
    if has.vocab_size != wants[0] or has.block_size < wants[1]:
        sizes = f"vocab_size={has.vocab_size} and block_size={has.block_size}"
        needs = f"the model to train has {wants[0]} and {wants[1]}"
        raise UserError(f"--distill={source} has {sizes}, {needs}: it cannot be the teacher")
    return teacher.to(device).eval().requires_grad_(False)


def padded_vocab(data: Dataset) -> int:
    """The dataset's vocabulary; a large one rounded up to a multiple of 64, for faster kernels."""
    vocab = data.vocab_size or 50257
    return vocab if vocab <= 1024 else -(-vocab // 64) * 64


def changed_settings(before: dict[str, Any], cfg: Any, it: int) -> list[str]:
    """
    The settings that decide a run's numbers and that differ from those in its checkpoint.

    it: the iteration of the checkpoint. Under WSD the length of the run and of its decay may change
    as long as the decay has not begun.
    """
    now = settings.flat(cfg)
    pairs = {name: (before[name], now[name]) for name in cfg.decides_run if name in before}
    if cfg.decay_lr and before.get("decay_lr") and "max_iters" in before:
        earlier = {"decay_shape": "cosine", "lr_decay_iters": None}  # what old checkpoints lack
        schedules = [SimpleNamespace(**now | c) for c in (earlier | before, now)]
        starts, ends = zip(*map(optim.decay_range, schedules), strict=True)
        shapes = tuple(s.decay_shape for s in schedules)
        pairs |= {"decay_shape": shapes, "lr_decay_iters": ends}
        if shapes == ("wsd", "wsd") and it <= min(starts):
            pairs = {k: v for k, v in pairs.items() if k not in ("wsd_decay", "lr_decay_iters")}
    return [f"{name} {old!r}, now {new!r}" for name, (old, new) in pairs.items() if old != new]


def check_model(config: GPTConfig, cfg: Any, data: Dataset) -> None:
    """Raise UserError if the model lacks tokens of the dataset; warn of settings without effect."""
    remedy = f"use --vocab_size={data.vocab_size} or more"
    if cfg.init_from != "scratch":
        remedy = "give the dataset that it was trained on, or one in its tokens: --dataset=NAME"
    if data.vocab_size and data.vocab_size > config.vocab_size:
        raise UserError(
            f"dataset {cfg.dataset} has token ids up to {data.vocab_size - 1}, the model only "
            f"vocab_size={config.vocab_size}; {remedy}"
        )
    idle = [f"{name}={getattr(config, name)!r}" for name in without_effect(config)]
    if idle:
        warn0("without effect in this model: " + ", ".join(idle))


def without_effect(config: GPTConfig) -> list[str]:
    """The settings that differ from their default but do nothing under this configuration."""
    fields = GPTConfig.__dataclass_fields__
    idle = [] if config.use_mla else [name for name in fields if name.startswith("mla_")]
    idle += [] if config.use_svd else ["svd_rank", "svd_method"]
    idle += [] if config.pos_emb == "rope" else ["rope_theta", "rope_freqs"]
    idle += [] if config.use_latent_tokens else ["n_latent_tokens"]
    idle += [] if config.attention == "mha" else ["n_kv_head"]
    idle += [] if config.mlp == "gelu" else ["gelu"]
    return [name for name in idle if getattr(config, name) != fields[name].default]


@contextlib.contextmanager
def run_folder(out_dir: str, keep: bool) -> Iterator[None]:
    """
    A context in which out_dir is there and no other process trains in it. Unless `keep`, the files
    of an earlier run are moved to a folder old-N in it.

    Raises UserError if out_dir cannot be written or another process trains in it.
    """
    folder = Path(out_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"out_dir {out_dir} cannot be written ({error.strerror})") from None
    with locked(folder, "training in it"):
        checkpoint.remove_leftovers(folder)
        if not keep:
            _move_earlier_run(folder)
        yield


def _move_earlier_run(folder: Path) -> None:
    names = (checkpoint.LATEST, checkpoint.BEST, "log.jsonl", "loss.png", *checkpoint.CONVERSION)
    names += ("tensorboard", "wandb")
    earlier = [path for path in folder.iterdir() if path.name in names]
    if not earlier:
        return
    number = 1
    while (folder / f"old-{number}").exists():
        number += 1
    old = folder / f"old-{number}"
    old.mkdir()
    for path in earlier:
        path.rename(old / path.name)
    print0(f"an earlier run was here: it is now in {old}")
