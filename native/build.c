/*
 * build.c - what the entries of a layer tar come to, taken together
 *
 * Problem.  A layer is a set of changes, written as a list.  The law (OCI image-spec layer.md) reads: whiteouts
 * first, whatever their place in the list, and they hide only what is below; then the entries in order, where a
 * directory over a directory replaces its attributes and keeps its children, and everything else is removed and
 * made anew.  The builder applies entry after entry to a small tree in memory:
 *
 *      hash (parent, name) --> dentry { what, WHITED } --> inode { attributes, OPAQUE, IMPLIED }
 *
 *      .wh.x            WHITED on dentry x, whether or not x is here, now or later
 *      .wh..wh..opq     OPAQUE on the directory
 *      a/b without a/   a is a directory that is IMPLIED
 *
 * and at the end one walk, breadth first, writes what can be reached from the root:
 *
 *      nothing here, WHITED      a whiteout (dropped where nothing from below can show: opaque directories)
 *      directory, WHITED         opaque: below is gone, what the layer put there is not
 *      anything else, WHITED     just that: it hides what is below anyway
 *
 * A directory that replaces a non-directory of its own layer is opaque too: that non-directory had replaced
 * whatever is below.
 *
 * Invariants.  A dentry is never freed, only emptied (what == EMPTY), so a path that changes its type a thousand
 * times has one dentry; a removed directory costs nothing, its subtree is simply never reached again.  Dentries
 * keep inodes alive, so a hard link outlives the name that it was made from.  Indexes, never pointers, are kept:
 * the arrays move when they grow.
 *
 * Symlinked parents are followed within the layer only, from its root, as chroot would.  A link that leads to what
 * this layer does not have makes implied directories there, which merge with those below.
 *
 * Complexity: one hash probe per component of a path, none for the parent if it is the previous entry's.  The hash
 * is keyed (SipHash-1-3), so chosen names cannot collide.  Nothing recurses.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* qsort_r */
#endif

#include "build.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <time.h>

#include "tarscan.h"

#define EMPTY 0xffu    /* enum ovl_what of a dentry that names nothing (any more) */
#define WHITED 1u      /* dentry flag: `.wh.NAME` is in this layer */
#define HIDDEN 2u      /* dentry flag: aufs housekeeping, there for hard links only */
#define NOWHERE UINT32_MAX

/* Longest text of a path that is still to be walked: what remains of it, behind a symlink's target. */
#define WALK_MAX (4u * OVL_TAR_PATH_MAX)

struct build_inode {
	uint64_t size;
	uint64_t data;
	int64_t mtime_sec;
	uint32_t mtime_nsec;
	uint32_t mode;
	uint32_t uid;
	uint32_t gid;
	uint32_t flags;
	uint32_t xattr;  /* offset in xattrs + 1 */
	uint32_t parent; /* directories: inode; the root is its own */
	uint32_t depth;  /* directories */
	uint32_t dentry; /* directories: the name; others, while writing: the last name written */
	uint32_t ref;    /* while writing: number in the image */
	uint32_t nlink;  /* while writing */
	uint32_t first;  /* while writing: first dentry in the image */
};

struct build_dentry {
	uint32_t hash;
	uint32_t name;
	uint32_t parent;
	uint32_t ref; /* inode, or link */
	uint8_t name_len;
	uint8_t what;
	uint8_t flags;
};

struct build_link {
	uint32_t target;
	uint32_t target_len;
	uint32_t forward; /* inode, or NOWHERE */
};

/* A growing array; `size` is that of one record. */
struct array {
	void *at;
	size_t count;
	size_t room;
};

struct ovl_build {
	bool whiteouts;
	uint64_t memory;
	uint64_t memory_max;
	uint64_t key[2];
	struct array inodes;   /* struct build_inode */
	struct array dentries; /* struct build_dentry */
	struct array links;    /* struct build_link */
	struct array extents;  /* struct ovl_disk_extent */
	struct array heap;     /* bytes: names, targets */
	struct array xattrs;   /* bytes: blocks as on disk */
	uint32_t *slots;       /* hash table: dentry + 1 */
	size_t slot_count;     /* a power of two */
	const char *rule;      /* why the last -EBADMSG */
	/* The parent directory of the entry before, and its inode; cached_len is SIZE_MAX if not valid. */
	uint8_t cached[OVL_TAR_PATH_MAX];
	size_t cached_len;
	uint32_t cached_dir;
	uint8_t norm[OVL_TAR_PATH_MAX];
	uint8_t link_norm[OVL_TAR_PATH_MAX];
	uint8_t walk[WALK_MAX];
	uint8_t target[2u * WALK_MAX];
};

static ovl_err_t breaks(struct ovl_build *b, const char *rule)
{
	b->rule = rule;
	return -EBADMSG;
}

/* ---- memory ------------------------------------------------------------------------------------------- */

/* Room for `more` records of `size` bytes.  Counts stay below 2^32 - 1: numbers of records are stored in 32 bits. */
static ovl_err_t reserve(struct ovl_build *b, struct array *array, size_t more, size_t size)
{
	size_t room = array->room;
	void *at;

	if (more > (size_t)UINT32_MAX - 1 - array->count)
		return breaks(b, "a layer's index must fit the memory limit");
	if (array->count + more <= room)
		return 0;
	room = room + room / 2 + 64;
	if (room < array->count + more)
		room = array->count + more;
	if ((room - array->room) > (b->memory_max - b->memory) / size)
		return breaks(b, "a layer's index must fit the memory limit");
	at = realloc(array->at, room * size);
	if (!at)
		return -ENOMEM;
	b->memory += (uint64_t)(room - array->room) * size;
	array->at = at;
	array->room = room;
	return 0;
}

static void release(struct ovl_build *b, struct array *array, size_t size)
{
	free(array->at);
	b->memory -= (uint64_t)array->room * size;
	*array = (struct array){0};
}

static struct build_inode *inode_at(const struct ovl_build *b, uint32_t ino)
{
	return (struct build_inode *)b->inodes.at + ino;
}

static struct build_dentry *dentry_at(const struct ovl_build *b, uint32_t at)
{
	return (struct build_dentry *)b->dentries.at + at;
}

