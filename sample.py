"""
Continue a text with a trained model, decoding on its compressed latent cache.

    python sample.py --out_dir=out-mla --start="ROMEO:" --temperature=0.8
    python sample.py --out_dir=out-mla --start=FILE:prompt.txt --num_samples=3
    python sample.py --out_dir=out-mla --start=FILE:prompts.txt --one_per_line --json
    python sample.py --out_dir=out-mla --interactive
    python sample.py --init_from=gpt2 --start="The answer is"
    python sample.py --init_from=gpt2-large --draft=gpt2 --speculate=4

One sample is printed as it is made. Several follow one another, between lines of dashes.
--interactive reads lines, each of which goes on from all before. /reset forgets them, /stats tells
how many tokens and bytes they take, and Ctrl-C stops an answer.
"""

import contextlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field

from model import GPT
from nanomla import experts
from nanomla.batch import Batch, Request, Sampling
from nanomla.cache import dtype_name
from nanomla.chat import Chat
from nanomla.checks import Count, Natural, NonNegative, Seed, Text, UpToOne
from nanomla.errors import UsageError, UserError, run_script, say, script_name
from nanomla.files import read_text
from nanomla.formats import open_weights
from nanomla.generate import PREFILL_CHUNK, stream_tokens
from nanomla.inference import ModelSettings, Opened, open_model
from nanomla.settings import configure
from nanomla.signals import handled
from nanomla.speculate import Speculation
from nanomla.text import Sample, encode_prompt
from nanomla.tokenizer import ends_of_text, same_ids

ROWS = 64  # samples side by side
COMMANDS = "/reset forgets the conversation, /stats measures it, //text is sent as /text"


@dataclass
class SampleConfig(ModelSettings):
    """Raises ValueError for a value that cannot work."""

    headings: ClassVar[dict[str, str]] = ModelSettings.headings | {
        "use_svd": "model", "start": "prompt", "max_new_tokens": "sampling", "use_cache": "device",
    }

    use_svd: Annotated[
        bool, "The values of a checkpoint that was trained without SVD are factorised."
    ] = False
    svd_rank: Annotated[
        int | None,
        "The rank that values are factorised to. None keeps the checkpoint's, or stands for full "
        "rank.",
    ] = None
    svd_method: Annotated[
        Literal["exact", "randomized"], "The method that factorises the value maps."
    ] = "exact"

    start: Annotated[str, "The prompt, or FILE:path to read it from a file or a pipe."] = "\n"
    one_per_line: Annotated[bool, "Every line of the prompt is a prompt of its own."] = False
    interactive: Annotated[
        bool, "Prompts are read from the keyboard, and each goes on from all before."
    ] = False
    num_samples: Annotated[
        Count, Field(le=100_000), "The number of samples to draw from every prompt."
    ] = 1
    json: Annotated[
        bool, "Each sample is printed as a JSON object with prompt, text, tokens and seconds."
    ] = False

    max_new_tokens: Annotated[Count, "The number of tokens in a sample, at most."] = 500
    temperature: Annotated[
        NonNegative,
        "The temperature of the draws: 1 keeps the model's own probabilities, lower is safer, and "
        "0 always takes the likeliest token.",
    ] = 0.8
    top_k: Annotated[
        Natural | None, "The number of likeliest tokens to draw from. None or 0 allows all."
    ] = 200
    top_p: Annotated[
        UpToOne | None,
        "Only the likeliest tokens whose probabilities add up to this are drawn. None allows all.",
    ] = None
    stop: Annotated[
        str | None, "A sample ends before this text, in which \\n stands for a new line."
    ] = None
    ignore_eos: Annotated[
        bool, "A sample goes on past the tokens that end a text in the model's tokenizer."
    ] = False
    seed: Annotated[Seed, "The seed of the draws."] = 1337

    use_cache: Annotated[
        bool, "Past tokens are kept in a cache. False computes the whole context at every step."
    ] = True
    prefill_chunk: Annotated[
        Count | None,
        "The number of tokens of a prompt that are read at a time; fewer need less memory. None "
        "reads all at once.",
    ] = PREFILL_CHUNK
    speculate: Annotated[
        Count | None,
        "The number of tokens that are drafted and checked in one pass, which is faster where "
        "enough of them are right. The model's block for the token after the next (n_predict=1) "
        "drafts them, or the model of --draft.",
    ] = None
    draft: Annotated[
        Text | None,
        "The weights of a smaller model, named as for init_from, that drafts tokens for "
        "--speculate.",
    ] = None
    compile: Annotated[
        bool, "The MLPs are compiled by torch.compile: slower to start, then faster."
    ] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        several = self.one_per_line or self.json or self.num_samples > 1
        if self.interactive and (several or not self.use_cache):
            raise ValueError(
                "interactive takes one prompt at a time and keeps its cache; leave out other modes"
            )
        if self.interactive and self.start != "\n":
            raise ValueError("interactive reads its prompts from the keyboard; leave out start")
        if self.stop == "":
            raise ValueError("stop='' does not work: it must be some text, or None")
        several = several or self.interactive or not self.use_cache
        if self.speculate is not None and several:
            raise ValueError(
                "speculate draws one sample with a cache; leave out num_samples, one_per_line, "
                "json, interactive and use_cache"
            )
        if self.draft is not None and self.speculate is None:
            raise ValueError("draft without speculate has no effect; add --speculate=4")
        if self.svd_rank is not None and not self.use_svd:
            raise ValueError("svd_rank without use_svd has no effect; add --use_svd=True")

    def factors(self) -> dict[str, Any]:
        """The settings of the model's values that differ from those of the checkpoint."""
        if not self.use_svd:
            return {}
        return {"use_svd": True, "svd_rank": self.svd_rank, "svd_method": self.svd_method}

    def sampling(self, opened: Opened) -> Sampling:
        """How samples are drawn, and where they end."""
        stop = None
        if self.stop:
            stop = self.stop.replace("\\n", "\n")
        ends = ()
        if not self.ignore_eos:
            ends = ends_of_text(opened.tokenizer.spec)
        return Sampling(self.max_new_tokens, self.temperature, self.top_k, self.top_p, stop, ends)


