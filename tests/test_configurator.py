"""Settings from defaults, files and flags. Run: python -m pytest tests/test_configurator.py"""

from dataclasses import dataclass
from typing import Annotated, Literal

import pytest

from configurator import UsageError, configure, describe
from tests.conftest import fails_with_one_line, run
from train import TrainConfig


@dataclass
class Settings:
    flag: Annotated[bool, "a switch"] = False
    count: Annotated[int, "how many"] = 3
    rate: Annotated[float, "how fast"] = 0.5
    name: Annotated[str, "what"] = "x"
    limit: Annotated[int | None, "at most"] = None
    kind: Annotated[Literal["a", "b"], "which"] = "a"

    def __post_init__(self):
        if self.count < 0:
            raise ValueError("count=-1 does not work: count must be at least 0")


def test_later_wins_over_files_and_flags(tmp_path):
    """Defaults, then each file, then each flag, in the order given."""
    (tmp_path / "a.py").write_text("import math\n_half = 2\ncount = _half * 4\nrate = 1\nlimit = 7\n")
    (tmp_path / "b.py").write_text("count = 9\nname = 'file'\n")
    cfg, origins = configure(Settings, [f"{tmp_path}/a.py", "--count=5", f"{tmp_path}/b.py", "--limit=None"])
    assert (cfg.count, cfg.rate, cfg.name, cfg.limit) == (9, 1.0, "file", None)
    assert isinstance(cfg.rate, float)
    assert origins["count"].endswith("b.py") and origins["limit"] == "--limit=None"
    assert [line.split(" ")[0] for line in describe(cfg, origins)] == ["count", "rate", "name"]


@pytest.mark.parametrize(
    ("flag", "field", "value"),
    [
        ("--count=1e3", "count", 1000),
        ("--count=-0", "count", 0),
        ("--rate=2", "rate", 2.0),
        ("--rate=1e-4", "rate", 1e-4),
        ("--flag=True", "flag", True),
        ("--flag=true", "flag", True),
        ("--flag=false", "flag", False),
        ("--flag", "flag", True),
        ("--limit=12", "limit", 12),
        ("--limit=none", "limit", None),
        ("--name=12", "name", "12"),
        ("--name=", "name", ""),
        ("--name=a=b", "name", "a=b"),
        ("--kind=b", "kind", "b"),
    ],
)
def test_flag_types(flag, field, value):
    """A flag's text becomes the declared type."""
    got = getattr(configure(Settings, [flag])[0], field)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--cuont=3", ["cuont", "did you mean count"]),
        ("--count=2.5", ["--count=2.5", "whole number"]),
        ("--count=many", ["whole number", "'many'"]),
        ("--count=True", ["whole number"]),
        ("--rate=inf", ["finite"]),
        ("--rate=nan", ["finite"]),
        ("--flag=1", ["True or False"]),
        ("--limit=x", ["whole number"]),
        ("--kind=c", ["a, b"]),
        ("--count", ["needs a value"]),
        ("--count=-1", ["at least 0"]),
        ("-count=3", ["--key=value"]),
        ("missing.py", ["missing.py", "cannot read"]),
    ],
)
def test_bad_arguments(argument, words):
    """Each mistake is a UsageError whose one line names the place and what would work."""
    with pytest.raises(UsageError) as caught:
        configure(Settings, [argument])
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("count = = 3", ["not a Python config file"]),
        ("count = 1 / 0", ["ZeroDivisionError"]),
        ("cuont = 3", ["unknown setting cuont", "count"]),
        ("count = 'three'", ["whole number"]),
        ("flag = 1", ["True or False"]),
        ("name = 3", ["text"]),
        ("kind = 'z'", ["a, b"]),
    ],
)
def test_bad_config_files(tmp_path, text, words):
    """Files are checked as flags are, and errors name the file."""
    (tmp_path / "bad.py").write_text(text)
    with pytest.raises(UsageError) as caught:
        configure(Settings, [f"{tmp_path}/bad.py"])
    assert all(word in str(caught.value) for word in [*words, "bad.py"])


def test_optional_model_settings_from_flags_and_files(tmp_path):
    """mla_latent_dim, whose default is None, can be set and unset from both."""
    (tmp_path / "c.py").write_text("use_mla = True\nmla_latent_dim = 48\n")
    assert configure(TrainConfig, [f"{tmp_path}/c.py"])[0].mla_latent_dim == 48
    assert configure(TrainConfig, [f"{tmp_path}/c.py", "--mla_latent_dim=16"])[0].mla_latent_dim == 16
    assert configure(TrainConfig, [f"{tmp_path}/c.py", "--mla_latent_dim=None"])[0].mla_latent_dim is None


def test_help_lists_every_setting():
    """--help names every key of train.py with its default and exits 0."""
    done = run("train.py", "--help")
    assert done.returncode == 0
    assert all(f"--{name} " in done.stdout for name in TrainConfig.__dataclass_fields__)


def test_mistyped_flag_as_a_user_sees_it():
    """One line that suggests the key, exit status 2, no traceback."""
    done = run("train.py", "config/train_mla.py", "--mla_latnt_dim=16", fresh=True)
    assert fails_with_one_line(done, 2, "mla_latnt_dim", "did you mean mla_latent_dim")


def test_every_shipped_config_parses():
    """Each file in config/ names only settings that exist, with values that work."""
    from pathlib import Path

    for path in sorted((Path(__file__).parents[1] / "config").glob("*.py")):
        assert configure(TrainConfig, [str(path)])[0].out_dir != "", path
