"""JSON with one value or key altered at random."""

import copy
import random
from typing import Any

DEEP: Any = "deep"
"""Replaced by a list in a list, 100,000 levels down, when it is written."""

ODD: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        2,
        7,
        255,
        256,
        257,
        2**16,
        2**31,
        2**32,
        2**53 + 1,
        2**63,
        2**64,
        10**400,
        -(2**63),
    ),
    *(
        0.5,
        -0.0,
        5e-324,
        1e-310,
        1e308,
        float("nan"),
        float("inf"),
        float("-inf"),
        "",
        "a",
        "x" * 100_000,
        "\x00",
        "\n",
    ),
    *("\ud800", "/etc/passwd", "../../etc", "{{ 7 }}", "os.system", "NaN", "1e999", [], {}, [[]], [{}], {"": {}}, DEEP),
    *([None], [1, "a"], ["a", "a"], {"a": None}, [0] * 10_000, {str(i): i for i in range(1000)}),
)


def altered(value: Any, number: int) -> Any:
    """Return a copy with one to three random entries replaced, removed, doubled, added or scaled."""
    rng = random.Random(number)
    changed = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = list(_places(changed))
        if not places:
            return changed
        # Places near the top are as likely as those in the largest list.
        depth = rng.choice(sorted({depth for depth, _, _ in places}))
        _, holder, key = rng.choice([place for place in places if place[0] == depth])
        how = rng.randrange(8)
        old = holder[key]
        if how < 4:
            holder[key] = copy.deepcopy(rng.choice(ODD))
        elif how == 4:
            del holder[key]
        elif how == 5 and isinstance(old, int | float):
            holder[key] = old * rng.choice((-1, 0, 2, 10, 2**20, 2**40, 0.5)) + rng.choice((-1, 0, 1))
        elif how == 5 and isinstance(old, list):
            holder[key] = old + old
        elif how == 6 and isinstance(holder, dict):
            holder[rng.choice(("auto_map", "file", "cell", "\ud800", "a" * 5000, "codes"))] = old
        elif how == 7 and isinstance(old, str):
            holder[key] = old * 1000 if rng.random() < 0.3 else old[: len(old) // 2] + rng.choice("\x00é\n/<|{")
        else:
            holder[key] = [old]
    return changed


def written(value: Any) -> bytes:
    """Return JSON as Python writes it, including NaN."""
    import json

    return json.dumps(value).replace('"deep"', "[" * 100_000 + "]" * 100_000).replace('"1e999"', "1e999").encode()


def _places(value: Any, depth: int = 0) -> Any:
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(entries):
        yield depth, value, key
        yield from _places(inner, depth + 1)
