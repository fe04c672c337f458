"""Steps of this project and of its peers, timed side by side on a CPU (Linux). Run by hand; pytest does not collect it.

    python tests/benchmark.py install DIR                   DIR/trl: TRL and Liger, pinned
    python tests/benchmark.py install DIR --llamafactory    DIR/llamafactory: LLaMA-Factory, pinned
    python tests/benchmark.py prepare DIR                   DIR/S, DIR/M: random models, tokenizers, pairs
    python tests/benchmark.py run DIR --out results.jsonl   every run, interleaved; started again, it goes on
    python tests/benchmark.py table results.jsonl           the table, in markdown
    python tests/benchmark.py generate DIR                  answers: eval.py's generate beside transformers'
    python tests/benchmark.py startup TOKENIZER_DIR FILE    reading, checking and encoding 60,000 pairs of real text

Wants both requirements.txt installed; a peer that is not installed is left out. In reading order: what is compared
(SIZES, PROFILES, OURS, PEERS); install; make_pairs, prepare; trl, llamafactory, liger, one (a peer in its own
interpreter); watch, run (one process per run, timed from outside, ours and theirs alike); table.

The same for all: the weights (fp32), the tokens (compared row by row before a peer trains), the pairs of each step (4,
in the file's order), AdamW at a constant 3e-4, no weight decay, gradients clipped to norm 1, beta 0.1, no gradient
checkpointing. bf16 is that of matrix products: --precision bf16 here, autocast there.

A step lasts from the end of one update to the end of the next: collation and logging count; loading, saving and the
reference pass before the first step (dpo-precomputed) do not. Memory is the process's largest resident set up to the
last step. One busy neighbour makes a step several times slower (OpenMP threads wait for each other), so what else kept
the CPUs busy is measured with each run; a run beside more than MAX_OTHER_LOAD is repeated once, and does not count.

Left out: GPUs, several processes, evaluation.
"""

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from datetime import date
from importlib.machinery import ModuleSpec
from itertools import product
from pathlib import Path

# Other packages are imported where they are used: a process's peak memory begins with its parent's, which stays small.

PAIRS, PAIRS_PER_STEP, MAX_TOKENS, LR, BETA, MAX_OTHER_LOAD = 128, 4, 512, 3e-4, 0.1, 0.25
STEPS = {"S": (3, 20), "M": (1, 5)}  # of warm-up, and measured
SIZES = {
    "S": {"vocab_size": 8192, "hidden_size": 256, "num_hidden_layers": 4, "intermediate_size": 688},
    "M": {
        "vocab_size": 128256,
        "hidden_size": 512,
        "num_hidden_layers": 8,
        "intermediate_size": 1408,
    },
}
# Lengths are log-normal: medians of prompt, chosen and rejected in tokens, sigmas of prompts and of responses.
PROFILES = {
    "uf": ((120, 200, 200), (0.7, 0.6)),  # like UltraFeedback: means 140, 202, 206
    "hh": ((93, 29, 33), (1.0, 0.9)),
}  # like HH-RLHF: means 123, 41, 51
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
PEERS = {  # the virtual environment; liger-orpo is no trainer but LigerFusedLinearORPOLoss in a plain loop
    "trl-orpo": "trl",
    "trl-dpo": "trl",
    "trl-dpo-precomputed": "trl",
    "liger-orpo": "trl",
    "llamafactory-orpo": "llamafactory",
    "llamafactory-dpo": "llamafactory",
}
JOBS = [*OURS, *PEERS]
PINNED = {
    "trl": [
        "trl==1.16.0",
        "transformers==5.23.0",
        "accelerate==1.15.0",
        "datasets==5.2.0",
        "peft==0.21.2",
        "safetensors==0.8.0",
        "tokenizers==0.23.3",
        "liger-kernel==0.8.5",
    ],
    "llamafactory": ["llamafactory==0.9.5"],
}  # which itself pins transformers, trl and so on


