"""
The real server, started as a user starts it, on a free port.
Run: python -m pytest tests/test_serve.py
"""

import contextlib
import functools
import http.client
import json
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from model import GPT
from nanomla.batch import Engine, Sampling
from nanomla.tokenizer import Tokenizer
from tests.conftest import (
    ROOT,
    TINY_MLA,
    fails_with_one_line,
    randomise,
    run,
    save_model,
    tiny_config,
)

pytest.importorskip("starlette", reason="make serve, or pip install -r requirements-serve.txt")
pytest.importorskip("uvicorn")

ROWS, QUEUE, CONTEXT = 4, 5, 48
CHARS = "".join(map(chr, range(32, 127))) + "\n"
JSON = {"Content-Type": "application/json"}
QUICK = {"prompt": "to be", "max_tokens": 4, "model": "out-mla"}
LONG = {"prompt": "to be", "max_tokens": 3000, "model": "out-mla", "stream": True}
START = """
import sys
import nanomla.serve.app, tools.serve, nanomla.serve.stepper
from nanomla.errors import run_script
sys.argv[0] = "serve.py"
{patch}
run_script(tools.serve.main)
"""


class Server:
    """A server's process and a client for it."""

    def __init__(self, folder, *flags, patch=""):
        self.headers = {}  # of every request
        command = ["-c", START.format(patch=patch)] if patch else ["-m", "tools.serve"]
        self.errors = folder / f"stderr-{len(list(folder.glob('stderr-*')))}"
        with open(self.errors, "w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, *command, f"--out_dir={folder}/out-mla", "--port=0", *flags],
                cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True,
            )  # fmt: skip
        self.said = []

    def ready(self):
        """Wait until it takes requests."""
        for line in self.process.stdout:
            self.said.append(line.strip())
            if line.startswith("http://"):
                self.port = int(line.rpartition(":")[2])
                return self
        raise AssertionError(f"the server did not start: {self.stderr()}")

    def stderr(self):
        return self.errors.read_text()

    def connect(self):
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)

    def ask(self, method, path, body=None, headers=None):
        """Status, headers and the content, JSON if it is; body: bytes, or what becomes JSON."""
        with contextlib.closing(self.connect()) as connection:
            if body is not None and not isinstance(body, bytes):
                body, headers = json.dumps(body).encode(), {**JSON, **(headers or {})}
            connection.request(method, path, body, {**self.headers, **(headers or {})})
            response = connection.getresponse()
            return response.status, response.headers, content(response)

    def complete(self, **body):
        """The content of a completion that works."""
        status, _, answer = self.ask("POST", "/v1/completions", body)
        assert status == 200, answer
        return answer

    def text(self, **body):
        return self.complete(**body)["choices"][0]["text"]

    def raw(self, request, wait=True):
        """What comes back for bytes that need not be HTTP; wait=False: the open socket."""
        sock = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        sock.sendall(request)
        if not wait:
            return sock
        with sock:
            return b"".join(iter(lambda: sock.recv(65536), b""))

    @contextlib.contextmanager
    def stream(self, **body):
        """A stream's response, which has begun; the connection ends with the block."""
        with contextlib.closing(self.connect()) as connection:
            headers = {**JSON, **self.headers}
            connection.request("POST", "/v1/completions", json.dumps({**LONG, **body}), headers)
            yield connection.getresponse()

    def metric(self, name, **labels):
        """The sum of a metric's values that have these labels."""
        text = self.ask("GET", "/metrics")[2]
        total = 0.0
        for line in re.findall(rf"^{name}(?:{{.*}})? .*$", text, re.MULTILINE):
            if all(f'{key}="{value}"' in line for key, value in labels.items()):
                total += float(line.split()[-1])
        return total

    def until(self, wanted, name, seconds=5.0, **labels):
        """Wait until a metric is `wanted`, a value or a condition."""
        holds = wanted if callable(wanted) else lambda value: value == wanted
        end = time.monotonic() + seconds
        while not holds(value := self.metric(name, **labels)):
            assert time.monotonic() < end, f"{name} is {value} after {seconds} s"
            time.sleep(0.02)
        return True

    def end(self, number=signal.SIGTERM):
        """Send a signal; returns the exit status."""
        self.process.send_signal(number)
        return self.process.wait(20)


def content(response):
    body = response.read()
    kind = response.headers.get_content_type()
    return json.loads(body) if kind == "application/json" and body else body.decode()


def events(response):
    """The JSON objects of a stream, which ends with [DONE]."""
    parts = response.read().decode().split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""] and all(p.startswith("data: ") for p in parts[:-1])
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]


