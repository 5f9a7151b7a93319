"""Decodes images of any kind and brings them to one size and number of channels.

A folder holds rotated photographs, icons with transparency, CMYK prints, 16-bit scans, truncated
downloads, web pages named .jpg. `normalize_image` mends what can be mended and raises an ImageError
for the rest. Pillow decodes; this module decides what Pillow is given, and mends its mistakes.
"""

import io
import re
import warnings
from typing import NamedTuple

import numpy as np
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageOps,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)
from PIL.Image import Resampling

from diffusion.utils.errors import DataError, error_text

MAX_PIXELS = 2**26  # of one image: a header of 50 bytes can ask for more than any machine has
# zlib's level: 8 % smaller than 1 on photographs of 256 pixels, and half the time of the usual 6.
COMPRESS_LEVEL = 4
PNG_END = b"IEND\xaeB`\x82"
MODES = {1: "L", 3: "RGB"}  # Pillow's names, by number of channels
PILLOW = re.compile(r"PIL\.")
FITS = {  # how an image of another aspect fills the form
    "crop": "the largest centred crop of this aspect",
    "pad": "the whole image, padded to this aspect",
    "stretch": "the whole image, stretched to this aspect",
}


class ImageError(DataError):
    """An image that cannot be used; the message does not name it."""


class ImageSpec(NamedTuple):
    """The form that all images are brought to."""

    height: int
    width: int
    channels: int  # 1 (grey) or 3 (RGB)
    background: tuple[int, int, int] = (255, 255, 255)  # RGB in 0..255, behind and around
    fit: str = "crop"  # a key of FITS


class NormalizedImage(NamedTuple):
    """An image that follows an ImageSpec, and what it was before."""

    encoded: bytes  # a PNG or JPEG file that decodes to `pixels`
    pixels: np.ndarray  # uint8[h, w, c]
    size: tuple[int, int]  # (h, w) as it came, upright
    mode: str  # Pillow's name (RGB, P, CMYK, I;16, ...), or 'array'
    changed: bool  # False where `encoded` is the very file, or `pixels` the very array


def normalize_image(content: bytes | np.ndarray, spec: ImageSpec) -> NormalizedImage:
    """Brings one image to the form of the spec.

    1. The first frame is taken, and turned as its EXIF orientation says; broken EXIF is ignored.
    2. Grey of 16 or 12 bits becomes 8 to the nearest level; of 16-bit colour the upper 8 are taken.
    3. To crop, the largest rectangle of the spec's aspect is taken from the centre, its side
       rounded to the nearest pixel, halves up. Of an odd rest, one more goes right or below.
    4. Transparency is composited on the background, before any resampling, so that the hidden
       colours leave no fringe. Colour becomes grey as ITU-R 601 luma (Pillow's L), grey becomes
       colour as three equal channels. Colour profiles are not applied.
    5. A larger image is averaged over boxes, whose sides are the largest integers that leave twice
       the size, and then resampled by Lanczos's filter: Image.resize with reducing_gap=2.0. A
       smaller one is enlarged bicubically.
    6. To pad, 5 leads to the largest rectangle of the image's aspect within the spec's size, placed
       and rounded as in 3, on the background. To stretch, 3 and 6 are left out.

    A JPEG or 8-bit PNG that needs none of this is stored as it is; all else becomes a PNG without
    metadata.

    Args:
      content: A file of FORMATS, or uint8 [h, w] or [h, w, 1] (grey), [h, w, 3], [h, w, 4] (RGBA).
      spec: The form to bring it to.

    Raises:
      ImageError: The image cannot be used, or memory runs out; no other error leaves.
    """
    try:
        _check_spec(spec)
        if isinstance(content, np.ndarray):
            image, mode = _from_array(content), "array"
        else:
            image, mode = _from_bytes(content)
        size = image.height, image.width
        keep_file = isinstance(content, bytes) and _follows(image, content, spec)
        if not keep_file:
            image = _fill(image, spec)
        pixels = np.asarray(image).reshape(spec.height, spec.width, spec.channels)
        encoded = content if keep_file else _encode_png(pixels)
        same = mode == "array" and np.array_equal(pixels, content.reshape(*size, -1))
        return NormalizedImage(encoded, pixels, size, mode, changed=not (keep_file or same))
    except ImageError:
        raise
    except Exception as error:  # whatever Pillow and the libraries under it raise
        raise ImageError(f"cannot be converted: {error_text(error)}; leave it out") from error


