/*
 * tree.h - what is known of the mounted tree right now
 *
 * Problem.  The kernel asks for inodes by number and for names in directories, thousands of times a second, and most
 * answers were given before.  `struct ovl_tree` keeps every inode and every name that the mount has looked at, so that
 * known things are answered from memory, by any thread, without the interpreter.  It is ovlfs/layer/tree.py (Tree) in
 * C; the rules are stated there, tests/model runs both against each other.
 *
 *      nodeid table            node "etc"                     its directory (once merged)
 *      +-----------+          +--------------------+         +----+-----------+--------+------+
 *      | 0x8000..3 |--------->| nodeid, ino, attr  |         | #1 | "hosts"   | cookie | node-+--> node, or NULL: not
 *      |    ...    |          | nlookup            |         | #2 | "motd"    |        | NULL |    looked up, or dropped
 *      +-----------+          | parent, cookie ----+--> "/"  | #3 | (removed) |        |      |
 *      ino table              | upper, lower       |         +----+-----------+--------+------+
 *      (only those with       | dir ---------------+-------> entries in the order of their cookies
 *      nodeid != ino)         +--------------------+         hash index: name -> entry
 *
 * Invariants (ovl_tree_check() tests them):
 *   - a node is in the nodeid table; of all nodes with one ino, one at most owns it: lookups of that ino find it;
 *   - a node has as many names as entries point at it; a directory has one at most;
 *   - dir.live counts the entries that point at nodes, and a directory with live entries is never dropped;
 *   - entries are sorted by cookie, and a cookie is never used twice in one directory.
 *
 * Complexity: lookup of a known name, get, ref: O(1); merging a directory: linear in the names of all its layers;
 * list: O(log n) to find the cookie, then linear in what is listed.
 *
 * Memory: about 170 bytes per file of a tar layer and 250 per file of a directory layer, names and tables included;
 * see native/README.md.
 *
 * Concurrency: one rwlock per tree, taken inside and never held when a function returns or calls `emit` of a binding
 * that could run Python: emit functions must be pure C.  For reading: get, ref, path, names, known names of lookup
 * and list.  For writing: all that merges, resolves or changes.  Resolving reads the disk with the lock held.  There
 * is no second lock.  Writers are preferred, so a thread must not take it twice.
 *
 * OVL_ASK, OVL_ASK_NAMES: the reference has to decide (see merge.h); `ask` says about what.  Nothing has changed.  The
 * caller tells the answer with ovl_tree_adopt*(), and calls again.
 */
#ifndef OVL_TREE_H
#define OVL_TREE_H

#include "merge.h"

#define OVL_ASK_NAMES 2 /* which names does directory ask.nodeid have? (OVL_ASK: what is ask.name in ask.nodeid?) */

#define OVL_ROOT_NODEID 1u
#define OVL_FRESH_NODEID (1ull << 62)

struct ovl_tree;

struct ovl_ask {
	uint64_t nodeid;
	size_t name_len;
	uint8_t name[OVL_NAME_MAX + 1];
};

/* What most requests want to know of an inode. */
struct ovl_entry {
	uint64_t nodeid; /* 0: there is no such name */
	uint64_t ino;
	struct ovl_attr attr;
};

/* Takes ownership of stack->layers (malloc) and of `root` on success; the stack is copied.  What the layers borrow
 * (index images, descriptors) must outlive the tree. */
ovl_err_t ovl_tree_new(const struct ovl_stack *stack, struct ovl_found *root, struct ovl_tree **out);
void ovl_tree_free(struct ovl_tree *tree); /* NULL-safe */

/* The stack, for making sources.  Only with ovl_tree_adopt*() in mind: its device numbers can grow. */
const struct ovl_stack *ovl_tree_stack(const struct ovl_tree *tree);
/* A file system's number; known ones stay.  -ENOSPC: too many, those of the rest are asked for each time. */
ovl_err_t ovl_tree_add_device(struct ovl_tree *tree, uint64_t device, uint64_t number);