static struct build_link *link_at(const struct ovl_build *b, uint32_t at)
{
	return (struct build_link *)b->links.at + at;
}

static const uint8_t *heap_at(const struct ovl_build *b, uint64_t at)
{
	return (const uint8_t *)b->heap.at + at;
}

static ovl_err_t append(struct ovl_build *b, struct array *array, const void *bytes, size_t len, uint32_t *at)
{
	ovl_err_t err = reserve(b, array, len, 1);

	if (err)
		return err;
	*at = (uint32_t)array->count;
	if (len > 0)
		memcpy((uint8_t *)array->at + array->count, bytes, len);
	array->count += len;
	return 0;
}

/* ---- names -> dentries -------------------------------------------------------------------------------- */

#define SIP_ROTL(x, r) (((x) << (r)) | ((x) >> (64 - (r))))
#define SIP_ROUND(v0, v1, v2, v3)                                                                                     \
	do {                                                                                                          \
		v0 += v1, v1 = SIP_ROTL(v1, 13) ^ v0, v0 = SIP_ROTL(v0, 32);                                          \
		v2 += v3, v3 = SIP_ROTL(v3, 16) ^ v2;                                                                 \
		v0 += v3, v3 = SIP_ROTL(v3, 21) ^ v0;                                                                 \
		v2 += v1, v1 = SIP_ROTL(v1, 17) ^ v2, v2 = SIP_ROTL(v2, 32);                                          \
	} while (0)

/* SipHash-1-3 of the parent's number and the name. */
static uint32_t hash_name(const struct ovl_build *b, uint32_t parent, const uint8_t *name, size_t len)
{
	uint64_t v0 = b->key[0] ^ 0x736f6d6570736575ull;
	uint64_t v1 = b->key[1] ^ 0x646f72616e646f6dull;
	uint64_t v2 = b->key[0] ^ 0x6c7967656e657261ull;
	uint64_t v3 = b->key[1] ^ 0x7465646279746573ull;
	uint64_t word = parent;
	uint64_t tail = (uint64_t)len << 56;

	for (;;) {
		v3 ^= word;
		SIP_ROUND(v0, v1, v2, v3);
		v0 ^= word;
		if (len < 8)
			break;
		memcpy(&word, name, 8);
		name += 8;
		len -= 8;
	}
	word = 0;
	memcpy(&word, name, len);
	word |= tail;
	v3 ^= word;
	SIP_ROUND(v0, v1, v2, v3);
	v0 ^= word;
	v2 ^= 0xff;
	SIP_ROUND(v0, v1, v2, v3);
	SIP_ROUND(v0, v1, v2, v3);
	SIP_ROUND(v0, v1, v2, v3);
	return (uint32_t)(v0 ^ v1 ^ v2 ^ v3);
}

/* The dentry of that name, EMPTY ones included; or NOWHERE, and `*slot` is where it would go. */
static uint32_t find_slot(const struct ovl_build *b, uint32_t parent, const uint8_t *name, size_t len, uint32_t hash,
			  size_t *slot)
{
	size_t mask = b->slot_count - 1;
	size_t i;

	for (i = hash & mask; b->slots[i] != 0; i = (i + 1) & mask) {
		const struct build_dentry *dentry = dentry_at(b, b->slots[i] - 1);

		if (dentry->hash == hash && dentry->parent == parent && dentry->name_len == len &&
		    memcmp(heap_at(b, dentry->name), name, len) == 0)
			return b->slots[i] - 1;
	}
	*slot = i;
	return NOWHERE;
}

/* The live dentry of that name, or NOWHERE. */
static uint32_t find(const struct ovl_build *b, uint32_t parent, const uint8_t *name, size_t len)
{
	size_t slot;
	uint32_t at = find_slot(b, parent, name, len, hash_name(b, parent, name, len), &slot);

	return at != NOWHERE && dentry_at(b, at)->what == EMPTY ? NOWHERE : at;
}

static ovl_err_t grow_slots(struct ovl_build *b)
{
	size_t count = b->slot_count * 2;
	uint32_t *slots;

	if (b->slot_count > (b->memory_max - b->memory) / sizeof(*slots))
		return breaks(b, "a layer's index must fit the memory limit");
	slots = calloc(count, sizeof(*slots));
	if (!slots)
		return -ENOMEM;
	for (uint32_t at = 0; at < b->dentries.count; at++) {
		size_t i = dentry_at(b, at)->hash & (count - 1);

		while (slots[i] != 0)
			i = (i + 1) & (count - 1);
		slots[i] = at + 1;
	}
	free(b->slots);
	b->memory += (uint64_t)(count - b->slot_count) * sizeof(*slots);
	b->slots = slots;
	b->slot_count = count;
	return 0;
}

static bool has_prefix(const uint8_t *name, size_t len, const char *prefix)
{
	size_t n = strlen(prefix);

	return len >= n && memcmp(name, prefix, n) == 0;
}

static bool equals(const uint8_t *name, size_t len, const char *text)
{
	return len == strlen(text) && memcmp(name, text, len) == 0;
}

static bool is_aufs(const uint8_t *name, size_t len)
{
	return equals(name, len, ".wh..wh.plnk") || equals(name, len, ".wh..wh.aufs") ||
	       equals(name, len, ".wh..wh.orph");
}

/* The dentry of that name; made, EMPTY, if there is none. */
static ovl_err_t ensure_dentry(struct ovl_build *b, uint32_t parent, const uint8_t *name, size_t len, uint32_t *out)
{
	uint32_t hash = hash_name(b, parent, name, len);
	struct build_dentry *dentry;
	size_t slot = 0;
	uint32_t text;
	ovl_err_t err;

	*out = find_slot(b, parent, name, len, hash, &slot);
	if (*out != NOWHERE)
		return 0;
	if ((b->dentries.count + 1) * 4 > b->slot_count * 3) {
		err = grow_slots(b);
		if (err)
			return err;
		find_slot(b, parent, name, len, hash, &slot);
	}
	err = reserve(b, &b->dentries, 1, sizeof(struct build_dentry));
	if (err)
		return err;
	err = append(b, &b->heap, name, len, &text);
	if (err)
		return err;
	*out = (uint32_t)b->dentries.count++;
	b->slots[slot] = *out + 1;
	dentry = dentry_at(b, *out);
	*dentry = (struct build_dentry){
		.hash = hash,
		.name = text,
		.parent = parent,
		.name_len = (uint8_t)len,
		.what = EMPTY,
		.flags = b->whiteouts && has_prefix(name, len, ".wh.") ? HIDDEN : 0,
	};
	return 0;
}

