"""Decoding against the formats' own definitions, closed forms, and everything that is broken.

Files are made in memory: by Pillow where it can write them, else from their bytes.
"""

import io
import itertools
import random
import struct
import subprocess
import sys
import tracemalloc
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from diffusion.data.prepare import image_decoding
from diffusion.data.prepare.image_decoding import FITS, ImageError, ImageSpec, normalize_image
from diffusion.runtime.validation import VALIDATORS
from tests.conftest import ROOT

WHITE = (255, 255, 255)


def file(pixels, kind="PNG", mode=None, **options):
    """An array, or an image, as the bytes of a file."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    stream = io.BytesIO()
    (image.convert(mode) if mode else image).save(stream, kind, **options)
    return stream.getvalue()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, depth, colour, rows, *extra, end=b"IEND"):
    """A PNG from its bytes. depth: bits; colour: 0 grey, 2 RGB, 3 palette; rows: unfiltered."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    data = zlib.compress(b"".join(b"\0" + bytes(row) for row in rows))
    pixels = chunk(b"IDAT", data) if len(rows) else b""
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + pixels + chunk(end, b"")


def tiff(width, height, bits, data, photometric=1, offset=8):
    """A grey TIFF, little-endian, in one strip. photometric: 0 white is zero, 1 black is zero."""
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric)]
    tags += [(273, 8 + 2 + 12 * 9 + 4), (277, 1), (278, height), (279, len(data))]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<IH", offset, 9) + entries + bytes(4) + data


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


GREY, COLOUR, CLEAR = noise(9, 11), noise(9, 11, 3), noise(9, 11, 4)
OF_SIZE = ImageSpec(9, 11, 3)
JPEG = file(COLOUR, "JPEG")
TWO = {"save_all": True, "append_images": [Image.fromarray(COLOUR[::-1])]}
ROW, HUGE = [bytes(4)], b"a\0\0" + zlib.compress(bytes(2**24))
BAD_EXIF = b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x12\0\x03\0\0\xff\xffoops"


def u24(n):
    return struct.pack("<I", n)[:3]


def webp_of(size):
    """An animation whose canvas of size x size holds one frame of 8 x 8."""
    frame = file(noise(8, 8, 3), "WEBP", lossless=True)[12:]
    frame = u24(0) * 2 + u24(7) * 2 + u24(100) + b"\0" + frame
    body = b"VP8X" + struct.pack("<I", 10) + b"\2\0\0\0" + u24(size - 1) * 2
    body += b"ANIM" + struct.pack("<IIH", 6, 0, 0) + b"ANMF" + struct.pack("<I", len(frame)) + frame
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def gif_of(size):
    """A frame that is to be wiped after it was shown: Pillow lays out a canvas to do so."""
    return (
        b"GIF89a" + struct.pack("<HHBBB", size, size, 0, 0, 0) + b"!\xf9\4\x08\0\0\0\0"
        b"," + struct.pack("<HHHHB", 0, 0, size, size, 0) + b"\2\2\x44\1\0;"
    )


def flipped(content, where, bit=0):
    return content[:where] + bytes([content[where] ^ 1 << bit]) + content[where + 1 :]


def with_segment(jpeg, marker, data):
    return jpeg[:2] + struct.pack(">BBH", 255, marker, len(data) + 2) + data + jpeg[2:]


