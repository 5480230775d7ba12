/*
 * lane_copy_up.c - the plain case of a copy-up: a small regular file with one name and no xattrs but
 * the overlay's own, in directories of that kind
 *
 * The reference, and what does every other case, is ovlfs/overlay/copy_up.py, which says why the steps come in this order.
 * Here the file is made without a name (O_TMPFILE) in workdir and linked into its place: nobody ever sees half of it.
 *
 *      data (if it is wanted: holes stay holes) -> owner, mode -> origin, metacopy -> times -> fsync -> link
 *      -> the parent's times as they were -> the tree is told
 *
 * Kernel: fs/overlayfs/copy_up.c: ovl_copy_up_tmpfile(), ovl_copy_up_file(), ovl_set_origin(), ovl_set_timestamps().
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "lane_fs.h"
#include "lane_trace.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/xattr.h>
#include <unistd.h>

#define DATA_MAX (1u << 20) /* of what is copied here; more is copied by a thread of Python's */
#define NS 1000000000ll
#define XATTRS_BYTES 1024u /* of the list of names */

/* struct ovl_fb, as ovlfs/layer/origin.py packs it. */
struct origin {
	uint8_t version, magic, len, flags, type;
	uint8_t uuid[16];
	uint8_t handle[MAX_HANDLE_SZ];
} __attribute__((packed));
#define ORIGIN_HEAD offsetof(struct origin, handle)
#define ORIGIN_MAGIC 0xfb
#define ORIGIN_TAR 0xf0
static_assert(offsetof(struct origin, handle) == 21, "wire format");

/* include/uapi/linux/fs.h, Linux 6.9 */
struct uuid2 {
	uint8_t len;
	uint8_t uuid[16];
};
#define GET_UUID _IOR(0x15, 0, struct uuid2)

static struct timespec split(int64_t ns)
{
	int64_t rest = ns % NS;

	return (struct timespec){.tv_sec = ns / NS - (rest < 0), .tv_nsec = rest < 0 ? rest + NS : rest};
}

/* The length of overlay.origin's value; 0: the file system has no handles. */
static size_t origin_of(const struct ovl_data *meta, uint64_t ino, struct origin *out)
{
	union {
		struct file_handle head;
		unsigned char room[sizeof(struct file_handle) + MAX_HANDLE_SZ];
	} handle = {.head = {.handle_bytes = MAX_HANDLE_SZ}};
	struct uuid2 uuid = {0};
	int mount;

	*out = (struct origin){.magic = ORIGIN_MAGIC};
	if (meta->kind == OVL_DATA_TAR) {
		out->type = ORIGIN_TAR;
		memcpy(out->uuid, "ovlfs tar layer", 16); /* with its end */
		memcpy(out->handle, &ino, sizeof(ino));
		out->len = ORIGIN_HEAD + sizeof(ino);
		return out->len;
	}
	if (name_to_handle_at(meta->fd, "", &handle.head, &mount, AT_EMPTY_PATH) != 0 ||
	    handle.head.handle_bytes > UINT8_MAX - ORIGIN_HEAD)
		return 0;
	out->type = (uint8_t)handle.head.handle_type;
	if (ioctl(meta->layer->dir.root, GET_UUID, &uuid) == 0 && uuid.len == sizeof(uuid.uuid))
		memcpy(out->uuid, uuid.uuid, sizeof(uuid.uuid));
	memcpy(out->handle, handle.head.f_handle, handle.head.handle_bytes);
	out->len = (uint8_t)(ORIGIN_HEAD + handle.head.handle_bytes);
	return out->len;
}

/* Whether the object's only looks are those of its attributes. */
static bool is_plain(const struct ovl_lane_fs *fs, const struct ovl_data *meta)
{
	const struct ovl_stack *stack = ovl_tree_stack(fs->tree);
	struct ovl_index_xattr_iter iter;
	char names[XATTRS_BYTES];
	ssize_t size;

	/* Another layer's hard link leads here?  Then there are more names than the inode knows. */
	for (const struct ovl_layer *layer = stack->layers + 1; layer < meta->layer; layer++)
		if (layer->kind == OVL_LAYER_TAR && layer->index->link_count > 0)
			return false;
	if (meta->kind == OVL_DATA_TAR)
		return ovl_index_xattrs(meta->layer->index, meta->ref, &iter) == 0 && iter.left == 0;
	size = listxattr(ovl_lane_proc(meta->fd).text, names, sizeof(names));
	for (ssize_t at = 0; at < size; at += (ssize_t)strlen(names + at) + 1)
		if (!ovl_dirlayer_hides(&meta->layer->dir, names + at))
			return false;
	return size >= 0;
}

