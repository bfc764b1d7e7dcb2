"""
The model against itself along other paths; tests/test_formats.py has it beside transformers.

Run: python -m pytest tests/test_model.py
"""

import copy
import itertools
from dataclasses import asdict

import pytest
import torch

from model import ATTENTION, GPT, GPTConfig
from tests.conftest import KINDS, TINY_MLA, all_logits, make, tiny_config

NEAR = {"atol": 1e-5, "rtol": 1e-4}
SVD = {"use_svd": True, "svd_rank": 3}
LLAMA = {"norm": "rmsnorm", "mlp": "swiglu", "bias": False, "tie_weights": False}
LATENT_TOKENS = KINDS["latent tokens"]
ROTARY_LATENT = {**TINY_MLA, "mla_rope": "latent", "mla_latent_dim": 8}
FREQUENCIES = {"pos_emb": "rope", "rope_freqs": (1.0, 1.0, 0.3)}

MODELS = {  # every setting of the model, with every attention that has it
    **KINDS,
    "Llama's block": {**LLAMA, "pos_emb": "rope", "norm_eps": 1e-3, "mlp_hidden": 40},
    "GQA, rotary, SVD": {"pos_emb": "rope", "n_kv_head": 2, **SVD},
    "MLA, low-rank queries": {**TINY_MLA, "mla_q_latent_dim": 10, "bias": False},
    "MLA, wide queries": {**TINY_MLA, "mla_nope_dim": 9, "mla_rope_dim": 6, "head_dim": 8},
    "MLA, a latent per head": {**TINY_MLA, "mla_groups": 4, "mla_norm": "layernorm", **SVD},
    "MLA, groups by layer": {
        **TINY_MLA, "mla_groups": 2, "mla_q_latent_dim": 5, "mla_latent_dim": (7, 3)
    },
    "MLA, frequencies": {**TINY_MLA, **FREQUENCIES, "mla_rope_dim": 6, "mla_nope_dim": 5},
    "rotary latent, SVD": {**ROTARY_LATENT, **SVD, "mla_q_latent_dim": 10},
    "rotary latent, by layer": {**ROTARY_LATENT, "mla_latent_dim": (4, 9), **LLAMA},
    "rotary latent, shared": {
        **ROTARY_LATENT, "mla_groups": 4, "mla_share_latent": True, "head_dim": 5
    },
    "rotary latent, frequencies": {**ROTARY_LATENT, **FREQUENCIES, "mla_rope_dim": 6},
    "one latent token": {**LATENT_TOKENS, "n_latent_tokens": 1, "head_dim": 5, **LLAMA},
}


def cached_by_hand(cfg):
    """Numbers per token in all layers."""
    if cfg.use_latent_tokens:
        return 0
    if not cfg.use_mla:
        return cfg.n_layer * cfg.nkv * (cfg.hs + (cfg.svd_rank or cfg.hs))
    beside = cfg.mla_rope_dim if cfg.mla_rope == "decoupled" else 0
    return sum(cfg.mla_groups * cfg.latent_dim(i) + beside for i in range(cfg.n_layer))


