"""
Time the attention variants against each other, against this machine's limits and transformers.

    python -m tools.bench decode [--vs_hf]  one layer at 32,768 tokens, a 124M GPT, a long batch
    python -m tools.bench kernel            attention over cached latents alone, in GB/s
    python -m tools.bench prefill           time and memory of prompts of 512 to 8,192 tokens
    python -m tools.bench train [--vs_hf]   one training iteration of every variant
    python -m tools.bench lengths           what a token costs in training, 512 to 16,384 of them
    python -m tools.bench serve             tokens/s of tools.serve for 1 client and for 16
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
from nanomla.checks import Count, check
from nanomla.distributed import resolve_device
from nanomla.errors import UsageError, run_script
from nanomla.settings import configure, declared
from tools.bench import decode, kernel, lengths, prefill, profile, report, serve, svd, train
from tools.bench.timing import machine, write_json
from train import HINTS, TrainConfig

SEED = 1337  # of weights and inputs


@dataclass
class JsonConfig:
    """What every question takes."""

    headings: ClassVar[dict[str, str]] = {"json": "bench"}

    json: Annotated[str | None, "A file that the figures are written to as well."] = None

    def __post_init__(self) -> None:
        check(self)


@dataclass
class TimingConfig(JsonConfig):
    """The settings of what is timed."""

    device: Annotated[str, "The device to run on: auto, cpu, cuda, cuda:1, ... or mps."] = "auto"
    rounds: Annotated[
        Count,
        Field(le=10_000),
        "The number of rounds that medians are taken over: fewer of what is slow, more of a run.",
    ] = 15


@dataclass
class DecodeConfig(TimingConfig):
    """The settings of `decode`, and of `train`."""

    vs_hf: Annotated[bool, "The GPT-2 and DeepSeek-V3 of transformers are timed too."] = False


@dataclass
class ReportConfig(JsonConfig):
    """The settings of --report: a model's, and where it comes from."""

    model: GPTConfig = field(default_factory=lambda: GPTConfig(bias=False))
    init_from: Annotated[
        str | None, "A run, an export or other weights whose model is counted instead."
    ] = None
    vocab_size: Annotated[
        Count | None, "The number of token ids of the model. None stands for the dataset's."
    ] = None
    dataset: Annotated[
        str | None,
        "The dataset: a folder below data/, or a path. None stands for the token ids of GPT-2.",
    ] = None


@dataclass
class ProfileConfig(TimingConfig):
    """The settings of `profile`: a run's, too."""

    train: TrainConfig = field(default_factory=TrainConfig)


QUESTIONS = {  # the settings of each, and a function of them and the device
    "decode": (DecodeConfig, lambda s, device: decode.measure(device, s.rounds, s.vs_hf)),
    "kernel": (TimingConfig, lambda s, device: kernel.measure(device, s.rounds)),
    "prefill": (TimingConfig, lambda s, device: prefill.measure(device, s.rounds)),
    "train": (DecodeConfig, lambda s, device: train.measure(device, s.rounds, s.vs_hf)),
    "lengths": (TimingConfig, lambda s, device: lengths.measure(device, s.rounds)),
    "serve": (TimingConfig, lambda s, device: serve.measure(device, s.rounds)),
    "svd": (TimingConfig, lambda s, device: svd.measure(device, s.rounds)),
    "profile": (ProfileConfig, lambda s, device: profile.measure(device, 4 * s.rounds, s.train)),
    "--report": (ReportConfig, None),  # on no device
}


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    asked = [arg for arg in argv if arg in QUESTIONS]
    if not asked and ("--help" in argv or "-h" in argv):
        asked = ["decode"]
    if len(asked) != 1:
        raise UsageError(f"say one of: {', '.join(QUESTIONS)}")
    config_class, measure = QUESTIONS[asked[0]]
    flags = [arg for arg in argv if arg not in QUESTIONS]
    settings, origins = configure(config_class, flags, HINTS, declared(TrainConfig))
    if measure is None:
        device = "cpu"
        rows = report.measure(asked_config(settings, origins))
    else:
        if getattr(settings, "vs_hf", False):
            importlib.import_module("transformers")  # or one line that says how to install it
        device = resolve_device(settings.device)
        print(f"{machine(device)}, torch {torch.__version__}, seed {SEED}")
        torch.manual_seed(SEED)
        rows = measure(settings, device)
    if settings.json:
        write_json(settings.json, device, rows)


def asked_config(settings: ReportConfig, origins: dict[str, str]) -> GPTConfig:
    """The config of the model that --report counts."""
    if settings.init_from is None:
        return report.with_token_ids(settings.model, settings.vocab_size, settings.dataset)
    for name in origins:
        if name not in ("init_from", "json"):
            raise UsageError(f"init_from has its own {name}; leave out one of them")
    return report.stored_config(settings.init_from)


if __name__ == "__main__":
    run_script(main)
