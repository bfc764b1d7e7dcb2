"""
Continue a text with a trained model, decoding on its compressed latent cache.

    python sample.py --out_dir=out-mla --start="ROMEO:" --temperature=0.8
    python sample.py --out_dir=out-mla --start=FILE:prompt.txt --num_samples=3
    python sample.py --out_dir=out-mla --start=FILE:prompts.txt --one_per_line --json
    python sample.py --out_dir=out-mla --interactive
    python sample.py --init_from=gpt2 --start="The answer is"

One sample is printed as it is made. Several follow one another, between lines of dashes.
--interactive reads lines, each of which goes on from all before. /reset forgets them, /stats tells
how many tokens and bytes they take, and Ctrl-C stops an answer.
"""

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from model import GPT
from nanomla import checkpoint, formats
from nanomla.batch import Chat, Engine, Sampling
from nanomla.cache import Cache
from nanomla.checks import Count, Natural, NonNegative, Seed, UpToOne, check
from nanomla.distributed import resolve_device
from nanomla.errors import UsageError, UserError, run_script, say
from nanomla.generate import PREFILL_CHUNK
from nanomla.settings import configure
from nanomla.tokenizer import Tokenizer

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
CacheDtype = Literal["auto", "float32", "bfloat16", "float16", "int8"]

COMMANDS = "/reset forgets the conversation, /stats measures it, //text is sent as /text"


@dataclass
class SampleConfig:
    """Raises ValueError for a value that cannot work."""

    headings: ClassVar[dict[str, str]] = {
        "out_dir": "model", "start": "prompt", "max_new_tokens": "sampling", "device": "device",
    }  # fmt: skip

    out_dir: Annotated[
        str, "The folder of a run, whose best.pt is read, or its ckpt.pt without a best.pt."
    ] = "out"
    ckpt: Annotated[str | None, "A checkpoint file that is read instead of out_dir."] = None
    init_from: Annotated[
        str | None,
        "Weights that are read instead of out_dir: gpt2, gpt2-medium, gpt2-large, gpt2-xl, a "
        "folder of safetensors, or a run.",
    ] = None
    verify: Annotated[
        bool, "The checkpoint is compared with its checksums. False opens a huge one sooner."
    ] = True
    dataset: Annotated[
        str | None,
        "The dataset that has the alphabet of a checkpoint of nanoGPT: a name below data/, a "
        "folder or a file.",
    ] = None
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

    start: Annotated[str, "The prompt, or FILE:path to read it from a file."] = "\n"
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
    seed: Annotated[Seed, "The seed of the draws."] = 1337

    device: Annotated[str, "The device to run on: auto, cpu, cuda, cuda:1, ... or mps."] = "auto"
    dtype: Annotated[
        Dtype, "The number format of the weights. auto takes bfloat16 on CUDA, else float32."
    ] = "auto"
    use_cache: Annotated[
        bool, "Past tokens are kept in a cache. False computes the whole context at every step."
    ] = True
    cache_dtype: Annotated[
        CacheDtype, "The number format of the cache. auto takes that of the weights."
    ] = "auto"
    prefill_chunk: Annotated[
        Count | None,
        "The number of tokens of a prompt that are read at a time; fewer need less memory. None "
        "reads all at once.",
    ] = PREFILL_CHUNK
    compile: Annotated[
        bool, "The MLPs are compiled by torch.compile: slower to start, then faster."
    ] = False

    def __post_init__(self) -> None:
        check(self)
        if self.ckpt and self.init_from:
            raise ValueError("ckpt and init_from both say what to read; give one of them")
        several = self.one_per_line or self.json or self.num_samples > 1
        if self.interactive and (several or not self.use_cache):
            raise ValueError(
                "interactive takes one prompt at a time and keeps its cache; leave out other modes"
            )
        if self.interactive and self.start != "\n":
            raise ValueError("interactive reads its prompts from the keyboard; leave out start")
        if self.stop == "":
            raise ValueError("stop='' does not work: it must be some text, or None")
        if self.svd_rank is not None and not self.use_svd:
            raise ValueError("svd_rank without use_svd has no effect; add --use_svd=True")


def main(argv: list[str] | None = None) -> None:
    if argv is None:
        argv = sys.argv[1:]
    cfg, _ = configure(SampleConfig, argv)
    prompt = read_prompt(cfg.start)
    device = resolve_device(cfg.device)
    model, tokenizer = open_model(cfg)
    dtype = weights_dtype(cfg.dtype, device)
    model.to(device, dtype).eval()
    if cfg.compile:
        compile_mlps(model)

    cache_dtype = None  # that of the weights
    if cfg.cache_dtype != "auto":
        cache_dtype = getattr(torch, cfg.cache_dtype)
    try:  # a cache of one token shows what a token takes, and refuses a dtype at once
        cache = model.make_cache(1, 1, cache_dtype)
    except ValueError as error:
        raise UsageError(f"--cache_dtype={cfg.cache_dtype}: {error}") from None

    engine = Engine(model, tokenizer, make_sampling(cfg, cache_dtype), cfg.seed)
    if cfg.interactive:
        seconds = converse(engine)
    elif cfg.one_per_line:
        seconds = print_several(engine, cfg, prompt.splitlines())
    elif cfg.json or cfg.num_samples > 1:
        seconds = print_several(engine, cfg, [prompt])
    else:
        seconds = print_one(engine, prompt)

    dtype_name = str(dtype).removeprefix("torch.")
    cache_size = "no cache"
    if cfg.use_cache:
        cache_size = describe_cache(model, cache)
    rate = tokens_per_second(engine, seconds)
    print(f"{rate} on {device} in {dtype_name}; {cache_size}", file=sys.stderr)


