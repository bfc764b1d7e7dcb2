"""
The real server, started as a user starts it, on a free port.
Run: python -m pytest tests/test_serve.py
"""

import contextlib
import copy
import http.client
import json
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
from nanomla.serve.protocol import Params
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

ROWS = 4
QUEUE = 5
CONTEXT = 48
CHARS = "".join(map(chr, range(32, 127))) + "\n"
PUBLIC = "llm.example.org"
JSON = {"Content-Type": "application/json"}
POST = ("POST", "/v1/completions")
QUICK = {"model": "out-mla", "prompt": "to be", "max_tokens": 4}
LONG = {"model": "out-mla", "prompt": "to be", "max_tokens": 1_000_000, "stream": True}
START = """
import sys
import nanomla.serve.app, nanomla.serve.listener, nanomla.serve.stepper, tools.serve
from nanomla.errors import run_script
sys.argv[0] = "serve.py"
{patch}
run_script(tools.serve.main)
"""
STRICT = """
import resource, socket
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
nanomla.serve.app.PATIENCE = nanomla.serve.listener.PATIENCE = 1.0
tools.serve.GRACE = 1.5
listen = tools.serve.listen
def listen_with_small_buffers(cfg):
    listener = listen(cfg)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**16)
    return listener
tools.serve.listen = listen_with_small_buffers
"""
FAILING = """
import dataclasses
step = nanomla.serve.stepper.Batch.step
def failing(self):
    if any(request.seed == 666 for request in self.waiting.next_of_each()):
        raise RuntimeError("a mistake")
    pieces = step(self)
    for i, piece in enumerate(pieces):
        if piece.request.seed == 102 and piece.made == 3:
            self.cancel(piece.request)  # so that this is the sample's only end
            pieces[i] = dataclasses.replace(piece, finish="error", error="not finite")
    return pieces
nanomla.serve.stepper.Batch.step = failing
nanomla.serve.app.encode = None
"""
MISTAKE = """
async def later(*_):
    raise RuntimeError("a mistake")
def now(*_):
    raise RuntimeError("a mistake")
"""
BROKEN = {  # a part of the server, and a mistake in it
    "the first lines": MISTAKE + "tools.serve.announce = now",
    "the listener": MISTAKE + "nanomla.serve.listener.Listener.watch = later",
    "uvicorn": MISTAKE + "import uvicorn; uvicorn.Server.on_tick = later",
    "a step": MISTAKE + "nanomla.serve.app.Metrics.step = now",
}
SERVERS = {  # flags, and what is changed in the modules
    "plain": (["--compare={folder}/out-mha", f"--rows={ROWS}", f"--queue={QUEUE}"], ""),
    "strict": (["--host=0.0.0.0", "--token=secret"], STRICT),
    "public": ([f"--public_host={PUBLIC}", "--token=secret"], ""),
    "failing": ([], FAILING),
}


class Server:
    """A server's process and a client for it."""

    def __init__(self, folder, name, flags=(), patch="", stdout=subprocess.PIPE):
        flags = [f"--out_dir={folder}/out-mla", "--port=0", "--max_tokens=1000000", *flags]
        command = ["-c", START.format(patch=patch)] if patch else ["-m", "tools.serve"]
        self.headers = {}  # of every request
        self.printed = []
        self.errors = folder / f"stderr-{name}"
        with open(self.errors, "w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, *command, *(flag.format(folder=folder) for flag in flags)],
                cwd=ROOT, stdout=stdout, stderr=errors, text=True,
            )

    def ready(self):
        """Wait until it takes requests."""
        while not self.printed or "http://" not in self.printed[-1]:
            self.printed.append(self.process.stdout.readline().strip())
            assert self.printed[-1], self.stderr()
        self.port = int(self.printed[-1].rpartition(":")[2])
        return self

    def stderr(self):
        return self.errors.read_text()

    @contextlib.contextmanager
    def response(self, method, path, body=None, headers=None, client="127.0.0.1"):
        """A response that has begun; body: bytes, or what becomes JSON. client: its address."""
        headers = {**self.headers, **(headers or {})}
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
            headers = {**JSON, **headers}
        connection = http.client.HTTPConnection(
            "127.0.0.1", self.port, timeout=30, source_address=(client, 0)
        )
        with contextlib.closing(connection):
            connection.request(method, path, body, headers)
            yield connection.getresponse()

    def ask(self, method, path, body=None, headers=None, client="127.0.0.1"):
        """Status, headers and the content, JSON if it is."""
        with self.response(method, path, body, headers, client) as response:
            content = response.read().decode()
            if response.headers.get_content_type() == "application/json" and content:
                content = json.loads(content)
            return response.status, response.headers, content

    def complete(self, **body):
        """The content of a completion that works."""
        status, _, answer = self.ask(*POST, body)
        assert status == 200, answer
        return answer

    def text(self, **body):
        return self.complete(**body)["choices"][0]["text"]

    def stream(self, **body):
        return self.response(*POST, {**LONG, **body})

    def send(self, content):
        """A socket that has sent these bytes, which need not be HTTP."""
        sock = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        sock.sendall(content)
        return sock

    def answer(self, content):
        """All that comes back for these bytes."""
        with self.send(content) as sock:
            return b"".join(iter(lambda: sock.recv(65536), b""))

    def metric(self, name, **labels):
        """The sum of a metric's values that have these labels."""
        total = 0.0
        for line in self.ask("GET", "/metrics")[2].splitlines():
            wanted = [f'{key}="{value}"' for key, value in labels.items()]
            if re.match(rf"{name}[{{ ]", line) and all(label in line for label in wanted):
                total += float(line.split()[-1])
        return total

    def until(self, value, name, seconds=10.0, **labels):
        """Wait until a metric has a value."""
        end = time.monotonic() + seconds
        while (now := self.metric(name, **labels)) != value:
            assert time.monotonic() < end, f"{name} is {now} after {seconds} s"
            time.sleep(0.02)
        return True


