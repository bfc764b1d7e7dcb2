"""
Weights in other formats: a file per format, whose reader stands beside its writer.

A model in such a format is a folder with config.json and safetensors (folder.py); the model_type in
config.json names the format. A config.json may hold anything, so a reader compares its sizes with
the tensors that are there, and no size from a config.json is ever allocated.
"""

import dataclasses
import os
import sys
from pathlib import Path

import torch

from model import GPT, GPTConfig
from nanomla.checkpoint import BEST, LATEST, Checkpoint, find, load
from nanomla.checks import brief
from nanomla.errors import UserError, say
from nanomla.files import one_line, put_back, read_json
from nanomla.formats.base import MARK, Settings, Tensors
from nanomla.formats.deepseek import DEEPSEEK
from nanomla.formats.folder import CONFIG, WEIGHTS, download, read_tensors, read_tokenizer
from nanomla.formats.gpt2 import GPT2
from nanomla.formats.llama import LLAMA
from nanomla.formats.own import OWN

# An export is written in the first that fits.
FORMATS = {form.name: form for form in (GPT2, LLAMA, DEEPSEEK, OWN)}
PRETRAINED = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")


def open_weights(name: str | Path, prefer_best: bool = False, verify: bool = True) -> Checkpoint:
    """
    Read what --init_from names: a checkpoint file, a run's folder, one of PRETRAINED, or a folder
    of weights in one of FORMATS.

    prefer_best: read best.pt rather than ckpt.pt of a run's folder.
    verify: see nanomla.checkpoint.load; other formats have no checksums.
    A name in PRETRAINED never means a folder; write ./gpt2 for a folder called gpt2.
    Raises UserError if there is nothing of that name or it cannot be read.
    """
    path = Path(name)
    put_back(path)  # an export that was killed
    if path.is_symlink():
        put_back(Path(os.path.realpath(path)))
    if path.exists() and not path.is_dir():
        return load(path, verify)
    if name in PRETRAINED or (path / CONFIG).exists() or (path / WEIGHTS).exists():
        return read_pretrained(name)
    if (path / LATEST).exists() or (path / BEST).exists():
        return load(find(path, prefer_best), verify)
    problem = "no such file or folder"
    if path.is_dir():
        problem = f"it holds neither {LATEST}, {BEST} nor {CONFIG}"
    names = ", ".join(PRETRAINED)
    raise UserError(f"no checkpoint in {name}: {problem}, and it is none of {names}")


def read_pretrained(name_or_folder: str | Path) -> Checkpoint:
    """
    Read one of PRETRAINED, from the Hugging Face hub or its cache, or a folder of weights.

    The checkpoint has model, model_args and tokenizer (None if the folder has none). Pickles are
    not read. Raises UserError naming the file that is missing, damaged or of another kind of model.
    """
    if name_or_folder in PRETRAINED:
        folder = download(str(name_or_folder))
    else:
        folder = Path(name_or_folder)
    settings = read_json(folder / CONFIG)
    kind = settings.get("model_type")
    readers = {name: form.read for form in FORMATS.values() for name in (form.name, *form.also)}
    if not isinstance(kind, str) or kind not in readers:
        problem = f"model_type {brief(kind)} cannot be read, only {', '.join(readers)}"
        raise UserError(f"{folder / CONFIG}: {problem}")
    tensors = read_tensors(folder)
    try:
        if settings.get("quantization_config") is not None:
            raise ValueError("quantization_config: quantised weights cannot be read")
        args, state = readers[kind](settings, tensors)
    except KeyError as missing:
        raise UserError(f"{folder / CONFIG}: {missing.args[0]} is missing") from None
    except (TypeError, ValueError) as error:
        raise UserError(f"{folder / CONFIG}: {one_line(error)}") from None
    head = state.get("lm_head.weight")
    if head is not None and args.get("tie_weights", True):  # what transformers does then
        wte = state.setdefault("transformer.wte.weight", head)
        if not torch.equal(wte, head):
            args["tie_weights"] = False
            note = "lm_head and wte are stored and differ, so they are not tied"
            say(f"{folder}: {note}, although {CONFIG} ties them", sys.stderr)
    spec = read_tokenizer(folder)
    return Checkpoint(state, args, tokenizer=spec, source=str(name_or_folder))


def write(model: GPT, kind: str) -> tuple[Settings, Tensors]:
    """config.json and the tensors of a model in this format, in which nothing is in the way."""
    settings, tensors = FORMATS[kind].write(model)
    return {"model_type": kind, **MARK, **settings}, tensors


def in_the_way(config: GPTConfig, kind: str) -> list[str]:
    """
    The settings, as name=value, that keep a model from being written in this format.

    As a field that the format does not list must have its default, a setting that is added to
    GPTConfig later cannot get lost in an export.
    """
    fits = FORMATS[kind].fits
    if fits is None:
        return []
    settings = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        possible = value == field.default
        if field.name in fits:
            possible = fits[field.name](config)
        if not possible:
            settings.append(f"{field.name}={value!r}")
    return settings


def fitting_format(config: GPTConfig) -> tuple[str, str]:
    """The format to export this model in, and why, in a few words."""
    lacks = []
    for kind, form in FORMATS.items():
        if form is OWN:  # which has every setting, but opens here alone
            continue
        settings = in_the_way(config, kind)
        if not settings:
            return kind, form.has
        lacks.append(f"{kind} has no {', '.join(settings)}")
    return OWN.name, "; ".join(lacks)
