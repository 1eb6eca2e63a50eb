"""Where processes meet when torchrun has started them again."""

from __future__ import annotations

import time
import uuid
from datetime import timedelta

import torch.distributed as dist

WAIT = 0.01        # seconds between two looks


def fresh_store(timeout: timedelta) -> tuple[dist.Store, int, int]:
    """(store, rank, processes), for init_process_group: torchrun's store under a name that no start before had.

    After a restart the store that torchrun's agent keeps still has the addresses of the processes before, and whoever
    reads those first cannot connect (pytorch issues 135712, 167288). TORCHELASTIC_RESTART_COUNT does not tell starts
    apart, for every node counts its own. So each process says hello under a name that is new, and the first tells each
    of them the name of this start, until all have said that they are there.
    Raises: TimeoutError if one does not come.
    """
    store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    own = uuid.uuid4().hex
    if rank:
        store.set(f"hello/{rank}", own)
        start = store.get(f"welcome/{own}").decode()
        store.set(f"there/{start}/{rank}", "")
        return dist.PrefixStore(start, store), rank, size
    missing, until = set(range(1, size)), time.monotonic() + timeout.total_seconds()
    while missing:
        for other in [other for other in missing if store.check([f"hello/{other}"])]:
            store.set(f"welcome/{store.get(f'hello/{other}').decode()}", own)
        missing = {other for other in missing if not store.check([f"there/{own}/{other}"])}
        if missing and time.monotonic() > until:
            raise TimeoutError(f"processes {sorted(missing)} of {size} did not come within {timeout}")
        time.sleep(WAIT)
    return dist.PrefixStore(own, store), rank, size
