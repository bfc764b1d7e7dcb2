"""The SVD-in-forward experiment. Run: python -m pytest tests/test_svd_forward.py"""

import json

import pytest
import torch

from experiments.svd_forward import (
    SvdForwardAttention,
    decode,
    project,
    svd_forward_gpt,
    truncate,
)
from experiments.three_step import leak
from model import ATTENTION, GPT, rotation_alone
from nanomla.dataset import Dataset
from tests.conftest import TINY_MLA, fails_with_one_line, randomise, run, tiny_config

RANK = 3  # of values with hs = 6, so that half of their directions are lost


@pytest.mark.parametrize("T", [2, 5, 11])
def test_both_ways_are_the_best_approximation(T):
    """Rank min(R, T) and an error of the lost singular values alone, float64, 1e-12."""
    V = torch.randn(2, 4, T, 6, dtype=torch.float64)
    lost = torch.linalg.svdvals(V)[..., RANK:].square().sum(-1).sqrt()
    for low_rank in (truncate, project):
        out = low_rank(V, RANK)
        assert (torch.linalg.matrix_rank(out, rtol=1e-9) == min(RANK, T)).all()
        error = torch.linalg.matrix_norm(V - out)
        torch.testing.assert_close(error, lost, rtol=0, atol=1e-12)
    torch.testing.assert_close(project(V, RANK), truncate(V, RANK), rtol=0, atol=1e-12)


def test_projector_has_a_gradient_where_the_svd_has_none():
    """With equal singular values the SVD has no finite gradient; V P has the gradient times P."""
    grads = []
    for low_rank in (truncate, project):
        V = (2 * torch.eye(11, 6, dtype=torch.float64)).requires_grad_()
        low_rank(V, RANK).square().sum().backward()
        grads.append(V.grad)
    assert not grads[0].isfinite().all()
    torch.testing.assert_close(grads[1], 2 * project(V.detach(), RANK), rtol=0, atol=1e-12)


def test_equals_causal_attention_over_compressed_values():
    """Every sequence and head by itself, softmax written out, float64, 1e-12; full rank is MLA."""
    config = tiny_config(**TINY_MLA)
    mla = randomise(ATTENTION["mla"](config)).double()
    layers = {}
    for rank in (RANK, 6):
        layers[rank] = SvdForwardAttention(config, 0, rank).double()
        layers[rank].load_state_dict(mla.state_dict())
    x = torch.randn(3, 11, 24, dtype=torch.float64)
    rotation = rotation_alone(config, x, None)
    q = torch.cat(mla._split_queries(x, rotation), dim=-1)
    k, v = mla._keys_and_values(*mla._latents(x, rotation))
    past = torch.ones(11, 11, dtype=torch.bool).tril()
    rows = []
    for b in range(3):
        heads = []
        for h in range(4):
            scores = (q[b, h] @ k[b, h].T * mla.scale).masked_fill(~past, float("-inf"))
            heads.append(scores.softmax(-1) @ truncate(v[b, h], RANK))
        rows.append(mla.c_proj(torch.cat(heads, dim=1)))
    torch.testing.assert_close(layers[RANK](x), torch.stack(rows), rtol=0, atol=1e-12)
    torch.testing.assert_close(layers[6](x), mla(x), rtol=0, atol=1e-12)


def test_starts_from_the_weights_of_mla():
    """The same seed gives the same parameters by name, and the loss reaches all of them."""
    models = []
    for make in (GPT, lambda config: svd_forward_gpt(config, RANK)):
        torch.manual_seed(3)
        models.append(make(tiny_config(**TINY_MLA)))
    plain, compressed = (dict(model.named_parameters()) for model in models)
    assert list(plain) == list(compressed)
    assert all(torch.equal(plain[name], compressed[name]) for name in plain)
    idx = torch.randint(23, (2, 16))
    models[1](idx, idx)[1].backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in compressed.values())


def with_and_without(dataset, std):
    """A GPT with MLA, one with the same weights and the SVD in forward, and their data."""
    data = Dataset(str(dataset), 16)
    config = tiny_config(use_mla=True, mla_latent_dim=7, vocab_size=data.vocab_size)
    mla, compressed = randomise(GPT(config), std), svd_forward_gpt(config, RANK).eval()
    compressed.load_state_dict(mla.state_dict())
    return mla, compressed, data


def test_sees_the_future(dataset):
    """Another last token changes earlier logits, once there are more tokens than R; MLA's, none."""
    mla, compressed, data = with_and_without(dataset, std=0.3)
    assert leak(mla, data, "cpu") == 0
    assert leak(compressed, data, "cpu") > 1e-3
    idx = torch.randint(data.vocab_size - 1, (2, 16))
    other = idx.clone()
    other[:, -1] += 1
    change = compressed(idx, idx)[0][:, :-1] - compressed(other, idx)[0][:, :-1]
    assert bool((change.abs().amax(dim=(0, 2)) > 1e-6).all())
    idx, other = idx[:, -RANK:], other[:, -RANK:]  # no more tokens than R: nothing is lost
    change = compressed(idx, idx)[0][:, :-1] - compressed(other, idx)[0][:, :-1]
    assert change.abs().max() < 1e-5


def test_tokens_decoded_one_by_one_have_another_loss(dataset):
    """On prefixes MLA's loss is that of whole windows (float64, 1e-12); with the SVD it is not."""
    mla, compressed, data = with_and_without(dataset, std=1.0)
    whole, decoded = decode(mla.double(), data, "cpu", 50)
    assert abs(decoded - whole) < 1e-12
    whole, decoded = decode(compressed.double(), data, "cpu", 50)
    assert abs(decoded - whole) > 1e-3


def test_has_no_cache():
    """Values that change with every new token cannot be kept, and a cache is refused by name."""
    model = svd_forward_gpt(tiny_config(**TINY_MLA), RANK)
    with pytest.raises(ValueError, match="cache must be None"):
        model.generate(torch.zeros(1, 3, dtype=torch.long), 2)


def test_command_prints_and_writes_its_figures(dataset, tmp_path):
    """Both tables at the smallest sizes; the model with the SVD in forward alone leaks."""
    done = run(
        "experiments.svd_forward",
        f"--dataset={dataset}",
        "--max_iters=2",
        "--rounds=1",
        "--windows=2",
        "--rank=5",
        "--device=cpu",
        f"--json={tmp_path}/s.json",
    )
    assert done.returncode == 0, done.stderr
    short, long, mla, compressed, low_rank = json.loads((tmp_path / "s.json").read_text())["rows"]
    assert (short["decompositions"], long["decompositions"]) == ("48", "4")
    assert mla["leak"] == low_rank["leak"] == "0" and float(compressed["leak"]) > 0
    assert compressed["attention"] == "MLA, SVD in forward, R = 5"
    assert f"| {compressed['attention']} " in done.stdout


@pytest.mark.parametrize(
    ("args", "status", "words"),
    [
        (["--rank=0"], 2, ["rank", "at least 1"]),
        (["--rank=33"], 2, ["rank", "at most the head size 32"]),
        (["--n_latents=3"], 2, ["unknown setting n_latents"]),
        (["--dataset=no-such"], 1, ["no-such", "not prepared"]),
    ],
)
def test_bad_input_is_one_line(args, status, words):
    """Values out of range, settings of other scripts, a dataset that is not there."""
    assert fails_with_one_line(run("experiments.svd_forward", *args), status, *words)