def _check_spec(spec: ImageSpec) -> None:
    height, width, channels, background, fit = spec
    valid = height >= 1 and width >= 1 and height * width <= MAX_PIXELS and channels in MODES
    colour = len(background) == 3 and all(0 <= level <= 255 for level in background)
    if not (valid and colour and fit in FITS):
        expected = f"height x width of 1 to {MAX_PIXELS:,} pixels, 1 or 3 channels, RGB of 0..255"
        expected += f", {' or '.join(FITS)}"
        raise ImageError(f"image size: expected {expected}, found {tuple(spec)}")


def _check_size(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        found = f"{height:,} x {width:,}"
        raise ImageError(f"expected at most {MAX_PIXELS:,} pixels, found {found}; make it smaller")


def _from_array(array: np.ndarray) -> Image.Image:
    shaped = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4))
    if array.dtype != np.uint8 or not shaped or not array.size:
        expected = "uint8[h, w], [h, w, 1], [h, w, 3] or [h, w, 4], not empty"
        raise ImageError(f"expected {expected}, found {array.dtype}{list(array.shape)}; convert it")
    _check_size(*array.shape[:2])
    return Image.fromarray(array[..., 0] if array.shape[2:] == (1,) else array)


def _from_bytes(content: bytes) -> tuple[Image.Image, str]:
    """Decodes a file to an upright image in a mode of 8 bits, and its mode before."""
    if not isinstance(content, bytes):
        found = type(content).__name__
        raise ImageError(f"expected the bytes of a file or an array, found {found}; read it first")
    kinds = (kind for kind, (start, _) in FORMATS.items() if re.match(start, content, re.DOTALL))
    if (kind := next(kinds, None)) is None:
        found = f"bytes that begin with {content[:16]!r}" if content else "no bytes at all"
        expected = f"an image ({', '.join(FORMATS)})"
        raise ImageError(f"expected {expected}, found {found}; convert it or leave it out")
    _ignore_pillow_warnings()
    try:
        image = _decode(content, kind)
    except ImageError:
        raise
    except Image.DecompressionBombError as error:  # Pillow's own limit, met before this module's
        found = f"found: {error_text(error)}; make it smaller"
        raise ImageError(f"expected at most {MAX_PIXELS:,} pixels, {found}") from error
    except Exception as error:
        found = f"one that cannot be decoded: {error_text(error)}; copy it anew or leave it out"
        raise ImageError(f"expected a whole {kind} file, found {found}") from error
    mode, image = image.mode, _upright(image)
    if mode.startswith("I;16") or (mode == "I" and kind == "PPM"):
        image = _to_8_bits(image)
    elif mode in ("I", "F"):  # the levels may mean anything
        found = f"{kind} of mode {mode}: 32 bits, signed or real numbers"
        raise ImageError(f"expected levels of 8 or 16 bits, found {found}; convert it")
    return image, mode


def _decode(content: bytes, kind: str) -> Image.Image:
    _, read = FORMATS[kind]
    image = read(io.BytesIO(content))  # the header only; WebP and GIF lay out an empty canvas
    _check_size(image.height, image.width)
    if kind == "PNG":
        # Pillow decodes pixels without checking their checksums; and `verify` uses up the reader.
        read(io.BytesIO(content)).verify()
        _scale_transparency(image, depth=content[24])
    image.load()
    return image


