"""The check of settings, records and requests. Run: python -m pytest tests/test_checks.py"""

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
    rate: Annotated[Number, "The rate."] = 0.5
    kind: Literal["a", "b"] = "a"
    pair: Several[int] = (1, 2)
    weight: Tensor | None = None
    other: Any = None

    def __post_init__(self) -> None:
        check(self)


@pytest.mark.parametrize(
    ("name", "value", "plain"),
    [
        ("size", np.int64(7), 7), ("size", 1e1, 10), ("loss", 2, 2.0),
        ("loss", torch.tensor(0.5), 0.5), ("loss", float("inf"), float("inf")),
        ("name", Path("a"), "a"), ("on", np.True_, True), ("maybe", np.uint8(3), 3),
        ("pair", [np.int64(1), 2.0], (1, 2)),
    ],
)
def test_related_values_become_plain(name, value, plain):
    """Of exactly the declared type, inside containers too."""
    stored = getattr(Record(**{name: value}), name)
    assert stored == plain and type(stored) is type(plain)
    if isinstance(plain, tuple):
        assert [type(inner) for inner in stored] == [type(inner) for inner in plain]


def test_tensors_stay_tensors():
    """A tensor of one number becomes a number only where a number is wanted."""
    one = torch.ones(1)
    assert Record(weight=one).weight is one and Record(other=one).other is one


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("size", True, "size=True does not work: size must be a whole number of at least 1"),
        ("size", 0, "must be a whole number of at least 1 and below 100"),
        ("size", 1.5, "a whole number"), ("size", "7", "size='7'"),
        ("loss", "low", "loss='low' does not work: loss must be a number"),
        ("rate", float("nan"), "rate must be a finite number"),
        ("name", ["x" * 10**6], "name must be text"),
        ("on", 1, "on=1 does not work: on must be True or False"),
        ("kind", "c", "kind='c' does not work: kind must be one of a, b"),
        ("maybe", "x", "maybe='x' does not work: maybe must be None or a whole number"),
        ("counts", {"a": "b"}, "counts={'a': 'b'} does not work: counts must be an object with"),
        ("pair", 1, "pair=1 does not work: pair must be several, each a whole number"),
        ("weight", 1, "None or a tensor"),
    ],
)
def test_other_values_are_named(name, value, words):
    """One short line with the field, the value and what works."""
    with pytest.raises(ValueError, match="does not work") as caught:
        Record(**{name: value})
    line = str(caught.value)
    assert words in line and "\n" not in line and len(line) < 200


def test_bounds():
    """The shared types accept their bounds and nothing beyond, and say them in words."""
    assert fits(2**63 - 1, Seed) and not fits(2**63, Seed) and not fits(-1, Seed)
    assert fits(1, UpToOne) and not fits(0, UpToOne) and not fits(1.1, UpToOne)
    assert in_words(UpToOne) == "a finite number above 0 and at most 1"