@pytest.mark.parametrize("name", MODELS)
def test_every_model(name):
    """Causal; a sequence is what it is alone; cached equals uncached however the prompt is cut;
    absorbed equals expanded; gradients reach everything; a state dict goes round; the cache is as
    large as the formula says."""
    model = make(MODELS[name])
    cfg = model.config
    idx = torch.randint(23, (3, 12))
    full = all_logits(model, idx)
    torch.testing.assert_close(all_logits(model, idx[1:2]), full[1:2], **NEAR)
    for t in (5, 11):  # another token t changes no logits before t
        other = idx.clone()
        other[:, t] = (other[:, t] + 1) % 23
        changed = all_logits(model, other)
        assert torch.equal(changed[:, :t], full[:, :t])
        assert not torch.allclose(changed[:, t], full[:, t])
    with torch.no_grad():
        for sizes in ((1,) * 12, (11, 1), (3,) * 4, (5, 1, 1, 5)):
            cache = model.make_cache(3, 12)
            end = 0
            for size in sizes:
                logits, _ = model(idx[:, end : end + size], cache=cache)
                end += size
                assert cache.pos == end
                torch.testing.assert_close(logits[:, 0], full[:, end - 1], **NEAR)
        assert cache.bytes_per_token == 4 * cached_by_hand(cfg)
        state = 2 * cfg.n_head * cfg.hs * (cfg.n_latent_tokens or 0)
        assert cache.nbytes == 3 * (12 * cache.bytes_per_token + 4 * cfg.n_layer * state)
        if cfg.attention_name == "mla":
            x = torch.randn(3, 12, cfg.n_embd)
            attn = model.transformer.h[1].attn
            torch.testing.assert_close(attn(x, absorb=True), attn(x, absorb=False), **NEAR)
    model.train()(idx, idx)[1].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    twin = GPT(tiny_config(**MODELS[name]))
    twin.load_state_dict(model.state_dict())
    assert torch.equal(all_logits(twin, idx), full)


@torch.no_grad()
def test_all_logits():
    """Those of training, also of the new tokens on a cache; otherwise the last position's alone."""
    model = make("MLA")
    idx = torch.randint(23, (3, 12))
    full, loss = model(idx, all_logits=True)
    assert full.shape == (3, 12, 23) and loss is None
    with_targets, loss = model(idx, idx)
    assert torch.equal(full, with_targets) and loss > 0
    last, loss = model(idx)
    torch.testing.assert_close(last, full[:, -1:])
    assert loss is None
    cache = model.make_cache(3, 12)
    model(idx[:, :7], cache=cache)
    got, _ = model(idx[:, 7:], cache=cache, all_logits=True)
    torch.testing.assert_close(got, full[:, 7:], **NEAR)
    with pytest.raises(ValueError, match="17 tokens do not fit block_size=16"):
        model(torch.zeros(1, 17, dtype=torch.long))


RECORDED = {  # losses at iterations 0, 4 and 19, and the greedy tokens after 50
    "MHA": ({}, [3.13088, 2.30978, 0.5323], [16, 2, 13, 3, 3, 3, 18, 12]),
    "MLA": (TINY_MLA, [3.13453, 2.38123, 0.81766], [16, 2, 13, 3, 18, 12, 8, 6]),
    "MLA + SVD": ({**TINY_MLA, **SVD}, [3.153, 2.39368, 0.83089], [16, 2, 13, 3, 18, 12, 8, 6]),
}


