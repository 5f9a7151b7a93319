"""docs/tpu_vm.sh: its dry run is what docs/tpu.md shows; its loop on a host does what it says."""

import functools
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT

SCRIPT, PAGE = ROOT / "docs" / "tpu_vm.sh", ROOT / "docs" / "tpu.md"
STEPS = "setup create install data check train status logs stop delete keep".split()
SETTINGS = re.findall(
    r"([A-Z]+)=(\S+)", re.search(r"^export (PROJECT=.*)$", PAGE.read_text(), re.M)[1]
)


@pytest.fixture(autouse=True)
def stubs(tmp_path):
    """A folder before all others in PATH, so that no test calls a gcloud that is installed."""
    folder = tmp_path / "stubs"
    folder.mkdir()
    write_stub(folder / "gcloud", 'echo "called: $*" >&2; exit 99')
    return folder


def write_stub(path, text):
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


def call(stubs, *args, cwd=ROOT, **variables):
    """Returns the exit code, stdout and stderr."""
    env = {"PATH": f"{stubs}:{os.defpath}", **variables}
    command = ["bash", str(SCRIPT), *args]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def dry_run(stubs):
    def run(*args, **variables):
        code, out, err = call(stubs, "--dry-run", *args, **{**dict(SETTINGS), **variables})
        assert (code, err) == (0, "")
        return out.splitlines()

    return run


def shown():
    """Returns the gcloud commands of the steps, one a line as the dry run prints them."""
    steps = re.search(r"^## The steps$(.*?)^## ", PAGE.read_text(), re.M | re.S)[1]
    blocks = re.findall(r"^ *```\n(.*?)^ *```", steps, re.M | re.S)
    lines = re.sub(r" *\\\n *", " ", "".join(blocks)).splitlines()
    return {line.strip() for line in lines if line.strip().startswith("gcloud ")}


def test_the_page_shows_what_the_script_does(dry_run):
    printed = {line for step in STEPS for line in dry_run(step)}
    assert len(printed) >= 15
    assert shown() == printed


def test_the_page_names_every_step_and_setting():
    page, script = " ".join(PAGE.read_text().split()), SCRIPT.read_text()
    assert all(f"docs/tpu_vm.sh {step}" in page for step in [*STEPS, "run"])
    settings = re.findall(r"^(?:  \S+\) )?([A-Z]+)=\$\{\1:?-", script, re.M)
    assert {"NAME", "ZONE", "TYPE", "SPOT", "VERSION"} <= set(settings)
    assert all(f"`{name}`" in page for name in {*settings, *dict(SETTINGS)} - {"DRY_RUN"})


def test_keep_begins_with_what_a_person_would_do(dry_run):
    by_hand = [line for step in ("create", "install", "train") for line in dry_run(step)]
    assert dry_run("keep")[1:] == by_hand


@pytest.mark.parametrize(
    ("kind", "version"),
    [
        ("v5litepod-4", "v2-alpha-tpuv5-lite"),
        ("v6e-8", "v2-alpha-tpuv6e"),
        ("v5p-8", "v2-alpha-tpuv5"),
        ("v4-8", "tpu-ubuntu2204-base"),
    ],
)
def test_settings_reach_the_request(dry_run, kind, version):
    words = shlex.split(dry_run("create", TYPE=kind, ZONE="europe-west4-a", SPOT="")[1])
    wanted = {f"--accelerator-type={kind}", f"--runtime-version={version}", "--zone=europe-west4-a"}
    assert wanted <= set(words) and "--spot" not in words
    assert "--spot" in shlex.split(dry_run("create")[1])


def test_what_is_printed_can_be_typed(dry_run):
    """Quotes survive two shells: the one at hand and the host's."""
    flag = "\"--config.figures.names=('inpainting',)\""
    [line] = dry_run("train", ARGS=flag)
    remote = shlex.split(line)[-1].removeprefix("--command=")
    assert shlex.split(remote)[-1] == shlex.split(flag)[0]
    for line in dry_run("keep"):
        for word in shlex.split(line):
            if word.startswith("--command="):
                subprocess.run(["bash", "-n", "-c", word.removeprefix("--command=")], check=True)


@pytest.mark.parametrize("step", ["create", "install", "keep"])
def test_settings_that_miss_are_named_before_a_tpu_is_paid_for(stubs, step):
    for name in ("PROJECT", "BUCKET", "REPO"):
        settings = {k: v for k, v in SETTINGS if k != name}
        code, out, err = call(stubs, "--dry-run", step, **settings)
        assert code and name in err and not out


@pytest.mark.parametrize("step", [*STEPS, "run"])
def test_a_word_that_is_not_taken_ends_it(stubs, step):
    """`delete --dry-run` deletes nothing."""
    code, out, err = call(stubs, step, "--dry-run", **dict(SETTINGS))
    assert (code, out) == (2, "") and "called" not in err
    assert f"{step}: expected" in err and "--dry-run" in err


