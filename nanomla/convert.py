"""
Weights made into other weights: values as low-rank factors, a shorter context, and ordinary
attention (MHA, GQA) as MLA.

Letters as in model.py: C = n_embd, nh heads, nkv key/value heads, hs head size, L latent, r rotary
numbers, rv value rank.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import GPT, GPTConfig, apply_rope, dense_values, factorise, truncated_svd
from nanomla.attention import Attention, Rotation
from nanomla.kernels import attend


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
    state = dict(state)
    shares = []
    first = (config.n_head + config.nkv) * config.hs  # of c_attn's rows that make values
    for i in range(config.n_layer):
        attn = f"transformer.h.{i}.attn."
        if attn + "v_up" in state:
            v_up = state.pop(attn + "v_up")
            heads = v_up.size(0)
            stored_rank = v_up.size(2)
            v_down = state.pop(attn + "v_down.weight").view(heads, stored_rank, -1)
            if config.svd_rank > stored_rank:
                problem = f"the checkpoint holds rank {stored_rank}"
                raise ValueError(f"svd_rank={config.svd_rank} does not work: {problem}")
            dense = v_up.float() @ v_down.float()
        elif attn + "v_expand.weight" in state:
            heads = config.n_head
            dense = state.pop(attn + "v_expand.weight")
        else:
            heads = config.nkv
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


# ---- Ordinary attention into MLA
#
# Keys and values of all heads are one linear map of the input x_j, so a factorisation B A of it
# gives the latent c_j = A x_j and the expansions B. What is left out is chosen with a metric F of
# errors in keys and values and the inputs' covariance S: with F^(1/2) [W_K; W_V] S^(1/2) = U s V^T
#
#     A = V_L^T S^(-1/2)    B = [W_K; W_V] S^(1/2) V_L    lost: the sum of s^2 beyond L
#
# of which each latent number is scaled freely.
#
# Key biases and the mean of the keys fall out of the softmax; value biases and the mean of the
# values pass through the average unchanged and move into c_proj's bias.
#
# Rotary keys cannot pass a latent, as their rotation comes after it. But the key heads can be mixed
# within a frequency without touching the rotation, if each pair that turns is one complex number
# (TransMLA, arXiv:2502.07864, mixes by real numbers). A few of the mixed pairs become the decoupled
# rotary key; the rest of the keys goes on as content, which has no position.
#
# Maps are float64 and affine, (rows, C + 1): the last column is the bias, for inputs x1 = [x; 1].

METHODS = ("plain", "input", "output", "loss")


class Maps(NamedTuple):
    """One layer of MHA or GQA as affine maps."""

    q: Tensor  # (nh, hs, C + 1)
    k: Tensor  # (nkv, hs, C + 1)
    v: Tensor  # (nkv, hs, C + 1)
    out: Tensor  # (C, nh, hs), c_proj's weight


@dataclass(frozen=True)
class Plan:
    """
    How ordinary attention is made into MLA.

    method: what the truncation is weighted by. 'plain': nothing, S = F = 1. 'input': S. 'output': S
    and, as F, E[q q^T] / hs for the keys of a head and W_O^T W_O for its values. 'loss': S and the
    loss's own second derivatives, Calibration.gradients.
    """

    numbers: int  # cached per token and layer, rotary ones included
    method: str = "loss"
    rope_dim: int = 0  # how many of the numbers are rotary; 0 without rotary positions
    balance: float = 1.0  # the values' weight in F against the keys', for 'input' and 'output'
    spread: bool = True  # ranks by the singular values of all layers; else every layer's the same
    svd_method: str = "exact"


class LayerReport(NamedTuple):
    """What became of one layer."""

    latent: int  # L
    kept: float  # share of the squared singular values, of content keys and values
    predicted: float  # change of the loss to second order, by this layer alone, nats per token


@dataclass
class Calibration:
    """
    What ordinary attention does on some text: means over its tokens, float64, for every layer.

    inputs: x1 x1^T of the attention's input, (C + 1, C + 1).
    gradients: g g^T of the loss's gradient with respect to keys and values, (n, n). n = 2 nkv hs,
    keys before values; with rotary positions n = 3 nkv hs: rotary keys before their rotation,
    content keys, which stand beside them and are zero, values.

    The targets of that loss are drawn from the model's own predictions. So g g^T is its Fisher
    matrix in K-FAC's approximation (arXiv:1503.05671), and tr(g g^T D x1 x1^T D^T) / 2 is, to
    second order, how much an error D x1 in keys and values adds to the loss.
    """

    inputs: list[Tensor]
    gradients: list[Tensor]
    tokens: int = 0


def calibrate(model: GPT, batches: Iterable[Tensor]) -> Calibration:
    """
    Run a model, of MHA or GQA without SVD, on batches of ids (B, T), at least one.

    The result is on the CPU; products are in float64, those of gradients in float32 per batch.
    """
    config, device = model.config, model.lm_head.weight.device
    parts = 3 if config.rotary_dim else 2
    seen: list[tuple[Tensor, Tensor]] = []
    sums: list[list[Tensor]] = [[], []]
    tokens, draw = 0, torch.Generator(device).manual_seed(0)
    with _recorded(model, parts, seen):
        for idx in batches:
            seen.clear()
            with torch.enable_grad():
                logits = model(idx, all_logits=True)[0].flatten(0, 1).float()
            gradient = logits.detach().softmax(-1)  # of the cross-entropies' sum
            # torch.multinomial draws a number for every entry, which takes longer than the model
            u = torch.rand(len(logits), 1, generator=draw, device=device)
            target = torch.searchsorted(gradient.cumsum(-1), u).clamp_max(logits.size(1) - 1)
            gradient.scatter_add_(1, target, torch.full_like(target, -1, dtype=torch.float32))
            logits.backward(gradient)
            with torch.autocast(device.type, enabled=False):
                for layer, (x, added) in enumerate(seen):
                    x1 = F.pad(x.detach().flatten(0, 1).double(), (0, 1), value=1.0)
                    g = added.grad.float().flatten(0, 1).flatten(1)
                    for total, new in zip(sums, (x1.mT @ x1, (g.mT @ g).double()), strict=True):
                        if tokens == 0:
                            total.append(torch.zeros_like(new))
                        total[layer] += new
            tokens += idx.numel()
    inputs, gradients = ([total.cpu() / tokens for total in kind] for kind in sums)
    return Calibration(inputs, gradients, tokens)


@contextlib.contextmanager
def _recorded(model: GPT, parts: int, seen: list[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """
    Let every attention block append to `seen` its input and zeros that it adds to keys and values,
    (B, T, parts, nkv, hs). Nothing else has a gradient.
    """

    def recording(attn: Attention) -> Callable[..., Tensor]:
        def forward(x: Tensor, cache: None, rotation: Rotation) -> Tensor:
            (B, T, _), hs = x.shape, attn.hs
            q, k, v = (t.view(B, T, -1, hs) for t in attn.c_attn(x).split(attn.parts, dim=2))
            added = k.new_zeros(B, T, parts, *k.shape[2:]).requires_grad_(True)
            first, *content, last = added.unbind(2)
            k = torch.cat([apply_rope(k + first, rotation), *content], dim=-1)
            q = torch.cat([apply_rope(q, rotation), *[q] * len(content)], dim=-1)
            seen.append((x, added))
            q, k, v = (t.transpose(1, 2) for t in (q, k, v + last))
            k, v = (t.repeat_interleave(attn.nh // attn.nkv, dim=1) for t in (k, v))
            return attn._output(attend(q, k, v, scale=attn.scale))

        return forward

    blocks, training = model.transformer.h, model.training
    trained = [p for p in model.parameters() if p.requires_grad]
    model.eval().requires_grad_(False)
    try:
        for block in blocks:
            block.attn.forward = recording(block.attn)
        yield
    finally:
        for block in blocks:
            del block.attn.forward
        for p in trained:
            p.requires_grad_(True)
        model.train(training)


def without_svd(model: GPT) -> GPT:
    """A model of MHA or GQA with its low-rank values multiplied out; itself if it has none."""
    if not model.config.use_svd:
        return model
    state = model.state_dict()
    for i, block in enumerate(model.transformer.h):
        attn = f"transformer.h.{i}.attn."
        values = dense_values(block.attn.v_down.weight, block.attn.v_up).detach()
        del state[attn + "v_up"], state[attn + "v_down.weight"]
        for name, rows in (("weight", values), ("bias", values.new_zeros(len(values)))):
            if attn + f"c_attn.{name}" in state:
                state[attn + f"c_attn.{name}"] = torch.cat([state[attn + f"c_attn.{name}"], rows])
    return _assemble(dataclasses.replace(model.config, use_svd=False, svd_rank=None), state)


def to_mla(model: GPT, found: Calibration, plan: Plan) -> tuple[GPT, list[LayerReport]]:
    """
    A model on the CPU that computes nearly the same through a latent, and a report on every layer.

    model: MHA or GQA without SVD. found: what calibrate returned for it.
    The result has mla_norm='none' and, unless the source has none and the method is 'plain', biases
    everywhere. It is exact from the rank of the map on: min(C, 2 nkv hs) numbers with learned
    positions; with rotary ones rope_dim = nkv hs and min(C, nkv hs) more.
    Raises ValueError if plan.rope_dim is not an even number that the keys have and that leaves a
    latent.
    """
    config, n = model.config, model.config.nkv * model.config.hs
    limit = min(n, plan.numbers - 1) if config.rotary_dim else 0
    if plan.rope_dim % 2 or not 0 <= plan.rope_dim <= limit:
        works = f"an even number from 0 to {limit}"
        raise ValueError(f"rope_dim={plan.rope_dim} does not work: rope_dim must be {works}")
    layers = [_read_maps(block.attn) for block in model.transformer.h]
    inputs = found.inputs
    if plan.method == "plain":
        inputs = [torch.eye(len(moments), dtype=torch.float64) for moments in inputs]
    metrics = found.gradients
    if plan.method != "loss":
        metrics = [_metric(m, R, plan, config) for m, R in zip(layers, inputs, strict=True)]
    freqs, rotary = _split_rotary(layers, inputs, metrics, plan.rope_dim, config)
    targets = [
        torch.cat([part.content, maps.v.flatten(0, 1)])
        for part, maps in zip(rotary, layers, strict=True)
    ]
    factors = [
        _factorise_jointly(target, R, metric[-2 * n :, -2 * n :], plan)
        for target, R, metric in zip(targets, inputs, metrics, strict=True)
    ]
    # MLA's latent must be smaller than all keys and values, which matters for very narrow heads
    most = min(2 * config.n_head * config.hs - 1, *(len(factor.squares) for factor in factors))
    dims = _ranks([f.squares for f in factors], plan.numbers - plan.rope_dim, most, plan.spread)
    latent = dataclasses.replace(
        config, use_mla=True, mla_latent_dim=tuple(dims), mla_rope_dim=plan.rope_dim,
        mla_nope_dim=config.hs, mla_norm="none", n_kv_head=None, rope_freqs=freqs,
        bias=config.bias or plan.method != "plain",
        # a source with ordinary attention may have these settings without effect
        mla_groups=1, mla_rope="decoupled", mla_q_latent_dim=None, mla_share_latent=False,
    )  # fmt: skip
    state, reports = model.state_dict(), []
    for i, (maps, part, factor) in enumerate(zip(layers, rotary, factors, strict=True)):
        up, down = factor.up[:, : dims[i]], factor.down[: dims[i]]
        error = targets[i] - F.pad(up @ down, (0, 1))
        keys, values = error[:n], error[n:]
        moved = values @ inputs[i][:, -1]  # the mean of what is lost passes the average unchanged
        _write(state, f"transformer.h.{i}.attn.", maps, part, up, down, moved)
        values[:, -1] -= moved
        keys[:, -1] -= keys @ found.inputs[i][:, -1]  # it falls out of the softmax
        if config.rotary_dim:  # what was recorded are whole rotary keys beside content of zeros
            error = torch.cat([part.lost, keys - part.content, values])
        # tr(g g^T D x1 x1^T D^T) / 2, see Calibration
        predicted = ((found.gradients[i] @ error) * (error @ found.inputs[i])).sum() / 2
        kept = factor.squares[: dims[i]].sum() / factor.total
        reports.append(LayerReport(dims[i], float(kept), float(predicted)))
    return _assemble(latent, state), reports


class Converted(NamedTuple):
    """A conversion that was chosen."""

    plan: Plan
    model: GPT
    layers: list[LayerReport]


def choose(
    model: GPT,
    found: Calibration,
    plan: Plan,
    axes: dict[str, list[Any]],
    loss_of: Callable[[GPT], float],
) -> Converted:
    """
    The best of several plans by the loss of their models.

    axes: for fields of Plan the values to try. One field after the other is given its best value.
    """
    best, tried = Converted(plan, *to_mla(model, found, plan)), {plan}
    loss = loss_of(best.model) if axes else 0.0
    for name, values in axes.items():
        for value in values:
            other_plan = dataclasses.replace(best.plan, **{name: value})
            if other_plan in tried:
                continue
            tried.add(other_plan)
            other = Converted(other_plan, *to_mla(model, found, other_plan))
            if (new := loss_of(other.model)) < loss:
                best, loss = other, new
    return best


def _read_maps(attn: Attention) -> Maps:
    """Ordinary attention's weights."""
    weight, bias = attn.c_attn.weight.detach(), attn.c_attn.bias
    bias = weight.new_zeros(len(weight)) if bias is None else bias.detach()
    rows = torch.cat([weight, bias[:, None]], dim=1).double().cpu()
    q, k, v = (part.unflatten(0, (-1, attn.hs)) for part in rows.split(attn.parts))
    return Maps(q, k, v, attn.c_proj.weight.detach().double().cpu().unflatten(1, (attn.nh, -1)))


