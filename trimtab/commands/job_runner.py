"""Runs jobs: shared among processes, alike ones at once, each file whole, and only what a run before did not finish."""

import sys
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from trimtab.commands.errors import FailedJobs, first_line, one_line
from trimtab.commands.folder_lock import FolderLock
from trimtab.commands.jobs import Job
from trimtab.commands.manifest import MANIFEST, Manifest, finite, merge_manifests, read_manifest
from trimtab.commands.processes import Processes

__all__ = ["Command", "Outcome", "batches_of", "run_jobs"]


@dataclass(frozen=True)
class Outcome:
    """What became of a job.

    Attributes:
        files: their names.
        figures: for the manifest.
        lines: to print.
        interrupted: whether it was cut short, so that it is made again.
    """

    files: Sequence[str]
    figures: Mapping[str, Any] = field(default_factory=dict)
    lines: Sequence[str] = ()
    interrupted: bool = False


class Command(Protocol):
    """What :func:`run_jobs` asks of a command."""

    @property
    def noun(self) -> str:
        """What it makes, such as ``pictures``."""
        ...

    @property
    def endings(self) -> Sequence[str]:
        """All that a job's files may end in."""
        ...

    def jobs(self, folder: Path) -> list[Job]:
        """All jobs, checked as far as can be without a model."""
        ...

    def load(self, jobs: Sequence[Job], device: str, *, first: bool) -> None:
        """Loads the models for these jobs; what is told once is told by the first process."""
        ...

    def group(self, job: Job) -> Hashable:
        """Jobs with equal values may be made at once; None is made alone."""
        ...

    def make(self, batch: Sequence[Job]) -> Sequence[Callable[[Path], Outcome]]:
        """Makes jobs of one group; for each what writes its files into a folder. No file is written before."""
        ...


def run_jobs(command: Command, folder: Path, *, batch_size: int, device: str, keep_going: bool) -> None:
    """Runs what is not done yet and notes it in the folder's manifest.

    Batches are those of the whole list, however many processes there are and whatever was done before, so a job comes
    out the same; of a batch that was cut short only the rest is made, whose pictures then agree within rounding.

    Args:
        command: what makes the jobs.
        folder: where to; made if missing, and left away if nothing was written.
        batch_size: most jobs at once.
        device: what ``--device`` says.
        keep_going: whether the others go on where a job fails, which the manifest then says.

    Raises:
        UsageError: an argument cannot be used, or another run is writing the folder.
        FailedJobs: at the end, where some failed.
        OSError: the folder cannot be written any more; what was finished is in it.
        KeyboardInterrupt: the same, when interrupted.
    """
    processes = Processes(device)
    with _made(folder) as new:
        lock, failed = FolderLock(folder), 0
        try:
            jobs, todo = _begin(command, folder, lock, new, processes)
            _work(command, folder, jobs, todo, processes, batch_size, keep_going)
            processes.wait()
            if processes.first:
                failed = _end(folder, jobs)
            processes.wait()  # a launcher ends the others when one ends with an error
        finally:
            lock.release(remove=processes.count == 1)
    if failed:
        raise FailedJobs(f"{failed} of {len(jobs)} {command.noun} failed; {folder / MANIFEST} says why")


def batches_of(jobs: Sequence[Job], group: Callable[[Job], Hashable], size: int) -> list[list[Job]]:
    """Jobs of one group together, at most so many at once, in the order of their first."""
    found: list[list[Job]] = []
    open_batches: dict[Hashable, list[Job]] = {}
    for job in jobs:
        key = group(job)
        batch = open_batches.get(key) if key is not None else None
        if batch is None or len(batch) == size:
            batch = []
            open_batches[key] = batch
            found.append(batch)
        batch.append(job)
    return found


def _begin(
    command: Command, folder: Path, lock: FolderLock, new: Callable[[], None], processes: Processes
) -> tuple[list[Job], list[Job]]:
    """Takes the folder, and what the first process finds to be done is done by all."""
    plan: tuple[list[Job], list[Job]] = ([], [])
    if processes.first:
        jobs = command.jobs(folder)
        bad = [job for job in jobs if job.error]
        with _writing(folder):
            new()
            lock.take()
            merge_manifests(folder, forget=[*(job.name for job in bad), *(job.where or "" for job in jobs)])
            _sweep(folder, jobs, command.endings)
            for job in bad:
                _failed(Manifest(folder), job, str(job.error))
        done = _done(folder, jobs)
        todo = [job for job in jobs if not job.error and job.name not in done]
        if done:
            print(f"{len(done)} of {len(jobs)} {command.noun} are in {folder} already", file=sys.stderr)
        plan = jobs, todo
    plan = processes.shared(plan)
    if not processes.first:
        new()
        lock.join()
    return plan


