"""The same Dockerfiles, built here and by docker (its classic builder): the same config, history and tree."""

import gzip
import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from archives import tar
from helpers_build import Builds, Ovlfs, fill, rootfs
from helpers_docker import Docker
from helpers_tree import Tree, look

pytestmark = [pytest.mark.fuse, pytest.mark.root, pytest.mark.slow]

SECOND = 10**9

OUR_OWN = {"Id", "RepoTags", "RepoDigests", "Parent", "Created", "Container", "ContainerConfig", "DockerVersion",
           "Size", "VirtualSize", "GraphDriver", "Metadata"}  # fmt: skip
"""What differs between any two builds, and what only the classic builder notes: which container it committed."""

TOUCHED = {".", "etc"}
"""Docker puts resolv.conf and others into /etc below each RUN (its "init layer"), so these get a new time."""


@pytest.fixture(scope="module")
def docker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Docker]:
    with Docker.at(tmp_path_factory.mktemp("docker")) as found:
        yield found


@pytest.fixture
def builds(scratch: Path, ovlfs: Ovlfs, monkeypatch: pytest.MonkeyPatch) -> Builds:
    monkeypatch.setenv("DOCKER_BUILDKIT", "0")
    found = Builds(scratch, ovlfs)
    (found.context / "rootfs.tar.xz").write_bytes(rootfs().read_bytes())
    return found


def check_same(builds: Builds, docker: Docker, dockerfile: str, *arguments: str, base: str = "") -> None:
    """Build both, and compare all that can be seen of the images.  `base`: what docker calls the build-arg `base`."""
    start = time.time_ns() - SECOND
    image = builds.image(dockerfile, *arguments)
    ours = f"built:{builds.count}"
    docker.run("load", "-i", os.fsdecode(image.path))
    their_arguments = [f"base={base}" if argument.startswith("base=") else argument for argument in arguments]
    docker.run("build", "--network=none", "-t", "theirs", *their_arguments, builds.context)
    check_same_documents(docker.config(ours), docker.config("theirs"))
    assert history(docker, ours) == history(docker, "theirs")
    with tree(docker, builds.scratch / "kernel") as theirs, builds.mounted(image) as mine:
        check_same_trees(look(bytes(mine)), look(bytes(theirs)), start)


@contextmanager
def tree(docker: Docker, mountpoint: Path) -> Iterator[Path]:
    """The tree of docker's image; a single layer is a tree already, and no overlay."""
    layers = docker.config("theirs")["GraphDriver"]["Data"]
    if "LowerDir" not in layers:
        yield Path(layers["UpperDir"])
        return
    with docker.tree("theirs", mountpoint) as merged:
        yield merged


