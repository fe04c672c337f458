"""train.py on the CPU: flags, schedule, the update against an oracle, processes, logs, faults."""

import dataclasses
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    LENGTHS,
    ON_CPU,
    ROOT,
    before_export,
    complaint_of_two,
    edit_json,
    flags,
    main,
    random_pairs,
    read_json,
    refusal,
    rows,
    run_joined,
    save_tiny,
    tiny_model,
    trained,
    words,
    write_pairs,
)
from safetensors import safe_open
from safetensors.torch import save_file
from torch._inductor.exc import InductorError, InvalidCxxCompiler

import asft
import data
import train
from data import ChatFormat, plan_step
from model import LlamaConfig, load_model, load_weights
from support import files, processes, reference
from support.export import save_model
from support.flags import parse, spell
from support.held_out import answer
from support.tensors import local_rows

PAIRS = random_pairs(LENGTHS)
SIZES = np.array([pair.packed_tokens(True) for pair in PAIRS])


def parsed(*parts) -> train.Config:
    return parse(train.Config, words(*parts), train.EXAMPLE, train.__doc__)


def drawn(step: int, pairs_per_step: int = 4) -> list[int]:
    """The pairs of a step, as one process draws them."""
    return sum(plan_step(SIZES, pairs_per_step, 0, step, 1, 10**6)[0], [])


def oracle_logps(model, pair):
    """Log-probs of chosen and rejected, by two plain sequences: their means, and their sums."""
    result = []
    for response in (pair.chosen, pair.rejected):
        tokens_T = torch.tensor(np.concatenate([pair.prompt, response]))
        logp_TV = torch.log_softmax(model.logits(tokens_T)[:-1], -1)
        result.append(logp_TV.gather(1, tokens_T[1:, None])[len(pair.prompt) - 1 :, 0])
    return [x.mean() for x in result], [x.sum() for x in result]


def assert_close(ours: list[dict], theirs: list[dict], names: str, rel=1e-5, absolute=1e-5):
    """Rows of two logs have equal values under these names."""
    for a, b in zip(ours, theirs, strict=True):
        for name in names.split():
            assert a[name] == pytest.approx(b[name], rel=rel, abs=absolute), name


# ------------------------------------------------------------------------------- configuration


def test_the_defaults_are_the_papers_settings():
    config = parsed("--model m --data d")
    paper = dict(loss="asft", beta=0.1, sft_weight=1.0, temperature=1.0, lr=1e-5, epochs=2)
    paper |= dict(warmup_ratio=0.1, pairs_per_step=32, weight_decay=0, adam_beta1=0.9)
    paper |= dict(adam_beta2=0.999, max_grad_norm=1)
    assert {name: getattr(config, name) for name in paper} == paper
    parsed("--model m --data d --eps", torch.finfo(torch.float32).smallest_normal)


def test_flags_help_header_and_config_json_show_every_field(start, tmp_path, capsys):
    trained(start, tmp_path / "out", "--max-steps 1")
    printed = capsys.readouterr().out
    with pytest.raises(SystemExit):
        main("--help")
    helped = capsys.readouterr().out
    assert "OPEN: the paper does not say" in helped and "In reading order" not in helped
    saved = read_json(tmp_path / "out/config.json")
    texts = {text.split()[0].rstrip(","): text.rstrip() for text in helped.split("\n  --")[1:]}
    for field in dataclasses.fields(train.Config):
        text = texts[spell(field.name).removeprefix("--")]
        assert field.metadata["help"]
        if type(field.default) in (int, float):
            assert text.endswith(f"[{field.default}]")
        assert field.name in saved["flags"]
    assert f"lr {saved['flags']['lr']}" in printed and str(tmp_path / "out") in printed
    assert saved["versions"]["torch"] == torch.__version__ and saved["data"]["kept"] == 10
    # The printed flags are a command line that gives the same run.
    text = re.sub(r"\n +", " ", printed.split("flags ")[1].split("\n  memory ")[0])
    assert dataclasses.asdict(parsed(text)) == saved["flags"]
    assert list(texts)[:3] == ["model", "data", "eval-data"] and text.split()[0] == "--model"


def test_settings_that_the_paper_leaves_open_are_marked_so():
    marked = {f.name for f in dataclasses.fields(train.Config) if "OPEN" in f.metadata["help"]}
    open_ones = words("warmup_ratio pairs_per_step weight_decay max_grad_norm precision eps")
    assert set(open_ones) <= marked


MISTAKES = """
--modle x | --modle
--lr fast | fast
--lr 0 | --lr is 0.0
--lr inf | --lr is inf
--lr nan | --lr is nan
--beta -1 | --beta is -1.0
--warmup-ratio 1.5 | --warmup-ratio is 1.5
--adam-beta2 1 | --adam-beta2 is 1.0
--loss kto | kto
--loss ipo --beta 0 | --beta is 0.0
--loss dpo-norm --beta 0 | --beta is 0.0
--beta 0 --sft-weight 0 | wanted more for --loss asft --sft-weight 0: it would be constant
--loss dpo --temperature 2 | --temperature is not an option of --loss dpo, which takes --beta
--loss sft --beta 2 | --beta is not an option of --loss sft, which takes none
--reference live | --reference is not an option of --loss asft
--loss dpo --reference live --reference-cache f | --reference-cache
--loss dpo --reference-cache /absent/cache | /absent is not a directory that can be written
--ipo-sum | --ipo-sum goes with --loss ipo
--plan 2 --precision fp32 | --plan simulates neither
--eval-data PAIRS --samples 2 | --samples needs text
--eval-every 5 | --eval-every, --eval-by and --samples need --eval-data
--eval-by source | --eval-every, --eval-by and --samples need --eval-data
--keep-best loss | --keep-best needs --eval-data and --eval-every
--eval-data PAIRS --keep-best loss | --keep-best needs --eval-data and --eval-every
--eval-data PAIRS --eval-every 2 --keep-best bleu | invalid choice: 'bleu'
--eval-data PAIRS --eval-by sauce | --eval-by sauce: no row of
--eval-data ONES --eval-every 2 --keep-best accuracy | no pair, and --keep-best accuracy compares
--max-tokens 300 | --max-tokens 300 is above the model's max_position_embeddings 256
--max-tokens 1 | no pair left to use
--max-tokens-per-gpu 20 | pairs.jsonl:9: a pair of 26 packed tokens exceeds --max-tokens-per-gpu
--replicas 2 | --replicas 2 does not divide 1 processes
--data absent.jsonl | absent.jsonl: No such file
--model absent | absent: no such directory; wanted a Hugging Face model directory (from the Hub: hf
--checkpoint-blocks 3 | --checkpoint-blocks is 3, but the model has 2 blocks
--checkpoint-blocks -1 | wanted auto, on, off or a number of blocks
--checkpoint-blocks some | wanted auto, on, off or a number of blocks
--gpu-memory 80 | --gpu-memory goes with --plan
--plan 1 --gpu-memory 0 | --gpu-memory is 0.0, wanted a number above 0
--peak-tflops nan | --peak-tflops is nan, wanted a number above 0
--eps 1e-38 | --eps is 1e-38, wanted 1.2e-38 or more
--adam-eps 1e-38 | --adam-eps is 1e-38, wanted 1.2e-38 or more
--device cuda | --device cuda
"""


