/*
 * index.h - what is in one layer tar, as a flat file that can be mapped and asked
 *
 * Problem.  A mounted layer must answer "what is NAME in directory D?" without reading the tar again.  The
 * scanner (tarscan.h) writes the answer down once, as one little-endian image without pointers; this file
 * reads it.  The image may come from a cache that somebody else damaged, so nothing in it is believed.
 *
 * Structure (all offsets from the start of the image; records are packed and may be unaligned):
 *
 *      +---------+-----------------+-------------------+---------+-----------+----------------+--------+
 *      | header  | inodes          | dentries          | links   | extents   | xattrs         | heap   |
 *      | 192     | 56 each         | 20 each           | 12 each | 24 each   | blocks         | bytes  |
 *      +---------+-----------------+-------------------+---------+-----------+----------------+--------+
 *         |         ^   |   ^   |        ^  |   |  |         ^                                   ^
 *         |         |   |   |   +--------+  |   |  +- what == LINK_BELOW: ref counts links --> target path
 *         |         |   |   |   a directory's dentries are one run, sorted by name (memcmp, then length)
 *         |         |   |   +---------------+ ref                  name ----------------------+
 *         |         |   +- first_dentry: the first name; dentry.next: further names of a hard link group
 *         |         +- ref 0 is the root
 *         +- tables: offset, count; total length; checksum
 *
 * Invariants, checked on every access that depends on them: a table ends inside the image; a child directory's
 * ref is greater than its parent's (no cycles), and a directory has one name only, the one that leads to it.
 *
 * Complexity: open O(1), plus one pass for the checksum if asked for; lookup O(log n) in the directory's size.
 *
 * Concurrency: `struct ovl_index` is immutable after open.  Any number of threads read it at the same time.
 * Each record is copied out before it is checked, so even an image that changes under us (a shared mapping)
 * gives wrong answers or -EUCLEAN, never an access outside the image.
 *
 * Errors: every function returns 0 or -errno and never sets errno.  -EUCLEAN: the image is damaged.
 */
#ifndef OVL_INDEX_H
#define OVL_INDEX_H

#include <assert.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef int ovl_err_t;

#define OVL_INDEX_MAGIC "ovlfsix1" /* 8 bytes, not terminated */
#define OVL_INDEX_VERSION 1u
/* How many directories deep a layer may be; also what stops a walk to the root in a damaged image. */
#define OVL_INDEX_DEPTH_MAX 2048u
#define OVL_INDEX_NONE UINT32_MAX
#define OVL_INDEX_ROOT 0u

/* What a layer says about a name.  The numbers are those of ovlfs.layer.base.What. */
enum ovl_what {
	OVL_WHITEOUT = 0,   /* the name is gone: nothing below shows */
	OVL_DIRECTORY = 1,  /* a directory; merges with those below unless OVL_IX_OPAQUE */
	OVL_OTHER = 2,      /* file, symlink, device, fifo */
	OVL_LINK_BELOW = 3, /* hard link to `target`, a path that the layers below have */
};

/* Flags of an inode; lookup and list give them with the entry. */
#define OVL_IX_OPAQUE 1u  /* directory: nothing below shows through */
#define OVL_IX_IMPLIED 2u /* directory: the tar mentions it in a path but never describes it */
#define OVL_IX_SPARSE 4u  /* regular file: `data` counts extents instead of bytes */

/* ---- the image ---------------------------------------------------------------------------------------- */

struct ovl_disk_table {
	uint64_t offset; /* from the start of the image */
	uint64_t count;  /* records; bytes for the xattrs and the heap */
};

struct ovl_disk_header {
	uint8_t magic[8];
	uint32_t version;
	uint32_t header_size;
	uint64_t total_size; /* of the image */
	uint64_t checksum;   /* XXH64 of the image with this field zero; guards against accidents only */
	struct ovl_disk_table inodes;
	struct ovl_disk_table dentries;
	struct ovl_disk_table links;
	struct ovl_disk_table extents;
	struct ovl_disk_table xattrs;
	struct ovl_disk_table heap;
	uint64_t files;     /* counts for people: inodes that are no directories */
	uint64_t dirs;      /* directories, the root included */
	uint64_t whiteouts; /* names */
	uint64_t opaques;   /* opaque directories */
	uint64_t bytes;     /* sum of the sizes of regular files */
	uint64_t tar_end;   /* where the archive ends: offset just after the last entry's data and padding */
	uint64_t reserved[2];
};
static_assert(sizeof(struct ovl_disk_header) == 192, "index header is 192 bytes on disk");

