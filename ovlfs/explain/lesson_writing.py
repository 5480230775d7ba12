"""Lessons 4 to 7: how what cannot be written to is changed, and what of it stays.

Kernel: fs/overlayfs/copy_up.c: ovl_copy_up_one(); dir.c: ovl_rename(), ovl_set_redirect(); inode.c: ovl_getattr();
Documentation/filesystems/overlayfs.rst "Non-standard behavior", "Inode properties".
"""

import os

from ovlfs.explain.lesson import Talk, World

_BIG = "0123456789abcde\n" * (64 * 1024)


def copy_up(world: World, talk: Talk) -> None:
    """The first write."""
    talk.say(
        """
        A file of a lower directory cannot be changed where it lies. When somebody wants to, the overlay copies it to
        upper first: the copy-up. The question is when, and how much.
        """
    )
    world.lower({"srv/big": _BIG, "srv/small": "small\n"})
    world.show_lowers()
    world.mount()

    question = talk.ask(
        "`cat merged/srv/small` reads a file. What is in upper afterwards?",
        {"a": "nothing", "b": "a copy of small, to be faster the next time"},
    )
    world.cat("merged/srv/small")
    found = world.show_upper()
    question.answer(
        "b" if "srv/small" in found else "a" if not found else None,
        "a",
        """
        Reading never copies. The bytes come from lower1, every time.
        """,
    )

    question = talk.ask(
        "`chmod 600 merged/srv/big` changes the mode of a file of 1 MiB. How many bytes of data are copied?",
        {"a": "none: only mode, owner, times and xattrs are", "b": "all of it"},
    )
    world.chmod(0o600, "merged/srv/big")
    found = world.show_upper()
    happened = "a" if world.mark("srv/big", "metacopy") is not None and world.data_bytes("srv/big") == 0 else None
    if happened is None and world.data_bytes("srv/big") >= len(_BIG):
        happened = "b"
    if world.trusted:
        question.answer(
            happened,
            "a",
            """
            upper/srv/big is a metacopy: it has the size and the new mode, but its data is one hole, and the xattr
            overlay.metacopy says that the data is the file of that name below. The kernel does this with metacopy=on
            (its default is to copy everything), ovlfs always.
            """,
        )
    else:
        question.answer(
            happened,
            "b",
            """
            With root's rights only the metadata would be copied, and the xattr overlay.metacopy would say that the data
            is still below. Without them the marks are user.* xattrs, which any owner of a file can forge, so the kernel
            does not follow a metacopy there, and ovlfs makes none.
            """,
        )
    talk.say("The directory srv had to be there for it, so it was copied up first; what is in it was not.")

    question = talk.ask(
        "`echo end >> merged/srv/big` appends four bytes. How many bytes of data does upper/srv/big hold then?",
        {"a": "4", "b": "one block of 4096", "c": "all, 1 MiB and 4"},
    )
    world.write("merged/srv/big", "end", append=True)
    world.show_upper()
    held = world.data_bytes("srv/big")
    question.answer(
        "c" if held >= len(_BIG) else "a" if held == 0 else "b",
        "c",
        """
        A write copies up the whole file, to a temporary file in workdir, which then takes its place in one rename. That
        is the price of the first byte written to a big lower file; the second is free. The file below is what it was:
        changing a file in a later layer never makes an image smaller.
        """,
    )
    talk.line(f"$ stat -c %s lower1/srv/big\n{os.stat(world.path('lower1/srv/big')).st_size}")


