"""Between a step's numbers and its update: asks `anomaly` what to do, and remembers what it said."""

from typing import Any

from moesys.config.schema import AnomalyConfig
from moesys.data.loader import MicroBatch, TokenLoader
from moesys.data.sequence_loader import SequenceLoader
from moesys.data.step_batch import StepBatch
from moesys.train.anomaly import AnomalyState, Decision, decide, due
from moesys.train.step import Judge


class Guard:
    """Judges every step of a run. All ranks give it the same numbers, so all decide alike, without a word between them.

    With the defaults (only what is not finite, which stops the run) a step is judged after its update, when its
    numbers are read anyway; the run ends and the weights with it. Otherwise the host reads them before the update.
    """

    def __init__(self, config: AnomalyConfig) -> None:
        self.config = config
        self.state = AnomalyState()
        self.decision = Decision(state=self.state, rate=1.0)
        """On the step last judged."""
        self._step = self._first_sample = 0
        self._lr, self._can_roll_back, self._is_judged = 0.0, False, True

    def read_batches(
        self, step: int, loader: TokenLoader | SequenceLoader
    ) -> list[MicroBatch] | StepBatch:
        """Of this step: the loader's next, or those of an earlier step that are due again."""
        again = due(self.state, step)
        self._step = step
        self._first_sample = loader.consumed_samples if again is None else again
        return loader.next_step() if again is None else loader.step_at(again)

    def begin(self, lr: float, can_roll_back: bool) -> Judge | None:
        """Who is asked before the update of the step just read, at the schedule's rate `lr`; None = no one."""
        self._lr, self._can_roll_back, self._is_judged = lr, can_roll_back, False
        return self._judge if self.config.policy != "stop" or self.config.sigma else None

    def end(self, loss: float, grad_norm: float) -> Decision:
        """What became of the step; judges it now if its update did not wait."""
        if not self._is_judged:
            self._judge(loss, grad_norm)
        return self.decision

    def record(self, step: int, loss: float, grad_norm: float) -> dict[str, Any]:
        """Of the anomaly found in the step just judged, for metrics.jsonl."""
        finding = self.decision.finding
        assert finding is not None
        return {
            "kind": "anomaly",
            "step": step,
            "number": self.state.num_found,
            "reason": finding.reason,
            "loss": loss,
            "grad_norm": grad_norm,
            "limit": finding.limit,
            "action": self.decision.answer,
        }

    def error(self, step: int, loss: float, grad_norm: float) -> FloatingPointError:
        """Why the anomaly just found ends the run."""
        finding = self.decision.finding
        assert finding is not None
        numbers = f"step {step}: loss={loss}, grad_norm={grad_norm}"
        if finding.limit is None:
            what = f"{numbers}: not finite"
        else:
            what = (
                f"{numbers}: {finding.reason}, {self.config.sigma:g} deviations above the last "
                f"{len(self.state.log_losses)} good steps are {finding.limit:.4g}"
            )
        given = ", ".join(f"{n} x {a}" for a, n in self.state.tries.items() if a != "stop")
        tried = f" (before: {given}; anomaly.tries={self.config.tries} each)" if given else ""
        fix = "lower optim.lr or set optim.clip_grad_norm"
        if finding.limit is not None:
            fix += ", or raise anomaly.sigma"
        return FloatingPointError(f"{what}{tried}. The last checkpoint is untouched; {fix}")

    def _judge(self, loss: float, grad_norm: float) -> float | None:
        """The learning rate to update with; None = drop the gradients."""
        self._is_judged = True
        self.decision = decide(
            self.config,
            self.state,
            step=self._step,
            loss=loss,
            grad_norm=grad_norm,
            first_sample=self._first_sample,
            can_roll_back=self._can_roll_back,
        )
        self.state = self.decision.state
        return None if self.decision.rate is None else self._lr * self.decision.rate
