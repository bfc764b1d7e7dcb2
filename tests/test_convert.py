"""The conversion of ordinary attention. Run: python -m pytest tests/test_convert.py"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

import train
from model import GPT, GPTConfig
from nanomla import checkpoint, formats
from nanomla.dataset import Meta, write_dataset
from tests.conftest import (
    QUICK,
    ROOT,
    TINY_MLA,
    fails_with_one_line,
    randomise,
    run,
    save_model,
    tiny_config,
)
from tests.test_formats import cached_logits, foreign, greedy, transformers_gpt2
from tests.test_train import entries

SIZE = ["--n_layer=2", "--n_head=4", "--n_embd=32", "--block_size=16", "--batch_size=16"]
LEARN = ["--eval_interval=200", "--max_iters=200", "--min_lr=1e-3"]


def learn(tmp_path_factory, dataset, name, *flags):
    """A run that has learned its text."""
    folder = tmp_path_factory.mktemp("source") / name
    args = [*QUICK, *SIZE, *LEARN, f"--dataset={dataset}", f"--out_dir={folder}"]
    done = run("train.py", *args, *flags)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory, dataset):
    return learn(tmp_path_factory, dataset, "learned")


@pytest.fixture(scope="module")
def rotary(tmp_path_factory, dataset):
    return learn(tmp_path_factory, dataset, "rotary", "--pos_emb=rope", "--n_kv_head=2")


def convert(source, dataset, to, *args):
    flags = [f"--init_from={source}", f"--data={dataset}", f"--to={to}"]
    return run("tools.convert", *flags, "--calibration_tokens=4096", *args)


def record(folder):
    return json.loads((folder / "conversion.json").read_text())


def change(folder, after="converted"):
    loss = record(folder)["loss"]
    return loss[after] - loss["source"]


def test_a_conversion_is_a_run_like_any_other(tmp_path, source, dataset):
    """
    It is opened by sample.py, train.py, the export and GPT.from_pretrained; the report says what
    became of each layer; the model card says where it comes from.
    """
    folder = tmp_path / "new" / "latent"
    done = convert(source, dataset, folder, "--cache=4x")
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in folder.iterdir()) == [
        "best.pt", "ckpt.pt", "conversion.json", "conversion.md",
    ]  # fmt: skip
    assert [p.name for p in folder.parent.iterdir()] == ["latent"]
    model = GPT.from_pretrained(folder)
    numbers = [layer["latent"] for layer in record(folder)["layers"]]
    assert model.config.attention_name == "mla" and sum(numbers) == 2 * 16
    assert model.make_cache(1, 2).bytes_per_token == 4 * sum(numbers)
    assert record(folder)["bytes_per_token"] == [4 * 2 * 64, 4 * sum(numbers)]
    report = (folder / "conversion.md").read_text()
    assert report.strip() in done.stdout and change(folder) < 0.02
    for text in ("cache is 4x smaller", "4,096 tokens", "| 128 ", f"predicted {'+'}", "| 1     |"):
        assert text in report, (text, report)
    start = ["--start=to be", "--max_new_tokens=9"]
    for flags in ([], ["--cache_dtype=int8"], ["--use_svd=True", "--svd_rank=4"]):
        done = run("sample.py", f"--out_dir={folder}", *start, *flags)
        assert done.returncode == 0, done.stderr
    assert run("tools.export", f"--out_dir={folder}", f"--to={tmp_path}/e").returncode == 0
    card = (tmp_path / "e" / "README.md").read_text()
    assert f"converted from | {source}/best.pt" in card and "by method loss" in card
    assert GPT.from_pretrained(tmp_path / "e").config == model.config
    args = [*QUICK, f"--dataset={dataset}", "--block_size=16", "--max_iters=2"]
    done = run("train.py", *args, f"--init_from={folder}", f"--out_dir={tmp_path}/t")
    assert done.returncode == 0, done.stderr
    done = run("tools.bench", "--report", f"--init_from={folder}")
    assert re.search(r"bytes per token, float32 +\| 128 +\| 512 ", done.stdout), done.stderr


def test_methods_beside_each_other(tmp_path, source, dataset):
    """Without weights most is lost, with the loss's own least; at full rank nothing by any."""
    for method in ("plain", "input", "output", "loss"):
        done = convert(source, dataset, tmp_path / method, "--cache=8x", f"--method={method}")
        assert done.returncode == 0, done.stderr
    plain, *between, best = (change(tmp_path / m) for m in ("plain", "input", "output", "loss"))
    assert plain > 2 * max(between) and min(between) > best > 0, (plain, between, best)
    exact = convert(source, dataset, tmp_path / "exact", "--cache=2x", "--method=plain")
    assert exact.returncode == 0 and abs(change(tmp_path / "exact")) < 1e-5


