"""
Weights in other formats: each format's reader and writer stand side by side.

A model in such a format is a folder with config.json and model.safetensors. The model_type in
config.json names the format; FORMATS has them all. A reader turns settings and tensors into the
arguments of GPTConfig and a state dict; a writer does the opposite.

A config.json may hold anything. A reader compares its sizes with the tensors that are there before
it computes with them, and no size from a config.json is ever allocated.
"""

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model import GPT, GPTConfig
from nanomla.bpe import gpt2_tables
from nanomla.checkpoint import BEST, LATEST, TOKENIZER, Checkpoint, find, is_mask_buffer, load
from nanomla.checks import brief
from nanomla.errors import UserError
from nanomla.files import one_line, read_json, require_file
from nanomla.tokenizer import (
    BYTE_LETTERS,
    HF_TOKENIZER,
    Tokenizer,
    check_spec,
    end_of_text,
    read_hf,
    start_of_text,
)

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
HF_TOKENIZER_CONFIG = "tokenizer_config.json"
EXPORT_FILES = {
    CONFIG, WEIGHTS, CARD, TOKENIZER, HF_TOKENIZER, HF_TOKENIZER_CONFIG,
    "vocab.json", "merges.txt",  # of exports by earlier versions
}  # fmt: skip
MARK = {"exported_by": "nanoMLA"}  # in the config.json of every export
# Without these, transformers takes the ids of the original models' tokenizers.
NO_END = {"bos_token_id": None, "eos_token_id": None}
MOST_PIECES = 1000  # files of weights that an index may list
PRETRAINED = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")


def open_weights(name: str | Path, prefer_best: bool = False, verify: bool = True) -> Checkpoint:
    """
    Read what --init_from names: a checkpoint file, a run's folder, one of PRETRAINED, or a folder
    in one of the formats of this file.

    prefer_best: read best.pt rather than ckpt.pt of a run's folder.
    verify: see nanomla.checkpoint.load; other formats have no checksums.
    A name in PRETRAINED never means a folder; write ./gpt2 for a folder called gpt2.
    Raises UserError if there is nothing of that name or it cannot be read.
    """
    path = Path(name)
    if os.path.isfile(path):
        return load(path, verify)
    if name in PRETRAINED or any(os.path.exists(path / file) for file in (CONFIG, WEIGHTS)):
        return read_pretrained(name)
    if any(os.path.exists(path / file) for file in (LATEST, BEST)):
        return load(find(path, prefer_best), verify)
    what = "no such file or folder"
    if os.path.isdir(path):
        what = f"it holds neither {LATEST}, {BEST} nor {CONFIG}"
    known = ", ".join(PRETRAINED)
    raise UserError(f"no checkpoint in {name}: {what}, and it is none of {known}")


def read_pretrained(name_or_folder: str | Path) -> Checkpoint:
    """
    Read one of PRETRAINED, from the Hugging Face hub or its cache, or a folder of weights.

    The checkpoint has model, model_args and tokenizer (None if the folder has none). Pickles are
    not read. Raises UserError naming the file that is missing, damaged or of another kind of model.
    """
    known = name_or_folder in PRETRAINED
    folder = _download(str(name_or_folder)) if known else Path(name_or_folder)
    settings = read_json(folder / CONFIG)
    kind = settings.get("model_type")
    readers = {name: form.read for own, form in FORMATS.items() for name in (own, *form.also)}
    if not isinstance(kind, str) or kind not in readers:
        can = ", ".join(readers)
        raise UserError(f"{folder / CONFIG}: model_type {brief(kind)} cannot be read, only {can}")
    tensors = _read_tensors(folder)
    try:
        if settings.get("quantization_config") is not None:
            raise ValueError("quantization_config: quantised weights cannot be read")
        args, state = readers[kind](settings, tensors)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise UserError(f"{folder / CONFIG}: {one_line(error)}") from None
    spec = _read_tokenizer(folder, settings)
    return Checkpoint(state, args, tokenizer=spec, source=str(name_or_folder))


# --------------------------------------------------------------------------------------------------
# What the formats share


@dataclass(frozen=True)
class Format:
    """How models are read from and written in one format."""

    has: str  # what a model in this format has
    fields: dict[str, Callable[[GPTConfig], bool]] | None  # see in_the_way; None: any model
    read: Callable[[dict[str, Any], dict[str, Tensor]], tuple[dict[str, Any], dict[str, Tensor]]]
    write: Callable[[GPT], tuple[dict[str, Any], dict[str, Tensor]]]
    also: tuple[str, ...] = ()  # other model types that it can read


def in_the_way(config: GPTConfig, kind: str) -> list[str]:
    """
    The settings, as name=value, that keep a model from being written in this format.

    A format's `fields` say for names of GPTConfig what a model can have. A field that is not listed
    must have its default value. So a setting that is added to GPTConfig later cannot get lost in an
    export.
    """
    fields = FORMATS[kind].fields
    if fields is None:
        return []
    bad = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        works = fields.get(field.name, only(field.name, field.default))
        if not works(config):
            bad.append(f"{field.name}={value!r}")
    return bad


