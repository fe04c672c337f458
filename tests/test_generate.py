"""Generation: cache, batches, sampling, stops; the command: prompts, files, several processes.

Oracles: transformers' generate and its logits warpers, a full pass over all tokens for each new
one, the text that others documented for their trained model, byte-equal files.
"""

import contextlib
import errno
import io
import json
import math
import os
import signal
import socket
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import transformers
from conftest import LLAMA31, REAL, ROOT, needs_real, read_json, refusal, save_tiny, tiny_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

import eval as program
import evaluation.answers
import evaluation.generate as generation
import evaluation.likelihood
from data import ChatFormat
from evaluation.answers import load_generator
from evaluation.generate import Cache, Request, choose, generate, prefill, probabilities, step
from evaluation.prompts import encode_prompts, read_prompts
from evaluation.rows import append_row, hold_out, join_parts, write_json
from model import load_model
from support.export import save_model
from support.files import InputError
from support.processes import StoppedError

EXAMPLE = ROOT / "examples" / "model"
LENGTHS = (5, 1, 23, 9, 40, 2, 14)  # tokens of prompts


def prompts_of(lengths, vocab_size=97, seed=3):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab_size, n).tolist() for n in lengths]


def requests_of(lengths, limits, vocab_size=97):
    prompts = prompts_of(lengths, vocab_size)
    return [
        Request(i, p, max_new_tokens=n)
        for i, (p, n) in enumerate(zip(prompts, limits, strict=True))
    ]


def answers(model, requests, stop_ids=frozenset(), **options):
    """{index: (new ids, finish)}; each index once."""
    found = list(generate(model, requests, frozenset(stop_ids), **options))
    by_index = {i: (new, finish) for i, new, finish in found}
    assert len(found) == len(by_index)
    return by_index


def table(text):
    """The rows "given -> expected" of a text, for parametrize."""
    return [row.split(" -> ") for row in text.strip("\n").split("\n")]


def continued(model, prompt, stop_ids, max_new_tokens):
    """Greedily, by a whole pass without a cache for each new token."""
    new, context = [], model.config.max_position_embeddings
    while len(new) < max_new_tokens and len(prompt) + len(new) < context:
        best = int(model.logits(torch.tensor(prompt + new))[-1].argmax())
        if best in stop_ids:
            return new, "stop"
        new.append(best)
    return new, "length"


def linked(directory, *, without=(), **contents):
    """The example's model, by links, with other files in it: stem=text."""
    directory.mkdir(exist_ok=True)
    for name in {"config.json", "model.safetensors", "tokenizer.json"} - set(without):
        (directory / name).symlink_to(EXAMPLE / name)
    for stem, text in contents.items():
        (directory / f"{stem}.json").write_text(text)
    return directory


# ---------------------------------------------------------------------------------- cache and batch

GQA, TIED = {}, {"tie_word_embeddings": True, "head_dim": 16}
LLAMA3 = {"num_key_value_heads": 1, "rope_scaling": LLAMA31}


