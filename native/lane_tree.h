/*
 * lane_tree.h - which FUSE requests are answered without the interpreter?
 *
 * The table is in lane_tree.c; what the handlers share is in lane_fs.h.  The reference is ovlfs/fuse/operations.py, the
 * answers are the same; what is not known for sure, or needs a decision, is passed on.  Why that is right while Python
 * changes things: lane_tree.c and gate.h.
 *
 * Concurrency: init and destroy from one thread; the others from any.
 */
#ifndef OVL_LANE_TREE_H
#define OVL_LANE_TREE_H

#include "lane_fs.h"

/* `upper` is copied; the tree and the descriptors are borrowed.  `no_open`: nothing can be changed, so the kernel need not
 * tell us of opens. */
ovl_err_t ovl_lane_fs_init(struct ovl_lane_fs *fs, struct ovl_tree *tree, const struct ovl_lane_upper *upper, int dev_fd,
			   bool no_open, bool passthrough);
/* After the lane's threads have ended. */
void ovl_lane_fs_destroy(struct ovl_lane_fs *fs);

/* For struct ovl_lane_native; `fs` is a struct ovl_lane_fs. */
enum ovl_lane_verdict ovl_lane_fs_answer(void *fs, unsigned char *message, size_t size, struct ovl_lane_answer *answer);
int ovl_lane_fs_patch(void *fs, const struct ovl_lane_pending *request, unsigned char *body, size_t size);
void ovl_lane_fs_agree(void *fs, uint64_t offered, uint64_t agreed);

#endif
