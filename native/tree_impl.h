/*
 * tree_impl.h - the live tree from inside, for tree.c (names) and tree_data.c (data); see tree.h
 */
#ifndef OVL_TREE_IMPL_H
#define OVL_TREE_IMPL_H

#include <pthread.h>

#include "tree.h"

#define COOKIE_BITS 40
#define COOKIE_MAX ((1ull << COOKIE_BITS) - 1)
#define LAYERS_MAX 4095u /* what node.layer holds; an image has 1024 at most */
/* Below this many names a directory is searched without an index. */
#define INDEX_FROM 9u
/* How many names one turn of list resolves while others wait for the lock. */
#define LIST_TURN 256u
#define FROM_MAX 15u
/* So many directories stay open in the layers, each with no more sources than this. */
#define OPENED_MAX 16u
#define OPENED_SOURCES_MAX 8u

/* ---- structures --------------------------------------------------------------------------------------- */

/* A name in a directory.  `name` NULL: it was removed. */
struct entry {
	const uint8_t *name; /* owned: the bytes of a blob; otherwise borrowed from a layer's index */
	struct node *node;   /* NULL: not resolved, or dropped */
	uint64_t cookie : COOKIE_BITS;
	uint64_t len : 8;
	uint64_t owned : 1;
	uint64_t tag : 11; /* of the name's hash */
	uint64_t from : 4; /* the layers below the upperdir show the name, but none above this source; 0: not known */
};
static_assert(sizeof(struct entry) == 24, "one per name: mind the size");

struct dir {
	struct ovl_source *lower; /* below the upperdir, top first */
	struct entry *entries;    /* sorted by cookie, removed ones in between */
	uint32_t *index;          /* entry number + 1 by hash; NULL: few entries */
	uint64_t next_cookie;
	uint32_t lower_count;
	uint32_t index_mask;
	uint32_t used; /* entries, removed ones included */
	uint32_t room;
	uint32_t named; /* entries that are not removed */
	uint32_t live;  /* entries that point at a node */
	struct kept *kept; /* owned, or NULL */
	bool merged;
};

/* One more name of a node. */
struct place {
	struct node *parent;
	uint64_t cookie;
};

/* What few inodes have: an upper object that has lost its last name; the directory where that was; a descriptor of an
 * upper file that is open for writing. */
struct kept {
	int orphan;           /* O_PATH, owned; -1: none */
	int live;             /* borrowed from who has set it (NODE_LIVE) */
	uint64_t last_parent; /* nodeid; 0: none */
	struct kept *next;    /* once its node is dropped: in tree->dropped */
	uint64_t bytes;       /* then: of the data that goes with it */
};

/* What few nodes have: a source for the data apart from that for the metadata, more than one name. */
struct extra {
	struct ovl_source data;
	struct kept *kept; /* owned, or NULL */
	bool has_data;
	uint32_t used;
	uint32_t room;
	struct place more[];
};

enum {
	NODE_DIR = 1,
	NODE_UPPER = 2,
	NODE_METACOPY = 4,
	NODE_REDIRECT = 8,
	NODE_LOWER = 16,    /* no directory: there is a source in layer, ref, name */
	NODE_INO_OWNER = 32, /* lookups of the ino find this one */
	NODE_KEPT = 64,     /* there is a struct kept */
	NODE_LIVE = 128,    /* size and times are those of the file behind kept->live */
	NODE_FILLED = 256,  /* ovl_tree_fill() has said so */
	NODE_FLAGS = 0xfff, /* the bits that there are */
};

struct node {
	uint64_t nodeid;
	uint64_t ino;
	struct ovl_attr attr;
	uint64_t upper_ino;
	uint64_t nlookup;    /* atomic: readers count too */
	struct node *parent; /* of the first name; NULL: it has none */
	uint64_t cookie : COOKIE_BITS; /* of the first name */
	uint64_t layer : 12;
	uint64_t flags : 12;
	union {
		struct dir *dir;     /* directories: always there */
		struct extra *extra; /* others: or NULL */
	} u;
	union {
		int64_t number;
		struct ovl_path *path;
	} ref;
	struct ovl_blob *name;
};
static_assert(sizeof(struct node) == 136, "one per inode, and malloc rounds 8 bytes more up to 144");

/* Nodes by nodeid or by ino: open addressing, linear probing, no tombstones. */
struct table {
	struct node **slots;
	size_t mask;
	size_t count;
	bool by_ino;
};

/* A directory whose sources are open: names are looked up in the same one again and again. */
struct opened {
	struct node *node; /* NULL: unused */
	struct ovl_merge merge;
	uint8_t *path; /* owned; what merge.path is */
	uint64_t used; /* by the tree's clock */
};

struct ovl_tree {
	pthread_rwlock_t lock; /* protects everything below */
	struct ovl_stack stack;
	struct table by_nodeid;
	struct table by_ino; /* the owners whose nodeid is not their ino */
	struct node *root;
	uint64_t fresh;
	struct opened opened[OPENED_MAX]; /* for who holds the lock for writing */
	uint64_t clock;
	ovl_tree_told told; /* or NULL */
	void *told_arg;
	struct kept *dropped; /* owned; orphans that are closed when the lock is given back */
};

/* The lock is held. */

/* -ESTALE: not, or no longer, known. */
ovl_err_t ovl_tree_find(const struct ovl_tree *tree, uint64_t nodeid, struct node **out);

/* The path of a node, terminated; the caller frees it.  -ENOENT: there is none (any more). */
ovl_err_t ovl_node_path(const struct ovl_tree *tree, const struct node *node, uint8_t **path, size_t *len);

/* The source that a node, no directory, keeps in its fields; borrowed. */
struct ovl_source ovl_node_source(const struct node *node);

/* Makes sure of `extra`, with room for one more name. */
ovl_err_t ovl_node_reserve_extra(struct node *node);

/* What an inode keeps, or NULL; and the same made, NULL: no memory. */
struct kept *ovl_node_kept(const struct node *node);
struct kept *ovl_node_keep(struct node *node);
void ovl_node_drop_kept(struct node *node);

/* Size and times of a file that is open for writing, from the file. */
void ovl_node_read_live(const struct node *node, struct ovl_attr *attr);

#endif
