"""Which columns of a file are human genes, and which are something else.

A file may count antibodies, guides, hashtags and chromatin peaks beside genes, spike-ins, and genes of a second genome
(mixed species, a virus). An antibody against CD4 is named like the gene, so a name alone does not tell them apart.
`gene_features` reads what the common writers say about kind and genome: 10x, muon, CELLxGENE, Seurat and
SingleCellExperiment. Readers drop the other columns before anything else, so that all that follows sees genes only.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

import numpy as np
import pandas as pd

from rvqa.data.gene_names import all_names, ensembl, text_columns, texts, without_genome
from rvqa.errors import InputError

_KIND_COLUMNS = (
    *("feature_types", "feature_type", "feature_biotype", "feature_class", "modality", "modalities"),
    *("assay", "library_type", "gene_biotype", "gene_type", "biotype", "type"),
)
_GENOME_COLUMNS = ("genome", "feature_reference", "species", "organism")

_GENES = re.compile(
    r"genes?|gene expression|gex|m?rna|rna expression|expression|transcripts?|transcriptome|spatial|sct|originalexp"
)
"""Words for genes, in lower case with blanks between words; the last three are assays of Seurat and scater."""
_OTHERS = re.compile(
    r".* capture|antibod(y|ies)|antibody derived tags?|adt|(surface )?proteins?|prot"
    r"|hto|hash(tag)?s?|hash(tag)? oligos?|cmo|multiplexing|crispr|(crispr )?guides?|guide rna|s?grna|gdo|custom"
    r"|peaks?|atac|chromatin accessibility|spike ?ins?|ercc|synthetic"
)
_BIOTYPES = re.compile(
    r"protein coding( .*)?|.*(pseudogene|ncrna|lncrna|lincrna|mirna|snrna|snorna)|(ig|tr) [cdjv] gene"
)
"""Ensembl's kinds of genes. Beside them an unknown word is one more kind of gene, as there are many."""
_TYPE_WORDS = re.compile(r"gene expression|peaks|.* capture")
"""What 10x calls kinds of features: a column named just `type` counts only where it has one of these."""

_HUMAN = re.compile(r"grch\d|hg\d\d|human(?!.*virus)|homo.?sapiens|ncbitaxon:9606$|\bb37|hs37|chm13", re.IGNORECASE)
_ERCC = re.compile(r"(?:^|[_-])ERCC[-_.]\d{5}$")
_OTHER_GENOME = re.compile(
    r"(GRCm\d+|mm\d+|mouse|Mouse|MOUSE|rn\d+|Rnor|mRatBN\d+|GRC[a-gi-z]\d+|danRer\d+|dm\d+|Sscrofa\d+|Mmul)"
    r"(?:[._]\d+)*(?:-\d{4}-[A-Z])?[_-]+(?=[A-Za-z0-9])"
)
_SPECIES = re.compile(r"(ENS(?!EST)[A-Z]{3,4}G)\d{11}(\.\d+)?$")
_ANY_PREFIX = re.compile(r"([A-Za-z][A-Za-z0-9.-]*)_+(?=[A-Za-z0-9])")


def gene_features(var: pd.DataFrame) -> tuple[np.ndarray, dict[str, int]]:
    """Tell the columns that are the expression of human genes from all others.

    Parameters
    ----------
    var
        Table of the features of a file. Not changed.

    Returns
    -------
    mask
        bool [n_features], True for human genes' expression.
    left_out
        How many others there are of each kind, in the file's words, the most frequent first: `{"Antibody Capture": 8}`,
        `{"genome mm10": 13000}`, `{"ERCC spike-in": 92}`.

    Raises
    ------
    InputError
        None of the features is a gene.

    Notes
    -----
    The first rule that applies names the kind. Names of columns and words are compared without case and punctuation.

    1. A name like ERCC-00002 is a spike-in.
    2. A column like `feature_types`, `feature_biotype`, `modality` or `assay` counts where one of its values is a known
       word. Words for gene expression and missing values are genes; known words for other kinds are not, and neither
       are unknown words beside known ones. Beside Ensembl's biotypes (protein_coding, lncRNA, ...) unknown words are
       genes, as there are many biotypes.
    3. A name with the prefix of another genome (mm10___Cd4, GRCm39-Cd4, MOUSE_Cd4) is a gene of that genome, whether it
       stands in `var_names` or in a column of ids or symbols. Where half of the names or more have the prefix of a
       known genome and one of them is human, any other prefix before "_" (SARSCoV2_ORF10) is a genome, too.
    4. A column `genome`, `feature_reference`, `species` or `organism` counts where one of its values is human: the
       other values are other genomes. A file without a human value is left to its names, which may be orthologues.
    5. Beside human Ensembl ids those of another species (ENSMUSG00000000001) are genes of another genome.
    6. Where a column says the kinds, features without one are genes, unless they bear the name of a gene that has one,
       as where tables of genes and antibodies were joined.
    """
    columns = text_columns(var)
    kinds = np.full(len(var), "", dtype=object)
    places = all_names(var)
    for names in places:
        _label(kinds, ["ERCC spike-in" if "ERCC" in name and _ERCC.search(name) else "" for name in names])
    says, told = [], []
    for column in filter(columns.__contains__, _KIND_COLUMNS):
        values = texts(columns[column])
        if any(_GENES.fullmatch(_words(text)) for text in set(values)):
            told.append(values)
        if _label(kinds, _other_kinds(values, column)):
            says.append(f"var[{columns[column].name!r}]")
    for names in places:
        _label(kinds, _other_prefixes(names, kinds == ""))
    for column in filter(columns.__contains__, _GENOME_COLUMNS):
        _label(kinds, _other_genomes(texts(columns[column])))
    if told:
        _label(kinds, _named_again(places, kinds, told))
    for names in places:
        _label(kinds, _other_species(names))
    mask = kinds == ""
    left_out = dict(Counter(kinds[~mask]).most_common())
    if len(var) and not mask.any():
        where = " and ".join(says)
        raise InputError(
            f"None of the file's {len(var):,} features is the expression of a human gene: {where or 'names'} say "
            f"{_amounts(left_out)}. Give a file that has human genes. If these are human genes, "
            + (f"correct or delete {where}." if where else "put their symbols into adata.var_names.")
        )
    return mask, left_out


