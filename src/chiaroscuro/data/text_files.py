"""The files of a corpus, read a few megabytes at a time: the columns that are needed, and no others.

Files of one corpus often differ in what nobody trains on: a column that only some have, a date that is null in one and
a string in the next. `datasets` gives each column the type that it has in the first file, so it would stop there, in
the middle of a run. Here each column has its type from the beginning, and the rest is not read, which is also faster.
What can't be read is said with the file, and where it is a row, with its number.

`datasets` stores the rows as a table, or streams them and knows the state of a stream.
"""

import codecs
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.json as pa_json
import pyarrow.parquet as pq
from datasets.builder import Key

from chiaroscuro.errors import UserError, one_line

CHUNK = 2**22
"""So many bytes of a file are read at a time, and the line that they end in."""

ROWS = 1024
"""So many rows of a Parquet file are read at a time."""

STRINGS, NUMBERS = "strings", "numbers"
"""What a column can hold."""

_TYPES: dict[str, pa.DataType] = {STRINGS: pa.string(), NUMBERS: pa.float64()}

_JSON_ERROR = re.compile(r"JSON parse error: (?P<why>.*?)\.? in row (?P<row>\d+)")


@dataclass
class _Config(datasets.BuilderConfig):
    format: str = "txt"
    files: Mapping[str, list[str]] = field(default_factory=dict)
    columns: Mapping[str, str] = field(default_factory=dict)


class TextFiles(datasets.ArrowBasedBuilder):
    """Rows of files: lines of `txt`, objects of `jsonl` or `jsonl.zst`, rows of `parquet`.

    Args:
        cache_dir: where `stored` keeps its table, in a folder named by the paths, not by what the files hold.
        format: of all files.
        files: of each split, in their order.
        columns: those to read, each of `STRINGS`, none of which may be missing, or of `NUMBERS`. A `txt` file has one,
            "text".

    """

    BUILDER_CONFIG_CLASS = _Config

    def stored(self, split: str) -> datasets.Dataset:
        """The rows of a split, in a memory-mapped table.

        Raises:
            UserError: a file can't be read, or lacks a column.

        """
        try:
            self.download_and_prepare()
        except datasets.exceptions.DatasetGenerationError as error:  # around that of `_generate_tables`
            if isinstance(error.__cause__, UserError):
                raise error.__cause__ from None
            raise
        if not self.info.splits[split].num_examples:  # which as_dataset refuses
            return datasets.Dataset.from_dict({name: [] for name in self.config.columns}, self.info.features)
        return self.as_dataset(split=datasets.Split(split))

    def streamed(self, split: str) -> datasets.IterableDataset:
        """The rows of a split, read anew by whoever iterates over them; a UserError then as in `stored`."""
        return self.as_streaming_dataset(split=datasets.Split(split))

    def _info(self) -> datasets.DatasetInfo:
        schema = pa.schema({name: _TYPES[kind] for name, kind in self.config.columns.items()})
        return datasets.DatasetInfo(features=datasets.Features.from_arrow_schema(schema))

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        files = self.config.files.items()
        return [datasets.SplitGenerator(name=split, gen_kwargs={"files": own}) for split, own in files]

    def _generate_shards(self, files: Sequence[str]) -> Iterator[str]:
        yield from files

    def _generate_tables(self, files: Sequence[str]) -> Iterator[tuple[Key, pa.Table]]:
        read = _READERS[self.config.format]
        for number, file in enumerate(files):
            rows = 0
            try:
                for part, table in enumerate(read(file, self.config.columns)):
                    table.validate(full=True)  # that strings are UTF-8, too
                    _refuse_rows_without_text(file, rows, table, self.config.columns)
                    yield Key(number, part), table
                    rows += len(table)
            except UserError:
                raise
            except Exception as error:  # of Python, pyarrow or the json module: a damaged file raises many kinds
                held = " and ".join(f"{kind} in a column {name!r}" for name, kind in self.config.columns.items())
                wanted = "text in UTF-8" if self.config.format == "txt" else f"a {self.config.format} file with {held}"
                raise UserError(f"{file} can't be read{_where(error, rows)}; it must be {wanted}") from error


def _where(error: Exception, before: int) -> str:
    """After which row, or at which, and why."""
    said = one_line(error)
    if found := _JSON_ERROR.fullmatch(said):  # whose row is counted from the chunk's first, which is 0
        why = re.sub(r"Column\(/(.+)\) changed from \w+ to (\w+)", r"its column '\1' holds \2", found["why"])
        why = re.sub(r"Column\(\) changed from object to (\w+)", r"it is \1, not object", why)
        return f" at row {before + int(found['row']) + 1:,} ({why})"
    return f" after row {before:,} ({said})" if before else f" ({said})"


