"""Much at once, signals all the time, ends in the middle of anything: no error, nothing left, nobody hangs.

GNTALLOC_STORM=1 runs each at its full size, which takes minutes.
"""

from __future__ import annotations

import os
import select
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from runs import order, python, said, tell, wait_for

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable

    from runs import Runs

    Build = Callable[..., str]

WHOLE = bool(os.environ.get("GNTALLOC_STORM"))
pytestmark = pytest.mark.timeout(900 if WHOLE else 60)
PATIENCE = 600 if WHOLE else 50


def some(suite: int, whole: int) -> int:
    """How many, in the suite and in a storm."""
    return whole if WHOLE else suite


def four_pages(runs: Runs) -> tuple[subprocess.Popen[str], list[str]]:
    """A granter in domain 1, and its references; the pages begin with A, B, C, D."""
    code = """
f = device('gntalloc'); i, r = alloc(f, 2, 4); m = place(f, i, 4)
for n in range(4): m[4096*n] = 65 + n
say(*r); input()
"""
    granter = runs.start(1, *python(code))
    return granter, said(granter).split()


def statistics(runs: Runs) -> dict[str, Any]:
    found: dict[str, Any] = order(runs, "statistics")
    return found


def test_four_threads_on_one_handle(runs: Runs, build: Build) -> None:
    _, refs = four_pages(runs)
    storm = build("storm", "-pthread")
    done = runs(2, storm, str(some(200, 6000)), "0", "1", *refs, timeout=PATIENCE)
    assert (done.stdout, done.stderr) == ("0 0\n", "")


def test_four_threads_and_a_timer(runs: Runs, build: Build) -> None:
    _, refs = four_pages(runs)
    storm = build("storm", "-pthread")
    done = runs(2, storm, str(some(100, 2000)), "150", "1", *refs, timeout=PATIENCE)
    assert (done.stdout, done.stderr) == ("0 1\n", "")


GRANTS = """
def rounds(file, count):
    for _ in range(count):
        i, r = alloc(file, 2); m = place(file, i); m[:1] = b'x'; m.close(); free(file, i)
"""


def test_a_timer_that_interrupts_a_script(runs: Runs) -> None:
    code = f"""{GRANTS}
count = 0
def handler(*_):
    global count
    count += 1
signal.signal(signal.SIGALRM, handler); signal.siginterrupt(signal.SIGALRM, False)
signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
rounds(device('gntalloc'), {some(200, 5000)})
signal.setitimer(signal.ITIMER_REAL, 0)
say('done', count > 100)
"""
    done = runs(1, *python(code), timeout=PATIENCE)
    assert (done.stdout, done.stderr) == ("done True\n", "")


def test_stopped_and_continued_all_the_time(runs: Runs) -> None:
    process = runs.start(
        1, *python(f"{GRANTS}\nf = device('gntalloc'); say(os.getpid()); rounds(f, {some(300, 5000)}); say('done')")
    )
    program = int(said(process))
    assert process.stdout is not None
    stops = 0
    while not select.select([process.stdout], [], [], 0.001)[0]:
        os.kill(program, signal.SIGSTOP)
        os.kill(program, signal.SIGCONT)
        stops += 1
    assert said(process) == "done"
    assert stops > 20


KILLS = """
import random, time
def storm(count, work, seed):
    random.seed(seed)
    for _ in range(count):
        child = os.fork()
        if not child:
            while True: work()
        time.sleep(random.random() * 0.03)
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
"""
GRANTER = """
def work():
    f = device('gntalloc'); e = device('evtchn')
    i, r = alloc(f, 2, 3); m = place(f, i, 3); p = call(e, UNBOUND, '=I', 2)
    call(f, 0x104707, '=QII', i, 3, p); m.close(); free(f, i) if os.getpid() % 2 else None
    os.close(f); os.close(e)
"""
GRANTEE = """
def work():
    f = device('gntdev'); i = reserve(f, 1, refs[:3]); m = place(f, i, 3); e = device('evtchn')
    assert m[:1] == b'A'; call(f, 0x104707, '=QII', i + 100, 1, 0); m.close(); call(f, UNMAP, '=QI4x', i, 3)
    os.close(f); os.close(e)
"""


def test_random_kills_leave_nothing(runs: Runs) -> None:
    """Granters and grantees, killed in the middle of whatever they do; then a whole limit of pages is to be had."""
    holder, refs = four_pages(runs)
    mapper = runs.start(2, "sh", "-c", "echo up; read x")  # so that the domain, and its books, stay
    assert said(mapper) == "up"
    start = statistics(runs)
    count = some(40, 500)
    both = [
        runs.start(1, *python(f"{KILLS}{GRANTER}\nstorm({count}, work, 1); say('done')")),
        runs.start(2, *python(f"{KILLS}{GRANTEE}\nrefs = [{','.join(refs)}]\nstorm({count}, work, 2); say('done')")),
    ]
    assert [said(each) for each in both] == ["done", "done"]
    for each in both:
        assert each.wait(20) == 0
    quiet = ("domains", "pages", "extents")
    wait_for(lambda: [statistics(runs)[name] for name in quiet] == [start[name] for name in quiet], "something is left")
    limit = statistics(runs)["domains"][0]["limit"]
    code = f"""
f = device('gntalloc'); alloc(f, 2, {limit - 4})
try: alloc(f, 2)
except OSError as error: say(errno.errorcode[error.errno])
"""
    assert runs(1, *python(code)).stdout == "ENOSPC\n"
    tell(holder, "")


