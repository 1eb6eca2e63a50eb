"""The state of a run on disk: weights, average, optimizer moments, and where the run stands.

Written by torch.distributed.checkpoint: each process its shards, read back onto any number of processes. A checkpoint
is written beside (`step-N.partial`) in the background and takes its name when it is whole, so a kill at any moment
leaves the former one. `run.json` in it says what it belongs to; no pickle is written (storage.py).
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from mmdit import numbers
from mmdit.config import MMDiTConfig
from mmdit.files import naming, read_object, write_atomically
from mmdit.sampling.sample import ADAPTER, WEIGHTS
from rfkernels.optim import AdamW
from train.config import with_defaults
from train.engine.ema import EmaWeights
from train.engine.parallel import World, frozen, trained_state
from train.engine.storage import Reader, Writer

ABOUT = "run.json"


@dataclass
class Progress:
    """Where a run stands."""

    step: int = 0
    """Finished steps."""
    seconds: float = 0.0
    """Spent so far."""
    skipped: int = 0
    """Steps whose loss or gradient was not finite: they changed nothing."""


BUDGET = {"steps", "minutes"}


def _another(changed: list[str], decides: dict[str, Any]) -> str | None:
    """Why a run cannot resume with what has changed, or None. More steps are those that it would have taken if they had
    been asked for at first, unless the learning rate follows the budget."""
    if not changed or (set(changed) <= BUDGET and decides["optimizer"]["decay"] == "none"):
        return None
    if set(changed) <= BUDGET:
        decay = decides["optimizer"]["decay"]
        return f": its learning rate's decay ({decay}) ends with the budget, which cannot be moved afterwards"
    return "; choose another"


def _finished(folder: Path) -> list[Path]:
    """By their steps. What has another name than ours is somebody's own."""
    found = (p for p in folder.glob("step-*") if p.is_dir() and p.name[len("step-") :].isdecimal())
    return sorted(found, key=lambda p: int(p.name[len("step-") :]))


def _emptied(partial: Path) -> None:
    """Room for the weights, where a disk is full. The folder stays: by it a run knows that a checkpoint was begun."""
    with suppress(OSError):
        for file in partial.iterdir():
            file.unlink(missing_ok=True)


def _moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    names: dict[Any, str] = {p: n for n, p in model.named_parameters()}
    return {
        f"{names[parameter]}.{key}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if isinstance(value, Tensor)
    }


def _empty(optimizer: torch.optim.Optimizer, parameter: Tensor, kind: str) -> Tensor:
    """What a part of a parameter's state is read into."""
    if kind == "step":
        return torch.zeros(())
    fresh: dict[str, Tensor] = optimizer.fresh(parameter) if isinstance(optimizer, AdamW) else {}
    return fresh[kind] if fresh else torch.zeros_like(parameter)


