"""
Speculative decoding: the model's own text, faster. Run: python -m pytest tests/test_speculate.py
"""

import pytest
import torch

from nanomla.generate import Sampler, stream_tokens
from nanomla.speculate import Speculation, accept, distribution, draw
from tests.conftest import (
    GROWING,
    QUICK,
    TINY_MLA,
    fails_with_one_line,
    make,
    run,
    save_model,
)

CHARS = {"kind": "char", "chars": "abcdefghijklmnopqrstuvw"}  # 23, as TINY's vocabulary


def near(model, std=0.03):
    """A draft: the same model with a little noise on its weights, which is right now and then."""
    draft = make(vars(model.config))
    draft.load_state_dict(model.state_dict())
    for p in draft.parameters():
        p.data += std * torch.randn_like(p)
    return draft


@pytest.mark.parametrize("kind", GROWING)
def test_greedy_text_is_the_models(kind):
    """The same greedy tokens with the model's predictor, with itself as the draft, all of whose
    tokens are accepted, and with another, past block_size and with prompts of every length."""
    torch.manual_seed(2)  # weights without a near tie between the two likeliest tokens
    model = make(kind, n_predict=1)
    other = near(model)
    for T, count in ((1, 1), (5, 7), (30, 3)):
        idx = torch.randint(23, (1, T))
        want = model.generate(idx, 32, temperature=0)
        for draft in (None, model, other):
            speculation = Speculation(model, count, draft)
            tokens = list(speculation.stream(idx, 32, Sampler(0)))
            assert torch.equal(torch.cat([idx, *tokens], dim=1), want), (T, count)
            if draft is model:
                assert speculation.accepted == speculation.drafted > 10
    got = model.generate(idx, 32, temperature=0, speculate=3, draft=other)
    assert torch.equal(got, want) and not got.is_inference()


@pytest.mark.parametrize("cache_dtype", [torch.int8, torch.bfloat16])
def test_narrow_caches_and_prompts_in_parts(cache_dtype):
    """The greedy text on a narrow cache, with a prompt that is read in chunks, by a model in
    training mode, whose mode stays."""
    model = make("MLA", n_predict=1, dropout=0.5)
    idx = torch.randint(23, (1, 9))
    model.train().transformer.drop.eval()
    modes = [module.training for module in model.modules()]
    want = list(
        stream_tokens(model, idx, 20, Sampler(0), cache_dtype=cache_dtype, prefill_chunk=4)
    )
    for draft in (None, near(model)):
        speculation = Speculation(model, 3, draft, cache_dtype)
        assert list(speculation.stream(idx, 20, Sampler(0), prefill_chunk=4)) == want
    assert [module.training for module in model.modules()] == modes


def test_ends():
    """A stop token ends the text where it ends that of the model alone; no more tokens than asked
    for are made, whatever was drafted; none is none."""
    model = make("MLA", n_predict=1)
    idx = torch.randint(23, (1, 3))
    text = model.generate(idx, 30, temperature=0)
    for n in range(6):
        got = model.generate(idx, n, temperature=0, speculate=4, draft=model)
        assert torch.equal(got, text[:, : 3 + n])
    for stop in set(text[0, 3:].tolist()):
        want = model.generate(idx, 30, temperature=0, stop=stop)
        got = model.generate(idx, 30, temperature=0, stop=stop, speculate=4, draft=model)
        assert torch.equal(got, want)


def passes(model):
    """A list that grows by how many tokens every pass of a model reads."""
    read = []
    run_blocks = model.run_blocks

    def counted(idx, cache=None):
        read.append(idx.size(1))
        return run_blocks(idx, cache)

    model.run_blocks = counted
    return read


def test_fewer_passes():
    """With drafts that are all right a pass of count + 1 tokens makes as many, after the prompt's;
    no pass reads more."""
    model = make("MLA", block_size=64)
    draft = near(model, std=0)
    read = passes(model)
    list(Speculation(model, 3, draft).stream(torch.randint(23, (1, 5)), 25, Sampler(0)))
    assert read == [5, *[4] * 6]


