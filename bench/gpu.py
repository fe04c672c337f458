"""What a GPU is wanted for, measured part by part. Run by hand; pytest runs a few parts small, on the CPU.

    python tests/gpu.py all --minutes 25      every part, the most important first; what fails is noted and passed over
    python tests/gpu.py all --small           the same in tiny sizes, to see that it works (implied without a GPU)
    python tests/gpu.py compile               compilations over five lengths; a step compiled and eager
    python tests/gpu.py step                  steps of a random Llama-3-8B, and where their time goes; DPO on a 3B
    python tests/gpu.py end-to-end            the example; a run killed and resumed; 8B trained, exported, loaded
    python tests/gpu.py step-uf-8192          one part: a name, or how several begin

Each part is a process, and adds its figures to --out as soon as it has them. Models, pairs and the figures of finished
parts lie in --scratch, where another call goes on: 25 GB, and up to 20 more at times. In reading order: what is
measured (SHAPES, LENGTHS, STEPS); make_model, make_pairs; prepare, compile_blocks, profile (in this process, by
train.py's own functions); train, step (train.py as a process); example, resume, whole (end to end); PARTS, main.

Figures of steps are medians after WARMUP steps. MFU: train.py's forward_flops, times 3, of the tokens that ran; what is
computed twice counts once. "padded": the same pairs in groups of four, every sequence as long as the group's longest
(by longer responses, so that pads pass through the head as well), no prompt shared: what a trainer that pads computes.

Left out: other trainers; several GPUs. Correctness on CUDA is in test_cuda.py.
"""

import argparse
import dataclasses
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

import model as of_model  # noqa: E402
import train as of_train  # noqa: E402
from data import Pair  # noqa: E402
from model import LlamaConfig, expected_shapes  # noqa: E402

IDS = {"bos_token_id": 128000, "eos_token_id": (128001, 128009)}
SHAPES = {  # vocabulary, width, feed-forward, layers, heads, key/value heads, head size, context
    "8B": LlamaConfig(128256, 4096, 14336, 32, 32, 8, 128, 8192, **IDS),
    "3B": LlamaConfig(128256, 3072, 8192, 28, 24, 8, 128, 8192, tie_word_embeddings=True, **IDS),
    "1B": LlamaConfig(128256, 2048, 8192, 16, 32, 8, 64, 8192, tie_word_embeddings=True, **IDS),
}
SMALL = {
    "vocab_size": 640,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "head_dim": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 506,
    "eos_token_id": (507,),
}
LENGTHS = {
    "uf": (177, 330, 278),
    "hh": (123, 41, 51),
}  # like UltraFeedback, like HH-RLHF: means, in tokens
SIGMAS = (0.8, 0.6, 0.6)  # of their logarithms
PAIRS_PER_STEP = {"uf": 64, "hh": 256}  # about 50,000 tokens either way
MAX_TOKENS, WARMUP, STEPS_OF_PAIRS = 2048, 2, 10  # of a sequence; steps; what a file holds
UNSHARED, DPO = ("--no-share-prompt",), ("--loss", "dpo", "--reference")
STEPS = {  # part: shape, pairs, tokens a micro-batch, more flags, steps measured, the part to compare with
    "step-uf-8192": ("8B", "uf", 8192, (), 6, None),
    "step-uf-8192-unshared": ("8B", "uf", 8192, UNSHARED, 4, "step-uf-8192"),
    "step-uf-8192-padded": ("8B", "uf-padded", 8192, UNSHARED, 2, "step-uf-8192"),
    "step-hh-8192": ("8B", "hh", 8192, (), 6, None),
    "step-hh-8192-unshared": ("8B", "hh", 8192, UNSHARED, 4, "step-hh-8192"),
    "step-hh-8192-padded": ("8B", "hh-padded", 8192, UNSHARED, 2, "step-hh-8192"),
    "step-3b-asft": ("3B", "uf", 8192, (), 6, None),
    "step-3b-dpo-live": ("3B", "uf", 8192, (*DPO, "live"), 6, "step-3b-asft"),
    "step-3b-dpo-precomputed": ("3B", "uf", 8192, (*DPO, "precompute"), 6, "step-3b-asft"),
    "step-uf-4096": ("8B", "uf", 4096, (), 4, "step-uf-8192"),
    "step-hh-4096": ("8B", "hh", 4096, (), 4, "step-hh-8192"),
}
KINDS = {
    "attention": "flash|fmha|attention",
    "matrix products": "gemm|nvjet|cutlass|xmma|splitk|::mm|addmm",
    "optimizer, clipping": "adam|multi_tensor|foreach",
    "compiled": "triton",
    "copies": "memcpy|memset|copy",
    "collectives": "nccl",
    "other": "",
}  # by the names of kernels


