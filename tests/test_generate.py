"""Generation: the cache, ragged batches, sampling, stops, and the command: formats, going on, several processes.

Oracles: transformers' generate and its logits warpers, a full pass over all tokens for each new one, the text that
others documented for their trained model, byte-equal files.
"""

import json
import math
import os
import signal
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import LLAMA31, REAL, ROOT, needs_real, tiny_model
from test_model import refusal

import eval as evaluation
from data import ChatFormat, read_preferences
from evaluation.answers import load_generator
from evaluation.generate import Cache, Request, choose, generate, probabilities
from evaluation.prompts import read_prompts
from evaluation.rows import append_row, locked, share
from model import save_model

EXAMPLE = ROOT / "examples" / "model"
LENGTHS = (5, 1, 23, 9, 40, 2, 14)  # tokens of prompts


def prompts_of(lengths, vocab_size=97, seed=3):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab_size, n).tolist() for n in lengths]


def answers(model, requests, stop_ids=frozenset(), **options):
    """{index: (new ids, finish)}; each index once."""
    found = list(generate(model, requests, frozenset(stop_ids), **options))
    assert len(found) == len({i for i, _, _ in found})
    return {i: (new, finish) for i, new, finish in found}


def continued(model, prompt, stop_ids, max_new_tokens):
    """Greedily, by a whole pass without a cache for each new token."""
    new = []
    while (
        len(new) < max_new_tokens and len(prompt) + len(new) < model.config.max_position_embeddings
    ):
        best = int(model.logits(torch.tensor(prompt + new))[-1].argmax())
        if best in stop_ids:
            return new, "stop"
        new.append(best)
    return new, "length"


# ------------------------------------------------------------------------------------------------------ cache and batch


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed linears"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True, "head_dim": 16},
        {"num_key_value_heads": 1, "rope_scaling": LLAMA31},
    ],
    ids=["gqa", "tied", "llama3"],
)
def test_greedy_tokens_of_a_ragged_batch_equal_those_of_transformers(tmp_path, changes, packed):
    model = tiny_model(**changes).requires_grad_(False)
    save_model(model, tmp_path / "saved", dtype=torch.float32)
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    if packed:
        model.pack_linears(least=0)
        assert not any(isinstance(module, torch.nn.Linear) for module in model.modules())
    prompts = prompts_of(LENGTHS)
    pad = max(LENGTHS)
    ids = torch.tensor([[0] * (pad - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (pad - len(p)) + [1] * len(p) for p in prompts])
    expected = theirs.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=80,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )[:, pad:].tolist()
    found = answers(model, [Request(i, p, max_new_tokens=80) for i, p in enumerate(prompts)])
    assert [found[i] for i in range(len(prompts))] == [(new, "length") for new in expected]


def test_a_step_over_the_cache_gives_the_logits_of_a_full_pass_over_all_tokens():
    model, prompts = tiny_model(dtype=torch.float64).requires_grad_(False), prompts_of((4, 11, 1))
    cache, lengths = Cache(model, 5, 16), [4, 11, 1]
    first = model.prefill(prompts[:1], cache, 0)
    rest = model.prefill(prompts[1:], cache, 1)
    full = [model.logits(torch.tensor(p))[-1] for p in prompts]
    torch.testing.assert_close(torch.cat([first, rest]), torch.stack(full), rtol=0, atol=1e-12)
    for tokens in ([7, 8, 9], [1, 2, 3]):
        logits = model.step(tokens, lengths, cache)
        prompts = [p + [token] for p, token in zip(prompts, tokens, strict=True)]
        lengths = [n + 1 for n in lengths]
        full = [model.logits(torch.tensor(p))[-1] for p in prompts]
        torch.testing.assert_close(logits, torch.stack(full), rtol=0, atol=1e-12)


def test_rows_that_stop_early_and_rows_that_take_their_place_get_the_tokens_they_get_alone():
    model = tiny_model(dtype=torch.float64).requires_grad_(False)
    requests = [
        Request(i, p, max_new_tokens=n)
        for i, (p, n) in enumerate(
            zip(prompts_of(LENGTHS * 3), [30, 3, 12, 1, 20, 25, 8] * 3, strict=True)
        )
    ]
    stop_ids = {5, 17, 40, 77}
    expected = {
        i: continued(model, r.prompt, stop_ids, r.max_new_tokens) for i, r in enumerate(requests)
    }
    assert Counter(finish for _, finish in expected.values()).keys() == {"stop", "length"}
    for cache_tokens in (1, 120, 65_536):
        assert answers(model, requests, stop_ids, cache_tokens=cache_tokens) == expected


