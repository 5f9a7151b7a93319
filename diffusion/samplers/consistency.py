"""Sampling with a consistency function."""

from jax import Array

from diffusion import process
from diffusion.process import Process, q_sample
from diffusion.samplers.base import Sampler, SamplerState, init_state
from diffusion.targets import Predict


def consistency(p: Process) -> Sampler:
    """Predicts x_0 and diffuses it to the next time with fresh noise.

    One step suffices for a model that was trained with the loss `consistency`; two or more, on the
    grid `angle`, correct what it gets wrong. An ordinary model's x_0 is a mean over images, so that
    its samples are blurred. Song et al. 2023 (arXiv:2303.01469), Algorithm 1.
    """

    def step(predict: Predict, keys: Array, state: SamplerState, t: Array, s: Array):
        x_0 = predict(state.x, t).x_0
        return SamplerState(q_sample(p, x_0, s, process.sample_noise(keys, t, x_0)), x_0)

    return Sampler(init_state, step)
