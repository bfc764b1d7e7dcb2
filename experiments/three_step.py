"""
An experiment: the three-step block of latent attention, tokens -> m latents -> tokens.

    python -m experiments.three_step [--dataset=shakespeare_char]

1. m learned latent queries attend over all T tokens (cross-attention).
2. The m latents attend to each other.
3. The T tokens attend to the m latents (cross-attention back).

Steps 1 and 2 are the Perceiver's (arXiv:2103.03206), step 3 is the decoder of Perceiver IO
(arXiv:2107.14795). A head computes 2 T m + m^2 scores, where self-attention computes T^2.
Every latent has seen all tokens, so each token sees those after it too: the block is bidirectional,
has no cache, and is therefore not an attention that a GPTConfig offers.

The command times the block beside causal self-attention, trains a small GPT with each, and prints
the validation loss where a target is in the input and where it is not, and a sample of both.
"""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from model import ATTENTION, GPT, GPTConfig
from nanomla import optim
from nanomla.checks import Count, Natural, check
from nanomla.dataset import Dataset
from nanomla.distributed import resolve_device
from nanomla.errors import UserError, run_script
from nanomla.settings import configure
from nanomla.tokenizer import Tokenizer
from tools.bench.timing import Rows, Timed, alternate, machine, table, write_json
from train import TrainConfig

TIMED_LATENTS = (16, 64)  # m of the timed blocks
SHAPE = {"block_size": 64, "n_layer": 2, "n_head": 4, "n_embd": 128, "bias": False}
RECIPE = {
    "optimizer": "muon", "batch_size": 12, "muon_learning_rate": 0.01, "learning_rate": 6e-3,
    "min_lr": 3e-4, "beta2": 0.99, "warmup_iters": 50,
}  # fmt: skip


@dataclass
class ExperimentConfig:
    """The settings of every experiment that times a layer and trains small GPTs."""

    headings: ClassVar[dict[str, str]] = {"dataset": "experiment"}

    dataset: Annotated[str, "The dataset: a folder below data/, or a path."] = "shakespeare_char"
    max_iters: Annotated[Count, "The number of training iterations of each model."] = 800
    rounds: Annotated[Count, "The number of rounds that the medians are taken over."] = 9
    device: Annotated[str, "The device to run on: auto, cpu, cuda, cuda:1, ... or mps."] = "auto"
    seed: Annotated[Natural, "The seed of weights, inputs, batches and samples."] = 1337
    json: Annotated[str | None, "A file that the figures are written to as well."] = None

    def __post_init__(self) -> None:
        check(self)


@dataclass
class ThreeStepConfig(ExperimentConfig):
    """The settings of this experiment."""

    headings: ClassVar[dict[str, str]] = {**ExperimentConfig.headings, "n_latents": "three steps"}

    n_latents: Annotated[Count, "The number of latents (m) of the trained block."] = 32
    sample_tokens: Annotated[Count, "The number of tokens in each sample."] = 200
    longest: Annotated[
        int, Field(ge=256), "The longest sequence that is timed; the others are 256, 512, ..."
    ] = 8192


def main(argv: list[str] | None = None) -> None:
    """The command line; see the top of this file."""
    cfg, _ = configure(ThreeStepConfig, sys.argv[1:] if argv is None else argv)
    measure(cfg)


def measure(cfg: ThreeStepConfig) -> Rows:
    """The whole experiment: prints its tables, writes cfg.json and returns the rows."""
    data, device = start(cfg)
    rows = time_block(cfg, device) + train_both(cfg, data, device)
    if cfg.json:
        write_json(cfg.json, device, rows)
    return rows


def start(cfg: ExperimentConfig) -> tuple[Dataset, str]:
    """An experiment's dataset, before any timing, as it may be missing, and its device."""
    data, device = Dataset(cfg.dataset, SHAPE["block_size"]), resolve_device(cfg.device)
    print(f"{machine(device)}, torch {torch.__version__}, seed {cfg.seed}")
    return data, device


