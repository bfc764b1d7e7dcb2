"""The model against itself along other paths, and against transformers. Run: python -m pytest
tests/test_model.py"""

import itertools
import time
from dataclasses import asdict, replace

import pytest
import torch

from model import (
    ATTENTION,
    GPT,
    CausalSelfAttention,
    GPTConfig,
    MultiHeadLatentAttention,
)
from tests.conftest import (
    KINDS,
    TINY_MLA,
    all_logits,
    make,
    randomise,
    settings_name,
    tiny_config,
    torch_threads,
)

LATENT_TOKENS = KINDS["latent tokens"]
ROTARY_LATENT = {**TINY_MLA, "mla_rope": "latent", "mla_latent_dim": 8}
LLAMA = {"norm": "rmsnorm", "mlp": "swiglu", "tie_weights": False}
SVD = {"use_svd": True, "svd_rank": 3}


def choices(**fields):
    """A list of options: for each field the settings that choose one of its values."""
    return [[{field: value} for value in values] for field, values in fields.items()]


MHA_OPTIONS = [
    [{"pos_emb": "learned"}, {"pos_emb": "rope", "tie_weights": False}],
    [{}, SVD, {"use_svd": True, "svd_rank": 6}],
    [{}, {**LLAMA, "norm_eps": 1e-3}, {"mlp": "swiglu", "mlp_hidden": 40}],
    *choices(n_kv_head=[None, 1, 2], head_dim=[None, 8], bias=[True, False]),
]
LATENT_OPTIONS = [
    [{}, SVD],
    [{"bias": True}, {"bias": False, **LLAMA}],
    *choices(mla_groups=[1, 2, 4], mla_q_latent_dim=[None, 10], mla_share_latent=[False, True]),
    *choices(mla_norm=["rmsnorm", "layernorm", "none"]),
]
MLA_OPTIONS = [
    [{"pos_emb": "learned"}, {"pos_emb": "rope", "mla_rope_dim": 0},
     {"pos_emb": "rope", "mla_rope_dim": 2}, {"pos_emb": "rope", "mla_rope_dim": 6}],
    [{"mla_nope_dim": 3}, {"head_dim": 8}, {"mla_nope_dim": 9, "head_dim": 8}],
    *LATENT_OPTIONS,
]  # fmt: skip
ROTARY_OPTIONS = [
    [{"mla_latent_dim": 8, "mla_rope_dim": None}, {"mla_latent_dim": 7, "mla_rope_dim": 4}],
    *choices(head_dim=[None, 5]),
    *LATENT_OPTIONS,
]
TOKEN_OPTIONS = [
    [{}, LLAMA], *choices(n_latent_tokens=[1, 5], head_dim=[None, 5], bias=[True, False])
]  # fmt: skip


def pairwise(options):
    """Settings in which every two values of different options meet, few by a greedy choice."""
    values = [(i, j) for i, option in enumerate(options) for j in range(len(option))]
    to_meet = {pair for pair in itertools.combinations(values, 2) if pair[0][0] < pair[1][0]}
    while to_meet:
        chosen = dict(min(to_meet))  # the number of a value, by the number of its option
        for i, option in enumerate(options):
            if i not in chosen:
                newly_met = []
                for j in range(len(option)):
                    pairs = {tuple(sorted([(i, j), other])) for other in chosen.items()}
                    newly_met.append(len(pairs & to_meet))
                chosen[i] = newly_met.index(max(newly_met))
        to_meet -= set(itertools.combinations(sorted(chosen.items()), 2))
        settings = {}
        for i, j in sorted(chosen.items()):
            settings |= options[i][j]
        yield settings


def by_layer():
    """A latent width for every layer, and rotary pairs of chosen frequencies."""
    for extra in ({}, {"mla_groups": 2, "mla_q_latent_dim": 5}, SVD):
        yield {**TINY_MLA, "mla_latent_dim": (7, 3), **extra}
        yield {**TINY_MLA, "mla_rope": "latent", "mla_latent_dim": (4, 9), **extra}
    yield {"use_mla": True, "mla_latent_dim": (5, 11, 1), "n_layer": 3, "mla_norm": "none"}
    freqs = {"pos_emb": "rope", "rope_freqs": (1.0, 1.0, 0.3)}
    yield {**freqs, "n_kv_head": 2}
    yield {**TINY_MLA, **freqs, "mla_rope_dim": 6, "mla_nope_dim": 5}
    yield {**TINY_MLA, **freqs, "mla_rope": "latent", "mla_latent_dim": 9, "mla_rope_dim": 6}


