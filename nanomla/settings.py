"""
Typed settings: dataclass defaults <- config files <- --key=value, later wins.

    python train.py config/train_mla.py config/mine.py --mla_latent_dim=32 --compile

A script declares its settings as one dataclass, each field as

    name: Annotated[type, "#topic", "its meaning", ">= 1", "< 10"] = default

The topic is the heading that --help lists the setting under; it holds for the fields below, too,
until the next one. Strings that begin with < or > bound the value. The string "decides the run"
marks a setting that makes a resumed run another run when it changes.
A field whose type is a dataclass lends its fields, which are set by their own names: train.py's
settings have a GPTConfig, and --n_layer=3 sets its n_layer.

Config files are Python that assigns to these names. Files, flags, checkpoints and calls from Python
pass the same check, so a setting means the same wherever it is written.
"""

import ast
import dataclasses
import difflib
import functools
import math
import numbers
import operator
import os
import sys
import types
import typing
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from nanomla.errors import UsageError, UserError, run_script  # noqa: F401  where they once were

Config = TypeVar("Config")

DECIDES_RUN = "decides the run"
COMPARISONS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
HELP = ("--help", "-h")
SWITCHES = ("True", "False", "true", "false")  # what may follow a bool's flag, after a space
ELSEWHERE = {  # what other programs call settings of ours: the first that a script has
    **dict.fromkeys(("lr", "max_lr", "base_lr"), "learning_rate"),
    **dict.fromkeys(("prompt", "text", "input"), "start"),
    **dict.fromkeys(("steps", "iters", "max_steps", "num_iterations", "epochs"), "max_iters"),
    **dict.fromkeys(("tokens", "max_tokens", "n_tokens", "length"), "max_new_tokens max_iters"),
    **dict.fromkeys(("ctx", "n_ctx", "context_length", "seq_len", "max_seq_len"), "block_size"),
    **dict.fromkeys(("layers", "n_layers", "num_layers", "depth"), "n_layer"),
    **dict.fromkeys(("heads", "n_heads", "num_heads"), "n_head"),
    **dict.fromkeys(("kv_heads", "n_kv_heads", "num_key_value_heads"), "n_kv_head"),
    **dict.fromkeys(("dim", "d_model", "hidden_size", "embed_dim", "width"), "n_embd"),
    **dict.fromkeys(("latent", "latent_dim", "kv_lora_rank"), "mla_latent_dim"),
    **dict.fromkeys(("head_size", "v_head_dim"), "head_dim"),
    **dict.fromkeys(("data", "dataset_name"), "dataset"),
    **dict.fromkeys(("output", "output_dir", "save_dir"), "out_dir to"),
    **dict.fromkeys(("grad_accum", "accum"), "gradient_accumulation_steps"),
    **dict.fromkeys(("warmup", "warmup_steps"), "warmup_iters"),
    **dict.fromkeys(("model", "checkpoint", "model_path"), "init_from ckpt"),
    "rope_dim": "mla_rope_dim", "qk_rope_head_dim": "mla_rope_dim",
    "qk_nope_head_dim": "mla_nope_dim", "q_lora_rank": "mla_q_latent_dim",
    "resume": "init_from", "wd": "weight_decay", "temp": "temperature", "chat": "interactive",
    "batch": "batch_size", "vocab": "vocab_size", "rank": "svd_rank", "eval_every": "eval_interval",
}  # fmt: skip
IN_WORDS = {">=": "at least", "<=": "at most", ">": "above", "<": "below"}


@dataclass(frozen=True)
class Setting:
    """One setting as its dataclass declares it."""

    name: str
    type: Any
    default: Any
    topic: str
    meaning: str
    bounds: tuple[str, ...]  # such as (">= 0", "< 1")
    decides_run: bool
    part: str | None  # the field of the outer dataclass that it belongs to, if it is a nested one's


