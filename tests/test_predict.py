"""
The block for the token after the next (n_predict), beside what it should compute.

Run: python -m pytest tests/test_predict.py
"""

import pytest
import torch

from model import GPT
from nanomla import checkpoint, costs
from nanomla.checkpoint import Checkpoint
from tests.conftest import (
    KINDS,
    QUICK,
    TINY_MLA,
    fails_with_one_line,
    make,
    run,
    tiny_config,
)
from tests.test_formats import DEEPSEEK_STYLE, DENSE
from tests.test_train import entries


def head_input(model, idx):
    """What the head reads of idx (B, T)."""
    read = []
    hook = model.lm_head.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    model(idx, all_logits=True)
    hook.remove()
    return read[0]


def written_out_loss(model, idx, targets):
    """Its mean loss on idx (B, T), one position after the other, each from what is before it."""
    predictor = model.predictor
    wte = model.transformer.wte.weight
    hidden = head_input(model, idx)
    losses = []
    for b in range(len(idx)):
        rows = []
        for i in range(idx.size(1) - 1):
            both = [predictor.enorm(wte[idx[b, i + 1]]), predictor.hnorm(hidden[b, i])]
            rows.append(predictor.eh_proj.weight @ torch.cat(both))
            seen = torch.stack(rows)[None]  # (1, i + 1, C)
            x = seen + predictor.h.attn(predictor.h.ln_1(seen))
            x = x + predictor.h.mlp(predictor.h.ln_2(x))
            logits = wte @ predictor.ln_f(x[0, -1])
            losses.append(logits.logsumexp(0) - logits[targets[b, i + 1]])
    return sum(losses) / len(losses)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_the_papers(kind):
    """In float64 equal to a loop over tokens; the first loss is that of a model without it."""
    model = make(kind, n_predict=1).double()
    text = torch.randint(23, (2, 10))
    idx, targets = text[:, :-1], text[:, 1:]
    with torch.no_grad():
        _, losses = model(idx, targets, all_losses=True)
        _, loss = model(idx, targets)
        want = written_out_loss(model, idx, targets)
    torch.testing.assert_close(losses[1], want, atol=1e-9, rtol=1e-9)
    assert torch.equal(losses[0], loss)


