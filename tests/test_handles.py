"""Open files: never more than allowed, never one closed under a reader, none left over."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from trees import open_files

from mde_dist.data.storage.file_handles import FileDescriptorCache


class Files:
    """A hundred small files that tell their number, and who has opened which."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.opened: list[int] = []
        for number in range(100):
            (folder / f"{number}.bin").write_bytes(b"%03d" % number)

    def open(self, number: int) -> int:
        self.opened.append(number)
        return os.open(self.folder / f"{number}.bin", os.O_RDONLY)

    def count(self) -> int:
        return len(open_files(self.folder))


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def read(handles: FileDescriptorCache, number: int) -> int:
    with handles.use(number) as file:
        return int(os.pread(file, 3, 0))


def in_threads(*work: Callable[[], None]) -> None:
    """Run all at once; what one of them raises is raised here."""
    errors: list[BaseException] = []

    def guarded(job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:  # the test has to hear of it
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(job,), daemon=True) for job in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    if errors:
        raise errors[0]


def test_each_number_has_its_own_file_which_is_opened_once(files: Files) -> None:
    handles = FileDescriptorCache(files.open, 32)
    for number in [3, 7, 3, 3, 7, 0]:
        assert read(handles, number) == number
    assert files.opened == [3, 7, 0]
    handles.close()
    assert files.count() == 0


def test_no_more_are_open_than_the_limit(files: Files) -> None:
    for limit in (1, 5, 32):
        handles = FileDescriptorCache(files.open, limit)
        for number in range(100):
            assert read(handles, number) == number
            assert files.count() == min(number + 1, limit)
        handles.close()
        assert files.count() == 0


def test_no_more_than_the_limit_are_open(files: Files) -> None:
    handles = FileDescriptorCache(files.open, 32)
    for number in range(100):
        read(handles, number)
    assert files.count() == 32
    handles.close()


def test_the_least_recently_used_is_closed_first(files: Files) -> None:
    handles = FileDescriptorCache(files.open, 3)
    for number in (1, 2, 3, 1, 4):  # 4 takes the place of 2
        read(handles, number)
    assert {Path(name).stem for name in open_files(files.folder)} == {"1", "3", "4"}
    for number in (1, 3, 4):
        read(handles, number)
    assert files.opened == [1, 2, 3, 4]
    read(handles, 2)
    assert files.opened == [1, 2, 3, 4, 2]
    assert {Path(name).stem for name in open_files(files.folder)} == {"2", "3", "4"}
    handles.close()


def test_a_file_in_use_is_not_closed_however_many_others_are_asked_for(files: Files) -> None:
    handles = FileDescriptorCache(files.open, 2)
    with handles.use(0) as file, handles.use(1) as other:
        for number in range(2, 30):
            assert read(handles, number) == number
            assert int(os.pread(file, 3, 0)) == 0
            assert int(os.pread(other, 3, 0)) == 1
        assert files.count() == 2
        with handles.use(50), handles.use(51), handles.use(52):  # more than the limit, while they are needed
            assert files.count() == 5
        assert files.count() == 2
    assert files.count() == 2
    handles.close()
    assert files.count() == 0


def test_closing_while_a_file_is_in_use_closes_it_when_its_user_has_done(files: Files) -> None:
    handles = FileDescriptorCache(files.open, 32)
    read(handles, 1)
    with handles.use(0) as file:
        handles.close()
        assert [Path(name).stem for name in open_files(files.folder)] == ["0"]
        assert int(os.pread(file, 3, 0)) == 0
    assert files.count() == 0
    handles.close()  # once more does no harm


def test_nothing_is_opened_any_more_once_closed(files: Files) -> None:
    handles = FileDescriptorCache(files.open, 32)
    read(handles, 0)
    with handles.use(1):
        handles.close()
        for number in (0, 1, 2):  # one that was open, one that still is, and a new one
            with pytest.raises(OSError, match="closed"), handles.use(number):
                pass
    assert files.count() == 0


def test_an_error_in_the_block_gives_the_file_back(files: Files) -> None:
    handles = FileDescriptorCache(files.open, 1)
    for number in range(10):
        with contextlib.suppress(KeyError), handles.use(number):
            raise KeyError
        assert files.count() == 1
    handles.close()
    assert files.count() == 0


def test_a_file_that_cannot_be_opened_is_the_callers_error_and_leaves_nothing_behind(files: Files) -> None:
    handles = FileDescriptorCache(files.open, 2)
    (files.folder / "5.bin").rename(files.folder / "away")
    for _ in range(3):
        with pytest.raises(FileNotFoundError), handles.use(5):
            pass
    (files.folder / "away").rename(files.folder / "5.bin")
    assert read(handles, 5) == 5  # the failure is not remembered
    handles.close()
    assert files.count() == 0


def test_many_threads_read_what_they_ask_for_and_leave_no_more_open_than_the_limit(files: Files) -> None:
    handles = FileDescriptorCache(files.open, 4)

    def work(seed: int) -> Callable[[], None]:
        def run() -> None:
            for number in np.random.default_rng(seed).integers(0, 12, 600).tolist():
                with handles.use(number) as file:
                    if number % 3 == 0:
                        time.sleep(0)  # let another one in
                    assert int(os.pread(file, 3, 0)) == number
                    if number == 5:
                        assert files.count() <= 4 + 6 + 6  # the limit, what six use, and what six are just opening

        return run

    in_threads(*map(work, range(6)))
    assert files.count() <= 4
    handles.close()
    assert files.count() == 0


def test_two_threads_that_open_one_number_at_once_share_one_file(files: Files) -> None:
    barrier, found = threading.Barrier(4), []

    def slowly(number: int) -> int:
        with contextlib.suppress(threading.BrokenBarrierError):
            barrier.wait(2)  # all four are opening it
        return files.open(number)

    handles = FileDescriptorCache(slowly, 32)
    done = threading.Barrier(4)

    def work() -> None:
        with handles.use(9) as file:
            done.wait(10)
            found.append(file)
            assert int(os.pread(file, 3, 0)) == 9
            assert files.count() == 1

    in_threads(*[work] * 4)
    assert Counter(found) == {found[0]: 4}
    handles.close()
    assert files.count() == 0


def test_a_slow_opening_holds_up_no_other_number(files: Files) -> None:
    opening, wake = threading.Event(), threading.Event()

    def stuck_on_zero(number: int) -> int:
        if number == 0:
            opening.set()
            assert wake.wait(20)
        return files.open(number)

    handles, served = FileDescriptorCache(stuck_on_zero, 3), []

    def slow() -> None:
        served.append(read(handles, 0))

    def quick() -> None:
        assert opening.wait(10)
        for number in (1, 2, 1, 3, 4, 5):
            served.append(read(handles, number))
        wake.set()

    in_threads(slow, quick)
    assert served == [1, 2, 1, 3, 4, 5, 0]
    handles.close()
    assert files.count() == 0


def test_closing_while_a_file_is_being_opened_leaves_none_open(files: Files) -> None:
    opening, wake = threading.Event(), threading.Event()

    def stuck(number: int) -> int:
        opening.set()
        assert wake.wait(20)
        return files.open(number)

    handles = FileDescriptorCache(stuck, 32)

    def slow() -> None:
        with pytest.raises(OSError, match="closed"), handles.use(0):
            pass

    def close() -> None:
        assert opening.wait(10)
        handles.close()
        wake.set()

    in_threads(slow, close)
    assert files.count() == 0
