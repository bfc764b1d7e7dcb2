"""The batch loader and tokenizers. Run: python -m pytest tests/test_data.py"""

import json
import pickle

import numpy as np
import pytest
import torch

from configurator import UserError
from data import helpers
from data.loader import Dataset, read_meta
from data.tokenizer import StreamDecoder, Tokenizer


def write(folder, train, val, vocab_size, **meta):
    return helpers.write_dataset(folder, {"train": [np.array(train)], "val": [np.array(val)]}, {"vocab_size": vocab_size, **meta})


def test_round_trip_through_files(tmp_path):
    """Tokens written in pieces come back; a large vocabulary is stored as uint32."""
    pieces = [np.arange(5), np.arange(5, 12)]
    meta = helpers.write_dataset(tmp_path, {"train": pieces, "val": [np.full(9, 70000)]}, {"vocab_size": 70001})
    assert meta["dtype"] == "uint32" and meta["tokens"] == {"train": 12, "val": 9}
    data = Dataset(str(tmp_path), block_size=4)
    assert data.splits["train"].tolist() == list(range(12)) and data.splits["val"][0] == 70000
    assert json.loads((tmp_path / "meta.json").read_text()) == meta
    assert sorted(p.name for p in tmp_path.iterdir()) == ["meta.json", "train.bin", "val.bin"]


def test_interrupted_write_keeps_the_old_dataset(tmp_path):
    """A writer that dies half-way leaves what was there, and nothing beside it."""
    write(tmp_path, range(20), range(20), 20)

    def dies():
        yield np.arange(10)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        helpers.write_dataset(tmp_path, {"train": dies(), "val": []}, {"vocab_size": 99})
    assert len(Dataset(str(tmp_path), 4).splits["train"]) == 20 and len(list(tmp_path.iterdir())) == 3


def test_batches_are_a_pure_function(dataset):
    """The same arguments give the same batch whatever was drawn before; any other argument gives another."""
    data = Dataset(str(dataset), block_size=8)
    x, y = data.batch(seed=1, iteration=5, micro=2, batch_size=6)
    data.batch(9, 9, 9, 3)
    again = Dataset(str(dataset), block_size=8).batch(1, 5, 2, 6)
    assert torch.equal(x, again[0]) and torch.equal(y, again[1])
    assert x.shape == y.shape == (6, 8) and x.dtype == torch.int64 and x.is_contiguous() and y.is_contiguous()
    assert torch.equal(x[:, 1:], y[:, :-1])
    for other in ((2, 5, 2, 6), (1, 6, 2, 6), (1, 5, 3, 6)):
        assert not torch.equal(x, data.batch(*other)[0])


def test_batches_reach_both_ends(tmp_path):
    """Every window can be drawn, the last token included as a target."""
    write(tmp_path, range(12), range(12), 12)
    data = Dataset(str(tmp_path), block_size=8)
    starts, ends = set(), set()
    for i in range(50):
        x, y = data.batch(0, i, 0, 4)
        starts |= set(x[:, 0].tolist())
        ends |= set(y[:, -1].tolist())
    assert starts == {0, 1, 2, 3} and ends == {8, 9, 10, 11}


def test_evaluation_windows_are_fixed_and_spread(tmp_path):
    """They depend on nothing but their index, and cover the split from its first to its last token."""
    write(tmp_path, range(200), range(200), 200)
    data = Dataset(str(tmp_path), block_size=8)
    batches = [data.eval_batch("val", i, 4, 3) for i in range(4)]
    starts = torch.cat([x[:, 0] for x, _ in batches])
    assert starts[0] == 0 and batches[-1][1][-1, -1] == 199 and (starts.diff() > 0).all()
    assert torch.equal(batches[2][0], Dataset(str(tmp_path), 8).eval_batch("val", 2, 4, 3)[0])


def test_dataset_errors_say_what_to_do(tmp_path, dataset):
    """Not prepared, too short, cut in half, ids out of range, a broken meta file: one clear line each."""
    with pytest.raises(UserError, match="not prepared.*datasets you can prepare: .*shakespeare_char"):
        Dataset("no_such_dataset", 8)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "prepare.py").touch()
    with pytest.raises(UserError, match="not prepared.*prepare it with: python .*mine/prepare.py"):
        Dataset(str(tmp_path / "mine"), 8)
    with pytest.raises(UserError, match="too few.*block_size=5400.*--block_size=5399"):
        Dataset(str(dataset), 5400)
    write(tmp_path, range(50), range(50), 30)
    with pytest.raises(UserError, match="holds token id 49, but the vocabulary has 30"):
        Dataset(str(tmp_path), 40).batch(0, 0, 0, 64)
    (tmp_path / "train.bin").write_bytes(b"123")
    with pytest.raises(UserError, match="3 bytes is no whole number"):
        Dataset(str(tmp_path), 4)
    (tmp_path / "meta.json").write_text("{")
    with pytest.raises(UserError, match="meta.json"):
        Dataset(str(tmp_path), 4)


def test_nanogpt_meta_pkl(tmp_path):
    """nanoGPT's meta.pkl is understood; one that would run code is refused without running it."""
    chars = "\n ab"
    meta = {"vocab_size": 4, "stoi": {c: i for i, c in enumerate(chars)}, "itos": dict(enumerate(chars))}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    assert read_meta(tmp_path) == {"vocab_size": 4, "tokenizer": {"kind": "char", "chars": chars}}

    class Hostile:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    for content in (pickle.dumps({"itos": Hostile()}), b"garbage", pickle.dumps([1])):
        (tmp_path / "meta.pkl").write_bytes(content)
        with pytest.raises(UserError, match="refused"):
            read_meta(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_checksum_is_enforced(tmp_path):
    """A download of another content is an error that names both sums and the remedy."""
    (tmp_path / "text").write_text("hello")
    url = (tmp_path / "text").as_uri()
    assert helpers.download_url(url, helpers.sha256(b"hello"), "do that") == b"hello"
    with pytest.raises(UserError, match="instead of 00.*do that"):
        helpers.download_url(url, "00", "do that")


def test_char_tokenizer():
    """Text goes round; a character outside the vocabulary is named."""
    tokenizer = Tokenizer({"kind": "char", "chars": "\n abé"})
    assert tokenizer.decode(tokenizer.encode("a béa\n")) == "a béa\n" and tokenizer.vocab_size == 5
    with pytest.raises(UserError, match="'ß'"):
        tokenizer.encode("aß")


def test_byte_tokenizer_streams_whole_characters():
    """A character of several bytes appears when its last byte does; bytes that are no text become a mark."""
    tokenizer = Tokenizer({"kind": "byte"})
    decoder = StreamDecoder(tokenizer)
    assert [decoder.push(b) for b in "aé€".encode()] == ["a", "", "é", "", "", "€"]
    assert decoder.push(0xE2) == "" and decoder.finish() == "\ufffd"
    assert tokenizer.decode(tokenizer.encode("aé€")) == "aé€"


def test_unknown_tokenizer():
    """A spec nobody knows is refused by name."""
    with pytest.raises(UserError, match="unknown tokenizer"):
        Tokenizer({"kind": "runes"})
