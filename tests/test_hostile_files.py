"""
Damaged files of every reader: one line that names the file, quickly and in little memory. Folders
of other formats are in tests/test_formats.py. Run: python -m pytest tests/test_hostile_files.py
"""

import dataclasses
import io
import json
import pickle
import resource
import zipfile

import pytest
import torch

from model import GPT
from nanomla import checkpoint
from nanomla.conversion import read_conversion
from nanomla.dataset import read_meta
from nanomla.errors import UserError
from tests.conftest import tiny_config


def saved(content):
    """The bytes of a file by torch.save."""
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


torch.manual_seed(0)
MODEL = GPT(tiny_config())
PLAIN = {"model": MODEL.state_dict(), "model_args": dataclasses.asdict(MODEL.config)}
GOOD = saved(PLAIN)
WTE = "transformer.wte.weight"
WIDE = 10**12


@pytest.fixture(scope="module", autouse=True)
def _opened(tmp_path_factory):
    """The whole file opens, with the modules that torch imports for it."""
    path = tmp_path_factory.mktemp("good") / "ckpt.pt"
    path.write_bytes(GOOD)
    assert checkpoint.build(checkpoint.load(path))[0].config == MODEL.config


def args(**changes):
    return saved({**PLAIN, "model_args": PLAIN["model_args"] | changes})


def weights(name, tensor):
    return saved({**PLAIN, "model": PLAIN["model"] | {name: tensor}})


def flipped(content):
    """With one bit changed in the middle of its largest tensor."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        largest = max(archive.infolist(), key=lambda member: member.file_size)
    damaged = bytearray(content)
    damaged[largest.header_offset + 200 + largest.file_size // 2] ^= 0x10
    return bytes(damaged)


def refused(read, *words):
    """Whether reading raises a UserError of one line that has the words; asserts say why not."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError) as caught:
        read()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB
    line = str(caught.value)
    assert line and "\n" not in line and len(line) < 700, line
    assert all(word in line for word in words), line
    return True


CHECKPOINTS = {  # name -> the file's bytes, and what the error names
    "empty": (b"", "truncated"),
    "text": (b"hello\n", "not a checkpoint"),
    "a pickle with code": (pickle.dumps(print), "not a checkpoint"),
    "another archive": (saved([1]), "no model and no model_args"),
    "truncated": (GOOD[: len(GOOD) // 2], "truncated"),
    "last byte missing": (GOOD[:-1], "truncated"),
    "a bit flipped": (flipped(GOOD), "damaged"),
    "code inside": (saved(PLAIN | {"config": print}), "refused"),
    "weights of no type": (saved(PLAIN | {"model": 7}), "model=7"),
    "a step below 0": (saved(PLAIN | {"iter_num": -1}), "iter_num=-1"),
    "a text as size": (args(n_layer="2"), "n_layer='2'"),
    "other sizes": (args(n_layer=100_000), "n_layer=100000"),
    "sizes of terabytes": (args(vocab_size=WIDE), str(WIDE)),
    "a context of terabytes": (args(pos_emb="rope", block_size=WIDE), str(WIDE)),
    "a setting of a later version": (args(experts=8), "experts"),
    "another shape": (weights(WTE, torch.zeros(22, 24)), "wte"),
    "one value, expanded": (weights(WTE, torch.zeros(1).expand(10**6, 10**6)), "wte"),
    "whole numbers": (weights(WTE, torch.zeros(23, 24, dtype=torch.int32)), "wte"),
    "NaN": (weights("transformer.ln_f.weight", torch.full((24,), torch.nan)), "not finite"),
    "a name that is not known": (weights("x", torch.zeros(1)), "1 unknown (first x)"),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints(tmp_path, name):
    """Read and made into a model."""
    content, words = CHECKPOINTS[name]
    (tmp_path / "ckpt.pt").write_bytes(content)
    assert refused(
        lambda: checkpoint.build(checkpoint.load(tmp_path / "ckpt.pt")), "ckpt.pt", words
    )


HARMLESS = {
    "another key": saved(PLAIN | {"fork": [1]}),
    "no run": saved(PLAIN | dict.fromkeys(("optimizer", "config", "tokenizer", "iter_num"))),
    "a neutral setting": args(experts=None),
    "a mask buffer": weights("transformer.h.0.attn.bias", torch.ones(1, 1, 16, 16)),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_does_not_matter(tmp_path, name):
    """These open."""
    (tmp_path / "ckpt.pt").write_bytes(HARMLESS[name])
    assert checkpoint.build(checkpoint.load(tmp_path / "ckpt.pt"))[0].config == MODEL.config


RECORD = {
    "source": "out", "attention": "MHA", "data": "letters", "calibration_tokens": 7,
    "plan": {"method": "plain", "spread": False, "rope_dim": 0, "balance": 1.0},
    "layers": [{"latent": 7, "kept": 0.5, "predicted": 0.1}], "asked": {"heal_iters": 0},
    "loss": {"source": 1.5, "converted": 1.75}, "cached_numbers": [48, 9],
    "bytes_per_token": [9, 7],
}  # fmt: skip
RECORDS = [
    b"{",
    RECORD | {"calibration_tokens": "x"},
    {name: value for name, value in RECORD.items() if name != "loss"},
    RECORD | {"more": 1},
]


@pytest.mark.parametrize("content", RECORDS, ids=["damaged", "wrong", "missing", "unknown"])
def test_records_of_conversions(tmp_path, content):
    """What tools.convert leaves beside its checkpoints; the whole one is read."""
    path = tmp_path / "conversion.json"
    path.write_text(json.dumps(RECORD))
    assert read_conversion(tmp_path).source == "out"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    assert refused(lambda: read_conversion(tmp_path), "conversion.json")


@pytest.mark.parametrize("text", ["{", "[1]", '{"vocab_size": "x"}', '{"dtype": "float64"}'])
def test_metas(tmp_path, text):
    """A dataset's meta.json."""
    (tmp_path / "meta.json").write_text(text)
    assert refused(lambda: read_meta(tmp_path), "meta.json")
