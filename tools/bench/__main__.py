"""
Time the attention variants against each other, against this machine's limits and transformers.

    python -m tools.bench decode [--vs_hf]  one layer at 32,768 tokens, a 124M GPT, a long batch
    python -m tools.bench kernel            attention over cached latents alone, in GB/s
    python -m tools.bench prefill           time and memory of prompts of 512 to 8,192 tokens
    python -m tools.bench train [--vs_hf]   one training iteration of every variant
    python -m tools.bench lengths           what a token costs in training, 512 to 16,384 of them
    python -m tools.bench serve             tokens/s of tools.serve for 1 client and for 16
    python -m tools.bench speculate --init_from=X [--draft=Y]
                                            drafts: what they take, how many are right
    python -m tools.bench svd               exact against randomized factors
    python -m tools.bench profile config/train_mla.py
                                            where an iteration of a config's run goes
    python -m tools.bench config/train_mla.py --report
                                            a config's parameters, bytes and FLOPs beside MHA's

All that is compared runs in turn in one process, round after round; figures are medians over the
rounds. --json=FILE writes them to a file too.
"""

import importlib
import sys
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import torch
from pydantic import Field

from model import GPTConfig
from nanomla.checks import Count, Seed, Text, check
from nanomla.distributed import resolve_device
from nanomla.errors import UsageError, run_script
from nanomla.settings import configure, declared
from tools.bench import (
    decode,
    kernel,
    lengths,
    prefill,
    profile,
    report,
    serve,
    speculate,
    svd,
    train,
)
from tools.bench.timing import machine, write_json
from train import HINTS, TrainConfig

GONE = {"vs_compiled": ", which is gone; --vs_hf compares with transformers"}


@dataclass
class BenchConfig:
    """The settings of `svd`, and of every question that times something."""

    headings: ClassVar[dict[str, str]] = {"device": "bench"}

    device: Annotated[Text, "The device to run on: auto, cpu, cuda, cuda:1, ... or mps."] = "auto"
    seed: Annotated[Seed, "The seed of weights and inputs."] = 1337
    json: Annotated[Text | None, "A file that the figures are written to as well."] = None

    def __post_init__(self) -> None:
        check(self)


@dataclass
class RoundsConfig(BenchConfig):
    """The settings of `kernel`, `prefill` and `lengths`."""

    rounds: Annotated[
        Count, Field(le=10_000), "The number of rounds that the medians are taken over."
    ] = 15


@dataclass
class TimingConfig(RoundsConfig):
    """The settings of `decode` and `train`."""

    vs_hf: Annotated[bool, "The GPT-2 and DeepSeek-V3 of transformers are timed too."] = False


@dataclass
class LoadConfig(RoundsConfig):
    """The settings of `serve`."""

    clients: Annotated[Count, Field(le=1000), "The number of clients at once."] = 16
    tokens: Annotated[
        Count,
        Field(le=4096),
        "The number of tokens that each client asks for; of the 124M model, a quarter of it.",
    ] = 128
    rounds: Annotated[
        Count, Field(le=10_000), "The number of rounds that the medians are taken over."
    ] = 5


@dataclass
class SpeculateConfig(RoundsConfig):
    """The settings of `speculate`."""

    headings: ClassVar[dict[str, str]] = BenchConfig.headings | {"init_from": "speculate"}

    init_from: Annotated[
        Text | None,
        "A run or other weights. None stands for a 124M GPT with random weights, of which only the "
        "times of passes are taken.",
    ] = None
    draft: Annotated[
        Text | None,
        "A run or other weights that draft. None stands for the model's own block for the token "
        "after the next (n_predict=1).",
    ] = None
    tokens: Annotated[Count, "The number of tokens in a text, below block_size."] = 200


