"""
Text on its way in and out of a model: prompts as tokens, characters in pieces, stop strings.

    sample = Sample(tokenizer, stop="\\n\\n")
    for text in sample.extend(tokens):  # up to the stop string
        print(text, end="")
"""

import codecs
import sys
from collections.abc import Iterable, Iterator, Sequence

from model import GPTConfig
from nanomla.errors import say
from nanomla.generate import check_prompt
from nanomla.tokenizer import Tokenizer

LONGEST_BEGINNING = 3  # bytes of a character in UTF-8, which has up to 4, without its last


def encode_prompt(text: str, tokenizer: Tokenizer, config: GPTConfig) -> list[int]:
    """
    A prompt's tokens; of more than the model's context the last, and a line on stderr tells of it.
    Raises UserError if it cannot be spelled or the model cannot take it.
    """
    tokens = tokenizer.encode(text)
    check_prompt(tokens, config.vocab_size)
    left_out = len(tokens) - config.block_size
    if left_out > 0:
        counts = f"the prompt has {len(tokens):,} tokens, the model's context {config.block_size:,}"
        say(f"{counts}; the first {left_out:,} are left out", sys.stderr)
    return tokens[-config.block_size :]


class StreamDecoder:
    """
    Decodes token by token. The bytes of an unfinished character wait for the rest of it.

    before: the tokens that precede; a character that they leave unfinished goes on.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()) -> None:
        self.tokenizer = tokenizer
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        raw = b""
        for token in reversed(before):
            if len(raw) >= LONGEST_BEGINNING:
                break
            raw = tokenizer.token_bytes(token) + raw
        self.decoder.decode(raw)

    def push(self, token: int) -> str:
        """The characters that this token completes."""
        return self.decoder.decode(self.tokenizer.token_bytes(token))

    def finish(self) -> str:
        """U+FFFD for the bytes of a character that was never completed."""
        return self.decoder.decode(b"", final=True)


class StopText:
    """Passes text on up to the first of the stop strings, and keeps back what may become one."""

    def __init__(self, stop: str | tuple[str, ...] | None) -> None:
        self.stops: tuple[str, ...] = ()
        if isinstance(stop, str):
            self.stops = (stop,)
        elif stop:
            self.stops = stop
        self.pending = ""
        self.done = False

    def follow(self, text: str) -> None:
        """Go on from a text that was shown before, in whose end a stop string may have begun."""
        count = max((begun(text, stop) for stop in self.stops), default=0)
        self.pending = text[len(text) - count :]

    def push(self, text: str, last: bool = False) -> str:
        """The text that can be shown now; `done` is True once a stop string has come."""
        if self.done:
            return ""
        self.pending += text
        found = []
        for stop in self.stops:
            begin = self.pending.find(stop)
            if begin >= 0:
                found.append((begin + len(stop), begin))
        if found:  # the first that is complete counts, however the text is cut into pieces
            self.done = True
            _, begin = min(found)
            return self.pending[:begin]
        undecided = 0
        if not last:
            for stop in self.stops:
                undecided = max(undecided, begun(self.pending, stop))
        end = len(self.pending) - undecided
        shown = self.pending[:end]
        self.pending = self.pending[end:]
        return shown


def begun(text: str, stop: str) -> int:
    """How many characters at the end of a text are the beginning of a stop string."""
    for count in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:count]):
            return count
    return 0


class Sample:
    """
    One continuation as it grows: its tokens, and its text up to the stop string or an end.

    prompt: the tokens before it. A character that they leave unfinished is the first of its text.
    drawn: how many of them, the last, are of the same sample, which was cut there; a stop string
    may have begun in them.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: str | tuple[str, ...] | None = None,
        ends: tuple[int, ...] = (),
        prompt: Sequence[int] = (),
        drawn: int = 0,
    ) -> None:
        self.ends = ends  # the tokens that end it, and are no part of it
        self.ended = False  # whether one of these has come
        self.tokens: list[int] = []
        self.text = ""
        self.decoded = 0  # characters that the tokens have completed, shown or not
        self.seconds = 0.0  # until its end, for who measures it
        self._decoder = StreamDecoder(tokenizer, prompt)
        self._until = StopText(stop)
        if stop and drawn:
            before = StreamDecoder(tokenizer)
            self._until.follow("".join(map(before.push, prompt[-drawn:])))
        self._shown_before = len(self._until.pending)

    @property
    def done(self) -> bool:
        """Whether the stop string or an end has come."""
        return self._until.done or self.ended

    def push(self, token: int) -> str:
        """Add a token; returns the text that can be shown now."""
        if token in self.ends:
            self.ended = True
            return self.finish()
        self.tokens.append(token)
        return self._show(self._decoder.push(token))

    def finish(self) -> str:
        """Returns the text that was kept back in case more came."""
        return self._show(self._decoder.finish(), last=True)

    def _show(self, decoded: str, last: bool = False) -> str:
        self.decoded += len(decoded)
        shown = self._until.push(decoded, last)
        before = min(self._shown_before, len(shown))
        self._shown_before -= before
        shown = shown[before:]
        self.text += shown
        return shown

    def extend(self, tokens: Iterable[int]) -> Iterator[str]:
        """Add tokens up to the stop string or an end; yields the text that each lets show."""
        for token in tokens:
            yield self.push(int(token))
            if self.done:
                break
        yield self.finish()
