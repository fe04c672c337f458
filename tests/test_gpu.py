"""bench/gpu.py in its small sizes on the CPU: what it reports is what ran."""

import argparse
import gzip
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys

import gpu
import pytest
import torch
import variants
from conftest import ON_CPU, ROOT, flags, main, random_pairs, rows, tiny_model, trained, words
from torch import Tensor
from torch._dynamo import config as dynamo_config
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch.distributed.fsdp import FSDPModule
from torch.utils.flop_counter import FlopCounterMode

import train
from data import pack
from model import exp_in_place
from support import compiler, sharding
from support.flops import pair_flops
from support.sharding import OnePool


@pytest.mark.parametrize("share_prompt", [True, False])
def test_the_flops_of_a_pass_are_those_of_its_products_and_of_unmasked_attention(
    share_prompt,
):
    model, lengths = tiny_model(), [(5, 7, 4), (1, 3, 8), (9, 1, 2)]
    pairs = random_pairs(lengths)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(pack(pairs, share_prompt))
    products = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    seen = 0  # each query sees the keys at positions up to its own
    for p, w, l in lengths:
        computed = [range(p), range(p, p + w), range(p, p + l)] + [range(p)] * (not share_prompt)
        seen += sum(position + 1 for positions in computed for position in positions)
    # Queries with keys, and weights with values; 4 heads of size 8, 2 layers.
    attention = 2 * 2 * 4 * 8 * 2 * seen
    blocks, head, again = pair_flops(model.config, pairs, share_prompt).sum(0)
    assert blocks + head == products + attention
    tokens = sum(pair.packed_tokens(share_prompt) for pair in pairs)
    assert again == blocks - 2 * 2 * tokens * model.config.intermediate_size * 32  # down_proj's


def test_a_batch_goes_to_a_gpu_from_pinned_memory_and_the_cpu_does_not_wait(monkeypatch):
    batch, pinned, sent = pack(random_pairs([(5, 7, 4), (1, 3, 8)])), [], []
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    monkeypatch.setattr(Tensor, "to", lambda *args, **options: sent.append((*args, options)))
    batch.to("cuda")
    values = [*vars(batch).values(), *vars(batch.segments).values()]
    tensors = [value for value in values if isinstance(value, Tensor)]
    assert len(tensors) == 9 and {id(x) for x in pinned} == {id(x) for x in tensors}
    assert sent == [(x, "cuda", {"non_blocking": True}) for x in pinned]
    batch.to("cpu")
    assert len(pinned) == 9 and len(sent) == 18