@pytest.mark.parametrize("mistake", MISTAKES.strip().splitlines())
def test_a_users_mistake_is_one_line_and_exit_code_2(start, tmp_path, complaint, mistake):
    given, said = mistake.split(" | ")
    if given.strip() == "--device cuda" and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    ones = tmp_path / "ones.jsonl"
    ones.write_text('{"prompt_ids": [1], "response_ids": [2], "label": true}\n')
    given = given.replace("PAIRS", str(start / "pairs.jsonl")).replace("ONES", str(ones))
    assert said in complaint(*flags(start, tmp_path / "out", given))
    assert not (tmp_path / "out").exists()


ENVIRONMENTS = [
    ("RANK=0", "WORLD_SIZE is missing in the environment, wanted a whole number: torchrun sets"),
    ("RANK=0 WORLD_SIZE=1", "MASTER_PORT is missing in the environment"),
    ("RANK=0 WORLD_SIZE=1 MASTER_PORT=29700", "MASTER_ADDR missing, MASTER_PORT 29700: "),
    ("RANK=0 WORLD_SIZE=0", "RANK is 0 in the environment, but WORLD_SIZE is 0"),
    ("RANK=x WORLD_SIZE=1", "RANK is 'x' in the environment"),
    ("WORLD_SIZE=2", "RANK is missing in the environment"),
    ("LOCAL_WORLD_SIZE=many", "LOCAL_WORLD_SIZE is 'many' in the environment"),
    ("TORCHELASTIC_RESTART_COUNT=a", "TORCHELASTIC_RESTART_COUNT is 'a' in the environment"),
]


@pytest.mark.parametrize(("given", "said"), ENVIRONMENTS)
def test_half_a_process_group_in_the_environment_is_refused(
    start, tmp_path, complaint, monkeypatch, given, said
):
    for word in given.split():
        monkeypatch.setenv(*word.split("="))
    assert said in complaint(*flags(start, tmp_path / "out"))


def test_a_port_that_is_taken_is_named(start, tmp_path, complaint, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        group = {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1"}
        for name, value in (group | {"MASTER_PORT": taken.getsockname()[1]}).items():
            monkeypatch.setenv(name, str(value))
        said = complaint(*flags(start, tmp_path / "out"))
        assert f"MASTER_PORT {taken.getsockname()[1]}: " in said and "already in use" in said


def test_a_process_that_waits_for_others_says_so(start, tmp_path):
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    group = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, ROOT / "train.py", *words(*flags(start, tmp_path / "out"))]
    process = subprocess.Popen(command, env=os.environ | group, stdout=subprocess.PIPE, text=True)
    killer = threading.Timer(60, process.kill)
    killer.start()
    lines = (line for line in process.stdout if line != "importing torch\n")
    assert next(lines, None) == "waiting for all 2 processes\n"
    process.kill()
    killer.cancel()


def test_processes_that_were_given_other_flags_or_weights_are_refused(start, tmp_path):
    said = complaint_of_two(flags(start, tmp_path / "out", "--lr 1e-@RANK"))
    assert "processes differ: --lr is 1.0 on process 0, 0.1 on 1" in said
    for rank in range(2):
        shutil.copytree(start / "model", tmp_path / f"model{rank}")
    save_model(tiny_model(seed=9), tmp_path / "other", source=start / "model", dtype=torch.float32)
    shutil.copy(tmp_path / "other/model.safetensors", tmp_path / "model1")
    said = complaint_of_two(flags(start, tmp_path / "out", "--model", tmp_path / "model@RANK"))
    assert "processes differ: weights is " in said and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name, value, said",
    [
        ("max_steps", 3, "--max-steps is None on process 0, 3 on 2"),
        ("eval_data", "b.jsonl", "--eval-data is None on process 0, given on 2"),
        ("resume", "", "--resume is None on process 0, given on 2"),
        ("data", "other/a.jsonl", None),  # a path of its own
    ],
)
def test_a_flag_that_one_process_lacks_is_a_difference_and_a_path_of_its_own_is_not(
    monkeypatch, name, value, said
):
    configs = [train.Config(model="m", data="a.jsonl", device="cpu")] * 2
    configs.append(dataclasses.replace(configs[0], **{name: value}))
    flags = []
    monkeypatch.setattr(processes, "agree", lambda action: flags.append(action()))
    for config in configs:
        processes.start(config)
        train.dist.destroy_process_group()
    monkeypatch.undo()
    monkeypatch.setattr(processes, "together", lambda action: flags)
    if said:
        assert said in refusal(processes.agree, None)
    else:
        assert processes.agree(None) == flags[0]


