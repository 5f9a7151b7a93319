"""diffusion.utils.logging: what is printed, where, when and by which process."""

import io
import logging as standard_logging
import re
import subprocess
import sys

import pytest

from diffusion.utils import logging
from tests.conftest import ROOT


def test_info_is_flushed_to_stdout_at_once(capsys):
    logging.info("hello")
    assert capsys.readouterr() == ("hello\n", "")
    out, flushed = io.StringIO(), []
    out.flush = lambda: flushed.append(out.getvalue())
    logging.info("hello", out)
    assert flushed[-1] == "hello\n"


def test_warning_goes_to_stderr_with_the_name_of_the_program(capsys):
    logging.warning("disk: full")
    assert capsys.readouterr() == ("", "ddpm: warning: disk: full\n")


def test_silence_turns_info_and_warning_off_and_on_again(capsys):
    logging.silence(True)
    try:
        assert logging.is_silent()
        logging.info("hello")
        logging.warning("hello")
        assert capsys.readouterr() == ("", "")
    finally:
        logging.silence(False)
    logging.info("hello")
    assert capsys.readouterr().out == "hello\n"


@pytest.mark.parametrize("verbosity, shown", [(-1, ""), (0, r"I\d+ .*\] info\n")])
def test_quiet_libraries_shows_info_lines_only_on_request(verbosity, shown):
    code = (
        "import sys; from absl import app, logging as absl; from diffusion.utils import logging\n"
        f"def main(_):\n  logging.quiet_libraries({verbosity})\n"
        "  absl.info('info'); absl.warning('careful')\n"
        "app.run(main, sys.argv)"
    )
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == ""
    assert re.fullmatch(shown + r"W\d+ .*\] careful\n", done.stderr), done.stderr


def test_quiet_orbax_drops_its_records_alone(monkeypatch):
    logger = logging.absl.logging.get_absl_logger()
    monkeypatch.setattr(logger, "filters", [])
    monkeypatch.setattr(standard_logging.getLogger("asyncio"), "filters", [])
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    logging.quiet_orbax()
    logging.quiet_orbax()
    assert len(logger.filters) == 1

    def passes(name, path, message):
        record = standard_logging.LogRecord(name, 40, path, 1, message, None, None)
        return bool(standard_logging.getLogger(name).filter(record))

    assert not passes("absl", "/lib/orbax/checkpoint/handler.py", "failed")
    assert passes("absl", "/lib/jax/api.py", "failed")
    assert not passes("asyncio", "/lib/asyncio/base.py", "Task exception was never retrieved")
    assert passes("asyncio", "/lib/asyncio/base.py", "slow callback")
