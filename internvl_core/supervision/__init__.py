"""One process above a run's processes: it owns them, stops them, tells hung from slow, and says what ended them.

Started by `tasks/launch.py` as `python -m internvl_core.supervision.supervisor`; it and all here import no torch.
"""
