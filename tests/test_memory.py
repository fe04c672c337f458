"""How much is recomputed, compiled and reduced, and what is tried before the first step.

The oracles count: matrix products in compiled graphs, graphs, collectives, live bytes.
"""

import contextlib
import json
import math
import re
import weakref
from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import (
    flags,
    main,
    random_pairs,
    read_json,
    rows,
    run_joined,
    tiny_model,
    trained,
    write_pairs,
)
from safetensors.torch import load_file
from torch._dynamo import config as dynamo_config
from torch._dynamo.backends.common import aot_autograd
from torch._functorch import config as functorch_config
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import model as model_py
import train
from data import pack
from model import Block, rope_tables
from support import compiler, memory, sharding
from support.flops import peak_tflops, utilisation
from support.processes import StoppedError, join_group

aten = torch.ops.aten

# ------------------------------------------------------------------------------ compiled blocks


@pytest.fixture(scope="module")
def flash_attention():
    """CUDA's attention, for the CPU: nothing but its shapes."""

    def forward(q, *_, **__):
        return torch.zeros_like(q), torch.zeros(q.shape[1::-1]), torch.zeros(2, dtype=torch.uint64)

    def backward(_, q, k, v, *__, **___):
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)

    torch.library.register_kernel("torch_attn::_varlen_attn", "cpu", forward)
    torch.library.register_kernel("torch_attn::_varlen_attn_backward", "cpu", backward)


class Counting:
    """A compiler that counts graphs, and the matrix products that run in them."""

    def __init__(self):
        self.graphs = self.products = self.kept = 0
        self.scalars, self.widths = set(), set()  # among a forward pass's inputs
        self.backend = aot_autograd(
            fw_compiler=self.compiled_forward,
            bw_compiler=self.compiled,
            partition_fn=min_cut_rematerialization_partition,  # inductor's
        )

    def compiled(self, graph, _):
        self.graphs += 1
        products = sum(node.target == torch.ops.aten.mm.default for node in graph.graph.nodes)

        def run(*inputs):
            self.products += products
            return graph(*inputs)

        return make_boxed_func(run)

    def compiled_forward(self, graph, inputs):
        compiled = self.compiled(graph, inputs)
        sizes = [[str(n) for n in x.shape] for x in inputs if isinstance(x, torch.Tensor)]
        self.widths |= {width for size in sizes for width in size[1:]}
        lengths = {size[0] for size in sizes if size}
        self.scalars |= {str(x) for x in inputs if isinstance(x, torch.SymInt)} - lengths

        def run(inputs):
            given = {tensor.data_ptr() for tensor in inputs if isinstance(tensor, torch.Tensor)}
            output, *rest = compiled(inputs)
            tensors = [tensor for tensor in rest if isinstance(tensor, torch.Tensor)]
            self.kept = sum(t.nbytes for t in tensors if t.data_ptr() not in given)
            return output, *rest

        run._boxed_call = True
        return run

    def take(self) -> int:
        """The products since the last call."""
        found, self.products = self.products, 0
        return found


@pytest.fixture
def counting(flash_attention, monkeypatch):
    monkeypatch.setattr(model_py, "on_cuda", lambda x: True)
    torch._dynamo.reset()
    return Counting()


@pytest.mark.parametrize("recompute, in_backward", [(False, 14), (True, 20)])
def test_a_compiled_block_recomputes_six_of_its_seven_matrix_products(
    counting, recompute, in_backward
):
    """Backward has two for each of the seven weights. down_proj's own output is not needed."""
    block = Block(tiny_model().config).bfloat16()
    block.recompute = recompute
    block.compile(dynamic=True, backend=counting.backend, fullgraph=True)
    for lengths in ([(5, 4, 3)], [(6, 2, 3), (2, 2, 5)]):
        batch = pack(random_pairs(lengths), longest=64)
        x_TD = torch.randn(len(batch.tokens_T), 32, dtype=torch.bfloat16, requires_grad=True)
        output = block(x_TD, rope_tables(tiny_model().config, batch.positions_T), batch.segments)
        assert counting.take() == 7
        output.float().square().sum().backward()
        assert counting.take() == in_backward
    assert counting.graphs == 2


