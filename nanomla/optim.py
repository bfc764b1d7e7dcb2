"""The optimizers of a run (AdamW, or AdamW and Muon), their state in checkpoints, its rates."""

import math
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from model import Attention
from nanomla.distributed import full, load_optimizer_state, sharded_like
from nanomla.errors import UserError
from nanomla.files import one_line

Optimizers = dict[str, torch.optim.Optimizer]  # "adamw" and, with Muon, "muon"
# A TrainConfig, or what has the same settings. train.py declares it, so that its settings are read
# where its loop is, and nothing here can import that.
Settings = Any


def lr_factor(cfg: Settings, it: int) -> float:
    """
    The learning rate at iteration `it`, as a share of the highest.

    It rises linearly for warmup_iters, falls to min_lr at lr_decay_iters, and stays. decay_shape
    "cosine" falls from the end of the warm-up on. "wsd" (warm-up, stable, decay; MiniCPM,
    arXiv:2404.06395) stays at the highest rate and falls linearly in the last share wsd_decay.
    """
    if not cfg.decay_lr:
        return 1.0
    start, end = decay_range(cfg)
    lowest = 0.1
    if cfg.min_lr is not None and cfg.learning_rate:
        lowest = cfg.min_lr / cfg.learning_rate
    if it < cfg.warmup_iters:
        return (it + 1) / (cfg.warmup_iters + 1)
    if it >= end:
        return lowest
    if it < start:
        return 1.0
    ratio = (it - start) / (end - start)
    if cfg.decay_shape == "wsd":
        height = 1 - ratio
    else:
        height = 0.5 * (1 + math.cos(math.pi * ratio))
    return lowest + height * (1 - lowest)  # height falls from 1 to 0


def decay_range(cfg: Settings) -> tuple[float, int]:
    """The iterations where the learning rate begins to fall and where it has become the lowest."""
    end = cfg.lr_decay_iters
    if end is None:
        end = cfg.max_iters
    if cfg.decay_shape == "cosine":
        return cfg.warmup_iters, end
    return max(cfg.warmup_iters, (1 - cfg.wsd_decay) * end), end


# Coefficients (a, b, c) of odd polynomials a x + b x^3 + c x^5, applied one after the other. Each
# has the least largest distance from 1 over the interval that the one before makes of [0.01, 1];
# after the last, it is 0.27. (Arxiv:2505.16932 shows that the greedy choice is the best.)
POLYNOMIALS = (
    (8.0934, -23.6204, 17.4462),
    (3.6366, -2.7219, 0.5365),
    (2.6613, -1.9772, 0.4526),
)


