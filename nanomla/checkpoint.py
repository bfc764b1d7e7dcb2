"""
A run's checkpoints: what is in them, and how they are written, read and made into models.

A file holds nanoGPT's dictionary plus a few keys of ours; all of them are fields of Checkpoint. It
holds tensors and plain values only and is read with weights_only=True, so that opening it runs no
code.
out_dir/ckpt.pt is the latest state, for resuming; out_dir/best.pt had the lowest validation loss.
"""

import contextlib
import dataclasses
import enum
import math
import os
import pickle
import shutil
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from model import GPT, GPTConfig
from nanomla.checks import Natural, brief, check
from nanomla.convert import factorise_values
from nanomla.dataset import DATA_ROOT, read_meta
from nanomla.errors import UserError
from nanomla.files import one_line, require_file
from nanomla.tokenizer import check_spec

FORMAT = 1  # written beside the fields of Checkpoint; nanoGPT's checkpoints have none
LATEST, BEST = "ckpt.pt", "best.pt"
LARGEST_PICKLE = 2**26  # bytes without tensors; the tokenizer of a large vocabulary has 35 MB
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

    All fields but `source` are the keys on disk. Weights that do not come from a run
    (nanomla/formats.py) have model, model_args and tokenizer; the other fields keep their defaults.
    Raises ValueError for a value of another type.
    """

    model: dict[str, Tensor]  # the state dict
    model_args: dict[str, Any]  # the fields of GPTConfig
    optimizer: dict[str, Any] | None = None  # as nanomla.optim.optimizer_state returns it
    scaler: dict[str, Any] | None = None  # the state of float16's GradScaler
    iter_num: Annotated[Natural, Field(le=10**15)] = 0  # iterations done
    best_val_loss: float = math.inf  # nats per token
    config: dict[str, Any] = field(default_factory=dict)  # the run's settings by name
    tokenizer: dict[str, Any] | None = None  # what nanomla.tokenizer.Tokenizer is made from
    wandb_run_id: str | None = None
    source: str = ""  # what messages call it: a file, folder or name; not written

    def __post_init__(self) -> None:
        check(self)


def save(out_dir: str | Path, checkpoint: Checkpoint, best: bool) -> None:
    """
    Write out_dir/ckpt.pt and, if best, out_dir/best.pt: whole or not at all, and durably.

    The bytes go to a temporary file and are synced, then the file is renamed to ckpt.pt. best.pt is
    the same file under a second name. It gets that name first, so that a kill between the two steps
    does not lose the best weights. Raises UserError, with the old files untouched, if there is too
    little space, a value cannot be stored or the write fails.

    Of model_args, what has GPTConfig's default is left out unless nanoGPT has it, so that nanoGPT
    opens its own kind of model. So a default that changes is a new FORMAT.
    """
    folder = Path(out_dir)
    tmp = _temporary(folder / LATEST)
    content = {"format": FORMAT, **vars(checkpoint)}
    del content["source"]
    for name in content.keys() - {"model"}:
        content[name] = _plain(content[name], name)
    defaults = {f.name: f.default for f in dataclasses.fields(GPTConfig)}
    content["model_args"] = {
        name: value
        for name, value in content["model_args"].items()
        if name in NANOGPT_ARGS or name not in defaults or value != defaults[name]
    }
    try:
        for name in (LATEST, BEST):
            if (folder / name).is_dir():
                raise UserError(f"no checkpoint written: {folder / name} is a folder")
        # A killed run may have left this name. It is removed first: the file may also be best.pt,
        # which must not be written to, and it takes up space.
        tmp.unlink(missing_ok=True)
        needed, free = _tensor_bytes(content), shutil.disk_usage(folder).free
        if free < 1.05 * needed:
            sizes = f"it needs {needed / 1e6:.0f} MB, {folder} has {free / 1e6:.0f} MB free"
            raise UserError(f"no checkpoint written: {sizes}")
        with open(tmp, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        if best:
            _link_or_copy(tmp, folder / BEST)
        os.replace(tmp, folder / LATEST)
        _sync_folder(folder)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        reason = getattr(error, "strerror", None) or one_line(error)
        raise UserError(f"no checkpoint written to {folder}: {reason}") from None
    finally:  # also after Ctrl-C
        for unfinished in (tmp, _temporary(folder / BEST)):
            with contextlib.suppress(OSError):
                unfinished.unlink()


def _temporary(path: Path) -> Path:
    """The name that this process writes a file under before it gets its own."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def remove_leftovers(folder: str | Path) -> None:
    """Remove the unfinished checkpoints of killed runs; the caller must hold the run's lock."""
    for name in (LATEST, BEST):
        for unfinished in Path(folder).glob(f".{name}.*tmp"):
            with contextlib.suppress(OSError):  # a folder of that name stays
                unfinished.unlink()


