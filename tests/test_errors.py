"""What the user sees when something goes wrong. Run: python -m pytest tests/test_errors.py"""

import errno
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch._dynamo.exc

import train
from nanomla.errors import UsageError, explain, printable
from nanomla.signals import handled
from tests.conftest import QUICK, ROOT, run


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
        (UsageError("no such flag"), 2, "error: no such flag"),
        (raised(Path("/no/such/file").read_bytes), 1, "/no/such/file: No such file or directory"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "error: No space left on device"),
        (raised(lambda: __import__("no_such_package")), 1, "pip install no_such_package"),
        (raised(lambda: torch.empty(2**50)), 1, "out of memory ("),
        (raised(lambda: bytearray(2**62)), 1, "out of memory (in Python)"),
        (torch.OutOfMemoryError("CUDA out of memory"), 1, "out of memory (CUDA"),
        (RuntimeError("[gloo/pair.cc:5] Connection closed by peer"), 1, "another process"),
        (
            torch._dynamo.exc.BackendCompilerFailed(len, RuntimeError("no compiler"), None),
            1,
            "--compile does not work here (RuntimeError: no compiler)",
        ),
    ],
)
def test_known_families_are_one_line(error, status, words):
    """Each with its exit status."""
    line, got = explain(error)
    assert got == status and words in line and "\n" not in line


def test_what_nobody_expected_keeps_its_traceback(tmp_path, dataset, monkeypatch):
    """After a line that says so and where the last checkpoint is."""
    gradients = train.Trainer.gradients

    def broken(self, it):
        return 1 / 0 if it == 15 else gradients(self, it)

    monkeypatch.setattr(train.Trainer, "gradients", broken)
    args = [*QUICK, f"--dataset={dataset}", f"--out_dir={tmp_path}/o", "--max_iters=40"]
    done = run("train.py", *args)
    first, second, *_ = done.stderr.splitlines()
    assert done.returncode == 1 and second.startswith("Traceback")
    assert first.startswith("train.py: error: not expected, please report it; last checkpoint: ")
    assert first.endswith("o/ckpt.pt") and "ZeroDivisionError" in done.stderr


def test_control_characters_forge_nothing():
    """Lines, colours and directions of writing are shown as escapes, letters as they are."""
    assert printable("a\nb\x1b[31m\r\x00\x9b\u202e") == r"a\nb\x1b[31m\r\x00\x9b\u202e"
    assert printable("Größe 大きさ 🙂") == "Größe 大きさ 🙂"


@pytest.fixture
def script(tmp_path):
    """A call that starts a script with this body of main()."""
    started = []

    def start(body, redirected=""):
        path = tmp_path / "script.py"
        code = "\n    ".join(body.strip().splitlines())
        path.write_text(
            "import time\nfrom nanomla.errors import run_script\n"
            f"def main():\n    {code}\nrun_script(main)\n"
        )
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
        reader, unread = os.pipe()  # nobody reads what is written to it
        os.close(reader)
        command = f'exec 4>&{unread}; exec "{sys.executable}" script.py {redirected}'
        command = ["bash", "-c", command]
        options = {"cwd": tmp_path, "env": environment, "pass_fds": [unread], **pipes}
        started.append(subprocess.Popen(command, **options))
        os.close(unread)
        return started[-1]

    yield start
    for process in started:
        process.kill()


@pytest.mark.parametrize(("name", "word"), [("SIGINT", "interrupted"), ("SIGTERM", "terminated")])
def test_a_script_that_is_stopped_closes_what_is_open(script, name, word):
    """Both signals run `finally`, and end in one line and 128 + the number."""
    process = script(
        "try:\n    print('working', flush=True)\n    time.sleep(60)\n"
        "finally:\n    print('closed ä')"
    )
    assert process.stdout.readline() == "working\n"
    process.send_signal(getattr(signal, name))
    out, err = process.communicate(timeout=60)
    # a terminal that cannot show a letter gets a question mark
    assert (out, err) == ("closed ?\n", f"script.py: {word}\n")
    assert process.returncode == 128 + getattr(signal, name)


def test_a_reader_that_leaves_ends_a_script_quietly(script):
    """As in `script.py | head`."""
    process = script("for i in range(10**6):\n    print(i)")
    assert process.stdout.readline() == "0\n"
    process.stdout.close()
    assert process.wait(60) == 141 and process.stderr.read() == ""


WORK = """
import sys
from nanomla.errors import say
for i in range(3):
    say(f"working {i}")
    say(f"warning: {i}", sys.stderr)
with open("done", "w") as file:
    file.write(f"{file.fileno()}")
"""


@pytest.mark.parametrize(
    ("redirected", "stderr"),
    [
        (">/dev/full", "warning: stdout cannot be written (No space left on device)"),
        (">&4 4>&-", "warning: stdout cannot be written (Broken pipe)"),
        (">&-", ""),
        ("2>/dev/full", None),
        ("2>&-", None),
        (">/dev/full 2>/dev/full", None),
        ("<&- >&- 2>&-", None),
    ],
)
def test_work_goes_on_when_nobody_reads_of_it(script, tmp_path, redirected, stderr):
    """Whichever streams are full, broken or closed; no file gets the number of one of them."""
    process = script(WORK, redirected)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert int((tmp_path / "done").read_text()) > 2
    if stderr is None:
        assert err == "" and out in ("", "working 0\nworking 1\nworking 2\n")
    else:
        warnings = [line for line in err.splitlines() if not re.fullmatch(r"warning: \d", line)]
        assert len(warnings) == bool(stderr) and all(w.startswith(stderr) for w in warnings)


def test_an_error_that_cannot_be_printed_is_a_status(script):
    """What was not printed is an error, too, where it was the result."""
    for body, redirected, status in (
        ("1 / 0", "2>/dev/full", 1),
        ("1 / 0", "2>&-", 1),
        ("print('result')", ">/dev/full", 1),
        ("print('result')", ">/dev/full 2>/dev/full", 1),
    ):
        process = script(body, redirected)
        _, err = process.communicate(timeout=60)
        assert process.returncode == status, (body, redirected)
        expected = "" if "2>" in redirected else "script.py: error: No space left on device\n"
        assert err == expected, (body, redirected)


def test_signals_are_handled_inside_and_as_before_afterwards():
    """One that was ignored when the process began, as under nohup, stays ignored."""
    numbers = []
    before = signal.getsignal(signal.SIGTERM)
    ignored = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with handled(lambda number, _: numbers.append(number), "SIGTERM", "SIGHUP", "SIGNONE"):
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGHUP, ignored)
    assert numbers == [signal.SIGTERM] and signal.getsignal(signal.SIGTERM) == before
