"""
The optimizers of a run (AdamW, or AdamW and Muon), their state in checkpoints, learning rates.

`cfg` is train.py's TrainConfig or any object with the fields that a function reads.
make_optimizers reads optimizer, learning_rate, weight_decay, beta1, beta2, muon_learning_rate and
muon_weight_decay. lr_factor reads decay_lr, learning_rate, min_lr, warmup_iters, decay_shape,
wsd_decay, lr_decay_iters and max_iters.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nanomla.distributed import load_optimizer_state
from nanomla.settings import UserError

Optimizers = dict[str, torch.optim.Optimizer]  # "adamw" and, with Muon, "muon"


def lr_factor(cfg: Any, it: int) -> float:
    """
    The learning rate at iteration `it`, as a share of the highest.

    It rises linearly for warmup_iters, falls to min_lr at lr_decay_iters, and stays. decay_shape
    "cosine" falls from the end of the warm-up on. "wsd" (warm-up, stable, decay; MiniCPM,
    arXiv:2404.06395) stays at the highest rate and falls linearly in the last share wsd_decay.
    """
    if not cfg.decay_lr:
        return 1.0
    start, end = decay_range(cfg)
    default = cfg.min_lr is None or cfg.learning_rate == 0
    lowest = 0.1 if default else cfg.min_lr / cfg.learning_rate
    if it < cfg.warmup_iters:
        return (it + 1) / (cfg.warmup_iters + 1)
    if it >= end:
        return lowest
    if it < start:
        return 1.0
    ratio = (it - start) / (end - start)
    left = 1 - ratio if cfg.decay_shape == "wsd" else 0.5 * (1 + math.cos(math.pi * ratio))
    return lowest + left * (1 - lowest)


def decay_range(cfg: Any) -> tuple[float, int]:
    """The iterations where the learning rate begins to fall and where it has become the lowest."""
    end = cfg.max_iters if cfg.lr_decay_iters is None else cfg.lr_decay_iters
    if cfg.decay_shape == "cosine":
        return cfg.warmup_iters, end
    return max(cfg.warmup_iters, (1 - cfg.wsd_decay) * end), end


def lowest_point(rates: Sequence[float], losses: Sequence[float]) -> float:
    """
    The rate where a parabola through the lowest loss and its neighbours, over log(rate), is lowest.

    rates: ascending. losses: infinite for a run that diverged. Two losses that are at least as high
    as the one between them have that minimum between their rates. A lowest loss without a neighbour
    on one side gives its own rate. Raises UserError if all runs diverged.
    """
    if math.isinf(min(losses)):
        raise UserError("all runs diverged; try lower learning rates, or dtype=float32")
    i = min(range(len(losses)), key=losses.__getitem__)
    if i in (0, len(losses) - 1):
        return rates[i]
    x = [math.log(rate) for rate in rates[i - 1 : i + 2]]
    y = [min(loss, 1e6) for loss in losses[i - 1 : i + 2]]  # a parabola through infinity is none
    # The slope of a parabola between two points is its derivative halfway, which is a line.
    falls, rises = (y[1] - y[0]) / (x[1] - x[0]), (y[2] - y[1]) / (x[2] - x[1])
    share = falls / (falls - rises) if falls < 0 else 0.5
    return math.exp((x[0] + x[1] + share * (x[2] - x[0])) / 2)


def make_optimizers(model: nn.Module, cfg: Any, device_type: str) -> Optimizers:
    """
    The optimizers of a model's trainable parameters, by name.

    'adamw' groups them as nanoGPT does: weight decay on tensors of two or more dimensions only.
    With cfg.optimizer == "muon", 'muon' takes the blocks' 2-D weights and 'adamw' the rest (Muon:
    kellerjordan.github.io/posts/muon; its steps are scaled to AdamW's root mean square as in
    arXiv:2502.16982). Every group has a highest_lr, which set_learning_rates scales.
    """
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    in_muon = {n for n, p in named if cfg.optimizer == "muon" and p.dim() == 2 and ".h." in n}
    rest = [p for n, p in named if n not in in_muon]
    groups = [
        {"params": [p for p in rest if p.dim() >= 2], "weight_decay": cfg.weight_decay},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas, fused = (cfg.beta1, cfg.beta2), device_type in ("cuda", "cpu")
    optimizers: Optimizers = {
        "adamw": torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=betas, fused=fused)
    }
    if in_muon:
        optimizers["muon"] = torch.optim.Muon(
            [p for n, p in named if n in in_muon],
            lr=cfg.muon_learning_rate,
            weight_decay=cfg.muon_weight_decay,
            adjust_lr_fn="match_rms_adamw",
        )
    for name, optimizer in optimizers.items():
        for group in optimizer.param_groups:
            muon = name == "muon"
            group["highest_lr"] = cfg.muon_learning_rate if muon else cfg.learning_rate
    return optimizers


def set_learning_rates(optimizers: Optimizers, factor: float) -> None:
    """Give every parameter group this share of its highest learning rate."""
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            group["lr"] = factor * group["highest_lr"]


def optimizer_state(optimizers: Optimizers) -> dict[str, Any]:
    """AdamW's state dict, as nanoGPT saves it; with Muon, the state dicts of both by name."""
    states = {name: optimizer.state_dict() for name, optimizer in optimizers.items()}
    return states if len(states) > 1 else states["adamw"]


def restore_optimizers(optimizers: Optimizers, state: dict[str, Any], source: str | Path) -> None:
    """
    Load what optimizer_state gave. The groups keep this run's settings, such as weight decay.

    source: what messages call the checkpoint. Raises UserError if the state belongs to other
    optimizers or to another model.
    """
    states = state if "adamw" in state else {"adamw": state}
    if states.keys() != optimizers.keys():
        raise UserError(
            f"{source} was trained with {' + '.join(states)}, this run uses "
            f"{' + '.join(optimizers)}; give the same --optimizer, or start a new run from these "
            "weights with --init_from=PATH"
        )
    for name, optimizer in optimizers.items():
        groups = optimizer.param_groups
        settings = [{k: v for k, v in group.items() if k != "params"} for group in groups]
        try:
            _check_shapes(optimizer, states[name])
            load_optimizer_state(optimizer, states[name])
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            what = f"its optimizer state does not fit this model ({error})"
            raise UserError(f"{source}: {what}") from None
        for group, own in zip(optimizer.param_groups, settings, strict=True):
            group.update(own)


def _check_shapes(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Raise ValueError for a state of another shape; torch would find it in the first step only."""
    for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        for key, value in state["state"].get(i, {}).items():
            if torch.is_tensor(value) and value.dim() and value.shape != p.shape:
                shapes = f"{tuple(value.shape)}, expected {tuple(p.shape)}"
                raise ValueError(f"{key} of parameter {i} has shape {shapes}")
