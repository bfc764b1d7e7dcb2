"""
What the user sees when something goes wrong: errors that are one line, and the one place that turns
any exception into such a line and an exit status. Importing this file changes nothing; run_script
handles signals while a script runs.
"""

import contextlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from nanomla.signals import Stopped, handled, raise_stopped

SIGNALS = {"SIGINT": "interrupted", "SIGTERM": "terminated", "SIGHUP": "terminal closed"}
LONGEST = 2000  # characters of an error's line
MEMORY = {  # what a script takes less memory with
    "train.py": "try less --batch_size with more --gradient_accumulation_steps, --grad_checkpoint "
    "or --dtype=bfloat16",
    "sample.py": "try fewer --num_samples or --max_new_tokens, or --cache_dtype=int8",
}


class UserError(Exception):
    """Something the user can mend. Scripts print it as one line and exit with `status`."""

    status = 1


class UsageError(UserError):
    """A wrong flag, value or config file."""

    status = 2


# ---- lines


def printable(text: str) -> str:
    """Text as one line: control characters, which can forge lines and colours, as \\x1b or \\n."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def say(line: str, file: TextIO | None = None) -> None:
    """Print a line that may name what others have named, on stdout or `file`, and flush it."""
    print(printable(line), file=file or sys.stdout, flush=True)


class Steady:
    """A stream that never fails: what a full disk or a closed terminal does not take is lost."""

    def __init__(self, stream: TextIO | Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write what can be written."""
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush what can be flushed."""
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


# ---- exceptions as lines


def explain(error: BaseException) -> tuple[str | None, int]:
    """
    The line that tells a user of this exception, "" for none, and the exit status; (None, 1) for
    one that nobody expected.
    """
    text = _first_line(error)
    kinds = _kinds(error)
    if isinstance(error, UserError):
        return f"error: {error}", error.status
    if isinstance(error, (KeyboardInterrupt, Stopped)):
        number = getattr(error, "number", signal.SIGINT)
        return SIGNALS.get(signal.Signals(number).name, "stopped"), 128 + number
    if isinstance(error, BrokenPipeError):  # the reader of stdout went away, as in `... | head`
        return "", 128 + signal.SIGPIPE
    if isinstance(error, OSError) and error.strerror:
        names = [str(name) for name in (error.filename, error.filename2) if name is not None]
        if not names:
            return f"error: {error.strerror}", 1
        return f"error: {' -> '.join(names)}: {error.strerror}", 1
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.partition(".")[0]
        return f"error: this needs the package {package}: pip install {package}", 1
    if kinds & {"MemoryError", "OutOfMemoryError"} or "DefaultCPUAllocator" in text:
        remedy = MEMORY.get(os.path.basename(sys.argv[0]), "try a smaller model, batch or context")
        return f"error: out of memory ({text or 'in Python'}); {remedy}", 1
    if _lost_process(error):
        return "error: another process of this run has ended, so this one cannot go on", 1
    if kinds & {"InvalidCxxCompiler", "BackendCompilerFailed", "InductorError"}:
        return f"error: --compile does not work here ({cause(error)}); leave it out", 1
    if isinstance(error, ValueError) and "null byte" in text:
        return "error: a path has a NUL byte in it", 1
    return None, 1


def _lost_process(error: BaseException) -> bool:
    """Whether an exchange with the other processes of a run failed (gloo's and NCCL's errors)."""
    kinds = _kinds(error)
    if kinds & {"DistError", "DistBackendError"}:
        return True
    named = any(word in str(error) for word in ("gloo", "by peer", "NCCL"))
    return "RuntimeError" in kinds and named


def _kinds(error: BaseException) -> set[str]:
    """The names of its classes; importing torch for the classes themselves would take seconds."""
    return {kind.__name__ for kind in type(error).__mro__}


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]


def cause(error: BaseException) -> str:
    """The first line of the exception that this one wraps."""
    inner = getattr(error, "inner_exception", None) or error.__cause__ or error
    return f"{type(inner).__name__}: {_first_line(inner)[:100]}"


def run_script(main: Callable[[], None]) -> None:
    """
    Run a script's main(). SIGTERM and SIGINT then close what is open, and an exception becomes a
    line on stderr and an exit status.
    """
    _mend_streams()
    try:
        with _signals_raise():
            main()
            sys.stdout.flush()
    except (Exception, KeyboardInterrupt, Stopped) as error:  # noqa: BLE001  all end here
        sys.exit(_report(error))


def _report(error: BaseException) -> int:
    """Print what explain says; returns the exit status."""
    line, status = explain(error)
    if isinstance(error, OSError):  # what could not be written must not fail again at the exit
        with contextlib.suppress(OSError, ValueError, AttributeError):
            sys.stdout.flush()
    if isinstance(error, Stopped) and os.environ.get("RANK", "0") != "0":
        return status  # torchrun stops the other ranks when one has failed, which says why
    script = os.path.basename(sys.argv[0])
    stderr = Steady(sys.stderr)
    if line is None:
        notes = getattr(error, "__notes__", [])
        say("; ".join([f"{script}: error: not expected, please report it", *notes]), stderr)
        stderr.write("".join(traceback.format_exception(error)))
    elif line:
        line = f"{script}: {line}"
        if len(line) > LONGEST:
            line = f"{line[: LONGEST // 2]}...{line[-LONGEST // 2 :]}"
        say(line, stderr)
    return status


def _mend_streams() -> None:
    """Replace closed streams, so that no file gets their numbers, and what cannot be encoded."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  open as long as we run
        elif mode == "w" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


@contextlib.contextmanager
def _signals_raise() -> Iterator[None]:
    """Inside, SIGTERM raises Stopped and SIGINT KeyboardInterrupt, so that open things close."""
    if threading.current_thread() is not threading.main_thread():  # others cannot set handlers
        yield
        return
    with handled(raise_stopped, "SIGTERM", "SIGINT"):
        yield
