"""Who may import whom: the layers of diffusion/, read from the source."""

import ast
import pathlib
import sys

import pytest

from tests.conftest import ROOT

# Each may import those before it, and numpy and jax. The branches may also import all of the trunk,
# and nothing of each other.
TRUNK = ("schedules", "process", "targets", "likelihood")
BRANCHES = (
    ("losses",),
    ("bounds",),
    ("ode",),
    ("grids", "walk", "solvers", "samplers", "edits"),
)
# Each its own outside library, and of diffusion/ at most what is named here, so that the world can
# be changed alone.
WORLD = {
    "data": {"diffusion.batches"},
    "pictures": set(),
    "archives": set(),
    "arrays": {"diffusion.ingest.archives"},
    "downloads": {"diffusion.ingest.archives"},
    "sources": {f"diffusion.ingest.{name}" for name in ("archives", "arrays", "downloads")},
    "crew": set(),
    "records": set(),
    "prepare": {f"diffusion.ingest.{name}" for name in ("crew", "pictures", "records", "sources")},
    "checkpoint": {"diffusion.digests", "diffusion.hush"},
    "digests": set(),
    "hush": set(),
    "convert": {"diffusion.weights.layers", "diffusion.weights.names"},
    "diffusers_config": set(),
    "log": set(),
    "figures": set(),
    "sheets": {"diffusion.figures"},
    "plots": {"diffusion.figures"},
    "checks": set(),
    "layers": {"diffusion.weights.checks"},
    "pytorch": {"diffusion.weights.checks"},
    "tensorflow": {"diffusion.weights.checks"},
    "tensors": {"diffusion.weights.checks"},
    "names": set(),
    "crc32c": set(),
    "bundle": {"diffusion.weights.checks", "diffusion.weights.crc32c"},
    "inputs": {"diffusion.convert", "diffusion.diffusers_config", "diffusion.weights"},
    "files": {"diffusion.weights", "diffusion.ingest.archives", "diffusion.ingest.downloads"},
}
LAYERS = {
    # With its entropy coder, once there is one.
    "codec": {"numpy", "diffusion.rec", "diffusion.process", "diffusion.targets"},
    "rec": {"numpy", "diffusion.process", "diffusion.targets"},
    "winograd": {"jax"},
    "ops": {"jax", "diffusion.winograd"},
    "unet": {"jax", "flax.linen", "diffusion.ops"},
    "inception": {"jax", "flax.linen", "numpy"},
    "train": {"jax", "optax", "numpy", "scipy"},
    "guard": {"jax", "numpy"},
    "batches": {"jax", "numpy"},
    "features": {"jax", "numpy"},
    "moments": {"numpy"},
    "pairs": {"jax", "numpy"},
    "metrics": {"jax", "numpy", "scipy", "diffusion.moments", "diffusion.pairs"},
}
for row in (TRUNK, *(TRUNK + branch for branch in BRANCHES)):
    for i, name in enumerate(row):
        LAYERS[name] = {"numpy", "jax"} | {f"diffusion.{earlier}" for earlier in row[:i]}
LAYERS["ode"] |= {"scipy"}  # its adaptive solver

# The only files that see flags and configs: together they are main.
TOP = {"main", "experiment", "settings", "claim", "watch", "preflight", "replay", "bench"}
TOP |= {"likelihoods", "sampling", "imagesets", "evaluate", "frontier", "illustrate", "studio"}
TOP |= {"transfer", "card", "preparation", "pages"}
# flax and absl by their bare names would reach what is refused.
NOT_IN_DIFFUSION = {"flax.linen", "absl.flags", "ml_collections", "configs", "tests", *TOP}
NOT_IN_DIFFUSION_BARE = {"flax", "absl", "diffusion"}
# TensorFlow takes half a minute and a GPU's memory; a pickle runs whatever code it holds.
NOWHERE = {"tensorflow", "pickle", "_pickle", "cloudpickle", "dill", "shelve"}
# What is known to break a rule, and why it may: exactly these.
EXCEPTIONS = {("diffusion/log.py", "absl.flags")}  # reads whether absl's own --verbosity was given


def within(name, allowed):
    """Is `name` one of `allowed` or inside of one: jax.numpy is inside jax."""
    return any(name == a or name.startswith(a + ".") for a in allowed)


