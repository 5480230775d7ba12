"""Lessons 1 to 3: what a name in the merged tree is, and how a name can be gone.

Kernel: fs/overlayfs/namei.c: ovl_lookup(); dir.c: ovl_remove_and_whiteout(), ovl_create_over_whiteout().
"""

from ovlfs.explain.lesson import Talk, World


def lookup_order(world: World, talk: Talk) -> None:
    """Top first; the first file wins; directories merge."""
    talk.say(
        """
        An overlay shows several directories as one. The lower directories are never written to; a single upper
        directory takes all changes. The kernel gets them in one line, topmost lower directory first.
        """
    )
    world.lower({"motd": "from lower1\n", "etc/hosts": "127.0.0.1\n", "opt/tool": "a tool\n"})
    world.lower({"motd": "from lower2\n", "etc/fstab": "none\n", "opt": "a file\n"})
    world.show_lowers()
    world.mount()

    question = talk.ask(
        "Both lower directories have motd. What does `cat merged/motd` print?",
        {"a": "from lower1", "b": "from lower2", "c": "both, one after the other"},
    )
    seen = world.cat("merged/motd")
    question.answer(
        {"from lower1\n": "a", "from lower2\n": "b", "from lower2\nfrom lower1\n": "c"}.get(seen or ""),
        "b",
        """
        A lookup asks the layers from the top down: upper (which has nothing yet), lower2, lower1. The first that has
        something which is not a directory wins, and nobody further down is asked. Contents never merge.
        """,
    )

    question = talk.ask(
        "Both have the directory etc, with different files in it. What does `ls merged/etc` print?",
        {"a": "fstab", "b": "hosts", "c": "fstab and hosts"},
    )
    names = world.ls("merged/etc")
    question.answer(
        {"fstab": "a", "hosts": "b", "fstab hosts": "c"}.get(" ".join(names)),
        "c",
        """
        Directories merge: a lookup that finds a directory goes on, and collects every directory of that name further
        down. Inside, the same rule holds name by name.
        """,
    )

    question = talk.ask(
        "opt is a file in lower2 and a directory in lower1. What is merged/opt?",
        {"a": "a file", "b": "a directory with tool in it", "c": "an error, since they contradict each other"},
    )
    seen = world.cat("merged/opt")
    question.answer(
        "a" if seen == "a file\n" else None,
        "a",
        """
        The file is found first, and ends the lookup, so the directory below and all that is in it is hidden. Had a
        directory been on top and the file below, the directory would show, and nothing below that file would merge with
        it. In the code: ovl_lookup() in the kernel, layer/merge.py in ovlfs, with the same steps.
        """,
    )


def whiteout(world: World, talk: Talk) -> None:
    """Removing what cannot be written to."""
    talk.say(
        """
        The lower directories are never written to. Still, every file that they show can be removed. Where does the
        overlay write down that something is not there?
        """
    )
    world.lower({"motd": "hello\n", "etc/passwd": "root\n"})
    world.show_lowers()
    world.mount()

    question = talk.ask(
        "What will be in upper after `rm merged/motd`?",
        {"a": "nothing", "b": "something named motd that marks it as gone", "c": "a list of removed names"},
    )
    world.rm("merged/motd")
    found = world.show_upper()
    gone = world.cat("merged/motd") is None
    question.answer(
        "b" if gone and found == {"motd": "whiteout"} else "a" if not found else None,
        "b",
        """
        A whiteout: an object in upper with the name that is gone, a character device with the numbers 0 and 0, which no
        driver has. (Where no such device can be made, an empty file with the xattr overlay.whiteout.) A lookup that
        meets it stops: there is no such name. In a layer of an image, which is a tar, the same is said by an empty file
        named .wh.motd; ovlfs translates.
        """,
    )
    talk.say("The file itself is where it always was:")
    world.cat("lower1/motd")

    question = talk.ask(
        "Now a file that only upper has: `echo x > merged/new` and then `rm merged/new`. What stays in upper?",
        {"a": "a whiteout for new", "b": "nothing named new"},
    )
    world.write("merged/new", "x")
    world.rm("merged/new")
    found = world.show_upper()
    question.answer(
        {"whiteout": "a"}.get(found.get("new", ""), "b" if "new" not in found else None),
        "b",
        """
        Nothing below has that name, so there is nothing to hide: the file is simply unlinked. A whiteout is made only
        where the layers below would show something.
        """,
    )

    question = talk.ask(
        "motd has a whiteout. What happens to it on `echo again > merged/motd`?",
        {"a": "it stays beside the new file", "b": "the new file takes its place", "c": "the file cannot be made"},
    )
    world.write("merged/motd", "again")
    found = world.show_upper()
    question.answer(
        "b" if found == {"motd": "file"} else None,
        "b",
        """
        There can be only one object of a name in upper, and a file hides what is below as well as a whiteout does. The
        new file is made in workdir and then renamed over the whiteout, in one step: at no moment could anybody have
        seen the old motd of lower1 shine through.
        """,
    )


def opaque(world: World, talk: Talk) -> None:
    """A new directory where an old one was."""
    talk.say(
        """
        Directories of one name merge. But what if a directory is removed, and then made anew? The new one must be
        empty, although lower1 still has the old one with its files.
        """
    )
    world.lower({"etc/hosts": "127.0.0.1\n", "etc/passwd": "root\n"})
    world.show_lowers()
    world.mount()

    question = talk.ask(
        "`rm -r merged/etc` removes two files and a directory. How many whiteouts are in upper afterwards?",
        {"a": "three, one for each", "b": "one, for etc", "c": "two, for the files"},
    )
    world.rm("merged/etc")
    found = world.show_upper()
    question.answer(
        "b" if found == {"etc": "whiteout"} else None,
        "b",
        """
        While rm was at work there were whiteouts for hosts and passwd, in a directory upper/etc made for them. Once etc
        itself went, one whiteout in its place said it all.
        """,
    )

    question = talk.ask(
        "Now `mkdir merged/etc`. How is upper/etc kept from merging with lower1/etc?",
        {
            "a": "the whiteout stays beside it",
            "b": "it has a whiteout in it for every name that lower1/etc has",
            "c": "it carries a mark",
        },
    )
    world.mkdir("merged/etc")
    found = world.show_upper()
    names = world.ls("merged/etc")
    question.answer(
        "c" if found == {"etc": "directory"} and not names and world.mark("etc", "opaque") == "y" else None,
        "c",
        """
        An opaque directory: the xattr overlay.opaque with the value y. A lookup that finds it uses it, and does not
        look further down. One mark, however much is below. (In the tar of an image's layer: a file .wh..wh..opq in it.)
        """,
    )

    question = talk.ask(
        "`echo new > merged/etc/hosts`: what does `ls merged/etc` show?",
        {"a": "hosts", "b": "hosts and passwd"},
    )
    world.write("merged/etc/hosts", "new")
    names = world.ls("merged/etc")
    question.answer(
        {"hosts": "a", "hosts passwd": "b"}.get(" ".join(names)),
        "a",
        """
        Opaque holds for the whole directory, for good: passwd of lower1 does not come back. And lower1 is what it was:
        """,
    )
    world.ls("lower1/etc")