def posted(body):
    """The bytes of a request."""
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n"
    head += "Authorization: Bearer secret\r\nContent-Type: application/json\r\n\r\n"
    return head.encode() + content


def events(response):
    """The JSON objects of a stream, which ends with [DONE]."""
    parts = response.read().decode().split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""]
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]


def save_run(folder, spec, **settings):
    """A random model as a run's folder; returns the model and its tokenizer."""
    folder.mkdir()
    tokenizer = Tokenizer(spec)
    torch.manual_seed(1)
    shape = {**settings, "block_size": CONTEXT, "vocab_size": tokenizer.vocab_size}
    model = randomise(GPT(tiny_config(**shape)))
    config = {"dataset": "x", "learning_rate": float("inf"), "vocab_size": None}
    fields = {"iter_num": 7, "best_val_loss": 1.5, "config": config, "tokenizer": spec}
    save_model(folder, model, best=True, **fields)
    return model, tokenizer


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with two runs, MLA over bytes and MHA over characters, and their models."""
    folder = tmp_path_factory.mktemp("serve")
    opened = {
        "out-mla": save_run(folder / "out-mla", {"kind": "byte"}, **TINY_MLA),
        "out-mha": save_run(folder / "out-mha", {"kind": "char", "chars": CHARS}),
    }
    content = torch.load(folder / "out-mha" / "best.pt")
    torch.save({**content, "best_val_loss": -float("inf")}, folder / "out-mha" / "best.pt")
    return SimpleNamespace(folder=folder, opened=opened)


@pytest.fixture(scope="module")
def servers(models):
    """All servers, which start side by side; none is left behind."""
    servers = {name: Server(models.folder, name, *SERVERS[name]) for name in SERVERS}
    yield servers
    for one in servers.values():
        one.process.kill()
        one.process.wait()


@pytest.fixture(scope="module")
def server(servers):
    """The server of most tests. It has printed no error. Ctrl-C lets a text go on, a second one
    ends the process at once."""
    server = servers["plain"].ready()
    yield server
    with server.stream():
        assert server.until(1, "nanomla_active_rows")
        server.process.send_signal(signal.SIGINT)
        time.sleep(0.2)
        assert server.metric("nanomla_active_rows") == 1
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(2) == 130
    assert server.stderr() == "serve.py: interrupted\n"


# ---- the protocol


def test_models_page_and_headers(server):
    """What was printed at the start, /v1/models, the page, the headers of every reply."""
    assert server.printed[0].startswith("out-mla: MLA, L = 7, r = 2; 9 cached numbers per token")
    assert server.printed[1].startswith("out-mha: MHA, 4 heads of 6; 48 cached numbers per token")
    status, _, models = server.ask("GET", "/v1/models")
    assert status == 200 and [m["id"] for m in models["data"]] == ["out-mla", "out-mha"]
    assert server.ask("GET", "/v1/models/out-mha")[2] == models["data"][1]
    mla, mha = (model["nanomla"] for model in models["data"])
    assert mla["bytes_per_token"] == 2 * 9 * 4 and mla["mha_bytes_per_token"] == 2 * 48 * 4
    assert mha["bytes_per_token"] == mha["mha_bytes_per_token"] == 2 * 48 * 4
    assert mla["iteration"] == 7 and mla["val_loss"] == 1.5 and mla["context"] == CONTEXT
    assert mha["val_loss"] is None  # -inf is no loss
    for request in (("GET", "/"), ("GET", "/none"), ("DELETE", "/v1/models"), POST):
        headers = server.ask(*request)[1]
        assert headers["Content-Security-Policy"] == "default-src 'self'", request
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert not [name for name in headers if name.lower().startswith("access-control")]
    for path in (ROOT / "nanomla" / "serve" / "page").glob("*.*"):
        status, headers, text = server.ask("GET", f"/{path.name}")
        assert status == 200 and text == path.read_text(encoding="utf-8"), path
        assert path.suffix != ".js" or headers.get_content_type() == "text/javascript"


def test_texts_are_those_of_generate(server, models):
    """Greedy and with a seed, from text or ids, and up to a stop string."""
    for name, (model, tokenizer) in models.opened.items():
        ids = tokenizer.encode("to be")
        for sampling in ({"temperature": 0}, {"temperature": 0.8, "top_k": 20}):
            generator = torch.Generator().manual_seed(4)
            tokens = model.generate(torch.tensor([ids]), 30, generator=generator, **sampling)[0]
            text = tokenizer.decode(tokens[len(ids) :].tolist())
            body = {"model": name, "prompt": "to be", "max_tokens": 30, "seed": 4, **sampling}
            answer = server.complete(**body)
            assert answer["choices"][0]["text"] == text and answer["model"] == name
            assert answer["choices"][0]["finish_reason"] == "length"
            assert server.text(**{**body, "prompt": ids}) == text
    stop = text[7:9]
    choice = server.complete(**body, stop=["no such text", stop])["choices"][0]
    assert choice["text"] == text[: text.index(stop)] and choice["finish_reason"] == "stop"


def test_random_numbers_of_a_request(server):
    """Without a seed each prompt draws its own; with one, prompts and samples are as alone, and a
    text that was cut goes on as if it had not been."""
    ask = {"model": "out-mla", "max_tokens": 20}
    answer = server.complete(**ask, prompt=["ROMEO:"] * 8)
    assert len({choice["text"] for choice in answer["choices"]}) == 8
    answer = server.complete(**ask, prompt=["ROMEO:"] * 2, seed=4, n=2)
    texts = [choice["text"] for choice in answer["choices"]]
    alone = [server.text(**ask, prompt="ROMEO:", seed=seed) for seed in (4, 5)]
    assert texts == alone * 2 and alone[0] != alone[1]
    ids = {}
    for cut in (0, 7):
        more = {"prompt": [*b"ROMEO:", *ids.get(0, [])[:cut]], "tokens_drawn": cut}
        choice = server.complete(**{**ask, **more}, seed=4, return_token_ids=True)["choices"][0]
        ids[cut] = [token["id"] for token in choice["nanomla"]["tokens"]]
    assert ids[7][:13] == ids[0][7:]


def test_a_stream_is_the_whole_in_parts(server):
    """Text, logprobs, ends and usage of a stream add up to those of one response."""
    body = {
        "model": "out-mla", "prompt": ["to be", "or"], "n": 2, "max_tokens": 12, "seed": 5,
        "logprobs": 3, "echo": True, "return_token_ids": True, "top_k": 50, "top_p": 0.9,
    }
    whole = server.complete(**body)
    with server.stream(**body, stream_options={"include_usage": True}) as response:
        assert response.headers.get_content_type() == "text/event-stream"
        *chunks, last = events(response)
    assert last["choices"] == [] and last["usage"] == whole["usage"]
    assert whole["usage"]["completion_tokens"] == 48 and whole["usage"]["prompt_tokens"] == 7
    assert len({chunk["id"] for chunk in chunks}) == 1 and len(chunks) > 8
    assert len({choice["text"] for choice in whole["choices"]}) == 4
    for index, choice in enumerate(whole["choices"]):
        parts = [d for c in chunks for d in c["choices"] if d["index"] == index]
        assert "".join(part["text"] for part in parts) == choice["text"]
        for key, values in choice["logprobs"].items():
            assert [v for part in parts for v in part["logprobs"][key]] == values
        details = choice["nanomla"]
        assert [t for part in parts for t in part["nanomla"]["tokens"]] == details["tokens"]
        assert parts[-1]["finish_reason"] == choice["finish_reason"] == "length"
        prompt = parts[0]["nanomla"]["prompt"]
        assert prompt["ids"] == details["prompt"]["ids"]
        assert choice["text"].startswith(bytes(prompt["ids"]).decode())
        assert prompt["cached"] + prompt["computed"] == len(prompt["ids"])
        assert details["cache"]["bytes"] == details["cache"]["tokens"] * 72 > 0


def test_openais_client(server):
    """The official package lists models, completes, streams, and names errors as it should."""
    openai = pytest.importorskip("openai")
    address = f"http://127.0.0.1:{server.port}/v1"
    with openai.OpenAI(base_url=address, api_key="none", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["out-mla", "out-mha"]
        ask = {"model": "out-mha", "prompt": "to be", "max_tokens": 8, "seed": 2, "logprobs": 1}
        whole = client.completions.create(**ask)
        assert whole.usage.completion_tokens == 8 and len(whole.choices[0].logprobs.tokens) == 8
        options = {"include_usage": True}
        chunks = [*client.completions.create(**ask, stream=True, stream_options=options)]
        text = "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)
        assert text == whole.choices[0].text and chunks[-1].usage == whole.usage
        with pytest.raises(openai.BadRequestError, match="temperature") as caught:
            client.completions.create(**ask, temperature=-1)
        assert caught.value.param == "temperature"
        with pytest.raises(openai.NotFoundError, match="no model 'gpt'"):
            client.completions.create(model="gpt", prompt="a")


def test_a_log_as_it_grows(server, models):
    """The settings of a run and new entries, with what JSON does not have as null."""
    log = models.folder / "out-mha" / "log.jsonl"
    lines = ['{"iter": 0, "loss": NaN}', "[" * 100_000, '{"iter": 1, "loss": 2.5}']
    log.write_text("\n".join([*lines, '{"iter": 2, "lo']))
    path = "/api/log?model=out-mha"
    answer = server.ask("GET", path)[2]
    assert answer["entries"] == [{"iter": 0, "loss": None}, {"iter": 1, "loss": 2.5}]
    assert answer["settings"]["n_head"] == 4 and answer["settings"]["learning_rate"] is None
    log.write_text(log.read_text() + 'ss": 2}\n')
    answer = server.ask("GET", f"{path}&after={answer['next']}")[2]
    assert answer["entries"] == [{"iter": 2, "loss": 2}] and answer["next"] == 3
    log.write_text('{"iter": 0, "loss": 9}\n')
    answer = server.ask("GET", f"{path}&after=3")[2]
    assert answer["restarted"] and answer["entries"] == [{"iter": 0, "loss": 9}]
    assert server.ask("GET", f"{path}&after=-1")[0] == 400


def test_tokens_and_attention(server, models):
    """A text's tokens; a lower triangle of weights, but not while that model generates."""
    status, _, tokens = server.ask("POST", "/api/tokenize", {"model": "out-mha", "text": "to"})
    ids = models.opened["out-mha"][1].encode("to")
    assert status == 200 and tokens == {"ids": ids, "tokens": ["t", "o"]}
    picture = ("POST", "/api/attention")
    body = {"model": "out-mla", "tokens": [1, 2, 3, 4], "layer": 1}
    status, _, answer = server.ask(*picture, body)
    assert status == 200 and len(answer["tokens"]) == 4, answer
    weights = torch.tensor(answer["heads"])
    assert weights.shape == (4, 4, 4) and torch.equal(weights, weights.tril())
    torch.testing.assert_close(weights.sum(-1), torch.ones(4, 4), atol=1e-3, rtol=0)
    for wrong in ({"layer": 2}, {"tokens": [256]}, {"tokens": []}, {"tokens": [True]}):
        assert server.ask(*picture, {**body, **wrong})[0] == 400
    with server.stream() as response:
        response.read(1)
        assert server.ask(*picture, body)[0] == 409
        assert server.ask(*picture, {**body, "model": "out-mha"})[0] == 200
    assert server.until(0, "nanomla_active_rows")


