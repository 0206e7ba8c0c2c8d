"""From files to codes: `rvqa encode` against only reading, its own CPU time, and scanpy with a model in torch.

python -m bench.atlas --tokenizer DIR [--cells 1000000] [--folder DIR] [--kills 20] [--beyond] [--annotate] [--json]

The atlas resamples the real cells of four files of RVQA_DATA_DIR (union of their genes): each cell is one of them, or
for one in five the sum of two, and every count is kept with a probability between 1/2 and 1. The bench writes it part
by part as .h5ad (gzip, and uncompressed) and as sharded .zarr into the folder, where it stays (several GB).

efficiency          max(wall of only reading with the same reader and threads, CPU seconds / cores) / wall of the whole
share_of_read_speed wall of only reading / wall of the whole
peak_memory_gib     of a process that encodes the uncompressed atlas; memory_growth: its ratio to a tenth of the atlas
kills_survived      runs killed (SIGKILL) at a random moment that gave the same bytes when they were started again
dask_seconds        additional wall per task with one local Dask worker
ratio_scanpy_*      cells per second over those of AnnData backed, normalize_total, log1p, the model's dense layers and
                    its codebooks by torch.cdist; on 8,192 cells

Before timing, the bench compares codes of the first cells with those of `rvqa.encode` in memory. Some codes of the
rival differ (`same_as_rival`): it rounds on the way and normalises by what is stored. --beyond encodes more than 2^31
entries (one block of cells, repeated) and compares the codes of every repetition with those of the first. --annotate
measures only `rvqa annotate` and `rvqa encode` of the gzip atlas into .h5ad: cells per second and peak memory (GiB) of
each process. The codes of both must be equal, and the labels of the first cells equal to those computed in memory.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch

import rvqa
from rvqa.atlas.encoder import Encoder, Settings, default_threads
from rvqa.atlas.run import encode_files
from rvqa.data.alignment import align, map_columns
from rvqa.data.genes import GeneAxis
from rvqa.language.model import load_tokenizer
from rvqa.tokenizer.model import CellTokenizer
from rvqa.tokenizer.panel import PanelEncoder

FILES = ("pbmc3k_10x", "kang2018_ifnb_pbmc_2k", "zheng2017_sorted_pbmc_3500", "tian2019_lung_cancer_lines")
FORMATS = ("gzip.h5ad", "plain.h5ad", "sharded.zarr")
RIVAL_CELLS = 8_192


def base_cells() -> tuple[sp.csr_matrix, GeneAxis]:
    """Return real cells of four studies on the union of their genes."""
    folder = Path(os.environ["RVQA_DATA_DIR"])
    files = [anndata.read_h5ad(folder / f"{name}.h5ad") for name in FILES]
    axis = GeneAxis.union([GeneAxis.from_adata(each) for each in files])
    return sp.vstack([map_columns(each.X, align(each, axis)) for each in files], format="csr"), axis


def resampled(base: sp.csr_matrix, cells: int, seed: int = 0, block: int = 10_000) -> Iterator[sp.csr_matrix]:
    """Yield blocks of cells made of real ones; the first n cells do not depend on how many are made."""
    for start in range(0, cells, block):
        rng = np.random.default_rng([seed, start])
        made = base[rng.integers(base.shape[0], size=block)]
        second = (
            sp.diags_array((rng.random(block) < 0.2).astype(np.float32)) @ base[rng.integers(base.shape[0], size=block)]
        )
        made = sp.csr_matrix(made + second)
        keep = np.repeat(rng.uniform(0.5, 1.0, block), np.diff(made.indptr))
        single = made.data == 1
        made.data[single] = rng.random(single.sum()) < keep[single]
        made.data[~single] = rng.binomial(made.data[~single].astype(np.int64), keep[~single])
        made.eliminate_zeros()
        yield made[: min(block, cells - start)]


def make(path: Path, cells: int, base: sp.csr_matrix, axis: GeneAxis) -> None:
    """Write an atlas, part by part."""
    if path.exists():
        return
    import zarr

    scratch = path.with_name(f"making-{path.name}")
    var = pd.DataFrame({"gene_symbol": axis.symbols, "ensembl_id": axis.ensembl_ids}, index=list(axis.symbols))
    empty = anndata.AnnData(sp.csr_matrix((0, len(axis)), dtype=np.float32), var=var)
    anndata.settings.zarr_write_format = 3
    empty.write_h5ad(scratch) if path.suffix == ".h5ad" else empty.write_zarr(scratch)
    file: Any = (
        h5py.File(scratch, "r+")
        if path.suffix == ".h5ad"
        else zarr.open_group(scratch, mode="r+", use_consolidated=False)
    )
    x, obs = file["X"], file["obs"]
    arrays: dict[str, Any] = {}
    for name, dtype in (("data", "float32"), ("indices", "int32"), ("indptr", "int64")):
        del x[name]
        if path.suffix == ".zarr":
            arrays[name] = x.create_array(name, shape=(0,), dtype=dtype, chunks=(131_072,), shards=(16 * 131_072,))
        else:
            packed = {"compression": "gzip", "compression_opts": 4} if "gzip" in path.name else {}
            arrays[name] = x.create_dataset(name, (0,), dtype, maxshape=(None,), chunks=(65_536,), **packed)

    def append(name: str, values: np.ndarray) -> None:
        size = arrays[name].shape[0]
        arrays[name].resize((size + len(values),))
        arrays[name][size:] = values

    entries = 0
    append("indptr", np.zeros(1, np.int64))
    for block in resampled(base, cells):
        append("data", block.data)
        append("indices", block.indices.astype(np.int32))
        append("indptr", block.indptr[1:].astype(np.int64) + entries)
        entries += block.nnz
    x.attrs["shape"] = np.array([cells, len(axis)]) if path.suffix == ".h5ad" else [cells, len(axis)]
    index = obs.attrs["_index"]
    del obs[index]
    anndata.io.write_elem(obs, index, np.array([f"cell{i}" for i in range(cells)], dtype=object))
    if path.suffix == ".h5ad":
        file.close()
    else:
        zarr.consolidate_metadata(scratch)
    scratch.rename(path)


def timed(run: Callable[[], Any]) -> tuple[float, float]:
    """Return wall and CPU seconds of a run."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - cpu


