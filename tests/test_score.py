"""eval.py score: the golden table, the libraries that define each family, the command, and what it says of faults."""

import json
import random
import re
import statistics
import subprocess
import sys
import time

import pytest
from conftest import REAL, ROOT, needs_real

import eval as evaluation

NAMES = ("bleu4", "rouge1", "rouge2", "rougeL")
# What texts are made of below: Latin, numbers, what each tokenizer treats specially, other scripts, emoji of several
# code points, combining marks, control characters and every kind of white space.
LATIN = [
    "the",
    "The",
    "cat",
    "cat",
    "sat",
    "on",
    "mat",
    "don't",
    "naïve",
    "nai\u0308ve",
    "Straße",
    "İx",
    "x_y",
]
SPECIAL = [
    "co-op",
    "3.50",
    "1,000.5",
    "20%",
    "v1.2.3",
    "2-1",
    "...",
    "......",
    ".......",
    "." * 13,
    "......+",
    "。",
    "！",
    "？",
    "?",
    "??",
    "!",
    ",",
    ".",
    "”",
    "’",
    "“",
    "…",
    "……",
    '"',
    "'",
    "-",
    "--",
    "/",
    "&",
    "&amp;lt;",
    "&quot;",
    "<skipped>",
    "-\n",
    "C++",
    "c++",
    "C#",
    "c#",
    "AT&T",
    "ABC++11",
    "cc#_",
    "$5",
    "a@b.c",
    "[x]",
    "{`~^|\\}",
    "国",
]
OTHER = [
    "こんにちは",
    "カタカナ",
    "한국어",
    "привет",
    "مرحبا",
    "👍",
    "👩\u200d👧",
    "🇩🇪",
    "é",
    "e\u0301",
    "ﬁ",
    "٣",
    "½",
]
CONTROL = [
    "\x00",
    "\x07",
    "\x1b[0m",
    "\x1c",
    "\x7f",
    "\x85",
    "\xa0",
    "\u200b",
    "\u2028",
    "\u3000",
    "\ufeff",
    "\t",
    "\r\n",
    "\n",
    "\n\n",
    " \n ",
    "\r",
    "\v",
]
CHINESE = ["你好世界", "我们今天去北京大学", "价格3.5元", "中国", "C语言", "T恤很好"]
TWO_CHINESE = re.compile("[\u4e00-\u9fd5]{2}")  # in a row: what jieba's dictionary may divide


def generated_rows(count: int = 1000) -> list[tuple[str, str]]:
    """Predictions of 0 to 40 pieces, and references made of them by dropping, repeating, replacing and moving pieces; a
    quarter with Chinese, the rest without."""
    rng = random.Random(20240917)
    rows = []
    for i in range(count):
        pieces = LATIN * 4 + SPECIAL * 2 + OTHER + CONTROL + CHINESE * 4 * (i % 4 == 0)
        glue = rng.choice([" ", " ", "", "\n"])
        prediction = [rng.choice(pieces) for _ in range(rng.choice([0, 1, 2, 3, 5, 8, 15, 25, 40]))]
        reference = []
        for piece in prediction:
            kind = rng.random()
            reference += [piece] * (1 if kind < 0.7 else 2 if kind < 0.8 else 0)
            reference += [rng.choice(pieces)] * (kind > 0.9)
        if rng.random() < 0.2:
            at = rng.randrange(len(reference) + 1)
            reference = reference[at:] + reference[:at]
        rows.append((glue.join(prediction), glue.join(reference) if rng.random() < 0.95 else ""))
    return rows


ROWS = generated_rows()


def jieba_words(text: str) -> list[str]:
    import jieba

    jieba.setLogLevel(60)
    return list(jieba.cut(text))


def lf_by_libraries(prediction: str, reference: str, words) -> list[float]:
    """BLEU-4 and ROUGE-1, -2, -L of one row as LLaMA-Factory 0.9.5 asks nltk and rouge_chinese for them, with the words
    of `words`; 0 to 100, not rounded."""
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
    from rouge_chinese import Rouge

    bleu = sentence_bleu(
        [list(reference)], list(prediction), smoothing_function=SmoothingFunction().method3
    )
    a, b = " ".join(words(prediction)), " ".join(words(reference))
    rouge = [0.0] * 3
    if a.split() and b.split():
        by_name = Rouge().get_scores(a, b)[0]
        rouge = [by_name[name]["f"] for name in ("rouge-1", "rouge-2", "rouge-l")]
    return [100 * value for value in (bleu, *rouge)]


