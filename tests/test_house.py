"""Who imports whom, and which names must stay. Run: python -m pytest tests/test_house.py"""

import ast
import graphlib
import tomllib
from pathlib import Path

from model import ATTENTION, GPT
from tests.conftest import ROOT, tiny_config

FLOORS = [  # bottom to top; what model.py stands on knows no model
    "nanomla.kernels nanomla.checks nanomla.errors nanomla.signals",
    "nanomla.attention nanomla.cache nanomla.latent_tokens nanomla.memory "
    + "nanomla.generate nanomla.speculate",
    "model",
    "nanomla",
    "train sample",
    "tools data experiments",
]


def modules() -> dict[str, Path]:
    """Every module of the project by its dotted name, without tests and configs."""
    files = [*ROOT.glob("*.py")]
    for folder in ("nanomla", "tools", "data", "experiments"):
        files += (ROOT / folder).glob("**/*.py")
    names = {}
    for path in files:
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        names[name.removesuffix(".__init__")] = path
    return names


def floor(name: str) -> int:
    """The floor a module is on."""
    for i, prefixes in enumerate(FLOORS):
        if any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes.split()):
            return i
    raise AssertionError(f"{name} is on no floor")


def imports(tree: ast.AST, inside_functions: bool) -> set[str]:
    """The project's modules that a file imports, at module level or anywhere."""
    imported = set()
    nodes = [tree]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        if inside_functions or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            nodes += ast.iter_child_nodes(node)
    return imported & set(MODULES)


MODULES = modules()
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}


def test_nothing_imports_upward():
    """
    kernels <- caches, attention <- model <- nanomla <- train, sample <- tools, in functions too,
    but for model.py's: there GPT.from_pretrained, and no other, imports what opens weights.
    """
    for name, tree in TREES.items():
        for target in imports(tree, inside_functions=name != "model"):
            assert floor(target) <= floor(name), f"{name} imports {target}, which is above it"
    for function in ast.walk(TREES["model"]):
        if isinstance(function, ast.FunctionDef) and function.name != "from_pretrained":
            assert not imports(function, inside_functions=True), function.name


def test_nothing_imports_in_a_circle():
    """The modules can be ordered so that each is below all that import it."""
    graph = {name: imports(tree, False) - {name} for name, tree in TREES.items()}
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(MODULES) > 20


def test_only_the_table_names_an_attention():
    """What else there is asks the class, so that a new one needs no other line."""
    for block in ATTENTION.values():
        naming = {name for name, path in MODULES.items() if block.__name__ in path.read_text()}
        assert naming <= {"model", "nanomla.latent_tokens"}, block.__name__


def test_state_dict_names_and_order_stay():
    """Old checkpoints rely on the names, and optimizer states on the order."""

    def names(**settings):
        model = GPT(tiny_config(n_layer=1, bias=False, **settings))
        attention = "transformer.h.0.attn."
        every = [name.removesuffix(".weight") for name, _ in model.named_parameters()]
        return [name.removeprefix(attention) for name in every if name.startswith(attention)]

    assert names() == ["c_attn", "c_proj"]
    assert names(use_svd=True) == ["v_up", "c_attn", "c_proj", "v_down"]
    mla = {"use_mla": True, "mla_latent_dim": 7}
    latent = ["kv_latent_proj", "latent_norm", "k_expand"]
    assert names(**mla) == ["c_proj", "q_proj", *latent, "v_expand"]
    low_rank = ["q_latent_proj", "q_latent_norm", "q_expand"]
    got = names(**mla, use_svd=True, mla_q_latent_dim=5)
    assert got == ["v_up", "c_proj", "v_down", *low_rank, *latent]


def test_installed_modules_are_those_of_the_project():
    """pyproject names every package and module that an install has to bring."""
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = {str(p.parent.relative_to(ROOT)).replace("/", ".") for p in MODULES.values()} - {"."}
    assert set(setup["packages"]) == {p for p in packages if not p.startswith("data")}
    assert set(setup["py-modules"]) == {n for n in MODULES if "." not in n} - set(setup["packages"])