def test_the_cache_is_never_larger_than_told_unless_a_single_row_is(monkeypatch):
    made = []

    class Counted(Cache):
        def __init__(self, model, rows, tokens):
            made.append((rows, tokens))
            super().__init__(model, rows, tokens)

    monkeypatch.setattr(evaluation, "Cache", Counted)
    requests = [
        Request(i, p, max_new_tokens=8)
        for i, p in enumerate(prompts_of((200, 3, 3, 3, 90, 4, 5, 6, 7, 8)))
    ]
    assert len(answers(tiny_model(), requests, cache_tokens=100)) == 10
    assert made[0] == (1, 208) and all(rows * tokens <= 100 for rows, tokens in made[1:])
    assert max(rows for rows, _ in made) > 3  # the short ones are not computed one by one


def test_an_answer_ends_at_its_limit_or_at_the_models_context_whichever_comes_first():
    model = tiny_model(max_position_embeddings=16)
    requests = [
        Request(0, [1] * 10, max_new_tokens=4),
        Request(1, [1] * 10, max_new_tokens=50),
        Request(2, [1] * 16, max_new_tokens=5),
        Request(3, [1] * 15, max_new_tokens=5),
    ]
    found = answers(model, requests)
    assert {i: (len(new), finish) for i, (new, finish) in found.items()} == {
        0: (4, "length"),
        1: (6, "length"),
        2: (0, "overlong"),
        3: (1, "length"),
    }


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_cuda_in_bf16_a_step_gives_the_logits_of_a_full_pass_in_fp32_on_the_cpu_up_to_rounding():
    model, prompts = tiny_model().requires_grad_(False), prompts_of((4, 40, 1))
    full = [model.logits(torch.tensor(p + [7]))[-1] for p in prompts]
    model.to("cuda", torch.bfloat16)
    cache = Cache(model, 3, 48)
    model.prefill(prompts, cache, 0)
    logits = model.step([7, 7, 7], [4, 40, 1], cache).float().cpu()
    assert (logits - torch.stack(full)).abs().max() < 0.05 * torch.stack(full).abs().max()


@needs_real
def test_a_trained_model_generates_the_story_that_its_authors_documented_whatever_stands_beside_it():
    model, chat, stop_ids = load_generator(REAL / "stories260K")
    story = (REAL / "stories260K" / "greedy.txt").read_text()
    beside = prompts_of((30, 3, 70), vocab_size=512)
    found = answers(
        model, [Request(i, p, max_new_tokens=260) for i, p in enumerate([[512], *beside])], stop_ids
    )
    assert len(story) == 565 and chat.decode(found[0][0]).startswith(story)


