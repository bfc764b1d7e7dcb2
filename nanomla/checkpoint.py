"""
A run's checkpoints: what is in them, and how they are written, read and made into models.

A file holds nanoGPT's dictionary plus a few keys of ours; all of them are fields of Checkpoint. It
holds tensors and plain values only and is read with weights_only=True, so that opening it runs no
code.
out_dir/ckpt.pt is the latest state, for resuming; out_dir/best.pt had the lowest validation loss.
"""

import dataclasses
import math
import os
import pickle
import shutil
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model import GPT, GPTConfig
from nanomla.checks import Natural, check
from nanomla.convert import factorise_values
from nanomla.dataset import DATA_ROOT, read_meta
from nanomla.errors import UserError
from nanomla.files import one_line, replacing, require_file
from nanomla.tokenizer import check_spec, same_ids

FORMAT = 1  # written beside the fields of Checkpoint; nanoGPT's checkpoints have none
LATEST, BEST = "ckpt.pt", "best.pt"
LONGEST_CONTEXT = 2**20  # of rotary models; their tables then take 4 MB per number they rotate
# What tools.convert leaves beside the checkpoints of a conversion: its record, for export's model
# card, its report, and train.py's config for healing.
CONVERSION = ("conversion.json", "conversion.md", "heal.py")
NANOGPT_ARGS = {"n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout"}
TOKENIZER = "nanomla_tokenizer.json"  # a tokenizer's spec in a folder of weights


@dataclass
class Checkpoint:
    """
    Weights and what belongs to them.

    All fields but `source` are the keys on disk. Raises ValueError for a value of another type.
    """

    model: dict[str, Tensor]  # the state dict
    model_args: dict[str, Any]  # the fields of GPTConfig
    optimizer: dict[str, Any] | None = None  # as nanomla.optim.optimizer_state returns it
    scaler: dict[str, Any] | None = None  # the state of float16's GradScaler
    iter_num: Natural = 0  # iterations done
    best_val_loss: float = math.inf  # nats per token; infinity: none is known
    config: dict[str, Any] = field(default_factory=dict)  # the run's settings by name
    tokenizer: dict[str, Any] | None = None  # what nanomla.tokenizer.Tokenizer is made from
    wandb_run_id: str | None = None
    source: str = ""  # what messages call it: a file, folder or name; not written

    def __post_init__(self) -> None:
        check(self)
        if not math.isfinite(self.best_val_loss):  # below -inf or NaN no loss would be the best
            self.best_val_loss = math.inf


def save(out_dir: str | Path, checkpoint: Checkpoint, best: bool) -> None:
    """
    Write out_dir/ckpt.pt and, if best, out_dir/best.pt: whole or not at all.

    The bytes go to a temporary file, which is then renamed to ckpt.pt. best.pt is the same file
    under a second name. It gets that name first, so that a kill between the two steps does not lose
    the best weights. Raises UserError, with the old files untouched, if the write fails.

    Of model_args, what has GPTConfig's default is left out unless nanoGPT has it, so that nanoGPT
    opens its own kind of model. So a default that changes is a new FORMAT.
    """
    folder = Path(out_dir)
    content = {"format": FORMAT, **vars(checkpoint)}
    del content["source"]
    defaults = {f.name: f.default for f in dataclasses.fields(GPTConfig)}
    content["model_args"] = {
        name: value
        for name, value in checkpoint.model_args.items()
        if name in NANOGPT_ARGS or name not in defaults or value != defaults[name]
    }
    try:
        with replacing(folder / LATEST) as unfinished:
            with open(unfinished, "wb") as file:
                torch.save(content, file)
            if best:
                second_name(unfinished, folder / BEST)
    except (OSError, RuntimeError) as error:
        failed = error
        if isinstance(error.__context__, OSError):  # torch has a RuntimeError for a full disk
            failed = error.__context__
        reason = getattr(failed, "strerror", None) or one_line(failed)
        raise UserError(f"no checkpoint written to {folder}: {reason}") from None


def second_name(file: Path, name: Path) -> None:
    """
    Give `file` a second name, replacing what has it; a copy where hard links do not work.

    Raises OSError.
    """
    with replacing(name) as unfinished:
        try:
            os.link(file, unfinished)
        except OSError:
            shutil.copyfile(file, unfinished)


