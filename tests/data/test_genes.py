"""The gene axis, and the mapping of a file's genes onto it."""

import json
import subprocess
import sys
from itertools import combinations, permutations

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rvqa.data.aliases import AliasSource, AliasTable
from rvqa.data.alignment import CoverageWarning, align, coverage_sentence, map_columns, match_columns, refuse_transposed
from rvqa.data.genes import GeneAxis
from rvqa.data.shared_genes import SharedGenes, require_shared, shared_sentence
from rvqa.errors import InputError
from tests.raw_counts import raw_counts

quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
seeds = st.integers(0, 2**32 - 1)

DATA_FILES = (
    *("pbmc3k_10x", "kang2018_ifnb_pbmc_2k", "kang2018_ctrl_pbmc_12k_1287genes", "zheng2017_sorted_pbmc_3500"),
    *("pbmc5k_citeseq_4000genes", "pbmc68k_reduced_700", "he2020_bone_marrow_421genes", "tian2019_lung_cancer_lines"),
    "papalexi2021_eccite_thp1_299genes",
)


def ensg(number: int) -> str:
    return f"ENSG{number:011d}"


def axis_of(n: int) -> GeneAxis:
    """Genes S0, S1, ...; every third has no Ensembl id."""
    return GeneAxis(tuple(f"S{i}" for i in range(n)), tuple("" if i % 3 == 0 else ensg(i) for i in range(n)))


def table(names, **columns) -> pd.DataFrame:
    return pd.DataFrame(columns, index=pd.Index(names, dtype=object))


def random_counts(rng, n_cells: int, n_genes: int) -> sp.csr_matrix:
    return sp.csr_matrix(rng.poisson(0.7, (n_cells, n_genes)).astype(np.float32))


def random_axis(rng, n: int) -> GeneAxis:
    """Draw from few names, so that all kinds of coincidence occur."""
    ids = [ensg(i) if rng.random() < 0.6 else "" for i in rng.choice(15, n, replace=False)]
    symbols = rng.choice(15, n, replace=False)
    names = [f"S{i}" if rng.random() < 0.8 or not name else name for i, name in zip(symbols, ids, strict=True)]
    return GeneAxis(tuple(names), tuple(ids))


def joined_genes(axes, union: GeneAxis, aliases: AliasSource) -> set[frozenset[tuple[int, int]]]:
    """Return genes as (file, place) that are one on the union; all must be on it, and two of a file never one."""
    genes: dict[int, list[tuple[int, int]]] = {}
    for file, axis in enumerate(axes):
        column_map = match_columns(axis.to_frame().set_index("gene_symbol", drop=False), union, aliases=aliases)
        assert (column_map >= 0).all()
        assert len(set(column_map)) == len(column_map)
        for place, gene in enumerate(column_map.tolist()):
            genes.setdefault(gene, []).append((file, place))
    assert len(genes) == len(union)
    return set(map(frozenset, genes.values()))


def same(a: sp.csr_matrix, b: sp.csr_matrix) -> bool:
    parts = [(a.data, b.data), (a.indices, b.indices), (a.indptr, b.indptr)]
    return a.shape == b.shape and all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in parts)


def test_importing_genes_and_counts_is_cheap():
    heavy = "{'torch', 'transformers', 'anndata', 'scanpy'}"
    code = f"import sys, rvqa.data.genes, rvqa.data.counts; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


