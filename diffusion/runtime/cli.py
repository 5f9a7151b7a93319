"""From a command line to an exit code: JAX is started, a mode is run, errors become one line."""

import ast
import contextlib
import errno
import inspect
import io
import os
import sys
import threading
import time
import tokenize
from collections.abc import Iterator, Mapping
from typing import NoReturn

from absl import flags
from ml_collections import ConfigDict

from configs import default
from diffusion.runtime import config as config_
from diffusion.runtime import preemption, validation
from diffusion.runtime.config import Run
from diffusion.utils import logging
from diffusion.utils.errors import (
    STOPPED,
    ConfigError,
    DDPMError,
    LostPeerError,
    WorkdirError,
    error_text,
    one_line,
)

READING_MODES = (
    *("sample", "eval", "bpd", "figures", "frontier", "export"),
    *("compress", "decompress", "report", "study"),
)
FLAG_MODES = {  # what a flag is for; typed elsewhere it would do nothing
    "input": ("eval", "import", "sample", "compress", "decompress", "study"),
    "init_from": ("train",),
    "output": ("export", "compress", "decompress"),
    "int8": ("export",),
    "replay": ("check", "replay"),
    "dry_run": ("prepare",),
    "part": ("bench",),
    "topology": ("bench",),
}
CLUSTER = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
# CPU devices wait for each other at the end of a step, for as long as a busy machine takes.
XLA_FLAG = "--xla_cpu_collective_call_terminate_timeout_seconds=86400"
# A full or broken disk, or an object store that does not answer.
STORAGE_ERRORS = (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.ETIMEDOUT, errno.EACCES)
EXIT_S = 20.0  # after an error Python waits so long for the threads of libraries
GRACE_S = 3.0  # the coordinator's process outlives the others' farewell by this


def main(
    argv: list[str], flag_values: flags.FlagValues, modes: Mapping[str, str], usage: str
) -> int:
    """Runs the mode that the command line names; returns the exit code of errors.py.

    Args:
      argv: the command line, argv[0] the program.
      flag_values: the flags, besides --config.
      modes: {mode: module with a function run(run: Run)}.
      usage: printed by --help, above the flags and every configuration key.
    """
    if {"--help", "-h", "-help", "--helpfull", "--mode=help"} & set(argv):
        print(_help(flag_values, usage))
        return 0
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # XLA raises what matters
    if XLA_FLAG not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{XLA_FLAG} {os.environ.get('XLA_FLAGS', '')}"
    flags.FLAGS.mark_as_parsed()  # grain reads flags of its own
    import jax  # reads the environment

    from diffusion.runtime import workdir

    run = None
    try:
        run = config_.resolve(flag_values, argv, workdir.load_config)
        check_flags(run)
        validation.validate(run.config)
        logging.quiet_libraries(flag_values.verbosity)
        if run.mode != "prepare":  # which takes no accelerator
            start_jax(run.config)
        if run.mode in READING_MODES and not (run.mode == "eval" and run.flags.input):
            workdir.check_owner(run.workdir, run.config)
        name = "replay" if run.mode == "check" and run.flags.replay else run.mode
        # A stop ends one process at once: what it has finished is on disk. Several processes agree
        # on where they stop, and a training, once it has compiled, saves first.
        agree = run.mode in READING_MODES and jax.process_count() > 1
        with preemption.defer() if agree else contextlib.nullcontext():
            run._replace(mode=name, modes=modes).call()
        return 0
    except preemption.Stopped as stopped:
        logging.info(f"stopped    {stopped}; the same command resumes")
        return STOPPED
    except DDPMError as error:
        if run and error.__cause__ and not isinstance(error.__cause__, OSError):
            workdir.write_traceback(run.workdir, error)
        return _end(error)
    except KeyboardInterrupt:
        return _end(preemption.Stopped("interrupted"))
    except Exception as error:  # a defect of this program or of a library
        if _is_lost_peer(error):
            what = f"a collective failed: {one_line(error)}; the same command resumes"
            return _end(LostPeerError(what))
        if isinstance(error, OSError) and error.errno in STORAGE_ERRORS:
            where = error.filename or (run and run.workdir) or "a file"
            denied = error.errno == errno.EACCES
            advice = "give this user the permission" if denied else "the same command goes on"
            return _end(WorkdirError(f"{where}: {error_text(error)}; {advice}"))
        trace = run and workdir.write_traceback(run.workdir, error)
        if not trace:
            raise
        what = f"{type(error).__name__}: {one_line(error, 100)}; the traceback: {trace}"
        return _end(DDPMError(what))


def exit_with(code: int) -> NoReturn:
    """Ends the process; after an error within EXIT_S, though a library may still try to save."""
    if code:
        timer = threading.Timer(EXIT_S, os._exit, [code])
        timer.daemon = True
        timer.start()
    sys.exit(code)


def _is_lost_peer(error: Exception) -> bool:
    """Whether a collective of several processes failed, before JAX's heartbeat has ended them."""
    import jax

    lost = isinstance(error, jax.errors.JaxRuntimeError) and jax.process_count() > 1
    return lost and "RESOURCE_EXHAUSTED" not in str(error)  # too little memory is no lost peer


