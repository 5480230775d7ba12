/*
 * tarscan.h - reads a layer tar as it passes by, and writes its index
 *
 * Problem.  A layer is described by a tar, in which order means little to the author and much to the reader:
 * entries replace each other, hard links name what came before, whiteouts hide what is below but never what is
 * beside them.  The scanner takes the bytes in pieces of any size, keeps headers only, and gives the end result
 * as one index image (index.h).  File data is never touched: it is counted and skipped.
 *
 * Use: ovl_tarscan_new, ovl_tarscan_feed (any number of times; ovl_tarscan_skip where bytes need not be read),
 * ovl_tarscan_finish, ovl_tarscan_free.  After an error only ovl_tarscan_error and ovl_tarscan_free make sense.
 *
 * Ownership: the scanner owns what it remembers; fed bytes are not kept.  The image of ovl_tarscan_finish is
 * the caller's, to be released with free().
 *
 * Concurrency: one thread at a time per scanner; scanners are independent of each other.
 *
 * Errors: 0 or -errno; -EBADMSG: the tar breaks a rule (see struct ovl_tar_error), -ENOMEM.
 */
#ifndef OVL_TARSCAN_H
#define OVL_TARSCAN_H

#include "index.h"

/* The limits.  They are far above what images in the wild contain, and they bound what a hostile one can cost. */
#define OVL_TAR_NAME_MAX 255u               /* bytes of one path component (NAME_MAX) */
#define OVL_TAR_PATH_MAX 4096u              /* bytes of an entry's name or a hard link's target (PATH_MAX) */
#define OVL_TAR_TARGET_MAX 4095u            /* bytes of a symlink's target */
#define OVL_TAR_META_MAX (1u << 20)         /* bytes of PAX records, or of a GNU long name, before one entry */
#define OVL_TAR_SPARSE_MAX (1u << 20)       /* bytes of one file's sparse map, as it stands in the tar */
#define OVL_TAR_XATTRS_MAX 1024u            /* xattrs of one entry */
#define OVL_TAR_XATTR_VALUE_MAX 65536u      /* bytes of one value (XATTR_SIZE_MAX) */
#define OVL_TAR_SYMLINKS_MAX 40u            /* symlinks followed for one path (MAXSYMLINKS) */
#define OVL_TAR_STEPS_MAX 8192u             /* components walked for one path, those of followed symlinks included */
#define OVL_TAR_SIZE_MAX (1ull << 62)       /* bytes of one file, and of the whole tar */
#define OVL_TAR_MTIME_MAX 9223372035ll      /* seconds from 1970 in either direction: int64_t in ns; beyond saturates */
#define OVL_TAR_ENTRIES_MAX 16000000u       /* default: headers in one layer */
#define OVL_TAR_MEMORY_MAX (3ull << 30)     /* default: bytes that the scanner holds, the finished image included */

struct ovl_tar_limits {
	uint64_t entries; /* 0: the default */
	uint64_t memory;  /* 0: the default; never above 4 GiB */
};

/* Which rule was broken, by which entry, and where. */
struct ovl_tar_error {
	uint64_t offset;  /* of the entry's header, or of the end of a stream that is cut short */
	const char *rule; /* static text: what should hold */
	const uint8_t *name; /* the entry's name as far as it is known; owned by the scanner, not terminated */
	size_t name_len;
};

struct ovl_tarscan;

/* `whiteouts`: `.wh.` names have their meaning (a layer); otherwise they are plain names (a root filesystem tar).
 * `limits` may be NULL. */
ovl_err_t ovl_tarscan_new(bool whiteouts, const struct ovl_tar_limits *limits, struct ovl_tarscan **out);
void ovl_tarscan_free(struct ovl_tarscan *scan); /* NULL-safe */

/* The next `len` bytes of the stream. */
ovl_err_t ovl_tarscan_feed(struct ovl_tarscan *scan, const void *bytes, size_t len);

/* How many of the next bytes the scanner would not look at. */
uint64_t ovl_tarscan_skippable(const struct ovl_tarscan *scan);
/* The next `len` bytes were not read.  -EINVAL: more than skippable. */
ovl_err_t ovl_tarscan_skip(struct ovl_tarscan *scan, uint64_t len);

/* Bytes fed and skipped so far. */
uint64_t ovl_tarscan_offset(const struct ovl_tarscan *scan);
/* The end marker was seen: whatever follows is not looked at. */
bool ovl_tarscan_ended(const struct ovl_tarscan *scan);

/* The stream is over: the index image.  Call it once. */
ovl_err_t ovl_tarscan_finish(struct ovl_tarscan *scan, uint8_t **image, size_t *image_len);

/* What -EBADMSG was about.  Borrowed, valid until ovl_tarscan_free. */
const struct ovl_tar_error *ovl_tarscan_error(const struct ovl_tarscan *scan);

#endif
