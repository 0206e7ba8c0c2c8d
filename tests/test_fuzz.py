"""Random AnnData objects: public functions keep their contract or reject them in a sentence, without a traceback."""

import tempfile
import warnings
from functools import cache
from itertools import pairwise
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from anndata import AnnData, ImplicitModificationWarning
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import rvqa
from rvqa.data.alignment import CoverageWarning
from rvqa.data.genes import GeneAxis
from rvqa.errors import InputError
from rvqa.tokenizer.model import CellTokenizer, CellTokenizerConfig

pytestmark = [
    pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning"),
    pytest.mark.filterwarnings("ignore:(Variable|Observation) names are not unique"),
    pytest.mark.filterwarnings("ignore::rvqa.data.alignment.CoverageWarning"),
]
quiet = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
fuzz = settings(max_examples=2000, deadline=None, derandomize=True, database=None, suppress_health_check=quiet)
few = settings(fuzz, max_examples=150)

# The 80 genes of most cells of PBMC3k, with the number in their Ensembl id.
GENES = """
TMSB4X:205542 B2M:166710 MALAT1:251562 TMSB10:34510 ACTB:75624 EEF1A1:156508 PTMA:187514 FTH1:167996 FTL:87086
TPT1:133112 FAU:149806 EIF1:173812 HLA-C:204525 UBA52:221983 NACA:196531 EEF1D:104529 HLA-A:206503 HLA-B:234745
PFN1:108518 HNRNPA1:135486 PFDN5:123349 FOS:170345 CFL1:172757 ARHGDIB:111348 OAZ1:104904 JUNB:171223
COX4I1:131143 BTF3:145741 CD52:169442 DUSP1:120129 EEF1B2:114942 HLA-E:204592 BTG1:133639 MYL12A:101608
ACTG1:184009 PABPC1:70756 SH3BGRL3:142669 SERF2:140264 UBC:150991 MYL6:92841 GAPDH:111640 CYBA:51523 CD74:19582
EEF2:167658 SLC25A6:169100 NPM1:181163 YBX1:65978 ARPC3:111229 DDX5:108654 S100A4:196154 PPDPF:125534
CORO1A:102879 ARPC2:163466 VIM:26025 ITM2B:136156 LAPTM5:162511 S100A6:197956 SRP14:140319 UBB:170315
TOMM7:196683 CD37:104894 TXNIP:265972 TSC22D3:157514 ARPC1B:130429 JUN:177606 PPIA:196262 EIF3K:178982
PSME1:92010 FXYD5:89327 EMP3:142227 SRSF5:100650 CHCHD2:106153 IFITM2:185201 ALDOA:149925 CIRBP:99622
ZFP36:128016 LTB:227507 MYL12B:118680 GMFG:130755 CD48:117091
"""
SYMBOLS = np.array([gene.partition(":")[0] for gene in GENES.split()], dtype=object)
IDS = np.array([f"ENSG{int(gene.partition(':')[2]):011d}" for gene in GENES.split()], dtype=object)
ODD_TEXTS = np.array(["", " ", "nan", "B細胞", "\ud800"[:0] + "\x00", "a/b", "x" * 300, "0", "-1", "é́"], dtype=object)


