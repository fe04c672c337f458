"""Times steps of this project and of other trainers side by side on a CPU (Linux).

    python bench/benchmark.py install DIR                   TRL and Liger in DIR/trl
    python bench/benchmark.py install DIR --llamafactory    LLaMA-Factory in DIR/llamafactory
    python bench/benchmark.py prepare DIR                   random models, tokenizers and pairs
    python bench/benchmark.py run DIR --out results.jsonl   every run; continues if interrupted
    python bench/benchmark.py table results.jsonl           the table, in Markdown
    python bench/benchmark.py startup MODEL_DIR [FILE]      train.py up to its first step

It needs both requirements.txt files installed. Trainers that are not installed are left out.

In reading order
    SIZES, PROFILES, OURS, PEERS    what is compared
    install, make_pairs, prepare    the other trainers; models and pairs
    trl, llamafactory, liger, one   another trainer ("peer"), in its own Python environment
    watch, run, table               one process per run, timed from outside, ours and theirs alike
    startup                         the time before the first step

Every trainer gets the same weights (fp32), the same tokens (compared row by row before a peer
trains), and the same pairs in each step: 4, in the file's order. All use AdamW at a constant 3e-4
without weight decay, clip gradients to norm 1, have beta 0.1, and recompute nothing. bf16 means
bf16 matrix products: --precision bf16 here, autocast in the others.

A step lasts from the end of one update to the end of the next one, so collation and logging count.
Loading, saving and the reference pass before the first step (dpo-precomputed) do not. Memory is the
process's largest resident set up to the last step.

One busy neighbour makes a step several times slower, because OpenMP threads wait for each other. So
the load of other processes is measured with each run. A run beside a load above MAX_OTHER_LOAD is
repeated once and does not count.

Left out: GPUs, several processes, evaluation.
"""

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from importlib.machinery import ModuleSpec
from itertools import product
from pathlib import Path

from common import append_row, cpu_seconds_of_machine, machine, read_rows, train_command

# Other packages are imported inside the functions that use them. A process's peak memory begins
# with that of the process that started it, so this one stays small.

PAIRS, PAIRS_PER_STEP, MAX_TOKENS, LR, BETA, MAX_OTHER_LOAD = 128, 4, 512, 3e-4, 0.1, 0.25
STEPS = {"S": (3, 20), "M": (1, 5)}  # of warm-up, and measured


def shape(vocabulary: int, width: int, layers: int, ffn: int) -> dict[str, int]:
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size")
    return dict(zip(names, (vocabulary, width, layers, ffn), strict=True))


SIZES = {"S": shape(8192, 256, 4, 688), "M": shape(128256, 512, 8, 1408)}
# Lengths are log-normal: medians of prompt, chosen and rejected in tokens; sigmas of prompts and of
# responses.
PROFILES = {
    "uf": ((120, 200, 200), (0.7, 0.6)),  # like UltraFeedback: means 140, 202, 206
    "hh": ((93, 29, 33), (1.0, 0.9)),  # like HH-RLHF: means 123, 41, 51
}
DTYPES = ("fp32", "bf16")
SHA256 = {  # of the pairs
    ("S", "uf"): "83d9386941cb9f776bc544b826f913407f0f836d33b34f17f817faef58b60eb6",
    ("M", "uf"): "da13a2e9734aaa7e89e5b4e997b89be7633f7fa67af3ce8243b5b7314fc56c1c",
    ("S", "hh"): "92886daea6de2e334bb2400d6b3e7becac5290ad8eb47412f44c34adacabfdd7",
    ("M", "hh"): "c5668bbb8825ef8d978fb96bf32c967c9d0cebf34b5473a17eddad66d3d90204",
}
OURS = {  # flags of train.py
    "asft": ("--loss", "asft"),
    "asft-unshared": ("--loss", "asft", "--no-share-prompt"),
    "orpo": ("--loss", "orpo"),
    "dpo-live": ("--loss", "dpo", "--reference", "live"),
    "dpo-precomputed": ("--loss", "dpo", "--reference", "precompute"),
}
PEERS = {  # and their environments. liger-orpo is LigerFusedLinearORPOLoss in a plain loop.
    "trl-orpo": "trl",
    "trl-dpo": "trl",
    "trl-dpo-precomputed": "trl",
    "liger-orpo": "trl",
    "llamafactory-orpo": "llamafactory",
    "llamafactory-dpo": "llamafactory",
}
JOBS = [*OURS, *PEERS]
PINNED = {
    "trl": "trl==1.16.0 transformers==5.23.0 accelerate==1.15.0 datasets==5.2.0 peft==0.21.2 "
    "safetensors==0.8.0 tokenizers==0.23.3 liger-kernel==0.8.5",
    "llamafactory": "llamafactory==0.9.5",  # which pins transformers, trl and so on
}
SIDES = ("prompt", "chosen", "rejected")


