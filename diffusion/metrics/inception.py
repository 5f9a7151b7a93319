"""The Inception network of FID (2015-12-05): features and logits, quirk for quirk.

    images 0..255 ── preprocess ── stem ── A A A ── B ── C C C C ── D ── E E ── mean ── logits
                          "64" "192" ┘             "spatial" ┘  └ "768"     "2048" ┘

It differs from the published Inception-v3: average pools do not count the padding, the last block
pools by maximum, and there are 1008 outputs. Layers have torch-fidelity's names. `fold` moves the
batch norms into the weights, so the network has no state and no modes. All is float32 with exact
products on every device, because reduced precision changes the FID.
"""

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array, lax

IMAGE_SIZE = 299  # every image is resized to it, as in training
PRECISION = lax.Precision.HIGHEST  # by default GPUs round factors to 10 bits and TPUs to 7
BATCH_NORM_EPSILON = 1e-3
NUM_CLASSES = 1008
SPATIAL_CHANNELS = 7  # 17 * 17 * 7 = 2023 numbers, about as many as "2048"


def preprocess(images: Array) -> Array:
    """Resizes images [b, h, w, 3] in 0..255 to the network's float32[b, 299, 299, 3] in [-1, 1).

    Images are uint8 or float; grey ones [b, h, w, 1] are repeated. The resize is TensorFlow 1's:
    bilinear, pixel i read at i * h / 299, without antialiasing; scores depend on it (Parmar et al.
    2022, arXiv:2104.11222). Then (x - 128) / 128. Raises ValueError for other shapes.
    """
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or 0 in images.shape:
        found = f"{images.dtype}{list(images.shape)}"
        raise ValueError(f"images: expected [b, h, w, 3] or [b, h, w, 1] in 0..255, found {found}")
    x = jnp.asarray(images, jnp.float32)
    x = _resize(_resize(x, axis=2), axis=1)  # columns first, which rounds as TensorFlow does
    return (jnp.broadcast_to(x, (*x.shape[:3], 3)) - 128) / 128


def _resize(x, axis):
    size = x.shape[axis]
    position = np.arange(IMAGE_SIZE, dtype=np.float32) * np.float32(size / IMAGE_SIZE)
    low = position.astype(np.int32)
    fraction = jnp.expand_dims(position - low, [i for i in range(4) if i != axis])
    a, b = (jnp.take(x, i, axis) for i in (low, np.minimum(low + 1, size - 1)))
    return a + (b - a) * fraction


def fold(params: dict) -> dict:
    """Folds the batch norms into the weights, which gives the parameters of `Inception`.

    params: nested dicts as returned by `convert.from_inception`: {"kernel", "scale", "bias",
    "mean", "var"} for a convolution, {"kernel", "bias"} for the logits. With r = scale / sqrt(var +
    0.001), norm(conv(x)) = (conv(x) - mean) r + bias. Computed in float64, rounded once.
    """
    if "kernel" not in params:
        return {name: fold(child) for name, child in params.items()}
    if "var" not in params:
        return params
    p = {name: np.asarray(array, np.float64) for name, array in params.items()}
    r = p["scale"] / np.sqrt(p["var"] + BATCH_NORM_EPSILON)
    folded = {"kernel": p["kernel"] * r, "bias": p["bias"] - p["mean"] * r}
    return {name: array.astype(np.float32) for name, array in folded.items()}


class KernelAndBias(nn.Module):
    """The kernel, of `shape`, and bias of a layer, without its product: see `conv1x1`.

    Initialised as He et al. 2015 (arXiv:1502.01852), so that random features keep their scale.
    """

    shape: tuple[int, ...]

    @nn.compact
    def __call__(self):
        he = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
        kernel = self.param("kernel", he, self.shape)
        return kernel, self.param("bias", nn.initializers.zeros, self.shape[-1:])


