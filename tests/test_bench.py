"""tools.bench counts and times. Run: python -m pytest tests/test_bench.py"""

import json
import sys

import pytest
import torch

from model import GPT, GPTConfig
from nanomla import costs
from nanomla.dataset import Dataset
from nanomla.generate import DecodingStep
from tests.conftest import QUICK, TINY_MLA, fails_with_one_line, make, randomise, run, tiny_config
from tools.bench import comparison, decode, kernel, prefill, serve, train
from tools.bench.timing import Limits, Timed, alternate, peak_bytes


def rows_of(tmp_path, *args, **settings):
    """The rows that a question writes as JSON, and what it printed."""
    done = run("tools.bench", *args, f"--json={tmp_path}/rows.json", **settings)
    assert done.returncode == 0, done.stderr
    return json.loads((tmp_path / "rows.json").read_text())["rows"], done


def report(tmp_path, *args):
    """The rows of a report by what they count, and what was said on stderr."""
    rows, done = rows_of(tmp_path, "--report", *args)
    return {row[""]: row for row in rows}, done.stderr


# ---- --report
def test_report_counts_a_config(tmp_path):
    """Parameters and cache bytes of a config beside MHA's, by hand."""
    rows, _ = report(tmp_path, "config/train_mla.py", "--vocab_size=65", "--context=64")
    attention = 128 * 128 * 2 + 128 * 32 + 32 + 32 * 128  # q and c_proj, latent, norm, expansion
    assert rows["parameters: attention"]["this config"] == f"{2 * attention:,}"
    assert rows["of these, making keys and values"]["MHA"] == f"{2 * 2 * 128 * 128:,}"
    assert rows["cache bytes per token, float32"]["this config"] == f"{2 * 32 * 4}"
    assert rows["cache bytes per token, bfloat16"]["MHA"] == f"{2 * 256 * 2:,}"
    assert rows["cache bytes per token, bfloat16"]["MHA / this"] == "8.00"


def test_report_stands_beside_plain_mha(tmp_path):
    """Whatever the config has, the other column is MHA with as many key/value heads as heads."""
    shape = ["--n_layer=2", "--n_head=4", "--n_embd=128", "--vocab_size=65", "--block_size=64"]
    for flags, figures in (
        (["--n_kv_head=1"], ["512", "2,048", "4.00"]),
        (["--use_latent_tokens", "--n_latent_tokens=8"], ["0", "2,048", "constant state"]),
    ):
        row = report(tmp_path, *shape, *flags)[0]["cache bytes per token, float32"]
        assert [row["this config"], row["MHA"], row["MHA / this"]] == figures


def test_report_takes_what_the_config_names(tmp_path, dataset):
    """The vocabulary of its dataset, and its block_size; without the data GPT-2's, and one line."""
    shape = ["--n_layer=3", "--n_head=2", "--n_embd=16", "--block_size=24"]
    embeddings = "parameters: embeddings and lm_head"
    tokens = Dataset(str(dataset), 1).vocab_size
    (tmp_path / "c.py").write_text(f"dataset = {str(dataset)!r}\nmax_iters = 3\n")
    rows, warnings = report(tmp_path, *shape, str(tmp_path / "c.py"))
    assert rows[embeddings]["this config"] == f"{16 * (24 + tokens):,}" and not warnings
    model = GPT(GPTConfig(24, tokens, n_layer=3, n_head=2, n_embd=16, bias=False))
    flops = costs.flops_per_token(model, 24, absorbed=True)
    assert rows["FLOPs per decoded token at 24"]["this config"] == f"{flops:,}"
    rows, warnings = report(tmp_path, *shape, "--dataset=no-such-data", "--context=100")
    assert rows[embeddings]["this config"] == f"{16 * (24 + 50304):,}"
    assert "FLOPs per decoded token at 100" in rows
    assert warnings.startswith("warning: dataset no-such-data is not prepared")


