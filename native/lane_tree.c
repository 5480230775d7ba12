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
 *      from memory is that of a moment before or after the change.  Before: the lane sees to it that it leaves before
 *      the reply to the change (lane.h, "Order"), so that the kernel, which discards what it knows when that reply
 *      comes, never keeps the older one.
 *   2. What has to be read from the layers: names of a directory that were not asked for so far.
 *      a. The kernel holds the directory's lock over create, link, unlink, rename, mkdir, rmdir in it, and shared over
 *         lookups and listings: none of these changes is under way in a directory whose names are read.  (A revalidation
 *         takes no lock, but is about a name that the kernel holds an inode of, which is in memory: case 1.)
 *      b. A rename of a directory above changes paths without any lock on this directory: the path that the tree would
 *         open might not exist, or lead to another directory (RENAME_EXCHANGE).  So while a RENAME is with Python no
 *         layer is asked from here (OVL_LANE_RENAMING, OVL_KNOWN).
 *      c. A copy-up changes no names.  It places all hard links of an inode, also in other directories, but has the
 *         tree resolve those first (copy_up.py: _find_all_names), so they are in memory.  The directories above are
 *         copied up, and the tree is told, before anything is put into them.
 *      d. Objects with overlay.origin, redirect or metacopy are OVL_ASK.
 *   3. O_TMPFILE takes no lock on the directory, and has a name for a moment, "/" (dir.py: _NO_NAME): it is not listed.
 *   4. Python holds nodeids and Inode views across its own steps, of inodes that the kernel need not hold (what a list
 *      or a lookup just gave).  Only forgetting drops inodes: it is done here only while Python has no request at all
 *      (OVL_LANE_BUSY), and the reader, which is here, hands it none meanwhile.
 *   5. Python keeps descriptors and parents by nodeid of inodes that lost a name: their FORGET is passed on, even if
 *      they have another name (ovl_tree_forget_plain).
 *   6. A negative entry is given where a merged directory has no such name; case 2a says that none is being made.
 *
 * References: include/uapi/linux/fuse.h; Linux fs/fuse/dir.c (fuse_lookup_name, fuse_dentry_revalidate), readdir.c,
 * inode.c (fuse_change_attributes).
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "lane_tree.h"

#include <errno.h>
#include <linux/fuse.h>
#include <string.h>

#define BLOCK_BYTES 4096u
#define NS 1000000000ll
/* "." and ".." have the offsets 1 and 2, the others their cookie + 2. */
#define DOTS 2u

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

struct request {
	struct ovl_tree *tree;
	unsigned situation;
	struct fuse_in_header header;
	unsigned char *body;
	size_t size; /* of the body */
	struct ovl_lane_answer *answer;
};

typedef enum ovl_lane_verdict (*handler_t)(struct request *request);

static enum ovl_lane_verdict fail(struct request *request, int error)
{
	request->answer->error = error;
	return OVL_LANE_ANSWERED;
}

/* One value, at the end of the reply.  The room is at least 4 KiB. */
static void put(struct ovl_lane_answer *answer, const void *value, size_t size)
{
	memcpy(answer->body + answer->size, value, size);
	answer->size += size;
}

static unsigned how(const struct request *request, unsigned more)
{
	return more | (request->situation & OVL_LANE_RENAMING ? OVL_KNOWN : 0);
}

/* ---- attributes --------------------------------------------------------------------------------------- */

static void split(int64_t ns, uint64_t *sec, uint32_t *nsec)
{
	int64_t rest = ns % NS;

	*sec = (uint64_t)(ns / NS - (rest < 0));
	*nsec = (uint32_t)(rest < 0 ? rest + NS : rest);
}

static void fill_attr(const struct ovl_entry *entry, struct fuse_attr *out)
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
static void fill_entry(const struct ovl_entry *entry, struct fuse_entry_out *out)
{
	*out = (struct fuse_entry_out){.nodeid = entry->nodeid, .entry_valid = OVL_LANE_VALID_S};
	if (entry->nodeid == 0)
		return;
	out->attr_valid = OVL_LANE_VALID_S;
	fill_attr(entry, &out->attr);
}

static enum ovl_lane_verdict answer_getattr(struct request *request)
{
	struct fuse_attr_out out = {.attr_valid = OVL_LANE_VALID_S};
	struct ovl_entry entry;

	if (request->size < sizeof(struct fuse_getattr_in))
		return fail(request, EIO);
	if (ovl_tree_get(request->tree, request->header.nodeid, &entry))
		return OVL_LANE_PASS;
	fill_attr(&entry, &out.attr);
	put(request->answer, &out, sizeof(out));
	return OVL_LANE_ANSWERED;
}

