"""DeepSeek-V3, as transformers' DeepseekV3ForCausalLM stores it."""

import sys

import torch
from torch import Tensor

from model import GPT, GPTConfig
from nanomla.errors import say
from nanomla.formats.base import Format, Settings, Tensors, anything, only, require_value
from nanomla.formats.llama import (
    NAMES,
    ROTARY_FITS,
    add_zero_biases,
    our_names,
    rotary_args,
    rotary_settings,
    their_names,
)

DEEPSEEK_NAMES = {
    **NAMES,
    ".attn.q_proj.": ".self_attn.q_proj.",
    ".attn.q_latent_proj.": ".self_attn.q_a_proj.",
    ".attn.q_latent_norm.": ".self_attn.q_a_layernorm.",
    ".attn.q_expand.": ".self_attn.q_b_proj.",
    ".attn.kv_latent_proj.": ".self_attn.kv_a_proj_with_mqa.",
    ".attn.latent_norm.": ".self_attn.kv_a_layernorm.",
    ".attn.kv_expand.": ".self_attn.kv_b_proj.",  # per head, k_expand's rows and then v_expand's
    ".mlp.router_bias": ".mlp.gate.e_score_correction_bias",
    ".mlp.router.": ".mlp.gate.",
    ".mlp.shared.": ".mlp.shared_experts.",
    ".ln_f.": ".shared_head.norm.",  # of the predictor, which is stored as one more layer
}
EXPERTS = {  # settings: DeepSeek's name and ours
    "n_routed_experts": "moe_experts",
    "num_experts_per_tok": "moe_active",
    "n_shared_experts": "moe_shared",
    "moe_intermediate_size": "moe_hidden",
    "n_group": "moe_groups",
    "topk_group": "moe_active_groups",
    "norm_topk_prob": "moe_norm",
    "routed_scaling_factor": "moe_scale",
    "first_k_dense_replace": "moe_dense_layers",
}
# What DeepSeek's own config.json has besides about the choice, which transformers ignores.
CHOICE = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1}
OF_PREDICTOR = ("enorm.", "hnorm.", "eh_proj.", "ln_f.")  # all else of that layer is its block's
COPIES = ("embed_tokens.weight", "shared_head.head.weight")  # what engines expect in it besides


def read(settings: Settings, tensors: Tensors) -> tuple[Settings, Tensors]:
    """
    DeepseekV3Config as arguments of GPTConfig, and the tensors as a state dict.

    DeepSeek stores the numbers that rotate together side by side (rope_interleave, its default);
    here they are r / 2 apart. So the rotary rows are put in another order.
    """
    settings = {
        "first_k_dense_replace": 3, "rope_interleave": True, "attention_bias": False, **settings,
    }
    args = rotary_args(settings)
    args["bias"] = bool(settings["attention_bias"])
    args["use_mla"] = True
    args["mla_latent_dim"] = settings["kv_lora_rank"]
    args["mla_rope_dim"] = settings["qk_rope_head_dim"]
    args["mla_nope_dim"] = settings["qk_nope_head_dim"]
    args["mla_q_latent_dim"] = settings["q_lora_rank"]
    args["head_dim"] = settings["v_head_dim"]
    if settings["first_k_dense_replace"] < settings["num_hidden_layers"]:
        args |= experts_args(settings)
    config = GPTConfig(**args)
    heads = config.n_head
    r = config.mla_rope_dim
    if settings.get("num_key_value_heads") is not None:
        require_value(settings, "num_key_value_heads", heads)
    if config.bias and config.mla_q_latent_dim is not None:
        raise ValueError("attention_bias=True with a q_lora_rank is not supported, only False")
    state = our_names(tensors, DEEPSEEK_NAMES)
    args["n_predict"] = take_predictor(state, config.n_layer)
    for name in list(state):
        if ".mlp.experts." in name and name.endswith("_proj"):  # as transformers has it in memory
            state |= experts_apart(name, state.pop(name))
        elif name.endswith(".attn.kv_expand.weight"):
            weight = take(state, name, heads * (config.nope + config.hs))
            keys, values = weight.unflatten(0, (heads, -1)).split([config.nope, config.hs], dim=1)
            state[name.replace("kv_expand", "k_expand")] = keys.flatten(0, 1)
            state[name.replace("kv_expand", "v_expand")] = values.flatten(0, 1)
        elif name.endswith((".attn.q_proj.weight", ".attn.q_expand.weight")):
            state[name] = take(state, name, heads * (config.nope + r))
            if settings["rope_interleave"]:
                state[name] = halves_from_pairs(state[name], heads, r)
        elif ".attn.kv_latent_proj." in name:
            state[name] = take(state, name, config.mla_latent_dim + r)
            if settings["rope_interleave"]:
                state[name] = halves_from_pairs(state[name], 1, r)
    if config.bias:
        add_zero_biases(state, {"attn.q_proj", "mlp.c_gate", "mlp.c_fc", "mlp.c_proj"})
    return args, state