def install(a: argparse.Namespace) -> None:
    """A peer's virtual environment. A constraint keeps its packages from replacing torch by another build."""
    name = "llamafactory" if a.llamafactory else "trl"
    python, constraints = str(a.dir / name / "bin/python"), a.dir / name / "constraints.txt"
    pip = [python, "-m", "pip", "-q"]
    subprocess.run([sys.executable, "-m", "venv", a.dir / name], check=True)
    subprocess.run([*pip, "install", "torch==2.13.0", "numpy"], check=True)
    version = subprocess.check_output(
        [python, "-c", "import torch; print(torch.__version__)"], text=True
    )
    constraints.write_text(f"torch=={version}")
    subprocess.run([*pip, "install", "-c", constraints, *PINNED[name]], check=True)
    if (
        a.llamafactory
    ):  # these wheels want CUDA, and break `import transformers` beside a torch without
        subprocess.run([*pip, "uninstall", "-y", "torchvision", "torchaudio"], check=True)


# ---------------------------------------------------------------------------------------------------- pairs and weights


def specials(vocab_size: int) -> dict[str, int]:
    """Special ids where Llama 3 has them, counted from the end of the vocabulary; the ids below are words."""
    return {"bos": vocab_size - 256, "pad": vocab_size - 252, "eos": vocab_size - 247}


