"""Parts on the wire: given on in order, hashed as they were sent, and never more than the slots in memory."""

import hashlib
import os
import random
import threading
import time
from pathlib import Path

import pytest

from internvl_core.checkpoint.manifest import FileEntry
from internvl_core.checkpoint.part_pool import PART_BYTES, SLOTS, PartPool, choose_part_bytes


class Wire:
    """Counts the parts that are on it at a time."""

    def __init__(self) -> None:
        self.parts: dict[int, bytes] = {}
        self.most = 0
        self._now = 0
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        with self._lock:
            self._now += 1
            self.most = max(self.most, self._now)

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._now -= 1

    def send(self, number: int, body: bytes) -> None:
        with self:
            time.sleep(random.random() / 500)
            self.parts[number] = body


@pytest.mark.parametrize("num_bytes", [0, 1, 9, 10, 11, 995, 1000])
def test_what_is_hashed_is_what_is_sent(tmp_path: Path, num_bytes: int) -> None:
    body, wire = os.urandom(num_bytes), Wire()
    (tmp_path / "file").write_bytes(body)
    with PartPool() as pool:
        assert pool.send(tmp_path / "file", wire.send, part_bytes=10) == (num_bytes, hashlib.sha256(body).hexdigest())
    assert b"".join(wire.parts[number] for number in sorted(wire.parts)) == body
    assert sorted(wire.parts) == list(range(1, max(1, -(-num_bytes // 10)) + 1))


def test_parts_are_read_side_by_side_and_given_on_in_order() -> None:
    body, wire = os.urandom(5000), Wire()

    def read(start: int, stop: int) -> bytes:
        with wire:
            time.sleep(random.random() / 100)
            return body[start:stop]

    with PartPool() as pool:
        ranges = [(start, start + 100) for start in range(0, 5000, 100)]
        assert b"".join(pool.iter_parts(read, ranges)) == body
    assert 1 < wire.most <= SLOTS


def test_many_files_share_the_slots_and_none_waits_for_ever(tmp_path: Path) -> None:
    wire = Wire()

    def read(start: int, stop: int) -> bytes:
        with wire:
            time.sleep(0.001)
            return bytes(stop - start)

    with PartPool() as pool:

        def transfer(path: str) -> FileEntry:
            parts = pool.iter_parts(read, [(start, start + 1) for start in range(25)])
            return FileEntry(path, sum(len(part) for part in parts), "")

        entries = pool.run(transfer, [str(number) for number in range(3 * SLOTS)])
    assert [entry.size_bytes for entry in entries] == [25] * (3 * SLOTS)
    assert wire.most <= SLOTS


def test_a_part_that_fails_ends_its_file_and_gives_its_slot_back(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(1000))
    sent = []

    def send(number: int, body: bytes) -> None:
        sent.append(number)
        if number == 3:
            raise ConnectionError("reset")

    with PartPool() as pool:
        for _ in range(2 * SLOTS):
            with pytest.raises(ConnectionError, match="reset"):
                pool.send(tmp_path / "file", send, part_bytes=10)
            with pytest.raises(ZeroDivisionError):
                list(
                    pool.iter_parts(
                        lambda start, stop: bytes(abs(1 // (start - 30))), [(at, at) for at in range(0, 90, 10)]
                    )
                )
        assert pool.send(tmp_path / "file", lambda number, body: None, part_bytes=100)[0] == 1000


def test_a_file_never_has_more_parts_than_s3_takes() -> None:
    assert choose_part_bytes(100) == PART_BYTES
    huge = 1 << 40
    assert -(-huge // choose_part_bytes(huge)) <= 10_000
