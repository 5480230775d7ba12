"""The seven lessons, in the order in which they build on each other."""

from ovlfs.explain import lesson_looking, lesson_writing
from ovlfs.explain.lesson import Lesson

LESSONS = (
    Lesson("lookup order", lesson_looking.lookup_order),
    Lesson("whiteout", lesson_looking.whiteout),
    Lesson("opaque", lesson_looking.opaque),
    Lesson("copy-up", lesson_writing.copy_up),
    Lesson("rename and redirect", lesson_writing.rename),
    Lesson("hard links and inode numbers", lesson_writing.links_and_inodes),
    Lesson("what survives a remount", lesson_writing.remount),
)
