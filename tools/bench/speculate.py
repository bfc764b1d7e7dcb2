"""What speculative decoding gains: what its passes take, and how many of its drafts are right."""

import time
from collections.abc import Callable

import torch

from model import GPT, GPTConfig
from nanomla import checkpoint
from nanomla.formats import open_weights
from nanomla.generate import Sampler, stream_tokens
from nanomla.speculate import OtherDraft, OwnDraft, Speculation
from nanomla.tokenizer import Tokenizer
from tools.bench.timing import Rows, Timed, alternate, fill, table

COUNTS = (1, 2, 3, 4, 7)  # drafts before a pass
LARGE = {  # 124M without weights that mean anything, of which only times are taken
    "bias": False, "pos_emb": "rope", "use_mla": True, "mla_rope": "latent", "mla_latent_dim": 192,
    "n_predict": 1,
}
TEMPERATURE = 0.8
SECONDS = 0.1  # of one round of what is timed


def measure(
    device: str, rounds: int, init_from: str | None, draft_from: str | None, tokens: int
) -> Rows:
    """Times of passes, and of texts if there are trained weights."""
    if init_from is None:
        model = GPT(GPTConfig(**LARGE)).to(device).eval()
        return passes(model, None, device, rounds)
    stored = open_weights(init_from, prefer_best=True)
    model, _ = checkpoint.build(stored, dropout=0.0)
    model.to(device).eval()
    draft = None
    if draft_from is not None:
        draft, _ = checkpoint.build(open_weights(draft_from, prefer_best=True), dropout=0.0)
        draft.to(device).eval()
    newline = Tokenizer(checkpoint.tokenizer_spec(stored)).encode("\n")
    prompt = torch.tensor([newline], device=device)
    rows = passes(model, draft, device, rounds)
    return rows + texts(model, draft, prompt, rounds, tokens)


@torch.inference_mode()
def passes(model: GPT, draft: GPT | None, device: str, rounds: int) -> Rows:
    """A step, a draft and passes of several tokens, behind half a context."""
    held = model.config.block_size // 2
    cache = model.make_cache(1, held + COUNTS[-1] + 1)
    fill(cache, held)
    idx = torch.randint(model.config.vocab_size, (1, cache.max_len), device=device)

    def check(count: int) -> None:
        model(idx[:, held : held + count + 1], cache=cache, all_logits=True)
        cache.truncate(held)

    if draft is None:
        drafter = OwnDraft(model, cache)
        drafter.hidden = torch.zeros(1, held, model.config.n_embd, device=device)
    else:
        drafter = OtherDraft(draft, cache, None)
    drafter.logits(idx[:, : held + 1])
    read = drafter.cache.pos

    def propose() -> None:
        drafter.logits(idx[:, : held + 2])
        drafter.cache.truncate(read)

    entries = [repeated("step", lambda: check(0)), repeated("draft", propose)]
    entries += [repeated(f"{count}", lambda count=count: check(count)) for count in COUNTS]
    took = alternate(entries, rounds, device)
    step = took["step"].seconds
    of_draft = took["draft"].seconds / step
    rows = []
    for count in COUNTS:
        of_pass = took[f"{count}"].seconds / step
        row = {"drafts": str(count), "pass / step": f"{of_pass:.2f}"}
        row["draft / step"] = f"{of_draft:.2f}"
        row["right drafts that repay a pass"] = f"{of_pass + count * of_draft - 1:.2f}"
        rows.append(row)
    millions = model.get_num_params() / 1e6
    return table(f"{millions:.0f}M parameters: a step takes {step * 1e3:.2f} ms", rows)


def repeated(name: str, run: Callable[[], None]) -> Timed:
    """
    So many repetitions that they take about as long as those of any other: what other processes
    take of a busy machine then stretches all alike.
    """
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    steps = max(1, round(SECONDS / min(seconds)))

    def repeat() -> None:
        for _ in range(steps):
            run()

    return Timed(name, repeat, steps=steps)


def texts(model: GPT, draft: GPT | None, prompt: torch.Tensor, rounds: int, tokens: int) -> Rows:
    """Texts that are drawn with drafts and without, at two temperatures."""
    tokens = min(tokens, model.config.block_size - 1)
    rows = []
    for temperature in (0, TEMPERATURE):
        generator = torch.Generator(prompt.device).manual_seed(1337)
        sampler = Sampler(temperature, generator=generator)
        plain = lambda sampler=sampler: list(stream_tokens(model, prompt, tokens, sampler))
        entries = [Timed("0", plain, steps=tokens)]
        speculations = [Speculation(model, count, draft) for count in COUNTS]
        for one in speculations:
            run = lambda one=one, sampler=sampler: list(one.stream(prompt, tokens, sampler))
            entries.append(Timed(f"{one.count}", run, steps=tokens))
        alternate(entries, rounds, prompt.device.type)
        for entry, one in zip(entries, [None, *speculations], strict=True):
            row = {"temperature": str(temperature), "drafts": entry.name}
            row["tokens/s"] = f"{1 / entry.seconds:.0f}"
            row["x without"] = f"{entries[0].seconds / entry.seconds:.2f}"
            if one is not None:
                row["accepted"] = f"{one.accepted / one.drafted:.0%}"
                row["right drafts a pass"] = f"{one.accepted / one.drafted * one.count:.2f}"
            rows.append(row)
    return table(f"Texts of {tokens} tokens", rows)
