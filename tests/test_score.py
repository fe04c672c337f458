"""eval.py score: golden numbers, numbers worked by hand, the command, and its messages on faults.

The golden numbers come from an implementation of both families written by hand, without the
packages, that was equal to them to 1e-9 on a thousand generated texts (commit 3c7e309)."""

import importlib
import json
import marshal
import os
import random
import subprocess
import sys

import pytest
from conftest import NOTHING_SAID, REAL, ROOT, needs_real

from eval import main
from evaluation import scores as scoring

NAMES = ["bleu4", "rouge1", "rouge2", "rougeL"]
NAMES_LF = [f"{name}_lf" for name in NAMES]
SIDES = ["mean_prediction_characters", "mean_prediction_tokens"]
LENGTHS = SIDES + [name.replace("prediction", "reference") for name in SIDES]


def scores(*rows, of=NAMES + NAMES_LF):
    found = scoring.score_rows(list(rows))
    return [found[name] for name in of]


# -------------------------------------------------------------------------------- golden numbers

# Eight scores of a row, or the four of the lf family. The first four rows are LLaMA-Factory's own;
# the others are texts that the tokenizers treat specially: numbers, entities, marks,
# runs of dots, blank lines, every kind of white space, other scripts, emoji, blank texts.
GOLDEN = r"""
["The cat sat on the mat.", "The cat is on the mat."]
    79.4484 85.7143 66.6667 85.7143
["Hello, world!\n\nIt costs $3.50 - 20% off.", "Hello world! It costs 3.50 dollars, 20% off."]
    64.2616 83.3333 36.3636 75.0000
["a b", "a b c d e f"]
    5.8428 50.0000 33.3333 50.0000
["xyz", "abc"]
    0 0 0 0
["It cost $1,000.50, i.e. 20% more.", "It cost 1,000.5 dollars - 20% more!"]
    14.4589 70.5882 53.3333 70.5882   58.0127 57.1429 27.2727 50.0000
["&quot;Well&quot; &amp;lt; <skipped>co-\nop", "\"Well\" < coop co-op"]
    81.8731 50.0000 20.0000 50.0000   10.6698 52.6316 18.1818 38.4615
["Na\u00efve Stra\u00dfe, \u0130x; nai\u0308ve", "na\u00efve strasse ix"]
    0.0000 33.3333 20.0000 33.3333    23.1147 23.5294 12.5000 22.2222
["Wait....... what?", "Wait...... what?"]
    88.0112 100.0000 100.0000 100.0000   93.5133 88.8889 57.1429 88.8889
["Well?\n\nno", "Well? no"]
    0.0000 100.0000 100.0000 100.0000    51.3345 85.7143 33.3333 75.0000
["a a a a", "a b"]
    15.9736 33.3333 0.0000 33.3333    13.1345 66.6667 0.0000 33.3333
["the cat\u2028sat\u0085on\u3000the\tmat\r\n", "the cat sat on the mat"]
    100.0000 100.0000 100.0000 100.0000  41.3948 100.0000 100.0000 100.0000
["\ud83d\udc4d e\u0301 \ud83d\udc69\u200d\ud83d\udc67 yes", "\ud83d\udc4d \u00e9 yes"]
    18.9959 66.6667 0.0000 66.6667    25.2119 40.0000 0.0000 40.0000
["привет мир 3", "привет, мир 3"]
    0.0000 100.0000 0.0000 100.0000   76.7733 94.1176 84.2105 95.2381
["C++ and AT&T's C# v1.2.3 x_y", "c++ and AT&T C# v1.2.4"]
    33.2602 73.6842 58.8235 73.6842   63.6471 52.6316 35.2941 52.6316
["print('a')\n  [x]{`~^|\\}", "print('a'); print('b')"]
    17.7784 57.1429 40.0000 57.1429   40.1889 45.4545 41.6667 41.3793
["It is hard.", "It is hard."]
    100.0000 100.0000 100.0000 100.0000  100.0000 100.0000 100.0000 100.0000
["abc", "xyz"]
    0 0 0 0   0 0 0 0
["", "abc"]
    0 0 0 0   0 0 0 0
["abc", ""]
    0 0 0 0   0 0 0 0
[" ", " "]
    0 0 0 0   35.3553 0 0 0
["\n\u3000", "a b"]
    0 0 0 0   0 0 0 0
["short", "a much longer one, of nine tokens"]
    0 0 0 0   0.0591 0 0 0
["the runners ran", "the runner runs"]
    0.0000 33.3333 0.0000 33.3333     69.9428 33.3333 0.0000 33.3333
"""
# The mean over the 19 rows with eight scores, but BLEU-4 of the corpus.
GOLDEN_MEAN = """41.010437068488194 48.320103664734596 31.166150670794632 48.320103664734596
    36.96593157894737 44.216357894736845 26.821157894736842 40.55201052631579"""
