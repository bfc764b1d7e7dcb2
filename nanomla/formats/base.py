"""What a format of weights has to provide, and what those of transformers share."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from model import GPT, GPTConfig
from nanomla.checks import brief

Settings = dict[str, Any]  # of a config.json, or the arguments of GPTConfig
Tensors = dict[str, Tensor]  # by their names in a file, or in a state dict
Fits = dict[str, Callable[[GPTConfig], bool]]  # by the names of GPTConfig's fields

MARK = {"exported_by": "nanoMLA"}  # in the config.json of every export
# Without these, transformers takes the ids of the original models' tokenizers.
NO_END = {"bos_token_id": None, "eos_token_id": None}


@dataclass(frozen=True)
class Format:
    """
    How models are read from one format and written in it.

    name: its model_type in config.json. also: others that `read` takes.
    has: what its models have, in a few words.
    read: config.json and tensors in, the arguments of GPTConfig and a state dict out. Raises
        KeyError for a setting or a tensor that is missing, ValueError naming what a model here
        cannot have.
    write: the opposite, for a model of which no setting is in the way; model_type is added later.
    fits: whether a model in this format can have a field's value. A field that is not listed must
        have its default. None: it can have any.
    """

    name: str
    has: str
    read: Callable[[Settings, Tensors], tuple[Settings, Tensors]]
    write: Callable[[GPT], tuple[Settings, Tensors]]
    fits: Fits | None
    also: tuple[str, ...] = ()


def anything(_: GPTConfig) -> bool:
    """For a field that the format has too, or that has no effect in its models."""
    return True


def only(name: str, value: Any) -> Callable[[GPTConfig], bool]:
    """For a field that must have this value."""
    return lambda config: getattr(config, name) == value


FREE = dict.fromkeys(  # what GPT-2, Llama and DeepSeek-V3 can all have, or do not use
    (
        "block_size", "vocab_size", "n_layer", "n_head", "n_embd", "mlp_hidden", "norm_eps",
        "tie_weights", "dropout", "gelu", "rope_theta", "svd_rank", "svd_method", "n_latent_tokens",
        "moe_active", "moe_shared", "moe_hidden", "moe_groups", "moe_active_groups", "moe_norm",
        "moe_scale", "moe_dense_layers",  # without effect unless there are moe_experts
    ),
    anything,
)
MLA_FIELDS = [field.name for field in fields(GPTConfig) if field.name.startswith("mla_")]
WITHOUT_MLA = dict.fromkeys(MLA_FIELDS, anything)


def require_value(settings: Settings, name: str, *allowed: Any) -> None:
    """Raise ValueError if a setting has a value that a model here cannot have."""
    if settings[name] not in allowed:
        choices = " or ".join(map(repr, allowed))
        raise ValueError(f"{name}={brief(settings[name])} is not supported, only {choices}")
