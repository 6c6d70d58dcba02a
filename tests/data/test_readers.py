"""CoNLL columns, SQuAD's JSON and MRQA's JSON lines: the same rows whatever the file, and the line that is wrong."""

import gzip
import json

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import transformers

from federa.data.datasets import DataConfig, read_splits, read_table
from federa.tasks import NER, QA
from federa.types import FederaError

SENTENCES = [
    {"tokens": ["Ann", "lives", "in", "New", "York"], "tags": ["B-PER", "O", "O", "B-LOC", "I-LOC"]},
    {"tokens": ["né", "👩\u200d🚀"], "tags": ["O", "B-PER"]},
]
TEXT = "".join(
    "".join(f"{w} {t}\n" for w, t in zip(one["tokens"], one["tags"], strict=True)) + "\n" for one in SENTENCES
)


@pytest.fixture(autouse=True)
def _quiet():
    datasets.disable_progress_bars()


def read(folder, name, content):
    """Write a file and read it."""
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_table(str(path), "data.train")


def refused(message, folder, name, content):
    with pytest.raises(FederaError, match=message) as error:
        read(folder, name, content)
    assert "\n" not in str(error.value)


# CoNLL


@pytest.mark.parametrize(
    "content",
    [
        TEXT,
        TEXT.rstrip("\n"),
        TEXT.replace(" ", "\t"),
        TEXT.replace("\n", "\r\n"),
        "\n\n" + TEXT.replace("\n\n", "\n\n \n\n"),
        "\ufeff" + TEXT,
        "-DOCSTART- -X- -X- O\n\n" + TEXT,
        "-DOCSTART-\tO\n\n" + TEXT.replace(" ", "\t"),
        TEXT.replace(" ", " NNP B-NP "),
        TEXT.replace(" ", "\t_\t_\t"),
        TEXT.replace(" ", "   "),
        "# id 7\n" + TEXT.replace(" ", "\t").replace("\n\n", "\n\n# id 8\n"),
        TEXT.replace("\n", " \n"),
        "# newdoc id = d\n# sent_id = 1\n" + TEXT.replace("\n\n", "\n\n# text = né 👩\u200d🚀\n"),
        "# sent_id = 1\n" + TEXT.replace(" ", " NNP B-NP "),
        "# id 5dc0 domain=train\n" + TEXT,
        "# id 5dc0 domain=train\n" + TEXT.replace(" ", " _ _ "),
        "# id\t5dc0 domain=train\n" + TEXT,
        "# id\t5dc0\n" + TEXT.replace(" ", "\t"),
    ],
    ids=range(19),
)
def test_conll(tmp_path, content):
    assert read(tmp_path, "rows.conll", content).to_list() == SENTENCES


@pytest.mark.parametrize("ending", [".conll", ".bio", ".iob", ".iob2", ".txt", ".CONLL"])
def test_every_ending_of_conll(tmp_path, ending):
    assert read(tmp_path, f"rows{ending}", TEXT).to_list() == SENTENCES


def test_a_word_may_hold_any_space_but_a_plain_one(tmp_path):
    words = ["10\u00a0000", "x\u2028y", "\u00a0", "a\x85b", "c\x0cd", "#", "#x"]
    rows = [{"tokens": words, "tags": ["O"] * len(words)}]
    for gap in " \t":
        assert read(tmp_path, "rows.conll", "".join(f"{word}{gap}O\n" for word in words)).to_list() == rows
    assert read(tmp_path, "rows.conll", "New York\tB-LOC\n# 1\tO\n").to_list() == [
        {"tokens": ["New York", "# 1"], "tags": ["B-LOC", "O"]}
    ]


def test_a_word_that_begins_as_a_comment_does_is_a_word(tmp_path):
    rows = [{"tokens": ["#", "1", "#"], "tags": ["B-X", "I-X", "O"]}]
    assert read(tmp_path, "rows.conll", "# B-X\n1 I-X\n# O\n").to_list() == rows
    assert read(tmp_path, "rows.conll", "# SYM B-X\n1 CD I-X\n# SYM O\n").to_list() == rows
    assert read(tmp_path, "rows.conll", "1 CD B-X\n# SYM O\n").to_list() == [
        {"tokens": ["1", "#"], "tags": ["B-X", "O"]}
    ], "within a sentence there is no comment"