# The same of the first 800 characters of 25 published answers to Arena-Hard.
GOLDEN_REAL = """18.97064209842107 42.30511477926364 19.066459777786754 28.719269663717768
    47.758284 47.350672 21.696268 30.139252"""


def numbers(text: str) -> list[float]:
    return [float(word) for word in text.split()]


def golden(text: str) -> list[tuple[list[str], list[float]]]:
    lines = text.strip().splitlines()
    return list(zip(map(json.loads, lines[::2]), map(numbers, lines[1::2]), strict=True))


@pytest.mark.parametrize(("row", "wanted"), golden(GOLDEN))
def test_both_families_give_the_golden_numbers_of_texts_with_special_characters(row, wanted):
    assert scores(row, of=NAMES_LF) == pytest.approx(wanted[-4:], abs=1e-9)
    if len(wanted) == 8:
        assert scores(row) == pytest.approx(wanted, abs=5.1e-5)  # four decimals are written above


def test_rouge_is_a_mean_over_rows_and_bleu_of_the_corpus_but_in_the_lf_family_a_mean_too():
    rows, of_rows = zip(*(pair for pair in golden(GOLDEN) if len(pair[1]) == 8), strict=True)
    assert scores(*rows) == pytest.approx(numbers(GOLDEN_MEAN), abs=1e-9)
    for i, found in enumerate(numbers(GOLDEN_MEAN)):
        mean = sum(of_row[i] for of_row in of_rows) / len(rows)
        assert (found == pytest.approx(mean, abs=1e-4)) == (i != 0)


@needs_real
def test_both_families_give_the_golden_numbers_of_answers_of_real_models():
    sides = []
    for name in ("Llama-3-Instruct-8B", "gpt-4-0314"):
        lines = (REAL / f"arena_hard/model_answer/{name}.jsonl").read_text().splitlines()
        answers = {answer["question_id"]: answer for answer in map(json.loads, lines)}
        sides.append({key: a["choices"][0]["turns"][0]["content"] for key, a in answers.items()})
    keys = sorted(sides[0].keys() & sides[1].keys())[:25]
    rows = [(sides[0][key][:800], sides[1][key][:800]) for key in keys]
    assert scores(*rows) == pytest.approx(numbers(GOLDEN_REAL), abs=1e-9)


# ------------------------------------------------------------------------------- worked by hand