# ---- the command line
@pytest.mark.parametrize(
    ("args", "status", "words"),
    [
        ([], 2, ["decode, kernel, prefill, train, lengths, serve, svd"]),
        (["decode", "train"], 2, ["one of"]),
        (["prefill", "--vs_hf"], 2, ["unknown setting vs_hf"]),
        (["--report", "--lr_find=True"], 2, ["lr_find, which is gone", "--lr_factors"]),
        (["decode", "--rounds=0"], 2, ["rounds", "at least 1"]),
        (["--report", "--init_from=out", "--vocab_size=9"], 2, ["its own vocab_size"]),
        (["--report", "--vocab_size=65", "--json=/no/where"], 1, ["/no/where"]),
    ],
)
def test_bad_input_is_one_line(args, status, words):
    """No question, two of them, a flag without effect or that is gone, a file that cannot be."""
    assert fails_with_one_line(run("tools.bench", *args), status, *words)


def test_what_is_missing_is_said_before_anything_is_timed(monkeypatch):
    """transformers or a compiler: one line with the remedy, and no table."""

    def no_compiler(step, device):
        raise RuntimeError("no compiler\nand more")

    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setattr(train, "measure", None)
    done = run("tools.bench", "train", "--vs-hf")
    assert fails_with_one_line(done, 1, "pip install transformers") and not done.stdout
    monkeypatch.setattr(comparison, "compiled", no_compiler)
    monkeypatch.setattr(decode, "measure_limits", None)
    done = run("tools.bench", "decode", "--vs_compiled", "--device=cpu")
    assert fails_with_one_line(done, 1, "no compiler)", "install a C++ compiler")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("question", "flags", "count"),
    [
        ("decode", ["--vs_hf", "--vs_compiled", "--rounds=1"], 5),
        ("kernel", ["--rounds=1"], 2),
        ("prefill", ["--rounds=1"], 6),
        ("train", ["--vs_hf", "--rounds=1"], 3),
        ("lengths", ["--rounds=1"], 2),
        ("svd", [], 1),
    ],
)
def test_questions_are_answered(question, flags, count, tmp_path):
    """Each prints its tables, transformers beside it, and writes them as JSON."""
    rows, done = rows_of(tmp_path, question, *flags, fresh=True, timeout=1500)
    tables = {row["table"] for row in rows}
    assert len(tables) == count and all(table in done.stdout for table in tables)


# ---- timing
def test_alternation_and_roofline():
    """Every entry runs once a round, slow ones in 3 rounds; the roofline is the larger limit."""
    calls = []
    entries = [
        Timed("a", lambda: calls.append("a"), steps=2),
        Timed("b", lambda: calls.append("b"), slow=True),
    ]
    took = alternate(entries, 5, "cpu")
    assert "".join(calls) == "ab" * 4 + "a" * 2 and list(took) == ["a", "b"]
    assert took["a"].seconds > 0
    limits = Limits(10.0, {torch.float32: 100.0})
    assert limits.seconds(50, 100, torch.float32) == 5
    assert limits.seconds(1, 1000, torch.float32) == 10


def test_peak_bytes():
    """What is alive together counts, and what was freed before does not."""

    def run() -> None:
        a = torch.empty(1000)
        del a
        b, c = torch.empty(3000), torch.empty(500)
        del b, c

    assert peak_bytes(run, "cpu") == 3500 * 4


# ---- decode
@pytest.mark.parametrize("faster", [False, True])
@torch.inference_mode()
def test_decoding_steps_are_those_of_generate(faster, monkeypatch):
    """By DecodingStep where it is faster; a run begins n tokens before the end, again and again."""
    calls, forward = [], GPT.forward
    monkeypatch.setattr(DecodingStep, "is_faster", staticmethod(lambda *_: faster))

    def counted(self, idx, targets=None, cache=None):
        calls.append((idx.shape, cache.lengths is not None))
        return forward(self, idx, targets, cache)

    monkeypatch.setattr(GPT, "forward", counted)
    entry = decode.decoding("MLA", make(TINY_MLA), 2, 10, 16, 3)
    for _ in range(2):
        entry.run()
        assert entry.cache.pos == 12  # the first step sees a context of 10
    assert calls == [((2, 1), faster)] * 6


