"""Rules of the source that no linter knows: who may import whom, what is imported at all, and how long things are."""

import ast
import re
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "federa"
FILES = sorted(SOURCE.rglob("*.py"))

# Low to high; a module imports from its own layer or from lower ones. The last are the edges: nothing imports them.
LAYERS = [
    ("errors", "types", "seeds", "machine"),
    ("state", "registry", "statistics"),
    (
        "models",
        "masks",
        "cpu",
        "gpu",
        "data",
        "tasks",
        "methods",
        "aggregators",
        "server_optimizers",
        "trackers",
        "privacy",
        "report",
        "cuda_graphs",
        "flat_parameters",
    ),
    ("vocabulary", "prefix", "local_optimizer", "kept"),
    ("client", "server", "diagnostics"),
    ("engines", "wires"),
    ("config",),
    ("experiment", "evaluation", "environment", "checkpoint"),
    ("run",),
    (
        "export",
        "plan",
        "starter",
        "testing",
        "progress",
        "compare",
        "bench",
        "recipe_edit",
        "split",
        "flower",
        "clock",
    ),
    ("cli", "__init__"),
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# Within the layer of the edges: what those that print may use.
EDGES = {
    "progress": set(),
    "compare": {"progress", "plan"},
    "export": set(),
    "plan": set(),
    "bench": set(),
    "recipe_edit": set(),
    "starter": set(),
    "split": set(),
    "clock": set(),
    "flower": {"progress"},
    "testing": set(),
}
ONLY_IN = {
    "typer": {"cli"},
    "rich": {"cli", "progress", "compare"},
    "peft": set(),
    "flwr": {"flower"},
    "ray": {"engines"},
}
NEVER = {"pickle", "marshal", "shelve", "dill", "joblib", "random"}


def part(path):
    """The top-level name of a module inside the package: `methods` of `methods/lora.py`."""
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def for_types_alone(module):
    """All nodes below `if TYPE_CHECKING:`, which does not run."""
    return {
        id(inner)
        for node in ast.walk(module)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }


def imports(module):
    """The dotted names that a module imports when it runs, wherever it does."""
    types = for_types_alone(module)
    for node in ast.walk(module):
        if id(node) in types:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "absolute imports only"
            assert node.module is not None
            yield node.module
            if node.module == "federa":
                yield from (f"federa.{alias.name}" for alias in node.names)


def layer_faults(path, module):
    here = part(path)
    for name in imports(module):
        if not name.startswith("federa.") or here == "__init__":
            continue
        there = name.split(".")[1]
        if there == here:
            continue
        if LEVEL[there] > LEVEL[here]:
            yield f"{here} imports {there}, which stands above it"
        elif here in EDGES and there in EDGES and there not in EDGES[here]:
            yield f"{here} imports {there}, another edge"


def library_faults(path, module):
    for name in imports(module):
        library = name.split(".")[0]
        if library in ONLY_IN and part(path) not in ONLY_IN[library]:
            yield f"{part(path)} imports {library}"
        if library in NEVER:
            yield f"{part(path)} imports {library}"


def danger_faults(path, module):
    for node in ast.walk(module):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called in (
            "eval",
            "exec",
            "compile",
            "torch.load",
            "torch.save",
            "yaml.load",
            "__import__",
            "os.system",
        ):
            yield f"line {node.lineno}: {called}()"
        if re.fullmatch(r"(np|numpy)\.random\.(?!default_rng|SeedSequence)\w+", called):
            yield f"line {node.lineno}: {called}(), a generator that everybody shares"
        for keyword in node.keywords:
            if keyword.arg in ("trust_remote_code", "shell") and ast.unparse(keyword.value) != "False":
                yield f"line {node.lineno}: {keyword.arg}"


def branch_faults(path, module):
    """`if method == ...` outside methods/: what a method does is the method's business."""
    if part(path) == "methods":
        return
    for node in ast.walk(module):
        if isinstance(node, ast.Compare) and ast.unparse(node.left).endswith(("method.name", "method_name")):
            yield f"line {node.lineno}: {ast.unparse(node)}"


def size_faults(path, module):
    if not ast.get_docstring(module):
        yield "no docstring"
    lines = path.read_text(encoding="utf-8").count("\n")
    if lines > 400:
        yield f"{lines} lines"
    for node in ast.walk(module):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno is not None
            first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
            length = node.end_lineno - first.lineno + 1
            if length > 60:
                yield f"{node.name} has {length} lines below its docstring"


RULES = {f.__name__: f for f in (layer_faults, library_faults, danger_faults, branch_faults, size_faults)}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_source(path):
    module = tree(path)
    assert part(path) in LEVEL, "say in LAYERS where it stands"
    assert [f"{rule}: {fault}" for rule, faults in RULES.items() for fault in faults(path, module)] == []


BROKEN = {
    "layer_faults": "from federa.run import run",
    "library_faults": "def f():\n    import peft.tuners",
    "danger_faults": "import numpy as np\nx = np.random.rand(3)\ny = torch.load('x')\neval('1')",
    "branch_faults": "def f(config):\n    return config.method.name == 'lora'",
    "size_faults": "def f():\n" + "    x = 1\n" * 61,
}


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_notices(rule):
    path = SOURCE / "client.py"
    assert list(RULES[rule](path, ast.parse(BROKEN[rule])))
    types = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from federa.run import run\n"
    assert not list(layer_faults(path, ast.parse(types)))


def test_nothing_imports_the_command_line():
    for path in FILES:
        assert part(path) == "cli" or "federa.cli" not in set(imports(tree(path))), path


def test_no_registered_class_builds_on_another():
    from federa.config import REGISTRIES

    for registry in REGISTRIES.values():
        classes = {registry.get(name) for name in registry.names()}
        assert not [cls for cls in classes if set(cls.__mro__[1:]) & classes]


def test_modules_of_these_rules_exist():
    present = {part(path) for path in FILES}
    assert set(LEVEL) == present, "LAYERS names what is not there, or lacks what is"
