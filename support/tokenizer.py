"""tokenizer.json, read for plain text."""

import json
from pathlib import Path

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
        tokenizer = Tokenizer.from_str(raw.decode())
    except Exception as error:  # tokenizers raises bare Exception
        raise InputError(f"{path}: not a tokenizer ({shown(str(error), 150)})") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    # True means that "<|eot_id|>" in a text is encoded as text. tokenizer.json cannot say so.
    tokenizer.encode_special_tokens = True
    return tokenizer


def check_keeps_text(tokenizer: Tokenizer, path: Path) -> None:
    """Raises InputError if a tokenizer drops white space or letters, as Llama 3's does without its
    pre-tokenizer."""

    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    for text, without in (("a\n\nb", "ab"), ("a b", "ab"), ("é", "")):
        if ids(text) == ids(without):
            raise InputError(f"{path}: gives {text!r} the ids of {without!r}, so it loses text")
