"""Previous symbols and aliases: which names they resolve, and which they must not change."""

import gzip
import json
import os
from itertools import permutations

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from rvqa.data.aliases import TABLE_NAMES, AliasTable, alias_table
from rvqa.data.alignment import align, coverage_sentence, map_columns, match_columns
from rvqa.data.genes import GeneAxis
from rvqa.errors import InputError

FILLER = tuple(f"S{i}" for i in range(60))
"""Genes of no table that lift a file above the floor."""

ROWS = [
    # symbol, alias_symbol, prev_symbol, ensembl_gene_id
    ("KMT2A", "TRX1|CXXC7|SHARED", "MLL|HRX", "ENSG00000118058"),
    ("CDKN2A", "p16|SHARED|MTS", "CDKN2|MLL9", "ENSG00000147889"),
    ("MTS", "", "MTSOLD|TWICE", "ENSG00000000011"),
    ("LSMD", "HRX|OLD8", "TWICE", "ENSG00000000012"),
    ("LSM8", "OLD8", "LSMD", "ENSG00000000013"),
    ("SAMEID1", "", "SAMEOLD1", "ENSG00000000014"),
    ("SAMEID2", "", "SAMEOLD2", "ENSG00000000014"),
]
COLUMNS = ["symbol", "alias_symbol", "prev_symbol", "ensembl_gene_id"]


def frame() -> pd.DataFrame:
    rows = pd.DataFrame(ROWS, columns=COLUMNS).assign(status="Approved")
    withdrawn = pd.DataFrame([("GONE", "GONEALIAS", "MTSOLD", "", "Entry Withdrawn")], columns=[*COLUMNS, "status"])
    return pd.concat([rows, withdrawn])


def write(folder, name: str = TABLE_NAMES[0]):
    """Write the table as the HGNC does, with several names of a cell in quotes."""
    cells = frame().map(lambda text: f'"{text}"' if "|" in text else text)
    lines = ["\t".join(cells.columns), *("\t".join(row) for row in cells.itertuples(index=False))]
    data = "\n".join(lines).encode()
    path = folder / name
    path.write_bytes(gzip.compress(data, mtime=0) if name.endswith(".gz") else data)
    return path


@pytest.fixture(scope="module")
def small() -> AliasTable:
    return AliasTable(frame())


@pytest.fixture
def no_folder(monkeypatch):
    monkeypatch.delenv("RVQA_REF_DIR", raising=False)


def axis_of(*genes) -> GeneAxis:
    """Return an axis of genes given as symbol or (symbol, Ensembl id), then the filler."""
    pairs = [gene if isinstance(gene, tuple) else (gene, "") for gene in (*genes, *FILLER)]
    symbols, ids = zip(*pairs, strict=True)
    return GeneAxis(symbols, ids)


def var_of(*genes) -> pd.DataFrame:
    pairs = [gene if isinstance(gene, tuple) else (gene, "") for gene in (*genes, *FILLER)]
    symbols, ids = zip(*pairs, strict=True)
    return pd.DataFrame({"gene_symbol": symbols, "ensembl_id": ids}, index=[f"row{i}" for i in range(len(pairs))])


def pairs(axis: GeneAxis) -> list[tuple[str, str]]:
    return list(zip(axis.symbols, axis.ensembl_ids, strict=True))


def resolved(table, file_genes, axis_genes) -> list[int]:
    """Return the axis column of each gene of a file, -1 for none."""
    found = align(var_of(*file_genes), axis_of(*axis_genes), aliases=table)
    assert (found.column_map[len(file_genes) :] == np.arange(len(FILLER)) + len(axis_genes)).all()
    return found.column_map[: len(file_genes)].tolist()