def test_whole_runs_that_are_killed(runs: Runs) -> None:
    """`run` itself, its supervisor, or the program: whichever is killed, all end, and their domain with them."""
    keeper = runs.start(9, "sh", "-c", "echo up; read x")
    assert said(keeper) == "up"
    for number in range(some(6, 60)):
        victim = runs.start(1, *python("f = device('gntalloc'); i, r = alloc(f, 2); say(os.getpid(), os.getppid())"
                                       "\nwhile True: m = place(f, i); m.close()"))  # fmt: skip
        program, supervisor = map(int, said(victim).split())
        os.kill((victim.pid, program, supervisor)[number % 3], signal.SIGKILL)
        assert victim.wait(20) == -signal.SIGKILL
        for process in (program, supervisor):
            wait_for(lambda process=process: ended(process), "a process is left")  # type: ignore[misc]
        wait_for(lambda: [each["domid"] for each in statistics(runs)["domains"]] == [9], "the domain is left")


def test_a_supervisor_is_killed_under_a_tree_of_processes(runs: Runs) -> None:
    """What the program has started ends too, however deep, in whichever session: nobody would serve it."""
    code = """
f = device('gntalloc'); alloc(f, 2)
for _ in range(3):
    if not os.fork():
        os.setsid(); say(os.getpid())
        if os.fork(): os._exit(0)
        say(os.getpid())
        for _ in range(3): os.fork()
        while True: signal.pause()
say(os.getppid()); signal.pause()
"""
    process = runs.start(1, *python(code))
    said_of = [int(said(process)) for _ in range(7)]
    assert process.stdout is not None
    wait_for(lambda: len(descendants(process.pid)) > 20, "they do not start")
    there = descendants(process.pid)
    (supervisor,) = [each for each in said_of if parent_of(each) == process.pid]
    os.kill(supervisor, signal.SIGKILL)
    assert process.wait(20) == -signal.SIGKILL
    assert [each for each in there if not ended(each)] == []


def parent_of(process: int) -> int:
    try:
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def descendants(process: int) -> list[int]:
    everybody = [int(name) for name in os.listdir("/proc") if name.isdecimal()]
    parents = {each: parent_of(each) for each in everybody}
    found, before = {process}, 0
    while len(found) > before:
        before = len(found)
        found |= {each for each, parent in parents.items() if parent in found}
    return list(found - {process})


def ended(process: int) -> bool:
    """Whether it has; one that nobody has collected yet has, too."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_the_machine_killed_under_programs(runs: Runs, build: Build) -> None:
    """Calls fail, waits end, pages stay as they are, and everybody ends."""
    code = """
f = device('gntalloc'); i, r = alloc(f, 2); m = place(f, i); m[:1] = b'x'; say(os.getppid()); input()
for attempt in (lambda: alloc(f, 2), lambda: place(f, i), lambda: device('gntdev')):
    try: attempt()
    except OSError as error: say('error')
say(m[:1].decode())
"""
    asks = runs.start(1, *python(code))
    supervisor = int(said(asks))
    reads = runs.start(
        3, *python("e = device('evtchn'); call(e, UNBOUND, '=I', 1); say('reads')\nsay(os.read(e, 4) or 'end')")
    )
    assert said(reads) == "reads"
    watches = runs.start(4, *python("x = device('xenbus'); say('watches'); say(os.read(x, 16) or 'end')"))
    assert said(watches) == "watches"
    path = "/local/domain/1/data/vchan/test"
    serves = runs.start(1, build("vchan", "-O2"), "server", "2", path, "4096", "wait")
    assert said(serves) == "listening"
    connects = runs.start(2, build("vchan", "-O2"), "client", "1", path, "0", "wait")
    assert said(connects) == said(serves) == "both are there"
    os.kill(statistics(runs)["pid"], signal.SIGKILL)
    tell(asks, "")
    assert [said(asks) for _ in range(4)] == ["error", "error", "error", "x"]
    assert said(reads) == said(watches) == "end"
    for each in (asks, reads, watches, serves, connects):
        each.communicate(timeout=20)
    assert asks.returncode == reads.returncode == watches.returncode == 0
    wait_for(lambda: ended(supervisor), "a supervisor is left")
    wait_for(runs.over, "nobody tidied up after the machine")