# ------------------------------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize(
    "temperature, top_k, top_p",
    [(0.6, 0, 0.9), (1.0, 5, 1.0), (1.3, 12, 0.5), (0.7, 0, 1e-6), (1.0, 200, 0.99)],
)
def test_the_filtered_distribution_is_that_of_transformers_warpers(temperature, top_k, top_p):
    logits = 3 * torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    logits[0, :7] = 4.0  # ties, one of them the fifth
    logits[1] = 0.0
    warpers = [transformers.TemperatureLogitsWarper(temperature)]
    if top_k:
        warpers.append(transformers.TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(transformers.TopPLogitsWarper(top_p))
    expected = logits
    for warper in warpers:
        expected = warper(None, expected)
    found = probabilities(logits, torch.full((6,), temperature), top_p, top_k)
    if top_p < 1:  # which of tied tokens top-p keeps is the sort's choice
        found, expected = found[2:], expected[2:]
    torch.testing.assert_close(found, expected.softmax(-1), rtol=1e-5, atol=1e-7)


def test_evenly_spread_uniform_numbers_draw_each_token_as_often_as_its_probability():
    logits = torch.tensor([[0.0, 1.0, -math.inf, 2.0, 0.5]])
    uniforms = [(i + 0.5) / 10_000 for i in range(10_000)]
    drawn = Counter(choose(logits.expand(10_000, -1), [0.8] * 10_000, uniforms, 1.0, 0))
    weights = [math.exp(x / 0.8) for x in (0.0, 1.0, -math.inf, 2.0, 0.5)]
    assert (
        all(abs(drawn[i] / 10_000 - w / sum(weights)) <= 1e-4 for i, w in enumerate(weights))
        and 2 not in drawn
    )
    assert choose(logits.expand(3, -1), [1.0, 0.0, 1.0], [0.0, 0.1, 1 - 2**-53], 1.0, 0) == [
        0,
        3,
        4,
    ]
    assert choose(torch.tensor([[-math.inf, 0.0]]), [1.0], [0.0], 1.0, 0) == [
        1
    ]  # never one of probability 0
    for temperature in (
        1e-30,
        1e-40,
        1e-50,
    ):  # in fp32 the last is 0, and logits over the others are infinite
        for top_p, top_k in ((1.0, 0), (0.9, 2)):
            assert choose(100 * logits, [temperature], [0.5], top_p, top_k) == [3]


def test_what_is_drawn_depends_on_seed_row_number_and_position_alone():
    model = tiny_model(dtype=torch.float64).requires_grad_(False)
    requests = [Request(i, p, 0.9, 12) for i, p in enumerate(prompts_of(LENGTHS))]
    all_at_once = answers(model, requests, seed=5, top_p=0.95)
    assert answers(model, requests, seed=5, top_p=0.95, cache_tokens=1) == all_at_once
    some = answers(model, requests[:2:-1], seed=5, top_p=0.95)
    assert [some[k] for k in range(4)] == [all_at_once[i] for i in (6, 5, 4, 3)]
    longer = answers(model, [r._replace(max_new_tokens=20) for r in requests], seed=5, top_p=0.95)
    assert all(longer[i][0][:12] == all_at_once[i][0] for i in range(7))
    assert answers(model, requests, seed=6, top_p=0.95) != all_at_once
    twice = answers(model, [Request(n, [1, 2, 3], 0.9, 12) for n in (0, 1, 0)])
    assert twice[0] == twice[2] != twice[1]


# ---------------------------------------------------------------------------------------------------------------- stops


@pytest.mark.parametrize(
    "text, more",
    [
        ('{"eos_token_id": 3}', {3}),
        ('{"eos_token_id": [3, 4]}', {3, 4}),
        ('{"eos_token_id": null}', set()),
        ("{}", set()),
        (None, set()),
    ],
)
def test_an_answer_stops_at_llamas_three_ends_and_at_those_of_generation_config(
    tmp_path, text, more
):
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / name).symlink_to(EXAMPLE / name)
    if text is not None:
        (tmp_path / "generation_config.json").write_text(text)
    tokens = json.loads((EXAMPLE / "tokenizer.json").read_text())["added_tokens"]
    ends = {
        t["id"] for t in tokens if t["content"] in ("<|end_of_text|>", "<|eot_id|>", "<|eom_id|>")
    }
    assert len(ends) >= 2
    assert load_generator(tmp_path)[2] == ends | more


@pytest.mark.parametrize(
    "text", ['{"eos_token_id": true}', '{"eos_token_id": [1, "x"]}', '{"eos_token_id": -1}', "[[]]"]
)
def test_a_stop_id_that_is_no_token_id_is_refused(tmp_path, text):
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / name).symlink_to(EXAMPLE / name)
    (tmp_path / "generation_config.json").write_text(text)
    assert (
        "generation_config.json" in (message := refusal(load_generator, tmp_path))
        and "token id" in message
    )


# -------------------------------------------------------------------------------------------------------------- prompts

SYSTEM = "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"


def user(text):
    return f"<|start_header_id|>user<|end_header_id|>\n\n{text}<|eot_id|>"


