"""
A run outlives kills, signals and full disks.
Run: python -m pytest tests/test_survival.py -m "slow or not slow"
"""

import os
import pty
import random
import re
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch

import train
from nanomla import checkpoint
from nanomla.dataset import locked
from nanomla.distributed import StopSignals
from tests.conftest import QUICK, ROOT, fails_with_one_line, run
from tests.test_train import entries, iterations, same, weights


def start(*args, **options):
    """train.py in a process of its own, on one thread, so that two runs agree to the last bit."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "train.py", *map(str, args)]
    return subprocess.Popen(command, cwd=ROOT, env=environment, **options)


@pytest.mark.slow
def test_kill_at_ten_random_moments(tmp_path, dataset):
    """
    Saving at every iteration: no kill leaves an unreadable file, and the last weights are those of
    the uninterrupted run.
    """
    args = [*QUICK, "--use_mla=True", "--pos_emb=rope", "--dropout=0.1", f"--dataset={dataset}"]
    args += ["--checkpoint_interval=1", "--max_iters=150", "--eval_interval=25"]
    assert run("train.py", *args, f"--out_dir={tmp_path}/full").returncode == 0
    folder = tmp_path / "parts"
    draw = random.Random(7)
    for moment in sorted(draw.sample(range(1, 145), 10)):
        begin = "resume" if (folder / "ckpt.pt").exists() else "scratch"
        process = start(*args, f"--out_dir={folder}", f"--init_from={begin}")
        try:
            for line in process.stdout:
                iteration = re.match(r"iter (\d+):", line)
                if iteration and int(iteration[1]) >= moment:
                    break
            time.sleep(draw.uniform(0, 0.03))  # an iteration and its save take about as long
            assert process.poll() is None, process.stderr.read()
        finally:
            process.kill()
            process.communicate()
        for path in folder.glob("*.pt"):
            checkpoint.build(checkpoint.load(path))
    resume = [f"--out_dir={folder}", "--init_from=resume"]
    assert run("train.py", *args, *resume).returncode == 0
    a, b = checkpoint.load(tmp_path / "full" / "ckpt.pt"), checkpoint.load(folder / "ckpt.pt")
    assert same(a.model, b.model) and a.best_val_loss == b.best_val_loss
    assert same(weights(tmp_path / "full", "best.pt"), weights(folder, "best.pt"))
    assert iterations(folder) == iterations(tmp_path / "full")
    assert not (folder / "old-1").exists()


@pytest.mark.slow
def test_a_disk_that_fills_up_during_a_run_loses_nothing(tmp_path, dataset):
    """
    Checkpoints and log lines that are cut half-way: a warning each, training goes on, a resume is
    bit-identical.
    """
    args = [*QUICK, f"--dataset={dataset}", "--lr_decay_iters=30", "--checkpoint_interval=5"]
    assert run("train.py", *args, f"--out_dir={tmp_path}/full", "--max_iters=30").returncode == 0
    here = [*args, f"--out_dir={tmp_path}/o"]
    assert run("train.py", *here, "--max_iters=10").returncode == 0
    before = {p.name: p.read_bytes() for p in (tmp_path / "o").glob("*.pt")}
    limit = (tmp_path / "o" / "log.jsonl").stat().st_size + 300
    full = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    process = start(*here, "--max_iters=30", "--init_from=resume", preexec_fn=full)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "done: " in out, err
    assert "warning: no checkpoint written" in err and "File too large; training goes on" in err
    assert err.count("log.jsonl cannot be written") == 1 and "Traceback" not in err
    assert {p.name: p.read_bytes() for p in (tmp_path / "o").glob("*.pt")} == before
    assert not list((tmp_path / "o").glob(".*.tmp"))
    assert run("train.py", *here, "--max_iters=30", "--init_from=resume").returncode == 0
    assert same(weights(tmp_path / "full"), weights(tmp_path / "o"))
    assert iterations(tmp_path / "o") == iterations(tmp_path / "full")


def test_a_signal_stops_after_the_iteration_with_a_checkpoint(tmp_path, dataset, monkeypatch):
    """The run ends by itself, resumable; the exit status says which signal it was."""
    gradients = train.Trainer.gradients

    def stopped(self, it):
        if it == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return gradients(self, it)

    monkeypatch.setattr(train.Trainer, "gradients", stopped)
    args = [*QUICK, f"--dataset={dataset}", f"--out_dir={tmp_path}/o", "--max_iters=100000"]
    done = run("train.py", *args)
    assert done.returncode == 128 + signal.SIGTERM and "Traceback" not in done.stderr
    assert "stopped before iteration 6; go on with --init_from=resume" in done.stdout
    assert checkpoint.load(tmp_path / "o" / "ckpt.pt").iter_num == 6


def test_a_second_signal_stops_at_once(capfd):
    """The first one is announced."""
    with pytest.raises(KeyboardInterrupt), StopSignals(announce=True) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == signal.SIGTERM
        os.kill(os.getpid(), signal.SIGINT)
    assert "stopping after this iteration; once more stops at once" in capfd.readouterr().err


@pytest.mark.slow
def test_a_run_outlives_its_terminal(tmp_path, dataset):
    """Its terminal is closed, so nothing can be printed any more: the run saves and stops."""
    master, terminal = pty.openpty()
    args = [*QUICK, f"--dataset={dataset}", f"--out_dir={tmp_path}/o", "--max_iters=10000000"]
    process = start(*args, stdout=terminal, stderr=terminal, start_new_session=True)
    try:
        os.close(terminal)
        text = b""
        while b"iter 5:" not in text:
            text += os.read(master, 1024)
        process.send_signal(signal.SIGHUP)
        os.close(master)
        assert process.wait(60) == 129
    finally:
        process.kill()
    assert checkpoint.load(tmp_path / "o" / "ckpt.pt").iter_num > 5


def test_best_weights_of_a_run_stopped_just_before_its_evaluation(tmp_path, dataset):
    """The evaluation that a resume begins with keeps its weights if they are the best so far."""
    args = [*QUICK, f"--dataset={dataset}", f"--out_dir={tmp_path}/o", "--max_iters=10"]
    assert run("train.py", *args).returncode == 0
    stored = torch.load(tmp_path / "o" / "ckpt.pt", weights_only=True)
    stored["best_val_loss"] = 99.0
    torch.save(stored, tmp_path / "o" / "ckpt.pt")
    (tmp_path / "o" / "best.pt").unlink()
    assert run("train.py", *args, "--init_from=resume").returncode == 0
    assert same(weights(tmp_path / "o", "best.pt"), stored["model"])


def test_no_checkpoint_of_weights_whose_loss_is_no_number(tmp_path, dataset):
    """
    One line with iteration, learning rate and the last good checkpoint. Saving at every iteration,
    a run that diverges leaves no checkpoint that it cannot go on from.
    """
    args = [*QUICK, f"--dataset={dataset}", f"--out_dir={tmp_path}/o", "--checkpoint_interval=1"]
    args += ["--grad_clip=0", "--learning_rate=1e30", "--decay_lr=False", "--max_iters=50"]
    done = run("train.py", *args, "--eval_interval=40")
    words = ("iteration 1: loss nan", "learning rate 1e+30", "last good checkpoint: none yet")
    assert fails_with_one_line(done, 1, *words)
    assert not (tmp_path / "o" / "ckpt.pt").exists()


def test_float16_skips_steps_that_overflow(tmp_path, dataset):
    """
    They are counted, the loss scale comes down, its state is saved, and a resumed run is the
    uninterrupted one.
    """
    args = [*QUICK, f"--dataset={dataset}", "--dtype=float16", "--lr_decay_iters=40"]
    args += ["--optimizer=muon"]
    saved = []
    for name, stops in (("full", [40]), ("parts", [25, 40])):
        here = [*args, f"--out_dir={tmp_path}/{name}"]
        assert run("train.py", *here, "--max_iters=10").returncode == 0
        stored = torch.load(tmp_path / name / "ckpt.pt", weights_only=True)
        stored["scaler"]["scale"] = 2.0**30
        torch.save(stored, tmp_path / name / "ckpt.pt")
        for i, stop in enumerate(stops):
            done = run("train.py", *here, f"--max_iters={stop}", "--init_from=resume")
            assert done.returncode == 0, done.stderr
            assert i or " skipped" in done.stdout
        saved.append(checkpoint.load(tmp_path / name / "ckpt.pt"))
    assert saved[0].scaler == saved[1].scaler and 1 < saved[0].scaler["scale"] < 2.0**30
    assert same(saved[0].model, saved[1].model)
    log = [e for e in entries(tmp_path / "full") if "loss" in e]
    assert log[10]["grad_norm"] is None and log[-1]["grad_norm"] > 0
    assert log[-1]["loss"] < log[0]["loss"]


def test_one_folder_trains_one_run(tmp_path, dataset):
    """The second is refused in one line, and nothing in the folder changes."""
    args = [*QUICK, f"--dataset={dataset}", f"--out_dir={tmp_path}/o"]
    assert run("train.py", *args, "--max_iters=10").returncode == 0
    before = sorted((tmp_path / "o").iterdir())
    with locked(tmp_path / "o", "training in it"):
        for more in ([], ["--init_from=resume"]):
            second = run("train.py", *args, "--max_iters=20", *more)
            assert fails_with_one_line(second, 1, "another run is training in it")
    assert sorted((tmp_path / "o").iterdir()) == before


def test_the_best_loss_is_that_of_weights_on_the_disk(tmp_path, dataset, monkeypatch):
    """
    The evaluation with the lowest loss cannot be saved: a later, higher one becomes the best, which
    the closing line and both files name.
    """
    losses = iter((3.0, 2.0, 1.0, 1.5, 1.7))
    measures = lambda self: {"train_loss": 1.0, "val_loss": next(losses), "perplexity": 1.0}
    monkeypatch.setattr(train.Trainer, "evaluate", measures)
    save = checkpoint.save

    def full_disk(folder, state, best):
        if state.iter_num == 20:
            raise checkpoint.UserError("no checkpoint written: it needs more")
        save(folder, state, best)

    monkeypatch.setattr(checkpoint, "save", full_disk)
    args = [*QUICK, f"--dataset={dataset}", f"--out_dir={tmp_path}/o", "--max_iters=40"]
    done = run("train.py", *args)
    assert done.returncode == 0 and "done: best validation loss 1.5000, checkpoints" in done.stdout
    best, last = (checkpoint.load(tmp_path / "o" / name) for name in ("best.pt", "ckpt.pt"))
    assert (best.best_val_loss, best.iter_num) == (1.5, 30)
    assert (last.best_val_loss, last.iter_num) == (1.5, 40)
