"""Directories of models and of tokenizers: whether one may be written where something stands already."""

import os
import re
from pathlib import Path

from rvqa.errors import InputError
from rvqa.io.files import require_folder


def require_new_directory(directory: str | Path, *, force: bool, kind: str = "model", mark: str = "rvqa.json") -> Path:
    """Reject an output directory that exists, unless it is empty, or `force` is set and it holds what `mark` is of.

    One that holds anything else beside it is rejected as well, because all of it would be lost.

    Raises
    ------
    InputError
        Says what to do.
    """
    path = Path(directory)
    above = path.absolute().parent
    while not os.path.exists(above):  # made on the way
        above = above.parent
    require_folder(above)
    empty = os.path.isdir(path) and not any(path.iterdir())
    earlier = (path / mark).is_file() and (mark == "rvqa.json" or not (path / "rvqa.json").exists())
    if os.path.exists(path) and not empty and not (force and earlier):
        hint = "" if force else f", or pass --force (force=True) to replace an earlier {kind}"
        raise InputError(f"{path} exists. Choose a new directory{hint}.")
    inside = [each.relative_to(path).as_posix() for each in sorted(path.rglob("*")) if earlier]
    if foreign := [name for name in inside if not _OF_A_MODEL.fullmatch(name)]:
        raise InputError(
            f"{path / foreign[0]} is not part of the {kind} {path}, which is to be replaced. Move it away, or choose "
            "another directory."
        )
    return path


_OF_A_MODEL = re.compile(
    r"(rvqa|fit|config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab"
    r"|processor_config|preprocessor_config|chat_template)\.json"
    r"|model.*\.safetensors(\.index\.json)?|genes\.parquet|split\.parquet|vocab\.txt|merges\.txt"
    r"|(additional_chat_templates(/.*)?)|.*\.(jinja|model)|cell_tokenizer(/(config\.json|model\.safetensors|genes\.parquet))?"
)
"""Files that rvqa, or transformers for it, writes into a directory of a model or a tokenizer."""