@torch.inference_mode()
def test_throughput_at_equal_memory(monkeypatch):
    """MLA of an eighth of the numbers has eight times the rows in the same bytes; where memory is
    short, both have fewer, and one where there is none."""
    base = tiny_config(n_embd=48)
    mha, mla = decode.equal_memory("cpu", 1, base, 4)
    assert (mha["rows"], mla["rows"]) == ("4", "32") and mha["cache"] == mla["cache"] == "24.6 kB"
    ratio = float(mla["tokens/s"].replace(",", "")) / float(mha["tokens/s"].replace(",", ""))
    assert float(mla["this / MHA"]) == pytest.approx(ratio, abs=0.1)
    for free, rows in ((4 * 24_576, ("4", "32")), (0, ("1", "8"))):
        monkeypatch.setattr(decode, "free_memory", lambda device, free=free: free)
        assert tuple(row["rows"] for row in decode.equal_memory("cpu", 1, base, 32)) == rows


@torch.inference_mode()
def test_static_model_is_our_mha(monkeypatch):
    """Token by token, whatever stands in the cache behind them; its greedy tokens are those of
    model.generate. torch.compile takes a step as a whole, and once for all tokens."""
    config = tiny_config(gelu="tanh", tie_weights=False)
    model = randomise(GPT(config))
    idx = torch.randint(23, (1, 7))
    static = comparison.StaticMHA(model, 16)
    for buffer in static.buffers(recurse=False):
        buffer.normal_()
    cache = model.make_cache(1, 16)
    text = idx
    for i in range(12):
        want, _ = model(text[:, i : i + 1], cache=cache)
        at = text[:, i : i + 1], torch.tensor([i])
        torch.testing.assert_close(static(*at), want, atol=1e-5, rtol=1e-5)
        if i >= 6:
            text = torch.cat([text, static.next_token(*at)], dim=1)
    assert torch.equal(text, model.generate(idx, 6, temperature=0))

    steps = []

    def compiled(step, device):
        whole = torch.compile(step, fullgraph=True, backend="eager")
        return lambda token, pos: steps.append(int(pos)) or whole(token, pos)

    monkeypatch.setattr(comparison, "compiled", compiled)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    four_tokens = comparison.compiled_decoding(model, idx, 4)
    four_tokens()
    four_tokens()
    assert steps == [6, 7, 8, 9] * 2
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


# ---- kernel
def test_attentions_of_the_kernel_are_one_function(monkeypatch):
    """Ours and torch's average the same rows; keys and values expanded from them give what the
    average does through W_UV."""
    case = kernel.Case(3, 20, 6, 33, 2, torch.float32)
    monkeypatch.setattr(kernel, "BEYOND_CACHES", 3 * case.nbytes)
    latents, *copies = case.copies("cpu")
    assert latents.nbytes == case.nbytes and len(copies) == 2
    torch.manual_seed(1)
    attentions = kernel.attentions(case, "cpu")
    torch.manual_seed(1)
    torch.randn(2, 3, 1, kernel.HS + 6), torch.randn(3, kernel.HS, 20)  # q and W_UK
    W_UV = torch.randn(3, kernel.HS, 20) / 20**0.5
    with torch.inference_mode():
        results = {name: attention(latents) for name, attention in attentions.items()}
    assert list(results) == ["this", "SDPA", "expanding"]
    average = results["this"]  # (B, nh, 1, L + r)
    torch.testing.assert_close(results["SDPA"], average, atol=1e-6, rtol=1e-5)
    want = average[..., :20] @ W_UV.mT
    torch.testing.assert_close(results["expanding"], want, atol=1e-5, rtol=1e-4)


