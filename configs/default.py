"""Every configuration key once, with its meaning; the values are the paper's CIFAR-10 experiment.

The other files of this folder write only what differs. `python main.py --help` prints its keys.
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the default configuration."""
    return ConfigDict(
        {
            "seed": 0,  # of the initial weights, the order of the data and every training step
            "model": {
                "ch": 128,  # channels of the first level
                "ch_mult": (1, 2, 2, 2),  # level i has ch * ch_mult[i] channels
                "num_res_blocks": 2,  # per level; one more on the way up
                "attn_resolutions": (16,),  # longer sides of the levels with attention
                "dropout": 0.1,  # share of the activations that training sets to 0
                "num_classes": 0,  # 0: unconditional
                "null_class": -1,  # label of "no class"; -1: one after all classes; -2: none
                # As in diffusers' networks, by its names; its defaults are 8, 1, True, 0 and 1e-5.
                "attention_head_dim": 0,  # channels of an attention head; 0: one head has all
                "downsample_padding": 0,  # 0: at the bottom and right; 1: on every side
                "flip_sin_to_cos": False,  # the time embedding begins with the cosines
                "freq_shift": 1,  # 1: its lowest frequency is 1/10000; 0: the one after the last
                # Exponents n of features sin, cos(2 pi 2^n x) beside the input (VDM); (): none.
                "fourier": (),
                "scale_shift": False,  # time scales and shifts activations, not only adds
                "normalization": "group",  # a key of experiment.NORMALIZATIONS
                "norm_eps": 1e-6,  # added to the variance, or the mean square, by it
                "dtype": "float32",  # of the convolutions and products; or bfloat16
                "remat": False,  # recompute every block in the backward pass, to save memory
            },
            "process": {
                "schedule": "linear",  # a key of schedules.SCHEDULES
                "T": 1000,  # steps of the chain
                "beta_start": 1e-4,  # beta_1, where the schedule has a choice
                "beta_end": 0.02,  # beta_T
                "gamma_min": -13.3,  # of logsnr: log((1 - alpha_bar) / alpha_bar) at t = 1
                "gamma_max": 5.0,  # and at t = T
                "betas": (),  # all T of them, instead of schedule, beta_start and beta_end
            },
            "target": "eps",  # what the network predicts: a key of targets.TARGETS
            "variance": "fixed_large",  # of the reverse steps: a key of targets.VARIANCES
            "loss": {
                "name": "simple",  # a key of losses.LOSSES
                # Read by some losses only.
                "weighting": "simple",  # of squared errors: a key of weightings.WEIGHTINGS
                "gamma": 0.0,  # of min_snr and p2; 0: 5 and 1
                "k": 1.0,  # of p2
                "vlb_weight": 0.001,  # of the bound in hybrid
                "schedule": "linear",  # of continuous: a key of continuous.GAMMAS
                # Of consistency, see consistency.consistency_loss:
                "stage": 7,  # levels that are compared are about 2^-stage apart
                "stage_steps": 0,  # begin with stage 0 and stay at each for so long; 0: no
                "c": 0.0,  # 0: length of the difference; large: its square
                "log_mean": -1.1,  # of the logarithms of the noise levels drawn
                "log_std": 2.0,  # and their standard deviation
            },
            # Of sample, bpd, figures, frontier and export: ema, raw, or ema:LENGTH (optim.posthoc).
            "weights": "ema",
            "optim": {
                "name": "adam",  # a key of optimisers.OPTIMISERS
                "lr": 2e-4,  # learning rate
                "warmup": 5000,  # steps of linear warm-up
                "schedule": "constant",  # after it: a key of optimisers.LR_SCHEDULES
                "weight_decay": 0.0,  # of adamw and muon
                "clip": 1.0,  # largest norm of the gradient
                "clip_groups": 1,  # clip this many parts of the batch separately (official: 8)
                "accumulate": 1,  # take the batch in this many parts, to save memory
                "ema": 0.9999,  # decay of the averaged weights
                "posthoc": (),  # relative lengths of more averages, (0.05, 0.1); (): none
            },
            "train": {
                "batch_size": 128,  # images of a step, on all devices together
                "steps": 800_000,  # 0: not known, of imported weights
                # Of the examples of a batch: a key of timestep_samplers.TIMESTEP_SAMPLERS.
                "timesteps": "uniform",
                "init_weights": "ema",  # those that --init_from begins with, as `weights`
                "label_dropout": 0.0,  # share of the labels hidden, for classifier-free guidance
                # Steps that a device takes without its host; readings and saves end them early.
                "steps_per_dispatch": 1,
                "log_every": 100,  # steps between two readings of the loss
                "save_every": 5_000,  # steps between two checkpoints
                "keep": 3,  # newest checkpoints that stay
                "keep_every": 0,  # multiples of this step stay too; 0: none
                "keep_best": 0,  # checkpoints with the fewest bits/dim that stay too
                "snapshots": 16,  # of the averages of optim.posthoc, at evenly spaced steps
                "sample_every": 20_000,  # preview pictures; 0: none
                "preview": {
                    "sampler": "dpmpp_2m",  # a key of samplers.SAMPLERS
                    "grid": "logsnr",  # a key of samplers.GRIDS; uniform after pure noise
                    "steps": 20,  # of that sampler
                    "num": 64,  # samples in a picture
                },
                "profile": (),  # (first step, number of steps) to record for TensorBoard; (): none
                "eval_every": 10_000,  # a quick reading of bits/dim and distances; 0: none
                "on_nonfinite": "halt",  # or skip, or rollback
                "hang_s": 1800.0,  # abort if no step ends for so many seconds; 0: never
                "heartbeat_s": 30.0,  # abort if another process is silent for so many seconds
            },
            "data": {
                # A key of data.SOURCES or of data.prepare.sources.ORIGINS; "": not known.
                "source": "cifar10",
                "name": "cifar10",  # of the TFDS data set in data_dir
                "data_dir": "data",  # folder of the prepared data sets
                "image_size": 32,  # height
                "image_width": 0,  # 0: as wide as high
                "channels": 3,  # 3: RGB; 1: grey
                "levels": 256,  # values that a channel has, evenly spaced over 0..255
                "flip": True,  # mirror a random half of the images
                "on_device_gib": 4.0,  # larger sets are streamed from the host
                "workers": 0,  # processes that decode streamed images; 0: threads
                # Of --mode=prepare:
                "archive": "",  # file or folder to prepare from; "": download
                "accept_incomplete": False,  # take an archive with fewer images than published
                "on_error": "skip",  # an image that cannot be used: skip or fail
                "holdout": 0.0,  # fraction of the images for the split `test`
                "holdout_names": "",  # or a file with their names
                "background": (255, 255, 255),  # under transparent and around padded images
                "fit": "crop",  # of another aspect: crop to the middle, pad, or stretch
                "include": ("*",),  # patterns of the paths of images to take: * is any text
                "exclude": (),  # and of those to leave out
            },
            "sampler": {
                "name": "ancestral",  # a key of samplers.SAMPLERS
                "grid": "uniform",  # a key of samplers.GRIDS
                "steps": 1000,  # of the chain, 1 to T
                "times": (),  # explicit times instead of grid and steps
                "clip": True,  # clip x_0
                "clip_range": 1.0,  # to [-clip_range, clip_range]
                "threshold": 0.0,  # quantile of dynamic thresholding instead; 0: none
                "threshold_max": 0.0,  # largest value of that quantile; 0: any
                "variance": "",  # "": as trained; a key of targets.VARIANCES; or analytic
                "estimate": 256,  # at most so many training images for `analytic`
                "guidance": 0.0,  # weight w of classifier-free guidance; 0: none
                # Read by some samplers only; "" is the sampler's own default.
                "eta": 0.0,  # noise of ddim and analytic_ddim: 0: none; 1: as ancestral
                "order": 2,  # of unipc: 1, 2 or 3
                "variant": "bh2",  # of unipc: bh1 or bh2
                "corrector": True,  # of unipc
                "solver": "",  # of dpmpp_2m: midpoint or heun; of dpmpp_3m: released or exact
                "predictor": "ancestral",  # of predictor_corrector: or ddim
                "corrections": 1,  # Langevin steps after each step of predictor_corrector
                "snr": 0.1,  # signal-to-noise ratio of these
            },
            "sample": {
                "num": 64,  # images
                "batch_size": 64,  # images at a time
                "seed": 0,  # of their noise
                "label": -1,  # their class; -1: all classes in turn
            },
            "bpd": {
                "split": "test",  # or train
                "num": 0,  # images; 0: all
                "quick": 200,  # images of the reading during training
                "batch_size": 100,  # images at a time
                "seed": 0,  # of their noise
                "estimate": 0,  # training images for optimal variances (Analytic-DPM); 0: none
                "steps": (),  # also the bound on so many least-cost steps
                "continuous": 0,  # noise levels for the bound in continuous time; 0: none
                "ode": 0,  # images for the probability-flow ODE; 0: none
            },
            "codec": {
                "kind": "progressive",  # decodes at any prefix; or archive, nearer to the bound
                "group": 16,  # images that are coded, and decoded, together
                "batch_size": 16,  # images of a call of the network
                "steps": 50,  # at most
                "candidates": 17,  # log2 of the most of them for a chunk
                "padding": 4,  # bits by which they are more than what a chunk is to hold
                "seed": 0,  # of the randomness that encoder and decoder share
                # Of --mode=decompress, for a progressive file:
                "steps_decoded": 0,  # at most so many segments; 0: all
                "bytes": 0,  # of at most so many bytes; 0: all
                "decode": "x_0",  # of a prefix: the predicted x_0, or ode
            },
            "eval": {
                "num": 50_000,  # samples
                "batch_size": 250,  # images at a time
                "seeds": (0,),  # each draws a set of samples; errors are over the sets
                "weights": ("ema",),  # any of ema, raw and ema:LENGTH
                # All that can be had; or of inception, dinov2, classifier, random, pixels.
                "features": ("available",),
                "inception": "",  # file of the Inception weights; "": download
                "dinov2": "",  # file of the weights of DINOv2 ViT-B/14 or ViT-L/14; "": none
                "references": ("train", "test"),  # splits, statistics (npz) or folders of images
                "reference_num": 0,  # images of a reference; 0: all
                "resize": False,  # bring images of files to the data's size, as prepare does
                "keep": 10_000,  # features kept for precision, recall, KID
                "quick": 500,  # samples of the reading during training; 0: none
            },
            "figures": {
                "names": (  # keys of modes.figures.FIGURES
                    *("samples", "progressive", "denoising", "shared", "interpolation"),
                    *("coarse_to_fine", "quality", "compression", "nearest", "memorisation"),
                    *("inpainting", "animation"),
                ),
                "seed": 0,  # of the samples and of the choice of real images
                "num": 64,  # samples in a grid
                "rows": 8,  # images in the other pictures
                "split": "test",  # real images are taken from here
                "scored": 1_000,  # samples of the figure `quality`
                "mask": "right",  # inpainted part: left, right, centre or a picture
                "jump": 10,  # RePaint's jump length
                "repeats": 10,  # and number of resamplings
                "animation": "webp",  # or gif
            },
            "frontier": {
                "samplers": ("ancestral", "ddim", "dpmpp_2m", "unipc", "heun"),  # of SAMPLERS
                "grids": ("logsnr",),  # of GRIDS
                "steps": (5, 10, 20),  # each with each sampler on each grid
                "num": 1_000,  # samples in a set
                "seeds": (0, 1, 2),  # each sampler draws a set of each; errors are over the sets
            },
            "sweep": {
                "name": "",  # a key of modes.sweep.SWEEPS
                "grid": "",  # or keys and their values: "process.T=50,100,1000;seed=0,1,2"
                "seeds": (0, 1, 2),  # of each cell, where the grid has no seed
                "equal": "steps",  # of the cells' trainings; or flops
                "evaluations": 50,  # of the network for a sample, by the sampler of the previews
                "chain": False,  # read samples of config.sampler as well, as the sweep T does
                "part": "1/1",  # this machine's share of the cells, and of how many
            },
            "report": {
                "samples": 6,  # that its slider over t shows; 0: no slider
                "frames": 20,  # of it, at evenly spaced steps of the chain
            },
            "study": {
                "num": 40,  # pairs that count, of all conditions together
                "checks": 6,  # pairs of a real picture and an obviously false one
                "max_failed": 0.2,  # people who fail a larger share of these are left out
                "practice": 4,  # pairs before them, with the answer
                "seconds": 0.0,  # that a pair is shown; 0: until it is answered
                "split": "test",  # real images are taken from here
                # Conditions, each with its share of the pairs; all empty: the config's own sampler.
                "samplers": (),  # NAME, NAME:GRID or NAME:GRID:STEPS
                "weights": (),  # each with each sampler, as eval.weights; (): `weights`
                "samples": (),  # files or folders of generated images of any origin
                "seed": 0,  # of the noise, the choice of images and the order of pairs
            },
        }
    )