class TestNames:
    @pytest.mark.parametrize(
        ("name", "symbol"),
        [
            ("KMT2A", "KMT2A"),
            ("MLL", "KMT2A"),
            ("CXXC7", "KMT2A"),
            ("HRX", "KMT2A"),  # previous symbol of one gene, alias of another
            ("MTSOLD", "MTS"),  # and of a withdrawn entry
            ("MTS", "MTS"),  # also alias of another gene
            ("TWICE", None),  # previous symbol of two
            ("SHARED", None),  # alias of two
            ("LSMD", None),  # approved symbol of one gene, previous symbol of another
            ("mll", None),
            ("GONE", None),
            ("GONEALIAS", None),
            ("", None),
        ],
    )
    def test_a_symbol_is_one_gene_or_none(self, small, name, symbol):
        expected = -1 if symbol is None else [row[0] for row in ROWS].index(symbol)
        assert small.genes([name], [""]).tolist() == [expected]

    def test_an_ensembl_id_of_the_table_decides(self, small):
        symbols = ["MLL", "LSMD", "MLL", "SAMEOLD2"]
        ids = ["ENSG00000147889", "ENSG00000000012", "ENSG00000999999", "ENSG00000000014"]
        assert small.genes(symbols, ids).tolist() == [1, 3, 0, 6]


class TestResolving:
    @pytest.mark.parametrize(
        ("in_file", "on_axis"),
        [
            ("MLL", "KMT2A"),
            ("KMT2A", "MLL"),
            ("MLL", "HRX"),
            ("CXXC7", "MLL"),
            ("p16", ("CDKN2A", "ENSG00000147889")),
            ("MLL", ("anything", "ENSG00000118058")),
            (("anything", "ENSG00000118058"), "MLL"),
            (("", "ENSG00000118058"), "KMT2A"),
            (("MLL", "ENSG00000999999"), "KMT2A"),
        ],
    )
    def test_is_in_both_directions(self, small, in_file, on_axis):
        assert resolved(small, [in_file], [on_axis]) == [0]
        assert resolved(False, [in_file], [on_axis]) == [-1]

    @pytest.mark.parametrize(
        ("in_file", "on_axis"),
        [
            ("SHARED", "KMT2A"),
            ("TWICE", "LSMD"),
            ("LSMD", "LSM8"),
            ("MTS", "CDKN2A"),
            ("HRX", ("LSMD", "ENSG00000000012")),
            (("MLL", "ENSG00000147889"), "KMT2A"),
        ],
    )
    def test_leaves_open_what_leaves_a_choice(self, small, in_file, on_axis):
        assert resolved(small, [in_file], [on_axis]) == [-1]

    def test_an_exact_match_keeps_its_gene_to_itself(self, small):
        assert resolved(small, ["MLL", "KMT2A"], ["KMT2A"]) == [-1, 0]
        assert resolved(small, ["MLL", ("x", "ENSG00000118058")], [("KMT2A", "ENSG00000118058")]) == [-1, 0]
        assert resolved(small, ["MLL", "KMT2A"], ["KMT2A", "MLL"]) == [1, 0]
        assert resolved(small, ["CXXC7", "KMT2A"], ["KMT2A", "MLL"]) == [-1, 0]

    def test_two_names_of_one_gene_on_the_axis_are_a_choice(self, small):
        assert resolved(small, ["CXXC7"], ["KMT2A", "MLL"]) == [-1]

    def test_two_names_of_one_gene_in_the_file_add_up(self, small):
        axis, var = axis_of("KMT2A"), var_of("MLL", "CXXC7")
        found = align(var, axis, aliases=small)
        assert (found.n_by_symbol, found.n_by_alias, found.n_duplicates, found.n_measured) == (60, 2, 1, 61)
        counts = np.zeros((1, 62), dtype=np.float32)
        counts[0, :2] = 3, 4
        assert map_columns(sp.csr_matrix(counts), found)[0, 0] == 7

    def test_is_reported(self, small):
        found = align(var_of("MLL", "p16", "nothing"), axis_of("KMT2A", "CDKN2A"), aliases=small)
        assert json.loads(json.dumps(found.report()))["n_by_alias"] == found.n_by_alias == 2
        assert "60 by symbol, 2 by a previous symbol or alias, 1 not (e.g. 'nothing')." in coverage_sentence(
            found.report()
        )
        without = align(var_of("MLL", "p16", "nothing"), axis_of("KMT2A", "CDKN2A"), aliases=False)
        assert without.report()["n_by_alias"] == 0
        assert "alias" not in coverage_sentence(without.report())

    def test_lifts_a_file_above_the_floor(self, small):
        axis = GeneAxis((*FILLER[:49], "KMT2A"), ("",) * 50)
        var = pd.DataFrame(index=[*FILLER[:49], "MLL"])
        assert align(var, axis, aliases=small).coverage == 1
        with pytest.raises(InputError, match="49 of the model's 50 genes found"):
            align(var, axis, aliases=False)


