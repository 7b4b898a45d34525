"""Building a world: tasks written here, base and adapters trained in two worker processes, all renamed into place."""

import json
import os
import queue
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from lora_cli.errors import OutputError
from lora_cli.outputs import whole_folder
from lora_cli.records import Progress, silent
from lora_cli.world.layout import PoolAdapter, Size, Target, World
from lora_cli.world.pool import POOLS, Recipe
from lora_cli.world.tasks import STRING_LENGTH, examples, file_name, write_jsonl

MARKER = "world.json"
FORMAT = 1
WORKERS = 2
TRAIN_EXAMPLES = 100
TEST_EXAMPLES: dict[Size, int] = {"small": 200, "test": 100}
TARGETS: dict[Size, tuple[str, ...]] = {
    "small": ("descend", "cond", "part", "median", "sort|shift-two", "swap|shift-four"),
    "test": ("outer", "part"),
}
"""The main target comes first. The base is not trained on these chains, but answers a part of them."""

WORKER_ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "MKL_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONWARNINGS": "ignore",
    "TOKENIZERS_PARALLELISM": "false",
}
# The child gets this process's sys.path, as with multiprocessing, but does not run the main module again.
WORKER_COMMAND = "import json, sys; sys.path = json.loads(sys.argv[1]); from lora_cli.world.worker import main; main()"


def build(folder: Path, *, size: Size, seed: int = 0, progress: Progress = silent) -> World:
    """Build a world in `folder`, whole or not at all, and return it.

    The same size and seed give the same bytes on one machine. A world that the folder already holds is returned
    unchanged. Nothing is downloaded. "small" takes about two minutes on two cores, "test" a quarter of a minute.

    Raises:
        OutputError: `folder` holds something else, or cannot be written.
    """
    folder = folder.absolute()
    try:
        if (folder / MARKER).is_file():
            return _same(load(folder), size, seed)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise OutputError(f"{folder} exists and is not empty", hint="name a folder that does not exist yet")
        if folder.exists() and folder.samefile(Path.cwd()):
            raise OutputError(f"{folder} is the current folder", hint="name a folder that does not exist yet")
        with whole_folder(folder, replace=True) as partial:
            _build(partial, size, seed, progress)
    except OSError as error:
        raise OutputError(f"{folder} cannot be written: {error.strerror or error}") from error
    return load(folder)


def load(folder: Path) -> World:
    """The world that was built in `folder`.

    Raises:
        OutputError: the folder holds no world of this version.
    """
    folder = folder.absolute()
    try:
        record = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        if record.pop("format") != FORMAT:
            raise OutputError(f"{folder} holds a world of another version", hint="name another folder")
        adapters = tuple(
            PoolAdapter(**adapter | {"target_modules": tuple(adapter["target_modules"])})
            for adapter in record.pop("adapters")
        )
        targets = tuple(
            Target(
                name=target["name"],
                kind=target["kind"],
                train=folder / target["train"],
                test=folder / target["test"],
                relevant=tuple(target["relevant"]),
            )
            for target in record.pop("targets")
        )
        return World(folder=folder, adapters=adapters, targets=targets, **record)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise OutputError(f"{folder / MARKER} cannot be read", hint="name another folder") from error


def _same(world: World, size: Size, seed: int) -> World:
    if (world.size, world.seed) != (size, seed):
        raise OutputError(
            f"{world.folder} holds the world of size {world.size} and seed {world.seed}", hint="name another folder"
        )
    return world


def _build(folder: Path, size: Size, seed: int, progress: Progress) -> None:
    recipes = POOLS[size].recipes
    base_name = f"lora-demo/tiny-llama-{size}"
    held_out = _write_tasks(folder, size, seed)
    adapters: dict[str, PoolAdapter] = {}
    with _workers(folder) as workers:
        common = {"size": size, "seed": seed}
        workers[0].ask({"do": "base", **common}, lambda step, steps: progress("training the base model", step, steps))
        free: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in workers:
            free.put(worker)

        def make(recipe: Recipe) -> PoolAdapter:
            worker = free.get()
            try:
                job = {"do": "adapter", "name": recipe.name, "base_name": base_name, **common}
                before, after = worker.ask({**job, "exclude": held_out.get(recipe.task, [])})
            finally:
                free.put(worker)
            return PoolAdapter(
                name=recipe.name,
                task=recipe.task,
                rank=recipe.rank,
                target_modules=recipe.targets,
                exact_match=after,
                base_exact_match=before,
                problem=recipe.flaw,
            )

        with ThreadPoolExecutor(len(workers)) as threads:
            try:
                made = [threads.submit(make, recipe) for recipe in recipes]
                for done, future in enumerate(as_completed(made), start=1):
                    adapters[future.result().name] = future.result()
                    progress("training the adapters", done, len(made))
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                for worker in workers:
                    worker.stop()
                raise
    _write_settings(folder, size, seed, base_name, [adapters[recipe.name] for recipe in recipes])


