"""Pretrain a small encoder of the RoBERTa or the DeBERTaV3 kind, where no real one can be had.

    python benchmarks/pretrain.py roberta --data ../shared/data --out ../encoders/roberta-small --minutes 20
    python benchmarks/pretrain.py deberta --data ../shared/data --out ../encoders/deberta-small --minutes 20

Both have 4 layers of width 384 and a vocabulary of 6,800 (9.9 M parameters, 20 MB in fp16), and learn to
fill in masked tokens (Devlin et al. 2019: 15 %, of which 80 % masked, 10 % random, 10 % as they were; drawn
anew every time, as in RoBERTa). `roberta` has absolute positions and byte-level BPE; `deberta` disentangled
attention with shared projections and 256 buckets of relative positions, and a unigram vocabulary, as
DeBERTaV3 (whose replaced-token detection it does not have). The text is that of the train splits alone; a
paragraph that occurs in any other split is left out.

From random weights an hour of a CPU gets no further than the frequencies of the tokens. `--start minilm`
begins with four of the six layers of MiniLM, as DistilBERT began with every other one of BERT's (Sanh et al.
2019), and gives each token of the new vocabulary the mean embedding of the pieces that MiniLM has for it.

It goes on where it was stopped (`training.safetensors` beside the weights), until `--minutes` are spent in
all.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
import transformers
from safetensors.torch import load_file, save_file

from federa.cpu import speed_up
from federa.flat_parameters import FlatParameters
from federa.models import resolve_model

LENGTH, VOCABULARY, WIDTH, HEADS = 128, 6_800, 384, 12
TAKEN = (0, 2, 3, 5)  # of MiniLM's layers, where it begins with them
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's
COLUMNS = ("text", "context", "question")
DEBERTA_V3 = {
    "type_vocab_size": 0,
    "relative_attention": True,
    "position_buckets": 256,
    "max_relative_positions": -1,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
}
HELD_OUT = 0.02  # of the blocks, for a loss that says when it has had enough


def paragraphs(data: Path) -> list[str]:
    """Return the texts of all train splits, each once, without what occurs in another split."""
    kept, banned = {}, set()
    for file in sorted(data.glob("*/*.parquet")):
        table = pq.read_table(file)
        texts = [text for name in COLUMNS if name in table.column_names for text in table[name].to_pylist()]
        if "tokens" in table.column_names:
            texts += [" ".join(words) for words in table["tokens"].to_pylist()]
        texts = [text.strip() for text in texts if text and text.strip()]
        kept.update(dict.fromkeys(texts)) if file.stem == "train" else banned.update(texts)
    return [text for text in kept if text not in banned]


def build_tokenizer(kind: str, texts: list[str]) -> transformers.PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    if kind == "roberta":
        special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
        made = Tokenizer(models.BPE(unk_token="<unk>"))
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
        names = ("cls_token", "pad_token", "sep_token", "unk_token", "mask_token")
    else:
        special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]
        made = Tokenizer(models.Unigram())
        made.normalizer, made.decoder = normalizers.NFC(), decoders.Metaspace()
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()]
        )
        trainer = trainers.UnigramTrainer(
            vocab_size=VOCABULARY, special_tokens=special, unk_token="[UNK]", show_progress=False
        )
        names = ("pad_token", "cls_token", "sep_token", "unk_token", "mask_token")
    made.train_from_iterator(texts, trainer)
    fast = dict(zip(names, special, strict=True))
    cls, sep = (made.token_to_id(fast[name]) for name in ("cls_token", "sep_token"))
    if kind == "roberta":
        made.post_processor = processors.RobertaProcessing(
            ("</s>", sep), ("<s>", cls), add_prefix_space=False
        )
    else:
        made.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", cls), ("[SEP]", sep)],
        )
    # Positions: as many as the model has, so that longer windows than those of pretraining are possible.
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=512, **fast)


def build_model(kind: str, tokenizer: transformers.PreTrainedTokenizerFast) -> transformers.PreTrainedModel:
    usual = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "num_hidden_layers": len(TAKEN),
        "num_attention_heads": HEADS,
        "intermediate_size": 4 * WIDTH,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if kind == "roberta":
        ends = {"bos_token_id": tokenizer.cls_token_id, "eos_token_id": tokenizer.sep_token_id}
        config = transformers.RobertaConfig(**usual, **ends, max_position_embeddings=514, type_vocab_size=1)
        return transformers.RobertaForMaskedLM(config)
    config = transformers.DebertaV2Config(**usual, **DEBERTA_V3, max_position_embeddings=512)
    return transformers.DebertaV2ForMaskedLM(config)


@torch.no_grad()
def begin_with_minilm(
    model: transformers.PreTrainedModel, tokenizer: transformers.PreTrainedTokenizerFast
) -> None:
    """Copy four of MiniLM's layers and what its vocabulary knows of this one."""
    folder = resolve_model("minilm")
    start = transformers.AutoModel.from_pretrained(folder)
    pieces = transformers.AutoTokenizer.from_pretrained(folder)
    own, theirs = model.base_model.embeddings, start.embeddings
    kind = theirs.token_type_embeddings.weight[0]  # every token had it added
    for number in range(len(tokenizer)):
        raw, text = tokenizer.convert_ids_to_tokens(number), tokenizer.decode([number]).strip()
        ids = pieces(text, add_special_tokens=False)["input_ids"]
        if text and raw[0] not in "\u0120\u2581":  # goes on with a word
            ids = pieces.convert_tokens_to_ids([f"##{text.lower()}"])
            ids = ids if ids != [pieces.unk_token_id] else pieces(text, add_special_tokens=False)["input_ids"]
        if ids:
            own.word_embeddings.weight[number] = theirs.word_embeddings.weight[ids].mean(0)
    for name in ("cls", "sep", "pad", "unk", "mask"):
        ids = (getattr(which, f"{name}_token_id") for which in (tokenizer, pieces))
        own.word_embeddings.weight[next(ids)] = theirs.word_embeddings.weight[next(ids)]
    if getattr(own, "position_embeddings", None) is not None:
        own.position_embeddings.weight[2:] = theirs.position_embeddings.weight  # 0 and 1 are for padding
    own.word_embeddings.weight += kind
    if getattr(own, "token_type_embeddings", None) is not None:
        own.token_type_embeddings.weight.zero_()
    own.LayerNorm.load_state_dict(theirs.LayerNorm.state_dict())
    renamed = {"query": "query_proj", "key": "key_proj", "value": "value_proj"}
    for to, taken in zip(model.base_model.encoder.layer, TAKEN, strict=True):
        layer = start.encoder.layer[taken]
        for name, new in renamed.items():
            there = to.attention.self
            there = getattr(there, name) if hasattr(there, name) else getattr(there, new)
            there.load_state_dict(getattr(layer.attention.self, name).state_dict())
        to.attention.output.load_state_dict(layer.attention.output.state_dict())
        to.intermediate.load_state_dict(layer.intermediate.state_dict())
        to.output.load_state_dict(layer.output.state_dict())


