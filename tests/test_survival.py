"""
A run outlives kills and full disks.
Run: python -m pytest tests/test_survival.py -m "slow or not slow"
"""

import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from nanomla import checkpoint
from tests.conftest import QUICK, ROOT, fails_with_one_line, run
from tests.test_train import entries, same, weights


def start(*args, **env):
    """train.py in a process of its own, on one thread, so that two runs agree to the last bit."""
    return subprocess.Popen(
        [sys.executable, "train.py", *map(str, args)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def iterations(folder):
    """The iterations of the log's step lines and of its evaluations, in order."""
    log = entries(folder)
    return [e["iter"] for e in log if "loss" in e], [e["iter"] for e in log if "val_loss" in e]


@pytest.mark.slow
def test_kill_at_ten_random_moments(tmp_path, dataset):
    """
    Saving at every iteration: no kill leaves an unreadable file, and the last weights are those of
    the uninterrupted run.
    """
    args = [*QUICK, "--use_mla=True", "--pos_emb=rope", "--dropout=0.1", f"--dataset={dataset}"]
    args += ["--checkpoint_interval=1", "--max_iters=150", "--eval_interval=25"]
    full = start(*args, f"--out_dir={tmp_path}/full")
    assert full.wait(120) == 0, full.stderr.read()
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
            checkpoint.build(checkpoint.load(path))
    assert kills == 10
    a, b = checkpoint.load(tmp_path / "full" / "ckpt.pt"), checkpoint.load(folder / "ckpt.pt")
    assert same(a.model, b.model) and a.best_val_loss == b.best_val_loss
    assert same(weights(tmp_path / "full", "best.pt"), weights(folder, "best.pt"))
    assert iterations(folder) == iterations(tmp_path / "full")
    assert iterations(folder) == (list(range(150)), [0, 25, 50, 75, 100, 125, 150])
    assert not (folder / "old-1").exists()


@pytest.mark.slow
def test_a_disk_that_fills_up_during_a_run_loses_nothing(tmp_path, dataset):
    """
    Checkpoints and log lines that are cut half-way: a warning each, training goes on, a resume is
    bit-identical.
    """
    args = [*QUICK, f"--dataset={dataset}", "--lr_decay_iters=30", "--checkpoint_interval=5"]
    assert start(*args, f"--out_dir={tmp_path}/full", "--max_iters=30").wait(60) == 0
    here = [*args, f"--out_dir={tmp_path}/o"]
    assert start(*here, "--max_iters=10").wait(60) == 0
    before = {p.name: p.read_bytes() for p in (tmp_path / "o").glob("*.pt")}
    limit = (tmp_path / "o" / "log.jsonl").stat().st_size + 300
    done = subprocess.run(
        [sys.executable, "train.py", *here, "--max_iters=30", "--init_from=resume"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0 and "done: " in done.stdout, done.stderr
    assert "warning: no checkpoint written" in done.stderr and "training goes on" in done.stderr
    assert done.stderr.count("log.jsonl cannot be written") == 1 and "Traceback" not in done.stderr
    assert {p.name: p.read_bytes() for p in (tmp_path / "o").glob("*.pt")} == before
    assert not list((tmp_path / "o").glob(".*pt.*tmp"))
    assert start(*here, "--max_iters=30", "--init_from=resume").wait(60) == 0
    assert same(weights(tmp_path / "full"), weights(tmp_path / "o"))
    assert iterations(tmp_path / "o") == iterations(tmp_path / "full")


def test_a_second_signal_stops_at_once(tmp_path, dataset):
    """In the middle of an iteration that would take minutes; the first one is announced."""
    args = [*QUICK, f"--dataset={dataset}", f"--out_dir={tmp_path}/o"]
    process = start(*args, "--gradient_accumulation_steps=100000")
    try:
        while "iteration 0:" not in (line := process.stdout.readline()):
            assert line, process.stderr.read()
        process.send_signal(signal.SIGINT)
        lines = process.stderr.readline() + process.stderr.readline()
        assert "stopping after this iteration" in lines
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
    stored = torch.load(tmp_path / "o" / "ckpt.pt", weights_only=True)
    stored["best_val_loss"] = 99.0
    torch.save(stored, tmp_path / "o" / "ckpt.pt")
    (tmp_path / "o" / "best.pt").unlink()
    assert run("train.py", *args, "--init_from=resume").returncode == 0
    assert same(weights(tmp_path / "o", "best.pt"), stored["model"])


def test_no_checkpoint_of_weights_whose_loss_is_no_number(tmp_path, dataset):
    """Saving at every iteration, a run that diverges leaves no checkpoint it cannot go on from."""
    args = [*QUICK, f"--dataset={dataset}", f"--out_dir={tmp_path}/o", "--checkpoint_interval=1"]
    args += ["--grad_clip=0", "--learning_rate=1e30", "--decay_lr=False", "--max_iters=50"]
    done = run("train.py", *args, "--eval_interval=40")
    assert fails_with_one_line(done, 1, "iteration 1: loss nan", "last good checkpoint: none yet")
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
    """The second is refused in one line, and its end does not disturb the first."""
    args = [*QUICK, f"--dataset={dataset}", f"--out_dir={tmp_path}/o"]
    first = start(*args, "--max_iters=10000000")
    try:
        while "iter 15:" not in (line := first.stdout.readline()):  # saved at 10
            assert line, first.stderr.read()
        for more in ([], ["--init_from=resume"]):
            second = run("train.py", *args, "--max_iters=10000000", *more)
            assert fails_with_one_line(second, 1, "another run is training in it")
    finally:
        first.terminate()
        out, err = first.communicate(timeout=60)
    assert first.returncode == 143 and "stopped before" in out, err
    checkpoint.build(checkpoint.load(tmp_path / "o" / "ckpt.pt"))
    assert not list((tmp_path / "o").glob("old-*"))


def test_the_best_loss_is_that_of_weights_on_the_disk(tmp_path, dataset, monkeypatch):
    """
    The evaluation with the lowest loss cannot be saved: a later, higher one becomes the best, which
    the closing line and both files name.
    """
    import train

    measures = iter((3.0, 2.0, 1.0, 1.5, 1.7))
    monkeypatch.setattr(
        train.Trainer, "evaluate", lambda self: {"train_loss": 1.0, "val_loss": next(measures),
                                             "perplexity": 1.0}
    )  # fmt: skip
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


def test_a_folder_that_is_gone_at_the_end(tmp_path, dataset, monkeypatch):
    """The run says that nothing is there, and fails; a signal does not promise a resume."""
    import train

    gradients = train.Trainer.gradients

    def removing(self, it):
        shutil.rmtree(tmp_path / "o", ignore_errors=True)
        return gradients(self, it)

    monkeypatch.setattr(train.Trainer, "gradients", removing)
    args = [*QUICK, f"--dataset={dataset}", f"--out_dir={tmp_path}/o", "--max_iters=10"]
    done = run("train.py", *args)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and "done: " not in done.stdout
    assert last.startswith("train.py: error: iteration 10 is done, but there is no checkpoint in")