def grid():
    """Every two settings of each attention together, and those of single layers."""
    yield from pairwise(MHA_OPTIONS)
    mla = {"use_mla": True, "mla_latent_dim": 7}
    for settings in pairwise(MLA_OPTIONS):
        yield {**mla, **settings}
    for settings in pairwise(ROTARY_OPTIONS):
        yield {**mla, "pos_emb": "rope", "mla_rope": "latent", **settings}
    for settings in pairwise(TOKEN_OPTIONS):
        yield {"use_latent_tokens": True, **settings}
    yield from by_layer()


GRID = [*grid()]


def numbers_by_hand(cfg):
    """Cached numbers per token and layer."""
    if cfg.use_latent_tokens:
        return 0
    if cfg.use_mla:
        beside = cfg.mla_rope_dim if cfg.mla_rope == "decoupled" else 0
        widths = cfg.mla_latent_dim
        widths = widths if isinstance(widths, tuple) else (widths,)
        return sum(cfg.mla_groups * L + beside for L in widths) / len(widths)
    return (cfg.n_kv_head or 4) * (cfg.hs + (cfg.svd_rank or cfg.hs))


@pytest.mark.parametrize("settings", GRID, ids=settings_name)
def test_every_two_settings_together(settings):
    """Causal; cached equals uncached however the prompt is cut; absorbed equals expanded; gradients
    reach everything; a state dict goes round; the cache is as large as the formula says."""
    model = make(settings)
    cfg = model.config
    idx = torch.randint(23, (3, 12))
    with torch.no_grad():
        full = all_logits(model, idx)
        # Every row is computed as it is alone.
        alone = torch.cat([all_logits(model, row[None]) for row in idx])
        torch.testing.assert_close(alone, full, atol=1e-5, rtol=1e-4)
        # Causality: another token t leaves all logits before t as they were, and changes those from
        # t on.
        for t in (5, 11):
            other = idx.clone()
            other[:, t] = (other[:, t] + 1) % 23
            changed = all_logits(model, other)
            assert torch.equal(changed[:, :t], full[:, :t])
            assert not torch.allclose(changed[:, t], full[:, t])
        # A prompt in two pieces, cut everywhere, and in pieces of every size; nothing but the cache
        # connects them.
        pieces = [(t, 12 - t) for t in range(1, 12)] + [(1,) * 12, (3,) * 4, (5, 1, 1, 5)]
        for sizes in pieces:
            cache = model.make_cache(3, 12)
            end = 0
            for size in sizes:
                logits, _ = model(idx[:, end : end + size], cache=cache)
                end += size
                assert cache.pos == end
                torch.testing.assert_close(logits[:, 0], full[:, end - 1], atol=1e-5, rtol=1e-4)
        assert cache.bytes_per_token == pytest.approx(cfg.n_layer * numbers_by_hand(cfg) * 4)
        state = 4 * 2 * cfg.hs * (cfg.n_latent_tokens or 0)
        assert cache.nbytes == 3 * (12 * cache.bytes_per_token + 2 * state * 4)
        if cfg.attention_name == "mla":
            x = torch.randn(3, 12, cfg.n_embd)
            attn = model.transformer.h[1].attn
            absorbed = attn(x, absorb=True)
            torch.testing.assert_close(absorbed, attn(x, absorb=False), atol=1e-5, rtol=1e-4)
    model.train()(idx, idx)[1].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    twin = GPT(tiny_config(**settings))
    twin.load_state_dict(model.state_dict())
    assert torch.equal(all_logits(twin.eval(), idx), all_logits(model.eval(), idx))


@torch.no_grad()
def test_all_logits():
    """Those of training, also of the new tokens on a cache; otherwise the last position's alone."""
    model = make("MLA")
    idx = torch.randint(23, (3, 12))
    full, loss = model(idx, all_logits=True)
    assert full.shape == (3, 12, 23) and loss is None
    with_targets, loss = model(idx, idx)
    assert torch.equal(full, with_targets) and loss > 0
    assert torch.equal(model(idx, idx, all_logits=True)[1], loss)
    last, loss = model(idx)
    torch.testing.assert_close(last, full[:, -1:])
    assert loss is None
    cache = model.make_cache(3, 12)
    model(idx[:, :7], cache=cache)
    got, _ = model(idx[:, 7:], cache=cache, all_logits=True)
    torch.testing.assert_close(got, full[:, 7:], atol=1e-5, rtol=1e-4)


