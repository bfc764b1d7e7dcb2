"""A run outlives kills, full disks and failing companions. Run: python -m pytest tests/test_survival.py -m "slow or not slow" """

import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
import types

import pytest
import torch

import checkpoint
from tests.conftest import QUICK, ROOT, fails_with_one_line, run
from tests.test_train import entries, same, weights


def start(*args, **env):
    """train.py in a process of its own, on one thread, so that two runs agree to the last bit."""
    return subprocess.Popen(
        [sys.executable, "train.py", *map(str, args)],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", **env}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def iterations(folder):
    """The iterations of the log's step lines and of its evaluations, in order."""
    log = entries(folder)
    return [e["iter"] for e in log if "loss" in e], [e["iter"] for e in log if "val_loss" in e]


@pytest.mark.slow
def test_kill_at_ten_random_moments(tmp_path, dataset):
    """Saving at every iteration: no kill leaves an unreadable file, and the last weights are the uninterrupted run's."""
    args = [*QUICK, "--use_mla=True", "--pos_emb=rope", "--dropout=0.1", f"--dataset={dataset}", "--checkpoint_interval=1"]
    args += ["--max_iters=150", "--eval_interval=25"]
    whole = start(*args, f"--out_dir={tmp_path}/whole")
    assert whole.wait(120) == 0, whole.stderr.read()
    folder, draw, kills = tmp_path / "parts", random.Random(7), 0
    for moment in [*sorted(draw.sample(range(1, 145), 10)), None]:
        begin = "resume" if (folder / "ckpt.pt").exists() else "scratch"
        process = start(*args, f"--out_dir={folder}", f"--init_from={begin}")
        try:
            if moment is None:
                out, err = process.communicate(timeout=120)
                assert process.returncode == 0 and "done: " in out, err
                break
            for line in process.stdout:
                if (found := re.match(r"iter (\d+):", line)) and int(found[1]) >= moment:
                    break
            else:
                raise AssertionError(process.stderr.read())
            time.sleep(draw.uniform(0, 0.03))  # an iteration and its save take about as long
            kills += process.poll() is None
        finally:
            process.kill()
            process.communicate()
        for path in folder.glob("*.pt"):
            checkpoint.build_model(checkpoint.load(path), path)
    assert kills == 10
    a, b = checkpoint.load(tmp_path / "whole" / "ckpt.pt"), checkpoint.load(folder / "ckpt.pt")
    assert same(a["model"], b["model"]) and a["best_val_loss"] == b["best_val_loss"]
    assert same(weights(tmp_path / "whole", "best.pt"), weights(folder, "best.pt"))
    assert iterations(folder) == iterations(tmp_path / "whole") == (list(range(150)), [0, 25, 50, 75, 100, 125, 150])
    assert not (folder / "old-1").exists()


@pytest.mark.slow
def test_a_disk_that_fills_up_during_a_run_loses_nothing(tmp_path, dataset):
    """Checkpoints and log lines that are cut half-way: a warning each, training goes on, a resume is bit-identical."""
    args = [*QUICK, f"--dataset={dataset}", "--lr_decay_iters=30", "--checkpoint_interval=5"]
    assert start(*args, f"--out_dir={tmp_path}/whole", "--max_iters=30").wait(60) == 0
    here = [*args, f"--out_dir={tmp_path}/o"]
    assert start(*here, "--max_iters=10").wait(60) == 0
    before = {p.name: p.read_bytes() for p in (tmp_path / "o").glob("*.pt")}
    limit = (tmp_path / "o" / "log.jsonl").stat().st_size + 300
    full = subprocess.run(
        [sys.executable, "train.py", *here, "--max_iters=30", "--init_from=resume"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert full.returncode == 0 and "done: " in full.stdout, full.stderr
    assert "warning: no checkpoint written" in full.stderr and "training goes on" in full.stderr
    assert full.stderr.count("log.jsonl cannot be written") == 1 and "Traceback" not in full.stderr
    assert {p.name: p.read_bytes() for p in (tmp_path / "o").glob("*.pt")} == before
    assert not list((tmp_path / "o").glob(".*pt.tmp"))
    assert start(*here, "--max_iters=30", "--init_from=resume").wait(60) == 0
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "o"))
    assert iterations(tmp_path / "o") == iterations(tmp_path / "whole")


def test_a_second_signal_stops_at_once(tmp_path, dataset):
    """In the middle of an iteration that would take minutes; the first one says so."""
    process = start(*QUICK, f"--dataset={dataset}", f"--out_dir={tmp_path}/o", "--gradient_accumulation_steps=100000")
    try:
        while "iteration 0:" not in (line := process.stdout.readline()):
            assert line, process.stderr.read()
        process.send_signal(signal.SIGINT)
        assert "stopping after this iteration" in process.stderr.readline() + process.stderr.readline()
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        began = time.monotonic()
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and time.monotonic() - began < 10
    assert "stopped before" not in out and err.strip() == "train.py: interrupted"


def test_best_weights_of_a_run_stopped_just_before_its_evaluation(tmp_path, dataset):
    """The evaluation that a resume begins with keeps its weights if they are the best so far."""
    args = [*QUICK, f"--dataset={dataset}", f"--out_dir={tmp_path}/o", "--max_iters=10"]
    assert run("train.py", *args).returncode == 0
    held = torch.load(tmp_path / "o" / "ckpt.pt", weights_only=True)
    held["best_val_loss"] = 99.0
    torch.save(held, tmp_path / "o" / "ckpt.pt")
    (tmp_path / "o" / "best.pt").unlink()
    assert run("train.py", *args, "--init_from=resume").returncode == 0
    assert same(weights(tmp_path / "o", "best.pt"), held["model"])


def test_no_checkpoint_of_weights_whose_loss_is_no_number(tmp_path, dataset):
    """Saving at every iteration, a run that breaks leaves nothing that cannot be gone on from."""
    done = run("train.py", *QUICK, f"--dataset={dataset}", f"--out_dir={tmp_path}/o", "--checkpoint_interval=1", "--grad_clip=0",
               "--learning_rate=1e30", "--decay_lr=False", "--max_iters=50", "--eval_interval=40")  # fmt: skip
    assert fails_with_one_line(done, 1, "iteration 1: loss nan", "last good checkpoint: none yet")
    assert not (tmp_path / "o" / "ckpt.pt").exists()


def test_float16_skips_steps_that_overflow(tmp_path, dataset):
    """They are counted, the loss scale comes down, its state is saved, and a resumed run is the uninterrupted one."""
    args = [*QUICK, f"--dataset={dataset}", "--dtype=float16", "--lr_decay_iters=40", "--optimizer=muon"]
    saved = []
    for name, stops in (("whole", [40]), ("parts", [25, 40])):
        here = [*args, f"--out_dir={tmp_path}/{name}"]
        assert run("train.py", *here, "--max_iters=10").returncode == 0
        held = torch.load(tmp_path / name / "ckpt.pt", weights_only=True)
        held["scaler"]["scale"] = 2.0**30
        torch.save(held, tmp_path / name / "ckpt.pt")
        for i, stop in enumerate(stops):
            done = run("train.py", *here, f"--max_iters={stop}", "--init_from=resume")
            assert done.returncode == 0, done.stderr
            assert i or " skipped" in done.stdout
        saved.append(checkpoint.load(tmp_path / name / "ckpt.pt"))
    assert saved[0]["scaler"] == saved[1]["scaler"] and 1 < saved[0]["scaler"]["scale"] < 2.0**30
    assert same(saved[0]["model"], saved[1]["model"])
    log = [e for e in entries(tmp_path / "whole") if "loss" in e]
    assert log[10]["grad_norm"] is None and log[-1]["grad_norm"] > 0 and log[-1]["loss"] < log[0]["loss"]


@pytest.mark.slow
def test_wandb_offline_is_resumed_under_the_same_id(tmp_path, dataset):
    """A run folder below out_dir; the second start goes on with the id that the checkpoint holds."""
    pytest.importorskip("wandb")
    args = [*QUICK, f"--dataset={dataset}", f"--out_dir={tmp_path}/o", "--wandb_log=True"]
    ids = []
    for more in (["--max_iters=10"], ["--max_iters=20", "--init_from=resume"]):
        process = start(*args, *more, WANDB_MODE="offline")
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0 and "wandb is off" not in err, err
        ids.append(checkpoint.load(tmp_path / "o" / "ckpt.pt")["wandb_run_id"])
        time.sleep(1)  # wandb names run folders by the second
    assert ids[0] and ids[0] == ids[1]
    folders = list((tmp_path / "o" / "wandb").glob(f"offline-run-*-{ids[0]}"))
    assert len(folders) == 2 and all(list(f.glob("*.wandb")) for f in folders)


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_a_failing_wandb_costs_nothing_but_a_warning(tmp_path, dataset, monkeypatch, where):
    """Wherever it fails, the run goes on to its end and keeps its own log."""

    def do(name):
        def call(*args, **kwargs):
            if name == where:
                raise ConnectionError("wandb is down")
            return fake

        return call

    fake = types.SimpleNamespace(id="abc123", **{name: do(name) for name in ("init", "log", "finish")})
    monkeypatch.setitem(sys.modules, "wandb", fake)
    done = run("train.py", *QUICK, f"--dataset={dataset}", f"--out_dir={tmp_path}/o", "--wandb_log=True", "--max_iters=10")
    assert done.returncode == 0 and done.stderr.count("wandb is off from here on (ConnectionError: wandb is down)") == 1
    assert len(entries(tmp_path / "o")) == 12
    assert checkpoint.load(tmp_path / "o" / "ckpt.pt")["wandb_run_id"] == (None if where == "init" else "abc123")


def test_no_picture_without_matplotlib(tmp_path, dataset, monkeypatch, capfd):
    """Not installed: nothing is drawn or said. Broken: one warning. Training does not care."""
    args = [*QUICK, f"--dataset={dataset}", "--max_iters=10"]
    with monkeypatch.context() as m:
        m.setitem(sys.modules, "matplotlib", None)
        done = run("train.py", *args, f"--out_dir={tmp_path}/none")
    assert done.returncode == 0 and "loss.png" not in done.stderr + capfd.readouterr().err
    (tmp_path / "fake" / "matplotlib").mkdir(parents=True)
    (tmp_path / "fake" / "matplotlib" / "__init__.py").write_text("raise OSError('no font')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fake"))
    assert run("train.py", *args, f"--out_dir={tmp_path}/broken").returncode == 0
    assert "loss.png from here on (OSError: no font)" in capfd.readouterr().err
    assert not list(tmp_path.glob("*/*loss.png*")) and (tmp_path / "broken" / "best.pt").exists()


def test_a_damaged_log_is_read_as_far_as_it_goes(tmp_path, dataset):
    """Lines cut by a kill, zeros left by a crash, bytes that are no text: a resume drops them and goes on."""
    args = [*QUICK, f"--dataset={dataset}", f"--out_dir={tmp_path}/o"]
    assert run("train.py", *args, "--max_iters=10").returncode == 0
    with open(tmp_path / "o" / "log.jsonl", "ab") as file:
        file.write(b'\0\0\0\n{"iter": 3\n"x"\n{"no": 1}\n\xff\xfe\n{"iter": 12, "loss": 1.0}\n{"iter": 9, "lo')
    assert run("train.py", *args, "--max_iters=20", "--init_from=resume").returncode == 0
    assert iterations(tmp_path / "o") == (list(range(20)), [0, 10, 20])