def conv(x: Array, name: str, features: int, window=(3, 3), stride=1, padded=True) -> Array:
    """Returns relu(x * kernel + bias), [b, h, w, c] -> [b, h', w', features]."""
    kernel, bias = KernelAndBias((*window, x.shape[-1], features), name=name)()
    # On CPUs XLA is half as fast without any padding, so a column of zeros is added: with stride 2
    # no output reads it, with stride 1 the output that does is cut off.
    padding, extra = ("SAME", 0) if padded else ([(0, 0), (0, 1)], stride == 1)
    layout = ("NHWC", "HWIO", "NHWC")
    x = lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=layout, precision=PRECISION
    )
    return nn.relu(x[:, :, : x.shape[2] - extra] + bias[None, None, None])


def conv1x1(x: Array, **features: int) -> list[Array]:
    """Returns relu(x * kernel + bias) of several 1x1 convolutions of x, by one product.

    "branch_pool", always the last, is of `average_pool(x)`: pooling commutes with the product, and
    is cheaper after it.
    """
    weights = [KernelAndBias((1, 1, x.shape[-1], n), name=name)() for name, n in features.items()]
    kernel = jnp.concatenate([kernel[0, 0] for kernel, _ in weights], axis=-1)
    products = jnp.einsum("bhwc,cd->bhwd", x, kernel, precision=PRECISION)
    parts = jnp.split(products, np.cumsum(list(features.values()))[:-1], axis=-1)
    if "branch_pool" in features:
        parts[-1] = average_pool(parts[-1])
    return [nn.relu(y + b[None, None, None]) for y, (_, b) in zip(parts, weights, strict=True)]


def average_pool(x: Array) -> Array:
    """Averages the 3x3 neighbourhood of each pixel, without the padding in the count."""
    return _sum_3x3(x) / _sum_3x3(jnp.ones((1, *x.shape[1:3], 1)))


def _sum_3x3(x):
    for axis in (1, 2):
        n = x.shape[axis]
        padded = jnp.pad(x, [(int(i == axis),) * 2 for i in range(4)])
        x = sum(lax.slice_in_dim(padded, i, i + n, axis=axis) for i in range(3))
    return x


def max_pool(x: Array, stride: int = 2) -> Array:
    """Takes the maximum over 3x3 pixels, with padding for stride 1 only."""
    return nn.max_pool(x, (3, 3), (stride, stride), "VALID" if stride == 2 else "SAME")


class InceptionA(nn.Module):
    """Maps [b, 35, 35, c] to [b, 35, 35, 224 + pool_features]."""

    pool_features: int

    @nn.compact
    def __call__(self, x):
        one, five, double, pool = conv1x1(
            x, branch1x1=64, branch5x5_1=48, branch3x3dbl_1=64, branch_pool=self.pool_features
        )
        five = conv(five, "branch5x5_2", 64, (5, 5))
        double = conv(double, "branch3x3dbl_2", 96)
        double = conv(double, "branch3x3dbl_3", 96)
        return jnp.concatenate([one, five, double, pool], axis=-1)


class InceptionB(nn.Module):
    """Maps [b, 35, 35, 288] to [b, 17, 17, 768]."""

    @nn.compact
    def __call__(self, x):
        three = conv(x, "branch3x3", 384, stride=2, padded=False)
        (double,) = conv1x1(x, branch3x3dbl_1=64)
        double = conv(double, "branch3x3dbl_2", 96)
        double = conv(double, "branch3x3dbl_3", 96, stride=2, padded=False)
        return jnp.concatenate([three, double, max_pool(x)], axis=-1)


class InceptionC(nn.Module):
    """Maps [b, 17, 17, 768] to the same shape, with `width` channels inside the branches."""

    width: int

    @nn.compact
    def __call__(self, x):
        c = self.width
        one, seven, double, pool = conv1x1(
            x, branch1x1=192, branch7x7_1=c, branch7x7dbl_1=c, branch_pool=192
        )
        seven = conv(seven, "branch7x7_2", c, (1, 7))
        seven = conv(seven, "branch7x7_3", 192, (7, 1))
        for i, width in enumerate((c, c, c, 192), start=2):
            double = conv(double, f"branch7x7dbl_{i}", width, (7, 1) if i % 2 == 0 else (1, 7))
        return jnp.concatenate([one, seven, double, pool], axis=-1)


