"""
From prompts to text: streams, batches, stop strings and chats, all decoding on a model's cache.

    engine = Engine(model, tokenizer, Sampling(max_new_tokens=200, temperature=0.8))
    for text in engine.stream("ROMEO:"):
        print(text, end="")

    batch = Batch(model, tokenizer, rows=16)  # requests join and leave it between its steps
    batch.submit(Request(tokenizer.encode("ROMEO:"), Sampling(max_new_tokens=200)))
    while batch.busy:
        for piece in batch.step():
            print(piece.text, end="")
"""

import itertools
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from model import GPT
from nanomla.cache import Cache
from nanomla.errors import UserError
from nanomla.generate import (
    NOT_FINITE,
    PREFILL_CHUNK,
    Sampler,
    draw_each,
    newer_half,
    stream_tokens,
)
from nanomla.tokenizer import StreamDecoder, Tokenizer

ROWS = 64  # samples side by side, unless a caller says otherwise


@dataclass
class Sampling:
    """How every sample is drawn, and where it ends."""

    max_new_tokens: int = 500
    temperature: float = 0.8
    top_k: int | None = 200
    top_p: float | None = None
    stop: str | tuple[str, ...] | None = None  # what ends a sample, and is no part of it
    use_cache: bool = True
    cache_dtype: torch.dtype | None = None  # None: that of the weights
    end: int | None = None  # the token that ends a text in a Batch, and is no part of it
    prefill_chunk: int | None = PREFILL_CHUNK  # tokens of a prompt that a pass reads; None: all


class StopText:
    """Passes text on up to a stop string, and keeps back what may become one."""

    def __init__(self, stop: str | tuple[str, ...] | None) -> None:
        self.stops = (stop,) if isinstance(stop, str) else stop or ()
        self.pending, self.done = "", False

    def push(self, text: str, last: bool = False) -> str:
        """The text that can be shown now; `done` is True once a stop string has come."""
        if not self.stops or self.done:
            return "" if self.done else text
        self.pending += text
        found = [at for stop in self.stops if (at := self.pending.find(stop)) >= 0]
        if found:
            self.done = True
            return self.pending[: min(found)]
        keep = 0 if last else max(_begun(self.pending, stop) for stop in self.stops)
        end = len(self.pending) - keep
        shown, self.pending = self.pending[:end], self.pending[end:]
        return shown


def _begun(text: str, stop: str) -> int:
    """How many characters at the end of a text are the beginning of a stop string."""
    return next((n for n in range(len(stop) - 1, 0, -1) if text.endswith(stop[:n])), 0)