def _scale_transparency(image: Image.Image, depth: int) -> None:
    """Scales the transparent level (tRNS) to 8 bits, as Pillow scales all the others.

    16-bit grey stays so on both sides. Of 16-bit colour the upper 8 bits are compared.
    """
    key = image.info.get("transparency")
    if image.mode in ("1", "L") and isinstance(key, int):
        image.info["transparency"] = min(255, key * 255 // (2**depth - 1))
    elif image.mode == "RGB" and isinstance(key, tuple) and depth == 16:
        image.info["transparency"] = tuple(level >> 8 for level in key)


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Maps 16 or 12 bits of grey to the nearest of 8, where Pillow clips; keeps tRNS as alpha.

    TIFF's WhiteIsZero, which Pillow ignores at this depth, is respected.
    """
    tags = getattr(image, "tag_v2", {})
    top = 2 ** tags.get(TiffImagePlugin.BITSPERSAMPLE, (16,))[0] - 1
    levels = (np.arange(top + 1) * 255 + top // 2) // top
    if tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0:
        levels = levels[::-1]
    flat = np.asarray(image).ravel()
    parts = np.array_split(flat, 1 + flat.size // 2**20)  # an index takes NumPy 8 bytes a pixel

    def look_up(table: np.ndarray) -> Image.Image:
        table = table.astype(np.uint8)
        pixels = np.concatenate([table[part] for part in parts])
        return Image.fromarray(pixels.reshape(image.height, image.width))

    grey = look_up(levels)
    if isinstance(key := image.info.get("transparency"), int):
        grey.putalpha(look_up(np.where(np.arange(top + 1) == key, 0, 255)))
    return grey


def _upright(image: Image.Image) -> Image.Image:
    """Turns an image as its EXIF orientation says, which Pillow has done already for a TIFF."""
    try:
        turned = image.getexif().get(0x0112) in range(2, 9)  # 1 is upright
        return ImageOps.exif_transpose(image) if turned else image
    except Exception:  # broken metadata takes nothing from the image
        return image


def _ignore_pillow_warnings() -> None:
    """Adds one filter, and leaves it: catch_warnings would swap the filters of all threads."""
    if not any(f[0] == "ignore" and f[3] == PILLOW for f in warnings.filters):
        warnings.filterwarnings("ignore", module=PILLOW.pattern)


def _follows(image: Image.Image, content: bytes, spec: ImageSpec) -> bool:
    """Returns whether a file can be stored as it is: every decoder reads the same pixels."""
    # format is None once anything was done to the image.
    if image.format == "PNG":  # one frame, 8 bits a level, nothing cut off or added
        plain = image.n_frames == 1 and content[24] == 8 and content.endswith(PNG_END)
    else:
        plain = image.format == "JPEG" and "mp" not in image.info  # mp: more images follow
    right = image.mode == MODES[spec.channels] and image.size == (spec.width, spec.height)
    return plain and right and not image.has_transparency_data


def _fill(image: Image.Image, spec: ImageSpec) -> Image.Image:
    """Brings an upright image of 8 bits to the spec's size and mode."""
    size = inner = spec.width, spec.height
    if spec.fit == "crop":
        left, top, right, bottom = _largest_within(image.size, size)
        if (right - left, bottom - top) != image.size:
            image = image.crop((left, top, right, bottom))
    elif spec.fit == "pad":
        left, top, right, bottom = _largest_within(size, image.size)
        inner = right - left, bottom - top
    image = _resize(_flatten(image, spec), inner, spec.channels)
    if inner == size:
        return image
    canvas = Image.new("RGB", size, spec.background).convert(image.mode)
    canvas.paste(image, (left, top))
    return canvas


def _largest_within(room: tuple[int, int], aspect: tuple[int, int]) -> tuple[int, int, int, int]:
    """Returns the centred box (left, top, right, bottom) of this aspect that fills the room."""
    (width, height), (a, b) = room, aspect
    w, h = width, height
    if width * b > height * a:
        w = max(1, (2 * height * a + b) // (2 * b))
    else:
        h = max(1, (2 * width * b + a) // (2 * a))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _flatten(image: Image.Image, spec: ImageSpec) -> Image.Image:
    """Converts any mode of 8 bits to opaque RGB, or to L where that is wanted or all there is."""
    if image.has_transparency_data:
        above = image if image.mode == "RGBA" else image.convert("RGBA")
        image = Image.new("RGB", image.size, spec.background)
        image.paste(above, mask=above)
    if image.mode not in ("L", "RGB"):
        image = image.convert("RGB")
    return image.convert("L") if image.mode == "RGB" and spec.channels == 1 else image


def _resize(image: Image.Image, size: tuple[int, int], channels: int) -> Image.Image:
    """Resamples L or RGB to (w, h) and a mode; grey is resampled before it is repeated."""
    if image.width > size[0] or image.height > size[1]:
        image = image.resize(size, Resampling.LANCZOS, reducing_gap=2.0)
    elif image.size != size:
        image = image.resize(size, Resampling.BICUBIC)
    return image if image.mode == MODES[channels] else image.convert(MODES[channels])


def _encode_png(pixels: np.ndarray) -> bytes:
    """Encodes uint8[h, w, 1 or 3] without any metadata."""
    file = io.BytesIO()
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    image.save(file, "PNG", compress_level=COMPRESS_LEVEL)
    return file.getvalue()


# A pattern for the first bytes, and the reader. Image.open would say nothing of what is wrong, warn
# of sizes, and turn a JPEG with more images behind it into another format.
FORMATS = {
    "PNG": (rb"\x89PNG\r\n\x1a\n....IHDR", PngImagePlugin.PngImageFile),
    "JPEG": (rb"\xff\xd8\xff", JpegImagePlugin.JpegImageFile),
    "WEBP": (rb"RIFF....WEBP", WebPImagePlugin.WebPImageFile),
    "BMP": (rb"BM", BmpImagePlugin.BmpImageFile),
    "GIF": (rb"GIF8[79]a", GifImagePlugin.GifImageFile),
    "TIFF": (rb"II[*+]\0|MM\0[*+]", TiffImagePlugin.TiffImageFile),
    "PPM": (rb"P[1-6f]\s", PpmImagePlugin.PpmImageFile),
}
