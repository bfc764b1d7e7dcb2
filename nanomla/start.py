"""
Where a run starts: its settings if it is resumed, and the model and state that --init_from names.

train.py's TrainConfig declares the settings.
"""

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

from model import ATTENTION, GPT, NAMES_OF_FLAGS, GPTConfig
from nanomla import checkpoint, convert, costs, formats, optim, settings
from nanomla.checkpoint import Checkpoint
from nanomla.checks import brief, fit, in_words
from nanomla.dataset import Dataset
from nanomla.distributed import resolve_device, warn0
from nanomla.errors import UserError
from nanomla.memory import require_memory
from nanomla.optim import Settings
from nanomla.runlog import read_log
from nanomla.tokenizer import check_spec, ends_of_text, same_ids

OF_THIS_RUN = ("init_from", "out_dir", "verify", "eval_only")
# What nanoGPT writes without meaning it: its defaults for CUDA, on any machine.
NANOGPT_MACHINE = ("device", "dtype", "backend", "compile")
Config = TypeVar("Config")


def keep_the_later(asked: dict[str, Any], origins: dict[str, str]) -> None:
    """
    Of a flag and a name of attention that disagree, drop the one that was given earlier from what
    settings.read_arguments returned.
    """
    for flag, names in NAMES_OF_FLAGS.items():
        both = flag in asked and "attention" in asked
        if both and asked[flag] != (asked["attention"] in names):
            earlier = min("attention", flag, key=list(asked).index)
            del asked[earlier]
            del origins[earlier]


# ---- The settings of a resumed run


def resumed_settings(
    config_class: type[Config], asked: dict[str, Any], origins: dict[str, str]
) -> tuple[Config, dict[str, str]]:
    """
    The settings of a run that is resumed, and where each came from.

    asked, origins: what settings.read_arguments returned. What was not given is taken from the
    checkpoint, which may be nanoGPT's. So is the model's shape, even if another one was given: a
    warning then names each setting that is not used.
    Raises UserError if there is no checkpoint, or for a setting that does not work.
    """
    out_dir = asked.get("out_dir", config_class.out_dir)
    ckpt = checkpoint.load(checkpoint.find(out_dir), verify=False)  # open_model verifies it
    stored = checkpoint.stored_config(ckpt)
    shape = {field.name for field in dataclasses.fields(GPTConfig)}

    changeable = {"dropout"}
    if asked.get("use_svd", stored.use_svd):
        changeable |= {"use_svd", "svd_rank", "svd_method"}
    given = {k: v for k, v in asked.items() if k not in shape or k in changeable}
    not_taken = (set(OF_THIS_RUN) | asked.keys()) - shape  # the shape is always the checkpoint's
    if is_nanogpts(ckpt):
        not_taken.update(NANOGPT_MACHINE)
    stored_values = stored_settings(config_class, ckpt)
    taken = {name: value for name, value in stored_values.items() if name not in not_taken}
    cfg = settings.build(config_class, taken | given, config_class(model=stored))

    not_used = warn_of_other_shape(asked, origins, cfg.model, ckpt.source)
    if "use_mla" in not_used and asked["use_mla"]:
        warn0(f"to give it latent attention, convert it: {conversion_command(cfg, cfg.out_dir)}")
    used = {name: where for name, where in origins.items() if name not in not_used}
    of_the_model = shape & ckpt.model_args.keys()
    return cfg, dict.fromkeys([*taken, *sorted(of_the_model)], ckpt.source) | used


def stored_settings(config_class: type, ckpt: Checkpoint) -> dict[str, Any]:
    """
    The settings of the run that wrote a checkpoint, by name, but for its model's and those that
    this version does not have. Raises UserError for a value of another type.
    """
    values = {}
    for name, setting in settings.declared(config_class).items():
        if setting.part is None and name in ckpt.config:
            try:
                values[name] = fit(ckpt.config[name], setting.type)
            except ValueError:
                problem = f"{name} must be {in_words(setting.type)}, not {brief(ckpt.config[name])}"
                raise UserError(f"{ckpt.source}: in the run's settings {problem}") from None
    return values