CHINESE = ("我们今天去北京大学", "我们今天去清华大学")
# Words: 我们 今天 去 北京大学 and 我们 今天 去 清华大学. Three of four are equal, and two of
# three pairs. Characters: 7 of 9, 5 of 8, 3 of 7, 2 of 6. Conventional ROUGE sees none of them.
CHINESE_LF = [100 * (7 / 9 * 5 / 8 * 3 / 7 * 2 / 6) ** 0.25, 75, 200 / 3, 75]
BY_HAND = [  # prediction and reference; names; scores
    # Matches 4 3 2 1 of 8 7 6 5.
    (("a b c d a b c d", "a b c d"), ["bleu4"], [100 * (4 / 8 * 3 / 7 * 2 / 6 * 1 / 5) ** 0.25]),
    # 4/8 and 4/4; 3/7 and 3/3; LCS 4.
    (("a b c d a b c d", "a b c d"), NAMES[1:], [200 / 3, 60, 200 / 3]),
    # Counts 4 and 1 + 1: one match, P = 1/4, R = 1/2. Sets {a} and {a, b}: P = 1, R = 1/2.
    (("a a a a", "a b"), ["rouge1", "rouge1_lf"], [100 / 3, 200 / 3]),
    # White space counts. One match: precisions 1, 1/2, 1/4, 1/8.
    ((" ", " "), ["bleu4_lf"], [100 * 2**-1.5]),
    (CHINESE, NAMES[1:] + NAMES_LF, [0, 0, 0, *CHINESE_LF]),
]


@pytest.mark.parametrize(("row", "names", "wanted"), BY_HAND)
def test_scores_are_those_worked_by_hand(row, names, wanted):
    assert scores(row, of=names) == pytest.approx(wanted, abs=1e-4)


def test_the_longest_common_subsequence_is_as_long_as_the_packages_tables_say():
    from rouge_chinese.rouge_score import _lcs

    draws = random.Random(0)
    for _ in range(200):
        a, b = (draws.choices("abcd", k=draws.randrange(90)) for _ in range(2))
        assert scoring.lcs_length(a, b) == _lcs(a, b)[len(a), len(b)]


# ---------------------------------------------------------------------------------- the command


def write_rows(path, *rows):
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def row(prediction, reference, **more):
    return {"prediction": prediction, "reference": reference} | more


def score(capsys, *flags, code=0):
    """Runs the command in this process; returns what it prints on both outputs."""
    assert main(["score", *map(str, flags)]) == code
    return capsys.readouterr()


def complaint(capsys, *flags):
    """The one line on stderr of a command that must fail with code 2."""
    said = score(capsys, *flags, code=2)
    assert said.out == "" and said.err.count("\n") == 1 and said.err.startswith("eval.py: ")
    return said.err


def run_score(file, stdout=subprocess.PIPE, **environment):
    command = [sys.executable, ROOT / "eval.py", "score", "--predictions", file]
    environment = os.environ | {name: str(value) for name, value in environment.items()}
    return subprocess.run(
        command, stdout=stdout, stderr=subprocess.PIPE, text=True, env=environment
    )


