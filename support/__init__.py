"""What surrounds the method: checks, protections, logs. Its reader may skip all of this.

    files.py           reading files that may hold anything; writing files whole
    llama_config.py    config.json of a Llama, checked key by key
    records.py         the records of a data file, each with its place
    forms.py           every form that a record of preferences may have
    tokenizer.py       tokenizer.json, read for plain text
    bins.py            a step's pairs into as few micro-batches as they fit in
    tensors.py         safetensors files, and which rows of a sharded tensor a process holds
    processes.py       devices, the process group, agreement between processes, signals, exit codes
    settings.py        the settings of a run that are not the method's
    flags.py           the command line <-> Config <-> config.json; what flags and rows may be
    export.py          the end of a run: a model directory that transformers and vLLM load
    checkpoints.py     OUT/checkpoints: written whole, checked, resumed
    best.py            the weights of the best evaluation (--keep-best)
    metrics.py         what is measured of pairs under every loss; sums and means
    held_out.py        answers to held-out prompts (--samples); groups of pairs (--eval-by)
    reference.py       log-probs of the starting model, kept in a file, for dpo, dpo-norm, ipo
    run_directory.py   OUT itself: its lock, what a run is made of
    reading.py         the pairs of a run's files; what was dropped, in words
    log.py             the header, the line per step, metrics.jsonl and eval.jsonl
    operations.py      RMSNorm and the MLP's product, which keep less for backward than autograd
    compiler.py        whether and how blocks and the head are compiled
    sharding.py        when FSDP reduces gradients and gives up weights; one pool of memory; AdamW's
                       update of the rows of a process
    memory.py          trying the costliest micro-batches; what is recomputed; simulation (--plan)
    flops.py           what a step computes, and its share of the GPUs' peak

Only reading.py imports data.py. Nothing here imports model.py or train.py.
"""

import contextlib
import importlib.util
import os
import signal
import sys
import threading
from pathlib import Path


def notice(text: str) -> None:
    """Prints a line. A failure to print is ignored: the next line of the log reports it."""
    with contextlib.suppress(OSError):
        print(text, flush=True)


if os.name == "nt":
    print("ASFT runs on Linux and macOS; on Windows, use WSL", file=sys.stderr)
    sys.exit(2)

needed = ("torch", "safetensors", "tokenizers", "numpy")
if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
    print(f"no {', '.join(missing)}: pip install -r requirements.txt", file=sys.stderr)
    sys.exit(2)

# Waiting OpenMP threads keep a CPU busy for milliseconds by default. Beside another busy process
# that makes a step five times slower; this setting costs a few per cent. torch reads it on loading.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

# Memory segments that can grow leave fewer gaps on a nearly full GPU. A user's own setting stays.
if not os.environ.keys() & {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}:
    os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"

if Path(getattr(sys.modules["__main__"], "__file__", "")).name in ("train.py", "eval.py"):
    # Ctrl-C during the import ends the program without a traceback; exit_code takes over later. A
    # shell's script starts jobs in the background with Ctrl-C ignored: so do they.
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    # From a network disk it may take minutes.
    timer = threading.Timer(2, notice, ["importing torch"])
    timer.daemon = True
    if os.environ.get("RANK", "0") == "0":
        timer.start()
    import torch  # noqa: F401

    timer.cancel()
