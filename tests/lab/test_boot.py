"""A real Xen, really booted: two boots for what works, and one for each way to go down.

Only with GNTALLOC_LAB=1, so that a plain test run stays quick. Where the lab cannot run that is a skip with its
reason; in CI it is a failure, because there somebody set it up and it must not fall silent.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from limits import Limited

from gntalloc.lab import Crashed, Lab, LabError, LabTimedOut, NothingToRunOn, Session

pytestmark = [
    pytest.mark.skipif(os.environ.get("GNTALLOC_LAB") != "1", reason="boots a real Xen: set GNTALLOC_LAB=1"),
    pytest.mark.timeout(600),
]

HERE = Path(__file__).parent
DOMAINS = ("dom0", "pv", "pvh")
GUESTS = ("pv", "pvh")


def find() -> Lab:
    try:
        return Lab.find()
    except NothingToRunOn as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))


@pytest.fixture
def lab(xen: Session) -> Session:
    """The boot with all three kinds of domain, for all tests that leave it alive."""
    return xen


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_devices_are_there(lab: Session, domain: str) -> None:
    devices = [f"/dev/xen/{name}" for name in ("gntalloc", "gntdev", "evtchn", "xenbus", "privcmd")]
    outcome = lab.run(["ls", *devices], domain)
    assert outcome.exit_status == 0, outcome.errors
    assert outcome.output.split() == sorted(devices)


def test_xenstored_runs_in_dom0(lab: Session) -> None:
    assert lab.run(["test", "-S", "/var/run/xenstored/socket"]).exit_status == 0


@pytest.mark.parametrize("domain", DOMAINS)
def test_every_domain_sees_the_xenstore(lab: Session, domain: str) -> None:
    outcome = lab.run(["xenstore-read", "domid"], domain)
    assert outcome.output.strip() == str(lab.domid(domain)), outcome.errors


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_limit_can_be_raised(lab: Session, domain: str) -> None:
    limit = "/sys/module/xen_gntalloc/parameters/limit"
    outcome = lab.run(
        ["sh", "-c", f"old=$(cat {limit}); echo 4321 > {limit}; cat {limit}; echo $old > {limit}"], domain
    )
    assert outcome.output == "4321\n", outcome.errors


@pytest.mark.parametrize("domain", DOMAINS)
def test_this_package_is_there(lab: Session, domain: str) -> None:
    outcome = lab.run(["python3", "-c", "import gntalloc, sys; print(sys.version_info[:2], gntalloc.__file__)"], domain)
    assert outcome.output.startswith("(3, 11) /lab/site/gntalloc"), outcome.errors
    assert lab.run(["python3", "-m", "gntalloc", "--version"], domain).output.startswith("gntalloc ")


@pytest.mark.parametrize("guest", GUESTS)
def test_a_page_granted_in_a_guest_is_mapped_in_dom0(lab: Session, guest: str) -> None:
    outcomes = lab.run_together({guest: ["python3", "granter.py"], "dom0": ["python3", "grantee.py"]}, timeout=60)
    assert outcomes[guest].output == "the guest read from dom0\n", outcomes
    assert outcomes["dom0"].output == "dom0 read from guest\n", outcomes


@pytest.mark.parametrize("domain", DOMAINS)
def test_status_output_and_errors_come_apart(lab: Session, domain: str) -> None:
    seen: list[tuple[str, int]] = []
    outcome = lab.run(
        ["sh", "-c", "echo out; echo err >&2; exit 7"],
        domain,
        on_output=lambda where, stream, _: seen.append((where, stream)),
    )
    assert (outcome.exit_status, outcome.output, outcome.errors) == (7, "out\n", "err\n")
    assert sorted(seen) == [(domain, 1), (domain, 2)]
    assert outcome.versions["xen"].startswith("4.")


@pytest.mark.parametrize("domain", DOMAINS)
def test_much_output_arrives_whole(lab: Session, domain: str) -> None:
    outcome = lab.run(["seq", "30000"], domain)
    assert outcome.output.split() == [str(number) for number in range(1, 30001)]


def test_a_signal_and_a_missing_program_are_told_as_by_a_shell(lab: Session) -> None:
    assert lab.run(["sh", "-c", "kill -9 $$"]).exit_status == 128 + 9
    missing = lab.run(["no-such-program"])
    assert missing.exit_status == 127
    assert "no-such-program" in missing.errors


def test_a_child_left_behind_does_not_hold_the_command(lab: Session) -> None:
    assert lab.run(["sh", "-c", "sleep 600 & echo done"], timeout=60).output == "done\n"


@pytest.mark.parametrize(("domain", "size"), [("dom0", 5_000_000), ("pv", 200_000), ("pvh", 200_000)])
def test_files_go_in_and_come_out_as_they_were(lab: Session, tmp_path: Path, domain: str, size: int) -> None:
    content = os.urandom(size)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/big").write_bytes(content)
    (tmp_path / "folder/empty").touch()
    lab.put([tmp_path / "folder"], domain)
    assert lab.fetch(["folder"], domain) == {"folder/big": content, "folder/empty": b""}
    assert lab.fetch(["folder/b*"], domain) == {"folder/big": content}


def test_a_file_that_is_not_there_is_said_so(lab: Session) -> None:
    with pytest.raises(LabError, match="no-such-file"):
        lab.fetch(["no-such-file"])


def test_a_command_that_hangs_ends_at_the_limit(lab: Session) -> None:
    started = time.monotonic()
    with pytest.raises(LabTimedOut, match="run sleep in pvh"):
        lab.run(["sleep", "600"], "pvh", timeout=3)
    assert time.monotonic() - started < 20


@pytest.mark.parametrize("domain", GUESTS)
def test_a_panic_in_a_guest_is_told_with_its_last_words(lab: Session, domain: str) -> None:
    # Last in this module on this boot: the guests do not come back.
    with pytest.raises(Crashed, match="sysrq triggered crash"):
        lab.run(["sh", "-c", "echo c > /proc/sysrq-trigger"], domain, timeout=60)
    with pytest.raises(Crashed, match=f"use domain {domain}"):
        lab.run(["true"], domain)
    assert lab.run(["true"]).exit_status == 0


def test_a_panic_in_dom0_is_told_with_its_last_words() -> None:
    with find().boot() as session, pytest.raises(Crashed, match="sysrq triggered crash"):
        session.run(["sh", "-c", "echo c > /proc/sysrq-trigger"], timeout=60)


def test_the_command_line_runs_a_pair_and_fetches(tmp_path: Path) -> None:
    find()
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "gntalloc",
            "lab",
            "run",
            "--pair",
            "--guest",
            "pv",
            "--json",
            "--file",
            str(HERE / "granter.py"),
            "--file",
            str(HERE / "grantee.py"),
            "--fetch",
            "*.txt",
            "--into",
            str(tmp_path),
            "--in-guest",
            "sh -c 'python3 granter.py > guest.txt'",
            "--in-dom0",
            "python3 grantee.py",
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["commands"]["dom0"]["output"] == "dom0 read from guest\n"
    assert (tmp_path / "guest.txt").read_text() == "the guest read from dom0\n"


def test_ctrl_c_ends_qemu_too() -> None:
    find()
    command = [sys.executable, "-m", "gntalloc", "lab", "run", "--", "sh", "-c", "echo started; sleep 600"]
    with Limited(command, stdout=subprocess.PIPE, text=True) as lab:
        assert lab.stdout is not None
        assert lab.stdout.readline() == "started\n"
        (qemu,) = Path(f"/proc/{lab.pid}/task/{lab.pid}/children").read_text().split()
        lab.send_signal(signal.SIGINT)
        assert lab.wait(timeout=30) == 130
    assert not Path(f"/proc/{qemu}").exists()
