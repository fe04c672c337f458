"""The weights of a run's best evaluation, kept on the disk and exported: --keep-best.

They stand in OUT/checkpoints/best-000120/, a checkpoint (support/checkpoints.py) without moments:
4 bytes a parameter. It is written when an evaluation is better than all before, and then the one
before is removed: there are two only for as long as that takes. Its checkpoint.json holds the
figure, so a resumed run knows the best so far from the disk. If the best evaluation came after the
checkpoint that a run resumes from, it keeps those weights and repeats the steps up to them.
"""

import functools
import math
from collections.abc import Callable
from pathlib import Path

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from support import checkpoints
from support.processes import on_first_process, together


class Best:
    """The weights of the best evaluation after an update, of those that the run has made so far.

    metric: "loss" or "accuracy"; None keeps nothing. To be made after Log.rewind, and all methods
    to be called, on every process. A damaged checkpoint is set aside and said; without one, only
    later evaluations count, which is said too. Raises InputError for the checkpoint of another run.
    """

    def __init__(
        self,
        metric: str | None,
        out: Path,
        identity: str,
        model: nn.Module,
        mesh: DeviceMesh,
        say: Callable[[str], None],
    ):
        self.metric, self.out, self.identity, self.say = metric, out, identity, say
        self.model, self.mesh = model, mesh
        self.step, self.value = 0, math.nan  # of the best so far; step 0: there is none
        for path in on_first_process(lambda: checkpoints.checkpoints(out, "best")):
            try:
                facts = together(functools.partial(checkpoints.checked_facts, path))[0]
            except checkpoints.DamagedError as error:
                say(f"{error}; set aside")
                on_first_process(functools.partial(checkpoints.set_aside, path))
                continue
            checkpoints.check_run(path, facts, identity)
            if self.is_better(facts["value"]):
                self.step, self.value = facts["step"], facts["value"]
        on_first_process(self.remove_others)
        if metric and not self.step and on_first_process(self.was_evaluated):
            say(f"{out / 'checkpoints'}: the best weights are lost; only later evaluations count")

    @property
    def path(self) -> Path:
        return self.out / f"checkpoints/best-{self.step:06d}"

    def was_evaluated(self) -> bool:
        """True if the log has an evaluation after the one at the start."""
        log = self.out / "eval.jsonl"
        return log.exists() and log.read_bytes().count(b"\n") > 1

    def is_better(self, value: float) -> bool:
        """True if a figure is a number and better than the best so far."""
        if not math.isfinite(value) or not self.step:
            return math.isfinite(value)
        return value > self.value if self.metric == "accuracy" else value < self.value

    def offer(self, step: int, row: dict[str, float]) -> None:
        """Keeps the weights if the evaluation `row` after this step is the best so far."""
        value = row.get(f"eval_{self.metric}", math.nan)
        # A step that is repeated on a GPU may differ from the one that was kept, by rounding.
        if step == self.step or not self.is_better(value):
            return
        facts = {"step": step, "run": self.identity, "value": value}
        checkpoints.write_checkpoint(self.out, "best", facts, self.weights(), self.mesh)
        self.step, self.value = step, value
        on_first_process(self.remove_others)
        self.say(f"best held-out {self.metric} so far, {value:.4f}: kept in {self.path}")

    def remove_others(self) -> None:
        """Leaves only the best checkpoint, and nothing of a run that was killed while it wrote."""
        found = checkpoints.checkpoints(self.out, "best")
        checkpoints.retire([path for path in found if path != self.path])
        for path in self.path.parent.glob(".best-*"):
            checkpoints.remove(path)

    def weights(self) -> checkpoints.Tensors:
        return [(f"weight.{name}", weight) for name, weight in self.model.named_parameters()]

    def load(self, last: int) -> int:
        """Fills the model with the best weights, says so, and returns their step: `last`, the
        run's last one, if none were kept."""
        if self.metric is None:
            return last
        if not self.step:
            self.say(f"\nno held-out {self.metric} was a number: the weights are the last ones")
            return last
        facts = together(functools.partial(checkpoints.checked_facts, self.path))[0]
        checkpoints.fill(self.weights(), self.path, facts)
        self.say(f"\nbest held-out {self.metric}: {self.value:.4f}, after step {self.step}")
        return self.step
