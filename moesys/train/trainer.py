"""The training loop: steps, evaluations, checkpoints, records, and a summary at the end."""

import json
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from moesys.checkpoint.errors import CheckpointError, Superseded
from moesys.checkpoint.saver import Saved, Saver
from moesys.checkpoint.store import load_latest_good
from moesys.config.compose import to_yaml
from moesys.optim.schedule import learning_rate
from moesys.train.anomaly import AnomalyState
from moesys.train.beginning import Beginning, begin
from moesys.train.codec_choice import CodecChoice
from moesys.train.eval_stop import EvalStop
from moesys.train.evaluate import evaluate
from moesys.train.folder import may_fail, must_begin, write_text
from moesys.train.grace import Pace, StopPlan, plan_stop, slowest
from moesys.train.guard import Guard
from moesys.train.measuring import measure
from moesys.train.metrics import MetricsLog
from moesys.train.mixing import Mixing
from moesys.train.patience import LONGEST_S, patience_s
from moesys.train.record import (
    checkpoint_record,
    eval_record,
    eval_summary,
    start_record,
    train_record,
)
from moesys.train.replicas import Replicas
from moesys.train.setup import Run
from moesys.train.signals import StopRequest
from moesys.train.sinks import open_sinks
from moesys.train.sources import data_manifest, planned_epochs, step_fields, text_entropies
from moesys.train.start_up import StartUp
from moesys.train.state import begin_random_state, random_state, run_tensors
from moesys.train.step import StepResult, TrainStep
from moesys.train.straggler import StragglerWatch
from moesys.train.timing import SectionTimer, StepTimes
from moesys.train.yardstick import yardstick

Record = dict[str, Any]