def read_prompt(start: str) -> str:
    """The prompt's text. Raises UserError if it is empty or its file cannot be read."""
    if start.startswith("FILE:"):
        path = start.removeprefix("FILE:")
        try:
            start = Path(path).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:  # no UTF-8, or a path with NUL in it
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"--start=FILE:{path}: cannot be read ({reason})") from None
    if not start:
        raise UsageError("--start: the prompt is empty; give at least one character")
    return start


def open_model(cfg: SampleConfig) -> tuple[GPT, Tokenizer]:
    """The model, on the CPU, and the tokenizer of a checkpoint."""
    if cfg.init_from:
        ckpt = formats.open_weights(cfg.init_from, True, cfg.verify)
    else:
        file = cfg.ckpt or checkpoint.find(cfg.out_dir, prefer_best=True)
        ckpt = checkpoint.load(file, cfg.verify)
    svd = {}
    if cfg.use_svd:
        svd = {"use_svd": True, "svd_rank": cfg.svd_rank, "svd_method": cfg.svd_method}
    model, note = checkpoint.build(ckpt, dropout=0.0, **svd)
    if note:
        print(note, file=sys.stderr)
    return model, Tokenizer(checkpoint.tokenizer_spec(ckpt, cfg.dataset), ckpt.source)


def weights_dtype(name: Dtype, device: str) -> torch.dtype:
    """The dtype of that name; auto is bfloat16 on a CUDA device that has it, else float32."""
    if name != "auto":
        return getattr(torch, name)
    if device.startswith("cuda") and torch.cuda.is_bf16_supported():
        return torch.bfloat16
    return torch.float32


def compile_mlps(model: GPT) -> None:
    """Compile the MLPs alone, as attention's shapes change with every token in the cache."""
    print("compiling (the first tokens take longer)", file=sys.stderr)
    for block in model.transformer.h:
        block.mlp.compile()


def make_sampling(cfg: SampleConfig, cache_dtype: torch.dtype | None) -> Sampling:
    """The settings as an Engine takes them. cache_dtype None: that of the weights."""
    stop = None
    if cfg.stop:
        stop = cfg.stop.replace("\\n", "\n")
    return Sampling(
        max_new_tokens=cfg.max_new_tokens,
        temperature=cfg.temperature,
        top_k=cfg.top_k,
        top_p=cfg.top_p,
        stop=stop,
        use_cache=cfg.use_cache,
        cache_dtype=cache_dtype,
        prefill_chunk=cfg.prefill_chunk,
    )


def tokens_per_second(engine: Engine, seconds: float) -> str:
    """The rate of all the tokens that were made in so many seconds."""
    return f"{engine.tokens_made / max(seconds, 1e-9):,.0f} tokens/s"


def describe_cache(model: GPT, cache: Cache) -> str:
    """The bytes of a cache of one sequence and one token, compared with MHA's if they differ."""
    context = model.config.block_size
    size = f"cache: {cache.bytes_per_token:,} bytes per token"
    if cache.bytes_per_token == 0:
        size = f"cache: {cache.nbytes:,} bytes at any length"
    ratio = model.get_memory_savings(context)
    if f"{ratio:.3g}" == "1":
        return size
    comparison = f"{ratio:.3g}x smaller than MHA's"
    if ratio < 1:
        comparison = f"{1 / ratio:.3g}x larger than MHA's"
    if not cache.grows:
        comparison += f" at {context:,} tokens"
    return f"{size}, {comparison}"


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


def print_one(engine: Engine, prompt: str) -> float:
    """Print a prompt and its continuation; returns the seconds of the continuation."""
    engine.encode(prompt)  # a prompt that cannot be continued is not printed
    sys.stdout.write(prompt)
    return print_stream(engine.stream(prompt))


def print_several(engine: Engine, cfg: SampleConfig, prompts: list[str]) -> float:
    """Print samples of several prompts, in their order; returns the seconds that they took."""
    prompts = [prompt for prompt in prompts if prompt]
    if not prompts:
        raise UsageError("--start: there is no prompt in it")
    began = time.perf_counter()
    results = engine.complete(prompts, cfg.num_samples)
    seconds = time.perf_counter() - began
    utf8 = (sys.stdout.encoding or "utf-8").lower().replace("-", "") == "utf8"
    for prompt, samples in zip(prompts, results, strict=True):
        for sample in samples:
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
    return seconds


def converse(engine: Engine) -> float:
    """
    Answer lines from stdin until an empty one or its end; returns the seconds that took.

    On a terminal, Ctrl-C stops an answer or empties a line; two in a row end the conversation.
    """
    chat = engine.chat()
    seconds = 0.0
    terminal = sys.stdin.isatty()
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")  # a line that is no UTF-8 should not end it
    if terminal:
        with contextlib.suppress(ImportError):  # not on Windows
            import readline  # noqa: F401  gives input() line editing and a history
        say(f"{COMMANDS}; Ctrl-C stops an answer, an empty line or Ctrl-D ends", sys.stderr)
    while line := read_line(terminal):
        if line.startswith("//"):
            seconds += print_answer(chat, line[1:], terminal)
        elif line.startswith("/"):
            rate = tokens_per_second(engine, seconds)
            say(run_command(line.strip(), chat, rate), sys.stderr)
        else:
            seconds += print_answer(chat, line, terminal)
    return seconds


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
        say(f"{os.path.basename(sys.argv[0])}: {error}", sys.stderr)
        return 0.0


def read_line(terminal: bool) -> str:
    """A line from stdin; "" at its end and, on a terminal, after two Ctrl-C in a row."""
    prompt = ""
    if terminal:
        prompt = "> "
    for _ in range(2):
        try:
            return input(prompt)
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

    before = signal.signal(signal.SIGINT, count)
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, before)


if __name__ == "__main__":
    run_script(main)