# Seconds instead of days, for tests: an overlay of every config.
TINY = {
    "model.ch": 8,
    "model.ch_mult": (1,),
    "model.num_res_blocks": 1,
    "process.T": 20,
    "process.beta_end": 0.4,
    "optim.warmup": 2,
    "optim.schedule": "constant",  # so that a training may be prolonged
    "train.batch_size": 16,
    "train.steps": 8,
    "train.log_every": 2,
    "train.sample_every": 8,
    "train.preview.num": 4,
    "train.save_every": 4,
    "train.eval_every": 0,
    "sampler.steps": 20,
    "sample.num": 6,
    "sample.batch_size": 4,
    "bpd.batch_size": 4,
    "bpd.quick": 8,
    "codec.group": 4,
    "codec.batch_size": 4,
    "codec.steps": 6,
    "codec.candidates": 10,
    "eval.num": 6,
    "eval.batch_size": 4,
    "eval.features": ("random", "pixels"),
    "eval.quick": 4,
    "figures.num": 4,
    "figures.rows": 2,
    "figures.scored": 4,
    "figures.jump": 4,
    "figures.repeats": 2,
    "frontier.steps": (4, 20),
    "frontier.grids": ("uniform",),
    "frontier.num": 6,
    "frontier.seeds": (0, 1),
    "sweep.evaluations": 4,
    "study.num": 6,
    "study.checks": 2,
    "study.practice": 1,
}