def main(argv: list[str] | None = None) -> None:
    if argv is None:
        argv = sys.argv[1:]
    cfg, _ = configure(SampleConfig, argv)
    prompt = read_prompt(cfg.start)
    opened = open_model(cfg, cfg.read(), **cfg.factors())
    if cfg.compile:
        compile_mlps(opened.model)
    drafts = ""
    if cfg.speculate is not None:
        speculation = open_speculation(cfg, opened)
        made, seconds = print_one(cfg, opened, prompt, speculation)
        share = speculation.accepted / max(speculation.drafted, 1)
        drafts = f"; {share:.0%} of {speculation.drafted:,} drafts accepted"
    elif cfg.interactive:
        made, seconds = converse(cfg, opened)
    elif cfg.one_per_line:
        made, seconds = print_several(cfg, opened, lines_of(prompt))
    elif cfg.json or cfg.num_samples > 1:
        made, seconds = print_several(cfg, opened, [prompt])
    else:
        made, seconds = print_one(cfg, opened, prompt)

    cache_size = "no cache"
    if cfg.use_cache:
        cache_size = describe_cache(opened)
    rate = tokens_per_second(made, seconds)
    where = f"{opened.device} in {dtype_name(opened.dtype)}"
    say(f"{rate} on {where}; {cache_size}{drafts}", sys.stderr)


def read_prompt(start: str) -> str:
    """The prompt's text. Raises UserError if it is empty or its file cannot be read."""
    if start.startswith("FILE:"):
        try:
            start = read_text(start.removeprefix("FILE:"))
        except UserError as error:
            raise UserError(f"--start=FILE:{error}") from None
    if not start:
        raise UsageError("--start: the prompt is empty; give at least one character")
    return start


def lines_of(text: str) -> list[str]:
    """The lines of a text, which end at \\n or \\r\\n; \\r alone is a character like any other."""
    return [line.removesuffix("\r") for line in text.split("\n")]


def compile_mlps(model: GPT) -> None:
    """Compile the MLPs alone, as attention's shapes change with every token in the cache."""
    say("compiling (the first tokens take longer)", sys.stderr)
    experts.leave_uncompiled(model)
    for block in model.transformer.h:
        block.mlp.compile()


def tokens_per_second(made: int, seconds: float) -> str:
    """The rate of so many tokens that were made in so many seconds."""
    return f"{made / max(seconds, 1e-9):,.0f} tokens/s"


def describe_cache(opened: Opened) -> str:
    """The bytes of a cache of one sequence and one token, compared with MHA's if they differ."""
    cache = opened.model.make_cache(1, 1, opened.cache_dtype)
    context = opened.model.config.block_size
    size = f"cache: {cache.bytes_per_token:,} bytes per token"
    if cache.bytes_per_token == 0:
        size = f"cache: {cache.nbytes:,} bytes at any length"
    ratio = opened.model.get_memory_savings(context)
    if f"{ratio:.3g}" == "1":
        return size
    comparison = f"{ratio:.3g}x smaller than MHA's"
    if ratio < 1:
        comparison = f"{1 / ratio:.3g}x larger than MHA's"
    if not cache.grows:
        comparison += f" at {context:,} tokens"
    return f"{size}, {comparison}"


