"""What the user sees when something goes wrong. Run: python -m pytest tests/test_errors.py"""

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanomla.errors import UsageError, UserError, explain, printable
from nanomla.signals import Stopped
from tests.conftest import QUICK, ROOT, fails_with_one_line, run


def raised(function):
    """The exception that a call ends with."""
    try:
        function()
    except BaseException as error:  # noqa: BLE001
        return error
    raise AssertionError("nothing was raised")


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (UserError("no such run"), 1, "error: no such run"),
        (UsageError("no such flag"), 2, "error: no such flag"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (Stopped(signal.SIGTERM), 143, "terminated"),
        (Stopped(signal.SIGHUP), 129, "terminal closed"),
        (BrokenPipeError(), 141, ""),
        (raised(Path("/no/such/file").read_bytes), 1, "/no/such/file: No such file or directory"),
        (raised(Path("x" * 5000).read_bytes), 1, "File name too long"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "error: No space left on device"),
        (raised(lambda: __import__("no_such_package")), 1, "pip install no_such_package"),
        (raised(lambda: torch.empty(2**50)), 1, "out of memory ("),
        (raised(lambda: bytearray(2**62)), 1, "out of memory (in Python)"),
        (torch.OutOfMemoryError("CUDA out of memory"), 1, "out of memory (CUDA"),
        (torch.distributed.DistBackendError("x"), 1, "another process of this run has ended"),
        (RuntimeError("[gloo/pair.cc:5] Connection closed by peer"), 1, "another process"),
        (raised(lambda: Path("a\0b").mkdir()), 1, "a path has a NUL byte in it"),
    ],
)
def test_known_families_are_one_line(error, status, words):
    """Each with its exit status."""
    line, got = explain(error)
    assert got == status and words in line and "\n" not in printable(line), line


def test_a_compiler_that_is_missing_is_one_line():
    """As torch.compile reports it, whose exceptions wrap others."""
    import torch._dynamo.exc

    failed = torch._dynamo.exc.BackendCompilerFailed(len, RuntimeError("no C++ compiler"), None)
    line, status = explain(failed)
    assert status == 1 and "--compile does not work here (RuntimeError: no C++ compiler)" in line


def test_what_nobody_expected_keeps_its_traceback(tmp_path, dataset, monkeypatch):
    """After a line that says so and where the last checkpoint is."""
    import train

    args = [*QUICK, f"--dataset={dataset}", f"--out_dir={tmp_path}/o", "--max_iters=40"]
    gradients = train.Trainer.gradients

    def broken(self, it):
        return 1 / 0 if it == 15 else gradients(self, it)

    monkeypatch.setattr(train.Trainer, "gradients", broken)
    done = run("train.py", *args)
    first, second, *_ = done.stderr.splitlines()
    assert done.returncode == 1 and second.startswith("Traceback")
    assert first.startswith("train.py: error: not expected, please report it; last checkpoint: ")
    assert first.endswith("o/ckpt.pt") and "ZeroDivisionError" in done.stderr


def test_control_characters_forge_nothing():
    """Lines, colours and directions of writing are shown as escapes, letters as they are."""
    assert printable("a\nb\x1b[31m\r\x00\x9b\u202e") == r"a\nb\x1b[31m\r\x00\x9b\u202e"
    assert printable("Größe 大きさ 🙂") == "Größe 大きさ 🙂"
    done = run("train.py", "--out_dir=a\ntrain.py: done\x1b[2J", "--dataset=no\nwhere\x07")
    assert fails_with_one_line(done, 1, r"no\nwhere\x07") and "\x1b" not in done.stdout
    assert all(not line.startswith("train.py: done") for line in done.stdout.splitlines())


STARTED = []


def popen(*args, **how):
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT} | how
    STARTED.append(subprocess.Popen([sys.executable, *map(str, args)], **how))
    return STARTED[-1]


@pytest.fixture(autouse=True)
def ended():
    """A test that fails leaves no process running."""
    yield
    while STARTED:
        STARTED.pop().kill()


OWN_PREPARE = """
import time
from nanomla.dataset import Meta
from nanomla.errors import UserError
with open({target!r}, "w") as file:
    try:
        print("working", flush=True)
        time.sleep(60)
    finally:
        file.write("closed")
"""


