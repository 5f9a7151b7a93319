"""The networks whose features images are scored by: Inception, DINOv2, a classifier of the data."""

import io
import math
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from diffusion import convert, data, experiment
from diffusion.convert import files
from diffusion.convert.validation import integrity_errors
from diffusion.data.loader import load_dataset
from diffusion.experiment import Experiment
from diffusion.metrics import classifier, dinov2, inception
from diffusion.runtime import preemption
from diffusion.runtime.config import cache_dir
from diffusion.utils import digests, logging
from diffusion.utils.errors import DataError, DDPMError
from diffusion.utils.io import local_copy, save_npz
from diffusion.utils.multihost import barrier, is_primary
from diffusion.utils.progress import QUIET_S, Progress

CLASSIFIER_NUM, CLASSIFIER_BYTES = 20_000, 2**30  # of training images, at most


def load_inception(path: str) -> tuple[Any, str]:
    """Returns (the folded weights, "") or (None, why there are none)."""
    weights, problem = None, ""
    for turn in (True, False):  # process 0 downloads; the others then find the file
        if turn == is_primary():
            try:
                local = str(local_copy(path)) if path else ""
                arrays = convert.from_inception(
                    files.inception(local, str(cache_dir() / "weights"))
                )
                weights = jax.device_get(inception.fold(arrays))
            except (DDPMError, ValueError, OSError) as error:
                problem = str(error)
        barrier("inception weights")
    return weights, problem


def load_dinov2(path: str) -> tuple[Any, str, str]:
    """Returns (the parameters, the file's SHA-256, "") or (None, "", why there are none)."""
    if not path:
        how = "fetch model.safetensors of facebook/dinov2-large and give eval.dinov2=FILE"
        wanted = "expected the network's weights, for 'dinov2', found none"
        return None, "", f"eval.dinov2: {wanted}; {how}"
    try:
        file = local_copy(path).expanduser()
        arrays = files.read(file)
        with integrity_errors(path):
            params = convert.from_dinov2(arrays)
            digest = digests.sha256_of_file(file)
    except (DDPMError, OSError) as error:
        return None, "", f"eval.dinov2: {error}"
    unverified = f"its SHA-256 {digest[:16]}... is not compared with a published one"
    logging.info(f"weights    {dinov2.kind_of(params)} of {path}: {unverified}")
    return params, digest, ""


def has_classes(images: data.ImageDataset) -> bool:
    """Returns whether a classifier can learn the classes of these images."""
    large = min(images.shape[:2]) >= classifier.MIN_SIDE
    return images.num_classes > 1 and images.n >= classifier.MIN_IMAGES and large


def load_classifier(config: ConfigDict, exp: Experiment) -> Any:
    """Returns the classifier of the training split, from the cache or trained now.

    Raises ConfigError and DataError where the data are missing, too few or without classes.
    """
    images, c = experiment.load_split(config, exp), config.data
    if not has_classes(images):
        wanted = f"{classifier.MIN_IMAGES} images of 4x4 or more, in two classes or more"
        found = f"{images.n} of {images.shape[0]}x{images.shape[1]} in {images.num_classes}"
        message = f"expected {wanted}, for 'classifier', found {found}; leave it out"
        raise DataError(f"eval.features: {message}")
    digest = f"{data.fingerprint(images)}_{classifier.CLASSIFIER_VERSION}"
    name = f"{c.name or c.source}_{images.n}_{digest}".replace("/", "_")
    path = cache_dir() / "classifiers" / f"{name}.npz"
    for turn in (True, False):  # process 0 trains it; the others then find the file
        if turn == is_primary():
            found = _read_classifier(path) or _train_classifier(images, path)
        barrier("classifier")
    right = f"{found.accuracy:.1%} of {found.held_out:,} held-out images right"
    logging.info(f"classifier {right}, for the features of that name")
    return found.params


def _read_classifier(path: epath.Path) -> classifier.Classifier | None:
    try:
        with np.load(io.BytesIO(path.read_bytes())) as file:  # leaves no file open if it is cut
            params = {name: file[name] for name in file.files}
            accuracy, held_out = (params.pop(name).item() for name in ("accuracy", "held_out"))
            return classifier.Classifier(params, accuracy, held_out)
    except Exception:  # NumPy raises anything for a file that is no npz
        return None


def _train_classifier(images: data.ImageDataset, path: epath.Path) -> classifier.Classifier:
    """Trains on images chosen at random, since sets come sorted or with classes in turn."""
    n = min(images.n, CLASSIFIER_NUM, CLASSIFIER_BYTES // math.prod(images.shape))
    logging.info(f"training   a classifier of {images.num_classes} classes on {n:,} images")
    chosen = np.random.RandomState(0).permutation(images.n)[:n]
    subset = images._replace(n=n, read=lambda i: images.read(chosen[list(i)]))
    image, label = load_dataset(subset)
    with Progress(classifier.STEPS, unit="step", quiet_s=QUIET_S) as progress:

        def on_step(done):
            progress(done)
            if jax.process_count() == 1:  # several stop together, and only one is here
                preemption.raise_if_requested()

        trained = classifier.train(image, label, images.num_classes, on_step=on_step)
    save_npz(path, accuracy=trained.accuracy, held_out=trained.held_out, **trained.params)
    return trained
