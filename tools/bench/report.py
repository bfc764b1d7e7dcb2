"""--report: what a config's model counts, beside MHA's; nothing is timed."""

import dataclasses
from collections.abc import Callable

import torch

from model import GPT, GPTConfig
from nanomla import checkpoint, costs, formats
from nanomla.dataset import Dataset
from nanomla.distributed import warn0
from nanomla.errors import UserError
from nanomla.start import padded_vocab
from tools.bench.timing import Rows, table


def measure(config: GPTConfig, context: int | None) -> Rows:
    """
    Parameters by part, cache bytes per token and FLOPs per token of a config, beside those of MHA
    with as many key/value heads as heads.

    context: of the decoded token; None stands for block_size.
    """
    if context is None:
        context = config.block_size
    changes = {"use_mla": False, "use_svd": False, "use_latent_tokens": False}
    changes |= {"n_kv_head": None, "rope_freqs": None, "mla_latent_dim": None}
    if config.hs % 2:  # MHA cannot rotate heads of an odd size
        changes["pos_emb"] = "learned"
    model = costs.on_meta(config)
    mha = costs.on_meta(dataclasses.replace(config, **changes))

    def parameters(model: GPT, *parts: str) -> int:
        named = model.named_parameters()
        return sum(p.numel() for name, p in named if any(part in name for part in parts))

    def bytes_per_token(model: GPT, dtype: torch.dtype) -> int:
        return model.make_cache(1, 1, dtype).bytes_per_token

    figures: dict[str, Callable[[GPT], int]] = {
        "parameters: embeddings and lm_head": lambda m: parameters(m, ".wte.", ".wpe."),
        "parameters: attention": lambda m: parameters(m, ".attn."),
        "parameters: MLPs": lambda m: parameters(m, ".mlp."),
        "parameters: all": lambda m: m.get_num_params(non_embedding=False),
        "of these, making keys and values": costs.count_kv_parameters,
        "cache bytes per token, float32": lambda m: bytes_per_token(m, torch.float32),
        "cache bytes per token, bfloat16": lambda m: bytes_per_token(m, torch.bfloat16),
        f"FLOPs per decoded token at {context:,}": lambda m: costs.flops_per_token(
            m, context, absorbed=True
        ),
        "FLOPs per trained token (forward and backward)": lambda m: (
            3 * costs.flops_per_token(m, config.block_size)
        ),
    }
    rows = []
    for name, figure in figures.items():
        this = figure(model)
        beside = figure(mha)
        row = {"": name, "this config": f"{this:,}", "MHA": f"{beside:,}"}
        row["MHA / this"] = f"{beside / this:.2f}" if this else "constant state"
        rows.append(row)
    shape = f"{config.n_layer} layers, {config.n_embd} wide, vocabulary {config.vocab_size:,}"
    return table(f"Counted from the tensors themselves: {shape}", rows)


def stored_config(source: str) -> GPTConfig:
    """The config of a run, an export or other weights."""
    model, *_ = checkpoint.build(formats.open_weights(source, prefer_best=True))
    return model.config


def with_token_ids(config: GPTConfig, vocab_size: int | None, dataset: str | None) -> GPTConfig:
    """The config with the vocab_size that a run with these settings has."""
    if vocab_size is None and dataset is not None:
        try:
            vocab_size = padded_vocab(Dataset(dataset, 1))
        except UserError as error:
            warn0(f"{error}; counted with a vocabulary of {config.vocab_size:,}")
    return dataclasses.replace(config, vocab_size=vocab_size or config.vocab_size)
