"""The three-step experiment. Run: python -m pytest tests/test_three_step.py"""

import json

import pytest
import torch
import torch.nn.functional as F

from experiments import three_step
from experiments.three_step import ThreeStepAttention, count_scores
from model import GPT
from nanomla.dataset import Dataset
from tests.conftest import fails_with_one_line, randomise, run, tiny_config


def plain_attention(x, source, block):
    """Softmax attention of x (T, C) over source (S, C), head by head."""
    k_weight, v_weight = block.kv_proj.weight.chunk(2)
    q, k, v = x @ block.q_proj.weight.T, source @ k_weight.T, source @ v_weight.T
    hs = x.size(1) // block.n_head
    heads = [slice(h * hs, (h + 1) * hs) for h in range(block.n_head)]
    outs = [(q[:, h] @ k[:, h].T / hs**0.5).softmax(-1) @ v[:, h] for h in heads]
    return torch.cat(outs, dim=1) @ block.c_proj.weight.T


def test_equals_the_three_steps_written_out():
    """Each row of a batch as three plain attentions in a row, float64, 1e-12."""
    block = randomise(ThreeStepAttention(24, 4, 5).double())
    x = torch.randn(3, 11, 24, dtype=torch.float64)
    out = block(x)
    assert out.shape == x.shape
    norms = (block.norm_1, block.norm_2, block.norm_3)
    for row, wanted in zip(x, out, strict=True):
        z = block.latents
        z = z + plain_attention(norms[0](z), row, block.read)
        z = z + plain_attention(norms[1](z), norms[1](z), block.mix)
        torch.testing.assert_close(
            plain_attention(row, norms[2](z), block.write), wanted, rtol=0, atol=1e-12
        )


def test_order_of_tokens_does_not_matter():
    """The block has no mask and no positions: permuted tokens give permuted outputs."""
    block, x = randomise(ThreeStepAttention(24, 4, 5).double()), torch.randn(2, 13, 24).double()
    order = torch.randperm(13)
    torch.testing.assert_close(block(x[:, order]), block(x)[:, order], rtol=0, atol=1e-12)


def test_scores_are_linear_in_length(monkeypatch):
    """The score matrices that are computed are m x T, m x m and T x m, whatever T is."""
    sizes, attend = [], F.scaled_dot_product_attention

    def counting(q, k, v):
        sizes.append((q.size(-2), k.size(-2)))
        return attend(q, k, v)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counting)
    m, totals = 5, []
    for T in (9, 90, 900):
        sizes.clear()
        ThreeStepAttention(24, 4, m)(torch.randn(1, T, 24))
        assert sizes == [(m, T), (m, m), (T, m)]
        totals.append(sum(rows * columns for rows, columns in sizes))
        assert totals[-1] == count_scores(T, m)
    assert totals[2] - totals[1] == 10 * (totals[1] - totals[0])


def test_sees_the_future(dataset):
    """Another last token changes the logits of every earlier position; causal attention's, none."""
    data = Dataset(str(dataset), 16)
    config = tiny_config(vocab_size=data.vocab_size)
    causal, block = randomise(GPT(config)), randomise(three_step.three_step_gpt(config, 5))
    assert three_step.leak(causal, data, "cpu") == 0
    assert three_step.leak(block, data, "cpu") > 1e-3
    idx = torch.randint(config.vocab_size - 1, (2, 16))
    other = idx.clone()
    other[:, -1] += 1
    change = block(idx, idx)[0][:, :-1] - block(other, idx)[0][:, :-1]
    assert bool((change.abs().amax(dim=(0, 2)) > 1e-6).all())


def test_every_parameter_is_trained():
    """The loss reaches the latents, their norms and all projections of every layer."""
    model = three_step.three_step_gpt(tiny_config(), 5)
    idx = torch.randint(23, (2, 16))
    model(idx, idx)[1].backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 0, name


def test_has_no_cache():
    """A bidirectional block cannot keep earlier outputs, and refuses a cache by name."""
    model = three_step.three_step_gpt(tiny_config(), 5)
    with pytest.raises(ValueError, match="cache must be None"):
        model.generate(torch.zeros(1, 3, dtype=torch.long), 2)


def test_command_prints_and_writes_its_figures(dataset, tmp_path):
    """Both tables and both samples, at the smallest sizes; the causal model alone does not leak."""
    done = run(
        "experiments.three_step",
        f"--dataset={dataset}",
        "--max_iters=2",
        "--longest=256",
        "--rounds=1",
        "--sample_tokens=3",
        "--n_latents=3",
        "--device=cpu",
        f"--json={tmp_path}/t.json",
    )
    assert done.returncode == 0, done.stderr
    timed, causal, block = json.loads((tmp_path / "t.json").read_text())["rows"]
    assert timed["m = 16: scores"] == f"{2 * 256 * 16 + 256:,}"
    assert causal["leak"] == "0" and float(block["leak"]) > 0
    assert "--- causal self-attention\n" in done.stdout
    assert "--- three steps, m = 3\n" in done.stdout


@pytest.mark.parametrize(
    ("args", "status", "words"),
    [
        (["--n_latents=0"], 2, ["n_latents", "at least 1"]),
        (["--longest=128"], 2, ["longest", "at least 256"]),
        (["--use_mla=True"], 2, ["unknown setting use_mla"]),
        (["--dataset=no-such"], 1, ["no-such", "not prepared"]),
    ],
)
def test_bad_input_is_one_line(args, status, words):
    """Values out of range, settings of other scripts, a dataset that is not there."""
    assert fails_with_one_line(run("experiments.three_step", *args), status, *words)