def fitting_format(config: GPTConfig) -> tuple[str, str]:
    """The format to export this model in, and why, in a few words."""
    ways = {kind: in_the_way(config, kind) for kind, form in FORMATS.items() if form.fields}
    for kind, settings in ways.items():
        if not settings:
            return kind, FORMATS[kind].has
    lacks = [f"{kind} has no {', '.join(settings)}" for kind, settings in ways.items()]
    return "nanomla", "; ".join(lacks)


def anything(_: GPTConfig) -> bool:
    return True


def only(name: str, value: Any) -> Callable[[GPTConfig], bool]:
    return lambda config: getattr(config, name) == value


def _whole(settings: dict[str, Any], name: str, least: int = 1) -> int:
    """A size in config.json. Raises ValueError if it is missing or no whole number."""
    if name not in settings:
        raise ValueError(f"{name} is missing")
    value = settings[name]
    if type(value) is not int or value < least:
        raise ValueError(f"{name}={brief(value)} must be a whole number of at least {least}")
    return value


def _number(settings: dict[str, Any], name: str, default: float) -> float:
    value = settings.get(name, default)
    if type(value) not in (int, float) or not 0 < value < float("inf"):
        raise ValueError(f"{name}={brief(value)} must be a number above 0")
    return float(value)


def _flag(settings: dict[str, Any], name: str, default: bool = False) -> bool:
    value = settings.get(name, default)
    if not isinstance(value, bool):
        raise TypeError(f"{name}={brief(value)} must be true or false")
    return value


def _only(settings: dict[str, Any], name: str, *works: Any, default: Any) -> None:
    """Raise ValueError if a setting of config.json has a value that this model cannot have."""
    value = settings.get(name, default)
    if not any(type(value) is type(w) and value == w for w in works):
        known = " or ".join(map(repr, works))
        raise ValueError(f"{name}={brief(value)} is not supported, only {known}")


# --------------------------------------------------------------------------------------------------
# Our own export: GPTConfig's fields, and the weights under their own names


