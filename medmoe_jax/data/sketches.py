"""What is kept of rows to find those that repeat each other: on the disk, whatever their number.

A row's text is its words (`data.words`), every five that follow each other are an n-gram, and its
n-grams are a set of 64-bit hashes. A MinHash (Broder 1997) of P hashes stands for the set: the
share in which two of them agree estimates the Jaccard similarity |A ∩ B| / |A ∪ B|. Rows that agree
in all hashes of some band are candidates (Leskovec, Rajaraman and Ullman, Mining of Massive
Datasets, 3.4); the sets themselves then decide.

Axis legend: N rows, P hashes of a MinHash, S n-grams of a row.
"""

from __future__ import annotations

import functools
import hashlib
import json
import tempfile
from array import array
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from medmoe_jax.data.conversation import Conversation, said
from medmoe_jax.data.words import words

if TYPE_CHECKING:
    from datasketch import MinHash

WORDS = 5  # of an n-gram; a text with fewer is one n-gram
HASHES = 256
# A pair at the threshold itself is a candidate with at least this probability; a closer one is one
# almost surely.
RECALL = 0.999
# A candidate's sets are read where its estimate is not further below the threshold: four times the
# estimate's standard deviation at 0.8.
SLACK = 0.1
_AT_ONCE = 4096  # n-grams, and rows
_SCHEME = "affine32"  # of datasketch: hashes of 32 bits
_ODD = np.uint64(0x9E3779B97F4A7C15)


def _minhashes() -> Callable[[], MinHash]:
    """What makes empty MinHashes, all with the same permutations."""
    from datasketch import MinHash  # loads SciPy: half a second

    same = MinHash(HASHES).permutations
    return functools.partial(MinHash, HASHES, permutations=same, scheme=_SCHEME, hashfunc=int)


class Sketches:
    """Rows by number, in the order of `add`; a context manager that removes its files at its end.

    Memory is 32 bytes a row. The disk (in $TMPDIR) takes 1 KiB a row and 8 bytes a word.
    """

    def __init__(self) -> None:
        self._open = ExitStack()
        folder = self._open.enter_context(tempfile.TemporaryDirectory(prefix="medmoe-sketches-"))

        def file(name: str) -> BinaryIO:
            return self._open.enter_context(open(Path(folder) / name, "w+b"))

        self._shingles, self._places = _Spool(file("shingles")), _Spool(file("places"))
        self._signatures, self._digests = file("signatures"), bytearray()
        self._new = _minhashes()
        self._count = 0

    def __enter__(self) -> Sketches:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def __len__(self) -> int:
        return self._count

    def add(self, row: Conversation, place: str) -> None:
        """Keep the next row, before any is asked for; `place` is where it stands."""
        shingles_S = shingles(said(row))
        minhash = self._new()
        for start in range(0, len(shingles_S), _AT_ONCE):
            high = shingles_S[start : start + _AT_ONCE] >> np.uint64(32)
            minhash.update_batch(high.tolist())
        self._signatures.write(minhash.hashvalues.tobytes())
        self._shingles.append(shingles_S.tobytes())
        self._places.append(place.encode())
        self._digests += content(row)
        self._count += 1

    def place(self, number: int) -> str:
        """Where a row stands."""
        return self._places[number].decode()

    def shingles(self, number: int) -> np.ndarray:
        """A row's n-grams, uint64 [S], rising."""
        return np.frombuffer(self._shingles[number], np.uint64)

    def digests(self) -> np.ndarray:
        """Hashes of all that each row says, S16 [N]."""
        return np.frombuffer(bytes(self._digests), "S16")

    def similarity(self, one: int, other: int) -> float:
        """The Jaccard similarity of two rows' n-grams; 0 where one has none."""
        return jaccard(self.shingles(one), self.shingles(other))

    def near(self, number: int, others: np.ndarray, similarity: float) -> Iterator[int]:
        """Those of some rows that are at least so similar to a row."""
        same = self._minhashes[others] == self._minhashes[number]
        agree = np.count_nonzero(same, axis=1)
        for other in others[agree >= HASHES * (similarity - SLACK)].tolist():
            if self.similarity(number, other) >= similarity:
                yield other

    def buckets(self, numbers: np.ndarray, similarity: float) -> Iterator[np.ndarray]:
        """Groups of candidates among some rows: those of a bucket agree in a band.

        Args:
          numbers: the rows, int64, rising.
          similarity: at which two rows are near.

        Yields:
          numbers, rising, at least two at a time; a pair may come several times.
        """
        numbers = numbers[np.diff(self._shingles.ends)[numbers] > 0]
        width = band_width(similarity)
        for start in range(0, HASHES - width + 1, width):
            keys_N = self._keys(numbers, start, start + width)
            order_N = np.argsort(keys_N, kind="stable")
            sorted_N = keys_N[order_N]
            cuts = np.flatnonzero(sorted_N[1:] != sorted_N[:-1]) + 1
            starts = np.concatenate([[0], cuts])
            sizes = np.diff(np.concatenate([starts, [len(order_N)]]))
            many = sizes > 1
            for first, size in zip(starts[many], sizes[many], strict=True):
                yield numbers[order_N[first : first + size]]

    def _keys(self, numbers: np.ndarray, start: int, stop: int) -> np.ndarray:
        """One hash of a band of each MinHash, uint64 [N]."""
        keys_N = np.zeros(len(numbers), np.uint64)
        for at in range(0, len(numbers), _AT_ONCE):
            rows = slice(at, at + _AT_ONCE)
            for column in self._minhashes[numbers[rows], start:stop].T:
                keys_N[rows] = keys_N[rows] * _ODD + column
        return keys_N

    @functools.cached_property
    def _minhashes(self) -> np.ndarray:
        """All MinHashes, uint32 [N, P], read from the disk where they are asked for."""
        self._signatures.flush()
        return np.memmap(self._signatures, np.uint32, "r", shape=(self._count, HASHES))