@cache
def tokenizer() -> CellTokenizer:
    """A tokenizer with random weights over those genes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = CellTokenizer(GeneAxis(tuple(SYMBOLS), tuple(IDS)), CellTokenizerConfig(hidden=16, latent=8))
        made.codebooks_MKD.normal_()
        made.gene_mean_G.uniform_(0, 3)
        made.dispersion_G.uniform_(0, 2)
    return made.eval()


# Kinds of values before they are stored in some type, float64 [n, g].


def counts_of(rng: np.random.Generator, n: int, g: int) -> np.ndarray:
    x = rng.poisson(rng.uniform(0.3, 6, (n, 1)) * rng.gamma(0.7, 2.0, (n, g))).astype(np.float64)
    if g:
        x[np.arange(n), rng.integers(0, g, n)] += 1
    return x


def logs_of(x: np.ndarray, target: float = 1e4) -> np.ndarray:
    return np.log1p(x / np.maximum(x.sum(1, keepdims=True), 1) * target)


def with_one(value: float):
    def change(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        if x.size:
            x.flat[rng.integers(x.size)] = value
        return x

    return change


def without_a_cell(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    x[: len(x) // 2 + 1] = 0
    return x


VALUES = {
    "counts": lambda x, rng: x,
    "counts x 2": lambda x, rng: 2 * x,
    "zeros": lambda x, rng: 0 * x,
    "empty cells": without_a_cell,
    "logs": lambda x, rng: logs_of(x),
    "logs, median": lambda x, rng: logs_of(x, float(np.median(x.sum(1))) if x.size else 1.0),
    "logs, 3 decimals": lambda x, rng: logs_of(x).round(3),
    "logs, 1 decimal": lambda x, rng: logs_of(x).round(1),
    "logs of counts": lambda x, rng: np.log1p(x),
    "logs of a few": lambda x, rng: logs_of(x) * (rng.random(x.shape) < 0.1),
    "normalised": lambda x, rng: np.expm1(logs_of(x)),
    "scaled": lambda x, rng: x - 1.7,
    "fractions": lambda x, rng: rng.random(x.shape),
    "tiny": lambda x, rng: x * 5e-324,
    "tiny and fractions": lambda x, rng: with_one(5e-324)(x * 0.3, rng),
    "tiny and logs": lambda x, rng: with_one(1e-310)(logs_of(x), rng),
    "tiny float32 and logs": lambda x, rng: with_one(1e-45)(logs_of(x), rng),
    "small": lambda x, rng: x * 1e-30,
    "nearly": lambda x, rng: x + 1e-4,
    "constant": lambda x, rng: 0 * x + 0.5,
    "huge": lambda x, rng: x * 1e300,
    "huge and fractions": lambda x, rng: with_one(1e30)(x + 0.5, rng),
    "large": lambda x, rng: x * 1e5,
    **{f"one {value}": with_one(value) for value in (np.nan, np.inf, -np.inf, -1, 0.5, 2.0**24, 2**24 + 1, 1e19, 19.9)},
}
DTYPES = (
    *("float32", "float64", "int32", "int64", "float16", "int8", "uint8", "int16", "uint16", "uint32", "uint64"),
    *("bool", "longdouble", ">f4", ">f8", ">i4", ">u2", "complex64", "object", "str"),
)


def as_type(x: np.ndarray, dtype: str) -> np.ndarray:
    """Convert, even if values do not fit."""
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if np.dtype(dtype).kind in "iu":
            info = np.iinfo(dtype)
            x = np.clip(np.nan_to_num(x), float(info.min), float(info.max) * (1 - 1e-15))
        return x.astype(dtype)


def read_only(x: np.ndarray) -> np.ndarray:
    x = x.copy()
    x.setflags(write=False)
    return x


def untidy(x: np.ndarray) -> sp.csr_matrix:
    """Return unsorted CSR with each value as two entries if that is exact, and a stored zero in each row."""
    rows, columns = np.nonzero(np.ones_like(x, dtype=bool))
    values = x[rows, columns]
    half = values // 2 if x.dtype.kind in "iu" else values * 0
    order = np.argsort(np.concatenate([rows, rows]), kind="stable")
    data, indices = np.concatenate([values - half, half])[order], np.concatenate([columns, columns])[order]
    indptr = np.arange(len(x) + 1) * 2 * x.shape[1]
    for start, end in pairwise(indptr):
        data[start:end], indices[start:end] = data[start:end][::-1].copy(), indices[start:end][::-1].copy()
    return sp.csr_matrix((data, indices, indptr), shape=x.shape)


def frozen(x: np.ndarray) -> sp.csr_matrix:
    csr = sp.csr_matrix(x)
    for part in (csr.data, csr.indices, csr.indptr):
        part.setflags(write=False)
    return csr


def wide(x: np.ndarray) -> sp.csr_matrix:
    csr = sp.csr_matrix(x)
    csr.indices, csr.indptr = csr.indices.astype(np.int64), csr.indptr.astype(np.int64)
    return csr


FORMS = {
    "dense": lambda x: x,
    "csr": sp.csr_matrix,
    "csc": sp.csc_matrix,
    "csr_array": sp.csr_array,
    "csc_array": sp.csc_array,
    "fortran": np.asfortranarray,
    "strided": lambda x: np.repeat(x, 2, axis=1)[:, ::2],
    "read-only": read_only,
    "frozen": frozen,
    "wide": wide,
    "untidy": untidy,
    "masked": lambda x: np.ma.masked_array(x, mask=np.arange(x.size).reshape(x.shape) % 7 == 3),
    "masked nowhere": np.ma.masked_array,
    "matrix": np.matrix,
    "frame": pd.DataFrame,
    "3-D": lambda x: np.stack([x, x], axis=2),
    "none": lambda x: None,
}


def var_of(kind: str, g: int, rng: np.random.Generator) -> pd.DataFrame:
    """Return a table of g genes: first those of the axis, then others; `kind` says how they are named."""
    order = rng.permutation(max(g, len(SYMBOLS)))[:g]
    known = order < len(SYMBOLS)
    symbols = np.array([SYMBOLS[i] if i < len(SYMBOLS) else f"XGENE{i}" for i in order], dtype=object)
    ids = np.array([IDS[i] if i < len(IDS) else f"ENSG{i:011d}" for i in order], dtype=object)
    rows = np.array([f"row{i}" for i in range(g)], dtype=object)
    odd = ODD_TEXTS[rng.integers(0, len(ODD_TEXTS), g)]
    missing = rng.random(g) < 0.1
    others = np.array(["Antibody Capture", "CRISPR Guide Capture", "Custom", "", "nan"], dtype=object)
    kinds = np.where(missing, others[rng.integers(0, len(others), g)], "Gene Expression")
    tables = {
        "symbols": lambda: pd.DataFrame(index=symbols),
        "ids": lambda: pd.DataFrame(index=ids),
        "versions": lambda: pd.DataFrame(index=[f"{name}.{i}" for i, name in enumerate(ids)]),
        "mixed": lambda: pd.DataFrame(index=np.where(rng.random(g) < 0.5, ids, symbols)),
        "columns": lambda: pd.DataFrame({"gene_ids": ids, "feature_name": symbols}, index=rows),
        "categories": lambda: pd.DataFrame({"gene_symbol": pd.Categorical(symbols)}, index=rows),
        "missing": lambda: pd.DataFrame({"gene_symbol": np.where(missing, np.nan, symbols)}, index=rows),
        "missing categories": lambda: pd.DataFrame(
            {"Gene_IDs": pd.Categorical(np.where(missing, None, ids))}, index=symbols
        ),
        "strings": lambda: pd.DataFrame({"symbol": pd.array(np.where(missing, None, symbols), "string")}, index=rows),
        "bytes": lambda: pd.DataFrame({"gene_symbol": [name.encode() for name in symbols]}, index=symbols),
        "one column twice": lambda: pd.DataFrame(
            np.stack([symbols, ids], axis=1), columns=["gene_name", "gene_name"], index=symbols
        ),
        "case twice": lambda: pd.DataFrame({"Symbol": symbols, "symbol": rows}, index=ids),
        "odd columns": lambda: pd.DataFrame({7: ids, None: rows, ("a", "b"): 1.0, "gene_ids": 3}, index=symbols),
        "levels of columns": lambda: pd.DataFrame(
            np.stack([symbols, ids], axis=1), columns=pd.MultiIndex.from_tuples([("symbol", ""), ("a", "b")])
        ),
        "levels of rows": lambda: pd.DataFrame({"symbol": symbols}, index=pd.MultiIndex.from_arrays([symbols, ids])),
        "dates": lambda: pd.DataFrame({"name": pd.date_range("2020", periods=g), "gene": True}, index=symbols),
        "lists": lambda: pd.DataFrame({"gene": [[name] for name in symbols]}, index=symbols),
        "twice": lambda: pd.DataFrame(index=np.where(known, symbols[0] if g else "", symbols)),
        "pairs": lambda: pd.DataFrame(index=symbols[np.arange(g) // 2 * 2]),
        "swapped": lambda: pd.DataFrame({"ensembl_id": ids[::-1]}, index=symbols),
        "odd": lambda: pd.DataFrame(index=odd),
        "some odd": lambda: pd.DataFrame(index=np.where(missing, odd, symbols)),
        "odd symbols": lambda: pd.DataFrame({"gene_symbol": odd}, index=symbols),
        "numbers": lambda: pd.DataFrame(index=[str(i) for i in range(g)]),
        "integers": lambda: pd.DataFrame(index=range(g)),
        "floats": lambda: pd.DataFrame({"gene_symbol": np.where(missing, np.nan, 1.0)}, index=symbols),
        "lower": lambda: pd.DataFrame(index=[name.lower() for name in symbols]),
        "mouse": lambda: pd.DataFrame(index=[name.capitalize() for name in symbols]),
        "genome": lambda: pd.DataFrame(index=[f"GRCh38_{name}" for name in symbols]),
        "features": lambda: pd.DataFrame({"feature_types": kinds}, index=symbols),
        "features of CELLxGENE": lambda: pd.DataFrame(
            {"feature_biotype": np.where(missing, "spike-in", "gene"), "feature_name": symbols}, index=ids
        ),
        "all features": lambda: pd.DataFrame({"feature_types": "Antibody Capture"}, index=symbols),
        "feature bytes": lambda: pd.DataFrame({"Feature.Type": [kind.encode() for kind in kinds]}, index=symbols),
        "genomes": lambda: pd.DataFrame(
            index=[f"{'mm10' if here else 'hg19'}_{name}" for name, here in zip(symbols, missing, strict=True)]
        ),
        "genome column": lambda: pd.DataFrame({"genome": np.where(missing, "mm10", "GRCh38")}, index=symbols),
        "few": lambda: pd.DataFrame(index=np.where(np.arange(g) < 30, symbols, rows)),
        "index name": lambda: pd.DataFrame({"gene_symbol": symbols}, index=pd.Index(ids, name="gene_symbol")),
    }
    return tables[kind]()


VARS = (
    *("symbols", "ids", "versions", "mixed", "columns", "categories", "missing", "missing categories", "strings"),
    *("bytes", "one column twice", "case twice", "odd columns", "levels of columns", "levels of rows", "dates"),
    *(
        "lists",
        "twice",
        "pairs",
        "swapped",
        "odd",
        "some odd",
        "odd symbols",
        "numbers",
        "integers",
        "floats",
        "lower",
        "mouse",
    ),
    *("genome", "few", "index name", "features", "features of CELLxGENE", "all features", "feature bytes"),
    *("genomes", "genome column"),
)


def obs_of(kind: str, x: np.ndarray, rng: np.random.Generator) -> pd.DataFrame:
    """Return a table of cells with a column "depth" of some kind, and other columns."""
    n = len(x)
    with np.errstate(all="ignore"):
        total = np.nan_to_num(np.abs(x).sum(1), posinf=1e6) + rng.integers(0, 500, n) if x.shape[1] else np.ones(n)
    names = [f"cell{i}" for i in range(n)]
    some = np.arange(n) % 3 == 1
    columns = {
        "right": lambda: total,
        "whole": lambda: np.minimum(total, 1e15).astype(np.int64) + 1,
        "nullable": lambda: pd.array(np.minimum(total, 1e15).astype(np.int64) + 1, "Int64"),
        "missing": lambda: pd.array([None if here else 10**6 for here in some], "Int64"),
        "nan": lambda: np.where(some, np.nan, total),
        "zero": lambda: np.where(some, 0, total),
        "negative": lambda: -total,
        "infinite": lambda: np.where(some, np.inf, total),
        "small": lambda: total * 0 + 1,
        "huge": lambda: total * 0 + 1e300,
        "rather huge": lambda: total * 0 + 2.0**60,
        "float16": lambda: np.full(n, 6e4, np.float16),
        "uint64": lambda: np.full(n, 2**64 - 1, np.uint64),
        "longdouble": lambda: total.astype(np.longdouble),
        "texts": lambda: [str(value) for value in total],
        "categories": lambda: pd.Categorical(total),
        "bool": lambda: some,
        "complex": lambda: total.astype(complex),
        "objects": lambda: np.array([{} if here else None for here in some], dtype=object),
        "dates": lambda: pd.date_range("2020", periods=n),
        "arrow": lambda: pd.array(total, "double[pyarrow]"),
        "sparse": lambda: pd.arrays.SparseArray(total),
        "ragged": lambda: [[1.0]] * n,
    }
    if kind in columns:
        return pd.DataFrame({"depth": columns[kind](), "batch": "a"}, index=names)
    if kind == "twice":
        return pd.DataFrame(np.stack([total, total], axis=1), columns=["depth", "depth"], index=names)
    if kind == "levels":
        return pd.DataFrame({("depth", ""): total, ("b", 1): 2}, index=names)
    if kind == "same names":
        return pd.DataFrame({"depth": total}, index=["cell"] * n)
    if kind == "odd names":
        return pd.DataFrame({"depth": total, 3: 1, None: 2}, index=ODD_TEXTS[np.arange(n) % len(ODD_TEXTS)])
    if kind == "genes":
        return pd.DataFrame({"gene_symbol": SYMBOLS[np.arange(n) % len(SYMBOLS)]}, index=SYMBOLS[np.arange(n) % 80])
    return pd.DataFrame(index=names)


DEPTHS = (
    *("right", "whole", "nullable", "missing", "nan", "zero", "negative", "infinite", "small", "huge", "rather huge"),
    *("float16", "uint64", "longdouble", "texts", "categories", "bool", "complex", "objects", "dates", "arrow"),
    *("sparse", "ragged", "twice", "levels", "same names", "odd names", "genes", "none"),
)


def often(draw: st.DrawFn, usual: object, others: object) -> object:
    """Draw the usual value in most cases, so that enough examples get far."""
    return usual if draw(st.integers(0, 4)) else draw(st.sampled_from(tuple(others)))


@st.composite
def inputs(draw: st.DrawFn) -> tuple[AnnData | None, dict]:
    """Draw any AnnData that anndata itself accepts, and options of `encode`."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n, g = often(draw, 4, (0, 1, 2, 7, 12, 90)), often(draw, 90, (0, 1, 49, 50, 51, 79, 80, 200))

    def matrix(columns: int = g) -> tuple[object, np.ndarray]:
        x = VALUES[often(draw, "counts", VALUES)](counts_of(rng, n, columns), rng)
        stored = as_type(x, often(draw, "float32", DTYPES))
        form = often(draw, "csr", FORMS)
        try:
            return FORMS[form](stored), x
        except (TypeError, ValueError):  # scipy has no such type of values
            return stored, x

    X, x = matrix()
    parts = {"obs": obs_of(often(draw, "right", DEPTHS), x, rng), "var": var_of(often(draw, "symbols", VARS), g, rng)}
    layers = {name: matrix()[0] for name in draw(st.sampled_from([(), ("counts",), ("raw",), ("log", "counts")]))}
    raw = matrix(g + 5)[0] if draw(st.integers(0, 3)) == 0 else None
    uns = often(draw, None, ({}, {"a": 1}, "text", 3, [1], {"coverage": {}}))
    step = often(draw, None, (1, 2, -1))
    options = {
        "layer": often(draw, None, ("counts", "log", "raw", "absent", "", "auto", "X")),
        "library_size_key": often(draw, None, ("depth", "batch", "absent", "")),
        "recover": draw(st.booleans()),
        "key_added": often(draw, "rvqa", ("mine", "", "a/b", "é", "pca")),
        "copy": draw(st.booleans()),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            adata = AnnData(X, **parts, layers=layers, uns={} if uns is None else {"rvqa": uns})
            if raw is not None:
                adata.raw = AnnData(raw, obs=adata.obs[[]], var=var_of("symbols", g + 5, rng))
            if draw(st.booleans()):
                adata.obsm["X_pca"] = np.zeros((n, 2))
            adata[:1].copy()
            # A view of masked values shows them without their mask.
            masked = any(map(np.ma.isMA, (adata.X, *adata.layers.values())))
            return adata if step is None or masked else adata[::step], options
        except Exception:  # anndata accepts none of these
            return None, options


def fingerprint(adata: AnnData) -> list:
    """Return the content of an AnnData, bit for bit, in a form that can be compared."""

    def matrix(x: object) -> object:
        if sp.issparse(x):
            return x.format, x.shape, [matrix(part) for part in (x.data, x.indices, x.indptr)]
        if x is None or getattr(x, "dtype", np.dtype(object)).hasobject or x.dtype == np.longdouble:
            return repr(x)
        return x.dtype.str, x.shape, x.tobytes(), np.ma.getmaskarray(x).tobytes() if np.ma.isMA(x) else None

    frames = [adata.obs, adata.var, *([adata.raw.var] if adata.raw is not None else [])]
    tables = [(frame.to_csv(), repr(frame.dtypes.tolist())) for frame in frames]
    matrices = [matrix(adata.X), *((name, matrix(x)) for name, x in adata.layers.items())]
    matrices.append(None if adata.raw is None else matrix(adata.raw.X))
    obsm = [(name, matrix(np.asarray(x))) for name, x in adata.obsm.items()]
    return [adata.is_view, tables, matrices, obsm, repr(dict(adata.uns))]


def outcome(call, adata: AnnData):
    """Return the result of a call, or None after an `InputError` of one clear text that left `adata` unchanged."""
    before = fingerprint(adata)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for kind in (CoverageWarning, ImplicitModificationWarning, DeprecationWarning, FutureWarning):
                warnings.simplefilter("ignore", kind)
            warnings.filterwarnings("ignore", "(Variable|Observation) names are not unique")
            result = call()
    except InputError as error:
        text = str(error)
        assert text.strip()
        assert not any(sign in text for sign in ("Traceback", "object at 0x", "<class", "\n"))
        assert text.rstrip()[-1] in ".?!)'\""
        assert fingerprint(adata) == before
        return None
    return result, before


def check_codes(adata: AnnData, key: str) -> np.ndarray:
    codes, latent = adata.obsm[f"{key}_codes"], adata.obsm[f"X_{key}"]
    assert (codes.dtype, codes.shape) == (np.uint8, (adata.n_obs, 8))
    assert codes.max() < 32
    assert (latent.dtype, latent.shape) == (np.float32, (adata.n_obs, 8))
    assert np.isfinite(latent).all()
    assert {"version", "coverage", "model"} <= set(adata.uns[key])
    return codes


@fuzz
@given(inputs())
def test_encode(given_inputs):
    check_encode(*given_inputs)


def check_encode(adata: AnnData, options: dict) -> bool:
    if adata is None:
        return False
    key = options["key_added"]
    found = outcome(lambda: rvqa.encode(adata, tokenizer(), **options), adata)
    if found is None:
        return False
    result, before = found
    if options["copy"]:
        assert fingerprint(adata) == before
    else:
        assert result is None
        result = adata
    codes = check_codes(result, key)
    again = rvqa.encode(adata, tokenizer(), **options | {"copy": True})
    np.testing.assert_array_equal(again.obsm[f"{key}_codes"], codes)
    if not options["recover"]:  # which needs enough values over all cells
        at = len(codes) // 2
        alone = rvqa.encode(adata[[at]], tokenizer(), **options | {"copy": True})
        np.testing.assert_array_equal(alone.obsm[f"{key}_codes"], codes[[at]])
    expected = rvqa.decode(codes, tokenizer())
    assert np.isfinite(expected).all()
    assert (expected >= 0).all()
    return True


CODES = {
    "codes": lambda rng, n, m: rng.integers(0, 32, (n, m), dtype=np.uint8),
    "one too large": lambda rng, n, m: np.full((n, m), 32, np.uint8),
    "any": lambda rng, n, m: rng.integers(0, 256, (n, m), dtype=np.uint8),
    "int64": lambda rng, n, m: rng.integers(-3, 40, (n, m)),
    "float": lambda rng, n, m: rng.normal(size=(n, m)),
    "bool": lambda rng, n, m: rng.random((n, m)) < 0.5,
    "object": lambda rng, n, m: np.zeros((n, m), dtype=object),
    "texts": lambda rng, n, m: np.full((n, m), "a"),
    "flat": lambda rng, n, m: np.zeros(m, np.uint8),
    "3-D": lambda rng, n, m: np.zeros((n, m, 2), np.uint8),
    "scalar": lambda rng, n, m: np.uint8(3),
    "fortran": lambda rng, n, m: np.asfortranarray(rng.integers(0, 32, (n, m), dtype=np.uint8)),
    "reversed": lambda rng, n, m: rng.integers(0, 32, (n, m), dtype=np.uint8)[::-1, ::-1],
    "read-only": lambda rng, n, m: read_only(rng.integers(0, 32, (n, m), dtype=np.uint8)),
    "frame": lambda rng, n, m: pd.DataFrame(rng.integers(0, 32, (n, m), dtype=np.uint8)),
    "list": lambda rng, n, m: [[0] * m] * n,
    "ragged": lambda rng, n, m: [[0] * m, [0]],
    "sparse": lambda rng, n, m: sp.csr_matrix((n, m), dtype=np.uint8),
    "none": lambda rng, n, m: None,
    "tensor": lambda rng, n, m: torch.zeros((n, m), dtype=torch.uint8),
}


@few
@given(
    st.sampled_from(sorted(CODES)),
    st.sampled_from([0, 1, 3, 1025]),
    st.sampled_from([8, 8, 8, 0, 1, 7, 9]),
    st.sampled_from([None, None, (), ("LTB",), ("LTB", "LTB", "B2M"), ("nothing",), ("", "B2M"), ("ltb", 3), "LTB"]),
    st.sampled_from([None, None, 1, 8, np.int64(3), 0, 9, -1, 2.0, "3", True]),
    st.sampled_from([1e4, 1e4, 1, 1e6, 0, -1.0, np.nan, np.inf, 1e300, 5e-324]),
    st.integers(0, 2**32 - 1),
)
def test_decode(kind, n, m, genes, levels, target_sum, seed):
    codes = CODES[kind](np.random.default_rng(seed), n, m)
    options = {"genes": genes, "levels": levels, "target_sum": target_sum}
    found = outcome(lambda: rvqa.decode(codes, tokenizer(), **options), AnnData())
    if found is not None:
        expected = found[0]
        assert expected.dtype == np.float32
        assert expected.shape == (len(codes), len(SYMBOLS) if genes is None else len(genes))
        assert np.isfinite(expected).all()
        assert (expected >= 0).all()
        assert expected.max(initial=0) <= np.float32(target_sum)
        alone = rvqa.decode(np.asarray(codes)[-1:], tokenizer(), **options)
        np.testing.assert_allclose(alone, expected[-1:], rtol=1e-5)  # codes are exact, expectations are not


@few
@given(inputs())
def test_axis_of_a_file(given_inputs):
    adata = given_inputs[0]
    if adata is not None and (found := outcome(lambda: GeneAxis.from_adata(adata), adata)):
        assert len(found[0]) <= adata.n_vars
        assert found[1] == fingerprint(adata)


def of_the_model(adata: AnnData, model) -> AnnData | None:
    """Return the same with genes of a model instead of the tokenizer above, and with cell types."""
    symbols = model.cell_tokenizer.axis.symbols
    other = dict(zip((*SYMBOLS, *IDS), (*symbols[: len(SYMBOLS)], *symbols[: len(IDS)]), strict=True))
    if adata is None or adata.n_obs > 12:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adata = adata.copy()
        adata.var_names = pd.Index([other.get(name, name) for name in adata.var_names], dtype=object)
        adata.obs["type"] = (model.card.labels * 12)[: adata.n_obs]
    return adata


LABELS = (None, ("CD19+ B", "CD14+ Monocyte"), ("Dendritic",), (), ("Dendritic", "Dendritic"), ("dendritic",), ("", 3))


@few
@given(inputs(), st.sampled_from([*LABELS, "Dendritic"]))
def test_annotate(model, given_inputs, labels):
    adata, options = of_the_model(given_inputs[0], model), given_inputs[1] | {"progress": False}
    if adata is None:
        return
    key = options["key_added"]
    found = outcome(lambda: rvqa.annotate(adata, model, labels=labels, **options), adata)
    if found is None:
        return
    result = found[0] if options["copy"] else adata
    assert (fingerprint(adata) == found[1]) == options["copy"]
    chosen = list(labels or model.card.labels)
    probabilities = result.obsm[f"{key}_probabilities"]
    assert (probabilities.dtype, probabilities.shape) == (np.float32, (result.n_obs, len(chosen)))
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-5)
    assert set(result.obs[f"{key}_cell_type"]) <= set(chosen)
    np.testing.assert_array_equal(result.obs[f"{key}_confidence"], probabilities.max(axis=1))
    assert result.obsm[f"{key}_codes"].max() < 32
    assert list(result.uns[key]["labels"]) == chosen


