"""What apt says, and what is made of it."""

from pathlib import Path

import pytest

from gntalloc.lab.apt import Apt, Mirrors, machine_mirrors, parse_plan
from gntalloc.lab.build import choose_packages
from gntalloc.lab.errors import BuildFailed, NothingToRunOn

PLAN = """\
NOTE: a line that is no package
'http://mirror.example/debian/pool/main/b/busybox/busybox-static_1.35.0-4%2bb1_amd64.deb' \
busybox-static_1%3a1.35.0-4+b1_amd64.deb 928188 SHA256:aa
'http://mirror.example/debian/pool/main/p/python3/python3_3.11.2-1%2bb1_amd64.deb' \
python3_3.11.2-1+b1_amd64.deb 26300 MD5Sum:bb
"""


def test_a_plan_names_packages_versions_and_files() -> None:
    busybox, python = parse_plan(PLAN)
    assert (busybox.name, busybox.version, busybox.size) == ("busybox-static", "1:1.35.0-4+b1", 928188)
    assert busybox.file == "busybox-static_1%3a1.35.0-4+b1_amd64.deb"
    assert python.version == "3.11.2-1+b1"


@pytest.mark.parametrize(
    ("targets", "archive", "security"),
    [
        (
            "https://m.example/debian/ https://m.example/debian-security/ https://other.example/apt",
            "https://m.example/debian",
            "https://m.example/debian-security",
        ),
        ("http://m.example/ubuntu http://m.example/ubuntu", Mirrors.archive, Mirrors.security),
        ("", Mirrors.archive, Mirrors.security),
        (
            "http://s.example/archive/debian/20260101T000000Z/",
            "http://s.example/archive/debian/20260101T000000Z",
            Mirrors.security,
        ),
    ],
)
def test_the_mirrors_are_the_machines_own_where_they_are_debians(targets: str, archive: str, security: str) -> None:
    assert machine_mirrors(targets) == Mirrors(archive, security)


def test_the_sources_list_is_of_one_release_and_signed() -> None:
    lines = Mirrors().sources("bookworm", Path("/keys.gpg")).splitlines()
    assert [line.split()[3] for line in lines] == ["bookworm", "bookworm-updates", "bookworm-security"]
    assert all("[signed-by=/keys.gpg]" in line for line in lines)


def test_without_a_keyring_nothing_is_fetched(tmp_path: Path) -> None:
    apt = Apt({"apt-get": "/bin/false", "apt-cache": "/bin/false"}, tmp_path)
    with pytest.raises(NothingToRunOn, match="apt install debian-archive-keyring"):
        apt.use("bookworm", Mirrors(), tmp_path / "no-such-keyring")


def test_the_newest_hypervisor_is_taken_and_its_tools_fit() -> None:
    names = [
        "xen-hypervisor-4.9-amd64",
        "xen-hypervisor-4.17-amd64",
        "xen-hypervisor-common",
        "xen-hypervisor-4.17-amd64-dbg",
    ]
    chosen = choose_packages(names, ["strace"])
    assert chosen[:3] == ["xen-hypervisor-4.17-amd64", "xen-utils-4.17", "libxenmisc4.17"]
    assert chosen[-1] == "strace"


def test_a_release_without_xen_is_said_so() -> None:
    with pytest.raises(BuildFailed, match="no package xen-hypervisor"):
        choose_packages(["xen-hypervisor-common"], [])
