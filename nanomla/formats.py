"""
Weights in other formats: each format's reader and writer stand side by side.

A model in such a format is a folder with config.json and model.safetensors. The model_type in
config.json names the format: "gpt2" is Hugging Face's GPT-2, "nanomla" is our own export of models
that no other format describes. A reader turns settings and tensors into the arguments of GPTConfig
and a state dict; a writer does the opposite.
"""

import dataclasses
import json
import os
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model import GPT, GPTConfig
from nanomla.bpe import load_encoding
from nanomla.checkpoint import BEST, LATEST, TOKENIZER, Checkpoint, find, is_mask_buffer, load
from nanomla.settings import UserError

CONFIG, WEIGHTS = "config.json", "model.safetensors"
VOCAB, MERGES = "vocab.json", "merges.txt"  # GPT-2's tokenizer, as transformers reads it
EXPORT_FILES = {CONFIG, WEIGHTS, TOKENIZER, VOCAB, MERGES}
MARK = {"exported_by": "nanoMLA"}  # in the config.json of every export
PRETRAINED = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")


def open_weights(name: str | Path, prefer_best: bool = False) -> Checkpoint:
    """
    Read what --init_from names: a checkpoint file, a run's folder, one of PRETRAINED, or a folder
    in one of the formats of this file.

    prefer_best: read best.pt rather than ckpt.pt of a run's folder.
    A name in PRETRAINED never means a folder; write ./gpt2 for a folder called gpt2.
    Raises UserError if there is nothing of that name or it cannot be read.
    """
    path = Path(name)
    if path.is_file():
        return load(path)
    if name in PRETRAINED or any((path / file).exists() for file in (CONFIG, WEIGHTS)):
        return read_pretrained(name)
    if any((path / file).exists() for file in (LATEST, BEST)):
        return load(find(path, prefer_best))
    what = "no such file or folder"
    if path.is_dir():
        what = f"it holds neither {LATEST}, {BEST} nor {CONFIG}"
    known = ", ".join(PRETRAINED)
    raise UserError(f"no checkpoint in {name}: {what}, and it is none of {known}")


def read_pretrained(name_or_folder: str | Path) -> Checkpoint:
    """
    Read one of PRETRAINED, from the Hugging Face hub or its cache, or a folder of weights.

    The checkpoint has model, model_args and tokenizer (None without a nanomla_tokenizer.json).
    Pickles are not read. Raises UserError naming the file that is missing, damaged or of another
    kind of model.
    """
    known = name_or_folder in PRETRAINED
    folder = _download(str(name_or_folder)) if known else Path(name_or_folder)
    settings = _read_json(folder / CONFIG)
    kind = settings.get("model_type")
    try:
        if kind == "gpt2":
            args = gpt2_args(settings)
        elif kind == "nanomla":
            args = nanomla_args(settings)
        else:
            raise ValueError(f"model_type {kind!r} cannot be read, only gpt2 and nanomla")
    except (TypeError, ValueError) as error:
        raise UserError(f"{folder / CONFIG}: {error}") from None
    tensors = _read_tensors(folder)
    state = gpt2_state(tensors) if kind == "gpt2" else tensors
    spec = _read_json(folder / TOKENIZER) if (folder / TOKENIZER).exists() else None
    return Checkpoint(state, args, tokenizer=spec, source=str(name_or_folder))


# --------------------------------------------------------------------------------------------------
# Our own export: GPTConfig's fields, and the weights under their own names


def nanomla_args(settings: dict[str, Any]) -> dict[str, Any]:
    """The arguments of GPTConfig in config.json."""
    return {name: v for name, v in settings.items() if name not in ("model_type", *MARK)}