def test_grouped_rotary_heads(tmp_path, rotary, dataset):
    """At the source's own cache nothing is lost; at half of it little; more is refused."""
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
    done = convert(rotary, dataset, tmp_path / "fixed", "--cache=16", "--rope_dim=4")
    assert done.returncode == 0 and record(tmp_path / "fixed")["plan"]["rope_dim"] == 4


HEAL = ["--cache=16x", "--method=plain", "--heal_iters=24", "--heal_lr=3e-3"]


def test_healing_by_trains_own_loop(tmp_path, source, dataset):
    """
    The loss comes down again, with distillation and without; the log is train.py's; the same
    command does nothing more, another is refused, and train.py goes on with heal.py.
    """
    for name, flags in (("a", []), ("b", ["--distill=True"])):
        done = convert(source, dataset, tmp_path / name, *HEAL, *flags)
        assert done.returncode == 0, done.stderr
        assert change(tmp_path / name, "healed") < change(tmp_path / name) / 2
        assert "after 24 iterations of healing" in (tmp_path / name / "conversion.md").read_text()
        assert entries(tmp_path / name)[-1]["iter"] == 24
    folder = tmp_path / "b"
    assert f"distill = '{source}'" in (folder / "heal.py").read_text()
    before = {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    done = convert(source, dataset, folder, *HEAL, "--distill=True")
    assert done.returncode == 0 and "after 24 iterations" in done.stdout
    assert {p: p.stat().st_mtime_ns for p in folder.iterdir()} == before
    done = convert(source, dataset, folder, *HEAL)
    assert fails_with_one_line(done, 1, "distill=True", "name a new folder")
    moved = tmp_path / "moved"
    folder.rename(moved)
    assert convert(source, dataset, moved, *HEAL, "--distill=True").returncode == 0
    moved.rename(folder)
    assert run("train.py", folder / "heal.py", "--max_iters=26").returncode == 0
    assert checkpoint.load(folder / "ckpt.pt").iter_num == 26


def test_healing_may_be_asked_for_later(tmp_path, source, dataset):
    """The conversion is not done again, and its copy heals in its own folder."""
    assert convert(source, dataset, tmp_path / "a", *HEAL[:2]).returncode == 0
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    before = (tmp_path / "a" / "ckpt.pt").read_bytes()
    done = convert(source, dataset, tmp_path / "b", *HEAL)
    assert done.returncode == 0 and "iterations 0 to 24" in done.stdout, done.stderr
    assert (tmp_path / "a" / "ckpt.pt").read_bytes() == before
    assert change(tmp_path / "b", "healed") < change(tmp_path / "a") / 2
    (tmp_path / "b" / "ckpt.pt").unlink()
    (tmp_path / "b" / "best.pt").unlink()
    done = convert(source, dataset, tmp_path / "b", *HEAL)
    assert fails_with_one_line(done, 1, "holds other files")


def test_interrupted_healing_goes_on(tmp_path, source, dataset):
    """Stopped by SIGTERM and started again with the same command: the uninterrupted result."""
    args = [*HEAL[:2], "--heal_iters=400", "--heal_lr=3e-3", "--calibration_tokens=4096"]
    flags = [f"--init_from={source}", f"--data={dataset}", *args]

    def start(folder):
        command = [sys.executable, "-m", "tools.convert", *flags, f"--to={folder}"]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=pipe, stderr=pipe, text=True)

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    stopped = start(parts)
    for line in stopped.stdout:
        if line.startswith("iter 40:"):
            stopped.send_signal(signal.SIGTERM)
            break
    stopped.communicate(timeout=60)
    assert stopped.returncode == 143 and "healed" not in record(parts)["loss"]
    made = (parts / "conversion.json").stat().st_mtime_ns
    at = checkpoint.load(parts / "ckpt.pt").iter_num
    assert 40 <= at < 400
    for folder in (parts, whole):
        process = start(folder)
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert (f"iterations {at} to 400" in out) == (folder == parts)
    assert made < (parts / "conversion.json").stat().st_mtime_ns
    assert record(parts)["loss"] == record(whole)["loss"]


