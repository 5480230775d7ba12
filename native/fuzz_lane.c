/*
 * fuzz_lane.c - the native answers of the lane, fed with FUSE messages that are right, wrong, cut short or lying
 *
 * Two programs in one:
 *   - with OVL_LIBFUZZER, the libFuzzer entry point LLVMFuzzerTestOneInput: a situation, then messages of any bytes;
 *   - else `main SEED STEPS THREADS`: messages of a generator that knows the protocol, half of them damaged afterwards;
 *     with several threads all on one mount (for the thread sanitizer).
 *
 *      generator --message--> ovl_lane_fs_answer --answered--> checked, and what it gave is remembered
 *                                    | passed on
 *                                    v
 *                     gate, then a stand-in for Python: changes disk and tree as Python would
 *
 * Checked after each message: the reply fits its room and is as long as the protocol says, has no body beside an error,
 * every directory entry in it is whole, and all handles of an inode agree about passthrough (Linux fs/fuse/iomode.c).  At
 * the end: the invariants of tree.h, and that no descriptor and no backing file is left.  Each message is a block of its
 * own, so that the sanitizer sees every step beyond its end.
 *
 * A thread releases only handles of its own, as the kernel does: it holds a file while it is in use.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <linux/fuse.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "fuzz_place.h"

#define BODY_MAX 4096u
#define ROOM 8192u
#define KNOWN_MAX 64u
#define HANDLES_MAX 24u
#define OPENED_PASSTHROUGH (1u << 7)

struct handle {
	uint64_t nodeid, fh;
	bool passed;
};

struct worker {
	struct ovl_place *place;
	pthread_mutex_t *python;
	uint64_t random, steps;
	bool alone; /* nobody else has handles */
	uint64_t known[KNOWN_MAX];
	size_t known_count;
	struct handle handles[HANDLES_MAX];
	size_t handle_count;
	size_t answered, passed_on, failed;
};

/* xorshift64*: every thread has its own */
static uint64_t next(struct worker *worker)
{
	worker->random ^= worker->random >> 12;
	worker->random ^= worker->random << 25;
	worker->random ^= worker->random >> 27;
	return (worker->random * 0x2545F4914F6CDD1Dull) >> 16;
}

/* ---- what a reply must be -------------------------------------------------------------------------------------------- */

static void check_listing(const unsigned char *body, size_t size, bool plus)
{
	const size_t before = plus ? FUSE_NAME_OFFSET_DIRENTPLUS : FUSE_NAME_OFFSET;

	while (size > 0) {
		struct fuse_dirent dirent;
		size_t whole;

		ovl_require(size >= before, "a directory entry is cut");
		memcpy(&dirent, body + before - sizeof(dirent), sizeof(dirent));
		whole = FUSE_REC_ALIGN(before + dirent.namelen);
		ovl_require(dirent.namelen > 0 && dirent.namelen <= OVL_NAME_MAX && whole <= size, "a name is cut");
		ovl_require(!memchr(body + before, '/', dirent.namelen), "a name with a slash");
		body += whole;
		size -= whole;
	}
}

static bool gives_entry(uint32_t opcode)
{
	return opcode == FUSE_LOOKUP || opcode == FUSE_MKDIR || opcode == FUSE_SYMLINK || opcode == FUSE_LINK ||
	       opcode == FUSE_CREATE;
}

/* How long the body of a reply without an error has to be; SIZE_MAX: that differs. */
static size_t wanted_size(uint32_t opcode)
{
	switch (opcode) {
	case FUSE_LOOKUP: case FUSE_MKDIR: case FUSE_SYMLINK: case FUSE_LINK:
		return sizeof(struct fuse_entry_out);
	case FUSE_CREATE:
		return sizeof(struct fuse_entry_out) + sizeof(struct fuse_open_out);
	case FUSE_GETATTR: case FUSE_SETATTR:
		return sizeof(struct fuse_attr_out);
	case FUSE_OPEN: case FUSE_OPENDIR:
		return sizeof(struct fuse_open_out);
	case FUSE_WRITE: case FUSE_LSEEK: case FUSE_COPY_FILE_RANGE: case OP_COPY_FILE_RANGE_64:
		return 8;
	case FUSE_STATFS:
		return sizeof(struct fuse_statfs_out);
	case FUSE_READ: case FUSE_READDIR: case FUSE_READDIRPLUS: case FUSE_READLINK: case FUSE_GETXATTR: case FUSE_LISTXATTR:
	case FUSE_IOCTL: case OP_STATX:
		return SIZE_MAX;
	default:
		return 0;
	}
}