@few
@given(
    inputs(),
    st.sampled_from(["SIMULATED response", "SIMULATED response", "SIMULATED response", "simulated", ""]),
    st.sampled_from(["type", "type", "type", "batch", "absent", "depth"]),
    st.sampled_from([(None, None)] * 3 + [("type", "Dendritic"), ("batch", "a"), ("batch", "b"), ("depth", "1")]),
    st.sampled_from([1, 1, 2, 0, -1, 1.5]),
    st.sampled_from([1.0, 0.0, 0.5, 1e-9, 1e9, -1.0, np.nan, np.inf]),
    st.sampled_from([0, 1, 2**64, -1, 0.5]),
)
def test_perturb(model, given_inputs, perturbation, type_key, control, n_samples, temperature, seed):
    adata = of_the_model(given_inputs[0], model)
    if adata is None:
        return
    options = {name: given_inputs[1][name] for name in ("layer", "library_size_key", "recover")}
    options |= {"perturbation": perturbation, "cell_type_key": type_key, "n_samples": n_samples, "seed": seed}
    options |= {"control_key": control[0], "control_value": control[1], "temperature": temperature}
    found = outcome(lambda: rvqa.perturb(adata, model, progress=False, **options), adata)
    if found is None:
        return
    predicted, before = found
    assert fingerprint(adata) == before
    assert predicted.n_vars == len(model.cell_tokenizer.axis)
    assert predicted.n_obs % n_samples == 0
    assert 0 < predicted.n_obs <= n_samples * adata.n_obs
    assert predicted.X.dtype == predicted.layers["mean"].dtype == np.float32
    assert np.isfinite(predicted.layers["mean"]).all()
    assert (predicted.X.data == np.rint(predicted.X.data)).all()
    assert predicted.X.data.min(initial=1) >= 1
    assert predicted.obsm["rvqa_codes"].max() < 32


