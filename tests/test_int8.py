"""Caches with 8-bit rows. Run: python -m pytest tests/test_int8.py"""

import pytest
import torch

from nanomla import kernels
from nanomla.cache import Buffer
from nanomla.kernels import blocks
from nanomla.kernels.int8 import LARGEST, Quantized, dequantise, quantise
from tests.conftest import GROWING, Largest, make


@pytest.fixture(params=GROWING)
def kind(request):
    """A model of every kind whose cache grows, with 12 tokens for three rows."""
    return make(request.param), torch.randint(23, (3, 12))


@pytest.fixture(autouse=True)
def inference():
    with torch.no_grad():
        yield


def exact(rows: Quantized) -> torch.Tensor:
    """The kept rows in float64, by the definition."""
    return rows.values.double() * rows.scale.double()


def test_rows_come_back_within_half_a_scale():
    """Rounded to nearest, symmetric, one float16 scale per row, for rows from 1e-4 to 1e4."""
    x = torch.randn(2, 3, 50, 7) * 10 ** torch.linspace(-4, 4, 50)[:, None]
    rows = quantise(x)
    assert rows.values.dtype == torch.int8 and rows.scale.dtype == torch.float16
    assert rows.values.shape == x.shape and rows.scale.shape == (2, 3, 50, 1)
    error = (exact(rows) - x.double()).abs()
    assert bool((error <= (rows.scale.double() * 0.5001).clamp(min=127 * 2.0**-25)).all())
    mirrored = quantise(-x)
    assert torch.equal(mirrored.values, -rows.values) and torch.equal(mirrored.scale, rows.scale)
    torch.testing.assert_close(dequantise(rows, torch.float64), exact(rows))


def test_rows_at_the_ends_of_float16():
    """Zeros stay zeros; too small rows become zeros; too large ones raise; NaN is not hidden."""
    x = torch.zeros(4, 5)
    x[1] = 127 * 2.0**-26
    x[2, 0] = 127 * 2.0**-24
    x[3, 0] = LARGEST
    rows = quantise(x)
    assert rows.scale[:, 0].tolist() == [0, 0, 2.0**-24, 65504]
    assert torch.equal(rows.values[:2], torch.zeros(2, 5, dtype=torch.int8))
    assert rows.values[2:, 0].tolist() == [127, 127]
    with pytest.raises(ValueError, match="dtype=torch.int8.*8.32e.06.*must be torch.float32"):
        quantise(torch.tensor([[1.0, -LARGEST * 1.01]]))
    x[1, 2] = float("nan")
    assert exact(quantise(x)).isnan().any(dim=1).tolist() == [False, True, False, False]


def test_decoding_never_holds_all_rows_as_floats(monkeypatch):
    """One new token on 3,000 converts no more rows at a time than a block has."""
    monkeypatch.setattr(blocks, "BLOCK", 2000)
    k = quantise(torch.randn(1, 2, 3000, 20))
    with Largest(floats_only=True) as largest:
        kernels.attend(torch.randn(1, 8, 1, 20), k, k, scale=0.3)
    assert 2000 <= largest.numbers < 3000 * 4  # the scales are converted as a whole


def through(model, cache, idx, size):
    """Logits after each piece of `size` tokens."""
    pieces = idx.split(size, dim=1)
    return torch.cat([model(piece, cache=cache)[0] for piece in pieces], dim=1)


def test_logits_through_the_cache(kind, monkeypatch):
    """
    A prompt in pieces: near the uncached logits, in bfloat16 too, and in float64 those of a cache
    whose rows are rounded to what int8 keeps.
    """
    model, idx = kind
    last = model(idx)[0].float()
    narrow = through(model.bfloat16(), model.make_cache(3, 12, torch.int8), idx, 4)[:, -1:]
    assert narrow.dtype == torch.bfloat16 and (narrow.float() - last).norm() < 0.08 * last.norm()
    model.double()
    cache = model.make_cache(3, 12, torch.int8)
    got = through(model, cache, idx, 5)
    full = model(idx, idx)[0][:, [4, 9, 11]]
    assert (got - full).norm() < 0.03 * full.norm() and cache.pos == 12
    write = Buffer.write

    def write_rounded(buffer, new, at):
        write(buffer, exact(quantise(new)), at)

    monkeypatch.setattr(Buffer, "write", write_rounded)
    want = through(model, model.make_cache(3, 12), idx, 5)
    torch.testing.assert_close(got, want, atol=1e-9, rtol=1e-9)


def test_bytes_and_rows(kind):
    """
    One byte per number and two per row of each head; row writes into the whole cache,
    broadcast_row copies rows with their scales, truncate.
    """
    model, idx = kind
    want = through(model, model.make_cache(1, 12, torch.int8), idx[1:2], 7)[:, -1:]
    cache = model.make_cache(3, 12, torch.int8)
    per_token = 0
    for layer in model.make_cache(1, 1).layers:
        per_token += sum(heads * (width + 2) for heads, width in layer.sizes())
    assert cache.bytes_per_token == per_token and cache.nbytes_at(5) == 5 * 3 * per_token
    assert cache.nbytes == 12 * 3 * per_token == sum(t.nbytes for t in cache.tensors)
    model(idx[1:2, :7], cache=cache.row(1))
    cache.advance(7)
    cache.broadcast_row(1)
    for _ in range(2):
        got = model(idx[1:2, 7:].expand(3, -1), cache=cache)[0]
        torch.testing.assert_close(got, want.expand(3, -1, -1), atol=1e-5, rtol=1e-5)
        cache.truncate(7)