static void check_reply(uint32_t opcode, const unsigned char *message, size_t size, const struct ovl_lane_answer *answer)
{
	struct fuse_read_in in;
	struct fuse_getxattr_in xattr;

	ovl_require(answer->size <= ROOM && answer->error >= 0 && answer->error < 512, "the reply does not fit");
	ovl_require(answer->error == 0 || answer->size == 0, "a body beside an error");
	if (answer->error)
		return;
	ovl_require(wanted_size(opcode) == SIZE_MAX || wanted_size(opcode) == answer->size, "a body of a wrong length");
	if (opcode == FUSE_READDIR || opcode == FUSE_READDIRPLUS)
		check_listing(answer->body, answer->size, opcode == FUSE_READDIRPLUS);
	if (opcode == FUSE_READ || opcode == FUSE_READDIR || opcode == FUSE_READDIRPLUS) {
		ovl_require(size >= sizeof(struct fuse_in_header) + sizeof(in), "an answer to a message that is cut");
		memcpy(&in, message + sizeof(struct fuse_in_header), sizeof(in));
		ovl_require(answer->size <= in.size, "more than was asked for");
	}
	if (opcode == FUSE_GETXATTR || opcode == FUSE_LISTXATTR) {
		memcpy(&xattr, message + sizeof(struct fuse_in_header), sizeof(xattr));
		ovl_require(xattr.size ? answer->size <= xattr.size : answer->size == sizeof(struct fuse_getxattr_out),
			    "more of an xattr than was asked for");
	}
}

/* ---- what a worker has been told ------------------------------------------------------------------------------------- */

static void learn_handle(struct worker *worker, uint64_t nodeid, const unsigned char *body)
{
	struct fuse_open_out out;
	bool passed;

	memcpy(&out, body, sizeof(out));
	passed = out.open_flags & OPENED_PASSTHROUGH;
	ovl_require(!passed || !(out.open_flags & (FOPEN_KEEP_CACHE | FOPEN_CACHE_DIR)), "the kernel answers EIO to that");
	for (size_t i = 0; worker->alone && i < worker->handle_count; i++)
		ovl_require(worker->handles[i].nodeid != nodeid || worker->handles[i].passed == passed,
			    "handles of one inode differ: the kernel answers EIO to that");
	if (worker->handle_count == HANDLES_MAX)
		ovl_lane_file_release(&worker->place->fs, out.fh);
	else
		worker->handles[worker->handle_count++] = (struct handle){nodeid, out.fh, passed};
}

static void learn(struct worker *worker, uint32_t opcode, uint64_t nodeid, const unsigned char *body)
{
	if (gives_entry(opcode)) {
		memcpy(&nodeid, body, sizeof(nodeid));
		if (nodeid)
			worker->known[worker->known_count++ % KNOWN_MAX] = nodeid;
	}
	if (opcode == FUSE_OPEN)
		learn_handle(worker, nodeid, body);
	else if (opcode == FUSE_CREATE)
		learn_handle(worker, nodeid, body + sizeof(struct fuse_entry_out));
}

static void unlearn_handle(struct worker *worker, uint64_t fh)
{
	for (size_t i = 0; i < worker->handle_count; i++)
		if (worker->handles[i].fh == fh)
			worker->handles[i--] = worker->handles[--worker->handle_count];
}

/* ---- a stand-in for Python ------------------------------------------------------------------------------------------- */