@pytest.mark.parametrize(
    "row, middle",
    [
        ("Name a fruit.", user("Name a fruit.")),
        ({"prompt": " Name a fruit. ", "system": "Be brief."}, SYSTEM + user("Name a fruit.")),
        (
            {
                "prompt": [
                    {"role": "system", "content": "Be brief."},
                    {"role": "user", "content": "Hi"},
                ]
            },
            SYSTEM + user("Hi"),
        ),
        ({"messages": [{"from": "human", "value": "Hi"}], "reference": "Ho"}, user("Hi")),
        (
            {"instruction": "Name a fruit.", "input": "A red one.", "output": "Ho"},
            user("Name a fruit.\nA red one."),
        ),
        ({"instruction": "Say <|eot_id|>."}, user("Say <|eot_id|>.")),
    ],
)
def test_a_prompt_of_any_format_is_encoded_in_the_chat_format_up_to_the_assistants_header(
    tmp_path, row, middle
):
    (tmp_path / "p.jsonl").write_text(json.dumps(row))
    (prompt,), chat = read_prompts(tmp_path / "p.jsonl"), ChatFormat(EXAMPLE)
    (ids,) = evaluation.encode_prompts([prompt], chat, 512)
    ends = "<|begin_of_text|>", "<|start_header_id|>assistant<|end_header_id|>\n\n"
    assert chat.decode(ids) == ends[0] + middle + ends[1]
    assert prompt.reference == ("Ho" if "Ho" in str(row) else None)


def test_raw_prompts_are_their_text_after_bos_and_ids_are_used_as_they_are(tmp_path):
    (tmp_path / "p.jsonl").write_text(
        '" Once "\n{"prompt_ids": [3, 4]}\n{"instruction": "Go on.", "output": "x"}'
    )
    chat = ChatFormat(EXAMPLE)
    encoded = evaluation.encode_prompts(read_prompts(tmp_path / "p.jsonl", raw=True), chat, 512)
    assert (
        chat.decode(encoded[0]) == "<|begin_of_text|> Once "
        and chat.decode(encoded[2]) == "<|begin_of_text|>Go on."
    )
    assert encoded[1] == [3, 4]


@pytest.mark.parametrize(
    "line, complaint",
    [
        ('{"prompt": ""}', "the prompt is empty"),
        ('"  "', "the prompt is empty"),
        ('{"prompt_ids": []}', "the prompt is empty"),
        ("[]", "a row is a string or a JSON object"),
        ("{", "not JSON"),
        ('{"prompt_ids": [600]}', "token id 600 is not below the model's vocab_size 512"),
        ('{"question": "x"}', "wanted one of the keys prompt, messages"),
        ('"\\ud800"', "surrogate"),
        ('{"prompt": "x", "refrence": "y"}', "'refrence' is unknown"),
        ('{"prompt": "x", "output": 3}', "output is 3"),
        ('{"prompt": "x", "messages": []}', "wanted one of the keys"),
        ('{"prompt": "x", "output": "y", "reference": "y"}', "wanted one of them"),
        (
            '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}',
            "the assistant's",
        ),
        ('{"messages": "x"}', "wanted a string or a list of messages"),
    ],
)
def test_a_row_that_is_no_prompt_stops_the_command_before_the_first_answer(
    tmp_path, capsys, line, complaint
):
    (tmp_path / "p.jsonl").write_text(f'"Good."\n\n{line}\n')
    words = [
        "generate",
        "--model",
        EXAMPLE,
        "--prompts",
        tmp_path / "p.jsonl",
        "--out",
        tmp_path / "o.jsonl",
    ]
    assert evaluation.main(list(map(str, words))) == 2
    error = capsys.readouterr().err
    assert (
        error.startswith(f"eval.py: {tmp_path / 'p.jsonl'}:3: ")
        and complaint in error
        and error.count("\n") == 1
    )
    assert not (tmp_path / "o.jsonl").exists() or (tmp_path / "o.jsonl").read_text() == ""


def test_turns_are_refused_as_plain_text(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"messages": [{"role": "user", "content": "x"}]}')
    assert "p.jsonl:1: found turns, and --raw wants plain text" in refusal(
        read_prompts, tmp_path / "p.jsonl", True
    )


# ---------------------------------------------------------------------------------------------------------- the command

WORDS = [
    "--max-new-tokens",
    "40",
    "--temperature",
    "0.9",
    "--top-p",
    "0.95",
    "--seed",
    "3",
    "--cache-tokens",
    "600",
]


