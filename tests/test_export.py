"""The directory of an exported model: its chat template, configuration keys, and which weights of a
source are meant."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, edit_json, save_tiny, tiny_config
from safetensors.torch import load_file, save_file
from test_data import bare_tokenizer, save_tokenizer
from transformers import AutoTokenizer

import train
from data import ChatFormat
from model import LlamaConfig, check_weights, load_model
from support.export import CHAT_TEMPLATE, save_model
from support.files import InputError
from support.log import describe_chat

EXAMPLE = ROOT / "examples/model"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>{% endfor %}"
)
CONVERSATIONS = (
    [("user", "Name a fruit.")],
    [("system", "Be brief."), ("user", "Name a fruit."), ("assistant", "Apple."), ("user", "Why?")],
    [
        ("user", "  \n outer white space \n\n"),
        ("assistant", "\tinner\n\nlines "),
        ("user", "é ☃ 한"),
    ],
    [
        ("user", "{{ 7 * 7 }} {% if %} [INST] ' \" \\n"),
        ("assistant", "1 < 2 && \n\n\n3"),
        ("user", "?"),
    ],
    [("user", "")],
)


def source(tmp_path, **tokenizer_config):
    """The example model, perhaps with a tokenizer_config.json."""
    home = tmp_path / "source"
    shutil.copytree(EXAMPLE, home)
    if tokenizer_config:
        (home / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    return home


def exported(tmp_path, home, stop_ids=(510,)):
    """What save_model writes of a model from this directory."""
    save_model(load_model(home), tmp_path / "out", source=home, stop_ids=stop_ids)
    return tmp_path / "out"


def test_the_exported_template_gives_the_ids_that_were_trained_on_any_conversation(tmp_path):
    home = source(tmp_path)
    save_tokenizer(home, bare_tokenizer())  # split into words as Llama 3's
    out = exported(tmp_path, home)
    theirs, ours = AutoTokenizer.from_pretrained(out), ChatFormat(out)
    assert "other ids" not in describe_chat(str(out), None, ours)
    for turns in CONVERSATIONS:
        messages = [{"role": role, "content": content} for role, content in turns]
        ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert ids == ours.prompt(turns)
        replied = [*messages, {"role": "assistant", "content": "It is so."}]
        ids = theirs.apply_chat_template(replied, return_dict=False)
        assert ids == ours.prompt(turns) + ours.response("It is so.")


def test_the_template_that_was_trained_replaces_the_sources_in_one_file_only(tmp_path):
    home = source(tmp_path, chat_template=CHATML, model_max_length=77)
    (home / "chat_template.jinja").write_text(CHATML)
    out = exported(tmp_path, home)
    kept = json.loads((out / "tokenizer_config.json").read_text())
    inputs = ["input_ids", "attention_mask"]
    assert kept == {"model_input_names": inputs, "model_max_length": 77} | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|eot_id|>",
        "chat_template": CHAT_TEMPLATE,
    }
    holders = [path for path in out.iterdir() if b"im_start" in path.read_bytes()[:100_000]]
    assert not [path for path in holders if path.name != "tokenizer.json"]
    assert not (out / "chat_template.jinja").exists()


def test_a_tokenizer_that_has_gone_since_the_start_is_named(tmp_path, capsys):
    source, model = save_tiny(tmp_path / "source"), load_model(EXAMPLE)
    save_model(model, tmp_path / "m", source=source, stop_ids=[1])
    said = capsys.readouterr().out
    assert f"left out: {source}/tokenizer.json has gone since the start; copy it to" in said
    save_model(model, tmp_path / "n", source=EXAMPLE, stop_ids=[1])
    assert "left out" not in capsys.readouterr().out


def test_a_model_that_was_trained_on_ids_keeps_its_sources_template(tmp_path):
    home = source(tmp_path, chat_template=CHATML)
    (home / "chat_template.jinja").write_text(CHATML)
    out = exported(tmp_path, home, stop_ids=())
    for name in ("tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (out / name).read_bytes() == (home / name).read_bytes()


def test_the_header_says_if_the_exported_template_gives_other_ids_than_those_trained():
    """GPT-2's pre-tokenizer, which the example has, parts the header's newlines before a word."""
    chat, said = ChatFormat(EXAMPLE), "that template gives other ids than those trained"
    assert said in describe_chat(str(EXAMPLE), None, chat)
    [ids] = chat.encode(["<|eot_id|>"])  # control tokens in texts are still text
    assert chat.end_of_turn not in ids
    theirs = AutoTokenizer.from_pretrained(EXAMPLE)
    served = theirs.apply_chat_template(
        [{"role": "user", "content": "Hi"}],
        chat_template=CHAT_TEMPLATE,
        add_generation_prompt=True,
        return_dict=False,
    )
    assert served != chat.prompt([("user", "Hi")])


@pytest.mark.parametrize(
    "found", [{}, {"tokenizer_class": "TokenizersBackend"}, {"tokenizer_class": "Qwen2Tokenizer"}]
)
def test_an_export_loads_as_the_tokenizer_that_was_trained_whatever_class_the_source_has(
    tmp_path, found
):
    """transformers 4 knows no TokenizersBackend, which 5 writes; other classes give other ids."""
    home = source(tmp_path, **found)
    save_tokenizer(home, bare_tokenizer())
    out = exported(tmp_path, home)
    kept = json.loads((out / "tokenizer_config.json").read_text())
    assert kept["tokenizer_class"] == "PreTrainedTokenizerFast"
    theirs, text = AutoTokenizer.from_pretrained(out), "Na\u00efve  caf\u00e9 12345\n"
    assert theirs(text, add_special_tokens=False)["input_ids"] == ChatFormat(out).encode([text])[0]
    # generate would refuse token_type_ids.
    assert set(theirs(text)) == {"input_ids", "attention_mask"} == set(kept["model_input_names"])
    own = source(tmp_path / "own", model_input_names=["input_ids"])
    kept = json.loads((exported(tmp_path / "own", own) / "tokenizer_config.json").read_text())
    assert kept["model_input_names"] == ["input_ids"]


def test_the_tokenizers_last_token_is_the_end_of_a_turn_as_was_trained(tmp_path, capsys):
    """A base model's ends a text; without one, llama.cpp's converter takes a comma."""
    end = {"content": "<|end_of_text|>", "lstrip": False}
    home = source(tmp_path, eos_token="<|end_of_text|>", bos_token="x")
    (home / "special_tokens_map.json").write_text(json.dumps({"eos_token": end, "pad_token": end}))
    theirs = AutoTokenizer.from_pretrained(exported(tmp_path, home))
    assert (theirs.bos_token, theirs.eos_token) == ("<|begin_of_text|>", "<|eot_id|>")
    assert theirs.pad_token == "<|end_of_text|>"
    (home / "special_tokens_map.json").write_text("[]")
    save_model(load_model(home), tmp_path / "odd", source=home, stop_ids=[510])
    kept = json.loads((tmp_path / "odd/special_tokens_map.json").read_text())
    assert kept == {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    assert "special_tokens_map.json holds, since it is malformed" in capsys.readouterr().out
    save_model(load_model(home), tmp_path / "ids", source=home)  # trained on ids: as it was
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        assert (tmp_path / "ids" / name).read_text() == (home / name).read_text()


def test_a_template_that_is_known_to_give_the_same_ids_is_kept(tmp_path, monkeypatch):
    """Other programs know Llama 3's template by its text."""
    own = "{# the same #}" + CHAT_TEMPLATE
    digest = hashlib.sha256(own.encode()).hexdigest()
    monkeypatch.setattr("support.export.SAME_TEMPLATES", {digest})
    home = source(tmp_path, tokenizer_class="x")
    (home / "chat_template.jinja").write_text(own)
    out = exported(tmp_path, home)
    assert json.loads((out / "tokenizer_config.json").read_text())["chat_template"] == own
    assert not (out / "chat_template.jinja").exists()
    assert "instead of" not in describe_chat(str(home), None, ChatFormat(home))
    monkeypatch.setattr("support.export.SAME_TEMPLATES", set())
    assert "which is another text" in describe_chat(str(home), None, ChatFormat(home))


