"""Looking at data before anybody trains on it: `python -m internvl_core.inspection lint|show FOLDER`.

Started by the task `index data` and by `internvl data`, in a process of its own.
"""
