"""Sampling, as a user does it. Run: python -m pytest tests/test_sample.py"""

import io
import json

import pytest
import torch

from nanomla import checkpoint
from nanomla.tokenizer import Tokenizer
from tests.conftest import QUICK, fails_with_one_line, run


@pytest.fixture(scope="module")
def trained(tmp_path_factory, dataset):
    """The folder of a short MLA run."""
    folder = tmp_path_factory.mktemp("run")
    args = [
        "--use_mla=True",
        "--pos_emb=rope",
        f"--dataset={dataset}",
        f"--out_dir={folder}",
        "--max_iters=60",
    ]
    done = run("train.py", *QUICK, *args)
    assert done.returncode == 0, done.stderr
    return folder


def test_greedy_text_is_the_models(trained):
    """What is printed is the prompt and the argmax continuation of the checkpoint, decoded on the
    latent cache."""
    done = run(
        "sample.py",
        f"--out_dir={trained}",
        "--start=to be",
        "--max_new_tokens=8",
        "--temperature=0",
    )
    ckpt = checkpoint.load(trained / "best.pt")
    model, _ = checkpoint.build(ckpt)
    tokenizer = Tokenizer(ckpt.tokenizer)
    idx = torch.tensor([tokenizer.encode("to be")])
    want = tokenizer.decode(
        model.eval().generate(idx, 8, temperature=0, use_cache=False)[0].tolist()
    )
    assert done.stdout == want + "\n"
    line = done.stderr.strip()
    assert (
        "tokens/s" in line
        and "96 bytes per token, 2.67x smaller than MHA's" in line
        and "\n" not in line
    )


def test_samples_seeds_and_files(trained, tmp_path):
    """Several samples differ, the same seed repeats them, the prompt can come from a file."""
    (tmp_path / "prompt.txt").write_text("the mind\n")
    args = [
        f"--out_dir={trained}",
        f"--start=FILE:{tmp_path}/prompt.txt",
        "--num_samples=3",
        "--max_new_tokens=30",
    ]
    one, two, other = (
        run("sample.py", *args),
        run("sample.py", *args),
        run("sample.py", *args, "--seed=2"),
    )
    samples = one.stdout.split("\n---------------\n")[:-1]
    assert len(samples) == len(set(samples)) == 3 and all(
        s.startswith("the mind\n") for s in samples
    )
    assert one.stdout == two.stdout != other.stdout


def test_sampling_options_change_what_is_drawn(trained):
    """temperature, top_k, top_p and dtype each have an effect."""
    args = [f"--out_dir={trained}", "--start=to", "--max_new_tokens=40", "--temperature=3"]
    plain = run("sample.py", *args).stdout
    for flag in ("--temperature=0.5", "--top_k=2", "--top_p=0.3", "--max_new_tokens=39"):
        assert run("sample.py", *args, flag).stdout != plain, flag
    done = run("sample.py", *args, "--dtype=bfloat16")
    assert "in bfloat16; cache: 48 bytes" in done.stderr


@pytest.mark.parametrize(
    ("args", "status", "words"),
    [
        (["--start="], 2, ["prompt is empty"]),
        (["--start=ROMEO"], 1, ["character 'R'", "vocabulary"]),
        (["--start=to be or not to be to be"], 1, ["24 tokens", "context 16"]),
        (["--start=FILE:/no/such/file"], 1, ["/no/such/file"]),
        (["--out_dir=nowhere"], 1, ["no checkpoint in nowhere"]),
        (["--ckpt=nowhere.pt"], 1, ["no checkpoint at nowhere.pt"]),
        (["--ckpt=train.py"], 1, ["train.py"]),
        (["--temprature=1"], 2, ["did you mean temperature"]),
        (["--temperature=-1"], 2, ["temperature=-1"]),
        (["--top_p=2"], 2, ["top_p=2"]),
        (["--num_samples=0"], 2, ["num_samples=0"]),
        (["--svd_rank=2"], 2, ["use_svd"]),
        (["--use_svd=True", "--svd_rank=99"], 1, ["svd_rank=99", "1 to the head size 8"]),
        (["--stop="], 2, ["stop=''"]),
        (["--interactive", "--json"], 2, ["interactive takes one prompt"]),
        (["--device=tpu"], 2, ["--device=tpu"]),
    ],
)
def test_bad_input_is_one_line(trained, args, status, words):
    """One line on stderr, the right exit status, nothing on stdout."""
    done = run("sample.py", f"--out_dir={trained}", "--start=to", "--max_new_tokens=3", *args)
    assert fails_with_one_line(done, status, *words) and done.stdout == ""


