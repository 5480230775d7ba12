/*
 * tree.c - the live tree; see tree.h for its structure, invariants and locking
 *
 * In reading order: directories (entries, hash index, cookies), nodes and their names, the two tables, how a name is
 * resolved, and then the functions of tree.h, each of which takes the lock, looks, changes, and gives it back.
 *
 * Rule of failure: whatever can fail (memory, disk, OVL_ASK) comes before the first change.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "tree_impl.h"

#include <errno.h>
#include <malloc.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

/* ---- directories -------------------------------------------------------------------------------------- */

static void name_free(struct entry *entry)
{
	if (entry->name && entry->owned)
		ovl_blob_unref((struct ovl_blob *)(void *)((uintptr_t)entry->name - offsetof(struct ovl_blob, bytes)));
	entry->name = NULL;
}

static struct ovl_blob *name_blob(const struct entry *entry)
{
	if (!entry->owned)
		return NULL;
	return (struct ovl_blob *)(void *)((uintptr_t)entry->name - offsetof(struct ovl_blob, bytes));
}

static unsigned tag_of(uint64_t hash)
{
	return (unsigned)(hash >> 53);
}

static bool has_name(const struct entry *entry, const uint8_t *name, size_t len)
{
	return entry->name && entry->len == len && memcmp(entry->name, name, len) == 0;
}

static void index_enter(struct dir *dir, uint64_t hash, uint32_t number)
{
	uint32_t at = (uint32_t)hash & dir->index_mask;

	while (dir->index[at])
		at = (at + 1) & dir->index_mask;
	dir->index[at] = number + 1;
}

/* The index for at least `room` entries, made anew from the entries. */
static ovl_err_t index_build(struct dir *dir, size_t room)
{
	size_t slots = 16;
	uint32_t *index;

	while (slots / 3 * 2 < room) /* at most two thirds are taken */
		slots *= 2;
	if (slots > UINT32_MAX)
		return -EOVERFLOW;
	index = calloc(slots, sizeof(*index));
	if (!index)
		return -ENOMEM;
	free(dir->index);
	dir->index = index;
	dir->index_mask = (uint32_t)(slots - 1);
	for (uint32_t i = 0; i < dir->used; i++)
		if (dir->entries[i].name)
			index_enter(dir, ovl_hash(dir->entries[i].name, dir->entries[i].len), i);
	return 0;
}

/* The slot of the index that leads to entry `number`. */
static uint32_t index_slot(const struct dir *dir, uint32_t number)
{
	const struct entry *entry = &dir->entries[number];
	uint32_t at = (uint32_t)ovl_hash(entry->name, entry->len) & dir->index_mask;

	while (dir->index[at] != number + 1)
		at = (at + 1) & dir->index_mask;
	return at;
}

/* Takes a slot out and moves what follows up, so that no search ends too early. */
static void index_remove(struct dir *dir, uint32_t hole)
{
	uint32_t mask = dir->index_mask;

	for (uint32_t at = (hole + 1) & mask; dir->index[at]; at = (at + 1) & mask) {
		const struct entry *entry = &dir->entries[dir->index[at] - 1];
		uint32_t home = (uint32_t)ovl_hash(entry->name, entry->len) & mask;

		if (((at - home) & mask) >= ((at - hole) & mask)) {
			dir->index[hole] = dir->index[at];
			hole = at;
		}
	}
	dir->index[hole] = 0;
}

static struct entry *dir_find(const struct dir *dir, const uint8_t *name, size_t len)
{
	uint64_t hash;

	if (!dir->index) {
		for (uint32_t i = 0; i < dir->used; i++)
			if (has_name(&dir->entries[i], name, len))
				return &dir->entries[i];
		return NULL;
	}
	hash = ovl_hash(name, len);
	for (uint32_t at = (uint32_t)hash & dir->index_mask; dir->index[at]; at = (at + 1) & dir->index_mask) {
		struct entry *entry = &dir->entries[dir->index[at] - 1];

		if (entry->tag == tag_of(hash) && has_name(entry, name, len))
			return entry;
	}
	return NULL;
}

/* The first entry whose cookie is at least `cookie`: its number, or dir->used.  Without removed names that is a matter
 * of subtraction; with some, entries have moved towards the front. */
static uint32_t dir_seek(const struct dir *dir, uint64_t cookie)
{
	uint32_t low = 0, high = dir->used;

	if (cookie == 0)
		return 0;
	if (cookie - 1 < dir->used && dir->entries[cookie - 1].cookie == cookie)
		return (uint32_t)(cookie - 1);
	while (low < high) {
		uint32_t middle = low + (high - low) / 2;

		if (dir->entries[middle].cookie < cookie)
			low = middle + 1;
		else
			high = middle;
	}
	return low;
}

static struct entry *entry_of(const struct node *parent, uint64_t cookie)
{
	return &parent->u.dir->entries[dir_seek(parent->u.dir, cookie)];
}

/* Makes room for one more entry. */
static ovl_err_t dir_reserve(struct dir *dir)
{
	uint32_t room = dir->room ? dir->room + dir->room / 2 + 4 : 4;
	struct entry *entries;

	if (dir->next_cookie >= COOKIE_MAX)
		return -EOVERFLOW;
	if (dir->used == dir->room) {
		if (dir->room > UINT32_MAX / 2)
			return -EOVERFLOW;
		entries = reallocarray(dir->entries, room, sizeof(*entries));
		if (!entries)
			return -ENOMEM;
		dir->entries = entries;
		dir->room = room;
	}
	if (dir->index ? dir->named >= dir->index_mask / 3 * 2 : dir->used + 1 >= INDEX_FROM)
		return index_build(dir, (size_t)dir->named + dir->named / 2 + 1);
	return 0;
}

/* A new name, after dir_reserve; it must not be there.  Takes over the caller's reference of `blob`; without one
 * `name` is borrowed. */
static struct entry *dir_put(struct dir *dir, const uint8_t *name, size_t len, struct ovl_blob *blob)
{
	struct entry *entry = &dir->entries[dir->used];
	uint64_t hash = ovl_hash(name, len);

	*entry = (struct entry){
		.name = blob ? blob->bytes : name,
		.cookie = ++dir->next_cookie & COOKIE_MAX,
		.len = len & 0xff,
		.owned = blob != NULL,
		.tag = tag_of(hash) & 0x7ff,
	};
	if (dir->index)
		index_enter(dir, hash, dir->used);
	dir->used++;
	dir->named++;
	return entry;
}

/* Takes removed entries out of the array when they are most of it.  Cookies stay. */
static void dir_compact(struct dir *dir)
{
	uint32_t used = 0;

	while (dir->used > 0 && !dir->entries[dir->used - 1].name)
		dir->used--;
	if (dir->used < 32 || dir->named > dir->used / 2)
		return;
	for (uint32_t i = 0; i < dir->used; i++) {
		if (!dir->entries[i].name)
			continue;
		if (dir->index)
			dir->index[index_slot(dir, i)] = used + 1;
		dir->entries[used++] = dir->entries[i];
	}
	dir->used = used;
}

static void dir_remove(struct dir *dir, struct entry *entry)
{
	if (dir->index)
		index_remove(dir, index_slot(dir, (uint32_t)(entry - dir->entries)));
	if (entry->node)
		dir->live--;
	name_free(entry);
	entry->node = NULL;
	dir->named--;
	dir_compact(dir);
}

static void dir_clear(struct dir *dir)
{
	for (uint32_t i = 0; i < dir->used; i++)
		name_free(&dir->entries[i]);
	free(dir->entries);
	free(dir->index);
	dir->entries = NULL;
	dir->index = NULL;
	dir->used = dir->room = dir->named = dir->live = 0;
}

/* ---- nodes and their names ---------------------------------------------------------------------------- */

static bool is_dir(const struct node *node)
{
	return node->flags & NODE_DIR;
}

static bool is_linked(const struct node *node)
{
	return node->parent || node->nodeid == OVL_ROOT_NODEID;
}

