"""The check of settings, records and requests. Run: python -m pytest tests/test_checks.py"""

import enum
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest
import torch
from pydantic import Field
from torch import Tensor

from nanomla.checks import Count, Number, Seed, Several, UpToOne, check, fits, in_words


@dataclass
class Record:
    size: Annotated[Count, Field(lt=100)] = 1
    loss: float = 0.5
    name: str = ""
    on: bool = False
    maybe: int | None = None
    counts: dict[str, int] = field(default_factory=dict)
    rows: list[dict[str, int | float]] = field(default_factory=list)
    rate: Annotated[Number, "The rate."] = 0.5
    kind: Literal["a", "b"] = "a"
    pair: Several[int] = (1, 2)
    weight: Tensor | None = None
    other: Any = None

    def __post_init__(self) -> None:
        check(self)


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
