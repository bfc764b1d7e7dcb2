"""Tokenizers, each built from the plain spec that meta.json and checkpoints carry."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nanomla.bpe import MERGES, TABLES, load_encoding
from nanomla.checks import Natural, Several, brief, fits, require
from nanomla.errors import UserError
from nanomla.files import one_line, parse_json, read_json
from nanomla.prepare import sha256

HF_TOKENIZER = "tokenizer.json"
HF_SETTINGS = ("config.json", "generation_config.json")  # beside it, with the ids of an end
KINDS = ("char", "byte", "tiktoken", "hf")
TIKTOKEN_SIZES = {"gpt2": 50257, "cl100k_base": 100277, "o200k_base": 200019}
TIKTOKEN_ENDS = {"gpt2": 50256, "cl100k_base": 100257, "o200k_base": 199999}
DECODERS = ("ByteLevel", "ByteFallback", "Metaspace", "Replace", "Fuse", "Strip")

# Byte-level BPE writes a byte as one visible letter: as itself where it is one in Latin-1, and as
# the letters from 256 on otherwise.
VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = [byte for byte in range(256) if byte not in VISIBLE]
LETTER_BYTES = {chr(byte): byte for byte in VISIBLE}
LETTER_BYTES |= {chr(256 + i): byte for i, byte in enumerate(OTHERS)}
BYTE_LETTERS = sorted(LETTER_BYTES, key=LETTER_BYTES.get)


def ends_of_text(spec: dict[str, Any] | None) -> tuple[int, ...]:
    """The ids any of which ends a text in this tokenizer; () if it has none or none is known."""
    if not spec:
        return ()
    end = spec.get("end")
    if end is None and spec.get("kind") == "tiktoken":
        end = TIKTOKEN_ENDS.get(spec.get("name"))
    if end is None:
        return ()
    if isinstance(end, list):
        return tuple(end)
    return (end,)


def end_of_text(spec: dict[str, Any] | None) -> int | None:
    """The first of the ids that end a text, which stands between two texts; None without one."""
    ends = ends_of_text(spec)
    return ends[0] if ends else None


def same_ids(spec: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two specs give every text the same ids; where a text ends may differ."""
    return {**spec, "end": None} == {**other, "end": None}


def start_of_text(spec: dict[str, Any] | None) -> int | None:
    """The id that begins a text; tiktoken's encodings begin one with the end of the text before."""
    if spec and spec.get("kind") == "hf":
        return spec.get("bos")
    return end_of_text(spec)


def check_spec(spec: Any, source: str = "", vocab_size: int | None = None) -> int:
    """
    Check a tokenizer's spec, which may come from anywhere.

    source: the file or checkpoint that it comes from, for the error. vocab_size: that of its model,
    which may have more ids than the tokenizer, but not fewer.
    Returns the number of the tokenizer's ids. Raises UserError.
    """
    try:
        count = _count_ids(spec)
        if vocab_size is not None and count > vocab_size:
            problem = f"the tokenizer has ids up to {count - 1}, the model only {vocab_size=}"
            raise ValueError(f"{problem}; they do not belong together")
    except (TypeError, ValueError, UserError) as error:
        raise UserError(f"{_prefix(source)}{one_line(error)}") from None
    return count


def _prefix(source: str) -> str:
    if source:
        return f"{source}: "
    return ""


def _count_ids(spec: Any) -> int:
    """The number of ids of a tokenizer, from its spec alone. Raises an error if it is none."""
    kind = None
    if isinstance(spec, dict):
        kind = spec.get("kind")
    if kind not in KINDS:
        raise ValueError(f"unknown tokenizer {brief(spec)}; known kinds: {', '.join(KINDS)}")
    end = spec.get("end")
    valid = fits(end, Natural | Several[Natural] | None)
    require(valid, "end", end, "the id that ends a text, or a list of such ids")
    if kind == "char":
        chars = spec.get("chars")
        unique = isinstance(chars, str) and 0 < len(chars) == len(set(chars))
        require(unique, "chars", chars, "a text that has every character once")
        return len(chars)
    if kind == "byte":
        return 256
    if kind == "tiktoken":
        name = spec.get("name")
        encodings = ", ".join(TIKTOKEN_SIZES)
        require(name in TIKTOKEN_SIZES, "name", name, f"an encoding, one of {encodings}")
        return TIKTOKEN_SIZES[name]
    text = spec.get("json")
    require(isinstance(text, str), "json", text, f"the text of a {HF_TOKENIZER}")
    return _count_hf(parse_json(text, HF_TOKENIZER), HF_TOKENIZER)


