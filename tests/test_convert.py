"""The conversion of ordinary attention. Run: python -m pytest tests/test_convert.py"""

import json
import os
import re
import signal

import pytest
import torch

import train
from model import GPT, GPTConfig
from nanomla import checkpoint, conversion, formats
from nanomla.dataset import Meta, write_dataset
from nanomla.progress import Progress
from tests.conftest import (
    QUICK,
    TINY_MLA,
    fails_with_one_line,
    make,
    randomise,
    run,
    save_model,
    tiny_config,
)
from tests.test_formats import cached_logits, foreign, greedy

SIZE = ["--n_layer=2", "--n_head=4", "--n_embd=32", "--block_size=16", "--batch_size=16"]
LEARN = ["--eval_interval=200", "--max_iters=200", "--min_lr=1e-3"]
HEAL = ["--cache=16x", "--method=plain", "--heal_iters=24", "--heal_lr=3e-3"]


def learn(folder, dataset, *flags):
    """A run that has learned its text."""
    args = [*QUICK, *SIZE, *LEARN, f"--dataset={dataset}", f"--out_dir={folder}"]
    done = run("train.py", *args, *flags)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory, dataset):
    return learn(tmp_path_factory.mktemp("source") / "learned", dataset)


@pytest.fixture(scope="module")
def rotary(tmp_path_factory, dataset):
    folder = tmp_path_factory.mktemp("source") / "rotary"
    return learn(folder, dataset, "--pos_emb=rope", "--n_kv_head=2")


def convert(source, dataset, to, *args):
    flags = [f"--init_from={source}", f"--data={dataset}", f"--to={to}"]
    return run("tools.convert", *flags, "--calibration_tokens=4096", *args)


def record(folder):
    return json.loads((folder / "conversion.json").read_text())


def change(folder, after="converted"):
    loss = record(folder)["loss"]
    return loss[after] - loss["source"]


def times(folder):
    """When each file of a folder was written."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_conversion_is_a_run_like_any_other(tmp_path, source, dataset):
    """
    It is opened by sample.py, the export and GPT.from_pretrained; the report says what
    became of each layer; the model card says where it comes from.
    """
    folder = tmp_path / "new" / "latent"
    done = convert(source, dataset, folder, "--cache=4x")
    assert done.returncode == 0, done.stderr
    names = ["best.pt", "ckpt.pt", "conversion.json", "conversion.md"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert [path.name for path in folder.parent.iterdir()] == ["latent"]
    model = GPT.from_pretrained(folder)
    numbers = [layer["latent"] for layer in record(folder)["layers"]]
    assert model.config.attention_name == "mla" and sum(numbers) == 2 * 16
    assert record(folder)["bytes_per_token"] == [4 * 2 * 64, 4 * sum(numbers)]
    report = (folder / "conversion.md").read_text()
    assert report.strip() in done.stdout and change(folder) < 0.02
    for text in ("cache is 4x smaller", "4,096 tokens", "| 128 ", "predicted +", "| 1     |"):
        assert text in report, (text, report)
    done = run("sample.py", f"--out_dir={folder}", "--start=to be", "--max_new_tokens=9")
    assert done.returncode == 0, done.stderr
    assert run("tools.export", f"--out_dir={folder}", f"--to={tmp_path}/e").returncode == 0
    card = (tmp_path / "e" / "README.md").read_text()
    assert f"converted from | {source}/best.pt" in card and "by method loss" in card


def test_grouped_rotary_heads(tmp_path, rotary, dataset):
    """At the source's own cache nothing is lost, at half of it little."""
    done = convert(rotary, dataset, tmp_path / "same", "--cache=1x")
    assert done.returncode == 0, done.stderr
    assert abs(change(tmp_path / "same")) < 1e-5
    assert record(tmp_path / "same")["plan"]["rope_dim"] == 16
    assert "GQA with 2 key/value heads, rotary positions" in done.stdout
    done = convert(rotary, dataset, tmp_path / "half", "--cache=16")
    assert done.returncode == 0, done.stderr
    assert -0.01 < change(tmp_path / "half") < 0.2
    model = GPT.from_pretrained(tmp_path / "half")
    assert len(model.config.rope_freqs) == record(tmp_path / "half")["plan"]["rope_dim"] // 2


