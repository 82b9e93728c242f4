"""Run the rows in one place and write down what was seen.

python3 judge.py kernel OUT.json [ROW...]     on /dev/xen: this domain grants to itself and maps its own grants
python3 judge.py across OUT.json [ROW...]     in dom0: the granter is in a guest that runs `far.py serve`
python3 judge.py machine OUT.json [ROW...]    on a machine of our own, a new one for each row
python3 judge.py run OUT.json [ROW...]         the kernel's seat in two domains of `gntalloc run --all-opens`
python3 judge.py linux OUT.json [ROW...]      the same, with behaviour="linux"
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from typing import TYPE_CHECKING, Any

from driving import Rig, distant, local
from rows import BETWEEN_DOMAINS, ROWS, run

if TYPE_CHECKING:
    from collections.abc import Callable

    from far import Far


def kernel_facts() -> dict[str, str]:
    """Which kernel and hypervisor this is."""
    facts = {"kernel": platform.release(), "version": platform.version()}
    for name in ("version/major", "version/minor", "version/extra", "type"):
        try:
            with open(f"/sys/hypervisor/{name}") as file:
                facts[name] = file.read().strip()
        except OSError:
            continue
    try:
        with open("/sys/hypervisor/guest_type") as file:
            facts["guest_type"] = file.read().strip()
    except OSError:
        pass
    return facts


def judge_kernel(keys: list[str]) -> dict[str, Any]:
    """Run rows on /dev/xen."""
    from gntalloc.guest.devices.kernel import KernelDevices

    domid = KernelDevices().domid
    saw = {}
    for key in keys:
        saw[key] = run(key, local("kernel", {"granter": domid, "grantee": domid}, {}))
        print(key, saw[key], flush=True)
    return {"facts": kernel_facts() | {"domid": str(domid)}, "rows": saw}


def judge_out_of(keys: list[str]) -> dict[str, Any]:
    """Run rows between a guest, which grants, and this domain, dom0, which maps."""
    from far import out_of

    return _judge_with_a_guest(keys, out_of)


def judge_into(keys: list[str]) -> dict[str, Any]:
    """Run rows between this domain, dom0, which grants, and a guest, which maps."""
    from far import into

    return _judge_with_a_guest(keys, into)


def _judge_with_a_guest(keys: list[str], rig: Callable[[Far], Rig]) -> dict[str, Any]:
    from far import Far

    far = Far.wait_for(int(os.environ["PEER_DOMID"]))
    saw = {}
    for key in keys:
        saw[key] = run(key, rig(far))
        print(key, saw[key], flush=True)
    far.say("end")
    return {"facts": kernel_facts(), "rows": saw}


def judge_machine(keys: list[str], behaviour: str = "ours") -> dict[str, Any]:
    """Run rows on a machine of our own, one for each row."""
    import gntalloc

    saw = {}
    for key in keys:
        with gntalloc.Machine(behaviour=behaviour) as machine:
            domids = {"granter": 1, "grantee": 2}
            names = domids.items()
            environments = {name: {"GNTALLOC_DOMAIN": machine.domain(domid).address} for name, domid in names}
            saw[key] = run(key, local("machine", domids, environments))
    return {"facts": {}, "rows": saw}


def judge_run(keys: list[str]) -> dict[str, Any]:
    """Run rows on what `gntalloc run` serves: two domains of one machine, for all rows."""
    name = f"conformance-{os.getpid()}"
    command = [sys.executable, "-m", "gntalloc", "run", "--all-opens", "--machine", name]
    spawn = os.path.join(os.path.dirname(os.path.abspath(__file__)), "spawn.py")
    domids = {"granter": 1, "grantee": 2}
    with tempfile.TemporaryDirectory() as folder:
        paths = {who: os.path.join(folder, who) for who in domids}
        started = [
            subprocess.Popen([*command, "--domid", str(domid), "--", sys.executable, spawn, paths[who]])
            for who, domid in domids.items()
        ]
        try:
            while not all(map(os.path.exists, paths.values())):
                if any(process.poll() is not None for process in started):
                    raise RuntimeError("a run ended at once")
                time.sleep(0.01)
            saw = {key: run(key, distant(domids, paths)) for key in keys}
        finally:
            for process in started:
                process.kill()
                process.wait(20)
    return {"facts": {}, "rows": saw}


def judge_linux(keys: list[str]) -> dict[str, Any]:
    """Run rows on a machine that does as Linux."""
    return judge_machine(keys, "linux")


JUDGES = {
    "kernel": judge_kernel,
    "out-of": judge_out_of,
    "into": judge_into,
    "machine": judge_machine,
    "run": judge_run,
    "linux": judge_linux,
}


def main(arguments: list[str]) -> None:
    """Write the result as JSON."""
    kind, out, *keys = arguments
    result = JUDGES[kind](keys or list(BETWEEN_DOMAINS if kind in {"out-of", "into"} else ROWS))
    with open(out, "w") as file:
        json.dump(result, file, indent=1)
        file.write("\n")
    print(f"{len(result['rows'])} rows written to {os.path.basename(out)}")


if __name__ == "__main__":
    main(sys.argv[1:])
