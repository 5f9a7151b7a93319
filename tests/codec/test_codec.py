"""Both codecs with an exact denoiser: what comes back, and how long files are."""

import functools

import jax
import numpy as np
import pytest

from diffusion import process, schedules
from diffusion.codec import bits_back, channel, entropy, plan, progressive
from diffusion.codec.plan import Codec, Plan
from diffusion.process import Process
from diffusion.samplers.analytic import OptimalVariance
from diffusion.utils.errors import IntegrityError
from tests.oracle import official

P = process.from_betas(schedules.linear(40, 1e-3, 0.3))
SHAPE, LEVELS = (4, 4, 1), 3
VALUES, MASSES = np.array([-1.0, 0.0, 1.0]), np.array([0.7, 0.2, 0.1])
IMAGES = np.random.default_rng(0).choice(LEVELS, (44, *SHAPE), p=MASSES)
ENTROPY = -np.sum(MASSES * np.log2(MASSES))  # bits of a pixel
KEY = jax.random.key(1)


def denoise(x, t, error=0.0):
    """Returns E[x_0 | x_t] of independent pixels, float32."""
    a = P.alpha_bar[t]
    log_w = -0.5 * (x[..., None] - np.sqrt(a) * VALUES) ** 2 / (1 - a) + np.log(MASSES)
    w = np.exp(log_w - log_w.max(-1, keepdims=True))
    return ((w @ VALUES) / w.sum(-1) + error).astype(np.float32)


@functools.cache
def optimum():
    """The least variances, from draws."""
    rng, mse, decoder, bits = np.random.default_rng(1), [0.0], [0.0], [0.0]
    x_0 = VALUES[rng.choice(LEVELS, (500, *SHAPE), p=MASSES)]
    index = (x_0 + 1).astype(int)
    for t in range(1, P.T + 1):
        a = P.alpha_bar[t]
        x = (np.sqrt(a) * x_0 + np.sqrt(1 - a) * rng.standard_normal(x_0.shape)).astype(np.float32)
        mean = denoise(x, t)
        mse.append(float(np.mean((mean - x_0) ** 2)))
        found = []
        for std in 2.0 ** np.arange(-4, 1, 0.5):
            codec = make(Plan((t,), (), std**2, 10, 2), 500)
            found.append((progressive.pixel_bits(codec, index, mean) / x_0.size, std**2))
        bits.append(min(found)[0])
        decoder.append(min(found)[1])
    return OptimalVariance(*map(np.array, (mse, decoder, bits)))


def make(made, group, network=denoise):
    return Codec(P, network, made, SHAPE, LEVELS, group, 5)


def five_steps():
    """Steps that would not pay off for so few and small images, but are to be tested."""
    made = plan.make_archive_plan(plan.from_pure_noise(P), optimum(), 5)
    return made._replace(candidates=12, padding=4)


@pytest.mark.parametrize("group", [44, 20, 1])
def test_every_image_comes_back(group):
    codec = make(five_steps(), group)
    encoded = progressive.encode_groups(codec, IMAGES, 0, KEY)
    decoded = progressive.decode_groups(codec, encoded.segments, 0, len(IMAGES))
    np.testing.assert_array_equal(decoded.index, IMAGES)


def test_blocks_of_groups_are_coded_by_themselves():
    """The same groups one at a time: other candidates may be chosen, the same images come back."""
    codec = make(five_steps(), 20)
    for first, number in ((0, 0), (20, 1), (40, 2)):
        part = IMAGES[first : first + 20]
        segments = progressive.encode_groups(codec, part, number, KEY).segments
        decoded = progressive.decode_groups(codec, segments, number, len(part))
        np.testing.assert_array_equal(decoded.index, part)


def test_a_prefix_decodes_to_what_the_encoder_measured():
    codec = make(five_steps(), 44)
    encoded = progressive.encode_groups(codec, IMAGES, 0, KEY)
    x_0 = plan.levels_to_x0(IMAGES, LEVELS)
    errors = []
    for k in range(len(encoded.segments)):
        decoded = progressive.decode_groups(codec, encoded.segments[:k], 0, len(IMAGES))
        assert decoded.index is None and decoded.t == codec.plan.ts[k]
        errors.append(np.sum((decoded.x_0 - x_0) ** 2, dtype=np.float64))
    np.testing.assert_allclose(errors, encoded.mse, rtol=1e-6)
    assert np.all(np.diff(errors) < 0)