def load(path: str | Path, verify: bool = True) -> Checkpoint:
    """
    Read a checkpoint file, ours or nanoGPT's, onto the CPU.

    verify: compare the file's checksums with its bytes, at 2.5 to 5 GB/s of one core.
    Its tensors are mapped from the file, which must not be written to while they are in use.
    Keys that are no field of Checkpoint are ignored. Raises UserError naming the file and what is
    wrong with it.
    """
    try:
        require_file(path)
        with zipfile.ZipFile(path) as archive:  # what torch.save writes
            damaged = archive.testzip() if verify else None
        if damaged:
            raise ValueError(f"{damaged} has another CRC-32 than the file says")
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise UserError(f"no checkpoint at {path}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except pickle.UnpicklingError:
        reason = "refused, it is no checkpoint of tensors and plain values"
        raise UserError(f"{path}: {reason}") from None
    except Exception as error:  # noqa: BLE001  a damaged file can fail anywhere in the reader
        reason = f"{type(error).__name__}: {one_line(error)[:100]}"
        raise UserError(f"{path}: truncated, damaged or not a checkpoint ({reason})") from None

    needed = ("model", "model_args")
    missing = [key for key in needed if not isinstance(content, dict) or key not in content]
    if missing:
        lacks = " and no ".join(missing)
        raise UserError(f"{path}: not a nanoMLA or nanoGPT checkpoint, it has no {lacks}")
    keys = [f.name for f in dataclasses.fields(Checkpoint) if f.name != "source"]
    values = {k: content[k] for k in keys if k in needed or content.get(k) is not None}
    try:
        if content.get("format", FORMAT) != FORMAT:
            raise ValueError(f"format {content['format']}, this version reads {FORMAT}")
        return Checkpoint(**values, source=str(path))
    except ValueError as error:
        raise UserError(f"{path}: not a nanoMLA or nanoGPT checkpoint ({error})") from None


def find(out_dir: str | Path, prefer_best: bool = False) -> Path:
    """The checkpoint file to read in a run's folder. Raises UserError if there is none."""
    names = [LATEST, BEST]
    if prefer_best:
        names.reverse()
    for name in names:
        if os.path.isfile(Path(out_dir) / name):
            return Path(out_dir) / name
    raise UserError(f"no checkpoint in {out_dir}: neither {LATEST} nor {BEST} is there")


def build(checkpoint: Checkpoint, **overrides: Any) -> tuple[GPT, str | None]:
    """
    Make a checkpoint's model on the CPU, in torch's default dtype.

    overrides: settings of GPTConfig that may differ from the stored ones: dropout, and use_svd,
    svd_rank and svd_method to factorise the values (svd_rank None: the stored rank, else full).
    Returns the model and, if values were factorised, a line that states how much of them was kept.
    Raises UserError if settings, names or shapes do not belong together.
    """
    stored = stored_config(checkpoint)
    source = checkpoint.source
    if stored.use_svd and overrides.get("svd_rank", stored.svd_rank) is None:
        del overrides["svd_rank"]  # None means full rank only where there is none yet
    state = {}
    for name, tensor in checkpoint.model.items():
        if not is_mask_buffer(name):
            state[_plain_name(name)] = tensor
    layers = {name.split(".")[2] for name in state if name.startswith("transformer.h.")}
    if len(layers) != stored.n_layer:  # found before so many layers are made
        problem = f"n_layer={stored.n_layer}, but there are weights of {len(layers)} layers"
        raise UserError(f"{source}: {problem}")
    if stored.pos_emb == "rope" and stored.block_size > LONGEST_CONTEXT:
        limit = f"at most {LONGEST_CONTEXT} rotary positions are supported"
        raise UserError(f"{source}: block_size={stored.block_size}, but {limit}; use a lower one")
    note = None
    try:
        config = dataclasses.replace(stored, **overrides)
        _fill_ties(state, stored)
        model = _without_weights(stored)
        _compare(model, state, source)
        if config.use_svd and (not stored.use_svd or config.svd_rank != stored.svd_rank):
            state, kept = factorise_values(state, config)
            ranks = f"rank {config.svd_rank} of {config.hs}"
            note = f"values factorised to {ranks}: {kept:.2%} of the squared singular values kept"
    except ValueError as error:
        raise UserError(f"{source}: {one_line(error)}") from None
    if config != stored:
        model = _without_weights(config)
    _load_state(model, state, source)
    return model, note


def _without_weights(config: GPTConfig) -> GPT:
    """
    A model whose parameters have shapes only: no memory is taken, no weights are drawn.

    Raises ValueError for sizes that do not fit 64 bits.
    """
    try:
        with torch.device("meta"):
            return GPT(config)
    except (RuntimeError, TypeError):
        raise ValueError("its settings have sizes that no tensor can have") from None


def stored_config(checkpoint: Checkpoint) -> GPTConfig:
    """The settings of a checkpoint's model. Raises UserError for some that do not work."""
    args = checkpoint.model_args
    fields = {f.name for f in dataclasses.fields(GPTConfig)}
    # What another version has besides is no matter if it leaves something out.
    unknown = sorted(n for n in args if n not in fields and args[n] and args[n] != "none")
    if unknown:
        problem = "model_args has settings this version does not know"
        raise UserError(f"{checkpoint.source}: {problem}: {one_line(', '.join(unknown))}")
    try:
        return GPTConfig(**{name: args[name] for name in args if name in fields})
    except ValueError as error:
        raise UserError(f"{checkpoint.source}: {one_line(error)}") from None


def _load_state(model: GPT, state: dict[str, Tensor], source: str) -> None:
    """
    Give a model copies of these weights, in torch's default dtype.

    Raises UserError naming the first tensor that holds a NaN or an infinity. Looking for those
    takes a tenth of the time of the copies.
    """
    dtype = torch.get_default_dtype()
    copies = {}  # the tensors may be mapped from a file or be views of one another
    for name in model.state_dict():
        tensor = state[name].detach()
        copies[name] = tensor.to(dtype, copy=True, memory_format=torch.contiguous_format)
        if not torch.stack(copies[name].aminmax()).isfinite().all():
            raise UserError(f"{source}: {name} holds values that are not finite (NaN or infinity)")
    model.load_state_dict(copies, assign=True)
    model.tie_weights()


def _compare(model: GPT, state: dict[str, Tensor], source: str) -> None:
    """Raise UserError naming what the model misses, does not know or has in another shape."""
    own = model.state_dict()
    missing = sorted(own.keys() - state.keys())
    unknown = sorted(state.keys() - own.keys())
    problems = []
    if missing:
        problems.append(f"{len(missing)} missing (first {missing[0]})")
    if unknown:
        problems.append(f"{len(unknown)} unknown (first {one_line(unknown[0])})")
    if problems:
        raise UserError(f"{source}: its weights are of another model: {', '.join(problems)}")
    for name, tensor in own.items():
        if tensor.shape != state[name].shape:
            shapes = f"has shape {tuple(state[name].shape)}, expected {tuple(tensor.shape)}"
            raise UserError(f"{source}: {name} {shapes}")


def tokenizer_spec(checkpoint: Checkpoint, dataset: str | None = None) -> dict[str, Any]:
    """
    The spec of a checkpoint's tokenizer.

    nanoGPT's checkpoints name their dataset only. Its characters are then read from its meta file
    below data/; without one, a vocabulary of GPT-2's size means GPT-2's BPE.
    dataset: where to read the characters instead: a name below data/, a folder, or a meta file.
    Raises UserError if there is nothing that turns ids into text, or if it is not the model's.
    """
    source = checkpoint.source
    own = checkpoint.tokenizer
    vocab_size = checkpoint.model_args.get("vocab_size", GPTConfig.vocab_size)
    if own is not None and dataset is None:
        check_spec(own, source, vocab_size)
        return own

    name = dataset or checkpoint.config.get("dataset")
    other = "give the dataset that it was trained on, --dataset=NAME, or its folder or meta file"
    remedy = f"add a {TOKENIZER} or {other}"
    spec = None
    if name:
        place = DATA_ROOT / str(name)
        if not place.exists() and Path(str(name)).exists():
            place = Path(str(name))
        spec = read_meta(place).tokenizer
        remedy = f"put its data folder, with its meta.pkl, at {place}, or {other}"
    if own is not None:
        if spec is None or not same_ids(own, spec):
            remedy = "name the dataset that it was trained on, or none"
            raise UserError(f"{source} has another tokenizer than --dataset={dataset}; {remedy}")
        spec = own
    if spec:
        count = check_spec(spec, str(place))
        if spec["kind"] == "char" and count != vocab_size:
            has = f"the dataset now in {place} has {count}"
            raise UserError(f"{source} knows {vocab_size} characters, but {has}; {other}")
        check_spec(spec, str(place), vocab_size)
        return spec
    if dataset is None and vocab_size in (50257, 50304):  # GPT-2's, and as nanoGPT pads it
        return {"kind": "tiktoken", "name": "gpt2"}
    problem = f"nothing says what text its {vocab_size} token ids stand for"
    raise UserError(f"{source}: {problem}; {remedy}")


def is_mask_buffer(name: str) -> bool:
    """Whether this is one of GPT-2's old buffers for the causal mask, which are no weights."""
    return name.endswith((".attn.bias", ".attn.masked_bias"))


def _plain_name(name: str) -> str:
    """A parameter's name without what torch.compile and DDP put before it."""
    for prefix in ("_orig_mod.", "module.", "_orig_mod."):
        name = name.removeprefix(prefix)
    return name


def _fill_ties(state: dict[str, Tensor], config: GPTConfig) -> None:
    """
    Add the second names of weights that are tied in the model and stored once.

    Raises ValueError if lm_head and wte are stored both and differ, but should be tied.
    """
    wte = state.get("transformer.wte.weight")
    if config.tie_weights and wte is not None:
        head = state.setdefault("lm_head.weight", wte)
        if head.data_ptr() != wte.data_ptr() and not torch.equal(head, wte):
            problem = "lm_head and wte are different weights"
            raise ValueError(f"{problem}; with tie_weights=True they must be one")
    if config.mla_share_latent:
        for name in [n for n in state if ".h.0.attn.kv_latent_proj." in n]:
            for layer in range(1, config.n_layer):
                state.setdefault(name.replace(".h.0.", f".h.{layer}."), state[name])