class _Spool:
    """Byte strings on the disk, by number."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._ends = array("q", [0])

    @property
    def ends(self) -> np.ndarray:
        """Where each begins, and the last ends, int64 [N + 1]."""
        return np.frombuffer(self._ends.tobytes(), np.int64)

    def append(self, data: bytes) -> None:
        self._file.write(data)
        self._ends.append(self._ends[-1] + len(data))

    def __getitem__(self, number: int) -> bytes:
        start, stop = self._ends[number], self._ends[number + 1]
        self._file.seek(start)
        return self._file.read(stop - start)


def content(row: Conversation) -> bytes:
    """A hash of all that a row says, whatever it says of its language: 16 bytes."""
    all_said = [row["conversations"], row.get("tools")]
    return hashlib.blake2b(json.dumps(all_said, sort_keys=True).encode(), digest_size=16).digest()


def shingles(text: str) -> np.ndarray:
    """The set of a text's n-grams as hashes, uint64 [S], rising; none where there is no word."""
    hashes = np.array([_word_hash(word) for word in words(text)], np.uint64)
    size = min(WORDS, len(hashes))
    count = len(hashes) - size + 1 if size else 0
    total_S = np.full(count, size, np.uint64)  # a short text is no n-gram of a longer one
    for at in range(size):
        total_S = total_S * _ODD + hashes[at : at + count]
    return np.unique(total_S)


def jaccard(one: np.ndarray, other: np.ndarray) -> float:
    """|A ∩ B| / |A ∪ B| of two sets, as arrays without repetitions; 0 where one is empty."""
    common = len(np.intersect1d(one, other, assume_unique=True))
    return common / (len(one) + len(other) - common) if common else 0.0


def band_width(similarity: float) -> int:
    """Hashes of a band: the most at which a pair of this similarity is found with RECALL.

    It agrees in one of the HASHES // r bands of r hashes with probability 1 - (1 - s^r)^(P / r).
    """
    fits = (
        width
        for width in range(HASHES, 0, -1)
        if 1 - (1 - similarity**width) ** (HASHES // width) >= RECALL
    )
    return next(fits)


@functools.lru_cache(1 << 16)
def _word_hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