def test_healing(tmp_path, source, dataset, monkeypatch):
    """
    It brings the loss down, by train.py's loop. Asked for later, stopped by SIGTERM and started
    again it comes to the result of one command; that command then does nothing more, another one is
    refused, and train.py goes on with heal.py.
    """
    whole = tmp_path / "whole"
    parts = tmp_path / "parts"
    heal = [*HEAL, "--distill=True"]
    assert convert(source, dataset, whole, *heal).returncode == 0
    assert convert(source, dataset, parts, *heal[:2]).returncode == 0
    with monkeypatch.context() as patch:

        def stop_at_9(progress, it, *loss_and_norm, **seconds):
            if it == 9:
                os.kill(os.getpid(), signal.SIGTERM)

        patch.setattr(Progress, "iteration", stop_at_9)
        assert convert(source, dataset, parts, *heal).returncode == 143
    assert "healed" not in record(parts)["loss"]
    iteration = checkpoint.load(parts / "ckpt.pt").iter_num
    assert 9 <= iteration < 24
    done = convert(source, dataset, parts, *heal)
    assert done.returncode == 0 and f"iterations {iteration} to 24" in done.stdout, done.stderr
    assert record(parts)["loss"] == record(whole)["loss"]
    assert change(parts, "healed") < change(parts) / 2
    assert "after 24 iterations of healing" in (parts / "conversion.md").read_text()
    before = times(parts)
    assert convert(source, dataset, parts, *heal).returncode == 0
    assert times(parts) == before
    done = convert(source, dataset, parts, *HEAL)
    assert fails_with_one_line(done, 1, "distill=True", "name a new folder")
    assert run("train.py", parts / "heal.py", "--max_iters=26").returncode == 0
    assert checkpoint.load(parts / "ckpt.pt").iter_num == 26


def test_a_folder_is_written_whole_or_not_at_all(tmp_path, source, dataset, monkeypatch):
    """A full disk leaves nothing; the next conversion removes what a kill left."""

    def full(path, text):
        raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(conversion, "write_text", full)
        done = convert(source, dataset, tmp_path / "to")
    assert fails_with_one_line(done, 1, "No space left on device")
    assert not list(tmp_path.iterdir())
    (tmp_path / ".to.nanomla-999999999.tmp").mkdir()  # no system numbers processes so high
    assert convert(source, dataset, tmp_path / "to").returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["to"]


@pytest.mark.slow
def test_sweep(tmp_path, source, dataset):
    """
    A row for every size, a column for every method, a picture; a second call does nothing. By
    weights alone most is lost, by the loss least.
    """
    folder = tmp_path / "s"
    flags = ["--sweep", "--cache=8x", "--heal_iters=2"]
    done = convert(source, dataset, folder, *flags)
    assert done.returncode == 0, done.stderr
    methods = ["plain", "input", "output", "loss"]
    plain, *between, best = (change(folder / f"8x-{method}") for method in methods)
    assert plain > 2 * max(between) and min(between) > best > 0, (plain, between, best)
    table = (folder / "sweep.md").read_text()
    rows = [line.split("|")[1:-1] for line in table.splitlines() if line.startswith("| ")]
    assert [cell.strip() for cell in rows[0]] == ["cached numbers", "smaller", *methods]
    healed = change(folder / "8x-plain", "healed")
    assert [cell.strip() for cell in rows[1][:3]] == ["8", "8x", f"{plain:+.4f} ({healed:+.4f})"]
    assert re.search(r"trained on as long: [-+]0\.\d+\.", table)
    assert (folder / "sweep.png").read_bytes()[:4] == b"\x89PNG"
    before = {path: t for path, t in times(folder).items() if path.parent != folder}
    assert convert(source, dataset, folder, *flags).returncode == 0
    assert (folder / "sweep.md").read_text() == table
    assert {path: t for path, t in times(folder).items() if path.parent != folder} == before


def save(folder, **settings):
    """A run of random weights over the 20 characters of the dataset."""
    model = randomise(GPT(tiny_config(**{"vocab_size": 20, **settings})), 0.2)
    folder.mkdir()
    save_model(folder, model)
    return folder


