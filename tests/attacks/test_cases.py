"""The runner of hostile cases notices a crash, a foreign error, the cause of a hang, and memory."""

import os

import numpy as np
import pytest

from rvqa.errors import InputError
from tests.attacks.cases import mutated, survive


def refused(number, folder):
    (folder / "file").touch()
    raise InputError("no")


def crashes(number, folder):
    if number == 3:
        os.kill(os.getpid(), 11)


def raises(number, folder):
    if number == 4:
        raise KeyError("gone")


def grows(number, folder):
    if number == 15:
        np.ones(2**24)


def test_a_refusal_survives(tmp_path):
    survive(refused, tmp_path, cases=5)


@pytest.mark.parametrize(("case", "said"), [(crashes, "case 3 "), (raises, "case 4"), (grows, "case 15: memory grew")])
def test_what_does_not(case, said, tmp_path):
    with pytest.raises(AssertionError, match=said):
        survive(case, tmp_path, cases=20, grows=100)


def test_mutations_are_of_many_kinds_and_the_same_again():
    data = bytes(range(256)) * 4
    made = [mutated(data, number) for number in range(300)]
    assert made == [mutated(data, number) for number in range(300)]
    assert len(set(made)) > 290
    assert min(map(len, made)) < len(data) < max(map(len, made))