class TestAxis:
    def test_has_an_order_a_length_and_a_table(self):
        axis = GeneAxis(("CD3D", "MS4A1"), ("ENSG00000167286.7", ""))
        assert len(axis) == 2
        assert axis.ensembl_ids == ("ENSG00000167286", "")
        assert axis.to_frame().to_dict("list") == {
            "gene_symbol": ["CD3D", "MS4A1"],
            "ensembl_id": ["ENSG00000167286", ""],
        }

    @pytest.mark.parametrize(
        ("symbols", "ids", "said"),
        [
            ((), (), "0 symbols"),
            (("A", "B"), ("",), "2 symbols and 1 Ensembl ids"),
            (("A", "A"), ("", ""), "symbol 'A' occurs more than once"),
            (("A", "B"), (ensg(1), ensg(1) + ".3"), "occurs more than once"),
            (("A", ""), ("", ""), "Gene 1 of the axis has no symbol"),
            (("Xkr4",), ("ENSMUSG00000051951",), "not a human Ensembl gene id"),
        ],
    )
    def test_refuses_genes_that_are_not_named_once(self, symbols, ids, said):
        with pytest.raises(InputError, match=said):
            GeneAxis(symbols, ids)

    def test_is_equal_and_hashable_by_content(self):
        assert axis_of(5) == axis_of(5) != axis_of(6)
        assert len({axis_of(5), axis_of(5)}) == 1

    def test_survives_parquet(self, tmp_path):
        axis = axis_of(20)
        axis.to_frame().to_parquet(tmp_path / "genes.parquet")
        assert GeneAxis.from_frame(pd.read_parquet(tmp_path / "genes.parquet")) == axis

    def test_from_frame_names_the_columns_it_misses(self):
        with pytest.raises(InputError, match=r"lacks \['ensembl_id'\].*\['gene_symbol', 'x'\]"):
            GeneAxis.from_frame(pd.DataFrame({"gene_symbol": ["A"], "x": [1]}))

    def test_subset_takes_indices_or_a_mask_in_the_order_given(self):
        axis = axis_of(4)
        assert axis.subset([3, 1]).symbols == ("S3", "S1")
        assert axis.subset(np.array([False, True, False, True])) == axis.subset([1, 3])

    def test_from_adata_merges_one_gene_and_splits_homonyms(self):
        symbols = ["TBCE", "TBCE", "A", "A", None, "B", "B2"]
        ids = [ensg(1), ensg(2), "", ensg(3) + ".5", ensg(4), ensg(5), ensg(5)]
        var = table([str(i) for i in range(7)], gene_symbols=symbols, gene_ids=ids)
        axis = GeneAxis.from_adata(AnnData(var=var))
        assert axis.symbols == ("TBCE", ensg(2), "A", ensg(4), "B")
        assert axis.ensembl_ids == (ensg(1), ensg(2), ensg(3), ensg(4), ensg(5))

    def test_from_adata_refuses_genes_without_names(self):
        with pytest.raises(InputError, match=r"60 of 60 genes have neither.*'0', '1'.*adata.var_names"):
            GeneAxis.from_adata(AnnData(np.ones((2, 60))))


