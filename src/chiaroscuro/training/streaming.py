"""The notes of a streamed run: where each lane stood, beside a checkpoint's other files."""

import json
from pathlib import Path

from accelerate.utils import gather_object

from chiaroscuro.data import StreamedBlocks
from chiaroscuro.data.streams import Notes

_NOTES = "stream.json"


def gather_notes(rows: StreamedBlocks, processes: int) -> Notes:
    """The notes of all processes; each has those of its own lanes, and all must ask."""
    if processes == 1:
        return rows.notes
    # Lanes that a process took over from a checkpoint and does not read are older than their reader's.
    own = {lane: noted for lane, noted in rows.notes.items() if int(lane) in rows.lanes_read}
    return {lane: noted for notes in gather_object([own]) for lane, noted in notes.items()}


def write_notes(folder: Path, notes: Notes) -> None:
    """Put the notes into a checkpoint that is not sealed yet."""
    (folder / _NOTES).write_text(json.dumps(notes), encoding="utf-8")


def read_notes(checkpoint: Path) -> Notes:
    """Those of a checkpoint; without any the lanes are read from their beginning, and give the same rows."""
    file = checkpoint / _NOTES
    notes: Notes = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return notes