def say(a: argparse.Namespace, text: str) -> None:
    """A line of the results, at once."""
    print(text, flush=True)
    with open(a.out, "a") as file:
        file.write(text + "\n")


def sized(a: argparse.Namespace, number: int) -> int:
    """A number of tokens or pairs, or a sixteenth of it."""
    return number // 16 if a.small else number


def shape_of(a: argparse.Namespace, name: str) -> LlamaConfig:
    return dataclasses.replace(SHAPES[name], **SMALL) if a.small else SHAPES[name]


def make_model(a: argparse.Namespace, name: str) -> Path:
    """SCRATCH/NAME: random bf16 weights in files of about 1 GB, one in memory at a time. The example's tokenizer lies
    beside them, since eval.py generate wants one."""
    config, home, places, tensors = shape_of(a, name), a.scratch / name, {}, {}
    if (home / "config.json").exists():  # written last
        return home
    home.mkdir(exist_ok=True)
    torch.manual_seed(0)
    shapes = expected_shapes(config)
    for key, shape in shapes.items():
        tensors[key] = (
            (
                torch.ones(shape)
                if len(shape) == 1
                else torch.randn(shape, dtype=torch.bfloat16, device=a.device) * 0.02
            )
            .bfloat16()
            .cpu()
        )
        if sum(tensor.nbytes for tensor in tensors.values()) > 1e9 or len(places) + len(
            tensors
        ) == len(shapes):
            file = f"model-{len(places):05d}.safetensors"
            save_file(tensors, home / file, metadata={"format": "pt"})
            places, tensors = places | dict.fromkeys(tensors, file), {}
    (home / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": places})
    )
    shutil.copy(ROOT / "examples/model/tokenizer.json", home)
    (home / "config.json").write_text(json.dumps(config.to_dict(torch.bfloat16)))
    return home


