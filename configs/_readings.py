"""What is read from a trained model, and how: the sections that no training depends on.

Every config has them, with its own numbers where it says so. Any of these keys may change between
two commands in the same work directory.
"""


def readings(**sections: dict) -> dict:
    """The sections of sampling and judging; sections: what differs, bpd={"quick": 1}."""
    default = {
        "sampler": {"name": "ancestral", "grid": "uniform", "steps": 1000, "clip": True},
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
    }
    return {name: keys | sections.get(name, {}) for name, keys in default.items()}
