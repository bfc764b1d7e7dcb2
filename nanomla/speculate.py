"""
Speculative decoding (arXiv:2211.17192): a cheap draft proposes a few tokens, and one pass of the
model checks them all. Greedy text is the model's own; drawn text has the model's distribution, but
takes other random numbers than without drafts.

    speculation = Speculation(model, count=3)
    for token in speculation.stream(idx, 100, Sampler(temperature=0.8)):  # (1, 1) each
        print(tokenizer.decode(token[0].tolist()), end="")
    print(speculation.accepted, "of", speculation.drafted)

The draft is the model's own block for the token after the next (n_predict=1), or another model with
the same tokens.
"""

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanomla.cache import Cache
from nanomla.checks import Natural, fits, require
from nanomla.errors import UserError
from nanomla.generate import (
    NOT_FINITE,
    PREFILL_CHUNK,
    Sampler,
    begin_context,
    check_prompt,
    check_shape,
    crop_context,
    next_logits,
    stop_ids,
    without_dropout,
)
from nanomla.kernels import FEW


# ---- Drafts
class OwnDraft:
    """
    The draft that is the model's predictor. Only its first token is what it was trained for: for
    the next ones it reads its own output instead of the model's.
    """

    def __init__(self, model: nn.Module, cache: Cache) -> None:
        self.model = model
        attn = model.predictor.h.attn
        self.cache = attn.new_cache(1, cache.max_len, cache.dtype, cache.device)
        self.hidden: Tensor | None = None  # what the head reads of the tokens from cache.pos on

    def logits(self, text: Tensor) -> Tensor:
        """Those of the token after text (1, T), (1, V); its last tokens may be drafts."""
        following = text[:, self.cache.pos + 1 :]
        self.hidden = self.model.predict(self.hidden, following, self.cache)[:, -1:]
        return self.model.lm_head(self.hidden[:, -1])

    def settle(self, length: int, hidden: Tensor) -> None:
        """
        The first `length` tokens of the text stay. hidden (1, n, C): what the head has read of the
        last n of them, for which the cache now has only what the predictor made itself.
        """
        begin = length - hidden.size(1)
        if self.cache.pos > begin:
            self.cache.truncate(begin)
        self.hidden = hidden


class OtherDraft:
    """The draft that is another model."""

    def __init__(self, model: nn.Module, cache: Cache, chunk: int | None) -> None:
        self.model = model
        self.cache = model.make_cache(1, cache.max_len)
        self.chunk = chunk

    def logits(self, text: Tensor) -> Tensor:
        """Those of the token after text (1, T), (1, V); its last tokens may be drafts."""
        return next_logits(self.model, text, self.cache, self.chunk, None)

    def settle(self, length: int, hidden: Tensor) -> None:
        """The first `length` tokens of the text stay, of which hidden (1, n, C) are n new ones."""
        if hidden.size(1) == length:  # the model has begun anew, with another part of the text
            length = 0
        self.cache.rewind(length)


