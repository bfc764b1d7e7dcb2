"""tools.bench counts and times. Run: python -m pytest tests/test_bench.py"""

import json
import sys
import time

import pytest
import torch

from model import GPT, GPTConfig
from nanomla import costs
from nanomla.dataset import Dataset
from nanomla.generate import DecodingStep
from tests.conftest import (
    QUICK,
    TINY_MLA,
    fails_with_one_line,
    randomise,
    run,
    tiny_config,
)
from tools.bench import __main__ as bench
from tools.bench import kernel, load


def test_report_counts_a_config(tmp_path):
    """Parameters, cache bytes and FLOPs of a config beside MHA's, as the formulas say, in the table
    and in JSON."""
    done = run(
        "tools.bench",
        "config/train_mla.py",
        "--report",
        "--vocab_size=65",
        "--context=64",
        f"--json={tmp_path}/r.json",
    )
    assert done.returncode == 0, done.stderr
    rows = {r[""]: r for r in json.loads((tmp_path / "r.json").read_text())["rows"]}
    assert rows["cache bytes per token, float32"]["this config"] == f"{2 * 32 * 4}"
    assert rows["cache bytes per token, float32"]["MHA"] == f"{2 * 256 * 4:,}"
    assert rows["cache bytes per token, bfloat16"]["MHA / this"] == "8.00"
    attention = 128 * 128 * 2 + 128 * 32 + 32 + 32 * 128  # q and c_proj, latent, norm, expansion
    assert rows["parameters: attention"]["this config"] == f"{2 * attention:,}"
    assert rows["of these, making keys and values"]["MHA"] == f"{2 * 2 * 128 * 128:,}"
    assert "| cache bytes per token, float32 " in done.stdout


@pytest.mark.parametrize(
    ("flags", "figure", "ratio"),
    [
        (["--n_kv_head=1"], 2 * 2 * 32 * 4, "4.00"),
        (
            ["--use_mla=True", "--pos_emb=rope", "--mla_rope=latent", "--mla_latent_dim=16"],
            128,
            "16.00",
        ),
        (["--use_latent_tokens=True", "--n_latent_tokens=8"], 0, "constant state"),
    ],
)
def test_report_stands_beside_plain_mha(flags, figure, ratio, tmp_path):
    """Whatever the config has, the other column is MHA with as many key/value heads as heads."""
    shape = ["--n_layer=2", "--n_head=4", "--n_embd=128", "--vocab_size=65", "--block_size=64"]
    done = run("tools.bench", "--report", *shape, *flags, f"--json={tmp_path}/r.json")
    assert done.returncode == 0, done.stderr
    rows = {r[""]: r for r in json.loads((tmp_path / "r.json").read_text())["rows"]}
    row = rows["cache bytes per token, float32"]
    assert row["this config"] == f"{figure:,}" and row["MHA"] == "2,048"
    assert row["MHA / this"] == ratio


def counted(tmp_path, *args):
    """The rows of a report by what they count, and what it says on stderr."""
    done = run("tools.bench", "--report", *args, f"--json={tmp_path}/r.json")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    return {row[""]: row["this config"] for row in rows}, done.stderr


def test_report_takes_what_the_config_names(tmp_path, dataset):
    """The vocabulary of its dataset, and its block_size; without the data GPT-2's, and one line."""
    shape = ["--n_layer=3", "--n_head=2", "--n_embd=16", "--block_size=24"]
    embeddings, tokens = "parameters: embeddings and lm_head", Dataset(str(dataset), 1).vocab_size
    (tmp_path / "c.py").write_text(f"dataset = {str(dataset)!r}\nmax_iters = 3\n")
    rows, warnings = counted(tmp_path, *shape, str(tmp_path / "c.py"))
    assert rows[embeddings] == f"{16 * (24 + tokens):,}" and not warnings
    config = GPTConfig(24, tokens, n_layer=3, n_head=2, n_embd=16, bias=False)
    flops = costs.flops_per_token(GPT(config), 24, absorbed=True)
    assert rows["FLOPs per decoded token at 24"] == f"{flops:,}"
    assert rows["parameters: all"] == f"{GPT(config).get_num_params(False):,}"
    rows, warnings = counted(tmp_path, *shape, "--dataset=no-such-data", "--context=100")
    assert rows[embeddings] == f"{16 * (24 + 50304):,}"
    assert "FLOPs per decoded token at 100" in rows
    assert warnings.startswith("warning: dataset no-such-data is not prepared")
    assert warnings.count("\n") == 1 and "50,304" in warnings


