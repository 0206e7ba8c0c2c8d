"""What rvqa adds to cells, and how it gets into a file: into a copy of it, in which all else stays as it is stored.

anndata cannot write again everything that it, or another program, once wrote. So nothing but our own keys is written,
and the copy is made before anything is computed: what cannot be written is known before any work is lost.
"""

import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
from anndata import AnnData
from anndata.io import read_elem, write_elem

import rvqa
from rvqa.data.files import tenx
from rvqa.data.files.frames import Frame, stored_frame
from rvqa.data.files.source import PARTS
from rvqa.data.files.sources import anndata_root, obs_of, read_cells
from rvqa.data.files.watch import Watch
from rvqa.data.reading import AUTO
from rvqa.errors import InputError, InputWarning
from rvqa.io.checked_hdf5 import hdf5_file, require_taken
from rvqa.io.files import UNREADABLE, require_folder, require_writable, whole_directory, whole_file, write_anndata

COPIES = {".h5ad": (".h5ad",), ".h5mu": (".h5mu", ".h5ad"), ".zarr": (".zarr", ".h5ad")}
"""Suffixes of the outputs that a kind of file can be copied to; all others become `.h5ad`."""


_MANY, _OURS = 3000, 8
"""Columns of obs from which on there may be no room for ours, and how many ours are at most."""


@dataclass(frozen=True)
class Keys:
    """What is added to cells.

    Attributes
    ----------
    obs
        Columns by name, N values each.
    obsm
        Arrays [N, ...] by name.
    facts
        What `uns[key]` gets to know, beside the version.
    key
        Prefix of all names that we write, and the name in `uns`.
    """

    obs: Mapping[str, Any] = field(default_factory=dict)
    obsm: Mapping[str, np.ndarray] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    key: str = "rvqa"

    def add_to(self, adata: AnnData) -> None:
        """Write into an AnnData in memory."""
        for name, values in self.obs.items():
            adata.obs[name] = values
        for name, array in self.obsm.items():
            adata.obsm[name] = array
        adata.uns[self.key] = self._merged(adata.uns.get(self.key))

    def add_to_file(self, root: Any) -> None:
        """Write into an open AnnData file or store."""
        if self.obs:
            _add_columns(root, self.obs)
        for name, array in self.obsm.items():
            group = child(root, "obsm")
            if name in group:
                del group[name]
            write_elem(group, name, array, dataset_kwargs={"compression": "gzip"} if _hdf5(group) else {})
            require_taken(group)
        group = child(root, "uns")
        earlier = None
        if self.key in group:
            try:
                earlier = read_elem(group[self.key])
            except UNREADABLE:
                earlier = None
            del group[self.key]
        write_elem(group, self.key, self._merged(earlier))

    def _merged(self, earlier: Any) -> dict[str, Any]:
        kept = earlier if isinstance(earlier, Mapping) else {}
        return {**kept, "version": rvqa.__version__, **self.facts}


def require_free(adata: AnnData, key: str, names: Mapping[str, list[str]]) -> None:
    """Reject a prefix under which the user keeps something of their own, before any work.

    Parameters
    ----------
    adata
        Cells that keys will be added to.
    key
        The prefix; "rvqa" is ours.
    names
        What will be written to "obs" and "obsm".

    Raises
    ------
    rvqa.errors.InputError
        A name is taken, and `uns[key]` does not say that rvqa wrote it.
    """
    earlier = adata.uns.get(key)
    if isinstance(earlier, Mapping) and "version" in earlier:
        return
    taken = [f"{where}[{name!r}]" for where, each in names.items() for name in each if name in getattr(adata, where)]
    if key == "rvqa":
        if taken:
            said = f"{', '.join(taken)} are replaced; uns['rvqa'] does not say that rvqa wrote them."
            warnings.warn(said, InputWarning, stacklevel=3)
        return
    taken += [f"uns[{key!r}]"] if earlier is not None else []
    if taken:
        raise InputError(
            f"key_added={key!r} would overwrite {', '.join(taken)}, which rvqa did not write. Choose another key_added."
        )