@functools.cache
def declared(config_class: type) -> dict[str, Setting]:
    """The settings of a dataclass by name, nested ones too; an outer name hides a nested one."""
    hints = typing.get_type_hints(config_class, include_extras=True)
    own, nested, topic = {}, {}, ""
    for field in dataclasses.fields(config_class):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            defaults = flat(field.default_factory())
            for name, setting in declared(hint).items():
                here = {"default": defaults[name], "part": field.name}
                nested[name] = dataclasses.replace(setting, **here)
        else:
            own[field.name] = _setting(field.name, hint, field.default, topic)
            topic = own[field.name].topic
    return {**nested, **own}


def _setting(name: str, hint: Any, default: Any, topic: str) -> Setting:
    kind, *notes = typing.get_args(hint)
    topics = [note[1:] for note in notes if note.startswith("#")] or [topic]
    bounds = tuple(note for note in notes if note[0] in "<>")
    meanings = [n for n in notes if n[0] not in "#<>" and n != DECIDES_RUN]
    if len(topics) != 1 or not topics[0] or len(meanings) != 1:
        raise TypeError(f"{name} must be declared with one #topic and one meaning, not {notes}")
    decides = DECIDES_RUN in notes
    return Setting(name, kind, default, topics[0], meanings[0], bounds, decides, part=None)


def check(config: Any) -> None:
    """
    Hold every value of a dataclass instance against its declared type and range.

    Values of related classes become plain ones: numpy's numbers, and whole floats where a whole
    number is wanted. Raises ValueError naming field, value and what would work.
    """
    for name, setting in declared(type(config)).items():
        if setting.part is None:
            value = getattr(config, name)
            try:
                setattr(config, name, _checked(value, setting))
            except ValueError as error:
                wanted = f"{name} must be {error}"
                raise ValueError(f"{name}={value!r} does not work: {wanted}") from None


def flat(config: Any) -> dict[str, Any]:
    """All settings of an instance by name, nested ones included."""
    parts = {s.part for s in declared(type(config)).values() if s.part}
    values = {}
    for part in parts:
        values |= flat(getattr(config, part))
    own = dataclasses.fields(config)
    return values | {f.name: getattr(config, f.name) for f in own if f.name not in parts}


def configure(
    config_class: type[Config],
    argv: Sequence[str],
    hints: dict[str, str] | None = None,
    ignored_in_files: Collection[str] = (),
    files: list[str] | None = None,
) -> tuple[Config, dict[str, str]]:
    """
    Build a `config_class` from command-line arguments, which are those of read_arguments.

    Returns the config and, for every key that was set, where it came from.
    Raises UsageError for an unknown key, a wrong value, a missing or broken file.
    """
    values, origins = read_arguments(config_class, argv, hints, ignored_in_files, files)
    return build(config_class, values), origins


