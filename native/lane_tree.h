/*
 * lane_tree.h - which FUSE requests does the live tree answer, without a decision and without the interpreter?
 *
 * LOOKUP, GETATTR, READDIR, READDIRPLUS, READLINK (tar layers), FORGET, BATCH_FORGET; and those that need no tree:
 * OPENDIR, RELEASEDIR, FLUSH, ACCESS.  The reference is ovlfs/fuse/operations.py, the answers are the same; what the
 * tree does not know for sure is passed on.  Why that is right while Python changes things: lane_tree.c.
 *
 * Concurrency: any thread; the functions block only for the tree's lock and for layers on disk.
 */
#ifndef OVL_LANE_TREE_H
#define OVL_LANE_TREE_H

#include "lane.h"
#include "tree.h"

#define OVL_LANE_VALID_S 86400u /* how long the kernel may keep what it is told: operations.py, TIMEOUT_S */

/* For struct ovl_lane_native; `tree` is a struct ovl_tree. */
enum ovl_lane_verdict ovl_lane_tree_answer(void *tree, unsigned situation, unsigned char *message, size_t *size,
					   struct ovl_lane_answer *answer);

/* The session shows nodeids as st_ino, which differ for the root and for nodeids from OVL_FRESH_NODEID on: the reply
 * to `opcode` is changed to show the tree's. */
void ovl_lane_tree_patch(void *tree, uint32_t opcode, unsigned char *body, size_t size);

#endif