@pytest.mark.parametrize("changes", [GQA, TIED, LLAMA3], ids=["gqa", "tied", "llama3"])
def test_greedy_tokens_of_a_ragged_batch_equal_those_of_transformers(tmp_path, changes):
    model = tiny_model(**changes).requires_grad_(False)
    save_model(model, tmp_path / "saved", dtype=torch.float32)
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    prompts, pad = prompts_of(LENGTHS), max(LENGTHS)
    ids = torch.tensor([[0] * (pad - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (pad - len(p)) + [1] * len(p) for p in prompts])
    options = dict(max_new_tokens=80, do_sample=False, eos_token_id=None, pad_token_id=0)
    expected = theirs.generate(ids, attention_mask=mask, **options)[:, pad:].tolist()
    found = answers(model, requests_of(LENGTHS, [80] * 7))
    assert [found[i] for i in range(7)] == [(new, "length") for new in expected]


def test_rows_that_stop_early_and_rows_that_take_their_place_get_the_tokens_they_get_alone():
    model = tiny_model(dtype=torch.float64).requires_grad_(False)
    requests, stop_ids = requests_of(LENGTHS * 3, [30, 3, 12, 1, 20, 25, 8] * 3), {5, 17, 40, 77}
    expected = {r.number: continued(model, r.prompt, stop_ids, r.max_new_tokens) for r in requests}
    assert {finish for _, finish in expected.values()} == {"stop", "length"}
    for cache_tokens in (1, 120, 65_536):
        assert answers(model, requests, stop_ids, cache_tokens=cache_tokens) == expected


def test_the_cache_is_never_larger_than_told_unless_a_single_row_is(monkeypatch):
    made = []

    class Counted(Cache):
        def __init__(self, model, rows, tokens):
            made.append((rows, tokens))
            super().__init__(model, rows, tokens)

    monkeypatch.setattr(generation, "Cache", Counted)
    requests = requests_of((200, 3, 3, 3, 90, 4, 5, 6, 7, 8), [8] * 10)
    assert len(answers(tiny_model(), requests, cache_tokens=100)) == 10
    assert made[0] == (1, 208) and all(rows * tokens <= 100 for rows, tokens in made[1:])
    assert max(rows for rows, _ in made) > 3  # the short ones are not computed one by one


def test_an_answer_ends_at_its_limit_or_at_the_models_context_whichever_comes_first():
    model = tiny_model(max_position_embeddings=16)
    found = answers(model, requests_of((10, 10, 16, 15), (4, 50, 5, 5)))
    lengths = [(len(found[i][0]), found[i][1]) for i in range(4)]
    assert lengths == [(4, "length"), (6, "length"), (0, "overlong"), (1, "length")]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_cuda_in_bf16_a_step_gives_the_logits_of_a_full_pass_in_fp32_on_the_cpu_up_to_rounding():
    model, prompts = tiny_model().requires_grad_(False), prompts_of((4, 40, 1))
    full = torch.stack([model.logits(torch.tensor([*p, 7]))[-1] for p in prompts])
    model.to("cuda", torch.bfloat16)
    cache = Cache(model, 3, 48)
    prefill(model, prompts, cache, 0)
    logits = step(model, [7, 7, 7], [4, 40, 1], cache).float().cpu()
    assert (logits - full).abs().max() < 0.05 * full.abs().max()


@needs_real
def test_a_trained_model_generates_the_story_that_its_authors_documented_whatever_is_beside_it():
    model, chat, stop_ids = load_generator(REAL / "stories260K")
    story = (REAL / "stories260K" / "greedy.txt").read_text()
    requests = requests_of((30, 3, 70), [260] * 3, 512) + [Request(3, [512], max_new_tokens=260)]
    found = answers(model, requests, stop_ids)
    assert len(story) == 565 and chat.decode(found[3][0]).startswith(story)


# ----------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize(
    "temperature, top_k, top_p",
    [(0.6, 0, 0.9), (1.0, 5, 1.0), (1.3, 12, 0.5), (0.7, 0, 1e-6), (1.0, 200, 0.99)],
)
def test_the_filtered_distribution_is_that_of_transformers_warpers(temperature, top_k, top_p):
    logits = 3 * torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    logits[0, :7] = 4.0  # ties, one of them the fifth
    logits[1] = 0.0
    expected = transformers.TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        expected = transformers.TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = transformers.TopPLogitsWarper(top_p)(None, expected)
    found = probabilities(logits, torch.full((6,), temperature), top_p, top_k)
    if top_p < 1:  # which of tied tokens top-p keeps is the sort's choice
        found, expected = found[2:], expected[2:]
    torch.testing.assert_close(found, expected.softmax(-1), rtol=1e-5, atol=1e-7)


def test_top_p_keeps_no_token_beyond_those_that_have_exactly_its_share():
    (found,) = probabilities(torch.zeros(1, 4), torch.ones(1), top_p=0.5)
    assert sorted(found.tolist()) == [0, 0, 0.5, 0.5]