static size_t pick_name(struct worker *worker, char *name, size_t size)
{
	if (next(worker) % 32 == 0) {
		size_t len = next(worker) % (size - 1);

		memset(name, 'x', len);
		name[len] = 0;
		return len;
	}
	return (size_t)snprintf(name, size, "n%u", (unsigned)(next(worker) % (next(worker) % 2 ? 12 : OVL_PLACE_NAMES + 8)));
}

static uint64_t pick_nodeid(struct worker *worker)
{
	const size_t count = worker->known_count < KNOWN_MAX ? worker->known_count : KNOWN_MAX;

	switch (next(worker) % 8) {
	case 0: case 1: case 2:
		return OVL_ROOT_NODEID;
	case 3:
		return next(worker) % 3 * OVL_FRESH_NODEID + next(worker) % 4;
	case 4:
		return OVL_PLACE_INO_BASE + next(worker) % (OVL_PLACE_NAMES + 2);
	default:
		return count ? worker->known[next(worker) % count] : OVL_ROOT_NODEID;
	}
}

/* A lower file whose name is in the root goes into the upperdir. */
static void copy_up(struct worker *worker, uint64_t nodeid)
{
	struct ovl_tree *tree = worker->place->tree;
	struct ovl_description is;
	uint8_t *path;
	struct stat st;
	size_t len;
	int fd;

	if (ovl_tree_describe(tree, nodeid, false, &is) || is.upper || !S_ISREG(is.entry.attr.mode) ||
	    ovl_tree_path(tree, nodeid, &path, &len))
		return;
	fd = memchr(path, '/', len) ? -1
				    : openat(worker->place->upper, (char *)path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
	if (fd >= 0 && ftruncate(fd, (off_t)is.entry.attr.size) == 0 && fstat(fd, &st) == 0)
		(void)ovl_tree_set_upper(tree, nodeid, st.st_ino, false);
	if (fd >= 0)
		close(fd);
	free(path);
}

/* Disk first, then the tree; all in the root, where a name is a path. */
static void change(struct worker *worker)
{
	struct ovl_tree *tree = worker->place->tree;
	const int upper = worker->place->upper;
	char name[OVL_NAME_MAX + 1], other[OVL_NAME_MAX + 1];
	size_t len = pick_name(worker, name, sizeof(name)), other_len = pick_name(worker, other, sizeof(other));
	const uint8_t *bytes = (const uint8_t *)name, *other_bytes = (const uint8_t *)other;
	struct ovl_ask asked;
	struct ovl_attr attr;
	uint64_t nodeid;
	struct stat st;

	if (len == 0 || other_len == 0)
		return;
	switch (next(worker) % 8) {
	case 0:
		if (mkdirat(upper, name, 0755) == 0 && fstatat(upper, name, &st, AT_SYMLINK_NOFOLLOW) == 0) {
			ovl_attr_of_stat(&st, &attr);
			(void)ovl_tree_add(tree, OVL_ROOT_NODEID, bytes, len, &attr, st.st_ino, st.st_ino, &nodeid, &asked);
		}
		break;
	case 1:
		if (unlinkat(upper, name, 0) == 0 || unlinkat(upper, name, AT_REMOVEDIR) == 0)
			(void)ovl_tree_remove(tree, OVL_ROOT_NODEID, bytes, len, &asked);
		break;
	case 2:
		if (renameat2(upper, name, upper, other, RENAME_NOREPLACE) == 0)
			(void)ovl_tree_move(tree, OVL_ROOT_NODEID, bytes, len, OVL_ROOT_NODEID, other_bytes, other_len, &asked);
		break;
	case 3:
		if (renameat2(upper, name, upper, other, RENAME_EXCHANGE) == 0)
			(void)ovl_tree_exchange(tree, OVL_ROOT_NODEID, bytes, len, OVL_ROOT_NODEID, other_bytes, other_len, &asked);
		break;
	case 4:
		(void)ovl_tree_add_device(tree, 1 + next(worker) % 70, next(worker) % 70);
		break;
	case 5: /* what has no upper object that a name leads to: the tree alone */
		(void)ovl_tree_move(tree, pick_nodeid(worker), bytes, len, pick_nodeid(worker), other_bytes, other_len, &asked);
		break;
	default:
		copy_up(worker, pick_nodeid(worker));
	}
}

static bool is_rename(uint32_t opcode)
{
	return opcode == FUSE_RENAME || opcode == FUSE_RENAME2;
}

/* What lane.c and Python do with a request that is passed on.  `message` may be changed. */
static void pass_on(struct worker *worker, const struct fuse_in_header *header, unsigned char *message, size_t size)
{
	struct ovl_lane_fs *fs = &worker->place->fs;
	struct ovl_lane_pending request = {.unique = 2, .nodeid = header->nodeid, .opcode = header->opcode};
	unsigned char body[sizeof(struct fuse_entry_out) + sizeof(struct fuse_open_out)] = {0};
	const bool has_reply = header->opcode != FUSE_FORGET && header->opcode != FUSE_BATCH_FORGET;
	struct fuse_forget_in forget;
	struct fuse_open_in in;
	bool gone;

	if (has_reply)
		ovl_gate_hand_over(&fs->gate, is_rename(header->opcode));
	pthread_mutex_lock(worker->python);
	if (header->opcode == FUSE_OPEN && size >= sizeof(*header) + sizeof(in)) {
		memcpy(&in, message + sizeof(*header), sizeof(in));
		request.flags = in.flags;
		request.kill = in.open_flags & 1u;
		copy_up(worker, header->nodeid);
	} else if (header->opcode == FUSE_FORGET && size >= sizeof(*header) + sizeof(forget)) {
		memcpy(&forget, message + sizeof(*header), sizeof(forget));
		ovl_tree_forget(worker->place->tree, header->nodeid, forget.nlookup, &gone);
	} else {
		change(worker);
	}
	pthread_mutex_unlock(worker->python);
	if (!has_reply)
		return;
	ovl_gate_returned(&fs->gate, is_rename(header->opcode));
	if (header->opcode == FUSE_OPEN || header->opcode == FUSE_GETATTR) {
		int error = ovl_lane_fs_patch(fs, &request, body, header->opcode == FUSE_OPEN ? sizeof(struct fuse_open_out)
												: sizeof(struct fuse_attr_out));

		ovl_require(error >= 0 && error < 512, "an impossible errno");
		if (!error)
			learn(worker, header->opcode, header->nodeid, body);
	}
	ovl_gate_barrier(&fs->gate);
}

/* ---- one message ----------------------------------------------------------------------------------------------------- */

/* A descriptor's worth of memory is not what is to be tried without a tmpfs. */
static void spare_the_disk(uint32_t opcode, unsigned char *message, size_t size)
{
	struct fuse_fallocate_in in;

	if (opcode != FUSE_FALLOCATE || geteuid() == 0 || size < sizeof(struct fuse_in_header) + sizeof(in))
		return;
	memcpy(&in, message + sizeof(struct fuse_in_header), sizeof(in));
	in.length &= 0xfffff;
	memcpy(message + sizeof(struct fuse_in_header), &in, sizeof(in));
}

static void send_message(struct worker *worker, const unsigned char *bytes, size_t size)
{
	struct ovl_lane_fs *fs = &worker->place->fs;
	struct ovl_lane_answer answer = {.room = ROOM};
	struct fuse_in_header header;
	struct fuse_release_in release;
	enum ovl_lane_verdict verdict;
	unsigned char *message;

	if (size < sizeof(header))
		return; /* the lane drops it */
	message = malloc(size);
	answer.body = malloc(ROOM);
	ovl_require(message && answer.body, "no memory");
	memcpy(message, bytes, size);
	memcpy(&header, message, sizeof(header));
	spare_the_disk(header.opcode, message, size);
	if (header.opcode == FUSE_RELEASE && size >= sizeof(header) + sizeof(release)) {
		memcpy(&release, message + sizeof(header), sizeof(release));
		unlearn_handle(worker, release.fh);
	}
	verdict = ovl_lane_fs_answer(fs, message, size, &answer);
	ovl_require(!answer.looking || verdict == OVL_LANE_ANSWERED, "the order is not given back");
	if (answer.looking)
		ovl_gate_looked(&fs->gate);
	if (verdict == OVL_LANE_ANSWERED) {
		if (answer.changed)
			ovl_gate_barrier(&fs->gate);
		check_reply(header.opcode, message, size, &answer);
		if (!answer.error)
			learn(worker, header.opcode, header.nodeid, answer.body);
		worker->answered++;
		worker->failed += answer.error != 0;
	} else if (verdict == OVL_LANE_PASS) {
		pass_on(worker, &header, message, size);
		worker->passed_on++;
	}
	free(message);
	free(answer.body);
}

#ifdef OVL_LIBFUZZER

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
	(void)argc, (void)argv;
	ovl_place_confine();
	return 0;
}

