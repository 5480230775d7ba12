/*
 * index.c - answers from the image of a layer index; see index.h for its structure and the rules of access
 *
 * Every read goes the same way: bound the record's number by its table's count, copy the record out, check what
 * it points at before following it.  There is no other way to the image than the get_*() helpers and heap_at().
 */
#include "index.h"

#include <errno.h>
#include <string.h>
#include <sys/stat.h>

#include "tarscan.h"

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the index image is little-endian and read as it lies; this host needs byte swaps in get_*()"
#endif

/* ---- XXH64 -------------------------------------------------------------------------------------------- */

#define XXH_P1 0x9E3779B185EBCA87ull
#define XXH_P2 0xC2B2AE3D27D4EB4Full
#define XXH_P3 0x165667B19E3779F9ull
#define XXH_P4 0x85EBCA77C2B2AE63ull
#define XXH_P5 0x27D4EB2F165667C5ull

static uint64_t rotl(uint64_t x, unsigned r)
{
	return (x << r) | (x >> (64 - r));
}

static uint64_t load64(const uint8_t *p)
{
	uint64_t v;

	memcpy(&v, p, sizeof(v));
	return v;
}

static uint64_t xxh_round(uint64_t acc, uint64_t lane)
{
	return rotl(acc + lane * XXH_P2, 31) * XXH_P1;
}

static uint64_t xxh_merge(uint64_t hash, uint64_t acc)
{
	return (hash ^ xxh_round(0, acc)) * XXH_P1 + XXH_P4;
}

struct xxh {
	uint64_t acc[4];
};

static const uint8_t *xxh_stripes(struct xxh *x, const uint8_t *p, size_t stripes)
{
	for (; stripes > 0; stripes--, p += 32)
		for (unsigned i = 0; i < 4; i++)
			x->acc[i] = xxh_round(x->acc[i], load64(p + 8 * i));
	return p;
}

uint64_t ovl_index_checksum(const void *image, size_t len)
{
	struct xxh x = {{XXH_P1 + XXH_P2, XXH_P2, 0, 0ull - XXH_P1}};
	uint8_t head[sizeof(struct ovl_disk_header)];
	const uint8_t *p = image;
	const uint8_t *end = p + len;
	uint64_t hash;

	/* The header is a whole number of stripes, so a copy with the field cleared can stand in for it. */
	static_assert(sizeof(head) % 32 == 0, "the header ends on a stripe");
	memcpy(head, p, sizeof(head));
	memset(head + offsetof(struct ovl_disk_header, checksum), 0, sizeof(uint64_t));
	xxh_stripes(&x, head, sizeof(head) / 32);
	p = xxh_stripes(&x, p + sizeof(head), (len - sizeof(head)) / 32);
	hash = rotl(x.acc[0], 1) + rotl(x.acc[1], 7) + rotl(x.acc[2], 12) + rotl(x.acc[3], 18);
	for (unsigned i = 0; i < 4; i++)
		hash = xxh_merge(hash, x.acc[i]);
	hash += len;
	for (; end - p >= 8; p += 8)
		hash = rotl(hash ^ xxh_round(0, load64(p)), 27) * XXH_P1 + XXH_P4;
	if (end - p >= 4) {
		uint32_t v;

		memcpy(&v, p, sizeof(v));
		hash = rotl(hash ^ (v * XXH_P1), 23) * XXH_P2 + XXH_P3;
		p += 4;
	}
	for (; p < end; p++)
		hash = rotl(hash ^ (*p * XXH_P5), 11) * XXH_P1;
	hash = (hash ^ (hash >> 33)) * XXH_P2;
	hash = (hash ^ (hash >> 29)) * XXH_P3;
	return hash ^ (hash >> 32);
}

/* ---- open --------------------------------------------------------------------------------------------- */

static bool table_fits(const struct ovl_disk_table *table, size_t record, size_t len)
{
	return table->count < UINT32_MAX && table->offset >= sizeof(struct ovl_disk_header) && table->offset <= len &&
	       table->count <= (len - table->offset) / record;
}

