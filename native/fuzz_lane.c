/*
 * fuzz_lane.c - the native answers of the lane, fed with FUSE messages that are right, wrong, cut short or lying
 *
 * Two programs in one:
 *   - with OVL_LIBFUZZER, the libFuzzer entry point LLVMFuzzerTestOneInput: a situation, then messages of any bytes;
 *   - else `main SEED STEPS THREADS`: messages of a generator that knows the protocol, half of them damaged afterwards;
 *     with several threads all on one tree, one of which changes it as Python would (for the thread sanitizer).
 *
 * The tree lies over one tar layer, made here.  Checked after each message: the reply fits its room, has no body beside
 * an error, and every directory entry in it is whole; what is passed on has not become longer.  At the end: the
 * invariants of tree.h.  Each message is a block of its own, so that the sanitizer sees every step beyond its end.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <linux/fuse.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "lane_tree.h"
#include "tarscan.h"

#define BODY_MAX 512u
#define ROOM 4096u
#define NAMES 60u
#define BLOCK 512u
#define INO_BASE (1ull << 40)

static void require(bool ok, const char *what)
{
	if (!ok) {
		fprintf(stderr, "fuzz_lane: %s\n", what);
		abort();
	}
}

/* ---- a tree ------------------------------------------------------------------------------------------- */

struct fixture {
	struct ovl_tree *tree;
	struct ovl_index index;
	uint8_t *image;
};

static void feed(struct ovl_tarscan *scan, const char *name, char type, const char *target)
{
	unsigned char block[BLOCK] = {0};
	unsigned sum = 0;

	if (name) {
		snprintf((char *)block, 100, "%s", name);
		snprintf((char *)block + 100, 8, "%07o", 0644u);
		snprintf((char *)block + 108, 8, "%07o", 0u);
		snprintf((char *)block + 116, 8, "%07o", 0u);
		snprintf((char *)block + 124, 12, "%011o", 0u);
		snprintf((char *)block + 136, 12, "%011o", 0u);
		memset(block + 148, ' ', 8);
		block[156] = (unsigned char)type;
		snprintf((char *)block + 157, 100, "%s", target);
		memcpy(block + 257, "ustar\00000", 8);
		for (size_t i = 0; i < BLOCK; i++)
			sum += block[i];
		snprintf((char *)block + 148, 8, "%06o", sum & 0777777u);
	}
	require(ovl_tarscan_feed(scan, block, BLOCK) == 0, "the tar is refused");
}

static void open_fixture(struct fixture *fixture)
{
	struct ovl_found root = {.ino = INO_BASE, .lower_count = 1, .one = {.layer = 1}};
	struct ovl_stack stack = {.count = 2};
	struct ovl_tarscan *scan;
	size_t len;
	char name[64];

	require(ovl_tarscan_new(true, NULL, &scan) == 0, "no scanner");
	for (unsigned i = 0; i < NAMES; i++) {
		char type = i % 5 == 0 ? '5' : i % 5 == 1 ? '2' : '0';

		snprintf(name, sizeof(name), "%sn%u", i > 20 ? "n5/" : "", i);
		feed(scan, name, type, type == '2' ? "n5/target" : "");
	}
	feed(scan, NULL, 0, NULL);
	feed(scan, NULL, 0, NULL);
	require(ovl_tarscan_finish(scan, &fixture->image, &len) == 0, "no index");
	ovl_tarscan_free(scan);
	require(ovl_index_open(&fixture->index, fixture->image, len, true, NULL) == 0, "the index does not open");
	stack.layers = calloc(stack.count, sizeof(*stack.layers));
	require(stack.layers != NULL, "no memory");
	stack.layers[0].kind = OVL_LAYER_NONE;
	stack.layers[1].kind = OVL_LAYER_TAR;
	stack.layers[1].ino_base = INO_BASE;
	stack.layers[1].index = &fixture->index;
	root.attr.mode = S_IFDIR | 0755;
	root.attr.nlink = 1;
	root.lower = &root.one;
	require(ovl_tree_new(&stack, &root, &fixture->tree) == 0, "no tree");
}

static void close_fixture(struct fixture *fixture)
{
	const char *what = NULL;

	require(ovl_tree_check(fixture->tree, &what) == 0, what);
	ovl_tree_free(fixture->tree);
	free(fixture->image);
}

/* ---- one message -------------------------------------------------------------------------------------- */

