"""
Folders of weights: config.json, safetensors in one file or in pieces, tokenizer files and a card.
"""

import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor

from model import GPT
from nanomla.bpe import gpt2_tables
from nanomla.checkpoint import TOKENIZER, Checkpoint, is_mask_buffer
from nanomla.checks import Text, brief, fits
from nanomla.costs import cached_numbers
from nanomla.errors import UserError
from nanomla.files import one_line, put_back, read_json, replacing, require_file, write_text
from nanomla.formats.base import MARK, Tensors
from nanomla.tokenizer import (
    BYTE_LETTERS,
    HF_TOKENIZER,
    Tokenizer,
    check_spec,
    end_of_text,
    read_hf,
    start_of_text,
)

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
HF_TOKENIZER_CONFIG = "tokenizer_config.json"
EXPORT_FILES = {
    CONFIG, WEIGHTS, CARD, TOKENIZER, HF_TOKENIZER, HF_TOKENIZER_CONFIG,
    "vocab.json", "merges.txt",  # of exports by earlier versions
}


# ---- Reading


def download(name: str) -> Path:
    """
    The folder in Hugging Face's cache with config.json and the safetensors of a GPT-2, downloaded
    if they are not there. No pickle is downloaded.
    """
    import huggingface_hub

    repository = f"openai-community/{name}"
    files = [CONFIG, "model*.safetensors", "model*.safetensors.index.json"]
    huggingface_hub.logging.set_verbosity_error()  # otherwise every retry prints a line
    try:
        return Path(huggingface_hub.snapshot_download(repository, allow_patterns=files))
    except Exception as error:  # noqa: BLE001  network, proxy, disk and cache errors
        reason = f"{type(error).__name__}: {one_line(error)[:150]}"
        problem = f"{name} cannot be had from the Hugging Face hub ({reason})"
        remedy = f"download {CONFIG} and {WEIGHTS} of {repository} elsewhere and give their folder"
        raise UserError(f"{problem}; {remedy}: --init_from=FOLDER") from None


