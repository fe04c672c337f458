"""Writes a model directory that transformers and vLLM load.

export_run          OUT/model, at the end of a run
save_model          the weights, sharded or not, and all that belongs beside them
CHAT_TEMPLATE       the format that data.ChatFormat trains, as transformers and vLLM apply it
source_template     the chat template that a model directory comes with
exported_template   the one that its export gets
write_companions    config.json, tokenizer, generation settings, chat template
"""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor

from support import checkpoints, notice
from support.files import InputError, flush, naming, read_json, read_start, shown, write_json
from support.held_out import last_turn
from support.llama_config import token_ids
from support.processes import announced, on_first_process
from support.tensors import finite

SHARD_BYTES = 5_000_000_000
COMPANIONS = (  # copied as they are
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model"),
    *("vocab.json", "merges.txt", "added_tokens.json", "generation_config.json"),
)
TEMPLATES = ("chat_template.jinja", "chat_template.json")  # copied, unless ours is written
# Keys of the source's config.json that are not passed on: they name a dtype or a file that the
# export does not have, or code that would be executed. (transformers_version stays: without it,
# transformers 4.57.6 and 5.2 advise a fix of the tokenizer that would change Llama 3's ids.)
NOT_PASSED_ON = {"auto_map", "dtype", "rope_parameters", "_name_or_path"}
# How transformers loads the tokenizer of a chat model, whatever class the source names: each of 4
# and 5 lacks some that the other writes. This one reads tokenizer.json, as was trained.
TOKENIZER_CLASS = {"tokenizer_class": "PreTrainedTokenizerFast"}
# What that class gives to a model. By default transformers 4 adds token_type_ids, which generate
# refuses.
MODEL_INPUTS = {"model_input_names": ["input_ids", "attention_mask"]}
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
# sha256 of texts that give the same ids: Meta-Llama-3-8B-Instruct's. It is kept, since some
# programs (TRL, Ollama) know templates by their text.
SAME_TEMPLATES = {"ba03a121d097859c7b5b9cd03af99aafe95275210d2876f642ad9929a150f122"}
# For programs that know neither generation_config.json nor a list of eos ids (CTranslate2,
# llama.cpp's converter): a base model's eos token ends a text, not a turn.
TURN_TOKENS = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}


def export_run(run) -> None:
    """Writes OUT/model: the last weights, or with --keep-best the best ones; prints the answers to
    --samples prompts of the starting weights and of these. run: train.Run."""
    config, model, chat, log = run.config, run.model, run.chat, run.log
    last = run.training.steps
    checkpoints.stop_unless_finite(checkpoints.trained_tensors(model, run.optimizer), last)
    exported_step = run.best.load(last)
    log.flush()
    save_model(
        model,
        log.out / "model",
        dtype=torch.bfloat16 if config.save_dtype == "bf16" else torch.float32,
        source=config.model,
        stop_ids=[chat.end_of_turn] if chat else [],
    )
    if config.samples:
        prompts = [pair.prompt for pair in run.held_out.pairs[: config.samples]]
        log.answers([last_turn(chat, prompt) for prompt in prompts], exported_step)
    saved, metrics = log.out / "model", log.out / "metrics.jsonl"
    log.say(f"\nsaved {saved} ({config.save_dtype}); metrics in {metrics}")


@announced("writing the model")
def save_model(
    model: nn.Module,
    directory: str | Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    source: str | Path | None = None,
    stop_ids: Sequence[int] = (),
) -> None:
    """Writes a Hugging Face directory that transformers and vLLM load; a collective call.

    Weights in `dtype`, in files of at most 5 GB with an index if there are several; tokenizer and
    generation files come from `source`. `stop_ids`, of a model trained on chats, end its answers,
    and its directory gets the chat template that was trained. model: model.Llama.

    `directory` never holds half a model: it is written aside, flushed, and renamed. Process 0
    writes and holds one file's tensors at a time. Raises InputError if `directory` exists, cannot
    be written, or would hold a NaN or an infinity.
    """
    directory = Path(directory)
    if on_first_process(directory.exists):  # one answer for all: process 0 will soon create it
        raise InputError(f"{directory} exists; a model is saved to a fresh directory")
    writer = not dist.is_initialized() or dist.get_rank() == 0
    aside = directory.with_name(f".{directory.name}.partial")
    files = _shards(model, dtype)
    if writer:
        shutil.rmtree(aside, ignore_errors=True)
        with naming(aside):
            aside.mkdir(parents=True)
    for name, keys in files.items():
        tensors = {}
        for key in keys:
            tensor = model.get_parameter(key).detach().to(dtype)
            tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor  # collective
            if not finite(tensor):  # every process finds the same
                raise InputError(f"{directory}: {key} holds a NaN or an infinity; not saved")
            if writer:
                tensors[key] = tensor.cpu().contiguous()
        if writer:
            with naming(aside / name):
                save_file(tensors, aside / name, metadata={"format": "pt"})
                with contextlib.suppress(OSError):  # some network disks have no modes
                    (aside / name).chmod(0o644)  # safetensors lets only the owner read it
    if writer:
        with naming(aside):
            write_companions(aside, model.config.to_dict(dtype), source, stop_ids)
            if len(files) > 1:
                size = sum(p.numel() * dtype.itemsize for p in model.parameters())
                weight_map = {key: name for name, keys in files.items() for key in keys}
                index = {"metadata": {"total_size": size}, "weight_map": weight_map}
                write_json(aside / "model.safetensors.index.json", index)
            for path in [*aside.iterdir(), aside]:
                flush(path)
            aside.rename(directory)
            flush(directory.parent)
    if dist.is_initialized():
        dist.barrier()