@pytest.mark.parametrize(
    ("content", "line"),
    [("Ann B-PER\nNew York B-LOC\n\nBob B-PER\n", 2), ("A DT B-NP O\n\nWest NNP B-NP\nend NN I-NP O\n", 3)],
)
def test_a_line_of_another_number_of_columns_is_named(tmp_path, content, line):
    """A word that lacks, and a tag that lacks: read on, each would be another column's."""
    with pytest.raises(FederaError, match=rf"line {line}: 3 columns, where most lines have [24]"):
        read(tmp_path, "rows.conll", content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a O\nb\nc O\n", r"^data\.train: .*rows\.conll, line 2: expected a word and its tag, got 'b'$"),
        ("a\tO\nb O\n", r"line 2: expected a word and its tag, got 'b O'$"),
        ("a\tO\n\tO\n", r"line 2: expected a word and its tag, got '\\tO'$"),
        ("a\tO\nb\t\n", r"line 2: expected a word and its tag, got 'b\\t'$"),
        ("", r"^data\.train: .*rows\.conll has no sentences$"),
        ("\n\n  \n", r"has no sentences$"),
        ("-DOCSTART- O\n", r"has no sentences$"),
        (
            b"a O\n\nb O\ncaf\xe9 O\n",
            r"^data\.train: .*rows\.conll, line 4 is not UTF-8 \(byte 0xe9\); convert the file to UTF-8$",
        ),
        ("a O\n".encode("utf-16"), r"line 1 is not UTF-8 \(byte 0xff\)"),
    ],
)
def test_the_line_that_is_wrong(tmp_path, content, message):
    refused(message, tmp_path, "rows.conll", content)


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("rows.csv", b"text,label\nfine,a\ncaf\xe9,b\n", 3),
        ("rows.tsv", b"text\tlabel\ncaf\xe9\tb\n", 2),
        ("rows.jsonl", b'{"text": "fine"}\n{"text": "caf\xe9"}\n', 2),
        ("rows.json", b'{"version": "1.1",\n "data": [],\n "x": "\xe9"}', 3),
    ],
)
def test_a_line_of_another_encoding_is_named(tmp_path, name, content, line):
    refused(rf"{name}, line {line} is not UTF-8 \(byte 0xe9\); convert", tmp_path, name, content)


def test_parquet_holds_the_same_sentences(tmp_path):
    datasets.Dataset.from_list(SENTENCES).to_parquet(str(tmp_path / "rows.parquet"))
    assert read_table(str(tmp_path / "rows.parquet"), "data.train").to_list() == SENTENCES


def test_parquet_of_another_encoding(tmp_path):
    """Arrow does not look into what is called a text, so another program may have written anything."""
    latin = pa.array([b"fine", None, b"caf\xe9"]).view(pa.string())
    ends = pa.array([0, 1, 1, 3], pa.int32())
    for held in (latin, pa.ListArray.from_arrays(ends, latin), pa.StructArray.from_arrays([latin], ["text"])):
        pq.write_table(pa.table({"label": ["a", "b", "c"], "held": held}), tmp_path / "rows.parquet")
        with pytest.raises(
            FederaError,
            match=r"^data\.train: .*rows\.parquet, row 2: column 'held' is not UTF-8 \(byte 0xe9\); ",
        ):
            read_table(str(tmp_path / "rows.parquet"), "data.train")


def test_a_folder_of_conll(tmp_path, encoder):
    for name in ("train", "validation", "test"):
        (tmp_path / f"{name}.txt").write_text(TEXT + f"{name} O\n")
    config = DataConfig(train=str(tmp_path), evaluate_on="validation")
    splits = read_splits(config, NER())
    assert splits.train[2] == {"tokens": ["train"], "tags": ["O"]}
    assert splits.evaluation[2]["tokens"] == ["validation"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(encoder("bert"))
    encoded = NER().encode(splits.train, config, tokenizer, NER().labels(splits.train, config))
    assert encoded.num_examples == 3


# Questions

CONTEXT = "Ann lives in Paris 🗼, and Bob in Lyon."
ROWS = [
    {
        "id": "1",
        "title": "Towns",
        "context": CONTEXT,
        "question": "Where does Ann live?",
        "answers": {"text": ["Paris", "in Paris 🗼"], "answer_start": [13, 10]},
    },
    {
        "id": "q2",
        "title": "Towns",
        "context": CONTEXT,
        "question": "Where does Bob live?",
        "answers": {"text": ["Lyon"], "answer_start": [33]},
    },
    {
        "id": "3",
        "title": "Rivers",
        "context": "The Seine",
        "question": "Which?",
        "answers": {"text": ["Seine"], "answer_start": [4]},
    },
]


def squad(rows=ROWS, **extra):
    """Return rows as SQuAD nests them."""
    articles = {}
    for row in rows:
        pairs = zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True)
        answers = [{"answer_start": start, "text": text} for text, start in pairs]
        number = int(row["id"]) if row["id"].isdigit() else row["id"]
        question = {"answers": answers, "question": row["question"], "id": number}
        articles.setdefault(row["title"], {}).setdefault(row["context"], []).append(question)
    data = [
        {"title": title, "paragraphs": [{"context": c, "qas": qas} for c, qas in paragraphs.items()]}
        for title, paragraphs in articles.items()
    ]
    return {"data": data, **extra}


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("first", ["data", "version", "name"])
def test_squad(tmp_path, indent, first):
    content = squad() if first == "data" else {first: "1.1", **squad()}
    for text in (json.dumps(content, indent=indent), json.dumps(content, indent=indent, ensure_ascii=False)):
        assert read(tmp_path, "dev-v1.1.json", text).to_list() == ROWS
        assert read(tmp_path, "dev-v1.1.json", "\ufeff" + text).to_list() == ROWS
        assert read(tmp_path, "dev-v1.1.json.gz", gzip.compress(text.encode())).to_list() == ROWS