static void set_flag(struct node *node, unsigned flag, bool on)
{
	node->flags = (on ? node->flags | flag : node->flags & ~flag) & NODE_FLAGS;
}

/* The source that a node, no directory, keeps in its fields. */
struct ovl_source ovl_node_source(const struct node *node)
{
	struct ovl_source source = {.layer = node->layer, .name = node->name};

	source.ref.number = node->ref.number;
	return source;
}

static void node_clear_lower(const struct ovl_tree *tree, struct node *node)
{
	if (node->flags & NODE_LOWER) {
		struct ovl_source source = ovl_node_source(node);

		ovl_source_clear(&tree->stack, &source);
		set_flag(node, NODE_LOWER, false);
		node->name = NULL;
		node->ref.number = 0;
	}
	if (node->u.extra && node->u.extra->has_data) {
		ovl_source_clear(&tree->stack, &node->u.extra->data);
		node->u.extra->has_data = false;
	}
}

static void node_free(const struct ovl_tree *tree, struct node *node)
{
	if (!node)
		return;
	ovl_node_drop_kept(node);
	if (is_dir(node)) {
		struct dir *dir = node->u.dir;

		for (uint32_t i = 0; i < dir->lower_count; i++)
			ovl_source_clear(&tree->stack, &dir->lower[i]);
		free(dir->lower);
		dir_clear(dir);
		free(dir);
	} else {
		node_clear_lower(tree, node);
		free(node->u.extra);
	}
	free(node);
}

/* Makes sure of `extra`, with room for one more name. */
ovl_err_t ovl_node_reserve_extra(struct node *node)
{
	struct extra *extra = node->u.extra;
	uint32_t room = extra ? extra->room : 0;

	if (extra && extra->used < room)
		return 0;
	if (room > UINT32_MAX / 2 - 1)
		return -EMLINK;
	room = room ? room * 2 : 1;
	extra = realloc(extra, sizeof(*extra) + room * sizeof(extra->more[0]));
	if (!extra)
		return -ENOMEM;
	if (!node->u.extra)
		*extra = (struct extra){0};
	extra->room = room;
	node->u.extra = extra;
	return 0;
}

/* Makes room for one more name of a node. */
static ovl_err_t name_reserve(struct node *node)
{
	if (!node->parent)
		return 0;
	return is_dir(node) ? -EPERM : ovl_node_reserve_extra(node);
}

/* The entry leads to the node now; after name_reserve.  The entry leads nowhere yet. */
static void attach(struct node *node, struct node *parent, struct entry *entry)
{
	entry->node = node;
	parent->u.dir->live++;
	if (node->parent) {
		struct extra *extra = node->u.extra;

		extra->more[extra->used++] = (struct place){parent, entry->cookie};
		return;
	}
	node->parent = parent;
	node->cookie = entry->cookie;
}

/* The entry leads to nothing any more; the node has lost a name. */
static void detach(struct node *parent, struct entry *entry)
{
	struct node *node = entry->node;
	struct extra *extra = is_dir(node) ? NULL : node->u.extra;
	uint32_t at = 0;

	entry->node = NULL;
	parent->u.dir->live--;
	if (node->parent == parent && node->cookie == entry->cookie) {
		if (!extra || extra->used == 0) {
			node->parent = NULL;
			node->cookie = 0;
			return;
		}
		node->parent = extra->more[0].parent;
		node->cookie = extra->more[0].cookie & COOKIE_MAX;
	} else {
		while (extra->more[at].parent != parent || extra->more[at].cookie != entry->cookie)
			at++;
	}
	extra->used--;
	memmove(&extra->more[at], &extra->more[at + 1], (extra->used - at) * sizeof(extra->more[0]));
}

/* The path of a node, terminated; -ENOENT: there is none (any more). */
ovl_err_t ovl_node_path(const struct ovl_tree *tree, const struct node *node, uint8_t **path, size_t *len)
{
	size_t need = 0;
	uint8_t *text, *end;

	for (const struct node *at = node; at != tree->root; at = at->parent) {
		if (!at->parent)
			return -ENOENT;
		need += entry_of(at->parent, at->cookie)->len + (size_t)(need > 0);
	}
	text = malloc(need + 1);
	if (!text)
		return -ENOMEM;
	end = text + need;
	*end = 0;
	for (const struct node *at = node; at != tree->root; at = at->parent) {
		const struct entry *entry = entry_of(at->parent, at->cookie);

		if (end != text + need)
			*--end = '/';
		end -= entry->len;
		memcpy(end, entry->name, entry->len);
	}
	*path = text;
	*len = need;
	return 0;
}

/* ---- tables ------------------------------------------------------------------------------------------- */

static uint64_t table_key(const struct table *table, const struct node *node)
{
	return table->by_ino ? node->ino : node->nodeid;
}

static size_t table_home(const struct table *table, uint64_t key)
{
	key *= 0x9E3779B97F4A7C15ull;
	return (size_t)(key ^ key >> 32) & table->mask;
}

static struct node *table_get(const struct table *table, uint64_t key)
{
	if (!table->slots)
		return NULL;
	for (size_t at = table_home(table, key); table->slots[at]; at = (at + 1) & table->mask)
		if (table_key(table, table->slots[at]) == key)
			return table->slots[at];
	return NULL;
}

static void table_enter(struct table *table, struct node *node)
{
	size_t at = table_home(table, table_key(table, node));

	while (table->slots[at])
		at = (at + 1) & table->mask;
	table->slots[at] = node;
	table->count++;
}

/* Makes room for one more node. */
static ovl_err_t table_reserve(struct table *table)
{
	struct table more = {.by_ino = table->by_ino};

	if (table->slots && table->count + 1 <= table->mask / 4 * 3)
		return 0;
	more.mask = table->slots ? table->mask * 2 + 1 : 15;
	more.slots = calloc(more.mask + 1, sizeof(*more.slots));
	if (!more.slots)
		return -ENOMEM;
	for (size_t i = 0; table->slots && i <= table->mask; i++)
		if (table->slots[i])
			table_enter(&more, table->slots[i]);
	free(table->slots);
	*table = more;
	return 0;
}

/* Gives back room that most of it is empty; without memory for a smaller one it stays. */
static void table_shrink(struct table *table)
{
	struct table less = {.by_ino = table->by_ino, .mask = 15};

	while (less.mask / 4 * 3 < table->count * 2)
		less.mask = less.mask * 2 + 1;
	if (!table->slots || less.mask >= table->mask)
		return;
	less.slots = calloc(less.mask + 1, sizeof(*less.slots));
	if (!less.slots)
		return;
	for (size_t i = 0; i <= table->mask; i++)
		if (table->slots[i])
			table_enter(&less, table->slots[i]);
	free(table->slots);
	*table = less;
}

static void table_remove(struct table *table, const struct node *node)
{
	size_t hole = table_home(table, table_key(table, node));

	while (table->slots[hole] != node)
		hole = (hole + 1) & table->mask;
	for (size_t at = (hole + 1) & table->mask; table->slots[at]; at = (at + 1) & table->mask) {
		size_t home = table_home(table, table_key(table, table->slots[at]));

		if (((at - home) & table->mask) >= ((at - hole) & table->mask)) {
			table->slots[hole] = table->slots[at];
			hole = at;
		}
	}
	table->slots[hole] = NULL;
	table->count--;
}

/* The node that owns an ino, or NULL. */
static struct node *find_ino(const struct ovl_tree *tree, uint64_t ino)
{
	struct node *node = table_get(&tree->by_nodeid, ino);

	if (node && node->ino == ino && node->flags & NODE_INO_OWNER)
		return node;
	return table_get(&tree->by_ino, ino);
}

static ovl_err_t tables_reserve(struct ovl_tree *tree)
{
	ovl_err_t err = table_reserve(&tree->by_nodeid);

	return err ? err : table_reserve(&tree->by_ino);
}