RECORDED = {  # losses at iterations 0, 4 and 19, and the greedy tokens after 50
    "MHA": ({}, [3.13088, 2.30978, 0.5323], [16, 2, 13, 3, 3, 3, 18, 12]),
    "MLA": (TINY_MLA, [3.13453, 2.38123, 0.81766], [16, 2, 13, 3, 18, 12, 8, 6]),
    "MLA + SVD": (
        {**TINY_MLA, "use_svd": True, "svd_rank": 3},
        [3.153, 2.39368, 0.83089],
        [16, 2, 13, 3, 18, 12, 8, 6],
    ),
    "groups": (
        {**TINY_MLA, "mla_groups": 2},
        [3.15737, 2.404, 0.82957],
        [2, 13, 3, 18, 12, 8, 6, 6],
    ),
    "shared latent": (
        {**TINY_MLA, "mla_share_latent": True, "mla_q_latent_dim": 10},
        [3.14173, 2.3909, 0.84366],
        [2, 13, 3, 18, 12, 8, 6, 6],
    ),
}


@pytest.mark.parametrize("variant", RECORDED)
def test_what_a_seed_gives_stays(variant):
    """Initial weights, losses and greedy tokens of one seed are those of the first version."""
    settings, losses, tokens = RECORDED[variant]
    torch.manual_seed(0)
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


@pytest.mark.parametrize(
    ("base", "change"),
    [
        ({}, {"pos_emb": "rope"}),
        ({}, {"use_mla": True}),
        ({}, {"attention": "mla"}),
        ({}, SVD),
        ({}, {"bias": False}),
        ({}, {"gelu": "tanh"}),
        ({}, {"n_kv_head": 2}),
        ({}, {"head_dim": 8}),
        ({}, {"norm": "rmsnorm"}),
        ({}, {"norm_eps": 1e-2}),
        ({}, {"mlp": "swiglu"}),
        ({}, {"mlp_hidden": 50}),
        ({}, {"tie_weights": False}),
        ({}, LATENT_TOKENS),
        (LATENT_TOKENS, {"n_latent_tokens": 6}),
        ({"pos_emb": "rope"}, {"rope_theta": 100.0}),
        ({"pos_emb": "rope"}, {"rope_freqs": (1.0, 0.5, 0.2)}),
        (TINY_MLA, {"mla_nope_dim": 6}),
        (TINY_MLA, {"mla_rope": "latent", "mla_latent_dim": 8}),
        (TINY_MLA, {"mla_latent_dim": 9}),
        (TINY_MLA, {"mla_groups": 2}),
        (TINY_MLA, {"mla_rope_dim": 4}),
        (TINY_MLA, {"mla_q_latent_dim": 10}),
        (TINY_MLA, {"mla_norm": "layernorm"}),
        (TINY_MLA, {"mla_norm": "none"}),
        (TINY_MLA, {"mla_share_latent": True}),
        (TINY_MLA, SVD),
        ({**SVD, "head_dim": 20}, {"svd_method": "randomized"}),  # of small ones both are exact
    ],
)
def test_no_setting_is_dead(base, change):
    """Each setting changes what a model with the same seed computes, or how many parameters it
    has."""
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


NAMES = {
    "mha": ({"pos_emb": "rope", "n_kv_head": 2}, {}),
    "mla": ({"pos_emb": "rope", "mla_latent_dim": 7}, {"use_mla": True}),
    "rotary_latent": (
        {"pos_emb": "rope", "mla_latent_dim": 8},
        {"use_mla": True, "mla_rope": "latent"},
    ),
    "latent_tokens": ({"n_latent_tokens": 5}, {"use_latent_tokens": True}),
}


