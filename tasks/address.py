"""Addresses as people may see them."""

import re


def hide_password(text: str) -> str:
    """Take user, password and query out of every address in a text; rather too much than too little."""
    return re.sub(r"(?<=://)([^\s?#]*)[?#]\S*", r"\1", re.sub(r"(?<=://)\S*@", "", text))
