"""Untrusted files of replies: damaged, of another kind, or full of replies that no engine gives."""

import os
import sqlite3
import subprocess
from contextlib import closing
from functools import cache

import pytest

import rvqa
from rvqa.errors import EngineError, InputError
from rvqa.language.grammar import Rule
from rvqa.serving.asks import Ask, Reply, is_log_probability
from rvqa.serving.replies import gather
from tests.attacks.cases import mutated, survive

SCORES = [Ask((5, 6, i), answers=((8,), (9, 10))) for i in range(20)]
CELL = Ask((5, 6), rule=Rule("one_cell"), max_tokens=11)


class Fixed:
    """An engine that always gives the same reply to each ask."""

    def __init__(self, scores=(-1.0, -2.0), ids=()):
        self.scores, self.ids, self.asked = list(scores), list(ids), 0

    def replies(self, asks):
        self.asked += len(asks)
        for i, ask in enumerate(asks):
            yield i, Reply(scores=self.scores) if ask.answers else Reply(ids=self.ids)


def change(path, *statements):
    with closing(sqlite3.connect(path)) as file:
        for statement in statements:
            file.execute(*([statement] if isinstance(statement, str) else statement))
        file.commit()


@pytest.fixture
def kept(model, tmp_path):
    """Write a file with every reply of `SCORES`."""
    gather(model, Fixed(), SCORES, resume=tmp_path / "replies")
    return tmp_path / "replies"


# ---- a bad reply leaves no trace -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "ask", "match"),
    [
        (Fixed(ids=[1, 2, 3]), CELL, "is not one cell. Start the server with"),
        (Fixed(scores=[float("nan"), -1.0]), SCORES[0], "the log probability nan; expected a finite number, at most 0"),
        (Fixed(scores=[-1.0, float("-inf")]), SCORES[0], "the log probability -inf"),
        (Fixed(scores=[-1.0, 0.5]), SCORES[0], "the log probability 0.5"),
        (Fixed(scores=[-1.0]), SCORES[0], "gave 1 log probabilities for 2 answers"),
    ],
)
def test_a_bad_reply_is_not_kept(model, tmp_path, bad, ask, match):
    """Once the server is fixed, the same call succeeds."""
    for _ in range(2):
        with pytest.raises(EngineError, match=match):
            gather(model, bad, [ask], resume=tmp_path / "replies")
    good = Fixed(ids=cell_ids(model))
    gather(model, good, [ask], resume=tmp_path / "replies")
    assert good.asked == 1
    gather(model, good, [ask], resume=tmp_path / "replies")
    assert good.asked == 1


def test_rounding_above_0_is_none(model):
    assert gather(model, Fixed(scores=[1e-6, -0.0]), SCORES[:1])[0].scores == [1e-6, -0.0]


def test_an_engine_that_leaves_asks_out(model):
    class Lazy(Fixed):
        def replies(self, asks):
            return super().replies(asks[:-1])

    with pytest.raises(EngineError, match=r"left asks without a reply\. 19 of 20 replies had come"):
        gather(model, Lazy(), SCORES)


ODD_ROWS = {
    "NaN": '{"ids": [], "scores": [NaN, -1.0]}',
    "infinity": '{"ids": [], "scores": [-1e999, -1.0]}',
    "above 0": '{"ids": [], "scores": [1.0, -1.0]}',
    "too few": '{"ids": [], "scores": [-1.0]}',
    "text": '{"ids": [], "scores": ["-1", "-2"]}',
    "a text of two letters": '{"ids": [], "scores": "ab"}',
    "other keys": '{"ids": [], "scores": [-1.0, -2.0, -3.0], "other": 1}',
    "no keys": "{}",
    "a list": "[1, 2]",
    "null": "null",
    "no JSON": "{",
    "brackets": "[" * 100_000,
    "digits": '{"ids": [], "scores": [' + "9" * 5000 + ", -1]}",
    "a number": 5,
    "no Unicode": b"\xff\xfe\xfd",
    "a blob that JSON could read": b'{"ids": [], "scores": [true, -1.0]}',
    "nothing": None,
    "a text larger than any reply": "x" * (2**24 + 10),
    "a blob larger than any reply": b"x" * (2**24 + 10),
}


@pytest.mark.parametrize("row", ODD_ROWS)
def test_a_row_that_is_no_reply_is_asked_again(model, kept, row):
    change(kept, ("UPDATE replies SET reply = ? WHERE ask = (SELECT min(ask) FROM replies)", [ODD_ROWS[row]]))
    again = Fixed(scores=[-3.0, -4.0])
    replies = gather(model, again, SCORES, resume=kept)
    assert again.asked == 1
    assert sorted(reply.scores for reply in replies) == [[-3.0, -4.0]] + [[-1.0, -2.0]] * 19
    gather(model, again, SCORES, resume=kept)
    assert again.asked == 1


# ---- another file in its place -------------------------------------------------------------------------------------

ENDLESS = (
    "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT cast(x AS BLOB) AS ask, x AS reply FROM n"
)

OTHER_DATABASES = {
    "a view": ["DROP TABLE replies", f"CREATE VIEW replies AS {ENDLESS}"],
    "a view for the model": ["DROP TABLE about", "CREATE VIEW about AS SELECT 'x' AS model"],
    "a trigger": ["CREATE TRIGGER t AFTER INSERT ON replies BEGIN DELETE FROM replies; END"],
    "an index": ["CREATE INDEX i ON replies (reply)"],
    "another table": ["CREATE TABLE other (x)"],
    "other columns": ["DROP TABLE replies", "CREATE TABLE replies (a, b, c)"],
    "a constraint": [
        "DROP TABLE replies",
        "CREATE TABLE replies (ask BLOB PRIMARY KEY, reply TEXT CHECK (0)) WITHOUT ROWID",
    ],
}


