"""The batch loader and meta.json. Run: python -m pytest tests/test_dataset.py"""

import itertools
import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch

import nanomla.dataset
import train
from nanomla.dataset import Dataset, Meta, locked, read_meta, write_dataset
from nanomla.errors import UserError
from tests.conftest import KINDS, ROOT, make


def write(folder, train, val, vocab_size):
    splits = {"train": [np.array(train)], "val": [np.array(val)]}
    return write_dataset(folder, splits, Meta(vocab_size=vocab_size))


def test_round_trip_through_files(tmp_path):
    """
    Tokens written in pieces come back, a large vocabulary as uint32; what is set in meta while they
    are written reaches meta.json, in the schema's order. Unknown keys are ignored.
    """
    meta = Meta(vocab_size=70001, source="test")

    def pieces():
        yield np.arange(5)
        yield np.arange(5, 12)
        meta.split_bytes["train"] = 30

    written = write_dataset(tmp_path, {"train": pieces(), "val": [np.full(9, 70000)]}, meta)
    assert written.dtype == "uint32" and written.tokens == {"train": 12, "val": 9}
    data = Dataset(str(tmp_path), block_size=4)
    assert data.splits["train"].tolist() == list(range(12)) and data.splits["val"][0] == 70000
    assert data.bytes_per_token("train") == 2.5 and data.bytes_per_token("val") is None
    content = json.loads((tmp_path / "meta.json").read_text())
    assert list(content) == ["vocab_size", "source", "split_bytes", "dtype", "tokens"]
    (tmp_path / "meta.json").write_text(json.dumps({**content, "colour": "red"}))
    assert read_meta(tmp_path) == written
    assert sorted(p.name for p in tmp_path.iterdir()) == ["meta.json", "train.bin", "val.bin"]


class Killed(BaseException):
    """What no handler catches."""


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
            if not str(args[0]).endswith(".tmp"):  # of meta.json in the unfinished folder
                if len(done) == step:
                    raise Killed
                done.append(args)
            return real(*args)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(nanomla.dataset.os, "rename", rename(os.rename))
        patch.setattr(nanomla.dataset.os, "replace", rename(os.replace))
        patch.setattr(nanomla.dataset.shutil, "rmtree", lambda *_, **__: None)  # as nothing runs
        try:
            write(tmp_path, [7] * 30, [7] * 10, 9)
        except Killed:
            pass
    data = Dataset(str(tmp_path), 4)
    new = step > 0
    sizes = (data.vocab_size, *(len(data.splits[split]) for split in ("train", "val")))
    assert sizes == ((9, 30, 10) if new else (5, 40, 20))
    assert {*data.splits["train"], *data.splits["val"]} == {7 if new else 1}
    write(tmp_path, [3] * 30, [3] * 10, 9)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["meta.json", "train.bin", "val.bin"]


def test_an_interrupted_write_keeps_what_was_there(tmp_path):
    """A writer that fails half-way, or meets another one, changes nothing."""
    write(tmp_path, range(20), range(20), 20)

    def fails():
        yield np.arange(10)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_dataset(tmp_path, {"train": fails(), "val": []}, Meta(vocab_size=99))
    with (
        locked(tmp_path, "writing this dataset"),
        pytest.raises(UserError, match="another run is writing this dataset"),
    ):
        write(tmp_path, range(5), range(5), 5)
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
    """
    Every window can be drawn, the last token included as a target. They are those of earlier
    versions, as old runs are resumed with the batches that they would have seen.
    """
    write(tmp_path, range(1000), range(20), 1000)
    x, _ = Dataset(str(tmp_path), block_size=8).batch(seed=7, iteration=3, rows=range(1, 5))
    assert x[:, 0].tolist() == [268, 71, 868, 328]
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


