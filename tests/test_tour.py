"""The notebook of docs/ runs from top to bottom, and no outputs of it are kept."""

import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.runs import environment

TOUR = ROOT / "docs" / "tour.ipynb"
EXECUTE = """
import sys, nbclient, nbformat
notebook = nbformat.reads(sys.stdin.read(), 4)
place = {"metadata": {"path": sys.argv[1]}}
nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=place).execute()
print(nbformat.writes(notebook))
"""


def test_no_outputs_are_kept():
    cells = json.loads(TOUR.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert 10 <= len(code) <= 15
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code)


@pytest.mark.slow
def test_the_tour_runs():
    """With a short training: the kernel is another process, with the tests' own settings of JAX."""
    text = TOUR.read_text()
    assert "STEPS = 1200\\n" in text
    ran = subprocess.run(
        [sys.executable, "-c", EXECUTE, str(TOUR.parent)],
        input=text.replace("STEPS = 1200\\n", "STEPS = 60\\n"),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    cells = json.loads(ran.stdout)["cells"]
    outputs = [out for cell in cells for out in cell.get("outputs", [])]
    said = "".join("".join(out["text"]) for out in outputs if out["output_type"] == "stream")
    assert sum("image/png" in out.get("data", {}) for out in outputs) == 6
    assert "1000 steps: mean 0.3" in said or "1000 steps: mean 0.29" in said
    assert "bits/dim of 32 test images" in said
