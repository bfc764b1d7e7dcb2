"""log.jsonl, loss.png, wandb. Run: python -m pytest tests/test_runlog.py -m "slow or not slow" """

import sys
import time
import types

import pytest

from nanomla import checkpoint
from nanomla.runlog import RunLog
from tests.conftest import QUICK, run
from tests.test_survival import iterations, start
from tests.test_train import entries


def test_a_picture_is_drawn_from_any_working_directory(tmp_path, monkeypatch):
    """The plotter finds its code and a relative out_dir, wherever the run was started."""
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "o").mkdir()
    log = RunLog("o")
    log.write(iter=0, train_loss=4.0, val_loss=4.1)
    log.write(iter=0, loss=4.2)
    log.write(iter=10, train_loss=3.0, val_loss=3.1)
    log.plot()
    log.plotter.communicate(timeout=60)
    log.close()
    assert (tmp_path / "o" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_no_picture_without_matplotlib(tmp_path, dataset, monkeypatch, capfd):
    """
    Not installed: nothing is drawn or printed. Broken: one warning. Training goes on in both cases.
    """
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
    """
    Lines cut by a kill, zeros left by a crash, bytes that are no text: a resume drops them and goes
    on.
    """
    args = [*QUICK, f"--dataset={dataset}", f"--out_dir={tmp_path}/o"]
    assert run("train.py", *args, "--max_iters=10").returncode == 0
    with open(tmp_path / "o" / "log.jsonl", "ab") as file:
        file.write(b'\0\0\0\n{"iter": 3\n"x"\n{"no": 1}\n\xff\xfe\n')
        file.write(b'{"iter": 12, "loss": 1.0}\n{"iter": 9, "lo')
    assert run("train.py", *args, "--max_iters=20", "--init_from=resume").returncode == 0
    assert iterations(tmp_path / "o") == (list(range(20)), [0, 10, 20])


@pytest.mark.slow
def test_wandb_offline_is_resumed_under_the_same_id(tmp_path, dataset):
    """A run folder below out_dir; the second start goes on with the id that the checkpoint has."""
    pytest.importorskip("wandb")
    args = [*QUICK, f"--dataset={dataset}", f"--out_dir={tmp_path}/o", "--wandb_log=True"]
    ids = []
    for more in (["--max_iters=10"], ["--max_iters=20", "--init_from=resume"]):
        process = start(*args, *more, WANDB_MODE="offline")
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0 and "wandb is off" not in err, err
        ids.append(checkpoint.load(tmp_path / "o" / "ckpt.pt").wandb_run_id)
        time.sleep(1)  # wandb names run folders by the second
    assert ids[0] and ids[0] == ids[1]
    folders = list((tmp_path / "o" / "wandb").glob(f"offline-run-*-{ids[0]}"))
    assert len(folders) == 2 and all(list(f.glob("*.wandb")) for f in folders)


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_a_failing_wandb_costs_nothing_but_a_warning(tmp_path, dataset, monkeypatch, where):
    """Wherever it fails, the run goes on to its end and keeps its own log."""

    def method(name):
        def call(*args, **kwargs):
            if name == where:
                raise ConnectionError("wandb is down")
            return fake

        return call

    methods = {name: method(name) for name in ("init", "log", "finish")}
    fake = types.SimpleNamespace(id="abc123", **methods)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    args = [*QUICK, f"--dataset={dataset}", f"--out_dir={tmp_path}/o"]
    done = run("train.py", *args, "--wandb_log=True", "--max_iters=10")
    warning = "wandb is off from here on (ConnectionError: wandb is down)"
    assert done.returncode == 0 and done.stderr.count(warning) == 1
    assert len(entries(tmp_path / "o")) == 12
    run_id = checkpoint.load(tmp_path / "o" / "ckpt.pt").wandb_run_id
    assert run_id == (None if where == "init" else "abc123")
