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
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from torch import Tensor

from nanomla import evaluate
from nanomla.cache import dtype_name
from nanomla.checks import Count
from nanomla.dataset import Dataset
from nanomla.errors import UsageError, UserError, run_script, say
from nanomla.evaluate import Text
from nanomla.files import write_text
from nanomla.inference import ModelSettings, Opened, open_model
from nanomla.settings import configure
from nanomla.tokenizer import ends_of_text


@dataclass
class EvaluateConfig(ModelSettings):
    """Raises ValueError for a value that cannot work."""

    headings: ClassVar[dict[str, str]] = ModelSettings.headings | {
        "dataset": "text", "text": "text", "block_size": "windows", "json": "output",
    }

    dataset: Annotated[
        str | None,
        "The dataset that is evaluated: a name below data/, or a folder. None stands for the one "
        "that the model was trained on. With text it only gives a checkpoint of nanoGPT its "
        "alphabet.",
    ] = None
    text: Annotated[
        str | None, "A file in UTF-8 that is evaluated instead of a dataset."
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
        str | None,
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
    set_windows(cfg, opened)
    ends = ()
    if cfg.within_documents:
        ends = ends_of_text(opened.tokenizer.spec)
        if not ends:
            problem = f"the tokenizer of {opened.stored.source} has no token that ends a document"
            raise UsageError(f"--within_documents=True: {problem}")
    began = time.perf_counter()
    losses = evaluate.token_losses(
        opened.model, text.tokens, cfg.block_size, cfg.stride, ends, cfg.cached, opened.cache_dtype
    )
    seconds = time.perf_counter() - began
    if cfg.per_token:
        write_per_token(cfg.per_token, evaluate.per_token(text, losses, opened.tokenizer))
    result = summary(cfg, opened, text, losses)
    result["documents"] = len(evaluate.documents(text.tokens, ends))
    result["seconds"] = round(seconds, 3)
    if cfg.json:
        print(json.dumps(result))
    else:
        for line in in_words(result):
            say(line)


def open_both(cfg: EvaluateConfig) -> tuple[Opened, Text]:
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


def set_windows(cfg: EvaluateConfig, opened: Opened) -> None:
    """Fill in what None stands for. Raises UsageError for what does not fit the model."""
    longest = opened.model.config.block_size
    cfg.block_size = cfg.block_size or longest
    if cfg.block_size > longest:
        problem = f"the longest context of {opened.stored.source} is {longest}"
        raise UsageError(f"--block_size={cfg.block_size} does not work: {problem}")
    cfg.stride = cfg.stride or cfg.block_size
    if cfg.stride > cfg.block_size:
        problem = f"it must be at most block_size={cfg.block_size}, or tokens would be left out"
        raise UsageError(f"--stride={cfg.stride} does not work: {problem}")


def write_per_token(path: str, records: Iterable[dict[str, Any]]) -> None:
    """Write a JSON object on each line. Raises UserError if the file cannot be written."""
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    try:
        write_text(path, "".join(lines))
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"--per_token={path}: cannot be written ({reason})") from None


def summary(cfg: EvaluateConfig, opened: Opened, text: Text, losses: Tensor) -> dict[str, Any]:
    """What the losses (N - 1,) of a text amount to, and how they were measured."""
    total = losses.double().sum().item()
    loss = total / len(losses)
    bits_per_byte = None
    if text.nbytes:
        bits_per_byte = total / math.log(2) / text.nbytes
    return {
        "model": opened.stored.source,
        "text": text.name,
        "loss": loss,
        "perplexity": math.exp(min(loss, 700)),  # exp(710) overflows
        "bits_per_byte": bits_per_byte,
        "tokens": len(losses),
        "bytes": text.nbytes,
        "start": text.start,
        "block_size": cfg.block_size,
        "stride": cfg.stride,
        "within_documents": cfg.within_documents,
        "cached": cfg.cached,
        "cache_dtype": cfg.cache_dtype,
        "dtype": dtype_name(opened.dtype),
        "device": opened.device,
    }


def in_words(result: dict[str, Any]) -> list[str]:
    """The lines that are printed of a result."""
    bits = "bits per byte unknown"
    nbytes = "the dataset does not record its bytes"
    if result["bytes"]:
        bits = f"{result['bits_per_byte']:.4f} bits per byte"
        nbytes = f"{result['bytes']:,} bytes"
    first = f"all of the text, after token {result['start']}"
    if result["start"] is None:
        first = "all but the first token, which has none before it"
    windows = f"windows of {result['block_size']:,} tokens"
    if result["stride"] < result["block_size"]:
        windows += f", of which the last {result['stride']:,} are scored"
    if result["within_documents"]:
        windows += f", within each of {result['documents']:,} documents"
    if result["cached"]:
        windows += f", token by token through a cache ({result['cache_dtype']})"
    speed = result["tokens"] / max(result["seconds"], 1e-9)
    return [
        f"{result['model']} on {result['text']}",
        f"loss {result['loss']:.4f} nats per token, perplexity {result['perplexity']:.4f}, {bits}",
        f"over {result['tokens']:,} tokens, {nbytes} ({first})",
        f"{windows}; {result['dtype']} on {result['device']}, {speed:,.0f} tokens/s",
    ]


if __name__ == "__main__":
    run_script(main)