@pytest.fixture(scope="module")
def prompt_file(tmp_path_factory):
    """23 prompts of many lengths; number 20 is longer than the model's context."""
    path = tmp_path_factory.mktemp("prompts") / "p.jsonl"
    rows = [{"prompt": f"Count to {i}. " * (i % 5 + 1), "reference": str(i)} for i in range(20)]
    path.write_text(
        "".join(
            json.dumps(row) + "\n" for row in [*rows, "word " * 600, "Hi", {"prompt_ids": [506]}]
        )
    )
    return path


def command(prompt_file, out, *words):
    return [
        "generate",
        "--model",
        str(EXAMPLE),
        "--prompts",
        str(prompt_file),
        "--out",
        str(out),
        *(words or WORDS),
    ]


@pytest.fixture(scope="module")
def whole(prompt_file, tmp_path_factory):
    """The file of an uninterrupted run, and what it printed."""
    out = tmp_path_factory.mktemp("whole") / "o.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        said = []
        patch.setattr("builtins.print", lambda *text, **_: said.append(" ".join(map(str, text))))
        assert evaluation.main(command(prompt_file, out)) == 0
    return out, said


def test_answers_stand_in_the_prompts_order_with_all_that_belongs_to_them(whole, prompt_file):
    rows, chat = (
        [json.loads(line) for line in whole[0].read_text().splitlines()],
        ChatFormat(EXAMPLE),
    )
    assert [row["index"] for row in rows] == list(range(23))
    assert list(rows[3]) == ["index", "prompt", "prediction", "tokens", "finish", "reference"]
    assert rows[3]["prompt"].startswith("Count to 3. Count") and rows[3]["reference"] == "3"
    assert rows[22]["prompt"] == [506]
    assert "reference" not in rows[21] and {row["finish"] for row in rows} <= {
        "stop",
        "length",
        "overlong",
    }
    for row in rows:
        assert row["tokens"] == 40 if row["finish"] == "length" else row["tokens"] < 40
    for i in (0, 7, 21):  # what is written is the text of what the function gives
        prompt = evaluation.encode_prompts([read_prompts(prompt_file)[i]], chat, 512)[0]
        model, _, stop_ids = load_generator(EXAMPLE)
        ((_, new, finish),) = generate(
            model, [Request(i, prompt, 0.9, 40)], stop_ids, top_p=0.95, seed=3
        )
        assert (rows[i]["prediction"], rows[i]["tokens"], rows[i]["finish"]) == (
            chat.decode(new),
            len(new),
            finish,
        )


def test_a_prompt_longer_than_the_context_is_recorded_unanswered_and_told_at_the_end(whole):
    row = json.loads(whole[0].read_text().splitlines()[20])
    assert (row["prediction"], row["tokens"], row["finish"]) == ("", 0, "overlong")
    assert (
        "1 left unanswered, whose prompt takes all 512 tokens" in whole[1][-1]
        and "23 rows" in whole[1][-1]
    )
    assert "tokens/s" in whole[1][-2]


def test_a_file_that_was_cut_anywhere_is_completed_to_the_same_bytes_and_kept_rows_are_not_made_again(
    whole, prompt_file, tmp_path, monkeypatch
):
    out, content = tmp_path / "o.jsonl", whole[0].read_bytes()
    lines = content.splitlines(keepends=True)
    asked, original = [], evaluation.generate
    monkeypatch.setattr(
        evaluation,
        "generate",
        lambda model, requests, *args, **options: (
            asked.append({r.number for r in requests})
            or original(model, requests, *args, **options)
        ),
    )
    kept = [lines[9], lines[2], lines[20]]  # as they came, and half a line
    out.write_bytes(b"".join(kept) + lines[5][:30])
    (tmp_path / "o.jsonl.json").write_bytes((whole[0].parent / "o.jsonl.json").read_bytes())
    assert evaluation.main(command(prompt_file, out)) == 0
    assert out.read_bytes() == content and asked == [set(range(23)) - {9, 2, 20}]
    assert evaluation.main(command(prompt_file, out)) == 0  # nothing left to do
    assert out.read_bytes() == content and asked[1] == set()


