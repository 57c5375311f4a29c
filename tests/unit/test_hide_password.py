"""Addresses in messages: what a password could be in is left out."""

import pytest

from tasks.address import hide_password


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("http://admin:pa55@host:5000/x", "http://host:5000/x"),
        ("http://admin:p@5s@host", "http://host"),
        ("http://admin:pa/55@host/x", "http://host/x"),
        ("at https://host/x?token=pa55 and http://a:b@c", "at https://host/x and http://c"),
        ("http://host/#/experiments/1", "http://host/"),
        ("sqlite:////runs/mlflow.db", "sqlite:////runs/mlflow.db"),
        ("mail@host, no address", "mail@host, no address"),
    ],
)
def test_user_password_and_query_are_left_out(text: str, hidden: str) -> None:
    assert hide_password(text) == hidden
