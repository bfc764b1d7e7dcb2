"""What a token costs in training, over the length of the text."""

import torch
from torch import Tensor, nn

from model import ATTENTION, GPTConfig
from nanomla.cache import dtype_name
from tools.bench.timing import Rows, Timed, alternate, table

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
SHAPE = {"block_size": LENGTHS[-1], "n_embd": 128, "n_head": 4, "bias": False}
CONFIGS = {
    "MHA": GPTConfig(**SHAPE),
    "16 latent tokens": GPTConfig(**SHAPE, use_latent_tokens=True, n_latent_tokens=16),
    "64 latent tokens": GPTConfig(**SHAPE, use_latent_tokens=True, n_latent_tokens=64),
}


def measure(device: str, rounds: int) -> Rows:
    """A table for every dtype."""
    rows: Rows = []
    for dtype in (torch.float32, torch.bfloat16):
        rows += one_layer(device, max(rounds // 3, 3), dtype)
    return rows


def one_layer(device: str, rounds: int, dtype: torch.dtype) -> Rows:
    """What a token costs in the forward and backward pass of one layer, over the length T."""
    layers = {name: ATTENTION[c.attention_name](c).to(device) for name, c in CONFIGS.items()}

    def train(layer: nn.Module, x: Tensor) -> None:
        for _ in range(max(4096 // x.size(1), 1)):  # short passes vary, so several are one run
            with torch.autocast(device.partition(":")[0], dtype, enabled=dtype != torch.float32):
                y = layer(x)
            y.float().square().mean().backward()
            layer.zero_grad(set_to_none=True)

    entries = []
    for T in LENGTHS:
        x = torch.randn(1, T, SHAPE["n_embd"], device=device, requires_grad=True)
        for name, layer in layers.items():
            run = lambda layer=layer, x=x: train(layer, x)
            entries.append(Timed(f"{name}, {T}", run, steps=max(T, 4096)))
    took = alternate(entries, rounds, device)
    us = {(name, T): took[f"{name}, {T}"].seconds * 1e6 for name in layers for T in LENGTHS}
    rows = []
    for T in LENGTHS:
        row = {"T": f"{T:,}"}
        for name in layers:
            row[f"{name}, us/token"] = f"{us[name, T]:.1f}"
        for name in layers:
            if name != "MHA":
                row[f"MHA / {name}"] = f"{us['MHA', T] / us[name, T]:.2f}"
        rows.append(row)
    row = {"T": "16,384 / 1,024"}
    for name in layers:
        row[f"{name}, us/token"] = f"{us[name, 16384] / us[name, 1024]:.2f}"
    rows.append(row)
    shape = "Forward and backward of one attention layer, 128 wide, 4 heads, batch 1"
    return table(f"{shape}, {dtype_name(dtype)}", rows)