/* Nobody guesses inode numbers: nodeid 2 is the first that was given, 3 the second, ... */
static void name_known(const struct worker *worker, unsigned char *message, size_t size)
{
	struct fuse_in_header header;

	if (size < sizeof(header))
		return;
	memcpy(&header, message, sizeof(header));
	if (header.nodeid >= 2 && header.nodeid - 2 < worker->known_count && header.nodeid - 2 < KNOWN_MAX)
		header.nodeid = worker->known[header.nodeid - 2];
	memcpy(message, &header, sizeof(header));
}

/* One byte situation, then messages: two bytes of length and as many bytes. */
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static pthread_mutex_t python = PTHREAD_MUTEX_INITIALIZER;
	struct ovl_place place;
	struct worker worker = {.place = &place, .python = &python, .random = 1, .alone = true};

	if (size < 1)
		return 0;
	ovl_place_open(&place, data[0] & 1, data[0] & 2, (data[0] & 12) == 12);
	for (size_t at = 1; size - at >= 2;) {
		size_t len = (size_t)data[at] | (size_t)data[at + 1] << 8;

		at += 2;
		if (len > size - at)
			len = size - at;
		unsigned char *message = malloc(len + 1);

		ovl_require(message != NULL, "no memory");
		memcpy(message, data + at, len);
		name_known(&worker, message, len);
		send_message(&worker, message, len);
		free(message);
		at += len;
	}
	ovl_place_close(&place);
	return 0;
}

