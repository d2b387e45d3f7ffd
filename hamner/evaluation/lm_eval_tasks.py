"""The benchmarks of lm-evaluation-harness: found, loaded with or without a network, and run.

A task's data set comes from the recipe's mirror if it lies there, else from the hub, or from what
was fetched from there before. Tasks of one's own are YAML files in a folder, as the harness
describes them; paths in them are relative to where one is.
"""

from __future__ import annotations

import contextlib
import io
import os
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from huggingface_hub import HfApi, constants
from lm_eval import evaluator, tasks
from lm_eval.api.group import Group
from lm_eval.config.group import GroupConfig
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.utils import handle_non_serializable

from hamner.errors import UserError, first_line, nearest
from hamner.evaluation.lm_eval_model import HamnerLM
from hamner.hub import is_network_error, prepare_client

DEFAULT_TASKS = ("hellaswag", "arc_easy", "piqa", "lambada_openai", "sciq", "blimp")
HARNESS = Path(tasks.__file__).parent
FOLDERS = ("hellaswag", "arc", "piqa", "lambada", "sciq", "blimp")  # there, that hold them
DRAWS = 1_000  # of the bootstrap, for errors that no formula gives
PROBE_SECONDS = 5
UNREACHABLE = "the hub can't be reached"

Results = dict[str, Any]  # what the harness gives, as plain data


@dataclass
class Loaded:
    """Tasks and groups of tasks that are ready to run, and why others are not."""

    tasks: dict[str, Any] = field(default_factory=dict)
    groups: dict[str, Any] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)  # as they were asked for
    shots: dict[str, int | None] = field(default_factory=dict)  # that a task itself asks for
    problems: dict[str, str] = field(default_factory=dict)  # by name


