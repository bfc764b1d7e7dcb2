"""
Write a trained model as a folder of safetensors, in a format that other engines load if one fits.

    python -m tools.export --out_dir=out-mla --to=exported
    python -m tools.export --out_dir=out-llama-style --to=exported --format=llama
    python sample.py --init_from=exported

The formats are those of nanomla/formats.py: GPT-2, Llama and DeepSeek-V3, which transformers loads,
and our own ("model_type": "nanomla"), which has every setting. Any such folder can be given to
--init_from. docs/export.md has the details.
"""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from model import GPT
from nanomla import checkpoint, formats
from nanomla.checkpoint import Checkpoint
from nanomla.checks import check
from nanomla.conversion import read_conversion
from nanomla.costs import cached_numbers
from nanomla.errors import UsageError, UserError, run_script, say
from nanomla.settings import configure, declared, flat
from nanomla.tokenizer import end_of_text, start_of_text
from train import TrainConfig


@dataclass
class ExportConfig:
    """What to read and where to write."""

    headings: ClassVar[dict[str, str]] = {"out_dir": "export"}

    out_dir: Annotated[
        str,
        "The folder of a run, whose best.pt is read, or its ckpt.pt without a best.pt; or a folder "
        "of weights.",
    ] = "out"
    ckpt: Annotated[str | None, "A checkpoint file that is read instead of out_dir."] = None
    dataset: Annotated[
        str | None,
        "The dataset that has the alphabet of a checkpoint of nanoGPT: a name below data/, a "
        "folder or a file.",
    ] = None
    to: Annotated[
        str | None, "The folder to write: a new one, an empty one, or an earlier export."
    ] = None
    format: Annotated[
        Literal["auto", "gpt2", "llama", "deepseek_v3", "nanomla"],
        "The format to write. auto takes the first that the model fits.",
    ] = "auto"

    def __post_init__(self) -> None:
        check(self)


def main(argv: list[str] | None = None) -> None:
    """Export one checkpoint."""
    argv = sys.argv[1:] if argv is None else argv
    cfg, _ = configure(ExportConfig, argv)
    if not cfg.to:
        raise UsageError("say where the export shall go: --to=FOLDER")
    target = Path(cfg.to)
    formats.check_target(target)
    stored = formats.open_weights(cfg.ckpt or cfg.out_dir, prefer_best=True)
    model, _ = checkpoint.build(stored)
    kind, why = formats.fitting_format(model.config)
    if cfg.format not in ("auto", kind):
        kind = cfg.format
        if settings := formats.in_the_way(model.config, kind):
            problem = f"{kind} has no {', '.join(settings)}"
            raise UserError(f"--format={kind} does not fit {stored.source}: {problem}")
        why = "as asked"
    settings, tensors = formats.FORMATS[kind].write(model)
    spec, texts = _tokenizer(stored, kind, cfg.dataset)
    if kind != "nanomla":
        settings |= {"bos_token_id": start_of_text(spec), "eos_token_id": end_of_text(spec)}
    texts[formats.CONFIG] = formats.as_json(settings)
    texts[formats.CARD] = model_card(model, stored, kind, why, argv)
    formats.write_folder(target, tensors, texts)
    size = sum(tensor.nbytes for tensor in tensors.values())
    say(f"{stored.source} as {kind}: {why}")
    say(f"{size / 1e6:,.1f} MB in {target}")


def _tokenizer(
    stored: Checkpoint, kind: str, dataset: str | None
) -> tuple[dict | None, dict[str, str]]:
    """A checkpoint's tokenizer and its files by name; a warning says what cannot be written."""
    try:
        spec = checkpoint.tokenizer_spec(stored, dataset)
    except UserError as error:
        if stored.tokenizer is not None or dataset is not None:
            raise
        say(f"warning: exported without a tokenizer: {error}", sys.stderr)
        return None, {}
    try:
        texts = formats.tokenizer_files(spec)
    except UserError as error:
        file = f"{formats.HF_TOKENIZER}, for transformers"
        say(f"warning: exported without {file}: {error}", sys.stderr)
        texts = {}
    if kind == "nanomla" or spec.get("kind") != "hf" or not texts:  # else the other files have it
        texts[checkpoint.TOKENIZER] = formats.as_json(spec)
    return spec, texts


def model_card(model: GPT, stored: Checkpoint, kind: str, why: str, argv: list[str]) -> str:
    """The text of an export's README.md: metadata, what the model is, where it comes from."""
    config, foreign = model.config, kind != "nanomla"
    best, cache, numbers = stored.best_val_loss, model.make_cache(1, 1), cached_numbers(model)
    fewer = f"{model.get_memory_savings(1):.3g}x fewer than MHA of this width" if numbers else ""
    rows = {
        "format": f"{kind}: {why}",
        "parameters": f"{model.get_num_params(non_embedding=False):,}",
        "cache": f"{numbers:,g} numbers per token and layer, {fewer}"
        if numbers
        else f"a state of {cache.nbytes:,} bytes, whatever the context",
        "context": f"{config.block_size:,} tokens",
        "vocabulary": f"{config.vocab_size:,} ids",
        **conversion_row(stored),
        "data": stored.config.get("dataset"),
        "iterations": f"{stored.iter_num:,}" if stored.iter_num else None,
        "best validation loss": f"{best:.4f} nats per token" if best < float("inf") else None,
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items() if value)
    made = [f"    python -m tools.export {shlex.join(argv)}"]
    if command := training_command(stored):
        made.insert(0, f"    {command}")
    settings = "\n".join(f"    {name} = {value!r}" for name, value in vars(config).items())
    use = ["    python sample.py --init_from=FOLDER"]
    if foreign:
        use += ["    transformers.AutoModelForCausalLM.from_pretrained(FOLDER)"]
    return "\n".join([
        "---",
        f"library_name: {'transformers' if foreign else 'nanomla'}",
        "pipeline_tag: text-generation",
        "tags:",
        *(f"- {tag}" for tag in dict.fromkeys(("nanomla", kind, config.attention_name))),
        "---",
        "",
        "# A GPT exported by nanoMLA",
        "",
        "| | |",
        "|---|---|",
        table,
        "",
        "## Made with",
        "",
        *made,
        "",
        "## Open it",
        "",
        *use,
        "",
        "## Settings",
        "",
        settings,
        "",
    ])  # fmt: skip


def conversion_row(stored: Checkpoint) -> dict[str, str]:
    """The model card's row on the conversion that made these weights; none if nothing did."""
    path = Path(stored.source)
    record = read_conversion(path.parent) if path.is_file() else None
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
    known, defaults = declared(TrainConfig), flat(TrainConfig())
    given = {
        name: value
        for name, value in stored.config.items()
        if name in known and value != defaults[name] and not name.startswith("wandb_")
    }
    if given.get("init_from") == "resume":
        del given["init_from"]
    if not given:
        return None
    return shlex.join(["python", "train.py", *(f"--{k}={v}" for k, v in given.items())])


if __name__ == "__main__":
    run_script(main)