def row_lf(prediction: str, reference: str) -> list[float]:
    return [evaluation.bleu4_lf(prediction, reference), *evaluation.rouge_lf(prediction, reference)]


def of_all(rows, suffix=""):
    scores = evaluation.score_rows(rows)
    return [scores[name + suffix] for name in NAMES]


# ------------------------------------------------------------------------------------------------- LLaMA-Factory's


@pytest.mark.parametrize(
    ("prediction", "reference", "golden"),
    [
        (
            "The cat sat on the mat.",
            "The cat is on the mat.",
            (0.7944837206, 0.8571428521, 0.6666666617, 0.8571428521),
        ),
        (
            "Hello, world!\n\nIt costs $3.50 - 20% off.",
            "Hello world! It costs 3.50 dollars, 20% off.",
            (0.6426161291, 0.8333333284, 0.3636363587, 0.7499999950),
        ),
        ("a b", "a b c d e f", (0.0584283851, 0.4999999963, 0.3333333306, 0.4999999963)),
        ("xyz", "abc", (0, 0, 0, 0)),
    ],
)
def test_the_lf_family_gives_the_golden_table(prediction, reference, golden):
    assert row_lf(prediction, reference) == pytest.approx(
        [100 * value for value in golden], abs=1e-8
    )


def test_without_two_chinese_characters_in_a_row_the_words_are_jiebas():
    texts = [text for row in ROWS for text in row if not TWO_CHINESE.search(text)]
    assert len(texts) > 1500 and sum("国" in text for text in texts) > 100
    rng = random.Random(1)
    texts += ["".join(rng.choices("aAbcC019+#&T._%-%-' \n国.", k=20)) for _ in range(2000)]
    texts = [re.sub(r"国(?=国)", "国 ", text) for text in texts]
    for text in texts:
        # jieba has \r\n as one token; joined by spaces and split into lines, as it is next, it is the same as two
        wanted = [
            part
            for word in jieba_words(text)
            for part in (list(word) if word == "\r\n" else [word])
        ]
        assert evaluation.words_lf(text) == wanted, ascii(text)


def test_the_lf_family_is_that_of_nltk_jieba_and_rouge_chinese_on_generated_texts():
    """Exact. Restricted so: rows in which two Chinese characters meet are given to rouge_chinese with our words, as
    jieba divides them by its dictionary; all others with jieba's. nltk sees every row as it is."""
    ours = 0
    for prediction, reference in ROWS:
        chinese = TWO_CHINESE.search(prediction) or TWO_CHINESE.search(reference)
        ours += bool(chinese)
        wanted = lf_by_libraries(
            prediction, reference, evaluation.words_lf if chinese else jieba_words
        )
        assert row_lf(prediction, reference) == pytest.approx(wanted, abs=1e-9), ascii(
            (prediction, reference)
        )
    assert 100 < ours < 300


def test_the_lf_family_is_the_mean_over_rows_of_values_rounded_to_four_decimals():
    rows = [row for row in ROWS if not TWO_CHINESE.search("".join(row))][:60]
    wanted = [[round(value, 4) for value in lf_by_libraries(*row, jieba_words)] for row in rows]
    means = [statistics.fmean(column) for column in zip(*wanted, strict=True)]
    assert of_all(rows, "_lf") == pytest.approx(means, abs=1e-9)


def test_where_a_side_is_empty_or_white_lf_rouge_is_0_and_lf_bleu_counts_white_space():
    for blank in ("", " ", "\n\n", "\t\u3000"):
        assert evaluation.rouge_lf(blank, "a b") == evaluation.rouge_lf("a b", blank) == [0, 0, 0]
        assert evaluation.rouge_lf(blank, blank) == [0, 0, 0]
    assert (
        evaluation.bleu4_lf("", "")
        == evaluation.bleu4_lf("a", "")
        == evaluation.bleu4_lf("", "a")
        == 0
    )
    # one character, one match: precisions 1, 1/2, 1/4, 1/8
    assert evaluation.bleu4_lf(" ", " ") == pytest.approx(100 * 2**-1.5, abs=1e-12)


