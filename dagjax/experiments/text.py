"""Text as next-character prediction, with a small text that needs no file."""

import numpy as np

from dagjax.experiments.examples import Data, check, fail, fixed_order

_SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen "
    "fourteen fifteen sixteen seventeen eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()


def characters(text: str | None = None, length: int = 32) -> Data:
    """Predict the next character, at every place of every window.

    The first four fifths of the text are for training; no character is in both parts.

    Args:
        text: any text; by default `sums()`.
        length: characters in a window; windows do not overlap.

    Returns:
        int32 tokens `[N, length]`, positions in `alphabet(text)`, and the tokens one
        place further on, `[N, length]`.

    Raises:
        DataError: no window fits into a part.

    >>> data = characters("abcabcabcabcabc", length=2)
    >>> data.x_train[0].tolist(), data.y_train[0].tolist(), len(data.x_test)
    ([0, 1], [1, 2], 1)
    """
    text = sums() if text is None else text
    if length < 1:
        fail("characters: length", f"{length}", "1 or more")
    tokens, cut = encode(text, alphabet(text)), len(text) * 4 // 5
    if len(tokens) - cut <= length:
        want = f"more than {5 * length} for windows of {length}"
        fail("characters: text", f"{len(text)} characters", want)
    train, test = _windows(tokens[:cut], length), _windows(tokens[cut:], length)
    return check(Data(*train, *test), "characters")


def alphabet(text: str | None = None) -> str:
    """The vocabulary of a text: a token is a position in it.

    Args:
        text: any text; by default `sums()`.

    Returns:
        Its distinct characters, sorted.

    >>> alphabet("hello")
    'ehlo'
    """
    return "".join(sorted(set(sums() if text is None else text)))


def encode(text: str, vocabulary: str) -> np.ndarray:
    """Tokens of a text.

    Args:
        text: any text.
        vocabulary: from `alphabet`.

    Returns:
        int32 `[len(text)]`.

    Raises:
        DataError: a character is not in the vocabulary.

    >>> encode("hello", "ehlo").tolist()
    [1, 0, 2, 2, 3]
    """
    index = {character: token for token, character in enumerate(vocabulary)}
    for position, character in enumerate(text):
        if character not in index:
            want = f"one of {vocabulary!r}"
            fail(f"text: at character {position}", repr(character), want)
    return np.array([index[character] for character in text], np.int32)


def decode(tokens: np.ndarray, vocabulary: str) -> str:
    """The text of some tokens, `encode` undone.

    Args:
        tokens: integers `[n]`.
        vocabulary: from `alphabet`.

    Returns:
        n characters.

    >>> decode(encode("hello", "ehlo"), "ehlo")
    'hello'
    """
    return "".join(vocabulary[token] for token in tokens)


def sums(below: int = 32) -> str:
    r"""Every sum of two small numbers in words, once, in a fixed shuffled order.

    Args:
        below: the summands are 0 to `below` - 1; at most 50.

    Returns:
        One line for each sum.

    Raises:
        DataError: `below` is not in 1 to 50.

    >>> sums(below=2)
    'one plus one is two\none plus zero is one\nzero plus one is one\nzero plus ...'
    """
    if not 1 <= below <= 50:
        fail("sums: below", f"{below}", "1 to 50")
    pairs = (divmod(int(code), below) for code in fixed_order(below * below))
    return "".join(f"{words(a)} plus {words(b)} is {words(a + b)}\n" for a, b in pairs)


def words(number: int) -> str:
    """A number from 0 to 99 in English, without hyphens.

    >>> words(21)
    'twenty one'
    """
    if not 0 <= number <= 99:
        fail("words: number", f"{number}", "0 to 99")
    if number < len(_SMALL):
        return _SMALL[number]
    ten, one = divmod(number, 10)
    return f"{_TENS[ten - 2]} {_SMALL[one]}" if one else _TENS[ten - 2]


def _windows(tokens: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and next tokens, both `[N, length]`."""
    n = (len(tokens) - 1) // length
    x, y = (tokens[shift : shift + n * length] for shift in (0, 1))
    return x.reshape(n, length), y.reshape(n, length)