def test_files_and_errors_are_what_the_bound_says():
    codec = make(plan.make_plan(P, optimum(), 400 * 16, 10, 12, 4), 400)
    images = np.random.default_rng(3).choice(LEVELS, (400, *SHAPE), p=MASSES)
    bound = progressive.file_bound(codec, images, 0)
    encoded = progressive.encode_groups(codec, images, 0, KEY)
    bits = 8 * sum(len(part) for segment in encoded.segments for part in segment)
    # No code is shorter than the entropy, and the bound of few steps is near to it.
    assert 0.97 * ENTROPY < bound.bits.sum() / images.size < 1.25 * ENTROPY
    assert bound.bits.sum() < bits < 1.3 * bound.bits.sum()
    np.testing.assert_allclose(np.sqrt(encoded.mse), np.sqrt(bound.mse), rtol=0.05)


def test_a_gaussian_source_takes_little_more_than_its_rate_distortion_function():
    """R(D) = log2(variance / D) / 2; no random codebook of 2^14 vectors does with less than 1.24.

    The chunks' different bits, few steps and the bytes that end each segment come on top of that.
    """
    variance, levels, n = 0.0625, 256, 256
    a = P.alpha_bar
    known = 0.5 * np.log2(1 + variance * a[1:] / (1 - a[1:]))  # bits/dim that x_t tells, t = 1..T
    ts = np.unique(40 - np.interp(np.linspace(0, 1.0, 13), known[::-1], np.arange(40)).astype(int))
    ts = tuple(ts[::-1].tolist())
    codes = tuple(plan.variance_code(variance / 4 ** known[t - 1]) for t in ts[:-1])

    def exact(x, t):
        return np.float32(np.sqrt(a[t]) * variance / (a[t] * variance + 1 - a[t])) * x

    codec = Codec(P, exact, Plan(ts, codes, 0.01, 14, 4), SHAPE, levels, n, 5)
    x_0 = np.random.default_rng(0).normal(0, variance**0.5, (n, *SHAPE))
    index = np.rint((np.clip(x_0, -1, 1) + 1) / 2 * (levels - 1)).astype(int)
    encoded = progressive.encode_groups(codec, index, 0, KEY)
    bits = np.cumsum([8 * sum(map(len, segment)) for segment in encoded.segments[:-1]]) / x_0.size
    rate = 0.5 * np.log2(np.mean(x_0**2) * x_0.size / encoded.mse[1:])
    assert 0.7 < rate[-1] < 1.1
    assert np.all(bits > 1.2 * rate) and np.all(bits < 1.4 * rate)


def test_another_machine_decodes_prefixes_but_not_pixels():
    """A network that computes otherwise by 1e-4 moves the picture by as much, and is found out."""
    codec = make(five_steps(), 44)
    encoded = progressive.encode_groups(codec, IMAGES, 0, KEY)
    other = codec._replace(denoise=functools.partial(denoise, error=1e-4))
    exact, moved = (
        progressive.decode_groups(c, encoded.segments[:-1], 0, len(IMAGES)).x_0
        for c in (codec, other)
    )
    assert np.abs(exact - moved).max() < 2e-3
    wrong = codec._replace(denoise=functools.partial(denoise, error=0.2))
    with pytest.raises(IntegrityError):
        progressive.decode_groups(wrong, encoded.segments, 0, len(IMAGES))


def test_damaged_bytes_decode_to_something_or_are_found_out():
    """Behind the container's checksums: no bytes crash the decoder, no wrong pixels get through."""
    codec = make(five_steps(), 44)
    segments = progressive.encode_groups(codec, IMAGES, 0, KEY).segments
    rng = np.random.default_rng(0)
    for i in range(60):
        damaged = [[*segment] for segment in segments]
        step = rng.integers(len(segments))
        content = bytearray(damaged[step][0] or b"\0")
        content[rng.integers(len(content))] ^= rng.integers(1, 256)
        damaged[step][0] = bytes(content[: rng.integers(1, len(content) + 1)])
        try:
            index = progressive.decode_groups(codec, damaged, 0, len(IMAGES)).index
        except IntegrityError:
            continue
        np.testing.assert_array_equal(index, IMAGES, err_msg=f"{i}")


