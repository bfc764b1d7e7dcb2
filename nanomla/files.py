"""Reading what is on disk, with errors that name the file, and the one way to replace a file."""

import contextlib
import errno
import glob
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from nanomla.errors import UserError

Record = TypeVar("Record")
LARGEST_JSON = 2**27  # bytes of a .json file; the tokenizer of a large vocabulary has 40 MB


def one_line(text: object) -> str:
    """An exception or a name out of a file as one line of at most 300 characters."""
    line = " ".join(str(text).split())
    return line if len(line) <= 300 else f"{line[:297]}..."


def require_file(path: str | Path, or_pipe: bool = False) -> None:
    """
    Raise OSError if there is something at `path` of which reading may find no end: a device, a
    socket, or a pipe, which is let through where a person may have named one, as in <(zcat a.gz).
    """
    path = Path(path)
    has_an_end = path.is_file() or path.is_dir() or (or_pipe and path.is_fifo())
    if path.exists() and not has_an_end:
        raise OSError(errno.EINVAL, "not a regular file", str(path))


def read_text(path: str | Path) -> str:
    """The text of a file of UTF-8 or a pipe, its ends of lines as they are. Raises UserError."""
    try:
        require_file(path, or_pipe=True)
        return Path(path).read_bytes().decode("utf-8")
    except (OSError, ValueError) as error:  # no UTF-8, or a path with NUL in it
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read ({reason})") from None


def read_json(path: str | Path) -> dict[str, Any]:
    """
    The object in a .json file of at most LARGEST_JSON bytes.

    Raises UserError if it is missing, larger, damaged or no object.
    """
    path = Path(path)
    try:
        require_file(path)
        with open(path, "rb") as file:
            text = file.read(LARGEST_JSON + 1)
        if len(text) > LARGEST_JSON:
            raise ValueError(f"it is larger than {LARGEST_JSON / 1e6:.0f} MB")
    except FileNotFoundError:
        raise UserError(f"{path.parent}: no {path.name} in this folder") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read ({reason})") from None
    return parse_json(text, str(path))


def parse_json(text: str | bytes, source: str) -> dict[str, Any]:
    """The JSON object in a text. Raises UserError naming the source if it is none."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source}: cannot be read ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{source}: cannot be read (it is no JSON object)")
    return content


def read_record(path: str | Path, kind: type[Record]) -> Record:
    """A dataclass with the values in a .json file. Raises UserError if they are no such record."""
    content = read_json(path)
    try:
        return kind(**content)
    except (TypeError, ValueError) as error:
        reason = f"no {kind.__name__.lower()}: {one_line(error)}"
        raise UserError(f"{path}: cannot be read ({reason})") from None


def json_text(value: Any, **layout: Any) -> str:
    """
    A value as JSON, with null for the numbers that JSON does not have, NaN and the infinities.

    layout: json.dumps's arguments.
    """
    try:
        return json.dumps(value, allow_nan=False, **layout)
    except ValueError:
        text = json.dumps(value, **layout)
        return json.dumps(json.loads(text, parse_constant=lambda name: None), **layout)


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """
    Inside, the name of a temporary file or folder, to be written. At the end it is synced and takes
    the name of `path`; if anything fails before, `path` stays what it was and the temporary one is
    removed. Raises OSError.

    An empty folder is filled: it may be a mount point, or where a shell is, so it keeps its place.
    The temporary folder is in it. Its rename to .ready decides; then its files are moved out of it.
    Any other folder is exchanged by two renames, as none replaces a folder that is not empty. After
    a kill between these steps, put_back ends them.
    """
    path = Path(path)
    put_back(path)
    name = f"nanomla-{os.getpid()}.tmp"
    fills = path.is_dir() and not any(path.iterdir())
    if fills:
        unfinished = path / f".{name}"
    else:
        unfinished = path.with_name(f".{path.name}.{name}")
    try:
        yield unfinished
        for written in [unfinished, *unfinished.rglob("*")]:
            if written.is_file():
                with open(written, "rb") as file:
                    os.fsync(file.fileno())
        if fills and unfinished.is_dir():
            if set(path.iterdir()) != {unfinished}:
                raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(path))
            ready = unfinished.with_suffix(".ready")
            unfinished.rename(ready)
            _move_out(ready)
            return
        if unfinished.is_dir() and path.is_dir():
            path.rename(unfinished.with_suffix(".old"))
        os.replace(unfinished, path)
    finally:
        put_back(path)


def put_back(path: Path) -> None:
    """
    End what `replacing` had begun for this path in processes that are gone, or in this one: files
    that are ready get to their place, what was there before gets its name back if nothing has it,
    all else is removed.

    Only this system's processes are known, by their numbers: of two machines that write to the same
    path at once, one may fail, and what a killed process left stays while another has its number.
    """
    temporaries = list(path.parent.glob(f".{glob.escape(path.name)}.nanomla-*"))
    if path.is_dir():
        temporaries += path.glob(".nanomla-*")
    for temporary in temporaries:
        name = re.search(r"\.nanomla-([0-9]{1,9})\.(tmp|old|ready)$", temporary.name)
        if name is None or _is_another_process(int(name[1])):
            continue
        with contextlib.suppress(OSError):
            if name[2] == "ready":
                _move_out(temporary)
            elif name[2] == "old" and not path.exists():
                temporary.rename(path)
            elif temporary.is_dir():
                shutil.rmtree(temporary)
            else:
                temporary.unlink()


def _move_out(ready: Path) -> None:
    """Move what is in a folder to the one that it is in; config.json last, as it opens a model."""
    for path in sorted(ready.iterdir(), key=lambda path: path.name == "config.json"):
        os.replace(path, ready.with_name(path.name))
    ready.rmdir()


def _is_another_process(number: int) -> bool:
    """Whether a process that is not this one has this number; True where that is not known."""
    if number == os.getpid():
        return False
    if os.name == "posix":  # elsewhere this signal would end it
        try:
            os.kill(number, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass
    return True


def write_text(path: str | Path, text: str) -> None:
    """
    Write a file of UTF-8, whole or not at all. What cannot be in UTF-8, such as the bytes of a
    name that is none, becomes an escape like \\udcff. Raises OSError.
    """
    with replacing(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8", errors="backslashreplace")