static uint64_t new_nodeid(struct ovl_tree *tree, uint64_t ino)
{
	if (ino > OVL_ROOT_NODEID && !table_get(&tree->by_nodeid, ino))
		return ino;
	return ++tree->fresh;
}

/* Enters a node that has its nodeid, after tables_reserve. */
static void enter(struct ovl_tree *tree, struct node *node)
{
	if (!find_ino(tree, node->ino)) {
		set_flag(node, NODE_INO_OWNER, true);
		if (node->nodeid != node->ino)
			table_enter(&tree->by_ino, node);
	}
	table_enter(&tree->by_nodeid, node);
}

static void close_opened(struct opened *opened)
{
	ovl_merge_close(&opened->merge);
	free(opened->path);
	opened->path = NULL;
	opened->node = NULL;
}

/* What is open of a directory is no longer what it is made of; NULL: of any. */
static void forget_opened(struct ovl_tree *tree, const struct node *node)
{
	for (size_t i = 0; i < OPENED_MAX; i++)
		if (tree->opened[i].node && (!node || tree->opened[i].node == node))
			close_opened(&tree->opened[i]);
}

/* The node's orphan, if it has one, is left to unlock_and_close. */
static void put_orphan_off(struct ovl_tree *tree, struct node *node)
{
	struct kept *kept = ovl_node_kept(node);

	if (!kept || kept->orphan < 0)
		return;
	if (is_dir(node))
		node->u.dir->kept = NULL;
	else
		node->u.extra->kept = NULL;
	set_flag(node, NODE_KEPT | NODE_LIVE, false);
	kept->next = tree->dropped;
	kept->bytes = node->attr.size;
	tree->dropped = kept;
}

uint64_t ovl_tree_bytes(const struct kept *later)
{
	uint64_t bytes = 0;

	for (; later; later = later->next)
		bytes += later->bytes;
	return bytes;
}

void ovl_tree_close(struct kept *later)
{
	while (later) {
		struct kept *next = later->next;

		close(later->orphan);
		free(later);
		later = next;
	}
}

/* Gives the lock back after nodes may have been dropped, and closes their orphans then: to close the last descriptor of a
 * removed file is to free its data, which takes a second per few GiB. */
static void unlock_and_close(struct ovl_tree *tree)
{
	struct kept *later = tree->dropped;

	tree->dropped = NULL;
	pthread_rwlock_unlock(&tree->lock);
	ovl_tree_close(later);
}

static void drop(struct ovl_tree *tree, struct node *node)
{
	if (is_dir(node))
		forget_opened(tree, node);
	put_orphan_off(tree, node);
	if (node->flags & NODE_INO_OWNER && node->nodeid != node->ino)
		table_remove(&tree->by_ino, node);
	table_remove(&tree->by_nodeid, node);
	while (node->parent)
		detach(node->parent, entry_of(node->parent, node->cookie));
	node_free(tree, node);
}

/* Drops a node that the kernel does not hold, and then the directories for which it was the last reason. */
static void drop_if_unused(struct ovl_tree *tree, struct node *node)
{
	while (node && node->nlookup == 0 && node->nodeid != OVL_ROOT_NODEID) {
		struct node *parent;

		if (is_dir(node) && node->u.dir->live > 0)
			return;
		while (!is_dir(node) && node->u.extra && node->u.extra->used > 0) {
			struct place last = node->u.extra->more[node->u.extra->used - 1];

			detach(last.parent, entry_of(last.parent, last.cookie));
			drop_if_unused(tree, last.parent); /* a directory, and they have one name */
		}
		parent = node->parent;
		drop(tree, node);
		node = parent;
	}
}

/* A node of what was found; takes over its sources on success.  Not in the tables yet. */
static ovl_err_t node_new(struct ovl_tree *tree, struct ovl_found *found, struct node **out)
{
	struct node *node;
	ovl_err_t err;

	err = -ENOMEM;
	node = calloc(1, sizeof(*node));
	if (!node)
		goto out;
	node->ino = found->ino;
	node->attr = found->attr;
	node->upper_ino = found->upper_ino;
	if (S_ISDIR(found->attr.mode)) {
		struct dir *dir = calloc(1, sizeof(*dir));

		if (!dir)
			goto out;
		node->u.dir = dir;
		set_flag(node, NODE_DIR, true);
		if (found->lower_count > 0) {
			dir->lower = reallocarray(NULL, found->lower_count, sizeof(*dir->lower));
			if (!dir->lower)
				goto out;
			memcpy(dir->lower, found->lower, found->lower_count * sizeof(*dir->lower));
			dir->lower_count = (uint32_t)found->lower_count;
			found->lower_count = 0;
		}
	} else if (found->lower_count > 0) {
		size_t last = found->lower_count - 1;

		if (last > 0) {
			err = ovl_node_reserve_extra(node);
			if (err)
				goto out;
			node->u.extra->data = found->lower[last];
			node->u.extra->has_data = true;
		}
		node->layer = found->lower[0].layer & LAYERS_MAX;
		node->ref.number = found->lower[0].ref.number;
		node->name = found->lower[0].name;
		set_flag(node, NODE_LOWER, true);
		for (size_t i = 1; i < last; i++)
			ovl_source_clear(&tree->stack, &found->lower[i]);
		found->lower_count = 0;
	}
	set_flag(node, NODE_UPPER, found->upper);
	set_flag(node, NODE_METACOPY, found->metacopy);
	set_flag(node, NODE_REDIRECT, found->redirect);
	*out = node;
	node = NULL;
	err = 0;
out:
	node_free(tree, node);
	return err;
}

/* The node of what a name was found to be: a new one, or that of another name (a hard link). */
static ovl_err_t insert(struct ovl_tree *tree, struct ovl_found *found, struct node **out)
{
	struct node *same = find_ino(tree, found->ino);
	struct node *node;
	ovl_err_t err = tables_reserve(tree);

	if (err)
		return err;
	if (same) {
		bool lives = is_linked(same) || same->attr.nlink > 0; /* here is a name that was not known so far */
		bool upper = same->flags & NODE_UPPER;

		if (!S_ISDIR(found->attr.mode) && !is_dir(same) && lives && upper == found->upper &&
		    same->upper_ino == found->upper_ino) {
			*out = same;
			return 0;
		}
		if (found->upper) /* two upper objects of one origin: the later shows its own */
			found->ino = ovl_ino_of(tree->stack.upper_device, found->upper_ino);
	}
	err = node_new(tree, found, &node);
	if (err)
		return err;
	node->nodeid = new_nodeid(tree, node->ino);
	enter(tree, node);
	*out = node;
	return 0;
}

/* ---- merging and resolving; the lock is held for writing ---------------------------------------------- */

ovl_err_t ovl_tree_find(const struct ovl_tree *tree, uint64_t nodeid, struct node **out)
{
	*out = table_get(&tree->by_nodeid, nodeid);
	return *out ? 0 : -ESTALE;
}

static ovl_err_t find_dir(const struct ovl_tree *tree, uint64_t nodeid, struct node **out)
{
	ovl_err_t err = ovl_tree_find(tree, nodeid, out);

	return err || is_dir(*out) ? err : -ENOTDIR;
}

/* A place for one more; what was not used for longest makes room. */
static struct opened *opened_place(struct ovl_tree *tree)
{
	struct opened *oldest = &tree->opened[0];

	for (size_t i = 0; i < OPENED_MAX; i++) {
		if (!tree->opened[i].node)
			return &tree->opened[i];
		if (tree->opened[i].used < oldest->used)
			oldest = &tree->opened[i];
	}
	close_opened(oldest);
	return oldest;
}

