"""
CaseOps v1: move letter case out of the words, losslessly, so that "The", "THE" and "the" share one tokenizer piece.

    encode("McDonald at NASA")   ->  "<TITLE>mc<CAPNEXT>donald at <ALLCAPS>nasa"
    decode(encode(text)) == text     for every str, operators and lone surrogates included

Four private-use characters carry the case. A word is a maximal run of ASCII letters; nothing else is ever changed.

    U+E001 TITLE    before a word: its first letter is upper case
    U+E002 ALLCAPS  before a word of two or more letters: all of them are upper case
    U+E003 CAPNEXT  inside a word: the next letter is upper case
    U+E004 ESC      the next character is literal; written before each operator that the original text contains

A word that is upper case throughout takes ALLCAPS (TITLE if it is one letter); any other word takes TITLE if it starts
with a capital, and CAPNEXT before each later capital. The scheme is `lossless_caps_caseops_v1`, the CaseOps export of
openai/parameter-golf, bit for bit.

Everything works on the UTF-8 bytes of the text with numpy. All four operators are EE 80 8x in UTF-8, ASCII letters are
single bytes, and no byte of another character can be taken for either.
"""

import numpy as np

TITLE, ALLCAPS, CAPNEXT, ESC = OPERATORS = "\ue001\ue002\ue003\ue004"


class LosslessCapsError(ValueError):
    """The text is not the encoding of anything; `offset` is the index of the first character that cannot be right."""

    def __init__(self, message: str, offset: int):
        super().__init__(f"{message} (character offset {offset})")
        self.message, self.offset = message, offset

    def __reduce__(self):  # the default would rebuild from the joined message alone and fail on the way out of a worker
        return type(self), (self.message, self.offset)


# ==================================================================================================
# BYTES - str <-> UTF-8 bytes as an array, and the two things to find in it: letters and acting operators.
# ==================================================================================================


def _to_bytes(text: str) -> np.ndarray:
    """UTF-8 between two zero bytes, so that every character has a byte before it and a byte after it."""
    return np.frombuffer(b"\0" + text.encode("utf-8", "surrogatepass") + b"\0", np.uint8)


def _to_text(u8: np.ndarray) -> str:
    return u8[1:-1].tobytes().decode("utf-8", "surrogatepass")


def _is_letter(u8: np.ndarray) -> np.ndarray:
    return ((u8 | 0x20) - np.uint8(ord("a"))) < 26  # uint8 wraps around: what lies before "a" becomes large


