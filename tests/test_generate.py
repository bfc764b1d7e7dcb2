"""
Tokens out of a model: generate, and the decoding step at fixed addresses, on a GPU also captured.

Run: python -m pytest tests/test_generate.py
"""

import pytest
import torch

from nanomla import generate, kernels
from nanomla.generate import DecodingStep, Sampler, stream_tokens
from tests.conftest import GROWING, KINDS, make

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"


# ---- generate
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_cached_equals_greedy_uncached(kind):
    """The same tokens with and without the cache, up to block_size, for rows with prompts of their
    own."""
    torch.manual_seed(2)  # weights without a near tie between the two likeliest tokens
    model = make(kind)
    idx = torch.randint(23, (3, 4))
    with_cache = model.generate(idx, 12, temperature=0)
    assert torch.equal(with_cache, model.generate(idx, 12, temperature=0, use_cache=False))
    assert with_cache.shape == (3, 16) and torch.equal(with_cache[:, :4], idx)


def test_generation_past_block_size():
    """A full context goes on with its last block_size // 2 tokens; a window is what the next token
    depends on."""
    model = make("MLA")
    idx = torch.randint(23, (2, 5))
    out = model.generate(idx, 40, temperature=0)
    assert out.shape == (2, 45)
    with torch.no_grad():
        assert torch.equal(out[:, 16], model(out[:, :16])[0][:, -1].argmax(-1))
        assert torch.equal(out[:, 17], model(out[:, 9:17])[0][:, -1].argmax(-1))  # 8 tokens kept
        long = torch.randint(23, (2, 30))
        got = model.generate(long, 1, temperature=0)[:, -1]
        assert torch.equal(got, model(long[:, -16:])[0][:, -1].argmax(-1))


def test_stopping_and_seeds():
    """The same generator gives the same tokens; a stop token ends a row, all rows end the loop."""
    model = make("MLA")
    idx = torch.randint(23, (3, 2))

    def draw(**how):
        generator = torch.Generator().manual_seed(4)
        return model.generate(idx, 12, temperature=1.5, generator=generator, **how)

    drawn = draw()
    assert torch.equal(drawn, draw()) and not drawn.is_inference()
    stop = drawn[0, 5].item()
    stopped = draw(stop=stop)
    for row in stopped[:, 2:].tolist():
        assert stop not in row or set(row[row.index(stop) :]) == {stop}
    assert stopped.shape[1] <= drawn.shape[1]
    assert model.generate(idx[:1], 12, temperature=0, stop=range(23)).shape == (1, 3)


@pytest.mark.parametrize(
    "bad", [{"temperature": -1}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}], ids=str
)
def test_generate_refuses_bad_arguments(bad):
    """Out-of-range sampling settings raise before anything is computed."""
    (field,) = bad
    with pytest.raises(ValueError, match=f"{field}={bad[field]} does not work"):
        make("MHA").generate(torch.zeros(1, 1, dtype=torch.long), 1, **bad)
    with pytest.raises(ValueError, match="at least one token"):
        make("MHA").generate(torch.zeros(1, 0, dtype=torch.long), 1)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["MLA", "latent tokens"])
def test_generate_leaves_a_cache_that_it_refuses(kind):
    """Of another model, or of other sequences: what it holds stays."""
    model = make(kind)
    other = make(kind, n_layer=1)
    idx = torch.randint(23, (2, 6))
    for maker, rows, words in (
        (other, 2, "the cache was made for another model"),
        (model, 3, "the cache has 3 rows, the input 2"),
    ):
        cache = maker.make_cache(rows, 9)
        maker(idx[:1].expand(rows, -1), cache=cache)
        before = [t.clone() for t in cache.tensors]
        with pytest.raises(ValueError, match=words):
            model.generate(idx, 3, cache=cache)
        assert cache.pos == 6
        assert all(torch.equal(a, b) for a, b in zip(before, cache.tensors, strict=True))


# ---- The decoding step
def on_device(kind, **changes):
    return make(kind, **changes).to(DEVICE)