# ---- many clients


def test_parallel_clients_get_what_each_gets_alone(server):
    """Nine at once, of different lengths and settings, streaming or not, on both models."""
    asked = []
    for i in range(9):
        name = ("out-mla", "out-mha")[i % 2]
        body = {"model": name, "prompt": "to be or not"[: 1 + i], "max_tokens": 5 + 7 * i}
        asked.append({**body, "seed": i, "temperature": 0.8, "top_k": i % 3 * 5})

    def again(i):
        if i % 3:
            return server.text(**asked[i])
        with server.stream(**asked[i]) as response:
            return "".join(chunk["choices"][0]["text"] for chunk in events(response))

    alone = [server.text(**body) for body in asked]
    with ThreadPoolExecutor(9) as pool:
        assert [*pool.map(again, range(9))] == alone
    assert len(set(alone)) == 9


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_row(server, stream):
    """At once, whether it streams or not; it is counted as cancelled."""
    cancelled = server.metric("nanomla_samples_total", finish="cancelled")
    left = server.metric("nanomla_requests_total", status="499")
    with server.send(posted({**LONG, "stream": stream, "n": 2})):
        assert server.until(2, "nanomla_active_rows", model="out-mla")
        assert server.metric("nanomla_cache_used_bytes") > 0
    assert server.until(0, "nanomla_active_rows")
    assert server.metric("nanomla_cache_used_bytes") == 0
    assert server.metric("nanomla_samples_total", finish="cancelled") == cancelled + 2
    assert server.metric("nanomla_requests_total", status="499") == left + 1