def test_evenly_spread_uniform_numbers_draw_each_token_as_often_as_its_probability():
    values = [0.0, 1.0, -math.inf, 2.0, 0.5]
    logits, n = torch.tensor([values]), 10_000
    uniforms = [(i + 0.5) / n for i in range(n)]
    drawn = Counter(choose(logits.expand(n, -1), [0.8] * n, uniforms, 1.0, 0))
    weights = [math.exp(x / 0.8) for x in values]
    assert all(abs(drawn[i] / n - w / sum(weights)) <= 1e-4 for i, w in enumerate(weights))
    assert 2 not in drawn
    ends = choose(logits.expand(3, -1), [1.0, 0.0, 1.0], [0.0, 0.1, 1 - 2**-53], 1.0, 0)
    assert ends == [0, 3, 4]
    # Never a token of probability 0.
    assert choose(torch.tensor([[-math.inf, 0.0]]), [1.0], [0.0], 1.0, 0) == [1]
    # In fp32 the last temperature is 0, and logits over the others are infinite.
    for temperature in (1e-30, 1e-40, 1e-50):
        assert choose(100 * logits, [temperature], [0.5], 1.0, 0) == [3]
        assert choose(100 * logits, [temperature], [0.5], 0.9, 2) == [3]


def test_samples_depend_only_on_seed_row_number_and_position():
    model = tiny_model(dtype=torch.float64).requires_grad_(False)
    requests = [Request(i, p, 0.9, 12) for i, p in enumerate(prompts_of(LENGTHS))]
    together = answers(model, requests, seed=5, top_p=0.95)
    assert answers(model, requests, seed=5, top_p=0.95, cache_tokens=1) == together
    some = answers(model, requests[:2:-1], seed=5, top_p=0.95)
    assert [some[k] for k in range(4)] == [together[i] for i in (6, 5, 4, 3)]
    longer = answers(model, [r._replace(max_new_tokens=20) for r in requests], seed=5, top_p=0.95)
    assert all(longer[i][0][:12] == together[i][0] for i in range(7))
    assert answers(model, requests, seed=6, top_p=0.95) != together
    twice = answers(model, [Request(n, [1, 2, 3], 0.9, 12) for n in (0, 1, 0)])
    assert twice[0] == twice[2] != twice[1]
    # Of 97 equally likely tokens, a uniform number draws token floor(97 times the number).
    torch.nn.init.zeros_(model.lm_head.weight)
    expected = (97 * np.random.default_rng([9, 4]).random(50)).astype(int).tolist()
    assert answers(model, [Request(4, [1, 2], 1.0, 50)], seed=9)[0] == (expected, "length")


@pytest.mark.parametrize("only_ids", [False, True])
def test_an_answer_stops_at_the_ids_of_the_chat_format_and_of_generation_config(tmp_path, only_ids):
    """Also an answer to token ids."""
    linked(tmp_path, generation_config='{"eos_token_id": [7]}')
    tokens = json.loads((EXAMPLE / "tokenizer.json").read_text())["added_tokens"]
    names = ("<|end_of_text|>", "<|eot_id|>", "<|eom_id|>")
    ends = {token["id"] for token in tokens if token["content"] in names}
    assert len(ends) >= 2 and load_generator(tmp_path, only_ids=only_ids)[2] == ends | {7}


# ------------------------------------------------- a model without Llama 3's control tokens

WORDS_OF_IDS = {f"w{i}": i for i in range(97)}


@pytest.fixture
def other(tmp_path):
    """other(**files): a tiny model with these JSON files; its eos id is 1, its tokenizer not Llama
    3's. Returns the model, and how `eval.py generate` answers the rows given."""

    def make(without=(), **contents):
        home = save_tiny(tmp_path / "other", std=0.3)
        words = Tokenizer(WordLevel(WORDS_OF_IDS, unk_token="w0"))
        contents = {"tokenizer": words.to_str()} | contents
        for stem in contents.keys() - set(without):
            (home / f"{stem}.json").write_text(contents[stem])

        def answer(*rows, code=0, flags=()):
            prompts, out = tmp_path / "p.jsonl", tmp_path / "o.jsonl"
            prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
            paths = ["--model", home, "--prompts", prompts, "--out", out, *flags]
            assert program.main(["generate", "--max-new-tokens", "30", *map(str, paths)]) == code
            return [json.loads(line) for line in out.read_text().splitlines()] if not code else []

        return load_model(home).requires_grad_(False), answer

    return make