@pytest.mark.parametrize("joined", [False, True])  # 2>&1 | head
def test_a_run_continues_when_the_reader_of_its_log_has_ended(start, tmp_path, joined):
    command = [sys.executable, ROOT / "train.py", *words(*flags(start, tmp_path / "out"))]
    errors = subprocess.STDOUT if joined else subprocess.PIPE
    process = subprocess.Popen(
        command, env=os.environ | ON_CPU, stdout=subprocess.PIPE, stderr=errors, text=True
    )
    assert "ASFT" in process.stdout.read(300)
    process.stdout.close()
    if not joined:
        said = "standard output failed (Broken pipe); the run continues"
        assert process.stderr.read() == f"{said}: {tmp_path / 'out'}\n"
    assert process.wait(timeout=120) == 0 and (tmp_path / "out/model").exists()


def test_a_run_whose_log_has_no_room_continues(start, tmp_path):
    command = [sys.executable, ROOT / "train.py", *words(*flags(start, tmp_path / "out"))]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command, env=os.environ | ON_CPU, stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 0 and (tmp_path / "out/model").exists()
    assert "standard output failed (No space left on device); the run continues" in done.stderr


def test_a_network_that_does_not_exist_and_a_compiler_that_does_not_work_are_one_line(
    start, tmp_path, monkeypatch, complaint
):
    given = flags(start, tmp_path / "out", "--max-steps 1")
    with monkeypatch.context() as patch:
        patch.setenv("GLOO_SOCKET_IFNAME", "nosuch")
        assert "no process group: " in complaint(*given)
    monkeypatch.setattr(train, "step_loss", mock.Mock(side_effect=InvalidCxxCompiler()))
    assert 'the model does not compile ("No working C++ compiler' in complaint(*given, code=1)
    # The compiler wraps whatever goes wrong while it compiles.
    full = InductorError(
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), None
    )
    monkeypatch.setattr(train, "step_loss", mock.Mock(side_effect=full))
    again = flags(start, tmp_path / "again", "--max-steps 1")
    assert "out of memory in the run's costliest micro-batch" in complaint(*again, code=1)


def test_a_path_that_safetensors_cannot_open_is_refused_before_the_run(start, tmp_path, complaint):
    said = complaint(*flags(start, tmp_path / "w\udcff"))
    assert "--out is" in said and "not UTF-8: safetensors cannot open files there" in said


def test_flags_that_are_empty_texts_are_refused(start, tmp_path, complaint):
    dpo = flags(start, tmp_path / "out", "--loss dpo")
    for name in ("--out", "--eval-data", "--eval-by", "--reference-cache"):
        said = complaint(*dpo, f"{name}=")
        assert f"{name} is empty: a shell variable that is not set?" in said


