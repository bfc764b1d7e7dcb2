"""
What a conversion of ordinary attention into MLA is: a source and the text that it is measured on,
plans that the loss decides between, and the record that is left. nanomla/convert.py has the
mathematics, tools/convert.py the command.
"""

import dataclasses
import errno
import functools
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor
from tqdm import tqdm

from model import GPT, GPTConfig
from nanomla import checkpoint, costs, formats
from nanomla.checkpoint import Checkpoint
from nanomla.checks import Count, Natural, Positive, check
from nanomla.convert import Calibration, LayerReport, Plan, calibrate, to_mla, without_svd
from nanomla.dataset import Dataset
from nanomla.distributed import resolve_device, resolve_dtype
from nanomla.errors import UserError
from nanomla.files import put_back, read_record, replacing, write_text
from nanomla.tokenizer import check_spec, same_ids

RECORD = checkpoint.CONVERSION[0]
CHOICE_TOKENS = 2**14  # of training text, on which plans are compared
CHOICE_FIRST = 10**6  # the iteration whose windows these are; calibration begins at 0
LATER = ("heal_iters", "heal_lr", "distill")  # may be asked for when the conversion is done
bar = functools.partial(tqdm, unit="batch", leave=False, disable=None)  # on a terminal's stderr


# ---- The source
class Source:
    """
    The model to convert and the text to do it with. Raises UserError if they do not fit.

    cfg: settings with init_from, data, block_size (None: the model's context), calibration_tokens,
    eval_tokens, seed and device.
    """

    def __init__(self, cfg: Any) -> None:
        self.cfg = cfg
        self.device = resolve_device(cfg.device).replace("mps", "cpu")  # which has no float64
        self.stored = formats.open_weights(cfg.init_from, prefer_best=True)
        model, _ = checkpoint.build(self.stored)
        if model.config.attention_name != "mha":
            words = f"{model.transformer.h[0].attn.words}; only MHA and GQA can be converted"
            raise UserError(f"{self.stored.source} has {words}")
        for name in ("attn_gate", "qk_norm", "n_predict"):
            value = getattr(model.config, name)
            if value:
                raise UserError(f"{self.stored.source} has {name}={value}: it cannot be converted")
        self.cached_numbers = costs.cached_numbers(model)
        self.bytes_per_token = model.make_cache(1, 1).bytes_per_token
        self.model = without_svd(model).to(self.device).eval()
        self.config = self.model.config
        kind = self.device.partition(":")[0]
        bfloat16 = resolve_dtype("auto", kind, self.config.n_embd) == "bfloat16"
        self.autocast = functools.partial(torch.autocast, kind, torch.bfloat16, bfloat16)
        self.block_size = cfg.block_size or self.config.block_size
        if self.block_size > self.config.block_size:
            longest = f"the longest context of {cfg.init_from} is {self.config.block_size}"
            raise UserError(f"--block_size={cfg.block_size} does not work: {longest}")
        self.data = Dataset(cfg.data, self.block_size)
        self.data.model_vocab_size = self.config.vocab_size
        self.tokenizer = self._tokenizer()
        windows = 5 * 10**7 // (self.config.vocab_size * self.block_size)  # with logits of 200 MB
        self.batch_size = max(1, min(64, windows))

    def _tokenizer(self) -> dict[str, Any] | None:
        """The tokenizer's spec, the source's or else the dataset's."""
        name = self.cfg.init_from
        ids = self.data.vocab_size
        try:
            spec = checkpoint.tokenizer_spec(self.stored)
        except UserError:  # nothing says what its ids mean
            spec = None
        if spec and self.data.tokenizer and not same_ids(spec, self.data.tokenizer):
            problem = f"dataset {self.cfg.data} was prepared with another tokenizer than {name}'s"
            raise UserError(f"{problem}: its token ids mean other text")
        if ids and ids > self.config.vocab_size:
            sizes = f"ids up to {ids - 1}, {name} only vocab_size={self.config.vocab_size}"
            raise UserError(f"dataset {self.cfg.data} has {sizes}: they do not belong together")
        if spec is None and self.data.tokenizer is not None:
            spec = self.data.tokenizer
            check_spec(spec, str(self.data.folder), self.config.vocab_size)
        return spec

    def text(self, tokens: int, first: int) -> list[tuple[Tensor, Tensor]]:
        """Inputs and targets (B, T) of training text; first: the iteration that has the windows."""
        windows = max(round(tokens / self.block_size), 1)
        batches = []
        while windows > 0:
            sequences = range(min(self.batch_size, windows))
            batches.append(self.data.batch(self.cfg.seed, first + len(batches), sequences))
            windows -= len(sequences)
        return batches

    @functools.cached_property
    def calibration(self) -> Calibration:
        """What the source's attention does on training text."""
        text = self.text(self.cfg.calibration_tokens, first=0)
        inputs = (x.to(self.device) for x, _ in bar(text, desc="calibrating"))
        with self.autocast():
            calibration = calibrate(self.model, inputs)
        if not (calibration.inputs.isfinite().all() and calibration.gradients.isfinite().all()):
            raise UserError(f"{self.stored.source} computes values that are not finite")
        return calibration

    @functools.cached_property
    def loss(self) -> float:
        """The source's validation loss."""
        return self.validation_loss(self.model, "measuring the source")

    def validation_loss(self, model: GPT, title: str) -> float:
        """Nats per token over the validation split, or eval_tokens spread evenly over it."""
        batches = self.data.spread("val", self.cfg.eval_tokens, self.batch_size)
        return sum(self._losses(model, bar(batches, desc=title))) / len(batches)

    def choice_loss(self, model: GPT) -> float:
        """The loss by which plans are compared, on training text that is drawn separately."""
        batches = self.text(CHOICE_TOKENS, CHOICE_FIRST)
        windows = [len(x) for x, _ in batches]
        losses = self._losses(model, batches)
        total = sum(loss * n for loss, n in zip(losses, windows, strict=True))
        return total / sum(windows)

    @torch.no_grad()
    def _losses(
        self, model: GPT, batches: Iterable[tuple[Tensor, Tensor]]
    ) -> list[float]:
        """The loss of every batch, inputs and targets (B, T)."""
        model.to(self.device)
        losses = []
        for x, y in batches:
            with self.autocast():
                losses.append(model(x.to(self.device), y.to(self.device))[1].item())
        return losses


