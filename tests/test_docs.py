"""Every command that README and docs show is one the program takes; some of them run."""

import ast
import collections
import io
import pathlib
import re
import shlex
import shutil
import subprocess
import tarfile

import numpy as np
import pytest

import main
from diffusion.plotting.image_grid import save_png
from diffusion.runtime import cli, config, validation
from diffusion.utils.io import save_npz
from diffusion.utils.object_store import STORES
from tests.conftest import ROOT
from tests.runs import run

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = {page.name: page.read_text() for page in PAGES}
CODE = r"^ *```\n(.*?)^ *```|^((?:    \S.*\n)+)"  # fenced, or indented


def commands():
    """Returns the shell commands of all pages, in blocks and in running text."""
    found = set()
    for text in TEXT.values():
        blocks = ["".join(groups) for groups in re.findall(CODE, text, re.M | re.S)]
        lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
        inline = re.findall(r"`([^`\n]*(?:python main\.py|make |pip install)[^`\n]*)`", text)
        found |= {line.strip() for line in [*lines, *inline]}
    return sorted(found)


COMMANDS = commands()
START = r"(?:[A-Z_]+=\S+ )*python main\.py"
MAIN = [c for c in COMMANDS if re.match(START, c) and "..." not in c and "--help" not in c]


def arguments(command):
    """Returns what follows main.py, of the tiny variant of its config."""
    words = shlex.split(command, comments=True)
    args = words[words.index("main.py") + 1 :]
    for i, word in enumerate(args):
        if word.startswith("--config=") and "tiny" not in word:
            path, _, variant = word.partition(":")
            args[i] = f"{path}:{','.join(filter(None, ['tiny', variant]))}"
    return args


def test_the_commands_were_found():
    assert {"make demo", "make test", "python main.py"} <= set(COMMANDS)
    assert len(MAIN) >= 30
    modes = {mode for c in MAIN for mode in re.findall(r"--mode=(\w+)", c)}
    assert modes == main.MODES.keys() - {"train", "replay"}


@pytest.mark.parametrize("command", MAIN)
def test_a_command_is_one_that_the_program_takes(command):
    run_ = config.resolve(main.define_flags(), ["main.py", *arguments(command)], lambda _: None)
    cli.check_flags(run_)
    validation.validate(run_.config)


@pytest.fixture(scope="module")
def place(tmp_path_factory, trained):
    """A folder with what the commands that run ask for: data, images, archives, a trained run."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "IMAGES").mkdir()
    for i in range(3):
        noise = np.random.default_rng(i).integers(0, 256, (40, 50 + i, 3), np.uint8)
        save_png(folder / "IMAGES" / f"{i}.png", noise)
    for name in ("SAMPLES", "OTHERS"):
        images = np.random.default_rng(len(name)).integers(0, 256, (20, 8, 8, 1), np.uint8)
        save_npz(folder / f"{name}.npz", images)
    tiny_cifar10(folder / "cifar-10-binary.tar.gz")
    shutil.copytree(trained[0], folder / "runs" / "digits")
    run("--mode=export", "--workdir=runs/digits", "--output=WEIGHTS", cwd=folder)
    return folder


def tiny_cifar10(path):
    """Writes the published archive's layout, with two images in each file."""
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


RUN = [
    "python main.py --mode=sample --workdir=runs/digits --config.sample.num=16",
    "python main.py --mode=eval --workdir=runs/digits --input=SAMPLES.npz --input=OTHERS.npz",
    "python main.py --mode=bpd --workdir=runs/digits",
    "python main.py --mode=figures --workdir=runs/digits "
    "\"--config.figures.names=('inpainting',)\" --config.figures.mask=left",
    "python main.py --mode=export --workdir=runs/digits --output=EXPORTED",
    "python main.py --mode=import --input=WEIGHTS --workdir=runs/imported",
    "python main.py --mode=prepare --config=configs/folder.py --config.data.archive=IMAGES",
    "python main.py --mode=prepare --config=configs/cifar10.py",
]


