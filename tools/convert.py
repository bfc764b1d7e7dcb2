"""
Give a trained model with ordinary attention (MHA, GQA) a latent cache: turn it into MLA.

    python -m tools.convert --init_from=out --cache=8x --data=shakespeare_char --to=out-latent
    python -m tools.convert --init_from=gpt2 --cache=4x --data=shakespeare --to=gpt2-latent
    python -m tools.convert ... --cache=16x --heal_iters=200 --distill=True
    python -m tools.convert ... --sweep=True

Some of the training text (--data) shows what attention needs, and the weights are factorised by
that: nanomla/convert.py says how. --heal_iters trains the result with train.py, with the source's
batch and optimizer and half its learning rate. --to becomes a run's folder like any other, for
sample.py, train.py and tools.export, with a report in conversion.md. The same command goes on where
it was interrupted. --sweep compares cache sizes and methods, in sweep.md and sweep.png.
"""

import dataclasses
import functools
import glob
import math
import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from tqdm import tqdm

import train
from model import GPT, GPTConfig
from nanomla import checkpoint, costs, formats
from nanomla import convert as weights
from nanomla.checkpoint import Checkpoint, Conversion
from nanomla.checks import Count, Natural, Positive, check
from nanomla.convert import Calibration, Plan
from nanomla.dataset import Dataset
from nanomla.distributed import print0, resolve_device, resolve_dtype
from nanomla.errors import UsageError, UserError, run_script
from nanomla.settings import configure
from tools.bench.timing import markdown
from train import TrainConfig

RECORD, REPORT, HEAL = checkpoint.CONVERSION
SWEEP_SIZES = ("2x", "4x", "8x", "16x", "32x")
HEALING = ("heal_iters", "heal_lr", "distill")
CHOICE_TOKENS = 2**14  # of training text, on which candidates are compared
# Settings of a run that healing takes over from the source's.
RECIPE = (
    "batch_size", "gradient_accumulation_steps", "optimizer", "weight_decay", "beta1", "beta2",
    "muon_weight_decay", "grad_clip", "learning_rate", "muon_learning_rate", "dtype",
)  # fmt: skip


@dataclass
class ConvertConfig:
    """What to convert, how, and where to."""

    headings: ClassVar[dict[str, str]] = {
        "init_from": "source", "to": "result", "heal_iters": "healing", "eval_tokens": "run",
    }  # fmt: skip

    init_from: Annotated[
        str | None,
        "The weights to convert: the folder of a run, a checkpoint file, gpt2, gpt2-medium, "
        "gpt2-large, gpt2-xl, or a folder of safetensors.",
    ] = None
    data: Annotated[
        str | None, "A dataset in the source's tokens: a folder below data/, or a path."
    ] = None
    block_size: Annotated[
        Annotated[int, Field(ge=2)] | None,
        "The number of tokens in a window of text. None stands for the model's context.",
    ] = None

    to: Annotated[
        str | None,
        "The folder to write: a new one, an empty one, or that of a conversion to go on with.",
    ] = None
    cache: Annotated[
        str,
        "The size of the cache. 8x stands for 8 times fewer cached numbers than the source has, "
        "and 32 for 32 numbers per token and layer.",
    ] = "8x"
    method: Annotated[
        Literal[weights.METHODS],  # type: ignore[valid-type]
        "Where the error is counted that the conversion keeps small: in the weights, on their "
        "inputs, at the output of attention, or in the loss.",
    ] = "loss"
    calibration_tokens: Annotated[
        Count, "The number of training tokens that are read to count that error."
    ] = 100_000
    ranks: Annotated[
        Literal["auto", "spectrum", "uniform"],
        "How wide the latents are: with spectrum as wide as each layer needs, with uniform all the "
        "same. auto takes the better.",
    ] = "auto"
    rope_dim: Annotated[
        Natural | None, "How many of the cached numbers are rotary. None finds the best number."
    ] = None
    balance: Annotated[
        Positive | None,
        "The weight of values against keys with method=input and method=output. None finds the "
        "best.",
    ] = None
    svd_method: Annotated[
        Literal["exact", "randomized"], "The method that factorises the maps."
    ] = "exact"
    sweep: Annotated[
        bool, "All methods are tried, at 2x to 32x or at the sizes of --cache=4x,8x,..."
    ] = False

    heal_iters: Annotated[Natural, "The number of training iterations after the conversion."] = 0
    heal_lr: Annotated[
        Positive | None,
        "The highest learning rate of that training. None stands for half the source's.",
    ] = None
    distill: Annotated[bool, "That training also learns from the source's predictions."] = False

    eval_tokens: Annotated[Count, "About how many validation tokens to measure on."] = 2**17
    seed: Annotated[Natural, "The seed of the windows that are drawn."] = 1337
    device: Annotated[str, "The device to run on: auto, cpu, cuda, cuda:1, ..."] = "auto"

    def __post_init__(self) -> None:
        check(self)
        for name in ("distill", "heal_lr"):
            if getattr(self, name) and not self.heal_iters:
                raise ValueError(f"{name} without heal_iters has no effect; add --heal_iters=N")
        if self.balance and not self.sweep and self.method not in ("input", "output"):
            raise ValueError(f"balance has no effect on method={self.method}; leave it out")