def text(model, idx, n, **how) -> list[int]:
    """Greedy tokens, one list for all rows."""
    tokens = stream_tokens(model, idx, n, Sampler(0), **how)
    return torch.cat(list(tokens), dim=1).tolist()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_a_step_is_the_model(kind, dtype):
    """Token by token after a prompt, and from an empty cache, in 3 rows: the model's logits, and
    the cache that the model leaves."""
    model = on_device(kind)
    dtype = getattr(torch, dtype)
    if kind not in GROWING and dtype == torch.int8:
        return  # a state is never int8
    idx = torch.randint(23, (3, 12), device=DEVICE)
    # The model alone does not round the very first token to the cache's dtype.
    for prompt in (0, 5) if dtype == torch.float32 else (5,):
        plain, cache = (model.make_cache(3, 14, dtype) for _ in range(2))
        if prompt:
            model(idx[:, :prompt], cache=plain)
            model(idx[:, :prompt], cache=cache)
        step = DecodingStep(model, cache)
        for t in range(prompt, 12):
            want, _ = model(idx[:, t : t + 1], cache=plain)
            got = step(idx[:, t : t + 1])
            torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
            assert cache.pos == plain.pos == t + 1
        for a, b in zip(plain.tensors, cache.tensors, strict=True):
            near = {"atol": 1.1} if a.dtype == torch.int8 else {"atol": 1e-2 * float(a.abs().max())}
            torch.testing.assert_close(b.float(), a.float(), **near, rtol=0)
    step.cache.truncate(7 if kind in GROWING else 0)
    cached = step.cache.pos
    want, _ = model(idx[:, : cached + 1])
    if dtype == torch.float32:  # a step after a truncation reads no token that was forgotten
        torch.testing.assert_close(step(idx[:, cached : cached + 1]), want, atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_a_graph_changes_no_number(kind, dtype):
    """Captured and not: the same bits."""
    model = on_device(kind).to(getattr(torch, dtype))
    idx = torch.randint(23, (3, 12), device=DEVICE)
    steps = [DecodingStep(model, model.make_cache(3, 14), capture) for capture in (True, False)]
    for t in range(12):
        captured, plain = (step(idx[:, t : t + 1]) for step in steps)
        assert torch.equal(captured, plain)
    assert steps[0].graph is not None and steps[1].graph is None


@torch.inference_mode()
def test_without_a_graph_it_goes_on(capsys, monkeypatch):
    """Where a step cannot be captured, one line says so, once."""
    model = on_device("MLA")
    idx = torch.randint(23, (1, 12), device=DEVICE)
    step = DecodingStep(model, model.make_cache(1, 14))
    step.capture = True

    def fail():
        raise RuntimeError("no graph here\nat all")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", fail)
    got = [step(idx[:, t : t + 1]) for t in range(12)]
    torch.testing.assert_close(got[-1], model(idx)[0], atol=1e-4, rtol=1e-4)
    assert capsys.readouterr().err == (
        "warning: decoding goes on without a CUDA graph: no graph here\n"
    )


@torch.inference_mode()
def test_a_step_that_does_not_fit_is_refused():
    """Rows that the cache does not have, and a token more than it holds, as the model says it."""
    model = on_device("MLA")
    step = DecodingStep(model, model.make_cache(3, 2))
    with pytest.raises(ValueError, match="the cache has 3 rows, the input 1"):
        step(torch.zeros(1, 1, dtype=torch.int64, device=DEVICE))
    token = torch.zeros(3, 1, dtype=torch.int64, device=DEVICE)
    step(token)
    step(token)
    with pytest.raises(ValueError, match="the cache is full"):
        step(token)


@torch.inference_mode()
def test_a_pass_that_was_interrupted_leaves_nothing():
    """A state that a first layer has moved on, and no second, is forgotten."""
    model = on_device("latent tokens")
    idx = torch.randint(23, (2, 5), device=DEVICE)
    plain, cache = model.make_cache(2, 14), model.make_cache(2, 14)
    step = DecodingStep(model, cache)
    model.transformer.h[0](torch.randn(2, 1, 24, device=DEVICE), cache.layers[0])
    assert cache.layers[0].pending is not None
    for t in range(5):
        want, _ = model(idx[:, t : t + 1], cache=plain)
        torch.testing.assert_close(step(idx[:, t : t + 1]), want, atol=1e-5, rtol=1e-5)


@pytest.fixture
def on_triton(monkeypatch):
    """
    The calls of the GPU's kernel, which takes the attention of few tokens: on a CPU in Triton's
    interpreter.
    """
    pytest.importorskip("triton", reason="Triton has no wheel for this system")
    from nanomla.kernels import triton

    calls = []

    def attend(*args, **how):
        calls.append(args)
        return triton_attend(*args, **how)

    triton_attend = triton.attend
    monkeypatch.setattr(triton, "attend", attend)
    use_kernel(monkeypatch, triton)
    return calls


def use_kernel(monkeypatch, kernel):
    """Let a module, or None, compute attention of few tokens as on a GPU."""
    for module in (kernels, generate):
        monkeypatch.setattr(module, "on_gpu", lambda device: kernel)


FEW = [("GQA, rotary", None), ("MLA", None), ("MLA, groups", torch.int8), ("latent tokens", None)]
MANY = [(kind, None) for kind in GROWING] + [("MHA", torch.int8), ("MLA", torch.int8)]
SLOW = [] if GPU else pytest.mark.slow  # in the interpreter


@pytest.mark.parametrize(
    ("kind", "cache_dtype"),
    [*FEW, *(pytest.param(*case, marks=SLOW) for case in MANY if case not in FEW)],
)
def test_the_text_of_the_kernel(kind, cache_dtype, on_triton, monkeypatch):
    """Every attention decodes the same text through the GPU's kernel and the step, in two rows,
    past the end of its context."""
    model = on_device(kind)
    idx = torch.randint(23, (2, 13), device=DEVICE)
    got = text(model, idx, 5, cache_dtype=cache_dtype)
    assert bool(on_triton) == (kind in GROWING)
    calls = len(on_triton)
    use_kernel(monkeypatch, None)
    assert text(model, idx, 5, cache_dtype=cache_dtype) == got
    assert len(on_triton) == calls


def test_what_the_step_does_not_take(on_triton):
    """float64, and a cache of one token, are decoded by the model alone."""
    model = on_device("MLA").double()
    assert not DecodingStep.is_faster(model, model.make_cache(1, 5))
    model = on_device("MLA")
    assert DecodingStep.is_faster(model, model.make_cache(1, 5, torch.int8))
    assert not DecodingStep.is_faster(model, model.make_cache(1, 1))
    assert len(text(model, torch.zeros(1, 1, dtype=torch.int64, device=DEVICE), 4)[0]) == 4