#else

/* ---- the generator --------------------------------------------------------------------------------------------------- */

/* The body of a request, in pieces. */
struct body {
	unsigned char bytes[BODY_MAX];
	size_t size;
};

static void put(struct body *body, const void *value, size_t size)
{
	memcpy(body->bytes + body->size, value, size);
	body->size += size;
}

static void put_name(struct worker *worker, struct body *body)
{
	char name[OVL_NAME_MAX + 20];

	put(body, name, pick_name(worker, name, sizeof(name)) + 1);
}

static uint64_t small(struct worker *worker)
{
	return next(worker) % 16 == 0 ? next(worker) << next(worker) % 48 : next(worker) % 3000;
}

static uint32_t pick_owner(struct worker *worker)
{
	return next(worker) % 3 ? 0 : 1000;
}

static struct handle pick_handle(struct worker *worker)
{
	if (worker->handle_count == 0)
		return (struct handle){.nodeid = pick_nodeid(worker), .fh = worker->alone ? next(worker) % 80 : 0};
	return worker->handles[next(worker) % worker->handle_count];
}

static uint32_t pick_open_flags(struct worker *worker)
{
	static const uint32_t more[] = {0, 0, 0, O_TRUNC, O_APPEND, O_SYNC, O_DSYNC, O_DIRECT, O_TRUNC | O_APPEND};

	return (uint32_t)(next(worker) % 3) | more[next(worker) % (sizeof(more) / sizeof(more[0]))];
}