/* ---- reading ------------------------------------------------------------------------------------------ */

/* -ESTALE: not, or no longer, known.  So do all functions that take a nodeid. */
ovl_err_t ovl_tree_get(struct ovl_tree *tree, uint64_t nodeid, struct ovl_entry *out);

/* How to look: a sum of these. */
#define OVL_COUNT 1u /* the kernel is told of what is given: a ref in the same moment */
#define OVL_KNOWN 2u /* ask no layer: OVL_ASK (and nothing in `ask`) where one would have to be asked */

/* -ENOTDIR; the layers' errors; OVL_ASK*. */
ovl_err_t ovl_tree_lookup(struct ovl_tree *tree, uint64_t parent, const uint8_t *name, size_t len, unsigned how,
			  struct ovl_entry *out, struct ovl_ask *ask);

/* Gives up to `most` names with a cookie above `after`, in the order of their cookies, or until `emit` returns false (it
 * has no room for this one).  `emit` runs under the lock: pure C, no call of the tree.  When OVL_ASK or an error is returned, what was given
 * stands; go on after the last cookie. */
typedef bool (*ovl_tree_emit)(void *arg, uint64_t cookie, const uint8_t *name, size_t len,
			      const struct ovl_entry *entry);
ovl_err_t ovl_tree_list(struct ovl_tree *tree, uint64_t nodeid, uint64_t after, size_t most, ovl_tree_emit emit,
			void *arg, struct ovl_ask *ask);
ovl_err_t ovl_tree_list_how(struct ovl_tree *tree, uint64_t nodeid, uint64_t after, size_t most, unsigned how,
			    ovl_tree_emit emit, void *arg, struct ovl_ask *ask);

/* The directory that a directory is in; itself, if it is the root or has no name any more. */
ovl_err_t ovl_tree_parent(struct ovl_tree *tree, uint64_t nodeid, struct ovl_entry *out);

/* The target of a symlink that a tar layer serves: borrowed from the layer, not terminated.  OVL_ASK: another layer's;
 * -EINVAL: no symlink. */
ovl_err_t ovl_tree_readlink(struct ovl_tree *tree, uint64_t nodeid, const uint8_t **target, size_t *len);

/* A path from the root, terminated; the caller frees it.  -ENOENT: it has no name any more. */
ovl_err_t ovl_tree_path(struct ovl_tree *tree, uint64_t nodeid, uint8_t **path, size_t *len);

/* All names of an inode; the array is the caller's, to be released with free(). */
struct ovl_tree_name {
	uint64_t parent;
	size_t len;
	uint8_t name[OVL_NAME_MAX + 1];
};
ovl_err_t ovl_tree_names(struct ovl_tree *tree, uint64_t nodeid, struct ovl_tree_name **names, size_t *count);

/* Everything of one inode, copied. */
struct ovl_source_copy {
	uint32_t layer;
	int64_t number;
	uint8_t *path; /* NULL: `number` counts */
	size_t path_len;
};

struct ovl_description {
	struct ovl_entry entry;
	uint64_t nlookup;
	uint64_t upper_ino;
	bool upper, metacopy, redirect, is_linked;
	bool has_lower;     /* there is something below the upperdir */
	size_t name_count;  /* names that are known */
	struct ovl_source_copy *lower;
	size_t lower_count;
};
/* `whole`: with the sources below, and, as ovl_tree_get, with what the size and times of a file that is open for writing
 * are now; else the caller looks at the file itself, or needs neither. */
ovl_err_t ovl_tree_describe(struct ovl_tree *tree, uint64_t nodeid, bool whole, struct ovl_description *out);
void ovl_description_clear(struct ovl_description *description);

size_t ovl_tree_count(struct ovl_tree *tree);
/* What is kept: inodes, directories that were merged, and the names in those.  Linear in the inodes. */
struct ovl_tree_counts {
	size_t inodes, merged, names;
};
void ovl_tree_counts(struct ovl_tree *tree, struct ovl_tree_counts *out);
/* All nodeids; the array is the caller's. */
ovl_err_t ovl_tree_nodeids(struct ovl_tree *tree, uint64_t **nodeids, size_t *count);

