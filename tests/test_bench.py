"""tools.bench counts and times. Run: python -m pytest tests/test_bench.py"""

import json
import sys

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
    make,
    run,
    save_model,
    tiny_config,
)
from tools.bench import decode, kernel, prefill, serve, speculate, train
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


def test_report_counts_a_config(tmp_path):
    """Parameters and cache bytes beside those of MHA with as many key/value heads, by hand."""
    rows, _ = report(tmp_path, "config/train_mla.py", "--vocab_size=65")
    attention = 128 * 128 * 2 + 128 * 32 + 32 + 32 * 128  # q and c_proj, latent, norm, expansion
    assert rows["parameters: attention"]["this config"] == f"{2 * attention:,}"
    assert rows["of these, making keys and values"]["MHA"] == f"{2 * 2 * 128 * 128:,}"
    assert rows["cache bytes per token, float32"]["this config"] == f"{2 * 32 * 4}"
    assert rows["cache bytes per token, bfloat16"]["MHA"] == f"{2 * 256 * 2:,}"
    assert rows["cache bytes per token, bfloat16"]["MHA / this"] == "8.00"
    rows, _ = report(tmp_path, "--n_head=4", "--n_embd=128", "--n_kv_head=1", "--n_layer=2")
    assert rows["cache bytes per token, float32"]["MHA / this"] == "4.00"


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
    rows, warnings = report(tmp_path, *shape, "--dataset=no-such-data")
    assert rows[embeddings]["this config"] == f"{16 * (24 + 50304):,}"
    assert warnings.startswith("warning: dataset no-such-data is not prepared")


def test_bad_input_is_one_line(monkeypatch):
    """No question, a flag without effect, a file that cannot be; and transformers is missing,
    which is said before anything is timed."""
    for args, status, words in (
        ([], 2, "decode, kernel, prefill, train, lengths, serve, svd"),
        (["prefill", "--vs_hf"], 2, "unknown setting vs_hf"),
        (["--report", "--init_from=out", "--vocab_size=9"], 2, "its own vocab_size"),
        (["--report", "--vocab_size=65", "--json=/no/where"], 1, "/no/where"),
    ):
        assert fails_with_one_line(run("tools.bench", *args), status, words)
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setattr(train, "measure", None)
    done = run("tools.bench", "train", "--vs-hf")
    assert fails_with_one_line(done, 1, "pip install transformers") and not done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("question", "flags", "count"),
    [
        ("decode", ["--vs_hf", "--rounds=1"], 5),
        ("kernel", ["--rounds=1"], 1),
        ("prefill", ["--rounds=1"], 5),
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


def test_alternation_and_roofline():
    """Every entry runs once a round, slow ones in 3 rounds; the roofline is the larger limit."""
    calls = []
    entries = [
        Timed("a", lambda: calls.append("a"), steps=2),
        Timed("b", lambda: calls.append("b"), slow=True),
    ]
    alternate(entries, 5, "cpu")
    assert "".join(calls) == "ab" * 4 + "a" * 2 and entries[0].seconds > 0
    limits = Limits(10.0, {torch.float32: 100.0})
    for nbytes, flops, ratio in ((50, 100, "4.00"), (1, 1000, "2.00")):
        entry = Timed("a", calls, nbytes=nbytes, flops=flops, seconds=20.0)
        assert limits.beside(entry, torch.float32) == ratio


def test_peak_bytes():
    """What is alive together counts, and what was freed before does not."""

    def run() -> None:
        a = torch.empty(1000)
        del a
        b, c = torch.empty(3000), torch.empty(500)
        del b, c

    assert peak_bytes(run, "cpu") == 3500 * 4


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
def test_kernel_figures(monkeypatch):
    """Time, GB/s and its share of a copy's agree; torch's attention is timed on the same."""
    monkeypatch.setattr(kernel, "BEYOND_CACHES", 20_000)
    latents = torch.randn(2, 1, 50, 32)
    row = kernel.figures(torch.randn(2, 3, 1, 32), latents, 3, 1e9)
    assert [row[name] for name in ("heads", "L + r", "tokens", "batch")] == ["3", "32", "50", "2"]
    rate = latents.nbytes / float(row["us"].replace(",", "")) / 1e3
    assert float(row["GB/s"]) == pytest.approx(rate, abs=0.06)
    assert float(row["of a copy's"].rstrip("%")) == pytest.approx(100 * rate, abs=1)
    assert float(row["SDPA / this"]) > 0


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


def test_profile_adds_up(tmp_path, dataset):
    """Every part of an iteration of a config's run has its time, and all is their sum."""
    args = [*QUICK, f"--dataset={dataset}", "--optimizer=muon", "--gradient_accumulation_steps=2"]
    rows, done = rows_of(tmp_path, "profile", *args, "--rounds=3")
    ms = {row["part"]: float(row["ms"]) for row in rows}
    parts = ["batch", "forward", "backward", "clipping", "adamw", "muon"]
    assert list(ms) == [*parts, "all"] and "2 x 4 x 16 tokens, float32" in done.stdout
    assert sum(ms[p] for p in parts) == pytest.approx(ms["all"], abs=0.05) and min(ms.values()) > 0


@pytest.mark.slow
def test_load_of_a_server():
    """Real servers and clients: rows of figures for one client, several, and one text at a time."""
    rows = serve.under_load(tiny_config(), "cpu", clients=3, tokens=5, rounds=1)
    names = ["1 client", "3 clients", "3 clients, one text at a time"]
    assert [row["server"] for row in rows] == names
    assert all(float(row["tokens/s"].replace(",", "")) > 0 for row in rows)
    assert rows[0]["of 1 client's"] == "1.0x"


@pytest.mark.slow
def test_speculation_is_timed(tmp_path, monkeypatch):
    """Of a run with a predictor and of one with a draft: the time of a pass of every length, texts
    with and without drafts; without weights, of a large model, passes alone."""
    chars = {"kind": "char", "chars": "\nabcdefghijklmnopqrstuv"}
    for name, n_predict in (("own", 1), ("plain", 0)):
        (tmp_path / name).mkdir()
        model = make("MLA", n_predict=n_predict)
        save_model(tmp_path / name, model, best=True, tokenizer=chars)
    few = ["speculate", "--rounds=1", "--tokens=12", "--device=cpu"]
    for name, flags in (("own", []), ("plain", [f"--draft={tmp_path}/own"])):
        rows, _ = rows_of(tmp_path, *few, f"--init_from={tmp_path}/{name}", *flags)
        assert len(rows) == 5 + 2 * 6 and rows[0]["drafts"] == "1"
        assert float(rows[0]["right drafts that repay a pass"]) > 0
        drawn = [row for row in rows if row.get("temperature") == "0"]
        assert "accepted" not in drawn[0] and drawn[1]["accepted"].endswith("%")
    monkeypatch.setattr(speculate, "LARGE", {**speculate.LARGE, "n_layer": 1, "vocab_size": 99})
    rows, _ = rows_of(tmp_path, *few)
    assert len(rows) == 5