def _shards(model: nn.Module, dtype: torch.dtype) -> dict[str, list[str]]:
    """File name -> the keys it will hold."""
    files, used = [[]], 0
    for key, parameter in model.named_parameters():
        size = parameter.numel() * dtype.itemsize
        if files[-1] and used + size > SHARD_BYTES:
            files.append([])
            used = 0
        files[-1].append(key)
        used += size
    if len(files) == 1:
        return {"model.safetensors": files[0]}
    total = len(files)
    return {f"model-{i:05d}-of-{total:05d}.safetensors": keys for i, keys in enumerate(files, 1)}


def source_template(directory: str | Path) -> str | None:
    """The chat template of a model directory, as text; None if it has none. Raises InputError for
    a malformed tokenizer_config.json."""
    path = Path(directory) / "chat_template.jinja"
    if path.exists():
        return read_start(path, 2**20, "a chat template").decode(errors="replace")
    template = _tokenizer_config(Path(directory)).get("chat_template")
    return template if template is None or isinstance(template, str) else json.dumps(template)


def exported_template(directory: str | Path) -> str:
    """The chat template of an export of this model directory, if it was trained on chats: its own
    if it gives the ids that were trained, else CHAT_TEMPLATE."""
    template = source_template(directory) or ""
    same = hashlib.sha256(template.encode()).hexdigest() in SAME_TEMPLATES
    return template if same else CHAT_TEMPLATE


def _tokenizer_config(directory: Path) -> dict:
    path = directory / "tokenizer_config.json"
    if not path.exists():
        return {}
    found = read_json(path, "a tokenizer_config.json")
    if not isinstance(found, dict):
        raise InputError(f"{path}: {shown(found)}, wanted an object")
    return found


def _special_tokens(directory: Path) -> dict:
    """Those of special_tokens_map.json. A malformed one is left out with a word: the run is over,
    and only its model must not be lost."""
    path = directory / "special_tokens_map.json"
    with contextlib.suppress(InputError):
        if isinstance(found := read_json(path), dict):
            return found
    notice(f"left out: what {path} holds, since it is malformed")
    return {}


def write_companions(
    directory: Path, config: dict, source: str | Path | None, stop_ids: Sequence[int]
) -> None:
    """Writes config.json (with the source's keys that change no computation, such as pad_token_id)
    and copies the source's tokenizer and generation files.

    stop_ids: given if the model was trained on chats. They are added to the eos_token_id of
    config.json and generation_config.json: a base model's ends a text, not a turn, so generation
    would not stop at the end of an answer. So the tokenizer's eos token becomes <|eot_id|>. And the
    chat template that was trained takes the place of the source's, in tokenizer_config.json and no
    other file: served with another template, the model would see a format that it was not trained
    on. So would it with another tokenizer's class.
    """
    passed_on = {}
    if source is not None:
        there = read_json(Path(source) / "config.json")  # InputError if it has gone since the start
        passed_on = {key: value for key, value in there.items() if key not in NOT_PASSED_ON}
        pad = passed_on.get("pad_token_id")
        if isinstance(pad, int) and pad >= config["vocab_size"]:
            notice(
                f"left out: pad_token_id {pad} is beyond the vocabulary; transformers refuses it"
            )
            del passed_on["pad_token_id"]
    write_json(directory / "config.json", passed_on | config)
    for name in COMPANIONS if stop_ids else COMPANIONS + TEMPLATES:
        if source is not None and (Path(source) / name).is_file():
            shutil.copyfile(Path(source) / name, directory / name)
    if not stop_ids:
        return
    if source is not None and not (Path(source) / "tokenizer.json").is_file():
        notice(f"left out: {source}/tokenizer.json has gone since the start; copy it to the model")
    for path in (directory / "config.json", directory / "generation_config.json"):
        if path.exists():
            _add_stop_ids(path, stop_ids)
    if source is not None:
        chat = MODEL_INPUTS | _tokenizer_config(Path(source)) | TOKENIZER_CLASS | TURN_TOKENS
        chat["chat_template"] = exported_template(source)
        write_json(directory / "tokenizer_config.json", chat)
        special = directory / "special_tokens_map.json"  # may go before tokenizer_config.json
        if special.exists():
            write_json(special, _special_tokens(Path(source)) | TURN_TOKENS)


def _add_stop_ids(path: Path, stop_ids: Sequence[int]) -> None:
    """Adds ids to the eos_token_id of a JSON file, unless it has them already."""
    raw = read_json(path)
    eos = token_ids(raw, "eos_token_id", path)
    if more := [i for i in stop_ids if i not in eos]:
        write_json(path, raw | {"eos_token_id": [*eos, *more]})
