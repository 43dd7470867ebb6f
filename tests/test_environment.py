"""The three places that state versions agree, and what is installed is what they state."""

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
def test_every_requirement_is_pinned_within_its_bounds_and_installed_so(requirement):
    name = canonicalize_name(requirement.name)
    assert name in PINS, f"{name} is not in constraints.txt: run `make update-pins`"
    assert requirement.specifier.contains(PINS[name], prereleases=True)
    assert Version(version(name)).public == PINS[name]


def test_the_pins_the_kernels_need():
    assert PINS["torch"] == "2.13.0"
    assert Version(PINS["numpy"]) < Version("2.5")
    assert {r.name: str(r.specifier) for r in REQUIREMENTS if r.name == "numpy"} == {"numpy": "<2.5"}
    (toolkit,) = (Requirement(text) for text in PROJECT["optional-dependencies"]["cuda"] if "toolkit" in text)
    assert str(toolkit.specifier) == "==13.0.*"


def test_conda_installs_the_same():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    python = next(
        entry for entry in environment["dependencies"] if isinstance(entry, str) and entry.startswith("python=")
    )
    (pip,) = (entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    assert Requirement(f"python{PROJECT['requires-python']}").specifier.contains(python.split("=")[1] + ".0")
    assert pip == ["--constraint constraints.txt", "--editable .[dev]"]
    assert not [entry for entry in environment["dependencies"] if isinstance(entry, str) and "==" in entry]


def test_make_accepts_the_pythons_that_the_project_names():
    bounds = re.search(r"\((\d), (\d+)\) <= sys.version_info\[:2\] <= \((\d), (\d+)\)", (ROOT / "Makefile").read_text())
    low, high = ".".join(bounds.groups()[:2]), ".".join(bounds.groups()[2:])
    specifier = Requirement(f"python{PROJECT['requires-python']}").specifier
    minor = int(high.split(".")[1])
    assert specifier.contains(low)
    assert specifier.contains(high)
    assert not specifier.contains(f"3.{minor + 1}")


def test_kernels_is_no_package_that_transformers_could_take_for_its_own():
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