@dataclass
class Sample:
    """One continuation as it grows: its tokens, and its text up to the stop string."""

    tokenizer: Tokenizer
    stop: str | tuple[str, ...] | None
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    decoded: int = 0  # characters that the tokens have completed, shown or not
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
        text = self._decoder.push(token)
        self.decoded += len(text)
        return self._show(self._until.push(text))

    def finish(self) -> str:
        """Returns the text that was kept back in case more came."""
        text = self._decoder.finish()
        self.decoded += len(text)
        return self._show(self._until.push(text, last=True))

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
        """num_samples continuations of every prompt, up to ROWS side by side."""
        encoded = [self.encode(prompt) for prompt in prompts]
        if not self.sampling.use_cache:
            return [self._uncached(prompt, num_samples) for prompt in encoded]
        s, block_size = self.sampling, self.model.config.block_size
        longest = max(map(len, encoded), default=1) + s.max_new_tokens
        rows = min(max(len(prompts), 1) * num_samples, ROWS)
        chunk = block_size if s.prefill_chunk is None else s.prefill_chunk
        how = s.cache_dtype, chunk, min(longest, block_size)
        batch = Batch(self.model, self.tokenizer, rows, *how)
        parts = [min(rows, num_samples - i) for i in range(0, num_samples, rows)]
        many = (len(encoded), len(parts))
        seeds = torch.randint(2**62, many, device=self.device, generator=self.generator).tolist()
        requests = [
            [Request(prompt, s, n, seed) for n, seed in zip(parts, row, strict=True)]
            for prompt, row in zip(encoded, seeds, strict=True)
        ]
        for request in itertools.chain(*requests):
            batch.submit(request)
        began = time.perf_counter()
        while batch.busy:
            for piece in batch.step():
                if piece.error:
                    raise UserError(piece.error)
                if piece.finish:
                    seconds = time.perf_counter() - began
                    piece.request.samples[piece.index].seconds = seconds
        self.tokens_made += batch.tokens_made
        return [[sample for part in parts for sample in part.samples] for parts in requests]

    def _uncached(self, prompt: list[int], n: int) -> list[Sample]:
        """n continuations of a prompt, side by side, without a cache."""
        samples = [Sample(self.tokenizer, self.sampling.stop) for _ in range(n)]
        began = time.perf_counter()
        for column in self._columns([prompt] * n):
            for sample, token in zip(samples, column[:, 0].tolist(), strict=True):
                if not sample.done:
                    sample.push(token)
                    self.tokens_made += 1
            if all(sample.done for sample in samples):
                break
        for sample in samples:
            sample.finish()
            sample.seconds = time.perf_counter() - began
        return samples

    def _columns(self, prompts: list[list[int]], cache: Cache | None = None) -> Iterator[Tensor]:
        """Continue prompts of one length side by side: an iterator over (B, 1)."""
        s, idx = self.sampling, torch.tensor(prompts, device=self.device)
        sampler = Sampler(s.temperature, s.top_k, s.top_p, self.generator)
        how = (s.use_cache, s.cache_dtype, cache, None, s.prefill_chunk)
        return stream_tokens(self.model, idx, s.max_new_tokens, sampler, *how)

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
        for token in self._columns([prompt], cache):
            self.tokens_made += 1
            yield sample.push(int(token))
            if sample.done:
                break
        yield sample.finish()


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
            tail = self.context[-max(newer_half(self.cache.max_len) - first, 1) :]
            self.context = new[:first] + tail
            self.cache.truncate(0)
        sample = Sample(self.engine.tokenizer, self.engine.sampling.stop)
        try:
            yield from self.engine.extend(sample, self.context, self.cache)
        finally:  # also when the caller stops listening
            if sample.tokens:
                self.context = (self.context + sample.tokens)[-(self.cache.pos + 1) :]


class Token(NamedTuple):
    """A token of a request, with what the model thought of it."""

    id: int
    raw: bytes  # its UTF-8 bytes, which may be a part of a character
    chars: int  # characters of the text that it completes
    logprob: float | None = None  # of the model itself, at temperature 1; None: not asked for
    top: tuple[tuple[int, float], ...] = ()  # the likeliest ids and their logprobs, best first

    @property
    def text(self) -> str:
        """The token's own text, with U+FFFD for bytes that are a part of a character."""
        return self.raw.decode("utf-8", "replace")


@dataclass(eq=False)
class Request:
    """n continuations of a prompt. The last four fields are set while a Batch serves it."""

    prompt: list[int]
    sampling: Sampling
    n: int = 1
    seed: int = 1337  # of sample 0; sample i draws with seed + i
    logprobs: int | None = None  # so many likely tokens beside each that is drawn; None: no logprob
    prompt_logprobs: bool = False  # the same for the tokens of the prompt
    cache_prompt: bool = False  # go on from what earlier requests with this flag left, and leave it
    window: int | None = None  # of a prompt that is too long, the last tokens; None: it is refused
    samples: list[Sample] = field(default_factory=list)  # as they grow
    prompt_tokens: list[Token] = field(default_factory=list)  # with prompt_logprobs
    cached: int = 0  # prompt tokens that the cache had already
    computed: int = 0  # prompt tokens that it had not


