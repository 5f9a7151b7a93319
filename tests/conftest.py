"""Strict JAX for every test: four virtual CPU devices, no silent broadcasting or promotion."""

import collections
import fcntl
import json
import os
import pathlib
import time

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # beside XLA's threads more only wait for each other

import jax
import pytest

# Compilation is what the suite costs: half of it is XLA's polish, which tiny shapes never earn.
FLAGS = [
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",
]
if jax.__version_info__ < (0, 11):  # later versions have one way to compile fused operations
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join(FLAGS)
# For jax.jit, where a test is about the last digits: the approximations of tanh that users get.
AS_SHIPPED = {"xla_cpu_use_fusion_emitters": True} if jax.__version_info__ < (0, 11) else None

ROOT = pathlib.Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden"
# Two at a time; the first two do not wait for one training that both need.
LONGEST = ("modes/test_train.py", "test_unet.py", "test_buckets.py", "modes/test_evaluate.py")
MAX_CPU_S = 200  # of a test file: what takes longer belongs into tests/soak

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
# Compiled programs are kept between runs, and shared with the processes that tests start.
jax.config.update("jax_compilation_cache_dir", str(ROOT / ".cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

_cpu_s = collections.Counter()  # {test file: seconds}
_mark = 0.0


def pytest_collection_modifyitems(items):
    """Moves the longest files to the front, so that no worker ends with one of them alone."""

    def place(item):
        return [i for i, path in enumerate(LONGEST) if item.location[0].endswith(path)] or [9]

    items.sort(key=place)


def pytest_runtest_logstart():
    """Starts the clock of a test."""
    global _mark
    _mark = time.process_time()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport():
    """Adds the processor time of a phase to its report, which pytest-xdist sends on."""
    global _mark
    report, now = (yield).get_result(), time.process_time()
    report.cpu_s, _mark = now - _mark, now


def pytest_runtest_logreport(report):
    """Adds up the processor time of each test file."""
    _cpu_s[report.location[0]] += getattr(report, "cpu_s", 0.0)


def pytest_sessionfinish(session):
    """Fails a session in which a file outside of soak took more than its budget."""
    for path, seconds in _cpu_s.most_common():
        if (
            seconds > MAX_CPU_S
            and "soak" not in path
            and not hasattr(session.config, "workerinput")
        ):
            print(f"\n{path}: {seconds:.0f} s of processor time, the budget is {MAX_CPU_S}")
            session.exitstatus = session.exitstatus or 1


@pytest.fixture
def x64():
    """Float64 for one test: closed forms are compared at 1e-10, not at float32's rounding."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A finished tiny training, which tests must not change: (work directory, stdout, stderr)."""
    from tests import runs

    # One for all workers of pytest-xdist: the first to come here trains it.
    base = tmp_path_factory.getbasetemp()
    folder = base.parent / "shared" if "PYTEST_XDIST_WORKER" in os.environ else base / "shared"
    folder.mkdir(exist_ok=True)
    workdir, console = folder / "trained", folder / "console.json"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not console.exists():
            more = ("--config.train.eval_every=4", "--config.train.profile=(5,3)")
            said = runs.run(runs.TINY, f"--workdir={workdir}", *more)
            console.write_text(json.dumps(said))
    return workdir, *json.loads(console.read_text())


@pytest.fixture(scope="session")
def bucket(tmp_path_factory):
    """A folder of a bucket of this worker's own server, gs://..., as a path."""
    from diffusion.utils import io
    from tests.buckets import BUCKET, Emulator

    emulator = Emulator(tmp_path_factory.mktemp("buckets"))
    os.environ.update(emulator.environment())  # for this process's clients and for its children
    yield io.to_path(f"gs://{BUCKET}/tests")
    emulator.stop()
