/*
 * lane_tree.c - see lane_tree.h; handlers for the lane that only read the live tree (and let it resolve names)
 *
 * A handler gets a request, whole but not believed, and fills in the body of the reply, or passes the request on:
 *
 *      request --> sizes right? --no--> EIO
 *                      |
 *                      v
 *                 does the tree know, or can it find out by itself? --no (OVL_ASK, unforeseen errors)--> pyfuse3
 *                      |
 *                      v
 *                 reply; what it counts as looked up is counted under the tree's lock, in the moment it is read
 *
 * Why an answer from here is right while Python is in the middle of something.  Python changes the disk first and tells
 * the tree after; in between the two differ.
 *
 *   1. What is in memory (attributes, names that were resolved) changes in one step, under the tree's lock.  An answer
 *      from memory is that of a moment before or after the change.  Before: the gate sees to it that it leaves before
 *      the reply to the change, so that the kernel, which discards what it knows when that reply comes, never keeps
 *      the older one.
 *   2. What has to be read from the layers: names of a directory that were not asked for so far.
 *      a. The kernel holds the directory's lock over create, link, unlink, rename, mkdir, rmdir in it, and shared over
 *         lookups and listings: none of these changes is under way in a directory whose names are read.  (A revalidation
 *         takes no lock, but is about a name that the kernel holds an inode of, which is in memory: case 1.)
 *      b. A rename of a directory above changes paths without any lock on this directory: the path that the tree would
 *         open might not exist, or lead to another directory (RENAME_EXCHANGE).  So while a RENAME is with Python no
 *         layer is asked from here (ovl_gate_look, OVL_KNOWN).
 *      c. A copy-up changes no names.  It places all hard links of an inode, also in other directories, but has the
 *         tree resolve those first (copy_up.py: _find_all_names), so they are in memory.  The directories above are
 *         copied up, and the tree is told, before anything is put into them.
 *      d. Objects with overlay.origin, redirect or metacopy are OVL_ASK.
 *   3. O_TMPFILE takes no lock on the directory, and has a name for a moment, "/" (dir.py: _NO_NAME): it is not listed.
 *   4. Python holds nodeids and Inode views across its own steps, of inodes that the kernel need not hold (what a list
 *      or a lookup just gave).  Only forgetting drops inodes: it is done here only under the gate (gate.h), when Python
 *      has no request at all.
 *   5. A negative entry is given where a merged directory has no such name; case 2a says that none is being made.
 *
 * References: include/uapi/linux/fuse.h; Linux fs/fuse/dir.c (fuse_lookup_name, fuse_dentry_revalidate), readdir.c,
 * inode.c (fuse_change_attributes).
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "lane_tree.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <string.h>
#include <sys/vfs.h>
#include <unistd.h>

#define BLOCK_BYTES 4096u
#define NS 1000000000ll
/* "." and ".." have the offsets 1 and 2, the others their cookie + 2. */
#define DOTS 2u
#define TRIM_AFTER 50000u /* inodes forgotten */

static_assert(sizeof(struct fuse_in_header) == 40, "wire format");
static_assert(sizeof(struct fuse_attr) == 88, "wire format");
static_assert(sizeof(struct fuse_entry_out) == 128, "wire format");
static_assert(sizeof(struct fuse_attr_out) == 104, "wire format");
static_assert(sizeof(struct fuse_open_out) == 16, "wire format");
static_assert(sizeof(struct fuse_getattr_in) == 16, "wire format");
static_assert(sizeof(struct fuse_read_in) == 40, "wire format");
static_assert(sizeof(struct fuse_fsync_in) == 16, "wire format");
static_assert(sizeof(struct fuse_forget_in) == 8, "wire format");
static_assert(sizeof(struct fuse_forget_one) == 16, "wire format");
static_assert(sizeof(struct fuse_batch_forget_in) == 8, "wire format");
static_assert(sizeof(struct fuse_dirent) == 24, "wire format");
static_assert(FUSE_NAME_OFFSET_DIRENTPLUS == 152, "wire format");

