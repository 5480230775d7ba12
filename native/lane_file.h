/*
 * lane_file.h - open files, for lane_file.c (which are there) and lane_data.c (what is in them)
 */
#ifndef OVL_LANE_FILE_H
#define OVL_LANE_FILE_H

#include <fcntl.h>

#include "lane_fs.h"

struct ovl_lane_io {
	struct ovl_lane_io *next;
	uint64_t nodeid;
	int fd;         /* the upper file, O_RDWR; -1: not open, or not to be had */
	int32_t backing; /* its id in the kernel; 0: none */
	size_t handles, cached, passed, writers;
	bool bare; /* made or copied up here without any, and nobody has set an xattr since: there are no capabilities to ask the disk for */
};

struct ovl_lane_file {
	struct ovl_lane_io *io;
	size_t users;   /* protected by files.lock: the handle is one */
	uint64_t nodeid;
	uint32_t flags; /* of the open */
	bool upper, tar, passed;
	atomic_bool found; /* what follows is known: of a lower file only when it is read, which is rare (page cache) */
	int fd;         /* not tar: where to read and write; io->fd, or owned */
	atomic_int followed; /* a lower file's: the upper file since a copy-up, owned; -1: none yet */
	uint64_t size;  /* lower: what there has to be */
	const struct ovl_layer *layer; /* tar */
	uint32_t ref;                  /* tar */
};

static inline bool wants_write(uint32_t flags)
{
	return (flags & O_ACCMODE) != O_RDONLY;
}

/* The file of a handle, counted; NULL: there is no such handle of this inode. */
struct ovl_lane_file *ovl_lane_file_get(struct ovl_lane_fs *fs, uint64_t fh, uint64_t nodeid);
void ovl_lane_file_put(struct ovl_lane_fs *fs, struct ovl_lane_file *file);

/* What is in a file that is not open; bytes, or -errno, or -EREMCHG: Python has to look. */
ssize_t ovl_lane_read_inode(const struct ovl_lane_ask *ask, unsigned char *to, size_t size, uint64_t offset);

/* Fills in where the inode `file->nodeid` is read from, if that is not known; file->fd is the file's then.  OVL_ASK cannot
 * be: there is no layer that is not read from here (session.py). */
ovl_err_t ovl_lane_file_find(struct ovl_lane_fs *fs, struct ovl_lane_file *file);

#endif