/* Makes the name stand for `ref`; what it stood for is removed, with everything beneath. */
static ovl_err_t put(struct ovl_build *b, uint32_t parent, const uint8_t *name, size_t len, enum ovl_what what,
		     uint32_t ref)
{
	struct build_dentry *dentry;
	uint32_t at;
	ovl_err_t err = ensure_dentry(b, parent, name, len, &at);

	if (err)
		return err;
	dentry = dentry_at(b, at);
	if (dentry->what != EMPTY) {
		b->cached_len = SIZE_MAX; /* the cached path may have led through here */
		if (what == OVL_DIRECTORY)
			inode_at(b, ref)->flags |= OVL_IX_OPAQUE;
	}
	dentry->what = (uint8_t)what;
	dentry->ref = ref;
	if (what == OVL_DIRECTORY)
		inode_at(b, ref)->dentry = at;
	return 0;
}

static ovl_err_t new_inode(struct ovl_build *b, uint32_t *out)
{
	ovl_err_t err = reserve(b, &b->inodes, 1, sizeof(struct build_inode));

	if (err)
		return err;
	*out = (uint32_t)b->inodes.count++;
	*inode_at(b, *out) = (struct build_inode){.dentry = NOWHERE, .ref = NOWHERE, .first = NOWHERE};
	return 0;
}

/* A new directory in `parent`: implied, until an entry describes it. */
static ovl_err_t make_directory(struct ovl_build *b, uint32_t parent, const uint8_t *name, size_t len, uint32_t *out)
{
	uint32_t depth = inode_at(b, parent)->depth + 1;
	struct build_inode *inode;
	ovl_err_t err;

	if (depth > OVL_INDEX_DEPTH_MAX)
		return breaks(b, "directories must not be more than 2048 deep");
	err = new_inode(b, out);
	if (err)
		return err;
	inode = inode_at(b, *out);
	inode->mode = S_IFDIR | 0755;
	inode->flags = OVL_IX_IMPLIED;
	inode->parent = parent;
	inode->depth = depth;
	return put(b, parent, name, len, OVL_DIRECTORY, *out);
}

/* ---- paths -------------------------------------------------------------------------------------------- */

static size_t component(const uint8_t *at, const uint8_t *end)
{
	const uint8_t *slash = memchr(at, '/', (size_t)(end - at));

	return slash ? (size_t)(slash - at) : (size_t)(end - at);
}

/* Appends one component to the path in `out`, or for ".." takes one off; the root's parent is the root. */
static bool join(uint8_t *out, size_t room, size_t *len, const uint8_t *name, size_t name_len)
{
	if (equals(name, name_len, "..")) {
		while (*len > 0 && out[*len - 1] != '/')
			--*len;
		if (*len > 0)
			--*len;
		return true;
	}
	if (name_len + 1 > room - *len)
		return false;
	if (*len > 0)
		out[(*len)++] = '/';
	memcpy(out + *len, name, name_len);
	*len += name_len;
	return true;
}

/* Writes `path` (an entry's name or a hard link's target) without "", ".", "..": as if the root were all there is.
 * `out` holds OVL_TAR_PATH_MAX bytes. */
static ovl_err_t normalise(struct ovl_build *b, struct ovl_bytes path, uint8_t *out, size_t *out_len)
{
	const uint8_t *at = path.at;
	const uint8_t *end;

	*out_len = 0;
	if (path.len == 0)
		return breaks(b, "a name must not be empty");
	end = at + path.len;
	if (path.len > OVL_TAR_PATH_MAX)
		return breaks(b, "a path must not be longer than 4096 bytes (ENAMETOOLONG)");
	if (memchr(at, 0, path.len))
		return breaks(b, "a name must not contain a NUL byte");
	while (at < end) {
		size_t len = component(at, end);

		if (len > OVL_TAR_NAME_MAX)
			return breaks(b, "a name must not be longer than 255 bytes (ENAMETOOLONG)");
		if (len > 0 && !equals(at, len, ".") && !join(out, OVL_TAR_PATH_MAX, out_len, at, len))
			return breaks(b, "a path must not be longer than 4096 bytes (ENAMETOOLONG)");
		at += len + (at + len < end);
	}
	return 0;
}

/* Where a normalised path splits into directory and last name. */
static size_t dirname_len(const uint8_t *path, size_t len)
{
	const uint8_t *slash = memrchr(path, '/', len);

	return slash ? (size_t)(slash - path) : 0;
}

/* Walks the path of a directory from the layer's root, following symlinks.  `create`: what is missing is made, a
 * non-directory in the way is replaced.  Otherwise `*rest` is what could not be walked (in b->walk); empty: found. */
static ovl_err_t walk(struct ovl_build *b, const uint8_t *path, size_t len, bool create, uint32_t *dir,
		      struct ovl_bytes *rest)
{
	const uint8_t *end = b->walk + WALK_MAX;
	uint8_t *at = b->walk + WALK_MAX - len;
	unsigned symlinks = 0, steps = 0;
	uint32_t cur = 0;

