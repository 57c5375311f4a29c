"""The API of a Prefect server, asked without importing Prefect, which takes seconds."""

import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import httpx

from internvl_core.errors import ArgumentError, InternVLError
from tasks.address import hide_password

AUTH_VARIABLE = "PREFECT_API_AUTH_STRING"
_LOOPBACK = re.compile(r"https?://([^/@]*@)?(127\.0\.0\.1|localhost|\[::1\])[:/]")
_WAITS_S = (0.2, 0.5, 1.0, 2.0)
"""Before further tries."""
_TIMEOUT_S = 30


class PrefectApi:
    """Asks one server; every method raises ArgumentError if it does not answer or wants a password.

    InternVLError says that it refuses.
    """

    def __init__(self, api_url: str, environment: Mapping[str, str] | None = None) -> None:
        """Ask nothing yet.

        Args:
            api_url: of the server, ending in /api.
            environment: with the server's user and password, if it has any.
        """
        self._api_url = api_url
        user, separator, password = (environment or {}).get(AUTH_VARIABLE, "").partition(":")
        self._auth = (user, password) if separator else None
        # A proxy is for the world outside.
        self._heeds_proxies = not _LOOPBACK.match(api_url)

    def check(self) -> None:
        """Raise ArgumentError if what answers there is no Prefect server's API."""
        answer = self._ask("GET", "admin/version", None)
        # A page of its UI answers too.
        if answer.status_code == httpx.codes.NOT_FOUND or (answer.is_success and not _is_json(answer)):
            raise ArgumentError(
                f"{hide_password(self._api_url)} is no API of a Prefect server. Give its address, which ends in /api."
            )
        self._check(answer)

    def find(self, path: str) -> dict[str, Any] | None:
        """Get an object; None: the server has none there."""
        answer = self._ask("GET", path, None)
        if answer.status_code == httpx.codes.NOT_FOUND:
            return None
        found: dict[str, Any] = self._check(answer).json()
        return found

    def list(self, path: str, wanted: Mapping[str, Any]) -> list[dict[str, Any]]:
        """List what a filter lets through."""
        found: list[dict[str, Any]] = self._check(self._ask("POST", f"{path}/filter", wanted)).json()
        return found

    def send(self, method: str, path: str, content: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
        """Have something changed."""
        self._check(self._ask(method, path, content))

    def _ask(self, method: str, path: str, content: object) -> httpx.Response:
        """Ask again while the server is busy: on SQLite it turns away one of two that write at once, with 503."""
        with httpx.Client(auth=self._auth, timeout=_TIMEOUT_S, trust_env=self._heeds_proxies) as client:
            for wait_s in (*_WAITS_S, None):
                try:
                    answer = client.request(method, f"{self._api_url}/{path}", json=content)
                except (httpx.TransportError, httpx.InvalidURL) as error:
                    if wait_s is None or isinstance(error, httpx.InvalidURL | httpx.UnsupportedProtocol):
                        where = hide_password(self._api_url)
                        raise ArgumentError(
                            f"{where} does not answer ({error}). Start the Prefect server, or correct PREFECT_API_URL."
                        ) from error
                else:
                    if wait_s is None or answer.status_code != httpx.codes.SERVICE_UNAVAILABLE:
                        return answer
                time.sleep(wait_s)
        raise AssertionError("the last try returns or raises")

    def _check(self, answer: httpx.Response) -> httpx.Response:
        try:
            return answer.raise_for_status()
        except httpx.HTTPStatusError as error:
            where = hide_password(self._api_url)
            if answer.status_code == httpx.codes.UNAUTHORIZED:
                raise ArgumentError(f"{where} wants a password: set {AUTH_VARIABLE} to user:password.") from error
            told = f"{answer.status_code} {answer.reason_phrase}"
            asked = f"{answer.request.method} {answer.request.url.path}"
            raise InternVLError(f"{where} does not take {asked}: {told}.") from error


def _is_json(answer: httpx.Response) -> bool:
    try:
        answer.json()
    except ValueError:
        return False
    return True