def _reason(error: BaseException) -> str:
    """DCP's errors hold the traceback of the process that failed; its last line says why."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1][:200]


def _stager() -> DefaultStager:
    """Copies a state to memory of its own before `async_save` returns. One for each save: torch 2.11's can be used once
    (pytorch issue 183413). Pinned memory would be allocated anew each time, which takes longer than it saves."""
    return DefaultStager(StagingOptions(False, False, False, False))


class Checkpoints:
    """Those of one run.

    Args: folder: where they lie. keep: how many of the newest stay.
    """

    def __init__(self, folder: Path, keep: int, world: World) -> None:
        self.folder, self.keep, self.world = folder, keep, world
        self._writing: Future | None = None
        self._failure: BaseException | None = None
        self._published = threading.Event()
        self._newest = -1
        if world.mesh is None:                                               # what is meant
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")

    @contextmanager
    def finished(self) -> Iterator[None]:
        """At the end, and if something fails inside, what is being written is waited for: else it would be lost."""
        try:
            yield
        except BaseException:
            try:
                self.wait()
            except Exception as error:                                   # the first failure is the one to tell of
                print(f"error: {error}", flush=True)
            raise
        else:
            self.wait()

    def save(
        self, model: nn.Module, ema: EmaWeights, optimizer: torch.optim.Optimizer, progress: Progress,
        decides: dict[str, Any],
    ) -> None:  # fmt: skip
        """Copies the state after progress.step steps and writes it in the background; `wait` waits for it.

        Raises: what kept the former one from being written: a full disk, for one. The one before it stays."""
        self.wait()
        if progress.step == self._newest:                                # there already, whole: it is not touched again
            return
        self._newest = progress.step
        partial = self.folder / f"step-{progress.step:08d}.partial"
        if self.world.main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        self.world.largest(0)                                            # the folder is there for everybody
        about = json.dumps({**asdict(progress), "processes": self.world.size, "decides": decides}, indent=1)
        state = {"model": trained_state(model), "ema": dict(ema.weights), "optimizer": _moments(model, optimizer)}
        self._published.clear()
        self._writing = dcp.async_save(                                                             # type: ignore[assignment]
            state, storage_writer=Writer(partial), process_group=self.world.side, no_dist=self.world.mesh is None,
            async_stager=_stager(),
        )  # fmt: skip
        self._writing.add_done_callback(lambda done: self._publish(done, partial, about))           # type: ignore[union-attr]

    def _publish(self, done: Future, partial: Path, about: str) -> None:
        try:
            done.result()
            if self.world.main:
                write_atomically(partial / ABOUT, about.encode())
                final = partial.with_suffix("")
                shutil.rmtree(final, ignore_errors=True)
                os.replace(partial, final)
                for old in _finished(self.folder)[: -self.keep]:
                    shutil.rmtree(old)
        except BaseException as error:
            self._failure = error
            if self.world.main:
                _emptied(partial)
        finally:
            self._published.set()

    def wait(self) -> None:
        """Until nothing is being written. Raises: as `save`."""
        if self._writing is None:
            return
        self._published.wait()
        self._writing = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise OSError(f"a checkpoint in {self.folder} was not written: {_reason(failure)}") from failure

    def _refuse_weights(self) -> None:
        """Of a run without its checkpoints, as people keep one. Raises: ValueError."""
        run = self.folder.parent
        kept = [name for name in (WEIGHTS, ADAPTER) if (run / name).is_file()]
        if kept and not any(self.folder.glob("step-*")):                      # a kill leaves at least a partial one
            raise ValueError(
                f"{run} holds {kept[0]} of a run, and no checkpoint to resume from: choose another folder, or remove "
                "it to begin anew"
            )

    def restore(
        self, model: nn.Module, ema: EmaWeights, optimizer: torch.optim.Optimizer, decides: dict[str, Any]
    ) -> Progress:
        """Loads the newest checkpoint, if there is one, whatever number of processes wrote it.

        Raises: ValueError if the run was made with another configuration, its newest checkpoint is damaged, or it has
            weights and no checkpoint."""
        found = _finished(self.folder)
        if not found:
            self._refuse_weights()
            return Progress()
        path = found[-1]
        if not (path / ABOUT).is_file():
            raise ValueError(f"{path} is damaged (no {ABOUT}); remove it to resume from the checkpoint before it")
        about = read_object(path / ABOUT)
        with naming(path / ABOUT):
            progress = Progress(about["step"], about["seconds"], about["skipped"])
            for name in ("step", "skipped"):
                numbers.whole(name, about[name], 0)
            numbers.between("seconds", progress.seconds, 0)
            known = with_defaults(about["decides"])
            written = {k: v for k, v in known.items() if k in decides or k in about["decides"]}
            if "model" in written:                                   # fields that have come since are at their defaults
                written["model"] = json.loads(json.dumps(MMDiTConfig.from_dict(written["model"]).to_dict()))
        changed = sorted(k for k in decides.keys() | written.keys() if written.get(k) != decides.get(k))
        if why := _another(changed, decides):
            raise ValueError(f"{self.folder.parent} holds a run with other settings ({', '.join(changed)}){why}")
        parameters = dict(model.named_parameters())
        try:
            held = Reader(path).read_metadata().state_dict_metadata
            moments: dict[str, Tensor] = {}
            for name in (key.removeprefix("optimizer.") for key in held if key.startswith("optimizer.")):
                owner, kind = name.rsplit(".", 1)
                parameter = parameters[owner]
                moments[name] = _empty(optimizer, parameter, kind)
            state = {"model": trained_state(model), "ema": dict(ema.weights), "optimizer": moments}
            dcp.load(state, storage_reader=Reader(path), process_group=self.world.side, no_dist=self.world.mesh is None)
        except (Exception, CheckpointException) as error:                # a bad file is any of many errors to DCP
            raise ValueError(
                f"{path} is damaged ({_reason(error)}); remove it to resume from the checkpoint before it"
            ) from error
        model.load_state_dict(state["model"], strict=not frozen(model))
        fused = isinstance(optimizer, AdamW) or any(group.get("fused") for group in optimizer.param_groups)
        for name, value in moments.items():
            owner, kind = name.rsplit(".", 1)
            parameter = parameters[owner]
            there = fused and kind == "step"                              # it wants its step there too
            optimizer.state[parameter][kind] = value.to(parameter.device) if there else value
        self._newest = progress.step
        return progress