MALFORMED = {
    "empty": (b"", "found no bytes at all"),
    "web page": (b"<!DOCTYPE html><html>", "found bytes that begin with b'<!DOCTYPE html><'"),
    "PDF": (b"%PDF-1.7\n", r"expected an image \(PNG, JPEG, WEBP, BMP, GIF, TIFF, PPM\)"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n", "found bytes that begin with b'%!PS"),
    "zip": (b"PK\3\4" + bytes(60), "found bytes that begin with b'PK"),
    "zeros": (bytes(1000), "found bytes that begin with"),
    "PNG: signature only": (b"\x89PNG\r\n\x1a\n", "found bytes that begin with"),
    "PNG: cut in the header": (file(COLOUR)[:30], "whole PNG file, found .*copy it anew"),
    "PNG: cut in the pixels": (file(COLOUR)[:-40], "whole PNG file, found"),
    "PNG: a bit flipped": (flipped(file(COLOUR), 60), "PNG .*bad header checksum in b'IDAT'"),
    "PNG: no pixels": (png(4, 4, 8, 0, []), "whole PNG file, found"),
    "PNG: of size 0": (png(0, 1, 8, 0, ROW), "whole PNG file, found one .*not identified"),
    "PNG: no such colours": (png(4, 1, 8, 5, ROW), "whole PNG file, found"),
    "PNG: no end": (png(4, 1, 8, 0, ROW, end=b"tEXt"), "whole PNG file, found"),
    "PNG: a chunk of 2 GiB": (file(COLOUR)[:33] + b"\x7f\xff\xff\xfftEXt", "whole PNG file, found"),
    "PNG: a huge comment": (png(4, 1, 8, 0, ROW, chunk(b"zTXt", HUGE)), "PNG .*too large"),
    "PNG: a huge profile": (png(4, 1, 8, 0, ROW, chunk(b"iCCP", HUGE)), "PNG .*too large"),
    "PNG: ten times the limit": (png(25_000, 25_000, 8, 0, ROW), "67,108,864 .* 25,000 x 25,000"),
    "PNG: where Pillow only warns": (png(10_000, 10_000, 8, 0, ROW), "found 10,000 x 10,000"),
    "PNG: all there is": (png(2**31 - 1, 2**31 - 1, 8, 6, ROW), "2,147,483,647 x 2,147,483,647"),
    "JPEG: first bytes only": (b"\xff\xd8\xff", "whole JPEG file, found"),
    "JPEG: cut": (JPEG[:-60], "whole JPEG file, found .*truncated"),
    "JPEG: no tables": (JPEG.replace(b"\xff\xdb", b"\xff\xfe"), "whole JPEG file, found"),
    "JPEG: a bomb": (JPEG.replace(b"\0\x09\0\x0b", b"\xff" * 4), "found 65,535 x 65,535"),
    "WEBP: cut": (file(COLOUR, "WEBP")[:-20], "whole WEBP file, found"),
    "WEBP: a bomb": (webp_of(16384), "at most 67,108,864 pixels, found"),
    "GIF: header only": (b"GIF89a" + bytes(7), "whole GIF file, found"),
    "GIF: no frame": (b"GIF89a\1\0\1\0\0\0\0;", "whole GIF file, found"),
    "GIF: cut": (file(GREY, "GIF")[:-30], "whole GIF file, found"),
    "GIF: a bomb": (gif_of(9_000), "found 9,000 x 9,000"),
    "GIF: a bomb that Pillow sees": (gif_of(60_000), "at most 67,108,864 pixels, found"),
    "BMP: header only": (file(COLOUR, "BMP")[:20], "whole BMP file, found"),
    "BMP: cut": (file(COLOUR, "BMP")[:-20], "whole BMP file, found"),
    "TIFF: no directory": (b"II*\0" + bytes(20), "whole TIFF file, found"),
    "TIFF: directory outside": (tiff(2, 1, 8, b"ab", offset=10**6), "whole TIFF file, found"),
    "TIFF: strip outside": (tiff(2, 90, 8, b"ab"), "whole TIFF file, found"),
    "TIFF: a bomb": (tiff(10**5, 10**5, 8, b"ab"), "found 100,000 x 100,000"),
    "TIFF: real numbers": (file(GREY.astype(np.float32), "TIFF"), "16 bits, found TIFF.* mode F"),
    "TIFF: 32 bits": (file(GREY.astype(np.int32), "TIFF"), "8 or 16 bits, found TIFF .*mode I"),
    "PPM: real numbers": (b"Pf\n1 1\n-1\n\0\0\0\0", "8 or 16 bits, found PPM of mode F"),
    "PPM: no size": (b"P6\n", "whole PPM file, found"),
    "PPM: a negative size": (b"P6 -4 4 255\n" + bytes(48), "whole PPM file, found"),
    "PPM: cut": (b"P6 4 4 255\n" + bytes(40), "whole PPM file, found"),
    "PPM: a bomb": (b"P5 99999 99999 255\n", "found 99,999 x 99,999"),
    "PPM: just under the limit": (b"P6 8192 8192 255\n", "whole PPM file, found"),
    "text": ("picture.png", "expected the bytes of a file or an array, found str"),
    "nothing": (None, "expected the bytes of a file or an array, found NoneType"),
    "array: real numbers": (np.zeros([4, 4, 3]), r"expected uint8.* found float64\[4, 4, 3\]"),
    "array: signed": (np.zeros([4, 4, 3], np.int8), r"found int8\[4, 4, 3\]"),
    "array: objects": (np.full([2, 2], None), r"found object\[2, 2\]"),
    "array: two channels": (np.zeros([4, 4, 2], np.uint8), r"found uint8\[4, 4, 2\]"),
    "array: several": (np.zeros([2, 4, 4, 3], np.uint8), r"found uint8\[2, 4, 4, 3\]"),
    "array: no dimension": (np.array(3, np.uint8), r"found uint8\[\]"),
    "array: empty": (np.zeros([0, 4, 3], np.uint8), r"not empty, found uint8\[0, 4, 3\]"),
    "array: a bomb": (np.broadcast_to(np.uint8(0), [2**14, 2**14]), "found 16,384 x 16,384"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed(name):
    content, words = MALFORMED[name]
    with pytest.raises(ImageError, match=words) as caught:
        normalize_image(content, ImageSpec(8, 8, 3))
    assert str(caught.value).isprintable() and len(str(caught.value)) < 400


def peak_of_malformed():
    """MiB that refusing all of them takes at the most; for a process of its own."""
    import resource

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

    before = peak()
    for content, _ in MALFORMED.values():
        with pytest.raises(ImageError):
            normalize_image(content, ImageSpec(8, 8, 3))
    print(peak() - before)


def test_what_is_refused_takes_little_memory():
    """PNG's "all there is" asks for 2^64 bytes; the largest frame of a GIF is laid out before a
    look at it can be had: 81 MB. 16 MiB are those that the comment and the profile unpack to."""
    code = "from tests.data.prepare.test_image_decoding import peak_of_malformed as f; f()"
    run = [sys.executable, "-W", "error", "-c", code]
    out = subprocess.run(run, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert int(out) < 160


@pytest.mark.parametrize(
    "content",
    [
        with_segment(JPEG, 0xE1, BAD_EXIF),
        with_segment(JPEG, 0xE1, b"Exif\0\0oops, no TIFF"),
        with_segment(JPEG, 0xE2, b"MPF\0MM\0*\0\0\0\x08oops"),
        with_segment(JPEG, 0xE2, b"ICC_PROFILE\0\1\2oops"),
        file(COLOUR, "PNG", exif=BAD_EXIF),
        file(COLOUR, "PNG", exif=b"Exif\0\0oops, no TIFF"),
        file(COLOUR, "WEBP", lossless=True, exif=BAD_EXIF),
        png(11, 9, 8, 2, COLOUR.reshape(9, -1), chunk(b"iCCP", b"a\0\0not deflated")),
        png(11, 9, 8, 2, COLOUR.reshape(9, -1), chunk(b"zTXt", b"a\0\0not deflated")),
        png(11, 9, 8, 2, COLOUR.reshape(9, -1), chunk(b"acTL", bytes(8))),
    ],
)
def test_broken_metadata_takes_nothing_from_the_image(content):
    sound = JPEG if content[:2] == JPEG[:2] else file(COLOUR)
    np.testing.assert_array_equal(
        normalize_image(content, OF_SIZE).pixels, normalize_image(sound, OF_SIZE).pixels
    )


def raising(error):
    def method(*args, **kwargs):
        raise error

    return method


def test_any_error_is_an_image_error_of_one_line(monkeypatch):
    content = file(COLOUR)
    monkeypatch.setattr(Image.Image, "resize", raising(MemoryError))
    with pytest.raises(ImageError, match="cannot be converted: MemoryError"):
        normalize_image(content, ImageSpec(4, 4, 3))
    monkeypatch.setattr(Image.Image, "load", raising(MemoryError))
    with pytest.raises(ImageError, match=r"whole PNG file, found .*MemoryError"):
        normalize_image(content, ImageSpec(4, 4, 3))
    monkeypatch.setattr(Image.Image, "load", raising(ValueError("a\n \x1b[31mb" + 999 * "c")))
    with pytest.raises(ImageError, match=r"decoded: a \[31mbc{50,200} \.\.\. c+; copy it anew"):
        normalize_image(content, ImageSpec(4, 4, 3))


def test_ctrl_c_is_not_an_error_of_the_image(monkeypatch):
    content = file(COLOUR)
    monkeypatch.setattr(Image.Image, "load", raising(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        normalize_image(content, OF_SIZE)


@pytest.mark.parametrize(
    "spec",
    [ImageSpec(0, 8, 3), ImageSpec(8, -1, 3), ImageSpec(8, 8, 4), ImageSpec(2**20, 2**20, 3),
     ImageSpec(8, 8, 3, (0, 0)), ImageSpec(8, 8, 3, (0, 0, 256)),
     ImageSpec(8, 8, 3, WHITE, "contain")],
)  # fmt: skip
def test_a_spec_that_cannot_be_followed(spec):
    with pytest.raises(ImageError, match=r"^image size: expected height x .*, found \("):
        normalize_image(COLOUR, spec)


def test_pillows_warnings_are_off_and_no_others():
    content = with_segment(JPEG, 0xE1, BAD_EXIF)
    with pytest.warns(UserWarning):
        Image.open(io.BytesIO(content)).getexif().get(1)
    filters = warnings.filters
    for _ in range(3):
        normalize_image(content, OF_SIZE)
    assert warnings.filters is filters  # not swapped, as catch_warnings does
    assert sum(f[0] == "ignore" and f[3] == image_decoding.PILLOW for f in filters) == 1
    with pytest.raises(UserWarning, match="of another"):
        warnings.warn("of another", UserWarning, stacklevel=1)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")  # at each place once, until the filters change
        for _ in range(3):
            normalize_image(file(COLOUR), OF_SIZE)
            warnings.warn("of another", UserWarning, stacklevel=1)
        assert len(seen) == 1


def test_threads_get_what_one_gets():
    contents = [content for content, _ in MALFORMED.values() if isinstance(content, bytes)]
    contents += SMALL.values()

    def outcome(content):
        try:
            return normalize_image(content, ImageSpec(8, 8, 3)).pixels.tobytes()
        except ImageError as error:
            return str(error)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(outcome, contents)) == [*map(outcome, contents)]


RED = (200, 40, 20)
KINDS = {  # mode: the formats that can store it, and how near to the colour it can get
    "1": (("PNG", "BMP", "TIFF", "PPM", "GIF"), None),
    "L": (("PNG", "BMP", "TIFF", "PPM", "JPEG", "GIF"), 1),
    "P": (("PNG", "BMP", "TIFF", "GIF"), 0),
    "RGB": (("PNG", "BMP", "TIFF", "PPM", "JPEG", "WEBP"), 3),
    "LA": (("PNG", "TIFF"), 1),
    "PA": (("TIFF",), 1),
    "RGBA": (("PNG", "BMP", "TIFF", "WEBP"), 3),
    "CMYK": (("TIFF", "JPEG"), 3),
    "LAB": (("TIFF",), 3),
}


@pytest.mark.parametrize("kind, mode", [(k, m) for m, (ks, _) in KINDS.items() for k in ks])
def test_every_mode(kind, mode):
    image = Image.new("RGB", (16, 16), RED)
    luma = 0.299 * RED[0] + 0.587 * RED[1] + 0.114 * RED[2]
    if mode == "P":
        image = image.quantize(2)
    elif mode == "PA":
        image = image.convert("P", palette=Image.Palette.ADAPTIVE).convert("PA")
    elif mode == "1":
        image = Image.new("1", (16, 16), 1)
    options = {"lossless": True} if kind == "WEBP" else {}
    content = file(image if image.mode == mode else image.convert(mode), kind, **options)
    picture = normalize_image(content, ImageSpec(8, 8, 3))
    colour = {"1": WHITE, "L": (luma,) * 3, "LA": (luma,) * 3}.get(mode, RED)
    assert np.abs(picture.pixels - np.array(colour)).max() <= (KINDS[mode][1] or 0)
    assert picture.size == (16, 16) and picture.changed
    grey = normalize_image(content, ImageSpec(8, 8, 1)).pixels
    assert np.abs(grey - (255 if mode == "1" else luma)).max() <= 3


CORNER = np.array([[255, 0], [0, 0], [80, 160]], np.uint8)  # any turn of it is another picture
TURNED = {  # EXIF 2.32, 4.6.4: what the row and the column 0 of the file are in the picture
    1: CORNER,  # top, left
    2: CORNER[:, ::-1],  # top, right
    3: CORNER[::-1, ::-1],  # bottom, right
    4: CORNER[::-1],  # bottom, left
    5: CORNER.T,  # left, top
    6: np.rot90(CORNER, -1),  # right, top
    7: CORNER[::-1, ::-1].T,  # right, bottom
    8: np.rot90(CORNER),  # left, bottom
}


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "16 bits", "palette", "LZW"])
@pytest.mark.parametrize("orientation", TURNED)
def test_orientation(orientation, kind):
    stored = CORNER.repeat(8, 0).repeat(8, 1)  # blocks of a JPEG, which it keeps
    expected = TURNED[orientation].repeat(8, 0).repeat(8, 1)
    options = {"exif": exif(orientation)}
    if kind == "16 bits":
        content = file(stored.astype(np.uint16) * 257, **options)
    elif kind == "palette":
        content = file(Image.fromarray(stored).convert("P"), **options)
    elif kind == "LZW":
        content = file(stored, "TIFF", compression="tiff_lzw", **options)
    elif kind == "WEBP":
        content = file(stored, kind, mode="RGB", lossless=True, **options)
    else:
        content = file(stored, kind, **options, **({"quality": 100} if kind == "JPEG" else {}))
    picture = normalize_image(content, ImageSpec(*expected.shape, 1))
    error = picture.pixels[..., 0].astype(int) - expected
    assert np.abs(error).max() <= (kind == "JPEG")
    assert picture.size == expected.shape
    assert picture.changed == (orientation != 1 or kind not in ("PNG", "JPEG"))
    # Nobody will turn it once more.
    assert Image.open(io.BytesIO(picture.encoded)).getexif().get(0x0112, 1) == 1


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_no_such_orientation(orientation):
    content = file(COLOUR, exif=exif(orientation))
    np.testing.assert_array_equal(normalize_image(content, OF_SIZE).pixels, COLOUR)


LEVELS = np.arange(256, dtype=np.uint8)
BACKGROUND = (0, 100, 255)


def over(colour, alpha):
    """Porter and Duff's over, on BACKGROUND: colour [..., 3], alpha [...] -> uint8[..., 3]."""
    alpha = alpha[..., None] / 255
    return np.rint(colour * alpha + np.array(BACKGROUND) * (1 - alpha)).astype(np.uint8)


@pytest.mark.parametrize("kind", ["array", "PNG", "WEBP", "TIFF", "LA"])
def test_alpha_of_every_level_over_every_level(kind):
    """Never a tie: 255 is odd. So the nearest level is one number."""
    colour, alpha = np.meshgrid(LEVELS, LEVELS)
    image = np.stack([colour, colour, colour, alpha], -1)
    expected = over(image[..., :3], alpha)
    if kind == "LA":
        image = file(image, mode="LA")
    elif kind != "array":
        image = file(image, kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {}))
    picture = normalize_image(image, ImageSpec(256, 256, 3, BACKGROUND))
    np.testing.assert_array_equal(picture.pixels, expected)
    assert picture.mode == {"array": "array", "LA": "LA"}.get(kind, "RGBA")


def test_grey_of_a_transparent_image_has_the_luma_of_the_background():
    picture = normalize_image(np.zeros([4, 4, 4], np.uint8), ImageSpec(4, 4, 1, BACKGROUND))
    assert np.abs(picture.pixels - (0.587 * 100 + 0.114 * 255)).max() <= 0.5 + 1e-3


def test_palette_with_one_and_with_many_transparencies():
    palette = bytes([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9])
    for alpha in ([255, 0, 255, 255], [255, 128, 64, 0]):
        content = png(4, 1, 8, 3, [bytes(range(4))], chunk(b"PLTE", palette),
                      chunk(b"tRNS", bytes(alpha)))  # fmt: skip
        expected = over(np.frombuffer(palette, np.uint8).reshape(1, 4, 3), np.array([alpha]))
        picture = normalize_image(content, ImageSpec(1, 4, 3, BACKGROUND))
        np.testing.assert_array_equal(picture.pixels, expected)
    gif = Image.fromarray(np.array([[0, 1]], np.uint8))
    gif.putpalette([200, 0, 0, 0, 200, 0])
    picture = normalize_image(file(gif, "GIF", transparency=1), ImageSpec(1, 2, 3, BACKGROUND))
    assert picture.pixels.tolist() == [[[200, 0, 0], [*BACKGROUND]]] and picture.mode == "P"


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_transparent_grey_of_every_depth(depth):
    """PNG's tRNS names a level of the file's own depth; all levels of it stand in one row."""
    top = 2**depth - 1
    levels = np.arange(top + 1) if depth < 16 else np.array([0, 1, 254, 255, 256, 257, 65535])
    key = levels[-2]
    bits = (levels[:, None] >> np.arange(depth)[::-1]) & 1
    row = np.packbits(bits.astype(np.uint8).ravel()).tobytes()
    content = png(len(levels), 1, depth, 0, [row], chunk(b"tRNS", struct.pack(">H", key)))
    picture = normalize_image(content, ImageSpec(1, len(levels), 3, BACKGROUND))
    expected = np.rint(levels * 255 / top)[None, :, None].repeat(3, 2).astype(np.uint8)
    expected[0, -2] = BACKGROUND
    np.testing.assert_array_equal(picture.pixels, expected)


@pytest.mark.parametrize("depth", [8, 16])
def test_transparent_colour(depth):
    colours = np.array([[[1, 2, 3], [1, 2, 4], [200, 2, 3]]]) * (257 if depth == 16 else 1)
    data = colours.astype(f">u{depth // 8}").tobytes()
    key = chunk(b"tRNS", struct.pack(">HHH", *colours[0, 0].tolist()))
    picture = normalize_image(png(3, 1, depth, 2, [data], key), ImageSpec(1, 3, 3, BACKGROUND))
    assert picture.pixels.tolist() == [[[*BACKGROUND], [1, 2, 4], [200, 2, 3]]]


ALL16 = np.arange(2**16, dtype=np.uint16).reshape(256, 256)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "TIFF, big-endian", "TIFF, white is 0", "PGM"])
def test_16_bits_to_the_nearest_level(kind):
    expected = np.rint(ALL16 / 257)
    if kind == "TIFF, big-endian":
        content = file(Image.frombytes("I;16B", (256, 256), ALL16.astype(">u2").tobytes()), "TIFF")
    elif kind == "TIFF, white is 0":
        content = tiff(256, 256, 16, (65535 - ALL16).tobytes(), photometric=0)
    elif kind == "PGM":
        content = b"P5 256 256 65535\n" + ALL16.astype(">u2").tobytes()
    else:
        content = file(ALL16, kind)
    picture = normalize_image(content, ImageSpec(256, 256, 1))
    np.testing.assert_array_equal(picture.pixels[..., 0], expected)
    assert picture.mode.startswith("I") and picture.size == (256, 256)
    # As colour, and on its way through the crop and the filters.
    grey = normalize_image(content, ImageSpec(64, 32, 3)).pixels
    np.testing.assert_array_equal(
        grey, normalize_image(expected.astype(np.uint8), ImageSpec(64, 32, 3)).pixels
    )


