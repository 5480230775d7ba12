/*
 * tree_stress.c - the live tree under a sanitizer: random operations of one thread, then of several
 *
 * Usage: tree_stress SEED STEPS THREADS LAYER...   LAYER: upper:DIR (first), dir:DIR, oci:DIR, tar:INDEX-IMAGE
 *
 * The reference is not here to be asked, so a name that the core does not decide is answered at random: absent, or a
 * file of some number (which makes hard links and collisions).  Nothing is expected of the results but that the
 * invariants of tree.h hold, and that the sanitizer has nothing to say.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "tree.h"

#define LAYERS_MAX 16
#define KNOWN_MAX 512

static struct ovl_index indexes[LAYERS_MAX];
static struct ovl_layer layers[LAYERS_MAX];

static void die(const char *what)
{
	perror(what);
	exit(2);
}

/* xorshift64*: every thread has its own */
static uint64_t next(uint64_t *state)
{
	*state ^= *state >> 12;
	*state ^= *state << 25;
	*state ^= *state >> 27;
	return *state * 0x2545F4914F6CDD1Dull;
}

/* Nodeids that somebody was told of; each thread has its own. */
struct worker {
	struct ovl_tree *tree;
	uint64_t random;
	uint64_t steps;
	uint64_t known[KNOWN_MAX];
	size_t count;
	uint64_t answered;
};

static void learn(struct worker *worker, uint64_t nodeid)
{
	if (nodeid == 0)
		return;
	if (worker->count < KNOWN_MAX)
		worker->known[worker->count++] = nodeid;
	else
		worker->known[next(&worker->random) % KNOWN_MAX] = nodeid;
}

static uint64_t pick(struct worker *worker)
{
	return worker->count && next(&worker->random) % 8 ? worker->known[next(&worker->random) % worker->count] : 1;
}

static size_t pick_name(struct worker *worker, uint8_t *name)
{
	static const char *const names[] = {"a", "b", "c", "dd", "etc", "x1", "long-name-of-a-file.so.6"};
	uint64_t number = next(&worker->random);

	if (number % 3 == 0)
		return (size_t)snprintf((char *)name, OVL_NAME_MAX, "n%d", (int)(number / 3 % 300));
	return (size_t)snprintf((char *)name, OVL_NAME_MAX, "%s", names[number / 3 % 7]);
}

static struct ovl_attr attr_of(uint32_t mode)
{
	return (struct ovl_attr){.mode = mode, .nlink = 1, .size = 7};
}

static void answer(struct worker *worker, const struct ovl_ask *ask, ovl_err_t asked)
{
	struct ovl_found found = {.ino = 2 + next(&worker->random) % 50, .attr = attr_of(S_IFREG | 0644)};

	worker->answered++;
	if (asked == OVL_ASK_NAMES) {
		struct ovl_tree_names_in *in;

		if (ovl_tree_adopt_begin(&in) == 0) {
			(void)ovl_tree_adopt_name(in, (const uint8_t *)"asked", 5);
			(void)ovl_tree_adopt_end(worker->tree, ask->nodeid, in, next(&worker->random) % 4 != 0);
		}
		return;
	}
	found.upper = true;
	found.upper_ino = found.ino;
	(void)ovl_tree_adopt(worker->tree, ask->nodeid, ask->name, ask->name_len,
			     next(&worker->random) % 3 ? &found : NULL);
}

static bool emit(void *arg, uint64_t cookie, const uint8_t *name, size_t len, const struct ovl_entry *entry)
{
	struct worker *worker = arg;

	if (cookie == 0 || len == 0 || name[0] == 0 || entry->nodeid == 0)
		abort();
	learn(worker, entry->nodeid);
	return next(&worker->random) % 64 != 0;
}

static void look(struct worker *worker, uint64_t nodeid)
{
	struct ovl_description description;
	struct ovl_tree_name *names;
	struct ovl_entry entry;
	uint8_t *path;
	size_t count;

	(void)ovl_tree_get(worker->tree, nodeid, &entry);
	if (ovl_tree_path(worker->tree, nodeid, &path, &count) == 0) {
		if (strlen((char *)path) != count)
			abort();
		free(path);
	}
	if (ovl_tree_names(worker->tree, nodeid, &names, &count) == 0)
		free(names);
	if (ovl_tree_describe(worker->tree, nodeid, true, &description) == 0)
		ovl_description_clear(&description);
}