# The bound in continuous time as the objective; ends of the noise and features are the data's.
LIKELIHOOD = {
    "loss.name": "continuous",
    "process.schedule": "logsnr",
    "variance": "fixed_small",
    "bpd.continuous": 1000,
}

# The design of Karras et al. 2022 (arXiv:2206.00364), on the network and optimizer of the config.
EDM = {
    "target": "edm",
    "process.schedule": "edm",
    "train.timesteps": "lognormal",
    "sampler.name": "heun",
    "sampler.grid": "karras",
    "sampler.steps": 18,
}

# A consistency function in place of a denoiser: what draws with it, and no bits/dim.
CONSISTENCY = {
    "loss.name": "consistency",
    "train.timesteps": "uniform",  # the loss draws its own
    "train.eval_every": 0,
    "train.preview.sampler": "consistency",
    "train.preview.grid": "angle",
    "train.preview.steps": 2,
    "sampler.name": "consistency",
    "sampler.grid": "angle",
    "sampler.steps": 2,
    "frontier.samplers": ("consistency",),
    "frontier.grids": ("angle",),
    "frontier.steps": (1, 2, 4, 8),
}

BFLOAT16 = {"model.dtype": "bfloat16"}


def make_config(
    changes: Mapping[str, Any], variants: Mapping[str, Mapping[str, Any]], variant: str
) -> ConfigDict:
    """Returns the default with `changes` and the named variants ("tiny,bfloat16") applied in order.

    Raises KeyError for a variant that is not in `variants`.
    """
    config = get_config()
    config.update_from_flattened_dict(changes)
    for name in filter(None, variant.split(",")):
        config.update_from_flattened_dict(variants[name])
    return config