# ---- Drawn text
HOW = [
    {"temperature": 1.0}, {"temperature": 0.7, "top_k": 2}, {"temperature": 1.3, "top_p": 0.8},
]


def p_value(counts, chances):
    """Of Pearson's chi-square test; cells that are expected to be rare are taken together."""
    expected = counts.sum().double() * chances
    often = expected >= 5
    observed = torch.cat([counts[often], counts[~often].sum()[None]]).double()
    expected = torch.cat([expected[often], expected[~often].sum()[None]])
    if expected[-1] < 5:  # too rare for the approximation
        observed = observed[:-1]
        expected = expected[:-1]
    half = ((observed - expected) ** 2 / expected).sum() / 2
    freedom = torch.tensor((len(expected) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, half))


@pytest.mark.parametrize("spread", [0.5, 2.0])
def test_the_rule_of_acceptance(spread):
    """Of 20,000 drafts by one distribution, the tokens that come out have another one, that of the
    model; as many drafts are taken as the two overlap."""
    guess = (torch.randn(6) * spread).softmax(-1)
    wanted = (torch.randn(2, 6) * spread).softmax(-1)
    sampler = Sampler(generator=torch.Generator().manual_seed(1))
    counts = torch.zeros(6)
    taken = 0
    for _ in range(20_000):
        token = draw(guess, sampler)
        accepted, after = accept(token, [guess], wanted, sampler)
        taken += accepted
        counts[int(token if accepted else after)] += 1
    assert p_value(counts, wanted[0].double()) > 0.01
    assert abs(taken / 20_000 - float(torch.minimum(guess, wanted[0]).sum())) < 0.02


@pytest.mark.parametrize("how", HOW, ids=str)
@pytest.mark.parametrize("own", [True, False], ids=["predictor", "other model"])
def test_drawn_text_has_the_models_distribution(own, how):
    """Three tokens in a row over many draws, against the product of the model's probabilities;
    drafts are accepted and rejected."""
    V = 3
    draws = 800
    model = make({**TINY_MLA, "n_layer": 1}, n_predict=1, vocab_size=V, block_size=8)
    draft = None
    if not own:
        draft = near(model, std=0.2)
    idx = torch.tensor([[1, 2]])
    sampler = Sampler(**how, generator=torch.Generator().manual_seed(7))
    speculation = Speculation(model, 2, draft)
    counts = torch.zeros(V**3)
    for _ in range(draws):
        first, second, third = speculation.stream(idx, 3, sampler)
        counts[int(V * V * first + V * second + third)] += 1
    assert 0.1 < speculation.accepted / speculation.drafted < 0.98

    texts = torch.cartesian_prod(*[torch.arange(V)] * 3)
    whole = torch.cat([idx.expand(len(texts), -1), texts], dim=1)
    with torch.no_grad():
        logits = model(whole, all_logits=True)[0][:, 1:-1]  # behind the prompt and two tokens
    chances = torch.ones(len(texts), dtype=torch.float64)
    for i in range(3):
        chances *= distribution(logits[:, i], sampler).double()[range(len(texts)), texts[:, i]]
    assert counts[chances == 0].sum() == 0  # top_k and top_p hold
    assert p_value(counts, chances) > 0.01