@pytest.fixture
def run_gpu(tmp_path, monkeypatch):
    """run_gpu(NAME): `python bench/gpu.py NAME`, but in this process. Returns its exit code and
    what it has reported."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # for the processes that it starts
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def run(what):
        command = ["gpu.py", what, "--scratch", tmp_path, "--out", tmp_path / "results.md"]
        monkeypatch.setattr(sys, "argv", list(map(str, command)))
        return gpu.main(), (tmp_path / "results.md").read_text()

    return run


@pytest.fixture
def options(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # for train.py, which it starts
    given = {"small": True, "device": "cpu", "options": [], "peak_tflops": 1e-6, "micro_batch": 32}
    paths = {"scratch": tmp_path, "out": tmp_path / "results.md"}
    return argparse.Namespace(**given, **paths, part="step-uf-unshared")


def test_pairs_have_the_mean_lengths_of_their_profile_and_padded_ones_the_groups_longest_sequence(
    options,
):
    options.small = False
    for kind, means in gpu.LENGTHS.items():
        pairs, padded = (gpu.make_pairs(options, name)[1] for name in (kind, f"{kind}-padded"))
        for side, mean in zip(("prompt", "chosen", "rejected"), means, strict=True):
            found = statistics.fmean(len(getattr(pair, side)) for pair in pairs)
            assert found == pytest.approx(mean, rel=0.02)

        def sizes(group):
            return [len(p.prompt) + len(y) for p in group for y in (p.chosen, p.rejected)]

        for i in range(0, len(pairs), 4):
            longest = max(sizes(pairs[i : i + 4]))
            assert longest <= 2048
            assert set(sizes(padded[i : i + 4])) == {longest}
        assert [len(p.prompt) for p in padded] == [len(p.prompt) for p in pairs]


def test_a_measured_step_is_the_median_of_what_train_py_logged_and_nothing_is_exported(options):
    gpu.make_model(options, "8B")
    base = {"pairs_per_s": 1e9, "peak_memory_gib": 1.0, "first_loss": 2.5}
    (options.scratch / "step-uf-defaults.json").write_text(json.dumps(base))
    gpu.step(options)
    logged = (options.scratch / "out/metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in logged][2:4]
    found = json.loads((options.scratch / "step-uf-unshared.json").read_text())
    assert found["seconds"] == statistics.median(row["seconds"] for row in rows)
    # 6 FLOPs for each token and parameter of the blocks (2 of 36,864), 6 D for each logit of the
    # head, and a little for attention.
    pairs, rates = gpu.make_pairs(options, "uf")[1], []
    for i, row in zip((2, 3), rows, strict=True):
        scored = sum(len(p.chosen) + len(p.rejected) for p in pairs[4 * i : 4 * i + 4])
        flops = 6 * (2 * 36_864 * row["tokens"] + 640 * 64 * scored)
        rates.append(flops / row["seconds"])
    by_hand = statistics.median(rates) / 1e6
    assert by_hand < found["mfu"] < 1.2 * by_hand
    assert f"has {1e9 / found['pairs_per_s']:.3f} x its pairs/s" in options.out.read_text()
    assert "first loss 2.5000" in options.out.read_text()
    assert "0 of 2 blocks recomputed, at most 8192 tokens a micro-batch" in options.out.read_text()
    assert not (options.scratch / "out/model").exists()


def test_five_batches_of_other_lengths_compile_nothing_after_the_first(run_gpu):
    """A block's forward pass and the head's work, each for all numbers of tokens."""
    code, said = run_gpu("compile")
    assert code == 0 and "so far [2, 2, 2, 2, 2], 0 of them after the first" in said, said
    assert "eager takes" in said


def test_a_part_that_fails_is_reported_and_passed_over_and_one_that_is_done_is_not_repeated(
    run_gpu, tmp_path
):
    (tmp_path / "8B").mkdir()
    (tmp_path / "8B/config.json").write_text("{}")
    for part in gpu.STEPS:  # before step-profile and after it
        (tmp_path / f"{part}.done").touch()
    code, said = run_gpu("step")
    assert code == 1
    assert "- step-profile FAILED" in said and "model_type is None, wanted 'llama'" in said
    assert all(f"- {part}: measured by an earlier call" in said for part in gpu.STEPS)
    assert not (tmp_path / "step-profile.done").exists()


def test_trl_trains_on_the_same_pairs_and_its_loss_stands_beside_ours(options):
    pytest.importorskip("trl")
    gpu.make_model(options, "3B")
    options.part = "step-3b-orpo"
    gpu.step(options)
    shutil.rmtree(options.scratch / "out")  # as before each part
    options.part = "peers-trl-orpo"
    gpu.peer(options)
    said = options.out.read_text()
    assert "4 pairs a micro-batch" in said
    theirs, ours = map(float, re.findall(r"first loss ([\d.]+)", said))
    # 640 words that are about equally likely. TRL's mean is over all tokens, of prompts as well.
    by_hand = math.log(640) + 0.1 * math.log(2)
    assert theirs == pytest.approx(by_hand, rel=0.01) and ours == pytest.approx(theirs, rel=0.01)
    assert "step-3b-orpo has" in said


def test_a_peer_gets_the_largest_micro_batch_that_fits(options, monkeypatch):
    gpu.make_model(options, "3B")
    tried, error = [], "torch.OutOfMemoryError: CUDA out of memory."

    def watch(words, out, warmup, pairs_per_step):
        tried.append(int(words[words.index("--micro-batch") + 1]))
        if tried[-1] > 1:
            raise ChildProcessError(error)
        figures = {"pairs_per_s": 2.0, "peak_memory_gib": 3.0, "seconds": [2.0], "losses": [6.5]}
        return figures | {"versions": {"trl": "1"}}

    monkeypatch.setattr(gpu.benchmark, "watch", watch)
    options.part = "peers-trl-orpo"
    gpu.peer(options)
    said = options.out.read_text()
    assert tried == [4, 2, 1] and said.count("out of memory with") == 2
    assert "2.00 pairs/s, peak 3.00 GiB, 1 pairs a micro-batch" in said
    error = "a fault of another kind"
    with pytest.raises(ChildProcessError, match=error):
        gpu.peer(options)
    assert tried[3:] == [4]
    options.micro_batch = 2
    with pytest.raises(ChildProcessError, match=error):
        gpu.peer(options)
    assert tried[4:] == [2]


def test_a_peer_that_is_not_installed_is_left_out_with_the_pip_command(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    results = tmp_path / "results.md"
    words = f"gpu.py peers-liger --small --scratch {tmp_path} --out {results}".split()
    monkeypatch.setattr(sys, "argv", words)
    assert gpu.main() == 0
    said = results.read_text()
    assert "peers-liger-orpo: left out, liger_kernel, trl, datasets not installed: pip" in said
    assert not list(tmp_path.glob("*.done"))


def test_parts_are_measured_in_the_order_of_their_names_each_once_and_a_whole_name_is_that_part():
    assert gpu.parts_named(["step-uf-defaults", "compile", "step-uf-defaults"]) == [
        "step-uf-defaults",
        "compile",
    ]
    assert gpu.parts_named(["step-3b-hh"]) == ["step-3b-hh"]
    assert gpu.parts_named(["step-3b-h"]) == ["step-3b-hh", "step-3b-hh-unshared"]
    assert gpu.parts_named(["all"]) == list(gpu.PARTS) and not gpu.parts_named(["nothing"])


def test_what_does_not_fit_on_the_card_is_left_out_and_the_smaller_shape_is_profiled(
    tmp_path, monkeypatch
):
    ran, a = [], argparse.Namespace(device="cuda")
    for gigabytes, fits in ((80, ["3B"]), (141, ["8B", "3B"])):
        mebibytes = f"{gigabytes * 10**9 // 2**20}\n"
        monkeypatch.setattr(gpu.subprocess, "check_output", lambda *_, text, m=mebibytes: m)
        a.small = False
        assert [shape for shape in ("8B", "3B") if not gpu.too_large(a, shape)] == fits
        a.small = True
        assert not gpu.too_large(a, "8B")
    monkeypatch.setattr(gpu, "too_large", lambda _, shape: shape == "8B")
    monkeypatch.setattr(gpu, "run_part", lambda a, name, seconds: ran.append((name, a.options)))
    results = tmp_path / "results.md"
    words = f"gpu.py end-to-end-8b step-uf-defaults step-3b-kept --small --scratch {tmp_path}"
    words += f" --micro-batch 8 --out {results}"
    monkeypatch.setattr(sys, "argv", words.split())
    assert gpu.main() == 0
    [(name, passed)] = ran
    assert name == "step-3b-kept" and passed[passed.index("--micro-batch") + 1] == "8"
    assert results.read_text().count("left out, its 8B does not fit on this card") == 2
    shapes = []
    monkeypatch.setattr(gpu, "prepare", lambda _, shape: shapes.append(shape) or (None, 1 / 0))
    with pytest.raises(ZeroDivisionError):
        gpu.profile(a)
    assert shapes == ["3B"]


def test_the_profile_writes_a_timeline(run_gpu, tmp_path):
    code, said = run_gpu("step-profile")
    assert code == 0 and "timeline: results.trace.json.gz" in said, said
    with gzip.open(tmp_path / "results.trace.json.gz") as file:
        assert len(json.load(file)["traceEvents"]) > 100


def test_peers_come_after_what_they_are_compared_with():
    order = list(gpu.PARTS)
    for peer, (_, _, bases) in gpu.PEERS.items():
        assert all(order.index(base) < order.index(peer) for base in bases)


def test_a_variants_part_runs_that_variant(options, monkeypatch):
    started = []
    monkeypatch.setattr(gpu, "start", lambda _, words: started.append(words) or 1 / 0)
    for options.part in ("step-uf-two-pools", "step-uf-defaults"):
        with pytest.raises(ZeroDivisionError):
            gpu.train(options, "--lr", 1)
    variant, plain = started
    assert variant[1:3] == [str(ROOT / "bench/variants.py"), "two-pools"]
    assert plain[1] == str(ROOT / "train.py") and variant[3:] == plain[2:]


# What variants.py replaces of what train.py uses.
CHANGED = [
    (sharding, "prepare_backward"),
    (sharding, "keep_gathered"),
    (FSDPModule, "set_custom_reduce_scatter"),
]


def test_variants_change_what_they_say(start, tmp_path, monkeypatch):
    for place, name in CHANGED:
        monkeypatch.setattr(place, name, getattr(place, name))  # put back after the test
    sizes, allocate = [], OnePool.allocate

    def counted(pool, size, **options):
        sizes.append(math.prod(size))
        return allocate(pool, size, **options)

    monkeypatch.setattr(OnePool, "allocate", counted)
    more = "--precision bf16 --max-steps 1"
    assert main(*flags(start, tmp_path / "a", more)) == 0
    # Once in the rehearsal and once in the step, all gradients and their reduced copies.
    assert sum(sizes) == 2 * 2 * sum(p.numel() for p in tiny_model().parameters())
    sizes.clear()
    variants.two_pools()
    assert main(*flags(start, tmp_path / "b", more)) == 0 and not sizes
    before = sharding.prepare_backward
    variants.reduce_always()
    assert sharding.prepare_backward is not before
    monkeypatch.setattr(sharding, "keep_gathered", lambda model: True)
    variants.resharded()
    assert not sharding.keep_gathered(tiny_model())


@pytest.mark.parametrize("name", ["keep-more", "varying-heads", "more-kernels", "eager-head"])
def test_a_variant_leaves_out_one_thing_that_is_compiled_otherwise(monkeypatch, name):
    for place in ("functorch_config", "dynamo_config", "inductor_config"):
        monkeypatch.setattr(compiler, place, getattr(compiler, place))  # put back after the test
    monkeypatch.setattr(train, "compile_model", train.compile_model)
    ours = tiny_model()
    variants.VARIANTS[name]()
    train.compile_model(ours)
    found = {
        "keep-more": functorch_config.ban_recompute_materialized_backward,
        "varying-heads": not dynamo_config.specialize_int,
        "more-kernels": not inductor_config.triton.mix_order_reduction_non_strict_mode,
        "eager-head": ours.exponentiate is exp_in_place,
    }
    assert found == {variant: variant == name for variant in found}
    assert all(block._compiled_call_impl for block in ours.model["layers"])


def test_variants_of_train_py_make_the_same_updates(start, tmp_path, monkeypatch, capfd):
    """In bf16, so that FSDP shards over one process; in several micro-batches."""
    small = "--max-steps 2 --pairs-per-step 4 --precision bf16 --max-tokens-per-gpu 30"
    found = {}
    for name in ("plain", "reduce-always", "two-pools", "resharded"):
        out = tmp_path / name
        with monkeypatch.context() as patch:
            for place, changed in CHANGED:
                patch.setattr(place, changed, getattr(place, changed))  # put back
            if name == "reduce-always":  # as its user starts it; the others in this process
                command = [sys.executable, "bench/variants.py", name]
                command += words(*flags(start, out, small))
                subprocess.run(command, cwd=ROOT, check=True, env=os.environ | ON_CPU)
            else:
                if name != "plain":
                    variants.VARIANTS[name]()
                trained(start, out, small)
        said = capfd.readouterr().out
        assert "micro-batches a step" in said and " 1.0 micro-batches" not in said
        found[name] = [(row["loss"], row["grad_norm"]) for row in rows(out)]
    expected, *others = found.values()
    for variant in others:
        assert variant == [pytest.approx(pair, rel=1e-4) for pair in expected]
