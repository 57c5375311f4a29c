"""Small records that check themselves."""

import hashlib

import pytest

from internvl_core.checkpoint.record import pack_record, unpack_record
from internvl_core.errors import CheckpointCorrupt


def test_a_record_is_read_back() -> None:
    assert unpack_record(pack_record({"b": 1, "a": [None, "x"]}), where="here") == {"a": [None, "x"], "b": 1}


def test_equal_content_gives_equal_bytes() -> None:
    assert pack_record({"a": 1, "b": 2}) == pack_record({"b": 2, "a": 1})


def test_any_byte_that_differs_is_seen() -> None:
    record = pack_record({"step": 1})
    for at in range(len(record)):
        damaged = record[:at] + bytes([record[at] ^ 1]) + record[at + 1 :]
        with pytest.raises(CheckpointCorrupt, match="here: damaged record"):
            unpack_record(damaged, where="here")


@pytest.mark.parametrize("size", range(len(pack_record({"step": 1}))))
def test_a_torn_record_is_seen(size: int) -> None:
    with pytest.raises(CheckpointCorrupt, match="here: damaged record"):
        unpack_record(pack_record({"step": 1})[:size], where="here")


@pytest.mark.parametrize(("body", "message"), [(b"{", "the record is not JSON"), (b"[1]", "the record is a list")])
def test_a_whole_record_of_something_else_is_refused(body: bytes, message: str) -> None:
    record = hashlib.sha256(body).hexdigest().encode() + b"\n" + body
    with pytest.raises(CheckpointCorrupt, match=message):
        unpack_record(record, where="here")
