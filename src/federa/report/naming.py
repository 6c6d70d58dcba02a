"""Runs in words: what ran, what several runs share, and what tells them apart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath

from federa.report.load import RunRecord, flatten, is_number, number
from federa.report.words import NONE, capital, listing, plural

METHODS = {
    "federa": "FeDeRA",
    "lora": "LoRA",
    "adapter": "adapters",
    "bitfit": "BitFit",
    "ft": "full fine-tuning",
}
TASKS = {"ner": "named entity recognition", "qa": "question answering"}
_LABEL_FIRST = ("method.rank", "model.name", "partition.alpha", "partition.clients", "seed")
_SHORT = {"partition.alpha": "α", "partition.name": "split", "aggregator.name": "aggregator"}


def method_words(run: RunRecord) -> str:
    """Return the method's name as its authors write it."""
    name = str(run.setting("method.name") or run.folder.resolve().name)
    return METHODS.get(name, name)


def model_words(run: RunRecord) -> str:
    """Return the model's name without the folder or owner before it."""
    return PurePath(str(run.setting("model.name") or "a language model")).name


def facts(run: RunRecord) -> list[str]:
    """Return what ran, one phrase each, in reading order."""
    task = str(run.setting("task.name") or "")
    train = run.setting("data.train") or run.setting("data.name")
    stated, rounds = number(run.setting("partition.clients")), number(run.setting("rounds"))
    clients = int(stated) if stated else len(run.sizes)
    cohort = run.setting("cohort")
    said = [f"rank {run.setting('method.rank')}" if run.setting("method.rank") is not None else ""]
    said.append(f"{TASKS.get(task, task)} on {PurePath(str(train)).name if train else 'the embedded data'}")
    said.append(plural(clients, "client") + (f", {cohort} a round" if cohort else "") if clients else "")
    said.append(skew_words(run))
    said.append(plural(int(rounds), "round") if rounds else "")
    said.append(f"seed {run.setting('seed')}" if run.setting("seed") is not None else "")
    return [phrase for phrase in said if phrase]


def skew_words(run: RunRecord) -> str:
    """Return how the examples were spread over the clients."""
    name, alpha = run.setting("partition.name"), run.setting("partition.alpha")
    if name is None:
        return ""
    if str(name).lower() == "iid":
        return "examples spread evenly"
    word = str(name).replace("_", " ")
    return capital(word) + " skew" + (f", α = {alpha:g}" if is_number(alpha) else "")


def headline(runs: Sequence[RunRecord]) -> tuple[str, str]:
    """Return the page's title and the sentence below it: what the runs share."""
    methods = list(dict.fromkeys(map(method_words, runs)))
    models = list(dict.fromkeys(map(model_words, runs)))
    if len(runs) == 1:
        title = f"{methods[0]} on {models[0]}"
    else:
        who = f"{listing(methods)} compared" if len(methods) > 1 else f"{len(runs)} runs of {methods[0]}"
        title = f"{who} on {listing(models)}" if len(models) <= 2 else who
    shared = [phrase for phrase in facts(runs[0]) if all(phrase in facts(run) for run in runs)]
    sentence = " · ".join(shared)
    return capital(title), capital(sentence)


def differing(runs: Sequence[RunRecord]) -> dict[str, list[str]]:
    """Return the recipe keys whose values differ, each with one value a run."""
    flat = [dict(flatten(run.config)) for run in runs]
    keys = dict.fromkeys(key for leaves in flat for key in leaves)
    values = {key: [str(leaves[key]) if key in leaves else NONE for leaves in flat] for key in keys}
    return {key: row for key, row in values.items() if len(set(row)) > 1}


def labels(runs: Sequence[RunRecord]) -> list[str]:
    """Return a short name for each run: the method, and the fewest settings that tell the runs apart."""
    unlike = differing(runs)
    names = [method_words(run) for run in runs]
    for key in (*_LABEL_FIRST, *(key for key in unlike if key not in _LABEL_FIRST)):
        if key not in unlike or len(set(names)) == len(runs):
            continue
        longer = [
            f"{name} · {_setting_words(key, value)}" for name, value in zip(names, unlike[key], strict=True)
        ]
        names = longer if len(set(longer)) > len(set(names)) else names
    if len(set(names)) < len(runs):
        names = [f"{name} · {run.folder.resolve().name}" for name, run in zip(names, runs, strict=True)]
    return names


def _setting_words(key: str, value: str) -> str:
    if key == "model.name":
        return PurePath(value).name
    return f"{_SHORT.get(key, key.rpartition('.')[2])} {value}"
