"""
Continue a text with a trained model, decoding on its compressed latent cache.

    python sample.py --out_dir=out-mla --start="ROMEO:" --temperature=0.8
    python sample.py --out_dir=out-mla --start=FILE:prompt.txt --num_samples=3
    python sample.py --out_dir=out-mla --start=FILE:prompts.txt --one_per_line --json
    python sample.py --out_dir=out-mla --interactive
    python sample.py --init_from=gpt2 --start="The answer is"

One sample streams to stdout as it is made; several follow one another, between lines of dashes.
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import Tensor

import checkpoint as ckpt
from configurator import UsageError, UserError, configure, run_script
from data.tokenizer import StreamDecoder, Tokenizer
from model import GPT
from parallel import resolve_device


@dataclass
class SampleConfig:
    """Raises ValueError for a value that cannot work."""

    out_dir: Annotated[str, "the run's folder; its best.pt, else its ckpt.pt is read"] = "out"
    ckpt: Annotated[str | None, "a checkpoint file instead"] = None
    init_from: Annotated[
        str | None, "weights from elsewhere instead: gpt2[-medium|-large|-xl], a folder of safetensors or another run's"
    ] = None
    start: Annotated[str, "the prompt, or FILE:path to read it from"] = "\n"
    one_per_line: Annotated[bool, "every line of the prompt is a prompt of its own"] = False
    num_samples: Annotated[int, "how many to draw from every prompt"] = 1
    max_new_tokens: Annotated[int, "tokens per sample"] = 500
    temperature: Annotated[float, "1: as the model predicts, lower: safer, 0: greedy"] = 0.8
    top_k: Annotated[int | None, "keep the k likeliest tokens only; None or 0: all"] = 200
    top_p: Annotated[float | None, "keep the likeliest tokens that make up this probability; None: all"] = None
    stop: Annotated[str | None, "end a sample before this text; \\n stands for a new line"] = None
    seed: Annotated[int, "of the draws"] = 1337
    json: Annotated[bool, "print one JSON object per sample: prompt, text, tokens, seconds"] = False
    interactive: Annotated[bool, "read prompts from the keyboard, going on with the cache of what was said"] = False
    device: Annotated[str, "auto, cpu, cuda, cuda:1, mps"] = "auto"
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], "of the weights; auto: bfloat16 on CUDA, else float32"
    ] = "auto"
    use_cache: Annotated[bool, "decode on the cache; False: recompute the context for every token, to compare"] = True
    cache_dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], "of the cache; auto: that of the weights"
    ] = "auto"
    compile: Annotated[bool, "torch.compile what does not depend on the position, the MLPs: slow to start, then faster"] = False
    use_svd: Annotated[bool, "factorise the values of a checkpoint trained without SVD"] = False
    svd_rank: Annotated[int | None, "to this rank; None: full"] = None
    svd_method: Annotated[Literal["exact", "randomized"], "how"] = "exact"

    def __post_init__(self) -> None:
        at_least = {"num_samples": 1, "max_new_tokens": 1, "temperature": 0, "seed": 0, "top_k": 0}
        for name, least in at_least.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}={value!r} does not work: {name} must be at least {least}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p!r} does not work: it must be above 0 and at most 1, or None")
        if self.ckpt and self.init_from:
            raise ValueError("ckpt and init_from both say what to read; give one of them")
        if self.interactive and (self.one_per_line or self.json or self.num_samples > 1 or not self.use_cache):
            raise ValueError("interactive takes one prompt at a time and keeps its cache; leave out the other modes")
        if self.stop == "":
            raise ValueError("stop='' does not work: it must be some text, or None")
        if self.svd_rank is not None and not self.use_svd:
            raise ValueError("svd_rank without use_svd has no effect; add --use_svd=True")


def main(argv: list[str] | None = None) -> None:
    cfg, _ = configure(SampleConfig, sys.argv[1:] if argv is None else argv)
    text = read_prompt(cfg.start)
    device = resolve_device(cfg.device)
    model, tokenizer = open_run(cfg)
    bf16 = device.startswith("cuda") and torch.cuda.is_bf16_supported()
    dtype = getattr(torch, ("bfloat16" if bf16 else "float32") if cfg.dtype == "auto" else cfg.dtype)
    model.to(device, dtype).eval()
    if cfg.compile:
        print("compiling (the first tokens take longer)", file=sys.stderr)
        for block in model.transformer.h:  # attention depends on how much the cache holds, and would compile ever anew
            block.mlp.compile()
    sampler = Sampler(cfg, model, tokenizer)
    if cfg.interactive:
        made, seconds = chat(sampler)
    elif cfg.num_samples == 1 and not cfg.one_per_line and not cfg.json:
        made, seconds = write_one(sampler, text)
    else:
        made, seconds = write_several(sampler, text.splitlines() if cfg.one_per_line else [text])
    cache = model.make_cache(1, 1, sampler.cache_dtype)
    held = f"cache: {cache.bytes_per_token:,} bytes per token, {model.get_memory_savings(1):.3g}x smaller than MHA's"
    print(
        f"{made / seconds:,.0f} tokens/s on {device} in {str(dtype).removeprefix('torch.')}; "
        + (held if cfg.use_cache else "no cache"),
        file=sys.stderr,
    )


class Sampler:
    """A model with its tokenizer and the settings every sample shares; its random numbers go on from call to call."""

    def __init__(self, cfg: SampleConfig, model: GPT, tokenizer: Tokenizer) -> None:
        self.cfg, self.model, self.tokenizer = cfg, model, tokenizer
        self.device = model.lm_head.weight.device
        self.generator = torch.Generator(self.device).manual_seed(cfg.seed)
        self.stop = cfg.stop.replace("\\n", "\n") if cfg.stop else None
        self.cache_dtype = model.lm_head.weight.dtype if cfg.cache_dtype == "auto" else getattr(torch, cfg.cache_dtype)

    def encode(self, text: str) -> list[int]:
        """A prompt's tokens. Raises UserError if they are more than the model's context."""
        prompt = self.tokenizer.encode(text)
        if len(prompt) > self.model.config.block_size:
            raise UserError(
                f"the prompt has {len(prompt)} tokens, the model's context {self.model.config.block_size}; shorten it"
            )
        return prompt

    def tokens(self, prompts: list[list[int]], **more) -> Iterator[Tensor]:
        """Continue prompts of one length side by side: an iterator over (B, 1)."""
        cfg, idx = self.cfg, torch.tensor(prompts, device=self.device)
        return self.model.generate(
            idx, cfg.max_new_tokens, cfg.temperature, cfg.top_k, cfg.top_p, use_cache=cfg.use_cache,
            generator=self.generator, stream=True, cache_dtype=self.cache_dtype, **more,
        )  # fmt: skip


class StopText:
    """Passes text on up to the stop string, holding back what may become it."""

    def __init__(self, stop: str | None) -> None:
        self.stop, self.held, self.done = stop, "", False

    def push(self, text: str, last: bool = False) -> str:
        """What of the text so far can be shown now; `done` once the stop string has come."""
        if self.stop is None or self.done:
            return "" if self.done else text
        self.held += text
        found = self.held.find(self.stop)
        if found >= 0:
            self.done = True
            return self.held[:found]
        keep = 0 if last else next((n for n in range(len(self.stop) - 1, 0, -1) if self.held.endswith(self.stop[:n])), 0)
        shown, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return shown


def read_prompt(start: str) -> str:
    """The prompt's text. Raises UserError if it is empty or its file cannot be read."""
    if start.startswith("FILE:"):
        path = start.removeprefix("FILE:")
        try:
            start = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"--start=FILE:{path}: cannot be read ({reason})") from None
    if not start:
        raise UsageError("--start: the prompt is empty; give at least one character")
    return start