def warn_of_other_shape(
    asked: dict[str, Any], origins: dict[str, str], config: GPTConfig, source: str
) -> list[str]:
    """Name the settings that were given and ask for another model than the one in `source`."""
    not_used = []
    for field in dataclasses.fields(GPTConfig):
        name = field.name
        if asked.get(name) is None or has_setting(config, name, asked[name]):
            continue
        setting = f"{name}={asked[name]!r} ({origins[name]})"
        value = getattr(config, name)
        if name == "attention":
            value = config.attention_name
        warn0(f"{setting} is not used: the model in {source} has {name}={value!r}")
        not_used.append(name)
    return not_used


def has_setting(config: GPTConfig, name: str, value: Any) -> bool:
    """Whether a config has this value, written in any way: (32, 32) is 32 for two layers."""
    try:
        return dataclasses.replace(config, **{name: value}) == config
    except ValueError:
        return False


def is_nanogpts(ckpt: Checkpoint) -> bool:
    """Whether nanoGPT wrote this, its best, checkpoint: every run of ours has parallel."""
    return "parallel" not in ckpt.config


def changed_settings(before: dict[str, Any], cfg: Settings, it: int) -> list[str]:
    """
    The settings that decide a run's numbers and that differ from those in its checkpoint, which is
    of iteration `it`. Under WSD the length of the run and of its decay may change before the decay.
    """
    now = settings.flat(cfg)
    pairs = {}
    for name in cfg.decides_run:
        if name in before:
            pairs[name] = (before[name], now[name])
    if cfg.decay_lr and before.get("decay_lr") and "max_iters" in before:
        earlier = {"decay_shape": "cosine", "lr_decay_iters": None}  # what old checkpoints lack
        old = SimpleNamespace(**now | earlier | before)
        old_start, old_end = optim.decay_range(old)
        start, end = optim.decay_range(cfg)
        pairs["decay_shape"] = (old.decay_shape, cfg.decay_shape)
        pairs["lr_decay_iters"] = (old_end, end)
        both_wsd = old.decay_shape == cfg.decay_shape == "wsd"
        if both_wsd and it <= min(old_start, start):
            pairs.pop("wsd_decay", None)
            pairs.pop("lr_decay_iters")
    return [f"{name} {old!r}, now {new!r}" for name, (old, new) in pairs.items() if old != new]


def nothing_left(cfg: Settings, first: int) -> bool:
    """Whether a run that is resumed at this iteration has been trained and evaluated to its end."""
    if cfg.init_from != "resume" or first < cfg.max_iters:
        return False
    log = read_log(Path(cfg.out_dir) / "log.jsonl")
    if not log:
        return True
    evaluated = any("val_loss" in entry and entry["iter"] >= first for entry in log)
    return evaluated and (Path(cfg.out_dir) / checkpoint.BEST).is_file()


# ---- The model