def test_report_of_heads_that_mha_cannot_rotate(tmp_path):
    """MHA stands beside them with learned positions."""
    latent = ["--use_mla", "--pos_emb=rope", "--mla_nope_dim=3", "--mla_rope_dim=2"]
    rows, _ = counted(tmp_path, "--n_embd=12", "--n_head=4", "--mla_latent_dim=4", *latent)
    assert rows["cache bytes per token, float32"] == f"{12 * 6 * 4}"


def test_report_of_absurd_sizes(tmp_path):
    """Layers that are alike are counted, not built; what no tensor can hold is one line."""
    shape = ["--n_head=1", "--n_embd=8", "--vocab_size=9", "--block_size=4", "--mla_share_latent"]
    shape += ["--use_mla", "--mla_latent_dim=3"]
    began = time.perf_counter()
    rows, _ = counted(tmp_path, "--n_layer=100000", *shape)
    few, _ = counted(tmp_path, "--n_layer=3", *shape)
    more, _ = counted(tmp_path, "--n_layer=4", *shape)
    for what, figure in rows.items():
        n, a, b = (int(text.replace(",", "")) for text in (figure, few[what], more[what]))
        assert n == a + (100_000 - 3) * (b - a), what
    for width, problem in ((12 * 10**7, "over 2^60 parameters"), (12 * 10**12, "no machine")):
        wide = run("tools.bench", "--report", f"--n_embd={width}")
        assert fails_with_one_line(wide, 1, problem, "make it smaller")
    long = run("tools.bench", "--report", "--block_size=1000000000000000", "--pos_emb=rope")
    assert fails_with_one_line(long, 1, "positions needs 2.1 EB", "--block_size")
    deep = run("tools.bench", "profile", "--n_layer=1000000000", "--device=cpu")
    assert fails_with_one_line(deep, 1, "the run needs", "are free; use a smaller model")
    assert time.perf_counter() - began < 30


