"""config.json of a Llama, checked key by key: whatever this project does not implement is refused
by name. model.LlamaConfig holds the result.

    read_config       config.json of a model directory, parsed
    checked_config    a parsed config.json -> the fields of LlamaConfig
    config_json       the fields of LlamaConfig -> a config.json
    token_ids         the ids under a key such as eos_token_id
    generation_eos    those at which a model's answers end
"""

from pathlib import Path

from support.files import InputError, read_json, shown

# Keys with one acceptable meaning. With another value, a checkpoint would load and compute
# nonsense.
ONLY = {
    "hidden_act": ["silu"],
    "attention_bias": [False],
    "mlp_bias": [False],
    "attention_dropout": [0],
    "quantization_config": [None],
    "partial_rotary_factor": [1],
    "sliding_window": [None],
}
# Whole numbers are below 2**24, some lower: --plan builds every layer before any file could
# contradict config.json, and no tensor may have 2**63 bytes. Llama 405B has 126 layers.
MOST = {"num_hidden_layers": 2**12, "head_dim": 2**12}
ROPE_SCALING = {
    "factor": float,
    "low_freq_factor": float,
    "high_freq_factor": float,
    "original_max_position_embeddings": int,
}


def read_config(directory: str | Path) -> tuple[dict, Path]:
    """The parsed config.json of a model directory, and its path. Raises InputError if a LoRA
    adapter lies there, which transformers would add to the weights."""
    path, adapter = (Path(directory) / name for name in ("config.json", "adapter_config.json"))
    if adapter.exists():
        raise InputError(
            f"{adapter}: an adapter, which is not implemented; merge it into the weights "
            "(merge_and_unload of peft), or move it away"
        )
    if not path.parent.exists():
        raise InputError(
            f"{directory}: no such directory; wanted a Hugging Face model directory (from the Hub: "
            "hf download NAME --local-dir DIR)"
        )
    return read_json(path), path


def checked_config(raw: dict, where: str | Path) -> dict:
    """The fields of LlamaConfig in a parsed config.json, of transformers 4 (rope_theta,
    rope_scaling) or 5 (rope_parameters). Missing optional keys have transformers' defaults,
    except that token ids default to none. Raises InputError naming `where` and the key."""
    if not isinstance(raw, dict) or raw.get("model_type") != "llama":
        found = raw.get("model_type") if isinstance(raw, dict) else raw
        raise InputError(f"{where}: model_type is {shown(found)}, wanted 'llama'")
    for key, accepted in ONLY.items():
        if key in raw and raw[key] not in accepted:
            raise InputError(
                f"{where}: {key} is {shown(raw[key])}, which is not implemented; "
                f"wanted {accepted[0]!r}"
            )
    tie = raw.get("tie_word_embeddings", False)
    if not isinstance(tie, bool):
        raise InputError(f"{where}: tie_word_embeddings is {shown(tie)}, wanted true or false")

    def number(key: str, kind: type = int, default=None, source: dict = raw):
        return _positive(source, key, kind, where, default)

    def rope_of(rope: dict) -> tuple[float, dict | None]:
        scaling = _rope_scaling(rope, where)
        source = raw if rope.get("rope_theta") is None else rope
        return number("rope_theta", float, 10_000.0, source), scaling

    ropes = [raw[key] for key in ("rope_parameters", "rope_scaling") if raw.get(key)] or [{}]
    (theta, scaling), *others = map(rope_of, ropes)
    if others and others != [(theta, scaling)]:
        raise InputError(f"{where}: rope_parameters and rope_scaling differ, wanted one of them")
    heads, width = number("num_attention_heads"), number("hidden_size")
    if raw.get("head_dim") is None and width % heads:
        raise InputError(
            f"{where}: hidden_size ({width}) is not a multiple of num_attention_heads ({heads}), "
            "and there is no head_dim"
        )
    fields = {
        "vocab_size": number("vocab_size"),
        "hidden_size": width,
        "intermediate_size": number("intermediate_size"),
        "num_hidden_layers": number("num_hidden_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": number("num_key_value_heads", default=heads),
        "head_dim": number("head_dim", default=width // heads),
        "max_position_embeddings": number("max_position_embeddings"),
        "rms_norm_eps": number("rms_norm_eps", float, 1e-6),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "tie_word_embeddings": tie,
        "bos_token_id": next(iter(token_ids(raw, "bos_token_id", where)), None),
        "eos_token_id": token_ids(raw, "eos_token_id", where),
    }
    groups, size = fields["num_key_value_heads"], fields["head_dim"]
    if heads % groups or size % 2:
        raise InputError(
            f"{where}: wanted num_attention_heads ({heads}) to be a multiple of "
            f"num_key_value_heads ({groups}), and head_dim ({size}) to be even"
        )
    return fields


def config_json(fields: dict, dtype: str) -> dict:
    """The content of config.json for weights of `dtype`, in the form that transformers 4 and 5 and
    vLLM read."""
    eos, scaling = list(fields["eos_token_id"]) or None, fields["rope_scaling"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **fields,
        "eos_token_id": eos[0] if eos and len(eos) == 1 else eos,
        "rope_scaling": scaling and {"rope_type": "llama3", **scaling},
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": dtype,
    }


def token_ids(raw: dict, key: str, where: str | Path) -> tuple[int, ...]:
    """The token ids under a key of a configuration: one id, a list of them, or none."""
    value = raw.get(key)
    if value is None:
        return ()
    value = value if isinstance(value, list) else [value]
    if not all(type(i) is int and 0 <= i < 2**31 for i in value):  # JSON's true is an int, too
        raise InputError(
            f"{where}: {key} is {shown(raw[key])}, wanted a token id or a list of them"
        )
    return tuple(value)


def _rope_scaling(rope: dict, where: str | Path) -> dict | None:
    if not isinstance(rope, dict):
        raise InputError(
            f"{where}: rope_parameters or rope_scaling is {shown(rope)}, wanted an object"
        )
    plain = None if rope.keys() & ROPE_SCALING.keys() else "default"
    rope_type = rope.get("rope_type", rope.get("type", plain))
    if rope_type not in ("default", "llama3"):
        raise InputError(
            f"{where}: rope type {shown(rope_type)} is not implemented; "
            "wanted 'default' or 'llama3'"
        )
    if rope_type == "default":
        return None
    scaling = {key: _positive(rope, key, kind, where) for key, kind in ROPE_SCALING.items()}
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    if low >= high:  # the frequencies in between are blended
        raise InputError(
            f"{where}: low_freq_factor is {low}, wanted less than high_freq_factor, {high}"
        )
    return scaling


def _positive(source: dict, key: str, kind: type, where: str | Path, default=None):
    """A positive number of a configuration, or the default if the key is absent or null."""
    value = default if source.get(key) is None else source[key]
    limit = MOST.get(key, 2**24 if kind is int else 2**40)
    fits = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
    if not fits or not 0 < value < limit:
        whole = "whole " if kind is int else ""
        raise InputError(
            f"{where}: {key} is {shown(value)}, wanted a positive {whole}number below {limit:,}"
        )
    return kind(value)


def generation_eos(directory: str | Path) -> set[int]:
    """The eos ids in a directory's generation_config.json, or without that file in its config.json.
    InputError if it is malformed."""
    for name in ("generation_config.json", "config.json"):
        path = Path(directory) / name
        if path.exists():
            raw = read_json(path)
            if not isinstance(raw, dict):
                raise InputError(f"{path}: {shown(raw)}, wanted an object with eos_token_id")
            return set(token_ids(raw, "eos_token_id", path))
    return set()
