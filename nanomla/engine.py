"""
From prompts to text: streams, batches, stop strings and chats, all decoding on a model's cache.

    engine = Engine(model, tokenizer, Sampling(max_new_tokens=200, temperature=0.8))
    for text in engine.stream("ROMEO:"):
        print(text, end="")
"""

import math
import numbers
import operator
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from model import GPT, Cache
from nanomla.errors import UserError
from nanomla.tokenizer import StreamDecoder, Tokenizer


@dataclass(frozen=True)
class Sampler:
    """
    Draws one token per row from logits (B, V), as (B, 1) int64.

    temperature 0 takes the likeliest; top_k None or 0 and top_p None or 1 are off.
    Raises ValueError for values out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        t, k, p = self.temperature, self.top_k, self.top_p
        _require(_finite(t) and t >= 0, "temperature", t, "0 (greedy) or more, and finite")
        whole = k is None or (isinstance(k, numbers.Integral) and k >= 0)
        _require(whole, "top_k", k, "a whole number from 1, or None or 0 for off")
        share = p is None or (_finite(p) and 0 < p <= 1)
        _require(share, "top_p", p, "above 0 and at most 1, or None for off")

    def __call__(self, logits: Tensor) -> Tensor:
        if not bool(logits.isfinite().all()):
            raise UserError("the model's logits are not finite; try --dtype=float32")
        if self.temperature == 0:
            return logits.argmax(dim=-1, keepdim=True)
        tiny = torch.finfo(torch.float32).tiny  # what is below would be rounded to 0
        logits = logits.float()
        logits = (logits - logits.amax(dim=-1, keepdim=True)) / max(self.temperature, tiny)
        if self.top_k:
            kth = logits.topk(min(self.top_k, logits.size(-1))).values[:, -1:]
            logits = logits.masked_fill(logits < kth, float("-inf"))
        if self.top_p is not None and self.top_p < 1:
            ordered, order = logits.sort(dim=-1, descending=True)
            probs = ordered.softmax(dim=-1)
            before = probs.cumsum(dim=-1) - probs  # the mass of likelier tokens
            ordered = ordered.masked_fill(before >= max(self.top_p, tiny), float("-inf"))
            logits = logits.scatter(-1, order, ordered)
        return torch.multinomial(logits.softmax(dim=-1), 1, generator=self.generator)


def _require(holds: bool, field: str, value: object, works: str) -> None:
    if not holds:
        raise ValueError(f"{field}={value!r} does not work: {field} must be {works}")


def _finite(value: object) -> bool:
    return isinstance(value, numbers.Real) and math.isfinite(value)


def stop_ids(stop: int | Iterable[int] | None) -> list[int]:
    """The token ids that end a row: integers of any type, also a tensor's; else ValueError."""
    if stop is None:
        return []
    single = getattr(stop, "ndim", 1) == 0 or not isinstance(stop, Iterable)
    try:
        return [operator.index(token) for token in ([stop] if single else stop)]
    except TypeError:
        wrong = f"stop={stop!r} does not work"
        raise ValueError(f"{wrong}: stop must be None, a token id or several") from None


@torch.inference_mode()
def check_prompt(idx: Tensor, cache: Cache | None, block_size: int) -> Tensor:
    """
    What a model can look at of a prompt idx (B, T), its last tokens. A cache, which holds the first
    cache.pos tokens of idx, is made ready to go on with them: it forgets the last one, which is
    computed again, or all of them if idx does not fit it. ValueError for what cannot be continued.
    """
    if idx.dim() != 2 or idx.size(1) == 0:
        wrong = f"idx of shape {tuple(idx.shape)} does not work"
        raise ValueError(f"{wrong}: it must be (B, T) with at least one token")
    if cache is None:
        return idx[:, -block_size:]
    if cache.pos > idx.size(1):
        held = f"the cache holds {cache.pos} tokens, idx {idx.size(1)}"
        raise ValueError(f"{held}: it must begin with those; truncate the cache")
    longest = min(cache.max_len, block_size)
    cache.rewind(idx.size(1) - 1 if idx.size(1) <= longest else 0)
    return idx[:, -longest:]


