/*
 * lane_fs.h - what the lane's native answers are made from; the parts that its handlers share
 *
 *      lane.c ---> lane_tree.c   who answers this opcode? names, attributes, listings
 *                  lane_file.c   open files, passthrough
 *                  lane_data.c   what is in them: data, holes
 *                  lane_change.c changes of what is in the upperdir already
 *                  lane_copy_up.c the plain case of bringing it there
 *                  lane_xattr.c  extended attributes, symlinks, statfs
 *                  lane_ioctl.c  birth times and flags
 *
 * Nothing here decides what overlayfs means: that is ovlfs/overlay/, the reference for every handler.  A handler answers
 * the plain cases, and passes the rest on.
 *
 * Ownership: struct ovl_lane_fs owns its gate, its open files and its directory descriptors; the tree, the descriptor of
 * the device and that of the workdir are borrowed and must outlive it.
 */
#ifndef OVL_LANE_FS_H
#define OVL_LANE_FS_H

#include <linux/fuse.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>

#include "gate.h"
#include "lane.h"
#include "tree.h"

#define OVL_LANE_VALID_S 86400u /* how long the kernel may keep what it is told: operations.py, TIMEOUT_S */

/* The upperdir and workdir: what Upper and Stack of ovlfs/overlay/ say about them. */
struct ovl_lane_upper {
	int work_fd;      /* borrowed; -1: nothing can be changed natively */
	const char *prefix; /* of the overlay's own xattrs: a static text */
	bool direct;      /* owners, modes and devices are stored as they are shown */
	bool may_chown;   /* files can be given away */
	bool devices;     /* whiteouts are devices 0:0 */
	bool is_volatile; /* nothing is ever synced */
	bool metacopy;    /* attributes can be copied up without the data */
	bool may_wait;    /* for a disk, that is: not a file system in memory */
};

/* A directory of the upperdir that was changed a moment ago; only between ovl_gate_change and _changed. */
struct ovl_lane_dir {
	uint64_t nodeid; /* 0: unused */
	uint64_t generation; /* of the gate when it was opened */
	int fd;          /* O_PATH */
	bool has_lower, default_acl, impure;
};

#define OVL_LANE_DIRS 64u

struct ovl_lane_file;
struct ovl_lane_io;

/* Open files; lane_file.c. */
struct ovl_lane_files {
	pthread_mutex_t lock; /* protects the tables and the counts in them; taken before the tree's lock */
	pthread_cond_t filled; /* protected by lock: `filling` is 0 again */
	uint64_t filling;      /* protected by lock: a nodeid that nobody may open just now */
	struct ovl_lane_file **slots;
	size_t slot_count, free_slot;
	struct ovl_lane_io *io[256]; /* by nodeid */
};

struct ovl_lane_fs {
	struct ovl_tree *tree;
	struct ovl_gate gate;
	struct ovl_lane_upper upper;
	struct ovl_lane_files files;
	int dev_fd;       /* of the connection, for passthrough; -1: none */
	bool no_open;     /* read-only: the kernel need not ask to open */
	/* What was agreed in INIT; written once, before any request but INIT. */
	atomic_bool passthrough, killpriv, no_opendir;
	struct ovl_lane_dir dirs[OVL_LANE_DIRS]; /* protected by gate.change */
	unsigned next_dir, next_temp;            /* protected by gate.change */
	size_t forgotten;                        /* protected by gate.change; since the last ovl_tree_trim */
	uint32_t uid, gid;                       /* ours; immutable */
	bool selinux;                            /* the machine has it; immutable */
	struct ovl_lane_trace *trace;            /* who is told of decisions, or NULL; borrowed; immutable */
};

/* One request.  `body` is what follows the header: whole, but not believed. */
struct ovl_lane_ask {
	struct ovl_lane_fs *fs;
	bool renaming; /* no layer may be asked */
	struct fuse_in_header header;
	unsigned char *body;
	size_t size; /* of the body */
	struct ovl_lane_answer *answer;
};

typedef enum ovl_lane_verdict (*ovl_lane_handler)(struct ovl_lane_ask *ask);

static inline enum ovl_lane_verdict ovl_lane_fail(struct ovl_lane_ask *ask, int error)
{
	ask->answer->error = error;
	return OVL_LANE_ANSWERED;
}

/* A path of what is at a descriptor, for calls that take no O_PATH descriptor. */
struct ovl_lane_proc {
	char text[sizeof("/proc/self/fd/2147483647")];
};

static inline struct ovl_lane_proc ovl_lane_proc(int fd)
{
	struct ovl_lane_proc proc;

	snprintf(proc.text, sizeof(proc.text), "/proc/self/fd/%d", fd);
	return proc;
}

/* The fixed part that a body begins with.  False: the body is too short for it. */
static inline bool ovl_lane_head(const struct ovl_lane_ask *ask, void *head, size_t size)
{
	if (ask->size < size)
		return false;
	memcpy(head, ask->body, size);
	return true;
}

/* lane_tree.c */
void ovl_lane_put(struct ovl_lane_answer *answer, const void *value, size_t size);
void ovl_lane_fill_attr(const struct ovl_entry *entry, struct fuse_attr *out);
/* nodeid 0 (nothing of that name) makes a negative entry. */
void ovl_lane_fill_entry(const struct ovl_entry *entry, struct fuse_entry_out *out);
/* A name at the start of the body; its length, or 0: not one that a request may have. */
size_t ovl_lane_name(const unsigned char *text, size_t size);
/* The fixed part, and the length of the name that follows it, or 0. */
size_t ovl_lane_head_and_name(const struct ovl_lane_ask *ask, void *head, size_t size);