def test_too_many_clients(server):
    """A client's full queue is refused with the time to wait, at once, and goes on when there is
    room. Others are served."""
    with contextlib.ExitStack() as stack:
        for _ in range(ROWS + QUEUE - 1):
            stack.enter_context(server.stream())
        with server.stream():
            assert server.until(ROWS, "nanomla_active_rows", model="out-mla")
            assert server.until(QUEUE, "nanomla_waiting_requests", model="out-mla")
            status, headers, answer = server.ask(*POST, QUICK)
            assert status == 503 and headers["Retry-After"] == "1"
            assert answer["error"]["code"] == "overloaded"
            assert server.text(**{**QUICK, "model": "out-mha"})  # it has its own queue
            assert server.ask(*POST, QUICK, client="127.0.0.2")[0] == 200
        assert server.until(QUEUE - 1, "nanomla_waiting_requests", model="out-mla")
        assert stack.enter_context(server.stream()).status == 200
    assert server.until(0, "nanomla_active_rows") and server.until(0, "nanomla_waiting_requests")
    assert len(server.complete(**QUICK, n=ROWS + QUEUE)["choices"]) == ROWS + QUEUE
    assert server.ask(*POST, {**QUICK, "n": ROWS + QUEUE + 1})[0] == 400


# ---- what is refused