def test_a_blank_sentence_is_one_empty_token_and_a_long_run_of_dots_is_cut_after_six():
    assert evaluation.tokens_lf("Well?\n\nno") == ["Well", "?", "", "", "no"]
    assert evaluation.tokens_lf("a\n\n") == ["a"]
    assert evaluation.tokens_lf("." * 13) == ["......", "......."]


def test_lf_counts_each_ngram_once_and_the_conventional_family_as_often_as_both_have_it():
    # Sets {a} and {a, b}: P = 1, R = 1/2. Counts 4 and 1 + 1: one match, P = 1/4, R = 1/2.
    assert evaluation.rouge_lf("a a a a", "a b")[0] == pytest.approx(100 * 2 / 3, abs=1e-5)
    assert evaluation.rouge("a a a a", "a b")[0] == pytest.approx(100 / 3)


# ---------------------------------------------------------------------------------------------------- conventional


def test_conventional_bleu_is_sacrebleus_of_the_corpus_and_of_each_row():
    from sacrebleu import corpus_bleu

    for rows in (ROWS, ROWS[:10], *([row] for row in ROWS)):
        predictions, references = map(list, zip(*rows, strict=True))
        wanted = corpus_bleu(predictions, [references], force=True).score
        assert evaluation.score_rows(rows)["bleu4"] == pytest.approx(wanted, abs=1e-9), ascii(
            rows[0]
        )


def test_conventional_rouge_is_rouge_scores_f1_without_stemmer_and_its_mean():
    from rouge_score.rouge_scorer import RougeScorer

    scorer, wanted = RougeScorer(NAMES[1:], use_stemmer=False), []
    for prediction, reference in ROWS:
        by_name = scorer.score(reference, prediction)
        wanted.append([100 * by_name[name].fmeasure for name in NAMES[1:]])
        assert evaluation.rouge(prediction, reference) == pytest.approx(wanted[-1], abs=1e-9)
    means = [statistics.fmean(column) for column in zip(*wanted, strict=True)]
    assert of_all(ROWS)[1:] == pytest.approx(means, abs=1e-9)


def test_the_tokens_of_13a_are_sacrebleus():
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    rng, tokenize = random.Random(2), Tokenizer13a()
    texts = [text for row in ROWS for text in row]
    texts += [
        "".join(rng.choices([chr(i) for i in range(32, 127)] + list(",.-,.-0\n&"), k=30))
        for _ in range(500)
    ]
    for text in texts:
        assert evaluation.tokens_13a(text) == tokenize(text.rstrip()).split(), ascii(text)


def test_an_answer_repeated_twice_scores_as_worked_by_hand():
    """Prediction a b c d a b c d, reference a b c d: matches 4 3 2 1 of 8 7 6 5."""
    scores = evaluation.score_rows([("a b c d a b c d", "a b c d")])
    assert scores["bleu4"] == pytest.approx(100 * (4 / 8 * 3 / 7 * 2 / 6 * 1 / 5) ** 0.25)
    assert [scores[name] for name in NAMES[1:]] == pytest.approx(
        [200 / 3, 60, 200 / 3]
    )  # 4/8, 4/4; 3/7, 3/3; LCS 4


# ------------------------------------------------------------------------------------------------------- both, LCS


def test_equal_texts_score_100_in_both_families_and_texts_without_a_common_character_0():
    same = [("The quick brown fox jumps.", "The quick brown fox jumps.")] * 3
    assert of_all(same) == pytest.approx([100] * 4)
    assert of_all(same, "_lf") == pytest.approx([100] * 4, abs=1e-4)  # 1e-8 in its denominator
    assert of_all([("abc", "xyz")]) + of_all([("abc", "xyz")], "_lf") == [0] * 8


def test_the_longest_common_subsequence_of_2000_by_2000_tokens_is_right_and_takes_no_time():
    tokens = [str(i) for i in range(2000)]
    rng = random.Random(3)
    noisy = [
        token for token in tokens for token in ([token] if rng.random() < 0.5 else [token, "noise"])
    ][:2000]
    kept = sum(token != "noise" for token in noisy)
    start = time.perf_counter()
    assert evaluation.lcs_length(tokens, noisy) == evaluation.lcs_length(noisy, tokens) == kept
    assert evaluation.lcs_length(tokens, tokens[500:] + tokens[:500]) == 1500
    assert evaluation.lcs_length(tokens, tokens[::-1]) == 1
    assert (time.perf_counter() - start) / 4 < 0.25
    assert evaluation.lcs_length([], tokens) == evaluation.lcs_length(tokens, []) == 0