# ---- the block
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
        parts = [self.q_proj(x), *self.kv_proj(source).chunk(2, dim=-1)]
        q, k, v = (t.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for t in parts)
        y = F.scaled_dot_product_attention(q, k, v)  # (B, nh, T, hs)
        return self.c_proj(y.transpose(1, 2).flatten(2))


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

    def new_cache(self, *sizes: Any) -> None:
        raise ValueError("cache must be None: a bidirectional block cannot keep one")

    def forward(self, x: Tensor, cache: None = None, rotation: None = None) -> Tensor:
        if cache is not None:
            self.new_cache()
        z = self.latents.expand(x.size(0), -1, -1)  # (B, m, C)
        z = z + self.read(self.norm_1(z), x)
        inner = self.norm_2(z)
        z = z + self.mix(inner, inner)
        return self.write(x, self.norm_3(z))


def count_scores(T: int, m: int) -> int:
    """Scores of one head over T tokens with m latents: those of steps 1, 2 and 3."""
    return T * m + m * m + T * m


def three_step_gpt(config: GPTConfig, n_latents: int) -> GPT:
    """A GPT of this shape whose every attention is a three-step block."""
    model = GPT(config)
    for block in model.transformer.h:
        block.attn = ThreeStepAttention(config.n_embd, config.n_head, n_latents)
    return model


# ---- (a) what it costs
def time_block(cfg: ThreeStepConfig, device: str) -> Rows:
    """Forward and backward of one layer, causal self-attention and the block, at each length."""
    torch.manual_seed(cfg.seed)
    C, nh = SHAPE["n_embd"], SHAPE["n_head"]
    config = GPTConfig(cfg.longest, 1, n_layer=1, n_head=nh, n_embd=C, bias=False)
    layers = {"causal": ATTENTION["mha"](config)}
    layers |= {f"m = {m}": ThreeStepAttention(C, nh, m) for m in TIMED_LATENTS}
    lengths = [2**i for i in range(8, cfg.longest.bit_length())]
    rows, seconds = [], []
    for T in lengths:
        x = torch.randn(1, T, C, device=device, requires_grad=True)
        entries = []
        for name, layer in layers.items():
            layer.to(device)
            entries.append(Timed(name, lambda layer=layer, x=x: layer(x).sum().backward()))
        took = alternate(entries, cfg.rounds, device)
        row = {"T": f"{T:,}", "causal: scores": f"{T * (T + 1) // 2:,}"}
        row |= {f"m = {m}: scores": f"{count_scores(T, m):,}" for m in TIMED_LATENTS}
        for name, entry in took.items():
            row[f"{name}: ms"] = f"{entry.seconds * 1e3:.2f}"
        rows.append(row)
        seconds.append([entry.seconds for entry in took.values()])
    what = f"Forward and backward of one layer, {C} wide, {nh} heads, batch 1, float32"
    rows = table(f"{what}; scores are those that one head needs", rows)
    if len(lengths) > 3:  # from an eighth of the last length, where overheads are small
        ratios = [f"{b / a:.1f} ({n})" for n, a, b in zip(layers, seconds[-4], seconds[-1])]
        print(f"\nTime at T = {lengths[-1]:,} over that at {lengths[-4]:,}:", ", ".join(ratios))
    return rows


# ---- (b) what it does to a causal language model
def train_both(cfg: ThreeStepConfig, data: Dataset, device: str) -> Rows:
    """Train a GPT with causal attention and one with the block; print losses, a leak, samples."""
    config = GPTConfig(vocab_size=data.vocab_size or 50304, **SHAPE)
    makers = {
        "causal self-attention": lambda: GPT(config),
        f"three steps, m = {cfg.n_latents}": lambda: three_step_gpt(config, cfg.n_latents),
    }
    rows, samples = [], {}
    for name, make in makers.items():
        model, row = train_one(name, make, cfg, data, device)
        rows.append(row)
        samples[name] = sample(model, data, cfg, device)
    rows = table(title(cfg), rows)
    print(
        "\nAt the last position the target is not in the input; at all others it is. leak: the\n"
        "largest change in the logits of earlier positions when the last token changes.\n"
        "Samples are made token by token, from a prompt of validation text:"
    )
    for name, text in samples.items():
        print(f"\n--- {name}\n{text}")
    return rows


