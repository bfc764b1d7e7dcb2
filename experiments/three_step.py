"""
Claim: a block of three steps, tokens -> m latents -> tokens, costs O(T m) instead of O(T^2)
(Perceiver, arXiv:2103.03206) and can replace the attention of a GPT (a common reading of "latent
attention"; not the paper's).

1. m learned latent queries attend over all T tokens (cross-attention).
2. The m latents attend to each other.
3. The T tokens attend to the m latents (cross-attention back; Perceiver IO, arXiv:2107.14795).

Finding: the cost holds. At 8,192 tokens, on two cores of a Xeon, the block of 16 latents is 12.9
times faster than causal self-attention, with 64 latents 9.9 times; at 256 tokens it gains little.

As a causal model it fails. Every latent has seen all tokens, so each token sees those after it: a
GPT with 32 latents learns to copy its targets out of its input. Where the target is not in the
input, at the last position, its loss is 3.244 beside causal attention's 1.738. Another last token
changes the logits of earlier positions by up to 3.3. (The works of Shakespeare, 2 layers, 128 wide,
800 iterations, one seed.) The block is bidirectional and has no cache, and is therefore not an
attention that a GPTConfig offers.

    python -m experiments.three_step --max_iters=800
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.training import SHAPE, start, time_layers, title, train_block, with_attention
from model import ATTENTION, GPT, GPTConfig
from nanomla.errors import run_script
from tools.bench.timing import Rows, table

LATENTS = 32  # of the trained block
TIMED_LATENTS = (16, 64)
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)


class CrossAttention(nn.Module):
    """
    Attention of x (B, T, C) over all of source (B, S, C), without a mask: (B, T, C).

    n_head must divide n_embd (C).
    """

    def __init__(self, n_embd: int, n_head: int) -> None:
        super().__init__()
        self.n_head = n_head
        self.q_proj = nn.Linear(n_embd, n_embd, bias=False)
        self.kv_proj = nn.Linear(n_embd, 2 * n_embd, bias=False)
        self.c_proj = nn.Linear(n_embd, n_embd, bias=False)

    def forward(self, x: Tensor, source: Tensor) -> Tensor:
        k, v = self.kv_proj(source).chunk(2, dim=-1)
        q = self._heads(self.q_proj(x))
        y = F.scaled_dot_product_attention(q, self._heads(k), self._heads(v))  # (B, nh, T, hs)
        return self.c_proj(y.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.n_head, -1)).transpose(1, 2)


class ThreeStepAttention(nn.Module):
    """
    Tokens -> m learned latents -> tokens, in the place of a GPT block's attention.

    x (B, T, C) -> (B, T, C). Every output depends on every token. Steps 1 and 2 add to the latents,
    and every step reads them through a norm, as in the Perceiver (arXiv:2103.03206, figure 1).
    The arguments cache and rotation are those of a GPT's attention. Raises ValueError for a cache:
    with every new token the outputs of all earlier tokens would change.
    """

    def __init__(self, n_embd: int, n_head: int, n_latents: int) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(n_latents, n_embd) * 0.02)
        self.read, self.mix, self.write = (CrossAttention(n_embd, n_head) for _ in range(3))
        self.norm_1, self.norm_2, self.norm_3 = (nn.LayerNorm(n_embd) for _ in range(3))

    def new_cache(self, batch_size: int, max_len: int, dtype=torch.float32, device="cpu") -> None:
        raise ValueError("cache must be None: a bidirectional block cannot keep one")

    def forward(self, x: Tensor, cache: None = None, rotation: None = None) -> Tensor:
        z = self.latents.expand(x.size(0), -1, -1)  # (B, m, C)
        z = z + self.read(self.norm_1(z), x)
        inner = self.norm_2(z)
        z = z + self.mix(inner, inner)
        return self.write(x, self.norm_3(z))


def three_step_gpt(config: GPTConfig) -> GPT:
    """A GPT of this shape whose every attention is a three-step block."""
    block = lambda config, _: ThreeStepAttention(config.n_embd, config.n_head, LATENTS)
    return with_attention(block, config)


def main(argv: list[str] | None = None) -> None:
    """The command line; see the top of this file."""
    cfg, data, vocab_size = start(__name__, argv)
    torch.manual_seed(cfg.seed)
    size = "{n_embd} wide, {n_head} heads".format(**SHAPE)
    heading = f"Forward and backward of one layer, {size}, batch 1, float32"
    table(f"{heading}; scores are those that one head needs", time_block(cfg.device))
    config = GPTConfig(vocab_size=vocab_size, **SHAPE)
    _, causal = train_block("causal self-attention", config, GPT, cfg, data)
    _, block = train_block(f"three steps, m = {LATENTS}", config, three_step_gpt, cfg, data)
    table(title(cfg), [causal, block])
    print(
        "\nAt the last position the target is not in the input; at all others it is. leak: the\n"
        "largest change in the logits of earlier positions when the last token changes."
    )


def time_block(device: str) -> Rows:
    """Causal self-attention and the block at each length."""
    C = SHAPE["n_embd"]
    layers = {"causal": ATTENTION["mha"](GPTConfig(**{**SHAPE, "block_size": max(LENGTHS)}))}
    for m in TIMED_LATENTS:
        layers[f"m = {m}"] = ThreeStepAttention(C, SHAPE["n_head"], m)
    rows = []
    for T in LENGTHS:
        row = {"T": f"{T:,}", "causal: scores": f"{T * (T + 1) // 2:,}"}
        for m in TIMED_LATENTS:
            row[f"m = {m}: scores"] = f"{T * m + m * m + T * m:,}"  # of steps 1, 2 and 3
        x = torch.randn(1, T, C, device=device, requires_grad=True)
        for name, seconds in time_layers(layers, x, device).items():
            row[f"{name}: ms"] = f"{seconds * 1e3:.2f}"
        rows.append(row)
    return rows


if __name__ == "__main__":
    run_script(main)