@pytest.mark.parametrize("width, height", [(1, 10**6), (10**6, 1)])
def test_16_bits_take_few_bytes_per_pixel(width, height):
    content = b"P5 %d %d 65535\n" % (width, height) + bytes(2 * 10**6)
    tracemalloc.start()
    normalize_image(content, ImageSpec(8, 8, 1))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 15 * 10**6  # most of it the index of a part; what Pillow takes is not seen


def test_12_bits_and_other_ranges():
    levels = np.arange(4096)
    pairs = levels.reshape(-1, 2)  # two in three bytes, the first bit first
    data = np.stack(
        [pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], -1
    )
    picture = normalize_image(
        tiff(4096, 1, 12, data.astype(np.uint8).tobytes()), ImageSpec(1, 4096, 1)
    )
    np.testing.assert_array_equal(picture.pixels[0, :, 0], np.rint(levels * 255 / 4095))
    levels = np.arange(1001)
    content = b"P5 1001 1 1000\n" + levels.astype(">u2").tobytes()
    error = normalize_image(content, ImageSpec(1, 1001, 1)).pixels[0, :, 0] - levels * 255 / 1000
    assert np.abs(error).max() < 0.5 + 0.5 / 257  # Pillow goes through 0..65535, rounded


def test_16_bits_of_colour_keep_the_upper_8():
    values = np.array([[0, 255, 256], [32767, 32768, 65535]])
    picture = normalize_image(
        png(2, 1, 16, 2, [values.astype(">u2").tobytes()]), ImageSpec(1, 2, 3)
    )
    np.testing.assert_array_equal(picture.pixels[0], values >> 8)
    assert picture.changed  # other decoders round another way


