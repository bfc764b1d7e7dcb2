"""Optimizers and the learning rate. Run: python -m pytest tests/test_optim.py"""

import pytest
import torch

from model import GPT
from nanomla.optim import make_optimizers
from tests.conftest import tiny_config
from train import TrainConfig


def test_one_batch_is_overfitted():
    """Both optimizers drive the loss on one batch to almost nothing, with every attention."""
    for optimizer in ("adamw", "muon"):
        for settings in (
            {},
            {"use_mla": True, "pos_emb": "rope"},
            {"use_mla": True, "use_svd": True, "svd_rank": 3},
        ):
            torch.manual_seed(0)
            model = GPT(tiny_config(**settings))
            rates = {"learning_rate": 1e-2, "muon_learning_rate": 0.02, "weight_decay": 0.0}
            cfg = TrainConfig(optimizer=optimizer, **rates)
            optimizers = make_optimizers(model, cfg, "cpu").values()
            x, y = torch.randint(23, (2, 3, 16))
            for _ in range(150):
                loss = model(x, y)[1]
                loss.backward()
                for opt in optimizers:
                    opt.step()
                    opt.zero_grad()
            assert loss < 0.1, (optimizer, settings, loss)


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


def test_learning_rate_schedule():
    """Linear warm-up, cosine to min_lr at max_iters, constant from there."""
    cfg = TrainConfig(learning_rate=1e-2, min_lr=1e-3, warmup_iters=10, max_iters=110)
    assert cfg.lr_factor(0) == pytest.approx(1 / 11) and cfg.lr_factor(10) == 1
    assert cfg.lr_factor(60) == pytest.approx(0.55)
    assert cfg.lr_factor(110) == cfg.lr_factor(999) == pytest.approx(0.1)
    assert TrainConfig(decay_lr=False).lr_factor(3) == 1
