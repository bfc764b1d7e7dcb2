"""
What the experiments share: a small GPT, one recipe to train it by, and what is asked of it then.

Letters: B sequences, T tokens, V vocabulary.
"""

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import GPT, GPTConfig
from nanomla import optim
from nanomla.checks import Count, Seed, Text, check
from nanomla.dataset import Dataset
from nanomla.distributed import resolve_device
from nanomla.settings import configure
from nanomla.start import padded_vocab
from tools.bench.timing import Timed, alternate, machine, table
from tools.runs import decode_rates
from train import TrainConfig

SHAPE = {"block_size": 64, "n_layer": 2, "n_head": 4, "n_embd": 128, "bias": False}
MLA = {**SHAPE, "pos_emb": "rope", "use_mla": True, "mla_latent_dim": 16, "mla_rope_dim": 16}
RATES = (0.5, 1.0, 2.0)  # factors of the recipe's learning rates
CONTEXT = 4096  # at which decoding is timed
EVALUATED = 16  # batches of 64 windows

Build = Callable[[GPTConfig], GPT]


@dataclass
class Experiment:
    """The settings of an experiment."""

    headings: ClassVar[dict[str, str]] = {"dataset": "experiment"}

    dataset: Annotated[Text, "The dataset: a folder below data/, or a path."] = "shakespeare_char"
    max_iters: Annotated[Count, "The number of training iterations of each model."] = 300
    seed: Annotated[Seed, "The seed of weights and batches."] = 1337
    device: Annotated[Text, "The device to run on: auto, cpu, cuda, cuda:1, ... or mps."] = "auto"

    def __post_init__(self) -> None:
        check(self)
        self.device = resolve_device(self.device)


def start(script: str, argv: list[str] | None) -> tuple[Experiment, Dataset, int]:
    """The settings on the command line, their dataset and its vocab_size. script: a module."""
    if argv is None:
        argv = sys.argv[1:]
    kind = type("Settings", (Experiment,), {"__module__": script})  # --help prints its docstring
    cfg, _ = configure(kind, argv)
    print(f"{machine(cfg.device)}, torch {torch.__version__}, seed {cfg.seed}")
    data = Dataset(cfg.dataset, SHAPE["block_size"])
    data.model_vocab_size = padded_vocab(data)
    return cfg, data, data.model_vocab_size


def title(cfg: Experiment) -> str:
    """What a table of trained models is about."""
    size = "{n_layer} layers, {n_embd} wide, {block_size} tokens of context".format(**SHAPE)
    return f"GPTs of {size} after {cfg.max_iters} iterations on {cfg.dataset}"


def time_layers(layers: dict[str, nn.Module], x: Tensor, device: str) -> dict[str, float]:
    """Seconds of forward and backward over x (B, T, C) of each layer, medians of 9, in turn."""
    entries = []
    for name, layer in layers.items():
        layer.to(device)
        entries.append(Timed(name, lambda layer=layer: layer(x).sum().backward()))
    took = alternate(entries, 9, device)
    return {name: entry.seconds for name, entry in took.items()}


def with_attention(attention: Callable[[GPTConfig, int], nn.Module], config: GPTConfig) -> GPT:
    """GPT(config) with other attention, which takes over the weights that it has by name, too."""
    model = GPT(config)
    for layer, block in enumerate(model.transformer.h):
        other = attention(config, layer)
        other.load_state_dict(block.attn.state_dict(), strict=False)
        block.attn = other
    return model


def train(
    model: GPT, cfg: Experiment, data: Dataset, rate: float = 1.0, warmup_iters: int = 30
) -> None:
    """Train a new model for cfg.max_iters iterations, as train.py does with these settings."""
    recipe = TrainConfig(
        model=model.config, max_iters=cfg.max_iters, warmup_iters=warmup_iters, batch_size=12,
        optimizer="muon", muon_learning_rate=0.01 * rate, learning_rate=6e-3 * rate,
        min_lr=3e-4 * rate, beta2=0.99,
    )
    model.to(cfg.device)
    optimizers = optim.make_optimizers(model, recipe, cfg.device.partition(":")[0])
    for it in range(cfg.max_iters):
        optim.set_learning_rates(optimizers, optim.lr_factor(recipe, it))
        x, y = data.batch(cfg.seed, it, range(recipe.batch_size))
        loss = model(x.to(cfg.device), y.to(cfg.device))[1]
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.grad_clip)
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    model.eval()


def train_block(
    name: str, config: GPTConfig, build: Build, cfg: Experiment, data: Dataset
) -> tuple[GPT, dict[str, str]]:
    """A trained model with another block for attention, and its row of a table of such models."""
    torch.manual_seed(cfg.seed)
    model = build(config)
    train(model, cfg, data, warmup_iters=50)
    mean, last = evaluate(model, cfg, data)
    row = {"attention": name, "parameters": f"{model.get_num_params():,}"}
    row |= {"validation loss": f"{mean:.3f}", "loss at the last position": f"{last:.3f}"}
    return model, row | {"leak": f"{leak(model, cfg, data):.3g}"}


@torch.no_grad()
def evaluate(model: GPT, cfg: Experiment, data: Dataset) -> tuple[float, float]:
    """Validation loss per token of 1,024 windows: of all positions, and of the last one alone."""
    losses = []
    for i in range(EVALUATED):
        x, y = (t.to(cfg.device) for t in data.eval_batch("val", i, EVALUATED, 64))
        logits, _ = model(x, y)  # (B, T, V)
        losses.append(F.cross_entropy(logits.transpose(1, 2), y, reduction="none"))
    losses = torch.cat(losses)  # (windows, T)
    return losses.mean().item(), losses[:, -1].mean().item()


def compare(
    variants: dict[str, tuple[GPTConfig, Build]], cfg: Experiment, data: Dataset
) -> dict[str, GPT]:
    """
    Train each variant, which is a config and what builds a model of it, at three learning rates.
    Prints a table of their losses and of the tokens/s that they decode; returns the best of each.
    """
    longer = {}
    for name, (config, build) in variants.items():
        longer[name] = build(dataclasses.replace(config, block_size=CONTEXT)).to(cfg.device).eval()
    speeds = decode_rates(longer, CONTEXT, cfg.device)
    best = {}
    rows = []
    for name, (config, build) in variants.items():
        row = {"variant": name}
        losses = {}
        for rate in RATES:
            torch.manual_seed(cfg.seed)
            model = build(config)
            train(model, cfg, data, rate)
            losses[rate], _ = evaluate(model, cfg, data)
            if losses[rate] == min(losses.values()):
                best[name] = model
            row[f"loss x {rate:g}"] = f"{losses[rate]:.4f}"
        row["best loss"] = f"{min(losses.values()):.4f}"
        row["parameters"] = f"{best[name].get_num_params():,}"
        row[f"decoded tokens/s at {CONTEXT:,}"] = f"{speeds[name]:,.0f}"
        rows.append(row)
    table(title(cfg), rows)
    return best


@torch.no_grad()
def leak(model: GPT, cfg: Experiment, data: Dataset) -> float:
    """The largest change in the logits of earlier positions when the last token is another one."""
    before = data.eval_batch("val", 0, 1, 1)[0].to(cfg.device)  # (1, T)
    after = before.clone()
    after[:, -1] = (after[:, -1] + 1) % model.config.vocab_size
    earlier = model(before, all_logits=True)[0][:, :-1]
    return (model(after, all_logits=True)[0][:, :-1] - earlier).abs().max().item()
