"""One training iteration of every attention, beside MHA's with the same positions."""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn

from model import GPT, GPTConfig
from nanomla.optim import make_optimizers
from tools.bench import comparison
from tools.bench.timing import Rows, Timed, alternate, name_of, table
from train import TrainConfig


def measure(device: str, rounds: int, vs_hf: bool) -> Rows:
    """nanoGPT's CPU size, then the width of its baby GPT in two precisions."""
    small = GPTConfig(64, 65, n_layer=4, n_head=4, n_embd=128, bias=False)
    wide = GPTConfig(256, 65, n_layer=6, n_head=6, n_embd=384, bias=False)
    rows = iteration(device, rounds * 3, small, 12, torch.float32, vs_hf)
    for dtype in (torch.float32, torch.bfloat16):
        rows += iteration(device, max(rounds // 2, 3), wide, 8, dtype, vs_hf)
    return rows


def variants(base: GPTConfig) -> list[tuple[str, GPTConfig, str]]:
    """(name, config, the name of MHA with the same positions) of all that is timed."""
    latent = {"use_mla": True, "mla_latent_dim": base.n_embd // 4}
    svd = {"use_svd": True, "svd_rank": base.hs // 2}
    rotary = {"pos_emb": "rope"}
    decoupled = latent | rotary | {"mla_rope_dim": 16}
    slots = {"use_latent_tokens": True, "n_latent_tokens": 16}
    settings = [
        ("MHA", {}, "MHA"),
        ("MHA + SVD", svd, "MHA"),
        ("MQA", {"n_kv_head": 1}, "MHA"),
        ("MLA", latent, "MHA"),
        ("MLA + SVD", latent | svd, "MHA"),
        ("MHA, rotary", rotary, "MHA, rotary"),
        ("MQA, rotary", {"n_kv_head": 1} | rotary, "MHA, rotary"),
        ("MLA, rotary", decoupled, "MHA, rotary"),
        ("MLA + SVD, rotary", decoupled | svd, "MHA, rotary"),
        ("MLA, rotary latent", latent | rotary | {"mla_rope": "latent"}, "MHA, rotary"),
        ("16 latent tokens", slots, "MHA"),
    ]
    return [
        (name, dataclasses.replace(base, **changes), baseline)
        for name, changes, baseline in settings
    ]


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
    for name, config, baseline in variants(base):
        model = GPT(config).to(device)
        optimizers = list(make_optimizers(model, TrainConfig(), kind).values())
        run = lambda m=model, o=optimizers: iterate(lambda: m(x, y)[1], m, o)
        parameters = model.get_num_params()
        entries.append(Timed(name, run, baseline=baseline, parameters=parameters))
    if vs_hf:
        loss_of, theirs, adamw = comparison.gpt2_training(base, x, y)
        run = lambda: iterate(loss_of, theirs, [adamw])
        name = "transformers GPT2LMHeadModel"
        entries.append(Timed(name, run, baseline="MHA", parameters=theirs.num_parameters()))
    took = alternate(entries, rounds, device)
    rows = []
    for e in entries:
        row = {"model": e.name, "parameters": f"{e.parameters:,}"}
        row |= {"ms/iteration": f"{e.seconds * 1e3:.1f}", "tokens/s": f"{B * T / e.seconds:,.0f}"}
        ratio = e.seconds / took[e.baseline].seconds
        row["this / MHA of the same positions"] = f"{ratio:.3f}"
        rows.append(row)
    size = f"{base.n_layer} layers, {base.n_embd} wide, batch {B} x {T}"
    return table(f"Training iteration, {size}, {name_of(dtype)}, AdamW", rows)
