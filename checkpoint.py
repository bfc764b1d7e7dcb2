"""
The one place that writes and reads checkpoints.

A checkpoint is nanoGPT's dictionary (model, optimizer, model_args, iter_num, best_val_loss, config) plus scaler,
tokenizer, wandb_run_id and format: tensors and plain values only, read with weights_only=True. out_dir/ckpt.pt is the
latest, for resuming; out_dir/best.pt had the lowest validation loss.
"""

import dataclasses
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configurator import UserError
from model import GPT, GPTConfig, factorise_values

FORMAT = 1
LATEST, BEST = "ckpt.pt", "best.pt"
SVD_SETTINGS = ("use_svd", "svd_rank", "svd_method")


def save(out_dir: str | Path, checkpoint: dict[str, Any], best: bool) -> None:
    """
    Write out_dir/ckpt.pt and, if best, out_dir/best.pt: whole or not at all, and on the disk when this returns.

    The bytes go to a file aside, are flushed and synced, and renamed over the old ones; best.pt is the same file under
    a second name, given first, so that a kill in between costs no best weights. Raises UserError, with the old files
    untouched, if there is too little space or the write fails.
    """
    folder = Path(out_dir)
    aside = folder / f".{LATEST}.tmp"
    try:
        needed, free = _tensor_bytes(checkpoint), shutil.disk_usage(folder).free
        if free < 1.05 * needed:
            raise UserError(f"no checkpoint written: it needs {needed / 1e6:.0f} MB, {folder} has {free / 1e6:.0f} MB free")
        with open(aside, "wb") as file:
            torch.save({"format": FORMAT, **checkpoint}, file)
            file.flush()
            os.fsync(file.fileno())
        if best:
            _second_name(aside, folder / BEST)
        os.replace(aside, folder / LATEST)
        _sync_folder(folder)
    except (OSError, RuntimeError) as error:  # torch's zip writer reports a full disk as RuntimeError
        aside.unlink(missing_ok=True)
        raise UserError(f"no checkpoint written to {folder}: {str(error).splitlines()[0]}") from None


def load(path: str | Path) -> dict[str, Any]:
    """The dictionary in a checkpoint file, on the CPU. Raises UserError saying what is wrong with the file."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise UserError(f"no checkpoint at {path}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except pickle.UnpicklingError:
        raise UserError(f"{path}: refused, it is no checkpoint of tensors and plain values") from None
    except Exception as error:  # noqa: BLE001  a damaged file can fail anywhere in the reader
        reason = (str(error).splitlines() or [""])[0][:100]
        raise UserError(f"{path}: truncated or not a checkpoint ({type(error).__name__}: {reason})") from None
    missing = [k for k in ("model", "model_args") if not isinstance(checkpoint, dict) or k not in checkpoint]
    if missing:
        raise UserError(f"{path}: not a nanoMLA or nanoGPT checkpoint, it has no {' and no '.join(missing)}")
    if checkpoint.get("format", FORMAT) != FORMAT:
        raise UserError(f"{path}: format {checkpoint['format']}, this version reads {FORMAT}")
    return checkpoint


def find(out_dir: str | Path, prefer_best: bool = False) -> Path:
    """The checkpoint file to read in a run's folder. Raises UserError if there is none."""
    names = (BEST, LATEST) if prefer_best else (LATEST, BEST)
    for name in names:
        if (Path(out_dir) / name).is_file():
            return Path(out_dir) / name
    raise UserError(f"no checkpoint in {out_dir}: neither {LATEST} nor {BEST} is there")


def build_model(checkpoint: dict[str, Any], source: str | Path, **overrides: Any) -> tuple[GPT, str | None]:
    """
    The model a checkpoint holds, on the CPU. overrides: dropout, and the SVD settings to factorise its values.

    Returns the model and, if values were factorised, a line saying how much of them was kept.
    Raises UserError if names or shapes do not belong together.
    """
    known = {f.name for f in dataclasses.fields(GPTConfig)}
    try:
        args = dict(checkpoint["model_args"])
        strange = sorted(set(args) - known)
        if strange:
            raise ValueError(f"model_args has settings this version does not know: {', '.join(strange)}")
        held = GPTConfig(**args)
        config = dataclasses.replace(held, **overrides)
        state = {_plain_name(k): v for k, v in checkpoint["model"].items() if not k.endswith((".attn.bias", ".masked_bias"))}
        note = None
        if config.use_svd and (not held.use_svd or config.svd_rank != held.svd_rank):
            state, kept = factorise_values(state, config)
            note = f"values factorised to rank {config.svd_rank} of {config.hs}: {kept:.2%} of the squared singular values kept"
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise UserError(f"{source}: {error}") from None
    model = GPT(config)
    load_state(model, state, source)
    return model, note


def load_state(model: GPT, state: dict[str, Tensor], source: str | Path) -> None:
    """Fill a model strictly. Raises UserError naming what is missing, unknown or of another shape."""
    own = model.state_dict()
    missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or unknown:
        parts = [f"{len(n)} {what} (first {n[0]})" for n, what in ((missing, "missing"), (unknown, "unknown")) if n]
        raise UserError(f"{source}: its weights are of another model: " + ", ".join(parts))
    for name, tensor in own.items():
        if tensor.shape != state[name].shape:
            raise UserError(f"{source}: {name} has shape {tuple(state[name].shape)}, expected {tuple(tensor.shape)}")
    model.load_state_dict(state)


def _plain_name(name: str) -> str:
    """A parameter's name without what torch.compile and DDP put before it."""
    for prefix in ("_orig_mod.", "module.", "_orig_mod."):
        name = name.removeprefix(prefix)
    return name


def _tensor_bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, dict):
        return sum(map(_tensor_bytes, value.values()))
    return sum(map(_tensor_bytes, value)) if isinstance(value, (list, tuple)) else 0


def _second_name(file: Path, name: Path) -> None:
    """Give `file` a second name, replacing what has it; a copy where the file system knows no links."""
    aside = name.with_name(f".{name.name}.tmp")
    aside.unlink(missing_ok=True)
    try:
        os.link(file, aside)
    except OSError:
        shutil.copyfile(file, aside)
        with open(aside, "rb") as copy:
            os.fsync(copy.fileno())
    os.replace(aside, name)


def _sync_folder(folder: Path) -> None:
    """Make renames durable, where folders can be synced."""
    if hasattr(os, "O_DIRECTORY"):
        fd = os.open(folder, os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
