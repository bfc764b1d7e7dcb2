"""
A conversation with a model.

    chat = Chat(model, tokenizer, Sampling(max_new_tokens=200))
    for text in chat.reply("Who is there?"):
        print(text, end="")
"""

from collections.abc import Iterator

import torch

from model import GPT
from nanomla.batch import Sampling
from nanomla.generate import PREFILL_CHUNK, newer_half, stream_tokens
from nanomla.text import Sample, encode_prompt
from nanomla.tokenizer import Tokenizer


class Chat:
    """
    A conversation: every line follows all that came before, of which the cache is kept. One that
    outgrows the model's context goes on from the newer half of it, or from a line that is longer.

    cache_dtype None: that of the weights. prefill_chunk: as in stream_tokens.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        sampling: Sampling,
        seed: int = 1337,
        cache_dtype: torch.dtype | None = None,
        prefill_chunk: int | None = PREFILL_CHUNK,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.sampling = sampling
        self.prefill_chunk = prefill_chunk
        self.cache = model.make_cache(1, model.config.block_size, cache_dtype)
        self.sampler = sampling.sampler(seed, self.cache.device)
        self.context: list[int] = []  # the cache's tokens, and those that the model has yet to read
        self.tokens_made = 0  # in all replies

    def reset(self) -> None:
        """Forget the conversation."""
        self.context = []
        self.cache.truncate(0)

    def reply(self, line: str) -> Iterator[str]:
        """
        The model's continuation of the conversation and this line, piece by piece. Raises UserError
        for a line that the tokenizer cannot spell; the conversation is then as before.
        """
        self._add(encode_prompt(line + "\n", self.tokenizer, self.model.config))
        sample = Sample(self.tokenizer, self.sampling.stop, self.sampling.ends)
        tokens = stream_tokens(
            self.model,
            torch.tensor([self.context], device=self.cache.device),
            self.sampling.max_new_tokens,
            self.sampler,
            cache=self.cache,
            prefill_chunk=self.prefill_chunk,
        )
        try:
            yield from sample.extend(tokens)
        finally:  # also when the caller stops listening
            self.tokens_made += len(sample.tokens)
            if sample.tokens:  # the cache holds all but the last, or a part that it could hold
                text = self.context + sample.tokens
                recent = self.cache.pos + 1
                if sample.ended:  # the last is the end, which is no part of the conversation
                    recent = self.cache.pos
                self.context = text[-recent:]

    def _add(self, new: list[int]) -> None:
        """Put the tokens of a line behind the context, which is cut if they do not fit."""
        begin = self.tokenizer.encode("")  # what a tokenizer puts before every text
        if new[: len(begin)] != begin:  # the beginning of a long line is left out
            begin = []
        if self.context:
            self.context = self.context + new[len(begin) :]
        else:
            self.context = new
        if len(self.context) > self.cache.max_len:
            recent = max(newer_half(self.cache.max_len), len(new)) - len(begin)
            self.context = begin + self.context[-max(recent, 1) :]
            self.cache.truncate(0)