def make_pairs(a: argparse.Namespace, name: str) -> tuple[Path, list[Pair]]:
    """SCRATCH/NAME.jsonl: random ids below the control tokens, log-normal lengths with the means of LENGTHS (a little
    less where MAX_TOKENS cuts)."""
    kind, longest, rng = (
        name.removesuffix("-padded"),
        sized(a, MAX_TOKENS),
        np.random.default_rng(0),
    )
    wide = np.exp(
        rng.standard_normal((STEPS_OF_PAIRS * sized(a, PAIRS_PER_STEP[kind]), 3)) * SIGMAS
    )
    lengths = (
        np.rint(wide / wide.mean(0) * [sized(a, n) for n in LENGTHS[kind]]).astype(int).clip(2)
    )
    lengths[:, 0] = lengths[:, 0].clip(max=longest // 2)
    lengths[:, 1:] = np.minimum(lengths[:, 1:], longest - lengths[:, :1])
    if name != kind:
        for group in np.split(lengths, len(lengths) // 4):
            group[:, 1:] = (group[:, :1] + group[:, 1:]).max() - group[:, :1]
    words = shape_of(a, "8B").bos_token_id
    pairs = [Pair(*(rng.integers(0, words, n) for n in of_pair), "") for of_pair in lengths]
    path, sides = a.scratch / f"{name}.jsonl", ("prompt", "chosen", "rejected")
    rows = ({f"{side}_ids": getattr(pair, side).tolist() for side in sides} for pair in pairs)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path, pairs


# -------------------------------------------------------------------------------------------------- in this process


def prepare(a: argparse.Namespace, shape: str, *flags):
    """train.py's model, sharded over a mesh of one. Returns a step on some micro-batches as a function, and the
    pairs."""
    config = of_train.parse(
        [
            "--model",
            str(make_model(a, shape)),
            "--data",
            str(make_pairs(a, "uf")[0]),
            *flags,
            "--max-tokens",
            str(sized(a, MAX_TOKENS)),
            "--max-tokens-per-gpu",
            str(sized(a, 8192)),
        ]
    )
    mesh = of_train.start_processes(config)
    (data,), _, _ = of_train.read_data(config, shape_of(a, shape), mesh.device_type)
    model = of_train.build_model(config, mesh)
    optimizer = of_train.make_optimizer(config, model)

    def step(*micro_batches: list[int]) -> float:
        """Seconds."""
        started = time.perf_counter()
        for indexes in micro_batches:
            rows, batch, _ = data.batch(indexes)
            of_train.losses_of(model, data, rows, batch)[0].mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        assert math.isfinite(float(norm))
        if a.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    return step, data


def compile_blocks(a: argparse.Namespace) -> None:
    """Compilations over five batches, and a step against eager. On a CPU, where attention is a loop that no compiler
    takes whole, a dense one stands for CUDA's, and a backend that only traces for Inductor."""
    if a.device == "cpu":
        from test_cuda import dense_attention

        whole, of_model.attention = torch.nn.Module.compile, dense_attention
        torch.nn.Module.compile = lambda self, **options: whole(
            self, backend="aot_eager", **options
        )
    step, data = prepare(a, "1B", "--compile", "on")
    counters, graphs = torch._dynamo.utils.counters, []
    batches = [[0, 1], [2, 3, 4, 5, 6], [7, 8, 9], [10], [11, 12, 13, 14]]
    for indexes in batches:
        step(indexes)
        graphs.append(counters["stats"]["unique_graphs"])
    say(
        a,
        f"- 1B, batches of {[int(data.sizes[indexes].sum()) for indexes in batches]} tokens: graphs compiled until "
        f"then {graphs}, {graphs[-1] - graphs[0]} of them after the first batch (wanted: 0); "
        f"{sum(counters['graph_break'].values())} graph breaks",
    )
    medians, micro_batches = {}, data.split()[:4]
    for stance in ("default", "force_eager"):
        if a.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with torch.compiler.set_stance(stance):
            medians[stance] = statistics.median(
                [step(*micro_batches) for _ in range(3 if a.small else 9)][1:]
            )
        say(
            a,
            f"- 1B, {'compiled' if stance == 'default' else 'eager'}: {medians[stance]:.4f} s a step of "
            f"{sum(int(data.sizes[indexes].sum()) for indexes in micro_batches)} tokens in {len(micro_batches)} "
            f"micro-batches, peak {of_train.peak_memory_gib():.2f} GiB",
        )
    say(a, f"- eager takes {medians['force_eager'] / medians['default']:.3f} x the time")


def profile(a: argparse.Namespace) -> None:
    """Where a step of the 8B goes."""
    step, data = prepare(a, "8B")
    micro_batches, cuda = data.split()[:2], a.device == "cuda"
    for _ in range(2):
        step(*micro_batches)
    with torch.profiler.profile(
        activities=[getattr(torch.profiler.ProfilerActivity, a.device.upper())]
    ) as profiler:
        wall = step(*micro_batches)
    times, kinds = {}, dict.fromkeys(KINDS, 0.0)
    for event in profiler.key_averages():
        # Named regions stand beside the kernels that run in them.
        if not cuda or (
            "CUDA" in str(event.device_type) and not getattr(event, "is_user_annotation", False)
        ):
            times[event.key] = (
                (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e6,
                event.count,
            )
            kind = next(
                kind for kind, pattern in KINDS.items() if re.search(pattern, event.key, re.I)
            )
            kinds[kind] += times[event.key][0]
    busy = sum(kinds.values())
    say(
        a,
        f"- 8B, a step of {sum(int(data.sizes[indexes].sum()) for indexes in micro_batches)} tokens in "
        f"{len(micro_batches)} micro-batches: {wall:.3f} s under the profiler, {busy:.3f} s of kernels\n\n"
        "| kernels | s | share | calls |\n|---|---|---|---|",
    )
    for kind, spent in sorted(kinds.items(), key=lambda item: -item[1]):
        say(a, f"| all {kind} | {spent:.4f} | {spent / busy:.1%} | |")
    for name, (spent, count) in sorted(times.items(), key=lambda item: -item[1][0])[:20]:
        say(a, f"| `{name[:90].replace('|', '/')}` | {spent:.4f} | {spent / busy:.1%} | {count} |")
    say(a, "")


# -------------------------------------------------------------------------------------------- train.py as a process


def run(a: argparse.Namespace, *words) -> tuple[subprocess.Popen, Path]:
    """python WORDS, in the repository, printing into a file."""
    log = a.scratch / "log.txt"
    with open(log, "w") as file:
        return subprocess.Popen(
            [sys.executable, *map(str, words)], cwd=ROOT, stdout=file, stderr=file
        ), log


def train(a: argparse.Namespace, *flags, until: float = math.inf) -> list[dict]:
    """Trains into SCRATCH/out, to the end or until so many steps are logged: then it is killed, since exporting 8B
    takes longer than they. Returns the rows of metrics.jsonl. Raises ChildProcessError with the end of what was
    printed."""

    def rows() -> list[dict]:
        path = a.scratch / "out/metrics.jsonl"
        return (
            [json.loads(line) for line in path.read_text().split("\n")[:-1]]
            if path.exists()
            else []
        )

    process, log = run(a, "train.py", "--out", a.scratch / "out", *flags)
    while process.poll() is None and len(rows()) < until:
        time.sleep(0.02)
    if process.poll() is None:
        process.kill()
    code, printed, advice = process.wait(), log.read_text()[-2000:], "expandable_segments:True"
    if code and "out of memory" in printed and os.environ.get("PYTORCH_ALLOC_CONF") != advice:
        say(a, f"- out of memory; again with PYTORCH_ALLOC_CONF={advice}")
        os.environ["PYTORCH_ALLOC_CONF"] = advice
        shutil.rmtree(a.scratch / "out")
        return train(a, *flags, until=until)
    if code and len(rows()) < until:
        raise ChildProcessError(f"train.py, exit code {code}, {len(rows())} steps\n{printed}")
    return rows()


def flags_for(a: argparse.Namespace, shape: str, pairs: str, limit: int = 8192) -> list:
    """A process of its own makes the weights: this one must not keep CUDA's memory from train.py."""
    if not (a.scratch / shape / "config.json").exists():
        subprocess.run([sys.executable, __file__, f"make:{shape}", *a.options], check=True)
    return [
        "--model",
        a.scratch / shape,
        "--data",
        make_pairs(a, pairs)[0],
        "--no-shuffle",
        "--pairs-per-step",
        sized(a, PAIRS_PER_STEP[pairs.removesuffix("-padded")]),
        "--save-every",
        0,
        "--max-tokens",
        sized(a, MAX_TOKENS),
        "--max-tokens-per-gpu",
        sized(a, limit),
    ]


def step(a: argparse.Namespace) -> None:
    """A row of STEPS."""
    shape, kind, limit, more, measured, base = STEPS[a.part]
    steps, pairs, flops = WARMUP + (2 if a.small else measured), make_pairs(a, kind)[1], []
    # More steps than are wanted, since the export follows the last, and small steps are over before one looks.
    last = steps + (20 if a.small else 1)
    rows = train(a, *flags_for(a, shape, kind, limit), *more, "--max-steps", last, until=steps)[
        :steps
    ]
    for row in rows[WARMUP:]:
        drawn = pairs[(row["step"] - 1) * row["pairs"] : row["step"] * row["pairs"]]
        assert sum(pair.packed_tokens(more != UNSHARED) for pair in drawn) == row["tokens"]
        flops.append(
            3 * of_train.forward_flops(shape_of(a, shape), drawn, more != UNSHARED) / row["seconds"]
        )
    found = {
        key: statistics.median(row[key] for row in rows[WARMUP:])
        for key in ("seconds", "tokens_per_s", "pairs_per_s", "peak_memory_gib", "pairs")
    }
    found["mfu"] = statistics.median(flops) / (a.peak_tflops * 1e12)
    say(
        a,
        "- {part}: {seconds:.3f} s a step of {pairs:.0f} pairs, {tokens_per_s:,.0f} tokens/s, {pairs_per_s:.2f} "
        "pairs/s, MFU {mfu:.2%}, peak {peak_memory_gib:.2f} GiB; each step {every} s; loss {loss:.4f}".format(
            part=a.part,
            every=[round(row["seconds"], 3) for row in rows],
            loss=rows[-1]["loss"],
            **found,
        ),
    )
    if (reference := a.scratch / "out/reference.safetensors").exists():
        seconds = reference.stat().st_mtime - (a.scratch / "out/config.json").stat().st_mtime
        say(
            a,
            f"  - log-probs of the reference: {seconds:.1f} s, once, for {len(pairs)} pairs, compilation included",
        )
    if base and (a.scratch / f"{base}.json").exists():
        of_base = json.loads((a.scratch / f"{base}.json").read_text())
        say(
            a,
            f"  - {base} has {of_base['pairs_per_s'] / found['pairs_per_s']:.3f} x its pairs/s and "
            f"{of_base['peak_memory_gib'] / found['peak_memory_gib']:.3f} x its peak memory",
        )
    (a.scratch / f"{a.part}.json").write_text(json.dumps(found))


# ------------------------------------------------------------------------------------------------------- end to end


def example(a: argparse.Namespace) -> None:
    started = time.perf_counter()
    rows = train(a, *("--max-steps", 2, "--samples", 0, "--eval-every", 0) if a.small else ())
    first, *_, last = (
        json.loads(line) for line in (a.scratch / "out/eval.jsonl").read_text().splitlines()
    )
    say(
        a,
        f"- the example: {len(rows)} steps, {time.perf_counter() - started:.1f} s from start to export; held-out "
        + ", ".join(
            f"{key} {first['eval_' + key]:.4f} -> {last['eval_' + key]:.4f}"
            for key in ("loss", "accuracy")
        ),
    )


def resume(a: argparse.Namespace) -> None:
    """1B: a checkpoint of 8B has 96 GB."""
    before = train(a, *flags_for(a, "1B", "uf"), "--max-steps", 20, "--save-every", 10, until=12)
    after = train(a, "--resume")
    assert [row["step"] for row in after] == list(range(1, 21))
    drift = max(
        abs(old["loss"] / new["loss"] - 1)
        for old, new in zip(before[10:], after[10:], strict=False)
    )
    say(
        a,
        f"- 1B, killed after step {len(before)} of 20, gone on from step 10's checkpoint: 20 steps logged; the "
        f"losses of steps that ran twice differ by at most {drift:.1e} of their size",
    )
    check_export(a)


def whole(a: argparse.Namespace) -> None:
    started = time.perf_counter()
    rows = train(
        a, *flags_for(a, "8B", "uf"), "--pairs-per-step", max(4, sized(a, 16)), "--max-steps", 20
    )
    say(
        a,
        f"- 8B, 20 steps of {rows[0]['pairs']} pairs: {time.perf_counter() - started:.1f} s from start to export, "
        f"{sum(row['seconds'] for row in rows):.1f} s of steps; loss {rows[0]['loss']:.4f} -> {rows[-1]['loss']:.4f}",
    )
    generate(a)
    check_export(a)


@torch.no_grad()
def check_export(a: argparse.Namespace) -> None:
    """An exported model's log-probs of 300 tokens, by transformers and by model.py."""
    from transformers import AutoModelForCausalLM

    directory, dtype = (
        a.scratch / "out/model",
        torch.bfloat16 if a.device == "cuda" else torch.float32,
    )
    ids = torch.from_numpy(
        np.concatenate([pair.chosen for pair in make_pairs(a, "uf")[1]])[:300]
    ).to(a.device)
    theirs = (
        AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
        .to(a.device)(ids[None])
        .logits[0]
    )
    ours = of_model.load_model(directory, dtype, a.device).logits(ids)
    theirs, ours = (logits.float().log_softmax(-1) for logits in (theirs, ours))
    say(
        a,
        f"- its export loads by transformers and by model.load_model: log-probs differ by at most "
        f"{(theirs - ours).abs().max():.1e} nats, {(theirs - ours).abs().mean():.1e} on average ({dtype}); "
        f"{(theirs.argmax(-1) == ours.argmax(-1)).float().mean():.1%} of the likeliest tokens are the same",
    )


def generate(a: argparse.Namespace) -> None:
    """256 tokens after each prompt of 128, greedily, a row at a time and 64."""
    n_prompt, n_new, rng = sized(a, 128), sized(a, 256), np.random.default_rng(0)
    for batch, n_prompts in ((1, 4), (64, 128)):
        prompts, answers = a.scratch / "out/prompts.jsonl", a.scratch / f"out/answers-{batch}.jsonl"
        rows = rng.integers(0, shape_of(a, "8B").bos_token_id, (n_prompts, n_prompt)).tolist()
        prompts.write_text("".join(json.dumps({"prompt_ids": row}) + "\n" for row in rows))
        process, log = run(
            a,
            "eval.py",
            "generate",
            "--model",
            a.scratch / "out/model",
            "--prompts",
            prompts,
            "--out",
            answers,
            "--max-new-tokens",
            n_new,
            "--cache-tokens",
            batch * (n_prompt + n_new),
        )
        code, printed = process.wait(), log.read_text()
        if code == 2 and "invalid choice: 'generate'" in printed:
            return say(a, "- generation: left out, this eval.py has no command generate")
        if code:
            raise ChildProcessError(f"eval.py generate, exit code {code}\n{printed[-2000:]}")
        say(
            a,
            f"- generation, {batch} at a time, {n_prompts} prompts of {n_prompt} tokens, up to {n_new} new ones: "
            f"{re.findall(r'([0-9,.]+) tokens/s', printed)[-1]} tokens/s",
        )


# -------------------------------------------------------------------------------------------------------- the parts

PARTS = (
    {"compile": compile_blocks, "step-uf-8192": step, "step-profile": profile}
    | dict.fromkeys(STEPS, step)
    | {"end-to-end-example": example, "end-to-end-resume": resume, "end-to-end-8b": whole}
)  # in this order


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", help=f"all, or how the names of parts begin: {', '.join(PARTS)}")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop what runs then")
    parser.add_argument("--small", action="store_true", help="tiny sizes")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "tests/GPU_RESULTS.md", help="the results, appended"
    )
    parser.add_argument("--scratch", type=Path, default=Path("/tmp/asft-gpu"))
    parser.add_argument(
        "--peak-tflops", type=float, default=989, help="the denominator of MFU [989: H100, H200]"
    )
    a = parser.parse_args()
    a.device = "cuda" if torch.cuda.is_available() else "cpu"
    a.small, a.scratch, a.out = a.small or a.device == "cpu", a.scratch.resolve(), a.out.resolve()
    a.options = [
        "--scratch",
        a.scratch,
        "--out",
        a.out,
        "--peak-tflops",
        str(a.peak_tflops),
        *["--small"] * a.small,
    ]
    a.scratch.mkdir(parents=True, exist_ok=True)
    order, _, a.part = a.what.partition(
        ":"
    )  # make:SHAPE and run:PART are this program's calls of itself
    if a.part:
        make_model(a, a.part) if order == "make" else PARTS[a.part](a)
        sys.stdout.flush()
        os._exit(0)  # as train.py ends: a process group is open

    chosen = [name for name in PARTS if a.what == "all" or name.startswith(a.what)]
    if not chosen:
        parser.error(f"no part begins with {a.what!r}")
    smi = [
        "nvidia-smi",
        "--query-gpu=name,memory.total,driver_version",
        "--format=csv,noheader",
    ]  # keeps no memory
    device = subprocess.check_output(smi, text=True).strip() if a.device == "cuda" else "CPU"
    say(
        a,
        f"\n## {datetime.now():%Y-%m-%d %H:%M}, {device}\n\ntorch {torch.__version__}, CUDA {torch.version.cuda}, "
        f"Python {sys.version.split()[0]}{', small sizes' * a.small}; {shutil.disk_usage(a.scratch).free / 1e9:.0f} GB "
        f"of disk free\n\n    python tests/gpu.py {' '.join(sys.argv[1:])}\n",
    )
    deadline, failed = time.monotonic() + 60 * a.minutes, 0
    for name in chosen:
        done, left = a.scratch / f"{name}.done", deadline - time.monotonic()
        if done.exists() or left < 1:
            say(
                a, f"- {name}: {'measured by an earlier call' if done.exists() else 'no time left'}"
            )
            continue
        shutil.rmtree(a.scratch / "out", ignore_errors=True)
        process = subprocess.Popen(
            [sys.executable, __file__, f"run:{name}", *a.options],
            stderr=subprocess.PIPE,
            text=True,
            process_group=0,
        )  # so that all that it starts can be ended with it
        try:
            complaint = process.communicate(timeout=left if left < math.inf else None)[1]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            complaint = "its time was over"
        if process.wait():
            failed += 1
            say(
                a,
                f"- {name} FAILED\n\n      "
                + complaint.strip()[-2000:].replace("\n", "\n      ")
                + "\n",
            )
        else:
            done.touch()
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