def test_killed_while_converting(tmp_path, source, dataset):
    """Before the healing there is a whole folder or none, whenever the process dies."""
    command = [sys.executable, "-m", "tools.convert", f"--init_from={source}", f"--data={dataset}"]
    for i, wait in enumerate((2.5, 3.5)):
        folder = tmp_path / str(i)
        process = subprocess.Popen([*command, f"--to={folder}"], cwd=ROOT, stdout=-3, stderr=-3)
        time.sleep(wait)
        process.kill()
        process.wait()
        if folder.exists():
            assert GPT.from_pretrained(folder) and record(folder)


def test_sweep(tmp_path, source, dataset):
    """A row for every size, a column for every method, a picture; a second call does nothing."""
    flags = ["--sweep", "--cache=4x,16x", "--heal_iters=4", "--balance=2"]
    done = convert(source, dataset, tmp_path / "s", *flags)
    assert done.returncode == 0, done.stderr
    table = (tmp_path / "s" / "sweep.md").read_text()
    rows = [line.split("|")[1:-1] for line in table.splitlines() if line.startswith("| ")]
    assert [cell.strip() for cell in rows[0]] == [
        "cached numbers", "smaller", "plain", "input", "output", "loss",
    ]  # fmt: skip
    assert [row[0].strip() for row in rows[1:]] == ["16", "4"]
    lost, healed = (change(tmp_path / "s" / "16x-plain", k) for k in ("converted", "healed"))
    assert rows[2][2].strip() == f"{lost:+.4f} ({healed:+.4f})"
    assert re.search(r"trained on as long: [-+]0\.\d+\.", table)
    assert (tmp_path / "s" / "sweep.png").read_bytes()[:4] == b"\x89PNG"
    (tmp_path / "s" / "sweep.md").unlink()
    times = {p: p.stat().st_mtime_ns for p in tmp_path.glob("s/*/*")}
    assert convert(source, dataset, tmp_path / "s", *flags).returncode == 0
    assert (tmp_path / "s" / "sweep.md").read_text() == table
    assert {p: p.stat().st_mtime_ns for p in tmp_path.glob("s/*/*")} == times


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
    slots = save(tmp_path / "slots", use_latent_tokens=True, n_latent_tokens=3)
    small = save(tmp_path / "small", vocab_size=5)
    narrow = save(tmp_path / "narrow", head_dim=2)
    broken = save(tmp_path / "broken")
    stored = checkpoint.load(broken / "ckpt.pt")
    stored.model["transformer.h.0.mlp.c_fc.weight"] *= float("nan")
    checkpoint.save(broken, stored, best=False)
    odd = save(tmp_path / "odd")
    stored = checkpoint.load(odd / "ckpt.pt")
    stored.config = {"batch_size": "many"}
    checkpoint.save(odd, stored, best=False)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    base = {"init_from": source, "data": dataset, "to": tmp_path / "to"}
    cases = [
        ({"init_from": None}, 2, "say which model: --init_from"),
        ({"data": None}, 2, "say which text: --data"),
        ({"to": None}, 2, "say which folder to write: --to"),
        ({"data": tmp_path / "nowhere"}, 1, "is not prepared"),
        ({"data": other}, 1, "another tokenizer"),
        ({"init_from": tmp_path / "nothing"}, 1, "no checkpoint in"),
        ({"init_from": mla}, 1, "already is a model with latent attention (mla_latent_dim=7)"),
        ({"init_from": slots}, 1, "has latent tokens"),
        ({"init_from": small}, 1, "only vocab_size=5"),
        ({"cache": "65"}, 1, "asks for 65, but"),
        ({"cache": "0.5x"}, 1, "asks for 128, but"),
        ({"cache": "100x"}, 1, "--cache=100x leaves 0 numbers; the least is 1"),
        ({"init_from": rotary, "cache": "2"}, 1, "the least is 3"),
        ({"cache": "eight"}, 2, "--cache=eight: write 8x, or a number"),
        ({"cache": "3.5"}, 2, "--cache=3.5: write 8x"),
        ({"cache": "9" * 400}, 2, "write 8x"),
        ({"init_from": narrow, "cache": "1x"}, 1, "must be smaller than MHA's 16"),
        ({"init_from": broken}, 1, "not finite"),
        ({"init_from": odd, "heal_iters": 2}, 1, "its run's settings", "batch_size"),
        ({"heal_lr": 0.1}, 2, "heal_lr without heal_iters"),
        ({"balance": 2.0}, 2, "balance has no effect on method=loss"),
        ({"sweep": True, "method": "loss"}, 2, "leave out --method"),
        ({"sweep": True, "rope_dim": 4}, 1, "0 without rotary positions"),
        ({"sweep": True, "to": source}, 1, "holds a run"),
        ({"cache": "0x"}, 2, "--cache=0x: write"),
        ({"cache": "2x,4x"}, 2, "--cache=2x,4x: write"),
        ({"rope_dim": 4}, 1, "--rope_dim=4", "0 without rotary positions"),
        ({"init_from": rotary, "rope_dim": 5}, 1, "--rope_dim=5", "an even number from 0 to"),
        ({"method": "best"}, 2, "plain, input, output, loss"),
        ({"calibration_tokens": 0}, 2, "calibration_tokens"),
        ({"block_size": 17}, 1, "--block_size=17", "is 16"),
        ({"block_size": 8, "heal_iters": 2}, 1, "--block_size=8", "the whole context, 16"),
        ({"distill": True}, 2, "distill without heal_iters"),
        ({"to": tmp_path / "full"}, 1, "holds other files"),
        ({"to": tmp_path / "full" / "x"}, 1, "is a file"),
        ({"to": tmp_path / "full" / "x" / "y"}, 1, "is a file"),
        ({"to": "."}, 1, "is the current folder"),
        ({"to": "a" * 300}, 1, "cannot be written"),
        ({"to": "/proc/x"}, 1, "cannot be written"),
    ]
    for changes, status, *words in cases:
        flags = {k: v for k, v in {**base, **changes}.items() if v is not None}
        done = run("tools.convert", *(f"--{k}={v}" for k, v in flags.items()))
        assert fails_with_one_line(done, status, *words), (changes, done.stderr)
        assert not (tmp_path / "to").exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"mla_q_latent_dim": 5, "mla_groups": 2, "mla_share_latent": True},
        {"pos_emb": "rope", "mla_rope": "latent", "mla_nope_dim": 3, "mla_rope_dim": 2},
        {"n_head": 1, "n_embd": 8, "dropout": 0.3, "tie_weights": False},
        {"use_svd": True, "svd_rank": 2, "n_kv_head": 1},
        {"head_dim": 2},
    ],
)
def test_unusual_sources(tmp_path, dataset, settings):
    """Settings that ordinary attention has without effect, and shapes at the border."""
    source = save(tmp_path / "source", **settings)
    done = convert(source, dataset, tmp_path / "to", "--cache=2x", "--ranks=spectrum")
    assert done.returncode == 0, done.stderr
    assert GPT.from_pretrained(tmp_path / "to").config.attention_name == "mla"