@pytest.mark.parametrize("flag", ["--vs_hf", "--vs-hf"])
def test_transformers_are_missed_before_anything_is_timed(flag, monkeypatch):
    """One line with the remedy, and no table."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setattr(bench, "bench_train", None)
    done = run("tools.bench", "train", flag)
    assert fails_with_one_line(done, 1, "pip install transformers") and not done.stdout


def test_alternation_and_roofline():
    """Every entry runs once a round, slow ones in 3 rounds; the roofline is the larger limit."""
    calls = []
    entries = [bench.Timed("a", lambda: calls.append("a"), steps=2)]
    entries.append(bench.Timed("b", lambda: calls.append("b"), slow=True))
    took = bench.alternate(entries, 5, "cpu")
    assert "".join(calls) == "ab" * 4 + "a" * 2 and list(took) == ["a", "b"]
    assert took["a"].seconds > 0
    limits = bench.Limits(10.0, {torch.float32: 100.0})
    assert limits.seconds(50, 100, torch.float32) == 5
    assert limits.seconds(1, 1000, torch.float32) == 10


@pytest.mark.parametrize(
    ("args", "status", "words"),
    [
        ([], 2, ["decode, kernel, prefill, train, lengths, serve, svd"]),
        (["decode", "train"], 2, ["one of"]),
        (["decode", "--n_layer=3"], 2, ["unknown setting n_layer"]),
        (["decode", "--learning_rate=1"], 2, ["unknown setting learning_rate"]),
        (["svd", "--rounds=3"], 2, ["unknown setting rounds"]),
        (["prefill", "--vs_hf"], 2, ["unknown setting vs_hf"]),
        (["kernel", "--vs_hf"], 2, ["unknown setting vs_hf"]),
        (["train", "--vs_compiled"], 2, ["unknown setting vs_compiled"]),
        (["lengths", "--vs_hf"], 2, ["unknown setting vs_hf"]),
        (["decode", "--rounds=0"], 2, ["rounds", "at least 1"]),
        (["lengths", "--rounds=100000000"], 2, ["rounds", "at most 10000"]),
        (["--report", "--context=0"], 2, ["context", "at least 1"]),
        (["--report", "--init_from=out", "--vocab_size=9"], 2, ["its own vocab_size"]),
        (["--report", "--max_iters=3"], 2, ["unknown setting max_iters"]),
        (
            ["--report", "config/train_mla.py", "--vocab_size=65", "--json=/no/where"],
            1,
            ["/no/where"],
        ),
    ],
)
def test_bad_input_is_one_line(args, status, words):
    """No command, two of them, flags that would have no effect, a file that cannot be written."""
    assert fails_with_one_line(run("tools.bench", *args), status, *words)


def test_prefill_shows_both_forms_and_the_choice(capsys):
    """Every variant has its time and memory; MLA those of both forms, and the choice is one."""
    with torch.inference_mode():
        rows = {row["attention"]: row for row in bench.bench_prompt("cpu", 128, 1)}
    assert len(rows) == 8 and all(float(row["ms"]) > 0 < float(row["MB"]) for row in rows.values())
    forms = {name: row["chosen"] for name, row in rows.items() if "chosen" in row}
    assert forms["MLA"] == "expanded" and forms["MLA, 12 groups"] == "absorbed" and len(forms) == 5
    for name, form in forms.items():
        row = rows[name]
        assert row["ms"] == row[f"{form}, ms"] and row["MB"] == row[f"{form}, MB"]
        assert float(row["chosen / better"]) >= 1
    assert "| MLA, 12 groups " in capsys.readouterr().out


def test_a_prompt_in_chunks_takes_less_memory():
    """A sixteenth at a time takes less than a third of what the whole prompt takes."""
    with torch.inference_mode():
        rows = bench.bench_chunks("cpu", 512, 32)
    assert len(rows) == 3
    for row in rows:
        assert 3 * float(row["32 tokens at a time, MB"]) < float(row["at once, MB"])


def test_peak_bytes():
    """What is alive together counts, and what was freed before does not."""

    def run() -> None:
        a = torch.empty(1000)
        del a
        b, c = torch.empty(3000), torch.empty(500)
        del b, c

    assert bench.peak_bytes(run, "cpu") == 3500 * 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "flags", "count"),
    [
        ("decode", ["--vs_hf", "--vs_compiled", "--rounds=1"], 5),
        ("kernel", ["--rounds=1"], 2),
        ("prefill", ["--rounds=1"], 6),
        ("train", ["--vs_hf", "--rounds=1"], 3),
        ("lengths", ["--rounds=1"], 2),
        ("svd", [], 1),
    ],
)
def test_commands_run(command, flags, count, tmp_path):
    """Each prints its tables, transformers beside it, and writes them as JSON."""
    flags = [*flags, f"--json={tmp_path}/b.json"]
    done = run("tools.bench", command, *flags, fresh=True, timeout=1500)
    assert done.returncode == 0, done.stderr
    tables = {row["table"] for row in json.loads((tmp_path / "b.json").read_text())["rows"]}
    assert len(tables) == count and all(t in done.stdout for t in tables)


def test_profile_adds_up(tmp_path, dataset):
    """Every part of an iteration of a config's run has its time, and all is their sum."""
    args = [*QUICK, f"--dataset={dataset}", "--optimizer=muon", "--gradient_accumulation_steps=2"]
    done = run("tools.bench", "profile", *args, "--rounds=3", f"--json={tmp_path}/b.json")
    assert done.returncode == 0, done.stderr
    rows = {r["part"]: r for r in json.loads((tmp_path / "b.json").read_text())["rows"]}
    parts = ["batch", "forward", "backward", "clipping", "adamw", "muon"]
    assert list(rows) == [*parts, "all"] and "2 x 4 x 16 tokens, float32" in done.stdout
    ms = {part: float(row["ms"]) for part, row in rows.items()}
    assert sum(ms[p] for p in parts) == pytest.approx(ms["all"], abs=0.05) and min(ms.values()) > 0


@pytest.mark.slow
def test_load_of_a_server():
    """Real servers and clients: rows of figures for one client, several, and one text at a time."""
    rows = load.measure(tiny_config(), "cpu", clients=3, tokens=5, rounds=1)
    names = ["1 client", "3 clients", "3 clients, one text at a time"]
    assert [row["server"] for row in rows] == names
    assert all(float(row["tokens/s"].replace(",", "")) > 0 for row in rows)
    assert rows[0]["of 1 client's"] == "1.0x"