def build(config_class: type[Config], values: dict[str, Any]) -> Config:
    """
    A `config_class` with these settings, nested ones too; the others have their defaults.

    Raises UsageError for values that do not go together.
    """
    try:
        return _build(config_class, values)
    except ValueError as error:  # the dataclasses check how their values fit together
        raise UsageError(str(error)) from None


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
    Returns their values by key, and where each came from.
    Raises UsageError for an unknown key, a wrong value, a missing or broken file.
    """
    settings, hints = declared(config_class), hints or {}
    ignored = {*ignored_in_files, *getattr(config_class, "ignored_in_files", ())}
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}

    def assign(key: str, value: Any, where: str) -> None:
        if key not in settings:
            hint = hints.get(key) or _nearest(key, settings)
            raise UsageError(f"{where}: unknown setting {key}{hint}")
        try:
            values[key] = _checked(value, settings[key])
        except ValueError as error:
            raise UsageError(f"{where}: {key} must be {error}, not {_brief(value)}") from None
        origins[key] = where
        if values[key] is None and settings[key].part is not None:
            # The nested dataclass decides what None stands for, as if nothing had been given.
            del values[key], origins[key]

    for key, text, where in _arguments(argv, settings):
        if key:
            assign(key, _read_flag(text, settings[key].type if key in settings else None), where)
        elif files is not None:
            files.append(text)
        else:
            for name, value in run_config_file(text).items():
                if name in settings or name not in ignored:
                    assign(name, value, text)
    if set(HELP) & set(argv):
        print(_help_text(config_class, values, origins))
        raise SystemExit(0)
    return values, origins


def _arguments(argv: Sequence[str], settings: dict[str, Setting]) -> Iterator[tuple[str, str, str]]:
    """(key, text, how it was written) of every flag; ("", argument, argument) of what is none."""
    rest = [arg for arg in argv if arg not in HELP]
    while rest:
        arg = where = rest.pop(0)
        if not arg.startswith("-"):
            yield "", arg, arg
            continue
        key, equals, text = arg.removeprefix("--").partition("=")
        key = key.replace("-", "_")
        if not arg.startswith("--") or not key:
            raise UsageError(f"{arg}: expected a config file or --key=value; --help lists the keys")
        switch = key not in settings or settings[key].type is bool
        if not equals and rest and rest[0][:2] != "--" and (not switch or rest[0] in SWITCHES):
            text = rest.pop(0)
            where = f"{arg} {text}"
        elif not equals and not switch:
            raise UsageError(f"{arg}: needs a value: {arg}=...")
        elif not equals:
            text = "True"
        yield key, text, where


def replace(config: Config, values: dict[str, Any], where: str) -> Config:
    """
    A copy of a config with these settings, nested ones too; what is None in a nested one stays.

    Raises UserError naming `where`, for a value that does not work.
    """
    settings = declared(type(config))
    try:
        for key, value in values.items():
            _checked(value, settings[key])
    except ValueError as error:
        raise UserError(f"{where}: {key} must be {error}, not {_brief(value)}") from None
    try:
        return _build(type(config), values, config)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None


def describe(config: Any, origins: dict[str, str], most: int = 8, width: int = 100) -> list[str]:
    """
    The settings that have another value than their default, by where they came from, in at most so
    many lines; the last then says how many are left out.
    """
    settings, values, places = declared(type(config)), flat(config), {}
    for key, where in origins.items():
        if values[key] != settings[key].default:
            place = "command line" if where.startswith("--") else where
            places.setdefault(place, []).append(f"{key}={values[key]!r}")
    lines, counts = [], []
    for place, texts in places.items():
        line, count = f"{place}:", 0
        for text in texts:
            if count and len(line) + len(text) + 2 > width:
                lines, counts = [*lines, line], [*counts, count]
                line, count = "  ", 0
            line, count = f"{line} {text},", count + 1
        lines, counts = [*lines, line.removesuffix(",")], [*counts, count]
    if len(lines) <= most:
        return lines
    return [*lines[: most - 1], f"  ... and {sum(counts[most - 1 :])} more"]


def _build(
    config_class: type[Config], values: dict[str, Any], base: Config | None = None
) -> Config:
    """A `config_class` with these values, nested ones too; the rest is base's or the default."""
    settings = declared(config_class)
    arguments = {k: v for k, v in values.items() if settings[k].part is None}
    for field in dataclasses.fields(config_class):
        nested = {k: v for k, v in values.items() if settings[k].part == field.name}
        if nested:
            inner = getattr(base, field.name) if base else field.default_factory()
            arguments[field.name] = _build(type(inner), nested, inner)
    return dataclasses.replace(base, **arguments) if base else config_class(**arguments)


def run_config_file(path: str) -> dict[str, Any]:
    """What a config file assigns, without modules, functions, classes and _private names."""
    try:
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
    skip = (types.ModuleType, types.FunctionType, types.BuiltinFunctionType, type)
    return {
        k: v for k, v in namespace.items() if not k.startswith("_") and not isinstance(v, skip)
    }


