"""
The one check of values that come from outside: settings, records in files, requests.

A dataclass declares what each of its fields may hold, and calls check(self) when it is made:

    n_layer: Annotated[Count, "The number of transformer blocks."] = 12
"""

import dataclasses
import functools
import math
import os
import reprlib
import types
import typing
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError


def _list_as_tuple(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(value)
    return value


T = TypeVar("T")
Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]  # what torch's generators take
Number = Annotated[float, Field(allow_inf_nan=False)]
NonNegative = Annotated[Number, Field(ge=0)]
Positive = Annotated[Number, Field(gt=0)]
Share = Annotated[Number, Field(ge=0, lt=1)]
UpToOne = Annotated[Number, Field(gt=0, le=1)]
# Names of files, folders and the like: never "", which as a path would be the current folder. The
# bytes of a path that are no UTF-8 are surrogates in Python, which the pattern takes for no text;
# torch and safetensors cannot open such a path. Nor has a name control characters, as names are
# written into comments, logs and file names.
Text = Annotated[str, Field(pattern=r"^\P{Cc}+$")]
# A tuple of at least one value, which is a list where it comes from JSON.
Several = Annotated[tuple[T, ...], Field(min_length=1), BeforeValidator(_list_as_tuple)]

STRICT = ConfigDict(strict=True, arbitrary_types_allowed=True)
LIMITS = {"ge": "of at least", "gt": "above", "le": "at most", "lt": "below"}
NAMES = {
    bool: "True or False", int: "a whole number", float: "a number", str: "text",
    dict: "an object", list: "a list", Any: "anything", type(None): "None",
}

_SHORT = reprlib.Repr()
_SHORT.maxstring = 200  # brief cuts to 60 itself
_SHORT.maxother = 200


def brief(value: Any) -> str:
    """A value as an error names it: one short line, however large or deep it is."""
    text = " ".join(_SHORT.repr(value).split())
    if len(text) > 60:
        return f"{text[:57]}..."
    return text


def require(holds: bool, field: str, value: object, works: str) -> None:
    """Raise ValueError, "field=value does not work: field must be ...", unless it holds."""
    if not holds:
        raise ValueError(f"{field}={value!r} does not work: {field} must be {works}")


def check(instance: object) -> None:
    """
    Hold every field of a dataclass instance, but for dataclasses, to its declared type and bounds,
    and store the plain Python values that `fit` returns.

    Raises ValueError with one line that names the field, its value and what works.
    """
    for name, hint in declared_types(type(instance)).items():
        value = getattr(instance, name)
        try:
            plain = fit(value, hint)
        except ValidationError:
            wrong = f"{name}={brief(value)} does not work"
            raise ValueError(f"{wrong}: {name} must be {in_words(hint)}") from None
        object.__setattr__(instance, name, plain)  # the instance may be frozen


def fit(value: Any, hint: Any) -> Any:
    """
    The value as exactly the type of the hint. Types are strict: no text is a number, and no number
    is True. Numbers of numpy and tensors of one number become Python's, paths become text, and a
    whole float becomes an int where one is wanted.

    Raises pydantic's ValidationError, which is a ValueError, for a value of another type.
    """
    adapter = _adapter(hint)
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        try:
            return adapter.validate_python(_plain(value))
        except ValidationError:
            raise error from None  # the first error, which is about the value as it was given


def fits(value: Any, hint: Any) -> bool:
    """Whether `fit` accepts the value."""
    try:
        fit(value, hint)
    except ValidationError:
        return False
    return True


@functools.cache
def declared_types(kind: type) -> dict[str, Any]:
    """The type hint of every field of a dataclass, but of those that are dataclasses."""
    hints = typing.get_type_hints(kind, include_extras=True)
    names = [field.name for field in dataclasses.fields(kind)]
    return {name: hints[name] for name in names if not dataclasses.is_dataclass(hints[name])}


@functools.cache
def _adapter(hint: Any) -> TypeAdapter:
    return TypeAdapter(hint, config=STRICT)


def _plain(value: Any) -> Any:
    """A value of a related class as a plain Python value, in a list or tuple too."""
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(inner) for inner in value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "item") and math.prod(getattr(value, "shape", ())) == 1:
        value = value.item()
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def in_words(hint: Any) -> str:
    """What a type and its bounds allow: "None or a whole number of at least 1"."""
    origin = typing.get_origin(hint)
    arguments = typing.get_args(hint)
    if origin is Annotated:
        return _bounded(in_words(arguments[0]), arguments[1:])
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin in (types.UnionType, typing.Union):
        none_first = sorted(arguments, key=lambda choice: choice is not type(None))
        return " or ".join(map(in_words, none_first))
    if origin is tuple:
        return f"several, each {in_words(arguments[0])}"
    if origin is list:
        return f"a list, each {in_words(arguments[0])}"
    if origin is dict:
        keys, values = map(in_words, arguments)
        return f"an object with {keys} for keys and {values} for each value"
    return NAMES.get(hint) or f"a {hint.__name__.lower()}"


def _bounded(words: str, notes: tuple[Any, ...]) -> str:
    """The words for a type with the bounds that its pydantic Fields set."""
    limits = []
    for note in notes:
        for bound in getattr(note, "metadata", []):
            if hasattr(bound, "allow_inf_nan"):
                words = "a finite number"
            if hasattr(bound, "pattern"):
                words = "some text in UTF-8 without control characters"
            for attribute, phrase in LIMITS.items():
                if hasattr(bound, attribute):
                    limits.append(f"{phrase} {getattr(bound, attribute)}")
    return f"{words} {' and '.join(limits)}".strip()