ovl_err_t ovl_index_open(struct ovl_index *ix, const void *image, size_t len, bool verify, const char **why)
{
	struct ovl_disk_header h;
	const uint8_t *base = image;
	const char *text = NULL;
	ovl_err_t err = -EUCLEAN;

	memset(ix, 0, sizeof(*ix));
	if (len < sizeof(h)) {
		text = "the index is cut short";
		goto out;
	}
	memcpy(&h, base, sizeof(h));
	if (memcmp(h.magic, OVL_INDEX_MAGIC, sizeof(h.magic)) != 0) {
		text = "this is no layer index";
		goto out;
	}
	if (h.version != OVL_INDEX_VERSION || h.header_size != sizeof(h)) {
		text = "the index has another version";
		goto out;
	}
	if (h.total_size != len) {
		text = "the index has the wrong length";
		goto out;
	}
	if (!table_fits(&h.inodes, sizeof(struct ovl_disk_inode), len) ||
	    !table_fits(&h.dentries, sizeof(struct ovl_disk_dentry), len) ||
	    !table_fits(&h.links, sizeof(struct ovl_disk_link), len) ||
	    !table_fits(&h.extents, sizeof(struct ovl_disk_extent), len) || !table_fits(&h.xattrs, 1, len) ||
	    !table_fits(&h.heap, 1, len) || h.inodes.count == 0) {
		text = "a table of the index lies outside it";
		goto out;
	}
	if (verify && ovl_index_checksum(image, len) != h.checksum) {
		text = "the index does not match its checksum";
		goto out;
	}
	ix->base = base;
	ix->len = len;
	ix->inodes = base + h.inodes.offset;
	ix->dentries = base + h.dentries.offset;
	ix->links = base + h.links.offset;
	ix->extents = base + h.extents.offset;
	ix->xattrs = base + h.xattrs.offset;
	ix->heap = base + h.heap.offset;
	ix->inode_count = (uint32_t)h.inodes.count;
	ix->dentry_count = (uint32_t)h.dentries.count;
	ix->link_count = (uint32_t)h.links.count;
	ix->extent_count = (uint32_t)h.extents.count;
	ix->xattr_bytes = (uint32_t)h.xattrs.count;
	ix->heap_bytes = (uint32_t)h.heap.count;
	ix->files = h.files;
	ix->dirs = h.dirs;
	ix->whiteouts = h.whiteouts;
	ix->opaques = h.opaques;
	ix->bytes = h.bytes;
	ix->tar_end = h.tar_end;
	err = 0;
out:
	if (why)
		*why = text;
	return err;
}

/* ---- records ------------------------------------------------------------------------------------------ */

static ovl_err_t get_inode(const struct ovl_index *ix, uint32_t ref, struct ovl_disk_inode *out)
{
	if (ref >= ix->inode_count)
		return -EUCLEAN;
	memcpy(out, ix->inodes + (size_t)ref * sizeof(*out), sizeof(*out));
	return 0;
}

static ovl_err_t get_dentry(const struct ovl_index *ix, uint32_t at, struct ovl_disk_dentry *out)
{
	if (at >= ix->dentry_count)
		return -EUCLEAN;
	memcpy(out, ix->dentries + (size_t)at * sizeof(*out), sizeof(*out));
	if (out->name_len == 0 || out->name > ix->heap_bytes || out->name_len > ix->heap_bytes - out->name)
		return -EUCLEAN;
	return 0;
}

/* `len` bytes of the heap at `at`; NULL if they are not all there. */
static const uint8_t *heap_at(const struct ovl_index *ix, uint64_t at, uint64_t len)
{
	if (at > ix->heap_bytes || len > ix->heap_bytes - at)
		return NULL;
	return ix->heap + at;
}

/* The run of dentries of directory `dir`.  -ENOTDIR: it is something else. */
static ovl_err_t get_run(const struct ovl_index *ix, uint32_t dir, uint32_t *first, uint32_t *count)
{
	struct ovl_disk_inode inode;
	ovl_err_t err = get_inode(ix, dir, &inode);

	if (err)
		return err;
	if (!S_ISDIR(inode.mode))
		return -ENOTDIR;
	*first = (uint32_t)inode.data;
	*count = (uint32_t)(inode.data >> 32);
	if (*first > ix->dentry_count || *count > ix->dentry_count - *first)
		return -EUCLEAN;
	return 0;
}

