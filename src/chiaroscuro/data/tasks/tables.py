"""Rows that take time to make, kept as a memory-mapped Arrow table.

`Dataset.map` and `Dataset.from_generator` keep tables too. But there a damaged table is an error on every later use,
until it is deleted by hand; here it is made again.
"""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
from datasets.arrow_writer import ArrowWriter

from chiaroscuro.data.storage import cached_file
from chiaroscuro.errors import one_line

logger = logging.getLogger(__name__)


def kept_table(
    path: Path, features: datasets.Features, make: Callable[[], Iterator[dict[str, list[Any]]]]
) -> datasets.Dataset:
    """Return the table in `path`; if it is missing or damaged, make it and keep it.

    Args:
        path: the file, named by a fingerprint of all that decides the rows.
        features: the types of the columns.
        make: yields the rows in batches.

    Raises:
        UserError: the folder can't be written or the disk is full.

    """
    if path.exists():
        try:
            return datasets.Dataset.from_file(str(path))
        except Exception as error:  # pyarrow raises errors of many kinds
            logger.warning("making again: the cached table %s can't be read (%s)", path, one_line(error))
    with cached_file(path) as temporary:
        writer = ArrowWriter(path=str(temporary), features=features)
        for batch in make():
            writer.write_batch(batch)
        writer.finalize()
    return datasets.Dataset.from_file(str(path))