def test_importing_leaves_signals_alone(tmp_path):
    """A user's own prepare.py, which stands where ours do: Ctrl-C runs its `finally`."""
    folder = ROOT / "data" / f"mine-{os.getpid()}"
    folder.mkdir()
    try:
        target = tmp_path / "file.txt"
        (folder / "prepare.py").write_text(OWN_PREPARE.format(target=str(target)))
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        process = popen(folder / "prepare.py", env=environment)
        assert process.stdout.readline() == "working\n", process.stderr.read()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert err.endswith("KeyboardInterrupt\n") and target.read_text() == "closed"
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_script_that_is_stopped_closes_what_is_open(tmp_path, name):
    """In run_script both signals run `finally`, and end in one line and 128 + the number."""
    script = tmp_path / "script.py"
    script.write_text(
        "import time\n"
        "from nanomla.errors import run_script\n"
        "def main():\n"
        "    try:\n"
        "        print('working', flush=True)\n"
        "        time.sleep(60)\n"
        "    finally:\n"
        "        print('closed')\n"
        "run_script(main)\n"
    )
    process = popen(script, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert process.stdout.readline() == "working\n"
    process.send_signal(getattr(signal, name))
    out, err = process.communicate(timeout=60)
    word = "interrupted" if name == "SIGINT" else "terminated"
    assert (out, err) == ("closed\n", f"script.py: {word}\n")
    assert process.returncode == 128 + getattr(signal, name)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_signals_that_end_a_run_save_it(tmp_path, dataset, name):
    """A checkpoint and 128 + the signal's number; the second one is named by its own number."""
    args = [*QUICK, f"--dataset={dataset}", f"--out_dir={tmp_path}/o", "--max_iters=10000000"]
    process = popen("train.py", *args, env=os.environ | {"OMP_NUM_THREADS": "1"})
    while "iter 5:" not in (line := process.stdout.readline()):
        assert line, process.stderr.read()
    process.send_signal(getattr(signal, name))
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + getattr(signal, name) and "go on with" in out
    assert (tmp_path / "o" / "ckpt.pt").exists()


def test_a_run_under_nohup_ignores_the_end_of_its_terminal(tmp_path, dataset):
    """A signal that was ignored when the run began stays ignored."""
    args = [*QUICK, f"--dataset={dataset}", f"--out_dir={tmp_path}/o", "--max_iters=60"]
    ignore = lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)
    process = popen("train.py", *args, preexec_fn=ignore)
    while "iter 5:" not in (line := process.stdout.readline()):
        assert line, process.stderr.read()
    process.send_signal(signal.SIGHUP)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "done: " in out, err


def test_a_run_outlives_its_screen(tmp_path, dataset):
    """stdout and stderr on a full device, or closed from the start: it trains to its end."""
    args = [*QUICK, f"--dataset={dataset}", "--max_iters=10"]
    with open("/dev/full", "w") as full:
        process = popen("train.py", *args, f"--out_dir={tmp_path}/a", stdout=full, stderr=full)
        assert process.wait(60) == 0
    command = " ".join([sys.executable, "train.py", *args, f"--out_dir={tmp_path}/b", ">&- 2>&-"])
    assert subprocess.call(["sh", "-c", command], cwd=ROOT, timeout=60) == 0
    a, b = (torch.load(tmp_path / n / "ckpt.pt", weights_only=True)["model"] for n in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_narrow_terminal_gets_what_it_can_show(tmp_path, dataset):
    """In ascii, other letters become question marks; nothing fails."""
    args = ["train.py", *QUICK, f"--dataset={dataset}", f"--out_dir={tmp_path}/ä", "--max_iters=0"]
    process = popen(*args, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "/?'" in out, err


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"RANK": "x"}, "RANK='x' in the environment must be a whole number from 0"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE='0' in the environment must be a whole number from 1"),
        ({"RANK": "3", "WORLD_SIZE": "2"}, "RANK=3 in the environment is not below"),
        ({"WORLD_SIZE": "9" * 400}, "WORLD_SIZE="),
        ({"WORLD_SIZE": "2"}, "the 2 processes cannot be joined (Error initializing torch"),
    ],
)
def test_a_bad_environment_is_one_line(tmp_path, dataset, monkeypatch, environment, words):
    """What torchrun sets, and what does without it."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    done = run("train.py", *QUICK, f"--dataset={dataset}", f"--out_dir={tmp_path}/o")
    assert fails_with_one_line(done, 1 if "joined" in words else 2, words)
