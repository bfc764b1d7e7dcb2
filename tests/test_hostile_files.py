"""
Files from strangers: one line or a reader that does not mind, quickly and in little memory.

Each table has (name, how to make the file) of one reader. Run: python -m pytest
tests/test_hostile_files.py
"""

import dataclasses
import gzip
import io
import json
import os
import pickle
import random
import resource
import time
import zipfile

import pytest
import torch

from model import GPT
from nanomla import checkpoint, formats
from nanomla.conversion import read_conversion
from nanomla.dataset import read_meta
from nanomla.errors import UserError
from tests.conftest import tiny_config

LLAMA = {"pos_emb": "rope", "norm": "rmsnorm", "mlp": "swiglu", "bias": False}
DEEPSEEK = {**LLAMA, "use_mla": True, "mla_latent_dim": 7, "mla_rope_dim": 2}
MODELS = {"gpt2": {"gelu": "tanh"}, "llama": LLAMA, "deepseek_v3": DEEPSEEK, "nanomla": DEEPSEEK}
WIDE, DEEP = 10**12, json.loads("[" * 400 + "]" * 400)
WRONG = ("x", None, [], {"a": 1}, True, -1, 1.5, WIDE, 10**30, DEEP)  # for a size


@pytest.fixture(scope="module", autouse=True)
def began():
    """(seconds of the processor, largest memory in kB) when the tests of this file began."""
    return time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def saved(content):
    """The bytes of a file by torch.save."""
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def as_zip(content, **options):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", **options) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return file.getvalue()


torch.manual_seed(0)
MHA = GPT(tiny_config())
PLAIN = {"model": MHA.state_dict(), "model_args": dataclasses.asdict(MHA.config)}
GOOD = saved(PLAIN)
FOLDERS = {}  # by kind of model: config.json and the tensors
for KIND, SETTINGS in MODELS.items():
    FOLDERS[KIND] = formats.FORMATS[KIND].write(GPT(tiny_config(**SETTINGS)))
draw = random.Random(1)


def flipped(content, place):
    damaged = bytearray(content)
    damaged[place] ^= 0x10
    return bytes(damaged)


def args(**changes):
    return saved({**PLAIN, "model_args": PLAIN["model_args"] | changes})


def weights(**changes):
    return saved({**PLAIN, "model": PLAIN["model"] | changes})


# --------------------------------------------------------------------------------------------------
# Other kinds of files under the right name, for every reader

KINDS = [
    ("empty", b""), ("text", b"hello\n"), ("zeros", bytes(5000)), ("noise", draw.randbytes(5000)),
    ("gzip", gzip.compress(b"{}")), ("zip", as_zip({"a.txt": b"hello"})), ("PK", b"PK\x03\x04"),
    ("png", b"\x89PNG\r\n\x1a\n" + bytes(99)), ("pickle", pickle.dumps({"model": 1})),
    ("tensor", saved(torch.zeros(3))), ("list", saved([1])), ("json list", b"[]"),
    ("folder", "folder"), ("pipe", "pipe"), ("unreadable", "unreadable"),
]  # fmt: skip


def place(path, content):
    """Write bytes; or make what the name says."""
    path.unlink(missing_ok=True)
    if content == "folder":
        path.mkdir()
    elif content == "pipe":
        os.mkfifo(path)
    elif content == "unreadable":
        path.write_bytes(b"{}")
        path.chmod(0)
        if os.access(path, os.R_OK):
            pytest.skip("this user can read everything")
    else:
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())


def one_line(read, *words):
    """Whether reading raises a UserError of one line that has the words; asserts say why not."""
    with pytest.raises(UserError) as caught:
        read()
    line = str(caught.value)
    assert line and "\n" not in line and len(line) < 700, line
    assert all(word in line for word in words), line
    return True


# --------------------------------------------------------------------------------------------------
# Checkpoints

with zipfile.ZipFile(io.BytesIO(GOOD)) as ARCHIVE:
    DATA = [m for m in ARCHIVE.infolist() if "/data/" in m.filename]