def forked(action, **environment) -> int:
    """A process that does it and ends; its id. (A fork of this one: no new interpreter has to load torch.)"""
    if (child := os.fork()) == 0:
        signal.alarm(60)
        os.environ |= environment
        os._exit(action() or 0)
    return child


def test_a_run_killed_in_the_middle_goes_on_on_two_processes_to_the_same_bytes(
    whole, prompt_file, tmp_path
):
    out = tmp_path / "o.jsonl"
    child = forked(lambda: evaluation.main(command(prompt_file, out)))
    while not out.exists() or out.read_bytes().count(b"\n") < 3:
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert 3 <= out.read_bytes().count(b"\n") < 23
    ranks = [
        forked(lambda: evaluation.main(command(prompt_file, out)), RANK=rank, WORLD_SIZE="2")
        for rank in "01"
    ]
    assert [os.waitpid(rank, 0)[1] for rank in ranks] == [0, 0]
    assert out.read_bytes() == whole[0].read_bytes()


@pytest.mark.parametrize(
    "change, complaint",
    [
        (["--temperature", "0.8"], "made with temperature 0.9, not 0.8"),
        (["--seed", "4"], "made with seed 3, not 4"),
        (["--max-new-tokens", "41"], "made with max_new_tokens 40, not 41"),
        (["--raw"], "made with raw False, not True"),
        (["--precision", "bf16"], "made with dtype torch.float32, not torch.bfloat16"),
        (["--model", "other"], "made with model "),
        (["--prompts", "other"], "made with prompts "),
    ],
)
def test_the_answers_of_another_model_other_prompts_or_other_settings_are_refused_and_stay(
    whole, prompt_file, tmp_path, capsys, change, complaint
):
    content = whole[0].read_bytes()
    if change == ["--model", "other"]:
        (tmp_path / "other").mkdir()
        for name in ("config.json", "model.safetensors", "tokenizer.json"):
            (tmp_path / "other" / name).symlink_to(EXAMPLE / name)
        (tmp_path / "other" / "generation_config.json").write_text('{"eos_token_id": 7}')
        change = ["--model", str(tmp_path / "other")]
    elif change[0] == "--prompts":
        (tmp_path / "other").write_text(prompt_file.read_text() + '"One more."\n')
        change = ["--prompts", str(tmp_path / "other")]
    assert evaluation.main([*command(prompt_file, whole[0]), *change]) == 2
    assert complaint in (error := capsys.readouterr().err) and error.count("\n") == 1
    assert whole[0].read_bytes() == content


def test_a_file_of_another_origin_is_refused_and_stays(prompt_file, tmp_path, capsys):
    row = '{"index": %s, "prediction": "a", "tokens": 1, "finish": "stop"}\n'
    for text, complaint in (
        (row % 0, "o.jsonl.json is missing"),
        (row % '"0"', "o.jsonl:1: not an answer"),
        ("1\n", "o.jsonl:1: index"),
        ("my notes", "its last line is no row of this command"),
        ('{"mine": 1}', "its last line is no row of this command"),
    ):
        (tmp_path / "o.jsonl").write_text(text)
        assert evaluation.main(command(prompt_file, tmp_path / "o.jsonl")) == 2
        assert complaint in capsys.readouterr().err and (tmp_path / "o.jsonl").read_text() == text


