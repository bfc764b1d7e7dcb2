"""
The page of tools.serve in a real browser: what a person does on it, with two trained models.
Run: make test-browser
"""

import os
import re
import shutil

import pytest
import torch

from tests.conftest import QUICK, TINY_MLA, make, run, save_model
from tools.bench.serve import server

playwright = pytest.importorskip(
    "playwright.sync_api", reason="needs playwright: make test-browser installs it"
)
expect = playwright.expect
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = os.environ.get("BROWSER_PATH") or next(filter(None, map(shutil.which, NAMES)), None)
REFUSED = "Failed to load resource: the server responded with a status of 400"  # Chromium's note
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        BROWSER is None,
        reason="needs Chromium: apt install chromium, or BROWSER_PATH=/path/to/chrome",
    ),
]


@pytest.fixture(scope="module")
def runs(dataset, tmp_path_factory):
    """Two small runs, MLA and MHA, with logs."""
    folder = tmp_path_factory.mktemp("runs")
    shape = ["--n_embd=32", "--n_head=4", "--block_size=32", f"--dataset={dataset}"]
    mla = ["--use_mla=True", "--mla_latent_dim=8", "--pos_emb=rope", "--mla_rope_dim=4"]
    for name, flags in (("out-mla", mla), ("out-mha", ["--n_layer=1", "--n_head=2"])):
        how = [*QUICK, *shape, *flags, "--max_iters=40", f"--out_dir={folder / name}"]
        assert run("train.py", *how).returncode == 0
    return folder


@pytest.fixture(scope="module")
def address(runs):
    with server(runs / "out-mla", f"--compare={runs / 'out-mha'}") as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture
def page(browser, address):
    """The page, in a context of its own. A warning or an error in the console fails the test."""
    context = browser.new_context(viewport={"width": 1200, "height": 900})
    page, said, elsewhere = context.new_page(), [], []
    page.on("console", lambda message: said.append((message.type, message.text)))
    page.on("pageerror", lambda error: said.append(("error", str(error))))
    page.on("request", lambda request: elsewhere.append(request.url))
    page.goto(f"http://{address}/")
    page.get_by_label("Prompt").fill("to be")
    yield page
    wrong = [text for kind, text in said if kind in ("error", "warning")]
    assert not [text for text in wrong if not text.startswith(REFUSED)]
    assert all(url.startswith(f"http://{address}/") for url in elsewhere)
    context.close()


def write(page, tokens):
    page.get_by_label("Length").fill(str(tokens))
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#status")).to_contain_text("Done", timeout=60_000)


def test_a_text_streams_in_and_stops(page):
    """Tokens arrive one after another, shaded by probability; Stop keeps what is there."""
    page.get_by_label("Length").fill("4000")
    page.get_by_label("Prompt").press("Control+Enter")
    column = page.locator("article").first
    seen = []
    for _ in range(3):
        expect(column.locator(".token")).not_to_have_count(seen[-1] if seen else 0)
        seen.append(column.locator(".token").count())
    assert 0 < seen[0] < seen[1] < seen[2] < 4000
    expect(page.get_by_role("button", name="Generate")).to_have_attribute("aria-disabled", "true")
    page.keyboard.press("Escape")
    expect(page.locator("#status")).to_contain_text("Stopped")
    kept = column.locator(".token").count()
    assert seen[2] <= kept < 4000
    assert column.locator(".text").inner_text().startswith("to be")
    shades = {column.locator(f".shade-{i}").count() > 0 for i in range(5)}
    assert True in shades
    page.get_by_label("Length").fill("5")
    page.get_by_role("button", name="Continue").click()
    expect(page.locator("#status")).to_contain_text("Done")
    assert column.locator(".token").count() == kept + 5