def test_squad_without_titles(tmp_path):
    content = squad()
    for article in content["data"]:
        del article["title"]
    table = read(tmp_path, "dev.json", json.dumps(content))
    assert set(table["title"]) == {""} and list(table["question"]) == [row["question"] for row in ROWS]


def test_unanswerable_questions_are_named_by_the_task(tmp_path):
    rows = [*ROWS, {**ROWS[2], "id": "4", "answers": {"text": [], "answer_start": []}}]
    table = read(tmp_path, "dev-v2.0.json", json.dumps(squad(rows, version="v2.0")))
    with pytest.raises(FederaError, match=r"^data: row 3: no answer; unanswerable questions are not"):
        QA().texts(table, DataConfig())


@pytest.mark.parametrize(
    "content",
    [
        '{"data": "x", "label": 1}\n{"data": "y", "label": 2}\n',
        '{"version": 1, "data": "x"}\n{"version": 2, "data": "y"}\n',
        '{"data": "x", "label": 1}\n',
        '{"data": ["x"]}\n{"data": ["y"]}\n',
    ],
)
def test_json_lines_that_look_like_squad(tmp_path, content):
    rows = [json.loads(line) for line in content.splitlines()]
    assert read(tmp_path, "rows.jsonl", content).to_list() == rows


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda one: one["paragraphs"][0].pop("context"), r"data\[0\]\.paragraphs\[0\] has no 'context'$"),
        (
            lambda one: one["paragraphs"][0].update(context=None),
            r"paragraphs\[0\]\.context is None, not a text$",
        ),
        (lambda one: one["paragraphs"][0].pop("qas"), r"data\[0\]\.paragraphs\[0\] has no 'qas'$"),
        (lambda one: one.update(paragraphs=None), r"data\[0\]\.paragraphs is None, not a list$"),
        (lambda one: second(one).pop("question"), r"data\[0\]\.paragraphs\[0\]\.qas\[1\] has no 'question'$"),
        (lambda one: second(one).pop("answers"), r"data\[0\]\.paragraphs\[0\]\.qas\[1\] has no 'answers'$"),
        (lambda one: second(one).update(answers=["x"]), r"\.qas\[1\]\.answers\[0\] has no 'text'$"),
        (
            lambda one: second(one)["answers"][0].update(answer_start="33"),
            r"\.qas\[1\]\.answers\[0\]\.answer_start is '33', not a whole number$",
        ),
        (
            lambda one: second(one)["answers"][0].update(text=["x"]),
            r"answers\[0\]\.text is \['x'\], not a text$",
        ),
        (lambda one: one["paragraphs"].append("x"), r"data\[0\]\.paragraphs\[1\] has no 'context'$"),
    ],
)
def test_the_place_that_is_not_squads(tmp_path, spoil, message):
    content = squad(version="1.1")
    spoil(content["data"][0])
    refused(rf"^data\.train: .*dev\.json: .*{message}", tmp_path, "dev.json", json.dumps(content))


def second(article):
    """The second question of an article."""
    return article["paragraphs"][0]["qas"][1]


def test_squad_without_questions(tmp_path):
    content = '{"version": "1.1", "data": [{"title": "T", "paragraphs": []}]}'
    refused(r"^data\.train: .*dev\.json has no questions$", tmp_path, "dev.json", content)


def test_of_compressed_files_only_json(tmp_path):
    for name in ("x.csv.gz", "x.gz", "train.parquet.GZ"):
        refused(
            rf"^data\.train: .*{name}: compressed, only \.jsonl\.gz and \.json\.gz are read; unpack it$",
            tmp_path,
            name,
            gzip.compress(b"text,label\na,b\n"),
        )


