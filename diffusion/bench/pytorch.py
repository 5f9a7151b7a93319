"""The same networks in PyTorch, for --mode=bench, in a process of their own.

In one process the threads of both programs would compete for the cores. Without the packages of
bench/requirements.txt, or for a network that diffusers does not have, a line says why nothing is
compared. PyTorch uses a GPU if it has one, channels last, autocast for bfloat16, random weights and
images.
"""

import contextlib
import functools
import multiprocessing
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from diffusion.convert import diffusers_config
from diffusion.runtime.config import flatten
from diffusion.utils import logging
from diffusion.utils.errors import one_line

Runs = dict[str, Callable]  # {name: a function to be timed, which returns when all is done}
RemoteRuns = contextlib.AbstractContextManager[Runs]  # while the other process lives


def training(config: ConfigDict) -> RemoteRuns:
    """Opens (number of steps) -> None: Algorithm 1 with diffusers' network, Adam, clip, average."""
    optim = {name: config.optim[name] for name in ("lr", "clip", "ema")}
    return _remote_unet(_training, config, config.train.batch_size, optim)


def network(config: ConfigDict, size: int) -> RemoteRuns:
    """Opens (number of passes) -> None: diffusers' forward pass, each on the last one's output."""
    return _remote_unet(_network, config, size)


def features(weights: dict[str, np.ndarray], image: np.ndarray) -> RemoteRuns:
    """Opens () -> [features, logits] of torch-fidelity's Inception; image: uint8[b, h, w, 3]."""
    return _remote(_features, weights, image)


def _remote_unet(make, config, size, *args) -> RemoteRuns:
    try:
        files = diffusers_config.to_diffusers_config(flatten(config))
    except ValueError as error:  # of a network that diffusers does not have
        _say_nothing_to_compare(error)
        return contextlib.nullcontext({})
    c, classes = config.data, config.model.num_classes
    shape = size, c.channels, c.image_size, c.image_width or c.image_size
    half = config.model.dtype == "bfloat16"
    return _remote(make, files["unet/config.json"], shape, classes, half, *args)


def _say_nothing_to_compare(why: object) -> None:
    logging.info(f"           nothing to compare with: {one_line(why)}")


@contextlib.contextmanager
def _remote(make, *args) -> Iterator[Runs]:
    """Yields what `make` makes in the other process, callable from here; {} if it cannot."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:

        def call(name, *args):
            return process.submit(_call, name, *args).result()

        try:
            names = process.submit(_make, make, *args).result()
        except Exception as error:  # an installation of PyTorch may fail to import in any way
            how = "see diffusion/bench/requirements.txt"
            _say_nothing_to_compare(f"{one_line(error, 200)}; {how}")
            names = []
        yield {name: functools.partial(call, name) for name in names}


_made: Runs = {}  # filled in the other process


def _make(make, *args) -> list[str]:
    _made.update(make(*args))
    return list(_made)


def _call(name, *args):
    return _made[name](*args)


def _training(config, shape, classes, half, optim) -> Runs:
    import torch

    unet, x_0, extra, precision = _unet(config, shape, classes, half)
    device = x_0.device
    fused = {"fused": True} if device.type == "cuda" else {}
    adam = torch.optim.Adam(unet.parameters(), lr=optim["lr"], **fused)
    average = [p.detach().clone() for p in unet.parameters()]
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, device=device), 0)

    def step(network):
        t = torch.randint(0, 1000, (len(x_0),), device=device)
        a = alpha_bar[t][:, None, None, None]
        eps = torch.randn_like(x_0)
        with precision():
            found = network(a.sqrt() * x_0 + (1 - a).sqrt() * eps, t, **extra).sample
        adam.zero_grad(set_to_none=True)
        torch.mean((found.float() - eps) ** 2).backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), optim["clip"])
        adam.step()
        with torch.no_grad():
            weights = [p.detach() for p in unet.parameters()]
            torch._foreach_lerp_(average, weights, 1 - optim["ema"])

    def steps(network, n):
        unet.train()
        for _ in range(n):
            step(network)

    return _runs(steps, unet)


def _network(config, shape, classes, half) -> Runs:
    import torch

    unet, x_T, extra, precision = _unet(config, shape, classes, half)
    t = torch.full((len(x_T),), 500, device=x_T.device)

    def passes(network, n):
        unet.eval()
        x = x_T
        with torch.inference_mode(), precision():
            for _ in range(n):
                x = 0.5 * x + 0.1 * network(x, t, **extra).sample

    return _runs(passes, unet)


def _features(weights, image) -> Runs:
    import torch
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    torch.backends.cudnn.allow_tf32 = False  # compared in float32
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/weights.pth"
        torch.save({name: torch.from_numpy(array) for name, array in weights.items()}, path)
        taps = ["2048", "logits_unbiased"]
        options = {"feature_extractor_weights_path": path}
        network = FeatureExtractorInceptionV3("inception", taps, **options)
    network = network.to(_device()).eval()
    batch = torch.from_numpy(np.ascontiguousarray(image.transpose(0, 3, 1, 2)))

    def run():
        with torch.inference_mode():
            return [tap.cpu().numpy() for tap in network(batch.to(_device()))]

    return {"torch-fidelity": run}


def _unet(config, shape, classes, half) -> tuple[Any, ...]:
    """Returns the network, random images, its further arguments and the context of a pass."""
    import torch
    from diffusers import UNet2DModel

    device, last = _device(), {"memory_format": torch.channels_last}
    unet = UNet2DModel.from_config(config).to(device, **last)
    x = torch.randn(shape, device=device).to(**last)
    labels = {"class_labels": torch.zeros(len(x), dtype=torch.long, device=device)}
    precision = functools.partial(torch.autocast, device, torch.bfloat16)
    return unet, x, labels if classes else {}, precision if half else contextlib.nullcontext


def _runs(function, unet) -> Runs:
    """Returns n -> None for the eager and, on a GPU, the compiled network.

    A CPU would compile for minutes.
    """
    import torch

    on_gpu = _device() == "cuda"

    def run(network, n):
        function(network, n)
        if on_gpu:
            torch.cuda.synchronize()

    networks = {"PyTorch": unet} | ({"PyTorch, compiled": torch.compile(unet)} if on_gpu else {})
    return {name: functools.partial(run, network) for name, network in networks.items()}


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