	if (len > 0)
		memcpy(at, path, len);
	while (at < end) {
		uint8_t *name = at;
		size_t name_len = component(at, end);
		uint32_t found;

		at += name_len + (at + name_len < end);
		if (name_len == 0 || equals(name, name_len, "."))
			continue;
		if (++steps > OVL_TAR_STEPS_MAX)
			return breaks(b, "a path must not lead through more than 8192 names, symlinks followed");
		if (equals(name, name_len, "..")) {
			cur = inode_at(b, cur)->parent;
			continue;
		}
		if (name_len > OVL_TAR_NAME_MAX)
			return breaks(b, "a name must not be longer than 255 bytes (ENAMETOOLONG)");
		if (b->whiteouts && has_prefix(name, name_len, ".wh.") && !is_aufs(name, name_len))
			return breaks(b, "a whiteout (.wh. name) must not be a directory of other entries");
		found = find(b, cur, name, name_len);
		if (found != NOWHERE && dentry_at(b, found)->what == OVL_DIRECTORY) {
			cur = dentry_at(b, found)->ref;
			continue;
		}
		if (found != NOWHERE && dentry_at(b, found)->what == OVL_OTHER &&
		    S_ISLNK(inode_at(b, dentry_at(b, found)->ref)->mode)) {
			const struct build_inode *link = inode_at(b, dentry_at(b, found)->ref);
			size_t target_len = (size_t)link->size;

			if (++symlinks > OVL_TAR_SYMLINKS_MAX)
				return breaks(b, "a path must not lead through more than 40 symlinks (ELOOP)");
			if (target_len + 1 > (size_t)(at - b->walk))
				return breaks(b, "a path must not grow beyond 16384 bytes through symlinks");
			*--at = '/'; /* where at == end this ends the target, else it keeps the two apart */
			at -= target_len;
			memcpy(at, heap_at(b, link->data), target_len);
			if (*at == '/')
				cur = 0;
			continue;
		}
		if (!create) {
			if (found != NOWHERE)
				return breaks(b, "a hard link's target must not lie beneath a non-directory");
			*dir = cur;
			*rest = (struct ovl_bytes){name, (size_t)(end - name)};
			return 0;
		}
		if (found != NOWHERE && symlinks > 0)
			return breaks(b, "a symlinked parent directory must lead to a directory");
		ovl_err_t err = make_directory(b, cur, name, name_len, &cur);

		if (err)
			return err;
	}
	*dir = cur;
	if (rest)
		*rest = (struct ovl_bytes){b->walk, 0};
	return 0;
}

/* The directory of the entry whose normalised path starts with these `len` bytes. */
static ovl_err_t parent_of(struct ovl_build *b, size_t len, uint32_t *dir)
{
	ovl_err_t err;

	if (b->cached_len == len && memcmp(b->cached, b->norm, len) == 0) {
		*dir = b->cached_dir;
		return 0;
	}
	err = walk(b, b->norm, len, true, dir, NULL);
	if (err)
		return err;
	memcpy(b->cached, b->norm, len);
	b->cached_len = len;
	b->cached_dir = *dir;
	return 0;
}

/* Writes the path of directory `dir` into b->target, from its front. */
static ovl_err_t path_of(struct ovl_build *b, uint32_t dir, size_t *len)
{
	size_t at = sizeof(b->target);

	for (; dir != 0; dir = inode_at(b, dir)->parent) {
		const struct build_dentry *dentry = dentry_at(b, inode_at(b, dir)->dentry);

		if (dentry->name_len + 1u > at)
			return breaks(b, "a hard link's target must not be longer than 4096 bytes (ENAMETOOLONG)");
		if (at < sizeof(b->target))
			b->target[--at] = '/';
		at -= dentry->name_len;
		memcpy(b->target + at, heap_at(b, dentry->name), dentry->name_len);
	}
	*len = sizeof(b->target) - at;
	memmove(b->target, b->target + at, *len);
	return 0;
}

/* ---- entries ------------------------------------------------------------------------------------------ */

static ovl_err_t set_xattrs(struct ovl_build *b, uint32_t ino, const struct ovl_build_entry *e)
{
	struct ovl_disk_xattrs head = {.count = e->xattr_count, .bytes = (uint32_t)e->xattrs.len};
	uint32_t at, unused;
	ovl_err_t err;

	inode_at(b, ino)->xattr = 0;
	if (e->xattr_count == 0)
		return 0;
	err = append(b, &b->xattrs, &head, sizeof(head), &at);
	if (!err)
		err = append(b, &b->xattrs, e->xattrs.at, e->xattrs.len, &unused);
	if (!err)
		inode_at(b, ino)->xattr = at + 1;
	return err;
}

/* Owner, permissions, time: what also a hard link's entry has. */
static void set_attributes(struct build_inode *inode, const struct ovl_build_entry *e)
{
	uint32_t permissions = S_ISLNK(inode->mode) ? 0777 : e->mode & 07777;

	inode->mode = (inode->mode & S_IFMT) | permissions;
	inode->uid = e->uid;
	inode->gid = e->gid;
	inode->mtime_sec = e->mtime_sec;
	inode->mtime_nsec = e->mtime_nsec;
}

static ovl_err_t add_directory(struct ovl_build *b, uint32_t parent, const uint8_t *name, size_t len,
			       const struct ovl_build_entry *e)
{
	uint32_t found = find(b, parent, name, len);
	uint32_t dir;

	if (found != NOWHERE && dentry_at(b, found)->what == OVL_DIRECTORY) {
		dir = dentry_at(b, found)->ref;
	} else {
		ovl_err_t err = make_directory(b, parent, name, len, &dir);

		if (err)
			return err;
	}
	inode_at(b, dir)->flags &= ~OVL_IX_IMPLIED;
	set_attributes(inode_at(b, dir), e);
	return set_xattrs(b, dir, e);
}

static ovl_err_t add_other(struct ovl_build *b, uint32_t parent, const uint8_t *name, size_t len,
			   const struct ovl_build_entry *e)
{
	struct build_inode *inode;
	uint32_t ino, text;
	ovl_err_t err = new_inode(b, &ino);

	if (err)
		return err;
	inode = inode_at(b, ino);
	inode->mode = e->mode;
	set_attributes(inode, e);
	switch (e->mode & S_IFMT) {
	case S_IFREG:
		inode->size = e->size;
		inode->data = e->data;
		if (e->sparse) {
			err = reserve(b, &b->extents, e->extent_count, sizeof(struct ovl_disk_extent));
			if (err)
				return err;
			inode->flags |= OVL_IX_SPARSE;
			inode->data = (uint64_t)e->extent_count << 32 | b->extents.count;
			if (e->extent_count > 0)
				memcpy((struct ovl_disk_extent *)b->extents.at + b->extents.count, e->extents,
				       e->extent_count * sizeof(struct ovl_disk_extent));
			b->extents.count += e->extent_count;
		}
		break;
	case S_IFLNK:
		if (e->link.len == 0)
			return breaks(b, "a symlink must have a target");
		if (e->link.len > OVL_TAR_TARGET_MAX)
			return breaks(b, "a symlink's target must not be longer than 4095 bytes (ENAMETOOLONG)");
		if (memchr(e->link.at, 0, e->link.len))
			return breaks(b, "a symlink's target must not contain a NUL byte");
		err = append(b, &b->heap, e->link.at, e->link.len, &text);
		if (err)
			return err;
		inode->size = e->link.len;
		inode->data = text;
		break;
	case S_IFCHR:
	case S_IFBLK:
		inode->data = e->rdev;
		break;
	default:
		break;
	}
	err = set_xattrs(b, ino, e);
	return err ? err : put(b, parent, name, len, OVL_OTHER, ino);
}

