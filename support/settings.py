"""The settings of a run that are not the method's: devices, evaluation, when files are written."""

from dataclasses import dataclass

from support.flags import flag


@dataclass(frozen=True)
class RunSettings:
    """The fields that train.Config has besides its own, which --help lists before these."""

    # bad lines, the reference's file
    skip_bad_lines: bool = flag(False, "count malformed lines instead of stopping at them")
    reference_cache: str | None = flag(
        None, "file that keeps the reference's log-probs over runs with equal weights and pairs"
    )

    # devices, memory
    device: str = flag("auto", "cuda if each process has a GPU", ("auto", "cpu", "cuda"))
    checkpoint_blocks: str = flag(
        "auto",
        "how many blocks backward computes again to save memory: a number, on (all), off (none); "
        "auto: on GPUs as few as memory allows, none on a CPU",
    )
    compile: str = flag(
        "auto",
        "compile blocks and head, once for all lengths: in bf16 on CUDA, from 50 M parameters on",
        ("auto", "on", "off"),
    )
    replicas: int = flag(1, "hybrid sharding: number of groups, each with a whole model")

    # evaluation
    eval_every: int = flag(0, "steps between evaluations, besides those at start and end")
    eval_by: str | None = flag(None, "key of held-out rows: metrics for each of its values too")
    samples: int = flag(0, "held-out prompts to answer (greedily) at each evaluation")
    keep_best: str | None = flag(
        None,
        "export the weights of the evaluation with the best held-out metric, not the last ones",
        ("loss", "accuracy"),
    )

    # what is written, and when
    save_dtype: str = flag("bf16", "weights of OUT/model", ("bf16", "fp32"))
    save_every: int = flag(
        1000, "steps between checkpoints (12 bytes a parameter each); 0: only when told to stop"
    )
    keep: int = flag(2, "checkpoints to keep, the newest")
    resume: str | None = flag(
        None, "resume the run in this directory; given none, resume the one in --out, or begin it"
    )

    # what is only computed
    peak_tflops: float | None = flag(
        None,
        "bf16 TFLOP/s of a device, for MFU and HFU (default: known for A100, H100, H200, B200)",
    )
    plan: int | None = flag(
        None, "print steps, FLOPs and memory of the run on so many GPUs, and stop; no weights read"
    )
    gpu_memory: float | None = flag(None, "with --plan: GiB of each GPU, to choose as a run would")
