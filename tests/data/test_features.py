"""Features that are not human genes: which are recognised, and which genes stay."""

import gzip

import anndata
import numpy as np
import pandas as pd
import pytest

from rvqa.data.alignment import align, coverage_sentence
from rvqa.data.features import gene_features, left_out_sentence
from rvqa.data.gene_names import without_genome
from rvqa.data.genes import GeneAxis
from rvqa.errors import InputError


def table(names, **columns) -> pd.DataFrame:
    return pd.DataFrame(columns, index=pd.Index(names, dtype=object))


def kept(var: pd.DataFrame) -> list[str]:
    mask, left_out = gene_features(var)
    assert mask.dtype == bool
    assert sum(left_out.values()) == np.count_nonzero(~mask)
    return var.index[mask].tolist()


@pytest.fixture
def pbmc(read) -> pd.DataFrame:
    return read("pbmc3k_10x").var


class TestKinds:
    @pytest.mark.parametrize(
        ("column", "gene", "others"),
        [
            ("feature_types", "Gene Expression", ["Antibody Capture", "CRISPR Guide Capture", "Custom", "Peaks"]),
            ("feature_types", "Gene Expression", ["Negative Control Probe", "words of next year"]),
            ("feature_types", "GEX", ["ADT", "ATAC", "Multiplexing Capture"]),
            ("Feature.Type", "gene expression", ["antibody_capture"]),
            ("feature_biotype", "gene", ["spike-in"]),
            ("modality", "rna", ["prot", "atac", "hto"]),
            ("assay", "RNA", ["ADT", "HTO"]),
            ("Type", "Gene Expression", ["Antibody Capture", "other"]),
        ],
    )
    def test_a_column_tells_genes_from_what_is_named_like_them(self, column, gene, others):
        values = np.array([gene, None, *others, gene], dtype=object)
        names = ["CD4", "CD8A", *(f"CD{i}" for i in range(len(others))), "LYZ"]
        as_bytes = [None if value is None else value.encode() for value in values]
        for each in (values, pd.Categorical(values), as_bytes):
            var = table(names, **{column: each})
            assert kept(var) == ["CD4", "CD8A", "LYZ"]
            assert gene_features(var)[1] == dict.fromkeys(others, 1)

    def test_is_all_genes_where_no_column_says_otherwise(self):
        names = ["CD4", "LYZ", "MS4A1"]
        for columns in (
            {},
            {"feature_types": ["Gene Expression"] * 3},
            {"feature_types": ["foo", "bar", ""]},  # no known feature type
            {"feature_types": [1, 2, 3]},
            {"type": ["gene", "protein", "TF"]},  # a feature type may have any name
            {"feature_biotype": ["protein_coding", "lncRNA", "artifact"]},
            {"gene_biotype": ["processed_pseudogene", "TEC", "IG_V_gene"]},
            {"genome": ["mm10", "mm10", "mm10"]},  # as a map to orthologues leaves them
            {"genome": ["GRCh38", "", "GRCh38_and_mm10"]},
        ):
            assert kept(table(names, **columns)) == names

    def test_beside_biotypes_only_known_words_are_not_genes(self):
        var = table(["A", "B", "C", "D"], feature_type=["lncRNA", "vault_RNA", "synthetic", "Antibody Capture"])
        assert kept(var) == ["A", "B"]

    def test_a_file_without_genes_is_refused(self):
        with pytest.raises(InputError, match=r"None of the file's 3 features .*var\['Modality'\] say prot 3\. Give"):
            gene_features(table(["CD3", "CD4", "CD8"], Modality=["prot"] * 3))
        with pytest.raises(InputError, match=r"names say genome mm10 2\. .*adata\.var_names"):
            gene_features(table(["mm10_Cd4", "mm10_Lyz2"]))
        assert kept(table([])) == []

    def test_cite_seq_counts_the_genes_alone(self, pbmc, read):
        panel = ["CD3D", "CD19", "CD4", "CD8A", "CD14", "FCGR3A", "NCAM1", "MS4A1"]
        antibodies = pd.DataFrame({"gene_symbol": panel, "feature_types": "Antibody Capture"}, index=panel)
        var = pd.concat([pbmc.assign(feature_types="Gene Expression"), antibodies])
        mask, left_out = gene_features(var)
        assert np.array_equal(mask, np.arange(len(var)) < len(pbmc))
        assert left_out == {"Antibody Capture": 8}
        axis = GeneAxis.from_adata(read("pbmc3k_10x"))
        assert align(var, axis).n_duplicates == 8, "the trap"
        found = align(var[mask], axis, left_out=left_out)
        assert found.n_duplicates == 0
        assert found.report()["left_out"] == left_out
        assert coverage_sentence(found.report()).endswith(
            ", 0 not. 8 features are not genes and were left out (Antibody Capture 8)."
        )

    def test_spike_ins_are_known_by_name(self, pbmc):
        spikes = [f"ERCC-{i:05d}" for i in range(1, 93)]
        genes = ["ERCC1", "ERCC6L2", "ERCC8-AS1"]
        assert gene_features(table([*genes, *spikes]))[1] == {"ERCC spike-in": 92}
        assert kept(table([*genes, *spikes])) == genes
        assert kept(table(["a", "b"], gene_ids=["ENSG00000167286", "ERCC-00002"])) == ["a"]
        assert kept(table(["GRCh38_CD4", "GRCh38_ERCC-00002"])) == ["GRCh38_CD4"]
        assert gene_features(pbmc)[1] == {}

    def test_says_it_in_a_sentence(self):
        assert left_out_sentence({}) == ""
        assert left_out_sentence({"Custom": 1}) == "1 feature is not a gene and was left out (Custom 1)"
        assert left_out_sentence({"genome mm10": 13000, "Peaks": np.int64(2)}) == (
            "13,002 features are not human genes and were left out (genome mm10 13,000, Peaks 2)"
        )

    def test_what_is_left_out_can_be_stored(self, tmp_path):
        _, left_out = gene_features(table(["A", "B"], feature_types=["Gene Expression", "guide/tag"]))
        adata = anndata.AnnData(np.ones((1, 1)), uns={"left_out": left_out, "none": {}})
        adata.write_h5ad(tmp_path / "a.h5ad")
        assert anndata.read_h5ad(tmp_path / "a.h5ad").uns == {"left_out": {"guide-tag": 1}, "none": {}}


