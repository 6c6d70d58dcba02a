"""What tests run on: small encoders of every family with true architectures, and small tables of real words."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset

WORDS = {
    "sport": ["match", "goal", "team", "player", "win", "cup", "league", "coach", "score", "season"],
    "tech": ["phone", "software", "chip", "data", "network", "computer", "code", "screen", "laptop", "app"],
    "food": ["bread", "cheese", "soup", "cook", "kitchen", "taste", "salt", "butter", "dinner", "recipe"],
}
FILLER = ["the", "a", "of", "and", "in", "to", "was", "is", "for", "on", "with", "it", "by", "at", "from"]
KIND = {word: kind for kind, words in WORDS.items() for word in words}
TASKS = {
    "classification": {"name": "classification", "max_length": 32},
    "ner": {"name": "ner", "max_length": 24, "overlap": 6},
    "qa": {"name": "qa", "max_length": 32, "overlap": 4, "group_by": "title"},
}
FAMILIES = ("bert", "roberta", "deberta-v2", "distilbert", "electra", "modernbert")


def sentences(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Return labelled sentences that a small model learns: a few words of the class among filler."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        label = list(WORDS)[i % len(WORDS)]
        words = [*rng.choice(WORDS[label], rng.integers(2, 5)), *rng.choice(FILLER, rng.integers(2, 9))]
        rows.append({"text": " ".join(rng.permutation(words)), "label": label})
    return rows


def write_csv(path: Path, rows: list[dict[str, str]]) -> Path:
    """Write rows as CSV."""

    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def task_rows(task: str, count: int, seed: int) -> list[dict[str, Any]]:
    """Return rows of a task over the same few words; some longer than a window of `TASKS`."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(count):
        words = [str(w) for w in rng.choice([*FILLER, *KIND], rng.integers(8, 30))]
        at = int(rng.integers(len(words)))
        words[at] = str(rng.choice(list(KIND)))
        text, kind = " ".join(words), KIND[words[at]]
        if task == "classification":
            out.append({"text": text, "label": kind})
        elif task == "ner":
            tags = [f"B-{KIND[w]}" if w in KIND else "O" for w in words]
            out.append({"tokens": words, "tags": tags, "domain": kind})
        else:
            answer = {"text": [words[at]], "answer_start": [len(" ".join([*words[:at], ""]))]}
            out.append({"question": f"what {kind}", "context": text, "answers": answer, "title": kind})
    return out


def write_task(folder: Path, task: str) -> Path:
    """Write 24 training and 9 test rows of a task as Parquet."""
    folder.mkdir(parents=True)
    for split, count in (("train", 24), ("test", 9)):
        Dataset.from_list(task_rows(task, count, len(split))).to_parquet(folder / f"{split}.parquet")
    return folder


def build_encoder(family: str, to: Path) -> Path:
    """Write a small checkpoint of a family: its own architecture, random weights, a word-level tokenizer."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = special + sorted({w for words in WORDS.values() for w in words} | set(FILLER))
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=64,
    )
    sizes = {"vocab_size": len(vocabulary), "pad_token_id": 0}
    usual = {
        **sizes,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 80,
    }
    configs: dict[str, Callable[[], object]] = {
        "bert": lambda: transformers.BertConfig(**usual),
        "roberta": lambda: transformers.RobertaConfig(**usual, bos_token_id=2, eos_token_id=3),
        "deberta-v2": lambda: transformers.DebertaV2Config(
            **usual,
            relative_attention=True,
            pos_att_type=["c2p", "p2c"],
            position_biased_input=False,
            share_att_key=True,
            norm_rel_ebd="layer_norm",
            position_buckets=16,
        ),
        "distilbert": lambda: transformers.DistilBertConfig(
            **sizes, dim=32, n_layers=2, n_heads=4, hidden_dim=64, max_position_embeddings=80
        ),
        "electra": lambda: transformers.ElectraConfig(**usual, embedding_size=32),
        "modernbert": lambda: transformers.ModernBertConfig(
            **usual,
            bos_token_id=2,
            eos_token_id=3,
            cls_token_id=2,
            sep_token_id=3,
            local_attention=16,
            global_attn_every_n_layers=2,
        ),
    }
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = transformers.AutoModel.from_config(configs[family]())
    model.save_pretrained(to)
    fast.save_pretrained(to)
    return to


def small_recipe(model: Path, train: Path, test: Path) -> dict[str, object]:
    """Return a recipe that runs in a second: a small BERT, six clients."""
    return {
        "seed": 3,
        "rounds": 3,
        "cohort": 3,
        "model": {"name": str(model)},
        "data": {"train": str(train), "test": str(test)},
        "task": {"name": "classification", "max_length": 32},
        "method": {"name": "federa", "rank": 4},
        "partition": {"name": "dirichlet", "clients": 6, "alpha": 0.5},
        "client": {"batch_size": 8, "lr": 3e-3, "precision": "fp32"},
        "engine": {"name": "serial", "threads": 1},
    }