def _write_tasks(folder: Path, size: Size, seed: int) -> dict[str, list[str]]:
    """Write the targets' data; return each target's test prompts, which no adapter may see in training."""
    held_out: dict[str, list[str]] = {}
    (folder / "tasks").mkdir()
    for task in TARGETS[size]:
        rng = random.Random(f"task {task} {seed}")
        rows = examples(task, STRING_LENGTH[size], TRAIN_EXAMPLES + TEST_EXAMPLES[size], rng)
        name, train, test = file_name(task), rows[:TRAIN_EXAMPLES], rows[TRAIN_EXAMPLES:]
        write_jsonl(folder / "tasks" / f"{name}.train.jsonl", name, "train", train)
        write_jsonl(folder / "tasks" / f"{name}.test.jsonl", name, "test", test)
        held_out[task] = [prompt for prompt, _ in test]
    return held_out


def _write_settings(folder: Path, size: Size, seed: int, base_name: str, adapters: list[PoolAdapter]) -> None:
    targets: list[dict[str, Any]] = []
    for task in TARGETS[size]:
        relevant = [adapter.name for adapter in adapters if adapter.task == task and not adapter.problem]
        name = file_name(task)
        targets.append(
            {
                "name": name,
                "kind": "relevant" if relevant else "none",
                "train": f"tasks/{name}.train.jsonl",
                "test": f"tasks/{name}.test.jsonl",
                "relevant": relevant,
            }
        )
    shutil.copyfile(folder / targets[0]["train"], folder / "task.jsonl")
    settings = {
        "base": "base",
        "base_aliases": [base_name],
        "pool": "pool",
        "db": "lora.db",
        "data": "task.jsonl",
        "test": targets[0]["test"],
    }
    # Plain ASCII strings and lists of them read the same in TOML and in JSON.
    lines = [
        "# Settings of `lora` in this folder.",
        *(f"{key} = {json.dumps(value)}" for key, value in settings.items()),
    ]
    (folder / "lora.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    marker = {
        "format": FORMAT,
        "size": size,
        "seed": seed,
        "base_name": base_name,
        "adapters": [asdict(adapter) for adapter in adapters],
        "targets": targets,
    }
    (folder / MARKER).write_text(json.dumps(marker, indent=1) + "\n", encoding="utf-8")


class _Worker:
    """One training process. Its stderr is kept in a file and shown only if it fails."""

    def __init__(self, process: subprocess.Popen[str], stderr: IO[bytes]) -> None:
        self.process, self.stderr = process, stderr

    def ask(self, job: Mapping[str, object], report: Callable[[int, int], None] | None = None) -> Any:
        """Run one job and return its result."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(job) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise self._death() from None
        for line in self.process.stdout:
            answer = json.loads(line)
            if "failed" in answer:
                raise OSError(answer["failed"])
            if "done" in answer:
                return answer["done"]
            if report is not None:
                report(answer["step"], answer["steps"])
        raise self._death()

    def stop(self) -> None:
        """End the process now."""
        self.process.kill()
        assert self.process.stdin is not None
        # The buffer may hold a job that a dead process never read.
        with suppress(BrokenPipeError):
            self.process.stdin.close()

    def _death(self) -> RuntimeError:
        self.process.wait()
        self.stderr.seek(0)
        said = self.stderr.read().decode(errors="replace")
        return RuntimeError(f"a training process ended with status {self.process.returncode}:\n{said[-4000:]}")


@contextmanager
def _workers(folder: Path) -> Iterator[list[_Worker]]:
    """Training processes in the world's folder. The second imports its libraries while the first trains the base."""
    places = json.dumps([str(Path(place).absolute()) for place in sys.path])
    with ExitStack() as stack:
        workers = []
        for _ in range(WORKERS):
            stderr = stack.enter_context(tempfile.TemporaryFile())
            process = stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-P", "-c", WORKER_COMMAND, places],
                    cwd=folder,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=stderr,
                    encoding="utf-8",
                    env={**os.environ, **WORKER_ENVIRONMENT},
                )
            )
            workers.append(_Worker(process, stderr))
            stack.callback(workers[-1].stop)
        yield workers