def test_what_is_no_step_is_answered_with_the_usage(stubs):
    for words in ([], ["reboot"], ["--dry-run"]):
        code, out, err = call(stubs, *words, **dict(SETTINGS))
        assert code == 2 and "setup | create" in out and not err


def test_what_is_executed_is_what_is_printed(stubs, dry_run):
    for step in ("delete", "train", "create"):
        code, out, err = call(stubs, step, **dict(SETTINGS))
        assert (code, out) == (99, "")
        assert err.removeprefix("called: ").strip() == " ".join(shlex.split(dry_run(step)[0])[1:])


@pytest.fixture
def google(stubs, tmp_path):
    """Returns a call of a step, gcloud giving these answers; it returns the code and the calls.

    A slash separates the lines of several hosts; after `down` gcloud fails. Where the file
    `refused` is, requests are refused.
    """

    def run(step, *answers):
        calls, lines = tmp_path / "calls", tmp_path / "answers"
        lines.write_text("".join(f"{answer}\n" for answer in answers))
        answer = f"answer=$(head -n 1 {lines}); sed -i 1d {lines}; tr / '\\n' <<< $answer"
        asks = f"""case "$*" in
            *" list "* | *"worker status"*) {answer}; [ "$answer" != down ] ;;
            *"resources create"*) [ ! -e {tmp_path}/refused ] ;;
        esac"""
        write_stub(stubs / "gcloud", f'echo "$*" >> {calls}; {asks}')
        write_stub(stubs / "sleep", "")
        code = call(stubs, step, **dict(SETTINGS))[0]
        assert not lines.read_text()
        steps = r"queued-resources (\w+)|worker (\w+)|(uv pip)"
        return code, " ".join("".join(found) for found in re.findall(steps, calls.read_text()))

    return run


@pytest.fixture
def keep(google):
    return functools.partial(google, "keep")


def test_keep_replaces_what_was_taken_and_deletes_at_the_end(keep):
    taken = "ddpm ACTIVE", "running", "ddpm SUSPENDED", "none", "ddpm PROVISIONING", "ddpm ACTIVE"
    code, steps = keep(*taken, "ddpm ACTIVE", "ended with code 0")
    again = "list delete list create list list uv pip start"
    assert (code, steps) == (0, f"list status {again} list status delete")


def test_keep_starts_a_host_that_was_rebooted(keep):
    answers = "ddpm ACTIVE", "running/not running", "ddpm ACTIVE", "ended with code 0"
    assert keep(*answers) == (0, "list status uv pip start list status delete")


def test_keep_waits_for_the_last_host(keep):
    answers = "ddpm ACTIVE", "running/ended with code 0", "ddpm ACTIVE", "ended with code 0"
    assert keep(*answers) == (0, "list status list status delete")


def test_keep_leaves_an_error_to_a_person(keep):
    assert keep("ddpm ACTIVE", "running/ended with code 3") == (1, "list status")


def test_keep_replaces_nothing_while_google_does_not_answer(keep):
    answers = "down", "ddpm ACTIVE", "down", "ddpm ACTIVE", "ended with code 0"
    assert keep(*answers) == (0, "list list status list status delete")


def test_keep_ends_where_all_requests_are_refused(keep, tmp_path):
    """As without quota; a request that fails later, as without capacity, is made again."""
    (tmp_path / "refused").touch()
    assert keep(*["none"] * 21) == (1, "list list create " * 10 + "list")


def test_keep_installs_on_a_host_that_has_no_clone(stubs, tmp_path):
    """Its status is `not running`; only a host that is not reached has none."""
    host, calls = tmp_path / "host", tmp_path / "calls"
    host.mkdir()
    write_stub(
        stubs / "gcloud",
        f"""echo "$*" >> {calls}
        case "$*" in
            *" list "*) echo ddpm ACTIVE ;;
            *"worker status"*) cd {host}; command="${{@: -1}}"; bash -c "${{command#*=}}" ;;
            *"git clone"*) mkdir -p {host}/ddpm/docs; cp {SCRIPT} {host}/ddpm/docs ;;
            *"worker start"*) echo 0 > {host}/ddpm/train.exit ;;
        esac""",
    )
    write_stub(stubs / "sleep", "")
    assert call(stubs, "keep", **dict(SETTINGS))[0] == 0
    assert calls.read_text().splitlines()[-1].split()[3] == "delete"


def test_create_goes_on_waiting_for_a_request(google):
    """As after Ctrl-C: a second request of the same name would be refused."""
    assert google("create", "ddpm PROVISIONING", "ddpm PROVISIONING", "ddpm ACTIVE") == (
        0,
        "list list list",
    )
    assert google("create", "none", "ddpm ACTIVE")[1] == "list list list list create list"


@pytest.mark.parametrize("there", [False, True])
def test_setup_gives_the_roles_also_where_the_bucket_is_there(stubs, tmp_path, there):
    calls = tmp_path / "calls"
    write_stub(
        stubs / "gcloud",
        f"""echo "$*" >> {calls}
        case "$*" in
            *"buckets describe"*) {str(there).lower()} ;;
            *"buckets create"*) {str(not there).lower()} ;;
            *"projects describe"*) echo 123 ;;
        esac""",
    )
    assert call(stubs, "setup", **dict(SETTINGS))[0] == 0
    called = calls.read_text()
    assert called.count("serviceAccount:123-compute@") == 2
    assert ("buckets create" in called) == (not there)


