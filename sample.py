"""
Continue a text with a trained model, decoding on its compressed latent cache.

    python sample.py --out_dir=out-mla --start="ROMEO:" --temperature=0.8
    python sample.py --out_dir=out-mla --start=FILE:prompt.txt --num_samples=3
    python sample.py --init_from=gpt2 --start="The answer is"

One sample streams to stdout as it is made; several follow one another, between lines of dashes.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch

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
    num_samples: Annotated[int, "how many to draw"] = 1
    max_new_tokens: Annotated[int, "tokens per sample"] = 500
    temperature: Annotated[float, "1: as the model predicts, lower: safer, 0: greedy"] = 0.8
    top_k: Annotated[int | None, "keep the k likeliest tokens only; None or 0: all"] = 200
    top_p: Annotated[float | None, "keep the likeliest tokens that make up this probability; None: all"] = None
    seed: Annotated[int, "of the draws"] = 1337
    device: Annotated[str, "auto, cpu, cuda, cuda:1, mps"] = "auto"
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], "of the weights; auto: bfloat16 on CUDA, else float32"
    ] = "auto"
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
        if self.svd_rank is not None and not self.use_svd:
            raise ValueError("svd_rank without use_svd has no effect; add --use_svd=True")


def main(argv: list[str] | None = None) -> None:
    cfg, _ = configure(SampleConfig, sys.argv[1:] if argv is None else argv)
    text = read_prompt(cfg.start)
    device = resolve_device(cfg.device)
    model, tokenizer = open_run(cfg)
    prompt = tokenizer.encode(text)
    if len(prompt) > model.config.block_size:
        raise UserError(f"the prompt has {len(prompt)} tokens, the model's context {model.config.block_size}; shorten it")
    bf16 = device.startswith("cuda") and torch.cuda.is_bf16_supported()
    dtype = getattr(torch, ("bfloat16" if bf16 else "float32") if cfg.dtype == "auto" else cfg.dtype)
    model.to(device, dtype).eval()

    idx = torch.tensor([prompt], device=device).expand(cfg.num_samples, -1)
    generator = torch.Generator(device).manual_seed(cfg.seed)
    began = time.perf_counter()
    tokens = model.generate(
        idx, cfg.max_new_tokens, cfg.temperature, cfg.top_k, cfg.top_p, generator=generator, stream=True
    )
    made = write_one(tokens, text, tokenizer) if cfg.num_samples == 1 else write_several(tokens, text, tokenizer)
    rate = made / (time.perf_counter() - began)
    cache = model.make_cache(1, 1, dtype)
    print(
        f"{rate:,.0f} tokens/s on {device} in {str(dtype).removeprefix('torch.')}; cache: {cache.bytes_per_token:,} bytes "
        f"per token, {model.get_memory_savings(1):.3g}x smaller than MHA's",
        file=sys.stderr,
    )


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


def write_one(tokens, text: str, tokenizer: Tokenizer) -> int:
    """Stream one sample to stdout; returns how many tokens were made."""
    decoder, made = StreamDecoder(tokenizer), 0
    sys.stdout.write(text)
    for token in tokens:
        sys.stdout.write(decoder.push(int(token)))
        sys.stdout.flush()
        made += 1
    print(decoder.finish(), flush=True)
    return made


def write_several(tokens, text: str, tokenizer: Tokenizer) -> int:
    """Print samples drawn side by side, between dashes; returns how many tokens were made."""
    rows = torch.cat(list(tokens), dim=1).tolist()
    for row in rows:
        print(text + tokenizer.decode(row) + "\n---------------")
    return sum(map(len, rows))


if __name__ == "__main__":
    run_script(main)