def read_nanomla(
    settings: dict[str, Any], tensors: dict[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """
    The arguments of GPTConfig in config.json, and the tensors as they are.

    Raises ValueError for a size that is missing or no whole number.
    """
    for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
        _whole(settings, name)
    return {name: v for name, v in settings.items() if name not in ("model_type", *MARK)}, tensors


def as_nanomla(model: GPT) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and the tensors of any model; tied and shared weights are stored once."""
    tensors = {name: p.detach().contiguous() for name, p in model.named_parameters()}
    settings = dataclasses.asdict(model.config)
    if settings["attention"] is None:  # as it is wherever the flags say which
        del settings["attention"]
    return {"model_type": "nanomla", **MARK, **settings}, tensors


# --------------------------------------------------------------------------------------------------
# GPT-2, as transformers' GPT2LMHeadModel stores it

GPT2_SHAPE = {  # GPT-2's name: ours and GPT-2's default
    "n_positions": ("block_size", 1024),
    "vocab_size": ("vocab_size", 50257),
    "n_layer": ("n_layer", 12),
    "n_head": ("n_head", 12),
    "n_embd": ("n_embd", 768),
}
GPT2_GELU = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "exact"}
GPT2_ONLY = {  # the one value that model.py computes; it is also GPT-2's default
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}
GPT2_TRANSPOSED = (  # stored as (in, out)
    "attn.c_attn.weight",
    "attn.c_proj.weight",
    "mlp.c_fc.weight",
    "mlp.c_proj.weight",
)

WITHOUT_MLA = (  # they have no effect without use_mla
    "mla_latent_dim", "mla_groups", "mla_rope_dim", "mla_nope_dim", "mla_rope", "mla_q_latent_dim",
    "mla_norm", "mla_share_latent",
)  # fmt: skip
IDLE = ("svd_rank", "svd_method", "n_latent_tokens")  # without use_svd and use_latent_tokens
SIZES = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "mlp_hidden")
GPT2_FIELDS = {
    **dict.fromkeys((*SIZES, "norm_eps", "tie_weights"), anything),
    **dict.fromkeys(("dropout", "gelu"), anything),  # these too are in GPT-2's config.json
    "bias": anything,  # GPT-2 always has biases; a model without them gets zeros
    "n_kv_head": lambda config: config.nkv == config.n_head,
    "head_dim": lambda config: config.hs * config.n_head == config.n_embd,
    "attention": lambda config: config.attention in (None, "mha"),
    **dict.fromkeys(("rope_theta", "rope_freqs", *WITHOUT_MLA, *IDLE), anything),
}


def read_gpt2(
    settings: dict[str, Any], tensors: dict[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """
    transformers' GPT2Config as arguments of GPTConfig, and its tensors as a state dict.

    Raises ValueError for a value that this model cannot have.
    """
    for name, value in GPT2_ONLY.items():
        _only(settings, name, value, default=value)
    _only(settings, "activation_function", *GPT2_GELU, default="gelu_new")
    args = {
        ours: _whole({name: default} | settings, name)
        for name, (ours, default) in GPT2_SHAPE.items()
    }
    if settings.get("n_inner") is not None:
        args["mlp_hidden"] = _whole(settings, "n_inner")
    args["norm_eps"] = _number(settings, "layer_norm_epsilon", 1e-5)
    args["tie_weights"] = _flag(settings, "tie_word_embeddings", True)
    args["gelu"] = GPT2_GELU[settings.get("activation_function", "gelu_new")]
    return {**args, "bias": True}, gpt2_state(tensors)


def gpt2_state(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names as in this model, and linear weights as (out, in)."""
    state = {}
    for name, tensor in tensors.items():
        if not name.startswith(("transformer.", "lm_head.")):  # the base model has no such prefix
            name = "transformer." + name
        stored_transposed = name.endswith(GPT2_TRANSPOSED) and tensor.dim() == 2
        state[name] = tensor.t() if stored_transposed else tensor
    return state


def as_gpt2(model: GPT) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and the tensors of a GPT2LMHeadModel, for a model with nothing in_the_way."""
    config, tensors = model.config, {}
    for name, p in model.named_parameters():
        p = p.detach()
        tensors[name] = (p.t() if name.endswith(GPT2_TRANSPOSED) else p).contiguous()
        if not config.bias and not any(part in name for part in (".wte.", ".wpe.", "lm_head.")):
            tensors[name.replace(".weight", ".bias")] = torch.zeros(p.size(0), dtype=p.dtype)
    settings = {
        "model_type": "gpt2",
        **MARK,
        "architectures": ["GPT2LMHeadModel"],
        "activation_function": {"tanh": "gelu_new", "exact": "gelu"}[config.gelu],
        **{name: getattr(config, ours) for name, (ours, _) in GPT2_SHAPE.items()},
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), config.dropout),
        "n_inner": config.mlp_hidden,
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tie_weights,
        **NO_END,
    }
    return settings, tensors


# --------------------------------------------------------------------------------------------------
# Llama, as transformers' LlamaForCausalLM stores it; Mistral and Qwen2 can be read where they are
# the same function

BLOCK = {  # the modules of a block: ours, and as Llama and DeepSeek-V3 name them
    "ln_1": "input_layernorm",
    "attn.c_proj": "self_attn.o_proj",
    "ln_2": "post_attention_layernorm",
    "mlp.c_gate": "mlp.gate_proj",
    "mlp.c_fc": "mlp.up_proj",
    "mlp.c_proj": "mlp.down_proj",
}
LLAMA_BLOCK = BLOCK | {f"attn.{part}": f"self_attn.{part}_proj" for part in "qkv"}  # of c_attn
TRUNK = {"transformer.wte": "model.embed_tokens", "transformer.ln_f": "model.norm"}

ROPE_BLOCK = {  # what Llama and DeepSeek-V3 can have
    **dict.fromkeys((*SIZES, "dropout", "norm_eps", "tie_weights", "rope_theta"), anything),
    "norm": only("norm", "rmsnorm"),
    "mlp": only("mlp", "swiglu"),
    "gelu": anything,  # without effect with swiglu
    "pos_emb": only("pos_emb", "rope"),
    **dict.fromkeys(IDLE, anything),
}
LLAMA_FIELDS = {
    **ROPE_BLOCK,
    "bias": anything,
    "n_kv_head": anything,
    # transformers' LlamaConfig wants this of the width, also where head_dim is given.
    "head_dim": lambda config: config.n_embd % config.n_head == 0,
    "attention": lambda config: config.attention in (None, "mha"),
    **dict.fromkeys(WITHOUT_MLA, anything),
}


def read_llama(
    settings: dict[str, Any], tensors: dict[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """
    The settings of LlamaConfig, MistralConfig or Qwen2Config as arguments of GPTConfig, and the
    tensors as a state dict. If any linear map has a bias, the others get one of zeros.

    Raises ValueError naming a setting that this model cannot have, or a size that is not that of
    the tensors.
    """
    kind = settings["model_type"]
    _refuse_windows(settings)
    args = _rope_block_args(settings)
    nh, C = args["n_head"], args["n_embd"]
    nkv = nh  # what null means; of the others, only Llama's config may leave it out
    if settings.get("num_key_value_heads", None if kind == "llama" else 0) is not None:
        nkv = _whole(settings, "num_key_value_heads")
    if settings.get("head_dim") is not None:
        args["head_dim"] = _whole(settings, "head_dim")
    elif C % nh:
        problem = f"hidden_size={C} is no multiple of num_attention_heads={nh}"
        raise ValueError(f"{problem}, and head_dim is missing")
    biases = ("attn.c_attn",) if kind == "qwen2" else ()
    if kind == "llama" and _flag(settings, "attention_bias"):
        biases = ("attn.c_attn", "attn.c_proj")
    if kind == "llama" and _flag(settings, "mlp_bias"):
        biases += ("mlp.c_gate", "mlp.c_fc", "mlp.c_proj")
    args |= {"n_kv_head": nkv, "bias": bool(biases)}
    config, state = GPTConfig(**args), _our_names(settings, tensors, LLAMA_BLOCK)
    rows = {"q": nh * config.hs, "k": nkv * config.hs, "v": nkv * config.hs}
    for first in [name for name in state if ".attn.q." in name]:
        names = {part: first.replace(".attn.q.", f".attn.{part}.") for part in rows}
        parts = [_take(state, name, (rows[p], C), LLAMA_BLOCK) for p, name in names.items()]
        state[first.replace(".attn.q.", ".attn.c_attn.")] = torch.cat(parts)
    if biases:
        linear = {"attn.c_attn", "attn.c_proj", "mlp.c_gate", "mlp.c_fc", "mlp.c_proj"}
        _add_zero_biases(state, linear - set(biases))
    return args, state


def as_llama(model: GPT) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and the tensors of a LlamaForCausalLM, for a model with nothing in_the_way."""
    config, state = model.config, {}
    rows = [config.n_head * config.hs, config.nkv * config.hs, config.nkv * config.hs]
    for name, p in model.named_parameters():
        if ".attn.c_attn." in name:
            for part, tensor in zip("qkv", p.detach().split(rows), strict=True):
                state[name.replace("c_attn", part)] = tensor
        else:
            state[name] = p.detach()
    settings = {
        "model_type": "llama",
        **MARK,
        "architectures": ["LlamaForCausalLM"],
        **_rope_block_settings(config),
        "num_key_value_heads": config.nkv,
        "head_dim": config.hs,
        "attention_bias": config.bias,
        "mlp_bias": config.bias,
    }
    return settings, _their_names(state, LLAMA_BLOCK)


def _refuse_windows(settings: dict[str, Any]) -> None:
    """Raise ValueError unless every token can attend to all earlier ones."""
    kind = settings["model_type"]
    if kind == "mistral":  # a missing value means 4096
        _only(settings, "sliding_window", None, default=4096)
    elif kind == "qwen2":
        _only(settings, "use_sliding_window", False, default=False)
    layers = settings.get("layer_types")
    if layers is not None:
        full = isinstance(layers, list) and all(layer == "full_attention" for layer in layers)
        if not full:
            problem = "is not supported, only full_attention in every layer"
            raise ValueError(f"layer_types={brief(layers)} {problem}")


def _rope_block_args(settings: dict[str, Any]) -> dict[str, Any]:
    """What Llama's and DeepSeek-V3's settings have in common, as arguments of GPTConfig."""
    _only(settings, "hidden_act", "silu", default="silu")
    return {
        "block_size": _whole(settings, "max_position_embeddings"),
        "vocab_size": _whole(settings, "vocab_size"),
        "n_layer": _whole(settings, "num_hidden_layers"),
        "n_head": _whole(settings, "num_attention_heads"),
        "n_embd": _whole(settings, "hidden_size"),
        "mlp": "swiglu",
        "mlp_hidden": _whole(settings, "intermediate_size"),
        "norm": "rmsnorm",
        "norm_eps": _number(settings, "rms_norm_eps", 1e-6),
        "tie_weights": _flag(settings, "tie_word_embeddings"),
        "pos_emb": "rope",
        "rope_theta": _rope_theta(settings),
    }


def _rope_block_settings(config: GPTConfig) -> dict[str, Any]:
    """The same settings of a GPTConfig under their names."""
    return {
        "max_position_embeddings": config.block_size,
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "hidden_size": config.n_embd,
        "hidden_act": "silu",
        "intermediate_size": config.hidden,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_weights,
        "attention_dropout": config.dropout,
        "rope_theta": config.rope_theta,  # where engines and transformers before 5 look for it
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        **NO_END,
    }


def _rope_theta(settings: dict[str, Any]) -> float:
    """
    The rotary base. transformers 5 keeps it in rope_parameters, older versions beside rope_scaling.

    Raises ValueError for scaled or partial rotations.
    """
    found = {"rope_theta": settings.get("rope_theta", 10000.0)}
    for name in ("rope_scaling", "rope_parameters"):
        values = settings.get(name)
        if values is None:
            continue
        if not isinstance(values, dict):
            raise TypeError(f"{name}={brief(values)} is not supported, only null or an object")
        kind = values.get("rope_type", values.get("type", "default"))
        known = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
        if kind != "default" or values.keys() - known:
            problem = "is not supported: this model's rotation is not scaled, only type 'default'"
            raise ValueError(f"{name}={brief(values)} {problem}")
        found |= values
    part = found.get("partial_rotary_factor", settings.get("partial_rotary_factor"))
    if part not in (None, 1.0):
        raise ValueError(f"partial_rotary_factor={brief(part)} is not supported, only 1.0")
    return _number(found, "rope_theta", 10000.0)


def _our_names(
    settings: dict[str, Any], tensors: dict[str, Tensor], block: dict[str, str]
) -> dict[str, Tensor]:
    """
    Tensors of Llama or DeepSeek-V3 under our names; names that are not known stay as they are.

    Raises ValueError if the number of layers, of tokens or the width is not that in config.json.
    """
    modules, state = {theirs: ours for ours, theirs in block.items()}, {}
    trunk = {theirs: ours for ours, theirs in TRUNK.items()}
    for name, tensor in tensors.items():
        if name.endswith(".rotary_emb.inv_freq"):  # a buffer in old files, computed from rope_theta
            continue
        full = name if name.startswith(("model.", "lm_head.")) else f"model.{name}"  # a base model
        module, _, kind = full.rpartition(".")
        if found := re.fullmatch(r"model\.layers\.([0-9]+)\.(.+)", module):
            layer, inner = found.groups()
            state[f"transformer.h.{layer}.{modules.get(inner, inner)}.{kind}"] = tensor
        else:
            state[f"{trunk.get(module, module)}.{kind}"] = tensor
    has = len({name.split(".")[2] for name in state if name.startswith("transformer.h.")})
    if has != settings["num_hidden_layers"]:
        wrong = f"num_hidden_layers={settings['num_hidden_layers']}"
        raise ValueError(f"{wrong}, but there are weights of {has} layers")
    if "transformer.wte.weight" in state:
        shape, wants = tuple(state["transformer.wte.weight"].shape), ("vocab_size", "hidden_size")
        if shape != tuple(settings[name] for name in wants):
            said = " and ".join(f"{name}={settings[name]}" for name in wants)
            raise ValueError(f"{said}, but embed_tokens.weight has shape {shape}")
    return state


def _their_names(state: dict[str, Tensor], block: dict[str, str]) -> dict[str, Tensor]:
    """The inverse of _our_names."""
    return {_their_name(name, block): tensor.contiguous() for name, tensor in state.items()}


def _their_name(name: str, block: dict[str, str]) -> str:
    module, _, kind = name.rpartition(".")
    if found := re.fullmatch(r"transformer\.h\.([0-9]+)\.(.+)", module):
        module = f"model.layers.{found[1]}.{block[found[2]]}"
    return f"{TRUNK.get(module, module)}.{kind}"


def _take(
    state: dict[str, Tensor], name: str, shape: tuple[int, int], block: dict[str, str]
) -> Tensor:
    """
    Take the weight of a linear map, or its bias, out of a state dict.

    Raises ValueError if a weight does not have this shape, a bias so many rows.
    """
    if name not in state:
        raise ValueError(f"there is no {_their_name(name, block)}")
    tensor, (rows, width) = state.pop(name), shape
    if tensor.shape != (shape if name.endswith(".weight") else shape[:1]):
        has = f"{_their_name(name, block)} has shape {tuple(tensor.shape)}"
        raise ValueError(f"{has}, by the settings it must have {rows} rows (a weight: of {width})")
    return tensor


def _add_zero_biases(state: dict[str, Tensor], modules: set[str]) -> None:
    """Biases of zeros for these modules of every block: here all linear maps have one, or none."""
    for name, weight in list(state.items()):
        module, _, kind = name.rpartition(".")
        if kind == "weight" and weight.dim() == 2 and module.endswith(tuple(modules)):
            state[f"{module}.bias"] = weight.new_zeros(weight.size(0))


# --------------------------------------------------------------------------------------------------
# DeepSeek-V3, as transformers' DeepseekV3ForCausalLM stores it, with dense layers only

DEEPSEEK_BLOCK = BLOCK | {
    "attn.q_proj": "self_attn.q_proj",
    "attn.q_latent_proj": "self_attn.q_a_proj",
    "attn.q_latent_norm": "self_attn.q_a_layernorm",
    "attn.q_expand": "self_attn.q_b_proj",
    "attn.kv_latent_proj": "self_attn.kv_a_proj_with_mqa",
    "attn.latent_norm": "self_attn.kv_a_layernorm",
    "attn.kv_expand": "self_attn.kv_b_proj",  # per head, k_expand's rows and then v_expand's
}
DEEPSEEK_FIELDS = {
    **ROPE_BLOCK,
    "bias": only("bias", False),
    "n_kv_head": anything,  # without effect with use_mla
    "attention": lambda config: config.attention in (None, "mla"),
    "head_dim": anything,
    "use_mla": only("use_mla", True),
    **dict.fromkeys(("mla_nope_dim", "mla_q_latent_dim"), anything),
    "mla_latent_dim": lambda config: isinstance(config.mla_latent_dim, int),  # of all layers
    "mla_rope_dim": lambda config: bool(config.mla_rope_dim),
}


def read_deepseek(
    settings: dict[str, Any], tensors: dict[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """
    The settings of DeepseekV3Config as arguments of GPTConfig, and the tensors as a state dict.

    DeepSeek stores the numbers that rotate together side by side (rope_interleave, its default);
    here they are r / 2 apart. So the rotary rows are put in another order.
    Raises ValueError naming a setting that this model cannot have, or a size that is not that of
    the tensors.
    """
    _refuse_windows(settings)
    args = _rope_block_args(settings)
    layers, dense = args["n_layer"], settings.get("first_k_dense_replace", 3)
    if type(dense) is not int or dense < layers:
        problem = f"first_k_dense_replace={brief(dense)} with num_hidden_layers={layers}"
        raise ValueError(f"{problem}: mixtures of experts are not supported, only dense layers")
    nh = args["n_head"]
    if settings.get("num_key_value_heads") is not None:
        _only(settings, "num_key_value_heads", nh, default=nh)
    interleaved = settings.get("rope_interleave", True) is not None
    interleaved = interleaved and _flag(settings, "rope_interleave", True)
    biases = ("attn.kv_latent_proj", "attn.c_proj") if _flag(settings, "attention_bias") else ()
    if "q_lora_rank" not in settings:
        raise ValueError("q_lora_rank is missing")
    if settings["q_lora_rank"] is not None:
        args["mla_q_latent_dim"] = _whole(settings, "q_lora_rank")
        if biases:
            raise ValueError("attention_bias=True with a q_lora_rank is not supported, only False")
    args |= {
        "bias": bool(biases),
        "use_mla": True,
        "mla_latent_dim": (L := _whole(settings, "kv_lora_rank")),
        "mla_rope_dim": (r := _whole(settings, "qk_rope_head_dim")),
        "mla_nope_dim": (nope := _whole(settings, "qk_nope_head_dim")),
        "head_dim": (hs := _whole(settings, "v_head_dim")),
    }
    GPTConfig(**args)  # checks the sizes against each other
    state = _our_names(settings, tensors, DEEPSEEK_BLOCK)
    for name in list(state):
        if name.endswith(".attn.kv_expand.weight"):
            both = _take(state, name, (nh * (nope + hs), L), DEEPSEEK_BLOCK)
            both = both.unflatten(0, (nh, nope + hs))
            for part, rows in (("k", both[:, :nope]), ("v", both[:, nope:])):
                state[name.replace("kv_expand", f"{part}_expand")] = rows.flatten(0, 1)
        elif name.endswith((".attn.q_proj.weight", ".attn.q_expand.weight")):
            width = args["n_embd"] if ".q_proj." in name else args.get("mla_q_latent_dim", 0)
            rows = _take(state, name, (nh * (nope + r), width), DEEPSEEK_BLOCK)
            state[name] = _reorder(rows, nh, r, (r // 2, 2)) if interleaved else rows
        elif ".attn.kv_latent_proj." in name:
            rows = _take(state, name, (L + r, args["n_embd"]), DEEPSEEK_BLOCK)
            state[name] = _reorder(rows, 1, r, (r // 2, 2)) if interleaved else rows
    if biases:
        _add_zero_biases(state, {"attn.q_proj", "mlp.c_gate", "mlp.c_fc", "mlp.c_proj"})
    return args, state


def as_deepseek(model: GPT) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """
    config.json and the tensors of a DeepseekV3ForCausalLM, for a model with nothing in_the_way.

    The rotary rows are interleaved, as DeepSeek's own are: that order is the default, and engines
    that do not read rope_interleave take it for granted.
    """
    config, state = model.config, {}
    nh, r = config.n_head, config.mla_rope_dim
    for name, p in model.named_parameters():
        p = p.detach()
        if ".attn.k_expand." in name:
            values = model.get_parameter(name.replace("k_expand", "v_expand")).detach()
            heads = [rows.unflatten(0, (nh, -1)) for rows in (p, values)]
            state[name.replace("k_expand", "kv_expand")] = torch.cat(heads, dim=1).flatten(0, 1)
        elif name.endswith((".attn.q_proj.weight", ".attn.q_expand.weight")):
            state[name] = _reorder(p, nh, r, (2, r // 2))
        elif ".attn.kv_latent_proj." in name:
            state[name] = _reorder(p, 1, r, (2, r // 2))
        elif ".attn.v_expand." not in name:
            state[name] = p
    settings = {
        "model_type": "deepseek_v3",
        **MARK,
        "architectures": ["DeepseekV3ForCausalLM"],
        **_rope_block_settings(config),
        "num_key_value_heads": nh,
        "kv_lora_rank": config.mla_latent_dim,
        "q_lora_rank": config.mla_q_latent_dim,
        "qk_rope_head_dim": r,
        "qk_nope_head_dim": config.nope,
        "v_head_dim": config.hs,
        "rope_interleave": True,
        "attention_bias": False,
        "first_k_dense_replace": config.n_layer,  # every layer is dense
        "num_nextn_predict_layers": 0,
    }
    return settings, _their_names(state, DEEPSEEK_BLOCK)


def _reorder(rows: Tensor, heads: int, r: int, grid: tuple[int, int]) -> Tensor:
    """
    Rows (heads * width, ...) with the last r of every head in another order: written into a grid
    row by row and read column by column. (r / 2, 2) takes interleaved pairs to halves, (2, r / 2)
    halves to pairs.
    """
    rows = rows.unflatten(0, (heads, -1))
    content, rotary = rows.split([rows.size(1) - r, r], dim=1)
    rotary = rotary.unflatten(1, grid).transpose(1, 2).flatten(1, 2)
    return torch.cat([content, rotary], dim=1).flatten(0, 1)


# --------------------------------------------------------------------------------------------------
# All formats: an export is written in the first that fits

FORMATS = {
    "gpt2": Format("learned positions, LayerNorm, GELU", GPT2_FIELDS, read_gpt2, as_gpt2),
    "llama": Format(
        "rotary positions, RMSNorm, SwiGLU",
        LLAMA_FIELDS,
        read_llama,
        as_llama,
        ("mistral", "qwen2"),
    ),
    "deepseek_v3": Format(
        "MLA with a decoupled rotary key, RMSNorm, SwiGLU",
        DEEPSEEK_FIELDS,
        read_deepseek,
        as_deepseek,
    ),
    "nanomla": Format("every setting of this project", None, read_nanomla, as_nanomla),
}


# --------------------------------------------------------------------------------------------------
# Tokenizers: ours in nanomla_tokenizer.json, and for transformers in tokenizer.json


def _read_tokenizer(folder: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The spec of a folder's tokenizer, or None if it has none."""
    own, path = folder / TOKENIZER, folder / HF_TOKENIZER
    if own.exists():
        path, spec = own, read_json(own)
    elif path.exists():
        spec = read_hf(path, settings)
    else:
        return None
    check_spec(spec, str(path))
    return spec


def tokenizer_files(spec: dict[str, Any]) -> dict[str, str]:
    """
    The content of the files, by name, that transformers' AutoTokenizer reads a tokenizer from.

    They have the same ids, and the same text for them. Raises UserError if there is no such file
    for this tokenizer, or if what it needs is not on this machine.
    """
    opened = Tokenizer(spec).hf if spec.get("kind") == "hf" else _as_hf(spec)
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    ids = {"bos_token": start_of_text(spec), "eos_token": end_of_text(spec)}
    for name, token in ids.items():
        text = None if token is None else opened.id_to_token(token)
        about |= {} if text is None else {name: text}
    text = spec["json"] if spec.get("kind") == "hf" else opened.to_str(pretty=True)
    return {HF_TOKENIZER: text, HF_TOKENIZER_CONFIG: as_json(about)}


def _as_hf(spec: dict[str, Any]) -> Any:
    """
    A tokenizer of Hugging Face with the ids of ours. Its single tokens are characters, which it
    must not read as bytes, or bytes in the letters of byte-level BPE.
    """
    try:
        from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
        from tokenizers import Tokenizer as HF
    except ImportError:
        raise UserError("it needs Hugging Face tokenizers: pip install tokenizers") from None
    if spec["kind"] == "char":
        try:
            spec["chars"].encode("utf-8")
        except UnicodeEncodeError as error:
            bad = spec["chars"][error.start]
            raise UserError(f"its character {bad!r} has no form in UTF-8") from None
        ids = {c: i for i, c in enumerate(spec["chars"])}
        made = HF(models.WordLevel(ids, unk_token="<unk>"))  # which is no token: an error
        made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        made.decoder = decoders.Fuse()
        return made
    if spec["kind"] == "byte":
        ids, merges = {letter: b for b, letter in enumerate(BYTE_LETTERS)}, []
    elif spec["name"] == "gpt2":
        ids, merges = gpt2_tables()
    else:
        raise UserError(f"there is no list of {spec['name']}'s merges")
    made = HF(models.BPE(ids, merges))
    words = spec["kind"] != "byte"  # GPT-2's regular expression cuts a text into words
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words)
    made.decoder = decoders.ByteLevel()
    if words:
        made.add_special_tokens([AddedToken("<|endoftext|>", normalized=False)])
    return made


# --------------------------------------------------------------------------------------------------
# Folders: config.json and tensors as safetensors


def check_target(folder: Path) -> None:
    """Raise UserError if --to names a folder with anything but an earlier export in it."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"--to={folder} is a file; name a folder")
    names = {path.name for path in folder.iterdir()}
    if not names:
        return
    try:
        exported = read_json(folder / CONFIG).items() >= MARK.items()
    except UserError:
        exported = False
    if not exported or names - EXPORT_FILES:
        remedy = "name a new or an empty folder"
        raise UserError(f"--to={folder} holds other files than an export's; {remedy}")


def as_json(value: dict[str, Any]) -> str:
    """The text of a .json file."""
    return json.dumps(value, indent=2) + "\n"


def write_folder(folder: Path, tensors: dict[str, Tensor], texts: dict[str, str]) -> None:
    """
    Write tensors and texts (content by file name) as a folder, whole or not at all.

    An earlier export in that place is replaced. Raises UserError, with nothing changed, if the
    folder cannot be written.
    """
    try:
        from safetensors import SafetensorError
        from safetensors.torch import save_file
    except ImportError:
        raise UserError("exporting needs safetensors: pip install safetensors") from None
    folder = folder.resolve()
    tmp = folder.with_name(f".{folder.name}.new-{os.getpid()}")
    old = folder.with_name(f".{folder.name}.old-{os.getpid()}")
    try:
        tmp.mkdir(parents=True)
        for name, text in texts.items():
            (tmp / name).write_text(text, encoding="utf-8")
        save_file(tensors, tmp / WEIGHTS, metadata={"format": "pt"})  # transformers requires this
        mode = (tmp / CONFIG).stat().st_mode
        for path in tmp.iterdir():
            path.chmod(mode)  # safetensors makes its file readable by the owner alone
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        if folder.exists():
            folder.rename(old)
        tmp.rename(folder)
    except (OSError, SafetensorError) as error:
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise UserError(f"nothing exported to {folder}: {error}") from None
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _download(name: str) -> Path:
    """
    The folder in Hugging Face's cache with config.json and the weights of a GPT-2, downloaded if
    they are not there. No other file is downloaded.
    """
    repository = f"openai-community/{name}"
    files = f"{CONFIG} and {WEIGHTS} of {repository}"
    remedy = f"download {files} elsewhere and give their folder: --init_from=FOLDER"
    try:
        import huggingface_hub
    except ImportError:
        install = "pip install huggingface_hub"
        raise UserError(f"fetching {name} needs huggingface_hub: {install}, or {remedy}") from None
    huggingface_hub.logging.set_verbosity_error()  # otherwise every retry prints a line
    try:
        paths = [huggingface_hub.hf_hub_download(repository, file) for file in (CONFIG, WEIGHTS)]
    except Exception as error:  # noqa: BLE001  network, proxy, disk and cache errors
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:150]}"
        problem = f"{name} cannot be had from the Hugging Face hub ({reason})"
        raise UserError(f"{problem}; {remedy}") from None
    return Path(paths[0]).parent


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors in a folder's model.safetensors, or in the pieces that its index lists."""
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise UserError(f"reading {folder} needs safetensors: pip install safetensors") from None
    index = folder / f"{WEIGHTS}.index.json"
    sharded = os.path.exists(index) and not os.path.exists(folder / WEIGHTS)
    files = _pieces(index) if sharded else [WEIGHTS]
    tensors = {}
    for file in files:
        try:
            require_file(folder / file)
            tensors |= load_file(folder / file)
        except FileNotFoundError:
            problem = f"{folder}: no {file} in this folder"
            if (folder / "pytorch_model.bin").exists():
                remedy = "save the model with safetensors"
                problem += f"; pytorch_model.bin is a pickle and not read, {remedy}"
            raise UserError(problem) from None
        except Exception as error:  # noqa: BLE001  damage causes errors of several kinds
            reason = one_line(error)[:100]
            raise UserError(f"{folder / file}: truncated or not safetensors ({reason})") from None
    for name, tensor in tensors.items():
        quantised = not tensor.is_floating_point() or tensor.element_size() < 2  # int8, float8
        if quantised and not is_mask_buffer(name):
            problem = f"{one_line(name)} is {tensor.dtype}; quantised weights cannot be read"
            raise UserError(f"{folder}: {problem}")
        if not tensor.numel():  # its other sizes may be anything
            raise UserError(f"{folder}: {one_line(name)} is empty")
    return tensors


def _pieces(index: Path) -> list[str]:
    """The files that an index lists. Raises UserError if they are not some beside it."""
    listed = read_json(index).get("weight_map")
    names = [*listed.values()] if isinstance(listed, dict) and listed else [None]
    for name in names:
        plain = isinstance(name, str) and Path(name).name == name and name.isprintable()
        if not plain or len(name) > 255:
            problem = f"weight_map names {brief(name)}, which is no file beside it"
            raise UserError(f"{index}: {problem}")
    if len(files := sorted(set(names))) > MOST_PIECES:
        raise UserError(f"{index}: weight_map names {len(files)} files, at most {MOST_PIECES} work")
    return files
