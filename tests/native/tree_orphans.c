/*
 * tree_orphans.c - who closes what leads to a removed file?  Whoever dropped its inode, after the lock was given back
 *
 * Usage: tree_orphans UPPER, an empty directory.  To close the last descriptor of a removed file frees its data, which can
 * take seconds; close() below stands in the place of the C library's, and looks whether the tree's lock is free.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "tree_impl.h"

static struct ovl_tree *tree;
static int orphans[8];
static size_t count;

static void require(bool ok, const char *what)
{
	if (!ok) {
		fprintf(stderr, "tree_orphans: %s\n", what);
		exit(1);
	}
}

int close(int fd)
{
	for (size_t i = 0; i < count; i++)
		if (orphans[i] == fd) {
			require(pthread_rwlock_trywrlock(&tree->lock) == 0, "closed with the lock held");
			pthread_rwlock_unlock(&tree->lock);
			orphans[i] = orphans[--count];
			break;
		}
	return (int)syscall(SYS_close, fd);
}

/* A new object with an orphan, which the kernel holds. */
static uint64_t add(uint64_t parent, const char *name, uint32_t mode, uint64_t ino)
{
	const struct ovl_attr attr = {.mode = mode, .nlink = 1};
	struct ovl_ask ask;
	uint64_t nodeid;

	require(ovl_tree_add(tree, parent, (const uint8_t *)name, strlen(name), &attr, ino, ino, &nodeid, &ask) == 0, name);
	orphans[count] = open("/dev/null", O_PATH | O_CLOEXEC);
	require(ovl_tree_ref(tree, nodeid) == 0 && ovl_tree_set_orphan(tree, nodeid, orphans[count++]) == 0, name);
	return nodeid;
}

static void forget(uint64_t nodeid, bool expected)
{
	bool gone;

	ovl_tree_forget(tree, nodeid, 1, &gone);
	require(gone == expected, "forgotten, or not");
}

static void remove_name(uint64_t parent, const char *name)
{
	struct ovl_ask ask;

	require(ovl_tree_remove(tree, parent, (const uint8_t *)name, strlen(name), &ask) == 0, name);
}

/* The kernel holds it no longer, but it is not dropped: one of the names in it still lives. */
static void forgets_a_directory_with_its_last_child(void)
{
	uint64_t directory = add(OVL_ROOT_NODEID, "d", S_IFDIR | 0755, 100);
	uint64_t child = add(directory, "f", S_IFREG | 0644, 101);

	forget(directory, false);
	forget(child, true);
	require(count == 0, "both are closed");
	remove_name(OVL_ROOT_NODEID, "d");
}

/* Whoever forgets holds another lock, and closes when that is given back, too. */
static void forgets_now_and_closes_later(void)
{
	uint64_t one = add(OVL_ROOT_NODEID, "f", S_IFREG | 0644, 106), two = add(OVL_ROOT_NODEID, "g", S_IFREG | 0644, 107);
	struct kept *later = NULL;

	remove_name(OVL_ROOT_NODEID, "f");
	remove_name(OVL_ROOT_NODEID, "g");
	ovl_tree_forget_later(tree, one, 1, &later);
	ovl_tree_forget_later(tree, two, 1, &later);
	ovl_tree_forget_later(tree, two, 1, &later); /* it is not known any more */
	require(count == 2 && ovl_tree_count(tree) == 1, "both are dropped, and open");
	ovl_tree_close(later);
	require(count == 0, "both are closed");
}

static void forgets_what_was_removed(void)
{
	uint64_t file = add(OVL_ROOT_NODEID, "f", S_IFREG | 0644, 102);

	remove_name(OVL_ROOT_NODEID, "f");
	require(count == 1, "it is held");
	forget(file, true);
	require(count == 0, "it is closed");
}

/* What the kernel does not hold goes with its name: that is removed, or another name takes its place. */
static void drops_what_nobody_holds(bool move)
{
	uint64_t directory = add(OVL_ROOT_NODEID, "d", S_IFDIR | 0755, 103);
	uint64_t file = add(directory, "f", S_IFREG | 0644, 104), other = add(directory, "g", S_IFREG | 0644, 105);
	struct ovl_ask ask;
	struct node *node;

	require(ovl_tree_find(tree, file, &node) == 0, "f");
	node->nlookup = 0; /* ovl_tree_forget would drop it at once */
	if (move)
		require(ovl_tree_move(tree, directory, (const uint8_t *)"g", 1, directory, (const uint8_t *)"f", 1, &ask) == 0, "g");
	else
		remove_name(directory, "f");
	require(count == 2, "what nobody holds is closed");
	forget(other, true);
	forget(directory, true);
	require(count == 0, "all are closed");
	remove_name(OVL_ROOT_NODEID, "d");
}

int main(int argc, char **argv)
{
	struct ovl_stack stack = {.count = 1, .device_count = 1};
	struct ovl_found root = {.upper = true, .ino = 1, .attr = {.mode = S_IFDIR | 0755}};
	const char *what;
	int fd;

	require(argc == 2, "usage: tree_orphans UPPER");
	fd = open(argv[1], O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	stack.layers = calloc(1, sizeof(*stack.layers));
	require(fd >= 0 && stack.layers, argv[1]);
	stack.layers[0] = (struct ovl_layer){.kind = OVL_LAYER_DIR, .dir = {.root = fd}};
	require(ovl_tree_new(&stack, &root, &tree) == 0, "no tree");
	forgets_a_directory_with_its_last_child();
	forgets_what_was_removed();
	forgets_now_and_closes_later();
	drops_what_nobody_holds(false);
	drops_what_nobody_holds(true);
	require(ovl_tree_check(tree, &what) == 0 && ovl_tree_count(tree) == 1, "the root is left");
	ovl_tree_free(tree);
	close(fd);
	puts("all closed");
	return 0;
}