def install(a: argparse.Namespace) -> None:
    """A peer's virtual environment. A constraint keeps its packages from replacing torch."""
    name = "llamafactory" if a.llamafactory else "trl"
    python, constraints = str(a.dir / name / "bin/python"), a.dir / name / "constraints.txt"
    pip = [python, "-m", "pip", "-q"]
    subprocess.run([sys.executable, "-m", "venv", a.dir / name], check=True)
    subprocess.run([*pip, "install", "torch==2.13.0", "numpy"], check=True)
    ask = [python, "-c", "import torch; print(torch.__version__)"]
    constraints.write_text(f"torch=={subprocess.check_output(ask, text=True)}")
    subprocess.run([*pip, "install", "-c", constraints, *PINNED[name].split()], check=True)
    if a.llamafactory:
        # These wheels need CUDA. Beside a torch without CUDA they break `import transformers`.
        subprocess.run([*pip, "uninstall", "-y", "torchvision", "torchaudio"], check=True)


# -------------------------------------------------------------------------------- pairs and weights


def specials(vocab_size: int) -> dict[str, int]:
    """The special ids, as far from the vocabulary's end as Llama 3's. All ids below are words."""
    return {"bos": vocab_size - 256, "pad": vocab_size - 252, "eos": vocab_size - 247}


