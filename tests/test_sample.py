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
from tests.conftest import QUICK, TINY_MLA, make, run, save_model
from tests.test_tokenizer import byte_level


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


def save_with_ends(folder, ends=None):
    """A run's folder with a byte-level model of 280 ids, whose tokenizer has these ends."""
    torch.manual_seed(0)
    model = make(TINY_MLA, vocab_size=280, block_size=40)
    tokenizer = {"kind": "hf", "json": byte_level().to_str()}
    if ends is not None:
        tokenizer["end"] = ends
    folder.mkdir(exist_ok=True)
    save_model(folder, model, best=True, tokenizer=tokenizer)
    return model, Tokenizer(tokenizer)


def test_samples_end_at_any_end_in_every_mode(tmp_path, monkeypatch):
    """The end itself is not printed, and --ignore_eos goes on; up to it the texts are the same."""
    model, tokenizer = save_with_ends(tmp_path)
    ids = tokenizer.encode("to be")
    made = model.generate(torch.tensor([ids]), 12, temperature=0)[0, len(ids) :].tolist()
    count = max(i for i in range(12) if made[i] not in made[:i])
    assert count > 1
    whole = "to be" + tokenizer.decode(made)
    short = "to be" + tokenizer.decode(made[:count])

    def text(*args):
        start = [f"--out_dir={tmp_path}", "--start=to be", "--max_new_tokens=12"]
        done = run("sample.py", *start, "--temperature=0", *args)
        assert done.returncode == 0, done.stderr
        return done.stdout

    line = "\n---------------\n"
    for ends in (None, made[count], [279, made[count]]):
        save_with_ends(tmp_path, ends)
        want = whole if ends is None else short
        tokens = 12 if ends is None else count
        for cache in ("--use_cache=True", "--use_cache=False"):
            assert text(cache) == want + "\n"
            assert text(cache, "--ignore_eos=True") == whole + "\n"
            assert text(cache, "--num_samples=2") == (want + line) * 2
            assert text(cache, "--one_per_line") == want + line
            record = json.loads(text(cache, "--json"))
            assert ("to be" + record["text"], record["tokens"]) == (want, tokens)
            draws = [cache, "--temperature=1.5", "--num_samples=3", "--seed=5"]
            on = text(*draws, "--ignore_eos=True").split(line)
            assert all(a.startswith(b) for a, b in zip(on, text(*draws).split(line), strict=True))
        monkeypatch.setattr("sys.stdin", io.StringIO("to be\n"))
        said = run(
            "sample.py", f"--out_dir={tmp_path}", "--interactive", "--max_new_tokens=12",
            "--temperature=0",
        ).stdout
        new = tokenizer.encode("to be\n")
        reply = model.generate(torch.tensor([new]), 12, temperature=0)[0, len(new) :].tolist()
        if ends is not None and made[count] in reply:
            reply = reply[: reply.index(made[count])]
        assert said == tokenizer.decode(reply) + "\n"


def test_a_model_with_gpt2s_tokenizer_ends_at_its_end(tmp_path, monkeypatch):
    """As in the server, whatever the model was trained on."""
    prompts = []

    def drawn(model, idx, *_args, **_options):
        prompts.append(idx.tolist())
        yield from torch.tensor([[[5]], [[6]], [[50256]], [[7]]])

    monkeypatch.setattr(sample, "stream_tokens", drawn)
    gpt2 = {"kind": "tiktoken", "name": "gpt2"}
    save_model(tmp_path, make({}, vocab_size=50304), best=True, tokenizer=gpt2)
    start = [f"--out_dir={tmp_path}", "--start=a"]
    assert run("sample.py", *start).stdout == "a&'\n" and prompts == [[[64]]]
    assert run("sample.py", *start, "--ignore_eos=True").stdout == "a&'<|endoftext|>(\n"


BREAKS = "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"  # where str.splitlines cuts too


def test_lines_end_at_newlines_alone(tmp_path, monkeypatch):
    """Also as Windows writes them. All else, a lone \\r too, is text, and a file is as it is."""
    save_model(tmp_path, make({}, vocab_size=256), best=True, tokenizer={"kind": "byte"})
    (tmp_path / "prompts.txt").write_bytes(f"a{BREAKS}b\r\n\r\n\nc\rd\ne".encode())
    args = [f"--out_dir={tmp_path}", "--max_new_tokens=1", "--temperature=0"]
    file = f"--start=FILE:{tmp_path}/prompts.txt"
    printed = run("sample.py", *args, file, "--one_per_line", "--json").stdout
    prompts = [json.loads(line)["prompt"] for line in printed.split("\n")[:-1]]
    assert prompts == [f"a{BREAKS}b", "c\rd", "e"]
    (tmp_path / "prompts.txt").write_bytes(b"a\r\nb\r")
    record = json.loads(run("sample.py", *args, file, "--json").stdout)
    assert record["prompt"] == "a\r\nb\r"

    heard = []

    def reply(_chat, line):
        heard.append(line)
        yield ""

    monkeypatch.setattr("nanomla.chat.Chat.reply", reply)
    typed = io.BytesIO(f"a{BREAKS}b\r\nc\rd\n".encode() + b"\xff\n")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(typed, encoding="utf-8"))
    assert run("sample.py", *args, "--interactive").returncode == 0
    assert heard == [f"a{BREAKS}b", "c\rd", "\ufffd"]


def test_a_prompt_longer_than_the_context_is_cropped(trained, draw, tmp_path, monkeypatch):
    """To its last tokens, as in nanoGPT, and one line on stderr counts the rest; in every mode."""
    model, tokenizer = opened(trained)
    prompt = "to be or not to be, that is"
    idx = torch.tensor([tokenizer.encode(prompt)])
    want = prompt + tokenizer.decode(model.generate(idx, 12, temperature=0)[0, 27:].tolist())
    without = model.generate(idx, 12, temperature=0, use_cache=False)[0, 27:].tolist()
    line = "the prompt has 27 tokens, the model's context 16; the first 11 are left out\n"
    done = draw(f"--start={prompt}")
    assert done.stdout == want + "\n" and done.stderr.startswith(line)
    done = draw(f"--start={prompt}", "--use_cache=False")
    assert done.stdout == prompt + tokenizer.decode(without) + "\n"
    assert done.stderr.count(line) == 1
    (tmp_path / "prompts.txt").write_text(f"{prompt}\nto be\n")
    done = draw(f"--start=FILE:{tmp_path}/prompts.txt", "--one_per_line", "--json")
    first = json.loads(done.stdout.split("\n")[0])
    assert first["prompt"] + first["text"] == want and done.stderr.count(line) == 1
    monkeypatch.setattr("sys.stdin", io.StringIO(prompt[1:]))
    assert draw("--interactive").stderr.startswith(line)


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