def require_copy(source: str | Path, target: str | Path, *, force: bool) -> Path:
    """Reject an output that cannot or should not be a copy of an input with our keys, before any work.

    Raises
    ------
    rvqa.errors.InputError
        Another suffix than those of `COPIES`; an output that exists where `force` is not set, or that is the input; a
        folder that is missing or may not be written in.
    """
    given, path = Path(source), Path(target)
    possible = COPIES.get(given.suffix, (".h5ad",))
    if path.suffix not in possible:
        raise InputError(f"The output {path} is not named {' or '.join(possible)}. Choose such a name.")
    if path.suffix != ".zarr":
        return require_writable(path, force=force, suffix=path.suffix, inputs=[given])
    require_folder(path.absolute().parent)
    if os.path.exists(path) and os.path.exists(given) and path.samefile(given):
        raise InputError(f"The output {path} is the store to read. Choose another name for the output.")
    if path.exists() and not force:
        raise InputError(f"{path} exists. Choose another name, or pass --force to replace it.")
    if path.exists():
        require_store(path)
    return path


_NODE = {"zarr.json", ".zgroup", ".zarray", ".zattrs", ".zmetadata"}
_CHUNK = re.compile(r"c|(c[/.])?\d+([/.]\d+)*")


def require_store(path: Path) -> None:
    """Reject replacing a folder that is not a zarr store through and through, nor empty.

    Raises
    ------
    rvqa.errors.InputError
        Says what else is in it.
    """
    if not path.is_dir():
        raise InputError(f"The output {path} is a file. Choose another name.")
    if any(path.iterdir()) and not _is_node(path):
        raise InputError(f"{path} is a folder of something else: it has no zarr.json. Choose another name.")
    for place, folders, files in os.walk(path):
        folder = Path(place)
        node = next(each for each in (folder, *folder.parents) if each == path or _is_node(each))
        links = [name for name in folders if (folder / name).is_symlink()]
        for name in (*links, *files):
            within = (folder / name).relative_to(node).as_posix()
            if name in links or not (within in _NODE or _CHUNK.fullmatch(within)):
                raise InputError(
                    f"{folder / name} is not part of the zarr store {path}, which is to be replaced. Move it away, or "
                    "choose another name for the output."
                )


def _is_node(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("zarr.json", ".zgroup", ".zarray"))


@contextmanager
def copied(source: Path, target: Path) -> Iterator[Any]:
    """Copy a file of cells, give the root of the copy to add keys to, and put it in its place if the block ends well.

    Parameters
    ----------
    source
        Whatever `rvqa.data.files.sources.open_source` opens.
    target
        A name that `require_copy` allows.

    Raises
    ------
    rvqa.errors.InputError
        No permission, no space, or a source that changes in the meantime.
    """
    watch = Watch(source)
    obs = obs_of(source)  # of a file that cannot be read, say so
    if target.suffix == ".zarr":
        import zarr

        with whole_directory(target) as whole:
            _copy_files(source, whole)
            group = zarr.open_group(whole, mode="r+", use_consolidated=False)
            told = group.metadata.consolidated_metadata is not None or (whole / ".zmetadata").exists()
            require_room(group, obs)
            yield group
            if told or _is_consolidated(whole):
                zarr.consolidate_metadata(whole)
            watch.require_unchanged()
        return
    with whole_file(target) as scratch:
        if source.suffix == target.suffix and not is_tenx(source):
            shutil.copyfile(source, scratch)
        elif source.suffix == ".h5mu":
            with h5py.File(source) as given, hdf5_file(scratch, "w") as made:
                root = anndata_root(source, given)
                for name in root:
                    root.copy(name, made)
                made.attrs.update(root.attrs)
        else:
            _converted(source, scratch)
        with hdf5_file(scratch, "r+") as file:
            root = anndata_root(source, file)
            require_room(root, obs)
            yield root
        watch.require_unchanged()


def _copy_files(source: Path, target: Path) -> None:
    """Copy a folder: what is in its files, and nothing of who may write them."""
    for place, _, files in os.walk(source, followlinks=True):
        made = target / os.path.relpath(place, source)
        made.mkdir()
        for name in files:
            shutil.copyfile(os.path.join(place, name), made / name)


def is_tenx(path: Path) -> bool:
    """Whether a file is Cell Ranger's, whatever its name."""
    with h5py.File(path) as file:
        return tenx.is_tenx(file)


