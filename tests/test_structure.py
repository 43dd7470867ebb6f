"""Project structure: imports go only from higher to lower layers, no import cycles, few files at the package root."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = {"workbench": ROOT / "workbench", "range_kernels": ROOT / "kernels" / "range_kernels"}

# From the lowest layer to the highest; a module may import from its own layer and from lower ones.
LAYERS = (
    "range_kernels",
    "workbench.errors workbench.version workbench.progress workbench.atomic_write workbench.checksums workbench.schema workbench.package_data",
    "workbench.prompt",
    "workbench.models",
    "workbench.trace",
    "workbench.vision",
    "workbench.engines",
    "workbench.comparison",
    "workbench.linting",
    "workbench.analysis",
    "workbench.faults",
    "workbench.plots",
    "workbench.widgets",
    "workbench.recording workbench.exploring",
    "workbench.cli",
    "workbench.benchmarks",
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names.split()}


def modules() -> dict[str, Path]:
    found = {}
    for package, folder in PACKAGES.items():
        for path in folder.rglob("*.py"):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def type_checking_only(tree: ast.Module) -> set[ast.AST]:
    """Everything inside `if TYPE_CHECKING:`."""
    guarded = (
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    )
    return {inner for node in guarded for inner in ast.walk(node)}


def imports(module: str) -> set[str]:
    """Project modules that a module imports, including inside functions but not under `if TYPE_CHECKING:`."""
    path = MODULES[module]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    ignored, found = type_checking_only(tree), set()
    for node in ast.walk(tree):
        if node in ignored:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*parts, *([node.module] if node.module else [])])
            for alias in node.names:
                submodule = f"{base}.{alias.name}"
                found.add(submodule if submodule in MODULES else base)
    return {name for name in found if name in MODULES and name != module}


IMPORTS = {module: imports(module) for module in MODULES}


def layer_of(module: str) -> str:
    return next(name for name in sorted(RANK, key=len, reverse=True) if module == name or module.startswith(f"{name}."))


def test_every_module_has_a_layer():
    missing = [module for module in MODULES if module != "workbench" and not any(
        module == name or module.startswith(f"{name}.") for name in RANK
    )]  # fmt: skip
    assert not missing, f"add a layer for {missing}"


def test_no_module_imports_from_a_higher_layer():
    wrong = [
        f"{module} -> {imported}"
        for module, found in IMPORTS.items()
        for imported in found
        if module != "workbench" and (imported == "workbench" or RANK[layer_of(imported)] > RANK[layer_of(module)])
    ]
    assert not wrong, wrong


def test_imports_are_acyclic():
    """Finds strongly connected components with Tarjan's algorithm (1972).

    `from package import module` counts as an import of the module, not of the package's `__init__`.
    """
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    cycles: list[list[str]] = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for imported in IMPORTS[module]:
            if imported not in index:
                visit(imported)
                low[module] = min(low[module], low[imported])
            elif imported in stack:
                low[module] = min(low[module], index[imported])
        if low[module] == index[module]:
            component = []
            while not component or component[-1] != module:
                component.append(stack.pop())
            if len(component) > 1:
                cycles.append(sorted(component))

    for module in MODULES:
        if module not in index:
            visit(module)
    assert not cycles, cycles


def test_product_does_not_import_benchmarks():
    users = [
        module
        for module, found in IMPORTS.items()
        if not module.startswith(("workbench.benchmarks", "range_kernels.benchmarks"))
        and any(name.startswith(("workbench.benchmarks", "range_kernels.benchmarks")) for name in found)
    ]
    assert not users


def test_at_most_ten_files_are_at_the_root_of_the_package():
    assert len(list((ROOT / "workbench").glob("*.py"))) <= 10


def test_inline_assembly_is_only_in_the_ptx_modules():
    """Only cuda/ptx.py and cuda/ptx_sm90.py emit inline assembly, so a compiler change affects only these files."""
    users = [
        module
        for module, path in MODULES.items()
        if module.startswith("range_kernels.cuda") and "InlineAsm" in path.read_text() and "ptx" not in path.stem
    ]
    assert not users