/* Requests about an open file; true: `opcode` is one. */
static bool put_file_request(struct worker *worker, uint32_t opcode, uint64_t *nodeid, struct body *body)
{
	const struct handle handle = pick_handle(worker), other = pick_handle(worker);
	static const unsigned char content[2000];

	switch (opcode) {
	case FUSE_READ: {
		struct fuse_read_in in = {.fh = handle.fh, .offset = small(worker), .size = (uint32_t)small(worker)};
		put(body, &in, sizeof(in));
		break;
	}
	case FUSE_WRITE: {
		struct fuse_write_in in = {.fh = handle.fh, .offset = small(worker), .size = (uint32_t)(next(worker) % 2000)};
		in.write_flags = (uint32_t)(next(worker) % 8);
		put(body, &in, sizeof(in));
		put(body, content, in.size);
		break;
	}
	case FUSE_RELEASE: {
		struct fuse_release_in in = {.fh = next(worker) % 4 ? 0 : handle.fh}; /* so that some stay open for a while */
		put(body, &in, sizeof(in));
		break;
	}
	case FUSE_FSYNC: case FUSE_FSYNCDIR: {
		struct fuse_fsync_in in = {.fh = handle.fh, .fsync_flags = (uint32_t)(next(worker) % 2)};
		put(body, &in, sizeof(in));
		break;
	}
	case FUSE_FALLOCATE: {
		static const uint32_t modes[] = {0, FALLOC_FL_KEEP_SIZE, FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE,
						 FALLOC_FL_ZERO_RANGE, FALLOC_FL_COLLAPSE_RANGE, 0x4000};
		struct fuse_fallocate_in in = {.fh = handle.fh, .offset = small(worker), .length = small(worker)};
		in.mode = modes[next(worker) % (sizeof(modes) / sizeof(modes[0]))];
		put(body, &in, sizeof(in));
		break;
	}
	case FUSE_IOCTL: {
		static const uint32_t commands[] = {FS_IOC_GETFLAGS, FS_IOC_SETFLAGS, FS_IOC_FSGETXATTR, FS_IOC_FSSETXATTR, 0x5401};
		struct fuse_ioctl_in in = {.fh = handle.fh, .flags = (uint32_t)(next(worker) % 4), .in_size = 4, .out_size = 28};
		in.cmd = commands[next(worker) % (sizeof(commands) / sizeof(commands[0]))];
		put(body, &in, sizeof(in));
		put(body, content, next(worker) % 40);
		break;
	}
	case OP_STATX: {
		uint64_t in[3] = {next(worker) % 2, handle.fh, next(worker)}; /* flags, handle, flags and mask */
		put(body, in, sizeof(in));
		break;
	}
	case FUSE_LSEEK: {
		struct fuse_lseek_in in = {.fh = handle.fh, .offset = small(worker), .whence = (uint32_t)(next(worker) % 6)};
		put(body, &in, sizeof(in));
		break;
	}
	case FUSE_COPY_FILE_RANGE: case OP_COPY_FILE_RANGE_64: {
		struct fuse_copy_file_range_in in = {.fh_in = handle.fh, .off_in = small(worker), .fh_out = other.fh};
		in.nodeid_out = other.nodeid;
		in.off_out = small(worker);
		in.len = small(worker);
		put(body, &in, sizeof(in));
		break;
	}
	default:
		return false;
	}
	if (opcode != FUSE_FSYNCDIR)
		*nodeid = handle.nodeid;
	return true;
}

static void put_setattr(struct worker *worker, uint64_t *nodeid, struct body *body)
{
	const struct handle handle = pick_handle(worker);
	struct fuse_setattr_in in = {.valid = (uint32_t)(next(worker) & next(worker) & 0xfff), .fh = handle.fh};

	if (in.valid & FATTR_FH)
		*nodeid = handle.nodeid;
	in.size = small(worker);
	in.mode = S_IFREG | (uint32_t)(next(worker) % 010000);
	in.uid = pick_owner(worker);
	in.gid = pick_owner(worker);
	in.mtime = small(worker);
	in.mtimensec = (uint32_t)(next(worker) % 1100000000u);
	put(body, &in, sizeof(in));
}

