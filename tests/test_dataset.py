"""The batch loader and meta.json. Run: python -m pytest tests/test_dataset.py"""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import nanomla.dataset
from nanomla.dataset import Dataset, Meta, read_meta, write_dataset
from nanomla.errors import UserError, explain
from tests.conftest import ROOT


def write(folder, train, val, vocab_size):
    splits = {"train": [np.array(train)], "val": [np.array(val)]}
    return write_dataset(folder, splits, Meta(vocab_size=vocab_size))


def test_round_trip_through_files(tmp_path):
    """Tokens written in pieces come back; a large vocabulary is stored as uint32."""
    splits = {"train": [np.arange(5), np.arange(5, 12)], "val": [np.full(9, 70000)]}
    meta = write_dataset(tmp_path, splits, Meta(vocab_size=70001))
    assert meta.dtype == "uint32" and meta.tokens == {"train": 12, "val": 9}
    data = Dataset(str(tmp_path), block_size=4)
    assert data.splits["train"].tolist() == list(range(12)) and data.splits["val"][0] == 70000
    written = json.loads((tmp_path / "meta.json").read_text())
    assert written == {"vocab_size": 70001, "dtype": "uint32", "tokens": {"train": 12, "val": 9}}
    assert read_meta(tmp_path) == meta
    assert sorted(p.name for p in tmp_path.iterdir()) == ["meta.json", "train.bin", "val.bin"]


def test_pieces_fill_in_the_meta(tmp_path):
    """Fields set while the pieces are written reach meta.json, in the schema's order."""
    meta = Meta(vocab_size=9, source="test")

    def pieces(split):
        yield np.arange(9)
        meta.split_bytes[split], meta.sha256 = 9, "00"

    written = write_dataset(tmp_path, {s: pieces(s) for s in ("train", "val")}, meta)
    assert written == read_meta(tmp_path) and written.split_bytes == {"train": 9, "val": 9}
    keys = ["vocab_size", "source", "sha256", "split_bytes", "dtype", "tokens"]
    assert list(json.loads((tmp_path / "meta.json").read_text())) == keys


def test_interrupted_write_keeps_the_old_dataset(tmp_path):
    """A writer that dies half-way leaves what was there, and nothing beside it."""
    write(tmp_path, range(20), range(20), 20)

    def dies():
        yield np.arange(10)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_dataset(tmp_path, {"train": dies(), "val": []}, Meta(vocab_size=99))
    assert len(Dataset(str(tmp_path), 4).splits["train"]) == 20
    assert len(list(tmp_path.iterdir())) == 3


def test_batches_are_a_pure_function(dataset):
    """
    The same row is the same whatever was drawn before or is drawn with it, others are other ones.
    """
    data = Dataset(str(dataset), block_size=8)
    x, y = data.batch(seed=1, iteration=5, rows=range(12, 18))
    data.batch(9, 9, range(3))
    fresh = Dataset(str(dataset), block_size=8)
    pieces = [fresh.batch(1, 5, rows) for rows in (range(12, 13), range(13, 18))]
    again = [torch.cat(part) for part in zip(*pieces, strict=True)]
    assert torch.equal(x, again[0]) and torch.equal(y, again[1])
    assert x.shape == y.shape == (6, 8) and x.dtype == torch.int64
    assert x.is_contiguous() and y.is_contiguous()
    assert torch.equal(x[:, 1:], y[:, :-1])
    for seed, iteration, first in ((2, 5, 12), (1, 6, 12), (1, 5, 18)):
        assert not torch.equal(x, data.batch(seed, iteration, range(first, first + 6))[0])


def test_batches_reach_both_ends(tmp_path):
    """Every window can be drawn, the last token included as a target."""
    write(tmp_path, range(12), range(12), 12)
    data = Dataset(str(tmp_path), block_size=8)
    starts, ends = set(), set()
    for i in range(50):
        x, y = data.batch(0, i, range(4))
        starts |= set(x[:, 0].tolist())
        ends |= set(y[:, -1].tolist())
    assert starts == {0, 1, 2, 3} and ends == {8, 9, 10, 11}


def test_evaluation_windows_are_fixed_and_spread(tmp_path):
    """They depend on their index alone, and cover the split from its first to its last token."""
    write(tmp_path, range(200), range(200), 200)
    data = Dataset(str(tmp_path), block_size=8)
    batches = [data.eval_batch("val", i, 4, 3) for i in range(4)]
    starts = torch.cat([x[:, 0] for x, _ in batches])
    assert starts[0] == 0 and batches[-1][1][-1, -1] == 199 and (starts.diff() > 0).all()
    assert torch.equal(batches[2][0], Dataset(str(tmp_path), 8).eval_batch("val", 2, 4, 3)[0])


def test_bytes_per_token(dataset, tmp_path):
    """From meta.json's byte counts; None without them."""
    assert Dataset(str(dataset), 8).bytes_per_token("val") == 1
    write(tmp_path, range(20), range(20), 20)
    assert Dataset(str(tmp_path), 8).bytes_per_token("val") is None


