"""log.jsonl, loss.png, wandb. Run: python -m pytest tests/test_runlog.py"""

import sys
import types
from unittest import mock

import pytest

from nanomla import checkpoint
from nanomla.runlog import RunLog, read_log
from tests.conftest import QUICK, run
from tests.test_train import entries, iterations


def test_a_picture_is_drawn_once_a_minute_and_at_the_end(tmp_path, monkeypatch, capsys):
    """What goes wrong is a warning; without matplotlib there is no picture and no warning."""
    pytest.importorskip("matplotlib")
    picture = tmp_path / "loss.png"
    log = RunLog(tmp_path)
    log.write(iter=0, train_loss=4.0, val_loss=4.1)
    log.write(iter=0, loss=4.2)
    log.plot()
    assert not picture.exists()
    log.drawn_at -= 61
    log.plot()
    assert picture.read_bytes().startswith(b"\x89PNG") and not capsys.readouterr().err
    picture.unlink()
    log.close()
    assert picture.exists()
    for reason in (OSError("full"), ModuleNotFoundError("matplotlib")):
        monkeypatch.setattr("nanomla.runlog.draw", mock.Mock(side_effect=reason))
        RunLog(tmp_path).close()
    assert capsys.readouterr().err == "warning: loss.png was not drawn (OSError: full)\n"


def test_a_damaged_log_is_read_as_far_as_it_goes(tmp_path, dataset):
    """Lines cut by a kill, zeros left by a crash: a resume drops them and goes on."""
    args = [*QUICK, f"--dataset={dataset}", f"--out_dir={tmp_path}/o"]
    assert run("train.py", *args, "--max_iters=10").returncode == 0
    with open(tmp_path / "o" / "log.jsonl", "ab") as file:
        file.write(b'\0\0\0\n{"iter": 3\n"x"\n{"no": 1}\n\xff\xfe\n')
        file.write(b'{"iter": 12, "loss": 1.0}\n{"iter": 9, "lo')
    assert run("train.py", *args, "--max_iters=20", "--init_from=resume").returncode == 0
    assert iterations(tmp_path / "o") == (list(range(20)), [0, 10, 20])


def test_a_loss_that_is_no_number_is_missing_and_its_line_stays(tmp_path):
    """A run that diverged writes null, and a resume keeps what else the line says."""
    pytest.importorskip("matplotlib")
    log = RunLog(tmp_path)
    log.write(iter=0, train_loss=4.0, val_loss=4.1)
    log.write(iter=0, loss=float("nan"), ms=3.0)
    log.write(iter=1, train_loss=float("inf"), val_loss=float("nan"), seconds=1.0)
    log.close()
    assert (tmp_path / "loss.png").exists()
    kept = [{"iter": 0, "train_loss": 4.0, "val_loss": 4.1}, {"iter": 0, "ms": 3.0}]
    assert read_log(log.path) == [*kept, {"iter": 1, "seconds": 1.0}]
    RunLog(tmp_path, resume_at=1).close()
    assert read_log(log.path) == kept


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