def save_run(folder, spec, **settings):
    """A random model as a run's folder; returns the model and its tokenizer."""
    folder.mkdir()
    tokenizer = Tokenizer(spec)
    torch.manual_seed(1)
    shape = {"block_size": CONTEXT, "vocab_size": tokenizer.vocab_size, **settings}
    model = randomise(GPT(tiny_config(**shape)))
    config = {"dataset": "x", "learning_rate": float("inf"), "vocab_size": None}
    fields = {"iter_num": 7, "best_val_loss": 1.5, "config": config, "tokenizer": spec}
    save_model(folder, model, best=True, **fields)
    return model, tokenizer


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with two runs, MLA over bytes and MHA over characters, and their models."""
    folder = tmp_path_factory.mktemp("serve")
    mla = {k: v for k, v in TINY_MLA.items() if k not in ("block_size", "vocab_size")}
    opened = {
        "out-mla": save_run(folder / "out-mla", {"kind": "byte"}, **mla),
        "out-mha": save_run(folder / "out-mha", {"kind": "char", "chars": CHARS}),
    }
    return SimpleNamespace(folder=folder, opened=opened)


@pytest.fixture(scope="module")
def server(models):
    """One server of both runs for most tests. At its end it has printed nothing on stderr."""
    flags = [f"--compare={models.folder}/out-mha", f"--rows={ROWS}", f"--queue={QUEUE}"]
    server = Server(models.folder, *flags).ready()
    yield server
    still_well = server.process.poll() is None
    status = server.end()
    assert still_well and status == 143, server.stderr()
    assert server.stderr() == "serve.py: terminated\n"


@pytest.fixture(scope="module")
def own(models):
    """
    The server of OWN that a test may end. All start with the first that is asked for, side by side;
    none is left behind.
    """
    started = {}

    def get(name):
        for other, (flags, patch) in OWN.items():
            if other not in started:
                flags = ("--max_tokens=1000000", *flags)
                started[other] = Server(models.folder, *flags, patch=patch)
        return started[name].ready()

    yield get
    for one in started.values():
        one.process.kill()
        one.process.wait()


# ---- the protocol


def test_models_and_pages(server):
    """What was printed at the start, /health, /v1/models, and the headers of every response."""
    assert server.said[0].startswith("out-mla: MLA, L = 7, r = 2; 9 cached numbers per token")
    assert server.said[1].startswith("out-mha: MHA, 4 heads of 6; 48 cached numbers per token")
    assert server.ask("GET", "/health")[::2] == (200, {"status": "ok"})
    status, _, models = server.ask("GET", "/v1/models")
    assert status == 200 and [m["id"] for m in models["data"]] == ["out-mla", "out-mha"]
    mla, mha = (model["nanomla"] for model in models["data"])
    assert mla["numbers_per_token_and_layer"] == 9 and mla["mha_numbers_per_token_and_layer"] == 48
    assert mla["bytes_per_token"] == 2 * 9 * 4 and mla["mha_bytes_per_token"] == 2 * 48 * 4
    assert mha["bytes_per_token"] == mha["mha_bytes_per_token"] == 2 * 48 * 4
    assert mla["iteration"] == 7 and mla["val_loss"] == 1.5 and mla["context"] == CONTEXT
    assert server.ask("GET", "/v1/models/out-mha")[2] == models["data"][1]
    for method, path in (
        ("GET", "/health"), ("GET", "/nothing"), ("DELETE", "/v1/models"), ("HEAD", "/health"),
        ("GET", "/v1/models/gpt"), ("GET", "/metrics"), ("POST", "/v1/completions"), ("GET", "/"),
    ):  # fmt: skip
        headers = server.ask(method, path)[1]
        assert headers["Content-Security-Policy"] == "default-src 'self'", path
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Referrer-Policy"] == "no-referrer"
        assert headers["Cache-Control"] == "no-store" or path == "/"
        assert not [name for name in headers if name.lower().startswith("access-control")]
    for path in (ROOT / "tools" / "page").glob("*.*"):
        status, headers, text = server.ask("GET", f"/{path.name}")
        assert status == 200 and text == path.read_text(encoding="utf-8"), path
        assert path.suffix != ".js" or headers.get_content_type() == "text/javascript"
    status, headers, error = server.ask("DELETE", "/v1/models")
    assert (status, error["error"]["type"]) == (405, "invalid_request_error")
    assert "GET" in headers["Allow"]


def test_texts_are_those_of_the_engine(server, models):
    """Greedy texts are those of sample.py's engine, with either model, and up to a stop string."""
    for name, (model, tokenizer) in models.opened.items():
        engine = Engine(model, tokenizer, Sampling(30, temperature=0))
        want = "".join(engine.stream("to be"))
        body = {"model": name, "prompt": "to be", "max_tokens": 30, "temperature": 0}
        answer = server.complete(**body)
        assert answer["choices"][0]["text"] == want and answer["model"] == name
        assert answer["usage"]["prompt_tokens"] == 5 and answer["usage"]["total_tokens"] == 35
        assert answer["choices"][0]["finish_reason"] == "length"
        ids = tokenizer.encode("to be")
        assert server.text(**{**body, "prompt": ids}) == want
    body = {"model": "out-mha", "prompt": "to be", "max_tokens": 30, "seed": 4}
    want = server.text(**body)
    stop = want[7:9]
    choice = server.complete(**body, stop=["no such text", stop])["choices"][0]
    assert choice["text"] == want[: want.index(stop)] and choice["finish_reason"] == "stop"
    assert len(choice["text"]) > 2