/* One value, at the end of the reply.  The room is at least 4 KiB. */
void ovl_lane_put(struct ovl_lane_answer *answer, const void *value, size_t size)
{
	memcpy(answer->body + answer->size, value, size);
	answer->size += size;
}

size_t ovl_lane_name(const unsigned char *text, size_t size)
{
	size_t len = strnlen((const char *)text, size);

	return len < size && !memchr(text, '/', len) ? len : 0;
}

size_t ovl_lane_head_and_name(const struct ovl_lane_ask *ask, void *head, size_t size)
{
	return ovl_lane_head(ask, head, size) ? ovl_lane_name(ask->body + size, ask->size - size) : 0;
}

static unsigned how(const struct ovl_lane_ask *ask, unsigned more)
{
	return more | (ask->renaming ? OVL_KNOWN : 0);
}

/* ---- attributes --------------------------------------------------------------------------------------- */

static void split(int64_t ns, uint64_t *sec, uint32_t *nsec)
{
	int64_t rest = ns % NS;

	*sec = (uint64_t)(ns / NS - (rest < 0));
	*nsec = (uint32_t)(rest < 0 ? rest + NS : rest);
}

void ovl_lane_fill_attr(const struct ovl_entry *entry, struct fuse_attr *out)
{
	const struct ovl_attr *attr = &entry->attr;

	*out = (struct fuse_attr){
		.ino = entry->ino,
		.size = attr->size,
		.blocks = attr->blocks,
		.mode = attr->mode,
		.nlink = attr->nlink,
		.uid = attr->uid,
		.gid = attr->gid,
		.rdev = attr->rdev,
		.blksize = BLOCK_BYTES,
	};
	split(attr->atime_ns, &out->atime, &out->atimensec);
	split(attr->mtime_ns, &out->mtime, &out->mtimensec);
	split(attr->ctime_ns, &out->ctime, &out->ctimensec);
}

/* nodeid 0 (nothing of that name) makes a negative entry. */
void ovl_lane_fill_entry(const struct ovl_entry *entry, struct fuse_entry_out *out)
{
	*out = (struct fuse_entry_out){.nodeid = entry->nodeid, .entry_valid = OVL_LANE_VALID_S};
	if (entry->nodeid == 0)
		return;
	out->attr_valid = OVL_LANE_VALID_S;
	ovl_lane_fill_attr(entry, &out->attr);
}

static enum ovl_lane_verdict answer_getattr(struct ovl_lane_ask *ask)
{
	struct fuse_attr_out out = {.attr_valid = OVL_LANE_VALID_S};
	struct ovl_entry entry;

	if (ask->size < sizeof(struct fuse_getattr_in))
		return ovl_lane_fail(ask, EIO);
	if (ovl_tree_get(ask->fs->tree, ask->header.nodeid, &entry))
		return OVL_LANE_PASS;
	ovl_lane_fill_attr(&entry, &out.attr);
	ovl_lane_put(ask->answer, &out, sizeof(out));
	return OVL_LANE_ANSWERED;
}

/* ---- names -------------------------------------------------------------------------------------------- */

static enum ovl_lane_verdict answer_lookup(struct ovl_lane_ask *ask)
{
	size_t len = ovl_lane_name(ask->body, ask->size);
	struct fuse_entry_out out;
	struct ovl_entry entry;
	struct ovl_ask asked;
	ovl_err_t err;

	if (len == 0 || len + 1 != ask->size)
		return ovl_lane_fail(ask, EIO);
	if (ask->body[0] == '.' && (len == 1 || (len == 2 && ask->body[1] == '.')))
		return OVL_LANE_PASS;
	if (len > OVL_NAME_MAX)
		return ovl_lane_fail(ask, ENAMETOOLONG);
	err = ovl_tree_lookup(ask->fs->tree, ask->header.nodeid, ask->body, len, how(ask, OVL_COUNT), &entry,
			      &asked);
	if (err == -ENOTDIR || err == -ESTALE)
		return ovl_lane_fail(ask, -err);
	if (err)
		return OVL_LANE_PASS;
	ovl_lane_fill_entry(&entry, &out);
	ovl_lane_put(ask->answer, &out, sizeof(out));
	return OVL_LANE_ANSWERED;
}