def test_a_compiled_block_keeps_what_its_matrix_products_made(counting):
    """And besides, what attention keeps. What is made from these without a product is not kept."""
    config = tiny_model().config
    batch = pack(random_pairs([(6, 2, 3), (2, 2, 5)]), longest=64)
    tokens, keys = len(batch.tokens_T), len(batch.segments.key_index_N)
    heads, head_dim = config.num_attention_heads, config.head_dim
    wide = config.hidden_size + 2 * config.intermediate_size + 2 * heads * head_dim
    key_wide = 2 * config.num_key_value_heads * head_dim
    small = tokens * (2 + heads) * 4 + 16  # two norms' scales, attention's sums, its random state
    kept = []
    for ban in (True, False):
        block = Block(config).bfloat16()
        block.compile(dynamic=True, backend=counting.backend, fullgraph=True)
        x_TD = torch.randn(tokens, 32, dtype=torch.bfloat16, requires_grad=True)
        with functorch_config.patch(ban_recompute_materialized_backward=ban):
            block(x_TD, rope_tables(config, batch.positions_T), batch.segments).sum().backward()
        kept.append(counting.kept)
        torch._dynamo.reset()
    assert kept[1] == 2 * (tokens * wide + keys * key_wide) + small
    again = 2 * config.hidden_size  # two norms; before torch 2.14 a product's input too
    again += config.intermediate_size * (torch.__version__ < (2, 14))
    assert kept[0] == kept[1] + 2 * tokens * again


@contextlib.contextmanager
def group(world=1, backend="gloo"):
    """A process group; with backend "fake", its other processes do not exist."""
    if backend == "fake":
        memory.init_fake_group(world)
    else:
        join_group(backend)
    try:
        yield
    finally:
        dist.destroy_process_group()


def test_a_sharded_run_compiles_five_graphs_whatever_is_recomputed(counting, monkeypatch):
    """Forward and backward with and without recomputation, and one for evaluation: dynamo gives up
    compiling after eight."""
    monkeypatch.setattr(dynamo_config, "specialize_int", True)  # as support/compiler.py does
    ours = tiny_model()  # of two blocks
    for block in ours.model["layers"]:
        block.compile(dynamic=True, backend=counting.backend)
    with group():
        train.shard(ours, init_device_mesh("cpu", (1,)), torch.bfloat16)
        for recompute in (2, 1, 0):
            ours.recompute_first(recompute)
            for lengths in ([(5, 4, 3)], [(6, 2, 3), (2, 2, 5)]):
                ours(pack(random_pairs(lengths), longest=64))[0].sum().backward()
                with torch.no_grad():
                    ours(pack(random_pairs(lengths), longest=64))
                sharding.reshard(ours)
    assert counting.graphs == 5


def test_in_compiled_blocks_only_counts_of_tokens_vary(counting, start, monkeypatch):
    """Dynamo takes the numbers of FSDP's modules for variables. Kernels of RoPE that divide by a
    head_dim not known to them have ten times as many instructions."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counting.backend))
    config = train.Config(
        model=str(start / "model"), data="x", device="cpu", precision="bf16", compile="on"
    )
    with group():
        ours = train.build_model(config, init_device_mesh("cpu", (1,)))
        for lengths in ([(5, 4, 3)], [(6, 2, 3), (2, 2, 5)]):
            ours(pack(random_pairs(lengths), longest=64))[0].sum().backward()
        assert counting.graphs == 3  # a block's forward and backward, and the head's
        assert counting.widths and all(width.isdigit() for width in counting.widths)
        assert all(scalar.isdigit() for scalar in counting.scalars)
        with torch.no_grad():
            for length in (3, 4, 5):
                ours.logits(torch.arange(length))
        assert counting.graphs == 4


def test_models_that_are_small_or_in_fp32_are_not_compiled(start, monkeypatch):
    compiled, banned = [], "ban_recompute_materialized_backward"  # see the test of what is kept
    monkeypatch.setattr(torch, "compile", lambda _, **how: compiled.append(how.get("dynamic")))
    with group():
        mesh = SimpleNamespace(device_type="cuda", size=lambda: 1)
        for choice, least, precision, expected in [
            ("auto", 50_000_000, "bf16", []),
            ("auto", 1000, "bf16", [True, True, None]),  # two blocks, and the head
            ("auto", 1000, "fp32", []),
            ("on", 50_000_000, "fp32", [True, True, None]),
            ("off", 1000, "bf16", []),
        ]:
            monkeypatch.setattr(compiler, "MIN_PARAMETERS", least)
            setattr(functorch_config, banned, True)
            monkeypatch.setattr(train, "shard", lambda *_: None)
            monkeypatch.setattr(train.Llama, "to_empty", lambda model, device: model)
            monkeypatch.setattr(train, "load_weights", lambda *_: None)
            config = train.Config(
                model=str(start / "model"),
                data="x",
                device="cpu",
                compile=choice,
                precision=precision,
            )
            train.build_model(config, mesh)
            assert compiled == expected
            assert getattr(functorch_config, banned) == (not expected)
            compiled.clear()


# ----------------------------------------------------------------------- reductions of gradients


class Operations(TorchDispatchMode):
    """Counts what torch runs, by the operations' names."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "shape, names, copies, scatters, sums",
    [
        ((1,), ("shard",), 4, 0, 0),  # nothing is sent, but each reduction copies all gradients
        ((4,), ("shard",), 12, 12, 0),  # or each process would hold the whole model's gradients
        ((2, 2), ("replicate", "shard"), 12, 12, 4),
        ((4, 1), ("replicate", "shard"), 4, 0, 4),  # each process holds the whole model anyway
    ],
)
def test_gradients_are_reduced_no_more_often_than_memory_needs(
    shape, names, copies, scatters, sums
):
    """A step of three micro-batches; two blocks, the embedding, and norm with head are sharded."""
    ours, counter = tiny_model(), Operations()
    with group(math.prod(shape), "fake"), counter:
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        train.shard(ours, mesh, torch.bfloat16)
        for i in range(3):
            sharding.prepare_backward(ours, last=i == 2)
            ours(pack(random_pairs([(5, 4, 3)])))[0].sum().backward()
    assert counter.calls["chunk_cat"] == copies  # where a reduction begins
    assert counter.calls["_reduce_scatter_base_"] == scatters
    assert counter.calls["allreduce_"] == sums