static ovl_err_t copy_extent(int from, uint64_t physical, int to, uint64_t logical, uint64_t len)
{
	unsigned char piece[16384];

	while (len > 0) {
		off_t in = (off_t)physical, out = (off_t)logical;
		ssize_t n = copy_file_range(from, &in, to, &out, len, 0);

		if (n < 0) { /* not between these two: by hand */
			n = pread(from, piece, len < sizeof(piece) ? len : sizeof(piece), (off_t)physical);
			if (n > 0)
				n = pwrite(to, piece, (size_t)n, (off_t)logical);
		}
		if (n <= 0)
			return n < 0 ? -errno : -EIO; /* shorter than it was */
		physical += (uint64_t)n;
		logical += (uint64_t)n;
		len -= (uint64_t)n;
	}
	return 0;
}

static ovl_err_t copy_file(int from, int to, uint64_t size)
{
	for (off_t at = 0; (uint64_t)at < size;) {
		off_t start = lseek(from, at, SEEK_DATA), end;
		ovl_err_t err;

		if (start < 0)
			return errno == ENXIO ? 0 : errno == EINVAL ? copy_extent(from, 0, to, 0, size) : -errno;
		end = lseek(from, start, SEEK_HOLE);
		if (end < 0)
			return -errno;
		if ((uint64_t)end > size)
			end = (off_t)size;
		err = copy_extent(from, (uint64_t)start, to, (uint64_t)start, (uint64_t)(end - start));
		if (err)
			return err;
		at = end;
	}
	return 0;
}

static ovl_err_t copy_tar(const struct ovl_data *data, int to)
{
	struct ovl_index_extent_iter iter;
	struct ovl_index_extent extent;
	ovl_err_t err = ovl_index_extents(data->layer->index, data->ref, &iter);
	int more = 0;

	while (!err && (more = ovl_index_next_extent(&iter, &extent)) == 1)
		err = copy_extent(data->layer->data_fd, data->layer->data_offset + extent.physical, to, extent.logical,
				  extent.length);
	return err ? err : more;
}

static ovl_err_t copy_data(struct ovl_lane_fs *fs, uint64_t nodeid, int to, uint64_t size)
{
	struct ovl_data data;
	struct stat st;
	ovl_err_t err = ovl_tree_open_data(fs->tree, nodeid, O_RDONLY, &data);

	if (err)
		return err;
	if (data.kind == OVL_DATA_TAR)
		err = ovl_layer_is_same(data.layer) ? copy_tar(&data, to) : OVL_ASK;
	else if (fstat(data.fd, &st) != 0 || (uint64_t)st.st_size < size)
		err = -EIO; /* the layer is shorter than it was */
	else
		err = copy_file(data.fd, to, size);
	if (data.fd >= 0)
		close(data.fd);
	return err;
}

static ovl_err_t set_own(const struct ovl_lane_fs *fs, int fd, const char *what, const void *value, size_t size)
{
	char name[64];

	snprintf(name, sizeof(name), "%s%s", fs->upper.prefix, what);
	return fsetxattr(fd, name, value, size, 0) != 0 ? -errno : 0;
}

/* Owner, mode, the overlay's own xattrs, times: in the order of copy_up.py. */
static ovl_err_t describe(const struct ovl_lane_fs *fs, const struct ovl_description *is, const struct ovl_data *meta,
			  bool metacopy, int fd)
{
	const struct ovl_attr *attr = &is->entry.attr;
	const struct timespec times[2] = {split(attr->atime_ns), split(attr->mtime_ns)};
	struct origin origin;
	size_t origin_len = origin_of(meta, is->entry.ino, &origin);
	ovl_err_t err = 0;

	if ((attr->uid != fs->uid || attr->gid != fs->gid) && fchown(fd, attr->uid, attr->gid) != 0)
		err = -errno;
	if (!err && fchmod(fd, attr->mode & 07777) != 0)
		err = -errno;
	if (!err && origin_len > 0) {
		err = set_own(fs, fd, "origin", &origin, origin_len);
		if (err == -EOPNOTSUPP || err == -EPERM)
			err = 0; /* good to have */
	}
	if (!err && metacopy)
		err = set_own(fs, fd, "metacopy", "", 0);
	if (!err && futimens(fd, times) != 0)
		err = -errno;
	return err;
}

