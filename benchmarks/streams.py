"""Host memory of a stream over files that are larger than memory, while it reads all of their rows.

  python benchmarks/streams.py               # 5 GB of JSON lines, then 5 GB of Parquet, an hour
  python benchmarks/streams.py --gb 0.2      # for a first look

Rows of about 2 kB are generated; the Parquet file has 20,000 of them in a row group. A process of
its own reads each file once through a training stream: a window of 8,192 rows over 8 data shards,
packed to 2,048 tokens, 8 sequences a step. Its anonymous and shared memory (RssAnon + RssShmem of
/proc/PID/status) is sampled after every step: mapped file pages are left out, because the kernel
drops them when memory is short. `first` is the most in the first tenth of the rows, `peak` the most
of all; growth above 15% is an error.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from medmoe_jax.storage.places import local

GROUP = 20_000
KINDS = ("jsonl", "parquet")
LIMIT = 1.15
WINDOW, SHARDS, LENGTH, BATCH = 8192, 8, 2048, 8
RESULTS = Path(__file__).parent / "results"


def rows(size: float) -> Iterator[dict[str, str]]:
    """Pairs of about 2 kB, until they hold `size` bytes."""
    choose = random.Random(0)
    words = [
        "".join(choose.choices("abcdefghijklmnop", k=choose.randint(2, 9))) for _ in range(999)
    ]
    sentences = [" ".join(choose.choices(words, k=20)) + "." for _ in range(5000)]
    written = 0
    while written < size:
        row = {
            "prompt": " ".join(choose.choices(sentences, k=3)),
            "response": " ".join(choose.choices(sentences, k=choose.randint(5, 25))),
        }
        written += len(row["prompt"]) + len(row["response"])
        yield row


def write(path: Path, size: float) -> int:
    """A file of generated rows; returns how many."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    count = 0
    if path.suffix == ".jsonl":
        with open(path, "w", encoding="utf-8") as file:
            for row in rows(size):
                file.write(json.dumps(row) + "\n")
                count += 1
        return count
    schema = pa.schema([("prompt", pa.string()), ("response", pa.string())])
    with pq.ParquetWriter(path, schema) as file:
        left = rows(size)
        while some := list(itertools.islice(left, GROUP)):
            file.write_table(pa.Table.from_pylist(some, schema), row_group_size=GROUP)
            count += len(some)
    return count


def memory() -> int:
    """Anonymous and shared bytes of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return sum(1024 * int(fields[key].split()[0]) for key in ("RssAnon", "RssShmem"))


def read(path: Path, count: int) -> None:
    """The child: one epoch of the file, and a line of JSON of what it took."""
    from medmoe_jax.data import tokenizers
    from medmoe_jax.data.batches import StreamSpec, make_stream
    from medmoe_jax.data.blocks import open_files
    from medmoe_jax.data.encode import Encoder
    from medmoe_jax.data.rows import RowReader
    from medmoe_jax.data.streamed_rows import StreamedRows
    from medmoe_jax.data.templates import load_template

    with tempfile.TemporaryDirectory() as folder:
        sample = (row["response"] for row in rows(1e6))
        words = tokenizers.train(sample, 2000, Path(folder) / "t.model", ["<|im_start|>"])
        encoder = Encoder(words, load_template("chatml", words))
        before, start = memory(), time.perf_counter()
        files = open_files(str(path), "train")
        source = StreamedRows("s", files, RowReader(), encoder, LENGTH, WINDOW, SHARDS)
        stream = make_stream({"s": source}, {"s": 1.0}, StreamSpec(BATCH, SHARDS))
        first = peak = done = 0
        while done < count:
            next(stream)
            done = stream.counters()["rows"]
            peak = max(peak, memory())
            if done <= count / 10:
                first = peak
        stream.close()
    seconds = time.perf_counter() - start
    print(
        json.dumps(
            {
                "kind": path.suffix[1:],
                "file_gb": path.stat().st_size / 1e9,
                "rows": done,
                "first_mb": (first - before) / 1e6,
                "peak_mb": (peak - before) / 1e6,
                "rows_per_second": done / seconds,
            }
        )
    )


def main() -> None:
    """Write the files, read each in a child, print and save the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="of files")
    parser.add_argument("--gb", type=float, default=5.0, help="of text in each file (%(default)s)")
    parser.add_argument("--output", type=local, default=None, help="JSON file of the results")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        read(Path(args.child[0]), int(args.child[1]))
        return
    results = []
    print("kind     file GB      rows  first MB  peak MB  rows/s")
    for kind in args.kinds:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"rows.{kind}"
            count = write(path, args.gb * 1e9)
            child = subprocess.run(
                [sys.executable, __file__, "--child", str(path), str(count)],
                env={**os.environ, "JAX_PLATFORMS": "cpu"},
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
        row = json.loads(child.stdout)
        results.append(row)
        print(
            f"{row['kind']:7} {row['file_gb']:8.2f} {row['rows']:9,} {row['first_mb']:9.0f} "
            f"{row['peak_mb']:8.0f} {row['rows_per_second']:7.0f}"
        )
    output = args.output or RESULTS / "streams.json"
    output.write_text(json.dumps({"text_gb": args.gb, "results": results}, indent=2) + "\n")
    grown = [row["kind"] for row in results if row["peak_mb"] > LIMIT * row["first_mb"]]
    if grown:
        sys.exit(f"memory grew by more than {LIMIT - 1:.0%}: {', '.join(grown)}")


if __name__ == "__main__":
    main()
