"""
Typed settings: dataclass defaults <- config files <- --key=value, later wins.

    python train.py config/train_mla.py config/mine.py --mla_latent_dim=32 --compile

A script declares its settings as one dataclass whose fields are written
`name: Annotated[type, "one line of meaning"] = default`. A config file is Python that assigns to those names.
Both files and flags go through the same type check, so a setting means the same wherever it is written.
"""

import ast
import dataclasses
import difflib
import math
import os
import signal
import sys
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

Config = TypeVar("Config")


class UserError(Exception):
    """Something the user can mend. Scripts print it as one line on stderr and exit with `status`."""

    status = 1


class UsageError(UserError):
    """A wrong flag, value or config file."""

    status = 2


def configure(
    config_class: type[Config], argv: Sequence[str], hints: dict[str, str] | None = None
) -> tuple[Config, dict[str, str]]:
    """
    Build a `config_class` from command-line arguments.

    argv: config files and `--key=value` in any order; a bare `--key` sets a bool to True; `--help` prints and exits.
    hints: what to say about keys that do not exist here but that people know from elsewhere.
    Returns the config and, for every key that was set, where it came from.
    Raises UsageError for an unknown key, a value of the wrong type, a missing or broken file.
    """
    types_, helps = _declared(config_class)
    hints = hints or {}
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    if "--help" in argv or "-h" in argv:
        print(_help_text(config_class, types_, helps))
        raise SystemExit(0)

    def assign(key: str, value: Any, where: str) -> None:
        if key not in types_:
            raise UsageError(f"{where}: unknown setting {key}{hints.get(key) or _nearest(key, types_)}")
        try:
            values[key] = _coerce(value, types_[key])
        except ValueError as error:
            raise UsageError(f"{where}: {key} {error}, not {value!r}") from None
        origins[key] = where

    for arg in argv:
        if not arg.startswith("-"):
            for key, value in _run_config_file(arg).items():
                assign(key, value, arg)
            continue
        key, equals, text = arg.removeprefix("--").partition("=")
        key = key.replace("-", "_")
        if not arg.startswith("--") or not key:
            raise UsageError(f"{arg}: expected a config file or --key=value; --help lists the keys")
        if equals:
            assign(key, _read_flag(text, types_.get(key)), arg)
        elif types_.get(key, bool) is bool:
            assign(key, True, arg)
        else:
            raise UsageError(f"{arg}: needs a value: {arg}=...")
    try:
        return config_class(**values), origins
    except ValueError as error:  # the dataclass checks itself in __post_init__
        raise UsageError(str(error)) from None


def describe(config: Any, origins: dict[str, str]) -> list[str]:
    """One line per setting that was set to something else than its default, with where it came from."""
    defaults = {f.name: f.default for f in dataclasses.fields(config)}
    return [
        f"{key} = {getattr(config, key)!r}  ({where})"
        for key, where in origins.items()
        if getattr(config, key) != defaults[key]
    ]


def run_script(main: Callable[[], None]) -> None:
    """Run a script's main(): a UserError becomes one line on stderr and its exit status, Ctrl-C exits with 130."""
    name = os.path.basename(sys.argv[0])
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        sys.exit(error.status)
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:  # the reader of our stdout went away, as in `sample.py | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)


def _declared(config_class: type) -> tuple[dict[str, Any], dict[str, str]]:
    hints = typing.get_type_hints(config_class, include_extras=True)
    types_, helps = {}, {}
    for field in dataclasses.fields(config_class):
        hint = hints[field.name]
        types_[field.name], helps[field.name] = hint, ""
        if typing.get_origin(hint) is typing.Annotated:
            types_[field.name], helps[field.name] = typing.get_args(hint)
    return types_, helps


def _run_config_file(path: str) -> dict[str, Any]:
    """The plain names a config file assigns. Modules, functions, classes and _private names are its own business."""
    try:
        with open(path, encoding="utf-8") as file:
            code = compile(file.read(), path, "exec")
        namespace: dict[str, Any] = {"__file__": path, "__name__": "config"}
        exec(code, namespace)  # noqa: S102  a config file is the user's own Python
    except OSError as error:
        raise UsageError(f"{path}: cannot read this config file ({error.strerror})") from None
    except SyntaxError as error:
        raise UsageError(f"{path}:{error.lineno}: not a Python config file ({error.msg})") from None
    except Exception as error:  # noqa: BLE001  it can raise anything
        raise UsageError(f"{path}: fails as Python ({type(error).__name__}: {error})") from None
    skip = (types.ModuleType, types.FunctionType, types.BuiltinFunctionType, type)
    return {k: v for k, v in namespace.items() if not k.startswith("_") and not isinstance(v, skip)}


def _read_flag(text: str, hint: Any) -> Any:
    """A flag's text as the Python value a config file would have held; text that is no literal stays text."""
    if _wants_text(hint):
        return None if text in ("None", "none") and _is_optional(hint) else text
    try:
        return ast.literal_eval({"true": "True", "false": "False", "none": "None"}.get(text, text))
    except (ValueError, SyntaxError, MemoryError):
        return text


def _coerce(value: Any, hint: Any) -> Any:
    """`value` as the declared type, or ValueError saying what is wanted."""
    if _is_optional(hint):
        return None if value is None else _coerce(value, _strip_optional(hint))
    if typing.get_origin(hint) is Literal:
        if value in typing.get_args(hint):
            return value
        raise ValueError("is one of " + ", ".join(map(str, typing.get_args(hint))))
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is bool and isinstance(value, bool):
        return value
    if hint is int and number and math.isfinite(value) and value == int(value):
        return int(value)
    if hint is float and number and math.isfinite(value):
        return float(value)
    if hint is str and isinstance(value, str):
        return value
    wanted = {bool: "is True or False", int: "is a whole number", float: "is a finite number", str: "is text"}
    raise ValueError(wanted[hint])


def _is_optional(hint: Any) -> bool:
    return type(None) in typing.get_args(hint)


def _strip_optional(hint: Any) -> Any:
    (inner,) = (a for a in typing.get_args(hint) if a is not type(None))
    return inner


def _wants_text(hint: Any) -> bool:
    inner = _strip_optional(hint) if _is_optional(hint) else hint
    return inner is str or (typing.get_origin(inner) is Literal)


def _nearest(key: str, known: dict[str, Any]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    return f"; did you mean {close[0]}?" if close else "; --help lists the keys"


def _type_name(hint: Any) -> str:
    if _is_optional(hint):
        return _type_name(_strip_optional(hint)) + " or None"
    if typing.get_origin(hint) is Literal:
        return "|".join(map(str, typing.get_args(hint)))
    return hint.__name__


def _help_text(config_class: type, types_: dict[str, Any], helps: dict[str, str]) -> str:
    script = os.path.basename(sys.argv[0])
    lines = [
        f"usage: python {script} [CONFIG.py ...] [--key=value ...]",
        "",
        (sys.modules[config_class.__module__].__doc__ or "").strip(),
        "",
        "settings (key, type, default: meaning):",
    ]
    for field in dataclasses.fields(config_class):
        lines.append(f"  --{field.name}  {_type_name(types_[field.name])}, {field.default!r}: {helps[field.name]}")
    return "\n".join(lines)