def test_the_longest_common_subsequence_is_the_tables_on_small_alphabets():
    rng = random.Random(4)
    for _ in range(300):
        a, b = ("".join(rng.choices("abc", k=rng.randrange(12))) for _ in range(2))
        table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
        for i, x in enumerate(a):
            for j, y in enumerate(b):
                table[i + 1][j + 1] = (
                    table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
                )
        assert evaluation.lcs_length(a, b) == table[-1][-1], (a, b)


@needs_real
def test_both_families_are_the_libraries_on_answers_of_real_models():
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu import corpus_bleu

    sides = []
    for name in ("Llama-3-Instruct-8B", "gpt-4-0314"):
        answers = map(
            json.loads, (REAL / f"arena_hard/model_answer/{name}.jsonl").read_text().splitlines()
        )
        sides.append(
            {row["question_id"]: row["choices"][0]["turns"][0]["content"][:800] for row in answers}
        )
    rows = [
        (sides[0][key], sides[1][key]) for key in sorted(sides[0].keys() & sides[1].keys())[:25]
    ]
    rows = [row for row in rows if not TWO_CHINESE.search("".join(row))]
    assert len(rows) > 20
    for row in rows:
        assert row_lf(*row) == pytest.approx(lf_by_libraries(*row, jieba_words), abs=1e-9)
        by_name = RougeScorer(NAMES[1:]).score(row[1], row[0])
        assert evaluation.rouge(*row) == pytest.approx(
            [100 * by_name[name].fmeasure for name in NAMES[1:]], abs=1e-9
        )
    predictions, references = map(list, zip(*rows, strict=True))
    assert of_all(rows)[0] == pytest.approx(
        corpus_bleu(predictions, [references], force=True).score, abs=1e-9
    )


# ------------------------------------------------------------------------------------------------------- the command


def write_rows(path, *rows):
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def row(prediction, reference, **more):
    return {"prediction": prediction, "reference": reference} | more


def complaint(capsys, *flags):
    """The one line on stderr of a command that must fail with code 2."""
    assert evaluation.main(["score", *map(str, flags)]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and said.err.startswith("eval.py: ")
    return said.err


def test_the_command_writes_both_families_the_count_and_the_lengths(tmp_path, capsys):
    rows = [("The cat sat on the mat.", "The cat is on the mat."), ("👍 e\u0301\u2028, yes", "yes")]
    file = write_rows(tmp_path / "answers.jsonl", *(row(*texts) for texts in rows))
    assert (
        evaluation.main(["score", "--predictions", str(file), "--json", str(tmp_path / "out.json")])
        == 0
    )
    written = json.loads((tmp_path / "out.json").read_text())
    assert written == evaluation.score_rows(rows)
    assert list(written) == [
        *NAMES,
        *(f"{name}_lf" for name in NAMES),
        "count",
        "mean_prediction_characters",
        "mean_prediction_tokens",
        "mean_reference_characters",
        "mean_reference_tokens",
    ]
    assert all(0 < written[key] <= 100 for key in list(written)[:8])
    # 23 and 10 code points, 7 and 4 tokens (👍, é, the comma, yes); 22 and 3, 7 and 1
    assert list(written.values())[8:] == [2, 16.5, 5.5, 12.5, 4]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[0] == f"{file}: 2 rows"
    for line, suffix, lengths in (
        (2, "", ["5.5", "4.0", "tokens"]),
        (3, "_lf", ["16.5", "12.5", "characters"]),
    ):
        name, *cells = lines[line].split()
        assert name == (suffix or "conventional") and cells[4:] == lengths
        assert cells[:4] == [f"{written[name + suffix]:.2f}" for name in NAMES]


def test_without_json_it_only_prints(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "answers.jsonl", row("a", "a"))
    assert evaluation.main(["score", "--predictions", "answers.jsonl"]) == 0
    assert "conventional" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["answers.jsonl"]


def test_a_closed_or_full_standard_output_is_one_line(tmp_path):
    file = write_rows(tmp_path / "answers.jsonl", row("a", "a"))
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, ROOT / "eval.py", "score", "--predictions", file],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert (done.returncode, done.stderr) == (
        2,
        "eval.py: standard output: No space left on device\n",
    )