# ---- The choice of a plan
class Converted(NamedTuple):
    """A conversion that was chosen."""

    plan: Plan
    model: GPT
    layers: list[LayerReport]


def exact_numbers(config: GPTConfig) -> int:
    """How many cached numbers are enough to lose nothing."""
    n = config.nkv * config.hs  # numbers of all keys, and of all values
    if config.rotary_dim:
        return n + min(config.n_embd, n)  # a rotary key for every key head beside the values
    return min(config.n_embd, 2 * n)


def values_to_try(name: str, plan: Plan, config: GPTConfig) -> list[Any]:
    """What a field of Plan may be if it is left open; [] if only one value makes sense."""
    if name == "spread":
        return [True, False]
    if name == "balance" and plan.method in ("input", "output"):
        return [0.3, 1.0, 3.0]
    if name == "rope_dim" and config.rotary_dim and plan.numbers < exact_numbers(config):
        sixteenths = [plan.numbers * i // 16 * 2 for i in range(1, 7)]
        return [r for r in sixteenths if 0 < r <= config.nkv * config.hs]
    return []


def choose(
    model: GPT,
    calibration: Calibration,
    plan: Plan,
    choices: dict[str, list[Any]],
    loss_of: Callable[[GPT], float],
) -> Converted:
    """
    The best of several plans by the loss of their models.

    choices: for fields of Plan the values to try. One field after the other gets its best value.
    """
    best = Converted(plan, *to_mla(model, calibration, plan))
    if not any(choices.values()):
        return best
    losses = {plan: loss_of(best.model)}
    for name, values in choices.items():
        for value in values:
            candidate = dataclasses.replace(best.plan, **{name: value})
            if candidate in losses:
                continue
            other = Converted(candidate, *to_mla(model, calibration, candidate))
            losses[candidate] = loss_of(other.model)
            if losses[candidate] < losses[best.plan]:
                best = other
    return best


# ---- What a conversion leaves on the disk
@dataclass
class Conversion:
    """The record of a conversion, which is written beside the checkpoint that it made."""

    source: str  # the file or name that was converted
    attention: str  # what it had, in words
    plan: dict[str, Any]  # nanomla.convert.Plan
    data: str  # the dataset's name
    calibration_tokens: Natural  # tokens of it that were read
    layers: list[dict[str, int | float]]  # nanomla.convert.LayerReport of each
    loss: dict[str, float]  # of source, converted and, if it was, healed; nats per token
    # per token and layer, of the source and of the result
    cached_numbers: Annotated[list[Positive], Field(min_length=2, max_length=2)]
    bytes_per_token: Annotated[list[Count], Field(min_length=2, max_length=2)]  # of their caches
    asked: dict[str, Any]  # the settings of the command

    def __post_init__(self) -> None:
        check(self)

    def change(self, name: str) -> float:
        """How much the loss of what was "converted" or "healed" is above the source's."""
        return self.loss[name] - self.loss["source"]


def read_conversion(folder: str | Path) -> Conversion | None:
    """The record in a run's folder, if there is one. Raises UserError if it cannot be read."""
    path = Path(folder) / RECORD
    if not path.exists():
        return None
    return read_record(path, Conversion)


def make_record(source: Source, made: Converted, asked: dict[str, Any]) -> Conversion:
    """The record of what was made, and its measurements."""
    config = source.config
    heads = "MHA"
    if config.nkv < config.n_head:
        heads = f"GQA with {config.nkv} key/value heads"
    positions = "rotary" if config.rotary_dim else "learned"
    converted = source.validation_loss(made.model, "measuring the result")
    bytes_per_token = made.model.make_cache(1, 1).bytes_per_token
    return Conversion(
        source=source.stored.source,
        attention=f"{heads}, {positions} positions",
        plan=dataclasses.asdict(made.plan),
        data=source.cfg.data,
        calibration_tokens=source.calibration.tokens,
        layers=[layer._asdict() for layer in made.layers],
        loss={"source": source.loss, "converted": converted},
        cached_numbers=[source.cached_numbers, costs.cached_numbers(made.model)],
        bytes_per_token=[source.bytes_per_token, bytes_per_token],
        asked=asked,
    )


def earlier_conversion(to: str, asked: dict[str, Any]) -> Conversion | None:
    """
    The record of the same conversion in the folder of --to; None if that is empty or new.

    Raises UserError if the folder cannot be written or holds anything else.
    """
    folder = Path(to).resolve()
    put_back(folder)  # a conversion that was killed
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"--to={to} cannot be written: {existing} is a file or read-only")
    if existing != folder or not any(folder.iterdir()):
        return None
    record = read_conversion(folder)
    if record is None:
        raise UserError(f"--to={to} holds other files; name a new or an empty folder")
    differing = []
    for name, value in asked.items():
        may_follow = name in LATER and not record.asked["heal_iters"]
        if value != record.asked.get(name, value) and not may_follow:
            differing.append(f"{name}={record.asked[name]!r}")
    if differing:
        remedy = "give the same settings, or name a new folder"
        raise UserError(f"--to={to} holds a conversion with {', '.join(differing)}; {remedy}")
    return record


def write_run(
    folder: Path, source: Source, model: GPT, best_val_loss: float, texts: dict[str, str]
) -> None:
    """
    Write the folder of a run before its first iteration, with these texts beside its checkpoints,
    whole or not at all. Raises OSError, or UserError if the checkpoint cannot be written.
    """
    state = Checkpoint(
        model=model.cpu().state_dict(),
        model_args=dataclasses.asdict(model.config),
        best_val_loss=best_val_loss,
        config={"dataset": source.cfg.data},
        tokenizer=source.tokenizer,
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    put_back(folder)
    if folder.is_dir() and any(folder.iterdir()):  # by now
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(folder))
    with replacing(folder) as unfinished:
        unfinished.mkdir()
        checkpoint.save(unfinished, state, best=True)
        write_texts(unfinished, texts)
        if unfinished.parent != folder and folder.exists():  # by now
            folder.rmdir()  # an OSError if anything is in it


def write_texts(folder: Path, texts: dict[str, str]) -> None:
    """Write files by name, each whole or not at all. Raises OSError."""
    for name, text in texts.items():
        write_text(folder / name, text)