/* A link to what this layer does not have: `rest` beneath `dir` remains to be found in the layers below. */
static ovl_err_t add_link_below(struct ovl_build *b, uint32_t parent, const uint8_t *name, size_t len, uint32_t dir,
				struct ovl_bytes rest, const uint8_t *last, size_t last_len)
{
	struct build_link link = {.forward = NOWHERE};
	const uint8_t *at = rest.at;
	const uint8_t *end = at + rest.len;
	size_t target_len;
	uint32_t number;
	ovl_err_t err = path_of(b, dir, &target_len);

	if (err)
		return err;
	while (at < end) {
		size_t n = component(at, end);

		if (n > 0 && !equals(at, n, ".") && !join(b->target, sizeof(b->target), &target_len, at, n))
			return breaks(b, "a hard link's target must not be longer than 4096 bytes (ENAMETOOLONG)");
		at += n + (at + n < end);
	}
	if (!join(b->target, sizeof(b->target), &target_len, last, last_len) || target_len > OVL_TAR_PATH_MAX)
		return breaks(b, "a hard link's target must not be longer than 4096 bytes (ENAMETOOLONG)");
	if (b->whiteouts && (has_prefix(b->target, target_len, ".wh.") || memmem(b->target, target_len, "/.wh.", 5)))
		return breaks(b, "a hard link must not lead to a whiteout (.wh. name)");
	err = reserve(b, &b->links, 1, sizeof(link));
	if (!err)
		err = append(b, &b->heap, b->target, target_len, &link.target);
	if (err)
		return err;
	link.target_len = (uint32_t)target_len;
	number = (uint32_t)b->links.count++;
	*link_at(b, number) = link;
	return put(b, parent, name, len, OVL_LINK_BELOW, number);
}

static ovl_err_t add_hard_link(struct ovl_build *b, uint32_t parent, const uint8_t *name, size_t len,
			       const struct ovl_build_entry *e)
{
	struct ovl_bytes rest = {b->walk, 0};
	struct build_dentry *target;
	const uint8_t *last;
	size_t path_len, dir_len, last_len;
	uint32_t dir = 0, found, ino;
	ovl_err_t err;

	if (e->link.len == 0)
		return breaks(b, "a hard link must have a target");
	err = normalise(b, e->link, b->link_norm, &path_len);
	if (err)
		return err;
	if (path_len == 0)
		return breaks(b, "a hard link must not lead to a directory");
	dir_len = dirname_len(b->link_norm, path_len);
	last = b->link_norm + dir_len + (dir_len > 0);
	last_len = path_len - dir_len - (dir_len > 0);
	err = walk(b, b->link_norm, dir_len, false, &dir, &rest);
	if (err)
		return err;
	if (rest.len > 0)
		return add_link_below(b, parent, name, len, dir, rest, last, last_len);
	if (dir == parent && last_len == len && memcmp(last, name, len) == 0)
		return breaks(b, "a hard link must not lead to itself");
	found = find(b, dir, last, last_len);
	if (found == NOWHERE)
		return add_link_below(b, parent, name, len, dir, rest, last, last_len);
	target = dentry_at(b, found);
	ino = target->ref;
	if (target->what == OVL_DIRECTORY)
		return breaks(b, "a hard link must not lead to a directory");
	if (target->what == OVL_LINK_BELOW)
		return put(b, parent, name, len, OVL_LINK_BELOW, ino);
	set_attributes(inode_at(b, ino), e);
	if (e->xattr_count > 0) {
		err = set_xattrs(b, ino, e);
		if (err)
			return err;
	}
	return put(b, parent, name, len, OVL_OTHER, ino);
}

/* An entry whose last name starts with `.wh.`.  `*plain`: it is to be added like any other, unseen (aufs). */
static ovl_err_t add_whiteout(struct ovl_build *b, size_t dir_len, const uint8_t *name, size_t len, bool *plain)
{
	uint32_t parent, at;
	ovl_err_t err;

	*plain = false;
	if (is_aufs(name, len)) {
		*plain = true;
		return 0;
	}
	name += 4;
	len -= 4;
	if (len == 0 || equals(name, len, ".") || equals(name, len, ".."))
		return breaks(b, "a whiteout must have a name after .wh.");
	err = parent_of(b, dir_len, &parent);
	if (err)
		return err;
	if (equals(name, len, ".wh..opq")) {
		inode_at(b, parent)->flags |= OVL_IX_OPAQUE;
		return 0;
	}
	if (has_prefix(name, len, ".wh."))
		return 0; /* aufs' reserved names (.wh..wh.*): nothing below can have such a name */
	err = ensure_dentry(b, parent, name, len, &at);
	if (!err)
		dentry_at(b, at)->flags |= WHITED;
	return err;
}

static ovl_err_t add_entry(struct ovl_build *b, const struct ovl_build_entry *e)
{
	size_t path_len, dir_len, len;
	const uint8_t *name;
	uint32_t parent;
	ovl_err_t err = normalise(b, e->name, b->norm, &path_len);

	if (err)
		return err;
	if (path_len == 0) {
		if (e->is_hard_link || !S_ISDIR(e->mode))
			return breaks(b, "the root must be a directory");
		inode_at(b, 0)->flags &= ~OVL_IX_IMPLIED;
		set_attributes(inode_at(b, 0), e);
		return set_xattrs(b, 0, e);
	}
	dir_len = dirname_len(b->norm, path_len);
	name = b->norm + dir_len + (dir_len > 0);
	len = path_len - dir_len - (dir_len > 0);
	if (b->whiteouts && has_prefix(name, len, ".wh.")) {
		bool plain;

		err = add_whiteout(b, dir_len, name, len, &plain);
		if (err || !plain)
			return err;
	}
	err = parent_of(b, dir_len, &parent);
	if (err)
		return err;
	if (e->is_hard_link)
		return add_hard_link(b, parent, name, len, e);
	if (S_ISDIR(e->mode))
		return add_directory(b, parent, name, len, e);
	return add_other(b, parent, name, len, e);
}

