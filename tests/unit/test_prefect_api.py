"""Asking Prefect's API: further tries, the password, and one line for whatever is wrong."""

import base64
from collections.abc import Iterator

import pytest
from api_server import ApiServer, serve_api

from flows import prefect_api
from flows.prefect_api import AUTH_VARIABLE, PrefectApi
from internvl_core.errors import ArgumentError, InternVLError


@pytest.fixture
def server() -> Iterator[ApiServer]:
    with serve_api() as server:
        yield server


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefect_api, "_WAITS_S", (0.01, 0.01))


def test_a_busy_server_is_asked_again(server: ApiServer) -> None:
    server.answers = {"/api/things/filter": (200, [{"id": 1}])}
    server.busy = 2
    assert PrefectApi(f"{server.url}/api").list("things", {"name": "x"}) == [{"id": 1}]
    assert server.asked == ["POST /api/things/filter"] * 3
    assert server.contents == [{"name": "x"}] * 3


def test_a_server_that_stays_busy_is_said(server: ApiServer) -> None:
    server.busy = 9
    with pytest.raises(InternVLError, match=r"does not take PATCH /api/things/1: 503 Service Unavailable\.$"):
        PrefectApi(f"{server.url}/api").send("PATCH", "things/1", {})
    assert len(server.asked) == 3


def test_what_is_not_there_is_none(server: ApiServer) -> None:
    assert PrefectApi(f"{server.url}/api").find("things/1") is None


def test_the_password_of_the_environment_is_sent(server: ApiServer) -> None:
    server.answers = {"/api/things/1": (200, {})}
    PrefectApi(f"{server.url}/api", {AUTH_VARIABLE: "admin:a:b"}).find("things/1")
    assert server.logins == [f"Basic {base64.b64encode(b'admin:a:b').decode()}"]


def test_a_wanted_password_is_said(server: ApiServer) -> None:
    server.answers = {"/api/admin/version": (401, {})}
    with pytest.raises(ArgumentError, match=r"wants a password: set PREFECT_API_AUTH_STRING to user:password\.$"):
        PrefectApi(f"{server.url}/api").check()


@pytest.mark.parametrize(
    "address", ["http://127.0.0.1:1/api", "http://127.0.0.1:abc/api", "http://[::1/api", "127.0.0.1/api", "ftp://a/api"]
)
def test_an_address_where_nobody_answers_is_said(address: str) -> None:
    with pytest.raises(ArgumentError, match=r"does not answer \(.*\)\. Start the Prefect server, or correct"):
        PrefectApi(address).check()


def test_an_address_without_api_is_said(server: ApiServer) -> None:
    with pytest.raises(ArgumentError, match=r"is no API of a Prefect server\. Give its address, which ends in /api\.$"):
        PrefectApi(server.url).check()
