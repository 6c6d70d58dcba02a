"""Files of the field's own formats, as tables: CoNLL columns, SQuAD's JSON, MRQA's JSON lines."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets

from federa.types import FederaError

CONLL = (".conll", ".bio", ".iob", ".iob2", ".txt")


def read_conll(path: Path, what: str) -> Any:
    """Return the sentences of a CoNLL file: columns `tokens` (the first of a line) and `tags` (the last).

    Sentences are parted by blank lines; document marks (`-DOCSTART-`) are skipped. Columns are parted by tabs
    if the file has any, else by spaces.

    Raises:
        FederaError: a line that is not UTF-8, or has one column only; it names the line.
    """
    lines = list(_lines(path, what))
    tabs = any("\t" in line for line in lines)
    sentences: list[tuple[list[str], list[str]]] = [([], [])]
    for number, line in enumerate(lines, 1):
        if not line.strip():
            sentences.append(([], []))
            continue
        if line.startswith("-DOCSTART-") or (tabs and line.startswith("# ") and "\t" not in line):
            continue
        # At spaces alone: a word may hold a no-break space.
        cells = line.split("\t") if tabs else [cell for cell in line.split(" ") if cell]
        if len(cells) < 2 or not cells[0] or not cells[-1].strip():
            raise FederaError(f"{what}: {path}, line {number}: expected a word and its tag, got {line!r}")
        sentences[-1][0].append(cells[0])
        sentences[-1][1].append(cells[-1].strip())
    kept = [pair for pair in sentences if pair[0]]
    if not kept:
        raise FederaError(f"{what}: {path} has no sentences")
    words, tags = zip(*kept, strict=True)
    return datasets.Dataset.from_dict({"tokens": list(words), "tags": list(tags)})


def _lines(path: Path, what: str) -> Iterator[str]:
    """Yield the lines of a file in UTF-8; a line ends at a newline and nowhere else."""
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8").removesuffix("\r")
        except UnicodeDecodeError as error:
            raise not_utf8(path, what, number, error) from error


def not_utf8(path: Path, what: str, line: int, error: UnicodeDecodeError) -> FederaError:
    """Return the error for a line of another encoding."""
    byte = error.object[error.start]
    return FederaError(
        f"{what}: {path}, line {line} is not UTF-8 (byte 0x{byte:02x}); convert the file to UTF-8"
    )


def require_utf8(path: Path, what: str) -> None:
    """Raise at the first line of a text file that is not UTF-8.

    Raises:
        FederaError: there is one; it names the line.
    """
    for _ in _lines(path, what):
        pass


def read_squad(path: Path) -> Any | None:
    """Return the questions of a file in SQuAD's JSON, or None if it is not one.

    Columns: `id`, `title`, `context`, `question`, `answers` (`text` and `answer_start`, lists).
    """
    with path.open(encoding="utf-8-sig") as file:
        start = file.read(4096).lstrip()
    # SQuAD's is one object of `version` and `data`; JSON lines, whatever their name, are many objects.
    if not re.match(r'\{\s*"(version|data)"\s*:', start):
        return None
    try:
        articles = json.loads(path.read_text(encoding="utf-8-sig"))["data"]
        rows = [
            {
                "id": str(question["id"]),
                "title": str(article.get("title", "")),
                "context": paragraph["context"],
                "question": question["question"],
                "answers": {
                    "text": [answer["text"] for answer in question["answers"]],
                    "answer_start": [answer["answer_start"] for answer in question["answers"]],
                },
            }
            for article in articles
            for paragraph in article["paragraphs"]
            for question in paragraph["qas"]
        ]
        return datasets.Dataset.from_list(rows) if rows else None
    except (ValueError, KeyError, TypeError, AttributeError):  # Arrow raises these too, at a mix of types
        return None


def read_mrqa(path: Path, what: str) -> Any | None:
    """Return the questions of a file in MRQA's JSON lines (Fisch et al. 2019), or None if it is not one.

    The first line is a header, each other one a context with its questions. The spans of characters of
    `detected_answers` end with their last character. The columns are those of `read_squad`, and `subset`: the
    header's name of the data set.

    Raises:
        FederaError: a header, and then a line of another form; it names the line.
    """
    rows: list[dict[str, Any]] = []
    number = 1
    with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
        try:
            header = json.loads(file.readline().decode("utf-8-sig"))["header"]
        except (ValueError, KeyError, TypeError, OSError, EOFError, zlib.error):
            return None
        if not isinstance(header, dict):  # a column of that name
            return None
        try:
            for line in file:
                number += 1
                if line.strip():
                    rows += _mrqa_rows(json.loads(line.decode("utf-8")), str(header.get("dataset", "")))
        except UnicodeDecodeError as error:
            raise not_utf8(path, what, number, error) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FederaError(f"{what}: {path}, line {number} is not of MRQA's format") from error
        except (OSError, EOFError, zlib.error) as error:
            raise FederaError(f"{what}: cannot read {path} beyond line {number}: {error}") from error
    if not rows:
        raise FederaError(f"{what}: {path} has no questions")
    return datasets.Dataset.from_list(rows)


def _mrqa_rows(entry: dict[str, Any], subset: str) -> Iterator[dict[str, Any]]:
    context = entry["context"]
    for question in entry["qas"]:
        spans = [span for answer in question["detected_answers"] for span in answer["char_spans"]]
        if not isinstance(context, str) or not isinstance(question["question"], str):
            raise TypeError("a text that is none")
        if not all(0 <= first <= last < len(context) for first, last in spans):
            raise ValueError("a span outside its context")
        yield {
            "id": str(question["qid"]),
            "title": "",
            "subset": subset,
            "context": context,
            "question": question["question"],
            "answers": {
                "text": [context[first : last + 1] for first, last in spans],
                "answer_start": [first for first, _ in spans],
            },
        }