@pytest.mark.parametrize("variant", RECORDED)
def test_what_a_seed_gives_stays(variant):
    """Initial weights, losses and greedy tokens of one seed are those of the first version."""
    settings, losses, tokens = RECORDED[variant]
    model = GPT(tiny_config(**settings))
    x = (torch.arange(34).view(2, 17) ** 2) % 23
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    got = []
    for _ in range(50):
        loss = model(x[:, :16], x[:, 1:])[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        got.append(loss.item())
    # Other CPUs add in another order: the last bits may differ, and grow from step to step.
    assert [got[0], got[4], got[19]] == pytest.approx(losses, rel=1e-3)
    out = model.eval().generate(torch.tensor([[4, 9]]), 8, temperature=0)
    assert out[0, 2:].tolist() == tokens


SETTINGS = [  # a model, and a setting that makes another one of it
    *[({}, change) for change in (
        {"pos_emb": "rope"}, {"use_mla": True}, {"attention": "mla"}, SVD, {"bias": False},
        {"gelu": "tanh"}, {"n_kv_head": 2}, {"head_dim": 8}, {"norm": "rmsnorm"},
        {"norm_eps": 1e-2}, {"mlp": "swiglu"}, {"mlp_hidden": 50}, {"tie_weights": False},
        LATENT_TOKENS,
    )],
    *[({"pos_emb": "rope"}, change) for change in (
        {"rope_theta": 100.0}, {"rope_freqs": (1.0, 0.5, 0.2)},
    )],
    *[(TINY_MLA, change) for change in (
        {"mla_nope_dim": 6}, {"mla_rope": "latent", "mla_latent_dim": 8}, {"mla_latent_dim": 9},
        {"mla_groups": 2}, {"mla_rope_dim": 4}, {"mla_q_latent_dim": 10}, {"mla_norm": "layernorm"},
        {"mla_norm": "none"}, {"mla_share_latent": True}, SVD,
    )],
    (LATENT_TOKENS, {"n_latent_tokens": 6}),
    ({**SVD, "head_dim": 20}, {"svd_method": "randomized"}),  # of small matrices both are exact
]


@pytest.mark.parametrize(("base", "change"), SETTINGS, ids=str)
def test_no_setting_is_dead(base, change):
    """It changes what a model of the same seed computes, or how many parameters it has."""
    outputs = []
    for settings in (base, {**base, **change}):
        torch.manual_seed(5)
        model = GPT(tiny_config(**settings)).eval()
        torch.manual_seed(6)
        if "svd_method" not in change:  # of which only the initial factors differ
            for p in model.parameters():
                p.data.add_(torch.randn_like(p), alpha=0.2)
        outputs.append((model.get_num_params(), all_logits(model, torch.arange(12)[None])))
    assert outputs[0][0] != outputs[1][0] or not torch.equal(outputs[0][1], outputs[1][1])


FLAGS = {  # what an attention's name stands for
    "mha": {},
    "mla": {"use_mla": True},
    "rotary_latent": {"use_mla": True, "mla_rope": "latent"},
    "latent_tokens": {"use_latent_tokens": True},
}


@pytest.mark.parametrize("attention", ATTENTION)
def test_a_name_is_what_the_flags_give(attention):
    """GPTConfig(attention=...) sets the flags, and builds the model that they build."""
    shape = {"pos_emb": "rope", "mla_latent_dim": 8}
    if attention == "latent_tokens":
        shape = {"n_latent_tokens": 5}
    named = tiny_config(**shape, attention=attention)
    assert named == tiny_config(**shape, **FLAGS[attention]) and named.attention is None
    assert named.attention_name == attention
    assert GPTConfig(**asdict(named)) == named  # as a checkpoint keeps it
    assert type(GPT(named).transformer.h[0].attn) is ATTENTION[attention]


def rotate_by_hand(x, position, theta=10000.0):
    """x (r,) rotated: number i pairs with number i + r / 2 and turns by position * theta^(-2i/r)"""
    half = len(x) // 2
    out = x.clone()
    for i in range(half):
        angle = torch.tensor(position * theta ** (-2 * i / len(x)), dtype=torch.float64)
        out[i] = x[i] * angle.cos() - x[i + half] * angle.sin()
        out[i + half] = x[i + half] * angle.cos() + x[i] * angle.sin()
    return out


@pytest.mark.parametrize(("L", "r", "G"), [(8, 8, 1), (9, 4, 1), (6, 2, 2)])
def test_rotary_latent_by_a_loop(L, r, G):
    """Position by position and head by head in float64, as the class's equations say."""
    sizes = {"mla_latent_dim": L, "mla_rope_dim": r, "mla_groups": G}
    attn = make({**ROTARY_LATENT, **sizes, "bias": False}).transformer.h[0].attn.double()
    T, nh, hs = 7, 4, 6
    x = torch.randn(1, T, 24, dtype=torch.float64)

    def turn(v, position):
        return torch.cat([v[: L - r], rotate_by_hand(v[L - r :], position)])

    with torch.no_grad():
        q = (x[0] @ attn.q_proj.weight.T).view(T, nh, L)
        c = (x[0] @ attn.kv_latent_proj.weight.T).view(T, G, L)
        c = c / (c.square().mean(-1, keepdim=True) + 1e-6).sqrt() * attn.latent_norm.weight
        values = attn.v_expand.weight.view(nh, hs, L)
        want = torch.zeros(T, nh * hs).double()
        for i, h in itertools.product(range(T), range(nh)):
            rows = torch.stack([turn(c[j, h // (nh // G)], j) for j in range(i + 1)])
            p = (rows @ turn(q[i, h], i) / L**0.5).softmax(0)
            want[i, h * hs : (h + 1) * hs] = values[h] @ turn(p @ rows, -i)
        want = want @ attn.c_proj.weight.T
        torch.testing.assert_close(attn(x)[0], want, atol=1e-12, rtol=1e-12)


def test_what_none_stands_for():
    """A latent whose cache is 4x smaller, and a rotary key of the even number at or below half a
    head. Equal widths are one number, and the frequencies are those of rope_theta."""
    config = tiny_config(use_mla=True, pos_emb="rope")
    assert (config.mla_latent_dim, config.mla_rope_dim) == (12, 2)
    assert tiny_config(use_mla=True, mla_groups=2).mla_latent_dim == 6
    assert tiny_config(use_mla=True).mla_rope_dim == 0
    assert tiny_config(**{**TINY_MLA, "mla_latent_dim": (7, 7)}) == tiny_config(**TINY_MLA)
    plain = make({"pos_emb": "rope"})
    idx = torch.randint(23, (2, 16))
    given = GPT(tiny_config(pos_emb="rope", rope_freqs=plain.config.frequencies.tolist()))
    given.load_state_dict(plain.state_dict())
    assert torch.equal(all_logits(given, idx), all_logits(plain, idx))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (4,), (1, 2, 3)])
def test_tokens_without_sequence_or_token(kind, shape):
    """One clear error with a cache and without, by whatever name the model is called."""
    model = make(kind)
    idx = torch.zeros(shape, dtype=torch.int64)
    wrong = rf"idx of shape \({', '.join(map(str, shape))},?\) does not work: it must be \(B, T\)"
    cache = model.make_cache(2, 8)
    for run in (
        lambda: model(idx),
        lambda: model(idx, idx),
        lambda: model(idx, cache=cache),
        lambda: model.attention_weights(idx, 0),
        lambda: model.generate(idx, 3),
    ):
        with pytest.raises(ValueError, match=wrong):
            run()
    assert cache.pos == 0


def test_targets_of_another_shape():
    """As many targets in other places are refused: they would give a loss, of other tokens."""
    model = make("MLA")
    idx = torch.zeros(2, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"targets.shape=\(4, 2\)"):
        model(idx, idx.view(4, 2))


@pytest.mark.parametrize("settings", [{"pos_emb": "rope"}, TINY_MLA, KINDS["rotary latent"]])
def test_another_dtype_and_back(settings):
    """A model that was bfloat16 or float16 is, with its weights loaded again, what it was."""
    model = make(settings)
    weights = copy.deepcopy(model.state_dict())
    idx = torch.randint(23, (2, 16))
    logits = all_logits(model, idx)
    for narrow in (torch.bfloat16, torch.float16):
        low = all_logits(model.to(narrow), idx)
        assert low.dtype == narrow and torch.allclose(low.float(), logits, rtol=0, atol=1)
        model.float().load_state_dict(weights)
        assert torch.equal(all_logits(model, idx), logits)
    model.to_empty(device="cpu").load_state_dict(weights)
    assert torch.equal(all_logits(model, idx), logits)


def test_built_on_the_meta_device_and_filled():
    """No weight is drawn; loaded with assign it is the same model, with its ties: the embedding,
    and all down-projections if they are shared. One pair of rotary tables serves all layers."""
    for settings in ({}, {**TINY_MLA, "mla_share_latent": True}):
        model = make(settings)
        assert [name for name, _ in model.named_buffers()] == ["rope_cos", "rope_sin"]
        idx = torch.randint(23, (2, 9))
        with torch.device("meta"):
            twin = GPT(model.config)
        assert all(p.is_meta for p in twin.parameters())
        twin.load_state_dict(model.state_dict(), assign=True)
        twin.tie_weights()
        assert twin.get_num_params() == model.get_num_params()
        assert twin.transformer.wte.weight is twin.lm_head.weight
        if model.config.mla_share_latent:
            first, second = twin.transformer.h
            assert first.attn.kv_latent_proj is second.attn.kv_latent_proj
        assert torch.equal(all_logits(twin, idx), all_logits(model, idx))


def test_absorbing_is_cheaper_where_it_multiplies_less():
    """The rule agrees with counting multiplications of causal pairs: absorbed for one token,
    expanded for a long prefill, unless the latents are narrower than the heads."""
    L, hs, r = 20, 6, 2
    attn = make({**TINY_MLA, "mla_latent_dim": L}).transformer.h[0].attn
    for T, S in itertools.product((1, 3, 9, 40), (40, 100, 3000)):
        pairs = sum(S - T + t + 1 for t in range(T))
        expanded = S * L * (2 * hs - r) + pairs * 2 * hs
        absorbed = T * L * (2 * hs - r) + pairs * 2 * (L + r)
        assert attn.absorbing_is_cheaper(T, S) == (absorbed < expanded)
    assert attn.absorbing_is_cheaper(1, 3000) and not attn.absorbing_is_cheaper(3000, 3000)
    narrow = make({**TINY_MLA, "mla_groups": 4, "mla_latent_dim": 3}).transformer.h[0].attn
    assert narrow.absorbing_is_cheaper(3000, 3000)


INVALID = [  # settings, and what the error has to name
    ({"n_head": 5}, ["n_head=5", "1, 2, 3, 4, 6"]),
    ({"n_embd": 20, "pos_emb": "rope"}, ["n_head=4", "even head size"]),
    ({"use_svd": True, "svd_rank": 7}, ["svd_rank=7", "from 1 to the head size 6"]),
    ({"use_mla": True, "mla_latent_dim": 48}, ["mla_latent_dim=48", "at most 47"]),
    ({**TINY_MLA, "mla_latent_dim": (7, 8, 9)}, ["mla_latent_dim=[7, 8, 9]", "of 2 layers"]),
    ({**TINY_MLA, "pos_emb": "learned"}, ["mla_rope_dim=2", "pos_emb='rope'"]),
    ({**TINY_MLA, "rope_freqs": (1.0, 0.5)}, ["rope_freqs=(1.0, 0.5)", "None or 1 numbers"]),
    ({**ROTARY_LATENT, "mla_rope_dim": 10}, ["mla_rope_dim=10", "latent's 8"]),
    ({"use_latent_tokens": True}, ["n_latent_tokens=None", "a number, such as 16"]),
    ({**LATENT_TOKENS, "pos_emb": "rope"}, ["pos_emb='rope'", "'learned'"]),
    ({"attention": "mqa"}, ["attention='mqa'", ", ".join(ATTENTION)]),
    ({**ROTARY_LATENT, "attention": "mla"}, ["mla_rope='latent'", "attention='mla'"]),
]


@pytest.mark.parametrize(("settings", "words"), INVALID, ids=str)
def test_invalid_shapes_say_what_would_work(settings, words):
    """ValueError with the field, the value and the remedy."""
    with pytest.raises(ValueError, match="does not work") as caught:
        tiny_config(**settings)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_grad_checkpoint_changes_no_gradient():
    """Recomputed activations give the same loss and gradients."""
    model = make(TINY_MLA).train()
    idx = torch.randint(23, (2, 16))
    grads = []
    for on in (False, True):
        model.grad_checkpoint = on
        model.zero_grad()
        model(idx, idx)[1].backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("settings", [{}, TINY_MLA, {**TINY_MLA, "mla_groups": 2}], ids=str)
def test_cuda_equals_cpu(settings):
    """The same logits on the GPU, cached and uncached."""
    model = make(settings)
    idx = torch.randint(23, (2, 12))
    want = all_logits(model, idx)
    model.cuda()
    cache = model.make_cache(2, 12)
    with torch.no_grad():
        torch.testing.assert_close(all_logits(model, idx.cuda()).cpu(), want, atol=1e-4, rtol=1e-3)
        for t in range(12):
            got = model(idx[:, t : t + 1].cuda(), cache=cache)[0]
            torch.testing.assert_close(got[:, 0].cpu(), want[:, t], atol=1e-4, rtol=1e-3)
