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
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

import train
from nanomla import checkpoint, conversion, formats
from nanomla.checks import Count, Natural, Positive, Text, check
from nanomla.conversion import Conversion, Source
from nanomla.convert import METHODS, Plan
from nanomla.distributed import print0
from nanomla.errors import UsageError, UserError, run_script
from nanomla.files import write_text
from nanomla.formats.folder import as_json
from nanomla.settings import configure
from nanomla.start import stored_settings
from tools.bench.timing import markdown
from tools.report import can_draw, new_axes, save, style

RECORD, REPORT, HEAL = checkpoint.CONVERSION
SWEEP_SIZES = ("2x", "4x", "8x", "16x", "32x")
# Settings of a run that healing takes over from the source's.
RECIPE = (
    "batch_size", "gradient_accumulation_steps", "optimizer", "weight_decay", "beta1", "beta2",
    "muon_weight_decay", "grad_clip", "learning_rate", "muon_learning_rate", "dtype",
)


@dataclass
class ConvertConfig:
    """What to convert, how, and where to."""

    headings: ClassVar[dict[str, str]] = {
        "init_from": "source", "to": "result", "heal_iters": "healing", "eval_tokens": "run",
    }

    init_from: Annotated[
        Text | None,
        "The weights to convert: the folder of a run, a checkpoint file, gpt2, gpt2-medium, "
        "gpt2-large, gpt2-xl, or a folder of safetensors.",
    ] = None
    data: Annotated[
        Text | None, "A dataset in the source's tokens: a folder below data/, or a path."
    ] = None
    block_size: Annotated[
        Annotated[int, Field(ge=2)] | None,
        "The number of tokens in a window of text. None stands for the model's context.",
    ] = None

    to: Annotated[
        Text | None,
        "The folder to write: a new one, an empty one, or that of a conversion to go on with.",
    ] = None
    cache: Annotated[
        str,
        "The size of the cache. 8x stands for 8 times fewer cached numbers than the source has, "
        "and 32 for 32 numbers per token and layer.",
    ] = "8x"
    method: Annotated[
        Literal[METHODS],  # type: ignore[valid-type]
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
    device: Annotated[Text, "The device to run on: auto, cpu, cuda, cuda:1, ..."] = "auto"

    def __post_init__(self) -> None:
        check(self)
        for name in ("distill", "heal_lr"):
            if getattr(self, name) and not self.heal_iters:
                raise ValueError(f"{name} without heal_iters has no effect; add --heal_iters=N")
        if self.balance and not self.sweep and self.method not in ("input", "output"):
            raise ValueError(f"balance has no effect on method={self.method}; leave it out")


def main(argv: list[str] | None = None) -> None:
    """The command line; see the top of this file."""
    if argv is None:
        argv = sys.argv[1:]
    cfg, origins = configure(ConvertConfig, argv)
    for name, meaning in (("init_from", "model"), ("data", "text"), ("to", "folder to write")):
        if getattr(cfg, name) is None:
            raise UsageError(f"say which {meaning}: --{name}=...; --help lists the settings")
    if not cfg.sweep:
        convert(cfg, Source(cfg))
        return
    if "method" in origins:
        raise UsageError("--sweep=True compares all methods; leave out --method")
    sizes = None
    if "cache" in origins:
        sizes = cfg.cache.split(",")
    run_sweep(cfg, sizes)


# ---- one conversion
def convert(cfg: ConvertConfig, source: Source) -> Conversion:
    """Convert, heal and report, or go on with that; returns the record in conversion.json."""
    asked = {k: v for k, v in vars(cfg).items() if k not in ("to", "device", "sweep")}
    record = conversion.earlier_conversion(cfg.to, asked)
    folder = Path(cfg.to).resolve()
    heal = {}
    if cfg.heal_iters:
        heal = heal_settings(cfg, source)  # may raise, before the work
    if record is None:
        made = search(cfg, source)
        record = conversion.make_record(source, made, asked)
        best_val_loss = record.loss["converted"]
        if heal:
            best_val_loss = math.inf  # train.py measures it on windows of its own
        texts = record_texts(record, heal)
        conversion.write_run(folder, source, made.model, best_val_loss, texts)
    elif record.asked != asked:  # healing is asked for now
        record.asked = asked
        conversion.write_texts(folder, record_texts(record, heal))
    if heal and "healed" not in record.loss:
        record.loss["healed"] = train_and_measure(heal, source, "measuring the result")
        conversion.write_texts(folder, record_texts(record, heal))
    print0("", *report_text(record).splitlines(), "", f"in {cfg.to}")
    return record


def search(cfg: ConvertConfig, source: Source) -> conversion.Converted:
    """Try what the settings leave open; the loss on training text decides."""
    plan = asked_plan(cfg, source)
    left_open = []
    if cfg.rope_dim is None:
        left_open.append("rope_dim")
    if cfg.balance is None:
        left_open.append("balance")
    if cfg.ranks == "auto":
        left_open.append("spread")
    choices = {name: conversion.values_to_try(name, plan, source.config) for name in left_open}
    return conversion.choose(source.model, source.calibration, plan, choices, source.choice_loss)


def asked_plan(cfg: ConvertConfig, source: Source) -> Plan:
    """The plan that --cache and the other settings ask for. Raises UserError if it cannot be."""
    config = source.config
    rotary = config.rotary_dim > 0
    numbers = asked_numbers(cfg, source)
    least = 3 if rotary else 1
    if numbers < least:
        raise UserError(f"--cache={cfg.cache} leaves {numbers} numbers; the least is {least}")
    exact = conversion.exact_numbers(config)
    if numbers > exact and (cfg.rope_dim is None or not rotary):
        print0(f"{exact} numbers are exact: more are of no use")
        numbers = exact
    most = 0
    if rotary:  # as many as keys have, and a latent is left
        most = min(config.nkv * config.hs, numbers - 1)
    rope_dim = cfg.rope_dim
    if rope_dim is None:
        rope_dim = most
        if numbers < exact:  # half of the numbers to begin with
            rope_dim = min(most, numbers // 4 * 2)
    if rope_dim % 2 or rope_dim > most:
        possible = f"an even number from 0 to {most}"
        raise UserError(f"--rope_dim={rope_dim} does not work: it must be {possible}")
    spread = cfg.ranks != "uniform"
    return Plan(numbers, cfg.method, rope_dim, cfg.balance or 1.0, spread, cfg.svd_method)


def asked_numbers(cfg: ConvertConfig, source: Source) -> int:
    """The cached numbers that --cache asks for. Raises UserError if the source has fewer."""
    match = re.fullmatch(r"([0-9]{1,9})|([0-9]{0,9}\.?[0-9]{1,9})x", cfg.cache)
    if not match or not float(match[1] or match[2]):
        raise UsageError(f"--cache={cfg.cache}: write 8x, or a number such as 32")
    if match[1]:
        numbers = int(match[1])
    else:
        numbers = math.floor(source.cached_numbers / float(match[2]))
    if numbers > source.cached_numbers:
        size = f"{cfg.init_from} caches {source.cached_numbers:g} numbers per token and layer"
        raise UserError(f"--cache={cfg.cache} asks for {numbers}, but {size}: that is no smaller")
    return numbers


def heal_settings(cfg: ConvertConfig, source: Source) -> dict[str, Any]:
    """The settings of the healing run."""
    if source.block_size < source.config.block_size:
        only = f"heal_iters needs the whole context, {source.config.block_size}; leave one out"
        raise UserError(f"--block_size={cfg.block_size} does not work: {only}")
    recipe = {
        "batch_size": max(1, 8192 // source.block_size),
        "gradient_accumulation_steps": 1,
        "learning_rate": 2e-4,  # where the source's is not known
    }
    stored = stored_settings(train.TrainConfig, source.stored)
    for name in RECIPE:
        if stored.get(name) is not None:
            recipe[name] = stored[name]
    highest = recipe["learning_rate"]
    scale = 0.5
    if cfg.heal_lr:
        scale = cfg.heal_lr / highest
    if "muon_learning_rate" in recipe:
        recipe["muon_learning_rate"] *= scale
    windows = (len(source.data.splits["val"]) - 1) // source.block_size
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


def train_and_measure(settings: dict[str, Any], source: Source, title: str) -> float:
    """Run train.py with these settings; returns the validation loss of its best weights."""
    train.main([f"--{name}={value}" for name, value in settings.items()])
    model, _ = checkpoint.build(formats.open_weights(settings["out_dir"], prefer_best=True))
    return source.validation_loss(model.eval(), title)


# ---- what is written and printed
def record_texts(record: Conversion, heal: dict[str, Any]) -> dict[str, str]:
    """The files of a record, by name, and train.py's config for its healing, if there is any."""
    texts = {REPORT: report_text(record) + "\n"}
    if heal:
        command = f"python train.py {heal['out_dir']}/{HEAL}"
        lines = [f"# Goes on with the healing of a conversion: {command}"]
        lines += [f"{name} = {value!r}" for name, value in heal.items()]
        texts[HEAL] = "\n".join(lines) + "\n"
    # last, as the same command goes on by what it says
    return texts | {RECORD: as_json(dataclasses.asdict(record))}


def report_text(record: Conversion) -> str:
    """The report as Markdown."""
    plan = record.plan
    smaller = record.cached_numbers[0] / record.cached_numbers[1]
    how = [f"method {plan['method']}"]
    how.append("ranks by layer" if plan["spread"] else "one rank")
    if plan["rope_dim"]:
        how.append(f"{plan['rope_dim']} rotary numbers in all layers")
    if plan["balance"] != 1.0:
        how.append(f"values weighted by {plan['balance']:g}")
    measured = record.change("converted")
    predicted = sum(layer["predicted"] for layer in record.layers)
    layers = []
    for i, layer in enumerate(record.layers):
        layers.append({
            "layer": i,
            "latent": layer["latent"],
            "kept": f"{layer['kept']:.2%}",
            "predicted change of the loss": f"{layer['predicted']:+.5f}",
        })
    return "\n".join([
        f"# {record.source} with a latent cache",
        "",
        f"From {record.attention}; the cache is {smaller:.3g}x smaller.",
        f"Calibrated on {record.calibration_tokens:,} tokens of {record.data}: {', '.join(how)}.",
        "",
        *markdown(loss_rows(record)),
        "",
        *markdown(layers),
        "",
        f"Change of the loss, all layers: measured {measured:+.4f}, predicted {predicted:+.4f}.",
        "(The prediction is of second order, layer by layer: too low for changes above some 0.01.)",
    ])


def loss_rows(record: Conversion) -> list[dict[str, str]]:
    """Sizes and losses of the source, the result and, if it was healed, what came of that."""
    titles = {
        "source": "source",
        "converted": "converted, no training",
        "healed": f"after {record.asked['heal_iters']} iterations of healing",
    }
    rows = []
    for name, title in titles.items():
        if name not in record.loss:
            continue
        model = 0 if name == "source" else 1
        row = {
            "": title,
            "cached numbers per token and layer": f"{record.cached_numbers[model]:g}",
            "cache bytes per token": f"{record.bytes_per_token[model]:,}",
            "validation loss": f"{record.loss[name]:.4f}",
            "change": "",
        }
        if name != "source":
            row["change"] = f"{record.change(name):+.4f}"
        rows.append(row)
    return rows


# ---- all methods at several sizes
def run_sweep(cfg: ConvertConfig, sizes: list[str] | None) -> None:
    """
    Convert once for every size and method; what is there already is not done again.

    sizes: as for --cache; None: those of SWEEP_SIZES that the source can have.
    """
    source = Source(cfg)
    folder = Path(cfg.to)
    points = sweep_points(cfg, source, sizes)
    records = []
    for i, point in enumerate(points):
        print0(f"--- {i + 1} of {len(points)}: --cache={point.cache} --method={point.method}")
        records.append(convert(point, source))
    note = f"Change of the validation loss of {cfg.init_from}, {source.loss:.4f}"
    longer = None
    if cfg.heal_iters:
        longer = train_on(cfg, source) - source.loss
        note += f"; in brackets after {cfg.heal_iters} iterations of healing"
        if cfg.distill:
            note += " with distillation"
        note += f". The source itself, trained on as long: {longer:+.4f}"
    text = "\n".join([f"{note}.", "", *markdown(sweep_rows(records))])
    write_text(folder / "sweep.md", text + "\n")
    print0("", *text.splitlines(), "")
    if can_draw():
        draw_sweep(records, longer, folder / "sweep.png")


def sweep_points(
    cfg: ConvertConfig, source: Source, sizes: list[str] | None
) -> list[ConvertConfig]:
    """The settings of a sweep's conversions. Raises UserError if a size that was named fails."""
    points = []
    for size in sizes or SWEEP_SIZES:
        for method in METHODS:
            balance = cfg.balance if method in ("input", "output") else None
            to = str(Path(cfg.to) / f"{size}-{method}")
            changes = {"cache": size, "method": method, "balance": balance, "to": to}
            point = dataclasses.replace(cfg, **changes, sweep=False)
            try:
                asked_plan(point, source)  # before anything is done
            except UserError:
                if sizes or size == SWEEP_SIZES[0]:
                    raise
                continue
            points.append(point)
    return points


def train_on(cfg: ConvertConfig, source: Source) -> float:
    """The source's validation loss after the training that healing is, for comparison."""
    folder = Path(cfg.to) / "source"
    settings = heal_settings(cfg, source) | {"out_dir": str(folder), "distill": None}
    if not (folder / checkpoint.LATEST).exists():
        settings["init_from"] = cfg.init_from
    return train_and_measure(settings, source, "measuring the source, trained on")


def sweep_rows(records: list[Conversion]) -> list[dict[str, str]]:
    """A row for every size, a column for every method."""
    rows: dict[float, dict[str, str]] = {}
    for record in records:
        before, after = record.cached_numbers
        row = rows.setdefault(after, {"cached numbers": f"{after:g}"})
        row["smaller"] = f"{before / after:.3g}x"
        cell = f"{record.change('converted'):+.4f}"
        if "healed" in record.loss:
            cell += f" ({record.change('healed'):+.4f})"
        row[record.plan["method"]] = cell
    return list(rows.values())


def draw_sweep(records: list[Conversion], longer: float | None, path: Path) -> None:
    """
    The change of the loss over the cache's size, a line for every method; dashed: after healing.
    longer: that of the source, trained on as long.
    """
    axes = new_axes("cached numbers per token and layer", "change of the validation loss (nats)")
    axes.set_xscale("log", base=2)
    axes.set_yscale("symlog", linthresh=0.01)
    axes.axhline(0, color="black", lw=0.8)
    if longer is not None:
        axes.axhline(longer, color="black", lw=0.8, ls=":", label="source, trained on")
    for i, method in enumerate(METHODS):
        for name, line in (("converted", "-"), ("healed", "--")):
            drawn = [r for r in records if r.plan["method"] == method and name in r.loss]
            if drawn:
                sizes = [r.cached_numbers[1] for r in drawn]
                changes = [r.change(name) for r in drawn]
                label = method if name == "converted" else f"{method}, healed"
                axes.plot(sizes, changes, line, label=label, **style(i))
    sizes = sorted({r.cached_numbers[1] for r in records})
    axes.set_xticks(sizes, [f"{size:g}" for size in sizes], minor=False)
    save(axes, path)


if __name__ == "__main__":
    run_script(main)
