"""Padding, which a mask marks, changes nothing. Run: python -m pytest tests/test_mask.py"""

import pytest
import torch

from model import GPT
from nanomla.generate import Sampler, stream_tokens
from tests.conftest import GROWING, KINDS, make, tiny_config

LENGTHS = (9, 1, 4, 7, 2)  # real tokens of every sequence of T = 9
T = 9


def padded(side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (B, T), whose padding is no token id at all, and their mask."""
    mask = torch.zeros(len(LENGTHS), T, dtype=torch.bool)
    for row, length in zip(mask, LENGTHS, strict=True):
        if side == "left":
            row[T - length :] = True
        elif side == "right":
            row[:length] = True
        else:
            row[torch.randperm(T)[:length]] = True
    return torch.randint(23, mask.shape).masked_fill(~mask, -7), mask


@pytest.mark.parametrize("side", ["left", "right", "both sides and between"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_sequence_as_alone(kind, side):
    """
    Logits of real tokens, without a cache, with one in two passes, and of tokens that come after
    without a mask; to 1e-6 in float32.
    """
    model = make(kind)
    idx, mask = padded(side)
    after = torch.randint(23, (len(LENGTHS), 2))
    cache = model.make_cache(len(LENGTHS), 16)
    with torch.no_grad():
        whole, _ = model(idx, all_logits=True, mask=mask)
        last, _ = model(idx, mask=mask)
        first, _ = model(idx[:, :4], cache=cache, all_logits=True, mask=mask[:, :4])
        second, _ = model(idx[:, 4:], cache=cache, all_logits=True, mask=mask)
        later = [model(token, cache=cache)[0][:, 0] for token in after.split(1, dim=1)]
        assert cache.pos == 11 and cache.lengths.tolist() == [n + 2 for n in LENGTHS]
        cached = torch.cat([first, second], dim=1)
        for b, n in enumerate(LENGTHS):
            alone, _ = model(torch.cat([idx[b][mask[b]], after[b]])[None], all_logits=True)
            for logits, expected in (
                (whole[b][mask[b]], alone[0, :n]),
                (last[b], alone[0, n - 1 : n]),
                (cached[b][mask[b]], alone[0, :n]),
                (torch.stack(later, dim=1)[b], alone[0, n:]),
            ):
                torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", KINDS)
def test_prompts_of_unequal_lengths(kind, side):
    """Greedy tokens of each prompt alone: with a cache, in chunks of 2 tokens, and without one."""
    model = make(kind)
    idx, mask = padded(side)
    expected = [
        model.generate(row[real][None], 5, temperature=0)[0, -5:]
        for row, real in zip(idx, mask, strict=True)
    ]
    whole = model.generate(idx, 5, temperature=0, mask=mask)
    assert torch.equal(whole[:, :T], idx) and torch.equal(whole[:, T:], torch.stack(expected))
    for settings in ({"prefill_chunk": 2}, {"use_cache": False}):
        drawn = list(stream_tokens(model, idx, 5, Sampler(0), mask=mask, **settings))
        assert torch.equal(torch.cat(drawn, dim=1), torch.stack(expected))


@pytest.mark.parametrize("kind", GROWING)
def test_a_context_that_is_outgrown(kind):
    """With a cache or without, texts that slide through a context of 16 tokens stay finite."""
    model = make(kind)
    idx, mask = padded("left")
    assert model.generate(idx, 20, temperature=0, mask=mask).shape == (len(LENGTHS), T + 20)


@pytest.mark.parametrize("kind", KINDS)
def test_an_attention_alone(kind):
    """A block's attention takes the same mask without a GPT."""
    attn = make(kind).transformer.h[0].attn
    _, mask = padded("both sides and between")
    x = torch.randn(*mask.shape, 24)
    cache = attn.new_cache(len(LENGTHS), 16)
    with torch.no_grad():
        whole = attn(x, mask=mask)
        cached = attn(x, cache, mask=mask)
        cache.advance(T)
        assert cache.lengths.tolist() == list(LENGTHS)
        for b in range(len(LENGTHS)):
            alone = attn(x[b][mask[b]][None])[0]
            torch.testing.assert_close(whole[b][mask[b]], alone, rtol=0, atol=1e-5)
            torch.testing.assert_close(cached[b][mask[b]], alone, rtol=0, atol=1e-5)


def test_loss_and_gradients_of_real_tokens_only():
    """As of the sequences alone, whatever padding has as targets."""
    model = GPT(tiny_config(**KINDS["MLA"]))
    idx, mask = padded("right")
    targets = torch.randint(23, idx.shape)
    model(idx, targets, mask=mask)[1].backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for b, n in enumerate(LENGTHS):
        loss = model(idx[b : b + 1, :n], targets[b : b + 1, :n])[1]
        (loss * n / sum(LENGTHS)).backward()
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-4, atol=1e-6)


def test_all_real_is_no_mask_and_wrong_masks_are_named():
    """Equal to the bit; another shape or dtype, an empty prompt and a cache in use are refused."""
    model = make("MLA")
    idx = torch.randint(23, (2, 5))
    mask = torch.ones(2, 5, dtype=torch.bool)
    assert torch.equal(model(idx, mask=mask)[0], model(idx)[0])
    for wrong in (mask.int(), mask[:1], mask[:, :4], mask[0]):
        with pytest.raises(ValueError, match="mask="):
            model(idx, mask=wrong)
        with pytest.raises(ValueError, match="mask="):
            model.generate(idx, 2, mask=wrong)
    with pytest.raises(ValueError, match="a real token in every row"):
        model.generate(idx, 2, mask=torch.tensor([[True] * 5, [False] * 5]))
    cache = model.make_cache(2, 16)
    model.generate(idx, 2, cache=cache)
    with pytest.raises(ValueError, match="empty cache"):
        model.generate(idx, 2, cache=cache, mask=mask)
