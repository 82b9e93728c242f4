"""Run the rows in one place and write down what was seen.

    python3 judge.py kernel OUT.json [ROW...]     on /dev/xen: this domain grants to itself and maps its own grants
    python3 judge.py across OUT.json [ROW...]     in dom0: the granter is in a guest that runs `far.py serve`
    python3 judge.py machine OUT.json [ROW...]    on a machine of our own, a new one for each row
    python3 judge.py linux OUT.json [ROW...]      the same, with behaviour="linux"
"""

from __future__ import annotations

import json
import os
import platform
import sys
from typing import Any

from driving import local
from rows import ROWS, run


def kernel_facts() -> dict[str, str]:
    """Which kernel and hypervisor this is."""
    facts = {"kernel": platform.release(), "version": platform.version()}
    for name in ("version/major", "version/minor", "version/extra", "type", "uuid"):
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
    from gntalloc.guest.devices.kernel import KernelDevices  # noqa: PLC0415

    domid = KernelDevices().domid
    saw = {}
    for key in keys:
        saw[key] = run(key, local("kernel", {"granter": domid, "grantee": domid}, {}))
        print(key, saw[key], flush=True)
    return {"facts": kernel_facts() | {"domid": str(domid)}, "rows": saw}


def judge_across(keys: list[str], guest: int = 1) -> dict[str, Any]:
    """Run rows between a guest, which grants, and this domain, dom0, which maps."""
    from far import Far, across  # noqa: PLC0415

    far = Far.wait_for(guest)
    saw = {}
    for key in keys:
        saw[key] = run(key, across(far, 0))
        print(key, saw[key], flush=True)
    far.say("end")
    return {"facts": kernel_facts(), "rows": saw}


def judge_machine(keys: list[str], behaviour: str = "ours") -> dict[str, Any]:
    """Run rows on a machine of our own, one for each row."""
    import gntalloc  # noqa: PLC0415

    saw = {}
    for key in keys:
        with gntalloc.Machine(behaviour=behaviour) as machine:
            domids = {"granter": 1, "grantee": 2}
            names = domids.items()
            environments = {name: {"GNTALLOC_DOMAIN": machine.domain(domid).address} for name, domid in names}
            saw[key] = run(key, local("machine", domids, environments))
    return {"facts": {}, "rows": saw}


def judge_linux(keys: list[str]) -> dict[str, Any]:
    """Run rows on a machine that does as Linux."""
    return judge_machine(keys, "linux")


JUDGES = {"kernel": judge_kernel, "across": judge_across, "machine": judge_machine, "linux": judge_linux}

# Rows with both a granter and a grantee, where it could matter that they are in different domains.
BETWEEN_DOMAINS = (
    "22 23 25 40 51 72 76 78 82 83 84 85 86 G1 G2 G3 G4 G6 G8 G9 G10 G11 G13 G14 G15 G17"
).split()  # fmt: skip


def main(arguments: list[str]) -> None:
    """Write the result as JSON."""
    kind, out, *keys = arguments
    result = JUDGES[kind](keys or (BETWEEN_DOMAINS if kind == "across" else list(ROWS)))
    with open(out, "w") as file:
        json.dump(result, file, indent=1)
        file.write("\n")
    print(f"{len(result['rows'])} rows written to {os.path.basename(out)}")


if __name__ == "__main__":
    main(sys.argv[1:])