class Source:
    """The model to convert and the text to do it with. Raises UserError if they do not fit."""

    def __init__(self, cfg: ConvertConfig) -> None:
        self.cfg, self.device = cfg, resolve_device(cfg.device).replace("mps", "cpu")
        self.stored = formats.open_weights(cfg.init_from, prefer_best=True)
        _refuse_other_attention(self.stored)
        model, _ = checkpoint.build(self.stored)
        self.model = weights.without_svd(model).to(self.device).eval()
        self.config = self.model.config
        kind = self.device.partition(":")[0]
        bf16 = resolve_dtype("auto", kind, self.config.n_embd) == "bfloat16"
        self.amp = functools.partial(torch.autocast, kind, torch.bfloat16, bf16)  # as in training
        self.block_size = cfg.block_size or self.config.block_size
        if self.block_size > self.config.block_size:
            longest = f"the longest context of {cfg.init_from} is {self.config.block_size}"
            raise UserError(f"--block_size={cfg.block_size} does not work: {longest}")
        if cfg.heal_iters and self.block_size < self.config.block_size:
            only = f"heal_iters needs the whole context, {self.config.block_size}; leave one out"
            raise UserError(f"--block_size={cfg.block_size} does not work: {only}")
        self.data = Dataset(cfg.data, self.block_size)
        self.tokenizer = self._tokenizer()
        self.numbers = costs.cached_numbers(model)  # of the source's cache
        self.bytes_per_token = model.make_cache(1, 1).bytes_per_token

    def _tokenizer(self) -> dict[str, Any] | None:
        """The tokenizer's spec, the source's or else the dataset's."""
        name, has = self.cfg.init_from, self.data.vocab_size
        try:
            own = checkpoint.tokenizer_spec(self.stored)
        except UserError:  # nothing says what its ids mean
            own = None
        if own and self.data.tokenizer and own != self.data.tokenizer:
            problem = f"dataset {self.cfg.data} was prepared with another tokenizer than {name}'s"
            raise UserError(f"{problem}: its token ids mean other text")
        if has and has > self.config.vocab_size:
            sizes = f"ids up to {has - 1}, {name} only vocab_size={self.config.vocab_size}"
            raise UserError(f"dataset {self.cfg.data} has {sizes}: they do not belong together")
        return own or self.data.tokenizer

    @property
    def rows(self) -> int:
        """Windows per forward pass: at most 64 with logits of 200 MB, at least one."""
        return max(1, min(64, 5 * 10**7 // (self.config.vocab_size * self.block_size)))

    def text(self, tokens: int, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and targets (B, T) of so many tokens of training text, at least one window."""
        windows, i = max(round(tokens / self.block_size), 1), first
        while windows > 0:
            rows = min(self.rows, windows)
            x, y = self.data.batch(self.cfg.seed, i, range(rows))
            yield x.to(self.device), y.to(self.device)
            windows, i = windows - rows, i + 1

    @functools.cached_property
    def calibration(self) -> Calibration:
        with progress("calibrating", self.cfg.calibration_tokens) as bar:
            batches = self.text(self.cfg.calibration_tokens, first=0)
            with self.amp():
                found = weights.calibrate(self.model, bar.count(x for x, _ in batches))
        if not all(t.isfinite().all() for t in (*found.inputs, *found.gradients)):
            raise UserError(f"{self.stored.source} computes values that are not finite")
        return found

    @functools.cached_property
    def loss(self) -> float:
        """The source's validation loss."""
        return self.validation_loss(self.model, "measuring the source")

    @torch.no_grad()
    def validation_loss(self, model: GPT, what: str) -> float:
        """Nats per token over the validation split, or eval_tokens spread evenly over it."""
        batches, total = self.data.spread("val", self.cfg.eval_tokens, self.rows), 0.0
        model.to(self.device)
        with progress(what, sum(x.numel() for x, _ in batches)) as bar:
            for x, y in batches:
                with self.amp():
                    total += model(x.to(self.device), y.to(self.device))[1].item()
                bar.update(x.numel())
        return total / len(batches)

    @torch.no_grad()
    def choice_loss(self, model: GPT) -> float:
        """The loss by which candidates are compared, on windows that are drawn separately."""
        model.to(self.device)
        with self.amp():
            text = self.text(CHOICE_TOKENS, first=10**6)
            losses = [model(x, y)[1].item() * len(x) for x, y in text]
        return sum(losses) / max(round(CHOICE_TOKENS / self.block_size), 1)


def _refuse_other_attention(stored: Checkpoint) -> None:
    """Raise UserError for a model without keys and values of its heads in the cache."""
    args, name = stored.model_args, stored.source
    if args.get("use_mla"):
        how = f"mla_latent_dim={args.get('mla_latent_dim')}"
        raise UserError(f"{name} already is a model with latent attention ({how})")
    if args.get("use_latent_tokens"):
        raise UserError(f"{name} has latent tokens, whose state is constant: nothing to convert")


class progress(tqdm):
    """A bar in tokens on a terminal's stderr."""

    def __init__(self, what: str, tokens: int) -> None:
        hidden = not sys.stderr.isatty()
        super().__init__(desc=what, total=tokens, unit="tok", leave=False, disable=hidden)

    def count(self, batches: Iterator[Tensor]) -> Iterator[Tensor]:
        for batch in batches:
            yield batch
            self.update(batch.numel())


# ---- one conversion
def main(argv: list[str] | None = None) -> None:
    """The command line; see the top of this file."""
    argv = sys.argv[1:] if argv is None else argv
    cfg, origins = configure(ConvertConfig, argv)
    for name, what in (("init_from", "model"), ("data", "text"), ("to", "folder to write")):
        if getattr(cfg, name) is None:
            raise UsageError(f"say which {what}: --{name}=...; --help lists the settings")
    if cfg.sweep and "method" in origins:
        raise UsageError("--sweep=True compares all methods; leave out --method")
    if cfg.sweep:
        run_sweep(cfg, None if "cache" not in origins else cfg.cache.split(","))
    else:
        convert(cfg, Source(cfg))


def convert(cfg: ConvertConfig, source: Source) -> Conversion:
    """Convert, heal and report, or go on with that; returns the record in conversion.json."""
    asked = {k: v for k, v in vars(cfg).items() if k not in ("to", "device", "sweep")}
    folder, record = earlier(cfg.to, asked)
    heal = heal_settings(cfg, source) if cfg.heal_iters else {}  # may raise, before the work
    if record is None:
        made = search(cfg, source, asked_plan(cfg, source))
        record = make_record(source, made, asked)
        write_run(folder, source, made.model, record, heal)
    elif record.asked != asked:  # healing is asked for now
        record.asked = asked
        write_texts(folder, record_texts(record, heal))
    if heal and "healed" not in record.loss:
        train.main([f"--{name}={value}" for name, value in heal.items()])
        healed, _ = checkpoint.build(formats.open_weights(folder, prefer_best=True))
        record.loss["healed"] = source.validation_loss(healed.eval(), "measuring the result")
        write_texts(folder, record_texts(record, heal))
    print0("", *report_text(record).splitlines(), "", f"in {cfg.to}")
    return record


def earlier(to: str, asked: dict[str, Any]) -> tuple[Path, Conversion | None]:
    """
    The folder of --to and the record of the same conversion in it, if it is there.

    Raises UserError if the folder cannot be written or holds anything else.
    """
    try:
        folder = Path(to).resolve()
        there = next(path for path in (folder, *folder.parents) if path.exists())
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    except OSError as error:
        raise UserError(f"--to={to} cannot be written ({error.strerror})") from None
    if not there.is_dir():
        raise UserError(f"--to={to} cannot be written: {there} is a file")
    if not os.access(there, os.W_OK):
        raise UserError(f"--to={to} cannot be written: {there} is read-only")
    if folder == Path.cwd():
        raise UserError(f"--to={to} is the current folder; name a new one")
    if not names:
        return folder, None
    record = checkpoint.read_conversion(folder)
    if record is None or not {checkpoint.LATEST, checkpoint.BEST} & set(names):
        raise UserError(f"--to={to} holds other files; name a new or an empty folder")
    later = HEALING if not record.asked["heal_iters"] else ()  # healing may be asked for later
    other = [k for k in asked if k not in later and asked[k] != record.asked.get(k, asked[k])]
    if other:
        has = ", ".join(f"{k}={record.asked[k]!r}" for k in other)
        remedy = "give the same settings, or name a new folder"
        raise UserError(f"--to={to} holds a conversion with {has}; {remedy}")
    return folder, record


def asked_plan(cfg: ConvertConfig, source: Source) -> Plan:
    """The plan that --cache and the other settings ask for. Raises UserError if it cannot be."""
    config, has = source.config, source.numbers
    found = re.fullmatch(r"([0-9]{1,9})|([0-9]{0,9}\.?[0-9]{1,9})x", cfg.cache)
    if not found or not float(found[1] or found[2]):
        raise UsageError(f"--cache={cfg.cache}: write 8x, or a number such as 32")
    numbers = int(found[1]) if found[1] else math.floor(has / float(found[2]))
    n, rotary = config.nkv * config.hs, config.rotary_dim > 0
    if numbers > has:
        much = f"{cfg.init_from} caches {has:g} numbers per token and layer"
        raise UserError(f"--cache={cfg.cache} asks for {numbers}, but {much}: that is no smaller")
    least = 3 if rotary else 1
    if numbers < least:
        raise UserError(f"--cache={cfg.cache} leaves {numbers} numbers; the least is {least}")
    if cfg.rope_dim is not None:
        most = min(n, numbers - 1) if rotary else 0
        if cfg.rope_dim % 2 or cfg.rope_dim > most:
            works = f"an even number from 0 to {most}" if rotary else "0 without rotary positions"
            raise UserError(f"--rope_dim={cfg.rope_dim} does not work: it must be {works}")
    exact, rope_dim = exact_numbers(config), cfg.rope_dim
    if numbers > exact and (rope_dim is None or not rotary):
        print0(f"{exact} numbers are exact: more are of no use")
        numbers = exact
    if rope_dim is None:
        rope_dim = min(n, numbers // 4 * 2 if numbers < exact else n) if rotary else 0
    if not rotary and numbers >= 2 * config.n_head * config.hs:
        raise UserError(f"--cache={cfg.cache}: MLA's cache must be smaller than MHA's {numbers}")
    spread, balance = cfg.ranks != "uniform", cfg.balance or 1.0
    return Plan(numbers, cfg.method, rope_dim, balance, spread, cfg.svd_method)


def exact_numbers(config: GPTConfig) -> int:
    """How many cached numbers are enough to lose nothing."""
    n = config.nkv * config.hs  # numbers of all keys, and of all values
    if config.rotary_dim:
        return n + min(config.n_embd, n)  # a rotary key for every key head beside the values
    return min(config.n_embd, 2 * n)


def search(cfg: ConvertConfig, source: Source, plan: Plan) -> weights.Converted:
    """Try what the settings leave open; the loss on training text decides."""
    axes: dict[str, list[Any]] = {}
    n, exact = source.config.nkv * source.config.hs, exact_numbers(source.config)
    if source.config.rotary_dim and cfg.rope_dim is None and plan.numbers < exact:
        axes["rope_dim"] = [r for i in range(1, 7) if 0 < (r := plan.numbers * i // 16 * 2) <= n]
    if cfg.method in ("input", "output") and cfg.balance is None:
        axes["balance"] = [0.3, 1.0, 3.0]
    if cfg.ranks == "auto":
        axes["spread"] = [True, False]
    return weights.choose(source.model, source.calibration, plan, axes, source.choice_loss)


# ---- what a conversion leaves on the disk
def make_record(source: Source, made: weights.Converted, asked: dict[str, Any]) -> Conversion:
    """The record of what was made, and its measurements."""
    config = source.config
    kind = "MHA" if config.nkv == config.n_head else f"GQA with {config.nkv} key/value heads"
    converted = source.validation_loss(made.model, "measuring the result")
    return Conversion(
        source=source.stored.source,
        attention=f"{kind}, {'rotary' if config.rotary_dim else 'learned'} positions",
        plan=dataclasses.asdict(made.plan),
        data=source.cfg.data,
        calibration_tokens=source.calibration.tokens,
        layers=[layer._asdict() for layer in made.layers],
        loss={"source": source.loss, "converted": converted},
        cached_numbers=[source.numbers, costs.cached_numbers(made.model)],
        bytes_per_token=[source.bytes_per_token, made.model.make_cache(1, 1).bytes_per_token],
        asked=asked,
    )


def write_run(
    folder: Path, source: Source, model: GPT, record: Conversion, heal: dict[str, Any]
) -> None:
    """Write the folder of a run before its first iteration, whole or not at all."""
    state = Checkpoint(
        model=model.cpu().state_dict(),
        model_args=dataclasses.asdict(model.config),
        # train.py measures it on windows of its own
        best_val_loss=math.inf if heal else record.loss["converted"],
        config={"dataset": source.cfg.data},
        tokenizer=source.tokenizer,
    )
    for leftover in folder.parent.glob(f".{glob.escape(folder.name)}.new-*"):  # of a killed run
        shutil.rmtree(leftover, ignore_errors=True)
    tmp = folder.with_name(f".{folder.name}.new-{os.getpid()}")
    try:
        tmp.mkdir(parents=True)
        checkpoint.save(tmp, state, best=True)
        write_texts(tmp, record_texts(record, heal))
        tmp.rename(folder)  # an empty folder of that name is replaced
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror})") from None
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def heal_settings(cfg: ConvertConfig, source: Source) -> dict[str, Any]:
    """
    The settings of the healing run. Raises UserError if train.py would refuse the source's.
    """
    T, has = source.block_size, source.stored.config
    recipe = {"batch_size": max(1, 8192 // T), "gradient_accumulation_steps": 1}
    recipe |= {"learning_rate": 2e-4}  # where the source's is not known
    recipe |= {name: has[name] for name in RECIPE if has.get(name) is not None}
    try:
        valid = TrainConfig(**recipe)
        recipe = {name: getattr(valid, name) for name in recipe}
    except (TypeError, ValueError) as error:
        raise UserError(f"{source.stored.source}: its run's settings: {error}") from None
    highest = recipe["learning_rate"]
    scale = cfg.heal_lr / highest if cfg.heal_lr and highest else 0.5
    if "muon_learning_rate" in recipe:
        recipe["muon_learning_rate"] *= scale
    windows = (len(source.data.splits["val"]) - 1) // T
    return recipe | {
        "learning_rate": cfg.heal_lr or highest * scale,
        "out_dir": cfg.to,
        "init_from": "resume",
        "dataset": cfg.data,
        "block_size": source.config.block_size,
        "dropout": source.config.dropout,
        "distill": cfg.init_from if cfg.distill else None,
        "max_iters": cfg.heal_iters,
        "warmup_iters": cfg.heal_iters // 20,
        "eval_interval": max(cfg.heal_iters // 4, 1),
        "eval_iters": min(max(windows // recipe["batch_size"], 1), 200),
        "log_interval": max(cfg.heal_iters // 20, 1),
        "seed": cfg.seed,
        "device": cfg.device,
    }


def record_texts(record: Conversion, heal: dict[str, Any]) -> dict[str, str]:
    """The files of a record, by name, and train.py's config for its healing, if there is any."""
    texts = {RECORD: formats.as_json(dataclasses.asdict(record))}
    texts[REPORT] = report_text(record) + "\n"
    if heal:
        command = f"python train.py {heal['out_dir']}/{HEAL}"
        lines = [f"# Goes on with the healing of a conversion: {command}"]
        lines += [f"{name} = {value!r}" for name, value in heal.items()]
        texts[HEAL] = "\n".join(lines) + "\n"
    return texts


def write_texts(folder: Path, texts: dict[str, str]) -> None:
    """Write files, each whole or not at all. Raises UserError if that is impossible."""
    for name, text in texts.items():
        tmp = folder / f".{name}.tmp"
        try:
            tmp.write_text(text, encoding="utf-8")
            os.replace(tmp, folder / name)
        except OSError as error:
            raise UserError(f"{folder / name} cannot be written ({error.strerror})") from None


def report_text(record: Conversion) -> str:
    """The report as Markdown."""
    plan, loss = record.plan, record.loss
    names = {"source": "source", "converted": "converted, no training"}
    names["healed"] = f"after {record.asked['heal_iters']} iterations of healing"
    rows = []
    for name, what in names.items():
        if name in loss:
            at = int(name != "source")
            rows.append({
                "": what,
                "cached numbers per token and layer": f"{record.cached_numbers[at]:g}",
                "cache bytes per token": f"{record.bytes_per_token[at]:,}",
                "validation loss": f"{loss[name]:.4f}",
                "change": f"{loss[name] - loss['source']:+.4f}" if at else "",
            })  # fmt: skip
    layers = [
        {
            "layer": str(i),
            "latent": str(layer["latent"]),
            "kept": f"{layer['kept']:.2%}",
            "predicted change of the loss": f"{layer['predicted']:+.5f}",
        }
        for i, layer in enumerate(record.layers)
    ]
    predicted = sum(layer["predicted"] for layer in record.layers)
    measured = loss["converted"] - loss["source"]
    smaller = record.cached_numbers[0] / record.cached_numbers[1]
    how = [f"method {plan['method']}", "ranks by layer" if plan["spread"] else "one rank"]
    how += [f"{plan['rope_dim']} rotary numbers in all layers"] * bool(plan["rope_dim"])
    how += [f"values weighted by {plan['balance']:g}"] * (plan["balance"] != 1.0)
    return "\n".join([
        f"# {record.source} with a latent cache",
        "",
        f"From {record.attention}; the cache is {smaller:.3g}x smaller.",
        f"Calibrated on {record.calibration_tokens:,} tokens of {record.data}: {', '.join(how)}.",
        "",
        *markdown(rows),
        "",
        *markdown(layers),
        "",
        f"Change of the loss, all layers: measured {measured:+.4f}, predicted {predicted:+.4f}.",
        "(The prediction is of second order, layer by layer: too low for changes above some 0.01.)",
    ])  # fmt: skip


# ---- all methods at several sizes
def run_sweep(cfg: ConvertConfig, sizes: list[str] | None) -> None:
    """
    Convert once for every size and method; what is there already is not done again.

    sizes: as for --cache; None: those of SWEEP_SIZES that the source can have.
    """
    source, folder = Source(cfg), Path(cfg.to)
    if any((folder / name).exists() for name in (checkpoint.LATEST, checkpoint.BEST, RECORD)):
        raise UserError(f"--to={cfg.to} holds a run; name another folder for the sweep")
    points = []
    for size in sizes or SWEEP_SIZES:
        for method in weights.METHODS:
            to = str(folder / f"{size}-{method}")
            balance = cfg.balance if method in ("input", "output") else None
            changes = {"cache": size, "method": method, "balance": balance, "to": to}
            point = dataclasses.replace(cfg, **changes, sweep=False)
            try:
                asked_plan(point, source)  # before anything is done
            except UserError:
                if sizes or size == SWEEP_SIZES[0]:
                    raise
                continue
            points.append(point)
    records = []
    for i, point in enumerate(points):
        print0(f"--- {i + 1} of {len(points)}: --cache={point.cache} --method={point.method}")
        records.append(convert(point, source))
    note, longer = f"Change of the validation loss of {cfg.init_from}, {source.loss:.4f}", None
    if cfg.heal_iters:
        longer = train_on(cfg, source) - source.loss
        note += f"; in brackets after {cfg.heal_iters} iterations of healing"
        note += " with distillation" * cfg.distill
        note += f". The source itself, trained on as long: {longer:+.4f}"
    text = "\n".join([f"{note}.", "", *markdown(sweep_rows(records))])
    write_texts(folder, {"sweep.md": text + "\n"})
    print0("", *text.splitlines(), "")
    draw_sweep(records, longer, folder / "sweep.png")


def train_on(cfg: ConvertConfig, source: Source) -> float:
    """The source's validation loss after the training that healing is, for comparison."""
    folder = Path(cfg.to) / "source"
    done = (folder / checkpoint.LATEST).exists()
    if not done or checkpoint.load(folder / checkpoint.LATEST).iter_num < cfg.heal_iters:
        settings = heal_settings(cfg, source) | {"out_dir": str(folder), "distill": None}
        settings |= {} if done else {"init_from": cfg.init_from}
        train.main([f"--{name}={value}" for name, value in settings.items()])
    model, _ = checkpoint.build(formats.open_weights(folder, prefer_best=True))
    return source.validation_loss(model.eval(), "measuring the source, trained on")


def sweep_rows(records: list[Conversion]) -> list[dict[str, str]]:
    """A row for every size, a column for every method."""
    rows: dict[float, dict[str, str]] = {}
    for record in records:
        (before, after), loss = record.cached_numbers, record.loss
        row = rows.setdefault(after, {"cached numbers": f"{after:g}"})
        row["smaller"] = f"{before / after:.3g}x"
        changes = [f"{loss[k] - loss['source']:+.4f}" for k in ("converted", "healed") if k in loss]
        method = record.plan["method"]
        row[method] = " ".join([changes[0], *(f"({change})" for change in changes[1:])])
    return list(rows.values())


def draw_sweep(records: list[Conversion], longer: float | None, path: Path) -> None:
    """
    The change of the loss over the cache's size, a line for every method; dashed: after healing.
    longer: that of the source, trained on as long.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"warning: no {path.name}: it needs matplotlib", file=sys.stderr)
        return
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot(
        xlabel="cached numbers per token and layer", ylabel="change of the validation loss (nats)"
    )
    axes.set_xscale("log", base=2)
    axes.set_yscale("symlog", linthresh=0.01)
    axes.axhline(0, color="black", lw=0.8)
    if longer is not None:
        axes.axhline(longer, color="black", lw=0.8, ls=":", label="source, trained on")
    styles = zip(weights.METHODS, "^sDo", ("#999999", "#E69F00", "#56B4E9", "#0072B2"), strict=True)
    for method, marker, color in styles:
        mine = [r for r in records if r.plan["method"] == method]
        for key, line in (("converted", "-"), ("healed", "--")):
            there = [r for r in mine if key in r.loss]
            sizes = [r.cached_numbers[1] for r in there]
            changes = [r.loss[key] - r.loss["source"] for r in there]
            label = method if key == "converted" else f"{method}, healed"
            if there:
                axes.plot(sizes, changes, line, marker=marker, color=color, label=label)
    sizes = sorted({r.cached_numbers[1] for r in records})
    axes.set_xticks(sizes, [f"{size:g}" for size in sizes], minor=False)
    axes.legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    run_script(main)
