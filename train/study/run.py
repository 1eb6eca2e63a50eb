"""A study's runs, several at a time. What is finished has a row; the rest begins or resumes when it is run again."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
import traceback
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout

import torch
from tqdm import tqdm

from mmdit.files import claimed, write_atomically
from train.study import figures
from train.study.judge import trained
from train.study.plan import NAMED, Job, Study, Variants, row_path, rows
from train.study.report import best_first, report
from train.study.work import work


def jobs(study: Study, variants: Variants, names: list[str], seed: int) -> list[Job]:
    """Those of one seed that have no row yet."""
    found = [Job(name, cache, seed) for name in names for cache in study.caches]
    return [job for job in found if not row_path(study, job).is_file()]


def again(study: Study, names: list[str]) -> list[str]:
    """Variants that get more seeds: the named, and the best by mean rank of the first."""
    first = [row for row in rows(study) if row["seed"] == 0 and row["variant"] in names]
    best = best_first(first)[: study.best_again]
    return [name for name in names if name in best or name in NAMED]


def _begin(devices: multiprocessing.Queue) -> None:
    """Of a worker: its own GPU, where there are any."""
    device = devices.get()
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(device)


def _quietly(study: Study, variants: Variants, job: Job) -> str | None:
    """A job with its output in a file. Returns: what went wrong, if anything did."""
    log = study.folder / "logs" / f"{job.slug}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file, redirect_stdout(file), redirect_stderr(file):
        try:
            return None if work(study, variants, job) else "stopped by a signal"
        except Exception as error:
            traceback.print_exc()
            return f"{type(error).__name__}: {error}"


def run(study: Study, variants: Variants) -> list[str]:
    """Runs what has no row: one seed of every variant, then the others of the best and the named.

    The finished are in FOLDER/rows.jsonl, what they say in FOLDER/report.md and a figure.
    Returns: what failed, a line each; its output is in FOLDER/logs, and it is tried again next time.
    Raises: ValueError for an unknown variant in study.only, or if another process works on the study."""
    names = list(study.only or variants)
    unknown = sorted(set(names) - set(variants))
    if unknown:
        raise ValueError(f"study: only names {', '.join(unknown)}; expected some of {', '.join(variants)}")
    failed: list[str] = []
    with claimed(study.folder):
        if study.clip is None:
            trained(study.folder)                                                   # once, not by every worker
        for seed in range(study.seeds):
            todo = jobs(study, variants, names if seed == 0 else again(study, names), seed)
            failed += _all(study, variants, todo, f"seed {seed}")
        finished = rows(study)
        lines = "".join(json.dumps(row) + "\n" for row in finished)
        write_atomically(study.folder / "rows.jsonl", lines.encode())
        write_atomically(study.folder / "report.md", report(finished).encode())
        if finished:
            figures.draw(finished, study.folder)
    return failed


def _all(study: Study, variants: Variants, todo: list[Job], label: str) -> list[str]:
    context, failed = multiprocessing.get_context("spawn"), []
    devices = context.Queue()
    for worker in range(study.workers):
        count = torch.cuda.device_count()
        devices.put(worker % count if count else None)
    with (
        ProcessPoolExecutor(study.workers, context, _begin, (devices,)) as pool,
        tqdm(total=len(todo), desc=label, unit="run", file=sys.stderr) as bar,
    ):
        start = time.monotonic()
        futures: dict[Future, Job] = {pool.submit(_quietly, study, variants, job): job for job in todo}
        try:
            for done in as_completed(futures):
                wrong = done.result()
                bar.update()
                bar.set_postfix_str(f"{(time.monotonic() - start) / bar.n:.0f} s each, last {futures[done].variant}")
                if wrong:
                    failed.append(f"{futures[done].slug}: {wrong}")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return failed
