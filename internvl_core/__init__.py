"""The trainer: everything that knows torch, and nothing that knows Prefect."""

__version__ = "0.1.0"
