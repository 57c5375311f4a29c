"""Tell somebody how a run ended: one POST to a webhook."""

import logging
import os
from collections.abc import Mapping
from typing import Any

import httpx

VARIABLE = "INTERNVL_WEBHOOK_URL"
"""Of the worker, not of the recipe: such an address is a secret."""

_TIMEOUT_S = 10

logger = logging.getLogger(__name__)


def notify(text: str, content: Mapping[str, Any]) -> None:
    """Post what happened, if the worker has an address for it; a hook that fails costs a warning without the address.

    Args:
        text: one line; the key that Slack, Mattermost and Teams show.
        content: more of it, plain JSON.
    """
    url = os.environ.get(VARIABLE)
    if not url:
        return
    # It logs each address that it asks.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        answer = httpx.post(url, json={"text": text, **content}, timeout=_TIMEOUT_S)
    except Exception as error:  # noqa: BLE001  of httpx, of proxies' and certificates' settings: what is done is done
        logger.warning("%s: the webhook does not answer (%s).", VARIABLE, type(error).__name__)
        return
    if not answer.is_success:
        logger.warning("%s: the webhook answered %d.", VARIABLE, answer.status_code)