@pytest.mark.parametrize("command", RUN)
def test_a_command_runs(place, command):
    assert command in MAIN
    args = arguments(command)
    if "--mode=prepare" in args:
        args.append("--config.data.data_dir=prepared")
        if "--config.data.archive=IMAGES" not in args:  # nothing is downloaded in a test
            args.append("--config.data.archive=cifar-10-binary.tar.gz")
            args.append("--config.data.accept_incomplete=True")
    out, err = run(*args, cwd=place)
    assert err == "" and "done" in out


@pytest.mark.parametrize("target", ["demo", "test", "soak", "accelerator", "lint", "clean"])
def test_make_knows_the_target(target):
    made = subprocess.run(
        ["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=True
    )
    wanted = {"demo": "python main.py", "test": "python -m pytest"}.get(target, "")
    assert wanted in made.stdout


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("pip install")])
def test_what_is_installed_is_what_is_required(command):
    """Files that exist, what a bucket needs, and an accelerator's JAX within our bounds."""
    if command.removeprefix("pip install ") in (packages for _, packages in STORES.values()):
        return
    for word in shlex.split(command)[2:]:
        if word == "-r":
            continue
        if word.endswith(".txt"):
            assert pathlib.Path(ROOT, word).is_file()
        else:
            bounds = re.search(r"^jax(>=\S+)", (ROOT / "requirements.txt").read_text(), re.M)[1]
            assert re.fullmatch(r"jax\[\w+\]" + re.escape(bounds), word)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", page.read_text()):
        assert (page.parent / link).exists(), link


def test_the_readme_is_short():
    assert len(TEXT["README.md"].splitlines()) <= 200


# The file list of "Reading the code" in the README.
HOUR = (
    "main.py",
    *(f"diffusion/{name}.py" for name in ("schedules", "process", "targets", "losses")),
    *(f"diffusion/{name}.py" for name in ("likelihood", "unet", "train_step", "sharding")),
    *("diffusion/samplers/base.py", "diffusion/samplers/ancestral.py", "diffusion/modes/train.py"),
)


def test_the_hour_is_an_hour():
    """The core that the README asks to read, in lines; and no file of the source is long."""
    lines = {path: len((ROOT / path).read_text().splitlines()) for path in HOUR}
    assert sum(lines.values()) <= 1500, lines
    assert all(f"]({path})" in TEXT["README.md"] for path in HOUR)
    for path in (ROOT / "diffusion").rglob("*.py"):
        assert len(path.read_text().splitlines()) < 400, path


# One meaning in several modules: entry points, readers and writers of formats, types of a tree.
SHARED_NAMES = {"run", "read", "write", "check", "report", "Tree", "DTYPES", "MAGIC", "NORM"}
SHARED_NAMES |= {"MAX_BYTES", "conv"}  # of a file; of a network's layer and of a kernel
# A mode's figure or reading bears the name of what it draws or reads.
SHARED_NAMES |= {"rate_distortion", "quality", "nearest"}


def test_no_public_name_has_two_meanings():
    places = collections.defaultdict(set)
    for path in (ROOT / "diffusion").rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            names = [getattr(node, "name", "")]
            if isinstance(node, ast.Assign):
                names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            for name in names:
                places[name].add(path.name)
    several = {k for k, v in places.items() if len(v) > 1 and k and not k.startswith("_")}
    assert several <= SHARED_NAMES, several - SHARED_NAMES


def test_the_top_level_is_the_plan_s():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("no git checkout")
    names = {line.split("/")[0] for line in tracked.stdout.splitlines()}
    files = {"main.py", "requirements.txt", "README.md", "LICENSE", "CITATION.cff", "CHANGELOG.md"}
    files |= {"Makefile", "pyproject.toml", ".gitignore", ".ci", ".github"}
    assert names == files | {"configs", "diffusion", "tests", "docs"}
