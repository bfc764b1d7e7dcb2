"""
The one place that writes and reads checkpoints.

A checkpoint is nanoGPT's dictionary (model, optimizer, model_args, iter_num, best_val_loss, config) plus scaler,
tokenizer, wandb_run_id and format: tensors and plain values only, read with weights_only=True. out_dir/ckpt.pt is the
latest, for resuming; out_dir/best.pt had the lowest validation loss.

Weights also come from folders of a config.json and a model.safetensors: Hugging Face's GPT-2 and what export.py writes.
They are read into the same dictionary, so that whoever opens a model need not know where it came from.
"""

import dataclasses
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configurator import UserError
from data.loader import DATA_ROOT, read_meta
from model import GPT, GPTConfig, factorise_values

FORMAT = 1
LATEST, BEST = "ckpt.pt", "best.pt"
SVD_SETTINGS = ("use_svd", "svd_rank", "svd_method")

PRETRAINED = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "nanomla_tokenizer.json"  # in a folder of weights
MARK = {"exported_by": "nanoMLA"}  # what export.py adds to config.json
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")  # (in, out) in GPT-2
GELUS = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "exact"}  # transformers' names: ours


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
        # What a kill left here may be best.pt under this name too, so it must not be written to; and its space is free.
        aside.unlink(missing_ok=True)
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
        for unfinished in (aside, folder / f".{BEST}.tmp"):
            unfinished.unlink(missing_ok=True)
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


def open_source(name: str, prefer_best: bool = False) -> tuple[dict[str, Any], str | Path]:
    """
    What --init_from names: a checkpoint file, a run's folder, one of PRETRAINED, or a folder of weights.

    PRETRAINED names are never folders; ./gpt2 is one. Returns the checkpoint and what to call it in messages.
    Raises UserError if there is nothing of that name or it cannot be read.
    """
    path = Path(name)
    if path.is_file():
        return load(path), path
    if name in PRETRAINED or any((path / file).exists() for file in (CONFIG, WEIGHTS)):
        return read_pretrained(name), name
    if not any((path / file).exists() for file in (LATEST, BEST)):
        what = f"it holds neither {LATEST}, {BEST} nor {CONFIG}" if path.is_dir() else "no such file or folder"
        raise UserError(f"no checkpoint in {name}: {what}, and it is none of {', '.join(PRETRAINED)}")
    path = find(path, prefer_best)
    return load(path), path


def read_pretrained(name_or_folder: str | Path) -> dict[str, Any]:
    """
    The weights of one of PRETRAINED, from the Hugging Face hub or its cache, or of a folder, as a checkpoint.

    The folder holds config.json and model.safetensors, of a Hugging Face GPT-2 or from export.py. The dictionary has
    model, model_args and tokenizer (None if the folder does not say). Pickles are not read.
    Raises UserError naming the file that is missing, damaged or of another kind of model.
    """
    folder = _download(name_or_folder) if name_or_folder in PRETRAINED else Path(name_or_folder)
    settings = _read_json(folder / CONFIG)
    kind = settings.get("model_type")
    if kind == "gpt2":
        args, state = _gpt2_args(settings, folder / CONFIG), _gpt2_state(_read_tensors(folder))
    elif kind == "nanomla":
        args = {name: value for name, value in settings.items() if name not in ("model_type", *MARK)}
        state = _read_tensors(folder)
    else:
        raise UserError(f"{folder / CONFIG}: model_type {kind!r} cannot be read, only gpt2 and nanomla")
    spec = _read_json(folder / TOKENIZER) if (folder / TOKENIZER).exists() else None
    return {"model": state, "model_args": args, "tokenizer": spec}


def tokenizer_spec(checkpoint: dict[str, Any], source: str | Path) -> dict[str, Any]:
    """
    The spec of a checkpoint's tokenizer. nanoGPT's name their dataset only: the characters of its meta file below
    data/, or GPT-2's BPE for a vocabulary of GPT-2's size. Raises UserError if nothing says how to turn ids into text.
    """
    if checkpoint.get("tokenizer"):
        return checkpoint["tokenizer"]
    vocab_size = checkpoint["model_args"].get("vocab_size", GPTConfig.vocab_size)
    config = checkpoint.get("config")
    folder = DATA_ROOT / str(config["dataset"]) if isinstance(config, dict) and "dataset" in config else None
    spec = read_meta(folder).get("tokenizer") if folder else None
    if spec and spec.get("kind") == "char" and len(spec["chars"]) != vocab_size:
        raise UserError(
            f"{source} knows {vocab_size} characters, but the dataset now in {folder} has {len(spec['chars'])}; "
            "put the data folder it was trained on in its place"
        )
    if spec:
        return spec
    if vocab_size not in (50257, 50304):  # GPT-2's, and as nanoGPT pads it
        remedy = f"put the data folder it was trained on, with its meta.pkl, at {folder}" if folder else f"add a {TOKENIZER}"
        raise UserError(f"{source}: nothing says what text its {vocab_size} token ids stand for; {remedy}")
    return {"kind": "tiktoken", "name": "gpt2"}


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
        _check_types(args)
        held = GPTConfig(**args)
        config = dataclasses.replace(held, **overrides)
        state = {_plain_name(k): v for k, v in checkpoint["model"].items() if not _is_mask(k)}
        _fill_ties(state, config)
        note = None
        if config.use_svd and (not held.use_svd or config.svd_rank != held.svd_rank):
            state, kept = factorise_values(state, config)
            note = f"values factorised to rank {config.svd_rank} of {config.hs}: {kept:.2%} of the squared singular values kept"
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise UserError(f"{source}: {error}") from None
    model = GPT(config, init=False)  # load_state fills every weight, or raises
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