def _help(flag_values: flags.FlagValues, usage: str) -> str:
    lines = [
        f"  --{name}: {flag_values[name].help} (default {flag_values[name].default})"
        for name in flag_values
    ]
    return "\n".join([usage, *lines, "", "Keys of the configuration:", *_describe_keys()])


def _describe_keys() -> list[str]:
    """Returns the flag, default and comment of each key of configs/default.py, as they stand there.

    A comment that has a line for itself keeps it; a blank line precedes each section.
    """
    source, values = inspect.getsource(default.get_config), config_.flatten(default.get_config())
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {t.start[0]: t.string for t in tokens if t.type == tokenize.COMMENT}
    lines, section, last = [], None, 0

    def keys(node: ast.Dict, prefix: str = "") -> Iterator[tuple[str, int]]:
        for key, value in zip(node.keys, node.values, strict=True):
            if isinstance(value, ast.Dict):
                yield from keys(value, f"{prefix}{key.value}.")
            else:
                yield f"{prefix}{key.value}", key.lineno

    for name, line in keys(next(n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Dict))):
        if section != (section := name.partition(".")[0] if "." in name else ""):
            lines.append("")
        lines += [f"  {comments[i]}" for i in range(last + 1, line) if i in comments]
        value, last = values[name], line
        text = f'"{value}"' if value == "" or isinstance(value, tuple) else value
        lines.append(f"  {f'--config.{name}={text}':43} {comments.get(line, '')}".rstrip())
    return lines


def check_flags(run: Run) -> None:
    """Raises ConfigError for a typed flag, or sampler option, that would do nothing."""
    for name, modes in FLAG_MODES.items():
        if run.flags[name].present and run.mode not in modes:
            where = ", ".join(f"--mode={mode}" for mode in modes)
            raise ConfigError(f"--{name}: not used by --mode={run.mode}; it is for {where}")
    if run.mode in ("train", "sample", "eval", "figures"):
        check_sampler_options(run)


def check_sampler_options(run: Run) -> None:
    """Raises ConfigError for a typed option that the chosen sampler does not have."""
    from diffusion.samplers import SAMPLERS

    known = {name: set(inspect.signature(f).parameters) for name, f in SAMPLERS.items()}
    name = run.config.sampler.name
    own, every = known.get(name, set()), set().union(*known.values())
    for key in run.overrides:
        option = key.removeprefix("sampler.")
        if key.startswith("sampler.") and option in every - own:
            having = ", ".join(n for n, options in known.items() if option in options)
            raise ConfigError(f"{key}: the sampler {name} has no such option; {having} have it")


def start_jax(config: ConfigDict) -> None:
    """Chooses devices and the compilation cache, and joins the other processes of the run."""
    import jax

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(config_.cache_dir()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    use_cpu_cores(config)
    start_distributed(config)
    logging.silence(jax.process_index() > 0)
    validation.validate(config, jax.device_count())


def use_cpu_cores(config: ConfigDict) -> None:
    """Makes each of a few CPU cores a JAX device, so that they share every batch.

    JAX_NUM_CPU_DEVICES has precedence; the processes of a cluster keep one device each.
    """
    import jax

    from diffusion import experiment

    if not {"JAX_NUM_CPU_DEVICES", "JAX_COORDINATOR_ADDRESS"} & set(os.environ):
        jax.config.update("jax_num_cpu_devices", experiment.cpu_devices(config))


def start_distributed(config: ConfigDict) -> None:
    """Joins the other processes where the environment names them; otherwise there is one.

    TPU pods, SLURM, Open MPI and Kubernetes are recognised by JAX; elsewhere the three variables of
    CLUSTER are read. A process that is silent for train.heartbeat_s seconds ends the others.
    """
    import jax

    address, n, i = map(os.environ.get, CLUSTER)
    options = {"heartbeat_timeout_seconds": round(config.train.heartbeat_s)}
    if address and "JAX_COORDINATOR_BIND_ADDRESS" not in os.environ:
        options["coordinator_bind_address"] = address  # JAX would listen on every interface
    try:
        if address and n and i:
            jax.distributed.initialize(address, int(n), int(i), **options)
        else:
            jax.distributed.initialize(**options)
    except ValueError as error:
        if address:
            missing = ", ".join(name for name in CLUSTER if not os.environ.get(name))
            found = f"no {missing}; set all three" if missing else one_line(error)
            wanted = f"expected the numbers {CLUSTER[1]} and {CLUSTER[2]} beside it"
            raise ConfigError(f"{CLUSTER[0]}: {wanted}, found {found}") from None
    if jax.distributed.is_initialized() and jax.process_count() == 1:
        preemption.install()  # JAX has taken SIGTERM for itself


def _end(error: BaseException) -> int:
    """Prints the one line of an error and returns its exit code.

    Of several processes it exits here: JAX's own exit would wait for all of them.
    """
    code = getattr(error, "code", STOPPED)
    print(f"ddpm: error[{code}]: {error}", file=sys.stderr, flush=True)
    jax = sys.modules.get("jax")
    if jax and jax.distributed.is_initialized():
        time.sleep(GRACE_S if jax.process_index() == 0 else 0)
        os._exit(code)
    return code
