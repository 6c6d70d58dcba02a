"""Windows cover a text, overlap enough, and give every token one place of its own."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from federa.tasks.windows import frame, owners, require_room, window_starts
from federa.types import FederaError

sizes = st.tuples(st.integers(0, 120), st.integers(1, 40)).flatmap(
    lambda pair: st.tuples(st.just(pair[0]), st.just(pair[1]), st.integers(0, pair[1] - 1))
)


@pytest.mark.parametrize(
    ("length", "room", "overlap", "starts"),
    [
        (0, 4, 2, [0]),
        (4, 4, 2, [0]),
        (5, 4, 2, [0, 1]),
        (7, 4, 2, [0, 2, 3]),
        (8, 4, 2, [0, 2, 4]),
        (9, 4, 0, [0, 4, 5]),
        (5, 2, 1, [0, 1, 2, 3]),
        (10, 4, 1, [0, 3, 6]),
    ],
)
def test_starts_by_hand(length, room, overlap, starts):
    assert window_starts(length, room, overlap) == starts


@given(sizes)
def test_windows_cover_and_overlap(size):
    length, room, overlap = size
    starts = window_starts(length, room, overlap)
    assert starts[0] == 0
    for one, other in pairwise(starts):
        assert one < other, "they get on"
        assert one + room - other >= overlap
    assert starts[-1] + room == length or len(starts) == 1, "the last one ends with the text"
    assert set(range(length)) == {t for s in starts for t in range(s, min(s + room, length))}
    fewest = 1 if length <= room else 1 + -(-(length - room) // (room - overlap))
    assert len(starts) == fewest


def test_owners_by_hand():
    # Windows 0..3, 2..5, 3..6; token 4 is as far from the edge in the last two.
    assert owners(7, 4, 2).tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert owners(3, 4, 2).tolist() == [0, 0, 0]
    assert owners(6, 4, 2).tolist() == [0, 0, 0, 1, 1, 1]


@given(sizes)
def test_every_token_is_owned_where_it_has_the_most_context(size):
    length, room, overlap = size
    starts = window_starts(length, room, overlap)
    owned = owners(length, room, overlap)
    assert owned.shape == (length,)
    for token, window in enumerate(owned):
        sides = [min(token - s, s + room - 1 - token) for s in starts]
        assert sides[window] >= 0, "it stands in its window"
        assert sides[window] == max(sides)
        start, least = starts[window], (overlap - 1) // 2
        assert start == 0 or token - start >= least, "half of the overlap lies before it"
        assert start + room >= length or start + room - 1 - token >= least, "or behind it"
    assert np.all(np.diff(owned) >= 0), "owned tokens of a window lie together"


# Special tokens


def test_the_frame_of_every_family(any_tokenizer):
    assert frame(any_tokenizer) == ([2], [3])


def test_a_frame_of_one_side_or_none():
    assert frame(speaker([7], [7, 3])) == ([], [3])
    assert frame(speaker([7], [2, 7])) == ([2], [])
    assert frame(speaker([7, 8], [7, 8])) == ([], [])
    assert frame(speaker([7, 8], [2, 2, 7, 8, 3])) == ([2, 2], [3])


def test_special_tokens_inside_a_text_are_refused():
    with pytest.raises(FederaError, match=r"^model\.name: its tokenizer puts special tokens inside a text$"):
        frame(speaker([7, 8], [2, 7, 3, 8]))


def speaker(bare, full):
    """A tokenizer that says the same of every text."""
    return lambda text, add_special_tokens=True: {"input_ids": full if add_special_tokens else bare}


# Room


@pytest.mark.parametrize(("room", "overlap"), [(4, 4), (4, 5), (0, 0), (-1, 0)])
def test_windows_without_room_are_refused(room, overlap):
    message = (
        rf"^task\.overlap: windows of 6 tokens have room for {room}, .* overlap of {overlap}; raise task\."
    )
    with pytest.raises(FederaError, match=message):
        require_room(room, overlap, 6)


def test_windows_with_room_are_not():
    require_room(1, 0, 3)
    require_room(5, 4, 7)