def _metric(maps: Maps, moments: Tensor, plan: Plan, config: GPTConfig) -> Tensor:
    """
    What stands for Calibration.gradients under the other methods.

    With rotary positions it is taken that queries attend to all earlier positions alike: the
    rotation of a frequency w then is, on average, the mean of e^(-i w d) over distances d.
    """
    nh, hs, n = config.n_head, config.hs, config.nkv * config.hs
    keys = values = torch.eye(n, dtype=torch.float64)
    if plan.method == "output":
        seen = torch.einsum("hac,cd,hbd->hab", maps.q, moments, maps.q) / hs  # E[q q^T] / hs
        read = torch.einsum("cha,chb->hab", maps.out, maps.out)  # W_O^T W_O
        shared = [t.unflatten(0, (-1, nh // config.nkv)).sum(1) for t in (seen, read)]
        keys, values = (torch.block_diag(*t) for t in shared)  # of the heads that share a key
    values = values * plan.balance**2
    if not config.rotary_dim:
        return torch.block_diag(keys, values)
    distance = torch.arange(config.block_size, dtype=torch.float64)
    angle, count = torch.outer(config.frequencies, distance), config.block_size - distance
    real, imag = ((f(angle) * count).sum(1) / count.sum() for f in (torch.cos, torch.sin))
    blocks = [torch.diag(real), torch.diag(imag), torch.diag(-imag), torch.diag(real)]
    turn = torch.cat([torch.cat(blocks[:2], dim=1), torch.cat(blocks[2:], dim=1)])  # (hs, hs)
    met = keys @ torch.block_diag(*[turn] * config.nkv)
    both = torch.cat([torch.cat([keys, met.mT], dim=1), torch.cat([met, keys], dim=1)])
    return torch.block_diag(both, values)


class Rotary(NamedTuple):
    """A layer's keys in two parts, the decoupled rotary key and content."""

    keys: Tensor  # (r, C + 1), shared by all heads
    queries: Tensor  # (nh, r, C + 1)
    lost: Tensor  # (nkv * hs, C + 1), the rest of the keys
    content: Tensor  # (nkv * hs, C + 1), the keys without position that stand for it best


def _split_rotary(
    layers: list[Maps], inputs: list[Tensor], metrics: list[Tensor], r: int, config: GPTConfig
) -> tuple[tuple[float, ...] | None, list[Rotary]]:
    """
    The frequencies of r / 2 rotary pairs, the same in all layers, and every layer's keys.

    Of every frequency's key heads, which are complex numbers, the principal ones are taken, by what
    the metric says that they are worth beyond what content without position can stand for.
    With learned positions all keys are content.
    """
    if not config.rotary_dim:
        return None, [
            Rotary(m.k[:0].flatten(0, 1), m.q[:, :0], m.k[:0].flatten(0, 1), m.k.flatten(0, 1))
            for m in layers
        ]
    n, worth, found = config.nkv * config.hs, 0.0, []
    for maps, moments, metric in zip(layers, inputs, metrics, strict=True):
        rotary, met, content = metric[:n, :n], metric[n : 2 * n, :n], metric[n : 2 * n, n : 2 * n]
        floor = 1e-6 * content.diagonal().mean() * torch.eye(n, dtype=torch.float64)
        as_content = torch.linalg.solve(content + floor, met)  # (n, n), the best c for a key k
        value = _complex_blocks(rotary - met.mT @ as_content, config)  # (hs / 2, nkv, nkv)
        k = _complex_rows(maps.k)  # (hs / 2, nkv, C + 1)
        root, inverse = _roots(k @ moments.to(k) @ k.mH)
        squares, U = torch.linalg.eigh(root @ value @ root)
        squares, U = squares.flip(-1), U.flip(-1)  # (hs / 2, nkv), largest first
        found.append((as_content, k, root @ U, U.mH @ inverse @ k))
        worth = worth + squares
    order = worth.flatten().argsort(descending=True, stable=True)[: r // 2].sort().values
    freq, place = order // config.nkv, order % config.nkv
    parts = []
    for maps, (as_content, k, up, down) in zip(layers, found, strict=True):
        weight, chosen = _balanced(up[freq, :, place].mT, down[freq, place])
        weight = weight.mT  # (r / 2, nkv), of chosen (r / 2, C + 1)
        q = _complex_rows(maps.q)[freq]  # (r / 2, nh, C + 1)
        q = weight.conj().repeat_interleave(q.size(1) // config.nkv, dim=1)[..., None] * q
        kept = torch.zeros_like(k).index_add_(0, freq, weight[..., None] * chosen[:, None])
        lost = torch.cat([(k - kept).real, (k - kept).imag]).transpose(0, 1).flatten(0, 1)
        keys, queries = (torch.cat([t.real, t.imag]) for t in (chosen, q))
        parts.append(Rotary(keys, queries.transpose(0, 1), lost, as_content @ lost))
    return tuple(config.frequencies[freq].tolist()) or None, parts


def _complex_rows(maps: Tensor) -> Tensor:
    """(heads, hs, C + 1) as complex numbers of each frequency, (hs / 2, heads, C + 1)."""
    a, b = maps.chunk(2, dim=1)
    return torch.complex(a, b).transpose(0, 1)


def _complex_blocks(A: Tensor, config: GPTConfig) -> Tensor:
    """A quadratic form (nkv * hs, nkv * hs), averaged over the rotations of each frequency."""
    A = A.view(config.nkv, 2, config.hs // 2, config.nkv, 2, config.hs // 2)
    A = A.diagonal(dim1=2, dim2=5).movedim(-1, 0)  # (hs / 2, nkv, 2, nkv, 2)
    real, imag = A[:, :, 0, :, 0] + A[:, :, 1, :, 1], A[:, :, 1, :, 0] - A[:, :, 0, :, 1]
    return torch.complex(real, imag) / 2  # (hs / 2, nkv, nkv)


def _roots(A: Tensor) -> tuple[Tensor, Tensor]:
    """A^(1/2) and A^(-1/2) of positive matrices; no eigenvalue is below 1e-9 of the largest."""
    w, V = torch.linalg.eigh(A)
    root = w.clamp_min((1e-9 * w[..., -1:]).clamp_min(1e-300)).sqrt().unsqueeze(-2)
    return (V * root) @ V.mH, (V / root) @ V.mH


class Factors(NamedTuple):
    """target = up @ down; their first L columns and rows are the best of rank L."""

    up: Tensor  # (rows, rank)
    down: Tensor  # (rank, C), for inputs of mean zero
    squares: Tensor  # (rank,), what each adds
    total: Tensor  # what all would add


def _factorise_jointly(target: Tensor, moments: Tensor, metric: Tensor, plan: Plan) -> Factors:
    """Factors of the keys' and values' map, target (rows, C + 1); what counts most comes first."""
    W, mean = target[:, :-1], moments[:-1, -1]
    root, inverse = _roots(moments[:-1, :-1] - torch.outer(mean, mean))
    weighted = _roots(metric)[0] @ W @ root
    # randomized: up to four times the average rank, as one layer may get more than its share
    _, s, Vh = truncated_svd(weighted, min(4 * plan.numbers, min(W.shape)), plan.svd_method)
    up, down = _balanced(W @ root @ Vh.mT, Vh @ inverse)
    return Factors(up, down, s.square(), weighted.square().sum())


def _balanced(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """
    Scale the columns of up and the rows of down so that weights of both are of one size. The
    product stays; training goes on better than with rows of down that make numbers of variance 1
    (docs/conversion.md).
    """
    sizes = [t.abs().square().mean(dim) for t, dim in ((up, 0), (down, 1))]
    gain = (sizes[0] / sizes[1]).pow(0.25).clamp_min(1e-9)
    return up / gain, down * gain[:, None]


def _ranks(spectra: list[Tensor], L: int, most: int, spread: bool) -> list[int]:
    """
    The rank of every layer, L on average and at most `most`.

    spread: the next step goes to the layer that gains most. A step is the power of two from L / 16
    to L / 8, or 1, so that large widths are multiples of a power of two.
    """
    L = min(L, most)
    if not spread:
        return [L] * len(spectra)
    step = 1 << max(L.bit_length() - 4, 0)
    dims, left = [step] * len(spectra), (L - step) * len(spectra)
    while left:
        held = zip(spectra, dims, strict=True)
        gains = [float(s[d : d + step].sum()) if d < most else -1.0 for s, d in held]
        layer = gains.index(max(gains))
        add = min(step, most - dims[layer], left)
        dims[layer], left = dims[layer] + add, left - add
    return dims


def _write(
    state: dict[str, Tensor], attn: str, maps: Maps, part: Rotary, up: Tensor, down: Tensor,
    moved: Tensor,
) -> None:  # fmt: skip
    """Replace a layer's ordinary attention in a state dict by MLA; moved: the values' constants."""
    nh, hs, nkv, r = *maps.q.shape[:2], len(maps.k), len(part.keys)
    # a query head is hs + r wide and its scores are scaled by 1 / sqrt(hs + r)
    q = torch.cat([maps.q, part.queries], dim=1).flatten(0, 1) * math.sqrt((hs + r) / hs)
    down = torch.cat([F.pad(down, (0, 1)), part.keys])
    k, v = (t.unflatten(0, (nkv, hs)) for t in up.chunk(2))
    k, v = (t.repeat_interleave(nh // nkv, dim=0).flatten(0, 1) for t in (k, v))
    moved = moved.view(nkv, hs).repeat_interleave(nh // nkv, dim=0)
    moved = torch.einsum("chd,hd->c", maps.out, moved)
    bias, like = state.pop(attn + "c_proj.bias", 0), state[attn + "c_proj.weight"]
    del state[attn + "c_attn.weight"]
    state.pop(attn + "c_attn.bias", None)
    new = {"c_proj.bias": moved + bias, "k_expand.weight": k, "v_expand.weight": v}
    for name, rows in (("q_proj", q), ("kv_latent_proj", down)):
        new |= {f"{name}.weight": rows[:, :-1], f"{name}.bias": rows[:, -1]}
    state.update({attn + name: t.to(like) for name, t in new.items()})


def _assemble(config: GPTConfig, state: dict[str, Tensor]) -> GPT:
    """The model of a state dict, on the CPU; biases that it lacks are zero, others are left out."""
    with torch.device("meta"):
        model = GPT(config)
    weights = {}
    for name, like in model.state_dict().items():
        zero = torch.zeros(like.shape) if name.endswith(".bias") else None
        weights[name] = state.get(name, zero).detach().to("cpu", like.dtype, copy=True)
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    return model.eval()