def open_run(cfg: SampleConfig) -> tuple[GPT, Tokenizer]:
    """The model, on the CPU, and the tokenizer of a checkpoint."""
    if cfg.init_from:
        held, source = ckpt.open_source(cfg.init_from, prefer_best=True)
    else:
        source = Path(cfg.ckpt) if cfg.ckpt else ckpt.find(cfg.out_dir, prefer_best=True)
        held = ckpt.load(source)
    svd = {name: getattr(cfg, name) for name in ckpt.SVD_SETTINGS} if cfg.use_svd else {}
    model, note = ckpt.build_model(held, source, dropout=0.0, **svd)
    if note:
        print(note, file=sys.stderr)
    return model, Tokenizer(ckpt.tokenizer_spec(held, source))


def stream(sampler: Sampler, tokens: Iterator[Tensor]) -> list[int]:
    """Write one row's text to stdout as it is made, up to the stop string; returns the tokens."""
    decoder, until, made = StreamDecoder(sampler.tokenizer), StopText(sampler.stop), []
    for token in tokens:
        made.append(int(token))
        sys.stdout.write(until.push(decoder.push(made[-1])))
        sys.stdout.flush()
        if until.done:
            break
    print(until.push(decoder.finish(), last=True), flush=True)
    return made


def write_one(sampler: Sampler, text: str) -> tuple[int, float]:
    """Stream one sample; returns how many tokens were made and the seconds that took."""
    tokens = sampler.tokens([sampler.encode(text)])
    began = time.perf_counter()
    sys.stdout.write(text)
    return len(stream(sampler, tokens)), time.perf_counter() - began


