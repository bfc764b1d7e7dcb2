"""
Llama, as transformers' LlamaForCausalLM stores it, and what DeepSeek-V3 has in common with it.
Mistral and Qwen2 are read where they are the same function.
"""

import torch

from model import GPT, GPTConfig
from nanomla.checks import Count, brief, fits, require
from nanomla.formats.base import (
    FREE,
    NO_END,
    WITHOUT_MLA,
    Format,
    Settings,
    Tensors,
    anything,
    only,
    require_value,
)

# ---- What DeepSeek-V3 has too: settings

SHAPE = {  # Llama's name and ours
    "max_position_embeddings": "block_size",
    "vocab_size": "vocab_size",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "hidden_size": "n_embd",
}
SCALED_BY_FACTOR = ("default", "linear", "dynamic", "yarn", "llama3")  # rotations
DEFAULTS = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False}


def rotary_args(settings: Settings) -> Settings:
    """What the settings of Llama and DeepSeek-V3 have in common, as arguments of GPTConfig."""
    settings = {**DEFAULTS, **settings}
    require_value(settings, "hidden_act", "silu", "swish")  # two names of one function
    layers = settings.get("layer_types") or []
    unknown = set(layers) - {"full_attention", "sliding_attention"}
    if unknown:
        problem = "is not supported, only full_attention in every layer"
        raise ValueError(f"layer_types={brief(layers)} {problem}")
    if "sliding_attention" in layers:
        require_wide_window(settings)
    args = {ours: settings[theirs] for theirs, ours in SHAPE.items()}
    args["mlp"] = "swiglu"
    args["mlp_hidden"] = settings["intermediate_size"]
    args["norm"] = "rmsnorm"
    args["norm_eps"] = settings["rms_norm_eps"]
    args["tie_weights"] = settings["tie_word_embeddings"]
    args["pos_emb"] = "rope"
    args["rope_theta"] = _rope_theta(settings)
    return args


def require_wide_window(settings: Settings) -> None:
    """Raise ValueError for a sliding window through which a token does not see all before it."""
    window = settings["sliding_window"]
    context = settings["max_position_embeddings"]
    if not fits(window, Count) or window < context:
        problem = f"sliding_window={brief(window)} with max_position_embeddings={brief(context)}"
        remedy = "lower max_position_embeddings to the window, up to which it changes nothing"
        raise ValueError(f"{problem}: sliding windows are not supported; {remedy}")


def rotary_settings(config: GPTConfig) -> Settings:
    """The same settings of a GPTConfig under their names."""
    return {
        **{theirs: getattr(config, ours) for theirs, ours in SHAPE.items()},
        "hidden_act": "silu",
        "intermediate_size": config.hidden,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_weights,
        "attention_dropout": config.dropout,
        "rope_theta": config.rope_theta,  # where engines and transformers before 5 look for it
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        **NO_END,
    }


def _rope_theta(settings: Settings) -> float:
    """
    The rotary base. transformers 5 keeps it in rope_parameters, older versions beside rope_scaling.

    Raises ValueError for scaled or partial rotations, but a scale of 1 is none.
    """
    rotation = {
        "rope_theta": settings.get("rope_theta", 10000.0),
        "partial_rotary_factor": settings.get("partial_rotary_factor", 1.0),
    }
    name = "rope_parameters"
    if settings.get("rope_scaling"):  # transformers 5 then takes nothing of rope_parameters
        name = "rope_scaling"
    values = settings.get(name) or {}
    require(isinstance(values, dict), name, values, "an object or null")
    kind = values.get("rope_type", values.get("type", "default"))
    by_one = values.get("factor") == 1 and values.get("attention_factor") in (None, 1)
    if by_one and kind in SCALED_BY_FACTOR:  # what else is there has no effect then
        values = {key: value for key, value in values.items() if key in rotation}
        kind = "default"
    unknown = values.keys() - rotation.keys() - {"rope_type", "type"}
    if kind != "default" or unknown:
        problem = "this model's rotation is not scaled, only type 'default'"
        raise ValueError(f"{name}={brief(values)} is not supported: {problem}")
    rotation |= values
    require_value(rotation, "partial_rotary_factor", None, 1.0)
    return rotation["rope_theta"]


# ---- What DeepSeek-V3 has too: names and tensors

NAMES = {  # parts of tensors' names: ours, and those of Llama and DeepSeek-V3
    "transformer.wte.": "model.embed_tokens.",
    "transformer.h.": "model.layers.",
    "transformer.ln_f.": "model.norm.",
    ".ln_1.": ".input_layernorm.",
    ".attn.c_proj.": ".self_attn.o_proj.",
    ".ln_2.": ".post_attention_layernorm.",
    ".c_gate.": ".gate_proj.",  # of MLPs
    ".c_fc.": ".up_proj.",
    ".c_proj.": ".down_proj.",
}