def only_read(path: Path, tokenizer: CellTokenizer, threads: int, folder: Path) -> None:
    """Read all rows of a file by the reader of `rvqa encode`, in as many threads, and do nothing else."""
    from concurrent.futures import ThreadPoolExecutor

    encoder = Encoder([path], tokenizer, Settings(), scratch=folder, say=print)
    blocks = [block for task in encoder.tasks() for block in encoder.blocks(task)]
    with ThreadPoolExecutor(threads) as pool:
        for task in encoder.tasks():
            encoder.table(task)
        for _ in pool.map(lambda block: len(encoder.sources[0].matrix.rows(*block).data), blocks):
            pass


def stages(run: Callable[[], Any]) -> dict[str, float]:
    """Return CPU seconds of a run by stage, over all threads."""
    from rvqa.data.files import matrices
    from rvqa.kernels import ops

    spent: dict[str, float] = {}
    places: list[tuple[Any, str, str]] = [
        (matrices.Compressed, "rows", "read"),
        (ops, "csr_totals", "check"),
        (PanelEncoder, "latent", "project"),
        (ops, "residual_quantize", "quantize"),
    ]
    kept = [(owner, name, getattr(owner, name)) for owner, name, _ in places]

    def measured(original: Callable[..., Any], stage: str) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            began = time.thread_time()
            try:
                return original(*args, **named)
            finally:
                spent[stage] = spent.get(stage, 0.0) + time.thread_time() - began

        return call

    for owner, name, stage in places:
        setattr(owner, name, measured(getattr(owner, name), stage))
    try:
        _, cpu = timed(run)
    finally:
        for owner, name, original in kept:
            setattr(owner, name, original)
    return spent | {"rest": cpu - sum(spent.values())}


