"""
Typed settings: dataclass defaults <- config files <- --key=value, later wins.

    python train.py config/train_mla.py config/mine.py --mla_latent_dim=32 --compile

A script declares its settings as one dataclass, each field as

    name: Annotated[type, bounds, "A sentence that --help prints."] = default

with types and bounds as in nanomla/checks.py. A field whose type is a dataclass lends its fields,
which are set by their own names: train.py's settings have a GPTConfig, and --n_layer=3 sets its
n_layer. A class may have three more attributes, all of which are ClassVars:

    headings            the headings of --help, each by the name of the first field below it
    usage               what follows the script's name in --help's first line
    ignored_in_files    settings of other scripts that config files may hold

Config files are Python that assigns to these names. Files, flags, checkpoints and calls from Python
pass the same check, so a setting means the same wherever it is written.
"""

import ast
import dataclasses
import difflib
import functools
import sys
import textwrap
import types
import typing
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import ValidationError

from nanomla.checks import brief, fit, fits, in_words
from nanomla.errors import UsageError
from nanomla.files import require_file

Config = TypeVar("Config")

HELP = ("--help", "-h")
SWITCHES = ("True", "False", "true", "false")  # what may follow a bool's flag, after a space
SYNONYMS = {  # names from elsewhere that difflib finds nothing like
    "lr": "learning_rate", "steps": "max_iters", "tokens": "max_iters", "ctx": "block_size",
    "hidden_size": "n_embd", "prompt": "start", "temp": "temperature",
}
_wrap = functools.partial(
    textwrap.wrap, width=100, break_long_words=False, break_on_hyphens=False
)


@dataclass(frozen=True)
class Setting:
    """One setting as its dataclass declares it."""

    name: str
    type: Any  # with its bounds, as nanomla.checks.fit takes it
    default: Any
    heading: str
    sentence: str
    part: str | None  # the field of the outer dataclass that it belongs to, if it is a nested one's


@functools.cache
def declared(config_class: type) -> dict[str, Setting]:
    """The settings of a dataclass by name, nested ones too; an outer name hides a nested one."""
    hints = typing.get_type_hints(config_class, include_extras=True)
    headings = getattr(config_class, "headings", {})
    heading = "settings"
    own = {}
    nested = {}
    for field in dataclasses.fields(config_class):
        hint = hints[field.name]
        heading = headings.get(field.name, heading)
        if dataclasses.is_dataclass(hint):
            defaults = flat(field.default_factory())
            for name, setting in declared(hint).items():
                default = defaults[name]
                nested[name] = dataclasses.replace(setting, default=default, part=field.name)
        else:
            sentence = typing.get_args(hint)[-1]
            own[field.name] = Setting(field.name, hint, field.default, heading, sentence, None)
    return nested | own


def flat(config: object) -> dict[str, Any]:
    """All settings of an instance by name, nested ones included; an outer name hides a nested."""
    own = {}
    nested = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            nested |= flat(value)
        else:
            own[field.name] = value
    return nested | own


def configure(
    config_class: type[Config],
    argv: Sequence[str],
    hints: dict[str, str] | None = None,
    ignored_in_files: Collection[str] = (),
    files: list[str] | None = None,
) -> tuple[Config, dict[str, str]]:
    """A `config_class` from the arguments of read_arguments, and where each setting came from."""
    values, origins = read_arguments(config_class, argv, hints, ignored_in_files, files)
    return build(config_class, values), origins


def read_arguments(
    config_class: type,
    argv: Sequence[str],
    hints: dict[str, str] | None = None,
    ignored_in_files: Collection[str] = (),
    files: list[str] | None = None,
) -> tuple[dict[str, Any], dict[str, str]]:
    """
    The settings that command-line arguments give, each of its type, but not held against another.

    argv: config files and `--key=value` or `--key value` in any order; a bare `--key` sets a bool
    to True; `--help` prints the settings as the other arguments leave them, and exits.
    hints: what to say about keys that do not exist here but that people know from elsewhere.
    ignored_in_files: other scripts' keys that config files may hold; the class may name more.
    files: a list that gets the arguments that are no flags, which are then no config files.
    Returns their values by key, in the order in which they were given, and where each came from.
    Raises UsageError for an unknown key, a wrong value, a missing or broken file.
    """
    settings = declared(config_class)
    ignored = set(ignored_in_files) | set(getattr(config_class, "ignored_in_files", ()))
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}

    def assign(key: str, value: Any, where: str) -> None:
        if key not in settings:
            hint = (hints or {}).get(key) or _nearest(key, settings)
            raise UsageError(f"{where}: unknown setting {key}{hint}")
        wanted = settings[key].type
        values.pop(key, None)  # so that values are in the order in which they were last given
        try:
            values[key] = fit(value, wanted)
        except ValidationError:
            must = f"{key} must be {in_words(wanted)}, not {brief(value)}"
            raise UsageError(f"{where}: {must}") from None
        origins[key] = where
        if values[key] is None and settings[key].part is not None:
            # The nested dataclass decides what None stands for, as if nothing had been given.
            del values[key]
            del origins[key]

    rest = [argument for argument in argv if argument not in HELP]
    while rest:
        argument = rest.pop(0)
        if not argument:
            raise UsageError("'': an argument must be some text; --help lists the settings")
        if argument.startswith("-"):
            key, value, where = _read_flag(argument, rest, settings)
            assign(key, value, where)
        elif files is not None:
            files.append(argument)
        else:
            for key, value in run_config_file(argument).items():
                if key in settings or key not in ignored:
                    assign(key, value, argument)
    if any(argument in HELP for argument in argv):
        print(_help_text(config_class, values, origins))
        raise SystemExit(0)
    return values, origins


