/*
 * dirlayer.h - what a directory on disk says, as a layer
 *
 * Problem.  A layer can be a directory: an unpacked image, or the upperdir.  It says "this name is gone" and "nothing
 * below shows" in three dialects; here they become the four answers of enum ovl_what (index.h).  The readable
 * reference is ovlfs/layer/directory.py (DirLayer); this file gives the same answers without the interpreter.
 *
 *                      kernel                                OCI, unpacked (lower only)   fuse-overlayfs (lower only)
 *      whiteout        char 0:0; empty file + xattr          .wh.NAME
 *                      overlay.whiteout
 *      opaque          overlay.opaque = "y"                  .wh..wh..opq inside          user.fuseoverlayfs.opaque = "y"
 *
 * What it does not decide: an object with overlay.redirect or overlay.metacopy, an override_stat that is not written
 * the usual way.  Then the answer is OVL_ASK, and the caller asks the reference.
 *
 * Confinement: whatever lies in a layer, no access leaves it.  Paths are opened with openat2(2), RESOLVE_BENEATH |
 * RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS, from the layer's root; below an open directory only single names are
 * used, never followed.  Xattrs of a name are read through /proc/self/fd/N/NAME (there is no fgetxattr for O_PATH).
 *
 * Concurrency: `struct ovl_dirlayer` is immutable.  Every function may run in any thread.
 *
 * Errors: 0 or -errno, or OVL_ASK, OVL_ABSENT where stated.  Never sets errno for the caller to look at.
 */
#ifndef OVL_DIRLAYER_H
#define OVL_DIRLAYER_H

#include <sys/stat.h>

#include "index.h"

/* Not errors.  OVL_ABSENT is apart from -ENOENT, which says that a layer has lost what it had. */
#define OVL_ASK 1    /* the reference has to answer this one */
#define OVL_ABSENT 3 /* there is no such name */

#define OVL_NAME_MAX 255u

/* Attributes of an inode, as ovlfs.layer.base.Attr: sizes in bytes, blocks of 512, times in ns (saturating). */
struct ovl_attr {
	uint64_t size;
	uint64_t blocks;
	int64_t atime_ns;
	int64_t mtime_ns;
	int64_t ctime_ns;
	uint32_t mode;
	uint32_t nlink;
	uint32_t uid;
	uint32_t gid;
	uint32_t rdev;
	uint32_t reserved;
};
static_assert(sizeof(struct ovl_attr) == 64, "attributes are kept once per inode: mind the size");

struct ovl_dirlayer {
	int root;              /* borrowed: a descriptor of the layer's root */
	bool oci;              /* .wh. names are whiteouts */
	bool override;         /* user.containers.override_stat is believed */
	size_t prefix_count;   /* the overlay.* namespaces that are believed, first wins */
	const char *prefix[2]; /* borrowed; "trusted.overlay." and the like */
};

/* One name: `st` is of the object itself. */
struct ovl_dir_entry {
	enum ovl_what what; /* never OVL_LINK_BELOW */
	bool opaque;
	struct stat st;
};

/* Opens `path` (relative; `len` 0: the root itself) with open(2) `flags`.  A new descriptor (close-on-exec) that is
 * the caller's, or -errno. */
int ovl_dirlayer_open(const struct ovl_dirlayer *layer, const uint8_t *path, size_t len, int flags);

/* What the layer says about `name` in the directory `dirfd` (O_PATH will do).  OVL_ABSENT: nothing.  OVL_ASK: the
 * object is redirected, or metadata only. */
ovl_err_t ovl_dirlayer_lookup(const struct ovl_dirlayer *layer, int dirfd, const uint8_t *name, size_t len,
			      struct ovl_dir_entry *out);

/* The attributes of an object that ovl_dirlayer_lookup found.  OVL_ASK: its override_stat needs reading with care. */
ovl_err_t ovl_dirlayer_attr(const struct ovl_dirlayer *layer, int dirfd, const uint8_t *name, size_t len,
			    const struct stat *st, struct ovl_attr *out);

/* OVL_ASK: the object carries overlay.origin; 0: it does not. */
ovl_err_t ovl_dirlayer_origin(const struct ovl_dirlayer *layer, int dirfd, const uint8_t *name, size_t len);

/* Gives every name that a lookup would not answer OVL_ABSENT for, once each, in the order of the directory.  `dirfd` was
 * opened for reading and is listed from its start; `is_root`: it is the layer's.  `name` is terminated and valid during
 * the call only.  Another result than 0 of `emit` ends the list and is returned. */
typedef ovl_err_t (*ovl_dirlayer_emit)(void *arg, enum ovl_what what, const uint8_t *name, size_t len);
ovl_err_t ovl_dirlayer_list(const struct ovl_dirlayer *layer, int dirfd, bool is_root, ovl_dirlayer_emit emit, void *arg);

/* Is this xattr of an object the overlay's own, and so shown to nobody?  DirLayer.shown_xattr() is the reference.  Kernel:
 * fs/overlayfs/xattrs.c: ovl_is_own_xattr(), ovl_is_escaped_xattr(). */
bool ovl_dirlayer_hides(const struct ovl_dirlayer *layer, const char *xattr);

/* Times and counters of `st` as attributes, without any override. */
void ovl_attr_of_stat(const struct stat *st, struct ovl_attr *out);

/* Seconds and nanoseconds as nanoseconds; what does not fit saturates. */
int64_t ovl_ns(int64_t sec, int64_t nsec);

#endif
