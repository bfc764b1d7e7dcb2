"""What attention keeps of past tokens. Run: python -m pytest tests/test_cache.py"""

import pytest
import torch

from model import ATTENTION
from tests.conftest import GROWING, KINDS, all_logits, make

NEAR = {"atol": 1e-5, "rtol": 1e-4}
ALONE = {  # an attention's settings, by its name
    "mha": KINDS["GQA, rotary"],
    "mla": KINDS["MLA"],
    "rotary_latent": KINDS["rotary latent, groups"],
    "split_latents": KINDS["split latents, groups"],
    "latent_tokens": KINDS["latent tokens"],
}


def copies(cache):
    return [t.clone() for t in cache.tensors]


def unchanged(cache, before):
    return all(torch.equal(a, b) for a, b in zip(cache.tensors, before, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("attention", ATTENTION)
def test_an_attention_alone_on_its_own_cache(attention):
    """new_cache and advance, without a GPT: cached equals uncached, a repeated pass counts once,
    and a full cache is refused before anything is written."""
    attn = make(ALONE[attention]).transformer.h[1].attn
    x = torch.randn(3, 9, 24)
    want = attn(x)
    cache = attn.new_cache(3, 9)
    end = 0
    for size in (4, 1, 4):
        for _ in range(2):
            got = attn(x[:, end : end + size], cache)
            torch.testing.assert_close(got, want[:, end : end + size], **NEAR)
        cache.advance(size)
        end += size
        assert cache.pos == end
    before = copies(cache)
    if cache.grows:
        with pytest.raises(ValueError, match="full: 9 tokens held, 1 to add, max_len=9"):
            attn(x[:, :1], cache)
    assert unchanged(cache, before)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_reduced_dtypes(kind, dtype):
    """A float32 model decodes on a half-size cache with a relative error below 2e-2."""
    model = make(kind)
    idx = torch.randint(23, (2, 14))
    full = all_logits(model, idx)
    cache = model.make_cache(2, 14, dtype)
    model(idx[:, :6], cache=cache)
    logits = [model(idx[:, t : t + 1], cache=cache)[0] for t in range(6, 14)]
    assert cache.nbytes * 2 == model.make_cache(2, 14).nbytes and logits[0].dtype == torch.float32
    error = (torch.cat(logits, 1) - full[:, 6:]).norm() / full[:, 6:].norm()
    assert 0 < error < 2e-2


@torch.no_grad()
@pytest.mark.parametrize("attention", ATTENTION)
def test_a_cache_refuses_before_it_writes(attention):
    """Full, of another batch or dtype, with gradients: an error with the remedy, and content and
    position stay."""
    model = make(ALONE[attention])
    idx = torch.randint(23, (2, 6))
    cache = model.make_cache(2, 8)
    model(idx, cache=cache)
    before = copies(cache)
    with pytest.raises(ValueError, match="full: 6 tokens held, 3 to add, max_len=8"):
        model(idx[:, :3], cache=cache)
    with pytest.raises(ValueError, match="2 rows, the input 1"):
        model(idx[:1, :1], cache=cache)
    with torch.enable_grad(), pytest.raises(RuntimeError, match="use torch.no_grad"):
        model(idx[:, :1], cache=cache)
    assert cache.pos == 6 and unchanged(cache, before)
    with pytest.raises(ValueError, match="max_len=17 .* block_size=16"):
        model.make_cache(2, 17)
    with pytest.raises(ValueError, match="dtype=torch.int32 does not work.*float32"):
        model.make_cache(2, 8, torch.int32)


OTHERS = [  # a model, and what the model that a cache was made for has instead
    ("MHA", {"use_mla": True, "mla_latent_dim": 7}),
    ("MLA", {"attention": "rotary_latent", "mla_latent_dim": 9}),  # as wide as 7 + 2
    ("latent tokens", {"n_latent_tokens": 6}),
]


@torch.no_grad()
@pytest.mark.parametrize(("kind", "changes"), OTHERS, ids=str)
def test_a_cache_is_for_models_of_one_shape(kind, changes):
    """Another's is refused before anything is written to it; a twin goes on with it."""
    model = make(kind)
    other = make(kind, **changes)
    idx = torch.randint(23, (2, 6))
    cache = other.make_cache(2, 9)
    other(idx[:, :5], cache=cache)
    before = copies(cache)
    with pytest.raises(ValueError, match="the cache was made for another model"):
        model(idx[:, :1], cache=cache)
    assert cache.pos == 5 and unchanged(cache, before)
    twin = make(kind, **changes)
    twin.load_state_dict(other.state_dict())
    torch.testing.assert_close(twin(idx[:, 5:], cache=cache)[0], other(idx)[0], **NEAR)


@torch.no_grad()
@pytest.mark.parametrize("kind", GROWING)
def test_rewinding(kind):
    """truncate and going on gives what a fresh cache gives; only methods move pos, within range."""
    model = make(kind)
    idx = torch.randint(23, (1, 10))
    cache = model.make_cache(1, 10)
    model(idx, cache=cache)
    cache.truncate(4)
    other = torch.full((1, 3), 3)
    got, _ = model(other, cache=cache)
    want, _ = model(torch.cat([idx[:, :4], other], dim=1))
    torch.testing.assert_close(got, want, **NEAR)
    cache.rewind(9)
    assert cache.pos == 7
    cache.rewind(2)
    assert {layer.pos for layer in cache.layers} == {2}
    for move, n in ((cache.truncate, 3), (cache.advance, 9)):
        with pytest.raises(ValueError, match="does not work"):
            move(n)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_float64_model(kind):
    """On its default cache, which is float64, its logits are those of the whole context, and those
    of rotary tables that were never float32."""
    model = make(kind, block_size=32).double()
    idx = torch.randint(23, (2, 25))
    full = all_logits(model, idx)
    cache = model.make_cache(2, 25)
    assert cache.dtype == torch.float64
    exact = {"atol": 1e-12, "rtol": 1e-12}
    for t in range(25):
        logits, _ = model(idx[:, t : t + 1], cache=cache)
        torch.testing.assert_close(logits[:, 0], full[:, t], **exact)
    if model.config.rotary_dim:
        angle = torch.outer(torch.arange(25).double(), model.config.frequencies)
        x = model.transformer.wte(idx)
        shared = model._shared()
        for block in model.transformer.h:
            x = block(x, rotation=(angle.cos(), angle.sin()), shared=shared)
        torch.testing.assert_close(model.lm_head(model.transformer.ln_f(x)), full, **exact)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_cache(kind):
    """row(i) is a view with its own pos; broadcast_row copies one sequence's tokens to all."""
    model = make(kind)
    idx = torch.randint(23, (3, 8))
    cache = model.make_cache(3, 12)
    row = cache.row(1)
    model(idx[1:2, :7], cache=row)
    assert row.pos == 7 and cache.pos == 0 and row.nbytes * 3 == cache.nbytes
    cache.advance(7)
    cache.broadcast_row(1)
    got, _ = model(idx[1:2, 7:].expand(3, -1), cache=cache)
    want, _ = model(idx[1:2])
    torch.testing.assert_close(got, want.expand(3, -1, -1), **NEAR)
    if cache.grows:
        assert cache.nbytes_at(5) == 5 * 3 * cache.bytes_per_token == 5 * cache.nbytes // 12


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "T"), [(torch.float64, 3), (torch.int8, 1)])
@pytest.mark.parametrize("kind", KINDS)
def test_sequences_of_different_lengths(kind, dtype, T):
    """The first of a cache, each with its own number of tokens: what every sequence gives alone."""
    model = make(kind)
    lengths = [5, 2, 9, 1]
    if dtype == torch.float64:
        model.double()
    if dtype == torch.int8 and kind not in GROWING:
        return
    cache = model.make_cache(6, 16, dtype)
    idx = torch.randint(23, (4, 16))
    for i, n in enumerate(lengths):
        model(idx[i : i + 1, :n], cache=cache.row(i))
    before = copies(cache)
    view = cache.sequences(0, 4)
    view.set_lengths(torch.tensor(lengths), 9)
    got = []
    for step in range(2):
        new = [idx[i, n + step * T : n + (step + 1) * T] for i, n in enumerate(lengths)]
        got.append(model(torch.stack(new), cache=view)[0])
    assert view.pos == 9 + 2 * T and view.lengths.tolist() == [n + 2 * T for n in lengths]
    assert cache.pos == 0 and cache.lengths is None
    tolerance = {torch.float64: 1e-12, torch.int8: 1e-3}[dtype]
    for i, n in enumerate(lengths):
        alone = model.make_cache(1, 16, dtype)
        model(idx[i : i + 1, :n], cache=alone)
        for step in range(2):
            new = idx[i : i + 1, n + step * T : n + (step + 1) * T]
            want = model(new, cache=alone)[0][0]
            torch.testing.assert_close(got[step][i], want, atol=tolerance, rtol=10 * tolerance)
    for tensor, was in zip(cache.tensors, before, strict=True):
        assert torch.equal(tensor[4:], was[4:])
        if cache.grows:
            assert all(torch.equal(tensor[i, :, :n], was[i, :, :n]) for i, n in enumerate(lengths))
    if cache.grows:
        view.truncate(4)
        assert view.sequences(1, 2).lengths.tolist() == [4, 4]