def test_rows_of_generate_blank_lines_and_a_byte_order_mark_are_read(tmp_path):
    more = {
        "index": 0,
        "question_id": None,
        "prompt": [{"role": "user", "content": "Hi"}],
        "tokens": 3,
    }
    file = write_rows(
        tmp_path / "answers.jsonl", row("a\u2028b", "c\x85", **more), row("", "", finish="overlong")
    )
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n\r\n"))
    assert evaluation.read_predictions(file) == ([("a\u2028b", "c\x85"), ("", "")], 1)


def test_rows_that_generate_left_unanswered_are_counted_as_empty_and_said_to_be(tmp_path, capsys):
    for finish, said in (("overlong", True), ("stop", False)):
        file = write_rows(
            tmp_path / "answers.jsonl",
            row("a b", "a b", finish="stop"),
            row("", "a b", finish=finish),
        )
        assert evaluation.main(["score", "--predictions", str(file)]) == 0
        printed = capsys.readouterr().out
        assert ("1 of the rows were left unanswered" in printed) == said and " 50.00 " in printed


def test_chinese_is_said_to_be_divided_otherwise_than_by_jieba(tmp_path, capsys):
    file = write_rows(
        tmp_path / "answers.jsonl", row("今天很好", "x"), row("国", "国 "), row("x", "中文")
    )
    assert evaluation.main(["score", "--predictions", str(file)]) == 0
    assert "2 of the rows hold Chinese" in capsys.readouterr().out
    file = write_rows(tmp_path / "answers.jsonl", row("国", "x こんにちは"))
    assert evaluation.main(["score", "--predictions", str(file)]) == 0
    assert "Chinese" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ('{"prediction": "a"}', "reference is missing"),
        ('{"reference": "a"}', "prediction is missing"),
        ("[]", "wanted a JSON object"),
        ('"text"', "wanted a JSON object"),
        ("null", "wanted a JSON object"),
        ('{"prediction": null, "reference": "a"}', "prediction is None"),
        ('{"prediction": "a", "reference": ["b"]}', "reference is ['b']"),
        ('{"prediction": "a", "reference": 1}', "is 1"),
        ('{"prediction": "a', "not JSON"),
        ("x\0", "not JSON"),
        ("[" * 100_000, "nested too deeply"),
        (b'{"prediction": "\xff", "reference": "a"}', "not UTF-8"),
    ],
)
def test_a_line_that_is_not_such_a_row_is_named_by_file_and_line(tmp_path, capsys, bad, said):
    file = tmp_path / "answers.jsonl"
    bad = bad if isinstance(bad, bytes) else bad.encode()
    file.write_bytes(b'{"prediction": "a", "reference": "b"}\n\n' + bad + b"\n")
    error = complaint(capsys, "--predictions", file, "--json", tmp_path / "out.json")
    assert f"{file}:3: " in error and said in error and len(error) < 300 + len(str(file))
    assert not (tmp_path / "out.json").exists()


def test_a_missing_file_a_folder_and_an_empty_file_are_refused(tmp_path, capsys):
    assert "nowhere: No such file" in complaint(capsys, "--predictions", tmp_path / "nowhere")
    assert f"{tmp_path}: " in complaint(capsys, "--predictions", tmp_path)
    for nothing in ("", "\n \n"):
        (tmp_path / "empty").write_text(nothing)
        assert "no row in it" in complaint(capsys, "--predictions", tmp_path / "empty")
    assert "--predictions" in complaint(capsys)


def test_an_out_that_cannot_be_written_leaves_the_printed_table_and_the_predictions_are_never_overwritten(
    tmp_path, capsys
):
    file = write_rows(tmp_path / "answers.jsonl", row("a", "a"))
    before = file.read_text()
    for out, said in (
        (tmp_path, "Is a directory"),
        (file / "out.json", "File exists"),
        (file, "is a file that was"),
        ("/dev/full", "No space left"),
    ):
        assert evaluation.main(["score", "--predictions", str(file), "--json", str(out)]) == 2
        printed = capsys.readouterr()
        assert (
            "conventional" in printed.out and f"--json {out}" in printed.err and said in printed.err
        )
    assert file.read_text() == before
    assert (
        evaluation.main(
            ["score", "--predictions", str(file), "--json", str(tmp_path / "made/out.json")]
        )
        == 0
    )
    assert json.loads((tmp_path / "made/out.json").read_text())["bleu4"] >= 0
