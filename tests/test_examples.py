"""Each of the examples, as a user runs it; and that they pass mypy as strictly as the package does."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from limits import Limited

from gntalloc import Domain, Grant, Machine
from gntalloc.testing import Program

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
TESTED_ELSEWHERE = {"forking_server.py"}

PRINTS = {
    "asyncio_service.py": "4\n9\n?\nsay `set KEY VALUE` or `get KEY`\n",
    "numpy_service.py": "100000 ones cumulated: 1, 2, ... 100000\n",
    "dice_driver.py": "1000 throws, from 1 to 6; 100 sides at most\nof a dice with 101 sides: 0\n",
}


# Buffered, so that a line of one process is written in one piece; and of no domain.
HERE = {name: value for name, value in os.environ.items() if name not in {"PYTHONUNBUFFERED", "GNTALLOC_DOMAIN"}}


def run(*command: str | Path, cwd: str | Path = ROOT, env: dict[str, str] = HERE) -> str:
    """Its standard output, once it has ended well and has said nothing else."""
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, timeout=50, check=False, cwd=cwd, env=env)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(("name", "prints"), PRINTS.items(), ids=PRINTS)
def test_a_program(name: str, prints: str, tmp_path: Path) -> None:
    """With warnings as errors: what is left open would be one."""
    assert run(sys.executable, "-X", "dev", "-W", "error", EXAMPLES / name, cwd=tmp_path) == prints


SERVERS = {
    "asyncio_service.py": "asyncio.run(example.ask(domain, 'set a b', 'get a'))",
    "numpy_service.py": "example.ask(domain, numpy.ones(3))",
}
CLIENT = """
import asyncio, gntalloc, importlib, numpy, sys
example, domain = importlib.import_module(sys.argv[1]), gntalloc.current_domain()
print(*eval(sys.argv[2]))
"""
ANSWERS = {"asyncio_service.py": "ok b\n", "numpy_service.py": "1.0 2.0 3.0\n"}


@pytest.mark.parametrize("name", SERVERS)
def test_a_server_and_a_client_of_their_own(name: str, tmp_path: Path) -> None:
    """As the head of the file says, on a machine that runs already; one client after another."""
    folder = str(tmp_path / "m")
    machine = [sys.executable, "-m", "gntalloc", "machine", "--name", folder]
    client = [sys.executable, "-c", CLIENT, name.removesuffix(".py"), SERVERS[name]]
    with Limited(machine, stdout=subprocess.PIPE, text=True) as beside:
        assert beside.stdout is not None
        while "runs as pid" not in beside.stdout.readline():
            pass
        serving = {**HERE, "GNTALLOC_DOMAIN": f"{folder}/1"}
        with Limited([sys.executable, str(EXAMPLES / name), "serve", "2"], env=serving) as server:
            for _ in range(2):
                environment = {**HERE, "PYTHONPATH": str(EXAMPLES), "GNTALLOC_DOMAIN": f"{folder}/2"}
                assert run(*client, env=environment) == ANSWERS[name]
            server.kill()
        beside.terminate()


def test_the_pytest_suite(tmp_path: Path) -> None:
    suite = shutil.copytree(EXAMPLES / "pytest_suite", tmp_path / "suite", ignore=shutil.ignore_patterns("__pycache__"))
    said = run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "error", cwd=suite)
    assert re.search(r"^4 passed", said, re.MULTILINE), said


def test_the_pytest_suite_finds_faults(tmp_path: Path) -> None:
    """It is a suite that can fail: without the check of the length, and without the cleaning up."""
    suite = shutil.copytree(EXAMPLES / "pytest_suite", tmp_path / "suite")
    code = (suite / "letterbox.py").read_text()
    worse = code.replace("if length > LONGEST:", "if False:").replace(
        "self.bell.close()  # half a letterbox is none", "pass"
    )
    assert worse.count("\n") == code.count("\n")
    (suite / "letterbox.py").write_text(worse)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "error"],
        cwd=suite,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert "DID NOT RAISE" in done.stdout
    assert re.search(r"ResourceWarning: <Port \d+, of domain 2> was never closed", done.stdout), done.stdout


def test_the_c_pair(tmp_path: Path) -> None:
    for program, package in (("cmake", "cmake"), ("gcc", "gcc"), ("make", "make")):
        if shutil.which(program) is None:
            pytest.skip(f"there is no {program} (apt install {package})")
    if not Path("/usr/include/xengnttab.h").exists():
        pytest.skip("Xen's headers are not there (apt install libxen-dev)")
    run("cmake", "-S", EXAMPLES / "c_pair", "-B", tmp_path, f"-DPython3_EXECUTABLE={sys.executable}")
    run("cmake", "--build", tmp_path)
    assert "100% tests passed" in run("ctest", "--test-dir", tmp_path, "--output-on-failure")


def test_mypy_is_strict_with_them() -> None:
    """`make check` looks at them; here, that it does."""
    assert '"examples"' in re.findall(r"^files = .*", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[0]


def test_each_is_in_the_table_and_in_a_test() -> None:
    table = (EXAMPLES / "README.md").read_text()
    there = {path.name for path in EXAMPLES.iterdir()} - {"README.md", "__pycache__"}
    assert there <= {*PRINTS, "distrust.py", "pytest_suite", "c_pair"} | TESTED_ELSEWHERE
    for name in there:
        assert name in table, name


# Two users, of whom neither is this one. Only root can set that up.

BOB_SAYS = "alice: bob says b'thank you for hello'"
SAID = sorted(
    [
        BOB_SAYS,
        "alice: bob has let go of the page",
        "bob: reads b'hello', and cannot write: cannot modify read-only memory",
    ]
)


@pytest.fixture
def for_all_users() -> Iterator[tuple[str, Path]]:
    """An interpreter that any user can start, and a folder with the example and the package, for PYTHONPATH."""
    if os.getuid():
        pytest.skip("only root can become other users")
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    shutil.copytree(ROOT / "src" / "gntalloc", folder / "gntalloc", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(EXAMPLES / "distrust.py", folder)
    for name in ("click", "rich", "markdown_it", "mdurl", "pygments"):  # what the command line needs
        found = importlib.util.find_spec(name)
        if found is not None and found.submodule_search_locations:
            shutil.copytree(found.submodule_search_locations[0], folder / name)
    run("chmod", "-R", "a+rX", folder)
    try:
        yield _interpreter(), folder
    finally:
        shutil.rmtree(folder)


def _interpreter() -> str:
    for path in (sys.executable, "/usr/bin/python3"):
        command = [
            "setpriv",
            "--reuid",
            "nobody",
            "--regid",
            "daemon",
            "--clear-groups",
            "sh",
            "-c",
            '"$0" -c "$1"',
            path,
        ]
        new_enough = "import sys; sys.exit(sys.version_info < (3, 11))"
        if (
            subprocess.run([*command, new_enough], capture_output=True, check=False, cwd="/", timeout=50).returncode
            == 0
        ):
            return path
    pytest.skip("no Python here can be started by every user")


def test_distrust_as_two_users(for_all_users: tuple[str, Path]) -> None:
    python, folder = for_all_users
    here = {name: value for name, value in HERE.items() if name != "XDG_RUNTIME_DIR"}
    here["PYTHONPATH"] = str(folder)
    said = run(python, "-W", "error", folder / "distrust.py", "nobody", "daemon", env=here, cwd="/")
    assert sorted(said.splitlines()) == SAID


TWO_RUNS = """
gntalloc="$1 -m gntalloc"
$gntalloc run --machine $3 --domid 1 --userns -- "$1" "$2" alice & alice=$!
$gntalloc run --machine $3 --domid 2 --userns -- "$1" "$2" bob || exit
wait $alice
"""


def test_distrust_as_one_user_in_namespaces(tmp_path: Path) -> None:
    said = run("sh", "-c", TWO_RUNS, "sh", sys.executable, EXAMPLES / "distrust.py", tmp_path / "m")
    assert sorted(said.splitlines()) == SAID


def lurk(domain: Domain) -> None:
    """As Bob: map the page, and say nothing."""
    with (
        domain.connect(1, "page", timeout=30) as channel,
        domain.map(Grant.parse(channel.recv(timeout=30).decode())),
    ):
        domain.store.write("data/maps", "yes")
        threading.Event().wait(50)


def test_distrust_of_one_who_is_killed(gntalloc_machine: Machine) -> None:
    """She is told of his death, and that he has let go."""
    command = [sys.executable, str(EXAMPLES / "distrust.py"), "alice"]
    domain = gntalloc_machine.domain(2)
    gntalloc_machine.domain(1).close()
    with (
        Limited(command, env=gntalloc_machine.environ(1), stdout=subprocess.PIPE, text=True) as alice,
        Program(domain, lurk) as bob,
        domain.store.watch("data/maps") as watch,
    ):
        while not domain.store.exists("data/maps"):
            watch.wait(timeout=30)
        bob.kill()
        said, _ = alice.communicate(timeout=40)
    assert re.match(
        r"alice: bob says nothing: .* ended without closing .*\nalice: bob has let go of the page\n$", said
    ), said
    domain.close()


def test_distrust_on_a_machine_of_a_third(for_all_users: tuple[str, Path]) -> None:
    """As docs/isolation.md has it: each starts their own program, and neither has a say over the machine."""
    python, folder = for_all_users
    name = str(folder / "pages")
    machine = [python, "-m", "gntalloc", "machine", "--name", name]
    machine += ["--domain", "1:uid=nobody", "--domain", "2:uid=daemon"]
    here = {**HERE, "PYTHONPATH": str(folder)}
    with Limited(machine, stdout=subprocess.PIPE, text=True, env=here) as beside:
        assert beside.stdout is not None
        while "runs as pid" not in beside.stdout.readline():
            pass

        def part(user: str, domid: int, role: str) -> Limited[str]:
            become = ["setpriv", "--reuid", user, "--regid", "daemon", "--clear-groups"]
            return Limited(
                [*become, python, str(folder / "distrust.py"), role],
                env={**here, "GNTALLOC_DOMAIN": f"{name}/{domid}"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                cwd="/",
            )

        started = [part("nobody", 1, "alice"), part("daemon", 2, "bob"), part("daemon", 1, "alice")]
        *said, stranger = [each.communicate(timeout=50)[0] for each in started]
        beside.terminate()
    assert sorted("".join(said).splitlines()) == SAID
    assert "makes one for you" in stranger  # it does not reach the socket at all
