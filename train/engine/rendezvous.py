"""Where processes meet when torchrun has started them again."""

from __future__ import annotations

import time
import uuid
from datetime import timedelta

import torch.distributed as dist

WAIT = 0.01        # seconds between two polls


def fresh_store(timeout: timedelta) -> tuple[dist.Store, int, int]:
    """(store, rank, processes), for init_process_group: torchrun's store under a name that no start before had."""
    store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    return dist.PrefixStore(agreed(store, rank, size, timeout), store), rank, size


def agreed(store: dist.Store, rank: int, size: int, timeout: timedelta) -> str:
    """A name for this start that all its processes have and none before had.

    After a restart the store that torchrun's agent keeps still has the addresses of the processes before, and whoever
    reads those first cannot connect (pytorch issues 135712, 167288). TORCHELASTIC_RESTART_COUNT does not tell starts
    apart, for every node counts its own. So each process says hello under a name that is new, and the first tells each
    of them the name of this start, until all have said that they are there.
    Raises: TimeoutError, or in the others torch's DistStoreError, if one does not come.
    """
    own = uuid.uuid4().hex
    if rank:
        store.set(f"hello/{rank}", own)
        start = store.get(f"welcome/{own}").decode()
        store.set(f"there/{start}/{own}", "")
        return start
    others, until = range(1, size), time.monotonic() + timeout.total_seconds()
    names: dict[int, str] = {}
    while missing := [r for r in others if r not in names or not store.check([f"there/{own}/{names[r]}"])]:
        for other in (r for r in others if store.check([f"hello/{r}"])):
            if (name := store.get(f"hello/{other}").decode()) != names.get(other):
                names[other] = name
                store.set(f"welcome/{name}", own)
        if time.monotonic() > until:
            raise TimeoutError(f"processes {missing} of {size} did not come within {timeout}")
        time.sleep(WAIT)
    return own