def open_model(cfg: Settings, origins: dict[str, str], data: Dataset) -> tuple[GPT, Checkpoint]:
    """
    The model that --init_from names, on the CPU, and the state of the run that goes on with it: a
    checkpoint without weights, and an empty one unless a run is resumed.

    Raises UserError if the weights cannot be opened.
    """
    if cfg.init_from == "scratch":
        config = dataclasses.replace(cfg.model, vocab_size=cfg.vocab_size or padded_vocab(data))
        if not cfg.eval_only:
            require_room(cfg, config)
        return GPT(config), Checkpoint(model={}, model_args={})

    # open the weights, and factorise their values if that is asked for
    ckpt = open_weights(cfg, origins)
    changes: dict[str, Any] = {"dropout": cfg.model.dropout}
    if cfg.model.use_svd:
        changes["use_svd"] = True
        changes["svd_method"] = cfg.model.svd_method
        changes["svd_rank"] = None
        if "svd_rank" in origins:  # else it was resolved for cfg.model, which may be another model
            changes["svd_rank"] = cfg.model.svd_rank
    model, factorised = checkpoint.build(ckpt, **changes)
    if factorised:
        warn0(factorised)
    if ckpt.tokenizer and data.tokenizer and not same_ids(ckpt.tokenizer, data.tokenizer):
        warn0(
            f"{ckpt.source} was trained with another tokenizer than dataset {cfg.dataset}'s: "
            "its token ids mean other text"
        )

    # go on with the run
    if cfg.init_from == "resume":
        ckpt.best_val_loss = best_so_far(cfg, ckpt)
        changed = changed_settings(ckpt.config, cfg, ckpt.iter_num)
        if changed:
            names = ", ".join(changed)
            warn0(f"from here on this is another run than the one it continues: {names}")
        if factorised:
            warn0("the optimizer starts anew, as the factors are new parameters")
            ckpt.optimizer = None
            ckpt.scaler = None
        return model, dataclasses.replace(ckpt, model={})

    # or begin another one with these weights
    if "block_size" in origins and cfg.model.block_size < model.config.block_size:
        convert.crop_block_size(model, cfg.model.block_size)
    values = settings.flat(cfg)
    asked = {name: values[name] for name in origins}
    if "attention" in origins:  # of which the config keeps the flags that it stands for
        asked["attention"] = cfg.model.attention_name
    warn_of_other_shape(asked, origins, model.config, ckpt.source)
    return model, Checkpoint(model={}, model_args={})


def open_weights(cfg: Settings, origins: dict[str, str]) -> Checkpoint:
    """
    What --init_from names. Raises UserError if it cannot be opened, or has ordinary attention while
    latent attention is asked for.
    """
    if cfg.init_from == "resume":
        return checkpoint.load(checkpoint.find(cfg.out_dir), cfg.verify)
    ckpt = formats.open_weights(cfg.init_from, verify=cfg.verify)
    where = origins.get("use_mla") or origins.get("attention")
    latent = ckpt.model_args.get("use_mla") or ckpt.model_args.get("use_latent_tokens")
    if cfg.model.use_mla and where and not latent:
        command = conversion_command(cfg, cfg.init_from)
        problem = f"use_mla=True ({where}), but {ckpt.source} has ordinary attention"
        raise UserError(f"{problem}; convert it first: {command}, then --init_from=FOLDER")
    return ckpt


def conversion_command(cfg: Settings, source: str) -> str:
    """The command that gives weights with ordinary attention a latent cache."""
    flags = f"--init_from={source} --cache=8x --data={cfg.dataset}"
    return f"python -m tools.convert {flags} --to=FOLDER"


def best_so_far(cfg: Settings, ckpt: Checkpoint) -> float:
    """
    The lowest validation loss of a resumed run, if weights that have it are on the disk and it is
    that of the windows which are evaluated from here on; else infinity.
    """
    for name in ("dataset", "eval_iters", "batch_size", "within_documents"):
        value = getattr(cfg, name)
        if ckpt.config.get(name, value) != value:
            warn0("other validation windows than before: the best loss, and best.pt, start anew")
            return math.inf
    if is_nanogpts(ckpt) or (Path(cfg.out_dir) / checkpoint.BEST).is_file():
        return ckpt.best_val_loss
    return math.inf


def require_room(cfg: Settings, config: GPTConfig) -> None:
    """Raise UserError if a new run cannot fit: its shards' share, for all of FSDP's processes."""
    device = resolve_device(cfg.device)
    remedy = "use a smaller model, batch_size or block_size"
    weights = 4 * costs.parameters(config)
    require_memory(weights, "a model of this size", "cpu", remedy)  # where it is made
    moments = 2  # of AdamW
    if cfg.optimizer == "muon":
        moments = 1  # of matrices, which are most of a model
    needs = costs.training_bytes(config, cfg.batch_size, moments)
    if cfg.parallel == "fsdp":
        needs -= (2 + moments) * weights  # weights, gradients and moments are shared out
    require_memory(needs, "training this model with this batch", device, remedy)


