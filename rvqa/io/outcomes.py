"""What this process has done, for whoever says so when it is stopped."""

from pathlib import Path

written: list[Path] = []
"""Outputs that stand complete under their final names, in this process."""

resumable: list[Path] = []
"""Folders with what stopped runs had done, in this process."""
