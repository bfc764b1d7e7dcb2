"""
What our models are timed against: transformers' GPT-2 and DeepSeek-V3, and MHA over a static cache,
compiled as gpt-fast compiles its own.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from model import GPT, GPTConfig
from nanomla.errors import UserError, cause


# ---- transformers, which is imported only where it is asked for
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
    )  # fmt: skip
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
    ).to(x.device)  # fmt: skip
    adamw = torch.optim.AdamW(model.parameters(), lr=6e-4, fused=True)
    return lambda: F.cross_entropy(model(x).logits.flatten(0, 1), y.flatten()), model, adamw


# ---- MHA as gpt-fast computes it
class StaticMHA(nn.Module):
    """
    One step of an MHA model with learned positions over a cache of fixed shape, in plain torch: all
    max_len rows take part, those after the token behind a mask, so that torch.compile can take it
    as a whole. It shares the model's weights.
    """

    def __init__(self, model: GPT, max_len: int) -> None:
        super().__init__()
        self.model = model
        self.max_len = max_len
        shape = 1, model.config.n_head, max_len, model.config.hs
        for i in range(model.config.n_layer):  # each a buffer of its own, which is written in place
            self.register_buffer(f"keys{i}", model.lm_head.weight.new_zeros(shape))
            self.register_buffer(f"values{i}", model.lm_head.weight.new_zeros(shape))

    def forward(self, token: Tensor, pos: Tensor) -> Tensor:
        """The logits (1, 1, V) after token (1, 1), which is number pos (1,)."""
        parts = self.model.transformer
        seen = torch.arange(self.max_len, device=pos.device) <= pos  # (S,)
        x = F.embedding(token, parts.wte.weight) + F.embedding(pos, parts.wpe.weight)
        for i, block in enumerate(parts.h):
            keys = getattr(self, f"keys{i}")
            values = getattr(self, f"values{i}")
            y = dense(block.ln_1(x), block.attn.c_attn)
            q, k, v = y.view(1, 1, 3, block.attn.nh, -1).permute(2, 0, 3, 1, 4)  # (1, nh, 1, hs)
            keys.index_copy_(2, pos, k)
            values.index_copy_(2, pos, v)
            y = F.scaled_dot_product_attention(q, keys, values, attn_mask=seen[None])
            x = x + dense(y.transpose(1, 2).flatten(2), block.attn.c_proj)
            y = dense(block.ln_2(x), block.mlp.c_fc)
            x = x + dense(F.gelu(y, approximate=block.mlp.approximate), block.mlp.c_proj)
        return F.linear(parts.ln_f(x), self.model.lm_head.weight)

    def next_token(self, token: Tensor, pos: Tensor) -> Tensor:
        """The likeliest token after token, (1, 1)."""
        return self(token, pos)[:, -1].argmax(-1, keepdim=True)


def dense(x: Tensor, layer: nn.Linear) -> Tensor:
    """What nn.Linear computes; our own layers choose a path by the size, which is not compiled."""
    return F.linear(x, layer.weight, layer.bias)


def compiled(step: Callable[..., Tensor], device: str) -> Callable[..., Tensor]:
    """
    A step as gpt-fast compiles its own: as a whole, on a GPU into a CUDA graph, with tiles that are
    tried out and attention that Inductor writes.
    """
    if not device.startswith("cuda"):
        return torch.compile(step, fullgraph=True)
    options = {"triton.cudagraphs": True, "coordinate_descent_tuning": True}
    fast = torch.compile(step, fullgraph=True, options=options)

    def run(*args: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return fast(*args)

    return run


def compiled_decoding(model: GPT, idx: Tensor, n: int) -> Callable[[], None]:
    """n greedy tokens after idx (1, S) by a compiled StaticMHA, its cache no longer than needed."""
    first = idx.size(1) - 1
    static = StaticMHA(model, -(-(first + n) // 8) * 8)
    for buffer in static.buffers(recurse=False):
        buffer.normal_()
    step = compiled(static.next_token, idx.device.type)
    last = idx[:, -1:].clone(memory_format=torch.contiguous_format)  # else it is compiled twice

    def run() -> None:
        token = last
        pos = torch.tensor([first], device=idx.device)
        for _ in range(n):
            token = step(token, pos).clone()  # the next step overwrites what a CUDA graph returns
            pos += 1

    return run


def require_compiler(device: str) -> None:
    """Raise UserError where torch.compile does not work."""
    try:
        compiled(lambda x: x.exp() + 1, device)(torch.zeros(9, device=device))
    except RuntimeError as error:
        remedy = "install a C++ compiler (on a GPU also Triton), or leave it out"
        raise UserError(f"--vs_compiled: torch.compile fails ({cause(error)}); {remedy}") from None