def make_pairs(vocab_size: int, profile: str) -> list[dict[str, list[int]]]:
    """Rows of prompt_ids (from BOS on), chosen_ids and rejected_ids (to EOS): nothing is left to a template or cut."""
    import numpy as np

    ids, n_words, rng = (
        specials(vocab_size),
        vocab_size - 256,
        np.random.Generator(np.random.PCG64(0)),
    )
    medians, (prompt_sigma, response_sigma) = PROFILES[profile]
    # Lengths come before anything that depends on the vocabulary: the same for S and M. The two responses' lengths
    # correlate (rho 0.5), as those of two answers to one question do.
    prompt_lengths = np.rint(
        np.exp(math.log(medians[0]) + prompt_sigma * rng.standard_normal(PAIRS))
    )
    shared, own = rng.standard_normal(PAIRS), rng.standard_normal((2, PAIRS))
    z = math.sqrt(0.5) * shared + math.sqrt(0.5) * own
    response_lengths = np.rint(np.exp(np.log(medians[1:])[:, None] + response_sigma * z)).clip(8)
    good, bad = rng.permutation(n_words), rng.permutation(n_words)
    cdf = np.cumsum(1.0 / (np.arange(n_words) + 10.0))
    cdf /= cdf[-1]

    def draw(words, k: int):  # by Zipf's law; by inverse CDF, which no version of numpy changes
        return words[np.searchsorted(cdf, rng.random(k), side="right").clip(0, n_words - 1)]

    rows = []
    for length, of_pair in zip(
        prompt_lengths.clip(8, MAX_TOKENS // 2).astype(int), response_lengths.T, strict=True
    ):
        n_chosen, n_rejected = of_pair.clip(max=MAX_TOKENS - length).astype(int)
        prompt, chosen = draw(good, length - 1), draw(good, n_chosen - 1)
        # Every other word of a rejected answer is from another distribution: something to learn, not at once.
        rejected = np.where(
            np.arange(n_rejected - 1) % 2 == 0,
            draw(good, n_rejected - 1),
            draw(bad, n_rejected - 1),
        )
        rows.append(
            {
                "prompt_ids": [ids["bos"], *prompt.tolist()],
                "chosen_ids": [*chosen.tolist(), ids["eos"]],
                "rejected_ids": [*rejected.tolist(), ids["eos"]],
            }
        )
    return rows


def prepare(a: argparse.Namespace) -> None:
    """Hugging Face directories DIR/SIZE, in which the word "t5" is token 5, and their pairs, DIR/SIZE/PROFILE.jsonl."""
    import torch
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM

    for size, shape in SIZES.items():
        home, ids = a.dir / size, specials(shape["vocab_size"])
        torch.manual_seed(0)
        LlamaForCausalLM(
            LlamaConfig(
                **shape,
                num_attention_heads=8,
                num_key_value_heads=4,
                max_position_embeddings=8192,
                rms_norm_eps=1e-5,
                rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
                tie_word_embeddings=False,
                initializer_range=0.02,
                **{f"{name}_token_id": i for name, i in ids.items()},
            )
        ).float().save_pretrained(home)
        # No unknown word: text that is not made of words raises.
        words = models.WordLevel(
            {f"t{i}": i for i in range(shape["vocab_size"])}, unk_token="<none>"
        )
        tokenizer = Tokenizer(words)
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer.add_special_tokens(
            [AddedToken(f"t{i}", special=True, normalized=False) for i in ids.values()]
        )
        tokenizer.save(str(home / "tokenizer.json"))
        (home / "tokenizer_config.json").write_text(
            json.dumps(
                {
                    **{f"{name}_token": f"t{i}" for name, i in ids.items()},
                    "tokenizer_class": "PreTrainedTokenizerFast",
                    "model_max_length": 1 << 30,
                    "clean_up_tokenization_spaces": False,
                }
            )
        )
        for profile in PROFILES:
            rows = make_pairs(shape["vocab_size"], profile)
            text = "".join(json.dumps(row) + "\n" for row in rows)
            if (found := hashlib.sha256(text.encode()).hexdigest()) != SHA256[size, profile]:
                raise SystemExit(
                    f"pairs {size} {profile}: sha256 {found}, wanted {SHA256[size, profile]}"
                )
            (home / f"{profile}.jsonl").write_text(text)
            means = (f"{k} {statistics.mean(len(row[k]) for row in rows):.1f}" for k in rows[0])
            print(f"{home / profile}.jsonl: {PAIRS} pairs, means: {', '.join(means)}")


# --------------------------------------------------------------------------------------- a peer, in its own interpreter


def end_of_step(out: Path, loss: float) -> None:
    """What train.py does: a row of OUT/metrics.jsonl, a line on stdout."""
    row = {
        "loss": loss,
        "peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }
    with open(out / "metrics.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")
    print("step", json.dumps(row), file=sys.__stdout__, flush=True)


def watch_trainer(trainer, pairs: list[dict], out: Path) -> None:
    """Raises unless the trainer's rows are the pairs, token for token, and its labels are the responses. Then makes a
    trainer derived from transformers' call end_of_step."""
    from transformers import TrainerCallback

    for i, (row, pair) in enumerate(zip(trainer.train_dataset, pairs, strict=True)):
        for side in ("chosen", "rejected"):
            prompt, response = pair["prompt_ids"], pair[f"{side}_ids"]
            if "prompt_ids" in row:  # TRL's DPO
                same = (row["prompt_ids"], row[f"{side}_ids"]) == (prompt, response)
            else:
                same = (
                    row[f"{side}_input_ids"] == prompt + response
                    and row[f"{side}_labels"] == [-100] * len(prompt) + response
                )
            if not same:
                raise SystemExit(f"row {i}: the trainer's {side} tokens are not the pair's")
    inner, losses = trainer.training_step, []

    def training_step(*args, **kwargs):
        losses.append(inner(*args, **kwargs))
        return losses[-1]

    trainer.training_step = training_step
    trainer.add_callback(
        type(
            "EndOfStep",
            (TrainerCallback,),
            {"on_step_end": lambda *_, **__: end_of_step(out, float(losses[-1]))},
        )()
    )


def trl(a: argparse.Namespace, pairs: list[dict], texts: list[dict], settings: dict) -> None:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    settings |= {
        "beta": BETA,
        "max_length": MAX_TOKENS,
        "gradient_checkpointing": False,
        "train_sampling_strategy": "sequential",
    }
    data = {
        "train_dataset": Dataset.from_list(texts),
        "processing_class": AutoTokenizer.from_pretrained(a.model),
    }
    model, reference = (
        AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.float32) if wanted else None
        for wanted in (True, a.job == "trl-dpo")
    )
    if a.job == "trl-orpo":
        trainer = ORPOTrainer(model, args=ORPOConfig(**settings), **data)
    else:
        args = DPOConfig(precompute_ref_log_probs=reference is None, **settings)
        trainer = DPOTrainer(model, reference, args=args, **data)
    watch_trainer(trainer, pairs, a.out)
    trainer.train()


def llamafactory(
    a: argparse.Namespace, pairs: list[dict], texts: list[dict], settings: dict
) -> None:
    # Imported even for text, and not installed (install).
    sys.modules["torchaudio"] = importlib.util.module_from_spec(ModuleSpec("torchaudio", None))
    from llamafactory.train.dpo.trainer import CustomDPOTrainer
    from llamafactory.train.tuner import run_exp

    inner = CustomDPOTrainer.train

    def train(trainer, *args, **kwargs):
        watch_trainer(trainer, pairs, a.out)
        return inner(trainer, *args, **kwargs)

    CustomDPOTrainer.train = train
    (a.out / "pairs.json").write_text(json.dumps(texts))
    (a.out / "dataset_info.json").write_text(
        json.dumps(
            {
                "pairs": {
                    "file_name": "pairs.json",
                    "ranking": True,
                    "columns": {k: k for k in texts[0]},
                }
            }
        )
    )
    run_exp(
        settings
        | dict(
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
    )


def liger(a: argparse.Namespace, pairs: list[dict], texts: list[dict], settings: dict) -> None:
    """What a user could write: a padded block through transformers' Llama, then Liger's loss, which chunks the head."""
    import torch
    from liger_kernel.chunked_loss import LigerFusedLinearORPOLoss
    from torch.nn.utils.rnn import pad_sequence
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0, fused=True)
    loss_function = LigerFusedLinearORPOLoss(beta=BETA, compiled=False)
    for start in range(0, len(pairs), PAIRS_PER_STEP):
        rows = pairs[start : start + PAIRS_PER_STEP]
        sides = [
            (row["prompt_ids"], row[k]) for k in ("chosen_ids", "rejected_ids") for row in rows
        ]
        tokens, mask = (
            pad_sequence([x(torch.tensor(prompt + response)) for prompt, response in sides], True)
            for x in (torch.clone, torch.ones_like)
        )
        labels = pad_sequence(
            [torch.tensor([-100] * len(prompt) + response) for prompt, response in sides],
            True,
            -100,
        )
        with torch.autocast("cpu", torch.bfloat16, enabled=a.dtype == "bf16"):
            hidden = model.model(
                input_ids=tokens, attention_mask=mask, use_cache=False
            ).last_hidden_state
            loss, _ = loss_function(model.lm_head.weight, hidden[:, :-1], labels[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        end_of_step(a.out, loss.item())


def one(a: argparse.Namespace) -> None:
    """A peer in this process, on exactly the pairs that its steps take: trainers tokenise all they are given."""
    a.out.mkdir(parents=True)
    sys.stdout = sys.stderr  # trainers print much
    known = {
        "torch",
        "transformers",
        PEERS[a.job],
        a.job.split("-")[0] + ("-kernel" if "liger" in a.job else ""),
    }
    versions = {name: importlib.metadata.version(name) for name in sorted(known)}
    (a.out / "config.json").write_text(json.dumps({"versions": versions}))
    rows = [json.loads(line) for line in (a.model / f"{a.profile}.jsonl").read_text().splitlines()]
    pairs = [rows[i % PAIRS] for i in range(a.steps * PAIRS_PER_STEP)]
    texts = [
        {
            side: " " * (side != "prompt") + " ".join(f"t{i}" for i in row[f"{side}_ids"])
            for side in ("prompt", "chosen", "rejected")
        }
        for row in pairs
    ]
    settings = dict(  # of transformers' trainer
        output_dir=str(a.out / "trainer"),
        per_device_train_batch_size=PAIRS_PER_STEP,
        max_steps=a.steps,
        learning_rate=LR,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        bf16=a.dtype == "bf16",
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=0,
    )
    {"trl": trl, "llamafactory": llamafactory, "liger": liger}[a.job.split("-")[0]](
        a, pairs, texts, settings
    )


# ----------------------------------------------------------------------------------------------------------------- runs


def command(
    job: str, home: Path, size: str, profile: str, dtype: str, steps: int, out: Path
) -> list[str]:
    if job in PEERS:
        words = [
            home / PEERS[job] / "bin/python",
            __file__,
            "one",
            job,
            home / size,
            profile,
            dtype,
            steps,
            out,
        ]
    else:
        words = [
            sys.executable,
            Path(__file__).resolve().parent.parent / "train.py",
            *OURS[job],
            "--beta",
            BETA,
            "--model",
            home / size,
            "--data",
            home / size / f"{profile}.jsonl",
            "--out",
            out,
            "--no-shuffle",
            "--pairs-per-step",
            PAIRS_PER_STEP,
            "--max-tokens",
            MAX_TOKENS,
            "--lr",
            LR,
            "--warmup-ratio",
            0,
            "--min-lr-ratio",
            1,
            "--epochs",
            steps,
            "--max-steps",
            steps,
            "--precision",
            dtype,
            "--checkpoint-blocks",
            "off",
            "--device",
            "cpu",
        ]
    return [str(word) for word in words]


def watch(words: list[str], out: Path, warmup: int) -> dict:
    """Runs a trainer that prints a line "step ..." at the end of each step, and measures the steps after `warmup`."""

    def tick() -> tuple[float, ...]:
        """Now, and the seconds of CPU that the process and the whole machine (stolen ones too) have spent."""
        own = Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13]
        user, nice, system, _idle, _io, *rest = (
            Path("/proc/stat").read_text().split(maxsplit=9)[1:9]
        )
        spent = (
            sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
            for ticks in (own, (user, nice, system, *rest))
        )
        return time.perf_counter(), *spent

    environment = {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRL_EXPERIMENTAL_SILENCE": "1",
    }
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=errors, text=True, env=os.environ | environment
        ) as process:
            ticks = [tick() for line in process.stdout if line.startswith("step ")]
        errors.seek(0)
        if process.returncode or len(ticks) <= warmup:
            raise ChildProcessError(
                f"exit code {process.returncode}, {len(ticks)} steps\n{errors.read()[-2000:]}"
            )
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    wall, own, busy = (
        after - before for before, after in zip(ticks[warmup - 1], ticks[-1], strict=True)
    )
    seconds = [
        after[0] - before[0]
        for before, after in zip(ticks[warmup - 1 :], ticks[warmup:], strict=False)
    ]
    return {
        "pairs_per_s": PAIRS_PER_STEP * len(seconds) / wall,
        "s_per_step": statistics.median(seconds),
        "peak_memory_gib": rows[-1]["peak_memory_gib"],
        "other_load": max(0.0, busy - own) / wall,
        "losses": [row["loss"] for row in rows],
        "seconds": seconds,
        "versions": json.loads((out / "config.json").read_text())["versions"],
    }


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{cpu}, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB"


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run(a: argparse.Namespace) -> int:
    """Rounds over all that is chosen, trainer after trainer: what slows the machine for an hour touches all alike."""
    jobs = [job for job in a.only if job in OURS or (a.dir / PEERS[job] / "bin/python").exists()]
    print(
        *(f"left out: {job} (not installed)\n" for job in a.only if job not in jobs),
        sep="",
        end="",
        flush=True,
    )
    failures = 0
    for round_, *setting, job in product(
        range(1, a.rounds + 1), a.sizes, a.profiles, a.dtypes, jobs
    ):
        warmup, steps = STEPS[setting[0]] if a.steps is None else (1, a.steps)
        key = {"round": round_, "setting": setting, "steps": steps, "job": job}
        done = [row for row in read(a.out) if row | key == row]
        while len(done) < 2 and not any(row["other_load"] <= MAX_OTHER_LOAD for row in done):
            with tempfile.TemporaryDirectory() as scratch:
                out = Path(scratch) / "run"
                try:
                    done.append(
                        key | watch(command(job, a.dir, *setting, warmup + steps, out), out, warmup)
                    )
                except ChildProcessError as error:
                    print(f"{job} {' '.join(setting)}: {error}", file=sys.stderr, flush=True)
                    failures += 1
                    break
            with open(a.out, "a") as file:
                file.write(
                    json.dumps(done[-1] | {"machine": machine(), "date": str(date.today())}) + "\n"
                )
            print(
                f"round {round_}",
                *setting,
                "{job}: {pairs_per_s:.3f} pairs/s, {peak_memory_gib:.2f} GiB, "
                "first loss {losses[0]:.5f}, other load {other_load:.2f}".format(**done[-1]),
                flush=True,
            )
    return min(failures, 1)


def table(a: argparse.Namespace) -> None:
    rows = [row for row in read(a.results) if row["job"] in a.only]
    rows = [row for row in rows if tuple(row["setting"]) in product(a.sizes, a.profiles, a.dtypes)]
    quiet: dict[tuple, list[dict]] = {}
    for row in rows:
        quiet.setdefault((*row["setting"], row["job"]), []).extend(
            [row] * (row["other_load"] <= MAX_OTHER_LOAD)
        )

    def median(key: tuple, name: str = "pairs_per_s") -> float:
        return statistics.median(row[name] for row in quiet[key])

    print(
        "| model | pairs | dtype | trainer | runs | pairs/s | s/step | peak GiB | first loss | orpo is | asft is |"
    )
    print("|---" * 11 + "|")
    for key in (key for key in product(a.sizes, a.profiles, a.dtypes, a.only) if key in quiet):
        of, bold = quiet[key], "**" * (key[3] in OURS)
        print(f"| {' | '.join(key[:3])} | {bold}{key[3]}{bold} | {len(of)} |", end=" ")
        if not of:
            print("none undisturbed |" + " |" * 5)
            continue
        speeds = sorted(row["pairs_per_s"] for row in of)
        times = (
            f"{median(ours) / median(key):.2f}x" if quiet.get(ours) else ""
            for ours in ((*key[:3], "orpo"), (*key[:3], "asft"))
        )
        print(
            f"{median(key):#.3g} ({speeds[0]:#.3g}-{speeds[-1]:#.3g}) | {median(key, 's_per_step'):#.3g} | "
            f"{median(key, 'peak_memory_gib'):.2f} | {of[0]['losses'][0]:.5f} | {' | '.join(times)} |"
        )
    versions = {
        f"{name} {version}"
        for row in rows
        for name, version in row["versions"].items()
        if name in ("torch", "trl", "liger-kernel", "llamafactory")
    }
    print(f"""
Medians (minimum-maximum) over runs, each a process, of the steps after warm-up; {PAIRS_PER_STEP} pairs a step. Bold: \
this project; "orpo is", "asft is": its speed as a multiple of the row's. Precomputed: without the pass before the \
first step. {sum(row["other_load"] > MAX_OTHER_LOAD for row in rows)} of {len(rows)} runs, beside another load of more \
than {MAX_OTHER_LOAD} CPU, do not count.
Machine: {"; ".join(sorted({row["machine"] for row in rows}))}. {", ".join(sorted(versions))}. \
{", ".join(sorted({row["date"] for row in rows}))}.""")


# ----------------------------------------------------------------------------------------------------------- generation

GENERATE_SIZES = {  # 0.9 and 53 million parameters
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "intermediate_size": 352,
    },
    "mid": {
        "vocab_size": 32000,
        "hidden_size": 512,
        "num_hidden_layers": 7,
        "intermediate_size": 1408,
    },
}


