"""What is read from disk, whichever room it belongs to: JSON files, and the schema of values."""

import contextlib
import dataclasses
import functools
import json
import math
import numbers
import os
import reprlib
import stat
import types
import typing
from pathlib import Path
from typing import Annotated, Any

from nanomla.errors import UserError
from nanomla.settings import COMPARISONS

LARGEST_JSON = 2**24  # bytes of a .json file, unless its reader allows more
IN_WORDS = {
    int: "a whole number", float: "a number", str: "text", bool: "True or False", dict: "an object",
    list: "a list", type(None): "None",
}  # fmt: skip
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 200  # cut to 60 below


def brief(value: Any) -> str:
    """A value as an error names it: one short line, however large or deep it is."""
    text = " ".join(_SHORT.repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def one_line(text: object) -> str:
    """An exception or a name out of a file as one line of at most 300 characters."""
    line = " ".join(str(text).split())
    return line if len(line) <= 300 else f"{line[:297]}..."


def require_file(path: str | Path) -> None:
    """Raise OSError if nothing has this name, ValueError for a folder, a pipe or a device."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        raise ValueError("it is a folder" if stat.S_ISDIR(mode) else "it is no file")


def read_json(path: str | Path, limit: int = LARGEST_JSON) -> dict[str, Any]:
    """
    The object in a .json file of at most `limit` bytes.

    Raises UserError if it is missing, larger, nested too deeply, damaged or no object.
    """
    path = Path(path)
    try:
        require_file(path)
        with open(path, "rb") as file:
            text = file.read(limit + 1)
        if len(text) > limit:
            raise ValueError(f"it is larger than {limit / 1e6:.0f} MB")
    except FileNotFoundError:
        raise UserError(f"{path.parent}: no {path.name} in this folder") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read ({reason})") from None
    return parse_json(text, str(path))


def parse_json(text: str | bytes, source: str) -> dict[str, Any]:
    """The JSON object in a text. Raises UserError naming the source if it is none."""
    try:
        content = json.loads(text if isinstance(text, str) else text.decode("utf-8"))
    except RecursionError:
        raise UserError(f"{source}: cannot be read (its values are nested too deeply)") from None
    except ValueError as error:
        raise UserError(f"{source}: cannot be read ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{source}: cannot be read (it is no JSON object)")
    return content


def check_fields(instance: Any) -> None:
    """
    Hold every field of a dataclass instance against its type hint, and against the bounds of an
    Annotated one, such as Annotated[int, ">= 0"].

    Values of related classes become plain ones: numpy's numbers, tensors of one element, subclasses
    of str and dict. A bool is no number. Raises TypeError or ValueError naming the field.
    """
    for name, hint in _hints(type(instance)).items():
        object.__setattr__(instance, name, _fitting(getattr(instance, name), hint, name))


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    hints = typing.get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _fitting(value: Any, hint: Any, name: str) -> Any:
    """The value as this type; TypeError or ValueError if it does not stand for one."""
    kind, args = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind is Annotated:
        value = _fitting(value, args[0], name)
        for sign, limit in (note.split() for note in args[1:] if note[0] in "<>"):
            if value is not None and not COMPARISONS[sign](value, float(limit)):
                raise ValueError(f"{name}={brief(value)} must be {sign} {limit}")
        return value
    if kind in (types.UnionType, typing.Union):
        for choice in args:
            with contextlib.suppress(TypeError):
                return _fitting(value, choice, name)
    elif kind in (int, float):
        number = numbers.Integral if kind is int else numbers.Real
        with contextlib.suppress(OverflowError, RuntimeError):  # too large a number; no values
            if hasattr(value, "item") and math.prod(getattr(value, "shape", ())) == 1:
                value = value.item()
            if isinstance(value, number) and not isinstance(value, bool):
                return kind(value)
    elif kind is str and isinstance(value, (str, os.PathLike)):
        return str.__str__(os.fspath(value))
    elif kind is dict and isinstance(value, dict):
        key, inner = args or (Any, Any)
        keys = [_fitting(k, key, f"a key of {name}") for k in value]
        values = [_fitting(v, inner, f"{name}[{brief(k)}]") for k, v in value.items()]
        return dict(zip(keys, values, strict=True))
    elif kind in (list, tuple) and isinstance(value, kind):
        inner = args[0] if args else Any
        return kind(_fitting(v, inner, f"{name}[{i}]") for i, v in enumerate(value))
    elif kind is Any or isinstance(value, kind):
        return value
    choices = args if kind in (types.UnionType, typing.Union) else [hint]
    origins = [typing.get_origin(choice) or choice for choice in choices]
    words = " or ".join(IN_WORDS.get(kind, f"a {kind.__name__.lower()}") for kind in origins)
    raise TypeError(f"{name}={brief(value)} must be {words}")
