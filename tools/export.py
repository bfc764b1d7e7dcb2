"""
Write a trained model as a folder of safetensors.

    python -m tools.export --out_dir=out-mla --to=exported
    python sample.py --init_from=exported

A model with ordinary attention and learned positions becomes a Hugging Face GPT-2, which
transformers loads. Any other model keeps its own names and settings, with "model_type": "nanomla".
Both kinds of folder can be given to --init_from.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from nanomla import checkpoint, formats
from nanomla.settings import UsageError, UserError, check, configure, run_script


@dataclass
class ExportConfig:
    """What to read and where to write."""

    out_dir: Annotated[
        str, "#export", "the run's folder; its best.pt, else its ckpt.pt is read"
    ] = "out"
    ckpt: Annotated[str | None, "#export", "a checkpoint file instead"] = None
    to: Annotated[
        str | None, "#export", "the folder to write: a new one, an empty one, or an earlier export"
    ] = None

    def __post_init__(self) -> None:
        check(self)


def main(argv: list[str] | None = None) -> None:
    """Export one checkpoint."""
    cfg, _ = configure(ExportConfig, sys.argv[1:] if argv is None else argv)
    if not cfg.to:
        raise UsageError("say where the export shall go: --to=FOLDER")
    target = Path(cfg.to)
    formats.check_target(target)
    stored = checkpoint.load(cfg.ckpt or checkpoint.find(cfg.out_dir, prefer_best=True))
    model, _ = checkpoint.build(stored)
    try:
        spec = checkpoint.tokenizer_spec(stored)
    except UserError as error:
        spec = None
        print(f"warning: exported without a tokenizer: {error}", file=sys.stderr)
    convert = formats.as_gpt2 if formats.fits_gpt2(model.config) else formats.as_nanomla
    settings, tensors = convert(model)
    kind = settings["model_type"]
    texts = {formats.CONFIG: formats.as_json(settings)}
    if spec:
        texts[formats.TOKENIZER] = formats.as_json(spec)
    if kind == "gpt2" and spec == {"kind": "tiktoken", "name": "gpt2"}:
        try:
            texts |= formats.gpt2_tokenizer()
        except UserError as error:
            files = f"{formats.VOCAB} and {formats.MERGES}, for transformers"
            print(f"warning: exported without {files}: {error}", file=sys.stderr)
    formats.write_folder(target, tensors, texts)
    size = sum(tensor.nbytes for tensor in tensors.values())
    print(f"{stored.source} as {kind}: {size / 1e6:,.1f} MB in {target}")


if __name__ == "__main__":
    run_script(main)