class Catalogue:
    """The tasks that there are: the harness's, and those of a folder."""

    def __init__(self, folder: Path | None = None):
        self._folder = folder
        self._own = tasks.TaskManager(include_path=folder, include_defaults=False)
        self._manager = self._with_folders([HARNESS / name for name in FOLDERS])
        if folder is not None and not self.own_tasks():
            raise UserError(f"--task-folder {folder}: no YAML file there describes a task")

    def own_tasks(self) -> list[str]:
        """The names of the folder's groups, and of its tasks that are in none."""
        grouped = {part for group in self._own.all_groups for part in self.parts(group)}
        single = [name for name in self._own.all_subtasks if name not in grouped]
        return [*self._own.all_groups, *single]

    def _with_folders(self, folders: Iterable[Path]) -> tasks.TaskManager:
        paths = [*folders, *([self._folder] if self._folder else [])]
        return tasks.TaskManager(include_path=paths, include_defaults=False)

    def check(self, names: Sequence[str]) -> None:
        """Raises UserError for a name that no task, group or tag has."""
        if all(name in self._manager.all_tasks for name in names):
            return
        self._manager = self._with_folders([HARNESS])  # all 14,000 of them: takes seconds
        for name in names:
            if name not in self._manager.all_tasks:
                guess = nearest(name, self._manager.all_tasks)
                own = "" if self._folder else "; for tasks of your own give --task-folder"
                raise UserError(f"--tasks: there is no task {name!r}{guess}{own}")

    def parts(self, name: str) -> list[str]:
        """The single tasks that a name stands for: itself, or what its group or tag holds."""
        entry = self._manager.task_index.get(name)
        if entry is None or (entry.cfg or {}).get("task") == name:
            return [name]
        return self._parts_in((entry.cfg or {}).get("task", sorted(entry.tags)))

    def _parts_in(self, members: Any) -> list[str]:
        """Those in a group's list: of names, or of mappings with a name, or with a list again."""
        if isinstance(members, str):
            return self.parts(members)
        if isinstance(members, dict):
            return self._parts_in(members.get("task") or members.get("group") or [])
        return [part for member in members for part in self._parts_in(member)]

    def data_sets(self, name: str) -> set[str]:
        """What the tasks under a name read, as `datasets` names it."""
        index = self._manager.task_index
        configs = [index[part].cfg or {} for part in self.parts(name) if part in index]
        return {each["dataset_path"] for each in configs if each.get("dataset_path")}

    def load(self, name: str, mirror: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
        """Tasks and groups under a name, by their names, with their data; as the mirror has them.

        Raises whatever `datasets` raises.
        """
        found = self.data_sets(name)
        if mirror is None or len(found) != 1 or not in_mirror(found, mirror):
            loaded = self._manager.load([name])
            return loaded["tasks"], loaded["groups"]
        # The harness takes changes to a task only where a group lists it.
        folder = str(Path(mirror, *found))
        members = [{"task": part, "dataset_path": folder} for part in self.parts(name)]
        made = self._manager.load([{"group": "mirrored", "task": members}])["tasks"]
        if name not in self._manager.all_groups:
            return made, {}
        known = {each.name for each in fields(GroupConfig)}
        config = self._manager.task_index[name].cfg.items()
        group = Group.from_config(GroupConfig(**{k: v for k, v in config if k in known}))
        for task in made.values():
            group.add(task)
        return made, {name: group}


def load_tasks(catalogue: Catalogue, names: Sequence[str], mirror: str | None) -> Loaded:
    """The tasks of these names, each with its data; what can't be loaded is noted.

    Raises:
        UserError: a name that no task has.
    """
    catalogue.check(names)
    prepare_client()
    missing = [name for name in names if not in_mirror(catalogue.data_sets(name), mirror)]
    asked = set().union(*(catalogue.data_sets(name) for name in missing))
    with contextlib.ExitStack() as stack:
        if on_hub(asked) and not hub_answers():
            stack.enter_context(offline())
        loaded = Loaded()
        for name in names:
            try:
                with silence():
                    found, groups = catalogue.load(name, mirror)
            except Exception as error:  # `datasets` and the tasks' own code raise many kinds
                away = is_network_error(error)
                loaded.problems[name] = UNREACHABLE if away else first_line(error)
                continue
            loaded.names.append(name)
            loaded.tasks |= found
            loaded.groups |= groups
            loaded.shots |= {key: each.get_config("num_fewshot") for key, each in found.items()}
    return loaded


def in_mirror(data_sets: Iterable[str], mirror: str | None) -> bool:
    return mirror is not None and all(Path(mirror, path).is_dir() for path in data_sets)


def on_hub(data_sets: Iterable[str]) -> list[str]:
    """Those that name a repository, rather than a file format or a local folder."""
    return [path for path in data_sets if "/" in path and not Path(path).exists()]


def hub_answers() -> bool:
    """Whether the hub can be reached.

    `datasets` would try each data set for 23 seconds before it looks for a copy fetched before.
    """
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        HfApi().dataset_info("allenai/sciq", timeout=PROBE_SECONDS, expand=["sha"])
    except Exception as error:
        return not is_network_error(error)
    return True


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Have `datasets` look at once for what it has fetched before."""
    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """The harness tells of itself, and draws a bar for each of BLiMP's 67 parts."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


@dataclass(frozen=True)
class Setting:
    """How tasks are to be run."""

    shots: int | None = None  # examples before each question; None leaves it to the task, or 0
    limit: int | None = None  # only so many questions of each task
    chat: bool = False  # questions as a user's messages


def run_tasks(lm: HamnerLM, loaded: Loaded, setting: Setting) -> Results:
    """The harness's results for a model, as plain data; its seeds are those of its own command."""
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    torch.manual_seed(DEFAULT_OTHER_SEED)
    os.environ["DISABLE_MULTIPROC"] = "1"  # the bootstrap would fork a process per core
    for name, task in loaded.tasks.items():
        own = loaded.shots[name]
        shots = own if own == 0 or setting.shots is None else setting.shots
        task.set_config(key="num_fewshot", value=shots or 0)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    with silence():
        results = evaluator.evaluate(
            lm,
            {"tasks": loaded.tasks, "groups": loaded.groups},
            limit=setting.limit,
            bootstrap_iters=DRAWS,
            log_samples=False,
            apply_chat_template=setting.chat,
            fewshot_as_multiturn=True,
        )
    return plain(results)


def plain(value: Any) -> Any:
    """What JSON can hold; functions of a task's configuration become text."""
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(each) for each in value]
    if isinstance(value, float):
        return float(value)  # numpy's too
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return plain(handle_non_serializable(value))


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task; the error is a standard error."""

    task: str
    metric: str
    value: float
    error: float | None
    shots: int


def task_scores(results: Results, names: Sequence[str], parts: bool = False) -> list[TaskScore]:
    """What the tasks and groups of these names came to, in their order; of groups also `parts`."""
    found = []
    for name in expanded(results, names, parts):
        for key, value in results["results"][name].items():
            metric, comma, filter_ = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            error = results["results"][name].get(f"{metric}_stderr,{filter_}")
            label = metric if filter_ == "none" else f"{metric} ({filter_})"
            shots = results["n-shot"].get(name, 0)
            known = error if isinstance(error, (int, float)) else None
            found.append(TaskScore(name, label, value, known, shots))
    return found


def expanded(results: Results, names: Sequence[str], parts: bool) -> list[str]:
    """Names that have scores: of a group that has none itself, or of a tag, the tasks in it.

    With `parts`, also the tasks in groups that do have one.
    """
    scored = [name for name, each in results["results"].items() if any("," in key for key in each)]
    summed_up = {
        part
        for group, each in results["group_subtasks"].items()
        if group in scored and not parts
        for part in each
    }
    own = [name for name in names if name in scored]
    return own + [name for name in scored if name not in own and name not in summed_up]