def test_bodies(server):
    """Bad JSON, oversized bodies with and without a length, other kinds of content."""
    for body in (b"", b"{", b"[1]", b"\xff", b'{"a": ' * 100_000):
        status, _, answer = server.ask(*POST, body, JSON)
        assert status == 400 and answer["error"]["message"].startswith("the request"), body[:20]
    large = json.dumps({**QUICK, "prompt": "a" * 2**20}).encode()
    assert server.ask(*POST, large, JSON)[0] == 413
    chunked = posted(QUICK).partition(b"Content-Length")[0] + b"Transfer-Encoding: chunked\r\n"
    chunked += b"Content-Type: application/json\r\nConnection: close\r\n\r\n"
    assert server.answer(chunked + b"%x\r\n%s" % (len(large), large)).startswith(b"HTTP/1.1 413")
    body = json.dumps(QUICK).encode()
    assert server.ask(*POST, body, {"Content-Type": "text/plain"})[0] == 415
    assert server.ask(*POST, body, {**JSON, "Content-Encoding": "gzip"})[0] == 415


def test_other_web_pages_are_refused(server):
    """A wrong Host, as after DNS rebinding, and a wrong Origin, as of a page elsewhere."""
    for host in ("evil.example", "localhost.evil.example", "127.0.0.1.evil:8000", "", "[::2]"):
        assert server.ask("GET", "/health", headers={"Host": host})[0] == 403, host
    for host in ("LOCALHOST:1", "127.0.0.1:99", "[::1]:8000"):
        assert server.ask("GET", "/health", headers={"Host": host})[0] == 200, host
    own = f"http://127.0.0.1:{server.port}"
    for origin in ("https://evil.example", "null", f"{own}.evil", "http://localhost", ""):
        status, _, answer = server.ask(*POST, QUICK, {"Origin": origin})
        assert (status, answer["error"]["type"]) == (403, "permission_error"), origin
    assert server.ask(*POST, QUICK, {"Origin": own})[0] == 200


def test_every_response_has_a_request_id(server):
    """The client's own, if it is short and visible, else a fresh one; errors and streams too."""
    for name in ("a", "req-1/ä".encode("latin-1"), "x" * 128, "~!"):
        headers = server.ask("GET", "/health", headers={"x-request-id": name})[1]
        assert (headers["x-request-id"] == name) == (not isinstance(name, bytes))
    fresh = set()
    for name in ("", "x" * 129, "a b", "a\tb", "\x7f"):
        fresh.add(server.ask("GET", "/none", headers={"X-Request-Id": name})[1]["x-request-id"])
    for headers in ({"Host": "evil.example"}, {"Origin": "null"}, {}):
        fresh.add(server.ask(*POST, b"{", headers)[1]["x-request-id"])
    with server.stream(max_tokens=2) as response:
        fresh.add(response.headers["x-request-id"])
    assert len(fresh) == 9 and all(re.fullmatch("[0-9a-f]{32}", name) for name in fresh)


def test_no_path_reaches_the_files(server):
    """404, whatever is tried."""
    for path in (
        "/../pyproject.toml", "/..%2fpyproject.toml", "/%2e%2e/%2e%2e/etc/passwd", "//etc/passwd",
        "/page.js/../../app.py", "/page/index.html", "/v1/models/../../x", "/%00",
        "/v1/models/..%2f..%2fout-mla", "/index.html%00.js", "/v1/models/%2fetc%2fpasswd",
    ):
        assert server.ask("GET", path)[0] == 404, path


