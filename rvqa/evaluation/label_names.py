"""Known types and a model's labels brought to common names, so that what is compared is cells and not wording.

Names come from a file that the user gives, else from the reference table `label_to_cl.json` where they do not agree as
they are. N cells.
"""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rvqa.data.studies import label_table
from rvqa.errors import InputError, quoted

_FORMATS = {".csv": ",", ".tsv": "\t"}
_EXPECTED = "Expected a JSON object, or two columns of a .csv or .tsv file: a label, and the name to compare it by."


@dataclass(frozen=True)
class ComparedLabels:
    """Known and predicted types of the same cells under common names."""

    truth_N: np.ndarray
    """Known type, object [N]; "" where unknown."""
    predicted_N: np.ndarray
    """Predicted type, object [N]."""
    labels: list[str]
    """The model's labels under these names, each once, in their order."""
    changed: bool
    """Whether any name is another than before."""
    sensible: bool
    """Whether an accuracy says anything: no more than half of the known types, and of their cells, have no counterpart
    among the model's labels."""
    sentence: str
    """Which names are compared, which labels were joined, and which known types have no counterpart."""

    @property
    def can_N(self) -> np.ndarray:
        """Cells whose known type the model can give, bool [N]."""
        return np.isin(self.truth_N, self.labels)


def compare_labels(
    truth_N: np.ndarray,
    predicted_N: np.ndarray,
    labels: Sequence[str],
    *,
    label_map: str | Path | Mapping[str, str] | None = None,
) -> ComparedLabels:
    """Bring known types and a model's labels to common names.

    Parameters
    ----------
    truth_N
        Known types, object [N]; "" where unknown.
    predicted_N
        Predicted types, object [N].
    labels
        All labels that the model can give.
    label_map
        A file for `read_label_map`, or what it returns: the name of each label, of the known types and of the model
        alike. Labels that it does not have stay as they are. Without it, names are compared as they are, unless more of
        the known types have a counterpart through `label_to_cl.json` of `RVQA_REF_DIR` (its `coarse` labels).

    Returns
    -------
    ComparedLabels
        Mapped types, and a sentence to show beside any score.

    Raises
    ------
    rvqa.errors.InputError
        A `label_map` that cannot be read.
    """
    known = sorted({str(name) for name in truth_N} - {""})
    labels = [str(name) for name in labels]

    def counterparts(names: Mapping[str, str]) -> int:
        given = {names.get(label, label) for label in labels}
        return sum(names.get(name, name) in given for name in known)

    if label_map is not None:
        names = dict(label_map) if isinstance(label_map, Mapping) else read_label_map(label_map)
        source = "through label_map" if isinstance(label_map, Mapping) else f"through {Path(label_map).name}"
    else:
        names, source = label_table(), "through label_to_cl.json"
        if counterparts(names) <= counterparts({}):
            names, source = {}, "as they are"
    common = list(dict.fromkeys(names.get(label, label) for label in labels))
    mapped_N = _mapped(truth_N, names)
    lost = [name for name in known if names.get(name, name) not in set(common)]
    lost_cells = int(np.isin(np.asarray(truth_N, dtype=object), lost).sum())
    parts = [
        f"Names are compared {source}.",
        *_joined(names, labels, "labels of the model"),
        *_joined(names, known, "known types"),
    ]
    if lost:
        has = "has" if len(lost) == 1 else "have"
        parts.append(
            f"{len(lost)} of {len(known)} known types {has} no counterpart among the model's labels "
            f"({quoted(lost)}); give --label-map FILE (label_map=) if that is a matter of names."
        )
    return ComparedLabels(
        truth_N=mapped_N,
        predicted_N=_mapped(predicted_N, names),
        labels=common,
        changed=any(names.get(name, name) != name for name in {*known, *labels}),
        sensible=2 * len(lost) <= len(known) and 2 * lost_cells <= int((mapped_N != "").sum()),
        sentence=" ".join(parts),
    )


def read_label_map(path: str | Path) -> dict[str, str]:
    """Read which name each label goes by.

    Parameters
    ----------
    path
        `.json`: an object, label to name; `.csv` or `.tsv`: two columns, label and name. A name may be a label with a
        name of its own: labels go by the last one.

    Returns
    -------
    dict
        Name of every label.

    Raises
    ------
    rvqa.errors.InputError
        Another file, one that cannot be read, an empty name, two names of one label, or names that go in a circle.
    """
    file = Path(path)
    try:
        if file.suffix not in {".json", *_FORMATS}:
            raise InputError(f"{file} is not named .json, .csv or .tsv. {_EXPECTED}")
        text = file.read_text(encoding="utf-8-sig")
        pairs = _json_pairs(file, text) if file.suffix == ".json" else _table_pairs(file, text)
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}. {_EXPECTED}") from error
    except (ValueError, RecursionError, csv.Error) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file} cannot be read: {str(error)[:120]}. {_EXPECTED}") from error
    names: dict[str, str] = {}
    for label, name in pairs:
        if not label or not name:
            raise InputError(f"{file} has an empty label or name ({label!r}: {name!r}). {_EXPECTED}")
        if names.setdefault(label, name) != name:
            raise InputError(f"{file} gives {label!r} two names, {names[label]!r} and {name!r}. Keep one.")
    if not names:
        raise InputError(f"{file} names no label. {_EXPECTED}")
    return {label: _last(file, names, label) for label in names}


def _json_pairs(file: Path, text: str) -> list[tuple[str, str]]:
    """Pairs of a JSON object, repeated keys among them."""
    pairs = json.loads(text, object_pairs_hook=list)
    whole = text.lstrip().startswith("{") and all(isinstance(name, str) for _, name in pairs)
    if not whole:
        raise InputError(f"{file} holds other JSON than an object of texts. {_EXPECTED}")
    return [(label.strip(), name.strip()) for label, name in pairs]


def _table_pairs(file: Path, text: str) -> list[tuple[str, str]]:
    """Rows of two cells; empty rows do not count."""
    pairs = []
    rows = csv.reader(text.splitlines(), delimiter=_FORMATS[file.suffix], strict=True)
    for row in rows:
        cells = [cell.strip() for cell in row]
        if any(cells) and len(cells) != 2:
            raise InputError(f"{file}, line {rows.line_num}, has {len(cells)} columns. {_EXPECTED}")
        if any(cells):
            pairs.append((cells[0], cells[1]))
    return pairs


def _last(file: Path, names: Mapping[str, str], label: str) -> str:
    """Follow names of names."""
    name, passed = names[label], [label]
    while name in names and names[name] != name:
        if name in passed:
            raise InputError(f"{file}: the names of {quoted(passed)} go in a circle. Give them one name.")
        passed.append(name)
        name = names[name]
    return name


def _mapped(label_N: np.ndarray, names: Mapping[str, str]) -> np.ndarray:
    return np.array([names.get(str(label), str(label)) for label in label_N], dtype=object)


def _joined(names: Mapping[str, str], labels: Sequence[str], kind: str) -> list[str]:
    """Sentence on labels that got one name, if there are any."""
    groups: dict[str, list[str]] = {}
    for label in labels:
        groups.setdefault(names.get(label, label), []).append(label)
    several = [f"{quoted(group)} as {name!r}" for name, group in groups.items() if len(group) > 1]
    return [f"This joins {kind}: {'; '.join(several)}."] if several else []
