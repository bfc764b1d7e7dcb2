"""Checkpoints survive or fail with one line. Run: python -m pytest tests/test_checkpoint.py"""

import dataclasses
import math
import os
import pickle
import random
import resource
import zipfile

import pytest
import torch

from model import GPT
from nanomla import checkpoint
from nanomla.checkpoint import Checkpoint
from nanomla.errors import UserError
from tests.conftest import KINDS, TINY_MLA, save_model, tiny_config

SHARED = {**TINY_MLA, "mla_share_latent": True}
NANOGPT = {"n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout"}


def save(folder, seed=0, **settings):
    """Save a new model, as the best if its seed is 0."""
    torch.manual_seed(seed)
    model = GPT(tiny_config(**settings))
    save_model(folder, model, best=seed == 0, iter_num=seed, best_val_loss=1.5)
    return model


def same_weights(a, b):
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


VARIANTS = [
    {}, KINDS["MLA + SVD, by layer"], KINDS["latent tokens"], SHARED, {"tie_weights": False},
    {"bias": False, "dropout": 0.1},
    {"norm": "rmsnorm", "mlp": "swiglu"}, {"pos_emb": "rope", "rope_freqs": (1.0, 0.5, 0.1)},
]


@pytest.mark.parametrize("settings", VARIANTS)
def test_round_trip(tmp_path, settings):
    """
    What was saved comes back bit by bit, also under the names torch.compile and DDP give and with
    GPT-2's old mask. On disk are nanoGPT's seven settings and what differs from the defaults.
    """
    model = save(tmp_path, **settings)
    stored = checkpoint.load(tmp_path / "ckpt.pt")
    assert set(stored.model_args) >= NANOGPT
    if set(settings) <= NANOGPT:
        assert set(stored.model_args) == NANOGPT
    stored.model = {"_orig_mod.module." + k: v for k, v in stored.model.items()}
    stored.model["module.transformer.h.0.attn.bias"] = torch.ones(1, 1, 16, 16)
    twin, note = checkpoint.build(stored)
    assert note is None and twin.config == model.config and same_weights(model, twin)


def test_every_field_is_a_key_on_disk(tmp_path):
    """
    The file has nanoGPT's keys and ours, plain values only; each comes back as it was. All but
    weights and model_args may be missing, or be of a type that converts.
    """
    model = GPT(tiny_config())
    stored = Checkpoint(
        model.state_dict(),
        dataclasses.asdict(model.config),
        optimizer={"state": {}, "param_groups": []},
        scaler={"scale": 2.0},
        iter_num=7,
        best_val_loss=1.25,
        config={"dataset": "letters"},
        tokenizer={"kind": "char", "chars": "ab"},
        wandb_run_id="id",
        source="not written",
    )
    checkpoint.save(tmp_path, stored, best=False)
    keys = set(torch.load(tmp_path / "ckpt.pt", weights_only=True))
    nanogpt = {"model", "optimizer", "model_args", "iter_num", "best_val_loss", "config"}
    assert keys == nanogpt | {"scaler", "tokenizer", "wandb_run_id", "format"}
    again = checkpoint.load(tmp_path / "ckpt.pt")
    assert again.source == str(tmp_path / "ckpt.pt")
    for field in dataclasses.fields(Checkpoint):
        if field.name not in ("model", "model_args", "source"):
            assert getattr(again, field.name) == getattr(stored, field.name), field.name
    bare = {"model": stored.model, "model_args": {}, "best_val_loss": torch.tensor(2.0)}
    torch.save(bare, tmp_path / "ckpt.pt")
    again = checkpoint.load(tmp_path / "ckpt.pt")
    assert type(again.best_val_loss) is float and again.best_val_loss == 2.0
    assert (again.iter_num, again.config, again.optimizer) == (0, {}, None)
    for loss in (-math.inf, math.nan):  # no loss would be below it
        torch.save({**bare, "best_val_loss": loss}, tmp_path / "ckpt.pt")
        assert checkpoint.load(tmp_path / "ckpt.pt").best_val_loss == math.inf


