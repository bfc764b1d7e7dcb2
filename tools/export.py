"""
Write a trained model as a folder of safetensors, in a format that other engines load if one fits.

    python -m tools.export --out_dir=out-mla --to=exported
    python -m tools.export --out_dir=out-llama-style --to=exported --format=llama
    python sample.py --init_from=exported

The formats are those of nanomla/formats: GPT-2, Llama and DeepSeek-V3, which transformers loads,
and our own ("model_type": "nanomla"), which has every setting. Any such folder can be given to
--init_from. docs/export.md has the details.
"""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from model import GPTConfig
from nanomla import checkpoint, formats
from nanomla.checkpoint import Checkpoint
from nanomla.checks import Text, check, fits
from nanomla.conversion import read_conversion
from nanomla.errors import UsageError, UserError, run_script, say
from nanomla.formats import folder
from nanomla.settings import configure, declared, flat
from nanomla.tokenizer import end_of_text, ends_of_text, start_of_text
from train import TrainConfig


@dataclass
class ExportConfig:
    """What to read and where to write."""

    headings: ClassVar[dict[str, str]] = {"out_dir": "export"}

    out_dir: Annotated[
        Text,
        "The folder of a run, whose best.pt is read, or its ckpt.pt without a best.pt; or a folder "
        "of weights.",
    ] = "out"
    ckpt: Annotated[Text | None, "A checkpoint file that is read instead of out_dir."] = None
    dataset: Annotated[
        Text | None,
        "The dataset that has the alphabet of a checkpoint of nanoGPT: a name below data/, a "
        "folder or a file.",
    ] = None
    to: Annotated[
        Text | None, "The folder to write: a new one, an empty one, or an earlier export."
    ] = None
    format: Annotated[
        Literal["auto", "gpt2", "llama", "deepseek_v3", "nanomla"],
        "The format to write. auto takes the first that the model fits.",
    ] = "auto"

    def __post_init__(self) -> None:
        check(self)


def main(argv: list[str] | None = None) -> None:
    """Export one checkpoint."""
    if argv is None:
        argv = sys.argv[1:]
    cfg, _ = configure(ExportConfig, argv)
    if not cfg.to:
        raise UsageError("say where the export shall go: --to=FOLDER")
    target = Path(cfg.to)
    folder.check_target(target)
    stored = formats.open_weights(cfg.ckpt or cfg.out_dir, prefer_best=True)
    model, _ = checkpoint.build(stored)
    kind, why = _choose(model.config, cfg.format, stored.source)
    settings, tensors = formats.write(model, kind)
    spec = _tokenizer(stored, cfg.dataset)
    texts = {}
    if spec is not None:
        texts = _tokenizer_texts(spec, kind)
    if kind != "nanomla":
        settings["bos_token_id"] = start_of_text(spec)
        settings["eos_token_id"] = end_of_text(spec)
        if len(ends_of_text(spec)) > 1:
            settings["eos_token_id"] = list(ends_of_text(spec))
    commands = [f"python -m tools.export {shlex.join(argv)}"]
    training = training_command(stored)
    if training:
        commands.insert(0, training)
    texts[folder.CONFIG] = folder.as_json(settings)
    texts[folder.CARD] = folder.model_card(
        model, stored, kind, why, conversion_rows(stored), commands
    )
    folder.write_folder(target, tensors, texts)
    size = sum(tensor.nbytes for tensor in tensors.values())
    say(f"{stored.source} as {kind}: {why}")
    say(f"{size / 1e6:,.1f} MB in {target}")


def _choose(config: GPTConfig, asked: str, source: str) -> tuple[str, str]:
    """The format and the reason for it. Raises UserError if the one asked for does not fit."""
    kind, why = formats.fitting_format(config)
    if asked in ("auto", kind):
        return kind, why
    settings = formats.in_the_way(config, asked)
    if settings:
        problem = f"{asked} has no {', '.join(settings)}"
        raise UserError(f"--format={asked} does not fit {source}: {problem}")
    return asked, "as asked"


def _tokenizer(stored: Checkpoint, dataset: str | None) -> dict[str, Any] | None:
    """The spec of a checkpoint's tokenizer; without one, a warning and None."""
    try:
        return checkpoint.tokenizer_spec(stored, dataset)
    except UserError as error:
        if stored.tokenizer is not None or dataset is not None:
            raise
        say(f"warning: exported without a tokenizer: {error}", sys.stderr)
        return None


def _tokenizer_texts(spec: dict[str, Any], kind: str) -> dict[str, str]:
    """A tokenizer's files by name; a warning says what cannot be written."""
    try:
        texts = folder.tokenizer_files(spec)
    except UserError as error:
        file = f"{folder.HF_TOKENIZER}, for transformers"
        say(f"warning: exported without {file}: {error}", sys.stderr)
        texts = {}
    if kind == "nanomla" or spec["kind"] != "hf" or not texts:  # else the other files have it
        texts[checkpoint.TOKENIZER] = folder.as_json(spec)
    return texts


def conversion_rows(stored: Checkpoint) -> dict[str, str]:
    """The model card's rows on the conversion that made these weights; none if nothing did."""
    path = Path(stored.source)
    record = None
    if path.is_file():
        record = read_conversion(path.parent)
    if record is None:
        return {}
    text = f"{record.source}, with {record.attention}, by method {record.plan['method']}"
    text += f" on {record.calibration_tokens:,} tokens of {record.data}"
    losses = ", ".join(f"{name} {loss:.4f}" for name, loss in record.loss.items())
    return {"converted from": text, "validation loss of the conversion": losses}


def training_command(stored: Checkpoint) -> str | None:
    """
    The train.py command of the run that wrote a checkpoint; None for weights without a run.

    A resumed run's is that of a new run: --init_from=resume makes no model by itself.
    """
    known = declared(TrainConfig)
    defaults = flat(TrainConfig())
    flags = []
    for name, value in stored.config.items():
        if name not in known or name.startswith("wandb_") or not fits(value, known[name].type):
            continue
        if value == defaults[name]:
            continue
        if name != "init_from" or value != "resume":
            flags.append(f"--{name}={value}")
    if not flags:
        return None
    return shlex.join(["python", "train.py", *flags])


if __name__ == "__main__":
    run_script(main)