def test_dataset_errors_say_what_to_do(tmp_path, dataset):
    """Not prepared, too short, cut in half, ids out of range, another dataset's: one line each."""
    with pytest.raises(UserError, match="not prepared.*you can prepare: .*shakespeare_char"):
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
    (tmp_path / "val.bin").write_bytes(bytes(2 * 49))
    with pytest.raises(UserError, match=r"val.bin holds 49 tokens, but its meta file counts 50"):
        Dataset(str(tmp_path), 4)
    (tmp_path / "val.bin").write_bytes(bytes(2 * 50 + 1))
    with pytest.raises(UserError, match=r"val.bin has 101 bytes, which is no multiple of the 2 of"):
        Dataset(str(tmp_path), 4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ('{"dtype": "int8"}', "dtype must be one of uint16, uint32"),
        ('{"vocab_size": "65"}', "vocab_size='65' does not work: .* None or a whole number .*"),
        ('{"tokenizer": "gpt2"}', "tokenizer='gpt2' does not work: .* None or an object .*"),
        ('{"tokens": {"train": "9"}}', "tokens={'train': '9'} does not work: .* whole number .*"),
    ],
)
def test_a_wrong_meta_file(content, message, tmp_path):
    """One line that names file and field."""
    (tmp_path / "meta.json").write_text(content)
    with pytest.raises(UserError, match=rf"meta.json: .*{message}") as caught:
        read_meta(tmp_path)
    assert "\n" not in str(caught.value)


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


@pytest.mark.parametrize(
    ("vocab_size", "itos"),
    [
        (4, {0: "", 1: "a", 2: "b", 3: "\n"}), (3, {0: "a", 1: "b", 2: "a"}), (5, {0: "a", 1: "b"}),
        (2, {0: "to", 1: "be"}), (2, {0: 5, 1: 6}),
    ],
)
def test_a_meta_pkl_whose_ids_are_no_characters(tmp_path, vocab_size, itos):
    """Empty, twice, too few, words, numbers: refused in one line that says how to go on."""
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": vocab_size, "itos": itos}))
    with pytest.raises(UserError, match=r"meta.pkl: refused.*itos must have.*vocab_size") as caught:
        read_meta(tmp_path)
    assert "\n" not in str(caught.value) and "rename this file" in str(caught.value)


@pytest.mark.parametrize("spec", [{"kind": "zzz"}, {"kind": "char", "chars": "aba"}])
def test_a_wrong_tokenizer_is_found_before_training(tmp_path, spec):
    """A dataset's, which the checkpoints would carry: one line with the folder's name."""
    splits = {"train": [np.arange(20) % 3], "val": [np.arange(20) % 3]}
    write_dataset(tmp_path, splits, Meta(vocab_size=3, tokenizer=spec))
    flags = [f"--dataset={tmp_path}", f"--out_dir={tmp_path / 'out'}", "--max_iters=1"]
    with pytest.raises(UserError, match=f"{tmp_path.name}: .*(unknown tokenizer|chars='aba')"):
        train.main([*flags, "--n_layer=1", "--n_head=1", "--n_embd=8", "--block_size=8"])


def test_preparing_needs_no_torch():
    """The prepare.py scripts start without it, in a fraction of its import's time and memory."""
    code = (
        "import sys, nanomla.prepare, nanomla.bpe, nanomla.tokenizer; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
    assert done.stdout.strip() == b"False"


@pytest.mark.parametrize("kind", KINDS)
def test_documents_as_if_alone(tmp_path, kind):
    """
    Windows cut at both ids that end a document: the loss and the gradients of all parts, each in a
    pass of its own, of a training batch and of one for evaluation.
    """
    ids = np.random.randint(2, 23, size=300)
    ids[::13] = 1
    ids[40::41] = 0
    write(tmp_path, ids, ids, 23)
    data = Dataset(str(tmp_path), 16)
    model = make(kind)
    for batch in (lambda: data.batch(3, 5, range(4)), lambda: data.eval_batch("val", 1, 3, 4)):
        data.ends = ()
        alone = []
        for row, targets in zip(*batch(), strict=True):
            begins = [0] + [t for t in range(1, 16) if row[t] < 2] + [16]
            for a, b in itertools.pairwise(begins):
                alone.append((row[None, a:b], targets[None, a:b]))
        data.ends = (1, 0)
        x, y = batch()
        assert x.shape == y.shape == (len(alone), max(part.size(1) for part, _ in alone))
        assert int((y >= 0).sum()) == 4 * 16 and len(alone) > 6
        loss = model(x, y)[1]
        loss.backward()
        gradients = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        total = 0.0
        for part, targets in alone:
            of_part = model(part, targets)[1] * targets.numel() / (4 * 16)
            of_part.backward()
            total += of_part.item()
        assert abs(loss.item() - total) < 1e-5
        for p, gradient in zip(model.parameters(), gradients, strict=True):
            torch.testing.assert_close(p.grad, gradient, rtol=1e-4, atol=1e-5)
        model.zero_grad()