def _read_flag(text: str, hint: Any) -> Any:
    """A flag's text as the Python value that a config file would hold; else it stays text."""
    inner = _without_none(hint)
    if inner is str or typing.get_origin(inner) is Literal:
        return None if text in ("None", "none") and inner is not hint else text
    try:
        return ast.literal_eval({"true": "True", "false": "False", "none": "None"}.get(text, text))
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def _checked(value: Any, setting: Setting) -> Any:
    """The value as its declared type and in its range, or ValueError("what it must be")."""
    kind = _without_none(setting.type)
    optional = kind is not setting.type
    if value is None and optional:
        return None
    bounds = [bound.split() for bound in setting.bounds]
    try:
        plain = _coerce(value, kind)
        several = plain if isinstance(plain, tuple) else (plain,)
        if all(COMPARISONS[sign](v, float(limit)) for v in several for sign, limit in bounds):
            return plain
    except (ValueError, OverflowError, TypeError):
        pass
    wanted = "None or " * optional + _kind_in_words(kind)
    limits = " and ".join(f"{IN_WORDS[sign]} {limit}" for sign, limit in bounds)
    if limits.startswith("at"):  # at least, at most
        limits = f"of {limits}"
    raise ValueError(f"{wanted} {limits}".strip())


def _coerce(value: Any, kind: Any) -> Any:
    """`value` as an instance of exactly this type; ValueError if it does not stand for one."""
    if isinstance(kind, types.UnionType):
        one, several = typing.get_args(kind)  # the only union here is X | tuple[X, ...]
        return _coerce(value, several if isinstance(value, (list, tuple)) else one)
    if typing.get_origin(kind) is Literal:
        for choice in typing.get_args(kind):
            if isinstance(value, type(choice)) and value == choice:
                return choice
    elif typing.get_origin(kind) is tuple:
        if isinstance(value, (list, tuple)) and value:  # a list where it comes from JSON
            return tuple(_coerce(v, typing.get_args(kind)[0]) for v in value)
    elif kind is bool:
        if str(value) in ("True", "False") and not isinstance(value, str):  # numpy's, too
            return bool(value)
    elif kind is str:
        if isinstance(value, (str, os.PathLike)):
            return str.__str__(os.fspath(value))  # str() of an enum would be its name
    elif isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value):
        plain = kind(value)  # int() cuts a fraction off
        if kind is float or plain == value:
            return plain
    raise ValueError


def _kind_in_words(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(kind)))
    if isinstance(kind, types.UnionType):
        return " or ".join(map(_kind_in_words, typing.get_args(kind)))
    if typing.get_origin(kind) is tuple:
        return f"several, each {_kind_in_words(typing.get_args(kind)[0])}"
    words = {bool: "True or False", int: "a whole number", float: "a finite number", str: "text"}
    return words[kind]


def _without_none(hint: Any) -> Any:
    """`int | None` as int; any other type as it is."""
    inner = [a for a in typing.get_args(hint) if a is not type(None)]
    found = type(None) in typing.get_args(hint)
    return functools.reduce(operator.or_, inner) if found else hint


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _nearest(key: str, known: Collection[str]) -> str:
    elsewhere = [name for name in ELSEWHERE.get(key, "").split() if name in known]
    close = elsewhere or difflib.get_close_matches(key, known, n=1)
    return f"; did you mean {close[0]}?" if close else "; --help lists the keys"


def _type_name(hint: Any) -> str:
    inner = _without_none(hint)
    args = typing.get_args(inner)
    if typing.get_origin(inner) is Literal:
        name = "|".join(map(str, args))
    else:  # int, or tuple[int, ...]
        name = str(inner) if args else inner.__name__
    return name if inner is hint else f"{name} or None"


def _help_text(config_class: type, values: dict[str, Any], origins: dict[str, str]) -> str:
    """Every setting under its topic, with the value in force and where that came from."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)  # set when started with python -m
    script = f"-m {spec.name}" if spec else sys.argv[0]
    takes = getattr(config_class, "usage", "[CONFIG.py ...] [--key=value ...]")
    doc = (sys.modules[config_class.__module__].__doc__ or "").strip()
    lines = [f"usage: python {script} {takes}", "", doc]
    settings = declared(config_class).values()
    for topic in dict.fromkeys(setting.topic for setting in settings):
        lines += ["", f"{topic}:"]
        for setting in (s for s in settings if s.topic == topic):
            value = repr(values.get(setting.name, setting.default))
            if setting.name in origins:
                value += f" ({origins[setting.name]})"
            kind = _type_name(setting.type)
            lines.append(f"  --{setting.name}  {kind}, {value}: {setting.meaning}")
    return "\n".join(lines)
