"""Features without downloaded weights, whose distances order models on one data set."""

import zlib
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

NUM_LAYERS = 4
WIDTH = 16  # channels of a layer
LEAKY_SLOPE = 0.2
MAX_SIDE = 16  # pixels of a side that `pixels` keeps
LAYOUT = "NHWC", "HWIO", "NHWC"


def _check_images(images: Array, shape: tuple[int, int, int]) -> None:
    if images.dtype != jnp.uint8 or images.ndim != 4 or images.shape[1:] != tuple(shape):
        found = f"{images.dtype}{list(images.shape)}"
        raise ValueError(f"images: expected uint8[b, {', '.join(map(str, shape))}], found {found}")


def _normal(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Returns standard normal numbers that depend on the name alone, on any version of NumPy."""
    return np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)


def _kernel(name: str, fan_in: int, out: int) -> np.ndarray:
    """Returns a He-scaled kernel [3, 3, in, out], with orthogonal outputs if out <= 9 in."""
    z = _normal(name, (9 * fan_in, out))
    if out <= len(z):
        q, r = np.linalg.qr(z)
        z = q * np.sign(np.diag(r)) * np.sqrt(len(z))  # QR leaves signs to the library
    gain = np.sqrt(2 / (1 + LEAKY_SLOPE**2) / len(z))
    return (gain * z).reshape(3, 3, fan_in, out).astype(np.float32)


def random_convolutions(shape: tuple[int, int, int]) -> Callable[[Array], Array]:
    """Returns uint8[b, h, w, c] -> float32[b, 128], features of a fixed random network.

    Four times a 3x3 convolution and a leaky ReLU, with 2x2 average pooling in between; a side of 1
    stays, an odd side loses its last pixel. Features are the means of each channel and of its
    square after every layer, so that small and large structures both count. Raises ValueError for
    h or w < 4 or c not 1 or 3, the returned function for images of another shape or type.
    """
    h, w, c = shape
    if min(h, w) < 4 or c not in (1, 3):
        raise ValueError(f"random convolutions: expected (h >= 4, w >= 4, 1 or 3), found {shape}")
    names = [f"random_convolutions/0/{i}" for i in range(NUM_LAYERS)]
    kernels = [_kernel(name, c if i == 0 else WIDTH, WIDTH) for i, name in enumerate(names)]
    biases = [_normal(f"{name}/bias", (WIDTH,)).astype(np.float32) for name in names]

    def features(images: Array) -> Array:
        _check_images(images, shape)
        x = images.astype(jnp.float32) / 127.5 - 1
        out = []
        for kernel, bias in zip(kernels, biases, strict=True):
            if out:
                size = (1, min(x.shape[1], 2), min(x.shape[2], 2), 1)
                total = lax.reduce_window(x, 0.0, lax.add, size, size, "VALID")
                x = total / (size[1] * size[2])
            x = lax.conv_general_dilated(
                x, kernel, (1, 1), "SAME", dimension_numbers=LAYOUT, precision="highest"
            )
            x = x + 0.5 * bias.reshape(1, 1, 1, WIDTH)
            x = jnp.where(x > 0, x, LEAKY_SLOPE * x)
            out += [x.mean((1, 2)), (x * x).mean((1, 2))]
        return jnp.concatenate(out, axis=1)

    return features


def pixels(shape: tuple[int, int, int]) -> Callable[[Array], Array]:
    """Returns uint8[b, h, w, c] -> float32[b, d], pixels in [0, 1], d = min(h, 16) min(w, 16) c.

    Longer sides are area-averaged to 16 pixels, because a covariance of more features than images
    is singular. The returned function raises ValueError for images of another shape or type.
    """
    rows, columns = (area_weights(size, min(size, MAX_SIDE)) for size in shape[:2])

    def features(images: Array) -> Array:
        _check_images(images, shape)
        x = images.astype(jnp.float32) / 255
        x = jnp.einsum("ih,bhwc,jw->bijc", rows, x, columns, precision="highest")
        return x.reshape(len(x), -1)

    return features


def area_weights(size: int, parts: int) -> np.ndarray:
    """Returns weights [parts, size] that average `size` pixels over equal parts of their extent."""
    edges = np.linspace(0, size, parts + 1)
    pixel = np.arange(size)
    low, high = np.maximum(edges[:-1, None], pixel), np.minimum(edges[1:, None], pixel + 1)
    return (np.maximum(high - low, 0) * parts / size).astype(np.float32)


FEATURES = {"random": random_convolutions, "pixels": pixels}
