"""The loss of whole texts. Run: python -m pytest tests/test_evaluate.py"""

import json
import math

import numpy as np
import pytest
import torch

from model import GPT
from nanomla.dataset import Meta, write_dataset
from nanomla.evaluate import documents, token_losses
from nanomla.tokenizer import Tokenizer
from tests.conftest import KINDS, fails_with_one_line, make, randomise, run, save_model, tiny_config
from tests.test_formats import CHARS, STYLES, load_with_transformers, write
from tests.test_tokenizer import TEXT, byte_level, sentencepiece

LETTERS = CHARS["chars"]


def evaluate(*flags):
    """What the command prints as JSON."""
    done = run("tools.evaluate", "--device=cpu", "--json", *flags)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return json.loads(done.stdout)


def lines_of(path):
    """The objects of --per_token."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def loss_after(model, context, target):
    """The loss of one token after these, in a pass of its own."""
    with torch.no_grad():
        logits, _ = model(torch.tensor([context.tolist()]))
    return -logits[0, -1].double().log_softmax(-1)[target].item()


@pytest.mark.parametrize("stride", [16, 5, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_every_token_after_its_context(kind, stride):
    """Each loss is that of one pass over the token's context, in windows and through the cache."""
    model = make(kind)
    tokens = np.random.randint(23, size=42)
    expected = []
    for t in range(1, len(tokens)):
        begin = stride * max(0, math.ceil((t - 16) / stride))
        expected.append(loss_after(model, tokens[begin:t], tokens[t]))
    for cached in (False, True):
        losses = token_losses(model, tokens, stride=stride, cached=cached)
        torch.testing.assert_close(losses, torch.tensor(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stride", [11, 4])
@pytest.mark.parametrize("kind", STYLES)
def test_as_transformers_measures_perplexity(tmp_path, kind, stride):
    """
    The loop of its documentation, over an export that it opens itself. Its windows hold one token
    more than ours, as they count the last target.
    """
    write(tmp_path / "e", randomise(GPT(tiny_config(**STYLES[kind])), 0.2), kind, CHARS)
    text = "".join(LETTERS[i] for i in np.random.randint(23, size=90))
    (tmp_path / "a.txt").write_text(text)
    theirs = load_with_transformers(tmp_path / "e").eval()
    ids = torch.tensor([[LETTERS.index(char) for char in text]])
    max_length = 12
    total = 0.0
    count = 0
    previous = 0
    for begin in range(0, 90, stride):
        end = min(begin + max_length, 90)
        labels = ids[:, begin:end].clone()
        labels[:, : previous - end] = -100
        scored = int((labels[:, 1:] != -100).sum())
        with torch.no_grad():
            total += theirs(ids[:, begin:end], labels=labels).loss.item() * scored
        count += scored
        previous = end
        if end == 90:
            break
    flags = (f"--init_from={tmp_path}/e", f"--text={tmp_path}/a.txt", f"--stride={stride}")
    ours = evaluate(*flags, "--block_size=11")
    assert count == ours["tokens"] == ours["bytes"] == 89 and ours["start"] is None
    assert abs(ours["loss"] - total / count) < 1e-5
    assert abs(ours["perplexity"] - math.exp(total / count)) < 1e-3
    assert abs(ours["bits_per_byte"] - total / count / math.log(2)) < 1e-5
    cached = evaluate(*flags, "--block_size=11", "--cached=True")
    assert abs(cached["loss"] - ours["loss"]) < 1e-5 and cached["cached"] is True


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_documents_see_no_other(kind, cached):
    """Each has the losses that it has alone, behind the end of the one before it."""
    model = make(kind)
    tokens = np.random.randint(2, 23, size=60)
    tokens[[7, 8, 30, 34]] = 1
    tokens[50] = 0  # another id that ends a document
    losses = token_losses(model, tokens, stride=9, ends=(1, 0), cached=cached)
    pairs = documents(tokens, (1, 0))
    assert pairs == [(0, 7), (7, 8), (8, 30), (30, 34), (34, 50), (50, 59)]
    alone = [token_losses(model, tokens[a : b + 1], stride=9) for a, b in pairs]
    torch.testing.assert_close(losses, torch.cat(alone), rtol=1e-5, atol=1e-5)
    assert documents(tokens, ()) == [(0, 59)]


def test_a_dataset_and_its_documents(tmp_path):
    """The end of a document begins the first, too; bytes are those of the text alone."""
    tokenizer = {"kind": "hf", "json": byte_level().to_str(), "end": 0, "bos": 0}
    ids = [5, 6, 7, 0, 8, 9, 0, 10]
    meta = Meta(280, tokenizer, split_bytes={"train": 6, "val": 6})
    write_dataset(tmp_path / "d", {"train": [np.array(ids)], "val": [np.array(ids)]}, meta)
    model = randomise(GPT(tiny_config(vocab_size=280)))
    (tmp_path / "run").mkdir()
    save_model(tmp_path / "run", model, tokenizer=tokenizer, config={"dataset": str(tmp_path)})
    flags = (f"--out_dir={tmp_path}/run", f"--dataset={tmp_path}/d", "--within_documents=True")
    got = evaluate(*flags, f"--per_token={tmp_path}/t.jsonl")
    expected = []
    for part in ([0, 5, 6, 7, 0], [0, 8, 9, 0], [0, 10]):
        part = np.array(part)
        expected += [loss_after(model, part[:t], part[t]) for t in range(1, len(part))]
    assert (got["tokens"], got["documents"], got["start"], got["bytes"]) == (8, 3, 0, 6)
    assert abs(got["loss"] - sum(expected) / 8) < 1e-5
    assert abs(got["bits_per_byte"] - sum(expected) / math.log(2) / 6) < 1e-4
    records = lines_of(tmp_path / "t.jsonl")
    assert [record["id"] for record in records] == ids
    assert [record["loss"] for record in records] == pytest.approx(expected, abs=1e-5)
    whole = evaluate(*flags[:2])
    assert whole["documents"] == 1 and whole["loss"] != got["loss"]


@pytest.mark.parametrize("kind", ["byte", "byte level", "sentencepiece"])
def test_the_texts_of_all_tokens_are_the_text(tmp_path, kind):
    """Characters of several tokens come with their last, and what begins a text is no part."""
    spec = {"kind": "byte"}
    if kind == "byte level":
        spec = {"kind": "hf", "json": byte_level().to_str(), "end": 0}
    if kind == "sentencepiece":
        spec = {"kind": "hf", "json": sentencepiece().to_str(), "bos": 1, "end": 2}
    size = Tokenizer(spec).vocab_size
    save_model(tmp_path, randomise(GPT(tiny_config(vocab_size=size))), tokenizer=spec)
    (tmp_path / "a.txt").write_bytes(TEXT.encode())
    flags = (f"--init_from={tmp_path}", f"--text={tmp_path}/a.txt")
    got = evaluate(*flags, f"--per_token={tmp_path}/t.jsonl")
    records = lines_of(tmp_path / "t.jsonl")
    assert "".join(record["text"] for record in records).removeprefix(" ") == TEXT
    losses = [record["loss"] for record in records]
    nbytes = len(TEXT.encode())
    if kind == "sentencepiece":
        assert got["start"] == 1 and got["tokens"] == len(records) and got["bytes"] == nbytes
    else:
        assert losses.pop(0) is None and got["start"] is None
        first = len(records[0]["text"].encode())
        assert got["tokens"] == len(losses) and got["bytes"] == nbytes - first
    assert abs(sum(losses) / len(losses) - got["loss"]) < 1e-5


def test_what_is_printed(tmp_path, dataset):
    """A run's own dataset unless one is named; counts beside every figure; each number format."""
    size = json.loads((dataset / "meta.json").read_text())["vocab_size"]
    tokenizer = json.loads((dataset / "meta.json").read_text())["tokenizer"]
    model = make("MLA", vocab_size=size)
    save_model(tmp_path, model, tokenizer=tokenizer, config={"dataset": str(dataset)})
    done = run("tools.evaluate", f"--out_dir={tmp_path}", "--device=cpu", "--stride=8")
    first, figures, settings = done.stdout.splitlines()
    got = evaluate(f"--out_dir={tmp_path}", "--stride=8")
    assert first.startswith(f"{tmp_path}/ckpt.pt on {dataset}, val: 599 tokens, all but the first")
    assert f"loss {got['loss']:.4f} nats" in figures and "bits per byte (of 599)" in figures
    assert settings.startswith("block_size=16, stride=8, within_documents=False")
    assert settings.endswith("dtype=float32, device=cpu") and got["dtype"] == "float32"
    for flags in (["--dtype=bfloat16"], ["--cached=True", "--cache_dtype=int8"]):
        other = evaluate(f"--out_dir={tmp_path}", "--stride=8", *flags)
        assert 0 < abs(other["loss"] - got["loss"]) < 0.1


def test_what_cannot_be_evaluated_is_named(tmp_path, dataset):
    """One line each."""
    save_model(tmp_path, make("MLA"), tokenizer=CHARS)
    texts = {"two": b"ab", "one": b"a", "none": b"", "latin": b"\xe9a", "other": b"aXb"}
    for name, content in texts.items():
        (tmp_path / name).write_bytes(content)
    for status, flags, *words in (
        (2, [], "--text=FILE or --dataset=NAME"),
        (1, ["--text=one"], "no token to predict"),
        (1, ["--text=none"], "no token to predict"),
        (1, ["--text=latin"], "cannot be read"),
        (1, ["--text=missing"], "missing: cannot be read (No such file"),
        (1, ["--text=other"], "'X' is not in this model's vocabulary"),
        (1, [f"--dataset={dataset}"], "another tokenizer than --dataset="),
        (2, ["--text=two", "--block_size=17"], "--block_size=17", "is 16"),
        (2, ["--text=two", "--stride=17"], "--stride=17", "at most block_size=16"),
        (2, ["--text=two", "--within_documents=True"], "no token that ends a document"),
        (2, ["--text=two", "--cache_dtype=int8"], "add --cached=True"),
    ):
        flags = [flag.replace("--text=", f"--text={tmp_path}/") for flag in flags]
        done = run("tools.evaluate", f"--out_dir={tmp_path}", *flags)
        assert fails_with_one_line(done, status, *words)
    done = run(
        "tools.evaluate", f"--out_dir={tmp_path}", f"--text={tmp_path}/two",
        f"--per_token={tmp_path}/no/file",
    )
    assert fails_with_one_line(done, 1, "--per_token=", "cannot be written (No such file")
