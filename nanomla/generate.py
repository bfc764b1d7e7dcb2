"""
Tokens out of a model: how one is drawn, and the one loop that draws them, which model.generate,
sample.py and the page use.

    sampler = Sampler(temperature=0.8, top_k=200)
    for token in stream_tokens(model, idx, 100, sampler):  # (B, 1) each
        print(tokenizer.decode(token[0].tolist()), end="")

A model is anything with config.block_size, make_cache and `logits, _ = model(idx, cache=cache)`.
"""

import contextlib
import operator
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nanomla.cache import Cache
from nanomla.checks import Natural, NonNegative, UpToOne, check, fits, require
from nanomla.errors import UserError, say
from nanomla.kernels import on_gpu

NOT_FINITE = "the model's logits are not finite; try --dtype=float32, and as --cache_dtype"
PREFILL_CHUNK = 2048  # tokens of a prompt that a pass reads, unless a caller says otherwise


# ---- One token
@dataclass(frozen=True)
class Sampler:
    """
    Draws one token per sequence from logits (B, V), as (B, 1) int64.

    temperature 0 takes the likeliest; top_k None or 0 and top_p None or 1 are off.
    Raises ValueError for values out of range.
    """

    temperature: NonNegative = 1.0
    top_k: Natural | None = None
    top_p: UpToOne | None = None
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        check(self)

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


def draw_each(logits: Tensor, samplers: Sequence[Sampler]) -> Tensor:
    """
    One token per sequence of logits (B, V), all finite, each by a sampler of its own, as (B, 1):
    the tokens that samplers[i](logits[i : i + 1]) would draw. Sequences of equal settings are taken
    at once.
    """
    alike: dict[tuple, list[int]] = {}
    for i, sampler in enumerate(samplers):
        settings = (sampler.temperature, sampler.top_k, sampler.top_p)
        alike.setdefault(settings, []).append(i)
    tokens = logits.new_empty(len(samplers), 1, dtype=torch.int64)
    for group in alike.values():
        some = logits if len(group) == len(samplers) else logits[group]
        first = samplers[group[0]]
        if first.temperature == 0:
            tokens[group] = some.argmax(dim=-1, keepdim=True)
            continue
        chance = first.probabilities(some)
        # multinomial draws by a race: the largest probability over an exponential number wins.
        wait = torch.empty_like(chance)
        for i, times in zip(group, wait.split(1), strict=True):
            times.exponential_(generator=samplers[i].generator)
        tokens[group] = (chance / wait).argmax(dim=-1, keepdim=True)
    return tokens


def draw_again(sampler: Sampler, count: int, vocab_size: int) -> Iterator[None]:
    """
    Take a sampler's generator past the numbers that draw_each took for so many tokens, one token at
    each step of the iterator.
    """
    if sampler.temperature == 0:
        return
    times = torch.empty(1, vocab_size, device=sampler.generator.device)
    for _ in range(count):
        times.exponential_(generator=sampler.generator)
        yield


# ---- The loop
def stream_tokens(
    model: nn.Module,
    idx: Tensor,
    max_new_tokens: int,
    sampler: Sampler,
    use_cache: bool = True,
    cache_dtype: torch.dtype | None = None,
    cache: Cache | None = None,
    stop: int | Iterable[int] | None = None,
    prefill_chunk: int | None = PREFILL_CHUNK,
    mask: Tensor | None = None,
) -> Iterator[Tensor]:
    """
    The new tokens of idx (B, T), each (B, 1) as it is drawn, without dropout. A prompt that all
    sequences share is read once.

    prefill_chunk: how many tokens of a prompt a pass reads into a cache; None: all. With a cache
    narrower than the weights it changes the rounding. The other arguments are GPT.generate's.
    """
    whole = fits(max_new_tokens, Natural)
    require(whole, "max_new_tokens", max_new_tokens, "a whole number of at least 0")
    block_size = model.config.block_size
    ends = torch.tensor(stop_ids(stop), device=idx.device)
    check_shape(idx)
    if mask is not None:
        idx, mask = padded_left(idx, mask)
        if cache is not None and cache.pos > 0:
            raise ValueError("prompts with a mask need an empty cache; truncate it")
    for prompt in idx.tolist():
        check_prompt(prompt, model.config.vocab_size)
    context = begin_context(idx, cache, block_size)
    with without_dropout(model):
        if cache is None and use_cache and max_new_tokens > 0:
            longest = min(block_size, idx.size(1) + max_new_tokens)
            cache = model.make_cache(idx.size(0), longest, cache_dtype)
            if mask is None:
                prefill_shared(model, context, cache, prefill_chunk)
        step = None
        if cache is not None and mask is None and DecodingStep.is_faster(model, cache):
            step = DecodingStep(model, cache)
        done = torch.zeros(idx.size(0), 1, dtype=torch.bool, device=idx.device)
        for _ in range(max_new_tokens):
            context = crop_context(context, cache, block_size)
            token = sampler(next_logits(model, context, cache, prefill_chunk, step, mask))
            token = torch.where(done, context[:, -1:], token)
            context = torch.cat([context, token], dim=1)
            if mask is not None:
                mask = torch.cat([mask, torch.ones_like(token, dtype=torch.bool)], dim=1)
            yield token
            if len(ends) > 0:
                done = torch.isin(token, ends)
                if bool(done.all()):
                    break