@pytest.mark.parametrize("kind", ["TIFF", "JPEG"])
def test_inks(kind):
    """Cyan takes red away, and so on; black takes all. Adobe's JPEGs hold 255 minus the ink."""
    inks = np.array([[0, 0, 0, 0], [255, 0, 0, 0], [0, 255, 0, 0], [0, 0, 255, 0], [0, 0, 0, 255],
                     [0, 0, 0, 128], [128, 128, 128, 0], [90, 30, 0, 60]])  # fmt: skip
    image = inks[None].repeat(16, 0).repeat(16, 1).astype(np.uint8)
    options = {"quality": 100} if kind == "JPEG" else {}
    content = file(Image.frombytes("CMYK", image.shape[1::-1], image.tobytes()), kind, **options)
    picture = normalize_image(content, ImageSpec(*image.shape[:2], 3))
    expected = (255 - image[..., :3].astype(float)) * (255 - image[..., 3:]) / 255
    assert np.abs(picture.pixels - expected).max() <= 2
    assert picture.mode == "CMYK"


def test_inks_as_luma_and_chroma():
    """YCCK, as Photoshop writes it: here by renaming the inks Y, Cb, Cr of a grey JPEG."""
    content = file(Image.new("CMYK", (16, 16), (200, 128, 128, 30)), "JPEG", quality=100)
    where = content.index(b"Adobe") + 11  # its byte "transform": 0 CMYK, 2 YCCK
    picture = normalize_image(content[:where] + b"\2" + content[where + 1 :], ImageSpec(16, 16, 3))
    # Stored is 255 - 200 = Y, which is every ink's level: 200 of 255 is left of what 30 covers.
    assert np.abs(picture.pixels - (255 - 55) * (255 - 30) / 255).max() <= 3