@pytest.mark.parametrize("what", OTHER_DATABASES)
def test_another_database_is_left_alone(model, kept, what):
    change(kept, *OTHER_DATABASES[what])
    before = kept.read_bytes()
    with pytest.raises(InputError, match="is a database of something else; give another file"):
        gather(model, Fixed(), SCORES, resume=kept)
    assert kept.read_bytes() == before


@pytest.mark.parametrize("model_of", ["x" * 64, "", 5, b"\xff", None])
def test_replies_of_another_model(model, kept, model_of):
    change(kept, ("UPDATE about SET model = ?", [model_of]))
    with pytest.raises(InputError, match="keeps replies of another model"):
        gather(model, Fixed(), SCORES, resume=kept)


def test_a_link_is_followed_and_a_circle_is_not(model, kept, tmp_path):
    (tmp_path / "link").symlink_to(kept)
    engine = Fixed()
    gather(model, engine, SCORES, resume=tmp_path / "link")
    assert engine.asked == 0
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    with pytest.raises(InputError, match="circle cannot be used for replies"):
        gather(model, engine, SCORES, resume=tmp_path / "circle")


def test_what_is_no_file(model, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, match in [
        (tmp_path, "is a directory"),
        (tmp_path / "pipe", "is not a file"),
        ("/dev/zero", "is not a file"),
        (tmp_path / "no" / "folder", "Give a file in a folder that exists"),
        (tmp_path / ("n" * 300), "the name is too long"),
    ]:
        with pytest.raises(InputError, match=match):
            gather(model, Fixed(), SCORES, resume=path)


def test_a_file_that_another_run_writes(model, kept):
    with closing(sqlite3.connect(kept, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(InputError, match=r"database is locked.*Another run writes to it"):
            gather(model, Fixed(), SCORES, resume=kept)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anything")
def test_a_file_that_may_not_be_written(model, kept):
    kept.chmod(0o400)
    with pytest.raises(InputError, match="Give a file that may be written"):
        gather(model, Fixed(), SCORES, resume=kept)


def test_a_full_disk_keeps_what_it_holds(model, tmp_path):
    """Without space the call raises one sentence; with space, the same call asks only for the missing replies."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no permission to mount a small disk")
    asks = [Ask((5, 6, i), answers=((8,), (9, 10))) for i in range(2000)]
    try:
        with pytest.raises(InputError, match=r"can keep no more replies .*full.*; those in it stay\. Make room"):
            gather(model, Fixed(), asks, resume=disk / "replies")
        (tmp_path / "replies").write_bytes((disk / "replies").read_bytes())
        (disk / "filler").write_bytes(b"")
        (disk / "replies").unlink()
        with pytest.raises(OSError, match="space"):
            (disk / "filler").write_bytes(bytes(2**17))
        with pytest.raises(InputError, match=r"cannot be used for replies .*full.* Make room"):
            gather(model, Fixed(), asks, resume=disk / "replies")
    finally:
        subprocess.run(["umount", disk], check=True)
    again = Fixed()
    gather(model, again, asks, resume=tmp_path / "replies")
    assert 0 < again.asked < 2000


# ---- fuzzed files --------------------------------------------------------------------------------------------------


@cache
def stored(folder):
    """Return a model and the bytes of a file with replies, made once per process."""
    loaded = rvqa.load(os.environ["RVQA_ATTACKED_MODEL"], weights=False)
    path = folder.parent / "whole"
    gather(loaded, Fixed(ids=cell_ids(loaded)), [*SCORES, CELL], resume=path)
    return loaded, path.read_bytes()


def cell_ids(model):
    return model.vocabulary.ids([[0] * model.vocabulary.levels])[0].tolist()


def ask_again(loaded, path):
    """Replies found in a file, and those asked for again, are all ones that an engine could give."""
    *scored, written = gather(loaded, Fixed(ids=cell_ids(loaded)), [*SCORES, CELL], resume=path)
    assert all(len(reply.scores) == 2 and all(map(is_log_probability, reply.scores)) for reply in scored)
    loaded.vocabulary.codes([written.ids[: loaded.vocabulary.span_length]])


def altered_file(number, folder):
    loaded, data = stored(folder)
    (folder / "replies").write_bytes(mutated(data, number))
    ask_again(loaded, folder / "replies")


def test_altered_files(model_path, tmp_path, monkeypatch):
    monkeypatch.setenv("RVQA_ATTACKED_MODEL", str(model_path))
    survive(altered_file, tmp_path)


def altered_rows(number, folder):
    """Return a valid file whose rows have altered texts."""
    loaded, data = stored(folder)
    path = folder / "replies"
    path.write_bytes(data)
    with closing(sqlite3.connect(path)) as file:
        file.execute("PRAGMA synchronous = OFF")
        for i, (ask, told) in enumerate(file.execute("SELECT ask, reply FROM replies").fetchall()):
            text = mutated(told.encode(), 21 * number + i)
            file.execute("UPDATE replies SET reply = CAST(? AS TEXT) WHERE ask = ?", [text, ask])
        file.commit()
    ask_again(loaded, path)


def test_altered_rows(model_path, tmp_path, monkeypatch):
    monkeypatch.setenv("RVQA_ATTACKED_MODEL", str(model_path))
    survive(altered_rows, tmp_path)