LARGEST = max(DATA, key=lambda member: member.file_size)
BYTES = [LARGEST.header_offset + 200 + draw.randrange(LARGEST.file_size - 200) for _ in range(15)]
ENDS = [1, 3, 4, 5, 30, 99, *(draw.randrange(len(GOOD)) for _ in range(20)), len(GOOD) - 1]
WTE = "transformer.wte.weight"
CHECKPOINTS = [
    *KINDS,
    *((f"first {n} bytes", GOOD[:n]) for n in ENDS),
    *((f"byte {n} flipped", flipped(GOOD, n)) for n in BYTES),
    *((f"{name} {value!r:.9}", saved(PLAIN | {name: value}))
      for name in ("model", "model_args", "optimizer", "scaler", "config", "tokenizer")
      for value in (7, "x", [1], {1: 2}) if name not in ("optimizer", "scaler") or value != {1: 2}),
    *((f"iter_num {value!r:.9}", saved(PLAIN | {"iter_num": value}))
      for value in ("x", [], 1.5, True, -1, 10**30, torch.zeros(2))),
    *((f"loss {value!r:.9}", saved(PLAIN | {"best_val_loss": value}))
      for value in ("x", [], False, 10**400, torch.zeros(2))),
    *((f"{name} {value!r:.9}", args(**{name: value}))
      for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
      for value in (*WRONG, torch.zeros(3, 3))),
    ("100000 layers", args(n_layer=100_000)), ("a billion heads", args(n_head=10**9)),
    ("long context", args(block_size=10**15)), ("use_mla", args(use_mla="yes")),
    ("shared latent", args(use_mla=True, mla_share_latent=True, n_layer=WIDE)),
    ("unknown setting", args(**{"x\ny" * 999: 1})),
    ("rope_freqs", args(pos_emb="rope", rope_freqs=[1.0] * 999)),
    ("NaN", weights(**{WTE: PLAIN["model"][WTE] * float("nan")})),
    ("no values", weights(**{WTE: torch.zeros(WIDE, 0)})),
    ("one value, expanded", weights(**{WTE: torch.zeros(1).expand(10**6, 10**6)})),
    ("meta", weights(**{WTE: torch.zeros(23, 24, device="meta")})),
    ("sparse", weights(**{WTE: torch.zeros(23, 24).to_sparse()})),
    ("integers", weights(**{WTE: torch.zeros(23, 24, dtype=torch.int32)})),
    ("long name", weights(**{"x\ny" * 999: torch.zeros(1)})),
    ("compressed", as_zip({"a/data.pkl": bytes(10**6)}, compression=zipfile.ZIP_DEFLATED)),
]  # fmt: skip


@pytest.mark.parametrize("content", [c for _, c in CHECKPOINTS], ids=[n for n, _ in CHECKPOINTS])
def test_checkpoints(tmp_path, content):
    """Read and made into a model."""
    place(tmp_path / "ckpt.pt", content)
    assert one_line(lambda: checkpoint.build(checkpoint.load(tmp_path / "ckpt.pt")), "ckpt.pt")


HARMLESS = [
    ("another key", saved(PLAIN | {"fork": [1]})), ("bytes after it", GOOD + b"\0" * 9),
    ("padding", flipped(GOOD, LARGEST.header_offset + 30 + len(LARGEST.filename) + 20)),
    ("no run", saved(PLAIN | dict.fromkeys(("optimizer", "config", "tokenizer", "iter_num")))),
    ("NaN as loss", saved(PLAIN | {"best_val_loss": float("nan")})),
    ("neutral setting", args(experts=None)),
    ("mask buffer", weights(**{"transformer.h.0.attn.bias": torch.ones(1, 1, 16, 16)})),
]  # fmt: skip


@pytest.mark.parametrize("content", [c for _, c in HARMLESS], ids=[n for n, _ in HARMLESS])
def test_damage_that_does_not_matter(tmp_path, content):
    """These open."""
    place(tmp_path / "ckpt.pt", content)
    assert checkpoint.build(checkpoint.load(tmp_path / "ckpt.pt"))[0].config == MHA.config


# --------------------------------------------------------------------------------------------------
# Folders of weights: config.json, model.safetensors, an index