def test_a_stream_is_the_whole_in_parts(server):
    """Text, logprobs, ends and usage of a stream add up to those of one response."""
    body = {
        "model": "out-mla", "prompt": ["to be", "or"], "n": 2, "max_tokens": 12, "seed": 5,
        "logprobs": 3, "echo": True, "return_token_ids": True, "top_k": 50, "top_p": 0.9,
    }  # fmt: skip
    whole = server.complete(**body)
    with server.stream(**body, stream_options={"include_usage": True}) as response:
        assert response.headers.get_content_type() == "text/event-stream"
        chunks = events(response)
    *chunks, last = chunks
    assert last["choices"] == [] and last["usage"] == whole["usage"]
    assert whole["usage"]["completion_tokens"] == 48 and whole["usage"]["prompt_tokens"] == 7
    assert len({chunk["id"] for chunk in chunks}) == 1 and len(chunks) > 8
    assert all(chunk["usage"] is None for chunk in chunks)
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2, 3]
    assert len({choice["text"] for choice in whole["choices"]}) == 4
    for choice in whole["choices"]:
        parts = [d for c in chunks for d in c["choices"] if d["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        for key, values in choice["logprobs"].items():
            assert [v for part in parts for v in part["logprobs"][key]] == values
        tokens = [token for part in parts for token in part["nanomla"]["tokens"]]
        assert tokens == choice["nanomla"]["tokens"]
        assert parts[-1]["finish_reason"] == choice["finish_reason"] == "length"
        assert choice["text"].startswith("to be" if choice["index"] < 2 else "or")
        assert choice["logprobs"]["token_logprobs"][0] is None
        assert all(value <= 0 for value in choice["logprobs"]["token_logprobs"][1:])
        prompt = choice["nanomla"]["prompt"]
        assert bytes(prompt["ids"]).decode() in ("to be", "or")
        assert prompt["cached"] + prompt["computed"] == len(prompt["ids"])
        cache = choice["nanomla"]["cache"]
        assert cache["bytes"] == cache["tokens"] * 72 > 0
        assert choice["nanomla"]["tokens_per_s"] > 0


def test_logprobs_are_the_models(server, models):
    """Those of the prompt and of the new tokens, as a forward pass over all of them has them."""
    model, tokenizer = models.opened["out-mha"]
    body = {"model": "out-mha", "prompt": "to be", "max_tokens": 6, "seed": 3, "logprobs": 2}
    choice = server.complete(**body, echo=True)["choices"][0]
    ids = tokenizer.encode(choice["text"])
    with torch.no_grad():
        logits, _ = model(torch.tensor([ids]), targets=torch.tensor([ids]))
    wanted = logits[0].log_softmax(-1)
    given = choice["logprobs"]
    assert given["tokens"] == [*choice["text"]] and len(ids) == 11
    assert given["text_offset"] == [*range(11)]
    for i in range(1, 11):
        assert given["token_logprobs"][i] == pytest.approx(float(wanted[i - 1, ids[i]]), abs=1e-4)
        top = sorted(given["top_logprobs"][i].values(), reverse=True)
        assert top[:2] == pytest.approx(wanted[i - 1].topk(2).values.tolist(), abs=1e-4)
        assert given["tokens"][i] in given["top_logprobs"][i]


def test_openais_client(server):
    """The official package lists models, completes, streams, and names errors as it should."""
    openai = pytest.importorskip("openai")
    address = f"http://127.0.0.1:{server.port}/v1"
    with openai.OpenAI(base_url=address, api_key="none", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["out-mla", "out-mha"]
        assert client.models.retrieve("out-mha").id == "out-mha"
        ask = {"model": "out-mha", "prompt": "to be", "max_tokens": 8, "seed": 2, "logprobs": 1}
        done = client.completions.create(**ask)
        assert done.usage.completion_tokens == 8 and len(done.choices[0].logprobs.tokens) == 8
        options = {"include_usage": True}
        chunks = [*client.completions.create(**ask, stream=True, stream_options=options)]
        text = "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)
        assert text == done.choices[0].text and chunks[-1].usage == done.usage
        with pytest.raises(openai.BadRequestError, match="temperature") as caught:
            client.completions.create(**ask, temperature=-1)
        assert caught.value.param == "temperature"
        with pytest.raises(openai.NotFoundError, match="no model 'gpt'"):
            client.completions.create(model="gpt", prompt="a")


def test_curl(server):
    """As the help prints it; without the header it says which one is missing."""
    if shutil.which("curl") is None:
        pytest.skip("there is no curl here")
    command = ["curl", "-s", f"http://127.0.0.1:{server.port}/v1/completions", "-d"]
    command.append(json.dumps(QUICK))
    header = ["-H", "Content-Type: application/json"]
    done = subprocess.run([*command, *header], capture_output=True, timeout=20, check=True)
    assert json.loads(done.stdout)["usage"]["completion_tokens"] == 4
    done = subprocess.run(command, capture_output=True, timeout=20, check=True)
    assert "Content-Type: application/json" in json.loads(done.stdout)["error"]["message"]


def test_pieces_of_the_page(server, models):
    """Tokenizing, and a run's log as it grows, with what JSON does not have as null."""
    ask = {"model": "out-mha", "text": "to"}
    status, _, tokens = server.ask("POST", "/api/tokenize", ask)
    ids = models.opened["out-mha"][1].encode("to")
    assert status == 200 and tokens == {"ids": ids, "tokens": ["t", "o"]}
    log = models.folder / "out-mha" / "log.jsonl"
    path = "/api/log?model=out-mha"
    empty = server.ask("GET", path)[2]
    assert empty["entries"] == [] and empty["next"] == empty["total"] == 0
    settings = empty["settings"]
    assert settings["n_head"] == 4 and settings["learning_rate"] is None
    assert settings["vocab_size"] == len(CHARS) and settings["dataset"] == "x"
    log.write_text('{"iter": 0, "loss": NaN}\n{"iter": 1, "loss": 2.5}\n{"iter": 2, "lo')
    answer = server.ask("GET", path)[2]
    assert answer["entries"] == [{"iter": 0, "loss": None}, {"iter": 1, "loss": 2.5}]
    log.write_text(log.read_text() + 'ss": 2}\n')
    answer = server.ask("GET", f"{path}&after={answer['next']}")[2]
    assert answer["entries"] == [{"iter": 2, "loss": 2}] and answer["next"] == 3
    assert "restarted" not in answer
    log.write_text('{"iter": 0, "loss": 9}\n')
    answer = server.ask("GET", f"{path}&after=3")[2]
    assert answer["restarted"] and answer["entries"] == [{"iter": 0, "loss": 9}]
    deep = "[" * 900 + "]" * 900
    damaged = f'{{"iter": 0, "a": {deep}}}\n{{"a": {"[" * 100_000}\n'
    log.write_text(damaged + '{"iter": 1, "loss": 3}\n')
    assert server.ask("GET", path)[2]["entries"] == [{"iter": 1, "loss": 3}]
    assert server.ask("GET", f"{path}&after=-1")[0] == 400
    assert server.ask("GET", "/api/log?model=../out-mha")[0] == 404


def test_the_page_is_a_table_of_files(tmp_path):
    """Every file of the folder that a page can have, and none if there is no folder."""
    from nanomla.serve.app import Site

    for name in ("index.html", "page.js", ".secret", "notes.txt~"):
        (tmp_path / name).write_text(name)
    stepper = SimpleNamespace(served={})
    files = Site(stepper, 9, tmp_path).files
    assert sorted(files) == ["/", "/index.html", "/page.js"]
    assert files["/page.js"] == (b"page.js", "text/javascript; charset=utf-8")
    assert Site(stepper, 9, tmp_path / "none").files == {}


def test_attention(server):
    """A lower triangle of weights that sum to 1, not while that model generates."""
    pytest.importorskip("nanomla.attention")
    body = {"model": "out-mla", "tokens": [1, 2, 3, 4], "layer": 1}
    status, _, answer = server.ask("POST", "/api/attention", body)
    assert status == 200 and len(answer["heads"]) == 4 and len(answer["tokens"]) == 4, answer
    for head in answer["heads"]:
        for i, row in enumerate(head):
            assert len(row) == 4 and sum(row) == pytest.approx(1, abs=1e-3)
            assert not any(row[i + 1 :])
    for wrong in ({"layer": 2}, {"tokens": [256]}, {"tokens": []}, {"tokens": [True]}):
        assert server.ask("POST", "/api/attention", {**body, **wrong})[0] == 400
    with ThreadPoolExecutor(6) as pool:  # one at a time, the others are told so
        asked = [pool.submit(server.ask, "POST", "/api/attention", body) for _ in range(12)]
        statuses = {one.result()[0] for one in asked}
    assert 200 in statuses <= {200, 503}
    with server.stream() as response:
        response.read(1)
        assert server.ask("POST", "/api/attention", body)[0] == 409
        other = server.ask("POST", "/api/attention", {**body, "model": "out-mha"})
        assert other[0] == 200
    assert server.until(0, "nanomla_active_rows")


# ---- many clients


def test_parallel_clients_get_what_each_gets_alone(server):
    """Nine at once, of different lengths and settings, streaming or not, on both models."""
    draw = random.Random(1)
    prompt = "to be or not"
    asked = [
        {
            "model": draw.choice(["out-mla", "out-mha"]), "prompt": prompt[: 1 + 2 * i % 12],
            "max_tokens": draw.randrange(5, 70), "seed": i, "temperature": draw.choice([1, 0.8]),
            "top_k": draw.choice([0, 5]), "n": 1 + (i == 3), "logprobs": 1,
        }
        for i in range(9)
    ]  # fmt: skip
    alone = [server.complete(**body)["choices"] for body in asked]

    def again(i):
        if i % 2:
            return server.complete(**asked[i])["choices"]
        with server.stream(**asked[i]) as response:
            parts = [choice for chunk in events(response) for choice in chunk["choices"]]
        return [{"text": "".join(part["text"] for part in parts)}]

    with ThreadPoolExecutor(9) as pool:
        together = [*pool.map(again, range(9))]
    for i, (one, other) in enumerate(zip(alone, together, strict=True)):
        assert [c["text"] for c in one] == [c["text"] for c in other], asked[i]
    assert len({c["text"] for choices in alone for c in choices}) == 10


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_row(server, stream):
    """At once, whether it streams or not; it is counted as cancelled."""
    before = server.metric("nanomla_samples_total", finish="cancelled")
    sock = server.raw(posted({**LONG, "stream": stream, "n": 2}), wait=False)
    assert server.until(2, "nanomla_active_rows", model="out-mla")
    assert server.metric("nanomla_cache_used_bytes") > 0
    sock.close()
    assert server.until(0, "nanomla_active_rows", seconds=2)
    made = server.metric("nanomla_tokens_total")
    time.sleep(0.1)
    assert server.metric("nanomla_tokens_total") == made
    assert server.metric("nanomla_samples_total", finish="cancelled") == before + 2
    assert server.metric("nanomla_requests_total", status="499") >= 1
    assert server.metric("nanomla_cache_used_bytes") == 0


def test_too_many_clients(server):
    """A full queue is refused with the time to wait, at once, and goes on when there is room."""
    with contextlib.ExitStack() as stack:
        for _ in range(ROWS + QUEUE):
            last = contextlib.ExitStack()
            response = last.enter_context(server.stream())
            stack.enter_context(last)
            assert response.status == 200
        assert server.until(ROWS, "nanomla_active_rows", model="out-mla")
        assert server.until(QUEUE, "nanomla_waiting_requests", model="out-mla")
        status, headers, answer = server.ask("POST", "/v1/completions", QUICK)
        assert status == 503 and headers["Retry-After"] == "1"
        assert answer["error"]["code"] == "overloaded"
        other = {**QUICK, "model": "out-mha"}
        assert server.ask("POST", "/v1/completions", other)[0] == 200  # it has its own queue
        last.close()
        assert server.until(QUEUE - 1, "nanomla_waiting_requests", model="out-mla")
        response = stack.enter_context(server.stream())
        assert response.status == 200
    assert server.until(0, "nanomla_active_rows") and server.until(0, "nanomla_waiting_requests")
    assert server.text(**QUICK)
    many = {**QUICK, "prompt": ["a"] * (ROWS + QUEUE + 1)}
    status, _, answer = server.ask("POST", "/v1/completions", many)
    assert status == 400 and "more than 9 samples" in answer["error"]["message"]
    assert server.ask("POST", "/v1/completions", {**QUICK, "n": ROWS + 1})[0] == 400


def slow_reader(server, **body):
    """A socket that has asked for a long stream and has room for a few kB of it."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect(("127.0.0.1", server.port))
    sock.sendall(posted({**LONG, "logprobs": 20, "return_token_ids": True, **body}))
    return sock


def posted(body):
    """The bytes of a request."""
    body = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    return f"{head}Content-Type: application/json\r\n\r\n".encode() + body


def test_slow_readers_hold_nobody_up(server):
    """Clients that read nothing do not slow others down; what waits for them is bounded, and is
    there when they read at last."""
    memory = server.metric("process_resident_memory_bytes")
    with contextlib.ExitStack() as stack:
        body = {"max_tokens": 600, "seed": 1}
        socks = [stack.enter_context(slow_reader(server, **body)) for _ in range(3)]
        assert server.until(3, "nanomla_active_rows", model="out-mla")
        began = time.monotonic()
        assert server.complete(**QUICK)["usage"]["completion_tokens"] == 4
        assert time.monotonic() - began < 2
        assert server.until(0, "nanomla_active_rows", seconds=20)  # although nobody has read
        assert server.metric("process_resident_memory_bytes") - memory < 150e6
        received, ending = b"", b"data: [DONE]\n\n\r\n0\r\n\r\n"
        while not received.endswith(ending):
            received += (got := socks[0].recv(2**20))
            assert got
    assert received.count(b'"finish_reason":"length"') == 1


def test_it_sleeps_when_there_is_nothing_to_do(server):
    """No loop that spins."""
    assert server.until(0, "nanomla_active_rows")
    before = server.metric("process_cpu_seconds_total")
    time.sleep(1)
    assert server.metric("process_cpu_seconds_total") - before <= 0.1


# ---- what is refused


def test_bodies(server):
    """Bad JSON, oversized bodies with and without a length, other kinds of content."""
    post = "POST", "/v1/completions"
    for body in (b"", b"{", b"[1]", b"\xff", b'{"a": ' * 100_000, b"1" * 5000, b"null"):
        status, _, answer = server.ask(*post, body, JSON)
        assert status == 400 and answer["error"]["message"].startswith("the request"), body[:20]
    large = json.dumps({**QUICK, "prompt": "a" * 2**20}).encode()
    assert server.ask(*post, large, JSON)[0] == 413
    with contextlib.closing(server.connect()) as connection:
        parts = (large[i : i + 2**14] for i in range(0, len(large), 2**14))
        connection.request(*post, parts, JSON, encode_chunked=True)
        assert connection.getresponse().status == 413
    just = json.dumps({**QUICK, "prompt": "a" * (2**20 - 100)}).encode()
    status, _, answer = server.ask(*post, just, JSON)
    assert status == 400 and "context" in answer["error"]["message"]
    body = json.dumps(QUICK).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        assert server.ask(*post, body, {"Content-Type": kind})[0] == 415
    assert server.ask(*post, body, {**JSON, "Content-Encoding": "gzip"})[0] == 415
    kind = {"Content-Type": "application/json; charset=utf-8"}
    assert server.ask(*post, body, kind)[0] == 200


def test_other_web_pages_are_refused(server):
    """A wrong Host, as after DNS rebinding, and a wrong Origin, as of a page elsewhere."""
    for host in ("evil.example", "localhost.evil.example", "127.0.0.1.evil:8000", "", "[::2]"):
        assert server.ask("GET", "/health", headers={"Host": host})[0] == 403, host
    for host in ("localhost", "LOCALHOST:1", "127.0.0.1:99", "[::1]:8000"):
        assert server.ask("GET", "/health", headers={"Host": host})[0] == 200, host
    here = f"127.0.0.1:{server.port}"
    for origin in ("https://evil.example", "null", f"http://{here}.evil", "http://localhost", ""):
        status, _, answer = server.ask("POST", "/v1/completions", QUICK, {"Origin": origin})
        assert (status, answer["error"]["type"]) == (403, "permission_error"), origin
    assert server.ask("POST", "/v1/completions", QUICK, {"Origin": f"http://{here}"})[0] == 200


@pytest.mark.parametrize(
    "path",
    [
        "/../pyproject.toml", "/..%2fpyproject.toml", "/%2e%2e/%2e%2e/etc/passwd", "//etc/passwd",
        "/page.js/../../serve.py", "/serve.py", "/page/index.html", "/.env", "/v1/models/../../x",
        "/v1/models/..%2f..%2fout-mla", "/%00", "/index.html%00.js", "/v1/models/%2fetc%2fpasswd",
        "/%0a", "/style.css%0a", "/health%0A",
    ],
)  # fmt: skip
def test_no_path_reaches_the_files(server, path):
    """404, whatever is tried."""
    assert server.ask("GET", path)[0] == 404


def test_what_is_no_http(server):
    """An answer in JSON and the end of the connection, also after the first request."""
    assert b"HTTP/1.1 400 Bad Request" in (answer := server.raw(b"\x16\x03\x01 hello\r\n\r\n"))
    assert b'"error"' in answer and b"nosniff" in answer
    good = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    answer = server.raw(good + b"nonsense\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200") and b"HTTP/1.1 400" in answer
    for wrong in (
        b"GET /health HTTP/1.1\r\n\r\n", b"GET /\xff HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
    ):  # fmt: skip
        assert server.raw(wrong).startswith(b"HTTP/1.1 400"), wrong[:60]
    post = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    chunked = post + b"Transfer-Encoding: chunked\r\n\r\n"
    assert server.raw(chunked + b"zz\r\n").startswith(b"HTTP/1.1 400")
    early = post.replace(b"json", b"text") + b"Transfer-Encoding: chunked\r\n\r\n"
    assert server.raw(early + b"1\r\na\r\nzz\r\n").startswith(b"HTTP/1.1 4")
    upgrade = b"GET /none HTTP/1.1\r\nHost: localhost\r\nConnection: close, upgrade\r\n"
    assert server.raw(upgrade + b"Upgrade: websocket\r\n\r\n").startswith(b"HTTP/1.1 404")
    with contextlib.suppress(ConnectionError):  # a head without end is cut off
        server.raw(b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 2**20)


DEEP = functools.reduce(lambda inner, _: [inner], range(200), [])
NONSENSE = [DEEP, {"a": DEEP}, {"\udc00": 1}, -1, -(10**400), 1e400, float("nan"), [None], [[]]]
TEXTS = ["\ud800", "x" * 501]
WRONG = {  # what each field of a completion does not take; null would be its default
    "model": ["gpt", "", "../out-mla", *TEXTS, *NONSENSE],
    "prompt": [[1.5], ["a", 1], [10**30], [[256]], [True], "x" * 60, *TEXTS, *NONSENSE],
    "stop": ["", [""], ["a"] * 5, ["a", 1], "x" * 501, *NONSENSE],
    "stream": [0, 1, "true", *NONSENSE],
    "stream_options": [{"include_usage": True}, {"include_usage": 1}, 5, *NONSENSE],
    "suffix": ["x", *TEXTS, *NONSENSE],
    "user": [5, True, *NONSENSE],
    "logit_bias": [{"5": 1}, 5, *NONSENSE],
    "top_p": [0, 1.5, True, *TEXTS, *NONSENSE],
    "max_tokens": [4097, 10**400, 1.5, True, *TEXTS, *NONSENSE],
    "n": [0, 1.5, 10, 10**400, False, *TEXTS, *NONSENSE],
    **{
        name: [2.5, "1", True, 10**400, *TEXTS, *NONSENSE]
        for name in ("seed", "logprobs", "top_k", "best_of", "truncate_prompt_tokens")
    },
    **{
        name: ["1", True, 10**400, 101, *TEXTS, *NONSENSE]
        for name in ("temperature", "presence_penalty", "frequency_penalty")
    },
}


def bad_requests(count):
    """(method, path, body) of requests that are wrong, drawn with a fixed seed."""
    draw, good = random.Random(13), {"model": "out-mla", "prompt": "a", "max_tokens": 1}
    path, text = "/v1/completions", json.dumps(good).encode()
    for i in range(count):
        if i % 3 == 0:
            name = draw.choice([*WRONG])
            yield "POST", path, json.dumps({**good, name: draw.choice(WRONG[name])}).encode()
        elif i % 3 == 1:
            other = draw.choice(["/api/tokenize", "/api/attention"])
            name = draw.choice(["text", "tokens", "layer"])
            wrong = {"model": "out-mla", name: draw.choice(NONSENSE), "unknown": 1}
            yield "POST", other, json.dumps(wrong).encode()
        else:
            damaged, name = bytearray(text), draw.choices("abmx_\ud800é ", k=9)
            damaged[draw.randrange(1, len(text))] = draw.choice([0xFF, 0x80, 0xC0])
            method = draw.choice(["GET", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "BREW"])
            yield draw.choice([
                ("POST", path, bytes(damaged)),
                ("POST", path, text[: draw.randrange(len(text))]),
                ("POST", path, b"[" * draw.randrange(1, 100_000)),
                ("POST", path, b"9" * draw.randrange(1, 100_000)),
                ("POST", path, json.dumps({**good, "".join(name): 1}).encode()),
                ("POST", draw.choice(["/v1/models", "/", "/none", "/metrics"]), text),
                (method, path, text),
            ])  # fmt: skip


def test_five_hundred_bad_requests(server):
    """Each gets an error of its own, 4xx; the server prints nothing and goes on."""
    seen = set()
    connection = server.connect()
    with contextlib.closing(connection):
        for method, path, body in bad_requests(500):
            connection.request(method, path, body, JSON)
            response = connection.getresponse()
            answer = response.read()
            assert 400 <= response.status < 500, (method, path, body[:200], answer[:300])
            error = json.loads(answer)["error"]
            assert "\n" not in error["message"] and len(error["message"]) <= 300
            seen.add((response.status, error["message"]))
    assert len(seen) > 60 and {status for status, _ in seen} >= {400, 404, 405}
    assert server.stderr() == "" and server.text(**QUICK)
    assert server.metric("nanomla_active_rows") == 0


def mixed_request(server, i):
    """One of several kinds, good and bad; some clients leave early."""
    kind = i % 10
    if kind < 4:
        body = {**QUICK, "model": ("out-mla", "out-mha")[i % 2], "n": 1 + (kind == 2), "seed": i}
        return server.ask("POST", "/v1/completions", body)[0]
    if kind < 6:
        with server.stream(max_tokens=6 if kind == 4 else 500) as response:
            response.read() if kind == 4 else response.read(1)
        return response.status
    if kind == 6:
        server.raw(posted({**LONG, "stream": False}), wait=False).close()
        return 200
    if kind == 7:
        return server.ask("POST", "/v1/completions", {**QUICK, "prompt": "x" * 99})[0]
    if kind == 8:
        return server.ask("GET", "/v1/models")[0]
    return server.ask("POST", "/v1/completions", b"{", JSON)[0]


@pytest.mark.parametrize("count", [150, pytest.param(1000, marks=pytest.mark.slow)])
def test_nothing_is_lost_in_many_requests(server, count):
    """After mixed requests, many at once, no row is in use and memory is where it was: within
    20 MB, where a leak of one reply a request would be seen in the counts of what is open."""
    for i in range(100):  # caches of the allocator fill
        mixed_request(server, i)
    assert server.until(0, "nanomla_active_rows")
    names = ("process_resident_memory_bytes", "process_open_fds")
    memory, files = map(server.metric, names)
    with ThreadPoolExecutor(8) as pool:
        statuses = {*pool.map(lambda i: mixed_request(server, i), range(count))}
    assert {200, 400} <= statuses <= {200, 400, 503}
    assert server.until(0, "nanomla_active_rows") and server.until(0, "nanomla_waiting_requests")
    assert server.metric("process_resident_memory_bytes") - memory < 20e6
    assert server.until(lambda open_files: open_files <= files + 1, "process_open_fds")
    with contextlib.ExitStack() as stack:  # every place in rows and queue can be taken again
        for _ in range(ROWS + QUEUE):
            response = stack.enter_context(server.stream())
            assert response.status == 200
    assert server.until(0, "nanomla_active_rows")
    assert server.stderr() == ""


# ---- servers of their own


FAILING = """
import dataclasses
nanomla.serve.app.PATIENCE = 0.5
step = nanomla.serve.stepper.Batch.step
def failing(self):
    if any(request.seed == 666 for request in self.waiting):
        raise RuntimeError("a mistake")
    bad = {"finish": "error", "error": "not finite"}
    pieces = step(self)
    return [dataclasses.replace(p, **bad) if p.request.seed == p.made + 99 else p for p in pieces]
nanomla.serve.stepper.Batch.step = failing
nanomla.serve.app.encode = None
"""

OWN = {  # flags, and what is changed in the modules
    "guarded": (["--host=0.0.0.0", "--token=secret"], "tools.serve.GRACE = 1.5"),
    "plain": ([], ""),
    "failing": ([], FAILING),
}


def test_a_token_and_the_end(own):
    """Without the token only the page and /health answer. SIGTERM lets a stream come to its end,
    refuses new requests meanwhile, gives what is not done in time an error, whether it streams or
    not, and ends with a line and status 143."""
    server = own("guarded")
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
        for method, path in (("GET", "/v1/models"), ("GET", "/metrics"), ("GET", "/none")):
            status, given, answer = server.ask(method, path, headers=headers)
            assert (status, answer["error"]["type"]) == (401, "authentication_error")
            assert given["WWW-Authenticate"] == "Bearer"
        assert server.ask("POST", "/v1/completions", QUICK, headers)[0] == 401
        assert server.ask("GET", "/health", headers=headers)[0] == 200
        assert server.ask("GET", "/", headers=headers)[0] in (200, 404)
    for host in ("a/health?", "a/#", "a/health;"):  # no part of the path
        assert server.ask("GET", "/v1/models", headers={"Host": host})[0] == 401
    server.headers = {"Authorization": "Bearer secret"}
    assert server.ask("GET", "/v1/models")[0] == 200
    long = {**LONG, "max_tokens": 1_000_000}
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(1))
        whole = pool.submit(server.ask, "POST", "/v1/completions", {**long, "stream": False})
        endless = stack.enter_context(server.stream(**long))
        response = stack.enter_context(server.stream(max_tokens=100))
        assert server.until(lambda rows: rows >= 2, "nanomla_active_rows")
        server.process.send_signal(signal.SIGTERM)
        end = time.monotonic() + 1
        while (status := server.ask("POST", "/v1/completions", QUICK)[0]) == 200:
            assert time.monotonic() < end
        assert status == 503 and server.ask("GET", "/health")[0] == 503
        assert events(response)[-1]["choices"][0]["finish_reason"] == "length"
        assert events(endless)[-1]["error"]["code"] == "shutting_down"
        assert whole.result()[0] == 503
    assert server.process.wait(10) == 143 and server.stderr() == "serve.py: terminated\n"


def test_ctrl_c_twice(own):
    """The second ends the process at once."""
    server = own("plain")
    with server.stream(max_tokens=1_000_000) as response:
        response.peek()
        server.process.send_signal(signal.SIGINT)
        assert server.until(1, "nanomla_active_rows")  # goes on
        began = time.monotonic()
        assert server.end(signal.SIGINT) == 130 and time.monotonic() - began < 2
    assert server.stderr() == "serve.py: interrupted\n"


def test_silent_clients_and_a_failing_engine(own):
    """Who reads or sends nothing is dropped after a while. A sample that fails and a mistake in a
    route are errors of their own request. When the engine fails, every waiting client gets one
    line, and the server ends with a traceback instead of hanging."""
    server = own("failing")
    with slow_reader(server, max_tokens=1_000_000, n=16), socket.create_connection(
        ("127.0.0.1", server.port), timeout=10
    ) as silent:
        assert server.until(16, "nanomla_active_rows")
        assert silent.recv(1) == b""
        assert server.until(0, "nanomla_active_rows", seconds=20)
    assert server.stderr() == ""
    with server.stream(seed=102, max_tokens=3, logprobs=0) as response:
        chunks = events(response)
    assert chunks[-1]["error"]["message"] == "not finite" and len(chunks) <= 3
    status, _, answer = server.ask("POST", "/v1/completions", {**QUICK, "seed": 102})
    assert status == 500 and answer["error"]["type"] == "server_error"
    assert server.metric("nanomla_requests_total", status="500") == 2
    status, _, answer = server.ask("POST", "/api/tokenize", {"text": "a"})
    assert status == 500 and "an error of the server" in answer["error"]["message"]
    assert "'NoneType' object is not callable" in server.stderr()
    with server.stream(max_tokens=1_000_000) as response:
        assert server.until(1, "nanomla_active_rows")
        bad = {**QUICK, "seed": 666}
        status, _, answer = server.ask("POST", "/v1/completions", bad)
        message = "the engine has failed (RuntimeError: a mistake)"
        assert (status, answer["error"]["message"]) == (500, message)
        assert events(response)[-1]["error"]["message"] == message
    assert server.process.wait(10) == 1
    said = server.stderr().splitlines()
    assert "serve.py: error: not expected, please report it" in said and "a mistake" in said[-1]
    assert sum("Traceback" in line for line in said) == 2


# ---- what fails before anything is served


@pytest.mark.parametrize(
    ("args", "status", "words"),
    [
        (["--host=0.0.0.0"], 2, ["--host=0.0.0.0", "--token="]),
        (["--host=no.such.host.invalid", "--token=a"], 2, ["--host=no.such.host.invalid"]),
        (["--host=192.0.2.1", "--token=a"], 1, ["--host=192.0.2.1", "cannot listen"]),
        (["--token="], 2, ["token"]),
        (["--token=a b"], 2, ["token", "no spaces"]),
        (["--rows=0"], 2, ["rows must be", "at least 1"]),
        (["--port=99999"], 2, ["port must be", "at most 65535"]),
        (["--out_dir=nowhere"], 1, ["no checkpoint in nowhere"]),
        (["--compare=nowhere"], 1, ["no checkpoint in nowhere"]),
        (["--ckpt=a", "--init_from=b"], 2, ["ckpt and init_from"]),
        (["--prot=1"], 2, ["did you mean port"]),
    ],
)
def test_bad_calls_are_one_line(models, args, status, words):
    """One line on stderr, and nothing on stdout."""
    done = run("tools.serve", f"--out_dir={models.folder}/out-mla", "--port=0", *args)
    assert fails_with_one_line(done, status, *words) and done.stdout == ""


def test_a_port_in_use_is_one_line(models):
    """It names the flag."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
        done = run("tools.serve", f"--out_dir={models.folder}/out-mla", f"--port={port}")
    assert fails_with_one_line(done, 1, f"--port={port}: another program uses it")


@pytest.mark.parametrize("package", ["starlette", "uvicorn", "prometheus_client"])
def test_a_missing_package_is_one_line(models, monkeypatch, package):
    """It says how to get all of them."""
    for name in [n for n in sys.modules if n.split(".")[0] == package or n == "nanomla.serve.app"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    done = run("tools.serve", f"--out_dir={models.folder}/out-mla", "--port=0")
    words = [package, "pip install -r requirements-serve.txt", "make serve"]
    assert fails_with_one_line(done, 1, *words)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_end_while_a_model_is_opened(models, number):
    """The signal's line and status at once, however long the opening takes."""
    slow = "lambda cfg: print('http://opening:1', flush=True) or time.sleep(30)"
    patch = f"import time; tools.serve.open_models = {slow}"
    server = Server(models.folder, patch=patch).ready()
    began = time.monotonic()
    assert server.end(number) == 128 + number and time.monotonic() - began < 3
    assert server.stderr() in ("serve.py: interrupted\n", "serve.py: terminated\n")


def test_the_address_it_listens_on_is_its_own():
    """Any loopback address that was asked for is a Host that is taken, and no other name."""
    from nanomla.serve.app import Guard

    hosts = Guard(None, "127.0.0.2", None, set()).hosts
    assert hosts.fullmatch("127.0.0.2:80") and hosts.fullmatch("localhost")
    assert not hosts.fullmatch("127.0.0.3") and not hosts.fullmatch("127a0.0.2")


def test_names_of_models(models):
    """The folder's name; a second of that name gets a number."""
    from tools.serve import ServeConfig, open_models

    folder = models.folder / "out-mla"
    cfg = ServeConfig(out_dir=str(folder), compare=str(folder), device="cpu")
    assert [one.name for one in open_models(cfg)] == ["out-mla", "out-mla-2"]
    cfg = ServeConfig(ckpt=str(folder / "ckpt.pt"), device="cpu", cache_dtype="int8")
    (one,) = open_models(cfg)
    assert one.name == "out-mla" and one.about["cache_dtype"] == "int8"
    # one float16 scale per token and head beside the numbers of one byte
    assert one.about["mha_bytes_per_token"] == 2 * (48 + 8 * 2)
