"""Settings from defaults, files and flags. Run: python -m pytest tests/test_settings.py"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
import pytest
from pydantic import Field

from nanomla.checks import Count, Natural, Positive, check
from nanomla.errors import UsageError
from nanomla.settings import configure, declared, describe, flat
from tests.conftest import fails_with_one_line, run
from train import TrainConfig


@dataclass
class Part:
    headings: ClassVar[dict[str, str]] = {"width": "part"}

    width: Annotated[Count, "The width of the part."] = 4
    count: Annotated[int, "The count of the part, which the outer one hides."] = 0

    def __post_init__(self):
        check(self)
        if self.width == 13:
            raise ValueError("width=13 does not work: width must be another number")


@dataclass
class Settings:
    headings: ClassVar[dict[str, str]] = {"flag": "values", "name": "names"}

    part: Part = field(default_factory=lambda: Part(width=5))
    flag: Annotated[bool, "A switch."] = False
    count: Annotated[Natural, "How many there are."] = 3
    rate: Annotated[Positive, Field(lt=100), "How fast it goes."] = 0.5
    name: Annotated[str, "What it is called."] = "x"
    limit: Annotated[Count | None, "The most there may be."] = None
    kind: Annotated[Literal["a", "b"], "Which kind it is."] = "a"

    def __post_init__(self):
        check(self)


def test_later_wins_over_files_and_flags(tmp_path):
    """Defaults, then each file, then each flag, in the order given."""
    (tmp_path / "a.py").write_text(
        "import math\n_half = 2\ncount = _half * 4\nrate = 1\nlimit = 7\n"
    )
    (tmp_path / "b.py").write_text("count = 9\nname = 'file'\n")
    cfg, origins = configure(
        Settings, [f"{tmp_path}/a.py", "--count=5", f"{tmp_path}/b.py", "--limit=None"]
    )
    assert (cfg.count, cfg.rate, cfg.name, cfg.limit) == (9, 1.0, "file", None)
    assert isinstance(cfg.rate, float)
    assert origins["count"].endswith("b.py") and origins["limit"] == "--limit=None"
    lines = " ".join(describe(cfg, origins))
    assert f"{tmp_path}/a.py: rate=1.0" in lines and "b.py: count=9, name='file'" in lines
    assert describe(cfg, origins, most=1) == ["  ... and 2 more lines"]


@pytest.mark.parametrize(
    ("flag", "field", "value"),
    [
        ("--count=1e3", "count", 1000),
        ("--rate=2", "rate", 2.0),
        ("--rate=1e-4", "rate", 1e-4),
        ("--flag=True", "flag", True),
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
    ("arguments", "count", "flag", "origin"),
    [
        (["--count", "7"], 7, False, "--count 7"),
        (["--flag", "--count", "7"], 7, True, "--count 7"),
        (["--flag", "false", "--count=7"], 7, False, "--count=7"),
        (["--fl-ag", "--count=7"], None, None, None),
    ],
)
def test_values_after_a_space(arguments, count, flag, origin):
    """A flag takes the next argument as its value, and a switch only if it is True or False."""
    if origin is None:
        with pytest.raises(UsageError, match="unknown setting fl_ag; did you mean flag"):
            configure(Settings, arguments)
        return
    cfg, origins = configure(Settings, arguments)
    assert (cfg.count, cfg.flag, origins["count"]) == (count, flag, origin)


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
        ("--count=-1", ["--count=-1", "a whole number of at least 0"]),
        ("--rate=0", ["a finite number above 0 and below 100"]),
        ("--rate=100", ["above 0 and below 100"]),
        ("--limit=0", ["None or a whole number of at least 1"]),
        ("--width=0", ["width must be a whole number of at least 1"]),
        ("--width=13", ["width=13", "another number"]),
        ("--part=3", ["unknown setting part"]),
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
    """mla_latent_dim, whose default None stands for a 4x smaller cache, is set from both."""
    path = f"{tmp_path}/c.py"
    (tmp_path / "c.py").write_text("use_mla = True\nmla_latent_dim = 48\n")
    for flags, want in (([], 48), (["--mla_latent_dim=16"], 16), (["--mla_latent_dim=None"], 384)):
        assert configure(TrainConfig, [path, *flags])[0].model.mla_latent_dim == want
    for text in ("9,8", "(9, 8)", "[9,8.0]"):
        cfg, _ = configure(TrainConfig, [path, "--n_layer=2", f"--mla_latent_dim={text}"])
        assert cfg.model.mla_latent_dim == (9, 8)
    for text in ("9,x", "()", "9,0", "True,2"):
        with pytest.raises(UsageError, match="a whole number .* or several, each a whole number"):
            configure(TrainConfig, [path, f"--mla_latent_dim={text}"])


def test_nested_settings_are_flat():
    """A nested dataclass is set by its fields' own names; an outer name hides a nested one."""
    cfg, origins = configure(Settings, ["--width=7", "--count=9"])
    assert (cfg.part.width, cfg.part.count, cfg.count) == (7, 0, 9)
    assert flat(cfg)["width"] == 7 and flat(cfg)["count"] == 9 and "part" not in flat(cfg)
    assert describe(cfg, origins) == ["command line: width=7, count=9"]
    assert configure(Settings, [])[0].part.width == 5 and declared(Settings)["width"].default == 5
    assert describe(*configure(Settings, ["--width=5"])) == []