def test_llama_3_instructs_template_is_such_a_one(tmp_path):
    """As TRL has it in a file of its own."""
    trl = pytest.importorskip("trl")

    text = (Path(trl.__file__).parent / "chat_templates/llama3.jinja").read_text()
    home = source(tmp_path, chat_template=text)
    save_tokenizer(home, bare_tokenizer())
    out = exported(tmp_path, home)
    assert json.loads((out / "tokenizer_config.json").read_text())["chat_template"] == text
    theirs, ours = AutoTokenizer.from_pretrained(out), ChatFormat(out)
    for turns in CONVERSATIONS:
        messages = [{"role": role, "content": content} for role, content in turns]
        ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert ids == ours.prompt(turns)


def test_the_version_of_transformers_that_wrote_the_source_is_passed_on(tmp_path):
    """Without it transformers 4.57.6 and 5.2 advise a "fix" that would change Llama 3's ids."""
    home = source(tmp_path)
    edit_json(home / "config.json", transformers_version="4.40.0")
    kept = json.loads((exported(tmp_path, home) / "config.json").read_text())
    assert kept["transformers_version"] == "4.40.0"


DATED = "{{ '<|start_header_id|>system<|end_header_id|>\n\nToday is a day.<|eot_id|>' }}"


@pytest.mark.parametrize(
    "template, says",
    [
        (None, ""),
        (CHAT_TEMPLATE, ""),
        (DATED, "own, which is another text"),
        (CHATML, "own, which has other turn markers: was the model trained in them?"),
    ],
)
def test_the_header_says_if_the_sources_template_is_another(tmp_path, capsys, template, says):
    home = source(tmp_path, **({"chat_template": template} if template else {"bos_token": "x"}))
    flags = ("--model", home, "--data", ROOT / "examples/heldout.jsonl", "--max-steps", 1)
    assert train.main([str(word) for word in (*flags, "--out", tmp_path / "run")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Llama 3's format; the export has its template" in said
    assert says in said and ("own, which" in said) == bool(says)
    assert "bos_token_id" not in said


def test_the_header_says_if_config_and_tokenizer_have_other_first_tokens(tmp_path, capsys):
    home = source(tmp_path)
    edit_json(home / "config.json", bos_token_id=5)
    flags = ("--model", home, "--data", ROOT / "examples/heldout.jsonl", "--max-steps", 1)
    assert train.main([str(word) for word in (*flags, "--out", tmp_path / "run")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "<|begin_of_text|> is token 506, but config.json has bos_token_id 5" in said


@pytest.mark.parametrize("content", ["[1]", "{"])
def test_a_malformed_tokenizer_config_is_refused_before_training(tmp_path, capsys, content):
    home = source(tmp_path)
    (home / "tokenizer_config.json").write_text(content)
    flags = ("--model", home, "--data", ROOT / "examples/heldout.jsonl", "--out", tmp_path / "run")
    assert train.main([str(word) for word in flags]) == 2
    assert "tokenizer_config.json: " in capsys.readouterr().err


def test_keys_of_config_json_that_change_no_computation_are_passed_on(tmp_path):
    home = source(tmp_path)
    raw = json.loads((home / "config.json").read_text())
    more = {"pad_token_id": 499, "use_cache": True, "initializer_range": 0.03}
    less = {"auto_map": {"AutoModel": "evil.Model"}, "torch_dtype": "float64", "dtype": "float64"}
    (home / "config.json").write_text(json.dumps(raw | more | less))
    out = json.loads((exported(tmp_path, home) / "config.json").read_text())
    assert {key: out.get(key) for key in more} == more
    assert "auto_map" not in out and "dtype" not in out and out["torch_dtype"] == "bfloat16"
    assert LlamaConfig.from_dict(out) == LlamaConfig.load(home)


def test_without_generation_config_an_answer_ends_at_the_eos_of_config_json(tmp_path):
    home = source(tmp_path)
    raw = json.loads((home / "config.json").read_text())
    (home / "generation_config.json").unlink()
    (home / "config.json").write_text(json.dumps(raw | {"eos_token_id": 77}))
    assert 77 in ChatFormat(home).stop_ids
    (home / "generation_config.json").write_text('{"eos_token_id": 78}')
    assert {78, 510} < ChatFormat(home).stop_ids and 77 not in ChatFormat(home).stop_ids


def test_two_sets_of_weights_in_one_directory_are_refused_by_both_names(tmp_path):
    home = save_tiny(tmp_path / "m")
    tensors = load_file(home / "model.safetensors")
    save_file(tensors, home / "model-00001-of-00001.safetensors", {"format": "pt"})
    places = dict.fromkeys(tensors, "model-00001-of-00001.safetensors")
    index = home / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    with pytest.raises(InputError, match=r"model\.safetensors and model\.safetensors\.index\.json"):
        check_weights(home, LlamaConfig.load(home))
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "model.safetensors")}))
    assert set(check_weights(home, LlamaConfig.load(home))) == set(tensors)