def test_what_is_no_http(server):
    """An error and the end of the connection, also after the first request; nothing is printed."""
    good = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    answer = server.answer(good + b"nonsense\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200") and b"HTTP/1.1 400" in answer
    early = good.replace(b"GET /health", b"POST /v1/completions").removesuffix(b"\r\n")
    early += b"Transfer-Encoding: chunked\r\n\r\n1\r\na\r\nzz\r\n"
    assert server.answer(early).startswith(b"HTTP/1.1 4")
    assert server.stderr() == ""


def test_nonsense_in_every_field(server):
    """The error of a client, in one line, or what works; the server prints nothing and goes on."""
    nonsense = [[[[]]], {"\udc00": 1}, -1, -(10**400), 1e400, [None], "x" * 501, "\ud800"]
    for name in Params.model_fields:
        for value in nonsense:
            status, _, answer = server.ask(*POST, {**QUICK, name: value})
            assert status in (200, 400, 404), (name, value)
            if status != 200:
                assert answer["error"]["param"] in (name, "n", "stream_options"), (name, value)
                assert "\n" not in answer["error"]["message"]
    assert server.stderr() == "" and server.complete(**QUICK)


# ---- servers of their own


def test_a_token(servers):
    """Without the token only the page and /health answer."""
    server = servers["strict"].ready()
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
        for request in (("GET", "/v1/models"), ("GET", "/metrics"), (*POST, QUICK)):
            status, reply, answer = server.ask(*request, headers=headers)
            assert (status, answer["error"]["type"]) == (401, "authentication_error")
            assert reply["WWW-Authenticate"] == "Bearer"
        assert server.ask("GET", "/health", headers=headers)[0] == 200
        assert server.ask("GET", "/", headers=headers)[0] == 200
    server.headers = {"Authorization": "Bearer secret"}
    assert server.complete(**QUICK)


def test_behind_a_proxy(servers):
    """The public name is accepted as Host and as Origin, whichever Host the proxy names."""
    server = servers["public"].ready()
    server.headers = {"Authorization": "Bearer secret"}
    own = f"127.0.0.1:{server.port}"
    for host in (PUBLIC, PUBLIC.upper(), f"{PUBLIC}:8443", own):
        for origin in (f"https://{PUBLIC}", f"http://{PUBLIC}:8443"):
            assert server.ask(*POST, QUICK, {"Host": host, "Origin": origin})[0] == 200
    for host in (f"{PUBLIC}.evil", f"evil.{PUBLIC}", f"{PUBLIC}:8443:1", "evil.example", ""):
        assert server.ask("GET", "/health", headers={"Host": host})[0] == 403, host
    for origin in (f"https://{PUBLIC}.evil", f"ftp://{PUBLIC}", PUBLIC, "null", "https://a@b"):
        headers = {"Host": PUBLIC, "Origin": origin}
        assert server.ask(*POST, QUICK, headers)[0] == 403, origin
    assert server.ask("GET", "/v1/models", headers={"Authorization": "Bearer no"})[0] == 401


@pytest.mark.parametrize(
    ("public_host", "client", "forwarded", "caller"),
    [
        (PUBLIC, ("127.0.0.1", 1), ["203.0.113.9"], "203.0.113.9"),
        (PUBLIC, ("::1", 1), ["made-up, 203.0.113.9"], "203.0.113.9"),
        (PUBLIC, ("127.0.0.1", 1), ["made-up", "2001:db8::1 "], "2001:db8::1"),
        (PUBLIC, ("127.0.0.1", 1), [], "127.0.0.1"),
        (PUBLIC, ("127.0.0.1", 1), ["made-up,"], "127.0.0.1"),
        (PUBLIC, ("192.0.2.7", 1), ["made-up"], "192.0.2.7"),
        (PUBLIC, None, [], ""),
        (None, ("127.0.0.1", 1), ["made-up"], "127.0.0.1"),
    ],
)
def test_who_a_request_is_of(public_host, client, forwarded, caller):
    """The client of the proxy on this machine; no other client can name one."""
    from starlette.requests import Request

    from nanomla.serve.app import Guard

    headers = [(b"x-forwarded-for", value.encode()) for value in forwarded]
    scope = {"type": "http", "path": "/", "client": client, "headers": headers}
    guard = Guard(None, None, "127.0.0.1", public_host, None, set())
    assert guard._caller(Request(scope)) == caller


NGINX = """
daemon off; pid {folder}/pid; events {{}}
http {{
    access_log off; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/a; uwsgi_temp_path {folder}/b; scgi_temp_path {folder}/c;
    server {{ listen 127.0.0.1:{port}; {block} }}
}}
"""
CADDY = """
{{
    admin off
    auto_https off
}}
{block}
"""
PROXIES = {  # the first line in docs/serve.md, what is around the lines, and how it is started
    "nginx": ("    location / {", NGINX, "nginx -e stderr -c {file}"),
    "caddy": (f"    {PUBLIC} {{", CADDY, "caddy run --adapter caddyfile --config {file}"),
}


