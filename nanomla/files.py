"""Reading what is on disk, with errors that name the file, and the one way to replace a file."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nanomla.errors import UserError

LARGEST_JSON = 2**27  # bytes of a .json file; the tokenizer of a large vocabulary has 40 MB


def one_line(text: object) -> str:
    """An exception or a name out of a file as one line of at most 300 characters."""
    line = " ".join(str(text).split())
    return line if len(line) <= 300 else f"{line[:297]}..."


def read_text(path: str | Path) -> str:
    """The text of a file of UTF-8, its ends of lines as they are. Raises UserError."""
    try:
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
    Inside, the name of a temporary file in the folder of `path`, to be written. At the end it is
    synced and takes the name of `path`; if anything fails before, `path` stays what it was and the
    temporary file is removed. Raises OSError.
    """
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        unfinished.unlink(missing_ok=True)  # of a process that was killed and had this number
        yield unfinished
        with open(unfinished, "rb") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink()


def write_text(path: str | Path, text: str) -> None:
    """Write a file of UTF-8, whole or not at all. Raises OSError."""
    with replacing(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")
