"""Files and folders appear whole or not at all, whatever happens while they are written."""

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from cases import python

from adavit.files import find_folder, folder_beside, write_beside
from adavit.reading import open_regular, read_regular


class Stopped(BaseException):
    """Stands for an error, or for Ctrl-C."""


def host() -> str:
    """How the names of what this process writes tell its host."""
    with TemporaryDirectory() as place, suppress(Stopped), folder_beside(Path(place, "a")) as folder:
        found = folder.name.split(".")[-3]
        raise Stopped
    return found


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write(path: Path, content: str) -> None:
    with folder_beside(path) as folder:
        (folder / "content").write_text(content)


def test_a_file_appears_whole(tmp_path: Path) -> None:
    with write_beside(tmp_path / "a") as file:
        file.write(b"half")
        file.flush()
        assert not (tmp_path / "a").exists()
    assert (tmp_path / "a").read_bytes() == b"half"
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o644


def test_a_file_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with pytest.raises(Stopped), write_beside(tmp_path / "a") as file:
        file.write(b"half")
        raise Stopped
    assert (tmp_path / "a").read_text() == "old"
    assert names(tmp_path) == ["a"]


def test_a_pipe_is_written_to_and_stays_one(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit((tmp_path / "pipe").read_bytes)
        with write_beside(tmp_path / "pipe") as file:
            file.write(b"all")
        assert found.result(30) == b"all"
    assert (tmp_path / "pipe").is_fifo()


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    for path, why in ((tmp_path, "is a folder; name a file"), (tmp_path / "no" / "a", "no such folder to write into")):
        with pytest.raises(OSError, match=why) as found, write_beside(path):
            pass
        assert found.value.filename == str(path)


def test_errors_name_what_is_written_and_no_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(old: object, new: object) -> None:
        raise OSError(errno.ENOSPC, "full", str(old))

    monkeypatch.setattr(os, "replace", full)
    monkeypatch.setattr(os, "rename", full)
    for write in (write_beside, folder_beside):
        with pytest.raises(OSError, match="full") as found, write(tmp_path / "a"):
            pass
        assert found.value.filename == str(tmp_path / "a")


def test_what_a_killed_writer_left_is_swept_up_and_nothing_else(tmp_path: Path) -> None:
    code = "import os, sys; from pathlib import Path; from adavit.files import write_beside\n"
    code += "with write_beside(Path(sys.argv[1])): os.kill(os.getpid(), 9)"
    assert python(code, tmp_path / "a").returncode == -9
    (left,) = names(tmp_path)
    assert left.startswith(".a.")
    with write_beside(tmp_path / "b"):
        pass
    with write_beside(tmp_path / "a"), write_beside(tmp_path / "a"):  # another writer that lives
        assert left not in names(tmp_path)
        assert len(names(tmp_path)) == 3
    assert names(tmp_path) == ["a", "b"]


def test_a_folder_appears_whole_and_replaces_the_old_one(tmp_path: Path) -> None:
    for content in ("old", "new"):
        with folder_beside(tmp_path / "a") as folder:
            (folder / content).touch()
            assert names(tmp_path / "a") == ["old"] if content == "new" else not (tmp_path / "a").exists()
        assert names(tmp_path) == ["a"]
        assert names(tmp_path / "a") == [content]


def test_a_folder_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    write(tmp_path / "a", "old")
    with pytest.raises(Stopped), folder_beside(tmp_path / "a") as folder:
        (folder / "content").write_text("half")
        raise Stopped
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a" / "content").read_text() == "old"


def test_a_failure_between_the_renames_puts_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "a", "old")
    rename, calls = os.rename, []

    def second_fails(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise OSError("no")
        rename(source, target)

    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(OSError, match="no"):
        write(tmp_path / "a", "new")
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a" / "content").read_text() == "old"


KILLED = """
import os, signal, sys
from pathlib import Path
from adavit.files import folder_beside

path, when, number = sys.argv[1:]
rename, calls = os.rename, []

def rename_or_die(source, target):
    calls.append(target)
    for moment in ("before", "after"):
        if (moment, len(calls)) == (when, int(number)):
            os.kill(os.getpid(), signal.SIGKILL)
        if moment == "before":
            rename(source, target)

os.rename = rename_or_die
with folder_beside(Path(path)) as folder:
    (folder / "content").write_text("new")
"""


@pytest.mark.parametrize(
    ("when", "number", "left", "found"),
    [("before", 1, "old", "old"), ("before", 2, None, "old"), ("after", 2, "new", "new")],
)
def test_a_kill_at_any_rename_leaves_the_old_folder_or_none(
    when: str, number: int, left: str | None, found: str, tmp_path: Path
) -> None:
    path = tmp_path / "a"
    write(path, "old")
    assert python(KILLED, path, when, number).returncode == -9
    assert ((path / "content").read_text() if path.exists() else None) == left
    with pytest.raises(Stopped), folder_beside(path):
        assert (path / "content").read_text() == found  # put back, where it was aside
        raise Stopped
    assert names(tmp_path) == ["a"]
    write(path, "newer")
    assert (path / "content").read_text() == "newer"
    assert names(tmp_path) == ["a"]


def test_what_a_living_process_writes_is_left_alone(tmp_path: Path) -> None:
    other = tmp_path / f".a.00000000.{host()}.{os.getppid()}.tmp"
    other.mkdir()
    write(tmp_path / "a", "new")
    assert other.is_dir()


ELSEWHERE = """
import os, platform, sys
from pathlib import Path
from adavit.files import folder_beside
module, name = sys.argv[2].split(".")
setattr({"os": os, "platform": platform}[module], name, lambda *_: sys.argv[3])
with folder_beside(Path(sys.argv[1])):
    os._exit(1)
"""


@pytest.mark.parametrize(("attribute", "value"), [("platform.node", "other"), ("os.readlink", "pid:[1]")])
def test_what_another_host_or_container_writes_is_left_alone(attribute: str, value: str, tmp_path: Path) -> None:
    (tmp_path / f".a.00000000.{host()}.999999999.tmp").mkdir()
    elsewhere = python(ELSEWHERE, tmp_path / "a", attribute, value)
    (theirs,) = (name for name in names(tmp_path) if host() not in name)
    assert elsewhere.returncode != 0
    write(tmp_path / "a", "new")
    assert names(tmp_path) == [theirs, "a"]


def test_a_folder_that_a_killed_replacement_left_aside_is_found(tmp_path: Path) -> None:
    write(tmp_path / "a", "old")
    assert python(KILLED, tmp_path / "a", "before", 2).returncode == -9
    assert not (tmp_path / "a").exists()
    (tmp_path / "link").symlink_to("a")
    assert (find_folder(tmp_path / "link") / "content").read_text() == "old"
    assert (tmp_path / "a" / "content").read_text() == "old"
    assert find_folder(tmp_path / "nothing") == tmp_path / "nothing"


def test_a_folder_aside_is_found_where_it_cannot_be_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a", "old")
    assert python(KILLED, tmp_path / "a", "before", 2).returncode == -9

    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "rename", refuse)
    assert (find_folder(tmp_path / "a") / "content").read_text() == "old"