@pytest.mark.parametrize(
    "files, stop_ids",
    [
        ({}, {1}),  # config.json's
        ({"generation_config": '{"eos_token_id": [5, 17, 40]}'}, {5, 17, 40}),
        ({"generation_config": '{"temperature": 1}'}, set()),
        ({"without": ["tokenizer"]}, {1}),
    ],
)
def test_prompts_of_ids_are_answered_in_ids_by_a_model_with_any_tokenizer_or_none(
    other, capsys, files, stop_ids
):
    model, answer = other(**files)
    prompts = prompts_of(LENGTHS)
    rows = [{"prompt_ids": ids} for ids in prompts]
    rows[2] |= {"chosen_ids": [8, 9, *stop_ids], "rejected_ids": [3]}
    rows[3] |= {"reference": "in words"}
    decoded = "without" not in files
    for i, row in enumerate(answer(*rows)):
        new, finish = continued(model, prompts[i], stop_ids, 30)
        expected = {"index": i, "prompt": prompts[i], "tokens": len(new), "finish": finish}
        expected |= {"response_ids": new}
        if decoded:
            expected |= {"prediction": " ".join(f"w{i}" for i in new)}
        if i == 2 and decoded:
            expected |= {"reference": "w8 w9"}
        if i == 3:
            expected |= {"reference": "in words"}
        assert row == expected
    assert ("so no answer stops" in capsys.readouterr().out) == (not stop_ids)


@pytest.mark.parametrize("rows", [["Hi"], [{"prompt_ids": [3]}, {"prompt": "Hi"}]])
@pytest.mark.parametrize("flags", [[], ["--raw"]])
def test_texts_are_refused_by_a_model_without_llama_3s_control_tokens(other, capsys, rows, flags):
    other()[1](*rows, code=2, flags=flags)
    assert "tokenizer.json: has no token <|begin_of_text|>" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------ prompts

SYSTEM = "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
BRIEF, HI = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}


def user(text):
    return f"<|start_header_id|>user<|end_header_id|>\n\n{text}<|eot_id|>"


CHAT_PROMPTS = [
    ("Name it.", user("Name it.")),
    ({"prompt": " Name it. ", "system": "Be brief."}, SYSTEM + user("Name it.")),
    ({"prompt": [BRIEF, HI]}, SYSTEM + user("Hi")),
    ({"messages": [{"from": "human", "value": "Hi"}], "reference": "Ho"}, user("Hi")),
    ({"instruction": "Name it.", "input": "Red.", "output": "Ho"}, user("Name it.\nRed.")),
    ({"instruction": "Say <|eot_id|>."}, user("Say <|eot_id|>.")),
]


def read_and_encoded(path, text, raw=False):
    """The prompts of a file with this text, and their ids as text."""
    path.write_text(text)
    prompts, chat = read_prompts(path, raw), ChatFormat(EXAMPLE)
    return prompts, [chat.decode(ids) for ids in encode_prompts(prompts, chat, 512)]


def test_a_prompt_is_encoded_in_the_chat_format_up_to_the_assistants_header(tmp_path):
    text = "\n".join(json.dumps(row) for row, _ in CHAT_PROMPTS)
    prompts, encoded = read_and_encoded(tmp_path / "p.jsonl", text)
    header = "<|start_header_id|>assistant<|end_header_id|>\n\n"
    assert encoded == [f"<|begin_of_text|>{middle}{header}" for _, middle in CHAT_PROMPTS]
    assert [prompt.reference for prompt in prompts] == [None, None, None, "Ho", "Ho", None]


def test_raw_prompts_are_their_text_after_bos_and_ids_are_used_as_they_are(tmp_path):
    rows = '" Once "\n{"prompt_ids": [3, 4]}\n{"instruction": "Go on.", "output": "x"}'
    prompts, encoded = read_and_encoded(tmp_path / "p.jsonl", rows, raw=True)
    assert encoded[::2] == ["<|begin_of_text|> Once ", "<|begin_of_text|>Go on."]
    assert encode_prompts(prompts[1:2], ChatFormat(EXAMPLE), 512) == [[3, 4]]
    talk = '{"instruction": "Go on.", "history": [["a", "b"]]}'
    with pytest.raises(InputError, match="p.jsonl:1: found turns, and --raw wants plain text"):
        read_and_encoded(tmp_path / "p.jsonl", talk, raw=True)