class Tokenizer:
    """
    Text to ids and back.

    spec: {"kind": "char", "chars": ...}, {"kind": "byte"}, {"kind": "tiktoken", "name": "gpt2"} or
    {"kind": "hf", "json": the text of a tokenizer.json, "end": the id that ends a text, or a list
    of several, "bos": the id that begins one}; the last two are left out where they are not known.
    source: the file or checkpoint that it comes from, for errors.
    Raises UserError for a spec that is none of these.
    """

    def __init__(self, spec: dict[str, Any], source: str = "") -> None:
        self.vocab_size = check_spec(spec, source)
        self.spec = spec
        self.kind = spec["kind"]
        if self.kind == "char":
            self.chars: str = spec["chars"]
            self.ids = {char: i for i, char in enumerate(self.chars)}
        elif self.kind == "tiktoken":
            self.bpe = load_encoding(spec["name"])
        elif self.kind == "hf":
            self.hf, self.decoders = _open_hf(spec["json"], source)
            self.added = self.hf.get_added_tokens_decoder()  # tokens by id

    def encode(self, text: str) -> list[int]:
        """
        Text as ids. Raises UserError for a character outside a char vocabulary, or that UTF-8 does
        not have; Python reads bytes that are not UTF-8 as such characters.

        A tokenizer of Hugging Face puts before them what its models expect at the start of a text.
        """
        try:
            raw = text.encode("utf-8")
        except UnicodeEncodeError as error:
            wrong = f"{text[error.start]!r} at character {error.start}"
            raise UserError(f"the text is not UTF-8: it has {wrong}") from None
        if self.kind == "byte":
            return list(raw)
        if self.kind == "tiktoken":
            return self.bpe.encode(text, allowed_special="all")
        if self.kind == "hf":
            return self.hf.encode(text).ids
        try:
            return [self.ids[char] for char in text]
        except KeyError as missing:
            raise UserError(
                f"the character {missing.args[0]!r} is not in this model's vocabulary of "
                f"{self.vocab_size} characters"
            ) from None

    def token_bytes(self, token: int) -> bytes:
        """
        The UTF-8 bytes of one token.

        Ids past the vocabulary have none; a model can draw one if its lm_head is padded.
        """
        if not 0 <= token < self.vocab_size:
            return b""
        if self.kind == "char":
            return self.chars[token].encode("utf-8", "surrogatepass")
        if self.kind == "byte":
            return bytes([token])
        if self.kind == "hf":
            return self._hf_bytes(token)
        try:
            return self.bpe.decode_single_token_bytes(token)
        except KeyError:  # cl100k_base skips ids between its ordinary and its special tokens
            return b""

    def _hf_bytes(self, token: int) -> bytes:
        text = self.hf.id_to_token(token)
        if text is None:  # ids may have gaps
            return b""
        added = self.added.get(token)
        for decoder in self.decoders:
            kind = decoder["type"]
            if kind == "ByteFallback" and re.fullmatch("<0x[0-9A-Fa-f]{2}>", text):
                return bytes([int(text[3:5], 16)])
            if added is not None and (added.special or kind == "ByteLevel"):
                continue  # a special token keeps its name; an added one has letters, not bytes
            if kind == "ByteLevel" and all(letter in LETTER_BYTES for letter in text):
                return bytes(LETTER_BYTES[letter] for letter in text)
            if kind == "Metaspace":
                text = text.replace(decoder["replacement"], " ")
            elif kind == "Replace":
                text = text.replace(decoder["pattern"]["String"], decoder["content"])
        return text.encode("utf-8")

    def decode(self, ids: Iterable[int]) -> str:
        """
        Ids as text. U+FFFD stands for bytes that are not UTF-8.

        The ids go on from earlier text: a space that some tokenizers put before the first word of a
        text stays.
        """
        return b"".join(self.token_bytes(i) for i in ids).decode("utf-8", "replace")


