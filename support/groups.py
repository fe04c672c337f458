"""Held-out pairs by the value of a key in their rows: --eval-by."""

import json
from collections.abc import Sequence
from pathlib import Path

from support.files import InputError
from support.forms import present
from support.records import read_records

MOST = 20  # groups


def read_groups(path: str | Path, key: str, pairs: Sequence) -> dict[str, set[int]]:
    """Value of `key` -> indexes of the pairs whose row has it, in the order of the file.

    `pairs` are of data.Pair. A value that is not a text is named by its JSON. A
    row without the key, or with null, is in the group "no KEY". Raises InputError if no row has the
    key, and for more than 20 values: such a key tells rows apart, not kinds of rows.
    """
    index = {pair.place: i for i, pair in enumerate(pairs)}
    absent, groups = f"no {key}", {}
    for place, record in read_records(path):
        if place in index:
            value = present(record).get(key, absent)
            name = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
            groups.setdefault(name, set()).add(index[place])
    values = groups.keys() - {absent}
    if not values:
        raise InputError(f"--eval-by {key}: no row of {path} that is used has this key")
    if len(values) > MOST:
        raise InputError(
            f"--eval-by {key}: {len(values):,} different values in {path}, wanted at most {MOST}"
        )
    return groups
