"""
Continuous batching: requests join and leave between the steps of one batch.

    batch = Batch(model, tokenizer, rows=16)
    batch.submit(Request(tokenizer.encode("ROMEO:"), Sampling(max_new_tokens=200)))
    while batch.busy:
        for piece in batch.step():
            print(piece.text, end="")
"""

import contextlib
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from model import GPT
from nanomla.cache import Cache
from nanomla.checks import require
from nanomla.errors import UserError
from nanomla.generate import NOT_FINITE, Sampler, check_prompt, draw_again, draw_each, newer_half
from nanomla.text import Sample, StreamDecoder
from nanomla.tokenizer import Tokenizer

DRAWING_AGAIN = 0.02  # seconds of a step, at most, for what was drawn before

Likely = tuple[tuple[int, float], ...]  # token ids and their log probabilities, best first
Score = tuple[float | None, Likely]  # a token's own log probability, and the likeliest beside it


# ---- What is asked for, and what comes of it
@dataclass
class Sampling:
    """How a sample is drawn, and where it ends."""

    max_new_tokens: int = 500
    temperature: float = 0.8
    top_k: int | None = 200
    top_p: float | None = None
    stop: str | tuple[str, ...] | None = None  # what ends a sample, and is no part of it
    ends: tuple[int, ...] = ()  # the tokens that end a sample, and are no part of it

    def sampler(self, seed: int, device: torch.device | str = "cpu") -> Sampler:
        """What draws the tokens. Raises ValueError for settings out of range."""
        generator = torch.Generator(device).manual_seed(seed)
        return Sampler(self.temperature, self.top_k, self.top_p, generator)


class Token(NamedTuple):
    """A token of a request, with what the model thought of it."""

    id: int
    raw: bytes  # its UTF-8 bytes, which may be a part of a character
    chars: int  # characters of the text that it completes
    logprob: float | None = None  # of the model itself, at temperature 1; None: not asked for
    top: Likely = ()
    is_end: bool = False  # it ended the sample, and is no part of its text

    @property
    def text(self) -> str:
        """The token's own text, with U+FFFD for bytes that are a part of a character."""
        return self.raw.decode("utf-8", "replace")


@dataclass(eq=False)
class Request:
    """n continuations of a prompt. The last five fields are set while a Batch serves it."""

    prompt: list[int]
    sampling: Sampling
    n: int = 1
    seed: int = 1337  # of sample 0; sample i draws with seed + i
    tokens_drawn: int = 0  # before, with this seed: the prompt's last ones, where a text was cut
    logprobs: int | None = None  # so many likely tokens beside each that is drawn; None: no logprob
    prompt_logprobs: bool = False  # the same for the tokens of the prompt
    cache_prompt: bool = False  # go on from what earlier requests with this flag left, and leave it
    window: int | None = None  # of a prompt that is too long, the last tokens; None: it is refused
    client: str = ""  # who asks
    call: str = ""  # which of the client's calls this is a part of
    samplers: list[Sampler] = field(default_factory=list)  # of the samples
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


class Turns:
    """Requests that wait. Their clients come in turn, and so do the calls of each client."""

    def __init__(self) -> None:
        self.clients: dict[str, dict[str, deque[Request]]] = {}  # the next in turn first
        self.count = 0  # of the requests

    def __len__(self) -> int:
        return self.count

    def add(self, request: Request) -> None:
        """Let a request wait behind the others of its call."""
        self.count += 1
        calls = self.clients.setdefault(request.client, {})
        calls.setdefault(request.call, deque()).append(request)

    def next_of_each(self) -> Iterator[Request]:
        """The next request of every client, in the order of their turns."""
        for calls in self.clients.values():
            line = next(iter(calls.values()))
            yield line[0]

    def take(self, request: Request) -> None:
        """Remove a client's next request: the next turns are those of others."""
        self.count -= 1
        calls = self.clients.pop(request.client)
        line = calls.pop(request.call)
        line.popleft()
        if line:
            calls[request.call] = line
        if calls:
            self.clients[request.client] = calls

    def put_back(self, request: Request) -> None:
        """Undo a take: the request comes next."""
        self.count += 1
        calls = self.clients.pop(request.client, {})
        line = calls.pop(request.call, deque())
        line.appendleft(request)
        self.clients = {request.client: {request.call: line, **calls}, **self.clients}

    def remove(self, request: Request) -> None:
        """Remove a request wherever it is, if it waits."""
        calls = self.clients.get(request.client, {})
        line = calls.get(request.call, deque())
        if request not in line:
            return
        self.count -= 1
        line.remove(request)
        if not line:
            del calls[request.call]
        if not calls:
            del self.clients[request.client]


