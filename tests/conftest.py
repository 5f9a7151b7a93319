"""Strict JAX for every test: four virtual CPU devices, no silent broadcasting or promotion."""

import os
import pathlib

# Compilation is what the suite costs: half of it is XLA's polish, which tiny shapes never earn.
os.environ["XLA_FLAGS"] = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)

import jax
import pytest

ROOT = pathlib.Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden"

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
# What is compiled is kept between runs, and shared with the processes that tests start.
jax.config.update("jax_compilation_cache_dir", str(ROOT / ".cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@pytest.fixture
def x64():
    """Float64 for one test: closed forms are compared at 1e-10, not at float32's rounding."""
    with jax.enable_x64(True):
        yield