@torch.no_grad()
def test_an_attention_alone_on_sequences_of_unequal_lengths():
    """Every sequence is rotated by its own positions."""
    attn = make("MLA").transformer.h[0].attn
    x = torch.randn(2, 9, 24)
    cache = attn.new_cache(2, 9)
    for i, n in enumerate((2, 6)):
        attn(x[i : i + 1, :n], cache.sequences(i, 1))
    cache.lengths = torch.tensor([2, 6])
    cache.pos = 6
    got = attn(torch.stack([x[0, 2:5], x[1, 6:9]]), cache)
    torch.testing.assert_close(got[0], attn(x[:1, :5])[0, 2:], **NEAR)
    torch.testing.assert_close(got[1], attn(x[1:])[0, 6:], **NEAR)


@torch.no_grad()
def test_a_row_of_mla_is_one_piece():
    """[c ; kr] of a token side by side, which is read once as key and as value; append returns
    them uncopied."""
    model = make("MLA")
    cache = model.make_cache(2, 8)
    model(torch.randint(23, (2, 5)), cache=cache)
    for layer in cache.layers:
        (kept,) = layer.tensors
        assert kept.shape == (2, 1, 8, 7 + 2) and kept.is_contiguous()
        assert kept[:, :, :5].all() and not kept[:, :, 5:].any()
        keys, values = layer.append(torch.ones(2, 1, 1, 9))
        assert keys.data_ptr() == kept.data_ptr() and values is None


@torch.no_grad()
@pytest.mark.parametrize("kind", ["GQA, rotary", "MLA", "latent tokens"])
def test_chunks_under_autocast(kind):
    """A prompt in two pieces of many tokens, whose products autocast computes in bfloat16."""
    model = make(kind, block_size=32)
    idx = torch.randint(23, (1, 24))
    with torch.autocast("cpu", torch.bfloat16):
        want = model(idx)[0]
        cache = model.make_cache(1, 24)
        for piece in idx.split(12, dim=1):
            got = model(piece, cache=cache)[0]
    torch.testing.assert_close(got, want, atol=0.3, rtol=0.1)