def test_plain_values_whatever_is_given():
    """Values of related classes become plain ones; others are an error, from Python as from
    flags."""
    cfg = Settings(count=np.int64(4), rate=np.float32(2), name=np.str_("n"), limit=6.0)
    plain = (cfg.count, cfg.rate, cfg.name, cfg.limit)
    assert plain == (4, 2.0, "n", 6) and [type(v) for v in plain] == [int, float, str, int]
    for bad in (
        {"count": True},
        {"count": "4"},
        {"rate": None},
        {"flag": 1},
        {"rate": float("nan")},
    ):
        with pytest.raises(ValueError, match="does not work: .* must be"):
            Settings(**bad)


def test_every_setting_is_declared_in_full():
    """All scripts' settings have a heading and a sentence."""
    from data.openwebtext.prepare import PrepareConfig as OpenWebText
    from data.text.prepare import PrepareConfig as Text
    from sample import SampleConfig
    from tools.bench.__main__ import DecodeConfig, ReportConfig
    from tools.compare import CompareConfig
    from tools.convert import ConvertConfig
    from tools.export import ExportConfig
    from tools.serve import ServeConfig

    scripts = (
        TrainConfig, SampleConfig, DecodeConfig, ReportConfig, CompareConfig, ConvertConfig,
        ExportConfig, ServeConfig, Text, OpenWebText,
    )  # fmt: skip
    for config_class in scripts:
        settings = declared(config_class)
        assert set(config_class.headings) <= set(settings), config_class
        for setting in settings.values():
            sentence = setting.sentence
            assert setting.heading != "settings", setting
            assert sentence[0].isupper() and sentence[-1] == ".", setting
            assert len(sentence.split()) > 2, setting
    assert set(TrainConfig.decides_run) <= set(declared(TrainConfig))


def test_files_may_hold_other_scripts_keys(tmp_path):
    """Only those that are named, and only in files: as a flag such a key is an error."""
    (tmp_path / "c.py").write_text("count = 4\nmax_iters = 3\n")
    cfg, _ = configure(Settings, [f"{tmp_path}/c.py"], ignored_in_files=["max_iters"])
    assert cfg.count == 4
    for argv in ([f"{tmp_path}/c.py"], ["--max_iters=3"]):
        with pytest.raises(UsageError, match="unknown setting max_iters"):
            configure(Settings, argv, ignored_in_files=["max_iters"] if argv[0][0] == "-" else [])


def test_help_lists_every_setting():
    """--help names every key under its heading, with the value in force and its origin; exits 0."""
    done = run("train.py", "config/train_mla.py", "--n_layer=7", "--help")
    assert done.returncode == 0
    assert all(f"  --{name}  " in done.stdout for name in declared(TrainConfig))
    lines = done.stdout.splitlines()
    assert lines.index("model:") < lines.index("attention:")
    sentence = "The number of transformer blocks. (a whole number of at least 1)"
    assert f"  --n_layer  7 (--n_layer=7): {sentence}" in lines
    assert any(line.startswith("  --n_head  4 (config/train_mla.py): ") for line in lines)
    assert any(line.startswith("  --seed  1337: ") for line in lines)
    assert all(len(line) <= 100 for line in lines)


def test_names_from_elsewhere():
    """Keys that people know from other programs lead to ours."""
    for key, name in (("lr", "learning_rate"), ("steps", "max_iters"), ("n_layers", "n_layer")):
        with pytest.raises(UsageError, match=f"unknown setting {key}; did you mean {name}"):
            configure(TrainConfig, [f"--{key}=1"])
    with pytest.raises(UsageError, match="unknown setting zzz; --help lists the keys"):
        configure(TrainConfig, ["--zzz=1"])


def test_mistyped_flag_as_a_user_sees_it():
    """One line that suggests the key, exit status 2, no traceback."""
    done = run("train.py", "config/train_mla.py", "--mla_latnt_dim=16", fresh=True)
    assert fails_with_one_line(done, 2, "mla_latnt_dim", "did you mean mla_latent_dim")


def test_every_shipped_config_parses():
    """Each file in config/ names only settings that exist, with values that work."""
    for path in sorted((Path(__file__).parents[1] / "config").glob("*.py")):
        assert configure(TrainConfig, [str(path)])[0].out_dir != "", path
