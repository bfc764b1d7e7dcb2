"""Sampling, as a user does it. Run: python -m pytest tests/test_sample.py"""

import contextlib
import io
import json
import os
import pty
import select
import sys
import time

import pytest
import torch

import sample
from nanomla import checkpoint
from nanomla.errors import run_script
from nanomla.tokenizer import Tokenizer
from tests.conftest import QUICK, run


@pytest.fixture(scope="module")
def trained(tmp_path_factory, dataset):
    """The folder of a short MLA run, whose context is 16 tokens."""
    folder = tmp_path_factory.mktemp("run")
    shape = ["--use_mla=True", "--pos_emb=rope", "--max_iters=60"]
    done = run("train.py", *QUICK, *shape, f"--dataset={dataset}", f"--out_dir={folder}")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def draw(trained):
    """What sample.py prints for these arguments, greedily unless they say otherwise."""

    def draw(*args):
        start = [f"--out_dir={trained}", "--max_new_tokens=12", "--temperature=0"]
        done = run("sample.py", *start, *args)
        assert done.returncode == 0, done.stderr
        return done

    return draw


def opened(folder):
    """The checkpoint's model and tokenizer."""
    stored = checkpoint.load(folder / "best.pt")
    model, _ = checkpoint.build(stored)
    return model.eval(), Tokenizer(stored.tokenizer)


def test_greedy_text_is_the_models(trained, draw):
    """The prompt and the checkpoint's argmax continuation; with and without a cache, and with a
    prompt read in parts. One line on stderr tells the speed and the cache."""
    model, tokenizer = opened(trained)
    idx = torch.tensor([tokenizer.encode("to be")])
    want = model.generate(idx, 12, temperature=0, use_cache=False)[0].tolist()
    done = draw("--start=to be")
    assert done.stdout == tokenizer.decode(want) + "\n"
    assert "tokens/s" in done.stderr and done.stderr.count("\n") == 1
    assert "96 bytes per token, 2.67x smaller than MHA's" in done.stderr
    without = draw("--start=to be", "--use_cache=False")
    assert without.stdout == done.stdout and "no cache" in without.stderr
    assert draw("--start=to be", "--prefill_chunk=3").stdout == done.stdout
    assert "48 bytes per token" in draw("--cache_dtype=bfloat16").stderr
    assert "cpu in bfloat16" in draw("--dtype=bfloat16").stderr


def test_samples_seeds_and_files(draw, tmp_path):
    """Several samples differ, the same seed repeats them, each setting of the draws has an effect,
    the prompt can come from a file."""
    (tmp_path / "prompt.txt").write_text("the mind\n")
    args = [f"--start=FILE:{tmp_path}/prompt.txt", "--num_samples=3", "--temperature=3"]
    first = draw(*args).stdout
    samples = first.split("\n---------------\n")[:-1]
    assert len(set(samples)) == 3 and all(text.startswith("the mind\n") for text in samples)
    assert draw(*args).stdout == first
    for change in ("--seed=2", "--temperature=0.5", "--top_k=2", "--top_p=0.3"):
        assert draw(*args, change).stdout != first, change


def test_prompts_one_per_line(draw, tmp_path):
    """Prompts of several lengths give each its own greedy continuation, as text and as JSON, up to
    a stop string."""
    (tmp_path / "prompts.txt").write_text("to be\nthe mind\n\nor no\n")
    lines = [f"--start=FILE:{tmp_path}/prompts.txt", "--one_per_line"]
    prompts = ("to be", "the mind", "or no")
    alone = [draw(f"--start={prompt}").stdout[:-1] for prompt in prompts]
    assert draw(*lines).stdout.split("\n---------------\n")[:-1] == alone
    stop = alone[0][9:12]
    printed = draw(*lines, "--json", "--num_samples=2", f"--stop={stop}").stdout
    records = [json.loads(line) for line in printed.splitlines()]
    assert len(records) == 6
    for i, record in enumerate(records):
        assert set(record) == {"prompt", "text", "tokens", "seconds"} and record["seconds"] > 0
        prompt = prompts[i // 2]
        assert record["prompt"] == prompt
        assert record["text"] == alone[i // 2].removeprefix(prompt).partition(stop)[0]
    assert draw("--start=to be", f"--stop={stop}").stdout == alone[0].partition(stop)[0] + "\n"


def test_a_conversation(trained, draw, monkeypatch):
    """Every line goes behind what was said. Commands are answered on stderr and are no part of it;
    // sends a slash. What cannot be spelled does not end the conversation, an empty line does."""
    lines = "to|/stats|TO|or|/reset|/stats|to|/save x|//or||never".replace("|", "\n")
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    done = draw("--interactive", "--max_new_tokens=3")
    model, tokenizer = opened(trained)
    context, want = [], []
    for line in ("to\n", "or\n"):
        context += tokenizer.encode(line)
        new = model.generate(torch.tensor([context]), 3, temperature=0)[0, len(context) :].tolist()
        context += new
        want.append(tokenizer.decode(new))
    assert done.stdout == "\n".join([*want, want[0], ""])
    stats, spelled, reset, empty, unknown, slash, _ = done.stderr.splitlines()
    assert stats.startswith("6 of 16 tokens, 480 of 1,536 cache bytes, ") and "tokens/s" in stats
    assert "character 'T'" in spelled and "character '/'" in slash
    assert "is empty" in reset and empty.startswith("0 of 16 tokens, 0 of 1,536 cache bytes, ")
    assert unknown.startswith("/save x is not a command; /reset ")


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
