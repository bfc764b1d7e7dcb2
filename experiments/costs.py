"""
What latent attention costs: claims, and what was found for models of 6 layers, 768 wide, in
float32, beside MHA (on two cores of an AMD EPYC; docs/claims.md has all figures and the sources).

- Half a head of latent per head saves 20 to 50% of attention's parameters and makes the cache 2 to
  4 times smaller. Found, with L = 384: 12% (18% with a rotary key of 32), 4.0 (3.7) times.
- A latent of nh hs / 8 saves 44% of the parameters. Found, with L = 96: 41%, and 53% with low-rank
  queries.
- MLA decodes 1.5 to 2 times faster. Found, at 1,024 tokens and batch 1, where weights are what is
  read: 1.08 times (L = 160 + 32), 1.32 times (L = 96).
- MLA has 8 times the throughput at equal memory. Found, in 256 MB of cache: 8 times the batch, but
  2.60 times the tokens/s (L = 160 + 32), as arithmetic bounds the batch; 4.28 times with L = 96.
- 64 latent tokens do 16 times less arithmetic at 1,024 tokens. Found: 4 times, as a causal query
  meets half the keys and slots are read and written; and 25% more attention parameters.

    python -m experiments.costs
"""

import torch

from experiments.training import start
from model import GPT, GPTConfig
from nanomla import costs
from nanomla.errors import run_script
from tools.bench.decode import decoding
from tools.bench.timing import alternate, table

CONTEXT = 1024
BUDGET = 256  # MB of all caches of a batch together
SHAPE = {"n_layer": 6, "n_head": 12, "n_embd": 768, "block_size": CONTEXT, "bias": False}
LATENT = {"use_mla": True, "mla_latent_dim": 96}
ROPE = {"pos_emb": "rope"}
VARIANTS = {
    "MHA": ROPE,
    "GQA 3 key/value heads": {**ROPE, "n_kv_head": 3},
    "MQA": {**ROPE, "n_kv_head": 1},
    "MLA L=384": {"use_mla": True, "mla_latent_dim": 384},
    "MLA L=384 r=32": {**ROPE, "use_mla": True, "mla_latent_dim": 384, "mla_rope_dim": 32},
    "MLA L=96": LATENT,
    "MLA L=96 low-rank queries": {**LATENT, "mla_q_latent_dim": 192},
    "MLA L=160 r=32": {**ROPE, "use_mla": True, "mla_latent_dim": 160, "mla_rope_dim": 32},
    "MLA rotary latent L=192": {
        **ROPE, "use_mla": True, "mla_latent_dim": 192, "mla_rope": "latent",
    },
    "64 latent tokens": {"use_latent_tokens": True, "n_latent_tokens": 64},
}


def main(argv: list[str] | None = None) -> None:
    """The command line; see the top of this file."""
    cfg, _, vocab_size = start(__name__, argv)
    shape = {**SHAPE, "vocab_size": vocab_size}
    configs = {name: GPTConfig(**{**shape, **settings}) for name, settings in VARIANTS.items()}
    count(configs)
    time_decoding(configs, cfg.device)


def count(configs: dict[str, GPTConfig]) -> None:
    """Attention parameters, cache and the arithmetic of attention, beside the first's."""
    rows = []
    first = None
    for name, config in configs.items():
        model = costs.on_meta(config)
        attn = model.transformer.h[0].attn
        parameters = sum(p.numel() for p in attn.parameters())
        cached = costs.cached_numbers(model)
        weights = sum(p.numel() for p in attn.parameters() if p.dim() > 1)
        # a query meets half of a context's keys on average
        products = attn.flops_per_key(False) / 2 * CONTEXT / 2
        products += attn.flops_per_token(False) / 2 - weights
        if first is None:
            first = (parameters, cached, products)
        row = {"variant": name, "attention parameters a layer": f"{parameters:,}"}
        row["fewer"] = f"{1 - parameters / first[0]:.0%}"
        row["cached numbers"] = "a state"
        row["smaller"] = ""
        if cached:
            row["cached numbers"] = f"{cached:g}"
            row["smaller"] = f"{first[1] / cached:.3g}x"
        row[f"products per token at {CONTEXT:,} tokens"] = f"{products:,.0f}"
        row["less"] = f"{first[2] / products:.3g}x"
        rows.append(row)
    table("Counted", rows)


@torch.inference_mode()
def time_decoding(configs: dict[str, GPTConfig], device: str) -> None:
    """Tokens/s at batch 1, and with the largest batch whose caches fit the budget, in turn."""
    batches = []
    alone = []
    batched = []
    for name, config in configs.items():
        model = GPT(config).to(device).eval()
        batch = max(BUDGET * 2**20 // model.make_cache(1, CONTEXT).nbytes, 1)
        batches.append(batch)
        alone.append(decoding(name, model, 1, CONTEXT, CONTEXT, 4))
        batched.append(decoding(f"{name}, batched", model, batch, CONTEXT, CONTEXT, 4))
    alternate([*alone, *batched], 7, device)
    rows = []
    for batch, one, many in zip(batches, alone, batched, strict=True):
        rate = batch / many.seconds
        row = {"variant": one.name, "tokens/s, batch 1": f"{1 / one.seconds:.1f}"}
        row["faster"] = f"{alone[0].seconds / one.seconds:.2f}x"
        row["largest batch"] = str(batch)
        row["tokens/s with it"] = f"{rate:.1f}"
        row["more"] = f"{rate * batched[0].seconds / batches[0]:.2f}x"
        rows.append(row)
    heading = f"Decoding at {CONTEXT:,} tokens, float32; batches whose caches fit {BUDGET} MB"
    table(heading, rows)


if __name__ == "__main__":
    run_script(main)
