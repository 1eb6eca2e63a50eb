"""How Triton's interpreter is watched: its launches, its memory operations, its arithmetic and its hints.

Nothing on disk changes; Triton 3.6 and later. Each pointer argument gets an address range of its own, its real address
and a tag, so that every lane says which argument it came from, wherever it lands.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from rfkernels.sanitize import canary, overflow
from rfkernels.sanitize.accesses import Launch
from rfkernels.sanitize.findings import watch

MEMORY = ("masked_load", "masked_store", "load", "store", "atomic_cas", "atomic_rmw", "assume", "assert", "print")
GRID = (2**31 - 1, 65535, 65535)


def install() -> None:
    """Watches every interpreted launch of this process from now on; idempotent. TRITON_INTERPRET=1 must have been set
    before Triton was imported."""
    if watch.installed:
        return
    watch.installed = True
    from triton.runtime import interpreter

    from rfkernels.interpreter import mend

    patch_lang = interpreter._patch_lang                     # as Triton has it: `_call` below applies it once a launch
    mend()
    builder = interpreter.InterpreterBuilder
    # Its own check of overflow computes and throws away; ours replaces it.
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
    interpreter._implicit_cvt = _converting(interpreter, interpreter._implicit_cvt)
    interpreter._patch_lang = _patching_once(patch_lang)
    interpreter._patch_lang_tensor = _asking(interpreter._patch_lang_tensor)
    for name in dir(builder):
        if name.startswith("create_") and name.removeprefix("create_") not in MEMORY:
            setattr(builder, name, overflow.watched(name, inspect.getattr_static(builder, name)))
    _watch_memory(interpreter, builder)
    interpreter.TensorHandle.set_attr = _checking_hints(interpreter.TensorHandle.set_attr)
    builder.create_assume = _assume
    interpreter.ReduceScanOpInterface.apply = _reducing(interpreter.ReduceScanOpInterface.apply)
    interpreter.GridExecutor.__call__ = _call
    canary.install()


# --- A launch ---------------------------------------------------------------------------------------------------------

_patched: set[frozenset[int]] = set()
_scopes: list[Any] = []


class _Nothing:
    def restore(self) -> None:
        pass


def _patching_once(patch: Callable[..., Any]) -> Callable[..., Any]:
    """triton.language is patched once a launch, not at each call inside a kernel."""

    def patch_once(fn: Any) -> Any:
        import triton.language as tl

        if watch.launch is None:
            return patch(fn)
        key = frozenset(id(v) for v in fn.__globals__.values() if v is tl or v is tl.core)
        if key not in _patched:
            _patched.add(key)
            _scopes.append(patch(fn))
        return _Nothing()

    return patch_once


def _converting(interpreter: Any, convert: Callable[..., Any]) -> Callable[..., Any]:
    """Arguments as a kernel sees them: integers as wide as a launcher passes them, pointers tagged."""

    def implicit(argument: Any) -> Any:
        import triton.language as tl
        from triton.runtime.jit import mangle_type

        if isinstance(argument, int) and not isinstance(argument, bool):
            kind = tl.str_to_ty(mangle_type(argument), None)
            data = np.array([argument], dtype=interpreter._get_np_dtype(kind))
            return tl.tensor(interpreter.TensorHandle(data, kind), kind)
        made = convert(argument)
        if watch.launch is not None and hasattr(argument, "data_ptr"):
            known = watch.launch.of_tensor[id(argument)].pop(0)
            made.handle.data = np.array([known.tagged], dtype=np.uint64)
        return made

    return implicit


def _tensors(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, tuple):
        fields = getattr(value, "_fields", None)
        for i, inner in enumerate(value):
            yield from _tensors(f"{name}.{fields[i]}" if fields else f"{name}[{i}]", inner)
    elif hasattr(value, "data_ptr"):
        yield name, value
    elif type(value).__name__ == "TensorDescriptor":
        yield from _tensors(name, value.base)


def _call(self: Any, *args: Any, **kwargs: Any) -> None:
    """In place of GridExecutor.__call__, for tensors of the CPU: nothing is copied, every access is watched."""
    from triton.runtime import interpreter
    from triton.runtime.errors import InterpreterError

    kwargs = {k: v for k, v in kwargs.items() if k in inspect.getfullargspec(self.fn).args}
    arguments = inspect.getcallargs(self.fn, *args, **kwargs)
    launch = Launch(self.fn.__name__, self.fn.__code__)
    tables = {name: value for name, value in arguments.items() if hasattr(value, "behind")}
    arguments |= {name: value.detach().clone() for name, value in tables.items()}
    for name, value in arguments.items():
        for label, tensor in () if name in self.constexprs else _tensors(name, value):
            base = tensor.base if type(tensor).__name__ == "TensorWrapper" else tensor
            if base.device.type != "cpu":
                raise ValueError(f"{launch.name}: {label} is on {base.device}; the sanitizer takes tensors of the CPU")
            launch.register(label, base, tensor)
    for name, table in tables.items():
        _tag(launch, name, table, arguments[name])
    for hook in getattr(self, "pre_run_hooks", ()):
        hook(*args, **kwargs)
    if watch.launch is not None:
        raise RuntimeError(f"{launch.name} was launched inside {watch.launch.name}")
    watch.launch = launch
    scope = interpreter._patch_lang(self.fn)
    try:
        given = {n: a if n in self.constexprs else interpreter._implicit_cvt(a) for n, a in arguments.items()}
        grid = tuple(int(n) for n in (self.grid(given) if callable(self.grid) else self.grid))
        grid = grid + (1,) * (3 - len(grid))
        for axis, most in enumerate(GRID):
            if grid[axis] > most:
                watch.report("grid", launch.name, "", "", f"{grid}: a GPU takes at most {most} along axis {axis}")
        builder = interpreter.interpreter_builder
        builder.set_grid_dim(*grid)
        chosen = watch.settings.programs
        places = np.ndindex(*grid) if chosen is None else iter(chosen(grid))
        try:
            for x, y, z in places:
                builder.set_grid_idx(x, y, z)
                launch.begin((x, y, z), 1 + (x * grid[1] + y) * grid[2] + z)
                self.fn(**given)
        except Exception as error:
            raise InterpreterError(repr(error)) from error
    finally:
        watch.launch = None
        launch.end()
        scope.restore()
        while _scopes:
            _scopes.pop().restore()
        _patched.clear()


def _tag(launch: Launch, name: str, table: Any, copy: Any) -> None:
    """Tags the addresses of a table, those of the tensors that its attribute `behind` lists, as arguments are."""
    for tensor in table.behind:
        launch.register(f"{name}'s", tensor, tensor)
    tags = {argument.pointer: argument.tagged for argument in launch.arguments[::-1]}
    copy.copy_(copy.new_tensor([tags.get(value, value) for value in table.flatten().tolist()]).view_as(copy))


# --- Memory -----------------------------------------------------------------------------------------------------------


def _watch_memory(interpreter: Any, builder: Any) -> None:
    import triton.language as tl

    handle = interpreter.TensorHandle
    load, store = builder.create_masked_load, builder.create_masked_store
    swap, update = builder.create_atomic_cas, builder.create_atomic_rmw

    def bits(mask: Any) -> Any:
        return handle(mask, tl.int1) if isinstance(mask, np.ndarray) else mask              # of a descriptor or block

    def checked(op: str, pointers: Any, mask: Any, value: Any = None) -> tuple[Any, Any]:
        real, active = watch.launch.access(op, pointers, bits(mask), value)
        return handle(real, pointers.dtype), handle(np.ascontiguousarray(active), tl.int1)

    def masked_load(self: Any, pointers: Any, mask: Any, other: Any, *rest: Any, **named: Any) -> Any:
        if watch.launch is None:
            return load(self, pointers, mask, other, *rest, **named)
        real, active = checked("load", pointers, mask)
        out = load(self, real, active, other, *rest, **named)
        if watch.settings.unwritten and out.data.size:
            found = canary.is_canary(np.asarray(out.data))
            if found is not None and (found := found & active.data).any():
                _report_unwritten(np.asarray(pointers.data)[found])
        return out

    def masked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        if watch.launch is None:
            return store(self, pointers, value, mask, *rest, **named)
        real, active = checked("store", pointers, mask, value)
        return store(self, real, value, active, *rest, **named)

    def atomic_cas(self: Any, pointer: Any, compared: Any, value: Any, *rest: Any) -> Any:
        if watch.launch is None:
            return swap(self, pointer, compared, value, *rest)
        real, active = checked("atomic", pointer, np.ones(np.shape(pointer.data), bool))
        if not active.data.all():
            return handle(np.zeros_like(compared.data), compared.dtype.scalar)
        return swap(self, real, compared, value, *rest)

    def atomic_rmw(self: Any, op: Any, pointer: Any, value: Any, mask: Any, *rest: Any) -> Any:
        if watch.launch is None:
            return update(self, op, pointer, value, mask, *rest)
        real, active = checked("atomic", pointer, mask)
        return update(self, op, real, value, active, *rest)

    def plain_load(self: Any, pointer: Any, *rest: Any) -> Any:
        return self.create_masked_load(pointer, handle(np.ones_like(pointer.data, dtype=bool), tl.int1), None, *rest)

    def plain_store(self: Any, pointer: Any, value: Any, *rest: Any) -> Any:
        return self.create_masked_store(pointer, value, handle(np.ones_like(pointer.data, dtype=bool), tl.int1), *rest)

    builder.create_masked_load, builder.create_masked_store = masked_load, masked_store
    builder.create_atomic_cas, builder.create_atomic_rmw = atomic_cas, atomic_rmw
    builder.create_load, builder.create_store = plain_load, plain_store


def _report_unwritten(addresses: np.ndarray) -> None:
    argument = watch.launch.argument_of(int(addresses[0]))
    element = (int(addresses[0]) - argument.tagged) // argument.itemsize
    told = f"loads {addresses.size} elements that nobody wrote; first: {element} from its start"
    watch.launch.report("unwritten-read", argument, told)


# --- Integers and hints -----------------------------------------------------------------------------------------------


def _asking(patch: Callable[..., None]) -> Callable[..., None]:
    """Loop bounds and branches of interpreted tensors are looked at."""

    def patch_tensor(tensor: Any, *scope: Any) -> None:
        patch(tensor, *scope)
        for name in ("__index__", "__bool__"):
            asked = overflow.control(name, getattr(tensor, name))
            if scope:
                scope[0].set_attr(tensor, name, asked)
            else:
                setattr(tensor, name, asked)

    return patch_tensor


def _reducing(reduce: Callable[..., Any]) -> Callable[..., Any]:
    """A reduction or scan of anything marked is marked whole."""

    def reducing(self: Any, given: Any) -> Any:
        out = reduce(self, given)
        if watch.launch is not None and watch.launch.tainted:
            parts = given if isinstance(given, tuple) else (given,)
            marked = [g for g in parts if overflow.taint_of(g.handle) is not None]
            for o in out if isinstance(out, tuple) else (out,):
                if marked:
                    overflow.mark(o.handle, np.ones(np.shape(o.handle.data), bool), marked[0].handle.origin)
        return out

    return reducing


def _assume(self: Any, condition: Any) -> None:
    if watch.launch is not None and not bool(np.asarray(condition.data).all()):
        watch.launch.report("assumption", None, "assumes what is not so")


def _checking_hints(set_attr: Callable[..., None]) -> Callable[..., None]:
    def checked(self: Any, key: str, values: Any) -> None:
        if watch.launch is not None and watch.settings.hints and key.startswith("tt."):
            _check_hint(self, key, values)
        set_attr(self, key, values)

    return checked


def _check_hint(handle: Any, key: str, values: Any) -> None:
    """multiple_of, max_contiguous and max_constancy against the values that are there."""
    data = np.atleast_1d(np.asarray(handle.data))
    pointer = handle.dtype.scalar.is_ptr() or data.dtype == np.uint64
    step = max(1, handle.get_element_ty().primitive_bitwidth // 8) if pointer else 1
    claims = [*map(int, values), *[1] * (data.ndim - len(values))]
    for axis, claimed in enumerate(claims[: data.ndim]):
        if claimed <= 1:
            continue
        along, size = np.moveaxis(data, axis, -1).astype(np.int64), data.shape[axis]
        if key == "tt.divisibility":
            run = max(_run(along, step), int(handle.attr.get("tt.contiguity", [1] * data.ndim)[axis]))
            wrong = along[..., ::run][along[..., ::run] % claimed != 0]
        elif size % min(claimed, size):
            wrong = np.array([size])
        else:
            change = np.diff(along.reshape(*along.shape[:-1], -1, min(claimed, size)), axis=-1)
            wrong = change[change != (step if key == "tt.contiguity" else 0)]
        if wrong.size:
            of = {"tt.divisibility": "a value", "tt.contiguity": "a step", "tt.constancy": "a step"}[key]
            told = f"says {key.removeprefix('tt.')} {claimed} along axis {axis}, but {of} is {int(wrong.flat[0])}"
            watch.launch.report("hint", None, told)


def _run(along: np.ndarray, step: int) -> int:
    """Length of the longest aligned groups, a power of two, in which values rise by step."""
    size, best = along.shape[-1], 1
    while best * 2 <= size and size % (best * 2) == 0:
        groups = along.reshape(*along.shape[:-1], -1, best * 2)
        if not (np.diff(groups, axis=-1) == step).all():
            break
        best *= 2
    return best