class Trainer:
    """Drives a Run. Every rank makes one and calls `train`; rank 0 alone writes records."""

    def __init__(
        self,
        run: Run,
        check_turn: Callable[[], None] | None = None,
        start_up: StartUp | None = None,
    ) -> None:
        """`check_turn`: raises Superseded once another job has taken the run folder over; rank 0's is asked.
        `start_up`: has been running since this process began; None = it begins now."""
        self.run = run
        self.start_up = start_up or StartUp(time.time())
        self.config = run.config
        self.check_turn = check_turn or (lambda: None)
        self.timer = SectionTimer(run.process.device)
        self.train_step = TrainStep(run.parallel, run.optimizer, run.meshes, run.config, self.timer)
        self.saver = Saver(
            run.folder / "checkpoints",
            keep_last=run.config.checkpoint.keep_last,
            asynchronous=run.config.checkpoint.asynchronous,
            timeout_s=run.config.train.timeout_s or LONGEST_S,
            check_turn=check_turn,
        )
        self.explain: Callable[[BaseException], str] = str
        """Whose fault an error is, for the record; a job of several ranks knows better than the error."""
        self.is_hang: Callable[[], bool] = lambda: False
        """Whether the run ends because a collective did not."""
        self.guard = Guard(run.config.anomaly)
        self.mixing, self.codec_choice = Mixing(run), CodecChoice(run)
        self.replicas = Replicas(run.process.nodes)
        self.has_checkpoint = False  # to roll back to, or being written
        self.step = 0
        self.wall_s = 0.0
        """Time spent in steps, evaluations and checkpoints, earlier starts included."""
        self.last_eval: Record = {}
        self.origin: Record | None = None
        """What the weights were grown from."""
        self.stop_note: Record = {}
        """In the stop record: what a grace period was too short for."""
        self.step_seconds: list[float] = []
        self.step_rates: list[float] = []  # tokens per second
        self.eval_s, self.save_s = 0.0, 0.0
        """The last evaluation and the longest save of this start."""
        self.patience_s = LONGEST_S
        """How long a collective may make no progress in what is done now."""
        self.step_times = StepTimes()
        self.stragglers = StragglerWatch(
            every_steps=run.config.metrics.straggler_every_steps,
            limit_ratio=run.config.metrics.straggler_ratio,
            nodes=run.process.nodes,
        )
        self.unrecorded_checkpoint_ms = 0.0
        """Waited for the checkpoints that ended since the last train record: the next one says so."""
        self.tokens_per_s: float | None = None
        """By the median step of this start; before one, of the start before."""

    def train(self, stop: StopRequest) -> str:
        """Train to the last step or until asked to stop; return "done" or "stopped"."""
        is_writer = self.run.process.rank == 0
        begun = self._resume()
        self.start_up.mark("load")
        self.found = measure(self.run, self.train_step, self._dtype())
        self.yardstick = yardstick(self.run, self._dtype())
        begin_random_state(self.run, begun.resumed)  # last, because measuring draws random numbers
        if self.config.checkpoint.every_steps:
            self.saver.reserve(self._tensors(), random_state(self.run.process.device))
        with must_begin(self.run.folder):
            self.log = self._open_log() if is_writer else None
        try:
            self.start_up.mark("measure")
            self._write(self._start_record(begun))
            try:
                stop.begin_training()
                status = self._loop(stop)
            except BaseException as error:
                self.record_failure(self.explain(error))
                raise
            self._write_stop({"reason": status, **self.stop_note})
            if is_writer and (self.step_seconds or not self.run.summary_path.exists()):
                self._write_summary(status)
        finally:
            self.saver.close()
            self.run.loader.close()
            if self.log is not None:
                self.log.close()
        return status

    def record_failure(self, reason: str) -> None:
        """The run's last records, why it ends before its time."""
        with suppress(OSError):  # a full disk must not hide what failed first
            cause = "hung" if self.is_hang() else "failed"
            self._write_stop({"reason": f"failed: {reason}", "cause": cause})

    def _write_stop(self, said: Record) -> None:
        """A stop is the last record; the ledger before it already counts it."""
        if self.log is not None:
            stop = {"kind": "stop", "step": self.step, **said, "unix_s": time.time()}
            self.goodput = self.log.books.ledger(stop).as_dict()
            self._write({"kind": "goodput", "step": self.step, **self.goodput})
            self._write(stop)

    def _loop(self, stop: StopRequest) -> str:
        steps, every = self.config.train.steps, self.config.checkpoint.every_steps
        if self.step and self._is_eval_due() and self.last_eval.get("step") != self.step:
            asked = self._evaluate(stop)  # the stop left no time for it
            self._save()
            if asked is not None and not (self.step == steps and asked.evaluate):
                self._end_save(self.saver.wait, must_be=True)
                return "stopped"
        while self.step < steps:
            self._before_step()
            stopping = self._one_step(stop.requested is not None)
            self._end_save(self.saver.poll)
            if self.guard.decision.answer == "roll_back":
                continue  # that step has been evaluated and saved before
            if _due(self.step, self.config.anomaly.replicas_every_steps):
                self.wall_s += self.replicas.check(self._tensors(), self.step)
            last = self.step == steps
            plan = self._plan_stop(stop) if stopping else StopPlan(evaluate=True, save=True)
            if plan.evaluate and self._is_eval_due():
                asked = self._evaluate(stop)
                stopping, plan = (stopping, plan) if asked is None else (True, asked)
            if plan.save and (last or stopping or _due(self.step, every)):
                self._save(must_be=last or stopping)
            if last or stopping:
                self.patience_s = LONGEST_S
                self._end_save(self.saver.wait, must_be=True)
            if stopping and not (last and plan.evaluate):
                return "stopped"
        self._end_save(self.saver.wait, must_be=True)
        return "done"

    def _before_step(self) -> None:
        """Weigh the sources and choose the layers' codecs where that is due. Collective."""
        self.patience_s = LONGEST_S
        for part in (self.mixing, self.codec_choice):
            if (record := part.before(self.step + 1)) is not None:
                self.wall_s += record[f"{record['kind']}_ms"] / 1e3
                self.train_step.read_exchange_meters()  # what it sent is not the next step's
                self._write(record)

    def _is_eval_due(self) -> bool:
        last = self.step == self.config.train.steps
        return last or _due(self.step, self.config.train.eval_every_steps)

    def _plan_stop(self, stop: StopRequest) -> StopPlan:
        """What there is time for, the same on all ranks. Collective."""
        eval_s = self.eval_s if self._is_eval_due() else 0.0
        return self._note(plan_stop(self.config.train.grace_s, self._pace(stop, eval_s)))

    def _pace(self, stop: StopRequest, eval_s: float) -> Pace:
        running_s = self.saver.running_s
        own = Pace(
            elapsed_s=stop.elapsed_s,
            eval_s=eval_s,
            save_s=self.save_s,
            saving_s=max(0.0, self.save_s - running_s) if running_s else 0.0,
        )
        return slowest(own, self.run.process.device)

    def _note(self, plan: StopPlan) -> StopPlan:
        if plan.note:
            self.stop_note = {"note": plan.note}
            if self.run.process.rank == 0:
                print(f"warning: {plan.note}", flush=True)
        return plan

    def _one_step(self, stop_requested: bool) -> bool:
        """Train one step and record it; return whether some rank was asked to stop."""
        began = time.perf_counter()
        self.patience_s = patience_s(self.step_seconds)
        self.step += 1
        with self.timer.section("data", on_host=True):
            batches = self.guard.read_batches(self.step, self.run.loader)
        lr = self._learning_rate()
        self.train_step.compute_ms = self.stragglers.due(self.step)
        judge = self.guard.begin(lr, can_roll_back=self.has_checkpoint)
        result = self.train_step(batches, lr, stop_requested, judge, self.step)
        decision = self.guard.end(result.loss, result.grad_norm)
        if decision.finding is not None:
            self._answer(result)
        step_s = time.perf_counter() - began
        self.wall_s += step_s
        self.step_seconds.append(step_s)
        self.step_rates.append(result.num_tokens / step_s)
        self.tokens_per_s = statistics.median(self.step_rates)
        if result.is_applied:
            self._record_step(result, lr * (decision.rate or 1.0), step_s)
        else:
            self.timer.read()
        return result.stop_requested

    def _answer(self, result: StepResult) -> None:
        """Tell the anomaly in the step just made, and do what is left to do about it. Collective."""
        record = self.guard.record(self.step, result.loss, result.grad_norm)
        error = self.guard.error(self.step, result.loss, result.grad_norm)
        if record["action"] == "roll_back":
            if not self._roll_back():
                raise error
            record["to_step"] = self.step
        self._write(record)
        if record["action"] == "stop":
            raise error

    def _roll_back(self) -> bool:
        """Load the newest good checkpoint; only the order of data and what is known of anomalies go on. Collective."""
        self.patience_s = LONGEST_S  # the disk decides
        self._end_save(self.saver.wait)
        found = load_latest_good(self.run.folder / "checkpoints", self._tensors())
        if found is not None:
            self.step, self.last_eval = found.state["step"], found.state["last_eval"]
            self.codec_choice.rewind(found.state.get("codecs"))
            self.train_step.placements.at_resume(found.state.get("placement"))
            if self.log is not None:
                self.log.rewind(self.step)
        return found is not None

    def _learning_rate(self) -> float:
        return learning_rate(
            self.config.schedule,
            peak_lr=self.config.optim.lr,
            step=self.step,
            total_steps=self.config.train.steps,
            tokens=self._tokens(),
            batch=self.config.train.global_batch_tokens // self.config.data.seq_len,
        )

    def _tokens(self) -> int:
        """Trained on so far by all ranks; the batch may have changed at a resume."""
        return self.run.loader.consumed_tokens

    def _record_step(self, result: StepResult, lr: float, step_s: float) -> None:
        sections_ms = self.timer.read()
        self.step_times.add(step_s, sections_ms)
        self.stragglers.add(sections_ms, self.train_step.own_exchange_ms)
        for straggler in self.stragglers.found(self.step, self.train_step.compute_ms_W):
            self._write(straggler)
        if not (_due(self.step, self.config.train.log_every_steps) or result.stop_requested):
            return
        self._write(
            train_record(
                self.config,
                result,
                step=self.step,
                tokens=self._tokens(),
                lr=lr,
                step_s=step_s,
                sections_ms=sections_ms | {"checkpoint": self.unrecorded_checkpoint_ms},
                bytes_per_token=self.run.bytes_per_token,
                flops_per_token=self.yardstick.flops_at(result.mean_length_tokens),
                world_size=self.run.process.world_size,
                peak_tflops=self.yardstick.peak_tflops,
            )
            | self.step_times.fields(step_s, sections_ms)
            | step_fields(self.run.loader)
        )
        self.unrecorded_checkpoint_ms = 0.0

    def _evaluate(self, stop: StopRequest) -> StopPlan | None:
        """What is left to do where a stop was asked for meanwhile, which may end it. Collective."""
        grace_s = self.config.train.grace_s
        eval_stop = EvalStop(grace_s, self.eval_s, lambda left_s: self._pace(stop, left_s))
        self.patience_s = patience_s([self.eval_s] if self.eval_s else [], few=1)
        result = evaluate(
            self.run.parallel,
            self.run.eval_batches,
            self.config.data.weights,
            self.run.token_bytes_V,
            self.config.train.dtype,
            self.run.meshes,
            eval_stop.must_leave,
            self.config.dispatch.compresses and self.config.parallel.ep > 1,
        )
        self.wall_s += (eval_s := eval_stop.elapsed_s)
        self.train_step.read_exchange_meters()  # what evaluation sent is not the next step's
        if result is not None:
            self.eval_s = eval_s
            self.last_eval = eval_record(result, step=self.step, eval_ms=eval_s * 1e3)
            self._write(self.last_eval)
        plan = eval_stop.plan(is_whole=result is not None)
        return plan and self._note(plan)

    def _tensors(self) -> dict[str, Tensor]:
        return run_tensors(self.run.model, self.run.optimizer)

    def _save(self, must_be: bool = False) -> None:
        self.patience_s = LONGEST_S  # the disk decides
        if self.config.anomaly.replicas_every_steps:
            self.wall_s += self.replicas.check(self._tensors(), self.step)
        self._end_save(self.saver.wait)
        self.has_checkpoint = True
        self.saver.begin(
            self.step,
            self._tensors(),
            {
                "step": self.step,
                "wall_s": self.wall_s,
                "loader": self.run.loader.state_dict(),
                "last_eval": self.last_eval,
                "tokens_per_s": self.tokens_per_s,
                "anomaly": self.guard.state.to_json(),
                "origin": self.origin,
                "codecs": self.codec_choice.state,
                "placement": self.train_step.placements.state,
            },
            random_state(self.run.process.device),
            # The record on disk is never behind the checkpoint that a resume goes on from.
            before_commit=self.log.sync if self.log is not None else lambda: None,
        )
        if not self.config.checkpoint.asynchronous:
            self._end_save(self.saver.wait, must_be=must_be)

    def _end_save(self, ask: Callable[[], Saved | None], *, must_be: bool = False) -> None:
        """Record the save that has ended. One that failed is told and the next one tries anew, unless it `must_be`."""
        try:
            saved = ask()
        except CheckpointError as error:
            if must_be or isinstance(error, Superseded):
                raise
            self._write({"kind": "checkpoint_failed", "step": self.step, "reason": str(error)})
            return
        if saved is None:
            return
        self.wall_s += saved.waited_s
        self.unrecorded_checkpoint_ms += saved.waited_s * 1e3
        self.save_s = max(self.save_s, saved.result.seconds)
        self._write(checkpoint_record(saved))

    def _resume(self) -> Beginning:
        """Continue from the newest good checkpoint, if wanted and there, or begin with the weights that were named."""
        begun = begin(self.config.checkpoint, self.run.folder, self._tensors())
        self.origin = begun.origin
        if begun.resumed is not None:
            state = begun.resumed.state
            self.run.loader.load_state_dict(state["loader"])
            self.mixing.at_resume()
            self.codec_choice.at_resume(state.get("codecs"))
            self.train_step.placements.at_resume(state.get("placement"))
            self.step, self.wall_s = state["step"], state["wall_s"]
            self.last_eval, self.tokens_per_s = state["last_eval"], state["tokens_per_s"]
            self.has_checkpoint = True
            if "anomaly" in state:  # checkpoints of older versions know nothing of it
                self.guard.state = AnomalyState.from_json(state["anomaly"])
        return begun

    def _dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.config.train.dtype == "bf16" else torch.float32

    def _open_log(self) -> MetricsLog:
        self.check_turn()
        folder = self.run.folder
        write_text(folder / "config.yaml", to_yaml(self.config))
        said = data_manifest(self.config, self.run.manifests)
        write_text(folder / "data_manifest.json", json.dumps(said, indent=1) + "\n")
        return MetricsLog(
            folder,
            resume_step=self.step,
            resume_anomalies=self.guard.state.num_found,
            sinks=open_sinks(self.config, resume_step=self.step),
            check_turn=self.check_turn,
        )

    def _start_record(self, begun: Beginning) -> Record:
        return {
            **start_record(self.config, self.run.meshes.dims, self.run.process),
            **self.found,
            **self.yardstick.fields(),
            **self.start_up.fields(),
            **planned_epochs(self.config, self.run.loader),
            "resumed_from_step": self.step,
            "notes": list(begun.notes),
        }

    def _write_summary(self, status: str) -> None:
        summary = {
            "status": status,
            "steps": self.step,
            **eval_summary(self.last_eval),
            **text_entropies(self.config, self.run.manifests),
            "tokens_per_s": self.tokens_per_s,
            "wall_s": self.wall_s,
            "world_size": self.run.process.world_size,
            **self.yardstick.sizes(),
            "tokens": self._tokens(),
            "goodput": self.goodput,
        }
        with may_fail(self.run.summary_path, "the next start of the same command writes it"):
            self.check_turn()
            self.run.summary_path.unlink(missing_ok=True)  # none is better than an old one
            write_text(self.run.summary_path, json.dumps(summary, indent=2) + "\n")

    def _write(self, record: Record) -> None:
        if self.log is not None:
            self.log.write(record)


def _due(step: int, every_steps: int) -> bool:
    return every_steps > 0 and step % every_steps == 0
