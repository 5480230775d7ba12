"""What instructions change in the config and write into the history (expected values are docker 20.10's)."""

from pathlib import Path

import pytest
from helpers_build import Builds, Ovlfs, history, run_config

from ovlfs.build.settings import format_duration, quote
from ovlfs.image.platform import host_platform

PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@pytest.fixture
def builds(scratch: Path, ovlfs: Ovlfs) -> Builds:
    return Builds(scratch, ovlfs)


def nop(comment: str) -> tuple[str, bool]:
    return f"/bin/sh -c #(nop) {comment}", True


def test_every_instruction_that_only_changes_the_config(builds: Builds) -> None:
    config = builds.config(
        "FROM scratch\n"
        "MAINTAINER me <me@example.org>\n"
        "ENV a=1 b=\"two words\" c='$a' d=$a\n"
        "ENV old  form with  spaces \n"
        "ENV a=2 e=$a\n"
        'LABEL l1=v1 "l 2"="v $b" l1=v3\n'
        "ARG x=1 y\n"
        "EXPOSE 443/TCP 80 $a 8000-8001/udp\n"
        'VOLUME ["/v 1", "/$a"]\n'
        "VOLUME /x /y\n"
        "USER $x:g\n"
        "STOPSIGNAL SIGRTMIN+3\n"
        'HEALTHCHECK --interval=1m30s --timeout=1500ms --start-period=1h --retries=3 CMD curl "x" || exit 1\n'
        'SHELL ["/bin/bash", "-ec"]\n'
        'CMD echo $a "x"\n'
        'ENTRYPOINT ["a", "b \\"c\\""]\n'
        "ONBUILD RUN echo  $a\n"
    )  # fmt: skip
    assert run_config(config) == {
        "Env": [PATH, "a=2", "b=two words", "c=$a", "d=", "old=form with  spaces", "e=1"],
        "Labels": {"l1": "v3", "l 2": "v two words"},
        "ExposedPorts": {"443/tcp": {}, "80/tcp": {}, "2/tcp": {}, "8000/udp": {}, "8001/udp": {}},
        "Volumes": {"/v 1": {}, "/2": {}, "/x": {}, "/y": {}},
        "User": "1:g",
        "StopSignal": "SIGRTMIN+3",
        "Healthcheck": {
            "Test": ["CMD-SHELL", 'curl "x" || exit 1'],
            "Interval": 90 * 10**9,
            "Timeout": 1500 * 10**6,
            "StartPeriod": 3600 * 10**9,
            "Retries": 3,
        },
        "Shell": ["/bin/bash", "-ec"],
        "Cmd": ["/bin/bash", "-ec", 'echo $a "x"'],
        "Entrypoint": ["a", 'b "c"'],
        "OnBuild": ["RUN echo  $a"],
    }
    assert config.author == "me <me@example.org>"
    assert config.platform == host_platform()
    assert history(config) == [
        nop(" MAINTAINER me <me@example.org>"),
        nop(" ENV a=1 b=two words c=$a d="),
        nop(" ENV old=form with  spaces"),
        nop(" ENV a=2 e=1"),
        nop(" LABEL l1=v1 l 2=v two words l1=v3"),
        nop(" ARG x=1 y"),
        nop(" EXPOSE 2 443/TCP 80 8000-8001/udp"),
        nop(" VOLUME [/v 1 /2]"),
        nop(" VOLUME [/x /y]"),
        nop(" USER 1:g"),
        nop(" STOPSIGNAL SIGRTMIN+3"),
        nop(' HEALTHCHECK &{["CMD-SHELL" "curl \\"x\\" || exit 1"] "1m30s" "1.5s" "1h0m0s" \'\\x03\'}'),
        ("/bin/bash -ec #(nop)  SHELL [/bin/bash -ec]", True),
        ('/bin/bash -ec #(nop)  CMD ["/bin/bash" "-ec" "echo $a \\"x\\""]', True),
        ('/bin/bash -ec #(nop)  ENTRYPOINT ["a" "b \\"c\\""]', True),
        ("/bin/bash -ec #(nop)  ONBUILD RUN echo  $a", True),
    ]