def test_a_click_goes_on_from_another_token(page):
    """The alternatives of a token with their probabilities; a choice rewinds the cache."""
    write(page, 20)
    column = page.locator("article").first
    before = column.locator(".text").inner_text()
    column.locator(".token").nth(12).click()
    options = page.get_by_role("option")
    expect(options).to_have_count(8)
    texts = options.locator(".share").all_inner_texts()
    shares = [float(text.rstrip(" %")) for text in texts if not text.startswith("<")]
    assert shares == sorted(shares, reverse=True) and 0 < shares[0] <= 100
    page.keyboard.press("Escape")
    expect(options).to_have_count(0)
    column.locator(".token").nth(12).press("Enter")
    other = page.locator("[role=option][aria-selected=false]").first
    other.focus()
    page.keyboard.press("Enter")
    expect(page.locator("#status")).to_contain_text("Done")
    note = column.locator(".note")
    expect(note).to_have_text("cache rewound: 1 of 18 tokens recomputed")
    after = column.locator(".text").inner_text()
    assert after[:17] == before[:17] and after[17] != before[17]
    assert column.locator(".token").count() == 13 + 20


def press(page, name, tokens):
    """Press a button and wait for so many more tokens."""
    page.get_by_label("Length").fill(str(tokens))
    page.get_by_role("button", name=name).click()
    expect(page.locator("#status")).to_contain_text("Done", timeout=60_000)


def choose_another(page, place):
    """Go on from a token with the likeliest that does not stand there."""
    page.locator("article").first.locator(".token").nth(place).click()
    page.locator("[role=option][aria-selected=false]").first.click()
    expect(page.locator("#status")).to_contain_text("Done", timeout=60_000)


def test_a_text_that_was_cut_goes_on_as_if_it_had_not_been(page):
    """After its length and after Stop, past the context, and after another text took the cache."""
    texts = page.locator("article .text")
    write(page, 90)
    whole = texts.all_inner_texts()
    write(page, 20)
    for more in (7, 30, 33):
        press(page, "Continue", more)
    assert texts.all_inner_texts() == whole
    page.get_by_label("Length").fill("4000")
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("article .token").nth(40)).to_be_attached()
    page.keyboard.press("Escape")
    expect(page.locator("#status")).to_contain_text("Stopped")
    press(page, "Continue", 50)
    first = texts.first.text_content()
    write(page, len(first) - len("to be"))
    assert texts.first.text_content() == first


def test_every_branch_has_numbers_of_its_own(page):
    """The same again for the same choice; it goes on as if it had not been cut."""
    asked = []
    page.on("request", lambda request: asked.append(request.post_data_json))
    text = page.locator("article .text").first

    def branch(place, tokens):
        write(page, 30)
        page.get_by_label("Length").fill(str(tokens))
        choose_another(page, place)
        return text.text_content()

    whole = branch(12, 40)
    assert branch(12, 15) == whole[:-25]
    press(page, "Continue", 25)
    assert text.text_content() == whole
    other = branch(14, 40)
    choose_another(page, 20)
    own = [body for body in asked if body and body["model"] == "out-mla"]
    branches = [body for body in own if body["seed"] != 1337]
    seeds = [body["seed"] for body in branches]
    assert seeds[0] == seeds[1] == seeds[2] and len(set(seeds)) == 3
    assert [body["tokens_drawn"] for body in branches] == [0, 0, 15, 0, 0]
    assert text.text_content()[:25] == other[:25] != text.text_content()[25:] != other[25:]


def test_characters_of_several_tokens(browser, tmp_path):
    """A text of bytes that is made token by token is the text that is made at once; a byte that is
    chosen instead of another makes another character."""
    settings = {**TINY_MLA, "vocab_size": 256, "block_size": 32}
    torch.manual_seed(1)
    save_model(tmp_path, make(settings), tokenizer={"kind": "byte"}, config={"dataset": "x"})
    with server(tmp_path) as other:
        context = browser.new_context()
        page = context.new_page()
        page.goto(f"http://{other}/")
        page.get_by_label("Prompt").fill("é")
        page.get_by_label("Temperature").fill("1.5")
        text = page.locator("article .text")
        write(page, 40)
        whole = text.text_content()
        write(page, 1)
        for i in range(1, 40):
            press(page, "Continue", 1)
            expect(page.locator(".rate")).to_contain_text("1 token")
        assert text.text_content() == whole and "\ufffd" in whole
        page.get_by_label("Length").fill("3")
        for place in (12, 9, 5):
            choose_another(page, place)
            shown = text.text_content()
            page.get_by_role("tab", name="Attention").click()
            with page.expect_request("**/api/attention") as asked:
                page.get_by_role("button", name="Show").click()
            ids = asked.value.post_data_json["tokens"]
            assert shown == bytes(ids).decode("utf-8", "replace")
            page.get_by_role("tab", name="Write").click()
        context.close()


