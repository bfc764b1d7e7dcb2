"""
Weights made into other weights: values as low-rank factors, a shorter context, and ordinary
attention (MHA, GQA) as MLA. nanomla/conversion.py measures the results and chooses among them.

Letters as in model.py: C = n_embd, nh heads, nkv key/value heads, hs head size, L latent, r rotary
numbers, rv value rank. Besides: n = nkv * hs, the keys of a token, which has as many values.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import GPT, GPTConfig, apply_rope, dense_values, factorise, truncated_svd
from nanomla.attention import Attention, Rotation
from nanomla.checks import require
from nanomla.kernels import attend


# ---- Values as low-rank factors, a shorter context
def factorise_values(
    state: dict[str, Tensor], config: GPTConfig
) -> tuple[dict[str, Tensor], float]:
    """
    A GPT's state dict with factorised values for `config`, which has use_svd=True: attn.v_up
    (nh, hs, rv) times attn.v_down.weight (nh * rv, C or L). With it, the share of the squared
    singular values that is kept, averaged over the layers.

    Raises ValueError if `state` has SVD of a lower rank than config.svd_rank.
    """
    state = dict(state)
    shares = []
    blocks = [f"transformer.h.{layer}." for layer in range(config.n_layer)]
    if config.n_predict:
        blocks.append("predictor.h.")
    for block in blocks:
        attn = f"{block}attn."
        dense = _pop_values(state, attn, config)
        down, up, share = factorise(dense, config.svd_rank, config.svd_method)
        state[attn + "v_up"] = up
        state[attn + "v_down.weight"] = down
        shares.append(share)
    return state, sum(shares) / len(shares)


def _pop_values(state: dict[str, Tensor], attn: str, config: GPTConfig) -> Tensor:
    """
    Take a layer's value maps out of a state dict: (heads, hs, C or L), one for each head. A value
    bias passes through attention unchanged, because the weights of the average sum to one. So it
    moves into c_proj's bias.
    """
    if attn + "v_up" in state:
        up = state.pop(attn + "v_up")
        heads, _, rank = up.shape
        down = state.pop(attn + "v_down.weight").view(heads, rank, -1)
        if config.svd_rank > rank:
            problem = f"the checkpoint holds rank {rank}"
            raise ValueError(f"svd_rank={config.svd_rank} does not work: {problem}")
        return up.float() @ down.float()
    if attn + "v_expand.weight" in state:
        return state.pop(attn + "v_expand.weight").reshape(config.n_head, config.hs, -1)
    first = (config.n_head + config.nkv) * config.hs  # of c_attn's rows that make values
    weight = state[attn + "c_attn.weight"]
    state[attn + "c_attn.weight"] = weight[:first].clone()
    if attn + "c_attn.bias" in state:
        bias = state[attn + "c_attn.bias"]
        state[attn + "c_attn.bias"] = bias[:first].clone()
        of_key_heads = bias[first:].view(config.nkv, -1)
        of_query_heads = of_key_heads.repeat_interleave(config.n_head // config.nkv, dim=0)
        moved = state[attn + "c_proj.weight"] @ of_query_heads.flatten()
        state[attn + "c_proj.bias"] = state[attn + "c_proj.bias"] + moved
    return weight[first:].reshape(config.nkv, config.hs, -1)


def crop_block_size(model: GPT, block_size: int) -> None:
    """Shorten a model's context, e.g. of GPT-2's weights. Raises ValueError for a longer one."""
    limit = model.config.block_size
    allowed = f"from 1 to the model's {limit}"
    require(1 <= block_size <= limit, "block_size", block_size, allowed)
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
    rope_dim: int = 0  # rotary numbers: even, at most n, 0 without rotary positions
    balance: float = 1.0  # the values' weight in F against the keys', for 'input' and 'output'
    spread: bool = True  # ranks by the singular values of all layers; else every layer's the same
    svd_method: str = "exact"


class LayerReport(NamedTuple):
    """What became of one layer."""

    latent: int  # L
    kept: float  # share of the squared singular values, of content keys and values
    predicted: float  # change of the loss to second order, by this layer alone, nats per token


def to_mla(
    model: GPT, calibration: "Calibration", plan: Plan
) -> tuple[GPT, list[LayerReport]]:
    """
    A model on the CPU that computes nearly the same through a latent, and a report on every layer.

    model: MHA or GQA without SVD. calibration: what calibrate returned for it.
    The result has mla_norm='none' and, unless the source has none and the method is 'plain', biases
    everywhere. It is exact from the rank of the map on: min(C, 2 n) numbers with learned positions;
    with rotary ones rope_dim = n and min(C, n) more.
    """
    config = model.config
    n = config.nkv * config.hs
    layers = [_read_maps(block.attn) for block in model.transformer.h]
    moments = calibration.inputs
    if plan.method == "plain":
        moments = torch.eye(config.n_embd + 1, dtype=torch.float64).expand_as(moments)
    metrics = calibration.gradients
    if plan.method != "loss":
        metrics = [_metric(maps, moments[i], plan, config) for i, maps in enumerate(layers)]
    frequencies, keys = _split_keys(layers, moments, metrics, plan.rope_dim, config)
    targets = []
    factors = []
    for i, maps in enumerate(layers):
        target = torch.cat([keys[i].content, maps.values.flatten(0, 1)])  # (2 n, C + 1)
        targets.append(target)
        content_metric = metrics[i][-2 * n :, -2 * n :]
        factors.append(_factorise_jointly(target, moments[i], content_metric, plan))
    ranks = _ranks([f.squares for f in factors], plan, config)

    state = model.state_dict()
    reports = []
    for i, maps in enumerate(layers):
        up = factors[i].up[:, : ranks[i]]
        down = factors[i].down[: ranks[i]]
        error = targets[i] - F.pad(up @ down, (0, 1))  # (2 n, C + 1), of content keys and values
        means = error[n:] @ moments[i][:, -1]  # of what values lack; they pass the average
        _write_mla(state, f"transformer.h.{i}.attn.", maps, keys[i], up, down, means)
        error[n:, -1] -= means
        error[:n, -1] -= error[:n] @ calibration.inputs[i][:, -1]  # it falls out of the softmax
        if config.rotary_dim:  # calibration has whole rotary keys beside content of zeros
            error = torch.cat([keys[i].lost, error[:n] - keys[i].content, error[n:]])
        share = factors[i].squares[: ranks[i]].sum() / factors[i].total
        predicted = calibration.change_of_loss(error, i)
        reports.append(LayerReport(ranks[i], float(share), predicted))
    config = dataclasses.replace(
        config, use_mla=True, mla_latent_dim=tuple(ranks), mla_rope_dim=plan.rope_dim,
        mla_nope_dim=config.hs, mla_norm="none", rope_freqs=frequencies,
        bias=config.bias or plan.method != "plain",
        # a source with ordinary attention may have these settings without effect
        n_kv_head=None, mla_groups=1, mla_rope="decoupled", mla_q_latent_dim=None,
        mla_share_latent=False, mla_share_cache=1, mla_split=False,
    )
    return _assemble(config, state), reports


class Maps(NamedTuple):
    """One layer of MHA or GQA as affine maps."""

    queries: Tensor  # (nh, hs, C + 1)
    keys: Tensor  # (nkv, hs, C + 1)
    values: Tensor  # (nkv, hs, C + 1)
    output: Tensor  # (C, nh, hs), c_proj's weight


def _read_maps(attn: Attention) -> Maps:
    """The maps of ordinary attention, from its weights."""
    weight = attn.c_attn.weight.detach()
    bias = weight.new_zeros(len(weight))
    if attn.c_attn.bias is not None:
        bias = attn.c_attn.bias.detach()
    rows = torch.cat([weight, bias[:, None]], dim=1).double().cpu()
    queries, keys, values = (part.unflatten(0, (-1, attn.hs)) for part in rows.split(attn.parts))
    output = attn.c_proj.weight.detach().double().cpu().unflatten(1, (attn.nh, attn.hs))
    return Maps(queries, keys, values, output)


# ---- What attention does on some text
@dataclass
class Calibration:
    """
    What ordinary attention does on some text: means over its tokens, float64, for every layer.

    The targets of the loss are drawn from the model's own predictions. So g g^T is its Fisher
    matrix in K-FAC's approximation (arXiv:1503.05671).
    """

    # x1 x1^T of the attention's input: (n_layer, C + 1, C + 1)
    inputs: Tensor
    # g g^T of the loss's gradient with respect to keys and values: (n_layer, 2 n, 2 n), keys before
    # values. With rotary positions (n_layer, 3 n, 3 n): rotary keys before their rotation, content
    # keys, which stand beside them and are zero, values.
    gradients: Tensor
    tokens: int

    def change_of_loss(self, error: Tensor, layer: int) -> float:
        """
        How much an error D x1 in keys and values of a layer adds to the loss, to second order, in
        nats per token: tr(g g^T D x1 x1^T D^T) / 2. error: D, (2 n or 3 n, C + 1).
        """
        return float(((self.gradients[layer] @ error) * (error @ self.inputs[layer])).sum() / 2)


def calibrate(model: GPT, batches: Iterable[Tensor]) -> Calibration:
    """
    Run a model, of MHA or GQA without SVD, on batches of ids (B, T), at least one. It is left in
    evaluation mode, and its weights without gradients.

    The result is on the CPU; products are in float64, those of gradients in float32 per batch.
    """
    config = model.config
    n = config.nkv * config.hs
    device = model.lm_head.weight.device
    parts = 3 if config.rotary_dim else 2  # see Calibration.gradients
    zeros = functools.partial(torch.zeros, dtype=torch.float64, device=device)
    inputs = zeros(config.n_layer, config.n_embd + 1, config.n_embd + 1)
    gradients = zeros(config.n_layer, parts * n, parts * n)
    tokens = 0
    generator = torch.Generator(device).manual_seed(0)
    recorded: list[tuple[Tensor, Tensor]] = []
    model.eval().requires_grad_(False)
    for block in model.transformer.h:
        block.attn.forward = functools.partial(_recorded_attention, block.attn, recorded)
    for idx in batches:
        recorded.clear()
        _backward_from_drawn_targets(model, idx, generator)
        with torch.autocast(device.type, enabled=False):
            for layer, (x, added) in enumerate(recorded):
                x1 = F.pad(x.detach().flatten(0, 1).double(), (0, 1), value=1.0)
                g = added.grad.float().flatten(0, 1).flatten(1)  # (B * T, parts * n)
                inputs[layer] += x1.mT @ x1
                gradients[layer] += (g.mT @ g).double()
        tokens += idx.numel()
    for block in model.transformer.h:
        del block.attn.forward
    return Calibration(inputs.cpu().div_(tokens), gradients.cpu().div_(tokens), tokens)


def _backward_from_drawn_targets(model: GPT, idx: Tensor, generator: torch.Generator) -> None:
    """
    Backpropagate the sum of the cross-entropies of ids (B, T), whose targets are drawn from the
    model's own predictions p. Its gradient with respect to the logits is p - onehot(target).
    """
    logits = model(idx, all_logits=True)[0].flatten(0, 1).float()  # (B * T, V)
    gradient = logits.detach().softmax(-1)
    # torch.multinomial draws a number for every entry, which takes longer than the model
    drawn = torch.rand(len(logits), 1, generator=generator, device=logits.device)
    target = torch.searchsorted(gradient.cumsum(-1), drawn).clamp_max(logits.size(1) - 1)
    gradient.scatter_add_(1, target, torch.full_like(target, -1, dtype=torch.float32))
    logits.backward(gradient)


def _recorded_attention(
    attn: Attention, recorded: list[tuple[Tensor, Tensor]], x: Tensor, cache: None,
    rotation: Rotation,
) -> Tensor:
    """
    Ordinary attention that appends to `recorded` its input x (B, T, C) and zeros that it adds to
    keys and values, (B, T, 2 or 3, nkv, hs), whose parts are those of Calibration.gradients.
    """
    B, T, _ = x.shape
    q, k, v = (part.unflatten(2, (-1, attn.hs)) for part in attn.c_attn(x).split(attn.parts, 2))
    parts = 2 if rotation is None else 3
    added = k.new_zeros(B, T, parts, attn.nkv, attn.hs).requires_grad_(True)
    recorded.append((x, added))
    if rotation is None:
        to_keys, to_values = added.unbind(2)
        k = k + to_keys
    else:  # content keys meet queries that are not rotated
        to_keys, content, to_values = added.unbind(2)
        k = torch.cat([apply_rope(k + to_keys, rotation), content], dim=-1)
        q = torch.cat([apply_rope(q, rotation), q], dim=-1)
    k = k.transpose(1, 2).repeat_interleave(attn.nh // attn.nkv, dim=1)
    v = (v + to_values).transpose(1, 2).repeat_interleave(attn.nh // attn.nkv, dim=1)
    return attn._output(attend(q.transpose(1, 2), k, v, scale=attn.scale), x)


# ---- The metric F of the methods that do without the loss
def _metric(maps: Maps, moments: Tensor, plan: Plan, config: GPTConfig) -> Tensor:
    """
    What stands for a layer's Calibration.gradients, in its order, under the other methods.

    With rotary positions it is taken that queries attend to all earlier positions alike. With K for
    an error in rotary keys k, and the mean rotation R, that of [k; content c] then is
    [[K, R^T K]; [K R, K]].
    """
    n = config.nkv * config.hs
    keys = torch.eye(n, dtype=torch.float64)
    values = torch.eye(n, dtype=torch.float64)
    if plan.method == "output":
        read_by = torch.einsum("hac,cd,hbd->hab", maps.queries, moments, maps.queries)  # E[q q^T]
        written = torch.einsum("cha,chb->hab", maps.output, maps.output)  # W_O^T W_O
        keys = _block_diagonal(read_by / config.hs, config)
        values = _block_diagonal(written, config)
    values = values * plan.balance**2
    if not config.rotary_dim:
        return torch.block_diag(keys, values)
    turn = torch.block_diag(*[_mean_rotation(config)] * config.nkv)
    rotary_to_content = keys @ turn
    rotary_rows = torch.cat([keys, rotary_to_content.mT], dim=1)
    content_rows = torch.cat([rotary_to_content, keys], dim=1)
    return torch.block_diag(torch.cat([rotary_rows, content_rows]), values)


def _block_diagonal(of_heads: Tensor, config: GPTConfig) -> Tensor:
    """Forms of query heads (nh, hs, hs), summed over those that share a key head: (n, n)."""
    shared = of_heads.unflatten(0, (-1, config.n_head // config.nkv)).sum(1)  # (nkv, hs, hs)
    return torch.block_diag(*shared)


def _mean_rotation(config: GPTConfig) -> Tensor:
    """
    The rotation between two positions, averaged over all pairs of them: (hs, hs). For a frequency w
    that is the mean of e^(-i w d) over distances d, each of which block_size - d pairs have.
    """
    distance = torch.arange(config.block_size, dtype=torch.float64)
    pairs = config.block_size - distance
    angle = torch.outer(config.frequencies, distance)  # (hs / 2, block_size)
    cos = torch.diag((angle.cos() * pairs).sum(1) / pairs.sum())
    sin = torch.diag((angle.sin() * pairs).sum(1) / pairs.sum())
    return torch.cat([torch.cat([cos, sin], dim=1), torch.cat([-sin, cos], dim=1)])


# ---- Rotary keys
class SplitKeys(NamedTuple):
    """A layer's keys in two parts, the decoupled rotary key and content."""

    rotary: Tensor  # (r, C + 1), shared by all heads
    queries: Tensor  # (nh, r, C + 1), what meets it
    lost: Tensor  # (n, C + 1), the rest of the keys
    content: Tensor  # (n, C + 1), the keys without position that stand for it best