/* Requests about names; true: `opcode` is one. */
static bool put_name_request(struct worker *worker, uint32_t opcode, struct body *body)
{
	const uint32_t mode = (uint32_t)(next(worker) % 4 ? 0644 | next(worker) % 2 * 0111 : next(worker) % 010000);

	switch (opcode) {
	case FUSE_SYMLINK:
		put_name(worker, body);
		break;
	case FUSE_MKDIR: {
		struct fuse_mkdir_in in = {.mode = mode, .umask = (uint32_t)(next(worker) % 2 * 022)};
		put(body, &in, sizeof(in));
		break;
	}
	case FUSE_CREATE: {
		struct fuse_create_in in = {.flags = O_CREAT | pick_open_flags(worker), .mode = S_IFREG | mode, .umask = 022};
		put(body, &in, sizeof(in));
		break;
	}
	case FUSE_LINK: {
		struct fuse_link_in in = {.oldnodeid = pick_nodeid(worker)};
		put(body, &in, sizeof(in));
		break;
	}
	case FUSE_RENAME: case FUSE_RENAME2: {
		struct fuse_rename2_in in = {.newdir = pick_nodeid(worker), .flags = (uint32_t)(next(worker) % 4 ? 0 : next(worker) % 5)};
		put(body, &in, opcode == FUSE_RENAME2 ? sizeof(in) : sizeof(struct fuse_rename_in));
		put_name(worker, body);
		break;
	}
	case FUSE_LOOKUP: case FUSE_UNLINK: case FUSE_RMDIR:
		break;
	default:
		return false;
	}
	put_name(worker, body);
	return true;
}

static void put_batch(struct worker *worker, struct body *body)
{
	struct fuse_batch_forget_in batch = {.count = (uint32_t)(next(worker) % 8)};

	put(body, &batch, sizeof(batch));
	for (uint32_t i = 0; i < batch.count; i++) {
		struct fuse_forget_one one = {.nodeid = pick_nodeid(worker), .nlookup = next(worker) % 3};

		put(body, &one, sizeof(one));
	}
}

static void put_request(struct worker *worker, uint32_t opcode, uint64_t *nodeid, struct body *body)
{
	static const char *const xattrs[] = {"user.some", "security.capability", "system.posix_acl_access",
					     "user.overlay.opaque", "trusted.overlay.origin", "security.selinux", "none", ""};
	struct fuse_read_in read = {.offset = next(worker) % 70, .size = (uint32_t)(next(worker) % 9000)};
	struct fuse_getxattr_in xattr = {.size = (uint32_t)(next(worker) % 3 * (next(worker) % 300))};
	const char *name = xattrs[next(worker) % (sizeof(xattrs) / sizeof(xattrs[0]))];
	struct fuse_open_in open = {.flags = pick_open_flags(worker), .open_flags = (uint32_t)(next(worker) % 2)};
	struct fuse_forget_in forget = {.nlookup = next(worker) % 3};

	if (put_file_request(worker, opcode, nodeid, body) || put_name_request(worker, opcode, body))
		return;
	switch (opcode) {
	case FUSE_SETATTR:
		put_setattr(worker, nodeid, body);
		break;
	case FUSE_OPEN:
		put(body, &open, sizeof(open));
		break;
	case FUSE_READDIR: case FUSE_READDIRPLUS:
		put(body, &read, sizeof(read));
		break;
	case FUSE_GETXATTR:
		put(body, &xattr, sizeof(xattr));
		put(body, name, strlen(name) + 1);
		break;
	case FUSE_LISTXATTR:
		put(body, &xattr, sizeof(xattr));
		break;
	case FUSE_FORGET:
		put(body, &forget, sizeof(forget));
		break;
	case FUSE_BATCH_FORGET:
		put_batch(worker, body);
		break;
	default:
		body->size = next(worker) % 48;
	}
}