BAD_ROWS = """
{"prompt": ""} -> the prompt is empty
"  " -> the prompt is empty
{"prompt_ids": []} -> the prompt is empty
[] -> a row is a string or a JSON object
{ -> not JSON
{"prompt_ids": [600]} -> token id 600 is not below the model's vocab_size 512
{"question": "x"} -> wanted one of the keys prompt, messages
"\\ud800" -> surrogate
{"prompt": "x", "output": 3} -> output is 3
{"prompt": "x", "messages": []} -> wanted one of the keys
{"prompt": "x", "output": "y", "reference": "y"} -> wanted one of them
{"messages": [{"role": "assistant", "content": "y"}]} -> the last turn is the assistant's
{"messages": "x"} -> wanted a list of messages"""


@pytest.mark.parametrize("line, complaint", table(BAD_ROWS))
def test_a_bad_prompt_stops_the_command_before_the_first_answer(tmp_path, capsys, line, complaint):
    prompts, out = tmp_path / "p.jsonl", tmp_path / "o.jsonl"
    prompts.write_text(f'"Good."\n\n{line}\n')
    assert program.main(command(prompts, out)) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"eval.py: {prompts}:3: ") and complaint in error
    assert error.count("\n") == 1 and (not out.exists() or out.read_text() == "")


# -------------------------------------------------------------------------------------- the command

WORDS = "--max-new-tokens 40 --temperature 0.9 --top-p 0.95 --top-k 3 --seed 3 --cache-tokens 600"
WORDS = WORDS.split()


def command(prompts, out, *words):
    paths = ["--model", EXAMPLE, "--prompts", prompts, "--out", out]
    return ["generate", *map(str, paths), *WORDS, *map(str, words)]


def test_half_a_group_in_the_environment_does_not_answer_half_of_the_prompts(
    tmp_path, capsys, monkeypatch
):
    (tmp_path / "p.jsonl").write_text('"Hi."\n"Ho."\n')
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert program.main(command(tmp_path / "p.jsonl", tmp_path / "o.jsonl")) == 2
    assert "RANK is missing in the environment" in capsys.readouterr().err


def test_limits_of_sampling_need_a_temperature(tmp_path, capsys):
    for more in ("--top-p 0.5", "--top-k 5"):
        given = command("p", "o", "--temperature", 0, "--top-p", 1, "--top-k", 0, *more.split())
        assert program.main(given) == 2
        assert "--top-p and --top-k go with a --temperature above 0" in capsys.readouterr().err


@pytest.fixture(scope="module")
def prompt_file(tmp_path_factory):
    """23 prompts of many lengths; number 20 is longer than the model's context."""
    rows = [{"prompt": f"Count to {i}. " * (i % 5 + 1), "reference": str(i)} for i in range(20)]
    rows += ["word " * 600, "Hi", {"prompt_ids": [506]}]
    path = tmp_path_factory.mktemp("prompts") / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def whole(prompt_file, tmp_path_factory):
    """The file of an uninterrupted run, and the lines it printed."""
    out = tmp_path_factory.mktemp("whole") / "o.jsonl"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert program.main(command(prompt_file, out)) == 0
    return out, printed.getvalue().splitlines()


@pytest.fixture
def job(whole, prompt_file, tmp_path):
    """The same call with a directory of its own. `lines` are the rows that it will write."""
    out, content = tmp_path / "o.jsonl", whole[0].read_bytes()
    return SimpleNamespace(
        **dict(content=content, lines=content.splitlines(keepends=True), out=out),
        **dict(beside=Path(f"{out}.json"), settings=Path(f"{whole[0]}.json").read_bytes()),
        part=lambda rank: Path(f"{out}.part-{rank:05d}"),
        run=lambda *words: program.main(command(prompt_file, out, *words)),
    )


def test_answers_are_in_the_prompts_order_with_all_that_belongs_to_them(whole, prompt_file):
    rows = [json.loads(line) for line in whole[0].read_text().splitlines()]
    assert [row["index"] for row in rows] == list(range(23))
    assert list(rows[3]) == ["index", "prompt", "prediction", "tokens", "finish", "reference"]
    assert rows[3]["prompt"].startswith("Count to 3. Count") and rows[3]["reference"] == "3"
    assert rows[22]["prompt"] == [506] and "reference" not in rows[21]
    assert all((row["tokens"] == 40) == (row["finish"] == "length") for row in rows)
    model, chat, stop_ids = load_generator(EXAMPLE)
    for i in (0, 7, 20, 21):  # the row holds what the function gives; number 20 is too long
        (ids,) = encode_prompts([read_prompts(prompt_file)[i]], chat, 512)
        request = Request(i, ids, 0.9, 40)
        ((_, new, finish),) = generate(model, [request], stop_ids, top_p=0.95, top_k=3, seed=3)
        found = (rows[i]["prediction"], rows[i]["tokens"], rows[i]["finish"])
        assert found == (chat.decode(new), len(new), finish)
        assert (finish == "overlong") == (i == 20)