@pytest.mark.parametrize("gathered, gathers", [(False, 3 * (4 + 2)), (True, 4)])
def test_weights_are_gathered_twice_in_a_micro_batch_or_once_in_a_step(gathered, gathers):
    """Two steps of three micro-batches, four processes. In backward only the blocks are gathered
    again: the head still is, and the embedding is not needed. Between steps nothing is gathered."""
    ours = tiny_model()
    with group(4, "fake"):
        mesh = init_device_mesh("cpu", (4,))
        train.shard(ours, mesh, torch.bfloat16)
        if gathered:
            assert sharding.keep_gathered(ours)
        for _ in range(2):
            with Operations() as counter:
                for i in range(3):
                    sharding.prepare_backward(ours, last=i == 2)
                    ours(pack(random_pairs([(5, 4, 3)])))[0].sum().backward()
            assert counter.calls["_allgather_base_"] == gathers
            assert all(isinstance(parameter, DTensor) for parameter in ours.parameters())
    assert not sharding.keep_gathered(tiny_model())  # not sharded


@pytest.mark.parametrize("more", ["", "--loss dpo --reference live"])
def test_weights_that_are_kept_gathered_change_no_number(start, tmp_path, monkeypatch, more):
    """Also in evaluations, in checkpoints and in the best weights. Only the first micro-batch of a
    step gathers them."""
    run = "--precision bf16 --max-steps 4 --pairs-per-step 4 --max-tokens-per-gpu 30 --eval-every 1"
    run += " --save-every 1 --keep-best accuracy --eval-data"
    rehearse, step_loss, seen = memory.rehearse, train.step_loss, []

    def all_gathered(model) -> bool:
        return not any(isinstance(p, DTensor) for p in model.parameters())

    def watched(model, dataset, indexes):
        before = all_gathered(model)
        losses = step_loss(model, dataset, indexes)
        if torch.is_grad_enabled():
            seen.append("-+"[before] + "-+"[all_gathered(model)])
        return losses

    def keeping(model, *rest):
        assert sharding.keep_gathered(model)
        return rehearse(model, *rest)

    monkeypatch.setattr(train, "step_loss", watched)
    trained(start, tmp_path / "plain", more, run, start / "heldout.jsonl")
    assert set(seen) == {"--"}
    seen.clear()
    monkeypatch.setattr(memory, "rehearse", keeping)
    trained(start, tmp_path / "kept", more, run, start / "heldout.jsonl")
    # The rehearsal and all steps have several micro-batches.
    assert re.fullmatch(r"(-\+( \+\+)+ ?){5,}", " ".join(seen)), seen
    checkpoint = "checkpoints/step-000003/00000-of-00001.safetensors"
    for name in ("model/model.safetensors", "eval.jsonl", checkpoint):
        same = (tmp_path / "plain" / name).read_bytes() == (tmp_path / "kept" / name).read_bytes()
        assert same, name
    plain, kept = ([row["loss"] for row in rows(tmp_path / name)] for name in ("plain", "kept"))
    assert plain == kept


@pytest.mark.parametrize("more", ["", "--replicas 2"])
def test_two_processes_with_several_micro_batches_train_as_one(start, tmp_path, more):
    """In bf16: sharded, one process shares the code that delays reductions."""
    run = "--max-steps 4 --precision bf16 --max-tokens-per-gpu 40 --checkpoint-blocks 1"
    # Otherwise a gradient that is 0 but for rounding moves its weight as far as any other.
    run += " --adam-eps 1e-3"
    trained(start, tmp_path / "one", run)
    run_joined(flags(start, tmp_path / "two", run, more))
    one, two = (load_file(tmp_path / n / "model/model.safetensors") for n in ("one", "two"))
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=0, atol=1e-4)
    first, second = (rows(tmp_path / name) for name in ("one", "two"))
    for a, b in zip(first, second, strict=True):
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-5)


