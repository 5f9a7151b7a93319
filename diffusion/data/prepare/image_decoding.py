"""Pictures: a file's bytes, or an array, made uint8 pixels of one size and kind, or said why not.

A folder of images holds everything: photographs lying on their side, icons with holes, print in
CMYK, scans of 16 bits, halves of downloads, web pages named .jpg. What can be mended is mended by
the one rule stated at `clean`; of the rest, whatever the bytes are, a PictureError says in one line
what they are. Pillow decodes; this module decides what it is shown, and mends what it gets wrong.
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
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)
from PIL.Image import Resampling, Transpose

MAX_PIXELS = 2**26  # of one picture: a header of 50 bytes can ask for more than any machine has
# zlib's. Photographs of 256 pixels come out 8 % smaller than at 1; the usual 6 saves another 0.6 %
# and takes twice the time.
COMPRESS_LEVEL = 4
PNG_END = b"IEND\xaeB`\x82"
MODES = {1: "L", 3: "RGB"}  # Pillow's words, by number of channels


class ImageError(Exception):
    """A picture that cannot be used; one line, without its name: what was expected, and found."""


class ImageSpec(NamedTuple):
    """What every picture becomes: height x width pixels; channels 1 (grey) or 3 (RGB).

    background: what shows where a picture is transparent; RGB, 0..255 each.
    """

    height: int
    width: int
    channels: int
    background: tuple[int, int, int] = (255, 255, 255)


class NormalizedImage(NamedTuple):
    """A picture as the rule wants it, and what it was.

    encoded: a file, PNG or JPEG, that decodes to `pixels`, uint8[height, width, channels].
    size: (h, w) as it came, upright. mode: Pillow's word for what it was (RGB, P, CMYK, I;16, ...),
    or 'array'. changed: False where `encoded` is the very file, or `pixels` the very array.
    """

    encoded: bytes
    pixels: np.ndarray
    size: tuple[int, int]
    mode: str
    changed: bool


def normalize_image(content: bytes | np.ndarray, rule: ImageSpec) -> NormalizedImage:
    """One picture, made to follow the rule.

    content: a file of FORMATS, or uint8 [h, w] or [h, w, 1] (grey), [h, w, 3] (RGB), [h, w, 4]
    (RGBA). In this order:
    1. The first frame is taken, and turned as its EXIF orientation says; broken EXIF says nothing.
    2. 16 (and 12) bits of grey become 8 to the nearest level; of colour, Pillow keeps the upper 8.
    3. The middle is cut out: the largest rectangle of the rule's aspect, the side that is cut
       rounded to the nearest pixel, halves up. Of an odd rest, one more goes right or below.
    4. What is transparent is composited on the background, before any resampling, so that the
       colours hidden under it leave no fringe. Colour becomes grey as ITU-R 601 luma (Pillow's
       L), grey becomes colour as three equal channels. Colour profiles are not applied.
    5. A larger picture is averaged over boxes, whose sides are the largest whole numbers that leave
       twice the size asked for, and then resampled by Lanczos's filter: Pillow's Image.resize with
       reducing_gap=2.0. A smaller one is enlarged bicubically; one of the size is not resampled.

    A file that needs none of this is stored as it is, if it is a JPEG or an 8-bit PNG; all else as
    a new PNG without metadata. Raises PictureError, also if memory runs out; nothing else.
    """
    try:
        _check_rule(rule)
        if isinstance(content, np.ndarray):
            image, mode = _from_array(content), "array"
        else:
            image, mode = _from_bytes(content)
        size = image.height, image.width
        as_it_is = isinstance(content, bytes) and _follows(image, content, rule)
        if not as_it_is:
            image = _resized(_flat(_cropped(image, rule), rule), rule)
        pixels = np.asarray(image).reshape(rule.height, rule.width, rule.channels)
        encoded = content if as_it_is else _png(pixels)
        same = mode == "array" and np.array_equal(pixels, content.reshape(*size, -1))
        return NormalizedImage(encoded, pixels, size, mode, changed=not (as_it_is or same))
    except ImageError:
        raise
    except Exception as error:  # whatever Pillow and the libraries under it have to say
        raise ImageError(f"cannot be converted: {_line(error)}; leave it out") from error


def _check_rule(rule: ImageSpec) -> None:
    height, width, channels, background = rule
    right = height >= 1 and width >= 1 and height * width <= MAX_PIXELS and channels in MODES
    if not right or len(background) != 3 or not all(0 <= level <= 255 for level in background):
        wanted = f"height x width of 1 to {MAX_PIXELS:,} pixels, 1 or 3 channels, RGB of 0..255"
        raise ImageError(f"rule: expected {wanted}, found {tuple(rule)}")


def _check_size(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        found = f"{height:,} x {width:,}"
        raise ImageError(
            f"expected at most {MAX_PIXELS:,} pixels, found {found}; make it smaller"
        )




def _from_array(array: np.ndarray) -> Image.Image:
    """uint8 [h, w], [h, w, 1], [h, w, 3], [h, w, 4] -> L, L, RGB, RGBA."""
    shaped = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4))
    if array.dtype != np.uint8 or not shaped or not array.size:
        wanted = "uint8[h, w], [h, w, 1], [h, w, 3] or [h, w, 4], not empty"
        raise ImageError(f"expected {wanted}, found {array.dtype}{list(array.shape)}; convert it")
    _check_size(*array.shape[:2])
    return Image.fromarray(array[..., 0] if array.shape[2:] == (1,) else array)


def _from_bytes(content: bytes) -> tuple[Image.Image, str]:
    """A file -> (what it shows, upright, in a mode of 8 bits; Pillow's word for what it was)."""
    if not isinstance(content, bytes):
        found = type(content).__name__
        raise ImageError(
            f"expected the bytes of a file or an array, found {found}; read it first"
        )
    kinds = [kind for kind, (start, _) in FORMATS.items() if re.match(start, content, re.DOTALL)]
    if not kinds:
        found = f"bytes that begin with {content[:16]!r}" if content else "no bytes at all"
        wanted = f"a picture ({', '.join(FORMATS)})"
        raise ImageError(f"expected {wanted}, found {found}; convert it or leave it out")
    _hush()
    try:
        image = _decoded(content, kinds[0])
    except ImageError:
        raise
    except Image.DecompressionBombError as error:  # Pillow's own limit, met before this module's
        wanted = f"at most {MAX_PIXELS:,} pixels"
        raise ImageError(f"expected {wanted}, found: {_line(error)}; make it smaller") from error
    except Exception as error:
        found = f"one that cannot be decoded: {_line(error)}"
        advice = "copy it anew or leave it out"
        raise ImageError(f"expected a whole {kinds[0]} file, found {found}; {advice}") from error
    mode, image = image.mode, _upright(image)
    if mode.startswith("I;16") or (mode == "I" and kinds[0] == "PPM"):
        image = _eight_bits(image)
    elif mode in ("I", "F"):  # the levels may mean anything
        found = f"{kinds[0]} of mode {mode}: 32 bits, signed or real numbers"
        raise ImageError(f"expected levels of 8 or 16 bits, found {found}; convert it")
    return image, mode


def _decoded(content: bytes, kind: str) -> Image.Image:
    _, read = FORMATS[kind]
    image = read(io.BytesIO(content))  # the header only; WebP and GIF lay out an empty canvas
    _check_size(image.height, image.width)
    if kind == "PNG":
        # Pillow decodes pixels without a look at their checksums; and verifying uses up the reader.
        read(io.BytesIO(content)).verify()
        _scale_transparency(image, depth=content[24])
    image.load()
    return image


def _scale_transparency(image: Image.Image, depth: int) -> None:
    """The level that is transparent (tRNS), scaled to 8 bits as Pillow scales all the others.

    16-bit grey stays 16-bit grey on both sides. Of 16-bit colour the upper 8 bits are compared.
    """
    key = image.info.get("transparency")
    if image.mode in ("1", "L") and isinstance(key, int):
        image.info["transparency"] = min(255, key * 255 // (2**depth - 1))
    elif image.mode == "RGB" and isinstance(key, tuple) and depth == 16:
        image.info["transparency"] = tuple(level >> 8 for level in key)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits, or 12 -> L, or LA with tRNS; to the nearest level, where Pillow's clips.

    TIFF's WhiteIsZero, which Pillow passes over at this depth, is heeded.
    """
    tags = getattr(image, "tag_v2", {})
    top = 2 ** tags.get(TiffImagePlugin.BITSPERSAMPLE, (16,))[0] - 1
    levels = (np.arange(top + 1) * 255 + top // 2) // top
    if tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0:
        levels = levels[::-1]
    flat = np.asarray(image).ravel()
    parts = np.array_split(flat, 1 + flat.size // 2**20)  # not at once: NumPy's index takes 8 bytes

    def through(table: np.ndarray) -> Image.Image:
        table = table.astype(np.uint8)
        pixels = np.concatenate([table[part] for part in parts])
        return Image.fromarray(pixels.reshape(image.height, image.width))

    grey = through(levels)
    if isinstance(key := image.info.get("transparency"), int):
        grey.putalpha(through(np.where(np.arange(top + 1) == key, 0, 255)))
    return grey


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF orientation says, which Pillow has done already where it is a TIFF."""
    try:
        turn = UPRIGHT.get(image.getexif().get(0x0112))
    except Exception:  # metadata that cannot be read takes nothing from the picture
        turn = None
    return image if turn is None else image.transpose(turn)


def _hush() -> None:
    """What Pillow has to warn of is not shown: a file is either usable or an error.

    The filter is put in once, and left. warnings.catch_warnings would swap the filters of all
    threads, and put back old ones while another thread is inside.
    """
    if not any(f[0] == "ignore" and f[3] == PILLOW for f in warnings.filters):
        warnings.filterwarnings("ignore", module=PILLOW.pattern)




def _follows(image: Image.Image, content: bytes, rule: ImageSpec) -> bool:
    """Can the bytes be stored as they are, and will every decoder make the same of them?"""
    # format is None once anything was done to the image.
    if image.format == "PNG":  # one frame, 8 bits per level, nothing cut off or added
        plain = image.n_frames == 1 and content[24] == 8 and content.endswith(PNG_END)
    else:
        plain = image.format == "JPEG" and "mp" not in image.info  # mp: more pictures follow
    right = image.mode == MODES[rule.channels] and image.size == (rule.width, rule.height)
    return plain and right and not image.has_transparency_data


def _cropped(image: Image.Image, rule: ImageSpec) -> Image.Image:
    """The largest rectangle of the rule's aspect in the middle; no copy where that is all."""
    (w, h), (height, width, *_) = image.size, rule
    if w * height > h * width:
        w = max(1, (2 * h * width + height) // (2 * height))
    else:
        h = max(1, (2 * w * height + width) // (2 * width))
    if (w, h) == image.size:
        return image
    left, top = (image.width - w) // 2, (image.height - h) // 2
    return image.crop((left, top, left + w, top + h))


def _flat(image: Image.Image, rule: ImageSpec) -> Image.Image:
    """Any mode of 8 bits -> RGB, or L where that is asked for or all there is; no transparency."""
    if image.has_transparency_data:
        above = image if image.mode == "RGBA" else image.convert("RGBA")
        image = Image.new("RGB", image.size, rule.background)
        image.paste(above, mask=above)
    if image.mode not in ("L", "RGB"):
        image = image.convert("RGB")
    return image.convert("L") if image.mode == "RGB" and rule.channels == 1 else image


def _resized(image: Image.Image, rule: ImageSpec) -> Image.Image:
    """L or RGB -> of the rule's size and mode. Grey is resampled before it is repeated."""
    size = rule.width, rule.height
    if image.width > rule.width or image.height > rule.height:
        image = image.resize(size, Resampling.LANCZOS, reducing_gap=2.0)
    elif image.size != size:
        image = image.resize(size, Resampling.BICUBIC)
    return image if image.mode == MODES[rule.channels] else image.convert(MODES[rule.channels])


def _png(pixels: np.ndarray) -> bytes:
    """uint8[h, w, 1 or 3] -> a file, made from the pixels alone: no metadata comes along."""
    file = io.BytesIO()
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    image.save(file, "PNG", compress_level=COMPRESS_LEVEL)
    return file.getvalue()


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())[:200] or type(error).__name__
    return "".join(c if c.isprintable() else "?" for c in text)


PILLOW = re.compile(r"PIL\.")

# EXIF 2.32, tag 0x0112: what brings back upright what was stored so. 1 is upright.
UPRIGHT = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}

# How a file begins, and what reads it. Not asked for by Image.open, which tells nothing of what is
# wrong, warns of sizes, and turns a JPEG with more pictures behind it into another format.
FORMATS = {
    "PNG": (rb"\x89PNG\r\n\x1a\n....IHDR", PngImagePlugin.PngImageFile),
    "JPEG": (rb"\xff\xd8\xff", JpegImagePlugin.JpegImageFile),
    "WEBP": (rb"RIFF....WEBP", WebPImagePlugin.WebPImageFile),
    "BMP": (rb"BM", BmpImagePlugin.BmpImageFile),
    "GIF": (rb"GIF8[79]a", GifImagePlugin.GifImageFile),
    "TIFF": (rb"II[*+]\0|MM\0[*+]", TiffImagePlugin.TiffImageFile),
    "PPM": (rb"P[1-6f]\s", PpmImagePlugin.PpmImageFile),
}
