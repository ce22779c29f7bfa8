"""Fake /proc and /sys: what a process's cgroups leave of the machine's CPUs."""

import os
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

import adavit
from adavit.cpus import quota_cpus, usable_cpus

V1 = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
MOUNT = "31 23 0:28 {top} {point} rw,relatime shared:9 - {kind} {kind} {options}\n"


def machine(root: Path, cgroup: str, *mounts: str) -> Path:
    """A root folder whose process has this /proc/self/cgroup, and these lines of mountinfo."""
    process = root / "proc/self"
    process.mkdir(parents=True)
    (process / "cgroup").write_text(cgroup)
    (process / "mountinfo").write_text("23 1 254:0 / / rw - ext4 /dev/vda rw\n" + "".join(mounts))
    return root


def v2(top: str = "/", point: str = "/sys/fs/cgroup") -> str:
    return MOUNT.format(top=top, point=point, kind="cgroup2", options="rw,nsdelegate")


def v1(top: str = "/", point: str = "/sys/fs/cgroup/cpu,cpuacct", options: str = "rw,cpu,cpuacct") -> str:
    return MOUNT.format(top=top, point=point, kind="cgroup", options=options)


def limit(root: Path, folder: str, quota: object, period: object = 100_000, version: int = 2) -> None:
    """Writes a quota as the kernel does; `folder` is the cgroup's, below the root folder."""
    path = root / folder
    path.mkdir(parents=True, exist_ok=True)
    if version == 2:
        (path / "cpu.max").write_text(f"{quota} {period}\n")
    else:
        for name, value in zip(V1, (quota, period), strict=True):
            (path / name).write_text(f"{value}\n")


def test_without_cgroups_there_is_no_limit(tmp_path: Path) -> None:
    assert quota_cpus(tmp_path) is None
    assert quota_cpus(machine(tmp_path, "0::/\n", v2())) is None


@pytest.mark.parametrize(
    ("quota", "cpus"), [(400_000, 4), (399_999, 3), (250_000, 2), (50_000, 1), (1, 1), ("max", None)]
)
def test_a_quota_of_version_2(quota: object, cpus: int | None, tmp_path: Path) -> None:
    machine(tmp_path, "0::/app.slice\n", v2())
    limit(tmp_path, "sys/fs/cgroup/app.slice", quota)
    assert quota_cpus(tmp_path) == cpus


@pytest.mark.parametrize(("quota", "cpus"), [(300_000, 3), (99_999, 1), (-1, None)])
def test_a_quota_of_version_1(quota: int, cpus: int | None, tmp_path: Path) -> None:
    machine(tmp_path, "5:memory:/m\n4:cpu,cpuacct:/docker/a\n1:name=systemd:/init\n", v1())
    limit(tmp_path, "sys/fs/cgroup/cpu,cpuacct/docker/a", quota, version=1)
    assert quota_cpus(tmp_path) == cpus