# ------------------------------------------------------------------- what is tried before the run


def plans_of(*steps):
    """Plans of one process."""
    return [[list(step)] for step in steps]


READS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal}
INDEXED = {aten.index, aten.index_put, aten.index_put_}


class HostReads(TorchDispatchMode):
    """Counts operations for whose result the CPU would have to wait, if the tensors were a GPU's:
    numbers that are read, and indexing by a mask, whose size must be known."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        masked = func.overloadpacket in INDEXED and any(
            x is not None and x.dtype == torch.bool for x in args[1]
        )
        if func.overloadpacket in READS or masked:
            self.found[func.overloadpacket] += 1
        return func(*args, **(kwargs or {}))


def test_a_step_waits_for_the_device_no_more_often_if_it_has_more_micro_batches(
    start, tmp_path, monkeypatch, capsys
):
    train_, reads = train.train, []

    def counted(*given):
        reads.append(HostReads())
        with reads[-1]:
            train_(*given)

    monkeypatch.setattr(train, "train", counted)
    for most, least in [(8192, 1), (30, 4)]:
        more = f"--max-steps 2 --pairs-per-step 10 --max-tokens-per-gpu {most}"
        assert main(*flags(start, tmp_path / str(most), more, "--checkpoint-blocks 1")) == 0
        micro_batches = float(re.search(r"([\d.]+) micro-batches", capsys.readouterr().out)[1])
        assert micro_batches >= least and (micro_batches == 1) == (least == 1)
    once, often = (mode.found for mode in reads)
    # In each step the norm, the peak of memory and the request to stop (not in the last).
    assert once == often and 0 < once.total() <= 6
    with reads[0]:
        torch.ones(3)[torch.ones(3) > 0]
    assert reads[0].found[aten.index] == 1  # a mask is counted


def test_the_costliest_micro_batches_are_those_of_most_bytes_not_of_most_tokens():
    sizes = np.array([10, 20, 30, 25])
    scored = np.array([5, 1, 2, 20])
    plans = plans_of(([2], [0, 1]), ([3], [1]), ([0, 1],))
    found = memory.costliest(plans, sizes, [sizes, scored])
    assert found.steps == [[[2], [0, 1]], [[3], [0, 1]]]
    assert (found.count, found.mean, found.most) == (5 / 3, (30 + 30 + 25 + 20 + 30) / 5, 30)
    same = memory.costliest(plans, sizes, [sizes, 2 * sizes])
    assert same.steps == [[[2], [0, 1]]]
    assert memory.costliest(plans_of(([0],), ([3],)), sizes, [sizes]).steps == [[[3]]]
    two = [[[[0], [1]], [[2], []]]]  # the second process has nothing in its second micro-batch
    found = memory.costliest(two, sizes, [sizes])
    assert (found.steps, found.count, found.mean) == ([[[2], [1]]], 2, 60 / 4)


class Bytes(TorchDispatchMode):
    """The Gpu of these tests: counts the bytes of tensors that were made inside and still live."""

    def __init__(self, total=math.inf):
        super().__init__()
        self.total, self.live, self.highest, self.known = total, 0, 0, set()
        self.ever = 0  # the highest of all, which reset_peak does not forget
        self.whole, self.empties = math.inf, 0  # see emptied

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.note(tensor.untyped_storage())
        return result

    def note(self, storage) -> None:
        key, size = storage.data_ptr(), storage.nbytes()
        if size and key not in self.known:
            self.known.add(key)
            self.live += size
            self.highest = max(self.highest, self.live)
            if self.live > self.total:
                raise torch.OutOfMemoryError("CUDA out of memory")
            weakref.finalize(storage, self.forget, key, size)

    def forget(self, key, size) -> None:
        self.known.discard(key)
        self.live -= size

    def available(self):
        return self.total

    def allocated(self):
        return self.live

    def peak(self):
        return self.highest

    def reset_peak(self):
        self.empties = self.emptied()
        self.ever = max(self.ever, self.highest)
        self.highest = self.live

    def emptied(self):
        """One more for each step that took more than `whole` bytes."""
        return self.empties + (self.highest > self.whole)


LENGTHS = [(40, 30, 20), (10, 60, 50), (30, 30, 30), (5, 9, 8)]


@pytest.fixture
def rehearsed(monkeypatch):
    """rehearsed(total, **flags): a rehearsal on a GPU with so many bytes, eight blocks, fp32.
    Returns what it chose, what it said, its pairs and its meter."""
    with group():

        def run(total, most=None, keep=lambda model: False, whole=math.inf, **flags):
            config = train.Config(
                model="m", data="d", device="cpu", pairs_per_step=4, max_steps=2, **flags
            )
            config = replace(config, max_tokens=128)
            pairs = train.Dataset(random_pairs(LENGTHS), config, "cpu")
            pairs.max_tokens_per_gpu = most or pairs.max_tokens_per_gpu
            ours, gpu, said = tiny_model(num_hidden_layers=8), Bytes(total), []
            gpu.whole = whole
            batch = lambda i: pack([pairs.pairs[j] for j in i], longest=128)  # noqa: E731
            monkeypatch.setattr(sharding, "keep_gathered", keep)
            with gpu:
                step_loss = lambda model, _, i: model(batch(i))  # noqa: E731
                chosen = memory.rehearse(ours, pairs, step_loss, said.append, gpu)
            return SimpleNamespace(chosen=chosen, said=said, pairs=pairs, gpu=gpu, model=ours)

        yield run


def peak_with(rehearsed, recomputed, **flags):
    """Bytes at the peak with so many blocks recomputed."""
    return rehearsed(1e12, checkpoint_blocks=str(recomputed), **flags).gpu.ever


def test_as_few_blocks_are_recomputed_as_memory_demands(rehearsed):
    """4% stay free. The run never took more, also not while it tried."""
    peaks = [peak_with(rehearsed, k) for k in range(9)]
    assert all(b < a + 512 for a, b in pairwise(peaks)) and peaks[0] > 3 * peaks[8]
    for k in (0, 1, 4, 7, 8):
        found = rehearsed(1.01 * peaks[k] / 0.96)
        chosen = found.chosen["recomputed_blocks"]
        assert chosen in (k, k + 1)  # at the peak a kept block may cost less than it keeps
        assert found.gpu.ever <= 1.01 * max(peaks[k], peaks[8])
        assert f"memory     recomputes {chosen} of 8 blocks; " in found.said[0]
        assert [block.recompute for block in found.model.model["layers"]] == [
            i < chosen for i in range(8)
        ]
    assert rehearsed(1.01 * peaks[0]).chosen["recomputed_blocks"] > 0  # 4% are left free
    # Nothing more can be recomputed: the run is tried anyway.
    assert rehearsed(1.02 * peaks[8]).chosen["recomputed_blocks"] == 8


def test_more_blocks_are_recomputed_if_the_allocator_would_empty_its_cache_in_each_step(rehearsed):
    peaks = [peak_with(rehearsed, k) for k in range(9)]
    for whole, expected in [(1.02 * peaks[0], 0), (1.02 * peaks[2], 2), (0.9 * peaks[8], 8)]:
        found = rehearsed(1.2 * peaks[0], whole=whole)
        assert found.chosen["recomputed_blocks"] == expected
        assert [block.recompute for block in found.model.model["layers"]].count(True) == expected
        more = f"blocks, {expected} of them because free memory is in pieces; "
        assert (more in found.said[0]) == (expected > 0)
    # A number that was asked for stays.
    found = rehearsed(1e12, whole=0.9 * peaks[8], checkpoint_blocks="3")
    assert found.chosen["recomputed_blocks"] == 3 and "pieces" not in found.said[0]


def test_a_cache_that_is_emptied_only_once_changes_no_choice(rehearsed, monkeypatch):
    """Earlier tries may have left it so."""
    room, tries, measure = 1.2 * peak_with(rehearsed, 0), [], memory.measure

    def measured(model, dataset, steps, recomputed, *rest):
        tries.append(recomputed)
        found = measure(model, dataset, steps, recomputed, *rest)
        return found._replace(emptied=tries.count(0) == 1)

    monkeypatch.setattr(memory, "measure", measured)
    assert rehearsed(room).chosen["recomputed_blocks"] == 0
    assert tries[-3:] == [0, 0, 0]  # the second one again, the third with larger micro-batches


def test_micro_batches_stay_small_if_larger_ones_would_empty_the_cache_in_each_step(rehearsed):
    peak = peak_with(rehearsed, 0, most=170)
    for whole, expected in [(math.inf, 340), (1.02 * peak, 170)]:
        found = rehearsed(1e12, most=170, whole=whole)
        assert found.chosen["max_tokens_per_gpu"] == expected
        assert found.chosen["recomputed_blocks"] == 0
        assert f"(--max-tokens-per-gpu {expected})" in found.said[0]


@pytest.mark.parametrize(
    "others, recomputed",
    [
        # Before the limit is taken; whether one block fits, then how many more; then the other
        # one's allocator empties its cache with 5 recomputed, twice, and not with 6.
        ([0, 1, 2, 1, 0, 0, 0, 1], 6),
        ([0, 1, 0], 8),  # one is tried, and takes more than was expected
    ],
)
def test_all_processes_recompute_as_many_blocks_as_the_one_with_the_least_memory(
    rehearsed, monkeypatch, others, recomputed
):
    def least(number, op):
        assert op == dist.ReduceOp.MIN
        number.clamp_(max=others.pop(0))

    others = list(others)
    with_group = memory.dist
    monkeypatch.setattr(memory, "dist", SimpleNamespace(**vars(with_group) | {"all_reduce": least}))
    found = rehearsed(1e12)
    assert found.chosen == {
        "recomputed_blocks": recomputed,
        "max_tokens_per_gpu": 8192,
        "weights_kept_gathered": False,
    }
    assert [block.recompute for block in found.model.model["layers"]].count(True) == recomputed
    assert not others


def test_micro_batches_are_larger_than_by_default_if_nothing_is_recomputed_and_they_surely_fit(
    rehearsed,
):
    peak = peak_with(rehearsed, 0)
    assert rehearsed(2.1 * peak).chosen["max_tokens_per_gpu"] == 16_384
    assert rehearsed(2.1 * peak, max_tokens_per_gpu=8192).chosen["max_tokens_per_gpu"] == 8192
    assert rehearsed(2.1 * peak, checkpoint_blocks="off").chosen["max_tokens_per_gpu"] == 8192
    small = rehearsed(1e12, most=170)
    assert (
        "1.0 micro-batches a step on each process, of 322 tokens on average and 322"
        in (small.said[0])
    )
    assert "(--max-tokens-per-gpu 340)" in small.said[0]
    assert small.gpu.ever == pytest.approx(peak, rel=0.01)  # the larger ones were tried
    tight = rehearsed(2.05 * peak_with(rehearsed, 0, most=170) / 0.96, most=170)
    # Whatever it chooses, no try runs out of memory.
    assert tight.pairs.max_tokens_per_gpu in (170, 340)


def test_weights_kept_gathered_if_nothing_is_recomputed_and_they_surely_fit(rehearsed):
    """They take 4 bytes a parameter here, where products are in fp32."""
    weights = 4 * sum(
        parameter.numel() for parameter in tiny_model(num_hidden_layers=8).parameters()
    )
    peak, calls = peak_with(rehearsed, 0), []
    keep = lambda model: calls.append(0) or True  # noqa: E731
    for checkpoint_blocks, room, expected in [
        ("auto", 1.001 * (2.05 * peak + weights) / 0.92, True),
        ("off", 1.001 * (peak + weights) / 0.92, True),  # 8% stay free
        ("off", 0.999 * (peak + weights) / 0.92, False),
        ("1", 3 * peak, False),
    ]:
        found = rehearsed(room, keep=keep, checkpoint_blocks=checkpoint_blocks)
        assert found.chosen["weights_kept_gathered"] == expected == bool(calls)
        assert (" blocks, keeps weights gathered; " in found.said[0]) == expected
        calls.clear()


def test_all_processes_keep_weights_gathered_or_none_does(rehearsed, monkeypatch):
    def another_has_no_room(number, op):
        assert op == dist.ReduceOp.MIN
        number.clamp_(max=0)

    group_of_two = vars(dist) | {"all_reduce": another_has_no_room}
    monkeypatch.setattr(memory, "dist", SimpleNamespace(**group_of_two))
    found = rehearsed(1e12, keep=lambda model: 1 / 0, checkpoint_blocks="off")
    assert not found.chosen["weights_kept_gathered"]


def test_a_rehearsal_on_a_gpu_measures_that_gpu(monkeypatch):
    monkeypatch.setattr(memory, "Gpu", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        memory.rehearse(tiny_model(), SimpleNamespace(device="cuda"), None, None)


def test_larger_micro_batches_must_fit_beside_weights_and_moments_by_what_they_would_hold():
    """Pairs of 5,400 tokens: one fits in 8,192 tokens, three in 16,384."""

    def enlarged(limit, bytes_of_larger=30.0):
        pairs = SimpleNamespace(max_tokens_per_gpu=8192, device="cpu")
        found = memory.Costliest([[[0]]], 10.0, 1.0, 5400.0, 5400)

        def find(numbers):
            assert (numbers, pairs.max_tokens_per_gpu) == ([0], 16_384)
            return found._replace(bytes=bytes_of_larger)

        chosen = memory.enlarge(pairs, found, find, peak=10, resting=6, limit=limit)
        assert (chosen is found) == (pairs.max_tokens_per_gpu == 8192)
        return pairs.max_tokens_per_gpu

    with group():
        assert enlarged(18) == 16_384 and enlarged(17.9) == 8192
        assert enlarged(14, 20.0) == 16_384 and enlarged(13.9, 20.0) == 8192


def test_on_a_cpu_nothing_is_recomputed_unless_asked_for(start, tmp_path, capsys):
    for more, blocks in [("", 0), ("--checkpoint-blocks on", 2), ("--checkpoint-blocks 1", 1)]:
        out = tmp_path / f"out{blocks}"
        trained(start, out, "--max-steps 2", more)
        found = {"recomputed_blocks": blocks, "max_tokens_per_gpu": 8192}
        found["weights_kept_gathered"] = False
        assert read_json(out / "config.json")["memory"] == found
        said = capsys.readouterr().out
        assert f"memory     recomputes {blocks} of 2 blocks\n" in said
        assert re.search(r"batches    1\.0 micro-batches a step.*, of \d+ tokens on average", said)


def test_running_out_of_memory_names_what_to_change():
    pairs = SimpleNamespace(
        sizes=np.array([100, 900]), max_tokens_per_gpu=8192, config=SimpleNamespace(max_tokens=2048)
    )

    def said(recomputed, **known) -> str:
        ours = tiny_model(num_hidden_layers=8)
        ours.recompute_first(recomputed)
        with pytest.raises(StoppedError) as error, memory.advising("here", ours, pairs, **known):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return str(error.value)

    lower = "out of memory here; lower --max-tokens-per-gpu from 8192 to "
    assert said(8) == lower + "4096"
    assert said(8, tokens=4000) == lower + "2000"
    assert said(8, tokens=1000) == lower + "900"  # the longest pair
    assert said(3) == lower + "4096, or pass --checkpoint-blocks 4: 3 of 8 blocks were recomputed"
    one = said(8, tokens=900)
    assert "that is one pair: lower --max-tokens from 2048 to 1024, or use more processes" in one
    with pytest.raises(ValueError), memory.advising("here", tiny_model(), pairs):
        raise ValueError


def test_running_out_of_memory_in_a_later_step_names_it_too(
    start, tmp_path, monkeypatch, complaint
):
    def fails(*_, calls=[]):  # noqa: B006  the rehearsal is the first call
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step_loss(*_)

    step_loss = train.step_loss
    monkeypatch.setattr(train, "step_loss", fails)
    said = complaint(*flags(start, tmp_path / "out"), code=1)
    lower = (
        "train.py: out of memory in a step; lower --max-tokens-per-gpu from 8192 to 4096, or pass"
    )
    assert said.startswith(lower + " --checkpoint-blocks 1: 0 of 2 blocks were recomputed")


# ---------------------------------------------------------------------------------- simulation


@pytest.mark.parametrize("needed", range(9))
def test_the_fewest_recomputed_blocks_are_found(needed):
    asked = []

    def peak_of(recomputed):
        asked.append(recomputed)
        return 100 - 10 * recomputed

    limit = 100 - 10 * needed
    assert memory.fewest_recomputed(peak_of, 8, limit) == needed
    assert len(set(asked)) <= 4 and (needed or asked == [0])
    assert memory.fewest_recomputed(peak_of, 8, 5) == 8  # not even all suffice


def plan(capsys, *flags) -> tuple[list[float], list[int], str]:
    """GiB and recomputed blocks of each line that --plan prints, and all that it prints."""
    assert main("--plan 1", *flags) == 0
    printed = capsys.readouterr().out
    found = re.findall(r"memory +([\d.]+) GiB at the peak.* if (\d+) of", printed)
    return [float(gib) for gib, _ in found], [int(blocks) for _, blocks in found], printed


@pytest.fixture
def wide(tmp_path, monkeypatch):
    """The flags of a model whose blocks are costly: 4 of width 1,024, in a file of 32 pairs. No
    step is simulated twice."""
    simulate, known = memory.simulated_peak, {}

    def simulated_once(build, steps, *how):
        key = tuple(tuple(len(batch.tokens_T) for batch in step) for step in steps), how
        if key not in known:
            known[key] = simulate(build, steps, *how)
        return known[key]

    monkeypatch.setattr(memory, "simulated_peak", simulated_once)
    sizes = dict(model_type="llama", vocab_size=97, hidden_size=1024, intermediate_size=4096)
    sizes |= dict(num_hidden_layers=4, num_attention_heads=16, num_key_value_heads=8)
    sizes |= dict(rope_theta=1e4, max_position_embeddings=2048, rms_norm_eps=1e-5)
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    data = write_pairs(tmp_path / "pairs.jsonl", random_pairs([(200, 100, 100)] * 32))
    return ["--model", tmp_path, "--data", data, "--pairs-per-step", 32]


def test_a_plan_without_a_memory_shows_all_blocks_recomputed_and_none(wide, capsys):
    (least, most), blocks, printed = plan(capsys, *wide)
    assert blocks == [4, 0] and most > least + 0.3
    assert "2.0 micro-batches a step on each process, of 6,400 tokens on average" in printed
    assert "pairs.jsonl: 32 read, 32 kept" in printed


def test_a_plan_asks_no_gpu_and_simulates_heads_that_the_flash_kernel_does_not_read(
    wide, monkeypatch, capsys
):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: 1 / 0)
    path = wide[1] / "config.json"
    path.write_text(json.dumps(read_json(path) | {"head_dim": 12, "num_hidden_layers": 1}))
    peaks, _, _ = plan(capsys, *wide, "--precision bf16")
    assert min(peaks) > 0.1


def test_a_plan_chooses_as_a_run_would(wide, capsys):
    (least, most), _, _ = plan(capsys, *wide)
    (middle,), blocks, _ = plan(capsys, *wide, "--checkpoint-blocks 2")
    assert blocks == [2] and least < middle < most
    (large,), _, _ = plan(capsys, *wide, "--checkpoint-blocks 0 --max-tokens-per-gpu 16384")
    for memory_gib, recomputed, micro_batch, gathered in [
        ((middle + 0.05) / 0.96, 2, 8192, False),  # what is printed is rounded
        ((most + 0.05) / 0.96, 0, 8192, False),
        (10 * most, 0, 16_384, True),
        (least / 2, 4, 8192, False),
    ]:
        (peak, *_), blocks, printed = plan(capsys, *wide, "--gpu-memory", memory_gib)
        assert (" and weights are kept gathered: " in printed) == gathered
        if gathered:
            parameters = int(re.search(r"parameters +([\d,]+)", printed)[1].replace(",", ""))
            assert large < peak <= large + 2 * parameters / 2**30 + 0.1
        assert blocks == [recomputed] and f"--max-tokens-per-gpu {micro_batch})" in printed
        assert ("That is more than" in printed) == (memory_gib < least)


def test_a_plan_with_larger_micro_batches_shows_their_peak(wide, capsys, monkeypatch):
    monkeypatch.setattr(memory, "leaves_room_to_gather", lambda *_: False)
    expected, _, _ = plan(capsys, *wide, "--checkpoint-blocks 0 --max-tokens-per-gpu 16384")
    peaks, _, printed = plan(capsys, *wide, "--gpu-memory 40")
    assert peaks == expected and "--max-tokens-per-gpu 16384)" in printed


def test_a_plan_sees_logits_of_pairs_that_are_not_the_longest(tmp_path, capsys):
    """1,000 logits of 128,256 numbers in bf16, and as many in fp32 while they are computed."""
    config = dict(model_type="llama", vocab_size=128256, hidden_size=8, intermediate_size=8)
    config |= dict(num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1)
    config |= dict(rope_theta=1e4, max_position_embeddings=2048, rms_norm_eps=1e-5)
    (tmp_path / "config.json").write_text(json.dumps(config))
    data = write_pairs(tmp_path / "pairs.jsonl", random_pairs([(1500, 2, 2), (2, 500, 500)]))
    files = ["--model", tmp_path, "--data", data, "--pairs-per-step 1 --checkpoint-blocks"]
    for choice in ("on", "off"):
        (peak,), _, _ = plan(capsys, *files, choice)
        assert peak > 0.9 * 1000 * 128256 * 6 / 2**30


# --------------------------------------------------------------------------------- utilisation


def test_utilisation_counts_recomputed_work_only_as_the_hardware_does():
    blocks, head, again = 3e12, 1e12, 2e12
    found = utilisation(blocks, head, again, recomputed=0.5, seconds=2.0, available=4e13)
    assert found == pytest.approx({"mfu": 12 / 80, "hfu": 13 / 80})


@pytest.mark.parametrize(
    "name, peak",
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA L4", None),
    ],
)
def test_the_peak_of_a_gpu_follows_from_its_name(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert peak_tflops() == peak


def test_a_run_logs_its_utilisation_if_the_peak_is_known(start, tmp_path, capsys):
    logged = trained(start, tmp_path / "a", "--max-steps 2")
    assert not any("mfu" in row for row in logged) and "mfu" not in capsys.readouterr().out
    more = "--max-steps 2 --peak-tflops 0.01 --checkpoint-blocks 1"
    for row in trained(start, tmp_path / "b", more):
        assert 0 < row["mfu"] < row["hfu"] < 4 / 3 * row["mfu"]
    assert re.search(r"GiB mfu [\d.]+% hfu [\d.]+%\n", capsys.readouterr().out)