/* ---- names -------------------------------------------------------------------------------------------- */

static enum ovl_lane_verdict answer_lookup(struct request *request)
{
	size_t len = strnlen((const char *)request->body, request->size);
	struct fuse_entry_out out;
	struct ovl_entry entry;
	struct ovl_ask ask;
	ovl_err_t err;

	if (len == 0 || len + 1 != request->size || memchr(request->body, '/', len))
		return fail(request, EIO);
	if (request->body[0] == '.' && (len == 1 || (len == 2 && request->body[1] == '.')))
		return OVL_LANE_PASS;
	if (len > OVL_NAME_MAX)
		return fail(request, ENAMETOOLONG);
	err = ovl_tree_lookup(request->tree, request->header.nodeid, request->body, len, how(request, OVL_COUNT), &entry,
			      &ask);
	if (err == -ENOTDIR || err == -ESTALE)
		return fail(request, -err);
	if (err)
		return OVL_LANE_PASS;
	fill_entry(&entry, &out);
	put(request->answer, &out, sizeof(out));
	return OVL_LANE_ANSWERED;
}

static enum ovl_lane_verdict answer_readlink(struct request *request)
{
	const uint8_t *target;
	size_t len;

	if (ovl_tree_readlink(request->tree, request->header.nodeid, &target, &len) || len > request->answer->room)
		return OVL_LANE_PASS;
	put(request->answer, target, len);
	return OVL_LANE_ANSWERED;
}

/* ---- forgetting --------------------------------------------------------------------------------------- */

static enum ovl_lane_verdict answer_forget(struct request *request)
{
	struct fuse_forget_in in;

	if (request->size < sizeof(in))
		return OVL_LANE_SILENT;
	if (request->situation & OVL_LANE_BUSY)
		return OVL_LANE_PASS;
	memcpy(&in, request->body, sizeof(in));
	return ovl_tree_forget_plain(request->tree, request->header.nodeid, in.nlookup) ? OVL_LANE_PASS : OVL_LANE_SILENT;
}

/* What is left for Python moves up to the front of the message. */
static enum ovl_lane_verdict answer_batch_forget(struct request *request)
{
	struct fuse_batch_forget_in in;
	struct fuse_forget_one one;
	size_t count, left = 0;
	unsigned char *items;

	if (request->size < sizeof(in))
		return OVL_LANE_SILENT;
	if (request->situation & OVL_LANE_BUSY)
		return OVL_LANE_PASS;
	memcpy(&in, request->body, sizeof(in));
	items = request->body + sizeof(in);
	count = (request->size - sizeof(in)) / sizeof(one);
	if (count > in.count)
		count = in.count;
	for (size_t i = 0; i < count; i++) {
		memcpy(&one, items + i * sizeof(one), sizeof(one));
		if (ovl_tree_forget_plain(request->tree, one.nodeid, one.nlookup))
			memcpy(items + left++ * sizeof(one), &one, sizeof(one));
	}
	if (left == 0)
		return OVL_LANE_SILENT;
	in.count = (uint32_t)left;
	memcpy(request->body, &in, sizeof(in));
	request->size = sizeof(in) + left * sizeof(one);
	return OVL_LANE_PASS;
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
		fill_entry(entry, &out);
		if (!counts) /* a dot: the kernel neither counts nor links it */
			out.nodeid = 0;
		put(answer, &out, sizeof(out));
	}
	put(answer, &dirent, sizeof(dirent));
	put(answer, name, len);
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
static ovl_err_t list_dots(struct request *request, struct listing *listing, uint64_t offset, bool *full)
{
	struct ovl_entry entry;
	ovl_err_t err = 0;

	if (!err && offset < 1) {
		err = ovl_tree_get(request->tree, request->header.nodeid, &entry);
		*full = !err && !list_name(listing, 1, (const uint8_t *)".", 1, &entry, false);
	}
	if (!err && !*full && offset < 2) {
		err = ovl_tree_parent(request->tree, request->header.nodeid, &entry);
		*full = !err && !list_name(listing, 2, (const uint8_t *)"..", 2, &entry, false);
	}
	return err;
}

static enum ovl_lane_verdict answer_listing(struct request *request)
{
	struct listing listing = {.answer = request->answer, .plus = request->header.opcode == FUSE_READDIRPLUS};
	struct fuse_read_in in;
	struct ovl_ask ask;
	bool full = false;
	ovl_err_t err;