# ---- One sample, as it is made
def print_stream(pieces: Iterator[str], interrupts: Sequence[int] = ()) -> float:
    """Print text as it is made, until there is an interrupt; returns the seconds taken."""
    began = time.perf_counter()
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
        if interrupts:
            break
    print(flush=True)
    return time.perf_counter() - began


def open_speculation(cfg: SampleConfig, opened: Opened) -> Speculation:
    """Speculative decoding by the draft that is asked for. Raises UserError if it cannot be."""
    draft = None
    if cfg.draft is not None:
        opened_draft = open_model(cfg, open_weights(cfg.draft, prefer_best=True, verify=cfg.verify))
        if not same_ids(opened.tokenizer.spec, opened_draft.tokenizer.spec):
            other = "has another tokenizer than the model: its token ids mean other text"
            raise UserError(f"--draft={cfg.draft} {other}")
        draft = opened_draft.model
    try:
        return Speculation(opened.model, cfg.speculate, draft, opened.cache_dtype)
    except ValueError as error:
        raise UsageError(str(error)) from None


def print_one(
    cfg: SampleConfig, opened: Opened, prompt: str, speculation: Speculation | None = None
) -> tuple[int, float]:
    """Print a prompt and its continuation; returns the tokens made and the seconds they took."""
    tokens = encode_prompt(prompt, opened.tokenizer, opened.model.config)
    sampling = cfg.sampling(opened)
    sample = Sample(opened.tokenizer, sampling.stop, sampling.ends)
    sys.stdout.write(prompt)
    idx = torch.tensor([tokens], device=opened.device)
    sampler = sampling.sampler(cfg.seed, opened.device)
    chunk = cfg.prefill_chunk
    if speculation is not None:
        drawn = speculation.stream(idx, cfg.max_new_tokens, sampler, prefill_chunk=chunk)
    else:
        drawn = stream_tokens(
            opened.model,
            idx,
            cfg.max_new_tokens,
            sampler,
            cfg.use_cache,
            opened.cache_dtype,
            prefill_chunk=chunk,
        )
    seconds = print_stream(sample.extend(drawn))
    return len(sample.tokens), seconds


