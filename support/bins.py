"""The bins that data.split_pairs fills: a step's micro-batches."""

import heapq

import numpy as np


def fewest_bins(
    indexes: list[int], lengths: np.ndarray, multiple: int, most: int
) -> list[list[int]]:
    """Puts each index into the emptiest bin (the first of equals). The number of bins is the
    smallest multiple of `multiple` with which no bin holds more than `most`. Fullest bin first.

    lengths: of the indexes, longest first, none above `most`.
    """
    # Lower bounds of the number of bins: by all lengths; and, since at most k pieces longer than
    # most / (k + 1) fit in one bin, by the number of such pieces.
    bins = max(1, -(-int(lengths.sum()) // most))
    for k in range(1, 9):
        bins = max(bins, -(-int((lengths * (k + 1) > most).sum()) // k))

    def fill(m: int) -> list[list[int]] | None:
        return fill_bins(indexes, lengths.tolist(), multiple * m, most)

    # More bins never make the fullest one fuller, so the smallest m that is enough lies between one
    # that is not and one that is: found by doubling, then by halving.
    fewest = m = -(-bins // multiple)
    step = 1
    while (filled := fill(m)) is None:
        fewest, m, step = m + 1, m + step, 2 * step
    while fewest < m:
        middle = (fewest + m) // 2
        if (found := fill(middle)) is None:
            fewest = middle + 1
        else:
            filled, m = found, middle
    return filled


def fill_bins(
    indexes: list[int], lengths: list[int], bins: int, most: int
) -> list[list[int]] | None:
    """Each index into the emptiest bin (the first of equals); the bins, fullest first. None if one
    would hold more than `most`."""
    loads = [(0, b) for b in range(bins)]  # a heap
    contents: list[list[int]] = [[] for _ in loads]
    for i, length in zip(indexes, lengths, strict=True):
        load, b = loads[0]
        if load + length > most:
            return None
        contents[b].append(i)
        heapq.heapreplace(loads, (load + length, b))
    return [contents[b] for _, b in sorted(loads, key=lambda load: (-load[0], load[1]))]
