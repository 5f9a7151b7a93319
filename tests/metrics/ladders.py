"""Ladders: real images in rising degrees of one defect, which a good score puts in order.

    python -m tests.metrics.ladders [n] [seeds]

prints the table of docs/evaluation.md: for each score and ladder Kendall's tau between the score
and the degree, "!" if two degrees that are told apart are the wrong way round, and the first degree
that is told apart from the images as they are. Degrees are told apart where their scores differ by
three times the deviation over seeds, each of which draws its images anew, with replacement.
"""

import io
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from scipy import ndimage, stats

from diffusion import data, metrics, process, samplers, schedules, targets
from diffusion.metrics import classifier, extraction
from diffusion.metrics.feature_set import FeatureSet
from diffusion.sharding import data_mesh

NUM_REFERENCES = 797  # digits that a set is compared with, and that the classifier learns
SOLVER_STD = 0.02  # of the mixture's components, whose means are the references
FIRST_CHANGE = 3.0  # deviations
KINDS = "classifier", "random", "pixels"  # of features

Degrade = Callable[[np.ndarray, np.ndarray, float, np.random.Generator], np.ndarray]


class Digits(NamedTuple):
    """Two disjoint sets of real digits, uint8[n, 8, 8, 1], and the labels of the first."""

    reference: np.ndarray
    reference_label: np.ndarray
    others: np.ndarray
    label: np.ndarray


def load_digits() -> Digits:
    """Splits all 1,797 digits at random, always alike."""
    parts = [data.digits(split) for split in ("train", "test")]
    image, label = (
        np.concatenate(arrays)
        for arrays in zip(*(part.read(range(part.n)) for part in parts), strict=True)
    )
    order = np.random.RandomState(0).permutation(len(image))
    seen, rest = order[:NUM_REFERENCES], order[NUM_REFERENCES:]
    return Digits(image[seen], label[seen], image[rest], label[rest])


def to_bytes(x: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(x), 0, 255).astype(np.uint8)


def noise(image, label, degree, rng):
    """Adds Gaussian noise of a standard deviation of so many grey levels."""
    return to_bytes(image + degree * rng.standard_normal(image.shape))


def blur(image, label, degree, rng):
    """Convolves with a Gaussian whose standard deviation is so many pixels."""
    x = image.astype(np.float64)
    return to_bytes(ndimage.gaussian_filter(x, (0, degree, degree, 0), mode="nearest"))


def shift(image, label, degree, rng):
    """Moves by so many pixels up, down, left or right; what comes in is black."""
    out = np.zeros_like(image)
    for i, (axis, sign) in enumerate(zip(*rng.integers(0, 2, (2, len(image))), strict=True)):
        moved = np.roll(image[i], (2 * sign - 1) * degree, axis)
        edge = slice(0, degree) if sign else slice(len(moved) - degree, None)
        moved[(edge, slice(None)) if axis == 0 else (slice(None), edge)] = 0
        out[i] = moved
    return out


def jpeg(image, label, degree, rng):
    """Compresses as JPEG of quality 100 - degree."""
    out = np.empty_like(image)
    for i, x in enumerate(image):
        file = io.BytesIO()
        Image.fromarray(x[..., 0]).save(file, "JPEG", quality=round(100 - degree))
        out[i, ..., 0] = np.asarray(Image.open(file))
    return out


def contrast(image, label, degree, rng):
    """Moves all values towards the image's mean by this share."""
    mean = image.mean((1, 2, 3), keepdims=True)
    return to_bytes(mean + (1 - degree) * (image - mean))


def mixture(image, label, degree, rng):
    """Replaces this share of the images by patches of photographs."""
    from sklearn.datasets import load_sample_image

    photo = load_sample_image("china.jpg").mean(2)
    n, out = round(degree * len(image)), image.copy()
    rows, columns = (rng.integers(0, size - 8, n) for size in photo.shape)
    for i, (r, c) in enumerate(zip(rows, columns, strict=True)):
        out[i, ..., 0] = photo[r : r + 8, c : c + 8]
    return out


def dropped(image, label, degree, rng):
    """Leaves out so many of the ten classes, and repeats images of the others."""
    kept = np.flatnonzero(label >= degree)
    return image[np.resize(rng.permutation(kept), len(image))]


def duplicated(image, label, degree, rng):
    """Has only one in so many images, as often."""
    kept = rng.permutation(len(image))[: round(len(image) / degree)]
    return image[np.resize(kept, len(image))]


FIDELITY: dict[str, tuple[Degrade, tuple[float, ...]]] = {
    "noise": (noise, (0, 8, 16, 32, 64)),
    "blur": (blur, (0, 0.4, 0.6, 0.8, 1.2)),
    "shift": (shift, (0, 1, 2, 3, 4)),
    "JPEG": (jpeg, (0, 50, 75, 90, 97)),
    "contrast": (contrast, (0, 0.2, 0.4, 0.6, 0.8)),
    "mixture": (mixture, (0, 0.05, 0.1, 0.2, 0.5)),
}
COVERAGE: dict[str, tuple[Degrade, tuple[float, ...]]] = {
    "dropped": (dropped, (0, 1, 2, 4, 8)),
    "duplicated": (duplicated, (1, 2, 5, 20, 100)),
}
SOLVER_STEPS = (50, 12, 8, 5, 3)