ovl_err_t ovl_build_add(struct ovl_build *build, const struct ovl_build_entry *entry, const char **rule)
{
	ovl_err_t err = add_entry(build, entry);

	if (err == -EBADMSG)
		*rule = build->rule;
	return err;
}

/* ---- the image ---------------------------------------------------------------------------------------- */

/* What the walk over the finished tree collects. */
struct writer {
	struct array inodes;   /* uint32_t: builder's inode of each ref */
	struct array dentries; /* struct ovl_disk_dentry */
	struct array links;    /* struct ovl_disk_link */
	struct array extents;
	struct array xattrs;
	struct array heap;
	struct array runs; /* uint64_t per directory inode number: first | count << 32 (indexed like build inodes) */
	uint32_t last_xattr;     /* the block written last, in the builder ... */
	uint32_t last_xattr_out; /* ... and in the image, + 1 */
	struct ovl_disk_header h;
};

/* For sorting: the first bytes of the name as a number, most names differ there. */
struct sort_key {
	uint64_t prefix;
	uint32_t dentry;
};

static int compare_keys(const void *left, const void *right, void *context)
{
	const struct sort_key *a = left;
	const struct sort_key *b = right;
	const struct build_dentry *x, *y;
	int order;

	if (a->prefix != b->prefix)
		return a->prefix < b->prefix ? -1 : 1;
	x = dentry_at(context, a->dentry);
	y = dentry_at(context, b->dentry);
	order = memcmp(heap_at(context, x->name), heap_at(context, y->name),
		       x->name_len < y->name_len ? x->name_len : y->name_len);
	return order != 0 ? order : (int)x->name_len - (int)y->name_len;
}

static void sort_names(struct ovl_build *b, struct sort_key *keys, size_t count)
{
	for (size_t i = 0; i < count; i++) {
		const struct build_dentry *dentry = dentry_at(b, keys[i].dentry);
		const uint8_t *name = heap_at(b, dentry->name);

		keys[i].prefix = 0;
		for (unsigned n = 0; n < 8; n++)
			keys[i].prefix = keys[i].prefix << 8 | (n < dentry->name_len ? name[n] : 0);
	}
	for (size_t i = 1; i < count; i++) {
		if (compare_keys(&keys[i - 1], &keys[i], b) > 0) {
			qsort_r(keys, count, sizeof(*keys), compare_keys, b);
			return;
		}
	}
}

/* Gives the inode its number in the image, at its first name. */
static ovl_err_t number_inode(struct ovl_build *b, struct writer *w, uint32_t ino)
{
	struct build_inode *inode = inode_at(b, ino);
	ovl_err_t err;

	if (inode->ref != NOWHERE)
		return 0;
	err = reserve(b, &w->inodes, 1, sizeof(uint32_t));
	if (err)
		return err;
	inode->ref = (uint32_t)w->inodes.count;
	((uint32_t *)w->inodes.at)[w->inodes.count++] = ino;
	return 0;
}

/* Writes one dentry of directory `dir`. */
static ovl_err_t write_dentry(struct ovl_build *b, struct writer *w, uint32_t dir, uint32_t at)
{
	const struct build_dentry *dentry = dentry_at(b, at);
	struct ovl_disk_dentry out = {
		.parent = inode_at(b, dir)->ref,
		.next = OVL_INDEX_NONE,
		.name_len = dentry->name_len,
		.what = dentry->what == EMPTY ? OVL_WHITEOUT : dentry->what,
	};
	ovl_err_t err = reserve(b, &w->dentries, 1, sizeof(out));
	uint32_t number = (uint32_t)w->dentries.count;
	struct build_inode *inode;

	if (!err)
		err = append(b, &w->heap, heap_at(b, dentry->name), dentry->name_len, &out.name);
	if (!err && (out.what == OVL_DIRECTORY || out.what == OVL_OTHER))
		err = number_inode(b, w, dentry->ref);
	if (err)
		return err;
	switch (out.what) {
	case OVL_WHITEOUT:
		w->h.whiteouts++;
		break;
	case OVL_LINK_BELOW:
		out.ref = dentry->ref; /* all links are written, in order */
		break;
	case OVL_DIRECTORY:
		inode = inode_at(b, dentry->ref);
		out.ref = inode->ref;
		inode->first = number;
		inode->nlink = 2;
		inode_at(b, dir)->nlink++;
		if (dentry->flags & WHITED)
			inode->flags |= OVL_IX_OPAQUE;
		break;
	default:
		inode = inode_at(b, dentry->ref);
		out.ref = inode->ref;
		if (inode->nlink++ == 0)
			inode->first = number;
		else
			((struct ovl_disk_dentry *)w->dentries.at)[inode->dentry].next = number;
		inode->dentry = number;
		break;
	}
	((struct ovl_disk_dentry *)w->dentries.at)[w->dentries.count++] = out;
	return 0;
}

