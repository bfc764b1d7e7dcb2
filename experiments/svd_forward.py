"""
An experiment: MLA whose values are compressed by an SVD inside forward.

    python -m experiments.svd_forward [--dataset=shakespeare_char]

It checks a claim about "MLA with SVD": that in every forward pass the values V (T, hs) of a head,
those of all T tokens of a sequence, are replaced by their best approximation of rank R,
U_R S_R V_R^T with the R largest singular values. The subspace V_R then depends on all T tokens, so
each token sees those after it, and it turns with every new token, so coordinates in it cannot be
cached. This project's use_svd is another thing: its subspace belongs to the weights.

The best approximation is also V P with P the projector on the span of V_R, which torch.linalg.eigh
finds from V^T V. The models are trained with V P, and P is taken as a constant in the backward
pass: the derivative of singular vectors divides by differences of squared singular values and is
not finite where two are equal.

The command times a layer with both ways beside the same layer without, trains a small GPT with each
attention, and prints the validation loss of whole windows and of tokens decoded one by one.
"""

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.three_step import SHAPE, ExperimentConfig, start, title, train_one
from model import ATTENTION, GPT, GPTConfig
from nanomla.attention import Rotation
from nanomla.checks import Count
from nanomla.dataset import Dataset
from nanomla.errors import run_script
from nanomla.settings import configure
from tools.bench.timing import Rows, Timed, alternate, table, write_json

INPUTS = ((12, 64), (1, 512))  # B and T that a layer is timed on
HEAD_SIZE = SHAPE["n_embd"] // SHAPE["n_head"]


@dataclass
class SvdForwardConfig(ExperimentConfig):
    """The settings of this experiment."""

    headings: ClassVar[dict[str, str]] = {**ExperimentConfig.headings, "rank": "svd"}

    rank: Annotated[Count, "The number of singular values (R) that are kept of a head."] = 16
    windows: Annotated[Count, "The number of validation windows that are decoded."] = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank > HEAD_SIZE:
            works = f"rank must be at most the head size {HEAD_SIZE}"
            raise ValueError(f"rank={self.rank} does not work: {works}")


def main(argv: list[str] | None = None) -> None:
    """The command line; see the top of this file."""
    cfg, _ = configure(SvdForwardConfig, sys.argv[1:] if argv is None else argv)
    measure(cfg)


def measure(cfg: SvdForwardConfig) -> Rows:
    """The whole experiment: prints its tables, writes cfg.json and returns the rows."""
    data, device = start(cfg)
    rows = time_layer(cfg, device) + train_each(cfg, data, device)
    if cfg.json:
        write_json(cfg.json, device, rows)
    return rows


# ---- the attention
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
    MLA that replaces every head's values of all T tokens by compress(values, rank).

    x (B, T, C) -> (B, T, C). Every output depends on every token, through the subspace. Weights and
    their names are those of MLA. Raises ValueError for a cache: with every new token the values of
    all earlier tokens would change.
    """

    def __init__(
        self,
        config: GPTConfig,
        layer: int,
        rank: int,
        compress: Callable[[Tensor, int], Tensor] = project,
    ) -> None:
        super().__init__(config, layer)
        self.rank = rank
        self.compress = compress

    def forward(self, x: Tensor, cache: None = None, rotation: Rotation = None) -> Tensor:
        if cache is not None:
            raise ValueError("cache must be None: a new token changes the values of all others")
        return super().forward(x, rotation=rotation, absorb=False)

    def _keys_and_values(self, c: Tensor, kr: Tensor) -> tuple[Tensor, Tensor]:
        k, v = super()._keys_and_values(c, kr)
        return k, self.compress(v, self.rank)  # v (B, nh, T, hs)


def svd_forward_gpt(config: GPTConfig, rank: int) -> GPT:
    """A GPT with this attention, which starts from the weights of GPT(config)."""
    model = GPT(config)
    for i, block in enumerate(model.transformer.h):
        attention = SvdForwardAttention(config, i, rank)
        attention.load_state_dict(block.attn.state_dict())
        block.attn = attention
    return model


# ---- (a) what it costs
def time_layer(cfg: SvdForwardConfig, device: str) -> Rows:
    """Forward and backward of one layer, MLA without and with the compression in two ways."""
    torch.manual_seed(cfg.seed)
    longest = max(T for _, T in INPUTS)
    config = GPTConfig(**SHAPE | {"block_size": longest, "n_layer": 1}, use_mla=True)
    layers = {"without": ATTENTION["mla"](config)}
    for name, compress in (("svd", truncate), ("projector", project)):
        layers[name] = SvdForwardAttention(config, 0, cfg.rank, compress)
    rows = []
    for B, T in INPUTS:
        x = torch.randn(B, T, config.n_embd, device=device, requires_grad=True)
        entries = []
        for name, layer in layers.items():
            layer.to(device)
            entries.append(Timed(name, lambda layer=layer, x=x: layer(x).sum().backward()))
        took = alternate(entries, cfg.rounds, device)
        row = {"batch": f"{B} x {T}", "decompositions": str(B * config.n_head)}
        row |= {f"{name}: ms": f"{entry.seconds * 1e3:.2f}" for name, entry in took.items()}
        for name in list(layers)[1:]:
            row[f"{name} / without"] = f"{took[name].seconds / took['without'].seconds:.1f}"
        rows.append(row)
    what = f"{config.n_embd} wide, {config.n_head} heads, R = {cfg.rank}, float32"
    return table(f"Forward and backward of one MLA layer, {what}", rows)


# ---- (b) what it does to a causal language model
def train_each(cfg: SvdForwardConfig, data: Dataset, device: str) -> Rows:
    """Train a GPT with MLA, with the SVD in forward, and with use_svd; print losses and leaks."""
    config = GPTConfig(vocab_size=data.vocab_size or 50304, **SHAPE, use_mla=True)
    low_rank = dataclasses.replace(config, use_svd=True, svd_rank=cfg.rank)
    makers = {
        "MLA": lambda: GPT(config),
        f"MLA, SVD in forward, R = {cfg.rank}": lambda: svd_forward_gpt(config, cfg.rank),
        f"MLA, use_svd, R = {cfg.rank}": lambda: GPT(low_rank),
    }
    rows = []
    for name, make in makers.items():
        model, row = train_one(name, make, cfg, data, device)
        whole, decoded = decode(model, data, device, cfg.windows)
        row |= {"whole windows": f"{whole:.3f}", "token by token": f"{decoded:.3f}"}
        rows.append(row | {"difference": f"{decoded - whole:.4f}"})
    rows = table(title(cfg), rows)
    print(
        "\nleak: the largest change in the logits of earlier positions when the last token changes."
        f"\nThe last columns are the loss of {cfg.windows} windows, all positions: given the"
        "\nwhole window at once, and given for each position the prefix that ends there."
    )
    return rows


@torch.no_grad()
def decode(model: GPT, data: Dataset, device: str, windows: int) -> tuple[float, float]:
    """Validation loss of all positions: from one pass, and each from the prefix that ends there."""
    x, y = (t.to(device) for t in data.eval_batch("val", 0, 1, windows))  # (windows, T)
    whole, losses = model(x, y)[1].item(), []
    for t in range(x.size(1)):
        logits, _ = model(x[:, : t + 1])  # (windows, 1, V), of position t
        losses.append(F.cross_entropy(logits[:, 0], y[:, t]))
    return whole, torch.stack(losses).mean().item()


if __name__ == "__main__":
    run_script(main)