def experts_args(settings: Settings) -> Settings:
    """The settings of a mixture of experts as arguments of GPTConfig."""
    settings = {**CHOICE, **settings}
    for name, value in CHOICE.items():
        require_value(settings, name, value)
    require_value(settings, "attention_bias", False, None)
    args = {ours: settings[theirs] for theirs, ours in EXPERTS.items()}
    for name in ("moe_groups", "moe_active_groups"):
        if args[name] is None:
            args[name] = 1
    if args["moe_shared"] is None:
        args["moe_shared"] = 0
    return args


def experts_apart(name: str, stacked: Tensor) -> Tensors:
    """
    Every expert's matrices under our names, of gate_up_proj (E, 2 * hidden, C), which has the gate
    first, or down_proj (E, C, hidden).
    """
    layer, _, matrix = name.rpartition(".")
    state = {}
    for i, weight in enumerate(stacked):
        if matrix == "gate_up_proj":
            gate, up = weight.chunk(2)
            state[f"{layer}.{i}.c_gate.weight"] = gate
            state[f"{layer}.{i}.c_fc.weight"] = up
        else:
            state[f"{layer}.{i}.c_proj.weight"] = weight
    return state


def write(model: GPT) -> tuple[Settings, Tensors]:
    """
    config.json and the tensors of a DeepseekV3ForCausalLM.

    The rotary rows are interleaved, as DeepSeek's own are: that order is the default, and engines
    that do not read rope_interleave take it for granted.
    """
    config = model.config
    heads = config.n_head
    r = config.mla_rope_dim
    state = {}
    for name, parameter in model.named_parameters():
        weight = parameter.detach()
        if ".attn.k_expand." in name:
            values = model.get_parameter(name.replace("k_expand", "v_expand")).detach()
            per_head = [weight.unflatten(0, (heads, -1)), values.unflatten(0, (heads, -1))]
            state[name.replace("k_expand", "kv_expand")] = torch.cat(per_head, dim=1).flatten(0, 1)
        elif name.endswith((".attn.q_proj.weight", ".attn.q_expand.weight")):
            state[name] = pairs_from_halves(weight, heads, r)
        elif ".attn.kv_latent_proj." in name:
            state[name] = pairs_from_halves(weight, 1, r)
        elif ".attn.v_expand." not in name:
            state[name] = weight
    if config.n_predict:
        layer = f"transformer.h.{config.n_layer}."
        for name in [name for name in state if name.startswith("predictor.")]:
            place = name.removeprefix("predictor.").removeprefix("h.")
            state[layer + place] = state.pop(name)
        for name, weight in zip(COPIES, (model.transformer.wte, model.lm_head), strict=True):
            state[layer + name] = weight.weight.detach().clone()
    settings = {
        "architectures": ["DeepseekV3ForCausalLM"],
        **rotary_settings(config),
        "num_key_value_heads": heads,
        "kv_lora_rank": config.mla_latent_dim,
        "q_lora_rank": config.mla_q_latent_dim,
        "qk_rope_head_dim": r,
        "qk_nope_head_dim": config.nope,
        "v_head_dim": config.hs,
        "rope_interleave": True,
        "attention_bias": False,
        "first_k_dense_replace": config.n_layer + config.n_predict,  # all are dense, or see below
        "num_nextn_predict_layers": config.n_predict,
    }
    if config.moe_experts:
        settings |= {theirs: getattr(config, ours) for theirs, ours in EXPERTS.items()}
        settings["moe_intermediate_size"] = config.expert_hidden
        settings |= CHOICE
    return settings, their_names(state, DEEPSEEK_NAMES)


