"""Encoding of files of any size: out of core, resumable, on several machines; `run.py` is the loop."""