def test_the_command_prints_how_many_it_has_and_how_fast_they_come(whole):
    first, *_, speed, last = whole[1]
    assert "23 prompts, 0 of them answered before" in first and f"{whole[0]}.part-" in first
    assert "tokens/s" in speed and "23 rows" in last
    assert "1 left unanswered, whose prompt takes all 512 tokens" in last


def test_rows_of_the_file_and_of_any_part_are_kept_and_the_others_made_to_the_same_bytes(
    job, tmp_path, monkeypatch
):
    asked = []

    def recorded(model, requests, *arguments, **options):
        asked.append({request.number for request in requests})
        return generate(model, requests, *arguments, **options)

    monkeypatch.setattr(evaluation.answers, "generate", recorded)
    job.beside.write_bytes(job.settings)
    job.out.write_bytes(job.lines[9] + job.lines[2])
    # Row 9 is there twice: the last call was killed after joining, before it removed its parts.
    # Half of row 5, and half of row 4 and nothing else: killed while writing.
    job.part(0).write_bytes(job.lines[9] + job.lines[20] + job.lines[5][:30])
    job.part(1).write_bytes(job.lines[4][:9])
    job.part(6).write_bytes(job.lines[7] + job.lines[0])
    assert job.run() == 0 and asked == [set(range(23)) - {9, 2, 20, 7, 0}]
    assert job.run() == 0 and asked[1] == set()  # nothing left to do
    assert job.out.read_bytes() == job.content
    assert sorted(tmp_path.glob("[!.]*")) == [job.out, job.beside]


def forked(action, **environment) -> int:
    """The id of a process that does it. (A fork of this one need not load torch again.)"""
    if (child := os.fork()) == 0:
        signal.alarm(60)
        os.environ |= environment
        code = 1
        try:
            code = action() or 0
        finally:
            os._exit(code)
    return child


