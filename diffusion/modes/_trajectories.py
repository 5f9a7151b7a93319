"""Images on their way down the chain, for pictures: compiled, sharded, watched, kept where asked.

A picture is a set of starts and a walk (diffusion/edits.py), looked at in some places. Image i of a
seed is a function of the seed, i and the weights: neither batches nor devices have a say.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, random
from ml_collections import ConfigDict

from diffusion import experiment, process
from diffusion.data import augment
from diffusion.experiment import Experiment
from diffusion.samplers import base, editing
from diffusion.sharding import batch_sharded, local_rows, make_global_array, replicated
from diffusion.utils.progress import Progress

Score = Callable[[np.ndarray], dict[str, float]]  # uint8[n, h, w, c] -> {what it is called: number}
Features = Callable[[np.ndarray], np.ndarray]  # uint8[b, h, w, c] -> float32[b, d]

PARTS = 25  # of a walk, so that a long wait can be watched


class Walk(NamedTuple):
    """A compiled way to go, of images sharded over the devices; one program for all its parts.

    begin: (keys, x) -> carry. go: (params, keys, label, carry, i, j) -> carry, steps i..j-1.
    """

    begin: Callable
    go: Callable
    steps: int


class FigureContext(NamedTuple):
    """What the pictures are drawn with. down: from x_T to x_0, at the config's times ts.

    keys:  (seed, number uint32[n], branch uint32[n]) -> (keys [n], x_T [n, h, w, c]).
    score, features: what measures images beside their pixels; None, {}: nothing.
    """

    config: ConfigDict
    x: Experiment
    params: Any
    sampler: base.Sampler
    ts: np.ndarray
    down: Walk
    keys: Callable
    say: Callable[[str], None]
    score: Score | None
    features: dict[str, Features]

    @property
    def steps(self) -> int:
        """Of the chain."""
        return len(self.ts) - 1


class Trajectories(NamedTuple):
    """n images that walk together, looked at in `places`, the first of which they start from.

    number, branch: uint32[n], what the noise of each follows from; one number, one x_T. label:
    int32[n]. x: float32[n, h, w, c] to start from; None: x_T.
    """

    places: Sequence[int]
    number: np.ndarray
    branch: np.ndarray
    label: np.ndarray
    x: np.ndarray | None = None


def make_context(
    config: ConfigDict,
    x: Experiment,
    params: Any,
    say: Callable[[str], None],
    score: Score | None = None,
    features: dict[str, Features] | None = None,
) -> FigureContext:
    """Wires and compiles nothing yet. Raises Fatal."""
    sampler, ts = experiment.make_sampler(config, x)
    predictor = experiment.make_predictor(config, x)

    def go(params, keys, label, carry, i, j):
        return editing.advance_between(sampler, predictor(params, label), keys, carry, ts, i, j)

    def keys(seed, number, branch):
        numbered = jax.vmap(random.fold_in, (None, 0))(random.key(seed), number)
        x_T = process.sample_noise(numbered, 0, jnp.zeros((len(number), *x.image_shape)))
        return jax.vmap(editing.fork_key)(numbered, branch), x_T

    down = make_walk(x, lambda keys, x_T: sampler.init(x_T), go, len(ts) - 1)
    whole, split = replicated(x.mesh), batch_sharded(x.mesh)
    keys = jax.jit(keys, in_shardings=(whole, split, split), out_shardings=split)
    return FigureContext(config, x, params, sampler, ts, down, keys, say, score, features or {})


def make_walk(x: Experiment, begin: Callable, go: Callable, steps: int) -> Walk:
    """Both functions compiled, each for every number of images that comes."""
    whole, split = replicated(x.mesh), batch_sharded(x.mesh)
    shardings = (whole, split, split, split, whole, whole)
    return Walk(
        jax.jit(begin, in_shardings=split, out_shardings=split),
        jax.jit(go, in_shardings=shardings, out_shardings=split),
        steps,
    )


def rollout(
    s: FigureContext, starts: Sequence[Trajectories], look: Callable | None = None, walk: Walk | None = None
) -> list:
    """What is seen of each start's images in all its places: look's arrays, [places, n, ...].

    look: carry -> arrays [n, ...]; None: x_t and the image predicted from the x_t before, both as
    bytes. walk: None: down the chain. Shows progress. Every process takes part, and sees all.
    """
    walk, out, done = walk or s.down, [], 0
    whole, split = replicated(s.x.mesh), batch_sharded(s.x.mesh)
    look = jax.jit(look or as_bytes, in_shardings=split, out_shardings=whole)
    parts = [list(_batches(s, start)) for start in starts]
    total = sum(part.places[-1] - part.places[0] for each in parts for part in each)

    def tick(steps: int) -> None:
        nonlocal done
        done += steps
        shown(done)

    silent = jax.process_index() > 0
    with Progress(max(1, total), unit="step", silent=silent) as shown:
        for start, each in zip(starts, parts, strict=True):
            seen = []
            for part in each:
                way = [jax.device_get(look(carry)) for carry in _carries(s, walk, part, tick)]
                seen.append(jax.tree.map(lambda *a: np.stack(a), *way))
            n = len(start.number)
            out.append(jax.tree.map(lambda *a, n=n: np.concatenate(a, 1)[:, :n], *seen))
    return out


def _batches(s: FigureContext, start: Trajectories) -> Iterator[Trajectories]:
    """A start in batches of one size, the last one filled up with its last image."""
    n, devices = len(start.number), s.x.mesh.size
    size = -(-min(s.config.sample.batch_size, n) // devices) * devices
    for at in range(0, n, size):
        rows = np.minimum(at + np.arange(size), n - 1)
        yield Trajectories(start.places, *(a if a is None else a[rows] for a in start[1:]))


def _carries(
    s: FigureContext, walk: Walk, start: Trajectories, tick: Callable[[int], None]
) -> Iterator[base.SamplerState]:
    """The carry of one batch in each place; `tick` is told of the steps between them."""
    split = batch_sharded(s.x.mesh)
    rows = local_rows(split, len(start.number))

    def put(a: np.ndarray) -> Array:
        return make_global_array(a[rows], split, a.shape)

    keys, x_T = s.keys(np.uint32(s.config.figures.seed), put(start.number), put(start.branch))
    carry = walk.begin(keys, x_T if start.x is None else put(start.x))
    label, there, every = put(start.label), start.places[0], -(-walk.steps // PARTS)
    for place in start.places:
        for i in range(there, place, every):
            j = min(i + every, place)
            carry = walk.go(s.params, keys, label, carry, np.int32(i), np.int32(j))
            jax.block_until_ready(carry)
            tick(j - i)
        there = place
        yield carry


def as_bytes(carry: base.SamplerState) -> tuple[Array, Array]:
    """(x_t, the predicted image), as they are shown."""
    return augment.unscale(carry.x), augment.unscale(carry.x_0)


def from_noise(s: FigureContext, n: int, places: Sequence[int]) -> Trajectories:
    """Samples 0..n-1 of the seed: those of --mode=sample."""
    return numbered_samples(s, np.arange(n), np.zeros(n), places)


def numbered_samples(s: FigureContext, number, branch, places: Sequence[int], x=None) -> Trajectories:
    """Samples with the classes that --mode=sample gives to their numbers."""
    number, branch = (np.asarray(a, np.uint32) for a in (number, branch))
    classes, fixed = s.config.model.num_classes, s.config.sample.label
    label = number % classes if classes and fixed < 0 else np.full(len(number), fixed)
    return Trajectories(places, number, branch, label.astype(np.int32), x)