@pytest.mark.parametrize("B", [1, 2])
def test_ways_of_the_kernel_are_one_function(B, monkeypatch):
    """Ours and torch's average the same rows; keys and values expanded from them give what the
    average does through W_UV."""
    case = kernel.Case(3, 20, 6, 33, B, torch.float32)
    monkeypatch.setattr(kernel, "BEYOND_CACHES", 3 * case.nbytes)
    rows, *copies = case.rows("cpu")
    assert rows.nbytes == case.nbytes and len(copies) == 2
    torch.manual_seed(1)
    ways = kernel.ways(case, "cpu")
    torch.manual_seed(1)
    torch.randn(B, 3, 1, kernel.HS + 6), torch.randn(3, kernel.HS, 20)  # q and W_UK
    W_UV = torch.randn(3, kernel.HS, 20) / 20**0.5
    with torch.inference_mode():
        got = {name: way(rows) for name, way in ways.items()}
    assert list(got) == ["this", "SDPA", "expanding"]
    average = got["this"]  # (B, nh, 1, L + r)
    torch.testing.assert_close(got["SDPA"], average, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(got["expanding"], average[..., :20] @ W_UV.mT, atol=1e-5, rtol=1e-4)


def test_kernel_takes_what_fits(monkeypatch):
    """Half of a GPU's free memory, for the cached rows alone; bytes are those of the rows."""
    sizes = {}
    for free in (80 * 10**9, 10**9):
        monkeypatch.setattr(kernel, "free_memory", lambda device, free=free: free)
        found = kernel.cases("cuda")
        sizes[free] = len(found)
        assert {case.dtype for case in found} == {torch.bfloat16}
        assert max(case.nbytes for case in found) <= free / 2
        assert {case.heads for case in found} == {12, 24, 128}
    assert sizes[80 * 10**9] == 3 * 2 * 5 * 3 > sizes[10**9] > 3 * 2 * 5
    assert kernel.Case(12, 192, 32, 1000, 2, torch.bfloat16).nbytes == 2 * 1000 * 224 * 2
    assert len(kernel.cases("cpu")) == 2 * 2 * 2


def test_kernel_repeats_until_it_can_be_timed(monkeypatch):
    """A short way is computed on all copies of the rows in turn, a long one once; one that torch
    refuses is none."""
    monkeypatch.setattr(kernel, "RUN_SECONDS", 1e6)
    seen, rows = [], [torch.zeros(1) + i for i in range(30)]
    launch, n = kernel.possible(lambda t: seen.append(int(t)), rows, "cpu")
    seen.clear()
    launch()
    assert n == 30 and seen == list(range(30))
    assert kernel.repeated(lambda t: t, rows[:2], "cpu")[1] == kernel.LAUNCHES
    monkeypatch.setattr(kernel, "RUN_SECONDS", 0)
    assert kernel.repeated(lambda t: t, rows, "cpu")[1] == 1

    def refused(rows):
        raise RuntimeError("No available kernel")

    assert kernel.possible(refused, rows, "cpu") is None


def test_kernel_command(monkeypatch, tmp_path):
    """A table for every dtype: time, GB/s, its share of a copy's, and ratios, "no" for a way that
    is refused."""
    cases = [kernel.Case(3, 24, 8, 50, 2, dtype) for dtype in (torch.float32, torch.bfloat16)]
    ways = kernel.ways

    def with_a_refused_one(case, device):
        return ways(case, device) | {"FlashAttention": lambda rows: torch.zeros(2) @ torch.zeros(3)}

    monkeypatch.setattr(kernel, "cases", lambda device: cases)
    monkeypatch.setattr(kernel, "ways", with_a_refused_one)
    monkeypatch.setattr(kernel, "BEYOND_CACHES", 20_000)
    monkeypatch.setattr(kernel, "RUN_SECONDS", 1e-3)
    monkeypatch.setattr(bench, "measure_bandwidth", lambda device: 1e9)
    args = ["kernel", "--rounds=3", "--device=cpu", f"--json={tmp_path}/b.json"]
    done = run("tools.bench", *args)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "b.json").read_text())["rows"]
    assert len({row["table"] for row in rows}) == 2 and "with torch" in rows[0]["table"]
    for row, case in zip(rows, cases, strict=True):
        sizes = [row[name] for name in ("heads", "L + r", "tokens", "batch")]
        assert sizes == ["3", "24 + 8", "50", "2"]
        rate = case.nbytes / float(row["us"]) / 1e3
        assert float(row["GB/s"]) == pytest.approx(rate, abs=0.06)
        assert float(row["of a copy's"].rstrip("%")) == pytest.approx(100 * rate, abs=1)
        assert float(row["SDPA / this"]) > 0 < float(row["expanding / this"])
        assert row["FlashAttention / this"] == "no"