def check_same_documents(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    for document in (ours, theirs):
        document["Config"].pop("Image")  # the id of the step before
        document["RootFS"] = len(document["RootFS"]["Layers"])
    assert {key: ours.get(key) for key in theirs.keys() - OUR_OWN} == {
        key: theirs[key] for key in theirs.keys() - OUR_OWN
    }


def history(docker: Docker, name: str) -> list[tuple[str, bool]]:
    """(created_by, whether there is no layer); docker's hash of what was copied is of its own tar of the context."""
    lines = docker.run("history", "--no-trunc", "--format", "{{json .}}", name).splitlines()
    found = [(line["CreatedBy"], line["Size"] == "0B") for line in map(json.loads, lines)]
    return [(re.sub(r"(file|dir|multi):[0-9a-f]{64}", r"\1:HASH", created_by), empty) for created_by, empty in found]


def check_same_trees(ours: Tree, theirs: Tree, start: int) -> None:
    assert ours.keys() == theirs.keys()
    for path, line in theirs.items():
        for key in line.keys() - {"ino", "d_ino", "mtime_ns"}:
            assert (path, key, ours[path][key]) == (path, key, line[key])
        mine, other = ours[path]["mtime_ns"], line["mtime_ns"]
        made_now = mine >= start and other >= start
        if not made_now and path not in TOUCHED:
            assert (path, mine // SECOND) == (path, other // SECOND)


def test_the_three_lines_of_a_base_image(builds: Builds, docker: Docker) -> None:
    check_same(builds, docker, 'FROM scratch\nADD rootfs.tar.xz /\nCMD ["bash"]\n')


def test_a_build_of_two_stages(builds: Builds, docker: Docker) -> None:
    fill(builds.context, {"src/main.sh": b"#!/bin/sh\necho hello $1\n", "src/doc/README": b"read me\n"})
    os.chmod(builds.context / "src/main.sh", 0o755)
    check_same(
        builds,
        docker,
        "ARG version=1\n"
        "FROM scratch AS build\n"
        "ADD rootfs.tar.xz /\n"
        "ARG version\n"
        "WORKDIR /src\n"
        "COPY src .\n"
        'RUN mkdir -p /out/bin && sed "s/hello/hello $version/" main.sh > /out/bin/hello && chmod 755 /out/bin/hello\n'
        "RUN true\n"
        "FROM scratch\n"
        "ADD rootfs.tar.xz /\n"
        "COPY --from=build /out /usr/local\n"
        "COPY --from=0 --chown=1:2 /src/doc/ /doc/\n"
        "ENV version=1\n"
        "EXPOSE 8080/tcp\n"
        "USER 1000:1000\n"
        'ENTRYPOINT ["/usr/local/bin/hello"]\n'
        'CMD ["world"]\n',
        "--build-arg=version=2",
    )


def test_every_instruction(builds: Builds, docker: Docker) -> None:
    context = fill(
        builds.context,
        {
            "dir/a": b"a", "dir/sub/b": b"b", "dir/sub/deep": None, "dir/link": "a", "dir/no/x": b"x",
            "dir/no/yes": b"", "one.txt": b"1", "two.txt": b"2", "sub": "dir/sub", "abs": "/one.txt",
            "sp ace/f ile": b"s", "x.md": b"", ".dockerignore": b"dir/no\n!dir/no/yes\n# x\n*.md\n",
            "plain.gz": gzip.compress(b"no tar"),
        },
    )  # fmt: skip
    members = {"usr/lib/l": b"l", "only/implied/i": b"i", "usr/link": "lib/l", "new/": None}
    (context / "some.tar.gz").write_bytes(gzip.compress(tar(members, uid=7, gid=8)))
    os.chmod(context / "dir/sub", 0o750)
    os.chmod(context / "dir/a", 0o604)
    os.link(context / "dir/a", context / "dir/hard")
    for name in ("dir/sub", "dir/sub/b", "dir/sub/deep", "one.txt"):
        os.utime(context / name, ns=(0, 981_173_106_789_000_000))
    check_same(
        builds,
        docker,
        "ARG global=g\n"
        "FROM scratch AS one\n"
        "ADD rootfs.tar.xz /\n"
        "MAINTAINER me <me@example.org>\n"
        "ENV A=1 B=\"two words\" C='$A' D=$A$B E=${NOPE:-def} F=${A:+yes} G=a\\ b\n"
        "ENV A=2 H=$A\n"
        "ENV OLD form with  spaces\n"
        'LABEL l1=v1 "l 2"="v 2" l3=$B\n'
        "ARG X=xd\nARG global\nARG none\n"
        'RUN echo "$X $global $none $A" > /args && mkdir -p /home/u\n'
        "RUN ln -s /home/u /hlink && ln -s nowhere/x /dangling\n"
        "RUN echo 'u:x:1234:1235::/home/u:/bin/sh' >> /etc/passwd && printf 'g:x:77:\\nu:x:1235:\\n' >> /etc/group\n"
        "WORKDIR /work\nWORKDIR rel/dir\n"
        "COPY dir .\nCOPY dir /newdir\nCOPY dir/ /newdir/sub/\n"
        "COPY --chown=u:g dir/sub /chowned/deep/x\nCOPY --chown=u one.txt two.txt /chowned2/p/\n"
        "COPY one.txt /hlink\nCOPY one.txt /hlink/renamed\nCOPY two.txt /dangling\n"
        "COPY sub/b sub abs /links/\nCOPY *.txt /globs/\nCOPY dir/* /flat/\n"
        'COPY ["sp ace/f ile", "/sp ace/"]\n'
        "ADD some.tar.gz /un/packed\nADD some.tar.gz /\nADD plain.gz two.txt /un3/\n"
        "USER u\n"
        "RUN pwd > /tmp/pwd; umask >> /tmp/pwd; env | grep -v HOSTNAME | sort > /tmp/env; id -u > /tmp/id\n"
        "USER root\n"
        "RUN rm -rf /newdir/sub && mkdir /newdir/sub && rm /newdir/a && touch /x && rm /x\n"
        "RUN true\n"
        'RUN ["/bin/sh", "-c", "echo exec > /exec"]\n'
        "COPY dir/sub /newdir/sub\nCOPY dir /hlink/\n"
        'SHELL ["/bin/sh", "-ec"]\n'
        "RUN echo shell > /shell\n"
        "EXPOSE 80 443/tcp 53/udp 8000-8002\n"
        'VOLUME /data /v2\nVOLUME ["/v 3"]\n'
        "STOPSIGNAL SIGINT\n"
        'HEALTHCHECK --interval=90s --timeout=1m30s --retries=3 CMD curl "x" || exit 1\n'
        "ONBUILD RUN echo trigger > /trigger\nONBUILD COPY one.txt /trigger2\n"
        'CMD echo "cmd"\nENTRYPOINT ["/bin/sh", "-c", "echo \\"q\\" $A"]\n',
    )


def test_triggers_and_what_an_entrypoint_resets(builds: Builds, docker: Docker) -> None:
    """The base is an image: docker gets it by `docker load`."""
    text = 'FROM scratch\nADD rootfs.tar.xz /\nENV a=1\nONBUILD RUN echo $a > /t\nCMD ["x"]\nHEALTHCHECK NONE\n'
    base = builds.image(text)
    (builds.context / ".dockerignore").write_text("base.tar\n")
    (builds.context / "base.tar").write_bytes(Path(os.fsdecode(base.path)).read_bytes())
    docker.run("load", "-i", os.fsdecode(base.path))
    text = "ARG base\nFROM $base\nLABEL x=y\nENTRYPOINT y\nWORKDIR /trail/\n"
    check_same(builds, docker, text, "--build-arg", "base=base.tar", base=f"built:{builds.count}")


ODD = r"""
FROM scratch
COPY one.txt /base
ENV x=1
ENV a b c
ENV a="b c" d='e f' g=h\ i
ENV a=b\
 c=d
ENV a= b="" c=$x$$x \$d=e "a b"=c
ENV e=${b:-x\ y} f==b
ENV h "b c" 'd'
ENV i b\ c
ENV j=b#c
LABEL "com.example"="x" a=b\
c
LABEL b "c" d
CMD
CMD []
CMD ["a", "b",]
CMD ["a" "b"]
CMD ['a']
CMD [ "a" ]
CMD   echo   x  y
CMD ["\u00e9é\n\t\\"]
CMD echo \
  x
ENTRYPOINT []
ENTRYPOINT
ENTRYPOINT [""]
EXPOSE 127.0.0.1:80:90 8080:81 83/TCP 84/sctp "85" 00086
VOLUME a b
VOLUME ["c", " d "]
VOLUME /a/../b
USER a b
USER "c d"
USER 1:2:3
WORKDIR a/../b
WORKDIR /a/../b/
WORKDIR /a//b
WORKDIR "a b"
WORKDIR c d
WORKDIR ./
WORKDIR ..
WORKDIR \$x
STOPSIGNAL 9
STOPSIGNAL kill
STOPSIGNAL RTMAX-3
HEALTHCHECK none
HEALTHCHECK cmd a
HEALTHCHECK --interval=1.5h --retries=2147483647 CMD ["a"]
SHELL ["a"]
ONBUILD cmd a
ONBUILD   RUN   a   b
ONBUILD ADD f /
ARG a b="b c" "c"=d e=$x
MAINTAINER "a b"
COPY "one.txt" /
COPY   one.txt  ./x/..
COPY one.txt nope/
copy one.txt /$x/y
COPY . /all
COPY dir/.. /up
"""


def test_odd_spellings(builds: Builds, docker: Docker) -> None:
    """Config and history of what docker accepts, however strange it is."""
    fill(builds.context, {"one.txt": b"1", "dir/f": b"2"})
