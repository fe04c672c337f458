"""The CUDA path against the CPU's in fp32, which defines it; memory on CUDA; compiled models
against eager ones."""

import os
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import random_pairs, tiny_model
from gpu import dense_attention
from torch.distributed.device_mesh import init_device_mesh

import model
import train
from data import pack
from support import sharding
from support.compiler import compile_model
from support.processes import join_group

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
LENGTHS = [
    *([(5, 7, 4), (9, 3, 8)], [(3, 2, 2)], [(14, 2, 3), (3, 9, 1), (6, 6, 10)]),
    *([(4, 1, 2), (8, 11, 7)], [(20, 20, 20)]),
]


@needs_cuda
@pytest.mark.parametrize("heads, groups, size", [(32, 8, 128), (4, 4, 64), (8, 1, 64)])
def test_variable_length_attention_is_the_loop_on_the_cpu(heads, groups, size):
    torch.manual_seed(0)
    # Queries and keys of each segment.
    lengths = [(1, 1), (7, 7), (5, 30), (1, 64), (0, 0), (64, 64), (33, 100)]
    starts = [
        torch.tensor([0, *torch.tensor(column).cumsum(0)], dtype=torch.int32)
        for column in zip(*lengths, strict=True)
    ]
    segments = model.Segments(*starts, None, 128)
    shapes = [(int(starts[0][-1]), heads, size), *[(int(starts[1][-1]), groups, size)] * 2]
    exact = [torch.randn(shape).bfloat16().float().requires_grad_() for shape in shapes]
    found = [x.detach().bfloat16().cuda().requires_grad_() for x in exact]
    outputs = model.attention(*exact, segments), model.attention(*found, segments.to("cuda"))
    weight = torch.randn(shapes[0])
    for output in outputs:
        (output.float() * weight.to(output.device)).sum().backward()
    on_cpu, on_cuda = (outputs[0], *(x.grad for x in exact)), (outputs[1], *(x.grad for x in found))
    for a, b in zip(on_cpu, on_cuda, strict=True):
        b = b.float().cpu()
        assert (a - b).abs().max() < 0.02 * a.abs().max()
        assert F.cosine_similarity(a.flatten(), b.flatten(), 0) > 0.9999


@needs_cuda
def test_a_packed_batch_in_bf16_on_cuda_is_the_cpus_in_fp32_up_to_rounding():
    sizes = dict(hidden_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=64)
    sizes |= dict(intermediate_size=384, std=0.05)
    exact, half = tiny_model(**sizes), tiny_model(**sizes).cuda().bfloat16()
    batch = pack(random_pairs(LENGTHS[2]), longest=64)
    logps = exact(batch)[0], half(batch.to("cuda"))[0]
    for values in logps:
        values.sum().backward()
    torch.testing.assert_close(logps[1].cpu(), logps[0], rtol=0.02, atol=0.05)
    for (key, a), b in zip(exact.named_parameters(), half.parameters(), strict=True):
        assert F.cosine_similarity(a.grad.flatten(), b.grad.float().cpu().flatten(), 0) > 0.999, key


@needs_cuda
def test_summed_gradients_and_their_reduced_copies_share_one_pool_of_memory():
    """Two steps of three micro-batches. With a pool for each stream the allocator would hold 4
    bytes a parameter more than it has given out at the peak."""
    settings = [os.environ.get(f"PYTORCH_{name}ALLOC_CONF", "") for name in ("", "CUDA_")]
    if "expandable_segments:True" not in "".join(settings):
        pytest.skip("segments that cannot grow leave gaps of their own")
    sizes = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=8, head_dim=64)
    ours = tiny_model(**sizes).cuda()
    gradients = 4 * sum(p.numel() for p in ours.parameters())
    batch = pack(random_pairs(LENGTHS[2]), longest=64).to("cuda")
    join_group("cpu:gloo,cuda:nccl")
    try:
        mesh = init_device_mesh("cuda", (1,))
        train.shard(ours, mesh, torch.bfloat16)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        for micro_batch in 2 * [1, 2, 3]:
            sharding.prepare_backward(ours, last=micro_batch == 3)
            ours(batch)[0].sum().backward()
            if micro_batch == 3:
                torch.cuda.synchronize()  # as the loop waits for the norm
                ours.zero_grad()
    finally:
        dist.destroy_process_group()
    stats = torch.cuda.memory_stats()
    idle = stats["reserved_bytes.all.peak"] - stats["allocated_bytes.all.peak"]
    assert idle < gradients / 2


@needs_cuda
def test_a_compiled_model_gives_an_eager_ones_numbers_and_compiles_no_more_for_other_sizes():
    """Sizes on both sides of those at which torch.compile would by itself change the norms'
    kernels: 4,096 tokens, twice the width, and 5 M numbers. And a vocabulary above 8,192, for
    which it would split the head's sums."""
    sizes = dict(hidden_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=64)
    sizes |= dict(intermediate_size=384, vocab_size=16_384, std=0.05)
    eager, compiled = (tiny_model(**sizes).cuda().bfloat16() for _ in range(2))
    torch._dynamo.reset()
    compile_model(compiled)
    long = [(20, 30, 40)] * 250
    try:
        for i, lengths in enumerate([long, LENGTHS[0], LENGTHS[2], long[:60], long[:5]]):
            torch.compiler.set_stance("default" if i == 0 else "fail_on_recompile")
            batch = pack(random_pairs(lengths), longest=64).to("cuda")
            logps = [ours(batch)[0] for ours in (eager, compiled)]
            for values in logps:
                values.sum().backward()
            torch.testing.assert_close(*logps, rtol=0.02, atol=0.05)
    finally:
        torch.compiler.set_stance("default")
    for (key, a), b in zip(eager.named_parameters(), compiled.parameters(), strict=True):
        assert F.cosine_similarity(a.grad.flatten(), b.grad.flatten(), 0) > 0.999, key


def test_blocks_compile_once_for_five_batches_of_other_lengths_and_change_no_number(monkeypatch):
    """The first of two blocks recomputes in backward, the second does not."""
    plain = tiny_model()
    batches = [pack(random_pairs(lengths), longest=64) for lengths in LENGTHS]
    expected = [plain(batch)[0].detach() for batch in batches]
    monkeypatch.setattr(model, "attention", dense_attention)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    compiled = tiny_model()
    compiled.recompute_first(1)
    torch._dynamo.reset()
    compile_model(compiled)
    try:
        for i, (batch, logps) in enumerate(zip(batches, expected, strict=True)):
            torch.compiler.set_stance("default" if i == 0 else "fail_on_recompile")
            found = compiled(batch)[0]
            found.sum().backward()
            torch.testing.assert_close(found, logps, rtol=1e-5, atol=1e-5)
    finally:
        torch.compiler.set_stance("default")
