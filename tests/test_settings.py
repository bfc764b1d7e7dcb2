"""Settings from defaults, files and flags. Run: python -m pytest tests/test_settings.py"""

import importlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar

import pytest
from pydantic import Field

from nanomla.checks import Count, Natural, Positive, check, fits
from nanomla.errors import UsageError
from nanomla.settings import build, configure, declared, describe, flat, read_arguments
from nanomla.start import keep_the_later
from tests.conftest import fails_with_one_line, run
from tests.test_house import modules
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


@pytest.mark.parametrize(
    ("flags", "field", "value"),
    [
        (["--count=1e3"], "count", 1000),
        (["--count", "7"], "count", 7),
        (["--rate=2"], "rate", 2.0),
        (["--flag", "--count=7"], "flag", True),
        (["--flag", "false", "--count=7"], "flag", False),
        (["--limit=none"], "limit", None),
        (["--name=12"], "name", "12"),
        (["--name=a=b"], "name", "a=b"),
    ],
)
def test_flag_types(flags, field, value):
    """
    A flag's text becomes the declared type. It may be the next argument; a switch takes that only
    if it is True or False.
    """
    got = getattr(configure(Settings, flags)[0], field)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cuont = 3", "unknown setting cuont; did you mean count"),
        ("zzz = 3", "unknown setting zzz; --help lists the keys"),
        ("count = 'three'", "count must be a whole number of at least 0, not 'three'"),
        ("rate = 100", "a finite number above 0 and below 100"),
        ("limit = 0", "None or a whole number of at least 1"),
        ("width = 13", "width=13 does not work: width must be another number"),
    ],
)
def test_wrong_settings(tmp_path, text, words):
    """In a file and as a flag, each is a UsageError whose one line names what would work."""
    (tmp_path / "bad.py").write_text(text)
    key, _, value = text.replace("'", "").split()
    for argument in (f"{tmp_path}/bad.py", f"--{key}={value}"):
        with pytest.raises(UsageError, match=words) as caught:
            configure(Settings, [argument])
        assert "\n" not in str(caught.value)
        assert argument in str(caught.value) or key == "width"


ALL_SETTINGS = []  # of every script
for name in modules():
    for kind in vars(importlib.import_module(name)).values():
        if hasattr(kind, "headings") and kind.__module__ == name:
            ALL_SETTINGS.append(kind)
# Texts that are no names, of which most scripts refuse an empty one in words of their own.
NO_NAMES = {"start", "stop", "variants", "cache"}


@pytest.mark.parametrize("kind", ALL_SETTINGS, ids=lambda kind: f"{kind.__module__}")
def test_no_setting_that_names_something_is_empty(kind):
    """
    As a path, empty text is the current folder. Nor is one no UTF-8, which torch cannot open, or
    several lines, which would end a comment that it is written into.
    """
    for name, setting in declared(kind).items():
        if fits("text", setting.type) and name not in NO_NAMES:
            for text in ("", "\udcff", "a\nb", "a\rb"):
                with pytest.raises(UsageError, match=name):
                    configure(kind, [f"--{name}={text}"])


@pytest.mark.parametrize("script", ["train.py", "data/text/prepare.py", "tools.compare"])
def test_no_argument_is_empty(script):
    """Neither a config file nor what is read."""
    assert fails_with_one_line(run(script, "", "--name=x"), 2, "'': an argument must be some text")


def test_a_later_flag_undoes_the_name_of_an_attention(tmp_path):
    """And the name undoes earlier flags, of a file or the command line; what agrees stays."""

    def attention(*argv):
        asked, origins = read_arguments(TrainConfig, argv)
        keep_the_later(asked, origins)
        assert asked.keys() == origins.keys()
        return build(TrainConfig, asked).model.attention_name

    (tmp_path / "named.py").write_text("attention = 'rotary_latent'\npos_emb = 'rope'\n")
    (tmp_path / "flags.py").write_text("use_mla = True\nmla_rope = 'latent'\npos_emb = 'rope'\n")
    named, flags = f"{tmp_path}/named.py", f"{tmp_path}/flags.py"
    assert attention(named) == attention(flags) == "rotary_latent"
    assert attention(named, "--use_mla=False") == attention(flags, "--attention=mha") == "mha"
    assert attention(named, "--use_mla=True") == "rotary_latent"
    assert attention("--use_mla=False", named) == "rotary_latent"


def test_optional_model_settings_from_flags_and_files(tmp_path):
    """mla_latent_dim, whose default None stands for a 4x smaller cache, is set from both."""
    path = f"{tmp_path}/c.py"
    (tmp_path / "c.py").write_text("use_mla = True\nmla_latent_dim = 48\n")
    for flags, want in (([], 48), (["--mla_latent_dim=16"], 16), (["--mla_latent_dim=None"], 384)):
        assert configure(TrainConfig, [path, *flags])[0].model.mla_latent_dim == want
    for text in ("9,8", "(9, 8)", "[9,8.0]"):
        cfg, _ = configure(TrainConfig, [path, "--n_layer=2", f"--mla_latent_dim={text}"])
        assert cfg.model.mla_latent_dim == (9, 8)
    with pytest.raises(UsageError, match="a whole number .* or several, each a whole number"):
        configure(TrainConfig, [path, "--mla_latent_dim=9,0"])


def test_nested_settings_are_flat():
    """A nested dataclass is set by its fields' own names; an outer name hides a nested one."""
    cfg, origins = configure(Settings, ["--width=7", "--count=9"])
    assert (cfg.part.width, cfg.part.count, cfg.count) == (7, 0, 9)
    assert flat(cfg)["width"] == 7 and flat(cfg)["count"] == 9 and "part" not in flat(cfg)
    assert describe(cfg, origins) == ["command line: width=7, count=9"]
    assert configure(Settings, [])[0].part.width == 5 and declared(Settings)["width"].default == 5
    assert describe(*configure(Settings, ["--width=5"])) == []


def test_every_setting_is_declared_in_full():
    """All scripts' settings have a heading and a sentence."""
    from data.openwebtext.prepare import PrepareConfig as OpenWebText
    from data.text.prepare import PrepareConfig as Text
    from sample import SampleConfig
    from tools.bench.__main__ import ReportConfig, TimingConfig
    from tools.compare import CompareConfig
    from tools.convert import ConvertConfig
    from tools.export import ExportConfig
    from tools.serve import ServeConfig

    scripts = (
        TrainConfig, SampleConfig, TimingConfig, ReportConfig, CompareConfig, ConvertConfig,
        ExportConfig, ServeConfig, Text, OpenWebText,
    )
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
    assert set(TrainConfig.decides_run) <= set(declared(TrainConfig))


def test_every_shipped_config_parses():
    """Each file in config/ names only settings that exist, with values that work."""
    for path in sorted((Path(__file__).parents[1] / "config").glob("*.py")):
        assert configure(TrainConfig, [str(path)])[0].out_dir != "", path