def test_two_models_side_by_side(page):
    """One prompt and seed: two texts with rates, the same again; bytes of both caches and MHA's."""
    write(page, 60)
    columns = page.locator("article")
    expect(columns).to_have_count(2)
    texts = columns.locator(".text").all_inner_texts()
    assert texts[0] != texts[1] and all(len(text) >= 60 for text in texts)
    for rate in columns.locator(".rate").all_inner_texts():
        assert re.fullmatch(r"60 tokens, [\d,.]+ tokens/s", rate)
    table = page.locator("#cache-table").inner_text()
    numbers = re.search(r"token and layer\s+(\d+)\s+(\d+)\s+(\d+)", table)
    assert numbers.groups() == ("12", "64", "64")
    assert page.locator("#cache-chart path, #cache-chart polyline").count() >= 3
    expect(page.locator("#cache-caption")).to_contain_text("outgrew the context")
    write(page, 60)
    assert columns.locator(".text").all_inner_texts() == texts
    for viewport in ({"width": 390, "height": 844}, {"width": 360, "height": 640}):
        page.set_viewport_size(viewport)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_attention_and_the_run(page, runs):
    """The heat map of a text, by keyboard; the loss curve, and settings that can be filtered."""
    write(page, 10)
    page.get_by_role("tab", name="Write").press("ArrowRight")
    expect(page.get_by_role("tab", name="Attention")).to_have_attribute("aria-selected", "true")
    page.get_by_role("button", name="Show").click()
    expect(page.locator("#attention-top li").first).to_be_visible()
    shares = page.locator("#attention-top li").all_inner_texts()
    assert len(shares) == 5 and all("%" in share for share in shares)
    colours = page.evaluate(
        "() => { const c = document.getElementById('attention-canvas');"
        " const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
        " return new Set(Array.from({length: d.length / 4}, (_, i) => d[4 * i])).size; }"
    )
    assert colours > 10
    page.get_by_role("tab", name="Run").click()
    expect(page.locator("#run-status")).to_contain_text("val loss")
    page.get_by_label("Filter").fill("mla_latent")
    expect(page.locator("#settings-table tbody tr:visible")).to_have_count(1)
    log = runs / "out-mla" / "log.jsonl"
    with open(log, "a", encoding="utf-8") as file:
        file.write('{"iter": 99999, "loss": 1.25}\n')
    expect(page.locator("#run-status")).to_contain_text("99,999", timeout=15_000)


def held(page, path):
    """The requests to a path, which the browser sends when they are told to continue_()."""
    routes = []
    page.route(f"**/{path}*", lambda route: routes.append(route))
    return routes


def wait_for(page, routes, count):
    for _ in range(100):
        if len(routes) == count:
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"{len(routes)} requests, not {count}")


def test_the_picture_is_of_what_the_fields_say(page):
    """Another layer, model or text: drawn anew or taken away, in whatever order answers come."""
    write(page, 10)
    page.get_by_role("tab", name="Attention").click()
    status = page.locator("#attention-status")
    picture = page.locator("#attention-picture")
    layer = page.get_by_label("Layer")
    layer.select_option(label="2")
    expect(picture).to_be_hidden()  # not asked for yet
    page.get_by_role("button", name="Show").click()
    expect(status).to_have_text("out-mla, layer 2: 15 tokens.")
    first = page.locator("#attention-top").inner_text()
    requests = held(page, "api/attention")
    layer.select_option(label="1")
    expect(picture).to_be_hidden()
    layer.select_option(label="2")
    layer.select_option(label="1")
    wait_for(page, requests, 3)
    for i in (2, 0, 1):
        requests[i].continue_()
        page.wait_for_timeout(200)
    expect(status).to_have_text("out-mla, layer 1: 15 tokens.")
    expect(picture).to_be_visible()
    assert page.locator("#attention-top").inner_text() != first
    page.unroute("**/api/attention*")

    layer.select_option(label="2")
    page.get_by_label("Head").select_option(label="4")
    expect(status).to_have_text("out-mla, layer 2: 15 tokens.")
    page.get_by_label("Model").first.select_option("out-mha")  # of one layer and two heads
    expect(status).to_have_text("out-mha, layer 1: 15 tokens.")
    assert layer.input_value() == "0" and page.get_by_label("Head").input_value() == "mean"

    requests = held(page, "api/attention")
    page.get_by_role("button", name="Show").click()
    wait_for(page, requests, 1)
    page.get_by_role("tab", name="Write").click()
    write(page, 5)
    requests[0].continue_()
    page.get_by_role("tab", name="Attention").click()
    page.wait_for_timeout(200)
    expect(picture).to_be_hidden()
    expect(status).to_have_text("")


