"""One training iteration of every attention, beside MHA's with the same positions."""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn

from model import GPT, GPTConfig
from nanomla.cache import dtype_name
from nanomla.optim import make_optimizers
from tools.bench import comparison
from tools.bench.timing import Rows, Timed, alternate, table
from train import TrainConfig


def measure(device: str, rounds: int, vs_hf: bool) -> Rows:
    """nanoGPT's CPU size, then the width of its baby GPT in two precisions."""
    small = GPTConfig(64, 65, n_layer=4, n_head=4, n_embd=128, bias=False)
    wide = GPTConfig(256, 65, n_layer=6, n_head=6, n_embd=384, bias=False)
    rows = iteration(device, rounds * 3, small, 12, torch.float32, vs_hf)
    for dtype in (torch.float32, torch.bfloat16):
        rows += iteration(device, max(rounds // 2, 3), wide, 8, dtype, vs_hf)
    return rows


def variants(base: GPTConfig) -> dict[str, GPTConfig]:
    """All that is timed, by name."""
    latent = {"use_mla": True, "mla_latent_dim": base.n_embd // 4}
    svd = {"use_svd": True, "svd_rank": base.hs // 2}
    rotary = {"pos_emb": "rope"}
    decoupled = latent | rotary | {"mla_rope_dim": 16}
    slots = {"use_latent_tokens": True, "n_latent_tokens": 16}
    settings = {
        "MHA": {},
        "MHA + SVD": svd,
        "MQA": {"n_kv_head": 1},
        "MLA": latent,
        "MLA + SVD": latent | svd,
        "MHA, rotary": rotary,
        "MQA, rotary": {"n_kv_head": 1} | rotary,
        "MLA, rotary": decoupled,
        "MLA + SVD, rotary": decoupled | svd,
        "MLA, rotary latent": latent | rotary | {"mla_rope": "latent"},
        "16 latent tokens": slots,
    }
    return {name: dataclasses.replace(base, **changes) for name, changes in settings.items()}


def iteration(
    device: str, rounds: int, base: GPTConfig, B: int, dtype: torch.dtype, vs_hf: bool
) -> Rows:
    """Forward, backward, clipping and AdamW on one batch, for every variant."""
    T = base.block_size
    kind = device.partition(":")[0]
    x, y = torch.randint(65, (2, B, T), device=device)

    def iterate(
        loss_of: Callable[[], Tensor], model: nn.Module, optimizers: list[torch.optim.Optimizer]
    ) -> None:
        with torch.autocast(kind, dtype, enabled=dtype != torch.float32):
            loss = loss_of()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    entries = []
    parameters = {}
    for name, config in variants(base).items():
        model = GPT(config).to(device)
        parameters[name] = model.get_num_params()
        optimizers = list(make_optimizers(model, TrainConfig(), kind).values())
        run = lambda m=model, o=optimizers: iterate(lambda: m(x, y)[1], m, o)
        entries.append(Timed(name, run))
    if vs_hf:
        name = "transformers GPT2LMHeadModel"
        loss_of, theirs, adamw = comparison.gpt2_training(base, x, y)
        parameters[name] = theirs.num_parameters()
        entries.append(Timed(name, lambda: iterate(loss_of, theirs, [adamw])))
    took = alternate(entries, rounds, device)
    rows = []
    for e in entries:
        row = {"model": e.name, "parameters": f"{parameters[e.name]:,}"}
        row["ms/iteration"] = f"{e.seconds * 1e3:.1f}"
        row["tokens/s"] = f"{B * T / e.seconds:,.0f}"
        mha = took["MHA, rotary"] if "rotary" in e.name else took["MHA"]
        row["this / MHA of the same positions"] = f"{e.seconds / mha.seconds:.3f}"
        rows.append(row)
    size = f"{base.n_layer} layers, {base.n_embd} wide, batch {B} x {T}"
    return table(f"Training iteration, {size}, {dtype_name(dtype)}, AdamW", rows)