/* Everything that belongs to the copy of a file. */
static ovl_err_t fill(struct ovl_lane_fs *fs, const struct ovl_description *is, const struct ovl_data *meta, uint64_t size,
		      bool metacopy, int fd)
{
	ovl_err_t err = 0;

	if (size > 0 && !metacopy)
		err = copy_data(fs, is->entry.nodeid, fd, size);
	if (!err && size > 0 && ftruncate(fd, (off_t)size) != 0)
		err = -errno;
	if (!err)
		err = describe(fs, is, meta, metacopy, fd);
	if (!err && size > 0 && !metacopy && !fs->upper.is_volatile && fsync(fd) != 0)
		err = -errno;
	return err;
}

/* Puts the copy into its place; the parent's times stay.  `flags`: of linkat, or 0 for a move. */
static ovl_err_t put_in_place(struct ovl_lane_fs *fs, struct ovl_lane_dir *dir, const char *name, int from_dir,
			      const char *from, int flags)
{
	struct timespec times[2];
	struct stat before;
	ovl_err_t err = 0;

	if (fstat(dir->fd, &before) != 0)
		return -errno;
	ovl_lane_set_impure(fs, dir);
	if ((flags ? linkat(from_dir, from, dir->fd, name, flags)
		   : renameat2(from_dir, from, dir->fd, name, RENAME_NOREPLACE)) != 0)
		err = -errno;
	times[0] = before.st_atim;
	times[1] = before.st_mtim;
	(void)utimensat(dir->fd, "", times, AT_EMPTY_PATH); /* best effort, as the kernel's */
	return err;
}

ovl_err_t ovl_lane_copy_up(struct ovl_lane_fs *fs, uint64_t nodeid, enum ovl_lane_copy how, int *out)
{
	struct ovl_tree_name *names = NULL;
	struct ovl_description is;
	struct ovl_lane_dir *dir;
	struct ovl_data meta = {.fd = -1};
	struct ovl_attr attr;
	struct stat st;
	uint64_t size;
	size_t count;
	uint64_t began_ns = ovl_lane_trace_began(fs->trace);
	bool metacopy;
	int fd = -1;
	ovl_err_t err = OVL_ASK;

	if (!fs->upper.direct || !fs->upper.may_chown || ovl_tree_describe(fs->tree, nodeid, false, &is) || is.upper ||
	    !S_ISREG(is.entry.attr.mode) || is.entry.attr.nlink != 1 || is.name_count != 1 || !is.is_linked)
		return OVL_ASK;
	size = how == OVL_LANE_COPY_EMPTY ? 0 : is.entry.attr.size;
	metacopy = how == OVL_LANE_COPY_META && size > 0;
	if ((metacopy && !fs->upper.metacopy) || (!metacopy && size > DATA_MAX))
		return OVL_ASK;
	if (ovl_tree_names(fs->tree, nodeid, &names, &count) || count != 1)
		goto out;
	dir = ovl_lane_need_dir(fs, names[0].parent);
	if (!dir || ovl_tree_open_meta(fs->tree, nodeid, &meta) || meta.upper || !is_plain(fs, &meta))
		goto out;
	fd = openat(fs->upper.work_fd, ".", O_RDWR | O_TMPFILE | O_CLOEXEC, 0600);
	if (fd < 0)
		goto out;
	err = fill(fs, &is, &meta, size, metacopy, fd);
	if (!err)
		err = put_in_place(fs, dir, (const char *)names[0].name, AT_FDCWD, ovl_lane_proc(fd).text, AT_SYMLINK_FOLLOW);
	if (!err && fstat(fd, &st) != 0)
		err = -errno;
	if (err) {
		if (err == -EEXIST || err == -EINVAL || err == -ENOSYS)
			err = OVL_ASK; /* something is there, or cannot be said so: the reference has to look */
		goto out;
	}
	ovl_attr_of_stat(&st, &attr);
	if (metacopy)
		attr.blocks = is.entry.attr.blocks;
	err = ovl_tree_set_upper(fs->tree, nodeid, st.st_ino, metacopy);
	if (!err)
		err = ovl_tree_set_attr(fs->tree, nodeid, &attr);
	ovl_lane_trace_told(fs->trace, OVL_TRACE_COPY_UP, nodeid, "metadata", metacopy ? strlen("metadata") : 0,
			    metacopy ? 0 : size, began_ns);
	if (!err && out) {
		*out = fd;
		fd = -1;
	}
out:
	if (fd >= 0)
		close(fd);
	if (meta.fd >= 0)
		close(meta.fd);
	free(names);
	return err;
}

