"""The plugin, as its users have it: in a pytest of its own, whose words are read. And every program of its page."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "testing-your-code.md").read_text()
PROGRAMS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def run(folder: Path, *arguments: str) -> tuple[int, str]:
    """A pytest with no settings but its own. Its exit status, and what it said."""
    (folder / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.timeout(240)
def test_every_program_of_the_page_passes(tmp_path: Path) -> None:
    for number, program in enumerate(PROGRAMS):
        (tmp_path / f"test_{number}.py").write_text(program)
    tests = sum(len(re.findall(r"^ *def test_", program, re.MULTILINE)) for program in PROGRAMS)
    status, said = run(tmp_path, "-v", "-rs")
    assert status == 0, said
    assert tests >= 15
    assert int(re.findall(r"(\d+) passed", said)[0]) > tests + 20  # those of the kit too
    assert "2 skipped" in said  # as that channel does not show its indexes


def test_what_the_page_says_of_the_first_test_is_so() -> None:
    first = PROGRAMS[0]
    assert len(first.splitlines()) == 3
    assert "import" not in first


LEAVING = """
import os

KEPT = []


def test_leaves_pages(gntalloc_domains):
    KEPT.append(gntalloc_domains.alice.share(2, pages=3))


def test_leaves_a_port(gntalloc_domains):
    KEPT.append(gntalloc_domains.bob.events.bind(1))


def test_leaves_a_descriptor(gntalloc_machine):
    KEPT.append(os.open(os.devnull, os.O_RDONLY))


def test_leaves_a_channel(gntalloc_channels):
    KEPT.append(gntalloc_channels.server.peek)  # the ends themselves are closed for it


def test_is_clean(gntalloc_channels):
    pass
"""


def test_what_is_left_is_an_error_that_says_what_and_whose(tmp_path: Path) -> None:
    (tmp_path / "test_leaving.py").write_text(LEAVING)
    status, said = run(tmp_path, "-W", "ignore")
    assert status == 1
    assert "5 passed, 3 errors" in said
    assert "after the test, gntalloc_domains: not everything was given back:" in said
    assert "  domain 1, this process: 3 pages granted to domain 2 (references 8-10), mapped by no peer" in said
    assert "  domain 2, this process: event channel port 5 bound" in said
    assert "after the test, gntalloc_machine: not everything was given back:" in said
    assert "  this process: +1 descriptors of /dev/null" in said
    assert "Traceback" not in said.split("short test summary")[0]
    assert "contextlib" not in said


def test_one_failure_is_told_once(tmp_path: Path) -> None:
    (tmp_path / "test_failing.py").write_text(
        "def test_fails(gntalloc_domains):\n    kept = gntalloc_domains.alice.share(2)\n    assert kept is None\n"
        "def test_skips(gntalloc_channels):\n    import pytest\n    pytest.skip('not today')\n"
    )
    status, said = run(tmp_path, "-W", "ignore")
    assert status == 1
    assert "1 failed, 1 skipped" in said
    assert "error" not in said.split("short test summary")[1]


CHILD = """
import pytest

from gntalloc.testing import (
    Program, Snapshot, assert_cleaned_up, channel_pair, checked_machine, faults, running_programs, two_domains,
)
from gntalloc.testing.channels import ChannelConformance

KEPT = []


def fails(domain):
    raise KeyError("deep")


class Lossy:
    def __init__(self, channel):
        self.write, self.close, self.inner = channel.write, channel.close, channel

    def read(self, size=None, timeout=None):
        return self.inner.read(size, timeout=timeout)[:-1]


class Kit(ChannelConformance):
    @classmethod
    def serve(cls, domain, peer):
        with domain.listen(peer, "x", size=4096) as listener:
            return Lossy(listener.accept(30))

    @classmethod
    def connect(cls, domain, peer):
        return Lossy(domain.connect(peer, "x", timeout=30))


def test_of_result(gntalloc_domains):
    with Program(gntalloc_domains.bob, fails) as program:
        program.result(timeout=30)


def test_of_a_failure_nobody_asked_about(gntalloc_domains):
    with Program(gntalloc_domains.bob, fails) as program:
        program.process.wait(30)