class TestUnion:
    def test_is_by_ensembl_id_then_by_symbol_in_first_seen_order(self):
        first = GeneAxis(("A", "B", "C"), ("", ensg(2), ""))
        second = GeneAxis(("D", "A", "renamed B"), ("", ensg(1), ensg(2)))
        assert GeneAxis.union([first, second]) == GeneAxis(("A", "B", "C", "D"), (ensg(1), ensg(2), "", ""))

    def test_fills_in_a_symbol_for_a_gene_known_by_its_id(self):
        first = GeneAxis((ensg(1), "B"), (ensg(1), ""))
        assert GeneAxis.union([first, GeneAxis(("A",), (ensg(1),))]) == GeneAxis(("A", "B"), (ensg(1), ""))

    def test_one_symbol_with_two_ids_is_one_gene(self):
        axes = [GeneAxis(("A",), (ensg(1),)), GeneAxis(("A",), (ensg(2),))]
        assert GeneAxis.union(axes) == axes[0]

    @pytest.mark.parametrize("order", permutations(range(4)))
    def test_a_file_with_both_names_joins_files_with_one_each(self, order):
        n = 9
        symbols, ids = tuple(f"S{i}" for i in range(n)), tuple(map(ensg, range(n)))
        axes = [GeneAxis(symbols, ("",) * n), GeneAxis(ids, ids), GeneAxis(symbols[3:] + ids[:3], ids[3:] + ids[:3])]
        axes.append(GeneAxis(symbols[:3][::-1], ids[:3][::-1]))
        union = GeneAxis.union([axes[i] for i in order], aliases=False)
        assert set(zip(union.symbols, union.ensembl_ids, strict=True)) == set(zip(symbols, ids, strict=True))

    @pytest.mark.parametrize("order", permutations(range(3)))
    @pytest.mark.parametrize(
        ("files", "expected"),
        [
            # A symbol that two genes of one file share identifies neither of them.
            ([[("A", 1), ("B", 2)], [("A", 2)], [("A", 0)]], [[(0, 0)], [(0, 1), (1, 0)], [(2, 0)]]),
            # Nor does a symbol identify a gene that the same file has separately.
            ([[("A", 0), ("B", 1)], [("A", 1)], [("C", 3)]], [[(0, 0)], [(0, 1), (1, 0)], [(2, 0)]]),
            # Ids that changed, one of them without a symbol elsewhere.
            ([[("A", 1)], [("A", 2)], [("", 1)]], [[(0, 0), (1, 0), (2, 0)]]),
            # With two of these, either may be the gene.
            ([[("A", 1)], [("A", 2)], [("", 1), ("", 2)]], [[(0, 0), (2, 0)], [(1, 0), (2, 1)]]),
            # A gene gets one symbol, the one that more files have.
            ([[("A", 1), ("C", 0)], [("B", 1)], [("A", 0), ("D", 0)]], [[(0, 0), (1, 0), (2, 0)], [(0, 1)], [(2, 1)]]),
        ],
    )
    def test_ambiguous_names_join_nothing_in_any_order(self, order, files, expected):
        axes = [
            GeneAxis(tuple(s or ensg(i) for s, i in file), tuple((i and ensg(i)) or "" for _, i in file))
            for file in files
        ]
        union = GeneAxis.union([axes[i] for i in order], aliases=False)
        assert joined_genes(axes, union, False) == {frozenset(each) for each in expected}

    @quick
    @given(st.lists(st.tuples(seeds, st.integers(1, 12)), min_size=1, max_size=4), seeds)
    def test_holds_every_gene_of_every_axis_in_any_order(self, drawn, seed):
        axes = [random_axis(np.random.default_rng(each), n) for each, n in drawn]
        union = GeneAxis.union(axes, aliases=False)
        assert GeneAxis.union([axes[0]], aliases=False) == axes[0]
        assert GeneAxis.union([union, *axes], aliases=False) == union
        order = np.random.default_rng(seed).permutation(len(axes))
        turned = GeneAxis.union([axes[i] for i in order], aliases=False)
        assert joined_genes(axes, union, False) == joined_genes(axes, turned, False)

    @quick
    @given(st.lists(st.tuples(seeds, st.integers(1, 12)), min_size=2, max_size=4), seeds)
    def test_and_so_with_any_table(self, drawn, seed):
        rng = np.random.default_rng(seed)
        names = [[f"S{i}" for i in rng.choice(15, rng.integers(0, 3))] for _ in range(16)]
        hgnc = AliasTable(
            pd.DataFrame(
                {
                    "symbol": [f"S{i}" for i in range(8)],
                    "alias_symbol": ["|".join(each) for each in names[:8]],
                    "prev_symbol": ["|".join(each) for each in names[8:]],
                    "ensembl_gene_id": [ensg(i) if rng.random() < 0.7 else "" for i in rng.permutation(15)[:8]],
                    "status": "Approved",
                }
            )
        )
        axes = [random_axis(np.random.default_rng(each), n) for each, n in drawn]
        union = GeneAxis.union(axes, aliases=hgnc)
        assert len(union) <= len(GeneAxis.union(axes, aliases=False))
        turned = GeneAxis.union([axes[i] for i in rng.permutation(len(axes))], aliases=hgnc)
        assert joined_genes(axes, union, hgnc) == joined_genes(axes, turned, hgnc)