def test_mistakes_of_the_command_line_get_one_line(prompt_file, tmp_path, capsys):
    (tmp_path / "bare").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "bare" / name).symlink_to(EXAMPLE / name)
    out = tmp_path / "o.jsonl"
    for words, complaint in (
        (["--top-p", "0"], "--top-p: found 0, wanted float, 1e-09 or more and at most 1"),
        (["--temperature", "nan"], "--temperature: found nan"),
        (["--seed", "1.5"], "found 1.5, wanted int"),
        (["--temperature", "-1"], "found -1"),
        (["--max-new-tokens", "0"], "--max-new-tokens: found 0"),
        (["--sed", "1"], "unrecognized arguments: --sed"),
        (["--out", str(Path(__file__) / "o")], "exists"),
        (["--model", str(tmp_path / "bare")], "tokenizer.json: No such file or directory; wanted"),
        (["--model", str(tmp_path / "none")], "config.json: No such file"),
        (["--device", "cuda"], "--device cuda"),
    ):
        if words[0] == "--device" and torch.cuda.is_available():
            continue
        assert evaluation.main([*command(prompt_file, out), *words]) == 2
        assert complaint in (error := capsys.readouterr().err) and error.count("\n") == 1, error


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes"),
    ],
)
def test_memory_that_is_not_there_is_one_line_with_the_flag_to_lower(
    prompt_file, tmp_path, monkeypatch, capsys, error
):
    def full(*_, **__):
        raise error

    monkeypatch.setattr(Cache, "__init__", full)
    monkeypatch.setattr(evaluation, "pair_logps", full)
    likelihood = [
        "likelihood",
        "--model",
        EXAMPLE,
        "--data",
        ROOT / "examples/heldout.jsonl",
        "--out",
        tmp_path / "l",
    ]
    for words, wanted in (
        (command(prompt_file, tmp_path / "o.jsonl"), "lower --cache-tokens from 600 to 300"),
        (list(map(str, likelihood)), "lower --max-tokens-per-gpu from 8192 to 4096"),
    ):
        assert evaluation.main(words) == 2
        said = capsys.readouterr().err
        assert (
            said.startswith("eval.py: out of memory; ") and wanted in said and said.count("\n") == 1
        )
    error = RuntimeError("a fault of ours")
    with pytest.raises(RuntimeError, match="ours"):
        evaluation.main(list(map(str, likelihood)))


def test_rows_of_several_processes_are_each_whole_and_half_a_line_of_a_killed_one_is_cut_off(
    tmp_path,
):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"kept": 1}\n{"index": 2, "half')

    def write(k):
        for i in range(60):
            append_row(path, {"process": k, "row": i, "text": "é" * 5000})

    children = [forked(lambda k=k: write(k)) for k in range(3)]
    assert all(os.waitpid(child, 0)[1] == 0 for child in children)
    first, *rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert first == {"kept": 1} and {row["text"] for row in rows} == {"é" * 5000}
    assert {(row["process"], row["row"]) for row in rows} == {
        (k, i) for k in range(3) for i in range(60)
    }


def test_a_row_waits_while_another_process_has_the_file(tmp_path):
    path, (start, go) = tmp_path / "rows.jsonl", os.pipe()
    # Forked before the file is open: a child would hold what its parent has locked.
    child = forked(lambda: os.read(start, 1) and append_row(path, {"row": 1}))
    with locked(path):
        os.write(go, b"!")
        time.sleep(0.3)
        assert path.read_bytes() == b""
    assert os.waitpid(child, 0)[1] == 0 and path.read_bytes() == b'{"row": 1}\n'


def test_processes_share_items_without_rest_or_repetition(monkeypatch):
    assert share([1, 2, 3]) == [1, 2, 3]
    monkeypatch.setenv("WORLD_SIZE", "3")
    shares = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        shares.append(share(list(range(5))))
    assert shares == [[0, 3], [1, 4], [2]]


def test_a_file_of_another_origin_is_left_as_it_is_and_half_a_surrogate_pair_is_written_as_json_has_it(
    tmp_path,
):
    (tmp_path / "notes.txt").write_text("my only notes")
    with pytest.raises(
        evaluation.InputError, match="notes.txt: its last line is no row of this command"
    ):
        evaluation.append_row(tmp_path / "notes.txt", {"index": 0})
    assert (tmp_path / "notes.txt").read_text() == "my only notes"
    evaluation.append_row(tmp_path / "rows.jsonl", {"index": 0, "prediction": "cut \ud83d"})
    assert json.loads((tmp_path / "rows.jsonl").read_bytes()) == {
        "index": 0,
        "prediction": "cut \ud83d",
    }


def test_preferences_are_prompts_with_their_chosen_answers_as_references():
    prompts = read_prompts(ROOT / "examples/heldout.jsonl")
    rows = [json.loads(line) for line in (ROOT / "examples/heldout.jsonl").read_text().splitlines()]
    assert [p.reference for p in prompts] == [
        read_preferences(ROOT / "examples/heldout.jsonl")[i].chosen for i in range(len(rows))
    ]
    assert prompts[0].prompt[-1][0] == "user" and prompts[0].prompt[-1][1] in json.dumps(rows[0])
