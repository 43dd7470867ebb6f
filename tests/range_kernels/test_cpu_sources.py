"""Properties of the CPU kernels' source that no result shows reliably: lifetimes of arrays, and names in Numba's disk cache."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import range_kernels.cpu
from numba.core.dispatcher import Dispatcher
from range_kernels.cpu import attention, layer, ops, splice

FILES = sorted(Path(range_kernels.cpu.__file__).parent.glob("*.py"))
ALLOCATIONS = {"empty", "zeros", "full", "ones", "_aligned"}


def names_in(node):
    return {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}


def _end(function, made, use):
    """The line up to which a use keeps an array alive: the end of the outermost loop around it in which the array is not made."""
    loops = [
        node
        for node in ast.walk(function)
        if isinstance(node, ast.For | ast.While)
        and node.lineno <= use.lineno <= node.end_lineno
        and not node.lineno <= made.lineno <= node.end_lineno
    ]
    return max([use.lineno, *(loop.end_lineno for loop in loops)])


def outlived(tree):
    """Local arrays whose address is kept in a variable that is used after the array's own last use, when Numba has freed it."""
    found = []
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        assignments = [node for node in ast.walk(function) if isinstance(node, ast.Assign)]
        for made in assignments:
            called = getattr(made.value, "func", None)
            name = getattr(called, "attr", getattr(called, "id", None))
            if name not in ALLOCATIONS or not isinstance(made.targets[0], ast.Name):
                continue
            array = made.targets[0].id
            derived = set()
            for each in sorted(assignments, key=lambda node: node.lineno):
                takes = any(
                    isinstance(node, ast.Attribute) and node.attr == "ctypes" and names_in(node) == {array}
                    for node in ast.walk(each.value)
                )
                if takes or names_in(each.value) & derived:
                    derived |= set().union(*(names_in(target) for target in each.targets))
            uses = {
                name: max(
                    _end(function, made, n) for n in ast.walk(function) if isinstance(n, ast.Name) and n.id == name
                )
                for name in {array, *derived}
            }
            found += [(function.name, array, name) for name in sorted(derived - {array}) if uses[name] > uses[array]]
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_no_address_outlives_its_array(file):
    assert outlived(ast.parse(file.read_text())) == []


def test_an_address_that_outlives_its_array_is_found():
    source = """
def kernel(x):
    wide = np.empty(8, np.float32)
    place = wide.ctypes.data + np.uintp(4)
    for row in range(3):
        product(x, place)
"""
    assert outlived(ast.parse(source)) == [("kernel", "wide", "place")]
    assert outlived(ast.parse(source + "    return wide[0]\n")) == []


def test_every_cached_kernel_has_a_file_of_its_own():
    """Numba's cache does not tell a parallel compilation of a function from a sequential one."""
    files = {}
    for module in (attention, layer, ops, splice):
        for name, value in vars(module).items():
            if isinstance(value, Dispatcher) and hasattr(value._cache, "_cache_file"):
                files.setdefault(value._cache._cache_file._index_path, set()).add((id(value), name))
    assert len(files) > 10
    shared = {path: names for path, names in files.items() if len({number for number, _ in names}) > 1}
    assert shared == {}
