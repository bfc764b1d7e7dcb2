"""
An attention block alone: its first weights, the rotations it makes, the picture of what it reads.

Run: python -m pytest tests/test_attention.py
"""

import pytest
import torch

from model import ATTENTION, GPT
from nanomla import formats
from tests.conftest import KINDS, TINY_MLA, all_logits, make, randomise, tiny_config

NEAR = {"atol": 1e-5, "rtol": 1e-4}


@pytest.mark.parametrize("kind", ["GQA, rotary", "MLA, groups", "rotary latent", "latent tokens"])
def test_first_weights(kind):
    """Alone and in a GPT: standard deviation 0.02, but c_proj's over sqrt(2 n_layer); biases 0,
    norms 1; a seed repeats them, and two blocks in a row differ."""
    wide = {"n_layer": 8, "n_embd": 128, "head_dim": 30, "mla_latent_dim": 60, "vocab_size": 500}
    config = tiny_config(**{**KINDS[kind], **wide})
    attention = ATTENTION[config.attention_name]
    torch.manual_seed(3)
    alone = attention(config)
    for name, p in [*alone.named_parameters(), *GPT(config).named_parameters()]:
        if p.dim() == 1:
            norm = name.endswith("weight")
            assert torch.equal(p, torch.full_like(p, float(norm))), name
        elif p.numel() > 10_000:
            std = 0.02 / 16**0.5 if name.endswith("c_proj.weight") else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.05), name
    assert not torch.equal(attention(config).c_proj.weight, alone.c_proj.weight)
    torch.manual_seed(3)
    assert torch.equal(attention(config).c_proj.weight, alone.c_proj.weight)


@pytest.mark.parametrize("settings", [{"n_kv_head": 2}, TINY_MLA, KINDS["rotary latent"]], ids=str)
@pytest.mark.parametrize("method", ["exact", "randomized"])
def test_low_rank_values_begin_as_dense_ones(settings, method):
    """The product of the fresh factors has the variance that a dense initialisation gives, at full
    rank, and less, but not 0, at a lower one."""
    wide = {**settings, "n_embd": 128, "head_dim": 32, "mla_latent_dim": 96, "use_svd": True}
    for rank, least, most in ((32, 0.0195, 0.0205), (8, 0.009, 0.0185)):
        attn = GPT(tiny_config(**wide, svd_rank=rank, svd_method=method)).transformer.h[1].attn
        heads = attn.v_up.size(0)
        product = attn.v_up @ attn.v_down.weight.view(heads, rank, -1)
        assert least < product.std().item() < most
        assert all(torch.linalg.matrix_rank(product) == rank)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["GQA, rotary", "MLA", "rotary latent, groups"])
def test_a_block_alone_is_that_of_a_gpt(kind):
    """It makes the rotary tables that GPT would give it."""
    model = make(kind)
    x = torch.randn(2, 9, 24)
    attn = model.transformer.h[0].attn
    tables = (model.rope_cos[:9], model.rope_sin[:9])
    assert torch.equal(attn(x), attn(x, rotation=tables))
    assert torch.equal(attn.weights(x), attn.weights(x, tables))


def values(attn, x, rotation, shared):
    """What the weights average, (B, nh, T, .), from the parts of an attention block."""
    kind = attn.config.attention_name
    if kind in ("mla", "split_latents"):
        c, kr, _, _ = attn._own_or_shared(x, None, rotation, shared)
        return attn._keys_and_values(c, kr)[1]
    if kind == "rotary_latent":
        c, _ = attn._own_or_shared(x, None, rotation, shared)
        return c.repeat_interleave(attn.nh // attn.G, dim=1)
    if kind == "latent_tokens":
        v = attn.c_attn(x)[..., -attn.nh * attn.hs :]
        return v.unflatten(-1, (attn.nh, attn.hs)).transpose(1, 2)
    v = attn._project(x, None, rotation)[2]
    return v.repeat_interleave(attn.nh // attn.nkv, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_weights_average_what_attention_averages(kind):
    """The weights times the values are what the heads give c_proj, in every attention."""
    model = randomise(make(kind), std=0.5)
    seen = {}
    attn = model.transformer.h[1].attn
    attn.register_forward_pre_hook(
        lambda _, args, names: seen.update(names, x=args[0], rotation=args[2]), with_kwargs=True
    )
    attn.c_proj.register_forward_pre_hook(lambda _, args: seen.update(y=args[0]))
    idx = torch.randint(23, (2, 11))
    model(idx)
    weights = model.attention_weights(idx, 1)
    assert weights.shape == (2, 4, 11, 11) and weights.dtype == torch.float32
    assert torch.equal(weights, weights.tril()) and bool((weights >= 0).all())
    total = weights.sum(dim=-1)
    if model.config.attention_name == "latent_tokens":
        assert bool((total < 1).all()) and bool((total > 0).all())
    else:
        torch.testing.assert_close(total, torch.ones(2, 4, 11))
    o = weights @ values(attn, seen["x"], seen["rotation"], seen.get("shared"))  # (B, nh, T, .)
    if model.config.attention_name == "rotary_latent":
        cos, sin = seen["rotation"]
        o = attn._rotate(o.transpose(1, 2), (cos, -sin)).transpose(1, 2)
        o = attn._read_values(o)
    o = o.transpose(1, 2).flatten(2)
    if model.config.attn_gate:
        o = o / (1 + torch.exp(-seen["x"] @ attn.gate_proj.weight.T))
    torch.testing.assert_close(o, seen["y"], **NEAR)
    with pytest.raises(ValueError, match="layer=2 does not work.*from 0 to 1"):
        model.attention_weights(idx, 2)


def test_normed_queries_and_keys_as_in_qwen3():
    """Equal logits to 1e-5 with the weights in transformers' Qwen3, which has such norms."""
    transformers = pytest.importorskip("transformers")
    style = {"pos_emb": "rope", "norm": "rmsnorm", "mlp": "swiglu", "bias": False, "n_kv_head": 2}
    model = randomise(make({**style, "norm_eps": 1e-6, "qk_norm": True}))
    settings, tensors = formats.write(model, "llama")
    for name in [name for name in tensors if "_norm" in name and ".attn." in name]:
        tensors[name.replace(".attn.", ".self_attn.")] = tensors.pop(name)
    theirs = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**{
        name: value for name, value in settings.items() if name != "model_type"
    })).eval()
    missing, unexpected = theirs.load_state_dict(tensors, strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected
    theirs.tie_weights()
    idx = torch.randint(23, (2, 16))
    with torch.no_grad():
        want = theirs(idx).logits
    torch.testing.assert_close(all_logits(model, idx), want, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["MLA, gate and norms", "rotary latent + SVD, gate and norms"])
def test_norms_of_mla_are_those_that_can_be_absorbed(kind):
    """Of whole queries before they are rotated, and of the rotary key; a rotary latent's has no
    weights. Another scale of what they norm changes nothing."""
    model = make(kind)
    attn = model.transformer.h[0].attn
    x = torch.randn(1, 9, 24)
    want = attn(x)
    attn.q_proj.weight *= 3
    attn.q_proj.bias *= 3
    if model.config.attention_name == "mla":
        assert attn.k_norm.weight.shape == (2,) and attn.q_norm.weight.shape == (6,)
        attn.kv_latent_proj.weight[-2:] *= 5
        attn.kv_latent_proj.bias[-2:] *= 5
    else:
        assert attn.q_norm.weight is None
    torch.testing.assert_close(attn(x), want, **NEAR)