class TestUnion:
    """Files that name a gene in two ways, which only the table joins."""

    @staticmethod
    def union(table, *files) -> list[tuple[str, str]]:
        """Return the genes of the union without the filler; the order of files must not matter."""
        sizes = set()
        for order in permutations(files):
            axes = [axis_of(*file) for file in order]
            union = GeneAxis.union(axes, aliases=table)
            for axis in axes:
                assert (match_columns(axis.to_frame(), union, aliases=table) >= 0).all()
            sizes.add(len(union))
        assert len(sizes) == 1
        first = GeneAxis.union([axis_of(*file) for file in files], aliases=table)
        genes = zip(first.symbols, first.ensembl_ids, strict=True)
        return [(symbol, name) for symbol, name in genes if symbol not in FILLER]

    def test_joins_symbols_ids_and_former_symbols(self, small):
        kmt2a = "ENSG00000118058"
        files = [["MLL"], [(kmt2a, kmt2a)], ["KMT2A"], ["CXXC7"]]
        assert self.union(small, *files) == [("MLL", kmt2a)]
        assert len(self.union(False, *files)) == 4
        assert self.union(small, ["KMT2A"], [("MLL", "ENSG00000999999")]) == [("KMT2A", "ENSG00000999999")]
        assert self.union(small, [("KMT2A", kmt2a)], [("HRX", "ENSG00000999999")]) == [("KMT2A", kmt2a)]

    @pytest.mark.parametrize(
        "files",
        [
            [["SHARED"], ["KMT2A"]],
            [["TWICE"], ["MTS"]],
            [["LSMD"], [("ENSG00000000012", "ENSG00000000012")]],
            [["KMT2A"], ["unknown"]],
            # One file has both names, so they are two genes.
            [["KMT2A", "MLL"], ["KMT2A"]],
            # The names as written agree, so they are one gene whatever the table has; it then joins nothing else.
            [[("MLL", "ENSG00000147889")], ["MLL"], ["KMT2A"]],
            [[("MLL", "ENSG00000147889")], ["MLL"], ["CDKN2A"]],
        ],
    )
    def test_joins_nothing_that_leaves_a_choice(self, small, files):
        assert len(self.union(small, *files)) == 2

    def test_is_read_from_the_folder(self, monkeypatch, tmp_path):
        write(tmp_path)
        monkeypatch.setenv("RVQA_REF_DIR", str(tmp_path))
        assert len(GeneAxis.union([axis_of("MLL"), axis_of("KMT2A")])) == len(FILLER) + 1
        monkeypatch.delenv("RVQA_REF_DIR")
        assert len(GeneAxis.union([axis_of("MLL"), axis_of("KMT2A")])) == len(FILLER) + 2