def open_teacher(source: str | None, config: GPTConfig, device: str) -> GPT | None:
    """
    The model of --distill, for reading only; None without one. Raises UserError if it cannot teach
    a model of `config`.
    """
    if source is None:
        return None
    teacher, _ = checkpoint.build(formats.open_weights(source, prefer_best=True), dropout=0.0)
    taught = teacher.config
    if taught.vocab_size != config.vocab_size or taught.block_size < config.block_size:
        raise UserError(
            f"--distill={source} has vocab_size={taught.vocab_size} and "
            f"block_size={taught.block_size}, the model to train has {config.vocab_size} and "
            f"{config.block_size}: it cannot be the teacher"
        )
    return teacher.to(device).eval().requires_grad_(False)


def padded_vocab(data: Dataset) -> int:
    """The dataset's vocabulary; a large one rounded up to a multiple of 64, for faster kernels."""
    vocab = data.vocab_size or 50257
    if vocab <= 1024:
        return vocab
    return -(-vocab // 64) * 64


def check_model(config: GPTConfig, cfg: Settings, data: Dataset) -> None:
    """
    Raise UserError if the model lacks tokens of the dataset, or if the tokenizer that its
    checkpoints would carry is none; warn of settings without effect.
    """
    if data.vocab_size and data.vocab_size > config.vocab_size:
        remedy = f"use --vocab_size={data.vocab_size} or more"
        if cfg.init_from != "scratch":
            remedy = "give the dataset that it was trained on, or one in its tokens: --dataset=NAME"
        raise UserError(
            f"dataset {cfg.dataset} has token ids up to {data.vocab_size - 1}, the model only "
            f"vocab_size={config.vocab_size}; {remedy}"
        )
    if data.tokenizer is not None:  # found now, not when the trained model is sampled
        check_spec(data.tokenizer, str(data.folder), config.vocab_size)
    data.model_vocab_size = config.vocab_size  # nanoGPT's datasets do not say what their ids are
    if cfg.within_documents:
        # padding would count in the loads of experts, and parts have unequal numbers of targets
        for name in ("moe_experts", "n_predict"):
            if getattr(config, name):
                raise UserError(f"--within_documents=True does not go with {name}; leave it out")
        data.ends = ends_of_text(data.tokenizer)
        if not data.ends:
            problem = f"dataset {cfg.dataset} has no token that ends a document"
            raise UserError(f"--within_documents=True: {problem}")
    if cfg.init_from != "scratch":
        return  # what the weights' own config stores was said when they were made
    idle = [f"{name}={getattr(config, name)!r}" for name in without_effect(config)]
    if idle:
        warn0("without effect in this model: " + ", ".join(idle))


def without_effect(config: GPTConfig) -> list[str]:
    """The settings that differ from their default but do nothing under this configuration."""
    fields = GPTConfig.__dataclass_fields__
    idle = []
    reads = ATTENTION[config.attention_name].reads
    for attention in ATTENTION.values():
        for beginning in attention.reads:
            if beginning not in reads:
                idle += [name for name in fields if name.startswith(beginning)]
    if not config.use_svd:
        idle += ["svd_rank", "svd_method"]
    if config.pos_emb != "rope":
        idle += ["rope_theta", "rope_freqs"]
    if config.mlp != "gelu":
        idle += ["gelu"]
    if config.moe_experts == 0 or config.moe_dense_layers >= config.n_layer:
        idle += [name for name in fields if name.startswith("moe_")]
    return [name for name in dict.fromkeys(idle) if getattr(config, name) != fields[name].default]