/* ---- mutations: the disk is changed already ----------------------------------------------------------- */

/* A new object in the upperdir.  -EEXIST: the name is there. */
ovl_err_t ovl_tree_add(struct ovl_tree *tree, uint64_t parent, const uint8_t *name, size_t len,
		       const struct ovl_attr *attr, uint64_t upper_ino, uint64_t ino, uint64_t *nodeid,
		       struct ovl_ask *ask);
/* -EEXIST; -EPERM: a directory. */
ovl_err_t ovl_tree_link(struct ovl_tree *tree, uint64_t nodeid, uint64_t parent, const uint8_t *name, size_t len,
			struct ovl_ask *ask);
/* OVL_ABSENT: there is no such name. */
ovl_err_t ovl_tree_remove(struct ovl_tree *tree, uint64_t parent, const uint8_t *name, size_t len, struct ovl_ask *ask);
/* -ESTALE: no such name; -EINVAL: a directory into itself. */
ovl_err_t ovl_tree_move(struct ovl_tree *tree, uint64_t parent, const uint8_t *name, size_t len, uint64_t new_parent,
			const uint8_t *new_name, size_t new_len, struct ovl_ask *ask);
ovl_err_t ovl_tree_exchange(struct ovl_tree *tree, uint64_t parent, const uint8_t *name, size_t len,
			    uint64_t new_parent, const uint8_t *new_name, size_t new_len, struct ovl_ask *ask);
ovl_err_t ovl_tree_set_upper(struct ovl_tree *tree, uint64_t nodeid, uint64_t upper_ino, bool metacopy);
ovl_err_t ovl_tree_set_redirect(struct ovl_tree *tree, uint64_t nodeid);
/* -EINVAL: the attributes of a directory for something else, or the other way round. */
ovl_err_t ovl_tree_set_attr(struct ovl_tree *tree, uint64_t nodeid, const struct ovl_attr *attr);
ovl_err_t ovl_tree_ref(struct ovl_tree *tree, uint64_t nodeid);
/* `*gone`: the inode is known no longer, or never was. */
void ovl_tree_forget(struct ovl_tree *tree, uint64_t nodeid, uint64_t nlookup, bool *gone);
/* The same, but what has to be closed, which may take seconds, is added to `*later`: the caller's, for ovl_tree_close. */
struct kept;
void ovl_tree_forget_later(struct ovl_tree *tree, uint64_t nodeid, uint64_t nlookup, struct kept **later);
void ovl_tree_close(struct kept *later);
uint64_t ovl_tree_bytes(const struct kept *later); /* how much data goes with it */

/* Gives memory back to the system after much was forgotten.  May take milliseconds. */
void ovl_tree_trim(struct ovl_tree *tree);

/* ---- objects without a name; files that are open for writing (tree_data.c) ------------------------------ */

/* The inode's upper object has no name any more: `fd` (O_PATH) leads to it, and is the tree's from now on.  -ESTALE: it
 * is known no longer; `fd` is closed. */
ovl_err_t ovl_tree_set_orphan(struct ovl_tree *tree, uint64_t nodeid, int fd);
/* -1: there is none.  Borrowed; valid as long as the inode is known. */
int ovl_tree_orphan(struct ovl_tree *tree, uint64_t nodeid);

/* The directory where the inode's last name was; 0: none was noted. */
ovl_err_t ovl_tree_set_last_parent(struct ovl_tree *tree, uint64_t nodeid, uint64_t parent);
uint64_t ovl_tree_last_parent(struct ovl_tree *tree, uint64_t nodeid);

/* From now on the inode's size and times are those of `fd` (an upper file that somebody writes to without telling us);
 * `fd` -1: no longer, and what they are now is kept.  Borrowed until then. */
ovl_err_t ovl_tree_set_live(struct ovl_tree *tree, uint64_t nodeid, int fd);