class TestShared:
    def test_says_how_many_genes_files_share(self):
        whole, part = axis_of(200), axis_of(300).subset(range(100, 300))
        union = GeneAxis.union([whole, part])
        found = require_shared(["a", "b"], [whole, part.to_frame()], union)
        assert found == SharedGenes(300, 100, (200, 200))
        assert shared_sentence(found) == "genes: 300 in all, 100 shared by all 2 files"
        assert shared_sentence(require_shared(["a"], [whole], whole)) == "genes: 200"

    def test_refuses_a_file_that_is_named_in_another_way(self, monkeypatch):
        monkeypatch.delenv("RVQA_REF_DIR", raising=False)  # the message advises to set it
        symbols = GeneAxis(tuple(f"S{i}" for i in range(4000)), ("",) * 4000)
        ids = tuple(map(ensg, range(3997)))
        other = GeneAxis((*ids, "S1", "S2", "S3"), (*ids, "", "", ""))
        said = (
            r"b\.h5ad shares 3 of its 4,000 genes with a\.h5ad \(4,000 genes\), .* like 'ENSG00000000000', "
            r"'ENSG00000000001' in it and 'S0', 'S4' there\. .*var\['gene_symbol'\].*RVQA_REF_DIR"
        )
        with pytest.raises(InputError, match=said):
            require_shared(["a.h5ad", "b.h5ad"], [symbols, other], GeneAxis.union([symbols, other]))
        files = {"a": symbols, "b": other, "c": symbols, "d": other}
        with pytest.raises(InputError, match=r"b shares 3 .* with the other files"):
            require_shared(list(files), list(files.values()), GeneAxis.union(files.values()))

    def test_files_are_linked_through_others(self):
        axis = axis_of(3000)
        panels = [axis.subset(range(0, 300)), axis.subset(range(2000, 2300)), axis]
        require_shared("abc", panels, axis)
        with pytest.raises(InputError, match="b shares 0 of its 300 genes with a "):
            require_shared("ab", panels[:2], axis)


