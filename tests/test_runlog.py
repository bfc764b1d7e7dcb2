"""log.jsonl, loss.png, wandb. Run: python -m pytest tests/test_runlog.py"""

import sys
import types

import pytest

from nanomla import checkpoint
from nanomla.runlog import RunLog
from tests.conftest import QUICK, run
from tests.test_train import entries, iterations


def test_a_picture_is_drawn_from_any_working_directory(tmp_path, monkeypatch):
    """The plotter finds its code and a relative out_dir, wherever the run was started."""
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "o").mkdir()
    log = RunLog("o")
    log.write(iter=0, train_loss=4.0, val_loss=4.1)
    log.write(iter=0, loss=4.2)
    log.plot()
    log.plotter.communicate(timeout=60)
    log.close()
    assert (tmp_path / "o" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_no_picture_without_matplotlib(tmp_path, dataset, monkeypatch, capfd):
    """Nothing is drawn or printed, and training goes on."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    args = [*QUICK, f"--dataset={dataset}", "--max_iters=10", f"--out_dir={tmp_path}/o"]
    done = run("train.py", *args)
    assert done.returncode == 0 and "loss.png" not in done.stderr + capfd.readouterr().err


def test_a_damaged_log_is_read_as_far_as_it_goes(tmp_path, dataset):
    """Lines cut by a kill, zeros left by a crash: a resume drops them and goes on."""
    args = [*QUICK, f"--dataset={dataset}", f"--out_dir={tmp_path}/o"]
    assert run("train.py", *args, "--max_iters=10").returncode == 0
    with open(tmp_path / "o" / "log.jsonl", "ab") as file:
        file.write(b'\0\0\0\n{"iter": 3\n"x"\n{"no": 1}\n\xff\xfe\n')
        file.write(b'{"iter": 12, "loss": 1.0}\n{"iter": 9, "lo')
    assert run("train.py", *args, "--max_iters=20", "--init_from=resume").returncode == 0
    assert iterations(tmp_path / "o") == (list(range(20)), [0, 10, 20])


@pytest.mark.parametrize("where", [None, "init", "log", "finish"])
def test_wandb_gets_the_numbers_and_its_failure_is_a_warning(tmp_path, dataset, monkeypatch, where):
    """A resume goes on with wandb's run of the checkpoint; a run outlives a failing wandb."""
    calls = []

    def method(name):
        def call(*args, **kwargs):
            calls.append((name, kwargs))
            if name == where:
                raise ConnectionError("wandb is down")
            return fake

        return call

    methods = {name: method(name) for name in ("init", "log", "finish")}
    fake = types.SimpleNamespace(id="abc123", **methods)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    args = [*QUICK, f"--dataset={dataset}", f"--out_dir={tmp_path}/o", "--wandb_log=True"]
    done = run("train.py", *args, "--max_iters=10")
    warning = "wandb is off from here on (ConnectionError: wandb is down)"
    assert done.returncode == 0 and done.stderr.count(warning) == (where is not None)
    assert len(entries(tmp_path / "o")) == 12
    run_id = checkpoint.load(tmp_path / "o" / "ckpt.pt").wandb_run_id
    assert run_id == (None if where == "init" else "abc123")
    if where is None:
        assert [options["step"] for name, options in calls if name == "log"] == [0, *range(10), 10]
        assert run("train.py", *args, "--max_iters=11", "--init_from=resume").returncode == 0
        assert [options["id"] for name, options in calls if name == "init"] == [None, "abc123"]