@pytest.mark.parametrize("proxy", PROXIES)
def test_the_proxies_of_the_docs(servers, tmp_path, proxy):
    """With the lines of docs/serve.md: page, texts, streams that are not held back, and leaving."""
    if shutil.which(proxy) is None:
        pytest.skip(f"needs {proxy}: apt install {proxy}")
    server = servers["public"].ready()
    server.headers = {"Authorization": "Bearer secret"}
    first, around, command = PROXIES[proxy]
    docs = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")
    block = first + docs.partition(first)[2].partition("\n    }")[0] + "\n    }"
    assert "8000" in block
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    block = block.replace("127.0.0.1:8000", f"127.0.0.1:{server.port}")
    block = block.replace(f"{PUBLIC} {{", f"http://{PUBLIC}:{port} {{")
    file = tmp_path / "config"
    file.write_text(around.format(folder=tmp_path, port=port, block=block))
    process = subprocess.Popen(command.format(file=file).split(), stderr=subprocess.DEVNULL)
    proxied = copy.copy(server)
    proxied.port = port
    proxied.headers = {**server.headers, "Host": PUBLIC, "Origin": f"https://{PUBLIC}"}
    try:
        end = time.monotonic() + 20
        while time.monotonic() < end:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port)).close()
                break
            time.sleep(0.05)
        assert "<title>nanoMLA" in proxied.ask("GET", "/")[2]
        status, headers, _ = proxied.ask(*POST, QUICK, {"x-request-id": "mine"})
        assert status == 200 and headers["x-request-id"] == "mine"
        assert proxied.ask(*POST, QUICK, {"Origin": "https://evil.example"})[0] == 403
        assert proxied.ask("GET", "/v1/models", headers={"Authorization": "Bearer no"})[0] == 401
        with proxied.stream() as response:
            assert response.read1(100).startswith(b"data: ")  # of a text without an end
            assert server.until(1, "nanomla_active_rows")
        assert server.until(0, "nanomla_active_rows")
    finally:
        process.terminate()
        process.wait(10)


def test_idle_connections_and_the_end(servers):
    """
    More connections than the process may open files, silent or in mid-request, keep nobody out,
    fill no log and are closed after a while; so is one whose client reads nothing.
    SIGTERM lets a stream come to its end, refuses new requests meanwhile, and gives what is not
    done in time an error.
    """
    server = servers["strict"].ready()
    server.headers = {"Authorization": "Bearer secret"}
    with contextlib.ExitStack() as stack:
        for i in range(300):
            stack.enter_context(server.send(posted(QUICK)[: i % 3 * 40]))
        began = time.monotonic()
        for _ in range(3):
            assert server.text(**QUICK)
        assert server.metric("process_open_fds") < 256
        assert time.monotonic() - began < 10
        assert server.answer(posted(QUICK)[:-1]).startswith(b"HTTP/1.1 408")
        assert server.answer(b"GET") == b""
        reader = stack.enter_context(socket.socket())
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        reader.connect(("127.0.0.1", server.port))
        reader.sendall(posted({**LONG, "n": 16, "logprobs": 20}))
        assert server.until(16, "nanomla_active_rows")
        assert server.until(0, "nanomla_active_rows", seconds=30)
        assert server.metric("process_open_fds") < 100
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(1))
        whole = pool.submit(server.ask, *POST, {**LONG, "stream": False})
        endless = stack.enter_context(server.stream())
        response = stack.enter_context(server.stream(max_tokens=50))
        server.process.send_signal(signal.SIGTERM)
        end = time.monotonic() + 1
        while (status := server.ask(*POST, QUICK)[0]) == 200:
            assert time.monotonic() < end
        assert status == 503 and server.ask("GET", "/health")[0] == 503
        assert events(response)[-1]["choices"][0]["finish_reason"] == "length"
        assert events(endless)[-1]["error"]["code"] == "shutting_down"
        assert whole.result()[0] == 503
    assert server.process.wait(10) == 143 and server.stderr() == "serve.py: terminated\n"