def take_predictor(state: Tensors, n_layer: int) -> int:
    """
    Give the predictor's tensors, which are those of layer n_layer, our names; returns how many
    there are, 0 or 1. One with a mixture of experts is left out, and so are further ones.
    """
    predicting = set()  # numbers of layers
    for name in state:
        if name.startswith("transformer.h.") and name.endswith(".enorm.weight"):
            predicting.add(name.split(".")[2])
    dense = f"transformer.h.{n_layer}.mlp.c_fc.weight" in state
    taken = set()
    if dense:
        taken = predicting & {str(n_layer)}
    for number in predicting:
        layer = f"transformer.h.{number}."
        for name in [name for name in state if name.startswith(layer)]:
            tensor = state.pop(name)
            place = name.removeprefix(layer)
            if number not in taken or place in COPIES:
                continue
            if not place.startswith(OF_PREDICTOR):
                place = f"h.{place}"
            state[f"predictor.{place}"] = tensor
    if predicting > taken:
        numbers = ", ".join(sorted(predicting - taken))
        say(f"left out: layer {numbers}, which predicts a token after the next", sys.stderr)
    return len(taken)


def take(state: Tensors, name: str, rows: int) -> Tensor:
    """Take a tensor out of a state dict. Raises ValueError if it has another number of rows."""
    tensor = state.pop(name)
    if tensor.size(0) != rows:
        raise ValueError(f"{name} has {tensor.size(0)} rows, by the settings it must have {rows}")
    return tensor


def halves_from_pairs(weight: Tensor, heads: int, r: int) -> Tensor:
    """
    A weight (heads * width, ...) whose last r rows of every head are pairs of rotary numbers, with
    the first numbers of all pairs before the second ones.
    """
    per_head = weight.unflatten(0, (heads, -1))
    content, pairs = per_head.split([per_head.size(1) - r, r], dim=1)
    return torch.cat([content, pairs[:, 0::2], pairs[:, 1::2]], dim=1).flatten(0, 1)


def pairs_from_halves(weight: Tensor, heads: int, r: int) -> Tensor:
    """The inverse of halves_from_pairs."""
    per_head = weight.unflatten(0, (heads, -1))
    content, halves = per_head.split([per_head.size(1) - r, r], dim=1)
    first, second = halves.chunk(2, dim=1)
    pairs = torch.stack([first, second], dim=2).flatten(1, 2)
    return torch.cat([content, pairs], dim=1).flatten(0, 1)


FITS = {
    **ROTARY_FITS,
    "bias": only("bias", False),
    "n_kv_head": anything,  # without effect with use_mla
    "n_predict": lambda config: config.n_predict == 0 or config.moe_experts == 0,
    "head_dim": anything,
    "use_mla": only("use_mla", True),
    **dict.fromkeys(("mla_nope_dim", "mla_q_latent_dim"), anything),
    "mla_latent_dim": lambda config: isinstance(config.mla_latent_dim, int),  # of all layers
    "mla_rope_dim": lambda config: bool(config.mla_rope_dim),
    "moe_experts": anything,
    # transformers has no model without shared experts
    "moe_shared": lambda config: config.moe_experts == 0 or config.moe_shared > 0,
}
HAS = "MLA with a decoupled rotary key, RMSNorm, SwiGLU"
DEEPSEEK = Format("deepseek_v3", HAS, read, write, FITS)