def _refuse_rows_without_text(file: str, before: int, table: pa.Table, columns: Mapping[str, str]) -> None:
    for name, kind in columns.items():
        if kind == STRINGS and table[name].null_count:
            row = before + table[name].is_null().index(True).as_py() + 1
            other = ", or name another column in a recipe by data.column" if len(columns) == 1 else ""
            raise UserError(
                f"{file} has a row without text: row {row:,} is null in the column {name!r}; remove such rows{other}"
            )


def _refuse_missing(file: str, columns: Mapping[str, str], known: Sequence[str]) -> None:
    for name in columns:
        if name not in known:
            other = ", or name that of the texts in a recipe by data.column" if len(columns) == 1 else ""
            raise UserError(
                f"{file} has no column {name!r}, only {', '.join(known) or 'empty rows'}; rename one{other}"
            )


# ---- one format each: tables of the columns, of some rows at a time ----------------------------------------


def _lines(file: str, columns: Mapping[str, str]) -> Iterator[pa.Table]:
    _refuse_missing(file, columns, ["text"])
    with open(file, encoding="utf-8") as stream:
        while lines := stream.readlines(CHUNK):
            yield pa.table({"text": pa.array([line.removesuffix("\n") for line in lines], pa.string())})


def _json_lines(file: str, columns: Mapping[str, str]) -> Iterator[pa.Table]:
    schema = pa.schema({name: _TYPES[kind] for name, kind in columns.items()})
    parse = pa_json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
    # pyarrow says where a text ends too early, and needs no package for it.
    opened = pa.input_stream(file, compression="zstd" if file.endswith(".zst") else None)
    first = True
    with io.BufferedReader(opened) as stream:
        while lines := stream.readlines(CHUNK):
            chunk = b"".join(lines)
            if first:
                chunk = chunk.removeprefix(codecs.BOM_UTF8)
            if not chunk.strip():
                continue
            if chunk.lstrip().startswith(b"null"):  # which ends the process, in pyarrow 26
                raise UserError(f"{file} can't be read: a row is null, not an object; remove such rows")
            # One block: lines are not told apart from values of several lines at a block's end.
            read = pa_json.ReadOptions(use_threads=False, block_size=len(chunk) + 1)
            table = pa_json.read_json(pa.BufferReader(chunk), read_options=read, parse_options=parse)
            if first:
                _refuse_missing_keys(file, columns, table, chunk)
            first = False
            yield table.select(list(columns))


def _refuse_missing_keys(file: str, columns: Mapping[str, str], table: pa.Table, chunk: bytes) -> None:
    """A key that no row of the first chunk has is not known; one that some have is missing in the others."""
    empty = [name for name in columns if table[name].null_count == len(table)]
    if empty:
        beginning, _ = json.JSONDecoder().raw_decode(chunk.decode().lstrip())
        _refuse_missing(file, columns, [*dict.fromkeys([*beginning, *(name for name in columns if name not in empty)])])


def _parquet(file: str, columns: Mapping[str, str]) -> Iterator[pa.Table]:
    with pq.ParquetFile(file) as parquet:
        schema = parquet.schema_arrow
        _refuse_missing(file, columns, schema.names)
        for name, kind in columns.items():
            if schema.names.count(name) > 1:
                raise UserError(f"{file} has {schema.names.count(name)} columns {name!r}; rename all but one")
            held = schema.field(name).type
            if not _is_of(held, kind):
                shown = "lists" if pa.types.is_list(held) or pa.types.is_large_list(held) else held
                raise UserError(f"{file}: the column {name!r} holds {shown}; it must hold {kind}")
        wanted = pa.schema({name: _TYPES[kind] for name, kind in columns.items()})
        for batch in parquet.iter_batches(ROWS, columns=list(columns)):
            yield pa.Table.from_batches([batch]).select(list(columns)).cast(wanted)


def _is_of(held: pa.DataType, kind: str) -> bool:
    if pa.types.is_dictionary(held):
        held = held.value_type
    if pa.types.is_null(held):
        return True
    if kind == NUMBERS:
        return pa.types.is_integer(held) or pa.types.is_floating(held)
    return pa.types.is_string(held) or pa.types.is_large_string(held) or pa.types.is_string_view(held)


_READERS = {"txt": _lines, "jsonl": _json_lines, "jsonl.zst": _json_lines, "parquet": _parquet}
FORMATS = tuple(_READERS)
"""What a file's name ends in."""
