"""What several test files share: tiny models and pairs, commands, and editing of files."""

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch._dynamo import config as dynamo_config
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config

ROOT = Path(__file__).resolve().parent.parent
REAL = ROOT.parent / "shared" / "real"  # real weights and data, if a checkout has them beside it
sys.path.insert(0, str(ROOT))
collect_ignore = [] if sys.version_info >= (3, 11) else ["test_trl.py"]  # TRL 1.16 needs it

from data import Pair  # noqa: E402
from model import Llama, LlamaConfig, RopeScaling  # noqa: E402
from support.export import save_model  # noqa: E402
from support.files import InputError  # noqa: E402

needs_real = pytest.mark.skipif(not REAL.exists(), reason="no real data beside this checkout")
# Tiny tensors: a second thread costs more time than it saves. In subprocesses too.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
ON_CPU = {"CUDA_VISIBLE_DEVICES": ""}  # added to the environment of subprocesses
# A script's job in the background has Ctrl-C ignored, and so would what the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
NOTHING_SAID = ("", "importing torch\n")  # which takes more than 2 s on a busy machine


@pytest.fixture(autouse=True)
def subnormal_numbers():
    """train.py flushes them to zero, for the whole process; each test starts with them."""
    torch.set_flush_denormal(False)


# ---------------------------------------------------------------------------- models and pairs

