"""The experiments and the maths of their blocks. Run: python -m pytest tests/test_experiments.py"""

import pytest
import torch

from experiments import cached_loss, costs, svd_forward, three_step, training
from experiments.norms_on_keys_and_values import normed_gpt
from experiments.rotation_after_decompression import rotated_keys_gpt
from experiments.svd_forward import SvdForwardAttention, project, svd_forward_gpt, truncate
from experiments.three_step import ThreeStepAttention, three_step_gpt
from model import ATTENTION, GPT, rotation_alone
from nanomla.dataset import Dataset
from tests.conftest import TINY_MLA, randomise, run, tiny_config

UNROTATED = {**TINY_MLA, "mla_rope_dim": 0}
RANK = 3  # of values with hs = 6, so that half of their directions are lost


def change_of_earlier_logits(model, T=16):
    """By how much another last token changes them, (T - 1,), for two texts."""
    idx = torch.randint(model.config.vocab_size - 1, (2, T))
    other = idx.clone()
    other[:, -1] += 1
    change = model(idx, idx)[0][:, :-1] - model(other, idx)[0][:, :-1]
    return change.abs().amax(dim=(0, 2))


@pytest.mark.parametrize("build", [normed_gpt, rotated_keys_gpt])
@torch.no_grad()
def test_changed_mla_decodes_what_it_trains(build):
    """Causal, and equal token by token over MLA's cache, though it cannot be absorbed."""
    settings = UNROTATED if build is rotated_keys_gpt else TINY_MLA
    model = randomise(build(tiny_config(**settings)))
    assert change_of_earlier_logits(model).max() == 0
    idx = torch.randint(23, (2, 12))
    whole = model(idx, all_logits=True)[0]
    cache = model.make_cache(2, 12)
    assert cache.bytes_per_token == GPT(model.config).make_cache(2, 12).bytes_per_token
    steps = [model(idx[:, t : t + 1], cache=cache)[0] for t in range(12)]
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_rotation_after_decompression_written_out():
    """Keys W_UK c and queries turned by complex numbers, softmax over the past; float64, 1e-6."""
    attn = rotated_keys_gpt(tiny_config(**UNROTATED)).transformer.h[0].attn
    randomise(attn).double()
    x = torch.randn(9, 24, dtype=torch.float64)
    turns = torch.arange(9.0)[:, None] * 10000 ** -(torch.arange(3.0) / 3)  # T, hs / 2
    turns = torch.polar(torch.ones(9, 3), turns)
    c = attn.latent_norm(x @ attn.kv_latent_proj.weight.T + attn.kv_latent_proj.bias)
    q = (x @ attn.q_proj.weight.T + attn.q_proj.bias).view(9, 4, 6)
    k = (c @ attn.k_expand.weight.T).view(9, 4, 6)
    v = (c @ attn.v_expand.weight.T).view(9, 4, 6)
    heads = []
    for h in range(4):
        q_h, k_h = (torch.complex(t[:, h, :3], t[:, h, 3:]) * turns for t in (q, k))
        scores = (q_h @ k_h.conj().T).real / 6**0.5
        scores = scores.masked_fill(torch.ones(9, 9).triu(1).bool(), float("-inf"))
        heads.append(scores.softmax(-1) @ v[:, h])
    expected = attn.c_proj(torch.cat(heads, dim=1))
    torch.testing.assert_close(attn(x[None])[0], expected, rtol=0, atol=1e-6)


def test_norms_on_keys_and_values():
    """Content keys and values have a mean square of 1 before their weights; rotary keys stay."""
    config = tiny_config(**TINY_MLA)
    attn = normed_gpt(config).transformer.h[0].attn
    x = torch.randn(2, 5, 24)
    c, kr = attn._latents(x, rotation_alone(config, x, None))
    k, v = attn._keys_and_values(c, kr)
    for part in (k[..., : attn.nope], v):
        torch.testing.assert_close(part.square().mean(-1), torch.ones(2, 4, 5), atol=0.01, rtol=0)
    torch.testing.assert_close(k[..., attn.nope :], kr.expand(-1, 4, -1, -1))


