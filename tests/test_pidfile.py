"""The file with the daemon's process id: whose it is, when it is written, and when it goes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cowferry.cli.pidfile import Pidfile
from cowferry.errors import CowferryError
from daemons import program


def test_it_says_the_process_id_once_everything_is_up_and_goes_with_the_daemon(
    tmp_path: Path,
) -> None:
    image, file = tmp_path / "a.raw", tmp_path / "pid"
    image.write_bytes(bytes(4096))
    with program(tmp_path / "run", str(image), "--pidfile", str(file)) as (child, line):
        assert line().startswith("a: ")
        assert int(file.read_text()) == child.pid
        with pytest.raises(CowferryError, match=f"a daemon that runs: process {child.pid}"):
            Pidfile(str(file))
        assert int(file.read_text()) == child.pid
    assert not file.exists()


def test_a_file_that_is_no_pidfile_is_left_alone(tmp_path: Path) -> None:
    letter, fifo = tmp_path / "letter", tmp_path / "fifo"
    letter.write_text("Dear Ada\n")
    os.mkfifo(fifo)
    for path in (letter, fifo, tmp_path, tmp_path / "nowhere" / "pid"):
        with pytest.raises(CowferryError, match=str(path)):
            Pidfile(str(path))
    assert letter.read_text() == "Dear Ada\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fifo", "letter"]


def test_a_start_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    Pidfile(str(path)).drop()
    assert not path.exists(), "it was made, and stays"
    path.write_text("12345\n")  # of a daemon that was killed
    Pidfile(str(path)).drop()
    assert path.read_text() == "12345\n"
    file = Pidfile(str(path))
    file.write()
    assert int(path.read_text()) == os.getpid()
    file.drop()
    file.drop()
    assert not path.exists()


def test_a_file_that_another_daemon_has_put_in_its_place_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    file = Pidfile(str(path))
    file.write()
    path.unlink()
    path.write_text("1\n")
    file.drop()
    assert path.read_text() == "1\n"