def write_several(sampler: Sampler, texts: list[str]) -> tuple[int, float]:
    """Draw samples side by side, prompts of equal length together, and print them in the order of the prompts."""
    cfg, prompts = sampler.cfg, [sampler.encode(text) for text in texts if text]
    texts = [text for text in texts if text]
    if not texts:
        raise UsageError("--start: there is no prompt in it")
    by_length: dict[int, list[int]] = {}
    for i, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(i)
    results: dict[int, list[tuple[list[int], str, float]]] = {}
    total = 0.0
    for group in by_length.values():
        began = time.perf_counter()
        rows = draw_rows(sampler, [prompts[i] for i in group for _ in range(cfg.num_samples)])
        took = time.perf_counter() - began
        total += took
        for n, i in enumerate(group):
            results[i] = [(*row, took) for row in rows[n * cfg.num_samples : (n + 1) * cfg.num_samples]]
    for i, text in enumerate(texts):
        for tokens, continuation, took in results[i]:
            if cfg.json:
                sample = {"prompt": text, "text": continuation, "tokens": len(tokens), "seconds": round(took, 4)}
                print(json.dumps(sample, ensure_ascii=False))
            else:
                print(text + continuation + "\n---------------")
    return sum(len(tokens) for rows in results.values() for tokens, _, _ in rows), total


def draw_rows(sampler: Sampler, prompts: list[list[int]]) -> list[tuple[list[int], str]]:
    """Continue prompts of one length; every row's tokens, up to where its stop string ended, and its text."""
    rows: list[list[int]] = [[] for _ in prompts]
    texts = [""] * len(prompts)
    decoders = [StreamDecoder(sampler.tokenizer) for _ in prompts]
    untils = [StopText(sampler.stop) for _ in prompts]
    for column in sampler.tokens(prompts):
        for i, token in enumerate(column[:, 0].tolist()):
            if not untils[i].done:
                rows[i].append(token)
                texts[i] += untils[i].push(decoders[i].push(token))
        if all(until.done for until in untils):
            break
    return [(rows[i], texts[i] + untils[i].push(decoders[i].finish(), last=True)) for i in range(len(prompts))]


def chat(sampler: Sampler) -> tuple[int, float]:
    """A prompt loop: every line goes behind what was said before, whose cache is kept. An empty line or Ctrl-D ends."""
    model = sampler.model
    cache = model.make_cache(1, model.config.block_size, sampler.cache_dtype)
    said: list[int] = []  # what the model sees: the cache's tokens and those it has yet to read
    made, seconds = 0, 0.0
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(prompt)
        except EOFError:
            break
        if not line:
            break
        try:
            said += sampler.encode(line + "\n")
        except UserError as error:
            print(f"{os.path.basename(sys.argv[0])}: {error}", file=sys.stderr)
            continue
        if len(said) > cache.max_len:
            said = said[-max(cache.max_len // 2, 1) :]
            cache.reset()
        began = time.perf_counter()
        new = stream(sampler, sampler.tokens([said], cache=cache))
        seconds += time.perf_counter() - began
        made += len(new)
        said = (said + new)[-(cache.pos + 1) :]
    return made, seconds or 1.0


if __name__ == "__main__":
    run_script(main)
