"""What reading a prompt takes: MLA in both of its forms, and long prompts in chunks."""

import dataclasses
import functools
import time
from collections.abc import Callable

import torch
from torch import Tensor

from model import GPT, GPTConfig
from nanomla.generate import PREFILL_CHUNK, next_logits
from tools.bench.timing import Rows, Timed, alternate, peak_bytes, table

FORMS = ["expanded", "absorbed"]


@torch.inference_mode()
def measure(device: str, rounds: int) -> Rows:
    """All tables; long prompts are timed in fewer rounds."""
    rows: Rows = []
    for T in (512, 1024, 2048, 4096, 8192):
        rows += prompt(device, T, min(rounds, max(2**13 // T, 2)))
    return rows + in_chunks(device, 32768, PREFILL_CHUNK)


def prompt(device: str, T: int, rounds: int) -> Rows:
    """One layer, 768 wide, T tokens into an empty cache: MLA in both forms and which it chooses."""
    base = {"block_size": T, "vocab_size": 64, "n_layer": 1, "bias": False}
    latent = {"use_mla": True, "mla_latent_dim": 192}
    grouped = {"use_mla": True, "mla_latent_dim": 48, "mla_groups": 4}
    rotary = {"pos_emb": "rope", "mla_rope_dim": 32}
    variants = {
        "MHA": {},
        "MLA": latent,
        "MLA, rotary 32": latent | rotary,
        "MLA, 4 groups": grouped,
        "MLA, 4 groups, rotary 32": grouped | rotary,
        "MLA, 12 groups": grouped | {"mla_latent_dim": 32, "mla_groups": 12},
        "MLA, rotary latent": latent | {"pos_emb": "rope", "mla_rope": "latent"},
        "64 latent tokens": {"use_latent_tokens": True, "n_latent_tokens": 64},
    }
    x = torch.randn(1, T, 768, device=device)
    peaks: dict[str, int] = {}

    def run(name: str, forward: Callable[[], Tensor]) -> None:
        if name in peaks:
            forward()
        else:  # in the round that warms up
            peaks[name] = peak_bytes(forward, device)

    entries = []
    chosen_forms = {}  # by variant, None for an attention of one form
    for name, settings in variants.items():
        model = GPT(GPTConfig(**base, **settings)).to(device).eval()
        attn = model.transformer.h[0].attn
        rotation = None
        if model.config.rotary_dim:
            rotation = (model.rope_cos, model.rope_sin)
        forward = functools.partial(attn, x, model.make_cache(1, T).layers[0], rotation)
        if not hasattr(attn, "absorbing_is_cheaper"):
            chosen_forms[name] = None
            entries.append(Timed(name, functools.partial(run, name, forward)))
            continue
        chosen_forms[name] = "absorbed" if attn.absorbing_is_cheaper(T, T) else "expanded"
        for form in FORMS:
            in_form = functools.partial(forward, absorb=form == "absorbed")
            entries.append(Timed(name + form, functools.partial(run, name + form, in_form)))
    took = alternate(entries, rounds, device)
    rows = []
    for name, chosen in chosen_forms.items():
        timed = name + (chosen or "")
        row = {"attention": name, "ms": f"{took[timed].seconds * 1e3:.1f}"}
        row["MB"] = f"{peaks[timed] / 1e6:.1f}"
        if chosen is not None:
            for form in FORMS:
                row[f"{form}, ms"] = f"{took[name + form].seconds * 1e3:.1f}"
            for form in FORMS:
                row[f"{form}, MB"] = f"{peaks[name + form] / 1e6:.1f}"
            better = min(took[name + form].seconds for form in FORMS)
            row |= {"chosen": chosen, "chosen / better": f"{took[timed].seconds / better:.2f}"}
        rows.append(row)
    return table(f"Prefill of {T:,} tokens, one layer, 12 heads of 64, batch 1, float32", rows)


def in_chunks(device: str, T: int, chunk: int) -> Rows:
    """
    A prompt of T tokens, at once and in chunks, through a block as wide as GPT-2's: what one pass
    takes, and the most memory that it needs besides weights and cache.
    """
    base = GPTConfig(block_size=T, n_layer=1, bias=False, pos_emb="rope")
    latent = {"use_mla": True, "mla_latent_dim": 160, "mla_rope_dim": 32}
    variants = {
        "MHA": {},
        "MLA, L = 160, rotary 32": latent,
        "MLA, rotary latent, L = 192": {
            "use_mla": True, "mla_latent_dim": 192, "mla_rope": "latent"
        },
    }  # fmt: skip
    idx = torch.randint(50257, (1, T), device=device)
    rows = []
    for name, settings in variants.items():
        model = GPT(dataclasses.replace(base, **settings)).to(device).eval()
        cache = model.make_cache(1, T)
        row = {"attention": name, "cache MB": f"{cache.nbytes / 1e6:.0f}"}
        for pieces, size in (("at once", None), (f"{chunk:,} tokens at a time", chunk)):
            read = functools.partial(next_logits, model, idx, cache, size, None)
            row[f"{pieces}, MB"] = f"{peak_bytes(read, device) / 1e6:.0f}"  # and warms up
            cache.truncate(0)
            began = time.perf_counter()
            float(read()[0, 0])  # waits for it
            row[f"{pieces}, s"] = f"{time.perf_counter() - began:.1f}"
            cache.truncate(0)
        rows.append(row)
    return table(f"A prompt of {T:,} tokens through one block, 768 wide, batch 1, float32", rows)