@pytest.mark.parametrize(
    "broken",
    [
        "[]", "{", '{"asked": {}, "loss": {}, "plan": {}}', {"asked": []}, {"layers": [{}]},
        {"loss": {"source": "x"}}, {"plan": {}}, {"cached_numbers": [1, 2, 3]}, {"more": 1},
        {"cached_numbers": [2, 0]},
        {"calibration_tokens": "many"},
    ],
)  # fmt: skip
def test_a_damaged_record(tmp_path, source, dataset, broken):
    """One line that names the file, from the conversion and from an export."""
    folder = save(tmp_path / "run")
    good = {
        "source": "s", "attention": "MHA", "data": "d", "calibration_tokens": 1, "layers": [],
        "plan": {"method": "loss", "spread": True, "rope_dim": 0, "balance": 1.0},
        "loss": {"source": 1.0, "converted": 1.0}, "asked": {"heal_iters": 0},
        "cached_numbers": [2, 1], "bytes_per_token": [2, 1],
    }  # fmt: skip
    (folder / "conversion.json").write_text(json.dumps(good))
    assert run("tools.export", f"--out_dir={folder}", f"--to={tmp_path}/e").returncode == 0
    text = broken if isinstance(broken, str) else json.dumps(good | broken)
    (folder / "conversion.json").write_text(text)
    for done in (
        convert(source, dataset, folder),
        run("tools.export", f"--out_dir={folder}", f"--to={tmp_path}/e"),
    ):
        assert fails_with_one_line(done, 1, "conversion.json: ", "(")