def our_names(tensors: Tensors, names: dict[str, str]) -> Tensors:
    """Tensors of Llama or DeepSeek-V3 under our names; names that are not known stay."""
    state = {}
    for name, tensor in tensors.items():
        if name.endswith(".rotary_emb.inv_freq"):  # a buffer in old files, computed from rope_theta
            continue
        if not name.startswith(("model.", "lm_head.")):  # the base model has no such prefix
            name = f"model.{name}"
        for ours, theirs in names.items():
            name = name.replace(theirs, ours)
        state[name] = tensor
    return state


def their_names(state: Tensors, names: dict[str, str]) -> Tensors:
    """The inverse of our_names."""
    tensors = {}
    for name, tensor in state.items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        tensors[name] = tensor.contiguous()
    return tensors


def add_zero_biases(state: Tensors, modules: set[str]) -> None:
    """Biases of zeros for these modules of every block: here all linear maps have one, or none."""
    for name, weight in list(state.items()):
        module, _, kind = name.rpartition(".")
        if kind == "weight" and module.endswith(tuple(modules)):
            state[f"{module}.bias"] = weight.new_zeros(weight.size(0))


ROTARY_FITS = {
    **FREE,
    "norm": only("norm", "rmsnorm"),
    "mlp": only("mlp", "swiglu"),
    "pos_emb": only("pos_emb", "rope"),
}

# ---- Llama

LLAMA_NAMES = {  # c_attn is the last three
    **NAMES,
    ".attn.q.": ".self_attn.q_proj.",
    ".attn.k.": ".self_attn.k_proj.",
    ".attn.v.": ".self_attn.v_proj.",
}


def read(settings: Settings, tensors: Tensors) -> tuple[Settings, Tensors]:
    """
    LlamaConfig, MistralConfig or Qwen2Config as arguments of GPTConfig, and the tensors as a state
    dict. If any linear map has a bias, the others get one of zeros.
    """
    kind = settings["model_type"]
    biased = set()  # linear maps of every block
    if kind == "mistral":
        settings = {"sliding_window": 4096, **settings}  # what MistralConfig takes
        if settings["sliding_window"] is not None:
            require_wide_window(settings)
    elif kind == "qwen2":
        settings = {"sliding_window": 4096, "max_window_layers": 28, **settings}  # as Qwen2Config
        slides = settings.get("use_sliding_window") and settings["sliding_window"] is not None
        first = settings["max_window_layers"]  # that slides, if layer_types does not say which do
        if slides and not settings.get("layer_types") and first < settings["num_hidden_layers"]:
            require_wide_window(settings)
        biased |= {"attn.c_attn"}
    else:  # what a missing number of key/value heads means here alone
        settings = {"num_key_value_heads": None, **settings}
        if settings.get("attention_bias"):
            biased |= {"attn.c_attn", "attn.c_proj"}
        if settings.get("mlp_bias"):
            biased |= {"mlp.c_gate", "mlp.c_fc", "mlp.c_proj"}
    args = rotary_args(settings)
    args["n_kv_head"] = settings["num_key_value_heads"]
    args["head_dim"] = settings.get("head_dim")
    args["bias"] = bool(biased)
    state = our_names(tensors, LLAMA_NAMES)
    for name in list(state):
        if ".attn.q." in name:
            parts = [state.pop(name.replace(".q.", f".{part}.")) for part in "qkv"]
            state[name.replace(".q.", ".c_attn.")] = torch.cat(parts)
    if biased:
        maps = {"attn.c_attn", "attn.c_proj", "mlp.c_gate", "mlp.c_fc", "mlp.c_proj"}
        add_zero_biases(state, maps - biased)
    return args, state


def write(model: GPT) -> tuple[Settings, Tensors]:
    """config.json and the tensors of a LlamaForCausalLM."""
    config = model.config
    rows = [config.n_head * config.hs, config.nkv * config.hs, config.nkv * config.hs]
    state = {}
    for name, parameter in model.named_parameters():
        if ".attn.c_attn." in name:
            for part, tensor in zip("qkv", parameter.detach().split(rows), strict=True):
                state[name.replace("c_attn", part)] = tensor
        else:
            state[name] = parameter.detach()
    settings = {
        "architectures": ["LlamaForCausalLM"],
        **rotary_settings(config),
        "num_key_value_heads": config.nkv,
        "head_dim": config.hs,
        "attention_bias": config.bias,
        "mlp_bias": config.bias,
    }
    return settings, their_names(state, LLAMA_NAMES)


FITS = {
    **ROTARY_FITS,
    **WITHOUT_MLA,
    "bias": anything,
    "n_kv_head": anything,
    # transformers' LlamaConfig wants this of the width, also where head_dim is given.
    "head_dim": lambda config: config.n_embd % config.n_head == 0,
}
HAS = "rotary positions, RMSNorm, SwiGLU"
LLAMA = Format("llama", HAS, read, write, FITS, also=("mistral", "qwen2"))
