/*
 * build.h - the tree of one layer while its tar passes by, and the index image at the end
 *
 * The scanner (tarscan.c) knows the format and hands over entries; this file knows what an entry means for the
 * entries before it: replacing, linking, hiding.  See build.c for the rules.
 *
 * Ownership: the builder copies what it is given.  Concurrency: one thread at a time.
 * Errors: 0 or -errno; -EBADMSG: `*rule` (static text) says what does not hold.
 */
#ifndef OVL_BUILD_H
#define OVL_BUILD_H

#include "index.h"

struct ovl_build;

/* A borrowed run of bytes. */
struct ovl_bytes {
	const uint8_t *at;
	size_t len;
};

/* One entry of a tar, its extended headers applied. */
struct ovl_build_entry {
	struct ovl_bytes name;
	struct ovl_bytes link; /* symlink: target; hard link: path */
	bool is_hard_link;     /* `mode`'s type, rdev, size and data mean nothing then */
	uint32_t mode;         /* with type */
	uint32_t uid;
	uint32_t gid;
	uint32_t rdev;
	uint64_t size;
	uint64_t data; /* offset in the tar */
	int64_t mtime_sec;
	uint32_t mtime_nsec;
	bool sparse; /* the data is in `extents`, ascending and checked */
	const struct ovl_disk_extent *extents;
	uint32_t extent_count;
	struct ovl_bytes xattrs; /* records as on disk, each struct ovl_disk_xattr, name, value */
	uint32_t xattr_count;
};

ovl_err_t ovl_build_new(bool whiteouts, uint64_t memory_max, struct ovl_build **out);
void ovl_build_free(struct ovl_build *build); /* NULL-safe */
ovl_err_t ovl_build_add(struct ovl_build *build, const struct ovl_build_entry *entry, const char **rule);
/* The image is the caller's, to free().  The builder is spent afterwards, also after an error. */
ovl_err_t ovl_build_finish(struct ovl_build *build, uint64_t tar_end, uint8_t **image, size_t *image_len,
			   const char **rule);

#endif
