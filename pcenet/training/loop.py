"""The training loop: batch by batch, step by step, epoch by epoch, in the order of its statements."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from lightning.fabric.strategies.model_parallel import ModelParallelStrategy
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from pcenet.data import EpochSampler
from pcenet.nn import RoutingStatistics, aux_terms, record_routing, update_expert_bias
from pcenet.nn.processes import process_count
from pcenet.runs.health import TRAINED, count_routings, logit_spread
from pcenet.runs.rules import duration
from pcenet.runtime.device import autocast
from pcenet.runtime.distributed import decide, largest, own_rank, share_statistics
from pcenet.runtime.signals import Stop, end_by
from pcenet.texts import say
from pcenet.training import engine
from pcenet.training.averaging import average_of
from pcenet.training.checkpoints import read_checkpoint, remove_old, write_checkpoint
from pcenet.training.figures import (
    EpochFigures,
    Row,
    Seen,
    epoch_line,
    evaluation_routing,
    without_gradient,
    write_rows,
)
from pcenet.training.nonfinite import first_cause, is_finite, leave_out
from pcenet.training.optimizer import make_optimizer
from pcenet.training.preparation import Run, bias_images, steps_per_epoch
from pcenet.training.progress import RunBar
from pcenet.training.schedules import Schedules, set_routers
from pcenet.training.state import State, load_weights
from pcenet.training.sync_batch_norm import synchronised
from pcenet.training.trackers import Trackers

log = logging.getLogger(__name__)

LOG_EVERY = 50  # steps, or once in an epoch of fewer


def step_seed(seed: int, batch: int, rank: int = 0) -> int:
    """The random seed of one batch: dropout, mixing and noise in it depend on (seed, batch, rank) alone."""
    own = [rank] if rank else []
    return int(np.random.SeedSequence([seed, batch, *own]).generate_state(1, np.uint64)[0])


def training_mode(model: nn.Module) -> None:
    """Put a network into training mode, but what is frozen whole: its statistics are part of what it is."""
    model.train()
    for module in model.modules():
        requires_grad = [parameter.requires_grad for parameter in module.parameters()]
        if requires_grad and not any(requires_grad):
            module.eval()


class Trainer:
    """Trains the network of a run, on Lightning Fabric.

    Args:
        run: everything that it is made of; it goes on from ``run.checkpoint``, if there is one.
        stop: knows whether a signal has asked for the end.
        trackers: are told the figures.
        bar: shows how far the run is.
    """

    def __init__(self, run: Run, stop: Stop, trackers: Trackers, bar: RunBar) -> None:
        self.run, self.config = run, run.config
        self.stop, self.trackers, self.bar = stop, trackers, bar
        self.fabric = engine.launch(run.config, run.device, run.ranks)
        self.schedules = Schedules(run.config, steps_per_epoch(run))
        self.objective = run.task.make_objective(run.model, run.config, run.sources["train"]).to(run.device)
        self.model = synchronised(run.model, run.config, run.device) if run.ranks.count > 1 else run.model
        averaged = average_of(self.model, run.config.ema_decay)
        content = read_checkpoint(run.checkpoint) if run.checkpoint else None
        if content:
            load_weights(content, self.model, averaged)
        if run.config.compile:
            engine.compile_parts(self.model)  # in place, and not its average: names of weights stay as they are
        self.network = self.fabric.setup_module(self.model)  # which may wrap it, or divide its weights
        averaged.to(self.fabric.device)
        if run.config.strategy == "fsdp":
            assert isinstance(self.fabric.strategy, ModelParallelStrategy)
            engine.divide(averaged.module, self.fabric.strategy.device_mesh)
        # Where a gradient is not finite only because it was scaled, the step is left out and the scale halved.
        scaler = torch.amp.GradScaler(run.device.type, enabled=run.config.precision == "fp16")
        self.state = State(self.model, averaged, make_optimizer(self.model, run.config), scaler)
        if content:
            self.state.load_state_dict(content)
        self.parameters = [parameter for group in self.state.optimizer.param_groups for parameter in group["params"]]
        training_mode(self.model)
        self.written = self.started = time.monotonic()
        self.before = self.state.elapsed

    def fit(self) -> State:
        """Train until all epochs are over, or an option or a signal ends it; a checkpoint holds the state returned.

        A first signal waits for the end of a step, or of a validation.
        """
        state, config = self.state, self.config
        with self.stop.waiting():
            while state.epoch < config.epochs and not state.stopped:
                self.train_epoch()
                validated = self.validate()
                self.end_epoch(validated)
                self.save()
                end_by(largest([self.stop.signal])[0])
        end_by(self.stop.signal)  # one that came since
        if self.schedules.of_the_routers:
            set_routers(self.model)
        return state

    def train_epoch(self) -> None:
        """Train on the batches of the current epoch that are not done yet."""
        state, loader = self.state, self.run.loaders["train"]
        assert isinstance(loader.sampler, EpochSampler)
        assert loader.batch_size is not None
        loader.sampler.start_at(state.epoch, state.batch * loader.batch_size)
        training_mode(self.model)
        self.bar.start(state.epoch, len(loader), state.batch)
        began = time.perf_counter() - state.seconds
        batches = enumerate(loader, start=state.batch)
        while state.batch < len(loader):
            count = min(self.config.accumulate, len(loader) - state.batch)
            state.images += self.optimizer_step(islice(batches, count), count)
            state.batch += count
            over = state.batch >= len(loader)
            if over and self.run.device.type == "cuda":
                torch.cuda.synchronize(self.run.device)
            state.seconds = time.perf_counter() - began
            state.elapsed = self.before + time.monotonic() - self.started
            # All processes take part in a checkpoint, and end after the same step.
            due, signal, late = largest([self.checkpoint_is_due, self.stop.signal, self.time_is_up])
            if late:
                break
            if (due or signal) and not over:  # after the last batch validation comes first
                self.save()
                end_by(signal)

    def optimizer_step(self, batches: Iterable[tuple[int, Any]], count: int) -> int:
        """One step of the optimiser with some batches; where something is not finite it is left out.

        Args:
            batches: each with its number in the epoch.
            count: how many there are.

        Returns:
            The images in them.
        """
        state, config = self.state, self.config
        if self.schedules.of_the_routers:
            set_routers(self.model, self.schedules.temperature(state.step), self.schedules.router_noise(state.step))
        # A forward pass writes what it sees into running statistics.
        buffers = [buffer.clone() for buffer in self.model.buffers()] if config.skip_nonfinite else []
        seen, norm = self.backward(batches, count)
        if is_finite(seen, norm):
            self.update(norm, config.lr * self.schedules.learning_rate_factor(state.step))
            state.averaged.update_parameters(self.model)
            state.figures.update(seen)
            state.skipped = 0
        elif self.scaled_too_far(seen):
            state.figures.update(seen)
        else:
            cause = first_cause(seen, self.model, self.run.loaders["train"], state.epoch)
            state.skipped = leave_out(f"step {state.step + 1}, {cause}", state.skipped, config.skip_nonfinite)
            for buffer, before in zip(self.model.buffers(), buffers, strict=True):
                buffer.copy_(before)
        state.step += 1
        self.bar.advance(len(seen), seen[-1].values["loss"])
        if state.step % min(LOG_EVERY, self.schedules.steps_per_epoch) == 0:
            losses = {name: float(value) for name, value in seen[-1].values.items() if name.endswith("loss")}
            figures = losses | {"lr": state.optimizer.param_groups[0]["lr"]}
            self.trackers.log({f"step/{name}": value for name, value in figures.items()}, state.step)
        return sum(batch.images for batch in seen)

    def backward(self, batches: Iterable[tuple[int, Any]], count: int) -> tuple[list[Seen], Tensor]:
        """Compute the gradient of some batches' mean loss; returns what was noted of each, and the gradient's norm."""
        seen: list[Seen] = []
        self.state.optimizer.zero_grad()
        for number, batch in batches:
            # With FSDP each process keeps its part of the gradients alone, so that they are exchanged every time.
            wait = len(seen) + 1 < count and self.config.strategy != "fsdp"
            with self.fabric.no_backward_sync(self.network, enabled=wait):
                loss, noted = self.batch_loss(self.fabric.to_device(batch), number)
                self.fabric.backward(self.state.scaler.scale(loss / self.config.accumulate))
            seen.append(noted)
        self.state.scaler.unscale_(self.state.optimizer)
        return seen, get_total_norm([parameter.grad for parameter in self.parameters if parameter.grad is not None])

    def scaled_too_far(self, seen: Sequence[Seen]) -> bool:
        """Whether a gradient is not finite perhaps only because its loss was scaled; the scale is halved then."""
        scaler = self.state.scaler
        before = scaler.get_scale()
        scaler.update()
        after = scaler.get_scale()
        if not (after < before > 1 and is_finite(seen)):
            return False
        log.info(
            "step %d: a gradient overflows in float16; the step is left out, and losses are scaled by %g from"
            " now on, not by %g",
            self.state.step + 1,
            after,
            before,
        )
        return True

    def update(self, norm: Tensor, learning_rate: float) -> None:
        """Move the weights by a gradient of this norm."""
        if self.config.clip_grad:
            clip_grads_with_norm_(self.parameters, self.config.clip_grad, norm)
        for group in self.state.optimizer.param_groups:
            group["lr"] = learning_rate
        self.state.scaler.step(self.state.optimizer)
        self.state.scaler.update()

    def batch_loss(self, batch: tuple[Tensor, Tensor], number: int) -> tuple[Tensor, Seen]:
        """The loss of a batch, the task's plus the auxiliary ones of PCE layers, and what is noted of it, without a
        transfer to the host."""
        images, targets = batch
        state, config = self.state, self.config
        finite_images = images.isfinite().flatten(1).all(1)
        share_statistics(self.model)
        batches_per_epoch = self.schedules.steps_per_epoch * config.accumulate
        torch.manual_seed(step_seed(config.seed, state.epoch * batches_per_epoch + number, own_rank()))
        with autocast(config.precision, self.run.device):
            images, targets = self.objective.mix(images, targets)
            with record_routing(self.model) as records:
                logits = self.forward(self.network, images)
            task = self.objective.loss(logits, targets)
            balance, z = aux_terms(records, synchronised=process_count() > 1)
            # A term of weight 0 is left out, not multiplied: it may be infinite.
            weights = (self.schedules.balance(state.step), config.z)
            weighted = [w * term for w, term in zip(weights, (balance, z), strict=True) if w]
            loss = sum(weighted, task)
            values = {"loss": loss, "task_loss": task, "balance_loss": balance, "z_loss": z}
            values[self.objective.train_score] = self.objective.right(logits, targets)
            values |= {f"{TRAINED}/{name}/logit_spread": logit_spread(routings) for name, routings in records.items()}
        return loss, Seen(
            number,
            len(images),
            finite_images,
            {name: value.detach() for name, value in values.items()},
            {name: [without_gradient(routing) for routing in routings] for name, routings in records.items()},
        )

    def forward(self, network: nn.Module, images: Tensor) -> Tensor:
        """Logits, in float32 at least."""
        logits: Tensor = network(images.to(memory_format=torch.channels_last))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    @torch.no_grad()
    def validate(self) -> Row:
        """The figures of the averaged weights on the validation images, and the health of their routers.

        The routers' biases, which belong to the weights, are found first.
        """
        network = self.state.averaged.module
        share_statistics(network)  # all processes validate the network that the checkpoint will have
        engine.gather_weights(network)
        routing: defaultdict[str, RoutingStatistics] = defaultdict(RoutingStatistics)

        def forward(images: Tensor) -> Tensor:
            with record_routing(network) as records:
                logits = self.forward(network, images)
            count_routings(routing, records)
            return logits

        with autocast(self.config.precision, self.run.device):
            some = (self.fabric.to_device(images) for images in bias_images(self.run))
            update_expert_bias((images.to(memory_format=torch.channels_last) for images in some), network)
            for batch in self.run.loaders["val"]:
                self.objective.validate(forward, self.fabric.to_device(batch))
        engine.release_weights(network)
        scores = {name: float(value) for name, value in self.objective.scores().items()}
        return scores | evaluation_routing(routing)

    def end_epoch(self, validated: Row) -> None:
        """Add the row of the epoch, and say it; training is over where there is no progress or no time."""
        state, config, run = self.state, self.config, self.run
        last = max(state.step - 1, 0)
        row: Row = {
            "epoch": state.epoch + 1,
            "step": state.step,
            **state.figures.compute(self.model),
            "train/lr": config.lr * self.schedules.learning_rate_factor(last),
            **{f"train/{name}": value(last) for name, value in self.schedules.of_the_routers.items()},
            "train/epoch_seconds": state.seconds,
            "train/images_per_second": run.ranks.count * state.images / state.seconds,
            **validated,
        }
        state.rows.append(row)
        state.batch, state.images, state.seconds, state.figures = 0, 0, 0.0, EpochFigures()
        state.elapsed = self.before + time.monotonic() - self.started
        if state.step < self.schedules.total_steps:
            state.stopped = self.reason_to_stop()
        self.trackers.log({name: value for name, value in row.items() if "/" in name}, state.step)
        if run.ranks.first:
            write_rows(run.folder.logs / "metrics.csv", state.rows)
            images = (len(run.sources["train"]), len(run.sources["val"]))
            say(epoch_line(row, config.epochs, self.objective.train_score, self.objective.score, images))

    def save(self) -> None:
        """Write a checkpoint, and remove what need not be kept."""
        state, run = self.state, self.run
        content: Mapping[str, Any] = {**state.state_dict(), "run": run.identity}
        best = max(state.rows, key=self.score)["step"] if state.rows else -1

        def write() -> None:
            write_checkpoint(run.folder.checkpoint(state.step), content)
            remove_old(run.folder, int(best))

        decide(write)
        self.written = time.monotonic()

    def score(self, row: Row) -> float:
        """The figure of merit of an epoch."""
        return row[f"val/{self.objective.score}"]

    def reason_to_stop(self) -> str | None:
        """The option that ends training now, if any does."""
        scores, patience = list(map(self.score, self.state.rows)), self.config.early_stopping
        if patience is not None and len(scores) - 1 - scores.index(max(scores)) >= patience:
            return "early_stopping"
        return "max_time" if any(largest([self.time_is_up])) else None

    @property
    def checkpoint_is_due(self) -> bool:
        """Whether the last one lies as long behind as the options say."""
        minutes = self.config.checkpoint_minutes
        return minutes is not None and time.monotonic() - self.written >= 60 * minutes

    @property
    def time_is_up(self) -> bool:
        """Whether the run, its parts before interruptions included, has taken as long as it may."""
        limit = self.config.max_time
        return limit is not None and self.state.elapsed >= duration(limit).total_seconds()
