"""
A decoding step at fixed addresses, on a GPU also captured.

Run: python -m pytest tests/test_graph.py
"""

import pytest
import torch

from model import GPT
from nanomla import graph, kernels
from nanomla.generate import DecodingStep, Sampler, stream_tokens
from tests.conftest import TINY_MLA, randomise, tiny_config

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
ROTARY = {"pos_emb": "rope"}
MODELS = {
    "MHA": {},
    "MHA, rotary": ROTARY,
    "GQA + SVD": {"n_kv_head": 2, "use_svd": True, "svd_rank": 3},
    "MQA": {"n_kv_head": 1},
    "MLA": TINY_MLA,
    "MLA, groups": {**TINY_MLA, "mla_groups": 2, "mla_latent_dim": 5},
    "MLA + SVD": {**TINY_MLA, "use_svd": True, "svd_rank": 2, "mla_latent_dim": (5, 8)},
    "rotary latent": {**TINY_MLA, "mla_rope": "latent", "mla_latent_dim": 8},
    "latent tokens": {"use_latent_tokens": True, "n_latent_tokens": 3},
}


def make(name: str, **more) -> GPT:
    return randomise(GPT(tiny_config(**{**MODELS[name], **more}))).to(DEVICE)


def text(model, idx, n, **how) -> list[int]:
    """Greedy tokens, one list for all rows."""
    tokens = stream_tokens(model, idx, n, Sampler(0), **how)
    return torch.cat(list(tokens), dim=1).tolist()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_a_step_is_the_model(name, dtype):
    """Token by token after a prompt, and from an empty cache, in 3 rows: the model's logits, and
    the cache that the model leaves."""
    model, dtype = make(name), getattr(torch, dtype)
    if name == "latent tokens" and dtype == torch.int8:
        pytest.skip("a state is never int8")
    idx = torch.randint(23, (3, 12), device=DEVICE)
    # The model alone does not round the very first token to the cache's dtype.
    for prompt in (0, 5) if dtype == torch.float32 else (5,):
        plain, cache = (model.make_cache(3, 14, dtype) for _ in range(2))
        for c in (plain, cache) if prompt else ():
            model(idx[:, :prompt], cache=c)
        step = DecodingStep(model, cache)
        for t in range(prompt, 12):
            want, _ = model(idx[:, t : t + 1], cache=plain)
            got = step(idx[:, t : t + 1])
            torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
            assert cache.pos == plain.pos == t + 1
        for a, b in zip(plain.tensors, cache.tensors, strict=True):
            near = {"atol": 1.1} if a.dtype == torch.int8 else {"atol": 1e-2 * float(a.abs().max())}
            torch.testing.assert_close(b.float(), a.float(), **near, rtol=0)
    step.cache.truncate(0 if name == "latent tokens" else 7)
    cached = step.cache.pos
    want, _ = model(idx[:, : cached + 1])
    if dtype == torch.float32:  # a step after a truncation reads no token that was forgotten
        torch.testing.assert_close(step(idx[:, cached : cached + 1]), want, atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_a_graph_changes_no_number(name, dtype):
    """Captured and not: the same bits."""
    model, idx = make(name).to(getattr(torch, dtype)), torch.randint(23, (3, 12), device=DEVICE)
    steps = [DecodingStep(model, model.make_cache(3, 14), capture) for capture in (True, False)]
    for t in range(12):
        captured, plain = (step(idx[:, t : t + 1]) for step in steps)
        assert torch.equal(captured, plain)
    assert steps[0].graph is not None and steps[1].graph is None


@torch.inference_mode()
def test_without_a_graph_it_goes_on(capsys, monkeypatch):
    """Where a step cannot be captured, one line says so, once."""
    model, idx = make("MLA"), torch.randint(23, (1, 12), device=DEVICE)
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
    model = make("MLA")
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
    model, idx = make("latent tokens"), torch.randint(23, (2, 5), device=DEVICE)
    plain, cache = model.make_cache(2, 14), model.make_cache(2, 14)
    step = DecodingStep(model, cache)
    model.transformer.h[0](torch.randn(2, 1, 24, device=DEVICE), cache)
    for t in range(5):
        want, _ = model(idx[:, t : t + 1], cache=plain)
        torch.testing.assert_close(step(idx[:, t : t + 1]), want, atol=1e-5, rtol=1e-5)


@pytest.fixture
def on_triton(monkeypatch):
    """Attention of few tokens by the GPU's kernel, on a CPU in Triton's interpreter."""
    pytest.importorskip("triton", reason="Triton has no wheel for this system")
    from nanomla.kernels import triton

    calls = []

    def attend(*args, **how):
        calls.append(args)
        return triton_attend(*args, **how)

    triton_attend = triton.attend
    monkeypatch.setattr(triton, "attend", attend)
    for module in (kernels, graph):
        monkeypatch.setattr(module, "on_gpu", lambda device: triton)
    return calls


IN_INT8 = ["MHA", "MLA", "MLA, groups"]


@pytest.mark.parametrize(
    ("name", "cache_dtype"), [(name, None) for name in MODELS] + [(n, torch.int8) for n in IN_INT8]
)
def test_the_text_of_the_kernel(name, cache_dtype, on_triton, monkeypatch):
    """Every attention decodes the same text through the GPU's kernel and the step, in two rows,
    past the end of its context."""
    model, idx = make(name), torch.randint(23, (2, 13), device=DEVICE)
    got = text(model, idx, 5, cache_dtype=cache_dtype)
    assert bool(on_triton) == (name != "latent tokens")
    for module in (kernels, graph):
        monkeypatch.setattr(module, "on_gpu", lambda device: None)
    assert text(model, idx, 5, cache_dtype=cache_dtype) == got


def test_rows_that_the_kernel_does_not_take(on_triton):
    """float64, and a cache of one token, are decoded by the model alone."""
    model = make("MLA").double()
    assert not DecodingStep.helps(model, model.make_cache(1, 5))
    model = make("MLA")
    assert DecodingStep.helps(model, model.make_cache(1, 5, torch.int8))
    assert not DecodingStep.helps(model, model.make_cache(1, 1))
    assert len(text(model, torch.zeros(1, 1, dtype=torch.int64, device=DEVICE), 4)[0]) == 4