@torch.inference_mode()
def crop_context(context: Tensor, cache: Cache | None, block_size: int) -> Tensor:
    """
    The last tokens of context (B, T) that a model can look at. A context that has outgrown its
    cache goes on with half of what that can hold, the newest, and the cache is emptied for them.
    """
    if cache is None:
        return context[:, -block_size:]
    longest = min(cache.max_len, block_size)
    if context.size(1) <= longest:
        return context
    cache.truncate(0)
    return context[:, -max(longest // 2, 1) :]


@torch.inference_mode()
def next_token(model: GPT, context: Tensor, cache: Cache | None, sampler: Sampler) -> Tensor:
    """The next token of context (B, T), (B, 1); a cache holds the first cache.pos tokens of it."""
    logits, _ = model(context if cache is None else context[:, cache.pos :], cache=cache)
    return sampler(logits[:, -1])


@dataclass
class Sampling:
    """How every sample is drawn, and where it ends."""

    max_new_tokens: int = 500
    temperature: float = 0.8
    top_k: int | None = 200
    top_p: float | None = None
    stop: str | None = None  # the text that ends a sample, and is no part of it
    use_cache: bool = True
    cache_dtype: torch.dtype | None = None  # None: that of the weights


class StopText:
    """Passes text on up to the stop string, and keeps back what may become it."""

    def __init__(self, stop: str | None) -> None:
        self.stop, self.pending, self.done = stop, "", False

    def push(self, text: str, last: bool = False) -> str:
        """The text that can be shown now; `done` is True once the stop string has come."""
        if self.stop is None or self.done:
            return "" if self.done else text
        self.pending += text
        found = self.pending.find(self.stop)
        if found >= 0:
            self.done = True
            return self.pending[:found]
        longest = 0 if last else len(self.stop) - 1
        keep = next((n for n in range(longest, 0, -1) if self.pending.endswith(self.stop[:n])), 0)
        end = len(self.pending) - keep
        shown, self.pending = self.pending[:end], self.pending[end:]
        return shown


@dataclass
class Sample:
    """One continuation as it grows: its tokens, and its text up to the stop string."""

    tokenizer: Tokenizer
    stop: str | None
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    seconds: float = 0.0  # that its batch took

    def __post_init__(self) -> None:
        self._decoder, self._until = StreamDecoder(self.tokenizer), StopText(self.stop)

    @property
    def done(self) -> bool:
        """Whether the stop string has come."""
        return self._until.done

    def push(self, token: int) -> str:
        """Add a token; returns the text that it completes."""
        self.tokens.append(token)
        return self._show(self._until.push(self._decoder.push(token)))

    def finish(self) -> str:
        """Returns the text that was kept back in case more came."""
        return self._show(self._until.push(self._decoder.finish(), last=True))

    def _show(self, text: str) -> str:
        self.text += text
        return text


class Engine:
    """
    A model with its tokenizer and the way it samples. Its random numbers go on from call to call.

    `tokens_made` counts the tokens of all calls. The methods raise UserError for a prompt that is
    longer than the model's context or that the tokenizer cannot spell.
    """

    def __init__(
        self, model: GPT, tokenizer: Tokenizer, sampling: Sampling, seed: int = 1337
    ) -> None:
        self.model, self.tokenizer, self.sampling = model, tokenizer, sampling
        self.device = model.lm_head.weight.device
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.tokens_made = 0

    def stream(self, prompt: str) -> Iterator[str]:
        """The continuation of a prompt, piece by piece as it is made."""
        sample = Sample(self.tokenizer, self.sampling.stop)
        yield from self.extend(sample, self.encode(prompt))

    def complete(self, prompts: list[str], num_samples: int = 1) -> list[list[Sample]]:
        """
        num_samples continuations of every prompt, drawn side by side: prompts of equal length share
        their steps.
        """
        encoded = [self.encode(prompt) for prompt in prompts]
        results: list[list[Sample]] = [[] for _ in prompts]
        for length in dict.fromkeys(map(len, encoded)):
            group = [i for i, prompt in enumerate(encoded) if len(prompt) == length]
            rows = [i for i in group for _ in range(num_samples)]
            samples = [Sample(self.tokenizer, self.sampling.stop) for _ in rows]
            began = time.perf_counter()
            for column in self._tokens([encoded[i] for i in rows]):
                for sample, token in zip(samples, column[:, 0].tolist(), strict=True):
                    if not sample.done:
                        sample.push(token)
                        self.tokens_made += 1
                if all(sample.done for sample in samples):
                    break
            for i, sample in zip(rows, samples, strict=True):
                sample.finish()
                sample.seconds = time.perf_counter() - began
                results[i].append(sample)
        return results

    def chat(self) -> "Chat":
        """A conversation that keeps its cache from turn to turn."""
        return Chat(self)

    def encode(self, text: str) -> list[int]:
        """A prompt's tokens."""
        prompt = self.tokenizer.encode(text)
        vocab_size = self.model.config.vocab_size
        if prompt and max(prompt) >= vocab_size:
            known = f"the model knows {vocab_size} token ids"
            raise UserError(f"the prompt has the token id {max(prompt)}, {known}")
        if len(prompt) > self.model.config.block_size:
            context = f"the model's context {self.model.config.block_size}"
            raise UserError(f"the prompt has {len(prompt)} tokens, {context}; shorten it")
        return prompt

    def extend(
        self, sample: Sample, prompt: list[int], cache: Cache | None = None
    ) -> Iterator[str]:
        """Add tokens to a sample; yields the text that each completes. cache as in generate."""
        for token in self._tokens([prompt], cache):
            self.tokens_made += 1
            yield sample.push(int(token))
            if sample.done:
                break
        yield sample.finish()

    def _tokens(self, prompts: list[list[int]], cache: Cache | None = None) -> Iterator[Tensor]:
        """Continue prompts of one length side by side: an iterator over (B, 1)."""
        s, idx = self.sampling, torch.tensor(prompts, device=self.device)
        sampler = Sampler(s.temperature, s.top_k, s.top_p, self.generator)
        where = (s.use_cache, s.cache_dtype, cache)
        return stream_tokens(self.model, idx, s.max_new_tokens, sampler, *where)


class Chat:
    """A conversation: every line follows all that came before, of which the cache is kept."""

    def __init__(self, engine: Engine) -> None:
        self.engine, model = engine, engine.model
        self.cache = model.make_cache(1, model.config.block_size, engine.sampling.cache_dtype)
        self.context: list[int] = []  # the cache's tokens, and those that the model has yet to read

    def reset(self) -> None:
        """Forget the conversation."""
        self.context = []
        self.cache.truncate(0)

    def reply(self, line: str) -> Iterator[str]:
        """The model's continuation of the conversation and this line, piece by piece."""
        new = self.engine.encode(line + "\n")
        first = len(self.engine.encode(""))  # tokens that a tokenizer puts before every text
        self.context += new[first:] if self.context else new
        if len(self.context) > self.cache.max_len:
            tail = self.context[-max(self.cache.max_len // 2 - first, 1) :]
            self.context = new[:first] + tail
            self.cache.truncate(0)
        sample = Sample(self.engine.tokenizer, self.engine.sampling.stop)
        try:
            yield from self.engine.extend(sample, self.context, self.cache)
        finally:  # also when the caller stops listening
            if sample.tokens:
                self.context = (self.context + sample.tokens)[-(self.cache.pos + 1) :]


def stream_tokens(
    model: GPT,
    idx: Tensor,
    max_new_tokens: int,
    sampler: Sampler,
    use_cache: bool = True,
    cache_dtype: torch.dtype | None = None,
    cache: Cache | None = None,
    stop: int | Iterable[int] | None = None,
) -> Iterator[Tensor]:
    """
    The new tokens of idx (B, T), each (B, 1) as it is drawn, without dropout: a model in training
    mode is in evaluation mode until the last. The other arguments are those of GPT.generate. A
    prompt that all rows share is prefilled once.
    """
    whole = isinstance(max_new_tokens, numbers.Integral) and max_new_tokens >= 0
    _require(whole, "max_new_tokens", max_new_tokens, "a whole number from 0")
    block_size, stops = model.config.block_size, stop_ids(stop)
    ends = torch.tensor(stops, device=idx.device)
    training = [module for module in model.modules() if module.training]
    context = check_prompt(idx, cache, block_size)
    if training:
        model.eval()
    try:
        if cache is None and use_cache and max_new_tokens > 0:
            longest = min(block_size, idx.size(1) + max_new_tokens)
            cache = model.make_cache(idx.size(0), longest, cache_dtype)
            prefill_shared(model, context, cache)
        done = torch.zeros(idx.size(0), 1, dtype=torch.bool, device=idx.device)
        for _ in range(max_new_tokens):
            context = crop_context(context, cache, block_size)
            token = torch.where(done, context[:, -1:], next_token(model, context, cache, sampler))
            context = torch.cat([context, token], dim=1)
            yield token
            if stops:
                done = torch.isin(token, ends)
                if bool(done.all()):
                    break
    finally:
        for module in training:  # a part may have been in evaluation mode before
            module.training = True


@torch.inference_mode()
def prefill_shared(model: GPT, prompt: Tensor, cache: Cache) -> None:
    """Fill an empty cache with all but the last token of prompt (B, T), if all rows are equal."""
    B, T = prompt.shape
    if B > 1 and T > 1 and bool((prompt == prompt[:1]).all()):
        model(prompt[:1, :-1], cache=cache.row(0))
        cache.advance(T - 1)
        cache.broadcast_row(0)
