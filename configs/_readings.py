"""What is read from a trained model, and how: the sections that no training depends on.

Every config has them, with its own numbers where it says so. Any of these keys may change between
two commands in the same work directory.
"""


def readings(**sections: dict) -> dict:
    """The sections of sampling and judging; sections: what differs, bpd={"quick": 1}."""
    default = {
        "sampler": {
            "name": "ancestral",
            "grid": "uniform",
            "steps": 1000,
            "times": (),
            "clip": True,
            "threshold": 0.0,
            "variance": "",
            "estimate": 256,
            "guidance": 0.0,
            # Of some samplers only; the others do not read them. "" is the sampler's own choice.
            "eta": 0.0,
            "order": 2,
            "variant": "bh2",
            "corrector": True,
            "solver": "",
            "predictor": "ancestral",
            "corrections": 1,
            "snr": 0.1,
        },
        "sample": {"num": 64, "batch_size": 64, "seed": 0, "label": -1},
        "bpd": {
            "split": "test",
            "num": 0,
            "quick": 200,
            "batch_size": 100,
            "seed": 0,
            "estimate": 0,
            "steps": (),
            "ode": 0,
        },
        "eval": {
            "num": 50_000,
            "batch_size": 250,
            "seeds": (0,),
            "weights": ("ema",),
            "features": ("inception", "random", "pixels"),
            "inception": "",
            "references": ("train", "test"),
            "reference_num": 0,
            "keep": 10_000,
            "quick": 0,
        },
        "figures": {
            "names": (
                *("samples", "progressive", "denoising", "shared", "interpolation"),
                *("coarse_to_fine", "quality", "nearest", "inpainting", "animation"),
            ),
            "seed": 0,
            "num": 64,
            "rows": 8,
            "split": "test",
            "scored": 1_000,
            "mask": "right",
            "jump": 10,
            "repeats": 10,
            "animation": "webp",
        },
        "frontier": {
            "samplers": ("ancestral", "ddim", "dpmpp_2m", "unipc", "heun"),
            "grids": ("uniform", "logsnr"),
            "steps": (5, 10, 20, 50),
            "num": 1_000,
        },
    }
    return {name: keys | sections.get(name, {}) for name, keys in default.items()}
