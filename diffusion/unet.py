"""The U-Net of the paper (appendix B), layer for layer the official one (`models/unet.py`).

                         t (and y) ── temb, added inside every block
    x ── conv_in ── down_0 ── … ── down_L ── mid ── up_L ── … ── up_0 ── norm_out ── conv_out
            └──────────┴─── skips ────┴───────────────┴────────────┘

Each level halves the resolution on the down path and doubles it on the up path. Sub-modules have
the names of the official variable scopes: `down_0/block_1/conv1` is a path in the parameter tree.

`dtype` is that of convolutions and matrix products. Parameters, time embedding, statistics of the
normalisations, softmax and output are always float32.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from diffusion.embeddings import fourier_features, time_embedding
from diffusion.kernels import group_norm
from diffusion.kernels.attention import attention


def default_init(scale: float = 1.0):
    """Returns the initialiser U(±sqrt(3 scale / fan_avg)). Source: official `default_init`."""
    return nn.initializers.variance_scaling(scale, "fan_avg", "uniform")


NEARLY_ZERO = default_init(1e-10)  # of the last layer of every residual branch, officially


class GroupNorm(nn.Module):
    """Group normalisation of [b, h, w, c] followed by `activation`, by the function `norm`.

    32 groups where 32 divides c (official `normalize`); else of four channels where 4 divides c, as
    one of a single channel would remove the time embedding again (it does, officially, for c = 32).
    """

    norm: Callable = group_norm.group_norm
    eps: float = group_norm.EPSILON
    dtype: Any = jnp.float32
    activation: Callable[[jax.Array], jax.Array] = jax.nn.identity

    @nn.compact
    def __call__(self, x):
        c = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (c,))
        bias = self.param("bias", nn.initializers.zeros, (c,))
        groups = 32 if c % 32 == 0 else math.gcd(c, c // 4)
        return self.norm(x, scale, bias, groups, self.activation, self.dtype, self.eps)


class TimeEmbedding(nn.Module):
    """Embeds times t [b] as float32[b, 4 ch]. Source: official `model`, scope 'temb'."""

    ch: int
    freq_shift: int = 1
    flip: bool = False

    @nn.compact
    def __call__(self, t):
        layer = partial(nn.Dense, 4 * self.ch, kernel_init=default_init())
        temb = layer(name="dense0")(time_embedding(t, self.ch, self.freq_shift, self.flip))
        return layer(name="dense1")(nn.swish(temb))


class ResBlock(nn.Module):
    """Maps x [b, h, w, c], temb [b, 4 ch] to [b, h, w, out_ch]. Source: `resnet_block`."""

    out_ch: int
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    dense: Callable[..., nn.Module]
    dropout: float
    scale_shift: bool = False

    @nn.compact
    def __call__(self, x, temb, train):
        h = self.norm(activation=nn.swish, name="norm1")(x)
        h = self.conv(self.out_ch, name="conv1")(h)
        temb_proj = self.dense(self.out_ch * (1 + self.scale_shift), name="temb_proj")
        temb = temb_proj(nn.swish(temb))[:, None, None, :]
        if self.scale_shift:
            scale, shift = jnp.split(temb, 2, axis=-1)
            h = nn.swish(self.norm(name="norm2")(h) * (1 + scale) + shift)
        else:
            h = self.norm(activation=nn.swish, name="norm2")(h + temb)
        h = nn.Dropout(self.dropout, name="dropout")(h, deterministic=not train)
        h = self.conv(self.out_ch, kernel_init=NEARLY_ZERO, name="conv2")(h)
        if x.shape[-1] != self.out_ch:
            x = self.dense(self.out_ch, name="nin_shortcut")(x)
        return x + h


class Attention(nn.Module):
    """Self-attention over all pixels of [b, h, w, c]. Source: `attn_block`, which has one head."""

    norm: Callable[..., nn.Module]
    dense: Callable[..., nn.Module]
    head_dim: int = 0

    @nn.compact
    def __call__(self, x):
        b, _, _, c = x.shape
        head_dim = self.head_dim or c
        if c % head_dim:
            raise ValueError(f"attention_head_dim: expected a divisor of {c}, found {head_dim}")
        h = self.norm(name="norm")(x)
        q, k, v = (self.dense(c, name=name)(h).reshape(b, -1, c) for name in "qkv")
        h = attention(q, k, v, c // head_dim).reshape(x.shape)
        return x + self.dense(c, kernel_init=NEARLY_ZERO, name="proj_out")(h)


class Downsample(nn.Module):
    """Strided convolution, [b, h, w, c] -> [b, h / 2, w / 2, c]. Source: official `downsample`."""

    conv: Callable[..., nn.Module]
    padding: int = 0  # 0: at the bottom and right only, as TensorFlow's 'SAME'; 1: on every side

    @nn.compact
    def __call__(self, h):
        return self.conv(h.shape[-1], strides=2, padding=self.padding or "SAME", name="conv")(h)


class Upsample(nn.Module):
    """Nearest neighbour and a convolution, [b, h, w, c] -> [b, 2h, 2w, c]. Source: `upsample`."""

    conv: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, h):
        return self.conv(h.shape[-1], name="conv")(h.repeat(2, axis=1).repeat(2, axis=2))


class Level(nn.Module):
    """Blocks of one resolution, with or without attention, then a resampling layer or none.

    Takes one skip per block, None on the down path, and returns the list of all outputs.
    """

    ch: int
    block: Callable[..., nn.Module]
    attention: Callable[..., nn.Module] | None
    resample: Callable[..., nn.Module] | None

    @nn.compact
    def __call__(self, h, temb, skips, train):
        outputs = []
        for i, skip in enumerate(skips):
            h = h if skip is None else jnp.concatenate([h, skip], axis=-1)
            h = self.block(self.ch, name=f"block_{i}")(h, temb, train)
            h = self.attention(name=f"attn_{i}")(h) if self.attention else h
            outputs.append(h)
        return [*outputs, self.resample()(h)] if self.resample else outputs


class Middle(nn.Module):
    """Applies a block, attention at any resolution, and a block: h, temb -> h."""

    ch: int
    block: Callable[..., nn.Module]
    attention: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, h, temb, train):
        h = self.block(self.ch, name="block_1")(h, temb, train)
        h = self.attention(name="attn_1")(h)
        return self.block(self.ch, name="block_2")(h, temb, train)


class UNet(nn.Module):
    """The network of the paper; the defaults are its CIFAR-10 model with 35,746,307 parameters."""

    ch: int = 128  # of the first level, at least 4; of 32, see `GroupNorm`
    ch_mult: tuple[int, ...] = (1, 2, 2, 2)  # level i has ch * ch_mult[i] channels
    num_res_blocks: int = 2  # per level of the down path; the up path has one more
    attn_resolutions: tuple[int, ...] = (16,)  # a level has attention if its longer side is listed
    dropout: float = 0.1  # rate inside the blocks
    out_ch: int = 3  # the image's channels, or twice as many for a learned variance
    num_classes: int = 0  # number of labels
    null_class: int = -1  # label of "no class"; -1: one more, num_classes; -2: none
    # Where diffusers' networks differ, by its names; its defaults are 8, 1, True, 0 and 1e-5.
    attention_head_dim: int = 0  # channels of an attention head; 0: one head has all
    downsample_padding: int = 0  # before a strided convolution, see `Downsample`
    flip_sin_to_cos: bool = False  # whether the time embedding begins with the cosines
    freq_shift: int = 1  # its lowest of n frequencies is 10000^(-(n - 1) / (n - freq_shift))
    fourier: tuple[int, ...] = ()  # exponents of `fourier_features` beside the input
    scale_shift: bool = False  # time scales and shifts normalised activations (ADM), not only adds
    norm_eps: float = group_norm.EPSILON  # added to the variance by normalisations
    dtype: Any = jnp.float32  # or bfloat16, or their names
    remat: bool = False  # recompute every block in the backward pass, to save memory
    conv: Callable = lax.conv_general_dilated  # or another function of this signature
    norm: Callable = group_norm.group_norm  # likewise

    @nn.compact
    def __call__(self, x, t, y=None, *, train):
        """Returns the output float32[b, h, w, out_ch] at noisy images x and times t.

        x: float[b, h, w, c], data in [-1, 1] plus noise; h and w divisible by 2^(levels - 1).
        t: int[b] or float[b], embedded as it is.
        y: int[b], a label or null_label, others give NaN; None means "no class".
        train: whether to apply dropout, with the 'dropout' key.
        Raises ValueError for other shapes and dtypes. Source: paper appendix B, official `model`.
        """
        self._check(x, t, y)
        dtype, levels = jnp.dtype(self.dtype), range(len(self.ch_mult))
        options = {"kernel_init": default_init(), "dtype": dtype}
        conv = partial(nn.Conv, kernel_size=(3, 3), conv_general_dilated=self.conv, **options)
        dense = partial(nn.Dense, **options)
        norm = partial(GroupNorm, norm=self.norm, eps=self.norm_eps, dtype=dtype)
        block = nn.remat(ResBlock, static_argnums=(3,)) if self.remat else ResBlock  # 3: train
        block = partial(block, conv=conv, norm=norm, dense=dense, dropout=self.dropout)
        block = partial(block, scale_shift=self.scale_shift)
        attention = partial(Attention, norm, dense, self.attention_head_dim)
        down = partial(Downsample, conv, self.downsample_padding, name="downsample")
        ch = [self.ch * mult for mult in self.ch_mult]
        sides = [max(x.shape[1:3]) // 2**i for i in levels]
        attentions = [attention if side in self.attn_resolutions else None for side in sides]

        temb = TimeEmbedding(self.ch, self.freq_shift, self.flip_sin_to_cos, name="temb")(t)
        if self.num_classes:
            y = jnp.full(t.shape, self.null_label) if y is None else y
            # Scaled as one-hot labels of unit variance (EDM): class and time weigh the same.
            rows = self.num_classes + (self.null_class == -1)
            table = nn.Embed(rows, 4 * self.ch, embedding_init=default_init(rows), name="class_emb")
            temb += table(y)

        if self.fourier:
            x = jnp.concatenate([x, fourier_features(x, self.fourier)], axis=-1)
        skips = [conv(self.ch, name="conv_in")(x)]
        for i in levels:
            after = down if i < levels[-1] else None
            level = Level(ch[i], block, attentions[i], after, name=f"down_{i}")
            skips += level(skips[-1], temb, [None] * self.num_res_blocks, train)
        h = Middle(ch[-1], block, attention, name="mid")(skips[-1], temb, train)
        for i in reversed(levels):
            after = partial(Upsample, conv, name="upsample") if i > 0 else None
            level = Level(ch[i], block, attentions[i], after, name=f"up_{i}")
            h = level(h, temb, [skips.pop() for _ in range(self.num_res_blocks + 1)], train)[-1]
        # In float32, or bfloat16 would round the output itself to three digits.
        h = norm(dtype=jnp.float32, activation=nn.swish, name="norm_out")(h)
        return conv(self.out_ch, kernel_init=NEARLY_ZERO, dtype=jnp.float32, name="conv_out")(h)

    @property
    def null_label(self) -> int | None:
        """Returns the label of "no class"; None where no label means that."""
        return {-1: self.num_classes, -2: None}.get(self.null_class, self.null_class)

    def _check(self, x, t, y):
        found, multiple = f"{x.dtype}{list(x.shape)}", 2 ** (len(self.ch_mult) - 1)
        if x.ndim != 4 or not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"x: expected images float[b, h, w, c] in [-1, 1], found {found}")
        b, height, width, _ = x.shape
        if height % multiple or width % multiple:
            expected = f"divisible by {multiple} for {len(self.ch_mult)} levels"
            found = f"{height}x{width}; resize or crop the images, or use fewer levels"
            raise ValueError(f"x: expected a height and width {expected}, found {found}")
        if jnp.shape(t) != (b,):
            raise ValueError(f"t: expected one time per image, [{b}], found {list(jnp.shape(t))}")
        if y is None and self.num_classes and self.null_label is None:
            raise ValueError('y: expected labels, as none means "no class"; found None')
        if y is not None and not self.num_classes:
            raise ValueError("y: expected None without classes, found labels; set num_classes")
        if y is not None and (y.shape != (b,) or not jnp.issubdtype(y.dtype, jnp.integer)):
            found = f"{y.dtype}{list(y.shape)}"
            raise ValueError(f"y: expected one integer label per image, [{b}], found {found}")