/* Fills `out` from dentry number `at`, which `dir`'s run contains. */
static ovl_err_t get_entry(const struct ovl_index *ix, uint32_t dir, uint32_t at, struct ovl_index_entry *out)
{
	struct ovl_disk_dentry dentry;
	struct ovl_disk_inode inode;
	struct ovl_disk_link link;
	ovl_err_t err = get_dentry(ix, at, &dentry);

	if (err)
		return err;
	if (dentry.parent != dir)
		return -EUCLEAN;
	memset(out, 0, sizeof(*out));
	out->name = ix->heap + dentry.name;
	out->name_len = dentry.name_len;
	if (memchr(out->name, '/', out->name_len) || memchr(out->name, 0, out->name_len) ||
	    (out->name[0] == '.' && (out->name_len == 1 || (out->name_len == 2 && out->name[1] == '.'))))
		return -EUCLEAN; /* would be taken for a path, or would lead out of the directory */
	switch (dentry.what) {
	case OVL_WHITEOUT:
		out->what = OVL_WHITEOUT;
		return 0;
	case OVL_DIRECTORY:
	case OVL_OTHER:
		err = get_inode(ix, dentry.ref, &inode);
		if (err)
			return err;
		if ((dentry.what == OVL_DIRECTORY) != S_ISDIR(inode.mode) || dentry.ref == OVL_INDEX_ROOT)
			return -EUCLEAN;
		if (dentry.what == OVL_DIRECTORY && (dentry.ref <= dir || inode.first_dentry != at))
			return -EUCLEAN; /* a cycle, or a second name for a directory */
		out->what = dentry.what == OVL_DIRECTORY ? OVL_DIRECTORY : OVL_OTHER;
		out->ref = dentry.ref;
		out->flags = inode.flags;
		out->mode = inode.mode;
		return 0;
	case OVL_LINK_BELOW:
		if (dentry.ref >= ix->link_count)
			return -EUCLEAN;
		memcpy(&link, ix->links + (size_t)dentry.ref * sizeof(link), sizeof(link));
		out->what = OVL_LINK_BELOW;
		out->target = heap_at(ix, link.target, link.target_len);
		out->target_len = link.target_len;
		if (!out->target || out->target_len == 0 || memchr(out->target, 0, out->target_len))
			return -EUCLEAN;
		if (link.forward) {
			err = get_inode(ix, link.forward, &inode);
			if (err)
				return err;
			if (S_ISDIR(inode.mode))
				return -EUCLEAN;
			out->ref = link.forward;
		}
		return 0;
	default:
		return -EUCLEAN;
	}
}

/* ---- directories -------------------------------------------------------------------------------------- */

static int compare_names(const uint8_t *a, size_t a_len, const uint8_t *b, size_t b_len)
{
	int order = memcmp(a, b, a_len < b_len ? a_len : b_len);

	if (order != 0)
		return order;
	return a_len < b_len ? -1 : a_len > b_len;
}

ovl_err_t ovl_index_lookup(const struct ovl_index *ix, uint32_t dir, const void *name, size_t name_len,
			   struct ovl_index_entry *out)
{
	uint32_t low, count;
	ovl_err_t err = get_run(ix, dir, &low, &count);

	if (err)
		return err;
	while (count > 0) {
		struct ovl_disk_dentry dentry;
		uint32_t half = count / 2;
		int order;

		err = get_dentry(ix, low + half, &dentry);
		if (err)
			return err;
		order = compare_names(ix->heap + dentry.name, dentry.name_len, name, name_len);
		if (order == 0)
			return get_entry(ix, dir, low + half, out);
		if (order < 0) {
			low += half + 1;
			count -= half + 1;
		} else {
			count = half;
		}
	}
	return -ENOENT;
}

ovl_err_t ovl_index_list(const struct ovl_index *ix, uint32_t dir, struct ovl_index_iter *iter, uint32_t *count)
{
	uint32_t first = 0, run = 0;
	ovl_err_t err = get_run(ix, dir, &first, &run);

	*iter = (struct ovl_index_iter){.ix = ix, .dir = dir, .next = first, .end = first + run};
	if (count)
		*count = run;
	return err;
}

int ovl_index_next(struct ovl_index_iter *iter, struct ovl_index_entry *out)
{
	ovl_err_t err;

	if (iter->next >= iter->end)
		return 0;
	err = get_entry(iter->ix, iter->dir, iter->next, out);
	if (err)
		return err;
	iter->next++;
	return 1;
}

/* ---- inodes ------------------------------------------------------------------------------------------- */