def rival(path: Path, tokenizer: CellTokenizer, cells: int) -> tuple[float, np.ndarray]:
    """Encode the usual way (backed AnnData, scanpy, dense layers, torch.cdist); return seconds and codes."""
    import scanpy

    began = time.perf_counter()
    adata = anndata.experimental.read_lazy(path) if path.suffix == ".zarr" else anndata.read_h5ad(path, backed="r")
    alignment = align(adata.var if isinstance(adata.var, pd.DataFrame) else adata.var.to_memory(), tokenizer.axis)
    measured = torch.from_numpy(alignment.measured)
    codes = []
    with torch.inference_mode():
        for start in range(0, cells, 2_048):
            part = adata[start : start + 2_048].to_memory()
            scanpy.pp.normalize_total(part, target_sum=1e4)
            scanpy.pp.log1p(part)
            dense = torch.from_numpy(map_columns(part.X, alignment).toarray())
            residual = tokenizer.encode_dense(tokenizer.standardise(dense, measured))
            levels = []
            for codebook_KD in tokenizer.codebooks_MKD:
                levels.append(torch.cdist(residual, codebook_KD).argmin(1))
                residual = residual - codebook_KD[levels[-1]]
            codes.append(torch.stack(levels, 1).to(torch.uint8).numpy())
    return time.perf_counter() - began, np.concatenate(codes)[:cells]


def in_memory(path: Path, tokenizer: CellTokenizer) -> np.ndarray:
    """Return codes of the first cells by `rvqa.encode`."""
    read = anndata.experimental.read_lazy if path.suffix == ".zarr" else anndata.read_h5ad
    adata = (read(path) if path.suffix == ".zarr" else read(path, backed="r"))[:RIVAL_CELLS].to_memory()
    rvqa.encode(adata, tokenizer)
    return adata.obsm["rvqa_codes"]


def peak(path: Path, tokenizer: Path, out: Path, threads: int) -> float:
    """Return the peak GiB of a separate process, by VmHWM, because getrusage includes the process that started it."""
    code = (
        "import sys; from pathlib import Path; from rvqa.atlas.run import Settings, encode_files;"
        "from rvqa.language.model import load_tokenizer;"
        "encode_files(Path(sys.argv[2]), load_tokenizer(sys.argv[1]), Path(sys.argv[3]),"
        "settings=Settings(), threads=int(sys.argv[4]), force=True);"
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tokenizer, path, out, str(threads)], capture_output=True, text=True, check=True
    )
    return int(done.stdout) / 2**20