def test_of_wait(gntalloc_domains):
    with Program(gntalloc_domains.bob, ["sleep", "100"]) as program:
        program.wait(0.01)


def test_of_a_command_that_is_not_there(gntalloc_domains):
    Program(gntalloc_domains.bob, ["nonesuch"])


def test_of_an_unmodified_one_that_is_not_there(gntalloc_run):
    gntalloc_run(1, ["nonesuch"])


def test_of_an_unmodified_one_that_fails(gntalloc_run):
    gntalloc_run(1, ["sh", "-c", "exit 3"]).result(30)


def test_of_two_domains():
    with two_domains() as (alice, bob):
        KEPT.append(alice.share(bob))


def test_of_a_machine():
    with checked_machine() as machine:
        KEPT.append(open("/dev/null"))


def test_of_no_machine():
    with checked_machine(limit=-1):
        pass


def test_of_channels():
    with channel_pair(limit=0):
        pass


def test_of_running_programs():
    with running_programs() as run:
        run(1, ["sh", "-c", "exit 3"]).process.wait(30)


def test_of_a_snapshot(gntalloc_machine):
    before = Snapshot.of(gntalloc_machine)
    KEPT.append(open("/dev/null"))
    assert_cleaned_up(gntalloc_machine, before)


def test_of_faults_pages(gntalloc_domains):
    with faults.pages(gntalloc_domains.alice, -9999):
        pass


def test_of_faults_store(gntalloc_domains):
    with faults.store(gntalloc_domains.alice, nodes=-1):
        pass


def test_of_faults_events(gntalloc_domains):
    with faults.events(gntalloc_domains.alice, delay=-1):
        pass


def test_of_a_death_that_does_not_come(gntalloc_domains):
    with faults.peer_dies(gntalloc_domains.bob, fails, at=1):
        pass


def test_of_the_kit():
    Kit().test_a_reader_that_waits_is_woken()  # which is the line to see, in the kit
"""


@pytest.mark.parametrize("style", ["long", "short"])
def test_a_traceback_ends_at_the_user_s_line(tmp_path: Path, style: str) -> None:
    """Which is the first and the last place that is shown."""
    (tmp_path / "test_child.py").write_text(CHILD)
    status, said = run(tmp_path, "-W", "ignore", f"--tb={style}")
    assert status == 1
    tests = re.findall(r"^def (test_of_\w+)", CHILD, re.MULTILINE)
    blocks = re.split(
        r"^_{3,} (?:ERROR at \w+ of )?(\w+) _{3,}$", said.split("short test summary")[0], flags=re.MULTILINE
    )
    told = dict(zip(blocks[1::2], blocks[2::2], strict=True))
    assert sorted(told) == sorted(tests)  # no errors beside them, either
    for name, text in told.items():
        places = re.findall(r"^(\S+\.py):\d+: ", text, re.MULTILINE)
        expected = "channels.py" if name == "test_of_the_kit" else "test_child.py"
        assert places[-1].endswith(expected), text
        assert places[0] == "test_child.py", text
        assert len(places) == (2 if name == "test_of_the_kit" else 1), text
        assert "hidden" not in text
        assert "During handling" not in text
    assert told["test_of_result"].count("KeyError: 'deep'") == 1
    assert "test_child.py" in told["test_of_result"].partition("in <Program fails")[2]


def test_every_module_of_the_kit_is_left_out_of_tracebacks() -> None:
    """Or a helper written tomorrow is shown. Of the conformance kit the checks are shown, as tests are."""
    modules = [
        path for path in (ROOT / "src/gntalloc/testing").glob("*.py") if path.stem not in {"__init__", "channels"}
    ]
    assert len(modules) >= 9
    for path in modules:
        assert re.search(r"^__tracebackhide__ = True", path.read_text(), re.MULTILINE), path


TWICE = """
import pytest
from gntalloc.testing import Program, faults

KEPT = []


@pytest.fixture
def mine(gntalloc_domains):
    KEPT.append(gntalloc_domains.alice.share(2))
    raise RuntimeError("of my own")


def test_a_fixture_fails(mine):
    pass


