"""What TFDS reads is what the source gave, and every number of the summary is known."""

import contextlib
import hashlib
import io
import multiprocessing
import os
import signal
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from diffusion import data
from diffusion.data import loader
from diffusion.data.prepare import archives, image_decoding, pipeline, sources, tfds_writer
from diffusion.utils.errors import DataError
from tests.conftest import ROOT

SPEC = image_decoding.ImageSpec(8, 8, 3)


def file(x, format="png", **options):
    bytes_ = io.BytesIO()
    Image.fromarray(x).save(bytes_, format, **options)
    return bytes_.getvalue()


def noise(n, seed=0, shape=(8, 8, 3)):
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), np.uint8)


def source(items, classes=(), about="Made here."):
    return archives.Source(lambda: iter(items), tuple(classes), about, 0)


def arrays(n, classes=3, split=None):
    items = [archives.Item(f"x[{i}]", x, i % classes, split) for i, x in enumerate(noise(n))]
    return source(items, [f"class {k}" for k in range(classes)])


def item(content, name="x.png", label=0, split=None):
    return archives.Item(name, content, label, split)


def read(folder, split):
    rows = tfds.builder_from_directory(str(folder)).as_data_source(split=split)
    return np.stack([row["image"] for row in rows]), [row["label"] for row in rows]


def raw(folder, split):
    """The files of the images as they are stored."""
    builder = tfds.builder_from_directory(str(folder))
    decoders = {"image": tfds.decode.SkipDecoding()}
    return [x["image"] for x in builder.as_data_source(split=split, decoders=decoders)]


def tree(folder):
    """{path: bytes} of all files."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def about(folder):
    return tfds.builder_from_directory(str(folder)).info.description


def test_read_back_exactly(tmp_path):
    """Pixels, labels, names of classes and order, by TFDS and by this project's own reader."""
    items = [
        item(x, f"x[{i}]", i % 3, "test" if i % 4 == 3 else "train")
        for i, x in enumerate(noise(20))
    ]
    summary = pipeline.prepare(source(items, "abc"), SPEC, tmp_path, "tiny", workers=1)
    assert summary.images == {"train": 15, "test": 5}
    folder = tmp_path / "tiny" / "1.0.0"
    assert tfds.builder_from_directory(str(folder)).info.features["label"].names == list("abc")
    for split in ("train", "test"):
        expected = [x for x in items if x.split == split]
        image, label = read(folder, split)
        np.testing.assert_array_equal(image, [x.content for x in expected])
        assert label == [x.label for x in expected]
        ours = data.open_dataset("tfds", split, name="tiny", data_dir=str(tmp_path))
        our_image, our_label = loader.load_dataset(ours)
        np.testing.assert_array_equal(our_image, image)
        assert our_label.tolist() == label and ours.num_classes == 3
    assert "tensorflow" not in sys.modules


def test_no_classes_read_as_none(tmp_path):
    pipeline.prepare(source([item(noise(1)[0])]), SPEC, tmp_path, "tiny", workers=1)
    ours = data.open_dataset("tfds", "train", name="tiny", data_dir=str(tmp_path))
    assert ours.num_classes == 0 and ours.n == 1


def test_original_files_are_kept(tmp_path):
    """Of a folder: a PNG and a JPEG that fit byte for byte; what does not fit becomes a PNG."""
    x = noise(3)
    files = {
        "cats/1.png": file(x[0], compress_level=0),
        "cats/2.jpg": file(x[1], "jpeg", quality=70),
        "dogs/3.webp": file(x[2], "webp", lossless=True),
        "dogs/4.png": file(noise(1, shape=(16, 20, 3))[0]),
    }
    for name, content in files.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(content)
    folder_of = sources.open_source("folder", archive=str(tmp_path / "in"))
    summary = pipeline.prepare(folder_of, SPEC, tmp_path, "tiny", workers=1)
    stored = raw(tmp_path / "tiny" / "1.0.0", "train")
    assert stored[:2] == [files["cats/1.png"], files["cats/2.jpg"]]
    assert all(x.startswith(b"\x89PNG") for x in stored[2:])
    image, label = read(tmp_path / "tiny" / "1.0.0", "train")
    np.testing.assert_array_equal(image[[0, 2]], x[[0, 2]])
    np.testing.assert_array_equal(
        image[3], image_decoding.normalize_image(files["dogs/4.png"], SPEC).pixels
    )
    assert label == [0, 0, 1, 1] and summary.classes == {"cats": 2, "dogs": 2}
    assert summary.unchanged == 2 and summary.modes == {"RGB": 4}


