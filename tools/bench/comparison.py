"""transformers' GPT-2 and DeepSeek-V3, which are imported only where they are timed."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import GPTConfig


def deepseek_layer(nh: int, S: int, L: int, x: Tensor) -> Callable[[], None]:
    """transformers' MLA layer of the same sizes on S - 1 tokens, in the cache that it takes."""
    from transformers import DeepseekV3Config, DynamicCache
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek

    hs = x.size(-1) // nh
    config = DeepseekV3Config(
        hidden_size=x.size(-1), num_attention_heads=nh, num_key_value_heads=nh, q_lora_rank=None,
        kv_lora_rank=L, qk_rope_head_dim=2, qk_nope_head_dim=hs - 2, v_head_dim=hs,
        rope_interleave=False, num_hidden_layers=1, max_position_embeddings=S,
        attn_implementation="sdpa",
    )
    layer = deepseek.DeepseekV3Attention(config, 0).to(x.device, x.dtype).eval()
    position = torch.tensor([[S - 1]], device=x.device)
    rotary = deepseek.DeepseekV3RotaryEmbedding(config).to(x.device)(x, position)
    inputs = {"position_embeddings": rotary, "attention_mask": None}
    probe = DynamicCache(config=config)  # to see the shapes that it caches
    layer(x, past_key_values=probe, **inputs)
    filled = []
    for cached in (probe.layers[0].keys, probe.layers[0].values):
        B, heads, _, width = cached.shape
        filled.append(torch.randn(B, heads, S - 1, width, device=x.device, dtype=x.dtype))
    cache = DynamicCache(config=config)
    cache.update(filled[0], filled[1], 0)

    def run() -> None:
        layer(x, past_key_values=cache, **inputs)
        cache.crop(-1)  # the token just added

    return run


def new_gpt2(**sizes: int | None) -> nn.Module:
    """transformers' GPT-2 of these sizes, without its messages."""
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    return GPT2LMHeadModel(GPT2Config(bos_token_id=None, eos_token_id=None, **sizes))


def gpt2_decoding(device: str, dtype: torch.dtype, idx: Tensor, n: int) -> Callable[[], None]:
    """transformers' GPT-2 with its cache, prefilled with all of idx but the last token."""
    from transformers import DynamicCache

    model = new_gpt2(vocab_size=50304, pad_token_id=0).to(device, dtype).eval()
    cache = DynamicCache(config=model.config)
    model(idx[:, :-1], past_key_values=cache, use_cache=True)

    def run() -> None:
        model.generate(
            idx, past_key_values=cache, max_new_tokens=n, do_sample=False, use_cache=True
        )
        cache.crop(-n)  # what the call added

    return run


def gpt2_training(
    base: GPTConfig, x: Tensor, y: Tensor
) -> tuple[Callable[[], Tensor], Any, torch.optim.Optimizer]:
    """transformers' GPT-2 of the same size: a function of its loss, the model and its AdamW."""
    model = new_gpt2(
        vocab_size=base.vocab_size, n_positions=base.block_size, n_embd=base.n_embd,
        n_layer=base.n_layer, n_head=base.n_head, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    ).to(x.device)
    adamw = torch.optim.AdamW(model.parameters(), lr=6e-4, fused=True)
    return lambda: F.cross_entropy(model(x).logits.flatten(0, 1), y.flatten()), model, adamw
