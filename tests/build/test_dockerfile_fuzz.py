"""Any text is a Dockerfile, a .dockerignore, a word: it is understood, or refused with a rule and a line."""

import contextlib

from hypothesis import given, settings
from hypothesis import strategies as st

from ovlfs.build import settings as config_of
from ovlfs.build import words
from ovlfs.build.dockerfile import FLAGS, DockerfileError, parse
from ovlfs.build.ignore import PatternError, compile_glob, parse_ignore
from ovlfs.build.words import WordError

_PIECES = st.sampled_from(
    [*FLAGS, *"\\`'\"$ {}[]()=:#\t\n\r!*?-,/~", "${", ":-", ":+", "a", "b", "<<", "<<-E", "E\n", "\n", "# escape=`\n",
     "--from=", "--chown=", '["a"]', "FROM scratch\n", "80/tcp", "1h", "NONE", "é", "\u202e"]
)  # fmt: skip
_TEXTS = st.lists(_PIECES, max_size=30).map("".join)
_VARIABLES = {"a": "x y", "b": ""}


@settings(max_examples=400, deadline=None)
@given(_TEXTS)
def test_every_text_is_read_or_refused(text: str) -> None:
    found, said = None, ""
    try:
        found = parse(("FROM scratch\n" + text).encode(), "Dockerfile")
    except DockerfileError as error:
        said = str(error)
    if found is None:
        assert said.startswith("Dockerfile:")
        assert said.isprintable()
        return
    for instruction in found.instructions:
        run = config_of.begin({})
        with contextlib.suppress(WordError):
            if instruction.name not in ("FROM", "ARG", "MAINTAINER", "RUN", "COPY", "ADD"):
                config_of.change(run, instruction, config_of.Reading(_VARIABLES, found.escape), cmd_set=False)


@settings(max_examples=300, deadline=None)
@given(_TEXTS)
def test_every_word_is_expanded_or_refused(text: str) -> None:
    for escape in "\\`":
        with contextlib.suppress(WordError):
            assert "\0" not in words.expand(text, _VARIABLES, escape)
        with contextlib.suppress(WordError):
            words.expand_words(text, _VARIABLES, escape)
        with contextlib.suppress(WordError):
            words.expand_text(text, _VARIABLES, escape)
        assert "".join(words.split_raw(text, escape)).replace(" ", "") or not text.strip()


@settings(max_examples=300, deadline=None)
@given(_TEXTS, _TEXTS)
def test_every_pattern_is_compiled_or_refused(text: str, path: str) -> None:
    with contextlib.suppress(PatternError):
        parse_ignore(text.encode(), ".dockerignore").ignored(path.strip("/") or "x")
    with contextlib.suppress(PatternError):
        compile_glob(text).fullmatch(path)