def test_the_same_bytes_from_any_number_of_processes(tmp_path):
    """Also with several shards, and with images that are left out."""
    rng = np.random.default_rng(1)
    items = []
    for i, x in enumerate(noise(600)):
        bad = DataError("cannot be read") if i % 7 == 1 else b"GIF89a" + bytes(i % 50)
        content = bad if i % 5 == 1 else file(x) if rng.integers(2) else x
        items.append(item(content, f"x[{i}]", i % 3))
    of = source(items, "abc")
    done, found = [], []
    for workers in (1, 2):
        folder, reported = tmp_path / str(workers), []
        summary = pipeline.prepare(
            of,
            SPEC,
            folder,
            "tiny",
            workers=workers,
            shard_bytes=10_000,
            holdout=0.2,
            report=reported.append,
        )
        found.append((tree(folder), summary._replace(sample=summary.sample.tolist())))
        done.append(reported)
    assert found[0] == found[1]
    assert done[0] == done[1] == [256, 512, 600]
    assert summary.num_skipped == 120 and sum(summary.images.values()) == 480
    assert sum("array_record" in name for name in found[0][0]) > 10
    assert not multiprocessing.active_children()


def test_the_description_says_how_it_was_made(tmp_path):
    items = [item(x, f"{i}.png") for i, x in enumerate(noise(3))]
    items += [item(b"no image", f"bad{i}.png") for i in range(7)]
    rule = image_decoding.ImageSpec(8, 8, 1, (0, 9, 8))
    of = source(items, about="From a drawer.")
    summary = pipeline.prepare(of, rule, tmp_path, "tiny", workers=1, holdout=["1.png"])
    text = about(tmp_path / "tiny" / "1.0.0")
    for words in (
        "From a drawer.",
        "8x8 (height x width), 8 bits, grey: the largest centred crop of this aspect",
        "RGB (0, 9, 8)",
        "their name is among 1 given names",
        "3 images: 2 in train, 1 in test; 7 skipped",
        "skipped bad4.png: expected an image",
        "skipped 2 more",
        *pipeline.describe(summary),
    ):
        assert words in text
    assert "bad5" not in text
    rule = rule._replace(fit="pad")
    pipeline.prepare(of, rule, tmp_path, "other", workers=1, holdout=0.25)
    text = about(tmp_path / "other" / "1.0.0")
    assert "the SHA-256 of their name, over its range, is below 0.25" in text
    assert f"grey: the whole image, padded to this aspect, on a background of RGB {rule[3]}" in text


def test_survey_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    surveyed = pipeline.survey(arrays(30), SPEC, workers=2, holdout=0.3)
    assert not tree(tmp_path)
    prepared = pipeline.prepare(arrays(30), SPEC, tmp_path, "tiny", workers=1, holdout=0.3)
    np.testing.assert_array_equal(surveyed.sample, prepared.sample)
    assert surveyed._replace(sample=None) == prepared._replace(sample=None)


def splits(names, holdout):
    x = noise(1)[0]
    of = source([item(x, name) for name in names])
    got = {}

    def spy(split, record):
        got[names[len(got)]] = split

    pipeline.survey(of, SPEC, holdout=holdout, on_error="fail", workers=1, write=spy)
    return got