/* ---- forgetting --------------------------------------------------------------------------------------- */

#define CLOSE_LONG (4u << 20) /* freed within a millisecond or so */

/* After the gate: to close what leads to a removed file frees its data, which may take seconds. */
static void close_forgotten(struct ovl_lane_ask *ask, struct kept *later)
{
	if (ovl_tree_bytes(later) > CLOSE_LONG)
		ovl_lane_yield(ask->answer->reader);
	ovl_tree_close(later);
}

static enum ovl_lane_verdict answer_forget(struct ovl_lane_ask *ask)
{
	struct kept *later = NULL;
	struct fuse_forget_in in;

	if (ask->size < sizeof(in))
		return OVL_LANE_SILENT;
	if (!ovl_gate_change(&ask->fs->gate))
		return OVL_LANE_PASS;
	memcpy(&in, ask->body, sizeof(in));
	ovl_tree_forget_later(ask->fs->tree, ask->header.nodeid, in.nlookup, &later);
	ovl_gate_changed(&ask->fs->gate);
	close_forgotten(ask, later);
	return OVL_LANE_SILENT;
}

static enum ovl_lane_verdict answer_batch_forget(struct ovl_lane_ask *ask)
{
	struct fuse_batch_forget_in in;
	struct kept *later = NULL;
	struct fuse_forget_one one;
	unsigned char *items;
	size_t count;
	bool trim;

	if (ask->size < sizeof(in))
		return OVL_LANE_SILENT;
	if (!ovl_gate_change(&ask->fs->gate))
		return OVL_LANE_PASS;
	memcpy(&in, ask->body, sizeof(in));
	items = ask->body + sizeof(in);
	count = (ask->size - sizeof(in)) / sizeof(one);
	if (count > in.count)
		count = in.count;
	for (size_t i = 0; i < count; i++) {
		memcpy(&one, items + i * sizeof(one), sizeof(one));
		ovl_tree_forget_later(ask->fs->tree, one.nodeid, one.nlookup, &later);
	}
	ask->fs->forgotten += count;
	trim = ask->fs->forgotten > TRIM_AFTER;
	if (trim)
		ask->fs->forgotten = 0;
	ovl_gate_changed(&ask->fs->gate);
	close_forgotten(ask, later);
	if (trim) { /* the kernel is short of memory, or the mount has been walked over */
		ovl_lane_yield(ask->answer->reader);
		ovl_tree_trim(ask->fs->tree);
	}
	return OVL_LANE_SILENT;
}

/* ---- listings ----------------------------------------------------------------------------------------- */

/* A reply that is being filled. */
struct listing {
	struct ovl_lane_answer *answer;
	size_t room; /* what the kernel asked for, and the reply can hold */
	bool plus;
	bool given; /* a name that is no dot */
};

static bool list_name(struct listing *listing, uint64_t offset, const uint8_t *name, size_t len,
		      const struct ovl_entry *entry, bool counts)
{
	struct ovl_lane_answer *answer = listing->answer;
	const size_t before = listing->plus ? FUSE_NAME_OFFSET_DIRENTPLUS : FUSE_NAME_OFFSET;
	const size_t size = FUSE_REC_ALIGN(before + len);
	struct fuse_entry_out out = {0};
	struct fuse_dirent dirent = {
		.ino = entry->ino,
		.off = offset,
		.namelen = (uint32_t)len,
		.type = (entry->attr.mode & S_IFMT) >> 12,
	};

	if (size > listing->room - answer->size)
		return false;
	if (listing->plus) {
		ovl_lane_fill_entry(entry, &out);
		if (!counts) /* a dot: the kernel neither counts nor links it */
			out.nodeid = 0;
		ovl_lane_put(answer, &out, sizeof(out));
	}
	ovl_lane_put(answer, &dirent, sizeof(dirent));
	ovl_lane_put(answer, name, len);
	memset(answer->body + answer->size, 0, size - before - len);
	answer->size += size - before - len;
	return true;
}