# ---- The loop
class Speculation:
    """
    Continues one sequence at a time by a model, of which a pass checks up to `count` drafts.

    draft: another model, with the same tokens; None: the model's own predictor. Counts its drafts
    in `drafted`, and those of them that were taken in `accepted`.
    Raises ValueError for a model or a draft that cannot do it.
    """

    def __init__(
        self,
        model: nn.Module,
        count: int,
        draft: nn.Module | None = None,
        cache_dtype: torch.dtype | None = None,
    ) -> None:
        # a pass of at most FEW tokens is computed as a decoding step is
        works = fits(count, Natural) and 1 <= count < FEW
        require(works, "speculate", count, f"a whole number from 1 to {FEW - 1}")
        if draft is None and model.config.n_predict == 0:
            lacks = f"speculate={count} needs a draft, and the model has n_predict=0"
            raise ValueError(f"{lacks}: give a draft, or train a model with n_predict=1")
        for one in (model, draft or model):
            if not one.make_cache(1, 1).grows:
                state = f"the state of {one.transformer.h[0].attn.words}"
                raise ValueError(f"speculate={count} does not work: {state} cannot forget drafts")
        if draft is not None:
            ours = model.config
            theirs = draft.config
            same = theirs.vocab_size == ours.vocab_size
            require(same, "the draft's vocab_size", theirs.vocab_size, f"{ours.vocab_size}")
            long_enough = theirs.block_size >= ours.block_size
            allowed = f"at least the model's, {ours.block_size}"
            require(long_enough, "the draft's block_size", theirs.block_size, allowed)
        self.model = model
        self.count = count
        self.draft = draft
        self.cache_dtype = cache_dtype
        self.drafted = 0
        self.accepted = 0

    def stream(
        self,
        idx: Tensor,
        max_new_tokens: int,
        sampler: Sampler,
        stop: int | Iterable[int] | None = None,
        prefill_chunk: int | None = PREFILL_CHUNK,
    ) -> Iterator[Tensor]:
        """The new tokens of idx (1, T), each (1, 1); the arguments are those of stream_tokens."""
        model = self.model
        whole = fits(max_new_tokens, Natural)
        require(whole, "max_new_tokens", max_new_tokens, "a whole number of at least 0")
        check_shape(idx)
        if len(idx) > 1:
            raise ValueError(f"speculate={self.count} takes one sequence at a time, not {len(idx)}")
        check_prompt(idx[0].tolist(), model.config.vocab_size)
        ends = stop_ids(stop)
        block_size = model.config.block_size
        context = begin_context(idx, None, block_size)
        longest = min(block_size, idx.size(1) + max_new_tokens)
        cache = model.make_cache(1, longest, self.cache_dtype)
        if self.draft is None:
            drafter = OwnDraft(model, cache)
        else:
            drafter = OtherDraft(self.draft, cache, prefill_chunk)
        left = max_new_tokens
        with without_dropout(model, self.draft or model):
            while left > 0:
                context = crop_context(context, cache, block_size)
                count = min(self.count, left - 1, longest - context.size(1))
                if cache.pos == 0:  # the draft follows what the model has read
                    count = 0
                tokens = self._pass(context, count, cache, drafter, sampler, prefill_chunk)
                for token in tokens:
                    yield torch.tensor([[token]], device=idx.device)
                    if token in ends:
                        return
                context = torch.cat([context, torch.tensor([tokens], device=idx.device)], dim=1)
                left -= len(tokens)

    @torch.inference_mode()
    def _pass(
        self,
        context: Tensor,
        count: int,
        cache: Cache,
        drafter: OwnDraft | OtherDraft,
        sampler: Sampler,
        chunk: int | None,
    ) -> list[int]:
        """The next tokens of context (1, T), from 1 to count + 1, by one pass of the model."""
        text = context
        guesses = []  # the distribution of every draft
        for _ in range(count):
            guess = distribution(drafter.logits(text), sampler)[0]
            token = draw(guess, sampler)
            guesses.append(guess)
            text = torch.cat([text, token.view(1, 1)], dim=1)

        parts = []
        new = text[:, cache.pos :]
        for part in new.split(chunk or new.size(1), dim=1):
            parts.append(self.model.transformer.ln_f(self.model.run_blocks(part, cache)))
        hidden = torch.cat(parts, dim=1)
        logits = self.model.lm_head(hidden[0, -count - 1 :])  # (count + 1, V)
        drafts = text[0, context.size(1) :]
        accepted, token = accept(drafts, guesses, distribution(logits, sampler), sampler)
        self.drafted += count
        self.accepted += accepted

        rejected = count - accepted
        length = text.size(1) - rejected
        cache.truncate(length)
        drafter.settle(length, hidden[:, : hidden.size(1) - rejected])
        return [*drafts[:accepted].tolist(), int(token)]


# ---- What is drawn
def distribution(logits: Tensor, sampler: Sampler) -> Tensor:
    """What a sampler draws by, (n, V), from logits (n, V); at temperature 0 all is on one token."""
    if not bool(logits.isfinite().all()):
        raise UserError(NOT_FINITE)
    if sampler.temperature == 0:
        return F.one_hot(logits.argmax(dim=-1), logits.size(-1)).float()
    return sampler.probabilities(logits)


def draw(probabilities: Tensor, sampler: Sampler) -> Tensor:
    """A token by (V,) numbers in proportion to its probabilities, as (1,)."""
    if sampler.temperature == 0:
        return probabilities.argmax(dim=-1, keepdim=True)
    return torch.multinomial(probabilities, 1, generator=sampler.generator)


def accept(
    drafts: Tensor, guesses: list[Tensor], probabilities: Tensor, sampler: Sampler
) -> tuple[int, Tensor]:
    """
    How many of the drafts (n,) are taken, and the token behind those (arXiv:2211.17192,
    algorithm 1). guesses: the (V,) that each was drawn by; probabilities (n + 1, V): the model's.
    """
    for i, guess in enumerate(guesses):
        wanted = probabilities[i]
        ratio = float(wanted[drafts[i]] / guess[drafts[i]])
        if ratio >= 1:
            continue
        if float(torch.rand(1, generator=sampler.generator, device=drafts.device)) < ratio:
            continue
        missing = (wanted - guess).clamp(min=0)
        if not bool(missing.any()):  # the two are equal but for rounding
            missing = wanted
        return i, draw(missing, sampler)
    return len(guesses), draw(probabilities[-1], sampler)