def on_two_processes(action) -> list[int]:
    """The exit codes of ranks 0 and 1, as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    there = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    children = [forked(action, RANK=rank, **there) for rank in "01"]
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def test_a_killed_run_continues_on_two_processes_to_the_same_bytes(job, tmp_path):
    child, part = forked(job.run), job.part(0)
    while not part.exists() or part.read_bytes().count(b"\n") < 3:
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert 3 <= part.read_bytes().count(b"\n") < 23
    assert on_two_processes(job.run) == [0, 0] and job.out.read_bytes() == job.content
    assert sorted(tmp_path.glob("[!.]*")) == [job.out, job.beside]


def test_if_a_process_is_killed_the_others_say_so_and_the_next_call_keeps_the_rows_of_all(
    job, monkeypatch, capfd
):
    def append_then_die(path, row):
        append_row(path, row)
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation.answers, "append_row", append_then_die)
        assert on_two_processes(job.run) == [2, -signal.SIGKILL]
    error = capfd.readouterr().err
    assert error.count("eval.py: another process ended early; the same call continues") == 1
    assert [job.part(rank).read_bytes().count(b"\n") for rank in (0, 1)] == [12, 1]
    assert job.run() == 0 and job.out.read_bytes() == job.content
    assert "23 prompts, 13 of them answered before" in capfd.readouterr().out


def test_processes_that_would_answer_differently_are_refused(job, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("support.processes.time.sleep", lambda _: None)
    assert on_two_processes(lambda: job.run("--seed", os.environ["RANK"])) == [2, 2]
    assert "processes differ: seed is 0 on process 0, 1 on 1" in capfd.readouterr().err
    assert list(tmp_path.glob("[!.]*")) == []


def test_a_second_call_with_the_same_out_is_refused_while_the_first_one_lives(job, capsys):
    held, tell = os.pipe()
    child = forked(lambda: hold_out(job.out) or os.write(tell, b".") and time.sleep(60))
    os.read(held, 1)
    assert job.run() == 2
    assert f"--out {job.out}: another process is writing there" in capsys.readouterr().err
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert job.run() == 0


@pytest.mark.parametrize("content", ['{"vocab_size": 512}', "[]", '"A prompt."'])
def test_a_file_beside_out_that_says_something_else_stays(job, capsys, content):
    job.beside.write_text(content)
    assert job.run() == 2
    complaint = f"{job.beside} does not say how answers were made; name another --out"
    assert complaint in capsys.readouterr().err and job.beside.read_text() == content


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nothing_is_drawn_from_logits_that_are_not_finite(bad):
    good = [0.0, 1.0, -math.inf]
    assert choose(torch.tensor([good]), [0.0], [0.5], 1.0, 0) == [1]
    for temperature in (0.0, 1.0):
        with pytest.raises(StoppedError, match="logits are not finite"):
            choose(torch.tensor([good, [0.0, bad, 1.0]]), [temperature] * 2, [0.5] * 2, 1.0, 0)


def test_a_full_disk_leaves_the_report_that_was_there(tmp_path, monkeypatch):
    write_json(tmp_path / "r.json", {"a": 1})
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr("support.files.flush", mock.Mock(side_effect=full))
    assert "No space left" in refusal(write_json, tmp_path / "r.json", {"a": 2})
    assert read_json(tmp_path / "r.json") == {"a": 1}
    write_json("/dev/null", {})
    assert not Path("/dev/null").is_file()


def test_a_process_that_fails_says_why_before_the_others_end(job, monkeypatch, capfd):
    """torchrun ends all processes when the first one has ended."""

    def append_or_fail(path, row):
        if os.environ["RANK"] == "1":
            raise StoppedError("the reason")
        append_row(path, row)

    monkeypatch.setattr("support.processes.time.sleep", lambda _, wait=time.sleep: wait(1))
    monkeypatch.setattr(evaluation.answers, "append_row", append_or_fail)
    assert on_two_processes(job.run) == [2, 1]
    first, second = capfd.readouterr().err.splitlines()
    assert "process 1: the reason" in first and "another process ended early" in second


OTHER_SETTINGS = """
--temperature 0.8 -> made with temperature 0.9, not 0.8
--seed 4 -> made with seed 3, not 4
--top-k 4 -> made with top_k 3, not 4
--max-new-tokens 41 -> made with max_new_tokens 40, not 41
--raw -> made with raw False, not True
--precision bf16 -> made with dtype torch.float32, not torch.bfloat16
--model OTHER -> made with model
--prompts OTHER.jsonl -> made with prompts"""


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("change, complaint", table(OTHER_SETTINGS))
def test_answers_of_another_model_other_prompts_or_other_settings_are_refused_and_stay(
    job, prompt_file, tmp_path, monkeypatch, capfd, change, complaint, processes
):
    there = {job.beside: job.settings, job.out: job.lines[0]}
    there[job.part(1)] = job.lines[1] + job.lines[2][:7]
    for path, content in there.items():
        path.write_bytes(content)
    other = linked(tmp_path / "OTHER", generation_config='{"eos_token_id": 7}')
    Path(f"{other}.jsonl").write_text(prompt_file.read_text() + '"One more."\n')
    words = change.replace("OTHER", str(other)).split()
    if processes == 1:
        assert job.run(*words) == 2
    else:
        monkeypatch.setattr("support.processes.time.sleep", lambda _: None)
        assert on_two_processes(lambda: job.run(*words)) == [2, 2]
    assert complaint in (error := capfd.readouterr().err) and error.count("\n") == processes
    assert {path: path.read_bytes() for path in there} == there


STRANGE = """
{"index": "0"} -> FILE:1: index '0' is unknown
{"index": []} -> FILE:1: index [] is unknown
{"index": 23} -> FILE:1: index 23 is unknown
1 -> FILE:1: index is missing
{"my": 1} -> FILE:1: index is missing
my notes -> FILE:1: not JSON
{"index": 0} -> OUT.json is missing, which says how OUT was made"""


@pytest.mark.parametrize("name", ["o.jsonl", "o.jsonl.part-00000"])
@pytest.mark.parametrize("line, complaint", table(STRANGE))
def test_a_file_of_another_origin_is_refused_and_stays(job, capsys, name, line, complaint):
    path = job.out.with_name(name)
    # Of a part, a last line that is not JSON would be a row that a killed process had begun.
    text = f"{line}\n{line}" if name != "o.jsonl" else line
    path.write_text(text)
    assert job.run() == 2
    complaint = complaint.replace("FILE", str(path)).replace("OUT", str(job.out))
    assert capsys.readouterr().err.startswith(f"eval.py: {complaint}")
    assert list(job.out.parent.glob("[!.]*")) == [path] and path.read_text() == text


BAD_FLAGS = """
--top-p 0 -> --top-p: found 0, wanted float, 1e-09 or more and at most 1
--top-p 1.5 -> --top-p: found 1.5
--temperature nan -> --temperature: found nan
--temperature inf -> --temperature: found inf
--seed 1.5 -> found 1.5, wanted int
--temperature -1 -> found -1
--max-new-tokens 0 -> --max-new-tokens: found 0
--sed 1 -> unrecognized arguments: --sed
--out FILE/o -> exists
--model BARE -> tokenizer.json: No such file or directory; wanted
--model NONE -> no such directory; wanted a Hugging Face model directory
--device cuda -> --device cuda"""


@pytest.mark.parametrize("words, complaint", table(BAD_FLAGS))
def test_mistakes_of_the_command_line_get_one_line(job, tmp_path, capsys, words, complaint):
    if words == "--device cuda" and torch.cuda.is_available():
        pytest.skip("CUDA is there")
    linked(tmp_path / "BARE", without=["tokenizer.json"])
    words = words.replace("FILE", __file__).replace("BARE", str(tmp_path / "BARE"))
    assert job.run(*words.split()) == 2
    assert complaint in (error := capsys.readouterr().err) and error.count("\n") == 1, error


OUT_OF_MEMORY = [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")]
OUT_OF_MEMORY += [RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9")]


@pytest.mark.parametrize("error", [*OUT_OF_MEMORY, MemoryError()])
def test_running_out_of_memory_is_one_line_with_the_flag_to_lower(job, monkeypatch, capsys, error):
    def full(*_, **__):
        raise error

    monkeypatch.setattr(Cache, "__init__", full)
    monkeypatch.setattr(evaluation.likelihood, "pair_logps", full)
    data = f"--model {EXAMPLE} --data {ROOT}/examples/heldout.jsonl --out {job.out}-l"
    assert job.run() == program.main(["likelihood", *data.split()]) == 1
    start = "eval.py: out of memory; lower"
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(f"{start} --cache-tokens from 600 to 300")
    assert second.startswith(f"{start} --max-tokens-per-gpu from 8192 to 4096")


def test_a_fault_of_ours_keeps_its_traceback(job, monkeypatch):
    monkeypatch.setattr(evaluation.answers, "generate", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        job.run()


# ----------------------------------------------------------------------------- the parts of a file


def test_each_process_appends_to_a_part_of_its_own_and_joining_puts_the_rows_in_order(
    tmp_path, monkeypatch
):
    out = tmp_path / "rows.jsonl"
    for rank, rows in (("0", [("c", 1), ("a", 2)]), ("11", [("b", 3), ("c", 4)])):
        monkeypatch.setenv("RANK", rank)
        for name, value in rows:
            append_row(out, {"id": name, "value": value, "text": "é cut \ud83d"})
    names = ["rows.jsonl.part-00000", "rows.jsonl.part-00011"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    found = join_parts(out, "id", ["a", "b", "absent", "c"])
    assert [(row["id"], row["value"]) for row in found] == [("a", 2), ("b", 3), ("c", 4)]
    assert [json.loads(line) for line in out.read_bytes().split(b"\n")[:-1]] == found
    assert found[0]["text"] == "é cut \ud83d" and "é cut \\ud83d".encode() in out.read_bytes()
    assert list(tmp_path.iterdir()) == [out]


def test_a_join_that_fails_leaves_the_file_and_the_parts_as_they_were(tmp_path, monkeypatch):
    out = tmp_path / "rows.jsonl"
    out.write_text('{"id": 1}\n')
    append_row(out, {"id": 0})
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left")))
        with pytest.raises(InputError, match="No space left"):
            join_parts(out, "id", [0, 1])
    assert out.read_text() == '{"id": 1}\n' and Path(f"{out}.part-00000").exists()
    assert join_parts(out, "id", [0, 1]) == [{"id": 0}, {"id": 1}]
