"""The webhook: one POST, and no more than a warning when it fails."""

import logging
from collections.abc import Iterator

import pytest
from webhook import SECRET, Hook, serve_hook

from tasks.notify import VARIABLE, notify


@pytest.fixture
def hook(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hook]:
    with serve_hook() as hook:
        monkeypatch.setenv(VARIABLE, hook.url)
        yield hook


def test_the_text_and_the_rest_are_posted(hook: Hook) -> None:
    notify("digits: promoted", {"delta": 0.05, "champion": None})
    assert hook.received == [{"text": "digits: promoted", "delta": 0.05, "champion": None}]


def test_without_an_address_nothing_is_posted(hook: Hook, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE)
    notify("digits: promoted", {})
    assert hook.received == []


def test_a_hook_that_refuses_costs_a_warning_without_its_address(hook: Hook, caplog: pytest.LogCaptureFixture) -> None:
    hook.status = 500
    with caplog.at_level(logging.DEBUG):
        notify("digits: promoted", {})
    assert "the webhook answered 500" in caplog.text
    assert SECRET not in caplog.text


@pytest.mark.parametrize(
    ("url", "proxy"),
    [
        (f"http://127.0.0.1:9/{SECRET}", ""),
        (f"no address {SECRET}", ""),
        (f"http://[{SECRET}", ""),
        (f"http://host.invalid/{SECRET}", "foo://x"),
    ],
)
def test_a_hook_that_is_not_there_costs_a_warning_without_its_address(
    url: str, proxy: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(VARIABLE, url)
    monkeypatch.setenv("ALL_PROXY", proxy)
    with caplog.at_level(logging.DEBUG):
        notify("digits: promoted", {})
    assert "the webhook does not answer" in caplog.text
    assert SECRET not in caplog.text