static void check_listing(const unsigned char *body, size_t size, bool plus)
{
	const size_t before = plus ? FUSE_NAME_OFFSET_DIRENTPLUS : FUSE_NAME_OFFSET;

	while (size > 0) {
		struct fuse_dirent dirent;
		size_t whole;

		require(size >= before, "a directory entry is cut");
		memcpy(&dirent, body + before - sizeof(dirent), sizeof(dirent));
		whole = FUSE_REC_ALIGN(before + dirent.namelen);
		require(dirent.namelen > 0 && dirent.namelen <= OVL_NAME_MAX && whole <= size, "a name is cut");
		require(!memchr(body + before, '/', dirent.namelen), "a name with a slash");
		body += whole;
		size -= whole;
	}
}

static void send_message(struct ovl_tree *tree, unsigned situation, const unsigned char *bytes, size_t size)
{
	struct ovl_lane_answer answer = {.room = ROOM};
	struct fuse_in_header header;
	unsigned char *message;
	enum ovl_lane_verdict verdict;
	size_t now = size;

	if (size < sizeof(header))
		return; /* the lane drops it */
	message = malloc(size);
	answer.body = malloc(ROOM);
	require(message && answer.body, "no memory");
	memcpy(message, bytes, size);
	memcpy(&header, message, sizeof(header));
	verdict = ovl_lane_tree_answer(tree, situation, message, &now, &answer);
	require(now <= size && now >= sizeof(header), "a message has grown");
	if (verdict == OVL_LANE_ANSWERED) {
		require(answer.size <= ROOM && answer.error >= 0 && answer.error < 512, "the reply does not fit");
		require(answer.error == 0 || answer.size == 0, "a body beside an error");
		if (header.opcode == FUSE_READDIR || header.opcode == FUSE_READDIRPLUS)
			check_listing(answer.body, answer.size, header.opcode == FUSE_READDIRPLUS);
		ovl_lane_tree_patch(tree, header.opcode, answer.body, answer.size);
	}
	free(message);
	free(answer.body);
}

#ifdef OVL_LIBFUZZER

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* One byte situation, then messages: two bytes of length and as many bytes. */
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct fixture fixture;

	if (size < 1)
		return 0;
	open_fixture(&fixture);
	for (size_t at = 1; size - at >= 2;) {
		size_t len = (size_t)data[at] | (size_t)data[at + 1] << 8;

		at += 2;
		if (len > size - at)
			len = size - at;
		send_message(fixture.tree, data[0], data + at, len);
		at += len;
	}
	close_fixture(&fixture);
	return 0;
}

#else

/* ---- the generator ------------------------------------------------------------------------------------ */

struct worker {
	struct ovl_tree *tree;
	uint64_t random, steps;
	bool changes;
};

/* xorshift64*: every thread has its own */
static uint64_t next(struct worker *worker)
{
	worker->random ^= worker->random >> 12;
	worker->random ^= worker->random << 25;
	worker->random ^= worker->random >> 27;
	return (worker->random * 0x2545F4914F6CDD1Dull) >> 16;
}

static uint64_t pick_nodeid(struct worker *worker)
{
	switch (next(worker) % 6) {
	case 0:
		return OVL_ROOT_NODEID;
	case 1:
		return next(worker) % 3 * OVL_FRESH_NODEID + next(worker) % 4;
	default:
		return INO_BASE + next(worker) % (NAMES + 2);
	}
}

static size_t pick_name(struct worker *worker, char *name, size_t size)
{
	if (next(worker) % 16 == 0) {
		size_t len = next(worker) % (size - 1);

		memset(name, 'x', len);
		name[len] = 0;
		return len;
	}
	return (size_t)snprintf(name, size, "n%u", (unsigned)(next(worker) % (NAMES + 4)));
}

static size_t make_body(struct worker *worker, uint32_t opcode, unsigned char *body)
{
	struct fuse_read_in read = {.offset = next(worker) % 70, .size = (uint32_t)(next(worker) % 6000)};
	struct fuse_batch_forget_in batch = {.count = (uint32_t)(next(worker) % 8)};
	struct fuse_forget_in forget = {.nlookup = next(worker) % 3};
	char name[BODY_MAX];
	size_t len;

	memset(body, 0, BODY_MAX);
	switch (opcode) {
	case FUSE_LOOKUP:
		len = pick_name(worker, name, sizeof(name));
		memcpy(body, name, len + 1);
		return len + 1;
	case FUSE_READDIR:
	case FUSE_READDIRPLUS:
		memcpy(body, &read, sizeof(read));
		return sizeof(read);
	case FUSE_FORGET:
		memcpy(body, &forget, sizeof(forget));
		return sizeof(forget);
	case FUSE_BATCH_FORGET:
		memcpy(body, &batch, sizeof(batch));
		for (uint32_t i = 0; i < batch.count; i++) {
			struct fuse_forget_one one = {.nodeid = pick_nodeid(worker), .nlookup = next(worker) % 3};

			memcpy(body + sizeof(batch) + i * sizeof(one), &one, sizeof(one));
		}
		return sizeof(batch) + batch.count * sizeof(struct fuse_forget_one);
	default:
		return next(worker) % 48;
	}
}