def test_a_missing_package_and_a_closed_standard_output_leave_no_traceback(start, tmp_path):
    code = "import importlib.util as u; u.find_spec = lambda name: None; import support"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert (
        done.stderr == "no torch, safetensors, tokenizers, numpy: pip install -r requirements.txt\n"
    )
    command = [sys.executable, ROOT / "train.py", *words(*flags(start, tmp_path / "out"))]
    closed = ["sh", "-c", '"$@" >&-', "sh", *command, "--max-steps", "1"]
    done = subprocess.run(closed, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and (tmp_path / "out/model").exists()


def test_the_header_says_what_is_held_out_and_trained_on_and_how_large_a_step_is(
    start, tmp_path, capsys
):
    few = tmp_path / "few.jsonl"
    few.write_text("".join((start / "pairs.jsonl").read_text().splitlines(keepends=True)[:3]))
    trained(start, tmp_path / "a", "--eval-data", few, "--max-steps 1 --pairs-per-step 32")
    said = re.sub(r"\n +", " ", capsys.readouterr().out)
    assert "The prompts of 3 are in the training data too" in said
    short = "(the last of each epoch has 10, each still weighing 1/32)"
    assert f"steps 1 of 32 pairs {short}; warm-up to" in re.sub(" +", " ", said)
    assert "cosine" in said
    trained(start, tmp_path / "b", "--max-steps 2 --warmup-ratio 1 --pairs-per-step 5")
    said = capsys.readouterr().out
    assert "steps 2 of 5 pairs; warm-up" in re.sub(" +", " ", said)
    trained(start, tmp_path / "c", "--max-steps 5 --epochs 1 --pairs-per-step 5")
    ends = "steps 2 of 5 pairs (--epochs 1 end before --max-steps 5); warm-up"
    assert ends in re.sub(" +", " ", capsys.readouterr().out)
    assert "cosine" not in said and "training data too" not in said


def test_the_header_says_which_rows_are_there_twice_or_with_their_answers_swapped(
    start, tmp_path, capsys
):
    chosen, rejected = [2, 3], [4, 5, 6]
    pairs = [(9, chosen, rejected), (9, chosen, rejected), (9, rejected, chosen), (8, chosen, [7])]
    rows = [{"prompt_ids": [p], "chosen_ids": c, "rejected_ids": r} for p, c, r in pairs]
    rows += [{"prompt_ids": [7], "response_ids": [2], "label": label} for label in (True, False)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = ("--data", data, "--eval-data", start / "pairs.jsonl", "--max-steps 1")
    trained(start, tmp_path / "a", *more)
    said = re.sub(r"\n +", " ", capsys.readouterr().out)
    # The first two and the third; the last two.
    expected = "Of those kept, 1 repeat an earlier one (compared as they are trained on)"
    expected += ". 5 contradict each other: good in one is bad in the other"
    assert f". {expected} held out" in said
    assert said.count("repeat an earlier") == 1  # not of the held-out pairs


@pytest.mark.parametrize(
    "launcher, name",
    [
        ("srun", "SLURM_STEP_NUM_TASKS"),
        ("mpirun", "OMPI_COMM_WORLD_SIZE"),
        ("mpirun", "PMI_SIZE"),
    ],
)
def test_the_header_says_if_srun_or_mpirun_started_processes_that_do_not_know_each_other(
    start, tmp_path, capsys, monkeypatch, launcher, name
):
    words = "started 8 processes: only torchrun would join them"
    for tasks in ("8", "1"):
        monkeypatch.setenv(name, tasks)
        trained(start, tmp_path / tasks, "--max-steps 1")
        assert (f"{launcher} {words}" in capsys.readouterr().out) == (tasks == "8")
    if launcher == "srun":  # which may start torchrun
        monkeypatch.setenv(name, "8")
        done = run_joined(flags(start, tmp_path / "two", "--max-steps 1"))
        assert "2 x CPU" in done and words not in done


def test_single_answers_may_be_trained_on_while_pairs_choose_the_best(start, tmp_path):
    ones = tmp_path / "ones.jsonl"
    ones.write_text('{"prompt_ids": [1], "response_ids": [2], "label": true}\n')
    more = ("--data", ones, "--eval-data", start / "pairs.jsonl", "--eval-every 1 --max-steps 1")
    [row] = trained(start, tmp_path / "out", *more, "--keep-best accuracy")
    assert "eval_accuracy" in row and "accuracy" not in row


def test_model_and_data_go_together(complaint):
    assert "--model and --data go together" in complaint("--model m")


def test_bad_lines_stop_the_run_before_training_and_name_file_and_line(start, tmp_path, capsys):
    bad = tmp_path / "bad.jsonl"
    lines = ["{oops", '{"prompt_ids": [1], "chosen_ids": [2]}', ""]
    bad.write_text((start / "pairs.jsonl").read_text() + "\n".join(lines))
    assert main(*flags(start, tmp_path / "out", "--data", bad)) == 2
    said = capsys.readouterr().err
    assert f"{bad}:11: not JSON" in said and f"{bad}:12: rejected_ids is missing" in said
    trained(start, tmp_path / "out", "--data", bad, "--skip-bad-lines --max-steps 1")
    assert read_json(tmp_path / "out/config.json")["data"]["bad lines"] == 2


def test_reading_encoding_and_planning_say_every_two_seconds_how_far_they_are(
    start, tmp_path, capsys, monkeypatch
):
    """Here chunks have 4 of the 10 pairs, and each look at the clock takes 1.5 seconds."""
    ticks = iter(range(1000))
    fake = SimpleNamespace(monotonic=lambda: 1.5 * next(ticks))
    monkeypatch.setattr(processes, "time", fake)
    monkeypatch.setattr(data, "CHUNK", 4)
    trained(start, tmp_path / "out", "--max-steps 3")
    said = re.findall("^(?:read|encoded|planned) .*", capsys.readouterr().out, re.M)
    read = f"read 8 records of {start / 'pairs.jsonl'}"
    assert said == [read, "encoded 8 of 10 pairs", "planned 1 of 3 steps"]


@pytest.mark.parametrize("after, expected", [(0.01, "reading\n"), (60, "")])
def test_only_work_that_takes_longer_than_the_delay_is_announced(
    capsys, monkeypatch, after, expected
):
    asked, timer = [], threading.Timer

    def shorter(seconds, *call):
        asked.append(seconds)
        return timer(after, *call)

    monkeypatch.setattr(processes.threading, "Timer", shorter)
    with processes.announced("reading"):
        time.sleep(0.3)
    assert asked == [2] and capsys.readouterr().out == expected


class EveryTime(threading.Timer):
    """A timer that does not wait: as if all work took long."""

    def start(self) -> None:
        self.function(*self.args, **self.kwargs)


def test_reading_and_writing_of_models_and_checkpoints_is_announced(
    start, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(processes.threading, "Timer", EveryTime)
    trained(start, tmp_path / "out", "--max-steps 2 --save-every 1 --device cpu")
    said = [line for line in capsys.readouterr().out.split("\n") if re.match("[a-z]+ing ", line)]
    assert said == [
        "computing checksums of weights and pairs",
        "reading the weights",
        "comparing the pairs with each other",
        "trying the run's costliest micro-batches",
        "writing a checkpoint",
        "writing the model",
    ]
    killed = before_export(tmp_path / "out", tmp_path / "killed")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert main("--resume", killed) == 0
    said = capsys.readouterr().out
    assert "\r\x1b[Kcomputing a checkpoint's checksums\n" in said
    assert "\r\x1b[Kreading a checkpoint\n" in said


SLOW = "import time; time.sleep(3); raise SystemExit(9)"


def test_a_slow_import_of_torch_is_announced_once(tmp_path):
    started = []
    for modules, rank, expected in [
        ({"torch": SLOW}, 0, "importing torch\n"),
        ({"torch": SLOW}, 1, ""),
        ({"torch": "", "numpy": SLOW}, 0, ""),
    ]:
        home = tmp_path / str(len(started))
        home.mkdir()
        for name, code in modules.items():
            (home / f"{name}.py").write_text(code)
        known = os.environ | {"PYTHONPATH": str(home), "RANK": str(rank)}
        program = [sys.executable, ROOT / "train.py"]
        process = subprocess.Popen(program, env=known, stdout=subprocess.PIPE, text=True)
        started.append((process, expected))
    for process, expected in started:
        assert (process.communicate()[0], process.returncode) == (expected, 9)


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", ""])
def test_gpu_memory_grows_in_segments_unless_the_user_sets_otherwise(name):
    ask = f"import os, support; print(os.environ.get({name or 'PYTORCH_ALLOC_CONF'!r}))"
    known = {key: value for key, value in os.environ.items() if "ALLOC_CONF" not in key}
    known |= {name: "garbage_collection_threshold:0.8"} if name else {}
    words = [sys.executable, "-c", ask]
    done = subprocess.run(words, cwd=ROOT, env=known, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == (known[name] if name else "expandable_segments:True")


def test_an_out_that_holds_anything_or_cannot_be_made_is_refused(start, tmp_path, complaint):
    trained(start, tmp_path / "out", "--max-steps 1")
    before = (tmp_path / "out/metrics.jsonl").read_bytes()
    assert "is not empty" in complaint(*flags(start, tmp_path / "out"))
    assert (tmp_path / "out/metrics.jsonl").read_bytes() == before
    assert "Not a directory" in complaint(*flags(start, start / "pairs.jsonl/out"))
    no_run = save_tiny(tmp_path / "no run")
    assert "wanted the config.json of a run" in complaint(*flags(start, no_run, "--resume"))
    (no_run / "config.json").unlink()
    assert "is not empty" in complaint(*flags(start, no_run, "--resume"))


def test_without_out_each_run_gets_a_fresh_directory_under_runs(start, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = ["--model", start / "model", "--data", start / "pairs.jsonl", "--max-steps 1"]
    assert main(*given) == main(*given) == 0
    assert len(list(tmp_path.glob("runs/*/model/config.json"))) == 2


# ------------------------------------------------------------------------------------ schedule


def test_warm_up_starts_above_zero_reaches_the_peak_and_the_last_rate_is_the_minimum():
    # 2.1 steps of warm-up, rounded up.
    rates = [train.learning_rate(step, 21, 1.0, 0.1, 0.0) for step in range(21)]
    assert rates[:3] == [1 / 3, 2 / 3, 1.0] and max(rates) == 1.0
    assert rates[-1] == pytest.approx(0, abs=1e-15) and rates[2:] == sorted(rates[2:], reverse=True)
    # Half-way between the peak (update 3) and the end (update 21): update 12, cos(pi/2) = 0.
    assert rates[11] == pytest.approx(0.5)


@pytest.mark.parametrize("steps, expected", [(1, [1.0]), (2, [1.0, 0.1]), (3, [1.0, 0.55, 0.1])])
def test_short_schedules_still_start_at_the_peak_and_end_at_the_minimum(steps, expected):
    rates = [train.learning_rate(step, steps, 1.0, 0.1, 0.1) for step in range(steps)]
    assert rates == pytest.approx(expected)


# ---------------------------------------------------------------------------------- the update


def oracle_run(start, steps, lr=1e-2, **adamw):
    """The same training in thirty lines: plain sequences, one pair at a time, no sharding."""
    model, history = load_model(start / "model"), []
    optimizer = torch.optim.AdamW(model.parameters(), **adamw)
    for step in range(steps):
        total, margins = 0.0, []
        for i in drawn(step):
            (logp_w, logp_l), _ = oracle_logps(model, PAIRS[i])
            odds_w, odds_l = (x - torch.log(1 - torch.exp(x)) for x in (logp_w, logp_l))
            align = -F.logsigmoid(odds_w) - F.logsigmoid(-odds_l)
            total = total + (-logp_w + 0.1 * align)
            margins.append((logp_w - logp_l).item())
        (total / 4).backward()
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters()))
        for p in model.parameters():
            p.grad *= min(1.0, 1.0 / (norm + 1e-6))
        warmup = max(1, math.ceil(steps * 0.1))
        angle = math.pi * (step + 1 - warmup) / max(1, steps - warmup)
        cosine = lr * (1 + math.cos(angle)) / 2
        optimizer.param_groups[0]["lr"] = lr * (step + 1) / warmup if step < warmup else cosine
        optimizer.step()
        optimizer.zero_grad()
        row = dict(loss=total.item() / len(margins), grad_norm=norm, margin=np.mean(margins))
        history.append(row | dict(accuracy=np.mean(np.array(margins) > 0), pairs=len(margins)))
    return model, history


@pytest.mark.parametrize(
    "more, betas, eps, weight_decay",
    [
        ("", (0.9, 0.999), 1e-8, 0),
        ("--adam-beta1 0.5", (0.5, 0.999), 1e-8, 0),
        ("--adam-beta2 0.9 --adam-eps 1e-2 --weight-decay 3", (0.9, 0.9), 1e-2, 3),
    ],
)
def test_the_updates_are_those_of_a_plain_unsharded_loop(
    start, tmp_path, more, betas, eps, weight_decay
):
    found = trained(start, tmp_path / "out", "--epochs 2", more)
    model, expected = oracle_run(start, 6, betas=betas, eps=eps, weight_decay=weight_decay)
    # Ten pairs an epoch: its last step is short.
    assert [row["pairs"] for row in found] == [4, 4, 2, 4, 4, 2]
    assert_close(found, expected, "loss grad_norm margin accuracy pairs", rel=1e-4)
    saved = load_model(tmp_path / "out/model")
    assert saved.config == model.config
    weights = dict(saved.named_parameters())
    for key, expected in model.named_parameters():
        torch.testing.assert_close(weights[key], expected, atol=2e-5, rtol=1e-4, msg=key)


def test_a_run_counts_subnormal_numbers_as_0(start, tmp_path):
    """Saturated losses have such gradients, which make a CPU ten times slower."""
    third = torch.tensor([torch.finfo(torch.float32).tiny]).div
    assert third(3) > 0
    trained(start, tmp_path / "out", "--max-steps 1")
    assert third(3) == 0


@pytest.mark.parametrize(
    "more", ["--max-tokens-per-gpu 30", "--no-share-prompt", "--checkpoint-blocks on"]
)
def test_micro_batches_sharing_and_recomputation_do_not_change_the_update(start, tmp_path, more):
    plain = trained(start, tmp_path / "plain", "--epochs 1")
    other = trained(start, tmp_path / "other", "--epochs 1", more)
    assert_close(plain, other, "loss", rel=0, absolute=2e-6)
    assert_close(plain, other, "grad_norm", absolute=0)
    assert_close(plain, other, "accuracy", rel=0, absolute=0)


TWO = {"asft": "", "hybrid": "--replicas 2", "dpo": "--loss dpo"}
ONE_PAIR = "one pair"


def options_on_two(start):
    """Flags of the runs that one process and two make: asft, hybrid sharding, dpo; one pair."""
    common = ["--lr 1e-3 --epochs 4 --max-steps 10 --pairs-per-step 3 --eval-every 4"]
    common += ["--eval-data", start / "heldout.jsonl"]
    one = write_pairs(start / "one.jsonl", PAIRS[:1])
    of_each = {name: [*common, more] for name, more in TWO.items()}
    return of_each | {ONE_PAIR: ["--data", one, "--eval-data", one, "--epochs 1"]}


@pytest.fixture(scope="module")
def two(start, tmp_path_factory):
    """The directory of the runs of `options_on_two` on two processes, which start once for all."""
    home = tmp_path_factory.mktemp("two")
    run_joined(*(flags(start, home / k, *more) for k, more in options_on_two(start).items()))
    return home


@pytest.mark.parametrize("name", TWO)
def test_one_process_equals_two(start, two, tmp_path, name):
    options = [word for word in options_on_two(start)[name] if word != "--replicas 2"]
    here, there = trained(start, tmp_path / "one", *options), rows(two / name)
    assert len(here) == len(there) == 10
    assert_close(here, there, "loss margin accuracy logp_w logp_l")
    assert_close(here, there, "grad_norm", rel=1e-4)
    assert_close(here, there, "tokens pairs", rel=0, absolute=0)
    # Seven held-out pairs on two processes: each counts once.
    here, there = rows(tmp_path / "one", "eval.jsonl"), rows(two / name, "eval.jsonl")
    assert_close(here, there, " ".join(here[0]))
    a, b = load_model(tmp_path / "one/model"), load_model(two / name / "model")
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-4, rtol=1e-3)


def test_one_pair_on_two_processes_finishes_and_counts_once(start, two, tmp_path):
    here = trained(start, tmp_path / "one", *options_on_two(start)[ONE_PAIR])
    assert_close(here, rows(two / ONE_PAIR), "loss", absolute=1e-6)
    assert rows(two / ONE_PAIR)[0]["pairs"] == 1


def test_a_rate_of_1e_6_moves_the_fp32_weights(start, tmp_path):
    trained(start, tmp_path / "out", "--lr 1e-6 --max-steps 1")
    before, after = load_model(start / "model"), load_model(tmp_path / "out/model")
    parameters = zip(before.parameters(), after.parameters(), strict=True)
    moved = torch.cat([(p - q).detach().abs().flatten() for p, q in parameters])
    # AdamW's first step is the rate itself unless the gradient is 0: half the embedding's rows.
    assert (moved > 0).float().mean() > 0.5
    assert float(moved.max()) == pytest.approx(1e-6, rel=0.1)


def test_bf16_products_stay_close_to_fp32_and_weights_stay_fp32(start, tmp_path):
    exact = trained(start, tmp_path / "fp32", "--lr 1e-4 --max-steps 3")
    half = trained(start, tmp_path / "bf16", "--lr 1e-4 --max-steps 3 --precision bf16")
    assert all(a["loss"] != b["loss"] for a, b in zip(exact, half, strict=True))
    assert_close(exact, half, "loss", rel=0.02, absolute=0)
    weights = load_model(tmp_path / "bf16/model").state_dict()
    assert any((value != value.bfloat16().float()).any() for value in weights.values())


# ----------------------------------------------------------------------- losses and references


@pytest.mark.parametrize("more", ["", "--precision bf16"])  # in bf16 FSDP shards over one process
def test_the_update_of_a_processs_rows_is_that_of_adamw(start, tmp_path, monkeypatch, more):
    more += " --max-steps 3 --weight-decay 0.1 --adam-beta1 0.8 --adam-beta2 0.9 --adam-eps 1e-4"
    trained(start, tmp_path / "ours", more)
    monkeypatch.setattr(train.sharding, "optimizer_step", lambda optimizer: optimizer.step())
    trained(start, tmp_path / "torchs", more)
    ours, torchs = (tmp_path / name / "model/model.safetensors" for name in ("ours", "torchs"))
    assert ours.read_bytes() == torchs.read_bytes()


@pytest.mark.parametrize("loss", asft.LOSSES)
def test_the_first_step_of_every_loss_is_its_definition(start, tmp_path, loss):
    row = trained(start, tmp_path / "out", "--loss", loss, "--max-steps 1")[0]
    model = load_model(start / "model")
    with torch.no_grad():
        logps = torch.tensor([oracle_logps(model, PAIRS[i]) for i in drawn(0)]).double().numpy()
    (w, l), (sum_w, sum_l) = logps.transpose(1, 2, 0)
    p_w, p_l = np.exp(w), np.exp(l)
    odds = np.log(p_w / (1 - p_w)) - np.log(p_l / (1 - p_l))
    expected = {
        "sft": -w,
        "asft": -1.1 * w - 0.1 * np.log(1 - p_l),
        "orpo": -w + 0.1 * np.log1p(np.exp(-odds)),
        "simpo": np.log1p(np.exp(-(2 * (w - l) - 1))),
        "dpo": np.full(4, math.log(2)),
        "dpo-norm": np.full(4, math.log(2)),
        "ipo": np.full(4, 25.0),
    }
    assert row["loss"] == pytest.approx(expected[loss].mean(), rel=1e-5)
    found = dict(logp_w=w, logp_l=l, sum_logp_w=sum_w, sum_logp_l=sum_l, margin=w - l, sft=-w)
    for name, values in (found | dict(accuracy=w > l)).items():
        assert row[name] == pytest.approx(values.mean(), rel=1e-5, abs=1e-6), name
    always = "step epoch lr grad_norm tokens_per_s pairs_per_s peak_memory_gib align"
    assert set(words(always)) <= row.keys() and not any(name[:5] == "rows_" for name in row)
    rewards = {"reward_w", "reward_l"} & row.keys()
    assert bool(rewards) == (loss in ("simpo", "dpo", "dpo-norm", "ipo"))


@pytest.mark.parametrize("loss, first", [("dpo", math.log(2)), ("ipo", 25), ("ipo --ipo-sum", 25)])
def test_a_live_reference_and_a_precomputed_one_give_the_same_losses(start, tmp_path, loss, first):
    more = ["--loss", loss, "--eval-data", start / "heldout.jsonl"]
    live = trained(start, tmp_path / "live", *more, "--reference live")
    kept = trained(start, tmp_path / "kept", *more)
    assert live[0]["loss"] == pytest.approx(first, rel=1e-5)
    assert live[-1]["loss"] != pytest.approx(first, rel=1e-3)
    assert_close(live, kept, "loss", rel=1e-4)
    assert_close(live[-1:], kept[-1:], "eval_loss", rel=1e-4, absolute=0)


@pytest.mark.parametrize("mean, total", [("ipo", "ipo --ipo-sum"), ("dpo-norm --beta 0.1", "dpo")])
def test_sums_and_means_are_different_losses(start, tmp_path, mean, total):
    mean = trained(start, tmp_path / "mean", f"--loss {mean} --max-steps 1")
    total = trained(start, tmp_path / "sum", f"--loss {total} --max-steps 1")
    assert total[0]["grad_norm"] > 3 * mean[0]["grad_norm"]


def test_a_reference_cache_is_used_again_only_for_its_weights_and_pairs(start, tmp_path, complaint):
    cache = tmp_path / "cache.safetensors"
    more = ["--loss dpo --max-steps 2 --reference-cache", cache]
    refused = flags(start, tmp_path / "refused", *more)
    first = trained(start, tmp_path / "first", *more)
    written = cache.stat().st_mtime_ns
    again = trained(start, tmp_path / "again", *more)
    assert cache.stat().st_mtime_ns == written
    assert [row["loss"] for row in first] == [row["loss"] for row in again]
    save_tiny(tmp_path / "other", seed=5)
    other_pairs = ["--data", start / "heldout.jsonl"]
    for other in (["--model", tmp_path / "other"], other_pairs, ["--precision bf16"]):
        assert "other weights, pairs or precision" in complaint(*refused, *other)
    with safe_open(cache, "pt") as file:
        metadata = file.metadata()
    save_file({"logps": torch.zeros(3, 2, 2)}, cache, metadata=metadata)
    assert "wanted logps of shape [10, 2, 2]" in complaint(*refused)
    cache.write_bytes(b"garbage")
    assert "not a safetensors file" in complaint(*refused)
    assert not (tmp_path / "refused").exists()


def test_two_runs_may_write_one_reference_cache_at_the_same_moment(tmp_path, monkeypatch):
    """The second writes all of it while the first is about to rename its file."""
    cache, logps = tmp_path / "cache", torch.rand(3, 2, 2)
    others = [partial(reference.write_cache, cache, "key", logps)]

    def flush_late(path, flush=files.flush):
        flush(path)
        if others:
            other = others.pop()
            with monkeypatch.context() as second:
                second.setattr(os, "getpid", lambda: 1)
                other()

    monkeypatch.setattr(files, "flush", flush_late)
    reference.write_cache(cache, "key", logps)
    assert not others and list(tmp_path.iterdir()) == [cache]
    assert torch.equal(reference.read_cache(cache, "key", 3), logps)


# ------------------------------------------------------------------------------ what comes out


def test_evaluation_runs_before_the_first_step_every_so_often_and_at_the_end(start, tmp_path):
    more = ["--epochs 2 --eval-every 4 --eval-data", start / "heldout.jsonl"]
    found = trained(start, tmp_path / "out", *more)
    assert [row["step"] for row in rows(tmp_path / "out", "eval.jsonl")] == [0, 4, 6]
    assert [row["step"] for row in found if "eval_loss" in row] == [4, 6]
    model, held_out = load_model(start / "model"), random_pairs(LENGTHS[3:], seed=2)
    with torch.no_grad():
        margins = [float(w - l) for (w, l), _ in (oracle_logps(model, x) for x in held_out)]
    first = rows(tmp_path / "out", "eval.jsonl")[0]
    assert first["eval_margin"] == pytest.approx(np.mean(margins), rel=1e-5)
    assert first["eval_accuracy"] == pytest.approx(np.mean([m > 0 for m in margins]))


def test_a_tied_model_trains_and_saves_its_embedding_once(tmp_path):
    save_tiny(tmp_path / "model", std=0.3, tie_word_embeddings=True)
    write_pairs(tmp_path / "pairs.jsonl", PAIRS)
    found = trained(tmp_path, tmp_path / "out", "--epochs 3")
    assert found[-1]["loss"] < found[0]["loss"]
    assert load_model(tmp_path / "out/model").lm_head is None


def test_a_loss_of_nan_stops_the_run_and_names_its_pairs(start, tmp_path, complaint, monkeypatch):
    poisoned = int(PAIRS[6].prompt[0])

    def load_poisoned(model, directory):  # a file with a NaN would be refused
        load_weights(model, directory)
        with torch.no_grad():
            local_rows(model.model["embed_tokens"].weight)[0][poisoned] = math.nan

    monkeypatch.setattr(train, "load_weights", load_poisoned)
    read = [np.concatenate([p.prompt, p.chosen[:-1], p.rejected[:-1]]) for p in PAIRS]
    named = {i for i, tokens in enumerate(read, 1) if poisoned in tokens}
    assert 1 <= len(named) < 10
    said = complaint(*flags(start, tmp_path / "out", "--pairs-per-step 10"), code=1)
    assert "step 1: loss nan" in said
    assert {int(line) for line in re.findall(r"pairs.jsonl:(\d+)", said)} == named
    assert not (tmp_path / "out/model").exists()


def test_a_loss_or_a_gradient_that_is_not_finite_stops_the_run_by_itself(
    start, tmp_path, complaint, monkeypatch
):
    def with_hook(model, directory):
        load_weights(model, directory)
        model.model["norm"].weight.register_hook(lambda gradient: gradient * math.inf)

    def infinite(*arguments):
        loss_B, metrics = step_loss(*arguments)
        return loss_B, metrics | {"loss": metrics["loss"] + math.inf}

    step_loss = train.step_loss
    options = flags(start, tmp_path / "out", "--pairs-per-step 10")
    with monkeypatch.context() as patch:
        patch.setattr(train, "load_weights", with_hook)
        said = complaint(*options, code=1)
    assert re.search(r"step 1: loss \d+\.\d+, gradient norm (inf|nan)", said)
    assert len(re.findall(r"pairs.jsonl:\d+", said)) == 10  # no loss tells which: all of the step
    monkeypatch.setattr(train, "step_loss", infinite)
    options = flags(start, tmp_path / "other", "--pairs-per-step 10")
    assert re.search(r"step 1: loss inf, gradient norm \d+\.\d+;", complaint(*options, code=1))


def test_on_a_terminal_the_step_line_moves_in_place(start, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    trained(start, tmp_path / "out", "--max-steps 3")
    printed = capsys.readouterr().out
    assert printed.count("\r\x1b[K") == 3 and "\n\r\x1b[Kstep 2/3" not in printed
    assert all(len(line) < 200 for line in printed.split("\r\x1b[K")[1:3])


def test_other_seeds_draw_other_pairs(start, tmp_path):
    (a,) = trained(start, tmp_path / "a", "--max-steps 1")
    (b,) = trained(start, tmp_path / "b", "--max-steps 1 --seed 1")
    assert a["loss"] != b["loss"]


@pytest.fixture
def example(tmp_path) -> Path:
    """A copy of the example's model; pairs.jsonl beside it has a few of its pairs."""
    lines = (ROOT / "examples/heldout.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "pairs.jsonl").write_text("".join(lines[:6]))
    return shutil.copytree(ROOT / "examples/model", tmp_path / "model")


def test_the_export_of_a_base_model_ends_its_answers(example, tmp_path):
    names = "config.json", "generation_config.json"
    for name in names:  # <|end_of_text|>, as Llama-3-8B's say
        edit_json(example / name, eos_token_id=507)
    trained(tmp_path, tmp_path / "out", "--max-steps 1 --pairs-per-step 2")
    end_of_turn = ChatFormat(tmp_path / "out/model").end_of_turn
    for name in names:
        assert read_json(tmp_path / "out/model" / name)["eos_token_id"] == [507, end_of_turn]


def test_an_answer_ends_before_a_stop_id_at_its_limit_and_at_the_models_context(monkeypatch):
    """Greedy: the model below counts up from the last token."""

    class Counting(torch.nn.Module):
        config = SimpleNamespace(max_position_embeddings=12)

        def logits(self, tokens_T):
            return F.one_hot(tokens_T + 1, 100).float()

    monkeypatch.setattr(train.dist, "broadcast", lambda tensor, rank: None)
    chat = SimpleNamespace(stop_ids={7, 40}, decode=lambda ids: ids)
    for prompt, limit, expected in [
        ([9, 3], 64, [4, 5, 6]),
        ([7, 9, 3], 2, [4, 5]),
        ([20] * 9, 64, [21, 22, 23]),
    ]:
        assert answer(Counting(), chat, np.array(prompt), "cpu", limit) == expected
    # Every process continues with process 0's token, even if rounding gave it another one.
    of_process_0 = {0: iter([30, 31, 7])}
    monkeypatch.setattr(
        train.dist, "broadcast", lambda tensor, rank: tensor.fill_(next(of_process_0[rank]))
    )
    assert answer(Counting(), chat, np.array([9, 3]), "cpu") == [30, 31]


# ---------------------------------------------------------------------------------- simulation


def test_a_tied_model_whose_steps_have_several_micro_batches_is_simulated(capsys):
    assert LlamaConfig.load(ROOT / "examples/model").tie_word_embeddings
    assert main("--plan 1 --max-tokens-per-gpu 500") == 0
    assert "micro-batches a step" in capsys.readouterr().out


@pytest.mark.parametrize(
    "layers, gpus, pairs, parameters, least, goal",
    [(32, 8, 160, "8,030,261,248", 21.1, 22), (4, 1, 20, "1,923,125,248", 32.5, 33.2)],
)
def test_the_simulated_peak_of_8b_meets_the_goal(
    tmp_path, capsys, layers, gpus, pairs, parameters, least, goal
):
    """Llama-3-8B's shapes, up to 8,192 tokens a micro-batch, UltraFeedback's mean lengths, several
    micro-batches a step. Without the gradients of earlier ones the peaks would be 18.7 and 31.6
    GiB, with a CPU's chunks of logits 20.9 on eight. On one GPU a few layers show the same."""
    config = dict(model_type="llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336)
    config |= dict(num_hidden_layers=layers, num_attention_heads=32, num_key_value_heads=8)
    config |= dict(rope_theta=5e5, max_position_embeddings=8192, rms_norm_eps=1e-5)
    (tmp_path / "config.json").write_text(json.dumps(config))
    data = write_pairs(tmp_path / "pairs.jsonl", random_pairs([(177, 330, 278)] * pairs))
    given = ["--model", tmp_path, "--data", data, "--plan", gpus, "--pairs-per-step", pairs]
    assert main(*given, "--checkpoint-blocks on") == 0
    printed = capsys.readouterr().out
    assert parameters in printed and "and 7,850 at most" in printed
    assert least < float(re.search(r"memory +([\d.]+) GiB", printed)[1]) < goal
    # By hand, little for attention: 6 FLOPs per weight of the blocks and token, 6 D per logit.
    flops = float(re.search(r"FLOPs +([\d.e+]+)", printed)[1])
    tokens, scored = pairs * 785, pairs * 608
    by_hand = 6 * (layers * 218_103_808 * tokens + 128256 * 4096 * scored)
    assert flops == pytest.approx(by_hand, rel=0.03)
