"""From a Dockerfile's text to instructions."""

import pytest

from ovlfs.build.dockerfile import DockerfileError, Instruction, parse, parse_trigger


def instructions(text: str) -> tuple[Instruction, ...]:
    return parse(text.encode(), "Dockerfile").instructions


def names_and_rests(text: str) -> list[tuple[str, str]]:
    return [(found.name, found.rest) for found in instructions(text)]


def rule_of(text: str | bytes) -> str:
    with pytest.raises(DockerfileError) as caught:
        parse(text if isinstance(text, bytes) else text.encode(), "Dockerfile")
    return str(caught.value)


def test_a_line_is_an_instruction() -> None:
    found = instructions("\n# comment\nfrom scratch\n\n  RUN\techo  hi  \n")
    assert [(one.line, one.name, one.rest) for one in found] == [(3, "FROM", "scratch"), (5, "RUN", "echo  hi")]
    assert found[1].original == "RUN\techo  hi"


def test_a_continued_line_skips_comments_and_empty_lines() -> None:
    text = "FROM scratch\nRUN a \\\n  # comment \\\n\n   && b \\  \n#x\n&& c\nRUN d"
    assert names_and_rests(text)[1:] == [("RUN", "a    && b && c"), ("RUN", "d")]


def test_a_continued_line_may_end_with_the_file() -> None:
    assert names_and_rests("FROM scratch\nRUN a \\\n") == [("FROM", "scratch"), ("RUN", "a")]


def test_an_escaped_escape_continues_nothing() -> None:
    assert names_and_rests("FROM scratch\nRUN a \\\\\nRUN b")[1:] == [("RUN", "a \\\\"), ("RUN", "b")]


def test_the_escape_directive() -> None:
    text = "# escape=`\n# syntax=docker/dockerfile:1\nFROM scratch\nCOPY a `\n c:\\\nRUN x"
    found = parse(text.encode(), "Dockerfile")
    assert found.escape == "`"
    assert [one.rest for one in found.instructions] == ["scratch", "a  c:\\", "x"]


def test_a_directive_after_a_comment_is_a_comment() -> None:
    assert parse(b"# hello\n# escape=`\nFROM scratch", "Dockerfile").escape == "\\"


def test_windows_line_ends_and_a_byte_order_mark() -> None:
    assert names_and_rests("\ufeffFROM scratch\r\nRUN a \\\r\n b\r\n") == [("FROM", "scratch"), ("RUN", "a  b")]


def test_flags_stand_before_the_arguments() -> None:
    found = instructions("FROM scratch\nCOPY --from=x --chown=a:b  --chmod=755 s --chown=d /d")[1]
    assert (found.flags, found.rest) == ({"from": "x", "chown": "a:b", "chmod": "755"}, "s --chown=d /d")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Dockerfile: has no FROM, so there is nothing to build"),
        ("ARG A\n", "Dockerfile: has no FROM, so there is nothing to build"),
        ("RUN a\nFROM scratch", "Dockerfile:1: no build stage in current context: RUN before FROM"),
        ("FROM scratch\n\nFOO a", "Dockerfile:3: unknown instruction: FOO"),
        ("FROM scratch\nADD --link a b", "Dockerfile:2: ADD: unknown flag --link (there are: --chmod, --chown)"),
        ("FROM scratch\nRUN --mount=x a", "Dockerfile:2: RUN: unknown flag --mount=x (there are: --network)"),
        ("FROM scratch\nCOPY --from a b", "Dockerfile:2: COPY: missing a value on flag --from"),
        ("FROM scratch\nCOPY --from=a --from=b a b", "Dockerfile:2: COPY: duplicate flag --from"),
        ("FROM scratch\nENV", "Dockerfile:2: ENV requires at least one argument"),
        ("FROM scratch\nCOPY <<EOF /x\nabc\n", "Dockerfile:2: unterminated heredoc 'EOF'"),
        ("# escape=x\nFROM scratch", "Dockerfile:1: invalid escape token 'x' does not match ` or \\"),
        ("# escape=`\n# escape=`\nFROM scratch", "Dockerfile:2: only one escape parser directive can be used"),
        ("FROM scratch\nONBUILD ONBUILD RUN a", "Dockerfile:2: Chaining ONBUILD via `ONBUILD ONBUILD` isn't allowed"),
        ("FROM scratch\nONBUILD FROM a", "Dockerfile:2: FROM isn't allowed as an ONBUILD trigger"),
        ("FROM scratch\nONBUILD NOPE a", "Dockerfile:2: unknown instruction: NOPE"),
        ("FROM scratch\nRUN [1]", "Dockerfile:2: RUN: in the exec form every word should be a string in double quotes"),
        ("FROM scratch\nRUN a\0b", "Dockerfile:2: holds a NUL character"),
        (b"FROM scratch\n\nRUN \xff", "Dockerfile:3: should be UTF-8 text"),
    ],
)  # fmt: skip
def test_what_breaks_a_rule_names_the_line(text: str | bytes, message: str) -> None:
    assert rule_of(text) == message


def test_heredocs() -> None:
    text = (
        "FROM scratch\n"
        "RUN <<EOF\n  a \\\n# no comment\n\nFROM x\nEOF\n"
        "COPY <<-one <<'t w' /d/\n\tx\n\t one\n\tone\n$y\nt w\n"
        "RUN cat <<\\A 3<<B ; echo '<<C' $((1<<2)) a<<D\n1\nA\n2\nB\n"
        "RUN last"
    )
    _, first, second, third, last = instructions(text)
    assert [(one.name, one.content, one.expand) for one in first.heredocs] == [
        ("EOF", "  a \\\n# no comment\n\nFROM x\n", True)
    ]
    assert [(one.name, one.text, one.expand) for one in second.heredocs] == [
        ("one", "x\n one\n", True),
        ("t w", "$y\n", False),
    ]
    assert [(one.name, one.content, one.expand) for one in third.heredocs] == [("A", "1\n", False), ("B", "2\n", True)]
    assert (last.line, last.rest) == (19, "last")


def test_only_run_copy_and_add_have_heredocs() -> None:
    assert names_and_rests("FROM scratch\nENV a=<<EOF\nRUN x")[1:] == [("ENV", "a=<<EOF"), ("RUN", "x")]
    with pytest.raises(DockerfileError, match="ONBUILD cannot keep a here-document"):
        parse_trigger("RUN <<EOF", 7, "Dockerfile", "\\")
