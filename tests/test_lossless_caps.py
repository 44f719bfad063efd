"""lossless_caps.py: the published vectors, the inverse, the errors, and the byte counts."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from lossless_caps import OPERATORS, LosslessCapsError, decode, encode, original_byte_counts, original_offsets

TITLE, ALLCAPS, CAPNEXT, ESC = T, A, C, E = OPERATORS
GOLDEN = Path(__file__).parents[2] / "shared" / "golden" / "caseops.jsonl"

# Text of every kind the transform treats differently, dense enough that short strings hit the corners.
ALPHABET = "abzABZ '.-09_é\u00c9\u0130\u00df\n\0\ue000\ue005\ud800\udfff\U0001f600" + OPERATORS
texts = st.one_of(st.text(), st.text(ALPHABET), st.text("aBC " + OPERATORS))

VECTORS = [
    ("", ""),
    ("the 1990s", "the 1990s"),
    ("A", T + "a"),
    ("Ab", T + "ab"),
    ("NASA", A + "nasa"),
    ("NASA's", A + "nasa's"),
    ("ABc", f"{T}a{C}bc"),
    ("iPhone", f"i{C}phone"),
    ("McDonald", f"{T}mc{C}donald"),
    ("HTMLParser", f"{T}h{C}t{C}m{C}l{C}parser"),
    ("I'm", f"{T}i'm"),
    ("ABC123def", f"{A}abc123def"),
    ("A1B2", f"{T}a1{T}b2"),
    ("ÉTÉ", f"É{T}tÉ"),
    ("é", "é"),
    ("a\ue001b \ue002C", f"a{E}\ue001b {E}\ue002{T}c"),
    ("\ue000\ue005", "\ue000\ue005"),
    (E + E, E + E + E + E),
    ("A" * 300, A + "a" * 300),
    ("\ud800X", f"\ud800{T}x"),
]

# (malformed text, offset of the first character that cannot be right)
MALFORMED = [
    (T, 1),
    (A, 1),
    (C, 1),
    (E, 1),
    ("ab" + E, 3),
    (T + "1", 1),
    (T + " a", 1),
    (C + ".", 1),
    (T + "é", 1),
    (T + T + "a", 1),
    (T + A + "a", 1),
    (C + T + "a", 1),
    (C + C + "a", 1),
    ("é a" + T + "b", 3),
    ("a" + A + "b", 1),
    (T + E + " ", 2),
    (T + E + "ab", 3),
    (T + E + T, 2),
    (C + E + " ", 3),
    ("\U0001f600" + T + "\U0001f600", 2),
]


def reference_encode(text: str) -> str:
    out, i = [], 0
    while i < len(text):
        j = i
        while j < len(text) and text[j].isascii() and text[j].isalpha():
            j += 1
        word = text[i:j]
        if not word:
            out.append((E if text[i] in OPERATORS else "") + text[i])
            i += 1
            continue
        if word.isupper() and len(word) >= 2:
            out.append(A + word.lower())
        else:
            out += [(C if k else T) + c.lower() if c.isupper() else c for k, c in enumerate(word)]
        i = j
    return "".join(out)


def reference_walk(text: str) -> tuple[str, list[int]]:
    """The decoder one character at a time: the original, and the bytes of it that each character stands for."""
    out, weights, word, active, capnext, in_word, escape = [], [], "", False, False, False, False
    for c in text:
        letter = c in "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
        acts = not escape and c in OPERATORS
        weights.append(0 if acts else len(c.encode("utf-8", "surrogatepass")))
        if escape:
            if word and not letter:
                raise ValueError
            out.append(c)
            escape, in_word, active = False, letter, active and letter
        elif c == E:
            escape = True
        elif acts and c != C:
            if word or in_word or capnext:
                raise ValueError
            word = c
        elif c == C:
            if capnext:
                raise ValueError
            capnext = True
        elif letter and in_word:
            if word:
                raise ValueError
            out.append(c.upper() if active or capnext else c)
            capnext = False
        elif letter:
            out.append(c.upper() if word or capnext else c)
            active, word, capnext, in_word = active or word == A, "", False, True
        else:
            if word or capnext:
                raise ValueError
            out.append(c)
            in_word = active = False
    if escape or word or capnext:
        raise ValueError
    return "".join(out), weights


@pytest.mark.parametrize("text, encoded", VECTORS)
def test_published_vectors(text, encoded):
    assert encode(text) == encoded
    assert decode(encoded) == text


def test_golden_file_where_present():
    lines = GOLDEN.read_text(encoding="utf-8").splitlines() if GOLDEN.exists() else []
    for row in map(json.loads, lines):
        assert encode(row["text"]) == row["encoded"]
        assert decode(row["encoded"]) == row["text"]


@given(texts)
@settings(max_examples=400, deadline=None)
def test_encode_is_the_definition_and_decode_its_inverse(text):
    encoded = encode(text)
    assert encoded == reference_encode(text)
    assert not any("A" <= c <= "Z" for c in encoded)
    assert decode(encoded) == text


@given(st.text("aBé " + OPERATORS, max_size=12))
@settings(max_examples=1000, deadline=None)
def test_decode_accepts_and_rejects_what_the_state_machine_does(text):
    try:
        want, weights = reference_walk(text)
    except ValueError:
        with pytest.raises(LosslessCapsError):
            decode(text)
        with pytest.raises(LosslessCapsError):
            original_offsets(text)
    else:
        assert decode(text) == want
        assert np.diff(original_offsets(text)).tolist() == weights


@pytest.mark.parametrize("text, offset", MALFORMED)
def test_errors_name_the_character(text, offset):
    for prefix in ("", "É x\U0001f600 ", f"{T}the {A}end "):  # a word boundary, so that the prefix changes only the offset
        with pytest.raises(LosslessCapsError, match=f"character offset {offset + len(prefix)}") as caught:
            decode(prefix + text)
        assert isinstance(caught.value, ValueError)
        assert caught.value.offset == offset + len(prefix)
        assert pickle.loads(pickle.dumps(caught.value)).offset == caught.value.offset


# Surfaces as the published tokenizer cuts them, and the bytes it charges.
COUNTS = [
    ([], []),
    ([""], [0]),
    (["i", C, "phone"], [1, 0, 5]),
    ([T, "hello", " ", "1", "2", "3", "4"], [0, 5, 1, 1, 1, 1, 1]),
    (["a", E, "\ue001", "b", " ", E, "\ue002", T, "c"], [1, 0, 3, 1, 1, 0, 3, 0, 1]),
    (["", "é"], [0, 2]),
    ([A, "us", "a", "."], [0, 2, 1, 1]),
    (["  \n\n ", "x"], [5, 1]),
    (["", "", "½"], [0, 0, 2]),
]


@pytest.mark.parametrize("surfaces, counts", COUNTS)
def test_byte_counts(surfaces, counts):
    assert original_byte_counts(surfaces).tolist() == counts


@given(texts, st.data())
@settings(max_examples=200, deadline=None)
def test_byte_counts_do_not_depend_on_the_cuts(text, data):
    encoded = encode(text)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(encoded)), max_size=8)))
    surfaces = [encoded[a:b] for a, b in zip([0, *cuts], [*cuts, len(encoded)], strict=True)]
    counts = original_byte_counts(surfaces)
    assert counts.sum() == len(text.encode("utf-8", "surrogatepass"))
    weights = iter(reference_walk(encoded)[1])
    assert counts.tolist() == [sum(next(weights) for _ in surface) for surface in surfaces]
