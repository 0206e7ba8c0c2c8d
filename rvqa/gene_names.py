"""Where the Ensembl ids and symbols of a file stand: `var_names` and the columns that the common writers use.

Those are the names that 10x, CELLxGENE and Seurat converters give them. Nothing is interpreted here but the form: an
Ensembl id is `ENSG` and 11 digits, a number is no symbol.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import pandas as pd

_ID_COLUMNS = (
    *("ensembl_id", "gene_ids", "gene_id", "feature_id", "feature_ids"),
    *("ensembl_ids", "ensembl", "ensembl_gene_id"),
)
_SYMBOL_COLUMNS = (
    *("gene_symbol", "gene_symbols", "feature_name", "symbol", "gene_name", "gene_names", "symbols"),
    *("hgnc_symbol", "gene_short_name", "feature_names", "features", "gene", "genes", "name", "names"),
)
_MISSING = frozenset({"", "nan", "None", "NA", "<NA>"})
_ENSEMBL = re.compile(r"(ENSG\d{11})(?:\.\d+)?")


def ensembl(name: str) -> str:
    """Return a human Ensembl gene id without its version, "" for any other text."""
    match = _ENSEMBL.fullmatch(name)
    return match[1] if match else ""


def texts(values: Iterable[Any]) -> list[str]:
    """Return values as stripped text, "" where missing; bytes, which old writers leave, as the text they stand for."""
    decoded = (value.decode(errors="replace") if isinstance(value, bytes) else value for value in values)
    stripped = (str(value).strip() for value in decoded)
    return ["" if text in _MISSING else text for text in stripped]


def sources(var: pd.DataFrame) -> tuple[list[list[str]], list[list[str]]]:
    """Ensembl ids and symbols of the file columns: one list for each place they stand in, first choice first."""
    # By place: a table may have a name twice. The first of equal names counts.
    columns = {str(var.columns[at]).lower(): var.iloc[:, at] for at in reversed(range(var.shape[1]))}
    columns = {name: values for name, values in columns.items() if not pd.api.types.is_numeric_dtype(values.dtype)}
    names = texts(var.index)
    in_ids = [texts(columns[name]) for name in _ID_COLUMNS if name in columns]
    in_symbols = [texts(columns[name]) for name in _SYMBOL_COLUMNS if name in columns]
    ids = [[ensembl(text) for text in place] for place in (names, *in_ids, *in_symbols)]
    # The symbol columns first: var_names_make_unique may have changed var_names. A number is no symbol.
    places = (*in_symbols, names)
    symbols = [["" if text.isdigit() or ensembl(text) else text for text in place] for place in places]
    return ids, symbols


def first_known(places: list[list[str]]) -> list[str]:
    """Return for each column the name in the first place that has one, else ""."""
    return [next(filter(None, names), "") for names in zip(*places, strict=True)]
