"""
Write a trained model as a folder of safetensors.

    python export.py --out_dir=out-mla --to=exported
    python sample.py --init_from=exported

A model with ordinary attention and learned positions becomes a Hugging Face GPT-2, which transformers loads; any other
keeps its own names and settings, "model_type": "nanomla". Both can be given to --init_from here.
"""

import dataclasses
import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

import checkpoint as ckpt
from configurator import UsageError, UserError, configure, run_script
from model import GPT, GPTConfig

VOCAB, MERGES = "vocab.json", "merges.txt"  # GPT-2's tokenizer, as transformers reads it
FILES = {ckpt.CONFIG, ckpt.WEIGHTS, ckpt.TOKENIZER, VOCAB, MERGES}


@dataclass
class ExportConfig:
    """What to read and where to write."""

    out_dir: Annotated[str, "the run's folder; its best.pt, else its ckpt.pt is read"] = "out"
    ckpt: Annotated[str | None, "a checkpoint file instead"] = None
    to: Annotated[str | None, "the folder to write: a new one, an empty one, or an earlier export"] = None


def main(argv: list[str] | None = None) -> None:
    cfg, _ = configure(ExportConfig, sys.argv[1:] if argv is None else argv)
    if not cfg.to:
        raise UsageError("say where the export shall go: --to=FOLDER")
    target = Path(cfg.to)
    check_target(target)
    source = Path(cfg.ckpt) if cfg.ckpt else ckpt.find(cfg.out_dir, prefer_best=True)
    held = ckpt.load(source)
    model, _ = ckpt.build_model(held, source)
    try:
        spec = ckpt.tokenizer_spec(held, source)
    except UserError as error:
        spec = None
        print(f"warning: exported without a tokenizer: {error}", file=sys.stderr)
    settings, tensors = (gpt2_export if is_gpt2(model.config) else own_export)(model)
    texts = {ckpt.CONFIG: as_json(settings)}
    if spec:
        texts[ckpt.TOKENIZER] = as_json(spec)
    if settings["model_type"] == "gpt2" and spec == {"kind": "tiktoken", "name": "gpt2"}:
        try:
            texts |= gpt2_tokenizer()
        except UserError as error:
            print(f"warning: exported without {VOCAB} and {MERGES}, for transformers: {error}", file=sys.stderr)
    write_folder(target, tensors, texts)
    total = sum(t.nbytes for t in tensors.values())
    print(f"{source} as {settings['model_type']}: {total / 1e6:,.1f} MB in {target}")


def is_gpt2(config: GPTConfig) -> bool:
    """Whether this is the model that transformers calls GPT-2."""
    return config.pos_emb == "learned" and not config.use_mla and not config.use_svd


def own_export(model: GPT) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and the weights under their own names, tied ones once."""
    tensors = {name: p.detach().contiguous() for name, p in model.named_parameters()}
    return {"model_type": "nanomla", **ckpt.MARK, **dataclasses.asdict(model.config)}, tensors


def gpt2_export(model: GPT) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and weights of transformers' GPT2LMHeadModel; it always has biases, so a model without gets zeros."""
    config, tensors = model.config, {}
    for name, p in model.named_parameters():
        p = p.detach()
        tensors[name] = (p.t() if name.endswith(ckpt.CONV1D) else p).contiguous()
        if not config.bias and ".wte." not in name and ".wpe." not in name:
            tensors[name.replace(".weight", ".bias")] = torch.zeros(p.size(0), dtype=p.dtype)
    end = 50256 if config.vocab_size > 50256 else None
    names = {ours: theirs for theirs, ours in reversed(ckpt.GELUS.items())}
    settings = {
        "model_type": "gpt2",
        **ckpt.MARK,
        "architectures": ["GPT2LMHeadModel"],
        "activation_function": names[config.gelu],
        "n_positions": config.block_size,
        **{name: getattr(config, name) for name in ("vocab_size", "n_layer", "n_head", "n_embd")},
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), config.dropout),
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        **dict.fromkeys(("bos_token_id", "eos_token_id"), end),
    }
    return settings, tensors


def gpt2_tokenizer() -> dict[str, str]:
    """
    vocab.json and merges.txt of GPT-2's tokenizer. The merge that makes a token joins the two pieces that the merges of
    lower rank leave of it, so the ranks say all of it.
    """
    from data.bpe import load_encoding

    encoding = load_encoding("gpt2")
    pieces = [encoding.decode_single_token_bytes(i) for i in range(encoding.eot_token)]
    rank = {piece: i for i, piece in enumerate(pieces)}
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that stand for themselves in these files
    letters = {b: chr(b) for b in plain}
    letters |= {b: chr(256 + n) for n, b in enumerate(b for b in range(256) if b not in letters)}

    def spell(piece: bytes) -> str:
        return "".join(letters[b] for b in piece)

    lines = ["#version: 0.2"]
    for piece in pieces[256:]:
        parts = [piece[i : i + 1] for i in range(len(piece))]
        while len(parts) > 2:
            at = min(range(len(parts) - 1), key=lambda i: rank.get(parts[i] + parts[i + 1], len(rank)))
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        lines.append(" ".join(map(spell, parts)))
    vocabulary = {spell(piece): i for i, piece in enumerate(pieces)} | {"<|endoftext|>": encoding.eot_token}
    return {VOCAB: json.dumps(vocabulary), MERGES: "\n".join(lines) + "\n"}


def as_json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2) + "\n"


def check_target(folder: Path) -> None:
    """Raises UserError if `folder` holds anything but an earlier export, which alone is replaced."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"--to={folder} is a file; name a folder")
    names = {path.name for path in folder.iterdir()}
    try:
        settings = json.loads((folder / ckpt.CONFIG).read_text(encoding="utf-8")) if names else ckpt.MARK
    except (OSError, ValueError):
        settings = None
    if not isinstance(settings, dict) or not settings.items() >= ckpt.MARK.items() or names - FILES:
        raise UserError(f"--to={folder} holds other files than an export's; name a new or an empty folder")


def write_folder(folder: Path, tensors: dict[str, Tensor], texts: dict[str, str]) -> None:
    """
    The weights and texts as a folder: whole or not at all, in place of an earlier export.

    Raises UserError, with nothing changed, if it cannot be written.
    """
    try:
        from safetensors import SafetensorError
        from safetensors.torch import save_file
    except ImportError:
        raise UserError("exporting needs safetensors: pip install safetensors") from None
    folder = folder.resolve()
    aside, old = (folder.with_name(f".{folder.name}.{what}-{os.getpid()}") for what in ("new", "old"))
    try:
        aside.mkdir(parents=True)
        for name, text in texts.items():
            (aside / name).write_text(text, encoding="utf-8")
        save_file(tensors, aside / ckpt.WEIGHTS, metadata={"format": "pt"})  # which transformers asks for
        for path in aside.iterdir():
            path.chmod((aside / ckpt.CONFIG).stat().st_mode)  # safetensors makes its file readable by the owner alone
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        if folder.exists():
            folder.rename(old)
        aside.rename(folder)
    except (OSError, SafetensorError) as error:
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise UserError(f"nothing exported to {folder}: {error}") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


if __name__ == "__main__":
    run_script(main)