def test_train_names_the_command(tmp_path, source, dataset):
    """use_mla on weights with ordinary attention is an error with the way out, also for GPT-2."""
    transformers_gpt2().save_pretrained(tmp_path / "gpt2")
    for name in (source, tmp_path / "gpt2", "gpt2-medium"):  # the last is not fetched
        args = [*QUICK, "--use_mla=True", f"--dataset={dataset}", f"--out_dir={tmp_path}/o"]
        done = run("train.py", *args, f"--init_from={name}")
        command = f"python -m tools.convert --init_from={name} --cache=8x --data={dataset} --to="
        assert fails_with_one_line(done, 1, "has ordinary attention", command)
    args = [*QUICK, "--use_mla=True", f"--dataset={dataset}", f"--out_dir={source}"]
    done = run("train.py", *args, "--init_from=resume", "--eval_only")
    assert done.returncode == 0 and "use_mla=True (--use_mla=True) is not used" in done.stderr
    assert f"convert it: python -m tools.convert --init_from={source} --cache=8x" in done.stderr


def test_distillation(tmp_path, source, dataset):
    """
    The loss that is trained on has the KL divergence from the teacher beside the cross-entropy:
    none from the model itself; gradients and loss are those of the formula.
    """
    args = [*QUICK, *SIZE, f"--dataset={dataset}", "--max_iters=1", f"--init_from={source}"]
    alone = run("train.py", *args, f"--out_dir={tmp_path}/a")
    taught = run("train.py", *args, f"--out_dir={tmp_path}/b", f"--distill={source}")
    assert alone.returncode == taught.returncode == 0, taught.stderr
    losses = [entries(tmp_path / name)[1]["loss"] for name in "ab"]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)

    class Stub:
        teacher, net = randomise(GPT(tiny_config())), randomise(GPT(tiny_config())).train()

    x, y = torch.randint(23, (2, 3, 16))
    loss = train.Trainer.loss(Stub, x, y)
    log_p, log_q = (m(x, y)[0].log_softmax(-1) for m in (Stub.net, Stub.teacher))
    want = -log_p.gather(2, y[..., None]).mean() + (log_q.exp() * (log_q - log_p)).sum(-1).mean()
    torch.testing.assert_close(loss, want)
    assert all(p.grad is None for p in Stub.teacher.parameters())
    for settings, words in (({"vocab_size": 19}, "19"), ({"block_size": 15}, "block_size=15")):
        bad = save(tmp_path / f"t{words}", **settings)
        done = run("train.py", *args, f"--out_dir={tmp_path}/c", f"--distill={bad}")
        assert fails_with_one_line(done, 1, f"--distill={bad}", words)


def test_gpt2_weights_and_the_randomized_svd(tmp_path, dataset):
    """A Hugging Face folder without a tokenizer is converted on a dataset whose ids it knows."""
    transformers_gpt2().save_pretrained(tmp_path / "gpt2")
    done = convert(tmp_path / "gpt2", dataset, tmp_path / "to", "--svd_method=randomized")
    assert done.returncode == 0, done.stderr
    stored = formats.open_weights(tmp_path / "to")
    assert GPTConfig(**stored.model_args).gelu == "tanh" and stored.tokenizer["kind"] == "char"


@pytest.mark.parametrize(
    ("kind", "cache"), [("gpt2", "2x"), ("llama", "1x"), ("qwen2", "1x"), ("llama, MHA", "1x")]
)
def test_against_transformers(tmp_path, dataset, kind, cache):
    """At the size that loses nothing, weights of transformers keep their logits and text."""
    heads = {"num_key_value_heads": 4} if "MHA" in kind else {}
    theirs = transformers_gpt2() if kind == "gpt2" else foreign(kind.split(",")[0], **heads)
    theirs.save_pretrained(tmp_path / "hf")
    done = convert(tmp_path / "hf", dataset, tmp_path / "to", f"--cache={cache}")
    assert done.returncode == 0, done.stderr
    ours, idx = GPT.from_pretrained(tmp_path / "to").eval(), torch.randint(23, (3, 16))
    assert ours.config.attention_name == "mla"
    with torch.no_grad():
        want = theirs(idx).logits
        torch.testing.assert_close(ours(idx, idx)[0], want, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(cached_logits(ours, idx), want[:, 4:], atol=1e-4, rtol=1e-4)
    text = ours.generate(idx[:, :9], 6, temperature=0)
    assert torch.equal(text, greedy(theirs, idx[:, :9]))
