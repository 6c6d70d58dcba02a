"""Small encoders of every family as the real ones are: their architecture, and a tokenizer of their kind, trained here.

BERT, DistilBERT and ELECTRA have WordPiece; RoBERTa and ModernBERT byte-level BPE, RoBERTa with its padding id of 1;
DeBERTaV3 a unigram model over pieces that begin with a space's mark, and a few embeddings more than tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from small import FILLER, WORDS

FAMILIES = ("bert", "roberta", "deberta-v2", "distilbert", "electra", "modernbert")
CORPUS = [
    " ".join([*words, *FILLER, word.title(), word.upper(), "!?.,'\""])
    for words in WORDS.values()
    for word in words
]
SPM_SPECIAL = ("[PAD]", "[CLS]", "[SEP]", "[UNK]")  # [MASK] comes after the pieces
SPARE = 7  # embeddings beyond the vocabulary, as DeBERTaV3 has


def build_tokenizer(family: str) -> Any:
    """Return a family's kind of tokenizer, trained on a few sentences."""
    if family in ("roberta", "modernbert"):
        return _byte_level(family)
    if family == "deberta-v2":
        return _unigram()
    return _word_piece()


def _fast(tokenizer: Any, special: dict[str, str]) -> Any:
    import transformers

    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **special)


def _word_piece() -> Any:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=160, special_tokens=special, show_progress=False)
    )
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(word, made.token_to_id(word)) for word in ("[CLS]", "[SEP]")],
    )
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    fast = _fast(made, dict(zip(names, special, strict=True)))
    fast.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    return fast


def _byte_level(family: str) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

    roberta = family == "roberta"
    special = (
        ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
        if roberta
        else ["[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]"]
    )
    made = Tokenizer(models.BPE(unk_token=special[3]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=340,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if roberta:
        made.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    else:  # ModernBERT's offsets keep the space before a word
        made.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B [SEP]",
            special_tokens=[("[CLS]", 0), ("[SEP]", 2)],
        )
    names = ("cls_token", "pad_token", "sep_token", "unk_token", "mask_token")
    fast = _fast(made, dict(zip(names, special, strict=True)))
    fast.model_input_names = ["input_ids", "attention_mask"]
    return fast


def _unigram() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.train_from_iterator(
        CORPUS,
        trainers.UnigramTrainer(
            vocab_size=140, special_tokens=special, unk_token="[UNK]", show_progress=False
        ),
    )
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    names = ("pad_token", "cls_token", "sep_token", "unk_token", "mask_token")
    fast = _fast(made, dict(zip(names, special, strict=True)))
    fast.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    return fast


def build_family(family: str, to: Path) -> Path:
    """Write a small checkpoint of a family; its matrices are large enough for logits to depend on all of them."""
    import transformers

    tokenizer = build_tokenizer(family)
    sizes = {"vocab_size": len(tokenizer) + (SPARE if family == "deberta-v2" else 0)}
    sizes["pad_token_id"] = tokenizer.pad_token_id
    usual = {
        **sizes,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 80,
        "initializer_range": 0.2,
    }
    ends = {"bos_token_id": tokenizer.cls_token_id, "eos_token_id": tokenizer.sep_token_id}
    makers = {
        "bert": lambda: transformers.BertConfig(**usual),
        "roberta": lambda: transformers.RobertaConfig(**usual, **ends, type_vocab_size=1),
        "deberta-v2": lambda: transformers.DebertaV2Config(
            **usual,
            relative_attention=True,
            pos_att_type=["p2c", "c2p"],
            position_biased_input=False,
            share_att_key=True,
            norm_rel_ebd="layer_norm",
            position_buckets=16,
            max_relative_positions=-1,
            type_vocab_size=0,
        ),
        "distilbert": lambda: transformers.DistilBertConfig(
            **sizes,
            dim=32,
            n_layers=2,
            n_heads=4,
            hidden_dim=64,
            max_position_embeddings=80,
            initializer_range=0.2,
        ),
        "electra": lambda: transformers.ElectraConfig(**usual, embedding_size=16),
        "modernbert": lambda: transformers.ModernBertConfig(
            **usual,
            **ends,
            cls_token_id=tokenizer.cls_token_id,
            sep_token_id=tokenizer.sep_token_id,
            local_attention=16,
            global_attn_every_n_layers=2,
        ),
    }
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = transformers.AutoModel.from_config(makers[family]())
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, torch.nn.Linear) and module.bias is not None:
                    module.bias.normal_(std=0.1)
    model.save_pretrained(to)
    tokenizer.save_pretrained(to)
    return to


def build_with_spm(to: Path) -> Path:
    """Write a small DeBERTaV3 in the layout of the published one: its tokenizer is `spm.model` and a line of settings."""
    import sentencepiece

    folder = build_family("deberta-v2", to)
    (folder / "tokenizer.json").unlink()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_prefix=str(folder / "spm"),
        vocab_size=100,
        minloglevel=2,
        **{f"{mark}_id": i for i, mark in enumerate(("pad", "bos", "eos", "unk"))},
        **{f"{m}_piece": p for m, p in zip(("pad", "bos", "eos", "unk"), SPM_SPECIAL, strict=True)},
    )
    (folder / "spm.vocab").unlink()
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": false, "vocab_type": "spm"}')
    return folder
