"""What attention keeps of past tokens. Run: python -m pytest tests/test_cache.py"""

import pytest
import torch

from model import ATTENTION
from tests.conftest import GROWING, KINDS, all_logits, make, settings_name

NEAR = {"atol": 1e-5, "rtol": 1e-4}
ALONE = {  # an attention's settings, by its name
    "mha": KINDS["GQA, rotary"],
    "mla": KINDS["MLA"],
    "rotary_latent": KINDS["rotary latent, groups"],
    "latent_tokens": KINDS["latent tokens"],
}


def copies(tensors):
    return [t.clone() for t in tensors]


def same(tensors, others):
    return all(torch.equal(a, b) for a, b in zip(tensors, others, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("sizes", [(1,) * 9, (4, 1, 4)], ids=str)
@pytest.mark.parametrize("attention", ATTENTION)
def test_an_attention_alone_on_its_own_cache(attention, sizes):
    """new_cache and advance, without a GPT: cached equals uncached, and a repeated pass counts
    once."""
    model = make(ALONE[attention])
    assert model.config.attention_name == attention
    attn = model.transformer.h[1].attn
    x = torch.randn(3, 9, 24)
    want = attn(x)
    cache = attn.new_cache(3, 9)
    end = 0
    for size in sizes:
        for _ in range(2):
            got = attn(x[:, end : end + size], cache)
            torch.testing.assert_close(got, want[:, end : end + size], **NEAR)
        cache.advance(size)
        end += size
        assert cache.pos == end
    with pytest.raises(ValueError, match="T=1 does not work: T must be from 0 to 0"):
        cache.advance(1)


@torch.no_grad()
@pytest.mark.parametrize("kind", GROWING)
@pytest.mark.parametrize("T", [1, 3])
def test_a_full_cache_alone_is_refused(kind, T):
    """Before anything is written, in an attention that is used without a GPT."""
    attn = make(kind).transformer.h[0].attn
    cache = attn.new_cache(2, 4)
    attn(torch.randn(2, 4, 24), cache)
    cache.advance(4)
    before = copies(cache.tensors)
    with pytest.raises(ValueError, match=f"full: 4 tokens held, {T} to add, max_len=4"):
        attn(torch.randn(2, T, 24), cache)
    assert same(before, cache.tensors) and cache.pos == 4


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", GROWING)
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
def test_a_cache_refuses_before_it_writes():
    """Full, of another batch or dtype, with gradients: an error, and content and position stay."""
    model = make("MLA")
    idx = torch.randint(23, (2, 6))
    cache = model.make_cache(2, 8)
    model(idx, cache=cache)
    before = copies(cache.tensors)
    with pytest.raises(ValueError, match="full: 6 tokens held, 3 to add, max_len=8"):
        model(idx[:, :3], cache=cache)
    with pytest.raises(ValueError, match="2 rows, the input 1"):
        model(idx[:1, :1], cache=cache)
    with torch.enable_grad(), pytest.raises(RuntimeError, match=r"torch\.no_grad"):
        model(idx[:, :1], cache=cache)
    assert cache.pos == 6 and same(before, cache.tensors)
    for dtype in (torch.int32, torch.uint8):
        with pytest.raises(ValueError, match=f"dtype={dtype} does not work.*int8"):
            model.make_cache(2, 8, dtype)
    for batch_size, max_len, words in (
        (2, 17, "max_len=17 .* block_size=16"), (2, 0, "max_len=0"), (0, 8, "batch_size=0")
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            model.make_cache(batch_size, max_len)


OTHERS = [  # a model, and what the model that a cache was made for has instead
    ("MHA", {"use_mla": True, "mla_latent_dim": 7}),
    ("MHA", {"n_kv_head": 2}),
    ("MHA", {"n_layer": 3}),
    ("MHA + SVD", {"svd_rank": 4}),
    ("MLA", {"mla_latent_dim": 9}),
    ("MLA", {"mla_latent_dim": (7, 9)}),
    ("MLA", {"mla_groups": 2}),
    ("MLA", {"attention": "rotary_latent", "mla_latent_dim": 9}),  # as wide as 7 + 2
    ("latent tokens", {"n_latent_tokens": 6}),
    ("latent tokens", {"n_layer": 1}),
    ("latent tokens", {"head_dim": 4}),
    ("latent tokens", {"use_latent_tokens": False}),
]


@torch.no_grad()
@pytest.mark.parametrize(("kind", "changes"), OTHERS, ids=str)
def test_a_cache_of_another_model_is_refused(kind, changes):
    """Whichever of both made it, empty or not, before anything is written to it."""
    models = make(kind), make(kind, **changes)
    idx = torch.randint(23, (2, 6))
    for model, other in (models, models[::-1]):
        cache = other.make_cache(2, 9)
        other(idx, cache=cache)
        before = copies(cache.tensors)
        with pytest.raises(ValueError, match="the cache was made for another model"):
            model(idx[:, :1], cache=cache)
        assert cache.pos == 6 and same(before, cache.tensors)
        assert all(getattr(layer, "pending", None) is None for layer in cache.layers)
        with pytest.raises(ValueError, match="the cache was made for another model"):
            model(idx, cache=other.make_cache(2, 9))


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_twin_takes_it(kind):
    """A cache goes on in another model of the same shape, as when weights are loaded again."""
    model = make(kind)
    idx = torch.randint(23, (2, 6))
    cache = model.make_cache(2, 9)
    model(idx[:, :5], cache=cache)
    twin = make(kind)
    twin.load_state_dict(model.state_dict())
    torch.testing.assert_close(twin(idx[:, 5:], cache=cache)[0], model(idx)[0], **NEAR)


@pytest.mark.parametrize("grad_checkpoint", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_takes_no_gradients(kind, grad_checkpoint):
    """An error with the remedy, in a GPT and in an attention alone; what the cache holds stays."""
    model = make(kind)
    model.grad_checkpoint = grad_checkpoint
    idx = torch.randint(23, (2, 6))
    cache = model.make_cache(2, 8)
    with torch.no_grad():
        model(idx, cache=cache)
    before = copies(cache.tensors)
    remedy = r"torch\.no_grad or inference_mode"
    with pytest.raises(RuntimeError, match=remedy):
        model.train()(idx[:, :1], cache=cache)
    for layer, block in zip(cache.layers, model.transformer.h, strict=True):
        with pytest.raises(RuntimeError, match=remedy):
            block.attn(torch.randn(2, 1, 24), layer)
        assert getattr(layer, "pending", None) is None
    assert cache.pos == 6 and same(before, cache.tensors)


def test_append_takes_no_gradients():
    """Also of keys that need none: they may come from a model whose gradients are on."""
    cache = make("MLA").transformer.h[0].attn.new_cache(1, 4)
    with pytest.raises(RuntimeError, match=r"torch\.no_grad"):
        cache.append(torch.ones(1, 1, 1, 9))
    assert not cache.tensors[0].any()
    with torch.inference_mode():
        keys, values = cache.append(torch.ones(1, 1, 1, 9))
    assert keys.shape == (1, 1, 1, 9) and values is None
    assert keys.data_ptr() == cache.tensors[0].data_ptr()  # uncopied


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
    assert cache.pos == 2 and {layer.pos for layer in cache.layers} == {2}
    cache.truncate(0)
    with pytest.raises(AttributeError):
        cache.pos = 3
    for move, n in ((cache.truncate, 1), (cache.truncate, -1), (cache.advance, 11),
                    (cache.advance, -1)):  # fmt: skip
        with pytest.raises(ValueError, match="does not work"):
            move(n)
    assert cache.pos == 0


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_float64_model(kind):
    """It generates on its default cache, which is float64, and step by step on it its logits are
    those of the whole context, and those of rotary tables that were never float32."""
    model = make(kind, block_size=64).double()
    idx = torch.randint(23, (2, 50))
    full = all_logits(model, idx)
    cache = model.make_cache(2, 50)
    assert cache.dtype == torch.float64 and model.generate(idx[:, :9], 20).shape == (2, 29)
    exact = {"atol": 1e-12, "rtol": 1e-12}
    for t in range(50):
        logits, _ = model(idx[:, t : t + 1], cache=cache)
        torch.testing.assert_close(logits[:, 0], full[:, t], **exact)
    if model.config.rotary_dim:
        angle = torch.outer(torch.arange(50).double(), model.config.frequencies)
        x = model.transformer.wte(idx)
        for block in model.transformer.h:
            x = block(x, rotation=(angle.cos(), angle.sin()))
        torch.testing.assert_close(model.lm_head(model.transformer.ln_f(x)), full, **exact)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize(
    "settings", [{}, {"use_svd": True}, {"use_mla": True, "mla_latent_dim": 1}], ids=settings_name
)
def test_one_head_of_one_number(settings, dtype):
    """One row, one head of width 1, token by token: what the whole context gives."""
    model = make(settings, n_head=1, head_dim=1)
    idx = torch.randint(23, (1, 5))
    full = all_logits(model, idx)
    cache = model.make_cache(1, 5, dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    for t in range(5):
        got, _ = model(idx[:, t : t + 1], cache=cache)
        torch.testing.assert_close(got[:, 0], full[:, t], atol=tolerance, rtol=tolerance)


@torch.no_grad()
@pytest.mark.parametrize("kind", GROWING)
def test_rows_of_a_cache(kind):
    """row(i) is a view with its own pos; broadcast_row copies one row's tokens to all."""
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
    assert cache.nbytes_at(5) == 5 * 3 * cache.bytes_per_token == 5 * cache.nbytes // 12
    for i in (-1, 3):
        with pytest.raises(ValueError, match=f"i={i} does not work: i must be from 0 to 2"):
            cache.row(i)


@torch.no_grad()
@pytest.mark.parametrize(
    ("dtype", "T"),
    [(torch.float64, 3), (torch.float32, 1), (torch.bfloat16, 3), (torch.int8, 1)],
    ids=str,
)
@pytest.mark.parametrize("kind", KINDS)
def test_sequences_of_different_lengths(kind, dtype, T):
    """The first of a cache, each with its own number of tokens: what every sequence gives alone."""
    model = make(kind)
    lengths = [5, 0, 9, 1]
    if dtype == torch.float64:
        model.double()
    if dtype == torch.int8 and kind not in GROWING:
        return
    cache = model.make_cache(6, 16, dtype)
    idx = torch.randint(23, (4, 16))
    for i, n in enumerate(lengths):
        if n:
            model(idx[i : i + 1, :n], cache=cache.row(i))
    before = copies(cache.tensors)
    view = cache.sequences(0, 4)
    view.set_lengths(torch.tensor(lengths), 9)
    got = []
    for step in range(2):
        new = [idx[i, n + step * T : n + (step + 1) * T] for i, n in enumerate(lengths)]
        got.append(model(torch.stack(new), cache=view)[0])
    assert view.pos == 9 + 2 * T and view.lengths.tolist() == [n + 2 * T for n in lengths]
    assert cache.pos == 0 and cache.lengths is None
    exact = dtype in (torch.float64, torch.float32)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 1e-3)
    for i, n in enumerate(lengths):
        alone = model.make_cache(1, 16, dtype)
        if n:
            model(idx[i : i + 1, :n], cache=alone)
        for step in range(2):
            new = idx[i : i + 1, n + step * T : n + (step + 1) * T]
            want = model(new, cache=alone)[0][0]
            if exact or n:  # a row that begins is rounded here, which it is not alone
                torch.testing.assert_close(got[step][i], want, atol=tolerance, rtol=10 * tolerance)
    for tensor, was in zip(cache.tensors, before, strict=True):
        assert torch.equal(tensor[4:], was[4:])
        if cache.grows:
            assert all(torch.equal(tensor[i, :, :n], was[i, :, :n]) for i, n in enumerate(lengths))


@torch.no_grad()
def test_a_row_of_mla_is_one_piece():
    """[c ; kr] of a token side by side, which is read once as key and as value; r counts."""
    model = make("MLA")
    cache = model.make_cache(2, 8)
    model(torch.randint(23, (2, 5)), cache=cache)
    assert [tuple(t.shape) for t in cache.tensors] == [(2, 1, 8, 7 + 2)] * 2
    assert all(t.is_contiguous() and t[:, :, :5].all() and not t[:, :, 5:].any()
               for t in cache.tensors)  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("kind", [kind for kind in GROWING if "rotary" in kind or "MLA" in kind])
def test_an_attention_alone_on_sequences_of_unequal_lengths(kind):
    """Every sequence is rotated by its own positions."""
    attn = make(kind).transformer.h[0].attn
    x = torch.randn(2, 9, 24)
    cache = attn.new_cache(2, 9)
    for i, n in enumerate((2, 6)):
        attn(x[i : i + 1, :n], cache.sequences(i, 1))
    cache.lengths = torch.tensor([2, 6])
    cache.pos = 6
    got = attn(torch.stack([x[0, 2:5], x[1, 6:9]]), cache)
    torch.testing.assert_close(got[0], attn(x[:1, :5])[0, 2:], **NEAR)
    torch.testing.assert_close(got[1], attn(x[1:])[0, 6:], **NEAR)


def test_views_of_unequal_lengths():
    """A view of some sequences holds their lengths; what is cut off is cut off of each."""
    cache = make("MLA").make_cache(3, 9)
    cache.set_lengths(torch.tensor([2, 6, 4]), 6)
    assert cache.sequences(1, 2).lengths.tolist() == [6, 4]
    cache.truncate(3)
    assert cache.pos == 3 and cache.lengths.tolist() == [2, 3, 3]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.int8])
@pytest.mark.parametrize("kind", KINDS)
def test_chunks_under_autocast(kind, dtype):
    """A prompt in two pieces of many tokens, whose products autocast computes in bfloat16."""
    model = make(kind, block_size=32)
    if dtype == torch.int8 and kind not in GROWING:
        return
    idx = torch.randint(23, (1, 24))
    with torch.autocast("cpu", torch.bfloat16):
        want = model(idx)[0]
        cache = model.make_cache(1, 24, dtype)
        for piece in idx.split(12, dim=1):
            got = model(piece, cache=cache)[0]
    torch.testing.assert_close(got, want, atol=0.3, rtol=0.1)
