"""The model against itself along other paths, and against transformers. Run: python -m pytest
tests/test_model.py"""

import itertools
import time

import pytest
import torch

from model import GPT, GPTConfig, KVCache, LatentCache
from tests.conftest import TINY, TINY_MLA, randomise, tiny_config


def grid():
    """Every valid combination of the attention's settings, at tiny sizes."""
    mha = itertools.product(["learned", "rope"], [None, 3, 6], [False, True])
    for pos, rank, bias in mha:
        yield {"pos_emb": pos, "use_svd": rank is not None, "svd_rank": rank, "bias": bias}
    latent = itertools.product(
        [("learned", 0), ("rope", 2), ("rope", 0)], [1, 2, 4], ["rmsnorm", "layernorm", "none"]
    )
    rest = itertools.product([False, True], [None, 10], [None, 3])
    for ((pos, r), groups, norm), (share, q_latent, rank) in itertools.product(latent, rest):
        yield {
            "pos_emb": pos,
            "mla_rope_dim": r,
            "use_mla": True,
            "mla_latent_dim": 7,
            "mla_groups": groups,
            "mla_norm": norm,
            "mla_share_latent": share,
            "mla_q_latent_dim": q_latent,
            "use_svd": rank is not None,
            "svd_rank": rank,
            "bias": share,
        }


LATENT_TOKENS = {"use_latent_tokens": True, "n_latent_tokens": 5}


def family():
    """What the later settings add to the grid: grouped heads, other blocks, the rotary latent."""
    for heads, pos, rank in itertools.product([1, 2], ["learned", "rope"], [None, 3]):
        yield {"n_kv_head": heads, "pos_emb": pos, "use_svd": rank is not None, "svd_rank": rank}
    yield {"head_dim": 8, "n_kv_head": 2, "pos_emb": "rope", "bias": False}
    yield {"head_dim": 5, "n_embd": 22, "n_kv_head": 1, "use_svd": True, "svd_rank": 2}
    llama = {"norm": "rmsnorm", "mlp": "swiglu", "pos_emb": "rope", "tie_weights": False}
    yield {**llama, "n_kv_head": 2, "bias": False, "norm_eps": 1e-3}
    yield {**llama, "mlp_hidden": 40}
    for settings in ({}, {"mla_groups": 2}, {"use_svd": True, "svd_rank": 3}):
        yield {**TINY_MLA, **llama, "mla_nope_dim": 9, "head_dim": 8, **settings}
        yield {**TINY_MLA, "mla_nope_dim": 3, "mla_rope_dim": 6, **settings}
    latent = {"use_mla": True, "pos_emb": "rope", "mla_rope": "latent"}
    widths = itertools.product([(8, None), (7, 4)], [1, 2, 4], [None, 10], [False, True], [None, 3])
    for (L, r), groups, q_latent, share, rank in widths:
        yield {
            **latent, "mla_latent_dim": L, "mla_rope_dim": r, "mla_groups": groups, "bias": share,
            "mla_q_latent_dim": q_latent, "mla_share_latent": share, "use_svd": rank is not None,
            "svd_rank": rank,
        }  # fmt: skip
    yield {**latent, "mla_latent_dim": 6, "mla_norm": "layernorm", "head_dim": 5}
    for m, blocks in itertools.product([1, 5], [{}, {"norm": "rmsnorm", "mlp": "swiglu"}]):
        yield {"use_latent_tokens": True, "n_latent_tokens": m, **blocks}
    yield {"use_latent_tokens": True, "n_latent_tokens": 3, "head_dim": 5, "bias": False}


def by_layer():
    """A latent width for every layer, and rotary pairs of chosen frequencies."""
    for extra in ({}, {"mla_groups": 2}, {"mla_q_latent_dim": 5}, {"use_svd": True, "svd_rank": 3}):
        yield {**TINY_MLA, "mla_latent_dim": (7, 3), **extra}
        yield {**TINY_MLA, "mla_rope": "latent", "mla_latent_dim": (4, 9), **extra}
    yield {"use_mla": True, "mla_latent_dim": (5, 11, 1), "n_layer": 3, "mla_norm": "none"}
    freqs = {"pos_emb": "rope", "rope_freqs": (1.0, 1.0, 0.3)}
    yield {**freqs, "n_kv_head": 2}
    yield {**TINY_MLA, **freqs, "mla_rope_dim": 6, "mla_nope_dim": 5}
    yield {**TINY_MLA, **freqs, "mla_rope": "latent", "mla_latent_dim": 9, "mla_rope_dim": 6}


GRID = [*grid(), *family(), *by_layer()]


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


def make(settings):
    return randomise(GPT(tiny_config(**settings)))


def all_logits(model, idx):
    return model(idx, idx)[0]


def name(settings):
    return ",".join(f"{k}={v}" for k, v in settings.items() if v not in (None, False))


