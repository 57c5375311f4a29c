"""A rank without a supervisor."""

from internvl_core.contract import SUPERVISOR_SOCKET_VARIABLE
from internvl_core.supervision.progress import Phase
from internvl_core.train.supervisor_link import SupervisorLink


def test_under_a_bare_torchrun_nothing_ever_asks_for_a_stop(monkeypatch):
    monkeypatch.delenv(SUPERVISOR_SOCKET_VARIABLE, raising=False)
    link = SupervisorLink.connect()
    link.tell(Phase.STEP, 1)
    link.leave()
    assert not link.is_set