def make_pairs(vocab_size: int, profile: str) -> list[dict[str, list[int]]]:
    """128 rows of prompt_ids (which begin with BOS), chosen_ids and rejected_ids (which end with
    EOS). So no template is needed and nothing is cut."""
    import numpy as np

    ids, n_words = specials(vocab_size), vocab_size - 256
    rng = np.random.Generator(np.random.PCG64(0))
    medians, (prompt_sigma, response_sigma) = PROFILES[profile]
    # Lengths are drawn before anything that depends on the vocabulary: they are equal for S and M.
    normal = rng.standard_normal(PAIRS)
    prompt_lengths = np.rint(np.exp(math.log(medians[0]) + prompt_sigma * normal))
    # The lengths of the two responses correlate (rho 0.5), like two answers to one question.
    shared, own = rng.standard_normal(PAIRS), rng.standard_normal((2, PAIRS))
    z = math.sqrt(0.5) * shared + math.sqrt(0.5) * own
    response_lengths = np.rint(np.exp(np.log(medians[1:])[:, None] + response_sigma * z)).clip(8)
    good, bad = rng.permutation(n_words), rng.permutation(n_words)
    cdf = np.cumsum(1.0 / (np.arange(n_words) + 10.0))
    cdf /= cdf[-1]

    def draw(words, k: int):
        """Words by Zipf's law. By inverse CDF, which is the same in every version of numpy."""
        return words[np.searchsorted(cdf, rng.random(k), side="right").clip(0, n_words - 1)]

    rows = []
    prompt_lengths = prompt_lengths.clip(8, MAX_TOKENS // 2).astype(int)
    for length, of_pair in zip(prompt_lengths, response_lengths.T, strict=True):
        n_chosen, n_rejected = of_pair.clip(max=MAX_TOKENS - length).astype(int)
        prompt, chosen = draw(good, length - 1), draw(good, n_chosen - 1)
        # Every other word of a rejected answer has another distribution, so there is something to
        # learn, but not at once.
        even = np.arange(n_rejected - 1) % 2 == 0
        rejected = np.where(even, draw(good, n_rejected - 1), draw(bad, n_rejected - 1))
        row = {
            "prompt_ids": [ids["bos"], *prompt.tolist()],
            "chosen_ids": [*chosen.tolist(), ids["eos"]],
            "rejected_ids": [*rejected.tolist(), ids["eos"]],
        }
        rows.append(row)
    return rows


def prepare(a: argparse.Namespace) -> None:
    """Hugging Face directories DIR/SIZE, and the pairs, DIR/SIZE/PROFILE.jsonl."""
    import torch

    for size, sizes in SIZES.items():
        home, ids = a.dir / size, specials(sizes["vocab_size"])
        torch.manual_seed(0)
        token_ids = {f"{name}_token_id": i for name, i in ids.items()}
        random_llama(
            **sizes,
            **token_ids,
            max_position_embeddings=8192,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
            tie_word_embeddings=False,
            initializer_range=0.02,
        ).float().save_pretrained(home)
        save_tokenizer(home, sizes["vocab_size"], ids)
        for profile in PROFILES:
            rows = make_pairs(sizes["vocab_size"], profile)
            text = "".join(json.dumps(row) + "\n" for row in rows)
            found, wanted = hashlib.sha256(text.encode()).hexdigest(), SHA256[size, profile]
            if found != wanted:
                raise SystemExit(f"pairs {size} {profile}: sha256 {found}, wanted {wanted}")
            (home / f"{profile}.jsonl").write_text(text)
            means = (f"{k} {statistics.mean(len(row[k]) for row in rows):.1f}" for k in rows[0])
            print(f"{home / profile}.jsonl: {PAIRS} pairs, means: {', '.join(means)}")


def save_tokenizer(home: Path, vocab_size: int, ids: dict[str, int]) -> None:
    """A tokenizer that reads "t5" as token 5, with these special ids (bos, pad, eos)."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    # The unknown word is not in the vocabulary: any other text raises.
    vocabulary = {f"t{i}": i for i in range(vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<none>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(
        [AddedToken(f"t{i}", special=True, normalized=False) for i in ids.values()]
    )
    tokenizer.save(str(home / "tokenizer.json"))
    settings = {
        **{f"{name}_token": f"t{i}" for name, i in ids.items()},
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 1 << 30,
        "clean_up_tokenization_spaces": False,
    }
    (home / "tokenizer_config.json").write_text(json.dumps(settings))


def random_llama(**settings):
    """transformers' Llama with random weights, 8 query heads over 4 key heads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(num_attention_heads=8, num_key_value_heads=4, **settings))


# ----------------------------------------------------------------- a peer, in its own environment


def end_of_step(out: Path, loss: float) -> None:
    """Does what train.py does: a row of OUT/metrics.jsonl and a line on stdout."""
    import torch

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() / 2**30
    row = {"loss": loss, "peak_memory_gib": peak}
    append_row(out / "metrics.jsonl", row)
    print("step", json.dumps(row), file=sys.__stdout__, flush=True)


def watch_trainer(trainer, pairs: list[dict], out: Path) -> None:
    """Makes a trainer derived from transformers' call end_of_step. Stops unless the trainer's rows
    are the pairs, token for token, and its labels are the responses."""
    from transformers import TrainerCallback

    for i, (row, pair) in enumerate(zip(trainer.train_dataset, pairs, strict=True)):
        prompt = pair["prompt_ids"]
        for side in ("chosen", "rejected"):
            response = pair[f"{side}_ids"]
            if "prompt_ids" in row:  # TRL's DPO
                same = row["prompt_ids"] == prompt and row[f"{side}_ids"] == response
            else:
                labels = [-100] * len(prompt) + response
                same = row[f"{side}_input_ids"] == prompt + response
                same = same and row[f"{side}_labels"] == labels
            if not same:
                raise SystemExit(f"row {i}: the trainer's {side} tokens are not the pair's")
    inner, losses = trainer.training_step, []

    def training_step(*args, **kwargs):
        losses.append(inner(*args, **kwargs))
        return losses[-1]

    class EndOfStep(TrainerCallback):
        def on_step_end(self, *_, **__):
            end_of_step(out, float(sum(losses)))  # each is its micro-batch's share of the mean
            losses.clear()

    trainer.training_step = training_step
    trainer.add_callback(EndOfStep())


def trl(a: argparse.Namespace, pairs: list[dict], texts: list[dict], settings: dict) -> None:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    settings |= {"beta": BETA, "max_length": a.max_tokens, "gradient_checkpointing": a.recompute}
    settings |= {"train_sampling_strategy": "sequential"}
    tokenizer = AutoTokenizer.from_pretrained(a.model)
    data = {"train_dataset": Dataset.from_list(texts), "processing_class": tokenizer}
    model = AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.float32)
    if a.job == "trl-orpo":
        trainer = ORPOTrainer(model, args=ORPOConfig(**settings), **data)
    else:
        live, reference = a.job == "trl-dpo", None
        if live:
            reference = AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.float32)
        args = DPOConfig(precompute_ref_log_probs=not live, **settings)
        trainer = DPOTrainer(model, reference, args=args, **data)
    watch_trainer(trainer, pairs, a.out)
    trainer.train()