def test_luma():
    image = noise(32, 32, 3)
    expected = image @ np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
    grey = normalize_image(image, ImageSpec(32, 32, 1)).pixels
    assert grey.shape == (32, 32, 1) and np.abs(grey[..., 0] - expected).max() <= 0.5 + 1e-2
    colour = normalize_image(GREY, ImageSpec(5, 4, 3)).pixels
    np.testing.assert_array_equal(
        colour, normalize_image(GREY, ImageSpec(5, 4, 1)).pixels.repeat(3, 2)
    )


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    content = file(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    picture = normalize_image(content, ImageSpec(8, 8, 3))
    assert (picture.pixels == (255, 0, 0)).all() and picture.changed
    assert getattr(Image.open(io.BytesIO(picture.encoded)), "n_frames", 1) == 1


@pytest.mark.parametrize(
    "size, spec, box",  # box: rows, columns that stay
    [
        ((5, 8), (5, 5), (0, 5, 1, 6)),  # 3 go: 1 left, 2 right
        ((8, 5), (5, 5), (1, 6, 0, 5)),
        ((6, 6), (3, 3), (0, 6, 0, 6)),
        ((20, 20), (6, 8), (2, 17, 0, 20)),  # 15 rows
        ((10, 10), (3, 4), (1, 9, 0, 10)),  # 7.5 rows: 8
        ((10, 10), (4, 3), (0, 10, 1, 9)),
        ((10, 11), (7, 9), (0, 9, 0, 11)),  # 8.56 rows
        ((9, 7), (20, 2), (0, 9, 3, 4)),  # 0.9 columns
        ((4, 100), (9, 1), (0, 4, 49, 50)),  # 0.44 columns: not none
        ((100, 4), (1, 9), (49, 50, 0, 4)),
        ((7, 3), (2, 2), (2, 5, 0, 3)),
        ((1, 1000), (8, 8), (0, 1, 499, 500)),
    ],
)
def test_crop(size, spec, box):
    """What stays is seen to the last pixel, and nothing else is, whatever filter comes after."""
    top, bottom, left, right = box
    outside = np.full(size, 255, np.uint8)
    outside[top:bottom, left:right] = 0
    assert not normalize_image(outside, ImageSpec(*spec, 1)).pixels.any()
    for y, x in itertools.product((top, bottom - 1), (left, right - 1)):
        mark = np.zeros(size, np.uint8)
        mark[y, x] = 255
        assert normalize_image(mark, ImageSpec(*spec, 1)).pixels.any()


def test_crop_alone_does_not_resample():
    image = noise(12, 17, 3)
    picture = normalize_image(image, ImageSpec(12, 9, 3))
    np.testing.assert_array_equal(picture.pixels, image[:, 4:13])
    assert picture.size == (12, 17) and picture.changed


PADDED = [  # size, spec, box: rows, columns that hold the image
    ((5, 8), (8, 8), (1, 6, 0, 8)),  # 3 are left: 1 above, 2 below
    ((8, 5), (8, 8), (0, 8, 1, 6)),
    ((6, 6), (3, 3), (0, 3, 0, 3)),
    ((10, 20), (8, 8), (2, 6, 0, 8)),
    ((3, 7), (6, 8), (1, 4, 0, 8)),  # 3.43 rows
    ((7, 2), (5, 9), (0, 5, 4, 5)),  # 1.43 columns
    ((2, 20), (5, 5), (2, 3, 0, 5)),  # 0.5 rows
    ((4, 100), (9, 9), (4, 5, 0, 9)),  # 0.36 rows: not none
    ((100, 4), (9, 9), (0, 9, 4, 5)),
    ((2, 2), (4, 7), (0, 4, 1, 5)),
]


@pytest.mark.parametrize("size, spec, box", PADDED)
def test_pad_keeps_the_whole_image_on_the_background(size, spec, box):
    """A black image is a black box, exactly; a mark in any corner of it is seen in that box."""
    inside = np.zeros(spec, bool)
    inside[box[0] : box[1], box[2] : box[3]] = True
    black = np.zeros(size, np.uint8)
    for image in (black, black[..., None].repeat(3, 2)):
        pixels = normalize_image(image, ImageSpec(*spec, 3, BACKGROUND, "pad")).pixels
        np.testing.assert_array_equal(pixels, np.where(inside[..., None], 0, BACKGROUND))
    grey = normalize_image(black, ImageSpec(*spec, 1, BACKGROUND, "pad")).pixels[..., 0]
    luma = 0.587 * BACKGROUND[1] + 0.114 * BACKGROUND[2]
    assert np.abs(grey - np.where(inside, 0, luma)).max() <= 0.5
    for y, x in itertools.product((0, -1), repeat=2):
        mark = black.copy()
        mark[y, x] = 255
        seen = normalize_image(mark, ImageSpec(*spec, 1, (0, 0, 0), "pad")).pixels[..., 0]
        assert seen.any() and not seen[~inside].any()


def test_padding_is_the_colour_under_transparency():
    image = np.zeros((4, 9, 4), np.uint8)
    pixels = normalize_image(image, ImageSpec(6, 6, 3, BACKGROUND, "pad")).pixels
    assert (pixels == BACKGROUND).all()


@pytest.mark.parametrize("size, spec", [((40, 200), (64, 64)), ((300, 70), (64, 32))])
def test_stretch_takes_each_axis_by_itself(size, spec):
    """A plane stays one, corner to corner: nothing is cut off, and no axis is scaled as another."""
    y, x = (np.arange(n) + 0.5 for n in size)
    plane = np.rint(20 + 100 * y[:, None] / size[0] + 120 * x / size[1]).astype(np.uint8)
    pixels = normalize_image(plane, ImageSpec(*spec, 1, fit="stretch")).pixels[..., 0]
    y, x = (np.arange(n) + 0.5 for n in spec)
    expected = 20 + 100 * y[:, None] / spec[0] + 120 * x / spec[1]
    # Rounded before and after, and between boxes and the filter; at the ends the filters are cut.
    error = np.abs(pixels - expected)
    assert error[8:-8, 8:-8].max() <= 1.5 and error.max() <= 4


@pytest.mark.parametrize("fit", FITS)
def test_an_image_of_the_right_aspect_is_the_same_however_it_is_fitted(fit):
    for size, spec in [((9, 11), (9, 11)), ((18, 22), (9, 11)), ((9, 9), (30, 30))]:
        image = file(noise(*size, 3))
        expected = normalize_image(image, ImageSpec(*spec, 3))
        found = normalize_image(image, ImageSpec(*spec, 3, BACKGROUND, fit))
        assert found.encoded == expected.encoded and found.changed == (size != spec)
    assert VALIDATORS["data.fit"][0](fit)


@pytest.mark.parametrize("size", [(1, 1), (3, 7), (8, 8), (9, 8), (40, 41), (64, 64), (201, 77)])
@pytest.mark.parametrize("level", [0, 1, 128, 254, 255])
def test_a_constant_stays(size, level):
    for shape, spec in itertools.product(
        [size, (*size, 3)], [ImageSpec(8, 8, 3), ImageSpec(5, 9, 1)]
    ):
        assert (normalize_image(np.full(shape, level, np.uint8), spec).pixels == level).all()


@pytest.mark.parametrize("n", [16, 48, 65, 100, 200, 512])
def test_a_ramp_stays_one_inside(n):
    """All of the filters keep straight lines, in exact arithmetic and but for the ends."""
    ramp = np.linspace(10, 240, n)
    centres = (np.arange(64) + 0.5) * n / 64 - 0.5  # of the new pixels, in the old ones
    inside = slice(3, -3) if n > 64 else slice(8, -8)
    image = np.rint(ramp)[None].repeat(n, 0).astype(np.uint8)
    across, down = (
        normalize_image(x, ImageSpec(64, 64, 1)).pixels[..., 0] for x in (image, image.T)
    )
    for pixels in (across, down.T):
        error = pixels - np.interp(centres, np.arange(n), ramp)
        # The ramp is rounded, and so is the result, once or, after boxes, twice.
        assert np.abs(error[:, inside]).max() <= 1.5


@pytest.mark.parametrize("times", [2, 3, 4, 8, 9])
def test_the_finest_pattern_becomes_grey(times):
    """The Nyquist frequency is more than any smaller picture can hold."""
    n = 16 * times
    board = (np.indices([n, n]).sum(0) % 2 * 255).astype(np.uint8)
    pixels = normalize_image(board, ImageSpec(16, 16, 1)).pixels[2:-2, 2:-2]
    assert np.abs(pixels - 127.5).max() <= (8 if times == 2 else 2)


@pytest.mark.parametrize("n, box", [(95, 1), (96, 2), (144, 3), (188, 3), (240, 5), (243, 5)])
def test_boxes_then_lanczos(n, box):
    """Boxes of the largest side that leaves 48, twice what is asked for; the last may be less."""
    image = noise(n, n)
    cuts = np.arange(0, n, box)
    total = np.add.reduceat(np.add.reduceat(image.astype(int), cuts, 0), cuts, 1)
    area = np.diff(np.append(cuts, n))
    means = np.rint(total / np.outer(area, area)).astype(np.uint8)
    means = Image.fromarray(means).resize(
        (24, 24), Image.Resampling.LANCZOS, [0, 0, n / box, n / box]
    )
    error = normalize_image(image, ImageSpec(24, 24, 1)).pixels[..., 0].astype(int) - np.asarray(
        means
    )
    assert np.abs(error).max() <= 1  # where a mean lies between two levels


@pytest.mark.parametrize("size, crop, spec, how", [
    ((6, 6), (6, 6), (20, 20), Image.Resampling.BICUBIC),
    ((10, 3), (10, 2), (9, 2), Image.Resampling.LANCZOS),  # larger one way only
    ((3, 10), (2, 10), (2, 9), Image.Resampling.LANCZOS),
])  # fmt: skip
def test_filter(size, crop, spec, how):
    image = noise(*size, 3)
    cropped = Image.fromarray(np.ascontiguousarray(image[: crop[0], : crop[1]]))
    expected = np.asarray(cropped.resize(spec[::-1], how))
    np.testing.assert_array_equal(normalize_image(image, ImageSpec(*spec, 3)).pixels, expected)


@pytest.mark.parametrize("n", [4, 20, 64, 70])
@pytest.mark.parametrize("kind", ["RGBA", "palette", "tRNS"])
def test_hidden_colours_leave_no_fringe(n, kind):
    """Red on white, with green hidden where it is transparent: green equals blue everywhere."""
    hole = np.indices([n, n])[1] >= n // 2
    image = np.where(hole[..., None], np.uint8([0, 255, 0, 0]), np.uint8([255, 0, 0, 255]))
    if kind == "palette":
        colours = chunk(b"PLTE", bytes([255, 0, 0, 0, 255, 0]))
        image = png(n, n, 8, 3, hole.astype(np.uint8), colours, chunk(b"tRNS", b"\xff\0"))
    elif kind == "tRNS":
        key = chunk(b"tRNS", struct.pack(">HHH", 0, 255, 0))
        image = png(n, n, 8, 2, image[..., :3].reshape(n, -1), key)
    pixels = normalize_image(image, ImageSpec(8, 8, 3)).pixels
    assert (pixels[..., 0] == 255).all()
    np.testing.assert_array_equal(pixels[..., 1], pixels[..., 2])
    assert len(np.unique(pixels[..., 1])) >= 2


KEPT = {
    "PNG": (file(COLOUR), 3),
    "grey PNG": (file(GREY), 1),
    "PNG with metadata": (file(COLOUR, dpi=(300, 300), exif=exif(1), icc_profile=b"any"), 3),
    "JPEG": (JPEG, 3),
    "grey JPEG": (file(GREY, "JPEG"), 1),
    "progressive JPEG": (file(COLOUR, "JPEG", progressive=True), 3),
}
NOT_KEPT = {
    "PNG, grey wanted": (file(COLOUR), 1),
    "grey PNG, colour wanted": (file(GREY), 3),
    "PNG to be turned": (file(COLOUR, exif=exif(3)), 3),
    "JPEG to be turned": (file(COLOUR, "JPEG", exif=exif(3)), 3),
    "PNG with alpha": (file(CLEAR), 3),
    "opaque alpha": (file(COLOUR, mode="RGBA"), 3),
    "PNG with tRNS": (file(COLOUR, transparency=(1, 2, 3)), 3),
    "palette": (file(COLOUR, mode="P"), 3),
    "16 bits of colour": (png(11, 9, 16, 2, COLOUR.repeat(2, 2).reshape(9, -1)), 3),
    "4 bits of grey": (png(11, 9, 4, 0, noise(9, 6)), 1),
    "1 bit": (file(GREY, mode="1"), 1),
    "several frames": (file(COLOUR, **TWO), 3),
    "several JPEGs": (file(COLOUR, "MPO", **TWO), 3),
    "PNG and more": (file(COLOUR) + b"more", 3),
    "PNG, its last bytes cut off": (file(COLOUR)[:-3], 3),
    "inks": (file(COLOUR, "JPEG", mode="CMYK"), 3),
    "BMP": (file(COLOUR, "BMP"), 3),
    "WEBP": (file(COLOUR, "WEBP"), 3),
    "TIFF": (file(COLOUR, "TIFF"), 3),
    "PPM": (file(COLOUR, "PPM"), 3),
    "GIF": (file(GREY, "GIF"), 1),
}


@pytest.mark.parametrize("name", [*KEPT, *NOT_KEPT])
def test_bytes_are_kept_where_nothing_changes(name):
    content, channels = (KEPT | NOT_KEPT)[name]
    for spec in (
        ImageSpec(9, 11, channels),
        ImageSpec(8, 11, channels),
        ImageSpec(18, 22, channels),
    ):
        picture = normalize_image(content, spec)
        kept = name in KEPT and spec[:2] == (9, 11)
        assert (picture.encoded == content) == kept and picture.changed == (not kept)
        assert picture.size == (9, 11)
        assert picture.pixels.shape == spec[:3] and picture.pixels.dtype == np.uint8
        with Image.open(io.BytesIO(picture.encoded)) as image:
            assert image.mode == {1: "L", 3: "RGB"}[channels]
            assert kept or (image.format == "PNG" and not image.info)
            np.testing.assert_array_equal(np.asarray(image).reshape(spec[:3]), picture.pixels)


@pytest.mark.parametrize("shape", [(9, 11), (9, 11, 1), (9, 11, 3), (9, 11, 4)])
def test_arrays(shape):
    image = noise(*shape)
    for array in (image, np.asfortranarray(image), image.repeat(2, 1)[:, ::2], image.copy()[:]):
        array.setflags(write=False)
        channels = 1 if len(shape) == 2 else min(3, shape[2])
        picture = normalize_image(array, ImageSpec(9, 11, channels))
        assert picture.mode == "array" and picture.size == (9, 11)
        assert picture.changed == (shape[2:] == (4,))
        if not picture.changed:
            np.testing.assert_array_equal(picture.pixels, image.reshape(9, 11, -1))
        with Image.open(io.BytesIO(picture.encoded)) as back:
            np.testing.assert_array_equal(np.asarray(back).reshape(9, 11, -1), picture.pixels)
    assert normalize_image(image, ImageSpec(9, 11, 4 - channels)).changed
    assert normalize_image(image, ImageSpec(9, 10, channels)).changed


def test_an_array_and_its_files_give_the_same():
    image = noise(50, 70, 3)
    for spec in (ImageSpec(16, 16, 3), ImageSpec(7, 20, 1), ImageSpec(99, 99, 3)):
        expected = normalize_image(image, spec).pixels
        for kind in ("PNG", "BMP", "TIFF", "PPM", "WEBP"):
            options = {"lossless": True} if kind == "WEBP" else {}
            content = file(image, kind, **options)
            np.testing.assert_array_equal(normalize_image(content, spec).pixels, expected)


SMALL = {
    "PNG": file(COLOUR, exif=exif(6)),
    "palette": file(Image.fromarray(COLOUR).quantize(16), transparency=3),
    "RGBA": file(CLEAR),
    "16 bits": file(GREY.astype(np.uint16) * 257),
    "APNG": file(COLOUR, **TWO),
    "JPEG": file(COLOUR, "JPEG", exif=exif(6)),
    "progressive": file(COLOUR, "JPEG", progressive=True),
    "inks": file(COLOUR, "JPEG", mode="CMYK"),
    "WEBP": file(COLOUR, "WEBP", exif=exif(6)),
    "lossless": file(CLEAR, "WEBP", lossless=True),
    "frames": file(COLOUR, "WEBP", **TWO),
    "BMP": file(COLOUR, "BMP"),
    "1 bit": file(COLOUR, "BMP", mode="1"),
    "GIF": file(GREY, "GIF"),
    "animation": file(COLOUR, "GIF", **TWO),
    "TIFF": file(COLOUR, "TIFF", exif=exif(6)),
    "LZW": file(COLOUR, "TIFF", compression="tiff_lzw"),
    "deflate": file(COLOUR, "TIFF", compression="tiff_adobe_deflate"),
    "fax": file(COLOUR, "TIFF", mode="1", compression="group4"),
    "in JPEG": file(COLOUR, "TIFF", compression="jpeg"),
    "PPM": file(COLOUR, "PPM"),
    "PGM": b"P5 3 2 1000\n" + bytes(range(12)),
    "plain": b"P3 2 2 255\n" + b"1 2 3 " * 4,
}


def pixels_or_none(content):
    """None: refused. Anything else than ImageError is a failure."""
    try:
        return normalize_image(content, ImageSpec(9, 11, 3)).pixels
    except ImageError as error:
        assert str(error).isprintable()
        return None


@pytest.mark.parametrize("name", SMALL)
def test_what_is_cut_off_anywhere_is_refused_or_is_the_whole_image(name):
    """What may lack is what says nothing of the pixels: the last checksum, further frames."""
    content = SMALL[name]
    whole, left = pixels_or_none(content), 0
    for n in range(len(content)):
        if (pixels := pixels_or_none(content[:n])) is not None:
            np.testing.assert_array_equal(pixels, whole)
            left += 1
    assert left <= (len(content) // 2 if name == "animation" else 4)


@pytest.mark.parametrize("name", ["PNG", "palette", "16 bits", "APNG"])
def test_no_flipped_bit_of_a_png_goes_unnoticed(name):
    """Pillow itself decodes on, and gives garbage for most."""
    content = SMALL[name]
    whole, unharmed = pixels_or_none(content), 0
    for where, bit in itertools.product(range(len(content)), range(8)):
        if (pixels := pixels_or_none(flipped(content, where, bit))) is not None:
            np.testing.assert_array_equal(pixels, whole)
            unharmed += 1
    assert unharmed <= 8 * 8  # of the end's length and checksum


def damaged(content, draw):
    content = bytearray(content)
    for _ in range(draw.choice([1, 1, 2, 4, 16])):
        at = draw.randrange(len(content))
        n = draw.randrange(1, 9)
        match draw.randrange(5):
            case 0:
                content[at] = draw.randrange(256)
            case 1:
                content[at] ^= 1 << draw.randrange(8)
            case 2 if len(content) > 40:
                del content[at : at + n]
            case 3:
                content[at:at] = draw.randbytes(n)
            case 4:
                content[at : at + 4] = b"\xff" * 4
    return bytes(content)


def test_random_damage():
    draw, usable = random.Random(0), 0
    for _ in range(4000):
        usable += pixels_or_none(damaged(draw.choice([*SMALL.values()]), draw)) is not None
    assert 100 < usable < 3000  # that is, both were seen


def test_random_bytes():
    draw = random.Random(0)
    starts = [content[:n] for content in SMALL.values() for n in (4, 16, 30)]
    for _ in range(2000):
        start = draw.choice([b"", *starts])
        pixels_or_none(start + draw.randbytes(draw.randrange(100)))
