"""
Weights made into other weights: values as low-rank factors, and a shorter context.

Letters as in model.py: C = n_embd, nh heads, hs head size, L latent, rv value rank.
"""

import torch
from torch import Tensor, nn

from model import GPT, GPTConfig

SVD_SETTINGS = ("use_svd", "svd_rank", "svd_method")  # of GPTConfig


def factorise(W: Tensor, rank: int, method: str = "exact") -> tuple[Tensor, Tensor, float]:
    """
    Truncated SVD of every head's value map, the singular values split evenly between the factors.

    W: (nh, hs, in), from the attention's input (C numbers, or L with MLA) to the head's values.
    rank: from 1 to hs. method: 'exact' is torch.linalg.svd, 'randomized' is Halko's range finder
    (arXiv:0909.4061) with a fixed seed; both compute in float64.
    Returns v_down (nh * rank, in) and v_up (nh, hs, rank), so that v_up[h] @ v_down[h] is the best
    approximation of W[h] of that rank, and the share of the squared singular values that is kept.
    """
    nh, hs, width = W.shape
    W64 = W.detach().double()
    if method == "randomized" and rank < min(hs, width):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            U, sv, V = torch.svd_lowrank(W64.cpu(), q=min(rank + 8, hs, width), niter=4)
        U, sv, Vh = U.to(W.device), sv.to(W.device), V.mT.to(W.device)
    else:
        U, sv, Vh = torch.linalg.svd(W64, full_matrices=rank > width)
    root = sv[:, :rank].sqrt()  # (nh, min(rank, width))
    v_up = U[:, :, :rank].clone()  # (nh, hs, rank)
    v_down = W64.new_zeros(nh, rank, width)
    # With rank > width there are only `width` singular values. The rows of v_down beyond them stay
    # zero, while the columns of v_up keep their directions, so that training can use them.
    v_down[:, : root.size(1)] = Vh[:, : root.size(1)] * root[:, :, None]
    v_up[:, :, : root.size(1)] *= root[:, None, :]
    total = W64.square().sum()
    kept = float(sv[:, :rank].square().sum() / total) if total > 0 else 1.0
    return v_down.reshape(nh * rank, width).to(W), v_up.to(W), kept


def factorise_values(
    state: dict[str, Tensor], config: GPTConfig
) -> tuple[dict[str, Tensor], float]:
    """
    Factorise the values of every layer in a GPT's state dict.

    state: of a model without SVD, or of one whose svd_rank is at least config.svd_rank. The values
    of a layer are the last C rows of attn.c_attn.weight (3 C, C) with MHA, attn.v_expand.weight
    (nh * hs, L) with MLA, and attn.v_up (nh, hs, rank) times attn.v_down.weight (nh * rank, C or L)
    with SVD.
    config: of the model to make, with use_svd=True.
    Returns a state dict for `config`, which has attn.v_up (nh, hs, rv) and attn.v_down.weight
    (nh * rv, C or L) in their place, and the share of the squared singular values that is kept,
    averaged over the layers.
    Raises ValueError if `state` has a lower rank than config.svd_rank, and KeyError if a weight is
    missing.

    A value bias passes through attention unchanged, because the weights of the average sum to one.
    So it moves into c_proj's bias.
    """
    state, shares = dict(state), []
    heads = config.n_head if config.use_mla else config.nkv
    first = (config.n_head + config.nkv) * config.hs  # of c_attn's rows that make values
    for i in range(config.n_layer):
        attn = f"transformer.h.{i}.attn."
        if attn + "v_up" in state:
            v_up = state.pop(attn + "v_up")
            stored_rank = v_up.size(2)
            v_down = state.pop(attn + "v_down.weight").view(heads, stored_rank, -1)
            if config.svd_rank > stored_rank:
                problem = f"the checkpoint holds rank {stored_rank}"
                raise ValueError(f"svd_rank={config.svd_rank} does not work: {problem}")
            dense = v_up.float() @ v_down.float()
        elif config.use_mla:
            dense = state.pop(attn + "v_expand.weight")
        else:
            dense = state[attn + "c_attn.weight"][first:]
            state[attn + "c_attn.weight"] = state[attn + "c_attn.weight"][:first].clone()
            if attn + "c_attn.bias" in state:
                bias = state[attn + "c_attn.bias"]
                state[attn + "c_attn.bias"] = bias[:first].clone()
                shared = bias[first:].view(heads, -1)  # by n_head / heads query heads each
                shared = shared.repeat_interleave(config.n_head // heads, dim=0)
                moved = state[attn + "c_proj.weight"] @ shared.flatten()
                state[attn + "c_proj.bias"] = state[attn + "c_proj.bias"] + moved
        dense = dense.reshape(heads, config.hs, -1)
        v_down, v_up, share = factorise(dense, config.svd_rank, config.svd_method)
        state[attn + "v_up"], state[attn + "v_down.weight"] = v_up, v_down
        shares.append(share)
    return state, sum(shares) / len(shares)


def crop_block_size(model: GPT, block_size: int) -> None:
    """Shorten a model's context, e.g. of GPT-2's weights. Raises ValueError for a longer one."""
    limit = model.config.block_size
    if not 1 <= block_size <= limit:
        works = f"block_size must be from 1 to the model's {limit}"
        raise ValueError(f"block_size={block_size} does not work: {works}")
    model.config.block_size = block_size
    if model.config.pos_emb == "learned":
        wpe = model.transformer.wpe
        wpe.weight = nn.Parameter(wpe.weight[:block_size].detach().clone())
