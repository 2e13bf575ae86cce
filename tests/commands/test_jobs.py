"""Jobs from JSONL files and how they are run, on a command that only writes texts: no model, so many runs are quick."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trimtab.commands import job_runner
from trimtab.commands.errors import FailedJobs, UsageError
from trimtab.commands.folder_lock import LOCK, FolderLock
from trimtab.commands.job_runner import Outcome, batches_of, run_jobs
from trimtab.commands.jobs import KEYS, Job, check_entry, check_keys, read_jobs
from trimtab.commands.json_lines import json_lines, parsed
from trimtab.commands.manifest import MANIFEST, Manifest, merge_manifests, read_manifest
from trimtab.commands.pictures import slug, write_json

ROOT = Path(__file__).parents[2]


class Texts:
    """Writes each prompt into two files; "bad" can't be made, "full" can't be written."""

    noun, endings = "texts", (".json", "-twice.json")

    def __init__(self, file: Path | str, pause: float = 0.0) -> None:
        self.file, self.pause, self.made = str(file), pause, []

    def jobs(self, folder):
        return read_jobs(
            self.file, self._settings, lambda index, job: f"{index:04d}-{slug(job['prompt'])}", self.endings
        )

    def _settings(self, line, where, beside):
        yield {"seed": 0, "steps": 1, **check_entry(line, KEYS, where, required=["prompt"])}

    def load(self, jobs, device, *, first):
        print("loaded", flush=True)

    def group(self, job):
        return job.settings["steps"]

    def make(self, batch):
        self.made.append([job.name for job in batch])
        if bad := [job.name for job in batch if "bad" in job.settings["prompt"]]:
            raise ValueError(f"{bad[0]} is bad")
        time.sleep(self.pause)
        return [lambda folder, job=job: self._write(job, folder) for job in batch]

    def _write(self, job, folder):
        paths = [folder / f"{job.name}{ending}" for ending in self.endings]
        for path in paths:
            if "full" in job.settings["prompt"]:
                raise OSError(28, "No space left on device")
            write_json(path, dict(job.settings))
            time.sleep(self.pause)
        return Outcome([path.name for path in paths], {"length": len(job.settings["prompt"])}, [str(paths[0])])


def write_lines(path: Path, lines: list) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def go(command: Texts, folder: Path, batch_size: int = 2, keep_going: bool = True) -> None:
    run_jobs(command, folder, batch_size=batch_size, device="cpu", keep_going=keep_going)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_manifest_says_what_became_of_each_job(tmp_path, capsys):
    lines = [{"prompt": "a"}, {"prompt": "bad"}, "{", "", {"prompt": "c", "id": "c.1", "seed": 3}]
    file = write_lines(tmp_path / "jobs.jsonl", lines)
    out = tmp_path / "made" / "here"
    with pytest.raises(FailedJobs, match="2 of 4 texts failed"):
        go(Texts(file), out)
    records = [json.loads(line) for line in (out / MANIFEST).read_text().splitlines()]
    assert [record["job"] for record in records] == ["0000-a", "0001-bad", f"{file} line 3", "c.1"]
    assert records[0] == {
        "job": "0000-a",
        "seed": 0,
        "settings": {"seed": 0, "steps": 1, "prompt": "a"},
        "files": ["0000-a.json", "0000-a-twice.json"],
        "figures": {"length": 1},
        "error": None,
    }
    assert records[1]["error"] == "ValueError: 0001-bad is bad" and records[1]["files"] == []
    assert records[2]["error"].startswith("no JSON: ") and records[2]["where"] == f"{file} line 3"
    assert records[3]["seed"] == 3
    assert set(contents(out)) == {MANIFEST} | {file for record in records for file in record["files"]}
    assert f"{file} line 3: no JSON" in capsys.readouterr().err

    write_lines(
        file, [{"prompt": "a"}, {"prompt": "good"}, {"prompt": "b"}, "", {"prompt": "c", "id": "c.1", "seed": 3}]
    )
    again = Texts(file)
    go(again, out)  # what was wrong is mended: only that is made, and its errors are gone
    assert again.made == [["0001-good"], ["0002-b"]]
    assert not [record for record in read_manifest(out).values() if record["error"]]
    nothing = Texts(file)
    go(nothing, out)
    assert nothing.made == []


def test_a_bad_one_in_a_batch_does_not_stop_its_neighbours(tmp_path):
    file = write_lines(tmp_path / "jobs.jsonl", [{"prompt": prompt} for prompt in ("a", "bad", "c", "d")])
    command = Texts(file)
    with pytest.raises(FailedJobs, match="1 of 4"):
        go(command, tmp_path / "out", batch_size=3)
    assert command.made == [["0000-a", "0001-bad", "0002-c"], ["0000-a"], ["0001-bad"], ["0002-c"], ["0003-d"]]
    with pytest.raises(ValueError, match="0001-bad is bad"):
        go(Texts(file), tmp_path / "strict", keep_going=False)
    assert not (tmp_path / "strict").exists()


def test_a_full_disk_is_told_by_name_and_ends_the_run(tmp_path):
    file = write_lines(tmp_path / "jobs.jsonl", [{"prompt": prompt} for prompt in ("a", "full", "c")])
    command = Texts(file)
    with pytest.raises(OSError, match=rf"--output {tmp_path / 'out'} cannot be written: .*No space left.*is kept"):
        go(command, tmp_path / "out", batch_size=1)
    assert command.made == [["0000-a"], ["0001-full"]]
    assert set(contents(tmp_path / "out")) == {MANIFEST, "0000-a.json", "0000-a-twice.json"}


def test_alike_jobs_are_batched_in_order():
    jobs = [Job(str(i), {"steps": steps}) for i, steps in enumerate([1, 2, 1, 1, 2, 1])]
    names = lambda batches: [[job.name for job in batch] for batch in batches]  # noqa: E731
    group = lambda job: job.settings["steps"]  # noqa: E731
    assert names(batches_of(jobs, group, 3)) == [["0", "2", "3"], ["1", "4"], ["5"]]
    assert names(batches_of(jobs, lambda job: None, 3)) == [[str(i)] for i in range(6)]


@pytest.mark.parametrize(
    "identity",
    [
        "../a",
        "/etc/passwd",
        "a/b",
        "a\\b",
        ".",
        "..",
        ".hidden",
        "a\0b",
        "",
        "a\n",
        "a.",
        "ä" * 65,
        "-a",
        3,
        ["a"],
        "a b",
    ],
)
def test_ids_that_would_leave_the_folder(identity, tmp_path):
    file = write_lines(tmp_path / "jobs.jsonl", [{"prompt": "a", "id": identity}])
    with pytest.raises(UsageError, match='jobs.jsonl line 1: "id" takes letters'):
        Texts(file).jobs(tmp_path)


def test_no_two_jobs_have_one_file(tmp_path):
    ids = ["A", "a", "b", "b-twice", "e\u0301".encode().decode(), "\u00e9", "0007-x"]
    file = write_lines(tmp_path / "jobs.jsonl", [*({"prompt": "x", "id": one} for one in ids[:4]), {"prompt": "x"}])
    errors = {job.name: job.error for job in Texts(file).jobs(tmp_path)}
    assert errors["A"] is None and "are those of" in errors[f"{file} line 2"] and "line 1" in errors[f"{file} line 2"]
    assert errors["b"] is None and errors["0004-x"] is None
    assert "b-twice.json" in errors[f"{file} line 4"]  # the second file of b


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt": NaN}', "no JSON: NaN is no number"),
        ('{"prompt": "a", "guidance_scale": 1e999}', "no JSON: 1e999 is no number"),
        ('{"prompt": "\\ud800"}', "no JSON: "),
        ("[" * 100_000, "no JSON: "),
        ('{"prompt": "a", "seed": 9223372036854775808}', '"seed" takes a whole number, 0 to 2**63 - 1'),
        ('{"prompt": "a", "seed": true}', '"seed" takes a whole number'),
        ('{"prompt": "a", "steps": 0}', '"steps" takes a whole number, 1 or more; got 0'),
        ('{"prompt": " "}', "a prompt must have a word in it"),
        ("[]", "takes an object with prompt; got []"),
        ('{"seed": 1}', "lacks prompt"),
        ('{"prompt": "a", "colour": 1}', "knows no colour; takes prompt, negative_prompt, seed"),
    ],
)  # fmt: skip
def test_lines_that_are_no_jobs_are_named_by_number(line, words, tmp_path):
    file = write_lines(tmp_path / "jobs.jsonl", [{"prompt": "a"}, line])
    (good, bad) = Texts(file).jobs(tmp_path)
    assert good.error is None and bad.where == f"{file} line 2" and words in bad.error and len(bad.error) < 400
    write_lines(file, ["", line])
    with pytest.raises(UsageError) as error:
        Texts(file).jobs(tmp_path)
    assert f"{file} line 2: " in str(error.value) and words in str(error.value)


def test_what_splits_lines_elsewhere_does_not_here(tmp_path):
    (tmp_path / "jobs.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "a\xe2\x80\xa8b"}\r\n\r\n{"prompt": "c"}')
    lines = json_lines(tmp_path / "jobs.jsonl")
    assert [parsed(text, where)["prompt"] for where, text in lines] == ["a\u2028b", "c"]
    (tmp_path / "jobs.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="--input takes a JSONL file"):
        json_lines(tmp_path / "jobs.jsonl")


def test_what_a_kill_leaves_is_mended(tmp_path):
    """A line without its end, another process's shard, temporary files; and no file of anybody else's is touched."""
    line = {"seed": 0, "settings": {}, "files": [], "figures": {}, "error": None}
    (tmp_path / MANIFEST).write_text(json.dumps({"job": "a", **line}) + "\n" + '{"job": "b", "fi')
    Manifest(tmp_path, process=3).append({"job": "c", **line, "figures": {"x": float("nan")}})
    assert set(read_manifest(tmp_path)) == {"a", "c"}
    merge_manifests(tmp_path, order=["c", "a"])
    records = [json.loads(line) for line in (tmp_path / MANIFEST).read_text().splitlines()]
    assert [record["job"] for record in records] == ["c", "a"] and records[0]["figures"] == {"x": None}
    left = [".x.json.77", ".x-twice.77.json", ".manifest.jsonl.1"]
    others = [".x.json", ".y.json.77", ".x.json.old", "x.json.77"]
    for name in left + others:
        (tmp_path / name).write_text("half")
    job_runner._sweep(tmp_path, [Job("x")], Texts.endings)
    assert set(contents(tmp_path)) == {MANIFEST, *others}


def test_links_are_not_followed_out_of_the_folder(tmp_path):
    mine, out = tmp_path / "mine.txt", tmp_path / "out"
    mine.write_text("mine")
    out.mkdir()
    file = write_lines(tmp_path / "jobs.jsonl", [{"prompt": "a"}])
    (out / "0000-a.json").symlink_to(mine)
    go(Texts(file), out)
    assert mine.read_text() == "mine" and not (out / "0000-a.json").is_symlink()
    (out / "0000-a.json").unlink()
    (out / MANIFEST).unlink()
    (out / MANIFEST).symlink_to(mine)
    go(Texts(file), out)
    assert mine.read_text() == "mine"


def test_a_folder_is_written_by_one_run_at_a_time(tmp_path):
    file = write_lines(tmp_path / "jobs.jsonl", [{"prompt": "a"}])
    (tmp_path / "out").mkdir()
    other = FolderLock(tmp_path / "out")
    other.take()
    with pytest.raises(UsageError, match=f"being written by process {os.getpid()} on "):
        go(Texts(file), tmp_path / "out")
    mate = FolderLock(tmp_path / "out")
    mate.join()  # a process of the same run
    other.release()
    with pytest.raises(UsageError, match="being written by"):
        go(Texts(file), tmp_path / "out")
    mate.release()
    go(Texts(file), tmp_path / "out")
    assert not (tmp_path / "out" / LOCK).exists()


def test_processes_share_all_jobs_and_batches_stay_the_same(tmp_path, monkeypatch):
    """The batches of three processes are those of one, each once."""
    file = write_lines(tmp_path / "jobs.jsonl", [{"prompt": f"p{i}", "steps": 1 + i % 2} for i in range(11)])
    alone = Texts(file)
    go(alone, tmp_path / "alone")
    shared = []
    for number in range(3):
        monkeypatch.setattr(
            job_runner, "Processes", lambda device, number=number: _Pretended(number, 3, tmp_path / "out")
        )
        command = Texts(file)
        go(command, tmp_path / "out")
        assert 2 <= len(command.made) <= 3
        shared += command.made
    assert sorted(shared) == sorted(alone.made)
    merge_manifests(tmp_path / "out", [job.name for job in alone.jobs(tmp_path)])
    assert contents(tmp_path / "out") == contents(tmp_path / "alone") | {LOCK: contents(tmp_path / "out")[LOCK]}


class _Pretended(job_runner.Processes):
    """One after another; what the first finds is kept for the others."""

    plan = None

    def __init__(self, number: int, count: int, folder: Path) -> None:
        self.number, self.count, self.device = number, count, "cpu"
        self._state = self

    def shared(self, value):
        _Pretended.plan = value if self.first else _Pretended.plan
        return _Pretended.plan

    def wait(self) -> None: ...

    def split_between_processes(self, items):
        import contextlib

        size, more = divmod(len(items), self.count)
        start = self.number * size + min(self.number, more)
        return contextlib.nullcontext(items[start : start + size + (self.number < more)])


def test_the_examples_of_the_documentation_are_jobs():
    from trimtab.commands.edit_jobs import KEYS as edit_keys
    from trimtab.commands.generate import JOB_KEYS as generate_keys
    from trimtab.commands.optimize_jobs import JOB_KEYS as optimize_keys
    from trimtab.commands.reconstruct import JOB_KEYS as reconstruct_keys

    page = (ROOT / "docs" / "batches.md").read_text(encoding="utf-8")
    keys = {"generate": generate_keys, "edit": edit_keys, "optimize": optimize_keys, "reconstruct": reconstruct_keys}
    for command, known in keys.items():
        block = re.search(rf"`{command}`:\n\n```jsonl\n(.+?)```", page, re.DOTALL)[1]
        row = re.search(rf"^\| `{command}` \|(.+)\|(.+)\|$", page, re.MULTILINE)
        required = re.findall(r"`(\w+)`", row[1])
        assert sorted(required + re.findall(r"`(\w+)`", row[2])) == sorted(known), command
        for line in block.splitlines():
            check_keys(parsed(line, ""), known, "", required)


def test_processes_of_accelerate(tmp_path):
    """Two on a CPU, and the last job fails: the launcher ends none of them early, and one says how many failed."""
    lines = [{"prompt": f"p{i}", "steps": 1 + i % 3} for i in range(12)]
    file = write_lines(tmp_path / "jobs.jsonl", [*lines, {"prompt": "bad"}])
    script = tmp_path / "run.py"
    script.write_text(RUN)
    launch = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--num_processes", "2"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *launch, "--multi_gpu", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    arguments = [str(ROOT), str(file), str(tmp_path / "two")]
    run = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, timeout=300)
    assert run.stderr.count("FailedJobs: 1 of 13 texts failed") == 1 and run.stdout.count("loaded") == 2, run.stderr
    with pytest.raises(FailedJobs):
        go(Texts(file), tmp_path / "one")
    two = contents(tmp_path / "two")
    assert two.pop(LOCK) and two == contents(tmp_path / "one")


RUN = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tests.commands.test_jobs import Texts, go
go(Texts(sys.argv[2], pause=0.004), Path(sys.argv[3]))
"""


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_any_moment_a_run_goes_on(kills, tmp_path):
    """kill -9, each time at another moment: then all is as in a run that was let be, and nothing was made twice."""
    file = write_lines(tmp_path / "jobs.jsonl", [{"prompt": f"p{i}", "steps": 1 + i % 3} for i in range(12 * kills)])
    go(Texts(file), tmp_path / "undisturbed")
    out, chance, killed, known = tmp_path / "out", random.Random(kills), 0, {}
    while killed <= kills:
        command = [sys.executable, "-c", RUN, str(ROOT), str(file), str(out)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline() == "loaded\n"
            made = []
            if killed < kills:  # at some job, and there at some moment
                made = [process.stdout.readline() for _ in range(chance.randrange(8))]
                time.sleep(chance.uniform(0.0, 0.02))
                process.send_signal(signal.SIGKILL)
            made += process.stdout.read().splitlines()
        assert process.returncode == (-signal.SIGKILL if killed < kills else 0)
        assert not {Path(line.strip()).stem for line in made} & set(known)
        known |= read_manifest(out)
        for path in out.glob("*.json"):
            assert "prompt" in json.loads(path.read_text()), path  # whole, whenever the kill came
        killed += 1
    assert contents(out) == contents(tmp_path / "undisturbed")