@pytest.mark.parametrize("settings", GRID, ids=name)
def test_whole_grid(settings):
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
            assert torch.equal(changed[:, :t], full[:, :t]) and not torch.allclose(
                changed[:, t], full[:, t]
            )
        # A prompt in two pieces, cut everywhere, and in pieces of every size; nothing but the cache
        # connects them.
        pieces = [(t, 12 - t) for t in range(1, 12)] + [(1,) * 12, (3,) * 4, (5, 1, 1, 5)]
        for sizes in pieces:
            cache, end = model.make_cache(3, 12), 0
            for size in sizes:
                logits, _ = model(idx[:, end : end + size], cache=cache)
                end += size
                assert cache.pos == end
                torch.testing.assert_close(logits[:, 0], full[:, end - 1], atol=1e-5, rtol=1e-4)
        numbers = numbers_by_hand(cfg)
        assert cache.bytes_per_token == pytest.approx(cfg.n_layer * numbers * 4)
        state = 4 * 2 * cfg.hs * (cfg.n_latent_tokens or 0)
        assert cache.nbytes == 3 * (12 * cache.bytes_per_token + 2 * state * 4)
        if cfg.attention_name == "mla":
            x, attn = torch.randn(3, 12, cfg.n_embd), model.transformer.h[1].attn
            torch.testing.assert_close(
                attn(x, absorb=True), attn(x, absorb=False), atol=1e-5, rtol=1e-4
            )
    model.train()(idx, idx)[1].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    twin = GPT(tiny_config(**settings))
    twin.load_state_dict(model.state_dict())
    assert torch.equal(all_logits(twin.eval(), idx), all_logits(model.eval(), idx))


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
        ({}, {"use_svd": True, "svd_rank": 3}),
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
        (LATENT_TOKENS, {**LATENT_TOKENS, "n_latent_tokens": 6}),
        (TINY_MLA, {**TINY_MLA, "mla_nope_dim": 6}),
        (TINY_MLA, {**TINY_MLA, "mla_rope": "latent", "mla_latent_dim": 8}),
        ({"pos_emb": "rope"}, {"pos_emb": "rope", "rope_theta": 100.0}),
        (TINY_MLA, {**TINY_MLA, "mla_latent_dim": 9}),
        (TINY_MLA, {**TINY_MLA, "mla_groups": 2}),
        (TINY_MLA, {**TINY_MLA, "mla_rope_dim": 4}),
        (TINY_MLA, {**TINY_MLA, "mla_q_latent_dim": 10}),
        (TINY_MLA, {**TINY_MLA, "mla_norm": "layernorm"}),
        (TINY_MLA, {**TINY_MLA, "mla_norm": "none"}),
        (TINY_MLA, {**TINY_MLA, "mla_share_latent": True}),
        (TINY_MLA, {**TINY_MLA, "use_svd": True, "svd_rank": 3}),
        (
            {"use_svd": True, "svd_rank": 3},
            {"use_svd": True, "svd_rank": 3, "svd_method": "randomized"},
        ),
    ],
)
def test_no_setting_is_dead(base, change):
    """Each setting changes what a model with the same seed computes, or how many parameters it
    has."""
    outputs = []
    for settings in (base, change):
        torch.manual_seed(5)
        model = GPT(tiny_config(**settings)).eval()
        torch.manual_seed(6)
        for p in model.parameters():
            p.data.add_(torch.randn_like(p), alpha=0.2) if settings.get(
                "svd_method"
            ) is None else None
        outputs.append((model.get_num_params(), all_logits(model, torch.arange(12)[None])))
    assert outputs[0][0] != outputs[1][0] or not torch.equal(outputs[0][1], outputs[1][1])