def llamafactory(
    a: argparse.Namespace, pairs: list[dict], texts: list[dict], settings: dict
) -> None:
    # LLaMA-Factory imports it even for text. `install` removes it.
    sys.modules["torchaudio"] = importlib.util.module_from_spec(ModuleSpec("torchaudio", None))
    from llamafactory.train.dpo.trainer import CustomDPOTrainer
    from llamafactory.train.tuner import run_exp

    inner = CustomDPOTrainer.train

    def train(trainer, *args, **kwargs):
        watch_trainer(trainer, pairs, a.out)
        return inner(trainer, *args, **kwargs)

    CustomDPOTrainer.train = train
    columns = {"file_name": "pairs.json", "ranking": True, "columns": {k: k for k in texts[0]}}
    (a.out / "pairs.json").write_text(json.dumps(texts))
    (a.out / "dataset_info.json").write_text(json.dumps({"pairs": columns}))
    settings |= dict(
        model_name_or_path=str(a.model),
        stage="dpo",
        do_train=True,
        finetuning_type="full",
        pref_beta=BETA,
        pref_loss="orpo" if a.job == "llamafactory-orpo" else "sigmoid",
        dataset="pairs",
        dataset_dir=str(a.out),
        template="empty",
        cutoff_len=MAX_TOKENS,
        disable_shuffling=True,
        disable_gradient_checkpointing=True,
    )
    run_exp(settings)


def liger(a: argparse.Namespace, pairs: list[dict], texts: list[dict], settings: dict) -> None:
    """What a user could write: padded rows through transformers' Llama, then Liger's loss, which
    computes the head in chunks."""
    import torch
    from liger_kernel.chunked_loss import LigerFusedLinearORPOLoss
    from torch.nn.utils.rnn import pad_sequence
    from transformers import AutoModelForCausalLM

    device = "cuda" if a.cuda else "cpu"
    model = AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.float32).to(device).train()
    if a.recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0, fused=True)
    loss_function, losses = LigerFusedLinearORPOLoss(beta=BETA, compiled=a.cuda), []
    for start in range(0, len(pairs), a.micro_batch):
        rows = pairs[start : start + a.micro_batch]
        sides = [
            (row["prompt_ids"], row[k]) for k in ("chosen_ids", "rejected_ids") for row in rows
        ]
        whole = [torch.tensor(prompt + response) for prompt, response in sides]
        masked = [torch.tensor([-100] * len(prompt) + response) for prompt, response in sides]
        tokens = pad_sequence(whole, True).to(device)
        mask = pad_sequence([torch.ones_like(row) for row in whole], True).to(device)
        labels = pad_sequence(masked, True, -100).to(device)
        with torch.autocast(device, torch.bfloat16, enabled=a.dtype == "bf16"):
            output = model.model(input_ids=tokens, attention_mask=mask, use_cache=False)
            hidden = output.last_hidden_state[:, :-1]
            loss, _ = loss_function(model.lm_head.weight, hidden, labels[:, 1:])
        loss = loss * a.micro_batch / a.pairs_per_step
        loss.backward()
        losses.append(loss.item())
        if len(losses) < a.pairs_per_step // a.micro_batch:
            continue
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        end_of_step(a.out, sum(losses))
        losses.clear()


