"""
Claim: an SVD of the value activations inside forward compresses the values. (Some nanoGPT forks,
such as github.com/oktayozel/rSVD-implementation-for-LLMs.) In every forward pass the values V
(T, hs) of a head, those of all T tokens of a sequence, are replaced by their best approximation of
rank R, U_R S_R V_R^T with the R largest singular values.

Finding: it is neither causal nor cacheable, slower, and no better. The subspace V_R depends on all
T tokens, so each token sees those after it: with R = 16 of 32 another last token changes earlier
logits by up to 0.207, and the loss of whole windows is 1.977, token by token 1.978. The subspace
turns with every new token, so coordinates in it cannot be cached. The layer takes 3.4 times as
long. This project's use_svd is another thing, as its subspace belongs to the weights: a loss of
1.941, and no leak. (The works of Shakespeare, 2 layers, 128 wide, 400 iterations, one seed.)

    python -m experiments.svd_forward --max_iters=400

The best approximation is also V P with P the projector on the span of V_R, which torch.linalg.eigh
finds from V^T V in 2.1 times the layer's time. The models are trained with V P, and P is taken as a
constant in the backward pass: the derivative of singular vectors divides by differences of squared
singular values and is not finite where two are equal.
"""

import dataclasses
import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.training import (
    SHAPE,
    Experiment,
    start,
    time_layers,
    title,
    train_block,
    with_attention,
)
from model import ATTENTION, GPT, GPTConfig
from nanomla.attention import Rotation
from nanomla.dataset import Dataset
from nanomla.errors import run_script
from tools.bench.timing import Rows, table

RANK = 16
INPUTS = ((12, 64), (1, 512))  # B and T that a layer is timed on
WINDOWS = 256  # of validation text that are decoded


def truncate(V: Tensor, rank: int) -> Tensor:
    """The best approximation of that rank of V (..., T, hs), by its SVD."""
    U, S, Vh = torch.linalg.svd(V, full_matrices=False)
    return (U[..., :rank] * S[..., None, :rank]) @ Vh[..., :rank, :]


def project(V: Tensor, rank: int) -> Tensor:
    """The same as V P. P is a constant in the backward pass, which is finite for every V."""
    with torch.no_grad():
        basis = torch.linalg.eigh(V.mT @ V)[1][..., -rank:]  # (..., hs, rank), largest last
    return V @ basis @ basis.mT


class SvdForwardAttention(ATTENTION["mla"]):
    """
    MLA that replaces every head's values of all T tokens by an approximation of their rank.

    x (B, T, C) -> (B, T, C). Every output depends on every token, through the subspace. Weights and
    their names are those of MLA. Raises ValueError for a cache: with every new token the values of
    all earlier tokens would change.
    """

    rank = RANK
    compress = staticmethod(project)

    def forward(self, x: Tensor, cache: None = None, rotation: Rotation = None) -> Tensor:
        if cache is not None:
            raise ValueError("cache must be None: a new token changes the values of all others")
        return super().forward(x, rotation=rotation, absorb=False)

    def _keys_and_values(self, c: Tensor, kr: Tensor) -> tuple[Tensor, Tensor]:
        k, v = super()._keys_and_values(c, kr)
        return k, self.compress(v, self.rank)  # v (B, nh, T, hs)


class BySvd(SvdForwardAttention):
    """The same by the SVD itself."""

    compress = staticmethod(truncate)


svd_forward_gpt = functools.partial(with_attention, SvdForwardAttention)


def main(argv: list[str] | None = None) -> None:
    """The command line; see the top of this file."""
    cfg, data, vocab_size = start(__name__, argv)
    torch.manual_seed(cfg.seed)
    size = "{n_embd} wide, {n_head} heads".format(**SHAPE)
    heading = f"Forward and backward of one MLA layer, {size}, R = {RANK}, float32"
    table(heading, time_layer(cfg.device))
    config = GPTConfig(vocab_size=vocab_size, **SHAPE, use_mla=True)
    low_rank = dataclasses.replace(config, use_svd=True, svd_rank=RANK)
    variants = {
        "MLA": (config, GPT),
        f"MLA, SVD in forward, R = {RANK}": (config, svd_forward_gpt),
        f"MLA, use_svd, R = {RANK}": (low_rank, GPT),
    }
    rows = []
    for name, (shape, build) in variants.items():
        model, row = train_block(name, shape, build, cfg, data)
        whole, decoded = decode(model, cfg, data)
        row |= {"whole windows": f"{whole:.3f}", "token by token": f"{decoded:.3f}"}
        rows.append(row | {"difference": f"{decoded - whole:.4f}"})
    table(title(cfg), rows)
    print(
        "\nleak: the largest change in the logits of earlier positions when the last token changes."
        f"\nThe last columns are the loss of {WINDOWS} windows, all positions: given the whole"
        "\nwindow at once, and given for each position the prefix that ends there."
    )


def time_layer(device: str) -> Rows:
    """MLA without and with the compression in two ways."""
    longest = max(T for _, T in INPUTS)
    config = GPTConfig(**{**SHAPE, "block_size": longest}, use_mla=True)
    layers = {
        "without": ATTENTION["mla"](config),
        "svd": BySvd(config),
        "projector": SvdForwardAttention(config),
    }
    rows = []
    for B, T in INPUTS:
        x = torch.randn(B, T, config.n_embd, device=device, requires_grad=True)
        seconds = time_layers(layers, x, device)
        row = {"batch": f"{B} x {T}", "decompositions": str(B * config.n_head)}
        row |= {f"{name}: ms": f"{seconds[name] * 1e3:.2f}" for name in layers}
        for name in ("svd", "projector"):
            row[f"{name} / without"] = f"{seconds[name] / seconds['without']:.1f}"
        rows.append(row)
    return rows


@torch.no_grad()
def decode(model: GPT, cfg: Experiment, data: Dataset) -> tuple[float, float]:
    """Validation loss of all positions: from one pass, and each from the prefix that ends there."""
    x, y = (t.to(cfg.device) for t in data.eval_batch("val", 0, 1, WINDOWS))  # (WINDOWS, T)
    whole = model(x, y)[1].item()
    losses = []
    for t in range(x.size(1)):
        logits, _ = model(x[:, : t + 1])  # (WINDOWS, 1, V), of position t
        losses.append(F.cross_entropy(logits[:, 0], y[:, t]))
    return whole, torch.stack(losses).mean().item()


if __name__ == "__main__":
    run_script(main)
