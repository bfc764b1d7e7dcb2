"""
How well a model predicts a text: the loss of every token, each predicted exactly once.

A window is a part of the text that the model reads at once, and predicts the token after each of
its tokens. Where windows overlap, a token counts in the first window that predicts it.

A text begins with the token that begins one in the model's tokenizer. Without such a token nothing
comes before the first one, which is then not predicted.

Letters: N tokens of a text, B windows, T tokens of a window, V vocabulary.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from model import GPT
from nanomla.dataset import Dataset
from nanomla.errors import UserError
from nanomla.files import read_text
from nanomla.generate import NOT_FINITE
from nanomla.memory import require_memory
from nanomla.text import StreamDecoder
from nanomla.tokenizer import Tokenizer, start_of_text

LOGITS = 5 * 10**7  # numbers in the logits of a batch, 200 MB in float32
TOKENS = 2**14  # of a batch


# ---- The text
@dataclass
class Passage:
    """Tokens that a model shall predict."""

    name: str
    tokens: np.ndarray  # (N,); the first is only read
    start: int | None  # the token that begins a text, which is then the first; None: there is none
    nbytes: int | None  # of the tokens that are predicted, in UTF-8; None: not known


def text_of_file(path: str, tokenizer: Tokenizer) -> Passage:
    """The text of a file. Raises UserError if it cannot be read or spelled."""
    text = read_text(path)
    ids = np.array(tokenizer.encode(text), dtype=np.int64)
    return _text(path, ids, len(text.encode("utf-8")), tokenizer)


def text_of_dataset(data: Dataset, split: str, tokenizer: Tokenizer) -> Passage:
    """A split of a dataset. Raises UserError for ids beyond the vocabulary."""
    ids = data.tokens(split)
    return _text(f"{data.name}, {split}", ids, data.split_bytes.get(split), tokenizer)


def _text(name: str, ids: np.ndarray, nbytes: int | None, tokenizer: Tokenizer) -> Passage:
    start = start_of_text(tokenizer.spec)
    if start is not None and (len(ids) == 0 or ids[0] != start):
        ids = np.concatenate([[start], ids])
    if len(ids) < 2:
        raise UserError(f"{name}: there is no token to predict; use a longer text")
    if start is None and nbytes is not None:
        nbytes -= len(tokenizer.token_bytes(int(ids[0])))
    return Passage(name, ids, start, nbytes)


def per_token(text: Passage, losses: Tensor, tokenizer: Tokenizer) -> Iterator[dict]:
    """
    Every token's id, text and loss in nats, of losses (N - 1,). All texts joined are the text, so a
    token has the characters that it completes. The loss of one that is not predicted is None.
    """
    decoder = StreamDecoder(tokenizer)
    pairs = zip(text.tokens.tolist(), [None, *losses.tolist()], strict=True)
    if text.start is not None:  # which is no part of the text
        next(pairs)
    for token, loss in pairs:
        yield {"id": token, "text": decoder.push(token), "loss": loss}


# ---- The losses
class Window(NamedTuple):
    """The tokens from begin to end - 1 are read; those from first to end are scored."""

    begin: int
    end: int
    first: int


def documents(tokens: np.ndarray, ends: tuple[int, ...]) -> list[tuple[int, int]]:
    """
    The first and last token of every document; what ends one is the first token of the next. ends:
    the ids that end a document; without any, all is one.
    """
    last = len(tokens) - 1
    cuts = [0, *np.flatnonzero(np.isin(tokens[1:last], ends)) + 1, last]
    return [(int(a), int(b)) for a, b in itertools.pairwise(cuts)]


def windows(first: int, last: int, block_size: int, stride: int) -> list[Window]:
    """The windows that score the tokens after `first`, up to `last`, each once."""
    made = []
    scored = first
    for begin in range(first, last, stride):
        end = min(begin + block_size, last)
        made.append(Window(begin, end, scored + 1))
        scored = end
        if end == last:
            break
    return made


def token_losses(
    model: GPT,
    tokens: np.ndarray,
    block_size: int | None = None,
    stride: int | None = None,
    ends: tuple[int, ...] = (),
    cached: bool = False,
    cache_dtype: torch.dtype | None = None,
) -> Tensor:
    """
    The loss of every token (N,) but the first: (N - 1,) float32 on the CPU, in nats. For a model in
    evaluation mode.

    block_size: the tokens of a window; None: the model's context. stride: how many tokens after a
    window the next one begins; None: block_size, so that they do not overlap. ends: the ids that
    end a document, so that windows stay within one and begin anew in each. cached, cache_dtype: as
    in next_token_losses. Raises UserError for losses that are not finite, or if memory is short.
    """
    block_size = block_size or model.config.block_size
    todo = []
    for first, last in documents(tokens, ends):
        todo += windows(first, last, block_size, stride or block_size)
    todo.sort(key=lambda window: window.begin - window.end)  # the longest first: little padding
    losses = torch.empty(len(tokens) - 1)
    with tqdm(total=len(losses), unit="token", leave=False, disable=None) as bar:
        while todo:
            longest = todo[0].end - todo[0].begin
            count = TOKENS // longest
            if not cached:
                count = min(count, LOGITS // (longest * model.config.vocab_size))
            batch = todo[: max(count, 1)]
            del todo[: len(batch)]
            x, y = _inputs_and_targets(tokens, batch)
            of_batch = next_token_losses(model, x, y, cached, cache_dtype).cpu()
            for window, of_window in zip(batch, of_batch, strict=True):
                scored = slice(window.first - 1 - window.begin, window.end - window.begin)
                losses[window.first - 1 : window.end] = of_window[scored]
                bar.update(scored.stop - scored.start)
    if not bool(losses.isfinite().all()):
        raise UserError(NOT_FINITE)
    return losses


def _inputs_and_targets(tokens: np.ndarray, batch: list[Window]) -> tuple[Tensor, Tensor]:
    """Both (B, T). Shorter windows are padded behind, where no token of a causal model looks."""
    shape = (len(batch), batch[0].end - batch[0].begin)
    x = torch.zeros(shape, dtype=torch.int64)
    y = torch.zeros(shape, dtype=torch.int64)
    for i, window in enumerate(batch):
        ids = torch.from_numpy(tokens[window.begin : window.end + 1].astype(np.int64))
        x[i, : len(ids) - 1] = ids[:-1]
        y[i, : len(ids) - 1] = ids[1:]
    return x, y


@torch.no_grad()
def next_token_losses(
    model: GPT,
    x: Tensor,
    y: Tensor,
    cached: bool = False,
    cache_dtype: torch.dtype | None = None,
) -> Tensor:
    """
    The cross-entropy of every token of y (B, T) after x (B, T): (B, T) float32, in nats. cached:
    token by token over a cache of this dtype, instead of in one pass without one.
    """
    device = model.lm_head.weight.device
    x = x.to(device)
    y = y.to(device)
    if not cached:
        nbytes = 8 * x.numel() * model.config.vocab_size  # the logits, and their softmax
        require_memory(nbytes, "the logits", device, "use a smaller --block_size")
        logits, _ = model(x, all_logits=True)  # (B, T, V)
        return _cross_entropy(logits, y)
    cache = model.make_cache(*x.shape, cache_dtype)
    losses = []
    for token, target in zip(x.split(1, dim=1), y.split(1, dim=1), strict=True):
        logits, _ = model(token, cache=cache)  # (B, 1, V)
        losses.append(_cross_entropy(logits, target))
    return torch.cat(losses, dim=1)


def _cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    logits = logits.float().flatten(0, 1)
    return F.cross_entropy(logits, y.flatten(), reduction="none").view_as(y)