def test_what_does_not_go_together():
    """One line names what is wrong and what works."""
    model = make("MLA", n_predict=1)
    idx = torch.zeros(1, 3).long()
    for count in (0, 8, 2.5):
        with pytest.raises(ValueError, match=f"speculate={count} does not work: .* from 1 to 7"):
            model.generate(idx, 4, speculate=count)
    with pytest.raises(ValueError, match="speculate must be a number with a draft"):
        model.generate(idx, 4, draft=model)
    with pytest.raises(ValueError, match="one sequence at a time, not 2"):
        model.generate(idx.expand(2, -1), 4, speculate=2)
    cache = model.make_cache(1, 9)
    for other in ({"cache": cache}, {"use_cache": False}, {"mask": idx == 0}):
        with pytest.raises(ValueError, match="leave out cache, mask and use_cache"):
            model.generate(idx, 4, speculate=2, **other)
    with pytest.raises(ValueError, match="the model has n_predict=0: give a draft, or train"):
        make("MLA").generate(idx, 4, speculate=2)
    slots = make("latent tokens", n_predict=1)
    for one, draft in ((slots, None), (model, slots)):
        with pytest.raises(ValueError, match="the state of latent tokens.* cannot forget drafts"):
            one.generate(idx, 4, speculate=2, draft=draft)
    for changes, words in (
        ({"vocab_size": 22}, "the draft's vocab_size=22 does not work: .* must be 23"),
        ({"block_size": 15}, "the draft's block_size=15 does not work: .* at least .*, 16"),
    ):
        with pytest.raises(ValueError, match=words):
            model.generate(idx, 4, speculate=2, draft=make("MHA", **changes))


# ---- sample.py
def test_from_the_command_line(tmp_path):
    """The text of a model with a predictor, and of one with a draft; stderr has what was accepted;
    what does not combine is one line."""
    torch.manual_seed(2)
    other = {"kind": "char", "chars": "zyxabcdefghijklmnopqrst"}
    for name, model, tokenizer in (
        ("own", make("MLA", n_predict=1), CHARS),
        ("plain", make("MLA"), CHARS),
        ("draft", make("MHA"), CHARS),
        ("other", make("MHA"), other),
    ):
        (tmp_path / name).mkdir()
        save_model(tmp_path / name, model, best=True, tokenizer=tokenizer)
    args = ["--device=cpu", "--start=abca", "--max_new_tokens=60"]
    greedy = [*args, "--temperature=0"]
    for name, flags in (("own", []), ("plain", [f"--draft={tmp_path}/draft"])):
        out = f"--out_dir={tmp_path}/{name}"
        done = run("sample.py", out, *greedy, *flags, "--speculate=3")
        assert done.returncode == 0, done.stderr
        assert done.stdout == run("sample.py", out, *greedy).stdout and len(done.stdout) == 65
        assert "tokens/s" in done.stderr and done.stderr.count("\n") == 1
        assert "% of " in done.stderr and "drafts accepted" in done.stderr
        drawn = run("sample.py", out, *args, *flags, "--speculate=3", "--stop=a")
        assert drawn.returncode == 0 and "a" not in drawn.stdout[4:]
    out = f"--out_dir={tmp_path}/own"
    for flag in ("--num_samples=2", "--json", "--one_per_line", "--use_cache=False"):
        done = run("sample.py", out, *args, "--speculate=3", flag)
        assert fails_with_one_line(done, 2, "speculate draws one sample with a cache; leave out")
    done = run("sample.py", out, *args, f"--draft={tmp_path}/draft")
    assert fails_with_one_line(done, 2, "draft without speculate", "--speculate=4")
    done = run("sample.py", out, *args, "--speculate=3", f"--draft={tmp_path}/other")
    assert fails_with_one_line(done, 1, "other has another tokenizer than the model")
    done = run("sample.py", f"--out_dir={tmp_path}/plain", *args, "--speculate=3")
    assert fails_with_one_line(done, 2, "the model has n_predict=0: give a draft")


def test_a_trained_predictor_is_right(tmp_path, dataset):
    """After some training most of the predictor's drafts are accepted."""
    args = [*QUICK, f"--dataset={dataset}", "--use_mla=True", "--pos_emb=rope", "--n_predict=1"]
    args += ["--n_embd=32", "--max_iters=200", "--eval_interval=100", f"--out_dir={tmp_path}"]
    assert run("train.py", *args).returncode == 0
    sample = ["--start=to be", "--max_new_tokens=200", "--speculate=1", "--device=cpu"]
    done = run("sample.py", f"--out_dir={tmp_path}", *sample)
    share = int(done.stderr.rpartition("%")[0].rpartition(" ")[2])
    assert share > 50, done.stderr