ovl_err_t ovl_index_attr(const struct ovl_index *ix, uint32_t ref, struct ovl_index_attr *out)
{
	struct ovl_index_extent_iter extents;
	struct ovl_index_extent extent;
	struct ovl_disk_inode inode;
	uint64_t stored = 0;
	ovl_err_t err = get_inode(ix, ref, &inode);
	int more;

	if (err)
		return err;
	if (inode.mtime_nsec >= 1000000000u || inode.mtime_sec > OVL_TAR_MTIME_MAX ||
	    inode.mtime_sec < -OVL_TAR_MTIME_MAX || inode.size > OVL_TAR_SIZE_MAX)
		return -EUCLEAN;
	*out = (struct ovl_index_attr){
		.mode = inode.mode,
		.nlink = inode.nlink,
		.uid = inode.uid,
		.gid = inode.gid,
		.flags = inode.flags,
		.mtime_sec = inode.mtime_sec,
		.mtime_nsec = inode.mtime_nsec,
	};
	switch (inode.mode & S_IFMT) {
	case S_IFREG:
		err = ovl_index_extents(ix, ref, &extents);
		if (err)
			return err;
		while ((more = ovl_index_next_extent(&extents, &extent)) == 1)
			stored += extent.length;
		if (more < 0)
			return more;
		out->size = inode.size;
		out->blocks = stored / 512 + (stored % 512 != 0);
		return 0;
	case S_IFDIR:
		out->size = 4096;
		out->blocks = 8;
		return 0;
	case S_IFLNK:
		out->size = inode.size;
		return 0;
	case S_IFCHR:
	case S_IFBLK:
		out->rdev = (uint32_t)inode.data;
		return 0;
	case S_IFIFO:
		return 0;
	default:
		return -EUCLEAN;
	}
}

ovl_err_t ovl_index_readlink(const struct ovl_index *ix, uint32_t ref, const uint8_t **target, size_t *target_len)
{
	struct ovl_disk_inode inode;
	ovl_err_t err = get_inode(ix, ref, &inode);

	if (err)
		return err;
	if (!S_ISLNK(inode.mode))
		return -EINVAL;
	*target = heap_at(ix, inode.data, inode.size);
	if (!*target || inode.size == 0 || inode.size > OVL_TAR_TARGET_MAX)
		return -EUCLEAN;
	*target_len = (size_t)inode.size;
	return 0;
}

ovl_err_t ovl_index_xattrs(const struct ovl_index *ix, uint32_t ref, struct ovl_index_xattr_iter *iter)
{
	struct ovl_disk_xattrs block;
	struct ovl_disk_inode inode;
	uint32_t at;
	ovl_err_t err = get_inode(ix, ref, &inode);

	*iter = (struct ovl_index_xattr_iter){0};
	if (err || inode.xattr == 0)
		return err;
	at = inode.xattr - 1;
	if (at > ix->xattr_bytes || ix->xattr_bytes - at < sizeof(block))
		return -EUCLEAN;
	memcpy(&block, ix->xattrs + at, sizeof(block));
	if (block.bytes > ix->xattr_bytes - at - sizeof(block))
		return -EUCLEAN;
	iter->pos = ix->xattrs + at + sizeof(block);
	iter->end = iter->pos + block.bytes;
	iter->left = block.count;
	return 0;
}

int ovl_index_next_xattr(struct ovl_index_xattr_iter *iter, const uint8_t **name, size_t *name_len,
			 const uint8_t **value, size_t *value_len)
{
	struct ovl_disk_xattr head;

	if (iter->left == 0)
		return 0;
	if ((size_t)(iter->end - iter->pos) < sizeof(head))
		return -EUCLEAN;
	memcpy(&head, iter->pos, sizeof(head));
	if ((uint64_t)head.name_len + head.value_len > (size_t)(iter->end - iter->pos) - sizeof(head) ||
	    head.name_len == 0)
		return -EUCLEAN;
	*name = iter->pos + sizeof(head);
	*name_len = head.name_len;
	*value = *name + head.name_len;
	*value_len = head.value_len;
	if (memchr(*name, 0, *name_len))
		return -EUCLEAN; /* a caller would print or compare it as a C string */
	iter->pos = *value + head.value_len;
	iter->left--;
	return 1;
}

