"""The network behind FID: Inception of 2015-12-05, features and logits, quirk for quirk.

    images 0..255 ── preprocess ── stem ── A A A ── B ── C C C C ── D ── E E ── mean ── logits
                          "64" "192" ┘             "spatial" ┘  └ "768"     "2048" ┘

It is not the Inception-v3 of the textbooks: average pools leave the padding out of their count, the
last block pools by maximum, there are 1008 outputs. Layers carry torch-fidelity's names. The batch
norms are part of the weights (`fold`): the network has no state and no modes. All is float32, on
every device: a FID from shorter products is another number.
"""

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array, lax

SIZE = 299  # what the network was trained on; every image is resized to it
PRECISION = lax.Precision.HIGHEST  # else GPUs round factors to 10 bits and TPUs to 7
EPSILON = 1e-3  # of the batch norms
CLASSES = 1008
SPATIAL = 7  # channels of "spatial": 17 * 17 * 7 = 2023 numbers, about as many as "2048"




def preprocess(images: Array) -> Array:
    """Images of any size -> what the network reads: float32[b, 299, 299, 3] in [-1, 1).

    images: [b, h, w, 3] in 0..255, uint8 or float; grey ones [b, h, w, 1] are repeated.
    TensorFlow 1's bilinear resize: pixel i is read at i * h / 299, with no shift by half a pixel
    and no smoothing, not even where the image shrinks. Scores depend on it (Parmar et al. 2022,
    arXiv 2104.11222). Then (x - 128) / 128, not rounded. Raises ValueError for other shapes.
    """
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or 0 in images.shape:
        found = f"{images.dtype}{list(images.shape)}"
        raise ValueError(f"expected images [b, h, w, 3] or [b, h, w, 1] in 0..255, found {found}")
    x = jnp.asarray(images, jnp.float32)
    x = _resized(_resized(x, axis=2), axis=1)  # columns first, as TensorFlow: the rounding is its
    return (jnp.broadcast_to(x, (*x.shape[:3], 3)) - 128) / 128


def _resized(x: Array, axis: int) -> Array:
    """One axis of the bilinear resize."""
    size = x.shape[axis]
    at = np.arange(SIZE, dtype=np.float32) * np.float32(size / SIZE)
    low = at.astype(np.int32)
    shape = [SIZE if i == axis else 1 for i in range(x.ndim)]
    share = jnp.asarray((at - low).reshape(shape))
    a, b = (jnp.take(x, i, axis) for i in (low, np.minimum(low + 1, size - 1)))
    return a + (b - a) * share




def fold(params: dict) -> dict:
    """Weights with batch norms -> the parameters of `Inception`, the same function without them.

    params: nested dicts as of `convert.from_inception`: {"kernel", "scale", "bias", "mean", "var"}
    for a convolution, {"kernel", "bias"} for the logits. Computed in float64, rounded once.
    Norm(conv(x)) = (conv(x) - mean) * r + bias, r = scale / sqrt(var + 0.001), so the kernel takes
    r, and the bias what is left.
    """
    if "var" not in params:
        is_layer = "kernel" in params
        return params if is_layer else {name: fold(part) for name, part in params.items()}
    kernel, scale, bias, mean, var = (
        np.asarray(params[name], np.float64) for name in ("kernel", "scale", "bias", "mean", "var")
    )
    r = scale / np.sqrt(var + EPSILON)
    return {
        "kernel": (kernel * r).astype(np.float32),
        "bias": (bias - mean * r).astype(np.float32),
    }


class Weights(nn.Module):
    """Kernel [h, w, c, features] and bias [features] of a convolution; [c, features] of the logits.

    Apart from the product, so that several kernels can be one factor. Initialised as He et al. 2015
    (arXiv 1502.01852), which keeps the scale through the network: what random features are made of.
    """

    shape: tuple[int, ...]

    @nn.compact
    def __call__(self):
        he = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
        kernel = self.param("kernel", he, self.shape)
        return kernel, self.param("bias", nn.initializers.zeros, self.shape[-1:])




def activated(x: Array, bias: Array) -> Array:
    """relu(x + bias), [b, h, w, c] and [c]."""
    return nn.relu(x + bias[None, None, None])