@dataclass(frozen=True)
class Piece:
    """What one step adds to sample `index` of a request."""

    request: Request
    index: int
    text: str  # "" while a character, or what may be a stop string, is unfinished
    tokens: tuple[Token, ...]  # those whose text is shown
    made: int  # tokens drawn so far, those that are not shown too
    held: int  # tokens in the sample's row of the cache
    nbytes: int  # that these take there
    finish: str | None = None  # "stop", "length" or "error"
    error: str | None = None


class Drawn:
    """A sample that a Batch draws: its request, random numbers, and the tokens not yet shown."""

    def __init__(self, request: Request, index: int, tokenizer: Tokenizer, device: torch.device):
        s, seed = request.sampling, (request.seed + index) % 2**63
        generator = torch.Generator(device).manual_seed(seed)
        self.request, self.index = request, index
        self.sampler = Sampler(s.temperature, s.top_k, s.top_p, generator)
        self.sample, self.made = Sample(tokenizer, s.stop), 0
        request.samples.append(self.sample)
        self.unshown: list[tuple[int, Token]] = []  # with the character that each begins at

    def push(self, id: int, logprob: float | None, top: tuple) -> tuple[str, str | None]:
        """Take a token that was drawn; returns the text to show and how the sample ends, if so."""
        sampling, sample = self.request.sampling, self.sample
        self.made += 1
        if id == sampling.end:
            return sample.finish(), "stop"
        begin = sample.decoded
        text = sample.push(id)
        raw = sample.tokenizer.token_bytes(id)
        self.unshown.append((begin, Token(id, raw, sample.decoded - begin, logprob, top)))
        if sample.done:
            return text, "stop"
        if self.made >= sampling.max_new_tokens:
            return text + sample.finish(), "stop" if sample.done else "length"
        return text, None

    def shown(self, finish: str | None) -> tuple[Token, ...]:
        """The tokens whose text has been shown since the last call; at a stop also in part."""
        end, part = len(self.sample.text), finish == "stop"
        n = sum(begin < end if part else begin + t.chars <= end for begin, t in self.unshown)
        done, self.unshown = self.unshown[:n], self.unshown[n:]
        return tuple(token for _, token in done)


@dataclass(eq=False)
class Slot:
    """A row of a Batch's cache, which holds tokens[start : start + cache.pos] of a text."""

    cache: Cache  # of one row, with its own pos
    tokens: list[int] = field(default_factory=list)
    start: int = 0
    drawn: Drawn | None = None
    used: int = 0  # the step in which it was last used