def test_it_is_transformers_layer():
    """Its output is that of transformers' MtpLayer on the same weights, in DeepSeek's style."""
    from transformers import DeepseekV3Config
    from transformers.modeling_layers import MtpLayer
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as theirs

    model = make(DEEPSEEK_STYLE, n_predict=1)
    config = model.config
    shape = {
        "kv_lora_rank": config.mla_latent_dim, "qk_rope_head_dim": config.mla_rope_dim,
        "qk_nope_head_dim": config.nope, "v_head_dim": config.hs,
        "intermediate_size": config.hidden, "rms_norm_eps": config.norm_eps,
        "rope_interleave": False, "rope_parameters": {"rope_theta": config.rope_theta},
    }
    settings = DeepseekV3Config(**{**DENSE, **shape})
    settings._attn_implementation = "eager"
    layer = MtpLayer(settings, theirs.DeepseekV3DecoderLayer, theirs.DeepseekV3RMSNorm, 0)
    ours = model.predictor.state_dict()
    heads = (config.n_head, -1)
    kv = [ours[f"h.attn.{part}_expand.weight"].unflatten(0, heads) for part in "kv"]
    block = {
        "input_layernorm": "ln_1", "post_attention_layernorm": "ln_2",
        "self_attn.q_proj": "attn.q_proj", "self_attn.o_proj": "attn.c_proj",
        "self_attn.kv_a_proj_with_mqa": "attn.kv_latent_proj",
        "self_attn.kv_a_layernorm": "attn.latent_norm",
        "mlp.gate_proj": "mlp.c_gate", "mlp.up_proj": "mlp.c_fc", "mlp.down_proj": "mlp.c_proj",
    }
    state = {f"mtp_block.{a}.weight": ours[f"h.{b}.weight"] for a, b in block.items()}
    kv_b = torch.cat(kv, dim=1).flatten(0, 1)
    state["mtp_block.self_attn.kv_b_proj.weight"] = kv_b
    for name in ("enorm", "hnorm", "eh_proj"):
        state[f"{name}.weight"] = ours[f"{name}.weight"]
    state["post_norm.weight"] = ours["ln_f.weight"]
    layer.load_state_dict(state)

    idx = torch.randint(23, (2, 9))
    T = idx.size(1) - 1
    mask = torch.full((T, T), float("-inf")).triu(1)[None, None]
    positions = torch.arange(T)[None]
    with torch.no_grad():
        hidden = head_input(model, idx)[:, :-1]
        embedded = model.transformer.wte(idx[:, 1:])
        rotation = theirs.DeepseekV3RotaryEmbedding(settings)(hidden, positions)
        want = layer(embedded, hidden, rotation, mask, positions, None)
        got = model.predict(hidden, idx[:, 1:])
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_token_by_token_on_a_cache(kind):
    """The same output on a cache of its own as all at once."""
    model = make(kind, n_predict=1)
    idx = torch.randint(23, (2, 12))
    with torch.no_grad():
        hidden = head_input(model, idx)
        want = model.predict(hidden[:, :-1], idx[:, 1:])
        cache = model.predictor.h.attn.new_cache(2, 11)
        parts = []
        for begin, end in ((0, 4), (4, 5), (5, 11)):
            part = model.predict(hidden[:, begin:end], idx[:, begin + 1 : end + 1], cache)
            parts.append(part)
    torch.testing.assert_close(torch.cat(parts, dim=1), want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_has_no_part_in_it(side):
    """Its loss on a padded batch is the mean over the tokens of every sequence alone."""
    model = make("MLA", n_predict=1)
    texts = [torch.randint(23, (1, n)) for n in (12, 7, 4)]
    idx = torch.randint(23, (3, 11))
    targets = torch.randint(23, (3, 11))
    mask = torch.zeros(3, 11, dtype=torch.bool)
    alone = []
    with torch.no_grad():
        for b, text in enumerate(texts):
            n = text.size(1) - 1
            at = slice(0, n) if side == "right" else slice(11 - n, 11)
            idx[b, at] = text[0, :-1]
            targets[b, at] = text[0, 1:]
            mask[b, at] = True
            loss = model(text[:, :-1], text[:, 1:], all_losses=True)[1][1]
            alone += [loss] * (n - 1)
        got = model(idx, targets, mask=mask, all_losses=True)[1][1]
    torch.testing.assert_close(got, sum(alone) / len(alone), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["MHA", "MLA, layers share a cache"])
def test_what_a_seed_draws_stays(kind):
    """The other weights of a seed are those of a model without it, under the same names and first;
    the same seed draws the same predictor."""
    models = []
    for n in (0, 1, 1):
        torch.manual_seed(5)
        models.append(GPT(tiny_config(**KINDS[kind], n_predict=n)).state_dict())
    without, first, second = models
    assert list(first)[: len(without)] == list(without)
    assert all(torch.equal(first[name], without[name]) for name in without)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert {name.split(".")[0] for name in first.keys() - without.keys()} == {"predictor"}


def test_recomputed_activations_give_the_same_gradients():
    """grad_checkpoint changes no gradient of the two losses."""
    model = make("MLA", n_predict=1).train()
    idx = torch.randint(23, (2, 9))
    grads = []
    for model.grad_checkpoint in (False, True):
        model.zero_grad()
        model(idx, idx, all_losses=True)[1].sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_what_it_costs():
    """The parameters of one more block, a projection and three norms; in training its operations
    and another head; none in decoding, and nothing in the cache."""
    plain = tiny_config(**TINY_MLA)
    config = tiny_config(**TINY_MLA, n_predict=1)
    models = [costs.on_meta(plain), costs.on_meta(config)]
    block = sum(p.numel() for p in models[0].transformer.h[1].parameters())
    C = config.n_embd
    more = block + 2 * C * C + 3 * 2 * C  # layer norms with biases
    assert costs.parameters(config) == costs.parameters(plain) + more
    assert costs.parameters(config) == models[1].get_num_params(non_embedding=False)
    flops = [costs.flops_per_token(model, 10, absorbed=True) for model in models]
    assert flops[0] == flops[1]
    flops = [costs.flops_per_token(model, 10) for model in models]
    deeper = costs.on_meta(tiny_config(**{**TINY_MLA, "n_layer": 3}))
    of_block = costs.flops_per_token(deeper, 10) - flops[0]
    assert flops[1] == flops[0] + of_block + 2 * (2 * C * C + C * config.vocab_size)
    caches = [GPT(shape).make_cache(1, 3) for shape in (plain, config)]
    assert caches[0].nbytes == caches[1].nbytes


@pytest.mark.parametrize("kind", ["MHA", "MLA"])
def test_factorised_values(kind):
    """Values that are factorised at full rank as a checkpoint is read leave both losses."""
    model = make(kind, n_predict=1)
    stored = Checkpoint(model.state_dict(), vars(model.config))
    other, _ = checkpoint.build(stored, use_svd=True, svd_rank=None)
    assert hasattr(other.predictor.h.attn, "v_up")
    idx = torch.randint(23, (2, 9))
    with torch.no_grad():
        want = model(idx, idx, all_losses=True)[1]
        got = other.eval()(idx, idx, all_losses=True)[1]
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_training_with_it(tmp_path, dataset):
    """Its loss falls and is logged and printed apart; its weight matters; the iteration's loss is
    the main head's, and the first one that of a model without it."""
    args = [*QUICK, f"--dataset={dataset}", "--use_mla=True", "--pos_emb=rope", "--max_iters=40"]
    logs = []
    for name, flags in (
        ("with", ["--n_predict=1"]),
        ("heavy", ["--n_predict=1", "--predict_weight=3"]),
        ("without", []),
    ):
        done = run("train.py", *args, *flags, f"--out_dir={tmp_path}/{name}")
        assert done.returncode == 0, done.stderr
        assert ("token after next" in done.stdout) == (name != "without")
        logs.append(entries(tmp_path / name))
    predicted = [[e["predict_loss"] for e in log if "predict_loss" in e] for log in logs]
    assert len(predicted[0]) == 5 and predicted[0][-1] < predicted[0][0] - 0.2
    assert predicted[1] != predicted[0] and predicted[2] == []
    first = [next(e["loss"] for e in log if "loss" in e) for log in logs]
    assert first[0] == first[1] == first[2]
    done = run("train.py", *args, "--n_predict=2", f"--out_dir={tmp_path}/two")
    assert fails_with_one_line(done, 2, "n_predict=2", "at most 1")
    done = run("train.py", *args, "--n_predict=1", "--block_size=1", f"--out_dir={tmp_path}/one")
    assert fails_with_one_line(done, 2, "block_size=1", "above n_predict=1")
