"""Measures speed and memory on a GPU, part by part. The tests run a few parts in small on the CPU.

    python bench/gpu.py all --minutes 25    every part, the most important first
    python bench/gpu.py all --small         the same in tiny sizes (always so without a GPU)
    python bench/gpu.py compile             compilations over five lengths; compiled and eager
    python bench/gpu.py step                steps of a random 8B, kernels of a step; DPO on a 3B
    python bench/gpu.py peers               TRL's ORPO and DPO, Liger's ORPO, on the 3B
    python bench/gpu.py end-to-end          the example; a resumed run; 8B trained and exported
    python bench/gpu.py step-profile        one part, by its name or the beginning of several names;
                                            several of these are measured in their order

Each part is a process and appends its figures to --out at once. A part that fails is reported, and
the next one runs. --scratch holds models, pairs and the figures of finished parts, so that another
call continues there. It needs 25 GB of disk, and at times 20 GB more.

In reading order
    SHAPES, LENGTHS, STEPS, PEERS       what is measured
    make_model, make_pairs              random weights and pairs
    prepare, compile_blocks, profile    in this process, by train.py's own functions
    train, step                         train.py as a process
    peer                                another trainer as a process (benchmark.py has its code)
    example, resume, whole              end to end
    PARTS, main                         the parts and their order
    (variants.py: train.py with one thing changed, for the rows of VARIANTS)

Figures of steps are medians over the steps after WARMUP. MFU is 3 times support.memory's
pair_flops over the peak of the card: recomputed work counts once. "padded" is what a trainer
that pads computes: the same pairs in groups of four, each sequence as long as the longest of its
group, no prompt shared. (Responses are made longer, so that the padding passes the head as well.)

A peer gets the largest micro-batch of MICRO_BATCHES that fits, fp32 weights, bf16 autocast,
recomputed blocks, and our pairs in our order, compared token for token before it trains.

Left out: several GPUs. tests/test_cuda.py tests that CUDA computes the right thing.
"""

import argparse
import dataclasses
import functools
import importlib.util
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

import benchmark
from common import ROOT, read_rows, train_command

sys.path.insert(0, str(ROOT))

import support  # noqa: F401  before torch, which reads what it sets

# isort: split
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

import model as model_py
import train as train_py
from data import Pair
from model import LlamaConfig, Segments, expected_shapes
from support import sharding
from support.flags import parse
from support.flops import pair_flops
from support.processes import peak_memory_gib