@pytest.mark.parametrize("attention", ATTENTION)
def test_a_name_is_what_the_flags_give(attention):
    """GPTConfig(attention=...) sets the flags, and builds the model that they build."""
    shape, flags = NAMES[attention]
    named = tiny_config(**shape, attention=attention)
    flagged = tiny_config(**shape, **flags)
    assert named.attention_name == flagged.attention_name == attention
    assert named == flagged and named.attention is None
    assert GPTConfig(**asdict(named)) == named  # as a checkpoint keeps it
    other = replace(named, attention="mha", use_mla=False, use_latent_tokens=False)
    assert other.attention_name == "mha"
    logits = []
    for config in (named, flagged):
        torch.manual_seed(0)
        model = GPT(config).eval()
        assert type(model.transformer.h[0].attn) is ATTENTION[attention]
        logits.append(all_logits(model, torch.arange(12)[None]))
    assert torch.equal(*logits)


def test_gpt2_parity():
    """MHA with learned positions is transformers' GPT-2, random weights, 1e-5 in float32."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 23, "n_positions": 16, "n_embd": 24, "n_layer": 2, "n_head": 4}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    theirs = GPT2LMHeadModel(GPT2Config(**sizes, **ends, activation_function="gelu"))
    randomise(theirs, 0.1)
    ours = GPT(tiny_config()).eval()
    state = {}
    for name, weight in theirs.state_dict().items():
        if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            weight = weight.t()  # transformers' Conv1D keeps (in, out)
        if not name.endswith((".attn.bias", ".attn.masked_bias")):
            state[name] = weight
    ours.load_state_dict(state)
    idx = torch.randint(23, (3, 16))
    with torch.no_grad():
        torch.testing.assert_close(all_logits(ours, idx), theirs(idx).logits, atol=1e-5, rtol=1e-5)


def equals_theirs(ours, theirs, rotary, T):
    """An attention alone is one of transformers', at once and step by step; its cache."""
    x = torch.randn(3, T, ours.config.n_embd)
    mask = torch.full((T, T), float("-inf")).triu(1)[None, None]
    near = {"atol": 1e-5, "rtol": 1e-5}
    with torch.no_grad():
        rotation = rotary(x, torch.arange(T)[None])
        want = theirs(x, position_embeddings=rotation, attention_mask=mask)[0]
        torch.testing.assert_close(ours(x), want, **near)
        cache = ours.new_cache(3, T)
        for t in range(T):
            got = ours(x[:, t : t + 1], cache)
            torch.testing.assert_close(got, want[:, t : t + 1], **near)
            cache.advance(1)
        if ours.config.use_mla:
            torch.testing.assert_close(ours(x, absorb=True), want, **near)
    return cache


