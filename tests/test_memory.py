"""Peak memory of running a notebook, and memory left after `engine.close()`, each measured in a child process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
GIB = 1 << 30
PEAK = 1.5 * GIB

RUN_NOTEBOOK = """
import json, sys
import nbformat
from IPython.core.interactiveshell import InteractiveShell

shell = InteractiveShell.instance()
for cell in nbformat.read(sys.argv[1], as_version=4).cells:
    if cell.cell_type == "code":
        shell.run_cell(cell.source).raise_error()
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print("\\nMEASURED", json.dumps({"peak": int(status["VmHWM"].split()[0]) * 1024}))
"""

CLOSE_ENGINES = """
import gc, json, weakref
import psutil, torch
import workbench

def resident():
    gc.collect()
    return psutil.Process().memory_info().rss

model = workbench.load_model("smollm2-135m")
prompt = workbench.Prompt(model.chat_ids("Hello!"))
kinds = ("numba", "transformers")

def run(kind):
    with workbench.open_engine(kind, model) as engine:
        engine.generate(prompt, workbench.GenerationConfig(max_new_tokens=2))
        weights = weakref.ref(engine.decoder if kind == "numba" else next(engine.network.parameters()))
    gc.collect()
    return weights() is not None

with workbench.open_engine("numba", model) as engine:
    workbench.check_engine(engine, prompt)  # loads the reference
for kind in kinds:
    run(kind)  # Numba compiles here, unless its cache has the functions: compiled code and the compiler stay in memory
before = resident()
left, grown = [], []
for kind in kinds:
    for _ in range(3):
        left.append(run(kind))
        grown.append(resident() - before)
print("\\nMEASURED", json.dumps({"left": left, "grown": grown}))
"""


def measure(code: str, *arguments: str) -> dict:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT / "notebooks", capture_output=True, text=True, timeout=280,
        env={**os.environ, "MPLBACKEND": "agg"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(done.stdout.rsplit("MEASURED", 1)[1])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_notebook_peak_memory_is_below_the_limit(model):
    """Of notebook 09; `tests/browser` measures the kernel of notebook 02, which it runs anyway."""
    measured = measure(RUN_NOTEBOOK, "09_turbomind_vs_transformers.ipynb")
    assert measured["peak"] < PEAK, f"{measured['peak'] / GIB:.2f} GiB"


def test_closing_an_engine_frees_its_weights_and_memory(model):
    measured = measure(CLOSE_ENGINES)
    assert not any(measured["left"]), measured
    assert max(measured["grown"]) < 100 << 20, [f"{grown >> 20} MiB" for grown in measured["grown"]]