class TestGenomes:
    @pytest.mark.parametrize("prefix", ["GRCh38_", "GRCh38______", "GRCh38-", "hg19_", "HUMAN_", "GRCh38_premrna_"])
    def test_the_human_prefix_is_not_part_of_a_name(self, prefix, pbmc, read):
        axis = GeneAxis.from_adata(read("pbmc3k_10x"))
        names = prefix + pbmc.index
        ids = [prefix + name if name else "" for name in pbmc["ensembl_id"]]
        rows = [str(i) for i in range(len(pbmc))]
        for var in (
            table(names),
            table(names, gene_ids=ids),
            table(rows, gene_symbol=names),
            table(rows, feature_id=ids),
        ):
            assert gene_features(var)[1] == {}
            found = align(var, axis, aliases=False).column_map
            assert np.array_equal(found[found >= 0], np.flatnonzero(found >= 0))
            assert (found >= 0).all() or "feature_id" in var
        assert GeneAxis.from_adata(anndata.AnnData(var=table(names))).symbols == axis.symbols

    @pytest.mark.parametrize("mouse", ["mm10_", "mm10___", "GRCm39-", "MOUSE_"])
    def test_other_genomes_are_left_out(self, mouse, pbmc):
        human = ("GRCh38_" + pbmc.index).tolist()
        others = [mouse + name.capitalize() for name in pbmc.index[:6000]]
        virus = ["SARSCoV2_ORF1ab", "SARSCoV2_S"]
        mask, left_out = gene_features(table([*human, *others, *virus]))
        assert mask.tolist() == [True] * len(human) + [False] * 6002
        assert left_out == {f"genome {mouse.strip('_-')}": 6000, "genome SARSCoV2": 2}
        # Cases with only a column of ids or only one of symbols:
        rows = [str(i) for i in range(len(human) + 6000)]
        for column in ("gene_symbols", "gene_ids"):
            assert gene_features(table(rows, **{column: [*human, *others]}))[0].sum() == len(human)

    def test_a_column_of_genomes_tells_them_apart(self):
        names = ["CD4", "LYZ", "Cd4", "ORF10", "CD19"]
        var = table(names, genome=["GRCh38", "hg38_custom", "mm10", "Human_virus_1", ""])
        assert kept(var) == ["CD4", "LYZ", "CD19"]
        assert gene_features(var)[1] == {"genome mm10": 1, "genome Human_virus_1": 1}
        taxa = ["NCBITaxon:9606", "NCBITaxon:9606", "NCBITaxon:10090", "NCBITaxon:2697049", "NCBITaxon:9606"]
        assert kept(table(names, feature_reference=pd.Categorical(taxa))) == ["CD4", "LYZ", "CD19"]

    def test_no_true_name_is_changed(self, ref_dir, read, data_file):
        var = read(data_file).var
        mask, left_out = gene_features(var)
        assert mask.all()
        assert left_out == {}
        names = set(var.index) | set(var["gene_symbol"])
        if data_file == "pbmc3k_10x":
            with gzip.open(ref_dir / "hgnc_complete_set.txt.gz", "rt") as file:
                hgnc = pd.read_csv(file, sep="\t", dtype=str, keep_default_na=False)
            for column in ("symbol", "alias_symbol", "prev_symbol"):
                names |= {name for cell in hgnc[column] for name in cell.split("|")}
            assert len(names) > 100_000
            assert gene_features(table(sorted(names - {""})))[1] == {}
        assert [name for name in names if without_genome(name) != name] == []
