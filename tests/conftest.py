"""What several test files share: tiny random models and pairs, and the commands run as a user runs them."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
REAL = ROOT.parent / "shared" / "real"  # real weights and data, where a checkout has them beside it
sys.path.insert(0, str(ROOT))

from data import Pair  # noqa: E402
from model import Llama, LlamaConfig, RopeScaling  # noqa: E402

needs_real = pytest.mark.skipif(
    not REAL.exists(), reason="real weights and data are not beside this checkout"
)
torch.set_num_threads(1)  # tiny tensors: a second thread costs more than it does
LLAMA31 = RopeScaling(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
)


def tiny_config(**changes) -> LlamaConfig:
    """Two layers, grouped heads (4 queries over 2 keys), untied, unless changed."""
    fields = dict(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=(1,),
    )
    return LlamaConfig(**(fields | changes))


def tiny_model(
    seed: int = 0, dtype: torch.dtype = torch.float32, std: float = 0.15, **changes
) -> Llama:
    """A random model whose outputs are far from uniform, so that errors show."""
    torch.manual_seed(seed)
    model = Llama(tiny_config(**changes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, std)
    return model.to(dtype)


def random_pairs(
    lengths: list[tuple[int, int, int]], vocab_size: int = 97, seed: int = 1
) -> list[Pair]:
    """Pairs of random tokens with the given numbers of prompt, chosen and rejected tokens."""
    rng = np.random.default_rng(seed)
    return [
        Pair(*(rng.integers(0, vocab_size, n).astype(np.int32) for n in of_pair), f"random:{i}")
        for i, of_pair in enumerate(lengths, 1)
    ]


def run_train(
    *flags, processes: int = 1, cwd: Path = ROOT, **environment
) -> subprocess.CompletedProcess:
    """`python train.py FLAGS`, or the same under torchrun, on the CPU; captures what it prints."""
    program = (
        [sys.executable]
        if processes == 1
        else [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            str(processes),
        ]
    )
    return subprocess.run(
        [*program, str(ROOT / "train.py"), *map(str, flags)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""} | environment,
    )


@pytest.fixture(autouse=True)
def subnormal_numbers():
    """train.py, run in this process, flushes them to zero for good; each test starts with them."""
    torch.set_flush_denormal(False)
