"""--mode=compress and --mode=decompress: what goes in comes out, and what is refused."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

from diffusion import data
from diffusion.codec import plan
from diffusion.modes import compress
from diffusion.runtime import preemption
from diffusion.utils import partial_results
from tests.runs import run


def read(folder):
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))])


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of ten images of the test split, and the images."""
    folder = tmp_path_factory.mktemp("images")
    pixels = data.digits("test").read(range(10))[0]
    for i, image in enumerate(pixels):
        Image.fromarray(image[..., 0]).save(folder / f"{i}.png")
    return folder, pixels[..., 0]


@pytest.fixture(scope="module")
def compressed(trained, images, tmp_path_factory):
    """The file of the ten images; what was printed."""
    path = tmp_path_factory.mktemp("compressed") / "ten.ddpm"
    args = f"--workdir={trained[0]}", f"--input={images[0]}", f"--output={path}"
    with pytest.MonkeyPatch.context() as patch:
        free_steps(patch)
        return path, run("--mode=compress", *args)[0]


def free_steps(patch):
    """Makes steps pay off for the few images and the bad model of a tiny training."""
    patch.setattr(plan, "STEP_BITS", 0)
    patch.setattr(plan, "file_bits", lambda bits, *_: bits)


def decompress(trained, path, output, *more, code=0):
    args = f"--workdir={trained[0]}", f"--input={path}", f"--output={output}"
    return run("--mode=decompress", *args, *more, code=code)


def test_images_come_back_bit_for_bit(trained, images, compressed, tmp_path):
    out, _ = decompress(trained, compressed[0], tmp_path / "out")
    np.testing.assert_array_equal(read(tmp_path / "out"), images[1])
    assert (tmp_path / "out" / "000000.png").exists()
    assert len(list((tmp_path / "out").iterdir())) == 10 and "10 images, exact" in out


def test_what_a_file_takes_is_printed_and_kept(trained, compressed):
    path, out = compressed
    [report] = [json.loads(p.read_text()) for p in trained[0].glob("eval/*/codec.json")]
    assert report["points"][-1]["bits"] * 640 == pytest.approx(8 * path.stat().st_size)
    assert report["points"][-1]["t"] == 0 and report["points"][-1]["rmse"] == 0
    rates = [point["bits"] for point in report["points"]]
    assert rates == sorted(rates) and len(rates) >= 2
    assert set(report["lossless"]) - {"JXL"} == {"PNG", "WebP"} and "JPEG" in report["lossy"]
    for curve in report["lossy"].values():  # fewer errors take more bits
        (low, high), *_ = zip(curve[0], curve[-1], strict=True)
        assert low < high and curve[0][1] > curve[-1][1]
    assert f"{path} ({path.stat().st_size:,} bytes)" in out and "x_0" in out


@pytest.mark.parametrize("decode", ["x_0", "ode"])
def test_fewer_steps_are_decoded(trained, images, compressed, tmp_path, decode):
    more = ["--config.codec.steps_decoded=1", f"--config.codec.decode={decode}"]
    out, _ = decompress(trained, compressed[0], tmp_path / "out", *more)
    assert "segments read: 1, to" in out and read(tmp_path / "out").shape == (10, 8, 8)


def test_any_whole_prefix_decodes(trained, compressed, tmp_path):
    """Cut at bytes of all parts: within the header it is refused, later there are images."""
    content = compressed[0].read_bytes()
    header = json.loads(next(trained[0].glob("eval/*/codec.json")).read_text())["header_bytes"]
    cuts = {header - 1: 6, header: 0, header + 9: 0, len(content) - 1: 0}
    for n, code in cuts.items():
        path = tmp_path / f"{n}.ddpm"
        path.write_bytes(content[:n])
        out, err = decompress(trained, path, tmp_path / f"{n}", code=code)
        assert ("ends within its header" in err) if code else ("the file ends within" in out)
    more = f"--config.codec.bytes={header + 9}"
    decompress(trained, compressed[0], tmp_path / "bytes", more)
    np.testing.assert_array_equal(read(tmp_path / "bytes"), read(tmp_path / f"{header + 9}"))


