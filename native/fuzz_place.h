/*
 * fuzz_place.h - a mount for fuzz_lane.c, without a kernel: an upperdir, layers, and the live tree over them
 *
 *      layer 0   upper/            on disk
 *      layer 1   a tar in memory   n0 .. n59: directories, symlinks, files with data, names in n5/
 *      layer 2   lower/            on disk: partly the same names
 *
 * Where: a new directory below the current one.  As root it is a tmpfs of OVL_PLACE_BYTES in a mount namespace of its own,
 * in which everything else is read-only: what a handler does beside its upperdir fails, and it cannot fill a disk.
 * Otherwise sizes are limited by RLIMIT_FSIZE.  Both end with the process, or before.
 */
#ifndef OVL_FUZZ_PLACE_H
#define OVL_FUZZ_PLACE_H

#include "lane_tree.h"

#define OVL_PLACE_BYTES (64u << 20)
#define OVL_PLACE_FILES 160u /* descriptors: few, so that running out of them is met, too */
#define OVL_PLACE_NAMES 60u
#define OVL_PLACE_INO_BASE (1ull << 40)
#define OVL_PLACE_DEVICE 7777 /* the descriptor that is told to be that of the device: see ioctl() in fuzz_place.c */

struct ovl_place {
	int base;  /* the directory of all others */
	int upper, work, lower, tar;
	struct ovl_tree *tree;
	struct ovl_index index;
	uint8_t *image;
	struct ovl_lane_fs fs;
	size_t descriptors; /* that were open before */
	unsigned number;
};

/* Ends the process with a message unless `ok`. */
void ovl_require(bool ok, const char *what);

/* Once in a process, before any thread. */
void ovl_place_confine(void);
void ovl_place_leave(void);

/* Everything new; what is closed was removed, and nothing of it may be left open. */
void ovl_place_open(struct ovl_place *place, bool direct, bool is_volatile, bool no_open);
void ovl_place_close(struct ovl_place *place);

/* How many backing files of passthrough are registered with the device. */
size_t ovl_place_backings(void);

#endif