def archive(codec, batches):
    unfinished = bits_back.begin_archive(codec, len(batches[0]))
    for batch in batches:
        unfinished = bits_back.encode_batch(codec, unfinished, batch)
    return bits_back.finish_archive(codec, unfinished, len(batches[0]))


def test_an_archive_comes_back_and_costs_the_bound():
    """The log-ratio of q and p at one draw has a variance of 2 KL nats, in which both differ."""
    made = plan.make_archive_plan(P, optimum(), 12)
    codec, n = make(made, 1), 600
    images = np.random.default_rng(3).choice(LEVELS, (n, *SHAPE), p=MASSES)
    found = archive(codec, [images[i : i + 20] for i in range(0, n, 20)])
    back = [*bits_back.decode_batches(codec, found.words, n, 20)]
    np.testing.assert_array_equal(np.concatenate(back[::-1]), images)
    net, error = 32 * (len(found.words) - found.initial), np.sqrt(2 * found.bound / np.log(2))
    assert -3 * error < net - found.bound < 3 * error + 0.01 * found.bound + 64
    assert 0.97 * ENTROPY < found.bound / images.size < 1.25 * ENTROPY


def test_more_bits_than_images_have_are_refused():
    """Of a step with next to no noise, whose number of chunks would fill the memory."""
    chain = Process(np.array([1, 1 - 1e-12, 0.0]), np.arange(-1.0, 2))
    codec = Codec(chain, lambda x, t: x, Plan((2, 1), (0,), 0.0, 12, 4), (1, 1, 1), 2, 1, 0)
    most = plan.expected_code(chain, codec.plan, 0, 1) + progressive.NEAR - 1
    encoder = entropy.RangeEncoder()
    encoder.encode(most % 32, 1, 5)
    with pytest.raises(IntegrityError, match="bits"):
        progressive.decode_groups(codec, [[encoder.finish()]], 0, 1)


def test_an_archive_of_another_network_is_refused():
    codec = make(plan.make_archive_plan(P, optimum(), 5), 1)
    found = archive(codec, [IMAGES])
    wrong = codec._replace(denoise=functools.partial(denoise, error=1e-3))
    with pytest.raises(IntegrityError):
        list(bits_back.decode_batches(wrong, found.words, 44, 44))


@official("codec", "chunk.*")
def test_chunks_are_those_of_diffc(codec):
    for i, (most, padding) in enumerate(
        zip(codec["chunk.max_size"], codec["chunk.padding"], strict=True)
    ):
        sizes = [
            plan.chunk_sizes(int(np.ceil(d)), int(most), int(padding)) for d in codec["chunk.dkl"]
        ]
        wanted = codec[f"chunk.{i}.sizes"]
        full = np.full(wanted.shape, -1)
        for row, found in zip(full, sizes, strict=True):
            row[: len(found)] = found
        codec.close(f"chunk.{i}.sizes", full)
        np.testing.assert_array_equal([*map(len, sizes)], codec["chunk.count"][i])
    codec.compared |= {"chunk.max_size", "chunk.padding", "chunk.dkl", "chunk.count"}


@official("codec", "pq.*")
def test_steps_are_those_of_diffc(codec):
    """Its ratio alpha / sigma before and after a step; p has the variance of q."""
    x_0, eps = codec["pq.x_0"], codec["pq.eps_hat"]
    for i, (now, after) in enumerate(codec["pq.snr_pairs"] ** 2):
        chain = Process(np.array([1, after / (1 + after), now / (1 + now)]), np.arange(-1.0, 2))
        g = plan.gaussians(chain, Plan((2, 1), (255,), 1.0, 12, 2), 0)
        x_t, a = codec["pq.x_t"], now / (1 + now)
        predicted = (x_t - np.sqrt(1 - a) * eps) / np.sqrt(a)
        means = g.mean(x_0, x_t), g.mean(predicted, x_t)
        codec.close(f"pq.{i}.q_mean", means[0], rtol=1e-5, atol=1e-5)
        codec.close(f"pq.{i}.p_mean", means[1], rtol=1e-5, atol=1e-5)
        codec.close(f"pq.{i}.std", g.std_q, rtol=1e-6)
        shift = (means[0] - means[1]) / g.std_q
        codec.close(f"pq.{i}.dkl_bits", channel.kl_bits(shift, 1.0), rtol=1e-5)
    codec.compared |= {"pq.x_0", "pq.eps_hat", "pq.x_t", "pq.snr_pairs"}