def test_holdout_is_a_hash_of_the_name():
    """As stated: the first 8 bytes, big-endian, over 2^64; so another program can tell."""
    names = [f"cats/{i:04d}.jpg" for i in range(2000)] + ["häßlich.png"]
    found = splits(names, 0.2)
    for name in names:
        number = int(hashlib.sha256(name.encode()).hexdigest()[:16], 16)
        assert found[name] == ("test" if number < 0.2 * 2**64 else "train")
    # A binomial of n = 2001 and p = 0.2: five standard deviations.
    assert abs(list(found.values()).count("test") / 2001 - 0.2) < 5 * np.sqrt(0.2 * 0.8 / 2001)


def test_holdout_does_not_depend_on_the_other_images():
    names = [f"{i}.png" for i in range(300)]
    first, more = splits(names, 0.3), splits(["new.png", *names[::-1], "a.png"], 0.3)
    assert {name: more[name] for name in names} == first
    fewer = splits(names, 0.1)
    assert all(first[name] == "test" for name in names if fewer[name] == "test")


def test_holdout_by_name():
    assert splits(["a", "b", "c"], {"b"}) == {"a": "train", "b": "test", "c": "train"}
    assert splits(["a", "b"], 0.0) == splits(["a", "b"], []) == {"a": "train", "b": "train"}


@pytest.mark.parametrize(
    "holdout, message",
    [
        (["a.png", "no.png", "x"], r"found no.png, x \(2 in all\); they are like a.png"),
        ("a.png", r"expected a fraction or several names, found 'a.png'"),
        (1.0, r"expected a fraction in \[0, 1\), found 1.0"),
        (-0.1, r"expected a fraction in \[0, 1\), found -0.1"),
        (float("nan"), r"expected a fraction in \[0, 1\), found nan"),
    ],
)  # fmt: skip
def test_holdouts_that_mean_nothing(tmp_path, holdout, message):
    of = source([item(noise(1)[0], "a.png")])
    with pytest.raises(DataError, match=f"data.holdout(_names)?: .*{message}"):
        pipeline.prepare(of, SPEC, tmp_path, "tiny", holdout=holdout, workers=1)
    assert not list(tmp_path.iterdir())


def test_holdout_is_not_for_a_source_with_splits():
    with pytest.raises(DataError, match=r"data.holdout: .* found x\[0\] in train; use 0.0"):
        pipeline.survey(arrays(3, split="train"), SPEC, holdout=0.5, workers=1)


def test_every_number_of_the_summary():
    black, white = np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 255, np.uint8)
    grey, a, b = np.full((8, 8), 51, np.uint8), noise(2)[0], noise(2)[1]
    large, tall = np.zeros((20, 10, 3), np.uint8), np.zeros((24, 8, 3), np.uint8)
    items = [
        item(black, "0", 0, "train"),
        item(file(a), "1", 1, "train"),
        item(file(a, compress_level=1), "2", 1, "train"),  # other bytes, the same pixels
        item(black, "3", 0, "train"),
        item(file(white), "4", 0, "test"),
        item(file(a), "5", 1, "test"),  # is in train, twice
        item(file(white), "6", 0, "test"),
        item(file(large), "7", 0, "test"),  # once reduced, the black one of train
        item(tall, "8", 0, "train"),
        item(file(grey), "9", 0, "train"),
        item(b, "10", 3, "train"),
        item(DataError("gone"), "11", 0, "train"),
        item(a, "12", 4, "train"),
        item(b"\x89PNG", "13\n\x1b[2J", 0, "train"),
    ]
    s = pipeline.survey(source(items, "abcd"), SPEC, workers=1)
    assert s.images == {"train": 7, "test": 4}
    assert s.num_skipped == 3
    assert s.skipped[:2] == (("11", "gone"), ("12", "expected a label of 0 to 3, found 4"))
    assert s.skipped[2][0] == r"13\n\x1b[2J" and "expected an image" in s.skipped[2][1]
    assert (s.smallest, s.largest) == ((8, 8), (20, 10))
    assert s.frequent == (((8, 8), 9), ((20, 10), 1), ((24, 8), 1))
    assert s.modes == {"RGB": 6, "array": 4, "L": 1}
    assert s.classes == {"a": 7, "b": 3, "c": 0, "d": 1}
    assert (s.low, s.high) == (0, 255)
    mean = np.mean([0, a.mean(), a.mean(), 0, 255, a.mean(), 255, 0, 0, 51, b.mean()])
    assert s.mean == pytest.approx(mean, rel=1e-12)
    # In train: one a, one black and the tall one; of test, a and the large one are there too.
    assert s.repeats == {"train": 3, "test": 1} and s.shared == 2
    assert s.unchanged == 8  # all but the large, the tall and the grey one
    np.testing.assert_array_equal(s.sample[[0, 1, 4, 10]], [black, a, white, b])
    assert len(s.sample) == 11 and s.sample[9].max() == s.sample[9].min() == 51
    lines = pipeline.describe(s)
    assert all("\n" not in line and line.isprintable() for line in lines)
    assert lines[:6] == [
        "11 images: 7 in train, 4 in test; 3 skipped",
        "original height x width: 8x8 to 20x10, most often 8x8 (9), 20x10 (1), 24x8 (1)",
        "original modes: RGB (6), array (4), L (1); 8 images are stored unchanged",
        f"values 0 to 255, mean {mean:.1f}; 0.0 MB",
        "4 classes of 0 (c) to 7 (a) images",
        "duplicates: 3 in train, 1 in test; 2 images of test are in train as well",
    ]
    assert lines[6:8] == ["skipped 11: gone", "skipped 12: expected a label of 0 to 3, found 4"]


