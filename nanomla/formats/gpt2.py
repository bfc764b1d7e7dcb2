"""GPT-2, as transformers' GPT2LMHeadModel stores it."""

import torch

from model import GPT
from nanomla.formats.base import (
    FREE,
    NO_END,
    WITHOUT_MLA,
    Format,
    Settings,
    Tensors,
    anything,
    require_value,
)

SHAPE = {  # GPT-2's name and ours
    "n_positions": "block_size",
    "vocab_size": "vocab_size",
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
}
DEFAULTS = {  # of GPT2Config
    "n_inner": None,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
}
ONLY = {  # the one value that a model here computes; it is also GPT2Config's default
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}
GELU = {  # by the names that transformers has
    "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu_python_tanh": "tanh",
    "gelu_fast": "tanh", "gelu_accurate": "tanh", "gelu": "exact", "gelu_python": "exact",
}
TRANSPOSED = (  # stored as (in, out)
    "attn.c_attn.weight",
    "attn.c_proj.weight",
    "mlp.c_fc.weight",
    "mlp.c_proj.weight",
)


def read(settings: Settings, tensors: Tensors) -> tuple[Settings, Tensors]:
    """GPT2Config as arguments of GPTConfig, and its tensors as a state dict."""
    settings = {**DEFAULTS, **ONLY, **settings}
    for name, value in ONLY.items():
        require_value(settings, name, value)
    require_value(settings, "activation_function", *GELU)
    args = {ours: settings[theirs] for theirs, ours in SHAPE.items()}
    args["mlp_hidden"] = settings["n_inner"]
    args["norm_eps"] = settings["layer_norm_epsilon"]
    args["tie_weights"] = settings["tie_word_embeddings"]
    args["gelu"] = GELU[settings["activation_function"]]
    args["bias"] = True
    state = {}
    for name, tensor in tensors.items():
        if not name.startswith(("transformer.", "lm_head.")):  # the base model has no such prefix
            name = f"transformer.{name}"
        if name.endswith(TRANSPOSED):
            tensor = tensor.t()
        state[name] = tensor
    return args, state


def write(model: GPT) -> tuple[Settings, Tensors]:
    """config.json and the tensors of a GPT2LMHeadModel."""
    config = model.config
    tensors = {}
    for name, parameter in model.named_parameters():
        tensor = parameter.detach()
        if name.endswith(TRANSPOSED):
            tensor = tensor.t()
        tensors[name] = tensor.contiguous()
        takes_bias = not name.endswith(("wte.weight", "wpe.weight", "lm_head.weight"))
        if takes_bias and not config.bias:
            bias = torch.zeros(parameter.size(0), dtype=parameter.dtype)
            tensors[name.replace(".weight", ".bias")] = bias
    settings = {
        "architectures": ["GPT2LMHeadModel"],
        "activation_function": {"tanh": "gelu_new", "exact": "gelu"}[config.gelu],
        **{theirs: getattr(config, ours) for theirs, ours in SHAPE.items()},
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), config.dropout),
        "n_inner": config.mlp_hidden,
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tie_weights,
        **NO_END,
    }
    return settings, tensors


FITS = {
    **FREE,
    **WITHOUT_MLA,
    "bias": anything,  # GPT-2 always has biases; a model without them gets zeros
    "n_kv_head": lambda config: config.nkv == config.n_head,
    "head_dim": lambda config: config.hs * config.n_head == config.n_embd,
    "rope_freqs": anything,  # without effect with learned positions
}
GPT2 = Format("gpt2", "learned positions, LayerNorm, GELU", read, write, FITS)