LLAMA31 = RopeScaling(8.0, 1.0, 4.0, original_max_position_embeddings=64)
TINY = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
TINY |= dict(num_attention_heads=4, num_key_value_heads=2, head_dim=8)
TINY |= dict(max_position_embeddings=256, bos_token_id=0, eos_token_id=(1,))
# The smallest config.json: what a test adds to it is what the test is about.
RAW_CONFIG = {"model_type": "llama", "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48}
RAW_CONFIG |= {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 256}
# Tokens of prompt, chosen and rejected: the ten pairs that `start` trains on.
LENGTHS = [(5, 7, 4), (9, 3, 8), (2, 12, 6), (7, 5, 5), (14, 2, 3)]
LENGTHS += [(3, 9, 1), (6, 6, 10), (4, 1, 2), (8, 11, 7), (1, 4, 9)]


def tiny_config(**changes) -> LlamaConfig:
    """Two layers, grouped heads (4 queries over 2 keys), untied, unless changed."""
    return LlamaConfig(**(TINY | changes))


@pytest.fixture(autouse=True)
def settings_of_the_compiler():
    """Puts back what support/compiler.py sets for the whole process."""
    with (
        functorch_config.patch(ban_recompute_materialized_backward=True),
        dynamo_config.patch(specialize_int=False),
        inductor_config.patch({"triton.mix_order_reduction_non_strict_mode": False}),
    ):
        yield


def tiny_model(seed=0, dtype=torch.float32, std=0.15, **changes) -> Llama:
    """A random model whose outputs are far from uniform, so that errors show."""
    torch.manual_seed(seed)
    model = Llama(tiny_config(**changes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, std)
    return model.to(dtype)


def save_tiny(directory: Path, source: Path | None = None, **changes) -> Path:
    """Saves a tiny model in fp32, with the tokenizer of `source`; returns the directory."""
    save_model(tiny_model(**changes), directory, dtype=torch.float32, source=source)
    return directory


def random_pairs(lengths, vocab_size=97, seed=1) -> list[Pair]:
    """Pairs of random tokens with the given numbers of prompt, chosen and rejected tokens."""
    rng = np.random.default_rng(seed)
    return [
        Pair(*(rng.integers(0, vocab_size, n).astype(np.int32) for n in of_pair), f"random:{i}")
        for i, of_pair in enumerate(lengths, 1)
    ]


def write_pairs(path: Path, pairs) -> Path:
    """Writes pairs, or triples of lists of token ids, as a JSONL data file; returns the path."""
    triples = [(p.prompt, p.chosen, p.rejected) if isinstance(p, Pair) else p for p in pairs]
    keys = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = [{k: [int(i) for i in ids] for k, ids in zip(keys, t, strict=True)} for t in triples]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def start(tmp_path_factory) -> Path:
    """A directory with a tiny model and the files of ten training and seven held-out pairs."""
    where = tmp_path_factory.mktemp("start")
    save_tiny(where / "model", std=0.3)
    write_pairs(where / "pairs.jsonl", random_pairs(LENGTHS))
    write_pairs(where / "heldout.jsonl", random_pairs(LENGTHS[3:], seed=2))
    return where


# ------------------------------------------------------------------------------------ commands


def words(*parts) -> list[str]:
    """A command line. Strings are split at spaces; a path or a number is one word."""
    return [w for part in parts for w in (part.split() if isinstance(part, str) else [str(part)])]


def main(*parts) -> int:
    """`python train.py` with these flags, in this process. Returns the exit code."""
    import train

    return train.main(words(*parts))


def flags(start: Path, out: Path, *more) -> list:
    """The flags of a small run on the files of `start`; `more` may override them."""
    files = ["--model", start / "model", "--data", start / "pairs.jsonl", "--out", out]
    return [*files, "--device cpu --lr 1e-2 --pairs-per-step 4 --save-dtype fp32", *more]


def trained(start: Path, out: Path, *more) -> list[dict]:
    """Trains in this process; returns the rows of metrics.jsonl."""
    assert main(*flags(start, out, *more)) == 0
    return rows(out)


def before_export(whole: Path, copy: Path) -> Path:
    """A copy of a finished run as if it had been killed before the export; returns its path."""
    shutil.copytree(whole, copy)
    shutil.rmtree(copy / "model")
    return copy


@pytest.fixture
def complaint(capsys):
    """complaint(*flags): runs train.py, which must fail; returns the one line on stderr."""

    def run(*parts, code=2) -> str:
        capsys.readouterr()
        assert main(*parts) == code
        printed = capsys.readouterr().err
        assert printed.count("\n") == 1 and "Traceback" not in printed, printed
        return printed

    return run


def program(processes: int = 1, *options) -> list[str]:
    """`python train.py`, or torchrun with so many processes."""
    torchrun = ["-m torch.distributed.run --standalone --nproc_per_node", processes, *options]
    return words(Path(sys.executable), *(torchrun if processes > 1 else []), ROOT / "train.py")


def run_train(*parts, processes=1, cwd=ROOT, preexec_fn=None, **environment):
    """Runs train.py on the CPU in processes of its own; returns a CompletedProcess with texts."""
    return subprocess.run(
        [*program(processes), *words(*parts)],
        **dict(cwd=cwd, capture_output=True, text=True, timeout=600, preexec_fn=preexec_fn),
        env=os.environ | ON_CPU | environment,
    )


def run_joined(*command_lines, processes: int = 2, **options) -> str:
    """Runs these command lines of train.py, one after the other, on so many processes, which must
    all end well; returns what the first one printed. options: see joined.run_all."""
    from joined import run_all

    codes, printed = run_all([words(*line) for line in command_lines], processes, **options)
    assert codes == [0] * processes, (codes, printed)
    return printed[0][0]


def complaint_of_two(command_line, **options) -> str:
    """Runs it on two processes; the first must fail. Returns its one line on stderr."""
    from joined import run_all

    codes, printed = run_all([words(*command_line)], 2, **options, first_fails=True)
    said = printed[0][1]
    assert codes[0] == 2 and said.count("\n") == 1, printed
    return said


def refusal(function, *args, **options) -> str:
    """The message of the InputError that the call raises: one short printable line."""
    with pytest.raises(InputError) as caught:
        function(*args, **options)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 700, message
    return message


# --------------------------------------------------------------------------------------- files


def rows(out: Path, name: str = "metrics.jsonl") -> list[dict]:
    """The rows of a run's log."""
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


def read_json(path: Path):
    return json.loads(path.read_text())


def edit_json(path: Path, **changes) -> None:
    """Replaces keys of a JSON file's object."""
    path.write_text(json.dumps(read_json(path) | changes))


def edit_tensors(path: Path, changes: dict) -> None:
    """Edits a safetensors file: a tensor replaces, a function converts, None removes."""
    tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
    for key, change in changes.items():
        tensors[key] = change(tensors[key]) if callable(change) else change
    save_file({k: t.contiguous() for k, t in tensors.items() if t is not None}, path)


def flip_a_bit(path: Path, at: int | None = None) -> None:
    """Damages a file in one bit, in its middle unless told where."""
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2 if at is None else at] ^= 1
    path.write_bytes(raw)


def entry(shape=(32,), offsets=(0, 128), dtype="F32") -> dict:
    """A tensor's place in the header of a safetensors file."""
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def write_safetensors(path: Path, header: dict | bytes, data=bytes(128), length=None) -> Path:
    """A safetensors file by hand, whose header may lie; returns the path."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


class Planted:
    """If unpickled, it makes the file `sentinel`."""

    def __init__(self, sentinel: Path):
        self.sentinel = sentinel

    def __reduce__(self):
        return os.system, (f"touch {self.sentinel}",)