def test_what_cannot_be_converted(tmp_path, source, rotary, dataset):
    """One line, and no folder is made."""
    other = tmp_path / "other"
    ids = torch.randint(18, (600,)).numpy()
    meta = Meta(18, {"kind": "char", "chars": "ABCDEFGHIJKLMNOPQR"})
    write_dataset(other, {"train": [ids], "val": [ids]}, meta)
    mla = save(tmp_path / "mla", **TINY_MLA)
    small = save(tmp_path / "small", vocab_size=5)
    broken = save(tmp_path / "broken")
    stored = checkpoint.load(broken / "ckpt.pt")
    stored.model["transformer.h.0.mlp.c_fc.weight"] *= float("nan")
    checkpoint.save(broken, stored, best=False)
    base = {"init_from": source, "data": dataset, "to": tmp_path / "to"}
    cases = [
        ({"to": None}, 2, "say which folder to write: --to"),
        ({"data": other}, 1, "another tokenizer"),
        ({"init_from": mla}, 1, "has MLA", "only MHA and GQA"),
        ({"init_from": small}, 1, "only vocab_size=5"),
        ({"init_from": broken}, 1, "not finite"),
        ({"cache": "65"}, 1, "asks for 65, but"),
        ({"cache": "eight"}, 2, "--cache=eight: write 8x, or a number"),
        ({"init_from": rotary, "rope_dim": 5}, 1, "--rope_dim=5", "an even number from 0 to"),
        ({"block_size": 8, "heal_iters": 2}, 1, "--block_size=8", "the whole context, 16"),
        ({"distill": True}, 2, "distill without heal_iters"),
        ({"sweep": True, "method": "loss"}, 2, "leave out --method"),
        ({"to": other}, 1, "holds other files"),
        ({"to": other / "meta.json"}, 1, "is a file"),
    ]
    for changes, status, *words in cases:
        flags = {k: v for k, v in {**base, **changes}.items() if v is not None}
        done = run("tools.convert", *(f"--{k}={v}" for k, v in flags.items()))
        assert fails_with_one_line(done, status, *words), (changes, done.stderr)
        assert not (tmp_path / "to").exists()


def test_unusual_source(tmp_path, dataset):
    """Settings without effect, and heads so narrow that the latent has nearly all numbers."""
    settings = {"mla_q_latent_dim": 5, "mla_groups": 2, "mla_share_latent": True, "head_dim": 2}
    source = save(tmp_path / "source", **settings)
    done = convert(source, dataset, tmp_path / "to", "--cache=1x", "--ranks=spectrum")
    assert done.returncode == 0, done.stderr
    assert GPT.from_pretrained(tmp_path / "to").config.attention_name == "mla"


def test_distillation(tmp_path, source, dataset):
    """Loss and gradients are cross-entropy and KL divergence from the teacher; it must fit."""

    class Stub:
        teacher, net = make({}), make({}).train()
        model = net

    x, y = torch.randint(23, (2, 3, 16))
    loss, _ = train.Trainer.losses(Stub, x, y)
    log_p, log_q = (m(x, y)[0].log_softmax(-1) for m in (Stub.net, Stub.teacher))
    want = -log_p.gather(2, y[..., None]).mean() + (log_q.exp() * (log_q - log_p)).sum(-1).mean()
    torch.testing.assert_close(loss, want)
    assert all(p.grad is None for p in Stub.teacher.parameters())
    other = save(tmp_path / "other", vocab_size=19)
    args = [*QUICK, *SIZE, f"--dataset={dataset}", f"--init_from={source}"]
    done = run("train.py", *args, f"--out_dir={tmp_path}/c", f"--distill={other}")
    assert fails_with_one_line(done, 1, f"--distill={other}", "19")


@pytest.mark.parametrize(
    ("kind", "flags"),
    [("gpt2", ["--cache=2x", "--svd_method=randomized"]), ("qwen2", ["--cache=1x"])],
)
def test_against_transformers(tmp_path, dataset, kind, flags):
    """
    At the size that loses nothing, weights of transformers keep their logits and text. A folder
    without a tokenizer takes the dataset's.
    """
    theirs = foreign(kind)
    theirs.save_pretrained(tmp_path / "hf")
    done = convert(tmp_path / "hf", dataset, tmp_path / "to", *flags)
    assert done.returncode == 0, done.stderr
    ours, idx = GPT.from_pretrained(tmp_path / "to").eval(), torch.randint(23, (3, 16))
    assert ours.config.attention_name == "mla"
    with torch.no_grad():
        want = theirs(idx).logits
        torch.testing.assert_close(ours(idx, idx)[0], want, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(cached_logits(ours, idx), want[:, 4:], atol=1e-4, rtol=1e-4)
    text = ours.generate(idx[:, :9], 6, temperature=0)
    assert torch.equal(text, greedy(theirs, idx[:, :9]))
    if kind == "gpt2":
        stored = formats.open_weights(tmp_path / "to")
        assert GPTConfig(**stored.model_args).gelu == "tanh"
        assert stored.tokenizer["kind"] == "char"