@pytest.mark.parametrize(
    ("q_latent", "r", "nope"), [(None, 4, 6), (12, 6, 4), (None, 6, 9), (12, 12, 3)]
)
def test_deepseek_parity(q_latent, r, nope):
    """MLA is transformers' DeepseekV3Attention with copied weights, at once and step by step, 1e-5
    in float32."""
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek

    nh, hs, L, C = 5, 10, 14, 50
    theirs_cfg = DeepseekV3Config(
        hidden_size=C, num_attention_heads=nh, num_key_value_heads=nh, q_lora_rank=q_latent,
        kv_lora_rank=L, qk_rope_head_dim=r, qk_nope_head_dim=nope, v_head_dim=hs,
        rope_interleave=False, attention_bias=False, max_position_embeddings=32,
        attn_implementation="eager", num_hidden_layers=1,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    theirs = randomise(deepseek.DeepseekV3Attention(theirs_cfg, 0), 0.2)
    sizes = {"n_layer": 1, "n_head": nh, "n_embd": C, "bias": False}
    widths = {"mla_latent_dim": L, "mla_rope_dim": r, "mla_nope_dim": nope}
    shape = {**TINY_MLA, **sizes, **widths, "mla_q_latent_dim": q_latent}
    ours = MultiHeadLatentAttention(tiny_config(**shape)).eval()
    kv_b = theirs.kv_b_proj.weight.view(nh, nope + hs, L)
    ours.kv_latent_proj.weight.data = theirs.kv_a_proj_with_mqa.weight.data
    ours.latent_norm.weight.data = theirs.kv_a_layernorm.weight.data
    ours.k_expand.weight.data = kv_b[:, :nope].reshape(-1, L).data
    ours.v_expand.weight.data = kv_b[:, nope:].reshape(-1, L).data
    ours.c_proj.weight.data = theirs.o_proj.weight.data
    if q_latent is None:
        ours.q_proj.weight.data = theirs.q_proj.weight.data
    else:
        ours.q_latent_proj.weight.data = theirs.q_a_proj.weight.data
        ours.q_latent_norm.weight.data = theirs.q_a_layernorm.weight.data
        ours.q_expand.weight.data = theirs.q_b_proj.weight.data
    equals_theirs(ours, theirs, deepseek.DeepseekV3RotaryEmbedding(theirs_cfg), 9)


@pytest.mark.parametrize(("nkv", "bias"), [(1, False), (2, True), (6, False)])
def test_llama_attention_parity(nkv, bias):
    """Grouped heads are transformers' LlamaAttention with copied weights, whole and step by
    step."""
    from transformers import LlamaConfig
    from transformers.models.llama import modeling_llama as llama

    nh, hs, C, T = 6, 8, 54, 9
    theirs_cfg = LlamaConfig(
        hidden_size=C, num_attention_heads=nh, num_key_value_heads=nkv, head_dim=hs,
        attention_bias=bias, max_position_embeddings=32, attn_implementation="eager",
        rope_parameters={"rope_type": "default", "rope_theta": 500.0}, num_hidden_layers=1,
    )  # fmt: skip
    theirs = randomise(llama.LlamaAttention(theirs_cfg, 0), 0.2)
    sizes = {"n_embd": C, "n_head": nh, "n_kv_head": nkv, "head_dim": hs}
    config = tiny_config(**sizes, pos_emb="rope", rope_theta=500.0, bias=bias)
    ours = CausalSelfAttention(config).eval()
    parts = (theirs.q_proj, theirs.k_proj, theirs.v_proj)
    ours.c_attn.weight.data = torch.cat([p.weight for p in parts]).data
    ours.c_proj.weight.data = theirs.o_proj.weight.data
    if bias:
        ours.c_attn.bias.data = torch.cat([p.bias for p in parts]).data
        ours.c_proj.bias.data = theirs.o_proj.bias.data
    cache = equals_theirs(ours, theirs, llama.LlamaRotaryEmbedding(theirs_cfg), T)
    assert cache.tensors[0].shape == (3, nkv, T, hs)


def rotate_by_hand(x, position, theta=10000.0):
    """x (r,) rotated: number i pairs with number i + r / 2 and turns by position *
    theta^(-2i/r)."""
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


def test_rotary_latent_depends_on_distances_only():
    """All positions shifted by the same number give the same output; other distances do not."""
    model = make(ROTARY_LATENT, mla_rope_dim=6)
    x = torch.randn(2, 7, 24)
    attn = model.transformer.h[0].attn
    tables = (model.rope_cos, model.rope_sin)
    shifted = attn(x, rotation=tuple(t[5:12] for t in tables))
    torch.testing.assert_close(shifted, attn(x), atol=1e-5, rtol=1e-4)
    stretched = attn(x, rotation=tuple(t[[0, 1, 2, 3, 5, 6, 7]] for t in tables))
    assert not torch.allclose(stretched[:, 4:], attn(x)[:, 4:], atol=1e-3)


GRADCHECK = [
    {"n_kv_head": 2, "pos_emb": "rope", "norm": "rmsnorm", "mlp": "swiglu"},
    {"head_dim": 4, "n_kv_head": 1, **SVD},
    {**TINY_MLA, "mla_nope_dim": 3, "mla_groups": 2},
    {**ROTARY_LATENT, "mla_rope_dim": 4, "use_svd": True, "svd_rank": 2},
]


@pytest.mark.parametrize("settings", GRADCHECK, ids=settings_name)
def test_gradients_by_finite_differences(settings):
    """One block in float64, attention, norms and MLP, with respect to its input."""
    model = GPT(tiny_config(**settings)).double().eval()
    block = model.transformer.h[0]
    x = torch.randn(1, 4, 24, dtype=torch.float64, requires_grad=True)
    rotation = (model.rope_cos[:4], model.rope_sin[:4]) if model.config.rotary_dim else None
    assert torch.autograd.gradcheck(lambda x: block(x, None, rotation), (x,), atol=1e-6)


def test_groups_are_block_diagonal_joint_mla():
    """A latent per head equals one joint latent whose expansions are block-diagonal in the same
    numbers."""
    each = make({**TINY_MLA, "mla_latent_dim": 5, "mla_groups": 4, "mla_norm": "none"})
    joint = make({**TINY_MLA, "mla_latent_dim": 20, "mla_norm": "none"})
    state = each.state_dict()
    for name, weight in state.items():
        if name.endswith(("k_expand.weight", "v_expand.weight")):
            state[name] = torch.block_diag(*weight.view(4, -1, 5))
    joint.load_state_dict(state)
    idx = torch.randint(23, (2, 12))
    torch.testing.assert_close(all_logits(joint, idx), all_logits(each, idx), atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("groups", [1, 2])
def test_bfloat16_absorbed_against_float32_expanded(groups):
    """The decoding path in bfloat16 stays within 2e-2 of the training path in float32."""
    sizes = {"n_head": 6, "n_embd": 192, "mla_latent_dim": 40, "mla_rope_dim": 8}
    attn = make({**TINY_MLA, **sizes, "mla_groups": groups}).transformer.h[0].attn
    for p in attn.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=p.size(1) ** -0.5)
        else:
            torch.nn.init.constant_(p, float(p is attn.latent_norm.weight))
    x = torch.randn(1, 600, 192)
    want = attn(x, absorb=False)[:, -1:]
    attn.bfloat16()
    cache = attn.new_cache(1, 700, torch.bfloat16)
    attn(x[:, :-1].bfloat16(), cache)
    cache.advance(599)
    got = attn(x[:, -1:].bfloat16(), cache, absorb=True).float()
    assert (got - want).norm() / want.norm() < 2e-2


@torch.no_grad()
@pytest.mark.parametrize(("T", "length", "n"), [(1, 2049, 2), (3, 1500, 3), (8, 5000, 5)])
def test_split_keys_merge_to_the_same(T, length, n):
    """Long contexts, cut into chunks for the cores, remainders and masks included, give the
    expanded result."""
    attn = make("MLA").transformer.h[0].attn
    x = torch.randn(1, length, 24)
    with torch_threads(n):
        want = attn(x)[:, -T:]
        cache = attn.new_cache(1, length)
        attn(x[:, :-T], cache)
        cache.advance(length - T)
        got = attn(x[:, -T:], cache, absorb=True)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {"n_head": 10**9, "n_embd": 10**12}, {"n_head": 10**9 + 1, "n_embd": 10**12},
        {"n_head": 10**9, "n_kv_head": 7, "n_embd": 10**12}, {"n_layer": 10**12},
        {"n_head": 7, "n_embd": 2**11 * 3**4 * 5**9 * 11 * 13 * 17},  # hundreds of small divisors
        {"use_mla": True, "mla_groups": 7, "head_dim": 4, "n_head": 10**12}, {"n_embd": 10**309},
        {"n_layer": 10**12, "use_mla": True, "mla_latent_dim": (3, 4)},
    ],
)  # fmt: skip
def test_absurd_shapes_are_answered_at_once(settings):
    """GPTConfig loops over no size, and what it refuses is one line that can be read."""
    began = time.perf_counter()
    try:
        GPTConfig(**settings)
    except ValueError as error:
        assert len(str(error)) < 1000 and "\n" not in str(error)
    assert time.perf_counter() - began < 0.5


