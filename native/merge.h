/*
 * merge.h - which objects of which layers make up one name of the merged tree
 *
 * Problem.  A stack of layers is shown as one tree.  Layers are asked from the top down: a whiteout ends the search, a
 * non-directory wins and ends it, a directory merges with the directories below it until one is opaque.  This is
 * ovlfs/layer/merge.py without the interpreter and without the rare cases; tests/model holds the two equal.
 *
 *      sources of a merged directory            lookup "motd"                    names
 *
 *      0  upperdir   etc/            ---------> nothing                          hosts
 *      1  TAR        inode 17        ---------> whiteout: stop, absent           (motd hidden from here down)
 *      2  DIR        rootfs/etc      -- - - ->  motd, not seen                   passwd
 *
 * What it does not decide: a redirect or a metacopy on the way, a hard link to a layer below, an upper object with an
 * origin, a layer that is neither tar nor directory, a file system it has no number for.  It says OVL_ASK then, and
 * the caller lets the reference decide (ovlfs/layer/tree.py: resolve_name()).
 *
 * Concurrency: `struct ovl_stack` is immutable but for the device numbers.  Reference counts of paths and blobs are
 * plain integers: whoever changes them holds the tree's lock for writing (tree.h).
 *
 * Kernel: fs/overlayfs/namei.c: ovl_lookup(), ovl_lookup_single(); readdir.c: ovl_dir_read_merged().
 */
#ifndef OVL_MERGE_H
#define OVL_MERGE_H

#include "dirlayer.h"
#include "index.h"

/* Bytes with a reference count: a name that a directory and an object of a layer share. */
struct ovl_blob {
	uint32_t refs;
	uint32_t len;
	uint8_t bytes[];
};

struct ovl_blob *ovl_blob_new(const void *bytes, size_t len); /* NULL: no memory.  The caller owns one reference */
struct ovl_blob *ovl_blob_ref(struct ovl_blob *blob);
void ovl_blob_unref(struct ovl_blob *blob); /* NULL-safe */

/* A directory of a directory layer: a name below another one, NULL being the layer's root.  (A path that came from
 * Python stands as one "name" with slashes in it.) */
struct ovl_path {
	uint32_t refs;
	uint32_t len;
	struct ovl_path *parent; /* owns a reference; NULL: below the root */
	uint8_t bytes[];
};

struct ovl_path *ovl_path_new(struct ovl_path *parent, const void *bytes, size_t len); /* takes a reference of parent */
struct ovl_path *ovl_path_ref(struct ovl_path *path); /* NULL-safe */
void ovl_path_unref(struct ovl_path *path);           /* NULL-safe */

/* One inode of one layer.
 *
 *      TAR       number: the ordinal in the index
 *      DIR       path, and name if it is no directory (path/name)
 *      FOREIGN   number, or the bytes in name
 */
struct ovl_source {
	uint32_t layer;
	uint32_t reserved;
	union {
		int64_t number;
		struct ovl_path *path; /* owns a reference; NULL: the root */
	} ref;
	struct ovl_blob *name; /* owns a reference, or NULL */
};
static_assert(sizeof(struct ovl_source) == 24, "a merged directory keeps one of these per layer");

enum ovl_layer_kind {
	OVL_LAYER_NONE,    /* no upperdir */
	OVL_LAYER_TAR,     /* answered from an index */
	OVL_LAYER_DIR,     /* answered from disk */
	OVL_LAYER_FOREIGN, /* only the reference can ask it */
};

struct ovl_layer {
	enum ovl_layer_kind kind;
	uint64_t ino_base;             /* TAR: st_ino of inode 0 */
	const struct ovl_index *index; /* TAR: borrowed */
	int data_fd;                   /* TAR: borrowed; the file that the tar lies in */
	uint64_t data_offset;          /* TAR: where it begins there */
	/* TAR: the file as it was when its content was verified; see ovl_layer_is_same */
	uint64_t data_dev, data_ino, data_size;
	int64_t data_mtime_ns;
	struct ovl_dirlayer dir;       /* DIR */
};

