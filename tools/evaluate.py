"""
The loss, perplexity and bits per byte of a whole text, every token predicted exactly once.

    python -m tools.evaluate --out_dir=out-mla
    python -m tools.evaluate --init_from=gpt2 --text=book.txt --stride=512
    python -m tools.evaluate --init_from=exported --dataset=mine --within_documents=True --json
    python -m tools.evaluate --out_dir=out-mla --text=book.txt --cached=True --cache_dtype=int8

The text is a file in UTF-8, or a split of a dataset. If the model's tokenizer has a token that
begins a text, that comes before the first one; otherwise the first token is not predicted.
"""

import dataclasses
import json
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from nanomla import evaluate
from nanomla.cache import dtype_name
from nanomla.checks import Count, Text
from nanomla.dataset import Dataset
from nanomla.errors import UsageError, UserError, run_script, say
from nanomla.evaluate import Passage
from nanomla.files import write_text
from nanomla.inference import ModelSettings, Opened, open_model
from nanomla.settings import configure
from nanomla.tokenizer import ends_of_text

# What decides a loss beside the model and the text.
SETTINGS = ("block_size", "stride", "within_documents", "cached", "cache_dtype", "dtype", "device")


@dataclass
class EvaluateConfig(ModelSettings):
    """Raises ValueError for a value that cannot work."""

    headings: ClassVar[dict[str, str]] = ModelSettings.headings | {
        "dataset": "text", "text": "text", "block_size": "windows", "json": "output",
    }

    dataset: Annotated[
        Text | None,
        "The dataset that is evaluated: a name below data/, or a folder. None stands for the one "
        "that the model was trained on. With text it only gives a checkpoint of nanoGPT its "
        "alphabet.",
    ] = None
    text: Annotated[
        Text | None, "A file in UTF-8 that is evaluated instead of a dataset."
    ] = None
    split: Annotated[
        Literal["train", "val"], "The split of the dataset that is evaluated."
    ] = "val"

    block_size: Annotated[
        Count | None,
        "The number of tokens that the model reads at once. None stands for its longest context.",
    ] = None
    stride: Annotated[
        Count | None,
        "The number of tokens between the beginnings of two windows. Every window but the first "
        "scores only its last so many tokens, and the others are their context. None stands for "
        "block_size: windows do not overlap.",
    ] = None
    within_documents: Annotated[
        bool,
        "Windows begin anew at every token that ends a document, so that no document sees the one "
        "before it.",
    ] = False
    cached: Annotated[
        bool, "Every window is read token by token through the cache, as in generation."
    ] = False

    json: Annotated[bool, "The result is printed as one JSON object."] = False
    per_token: Annotated[
        Text | None,
        "A file to which every token is written, a JSON object on each line, with its id, the text "
        "that it completes, and its loss in nats: null if it is not predicted.",
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cache_dtype != "auto" and not self.cached:
            raise ValueError("cache_dtype without cached has no effect; add --cached=True")


def main(argv: list[str] | None = None) -> None:
    """Evaluate one model on one text."""
    if argv is None:
        argv = sys.argv[1:]
    cfg, _ = configure(EvaluateConfig, argv)
    opened, text = open_both(cfg)
    ends = resolve(cfg, opened)
    losses = evaluate.token_losses(
        opened.model, text.tokens, cfg.block_size, cfg.stride, ends, cfg.cached, opened.cache_dtype
    )
    if cfg.per_token:
        write_per_token(cfg.per_token, evaluate.per_token(text, losses, opened.tokenizer))
    total = losses.double().sum().item()
    loss = total / len(losses)
    result = {
        "model": opened.stored.source,
        "text": text.name,
        "loss": loss,
        "perplexity": math.exp(min(loss, 700)),  # exp(710) overflows
        "bits_per_byte": total / math.log(2) / text.nbytes if text.nbytes else None,
        "tokens": len(losses),
        "bytes": text.nbytes,
        "documents": len(evaluate.documents(text.tokens, ends)),
        "start": text.start,
    }
    settings = {name: getattr(cfg, name) for name in SETTINGS}
    if cfg.json:
        print(json.dumps(result | settings))
    else:
        for line in in_words(result):
            say(line)
        say(", ".join(f"{name}={value}" for name, value in settings.items()))


def open_both(cfg: EvaluateConfig) -> tuple[Opened, Passage]:
    """The model and the text. Raises UserError if one cannot be opened, or is not for the other."""
    stored = cfg.read()
    if cfg.text:
        opened = open_model(cfg, stored)
        return opened, evaluate.text_of_file(cfg.text, opened.tokenizer)
    name = cfg.dataset or stored.config.get("dataset")
    if not name:
        raise UsageError("say what to evaluate: --text=FILE or --dataset=NAME")
    data = Dataset(name, 1)
    alphabet = None
    if data.tokenizer:  # which the model's must then be
        alphabet = name
    opened = open_model(dataclasses.replace(cfg, dataset=alphabet), stored)
    data.model_vocab_size = opened.model.config.vocab_size
    return opened, evaluate.text_of_dataset(data, cfg.split, opened.tokenizer)


def resolve(cfg: EvaluateConfig, opened: Opened) -> tuple[int, ...]:
    """
    Fill in what None and auto stand for. Returns the ids at which windows begin anew. Raises
    UsageError for what does not fit the model.
    """
    source = opened.stored.source
    longest = opened.model.config.block_size
    cfg.block_size = cfg.block_size or longest
    cfg.stride = cfg.stride or cfg.block_size
    cfg.dtype = dtype_name(opened.dtype)
    cfg.device = opened.device
    if cfg.block_size > longest:
        problem = f"the longest context of {source} is {longest}"
        raise UsageError(f"--block_size={cfg.block_size} does not work: {problem}")
    if cfg.stride > cfg.block_size:
        problem = f"it must be at most block_size={cfg.block_size}, or tokens would be left out"
        raise UsageError(f"--stride={cfg.stride} does not work: {problem}")
    if not cfg.within_documents:
        return ()
    ends = ends_of_text(opened.tokenizer.spec)
    if not ends:
        problem = f"the tokenizer of {source} has no token that ends a document"
        raise UsageError(f"--within_documents=True: {problem}")
    return ends


def write_per_token(path: str, records: Iterable[dict[str, Any]]) -> None:
    """Write a JSON object on each line. Raises UserError if the file cannot be written."""
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    try:
        write_text(path, "".join(lines))
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"--per_token={path}: cannot be written ({reason})") from None


def in_words(result: dict[str, Any]) -> list[str]:
    """The figures of a result, for people to read."""
    bits = "bits per byte unknown"
    if result["bytes"]:
        bits = f"{result['bits_per_byte']:.4f} bits per byte (of {result['bytes']:,})"
    first = f"all of the text, after token {result['start']}"
    if result["start"] is None:
        first = "all but the first, which has none before it"
    return [
        f"{result['model']} on {result['text']}: {result['tokens']:,} tokens, {first}",
        f"loss {result['loss']:.4f} nats per token, perplexity {result['perplexity']:.4f}, {bits}",
    ]


if __name__ == "__main__":
    run_script(main)