/* Numbers everything that can be reached, directories before their children, and writes the dentries. */
static ovl_err_t write_tree(struct ovl_build *b, struct writer *w)
{
	size_t inode_count = b->inodes.count;
	size_t dentry_count = b->dentries.count;
	uint32_t *start = NULL;
	uint32_t *sorted = NULL;
	struct sort_key *keys = NULL;
	bool *covered = NULL;
	size_t most = 0;
	ovl_err_t err = -EBADMSG;

	/* Group the dentries by parent: count, sum up, fill. */
	if ((inode_count + 1) * 5 + dentry_count * 20 > b->memory_max - b->memory) {
		b->rule = "a layer's index must fit the memory limit";
		goto out;
	}
	err = -ENOMEM;
	start = calloc(inode_count + 2, sizeof(*start));
	sorted = malloc((dentry_count + 1) * sizeof(*sorted));
	covered = calloc(inode_count, sizeof(*covered));
	if (!start || !sorted || !covered)
		goto out;
	for (uint32_t at = 0; at < dentry_count; at++)
		start[dentry_at(b, at)->parent + 2]++;
	for (size_t i = 2; i < inode_count + 2; i++) {
		if (start[i] > most)
			most = start[i];
		start[i] += start[i - 1];
	}
	for (uint32_t at = 0; at < dentry_count; at++)
		sorted[start[dentry_at(b, at)->parent + 1]++] = at;
	keys = malloc((most + 1) * sizeof(*keys));
	if (!keys)
		goto out;
	err = reserve(b, &w->runs, inode_count, sizeof(uint64_t));
	if (!err)
		err = number_inode(b, w, 0);
	if (err)
		goto out;
	inode_at(b, 0)->nlink = 2;
	/* w->inodes is the queue. */
	for (size_t head = 0; head < w->inodes.count; head++) {
		uint32_t dir = ((uint32_t *)w->inodes.at)[head];
		bool bare = covered[dir] || (inode_at(b, dir)->flags & OVL_IX_OPAQUE);
		size_t count = 0;

		if (!S_ISDIR(inode_at(b, dir)->mode))
			continue;
		for (uint32_t i = start[dir]; i < start[dir + 1]; i++) {
			const struct build_dentry *dentry = dentry_at(b, sorted[i]);

			if ((dentry->flags & HIDDEN) || (dentry->what == EMPTY && (bare || !(dentry->flags & WHITED))))
				continue;
			if (dentry->what == OVL_DIRECTORY)
				covered[dentry->ref] = bare;
			keys[count++].dentry = sorted[i];
		}
		sort_names(b, keys, count);
		((uint64_t *)w->runs.at)[dir] = (uint64_t)count << 32 | w->dentries.count;
		for (size_t i = 0; i < count && !err; i++)
			err = write_dentry(b, w, dir, keys[i].dentry);
		if (err)
			goto out;
	}
out:
	free(keys);
	free(covered);
	free(sorted);
	free(start);
	return err;
}

/* Finds for each link below what the finished layer itself has at its target.  From the last link to the first:
 * a link that leads to a later link finds that one resolved. */
static ovl_err_t find_forward(struct ovl_build *b)
{
	for (size_t i = b->links.count; i-- > 0;) {
		struct build_link *link = link_at(b, (uint32_t)i);
		const uint8_t *path = heap_at(b, link->target);
		size_t dir_len = dirname_len(path, link->target_len);
		struct ovl_bytes rest = {b->walk, 0};
		uint32_t dir = 0, found;
		ovl_err_t err = walk(b, path, dir_len, false, &dir, &rest);

		if (err == -EBADMSG || rest.len > 0)
			continue; /* not in this layer */
		if (err)
			return err;
		dir_len += dir_len > 0;
		found = find(b, dir, path + dir_len, link->target_len - dir_len);
		if (found == NOWHERE)
			continue;
		if (dentry_at(b, found)->what == OVL_OTHER)
			link->forward = dentry_at(b, found)->ref;
		else if (dentry_at(b, found)->what == OVL_LINK_BELOW)
			link->forward = link_at(b, dentry_at(b, found)->ref)->forward;
	}
	return 0;
}

static ovl_err_t write_links(struct ovl_build *b, struct writer *w)
{
	ovl_err_t err = reserve(b, &w->links, b->links.count, sizeof(struct ovl_disk_link));

	for (uint32_t i = 0; !err && i < b->links.count; i++) {
		const struct build_link *link = link_at(b, i);
		struct ovl_disk_link *out = (struct ovl_disk_link *)w->links.at + i;
		uint32_t ref = link->forward == NOWHERE ? NOWHERE : inode_at(b, link->forward)->ref;

		out->target_len = link->target_len;
		out->forward = ref == NOWHERE ? 0 : ref;
		err = append(b, &w->heap, heap_at(b, link->target), link->target_len, &out->target);
	}
	w->links.count = b->links.count;
	return err;
}

/* Copies what the inode points at out of the builder, and makes its record. */
static ovl_err_t write_inode(struct ovl_build *b, struct writer *w, uint32_t ino, struct ovl_disk_inode *out)
{
	const struct build_inode *inode = inode_at(b, ino);
	ovl_err_t err = 0;

	*out = (struct ovl_disk_inode){
		.mode = inode->mode,
		.nlink = inode->nlink,
		.uid = inode->uid,
		.gid = inode->gid,
		.size = inode->size,
		.data = inode->data,
		.mtime_sec = inode->mtime_sec,
		.mtime_nsec = inode->mtime_nsec,
		.flags = inode->flags,
		.first_dentry = inode->first,
	};
	if (S_ISDIR(inode->mode)) {
		w->h.dirs++;
		w->h.opaques += (inode->flags & OVL_IX_OPAQUE) != 0;
		out->data = ((uint64_t *)w->runs.at)[ino];
	} else {
		w->h.files++;
	}
	if (S_ISREG(inode->mode)) {
		w->h.bytes += inode->size;
		if (inode->flags & OVL_IX_SPARSE) {
			size_t first = (uint32_t)inode->data, count = inode->data >> 32;

			err = reserve(b, &w->extents, count, sizeof(struct ovl_disk_extent));
			if (err)
				return err;
			if (count > 0)
				memcpy((struct ovl_disk_extent *)w->extents.at + w->extents.count,
				       (struct ovl_disk_extent *)b->extents.at + first,
				       count * sizeof(struct ovl_disk_extent));
			out->data = (uint64_t)count << 32 | w->extents.count;
			w->extents.count += count;
		}
	}
	if (S_ISLNK(inode->mode)) {
		uint32_t text = 0;

		err = append(b, &w->heap, heap_at(b, inode->data), (size_t)inode->size, &text);
		out->data = text;
	}
	if (!err && inode->xattr) {
		const uint8_t *block = (const uint8_t *)b->xattrs.at + inode->xattr - 1;
		struct ovl_disk_xattrs head;
		size_t len;

		memcpy(&head, block, sizeof(head));
		len = sizeof(head) + head.bytes;
		/* Runs of files with the same labels share one block. */
		if (w->last_xattr) {
			const uint8_t *last = (const uint8_t *)b->xattrs.at + w->last_xattr - 1;

			if (memcmp(last, block, sizeof(head)) == 0 && memcmp(last, block, len) == 0) {
				out->xattr = w->last_xattr_out;
				return 0;
			}
		}
		err = append(b, &w->xattrs, block, len, &out->xattr);
		out->xattr++;
		w->last_xattr = inode->xattr;
		w->last_xattr_out = out->xattr;
	}
	return err;
}