def rename(world: World, talk: Talk) -> None:
    """Moving a directory that is not there to be moved."""
    talk.say(
        """
        Renaming a file of a lower directory is a copy-up under the new name and a whiteout under the old one. But a
        directory with a million files in it?
        """
    )
    world.lower({"docs/a": "one\n", "docs/b": "two\n"})
    world.show_lowers()
    world.mount()

    question = talk.ask(
        "What does rename(2) of merged/docs to merged/papers do?",
        {
            "a": "copies docs and all its files to upper, under the new name",
            "b": "makes an empty directory papers in upper that says where its files are",
            "c": "fails with EXDEV, as between two file systems",
        },
    )
    failed = world.rename("merged/docs", "merged/papers")
    found = world.show_upper()
    pointed = found == {"docs": "whiteout", "papers": "directory"} and world.mark("papers", "redirect") is not None
    happened = "c" if failed == os.strerror(18) else "b" if pointed else None
    if not world.trusted:
        question.answer(
            happened,
            "c",
            """
            With root's rights, upper would get an empty directory papers with the xattr overlay.redirect, which names
            where to look further down. Without them it would be a user.* xattr that any owner can forge, so the kernel
            follows none there, and ovlfs makes none over directories. (In an image it does: nobody else reads that
            upper.) mv(1) knows EXDEV, and then copies file by file:
            """,
        )
        world.mv("merged/docs", "merged/papers")
        world.show_upper()
        world.ls("merged/papers")
        return
    question.answer(
        happened,
        "b",
        """
        The xattr overlay.redirect of upper/papers is a name: a lookup goes on below under docs, where it would have
        gone on under papers. Not one file was copied. A whiteout hides the old name. The kernel needs redirect_dir=on
        for this, and says EXDEV otherwise; mv(1) then copies everything.
        """,
    )
    world.ls("merged/papers")

    question = talk.ask(
        "`mkdir merged/docs` now, where the whiteout is. Does it show a and b again?",
        {"a": "yes, lower1/docs is still there", "b": "no, it is empty"},
    )
    world.mkdir("merged/docs")
    names = world.ls("merged/docs")
    world.show_upper()
    question.answer(
        "b" if not names and world.mark("docs", "opaque") == "y" else "a" if names else None,
        "b",
        """
        The new docs takes the place of a whiteout, so it is opaque (lesson 3). papers still finds its files: its
        redirect is followed in lower1, and there docs is what it always was.
        """,
    )

    question = talk.ask(
        "`mv merged/papers/a merged/papers/c`: what of the file is in upper/papers?",
        {"a": "nothing but a whiteout for a", "b": "c, as a file of its own, and a whiteout for a"},
    )
    world.mv("merged/papers/a", "merged/papers/c")
    found = world.show_upper()
    question.answer(
        "b" if (found.get("papers/a"), found.get("papers/c")) == ("whiteout", "file") else None,
        "b",
        """
        A file has to be in upper to have another name, but with metacopies its data stays below all the same. c has
        both marks: overlay.metacopy, and overlay.redirect, which says under which name the data is.
        """,
    )
    talk.differs(
        """
        The kernel writes one name, a, because the file stays in its directory and has no other hard links. ovlfs always
        writes the path from the root of the layers. Each understands both.
        """
    )
    world.cat("merged/papers/c")


def links_and_inodes(world: World, talk: Talk) -> None:
    """Is it still the same file?"""
    talk.say(
        """
        A copy-up makes another inode, in another directory. Programs that hold a file by its inode number (tar, find,
        git, editors) must not notice; and a file with two names must not become two files.
        """
    )
    world.lower({"one": "text\n", "alone": "alone\n"}, links={"two": "one"})
    world.show_lowers()
    talk.say("one and two are hard links: two names of one inode. What we see of them:")
    world.mount()
    before = world.inode("merged/one")
    world.inode("merged/two")
    alone = world.inode("merged/alone")

    question = talk.ask(
        "`echo more >> merged/alone` copies it up, to a new inode in upper. Which number does stat show then?",
        {"a": "the new inode's", "b": "the one from before"},
    )
    world.write("merged/alone", "more", append=True)
    after = world.inode("merged/alone")
    world.show_upper()
    question.answer(
        "b" if after == alone else "a",
        "b",
        """
        The number of the lower inode is shown before and after. upper/alone carries overlay.origin, a file handle of
        the lower inode, so that the number is found again also after a remount. (Where the layers lie on several file
        systems, the kernel needs xino for this; ovlfs always has numbers of its own.)
        """,
    )

    question = talk.ask(
        "`echo more >> merged/one` copies up one of the two names. What does `cat merged/two` print?",
        {"a": "text: the link is broken, they are two files now", "b": "text and more: they are still one file"},
    )
    world.write("merged/one", "more", append=True)
    seen = world.cat("merged/two")
    one, two = world.inode("merged/one"), world.inode("merged/two")
    together = seen == "text\nmore\n" and one == two == before
    question.answer(
        "b" if together else "a" if seen == "text\n" else None,
        "b",
        """
        They are one file still, with the one inode number from before. For the kernel this takes index=on: an index in
        workdir has one entry for each lower inode with several names, and every name that is looked up finds the copy
        there. Without it, which is the default, the answer is a: the links are broken, and only one was changed. ovlfs
        keeps the links always.
        """,
    )
    talk.say("Where are the names in upper?")
    world.show_upper()
    if world.mounter.is_kernel:
        talk.differs(
            """
            The kernel put only the name that was written to in upper; the other is found through the index. ovlfs has
            no index, so it links all names at once, and upper itself says which names are one file.
            """
        )
    else:
        talk.differs(
            """
            ovlfs linked all names at once: it has no index, so upper itself says which names are one file. The kernel
            puts only the name that was written to in upper, and finds the other through its index.
            """
        )