struct ovl_disk_inode {
	uint32_t mode;
	uint32_t nlink;
	uint32_t uid;
	uint32_t gid;
	uint64_t size;        /* regular file: bytes, holes included; symlink: length of the target */
	uint64_t data;        /* regular: offset in the tar, or if SPARSE first extent | count << 32;
	                         directory: first dentry | count << 32; symlink: offset in heap; device: rdev */
	int64_t mtime_sec;    /* within +-OVL_TAR_MTIME_MAX, so that it fits int64_t in ns */
	uint32_t mtime_nsec;  /* 0..999999999, added to mtime_sec even if that is negative */
	uint32_t flags;       /* OVL_IX_* */
	uint32_t xattr;       /* offset in the xattr table + 1; 0: none */
	uint32_t first_dentry; /* OVL_INDEX_NONE for the root */
};
static_assert(sizeof(struct ovl_disk_inode) == 56, "inode record is 56 bytes on disk");

struct ovl_disk_dentry {
	uint32_t name;   /* offset in heap */
	uint32_t ref;    /* inode; LINK_BELOW: ordinal in links; WHITEOUT: 0 */
	uint32_t parent; /* inode of the directory */
	uint32_t next;   /* next dentry of the same inode, or OVL_INDEX_NONE */
	uint8_t name_len;
	uint8_t what; /* enum ovl_what */
	uint16_t reserved;
};
static_assert(sizeof(struct ovl_disk_dentry) == 20, "dentry record is 20 bytes on disk");

struct ovl_disk_link {
	uint32_t target; /* offset in heap: the target's path, relative to the layers' root, no "." or ".." */
	uint32_t target_len;
	uint32_t forward; /* inode that this layer itself puts at that path later on; 0: none */
};
static_assert(sizeof(struct ovl_disk_link) == 12, "link record is 12 bytes on disk");

struct ovl_disk_extent {
	uint64_t logical;
	uint64_t length;
	uint64_t physical; /* from the start of the tar */
};
static_assert(sizeof(struct ovl_disk_extent) == 24, "extent record is 24 bytes on disk");

/* An xattr block: this, then per xattr struct ovl_disk_xattr, the name and the value. */
struct ovl_disk_xattrs {
	uint32_t count;
	uint32_t bytes; /* of the records that follow */
};
static_assert(sizeof(struct ovl_disk_xattrs) == 8, "xattr block head is 8 bytes on disk");

struct ovl_disk_xattr {
	uint32_t value_len;
	uint16_t name_len;
	uint16_t reserved;
};
static_assert(sizeof(struct ovl_disk_xattr) == 8, "xattr record head is 8 bytes on disk");

/* ---- reading it --------------------------------------------------------------------------------------- */

/* An opened image.  Fields are private to index.c; the struct is here so that it can be embedded.  No close:
 * it owns nothing.  The caller keeps the image alive and in place as long as it is used. */
struct ovl_index {
	const uint8_t *base;
	size_t len;
	const uint8_t *inodes;
	const uint8_t *dentries;
	const uint8_t *links;
	const uint8_t *extents;
	const uint8_t *xattrs;
	const uint8_t *heap;
	uint32_t inode_count;
	uint32_t dentry_count;
	uint32_t link_count;
	uint32_t extent_count;
	uint32_t xattr_bytes;
	uint32_t heap_bytes;
	uint64_t files, dirs, whiteouts, opaques, bytes, tar_end;
};

/* One name in one directory.  Pointers are borrowed from the image. */
struct ovl_index_entry {
	enum ovl_what what;
	uint32_t ref;   /* inode.  LINK_BELOW: the forward fallback, an inode to use if no layer below has `target`;
	                   0: no fallback.  WHITEOUT: 0 */
	uint32_t flags; /* OVL_IX_* of the inode; 0 for WHITEOUT and LINK_BELOW */
	uint32_t mode;  /* of the inode; 0 for WHITEOUT and LINK_BELOW */
	const uint8_t *name;
	size_t name_len;
	const uint8_t *target; /* LINK_BELOW only, else NULL */
	size_t target_len;
};

struct ovl_index_attr {
	uint32_t mode;
	uint32_t nlink; /* directory: 2 + subdirectories of this layer */
	uint32_t uid;
	uint32_t gid;
	uint32_t rdev;   /* as stat(2) and FUSE give it (new_encode_dev) */
	uint32_t flags;  /* OVL_IX_* */
	uint64_t size;   /* 4096 for a directory */
	uint64_t blocks; /* of 512 bytes; holes do not count; 8 for a directory */
	int64_t mtime_sec;
	uint32_t mtime_nsec;
};