@pytest.mark.parametrize("settings", [{"pos_emb": "rope"}, SHARED])
def test_a_built_model_owns_plain_weights(tmp_path, settings):
    """
    Its weights share no memory with the file's or with one another, except where they are tied;
    they are contiguous, in the default dtype and trainable. No random numbers are drawn.
    """
    save(tmp_path, **settings)
    stored = checkpoint.load(tmp_path / "ckpt.pt")
    name = "transformer.h.0.mlp.c_fc.weight"
    stored.model[name] = stored.model[name].half().t().contiguous().t()
    random_state = torch.get_rng_state()
    model, _ = checkpoint.build(stored)
    assert torch.equal(torch.get_rng_state(), random_state)
    read = {t.untyped_storage().data_ptr() for t in stored.model.values()}
    parameters = list(model.parameters())
    own = {p.untyped_storage().data_ptr() for p in parameters}
    assert len(own) == len(parameters) and not own & read
    assert all(p.dtype == torch.float32 and p.is_contiguous() for p in parameters)
    assert all(p.requires_grad and p.device.type == "cpu" for p in parameters)
    assert all(b.device.type == "cpu" for b in model.buffers())
    assert model.transformer.wte.weight is model.lm_head.weight
    if "mla_share_latent" in settings:
        first, second = (block.attn.kv_latent_proj for block in model.transformer.h)
        assert first.weight is second.weight and first.bias is second.bias


def test_best_and_latest_are_kept_apart(tmp_path):
    """
    A later save without best leaves best.pt as it was; find prefers what it is told to. A run that
    was killed between the two names left the file of best.pt under a third: it is not written to.
    """
    save(tmp_path, seed=0)
    os.link(tmp_path / "best.pt", tmp_path / f".ckpt.pt.nanomla-{os.getpid()}.tmp")
    save(tmp_path, seed=1)
    assert checkpoint.load(checkpoint.find(tmp_path)).iter_num == 1
    assert checkpoint.load(checkpoint.find(tmp_path, prefer_best=True)).iter_num == 0
    assert sorted(contents(tmp_path)) == ["best.pt", "ckpt.pt"]
    with pytest.raises(UserError, match="no checkpoint in"):
        checkpoint.find(tmp_path / "nowhere")