class TestAlign:
    def test_takes_ids_and_symbols_from_wherever_they_stand(self):
        axis = axis_of(60)
        expected = np.arange(60)
        by_id = [name or symbol for symbol, name in zip(axis.symbols, axis.ensembl_ids, strict=True)]
        rows = [f"row{i}" for i in range(60)]
        for var in (
            table(axis.symbols),
            table(by_id),
            table([f"{name}.{i}" if "ENSG" in name else name for i, name in enumerate(by_id)]),
            table(rows, gene_ids=axis.ensembl_ids, feature_name=pd.Categorical(axis.symbols)),
            table(rows, Gene_Symbol=axis.symbols),
            table(axis.symbols, ensembl_id=[None] * 60, gene_id=range(60)),
            table([str(i) for i in range(60)], gene_symbol=by_id),
            table(rows, gene_symbol=[name.encode() for name in axis.symbols]),
            pd.DataFrame(np.stack([axis.symbols, rows], axis=1), columns=["symbol", "symbol"], index=rows),
        ):
            assert np.array_equal(align(var, axis).column_map, expected)

    def test_counts_what_matched_how(self):
        axis = axis_of(60)
        var = table(["other", *axis.symbols, ensg(1)], ensembl_id=["", *axis.ensembl_ids, ""])
        found = align(AnnData(var=var), axis)
        assert (found.n_file, found.n_axis, found.n_measured, found.coverage) == (62, 60, 60, 1.0)
        assert (found.n_by_ensembl, found.n_by_symbol, found.n_duplicates) == (41, 20, 1)
        assert found.column_map.dtype == np.int32
        assert found.column_map.tolist() == [-1, *range(60), 1]
        assert found.unmatched == ("other",)
        assert "60 of the model's 60 genes (100.0 %)" in coverage_sentence(found.report())
        assert "41 were matched by Ensembl id, 20 by symbol (1 repeat" in coverage_sentence(found.report())
        assert json.loads(json.dumps(found.report()))["unmatched_examples"] == ["other"]

    def test_ensembl_id_wins_over_symbol(self):
        axis = axis_of(60)
        names = list(axis.symbols)
        names[1], names[2] = names[2], names[1]
        assert align(table(names, ensembl_id=axis.ensembl_ids), axis).column_map.tolist() == list(range(60))

    def test_an_unknown_ensembl_id_leaves_the_symbol(self):
        axis = axis_of(60)
        found = align(table(axis.symbols, ensembl_id=[ensg(1000 + i) for i in range(60)]), axis)
        assert (found.n_by_ensembl, found.n_by_symbol) == (0, 60)

    def test_does_not_guess(self):
        axis = GeneAxis((*(f"S{i}" for i in range(60)), "RP11-206L10.2"), ("",) * 61)
        found = align(table([*axis.symbols[:60], "s1", "S1.1", "RP11-206L10", "MTS1", " S2 "]), axis)
        assert found.column_map.tolist() == [*range(60), -1, -1, -1, -1, 2]

    def test_alignment_cannot_be_changed(self):
        found = align(table(axis_of(60).symbols), axis_of(60))
        with pytest.raises(ValueError, match="read-only"):
            found.column_map[0] = 3

    def test_warns_below_a_fifth_of_the_axis(self):
        axis = axis_of(1000)
        with pytest.warns(CoverageWarning, match=r"Only 199 of the model's 1,000 genes \(19.9 %\)"):
            align(table(axis.symbols[:199]), axis)
        assert align(table(axis.symbols[:200]), axis).coverage == 0.2

    def test_refuses_below_the_floor(self):
        axis = axis_of(4000)
        names = [*axis.symbols[:12], *(f"Q{i}X" for i in range(688))]
        with pytest.raises(
            InputError,
            match=r"12 of the model's 4,000 genes found among 700 genes named like 'S0', 'S1'; at least 50 are",
        ):
            align(table(names), axis)
        with pytest.warns(CoverageWarning):
            align(table(axis.symbols[:50]), axis)
        assert align(table(axis_of(7).symbols), axis_of(7)).coverage == 1

    @pytest.mark.parametrize(
        ("var", "said"),
        [
            (table([str(i) for i in range(300)]), "named like '0', '1'.*look like row numbers.*var_names"),
            (table([str(i) for i in range(1, 301)]), "named like '1', '2'.*look like row numbers.*var_names"),
            (
                table([str(1000 + 7 * i) for i in range(300)]),
                "look like Entrez ids or other numbers, which are not read",
            ),
            (table([f"ENSMUSG{i:011d}" for i in range(300)]), "mouse genes.*orthologues"),
            (table(["Gm1992", "Xkr4", "Rp1", "4933401J01Rik"] * 30), "'Gm1992', 'Xkr4'.*mouse genes.*orthologues"),
            (table([f"ENSMUSG{i:011d}" for i in range(9)], gene_symbol=["Xkr4"] * 9), "'Xkr4'.*mouse genes"),
            (table([f"mm10___S{i}" for i in range(300)]), "genes of mm10 and the model knows human ones"),
            (table(["C1orf43", "CD3D", "MS4A1"]), r"named like 'S0', 'S1'\. Put human gene symbols"),
            (table([]), "0 of the model's 60 genes found among 0 genes"),
            (
                table(range(60), note=["x"] * 60, xyz=pd.Categorical([f"S{i}" for i in range(60)])),
                r"var\['xyz'\] holds 60 of them: adata\.var_names = adata\.var\['xyz'\]\.$",
            ),
            (
                table(["Xkr4"] * 55, human=[f"GRCh38_{ensg(i)}.2" if i % 3 else f"S{i}" for i in range(55)]),
                "holds 55 of",
            ),
            (table(["Xkr4"] * 60, few=[f"S{min(i, 48)}" for i in range(60)]), "look like mouse genes"),
        ],
    )
    def test_says_what_the_names_look_like(self, var, said):
        with pytest.raises(InputError, match=said):
            align(var, axis_of(60))

    def test_the_column_it_names_is_the_one_to_take(self):
        adata = AnnData(var=table([str(i) for i in range(60)], xyz=pd.Categorical([f"S{i}" for i in range(60)])))
        adata.var_names = adata.var["xyz"]
        assert align(adata, axis_of(60)).coverage == 1

    def test_reports_what_was_left_out(self):
        found = align(table(axis_of(60).symbols), axis_of(60), left_out={"Custom": 2})
        assert found.report()["left_out"] == {"Custom": 2}
        assert coverage_sentence(found.report()).endswith(
            "0 not. 2 features are not genes and were left out (Custom 2)."
        )
        report = align(table(axis_of(60).symbols), axis_of(60)).report()
        assert report.pop("left_out") == {}
        assert coverage_sentence(report).endswith(", 0 not.")

    def test_refuses_mouse_genes_that_match_by_chance(self):
        axis = axis_of(4000)
        names = [*axis.symbols[:60], *(f"Gm{i}" for i in range(500))]
        with pytest.raises(
            InputError, match=r"60 of the model's 4,000 genes found .*'S0', 'S1'\. These look like mouse"
        ):
            align(table(names), axis)
        assert align(table([*axis.symbols[:900], *(f"Gm{i}" for i in range(1000))]), axis).n_measured == 900


