"""The time table: the same work for every peer, in turns."""

import argparse
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmark import layers, peers, plot, reach, work

_STANDARD = (peers.KERNEL, peers.FUSE_OVERLAYFS, peers.UNIONFS, peers.ovlfs(), peers.NO_LANE)


def chosen_peers(args: argparse.Namespace) -> list[peers.Peer]:
    """As the command line says.  Raises BenchError."""
    known = list(_STANDARD)
    for variant in args.variant:
        name, _, options = variant.partition("=")
        if not name or not options:
            raise peers.BenchError(f"--variant {variant}: NAME=OPTIONS should be given")
        known.append(peers.ovlfs(f"ovlfs {name}", options))
    if args.archive:
        known.append(peers.ARCHIVE)
    if args.peers:
        wanted = args.peers.split(",")
        for name in wanted:
            if name not in {peer.name for peer in known}:
                raise peers.BenchError(
                    f"--peers: there is no {name}; there are {', '.join(peer.name for peer in known)}"
                )
        known = [peer for peer in known if peer.name in wanted]
    found = peers.available(known)
    for peer in known:
        if peer not in found:
            print(f"# {peer.name} is not installed (Debian: apt-get install {peer.command[0]})", file=sys.stderr)
    return found


def main(args: argparse.Namespace) -> int:
    """Measure and print."""
    taking_part = chosen_peers(args)
    if args.pin is not None:
        os.sched_setaffinity(0, {args.pin})  # and so for all that is started: programs and daemons
    with peers.scratch(args.tmpfs, args.disk) as directory:
        image = layers.prepare(directory, args.image, args.lower, archive=args.archive)
        made = work.supplies(directory, image.directories, image.debs, args.scale)
        groups = _chosen(work.groups(made), args.only)
        results = reach.Results(taking_part, pinned=args.pin is not None, title=_title(args, image, made))
        print(f"# {results.title}", flush=True)
        measure(groups, results, image, directory, args.rounds)
    for line in reach.table(results):
        print(line)
    if args.json:
        reach.save(results, args.json)
    if args.plot:
        plot.draw(results, args.plot)
    return 0 if results.seconds else 1


def _title(args: argparse.Namespace, image: layers.Image, made: work.Supplies) -> str:
    place = f"disk ({args.disk})" if args.disk else "tmpfs"
    cpus = "everything on one CPU" if args.pin is not None else f"{os.cpu_count()} CPUs"
    scale = "" if args.scale == 1 else f", {args.scale:g} of the counts"
    layout = f"{len(image.directories)} layers, {len(made.files)} files"
    return f"{layout}, {place}, {cpus}, median of {args.rounds} rounds, Linux {os.uname().release}{scale}"


def _chosen(groups: Sequence[Sequence[work.Step]], only: str) -> list[list[tuple[work.Step, bool]]]:
    """Each group up to its last measured step; is the step measured?"""
    words = [word.strip() for word in only.split(",") if word.strip()]
    found = []
    for group in groups:
        marked = [(step, not words or any(word in step.name for word in words)) for step in group]
        while marked and not marked[-1][1]:
            marked.pop()
        if marked:
            found.append(marked)
    if not found:
        rows = ", ".join(step.name for group in groups for step in group)
        raise peers.BenchError(f"--only {only}: no workload has that in its name; there are {rows}")
    return found


def measure(
    groups: Sequence[Sequence[tuple[work.Step, bool]]],
    results: reach.Results,
    image: layers.Image,
    directory: Path,
    rounds: int,
) -> None:
    """Every round: every group, by every peer.  A peer that fails has no result for that step; why goes to stderr."""
    told: set[str] = set()

    def tell(message: str) -> None:
        if message not in told:
            told.add(message)
            print(f"# {message}", file=sys.stderr, flush=True)

    env = peers.environment(directory / "ovlfs")
    for group in groups:
        for step, measured in group:
            if measured:
                results.seconds[step.name] = {}
    for number in range(rounds):
        for group in groups:
            first: dict[str, int | None] = {}
            # Whoever comes first finds the machine as the last left it: take turns in that, too.
            turn = number % len(results.peers)
            for peer in results.peers[turn:] + results.peers[:turn]:
                place = directory / "mounted"
                try:
                    with peers.mounted(peer, image.directories, place, archive=image.archive, env=env) as mnt:
                        for step, measured in group:
                            if step.before is not None:
                                step.before(mnt)
                            if step.cold:
                                peers.drop_caches()
                            began = time.perf_counter()
                            did = step.action(mnt)
                            took = time.perf_counter() - began
                            if measured:
                                results.add(step.name, peer.name, took)
                            if did != first.setdefault(step.name, did):
                                tell(f"{peer.name}: {step.name}: did {did}, another {first[step.name]}")
                except (OSError, peers.BenchError) as error:
                    tell(f"{peer.name}: {group[-1][0].name}: {error}")
                shutil.rmtree(directory / "ovlfs/logs", ignore_errors=True)
        print(f"# round {number + 1} of {rounds} done", file=sys.stderr, flush=True)
