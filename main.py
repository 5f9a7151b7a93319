"""Denoising Diffusion Probabilistic Models: one command line from images to samples.

    python main.py [--mode=train] [--workdir=FOLDER] [--config=configs/digits.py] [--config.a.b=x]

A work directory remembers its config: with --workdir alone, a run resumes with it.
"""

import sys

from diffusion.runtime import preemption

if __name__ == "__main__":
    preemption.install()  # before anything large is imported, so that Ctrl-C is heard meanwhile

from absl import flags

from diffusion.runtime import cli

MODES = {  # a module's run(run: Run), imported when it is asked for
    "train": "diffusion.modes.train",
    "sample": "diffusion.modes.sample",
    "eval": "diffusion.modes.evaluate",
    "figures": "diffusion.modes.figures",
    "frontier": "diffusion.modes.frontier",
    "bpd": "diffusion.modes.likelihood",
    "compress": "diffusion.modes.compress",
    "decompress": "diffusion.modes.decompress",
    "prepare": "diffusion.modes.prepare",
    "import": "diffusion.modes.import_weights",
    "export": "diffusion.modes.export_weights",
    "bench": "diffusion.modes.bench",
    "check": "diffusion.modes.check",
    "replay": "diffusion.modes.replay",  # --mode=check --replay=FILE
    "sweep": "diffusion.modes.sweep",
    "report": "diffusion.modes.report",
    "study": "diffusion.modes.study",
}
PARTS = ("all", "train", "sample", "likelihood", "codec", "features", "data", "profile", "tpu")


def define_flags() -> flags.FlagValues:
    """Returns the flags, besides --config and its keys."""
    f = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "of all files; default runs/NAME", flag_values=f)
    flags.DEFINE_enum("mode", "train", [*MODES], "what to do; train resumes", flag_values=f)
    flags.DEFINE_multi_string("input", [], "the files that a mode reads", flag_values=f)
    flags.DEFINE_string("init_from", None, "train: begin with its weights", flag_values=f)
    flags.DEFINE_string("output", None, "export, decompress: folder; compress: file", flag_values=f)
    flags.DEFINE_bool("int8", False, "export: the averaged weights, 8 bits each", flag_values=f)
    flags.DEFINE_string("replay", None, "check: a file of crash/ to replay", flag_values=f)
    flags.DEFINE_bool("dry_run", False, "prepare: look, but write nothing", flag_values=f)
    flags.DEFINE_enum("part", "all", PARTS, "bench: of what", flag_values=f)
    flags.DEFINE_string("topology", "v5e:2x2", "bench --part=tpu: the TPUs", flag_values=f)
    flags.DEFINE_integer("verbosity", -1, "of the libraries' log; -1: warnings", flag_values=f)
    return f


def main(argv: list[str]) -> int:
    """Runs a command line and returns its exit code."""
    return cli.main(argv, define_flags(), MODES, __doc__)


if __name__ == "__main__":
    cli.exit_with(main(sys.argv))