def remount(world: World, talk: Talk) -> None:
    """What is the state of an overlay, and where is it kept?"""
    talk.say(
        """
        The last lesson: everything at once, then unmount, and mount again. What an overlay knows is in its directories,
        or it is lost.
        """
    )
    world.lower({"etc/hosts": "127.0.0.1\n", "etc/passwd": "root\n", "etc/fstab": "none\n"})
    world.show_lowers()
    world.mount()
    world.write("merged/etc/hosts", "more", append=True)
    world.rm("merged/etc/passwd")
    world.write("merged/new", "new")
    before = world.inode("merged/etc/hosts")
    world.show_upper()
    world.unmount()

    question = talk.ask(
        "Unmounted. What does `ls merged` print?",
        {"a": "etc and new", "b": "nothing", "c": "new"},
    )
    names = world.ls("merged")
    question.answer(
        {"": "b", "etc new": "a", "new": "c"}.get(" ".join(names)),
        "b",
        """
        merged was only the place where the overlay was shown: an empty directory of its own. lower1 and upper are where
        everything is, and they are plain directories.
        """,
    )

    question = talk.ask(
        "The same mount once more. Which of the changes are there: hosts longer, passwd gone, new there?",
        {"a": "all of them", "b": "hosts and new, but passwd is back", "c": "none"},
    )
    world.mount()
    text, names = world.cat("merged/etc/hosts"), world.ls("merged/etc")
    new = world.cat("merged/new")
    kept = (text == "127.0.0.1\nmore\n", names == ["fstab", "hosts"], new == "new\n")
    question.answer(
        {(True, True, True): "a", (True, False, True): "b", (False, False, False): "c"}.get(kept),
        "a",
        """
        Files, whiteouts and marks in upper are all there is to know. That is why upper can be copied, if its xattrs and
        devices are (cp -a, rsync -aX, tar --xattrs as root), or made into a layer of an image; and why two mounts must
        never use one upper at the same time. (With index=on the kernel binds an upper to its lower directories by their
        file handles, and refuses copies.)
        """,
    )

    question = talk.ask(
        "hosts was copied up before the unmount. Is its inode number still the same?",
        {"a": "yes", "b": "no, it is the upper inode's now"},
    )
    after = world.inode("merged/etc/hosts")
    question.answer(
        "a" if before == after else "b",
        "a",
        """
        overlay.origin in upper names the lower inode by its file handle, whose number is shown. (On a lower file system
        without file handles there is no origin, and the kernel would show the upper inode's number from now on.)
        """,
    )

    question = talk.ask(
        "Unmount for good, and mount nothing but lower1, read-only. Which hosts would one see?",
        {"a": "127.0.0.1 and more", "b": "127.0.0.1"},
    )
    world.unmount()
    seen = world.cat("lower1/etc/hosts")
    question.answer(
        {"127.0.0.1\nmore\n": "a", "127.0.0.1\n": "b"}.get(seen or ""),
        "b",
        """
        No change ever reached lower1. That is the whole point: any number of overlays can share one lower directory, as
        all containers of an image share its layers, each with an upper of its own.
        """,
    )
