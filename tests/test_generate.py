"""
Tokens out of a model: generate, and the decoding step at fixed addresses, on a GPU also captured.

Run: python -m pytest tests/test_generate.py
"""

import numpy as np
import pytest
import torch

from nanomla import generate, kernels
from nanomla.errors import UserError
from nanomla.generate import DecodingStep, Sampler, next_logits, stream_tokens
from tests.conftest import GROWING, KINDS, make
from tools.bench.timing import peak_bytes

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
    """The same generator gives the same tokens; a stop token of any integer type ends a sequence,
    and all of them end the loop."""
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
    for ids in (torch.tensor(stop), np.array([stop])):
        assert torch.equal(draw(stop=ids), stopped)


def test_what_does_not_work_is_named():
    """Settings with their values and what works, prompts, and logits that are no numbers."""
    model = make("MHA")
    for name, value in (("temperature", float("nan")), ("top_k", -1), ("max_new_tokens", 2.5)):
        with pytest.raises(ValueError, match=f"{name}={value!r} does not work: {name} must be"):
            model.generate(torch.zeros(1, 1).long(), **{"max_new_tokens": 1, name: value})
    with pytest.raises(ValueError, match="at least one token"):
        model.generate(torch.zeros(1, 0, dtype=torch.long), 1)
    with pytest.raises(UserError, match="the token id 23, the model knows 23"):
        model.generate(torch.tensor([[1], [23]]), 1)
    cache = model.make_cache(1, 9)
    with torch.no_grad():
        model(torch.zeros(1, 6).long(), cache=cache)
    with pytest.raises(ValueError, match="holds 6 tokens, idx 4: it must begin with those"):
        model.generate(torch.zeros(1, 4).long(), 3, cache=cache)
    with pytest.raises(UserError, match="logits are not finite; try --dtype=float32"):
        Sampler(0)(torch.tensor([[0, float("nan")]]))


def test_generation_is_without_dropout_and_restores_the_mode():
    """A model in training mode draws what it draws in evaluation mode; an exception changes its
    mode no more than an end does."""
    model, idx = make("MLA", dropout=0.5), torch.tensor([[3, 1]])
    want = model.generate(idx, 9, temperature=0)
    model.train().transformer.drop.eval()
    modes = [module.training for module in model.modules()]
    assert torch.equal(model.generate(idx, 9, temperature=0), want)
    assert [module.training for module in model.modules()] == modes
    model.transformer.wte.weight.data[:] = float("inf")
    with pytest.raises(UserError):
        model.generate(idx, 9)
    assert [module.training for module in model.modules()] == modes


# ---- What a token is drawn by
def test_sampling_filters():
    """top_k and top_p bound what can be drawn; 0, None and 1 are off; temperature 0 is argmax, and
    so is what rounds to 0 in float32."""
    logits = torch.randn(1, 23) * 2
    probs = logits[0].softmax(-1)
    order = probs.argsort(descending=True)
    nucleus = order[: int((probs[order].cumsum(0) < 0.5).sum()) + 1]

    def drawn(**settings):
        return set(Sampler(**settings)(logits.expand(2000, -1))[:, 0].tolist())

    assert drawn(top_k=2) == set(order[:2].tolist())
    assert drawn(top_p=0.5) == set(nucleus.tolist())
    for off in ({"top_k": 0}, {"top_k": 99}, {"top_p": 1.0}):
        assert len(drawn(**off)) > len(nucleus)
    for greedy in ({"temperature": 0}, {"temperature": 1e-300}, {"top_p": 1e-300}):
        assert drawn(**greedy) == {int(order[0])}