def as_nanomla(model: GPT) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and the tensors of any model; tied and shared weights are stored once."""
    tensors = {name: p.detach().contiguous() for name, p in model.named_parameters()}
    return {"model_type": "nanomla", **MARK, **dataclasses.asdict(model.config)}, tensors


# --------------------------------------------------------------------------------------------------
# GPT-2, as transformers' GPT2LMHeadModel stores it

GPT2_SHAPE = {  # GPT-2's name: ours and GPT-2's default
    "n_positions": ("block_size", 1024),
    "vocab_size": ("vocab_size", 50257),
    "n_layer": ("n_layer", 12),
    "n_head": ("n_head", 12),
    "n_embd": ("n_embd", 768),
}
GPT2_GELU = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "exact"}
GPT2_ONLY = {  # the one value that model.py computes; it is also GPT-2's default
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}
GPT2_TRANSPOSED = (  # stored as (in, out)
    "attn.c_attn.weight",
    "attn.c_proj.weight",
    "mlp.c_fc.weight",
    "mlp.c_proj.weight",
)

ANY = object()
GPT2_FIELDS = {  # for every field of GPTConfig, what a model can have to be written as GPT-2
    **dict.fromkeys(("block_size", "vocab_size", "n_layer", "n_head", "n_embd"), ANY),
    **dict.fromkeys(("dropout", "gelu"), ANY),  # these too are in GPT-2's config.json
    "bias": ANY,  # GPT-2 always has biases; a model without them gets zeros
    "pos_emb": "learned",
    "use_mla": False,
    "use_svd": False,
    # These have no effect on a model with the three values above.
    "rope_theta": ANY,
    **dict.fromkeys(("mla_latent_dim", "mla_groups", "mla_rope_dim", "mla_q_latent_dim"), ANY),
    **dict.fromkeys(("mla_norm", "mla_share_latent", "svd_rank", "svd_method"), ANY),
}


def fits_gpt2(config: GPTConfig) -> bool:
    """
    Whether a model of this shape can be written as a GPT-2.

    A field that GPT2_FIELDS does not list must have its default value. So a setting that is added
    to GPTConfig later cannot get lost in an export.
    """
    allowed = {field.name: field.default for field in dataclasses.fields(config)} | GPT2_FIELDS
    return all(v is ANY or getattr(config, name) == v for name, v in allowed.items())


def gpt2_args(settings: dict[str, Any]) -> dict[str, Any]:
    """
    transformers' GPT2Config as arguments of GPTConfig.

    Raises ValueError or TypeError for a value that this model cannot have.
    """
    for name, value in GPT2_ONLY.items():
        if settings.get(name, value) != value:
            raise ValueError(f"{name}={settings[name]!r} is not supported, only {value!r}")
    args = {ours: settings.get(name, default) for name, (ours, default) in GPT2_SHAPE.items()}
    if settings.get("n_inner") not in (None, 4 * args["n_embd"]):
        raise ValueError(f"n_inner={settings['n_inner']!r} is not supported, only 4 * n_embd")
    activation = settings.get("activation_function", "gelu_new")
    if activation not in GPT2_GELU:
        known = ", ".join(GPT2_GELU)
        raise ValueError(f"activation_function={activation!r} is not supported, only {known}")
    return {**args, "bias": True, "gelu": GPT2_GELU[activation]}


def gpt2_state(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names as in this model, and linear weights as (out, in)."""
    state = {}
    for name, tensor in tensors.items():
        if not name.startswith(("transformer.", "lm_head.")):  # the base model has no such prefix
            name = "transformer." + name
        stored_transposed = name.endswith(GPT2_TRANSPOSED) and tensor.dim() == 2
        state[name] = tensor.t() if stored_transposed else tensor
    return state


def as_gpt2(model: GPT) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and the tensors of a GPT2LMHeadModel, for a model whose config fits_gpt2."""
    config, tensors = model.config, {}
    for name, p in model.named_parameters():
        p = p.detach()
        tensors[name] = (p.t() if name.endswith(GPT2_TRANSPOSED) else p).contiguous()
        if not config.bias and ".wte." not in name and ".wpe." not in name:
            tensors[name.replace(".weight", ".bias")] = torch.zeros(p.size(0), dtype=p.dtype)
    end = 50256 if config.vocab_size > 50256 else None
    settings = {
        "model_type": "gpt2",
        **MARK,
        "architectures": ["GPT2LMHeadModel"],
        "activation_function": {"tanh": "gelu_new", "exact": "gelu"}[config.gelu],
        **{name: getattr(config, ours) for name, (ours, _) in GPT2_SHAPE.items()},
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), config.dropout),
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        **dict.fromkeys(("bos_token_id", "eos_token_id"), end),
    }
    return settings, tensors


def gpt2_tokenizer() -> dict[str, str]:
    """
    The content of vocab.json and merges.txt of GPT-2's tokenizer, from tiktoken's ranks.

    The merge that makes a token joins the two pieces that remain when all merges of lower rank have
    been applied to its bytes. Raises UserError if tiktoken's tables are not available.
    """
    encoding = load_encoding("gpt2")
    tokens = [encoding.decode_single_token_bytes(i) for i in range(encoding.eot_token)]
    rank = {token: i for i, token in enumerate(tokens)}
    # These files write a byte as one visible letter: as itself where it is one in Latin-1, and as
    # the letters from 256 on otherwise.
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {b: chr(b) for b in visible}
    letters |= {b: chr(256 + n) for n, b in enumerate(b for b in range(256) if b not in letters)}

    def spell(piece: bytes) -> str:
        return "".join(letters[b] for b in piece)

    lines = ["#version: 0.2"]
    for token in tokens[256:]:
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            ranks = [rank.get(a + b, len(rank)) for a, b in pairwise(parts)]
            at = ranks.index(min(ranks))
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        lines.append(" ".join(map(spell, parts)))
    ids = {spell(token): i for i, token in enumerate(tokens)}
    ids["<|endoftext|>"] = encoding.eot_token
    return {VOCAB: json.dumps(ids), MERGES: "\n".join(lines) + "\n"}


# --------------------------------------------------------------------------------------------------
# Folders: config.json and tensors as safetensors


def check_target(folder: Path) -> None:
    """Raise UserError if --to names a folder with anything but an earlier export in it."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"--to={folder} is a file; name a folder")
    names = {path.name for path in folder.iterdir()}
    if not names:
        return
    try:
        settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        settings = None
    exported = isinstance(settings, dict) and settings.items() >= MARK.items()
    if not exported or names - EXPORT_FILES:
        remedy = "name a new or an empty folder"
        raise UserError(f"--to={folder} holds other files than an export's; {remedy}")