def exact_samples(centres: np.ndarray, n: int, steps: int, seed: int) -> np.ndarray:
    """Draws by DDIM from a mixture of Gaussians around images with its exact denoiser.

    Fewer steps are worse, whatever a network has learnt: the solver's error alone is seen.
    """
    p = process.from_betas(schedules.linear(1000))
    flat = jnp.asarray(centres.reshape(len(centres), -1), jnp.float32) / 127.5 - 1

    def denoise(x, model_t):
        a = process.gather(p.alpha_bar, jnp.round(model_t).astype(jnp.int32) + 1)[:, None]
        x = x.reshape(len(x), -1)
        variance = a * SOLVER_STD**2 + 1 - a
        distance = ((x[:, None] - jnp.sqrt(a)[:, None] * flat[None]) ** 2).sum(-1)
        weights = jax.nn.softmax(-distance / (2 * variance), axis=1)
        mean = jnp.matmul(weights, flat)
        gain = jnp.sqrt(a) * SOLVER_STD**2 / variance
        return (mean + gain * (x - jnp.sqrt(a) * mean)).reshape(-1, *centres.shape[1:])

    target, variance = targets.TARGETS["x0"], targets.VARIANCES["fixed_small"]
    predict = targets.make_predict(p, denoise, target, variance, clip=False)
    sampler, ts = samplers.SAMPLERS["ddim"](p), samplers.GRIDS["uniform"](p, steps)
    key, key_x = jax.random.split(jax.random.key(seed))
    x_T = jax.random.normal(key_x, (n, *centres.shape[1:]))
    x = jax.jit(lambda x: samplers.sample(sampler, predict, key, x, ts))(x_T)
    return to_bytes((np.asarray(x) + 1) * 127.5)


def make_measure(
    digits: Digits, kinds: Sequence[str] = KINDS
) -> Callable[[np.ndarray], dict[str, float]]:
    """Builds uint8[n, 8, 8, 1] -> every score of METRICS by these kinds of features."""
    trained = classifier.train(digits.reference, digits.reference_label, 10)
    weights = {"classifier": trained.params}
    extractor = extraction.make_extractor(kinds, (8, 8, 1), data_mesh(), weights)

    def features(images) -> dict[str, FeatureSet]:
        image_set = extraction.image_set_from_array("ladder", images)
        return extraction.extract(image_set, extractor, 100, len(images), data_mesh())

    real = features(digits.reference)

    def measure(images):
        out: dict[str, float] = {}
        for kind, found in features(images).items():
            for name in metrics.applicable_metrics(found, real[kind], kind):
                if name == "fd_infinity":  # the same distance, extrapolated, in ten times the time
                    continue
                scores = metrics.evaluate(name, found, real[kind])
                values = {
                    metrics.metric_name(k, kind, len(images)): s.value for k, s in scores.items()
                }
                out |= {k: v if metrics.METRICS[name].lower else -v for k, v in values.items()}
        return out

    return measure


def climb(digits: Digits, n: int, seed: int) -> Iterator[tuple[str, float, np.ndarray]]:
    """Yields (ladder, degree, n images) of every ladder, from the least degree up."""
    for name, (degrade, degrees) in (FIDELITY | COVERAGE).items():
        for degree in degrees:
            rng = np.random.default_rng(seed)
            chosen = rng.integers(0, len(digits.others), n)
            yield name, degree, degrade(digits.others[chosen], digits.label[chosen], degree, rng)
    for steps in SOLVER_STEPS:
        yield "solver", -steps, exact_samples(digits.reference, n, steps, seed)


def kendall_tau(scores: np.ndarray) -> float:
    """Returns Kendall's tau between scores in the order of their degrees and these."""
    return round(float(stats.kendalltau(np.arange(len(scores)), scores).statistic), 9)


def measure_ladders(
    n: int, seeds: int, kinds: Sequence[str] = KINDS
) -> dict[str, dict[str, np.ndarray]]:
    """Returns {ladder: {score: float64[seeds, degrees]}}, higher is worse in every score."""
    digits = load_digits()
    measure = make_measure(digits, kinds)
    found: dict[str, dict[str, list]] = {}
    for seed in range(seeds):
        for ladder, _, images in climb(digits, n, seed):
            for score, value in measure(images).items():
                rows = found.setdefault(ladder, {}).setdefault(score, [[] for _ in range(seeds)])
                rows[seed].append(value)
    return {k: {s: np.array(rows) for s, rows in v.items()} for k, v in found.items()}


def main(n: int = 1000, seeds: int = 3) -> None:
    """Prints the table as Markdown."""
    found = measure_ladders(n, seeds)
    print(f"| n = {n} | " + " | ".join(found) + " |")
    print("| --- |" + " --- |" * len(found))
    for score in found["noise"]:
        cells = [cell(ladder, scores[score]) for ladder, scores in found.items()]
        print(f"| {score} | " + " | ".join(cells) + " |", flush=True)


def cell(ladder: str, values: np.ndarray) -> str:
    """Returns a cell of the table for values float64[seeds, degrees]."""
    mean, std = values.mean(0), values.std(0, ddof=1)
    gap = mean[:, None] - mean[None]  # of a degree and a lesser one, below the diagonal
    told = np.abs(gap) > FIRST_CHANGE * np.hypot(std[:, None], std[None])
    degrees = SOLVER_STEPS if ladder == "solver" else (FIDELITY | COVERAGE)[ladder][1]
    first = next((f"{d:g}" for d, yes in zip(degrees, told[:, 0], strict=True) if yes), "-")
    wrong = "!" * bool((np.tril(told) & (gap < 0)).any())
    return f"{kendall_tau(mean):.1f}{wrong} ({first})"


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