def test_equal_widths_are_one_and_given_frequencies_are_those_of_theta():
    """(7, 7) is 7, and the frequencies of rope_theta written out change nothing."""
    assert tiny_config(**{**TINY_MLA, "mla_latent_dim": (7, 7)}) == tiny_config(**TINY_MLA)
    plain = make({"pos_emb": "rope"})
    idx = torch.randint(23, (2, 16))
    given = GPT(tiny_config(pos_emb="rope", rope_freqs=plain.config.frequencies.tolist())).eval()
    given.load_state_dict(plain.state_dict())
    assert torch.equal(all_logits(given, idx), all_logits(plain, idx))


def test_built_on_the_meta_device_and_filled():
    """No weight is drawn; loaded with assign it is the same model, with its ties."""
    for settings in ({}, {**TINY_MLA, "mla_share_latent": True}, {"use_svd": True, "svd_rank": 2}):
        model = make(settings)
        idx = torch.randint(23, (2, 9))
        with torch.device("meta"):
            twin = GPT(model.config)
        assert all(p.is_meta for p in twin.parameters())
        twin.load_state_dict(model.state_dict(), assign=True)
        twin.tie_weights()
        assert twin.get_num_params() == model.get_num_params()
        assert twin.transformer.wte.weight is twin.lm_head.weight
        assert torch.equal(all_logits(twin.eval(), idx), all_logits(model, idx))