class Batch:
    """
    Continuous batching: requests join and leave between steps, each sample a row of one cache that
    is allocated once, at a position, with settings and with random numbers of its own. What a
    request gets does not depend on the others, but for the rounding of sums.

    The slots of the samples that are being drawn come first, so that a step takes a view of the
    cache. The request that joins next has its prompt read in one of the others, all but the last
    token, which is the first that a step takes. What is left in the rest may be gone on from.

    rows: samples at a time. max_len: tokens that a row holds, by default the model's context; a
    longer text goes on with its newer half. prefill_chunk: prompt tokens read in one step, 1 or
    more, else ValueError.
    The model is put into evaluation mode. A Batch is not thread-safe: one thread owns it.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        rows: int = 16,
        cache_dtype: torch.dtype | None = None,
        prefill_chunk: int = 256,
        max_len: int | None = None,
    ) -> None:
        self.model, self.tokenizer, self.rows = model.eval(), tokenizer, rows
        self.device = model.lm_head.weight.device
        if prefill_chunk < 1:
            raise ValueError(f"prefill_chunk={prefill_chunk} does not work: it must be 1 or more")
        self.prefill_chunk, self.max_len = prefill_chunk, max_len or model.config.block_size
        self.cache = model.make_cache(rows + 1, self.max_len, cache_dtype)
        self.slots = [Slot(self.cache.row(i)) for i in range(rows)]
        self.spare = self.cache.row(rows)  # to exchange two rows
        self.waiting: deque[Request] = deque()
        self.joining: Joining | None = None
        self.active = 0  # samples being drawn, in the first slots
        self.tokens_made, self.steps, self.seconds = 0, 0, 0.0

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.active or self.joining or self.waiting)

    @property
    def cache_bytes(self) -> int:
        """Bytes that the tokens of the samples being drawn take in the cache."""
        return sum(slot.cache.nbytes_at(slot.cache.pos) for slot in self.slots[: self.active])

    def check(self, request: Request) -> None:
        """Raise UserError for a request that cannot be served."""
        prompt, vocab_size = request.prompt, self.model.config.vocab_size
        if not prompt:
            raise UserError("the prompt is empty; give at least one token")
        if not 0 <= min(prompt) <= max(prompt) < vocab_size:
            wrong = next(token for token in prompt if not 0 <= token < vocab_size)
            known = f"the model knows {vocab_size} token ids"
            raise UserError(f"the prompt has the token id {wrong}, {known}")
        if len(prompt) > self.max_len and request.window is None:
            context = f"the model's context {self.max_len}"
            raise UserError(f"the prompt has {len(prompt)} tokens, {context}; shorten it")
        if request.window is not None and not 1 <= request.window <= self.max_len:
            works = f"it must be from 1 to {self.max_len} tokens"
            raise UserError(f"window={request.window} does not work: {works}")
        if not 1 <= request.n <= self.rows:
            raise UserError(f"n={request.n} does not work: it must be from 1 to {self.rows}")
        try:
            Sampler(request.sampling.temperature, request.sampling.top_k, request.sampling.top_p)
        except ValueError as error:
            raise UserError(str(error)) from None

    def submit(self, request: Request) -> None:
        """Serve a request as soon as n rows are free, after those that came before."""
        self.check(request)
        self.waiting.append(request)

    def cancel(self, request: Request) -> None:
        """Stop serving a request: its rows are free at once. Nothing happens if it has ended."""
        if request in self.waiting:
            self.waiting.remove(request)
        if self.joining and self.joining.request is request:
            self._let_go(self.joining.slot, keep=False)
            self.joining = None
        for i in reversed(range(self.active)):
            drawn = self.slots[i].drawn
            if drawn.request is request:
                self._leave(i, keep=request.cache_prompt and drawn.made > 0)

    @torch.inference_mode()
    def step(self) -> list[Piece]:
        """Read some of the prompts that wait, then draw one token for every sample."""
        began, pieces = time.perf_counter(), []
        self.steps += 1
        self._read_prompts(pieces)
        if self.active:
            self._draw(pieces)
        self.seconds += time.perf_counter() - began
        return pieces

    def _read_prompts(self, pieces: list[Piece]) -> None:
        """
        Read about prefill_chunk tokens of the requests that join, one request after another. Where
        a prompt is cut does not depend on the others: a cache of int8 makes a difference there.
        """
        budget = self.prefill_chunk
        while budget > 0:
            if self.joining is None:
                budget -= self._read_together(budget)
                if not self.waiting or self.waiting[0].n > self.rows - self.active:
                    break
                self.joining = self._begin(self.waiting.popleft())
            request, slot, _ = self.joining
            new = slot.tokens[slot.start + slot.cache.pos : -1][: self.prefill_chunk]
            budget -= max(len(new), 1)
            try:
                self._read(new)
            except (UserError, ValueError) as error:  # a prompt that int8 cannot hold, for one
                pieces += self._refused(request, slot, "error", str(error))
                continue
            if slot.start + slot.cache.pos < len(slot.tokens) - 1:
                continue
            if request.sampling.max_new_tokens > 0:
                self._join(request, slot)
            else:
                pieces += self._refused(request, slot, "length")

    def _read_together(self, budget: int) -> int:
        """
        Read the short prompts that wait in one pass, if there are several that need no more than
        that; returns the tokens that it took.
        """
        group, rows, width = [], self.rows - self.active, 0
        for request in self.waiting:
            plain = not (request.cache_prompt or request.prompt_logprobs)
            plain = plain and 1 < len(request.prompt) <= self.max_len
            longest = max(width, len(request.prompt) - 1)
            fits = request.n <= rows and (len(group) + 1) * longest <= budget
            if not (plain and fits and request.sampling.max_new_tokens):
                break
            group.append(request)
            rows, width = rows - request.n, longest
        if len(group) < 2 or not self.cache.grows:
            return 0
        try:
            caches = self._computed([request.prompt[:-1] for request in group])
        except (UserError, ValueError):  # a prompt that int8 cannot hold is found when read alone
            return 0
        for request, cache in zip(group, caches, strict=True):
            slot = self._begin(self.waiting.popleft()).slot
            slot.cache.copy_from(cache)
            self._join(request, slot)
        return len(group) * width

    def _computed(self, texts: list[list[int]]) -> list[Cache]:
        """Caches, one of one row for every text, that hold all its tokens, in one pass."""
        width = max(map(len, texts))
        cache = self.model.make_cache(len(texts), width, self.cache.dtype)
        idx = torch.tensor([text + [0] * (width - len(text)) for text in texts])
        self.model(idx.to(self.device), cache=cache)
        rows = [cache.row(i) for i in range(len(texts))]
        for row, text in zip(rows, texts, strict=True):
            row.truncate(len(text))  # what fills the shorter ones up came after them
        return rows

    def _begin(self, request: Request) -> "Joining":
        """Take a free slot for a prompt, the one that has the longest start of it if it may."""
        free, prompt = self.slots[self.active :], request.prompt
        slot, keep = min(free, key=lambda slot: (bool(slot.tokens), slot.used)), 0
        if request.cache_prompt and not request.prompt_logprobs:
            known = [self._in_common(slot, prompt) for slot in free]
            keep = max(known)
            slot = free[known.index(keep)] if keep else slot
        if keep:
            slot.cache.rewind(min(keep, len(prompt) - slot.start - 1))
        else:
            slot.cache.truncate(0)
            slot.start = len(prompt) - request.window if len(prompt) > self.max_len else 0
        slot.tokens, request.cached = list(prompt), slot.cache.pos
        request.computed = len(prompt) - slot.start - slot.cache.pos
        joining = Joining(request, slot, StreamDecoder(self.tokenizer))
        if request.prompt_logprobs:
            first = prompt[slot.start]
            request.prompt_tokens.append(self._prompt_token(joining, first, None, ()))
        return joining

    def _in_common(self, slot: Slot, prompt: list[int]) -> int:
        """How many tokens in a slot's cache are those of the prompt, if it can go on from them."""
        if len(prompt) - slot.start > self.max_len or (slot.start and len(prompt) <= self.max_len):
            return 0  # it needs another window of the text, or all of it
        held = slot.tokens[: slot.start + slot.cache.pos]
        pairs = enumerate(zip(held, prompt, strict=False))
        same = next((i for i, (a, b) in pairs if a != b), min(len(held), len(prompt)))
        if not slot.cache.grows and not same == len(held) < len(prompt):
            return 0  # a state cannot go back
        return max(same - slot.start, 0)

    def _read(self, new: list[int]) -> None:
        """Put more of the joining prompt into its slot's cache."""
        if not new:
            return
        request, slot, _ = self.joining
        idx, first = torch.tensor([new], device=self.device), slot.start + slot.cache.pos
        if not request.prompt_logprobs:
            self.model(idx, cache=slot.cache)
            return
        logits = self.model(idx, cache=slot.cache, all_logits=True)[0][0]  # (T, V)
        if not bool(logits.isfinite().all()):
            raise UserError(NOT_FINITE)
        following = request.prompt[first + 1 : first + 1 + len(new)]
        scores = log_probabilities(logits, following, request.logprobs or 0)
        for token, score in zip(following, scores, strict=True):
            request.prompt_tokens.append(self._prompt_token(self.joining, token, *score))

    def _prompt_token(
        self, joining: "Joining", token: int, logprob: float | None, top: tuple
    ) -> Token:
        chars = len(joining.decoder.push(token))
        return Token(token, self.tokenizer.token_bytes(token), chars, logprob, top)

    def _refused(
        self, request: Request, slot: Slot, finish: str, error: str | None = None
    ) -> list[Piece]:
        """The joining request ends without a sample."""
        held = slot.cache.pos
        size, self.joining = slot.cache.nbytes_at(held), None
        self._let_go(slot, keep=False)
        return [Piece(request, i, "", (), 0, held, size, finish, error) for i in range(request.n)]

    def _join(self, request: Request, slot: Slot) -> None:
        """The joining request has its prompt in the cache but for the last token: draw from now."""
        if (at := self.slots.index(slot)) != self.active:
            self._exchange(at, self.active)
        for i in range(request.n):
            row = self.slots[self.active + i]
            if row is not slot:
                row.cache.copy_from(slot.cache)
                row.tokens, row.start = list(slot.tokens), slot.start
            row.drawn = Drawn(request, i, self.tokenizer, self.device)
        self.active += request.n
        self.joining = None

    def _draw(self, pieces: list[Piece]) -> None:
        """Draw the next token of every sample."""
        slots = self.slots[: self.active]
        logits, errors = self._logits(slots)
        bad = (~logits.isfinite().all(dim=-1)).nonzero()[:, 0].tolist()
        errors = {**dict.fromkeys(bad, NOT_FINITE), **errors}
        if errors:
            logits[[*errors]] = 0  # their rows end here
        tokens = draw_each(logits, [slot.drawn.sampler for slot in slots])[:, 0].tolist()
        scores = self._scores(logits, tokens)
        ended = []
        for i, (slot, token) in enumerate(zip(slots, tokens, strict=True)):
            drawn, held = slot.drawn, slot.cache.pos
            if error := errors.get(i):
                text, finish = "", "error"
            else:
                self.tokens_made += 1
                slot.tokens.append(token)
                text, finish = drawn.push(token, *scores.get(i, (None, ())))
            shown, size = drawn.shown(finish), slot.cache.nbytes_at(held)
            if text or shown or finish:
                where = (drawn.request, drawn.index, text, shown, drawn.made, held, size)
                pieces.append(Piece(*where, finish, error))
            if finish:
                ended.append((i, finish))
        for i, finish in reversed(ended):
            self._leave(i, keep=slots[i].drawn.request.cache_prompt and finish != "error")

    def _logits(self, slots: list[Slot]) -> tuple[Tensor, dict[int, str]]:
        """The next token's logits of every slot, (B, V), and what went wrong by slot."""
        errors = self._shorten(slots)
        idx = torch.tensor([[slot.tokens[-1]] for slot in slots], device=self.device)
        view = first_sequences(self.cache, [slot.cache.pos for slot in slots])
        try:
            logits = self.model(idx, cache=view)[0][:, -1]
        except ValueError:  # in one row or several: each alone
            logits = torch.zeros(len(slots), self.model.config.vocab_size, device=self.device)
            for i, slot in enumerate(slots):
                try:
                    logits[i] = self.model(idx[i : i + 1], cache=slot.cache)[0][0, -1]
                except ValueError as error:
                    errors[i] = str(error)
            return logits, errors
        for slot in slots:
            slot.cache.advance(1)
        return logits, errors

    def _shorten(self, slots: list[Slot]) -> dict[int, str]:
        """
        Texts that have outgrown their rows go on with the newer half of what those can hold.
        Returns what went wrong by slot.
        """
        half = newer_half(self.max_len)
        errors = {}
        full = [i for i, s in enumerate(slots) if len(s.tokens) - s.start > self.max_len]
        for i in full:
            slots[i].start = len(slots[i].tokens) - half
            slots[i].cache.truncate(0)
        size = max(self.prefill_chunk // half, 1) if self.cache.grows else 1
        groups = [full[i : i + size] for i in range(0, len(full), size)] if half > 1 else []
        while groups:
            group = groups.pop()
            try:
                caches = self._computed([slots[i].tokens[slots[i].start : -1] for i in group])
            except (UserError, ValueError) as error:  # numbers that int8 cannot hold, no memory
                if len(group) > 1:  # in one of them or several: each alone
                    groups += [[i] for i in group]
                else:
                    errors[group[0]] = str(error)
                continue
            for i, cache in zip(group, caches, strict=True):
                slots[i].cache.copy_from(cache)
        return errors

    def _scores(self, logits: Tensor, tokens: list[int]) -> dict[int, tuple[float, tuple]]:
        """Logprobs of the tokens that were drawn, by slot, where they were asked for."""
        asked = {i: slot.drawn.request.logprobs for i, slot in enumerate(self.slots[: self.active])}
        rows = [i for i, k in asked.items() if k is not None]
        if not rows:
            return {}
        k = max(asked[i] for i in rows)
        found = log_probabilities(logits[rows], [tokens[i] for i in rows], k)
        return {i: (lp, top[: asked[i]]) for i, (lp, top) in zip(rows, found, strict=True)}

    def _leave(self, i: int, keep: bool) -> None:
        """The sample in slot i ends; the last of those being drawn takes its place."""
        self._let_go(self.slots[i], keep)
        self.active -= 1
        if i != self.active:
            self._exchange(self.active, i)

    def _let_go(self, slot: Slot, keep: bool) -> None:
        """
        A slot becomes free, and holds what it held or zeros. What is kept is known to be finite, as
        it led to finite logits: attention over rows of different lengths multiplies what is behind
        the end of a shorter row by 0, which is no number if that is infinite.
        """
        slot.drawn, slot.used = None, self.steps
        if keep:
            slot.tokens = slot.tokens[: slot.start + slot.cache.pos]
            return
        slot.tokens, slot.start = [], 0
        slot.cache.truncate(0)
        for t in slot.cache.tensors:
            t.zero_()

    def _exchange(self, i: int, j: int) -> None:
        """Slots i and j take each other's place; the rows of the cache are copied accordingly."""
        a, b = self.slots[i], self.slots[j]
        if b.tokens:
            self.spare.copy_from(b.cache)
        b.cache.copy_from(a.cache)
        if b.tokens:
            a.cache.copy_from(self.spare)
        else:
            a.cache.truncate(0)
        self.slots[i], self.slots[j] = b, a
        a.cache, b.cache = b.cache, a.cache


class Joining(NamedTuple):
    """A request whose prompt is being read, where, and the decoder of the prompt's tokens."""

    request: Request
    slot: Slot
    decoder: StreamDecoder


def first_sequences(cache: Cache, lengths: list[int]) -> Cache:
    """
    The first sequences of an empty cache, in the same memory, with so many tokens each: for one
    pass.
    """
    view = cache.sequences(0, len(lengths))
    if len(set(lengths)) == 1:
        view.advance(lengths[0])
    else:
        view.set_lengths(torch.tensor(lengths, device=cache.device), max(lengths))
    return view


def log_probabilities(
    logits: Tensor, tokens: list[int], k: int
) -> list[tuple[float, tuple[tuple[int, float], ...]]]:
    """
    By row of logits (B, V): the natural logarithm of the probability of that row's token, and the k
    likeliest token ids with theirs.
    """
    logits = logits.float()
    total = logits.logsumexp(dim=-1, keepdim=True)
    own = logits.gather(-1, torch.tensor(tokens, device=logits.device)[:, None]) - total
    values, ids = logits.topk(min(k, logits.size(-1)), dim=-1)
    values = (values - total).tolist()
    tops = [tuple(zip(*pair, strict=True)) for pair in zip(ids.tolist(), values, strict=True)]
    return [*zip(own[:, 0].tolist(), tops, strict=True)]