def one(a: argparse.Namespace) -> None:
    """A peer in this process, on exactly the pairs that its steps take: a trainer tokenizes all the
    pairs that it is given."""
    a.out.mkdir(parents=True)
    sys.stdout = sys.stderr  # trainers print much
    program = a.job.split("-")[0]
    package = "liger-kernel" if program == "liger" else program
    known = sorted({"torch", "transformers", PEERS[a.job], package})
    versions = {name: importlib.metadata.version(name) for name in known}
    (a.out / "config.json").write_text(json.dumps({"versions": versions}))
    rows = read_rows(a.data)
    pairs = [rows[i % len(rows)] for i in range(a.steps * a.pairs_per_step)]

    def text(row: dict, side: str) -> str:
        return " " * (side != "prompt") + " ".join(f"t{i}" for i in row[f"{side}_ids"])

    texts = [{side: text(row, side) for side in SIDES} for row in pairs]
    settings = dict(  # of transformers' trainer
        output_dir=str(a.out / "trainer"),
        per_device_train_batch_size=a.micro_batch,
        gradient_accumulation_steps=a.pairs_per_step // a.micro_batch,
        max_steps=a.steps,
        learning_rate=LR,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        bf16=a.dtype == "bf16",
        use_cpu=not a.cuda,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=0,
    )
    {"trl": trl, "llamafactory": llamafactory, "liger": liger}[program](a, pairs, texts, settings)


# --------------------------------------------------------------------------------------------- runs


def command(
    job: str, home: Path, size: str, profile: str, dtype: str, steps: int, out: Path
) -> list[str]:
    """The words that start a run, ours or a peer's."""
    model = home / size
    if job in PEERS:
        python = home / PEERS[job] / "bin/python"
        words = [python, __file__, "one", job, model, model / f"{profile}.jsonl", dtype, steps, out]
        return [str(word) for word in words]
    words = f"""--no-shuffle --pairs-per-step {PAIRS_PER_STEP} --max-tokens {MAX_TOKENS}
        --beta {BETA} --lr {LR} --warmup-ratio 0 --min-lr-ratio 1 --epochs {steps}
        --max-steps {steps} --precision {dtype} --checkpoint-blocks off --device cpu""".split()
    paths = ["--model", model, "--data", model / f"{profile}.jsonl", "--out", out]
    return train_command(*OURS[job], *paths, *words)


def watch(words: list[str], out: Path, warmup: int, pairs_per_step: int = PAIRS_PER_STEP) -> dict:
    """Runs a trainer that prints a line "step ..." at the end of each step. Measures the steps
    after `warmup`."""

    def tick() -> tuple[float, float, float]:
        """Now; the CPU seconds that the process and the whole machine have used."""
        ticks = Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13]
        own = sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
        return time.perf_counter(), own, cpu_seconds_of_machine()

    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment |= {"TRL_EXPERIMENTAL_SILENCE": "1"}
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        ) as process:
            ticks = [tick() for line in process.stdout if line.startswith("step ")]
        errors.seek(0)
        if process.returncode or len(ticks) <= warmup:
            raise ChildProcessError(
                f"exit code {process.returncode}, {len(ticks)} steps\n{errors.read()[-2000:]}"
            )
    rows, ticks = read_rows(out / "metrics.jsonl"), ticks[warmup - 1 :]
    wall, own, busy = (last - first for first, last in zip(ticks[0], ticks[-1], strict=True))
    seconds = [after[0] - before[0] for before, after in zip(ticks, ticks[1:], strict=False)]
    return {
        "pairs_per_s": pairs_per_step * len(seconds) / wall,
        "s_per_step": statistics.median(seconds),
        "peak_memory_gib": rows[-1]["peak_memory_gib"],
        "other_load": max(0.0, busy - own) / wall,
        "losses": [row["loss"] for row in rows],
        "seconds": seconds,
        "versions": json.loads((out / "config.json").read_text())["versions"],
    }