struct ovl_index_extent {
	uint64_t logical;
	uint64_t length;
	uint64_t physical; /* from the start of the tar */
};

/* Opens the image.  `verify`: also compare the checksum, one pass over all of it.  On error `*why` (may be
 * NULL) is a static text.  -EUCLEAN: not an index of this version, cut short, or damaged. */
ovl_err_t ovl_index_open(struct ovl_index *ix, const void *image, size_t len, bool verify, const char **why);

/* What the layer says about `name` in directory `dir`.  -ENOENT: nothing.  -ENOTDIR: `dir` is no directory.
 * No allocation. */
ovl_err_t ovl_index_lookup(const struct ovl_index *ix, uint32_t dir, const void *name, size_t name_len,
			   struct ovl_index_entry *out);

/* A directory's names, in order.  `*count` is exact in an undamaged image.  -ENOTDIR as above. */
struct ovl_index_iter {
	const struct ovl_index *ix;
	uint32_t dir;
	uint32_t next;
	uint32_t end;
};
ovl_err_t ovl_index_list(const struct ovl_index *ix, uint32_t dir, struct ovl_index_iter *iter, uint32_t *count);
/* 1: `*out` is the next name; 0: no more; -EUCLEAN. */
int ovl_index_next(struct ovl_index_iter *iter, struct ovl_index_entry *out);

/* -EUCLEAN also for a ref that does not exist: refs come from lookups only. */
ovl_err_t ovl_index_attr(const struct ovl_index *ix, uint32_t ref, struct ovl_index_attr *out);

/* `*target` is borrowed from the image, not terminated.  -EINVAL: no symlink. */
ovl_err_t ovl_index_readlink(const struct ovl_index *ix, uint32_t ref, const uint8_t **target, size_t *target_len);

/* The inode's xattrs, in the tar's order. */
struct ovl_index_xattr_iter {
	const uint8_t *pos;
	const uint8_t *end;
	uint32_t left;
};
ovl_err_t ovl_index_xattrs(const struct ovl_index *ix, uint32_t ref, struct ovl_index_xattr_iter *iter);
/* 1: name and value are set (borrowed); 0: no more; -EUCLEAN. */
int ovl_index_next_xattr(struct ovl_index_xattr_iter *iter, const uint8_t **name, size_t *name_len,
			 const uint8_t **value, size_t *value_len);

/* A regular file's extents in ascending order, none empty, none overlapping, none past the size.  Holes are what
 * lies between.  -EINVAL: no regular file. */
struct ovl_index_extent_iter {
	const struct ovl_index *ix;
	uint32_t next;
	uint32_t left;
	uint64_t size;
	uint64_t floor;
	struct ovl_index_extent plain; /* the only extent of a file that is not sparse */
};
ovl_err_t ovl_index_extents(const struct ovl_index *ix, uint32_t ref, struct ovl_index_extent_iter *iter);
int ovl_index_next_extent(struct ovl_index_extent_iter *iter, struct ovl_index_extent *out);

/* The names of an inode: one for a directory (none for the root), all of a hard link group otherwise.
 * `*dentry` starts as the inode's first dentry. */
struct ovl_index_name_iter {
	const struct ovl_index *ix;
	uint32_t ref;
	uint32_t next;
	uint32_t left;
};
ovl_err_t ovl_index_names(const struct ovl_index *ix, uint32_t ref, struct ovl_index_name_iter *iter);
/* 1: `*parent` and the name are set; 0: no more; -EUCLEAN. */
int ovl_index_next_name(struct ovl_index_name_iter *iter, uint32_t *parent, const uint8_t **name, size_t *name_len);

/* The path of directory `dir` plus "/" plus `name` (`name_len` 0: only the directory), relative to the root, into
 * `buf`, not terminated.  `*path_len` is the length needed even if -ERANGE says that `size` is too small. */
ovl_err_t ovl_index_path(const struct ovl_index *ix, uint32_t dir, const uint8_t *name, size_t name_len, uint8_t *buf,
			 size_t size, size_t *path_len);

/* XXH64 with seed 0 of the image, its checksum field taken as zero.  `len` >= sizeof(struct ovl_disk_header). */
uint64_t ovl_index_checksum(const void *image, size_t len);

#endif
