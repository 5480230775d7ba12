"""What .dockerignore leaves out: the rules of moby/patternmatcher."""

import pytest

from ovlfs.build.ignore import PatternError, compile_glob, parse_ignore


@pytest.mark.parametrize(
    ("patterns", "path", "ignored"),
    [
        ("**", "file", True),
        ("**", "dir/file", True),
        ("**/", "dir/file", True),
        ("**/**", "dir/file", True),
        ("dir/**", "dir/file", True),
        ("dir/**", "dir/dir2/file", True),
        ("dir/**", "dir", False),
        ("**/dir", "a/b/dir", True),
        ("**/dir", "dir/file", True),
        ("**/dir2/*", "dir/dir2/file", True),
        ("**/dir2/*", "dir/dir2", False),
        ("**file", "dir/file", True),
        ("**/file", "filexx", False),
        ("a/**/b", "a/b", True),
        ("a/**/b", "a/x/y/b", True),
        ("a/**/b", "ab", False),
        ("*", "dir/file", True),
        ("*/file", "dir/file", True),
        ("*/file", "a/dir/file", False),
        ("a?c", "abc", True),
        ("a?c", "a/c", False),
        ("[a-c]x", "bx", True),
        ("[^a-c]x", "bx", False),
        ("[^a]x", "/x", False),
        (r"\*x", "*x", True),
        (r"\*x", "ax", False),
        ("a.c", "abc", False),
        ("a+(b)|{c}$", "a+(b)|{c}$", True),
        ("/foo", "foo", True),
        ("./foo/../bar/", "bar", True),
        (" foo ", "foo", True),
        ("# foo\n#foo", "foo", False),
        ("#foo", "#foo", False),
        ("foo\n!foo/bar", "foo/bar", False),
        ("foo\n!foo/bar", "foo/baz", True),
        ("*.md\n!README*.md\nREADME-secret.md", "README-secret.md", True),
        ("*.md\nREADME-secret.md\n!README*.md", "README-secret.md", False),
        ("!a\na", "a", True),
        ("dir\n!dir", "dir/file", False),
        ("foo", "foobar", False),
        ("foo", "dir/foo", False),
        ("", "foo", False),
    ],
)
def test_ignored(patterns: str, path: str, ignored: bool) -> None:
    assert parse_ignore(patterns.encode(), ".dockerignore").ignored(path) is ignored


@pytest.mark.parametrize(("patterns", "line"), [("a\n[", 2), ("[b-a]", 1), ("[]", 1), ("a\\", 1), ("!", 1), ("[a", 1)])
def test_what_makes_no_sense_names_the_line(patterns: str, line: int) -> None:
    with pytest.raises(PatternError) as caught:
        parse_ignore(patterns.encode(), ".dockerignore")
    assert str(caught.value).startswith(f".dockerignore:{line}: ")


def test_a_glob_has_no_double_star() -> None:
    """Sources of COPY are patterns of Go's filepath.Match: `**` is `*`."""
    assert compile_glob("**").fullmatch("abc")
    assert not compile_glob("**").fullmatch("a/b")
