"""
Even loads of experts without a loss for it (arXiv:2408.15664, and DeepSeek-V3): passes are counted,
and after each step of the optimizer the router's bias moves against what was counted.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from model import GPT, MixtureOfExperts
from nanomla.distributed import World, sharded_like


def mixtures(model: GPT) -> list[MixtureOfExperts]:
    """The model's layers of experts, with its predictor's."""
    if model.config.moe_experts == 0:  # most models: a training step asks several times
        return []
    return [layer for layer in model.modules() if isinstance(layer, MixtureOfExperts)]


def leave_uncompiled(model: GPT) -> None:
    """Let torch.compile leave out the routed experts, whose shapes change with every batch."""
    for layer in mixtures(model):  # a decorator would import the compiler in every process
        layer.routed = torch.compiler.disable(layer.routed)


@contextlib.contextmanager
def counted(model: GPT) -> Iterator[None]:
    """
    A context whose passes count, from 0 on, the tokens that every expert gets. With gradient
    checkpointing all count twice, which changes no share.
    """
    for layer in mixtures(model):
        layer.loads.zero_()
        layer.counting = True
    try:
        yield
    finally:
        stop_counting(model)


def stop_counting(model: GPT) -> None:
    """Count no pass from here on."""
    for layer in mixtures(model):
        layer.counting = False


def loads(model: GPT, world: World) -> Tensor:
    """What was counted, summed over all ranks: (layers of experts, E) float64 on the CPU."""
    counts = torch.stack([layer.loads for layer in mixtures(model)]).cpu()
    return torch.tensor(world.sum(*counts.flatten().tolist())).double().view(counts.shape)


@torch.no_grad()
def balance(model: GPT, counts: Tensor, step: float) -> None:
    """
    Raise the router's bias by a step for experts with fewer tokens than their layer's mean, and
    lower it for those with more. counts: what loads returned.
    """
    directions = (counts.mean(dim=1, keepdim=True) - counts).sign()
    for layer, direction in zip(mixtures(model), directions, strict=True):
        bias = layer.router_bias
        bias.add_(sharded_like(step * direction.to(bias), bias))


def shares(counts: Tensor) -> dict[str, float]:
    """
    The smallest and the largest share of an expert in its layer's tokens, as measures of an
    evaluation. counts: what loads returned.
    """
    share = counts / counts.sum(dim=1, keepdim=True)
    return {"expert_share_min": share.min().item(), "expert_share_max": share.max().item()}
