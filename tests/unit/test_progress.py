"""The lines between a rank and its supervisor."""

import pytest

from internvl_core.supervision.progress import Kind, Message, Phase


@pytest.mark.parametrize(
    "message",
    [Message(Kind.PROGRESS, 3, Phase.STEP, 12), Message(Kind.SIGNAL, 0, text="SIGTERM"), Message(Kind.LEAVE, 1)],
)
def test_a_line_is_read_as_it_was_written(message):
    line = message.to_line()
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert Message.from_line(line) == message


@pytest.mark.parametrize("line", [b"", b"stop", b"{}", b"[]", b"\xff", b'{"kind": "dance", "rank": 0}', b"3"])
def test_what_is_no_line_of_a_rank_is_refused(line):
    with pytest.raises(ValueError):
        Message.from_line(line)