def test_numbers_have_separators():
    x = noise(1)[0]
    s = pipeline.survey(source(item(x, f"{i}", i % 2) for i in range(1234)), SPEC, workers=1)
    text = "\n".join(pipeline.describe(s))
    assert "1,234 images: 1,234 in train; 0 skipped" in text
    assert "8x8 (1,234)" in text and "duplicates: 1,233 in train" in text
    assert "test" not in text and "classes" not in text


def test_num_bytes_is_what_tfds_counts(tmp_path):
    s = pipeline.prepare(arrays(9), SPEC, tmp_path, "tiny", workers=1)
    folder = tmp_path / "tiny" / "1.0.0"
    assert s.num_bytes == tfds.builder_from_directory(str(folder)).info.dataset_size
    assert sum(map(len, raw(folder, "train"))) < s.num_bytes < sum(map(len, tree(folder).values()))


@pytest.mark.parametrize("n", [1, 64, 65, 127, 128, 200, 1000])
def test_the_sample_is_spread_over_the_set(n):
    """Image i has the number i in its first two values: the gaps are alike to the stride."""

    def numbered(i):
        x = np.zeros((2, 2, 3), np.uint8)
        x[0, 0, :2] = divmod(i, 256)
        return item(x, str(i))

    s = pipeline.survey(
        source(map(numbered, range(n))), image_decoding.ImageSpec(2, 2, 3), workers=1
    )
    numbers = s.sample[:, 0, 0, :2].astype(int) @ [256, 1]
    assert len(numbers) == min(n, 64) and numbers[0] == 0
    gaps = np.diff([*numbers, n])
    assert gaps.min() >= 1 and gaps.max() <= max(1, 4 * n / 64)


@pytest.mark.parametrize("levels", [2, 3, 6, 16, 17, 18, 52, 64])
@pytest.mark.parametrize("to_byte", [np.rint, np.floor])
def test_few_levels_are_counted_and_offered(levels, to_byte):
    """Evenly spaced over 0..255, however the numbers were made integers."""
    image = to_byte(np.arange(64) % levels * 255 / (levels - 1)).astype(np.uint8)
    image = np.broadcast_to(image.reshape(8, 8, 1), (8, 8, 3))
    summary = pipeline.survey(source([archives.Item("x", image, 0, None)]), SPEC, workers=1)
    assert summary.levels == levels
    [line] = [line for line in pipeline.describe(summary) if "levels" in line]
    assert line.endswith(f"train with --config.data.levels={levels}")