def _plain(value: Any, name: str) -> Any:
    """
    A value as None, bool, int, float, str, list, tuple and dict of exactly these types, which
    torch.load reads with weights_only=True. Tensors stay. Raises UserError naming what has no such
    value.
    """
    if isinstance(value, enum.Enum):
        value = value.value
    elif isinstance(value, os.PathLike):
        value = os.fspath(value)
    if value is None or isinstance(value, (bool, Tensor)):
        return value
    for kind in (int, float, str):
        if isinstance(value, kind):
            return getattr(kind, f"__{kind.__name__}__")(value)  # int() would ask the subclass
    if isinstance(value, dict):
        keys = [_plain(key, f"a key of {name}") for key in value]
        values = [_plain(inner, f"{name}[{key!r}]") for key, inner in value.items()]
        return dict(zip(keys, values, strict=True))
    if isinstance(value, (list, tuple)):
        plain = [_plain(inner, f"{name}[{i}]") for i, inner in enumerate(value)]
        return plain if isinstance(value, list) else tuple(plain)
    if hasattr(value, "tolist"):  # numpy's numbers and arrays
        return _plain(value.tolist(), name)
    kind = type(value).__name__
    raise UserError(f"no checkpoint written: {name}={brief(value)} is of type {kind}")


def keep_as_best(out_dir: str | Path) -> None:
    """Give out_dir/ckpt.pt the second name best.pt. Raises OSError if that is impossible."""
    _link_or_copy(Path(out_dir) / LATEST, Path(out_dir) / BEST)


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
        _check_archive(path, verify)
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
    missing = [k for k in needed if not isinstance(content, dict) or k not in content]
    if missing:
        lacks = " and no ".join(missing)
        raise UserError(f"{path}: not a nanoMLA or nanoGPT checkpoint, it has no {lacks}")
    names = [f.name for f in dataclasses.fields(Checkpoint) if f.name != "source"]
    values = {k: content[k] for k in names if k in needed or content.get(k) is not None}
    try:
        has = content.get("format", FORMAT)
        if type(has) is not int or has != FORMAT:
            raise ValueError(f"format {brief(has)}, this version reads {FORMAT}")
        return Checkpoint(**values, source=str(path))
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path}: not a nanoMLA or nanoGPT checkpoint ({error})") from None


def _check_archive(path: str | Path, verify: bool) -> None:
    """
    Hold a zip archive, which torch.save writes, against itself: what its members say of their place
    and size and, with verify, their checksums.

    Raises ValueError or zipfile.BadZipFile.
    """
    with open(path, "rb") as file:
        if file.read(4) != b"PK\x03\x04":  # what torch.load goes by
            raise ValueError("it does not begin as what torch.save writes")
        with zipfile.ZipFile(file) as archive:
            members = sorted(archive.infolist(), key=lambda member: member.header_offset)
            ends = [member.header_offset for member in members[1:]] + [os.path.getsize(path)]
            for member, end in zip(members, ends, strict=True):
                name, size = member.filename, member.file_size
                if member.compress_type != zipfile.ZIP_STORED or size != member.compress_size:
                    raise ValueError(f"{name} is compressed")
                if member.header_offset + size > end:
                    raise ValueError(f"{name} is larger than its place in the file")
                if name.endswith("data.pkl") and size > LARGEST_PICKLE:
                    raise ValueError(f"{name} is larger than {LARGEST_PICKLE / 1e6:.0f} MB")
            for member in members if verify else ():
                with archive.open(member) as content:
                    while content.read(2**20):  # the last one raises BadZipFile
                        pass