IDS = {"bos_token_id": 128000, "eos_token_id": (128001, 128009)}
SHAPES = {  # vocabulary, width, feed-forward, layers, heads, key/value heads, head size, context
    "8B": LlamaConfig(128256, 4096, 14336, 32, 32, 8, 128, 8192, **IDS),
    "3B": LlamaConfig(128256, 3072, 8192, 28, 24, 8, 128, 8192, tie_word_embeddings=True, **IDS),
    "1B": LlamaConfig(128256, 2048, 8192, 16, 32, 8, 64, 8192, tie_word_embeddings=True, **IDS),
}
SMALL = dict(
    vocab_size=640,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    bos_token_id=506,
    eos_token_id=(507,),
)
# Mean lengths of prompt, chosen and rejected in tokens: like UltraFeedback, like HH-RLHF.
LENGTHS = {"uf": (177, 330, 278), "hh": (123, 41, 51)}
SIGMAS = (0.8, 0.6, 0.6)  # of the lengths' logarithms
PAIRS_PER_STEP = {"uf": 64, "hh": 256}  # about 50,000 tokens either way
MAX_TOKENS, WARMUP, STEPS_OF_PAIRS = 2048, 2, 10  # of a sequence; steps; steps that a file is for
UNSHARED, DPO = ("--no-share-prompt",), ("--loss", "dpo", "--reference")
KEPT, RECOMPUTED = ("--checkpoint-blocks", "off"), ("--checkpoint-blocks", "on")
# Part: shape, pairs, tokens of a micro-batch (None: train.py's choice), more flags, steps, part to
# compare with. How many blocks are recomputed is train.py's choice unless a flag says it.
STEPS = {
    "step-uf-defaults": ("8B", "uf", None, (), 6, None),
    "step-uf-unshared": ("8B", "uf", None, UNSHARED, 4, "step-uf-defaults"),
    "step-uf-padded": ("8B", "uf-padded", 8192, UNSHARED, 2, "step-uf-defaults"),
    "step-hh-8192": ("8B", "hh", 8192, (), 6, None),
    "step-hh-8192-unshared": ("8B", "hh", 8192, UNSHARED, 4, "step-hh-8192"),
    "step-hh-8192-padded": ("8B", "hh-padded", 8192, UNSHARED, 2, "step-hh-8192"),
    "step-3b-asft": ("3B", "uf", 8192, (), 6, None),
    "step-3b-dpo-live": ("3B", "uf", 8192, (*DPO, "live"), 6, "step-3b-asft"),
    "step-3b-dpo-precomputed": ("3B", "uf", 8192, (*DPO, "precompute"), 6, "step-3b-asft"),
    "step-3b-orpo": ("3B", "uf", 8192, ("--loss", "orpo"), 6, "step-3b-asft"),
    "step-3b-defaults": ("3B", "uf", None, (), 6, None),
    "step-3b-recomputed": ("3B", "uf", 8192, RECOMPUTED, 6, "step-3b-defaults"),
    "step-3b-recomputed-16384": ("3B", "uf", 16384, RECOMPUTED, 6, "step-3b-defaults"),
    "step-3b-kept": ("3B", "uf", 8192, KEPT, 6, "step-3b-defaults"),
    "step-3b-kept-16384": ("3B", "uf", 16384, KEPT, 6, "step-3b-defaults"),
    "step-3b-hh": ("3B", "hh", None, (), 6, None),
    "step-3b-hh-unshared": ("3B", "hh", None, UNSHARED, 4, "step-3b-hh"),
    "step-uf-recomputed": ("8B", "uf", 8192, RECOMPUTED, 4, "step-uf-defaults"),
    "step-uf-recomputed-16384": ("8B", "uf", 16384, RECOMPUTED, 4, "step-uf-defaults"),
    "step-uf-16384": ("8B", "uf", 16384, (), 4, "step-uf-defaults"),
    "step-uf-4096": ("8B", "uf", 4096, (), 4, "step-uf-defaults"),
    "step-hh-4096": ("8B", "hh", 4096, (), 4, "step-hh-8192"),
}
VARIANTS = {  # parts that run bench/variants.py, with this name, instead of train.py
    f"step-{pairs}-{name}": name
    for pairs in ("uf", "3b")
    for name in (
        "reduce-always",
        "two-pools",
        "resharded",
        "pageable",
        "keep-more",
        "varying-heads",
        "more-kernels",
        "eager-head",
    )
    if pairs == "3b" or name not in ("resharded", "keep-more")  # an 8B has no room for these
}
LEAST_SECONDS = 120  # what a part takes at least: with less time left it is not begun
for _part in VARIANTS:
    _base = "step-uf-defaults" if _part.startswith("step-uf") else "step-3b-defaults"
    STEPS[_part] = (*STEPS[_base][:5], _base)
ORPO = "step-3b-orpo"
PEERS = {  # part: the trainer's name in benchmark.py, pairs, our parts to compare with
    "peers-trl-orpo": ("trl-orpo", "uf", (ORPO, "step-3b-defaults", "step-3b-recomputed")),
    "peers-liger-orpo": ("liger-orpo", "uf", (ORPO, "step-3b-defaults")),
    "peers-trl-dpo": ("trl-dpo", "uf", ("step-3b-dpo-live", "step-3b-defaults")),
    "peers-hh-trl-orpo": ("trl-orpo", "hh", ("step-3b-hh",)),
}
MICRO_BATCHES = (32, 16, 8, 4, 2, 1)  # of pairs; a peer gets the first that fits in memory
KINDS = {  # of kernels, by their names
    "attention": "flash|fmha|attention",
    "matrix products": "gemm|nvjet|cutlass|xmma|splitk|::mm|addmm",
    "optimizer, clipping": "adam|multi_tensor|foreach",
    "compiled": "triton",
    "copies": "memcpy|memset|copy",
    "collectives": "nccl",
    "other": "",
}


def say(a: argparse.Namespace, text: str) -> None:
    """Prints a line of the results and appends it to --out."""
    print(text, flush=True)
    with open(a.out, "a") as file:
        file.write(text + "\n")


def sized(a: argparse.Namespace, number: int) -> int:
    """A number of tokens or pairs; with --small a sixteenth of it."""
    return number // 16 if a.small else number


def shape_of(a: argparse.Namespace, name: str) -> LlamaConfig:
    return dataclasses.replace(SHAPES[name], **SMALL) if a.small else SHAPES[name]


