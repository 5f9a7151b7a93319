"""TFDS data sets of a few images in array_record layout, written without TensorFlow."""

import io

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image


def png(image):
    """Encodes uint8[h, w, 1 or 3]."""
    file = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, "png")
    return file.getvalue()


def distinct_images(n, h=3, w=4, c=1):
    """Images no two of which are equal, nor any the mirror of another or of itself."""
    x = np.random.default_rng(0).integers(0, 256, (n, h, w, c), np.uint8)
    x[:, 0, 0, 0], x[:, 0, 1, 0] = np.arange(n) % 251, np.arange(n) // 251
    x[:, 0, -1, 0] = 251 + np.arange(n) % 5  # no first pixel is as large as this last one
    return x


def write_splits(data_dir, name, splits, shape, version="1.0.0", classes=10):
    """Writes {split: [(image, label)]} as data_dir/name/version, and returns that folder.

    An image is an array uint8[h, w, c], or bytes that are to pass for an encoded image.
    """
    features = {"image": tfds.features.Image(shape=shape)}
    if classes:
        features["label"] = tfds.features.ClassLabel(num_classes=classes)

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version(version)

        def _info(self):
            kinds = tfds.features.FeaturesDict(features)
            return tfds.core.DatasetInfo(builder=self, features=kinds)

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(split) for split in splits}

        def _generate_examples(self, split):
            for i, (image, label) in enumerate(splits[split]):
                encoded = image if isinstance(image, bytes) else png(image)
                yield i, {"image": io.BytesIO(encoded)} | ({"label": label} if classes else {})

    Builder.name = name
    Builder(data_dir=str(data_dir), file_format="array_record").download_and_prepare()
    return data_dir / name / version


def write_images(data_dir, name, images, shape, version="1.0.0", classes=7):
    """Writes a split train, in which image i is of class i % classes."""
    train = [(image, i % classes if classes else 0) for i, image in enumerate(images)]
    return write_splits(data_dir, name, {"train": train}, shape, version, classes)


def write(data_dir, name, shape=(32, 32, 3), n=24, classes=10, damaged=False):
    """Writes n random images for each of train and test; returns {split: (image, label)}.

    damaged: the first image of test is none.
    """
    rng = np.random.default_rng(0)
    arrays, splits = {}, {}
    for split in ("train", "test"):
        image = rng.integers(0, 256, (n, *shape), np.uint8)
        label = rng.integers(0, classes, n).astype(np.int32)
        arrays[split] = image, label
        splits[split] = list(zip(image, label.tolist(), strict=True))
    if damaged:
        splits["test"][0] = b"none", splits["test"][0][1]
    write_splits(data_dir, name, splits, shape, classes=classes)
    return arrays