SIZES = {
    "gpt2": ("n_positions", "vocab_size", "n_layer", "n_head", "n_embd"),
    "nanomla": ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"),
}
SIZES["llama"] = SIZES["deepseek_v3"] = (
    "max_position_embeddings", "vocab_size", "num_hidden_layers", "num_attention_heads",
    "hidden_size", "intermediate_size",
)  # fmt: skip
OTHER = {  # values that a setting cannot have
    "gpt2": {"layer_norm_epsilon": "x", "tie_word_embeddings": 7, "activation_function": DEEP},
    "llama": {"head_dim": WIDE, "num_key_value_heads": WIDE, "rope_parameters": DEEP},
    "deepseek_v3": {
        "kv_lora_rank": WIDE, "q_lora_rank": 3, "qk_rope_head_dim": 10**9, "v_head_dim": DEEP,
        "first_k_dense_replace": [], "rope_interleave": 1,
    },
    "nanomla": {
        "mla_latent_dim": [7] * 999, "mla_rope_dim": WIDE, "experts": DEEP, "norm": [],
        "mla_share_latent": "x", "rope_freqs": DEEP, "use_mla": DEEP, "head_dim": WIDE,
    },
}  # fmt: skip
CONFIGS = [(f"gpt2 {name}", "gpt2", content) for name, content in KINDS]
for KIND, (SETTINGS, _) in FOLDERS.items():
    CHANGES = [(name, value) for name in SIZES[KIND] for value in WRONG]
    CHANGES += [("model_type", value) for value in ("x" * 10**5, *WRONG)]
    CHANGES += OTHER[KIND].items()
    for NAME, VALUE in CHANGES:
        CASE = f"{KIND} {NAME} {json.dumps(VALUE):.9}"
        CONFIGS.append((CASE, KIND, SETTINGS | {NAME: VALUE}))
    for NAME in SIZES[KIND]:
        LEFT = {name: value for name, value in SETTINGS.items() if name != NAME}
        CONFIGS.append((f"{KIND} without {NAME}", KIND, LEFT))
CONFIGS += [
    ("large", "gpt2", b'{"a": "' + b"x" * 2**24 + b'"}'),
    ("deep", "gpt2", b'{"a": ' + b"[" * 10**5),
    ("long number", "gpt2", b'{"n_layer": 1' + b"0" * 9999 + b"}"),
    ("not UTF-8", "gpt2", b'{"a": "\xff"}'), ("two objects", "gpt2", b"{}{}"),
]  # fmt: skip
# GPT-2's 12 heads are the default, and divide this width.
CONFIGS = [case for case in CONFIGS if case[0] != "gpt2 without n_head"]


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """The bytes of model.safetensors of every kind of model."""
    contents = {}
    for kind, (settings, tensors) in FOLDERS.items():
        folder = tmp_path_factory.mktemp("e") / kind
        formats.write_folder(folder, tensors, {"config.json": json.dumps(settings)})
        assert checkpoint.build(formats.read_pretrained(folder))
        contents[kind] = (folder / "model.safetensors").read_bytes()
    return contents


def open_folder(folder):
    return checkpoint.build(formats.open_weights(folder))


@pytest.mark.parametrize(("kind", "content"), [c[1:] for c in CONFIGS], ids=[c[0] for c in CONFIGS])
def test_configs(tmp_path, exports, kind, content):
    """A config.json beside tensors that are as they should be."""
    (tmp_path / "model.safetensors").write_bytes(exports[kind])
    place(tmp_path / "config.json", content)
    assert one_line(lambda: open_folder(tmp_path), str(tmp_path))


def header(**tensors):
    """A safetensors file with this header and 96 bytes of values."""
    text = json.dumps(tensors).encode()
    return len(text).to_bytes(8, "little") + text + bytes(96)


def entry(shape, end=96, kind="F32"):
    return {"dtype": kind, "shape": shape, "data_offsets": [0, end]}


TENSORS = [
    *KINDS,
    ("unknown name", header(a=entry([24]))), ("long name", header(**{"a\nb" * 999: entry([24])})),
    ("no values", header(**{WTE: entry([WIDE, 0], 0)})), ("other size", header(a=entry([25]))),
    ("past the end", header(a=entry([24], 10**9))), ("no shape", header(a={"dtype": "F32"})),
    ("kind of number", header(a=entry([24], kind="F99"))),
    ("int8", header(a=entry([96], kind="I8"))),
    ("huge", header(a=entry([WIDE, WIDE]))), ("negative", header(a=entry([-24]))),
    ("header length", b"\xff" * 8 + bytes(99)),
    *((f"first {n}/20", n) for n in range(20)),
]  # fmt: skip


