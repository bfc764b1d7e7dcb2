"""What is read from disk. Run: python -m pytest tests/test_files.py"""

import enum
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nanomla.errors import UserError
from nanomla.files import check_fields, read_json


@dataclass
class Record:
    size: Annotated[int, ">= 1", "< 100"] = 1
    loss: float = 0.5
    name: str = ""
    on: bool = False
    maybe: int | None = None
    counts: dict[str, int] = field(default_factory=dict)
    rows: list[dict[str, int | float]] = field(default_factory=list)
    pair: tuple[int, ...] = ()
    weight: Tensor | None = None
    other: Any = None

    def __post_init__(self) -> None:
        check_fields(self)


class Word(str):
    __slots__ = ()


@pytest.mark.parametrize(
    ("name", "value", "plain"),
    [
        ("size", np.int64(7), 7), ("size", torch.tensor(7), 7), ("size", torch.tensor([[7]]), 7),
        ("size", enum.IntEnum("E", {"A": 7}).A, 7), ("loss", np.float32(0.5), 0.5),
        ("loss", 2, 2.0), ("loss", torch.tensor(0.5), 0.5), ("loss", float("inf"), float("inf")),
        ("name", Word("a"), "a"), ("name", np.str_("a"), "a"), ("name", Path("a"), "a"),
        ("maybe", np.uint8(3), 3), ("counts", {Word("a"): np.int64(3)}, {"a": 3}),
        ("rows", [{"a": 1, "b": 0.5}], [{"a": 1, "b": 0.5}]), ("pair", (np.int64(1),), (1,)),
    ],
)  # fmt: skip
def test_related_values_become_plain(name, value, plain):
    """Of exactly the declared type, inside containers too."""
    has = getattr(Record(**{name: value}), name)
    assert has == plain and type(has) is type(plain)
    for inner, wants in zip(has, plain, strict=True) if isinstance(plain, (dict, tuple)) else ():
        assert type(inner) is type(wants)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("size", True, "size=True must be a whole number"), ("size", 0, "size=0 must be >= 1"),
        ("size", 100, "size=100 must be < 100"), ("size", 1.0, "a whole number"),
        ("size", "7", "size='7'"), ("size", None, "size=None"), ("size", torch.ones(2), "size="),
        ("size", torch.ones((), device="meta", dtype=torch.int64), "size="),
        ("loss", "low", "loss='low' must be a number"), ("loss", 10**400, "a number"),
        ("loss", False, "a number"), ("loss", 1j, "a number"), ("name", 7, "name=7 must be text"),
        ("name", b"a", "text"), ("on", 1, "on=1 must be True or False"), ("on", None, "on=None"),
        ("maybe", "x", "maybe='x' must be a whole number or None"), ("counts", [], "an object"),
        ("counts", {"a": "b"}, r"counts\['a'\]='b' must be a whole number"),
        ("counts", {1: 1}, "a key of counts=1 must be text"), ("rows", {}, "a list"),
        ("rows", [{"a": "b"}], r"rows\[0\]\['a'\]='b' must be a whole number or a number"),
        ("pair", [1], r"pair=\[1\] must be a tuple"), ("weight", 1, "a tensor or None"),
        ("name", ["x" * 10**6], "name="), ("name", torch.ones(9, 9), "name="),
    ],
)  # fmt: skip
def test_other_values_are_named(name, value, words):
    """One short line with the field, the value and what it must be."""
    with pytest.raises((TypeError, ValueError), match=words) as caught:
        Record(**{name: value})
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 150


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "Expecting value"), (b"[1]", "no JSON object"), (b"null", "no JSON object"),
        (b'{"a": "\xff"}', "utf-8"), (b'{"a": ' + b"[" * 10**5, "nested too deeply"),
        (b'{"a": ' * 10**5, "nested too deeply"), (b'{"a": ' + b"1" * 9999 + b"}", "digits"),
        (b'{"a": "' + b"x" * 2000 + b'"}', "larger than 0 MB"), (b"\x80\x04}", "utf-8"),
    ],
)  # fmt: skip
def test_bad_json_is_one_line(tmp_path, content, words):
    """Empty, damaged, too deep, too large: a UserError with the file's name."""
    path = tmp_path / "a.json"
    path.write_bytes(content)
    limit = 1000 if words.startswith("larger") else 10**6
    with pytest.raises(UserError, match=f"a.json: cannot be read .*{words}") as caught:
        read_json(path, limit)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_what_is_no_file_is_one_line(tmp_path):
    """A folder, a pipe, a name below a file, one that is too long, none; a file is read."""
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "a.json").write_text('{"a": 1}')
    assert read_json(str(tmp_path / "a.json")) == {"a": 1}
    for name, words in (
        ("folder", "it is a folder"), ("pipe", "it is no file"), ("a.json/b", "Not a directory"),
        ("x" * 999, "too long"), ("b.json", "no b.json in this folder"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=words) as caught:
            read_json(tmp_path / name)
        assert "\n" not in str(caught.value)