def conv(x: Array, name: str, features: int, window=(3, 3), stride=1, padded=True) -> Array:
    """relu(x * kernel + bias): [b, h, w, c] -> [b, h', w', features]."""
    kernel, bias = Weights((*window, x.shape[-1], features), name=name)()
    # Without any padding XLA takes another way on CPUs, half as fast. A column of zeros spares it:
    # with stride 2 no output reads it, with stride 1 the one that does is cut off.
    pad, spare = ("SAME", 0) if padded else ([(0, 0), (0, 1)], stride == 1)
    layout = ("NHWC", "HWIO", "NHWC")
    x = lax.conv_general_dilated(
        x, kernel, (stride, stride), pad, dimension_numbers=layout, precision=PRECISION
    )
    return activated(x[:, :, : x.shape[2] - spare], bias)


def pointwise(x: Array, **features: int) -> list[Array]:
    """relu(x * kernel + bias) of 1x1 convolutions: [b, h, w, c] -> [b, h, w, features] each.

    They read the same x, so they are one product. That of the name "branch_pool" reads the average
    around each pixel; an average and a 1x1 product may change places, and then there is less to
    average.
    """
    weights = [Weights((1, 1, x.shape[-1], n), name=name)() for name, n in features.items()]
    kernel = jnp.concatenate([kernel[0, 0] for kernel, _ in weights], axis=-1)
    products = jnp.einsum("bhwc,cd->bhwd", x, kernel, precision=PRECISION)
    parts = jnp.split(products, np.cumsum(list(features.values()))[:-1], axis=-1)
    return [
        activated(average(part) if name == "branch_pool" else part, bias)
        for name, part, (_, bias) in zip(features, parts, weights, strict=True)
    ]


def average(x: Array) -> Array:
    """Mean over the 3x3 pixels around each one that are inside the image, [b, h, w, c] -> same."""
    for axis in (1, 2):
        n = x.shape[axis]
        edge = [(int(i == axis),) * 2 for i in range(x.ndim)]
        padded = jnp.pad(x, edge)
        total = sum(lax.slice_in_dim(padded, i, i + n, axis=axis) for i in range(3))
        count = 3 - (np.arange(n) == 0) - (np.arange(n) == n - 1)
        shape = [n if i == axis else 1 for i in range(x.ndim)]
        x = total / jnp.asarray(count.reshape(shape), x.dtype)
    return x


def maximum(x: Array, stride: int = 2) -> Array:
    """Maximum over 3x3 pixels: of stride 2 without padding, of stride 1 with it."""
    return nn.max_pool(x, (3, 3), (stride, stride), "VALID" if stride == 2 else "SAME")




class A(nn.Module):
    """[b, 35, 35, c] -> [b, 35, 35, 224 + pool]."""

    pool: int

    @nn.compact
    def __call__(self, x):
        one, five, double, pool = pointwise(
            x, branch1x1=64, branch5x5_1=48, branch3x3dbl_1=64, branch_pool=self.pool
        )
        five = conv(five, "branch5x5_2", 64, (5, 5))
        double = conv(double, "branch3x3dbl_2", 96)
        double = conv(double, "branch3x3dbl_3", 96)
        return jnp.concatenate([one, five, double, pool], axis=-1)


class B(nn.Module):
    """[b, 35, 35, 288] -> [b, 17, 17, 768]."""

    @nn.compact
    def __call__(self, x):
        three = conv(x, "branch3x3", 384, stride=2, padded=False)
        (double,) = pointwise(x, branch3x3dbl_1=64)
        double = conv(double, "branch3x3dbl_2", 96)
        double = conv(double, "branch3x3dbl_3", 96, stride=2, padded=False)
        return jnp.concatenate([three, double, maximum(x)], axis=-1)


class C(nn.Module):
    """[b, 17, 17, 768] -> same. width: channels inside of the branches."""

    width: int

    @nn.compact
    def __call__(self, x):
        c = self.width
        one, seven, double, pool = pointwise(
            x, branch1x1=192, branch7x7_1=c, branch7x7dbl_1=c, branch_pool=192
        )
        seven = conv(seven, "branch7x7_2", c, (1, 7))
        seven = conv(seven, "branch7x7_3", 192, (7, 1))
        for i, window in enumerate([(7, 1), (1, 7), (7, 1)], start=2):
            double = conv(double, f"branch7x7dbl_{i}", c, window)
        double = conv(double, "branch7x7dbl_5", 192, (1, 7))
        return jnp.concatenate([one, seven, double, pool], axis=-1)