def run(a: argparse.Namespace) -> int:
    """Runs the chosen trainers in turn, round after round: what slows the machine for an hour slows
    all of them. Exit code 1 if a run failed."""
    jobs = [job for job in a.only if job in OURS or (a.dir / PEERS[job] / "bin/python").exists()]
    for job in a.only:
        if job not in jobs:
            print(f"left out: {job} (not installed)", flush=True)
    failures = 0
    rounds = range(1, a.rounds + 1)
    for number, *setting, job in product(rounds, a.sizes, a.profiles, a.dtypes, jobs):
        warmup, steps = STEPS[setting[0]] if a.steps is None else (1, a.steps)
        key = {"round": number, "setting": setting, "steps": steps, "job": job}
        done = [row for row in read_rows(a.out) if row | key == row]
        while len(done) < 2 and not any(row["other_load"] <= MAX_OTHER_LOAD for row in done):
            with tempfile.TemporaryDirectory() as scratch:
                out = Path(scratch) / "run"
                words = command(job, a.dir, *setting, warmup + steps, out)
                try:
                    found = key | watch(words, out, warmup)
                except ChildProcessError as error:
                    print(f"{job} {' '.join(setting)}: {error}", file=sys.stderr, flush=True)
                    failures += 1
                    break
            done.append(found)
            append_row(a.out, found | {"machine": machine(), "date": str(date.today())})
            print(
                f"round {number} {' '.join(setting)} {job}: {found['pairs_per_s']:.3f} pairs/s, "
                f"{found['peak_memory_gib']:.2f} GiB, first loss {found['losses'][0]:.5f}, "
                f"other load {found['other_load']:.2f}",
                flush=True,
            )
    return min(failures, 1)


def table(a: argparse.Namespace) -> None:
    settings = list(product(a.sizes, a.profiles, a.dtypes))
    try:
        rows = [row for row in read_rows(a.results) if row["job"] in a.only]
        rows = [row for row in rows if tuple(row["setting"]) in settings]
        disturbed = [row for row in rows if row["other_load"] > MAX_OTHER_LOAD]
    except (ValueError, KeyError, TypeError) as error:
        sys.exit(f"benchmark.py: {a.results}: {error!r}; wanted what run wrote to --out")
    if not rows:
        sys.exit(f"benchmark.py: {a.results}: none of these runs in it")
    quiet: dict[tuple, list[dict]] = {(*row["setting"], row["job"]): [] for row in rows}
    for row in rows:
        if row not in disturbed:
            quiet[(*row["setting"], row["job"])].append(row)

    def median(key: tuple, name: str = "pairs_per_s") -> float:
        return statistics.median(row[name] for row in quiet[key])

    def times(key: tuple, job: str) -> str:
        """How many times as fast our `job` is."""
        ours = (*key[:3], job)
        return f"{median(ours) / median(key):.2f}x" if quiet.get(ours) else ""

    print(
        "| model | pairs | dtype | trainer | runs | pairs/s | s/step | peak GiB | first loss | "
        "orpo is | asft is |\n" + "|---" * 11 + "|"
    )
    for key in ((*setting, job) for setting in settings for job in a.only):
        if key not in quiet:
            continue
        of, bold = quiet[key], "**" * (key[3] in OURS)
        print(f"| {' | '.join(key[:3])} | {bold}{key[3]}{bold} | {len(of)} |", end=" ")
        if not of:
            print("none undisturbed |" + " |" * 5)
            continue
        speeds = sorted(row["pairs_per_s"] for row in of)
        print(
            f"{median(key):#.3g} ({speeds[0]:#.3g}-{speeds[-1]:#.3g}) | "
            f"{median(key, 's_per_step'):#.3g} | {median(key, 'peak_memory_gib'):.2f} | "
            f"{of[0]['losses'][0]:.5f} | {times(key, 'orpo')} | {times(key, 'asft')} |"
        )
    shown = ("torch", "trl", "liger-kernel", "llamafactory")
    versions = {f"{k} {v}" for row in rows for k, v in row["versions"].items() if k in shown}
    machines, dates = ({row[name] for row in rows} for name in ("machine", "date"))
    print(
        "\nMedians (minimum-maximum) over runs of the steps after warm-up. Each run is a process, "
        f'with {PAIRS_PER_STEP} pairs a step. Bold: this project. "orpo is", "asft is": how many '
        "times as fast as the row this project's ORPO and ASFT are. Precomputed: without the pass "
        f"before the first step. {len(disturbed)} of {len(rows)} runs do not count, because other "
        f"processes kept more than {MAX_OTHER_LOAD} CPU busy.\n"
        f"Machine: {'; '.join(sorted(machines))}. {', '.join(sorted(versions))}. "
        f"{', '.join(sorted(dates))}."
    )


# ------------------------------------------------------------------------------------------ startup