/* Has nobody changed the file that a tar lies in, since it was verified?  False: the reference decides (it may have been
 * touched only). */
bool ovl_layer_is_same(const struct ovl_layer *layer);

/* The number of a file system in the high bits of st_ino (ovlfs/layer/directory.py: InoMap). */
struct ovl_device {
	uint64_t device;
	uint64_t number;
};

#define OVL_DEVICES_MAX 64u

struct ovl_stack {
	struct ovl_layer *layers; /* 0: the upperdir or NONE, then from the top down */
	size_t count;
	uint64_t upper_device; /* number of the upperdir's file system */
	size_t device_count;
	struct ovl_device devices[OVL_DEVICES_MAX];
};

void ovl_source_clear(const struct ovl_stack *stack, struct ovl_source *source);

/* The path of a DIR source in its layer.  `*path` is the caller's, to be released with free(). */
ovl_err_t ovl_source_path(const struct ovl_source *source, uint8_t **path, size_t *len);

/* The st_ino to show for inode `number` of a file system.  OVL_ASK: its number is not known here. */
ovl_err_t ovl_stack_ino(const struct ovl_stack *stack, uint64_t device, uint64_t number, uint64_t *ino);
uint64_t ovl_ino_of(uint64_t device_number, uint64_t number);

/* One merged directory, while names in it are looked up: keeps what it opened until ovl_merge_close. */
struct ovl_merge {
	const struct ovl_stack *stack;
	const struct ovl_source *sources; /* borrowed: below the upperdir, top first */
	size_t count;
	bool upper; /* the upperdir has it, at `path` */
	const uint8_t *path; /* borrowed */
	size_t path_len;
	int *fds; /* of the upperdir and of each source; -1: not open yet */
	bool readable; /* those that are open were opened for reading */
	int few[8];
};

ovl_err_t ovl_merge_open(struct ovl_merge *merge, const struct ovl_stack *stack, const struct ovl_source *sources,
			 size_t count, bool upper, const uint8_t *path, size_t path_len);
void ovl_merge_close(struct ovl_merge *merge); /* also after a failed open */

/* What a name is: what ovlfs.layer.tree.Inode says of it. */
struct ovl_found {
	uint64_t ino;
	uint64_t upper_ino;
	struct ovl_attr attr;
	bool upper;
	bool metacopy;
	bool redirect;
	struct ovl_source *lower; /* owned */
	size_t lower_count;
	struct ovl_source one; /* where `lower` points if it is one only */
};

void ovl_found_clear(const struct ovl_stack *stack, struct ovl_found *found);

/* Looks `name` up.  `from`: no source between the upperdir and this one has it; 0: not known.  `shared` (may be NULL) is the
 * name as a blob, to be referred to instead of copied.  OVL_ABSENT: the merged tree has no such name.  OVL_ASK.  Otherwise
 * `*out` is the caller's, to be cleared. */
ovl_err_t ovl_merge_lookup(struct ovl_merge *merge, const uint8_t *name, size_t len, size_t from,
			   struct ovl_blob *shared, struct ovl_found *out);

/* Gives the names that the directory lists, those of upper layers first; a name can come more than once, the first
 * counts: it is in source `from`, and in none above.  `borrowed`: it lives as long as the layer, otherwise only during the
 * call.  OVL_ASK: before any. */
typedef ovl_err_t (*ovl_merge_emit)(void *arg, const uint8_t *name, size_t len, size_t from, bool borrowed);
ovl_err_t ovl_merge_names(struct ovl_merge *merge, ovl_merge_emit emit, void *arg);

/* SipHash-1-3 with a key that is made once per process: a layer cannot choose names that collide. */
uint64_t ovl_hash(const void *bytes, size_t len);

#endif
