"""What is remembered of a million records in few bytes each: integers by hashes in arrays, and texts in a temporary file."""

from __future__ import annotations

import weakref
from array import array
from tempfile import TemporaryFile


class HashTable:
    """Integers of 64 bits by hashes of 64 bits, as `hash64` makes them: 24 to 48 bytes an entry, where a dictionary takes 150."""

    def __init__(self) -> None:
        self._count, self._mask = 0, (1 << 10) - 1
        self._keys, self._values = _zeros(self._mask + 1), _zeros(self._mask + 1)

    def __len__(self) -> int:
        return self._count

    def get(self, key: int) -> int | None:
        """The integer of a hash; None where there is none."""
        place = self._place(key := key or 1)
        return self._values[place] if self._keys[place] else None

    def setdefault(self, key: int, value: int) -> int:
        """The integer of a hash, which is `value` from now on where there was none."""
        place = self._place(key := key or 1)
        if self._keys[place]:
            return self._values[place]
        self._keys[place], self._values[place] = key, value
        self._count += 1
        if 3 * self._count > 2 * self._mask:
            self._grow()
        return value

    def _place(self, key: int) -> int:
        """Where a hash is, or would be: it is looked for from the place that its last bits name. 0 is no hash but an empty place."""
        keys, mask = self._keys, self._mask
        place = key & mask
        while (there := keys[place]) and there != key:
            place = place + 1 & mask
        return place

    def _grow(self) -> None:
        keys, values = self._keys, self._values
        self._mask = 2 * self._mask + 1
        self._keys, self._values = _zeros(self._mask + 1), _zeros(self._mask + 1)
        for key, value in zip(keys, values, strict=True):
            if key:
                place = self._place(key)
                self._keys[place], self._values[place] = key, value


class TextFile:
    """Texts in a temporary file, by their numbers from 0; eight bytes each stay in memory."""

    def __init__(self) -> None:
        self._ends = array("q")
        self._file = TemporaryFile()  # noqa: SIM115 - it is open as long as this object lives
        weakref.finalize(self, self._file.close)

    def __len__(self) -> int:
        return len(self._ends)

    def add(self, text: str) -> int:
        """Add a text, and return its number."""
        first = self._ends[-1] if self._ends else 0
        self._file.seek(first)
        self._ends.append(first + self._file.write(text.encode("utf-8", "surrogatepass")))
        return len(self._ends) - 1

    def __getitem__(self, number: int) -> str:
        first = self._ends[number - 1] if number else 0
        self._file.seek(first)
        return self._file.read(self._ends[number] - first).decode("utf-8", "surrogatepass")


def _zeros(count: int) -> array[int]:
    return array("q", bytes(8 * count))