@torch.inference_mode()
def test_static_model_is_our_mha():
    """Token by token, whatever stands in the cache behind them; its greedy tokens are those of
    model.generate."""
    config = tiny_config(gelu="tanh", tie_weights=False)
    model, ids = randomise(GPT(config)), torch.randint(23, (1, 9))
    static, cache = bench.StaticMHA(model, 16), model.make_cache(1, 16)
    for rows in static.buffers(recurse=False):
        rows.normal_()
    for i, token in enumerate(ids.split(1, dim=1)):
        want, _ = model(token, cache=cache)
        got = static(token, torch.tensor([i]))
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    text = ids
    for i in range(8, 14):
        new = static.next_token(text[:, -1:], torch.tensor([i]))
        text = torch.cat([text, new], dim=1)
    assert torch.equal(text, model.generate(ids, 6, temperature=0))


def test_compiled_decoding_takes_every_step(monkeypatch):
    """From the last of the given tokens on, over a cache that the last step fits."""
    calls = []

    def uncompiled(step, device):
        calls.append((step.__self__.max_len, device))
        return lambda token, pos: calls.append(int(pos)) or step(token, pos)

    monkeypatch.setattr(bench, "compiled", uncompiled)
    with torch.inference_mode():
        run = bench.compiled_decode(randomise(GPT(tiny_config())), torch.randint(23, (1, 7)), 4)
        run()
        run()
    assert calls == [(16, "cpu"), 6, 7, 8, 9, 6, 7, 8, 9]


def test_the_step_is_one_graph(monkeypatch):
    """torch.compile takes it as a whole, and once for all tokens."""
    whole = lambda step, device: torch.compile(step, fullgraph=True, backend="eager")
    monkeypatch.setattr(bench, "compiled", whole)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch.inference_mode():
        run = bench.compiled_decode(randomise(GPT(tiny_config())), torch.randint(23, (1, 7)), 4)
        run()
        run()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
@torch.inference_mode()
def test_compiled_step_is_the_step():
    """torch.compile takes it as a whole, for every token."""
    try:
        bench.require_compiler("cpu")
    except bench.UserError as error:
        pytest.skip(str(error))
    static = bench.StaticMHA(randomise(GPT(tiny_config())), 16)
    step = bench.compiled(static.forward, "cpu")
    for i in range(5):
        at = torch.randint(23, (1, 1)), torch.tensor([i])
        torch.testing.assert_close(step(*at), static(*at), atol=1e-5, rtol=1e-5)


def test_a_compiler_is_missed_before_anything_is_timed(monkeypatch):
    """One line with the remedy, and no table."""

    def fails(step, device):
        raise RuntimeError("no compiler\nand more")

    monkeypatch.setattr(bench, "compiled", fails)
    monkeypatch.setattr(bench, "measure_limits", None)
    done = run("tools.bench", "decode", "--vs_compiled", "--device=cpu")
    assert fails_with_one_line(done, 1, "no compiler)", "install a C++ compiler")


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
    model = randomise(GPT(GPTConfig(**TINY_MLA)))
    cache = model.make_cache(2, 16)
    run = bench.decode(model, cache, torch.randint(23, (2, 1)), 12, 3)
    for _ in range(2):
        run()
        assert cache.pos == 12
    assert calls == [((2, 1), faster)] * 6


@torch.inference_mode()
def test_throughput_at_equal_memory(monkeypatch):
    """MLA of an eighth of the numbers has eight times the rows in the same bytes; where memory is
    short, both have fewer."""
    base, cfg = tiny_config(n_embd=48), bench.DecodeConfig(rounds=3)
    mha, mla = bench.bench_equal_memory(cfg, "cpu", base, 4)
    assert (mha["rows"], mla["rows"]) == ("4", "32") and mha["cache"] == mla["cache"] == "24.6 kB"
    ratio = float(mla["tokens/s"].replace(",", "")) / float(mha["tokens/s"].replace(",", ""))
    assert float(mla["this / MHA"]) == pytest.approx(ratio, abs=0.1)
    monkeypatch.setattr(bench, "free_memory", lambda device: 4 * 24_576)
    mha, mla = bench.bench_equal_memory(cfg, "cpu", base, 32)
    assert (mha["rows"], mla["rows"]) == ("4", "32")
