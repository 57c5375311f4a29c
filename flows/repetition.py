"""Warnings that a command would repeat: arguments are checked before, in and between the stages of a run."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def said_once(*loggers: str) -> Iterator[None]:
    """Let each of these loggers say the same thing once only."""
    told: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        is_first = message not in told
        told.add(message)
        return is_first

    for name in loggers:
        logging.getLogger(name).addFilter(is_new)
    try:
        yield
    finally:
        for name in loggers:
            logging.getLogger(name).removeFilter(is_new)