def test_dataset_errors_say_what_to_do(tmp_path, dataset):
    """Not prepared, too short, cut in half, ids out of range, a broken meta file: one line each."""
    known = "datasets you can prepare: .*shakespeare_char"
    with pytest.raises(UserError, match=f"not prepared.*{known}"):
        Dataset("no_such_dataset", 8)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "prepare.py").touch()
    with pytest.raises(UserError, match="not prepared.*prepare it with: python .*mine/prepare.py"):
        Dataset(str(tmp_path / "mine"), 8)
    with pytest.raises(UserError, match="too few.*block_size=5400.*--block_size=5399"):
        Dataset(str(dataset), 5400)
    write(tmp_path, range(50), range(50), 30)
    with pytest.raises(UserError, match="holds token id 49, but the vocabulary has 30"):
        Dataset(str(tmp_path), 40).batch(0, 0, range(64))
    (tmp_path / "train.bin").write_bytes(b"123")
    with pytest.raises(UserError, match="3 bytes is no whole number"):
        Dataset(str(tmp_path), 4)
    (tmp_path / "meta.json").write_text("{")
    with pytest.raises(UserError, match="meta.json"):
        Dataset(str(tmp_path), 4)


def test_files_of_two_datasets(tmp_path):
    """A .bin file with another number of tokens than meta.json counts is not read."""
    write(tmp_path, range(50), range(50), 50)
    (tmp_path / "val.bin").write_bytes(bytes(2 * 49))
    with pytest.raises(UserError, match=r"val.bin holds 49 tokens, but its meta file counts 50"):
        Dataset(str(tmp_path), 4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"dtype": "int8"}', "dtype is neither uint16 nor uint32"),
        ('{"dtype": null}', "dtype=None does not work: dtype must be text"),
        ('{"vocab_size": "65"}', "vocab_size='65' does not work: .* None or a whole number .*"),
        ('{"vocab_size": true}', "vocab_size=True does not work: .* None or a whole number .*"),
        ('{"tokenizer": "gpt2"}', "tokenizer='gpt2' does not work: .* None or an object .*"),
        ('{"split_bytes": [1, 2]}', r"split_bytes=\[1, 2\] does not work: .* an object .*"),
        ('{"tokens": {"train": "9"}}', r"tokens\['train'\]='9' does not work: .* whole number .*"),
    ],
)
def test_meta_with_wrong_types(content, message, tmp_path):
    """One line that names file and field."""
    (tmp_path / "meta.json").write_text(content)
    with pytest.raises(UserError, match=rf"meta.json: not a dataset's meta file \({message}\)$"):
        read_meta(tmp_path)


def test_meta_that_says_little(tmp_path):
    """Without a meta file nothing is known; unknown keys are ignored."""
    assert read_meta(tmp_path) == Meta() and Meta().dtype == "uint16"
    (tmp_path / "meta.json").write_text('{"vocab_size": 5, "colour": "red"}')
    assert read_meta(tmp_path) == Meta(vocab_size=5)