static bool list_child(void *arg, uint64_t cookie, const uint8_t *name, size_t len, const struct ovl_entry *entry)
{
	struct listing *listing = arg;

	if (!list_name(listing, cookie + DOTS, name, len, entry, true))
		return false;
	listing->given = true;
	return true;
}

/* False: there is no room left. */
static ovl_err_t list_dots(struct ovl_lane_ask *ask, struct listing *listing, uint64_t offset, bool *full)
{
	struct ovl_entry entry;
	ovl_err_t err = 0;

	if (!err && offset < 1) {
		err = ovl_tree_get(ask->fs->tree, ask->header.nodeid, &entry);
		*full = !err && !list_name(listing, 1, (const uint8_t *)".", 1, &entry, false);
	}
	if (!err && !*full && offset < 2) {
		err = ovl_tree_parent(ask->fs->tree, ask->header.nodeid, &entry);
		*full = !err && !list_name(listing, 2, (const uint8_t *)"..", 2, &entry, false);
	}
	return err;
}

static enum ovl_lane_verdict answer_listing(struct ovl_lane_ask *ask)
{
	struct listing listing = {.answer = ask->answer, .plus = ask->header.opcode == FUSE_READDIRPLUS};
	struct fuse_read_in in;
	struct ovl_ask asked;
	bool full = false;
	ovl_err_t err;

	if (!ovl_lane_head(ask, &in, sizeof(in)))
		return ovl_lane_fail(ask, EIO);
	/* For the session, which knows a directory by its handle: there are none (see answer_opendir). */
	in.fh = ask->header.nodeid;
	memcpy(ask->body, &in, sizeof(in));
	if (in.offset > INT64_MAX)
		return OVL_LANE_PASS;
	listing.room = in.size < ask->answer->room ? in.size : ask->answer->room;
	err = list_dots(ask, &listing, in.offset, &full);
	if (!err && !full)
		err = ovl_tree_list_how(ask->fs->tree, ask->header.nodeid, in.offset > DOTS ? in.offset - DOTS : 0,
					SIZE_MAX, how(ask, listing.plus ? OVL_COUNT : 0), list_child, &listing, &asked);
	if (err && !listing.given) {
		ask->answer->size = 0;
		return OVL_LANE_PASS;
	}
	return OVL_LANE_ANSWERED; /* what there is; the next request begins with what could not be had */
}

/* ---- what needs no tree ------------------------------------------------------------------------------- */

static enum ovl_lane_verdict answer_never(struct ovl_lane_ask *ask)
{
	return ovl_lane_fail(ask, ENOSYS); /* and the kernel does not ask again */
}

/* Listing keeps no state.  ENOSYS: no OPENDIR nor RELEASEDIR ever again, and listings are cached as below (Linux
 * fs/fuse/file.c: fuse_file_open).  A kernel that takes ENOSYS for an error gets a handle. */
static enum ovl_lane_verdict answer_opendir(struct ovl_lane_ask *ask)
{
	struct fuse_open_out out = {.fh = ask->header.nodeid, .open_flags = FOPEN_KEEP_CACHE | FOPEN_CACHE_DIR};

	if (atomic_load(&ask->fs->no_opendir))
		return ovl_lane_fail(ask, ENOSYS);
	ovl_lane_put(ask->answer, &out, sizeof(out));
	return OVL_LANE_ANSWERED;
}

static enum ovl_lane_verdict answer_nothing(struct ovl_lane_ask *ask)
{
	(void)ask;
	return OVL_LANE_ANSWERED;
}

/* What a handler does, which decides what it is called under. */
enum kind {
	DATA = 0, /* neither of the others, or it takes the gate itself */
	LOOK,     /* tells what the kernel keeps */
};

