"""Runs thousands of hostile cases in a separate process. It names a case that crashes the process, hangs it, fills its
memory or ends in anything but one of our errors.

A case is a function `case(number, folder)` in a test file: it makes its input from `number` alone, in an empty folder,
and uses it as a user would. It may return, or raise `InputError` or `EngineError`.
"""

import faulthandler
import gc
import importlib
import json
import os
import random
import shutil
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

CASES = int(os.environ.get("RVQA_FUZZ_CASES", "50"))
"""Cases of each kind: few beside the other tests; CI runs 1,000 of most, `make fuzz` 10,000."""

SECONDS = 60
"""Longest that a case may take; most take milliseconds."""


def survive(case: Callable[[int, Path], object], folder: Path, *, cases: int = CASES, grows: int = 512) -> None:
    """Run a case for each number below `cases`.

    Parameters
    ----------
    case
        Function of a test file.
    folder
        Folder for the files of the cases.
    cases
        Number of cases.
    grows
        Most MiB by which memory may exceed that of the first ten cases.
    """
    at = f"{case.__module__.split('tests.')[-1]}:{case.__name__}"
    command = [sys.executable, "-m", "tests.attacks.cases", at, "0", str(cases), str(folder), str(grows)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    told = folder / "at.json"
    last = json.loads(told.read_text()) if told.exists() else "none"
    assert done.returncode == 0, f"case {last} of {at} ended with {done.returncode}:\n{done.stderr[-3000:]}"


def mutated(data: bytes, number: int) -> bytes:
    """Return the bytes with some altered, a stretch cut, doubled or zeroed, or an integer overwritten."""
    rng = random.Random(number)
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        place = rng.randrange(len(changed)) if changed else 0
        width = rng.choice((1, 2, 4, 8))
        how = rng.randrange(7)
        if how == 0:
            changed[place : place + 1] = bytes([rng.randrange(256)])
        elif how == 1 and changed:
            changed[place] ^= 1 << rng.randrange(8)
        elif how == 2:
            value = rng.choice((0, 1, 2**7, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1))
            changed[place : place + width] = (value % 2 ** (8 * width)).to_bytes(width, "little")
        elif how == 3:
            del changed[place:]
        elif how == 4:
            del changed[place : place + rng.choice((1, 8, 100))]
        elif how == 5:
            changed[place:place] = changed[place : place + rng.choice((1, 8, 100))]
        else:
            stretch = changed[place : place + rng.choice((8, 64, 512))]
            changed[place : place + len(stretch)] = bytes(len(stretch))
    return bytes(changed)


def _memory() -> int:
    """Return the peak memory of this process in MiB; `getrusage` would include that of its parent."""
    held = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(held.split()[1]) // 1024


def _main(at: str, first: int, cases: int, folder: Path, grows: int) -> None:
    from rvqa.errors import EngineError, InputError

    module, name = at.split(":")
    case = getattr(importlib.import_module(f"tests.{module}"), name)
    warnings.simplefilter("ignore")
    told, base = folder / "at.json", 0
    for number in range(first, cases):
        told.write_text(json.dumps(number))
        place = folder / "case"
        place.mkdir()
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        try:
            case(number, place)
        except (InputError, EngineError) as error:
            if "\n" in str(error) or len(str(error)) > 2000:
                sys.exit(f"case {number}: the error is not a sentence:\n{error}")
        except BaseException:
            sys.exit(f"case {number}:\n{traceback.format_exc()}")
        faulthandler.cancel_dump_traceback_later()
        if number < first + 10:
            base = _memory()
        elif _memory() > base + grows:
            sys.exit(f"case {number}: memory grew from {base} to {_memory()} MiB")
        shutil.rmtree(place)
        if not number % 100:
            gc.collect()


if __name__ == "__main__":
    faulthandler.enable()
    _main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]), int(sys.argv[5]))
