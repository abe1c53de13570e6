"""Rows that took time to make, kept as a memory-mapped Arrow table."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
from datasets.arrow_writer import ArrowWriter

from chiaroscuro.data.storage import cached_file, one_line

logger = logging.getLogger(__name__)


def kept_table(
    path: Path, features: datasets.Features, make: Callable[[], Iterator[dict[str, list[Any]]]]
) -> datasets.Dataset:
    """Return the table in `path`; where there is none, or none that can be read, it is made and kept.

    Args:
        path: the file, whose name is a fingerprint of all that decides the rows.
        features: the columns' types.
        make: yields the rows, in batches.

    Raises:
        UserError: the folder can't be written or the disk is full.

    """
    if path.exists():
        try:
            return datasets.Dataset.from_file(str(path))
        except Exception as error:  # pyarrow's errors are of every family
            logger.warning("making again: the cached table %s can't be read (%s)", path, one_line(error))
    with cached_file(path) as temporary:
        writer = ArrowWriter(path=str(temporary), features=features)
        for batch in make():
            writer.write_batch(batch)
        writer.finalize()
    return datasets.Dataset.from_file(str(path))
