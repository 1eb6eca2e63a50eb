"""One launch: every load, store and atomic of its programs, checked lane by lane."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from rfkernels.sanitize.arguments import HALF, TAG, Argument, Shadow
from rfkernels.sanitize.findings import Writer, watch

DEPTH = 6                    # functions between a line and its kernel that are named
WRITERS = 64                 # storages of which the last writer is remembered
REMEMBERED = 1 << 24         # elements of such a storage
FOREIGN = tuple(str(Path(find_spec(name).origin or "").parent) for name in ("triton", "numpy"))    # type: ignore[union-attr]
ATOMIC, READ, SCRATCH = "atomic", "read", "scratch"


class Launch:
    """Args: name, code: of the kernel's function."""

    def __init__(self, name: str, code: Any) -> None:
        self.name, self.code = name, code
        self.arguments: list[Argument] = []
        self.of_tensor: dict[int, list[Argument]] = {}
        """By a tensor's id, in the order of the arguments."""
        self.program = (0, 0, 0)
        self.tainted = False
        """Whether an integer of this program has overflowed."""
        self._number, self._numbers = 0, {0: (0, 0, 0)}
        self._shadows: dict[int, Shadow] = {}
        self._granules: dict[int, int] = {}
        watch.statistics.launches[name] += 1

    def register(self, name: str, tensor: Tensor, given: Any) -> None:
        """An argument: a tensor, and what was handed over for it."""
        argument = Argument(name, tensor, len(self.arguments))
        self.arguments.append(argument)
        self.of_tensor.setdefault(id(given), []).append(argument)
        known = self._granules.get(argument.start, argument.itemsize)
        self._granules[argument.start] = min(known, argument.itemsize)

    def begin(self, program: tuple[int, int, int], number: int) -> None:
        """Of a program, counted from 1."""
        self.program, self._number, self.tainted = program, number, False
        self._numbers[number] = program
        watch.statistics.programs[self.name] += 1

    def report(self, kind: str, argument: Argument | None, detail: str) -> None:
        more = ""
        if argument is not None:
            site = watch.sites.get(argument.start)
            more = f"; {argument}" + (f", allocated at {site}" if site else "")
        named = "" if argument is None else argument.name
        watch.report(kind, self.name, self._where(), named, f"program {self.program} {detail}{more}")

    def _where(self) -> str:
        """The innermost line of kernel source, and where it was called from, up to the kernel."""
        frame: Any = sys._getframe(1)
        parts: list[str] = []
        mine = str(Path(__file__).parent)
        while frame is not None and len(parts) < DEPTH:
            name = frame.f_code.co_filename
            if not name.startswith((mine, *FOREIGN)) and not name.endswith("rfkernels/testing.py"):
                parts.append(f"{Path(name).parent.name}/{Path(name).name}:{frame.f_lineno} ({frame.f_code.co_name})")
            if frame.f_code is self.code:
                break
            frame = frame.f_back
        return " < ".join(parts)

    def end(self) -> None:
        """Remembers who wrote what, for a while."""
        for argument in self.arguments:
            shadow = self._shadows.get(argument.start)
            if shadow is not None and shadow.written.size <= REMEMBERED and shadow.written.any():
                watch.writers.pop(argument.start, None)
                watch.writers[argument.start] = Writer(
                    self.name, argument.name, shadow.written, shadow.granule, self._numbers
                )
        while len(watch.writers) > WRITERS:
            del watch.writers[next(iter(watch.writers))]

    def argument_of(self, address: int) -> Argument | None:
        index = ((address + int(HALF)) >> int(TAG)) - 1
        return self.arguments[index] if 0 <= index < len(self.arguments) else None

    # --- an access ----------------------------------------------------------------------------------------------------

    def access(self, op: str, pointers: Any, mask: Any, value: Any = None) -> tuple[np.ndarray, np.ndarray]:
        """Checks one "load", "store" or "atomic". Returns: real addresses, and which lanes may run."""
        addresses = np.asarray(pointers.data)
        active = np.broadcast_to(np.asarray(mask.data, bool), addresses.shape)
        if self.tainted:
            self._check_overflow(op, pointers, mask, active)
        lanes = addresses[active]
        s = watch.statistics
        {"load": s.loads, "store": s.stores, "atomic": s.atomics}[op][self.name] += lanes.size
        real = np.zeros(addresses.shape, np.uint64)
        if not lanes.size:
            return real, active
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        tags = (lanes + HALF) >> TAG
        runnable, targets = np.ones(lanes.shape, bool), np.zeros(lanes.shape, np.uint64)
        one = bool((tags == tags[0]).all())
        for tag in tags[:1] if one else np.unique(tags):
            picked = np.arange(lanes.size) if one else np.nonzero(tags == tag)[0]
            argument = self.argument_of(int(lanes[picked[0]]))
            if argument is None:
                address = hex(int(lanes[picked[0]]))
                self.report("wild-pointer", None, f"{op}s through a pointer of no argument: {address}")
                runnable[picked] = False
                continue
            targets[picked] = lanes[picked] - (tag << TAG)
            relative = targets[picked].view(np.int64) - argument.start
            inside = (relative >= 0) & (relative + size <= argument.nbytes)
            if not inside.all():
                runnable[picked] &= inside
                self._report_outside(op, argument, relative[~inside], size)
            if inside.any():
                of_all = np.nonzero(active.ravel())[0][picked[inside]]
                written = None if value is None else np.broadcast_to(value.data, addresses.shape).reshape(-1)[of_all]
                self._check_inside(op, argument, relative[inside], size, written)
        real[active] = targets
        if not runnable.all():
            active = active.copy()
            active[active] = runnable
        return real, active

    def _report_outside(self, op: str, argument: Argument, relative: np.ndarray, size: int) -> None:
        low, high = int(relative.min()), int(relative.max())
        far = f"{-low} bytes before its storage" if low < 0 else f"{high + size - argument.nbytes} bytes past it"
        element = (int(relative[0]) - (argument.pointer - argument.start)) // argument.itemsize
        self.report(
            "out-of-bounds", argument,
            f"{op}s {relative.size} elements up to {far} ({argument.nbytes} bytes); first: element {element}",
        )  # fmt: skip

    def _check_inside(
        self, op: str, argument: Argument, relative: np.ndarray, size: int, written: np.ndarray | None
    ) -> None:
        """relative: bytes from the storage's start. written: the values of a store."""
        if (relative % size).any() or argument.start % size:
            self.report("misaligned", argument, f"{op}s {size} bytes at byte {int(relative[relative % size != 0][0])}")
        if watch.settings.memory:
            element = relative // argument.itemsize
            member = argument.view.has(element)
            if not member.all():
                wrong = element[~member] - argument.offset
                told = f"{op}s {wrong.size} elements of the storage that are not of this view"
                self.report("outside-view", argument, f"{told}; first: {int(wrong[0])} from its start")
        if watch.settings.races:
            self._check_race(op, argument, relative, size, written)

    # --- races --------------------------------------------------------------------------------------------------------

    def _shadow(self, argument: Argument) -> Shadow:
        if argument.start not in self._shadows:
            self._shadows[argument.start] = Shadow(self._granules[argument.start], argument.nbytes)
        return self._shadows[argument.start]

    def _named(self, number: int) -> str:
        return "several programs" if number < 0 else f"program {self._numbers[number]}"

    def _check_race(
        self, op: str, argument: Argument, relative: np.ndarray, size: int, written: np.ndarray | None
    ) -> None:
        shadow, me = self._shadow(argument), np.int32(self._number)
        index = relative // shadow.granule
        parts = size // shadow.granule
        if parts > 1:
            index = (index[:, None] + np.arange(parts)).ravel()
        first = lambda which: f"first: element {self._element(argument, index[which][0], shadow)}"  # noqa: E731
        writer = shadow.written[index]
        foreign, own = (writer != 0) & (writer != me), writer == me
        readers = shadow.of(READ)[index] if op == "load" or shadow.has(READ) else np.zeros_like(writer)
        if op != "atomic" and shadow.has(ATOMIC):
            touched = shadow.of(ATOMIC)[index]
            if ((touched != 0) & (touched != me)).any():
                self.report("race-read-write", argument, f"{op}s plainly what another program updates atomically")
        if op == "load":
            if foreign.any():
                other = self._named(int(writer[foreign][0]))
                told = f"reads {int(foreign.sum())} elements that {other} wrote; {first(foreign)}"
                self.report("race-read-write", argument, told)
            elif own.any():
                self.report("own-read-after-write", argument, "reads elements that it wrote itself in this launch")
            shadow.of(READ)[index] = _joined(readers, me)
            return
        read_by_others = (readers != 0) & (readers != me)
        if op == "atomic":
            if foreign.any() or read_by_others.any():
                told = "updates atomically what another program reads or writes plainly"
                self.report("race-read-write", argument, told)
            shadow.of(ATOMIC)[index] = _joined(shadow.of(ATOMIC)[index], me)
            return
        whole = written is not None and parts == 1
        bits = np.ascontiguousarray(written).view(f"u{size}") if whole else None
        self._check_lanes(argument, shadow, index, bits)
        if foreign.any():
            same = bits is not None and bool((self._memory(argument, relative[foreign], size) == bits[foreign]).all())
            other = self._named(int(writer[foreign][0]))
            told = f"writes {int(foreign.sum())} elements that {other} wrote, {'the same' if same else 'other'} bits"
            self.report("race-same-bits" if same else "race-write-write", argument, f"{told}; {first(foreign)}")
        elif own.any():
            self.report("own-write-after-write", argument, "writes elements that it wrote itself in this launch")
        if read_by_others.any():
            other = self._named(int(readers[read_by_others][0]))
            told = f"writes {int(read_by_others.sum())} elements that {other} read; {first(read_by_others)}"
            self.report("race-write-read", argument, told)
        elif (readers == me).any():
            self.report("own-write-after-read", argument, "writes elements that it read itself in this launch")
        shadow.written[index] = me

    def _check_lanes(self, argument: Argument, shadow: Shadow, index: np.ndarray, bits: np.ndarray | None) -> None:
        """Two lanes of one store on one element: which of them wins is not said."""
        order = np.arange(index.size, dtype=np.int32)
        scratch = shadow.of(SCRATCH)
        scratch[index] = order
        double = scratch[index] != order
        if double.any():
            same = bits is not None and bool((bits[scratch[index]] == bits).all())
            told = f"{int(double.sum())} lanes of one store write an element that another lane writes"
            self.report("lanes-collide-same-bits" if same else "lanes-collide", argument, told)

    @staticmethod
    def _memory(argument: Argument, relative: np.ndarray, size: int) -> np.ndarray:
        """What is there now, as unsigned integers."""
        from triton._C.libtriton import interpreter

        at, kind = (relative + argument.start).astype(np.uint64), np.dtype(f"u{size}")
        return interpreter.load(at, np.ones(at.shape, bool), np.zeros(at.shape, kind), kind)

    @staticmethod
    def _element(argument: Argument, index: int, shadow: Shadow) -> int:
        return int(index) * shadow.granule // argument.itemsize - argument.offset

    # --- addresses that overflowed ------------------------------------------------------------------------------------

    def _check_overflow(self, op: str, pointers: Any, mask: Any, active: np.ndarray) -> None:
        taint = getattr(pointers, "taint", None)
        if taint is not None and (hit := np.broadcast_to(taint, active.shape) & active).any():
            argument = self.argument_of(int(np.asarray(pointers.data)[hit][0]))
            told = f"{op}s {int(hit.sum())} elements at addresses of an integer that overflowed: {pointers.origin}"
            self.report("overflow-address", argument, told)
        taint = getattr(mask, "taint", None)
        if taint is not None and np.asarray(taint).any():
            count = int(np.broadcast_to(taint, active.shape).sum())
            told = f"{op}s with a mask, {count} lanes of which are of an integer that overflowed: {mask.origin}"
            self.report("overflow-mask", None, told)


def _joined(before: np.ndarray, me: np.int32) -> np.ndarray:
    return np.where((before == 0) | (before == me), me, np.int32(-1))
