"""Optimizers and the learning rate. Run: python -m pytest tests/test_optim.py"""

import pytest
import torch

from model import GPT
from nanomla.errors import UserError
from nanomla.optim import (
    lr_factor,
    make_optimizers,
    orthogonalise,
    restore_optimizers,
    stacked_maps,
)
from nanomla.settings import flat
from nanomla.start import changed_settings
from tests.conftest import TINY_MLA, tiny_config
from train import TrainConfig


def test_one_batch_is_overfitted():
    """Both optimizers drive the loss on one batch to almost nothing."""
    for optimizer in ("adamw", "muon"):
        model = GPT(tiny_config(use_mla=True, use_svd=True, svd_rank=3))
        rates = {"learning_rate": 1e-2, "muon_learning_rate": 0.02, "weight_decay": 0.0}
        cfg = TrainConfig(optimizer=optimizer, **rates)
        optimizers = make_optimizers(model, cfg, "cpu").values()
        x, y = torch.randint(23, (2, 3, 16))
        for _ in range(100):
            loss = model(x, y)[1]
            loss.backward()
            for opt in optimizers:
                opt.step()
                opt.zero_grad()
        assert loss < 0.1, (optimizer, loss)


def test_adamw_is_the_written_out_formula():
    """Decoupled weight decay, and moments corrected for their start at zero."""
    model = GPT(tiny_config())
    cfg = TrainConfig(learning_rate=0.01, weight_decay=0.1, beta1=0.8, beta2=0.9)
    adamw = make_optimizers(model, cfg, "cpu")["adamw"]
    p = model.transformer.h[1].mlp.c_fc.weight
    expected = p.detach().clone()
    mean = torch.zeros_like(p)
    square = torch.zeros_like(p)
    for t in range(1, 4):
        p.grad = torch.randn_like(p)
        mean = 0.8 * mean + 0.2 * p.grad
        square = 0.9 * square + 0.1 * p.grad**2
        step = mean / (1 - 0.8**t) / ((square / (1 - 0.9**t)).sqrt() + 1e-8)
        expected = expected * (1 - 0.01 * 0.1) - 0.01 * step
        adamw.step()
    torch.testing.assert_close(p.detach(), expected)


def test_optimizer_groups():
    """
    AdamW decays tensors of two or more dimensions, as nanoGPT's does; Muon takes the blocks' 2-D
    weights and no others.
    """
    model = GPT(tiny_config(use_svd=True, svd_rank=3))
    adamw = make_optimizers(model, TrainConfig(), "cpu")["adamw"]
    assert [g["weight_decay"] for g in adamw.param_groups] == [0.1, 0.0]
    assert {p.dim() for p in adamw.param_groups[0]["params"]} == {2, 3}
    assert {p.dim() for p in adamw.param_groups[1]["params"]} == {1}
    both = make_optimizers(model, TrainConfig(optimizer="muon"), "cpu")
    muon = {id(p) for p in both["muon"].param_groups[0]["params"]}
    names = {n for n, p in model.named_parameters() if id(p) in muon}
    assert all(n.startswith("transformer.h.") for n in names) and len(names) == 2 * 5
    in_adamw = sum(len(g["params"]) for g in both["adamw"].param_groups)
    assert len(muon) + in_adamw == len(list(model.parameters()))


