"""What reading a prompt takes: every attention, MLA in both of its forms."""

import functools

import torch

from model import GPT, GPTConfig
from tools.bench.timing import Rows, Timed, alternate, peak_bytes, table

FORMS = ("expanded", "absorbed")
LATENT = {"use_mla": True, "mla_latent_dim": 192}
GROUPED = {"use_mla": True, "mla_latent_dim": 48, "mla_groups": 4}
ROTARY = {"pos_emb": "rope", "mla_rope_dim": 32}
VARIANTS = {
    "MHA": {},
    "MLA": LATENT,
    "MLA, rotary 32": LATENT | ROTARY,
    "MLA, 4 groups": GROUPED,
    "MLA, 4 groups, rotary 32": GROUPED | ROTARY,
    "MLA, 12 groups": {"use_mla": True, "mla_latent_dim": 32, "mla_groups": 12},
    "MLA, rotary latent": LATENT | {"pos_emb": "rope", "mla_rope": "latent"},
    "64 latent tokens": {"use_latent_tokens": True, "n_latent_tokens": 64},
}


@torch.inference_mode()
def measure(device: str, rounds: int) -> Rows:
    """All tables; long prompts are timed in fewer rounds."""
    rows: Rows = []
    for T in (512, 1024, 2048, 4096, 8192):
        rows += prompt(device, T, min(rounds, max(2**13 // T, 2)))
    return rows


def prompt(device: str, T: int, rounds: int) -> Rows:
    """One layer, 768 wide, T tokens into an empty cache: MLA in both forms and which it chooses."""
    base = {"block_size": T, "vocab_size": 64, "n_layer": 1, "bias": False}
    x = torch.randn(1, T, 768, device=device)
    entries = []
    peaks = {}
    chosen_forms = {}  # by variant, "" for an attention of one form
    for name, settings in VARIANTS.items():
        model = GPT(GPTConfig(**base, **settings)).to(device).eval()
        attn = model.transformer.h[0].attn
        rotation = None
        if model.config.rotary_dim:
            rotation = (model.rope_cos, model.rope_sin)
        forward = functools.partial(attn, x, model.make_cache(1, T).layers[0], rotation)
        runs = {"": forward}
        chosen_forms[name] = ""
        if hasattr(attn, "absorbing_is_cheaper"):
            chosen_forms[name] = "absorbed" if attn.absorbing_is_cheaper(T, T) else "expanded"
            runs = {form: functools.partial(forward, absorb=form == "absorbed") for form in FORMS}
        for form, run in runs.items():
            entries.append(Timed(name + form, run))
            peaks[name + form] = peak_bytes(run, device)
    took = alternate(entries, rounds, device)
    rows = []
    for name, chosen in chosen_forms.items():
        ms = f"{took[name + chosen].seconds * 1e3:.1f}"
        row = {"attention": name, "ms": ms, "MB": f"{peaks[name + chosen] / 1e6:.1f}"}
        if chosen:
            for form in FORMS:
                row[f"{form}, ms"] = f"{took[name + form].seconds * 1e3:.1f}"
            for form in FORMS:
                row[f"{form}, MB"] = f"{peaks[name + form] / 1e6:.1f}"
            better = min(took[name + form].seconds for form in FORMS)
            row["chosen"] = chosen
            row["chosen / better"] = f"{took[name + chosen].seconds / better:.2f}"
        rows.append(row)
    return table(f"Prefill of {T:,} tokens, one layer, 12 heads of 64, batch 1, float32", rows)