def test_kernel_table(monkeypatch, tmp_path):
    """Time, GB/s, its share of a copy's, and ratios, "no" for what torch refuses."""
    case = kernel.Case(3, 24, 8, 50, 2, torch.bfloat16)
    attentions = kernel.attentions

    def with_a_refused_one(case, device):
        refused = {"FlashAttention": lambda latents: torch.zeros(2) @ torch.zeros(3)}
        return attentions(case, device) | refused

    monkeypatch.setattr(kernel, "cases", lambda device: [case])
    monkeypatch.setattr(kernel, "attentions", with_a_refused_one)
    monkeypatch.setattr(kernel, "BEYOND_CACHES", 20_000)
    monkeypatch.setattr(kernel, "measure_bandwidth", lambda device: 1e9)
    (row,), _ = rows_of(tmp_path, "kernel", "--rounds=3", "--device=cpu")
    assert "with torch" in row["table"]
    sizes = [row[name] for name in ("heads", "L + r", "tokens", "batch")]
    assert sizes == ["3", "24 + 8", "50", "2"]
    rate = case.nbytes / float(row["us"].replace(",", "")) / 1e3
    assert float(row["GB/s"]) == pytest.approx(rate, abs=0.06)
    assert float(row["of a copy's"].rstrip("%")) == pytest.approx(100 * rate, abs=1)
    assert float(row["SDPA / this"]) > 0 < float(row["expanding / this"])
    assert row["FlashAttention / this"] == "no"


# ---- prefill, profile, serve
def test_prefill_shows_both_forms_and_the_choice():
    """Every attention has its time and memory; MLA those of both forms, and the choice is one."""
    with torch.inference_mode():
        rows = {row["attention"]: row for row in prefill.prompt("cpu", 128, 1)}
    assert len(rows) == 8 and all(float(row["ms"]) > 0 < float(row["MB"]) for row in rows.values())
    forms = {name: row["chosen"] for name, row in rows.items() if "chosen" in row}
    assert forms["MLA"] == "expanded" and forms["MLA, 12 groups"] == "absorbed" and len(forms) == 5
    for name, form in forms.items():
        row = rows[name]
        assert row["ms"] == row[f"{form}, ms"] and row["MB"] == row[f"{form}, MB"]
        assert float(row["chosen / better"]) >= 1


@pytest.mark.slow
def test_a_prompt_in_chunks_takes_less_memory():
    """A sixteenth at a time takes less than a third of what the whole prompt takes."""
    with torch.inference_mode():
        rows = prefill.in_chunks("cpu", 512, 32)
    assert len(rows) == 3
    for row in rows:
        assert 3 * float(row["32 tokens at a time, MB"]) < float(row["at once, MB"])


def test_profile_adds_up(tmp_path, dataset):
    """Every part of an iteration of a config's run has its time, and all is their sum."""
    args = [*QUICK, f"--dataset={dataset}", "--optimizer=muon", "--gradient_accumulation_steps=2"]
    rows, done = rows_of(tmp_path, "profile", *args, "--rounds=3")
    ms = {row["part"]: float(row["ms"]) for row in rows}
    parts = ["batch", "forward", "backward", "clipping", "adamw", "muon"]
    assert list(ms) == [*parts, "all"] and "2 x 4 x 16 tokens, float32" in done.stdout
    assert sum(ms[p] for p in parts) == pytest.approx(ms["all"], abs=0.05) and min(ms.values()) > 0
    deep = run("tools.bench", "profile", *args, "--n_layer=1000000000")
    assert fails_with_one_line(deep, 1, "the run needs", "are free; use a smaller model")


@pytest.mark.slow
def test_load_of_a_server():
    """Real servers and clients: rows of figures for one client, several, and one text at a time."""
    rows = serve.under_load(tiny_config(), "cpu", clients=3, tokens=5, rounds=1)
    names = ["1 client", "3 clients", "3 clients, one text at a time"]
    assert [row["server"] for row in rows] == names
    assert all(float(row["tokens/s"].replace(",", "")) > 0 for row in rows)
    assert rows[0]["of 1 client's"] == "1.0x"