# ---- What a batch works on
class Drawing:
    """A sample that is being drawn, with a sampler of its own and the tokens not yet shown."""

    def __init__(self, request: Request, index: int, tokenizer: Tokenizer):
        self.index = index
        self.tokenizer = tokenizer
        self.sampling = request.sampling
        self.sampler = request.samplers[index]
        self.sample = Sample(
            tokenizer, request.sampling.stop, prompt=request.prompt, drawn=request.tokens_drawn
        )
        self.made = 0
        self.unshown: list[tuple[int, Token]] = []  # with the character that each begins at
        request.samples.append(self.sample)

    def push(self, token: int, score: Score) -> tuple[str, str | None]:
        """Take a token that was drawn; returns the text to show and how the sample ends, if so."""
        self.made += 1
        raw = self.tokenizer.token_bytes(token)
        if token in self.sampling.ends:
            text = self.sample.finish()
            self.unshown.append((self.sample.decoded, Token(token, raw, 0, *score, is_end=True)))
            return text, "stop"
        begin = self.sample.decoded
        text = self.sample.push(token)
        chars = self.sample.decoded - begin
        self.unshown.append((begin, Token(token, raw, chars, *score)))
        if not self.sample.done and self.made >= self.sampling.max_new_tokens:
            text += self.sample.finish()  # may hold a stop string in its last character
            if not self.sample.done:
                return text, "length"
        if self.sample.done:
            return text, "stop"
        return text, None

    def shown(self, finish: str | None) -> tuple[Token, ...]:
        """The tokens whose text has been shown since the last call; at a stop also in part."""
        end = len(self.sample.text)
        count = 0
        for begin, token in self.unshown:
            in_part = finish == "stop" and (begin < end or token.is_end)
            whole = finish != "stop" and begin + token.chars <= end
            if in_part or whole:
                count += 1
        tokens = tuple(token for _, token in self.unshown[:count])
        self.unshown = self.unshown[count:]
        return tokens


@dataclass(eq=False)
class Slot:
    """A row of a batch's cache, and the text of which it holds tokens[start : start + pos]."""

    cache: Cache  # of one sequence, with its own pos
    tokens: list[int] = field(default_factory=list)
    start: int = 0
    request: Request | None = None  # None: the slot is free
    decoder: StreamDecoder | None = None  # of the prompt's tokens, while these are read
    drawing: Drawing | None = None  # once the prompt is read
    used: int = 0  # the step in which it was last used

    def unread(self) -> list[int]:
        """The tokens that the cache does not hold yet, but for the last, which a step reads."""
        return self.tokens[self.start + self.cache.pos : -1]


