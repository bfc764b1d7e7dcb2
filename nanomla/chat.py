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
    outgrows the model's context goes on from the newer half of it.

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
        for a line that the tokenizer cannot spell or that is longer than the context; the
        conversation is then as before.
        """
        self._add(encode_prompt(line + "\n", self.tokenizer, self.model.config))
        sample = Sample(self.tokenizer, self.sampling.stop)
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
                self.context = text[-(self.cache.pos + 1) :]

    def _add(self, new: list[int]) -> None:
        """Put the tokens of a line behind the context, which is cut if they do not fit."""
        first = len(self.tokenizer.encode(""))  # tokens that a tokenizer puts before every text
        if self.context:
            self.context = self.context + new[first:]
        else:
            self.context = new
        if len(self.context) > self.cache.max_len:
            recent = max(newer_half(self.cache.max_len) - first, 1)
            self.context = new[:first] + self.context[-recent:]
            self.cache.truncate(0)