# ---- Three steps
def plain_attention(x, source, block):
    """Softmax attention of x (T, C) over source (S, C), head by head."""
    k_weight, v_weight = block.kv_proj.weight.chunk(2)
    q, k, v = x @ block.q_proj.weight.T, source @ k_weight.T, source @ v_weight.T
    hs = x.size(1) // block.n_head
    heads = [slice(h * hs, (h + 1) * hs) for h in range(block.n_head)]
    outs = [(q[:, h] @ k[:, h].T / hs**0.5).softmax(-1) @ v[:, h] for h in heads]
    return torch.cat(outs, dim=1) @ block.c_proj.weight.T


def test_three_steps_written_out():
    """Each row of a batch as three plain attentions in a row, float64, 1e-12."""
    block = randomise(ThreeStepAttention(24, 4, 5).double())
    x = torch.randn(3, 11, 24, dtype=torch.float64)
    for row, out in zip(x, block(x), strict=True):
        z = block.latents
        z = z + plain_attention(block.norm_1(z), row, block.read)
        z = z + plain_attention(block.norm_2(z), block.norm_2(z), block.mix)
        expected = plain_attention(row, block.norm_3(z), block.write)
        torch.testing.assert_close(expected, out, rtol=0, atol=1e-12)


# ---- SVD in forward
def test_both_ways_are_the_best_approximation():
    """
    An error of the lost singular values alone, float64, 1e-12. Where two are equal, the SVD has no
    finite gradient, and the projector that of its output times P.
    """
    V = torch.randn(2, 4, 11, 6, dtype=torch.float64)
    lost = torch.linalg.svdvals(V)[..., RANK:].square().sum(-1).sqrt()
    equal = (2 * torch.eye(11, 6, dtype=torch.float64)).requires_grad_()
    grads = []
    for low_rank in (truncate, project):
        error = torch.linalg.matrix_norm(V - low_rank(V, RANK))
        torch.testing.assert_close(error, lost, rtol=0, atol=1e-12)
        grads += torch.autograd.grad(low_rank(equal, RANK).square().sum(), equal)
    assert not grads[0].isfinite().all()
    torch.testing.assert_close(grads[1], 2 * project(equal.detach(), RANK), rtol=0, atol=1e-12)


def test_svd_in_forward_written_out():
    """Every sequence and head by itself, softmax over compressed values, float64, 1e-12."""
    config = tiny_config(**TINY_MLA)
    mla = randomise(ATTENTION["mla"](config)).double()
    compressed = SvdForwardAttention(config).double()
    compressed.rank = RANK
    compressed.load_state_dict(mla.state_dict())
    x = torch.randn(3, 11, 24, dtype=torch.float64)
    rotation = rotation_alone(config, x, None)
    q = torch.cat(mla._split_queries(x, rotation), dim=-1)
    k, v = mla._keys_and_values(*mla._latents(x, rotation))
    past = torch.ones(11, 11, dtype=torch.bool).tril()
    scores = (q @ k.mT * mla.scale).masked_fill(~past, float("-inf")).softmax(-1)
    for b in range(3):
        heads = [scores[b, h] @ truncate(v[b, h], RANK) for h in range(4)]
        expected = mla.c_proj(torch.cat(heads, dim=1))
        torch.testing.assert_close(compressed(x)[b], expected, rtol=0, atol=1e-12)