static void step(struct worker *worker)
{
	struct ovl_tree *tree = worker->tree;
	uint64_t nodeid = pick(worker), other = pick(worker), added = 0;
	uint8_t name[OVL_NAME_MAX + 1], new_name[OVL_NAME_MAX + 1];
	size_t len = pick_name(worker, name), new_len = pick_name(worker, new_name);
	bool is_dir = next(&worker->random) % 3 == 0;
	struct ovl_attr attr = attr_of(is_dir ? S_IFDIR | 0755 : S_IFREG | 0644);
	uint64_t ino = 2 + next(&worker->random) % 400;
	struct ovl_entry entry = {0};
	struct ovl_ask ask;
	ovl_err_t err = 0;
	bool gone;

	switch (next(&worker->random) % 16) {
	case 0: case 1: case 2: case 3:
		err = ovl_tree_lookup(tree, nodeid, name, len, next(&worker->random) % 2, &entry, &ask);
		if (!err)
			learn(worker, entry.nodeid);
		break;
	case 4: case 5:
		err = ovl_tree_list(tree, nodeid, next(&worker->random) % 9, 1 + next(&worker->random) % 99, emit,
				    worker, &ask);
		break;
	case 6: case 7:
		ovl_tree_forget(tree, nodeid, next(&worker->random) % 3, &gone);
		break;
	case 8: case 9:
		err = ovl_tree_add(tree, nodeid, name, len, &attr, ino, ino, &added, &ask);
		if (!err)
			learn(worker, added);
		break;
	case 10:
		err = ovl_tree_link(tree, nodeid, other, name, len, &ask);
		break;
	case 11:
		err = ovl_tree_remove(tree, nodeid, name, len, &ask);
		break;
	case 12:
		err = ovl_tree_move(tree, nodeid, name, len, other, new_name, new_len, &ask);
		break;
	case 13:
		err = ovl_tree_exchange(tree, nodeid, name, len, other, new_name, new_len, &ask);
		break;
	case 14:
		if (next(&worker->random) % 2)
			(void)ovl_tree_set_upper(tree, nodeid, ino, next(&worker->random) % 2);
		else
			(void)ovl_tree_set_attr(tree, nodeid, &attr);
		(void)ovl_tree_set_redirect(tree, other);
		(void)ovl_tree_ref(tree, other);
		break;
	default:
		look(worker, nodeid);
	}
	if (err == OVL_ASK || err == OVL_ASK_NAMES)
		answer(worker, &ask, err);
}

static void must_hold(struct ovl_tree *tree)
{
	const char *what;

	if (ovl_tree_check(tree, &what)) {
		fprintf(stderr, "does not hold: %s\n", what);
		exit(1);
	}
}

static void *work(void *arg)
{
	struct worker *worker = arg;

	for (uint64_t i = 0; i < worker->steps; i++)
		step(worker);
	return NULL;
}

static void open_layer(const char *text, size_t number, struct ovl_stack *stack)
{
	struct ovl_layer *layer = &layers[number];
	const char *path = strchr(text, ':') + 1;
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	struct stat st;

	if (fd < 0 || fstat(fd, &st) < 0)
		die(path);
	if (strncmp(text, "tar:", 4) == 0) {
		void *image = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
		const char *why;

		if (image == MAP_FAILED)
			die(path);
		if (ovl_index_open(&indexes[number], image, (size_t)st.st_size, true, &why)) {
			fprintf(stderr, "%s: %s\n", path, why);
			exit(2);
		}
		*layer = (struct ovl_layer){
			.kind = OVL_LAYER_TAR, .index = &indexes[number], .ino_base = (0x8000ull + number) << 40};
		return;
	}
	*layer = (struct ovl_layer){
		.kind = OVL_LAYER_DIR,
		.dir = {.root = fd, .oci = strncmp(text, "oci:", 4) == 0, .override = true, .prefix_count = 1,
			.prefix = {"user.overlay."}},
	};
	stack->devices[0] = (struct ovl_device){.device = st.st_dev};
	stack->device_count = 1;
}

static struct ovl_tree *make_tree(struct ovl_stack *stack)
{
	struct ovl_found root = {.ino = 1, .upper_ino = 1, .attr = attr_of(S_IFDIR | 0755), .upper = true};
	struct ovl_tree *tree;

	stack->layers = calloc(stack->count, sizeof(*stack->layers));
	root.lower = calloc(stack->count, sizeof(*root.lower));
	if (!stack->layers || !root.lower)
		die("calloc");
	memcpy(stack->layers, layers, stack->count * sizeof(*layers));
	for (size_t i = 1; i < stack->count; i++)
		root.lower[root.lower_count++] = (struct ovl_source){.layer = (uint32_t)i};
	if (ovl_tree_new(stack, &root, &tree)) {
		fprintf(stderr, "no tree\n");
		exit(2);
	}
	return tree;
}

int main(int argc, char **argv)
{
	static struct worker workers[8];
	pthread_t threads[8];
	struct ovl_stack stack = {0};
	size_t count;
	uint64_t seed, steps;

	if (argc < 6 || argc - 4 > LAYERS_MAX)
		return 2;
	seed = strtoull(argv[1], NULL, 10);
	steps = strtoull(argv[2], NULL, 10);
	count = strtoul(argv[3], NULL, 10);
	if (count < 1 || count > 8)
		return 2;
	stack.count = (size_t)argc - 4;
	for (size_t i = 0; i < stack.count; i++)
		open_layer(argv[4 + i], i, &stack);

	struct ovl_tree *tree = make_tree(&stack);

	for (size_t i = 0; i < count; i++)
		workers[i] = (struct worker){.tree = tree, .random = seed * 977 + i + 1, .steps = steps / count};
	if (count == 1) {
		for (uint64_t i = 0; i < steps; i++) {
			step(&workers[0]);
			if (i % 64 == 0)
				must_hold(tree);
		}
	} else {
		for (size_t i = 0; i < count; i++)
			if (pthread_create(&threads[i], NULL, work, &workers[i]))
				die("pthread_create");
		for (size_t i = 0; i < count; i++)
			pthread_join(threads[i], NULL);
	}
	must_hold(tree);
	printf("%zu inodes at the end, %llu questions\n", ovl_tree_count(tree),
	       (unsigned long long)workers[0].answered);
	ovl_tree_free(tree);
	return 0;
}