def test_the_command_prints_and_writes_both_families_the_count_and_the_lengths(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    rows = [("The cat sat on the mat.", "The cat is on the mat."), ("👍 e\u0301\u2028, yes", "yes")]
    write_rows(tmp_path / "answers.jsonl", *(row(*texts) for texts in rows))
    printed = score(capsys, "--predictions", "answers.jsonl").out
    assert [path.name for path in tmp_path.iterdir()] == ["answers.jsonl"]
    assert score(capsys, "--predictions", "answers.jsonl", "--json", "made/o.json").out == printed
    written = json.loads((tmp_path / "made/o.json").read_text())
    assert written == scoring.score_rows(rows)
    assert list(written) == [*NAMES, *NAMES_LF, "count", *LENGTHS]
    assert all(0 < written[key] <= 100 for key in NAMES + NAMES_LF)
    # 23 and 10 code points, 7 and 4 tokens (👍, é, the comma, yes); 22 and 3, 7 and 1
    assert list(written.values())[8:] == [2, 16.5, 5.5, 12.5, 4]
    title, head, *lines = printed.splitlines()
    assert title == "answers.jsonl: 2 rows" and "BLEU-4  ROUGE-1  ROUGE-2  ROUGE-L" in head
    values = [f"{written[name]:.2f}" for name in NAMES + NAMES_LF]
    first, second = ["5.5", "4.0", "tokens"], ["16.5", "12.5", "characters"]
    expected = [["conventional", *values[:4], *first], ["_lf", *values[4:], *second]]
    assert [line.split() for line in lines] == expected


def test_a_closed_or_full_standard_output_is_one_line(tmp_path):
    file = write_rows(tmp_path / "answers.jsonl", row("a", "a"))
    with open("/dev/full", "w") as full:
        done = run_score(file, stdout=full)
    assert done.returncode == 2
    assert done.stderr == "eval.py: standard output: No space left on device\n"


def test_jieba_is_silent_and_neither_reads_nor_leaves_a_dictionary_in_the_shared_directory(
    tmp_path,
):
    """A dictionary that another user left there, in which the whole sentence is one word."""
    cache = marshal.dumps(({word: 10**6 for word in CHINESE}, 10**7))
    (tmp_path / "tmp").mkdir()
    (tmp_path / "tmp/jieba.cache").write_bytes(cache)
    file = write_rows(tmp_path / "answers.jsonl", row(*CHINESE))
    done = run_score(file, TMPDIR=tmp_path / "tmp")
    assert (done.returncode, done.stderr) == (0, "")
    lf = next(line for line in done.stdout.splitlines() if line.startswith("_lf"))
    assert lf.split()[1:5] == [f"{value:.2f}" for value in CHINESE_LF]
    assert (tmp_path / "tmp/jieba.cache").read_bytes() == cache
    assert [path.name for path in (tmp_path / "tmp").iterdir()] == ["jieba.cache"]


MODULES = "sacrebleu rouge_score.rouge_scorer jieba nltk.translate.bleu_score rouge_chinese"
PACKAGES = {module.split(".")[0]: module for module in MODULES.split()}


@pytest.mark.parametrize("package", PACKAGES)
def test_a_missing_package_is_one_line_with_the_pip_command(tmp_path, capsys, monkeypatch, package):
    # A first import that fails would leave nltk half imported.
    importlib.import_module(PACKAGES[package])
    monkeypatch.setitem(sys.modules, PACKAGES[package], None)  # importing it fails then
    scoring.load_jieba.cache_clear()
    file = write_rows(tmp_path / "answers.jsonl", row("a", "a"))
    said = complaint(capsys, "--predictions", file)
    assert package in said and "pip install -r evaluation/requirements.txt" in said
    assert (ROOT / "evaluation/requirements.txt").exists()


def test_eval_py_starts_without_any_of_these_packages(tmp_path):
    for package in PACKAGES:
        (tmp_path / f"{package}.py").write_text(f"raise ModuleNotFoundError('{package}')\n")
    done = run_score(write_rows(tmp_path / "a.jsonl", row("a", "a")), PYTHONPATH=tmp_path)
    assert done.returncode == 2 and done.stdout in NOTHING_SAID and done.stderr.count("\n") == 1
    assert "pip install -r" in done.stderr


def test_rows_of_generate_blank_lines_and_a_byte_order_mark_are_read(tmp_path):
    prompt = [{"role": "user", "content": "Hi"}]
    more = {"index": 0, "question_id": None, "prompt": prompt, "tokens": 3}
    rows = row("a\u2028b", "c\x85", **more), row("", "", finish="overlong")
    file = write_rows(tmp_path / "answers.jsonl", *rows)
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n\r\n"))
    assert scoring.read_predictions(file) == ([("a\u2028b", "c\x85"), ("", "")], 1, 0)


def test_rows_that_generate_left_unanswered_count_as_empty_and_are_counted(tmp_path, capsys):
    for finish in ("overlong", "stop"):
        rows = row("a b", "a b", finish="stop"), row("", "a b", finish=finish)
        printed = score(capsys, "--predictions", write_rows(tmp_path / "a.jsonl", *rows)).out
        assert ("1 of the rows count as empty" in printed) == (finish == "overlong")
        assert " 50.00 " in printed


def test_empty_references_and_rows_that_are_there_twice_are_counted(tmp_path, capsys):
    rows = [row("a", "a", index=i) for i in (0, 1, 1, 1)] + [row("a", " "), row("a", "")]
    printed = score(capsys, "--predictions", write_rows(tmp_path / "a.jsonl", *rows)).out
    assert "\n2 of the rows score 0, because their references are empty\n" in printed
    assert "\n2 of the rows have the index of an earlier row" in printed


def test_rows_with_a_text_that_conventional_rouge_cannot_see_are_counted(tmp_path, capsys):
    """Without a-z and 0-9, as Russian, Arabic and Thai; a blank text needs no such line."""
    seen = row("x привет", "привет 3"), row("", "x"), row(" ", "\n"), row("İ", "X")
    unseen = row("иду", "иду"), row("x", "مرحبا"), row("สวัสดี", "x"), row("👍", ""), row("?", "!")
    printed = score(capsys, "--predictions", write_rows(tmp_path / "a.jsonl", *seen)).out
    assert "a-z or 0-9" not in printed
    printed = score(capsys, "--predictions", write_rows(tmp_path / "a.jsonl", *seen, *unseen)).out
    assert "\n5 of the rows have a text without any a-z or 0-9" in printed


BAD_ROWS = rb"""
{"prediction": "a"} -> reference is missing
{"reference": "a"} -> prediction is missing
[] -> wanted a JSON object
"text" -> wanted a JSON object
null -> wanted a JSON object
{"prediction": null, "reference": "a"} -> prediction is None
{"prediction": "a", "reference": ["b"]} -> reference is ['b']
{"prediction": "a", "reference": 1} -> is 1
{"prediction": "a -> not JSON
NUL -> not JSON
DEEP -> nested too deeply
BYTE -> not UTF-8"""
BYTES = {b"NUL": b"x\0", b"DEEP": b"[" * 100_000, b"BYTE": b'{"prediction": "\xff"}'}


@pytest.mark.parametrize("bad", BAD_ROWS.splitlines()[1:])
def test_a_line_that_is_not_such_a_row_is_named_by_file_and_line(tmp_path, capsys, bad):
    file, (bad, said) = tmp_path / "answers.jsonl", bad.split(b" -> ")
    file.write_bytes(b'{"prediction": "a", "reference": "b"}\n\n' + BYTES.get(bad, bad) + b"\n")
    error = complaint(capsys, "--predictions", file, "--json", tmp_path / "out.json")
    assert f"{file}:3: " in error and said.decode() in error and len(error) < 300 + len(str(file))
    assert not (tmp_path / "out.json").exists()


def test_a_missing_file_a_folder_and_an_empty_file_are_refused(tmp_path, capsys):
    assert "nowhere: No such file" in complaint(capsys, "--predictions", tmp_path / "nowhere")
    assert f"{tmp_path}: " in complaint(capsys, "--predictions", tmp_path)
    for nothing in ("", "\n \n"):
        (tmp_path / "empty").write_text(nothing)
        assert "no row in it" in complaint(capsys, "--predictions", tmp_path / "empty")
    assert "--predictions" in complaint(capsys)


def test_if_json_cannot_be_written_the_table_is_printed_and_the_predictions_stay(tmp_path, capsys):
    file = write_rows(tmp_path / "answers.jsonl", row("a", "a"))
    before = file.read_text()
    for out, said in (
        (tmp_path, "Is a directory"),
        (file / "out.json", "File exists"),
        (file, "is a file that was"),
        ("/dev/full", "No space left"),
    ):
        printed = score(capsys, "--predictions", file, "--json", out, code=2)
        assert "conventional" in printed.out
        assert f"--json {out}" in printed.err and said in printed.err
    assert file.read_text() == before