static const struct {
	ovl_lane_handler run;
	enum kind kind;
} handlers[OVL_LANE_OPCODES] = {
	[FUSE_LOOKUP] = {answer_lookup, LOOK},
	[FUSE_FORGET] = {answer_forget, DATA},
	[FUSE_GETATTR] = {answer_getattr, LOOK},
	[FUSE_SETATTR] = {ovl_lane_setattr, DATA},
	[FUSE_READLINK] = {ovl_lane_readlink, DATA},
	[FUSE_SYMLINK] = {ovl_lane_symlink, DATA},
	[FUSE_MKDIR] = {ovl_lane_mkdir, DATA},
	[FUSE_UNLINK] = {ovl_lane_unlink, DATA},
	[FUSE_RMDIR] = {ovl_lane_rmdir, DATA},
	[FUSE_RENAME] = {ovl_lane_rename, DATA},
	[FUSE_LINK] = {ovl_lane_link, DATA},
	[FUSE_OPEN] = {ovl_lane_open, DATA},
	[FUSE_READ] = {ovl_lane_read, DATA},
	[FUSE_WRITE] = {ovl_lane_write, DATA},
	[FUSE_STATFS] = {ovl_lane_statfs, DATA},
	[FUSE_RELEASE] = {ovl_lane_release, DATA},
	[FUSE_FSYNC] = {ovl_lane_fsync, DATA},
	[FUSE_SETXATTR] = {ovl_lane_setxattr, DATA},
	[FUSE_GETXATTR] = {ovl_lane_getxattr, DATA},
	[FUSE_LISTXATTR] = {ovl_lane_listxattr, DATA},
	[FUSE_FLUSH] = {answer_never, DATA},
	[FUSE_OPENDIR] = {answer_opendir, DATA},
	[FUSE_READDIR] = {answer_listing, LOOK},
	[FUSE_RELEASEDIR] = {answer_nothing, DATA},
	[FUSE_FSYNCDIR] = {ovl_lane_fsync, DATA},
	[FUSE_ACCESS] = {answer_never, DATA},
	[FUSE_CREATE] = {ovl_lane_create, DATA},
	[FUSE_BATCH_FORGET] = {answer_batch_forget, DATA},
	[FUSE_FALLOCATE] = {ovl_lane_fallocate, DATA},
	[FUSE_READDIRPLUS] = {answer_listing, LOOK},
	[FUSE_RENAME2] = {ovl_lane_rename, DATA},
	[FUSE_LSEEK] = {ovl_lane_lseek, DATA},
	[FUSE_COPY_FILE_RANGE] = {ovl_lane_copy, DATA},
	[FUSE_IOCTL] = {ovl_lane_ioctl, DATA},
	[OP_STATX] = {ovl_lane_statx, LOOK},
	[OP_COPY_FILE_RANGE_64] = {ovl_lane_copy, DATA},
};

enum ovl_lane_verdict ovl_lane_fs_answer(void *arg, unsigned char *message, size_t size, struct ovl_lane_answer *answer)
{
	struct ovl_lane_ask ask = {.fs = arg, .answer = answer};
	enum ovl_lane_verdict verdict;
	ovl_lane_handler run;

	memcpy(&ask.header, message, sizeof(ask.header));
	run = ask.header.opcode < OVL_LANE_OPCODES ? handlers[ask.header.opcode].run : NULL;
	if (!run)
		return OVL_LANE_PASS;
	ask.body = message + sizeof(ask.header);
	ask.size = size - sizeof(ask.header);
	if (handlers[ask.header.opcode].kind == LOOK) {
		ask.renaming = !ovl_gate_look(&ask.fs->gate);
		answer->looking = true;
	}
	verdict = run(&ask);
	if (verdict != OVL_LANE_ANSWERED && answer->looking) {
		ovl_gate_looked(&ask.fs->gate);
		answer->looking = false;
	}
	return verdict;
}

/* ---- INIT ---------------------------------------------------------------------------------------------- */

void ovl_lane_fs_agree(void *arg, uint64_t offered, uint64_t agreed)
{
	struct ovl_lane_fs *fs = arg;

	atomic_store(&fs->no_opendir, (offered & FUSE_NO_OPENDIR_SUPPORT) != 0);
	atomic_store(&fs->killpriv, (agreed & FUSE_HANDLE_KILLPRIV_V2) != 0);
	if (!(agreed & OVL_LANE_INIT_PASSTHROUGH))
		atomic_store(&fs->passthrough, false);
}

/* ---- replies of the session --------------------------------------------------------------------------- */

