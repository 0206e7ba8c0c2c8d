"""HDF5 files that keep to themselves: what a link or a dataset brings from another file is rejected.

A link, a dataset stored externally or a virtual dataset can name any file of the reader's: its bytes would come into
obs or counts and so into outputs, and what is written through a link would change that file.
"""

from typing import Any

import h5py

from rvqa.data.files.hdf5 import place_of
from rvqa.errors import InputError
from rvqa.io.files import UNREADABLE

_HOPS = 16
"""Soft links behind each other that are followed."""


def require_own(root: h5py.Group) -> None:
    """Reject a group in which anything stands in another file; links inside the file are followed.

    Raises
    ------
    rvqa.errors.InputError
        Names the link or dataset, and the other file.
    """
    seen: set[Any] = set()
    groups = [root]
    while groups:
        group = groups.pop()
        for name in group:
            try:
                _require_link(group, name)
                item = group[name]
                place = h5py.h5o.get_info(item.id).addr
                if isinstance(item, h5py.Dataset):
                    _require_dataset(item)
            except InputError:
                raise
            except UNREADABLE:
                continue  # what cannot be opened brings nothing in; who needs it is told
            if isinstance(item, h5py.Group) and place not in seen:
                seen.add(place)
                groups.append(item)


def _require_link(group: h5py.Group, path: str) -> None:
    """Reject a path of which a part leads to another file."""
    parts, hops = [part for part in path.split("/") if part], 0
    at = group.file["/"] if path.startswith("/") else group
    while parts:
        name = parts.pop(0)
        link = at.get(name, getlink=True)
        if isinstance(link, h5py.ExternalLink):
            raise InputError(
                f"{place_of(group)} has a link, {name!r}, to the file {link.filename}. Copy what it leads to into the "
                "file, or write it anew."
            )
        if isinstance(link, h5py.SoftLink):
            hops += 1
            if hops > _HOPS:
                raise OSError(f"more than {_HOPS} links lead to each other")
            at = group.file["/"] if link.path.startswith("/") else at
            parts = [part for part in link.path.split("/") if part not in ("", ".")] + parts
        elif parts:
            at = at[name]


def _require_dataset(dataset: h5py.Dataset) -> None:
    files = [name for name, _, _ in dataset.external or ()]
    if dataset.is_virtual:
        files += [each.file_name for each in dataset.virtual_sources() if each.file_name != "."]
    if files:
        raise InputError(
            f"{place_of(dataset)} keeps its values in another file, {files[0]}. Write the file anew, with these in it."
        )