# ---- Several samples
def print_several(cfg: SampleConfig, opened: Opened, prompts: list[str]) -> tuple[int, float]:
    """Print samples of several prompts, in their order; returns as print_one does."""
    prompts = [prompt for prompt in prompts if prompt]
    if not prompts:
        raise UsageError("--start: there is no prompt in it")
    encoded = [encode_prompt(prompt, opened.tokenizer, opened.model.config) for prompt in prompts]
    began = time.perf_counter()
    if cfg.use_cache:
        samples = draw_in_batch(cfg, opened, encoded)
    else:
        samples = draw_without_cache(cfg, opened, encoded)
    seconds = time.perf_counter() - began
    utf8 = (sys.stdout.encoding or "utf-8").lower().replace("-", "") == "utf8"
    for i, sample in enumerate(samples):
        prompt = prompts[i // cfg.num_samples]
        if cfg.json:
            record = {
                "prompt": prompt,
                "text": sample.text,
                "tokens": len(sample.tokens),
                "seconds": round(sample.seconds, 4),
            }
            print(json.dumps(record, ensure_ascii=not utf8))
        else:
            print(prompt + sample.text + "\n---------------")
    return sum(len(sample.tokens) for sample in samples), seconds


def draw_in_batch(cfg: SampleConfig, opened: Opened, prompts: list[list[int]]) -> list[Sample]:
    """num_samples continuations of every prompt, prompt after prompt, up to ROWS side by side."""
    rows = min(len(prompts) * cfg.num_samples, ROWS)
    block_size = opened.model.config.block_size
    longest = max(len(prompt) for prompt in prompts) + cfg.max_new_tokens
    chunk = cfg.prefill_chunk or block_size
    max_len = min(longest, block_size)
    batch = Batch(opened.model, opened.tokenizer, rows, opened.cache_dtype, chunk, max_len)
    counts = [min(rows, cfg.num_samples - i) for i in range(0, cfg.num_samples, rows)]
    shape = (len(prompts), len(counts))
    generator = torch.Generator(opened.device).manual_seed(cfg.seed)
    seeds = torch.randint(2**62, shape, device=opened.device, generator=generator).tolist()
    requests = []
    for prompt, seeds_of_prompt in zip(prompts, seeds, strict=True):
        for count, seed in zip(counts, seeds_of_prompt, strict=True):
            requests.append(Request(prompt, cfg.sampling(opened), count, seed))
    for request in requests:
        batch.submit(request)
    began = time.perf_counter()
    while batch.busy:
        for piece in batch.step():
            if piece.error:
                raise UserError(piece.error)
            if piece.finish:
                sample = piece.request.samples[piece.index]
                sample.seconds = time.perf_counter() - began
    return [sample for request in requests for sample in request.samples]


def draw_without_cache(cfg: SampleConfig, opened: Opened, prompts: list[list[int]]) -> list[Sample]:
    """The same, with the samples of one prompt side by side."""
    sampling = cfg.sampling(opened)
    sampler = sampling.sampler(cfg.seed, opened.device)
    samples = []
    for prompt in prompts:
        began = time.perf_counter()
        idx = torch.tensor([prompt] * cfg.num_samples, device=opened.device)
        some = [Sample(opened.tokenizer, sampling.stop, sampling.ends) for _ in idx]
        for tokens in stream_tokens(opened.model, idx, cfg.max_new_tokens, sampler, False):
            for sample, token in zip(some, tokens[:, 0].tolist(), strict=True):
                if not sample.done:
                    sample.push(token)
            if all(sample.done for sample in some):
                break
        for sample in some:
            sample.finish()
            sample.seconds = time.perf_counter() - began
        samples += some
    return samples


# ---- A conversation
def converse(cfg: SampleConfig, opened: Opened) -> tuple[int, float]:
    """
    Answer lines from stdin until an empty one or its end; returns as print_one does.

    On a terminal, Ctrl-C stops an answer or empties a line; two in a row end the conversation.
    """
    how = (cfg.sampling(opened), cfg.seed, opened.cache_dtype, cfg.prefill_chunk)
    chat = Chat(opened.model, opened.tokenizer, *how)
    seconds = 0.0
    terminal = sys.stdin.isatty()
    if hasattr(sys.stdin, "reconfigure"):
        # A line that is no UTF-8 should not end it, and lines end as in lines_of.
        sys.stdin.reconfigure(errors="replace", newline="\n")
    if terminal:
        with contextlib.suppress(ImportError):  # not on Windows
            import readline  # noqa: F401  gives input() line editing and a history
        say(f"{COMMANDS}; Ctrl-C stops an answer, an empty line or Ctrl-D ends", sys.stderr)
    while line := read_line(terminal):
        if line.startswith("//"):
            seconds += print_answer(chat, line[1:], terminal)
        elif line.startswith("/"):
            rate = tokens_per_second(chat.tokens_made, seconds)
            say(run_command(line.strip(), chat, rate), sys.stderr)
        else:
            seconds += print_answer(chat, line, terminal)
    return chat.tokens_made, seconds


def print_answer(chat: Chat, text: str, terminal: bool) -> float:
    """
    Print the answer to a text, or why there is none; returns the seconds that the answer took.

    On a terminal, Ctrl-C stops the answer.
    """
    interruptible = contextlib.nullcontext([])
    if terminal:
        interruptible = interrupts_counted()
    try:
        with interruptible as interrupts, contextlib.closing(chat.reply(text)) as answer:
            return print_stream(answer, interrupts)
    except UserError as error:
        say(f"{script_name()}: {error}", sys.stderr)
        return 0.0


def read_line(terminal: bool) -> str:
    """A line from stdin; "" at its end and, on a terminal, after two Ctrl-C in a row."""
    prompt = ""
    if terminal:
        prompt = "> "
    for _ in range(2):
        try:
            return input(prompt).removesuffix("\r")
        except EOFError:
            break
        except KeyboardInterrupt:
            if not terminal:
                raise
            print()
    return ""


def run_command(command: str, chat: Chat, rate: str) -> str:
    """Do what a line that begins with a slash asks for; returns the line that answers it."""
    if command == "/reset":
        chat.reset()
        return "the conversation is empty"
    if command == "/stats":
        cache = chat.cache
        context = f"{len(chat.context):,} of {cache.max_len:,} tokens"
        size = f"{cache.nbytes_at(cache.pos):,} of {cache.nbytes:,} cache bytes"
        return f"{context}, {size}, {rate}"
    return f"{command} is not a command; {COMMANDS}"


@contextlib.contextmanager
def interrupts_counted() -> Iterator[list[int]]:
    """
    Inside, the first Ctrl-C only gets into the list, so that no step of the model is cut short; the
    second raises KeyboardInterrupt.
    """
    interrupts: list[int] = []

    def count(number: int, _frame: FrameType | None) -> None:
        if interrupts:
            raise KeyboardInterrupt
        interrupts.append(number)

    with handled(count, "SIGINT"):
        yield interrupts


if __name__ == "__main__":
    run_script(main)
