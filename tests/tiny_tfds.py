"""A TFDS data set of a few random images in array_record layout, written without TensorFlow."""

import io

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image


def png(image):
    file = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, "png")
    return file.getvalue()


def write(data_dir, name, shape=(32, 32, 3), n=24, classes=10, damaged=False):
    """Writes data_dir/name/1.0.0 with splits train and test; returns {split: (image, label)}.

    damaged: the first image of test is none.
    """
    rng = np.random.default_rng(0)
    splits = {}
    for split in ("train", "test"):
        image = rng.integers(0, 256, (n, *shape), np.uint8)
        splits[split] = image, rng.integers(0, classes, n).astype(np.int32)

    class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=shape),
                "label": tfds.features.ClassLabel(num_classes=classes),
            }
            features = tfds.features.FeaturesDict(features)
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(split) for split in splits}

        def _generate_examples(self, split):
            for i, (image, label) in enumerate(zip(*splits[split], strict=True)):
                encoded = b"none" if damaged and split == "test" and not i else png(image)
                yield i, {"image": io.BytesIO(encoded), "label": int(label)}

    Tiny.name = name
    Tiny(data_dir=str(data_dir), file_format="array_record").download_and_prepare()
    return splits