class Components(NamedTuple):
    """The key heads of every frequency as principal components: keys = up @ down, complex."""

    keys: Tensor  # (hs / 2, nkv, C + 1)
    up: Tensor  # (hs / 2, nkv, nkv), a column for each component
    down: Tensor  # (hs / 2, nkv, C + 1), a row for each
    worth: Tensor  # (hs / 2, nkv), what each is worth beyond what content can stand for
    as_content: Tensor  # (n, n), from keys that are lost to the content that stands for them best


def _split_keys(
    layers: list[Maps], moments: Tensor, metrics: Iterable[Tensor], r: int, config: GPTConfig
) -> tuple[tuple[float, ...] | None, list[SplitKeys]]:
    """
    The frequencies of r / 2 rotary pairs, the same in all layers, and every layer's keys.

    The pairs are those components that are worth most, summed over the layers. With learned
    positions all keys are content.
    """
    if not config.rotary_dim:
        split = []
        for maps in layers:
            nothing = maps.keys.new_zeros(0, config.n_embd + 1)
            split.append(SplitKeys(nothing, maps.queries[:, :0], nothing, maps.keys.flatten(0, 1)))
        return None, split
    components = []
    for maps, inputs, metric in zip(layers, moments, metrics, strict=True):
        components.append(_principal_components(maps.keys, inputs, metric, config))
    worth = sum(layer.worth for layer in components).flatten()
    chosen = worth.argsort(descending=True, stable=True)[: r // 2].sort().values
    frequency = chosen // config.nkv
    component = chosen % config.nkv
    split = []
    for maps, layer in zip(layers, components, strict=True):
        split.append(_with_rotary_key(layer, maps.queries, frequency, component))
    frequencies = tuple(config.frequencies[frequency].tolist())
    return frequencies or None, split


def _principal_components(
    keys: Tensor, moments: Tensor, metric: Tensor, config: GPTConfig
) -> Components:
    """
    The principal components of a layer's key heads (nkv, hs, C + 1) within each frequency.

    moments: x1 x1^T, (C + 1, C + 1). metric: [[K, M^T]; [M, N]] of rotary and content keys, (2 n or
    more, ...). Keys k that are lost are best stood for by content N^(-1) M k, which leaves of their
    metric E = K - M^T N^(-1) M. Let W (nkv, C + 1) be a frequency's key heads as complex numbers,
    H = W x1 x1^T W^H and H^(1/2) E H^(1/2) = U diag(worth) U^H. Then down = U^H H^(-1/2) W and
    up = H^(1/2) U.
    """
    n = config.nkv * config.hs
    rotary = metric[:n, :n]
    rotary_to_content = metric[n : 2 * n, :n]
    content = metric[n : 2 * n, n : 2 * n]
    floor = 1e-6 * content.diagonal().mean() * torch.eye(n, dtype=torch.float64)
    as_content = torch.linalg.solve(content + floor, rotary_to_content)  # (n, n)
    remaining = _complex_form(rotary - rotary_to_content.mT @ as_content, config)
    complex_keys = _complex_rows(keys)
    root, inverse = _roots(complex_keys @ moments.to(complex_keys) @ complex_keys.mH)
    worth, directions = torch.linalg.eigh(root @ remaining @ root)
    worth = worth.flip(-1)  # largest first
    directions = directions.flip(-1)
    down = directions.mH @ inverse @ complex_keys
    return Components(complex_keys, root @ directions, down, worth, as_content)


def _with_rotary_key(
    layer: Components, queries: Tensor, frequency: Tensor, component: Tensor
) -> SplitKeys:
    """
    A layer's keys, whose rotary key has components (r / 2,) of frequencies (r / 2,). queries:
    (nh, hs, C + 1).
    """
    nkv = layer.keys.size(1)
    up, down = _balanced(layer.up[frequency, :, component].mT, layer.down[frequency, component])
    up = up.mT  # (r / 2, nkv), from a component to its part in the keys of every head
    complex_queries = _complex_rows(queries)[frequency]  # (r / 2, nh, C + 1)
    to_query_heads = up.conj().repeat_interleave(complex_queries.size(1) // nkv, dim=1)
    complex_queries = to_query_heads[..., None] * complex_queries
    in_keys = up[..., None] * down[:, None]  # (r / 2, nkv, C + 1)
    lost = layer.keys - torch.zeros_like(layer.keys).index_add_(0, frequency, in_keys)
    lost = torch.cat([lost.real, lost.imag]).transpose(0, 1).flatten(0, 1)  # (n, C + 1)
    return SplitKeys(
        torch.cat([down.real, down.imag]),
        torch.cat([complex_queries.real, complex_queries.imag]).transpose(0, 1),
        lost,
        layer.as_content @ lost,
    )


def _complex_rows(maps: Tensor) -> Tensor:
    """(heads, hs, C + 1) as complex numbers of each frequency, (hs / 2, heads, C + 1)."""
    real, imag = maps.chunk(2, dim=1)  # as apply_rope pairs them
    return torch.complex(real, imag).transpose(0, 1)


def _complex_form(form: Tensor, config: GPTConfig) -> Tensor:
    """A quadratic form (n, n), averaged over the rotations of each frequency: (hs / 2, nkv, nkv)"""
    pairs = config.hs // 2
    form = form.view(config.nkv, 2, pairs, config.nkv, 2, pairs)
    form = form.diagonal(dim1=2, dim2=5).movedim(-1, 0)  # (hs / 2, nkv, 2, nkv, 2)
    real = form[:, :, 0, :, 0] + form[:, :, 1, :, 1]
    imag = form[:, :, 1, :, 0] - form[:, :, 0, :, 1]
    return torch.complex(real, imag) / 2


# ---- Latents
class Factors(NamedTuple):
    """target = up @ down; their first L columns and rows are the best of rank L."""

    up: Tensor  # (2 n, rank)
    down: Tensor  # (rank, C), for inputs of mean zero
    squares: Tensor  # (rank,), s^2, what each adds
    total: Tensor  # what all would add


def _factorise_jointly(target: Tensor, moments: Tensor, metric: Tensor, plan: Plan) -> Factors:
    """
    A and B above for a layer's content keys and values, target (2 n, C + 1), with F = metric
    (2 n, 2 n) and S the covariance that moments (C + 1, C + 1) have. What counts most comes first.
    """
    weight = target[:, :-1]
    mean = moments[:-1, -1]
    root, inverse = _roots(moments[:-1, :-1] - torch.outer(mean, mean))
    metric_root, _ = _roots(metric)
    weighted = metric_root @ weight @ root
    # randomized: up to four times the average rank, as one layer may get more than its share
    most = min(4 * plan.numbers, min(weight.shape))
    _, singular, Vh = truncated_svd(weighted, most, plan.svd_method)
    up, down = _balanced(weight @ root @ Vh.mT, Vh @ inverse)
    return Factors(up, down, singular.square(), weighted.square().sum())


def _roots(A: Tensor) -> tuple[Tensor, Tensor]:
    """A^(1/2) and A^(-1/2) of positive matrices; no eigenvalue is below 1e-9 of the largest."""
    eigenvalues, V = torch.linalg.eigh(A)
    floor = (1e-9 * eigenvalues[..., -1:]).clamp_min(1e-300)
    root = eigenvalues.clamp_min(floor).sqrt().unsqueeze(-2)
    return (V * root) @ V.mH, (V / root) @ V.mH


def _balanced(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """
    Scale the columns of up and the rows of down so that weights of both are of one size. The
    product stays; training goes on better than with rows of down that make numbers of variance 1
    (docs/conversion.md).
    """
    up_size = up.abs().square().mean(0)
    down_size = down.abs().square().mean(1)
    gain = (up_size / down_size).pow(0.25).clamp_min(1e-9)
    return up / gain, down * gain[:, None]


def _ranks(squares: list[Tensor], plan: Plan, config: GPTConfig) -> list[int]:
    """
    The rank of every layer, plan.numbers - plan.rope_dim on average, by what each rank adds.

    spread: the next step goes to the layer that gains most. A step is the power of two from 1 / 16
    to 1 / 8 of the average, or 1, so that large widths are multiples of a power of two.
    """
    # MLA's latent must be smaller than all keys and values, which matters for very narrow heads
    most = min(2 * config.n_head * config.hs - 1, min(map(len, squares)))
    average = min(plan.numbers - plan.rope_dim, most)
    if not plan.spread:
        return [average] * len(squares)
    step = 1 << max(average.bit_length() - 4, 0)
    ranks = [step] * len(squares)
    left = (average - step) * len(squares)
    while left:
        gains = [-1.0] * len(squares)
        for layer, rank in enumerate(ranks):
            if rank < most:
                gains[layer] = float(squares[layer][rank : rank + step].sum())
        layer = gains.index(max(gains))
        more = min(step, most - ranks[layer], left)
        ranks[layer] += more
        left -= more
    return ranks


# ---- The model that is made
def _write_mla(
    state: dict[str, Tensor], attn: str, maps: Maps, keys: SplitKeys, up: Tensor, down: Tensor,
    value_means: Tensor,
) -> None:
    """
    Replace a layer's ordinary attention in a state dict by MLA.

    up (2 n, L), down (L, C): the latent's factors. value_means: (n,), the mean of what values lack,
    which moves into c_proj's bias.
    """
    nh, hs, _ = maps.queries.shape
    nkv = len(maps.keys)
    r = len(keys.rotary)
    # a query head is hs + r wide and its scores are scaled by 1 / sqrt(hs + r)
    queries = torch.cat([maps.queries, keys.queries], dim=1).flatten(0, 1)
    queries = queries * math.sqrt((hs + r) / hs)
    latent = torch.cat([F.pad(down, (0, 1)), keys.rotary])  # (L + r, C + 1)
    # an expansion, and a mean, for each query head
    k_expand, v_expand = up.unflatten(0, (2, nkv, hs)).repeat_interleave(nh // nkv, dim=1)
    means = value_means.view(nkv, hs).repeat_interleave(nh // nkv, dim=0)
    output_bias = torch.einsum("chd,hd->c", maps.output, means)
    like = state[attn + "c_proj.weight"]
    del state[attn + "c_attn.weight"]
    state.pop(attn + "c_attn.bias", None)
    new = {
        "c_proj.bias": output_bias + state.pop(attn + "c_proj.bias", 0),
        "k_expand.weight": k_expand.flatten(0, 1),
        "v_expand.weight": v_expand.flatten(0, 1),
        "q_proj.weight": queries[:, :-1],
        "q_proj.bias": queries[:, -1],
        "kv_latent_proj.weight": latent[:, :-1],
        "kv_latent_proj.bias": latent[:, -1],
    }
    for name, tensor in new.items():
        state[attn + name] = tensor.to(like)


def without_svd(model: GPT) -> GPT:
    """A model of MHA or GQA with its low-rank values multiplied out; itself if it has none."""
    if not model.config.use_svd:
        return model
    state = model.state_dict()
    for layer, block in enumerate(model.transformer.h):
        attn = f"transformer.h.{layer}.attn."
        values = dense_values(block.attn.v_down.weight, block.attn.v_up).detach()  # (n, C)
        del state[attn + "v_up"], state[attn + "v_down.weight"]
        state[attn + "c_attn.weight"] = torch.cat([state[attn + "c_attn.weight"], values])
        if attn + "c_attn.bias" in state:
            no_bias = values.new_zeros(len(values))
            state[attn + "c_attn.bias"] = torch.cat([state[attn + "c_attn.bias"], no_bias])
    return _assemble(dataclasses.replace(model.config, use_svd=False, svd_rank=None), state)


def _assemble(config: GPTConfig, state: dict[str, Tensor]) -> GPT:
    """The model of a state dict, on the CPU; biases that it lacks are zero, others are left out."""
    with torch.device("meta"):
        model = GPT(config)
    weights = {}
    for name, like in model.state_dict().items():
        tensor = state.get(name, torch.zeros(like.shape))
        weights[name] = tensor.detach().to("cpu", like.dtype, copy=True)
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    return model.eval()