COMMAND = """
import sys
from rvqa import cli
sys.argv[0] = "rvqa"
try:
    cli.main()
finally:
    print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def annotated(path: Path, model: Path, folder: Path, cells: int) -> dict[str, float]:
    """Return cells per second and GiB of `rvqa annotate` and of `rvqa encode`."""
    figures = {}
    for command in ("encode", "annotate"):
        out = folder / f"{command}.h5ad"
        given = [command, path, "-m", model, "-o", out, "--force", "--quiet"]
        began = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", COMMAND, *map(str, given)], capture_output=True, text=True)
        seconds = time.perf_counter() - began
        if done.returncode:
            raise SystemExit(done.stderr)
        figures |= {
            f"{command}_cells_per_second": cells / seconds,
            f"{command}_gib": int(done.stdout.split()[-1]) / 2**20,
        }
    first = anndata.read_h5ad(path, backed="r")[:RIVAL_CELLS].to_memory()
    rvqa.annotate(first, rvqa.load(model), progress=False)
    with h5py.File(folder / "encode.h5ad") as encoded, h5py.File(folder / "annotate.h5ad") as file:
        codes = [each["obsm/rvqa_codes"][:] for each in (encoded, file)]
        labels = anndata.io.read_elem(file["obs/rvqa_cell_type"])[:RIVAL_CELLS]
    if not (codes[0] == codes[1]).all():
        raise SystemExit("annotate: the codes differ from those of encode")
    if list(labels) != list(first.obs["rvqa_cell_type"]):
        raise SystemExit("annotate: the labels differ from those computed in memory")
    return figures


RUN = """
import sys
from pathlib import Path
from rvqa.atlas.run import Settings, encode_files
from rvqa.language.model import load_tokenizer
tokenizer = load_tokenizer(sys.argv[1])
print("ready", flush=True)
encode_files(Path(sys.argv[2]), tokenizer, Path(sys.argv[3]), settings=Settings(cells=int(sys.argv[4])))
"""


def survived(path: Path, tokenizer: Path, folder: Path, kills: int) -> int:
    """Return how many killed runs gave the same bytes when they were started again."""
    cells, out, whole = "8192", folder / "killed.rvq", folder / "whole.rvq"
    whole.unlink(missing_ok=True)
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", RUN, tokenizer, path, whole, cells], check=True, capture_output=True)
    most, expected = time.perf_counter() - began, whole.read_bytes()
    rng, right = np.random.default_rng(0), 0
    while kills:
        out.unlink(missing_ok=True)
        with subprocess.Popen([sys.executable, "-c", RUN, tokenizer, path, out, cells], stdout=subprocess.PIPE) as run:
            assert run.stdout is not None
            run.stdout.readline()
            time.sleep(rng.uniform(0, 0.8 * most))
            run.kill()
        if run.returncode != -9:
            continue  # it had ended
        kills -= 1
        if out.exists():
            rvqa.open_codes(out, verify=True)
        else:
            subprocess.run([sys.executable, "-c", RUN, tokenizer, path, out, cells], check=True, capture_output=True)
        right += out.read_bytes() == expected
    return right


def dask_seconds(path: Path, tokenizer: CellTokenizer, folder: Path, rounds: int) -> float:
    """Return the additional wall per task of one local worker with as many threads."""
    from rvqa.atlas.cluster import local_cluster

    threads, settings, out = default_threads(), Settings(), folder / "dask.rvq"
    more = []
    with local_cluster("local", torch.get_num_threads()) as cluster:
        for repeat in range(rounds + 1):
            alone, _ = timed(lambda: encode_files(path, tokenizer, out, settings=settings, threads=threads, force=True))
            one = out.read_bytes()
            both, _ = timed(lambda: encode_files(path, tokenizer, out, settings=settings, cluster=cluster, force=True))
            if out.read_bytes() != one:
                raise SystemExit("Dask: the bytes differ")
            if repeat:  # in the first repeat the worker imports and opens
                more.append(both - alone)
    return float(np.median(more)) / -(-rvqa.open_codes(out).manifest["cells"] // settings.cells)


def beyond(folder: Path, tokenizer: CellTokenizer, base: sp.csr_matrix, axis: GeneAxis) -> dict[str, Any]:
    """Encode more than 2^31 entries: a block of cells, stored again in each repetition."""
    import zlib

    path, block = folder / "beyond.h5ad", next(resampled(base, 3_000))
    times = 2**31 // block.nnz + 20
    cells = times * block.shape[0]
    if not path.exists():
        make(path, 0, base, axis)
        with h5py.File(path, "r+") as file:
            x, obs = file["X"], file["obs"]
            for name, values in (("data", block.data), ("indices", block.indices.astype(np.int32))):
                del x[name]
                shape = (times * block.nnz,)
                made = x.create_dataset(name, shape, values.dtype, chunks=(block.nnz,), compression="gzip")
                packed = zlib.compress(values.tobytes(), 1)
                for i in range(times):
                    made.id.write_direct_chunk((i * block.nnz,), packed)
            starts = np.arange(times, dtype=np.int64)[:, None] * block.nnz
            del x["indptr"]
            x["indptr"] = np.append((starts + block.indptr[:-1]).ravel(), times * block.nnz)
            x.attrs["shape"] = np.array([cells, len(axis)])
            index = obs.attrs["_index"]
            del obs[index]
            anndata.io.write_elem(obs, index, np.arange(cells).astype(str).astype(object))
    out = folder / "beyond.rvq"
    wall, _ = timed(lambda: encode_files(path, tokenizer, out, settings=Settings(), force=True))
    codes = rvqa.open_codes(out)
    first = codes[: block.shape[0]]
    adata = anndata.AnnData(block.astype(np.float32), var=pd.DataFrame(index=list(axis.symbols)))
    rvqa.encode(adata, tokenizer)
    wrong = sum(
        int((codes[start : start + block.shape[0]] != first).any(1).sum()) for start in range(0, cells, len(first))
    )
    wrong += int((first != adata.obsm["rvqa_codes"]).any(1).sum())
    return {"entries": times * block.nnz, "cells": cells, "wrong_cells": wrong, "seconds": wall}


def main() -> None:
    """Run the bench."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tokenizer", type=Path, required=True, help="directory that rvqa fit or rvqa fit-tokenizer wrote"
    )
    parser.add_argument("--cells", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, default=Path("atlas-bench"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--beyond", action="store_true")
    parser.add_argument("--annotate", action="store_true")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    cores, threads = torch.get_num_threads(), default_threads()
    tokenizer = load_tokenizer(given.tokenizer)
    base, axis = base_cells()
    result: dict[str, Any] = {"cells": given.cells, "genes": len(axis), "cores": cores, "threads": threads}
    if given.annotate:
        path = given.folder / f"{given.cells}-{FORMATS[0]}"
        make(path, given.cells, base, axis)
        print(json.dumps(annotated(path, given.tokenizer, given.folder, given.cells), indent=None if given.json else 1))
        return
    for form in FORMATS:
        path = given.folder / f"{given.cells}-{form}"
        make(path, given.cells, base, axis)
        out = given.folder / "codes.rvq"

        def whole(path: Path = path, out: Path = out) -> None:
            encode_files(path, tokenizer, out, settings=Settings(), threads=threads, force=True)

        _, codes = rival(path, tokenizer, RIVAL_CELLS)
        whole()
        found = rvqa.open_codes(out)[:RIVAL_CELLS]
        if not np.array_equal(found, in_memory(path, tokenizer)):
            raise SystemExit(f"{form}: the codes differ from those in memory")
        same = float((found == codes).all(1).mean())
        rows = []
        for _ in range(given.rounds):
            read, _cpu = timed(lambda path=path: only_read(path, tokenizer, threads, given.folder))  # type: ignore[misc]
            wall, cpu = timed(whole)
            other, _codes = rival(path, tokenizer, RIVAL_CELLS)
            rate = given.cells / wall
            rows.append((max(read, cpu / cores) / wall, read / wall, rate * other / RIVAL_CELLS, rate, wall))
        efficiency, share, ratio, rate, wall = np.median(np.array(rows), axis=0).tolist()
        spent = stages(whole)
        result[form] = {
            "efficiency": efficiency,
            "share_of_read_speed": share,
            "ratio_scanpy": ratio,
            "cells_per_second": rate,
            "seconds": wall,
            "same_as_rival": same,
            "stages": {name: each / sum(spent.values()) for name, each in spent.items()},
            "bytes": sum(f.stat().st_size for f in path.rglob("*")) if path.is_dir() else path.stat().st_size,
        }
        if not given.json:
            print(form, json.dumps(result[form]), flush=True)
    small, large = (given.folder / f"{cells}-plain.h5ad" for cells in (given.cells // 10, given.cells))
    make(small, given.cells // 10, base, axis)
    sizes = [peak(path, given.tokenizer, given.folder / "peak.rvq", threads) for path in (small, large)]
    kills = survived(small, given.tokenizer, given.folder, given.kills)
    result["dask_seconds"] = dask_seconds(large, tokenizer, given.folder, given.rounds)
    if given.beyond:
        result["beyond"] = beyond(given.folder, tokenizer, base, axis)
    result["figures"] = {
        "efficiency": min(result[form]["efficiency"] for form in FORMATS),
        "share_of_read_speed": min(result[form]["share_of_read_speed"] for form in FORMATS),
        "peak_memory_gib": sizes[1],
        "memory_growth": sizes[1] / sizes[0],
        "ratio_scanpy_uncompressed": min(result[form]["ratio_scanpy"] for form in FORMATS[1:]),
        "ratio_scanpy_gzip": result[FORMATS[0]]["ratio_scanpy"],
        "kills_survived": kills,
    }
    if given.json:
        print(json.dumps(result))
        return
    print(
        json.dumps(
            result["figures"] | {key: result[key] for key in ("dask_seconds", "beyond") if key in result}, indent=1
        )
    )


if __name__ == "__main__":
    main()
