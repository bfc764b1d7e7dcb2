"""The one way in which a command opens a model to write text with."""

import sys
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch

from model import GPT
from nanomla import checkpoint, formats
from nanomla.checkpoint import Checkpoint
from nanomla.checks import Text, check
from nanomla.distributed import resolve_device
from nanomla.errors import UsageError, say
from nanomla.tokenizer import Tokenizer

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
CacheDtype = Literal["auto", "float32", "bfloat16", "float16", "int8"]


@dataclass
class ModelSettings:
    """Which model is opened and how it is computed. Raises ValueError for what cannot work."""

    headings: ClassVar[dict[str, str]] = {"out_dir": "model", "device": "device"}

    out_dir: Annotated[
        Text, "The folder of a run, whose best.pt is read, or its ckpt.pt without a best.pt."
    ] = "out"
    ckpt: Annotated[Text | None, "A checkpoint file that is read instead of out_dir."] = None
    init_from: Annotated[
        Text | None,
        "Weights that are read instead of out_dir: gpt2, gpt2-medium, gpt2-large, gpt2-xl, a "
        "folder of safetensors, or a run.",
    ] = None
    verify: Annotated[
        bool, "The checkpoint is compared with its checksums. False opens a huge one sooner."
    ] = True
    dataset: Annotated[
        Text | None,
        "The dataset that has the alphabet of a checkpoint of nanoGPT: a name below data/, a "
        "folder or a file.",
    ] = None
    device: Annotated[Text, "The device to run on: auto, cpu, cuda, cuda:1, ... or mps."] = "auto"
    dtype: Annotated[
        Dtype, "The number format of the weights. auto takes bfloat16 on CUDA, else float32."
    ] = "auto"
    cache_dtype: Annotated[
        CacheDtype, "The number format of the cache. auto takes that of the weights."
    ] = "auto"

    def __post_init__(self) -> None:
        check(self)
        if self.ckpt and self.init_from:
            raise ValueError("ckpt and init_from both say what to read; give one of them")

    def read(self) -> Checkpoint:
        """The checkpoint or the weights that are named. Raises UserError."""
        if self.init_from:
            return formats.open_weights(self.init_from, prefer_best=True, verify=self.verify)
        file = self.ckpt or checkpoint.find(self.out_dir, prefer_best=True)
        return checkpoint.load(file, self.verify)


@dataclass
class Opened:
    """A model in evaluation mode, and what it was opened from and for."""

    model: GPT
    tokenizer: Tokenizer
    stored: Checkpoint
    device: str
    dtype: torch.dtype
    cache_dtype: torch.dtype | None  # None: that of the weights


def open_model(settings: ModelSettings, stored: Checkpoint, **changes: object) -> Opened:
    """
    The model of a checkpoint on the device and in the number format that settings name.

    changes: settings of GPTConfig that differ from the stored ones, as nanomla.checkpoint.build
    takes them. Raises UserError for a checkpoint, a device or a format that does not work.
    """
    device = resolve_device(settings.device)
    model, note = checkpoint.build(stored, dropout=0.0, **changes)
    if note:
        say(note, sys.stderr)
    tokenizer = Tokenizer(checkpoint.tokenizer_spec(stored, settings.dataset), stored.source)
    dtype = weights_dtype(settings.dtype, device)
    cache_dtype = None
    if settings.cache_dtype != "auto":
        cache_dtype = getattr(torch, settings.cache_dtype)
    model.to(device, dtype).eval()
    try:
        model.make_cache(1, 1, cache_dtype)  # refuses a dtype that its attention does not have
    except ValueError as error:
        raise UsageError(f"--cache_dtype={settings.cache_dtype}: {error}") from None
    return Opened(model, tokenizer, stored, device, dtype, cache_dtype)


def weights_dtype(name: Dtype, device: str) -> torch.dtype:
    """The dtype of that name; auto is bfloat16 on a CUDA device that has it, else float32."""
    if name != "auto":
        return getattr(torch, name)
    if device.startswith("cuda") and torch.cuda.is_bf16_supported():
        return torch.bfloat16
    return torch.float32