class TestTransposed:
    def test_is_said_of_cells_named_like_genes_alone(self):
        axis = axis_of(400)
        for obs in (table(axis.symbols), table(range(400), gene_ids=axis.ensembl_ids)):
            turned = AnnData(np.ones((400, 70), dtype=np.float32), obs=obs)
            with pytest.raises(InputError, match=r"looks transposed: .*'S\d', 'S\d'.* 400 cells.*adata\.T"):
                refuse_transposed(turned, axis)
        refuse_transposed(AnnData(var=table(axis.symbols[:50]), obs=table(axis.symbols)), axis)
        # In a screen, the knocked-out gene is not the name of a cell.
        refuse_transposed(AnnData(obs=table(range(4000), gene=[f"S{i % 100}" for i in range(4000)])), axis)


class TestMapColumns:
    @quick
    @given(seeds, st.booleans())
    def test_result_depends_on_the_genes_and_not_on_how_the_file_holds_them(self, seed, wide):
        rng = np.random.default_rng(seed)
        axis = axis_of(80)
        present = rng.permutation(80)[: rng.integers(50, 81)]
        counts = random_counts(rng, 5, present.size)
        expected = np.zeros((5, 80), dtype=np.float32)
        expected[:, present] = counts.toarray()

        # Some genes have two columns, whose counts are summed; some columns are not genes of the axis.
        split = rng.choice(present.size, 10, replace=False)
        part = rng.binomial(counts[:, split].toarray().astype(int), 0.4)
        dense = counts.toarray()
        dense[:, split] -= part
        columns = np.hstack([dense, part, rng.poisson(1.0, (5, 7))])
        which = np.concatenate([present, present[split], np.full(7, -1)])
        names = []
        for gene in which:
            forms = [f"S{gene}"] if gene % 3 == 0 else [f"S{gene}", ensg(gene), f"{ensg(gene)}.{rng.integers(1, 20)}"]
            names.append(f"none{len(names)}" if gene < 0 else forms[rng.integers(len(forms))])

        order = rng.permutation(which.size)
        stored = sp.csr_matrix(columns[:, order].astype(rng.choice([np.float32, np.int32, np.float64])))
        if wide:
            stored.indices, stored.indptr = stored.indices.astype(np.int64), stored.indptr.astype(np.int64)
        before = [part.copy() for part in (stored.data, stored.indices, stored.indptr)]
        mapped = map_columns(stored, align(table([names[i] for i in order]), axis))
        assert same(mapped, sp.csr_matrix(expected))
        assert mapped.has_canonical_format
        for part, was in zip((stored.data, stored.indices, stored.indptr), before, strict=True):
            assert part.dtype == was.dtype
            assert np.array_equal(part, was)

    def test_costs_nothing_where_nothing_changes(self):
        axis = axis_of(60)
        counts = random_counts(np.random.default_rng(0), 9, 60)
        mapped = map_columns(counts, align(table(axis.symbols), axis))
        assert np.shares_memory(mapped.data, counts.data)
        assert same(mapped, counts)

    def test_sums_are_exact_beyond_float32(self):
        axis = axis_of(60)
        found = align(table([*axis.symbols, "S5", "S5"]), axis)
        counts = np.zeros((1, 62), dtype=np.float32)
        counts[0, [5, 60, 61]] = 2**24, 1, 1  # a float32 sum would lose each 1
        assert map_columns(sp.csr_matrix(counts), found)[0, 5] == 2**24 + 2

    def test_refuses_counts_of_another_file(self):
        found = align(table(axis_of(60).symbols), axis_of(60))
        with pytest.raises(InputError, match="counts have 61 genes, the alignment was made for 60"):
            map_columns(sp.csr_matrix((2, 61)), found)