def test_the_picture_of_a_prompt_that_changes(page):
    """Without a text the picture is of the prompt, and it goes with it."""
    page.get_by_role("tab", name="Attention").click()
    page.get_by_role("button", name="Show").click()
    expect(page.locator("#attention-status")).to_have_text("out-mla, layer 1: 5 tokens.")
    page.get_by_role("tab", name="Write").click()
    page.get_by_label("Prompt").fill("to be or")
    page.get_by_role("tab", name="Attention").click()
    expect(page.locator("#attention-picture")).to_be_hidden()


def test_alternatives_of_a_text_that_goes(page):
    """Their list is closed when another text begins, as a choice would go into that one."""
    write(page, 10)
    requests = held(page, "v1/completions")
    page.get_by_role("button", name="Generate").click()
    wait_for(page, requests, 2)
    page.locator("article").first.locator(".token").nth(5).click()
    expect(page.locator("#alternatives")).to_be_visible()
    for request in requests:
        request.continue_()
    expect(page.locator("#status")).to_contain_text("Done")
    expect(page.locator("#alternatives")).to_be_hidden()


def test_a_log_that_begins_anew_unseen(page, runs):
    """No line of the earlier log stays; while another model's is read, no status of the first."""
    log = runs / "out-mha" / "log.jsonl"
    before = log.read_text()
    lines = [f'{{"iter": {i}, "loss": 1000}}\n' for i in range(5)]
    log.write_text("".join(lines))
    page.get_by_role("tab", name="Run").click()
    page.locator("#run-model").select_option("out-mha")
    expect(page.locator("#run-chart")).to_contain_text("1,000")
    page.get_by_role("tab", name="Write").click()
    log.write_text("".join(lines).replace("1000", "2.5") + '{"iter": 5, "loss": 2.25}\n')
    page.get_by_role("tab", name="Run").click()
    expect(page.locator("#run-status")).to_contain_text("2.25")
    expect(page.locator("#run-chart")).not_to_contain_text("1,000")
    held(page, "api/log")
    page.locator("#run-model").select_option("out-mla")
    expect(page.locator("#run-status")).to_have_text("")
    log.write_text(before)


def test_errors_are_read_in_the_page(page, browser, runs):
    """A prompt that is too long, a character that is not known, and a server that has gone."""
    for prompt, words in (("to be or not to be, that is the question", "context"), ("Z", "'Z'")):
        page.get_by_label("Prompt").fill(prompt)
        page.get_by_role("button", name="Generate").click()
        expect(page.get_by_role("alert")).to_contain_text(words)
    with server(runs / "out-mla", "--token=secret") as other:
        context = browser.new_context()
        locked = context.new_page()
        locked.goto(f"http://{other}/")
        for given in ("wrong", "wrong too"):
            locked.get_by_label("The server wants its token").fill(given.replace(" ", "-"))
            locked.get_by_role("button", name="Use it").click()
            expect(locked.locator("#token-wrong")).to_be_visible()
        locked.goto(f"http://{other}/#token=secret")
        expect(locked).to_have_url(f"http://{other}/")
        locked.get_by_label("Prompt").fill("to be")
        write(locked, 5)
        locked.goto(f"http://{other}/")
        expect(locked.locator("article")).to_be_visible()
    locked.get_by_role("button", name="Generate").click()
    expect(locked.get_by_role("alert")).to_contain_text("does not answer")
    assert locked.get_by_label("Prompt").input_value() == "to be"
    context.close()