PREFIXES = ("_orig_mod.", "module.", "base_model.model.", "_fsdp_wrapped_module.")


@pytest.mark.parametrize("prefix", [*PREFIXES, None])
def test_keys_of_a_wrapped_model_are_shown_beside_the_wanted_ones(tmp_path, prefix):
    home = save_tiny(tmp_path / "m")
    tensors = load_file(home / "model.safetensors")
    names = {key: key.removeprefix("model.") if prefix is None else prefix + key for key in tensors}
    save_file(
        {names[key]: x for key, x in tensors.items()}, home / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(InputError) as caught:
        check_weights(home, LlamaConfig.load(home))
    found = names["model.embed_tokens.weight"]
    assert "key model.embed_tokens.weight is missing from model.safetensors" in str(caught.value)
    assert f"has '{found}' instead" in str(caught.value) and "config.json" not in str(caught.value)


def test_a_second_derivative_is_an_error_and_not_a_wrong_number():
    from model import MLP, RMSNorm, target_logps

    x = torch.randn(3, 32, requires_grad=True)
    weight, target = torch.randn(5, 32, requires_grad=True), torch.tensor([0, 1, 4])
    outputs = RMSNorm(32, 1e-5)(x).square(), MLP(tiny_config())(x).square()
    for value in (output.sum() for output in (*outputs, target_logps(x, weight, target))):
        (first,) = torch.autograd.grad(value, x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable|does not require grad"):
            first.sum().backward()


@pytest.mark.parametrize("grad", [False, True])
def test_the_head_of_no_token_is_empty(grad):
    from model import target_logps

    weight = torch.randn(5, 8, requires_grad=grad)
    logp = target_logps(torch.zeros(0, 8), weight, torch.zeros(0, dtype=torch.int64))
    assert logp.shape == (0,)
    if grad:
        logp.sum().backward()
        assert not weight.grad.any()