/* The layers' side of a directory, opened; to be given to close_merge. */
static ovl_err_t open_merge(struct ovl_tree *tree, struct node *node, struct opened **out)
{
	struct opened *opened;
	bool upper = false;
	size_t len = 0;
	ovl_err_t err;

	for (size_t i = 0; i < OPENED_MAX; i++) {
		opened = &tree->opened[i];
		if (opened->node == node) {
			opened->used = ++tree->clock;
			*out = opened;
			return 0;
		}
	}
	opened = opened_place(tree);
	if (node->flags & NODE_UPPER) {
		err = ovl_node_path(tree, node, &opened->path, &len);
		if (err && err != -ENOENT)
			return err;
		upper = !err;
	}
	err = ovl_merge_open(&opened->merge, &tree->stack, node->u.dir->lower, node->u.dir->lower_count, upper, opened->path,
			     len);
	opened->node = node;
	opened->used = ++tree->clock;
	if (err)
		close_opened(opened);
	*out = opened;
	return err;
}

static void close_merge(struct opened *opened, ovl_err_t err)
{
	if (err || opened->merge.count > OPENED_SOURCES_MAX)
		close_opened(opened);
}

static ovl_err_t put_name(void *arg, const uint8_t *name, size_t len, size_t from, bool borrowed)
{
	struct ovl_blob *blob = NULL;
	struct dir *dir = arg;
	ovl_err_t err;

	if (len == 0 || len > OVL_NAME_MAX)
		return -EUCLEAN;
	if (dir_find(dir, name, len))
		return 0;
	err = dir_reserve(dir);
	if (err)
		return err;
	if (!borrowed) {
		blob = ovl_blob_new(name, len);
		if (!blob)
			return -ENOMEM;
	}
	dir_put(dir, name, len, blob)->from = (from < FROM_MAX ? from : FROM_MAX) & FROM_MAX;
	return 0;
}

/* Gives the directory the names that were collected in `names`, and makes the array as long as it has to be. */
static void take_names(struct dir *dir, struct dir *names)
{
	if (names->used < names->room) {
		struct entry *entries = reallocarray(names->entries, names->used ? names->used : 1, sizeof(*entries));

		if (entries) {
			names->entries = entries;
			names->room = names->used ? names->used : 1;
		}
	}
	dir->entries = names->entries;
	dir->index = names->index;
	dir->index_mask = names->index_mask;
	dir->next_cookie = names->next_cookie;
	dir->used = names->used;
	dir->room = names->room;
	dir->named = names->named;
	dir->merged = true;
	*names = (struct dir){0};
}

static void tell_merged(struct ovl_tree *tree, const struct node *node, uint64_t began_ns)
{
	const struct dir *dir = node->u.dir;
	uint16_t layers[OVL_TOLD_LAYERS];
	size_t count = 0;

	if (node->flags & NODE_UPPER)
		layers[count++] = 0;
	for (uint32_t i = 0; i < dir->lower_count && count < OVL_TOLD_LAYERS; i++)
		layers[count++] = (uint16_t)dir->lower[i].layer;
	tree->told(tree->told_arg, node->nodeid, dir->named, layers, count, began_ns);
}

/* Has the directory its names? */
static ovl_err_t need_merged(struct ovl_tree *tree, struct node *node, struct ovl_ask *ask)
{
	struct timespec began = {0};
	struct dir names = {0};
	struct opened *opened;
	ovl_err_t err;

	if (node->u.dir->merged)
		return 0;
	if (tree->told)
		clock_gettime(CLOCK_MONOTONIC, &began);
	if (is_linked(node)) {
		err = open_merge(tree, node, &opened);
		if (!err) {
			err = ovl_merge_names(&opened->merge, put_name, &names);
			close_merge(opened, err);
		}
		if (err == OVL_ASK) {
			ask->nodeid = node->nodeid;
			ask->name_len = 0;
			err = OVL_ASK_NAMES;
		}
		if (err) {
			dir_clear(&names);
			return err;
		}
	}
	take_names(node->u.dir, &names);
	if (tree->told)
		tell_merged(tree, node, (uint64_t)began.tv_sec * 1000000000u + (uint64_t)began.tv_nsec);
	return 0;
}

/* What the name of an entry is.  May remove the entry: OVL_ABSENT then, as what a layer listed is not there. */
static ovl_err_t resolve(struct ovl_tree *tree, struct node *parent, struct ovl_merge *merge, struct entry *entry,
			 struct ovl_ask *ask)
{
	struct ovl_found found;
	struct node *node;
	ovl_err_t err;

	err = ovl_merge_lookup(merge, entry->name, entry->len, entry->from, name_blob(entry), &found);
	if (err == OVL_ABSENT) {
		dir_remove(parent->u.dir, entry);
		return err;
	}
	if (err == OVL_ASK) {
		ask->nodeid = parent->nodeid;
		ask->name_len = entry->len;
		memcpy(ask->name, entry->name, entry->len);
	}
	if (err)
		return err;
	err = insert(tree, &found, &node);
	if (!err) {
		err = name_reserve(node);
		if (!err)
			attach(node, parent, entry);
	}
	ovl_found_clear(&tree->stack, &found);
	return err;
}

/* The entry of a name, resolved.  OVL_ABSENT: the directory has no such name. */
static ovl_err_t need_entry(struct ovl_tree *tree, struct node *parent, const uint8_t *name, size_t len,
			    struct entry **out, struct ovl_ask *ask)
{
	struct opened *opened;
	struct entry *entry;
	ovl_err_t err;

	err = need_merged(tree, parent, ask);
	if (err)
		return err;
	entry = dir_find(parent->u.dir, name, len);
	if (!entry)
		return OVL_ABSENT;
	*out = entry;
	if (entry->node)
		return 0;
	err = open_merge(tree, parent, &opened);
	if (!err) {
		err = resolve(tree, parent, &opened->merge, entry, ask);
		close_merge(opened, err < 0 ? err : 0);
	}
	return err;
}

/* ---- life --------------------------------------------------------------------------------------------- */

