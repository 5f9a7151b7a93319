"""Every command that the README shows runs, on the tiny variant of its config."""

import io
import pathlib
import re
import shlex
import subprocess
import tarfile

import numpy as np
import pytest

from diffusion.plotting import image_grid
from diffusion.utils.io import save_npz
from tests import tiny_tfds
from tests.conftest import ROOT
from tests.modes.test_train import run

README = (ROOT / "README.md").read_text()
BLOCKS = "".join(re.findall(r"^```\n(.*?)^```", README, re.M | re.S)).replace("\\\n", " ")
IN_TEXT = re.findall(r"`([^`\n]*(?:python main\.py|make|pip install)[^`\n]*)`", README)
COMMANDS = sorted({*filter(None, map(str.strip, BLOCKS.splitlines())), *IN_TEXT})
MAIN = [c for c in COMMANDS if "python main.py" in c and "..." not in c]


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A folder with tiny data sets of all the names that the configs ask for, and a trained run."""
    folder = tmp_path_factory.mktemp("readme")
    for name, size in (("cifar10", 32), ("celebahq256", 32), ("lsun_bedroom", 32), ("images", 64)):
        tiny_tfds.write(folder / "data", name, (size, size, 3), n=8)
    (folder / "IMAGES").mkdir()
    for i in range(3):
        noise = np.random.default_rng(i).integers(0, 256, (40, 50 + i, 3), np.uint8)
        image_grid.save_png(folder / "IMAGES" / f"{i}.png", noise)
    for name in ("SAMPLES", "OTHERS"):
        images = np.random.default_rng(len(name)).integers(0, 256, (20, 8, 8, 1), np.uint8)
        save_npz(folder / f"{name}.npz", images)
    tiny_cifar10(folder / "cifar-10-binary.tar.gz")
    run(f"--config={ROOT}/configs/digits.py:tiny", "--workdir=runs/digits", cwd=folder)
    run("--mode=export", "--workdir=runs/digits", "--output=WEIGHTS", cwd=folder)
    return folder


def tiny_cifar10(path):
    """The published archive's layout with two images in each file: a label, then three planes."""
    with tarfile.open(path, "w:gz") as tar:

        def add(name, content):
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))

        add("batches.meta.txt", "\n".join(f"class{i}" for i in range(10)).encode())
        for i in range(6):
            pixels = np.random.default_rng(i).integers(0, 256, (2, 3072), np.uint8).tobytes()
            content = b"".join(bytes([k]) + pixels[3072 * k : 3072 * (k + 1)] for k in (0, 1))
            add(f"data_batch_{i}.bin" if i else "test_batch.bin", content)


def test_the_readme_s_commands_were_found():
    assert {"make demo", "make test", "python main.py"} <= set(COMMANDS)
    assert len(MAIN) >= 6


@pytest.mark.parametrize("command", MAIN)
def test_command_runs(place, command):
    words = shlex.split(command)
    extra = dict(word.split("=") for word in words[: words.index("python")])
    arguments = []
    for word in words[words.index("main.py") + 1 :]:
        if word.startswith("--config=") and "tiny" not in word:
            path, _, variant = word.partition(":")
            word = f"{path}:{','.join(filter(None, ['tiny', variant]))}"
        arguments.append(word.replace("=configs/", f"={ROOT}/configs/"))
    if "--mode=prepare" in arguments:
        arguments.append("--config.data.data_dir=prepared/" + re.sub(r"\W+", "_", command))
        if not any("data.archive=" in a for a in arguments):  # nothing is downloaded in a test
            arguments.append("--config.data.archive=cifar-10-binary.tar.gz")
            arguments.append("--config.data.accept_incomplete=True")
    elif "--mode=bench" in arguments:
        arguments += ["--part=likelihood", f"--config={ROOT}/configs/digits.py:tiny"]
    elif "--workdir=runs/digits" not in arguments:
        workdir = re.sub(r"\W+", "_", command)
        arguments = [a for a in arguments if not a.startswith("--workdir=")]
        arguments.append(f"--workdir={workdir}")
        if not any(a.startswith(("--config=", "--input=")) for a in arguments):
            arguments.append(f"--config={ROOT}/configs/digits.py:tiny")
    if "JAX_NUM_PROCESSES" in extra:
        assert set(extra) == {"JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"}
        return  # test_main starts two processes so
    out, err = run(*arguments, cwd=place, **extra)
    assert err == "" and "done" in out


@pytest.mark.parametrize("target", ["demo", "test", "soak", "bench", "lint", "clean"])
def test_make_knows_the_target(target):
    made = subprocess.run(
        ["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=True
    )
    wanted = {"demo": "python main.py", "test": "python -m pytest"}.get(target, "")
    assert wanted in made.stdout


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("pip install")])
def test_what_is_installed_is_what_is_required(command):
    """Files that exist; and an accelerator's JAX within the bounds of requirements.txt."""
    for word in shlex.split(command)[2:]:
        if word == "-r":
            continue
        if word.endswith(".txt"):
            assert pathlib.Path(ROOT, word).is_file()
        else:
            bounds = re.search(r"^jax(>=\S+)", (ROOT / "requirements.txt").read_text(), re.M)[1]
            assert re.fullmatch(r"jax\[\w+\]" + re.escape(bounds), word)


def test_links_lead_somewhere():
    for link in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / link).exists(), link
