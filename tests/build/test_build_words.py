"""Quotes, escapes and variables in the words of an instruction.

The table is made of rows that BuildKit's shell lexer is tested with (frontend/dockerfile/shell, envVarTest).
"""

import pytest

from ovlfs.build import words
from ovlfs.build.words import WordError

VARIABLES = {"PWD": "/home", "SHELL": "bash", "EMPTY": "", "SPACES": " a  b ", "KOREAN": "한국어"}

ROWS = [
    ("hello", "hello"),
    ("he'll'o", "hello"),
    (r"he\'llo", "he'llo"),
    (r"abc\tdef", "abctdef"),
    (r"abc\\tdef", r"abc\tdef"),
    (r"abc\\\tdef", r"abc\tdef"),
    (r'"abc\tdef"', r"abc\tdef"),
    (r'"abc\\tdef"', r"abc\tdef"),
    (r'"abc\\\tdef"', r"abc\\tdef"),
    (r"'abc\tdef'", r"abc\tdef"),
    (r"'abc\\tdef'", r"abc\\tdef"),
    (r"he\"llo", 'he"llo'),
    (r'"he\"llo"', 'he"llo'),
    ('"he\'llo"', "he'llo"),
    ("'he\"llo'", 'he"llo'),
    ("'hello'there", "hellothere"),
    ("'hello $PWD'", "hello $PWD"),
    ('"hello $PWD"', "hello /home"),
    ("he$PWD.", "he/home."),
    (r"he\$PWD", "he$PWD"),
    (r"he\\$PWD", r"he\/home"),
    ("he$UNKNOWNxx", "he"),
    ("he${UNKNOWN}xx", "hexx"),
    ("he${1}xx", "hexx"),
    ("he$1xx", "hexx"),
    ("he$.", "he$."),
    ("he$", "he$"),
    ("he${hi}", "he"),
    ("he${PWD:-000}xx", "he/homexx"),
    ("he${XXX:-000}xx", "he000xx"),
    ("he${XXX:-$PWD}xx", "he/homexx"),
    ("he${XXX:-${YYY:-000}}xx", "he000xx"),
    ("he${XXX:-'x y'}xx", "hex yxx"),
    ('he${XXX:-"$PWD}"}xx', "he/home}xx"),
    ("${EMPTY:-x}${EMPTY-y}z", "xz"),
    ("${PWD:+000}", "000"),
    ("${XXX:+000}", ""),
    ("${EMPTY:+000}|${EMPTY+000}", "|000"),
    ("${PWD:?no}", "/home"),
    ("$KOREAN안녕", "한국어안녕"),
    ("''", ""),
    ("ends with\\", "ends with"),
]


@pytest.mark.parametrize(("text", "expanded"), ROWS)
def test_expand_as_buildkit(text: str, expanded: str) -> None:
    assert words.expand(text, VARIABLES, "\\") == expanded


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("he'llo", "single-quote"),
        (r"he\\'llo", "single-quote"),
        ('he"llo', "double-quote"),
        ("he${}xx", "bad substitution"),
        ("he${PWD", "unsupported modifier"),
        ("he${PWD:-x", "matching }"),
        ("he${PWD:3:4}", "unsupported modifier ':3'"),
        ("he${PWD#/}", "unsupported modifier '#/' in substitution of PWD"),
        ("${XXX:?it is needed}", "XXX: it is needed"),
        ("${EMPTY?}${EMPTY:?}", "EMPTY: is not allowed to be unset"),
    ],
)
def test_expand_refuses_what_makes_no_sense(text: str, rule: str) -> None:
    with pytest.raises(WordError) as caught:
        words.expand(text, VARIABLES, "\\")
    assert rule in str(caught.value)


def test_expand_with_the_other_escape_character() -> None:
    assert words.expand(r"C:\dir`$PWD\$PWD", VARIABLES, "`") == r"C:\dir$PWD\/home"


def test_expand_bounds_what_variables_grow_to() -> None:
    """`ENV a=$a$a` doubles each time."""
    with pytest.raises(WordError, match="more than"):
        words.expand("$a$a", {"a": "x" * (words.MAX_EXPANDED // 2 + 1)}, "\\")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a b", ["a", "b"]),
        ("$SPACES", ["a", "b"]),
        ("x${SPACES}y", ["x", "a", "b", "y"]),
        ('"x$SPACES"y', ["x a  b y"]),
        ("$EMPTY", []),
        ("'' $EMPTY \"\"", ["", ""]),
        (r"a\ b c", ["a b", "c"]),
    ],
)
def test_expand_words_splits_what_is_not_quoted(text: str, found: list[str]) -> None:
    assert words.expand_words(text, VARIABLES, "\\") == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a=b  c='d e' f=\"g h\"", ["a=b", "c='d e'", 'f="g h"']),
        (r"a=b\ c d", [r"a=b\ c", "d"]),
        ("'a\\' b", ["'a\\'", "b"]),
        ("a '' b", ["a", "''", "b"]),
        ("a\\", ["a\\"]),
    ],
)
def test_split_raw_keeps_quotes_and_escapes(text: str, found: list[str]) -> None:
    assert words.split_raw(text, "\\") == found


def test_expand_text_of_a_heredoc_keeps_quotes() -> None:
    """Only variables count, and what escapes a dollar."""
    text = 'it\'s "$PWD" \\$PWD \\\\ \\n\n'
    assert words.expand_text(text, VARIABLES, "\\") == 'it\'s "/home" $PWD \\ \\n\n'


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('["a", "b c"]', ["a", "b c"]),
        ("[]", []),
        ("['a']", None),
        ('["a"', None),
        ("[ -f x ] && y", None),
        ("a", None),
    ],
)
def test_json_words(text: str, found: list[str] | None) -> None:
    assert words.json_words(text) == found


def test_json_words_must_be_strings() -> None:
    with pytest.raises(WordError, match="string in double quotes"):
        words.json_words('["a", 1]')