@contextlib.contextmanager
def without_dropout(*models: nn.Module) -> Iterator[None]:
    """Inside, models are in evaluation mode; then every part of them is in its own again."""
    training = [module for model in models for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def check_shape(idx: Tensor) -> None:
    """Raise ValueError if idx is not (B, T), or has no sequence or no token."""
    if idx.dim() != 2 or idx.numel() == 0:
        wrong = f"idx of shape {tuple(idx.shape)} does not work"
        raise ValueError(f"{wrong}: it must be (B, T) with at least one token")


def padded_left(idx: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """
    Prompts idx (B, T) with their padding, which mask (B, T) marks by False, moved to the left and
    replaced by id 0, and their mask. The longest has none. Raises ValueError for a mask of another
    shape or dtype, or without a real token in every sequence.
    """
    allowed = f"bool, {tuple(idx.shape)}, with a real token in every row"
    fits = mask.dtype == torch.bool and mask.shape == idx.shape and bool(mask.any(dim=1).all())
    require(fits, "mask", f"{mask.dtype} {tuple(mask.shape)}", allowed)
    order = mask.byte().argsort(dim=1, stable=True)
    longest = int(mask.sum(dim=1).max())
    idx = idx.masked_fill(~mask, 0).gather(1, order)
    return idx[:, -longest:], mask.gather(1, order)[:, -longest:]


def stop_ids(stop: int | Iterable[int] | None) -> list[int]:
    """The token ids that end a sequence: integers of any type, also a tensor's."""
    if stop is None:
        return []
    try:
        return [operator.index(stop)]
    except TypeError:
        return [operator.index(token) for token in stop]


def check_prompt(prompt: Sequence[int], vocab_size: int, longest: int | None = None) -> None:
    """Raise UserError for an empty prompt, ids that the model lacks, or more than `longest` ids."""
    if not prompt:
        raise UserError("the prompt is empty; give at least one token")
    for token in (min(prompt), max(prompt)):
        if not 0 <= token < vocab_size:
            ids = f"the model knows {vocab_size} token ids"
            raise UserError(f"the prompt has the token id {token}, {ids}")
    if longest is not None and len(prompt) > longest:
        context = f"the model's context {longest}"
        raise UserError(f"the prompt has {len(prompt)} tokens, {context}; shorten it")


@torch.inference_mode()
def begin_context(idx: Tensor, cache: Cache | None, block_size: int) -> Tensor:
    """
    What a model can look at of a prompt idx (B, T), its last tokens. A cache, which holds the first
    cache.pos tokens of idx, is made ready to go on with them: it forgets the last one, which is
    computed again, or all of them if idx does not fit it. ValueError for a cache of another text.
    """
    if cache is None:
        return idx[:, -block_size:]
    if cache.pos > idx.size(1):
        counts = f"the cache holds {cache.pos} tokens, idx {idx.size(1)}"
        raise ValueError(f"{counts}: it must begin with those; truncate the cache")
    cache.check(idx.size(0), 0, cache.device)
    longest = min(cache.max_len, block_size)
    cache.rewind(idx.size(1) - 1 if idx.size(1) <= longest else 0)
    return idx[:, -longest:]


@torch.inference_mode()
def crop_context(context: Tensor, cache: Cache | None, block_size: int) -> Tensor:
    """
    The last tokens of context (B, T) that a model can look at. A context that has outgrown its
    cache goes on with the newer half of what that can hold, and the cache is emptied for them.
    """
    if cache is None:
        return context[:, -block_size:]
    longest = min(cache.max_len, block_size)
    if context.size(1) <= longest:
        return context
    cache.truncate(0)
    return context[:, -newer_half(longest) :]


def newer_half(longest: int) -> int:
    """How many tokens are kept of a text that has outgrown a cache of so many."""
    return max(longest // 2, 1)


@torch.inference_mode()
def next_logits(
    model: nn.Module,
    context: Tensor,
    cache: Cache | None,
    chunk: int | None,
    step: "DecodingStep | None",
    mask: Tensor | None = None,
) -> Tensor:
    """
    The logits of the token after context (B, T), (B, V). A cache holds the first cache.pos tokens
    of it, and in the end all: those that it lacks are read in chunks, or by step if it is one.
    mask (B, S): which of the last tokens of context are real, if some are padding on the left.
    """
    if mask is not None:
        mask = mask[:, -context.size(1) :]
    if cache is None:
        return last_logits(model, context, None, mask)
    new = context[:, cache.pos :]
    if step is not None and new.size(1) == 1:
        return step(new)[:, -1]
    for part in new.split(min(chunk or new.size(1), new.size(1)), dim=1):
        seen = None
        if mask is not None:
            seen = mask[:, : cache.pos + part.size(1)]
        logits = last_logits(model, part, cache, seen)
    return logits


def last_logits(
    model: nn.Module, tokens: Tensor, cache: Cache | None, mask: Tensor | None
) -> Tensor:
    """The logits behind tokens (B, T), (B, V). Only a mask with padding among them is given on."""
    if mask is None or bool(mask[:, -tokens.size(1) :].all()):
        return model(tokens, cache=cache)[0][:, -1]
    return model(tokens, cache=cache, mask=mask)[0][:, -1]


@torch.inference_mode()
def prefill_shared(
    model: nn.Module, prompt: Tensor, cache: Cache, chunk: int | None = None
) -> None:
    """Fill an empty cache with all but the last token of prompt (B, T), if all are equal."""
    B, T = prompt.shape
    if B > 1 and T > 1 and bool((prompt == prompt[:1]).all()):
        first = cache.row(0)
        next_logits(model, prompt[:1, :-1], first, chunk, None)
        cache.copy_from(first)


# ---- The step that a CUDA graph repeats
class DecodingStep:
    """
    model(token, cache=cache) for one new token of every sequence, in evaluation mode and without
    gradients: token (B, 1) to logits (B, 1, V), which the next call overwrites once captured.

    A step of a small model is some hundred kernels, which take a GPU less time than Python takes to
    launch them. Captured in a CUDA graph they are launched at once. What a graph does is fixed, so
    all that changes from step to step is kept in tensors at fixed addresses: the token, how many
    tokens every sequence holds, and the cache, all of which every step may look at.

    capture: after EAGER calls, repeat a CUDA graph, but not under autocast, which keeps converted
    weights elsewhere. The kernels and their order are the same without it, and so is every number.
    """

    EAGER = 4  # steps before a graph is captured: the first compile kernels, short texts need none

    def __init__(self, model: nn.Module, cache: Cache, capture: bool = True) -> None:
        self.model = model
        self.cache = cache
        self.device = cache.device
        self.token = torch.zeros(cache.batch_size, 1, dtype=torch.int64, device=self.device)
        self.lengths = torch.zeros(cache.batch_size, dtype=torch.int64, device=self.device)
        on_cuda = self.device.type == "cuda" and not torch.is_autocast_enabled("cuda")
        self.capture = capture and on_cuda
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.logits: Tensor | None = None

    @staticmethod
    def is_faster(model: nn.Module, cache: Cache) -> bool:
        """
        Whether this is faster than the model alone: where the kernel takes what the cache holds, as
        others read all max_len tokens of it; and a state's is always.
        """
        gpu = on_gpu(cache.device)
        if gpu is None or cache.max_len == 1:
            return False
        if not cache.grows:
            return True
        computed_in = torch.promote_types(model.lm_head.weight.dtype, cache.dtype)  # as by attend
        q = torch.empty(0, dtype=computed_in)
        for layer in cache.layers:
            tensors = [buffer.tensors[0] for buffer in layer.buffers]
            if tensors and not gpu.supports(q, *tensors):
                return False
        return True

    @torch.inference_mode()
    def __call__(self, token: Tensor) -> Tensor:
        self.cache.check(token.size(0), 1, self.device)
        self.cache.truncate(self.cache.pos)  # a pass that was interrupted leaves nothing
        self.token.copy_(token)
        self.lengths.fill_(self.cache.pos)
        self.calls += 1
        if self.capture and self.graph is None and self.calls > self.EAGER:
            self._try_to_capture()
        if self.graph is None:
            self.logits = self._step()
        else:
            self.graph.replay()
        self.cache.advance(1)
        return self.logits

    def _step(self) -> Tensor:
        """The step itself, by a view of the cache whose lengths only the device reads."""
        view = self.cache.sequences(0, self.cache.batch_size)
        view.set_lengths(self.lengths, self.cache.max_len - 1)
        return self.model(self.token, cache=view)[0]

    def _try_to_capture(self) -> None:
        try:
            graph = torch.cuda.CUDAGraph()
            stream = torch.cuda.Stream(self.device)
            capturing = torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local")
            back = torch.cuda.stream(torch.cuda.current_stream(self.device))  # also if it fails
            with torch.cuda.device(self.device), back, capturing:
                self.logits = self._step()
        except RuntimeError as error:
            self.capture = False
            reason = str(error).splitlines()[0]
            say(f"warning: decoding goes on without a CUDA graph: {reason}", sys.stderr)
        else:
            self.graph = graph