def test_install_takes_the_newest_commit_or_the_one_that_is_named(dry_run, tmp_path):
    source, host = tmp_path / "source", tmp_path / "host"
    host.mkdir()
    git = ["git", "-C", str(source), "-c", "user.name=a", "-c", "user.email=a@b"]

    def commit(text):
        (source / "file").write_text(text)
        subprocess.run([*git, "add", "file"], check=True)
        subprocess.run([*git, "commit", "-qm", text], check=True)

    def installed(**variables):
        clone = shlex.split(dry_run("install", REPO=str(source), **variables)[0])[-1]
        command = ["bash", "-c", clone.removeprefix("--command=")]
        subprocess.run(command, cwd=host, check=True, capture_output=True)
        return (host / "ddpm" / "file").read_text()

    subprocess.run(["git", "init", "-q", "-b", "trunk", source], check=True)
    commit("first")
    subprocess.run([*git, "tag", "v1"], check=True)
    assert installed() == "first"
    commit("second")
    assert installed(REF="v1") == "first"
    assert installed(REF="trunk") == "second"
    commit("third")
    assert installed(REF="trunk") == "third"
    assert installed(REF="v1") == "first"
    assert installed() == "third"


def test_create_ends_where_the_request_is_deleted_meanwhile(google):
    assert google("create", "ddpm DELETING", "ddpm DELETING", "none") == (1, "list list list")


def test_a_request_that_fails_ends_create(stubs):
    write_stub(
        stubs / "gcloud",
        'case "$*" in *" list "*) echo "ddpm FAILED/other ACTIVE" | tr / "\\n" ;; esac',
    )
    code, _, err = call(stubs, "create", **dict(SETTINGS))
    assert code == 1 and "ddpm: FAILED" in err


# On a host

PROGRAM = """\
#!/bin/bash
trap 'echo saved; exit 75' TERM
read -r code < codes; sed -i 1d codes
while [ "$code" = wait ]; do sleep 0.1; done
[ "$code" != 134 ] || kill -ABRT $$
exit "$code"
"""


@pytest.fixture
def worker(stubs, tmp_path):
    """Returns a call of `tpu_vm.sh worker`; `start` runs a program that exits with these codes."""
    (tmp_path / "program").write_text(PROGRAM)

    def do(action, *codes, pause="0"):
        if codes:
            (tmp_path / "codes").write_text("".join(f"{code}\n" for code in codes))
        command = ("bash", "program") if action == "start" else ()
        code, out, err = call(stubs, "worker", action, *command, cwd=tmp_path, PAUSE=pause)
        assert (code, err) == (0, "")
        return out.strip()

    yield do
    do("stop")


def until(worker, wanted):
    for _ in range(100):
        if (found := worker("status")) == wanted:
            return
        time.sleep(0.1)
    raise AssertionError(found)


def test_the_same_command_goes_on_after_75_7_and_134(worker, tmp_path):
    assert worker("status") == "not running"
    worker("start", 75, 7, 134, 0)
    until(worker, "ended with code 0")
    assert (tmp_path / "codes").read_text() == ""


@pytest.mark.parametrize("code", [1, 2, 3, 4, 5, 6, 137])
def test_other_codes_end_it(worker, tmp_path, code):
    worker("start", code, 0)
    until(worker, f"ended with code {code}")
    assert (tmp_path / "codes").read_text() == "0\n"


def test_a_stop_saves_and_is_no_reason_to_go_on(worker, tmp_path):
    worker("start", "wait", 0, pause="100")
    while (tmp_path / "codes").read_text() != "0\n":
        time.sleep(0.1)
    assert worker("start") == "running already"
    assert worker("stop") == "ended with code 75"
    assert "saved" in (tmp_path / "train.log").read_text()
    worker("start")
    until(worker, "ended with code 0")


def test_a_host_that_shuts_down_has_not_ended(worker, tmp_path):
    """`keep` looks at it before the request is SUSPENDED, or after a reboot, and starts it."""
    worker("start", 3)
    until(worker, "ended with code 3")
    worker("start", "wait", 0)
    while (tmp_path / "codes").read_text() != "0\n":
        time.sleep(0.1)
    os.killpg(int((tmp_path / "train.pid").read_text()), signal.SIGTERM)
    until(worker, "not running")
    assert "saved" in (tmp_path / "train.log").read_text()


def test_bash_parses_it():
    subprocess.run(["bash", "-n", SCRIPT], check=True)


def test_shellcheck_has_nothing_to_say():
    places = [str(pathlib.Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
    if not (shellcheck := shutil.which("shellcheck", path=os.pathsep.join(places))):
        pytest.skip("no shellcheck; pip install -r tests/requirements.txt")
    found = subprocess.run([shellcheck, SCRIPT], capture_output=True, text=True)
    assert not found.stdout