static void place(struct ovl_disk_table *table, uint64_t *end, size_t count, size_t size)
{
	table->offset = *end;
	table->count = count;
	*end = (*end + (uint64_t)count * size + 7) & ~7ull;
}

static void copy_table(uint8_t *image, const struct ovl_disk_table *table, const struct array *from, size_t size)
{
	if (from->count > 0)
		memcpy(image + table->offset, from->at, from->count * size);
}

ovl_err_t ovl_build_finish(struct ovl_build *b, uint64_t tar_end, uint8_t **image_out, size_t *image_len,
			   const char **rule)
{
	struct writer w = {0};
	uint64_t end = sizeof(struct ovl_disk_header);
	struct array records = {0};
	uint8_t *image = NULL;
	ovl_err_t err;

	err = find_forward(b);
	if (err)
		goto out;
	err = write_tree(b, &w);
	if (err)
		goto out;
	/* The names have served: make room for the image. */
	free(b->slots);
	b->memory -= (uint64_t)b->slot_count * sizeof(*b->slots);
	b->slots = NULL;
	b->slot_count = 0;
	release(b, &b->dentries, sizeof(struct build_dentry));
	err = write_links(b, &w);
	if (err)
		goto out;
	err = reserve(b, &records, w.inodes.count, sizeof(struct ovl_disk_inode));
	if (err)
		goto out;
	for (size_t i = 0; i < w.inodes.count; i++) {
		err = write_inode(b, &w, ((uint32_t *)w.inodes.at)[i], (struct ovl_disk_inode *)records.at + i);
		if (err)
			goto out;
	}
	records.count = w.inodes.count;
	place(&w.h.inodes, &end, records.count, sizeof(struct ovl_disk_inode));
	place(&w.h.dentries, &end, w.dentries.count, sizeof(struct ovl_disk_dentry));
	place(&w.h.links, &end, w.links.count, sizeof(struct ovl_disk_link));
	place(&w.h.extents, &end, w.extents.count, sizeof(struct ovl_disk_extent));
	place(&w.h.xattrs, &end, w.xattrs.count, 1);
	place(&w.h.heap, &end, w.heap.count, 1);
	if (end > b->memory_max - b->memory) {
		err = breaks(b, "a layer's index must fit the memory limit");
		goto out;
	}
	err = -ENOMEM;
	image = calloc(1, end);
	if (!image)
		goto out;
	memcpy(w.h.magic, OVL_INDEX_MAGIC, sizeof(w.h.magic));
	w.h.version = OVL_INDEX_VERSION;
	w.h.header_size = sizeof(w.h);
	w.h.total_size = end;
	w.h.tar_end = tar_end;
	copy_table(image, &w.h.inodes, &records, sizeof(struct ovl_disk_inode));
	copy_table(image, &w.h.dentries, &w.dentries, sizeof(struct ovl_disk_dentry));
	copy_table(image, &w.h.links, &w.links, sizeof(struct ovl_disk_link));
	copy_table(image, &w.h.extents, &w.extents, sizeof(struct ovl_disk_extent));
	copy_table(image, &w.h.xattrs, &w.xattrs, 1);
	copy_table(image, &w.h.heap, &w.heap, 1);
	memcpy(image, &w.h, sizeof(w.h));
	w.h.checksum = ovl_index_checksum(image, end);
	memcpy(image, &w.h, sizeof(w.h));
	*image_out = image;
	*image_len = end;
	err = 0;
out:
	release(b, &records, sizeof(struct ovl_disk_inode));
	release(b, &w.inodes, sizeof(uint32_t));
	release(b, &w.dentries, sizeof(struct ovl_disk_dentry));
	release(b, &w.links, sizeof(struct ovl_disk_link));
	release(b, &w.extents, sizeof(struct ovl_disk_extent));
	release(b, &w.xattrs, 1);
	release(b, &w.heap, 1);
	release(b, &w.runs, sizeof(uint64_t));
	if (err == -EBADMSG)
		*rule = b->rule;
	return err;
}

/* ---- life --------------------------------------------------------------------------------------------- */

ovl_err_t ovl_build_new(bool whiteouts, uint64_t memory_max, struct ovl_build **out)
{
	struct ovl_build *b;
	uint32_t root;
	ovl_err_t err = -ENOMEM;

	b = calloc(1, sizeof(*b));
	if (!b)
		goto out;
	b->whiteouts = whiteouts;
	b->memory_max = memory_max;
	b->cached_len = SIZE_MAX;
	b->slot_count = 1024;
	b->slots = calloc(b->slot_count, sizeof(*b->slots));
	if (!b->slots)
		goto out;
	b->memory = sizeof(*b) + b->slot_count * sizeof(*b->slots);
	if (b->memory > b->memory_max)
		b->memory_max = b->memory;
	if (getrandom(b->key, sizeof(b->key), GRND_NONBLOCK) != (ssize_t)sizeof(b->key)) {
		struct timespec now = {0}; /* before the kernel's pool is ready: better than a constant */

		clock_gettime(CLOCK_MONOTONIC, &now);
		b->key[0] = (uint64_t)now.tv_nsec ^ (uint64_t)(uintptr_t)b;
		b->key[1] = (uint64_t)now.tv_sec;
	}
	err = new_inode(b, &root);
	if (err == -EBADMSG)
		err = -ENOMEM;
	if (err)
		goto out;
	inode_at(b, root)->mode = S_IFDIR | 0755;
	inode_at(b, root)->flags = OVL_IX_IMPLIED;
	*out = b;
	b = NULL;
out:
	ovl_build_free(b);
	return err;
}

void ovl_build_free(struct ovl_build *b)
{
	if (!b)
		return;
	free(b->slots);
	free(b->inodes.at);
	free(b->dentries.at);
	free(b->links.at);
	free(b->extents.at);
	free(b->heap.at);
	free(b->xattrs.at);
	free(b);
}
