"""Files of the field's own formats, as tables: CoNLL columns, SQuAD's JSON, MRQA's JSON lines."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import datasets
import pyarrow as pa

from federa.data.normal import normalised
from federa.types import FederaError

_TAG = re.compile(r"O|[A-Z]-.+")
CONLL = (".conll", ".bio", ".iob", ".iob2", ".txt")


def read_conll(path: Path, what: str) -> Any:
    """Return the sentences of a CoNLL file: columns `tokens` (the first of a line) and `tags` (the last).

    Sentences are parted by blank lines; document marks (`-DOCSTART-`) and comments (`# sent_id = 1`) are
    skipped. Columns are parted by tabs if the file has any, else by spaces.

    Raises:
        FederaError: a line that is not UTF-8, or has one column only or another number of them than most; it
            names the line.
    """
    lines = list(_lines(path, what))
    tabs = any("\t" in line for line in lines if not line.startswith("# "))
    usual = next((len(_cells(line, tabs)) for line in lines if line.strip() and line[0] not in "#-"), 2)
    sentences: list[tuple[list[str], list[str]]] = [([], [])]
    widths: dict[int, int] = {}  # the number of columns of every line with a word
    for number, line in enumerate(lines, 1):
        if not line.strip():
            sentences.append(([], []))
            continue
        if line.startswith("-DOCSTART-") or (tabs and line.startswith("# ") and "\t" not in line):
            continue
        cells = _cells(line, tabs)
        # Before a sentence; its words may well be "#".
        odd = len(cells) != usual or cells[2:3] == ["="] or not _TAG.fullmatch(cells[-1].strip())
        if line.startswith("# ") and odd and not sentences[-1][0]:
            continue
        if len(cells) < 2 or not cells[0] or not cells[-1].strip():
            raise FederaError(f"{what}: {path}, line {number}: expected a word and its tag, got {line!r}")
        widths[number] = len(cells)
        sentences[-1][0].append(cells[0])
        sentences[-1][1].append(cells[-1].strip())
    kept = [pair for pair in sentences if pair[0]]
    if not kept:
        raise FederaError(f"{what}: {path} has no sentences")
    # A word too many, or a tag too few, would be read as another column.
    most = Counter(widths.values()).most_common(1)[0][0]
    odd_line = next((number for number, width in widths.items() if width != most), None)
    if odd_line is not None:
        raise FederaError(
            f"{what}: {path}, line {odd_line}: {widths[odd_line]} columns, where most lines have {most}: "
            f"{lines[odd_line - 1]!r}"
        )
    words, tags = zip(*kept, strict=True)
    return datasets.Dataset.from_dict({"tokens": list(words), "tags": list(tags)})


def _cells(line: str, tabs: bool) -> list[str]:
    """Return the columns of a line; at spaces alone, for a word may hold a no-break space."""
    return line.split("\t") if tabs else [cell for cell in line.split(" ") if cell]


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


def require_utf8_cells(table: Any, path: Path, what: str) -> None:
    """Raise at the first text of a Parquet file that is not UTF-8: Arrow looks at it when it is used.

    Raises:
        FederaError: there is one; it names the row.
    """
    try:
        table.data.table.validate(full=True)
    except pa.ArrowInvalid:
        for column in table.column_names:
            cells = table.data.table.column(column)
            for row in range(len(table)):
                try:
                    cells[row].as_py()
                except UnicodeDecodeError as error:
                    byte = error.object[error.start]
                    raise FederaError(
                        f"{what}: {path}, row {row}: column {column!r} is not UTF-8 (byte 0x{byte:02x}); "
                        "write the file's texts as UTF-8"
                    ) from error


def _opened(path: Path) -> IO[bytes]:
    return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")  # type: ignore[return-value]


def read_squad(path: Path, what: str) -> Any | None:
    """Return the questions of a file in SQuAD's JSON, or None if it is not one.

    Columns: `id`, `title`, `context`, `question`, `answers` (`text` and `answer_start`, lists).

    Raises:
        FederaError: articles with paragraphs, and then what SQuAD does not have; it names the place.
    """
    try:
        with _opened(path) as file:
            # SQuAD's is one object with `data`; JSON lines, whatever their name, are many objects.
            articles = json.loads(file.read().decode("utf-8-sig"))["data"]
        nested = any("paragraphs" in article for article in articles if isinstance(article, dict))
    except (ValueError, KeyError, TypeError, OSError, EOFError, zlib.error):
        return None
    if not nested:
        return None
    rows = list(_squad_rows(articles, f"{what}: {path}: "))
    if not rows:
        raise FederaError(f"{what}: {path} has no questions")
    return _table(rows, f"{what}: {path}")


def _table(rows: list[dict[str, Any]], file: str) -> Any:
    """Return rows as a table.

    Raises:
        FederaError: half a surrogate pair, which JSON can say and UTF-8 cannot hold; it names the question.
    """
    try:
        return datasets.Dataset.from_list(rows)
    except UnicodeEncodeError as error:
        for number, row in enumerate(rows, 1):
            try:
                json.dumps(row, ensure_ascii=False).encode()
            except UnicodeEncodeError as half:
                shown = half.object[half.start].encode("ascii", "backslashreplace").decode()
                raise FederaError(
                    f"{file}, question {number} ({row['id']!r}): {shown} is half a character; "
                    "write the text anew"
                ) from error
        raise


def _squad_rows(articles: list[Any], file: str) -> Iterator[dict[str, Any]]:
    for a, article in enumerate(articles):
        at = f"{file}data[{a}]"
        for p, paragraph in enumerate(_part(article, "paragraphs", list, at)):
            of = f"{at}.paragraphs[{p}]"
            context = _part(paragraph, "context", str, of)
            for q, question in enumerate(_part(paragraph, "qas", list, of)):
                here = f"{of}.qas[{q}]"
                answers = _part(question, "answers", list, here)
                places = [f"{here}.answers[{i}]" for i in range(len(answers))]
                yield {
                    "id": str(question.get("id", "")),
                    "title": str(article.get("title", "")),
                    "context": context,
                    "question": _part(question, "question", str, here),
                    "answers": {
                        "text": [
                            _part(one, "text", str, place) for one, place in zip(answers, places, strict=True)
                        ],
                        "answer_start": [
                            _part(one, "answer_start", int, place)
                            for one, place in zip(answers, places, strict=True)
                        ],
                    },
                }


def _part(holder: Any, key: str, kind: type, where: str) -> Any:
    """Return what stands under a key.

    Raises:
        FederaError: nothing does, or something of another kind.
    """
    if not isinstance(holder, dict) or key not in holder:
        raise FederaError(f"{where} has no {key!r}")
    if not isinstance(holder[key], kind):
        name = {str: "a text", int: "a whole number", list: "a list"}[kind]
        raise FederaError(f"{where}.{key} is {holder[key]!r:.40}, not {name}")
    return holder[key]


def read_mrqa(path: Path, what: str) -> Any | None:
    """Return the questions of a file in MRQA's JSON lines (Fisch et al. 2019), or None if it is not one.

    The first line is a header, each other one a context with its questions, or the next data set's header:
    files one after the other are one file. The columns are those of `read_squad`, and `subset`: the header's
    name of the data set.

    Gold, to train on and to score by, is what stands at the spans of `detected_answers`, whose ends are their
    last characters. `answers`, which the official script scores by and which may hold forms that the context
    does not, is not read.

    Raises:
        FederaError: a header, and then a line of another form, or an answer that is not at its span; it names
            the line.
    """
    rows: list[dict[str, Any]] = []
    number = 1
    with _opened(path) as file:
        try:
            header = json.loads(file.readline().decode("utf-8-sig"))["header"]
        except (ValueError, KeyError, TypeError, OSError, EOFError, zlib.error):
            return None
        if not isinstance(header, dict):  # a column of that name
            return None
        try:
            for line in file:
                number += 1
                if not line.strip():
                    continue
                entry = json.loads(line.decode("utf-8"))
                if "header" in entry and "context" not in entry:
                    header = entry["header"]
                else:
                    rows += _mrqa_rows(entry, str(header.get("dataset", "")))
        except UnicodeDecodeError as error:
            raise not_utf8(path, what, number, error) from error
        except FederaError as error:
            raise FederaError(f"{what}: {path}, line {number}: {error}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FederaError(f"{what}: {path}, line {number} is not of MRQA's format") from error
        except (OSError, EOFError, zlib.error) as error:
            raise FederaError(f"{what}: cannot read {path} beyond line {number}: {error}") from error
    if not rows:
        raise FederaError(f"{what}: {path} has no questions")
    return _table(rows, f"{what}: {path}")


def _mrqa_rows(entry: dict[str, Any], subset: str) -> Iterator[dict[str, Any]]:
    context = entry["context"]
    for question in entry["qas"]:
        found = [(a.get("text"), span) for a in question["detected_answers"] for span in a["char_spans"]]
        spans = [span for _, span in found]
        if not isinstance(context, str) or not isinstance(question["question"], str):
            raise TypeError("a text that is none")
        if not all(0 <= first <= last < len(context) for first, last in spans):
            raise ValueError("a span outside its context")
        for text, (first, last) in found:
            _require_there(text, context, first, last)
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


def _require_there(text: str | None, context: str, first: int, last: int) -> None:
    """Raise unless an answer is what its span holds, but for what SQuAD's measures do not see.

    Raises:
        FederaError: it is not; or only because the end is taken to be the character after the last.
    """
    there = context[first : last + 1]
    if text is None or text == there:
        return
    if normalised(text) != normalised(there) or text == context[first:last]:
        raise FederaError(
            f"the answer {text!r} is not at [{first}, {last}] (an end is the last character); there stands "
            f"{there!r}"
        )


def require_closed_quotes(table: Any, where: str) -> None:
    """Raise where a quote swallowed ends of cells and lines: many TSV files are written without quoting."""
    for name, column in table.to_dict().items():
        for row, cell in enumerate(column):
            if isinstance(cell, str) and "\t" in cell and "\n" in cell:
                raise FederaError(
                    f"{where}: row {row}: column {name!r} goes over several lines from a quote that is not "
                    "closed; double the quotes inside of cells, or give CSV, JSON lines or Parquet"
                )