def imports(source, package):
    """Full names of all that a file imports, in functions too; package: where it lives, "a.b"."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".") if node.level else []
            parts = parts[: len(parts) + 1 - node.level] + (node.module or "").split(".")
            module = ".".join(filter(None, parts))
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(
            ("__import__", "import_module")
        ):
            arguments = [a.value for a in node.args if isinstance(a, ast.Constant)]
            yield from (a for a in arguments if isinstance(a, str))


def refused(path, source):
    """The imports in a file of the repository that its layer does not allow. KeyError: no layer."""
    path = pathlib.PurePosixPath(path)
    names = set(imports(source, ".".join(path.parent.parts)))
    bad = {name for name in names if within(name, NOWHERE)}
    outside = {name for name in names if name.split(".")[0] not in sys.stdlib_module_names}
    if path.parent.parts == ("configs",):
        bad |= {name for name in names if not within(name, {"ml_collections", "configs"})}
    elif path.parts[0] == "diffusion" and path.stem in WORLD:
        outside -= {name for name in outside if within(name, WORLD[path.stem])}
        bad |= {name for name in outside if within(name, NOT_IN_DIFFUSION | {"diffusion"})}
        bad |= outside & NOT_IN_DIFFUSION_BARE
    elif path.parts[0] == "diffusion" and path.stem != "__init__":
        bad |= {name for name in outside if not within(name, LAYERS[path.stem])}
    elif path.stem == "__init__":
        bad |= names
    elif len(path.parts) == 1 and path.stem not in TOP:
        raise KeyError(path.stem)
    return bad


FILES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in ROOT.rglob("*.py")
    if not any(p.startswith(".") or p == "runs" for p in path.relative_to(ROOT).parts)
)


@pytest.mark.parametrize("path", FILES)
def test_layers(path):
    """A KeyError here: a new module, whose layer must be settled above."""
    bad = refused(path, (ROOT / path).read_text())
    assert {(path, name) for name in bad} == {known for known in EXCEPTIONS if known[0] == path}


def test_the_tree_is_walked():
    assert {"main.py", "diffusion/process.py", "tests/test_layers.py"} <= set(FILES)


@pytest.mark.parametrize(
    "path, source",
    [
        ("diffusion/process.py", "from diffusion import targets"),
        ("diffusion/process.py", "from diffusion.targets import Prediction"),
        ("diffusion/process.py", "from .targets import Prediction"),
        ("diffusion/process.py", "from . import targets"),
        ("diffusion/process.py", "import diffusion.targets as t"),
        ("diffusion/process.py", "def f():\n    import optax"),
        ("diffusion/losses.py", "from diffusion import samplers"),
        ("diffusion/samplers.py", "from diffusion import losses"),
        ("diffusion/samplers.py", "from flax import linen as nn"),
        ("diffusion/codec.py", "from diffusion.unet import UNet"),
        ("diffusion/unet.py", "from diffusion import process"),
        ("diffusion/train.py", "import flax.linen as nn"),
        ("diffusion/train.py", "from diffusion import losses"),
        ("diffusion/data.py", "from diffusion import log"),
        ("diffusion/data.py", "from diffusion import batches, train"),
        ("diffusion/ingest/sources.py", "from diffusion.ingest import prepare"),
        ("diffusion/ingest/pictures.py", "from diffusion import data"),
        ("diffusion/data.py", "from ml_collections import ConfigDict"),
        ("diffusion/data.py", "import settings"),
        ("diffusion/convert.py", "import flax"),
        ("diffusion/log.py", "from absl import flags"),
        ("diffusion/data.py", "import tensorflow as tf"),
        ("diffusion/data.py", "import tensorflow.data"),
        ("diffusion/data.py", "importlib.import_module('tensorflow')"),
        ("diffusion/checkpoint.py", "from pickle import loads"),
        ("diffusion/__init__.py", "from diffusion import unet"),
        ("configs/digits.py", "import numpy as np"),
        ("configs/digits.py", "from diffusion import schedules"),
        ("main.py", "import pickle"),
        ("tests/test_data.py", "import tensorflow"),
    ],
)
def test_what_is_refused(path, source):
    assert refused(path, source)


@pytest.mark.parametrize(
    "path, source",
    [
        ("diffusion/likelihood.py", "from diffusion.targets import Predict\nimport jax.numpy"),
        ("diffusion/losses.py", "from diffusion.likelihood import meanflat"),
        ("diffusion/unet.py", "import math\nfrom flax import linen as nn"),
        ("diffusion/data.py", "import tensorflow_datasets\nfrom PIL import Image"),
        ("diffusion/data.py", "from diffusion import batches"),
        ("diffusion/log.py", "from absl import logging"),
        ("diffusion/convert.py", "from flax import traverse_util"),
        ("configs/lsun_cat.py", "from ml_collections import ConfigDict\nfrom configs import x"),
        ("main.py", "from absl import flags\nfrom diffusion import unet"),
    ],
)
def test_what_is_allowed(path, source):
    assert not refused(path, source)


@pytest.mark.parametrize("path", ["diffusion/new.py", "new.py"])
def test_a_new_module_needs_a_layer(path):
    with pytest.raises(KeyError, match="new"):
        refused(path, "import math\nimport jax")
