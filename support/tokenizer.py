"""tokenizer.json, read for plain text."""

import json
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from support.files import InputError, read_start, shown, unique

TOKENIZER_BYTES = 2**25  # Llama 3's is 9 MB


def load_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer.json for plain text: no padding, no truncation, control tokens stay text."""
    raw = read_start(path, TOKENIZER_BYTES + 1, "the model's tokenizer")
    if len(raw) > TOKENIZER_BYTES:
        raise InputError(f"{path}: more than {TOKENIZER_BYTES:,} bytes, which is not a tokenizer")
    try:
        parsed = json.loads(raw, object_pairs_hook=unique)
        model = parsed.get("model") if isinstance(parsed, dict) else None
        # Llama 3's is null. With another value the tokenizers library may abort the process.
        if isinstance(model, dict) and (prefix := model.get("continuing_subword_prefix")):
            raise ValueError(f"continuing_subword_prefix is {shown(prefix)}, wanted null")
        if isinstance(model, dict) and (dropout := model.get("dropout")):
            raise ValueError(f"dropout is {shown(dropout)}, wanted null: ids would be random")
        tokenizer = Tokenizer.from_str(raw.decode())
    except Exception as error:  # tokenizers raises bare Exception
        raise InputError(f"{path}: not a tokenizer ({shown(str(error), 150)})") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    # True means that "<|eot_id|>" in a text is encoded as text. tokenizer.json cannot say so.
    tokenizer.encode_special_tokens = True
    return tokenizer


CONTROL = ("begin_of_text", "start_header_id", "end_header_id", "eot_id", "end_of_text", "eom_id")


def control_ids(tokenizer: Tokenizer, path: Path) -> dict[str, int | None]:
    """The ids of Llama 3's control tokens; eom_id may be None, since only Llama 3.1 and later have
    it. Raises InputError if another is missing, or if plain text makes one."""
    ids = {}
    for name in CONTROL:
        token = f"<|{name}|>"
        ids[name] = tokenizer.token_to_id(token)
        if ids[name] is None and name != "eom_id":
            raise InputError(f"{path}: has no token {token}, wanted Llama 3's control tokens")
        if ids[name] in tokenizer.encode(token, add_special_tokens=False).ids:
            raise InputError(
                f"{path}: makes the control token {token} from text (it is not marked special)"
            )
    return ids


# Each byte that occurs in UTF-8: a byte-level tokenizer may lack some.
EVERY_BYTE = [range(32, 127), range(0x80, 0xC0), range(0x80, 0x800, 64), range(0xFFF, 0xD000, 4096)]
EVERY_BYTE += [(0xD000, 0xE000, 0xF000, 0x10000, 0x40000, 0x80000, 0xC0000, 0x100000)]
SAMPLES = ("a\n\nb", "A b", *("".join(map(chr, points)) for points in EVERY_BYTE))


def check_keeps_text(tokenizer: Tokenizer, path: Path) -> None:
    """Raises InputError if a tokenizer loses or changes white space, letters or bytes, as Llama 3's
    does without its pre-tokenizer."""
    for text in SAMPLES:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        if (back := tokenizer.decode(ids, skip_special_tokens=False)) != text:
            at = max(0, len(os.path.commonprefix([back, text])) - 2)  # shortly before they differ
            raise InputError(
                f"{path}: makes {shown(back[at:])} of {shown(text[at:])}, so it loses or changes "
                "text"
            )


def check_vocabulary(parts: Iterable[np.ndarray], vocab_size: int | None, place: str) -> None:
    """Raises InputError, naming the place, if a token id is not below vocab_size (None: any is)."""
    top = max(int(ids.max(initial=0)) for ids in parts)
    if vocab_size is not None and top >= vocab_size:
        raise InputError(
            f"{place}: token id {top} is not below the model's vocab_size {vocab_size}"
        )


def ids_of_rendered(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text in which control tokens count, as transformers and vLLM encode the text of
    a chat template."""
    tokenizer.encode_special_tokens = False
    try:
        return tokenizer.encode(text, add_special_tokens=False).ids
    finally:
        tokenizer.encode_special_tokens = True
