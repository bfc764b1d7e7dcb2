"""
What the user sees when something goes wrong: errors that are one line, and the one place that turns
an exception into such a line and an exit status. Importing this file changes nothing; run_script
handles signals while a script runs.
"""

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import TextIO

from nanomla.signals import Stopped, handled, raise_stopped

SIGNALS = {"SIGINT": "interrupted", "SIGTERM": "terminated", "SIGHUP": "terminal closed"}
MEMORY = {  # what a script takes less memory with
    "train.py": "try less --batch_size with more --gradient_accumulation_steps, --grad_checkpoint "
    "or --dtype=bfloat16",
    "sample.py": "try fewer --num_samples or --max_new_tokens, or --cache_dtype=int8",
}
STDOUT = 1
STDERR = 2


class UserError(Exception):
    """Something the user can mend. Scripts print it as one line and exit with `status`."""

    status = 1


class UsageError(UserError):
    """A wrong flag, value or config file."""

    status = 2


def printable(text: str) -> str:
    """Text as one line: control characters, which can forge lines and colours, as \\x1b or \\n."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def say(line: str, file: TextIO | None = None) -> None:
    """Print a line that may name what others have named, on stdout or `file`, and flush it."""
    stream = file or sys.stdout
    with outliving(stream):
        print(printable(line), file=stream, flush=True)


def say_unexpected(line: str, error: BaseException) -> None:
    """Print on stderr an error that nobody expected: a line and where it was raised."""
    say(f"{script_name()}: error: {line}", sys.stderr)
    with outliving(sys.stderr):
        traceback.print_exception(error)


@contextlib.contextmanager
def outliving(stream: TextIO) -> Iterator[None]:
    """
    A context that stdout or stderr may fail in, because its reader has left or its disk is full:
    what is being done goes on, and nothing more is written there. stderr is told of stdout's end.
    """
    try:
        yield
    except OSError as error:
        if stream is sys.stderr:
            silence(STDERR)
        else:
            silence(STDOUT)
            what = f"stdout cannot be written ({error.strerror}), going on without it"
            say(f"warning: {what}", sys.stderr)


def silence(*streams: int) -> None:
    """Send what is still printed on STDOUT or STDERR nowhere, as nobody can read it any more."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in streams:
        os.dup2(nowhere, stream)
    os.close(nowhere)


def explain(error: BaseException) -> tuple[str | None, int]:
    """
    The line that tells a user of this exception, "" for none, and the exit status; (None, 1) for
    one that nobody expected.
    """
    text = _first_line(error)
    # The classes' names, because importing torch for the classes themselves would take seconds.
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if isinstance(error, UserError):
        return f"error: {error}", error.status
    if isinstance(error, (KeyboardInterrupt, Stopped)):
        number = getattr(error, "number", signal.SIGINT)
        return SIGNALS[signal.Signals(number).name], 128 + number
    if isinstance(error, BrokenPipeError):  # the reader of stdout went away, as in `... | head`
        return "", 128 + signal.SIGPIPE
    if isinstance(error, OSError) and error.strerror:
        if error.filename is None:
            return f"error: {error.strerror}", 1
        return f"error: {error.filename}: {error.strerror}", 1
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.partition(".")[0]
        return f"error: this needs the package {package}: pip install {package}", 1
    if kinds & {"MemoryError", "OutOfMemoryError"} or "DefaultCPUAllocator" in text:
        remedy = MEMORY.get(script_name(), "try a smaller model, batch or context")
        return f"error: out of memory ({text or 'in Python'}); {remedy}", 1
    from_gloo = "RuntimeError" in kinds and ("gloo" in str(error) or "by peer" in str(error))
    if from_gloo or kinds & {"DistError", "DistBackendError"}:
        return "error: another process of this run has ended, so this one cannot go on", 1
    if kinds & {"InvalidCxxCompiler", "BackendCompilerFailed", "InductorError"}:
        return f"error: --compile does not work here ({cause(error)}); leave it out", 1
    return None, 1


def cause(error: BaseException) -> str:
    """The first line of the exception that this one wraps."""
    inner = getattr(error, "inner_exception", None) or error.__cause__ or error
    return f"{type(inner).__name__}: {_first_line(inner)[:100]}"


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]


def script_name() -> str:
    """What messages call the running script: train.py, or bench for python -m tools.bench."""
    path = sys.argv[0].removesuffix(f"{os.sep}__main__.py")
    return os.path.basename(path)


def run_script(main: Callable[[], None]) -> None:
    """
    Run a script's main(). SIGTERM and SIGINT then close what is open, and an exception becomes a
    line on stderr and an exit status.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed, so that a file opened later would get its number
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  open until the end
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that cannot show a letter gets a "?"
            stream.reconfigure(errors="replace")
    try:
        with handled(raise_stopped, "SIGTERM", "SIGINT"):
            main()
            sys.stdout.flush()
    except (Exception, KeyboardInterrupt, Stopped) as error:  # noqa: BLE001  all end here
        sys.exit(_report(error))


def _report(error: BaseException) -> int:
    """Print what explain says; returns the exit status."""
    line, status = explain(error)
    try:
        sys.stdout.flush()
    except OSError:
        silence(STDOUT)  # else Python fails once more at its exit
    if isinstance(error, Stopped) and os.environ.get("RANK", "0") != "0":
        return status  # torchrun stops the other ranks when one has failed, which says why
    if line is None:
        notes = getattr(error, "__notes__", [])
        say_unexpected("; ".join(["not expected, please report it", *notes]), error)
    elif line:
        say(f"{script_name()}: {line}", sys.stderr)
    return status
