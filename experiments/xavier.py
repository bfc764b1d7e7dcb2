"""
Claim: Xavier initialisation is better than GPT-2's for MLA. (No source found.)

Finding: at this scale, with Muon, it is worse: a validation loss of 2.1021, beside 2.0066 with
normal weights of standard deviation 0.02. (The works of Shakespeare, 2 layers, 128 wide, 300
iterations, the best of three learning rates, one seed.)

    python -m experiments.xavier
"""

from torch import nn

from experiments.training import MLA, compare, start
from model import GPT, GPTConfig
from nanomla.errors import run_script


def xavier_gpt(config: GPTConfig) -> GPT:
    """A GPT whose blocks' matrices have variance 2 / (rows + columns) (Glorot and Bengio, 2010)."""
    model = GPT(config)
    for module in model.transformer.h.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_normal_(module.weight)
    return model


def main(argv: list[str] | None = None) -> None:
    """The command line; see the top of this file."""
    cfg, data, vocab_size = start(__name__, argv)
    config = GPTConfig(vocab_size=vocab_size, **MLA)
    compare({"MLA, 0.02": (config, GPT), "MLA, Xavier": (config, xavier_gpt)}, cfg, data)


if __name__ == "__main__":
    run_script(main)