def _check_types(args: dict[str, Any]) -> None:
    """Raises ValueError for a setting whose value is of another type than GPTConfig's."""
    for field in dataclasses.fields(GPTConfig):
        value, default = args.get(field.name, field.default), field.default
        fits = (int, type(None)) if default is None else (float, int) if type(default) is float else (type(default),)
        if type(value) not in fits:
            raise ValueError(f"{field.name}={value!r} does not work: {field.name} must be of type {fits[0].__name__}")


def _fill_ties(state: dict[str, Tensor], config: GPTConfig) -> None:
    """Weights that are tied in the model may be stored once. Raises ValueError if they are stored twice and differ."""
    wte = state.get("transformer.wte.weight")
    if wte is not None and not torch.equal(state.setdefault("lm_head.weight", wte), wte):
        raise ValueError("lm_head and wte are different weights; in this model they are one")
    if config.use_mla and config.mla_share_latent:
        for name in [n for n in state if ".h.0.attn.kv_latent_proj." in n]:
            for layer in range(1, config.n_layer):
                state.setdefault(name.replace(".h.0.", f".h.{layer}."), state[name])


def _download(name: str) -> Path:
    """The folder in Hugging Face's cache with a GPT-2's config and weights, fetched if need be; nothing else is."""
    repository = f"openai-community/{name}"
    remedy = f"download {CONFIG} and {WEIGHTS} of {repository} elsewhere and give their folder: --init_from=FOLDER"
    try:
        import huggingface_hub
    except ImportError:
        raise UserError(f"fetching {name} needs huggingface_hub: pip install huggingface_hub, or {remedy}") from None
    huggingface_hub.logging.set_verbosity_error()  # its retries are not worth a line each
    try:
        paths = [huggingface_hub.hf_hub_download(repository, file) for file in (CONFIG, WEIGHTS)]
    except Exception as error:  # noqa: BLE001  network, proxy, disk and cache errors, from several libraries
        reason = (str(error).splitlines() or [""])[0][:150]
        raise UserError(f"{name} cannot be had from the Hugging Face hub ({type(error).__name__}: {reason}); {remedy}") from None
    return Path(paths[0]).parent


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path.parent}: no {path.name} in this folder") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: cannot be read (it is no JSON object)")
    return content


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's model.safetensors, or of the pieces that its index lists."""
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise UserError(f"reading {folder} needs safetensors: pip install safetensors") from None
    files, index = [WEIGHTS], folder / f"{WEIGHTS}.index.json"
    if index.exists() and not (folder / WEIGHTS).exists():
        pieces = _read_json(index).get("weight_map")
        files = sorted({Path(str(f)).name for f in pieces.values()}) if isinstance(pieces, dict) else []
    tensors = {}
    for file in files:
        try:
            tensors |= load_file(folder / file)
        except FileNotFoundError:
            pickled = (folder / "pytorch_model.bin").exists()
            hint = "; pytorch_model.bin is a pickle and not read, save the model with safetensors" if pickled else ""
            raise UserError(f"{folder}: no {file} in this folder{hint}") from None
        except Exception as error:  # noqa: BLE001  SafetensorError is no OSError, and damage shows in several ways
            raise UserError(f"{folder / file}: truncated or not safetensors ({str(error)[:100]})") from None
    strange = [name for name, t in tensors.items() if not t.is_floating_point() and not _is_mask(name)]
    if strange:
        raise UserError(f"{folder}: {strange[0]} is {tensors[strange[0]].dtype}; quantised weights cannot be read")
    return tensors


def _gpt2_args(settings: dict[str, Any], source: Path) -> dict[str, Any]:
    """transformers' GPT2Config as arguments of GPTConfig. Raises UserError for what this model does not compute."""
    only = {"layer_norm_epsilon": 1e-5, "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}
    only |= {"add_cross_attention": False, "tie_word_embeddings": True}
    for name, value in only.items():
        if settings.get(name, value) != value:
            raise UserError(f"{source}: {name}={settings[name]!r} is not supported, only {value!r}")
    args = {"vocab_size": settings.get("vocab_size", 50257), "block_size": settings.get("n_positions", 1024)}
    args |= {name: settings.get(name, getattr(GPTConfig, name)) for name in ("n_layer", "n_head", "n_embd")}
    if settings.get("n_inner") not in (None, 4 * args["n_embd"]):
        raise UserError(f"{source}: n_inner={settings['n_inner']!r} is not supported, only 4 * n_embd")
    activation = settings.get("activation_function", "gelu_new")
    if activation not in GELUS:
        raise UserError(f"{source}: activation_function={activation!r} is not supported, only {', '.join(GELUS)}")
    return {**args, "bias": True, "gelu": GELUS[activation]}


def _gpt2_state(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names as in this model, and linear weights as (out, in)."""
    state = {}
    for name, tensor in tensors.items():
        if not name.startswith(("transformer.", "lm_head.")):
            name = "transformer." + name
        state[name] = tensor.t() if name.endswith(CONV1D) and tensor.dim() == 2 else tensor
    return state


def _is_mask(name: str) -> bool:
    """Whether a name is that of GPT-2's old causal-mask buffers."""
    return name.endswith((".attn.bias", ".attn.masked_bias"))


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