	if (request->size < sizeof(in))
		return fail(request, EIO);
	memcpy(&in, request->body, sizeof(in));
	/* For the session, which knows a directory by its handle: there are none (see answer_opendir). */
	in.fh = request->header.nodeid;
	memcpy(request->body, &in, sizeof(in));
	if (in.offset > INT64_MAX)
		return OVL_LANE_PASS;
	listing.room = in.size < request->answer->room ? in.size : request->answer->room;
	err = list_dots(request, &listing, in.offset, &full);
	if (!err && !full)
		err = ovl_tree_list_how(request->tree, request->header.nodeid, in.offset > DOTS ? in.offset - DOTS : 0,
					SIZE_MAX, how(request, listing.plus ? OVL_COUNT : 0), list_child, &listing, &ask);
	if (err && !listing.given) {
		request->answer->size = 0;
		return OVL_LANE_PASS;
	}
	return OVL_LANE_ANSWERED; /* what there is; the next request begins with what could not be had */
}

/* ---- what needs no tree ------------------------------------------------------------------------------- */

static enum ovl_lane_verdict answer_never(struct request *request)
{
	return fail(request, ENOSYS); /* and the kernel does not ask again */
}

/* Listing keeps no state.  ENOSYS: no OPENDIR nor RELEASEDIR ever again, and listings are cached as below (Linux
 * fs/fuse/file.c: fuse_file_open).  A kernel that takes ENOSYS for an error gets a handle. */
static enum ovl_lane_verdict answer_opendir(struct request *request)
{
	struct fuse_open_out out = {.fh = request->header.nodeid, .open_flags = FOPEN_KEEP_CACHE | FOPEN_CACHE_DIR};

	if (request->situation & OVL_LANE_NO_OPENDIR)
		return fail(request, ENOSYS);
	put(request->answer, &out, sizeof(out));
	return OVL_LANE_ANSWERED;
}

static enum ovl_lane_verdict answer_nothing(struct request *request)
{
	(void)request;
	return OVL_LANE_ANSWERED;
}

static enum ovl_lane_verdict pass_fsyncdir(struct request *request)
{
	struct fuse_fsync_in in;

	if (request->size < sizeof(in))
		return fail(request, EIO);
	memcpy(&in, request->body, sizeof(in));
	in.fh = request->header.nodeid;
	memcpy(request->body, &in, sizeof(in));
	return OVL_LANE_PASS;
}

static const handler_t handlers[OVL_LANE_OPCODES] = {
	[FUSE_LOOKUP] = answer_lookup,
	[FUSE_FORGET] = answer_forget,
	[FUSE_GETATTR] = answer_getattr,
	[FUSE_READLINK] = answer_readlink,
	[FUSE_FLUSH] = answer_never,
	[FUSE_OPENDIR] = answer_opendir,
	[FUSE_READDIR] = answer_listing,
	[FUSE_RELEASEDIR] = answer_nothing,
	[FUSE_FSYNCDIR] = pass_fsyncdir,
	[FUSE_ACCESS] = answer_never,
	[FUSE_BATCH_FORGET] = answer_batch_forget,
	[FUSE_READDIRPLUS] = answer_listing,
};

enum ovl_lane_verdict ovl_lane_tree_answer(void *tree, unsigned situation, unsigned char *message, size_t *size,
					   struct ovl_lane_answer *answer)
{
	struct request request = {.tree = tree, .situation = situation, .answer = answer};
	enum ovl_lane_verdict verdict;
	handler_t handler;

	memcpy(&request.header, message, sizeof(request.header));
	handler = request.header.opcode < OVL_LANE_OPCODES ? handlers[request.header.opcode] : NULL;
	if (!handler)
		return OVL_LANE_PASS;
	request.body = message + sizeof(request.header);
	request.size = *size - sizeof(request.header);
	verdict = handler(&request);
	if (verdict == OVL_LANE_PASS) {
		*size = sizeof(request.header) + request.size;
		request.header.len = (uint32_t)*size;
		memcpy(message, &request.header, sizeof(request.header));
	}
	return verdict;
}

/* ---- replies of the session --------------------------------------------------------------------------- */

static bool gives_entry(uint32_t opcode)
{
	return opcode == FUSE_LOOKUP || opcode == FUSE_MKNOD || opcode == FUSE_MKDIR || opcode == FUSE_SYMLINK ||
	       opcode == FUSE_LINK || opcode == FUSE_CREATE;
}

void ovl_lane_tree_patch(void *tree, uint32_t opcode, unsigned char *body, size_t size)
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
	if (ovl_tree_get(tree, nodeid, &entry) == 0)
		memcpy(body + at, &entry.ino, sizeof(entry.ino));
}