class D(nn.Module):
    """[b, 17, 17, 768] -> [b, 8, 8, 1280]."""

    @nn.compact
    def __call__(self, x):
        three, seven = pointwise(x, branch3x3_1=192, branch7x7x3_1=192)
        three = conv(three, "branch3x3_2", 320, stride=2, padded=False)
        seven = conv(seven, "branch7x7x3_2", 192, (1, 7))
        seven = conv(seven, "branch7x7x3_3", 192, (7, 1))
        seven = conv(seven, "branch7x7x3_4", 192, stride=2, padded=False)
        return jnp.concatenate([three, seven, maximum(x)], axis=-1)


class E(nn.Module):
    """[b, 8, 8, c] -> [b, 8, 8, 2048]. The last block's pool is a maximum: a slip of 2015, kept."""

    pool_by_maximum: bool

    @nn.compact
    def __call__(self, x):
        widths = {"branch1x1": 320, "branch3x3_1": 384, "branch3x3dbl_1": 448}
        if self.pool_by_maximum:
            one, three, double = pointwise(x, **widths)
            pool = conv(maximum(x, stride=1), "branch_pool", 192, (1, 1), padded=False)
        else:
            one, three, double, pool = pointwise(x, **widths, branch_pool=192)
        double = conv(double, "branch3x3dbl_2", 384)
        parts = [
            conv(part, name, 384, window)
            for part, branch in ((three, "branch3x3_2"), (double, "branch3x3dbl_3"))
            for name, window in ((f"{branch}a", (1, 3)), (f"{branch}b", (3, 1)))
        ]
        return jnp.concatenate([one, *parts, pool], axis=-1)


class Inception(nn.Module):
    """`apply({"params": fold(...)}, preprocess(images))` -> features, {name: float32[b, n]}."""

    @nn.compact
    def __call__(self, x):
        """All features of images x, float32[b, 299, 299, 3] in [-1, 1); jit keeps what is used.

        "64", "192", "768": spatial means after the two max pools and after the last 17x17 block.
        "2048": the mean of the last block: what FID, KID and precision/recall are computed on.
        "logits", and "logits_unbiased", 1008 without their bias: what the Inception Score takes.
        "spatial": 2023 = 17 * 17 * 7 numbers, the first 7 channels of the fourth 17x17 map (the
            graph's `mixed_6/conv`, of Mixed_6d's 1x1 branch), row by row: sFID (Nash et al. 2021,
            arXiv 2103.03841) as computed by the evaluator of Dhariwal and Nichol 2021 (arXiv
            2105.05233).
        Raises ValueError for other shapes.
        """
        if x.ndim != 4 or x.shape[1:] != (SIZE, SIZE, 3):
            raise ValueError(
                f"expected float images [b, {SIZE}, {SIZE}, 3] of `preprocess`, "
                f"found {x.dtype}{list(x.shape)}"
            )
        taps = {}
        x = conv(x, "Conv2d_1a_3x3", 32, stride=2, padded=False)
        x = conv(x, "Conv2d_2a_3x3", 32, padded=False)
        x = conv(x, "Conv2d_2b_3x3", 64)
        x = maximum(x)
        taps["64"] = x.mean((1, 2))
        (x,) = pointwise(x, Conv2d_3b_1x1=80)
        x = conv(x, "Conv2d_4a_3x3", 192, padded=False)
        x = maximum(x)
        taps["192"] = x.mean((1, 2))
        for name, pool in (("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)):
            x = A(pool, name=name)(x)
        x = B(name="Mixed_6a")(x)
        x = C(128, name="Mixed_6b")(x)
        x = C(160, name="Mixed_6c")(x)
        x = C(160, name="Mixed_6d")(x)
        taps["spatial"] = x[..., :SPATIAL].reshape(len(x), -1)
        x = C(192, name="Mixed_6e")(x)
        taps["768"] = x.mean((1, 2))
        x = D(name="Mixed_7a")(x)
        x = E(pool_by_maximum=False, name="Mixed_7b")(x)
        x = E(pool_by_maximum=True, name="Mixed_7c")(x)
        taps["2048"] = x = x.mean((1, 2))
        kernel, bias = Weights((2048, CLASSES), name="fc")()
        taps["logits_unbiased"] = jnp.dot(x, kernel, precision=PRECISION)
        taps["logits"] = taps["logits_unbiased"] + bias[None]
        return taps
