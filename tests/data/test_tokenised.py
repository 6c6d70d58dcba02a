"""Tokens that are kept for the next experiment are those that it would have made."""

import datasets
import transformers

from federa.config import parse_config
from federa.data import tokenised
from federa.experiment import build_experiment


def tokens(recipe):
    features = build_experiment(parse_config(recipe)).train.features["input_ids"]
    return features.values.tolist()


def test_the_same_recipe_is_tokenised_once_and_another_column_again(recipe, monkeypatch):
    tokenised._kept.clear()
    first = tokens(recipe)
    number = len(tokenised._kept)
    assert tokens(recipe) == first and len(tokenised._kept) == number
    assert tokens({**recipe, "task": {**recipe["task"], "max_length": 5}}) != first


def test_the_names_behind_a_columns_numbers_are_part_of_the_key(encoder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(encoder("bert"))
    made = []
    for names in (["O", "B-LOC", "B-PER"], ["O", "B-PER", "B-LOC"]):
        features = datasets.Features({"tags": datasets.List(datasets.ClassLabel(names=names))})
        table = datasets.Dataset.from_dict({"tags": [[0, 1, 2]]}, features=features)
        tokenised.tokenised(lambda names=names: made.append(names), table, tokenizer)
    assert len(made) == 2


def test_all_of_a_tokenizer_that_changes_tokens_is_part_of_the_key(encoder):
    base = encoder("bert")
    keys = set()
    for settings in (
        {},
        {"truncation_side": "left"},
        {"model_input_names": ["input_ids"]},
    ):
        tokenizer = transformers.AutoTokenizer.from_pretrained(base, **settings)
        keys.add(repr(tokenised._definition(tokenizer)))
        tokenizer(["a text"], truncation=True, max_length=3, padding=True)
        keys.add(repr(tokenised._definition(tokenizer)))  # what it remembers of a call is none of its own
    assert len(keys) == 3