def test_other_values_are_256_levels():
    """So are values that are few but not evenly spaced, and a top level below 255."""
    for values in (np.arange(256), [0, 100, 255, 7], 8 * np.arange(32), np.arange(65) * 255 / 64):
        occurring = np.zeros(256, bool)
        occurring[np.array(values, int)] = True
        assert pipeline.evenly_spaced_levels(occurring) == 256
    summary = pipeline.survey(arrays(20), SPEC, workers=1)
    assert summary.levels == 256
    assert not [line for line in pipeline.describe(summary) if "levels" in line]


def test_the_sample_is_bounded_in_bytes(monkeypatch):
    monkeypatch.setattr(pipeline, "SAMPLE_BYTES", 5 * 8 * 8 * 3)
    assert pipeline.survey(arrays(100), SPEC, workers=1).sample.shape == (5, 8, 8, 3)


def test_an_image_takes_few_bytes_of_memory():
    """16, and up to an eighth more in arrays that grow; at the end as much again, sorted."""
    record = tfds_writer.make_encoder((8, 8, 3), ())(file(noise(1)[0]), 0)
    x = pipeline._Encoded(record, 7, (7, 7), "RGB", False, np.ones(256, bool), 7)
    sizes = np.random.default_rng(0).integers(1, 2**15, (100_000, 2)).tolist()
    tally = pipeline._Tally(SPEC)
    tracemalloc.start()
    try:
        for i, size in enumerate(sizes):
            tally.add("train", 0, x._replace(hash=i, size=size))
            tally.skip("bad.png", "no image")
        grown, _ = tracemalloc.get_traced_memory()
        assert len(np.unique(tally.summary(()).sample)) > 99
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert grown < 20 * len(sizes) and most < 80 * len(sizes)


def test_what_is_named_of_the_skipped_is_bounded(monkeypatch):
    monkeypatch.setattr(pipeline, "MAX_SKIPPED_NAMES", 4)
    items = [item(b"", f"bad{i}") for i in range(9)] + [item(noise(1)[0])]
    s = pipeline.survey(source(items), SPEC, workers=1)
    assert s.num_skipped == 9 and [name for name, _ in s.skipped] == [f"bad{i}" for i in range(4)]


@pytest.mark.parametrize(
    "content, why",
    [(b"no image", "expected an image"), (DataError("12 bytes lost"), "12 bytes lost")],
)
def test_fail(tmp_path, content, why):
    of = source([item(noise(1)[0], "good"), item(content, "cats/bad\n.png")])
    with pytest.raises(DataError, match=rf"^cats/bad\\n\.png: .*{why}") as error:
        pipeline.prepare(of, SPEC, tmp_path, "tiny", on_error="fail", workers=2)
    assert not list(tmp_path.iterdir()) and not multiprocessing.active_children()
    del error  # while it is there, so is all that its traceback refers to
    assert pipeline.survey(of, SPEC, on_error="skip", workers=1).num_skipped == 1


@pytest.mark.parametrize(
    "of, options, message",
    [
        (source([]), {}, "expected images, found none in the source"),
        (source([item(b"", "a"), item(b"", "b")]), {}, "none of 2 images can be used; a: expected"),
        (source([item(noise(1)[0])], "aa"), {}, "classes: expected different"),
    ],
)
def test_errors_of_one_line(tmp_path, of, options, message):
    for call in (pipeline.survey, pipeline.prepare):
        where = (tmp_path, "tiny") if call is pipeline.prepare else ()
        with pytest.raises(DataError, match=message) as error:
            call(of, SPEC, *where, **{"workers": 1, **options})
        assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_an_unknown_choice_is_refused():
    with pytest.raises(ValueError, match="on_error: expected skip or fail, found 'ignore'"):
        pipeline.survey(arrays(1), SPEC, on_error="ignore", workers=1)