/* lane_file.c */
int ovl_lane_files_init(struct ovl_lane_files *files);
void ovl_lane_files_destroy(struct ovl_lane_fs *fs);
size_t ovl_lane_files_count(struct ovl_lane_fs *fs); /* how many are open */
enum ovl_lane_verdict ovl_lane_open(struct ovl_lane_ask *ask);
enum ovl_lane_verdict ovl_lane_release(struct ovl_lane_ask *ask);

/* Opens a regular file for a client that is told `out`; `fd` >= 0: its upper file, open for reading and writing, ours
 * from now on in any case. */
ovl_err_t ovl_lane_file_open(struct ovl_lane_fs *fs, uint64_t nodeid, uint32_t flags, int fd, struct fuse_open_out *out);
/* The upper file of an inode, open for reading and writing, if it is open; it stays so until it is let go.  NULL: not open. */
struct ovl_lane_io *ovl_lane_io_hold(struct ovl_lane_fs *fs, uint64_t nodeid, int *fd);
void ovl_lane_io_let_go(struct ovl_lane_fs *fs, struct ovl_lane_io *io);
/* Is it certain that the inode has no xattrs?  And: somebody may be about to set some. */
bool ovl_lane_file_is_bare(struct ovl_lane_fs *fs, uint64_t nodeid);
void ovl_lane_file_dress(struct ovl_lane_fs *fs, uint64_t nodeid);
void ovl_lane_file_release(struct ovl_lane_fs *fs, uint64_t fh);
/* An open file was truncated at the open: O_TRUNC sets the times also of an empty one. */
ovl_err_t ovl_lane_truncate_opened(struct ovl_lane_fs *fs, uint64_t nodeid, uint64_t fh, bool kill);

/* lane_data.c */
enum ovl_lane_verdict ovl_lane_read(struct ovl_lane_ask *ask);
enum ovl_lane_verdict ovl_lane_write(struct ovl_lane_ask *ask);
enum ovl_lane_verdict ovl_lane_fsync(struct ovl_lane_ask *ask);
enum ovl_lane_verdict ovl_lane_fallocate(struct ovl_lane_ask *ask);
enum ovl_lane_verdict ovl_lane_lseek(struct ovl_lane_ask *ask);
enum ovl_lane_verdict ovl_lane_copy(struct ovl_lane_ask *ask);

/* lane_change.c; the gate is ours (ovl_gate_change) */
ovl_err_t ovl_lane_refresh(struct ovl_lane_fs *fs, uint64_t nodeid, int fd, struct ovl_entry *out);
void ovl_lane_dirs_close(struct ovl_lane_fs *fs);
/* What is left of a mode when somebody else has written to the file. */
uint32_t ovl_lane_mode_killed(uint32_t mode);
/* A directory that can be changed here, or NULL: pass the request on.  Valid until the gate is left. */
struct ovl_lane_dir *ovl_lane_need_dir(struct ovl_lane_fs *fs, uint64_t nodeid);
/* An inode in it shows another number than its own.  Kernel: ovl_set_impure(). */
void ovl_lane_set_impure(struct ovl_lane_fs *fs, struct ovl_lane_dir *dir);
enum ovl_lane_verdict ovl_lane_setattr(struct ovl_lane_ask *ask);
enum ovl_lane_verdict ovl_lane_create(struct ovl_lane_ask *ask);
enum ovl_lane_verdict ovl_lane_mkdir(struct ovl_lane_ask *ask);
enum ovl_lane_verdict ovl_lane_symlink(struct ovl_lane_ask *ask);
enum ovl_lane_verdict ovl_lane_link(struct ovl_lane_ask *ask);
enum ovl_lane_verdict ovl_lane_unlink(struct ovl_lane_ask *ask);
enum ovl_lane_verdict ovl_lane_rmdir(struct ovl_lane_ask *ask);
enum ovl_lane_verdict ovl_lane_rename(struct ovl_lane_ask *ask);

/* lane_copy_up.c; the gate is ours */
enum ovl_lane_copy {
	OVL_LANE_COPY_META,  /* attributes; the data stays below */
	OVL_LANE_COPY_DATA,
	OVL_LANE_COPY_EMPTY, /* nobody will miss the data */
};
/* OVL_ASK: not the plain case, pass the request on; nothing has changed.  `out`: the copy, open for reading and writing, which
 * is the caller's then; NULL: not wanted. */
ovl_err_t ovl_lane_copy_up(struct ovl_lane_fs *fs, uint64_t nodeid, enum ovl_lane_copy how, int *out);
/* The same for a directory, and those above it. */
ovl_err_t ovl_lane_copy_up_dir(struct ovl_lane_fs *fs, uint64_t nodeid);
/* A metacopy gets another name: it has to say where its data is.  `object`: a path of the object.  OVL_ASK as above. */
ovl_err_t ovl_lane_redirect_metacopy(struct ovl_lane_fs *fs, uint64_t nodeid, const char *object);

/* lane_xattr.c */
enum ovl_lane_verdict ovl_lane_getxattr(struct ovl_lane_ask *ask);
enum ovl_lane_verdict ovl_lane_listxattr(struct ovl_lane_ask *ask);
enum ovl_lane_verdict ovl_lane_setxattr(struct ovl_lane_ask *ask);
enum ovl_lane_verdict ovl_lane_statfs(struct ovl_lane_ask *ask);
enum ovl_lane_verdict ovl_lane_readlink(struct ovl_lane_ask *ask);

/* lane_ioctl.c */
enum ovl_lane_verdict ovl_lane_statx(struct ovl_lane_ask *ask);
enum ovl_lane_verdict ovl_lane_ioctl(struct ovl_lane_ask *ask);

#endif