def _find_operators(u8: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Byte positions of the operator characters, and which of the four each one is: 1 TITLE .. 4 ESC."""
    at = np.flatnonzero(u8[:-2] == 0xEE)
    code = u8[at + 2] ^ 0x80
    found = (u8[at + 1] == 0x80) & (code >= 1) & (code <= 4)
    return at[found], code[found]


def _acting_operators(u8: np.ndarray) -> tuple[np.ndarray, np.ndarray, bool]:
    """Positions and codes of the operators that act, and whether all stand where `encode` may have put them.

    If they do, the text is well formed. The decoder accepts a little more (ESC before any character at all), so False
    means "look closer", not "malformed".
    """
    at, code = _find_operators(u8)
    if len(at) == 0:
        return at, code, True
    # An operator is literal if an acting ESC precedes it. So in a chain of adjacent ESCs every second one is literal.
    i = np.arange(len(at))
    after_esc = np.zeros(len(at), bool)
    after_esc[1:] = (code[:-1] == 4) & (np.diff(at) == 3)
    literal = (i - np.maximum.accumulate(np.where(after_esc, 0, i))) % 2 == 1

    at, code = at[~literal], code[~literal]
    escapes, opens_word = code == 4, code <= 2
    regular = (
        np.count_nonzero(escapes) == np.count_nonzero(literal)  # each ESC has its operator,
        and _is_letter(u8[at + 3])[~escapes].all()  # each other operator has its letter,
        and not _is_letter(u8[at - 1])[opens_word].any()  # and TITLE and ALLCAPS stand where a word starts.
    )
    return at, code, bool(regular)


# ==================================================================================================
# ENCODE and DECODE
# ==================================================================================================


def encode(text: str) -> str:
    """Lower-case every ASCII word of `text` and insert the operators that undo it."""
    u8 = _to_bytes(text)
    is_upper = (u8 - np.uint8(ord("A"))) < 26
    upper = np.flatnonzero(is_upper)
    literal, _ = _find_operators(u8)
    if len(upper) + len(literal) == 0:
        return text

    # A run of adjacent capitals with no letter on either side is a whole word. One ALLCAPS stands for the run if it has
    # two letters or more. Every other capital has an operator of its own.
    run = np.flatnonzero(np.diff(upper, prepend=-1) != 1)  # index into `upper` of each run's first capital
    run_len = np.diff(run, append=len(upper))
    inside = _is_letter(u8[upper - 1])  # a letter precedes this capital
    is_word = ~inside[run] & ~_is_letter(u8[upper[run + run_len - 1] + 1])
    all_caps = np.repeat(is_word & (run_len >= 2), run_len)
    operator = np.where(all_caps, 2, np.where(inside, 3, 1)).astype(np.uint8)
    needed = ~all_caps | ~inside
    at, operator = upper[needed], operator[needed]
    if len(literal):
        at, operator = np.append(at, literal), np.append(operator, np.full(len(literal), 4, np.uint8))
        order = np.argsort(at)
        at, operator = at[order], operator[order]

    # Operator k goes before byte at[k], which the k operators before it have moved 3k bytes to the right.
    slot = at + 3 * np.arange(len(at))
    out = np.empty(len(u8) + 3 * len(at), np.uint8)
    kept = np.ones(len(out), bool)
    kept[slot] = kept[slot + 1] = kept[slot + 2] = False
    out[kept] = u8 | (is_upper.view(np.uint8) << 5)
    out[slot], out[slot + 1], out[slot + 2] = 0xEE, 0x80, 0x80 | operator
    return _to_text(out)


def decode(text: str) -> str:
    """Undo `encode`. Raises LosslessCapsError, with the character offset, where `text` is malformed."""
    u8 = _to_bytes(text)
    at, code, regular = _acting_operators(u8)
    if not regular:
        return _decode_slowly(text)
    if len(at) == 0:
        return text

    kept = np.ones(len(u8), bool)
    kept[at] = kept[at + 1] = kept[at + 2] = False
    out = u8[kept]
    target = at - 3 * np.arange(len(at))  # where in `out` the byte after each operator has gone
    out[target[(code == 1) | (code == 3)]] &= 0xDF
    start = target[code == 2]
    if len(start):  # ALLCAPS reaches to the next byte that is not a letter
        stops = np.flatnonzero(~_is_letter(out))
        length = stops[np.searchsorted(stops, start)] - start
        out[np.repeat(start - np.cumsum(length) + length, length) + np.arange(length.sum())] &= 0xDF
    return _to_text(out)


def _decode_slowly(text: str) -> str:
    """The decoder as a state machine over characters: the definition, and the only place that says what is wrong where."""
    out = []
    pending_word = None  # TITLE or ALLCAPS waiting for the first letter of its word
    pending_escape = pending_capnext = active_allcaps = in_word = False
    for offset, c in enumerate(text):
        is_letter = c.isascii() and c.isalpha()
        if pending_escape:
            if pending_word and not is_letter:
                raise LosslessCapsError("expected an ASCII letter after TITLE or ALLCAPS, found an escaped character", offset)
            out.append(c)
            pending_escape, in_word = False, is_letter
            active_allcaps = active_allcaps and is_letter
        elif c == ESC:
            pending_escape = True
        elif c in (TITLE, ALLCAPS):
            if pending_word or in_word or pending_capnext:
                where = "inside a word" if in_word else "after another case operator"
                raise LosslessCapsError(f"found U+{ord(c):04X} {where}, where no word can start", offset)
            pending_word = c
        elif c == CAPNEXT:
            if pending_capnext:
                raise LosslessCapsError("expected an ASCII letter after CAPNEXT, found another CAPNEXT", offset)
            pending_capnext = True
        elif is_letter:
            if in_word and pending_word:
                raise LosslessCapsError("TITLE or ALLCAPS was followed by an escaped letter", offset)
            active_allcaps = active_allcaps or pending_word == ALLCAPS
            out.append(c.upper() if pending_word or active_allcaps or pending_capnext else c)
            pending_word, pending_capnext, in_word = None, False, True
        else:
            if pending_word or pending_capnext:
                raise LosslessCapsError(f"expected an ASCII letter after a case operator, found {c!r}", offset)
            out.append(c)
            in_word = active_allcaps = False
    if pending_escape or pending_word or pending_capnext:
        raise LosslessCapsError("the text ends after an operator that needs a character", len(text))
    return "".join(out)


# ==================================================================================================
# BYTE COUNTS - what each part of an encoded text weighs in the original. Bits per byte divides by these.
# ==================================================================================================


def original_offsets(text: str) -> np.ndarray:
    """For an encoded text: how many bytes of the original precede each character, and the total. (len(text) + 1,) int64.

    Acting operators weigh nothing; every other character, escaped ones included, weighs its UTF-8 length.
    """
    u8 = _to_bytes(text)
    at, _, regular = _acting_operators(u8)
    if not regular:
        _decode_slowly(text)  # raises unless the text is well formed all the same
    starts = np.flatnonzero((u8[1:] & 0xC0) != 0x80)  # of the characters: every byte but continuations. Ends with len(bytes).
    weight = np.diff(starts)
    weight[np.searchsorted(starts, at - 1)] = 0
    return np.concatenate([[0], np.cumsum(weight)])


def original_byte_counts(surfaces: list[str]) -> np.ndarray:
    """UTF-8 bytes of the original text that each consecutive surface of an encoded text stands for. (len(surfaces),) int64.

    The surfaces are one text cut into pieces: an operator may act on a letter of a later piece.
    """
    ends = np.cumsum(np.fromiter(map(len, surfaces), np.int64, len(surfaces)))
    return np.diff(original_offsets("".join(surfaces))[ends], prepend=0)