def make_model(a: argparse.Namespace, name: str) -> Path:
    """SCRATCH/NAME: random bf16 weights in files of about 1 GB, one of them in memory at a time,
    with the example's tokenizer, because eval.py generate needs one."""
    config, home = shape_of(a, name), a.scratch / name
    if (home / "config.json").exists():  # it is written last
        return home
    home.mkdir(exist_ok=True)
    torch.manual_seed(0)
    places, tensors, left = {}, {}, expected_shapes(config)
    for key, shape in list(left.items()):
        del left[key]
        if len(shape) == 1:
            tensor = torch.ones(shape)
        else:
            tensor = torch.randn(shape, dtype=torch.bfloat16, device=a.device) * 0.02
        tensors[key] = tensor.bfloat16().cpu()
        if sum(tensor.nbytes for tensor in tensors.values()) > 1e9 or not left:
            file = f"model-{len(places):05d}.safetensors"
            save_file(tensors, home / file, metadata={"format": "pt"})
            places, tensors = places | dict.fromkeys(tensors, file), {}
    index = {"metadata": {}, "weight_map": places}
    (home / "model.safetensors.index.json").write_text(json.dumps(index))
    shutil.copy(ROOT / "examples/model/tokenizer.json", home)
    (home / "config.json").write_text(json.dumps(config.to_dict(torch.bfloat16)))
    return home