@torch.no_grad()
def orthogonalise(X: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """
    The matrices of X (b, m, n), m <= n, with all singular values moved towards 1.

    This is Muon's Newton-Schulz iteration (kellerjordan.github.io/posts/muon) for a whole batch, in
    float32 or bfloat16.
    """
    X = X.to(dtype)
    X = X / X.norm(dim=(1, 2), keepdim=True).clamp_min(1e-12)
    A = X @ X.mT
    A2 = A @ A
    # ||A^2||^(1/4) bounds the largest singular value much closer than ||X|| does
    scale = A2.norm(dim=(1, 2), keepdim=True).sqrt().clamp_min(1e-12)
    if dtype != torch.float32:
        scale = 1.02 * scale  # the polynomials grow fast above 1
    A = A / scale
    A2 = A2 / scale.square()
    X = X / scale.sqrt()
    if dtype == torch.float32:  # bfloat16 is too coarse for products of the small matrices alone
        return product_of_polynomials(A, A2) @ X
    X = polynomial(A, A2, POLYNOMIALS[0]) @ X
    for coefficients in POLYNOMIALS[1:]:
        A = X @ X.mT
        X = polynomial(A, A @ A, coefficients) @ X
    return X


def product_of_polynomials(A: Tensor, A2: Tensor) -> Tensor:
    """What all the polynomials multiply X by, (b, m, m), from A = X X^T and A2 = A A."""
    P = polynomial(A, A2, POLYNOMIALS[0])
    product = P
    for coefficients in POLYNOMIALS[1:]:
        A = P @ A @ P
        P = polynomial(A, A @ A, coefficients)
        product = P @ product
    return product


def polynomial(A: Tensor, A2: Tensor, coefficients: tuple[float, float, float]) -> Tensor:
    """a I + b A + c A2, (b, m, m): what one polynomial multiplies X by."""
    a, b, c = coefficients
    P = b * A + c * A2
    P.diagonal(dim1=1, dim2=2).add_(a)
    return P


class Muon(torch.optim.Optimizer):
    """
    Momentum whose update is orthogonalised (kellerjordan.github.io/posts/muon), for matrices.

    maps: the rows of each map, for parameters that stack several; each map is orthogonalised apart.
    The step is scaled to the root mean square of AdamW's, 0.2 sqrt(max(rows, columns)), as in
    arXiv:2502.16982. Maps of equal shape, either way up, are orthogonalised together: on a CPU in
    float32, so that any number of processes makes the same run, elsewhere in bfloat16.
    """

    def __init__(
        self,
        params: list[nn.Parameter],
        lr: float,
        weight_decay: float,
        momentum: float = 0.95,
        maps: dict[nn.Parameter, list[int]] | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.maps = maps or {}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update from the gradients."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            grads = [p.grad for p in params]
            for p in params:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            momenta = [self.state[p]["momentum_buffer"] for p in params]
            torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
            ahead = torch._foreach_lerp(grads, momenta, group["momentum"])  # Nesterov's
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            for p, update in zip(params, self._updates(params, ahead), strict=True):
                p.add_(sharded_like(update, p), alpha=-group["lr"])

    def _updates(self, params: list[nn.Parameter], ahead: list[Tensor]) -> list[Tensor]:
        """The scaled and orthogonalised matrices of `ahead`, whole on every rank."""
        maps = []  # of all parameters, one after the other
        counts = []
        for p, x in zip(params, ahead, strict=True):
            of_parameter = full(x).split(self.maps.get(p, p.size(0)))
            maps += of_parameter
            counts.append(len(of_parameter))
        same_shape = defaultdict(list)  # places in maps, by shape
        for i, x in enumerate(maps):
            same_shape[tuple(sorted(x.shape))].append(i)

        for (_, longer), places in same_shape.items():
            batch = torch.stack([wide(maps[i]) for i in places])
            dtype = torch.bfloat16
            if batch.device.type == "cpu":
                dtype = torch.float32
            scaled = 0.2 * math.sqrt(longer) * orthogonalise(batch, dtype)
            for i, x in zip(places, scaled, strict=True):
                if maps[i].shape != x.shape:
                    x = x.mT
                maps[i] = x

        updates = []
        end = 0
        for count in counts:
            begin = end
            end += count
            if count == 1:  # without a copy, which would cost 5% of the step
                updates.append(maps[begin])
            else:
                updates.append(torch.cat(maps[begin:end]))
        return updates


def wide(x: Tensor) -> Tensor:
    """A matrix, or its transpose, with no more rows than columns."""
    if x.size(0) > x.size(1):
        return x.mT
    return x


def stacked_maps(model: nn.Module) -> dict[nn.Parameter, list[int]]:
    """The rows of the maps in the matrices of attention that hold several."""
    maps = {}
    for attn in model.modules():
        if not isinstance(attn, Attention):
            continue
        for name, p in attn.named_parameters():
            rows = p.size(0)
            if name == "c_attn.weight":  # queries, keys and, unless they are low-rank, values
                queries = attn.nh * attn.hs
                keys = attn.config.nkv * attn.hs
                maps[p] = [queries] + [keys] * ((rows - queries) // keys)
            elif name == "kv_latent_proj.weight":  # latents, the rotary key
                maps[p] = [attn.L] * attn.latents
                if rows > attn.latents * attn.L:
                    maps[p].append(rows - attn.latents * attn.L)
    return maps


def make_optimizers(model: nn.Module, cfg: Settings, device_type: str) -> Optimizers:
    """
    The optimizers of a model's trainable parameters, by name.

    'adamw' groups them as nanoGPT does: weight decay on tensors of two or more dimensions only.
    With cfg.optimizer == "muon", 'muon' takes the blocks' 2-D weights and 'adamw' the rest. Every
    group has a highest_lr, which set_learning_rates scales.
    """
    in_muon = []
    matrices = []  # and the other tensors of several dimensions, of AdamW
    vectors = []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if cfg.optimizer == "muon" and p.dim() == 2 and ".h." in name:
            in_muon.append(p)
        elif p.dim() >= 2:
            matrices.append(p)
        else:
            vectors.append(p)
    groups = [
        {"params": matrices, "weight_decay": cfg.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizers: Optimizers = {
        "adamw": torch.optim.AdamW(
            groups,
            lr=cfg.learning_rate,
            betas=(cfg.beta1, cfg.beta2),
            fused=device_type in ("cuda", "cpu"),
        )
    }
    if in_muon:
        optimizers["muon"] = Muon(
            in_muon,
            lr=cfg.muon_learning_rate,
            weight_decay=cfg.muon_weight_decay,
            maps=stacked_maps(model),
        )
    highest = {"adamw": cfg.learning_rate, "muon": cfg.muon_learning_rate}
    for name, optimizer in optimizers.items():
        for group in optimizer.param_groups:
            group["highest_lr"] = highest[name]
    return optimizers


def set_learning_rates(optimizers: Optimizers, factor: float) -> None:
    """Give every parameter group this share of its highest learning rate."""
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            group["lr"] = factor * group["highest_lr"]


def optimizer_state(optimizers: Optimizers) -> dict[str, Any]:
    """AdamW's state dict, as nanoGPT saves it; with Muon, the state dicts of both by name."""
    states = {name: optimizer.state_dict() for name, optimizer in optimizers.items()}
    if "muon" in states:
        return states
    return states["adamw"]


def restore_optimizers(optimizers: Optimizers, state: dict[str, Any], source: str) -> None:
    """
    Load what optimizer_state gave. The groups keep this run's settings, such as weight decay.

    source: what messages call the checkpoint. Raises UserError if the state belongs to other
    optimizers or to another model.
    """
    states = state
    if "adamw" not in state:
        states = {"adamw": state}
    if states.keys() != optimizers.keys():
        raise UserError(
            f"{source} was trained with {' + '.join(states)}, this run uses "
            f"{' + '.join(optimizers)}; give the same --optimizer, or start a new run from these "
            "weights with --init_from=PATH"
        )
    try:
        for name, optimizer in optimizers.items():
            # nanoGPT's moments of before 2023 have other shapes, which torch notices in a step
            params = [p for group in optimizer.param_groups for p in group["params"]]
            for i, p in enumerate(params):
                for key, value in states[name]["state"].get(i, {}).items():
                    if torch.is_tensor(value) and value.dim() and value.shape != p.shape:
                        shapes = f"{tuple(value.shape)}, expected {tuple(p.shape)}"
                        raise ValueError(f"{key} of parameter {i} has {shapes}")
            settings = []  # of this run, which loading would replace
            for group in optimizer.param_groups:
                settings.append({key: value for key, value in group.items() if key != "params"})
            load_optimizer_state(optimizer, states[name])
            for group, group_settings in zip(optimizer.param_groups, settings, strict=True):
                group.update(group_settings)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        problem = "its optimizer state does not fit this model"
        raise UserError(f"{source}: {problem} ({one_line(error)[:150]})") from None
