"""The wheel contains everything the product needs: it is installed into a separate environment outside the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
ROOT = Path(__file__).parents[1]
SMOKE_TEST = """
import sys
from pathlib import Path
import workbench
from workbench.package_data import data_folder
from workbench.recording import Recording

assert Path(workbench.__file__).is_relative_to(sys.prefix), workbench.__file__
model = workbench.load_model("digit-cards")
images = [data_folder("data/images") / name for name in ("blue_7.png", "green_5.png")]
prompt = workbench.build_prompt(model, "Read the cards in order.", images)
with workbench.open_engine("numba", model) as engine:
    print(model.tokenizer.decode(engine.generate(prompt).token_ids, skip_special_tokens=True))
    print(workbench.check_engine(engine, prompt, ["embed", "layers.0", "norm"]).verdict)
print(Recording.load(data_folder("data/runs") / "digit-cards-turbomind-h100").compare().verdict)
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory, model):
    """Python of a new environment with the wheel; dependencies come from this environment, without its checkout."""
    folder = tmp_path_factory.mktemp("installed")
    source = folder / "source"
    for part in ("workbench", "kernels", "data", "notebooks"):
        shutil.copytree(ROOT / part, source / part, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    for file in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / file, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    run([*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source], folder)
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    (wheel,) = folder.glob("*.whl")
    run([*pip, "--python", python, "install", "--no-deps", "--no-index", wheel], folder)
    site = Path(run([python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"], folder).strip())
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"])  # nested .pth files are not processed
    return python


def run(command: list, folder: Path) -> str:
    done = subprocess.run(
        list(map(str, command)), cwd=folder, capture_output=True, text=True, timeout=280, env=ENVIRONMENT
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_installed_package_reads_cards_and_checks_engines(python, tmp_path):
    assert run([python, "-c", SMOKE_TEST], tmp_path).splitlines() == ["blue 7, green 5", "noise", "noise"]


def test_lab_copies_the_notebooks_and_their_data(python, tmp_path):
    run([python.parent / "workbench", "lab", "bench", "--no-open"], tmp_path)
    assert len(list((tmp_path / "bench" / "notebooks").glob("*.ipynb"))) == 12
    assert (tmp_path / "bench" / "data" / "images" / "blue_7.png").is_file()
    assert (tmp_path / "bench" / "data" / "bench" / "h100.json").is_file()


def test_help_imports_no_large_packages(python, tmp_path):
    """`workbench --help` may take 0.5 s; importing torch alone takes longer."""
    code = (
        "import sys\nfrom workbench.cli.main import main\ntry:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print('LARGE', sorted({'torch', 'transformers', 'numba', 'numpy', 'matplotlib', 'ipywidgets'} & set(sys.modules)))"
    )
    assert run([python, "-c", code], tmp_path).endswith("LARGE []\n")
