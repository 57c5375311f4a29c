"""The supervisor's side of the socket."""

import os
import socket
from collections.abc import Iterator

import pytest

from internvl_core.supervision.progress import STOP, Kind, Message
from internvl_core.supervision.ranks import Ranks


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    ranks = Ranks()
    yield ranks
    ranks.close()


def connect(ranks: Ranks) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.connect("\0" + ranks.name)
    return connection


def test_a_line_in_two_pieces_is_one_message(ranks):
    with connect(ranks) as connection:
        line = Message(Kind.PROGRESS, 3, step=12).to_line()
        connection.sendall(line[:9])
        assert ranks.read() == []
        connection.sendall(line[9:] + line)
        assert ranks.read() == [Message(Kind.PROGRESS, 3, step=12)] * 2
        assert ranks.pids == {3: os.getpid()}


def test_a_rank_that_goes_without_a_word_is_lost_and_one_that_says_goodbye_is_not(ranks):
    for rank, kinds in ((0, [Kind.PROGRESS, Kind.LEAVE]), (2, [Kind.PROGRESS]), (1, [Kind.PROGRESS])):
        with connect(ranks) as connection:
            for kind in kinds:
                connection.sendall(Message(kind, rank).to_line())
            ranks.read()
            assert ranks.lost == (2 if rank == 1 else None)
        ranks.read()
    # The first one.
    assert ranks.lost == 2
    assert ranks.has_leaver
    assert ranks.pids == {}


def test_what_is_no_line_of_a_rank_harms_nobody(ranks):
    with connect(ranks) as connection:
        connection.sendall(b"GET / HTTP/1.1\n\xff\n" + Message(Kind.SIGNAL, 1, text="SIGTERM").to_line())
        assert [message.text for message in ranks.read()] == ["SIGTERM"]


def test_a_stop_is_told_to_all_and_to_those_that_come_later(ranks):
    with connect(ranks) as first:
        ranks.read()
        assert ranks.stop() == 1
        with connect(ranks) as second:
            ranks.read()
            assert first.recv(64) == second.recv(64) == STOP