@few
@given(inputs(), st.sampled_from([(), ("cell", "file", "code_1"), ("depth", "batch")]))
def test_both_readers(given_inputs, carried):
    """A file gives the same in memory, part by part, and as the AnnData that it was written from."""
    adata, options = given_inputs
    if adata is None:
        return
    reading = {name: options[name] for name in ("layer", "library_size_key")}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path, out = Path(folder) / "cells.h5ad", Path(folder) / "codes.rvq"
        adata = adata.copy()
        for name in carried[:3]:
            if name not in adata.obs.columns:
                adata.obs[name] = [f"{name} {i}" for i in range(adata.n_obs)]
        try:
            adata.write_h5ad(path)
        except Exception:  # anndata cannot write it
            return
        given = anndata.read_h5ad(path) if readable(path) else None

        def in_parts():
            rvqa.encode(path, tokenizer(), out=out, obs=carried, progress=False, **reading)

        results = []
        for call in (lambda: rvqa.encode(path, tokenizer(), **reading), in_parts):
            try:
                results.append(call())
                assert not list(Path(folder).glob("*.parts"))
            except InputError as error:
                results.append(error)
        assert not any("\n" in str(each) for each in results if isinstance(each, InputError))
        assert isinstance(results[0], InputError) == isinstance(results[1], InputError), results
        if isinstance(results[0], InputError):
            return
        codes = rvqa.open_codes(out)
        np.testing.assert_array_equal(results[0].obsm["rvqa_codes"], codes[:])
        assert list(codes.obs.index) == list(map(str, adata.obs_names))
        assert codes.obs.shape[1] == len(carried) + 1
        if given is not None:
            rvqa.encode(given, tokenizer(), **reading)
            np.testing.assert_array_equal(given.obsm["rvqa_codes"], codes[:])


def readable(path) -> bool:
    """Return whether anndata can read what it wrote."""
    try:
        anndata.read_h5ad(path)
    except Exception:
        return False
    return True