def _work(
    command: Command,
    folder: Path,
    jobs: Sequence[Job],
    todo: Sequence[Job],
    processes: Processes,
    batch_size: int,
    keep_going: bool,
) -> None:
    if not todo:
        return
    command.load(todo, processes.device, first=processes.first)
    wanted = {job.name for job in todo}
    planned = batches_of([job for job in jobs if not job.error], command.group, batch_size)
    left = [kept for batch in planned if (kept := [job for job in batch if job.name in wanted])]

    from tqdm import tqdm

    manifest = Manifest(folder, processes.number)
    mine = processes.share_of(left)
    total = sum(map(len, mine))
    quiet = True if total < 2 or not processes.first else None
    with tqdm(total=total, desc=command.noun, unit=command.noun.removesuffix("s"), disable=quiet) as progress:
        for batch in mine:
            interrupted = False
            for job, write in _made_one_by_one(command, batch, manifest, keep_going):
                with _writing(folder):
                    outcome = _written(job, write, folder, manifest, keep_going)
                for line in outcome.lines:
                    tqdm.write(line, file=sys.stdout)
                sys.stdout.flush()
                interrupted |= outcome.interrupted
            if interrupted:
                raise KeyboardInterrupt
            progress.update(len(batch))


def _written(job: Job, write: Callable[[Path], Outcome], folder: Path, manifest: Manifest, keep_going: bool) -> Outcome:
    """Writes a job's files, and then its line: without it they are written again."""
    try:
        outcome = write(folder)
    except (ValueError, TypeError, ArithmeticError) as error:
        if not keep_going:
            raise
        _failed(manifest, job, f"{type(error).__name__}: {first_line(error)}")
        return Outcome(())
    if not outcome.interrupted:
        manifest.append(_record(job, outcome))
    return outcome


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Says which folder can't be written any more."""
    try:
        yield
    except OSError as error:
        raise OSError(f"--output {folder} cannot be written: {first_line(error)}; what was finished is kept") from error


def _made_one_by_one(
    command: Command, batch: Sequence[Job], manifest: Manifest, keep_going: bool
) -> Iterator[tuple[Job, Callable[[Path], Outcome]]]:
    """A batch's jobs with what writes each; where it fails as a whole its jobs are tried alone."""
    try:
        made = list(zip(batch, command.make(batch), strict=True))
    except Exception as error:
        if not keep_going or type(error).__name__ == "AcceleratorError":  # after that no job works any more
            raise
        if len(batch) > 1:
            for job in batch:
                yield from _made_one_by_one(command, [job], manifest, keep_going)
        else:
            _failed(manifest, batch[0], f"{type(error).__name__}: {first_line(error)}")
        return
    yield from made


def _end(folder: Path, jobs: Sequence[Job]) -> int:
    """One manifest in the jobs' order; how many of them failed."""
    names = [job.name for job in jobs]
    merge_manifests(folder, names)
    records = read_manifest(folder)
    return sum(bool(records[name].get("error")) for name in names if name in records)


def _record(job: Job, outcome: Outcome) -> dict[str, Any]:
    made = {"files": list(outcome.files), "figures": dict(outcome.figures), "error": None}
    return {"job": job.name, "seed": job.settings.get("seed"), "settings": dict(job.settings), **made}


def _failed(manifest: Manifest, job: Job, error: str) -> None:
    said: dict[str, Any] = {"files": [], "figures": {}, "error": error, "where": job.where}
    manifest.append({"job": job.name, "seed": job.settings.get("seed"), "settings": dict(job.settings), **said})
    print(one_line(f"trimtab: warning: {job.name}: {error}"), file=sys.stderr)


def _done(folder: Path, jobs: Sequence[Job]) -> set[str]:
    """Names of jobs that the manifest has with just these settings and whose files are there."""
    records = read_manifest(folder)
    owners = {file: name for name, record in records.items() for file in record.get("files") or ()}
    found = set()
    for job in jobs:
        record = records.get(job.name, {})
        files = record.get("files")
        if files and record.get("settings") == finite(dict(job.settings)) and not record.get("error"):
            own = all(owners[file] == job.name and _is_whole(folder / file) for file in files)
            found |= {job.name} if own else set()
    return found


def _is_whole(path: Path) -> bool:
    """Whether a file is there; one that a crash of the machine emptied is not."""
    return path.is_file() and path.stat().st_size > 0


def _sweep(folder: Path, jobs: Sequence[Job], endings: Sequence[str]) -> None:
    """Removes what a killed run was writing: ``.NAME.PROCESS`` of jobs' files and of the manifest."""
    own = {job.name + ending for job in jobs for ending in endings} | {MANIFEST}
    for path in folder.glob(".*"):
        name, _, number = path.name[1:].rpartition(".")
        stem, _, middle = name.rpartition(".")  # of clouds it is .STEM.PROCESS.ENDING
        if (number.isdigit() and name in own) or (middle.isdigit() and f"{stem}.{number}" in own):
            path.unlink(missing_ok=True)


@contextmanager
def _made(folder: Path) -> Iterator[Callable[[], None]]:
    """What makes the folder; afterwards it is removed again, with those above it, where nothing was written."""
    missing = [path for path in (folder.absolute(), *folder.absolute().parents) if not path.exists()]
    try:
        yield lambda: folder.mkdir(parents=True, exist_ok=True)
    finally:
        for path in missing:
            try:
                path.rmdir()
            except OSError:
                break