def _read_flag(
    flag: str, rest: list[str], settings: dict[str, Setting]
) -> tuple[str, Any, str]:
    """
    A flag's key, its value and how the two were written. The value is the Python value that a
    config file would hold. It may be the next argument, which is then taken from `rest`.
    """
    key, equals, text = flag.removeprefix("--").partition("=")
    key = key.replace("-", "_")
    if not flag.startswith("--") or not key:
        raise UsageError(f"{flag}: expected a config file or --key=value; --help lists the keys")
    if key not in settings:
        return key, text, flag
    wanted = settings[key].type
    if equals:
        return key, _read_value(text, wanted), flag
    is_switch = fits(True, wanted)
    if is_switch and (not rest or rest[0] not in SWITCHES):
        return key, True, flag
    if not rest or rest[0].startswith("--"):
        raise UsageError(f"{flag}: needs a value: {flag}=...")
    text = rest.pop(0)
    return key, _read_value(text, wanted), f"{flag} {text}"


def _read_value(text: str, wanted: Any) -> Any:
    """What a flag's text stands for: text where that is wanted, else Python; else it stays text."""
    if text in ("None", "none") and fits(None, wanted):
        return None
    if fits(text, wanted):
        return text
    try:
        return ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
    except (ValueError, SyntaxError):
        return text


def _nearest(key: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    if SYNONYMS.get(key) in known:
        close = [SYNONYMS[key]]
    if close:
        return f"; did you mean {close[0]}?"
    return "; --help lists the keys"


def build(
    config_class: type[Config], values: dict[str, Any], base: Config | None = None
) -> Config:
    """
    A `config_class` with these settings, nested ones too; the others are base's or the default.

    Raises UsageError for values that do not work or do not go together.
    """
    settings = declared(config_class)
    arguments = {}
    nested: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        part = settings[name].part
        if part is None:
            arguments[name] = value
        else:
            nested.setdefault(part, {})[name] = value
    for field in dataclasses.fields(config_class):
        if field.name in nested:
            inner = field.default_factory() if base is None else getattr(base, field.name)
            arguments[field.name] = build(type(inner), nested[field.name], inner)
    try:
        if base is None:
            return config_class(**arguments)
        return dataclasses.replace(base, **arguments)
    except ValueError as error:  # the dataclasses check their values, and how these fit together
        raise UsageError(str(error)) from None


def run_config_file(path: str) -> dict[str, Any]:
    """What a config file assigns, without modules, functions, classes and _private names."""
    try:
        require_file(path, or_pipe=True)
        with open(path, encoding="utf-8") as file:
            code = compile(file.read(), path, "exec")
        namespace: dict[str, Any] = {"__file__": path, "__name__": "config"}
        exec(code, namespace)  # noqa: S102  a config file is the user's own Python
    except OSError as error:
        raise UsageError(f"{path}: cannot read this config file ({error.strerror})") from None
    except SyntaxError as error:
        raise UsageError(f"{path}:{error.lineno}: not a Python config file ({error.msg})") from None
    except (Exception, SystemExit) as error:  # noqa: BLE001  it can raise anything
        raise UsageError(f"{path}: fails as Python ({type(error).__name__}: {error})") from None
    no_setting = (types.ModuleType, types.FunctionType, types.BuiltinFunctionType, type)
    assigned = {}
    for name, value in namespace.items():
        if not name.startswith("_") and not isinstance(value, no_setting):
            assigned[name] = value
    return assigned


def describe(config: object, origins: dict[str, str]) -> list[str]:
    """Lines with the settings that differ from their defaults, by where they came from."""
    settings = declared(type(config))
    values = flat(config)
    places: dict[str, list[str]] = {}
    for key, where in origins.items():
        if values[key] != settings[key].default:
            place = "command line" if where.startswith("--") else where
            places.setdefault(place, []).append(f"{key}={values[key]!r}")
    lines = []
    for place, texts in places.items():
        lines += _wrap(f"{place}: {', '.join(texts)}", subsequent_indent="   ")
    return lines


def _help_text(config_class: type, values: dict[str, Any], origins: dict[str, str]) -> str:
    """Every setting under its heading, with the value in force and where that came from."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)  # set when started with python -m
    script = sys.argv[0] if spec is None else "-m " + spec.name.removesuffix(".__main__")
    usage = getattr(config_class, "usage", "[CONFIG.py ...] [--key=value ...]")
    doc = sys.modules[config_class.__module__].__doc__ or ""
    lines = [f"usage: python {script} {usage}", "", doc.strip()]
    headings: dict[str, list[str]] = {}
    for name, setting in declared(config_class).items():
        value = repr(values.get(name, setting.default))
        if name in origins:
            value += f" ({origins[name]})"
        line = f"  --{name}  {value}: {setting.sentence} ({in_words(setting.type)})"
        headings.setdefault(setting.heading, []).extend(_wrap(line, subsequent_indent=" " * 8))
    for heading, settings in headings.items():
        lines += ["", f"{heading}:"]
        lines += settings
    return "\n".join(lines)