def startup(a: argparse.Namespace) -> None:
    """train.py as a process, from the command to the end of the first step of a whole run, on pairs
    of texts (the rows of FILE, each with a number, since a text that occurs twice is encoded once)
    or on short pairs of ids."""
    with tempfile.TemporaryDirectory() as scratch:
        data, out = Path(scratch) / "pairs.jsonl", Path(scratch) / "out"
        with open(data, "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in startup_rows(a.file, a.pairs))
        words = train_command("--model", a.model, "--data", data, "--out", out, "--device", "cpu")
        children, busy = resource.RUSAGE_CHILDREN, cpu_seconds_of_machine()
        started = time.perf_counter()
        with open(Path(scratch) / "log.txt", "w") as log:
            process = subprocess.Popen(words, stdout=log, stderr=log)
        while process.poll() is None and not read_rows(out / "metrics.jsonl"):
            time.sleep(0.05)
        seconds = time.perf_counter() - started
        process.kill()
        process.wait()
        rows, said = read_rows(out / "metrics.jsonl"), (Path(scratch) / "log.txt").read_text()
        if not rows:
            raise SystemExit(said[-2000:])
        used = resource.getrusage(children)
        own, busy = used.ru_utime + used.ru_stime, cpu_seconds_of_machine() - busy
        size = data.stat().st_size / 2**20
    print(
        f"{a.pairs:,} pairs, {size:.0f} MiB: {seconds:.1f} s to the end of the first step, which "
        f"took {rows[0]['seconds']:.1f} s; {own:.1f} CPU s; peak memory "
        f"{rows[0]['peak_memory_gib']:.2f} GiB; other load "
        f"{max(0.0, busy - own) / seconds:.2f}. {machine()}"
    )


def startup_rows(path: Path | None, pairs: int) -> Iterator[dict]:
    """Pairs of 10 to 20 ids a part, or the rows of a file with a prompt as text, as UltraFeedback
    has them."""
    if path is None:
        rng = random.Random(0)
        keys = [f"{side}_ids" for side in SIDES]
        for _ in range(pairs):
            yield {key: rng.choices(range(500), k=rng.randint(10, 20)) for key in keys}
        return

    def text(value: str | list[dict]) -> str:  # of messages, the last one's
        return value if isinstance(value, str) else value[-1]["content"]

    rows = read_rows(path)
    for i in range(pairs):
        yield {side: f"{text(rows[i % len(rows)][side])} {i}" for side in SIDES}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands, of = parser.add_subparsers(required=True), {}
    for function in (install, prepare, one, run, table, startup):
        of[function] = commands.add_parser(function.__name__)
        of[function].set_defaults(function=function)

    def positional(function, **kinds) -> None:
        for name, kind in kinds.items():
            of[function].add_argument(name, type=kind)

    def choices(function, **known) -> None:
        """Flags that take a comma-separated part of what is known; all of it by default."""
        for name, values in known.items():
            how = {"default": list(values), "type": lambda text: text.split(",")}
            of[function].add_argument(f"--{name}", help=",".join(values), **how)

    for function in (install, prepare, run):
        positional(function, dir=Path)
    positional(one, job=str, model=Path, data=Path, dtype=str, steps=int, out=Path)
    positional(startup, model=Path)
    of[startup].add_argument("file", type=Path, nargs="?", help="pairs of texts [short ids]")
    positional(table, results=Path)
    of[install].add_argument("--llamafactory", action="store_true")
    of[one].add_argument("--pairs-per-step", type=int, default=PAIRS_PER_STEP)
    of[one].add_argument("--micro-batch", type=int, default=PAIRS_PER_STEP, help="pairs at once")
    of[one].add_argument("--max-tokens", type=int, default=MAX_TOKENS)
    of[one].add_argument("--recompute", action="store_true", help="each block, in backward")
    of[one].add_argument("--cuda", action="store_true")
    of[run].add_argument("--out", type=Path, required=True, help="one JSON line a run, appended")
    of[run].add_argument("--rounds", type=int, default=3)
    of[run].add_argument(
        "--steps", type=int, help="measured, after one of warm-up: to try it (use another --out)"
    )
    for function in (run, table):
        choices(function, sizes=SIZES, profiles=PROFILES, dtypes=DTYPES, only=JOBS)
    of[startup].add_argument("--pairs", type=int, required=True)
    a = parser.parse_args()
    return a.function(a) or 0


if __name__ == "__main__":
    sys.exit(main())