# MRQA

MRQA = [{**row, "title": "", "subset": "NewsQA"} for row in ROWS]


def mrqa(header=None):
    """Return the rows as MRQA's lines: characters of an answer with its last one."""
    lines = [{"header": header or {"dataset": "NewsQA", "split": "train"}}]
    for some in (ROWS[:2], ROWS[2:]):
        qas = []
        for row in some:
            answers = zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True)
            detected = [
                {"text": t, "char_spans": [[s, s + len(t) - 1]], "token_spans": [[0, 0]]} for t, s in answers
            ]
            qas.append(
                {"qid": row["id"], "question": row["question"], "answers": [], "detected_answers": detected}
            )
        lines.append({"id": "", "context": some[0]["context"], "context_tokens": [], "qas": qas})
    return lines


def dumped(lines):
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


@pytest.mark.parametrize("name", ["NewsQA.jsonl", "NewsQA.json", "NewsQA.jsonl.gz", "NewsQA.jsonl.GZ"])
@pytest.mark.parametrize("ending", ["", "\n", " \n\n"])
def test_mrqa(tmp_path, name, ending):
    content = (dumped(mrqa()) + ending).encode()
    assert (
        read(tmp_path, name, gzip.compress(content) if name.lower().endswith("gz") else content).to_list()
        == MRQA
    )


@pytest.mark.parametrize("name", ["all.jsonl", "all.jsonl.gz"])
def test_mrqas_files_one_after_the_other(tmp_path, name):
    """As `cat` leaves them, of gzip as well: each row has its own header's name."""
    parts = [dumped(mrqa({"dataset": which})).encode() for which in ("SQuAD", "NewsQA")]
    content = b"".join(gzip.compress(part) if name.endswith("gz") else part for part in parts)
    found = read(tmp_path, name, content)
    assert found["subset"] == ["SQuAD"] * len(ROWS) + ["NewsQA"] * len(ROWS)
    assert found["question"] == [row["question"] for row in ROWS] * 2


def test_a_later_header_that_is_none_is_named(tmp_path):
    lines = [*mrqa(), {"header": "NewsQA"}, *mrqa()[1:]]
    refused(r"line 5 is not of MRQA's format$", tmp_path, "x.jsonl", dumped(lines))


def test_all_spans_of_all_answers_in_order(tmp_path):
    lines = mrqa()[:2]
    lines[1]["context"] = "a b a"
    lines[1]["qas"] = [
        {
            "qid": 5,
            "question": "?",
            "detected_answers": [{"char_spans": [[0, 0], [4, 4]]}, {"char_spans": [[2, 4]]}],
        }
    ]
    (row,) = read(tmp_path, "x.jsonl", dumped(lines))
    assert row["answers"] == {"text": ["a", "a", "b a"], "answer_start": [0, 4, 2]} and row["id"] == "5"


def found_at(text, span, context="It was in 1999. Then the EU"):
    lines = mrqa()
    lines[2]["context"] = context
    lines[2]["qas"][0]["detected_answers"] = [{"text": text, "char_spans": [[10, 13], span]}]
    return dumped(lines)


@pytest.mark.parametrize(
    ("text", "span", "there"),
    [
        ("1999", [9, 12], "' 199'"),
        ("1999", [10, 14], "'1999.'"),
        ("1999", [10, 12], "'199'"),
        ("2000", [10, 13], "'1999'"),
    ],
)
def test_an_answer_that_is_not_at_its_span_is_named(tmp_path, text, span, there):
    """One off, with the end after the last character (what SQuAD's measures would not see), or elsewhere."""
    message = (
        rf"^data\.train: .*x\.jsonl, line 3: the answer '{text}' is not at \[\d+, \d+\] .*; there stands "
    )
    refused(message, tmp_path, "x.jsonl", found_at(text, span))
    if text == "1999":
        refused(f"{there}$", tmp_path, "x.jsonl", found_at(text, span))


def test_gold_is_what_stands_at_the_span(tmp_path):
    """The text beside it may be normalised."""
    lines = mrqa()
    lines[2]["context"] = "It was the E.U."
    lines[2]["qas"][0]["detected_answers"] = [{"text": "eu", "char_spans": [[7, 14]]}]
    assert read(tmp_path, "x.jsonl", dumped(lines))[2]["answers"] == {
        "text": ["the E.U."],
        "answer_start": [7],
    }


def test_mrqa_with_a_byte_order_mark(tmp_path):
    assert read(tmp_path, "x.jsonl", "\ufeff" + dumped(mrqa())).to_list() == MRQA