def test_initial_distributions():
    """Standard deviations as _init_weights states them, biases 0 and norms 1."""
    sizes = {"n_layer": 8, "n_head": 4, "n_embd": 128, "vocab_size": 500, "block_size": 300}
    model = GPT(GPTConfig(**sizes))
    for name, p in model.named_parameters():
        if p.dim() == 1:
            norm = ".ln_" in name and name.endswith("weight")
            assert torch.equal(p, torch.full_like(p, float(norm))), name
        else:
            std = 0.02 / 16**0.5 if name.endswith("c_proj.weight") else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.05), name


def pairs(T, S):
    """How many keys the last T of S tokens see."""
    return sum(S - T + t + 1 for t in range(T))


def test_absorbing_crossover():
    """The rule agrees with counting multiplications, of causal pairs only: absorbed for one token,
    expanded for a long prefill, unless the rows are narrower than the heads."""
    L, hs, r = 20, 6, 2
    attn = make({**TINY_MLA, "mla_latent_dim": L}).transformer.h[0].attn
    for T, S in itertools.product((1, 2, 3, 5, 9, 16, 40), (40, 100, 3000)):
        expanded = S * L * (2 * hs - r) + pairs(T, S) * 2 * hs
        absorbed = T * L * (2 * hs - r) + pairs(T, S) * 2 * (L + r)
        assert attn.absorbing_is_cheaper(T, S) == (absorbed < expanded)
    assert attn.absorbing_is_cheaper(1, 3000) and not attn.absorbing_is_cheaper(3000, 3000)
    for groups, L, cheaper in ((4, 3, True), (4, 5, False), (2, 3, True)):  # L + r against hs
        attn = make({**TINY_MLA, "mla_groups": groups, "mla_latent_dim": L}).transformer.h[0].attn
        assert attn.absorbing_is_cheaper(3000, 3000) == cheaper
    wide = {"mla_nope_dim": 3, "mla_rope_dim": 6, "mla_latent_dim": 2}  # keys of 9, values of 6
    assert make({**TINY_MLA, **wide}).transformer.h[0].attn.absorbing_is_cheaper(3000, 3000)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"n_head": 5}, ["n_head=5", "1, 2, 3, 4, 6"]),
        ({"use_mla": True, "mla_groups": 3}, ["mla_groups=3", "1, 2, 4"]),
        ({"use_mla": True, "mla_latent_dim": 48}, ["mla_latent_dim=48", "at most 47"]),
        ({**TINY_MLA, "mla_groups": 4, "mla_latent_dim": 12}, ["mla_latent_dim=12", "at most 11"]),
        ({**TINY_MLA, "mla_rope_dim": 3}, ["mla_rope_dim=3", "even"]),
        ({**TINY_MLA, "mla_rope_dim": 6}, ["mla_rope_dim=6", "below the head size 6"]),
        ({**TINY_MLA, "pos_emb": "learned"}, ["mla_rope_dim=2", "pos_emb='rope'"]),
        ({"use_svd": True, "svd_rank": 7}, ["svd_rank=7", "from 1 to the head size 6"]),
        ({"pos_emb": "alibi"}, ["pos_emb='alibi'", "learned, rope"]),
        ({"dropout": 1.0}, ["dropout=1.0"]),
        ({"n_layer": 0}, ["n_layer=0", "at least 1"]),
        ({"n_embd": 20, "pos_emb": "rope"}, ["n_head=4", "even head size"]),
        ({"n_kv_head": 3}, ["n_kv_head=3", "1, 2, 4"]),
        ({"use_latent_tokens": True}, ["n_latent_tokens=None", "a number, such as 16"]),
        ({**LATENT_TOKENS, "pos_emb": "rope"}, ["pos_emb='rope'", "'learned'"]),
        ({**LATENT_TOKENS, "use_mla": True}, ["use_mla=True", "use_latent_tokens"]),
        ({"attention": "mqa"}, ["attention='mqa'", ", ".join(ATTENTION)]),
        ({"attention": "mha", "use_mla": True}, ["use_mla=True", "attention='mha'"]),
        ({"attention": "mla", **LATENT_TOKENS}, ["use_latent_tokens=True", "attention='mla'"]),
        ({"attention": "latent_tokens", "n_latent_tokens": 5, "use_mla": True}, ["use_mla=True"]),
        ({**ROTARY_LATENT, "attention": "mla"}, ["mla_rope='latent'", "attention='mla'"]),
        ({**LATENT_TOKENS, "use_svd": True}, ["use_svd=True", "use_latent_tokens"]),
        ({"head_dim": 5, "pos_emb": "rope"}, ["head_dim=5", "even head size"]),
        ({"norm_eps": 0.0}, ["norm_eps=0.0", "above 0"]),
        ({"use_mla": True, "mla_rope": "latent"}, ["mla_rope='latent'", "pos_emb='rope'"]),
        ({**TINY_MLA, "mla_rope": "latent", "mla_rope_dim": None}, ["mla_latent_dim=7", "even"]),
        ({**TINY_MLA, "mla_rope": "latent", "mla_rope_dim": 10}, ["mla_rope_dim=10", "latent's 7"]),
        ({**TINY_MLA, "mla_rope": "latent", "mla_nope_dim": 4}, ["mla_nope_dim=4", "None"]),
        ({**TINY_MLA, "mla_rope": "latent", "mla_latent_dim": 48}, ["mla_latent_dim=48", "47"]),
        ({**TINY_MLA, "mla_latent_dim": (7, 48)}, ["mla_latent_dim=48", "at most 45"]),
        ({**TINY_MLA, "mla_latent_dim": (7, 8, 9)}, ["mla_latent_dim=[7, 8, 9]", "of 2 layers"]),
        ({**TINY_MLA, "mla_latent_dim": (7, 0)}, ["mla_latent_dim=(7, 0)", "at least 1"]),
        (
            {**TINY_MLA, "mla_latent_dim": (7, 5), "mla_share_latent": True},
            ["mla_latent_dim=[7, 5]", "must be one number"],
        ),
        ({**TINY_MLA, "rope_freqs": (1.0, 0.5)}, ["rope_freqs=(1.0, 0.5)", "None or 1 numbers"]),
        ({"pos_emb": "rope", "rope_freqs": (1.0, 0.5, -1.0)}, ["rope_freqs", "above 0"]),
        (
            {"use_mla": True, "pos_emb": "rope", "head_dim": 3},
            ["mla_rope_dim=None", "2 with mla_nope_dim=3, or 0 for no positions"],
        ),
    ],
)
def test_invalid_shapes_say_what_would_work(settings, words):
    """ValueError with the field, the value and the remedy."""
    with pytest.raises(ValueError, match="does not work") as caught:
        tiny_config(**settings)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_defaults_that_depend_on_the_shape():
    """The latent's default makes a 4x smaller cache; the rotary key's is the even number at or
    below half a head."""
    cfg = tiny_config(use_mla=True, pos_emb="rope")
    assert (cfg.mla_latent_dim, cfg.mla_rope_dim) == (12, 2)
    assert tiny_config(use_mla=True, mla_groups=2).mla_latent_dim == 6
    assert tiny_config(use_mla=True).mla_rope_dim == 0


def test_context_longer_than_block_size_is_refused():
    """forward says so instead of failing in an index."""
    with pytest.raises(ValueError, match="17 tokens do not fit block_size=16"):
        make({})(torch.zeros(1, 17, dtype=torch.long))


@pytest.mark.parametrize("settings", [{}, TINY_MLA])
def test_grad_checkpoint_changes_no_gradient(settings):
    """Recomputed activations give the same loss and gradients."""
    model = make(settings).train()
    idx = torch.randint(23, (2, 16))
    grads = []
    for on in (False, True):
        model.grad_checkpoint = on
        model.zero_grad()
        model(idx, idx)[1].backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_shared_latent_is_one_tensor():
    """All layers use layer 0's down-projection; it counts once."""
    shared = make(TINY_MLA, mla_share_latent=True)
    first, second = shared.transformer.h
    assert first.attn.kv_latent_proj is second.attn.kv_latent_proj
    once = sum(p.numel() for p in first.attn.kv_latent_proj.parameters())
    assert make(TINY_MLA).get_num_params() - shared.get_num_params() == once


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("settings", [{}, TINY_MLA, {**TINY_MLA, "mla_groups": 2}])
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
