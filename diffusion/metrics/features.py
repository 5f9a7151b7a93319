"""Features that need no downloaded weights: random convolutions, and the pixels themselves.

For tests, small or grey images and work without a network. Distances of such features order models
on one data set; they are not a FID, nor comparable with one, and metrics.label never calls them so.
"""

import zlib
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

Features = Callable[[Array], Array]  # uint8[b, h, w, c] -> float32[b, d]

STAGES = 4
SLOPE = 0.2  # of the leaky ReLU
GRID = 16  # pixels a side, at most


def _check(images: Array, shape: tuple[int, int, int]) -> None:
    if images.dtype != jnp.uint8 or images.ndim != 4 or images.shape[1:] != tuple(shape):
        found = f"{images.dtype}{list(images.shape)}"
        raise ValueError(f"images: expected uint8[b, {', '.join(map(str, shape))}], found {found}")


def _weights(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal numbers that follow from the name alone: RandomState's are fixed for good."""
    seed = zlib.crc32(name.encode())
    return np.random.RandomState(seed).standard_normal(shape)


def _kernel(name: str, fan_in: int, out: int) -> np.ndarray:
    """He-scaled 3x3 kernel [3, 3, in, out] for a leaky ReLU; orthogonal outputs where they fit."""
    z = _weights(name, (9 * fan_in, out))
    if out <= len(z):
        q, r = np.linalg.qr(z)
        z = q * np.sign(np.diag(r)) * np.sqrt(len(z))  # QR leaves signs to the library
    gain = np.sqrt(2 / (1 + SLOPE**2) / len(z))
    return (gain * z).reshape(3, 3, fan_in, out).astype(np.float32)


def random_convolutions(shape: tuple[int, int, int], d: int = 128, seed: int = 0) -> Features:
    """A fixed random network: (h, w, c) -> a function uint8[b, h, w, c] -> float32[b, d].

    Four times a 3x3 convolution and a leaky ReLU, then the mean over the image of each channel and
    of its square; in between, averages of 2x2 while two pixels are left. Small kernels early and
    wide sight later: textures, edges and shapes all show. Weights are a function of (c, d, seed).
    shape: h, w >= 4; c 1 or 3. d: a multiple of 8. Raises ValueError for others, and at the call
    for images of another shape or type.
    """
    h, w, c = shape
    if min(h, w) < 4 or c not in (1, 3):
        raise ValueError(f"random convolutions: expected (h >= 4, w >= 4, 1 or 3), found {shape}")
    if d < 1 or d % (2 * STAGES):
        raise ValueError(
            f"random convolutions: expected d in {2 * STAGES}, {4 * STAGES}, ..., found {d}"
        )
    width = d // (2 * STAGES)
    names = [f"random_convolutions/{seed}/{i}" for i in range(STAGES)]
    kernels = [_kernel(name, c if i == 0 else width, width) for i, name in enumerate(names)]
    biases = [_weights(f"{name}/bias", (width,)).astype(np.float32) for name in names]

    def features(images: Array) -> Array:
        _check(images, shape)
        x = images.astype(jnp.float32) / 127.5 - 1
        out = []
        for kernel, bias in zip(kernels, biases, strict=True):
            if out:
                x = _halved(x)
            x = lax.conv_general_dilated(
                x,
                kernel,
                (1, 1),
                "SAME",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                precision=lax.Precision.HIGHEST,
            )
            x = x + 0.5 * bias.reshape(1, 1, 1, width)
            x = jnp.where(x > 0, x, SLOPE * x)
            out += [x.mean((1, 2)), (x * x).mean((1, 2))]
        return jnp.concatenate(out, axis=1)

    return features


def _halved(x: Array) -> Array:
    """Averages of 2x2 pixels [b, h, w, c]; a side of one stays, an odd one loses its last."""
    _, h, w, _ = x.shape
    size = (1, min(h, 2), min(w, 2), 1)
    return lax.reduce_window(x, 0.0, lax.add, size, size, "VALID") / (size[1] * size[2])


def pixels(shape: tuple[int, int, int]) -> Features:
    """The pixels in [0, 1]: a function uint8[b, h, w, c] -> float32[b, d].

    Sides of more than 16 are averaged down to 16, in equal parts, since a covariance of all pixels
    of a large image has no rank: d = min(h, 16) min(w, 16) c. The call raises ValueError for images
    of another shape or type.
    """
    down = [_averages(size, min(size, GRID)) for size in shape[:2]]

    def features(images: Array) -> Array:
        _check(images, shape)
        x = images.astype(jnp.float32) / 255
        x = jnp.einsum("ih,bhwc,jw->bijc", down[0], x, down[1], precision="highest")
        return x.reshape(len(x), -1)

    return features


def _averages(size: int, parts: int) -> np.ndarray:
    """[parts, size]: row i averages pixels over [i, i + 1) size / parts, a cut one by its share."""
    edges = np.linspace(0, size, parts + 1)
    pixel = np.arange(size)
    low, high = np.maximum(edges[:-1, None], pixel), np.minimum(edges[1:, None], pixel + 1)
    return (np.maximum(high - low, 0) * parts / size).astype(np.float32)


FEATURES: dict[str, Callable[[tuple[int, int, int]], Features]] = {
    "random": random_convolutions,
    "pixels": pixels,
}