def test_gpt2_parity():
    """MHA with learned positions is transformers' GPT-2, random weights, 1e-5 in float32."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(3)
    theirs = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=23,
            n_positions=16,
            n_embd=24,
            n_layer=2,
            n_head=4,
            activation_function="gelu",
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    randomise(theirs, 0.1)
    ours = GPT(tiny_config()).eval()
    state = {
        k: v
        for k, v in theirs.state_dict().items()
        if not k.endswith((".attn.bias", ".attn.masked_bias"))
    }
    turned = (
        "c_attn.weight",
        "c_proj.weight",
        "c_fc.weight",
    )  # transformers' Conv1D keeps (in, out)
    state = {k: v.t() if k.endswith(turned) else v for k, v in state.items()}
    ours.load_state_dict(state)
    idx = torch.randint(23, (3, 16))
    with torch.no_grad():
        torch.testing.assert_close(all_logits(ours, idx), theirs(idx).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("q_latent", [None, 12])
@pytest.mark.parametrize(("r", "nope"), [(4, 6), (6, 4), (6, 9), (12, 3)])
def test_deepseek_parity(q_latent, r, nope):
    """MLA is transformers' DeepseekV3Attention with copied weights, at once and step by step, 1e-5
    in float32."""
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek

    nh, hs, L, C, T = 5, 10, 14, 50, 9
    theirs_cfg = DeepseekV3Config(
        hidden_size=C,
        num_attention_heads=nh,
        num_key_value_heads=nh,
        q_lora_rank=q_latent,
        kv_lora_rank=L,
        qk_rope_head_dim=r,
        qk_nope_head_dim=nope,
        v_head_dim=hs,
        rope_interleave=False,
        attention_bias=False,
        max_position_embeddings=32,
        attn_implementation="eager",
        num_hidden_layers=1,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    theirs = randomise(deepseek.DeepseekV3Attention(theirs_cfg, 0), 0.2)
    model = GPT(
        GPTConfig(
            block_size=32,
            vocab_size=11,
            n_layer=1,
            n_head=nh,
            n_embd=C,
            bias=False,
            pos_emb="rope",
            use_mla=True,
            mla_latent_dim=L,
            mla_rope_dim=r,
            mla_q_latent_dim=q_latent,
            mla_nope_dim=nope,
        )
    ).eval()
    ours = model.transformer.h[0].attn
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

    x = torch.randn(3, T, C)
    rotary = deepseek.DeepseekV3RotaryEmbedding(theirs_cfg)(x, torch.arange(T)[None])
    mask = torch.full((T, T), float("-inf")).triu(1)[None, None]
    with torch.no_grad():
        want = theirs(x, position_embeddings=rotary, attention_mask=mask)[0]
        torch.testing.assert_close(ours(x), want, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours(x, absorb=True), want, atol=1e-5, rtol=1e-5)
        cache = model.make_cache(3, T)
        for t in range(T):
            torch.testing.assert_close(
                ours(x[:, t : t + 1], cache), want[:, t : t + 1], atol=1e-5, rtol=1e-5
            )
            cache.advance(1)


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
    settings = {"n_layer": 1, "n_embd": C, "n_head": nh, "n_kv_head": nkv, "head_dim": hs}
    model = GPT(tiny_config(**settings, pos_emb="rope", rope_theta=500.0, bias=bias)).eval()
    ours, parts = model.transformer.h[0].attn, (theirs.q_proj, theirs.k_proj, theirs.v_proj)
    ours.c_attn.weight.data = torch.cat([p.weight for p in parts]).data
    ours.c_proj.weight.data = theirs.o_proj.weight.data
    if bias:
        ours.c_attn.bias.data = torch.cat([p.bias for p in parts]).data
        ours.c_proj.bias.data = theirs.o_proj.bias.data
    x = torch.randn(3, T, C)
    rotary = llama.LlamaRotaryEmbedding(theirs_cfg)(x, torch.arange(T)[None])
    mask = torch.full((T, T), float("-inf")).triu(1)[None, None]
    with torch.no_grad():
        want = theirs(x, position_embeddings=rotary, attention_mask=mask)[0]
        torch.testing.assert_close(ours(x), want, atol=1e-5, rtol=1e-5)
        cache = model.make_cache(3, T)
        assert cache.tensors[0].shape == (1, 3, nkv, T, hs)
        for t in range(T):
            got = ours(x[:, t : t + 1], cache)
            torch.testing.assert_close(got, want[:, t : t + 1], atol=1e-5, rtol=1e-5)
            cache.advance(1)


def rotate_by_hand(x, position, theta=10000.0):
    """x (r,) rotated: number i pairs with number i + r / 2 and turns by position *
    theta^(-2i/r)."""
    half, out = len(x) // 2, x.clone()
    for i in range(half):
        angle = torch.tensor(position * theta ** (-2 * i / len(x)), dtype=torch.float64)
        out[i] = x[i] * angle.cos() - x[i + half] * angle.sin()
        out[i + half] = x[i + half] * angle.cos() + x[i] * angle.sin()
    return out


@pytest.mark.parametrize(("L", "r", "G"), [(8, 8, 1), (9, 4, 1), (6, 2, 2)])
def test_rotary_latent_by_a_loop(L, r, G):
    """Position by position and head by head in float64, as the class's equations say."""
    settings = {"n_layer": 1, "use_mla": True, "pos_emb": "rope", "mla_rope": "latent"}
    sizes = {"mla_latent_dim": L, "mla_rope_dim": r, "mla_groups": G}
    attn = make({**settings, **sizes, "bias": False}).transformer.h[0].attn.double()
    T, nh, hs = 7, 4, 6
    x = torch.randn(1, T, 24, dtype=torch.float64)

    def turn(v, position):
        return torch.cat([v[: L - r], rotate_by_hand(v[L - r :], position)])

    with torch.no_grad():
        q = (x[0] @ attn.q_proj.weight.T).view(T, nh, L)
        c = (x[0] @ attn.kv_latent_proj.weight.T).view(T, G, L)
        c = c / (c.square().mean(-1, keepdim=True) + 1e-6).sqrt() * attn.latent_norm.weight
        values, want = attn.v_expand.weight.view(nh, hs, L), torch.zeros(T, nh * hs).double()
        for i, h in itertools.product(range(T), range(nh)):
            rows = torch.stack([turn(c[j, h // (nh // G)], j) for j in range(i + 1)])
            p = (rows @ turn(q[i, h], i) / L**0.5).softmax(0)
            want[i, h * hs : (h + 1) * hs] = values[h] @ turn(p @ rows, -i)
        want = want @ attn.c_proj.weight.T
        torch.testing.assert_close(attn(x)[0], want, atol=1e-12, rtol=1e-12)


def test_rotary_latent_depends_on_distances_only():
    """All positions shifted by the same number give the same output; other distances do not."""
    settings = {**TINY_MLA, "mla_rope": "latent", "mla_latent_dim": 8, "mla_rope_dim": 6}
    model, x = make(settings), torch.randn(2, 7, 24)
    attn, tables = model.transformer.h[0].attn, (model.rope_cos, model.rope_sin)
    shifted = attn(x, rotation=tuple(t[5:12] for t in tables))
    torch.testing.assert_close(shifted, attn(x), atol=1e-5, rtol=1e-4)
    stretched = attn(x, rotation=tuple(t[[0, 1, 2, 3, 5, 6, 7]] for t in tables))
    assert not torch.allclose(stretched[:, 4:], attn(x)[:, 4:], atol=1e-3)


GRADCHECK = [
    {"n_kv_head": 2, "pos_emb": "rope"}, {"head_dim": 4, "n_kv_head": 1}, TINY_MLA,
    {**TINY_MLA, "mla_nope_dim": 3, "mla_groups": 2},
    {**TINY_MLA, "mla_rope": "latent", "mla_latent_dim": 8, "mla_groups": 2},
    {**TINY_MLA, "mla_rope": "latent", "mla_rope_dim": 4, "use_svd": True, "svd_rank": 2},
]  # fmt: skip


@pytest.mark.parametrize("settings", GRADCHECK, ids=name)
def test_gradients_by_finite_differences(settings):
    """One block in float64, attention, norms and MLP, with respect to its input."""
    blocks = {"norm": "rmsnorm", "mlp": "swiglu"} if "n_kv_head" in settings else {}
    model = GPT(tiny_config(**{**settings, **blocks, "n_layer": 1})).double().eval()
    block = model.transformer.h[0]
    x = torch.randn(1, 4, 24, dtype=torch.float64, requires_grad=True)
    rotation = (model.rope_cos[:4], model.rope_sin[:4]) if model.config.rotary_dim else None
    assert torch.autograd.gradcheck(lambda x: block(x, None, rotation), (x,), atol=1e-6)


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("mla", [False, True])
def test_last_token_leaks_nowhere(mla, rank):
    """With SVD on, another last token leaves all earlier logits bit-identical."""
    settings = {**(TINY_MLA if mla else {}), "use_svd": True, "svd_rank": rank}
    model, idx = make(settings), torch.randint(23, (3, 16))
    other = idx.clone()
    other[:, -1] = (other[:, -1] + 1) % 23
    assert torch.equal(all_logits(model, idx)[:, :-1], all_logits(model, other)[:, :-1])


def test_groups_are_block_diagonal_joint_mla():
    """A latent per head equals one joint latent whose expansions are block-diagonal in the same
    numbers."""
    each = make(
        {
            "use_mla": True,
            "mla_latent_dim": 5,
            "mla_groups": 4,
            "pos_emb": "rope",
            "mla_rope_dim": 2,
            "mla_norm": "none",
        }
    )
    joint = make(
        {
            "use_mla": True,
            "mla_latent_dim": 20,
            "mla_groups": 1,
            "pos_emb": "rope",
            "mla_rope_dim": 2,
            "mla_norm": "none",
        }
    )
    state = each.state_dict()
    wide = ("k_expand.weight", "v_expand.weight")
    state = {
        k: torch.block_diag(*v.view(4, -1, 5)) if k.endswith(wide) else v for k, v in state.items()
    }
    joint.load_state_dict(state)
    idx = torch.randint(23, (2, 12))
    torch.testing.assert_close(all_logits(joint, idx), all_logits(each, idx), atol=1e-5, rtol=1e-5)


def test_fresh_svd_model_starts_from_a_dense_initialisation():
    """The product of the fresh factors at full rank has the variance a dense initialisation
    gives."""
    attn = (
        GPT(GPTConfig(n_layer=1, n_head=4, n_embd=128, vocab_size=11, use_svd=True))
        .transformer.h[0]
        .attn
    )
    product = attn.v_up @ attn.v_down.weight.view(4, 32, 128)
    assert product.std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize(
    "settings", [{}, {"use_svd": True, "svd_rank": 3}, TINY_MLA, {**TINY_MLA, "mla_groups": 2}]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reduced_cache_dtypes(settings, dtype):
    """A float32 model decodes on a half-size cache with a relative error below 2e-2."""
    model, idx = make(settings), torch.randint(23, (2, 14))
    with torch.no_grad():
        full, cache = all_logits(model, idx), model.make_cache(2, 14, dtype)
        model(idx[:, :6], cache=cache)
        logits = [model(idx[:, t : t + 1], cache=cache)[0] for t in range(6, 14)]
    assert cache.nbytes * 2 == model.make_cache(2, 14).nbytes and logits[0].dtype == torch.float32
    error = (torch.cat(logits, 1) - full[:, 6:]).norm() / full[:, 6:].norm()
    assert 0 < error < 2e-2


@pytest.mark.parametrize("groups", [1, 2])
def test_bfloat16_absorbed_against_float32_expanded(groups):
    """The decoding path in bfloat16 stays within 2e-2 of the training path in float32."""
    cfg = GPTConfig(
        block_size=700,
        vocab_size=11,
        n_layer=1,
        n_head=6,
        n_embd=192,
        pos_emb="rope",
        use_mla=True,
        mla_latent_dim=40,
        mla_rope_dim=8,
        mla_groups=groups,
    )
    attn = GPT(cfg).eval().transformer.h[0].attn
    for p in attn.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=p.size(1) ** -0.5)
    x = torch.randn(1, 600, 192)
    with torch.no_grad():
        want = attn(x, absorb=False)[:, -1:]
        attn.bfloat16()
        cache = LatentCache(cfg, 1, 700, torch.bfloat16, "cpu")
        attn(x[:, :-1].bfloat16(), cache)
        cache.advance(599)
        got = attn(x[:, -1:].bfloat16(), cache, absorb=True).float()
    assert (got - want).norm() / want.norm() < 2e-2


@pytest.mark.parametrize("threads", [1, 3, 5])
@pytest.mark.parametrize(("T", "length"), [(1, 2049), (3, 1500), (8, 5000)])
def test_split_keys_merge_to_the_same(T, length, threads):
    """Long contexts, cut into chunks for the cores, remainders and masks included, give the
    expanded result."""
    cfg = GPTConfig(
        block_size=5000,
        vocab_size=11,
        n_layer=1,
        n_head=4,
        n_embd=24,
        pos_emb="rope",
        use_mla=True,
        mla_latent_dim=7,
        mla_rope_dim=2,
    )
    attn = randomise(GPT(cfg)).transformer.h[0].attn
    x = torch.randn(2, length, 24)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            want = attn(x)[:, -T:]
            cache = LatentCache(cfg, 2, length, torch.float32, "cpu")
            attn(x[:, :-T], cache)
            cache.advance(length - T)
            torch.testing.assert_close(
                attn(x[:, -T:], cache, absorb=True), want, atol=1e-5, rtol=1e-4
            )
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def test_caches_refuse_before_they_write():
    """Full, of another model, kind, batch or dtype: an error, and content and position stay."""
    model, idx = make(TINY_MLA), torch.randint(23, (2, 6))
    cache = model.make_cache(2, 8)
    model(idx, cache=cache)
    before = [t.clone() for t in cache.tensors]
    with pytest.raises(ValueError, match="full: 6 tokens held, 3 to add, max_len=8"):
        model(idx[:, :3], cache=cache)
    with pytest.raises(ValueError, match="2 rows, the input 1"):
        model(idx[:1, :1], cache=cache)
    with pytest.raises(ValueError, match="needs a LatentCache, not a KVCache"):
        model(idx, cache=make({}).make_cache(2, 8))
    with pytest.raises(ValueError, match="another model"):
        make({**TINY_MLA, "mla_latent_dim": 9})(idx, cache=cache)
    with pytest.raises(ValueError, match="dtype"):
        model.make_cache(2, 8, torch.int32)
    with pytest.raises(ValueError, match="block_size=16"):
        model.make_cache(2, 17)
    with torch.enable_grad(), pytest.raises(RuntimeError, match="no_grad"):
        model(idx[:, :1], cache=cache)
    assert cache.pos == 6
    assert all(torch.equal(a, b) for a, b in zip(before, cache.tensors, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, TINY_MLA, {**TINY_MLA, "mla_groups": 2}])
def test_rewinding_a_cache(settings):
    """truncate and going on gives what a fresh cache gives; only methods move pos, within range."""
    model, idx = make(settings), torch.randint(23, (1, 10))
    cache = model.make_cache(1, 10)
    model(idx, cache=cache)
    cache.truncate(4)
    got = model(idx[:, 4:7] * 0 + 3, cache=cache)[0]
    want = all_logits(model, torch.cat([idx[:, :4], idx[:, 4:7] * 0 + 3], 1))[:, -1:]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    cache.truncate(0)
    assert cache.pos == 0
    with pytest.raises(AttributeError):
        cache.pos = 3
    for move in (cache.truncate, lambda T: cache.advance(T + 10), lambda T: cache.advance(-T)):
        with pytest.raises(ValueError, match="does not work"):
            move(1)
    assert cache.pos == 0


KINDS = [
    {}, {"pos_emb": "rope", "n_kv_head": 2}, {"use_svd": True, "svd_rank": 3}, TINY_MLA,
    {**TINY_MLA, "mla_groups": 2}, {**TINY_MLA, "mla_latent_dim": (7, 3)},
    {**TINY_MLA, "mla_rope": "latent", "mla_latent_dim": 8}, LATENT_TOKENS,
]  # fmt: skip


@pytest.mark.parametrize("grad_checkpoint", [False, True])
@pytest.mark.parametrize("settings", KINDS, ids=name)
def test_a_cache_takes_no_gradients(settings, grad_checkpoint):
    """An error with the remedy, in a GPT and in an attention alone; what the cache holds stays."""
    model, idx = make(settings), torch.randint(23, (2, 6))
    model.grad_checkpoint = grad_checkpoint
    cache = model.make_cache(2, 8)
    with torch.no_grad():
        model(idx, cache=cache)
    before = [t.clone() for t in cache.tensors]
    with pytest.raises(RuntimeError, match=r"torch\.no_grad or inference_mode"):
        model.train()(idx[:, :1], cache=cache)
    with pytest.raises(RuntimeError, match=r"torch\.no_grad or inference_mode"):
        model.transformer.h[0].attn(torch.randn(2, 1, 24), cache)
    assert cache.pos == 6 and getattr(cache, "pending", None) is None
    assert all(torch.equal(a, b) for a, b in zip(before, cache.tensors, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("settings", KINDS, ids=name)
def test_a_float64_model(settings):
    """It generates on its default cache, which is float64, and step by step on it its logits are
    those of the whole context, and those of rotary tables that were never float32."""
    model, idx = make({**settings, "block_size": 64}).double(), torch.randint(23, (2, 50))
    full, cache = all_logits(model, idx), model.make_cache(2, 50)
    assert cache.dtype == torch.float64 and model.generate(idx[:, :9], 20).shape == (2, 29)
    for t in range(50):
        logits = model(idx[:, t : t + 1], cache=cache)[0]
        torch.testing.assert_close(logits[:, 0], full[:, t], atol=1e-12, rtol=1e-12)
    if model.config.rotary_dim:
        angle = torch.outer(torch.arange(50).double(), model.config.frequencies)
        tables = (angle.cos(), angle.sin())
        for block in model.transformer.h:
            block.attn._rotation = lambda *args: tables
        torch.testing.assert_close(all_logits(model, idx), full, atol=1e-12, rtol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize(
    "settings", [{}, {"use_svd": True}, {"use_mla": True, "mla_latent_dim": 1}], ids=name
)
def test_one_head_of_one_number(settings, dtype):
    """One row, one head of width 1, token by token: what the whole context gives."""
    model, idx = make({**settings, "n_head": 1, "head_dim": 1}), torch.randint(23, (1, 5))
    full, cache = all_logits(model, idx), model.make_cache(1, 5, dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    for t in range(5):
        got = model(idx[:, t : t + 1], cache=cache)[0]
        torch.testing.assert_close(got[:, 0], full[:, t], atol=tolerance, rtol=tolerance)


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
    plain, idx = make({"pos_emb": "rope"}), torch.randint(23, (2, 16))
    given = GPT(tiny_config(pos_emb="rope", rope_freqs=plain.config.frequencies.tolist())).eval()
    given.load_state_dict(plain.state_dict())
    assert torch.equal(all_logits(given, idx), all_logits(plain, idx))


@torch.no_grad()
@pytest.mark.parametrize(
    "settings",
    [{}, TINY_MLA, {**TINY_MLA, "mla_groups": 2}, {**TINY_MLA, "mla_latent_dim": (7, 3)}],
)
def test_rows_of_a_cache(settings):
    """row(i) is a view with its own pos; broadcast_row copies one row's tokens to all."""
    model, idx = make(settings), torch.randint(23, (3, 8))
    cache = model.make_cache(3, 12)
    row = cache.row(1)
    model(idx[1:2, :7], cache=row)
    assert row.pos == 7 and cache.pos == 0 and row.nbytes * 3 == cache.nbytes
    cache.advance(7)
    cache.broadcast_row(1)
    got = model(idx[1:2, 7:].expand(3, -1), cache=cache)[0]
    want = model(idx[1:2])[0].expand(3, -1, -1)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    assert cache.nbytes_at(5) == 5 * 3 * cache.bytes_per_token == 5 * cache.nbytes // 12


@torch.no_grad()
@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("settings", KINDS, ids=name)
def test_rows_of_different_lengths(settings, dtype, T):
    """The first rows of a cache, each with its own number of tokens: what every row gives alone."""
    model, lengths = make(settings), [5, 0, 9, 1]
    model = model.double() if dtype == torch.float64 else model
    if dtype not in type(model.make_cache(1, 1)).DTYPES:
        return
    cache = model.make_cache(6, 16, dtype)
    idx = torch.randint(23, (4, 16))
    for i, n in enumerate(lengths):
        if n:
            model(idx[i : i + 1, :n], cache=cache.row(i))
    before = [t.clone() for t in cache.tensors]
    view, got = cache.rows(lengths), []
    for step in range(2):
        new = [idx[i, n + step * T : n + (step + 1) * T] for i, n in enumerate(lengths)]
        got.append(model(torch.stack(new), cache=view)[0])
    assert view.pos == 9 + 2 * T and view.lengths.tolist() == [n + 2 * T for n in lengths]
    exact = dtype in (torch.float64, torch.float32)
    for i, n in enumerate(lengths):
        alone = model.make_cache(1, 16, dtype)
        if n:
            model(idx[i : i + 1, :n], cache=alone)
        for step in range(2):
            new = idx[i : i + 1, n + step * T : n + (step + 1) * T]
            want = model(new, cache=alone)[0][0]
            tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 1e-3)
            if exact or n:  # a row that begins is rounded here, which it is not alone
                torch.testing.assert_close(got[step][i], want, atol=tolerance, rtol=10 * tolerance)
    for t, was in zip(cache.tensors, before, strict=True):
        assert torch.equal(t[:, 4:], was[:, 4:])
        if cache.grows:
            assert all(torch.equal(t[:, i, :, :n], was[:, i, :, :n]) for i, n in enumerate(lengths))


def test_attention_works_alone():
    """Both blocks used without a GPT make the rotary tables that GPT would give them."""
    for settings in ({"pos_emb": "rope"}, TINY_MLA):
        model, x = make(settings), torch.randn(2, 9, 24)
        attn, tables = model.transformer.h[0].attn, (model.rope_cos[:9], model.rope_sin[:9])
        assert torch.equal(attn(x), attn(x, rotation=tables))
        alone = type(attn)(model.config)
        alone.load_state_dict(attn.state_dict())
        assert torch.equal(alone(x), attn(x))


def test_built_on_the_meta_device_and_filled():
    """No weight is drawn; loaded with assign it is the same model, with its ties."""
    for settings in ({}, {**TINY_MLA, "mla_share_latent": True}, {"use_svd": True, "svd_rank": 2}):
        model, idx = make(settings), torch.randint(23, (2, 9))
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
    model = GPT(
        GPTConfig(n_layer=8, n_head=4, n_embd=128, vocab_size=500, block_size=300, bias=True)
    )
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
        ({"svd_rank": 0}, ["svd_rank=0", "at least 1"]),
        ({"pos_emb": "alibi"}, ["pos_emb='alibi'", "learned, rope"]),
        ({"mla_norm": "batch"}, ["mla_norm='batch'", "rmsnorm, layernorm, none"]),
        ({"svd_method": "fast"}, ["svd_method='fast'", "exact, randomized"]),
        ({"dropout": 1.0}, ["dropout=1.0"]),
        ({"n_layer": 0}, ["n_layer=0", "at least 1"]),
        ({"mla_latent_dim": 0}, ["mla_latent_dim=0", "at least 1"]),
        ({"n_embd": 20, "pos_emb": "rope"}, ["n_head=4", "even head size"]),
        ({"n_kv_head": 3}, ["n_kv_head=3", "1, 2, 4"]),
        ({"use_latent_tokens": True}, ["n_latent_tokens=None", "a number, such as 16"]),
        ({**LATENT_TOKENS, "pos_emb": "rope"}, ["pos_emb='rope'", "'learned'"]),
        ({**LATENT_TOKENS, "use_mla": True}, ["use_mla=True", "use_latent_tokens"]),
        ({**LATENT_TOKENS, "use_svd": True}, ["use_svd=True", "use_latent_tokens"]),
        ({"head_dim": 5, "pos_emb": "rope"}, ["head_dim=5", "even head size"]),
        ({"norm": "batch"}, ["norm='batch'", "layernorm, rmsnorm"]),
        ({"mlp": "relu"}, ["mlp='relu'", "gelu, swiglu"]),
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


def test_greedy_cached_equals_greedy_uncached():
    """The same tokens with and without the cache, up to block_size, for rows with prompts of their
    own."""
    torch.manual_seed(2)  # weights without a near tie between the two likeliest tokens
    for settings in ({}, TINY_MLA, {**TINY_MLA, "mla_groups": 2, "use_svd": True, "svd_rank": 3}):
        model, idx = make(settings), torch.randint(23, (3, 4))
        with_cache = model.generate(idx, 12, temperature=0)
        assert torch.equal(with_cache, model.generate(idx, 12, temperature=0, use_cache=False))
        assert with_cache.shape == (3, 16) and torch.equal(with_cache[:, :4], idx)


def test_generation_past_block_size():
    """A full context goes on with its last block_size // 2 tokens; a window is what the next token
    depends on."""
    model, idx = make(TINY_MLA), torch.randint(23, (2, 5))
    out = model.generate(idx, 40, temperature=0)
    assert out.shape == (2, 45)
    with torch.no_grad():
        assert torch.equal(out[:, 16], model(out[:, :16])[0][:, -1].argmax(-1))
        assert torch.equal(out[:, 17], model(out[:, 9:17])[0][:, -1].argmax(-1))  # 8 tokens kept
        long = torch.randint(23, (2, 30))
        assert torch.equal(
            model.generate(long, 1, temperature=0)[:, -1], model(long[:, -16:])[0][:, -1].argmax(-1)
        )


def test_stopping_and_seeds():
    """The same generator gives the same tokens; a stop token ends a row, all rows end the loop."""
    model, idx = make(TINY_MLA), torch.randint(23, (3, 2))

    def draw(**kw):
        return model.generate(
            idx, 12, temperature=1.5, generator=torch.Generator().manual_seed(4), **kw
        )

    drawn = draw()
    assert torch.equal(drawn, draw()) and not drawn.is_inference()
    stop = drawn[0, 5].item()
    stopped = draw(stop=stop)
    for row in stopped[:, 2:].tolist():
        assert stop not in row or set(row[row.index(stop) :]) == {stop}
    assert stopped.shape[1] <= drawn.shape[1]
    assert model.generate(idx[:1], 12, temperature=0, stop=range(23)).shape == (1, 3)


@pytest.mark.parametrize(
    "bad", [{"temperature": -1}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}]
)
def test_generate_refuses_bad_arguments(bad):
    """Out-of-range sampling settings raise before anything is computed."""
    with pytest.raises(ValueError, match="does not work"):
        make({}).generate(torch.zeros(1, 1, dtype=torch.long), 1, **bad)
    with pytest.raises(ValueError, match="at least one token"):
        make({}).generate(torch.zeros(1, 0, dtype=torch.long), 1)


def test_context_longer_than_block_size_is_refused():
    """forward says so instead of failing in an index."""
    with pytest.raises(ValueError, match="17 tokens do not fit block_size=16"):
        make({})(torch.zeros(1, 17, dtype=torch.long))


@pytest.mark.parametrize("settings", [{}, TINY_MLA])
def test_grad_checkpoint_changes_no_gradient(settings):
    """Recomputed activations give the same loss and gradients."""
    model, idx, grads = make(settings).train(), torch.randint(23, (2, 16)), []
    for on in (False, True):
        model.grad_checkpoint = on
        model.zero_grad()
        model(idx, idx)[1].backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_shared_latent_is_one_tensor():
    """All layers use layer 0's down-projection; it counts once."""
    shared, own = (GPT(tiny_config(**{**TINY_MLA, "mla_share_latent": on})) for on in (True, False))
    h = shared.transformer.h
    assert h[0].attn.kv_latent_proj is h[1].attn.kv_latent_proj
    assert own.get_num_params() - shared.get_num_params() == sum(
        p.numel() for p in h[0].attn.kv_latent_proj.parameters()
    )


def test_caches_are_the_right_kind():
    """MHA has a KVCache, MLA a LatentCache."""
    assert isinstance(make({}).make_cache(1, 4), KVCache) and isinstance(
        make(TINY_MLA).make_cache(1, 4), LatentCache
    )
    assert TINY["n_head"] != TINY_MLA["mla_latent_dim"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("settings", [{}, TINY_MLA, {**TINY_MLA, "mla_groups": 2}])
def test_cuda_equals_cpu(settings):
    """The same logits on the GPU, cached and uncached."""
    model, idx = make(settings), torch.randint(23, (2, 12))
    want = all_logits(model, idx)
    model.cuda()
    cache = model.make_cache(2, 12)
    with torch.no_grad():
        torch.testing.assert_close(all_logits(model, idx.cuda()).cpu(), want, atol=1e-4, rtol=1e-3)
        for t in range(12):
            got = model(idx[:, t : t + 1].cuda(), cache=cache)[0]
            torch.testing.assert_close(got[:, 0].cpu(), want[:, t], atol=1e-4, rtol=1e-3)