def test_a_damaged_segment_is_named(trained, compressed, tmp_path):
    content = bytearray(compressed[0].read_bytes())
    content[-3] ^= 4
    (tmp_path / "bad.ddpm").write_bytes(content)
    _, err = decompress(trained, tmp_path / "bad.ddpm", tmp_path / "out", code=6)
    assert "bad.ddpm: segment" in err and "--config.codec.steps_decoded=" in err
    assert not (tmp_path / "out").exists()


def test_other_weights_and_other_files_are_refused(trained, images, compressed, tmp_path):
    _, err = decompress(trained, compressed[0], tmp_path / "a", "--config.weights=raw", code=6)
    assert "made with weights" in err and err.count("\n") == 1
    (tmp_path / "x").write_bytes(b"not one of ours, by far")
    _, err = decompress(trained, tmp_path / "x", tmp_path / "b", code=6)
    assert "--mode=compress" in err
    decompress(trained, tmp_path / "none", tmp_path / "c", code=3)
    args = "--mode=compress", f"--workdir={trained[0]}", f"--input={images[0]}"
    _, err = run(*args, f"--output={compressed[0]}", code=4)
    assert "expected a new file" in err
    run(*args, code=2)


def test_images_of_another_kind_are_refused(trained, tmp_path):
    for name, size, value, found in (
        ("size", 9, 0, "8x8x1, found 9x9x1"),
        ("level", 8, 3, "17 levels"),
    ):
        (tmp_path / name).mkdir()
        Image.fromarray(np.full((size, size), value, np.uint8)).save(tmp_path / name / "a.png")
        args = f"--workdir={trained[0]}", f"--input={tmp_path / name}", f"--output={tmp_path / 'o'}"
        _, err = run("--mode=compress", *args, code=3)
        assert found in err


def test_what_no_one_could_read_is_not_written(trained, images, tmp_path):
    args = f"--workdir={trained[0]}", f"--input={images[0]}", f"--output={tmp_path / 'a'}"
    for key, value, found in (("candidates", 23, "4..22, found 23"), ("padding", 10, "0 to 9")):
        _, err = run("--mode=compress", *args, f"--config.codec.{key}={value}", code=2)
        assert "codec" in err and key in err and found in err and err.count("\n") == 1


def test_an_archive_comes_back(trained, images, tmp_path):
    path, more = tmp_path / "all.ddpm", ["--config.codec.kind=archive", "--config.weights=raw"]
    args = f"--workdir={trained[0]}", f"--input={images[0]}", f"--output={path}"
    out, _ = run("--mode=compress", *args, *more)
    [report] = [json.loads(p.read_text()) for p in trained[0].glob("eval/*/archive.json")]
    parts = report["initial"] + report["plan"] + report["ratio"] * report["bound"]
    assert parts == pytest.approx(report["file"]) and f"{report['file']:.4f} bits/dim" in out
    assert report["file"] * 640 == pytest.approx(8 * path.stat().st_size)
    decompress(trained, path, tmp_path / "out", "--config.weights=raw")
    np.testing.assert_array_equal(read(tmp_path / "out"), images[1])
    path.write_bytes(path.read_bytes()[:-5])
    decompress(trained, path, tmp_path / "bad", "--config.weights=raw", code=6)


def test_a_stopped_archive_goes_on(trained, images, tmp_path, monkeypatch):
    """Of the same images; of others it begins anew."""
    others = tmp_path / "others"
    others.mkdir()
    for i, image in enumerate(images[1][::-1]):
        Image.fromarray(image).save(others / f"{i}.png")
    args = f"--workdir={trained[0]}", "--config.codec.kind=archive"
    monkeypatch.setattr(partial_results, "SAVE_EVERY_S", 0)
    encode, calls = compress.bits_back.encode_batch, []
    monkeypatch.setattr(
        compress.bits_back, "encode_batch", lambda *args: calls.append(None) or encode(*args)
    )
    for name, source, encoded in (("whole", images[0], 3), ("a", images[0], 2), ("b", others, 3)):
        path, more = tmp_path / f"{name}.ddpm", (*args, f"--output={tmp_path / name}.ddpm")
        if name != "whole":
            with monkeypatch.context() as patch:
                stop_at(patch, 2)
                run("--mode=compress", *more, f"--input={images[0]}", code=75)
        calls.clear()
        run("--mode=compress", *more, f"--input={source}")
        assert len(calls) == encoded
        decompress(trained, path, tmp_path / name)
    assert (tmp_path / "a.ddpm").read_bytes() == (tmp_path / "whole.ddpm").read_bytes()
    np.testing.assert_array_equal(read(tmp_path / "b"), images[1][::-1])