def test_a_full_disk_loses_nothing(tmp_path):
    """
    A write cut off by a file-size limit is a UserError; both old files stay whole and nothing is
    left beside them.
    """
    save(tmp_path)
    before = contents(tmp_path)
    stored = Checkpoint({"x": torch.zeros(200000)}, {})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(UserError, match="^no checkpoint written to .*: File too large$"):
            checkpoint.save(tmp_path, stored, best=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(tmp_path) == before


def test_damaged_files_are_one_clear_line(tmp_path):
    """
    Truncated at any length, a bit flipped anywhere in the tensors, random bytes, nothing, a folder:
    always a UserError naming the file. verify=False does not look at the tensors.
    """
    save(tmp_path)
    content = (tmp_path / "ckpt.pt").read_bytes()
    draw = random.Random(1)
    pieces = [b"", content[:1], content[:-1], draw.randbytes(10), draw.randbytes(5000)]
    for _ in range(5):
        pieces.append(content[: draw.randrange(2, len(content) - 1)])
    with zipfile.ZipFile(tmp_path / "ckpt.pt") as archive:
        largest = max(archive.infolist(), key=lambda member: member.file_size)
    for _ in range(5):
        place = largest.header_offset + 200 + draw.randrange(largest.file_size - 200)
        damaged = bytearray(content)
        damaged[place] ^= 1 << draw.randrange(8)
        pieces.append(bytes(damaged))
    bad = tmp_path / "bad.pt"
    for piece in pieces:
        bad.write_bytes(piece)
        with pytest.raises(UserError, match="bad.pt") as caught:
            checkpoint.load(bad)
        assert "\n" not in str(caught.value)
    assert "CRC" in str(caught.value) and checkpoint.load(bad, verify=False).iter_num == 0
    for path in (tmp_path, tmp_path / "none.pt"):
        with pytest.raises(UserError, match=path.name):
            checkpoint.load(path)


def test_a_pickle_that_would_run_code_does_not(tmp_path):
    """Refused, in torch's format and as a plain pickle."""

    class Hostile:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path}/ran",))

    torch.save({"model": Hostile(), "model_args": {}}, tmp_path / "zip.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps({"model": Hostile()}))
    for name in ("zip.pt", "plain.pt"):
        with pytest.raises(UserError, match=name):
            checkpoint.load(tmp_path / name)
    assert not (tmp_path / "ran").exists()


WIDE = 10**12
WPE = "transformer.wpe.weight"
WIDE_TENSOR = torch.zeros(1).expand(10**6, 10**6)
WRONG = [  # changes of the file's keys, of the settings, of the weights; what the error names
    ({"model": None}, {}, {}, "model=None"),
    ({"format": 99}, {}, {}, "format 99"),
    ({"iter_num": "seven"}, {}, {}, "iter_num='seven'"),
    ({"iter_num": -1}, {}, {}, "iter_num=-1"),
    ({}, {}, {"a": 1}, r"model=\{'a': 1.* does not work"),
    ({}, {"n_layer": 100_000}, {}, "n_layer=100000, but there are weights of 2 layers"),
    ({}, {"vocab_size": WIDE}, {}, str(WIDE)),
    ({}, {"pos_emb": "rope", "block_size": WIDE}, {}, str(WIDE)),
    ({}, {"bias": False}, {}, r"unknown \(first transformer.h.0.attn.c_attn.bias\)"),
    ({}, {"tie_weights": False, "mlp": "swiglu"}, {}, r"missing \(first "),
    ({}, {"n_head": 5}, {}, "n_head=5 does not work"),
    ({}, {"n_heads": 4}, {}, "does not know: n_heads"),
    ({}, {}, {WPE: WIDE_TENSOR}, "wpe.weight has shape"),
    ({}, {}, {WPE: torch.full((16, 24), torch.inf)}, "wpe.weight holds .* not finite"),
]


@pytest.mark.parametrize(("keys", "settings", "weights", "words"), WRONG)
def test_what_is_wrong_in_a_file_is_named(tmp_path, keys, settings, weights, words):
    """
    Other keys, types, sizes, names and shapes, in one line and little memory. Keys of a fork, and
    its settings that are off, are no error.
    """
    save(tmp_path)
    content = torch.load(tmp_path / "ckpt.pt", weights_only=True) | {"fork": [1]}
    content["model_args"] |= {"experts": 0, "window": None, "gate": "none"}
    torch.save(content, tmp_path / "ckpt.pt")
    checkpoint.build(checkpoint.load(tmp_path / "ckpt.pt"))
    content["model_args"] |= settings
    content["model"] |= weights
    content |= keys
    torch.save(content, tmp_path / "ckpt.pt")
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=f"ckpt.pt: .*{words}") as caught:
        checkpoint.build(checkpoint.load(tmp_path / "ckpt.pt"))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 100_000  # kB


def test_a_block_size_beyond_the_position_table_takes_no_memory():
    """Nothing of the size that a file asks for is made before it is compared with the weights."""
    model = GPT(tiny_config())
    assert model.rope_cos.numel() == 0
    args = {**dataclasses.asdict(model.config), "block_size": 10**15}
    stored = Checkpoint(model.state_dict(), args, source="a.pt")
    with pytest.raises(UserError, match=r"a.pt: transformer.wpe.weight has shape \(16, "):
        checkpoint.build(stored)