@pytest.mark.filterwarnings("ignore::rvqa.data.alignment.CoverageWarning")
class TestRealFiles:
    def test_every_file_is_an_axis_of_its_own(self, read, data_file, tmp_path):
        adata = read(data_file)
        axis = GeneAxis.from_adata(adata)
        axis.to_frame().to_parquet(tmp_path / "genes.parquet")
        assert GeneAxis.from_frame(pd.read_parquet(tmp_path / "genes.parquet")) == axis
        found = align(adata, axis)
        assert np.array_equal(found.column_map, np.arange(adata.n_vars))
        assert same(map_columns(adata.X, found), adata.X)

    def test_coverage_of_pbmc3k(self, read):
        axis = GeneAxis.from_adata(read("pbmc3k_10x"))
        percent = {
            "papalexi2021_eccite_thp1_299genes": 1.8,
            "he2020_bone_marrow_421genes": 2.4,
            "pbmc68k_reduced_700": 5.6,
            "kang2018_ctrl_pbmc_12k_1287genes": 8.7,
        }
        assert {name: round(100 * align(read(name), axis, aliases=False).coverage, 1) for name in percent} == percent

    def test_kang_with_ensembl_names_meets_an_axis_of_symbols(self, read):
        reference = GeneAxis.from_adata(read("pbmc3k_10x"))
        axis = GeneAxis(reference.symbols, ("",) * len(reference))
        kang = read("kang2018_ctrl_pbmc_12k_1287genes")
        assert kang.var_names.str.startswith("ENSG").all()
        found = align(kang, axis, aliases=False)
        assert found.n_by_symbol == found.n_measured == len(set(kang.var["gene_symbol"]) & set(axis.symbols)) > 1000
        mapped = map_columns(raw_counts(kang), found)
        for symbol in ("CD3D", "ISG15", "LYZ"):
            column = mapped[:, axis.symbols.index(symbol)].toarray()
            assert column.sum() > 0
            assert np.array_equal(column, kang.X[:, (kang.var["gene_symbol"] == symbol).to_numpy()].toarray())

    def test_union_of_all_files_holds_them_all(self, read):
        files = [
            read(name) for name in ("pbmc3k_10x", "tian2019_lung_cancer_lines", "kang2018_ctrl_pbmc_12k_1287genes")
        ]
        union = GeneAxis.union([GeneAxis.from_adata(adata) for adata in files])
        for adata in files:
            mapped = map_columns(adata.X, align(adata, union))
            assert mapped.sum(dtype=np.float64) == adata.X.sum(dtype=np.float64)

    def test_any_two_files_share_enough_and_any_order_is_the_same(self, read):
        axes = [GeneAxis.from_adata(read(name)) for name in DATA_FILES]
        union = GeneAxis.union(axes, aliases=False)
        turned = GeneAxis.union(axes[::-1], aliases=False)
        assert joined_genes(axes, union, False) == joined_genes(axes, turned, False)
        found = require_shared(DATA_FILES, axes, union, aliases=False)
        assert found.n_by_file == tuple(map(len, axes))
        for pair in combinations(axes, 2):
            require_shared("ab", pair, union, aliases=False)
        # Files with only symbols and files with only Ensembl ids share no names, even if the genes are the same.
        for whole in (each for each in axes if len(each) > 8000):
            ids = [name for name in whole.ensembl_ids if name]
            by_id, by_symbol = GeneAxis(tuple(ids), tuple(ids)), GeneAxis(whole.symbols, ("",) * len(whole))
            for pair in ((by_id, by_symbol), (by_symbol, by_id)):
                with pytest.raises(InputError, match=r"[ab] shares (0|353) of its"):
                    require_shared("ab", pair, GeneAxis.union(pair, aliases=False), aliases=False)
