"""A collection's texts as Parquet files, which `halimede bulk` reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from halimede.extras import import_optional
from halimede.index.stores.base import Page, Store
from halimede_ops.errors import InvalidInput

EXTRA = "bulk"
ID, TEXT, FIELDS = "id", "text", "fields"
"""Columns of the files. `fields` is what else a row has: JSON, of LanceDB a struct."""
ROWS = 32_768
"""Rows of a file."""
DONE = "_export.json"
"""Written last: a folder that has it is whole."""


class Exported(NamedTuple):
    """What an export has written."""

    store: str
    rows: int


def export(store: Store, folder: Path) -> Exported:
    """Write ids, texts and fields of all rows into a folder. A whole export is kept as it is.

    Raises:
        InvalidInput: a row has no text, the store keeps none, or the folder has an export of
            another collection.
    """
    pyarrow = import_optional("pyarrow", EXTRA)
    parquet = import_optional("pyarrow.parquet", EXTRA)
    done = read_export(folder)
    if done is not None:
        if done.store != store.name:
            raise InvalidInput(f"{folder} has the texts of {done.store}; give another folder.")
        if done.rows != store.count():
            raise InvalidInput(
                f"{folder} has {done.rows} rows of {store.name}, which has {store.count()} now. "
                "Give another folder."
            )
        return done
    folder.mkdir(parents=True, exist_ok=True)
    string = pyarrow.string()
    schema = pyarrow.schema([(ID, string), (TEXT, string), (FIELDS, store.fields_type or string)])
    rows = without_text = 0
    for number, page in enumerate(store.pages(ROWS)):
        without_text += sum(not page.text(row) for row in range(len(page)))
        columns = [
            [str(one) for one in page.ids],
            [page.text(row) for row in range(len(page))],
            page.fields if store.fields_type is not None else _json(page),
        ]
        arrays = [
            pyarrow.array(column, field.type) for column, field in zip(columns, schema, strict=True)
        ]
        table = pyarrow.Table.from_arrays(arrays, schema=schema)
        parquet.write_table(table, folder / f"{number:06d}.parquet", compression="zstd")
        rows += len(page)
    if without_text:
        raise InvalidInput(
            f"{store.name} has {without_text} of {rows} rows without a text, which cannot be "
            "embedded again. Is `--text-field` right? Else delete these rows."
        )
    written = Exported(store.name, rows)
    (folder / DONE).write_text(json.dumps(written._asdict()))
    return written


def read_export(folder: Path) -> Exported | None:
    """Return what a whole export has written into a folder. None: there is none."""
    try:
        return Exported(**json.loads((folder / DONE).read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        raise InvalidInput(f"{folder / DONE} is damaged. Delete the folder.") from None


def _json(page: Page) -> list[str]:
    fields = page.fields or [{}] * len(page)
    return [one if isinstance(one, str) else json.dumps(one) for one in fields]