#define DEPTH_MAX 64u

/* One directory, whose parent is in the upperdir: made in workdir, and moved into its place. */
static ovl_err_t copy_dir(struct ovl_lane_fs *fs, uint64_t nodeid)
{
	uint64_t began_ns = ovl_lane_trace_began(fs->trace);
	struct ovl_tree_name *names = NULL;
	struct ovl_data meta = {.fd = -1};
	struct ovl_description is;
	struct ovl_lane_dir *dir;
	struct ovl_attr attr;
	char temp[24] = "";
	struct stat st;
	size_t count;
	int fd = -1;
	ovl_err_t err = OVL_ASK;

	if (ovl_tree_describe(fs->tree, nodeid, false, &is) || ovl_tree_names(fs->tree, nodeid, &names, &count) || count != 1)
		goto out;
	dir = ovl_lane_need_dir(fs, names[0].parent);
	if (!dir || ovl_tree_open_meta(fs->tree, nodeid, &meta) || meta.upper || !is_plain(fs, &meta))
		goto out;
	snprintf(temp, sizeof(temp), "#d%x", fs->next_temp++);
	if (mkdirat(fs->upper.work_fd, temp, 0700) != 0) {
		temp[0] = 0;
		goto out;
	}
	err = -EIO;
	fd = openat(fs->upper.work_fd, temp, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
	if (fd < 0)
		goto out;
	err = describe(fs, &is, &meta, false, fd);
	if (!err)
		err = put_in_place(fs, dir, (const char *)names[0].name, fs->upper.work_fd, temp, 0);
	if (!err) {
		temp[0] = 0;
		err = fstat(fd, &st) != 0 ? -errno : 0;
	}
	if (err)
		goto out;
	ovl_attr_of_stat(&st, &attr);
	attr.nlink = 1;
	err = ovl_tree_set_upper(fs->tree, nodeid, st.st_ino, false);
	if (!err)
		err = ovl_tree_set_attr(fs->tree, nodeid, &attr);
	ovl_lane_trace_told(fs->trace, OVL_TRACE_COPY_UP, nodeid, "directory", strlen("directory"), 0, began_ns);
out:
	if (err == -EEXIST || err == -EINVAL || err == -ENOSYS)
		err = OVL_ASK; /* something is there, or cannot be said so: the reference has to look */
	if (temp[0])
		unlinkat(fs->upper.work_fd, temp, AT_REMOVEDIR);
	if (fd >= 0)
		close(fd);
	if (meta.fd >= 0)
		close(meta.fd);
	free(names);
	return err;
}

ovl_err_t ovl_lane_copy_up_dir(struct ovl_lane_fs *fs, uint64_t nodeid)
{
	uint64_t chain[DEPTH_MAX], at = nodeid;
	struct ovl_description is;
	struct ovl_entry parent;
	size_t depth = 0;
	ovl_err_t err = 0;

	if (!fs->upper.direct || !fs->upper.may_chown)
		return OVL_ASK;
	for (;;) {
		if (ovl_tree_describe(fs->tree, at, false, &is) || !is.is_linked)
			return OVL_ASK;
		if (is.upper)
			break;
		if (depth == DEPTH_MAX || ovl_tree_parent(fs->tree, at, &parent) || parent.nodeid == at)
			return OVL_ASK;
		chain[depth++] = at;
		at = parent.nodeid;
	}
	while (!err && depth > 0)
		err = copy_dir(fs, chain[--depth]);
	return err;
}

/* dir.py: _redirect_metacopy(). */
ovl_err_t ovl_lane_redirect_metacopy(struct ovl_lane_fs *fs, uint64_t nodeid, const char *object)
{
	char name[64];
	uint8_t *path;
	size_t len;
	ovl_err_t err = ovl_tree_redirect(fs->tree, nodeid, &path, &len);

	if (err)
		return err;
	snprintf(name, sizeof(name), "%sredirect", fs->upper.prefix);
	err = setxattr(object, name, path, len, 0) != 0 ? -errno : ovl_tree_set_redirect(fs->tree, nodeid);
	free(path);
	return err;
}
