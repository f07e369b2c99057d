"""Splits `a,b,c` into values. Commas in brackets, braces, parentheses and quoted text separate nothing."""

from __future__ import annotations

_PAIRS = {"[": "]", "{": "}", "(": ")"}
_BEFORE_TEXT = ",[{(: "  # a quote after one of these begins quoted text; that of `it's` does not


def split_values(text: str) -> list[str]:
    """Return the values of `a,b,c` as they were typed: `1e-4,[1,2],"a,b"` → `1e-4`, `[1,2]`, `"a,b"`.

    Raises:
        ValueError: a bracket or quoted text has no end, or a value is empty. An empty text is one empty value.
    """
    values, start, open_ = list[str](), 0, list[str]()
    place = 0
    while place < len(text):
        letter = text[place]
        if letter in "'\"" and (place == 0 or text[place - 1] in _BEFORE_TEXT):
            place = _end_of_text(text, place)
        elif letter in _PAIRS:
            open_.append(_PAIRS[letter])
        elif open_ and letter == open_[-1]:
            open_.pop()
        elif letter == "," and not open_:
            values.append(text[start:place])
            start = place + 1
        place += 1
    if open_:
        raise ValueError(f"{text} lacks a `{open_[-1]}`: add it, or put the value in quotes of its own: '\"…\"'")
    values.append(text[start:])
    if len(values) > 1 and not all(value.strip() for value in values):
        raise ValueError(f'{text} has an empty value: remove a comma, or write "" for an empty text')
    return values


def _end_of_text(text: str, begin: int) -> int:
    """Return the place of the quote that ends the text in quotes which begins at `begin`; raises ValueError.

    As in YAML, a backslash escapes in double quotes, and two single quotes stand for one in single quotes.
    """
    quote, place = text[begin], begin + 1
    while place < len(text):
        if text[place] == "\\" and quote == '"':
            place += 1
        elif text[place] == quote:
            if quote == '"' or text[place + 1 : place + 2] != quote:
                return place
            place += 1
        place += 1
    raise ValueError(f"{text} lacks a closing {quote}: add it")