# ---- Hugging Face's tokenizer.json


def _count_hf(content: dict[str, Any], source: str) -> int:
    """One more than the largest id in a tokenizer.json, added tokens with it."""
    try:
        vocab = content["model"]["vocab"]
        if isinstance(vocab, dict):
            ids = list(vocab.values())
        else:  # a list, of a Unigram model
            ids = list(range(len(vocab)))
        ids += [token["id"] for token in content.get("added_tokens") or ()]
        return max(ids) + 1
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {str(error)[:90]!r}"
        raise UserError(f"{source}: not a tokenizer of Hugging Face ({reason})") from None


def read_hf(path: Path) -> dict[str, Any]:
    """
    The spec of the tokenizer in a tokenizer.json. The ids that begin and end a text are those in
    the config.json and the generation_config.json beside it: any that one of them has is an end.

    Raises UserError naming the file if it is missing or no tokenizer.
    """
    content = read_json(path)
    count = _count_hf(content, str(path))
    spec = {"kind": "hf", "json": path.read_bytes().decode("utf-8")}
    if count == TIKTOKEN_SIZES["gpt2"] and _has_gpt2s_merges(content):
        spec = {"kind": "tiktoken", "name": "gpt2"}  # the same ids as those of data/
    ends = []
    beginnings = []
    for file in HF_SETTINGS:
        if path.with_name(file).exists():
            settings = read_json(path.with_name(file))
            ends += _ids(settings.get("eos_token_id"), count)
            beginnings += _ids(settings.get("bos_token_id"), count)
    ends = tuple(dict.fromkeys(ends))  # each once
    if len(ends) > 1:
        spec["end"] = list(ends)
    elif ends and ends != ends_of_text(spec):  # which GPT-2's has without being told
        spec["end"] = ends[0]
    if beginnings and spec["kind"] == "hf":
        spec["bos"] = beginnings[0]
    return spec


def _ids(value: Any, count: int) -> list[int]:
    """The ids below count in a setting that holds one, several in a list, or anything else."""
    values = value if isinstance(value, list) else [value]
    return [token for token in values if fits(token, Natural) and token < count]


def _has_gpt2s_merges(content: dict[str, Any]) -> bool:
    """Whether a tokenizer.json has the merges of OpenAI's table, each a text or a pair."""
    lines = ["#version: 0.2"]
    for merge in content["model"].get("merges") or ():
        if isinstance(merge, list):
            merge = " ".join(merge)
        lines.append(merge)
    return sha256("\n".join([*lines, ""]).encode()) == TABLES["gpt2"][MERGES]


def _open_hf(text: str, source: str) -> tuple[Any, list[dict[str, Any]]]:
    """
    The tokenizer in the text of a tokenizer.json, and the steps that turn its tokens into text.

    Raises UserError if it is damaged, or if its tokens have no bytes of their own.
    """
    import tokenizers

    where = f"{_prefix(source)}{HF_TOKENIZER}"
    try:
        opened = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # noqa: BLE001  the library raises nothing more special
        raise UserError(f"{where} cannot be read ({one_line(error)[:100]})") from None
    opened.no_truncation()  # settings of the training that made it
    opened.no_padding()
    decoder = json.loads(text).get("decoder") or {"type": None}
    steps = decoder.get("decoders", [decoder])  # of a Sequence
    for step in steps:
        # A regular expression may replace what is spread over several tokens.
        if step["type"] not in DECODERS or "Regex" in step.get("pattern", ()):
            problem = f"has the decoder {step['type']}, which is not supported"
            raise UserError(f"{where} {problem}, only {', '.join(DECODERS)}")
    return opened, steps