def test_no_machine_any_more(gntalloc_machine, gntalloc_channels, gntalloc_run):
    gntalloc_run(1, ["sleep", "100"])
    faults.machine_dies(gntalloc_machine)
    assert not "this is all"


def test_leaves_and_lasts(gntalloc_run, gntalloc_channels, gntalloc_domains):
    KEPT.append(gntalloc_domains.alice.share(2))


def test_fails_unseen(gntalloc_run):
    gntalloc_run(1, ["sh", "-c", "exit 3"]).process.wait(30)


@pytest.mark.gntalloc(limit=0)
def test_has_no_pages(gntalloc_channels):
    pass
"""


def test_a_failure_has_one_text(tmp_path: Path) -> None:
    (tmp_path / "test_twice.py").write_text(TWICE)
    status, said = run(tmp_path, "-W", "ignore")
    assert status == 1
    details, summary = said.split("short test summary")
    assert "1 failed, 2 passed, 4 errors" in summary
    for text in (
        "RuntimeError: of my own",
        "not everything was given back:",
        "granted to domain 2",
        "ended with exit status 3",
        "before the test, gntalloc_channels: 1 page was asked for, and the domain's limit is 0",
    ):
        assert details.count(text) == 1, details
    for word in ("hidden", "During handling", "gntalloc_pytest.py"):
        assert word not in details


MARKED = """
import pytest

pytestmark = pytest.mark.gntalloc(limit=7, size=1024)


def test_of_the_module(gntalloc_channels, gntalloc_domains):
    assert gntalloc_domains.alice.limit == 7
    assert gntalloc_channels.server.sizes == (1024, 2048)


@pytest.mark.gntalloc(limit=9)
class TestClass:
    @pytest.mark.gntalloc(size=0, extensions=False)
    def test_the_nearest_holds(self, gntalloc_channels, gntalloc_domains):
        assert gntalloc_domains.bob.limit == 9
        assert not gntalloc_channels.server.extended

    @pytest.mark.gntalloc(strict=True)
    def test_strict(self, gntalloc_machine):
        with pytest.raises(OSError, match="strict"):
            gntalloc_machine.domain(5).share(5)


@pytest.mark.gntalloc(limits=9)
def test_unknown(gntalloc_machine):
    pass


@pytest.mark.gntalloc(64)
def test_without_a_name(gntalloc_machine):
    pass
"""


def test_settings_in_markers(tmp_path: Path) -> None:
    (tmp_path / "test_marked.py").write_text(MARKED)
    status, said = run(tmp_path, "--strict-markers")
    assert status == 1
    assert "3 passed, 2 errors" in said
    assert "@pytest.mark.gntalloc does not take limits=; it takes limit=, behaviour=," in said
    assert "@pytest.mark.gntalloc does not take 64;" in said


def test_unused_it_imports_nothing(tmp_path: Path) -> None:
    (tmp_path / "test_unused.py").write_text(
        "import sys\ndef test_nothing_is_imported():\n"
        "    assert 'gntalloc_pytest' in sys.modules\n"
        "    assert [name for name in sys.modules if name.split('.')[0] == 'gntalloc'] == []\n"
    )
    assert run(tmp_path)[0] == 0
    status, said = run(tmp_path, "-p", "no:gntalloc")
    assert (status, "AssertionError" in said) == (1, True)
    assert "gntalloc_channels" in run(tmp_path, "--fixtures")[1]
    assert "@pytest.mark.gntalloc(limit, behaviour" in run(tmp_path, "--markers")[1]


def test_two_suites_at_once_have_machines_of_their_own(tmp_path: Path) -> None:
    """As the workers of pytest-xdist are: processes that know nothing of each other."""
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_same.py").write_text(
        "import pytest\n@pytest.mark.parametrize('number', range(8))\n"
        "def test_same(number, gntalloc_channels, gntalloc_domains):\n"
        "    gntalloc_domains.alice.store.write('data/x', str(number))\n"
        "    gntalloc_channels.server.send(b'x')\n    assert gntalloc_channels.client.recv(timeout=30) == b'x'\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    both = [subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    for each in both:
        said, _ = each.communicate(timeout=100)
        assert "8 passed" in said