def test_an_existing_set_is_refused_before_the_source_is_read(tmp_path):
    pipeline.prepare(arrays(3), SPEC, tmp_path, "tiny", workers=1)
    before = tree(tmp_path)
    unread = archives.Source(lambda: pytest.fail("read"), (), "", 1)
    with pytest.raises(DataError, match=r"another data\.name, or delete it"):
        pipeline.prepare(unread, SPEC, tmp_path, "tiny", workers=1)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("error", [DataError("half"), KeyboardInterrupt("half")])
def test_a_source_that_ends_in_an_error_leaves_nothing(tmp_path, error):
    def items():
        yield from arrays(600).items()
        raise error

    broken = archives.Source(items, ("class 0", "class 1", "class 2"), "", 1)
    with pytest.raises(type(error), match="half"):
        pipeline.prepare(broken, SPEC, tmp_path, "tiny", workers=2)
    assert not list(tmp_path.iterdir()) and not multiprocessing.active_children()
    pipeline.prepare(arrays(600), SPEC, tmp_path, "tiny", workers=1)
    assert read(tmp_path / "tiny" / "1.0.0", "train")[0].shape == (600, 8, 8, 3)


def crash(spec, classes, item):
    """Stands in for `_encode_item`: a decoder that ends its process at one image."""
    if item.name == "x[5]":
        os.kill(os.getpid(), signal.SIGSEGV)
    return encode_item(spec, classes, item)


encode_item = pipeline._encode_item


def test_an_image_that_ends_its_process_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "_encode_item", crash)
    with pytest.raises(DataError, match=r"^x\[5\]: it ends the process .*; leave it out$"):
        pipeline.prepare(arrays(20), SPEC, tmp_path, "tiny", workers=2)
    assert not list(tmp_path.iterdir()) and not multiprocessing.active_children()


ENDLESS = """
import itertools, signal, sys
import numpy as np
from diffusion.data.prepare import archives, image_decoding, pipeline

signal.signal(signal.SIGINT, signal.default_int_handler)  # also where a shell had it ignored
# Run again in a worker, this file would write a second line, and start another preparation.
print("started", flush=True)
images = (archives.Item(str(i), np.zeros((8, 8, 3), np.uint8), 0, None) for i in itertools.count())
try:
    source = archives.Source(lambda: images, (), "", 1)
    pipeline.prepare(source, image_decoding.ImageSpec(8, 8, 3), sys.argv[1], "tiny", workers=2,
                     report=lambda done: print("at", done, flush=True))
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


@contextlib.contextmanager
def endless(tmp_path):
    """A program that prepares for ever, in a process group of its own; it is at work."""
    script = tmp_path / "main.py"
    script.write_text(ENDLESS)
    process = subprocess.Popen(
        [sys.executable, script, tmp_path / "out"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout.readline() == "started\n"
        assert process.stdout.readline() == "at 256\n"
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        process.stderr.close()


def test_ctrl_c_ends_all_without_a_word(tmp_path):
    with endless(tmp_path) as process:
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)  # ends when no process has its end of the pipes
    assert err == "" and out.endswith("interrupted\n") and "started" not in out
    assert not list((tmp_path / "out").iterdir())


def test_a_killed_start_leaves_no_set_and_no_processes(tmp_path):
    with endless(tmp_path) as process:
        process.kill()  # the workers are left to notice
        _, err = process.communicate(timeout=60)
    assert err == ""
    (left,) = (tmp_path / "out" / "tiny").iterdir()
    assert left.name == ".incomplete-1.0.0"
    with pytest.raises(tfds.core.DatasetNotFoundError):
        tfds.builder("tiny", data_dir=tmp_path / "out")
    with pytest.raises(DataError, match="no data set 'tiny'"):
        data.open_dataset("tfds", "train", name="tiny", data_dir=str(tmp_path / "out"))
    pipeline.prepare(arrays(5), SPEC, tmp_path / "out", "tiny", workers=1)
    assert [path.name for path in (tmp_path / "out" / "tiny").iterdir()] == ["1.0.0"]
    assert len(read(tmp_path / "out" / "tiny" / "1.0.0", "train")[0]) == 5