def test_mrqa_without_a_name(tmp_path):
    assert set(read(tmp_path, "x.jsonl", dumped(mrqa({"split": "dev"})))["subset"]) == {""}


def spoilt(change):
    lines = mrqa()
    change(lines[2])
    return dumped(lines)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (dumped(mrqa()[:2]) + "{nonsense\n", r"^data\.train: .*x\.jsonl, line 3 is not of MRQA's format$"),
        (dumped(mrqa()) + "3\n", r"line 4 is not of MRQA's format$"),
        (spoilt(lambda one: one.pop("context")), r"line 3 is not of MRQA's format$"),
        (spoilt(lambda one: one["qas"][0].pop("detected_answers")), r"line 3 is not of MRQA's format$"),
        (spoilt(lambda one: one.update(context=7)), r"line 3 is not of MRQA's format$"),
        (spoilt(lambda one: one["qas"][0].update(question=None)), r"line 3 is not of MRQA's format$"),
        *(
            (
                spoilt(lambda one, span=span: one["qas"][0]["detected_answers"][0].update(char_spans=[span])),
                r"line 3 is not of MRQA's format$",
            )
            for span in ([4, 9], [5, 4], [-5, 8], [4], ["4", "8"], 4)
        ),
        (dumped(mrqa()[:1]), r"^data\.train: .*x\.jsonl has no questions$"),
        (
            dumped(mrqa()[:2]).encode() + b'{"context": "caf\xe9"}\n',
            r"x\.jsonl, line 3 is not UTF-8 \(byte 0xe9\)",
        ),
    ],
)
def test_the_line_that_is_not_mrqas(tmp_path, content, message):
    refused(message, tmp_path, "x.jsonl", content)


def test_gzip_that_is_broken_is_one_line(tmp_path):
    latin = dumped(mrqa()[:2]).encode() + b'{"context": "caf\xe9"}\n'
    refused(r"x\.jsonl\.gz, line 3 is not UTF-8 \(byte 0xe9\)", tmp_path, "x.jsonl.gz", gzip.compress(latin))
    noise = (
        np.random.default_rng(0)
        .integers(33, 126, 50_000, dtype=np.uint8)
        .tobytes()
        .replace(b'"', b"x")
        .replace(b"\\", b"x")
    )
    lines = dumped(mrqa()).encode() + b'{"context": "' + noise + b'", "qas": []}\n'
    whole = gzip.compress(lines)
    assert len(read(tmp_path, "x.jsonl.gz", whole)) == 3
    refused(
        r"^data\.train: cannot read .*x\.jsonl\.gz beyond line \d+: ",
        tmp_path,
        "x.jsonl.gz",
        whole[: len(whole) // 2],
    )
    refused(r"^data\.train: cannot read .*x\.jsonl\.gz as json", tmp_path, "x.jsonl.gz", b"no gzip at all")


@pytest.mark.parametrize("header", ["From: ann", 3, None])
def test_a_column_of_that_name_is_no_header(tmp_path, header):
    rows = [{"header": header, "text": "a"}, {"header": header, "text": "b"}]
    assert read(tmp_path, "rows.jsonl", dumped(rows)).to_list() == rows
    assert read(tmp_path, "rows.jsonl.gz", gzip.compress(dumped(rows).encode())).to_list() == rows


def test_every_format_gives_the_same_tokens(tmp_path, encoder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(encoder("bert"))
    datasets.Dataset.from_list(ROWS).to_parquet(str(tmp_path / "rows.parquet"))
    tables = [
        read(tmp_path, "rows.json", json.dumps(squad())),
        read(tmp_path, "rows.jsonl", dumped(mrqa())),
        read_table(str(tmp_path / "rows.parquet"), "data.train"),
    ]
    task, found = QA(max_length=64, overlap=16), []
    for table in tables:
        encoded = task.encode(table, DataConfig(), tokenizer, ["start", "end"])
        found.append(
            [
                *encoded.features["input_ids"].values,
                *encoded.targets["start_positions"],
                *encoded.targets["end_positions"],
            ]
        )
    assert found[0] == found[1] == found[2]
    assert list(encoded.targets["end_positions"] > 0) == [True] * 3


@pytest.mark.parametrize("form", ["squad", "mrqa"])
def test_half_a_character_in_json(tmp_path, form):
    """JSON can say half of a surrogate pair, and no table can hold it."""
    objects = [squad()] if form == "squad" else mrqa()
    content = "".join(json.dumps(each) + "\n" for each in objects).replace("Which?", r"Which\ud83d?")
    refused(
        r"x\.json, question 3 \('3'\): \\ud83d is half a character; write the text anew$",
        tmp_path,
        "x.json",
        content,
    )