def test_a_stopped_encoding_goes_on(trained, images, compressed, tmp_path, monkeypatch):
    """Stopped after each block, it writes the file of an encoding that was not."""
    path = tmp_path / "ten.ddpm"
    args = f"--workdir={trained[0]}", f"--input={images[0]}", f"--output={path}"
    free_steps(monkeypatch)
    monkeypatch.setattr(partial_results, "SAVE_EVERY_S", 0)
    encode, calls = compress.progressive.encode_groups, []

    def once(*args):
        if len(calls) % 2:
            calls.append(None)
            raise preemption.Stopped("here")
        calls.append(None)
        return encode(*args)

    monkeypatch.setattr(compress.progressive, "encode_groups", once)
    codes = 0
    while not path.exists():
        run("--mode=compress", *args, code=75 if codes < 2 else 0)
        codes += 1
    assert codes == 3 and path.read_bytes() == compressed[0].read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["ten.ddpm"]


def test_a_stopped_decoding_goes_on(trained, images, compressed, tmp_path, monkeypatch):
    asked = []

    def after_one():
        asked.append(None)
        if len(asked) == 2:
            raise preemption.Stopped("here")

    monkeypatch.setattr(preemption, "raise_if_requested", after_one)
    decompress(trained, compressed[0], tmp_path / "out", code=75)
    assert len(list((tmp_path / "out").glob("*.png"))) == 4
    decompress(trained, compressed[0], tmp_path / "out")
    np.testing.assert_array_equal(read(tmp_path / "out"), images[1])


def test_devices_do_not_change_a_file(trained, images, tmp_path, monkeypatch):
    """Written with a call of the network on each of three devices; read on one."""
    path, args = tmp_path / "a.ddpm", [f"--workdir={trained[0]}", f"--input={images[0]}"]
    free_steps(monkeypatch)
    run("--mode=compress", *args, f"--output={path}", "--config.codec.group=10")
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    decompress(trained, path, tmp_path / "out")
    np.testing.assert_array_equal(read(tmp_path / "out"), images[1])


def test_work_on_other_images_is_not_gone_on_with(
    trained, images, compressed, tmp_path, monkeypatch
):
    """Both files have the same header: what a stopped run has left must not be mixed in."""
    others = tmp_path / "others"
    others.mkdir()
    for i, image in enumerate(images[1][::-1]):
        Image.fromarray(image).save(others / f"{i}.png")
    args = [f"--workdir={trained[0]}", f"--output={tmp_path / 'b.ddpm'}"]
    free_steps(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(partial_results, "SAVE_EVERY_S", 0)
        stop_at(patch, 2)
        run("--mode=compress", *args, f"--input={images[0]}", code=75)
    run("--mode=compress", *args, f"--input={others}")
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        decompress(trained, compressed[0], tmp_path / "out", code=75)
    decompress(trained, tmp_path / "b.ddpm", tmp_path / "out", code=4)  # the folder is another's
    decompress(trained, tmp_path / "b.ddpm", tmp_path / "new")
    np.testing.assert_array_equal(read(tmp_path / "new"), images[1][::-1])


def stop_at(patch, n):
    """Stops the run where it asks for the n-th time whether to."""
    asked = []

    def ask():
        asked.append(None)
        if len(asked) == n:
            raise preemption.Stopped("here")

    patch.setattr(preemption, "raise_if_requested", ask)