def blocks(texts: list[str], tokenizer: transformers.PreTrainedTokenizerFast) -> np.ndarray:
    """Return all text as rows of LENGTH tokens, each framed like a text: `(rows, LENGTH)` int32."""
    ids: list[int] = []
    for start in range(0, len(texts), 1000):
        for row in tokenizer(texts[start : start + 1000], add_special_tokens=False, verbose=False)[
            "input_ids"
        ]:
            ids += [*row, tokenizer.sep_token_id]
    room = LENGTH - 2
    rows = np.array(ids[: len(ids) // room * room], dtype=np.int32).reshape(-1, room)
    ends = [
        np.full((len(rows), 1), t, dtype=np.int32) for t in (tokenizer.cls_token_id, tokenizer.sep_token_id)
    ]
    return np.concatenate([ends[0], rows, ends[1]], axis=1)


def masked(rows: torch.Tensor, mask_id: int, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs and labels: 15 % of the tokens are to be filled in."""
    chosen = torch.rand(rows.shape, generator=rng) < 0.15
    chosen[:, 0] = chosen[:, -1] = False
    labels = rows.masked_fill(~chosen, -100)
    draw = torch.rand(rows.shape, generator=rng)
    inputs = rows.masked_fill(chosen & (draw < 0.8), mask_id)
    words = torch.randint(5, VOCABULARY, rows.shape, generator=rng)
    return torch.where(chosen & (draw >= 0.9), words, inputs), labels


def main() -> None:
    transformers.utils.logging.disable_progress_bar()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=("roberta", "deberta"))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start", choices=("random", "minilm"), default="random")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    asked = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    texts = paragraphs(asked.data)
    if (asked.out / "tokenizer.json").is_file():
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(asked.out)
    else:
        tokenizer = build_tokenizer(asked.kind, texts)
    torch.manual_seed(0)
    model = build_model(asked.kind, tokenizer)
    if asked.start == "minilm":
        begin_with_minilm(model, tokenizer)
    model = model.to(device)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    if device.type == "cpu":
        speed_up(model)
    data = torch.from_numpy(blocks(texts, tokenizer)).long()
    data = data[torch.randperm(len(data), generator=torch.Generator().manual_seed(0))]
    held, data = data[: int(HELD_OUT * len(data))], data[int(HELD_OUT * len(data)) :]
    count = sum(p.numel() for p in model.base_model.parameters())
    print(f"{len(texts):,} paragraphs, {data.numel():,} tokens; {count:,} parameters; {device}", flush=True)
    flat = FlatParameters(model, frozenset(), bf16=True)
    flat.load_(start)
    flat.master.grad = flat.gradient
    moments = {name: torch.zeros_like(flat.master) for name in MOMENTS}
    optimizer = torch.optim.AdamW(
        [flat.master], lr=asked.lr, weight_decay=0.01, betas=(0.9, 0.98), fused=True
    )
    state, spent, step = asked.out / "training.safetensors", 0.0, 0
    if state.is_file():
        tensors, story = load_file(state), json.loads((asked.out / "training.json").read_text())
        spent, step = story["seconds"], story["steps"]
        flat.load_({name: tensors[f"model.{name}"] for name in flat.names})
        for kind, vector in moments.items():
            for name in flat.names:
                flat.view(vector, name).copy_(tensors[f"{kind}.{name}"])
    optimizer.state[flat.master] = {"step": torch.tensor(float(step), device=device), **moments}
    rng, began, told = torch.Generator().manual_seed(1 + step), time.monotonic(), time.monotonic()
    total, before, losses = 60 * asked.minutes, spent, []

    def loss_of(rows: torch.Tensor, draws: torch.Generator) -> torch.Tensor:
        inputs, labels = (
            t.to(device, non_blocking=True) for t in masked(rows, tokenizer.mask_token_id, draws)
        )
        hidden = model.base_model(input_ids=inputs).last_hidden_state[labels >= 0]
        # The vocabulary for masked tokens only: a seventh of the products of the whole head.
        head = model.lm_head if asked.kind == "roberta" else model.cls
        logits = head(hidden)
        return torch.nn.functional.cross_entropy(logits.float(), labels[labels >= 0])

    while spent < total:
        done = spent / total  # the rate follows the clock: what is left of the time is what is left to learn
        rate = asked.lr * min(1.0, (step + 1) / 200) * max(0.02, 0.5 * (1 + math.cos(math.pi * done)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        rows = data[torch.randint(len(data), (asked.batch,), generator=rng)]
        loss = loss_of(rows, rng)
        flat.backward_(loss)
        flat.gradient.mul_((1 / (torch.linalg.vector_norm(flat.gradient) + 1e-6)).clamp(max=1.0))
        optimizer.step()
        flat.push_()
        losses.append(loss.detach())
        step, spent = step + 1, before + time.monotonic() - began
        if time.monotonic() - told > 30 or spent >= total:
            model.eval()
            with torch.no_grad():
                fixed = torch.Generator().manual_seed(0)
                parts = [float(loss_of(part, fixed)) for part in held.split(asked.batch)[:8]]
            model.train()
            mean = float(torch.stack(losses).mean())
            print(
                f"{spent:7.0f} s  step {step:6d}  loss {mean:.3f}  held out {np.mean(parts):.3f}", flush=True
            )
            write(
                asked.out,
                model,
                tokenizer,
                flat,
                moments,
                {
                    "seconds": spent,
                    "steps": step,
                    "held_out": float(np.mean(parts)),
                    "tokens": int(step * asked.batch * LENGTH),
                },
            )
            losses, told = [], time.monotonic()


def write(to, model, tokenizer, flat, moments, story) -> None:
    """Write the encoder in fp16, its tokenizer, and what it takes to go on."""
    to.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(to)
    tensors = {
        f"{kind}.{name}": tensor.contiguous()
        for kind, vector in (("model", flat.master), *moments.items())
        for name, tensor in flat.read(vector, flat.names).items()
    }
    save_file(tensors, to / "training.safetensors")
    (to / "training.json").write_text(json.dumps(story, indent=1) + "\n")
    own = f"model.{model.base_model_prefix}."
    half = {name.removeprefix(own): t.half() for name, t in tensors.items() if name.startswith(own)}
    model.base_model.save_pretrained(to, state_dict=half)


if __name__ == "__main__":
    main()