def test_factors_keep_their_rank(tmp_path, dataset):
    """use_svd=True without a rank, on a checkpoint that has factors, is what the checkpoint has."""
    svd = ["--use_svd=True", "--svd_rank=3"]
    args = [*QUICK, f"--dataset={dataset}", f"--out_dir={tmp_path}/a", "--max_iters=2"]
    assert run("train.py", *args, *svd).returncode == 0
    sample = [f"--out_dir={tmp_path}/a", "--start=to", "--max_new_tokens=9", "--temperature=0"]
    want = run("sample.py", *sample)
    done = run("sample.py", *sample, "--use_svd=True")
    assert done.returncode == 0 and done.stdout == want.stdout != "", done.stderr
    assert "factorised" not in done.stderr
    args = [*QUICK, f"--dataset={dataset}", f"--out_dir={tmp_path}/b", "--max_iters=2"]
    done = run("train.py", *args, f"--init_from={tmp_path}/a", "--use_svd=True")
    assert done.returncode == 0, done.stderr
    assert checkpoint.load(tmp_path / "b" / "ckpt.pt").model_args["svd_rank"] == 3
    done = run("sample.py", *sample, "--use_svd=True", "--svd_rank=2")
    assert "rank 2 of 8" in done.stderr


def test_prompts_one_per_line(trained, tmp_path):
    """Prompts of several lengths, batched or not, give each its own greedy continuation, as text
    and as JSON."""
    (tmp_path / "prompts.txt").write_text("to be\nthe mind\n\nor no\n")
    args = [f"--out_dir={trained}", "--max_new_tokens=7", "--temperature=0"]
    batch = [*args, f"--start=FILE:{tmp_path}/prompts.txt", "--one_per_line"]
    alone = [
        run("sample.py", *args, f"--start={p}").stdout[:-1] for p in ("to be", "the mind", "or no")
    ]
    assert run("sample.py", *batch).stdout.split("\n---------------\n")[:-1] == alone
    rows = [
        json.loads(line)
        for line in run("sample.py", *batch, "--json", "--num_samples=2").stdout.splitlines()
    ]
    assert [r["prompt"] + r["text"] for r in rows] == [text for text in alone for _ in range(2)]
    assert all(
        r["tokens"] == 7 and r["seconds"] > 0 and set(r) == {"prompt", "text", "tokens", "seconds"}
        for r in rows
    )


def test_stop_strings(trained):
    """Output ends before the stop string, whether it is streamed or batched, and wherever tokens
    cut it."""
    args = [f"--out_dir={trained}", "--start=to", "--max_new_tokens=60", "--temperature=0"]
    full = run("sample.py", *args).stdout[:-1]
    stop = full[9:12]
    want = full[: full.index(stop, 2)]
    assert run("sample.py", *args, f"--stop={stop}").stdout == want + "\n"
    assert (
        json.loads(run("sample.py", *args, f"--stop={stop}", "--json").stdout)["text"] == want[2:]
    )
    assert run("sample.py", *args, "--stop=no such text").stdout == full + "\n"


def test_cache_settings(trained):
    """Without a cache the greedy text is the same; a bfloat16 cache takes half the bytes."""
    args = [f"--out_dir={trained}", "--start=to", "--max_new_tokens=12", "--temperature=0"]
    plain, without = run("sample.py", *args), run("sample.py", *args, "--use_cache=False")
    assert plain.stdout == without.stdout and "no cache" in without.stderr
    assert "cache: 48 bytes" in run("sample.py", *args, "--cache_dtype=bfloat16").stderr


def test_interactive_keeps_its_cache(trained, monkeypatch):
    """Every line goes behind what was said; the cache gives what a fresh one gives for the full
    conversation."""
    args = [f"--out_dir={trained}", "--interactive", "--max_new_tokens=3", "--temperature=0"]
    monkeypatch.setattr("sys.stdin", io.StringIO("to\nor\nTO\nbe\n\nnever read\n"))
    done = run("sample.py", *args)
    assert done.returncode == 0 and "character 'T'" in done.stderr  # and the conversation went on
    model, _ = checkpoint.build(ckpt := checkpoint.load(trained / "best.pt"))
    tokenizer, context, want = Tokenizer(ckpt.tokenizer), [], ""
    for line in ("to\n", "or\n", "be\n"):
        context += tokenizer.encode(line)
        context = context if len(context) <= 16 else context[-8:]
        new = (
            model.eval()
            .generate(torch.tensor([context]), 3, temperature=0)[0, len(context) :]
            .tolist()
        )
        context, want = context + new, want + tokenizer.decode(new) + "\n"
    assert done.stdout == want


def test_a_closed_pipe_ends_quietly(trained):
    """`sample.py | head -c 1` gives no traceback."""
    import subprocess
    import sys

    from tests.conftest import ROOT

    sample = f"{sys.executable} sample.py --out_dir={trained} --start=to --max_new_tokens=3000"
    command = f"{sample} | head -c 1"
    done = subprocess.run(
        command, shell=True, cwd=ROOT, check=False, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "t" and "Traceback" not in done.stderr
