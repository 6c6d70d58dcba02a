"""A client's own vocabulary: the rows of the table of token embeddings that its texts have.

Where the table trains it is a third to a half of a small encoder, and a client's texts have some hundreds of
its tens of thousands of rows. The others get no gradient, so a job may leave them out, and number its tokens
anew.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from federa.data.batches import Encoded
from federa.models import outputs
from federa.types import IntArray


class Vocabulary:
    """How the tokens of some rows are numbered when no others are there.

    Args:
        data: a tokenised data set.
        rows: of it, those that a job trains on.
        size: rows of the whole table.
        kept: so many of its first tokens are always there, under their own numbers.
        device: of the model.

    Attributes:
        tokens: the tokens, ascending, on the CPU, where states are.
        places: `(size,)`, the new number of every token that is there, on the device.
    """

    def __init__(self, data: Encoded, rows: IntArray, size: int, kept: int, device: torch.device) -> None:
        texts = [data.features["input_ids"].row(row) for row in rows]
        found = np.unique(np.concatenate([np.arange(kept), [data.pad["input_ids"]], *texts]))
        self.tokens = torch.from_numpy(found.astype(np.int64))
        places = torch.zeros(size, dtype=torch.long)
        places[self.tokens] = torch.arange(len(found))
        self.places = places.to(device)


def first_tokens(table: nn.Embedding) -> int:
    """Return how many tokens keep their numbers: all up to the padding, which models look for by number."""
    return 0 if table.padding_idx is None else int(table.padding_idx) + 1


def table_that_shrinks(model: Any) -> str | None:
    """Return the name of the parameter that holds the token embeddings if the model does with a part of it.

    Some models look for tokens by their numbers, or use the table a second time. Only numbers tell: what
    comes out for made-up texts must be the same to the bit.
    """
    table = model.get_input_embeddings()
    if type(table) is not nn.Embedding or not table.weight.requires_grad:
        return None
    name = next(name for name, parameter in model.named_parameters() if parameter is table.weight)
    kept, size = first_tokens(table), table.num_embeddings
    users = [m for m in model.modules() if any(p is table.weight for p in m._parameters.values())]
    if len(users) > 1 or kept > size // 2:
        return None
    draws = torch.Generator().manual_seed(0)
    ids = torch.randint(kept, size, (2, 12), generator=draws)
    mask = torch.tensor([[1] * 12, [1] * 9 + [0] * 3])
    special = {key: id_ for key, id_ in model.config.to_dict().items() if key.endswith("_token_id")}
    known = [id_ for id_ in special.values() if isinstance(id_, int) and 0 <= id_ < size][:8]
    ids[:, 1 : 1 + len(known)] = torch.tensor(known, dtype=torch.long)
    padding = special.get("pad_token_id")
    ids[mask == 0] = padding if padding in known else 0
    tokens = torch.unique(torch.cat([torch.arange(kept), ids.flatten()]))
    whole, training = table.weight.data, model.training
    model.eval()
    try:
        with torch.no_grad():
            expected = outputs(model, ids, mask)
            table.weight.data = whole[tokens.to(whole.device)]
            same = all(map(torch.equal, outputs(model, torch.searchsorted(tokens, ids), mask), expected))
    except Exception:  # it reads more of the table, or is called in another way
        same = False
    finally:
        table.weight.data = whole
        model.train(training)
    return name if same else None