ovl_err_t ovl_tree_new(const struct ovl_stack *stack, struct ovl_found *root, struct ovl_tree **out)
{
	pthread_rwlockattr_t kind;
	struct ovl_tree *tree = NULL;
	ovl_err_t err;

	if (stack->count == 0 || stack->count > LAYERS_MAX || !S_ISDIR(root->attr.mode))
		return -EINVAL;
	err = -ENOMEM;
	tree = calloc(1, sizeof(*tree));
	if (!tree)
		goto out;
	tree->stack = *stack;
	tree->by_ino.by_ino = true;
	tree->fresh = OVL_FRESH_NODEID;
	err = tables_reserve(tree);
	if (!err)
		err = node_new(tree, root, &tree->root);
	if (err)
		goto out;
	tree->root->nodeid = OVL_ROOT_NODEID;
	enter(tree, tree->root);
	/* Many readers must not starve the one writer. */
	pthread_rwlockattr_init(&kind);
	pthread_rwlockattr_setkind_np(&kind, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
	err = -pthread_rwlock_init(&tree->lock, &kind);
	pthread_rwlockattr_destroy(&kind);
	if (err)
		goto out;
	ovl_found_clear(&tree->stack, root);
	*out = tree;
	tree = NULL;
out:
	if (tree) {
		if (tree->root)
			node_free(tree, tree->root);
		free(tree->by_nodeid.slots);
		free(tree->by_ino.slots);
		free(tree);
	}
	return err;
}

void ovl_tree_free(struct ovl_tree *tree)
{
	if (!tree)
		return;
	forget_opened(tree, NULL);
	for (size_t i = 0; i <= tree->by_nodeid.mask; i++)
		node_free(tree, tree->by_nodeid.slots[i]);
	free(tree->by_nodeid.slots);
	free(tree->by_ino.slots);
	free(tree->stack.layers);
	pthread_rwlock_destroy(&tree->lock);
	free(tree);
}

const struct ovl_stack *ovl_tree_stack(const struct ovl_tree *tree)
{
	return &tree->stack;
}

ovl_err_t ovl_tree_add_device(struct ovl_tree *tree, uint64_t device, uint64_t number)
{
	struct ovl_stack *stack = &tree->stack;
	uint64_t ino;
	ovl_err_t err = 0;

	pthread_rwlock_wrlock(&tree->lock);
	if (ovl_stack_ino(stack, device, 0, &ino) == OVL_ASK) {
		if (stack->device_count < OVL_DEVICES_MAX)
			stack->devices[stack->device_count++] = (struct ovl_device){device, number};
		else
			err = -ENOSPC;
	}
	pthread_rwlock_unlock(&tree->lock);
	return err;
}

/* ---- reading ------------------------------------------------------------------------------------------ */

static void fill_entry(const struct node *node, struct ovl_entry *out)
{
	out->nodeid = node->nodeid;
	out->ino = node->ino;
	out->attr = node->attr;
	if (node->flags & NODE_LIVE)
		ovl_node_read_live(node, &out->attr);
}

ovl_err_t ovl_tree_get(struct ovl_tree *tree, uint64_t nodeid, struct ovl_entry *out)
{
	struct node *node;
	ovl_err_t err;

	pthread_rwlock_rdlock(&tree->lock);
	err = ovl_tree_find(tree, nodeid, &node);
	if (!err)
		fill_entry(node, out);
	pthread_rwlock_unlock(&tree->lock);
	return err;
}

static void count_lookup(struct node *node)
{
	__atomic_fetch_add(&node->nlookup, 1, __ATOMIC_RELAXED);
}

ovl_err_t ovl_tree_lookup(struct ovl_tree *tree, uint64_t parent, const uint8_t *name, size_t len, unsigned how,
			  struct ovl_entry *out, struct ovl_ask *ask)
{
	struct entry *entry = NULL;
	struct node *node;
	bool known;
	ovl_err_t err;

	memset(out, 0, sizeof(*out));
	pthread_rwlock_rdlock(&tree->lock);
	err = find_dir(tree, parent, &node);
	known = !err && node->u.dir->merged;
	if (known) {
		entry = dir_find(node->u.dir, name, len);
		known = !entry || entry->node;
		if (entry && entry->node) {
			fill_entry(entry->node, out);
			if (how & OVL_COUNT)
				count_lookup(entry->node);
		}
	}
	pthread_rwlock_unlock(&tree->lock);
	if (err || known)
		return err;
	if (how & OVL_KNOWN)
		return OVL_ASK;

	pthread_rwlock_wrlock(&tree->lock);
	err = find_dir(tree, parent, &node);
	if (!err)
		err = need_entry(tree, node, name, len, &entry, ask);
	if (!err) {
		fill_entry(entry->node, out);
		if (how & OVL_COUNT)
			count_lookup(entry->node);
	}
	pthread_rwlock_unlock(&tree->lock);
	return err == OVL_ABSENT ? 0 : err;
}

/* Resolves what has to be among the next `most` names, but no more than a turn, above `after`; the lock is held for writing. */
static ovl_err_t resolve_some(struct ovl_tree *tree, struct node *node, uint64_t after, size_t most,
			      struct ovl_ask *ask)
{
	struct dir *dir = node->u.dir;
	struct opened *opened;
	size_t turn = 0;
	ovl_err_t err;

	if (most > LIST_TURN)
		most = LIST_TURN;
	err = need_merged(tree, node, ask);
	if (err)
		return err;
	err = open_merge(tree, node, &opened);
	if (err)
		return err;
	while (!err && turn < most) {
		uint32_t at = dir_seek(dir, after + 1);

		while (at < dir->used && !dir->entries[at].name)
			at++;
		if (at == dir->used)
			break;
		after = dir->entries[at].cookie;
		turn++;
		if (dir->entries[at].node)
			continue;
		err = resolve(tree, node, &opened->merge, &dir->entries[at], ask);
		if (err == OVL_ABSENT) {
			err = 0; /* the entry is gone, and counts for nothing */
			turn--;
		}
	}
	if (err && turn > 1)
		err = 0; /* give what there is first; the next turn begins here */
	close_merge(opened, err < 0 ? err : 0);
	return err;
}

ovl_err_t ovl_tree_list_how(struct ovl_tree *tree, uint64_t nodeid, uint64_t after, size_t most, unsigned how,
			    ovl_tree_emit emit, void *arg, struct ovl_ask *ask)
{
	struct ovl_entry out;
	struct node *node;
	ovl_err_t err;

	if (after >= COOKIE_MAX)
		after = COOKIE_MAX - 1;
	for (;;) {
		bool more = false, full = false;

		pthread_rwlock_rdlock(&tree->lock);
		err = find_dir(tree, nodeid, &node);
		if (!err && !node->u.dir->merged)
			more = true;
		for (uint32_t at = err || more ? 0 : dir_seek(node->u.dir, after + 1);
		     !err && !more && at < node->u.dir->used && most > 0; at++) {
			const struct entry *entry = &node->u.dir->entries[at];

			if (!entry->name || entry->name[0] == '/') /* dir.py: _NO_NAME, there for a moment */
				continue;
			if (!entry->node) {
				more = true;
				break;
			}
			fill_entry(entry->node, &out);
			if (!emit(arg, entry->cookie, entry->name, entry->len, &out)) {
				full = true;
				break;
			}
			if (how & OVL_COUNT)
				count_lookup(entry->node);
			after = entry->cookie;
			most--;
		}
		pthread_rwlock_unlock(&tree->lock);
		if (err || full || !more)
			return err;
		if (how & OVL_KNOWN)
			return OVL_ASK;

		pthread_rwlock_wrlock(&tree->lock);
		err = find_dir(tree, nodeid, &node);
		if (!err)
			err = resolve_some(tree, node, after, most, ask);
		pthread_rwlock_unlock(&tree->lock);
		if (err)
			return err;
	}
}

ovl_err_t ovl_tree_list(struct ovl_tree *tree, uint64_t nodeid, uint64_t after, size_t most, ovl_tree_emit emit,
			void *arg, struct ovl_ask *ask)
{
	return ovl_tree_list_how(tree, nodeid, after, most, 0, emit, arg, ask);
}

ovl_err_t ovl_tree_below(struct ovl_tree *tree, uint64_t parent, const uint8_t *name, size_t len)
{
	const struct entry *entry;
	struct opened *opened;
	struct ovl_merge below;
	struct ovl_found found;
	struct node *node;
	ovl_err_t err;

	/* Blobs and paths are counted under the lock for writing (merge.h). */
	pthread_rwlock_wrlock(&tree->lock);
	err = find_dir(tree, parent, &node);
	if (err)
		goto out;
	entry = dir_find(node->u.dir, name, len);
	if (entry && entry->from > 0)
		goto out;
	err = OVL_ABSENT;
	if (node->u.dir->lower_count == 0)
		goto out;
	err = open_merge(tree, node, &opened);
	if (err)
		goto out;
	below = opened->merge; /* with what is open, and what will be */
	below.upper = false;
	err = ovl_merge_lookup(&below, name, len, 0, NULL, &found);
	if (!err)
		ovl_found_clear(&tree->stack, &found);
	close_merge(opened, err < 0 ? err : 0);
out:
	pthread_rwlock_unlock(&tree->lock);
	return err;
}

ovl_err_t ovl_tree_parent(struct ovl_tree *tree, uint64_t nodeid, struct ovl_entry *out)
{
	struct node *node;
	ovl_err_t err;

	pthread_rwlock_rdlock(&tree->lock);
	err = ovl_tree_find(tree, nodeid, &node);
	if (!err)
		fill_entry(node->parent ? node->parent : node, out);
	pthread_rwlock_unlock(&tree->lock);
	return err;
}

static ovl_err_t node_readlink(const struct ovl_tree *tree, const struct node *node, const uint8_t **target, size_t *len)
{
	const struct ovl_layer *layer;

	if (!S_ISLNK(node->attr.mode))
		return -EINVAL;
	if (node->flags & NODE_UPPER || !(node->flags & NODE_LOWER))
		return OVL_ASK;
	layer = &tree->stack.layers[node->layer];
	if (layer->kind != OVL_LAYER_TAR || node->name || node->ref.number < 0 || node->ref.number > UINT32_MAX)
		return OVL_ASK;
	return ovl_index_readlink(layer->index, (uint32_t)node->ref.number, target, len);
}

ovl_err_t ovl_tree_readlink(struct ovl_tree *tree, uint64_t nodeid, const uint8_t **target, size_t *len)
{
	struct node *node;
	ovl_err_t err;

	pthread_rwlock_rdlock(&tree->lock);
	err = ovl_tree_find(tree, nodeid, &node);
	if (!err)
		err = node_readlink(tree, node, target, len);
	pthread_rwlock_unlock(&tree->lock);
	return err;
}

ovl_err_t ovl_tree_path(struct ovl_tree *tree, uint64_t nodeid, uint8_t **path, size_t *len)
{
	struct node *node;
	ovl_err_t err;

	pthread_rwlock_rdlock(&tree->lock);
	err = ovl_tree_find(tree, nodeid, &node);
	if (!err)
		err = ovl_node_path(tree, node, path, len);
	pthread_rwlock_unlock(&tree->lock);
	return err;
}

static void fill_name(const struct node *parent, uint64_t cookie, struct ovl_tree_name *out)
{
	const struct entry *entry = entry_of(parent, cookie);

	out->parent = parent->nodeid;
	out->len = entry->len;
	memcpy(out->name, entry->name, entry->len);
	out->name[entry->len] = 0;
}

ovl_err_t ovl_tree_names(struct ovl_tree *tree, uint64_t nodeid, struct ovl_tree_name **names, size_t *count)
{
	const struct extra *extra = NULL;
	struct node *node;
	size_t some = 0;
	ovl_err_t err;

	*names = NULL;
	*count = 0;
	pthread_rwlock_rdlock(&tree->lock);
	err = ovl_tree_find(tree, nodeid, &node);
	if (err)
		goto out;
	if (!is_dir(node))
		extra = node->u.extra;
	some = (node->parent ? 1 : 0) + (extra ? extra->used : 0);
	if (some == 0)
		goto out;
	err = -ENOMEM;
	*names = reallocarray(NULL, some, sizeof(**names));
	if (!*names)
		goto out;
	fill_name(node->parent, node->cookie, &(*names)[0]);
	for (size_t i = 1; i < some; i++)
		fill_name(extra->more[i - 1].parent, extra->more[i - 1].cookie, &(*names)[i]);
	*count = some;
	err = 0;
out:
	pthread_rwlock_unlock(&tree->lock);
	return err;
}

static ovl_err_t copy_source(const struct ovl_tree *tree, const struct ovl_source *source, struct ovl_source_copy *out)
{
	out->layer = source->layer;
	if (tree->stack.layers[source->layer].kind == OVL_LAYER_DIR)
		return ovl_source_path(source, &out->path, &out->path_len);
	if (!source->name) {
		out->number = source->ref.number;
		return 0;
	}
	out->path = malloc(source->name->len + 1ul);
	if (!out->path)
		return -ENOMEM;
	memcpy(out->path, source->name->bytes, source->name->len);
	out->path_len = source->name->len;
	return 0;
}

static ovl_err_t describe_lower(const struct ovl_tree *tree, const struct node *node, struct ovl_description *out)
{
	struct ovl_source some[2];
	const struct ovl_source *sources = some;
	size_t count = 0;
	ovl_err_t err = 0;

	if (is_dir(node)) {
		sources = node->u.dir->lower;
		count = node->u.dir->lower_count;
	} else {
		if (node->flags & NODE_LOWER)
			some[count++] = ovl_node_source(node);
		if (node->u.extra && node->u.extra->has_data)
			some[count++] = node->u.extra->data;
	}
	if (count == 0)
		return 0;
	out->lower = calloc(count, sizeof(*out->lower));
	if (!out->lower)
		return -ENOMEM;
	out->lower_count = count;
	for (size_t i = 0; !err && i < count; i++)
		err = copy_source(tree, &sources[i], &out->lower[i]);
	return err;
}

ovl_err_t ovl_tree_describe(struct ovl_tree *tree, uint64_t nodeid, bool whole, struct ovl_description *out)
{
	struct node *node;
	ovl_err_t err;

	*out = (struct ovl_description){0};
	pthread_rwlock_rdlock(&tree->lock);
	err = ovl_tree_find(tree, nodeid, &node);
	if (!err) {
		out->entry = (struct ovl_entry){.nodeid = node->nodeid, .ino = node->ino, .attr = node->attr};
		out->nlookup = __atomic_load_n(&node->nlookup, __ATOMIC_RELAXED);
		out->upper_ino = node->upper_ino;
		out->upper = node->flags & NODE_UPPER;
		out->metacopy = node->flags & NODE_METACOPY;
		out->redirect = node->flags & NODE_REDIRECT;
		out->is_linked = is_linked(node);
		out->has_lower = is_dir(node) ? node->u.dir->lower_count > 0 : node->flags & NODE_LOWER;
		out->name_count = node->parent ? 1 : 0;
		if (!is_dir(node) && node->u.extra)
			out->name_count += node->u.extra->used;
		if (whole && node->flags & NODE_LIVE)
			ovl_node_read_live(node, &out->entry.attr);
		if (whole)
			err = describe_lower(tree, node, out);
	}
	pthread_rwlock_unlock(&tree->lock);
	if (err)
		ovl_description_clear(out);
	return err;
}

void ovl_description_clear(struct ovl_description *description)
{
	for (size_t i = 0; i < description->lower_count; i++)
		free(description->lower[i].path);
	free(description->lower);
	description->lower = NULL;
	description->lower_count = 0;
}

size_t ovl_tree_count(struct ovl_tree *tree)
{
	size_t count;

	pthread_rwlock_rdlock(&tree->lock);
	count = tree->by_nodeid.count;
	pthread_rwlock_unlock(&tree->lock);
	return count;
}

int ovl_tree_layer(struct ovl_tree *tree, uint64_t nodeid)
{
	struct node *node;
	int layer = -1;

	pthread_rwlock_rdlock(&tree->lock);
	if (ovl_tree_find(tree, nodeid, &node) == 0) {
		if (node->flags & NODE_UPPER)
			layer = 0;
		else if (is_dir(node) && node->u.dir->lower_count > 0)
			layer = (int)node->u.dir->lower[0].layer;
		else if (!is_dir(node) && node->flags & NODE_LOWER)
			layer = (int)node->layer;
	}
	pthread_rwlock_unlock(&tree->lock);
	return layer;
}

void ovl_tree_counts(struct ovl_tree *tree, struct ovl_tree_counts *out)
{
	*out = (struct ovl_tree_counts){0};
	pthread_rwlock_rdlock(&tree->lock);
	out->inodes = tree->by_nodeid.count;
	for (size_t i = 0; i <= tree->by_nodeid.mask; i++) {
		const struct node *node = tree->by_nodeid.slots[i];

		if (node && is_dir(node) && node->u.dir->merged) {
			out->merged++;
			out->names += node->u.dir->named;
		}
	}
	pthread_rwlock_unlock(&tree->lock);
}

void ovl_tree_tell_merged(struct ovl_tree *tree, ovl_tree_told told, void *arg)
{
	pthread_rwlock_wrlock(&tree->lock);
	tree->told = told;
	tree->told_arg = arg;
	pthread_rwlock_unlock(&tree->lock);
}

ovl_err_t ovl_tree_nodeids(struct ovl_tree *tree, uint64_t **nodeids, size_t *count)
{
	ovl_err_t err = -ENOMEM;

	*count = 0;
	pthread_rwlock_rdlock(&tree->lock);
	*nodeids = reallocarray(NULL, tree->by_nodeid.count, sizeof(**nodeids));
	if (*nodeids) {
		for (size_t i = 0; i <= tree->by_nodeid.mask; i++)
			if (tree->by_nodeid.slots[i])
				(*nodeids)[(*count)++] = tree->by_nodeid.slots[i]->nodeid;
		err = 0;
	}
	pthread_rwlock_unlock(&tree->lock);
	return err;
}

/* ---- mutations ---------------------------------------------------------------------------------------- */

/* A directory, merged, that lacks `name` but has room for it; and the name as a blob of its own. */
static ovl_err_t need_absent(struct ovl_tree *tree, uint64_t parent, const uint8_t *name, size_t len,
			     struct node **directory, struct ovl_blob **blob, struct ovl_ask *ask)
{
	ovl_err_t err;

	*blob = NULL;
	if (len == 0 || len > OVL_NAME_MAX)
		return -EINVAL;
	err = find_dir(tree, parent, directory);
	if (!err)
		err = need_merged(tree, *directory, ask);
	if (!err && dir_find((*directory)->u.dir, name, len))
		err = -EEXIST;
	if (!err)
		err = dir_reserve((*directory)->u.dir);
	if (err)
		return err;
	*blob = ovl_blob_new(name, len);
	return *blob ? 0 : -ENOMEM;
}

ovl_err_t ovl_tree_add(struct ovl_tree *tree, uint64_t parent, const uint8_t *name, size_t len,
		       const struct ovl_attr *attr, uint64_t upper_ino, uint64_t ino, uint64_t *nodeid,
		       struct ovl_ask *ask)
{
	struct ovl_found found = {.ino = ino, .upper_ino = upper_ino, .attr = *attr, .upper = true};
	struct node *directory, *node = NULL;
	struct ovl_blob *blob = NULL;
	ovl_err_t err;

	pthread_rwlock_wrlock(&tree->lock);
	err = need_absent(tree, parent, name, len, &directory, &blob, ask);
	if (!err)
		err = tables_reserve(tree);
	if (!err)
		err = node_new(tree, &found, &node);
	if (err) {
		ovl_blob_unref(blob);
		goto out;
	}
	if (is_dir(node))
		node->u.dir->merged = true;
	node->nodeid = new_nodeid(tree, ino);
	enter(tree, node);
	attach(node, directory, dir_put(directory->u.dir, name, len, blob));
	*nodeid = node->nodeid;
out:
	pthread_rwlock_unlock(&tree->lock);
	return err;
}

ovl_err_t ovl_tree_link(struct ovl_tree *tree, uint64_t nodeid, uint64_t parent, const uint8_t *name, size_t len,
			struct ovl_ask *ask)
{
	struct node *directory, *node;
	struct ovl_blob *blob = NULL;
	ovl_err_t err;

	pthread_rwlock_wrlock(&tree->lock);
	err = need_absent(tree, parent, name, len, &directory, &blob, ask);
	if (!err)
		err = ovl_tree_find(tree, nodeid, &node);
	if (!err)
		err = is_dir(node) ? -EPERM : name_reserve(node);
	if (err)
		ovl_blob_unref(blob);
	else
		attach(node, directory, dir_put(directory->u.dir, name, len, blob));
	pthread_rwlock_unlock(&tree->lock);
	return err;
}

ovl_err_t ovl_tree_remove(struct ovl_tree *tree, uint64_t parent, const uint8_t *name, size_t len, struct ovl_ask *ask)
{
	struct node *directory, *node;
	struct entry *entry;
	ovl_err_t err;

	pthread_rwlock_wrlock(&tree->lock);
	err = find_dir(tree, parent, &directory);
	if (!err)
		err = need_merged(tree, directory, ask);
	if (err)
		goto out;
	entry = dir_find(directory->u.dir, name, len);
	if (!entry) {
		err = OVL_ABSENT;
		goto out;
	}
	node = entry->node;
	if (node) {
		detach(directory, entry);
		forget_opened(tree, node);
	}
	dir_remove(directory->u.dir, entry);
	drop_if_unused(tree, node);
out:
	unlock_and_close(tree);
	return err;
}

/* Is `node` a directory, and `at` in it or itself? */
static bool contains(const struct node *node, const struct node *at)
{
	while (is_dir(node) && at) {
		if (at == node)
			return true;
		at = at->parent;
	}
	return false;
}

ovl_err_t ovl_tree_move(struct ovl_tree *tree, uint64_t parent, const uint8_t *name, size_t len, uint64_t new_parent,
			const uint8_t *new_name, size_t new_len, struct ovl_ask *ask)
{
	struct node *from, *to, *node, *replaced = NULL;
	struct entry *entry;
	struct ovl_blob *blob;
	ovl_err_t err;

	if (new_len == 0 || new_len > OVL_NAME_MAX)
		return -EINVAL;
	pthread_rwlock_wrlock(&tree->lock);
	err = find_dir(tree, parent, &from);
	if (!err)
		err = ovl_tree_find(tree, new_parent, &to);
	if (!err)
		err = need_entry(tree, from, name, len, &entry, ask);
	if (!err)
		err = is_dir(to) ? need_merged(tree, to, ask) : -ENOTDIR;
	if (err == OVL_ABSENT)
		err = -ESTALE;
	if (err || (from == to && len == new_len && memcmp(name, new_name, len) == 0))
		goto out;
	node = entry->node;
	err = -EINVAL;
	if (contains(node, to))
		goto out;
	err = dir_reserve(to->u.dir);
	if (err)
		goto out;
	err = -ENOMEM;
	blob = ovl_blob_new(new_name, new_len);
	if (!blob)
		goto out;
	err = 0;
	entry = dir_find(to->u.dir, new_name, new_len);
	if (entry) {
		replaced = entry->node;
		if (replaced)
			detach(to, entry);
		dir_remove(to->u.dir, entry);
	}
	if (is_dir(node) || (replaced && is_dir(replaced)))
		forget_opened(tree, NULL); /* the paths of all that is below */
	/* Entries have moved if it was the same directory. */
	entry = dir_find(from->u.dir, name, len);
	detach(from, entry);
	dir_remove(from->u.dir, entry);
	/* It has lost a name, so there is room for one. */
	attach(node, to, dir_put(to->u.dir, new_name, new_len, blob));
	/* Only now: `to` holds a live name, and is not dropped with what it lost. */
	if (replaced)
		drop_if_unused(tree, replaced);
out:
	unlock_and_close(tree);
	return err;
}

ovl_err_t ovl_tree_exchange(struct ovl_tree *tree, uint64_t parent, const uint8_t *name, size_t len,
			    uint64_t new_parent, const uint8_t *new_name, size_t new_len, struct ovl_ask *ask)
{
	struct node *one, *other, *first, *second;
	struct entry *a, *b;
	ovl_err_t err;

	pthread_rwlock_wrlock(&tree->lock);
	err = find_dir(tree, parent, &one);
	if (!err)
		err = ovl_tree_find(tree, new_parent, &other);
	if (!err)
		err = need_entry(tree, one, name, len, &a, ask);
	if (!err)
		err = is_dir(other) ? need_entry(tree, other, new_name, new_len, &b, ask) : -ENOTDIR;
	if (err == OVL_ABSENT)
		err = -ESTALE;
	if (err)
		goto out;
	/* Resolving the second can have removed nothing but the second; look again all the same. */
	a = dir_find(one->u.dir, name, len);
	first = a->node;
	second = b->node;
	if (a == b)
		goto out;
	err = -EINVAL;
	if (contains(first, other) || contains(second, one))
		goto out;
	err = 0;
	if (is_dir(first) || is_dir(second))
		forget_opened(tree, NULL);
	detach(one, a);
	detach(other, b);
	attach(first, other, b);
	attach(second, one, a);
out:
	pthread_rwlock_unlock(&tree->lock);
	return err;
}

ovl_err_t ovl_tree_set_upper(struct ovl_tree *tree, uint64_t nodeid, uint64_t upper_ino, bool metacopy)
{
	struct node *node;
	ovl_err_t err;

	pthread_rwlock_wrlock(&tree->lock);
	err = ovl_tree_find(tree, nodeid, &node);
	if (!err) {
		set_flag(node, NODE_UPPER, true);
		set_flag(node, NODE_METACOPY, metacopy);
		node->upper_ino = upper_ino;
		if (is_dir(node))
			forget_opened(tree, node);
		if (!is_dir(node) && !metacopy)
			node_clear_lower(tree, node);
	}
	pthread_rwlock_unlock(&tree->lock);
	return err;
}

ovl_err_t ovl_tree_set_redirect(struct ovl_tree *tree, uint64_t nodeid)
{
	struct node *node;
	ovl_err_t err;

	pthread_rwlock_wrlock(&tree->lock);
	err = ovl_tree_find(tree, nodeid, &node);
	if (!err)
		set_flag(node, NODE_REDIRECT, true);
	pthread_rwlock_unlock(&tree->lock);
	return err;
}

ovl_err_t ovl_tree_set_attr(struct ovl_tree *tree, uint64_t nodeid, const struct ovl_attr *attr)
{
	struct node *node;
	ovl_err_t err;

	pthread_rwlock_wrlock(&tree->lock);
	err = ovl_tree_find(tree, nodeid, &node);
	if (!err && is_dir(node) != (bool)S_ISDIR(attr->mode))
		err = -EINVAL;
	if (!err)
		node->attr = *attr;
	pthread_rwlock_unlock(&tree->lock);
	return err;
}

ovl_err_t ovl_tree_ref(struct ovl_tree *tree, uint64_t nodeid)
{
	struct node *node;
	ovl_err_t err;

	pthread_rwlock_rdlock(&tree->lock);
	err = ovl_tree_find(tree, nodeid, &node);
	if (!err)
		count_lookup(node);
	pthread_rwlock_unlock(&tree->lock);
	return err;
}

static void forget(struct ovl_tree *tree, struct node *node, uint64_t nlookup)
{
	node->nlookup -= nlookup < node->nlookup ? nlookup : node->nlookup;
	if (node->nlookup == 0 && is_dir(node)) {
		/* Hold the directory while its names go, each of which could be the last reason to keep it. */
		node->nlookup = 1;
		for (uint32_t i = 0; i < node->u.dir->used; i++)
			if (node->u.dir->entries[i].node)
				drop_if_unused(tree, node->u.dir->entries[i].node);
		node->nlookup = 0;
	}
	drop_if_unused(tree, node);
}

void ovl_tree_forget(struct ovl_tree *tree, uint64_t nodeid, uint64_t nlookup, bool *gone)
{
	struct node *node;

	*gone = true;
	pthread_rwlock_wrlock(&tree->lock);
	if (ovl_tree_find(tree, nodeid, &node) == 0) {
		forget(tree, node, nlookup);
		*gone = !table_get(&tree->by_nodeid, nodeid);
	}
	unlock_and_close(tree);
}

void ovl_tree_forget_later(struct ovl_tree *tree, uint64_t nodeid, uint64_t nlookup, struct kept **later)
{
	struct node *node;

	pthread_rwlock_wrlock(&tree->lock);
	if (ovl_tree_find(tree, nodeid, &node) == 0) {
		tree->dropped = *later;
		forget(tree, node, nlookup);
		*later = tree->dropped;
		tree->dropped = NULL;
	}
	pthread_rwlock_unlock(&tree->lock);
}

void ovl_tree_trim(struct ovl_tree *tree)
{
	pthread_rwlock_wrlock(&tree->lock);
	table_shrink(&tree->by_nodeid);
	table_shrink(&tree->by_ino);
	pthread_rwlock_unlock(&tree->lock);
	malloc_trim(0);
}

/* ---- what the reference answered ---------------------------------------------------------------------- */

ovl_err_t ovl_tree_adopt(struct ovl_tree *tree, uint64_t parent, const uint8_t *name, size_t len,
			 struct ovl_found *found)
{
	struct node *directory, *node;
	struct entry *entry;
	ovl_err_t err;

	pthread_rwlock_wrlock(&tree->lock);
	err = find_dir(tree, parent, &directory);
	if (err || !directory->u.dir->merged)
		goto out;
	entry = dir_find(directory->u.dir, name, len);
	if (!entry || entry->node)
		goto out;
	if (!found) {
		dir_remove(directory->u.dir, entry);
		goto out;
	}
	err = insert(tree, found, &node);
	if (!err)
		err = name_reserve(node);
	if (!err)
		attach(node, directory, entry);
out:
	if (found)
		ovl_found_clear(&tree->stack, found);
	pthread_rwlock_unlock(&tree->lock);
	return err;
}

struct ovl_tree_names_in {
	struct dir dir;
};

ovl_err_t ovl_tree_adopt_begin(struct ovl_tree_names_in **in)
{
	*in = calloc(1, sizeof(**in));
	return *in ? 0 : -ENOMEM;
}

ovl_err_t ovl_tree_adopt_name(struct ovl_tree_names_in *in, const uint8_t *name, size_t len)
{
	return put_name(&in->dir, name, len, 0, false);
}

ovl_err_t ovl_tree_adopt_end(struct ovl_tree *tree, uint64_t nodeid, struct ovl_tree_names_in *in, bool keep)
{
	struct node *node;
	ovl_err_t err = 0;

	if (keep) {
		pthread_rwlock_wrlock(&tree->lock);
		err = find_dir(tree, nodeid, &node);
		if (!err && !node->u.dir->merged)
			take_names(node->u.dir, &in->dir);
		pthread_rwlock_unlock(&tree->lock);
	}
	dir_clear(&in->dir);
	free(in);
	return err;
}

/* ---- check -------------------------------------------------------------------------------------------- */

static const char *check_dir(const struct ovl_tree *tree, const struct node *node)
{
	const struct dir *dir = node->u.dir;
	uint32_t named = 0, live = 0;
	uint64_t before = 0;

	for (uint32_t i = 0; i < dir->used; i++) {
		const struct entry *entry = &dir->entries[i];

		if (entry->cookie <= before || entry->cookie > dir->next_cookie)
			return "cookies rise";
		before = entry->cookie;
		if (!entry->name && entry->node)
			return "a removed name leads nowhere";
		if (!entry->name)
			continue;
		named++;
		if (dir_find(dir, entry->name, entry->len) != entry)
			return "a name is found by its hash";
		if (!entry->node)
			continue;
		live++;
		if (table_get(&tree->by_nodeid, entry->node->nodeid) != entry->node)
			return "an entry leads to a node in the table";
	}
	if (named != dir->named || live != dir->live)
		return "a directory counts its names";
	return !dir->merged && named > 0 ? "an unmerged directory has no names" : NULL;
}

static const char *check_node(const struct ovl_tree *tree, const struct node *node)
{
	const struct extra *extra = is_dir(node) ? NULL : node->u.extra;

	if (table_get(&tree->by_nodeid, node->nodeid) != node)
		return "a node is found by its nodeid";
	if (node->flags & NODE_INO_OWNER && find_ino(tree, node->ino) != node)
		return "the owner of an ino is found by it";
	if (is_dir(node) != (bool)S_ISDIR(node->attr.mode))
		return "a directory's mode is one";
	if (node->parent && entry_of(node->parent, node->cookie)->node != node)
		return "a name leads back to its node";
	if (!node->parent && extra && extra->used > 0)
		return "further names follow a first";
	for (uint32_t i = 0; extra && i < extra->used; i++)
		if (entry_of(extra->more[i].parent, extra->more[i].cookie)->node != node)
			return "a further name leads back to its node";
	return is_dir(node) ? check_dir(tree, node) : NULL;
}

ovl_err_t ovl_tree_check(struct ovl_tree *tree, const char **what)
{
	size_t names = 0, entries = 0;

	*what = NULL;
	pthread_rwlock_rdlock(&tree->lock);
	for (size_t i = 0; !*what && i <= tree->by_nodeid.mask; i++) {
		const struct node *node = tree->by_nodeid.slots[i];

		if (!node)
			continue;
		*what = check_node(tree, node);
		names += node->parent ? 1 : 0;
		if (is_dir(node))
			entries += node->u.dir->live;
		else if (node->u.extra)
			names += node->u.extra->used;
	}
	if (!*what && names != entries)
		*what = "there are as many names as entries that lead to nodes";
	pthread_rwlock_unlock(&tree->lock);
	return *what ? -EUCLEAN : 0;
}