@dataclass
class ReportConfig:
    """The settings of --report: a model's, and what it is counted at."""

    headings: ClassVar[dict[str, str]] = {"init_from": "report"}

    model: GPTConfig = field(default_factory=lambda: GPTConfig(bias=False))
    init_from: Annotated[
        Text | None, "A run, an export or other weights whose model is counted instead."
    ] = None
    vocab_size: Annotated[
        Count | None, "The number of token ids of the model. None stands for the dataset's."
    ] = None
    dataset: Annotated[
        Text | None,
        "The dataset: a folder below data/, or a path. None stands for the token ids of GPT-2.",
    ] = None
    context: Annotated[
        Count | None,
        "The number of tokens that a decoded token attends to. None stands for block_size.",
    ] = None
    json: Annotated[Text | None, "A file that the figures are written to as well."] = None

    def __post_init__(self) -> None:
        check(self)


@dataclass
class ProfileConfig:
    """The settings of `profile`: a run's."""

    headings: ClassVar[dict[str, str]] = {"rounds": "profile"}

    train: TrainConfig = field(default_factory=TrainConfig)
    rounds: Annotated[
        Count, Field(le=10_000), "The number of iterations that the medians are taken over."
    ] = 60
    json: Annotated[Text | None, "A file that the figures are written to as well."] = None

    def __post_init__(self) -> None:
        check(self)

    @property
    def device(self) -> str:
        return self.train.device

    @property
    def seed(self) -> int:
        return self.train.seed


QUESTIONS = {  # the settings of each, and a function of them and the device
    "decode": (TimingConfig, lambda s, device: decode.measure(device, s.rounds, s.vs_hf)),
    "kernel": (RoundsConfig, lambda s, device: kernel.measure(device, s.rounds)),
    "prefill": (RoundsConfig, lambda s, device: prefill.measure(device, s.rounds)),
    "train": (TimingConfig, lambda s, device: train.measure(device, s.rounds, s.vs_hf)),
    "lengths": (RoundsConfig, lambda s, device: lengths.measure(device, s.rounds)),
    "serve": (LoadConfig, lambda s, device: serve.measure(device, s.rounds, s.clients, s.tokens)),
    "svd": (BenchConfig, lambda s, device: svd.measure(device)),
    "speculate": (
        SpeculateConfig,
        lambda s, device: speculate.measure(device, s.rounds, s.init_from, s.draft, s.tokens),
    ),
    "profile": (ProfileConfig, lambda s, device: profile.measure(device, s.rounds, s.train)),
    "--report": (ReportConfig, None),  # on no device
}


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    argv = [arg.replace("--report=True", "--report") for arg in argv]
    asked = [arg for arg in argv if arg in QUESTIONS]
    if not asked and ("--help" in argv or "-h" in argv):
        asked = ["decode"]
    if len(asked) != 1:
        raise UsageError(f"say one of: {', '.join(QUESTIONS)}")
    config_class, measure = QUESTIONS[asked[0]]
    flags = [arg for arg in argv if arg not in QUESTIONS]
    settings, origins = configure(config_class, flags, HINTS | GONE, declared(TrainConfig))
    if measure is None:
        device = "cpu"
        rows = report.measure(asked_config(settings, origins), settings.context)
    else:
        if getattr(settings, "vs_hf", False):
            importlib.import_module("transformers")  # or one line that says how to install it
        device = resolve_device(settings.device)
        print(f"{machine(device)}, torch {torch.__version__}, seed {settings.seed}")
        torch.manual_seed(settings.seed)
        rows = measure(settings, device)
    if settings.json:
        write_json(settings.json, device, rows)


def asked_config(settings: ReportConfig, origins: dict[str, str]) -> GPTConfig:
    """The config of the model that --report counts."""
    if settings.init_from is None:
        return report.with_token_ids(settings.model, settings.vocab_size, settings.dataset)
    for name in origins:
        if name not in ("init_from", "context", "json"):
            raise UsageError(f"init_from has its own {name}; leave out one of them")
    return report.stored_config(settings.init_from)


if __name__ == "__main__":
    run_script(main)