# ---- Prompts and caches
@pytest.mark.parametrize("kind", ["MLA", "rotary latent", "latent tokens"])
def test_a_prompt_in_chunks_gives_equal_logits(kind):
    """Prompts of unequal and of equal rows, whatever a pass reads, and beside no cache."""
    model, seen = make(kind).double(), []

    class Seen(Sampler):
        def __call__(self, logits):
            seen.append(logits.clone())
            return super().__call__(logits)

    for idx in (torch.randint(23, (2, 13)), torch.randint(23, (1, 13)).expand(3, -1)):
        seen.clear()
        for chunk in (None, 1, 3, 12, 50):
            list(stream_tokens(model, idx, 6, Seen(0), prefill_chunk=chunk))
            torch.testing.assert_close(seen[-6:], seen[:6], atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(seen[0], model(idx)[0][:, -1], atol=1e-10, rtol=1e-10)


def test_sequences_of_a_shared_prompt_differ():
    """A prompt shared by all is read once; then every sequence draws its own tokens."""
    model, idx = make("MLA"), torch.tensor([[1, 2, 3]]).expand(64, -1)
    read = []
    model.register_forward_pre_hook(lambda _, args: read.append(tuple(args[0].shape)))
    out = torch.cat(list(stream_tokens(model, idx, 6, Sampler(2.0))), 1)
    assert read == [(1, 2), *[(64, 1)] * 6]
    assert len({tuple(row) for row in out.tolist()}) > 60


def test_the_memory_of_a_long_prompt():
    """In chunks of a sixteenth, a prompt takes less than a quarter of the memory of all at once."""
    model = make("MLA", block_size=4096, n_embd=64)
    idx, peaks = torch.randint(23, (1, 4096)), []
    for chunk in (None, 256):
        cache = model.make_cache(1, 4096)
        run = lambda c=chunk, cache=cache: next_logits(model, idx, cache, c, None)
        peaks.append(peak_bytes(run, "cpu"))
    assert peaks[1] < peaks[0] / 4, peaks


@torch.no_grad()
@pytest.mark.parametrize("kind", ["MLA", "latent tokens"])
@pytest.mark.parametrize("length", [1, 7])
def test_a_cache_shorter_than_the_prompt(kind, length):
    """The newest tokens that it can hold are the context of the first token; when it is full, it
    goes on with half of them, and is not filled again at every token."""
    model, idx = make(kind), torch.randint(23, (2, 12))
    first = model(idx[:, -length:])[0][:, -1].argmax(-1)
    cache = model.make_cache(2, length)
    model(idx[:, :length], cache=cache)  # the beginning, which is of no use
    read = []
    model.register_forward_pre_hook(lambda _, args: read.append(args[0].size(1)))
    out = model.generate(idx, 20, temperature=0, cache=cache)
    assert out.shape == (2, 32) and torch.equal(out[:, 12], first)
    assert sum(n > 1 for n in read) <= 1 + 20 / (length - length // 2)
    again = model.make_cache(2, length)
    model(out[:, 31 - cache.pos : 31], cache=again)  # what it holds: all but the last
    for a, b in zip(again.tensors, cache.tensors, strict=True):
        end = cache.pos if cache.grows else None
        torch.testing.assert_close(a[..., :end, :], b[..., :end, :], atol=1e-5, rtol=1e-4)


# ---- The decoding step
def on_device(kind, **changes):
    return make(kind, **changes).to(DEVICE)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [*((kind, "float32") for kind in KINDS), ("MLA", "bfloat16"), ("MLA, groups", "int8")],
)
@torch.inference_mode()
def test_a_step_is_the_model(kind, dtype):
    """Token by token after a prompt, and from an empty cache, in 3 rows: the model's logits, and
    the cache that the model leaves."""
    model = on_device(kind)
    dtype = getattr(torch, dtype)
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


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
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


FEW = [("MLA", None), ("MLA, groups", torch.int8), ("latent tokens", None)]
MANY = [(kind, None) for kind in GROWING if GPU]  # slow in the interpreter


@pytest.mark.parametrize(("kind", "cache_dtype"), [*FEW, *MANY])
def test_the_text_of_the_kernel(kind, cache_dtype, monkeypatch):
    """The GPU's kernel and the step, on a CPU in Triton's interpreter, draw the text of the plain
    model, in two sequences, past the context's end."""
    pytest.importorskip("triton", reason="Triton has no wheel for this system")
    from nanomla.kernels import triton

    model = on_device(kind)
    idx = torch.randint(23, (2, 13), device=DEVICE)
    texts = []
    for kernel in (None, triton):
        for module in (kernels, generate):
            monkeypatch.setattr(module, "on_gpu", lambda device, kernel=kernel: kernel)
        cache = model.make_cache(2, 16, cache_dtype)
        assert DecodingStep.is_faster(model, cache) == (kernel is not None)
        tokens = stream_tokens(model, idx, 5, Sampler(0), cache_dtype=cache_dtype)
        texts.append(torch.cat(list(tokens), dim=1).tolist())
    assert texts[0] == texts[1]
    assert not DecodingStep.is_faster(model, model.make_cache(2, 1))  # nothing to read
    if kind in GROWING:  # the kernel does not compute in float64
        assert not DecodingStep.is_faster(model.double(), model.make_cache(2, 16))