@given(
    quotas=st.lists(st.none() | st.tuples(st.integers(1, 10**7), st.integers(1000, 10**6)), max_size=5),
    beside=st.integers(1, 10**6),
    version=st.sampled_from([1, 2]),
)
def test_the_least_of_all_parents_counts(quotas: list[tuple[int, int] | None], beside: int, version: int) -> None:
    with TemporaryDirectory() as folder:
        path = "".join(f"/{depth}" for depth in range(1, len(quotas)))
        line = f"0::{path or '/'}\n" if version == 2 else f"3:cpu:{path or '/'}\n"
        root = machine(Path(folder), line, v2(point="/sys/v2"), v1(point="/sys/v1"))
        at = f"sys/v{version}"
        for depth, quota in enumerate(quotas):
            at = f"{at}/{depth}" if depth else at
            limit(root, at, *(quota or ("max" if version == 2 else -1, 100_000)), version=version)
        limit(root, f"{at}/child", beside, version=version)
        limit(root, f"sys/v{version}/sibling", beside, version=version)
        given_out = [quota // period for quota, period in filter(None, quotas)]
        assert quota_cpus(root) == (max(1, min(given_out)) if given_out else None)


def test_a_container_mounts_only_its_own_cgroup(tmp_path: Path) -> None:
    machine(tmp_path, "4:cpu,cpuacct:/docker/a/b\n", v1(top="/docker/a"))
    limit(tmp_path, "sys/fs/cgroup/cpu,cpuacct", 500_000, version=1)
    limit(tmp_path, "sys/fs/cgroup/cpu,cpuacct/b", 200_000, version=1)
    limit(tmp_path, "sys/fs/cgroup/cpu,cpuacct/docker/a/b", 100_000, version=1)
    assert quota_cpus(tmp_path) == 2


@pytest.mark.parametrize(("top", "path"), [("/docker/a", "/docker/ab"), ("/", "/../../other"), ("/docker/a", "/")])
def test_a_mount_that_the_process_is_not_in_says_nothing(top: str, path: str, tmp_path: Path) -> None:
    machine(tmp_path / "machine", f"0::{path}\n", v2(top=top))
    for folder in ("machine/sys/fs/cgroup", "machine/sys/fs/other", "machine/sys/other", "machine/sys/fs/cgroup/b"):
        limit(tmp_path, folder, 100_000)
    assert quota_cpus(tmp_path / "machine") is None


def test_both_versions_at_once(tmp_path: Path) -> None:
    machine(tmp_path, "1:cpu:/a\n0::/b\n", v1(point="/sys/fs/cgroup/cpu", options="rw,cpu"), v2(point="/sys/unified"))
    limit(tmp_path, "sys/fs/cgroup/cpu/a", 600_000, version=1)
    assert quota_cpus(tmp_path) == 6
    limit(tmp_path, "sys/unified/b", 400_000)
    assert quota_cpus(tmp_path) == 4


def test_version_1_without_its_cpu_controller_has_no_quota(tmp_path: Path) -> None:
    machine(
        tmp_path, "1:cpuset,cpuacct:/a\n2:name=cpu:/a\n", v1(options="rw,cpuset,cpuacct"), v1(options="rw,name=cpu")
    )
    limit(tmp_path, "sys/fs/cgroup/cpu,cpuacct/a", 100_000, version=1)
    assert quota_cpus(tmp_path) is None


def test_folders_with_blanks_and_colons(tmp_path: Path) -> None:
    machine(
        tmp_path, "0::/my app:1\\x2d2.slice/in side\n", v2(top="/my\\040app:1\\134x2d2.slice", point="/sys/c\\040g")
    )
    limit(tmp_path, "sys/c g/in side", 300_000)
    assert quota_cpus(tmp_path) == 3


@pytest.mark.parametrize(
    "text", ["", "max", "max max", "200000", "x 100000", "-5 100000", "1 0", "1 2 3", "\x00", "\xff"]
)
def test_a_malformed_quota_is_none(text: str, tmp_path: Path) -> None:
    machine(tmp_path, "0::/a/b\n", v2())
    limit(tmp_path, "sys/fs/cgroup/a", 300_000)
    limit(tmp_path, "sys/fs/cgroup/a/b", 100_000)
    (tmp_path / "sys/fs/cgroup/a/b/cpu.max").write_bytes(text.encode("latin-1"))
    assert quota_cpus(tmp_path) == 3


@given(cgroup=st.binary(max_size=60), mountinfo=st.binary(max_size=120))
def test_malformed_files_are_no_limit(cgroup: bytes, mountinfo: bytes) -> None:
    with TemporaryDirectory() as folder:
        root = machine(Path(folder), "0::/a\n", v2())
        limit(root, "sys/fs/cgroup/a", 300_000)
        (root / "proc/self/mountinfo").write_bytes(mountinfo)
        assert quota_cpus(root) is None
        (root / "proc/self/mountinfo").write_bytes(mountinfo + b"\n" + v2().encode())
        assert quota_cpus(root) == 3
        (root / "proc/self/cgroup").write_bytes(b"\xff" + cgroup)
        assert quota_cpus(root) in (None, 3)


@pytest.mark.parametrize(
    "broken", ["", "31", "31 23 0:28 / relative rw - cgroup2 cgroup2 rw", "31 23 0:28 / /a rw - cgroup2"]
)
def test_a_malformed_line_of_mounts_is_passed_over(broken: str, tmp_path: Path) -> None:
    machine(tmp_path, "x\n0:\n0::/a\n", broken + "\n", v2())
    limit(tmp_path, "sys/fs/cgroup/a", 300_000)
    assert quota_cpus(tmp_path) == 3


def test_a_folder_in_the_place_of_a_file_is_no_limit(tmp_path: Path) -> None:
    machine(tmp_path, "0::/a\n", v2())
    (tmp_path / "sys/fs/cgroup/a/cpu.max").mkdir(parents=True)
    assert quota_cpus(tmp_path) is None


@pytest.mark.parametrize(("quota", "cpus"), [(None, 3), (5, 3), (2, 2)])
def test_threads_are_the_least_of_affinity_and_quota(
    quota: int | None, cpus: int, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 7}, raising=False)
    monkeypatch.setattr("adavit.cpus.quota_cpus", lambda: quota)
    assert usable_cpus() == cpus
    assert adavit.load(tiny_bundle, parallel="samples").options.threads == cpus


def test_where_there_is_no_affinity_all_cpus_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adavit.cpus.quota_cpus", lambda: None)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert usable_cpus() == 1
