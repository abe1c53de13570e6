"""What streaming a text costs: throughput beside the same text stored as tokens, and memory by the text's size.

    python -m benchmarks.streaming [--gigabytes 0.2,1,5]

The documentation of Python, as shards of JSON lines (zstd) and of Parquet. The figures, in
benchmarks/results/streaming.json, are:

- training `recipes/small.yaml`, one thread, stored and streamed in turns: tokens a second, and parts of the stored;
- reading rows alone, likewise: tokens a second that one process can hand to a model;
- peak memory of a process that reads a whole corpus, of so many gigabytes: the shards are linked as often as it takes,
  and a token is a word, which takes less time.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from chiaroscuro.data import TextStream, TokenBlocks, load_corpus, load_tokenizer, stream_corpus, tokenize_corpus
from chiaroscuro.training import read_records

RESULTS = Path("benchmarks/results/streaming.json")
LENGTH, SHUFFLE, SHARDS = 256, 1024, 4
ROUNDS, STEPS = 3, 60
FEW = 64
"""Blocks of a window while a model trains, so that many are read."""
ONE_THREAD = {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}
READ = 2000
"""Rows read for each speed, after those of the first window."""
REPEATED = 20
"""How often each document stands in its shard, so that a shard is one of 9 MB of text."""


def write_shards(folder: Path) -> int:
    """The text in both forms, and as lines for the stored one; its bytes."""
    corpus = load_corpus("python-docs")
    size = 0
    for split, parts in (("train", SHARDS), ("validation", 1)):
        rows = corpus.splits[split]["text"][:]
        for form in ("jsonl.zst", "parquet"):
            (folder / form).mkdir(parents=True, exist_ok=True)
        for i in range(parts):
            own = rows[i::parts] * (REPEATED if split == "train" else 1)
            lines = "".join(json.dumps({"text": row}) + "\n" for row in own)
            (folder / f"jsonl.zst/{split}-{i}.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
            pq.write_table(pa.table({"text": own}), folder / f"parquet/{split}-{i}.parquet", row_group_size=64)
            size += sum(len(row.encode()) for row in own) if split == "train" else 0
    return size


def training(folder: Path, form: str, streaming: bool) -> float:
    """Tokens a second of a run, after its first records, of steps 1 to 10."""
    with tempfile.TemporaryDirectory() as output:
        changes = [f"trainer.steps={STEPS}", "trainer.tokens=null", "trainer.warmup_steps=1", "trainer.log_every=10"]
        changes += [f"trainer.output_dir={output}/run", "trainer.validation_tokens=2048"]
        changes += [f"data.source={folder / form}", "data.documents=true", f"data.streaming={str(streaming).lower()}"]
        changes += [f"data.shuffle={FEW}"] if streaming else []
        command = [sys.executable, "-m", "chiaroscuro", "train", "recipes/small.yaml", *changes]
        subprocess.run(command, check=True, capture_output=True, env=os.environ | ONE_THREAD)
        records = [record for record in read_records(Path(output) / "run/metrics.jsonl") if record["kind"] == "train"]
    return statistics.fmean(record["tokens_per_second"] for record in records[2:])


def reading(folder: Path, form: str, streaming: bool) -> float:
    """Tokens a second of rows that nothing is done with."""
    tokenizer = load_tokenizer("bpe:8192", load_corpus("python-docs"))
    if streaming:
        corpus = stream_corpus(folder / form, separator="eos")
        stream = TextStream([corpus], [], tokenizer, LENGTH, SHUFFLE, 0)
        rows = stream.rows(SHUFFLE + READ, 8, 1)
        rows[SHUFFLE - 1]
    else:
        stored = tokenize_corpus(load_corpus(folder / form, separator="eos"), tokenizer)["train"]
        rows = TokenBlocks(stored, LENGTH)
    begun = time.perf_counter()
    for i in range(READ):
        rows[(SHUFFLE + i) % len(rows)]
    return READ * LENGTH / (time.perf_counter() - begun)


def memory(folder: str, form: str, gigabytes: float, size: int) -> dict[str, float]:
    """Of a process that reads a corpus of so many gigabytes of text through, once."""
    with tempfile.TemporaryDirectory(dir=folder) as linked:
        times = round(gigabytes * 1e9 / size)
        for i in range(times):
            for shard in range(SHARDS):
                os.link(f"{folder}/{form}/train-{shard}.{form}", f"{linked}/train-{i:04d}-{shard}.{form}")
        tokenizer = load_tokenizer("words", load_corpus("python-docs"))
        corpus = stream_corpus(linked, needed=("train",), separator="eos")
        stream = TextStream([corpus], [], tokenizer, LENGTH, SHUFFLE, 0)
        stored = tokenize_corpus(load_corpus(f"{folder}/{form}", separator="eos"), tokenizer)["train"]
        tokens = times * stored.count
        rows = stream.rows(tokens // LENGTH - 1, 8, 1)
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak: what was prepared is no part of it
        begun = time.perf_counter()
        for i in range(len(rows)):
            rows[i]
        seconds = time.perf_counter() - begun
    return {"bytes": times * size, "tokens": tokens, "peak": peak(), "bytes_per_second": times * size / seconds}


def peak() -> int:
    """The most bytes that this process has held. What `getrusage` says has its parent's in it."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def main() -> None:
    """Measure, print, and write."""
    os.environ |= ONE_THREAD  # the tokenizer's too
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", default="0.2,1,5")
    sizes = [float(size) for size in parser.parse_args().gigabytes.split(",")]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = write_shards(folder)
        ways = {"stored": ("parquet", False), "parquet": ("parquet", True), "jsonl.zst": ("jsonl.zst", True)}
        found: dict[str, dict[str, float]] = {}
        for kind, measure in (("training", training), ("reading", reading)):
            speeds: dict[str, list[float]] = {way: [] for way in ways}
            for _ in range(ROUNDS):
                for way, (form, streaming) in ways.items():
                    speeds[way].append(measure(folder, form, streaming))
            found[kind] = {way: statistics.fmean(each) for way, each in speeds.items()}
            for way, speed in found[kind].items():
                print(f"{kind:<9} {way:<10} {speed:>12,.0f} tokens/s {speed / found[kind]['stored']:.3f}")
        measured = []
        for gigabytes in sizes:
            for form in ("jsonl.zst", "parquet"):
                with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                    one = pool.submit(memory, name, form, gigabytes, size).result()
                measured.append({"form": form} | one)
                rate = one["bytes_per_second"] / 1e6
                print(f"{form:<10} {one['bytes'] / 1e9:.2f} GB  peak {one['peak'] / 1e6:,.0f} MB  {rate:.1f} MB/s")
    of_stored = {kind: {way: speed / each["stored"] for way, speed in each.items()} for kind, each in found.items()}
    results = {"of stored": of_stored, "tokens a second": found, "memory": measured}
    RESULTS.write_text(json.dumps(results | {"cores": os.cpu_count(), "rounds": ROUNDS}, indent=1) + "\n")


if __name__ == "__main__":
    main()