def find(out_dir: str | Path, prefer_best: bool = False) -> Path:
    """The checkpoint file to read in a run's folder. Raises UserError if there is none."""
    names = (BEST, LATEST) if prefer_best else (LATEST, BEST)
    for name in names:
        if os.path.isfile(Path(out_dir) / name):  # False also where the system refuses to look
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
    try:
        if stored.use_svd and overrides.get("svd_rank", stored.svd_rank) is None:
            del overrides["svd_rank"]  # None means full rank only where there is none yet
        config = dataclasses.replace(stored, **overrides)
        state = {_plain_name(k): v for k, v in checkpoint.model.items() if not is_mask_buffer(k)}
        _check_sizes(stored, state, checkpoint.source)
        note = None
        if config.use_svd and (not stored.use_svd or config.svd_rank != stored.svd_rank):
            state, kept = factorise_values(state, config)
            ranks = f"rank {config.svd_rank} of {config.hs}"
            note = f"values factorised to {ranks}: {kept:.2%} of the squared singular values kept"
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{checkpoint.source}: {one_line(error)}") from None
    with torch.device("meta"):  # takes no memory and draws no weights, as all of them are replaced
        model = GPT(config)
    load_state(model, state, checkpoint.source)
    return model, note


def stored_config(checkpoint: Checkpoint) -> GPTConfig:
    """The settings of a checkpoint's model. Raises UserError for some that do not work."""
    args = checkpoint.model_args
    fields = {f.name for f in dataclasses.fields(GPTConfig)}
    unknown = sorted(name for name in args if name not in fields and not _neutral(args[name]))
    if unknown:
        problem = "model_args has settings this version does not know"
        raise UserError(f"{checkpoint.source}: {problem}: {one_line(', '.join(unknown))}")
    try:
        return GPTConfig(**{name: args[name] for name in args if name in fields})
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{checkpoint.source}: {one_line(error)}") from None


def _neutral(value: Any) -> bool:
    """Whether a setting that is not known leaves something out, as far as its value tells."""
    plain = isinstance(value, (bool, int, float, str, list, tuple, dict, type(None)))
    return plain and (not value or value == "none")


def load_state(model: GPT, state: dict[str, Tensor], source: str) -> None:
    """
    Give a model copies of these weights, in torch's default dtype.

    Raises UserError naming what is missing, unknown or of another shape, or the first tensor that
    holds a NaN or an infinity. Looking for those takes a tenth of the time of the copies.
    """
    own = model.state_dict()
    _compare({name: tensor.shape for name, tensor in own.items()}, state, source)
    # Copies, because the tensors may be mapped from a file or be views of one another.
    plain = {"dtype": torch.get_default_dtype(), "memory_format": torch.contiguous_format}
    copies = {name: state[name].detach().to(copy=True, **plain) for name in own}
    for name, tensor in copies.items():
        if not torch.stack(tensor.aminmax()).isfinite().all():  # NaN is both of what holds one
            raise UserError(f"{source}: {name} holds values that are not finite (NaN or infinity)")
    model.load_state_dict(copies, assign=True)
    model.tie_weights()


def _check_sizes(config: GPTConfig, state: dict[str, Tensor], source: str) -> None:
    """
    Raise UserError if the settings are not those of the weights, before a model is built from them:
    blocks take memory even without weights, and so do the tables of rotary positions. Adds the
    second names of tied weights.
    """
    for name, tensor in state.items():
        if tensor.layout != torch.strided or tensor.is_meta or not tensor.is_floating_point():
            raise UserError(f"{source}: {one_line(name)} holds no plain floating-point numbers")
        if not 0 < tensor.nbytes <= tensor.untyped_storage().nbytes():
            raise UserError(f"{source}: {one_line(name)} is empty or larger than what is stored")
    layers = {name.split(".")[2] for name in state if name.startswith("transformer.h.")}
    if len(layers) != config.n_layer:
        has = f"there are weights of {len(layers)} layers"
        raise UserError(f"{source}: n_layer={config.n_layer}, but {has}")
    _fill_ties(state, config)
    widest = max((size for tensor in state.values() for size in tensor.shape), default=0)
    if config.rotary_dim > widest:
        sizes = f"a rotary width of {config.rotary_dim}, but its weights are at most {widest} wide"
        raise UserError(f"{source}: the settings ask for {sizes}")
    if config.pos_emb == "rope" and config.block_size > LONGEST_CONTEXT:
        limit = f"at most {LONGEST_CONTEXT} rotary positions are supported"
        raise UserError(f"{source}: block_size={config.block_size}, but {limit}; use a lower one")
    try:
        with torch.device("meta"):
            small = GPT(dataclasses.replace(config, block_size=1)).state_dict()
    except (RuntimeError, TypeError):  # sizes that do not fit 64 bits
        raise UserError(f"{source}: its settings have sizes that no tensor can have") from None
    wanted: dict[str, tuple[int, ...]] = {name: tensor.shape for name, tensor in small.items()}
    if config.pos_emb == "learned":
        wanted["transformer.wpe.weight"] = (config.block_size, config.n_embd)
    _compare(wanted, state, source)