static void ask(struct worker *worker)
{
	static const uint32_t opcodes[] = {FUSE_LOOKUP, FUSE_LOOKUP, FUSE_LOOKUP, FUSE_GETATTR, FUSE_READLINK,
					   FUSE_READDIR, FUSE_READDIRPLUS, FUSE_FORGET, FUSE_BATCH_FORGET, FUSE_OPENDIR,
					   FUSE_RELEASEDIR, FUSE_FSYNCDIR, FUSE_ACCESS, FUSE_FLUSH, FUSE_STATFS, 63, 64, 4096};
	uint32_t opcode = opcodes[next(worker) % (sizeof(opcodes) / sizeof(opcodes[0]))];
	struct fuse_in_header header = {.opcode = opcode, .unique = 2, .nodeid = pick_nodeid(worker)};
	unsigned char message[sizeof(header) + BODY_MAX];
	size_t size = sizeof(header) + make_body(worker, opcode, message + sizeof(header));

	header.len = (uint32_t)size;
	memcpy(message, &header, sizeof(header));
	if (next(worker) % 2) {
		if (next(worker) % 2)
			size = sizeof(header) + next(worker) % (size - sizeof(header) + 1);
		else if (size > sizeof(header))
			message[sizeof(header) + next(worker) % (size - sizeof(header))] ^= (unsigned char)(1u << next(worker) % 8);
	}
	send_message(worker->tree, (unsigned)(next(worker) % 8), message, size);
}

/* What Python does to the tree. */
static void change(struct worker *worker)
{
	struct ovl_attr attr = {.mode = S_IFREG | 0644, .nlink = 1, .mtime_ns = (int64_t)next(worker) - (1ll << 40)};
	uint64_t parent = next(worker) % 2 ? OVL_ROOT_NODEID : pick_nodeid(worker);
	char name[BODY_MAX], other[BODY_MAX];
	size_t len = pick_name(worker, name, OVL_NAME_MAX), other_len = pick_name(worker, other, OVL_NAME_MAX);
	const uint8_t *bytes = (const uint8_t *)name, *other_bytes = (const uint8_t *)other;
	struct ovl_ask asked;
	uint64_t nodeid;

	switch (next(worker) % 6) {
	case 0:
		nodeid = 1 + next(worker) % 1000;
		(void)ovl_tree_add(worker->tree, parent, bytes, len, &attr, nodeid, nodeid, &nodeid, &asked);
		break;
	case 1:
		(void)ovl_tree_remove(worker->tree, parent, bytes, len, &asked);
		break;
	case 2:
		(void)ovl_tree_move(worker->tree, parent, bytes, len, pick_nodeid(worker), other_bytes, other_len, &asked);
		break;
	case 3:
		(void)ovl_tree_link(worker->tree, pick_nodeid(worker), parent, bytes, len, &asked);
		break;
	case 4:
		(void)ovl_tree_exchange(worker->tree, parent, bytes, len, pick_nodeid(worker), other_bytes, other_len,
					&asked);
		break;
	default:
		(void)ovl_tree_set_attr(worker->tree, pick_nodeid(worker), &attr);
	}
}

static void *work(void *arg)
{
	struct worker *worker = arg;

	for (uint64_t i = 0; i < worker->steps; i++) {
		if (worker->changes && i % 2)
			change(worker);
		else
			ask(worker);
	}
	return NULL;
}

int main(int argc, char **argv)
{
	struct worker workers[8];
	pthread_t threads[8];
	struct fixture fixture;
	size_t count = argc == 4 ? strtoul(argv[3], NULL, 10) : 0;

	if (count < 1 || count > 8)
		return 2;
	open_fixture(&fixture);
	for (size_t i = 0; i < count; i++) {
		workers[i] = (struct worker){.tree = fixture.tree, .random = strtoull(argv[1], NULL, 10) * 977 + i + 1};
		workers[i].steps = strtoull(argv[2], NULL, 10) / count;
		workers[i].changes = i == 0;
		require(pthread_create(&threads[i], NULL, work, &workers[i]) == 0, "no thread");
	}
	for (size_t i = 0; i < count; i++)
		pthread_join(threads[i], NULL);
	printf("%zu inodes at the end\n", ovl_tree_count(fixture.tree));
	close_fixture(&fixture);
	return 0;
}

#endif