def as_json(value: dict[str, Any]) -> str:
    """The text of a .json file."""
    return json.dumps(value, indent=2) + "\n"


def write_folder(folder: Path, tensors: dict[str, Tensor], texts: dict[str, str]) -> None:
    """
    Write tensors and texts (content by file name) as a folder, whole or not at all.

    An earlier export in that place is replaced. Raises UserError, with nothing changed, if the
    folder cannot be written.
    """
    try:
        from safetensors import SafetensorError
        from safetensors.torch import save_file
    except ImportError:
        raise UserError("exporting needs safetensors: pip install safetensors") from None
    folder = folder.resolve()
    tmp = folder.with_name(f".{folder.name}.new-{os.getpid()}")
    old = folder.with_name(f".{folder.name}.old-{os.getpid()}")
    try:
        tmp.mkdir(parents=True)
        for name, text in texts.items():
            (tmp / name).write_text(text, encoding="utf-8")
        save_file(tensors, tmp / WEIGHTS, metadata={"format": "pt"})  # transformers requires this
        mode = (tmp / CONFIG).stat().st_mode
        for path in tmp.iterdir():
            path.chmod(mode)  # safetensors makes its file readable by the owner alone
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        if folder.exists():
            folder.rename(old)
        tmp.rename(folder)
    except (OSError, SafetensorError) as error:
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise UserError(f"nothing exported to {folder}: {error}") from None
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _download(name: str) -> Path:
    """
    The folder in Hugging Face's cache with config.json and the weights of a GPT-2, downloaded if
    they are not there. No other file is downloaded.
    """
    repository = f"openai-community/{name}"
    files = f"{CONFIG} and {WEIGHTS} of {repository}"
    remedy = f"download {files} elsewhere and give their folder: --init_from=FOLDER"
    try:
        import huggingface_hub
    except ImportError:
        install = "pip install huggingface_hub"
        raise UserError(f"fetching {name} needs huggingface_hub: {install}, or {remedy}") from None
    huggingface_hub.logging.set_verbosity_error()  # otherwise every retry prints a line
    try:
        paths = [huggingface_hub.hf_hub_download(repository, file) for file in (CONFIG, WEIGHTS)]
    except Exception as error:  # noqa: BLE001  network, proxy, disk and cache errors
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:150]}"
        problem = f"{name} cannot be had from the Hugging Face hub ({reason})"
        raise UserError(f"{problem}; {remedy}") from None
    return Path(paths[0]).parent


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path.parent}: no {path.name} in this folder") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: cannot be read (it is no JSON object)")
    return content


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors in a folder's model.safetensors, or in the pieces that its index lists."""
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise UserError(f"reading {folder} needs safetensors: pip install safetensors") from None
    files, index = [WEIGHTS], folder / f"{WEIGHTS}.index.json"
    if index.exists() and not (folder / WEIGHTS).exists():
        pieces = _read_json(index).get("weight_map")
        pieces = pieces.values() if isinstance(pieces, dict) else ()
        files = sorted({Path(str(piece)).name for piece in pieces})
    tensors = {}
    for file in files:
        try:
            tensors |= load_file(folder / file)
        except FileNotFoundError:
            problem = f"{folder}: no {file} in this folder"
            if (folder / "pytorch_model.bin").exists():
                remedy = "save the model with safetensors"
                problem += f"; pytorch_model.bin is a pickle and not read, {remedy}"
            raise UserError(problem) from None
        except Exception as error:  # noqa: BLE001  damage causes errors of several kinds
            reason = str(error)[:100]
            raise UserError(f"{folder / file}: truncated or not safetensors ({reason})") from None
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() and not is_mask_buffer(name):
            problem = f"{name} is {tensor.dtype}; quantised weights cannot be read"
            raise UserError(f"{folder}: {problem}")
    return tensors