/* Where a regular file's data is. */
struct ovl_data {
	enum { OVL_DATA_FILE, OVL_DATA_TAR } kind;
	bool upper;  /* FILE: it is the upperdir's, and may be written to */
	int fd;      /* FILE: open, the caller's */
	uint64_t size; /* of a lower file: what there has to be */
	const struct ovl_layer *layer; /* TAR */
	uint32_t ref;                  /* TAR */
};
/* Opens it; `flags` for an upper file.  -EISDIR, -ENXIO: no regular file; OVL_ASK: the reference has to. */
ovl_err_t ovl_tree_open_data(struct ovl_tree *tree, uint64_t nodeid, int flags, struct ovl_data *out);

/* The object that has an inode's xattrs and symlink target: FILE with an O_PATH descriptor that is the caller's, or TAR.
 * Copy_up.metadata_source() is the reference.  OVL_ASK. */
ovl_err_t ovl_tree_open_meta(struct ovl_tree *tree, uint64_t nodeid, struct ovl_data *out);

/* Is the inode's data in the upperdir?  False too for what is not known. */
bool ovl_tree_has_upper_data(struct ovl_tree *tree, uint64_t nodeid);

/* Is it time to give the data of a file below the upperdir to the page cache: at most `most` bytes?  True once for each
 * inode that the kernel knows. */
bool ovl_tree_fill(struct ovl_tree *tree, uint64_t nodeid, size_t most, size_t *size);

/* Opens an inode's object in the upperdir (O_PATH or a directory); a new descriptor or -errno; -ENOENT: it has no name,
 * -EROFS: it has none. */
int ovl_tree_open_upper(struct ovl_tree *tree, uint64_t nodeid, int flags);

/* The absolute path under which the layers below know an inode (namei.py: redirect_of()), not terminated; the caller frees
 * it.  OVL_ASK: an ancestor was moved, or it is too long. */
ovl_err_t ovl_tree_redirect(struct ovl_tree *tree, uint64_t nodeid, uint8_t **path, size_t *len);

/* Would the layers below the upperdir show `name` in this directory?  0: yes; OVL_ABSENT: no; OVL_ASK. */
ovl_err_t ovl_tree_below(struct ovl_tree *tree, uint64_t parent, const uint8_t *name, size_t len);

/* ---- what the reference answered ---------------------------------------------------------------------- */

/* `found` NULL: there is no such name.  Takes ownership of `found` in any case.  A name that is gone or known by now is
 * left alone. */
ovl_err_t ovl_tree_adopt(struct ovl_tree *tree, uint64_t parent, const uint8_t *name, size_t len,
			 struct ovl_found *found);
/* Called once per name between begin and end; a directory that is merged by now is left alone. */
struct ovl_tree_names_in;
ovl_err_t ovl_tree_adopt_begin(struct ovl_tree_names_in **in);
ovl_err_t ovl_tree_adopt_name(struct ovl_tree_names_in *in, const uint8_t *name, size_t len);
ovl_err_t ovl_tree_adopt_end(struct ovl_tree *tree, uint64_t nodeid, struct ovl_tree_names_in *in, bool keep);

/* Who is told of each directory that is merged, or NULL: called with the lock held, by whoever needed the names.
 * `layers`: from which (the first OVL_TOLD_LAYERS of them); `ns`: CLOCK_MONOTONIC when it began. */
#define OVL_TOLD_LAYERS 120u
typedef void (*ovl_tree_told)(void *arg, uint64_t nodeid, size_t names, const uint16_t *layers, size_t count,
			      uint64_t ns);
void ovl_tree_tell_merged(struct ovl_tree *tree, ovl_tree_told told, void *arg);

/* The layer that serves an inode (0: the upperdir); -1: it is not known, or nothing does. */
int ovl_tree_layer(struct ovl_tree *tree, uint64_t nodeid);

/* For tests: 0, or -EUCLEAN and one line about the first invariant that does not hold. */
ovl_err_t ovl_tree_check(struct ovl_tree *tree, const char **what);

#endif