def test_entrypoint_resets_a_cmd_of_the_base_only(builds: Builds) -> None:
    base = "FROM scratch AS base\nCMD old\n"
    assert run_config(builds.config(base + "FROM base\nENTRYPOINT e\n"))["Cmd"] is None
    assert run_config(builds.config(base + 'FROM base\nCMD ["new"]\nENTRYPOINT e\n'))["Cmd"] == ["new"]
    assert run_config(builds.config("FROM scratch\nENTRYPOINT e\nCMD []\n"))["Cmd"] == []


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ("ENV a", "ENV must have two arguments"),
        ("ENV a=1 b", 'can\'t find = in "b": it must be of the form name=value'),
        ("ENV =1", "ENV names can not be blank"),
        ("LABEL a='x", "single-quote"),
        ("EXPOSE 99999", 'invalid range specified for the container port: "99999"'),
        ("EXPOSE x", 'invalid containerPort: "x"'),
        ("EXPOSE 80/icmp", 'invalid proto: "icmp"'),
        ('VOLUME [""]', "VOLUME specified can not be an empty string"),
        ("STOPSIGNAL SIGFOO", 'Invalid signal: "SIGFOO"'),
        ("SHELL /bin/sh", "SHELL requires the arguments to be in JSON form"),
        ("HEALTHCHECK FOO x", 'unknown type "FOO" in HEALTHCHECK (try CMD)'),
        ("HEALTHCHECK NONE x", "HEALTHCHECK NONE takes no arguments"),
        ("HEALTHCHECK CMD", "missing command after HEALTHCHECK CMD"),
        ("HEALTHCHECK --interval=1us CMD x", "cannot be less than 1ms"),
        ("HEALTHCHECK --interval=x CMD x", "invalid duration"),
        ("HEALTHCHECK --retries=0 CMD x", "--retries must be at least 1"),
        ("ENV a=${b:?missing}", "b: missing"),
        ("USER ${a", "unsupported modifier"),
        ("FROM", "FROM requires at least one argument"),
        ("FROM scratch AS 1x", "invalid name for build stage"),
        ("FROM scratch x", "requires either one or three arguments"),
        ("FROM $nope", "base name ($nope) should not be blank"),
        ("FROM debian:12", "debian: no such file or directory"),
    ],
)
def test_what_breaks_a_rule_names_the_line(builds: Builds, line: str, rule: str) -> None:
    said = builds.fails(f"FROM scratch\n\n{line}\n")
    assert said.startswith("Dockerfile:3: ")
    assert rule in said


def test_arg_values_come_from_the_command_line_the_default_and_the_global_one(builds: Builds) -> None:
    text = (
        "ARG global=g\nARG both=outer\nARG base=scratch\n"
        "FROM $base AS one\n"
        "ARG a=default\nARG b=default\nARG global\nARG both=inner\nARG unset\nARG TARGETARCH\nENV e=env\nARG e=arg\n"
        "LABEL all=$a,$b,$global,$both,${unset-none},$e,$TARGETARCH\n"
        "FROM one\n"
        "LABEL gone=${a-none}\n"
    )
    result = builds.run(text, "--build-arg", "b=given", "--build-arg", "nobody=asks", "--build-arg", "e=given")
    assert "[Warning] build-arg nobody was not consumed" in result.stderr
    labels = run_config(builds.config(text, "--build-arg", "b=given", "--build-arg", "e=given"))["Labels"]
    assert labels == {
        "all": f"default,given,g,inner,none,env,{host_platform().architecture}",
        "gone": "none",
    }


def test_duration_and_quotes_as_go_writes_them() -> None:
    shown = {
        0: "0s",
        10**6: "1ms",
        1500: "0.0015ms",
        10**9: "1s",
        61 * 10**9: "1m1s",
        3600 * 10**9 + 1: "1h0m0.000000001s",
    }
    assert {value: format_duration(value) for value in shown} == shown
    assert quote('a"\\\n\x00é\u200b') == '"a\\"\\\\\\n\\x00é\\u200b"'