def test_orthogonalise():
    """
    Singular vectors stay, singular values from 1% of the largest on become 1 within 0.27; each
    matrix of a batch is treated on its own, whatever its scale.
    """
    U, _, Vh = torch.linalg.svd(torch.randn(3, 12, 20), full_matrices=False)
    S = torch.logspace(-2, 0, 12) * torch.tensor([[1e-6], [1.0], [1e6]])
    X = U * S[:, None] @ Vh
    Y = orthogonalise(X)
    back = U.mT @ Y @ Vh.mT
    values = back.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(back, torch.diag_embed(values), atol=1e-3, rtol=0)
    assert ((values - 1).abs() < 0.275).all() and values.dtype == torch.float32
    torch.testing.assert_close(orthogonalise(X[1:2]), Y[1:2])
    assert torch.equal(orthogonalise(torch.zeros(1, 3, 5)), torch.zeros(1, 3, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_orthogonalise_never_overshoots(dtype):
    """Early gradients are often nearly of rank 1, where rounding could push a value above 1."""
    for n in (4, 16, 40):
        thin = torch.randn(200, n, 1) * torch.randn(200, 1, 2 * n)
        Y = orthogonalise(thin + 1e-3 * torch.randn(200, n, 2 * n), dtype)
        assert torch.linalg.svdvals(Y.float()).max() < 1.3


@pytest.mark.parametrize(
    ("settings", "rows"),
    [
        ({"n_kv_head": 2}, {"c_attn": [24, 12, 12]}),
        ({"use_svd": True, "svd_rank": 3}, {"c_attn": [24, 24]}),
        ({**TINY_MLA, "mla_groups": 2, "mla_latent_dim": (5, 3)}, {"kv_latent_proj": [5, 5, 2]}),
        ({**TINY_MLA, "mla_rope": "latent", "mla_rope_dim": 4}, {"kv_latent_proj": [7]}),
    ],
)
def test_every_map_is_orthogonalised_apart(settings, rows):
    """The stacked maps of each attention, by their rows, and the update of every matrix."""
    model = GPT(tiny_config(**settings))
    attn, maps = model.transformer.h[0].attn, stacked_maps(model)
    by_name = {n.removesuffix(".weight"): maps[p] for n, p in attn.named_parameters() if p in maps}
    assert by_name == rows
    cfg = TrainConfig(optimizer="muon", muon_learning_rate=1.0)
    muon = make_optimizers(model, cfg, "cpu")["muon"]
    expected = []
    for p in muon.param_groups[0]["params"]:
        p.grad = torch.randn_like(p)
        updates = []
        for part in p.grad.split(maps.get(p, p.size(0))):
            tall = part.size(0) > part.size(1)
            update = orthogonalise((part.mT if tall else part)[None])[0]
            updates.append((update.mT if tall else update) * 0.2 * max(part.shape) ** 0.5)
        expected.append(p.detach() * (1 - 0.01) - torch.cat(updates))
    muon.step()
    for p, want in zip(muon.param_groups[0]["params"], expected, strict=True):
        torch.testing.assert_close(p, want)


@pytest.mark.parametrize(
    "state",
    [
        {"a": 1}, {"state": "all"}, {"state": {0: None}, "param_groups": []},
        {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": []},
        {"state": {}, "param_groups": []}, {"state": {}, "param_groups": [{}, {}]},
    ],
)
def test_an_optimizer_state_that_does_not_fit_is_one_line(state):
    """Of another model, or of no optimizer at all; it names the checkpoint."""
    optimizers = make_optimizers(GPT(tiny_config()), TrainConfig(), "cpu")
    words = "^a/ckpt.pt: its optimizer state does not fit this model "
    with pytest.raises(UserError, match=words):
        restore_optimizers(optimizers, state, "a/ckpt.pt")


def test_learning_rate_schedule():
    """Linear warm-up, cosine to min_lr at max_iters, constant from there."""
    cfg = TrainConfig(learning_rate=1e-2, min_lr=1e-3, warmup_iters=10, max_iters=110)
    assert lr_factor(cfg, 0) == pytest.approx(1 / 11) and lr_factor(cfg, 10) == 1
    assert lr_factor(cfg, 60) == pytest.approx(0.55)
    assert lr_factor(cfg, 110) == lr_factor(cfg, 999) == pytest.approx(0.1)
    assert lr_factor(TrainConfig(decay_lr=False), 3) == 1


def test_wsd_schedule():
    """Linear warm-up, the highest rate, and a linear decay in the last share of the iterations."""
    rates = {"learning_rate": 1e-2, "min_lr": 1e-3, "warmup_iters": 10}
    cfg = TrainConfig(decay_shape="wsd", wsd_decay=0.25, max_iters=200, **rates)
    assert lr_factor(cfg, 0) == pytest.approx(1 / 11)
    assert all(lr_factor(cfg, it) == 1 for it in range(10, 150)) and lr_factor(cfg, 151) < 1
    assert lr_factor(cfg, 175) == pytest.approx(0.55)
    assert lr_factor(cfg, 200) == lr_factor(cfg, 999) == pytest.approx(0.1)
    early = TrainConfig(decay_shape="wsd", wsd_decay=1, max_iters=200, lr_decay_iters=110, **rates)
    assert lr_factor(early, 9) < lr_factor(early, 10) == pytest.approx(1)
    assert lr_factor(early, 60) == pytest.approx(0.55)
    assert lr_factor(early, 110) == lr_factor(early, 200) == pytest.approx(0.1)


@pytest.mark.parametrize("it", [0, 80, 81, 150])
@pytest.mark.parametrize("now", [{"max_iters": 150}, {"wsd_decay": 0.1}])
def test_a_wsd_run_may_be_made_longer_until_it_decays(it, now):
    """A resume is named another run exactly if earlier iterations had other learning rates."""
    before = {"decay_shape": "wsd", "max_iters": 100, "warmup_iters": 3}
    old, new = TrainConfig(**before), TrainConfig(**{**before, **now})
    other = any(lr_factor(old, i) != lr_factor(new, i) for i in range(it))
    changed = changed_settings(flat(old), new, it)
    assert bool(changed) == (other or it == 81), changed  # 80 is the last at the highest rate


def test_a_cosine_that_ends_elsewhere_is_another_run():
    """Also at its start, and if it becomes WSD; a checkpoint without a decay_shape has a cosine."""
    before = flat(TrainConfig(max_iters=100))
    ends = "lr_decay_iters 100, now 150"
    assert changed_settings(before, TrainConfig(max_iters=150), 0) == [ends]
    assert changed_settings(before, TrainConfig(max_iters=150, lr_decay_iters=100), 90) == []
    del before["decay_shape"], before["wsd_decay"]
    changed = changed_settings(before, TrainConfig(max_iters=150, decay_shape="wsd"), 0)
    assert set(changed) == {ends, "decay_shape 'cosine', now 'wsd'"}