# ---- Both see the future
@pytest.mark.parametrize("build", [three_step_gpt, svd_forward_gpt])
def test_blocks_that_see_the_future(build, monkeypatch):
    """Another last token changes every earlier logit. They refuse a cache, and train in full."""
    config = tiny_config(use_mla=True, mla_latent_dim=7)
    monkeypatch.setattr(three_step, "LATENTS", 5)
    monkeypatch.setattr(SvdForwardAttention, "rank", RANK)
    model = randomise(build(config))
    assert change_of_earlier_logits(model).min() > 1e-6
    if build is svd_forward_gpt:  # with no more tokens than R nothing is lost
        assert change_of_earlier_logits(model, RANK).max() < 1e-5
    with pytest.raises(ValueError, match="cache must be None"):
        model.generate(torch.zeros(1, 3, dtype=torch.long), 2)
    idx = torch.randint(23, (2, 16))
    model(idx, idx)[1].backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_training_is_that_of_train_py(dataset, tmp_path):
    """The same loss as train.py's with these settings, 1e-6."""
    cfg = training.Experiment(str(dataset), max_iters=4, device="cpu")
    data = Dataset(cfg.dataset, 64)
    settings = {**training.MLA, "n_layer": 1, "n_embd": 32, "mla_rope_dim": 4}
    torch.manual_seed(cfg.seed)
    model = GPT(training.GPTConfig(vocab_size=data.vocab_size, **settings))
    training.train(model, cfg, data)
    flags = [f"--{key}={value}" for key, value in settings.items()]
    done = run(
        "train.py", *flags, f"--dataset={dataset}", f"--out_dir={tmp_path}", "--max_iters=4",
        "--warmup_iters=30", "--batch_size=12", "--gradient_accumulation_steps=1", "--device=cpu",
        "--optimizer=muon", "--learning_rate=6e-3", "--min_lr=3e-4", "--beta2=0.99",
        "--eval_iters=1", "--dtype=float32",
    )
    assert done.returncode == 0, done.stderr
    trained = torch.load(tmp_path / "ckpt.pt", weights_only=True)["model"]
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(trained[name], weight, rtol=0, atol=1e-6)


# ---- The commands
def tables(name, *args):
    """The rows of all tables that an experiment prints, cell by cell."""
    done = run(f"experiments.{name}", *args)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines]


@pytest.mark.slow
def test_every_experiment_runs_and_finds_what_it_says(dataset, monkeypatch):
    """At the smallest sizes, where the finding is structural: what is counted, leaks, caches."""
    for module, name, value in (
        (three_step, "LENGTHS", (256,)), (svd_forward, "WINDOWS", 2), (training, "RATES", (1.0,)),
        (training, "CONTEXT", 64), (training, "EVALUATED", 1), (cached_loss, "TOKENS", 256),
        (costs, "CONTEXT", 32), (costs, "BUDGET", 2),
        (costs, "SHAPE", {**costs.SHAPE, "n_layer": 1, "block_size": 32}),
    ):
        monkeypatch.setattr(module, name, value)
    args = (f"--dataset={dataset}", "--max_iters=2", "--device=cpu")
    _, scores, _, causal, block = tables("three_step", *args)
    assert scores[1:4] == ["32,896", "8,448", "36,864"]  # T (T + 1) / 2, or 2 T m + m^2
    assert causal[-1] == "0" and float(block[-1]) > 0
    _, short, long, _, mla, compressed, low_rank = tables("svd_forward", *args)
    assert (short[1], long[1]) == ("48", "4")
    assert mla[4] == low_rank[4] == "0" and float(compressed[4]) > 0
    assert len(tables("norms_on_keys_and_values", *args)) == 5
    assert len(tables("rotation_after_decompression", *args)) == 4
    assert len(tables("xavier", *args)) == 3
    for row in tables("cached_loss", *args)[9:]:
        assert all(abs(float(cell)) < 1e-3 for cell in row[2:]), row
    rows = tables("costs", *args)
    counted, decoded = (row for row in rows if row[0] == "MLA L=160 r=32")
    assert counted[1:5] == ["1,511,584", "36%", "192", "8x"]
    assert decoded[3] == str(2 * 2**20 // (192 * 32 * 4))  # rows of that many float32
