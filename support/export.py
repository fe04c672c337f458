"""The files beside exported weights: config.json, tokenizer, generation settings, chat template.

CHAT_TEMPLATE       the format that data.ChatFormat trains, as transformers and vLLM apply it
source_template     the chat template that a model directory comes with
write_companions    everything in an exported directory but the weights
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from support.files import InputError, read_json, read_start, shown, write_json
from support.llama_config import token_ids

COMPANIONS = (  # copied as they are
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model"),
    "generation_config.json",
)
TEMPLATES = ("chat_template.jinja", "chat_template.json")  # copied, unless ours is written
# Keys of the source's config.json that are not passed on: they name a dtype or a file that the
# export does not have, or code that would be executed.
NOT_PASSED_ON = {"auto_map", "dtype", "rope_parameters", "_name_or_path", "transformers_version"}
# Gives exactly the ids of ChatFormat.prompt (tests/test_export.py), if the tokenizer splits the
# header's newlines from the text after them, as Llama 3's does.
CHAT_TEMPLATE = (
    "{{ '<|begin_of_text|>' }}"
    "{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{ message['content'] | trim }}{{ '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)


def source_template(directory: str | Path) -> str | None:
    """The chat template of a model directory, as text; None if it has none. Raises InputError for
    a malformed tokenizer_config.json."""
    path = Path(directory) / "chat_template.jinja"
    if path.exists():
        return read_start(path, 2**20, "a chat template").decode(errors="replace")
    template = _tokenizer_config(Path(directory)).get("chat_template")
    return template if template is None or isinstance(template, str) else json.dumps(template)


def _tokenizer_config(directory: Path) -> dict:
    path = directory / "tokenizer_config.json"
    if not path.exists():
        return {}
    found = read_json(path, "a tokenizer_config.json")
    if not isinstance(found, dict):
        raise InputError(f"{path}: {shown(found)}, wanted an object")
    return found


def write_companions(
    directory: Path, config: dict, source: str | Path | None, stop_ids: Sequence[int]
) -> None:
    """Writes config.json (with the source's keys that change no computation, such as pad_token_id)
    and copies the source's tokenizer and generation files.

    stop_ids: given if the model was trained on chats. They are added to the eos_token_id of
    config.json and generation_config.json: a base model's ends a text, not a turn, so generation
    would not stop at the end of an answer. And the chat template that was trained takes the place
    of the source's, in tokenizer_config.json and no other file: served with another template, the
    model would see a format that it was not trained on.
    """
    passed_on = {}
    if source is not None and (Path(source) / "config.json").is_file():
        there = read_json(Path(source) / "config.json")
        passed_on = {key: value for key, value in there.items() if key not in NOT_PASSED_ON}
    write_json(directory / "config.json", passed_on | config)
    for name in COMPANIONS if stop_ids else COMPANIONS + TEMPLATES:
        if source is not None and (Path(source) / name).is_file():
            shutil.copyfile(Path(source) / name, directory / name)
    if not stop_ids:
        return
    for path in (directory / "config.json", directory / "generation_config.json"):
        if path.exists():
            _add_stop_ids(path, stop_ids)
    if source is not None:
        chat = _tokenizer_config(Path(source)) or {"tokenizer_class": "PreTrainedTokenizerFast"}
        write_json(directory / "tokenizer_config.json", chat | {"chat_template": CHAT_TEMPLATE})


def _add_stop_ids(path: Path, stop_ids: Sequence[int]) -> None:
    """Adds ids to the eos_token_id of a JSON file, unless it has them already."""
    raw = read_json(path)
    eos = token_ids(raw, "eos_token_id", path)
    if more := [i for i in stop_ids if i not in eos]:
        write_json(path, raw | {"eos_token_id": [*eos, *more]})
