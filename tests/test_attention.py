"""The picture of attention, beside attention. Run: python -m pytest tests/test_attention.py"""

import pytest
import torch

import model as gpt
from model import GPT
from nanomla.attention import attention_weights
from tests.conftest import TINY_MLA, randomise, tiny_config

ROTARY = {**TINY_MLA, "mla_rope": "latent", "mla_latent_dim": 8}
KINDS = {
    "mha": {"n_layer": 3},
    "gqa": {"pos_emb": "rope", "n_kv_head": 2},
    "mla": TINY_MLA,
    "groups": {**TINY_MLA, "mla_groups": 2},
    "svd": {**TINY_MLA, "use_svd": True, "svd_rank": 3},
    "rotary": {**ROTARY, "mla_groups": 2},
    "latent_tokens": {"use_latent_tokens": True, "n_latent_tokens": 5},
}


def values(attn, x, rotation):
    """What the weights average, (nh, T, .), from the parts of an attention block."""
    T, nh, hs = x.size(1), attn.nh, attn.hs
    kind = attn.config.attention
    if kind == "mla":
        return attn._expand(*attn._project(x, rotation)[1:])[1][0]
    if kind == "rotary_latent":
        rows = attn.latent_norm(attn.kv_latent_proj(x).view(1, T, attn.G, attn.L))
        rows = attn._turn(rows, rotation)[0].transpose(0, 1)  # (G, T, L)
        return rows.repeat_interleave(nh // attn.G, dim=0)
    v = attn.c_attn(x)[0, :, -attn.config.nkv * hs :].view(T, -1, hs).transpose(0, 1)
    return v.repeat_interleave(nh // v.size(0), dim=0)


@torch.no_grad()
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)
def test_weights_average_what_attention_averages(settings, layer):
    """The weights times the values are what the heads give c_proj, in every attention."""
    model, seen = randomise(GPT(tiny_config(**settings)), std=0.5), {}
    attn = model.transformer.h[layer].attn
    attn.register_forward_pre_hook(lambda _, args: seen.update(x=args[0], rotation=args[2]))
    attn.c_proj.register_forward_pre_hook(lambda _, args: seen.update(y=args[0]))
    tokens = torch.randint(23, (11,)).tolist()
    kernels = gpt.attend, gpt.slot_attention
    weights = attention_weights(model, tokens, layer)
    assert (gpt.attend, gpt.slot_attention) == kernels
    assert weights.shape == (4, 11, 11) and weights.dtype == torch.float32
    assert torch.equal(weights, weights.tril()) and bool((weights >= 0).all())
    total = weights.sum(dim=-1)
    if model.config.attention_name == "latent_tokens":
        assert bool((total < 1).all()) and bool((total > 0).all())
    else:
        torch.testing.assert_close(total, torch.ones(4, 11))
    o = weights @ values(attn, seen["x"], seen["rotation"])  # (nh, T, .)
    if model.config.attention_name == "rotary_latent":
        cos, sin = seen["rotation"]
        o = attn._turn(o.transpose(0, 1)[None], (cos, -sin)).transpose(1, 2)
        o = attn._read_values(o)[0]
    torch.testing.assert_close(o.transpose(0, 1).flatten(1), seen["y"][0], atol=1e-5, rtol=1e-4)


def test_what_has_no_picture():
    """A layer and a text that the model does not have are errors that say what would work."""
    model = GPT(tiny_config())
    for tokens, layer in (([1], 2), ([1], -1), ([], 0), ([1] * 17, 0)):
        with pytest.raises(ValueError, match="from"):
            attention_weights(model, tokens, layer)
