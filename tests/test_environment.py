"""pyproject.toml, constraints.txt and environment.yml agree on versions, and the installed packages match them."""

import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = {
    canonicalize_name(name): pin
    for name, pin in (line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
}
REQUIREMENTS = [Requirement(text) for text in [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]]


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=str)
def test_every_requirement_is_pinned_within_bounds_and_installed(requirement):
    name = canonicalize_name(requirement.name)
    assert name in PINS, f"{name} is not in constraints.txt: run `make update-pins`"
    assert requirement.specifier.contains(PINS[name], prereleases=True)
    assert Version(version(name)).public == PINS[name]


def test_kernel_dependencies_have_the_required_pins():
    assert PINS["torch"] == "2.13.0"
    assert Version(PINS["numpy"]) < Version("2.5")
    assert {r.name: str(r.specifier) for r in REQUIREMENTS if r.name == "numpy"} == {"numpy": "<2.5"}
    (toolkit,) = (Requirement(text) for text in PROJECT["optional-dependencies"]["cuda"] if "toolkit" in text)
    assert str(toolkit.specifier) == "==13.0.*"


def test_conda_environment_installs_the_pinned_project():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    python = next(
        entry for entry in environment["dependencies"] if isinstance(entry, str) and entry.startswith("python=")
    )
    (pip,) = (entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    assert Requirement(f"python{PROJECT['requires-python']}").specifier.contains(python.split("=")[1] + ".0")
    assert pip == ["--constraint constraints.txt", "--editable .[dev]"]
    assert not [entry for entry in environment["dependencies"] if isinstance(entry, str) and "==" in entry]


def test_makefile_python_bounds_match_requires_python():
    bounds = re.search(r"\((\d), (\d+)\) <= sys.version_info\[:2\] <= \((\d), (\d+)\)", (ROOT / "Makefile").read_text())
    low, high = ".".join(bounds.groups()[:2]), ".".join(bounds.groups()[2:])
    specifier = Requirement(f"python{PROJECT['requires-python']}").specifier
    minor = int(high.split(".")[1])
    assert specifier.contains(low)
    assert specifier.contains(high)
    assert not specifier.contains(f"3.{minor + 1}")


def test_transformers_does_not_detect_kernels_folder_as_a_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    from transformers.utils import is_kernels_available

    assert not is_kernels_available()


def test_every_package_is_in_the_wheel():
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {".".join(file.parent.relative_to(ROOT).parts) for file in (ROOT / "workbench").rglob("__init__.py")}
    found |= {
        ".".join(file.parent.relative_to(ROOT / "kernels").parts) for file in (ROOT / "kernels").rglob("__init__.py")
    }
    assert listed == found | {"workbench._data", "workbench._notebooks"}