def require_room(root: Any, obs: Frame) -> None:
    """Make sure, before any work, that our columns can be added to the table of cells of a copy.

    Raises
    ------
    rvqa.errors.InputError
        There are so many columns that the file format cannot list more, or the names of cells stand under one of ours.
    """
    table = root["obs"]
    index = str(table.attrs.get("_index", "")) if not isinstance(table, h5py.Dataset) else ""
    if index.startswith("rvqa_"):
        raise InputError(
            f"The names of the cells stand in {index!r}, a name of ours. Rename it: adata.obs.index.name = None."
        )
    if not _hdf5(table) or len(obs.names) < _MANY:
        return
    names = [*obs.names, *(f"rvqa_{i}" for i in range(_OURS))]
    try:
        table.attrs["rvqa"] = np.array(names, dtype=h5py.string_dtype())
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"obs has {len(obs.names):,} columns; an .h5ad file cannot list {_OURS} more. Drop some, or write .zarr."
        ) from error
    del table.attrs["rvqa"]


def storable(frame: pd.DataFrame, *, name: str = "obs") -> pd.DataFrame:
    """A table without the columns that an `.h5ad` file cannot hold, each tried; these are said.

    Warns
    -----
    rvqa.errors.InputWarning
        Columns are left out.
    """
    held, lost = frame.copy(deep=False), []
    held.index = pd.Index(held.index.astype(str).to_numpy(dtype=object))
    with h5py.File.in_memory() as file:
        for at, column in enumerate(frame.columns):
            try:
                write_elem(file, f"column {at}", held[[column]])
            except UNREADABLE:
                lost.append(column)
    if lost:
        named = ", ".join(map(str, lost))
        warnings.warn(f"{name} columns that cannot be written are left out: {named}.", InputWarning, stacklevel=3)
    return held.drop(columns=lost)


def child(root: Any, name: str) -> Any:
    """A group of mappings in an AnnData file, made where it is missing, and anew where it is of anndata before 0.7."""
    if name in root and isinstance(root[name], h5py.Dataset):
        records = root[name][()]
        del root[name]
        write_elem(root, name, {key: records[key] for key in records.dtype.names})
    if name not in root:
        write_elem(root, name, {})
    return root[name]


def _add_columns(root: Any, columns: Mapping[str, Any]) -> None:
    obs = root["obs"]
    if isinstance(obs, h5py.Dataset) or str(obs.attrs.get("encoding-version", "0.2.0")) == "0.1.0":
        frame, _ = stored_frame(obs, root.get("uns")).readable()
        for name in frame.columns:
            if "uns" in root and f"{name}_categories" in root["uns"]:
                del root["uns"][f"{name}_categories"]
        del root["obs"]
        write_elem(root, "obs", frame)
        obs = root["obs"]
    order = [name.decode() if isinstance(name, bytes) else str(name) for name in obs.attrs.get("column-order", ())]
    for name, values in columns.items():
        if name in obs:
            del obs[name]
        write_elem(obs, name, values if isinstance(values, pd.Categorical) else np.asarray(values))
        order += [name] if name not in order else []
    obs.attrs["column-order"] = np.array(order, dtype=h5py.string_dtype()) if _hdf5(obs) else order


def _hdf5(group: Any) -> bool:
    return isinstance(group, h5py.Group)


def _is_consolidated(store: Path) -> bool:
    told = store / "zarr.json"
    return told.is_file() and "consolidated_metadata" in told.read_text(encoding="utf-8")


def _converted(source: Path, target: Path) -> None:
    """Write cells of another format as `.h5ad`."""
    adata = read_cells(source, layer=AUTO, whole=True)
    adata.obs, adata.var = storable(adata.obs), storable(adata.var, name="var")
    rest = {part: dict(getattr(adata, part)) for part in PARTS}
    for part, held in rest.items():
        for name in held:
            del getattr(adata, part)[name]
    write_anndata(adata, target)
    lost = []
    with hdf5_file(target, "r+") as made:
        for part, held in rest.items():
            for name, value in held.items():
                try:
                    write_elem(child(made, part), name, value)
                except UNREADABLE:
                    lost.append(f"{part}[{name!r}]")
                    if name in made[part]:
                        del made[part][name]
    if lost:
        warnings.warn(f"{source}: {', '.join(lost)} cannot be written as .h5ad.", InputWarning, stacklevel=2)
