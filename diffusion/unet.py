"""The U-Net of the paper (appendix B), layer for layer the official one (`models/unet.py`).

                         t (and y) ── temb, added inside every block
    x ── conv_in ── down_0 ── … ── down_L ── mid ── up_L ── … ── up_0 ── norm_out ── conv_out
            └──────────┴─── skips ────┴───────────────┴────────────┘

Each level halves the image on the way down and doubles it on the way up. Sub-modules are named by
the official variable scopes: `down_0/block_1/conv1` is that path in the parameter tree.

`dtype` is that of the convolutions and products. Parameters, time embedding, statistics of the
normalisations, softmax and output are float32 whatever it is.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from diffusion.kernels import ops

NEARLY_ZERO = 1e-10  # the official scale of what shall start at zero (last layer of every branch)


def init(scale: float = 1.0):
    """Initialiser of every kernel: U(±sqrt(3 scale / fan_avg)), fans counting the kernel's area.

    Source: official `nn.py`, `default_init`.
    """
    return nn.initializers.variance_scaling(scale, "fan_avg", "uniform")


def conv(
    features: int, name: str, dtype: Any, train: bool, stride: int = 1, scale: float = 1.0
) -> nn.Conv:
    """3x3 convolution, [b, h, w, c] -> [b, h / stride, w / stride, features].

    Padding is 'SAME' as in TensorFlow: with stride 2, at the bottom and right of an even size only.
    train: its gradient may take another way than XLA's, and then has no forward mode.
    Source: official `nn.py`, `conv2d`.
    """
    options = {"kernel_init": init(scale), "dtype": dtype, "name": name}
    options["conv_general_dilated"] = ops.convolve_in_training if train else ops.convolve
    return nn.Conv(features, (3, 3), stride, **options)


def dense(features: int, name: str, dtype: Any, scale: float = 1.0) -> nn.Dense:
    """[..., c] -> [..., features]. Source: official `nn.py`, `dense` and, on images, `nin`."""
    return nn.Dense(features, kernel_init=init(scale), dtype=dtype, name=name)


def same(x: jax.Array) -> jax.Array:
    """x."""
    return x


class GroupNorm(nn.Module):
    """`after` of the normalised [b, h, w, c] -> same, float32 inside and `dtype` as a result.

    32 groups where 32 divides c (official), else groups of four channels if 4 divides c: a group of
    one channel takes out again what the time added to it (so it does, officially, for c = 32).
    Source: official `normalize`.
    """

    dtype: Any
    after: Callable[[jax.Array], jax.Array]

    @nn.compact
    def __call__(self, x, train=False):
        c = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (c,))
        bias = self.param("bias", nn.initializers.zeros, (c,))
        groups = 32 if c % 32 == 0 else math.gcd(c, c // 4)
        normalise = ops.group_norm_in_training if train else ops.group_norm
        return normalise(x, scale, bias, groups, self.after, self.dtype)


def group_norm(
    h: jax.Array, name: str, dtype: Any, after: Callable = same, train: bool = False
) -> jax.Array:
    """`GroupNorm` inside of a module, its parameters under `name`."""
    return GroupNorm(dtype, after, name=name)(h, train)


def time_embedding(t: jax.Array, dim: int) -> jax.Array:
    """Sines, then cosines, of t [b] (int or float) at dim // 2 frequencies from 1 to 1/10000.

    Returns [b, dim] float32; an odd dim ends in a zero. Raises ValueError for dim < 4.
    Source: official `nn.py`, `get_timestep_embedding`.
    """
    if dim < 4:
        raise ValueError(f"the time embedding needs 4 channels or more, got {dim}: use a larger ch")
    half = dim // 2
    frequencies = jnp.exp(jnp.arange(half, dtype=jnp.float32) * (-math.log(10000) / (half - 1)))
    angles = t.astype(jnp.float32)[:, None] * frequencies[None, :]
    embedding = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)
    return jnp.pad(embedding, ((0, 0), (0, dim % 2)))


class TimeEmbedding(nn.Module):
    """t [b] -> [b, 4 ch] float32. Source: official `model`, scope 'temb'."""

    ch: int

    @nn.compact
    def __call__(self, t):
        temb = dense(4 * self.ch, "dense0", jnp.float32)(time_embedding(t, self.ch))
        return dense(4 * self.ch, "dense1", jnp.float32)(nn.swish(temb))


class ResBlock(nn.Module):
    """x [b, h, w, c], temb [b, 4 ch] -> [b, h, w, out_ch]. Source: official `resnet_block`."""

    out_ch: int
    dropout: float
    dtype: Any

    @nn.compact
    def __call__(self, x, temb, train):
        h = group_norm(x, "norm1", self.dtype, nn.swish, train)
        h = conv(self.out_ch, "conv1", self.dtype, train)(h)
        h += dense(self.out_ch, "temb_proj", self.dtype)(nn.swish(temb))[:, None, None, :]
        h = group_norm(h, "norm2", self.dtype, nn.swish, train)
        h = nn.Dropout(self.dropout, name="dropout")(h, deterministic=not train)
        h = conv(self.out_ch, "conv2", self.dtype, train, scale=NEARLY_ZERO)(h)
        if x.shape[-1] != self.out_ch:
            x = dense(self.out_ch, "nin_shortcut", self.dtype)(x)
        return x + h


class Attention(nn.Module):
    """All pixels to all pixels, one head, [b, h, w, c] -> same. Source: official `attn_block`."""

    dtype: Any

    @nn.compact
    def __call__(self, x, train):
        b, _, _, c = x.shape
        h = group_norm(x, "norm", self.dtype, train=train)
        q, k, v = (dense(c, name, self.dtype)(h).reshape(b, -1, c) for name in "qkv")
        h = ops.attention(q, k, v).reshape(x.shape)
        return x + dense(c, "proj_out", self.dtype, scale=NEARLY_ZERO)(h)


class Downsample(nn.Module):
    """[b, h, w, c] -> [b, h / 2, w / 2, c]. Source: official `downsample`."""

    dtype: Any

    @nn.compact
    def __call__(self, h, train):
        return conv(h.shape[-1], "conv", self.dtype, train, stride=2)(h)


class Upsample(nn.Module):
    """Nearest neighbour and a convolution, [b, h, w, c] -> [b, 2h, 2w, c]. Source: `upsample`."""

    dtype: Any

    @nn.compact
    def __call__(self, h, train):
        return conv(h.shape[-1], "conv", self.dtype, train)(h.repeat(2, axis=1).repeat(2, axis=2))


class Down(nn.Module):
    """One level down: h, temb -> (h, skips), the skips being every output on the way."""

    ch: int
    num_res_blocks: int
    attention: bool
    downsample: bool
    block: Callable[..., nn.Module]
    dtype: Any

    @nn.compact
    def __call__(self, h, temb, train):
        skips = []
        for i in range(self.num_res_blocks):
            h = self.block(self.ch, name=f"block_{i}")(h, temb, train)
            h = Attention(self.dtype, name=f"attn_{i}")(h, train) if self.attention else h
            skips.append(h)
        if self.downsample:
            h = Downsample(self.dtype, name="downsample")(h, train)
            skips.append(h)
        return h, skips


class Middle(nn.Module):
    """Block, attention (whatever the resolution), block: h [b, h, w, ch], temb -> same shape."""

    ch: int
    block: Callable[..., nn.Module]
    dtype: Any

    @nn.compact
    def __call__(self, h, temb, train):
        h = self.block(self.ch, name="block_1")(h, temb, train)
        h = Attention(self.dtype, name="attn_1")(h, train)
        return self.block(self.ch, name="block_2")(h, temb, train)


class Up(nn.Module):
    """One level up: h, temb, skips (one per block, in order of use) -> h."""

    ch: int
    attention: bool
    upsample: bool
    block: Callable[..., nn.Module]
    dtype: Any

    @nn.compact
    def __call__(self, h, temb, skips, train):
        for i, skip in enumerate(skips):
            h = jnp.concatenate([h, skip], axis=-1)
            h = self.block(self.ch, name=f"block_{i}")(h, temb, train)
            h = Attention(self.dtype, name=f"attn_{i}")(h, train) if self.attention else h
        return Upsample(self.dtype, name="upsample")(h, train) if self.upsample else h


class UNet(nn.Module):
    """The network of the paper; the defaults are its CIFAR-10 one, with 35,746,307 parameters.

    ch: channels of the first level, 4 or more. ch_mult: level i has ch * ch_mult[i] of them. Levels
        of 32 are better avoided: see `group_norm`.
    num_res_blocks: blocks per level on the way down; one more on the way up.
    attn_resolutions: attention is in the levels whose *longer* side is listed here: on squares the
        official rule, and never attention there over more than that number squared of pixels.
    dropout: rate inside the blocks. out_ch: output channels, the image's, or twice that number for
        a learned variance. dtype: float32 or bfloat16, as a dtype or its name.
    num_classes: 0 (the paper), or the number of labels; one more label, num_classes, then means
        "no class", for classifier-free guidance.
    remat: on the way back every block is computed again from its input, in training: a third more
        arithmetic, and room for images or batches that would not fit.
    """

    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 2, 2, 2)
    num_res_blocks: int = 2
    attn_resolutions: tuple[int, ...] = (16,)
    dropout: float = 0.1
    out_ch: int = 3
    num_classes: int = 0
    dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, x, t, y=None, *, train):
        """The network's output at the noisy images x and their times t.

        x: [b, h, w, c] float, data in [-1, 1] plus noise; h and w divisible by 2^(levels - 1).
        t: [b] int or float, what the network is told of the time; goes in as it is.
        y: [b] int in 0..num_classes; None is "no class". A label beyond gives NaN.
        train: drop out, with the 'dropout' key.
        Returns [b, h, w, out_ch] float32. Raises ValueError for other shapes or types, and for y
        given to a network without classes. Source: paper appendix B, official `model`.
        """
        self._check(x, t, y)
        dtype, levels = jnp.dtype(self.dtype), range(len(self.ch_mult))
        block = nn.remat(ResBlock, static_argnums=(3,)) if self.remat else ResBlock  # 3: train
        block = functools.partial(block, dropout=self.dropout, dtype=dtype)
        ch = [self.ch * mult for mult in self.ch_mult]
        attention = [max(x.shape[1:3]) // 2**i in self.attn_resolutions for i in levels]

        temb = TimeEmbedding(self.ch, name="temb")(t)
        if self.num_classes:
            y = jnp.full(t.shape, self.num_classes) if y is None else y
            # Scaled as if one-hot labels had unit variance (EDM): class and time weigh the same.
            rows = self.num_classes + 1
            temb += nn.Embed(rows, 4 * self.ch, embedding_init=init(rows), name="class_emb")(y)

        h = conv(self.ch, "conv_in", dtype, train)(x)
        skips = [h]
        for i in levels:
            args = ch[i], self.num_res_blocks, attention[i], i < levels[-1], block, dtype
            h, outputs = Down(*args, name=f"down_{i}")(h, temb, train)
            skips += outputs
        h = Middle(ch[-1], block, dtype, name="mid")(h, temb, train)
        for i in reversed(levels):
            last = [skips.pop() for _ in range(self.num_res_blocks + 1)]
            up = Up(ch[i], attention[i], i > 0, block, dtype, name=f"up_{i}")
            h = up(h, temb, last, train)
        # Float32 here, or bfloat16 would round the output itself to three digits.
        h = group_norm(h, "norm_out", jnp.float32, nn.swish, train)
        return conv(self.out_ch, "conv_out", jnp.float32, train, scale=NEARLY_ZERO)(h)

    def _check(self, x, t, y):
        if x.ndim != 4 or not jnp.issubdtype(x.dtype, jnp.floating):
            got = f"{x.dtype}{list(x.shape)}"
            raise ValueError(f"x must be images, float [b, h, w, c] in [-1, 1], got {got}")
        (b, height, width, _), multiple = x.shape, 2 ** (len(self.ch_mult) - 1)
        if height % multiple or width % multiple:
            raise ValueError(
                f"a network of {len(self.ch_mult)} levels needs height and width divisible by "
                f"{multiple}, got {height}x{width}: resize or crop the images, or use fewer levels"
            )
        if jnp.shape(t) != (b,):
            raise ValueError(f"t must be one time per image, shape [{b}], got {list(jnp.shape(t))}")
        if y is not None and not self.num_classes:
            raise ValueError("y was given to a network without classes: set num_classes, or omit y")
        if y is not None and (y.shape != (b,) or not jnp.issubdtype(y.dtype, jnp.integer)):
            got = f"{y.dtype}{list(y.shape)}"
            raise ValueError(f"y must be one integer label per image, shape [{b}], got {got}")