def left_out_sentence(left_out: Mapping[str, int]) -> str:
    """Say how many features of each kind `gene_features` left out, "" for none.

    Examples
    --------
    >>> left_out_sentence({"Antibody Capture": 8})
    '8 features are not genes and were left out (Antibody Capture 8)'
    """
    n = sum(int(count) for count in left_out.values())
    if not n:
        return ""
    human = "human " if any(kind.startswith("genome ") for kind in left_out) else ""
    what = f"1 feature is not a {human}gene and was" if n == 1 else f"{n:,} features are not {human}genes and were"
    return f"{what} left out ({_amounts(left_out)})"


def _amounts(left_out: Mapping[str, int]) -> str:
    return ", ".join(f"{kind} {int(count):,}" for kind, count in left_out.items())


def _label(kinds: np.ndarray, found: list[str]) -> int:
    """Name the kind of features that have none yet, and return how many were named."""
    new = [at for at, kind in enumerate(found) if kind and not kinds[at]]
    for at in new:
        kinds[at] = found[at].replace("/", "-")  # a "/" would be a folder where results are stored
    return len(new)


def _other_kinds(values: list[str], column: str) -> list[str]:
    """Each value of a column that says what features are, "" for genes."""
    words = {text: _words(text) for text in set(values)}
    known = {text for text, word in words.items() if _GENES.fullmatch(word) or _OTHERS.fullmatch(word)}
    others = {text for text in words if text and not _GENES.fullmatch(words[text])}
    if any(map(_BIOTYPES.fullmatch, words.values())):
        others &= known
    elif not known or (column == "type" and not any(map(_TYPE_WORDS.fullmatch, words.values()))):
        others = set()
    return [text if text in others else "" for text in values]


def _words(text: str) -> str:
    """A value in lower case with blanks between words."""
    return re.sub(r"[\W_]+", " ", text.lower()).strip()


def other_genome(name: str) -> str:
    """The genome, known and not human, that stands before a name; "" for any other text."""
    match = _OTHER_GENOME.match(name) if "_" in name or "-" in name else None
    return match[1] if match else ""


def _other_genomes(values: list[str]) -> list[str]:
    """Each value of a column of genomes, "" for human ones, or for all if none is human."""
    human = {text for text in set(values) if not text or _HUMAN.search(text)}
    return [f"genome {text}" if any(human) and text not in human else "" for text in values]


def _other_species(names: list[str]) -> list[str]:
    """The species of each Ensembl gene id that is not human, "" for all others, or for all if none is human."""
    if not any(map(ensembl, names)):
        return [""] * len(names)
    return [f"genome {match[1]}" if (match := _SPECIES.match(name)) else "" for name in names]


def _named_again(places: list[list[str]], kinds: np.ndarray, told: list[list[str]]) -> list[str]:
    """Mark features without a kind, all of them, if some bear the name of a gene with one."""
    silent = np.array([not any(each) for each in zip(*told, strict=True)], dtype=bool) & (kinds == "")
    said = ~silent & (kinds == "")
    for names in places:
        known = {name for name, here in zip(names, said, strict=True) if here and name}
        if any(name in known for name, here in zip(names, silent, strict=True) if here):
            return ["no kind" if here else "" for here in silent]
    return [""] * len(silent)


def with_kinds(var: pd.DataFrame, other: pd.DataFrame) -> pd.DataFrame:
    """A table of features with the columns of kind and genome that only another table of the same features has.

    A file may say them in `var` and not in `raw.var`. Features are the same where all names are, or where their name
    stands once in both.
    """
    there, missing = text_columns(var), text_columns(other)
    lost = [missing[name].name for name in (*_KIND_COLUMNS, *_GENOME_COLUMNS) if name in missing and name not in there]
    if not lost:
        return var
    added = other[lost].astype(object)
    if len(var) == len(other) and (var.index == other.index).all():
        return var.assign(**{str(name): added[name].to_numpy() for name in lost})
    once = added[~other.index.duplicated(keep=False)]
    values = once.reindex(var.index[~var.index.duplicated(keep=False)])
    return var.assign(**{str(name): pd.Series(var.index).map(values[name]).to_numpy() for name in lost})


def _other_prefixes(names: list[str], is_open: np.ndarray) -> list[str]:
    """The genome before each name that has the prefix of another one, "" for all others."""
    other = [f"genome {genome}" if (genome := other_genome(name)) else "" for name in names]
    human = [without_genome(name) != name for name in names]
    n_named = sum(bool(name) and bool(free) for name, free in zip(names, is_open, strict=True))
    n_known = sum((bool(a) or b) and bool(free) for a, b, free in zip(other, human, is_open, strict=True))
    if any(human) and 2 * n_known >= n_named:
        for at, name in enumerate(names):
            if not (other[at] or human[at]) and (match := _ANY_PREFIX.match(name)):
                other[at] = f"genome {match[1]}"
    return other