# ---- The batch
class Batch:
    """
    Continuous batching: each sample is a row of one cache that is allocated once, at a position,
    with settings and with random numbers of its own. What a request gets does not depend on the
    others, but for the rounding of sums.

    A slot is a row of the cache with the text in it. The slots of the samples that are being drawn
    come first, so that a step takes a view of the cache. A request that joins has its prompt read
    into one of the others, all but the last token, which is the first that a step reads. What is
    left in the rest may be gone on from.

    rows: samples at a time, and one more of a client that has none while others have them all.
    Clients get free rows in turn, and so do the calls of each. max_len: tokens that a row holds, by
    default the model's context; a longer text goes on with its newer half. prefill_chunk: prompt
    tokens read in one step, 1 or more, else ValueError.
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
        require(prefill_chunk >= 1, "prefill_chunk", prefill_chunk, "1 or more")
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.rows = rows
        self.prefill_chunk = prefill_chunk
        self.max_len = max_len or model.config.block_size
        self.cache = model.make_cache(rows + 2, self.max_len, cache_dtype)
        self.device = self.cache.device
        self.slots = [Slot(self.cache.row(i)) for i in range(rows + 1)]
        self.spare = self.cache.row(rows + 1)  # to exchange two rows
        self.drawing_again: dict[Request, Iterator[None]] = {}  # before these wait for a row
        self.waiting = Turns()
        self.joining: Slot | None = None  # whose prompt is being read
        self.active = 0  # samples being drawn, in the first slots
        self.tokens_made = 0
        self.steps = 0
        self.seconds = 0.0

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.active or self.joining or self.waiting or self.drawing_again)

    @property
    def cache_bytes(self) -> int:
        """Bytes that the tokens of the samples being drawn take in the cache."""
        return sum(slot.cache.nbytes_at(slot.cache.pos) for slot in self.slots[: self.active])

    def check(self, request: Request) -> None:
        """Raise UserError for a request that cannot be served."""
        vocab_size = self.model.config.vocab_size
        check_prompt(request.prompt, vocab_size)
        if request.window is None:  # what was drawn behind the prompt may have outgrown the context
            first = max(len(request.prompt) - request.tokens_drawn, 1)
            check_prompt(request.prompt[:first], vocab_size, self.max_len)
        try:
            if request.window is not None:
                fits = 1 <= request.window <= self.max_len
                require(fits, "window", request.window, f"from 1 to {self.max_len} tokens")
            require(request.n >= 1, "n", request.n, "1 or more")
            request.sampling.sampler(0)
        except ValueError as error:
            raise UserError(str(error)) from None

    def submit(self, request: Request) -> None:
        """Serve a request as rows become free, when it is its client's turn."""
        self.check(request)
        seeds = [(request.seed + i) % 2**63 for i in range(request.n)]
        request.samples = []
        request.samplers = [request.sampling.sampler(seed, self.device) for seed in seeds]
        if request.tokens_drawn > 0:
            self.drawing_again[request] = self._draw_again(request)
        else:
            self.waiting.add(request)

    def cancel(self, request: Request) -> None:
        """Stop serving a request: its rows are free at once. Nothing happens if it has ended."""
        self.drawing_again.pop(request, None)
        self.waiting.remove(request)
        if self.joining is not None and self.joining.request is request:
            self._free(self.joining, keep=False)
            self.joining = None
        for slot in reversed(self.slots[: self.active]):
            if slot.request is request:
                self._leave(slot, keep=request.cache_prompt and slot.drawing.made > 0)

    @torch.inference_mode()
    def step(self) -> list[Piece]:
        """Read some of the prompts that wait, then draw one token for every sample."""
        began = time.perf_counter()
        self.steps += 1
        self._go_on_drawing_again()
        pieces = self._read_prompts()
        if self.active:
            pieces += self._draw()
        self.seconds += time.perf_counter() - began
        return pieces

    # ---- Texts that were cut
    def _draw_again(self, request: Request) -> Iterator[None]:
        """Take a request's samplers to where its text was cut."""
        for sampler in request.samplers:
            yield from draw_again(sampler, request.tokens_drawn, self.model.config.vocab_size)

    def _go_on_drawing_again(self) -> None:
        """
        Take the samplers of texts that were cut some way further. A thousand tokens of GPT-2's
        vocabulary take a second on a CPU, for which others need not wait.
        """
        until = time.perf_counter() + DRAWING_AGAIN
        for request in list(self.drawing_again):
            drawing = self.drawing_again.pop(request)
            for _ in drawing:
                if time.perf_counter() > until:
                    self.drawing_again[request] = drawing  # behind the others
                    return
            self.waiting.add(request)

    # ---- Prompts
    def _read_prompts(self) -> list[Piece]:
        """
        Read about prefill_chunk tokens of the requests that join, one request after another. Where
        a prompt is cut does not depend on the others: a cache of int8 makes a difference there.
        Returns pieces of the requests that end with their prompts.
        """
        pieces = []
        budget = self.prefill_chunk
        while budget > 0:
            if self.joining is None:
                budget -= self._read_together(budget)
                request = self._next()
                if request is None:
                    break
                self.waiting.take(request)
                self.joining = self._begin(request)
            slot = self.joining
            new = slot.unread()[: self.prefill_chunk]
            budget -= max(len(new), 1)
            try:
                self._read(slot, new)
            except (UserError, ValueError) as error:  # a prompt that int8 cannot hold, for one
                pieces += self._end_prompt("error", str(error))
                continue
            if slot.unread():
                continue
            if slot.request.sampling.max_new_tokens > 0:
                self._join(slot)
                self.joining = None
            else:
                pieces += self._end_prompt("length")
        return pieces

    def _next(self) -> Request | None:
        """The next request in turn whose client may have a row; None if there is none."""
        for request in self.waiting.next_of_each():
            if self._rows_for(request.client) > 0:
                return request
        return None

    def _rows_for(self, client: str) -> int:
        """How many more rows a client may have now, if others want none."""
        free = self.rows - self.active
        if free == 0 and all(slot.request.client != client for slot in self.slots[: self.rows]):
            return 1  # the row beyond
        return free

    def _read_together(self, budget: int) -> int:
        """
        Read the short prompts that wait in one pass, if there are several that need no more than
        budget tokens; returns the tokens that it took.
        """
        group: list[Request] = []
        free = self.rows - self.active
        width = 0
        while self.cache.grows and self.waiting:
            request = next(self.waiting.next_of_each())
            longest = max(width, len(request.prompt) - 1)
            has_room = request.n <= free and (len(group) + 1) * longest <= budget
            if not (has_room and self._is_plain(request)):
                break
            self.waiting.take(request)
            group.append(request)
            free -= request.n
            width = longest
        caches: list[Cache] = []
        if len(group) > 1:
            with contextlib.suppress(ValueError):  # that int8 cannot hold is found when read alone
                caches = self._read_padded([request.prompt[:-1] for request in group])
        if not caches:
            for request in reversed(group):
                self.waiting.put_back(request)
            return 0
        for request, cache in zip(group, caches, strict=True):
            slot = self._begin(request)
            slot.cache.copy_from(cache)
            self._join(slot)
        return len(group) * width

    def _is_plain(self, request: Request) -> bool:
        """Whether there is nothing to a request's prompt but tokens to read, which fit a row."""
        special = request.cache_prompt or request.prompt_logprobs or request.samples
        reads = 1 < len(request.prompt) <= self.max_len and request.sampling.max_new_tokens > 0
        return reads and not special

    def _read_padded(self, texts: list[list[int]]) -> list[Cache]:
        """Read texts in one pass; returns a cache of one sequence for each, which holds it all."""
        lengths = [len(text) for text in texts]
        width = max(lengths)
        cache = self.model.make_cache(len(texts), width, self.cache.dtype)
        padded = [text + [0] * (width - len(text)) for text in texts]
        self.model(torch.tensor(padded, device=self.device), cache=cache)
        sequences = [cache.row(i) for i in range(len(texts))]
        for sequence, length in zip(sequences, lengths, strict=True):
            sequence.truncate(length)  # the padding came after the text, which did not see it
        return sequences

    def _begin(self, request: Request) -> Slot:
        """Take a free slot for a prompt, the one that has the longest start of it if it may."""
        prompt = request.prompt
        free = self.slots[self.active :]
        slot = min(free, key=lambda slot: (bool(slot.tokens), slot.used))
        shared = 0
        if request.cache_prompt and not request.prompt_logprobs:
            best = max(free, key=lambda slot: self._shared(slot, request))
            shared = self._shared(best, request)
            if shared > 0:
                slot = best
        if shared > 0:
            slot.cache.rewind(min(shared, len(prompt) - slot.start - 1))
        else:
            slot.cache.truncate(0)
            slot.start = self._start(request)
        slot.tokens = list(prompt)
        slot.request = request
        if request.samples:  # it has been read before, for those
            for other in self.slots[: self.active]:
                if other.request is request and other.start == slot.start and self.cache.grows:
                    slot.cache.copy_from(other.cache)
                    slot.cache.truncate(len(prompt) - slot.start - 1)
            return slot
        request.cached = slot.cache.pos
        request.computed = len(prompt) - slot.start - slot.cache.pos
        slot.decoder = StreamDecoder(self.tokenizer, prompt[: slot.start])
        if request.prompt_logprobs:
            self._add_prompt_token(slot, prompt[slot.start], (None, ()))  # nothing precedes it
        return slot

    def _start(self, request: Request) -> int:
        """
        Where the part of a prompt begins that is read: all of one that fits. Of one that is too
        long it is the window that was asked for, or what the text would be read from here if it had
        been drawn without a cut.
        """
        length = len(request.prompt)
        if request.window is not None and length > self.max_len:
            return length - request.window
        start = 0
        for end in range(length - request.tokens_drawn + 1, length + 1):
            if end - start > self.max_len:
                start = end - newer_half(self.max_len)
        return start

    def _shared(self, slot: Slot, request: Request) -> int:
        """How many tokens in a slot's cache are those of a prompt, if it can go on from them."""
        prompt = request.prompt
        if slot.start != self._start(request):
            return 0  # it needs another part of the text
        cached = slot.tokens[: slot.start + slot.cache.pos]
        same = 0
        for ours, theirs in zip(cached, prompt, strict=False):
            if ours != theirs:
                break
            same += 1
        if not self.cache.grows and not same == len(cached) < len(prompt):
            return 0  # a state cannot go back
        return max(same - slot.start, 0)

    def _read(self, slot: Slot, new: list[int]) -> None:
        """Put the next tokens of a slot's text into its cache."""
        if not new:
            return
        request = slot.request
        scored = request.prompt_logprobs and not request.samples  # else it has been read before
        following = slot.start + slot.cache.pos + 1
        idx = torch.tensor([new], device=self.device)
        logits, _ = self.model(idx, cache=slot.cache, all_logits=scored)
        if not scored:
            return
        if not bool(logits.isfinite().all()):
            raise UserError(NOT_FINITE)
        targets = request.prompt[following : following + len(new)]
        scores = log_probabilities(logits[0], targets, request.logprobs or 0)
        for token, score in zip(targets, scores, strict=True):
            self._add_prompt_token(slot, token, score)

    def _add_prompt_token(self, slot: Slot, token: int, score: Score) -> None:
        chars = len(slot.decoder.push(token))
        raw = self.tokenizer.token_bytes(token)
        slot.request.prompt_tokens.append(Token(token, raw, chars, *score))

    def _end_prompt(self, finish: str, error: str | None = None) -> list[Piece]:
        """The joining request ends without a sample, or without those that it lacks."""
        request = self.joining.request
        pos = self.joining.cache.pos
        nbytes = self.joining.cache.nbytes_at(pos)
        text = ""
        if error is None:
            text = StreamDecoder(self.tokenizer, request.prompt).finish()
        self._free(self.joining, keep=False)
        self.joining = None
        ends = []
        for index in range(len(request.samples), request.n):
            ends.append(Piece(request, index, text, (), 0, pos, nbytes, finish, error))
        return ends

    def _join(self, first: Slot) -> None:
        """
        A request has its prompt in the cache but for the last token: draw from now on, as many of
        its samples as there are rows for. The others wait for their client's next turn.
        """
        request = first.request
        lacking = request.n - len(request.samples)
        count = min(lacking, self._rows_for(request.client))
        self._exchange(self.slots.index(first), self.active)
        for slot in self.slots[self.active : self.active + count]:
            if slot is not first:
                slot.cache.copy_from(first.cache)
                slot.tokens = list(first.tokens)
                slot.start = first.start
                slot.request = request
            slot.drawing = Drawing(request, len(request.samples), self.tokenizer)
        self.active += count
        if count < lacking:
            self.waiting.add(request)

    # ---- Samples
    def _draw(self) -> list[Piece]:
        """Draw the next token of every sample."""
        slots = self.slots[: self.active]
        errors = self._shorten(slots)
        logits = self._next_logits(slots, errors)
        for i, finite in enumerate(logits.isfinite().all(dim=-1).tolist()):
            if not finite:
                errors.setdefault(slots[i], NOT_FINITE)
            if slots[i] in errors:
                logits[i] = 0  # its sample ends here, and its token is not used
        tokens = draw_each(logits, [slot.drawing.sampler for slot in slots])[:, 0].tolist()
        scores = self._scores(slots, logits, tokens)
        pieces = []
        ended = []
        for slot, token, score in zip(slots, tokens, scores, strict=True):
            drawing = slot.drawing
            error = errors.get(slot)
            text = ""
            finish = "error"
            if error is None:
                self.tokens_made += 1
                slot.tokens.append(token)
                text, finish = drawing.push(token, score)
            shown = drawing.shown(finish)
            pos = slot.cache.pos
            if text or shown or finish:
                sample = (slot.request, drawing.index, text, shown, drawing.made)
                pieces.append(Piece(*sample, pos, slot.cache.nbytes_at(pos), finish, error))
            if finish:
                ended.append(slot)
        for slot in reversed(ended):  # from the last, so that none of them is moved before it ends
            self._leave(slot, keep=slot.request.cache_prompt and slot not in errors)
        return pieces

    def _shorten(self, slots: list[Slot]) -> dict[Slot, str]:
        """
        Texts that have outgrown their rows go on with the newer half of what those can hold.
        Returns what went wrong by slot.
        """
        errors = {}
        for slot in slots:
            if len(slot.tokens) - slot.start <= self.max_len:
                continue
            slot.start = len(slot.tokens) - newer_half(self.max_len)
            slot.cache.truncate(0)
            try:
                self._read(slot, slot.unread())
            except ValueError as error:  # int8 cannot hold the numbers
                errors[slot] = str(error)
        return errors

    def _next_logits(self, slots: list[Slot], errors: dict[Slot, str]) -> Tensor:
        """The next token's logits of every slot, (B, V). What goes wrong is put into errors."""
        idx = torch.tensor([[slot.tokens[-1]] for slot in slots], device=self.device)
        view = first_sequences(self.cache, [slot.cache.pos for slot in slots])
        try:
            logits, _ = self.model(idx, cache=view)
        except ValueError:  # int8 cannot hold the numbers of one of them, or of several
            logits = torch.zeros(len(slots), self.model.config.vocab_size, device=self.device)
            for i, slot in enumerate(slots):
                try:
                    logits[i] = self.model(idx[i : i + 1], cache=slot.cache)[0][0, -1]
                except ValueError as error:
                    errors[slot] = str(error)
            return logits
        for slot in slots:
            slot.cache.advance(1)
        return logits[:, -1]

    def _scores(self, slots: list[Slot], logits: Tensor, tokens: list[int]) -> list[Score]:
        """What the model thought of the tokens that were drawn, where that is asked."""
        scores: list[Score] = [(None, ())] * len(slots)
        asked = [i for i, slot in enumerate(slots) if slot.request.logprobs is not None]
        if asked:
            most = max(slots[i].request.logprobs for i in asked)
            chosen = [tokens[i] for i in asked]
            of_asked = log_probabilities(logits[asked], chosen, most)
            for i, (logprob, top) in zip(asked, of_asked, strict=True):
                scores[i] = (logprob, top[: slots[i].request.logprobs])
        return scores

    # ---- Slots
    def _leave(self, slot: Slot, keep: bool) -> None:
        """The sample in a slot ends; the last of those being drawn takes its place."""
        self._free(slot, keep)
        self.active -= 1
        self._exchange(self.active, self.slots.index(slot))

    def _free(self, slot: Slot, keep: bool) -> None:
        """
        A slot becomes free, and holds what it held or zeros. What is kept is known to be finite, as
        it led to finite logits: attention over rows of different lengths multiplies what is behind
        the end of a shorter row by 0, which is no number if that is infinite.
        """
        slot.request = None
        slot.decoder = None
        slot.drawing = None
        slot.used = self.steps
        if keep:
            slot.tokens = slot.tokens[: slot.start + slot.cache.pos]
            return
        slot.tokens = []
        slot.start = 0
        slot.cache.truncate(0)
        for tensor in slot.cache.tensors:
            tensor.zero_()

    def _exchange(self, i: int, j: int) -> None:
        """Slots i and j take each other's place; the rows of the cache are copied accordingly."""
        if i == j:
            return
        first = self.slots[i]
        second = self.slots[j]
        self.spare.copy_from(second.cache)
        second.cache.copy_from(first.cache)
        first.cache.copy_from(self.spare)
        first.cache, second.cache = second.cache, first.cache
        self.slots[i], self.slots[j] = second, first


def first_sequences(cache: Cache, lengths: list[int]) -> Cache:
    """A view of the first sequences of a cache, which hold so many tokens each, for one pass."""
    view = cache.sequences(0, len(lengths))
    if len(set(lengths)) == 1:
        view.advance(lengths[0])
    else:
        view.set_lengths(torch.tensor(lengths, device=cache.device), max(lengths))
    return view


def log_probabilities(logits: Tensor, tokens: Sequence[int], count: int) -> list[Score]:
    """
    By row of logits (B, V): the natural logarithm of the probability of that row's token, and the
    `count` likeliest token ids with theirs.
    """
    logits = logits.float()
    total = logits.logsumexp(dim=-1, keepdim=True)
    chosen = torch.tensor(tokens, device=logits.device)[:, None]
    logprobs = (logits.gather(-1, chosen) - total)[:, 0].tolist()
    values, ids = logits.topk(min(count, logits.size(-1)), dim=-1)
    likely = zip(ids.tolist(), (values - total).tolist(), strict=True)
    tops = [tuple(zip(*row, strict=True)) for row in likely]
    return list(zip(logprobs, tops, strict=True))