def title(cfg: ExperimentConfig) -> str:
    """What the table of the trained models is about."""
    size = "{n_layer} layers, {n_embd} wide, {block_size} tokens of context".format(**SHAPE)
    return f"GPTs of {size} after {cfg.max_iters} iterations on {cfg.dataset}"


def train_one(
    name: str, make: Callable[[], GPT], cfg: ExperimentConfig, data: Dataset, device: str
) -> tuple[GPT, dict[str, str]]:
    """A trained model, and its row of the table: size, time, losses and leak."""
    torch.manual_seed(cfg.seed)
    model = make().to(device)
    began = time.perf_counter()
    train(model, data, cfg, device)
    seconds = time.perf_counter() - began
    mean, last = evaluate(model, data, device)
    row = {"attention": name, "parameters": f"{model.get_num_params():,}"}
    row |= {"training, s": f"{seconds:.0f}", "validation loss": f"{mean:.3f}"}
    row["loss at the last position"] = f"{last:.3f}"
    row["leak"] = f"{leak(model, data, device):.3g}"
    return model, row


def train(model: GPT, data: Dataset, cfg: ExperimentConfig, device: str) -> None:
    """cfg.max_iters iterations of RECIPE, on the batches that train.py would draw."""
    recipe = TrainConfig(model=model.config, max_iters=cfg.max_iters, **RECIPE)
    optimizers = optim.make_optimizers(model, recipe, device.partition(":")[0])
    for it in range(cfg.max_iters):
        optim.set_learning_rates(optimizers, recipe.lr_factor(it))
        x, y = data.batch(cfg.seed, it, range(recipe.batch_size))
        loss = model(x.to(device), y.to(device))[1]
        if not math.isfinite(loss.item()):
            raise UserError(f"iteration {it}: the loss is {loss.item()}; try another --seed")
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.grad_clip)
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    model.eval()


@torch.no_grad()
def evaluate(model: GPT, data: Dataset, device: str) -> tuple[float, float]:
    """Validation loss per token of 1,024 windows: of all positions, and of the last one alone."""
    losses = []
    for i in range(16):
        x, y = (t.to(device) for t in data.eval_batch("val", i, 16, 64))
        logits, _ = model(x, y)  # (B, T, V)
        losses.append(F.cross_entropy(logits.transpose(1, 2), y, reduction="none"))
    losses = torch.cat(losses)  # (1024, T)
    return losses.mean().item(), losses[:, -1].mean().item()


@torch.no_grad()
def leak(model: GPT, data: Dataset, device: str) -> float:
    """The largest change in the logits of earlier positions when the last token is another one."""
    before = data.eval_batch("val", 0, 1, 1)[0].to(device)  # (1, T)
    after = before.clone()
    after[:, -1] = (after[:, -1] + 1) % model.config.vocab_size
    logits = [model(idx, all_logits=True)[0][:, :-1] for idx in (before, after)]
    return (logits[0] - logits[1]).abs().max().item()


def sample(model: GPT, data: Dataset, cfg: ThreeStepConfig, device: str) -> str:
    """
    A full window of validation text, continued token by token and shown from its last line on.

    The window slides, so the model is always given as many tokens as in training.
    """
    if data.tokenizer is None:
        return "(no text: the dataset does not name its tokenizer)"
    prompt = data.eval_batch("val", 0, 1, 1)[0].to(device)
    generator = torch.Generator(device).manual_seed(cfg.seed)
    how = {"temperature": 0.8, "use_cache": False, "generator": generator}
    ids = model.generate(prompt, cfg.sample_tokens, **how)[0].tolist()
    tokenizer, T = Tokenizer(data.tokenizer), prompt.size(1)
    return f"{tokenizer.decode(ids[:T])}|{tokenizer.decode(ids[T:])}"


if __name__ == "__main__":
    run_script(main)