ovl_err_t ovl_index_extents(const struct ovl_index *ix, uint32_t ref, struct ovl_index_extent_iter *iter)
{
	struct ovl_disk_inode inode;
	ovl_err_t err = get_inode(ix, ref, &inode);

	if (err)
		return err;
	if (!S_ISREG(inode.mode))
		return -EINVAL;
	*iter = (struct ovl_index_extent_iter){.ix = ix, .size = inode.size};
	if (inode.flags & OVL_IX_SPARSE) {
		iter->next = (uint32_t)inode.data;
		iter->left = (uint32_t)(inode.data >> 32);
		if (iter->next > ix->extent_count || iter->left > ix->extent_count - iter->next)
			return -EUCLEAN;
		return 0;
	}
	if (inode.size > OVL_TAR_SIZE_MAX || inode.data > OVL_TAR_SIZE_MAX)
		return -EUCLEAN;
	iter->plain = (struct ovl_index_extent){.logical = 0, .length = inode.size, .physical = inode.data};
	return 0;
}

int ovl_index_next_extent(struct ovl_index_extent_iter *iter, struct ovl_index_extent *out)
{
	struct ovl_disk_extent disk;

	if (iter->plain.length > 0) {
		*out = iter->plain;
		iter->plain.length = 0;
		return 1;
	}
	if (iter->left == 0)
		return 0;
	memcpy(&disk, iter->ix->extents + (size_t)iter->next * sizeof(disk), sizeof(disk));
	if (disk.length == 0 || disk.logical < iter->floor || disk.logical > iter->size ||
	    disk.length > iter->size - disk.logical || disk.physical > OVL_TAR_SIZE_MAX ||
	    disk.length > OVL_TAR_SIZE_MAX)
		return -EUCLEAN;
	*out = (struct ovl_index_extent){disk.logical, disk.length, disk.physical};
	iter->floor = disk.logical + disk.length;
	iter->next++;
	iter->left--;
	return 1;
}

/* ---- names and paths ---------------------------------------------------------------------------------- */

ovl_err_t ovl_index_names(const struct ovl_index *ix, uint32_t ref, struct ovl_index_name_iter *iter)
{
	struct ovl_disk_inode inode;
	ovl_err_t err = get_inode(ix, ref, &inode);

	if (err)
		return err;
	/* `left` ends a chain that a damaged image ties into a ring. */
	*iter = (struct ovl_index_name_iter){
		.ix = ix,
		.ref = ref,
		.next = inode.first_dentry,
		.left = S_ISDIR(inode.mode) ? 1 : inode.nlink,
	};
	return 0;
}

int ovl_index_next_name(struct ovl_index_name_iter *iter, uint32_t *parent, const uint8_t **name, size_t *name_len)
{
	struct ovl_disk_dentry dentry;
	ovl_err_t err;

	if (iter->next == OVL_INDEX_NONE)
		return 0;
	if (iter->left == 0)
		return -EUCLEAN;
	err = get_dentry(iter->ix, iter->next, &dentry);
	if (err)
		return err;
	if (dentry.ref != iter->ref || (dentry.what != OVL_DIRECTORY && dentry.what != OVL_OTHER) ||
	    (dentry.next != OVL_INDEX_NONE && dentry.next <= iter->next))
		return -EUCLEAN;
	*parent = dentry.parent;
	*name = iter->ix->heap + dentry.name;
	*name_len = dentry.name_len;
	iter->next = dentry.next;
	iter->left--;
	return 1;
}

/* Fills `buf` from its end towards its start as it climbs, then moves the result to the front. */
ovl_err_t ovl_index_path(const struct ovl_index *ix, uint32_t dir, const uint8_t *name, size_t name_len, uint8_t *buf,
			 size_t size, size_t *path_len)
{
	struct ovl_disk_dentry dentry;
	struct ovl_disk_inode inode;
	size_t need = name_len;

	if (size > 0 && name_len > 0 && name_len <= size)
		memcpy(buf + size - name_len, name, name_len);
	for (uint32_t depth = 0; dir != OVL_INDEX_ROOT; depth++) {
		ovl_err_t err = get_inode(ix, dir, &inode);

		if (!err && (!S_ISDIR(inode.mode) || depth > OVL_INDEX_DEPTH_MAX))
			err = -EUCLEAN;
		if (!err)
			err = get_dentry(ix, inode.first_dentry, &dentry);
		if (!err && (dentry.ref != dir || dentry.parent >= dir))
			err = -EUCLEAN;
		if (err)
			return err;
		if (need > 0 && ++need <= size)
			buf[size - need] = '/';
		need += dentry.name_len;
		if (need <= size)
			memcpy(buf + size - need, ix->heap + dentry.name, dentry.name_len);
		dir = dentry.parent;
	}
	*path_len = need;
	if (need > size)
		return -ERANGE;
	if (need > 0)
		memmove(buf, buf + size - need, need);
	return 0;
}