def make_pairs(a: argparse.Namespace, name: str) -> tuple[Path, list[Pair]]:
    """SCRATCH/NAME.jsonl: random ids below the control tokens; a prompt begins with BOS, an answer
    ends with EOS. Lengths are log-normal, with the means of LENGTHS (a little less where MAX_TOKENS
    cuts them)."""
    kind, longest = name.removesuffix("-padded"), sized(a, MAX_TOKENS)
    rng = np.random.default_rng(0)
    pairs = STEPS_OF_PAIRS * sized(a, PAIRS_PER_STEP[kind])
    wide = np.exp(rng.standard_normal((pairs, 3)) * SIGMAS)
    means = [sized(a, n) for n in LENGTHS[kind]]
    lengths = np.rint(wide / wide.mean(0) * means).astype(int).clip(2)
    lengths[:, 0] = lengths[:, 0].clip(max=longest // 2)
    lengths[:, 1:] = np.minimum(lengths[:, 1:], longest - lengths[:, :1])
    if name != kind:
        for group in np.split(lengths, len(lengths) // 4):
            group[:, 1:] = (group[:, :1] + group[:, 1:]).max() - group[:, :1]
    bos, eos = shape_of(a, "8B").bos_token_id, shape_of(a, "8B").eos_token_id[-1]
    pairs = [Pair(*(rng.integers(0, bos, n) for n in of_pair), "") for of_pair in lengths]
    for pair in pairs:
        pair.prompt[0], pair.chosen[-1], pair.rejected[-1] = bos, eos, eos
    path, sides = a.scratch / f"{name}.jsonl", ("prompt", "chosen", "rejected")
    rows = ({f"{side}_ids": getattr(pair, side).tolist() for side in sides} for pair in pairs)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path, pairs


# -------------------------------------------------------------------------------- in this process


def prepare(a: argparse.Namespace, shape: str, *flags):
    """train.py's model, sharded over a mesh of one. Returns a function that runs a step on some
    micro-batches, and the pairs."""
    paths = ["--model", str(make_model(a, shape)), "--data", str(make_pairs(a, "uf")[0])]
    sizes = ["--max-tokens", str(sized(a, MAX_TOKENS)), "--max-tokens-per-gpu", str(sized(a, 8192))]
    config = parse(train_py.Config, [*paths, *flags, *sizes], {}, "")
    mesh = train_py.processes.start(config)
    (pairs,), _, _ = train_py.read_datasets(config, shape_of(a, shape), mesh.device_type)
    model = train_py.build_model(config, mesh)
    if a.device == "cuda":  # 8B fits on one card only so
        model.recompute_first(len(model.model["layers"]))
    optimizer = train_py.make_optimizer(config, model)

    def step(*micro_batches: list[int]) -> float:
        """Returns its seconds."""
        started = time.perf_counter()
        for i, indexes in enumerate(micro_batches):
            sharding.prepare_backward(model, last=i + 1 == len(micro_batches))
            train_py.step_loss(model, pairs, indexes)[0].mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        sharding.optimizer_step(optimizer)
        optimizer.zero_grad()
        assert math.isfinite(float(norm))
        if a.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    return step, pairs


def dense_attention(q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, segments: Segments) -> Tensor:
    """model.attention, with the segments as a dense mask that is computed from their starts. Like
    CUDA's kernel, and unlike the CPU's loop, it compiles once for all lengths."""
    k, v = k_TGK.index_select(0, segments.key_index_N), v_TGK.index_select(0, segments.key_index_N)
    query, key = torch.arange(q_THK.shape[0]), torch.arange(k.shape[0])
    # The segment of each query and key, and how many rows of the segment are left from there on.
    of_query = torch.searchsorted(segments.query_starts, query, right=True) - 1
    of_key = torch.searchsorted(segments.key_starts, key, right=True) - 1
    queries_left = segments.query_starts[of_query + 1] - query
    keys_left = segments.key_starts[of_key + 1] - key
    seen = (of_query[:, None] == of_key) & (keys_left >= queries_left[:, None])
    k, v = (x.repeat_interleave(q_THK.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = torch.einsum("thk,nhk->htn", q_THK, k) * q_THK.shape[-1] ** -0.5
    return torch.einsum("htn,nhk->thk", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


def compile_blocks(a: argparse.Namespace) -> None:
    """Counts compilations over five batches, and times a step compiled and eager. On a CPU, whose
    attention does not compile as a whole, dense_attention stands for CUDA's, and a backend that
    only traces stands for Inductor."""
    if a.device == "cpu":
        model_py.attention = dense_attention
        torch.compile = functools.partial(torch.compile, backend="aot_eager")
    step, pairs = prepare(a, "1B", "--compile", "on")

    def tokens(*micro_batches: list[int]) -> int:
        return sum(int(pairs.sizes[indexes].sum()) for indexes in micro_batches)

    counters, graphs = torch._dynamo.utils.counters, []
    batches = [[0, 1], [2, 3, 4, 5, 6], [7, 8, 9], [10], [11, 12, 13, 14]]
    for indexes in batches:
        step(indexes)
        graphs.append(counters["stats"]["unique_graphs"])
    say(
        a,
        f"- 1B, batches of {[tokens(indexes) for indexes in batches]} tokens: graphs compiled so "
        f"far {graphs}, {graphs[-1] - graphs[0]} of them after the first batch (wanted: 0); "
        f"{sum(counters['graph_break'].values())} graph breaks",
    )
    medians, micro_batches = {}, pairs.own_micro_batches()[:4]
    for name, stance in (("compiled", "default"), ("eager", "force_eager")):
        if a.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with torch.compiler.set_stance(stance):
            seconds = [step(*micro_batches) for _ in range(3 if a.small else 9)]
        medians[name] = statistics.median(seconds[1:])
        say(
            a,
            f"- 1B, {name}: {medians[name]:.4f} s a step of {tokens(*micro_batches)} tokens in "
            f"{len(micro_batches)} micro-batches, peak {peak_memory_gib():.2f} GiB",
        )
    say(a, f"- eager takes {medians['eager'] / medians['compiled']:.3f} x the time")


def profile(a: argparse.Namespace) -> None:
    """Where the time of a step goes; as a table, and as a timeline that chrome://tracing shows.
    Of the 8B, or of the 3B if the card is too small."""
    shape = "3B" if too_large(a, "8B") else "8B"
    step, pairs = prepare(a, shape)
    micro_batches, cuda = pairs.own_micro_batches()[:2], a.device == "cuda"
    for _ in range(2):
        step(*micro_batches)
    activity = getattr(torch.profiler.ProfilerActivity, a.device.upper())
    with torch.profiler.profile(activities=[activity]) as profiler:
        wall = step(*micro_batches)
    trace = a.out.with_suffix(".trace.json.gz")
    profiler.export_chrome_trace(str(trace))
    events = profiler.key_averages()
    if cuda:  # without the named regions that stand beside the kernels that run in them
        events = [event for event in events if "CUDA" in str(event.device_type)]
        events = [event for event in events if not getattr(event, "is_user_annotation", False)]
    times, kinds = {}, dict.fromkeys(KINDS, 0.0)
    for event in events:
        spent = (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e6
        times[event.key] = (spent, event.count)
        kind = next(kind for kind, names in KINDS.items() if re.search(names, event.key, re.I))
        kinds[kind] += spent
    busy = sum(kinds.values())
    tokens = sum(int(pairs.sizes[indexes].sum()) for indexes in micro_batches)
    say(
        a,
        f"- {shape}, a step of {tokens} tokens in {len(micro_batches)} micro-batches: {wall:.3f} s "
        f"under the profiler, {busy:.3f} s of kernels; timeline: {trace.name}\n\n"
        "| kernels | s | share | calls |\n|---|---|---|---|",
    )
    for kind, spent in sorted(kinds.items(), key=lambda item: -item[1]):
        say(a, f"| all {kind} | {spent:.4f} | {spent / busy:.1%} | |")
    for name, (spent, count) in sorted(times.items(), key=lambda item: -item[1][0])[:20]:
        name = name[:90].replace("|", "/")
        say(a, f"| `{name}` | {spent:.4f} | {spent / busy:.1%} | {count} |")
    say(a, "")


# --------------------------------------------------------------------------- train.py as a process


def start(a: argparse.Namespace, words: list[str]) -> tuple[subprocess.Popen, Path]:
    """Starts a command in the repository. It prints into the file that is returned."""
    log = a.scratch / "log.txt"
    with open(log, "w") as file:
        return subprocess.Popen(words, cwd=ROOT, stdout=file, stderr=file), log


def train(a: argparse.Namespace, *flags, until: float = math.inf) -> list[dict]:
    """Trains into SCRATCH/out, to the end or until so many steps are logged. Then it is killed: the
    export of 8B takes longer than the steps do.

    Returns the rows of metrics.jsonl. Raises ChildProcessError with the last lines of the output.
    """
    metrics = a.scratch / "out/metrics.jsonl"
    words = train_command("--out", a.scratch / "out", *flags)
    if a.part in VARIANTS:
        words[1:2] = [str(ROOT / "bench/variants.py"), VARIANTS[a.part]]
    process, log = start(a, words)
    while process.poll() is None and len(read_rows(metrics)) < until:
        time.sleep(0.02)
    if process.poll() is None:
        process.kill()
    code, printed, rows = process.wait(), log.read_text()[-2000:], read_rows(metrics)
    if code and len(rows) < until:
        raise ChildProcessError(f"train.py, exit code {code}, {len(rows)} steps\n{printed}")
    return rows


def made_model(a: argparse.Namespace, shape: str) -> Path:
    """make_model in another process: this one must leave CUDA's memory to the trainer."""
    if not (a.scratch / shape / "config.json").exists():
        subprocess.run([sys.executable, __file__, f"make:{shape}", *a.options], check=True)
    return a.scratch / shape


def flags_for(a: argparse.Namespace, shape: str, pairs: str, limit: int | None = None) -> list:
    """Flags of train.py."""
    model = made_model(a, shape)
    per_step = sized(a, PAIRS_PER_STEP[pairs.removesuffix("-padded")])
    sizes = ["--max-tokens", sized(a, MAX_TOKENS)]
    if limit:
        sizes += ["--max-tokens-per-gpu", sized(a, limit)]
    paths = ["--model", model, "--data", make_pairs(a, pairs)[0]]
    return [*paths, *sizes, "--pairs-per-step", per_step, "--no-shuffle", "--save-every", 0]


def step(a: argparse.Namespace) -> None:
    """A row of STEPS."""
    shape, kind, limit, more, measured, base = STEPS[a.part]
    steps, pairs = WARMUP + (2 if a.small else measured), make_pairs(a, kind)[1]
    # Train for more steps than are measured: after the last one comes the export, and small steps
    # are over before their number is looked up.
    last = steps + (20 if a.small else 1)
    flags = [*flags_for(a, shape, kind, limit), *more, "--max-steps", last]
    if a.part in VARIANTS and (a.scratch / f"{base}.json").exists():  # so that nothing else differs
        chosen = json.loads((a.scratch / f"{base}.json").read_text())
        flags += ["--checkpoint-blocks", chosen["recomputed_blocks"]]
        flags += ["--max-tokens-per-gpu", chosen["max_tokens_per_gpu"]]
    rows = train(a, *flags, until=steps)[:steps]
    config, share, flops = shape_of(a, shape), more != UNSHARED, []
    for row in rows[WARMUP:]:
        drawn = pairs[(row["step"] - 1) * row["pairs"] : row["step"] * row["pairs"]]
        assert sum(pair.packed_tokens(share) for pair in drawn) == row["tokens"]
        flops.append(3 * pair_flops(config, drawn, share)[:, :2].sum() / row["seconds"])
    names = ("seconds", "tokens_per_s", "pairs_per_s", "peak_memory_gib", "pairs", "hfu")
    found = {
        name: statistics.median(row[name] for row in rows[WARMUP:])
        for name in names
        if name in rows[0]
    }
    found["mfu"] = statistics.median(flops) / (a.peak_tflops * 1e12)
    found["first_loss"] = rows[0]["loss"]
    every = [round(row["seconds"], 3) for row in rows]
    say(
        a,
        f"- {a.part}: {found['seconds']:.3f} s a step of {found['pairs']:.0f} pairs, "
        f"{found['tokens_per_s']:,.0f} tokens/s, {found['pairs_per_s']:.2f} pairs/s, "
        f"MFU {found['mfu']:.2%}, peak {found['peak_memory_gib']:.2f} GiB; each step {every} s; "
        f"loss {rows[-1]['loss']:.4f}",
    )
    chosen = json.loads((a.scratch / "out/config.json").read_text())["memory"]
    emptied = [rows[i].get("memory_retries", 0) for i in (WARMUP - 1, -1)]
    hfu = f"; HFU {found['hfu']:.2%}" if "hfu" in found else ""
    gathered = ", weights kept gathered" * chosen["weights_kept_gathered"]
    say(
        a,
        f"  - {chosen['recomputed_blocks']} of {config.num_hidden_layers} blocks recomputed, "
        f"at most {chosen['max_tokens_per_gpu']} tokens a micro-batch{gathered}{hfu}"
        f"; the allocator emptied its cache {emptied[1] - emptied[0]} times in these steps and "
        f"{emptied[0]} times before",
    )
    reference = a.scratch / "out/reference.safetensors"
    if reference.exists():
        # The lock is made just before the model is; config.json is written twice.
        seconds = reference.stat().st_mtime - (a.scratch / "out/.lock").stat().st_mtime
        say(
            a,
            f"  - the model loaded and the log-probs of the reference: {seconds:.1f} s, once, for "
            f"{len(pairs)} pairs, compilation included",
        )
    compare(a, found, base)
    (a.scratch / f"{a.part}.json").write_text(json.dumps(found | chosen))


def compare(a: argparse.Namespace, found: dict, base: str | None) -> None:
    """Says how a part that has been measured before compares with these figures."""
    if not base or not (a.scratch / f"{base}.json").exists():
        return
    of_base = json.loads((a.scratch / f"{base}.json").read_text())
    speed, memory = (of_base[name] / found[name] for name in ("pairs_per_s", "peak_memory_gib"))
    say(
        a,
        f"  - {base} has {speed:.3f} x its pairs/s and {memory:.3f} x its peak memory; "
        f"first loss {of_base['first_loss']:.4f}",
    )


# ------------------------------------------------------------------- another trainer as a process


def missing_packages(part: str) -> list[str]:
    """The packages of a peer that are not installed."""
    if part not in PEERS:
        return []
    needed = ["liger_kernel"] * (PEERS[part][0] == "liger-orpo") + ["trl", "datasets"]
    return [name for name in needed if importlib.util.find_spec(name) is None]


def peer(a: argparse.Namespace) -> None:
    """A row of PEERS, on the 3B."""
    job, kind, bases = PEERS[a.part]
    config, per_step = shape_of(a, "3B"), sized(a, PAIRS_PER_STEP[kind])
    home = a.scratch / "3B-words"  # the same weights, beside a tokenizer for texts of ids
    home.mkdir(exist_ok=True)
    for path in made_model(a, "3B").iterdir():
        if path.name != "tokenizer.json" and not (home / path.name).exists():
            (home / path.name).symlink_to(path)
    special = {"bos": config.bos_token_id, "pad": config.bos_token_id + 4}
    benchmark.save_tokenizer(home, config.vocab_size, special | {"eos": config.eos_token_id[-1]})
    data, out, steps = make_pairs(a, kind)[0], a.scratch / "out", WARMUP + (1 if a.small else 3)
    words = ["--pairs-per-step", per_step, "--max-tokens", sized(a, MAX_TOKENS), "--recompute"]
    dtype = "fp32"
    if a.device == "cuda":
        dtype = "bf16"
        words.append("--cuda")
    words = [job, home, data, dtype, steps, out, *words]
    fitting = [n for n in MICRO_BATCHES if per_step % n == 0 and n <= a.micro_batch]
    for n in fitting:
        command = [sys.executable, ROOT / "bench/benchmark.py", "one", *words, "--micro-batch", n]
        try:
            found = benchmark.watch([str(word) for word in command], out, WARMUP, per_step)
            break
        except ChildProcessError as error:
            if "out of memory" not in str(error) or n == fitting[-1]:
                raise
            say(a, f"- {a.part}: out of memory with {n} pairs a micro-batch")
            shutil.rmtree(out, ignore_errors=True)
    every = [round(seconds, 3) for seconds in found["seconds"]]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    say(
        a,
        f"- {a.part}: {found['pairs_per_s']:.2f} pairs/s, peak {found['peak_memory_gib']:.2f} GiB, "
        f"{n} pairs a micro-batch; each step of {per_step} pairs {every} s; first loss "
        f"{found['losses'][0]:.4f}; {versions}",
    )
    for base in bases:
        compare(a, found, base)


# -------------------------------------------------------------------------------------- end to end


def example(a: argparse.Namespace) -> None:
    """The example, from start to export."""
    flags, started = ("--max-steps", 2, "--samples", 0, "--eval-every", 0), time.perf_counter()
    rows = train(a, *flags) if a.small else train(a)
    seconds = time.perf_counter() - started
    first, *_, last = read_rows(a.scratch / "out/eval.jsonl")
    say(
        a,
        f"- the example: {len(rows)} steps, {seconds:.1f} s from start to export; held-out loss "
        f"{first['eval_loss']:.4f} -> {last['eval_loss']:.4f}, accuracy "
        f"{first['eval_accuracy']:.4f} -> {last['eval_accuracy']:.4f}",
    )


def resume(a: argparse.Namespace) -> None:
    """A run that is killed and resumed. 1B, because a checkpoint of 8B has 96 GB."""
    flags = [*flags_for(a, "1B", "uf"), "--max-steps", 20, "--save-every", 10]
    before = train(a, *flags, until=12)
    after = train(a, "--resume")
    assert [row["step"] for row in after] == list(range(1, 21))
    both = zip(before[10:], after[10:], strict=False)
    drift = max(abs(old["loss"] / new["loss"] - 1) for old, new in both)
    say(
        a,
        f"- 1B, killed after step {len(before)} of 20, resumed from step 10's checkpoint: 20 steps "
        f"logged; the losses of steps that ran twice differ by at most {drift:.1e} of their size",
    )
    check_export(a)


def whole(a: argparse.Namespace) -> None:
    """8B: trained, exported, loaded; answers to prompts."""
    started = time.perf_counter()
    flags = ["--pairs-per-step", max(4, sized(a, 16)), "--max-steps", 20]
    rows = train(a, *flags_for(a, "8B", "uf"), *flags)
    say(
        a,
        f"- 8B, 20 steps of {rows[0]['pairs']} pairs: {time.perf_counter() - started:.1f} s from "
        f"start to export, {sum(row['seconds'] for row in rows):.1f} s of steps; loss "
        f"{rows[0]['loss']:.4f} -> {rows[-1]['loss']:.4f}",
    )
    generate(a)
    check_export(a)


@torch.no_grad()
def check_export(a: argparse.Namespace) -> None:
    """An exported model's log-probs of 300 tokens, by transformers and by model.py."""
    from transformers import AutoModelForCausalLM

    directory = a.scratch / "out/model"
    dtype = torch.bfloat16 if a.device == "cuda" else torch.float32
    ids = np.concatenate([pair.chosen for pair in make_pairs(a, "uf")[1]])[:300]
    ids = torch.from_numpy(ids).to(a.device)
    peer = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).to(a.device)
    theirs = peer(ids[None]).logits[0].float().log_softmax(-1)
    ours = model_py.load_model(directory, dtype, a.device).logits(ids).float().log_softmax(-1)
    difference = (theirs - ours).abs()
    same = (theirs.argmax(-1) == ours.argmax(-1)).float().mean()
    say(
        a,
        f"- its export loads in transformers and in model.load_model: log-probs differ by at most "
        f"{difference.max():.1e} nats, {difference.mean():.1e} on average ({dtype}); "
        f"{same:.1%} of the likeliest tokens are the same",
    )


def generate(a: argparse.Namespace) -> None:
    """256 greedy tokens after each prompt of 128, one row at a time and 64."""
    n_prompt, n_new, rng = sized(a, 128), sized(a, 256), np.random.default_rng(0)
    for batch, n_prompts in ((1, 4), (64, 128)):
        prompts, answers = a.scratch / "out/prompts.jsonl", a.scratch / f"out/answers-{batch}.jsonl"
        rows = rng.integers(0, shape_of(a, "8B").bos_token_id, (n_prompts, n_prompt)).tolist()
        prompts.write_text("".join(json.dumps({"prompt_ids": row}) + "\n" for row in rows))
        words = [sys.executable, "eval.py", "generate", "--model", a.scratch / "out/model"]
        words += ["--prompts", prompts, "--out", answers, "--max-new-tokens", n_new]
        words += ["--cache-tokens", batch * (n_prompt + n_new)]
        process, log = start(a, [str(word) for word in words])
        code, printed = process.wait(), log.read_text()
        if code:
            raise ChildProcessError(f"eval.py generate, exit code {code}\n{printed[-2000:]}")
        say(
            a,
            f"- generation, {batch} at a time, {n_prompts} prompts of {n_prompt} tokens, up to "
            f"{n_new} new ones: {re.findall(r'([0-9,.]+) tokens/s', printed)[-1]} tokens/s",
        )


# --------------------------------------------------------------------------------------- the parts

# In this order: today's defaults first, then the peers and what they are compared with, the rest.
PARTS = {"compile": compile_blocks, "step-3b-defaults": step, "step-uf-defaults": step}
PARTS |= {"step-profile": profile, "step-3b-hh": step, "end-to-end-example": example, ORPO: step}
PARTS |= {"step-3b-recomputed": step, "step-3b-dpo-live": step}
PARTS |= dict.fromkeys(PEERS, peer)
PARTS |= {"step-3b-varying-heads": step, "step-3b-eager-head": step}
PARTS |= {"step-uf-two-pools": step, "step-3b-resharded": step}
PARTS |= {"step-uf-reduce-always": step, "step-3b-pageable": step}
PARTS |= {"step-uf-recomputed": step}
PARTS |= dict.fromkeys(STEPS, step)
PARTS |= {"end-to-end-resume": resume, "end-to-end-8b": whole}


def parts_named(names: list[str]) -> list[str]:
    """The parts of a command line, each once: a name itself, all parts that begin so, or "all"."""
    found = []
    for name in names:
        found += [name] if name in PARTS else [p for p in PARTS if name in ("all", p[: len(name)])]
    return list(dict.fromkeys(found))


def too_large(a: argparse.Namespace, shape: str) -> bool:
    """True if training this shape needs more memory than the card has: 16 bytes a parameter. (It
    takes no memory of the GPU to ask.)"""
    if a.device == "cpu":
        return False
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    mebibytes = int(subprocess.check_output(query, text=True).split()[0])
    parameters = sum(map(math.prod, expected_shapes(shape_of(a, shape)).values()))
    return 16 * parameters > mebibytes * 2**20


def shape_trained(part: str) -> str | None:
    """The shape that a part cannot do without."""
    if part in STEPS:
        return STEPS[part][0]
    return "8B" if part == "end-to-end-8b" else None


def run_part(a: argparse.Namespace, name: str, seconds: float) -> str | None:
    """Runs a part as a process, for at most so many seconds. Returns its error; None if all went
    well."""
    shutil.rmtree(a.scratch / "out", ignore_errors=True)
    process = subprocess.Popen(
        [sys.executable, __file__, f"run:{name}", *a.options],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # so that all that it starts can be killed with it
    )
    try:
        error = process.communicate(timeout=seconds if seconds < math.inf else None)[1]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        error = "its time was over"
    return error.strip()[-2000:] if process.wait() else None


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "what", nargs="+", help=f"all, or how names of parts begin: {', '.join(PARTS)}"
    )
    parser.add_argument("--minutes", type=float, default=math.inf, help="then stop what runs")
    parser.add_argument("--small", action="store_true", help="tiny sizes")
    parser.add_argument("--out", type=Path, default=ROOT / "bench/GPU_RESULTS.md")
    parser.add_argument("--scratch", type=Path, default=Path("/tmp/asft-gpu"))
    parser.add_argument(
        "--micro-batch",
        type=int,
        default=MICRO_BATCHES[0],
        choices=MICRO_BATCHES,
        help="a peer's first try, in pairs [32]",
    )
    parser.add_argument("--peak-tflops", type=float, default=989, help="for MFU [989: H100, H200]")
    a = parser.parse_args()
    a.device = "cuda" if torch.cuda.is_available() else "cpu"
    a.small, a.scratch, a.out = a.small or a.device == "cpu", a.scratch.resolve(), a.out.resolve()
    a.options = ["--scratch", str(a.scratch), "--out", str(a.out)]
    a.options += ["--peak-tflops", str(a.peak_tflops), "--micro-batch", str(a.micro_batch)]
    a.options += ["--small"] * a.small
    a.scratch.mkdir(parents=True, exist_ok=True)
    order, _, a.part = a.what[0].partition(":")  # this program calls itself as make:SHAPE, run:PART
    if a.part:
        make_model(a, a.part) if order == "make" else PARTS[a.part](a)
        sys.stdout.flush()
        os._exit(0)  # as train.py ends, because a process group is open

    for name in a.what:
        if not parts_named([name]):
            parser.error(f"no part begins with {name!r}")
    device = "CPU"
    if a.device == "cuda":  # asked of nvidia-smi, so that this process takes no memory of the GPU
        query = ["--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
        device = subprocess.check_output(["nvidia-smi", *query], text=True).strip()
    say(
        a,
        f"\n## {datetime.now():%Y-%m-%d %H:%M}, {device}\n\ntorch {torch.__version__}, CUDA "
        f"{torch.version.cuda}, Python {sys.version.split()[0]}{', small sizes' * a.small}; "
        f"{shutil.disk_usage(a.scratch).free / 1e9:.0f} GB of disk free\n\n"
        f"    python bench/gpu.py {' '.join(sys.argv[1:])}\n",
    )
    deadline, failed = time.monotonic() + 60 * a.minutes, 0
    for name in parts_named(a.what):
        done, left = a.scratch / f"{name}.done", deadline - time.monotonic()
        if done.exists():
            say(a, f"- {name}: measured by an earlier call")
        elif missing := missing_packages(name):
            pip = f"pip install {benchmark.PINNED['trl']}"
            say(a, f"- {name}: left out, {', '.join(missing)} not installed: {pip}")
        elif (shape := shape_trained(name)) and too_large(a, shape):
            say(a, f"- {name}: left out, its {shape} does not fit on this card")
        elif left < (1 if a.small else LEAST_SECONDS):
            say(a, f"- {name}: no time left")
        elif (error := run_part(a, name, left)) is not None:
            failed = 1
            indented = error.replace("\n", "\n      ")
            say(a, f"- {name} FAILED\n\n      {indented}\n")
        else:
            done.touch()
    return failed


if __name__ == "__main__":
    sys.exit(main())