def _compare(wanted: dict[str, tuple[int, ...]], state: dict[str, Tensor], source: str) -> None:
    """Raise UserError naming what is missing, unknown or of another shape than wanted."""
    missing, unknown = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    kinds = {"missing": missing, "unknown": unknown}
    if missing or unknown:
        named = [f"{len(n)} {kind} (first {one_line(n[0])})" for kind, n in kinds.items() if n]
        raise UserError(f"{source}: its weights are of another model: {', '.join(named)}")
    for name, shape in wanted.items():
        if shape != state[name].shape:
            shapes = f"has shape {tuple(state[name].shape)}, expected {tuple(shape)}"
            raise UserError(f"{source}: {name} {shapes}")


def tokenizer_spec(checkpoint: Checkpoint, dataset: str | None = None) -> dict[str, Any]:
    """
    The spec of a checkpoint's tokenizer.

    nanoGPT's checkpoints name their dataset only. Its characters are then read from its meta file
    below data/; without one, a vocabulary of GPT-2's size means GPT-2's BPE.
    dataset: where to read the characters instead: a name below data/, a folder, or a meta file.
    Raises UserError if there is nothing that turns ids into text, or if it is not the model's.
    """
    source, own = checkpoint.source, checkpoint.tokenizer
    vocab_size = checkpoint.model_args.get("vocab_size", GPTConfig.vocab_size)
    if own is not None and dataset is None:
        check_spec(own, source, vocab_size)
        return own
    name = checkpoint.config.get("dataset") if dataset is None else dataset
    place = None if name is None else DATA_ROOT / str(name)
    if place and not place.exists() and Path(str(name)).exists():
        place = Path(str(name))
    spec = read_meta(place).tokenizer if place else None
    if own is not None and own != spec:
        raise UserError(f"{source} has a tokenizer of its own; leave out --dataset={dataset}")
    other = "give the dataset that it was trained on, --dataset=NAME, or its folder or meta file"
    if spec:
        check_spec(spec, str(place))
        chars = spec["chars"] if spec["kind"] == "char" else ""
        if (chars or dataset is not None) and len(chars) != vocab_size:
            has = f"the dataset now in {place} has {len(chars) or 'no alphabet'}"
            raise UserError(f"{source} knows {vocab_size} characters, but {has}; {other}")
        check_spec(spec, str(place), vocab_size)
        return spec
    if dataset is None and vocab_size in (50257, 50304):  # GPT-2's, and as nanoGPT pads it
        return {"kind": "tiktoken", "name": "gpt2"}
    remedy = f"add a {TOKENIZER} or {other}"
    if place:
        remedy = f"put its data folder, with its meta.pkl, at {place}, or {other}"
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
        same = head.dtype == wte.dtype and head.shape == wte.shape
        if same and not torch.equal(head, wte):  # NaN, which load_state names, equals nothing
            same = torch.equal(head.nan_to_num(), wte.nan_to_num())
        if not same:
            problem = "lm_head and wte are different weights"
            raise ValueError(f"{problem}; with tie_weights=True they must be one")
    if config.mla_share_latent:
        for name in [n for n in state if ".h.0.attn.kv_latent_proj." in n]:
            for layer in range(1, config.n_layer):
                state.setdefault(name.replace(".h.0.", f".h.{layer}."), state[name])


def _tensor_bytes(value: Any) -> int:
    """The bytes of all tensors in nested dictionaries and lists."""
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, dict):
        return sum(map(_tensor_bytes, value.values()))
    return sum(map(_tensor_bytes, value)) if isinstance(value, (list, tuple)) else 0


def _link_or_copy(file: Path, name: Path) -> None:
    """Give `file` a second name, replacing what has it; a copy where hard links do not work."""
    tmp = _temporary(name)
    tmp.unlink(missing_ok=True)
    try:
        os.link(file, tmp)
    except OSError:
        shutil.copyfile(file, tmp)
        with open(tmp, "rb") as copy:
            os.fsync(copy.fileno())
    os.replace(tmp, name)


def _sync_folder(folder: Path) -> None:
    """Make renames durable, where folders can be synced."""
    if hasattr(os, "O_DIRECTORY"):
        fd = os.open(folder, os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
