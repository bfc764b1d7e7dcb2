"""Our own format: the fields of GPTConfig, and the weights under their own names."""

import dataclasses

from model import GPT
from nanomla.formats.base import MARK, Format, Settings, Tensors


def read(settings: Settings, tensors: Tensors) -> tuple[Settings, Tensors]:
    """The arguments of GPTConfig in config.json, and the tensors as they are."""
    about = {"model_type", *MARK}
    return {name: value for name, value in settings.items() if name not in about}, tensors


def write(model: GPT) -> tuple[Settings, Tensors]:
    """config.json and the tensors of any model; tied and shared weights are stored once."""
    settings = dataclasses.asdict(model.config)
    if settings["attention"] is None:  # as it is wherever the flags say which
        del settings["attention"]
    tensors = {name: p.detach().contiguous() for name, p in model.named_parameters()}
    return settings, tensors


OWN = Format("nanomla", "every setting of this project", read, write, fits=None)
