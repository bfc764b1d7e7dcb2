"""Who imports whom, and what things are called. Run: python -m pytest tests/test_house.py"""

import ast
import graphlib
import inspect
import tomllib
from pathlib import Path

from model import ATTENTION, GPT
from nanomla.attention import Attention
from tests.conftest import ROOT, TINY_MLA, tiny_config

FLOORS = [  # bottom to top; what model.py stands on knows no model
    "nanomla.kernels nanomla.checks nanomla.errors nanomla.signals",
    "nanomla.attention nanomla.cache nanomla.generate nanomla.latent_tokens nanomla.memory",
    "model",
    "nanomla",
    "train sample",
    "tools data experiments",
]


def modules() -> dict[str, Path]:
    """Every module of the project by its dotted name, without tests and configs."""
    folders = [ROOT / f for f in ("nanomla", "tools", "data", "experiments")]
    files = [*ROOT.glob("*.py"), *(path for folder in folders for path in folder.glob("**/*.py"))]
    names = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in files}
    return {name.removesuffix(".__init__"): path for name, path in names.items()}


def floor(name: str) -> int:
    """The floor a module is on."""
    for i, prefixes in enumerate(FLOORS):
        if any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes.split()):
            return i
    raise AssertionError(f"{name} is on no floor")


def imports(tree: ast.AST, known: set[str], inside_functions: bool) -> set[str]:
    """The project's modules that a file imports, at module level or anywhere."""
    found = set()
    nodes = [tree]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        if inside_functions or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            nodes += ast.iter_child_nodes(node)
    return found & known


MODULES = modules()
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}


def test_nothing_imports_upward():
    """
    kernels <- caches, attention <- model <- nanomla <- train, sample <- tools, in functions too,
    but for one import: that of what opens weights, in GPT.from_pretrained.
    """
    for name, tree in TREES.items():
        for target in imports(tree, set(MODULES), inside_functions=name != "model"):
            assert floor(target) <= floor(name), f"{name} imports {target}, which is above it"


def test_model_imports_in_one_function():
    """What model.py needs from above, it needs in from_pretrained alone."""
    lazily = []
    for function in ast.walk(TREES["model"]):
        if isinstance(function, ast.FunctionDef):
            for node in ast.walk(function):
                if isinstance(node, ast.Import | ast.ImportFrom):
                    lazily.append(function.name)
    assert set(lazily) == {"from_pretrained"}


def test_nothing_imports_in_a_circle():
    """The modules can be ordered so that each is below all that import it."""
    graph = {n: imports(t, set(MODULES), False) - {n} for n, t in TREES.items()}
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(MODULES) > 20


def test_public_functions_have_type_hints():
    """Every argument and result of a public function outside tests is annotated, but those of a
    GPU's code, whose types Triton finds."""
    for name, tree in TREES.items():
        for node in tree.body:
            if "id='triton'" in "".join(map(ast.dump, getattr(node, "decorator_list", ()))):
                continue
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                args = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
                missing = [arg.arg for arg in args if arg.annotation is None]
                assert not missing and node.returns, f"{node.name} in {name}: {missing}"


def test_one_table_decides_the_attention():
    """Every entry is an attention that defines what it must; nothing else names the class."""
    for key, block in ATTENTION.items():
        assert issubclass(block, Attention), key
        for name in ("new_cache", "forward", "weights", "words", "flops_per_key"):
            assert getattr(block, name) is not getattr(Attention, name), f"{key} has no {name}"
        for name in ("new_cache", "forward", "weights"):  # called with these arguments
            asked = list(inspect.signature(getattr(Attention, name)).parameters)
            answered = list(inspect.signature(getattr(block, name)).parameters)
            assert answered[: len(asked)] == asked, f"{name} of {key}"
    assert tiny_config().attention_name == "mha" and tiny_config(**TINY_MLA).attention_name == "mla"
    classes = [block.__name__ for block in ATTENTION.values()]
    naming = {n for n, tree in TREES.items() if any(c in ast.dump(tree) for c in classes)}
    assert naming == {"model", "nanomla.latent_tokens"}


def test_state_dict_names_and_order_stay():
    """Old checkpoints and optimizer states, which go by position, rely on them."""

    def names(**settings):
        model = GPT(tiny_config(n_layer=1, bias=False, **settings))
        found = [n for n, _ in model.named_parameters()]
        return [n.removeprefix("transformer.h.0.") for n in found if ".attn." in n]

    mha = ["attn.c_attn.weight", "attn.c_proj.weight"]
    assert names() == mha
    assert names(use_svd=True) == ["attn.v_up", *mha, "attn.v_down.weight"]
    latent = ["attn.kv_latent_proj.weight", "attn.latent_norm.weight", "attn.k_expand.weight"]
    mla = {"use_mla": True, "mla_latent_dim": 7}
    assert names(**mla) == [
        "attn.c_proj.weight",
        "attn.q_proj.weight",
        *latent,
        "attn.v_expand.weight",
    ]
    low_rank = ["q_latent_proj", "q_latent_norm", "q_expand"]
    assert names(**mla, use_svd=True, mla_q_latent_dim=5) == [
        "attn.v_up", "attn.c_proj.weight", "attn.v_down.weight",
        *(f"attn.{n}.weight" for n in low_rank), *latent,
    ]  # fmt: skip


def test_rotary_tables_are_kept_once():
    """One table in the model, none in its layers, and none of it in the state dict."""
    model = GPT(tiny_config(**{**TINY_MLA, "n_layer": 3}))
    assert [n for n, _ in model.named_buffers()] == ["rope_cos", "rope_sin"]
    assert not any("rope" in name for name in model.state_dict())


def test_installed_modules_are_those_of_the_project():
    """pyproject names every package and module that an install has to bring."""
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = {str(p.parent.relative_to(ROOT)).replace("/", ".") for p in MODULES.values()} - {"."}
    assert set(setup["packages"]) == {p for p in packages if not p.startswith("data")}
    assert set(setup["py-modules"]) == {n for n in MODULES if "." not in n} - set(setup["packages"])