def test_a_failing_engine(servers):
    """A sample that fails and a mistake in a route are errors of their own request. When the engine
    fails, every waiting client gets one line, and the server ends with a traceback."""
    server = servers["failing"].ready()
    with server.stream(seed=102, max_tokens=9, logprobs=0) as response:
        chunks = events(response)
    assert chunks[-1]["error"]["message"] == "not finite" and len(chunks) <= 3
    status, _, answer = server.ask(*POST, {**QUICK, "seed": 102})
    assert status == 500 and answer["error"]["type"] == "server_error"
    assert server.metric("nanomla_requests_total", status="500") == 2
    assert server.metric("nanomla_samples_total", finish="error") == 2
    status, reply, answer = server.ask("POST", "/api/tokenize", {"text": "a"})
    assert status == 500 and "an error of the server" in answer["error"]["message"]
    name = f"request {reply['x-request-id']}"
    assert answer["error"]["message"].endswith(name)
    assert server.stderr().startswith(f"serve.py: error: {name}: not expected, please report it\n")
    assert "'NoneType' object is not callable" in server.stderr()
    with server.stream() as response:
        assert server.until(1, "nanomla_active_rows")
        status, _, answer = server.ask(*POST, {**QUICK, "seed": 666})
        message = "the engine has failed (RuntimeError: a mistake)"
        assert (status, answer["error"]["message"]) == (500, message)
        assert events(response)[-1]["error"]["message"] == message
    assert server.process.wait(10) == 1
    lines = server.stderr().splitlines()
    assert "serve.py: error: not expected, please report it" in lines and "a mistake" in lines[-1]


def test_a_mistake_in_any_part_ends_the_server(models):
    """With a traceback, and the port is free again; none of them hangs, and no client waits."""
    broken = {part: Server(models.folder, part, [], BROKEN[part]) for part in BROKEN}
    try:
        server = broken["a step"].ready()
        status, _, answer = server.ask(*POST, {**QUICK, "max_tokens": 1_000_000})
        assert status == 500 and "a mistake" in answer["error"]["message"]
        for part, server in broken.items():
            assert server.process.wait(30) == 1, part
            lines = server.stderr().splitlines()
            assert lines[0] == "serve.py: error: not expected, please report it", part
            assert lines[-1] == "RuntimeError: a mistake", part
    finally:
        for server in broken.values():
            server.process.kill()
    with contextlib.suppress(ConnectionRefusedError):
        pytest.fail(f"the port is open: {socket.create_connection(('127.0.0.1', server.port))}")


def test_a_server_whose_stdout_is_full_serves(models):
    """Of its first lines there is a warning on stderr."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    with open("/dev/full", "w") as full:
        server = Server(models.folder, "full", [f"--port={port}"], stdout=full)
    server.port = port
    try:
        end = time.monotonic() + 30
        while time.monotonic() < end and not server.stderr():
            time.sleep(0.05)
        assert server.complete(**QUICK)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) == 143
    finally:
        server.process.kill()
    warning = "stdout cannot be written (No space left on device), going on without it"
    assert server.stderr() == f"warning: {warning}\nserve.py: terminated\n"


# ---- what fails before anything is served


@pytest.mark.parametrize(
    ("args", "status", "words"),
    [
        (["--host=0.0.0.0"], 2, ["--host=0.0.0.0", "--token="]),
        (["--host=no.such.invalid", "--token=a"], 1, ["--host=no.such.invalid", "cannot listen"]),
        ([f"--public_host={PUBLIC}"], 2, [f"--public_host={PUBLIC}", "--token="]),
        (["--public_host=https://a.b", "--token=a"], 2, ["public_host=", "without http://"]),
        (["--token=a b"], 2, ["token", "without spaces"]),
        (["--compare=nowhere"], 1, ["no checkpoint in nowhere"]),
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


def test_a_missing_package_is_one_line(models, monkeypatch):
    """It says how to get all of them."""
    for name in [n for n in sys.modules if n == "nanomla.serve.app" or n.startswith("starlette")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "starlette", None)
    done = run("tools.serve", f"--out_dir={models.folder}/out-mla", "--port=0")
    words = ["starlette", "pip install -r requirements-serve.txt", "make serve"]
    assert fails_with_one_line(done, 1, *words)


def test_what_only_this_machine_reaches():
    """A socket of IPv6 sees 127.0.0.1 as an address mapped into it."""
    from nanomla.serve.app import is_loopback

    for host in ("localhost", "127.0.0.1", "127.1.2.3", "::1", "::ffff:127.0.0.1"):
        assert is_loopback(host), host
    for host in ("example.org", "10.0.0.1", "::ffff:10.0.0.1", "::", "0.0.0.0", ""):
        assert not is_loopback(host), host


def test_names_of_models(models):
    """The folder's name; a second of that name gets a number. A cache of int8 has scales."""
    from tools.serve import ServeConfig, open_models

    folder = str(models.folder / "out-mla")
    cfg = ServeConfig(out_dir=folder, compare=folder, device="cpu", cache_dtype="int8")
    served = open_models(cfg)
    assert [one.name for one in served] == ["out-mla", "out-mla-2"]
    about = served[0].about
    assert about["cache_dtype"] == "int8" and about["dtype"] == "float32"
    # one float16 scale per token and head beside the numbers of one byte
    assert about["mha_bytes_per_token"] == 2 * (48 + 8 * 2)
