"""
Tokens out of a model: how one is drawn, and the loop that model.generate and the engine draw with.

    sampler = Sampler(temperature=0.8, top_k=200)
    for token in stream_tokens(model, idx, 100, sampler):  # (B, 1) each
        print(tokenizer.decode(token[0].tolist()), end="")
"""

import math
import numbers
import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model import GPT, Cache
from nanomla.errors import UserError
from nanomla.graph import DecodingStep

NOT_FINITE = "the model's logits are not finite; try --dtype=float32, and as --cache_dtype"
PREFILL_CHUNK = 2048  # tokens of a prompt that a pass reads, unless a caller says otherwise


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
            raise UserError(NOT_FINITE)
        if self.temperature == 0:
            return logits.argmax(dim=-1, keepdim=True)
        return torch.multinomial(self.probabilities(logits), 1, generator=self.generator)

    def probabilities(self, logits: Tensor) -> Tensor:
        """What tokens are drawn by, (B, V), at a temperature above 0."""
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
        return logits.softmax(dim=-1)


def draw_rows(logits: Tensor, samplers: Sequence[Sampler]) -> Tensor:
    """
    One token per row of logits (B, V), all finite, each by a sampler of its own, as (B, 1): the
    tokens that samplers[i](logits[i : i + 1]) would draw. Rows of equal settings are taken at once.
    """
    alike: dict[tuple, list[int]] = {}
    for row, s in enumerate(samplers):
        alike.setdefault((s.temperature, s.top_k, s.top_p), []).append(row)
    tokens = logits.new_empty(len(samplers), 1, dtype=torch.int64)
    for rows in alike.values():
        some = logits if len(rows) == len(samplers) else logits[rows]
        if samplers[rows[0]].temperature == 0:
            tokens[rows] = some.argmax(dim=-1, keepdim=True)
            continue
        chance = samplers[rows[0]].probabilities(some)
        # multinomial draws by a race: the largest probability over an exponential number wins.
        wait = torch.empty_like(chance)
        for row, times in zip(rows, wait.split(1), strict=True):
            times.exponential_(generator=samplers[row].generator)
        tokens[rows] = (chance / wait).argmax(dim=-1, keepdim=True)
    return tokens


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
def next_logits(
    model: GPT, context: Tensor, cache: Cache | None, chunk: int | None, step: DecodingStep | None
) -> Tensor:
    """
    The logits of the token after context (B, T), (B, V). A cache holds the first cache.pos tokens
    of it, and in the end all: those that it lacks are read in chunks, or by step if it is one.
    """
    if cache is None:
        return model(context)[0][:, -1]
    new = context[:, cache.pos :]
    if step is not None and new.size(1) == 1:
        return step(new)[:, -1]
    for part in new.split(min(chunk or new.size(1), new.size(1)), dim=1):
        logits, _ = model(part, cache=cache)
    return logits[:, -1]


def stream_tokens(
    model: GPT,
    idx: Tensor,
    max_new_tokens: int,
    sampler: Sampler,
    use_cache: bool = True,
    cache_dtype: torch.dtype | None = None,
    cache: Cache | None = None,
    stop: int | Iterable[int] | None = None,
    prefill_chunk: int | None = PREFILL_CHUNK,
) -> Iterator[Tensor]:
    """
    The new tokens of idx (B, T), each (B, 1) as it is drawn, without dropout: a model in training
    mode is in evaluation mode until the last. prefill_chunk: how many tokens of a prompt a pass
    reads into a cache; None: all. With a cache narrower than the weights it changes the rounding.
    The other arguments are those of GPT.generate. A prompt that all rows share is read once.
    """
    whole = isinstance(max_new_tokens, numbers.Integral) and max_new_tokens >= 0
    _require(whole, "max_new_tokens", max_new_tokens, "a whole number from 0")
    whole = isinstance(prefill_chunk, numbers.Integral) and prefill_chunk >= 1
    works = "a whole number from 1, or None for all"
    _require(whole or prefill_chunk is None, "prefill_chunk", prefill_chunk, works)
    block_size, stops = model.config.block_size, stop_ids(stop)
    ends = torch.tensor(stops, device=idx.device)
    training = [module for module in model.modules() if module.training]
    context, step = check_prompt(idx, cache, block_size), None
    if training:
        model.eval()
    try:
        if cache is None and use_cache and max_new_tokens > 0:
            longest = min(block_size, idx.size(1) + max_new_tokens)
            cache = model.make_cache(idx.size(0), longest, cache_dtype)
            prefill_shared(model, context, cache, prefill_chunk)
        if cache is not None and DecodingStep.helps(model, cache):
            step = DecodingStep(model, cache)
        done = torch.zeros(idx.size(0), 1, dtype=torch.bool, device=idx.device)
        for _ in range(max_new_tokens):
            context = crop_context(context, cache, block_size)
            token = sampler(next_logits(model, context, cache, prefill_chunk, step))
            token = torch.where(done, context[:, -1:], token)
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
def prefill_shared(model: GPT, prompt: Tensor, cache: Cache, chunk: int | None = None) -> None:
    """Fill an empty cache with all but the last token of prompt (B, T), if all rows are equal."""
    B, T = prompt.shape
    if B > 1 and T > 1 and bool((prompt == prompt[:1]).all()):
        next_logits(model, prompt[:1, :-1], cache.row(0), chunk, None)
        cache.advance(T - 1)
        cache.broadcast_row(0)