class TestWhereTheTableIs:
    def test_none_without_a_folder_or_a_table_in_it(self, no_folder, monkeypatch, tmp_path):
        assert alias_table() is None
        for value in ("", str(tmp_path), str(tmp_path / "absent")):
            monkeypatch.setenv("RVQA_REF_DIR", value)
            assert alias_table() is None
            assert align(var_of("MLL"), axis_of("KMT2A")).n_by_alias == 0

    @pytest.mark.parametrize("name", TABLE_NAMES)
    def test_in_the_folder_or_given_and_read_once(self, monkeypatch, tmp_path, name):
        path = write(tmp_path, name)
        monkeypatch.setenv("RVQA_REF_DIR", str(tmp_path))
        found = alias_table()
        assert found is alias_table(path) is alias_table(str(path)) is alias_table(tmp_path) is alias_table(found)
        assert len(found) == len(ROWS)
        assert alias_table(False) is None
        axis = axis_of("KMT2A")
        assert align(var_of("MLL"), axis).n_by_alias == align(var_of("MLL"), axis, aliases=path).n_by_alias == 1
        assert align(var_of("MLL"), axis, aliases=False).n_by_alias == 0

    def test_is_read_again_if_it_changed(self, tmp_path):
        path = write(tmp_path)
        before = alias_table(path)
        os.utime(path, ns=(1, 1))
        assert alias_table(path) is not before

    def test_a_path_given_must_be_one(self, no_folder, tmp_path):
        with pytest.raises(InputError, match=r"No table of gene aliases at .*hgnc_complete_set.txt.gz"):
            alias_table(tmp_path)

    @pytest.mark.parametrize(
        ("data", "said"),
        [
            (
                gzip.compress(b"symbol\tstatus\nA\tApproved\n", mtime=0),
                r"lacks the columns \['alias_symbol', 'prev_symbol',",
            ),
            (b"no gzip", "cannot be read as HGNC's table"),
            (gzip.compress(b"symbol\tstatus\n" * 999, mtime=0)[:-30], "cannot be read as HGNC's table"),
            (gzip.compress(b"", mtime=0), "cannot be read as HGNC's table"),
        ],
    )
    def test_a_file_that_is_no_table_is_named(self, tmp_path, data, said):
        path = tmp_path / TABLE_NAMES[0]
        path.write_bytes(data)
        with pytest.raises(InputError, match=f"{path}.*{said}"):
            alias_table(path)