static bool gives_entry(uint32_t opcode)
{
	return opcode == FUSE_LOOKUP || opcode == FUSE_MKNOD || opcode == FUSE_MKDIR || opcode == FUSE_SYMLINK ||
	       opcode == FUSE_LINK || opcode == FUSE_CREATE || opcode == OP_TMPFILE;
}

/* The session shows nodeids as st_ino, which differ for the root and for nodeids from OVL_FRESH_NODEID on. */
static void show_ino(struct ovl_lane_fs *fs, uint32_t opcode, unsigned char *body, size_t size)
{
	struct ovl_entry entry;
	uint64_t nodeid;
	size_t at;

	if (gives_entry(opcode))
		at = offsetof(struct fuse_entry_out, attr.ino);
	else if (opcode == FUSE_GETATTR || opcode == FUSE_SETATTR)
		at = offsetof(struct fuse_attr_out, attr.ino);
	else
		return;
	if (size < at + sizeof(struct fuse_attr))
		return;
	memcpy(&nodeid, body + at, sizeof(nodeid));
	if (nodeid != OVL_ROOT_NODEID && nodeid < OVL_FRESH_NODEID)
		return;
	if (ovl_tree_get(fs->tree, nodeid, &entry) == 0)
		memcpy(body + at, &entry.ino, sizeof(entry.ino));
}

/* What Python has copied up, or made, is opened here: all handles are ours. */
static int open_for_session(struct ovl_lane_fs *fs, const struct ovl_lane_pending *request, unsigned char *body, size_t size)
{
	const bool made = request->opcode != FUSE_OPEN;
	const size_t at = made ? sizeof(struct fuse_entry_out) : 0;
	uint64_t nodeid = request->nodeid;
	struct fuse_open_out out;
	ovl_err_t err;
	bool gone;

	if (size < at + sizeof(out))
		return EIO;
	if (made)
		memcpy(&nodeid, body + offsetof(struct fuse_entry_out, nodeid), sizeof(nodeid));
	err = ovl_lane_file_open(fs, nodeid, request->flags & ~(uint32_t)O_TRUNC, -1, &out);
	if (!err && !made && request->flags & O_TRUNC)
		err = ovl_lane_truncate_opened(fs, nodeid, out.fh, request->kill);
	if (err) {
		if (made)
			ovl_tree_forget(fs->tree, nodeid, 1, &gone);
		return err > 0 ? EIO : -err;
	}
	memcpy(body + at, &out, sizeof(out));
	return 0;
}

int ovl_lane_fs_patch(void *arg, const struct ovl_lane_pending *request, unsigned char *body, size_t size)
{
	struct ovl_lane_fs *fs = arg;

	show_ino(fs, request->opcode, body, size);
	if (request->opcode == FUSE_OPEN || request->opcode == FUSE_CREATE || request->opcode == OP_TMPFILE)
		return open_for_session(fs, request, body, size);
	return 0;
}

/* ---- life ----------------------------------------------------------------------------------------------- */

ovl_err_t ovl_lane_fs_init(struct ovl_lane_fs *fs, struct ovl_tree *tree, const struct ovl_lane_upper *upper, int dev_fd,
			   bool no_open, bool passthrough)
{
	struct statfs where;
	ovl_err_t err;

	*fs = (struct ovl_lane_fs){.tree = tree, .upper = *upper, .dev_fd = dev_fd, .no_open = no_open};
	atomic_init(&fs->passthrough, passthrough);
	fs->uid = geteuid();
	fs->gid = getegid();
	fs->selinux = access("/sys/fs/selinux/enforce", F_OK) == 0;
	if (upper->work_fd >= 0 && fstatfs(upper->work_fd, &where) == 0)
		fs->upper.may_wait = where.f_type != TMPFS_MAGIC;
	err = ovl_gate_init(&fs->gate);
	if (err)
		return err;
	err = ovl_lane_files_init(&fs->files);
	if (err)
		ovl_gate_destroy(&fs->gate);
	return err;
}

void ovl_lane_fs_destroy(struct ovl_lane_fs *fs)
{
	ovl_lane_files_destroy(fs);
	ovl_lane_dirs_close(fs);
	ovl_gate_destroy(&fs->gate);
}
