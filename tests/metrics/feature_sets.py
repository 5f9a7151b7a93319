"""Builds FeatureSets for the tests."""

import numpy as np

from diffusion.metrics import feature_set

CENTRES = 4 * np.random.RandomState(9).randn(5, 6)  # of five classes in six dimensions


def draw_features(n, seed):
    """Draws float64[n, 6] from five Gaussians of equal weight."""
    rng = np.random.RandomState(seed)
    return CENTRES[rng.randint(5, size=n)] + rng.randn(n, 6)


def logits_of(x):
    """Returns logits [n, 5]: sure of a near centre, undecided between equally far ones."""
    return -((x[:, None] - CENTRES) ** 2).sum(-1) / 20


def collect(batches, n, keep=10_000):
    """Returns the FeatureSet of n images from batches of (features [b, d], logits or None)."""
    found = None
    for features, logits in batches:
        if found is None:
            classes = 0 if logits is None else np.shape(logits)[-1]
            found = feature_set.begin(n, np.shape(features)[-1], keep, classes)
        found = feature_set.add(found, features, logits)
    return found


def collect_split(x, *edges, keep=10_000):
    """Returns the FeatureSet of x [n, 6] with its logits, in batches cut at `edges`."""
    parts = np.split(np.asarray(x, np.float32), edges)
    return collect(((part, logits_of(part)) for part in parts), len(x), keep)