def test_nanogpt_meta_pkl(tmp_path):
    """nanoGPT's meta.pkl is understood; one that would run code is refused without running it."""
    chars = "\n ab"
    stoi = {c: i for i, c in enumerate(chars)}
    content = {"vocab_size": 4, "stoi": stoi, "itos": dict(enumerate(chars))}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(content))
    assert read_meta(tmp_path) == Meta(4, {"kind": "char", "chars": chars})

    class Hostile:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    for content in (pickle.dumps({"itos": Hostile()}), b"garbage", pickle.dumps([1])):
        (tmp_path / "meta.pkl").write_bytes(content)
        with pytest.raises(UserError, match="refused"):
            read_meta(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_preparing_needs_no_torch():
    """The prepare.py scripts start without it, in a fraction of its import's time and memory."""
    code = (
        "import sys, nanomla.prepare, nanomla.bpe, nanomla.tokenizer; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
    assert done.stdout.strip() == b"False"


@pytest.mark.parametrize("step", range(5))
def test_a_writer_that_is_killed_leaves_all_or_nothing(tmp_path, monkeypatch, step):
    """
    At every rename of a new dataset over an older one: what is read is one of them as a whole, and
    the next writer clears up.
    """
    write(tmp_path, [1] * 40, [1] * 20, 5)
    done = []

    def rename(real):
        def call(*args):
            if len(done) == step:
                raise Killed
            done.append(args)
            return real(*args)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(nanomla.dataset.os, "rename", rename(os.rename))
        patch.setattr(nanomla.dataset.os, "replace", rename(os.replace))
        if step < 4:
            with pytest.raises(Killed):
                write(tmp_path, [7] * 30, [7] * 10, 9)
        else:
            write(tmp_path, [7] * 30, [7] * 10, 9)
    for reading_only in (True, False):
        with monkeypatch.context() as patch:
            if reading_only:
                patch.setattr(nanomla.dataset, "_finish_moves", lambda folder: None)
            data = Dataset(str(tmp_path), 4)
        new = step > 0
        sizes = (data.vocab_size, *(len(data.splits[split]) for split in ("train", "val")))
        assert sizes == ((9, 30, 10) if new else (5, 40, 20))
        assert {*data.splits["train"], *data.splits["val"]} == {7 if new else 1}
    write(tmp_path, [3] * 30, [3] * 10, 9)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["meta.json", "train.bin", "val.bin"]


class Killed(BaseException):
    """What no handler catches."""


def copied(tmp_path, meta, pickled=None):
    """A folder with the .bin files of one dataset and the meta files of others."""
    write(tmp_path, range(20), range(10), 20)
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    if pickled:
        (tmp_path / "meta.pkl").write_bytes(pickle.dumps(pickled))
    return str(tmp_path)


def letters(chars):
    """What nanoGPT's prepare.py would write."""
    ids = dict(enumerate(chars))
    return {"vocab_size": len(chars), "itos": ids, "stoi": {c: i for i, c in ids.items()}}


@pytest.mark.parametrize(
    ("meta", "pickled", "words"),
    [
        ({"tokens": {"train": 21}}, None, "holds 20 tokens, but its meta file counts 21"),
        ({"tokens": {"val": 9}}, letters("ab"), "holds 10 tokens, but its meta file counts 9"),
        ({"tokenizer": {"kind": "char", "chars": "abc"}}, letters("abd"), "describe two datasets"),
        ({"vocab_size": 3}, letters("abc"), "describe two datasets"),
        ({"tokenizer": {"kind": "byte"}, "split_bytes": {"val": 9}}, None, "stand for 9 bytes"),
    ],
)
def test_files_of_two_datasets_in_one_folder(tmp_path, meta, pickled, words):
    """They are refused, by what the meta files say of the .bin files or of each other."""
    with pytest.raises(UserError, match=words):
        Dataset(copied(tmp_path, meta, pickled), 4)


def test_the_same_dataset_described_twice(tmp_path):
    """By us and by nanoGPT, in the same letters: no error."""
    meta = {"vocab_size": 3, "tokenizer": {"kind": "char", "chars": "abc"}}
    assert Dataset(copied(tmp_path, meta, letters("abc")), 4).tokenizer == meta["tokenizer"]


DEEP = "[" * 100_000
HOSTILE_JSON = [
    "", "{", "[]", "null", '"x"', "7", DEEP, f'{{"tokenizer": {DEEP}', "\ud800", "{'a': 1}",
    *(
        json.dumps({name: value})
        for name, values in {
            "vocab_size": ("20", 2.5, True, -1, 0, 2**33, [], {}),
            "tokenizer": ("char", 3, [], True),
            "dtype": ("float32", 16, None, [], "uint64"),
            "tokens": ([], 3, "x", {"train": "20"}, {"train": -1}, {"val": 1.5}, {"train": None}),
            "split_bytes": ([], 3, {"val": "x"}, {"val": -1}, {"train": True}),
        }.items()
        for value in values
    ),
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE_JSON, ids=range(len(HOSTILE_JSON)))
def test_hostile_meta_json(tmp_path, text):
    """One line for each that names the file."""
    write(tmp_path, range(20), range(10), 20)
    (tmp_path / "meta.json").write_text(text, encoding="utf-8", errors="surrogatepass")
    with pytest.raises(UserError, match="meta.json: (not a data|cannot be )") as caught:
        Dataset(str(tmp_path), 4)
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 1000


PICKLES = {
    "not a dictionary": [1, 2],
    "no itos": {"vocab_size": 3},
    "a gap": letters("abc") | {"itos": {0: "a", 1: "b", 3: "c"}},
    "a number for a letter": letters("abc") | {"itos": {0: "a", 1: "b", 2: 7}},
    "two letters": letters("abc") | {"itos": {0: "a", 1: "b", 2: "cd"}},
    "another size": letters("abc") | {"vocab_size": 10**9},
    "a size of another type": letters("abc") | {"vocab_size": "3"},
    "another stoi": letters("abc") | {"stoi": {"a": 0, "b": 2, "c": 1}},
    "a class": {"vocab_size": 3, "itos": Path("x"), "stoi": {}},
}


@pytest.mark.parametrize("name", PICKLES)
def test_hostile_meta_pkl(tmp_path, name):
    """Likewise, and no class is ever looked up."""
    write(tmp_path, range(20), range(10), 20)
    (tmp_path / "meta.json").unlink()
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(PICKLES[name]))
    with pytest.raises(UserError, match="meta.pkl: refused"):
        Dataset(str(tmp_path), 4)


def test_meta_files_have_a_size(tmp_path, monkeypatch):
    """More is not read."""
    write(tmp_path, range(20), range(10), 20)
    monkeypatch.setattr(nanomla.dataset, "LONGEST_META", 50)
    with pytest.raises(UserError, match="larger than"):
        Dataset(str(tmp_path), 4)


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "\ud800"])
def test_impossible_dataset_names(name):
    """One line each, of the loader or of the system."""
    with pytest.raises((UserError, OSError)) as caught:
        Dataset(name, 4)
    assert "\n" not in explain(caught.value)[0]