@pytest.mark.parametrize("content", [c for _, c in TENSORS], ids=[n for n, _ in TENSORS])
def test_safetensors(tmp_path, exports, content):
    """A model.safetensors beside a config.json that is as it should be."""
    good = exports["gpt2"]
    if isinstance(content, int):  # twentieths
        content = good[: len(good) * content // 20]
    place(tmp_path / "model.safetensors", content)
    place(tmp_path / "config.json", FOLDERS["gpt2"][0])
    assert one_line(lambda: open_folder(tmp_path), str(tmp_path))


INDEXES = [
    *KINDS,
    *((f"map {value!r:.9}", {"weight_map": value}) for value in (None, [], {}, "x", 7, DEEP)),
    *((f"piece {value!r:.9}", {"weight_map": {"a": value}})
      for value in (None, 7, [], DEEP, "", ".", "..", "../x.safetensors", "/etc/passwd", "a\0b",
                    "x/y.safetensors", "none.safetensors", "x" * 5000, "a\nb")),
    ("thousands", {"weight_map": {str(i): f"{i}.safetensors" for i in range(5000)}}),
    ("no map", {"metadata": {}}),
]  # fmt: skip


@pytest.mark.parametrize("content", [c for _, c in INDEXES], ids=[n for n, _ in INDEXES])
def test_indexes(tmp_path, content):
    """A model.safetensors.index.json beside a config.json that is as it should be."""
    place(tmp_path / "model.safetensors.index.json", content)
    place(tmp_path / "config.json", FOLDERS["gpt2"][0])
    assert one_line(lambda: open_folder(tmp_path), str(tmp_path))


# --------------------------------------------------------------------------------------------------
# conversion.json and meta.json

RECORD = {
    "source": "out", "attention": "MHA", "data": "letters", "calibration_tokens": 7,
    "plan": {"method": "plain", "spread": False, "rope_dim": 0, "balance": 1.0},
    "layers": [{"latent": 7, "kept": 0.5, "predicted": 0.1}], "asked": {"heal_iters": 0},
    "loss": {"source": 1.5, "converted": 1.75}, "cached_numbers": [48, 9],
    "bytes_per_token": [9, 7],
}  # fmt: skip
RECORDS = [
    *KINDS,
    *((f"{name} {value!r:.9}", RECORD | {name: value})
      for name in RECORD for value in (None, 7.5, [[]], {"a": DEEP})),
    *((f"without {name}", {k: v for k, v in RECORD.items() if k != name}) for name in RECORD),
    ("unknown", RECORD | {"x" * 9999: 1}), ("zero", RECORD | {"cached_numbers": [48, 0]}),
    ("layers", RECORD | {"layers": [{"latent": 7}]}),
]  # fmt: skip


@pytest.mark.parametrize("content", [c for _, c in RECORDS], ids=[n for n, _ in RECORDS])
def test_records_of_conversions(tmp_path, content):
    """What tools.convert leaves beside its checkpoints."""
    place(tmp_path / "conversion.json", content)
    assert one_line(lambda: read_conversion(tmp_path), "conversion.json")


METAS = [
    *(case for case in KINDS if case[0] not in ("folder", "pipe")),  # as if there were none
    *((f"{name} {value!r:.9}", {name: value})
      for name in ("vocab_size", "tokenizer", "split_bytes", "tokens", "dtype")
      for value in ("x", [1], 1.5, True)),
    ("dtype", {"dtype": "float64"}), ("not UTF-8", b'{"dtype": "\xff"}'),
]  # fmt: skip


@pytest.mark.parametrize("content", [c for _, c in METAS], ids=[n for n, _ in METAS])
def test_metas(tmp_path, content):
    """A dataset's meta.json."""
    place(tmp_path / "meta.json", content)
    assert one_line(lambda: read_meta(tmp_path), "meta.json")


def test_how_many_how_long_how_large(began):
    """What the tests above took together, of the processor's time and of memory."""
    tables = (CHECKPOINTS, HARMLESS, CONFIGS, TENSORS, INDEXES, RECORDS, METAS)
    assert sum(map(len, tables)) >= 150
    assert time.process_time() - began[0] < 60
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - began[1] < 200_000  # kB