def test_a_living_replacement_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a", "old")
    found, rename = [], os.rename

    def look_after_first(source: Path, target: Path) -> None:
        rename(source, target)
        if len(found) == 0:
            found.append(pool.submit(find_folder, tmp_path / "a"))

    monkeypatch.setattr(os, "rename", look_after_first)
    with ThreadPoolExecutor(1) as pool:
        write(tmp_path / "a", "new")
        assert (found[0].result(30) / "content").read_text() == "new"
    assert names(tmp_path) == ["a"]


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    (tmp_path / "link").symlink_to("a")
    assert read_regular(tmp_path / "link", 5) == b"12345"
    with pytest.raises(OSError, match="larger than 4 bytes"):
        read_regular(tmp_path / "a", 4)
    os.mkfifo(tmp_path / "pipe")
    for path, why in (
        (tmp_path / "pipe", "is not a regular file"),
        (tmp_path, "is a folder"),
        ("/dev/null", "regular"),
    ):
        with pytest.raises(OSError, match=why):
            open_regular(path)
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "nothing")
    with pytest.raises(ValueError, match="null"):
        open_regular("a\0b")


@pytest.mark.parametrize("name", [".a.old", ".a.b.old", ".a.thesis.12345678.77.old", ".a.tmp", ".a.b.tmp"])
def test_what_others_named_alike_is_theirs(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis").touch()
    assert find_folder(tmp_path / "a") == tmp_path / "a"
    assert not (tmp_path / "a").exists()
    for content in ("old", "new"):
        write(tmp_path / "a", content)
    assert (tmp_path / name / "thesis").exists()


def test_what_an_earlier_process_of_this_number_left_is_swept_up(tmp_path: Path) -> None:
    (tmp_path / f".a.00000000.{host()}.{os.getpid()}.tmp").mkdir()
    with folder_beside(tmp_path / "a"), folder_beside(tmp_path / "a"):  # two at once in this process
        assert len(names(tmp_path)) == 2
    assert names(tmp_path) == ["a"]


def test_a_folder_that_is_put_back_between_the_renames_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "a", "old")
    rename, put_back = os.rename, []

    def meddle(source: Path, target: Path) -> None:
        rename(source, target)
        if len(put_back) < 3:
            put_back.append(target)
            rename(target, source)

    monkeypatch.setattr(os, "rename", meddle)
    write(tmp_path / "a", "new")
    assert len(put_back) == 3
    assert (tmp_path / "a" / "content").read_text() == "new"
    assert names(tmp_path) == ["a"]