def read_tensors(folder: Path) -> Tensors:
    """
    All tensors in a folder's model.safetensors, or in the pieces that its index lists.

    Raises UserError naming a file that is missing or damaged, or a tensor that is quantised.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    index = folder / f"{WEIGHTS}.index.json"
    files = {WEIGHTS}
    if index.exists() and not (folder / WEIGHTS).exists():
        files = _indexed_files(index)
    tensors = {}
    for file in sorted(files):
        try:
            require_file(folder / file)
            tensors |= load_file(folder / file)
        except FileNotFoundError:
            problem = f"{folder}: no {file} in this folder"
            if (folder / "pytorch_model.bin").exists():
                remedy = "save the model with safetensors"
                problem += f"; pytorch_model.bin is a pickle and not read, {remedy}"
            raise UserError(problem) from None
        except (SafetensorError, OSError) as error:
            reason = one_line(error)[:100]
            raise UserError(f"{folder / file}: truncated or not safetensors ({reason})") from None
    for name, tensor in tensors.items():
        quantised = not tensor.is_floating_point() or tensor.element_size() < 2  # int8, float8
        if quantised and not is_mask_buffer(name):
            problem = f"{one_line(name)} is {tensor.dtype}; quantised weights cannot be read"
            raise UserError(f"{folder}: {problem}")
    return tensors


def _indexed_files(index: Path) -> set[str]:
    """The names of the files that a model.safetensors.index.json lists."""
    weight_map = read_json(index).get("weight_map")
    if not fits(weight_map, dict[str, Text]) or not weight_map:
        problem = "weight_map must be an object with the file of each tensor"
        raise UserError(f"{index}: weight_map={brief(weight_map)} does not work: {problem}")
    return set(weight_map.values())


def read_tokenizer(folder: Path) -> dict[str, Any] | None:
    """The spec of a folder's tokenizer, ours or Hugging Face's; None if it has none."""
    path = folder / TOKENIZER
    if path.exists():
        spec = read_json(path)
    elif (folder / HF_TOKENIZER).exists():
        path = folder / HF_TOKENIZER
        spec = read_hf(path)
    else:
        return None
    check_spec(spec, str(path))
    return spec


# ---- Writing


def check_target(folder: Path) -> None:
    """Raise UserError if --to names a folder with anything but an earlier export in it."""
    put_back(Path(os.path.realpath(folder)))  # an export that was killed
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"--to={folder} is a file; name a folder")
    names = {path.name for path in folder.iterdir()}
    if not names:
        return
    try:
        exported = read_json(folder / CONFIG).items() >= MARK.items()
    except UserError:
        exported = False
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
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    folder = Path(os.path.realpath(folder))  # also of a link to itself, which cannot be written
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with replacing(folder) as new:
            new.mkdir()
            for name, text in texts.items():
                write_text(new / name, text)
            weights = new / WEIGHTS
            save_file(tensors, weights, metadata={"format": "pt"})  # transformers requires this
            # safetensors makes its file readable by the owner alone
            weights.chmod((new / CONFIG).stat().st_mode)
    except (OSError, SafetensorError) as error:
        raise UserError(f"nothing exported to {folder}: {error}") from None


def tokenizer_files(spec: dict[str, Any]) -> dict[str, str]:
    """
    The content of the files, by name, that transformers' AutoTokenizer reads a tokenizer from.

    They have the same ids, and the same text for them. Raises UserError if there is no such file
    for this tokenizer, or if what it needs is not on this machine.
    """
    if spec.get("kind") == "hf":
        opened = Tokenizer(spec).hf
        text = spec["json"]
    else:
        opened = _as_hf(spec)
        text = opened.to_str(pretty=True)
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for name, token in (("bos_token", start_of_text(spec)), ("eos_token", end_of_text(spec))):
        token_text = None
        if token is not None:
            token_text = opened.id_to_token(token)
        if token_text is not None:
            about[name] = token_text
    return {HF_TOKENIZER: text, HF_TOKENIZER_CONFIG: as_json(about)}


def _as_hf(spec: dict[str, Any]) -> Any:
    """
    A tokenizer of Hugging Face with the ids of ours. Its single tokens are characters, which it
    must not read as bytes, or bytes in the letters of byte-level BPE.
    """
    try:
        from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
        from tokenizers import Tokenizer as HF
    except ImportError:
        raise UserError("it needs Hugging Face tokenizers: pip install tokenizers") from None
    if spec["kind"] == "char":
        ids = {char: i for i, char in enumerate(spec["chars"])}
        made = HF(models.WordLevel(ids, unk_token="<unk>"))  # which is no token: an error
        made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        made.decoder = decoders.Fuse()
        return made
    if spec["kind"] == "byte":
        ids = {letter: byte for byte, letter in enumerate(BYTE_LETTERS)}
        merges = []
    elif spec["name"] == "gpt2":
        ids, merges = gpt2_tables()
    else:
        raise UserError(f"there is no list of {spec['name']}'s merges")
    made = HF(models.BPE(ids, merges))
    words = spec["kind"] != "byte"  # GPT-2's regular expression cuts a text into words
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words)
    made.decoder = decoders.ByteLevel()
    if words:
        made.add_special_tokens([AddedToken("<|endoftext|>", normalized=False)])
    return made


# ---- The model card


def model_card(
    model: GPT, stored: Checkpoint, kind: str, why: str, origin: dict[str, str], commands: list[str]
) -> str:
    """
    The text of an export's README.md: metadata for the hub, what the model is, where it comes from.

    kind, why: the format, and the reason for it. origin: rows on the conversion that made it, if
    one did. commands: what the model was made with.
    """
    config = model.config
    library = "nanomla"
    use = ["python sample.py --init_from=FOLDER"]
    if kind != "nanomla":
        library = "transformers"
        use.append("transformers.AutoModelForCausalLM.from_pretrained(FOLDER)")
    tags = dict.fromkeys(("nanomla", kind, config.attention_name))  # each once, in this order
    lines = ["---", f"library_name: {library}", "pipeline_tag: text-generation", "tags:"]
    lines += [f"- {tag}" for tag in tags]
    lines += ["---", "", "# A GPT exported by nanoMLA", "", "| | |", "|---|---|"]
    facts = _facts(model, stored, kind, why, origin)
    lines += [f"| {name} | {value} |" for name, value in facts.items()]
    lines += ["", "## Made with", ""]
    lines += [f"    {command}" for command in commands]
    lines += ["", "## Open it", ""]
    lines += [f"    {line}" for line in use]
    lines += ["", "## Settings", ""]
    lines += [f"    {name} = {value!r}" for name, value in vars(config).items()]
    return "\n".join([*lines, ""])


def _facts(
    model: GPT, stored: Checkpoint, kind: str, why: str, origin: dict[str, str]
) -> dict[str, str]:
    """The rows of a model card."""
    config = model.config
    numbers = cached_numbers(model)
    if numbers:
        fewer = f"{model.get_memory_savings(1):.3g}x fewer than MHA of this width"
        cache = f"{numbers:,g} numbers per token and layer, {fewer}"
    else:
        cache = f"a state of {model.make_cache(1, 1).nbytes:,} bytes, whatever the context"
    facts = {
        "format": f"{kind}: {why}",
        "parameters": f"{model.get_num_params(non_embedding=False):,}",
        "cache": cache,
        "context": f"{config.block_size:,} tokens",
        "vocabulary": f"{config.vocab_size:,} ids",
        **origin,
    }
    if stored.config.get("dataset"):
        facts["data"] = stored.config["dataset"]
    if stored.iter_num:
        facts["iterations"] = f"{stored.iter_num:,}"
    if stored.best_val_loss < float("inf"):
        facts["best validation loss"] = f"{stored.best_val_loss:.4f} nats per token"
    return facts