class TestRealTable:
    @pytest.fixture(scope="class")
    def hgnc(self, ref_dir) -> AliasTable:
        if not any((ref_dir / name).is_file() for name in TABLE_NAMES):
            pytest.skip(f"no {TABLE_NAMES[0]} in {ref_dir}")
        return alias_table(ref_dir)

    @pytest.fixture(scope="class")
    def names(self, ref_dir) -> pd.DataFrame:
        """Read the HGNC's table independently of the code under test."""
        with gzip.open(ref_dir / TABLE_NAMES[0], "rt") as file:
            header, *rows = [[cell.strip('"') for cell in line.rstrip("\n").split("\t")] for line in file]
        table = pd.DataFrame(rows, columns=header)
        return table[table["status"] == "Approved"].set_index("symbol")

    @pytest.fixture(scope="class")
    def axis(self, read) -> GeneAxis:
        return GeneAxis.from_adata(read("pbmc3k_10x"))

    def test_knows_famous_ones(self, hgnc):
        pairs = {"MLL": "KMT2A", "FAM46C": "TENT5C", "SEPT7": "SEPTIN7", "GPR56": "ADGRG1", "CD20": "MS4A1"}
        old, new = hgnc.genes(list(pairs), [""] * 5), hgnc.genes(list(pairs.values()), [""] * 5)
        assert (old >= 0).all()
        assert old.tolist() == new.tolist()

    def test_pbmc3k_under_previous_symbols_is_the_same_file(self, hgnc, names, axis):
        previous = {symbol: cell.split("|") for symbol, cell in names["prev_symbol"].items() if cell}
        times = pd.Series([name for each in previous.values() for name in each]).value_counts()
        own = set(axis.symbols)
        taken = own | set(names.index)
        renamed = list(axis.symbols)
        for at, symbol in enumerate(axis.symbols):
            unique = [name for name in previous.get(symbol, []) if times[name] == 1 and name not in taken]
            # Not if it is ambiguous: the axis has the gene under two names, or another gene had its name before.
            if unique and not own & set(previous[symbol]) and symbol not in times.index:
                renamed[at] = unique[0]
        changed = np.array(renamed) != np.array(axis.symbols)
        assert changed.sum() > 3500
        same = np.arange(len(axis))
        for on_axis in (axis, GeneAxis(axis.symbols, ("",) * len(axis))):
            var = pd.DataFrame(index=renamed)
            found = align(var, on_axis, aliases=hgnc)
            assert np.array_equal(found.column_map, same)
            assert found.n_by_alias == changed.sum()
            assert align(var, on_axis, aliases=False).n_measured == np.count_nonzero(~changed)
        # The reverse: the model has the old names, the file has the new ones or only Ensembl ids.
        old_axis = GeneAxis(tuple(renamed), ("",) * len(axis))
        assert np.array_equal(align(pd.DataFrame(index=axis.symbols), old_axis, aliases=hgnc).column_map, same)
        ids = [name or symbol for symbol, name in zip(axis.symbols, axis.ensembl_ids, strict=True)]
        by_id = align(pd.DataFrame(index=ids), old_axis, aliases=hgnc).column_map
        assert np.array_equal(by_id[changed], same[changed])
        assert ((by_id == same) | (by_id == -1)).all()
        assert np.mean(by_id >= 0) > 0.99

    def test_changes_nothing_that_matches_as_written(self, hgnc, read, axis):
        for name in ("pbmc3k_10x", "tian2019_lung_cancer_lines", "kang2018_ifnb_pbmc_2k"):
            var = read(name).var
            without, found = align(var, axis, aliases=False), align(var, axis, aliases=hgnc)
            exact = without.column_map >= 0
            assert np.array_equal(found.column_map[exact], without.column_map[exact])
            added = found.column_map[~exact]
            assert not without.measured[added[added >= 0]].any()
            assert found.n_by_alias == np.count_nonzero(added >= 0)
            assert found.measured[without.measured].all()

    def test_newer_symbols_find_the_right_genes_of_an_older_file(self, hgnc, read, axis):
        old, new = read("pbmc3k_10x"), read("pbmc5k_citeseq_4000genes")
        exact = align(new, axis, aliases=False).column_map
        found = align(new, axis, aliases=hgnc)
        by_alias = np.flatnonzero((exact < 0) & (found.column_map >= 0))
        assert found.n_by_alias == by_alias.size > 80

        def agreement(columns: np.ndarray) -> float:
            """Return the rank correlation, over genes, of mean counts in two files of the same tissue."""
            means = pd.DataFrame({"new": np.asarray(new.X.mean(0)).ravel()[columns]})
            means["old"] = np.asarray(old.X.mean(0)).ravel()[found.column_map[columns]]
            return means.rank().corr().iloc[0, 1]

        assert agreement(by_alias) > agreement(np.flatnonzero(exact >= 0)) - 0.05  # 0.84 and 0.85

    def test_joins_symbols_and_ids_of_the_same_genes(self, hgnc, read):
        for name in ("pbmc3k_10x", "tian2019_lung_cancer_lines"):
            genes = GeneAxis.from_adata(read(name))
            genes = genes.subset([at for at, each in enumerate(genes.ensembl_ids) if each])
            ids = GeneAxis(genes.ensembl_ids, genes.ensembl_ids)
            axes = [GeneAxis(genes.symbols, tuple(each if each == text else "" for text, each in pairs(genes))), ids]
            union = GeneAxis.union(axes, aliases=hgnc)
            assert len(union) < 1.02 * len(genes)  # 0.6 and 1.3 % have names that are not in the table
            maps = [match_columns(each.to_frame(), union, aliases=hgnc) for each in axes]
            together = np.isin(maps[0], maps[1])
            assert np.array_equal(maps[0][together], maps[1][together]), "no gene is joined to another"
            turned = GeneAxis.union(axes[::-1], aliases=hgnc)
            assert set(pairs(turned)) == set(pairs(union))

    def test_mouse_genes_are_still_refused(self, hgnc, axis):
        names = pd.DataFrame(index=[symbol.capitalize() for symbol in axis.symbols])
        with pytest.raises(InputError, match="mouse genes"):
            align(names, axis, aliases=hgnc)