static const uint32_t opcodes[] = {
	FUSE_LOOKUP, FUSE_LOOKUP, FUSE_LOOKUP, FUSE_LOOKUP, FUSE_GETATTR, FUSE_READLINK, FUSE_READDIR, FUSE_READDIRPLUS,
	FUSE_FORGET, FUSE_BATCH_FORGET, FUSE_OPENDIR, FUSE_RELEASEDIR, FUSE_FSYNCDIR, FUSE_ACCESS, FUSE_FLUSH, FUSE_STATFS,
	FUSE_OPEN, FUSE_OPEN, FUSE_OPEN, FUSE_CREATE, FUSE_CREATE, FUSE_READ, FUSE_READ, FUSE_WRITE, FUSE_WRITE, FUSE_RELEASE,
	FUSE_RELEASE, FUSE_FSYNC, FUSE_FALLOCATE, FUSE_LSEEK, FUSE_COPY_FILE_RANGE, OP_COPY_FILE_RANGE_64, FUSE_SETATTR,
	FUSE_SETATTR, FUSE_MKDIR, FUSE_SYMLINK, FUSE_LINK, FUSE_UNLINK, FUSE_UNLINK, FUSE_RMDIR, FUSE_RENAME, FUSE_RENAME2,
	FUSE_RENAME2, FUSE_GETXATTR, FUSE_LISTXATTR, FUSE_SETXATTR, FUSE_REMOVEXATTR, FUSE_MKNOD, OP_TMPFILE, FUSE_IOCTL, OP_STATX, 63, 64, 4096,
};

static void ask(struct worker *worker)
{
	struct fuse_in_header header = {.unique = 2, .uid = pick_owner(worker), .gid = pick_owner(worker)};
	unsigned char message[sizeof(header) + BODY_MAX];
	struct body body = {0};
	size_t size;

	header.opcode = opcodes[next(worker) % (sizeof(opcodes) / sizeof(opcodes[0]))];
	header.nodeid = pick_nodeid(worker);
	put_request(worker, header.opcode, &header.nodeid, &body);
	size = sizeof(header) + body.size;
	header.len = (uint32_t)size;
	memcpy(message, &header, sizeof(header));
	memcpy(message + sizeof(header), body.bytes, body.size);
	if (next(worker) % 4 == 0 && (worker->alone || header.opcode != FUSE_RELEASE)) {
		if (next(worker) % 2)
			size = sizeof(header) + next(worker) % (size - sizeof(header) + 1);
		else if (size > sizeof(header))
			message[sizeof(header) + next(worker) % (size - sizeof(header))] ^= (unsigned char)(1u << next(worker) % 8);
	}
	send_message(worker, message, size);
}

static void let_go(struct worker *worker)
{
	while (worker->handle_count > 0)
		ovl_lane_file_release(&worker->place->fs, worker->handles[--worker->handle_count].fh);
}

static void *work(void *arg)
{
	struct worker *worker = arg;

	for (uint64_t i = 0; i < worker->steps; i++)
		ask(worker);
	let_go(worker);
	return NULL;
}

int main(int argc, char **argv)
{
	static pthread_mutex_t python = PTHREAD_MUTEX_INITIALIZER;
	static struct worker workers[8];
	struct ovl_place place;
	pthread_t threads[8];
	size_t count = argc == 4 ? strtoul(argv[3], NULL, 10) : 0, answered = 0, passed_on = 0, failed = 0;
	uint64_t seed;

	if (count < 1 || count > 8)
		return 2;
	seed = strtoull(argv[1], NULL, 10);
	ovl_place_confine();
	ovl_place_open(&place, seed % 4 != 3, seed % 2, false);
	for (size_t i = 0; i < count; i++) {
		workers[i] = (struct worker){.place = &place, .python = &python, .random = seed * 977 + i + 1, .alone = count == 1};
		workers[i].steps = strtoull(argv[2], NULL, 10) / count;
		ovl_require(pthread_create(&threads[i], NULL, work, &workers[i]) == 0, "no thread");
	}
	for (size_t i = 0; i < count; i++) {
		pthread_join(threads[i], NULL);
		answered += workers[i].answered;
		passed_on += workers[i].passed_on;
		failed += workers[i].failed;
	}
	printf("%zu answered, %zu of them with an error, %zu passed on, %zu inodes at the end\n", answered, failed, passed_on,
	       ovl_tree_count(place.tree));
	ovl_place_close(&place);
	ovl_place_leave();
	return 0;
}

#endif
