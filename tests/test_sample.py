"""Sampling, as a user does it. Run: python -m pytest tests/test_sample.py"""

import contextlib
import io
import json
import os
import pty
import select
import subprocess
import sys
import time

import pytest
import torch

import sample
from nanomla import checkpoint
from nanomla.errors import run_script
from nanomla.tokenizer import Tokenizer
from tests.conftest import QUICK, ROOT, fails_with_one_line, run


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
        (["--start=FILE:docs"], 1, ["FILE:docs: cannot be read (Is a directory)"]),
        (["--start=FILE:" + "x" * 5000], 1, ["cannot be read (File name too long)"]),
        (["--start=FILE:docs/comparison.png"], 1, ["comparison.png: cannot be read ('utf-8'"]),
        (["--start=FILE:a\0b"], 1, ["FILE:a\\x00b: cannot be read (embedded null byte)"]),
        (["--start=a\0b"], 1, ["character '\\x00'"]),
        (["--seed=9223372036854775808"], 2, ["seed must be", "below 9223372036854775808"]),
        (["--num_samples=1000000000"], 2, ["num_samples must be", "at most 100000"]),
        (["--out_dir=nowhere"], 1, ["no checkpoint in nowhere"]),
        (["--ckpt=nowhere.pt"], 1, ["no checkpoint at nowhere.pt"]),
        (["--ckpt=train.py"], 1, ["train.py"]),
        (["--temprature=1"], 2, ["did you mean temperature"]),
        (["--temperature=-1"], 2, ["temperature=-1"]),
        (["--top_p=2"], 2, ["top_p=2"]),
        (["--num_samples=0"], 2, ["num_samples=0"]),
        (["--prefill_chunk=0"], 2, ["prefill_chunk=0"]),
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
    """Without a cache, and with a prompt read in parts, the greedy text is the same; a bfloat16
    cache takes half the bytes."""
    args = [f"--out_dir={trained}", "--start=to be or", "--max_new_tokens=12", "--temperature=0"]
    plain, without = run("sample.py", *args), run("sample.py", *args, "--use_cache=False")
    assert plain.stdout == without.stdout and "no cache" in without.stderr
    for chunk in (1, 3, None):
        assert run("sample.py", *args, f"--prefill_chunk={chunk}").stdout == plain.stdout
    several = [run("sample.py", *args, "--num_samples=2", f"--prefill_chunk={c}") for c in (3, 99)]
    assert several[0].stdout == several[1].stdout
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


