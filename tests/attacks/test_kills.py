"""Commands killed at random moments leave nothing half-written under a final name, and then succeed.

Half of the moments are spread over the time of a run, half over its operations on files (open, rename, remove, ...), so
that the short phase of writing gets its share.
"""

import multiprocessing
import os
import random
import signal
import sys
import time
from contextlib import suppress

import pytest

KILLS = int(os.environ.get("RVQA_KILLS", "4"))
"""Kills of each command."""

EVENTS = {"open", "os.chmod", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "shutil.copyfile", "shutil.rmtree"}


def command(arguments, last, said):
    """Run a command in this process, which kills itself at an operation on files or reports their number."""
    from rvqa import cli

    count = 0

    def hook(event, _):
        nonlocal count
        if event in EVENTS:
            count += 1
            if count == last:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.argv = ["rvqa", *map(str, arguments)]
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    said.send("ready")
    sys.addaudithook(hook)
    try:
        cli.main()
    except SystemExit as end:
        if end.code:
            raise
    said.send(count)


@pytest.fixture(scope="module")
def processes():
    """New processes with all modules loaded."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["zarr", "rvqa.cli", "rvqa.annotation", "rvqa.training.fit", "rvqa.atlas.run"])
    return context


def run(processes, arguments, *, after=None, last=None):
    """Run a command, killed after some seconds or at an operation; return exit code, operations, seconds."""
    said, send = processes.Pipe(duplex=False)
    child = processes.Process(target=command, args=(arguments, last, send))
    child.start()
    send.close()
    assert said.recv() == "ready"
    start, count = time.perf_counter(), 0
    if after is not None:
        child.join(after)
        child.kill()
    with suppress(EOFError):  # of a killed command
        count = said.recv()
    child.join()
    return child.exitcode, count, time.perf_counter() - start


def contents(path):
    """Return the files of an output, without times."""
    files = [path] if path.is_file() else sorted(each for each in path.rglob("*") if each.is_file())
    return {each.relative_to(path).as_posix(): each.read_bytes() for each in files}


def arguments_of(name, folder, model_path, out):
    """Return the command that writes an output."""
    depth = ["--library-size-key", "depth", "--quiet"]
    if name == "fit":
        return ["fit", folder / "cells.h5ad", "-o", out, "--labels", "label", "--steps", "2", *depth]
    kind = name.partition(".")[0]
    chosen = ["--labels", "Dendritic,CD14+ Monocyte"] if kind == "annotate" else []
    return [kind, folder / "cells.h5ad", "-m", model_path, "-o", out, *chosen, *depth]


@pytest.mark.parametrize("name", ["encode.rvq", "encode.zarr", "encode.parquet", "encode.h5ad", "annotate.h5ad", "fit"])
def test_killed(name, shipped, model, model_path, processes, tmp_path):
    cells = next(iter(shipped.tests.values()))
    cells[:60].copy().write_h5ad(tmp_path / "cells.h5ad")
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    given = arguments_of(name, tmp_path, model_path, tmp_path / "whole" / name)
    if "--labels" in given and name != "fit":
        given[given.index("--labels") + 1] = ",".join(model.card.labels[:2])
    code, operations, seconds = run(processes, given)
    assert code == 0
    whole = contents(tmp_path / "whole" / name)
    rng, out = random.Random(name), tmp_path / "killed" / name
    again = [out if each == tmp_path / "whole" / name else each for each in given]
    killed = 0
    for number in range(KILLS):
        share = (number // 2 + rng.random()) / (KILLS / 2)
        moment = {"last": 1 + int(share * operations)} if number % 2 else {"after": share * seconds}
        code, *_ = run(processes, [*again, "--force"], **moment)
        assert code in (0, -signal.SIGKILL)
        killed += code != 0
        if out.exists():
            assert contents(out) == whole, moment
        if number % 2 or number == KILLS - 1:  # or the next run would continue it
            code, *_ = run(processes, [*again, "--force"])
            assert code == 0
            assert contents(out) == whole, moment
            assert os.listdir(out.parent) == [name], moment
    assert killed >= KILLS // 2