def generate(a: argparse.Namespace) -> None:
    """Tokens per second of greedy answers, both programs on the same weights (fp32) and prompts. One process for each
    run, by turns; in it a short run to warm up, then the one that is timed, from token ids to token ids.

    Prompts are as long as those of PROFILES["uf"]. equal: each answer has 128 tokens, and no stop token. unequal: an
    answer has from 16 to 240, 128 on average, as if a stop token had come: our requests' own limits; there a stopping
    criterion, which tells the rows apart. The tokens of both programs are compared.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    for size, shape in GENERATE_SIZES.items():
        if not (a.dir / f"generate-{size}").exists():
            torch.manual_seed(0)
            config = LlamaConfig(
                **shape,
                num_attention_heads=8,
                num_key_value_heads=4,
                max_position_embeddings=2048,
                initializer_range=0.05,
            )
            LlamaForCausalLM(config).save_pretrained(a.dir / f"generate-{size}")
    runs: dict[tuple, dict[str, list]] = {}
    settings = [x for x in product(a.sizes, a.batches, a.answers) if x[1:] != ("1", "unequal")]
    for _, setting, program in product(range(a.rounds), settings, ("ours", "transformers")):
        words = [
            sys.executable,
            __file__,
            "generate_one",
            program,
            a.dir / f"generate-{setting[0]}",
            *setting[1:],
        ]
        found = json.loads(
            subprocess.check_output(list(map(str, words)), stderr=subprocess.DEVNULL)
        )
        runs.setdefault(setting, {}).setdefault(program, []).append(found)
        print(*setting, program, found, flush=True)
    print(
        "\n| model | batch | answers | ours, tokens/s | transformers | ratio | ratio of CPU seconds | same tokens | "
        "most other load |\n" + "|---" * 9 + "|"
    )
    for setting, of in runs.items():
        speeds, cpu = (
            {name: statistics.median(run[key] for run in found) for name, found in of.items()}
            for key in ("tokens_per_s", "cpu_s")
        )
        hashes = {run["hash"] for found in of.values() for run in found}
        load = max(run["other_load"] for found in of.values() for run in found)
        print(
            f"| {' | '.join(map(str, setting))} | {speeds['ours']:,.0f} | {speeds['transformers']:,.0f} | "
            f"{speeds['ours'] / speeds['transformers']:.2f} | {cpu['transformers'] / cpu['ours']:.2f} | "
            f"{len(hashes) == 1} | {load:.2f} |"
        )
    print(
        f"\nMedians of {a.rounds}. {machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}."
    )


def generate_one(a: argparse.Namespace) -> None:
    import numpy as np

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import torch
    from transformers import AutoModelForCausalLM, StoppingCriteria

    import eval as evaluation  # first, since it sets how threads wait
    from model import load_model

    rng, vocab_size = (
        np.random.default_rng(0),
        json.loads((a.model / "config.json").read_text())["vocab_size"],
    )
    (median, *_), (sigma, _) = PROFILES["uf"]
    lengths = (
        np.exp(math.log(median) + sigma * rng.standard_normal(a.batch))
        .astype(int)
        .clip(8, MAX_TOKENS)
    )
    prompts = [rng.integers(0, vocab_size, n).tolist() for n in lengths]
    limits = [128] * a.batch if a.answers == "equal" else rng.integers(16, 241, a.batch).tolist()
    if a.program == "ours":
        model = load_model(a.model).requires_grad_(False)
        model.pack_linears()

        def answer(limits: list[int]) -> list[list[int]]:
            requests = [
                evaluation.Request(i, p, 0.0, n)
                for i, (p, n) in enumerate(zip(prompts, limits, strict=True))
            ]
            found = {i: new for i, new, _ in evaluation.generate(model, requests, frozenset())}
            return [found[i] for i in range(a.batch)]
    else:
        model, longest = (
            AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.float32),
            max(map(len, prompts)),
        )
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])

        class Limits(StoppingCriteria):
            def __init__(self, limits: list[int]):
                self.limits = torch.tensor(limits)

            def __call__(self, ids, scores, **_):
                return ids.shape[1] - longest >= self.limits

        def answer(limits: list[int]) -> list[list[int]]:
            out = model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=max(limits),
                do_sample=False,
                pad_token_id=0,
                eos_token_id=None,
                stopping_criteria=[Limits(limits)],
            )[:, longest:].tolist()
            return [new[:n] for new, n in zip(out, limits, strict=True)]

    def seconds() -> tuple[float, float, float]:
        """Now; of CPU, this process's and the whole machine's (stolen ones too)."""
        user, nice, system, _idle, _io, *rest = (
            Path("/proc/stat").read_text().split(maxsplit=9)[1:9]
        )
        spent = sum(map(int, (user, nice, system, *rest))) / os.sysconf("SC_CLK_TCK")
        return time.perf_counter(), time.process_time(), spent

    answer([4] * a.batch)
    before = seconds()
    found = answer(limits)
    wall, own, busy = (x - y for x, y in zip(seconds(), before, strict=True))
    print(
        json.dumps(
            {
                "tokens_per_s": round(sum(limits) / wall, 1),
                "other_load": round(max(0.0, busy - own) / wall, 2),
                "hash": hashlib.sha256(json.dumps(found).encode()).hexdigest()[:8],
                "cpu_s": round(own, 2),
            }
        )
    )


def startup(a: argparse.Namespace) -> None:
    """All that train.py does with a file of preferences before the first step, on the file's own rows over and over."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from data import ChatFormat, encode_preferences, read_preferences

    lines = a.file.read_bytes().splitlines(keepends=True)
    with tempfile.NamedTemporaryFile(suffix=".jsonl") as file:
        for i in range(a.pairs):
            file.write(lines[i % len(lines)])
        file.flush()
        before, started = (
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
            time.perf_counter(),
        )
        preferences = read_preferences(file.name)
        read_at = time.perf_counter()
        # No text twice, for what occurs twice is encoded once.
        preferences = [
            replace(
                p,
                prompt=[(role, f"{text} {i}") for role, text in p.prompt],
                chosen=f"{p.chosen} {i}",
                rejected=f"{p.rejected} {i}",
            )
            for i, p in enumerate(preferences)
        ]
        pairs = encode_preferences(preferences, ChatFormat(a.tokenizer), 2048)
        encoded_at, size = time.perf_counter(), file.tell() / 2**20
    tokens = sum(pair.packed_tokens() for pair in pairs)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{a.pairs:,} rows, {size:.0f} MiB: read and checked in {read_at - started:.1f} s, encoded in "
        f"{encoded_at - read_at:.1f} s ({len(pairs):,} pairs, {tokens:,} tokens); peak memory {peak:.2f} GiB, of "
        f"which {before:.2f} before. {machine()}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    of = {
        function: commands.add_parser(function.__name__)
        for function in (install, prepare, one, run, table, generate, generate_one, startup)
    }
    for function, sub in of.items():
        sub.set_defaults(function=function)
        if function in (install, prepare, run, generate):
            sub.add_argument("dir", type=Path)
    of[install].add_argument("--llamafactory", action="store_true")
    for name, kind in {
        "job": str,
        "model": Path,
        "profile": str,
        "dtype": str,
        "steps": int,
        "out": Path,
    }.items():
        of[one].add_argument(name, type=kind)
    of[run].add_argument("--out", type=Path, required=True, help="one JSON line a run, appended")
    of[run].add_argument("--rounds", type=int, default=3)
    of[run].add_argument(
        "--steps", type=int, help="measured, after one of warm-up: for a trial (another --out)"
    )
    of[table].add_argument("results", type=Path)
    for sub, (flag, known) in product(
        (of[run], of[table]),
        {"--sizes": SIZES, "--profiles": PROFILES, "--dtypes": DTYPES, "--only": JOBS}.items(),
    ):
        sub.add_argument(
            flag, default=list(known), type=lambda text: text.split(","), help=",".join(known)
        )
    of[generate].add_argument("--rounds", type=int, default=3)
    for flag, known in {
        "--sizes": GENERATE_SIZES,
        "--batches": ["32", "1"],
        "--answers": ["equal", "unequal"],
    }.items():
        of[generate].add_argument(flag, default=list(known), type=lambda text: text.split(","))
    of[startup].add_argument("tokenizer", type=Path)
    of[startup].add_argument("file", type=Path)
    of[startup].add_argument("--pairs", type=int, default=60_000)
    for name, kind in {"program": str, "model": Path, "batch": int, "answers": str}.items():
        of[generate_one].add_argument(name, type=kind)
    a = parser.parse_args()
    return a.function(a) or 0


if __name__ == "__main__":
    sys.exit(main())