def test_commands_of_a_conversation(trained, monkeypatch):
    """They are answered on stderr and are no part of what the model reads; // sends a slash."""
    args = [f"--out_dir={trained}", "--interactive", "--max_new_tokens=3", "--temperature=0"]
    lines = ["to", "/stats", "/reset", "/stats", "to", "/save x", "//or"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    done = run("sample.py", *args)
    first, second, *more = done.stdout.splitlines()
    assert done.returncode == 0 and first == second and not more
    stats, reset, empty, unknown, slash, _ = done.stderr.splitlines()
    assert stats.startswith("6 of 16 tokens, 480 of 1,536 cache bytes, ") and "tokens/s" in stats
    assert "is empty" in reset and empty.startswith("0 of 16 tokens, 0 of 1,536 cache bytes, ")
    assert unknown.startswith("/save x is not a command; /reset ") and "character '/'" in slash


class Terminal:
    """A script's main in a child process with a terminal of its own, as a user sits at one."""

    def __init__(self, main, *args):
        self.pid, self.fd = pty.fork()
        self.shown = ""
        if self.pid == 0:
            sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115
            sys.argv = ["sample.py", *args]
            status = 1
            try:
                run_script(main)
                status = 0
            except SystemExit as stop:
                status = stop.code
            finally:
                os._exit(status)

    def type(self, text, wait_for):
        """Write this, and return what is shown next up to these characters."""
        os.write(self.fd, text.encode())
        began = time.monotonic()
        while wait_for not in self.shown and time.monotonic() < began + 30:
            if select.select([self.fd], [], [], 0.1)[0]:
                self.shown += os.read(self.fd, 4096).decode()
        before, found, self.shown = self.shown.partition(wait_for)
        assert found, f"{wait_for!r} did not come after {text!r}: {before!r}"
        return before

    def interrupt(self, typing, wait_for):
        """Ctrl-C, after these characters have been typed and echoed."""
        self.type(typing, wait_for=typing)
        time.sleep(0.1)  # until it waits for the next one
        return self.type("\x03", wait_for)

    def wait(self):
        """The exit status."""
        with contextlib.suppress(OSError):  # EIO at its end
            while chunk := os.read(self.fd, 4096):
                self.shown += chunk.decode()
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def test_ctrl_c_in_a_conversation(trained):
    """It stops the answer and empties a line, and the conversation goes on; two in a row end it."""
    args = [f"--out_dir={trained}", "--interactive", "--max_new_tokens=1000000000"]
    user = Terminal(sample.main, *args)
    before = user.type("", wait_for="> ")
    assert "/reset" in before and "/stats" in before and "Ctrl-D" in before
    answer = user.type("to\n", wait_for="to") + user.type("", wait_for="t")  # it goes on and on
    user.type("\x03", wait_for="> ")
    user.interrupt(typing="or n", wait_for="> ")
    assert " of 16 tokens, " in user.type("/stats\n", wait_for=" tokens/s")
    user.type("", wait_for="> ")
    user.interrupt(typing="is", wait_for="> ")
    user.interrupt(typing="not", wait_for="tokens/s on cpu")
    assert user.wait() == 0 and "Traceback" not in answer + user.shown


def test_svd_without_a_rank_keeps_the_checkpoints(trained, dataset, tmp_path):
    """sample.py and train.py open weights of rank 4 with use_svd alone, and change nothing."""
    args = [*QUICK, f"--dataset={dataset}", "--max_iters=1", "--use_svd=True"]
    four = [f"--init_from={trained}", f"--out_dir={tmp_path}/four", "--svd_rank=4"]
    assert run("train.py", *args, *four).returncode == 0
    sampling = [f"--out_dir={tmp_path}/four", "--max_new_tokens=9", "--temperature=0"]
    plain, svd = run("sample.py", *sampling), run("sample.py", *sampling, "--use_svd=True")
    assert svd.returncode == 0 and svd.stdout == plain.stdout and "factorised" not in svd.stderr
    for more in ([f"--init_from={tmp_path}/four"], ["--init_from=resume", "--max_iters=2"]):
        folder = "four" if "--init_from=resume" in more else "five"
        done = run("train.py", *args, *more, f"--out_dir={tmp_path}/{folder}")
        assert done.returncode == 0 and "factorised" not in done.stderr, done.stderr
        stored = checkpoint.load(tmp_path / folder / "ckpt.pt").model_args
        assert stored["use_svd"] and stored["svd_rank"] == 4


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_stdout_that_ends(trained):
    """`sample.py | head -c 1` gives no traceback, and a full disk is one line."""
    args = [sys.executable, "sample.py", f"--out_dir={trained}", "--start=to"]
    endless = [*args, "--max_new_tokens=1000000000"]
    opened = {"cwd": ROOT, "stderr": subprocess.PIPE, "text": True}
    with (
        open("/dev/full", "w") as full,
        subprocess.Popen(endless, stdout=full, **opened) as failing,
        subprocess.Popen(endless, stdout=subprocess.PIPE, **opened) as piped,
    ):
        assert piped.stdout.read(1) == "t"
        piped.stdout.close()
        assert piped.stderr.read() == ""
        assert failing.stderr.read() == "sample.py: error: No space left on device\n"
    assert failing.returncode == 1 and piped.returncode != 0
