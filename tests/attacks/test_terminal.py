"""Names from files are printed as text, because a terminal acts on control characters; errors arrive whole."""

from rvqa.errors import printable


def test_control_characters_are_written_out():
    assert (
        printable("T cell\x1b]0;owned\x07\r\u202e\n\ud800 B細胞 é")
        == r"T cell\x1b]0;owned\x07\r\u202e" + "\n\\ud800 B細胞 é"
    )


def test_a_file_name_does_not_reach_the_terminal(rvqa_cli, tmp_path, model_path):
    name = "cells\x1bc\udcff.h5ad"
    done = rvqa_cli("encode", tmp_path / name, "-m", model_path, "-o", tmp_path / "out.rvq")
    assert done.code == 2
    assert "cells\\x1bc\\udcff.h5ad does not exist" in done.err
    assert done.err.isascii()