class InceptionD(nn.Module):
    """Maps [b, 17, 17, 768] to [b, 8, 8, 1280]."""

    @nn.compact
    def __call__(self, x):
        three, seven = conv1x1(x, branch3x3_1=192, branch7x7x3_1=192)
        three = conv(three, "branch3x3_2", 320, stride=2, padded=False)
        seven = conv(seven, "branch7x7x3_2", 192, (1, 7))
        seven = conv(seven, "branch7x7x3_3", 192, (7, 1))
        seven = conv(seven, "branch7x7x3_4", 192, stride=2, padded=False)
        return jnp.concatenate([three, seven, max_pool(x)], axis=-1)


class InceptionE(nn.Module):
    """Maps [b, 8, 8, c] to [b, 8, 8, 2048]; the last block pools by maximum, an error of 2015."""

    pool_by_maximum: bool

    @nn.compact
    def __call__(self, x):
        widths = {"branch1x1": 320, "branch3x3_1": 384, "branch3x3dbl_1": 448}
        if self.pool_by_maximum:
            one, three, double = conv1x1(x, **widths)
            pool = conv(max_pool(x, stride=1), "branch_pool", 192, (1, 1), padded=False)
        else:
            one, three, double, pool = conv1x1(x, **widths, branch_pool=192)
        double = conv(double, "branch3x3dbl_2", 384)
        parts = [
            conv(part, name, 384, window)
            for part, branch in ((three, "branch3x3_2"), (double, "branch3x3dbl_3"))
            for name, window in ((f"{branch}a", (1, 3)), (f"{branch}b", (3, 1)))
        ]
        return jnp.concatenate([one, *parts, pool], axis=-1)


class Inception(nn.Module):
    """Returns features by `apply({"params": fold(...)}, preprocess(images))`."""

    @nn.compact
    def __call__(self, x):
        """Returns all features {name: float32[b, n]} of x, float32[b, 299, 299, 3] in [-1, 1).

        "64", "192", "768": spatial means after the two max pools and after the last 17x17 block.
        "2048": the mean of the last block, for FID, KID and precision/recall.
        "logits", and "logits_unbiased" without their bias, for the Inception Score.
        "spatial": the first 7 channels of the fourth 17x17 map (the graph's `mixed_6/conv`, of
            Mixed_6d's 1x1 branch), for sFID (Nash et al. 2021, arXiv:2103.03841), as in the
            evaluator of Dhariwal and Nichol 2021 (arXiv:2105.05233).
        Raises ValueError for other shapes.
        """
        if x.ndim != 4 or x.shape[1:] != (IMAGE_SIZE, IMAGE_SIZE, 3):
            expected = f"float[b, {IMAGE_SIZE}, {IMAGE_SIZE}, 3] of `preprocess`"
            raise ValueError(f"x: expected {expected}, found {x.dtype}{list(x.shape)}")
        features = {}
        x = conv(x, "Conv2d_1a_3x3", 32, stride=2, padded=False)
        x = conv(x, "Conv2d_2a_3x3", 32, padded=False)
        x = max_pool(conv(x, "Conv2d_2b_3x3", 64))
        features["64"] = x.mean((1, 2))
        (x,) = conv1x1(x, Conv2d_3b_1x1=80)
        x = max_pool(conv(x, "Conv2d_4a_3x3", 192, padded=False))
        features["192"] = x.mean((1, 2))
        for name, pool_features in (("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)):
            x = InceptionA(pool_features, name=name)(x)
        x = InceptionB(name="Mixed_6a")(x)
        for name, width in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160)):
            x = InceptionC(width, name=name)(x)
        features["spatial"] = x[..., :SPATIAL_CHANNELS].reshape(len(x), -1)
        x = InceptionC(192, name="Mixed_6e")(x)
        features["768"] = x.mean((1, 2))
        x = InceptionD(name="Mixed_7a")(x)
        x = InceptionE(pool_by_maximum=False, name="Mixed_7b")(x)
        x = InceptionE(pool_by_maximum=True, name="Mixed_7c")(x)
        features["2048"] = x = x.mean((1, 2))
        kernel, bias = KernelAndBias((2048, NUM_CLASSES), name="fc")()
        features["logits_unbiased"] = jnp.dot(x, kernel, precision=PRECISION)
        features["logits"] = features["logits_unbiased"] + bias[None]
        return features
