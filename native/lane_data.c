/*
 * lane_data.c - what is in an open file: reading, writing, holes, copies
 *
 * A handle that was opened on a lower file goes over to the upper file at its next read after a copy-up, so it sees what
 * others write (kernel: file.c: ovl_real_fdget(), since 4.19).
 *
 * What may wait for a disk lets another thread read requests first (ovl_lane_yield).
 *
 * Reference: ovlfs/overlay/file.py (Handle), ovlfs/fuse/lane.py.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "lane_file.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <sys/xattr.h>
#include <unistd.h>

#define WRITE_KILL_SUIDGID (1u << 2) /* FUSE_WRITE_KILL_SUIDGID */
#define COPY_MAX (64u << 20) /* what one copy does at most; the caller asks again */
#define PIECE 65536u

static_assert(sizeof(struct fuse_read_in) == 40, "wire format");
static_assert(sizeof(struct fuse_write_in) == 40, "wire format");
static_assert(sizeof(struct fuse_write_out) == 8, "wire format");
static_assert(sizeof(struct fuse_fsync_in) == 16, "wire format");
static_assert(sizeof(struct fuse_fallocate_in) == 32, "wire format");
static_assert(sizeof(struct fuse_lseek_in) == 24, "wire format");
static_assert(sizeof(struct fuse_copy_file_range_in) == 56, "wire format");

/* ---- reading ------------------------------------------------------------------------------------------ */

/* Bytes read, or -errno; fewer than `size` only at the end of the file.  What is in memory is had without waiting; before
 * the disk is waited for, another thread takes over the reading of requests. */
static ssize_t read_all(struct ovl_lane_reader *reader, int fd, unsigned char *to, size_t size, uint64_t offset)
{
	int how = reader ? RWF_NOWAIT : 0;
	size_t done = 0;

	while (done < size) {
		struct iovec part = {.iov_base = to + done, .iov_len = size - done};
		ssize_t n = preadv2(fd, &part, 1, (off_t)(offset + done), how);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0 && how && (errno == EAGAIN || errno == EOPNOTSUPP)) {
			if (errno == EAGAIN)
				ovl_lane_yield(reader); /* not for EOPNOTSUPP: tmpfs, which has it all in memory */
			how = 0;
			continue;
		}
		if (n < 0)
			return done > 0 ? (ssize_t)done : -errno;
		if (n == 0)
			break;
		done += (size_t)n;
	}
	return (ssize_t)done;
}

/* A piece of a tar: extents, and zeros between them. */
static ssize_t read_tar(struct ovl_lane_reader *reader, const struct ovl_layer *layer, uint32_t ref, uint64_t total, unsigned char *to, size_t size,
			uint64_t offset)
{
	struct ovl_index_extent_iter iter;
	struct ovl_index_extent extent;
	ovl_err_t err = ovl_index_extents(layer->index, ref, &iter);
	size_t filled = 0; /* up to here `to` is written */
	int more;

	if (err)
		return err;
	if (offset >= total)
		return 0;
	if (size > total - offset)
		size = (size_t)(total - offset);
	while ((more = ovl_index_next_extent(&iter, &extent)) == 1) {
		uint64_t end = extent.logical + extent.length; /* the index has checked that it fits */
		uint64_t start = extent.logical > offset ? extent.logical : offset;
		uint64_t stop = end < offset + size ? end : offset + size;
		ssize_t got;

		if (extent.logical >= offset + size)
			break;
		if (start >= stop)
			continue;
		memset(to + filled, 0, (size_t)(start - offset) - filled);
		got = read_all(reader, layer->data_fd, to + (start - offset), (size_t)(stop - start),
			       layer->data_offset + extent.physical + (start - extent.logical));
		if (got < 0)
			return got;
		if ((uint64_t)got < stop - start)
			return -EIO; /* the file is shorter than it was when it was verified */
		filled = (size_t)(stop - offset);
	}
	if (more < 0)
		return more;
	memset(to + filled, 0, size - filled);
	return (ssize_t)size;
}

/* -EREMCHG: the file that the layer lies in was changed; Python decides. */
static ssize_t read_lower(struct ovl_lane_reader *reader, const struct ovl_lane_file *file, unsigned char *to, size_t size,
			  uint64_t offset)
{
	ssize_t got;

	if (file->tar && !ovl_layer_is_same(file->layer))
		return -EREMCHG;
	if (file->tar)
		return read_tar(reader, file->layer, file->ref, file->size, to, size, offset);
	if (offset >= file->size)
		return 0;
	if (size > file->size - offset)
		size = (size_t)(file->size - offset);
	got = read_all(reader, file->fd, to, size, offset);
	return got >= 0 && (size_t)got < size ? -EIO : got; /* the layer is shorter than it was */
}

#define IS_MOVING (-2)

/* The descriptor of the upper file, for a handle that was opened before the copy-up; -1: there was none so far; IS_MOVING:
 * there was one, but it is being renamed just now, so Python has to look. */
static int follow_copy_up(struct ovl_lane_fs *fs, struct ovl_lane_file *file)
{
	int fd = atomic_load(&file->followed), none = -1;
	struct ovl_data data;

	if (fd >= 0 || !ovl_tree_has_upper_data(fs->tree, file->nodeid))
		return fd;
	if (ovl_tree_open_data(fs->tree, file->nodeid, O_RDONLY, &data))
		return IS_MOVING;
	if (!data.upper) {
		if (data.fd >= 0)
			close(data.fd);
		return -1;
	}
	if (!atomic_compare_exchange_strong(&file->followed, &none, data.fd)) {
		close(data.fd);
		return none; /* what another thread has put there */
	}
	return data.fd;
}

static ssize_t read_file(const struct ovl_lane_ask *ask, struct ovl_lane_file *file, unsigned char *to, size_t size,
			 uint64_t offset)
{
	struct ovl_lane_reader *reader = ask->answer->reader;
	ovl_err_t err = ovl_lane_file_find(ask->fs, file);
	int fd;

	if (err)
		return err;
	fd = file->upper ? file->fd : follow_copy_up(ask->fs, file);
	if (fd == IS_MOVING)
		return -EREMCHG;
	return fd >= 0 ? read_all(reader, fd, to, size, offset) : read_lower(reader, file, to, size, offset);
}

/* Without an open: the inode alone says what to read. */
ssize_t ovl_lane_read_inode(const struct ovl_lane_ask *ask, unsigned char *to, size_t size, uint64_t offset)
{
	struct ovl_lane_file file = {.nodeid = ask->header.nodeid, .fd = -1, .followed = -1};
	ssize_t got = read_file(ask, &file, to, size, offset);

	if (file.fd >= 0)
		close(file.fd);
	return got;
}

enum ovl_lane_verdict ovl_lane_read(struct ovl_lane_ask *ask)
{
	struct ovl_lane_file *file;
	struct fuse_read_in in;
	size_t size;
	ssize_t got;

	if (!ovl_lane_head(ask, &in, sizeof(in)))
		return ovl_lane_fail(ask, EIO);
	size = in.size < ask->answer->room ? in.size : ask->answer->room;
	if (in.offset > (uint64_t)INT64_MAX - size)
		return ovl_lane_fail(ask, EINVAL);
	if (ask->fs->no_open) {
		got = ovl_lane_read_inode(ask, ask->answer->body, size, in.offset);
	} else {
		file = ovl_lane_file_get(ask->fs, in.fh, ask->header.nodeid);
		if (!file)
			return ovl_lane_fail(ask, EBADF);
		got = read_file(ask, file, ask->answer->body, size, in.offset);
		ovl_lane_file_put(ask->fs, file);
	}
	if (got == -EREMCHG)
		return OVL_LANE_PASS; /* Python looks whether it was only touched */
	if (got < 0)
		return ovl_lane_fail(ask, (int)-got);
	ask->answer->size = (size_t)got;
	return OVL_LANE_ANSWERED;
}

/* ---- writing ------------------------------------------------------------------------------------------ */

/* File capabilities go when somebody calls write(2); what comes from a mapping, or before the kernel left that to us
 * (HANDLE_KILLPRIV_V2), must not take them.  Our own write does, so they are put back. */
static ssize_t write_keeping_capabilities(int fd, const struct iovec *part, uint64_t offset, int how)
{
	static const char name[] = "security.capability";
	char value[64];
	ssize_t size = fgetxattr(fd, name, value, sizeof(value)), written;
	int error;

	written = pwritev2(fd, part, 1, (off_t)offset, how);
	error = errno;
	if (size > 0 && fsetxattr(fd, name, value, (size_t)size, 0) != 0 && written >= 0)
		return -errno;
	return written < 0 ? -error : written;
}

static ovl_err_t set_killed(struct ovl_lane_fs *fs, const struct ovl_lane_file *file, uint32_t mode, uint32_t killed)
{
	struct ovl_entry entry;

	if (killed == mode)
		return 0;
	if (fchmod(file->fd, killed & 07777) != 0)
		return -errno;
	return ovl_lane_refresh(fs, file->nodeid, file->fd, &entry);
}

/* FALLOCATE and COPY_FILE_RANGE do not say whether set-user-ID bits have to go, as WRITE does: they do unless the caller
 * has CAP_FSETID, which root is taken to have.  Linux fs/attr.c: setattr_should_drop_sgid(); of a caller's groups a
 * request tells one. */
static ovl_err_t kill_for_caller(const struct ovl_lane_ask *ask, const struct ovl_lane_file *file)
{
	struct stat st;
	uint32_t killed;

	if (ask->header.uid == 0 || !atomic_load(&ask->fs->killpriv) || !(file->flags & O_ACCMODE))
		return 0;
	if (fstat(file->fd, &st) != 0)
		return -errno;
	killed = ovl_lane_mode_killed(st.st_mode);
	if (ask->header.gid != st.st_gid)
		killed &= ~(uint32_t)S_ISGID;
	return set_killed(ask->fs, file, st.st_mode, killed);
}

static ssize_t write_file(struct ovl_lane_fs *fs, const struct ovl_lane_file *file, const struct fuse_write_in *in,
			  unsigned char *bytes)
{
	struct iovec part = {.iov_base = bytes, .iov_len = in->size};
	int how = (file->flags & O_SYNC) == O_SYNC ? RWF_SYNC : file->flags & O_DSYNC ? RWF_DSYNC : 0;
	struct stat st;
	ssize_t n;

	if (fs->upper.is_volatile)
		how = 0;
	if (in->write_flags & FUSE_WRITE_CACHE || !atomic_load(&fs->killpriv))
		return write_keeping_capabilities(file->fd, &part, in->offset, how);
	do
		n = pwritev2(file->fd, &part, 1, (off_t)in->offset, how);
	while (n < 0 && errno == EINTR);
	if (n < 0)
		return -errno;
	if (in->write_flags & WRITE_KILL_SUIDGID && fstat(file->fd, &st) == 0) {
		ovl_err_t err = set_killed(fs, file, st.st_mode, ovl_lane_mode_killed(st.st_mode));

		if (err)
			return err;
	}
	return n;
}

enum ovl_lane_verdict ovl_lane_write(struct ovl_lane_ask *ask)
{
	struct fuse_write_out out = {0};
	struct ovl_lane_file *file;
	struct fuse_write_in in;
	ssize_t n = -EBADF;

	if (!ovl_lane_head(ask, &in, sizeof(in)))
		return ovl_lane_fail(ask, EIO);
	if (in.size != ask->size - sizeof(in) || in.offset > (uint64_t)INT64_MAX - in.size)
		return ovl_lane_fail(ask, EIO);
	if (ask->fs->no_open)
		return ovl_lane_fail(ask, EROFS); /* remounted read-write: the kernel did not ask */
	file = ovl_lane_file_get(ask->fs, in.fh, ask->header.nodeid);
	if (!file)
		return ovl_lane_fail(ask, EBADF);
	if (ask->fs->upper.may_wait)
		ovl_lane_yield(ask->answer->reader); /* for memory to be written back */
	if (file->upper && wants_write(file->flags))
		n = write_file(ask->fs, file, &in, ask->body + sizeof(in));
	ovl_lane_file_put(ask->fs, file);
	if (n < 0)
		return ovl_lane_fail(ask, (int)-n);
	out.size = (uint32_t)n;
	ovl_lane_put(ask->answer, &out, sizeof(out));
	return OVL_LANE_ANSWERED;
}

enum ovl_lane_verdict ovl_lane_fsync(struct ovl_lane_ask *ask)
{
	struct ovl_lane_file *file;
	struct fuse_fsync_in in;
	int error = 0, fd;

	if (!ovl_lane_head(ask, &in, sizeof(in)))
		return ovl_lane_fail(ask, EIO);
	if (ask->fs->upper.may_wait)
		ovl_lane_yield(ask->answer->reader);
	if (ask->header.opcode == FUSE_FSYNCDIR) {
		fd = ask->fs->upper.is_volatile ? -EROFS : ovl_tree_open_upper(ask->fs->tree, ask->header.nodeid,
										      O_RDONLY | O_DIRECTORY);

		if (fd == -EROFS || fd == -ENOENT) /* not in the upperdir, or removed: nothing is to be synced */
			return OVL_LANE_ANSWERED;
		if (fd == -ESTALE) { /* it is being renamed; the session knows a directory by its handle */
			in.fh = ask->header.nodeid;
			memcpy(ask->body, &in, sizeof(in));
			return OVL_LANE_PASS;
		}
		if (fd < 0)
			return ovl_lane_fail(ask, -fd);
		error = fsync(fd) != 0 ? errno : 0;
		close(fd);
		return ovl_lane_fail(ask, error);
	}
	if (ask->fs->no_open)
		return OVL_LANE_ANSWERED;
	file = ovl_lane_file_get(ask->fs, in.fh, ask->header.nodeid);
	if (!file)
		return ovl_lane_fail(ask, EBADF);
	/* Also what was opened before the copy-up: POSIX asks for the file, not for who has written. */
	fd = file->upper ? file->fd : follow_copy_up(ask->fs, file);
	if (fd == IS_MOVING)
		error = EIO; /* not synced, and not known why not */
	else if (fd >= 0 && !ask->fs->upper.is_volatile &&
		 (in.fsync_flags & FUSE_FSYNC_FDATASYNC ? fdatasync(fd) : fsync(fd)) != 0)
		error = errno;
	ovl_lane_file_put(ask->fs, file);
	return ovl_lane_fail(ask, error);
}

enum ovl_lane_verdict ovl_lane_fallocate(struct ovl_lane_ask *ask)
{
	struct fuse_fallocate_in in;
	struct ovl_lane_file *file;
	int error = EBADF;

	if (!ovl_lane_head(ask, &in, sizeof(in)))
		return ovl_lane_fail(ask, EIO);
	if (in.offset > INT64_MAX || in.length > INT64_MAX)
		return ovl_lane_fail(ask, EINVAL);
	file = ovl_lane_file_get(ask->fs, in.fh, ask->header.nodeid);
	if (!file)
		return ovl_lane_fail(ask, EBADF);
	if (ask->fs->upper.may_wait || in.length > COPY_MAX)
		ovl_lane_yield(ask->answer->reader);
	if (file->upper && wants_write(file->flags))
		error = fallocate(file->fd, (int)in.mode, (off_t)in.offset, (off_t)in.length) != 0
				? errno
				: -kill_for_caller(ask, file);
	ovl_lane_file_put(ask->fs, file);
	return ovl_lane_fail(ask, error);
}

/* ---- holes, copies ------------------------------------------------------------------------------------ */

/* SEEK_DATA and SEEK_HOLE in a piece of a tar. */
static int64_t seek_tar(const struct ovl_lane_file *file, uint64_t offset, bool hole)
{
	struct ovl_index_extent_iter iter;
	struct ovl_index_extent extent;
	ovl_err_t err = ovl_index_extents(file->layer->index, file->ref, &iter);
	int more;

	if (err)
		return err;
	if (offset >= file->size)
		return -ENXIO;
	while ((more = ovl_index_next_extent(&iter, &extent)) == 1) {
		uint64_t end = extent.logical + extent.length;

		if (end <= offset)
			continue;
		if (!hole)
			return (int64_t)(extent.logical > offset ? extent.logical : offset);
		if (extent.logical > offset)
			return (int64_t)offset;
		offset = end;
	}
	if (more < 0)
		return more;
	if (!hole)
		return -ENXIO;
	return (int64_t)(offset < file->size ? offset : file->size);
}

static int64_t seek_file(struct ovl_lane_fs *fs, struct ovl_lane_file *file, uint64_t offset, uint32_t whence)
{
	ovl_err_t err = ovl_lane_file_find(fs, file);
	off_t at;
	int fd;

	if (err)
		return err;
	fd = file->upper ? file->fd : follow_copy_up(fs, file);
	if (fd < 0 && file->tar)
		return seek_tar(file, offset, whence == SEEK_HOLE);
	at = lseek(fd >= 0 ? fd : file->fd, (off_t)offset, (int)whence);
	return at < 0 ? -errno : at;
}

enum ovl_lane_verdict ovl_lane_lseek(struct ovl_lane_ask *ask)
{
	struct ovl_lane_file unopened = {.nodeid = ask->header.nodeid, .fd = -1, .followed = -1};
	struct fuse_lseek_out out = {0};
	struct ovl_lane_file *file;
	struct fuse_lseek_in in;
	int64_t at;

	if (!ovl_lane_head(ask, &in, sizeof(in)))
		return ovl_lane_fail(ask, EIO);
	if ((in.whence != SEEK_DATA && in.whence != SEEK_HOLE) || in.offset > INT64_MAX)
		return ovl_lane_fail(ask, EINVAL);
	if (ask->fs->no_open) {
		at = seek_file(ask->fs, &unopened, in.offset, in.whence);
		if (unopened.fd >= 0)
			close(unopened.fd);
	} else {
		file = ovl_lane_file_get(ask->fs, in.fh, ask->header.nodeid);
		if (!file)
			return ovl_lane_fail(ask, EBADF);
		at = seek_file(ask->fs, file, in.offset, in.whence);
		ovl_lane_file_put(ask->fs, file);
	}
	if (at < 0)
		return ovl_lane_fail(ask, (int)-at);
	out.offset = (uint64_t)at;
	ovl_lane_put(ask->answer, &out, sizeof(out));
	return OVL_LANE_ANSWERED;
}

static bool is_not_in_kernel(int error)
{
	return error == EOPNOTSUPP || error == EXDEV || error == EINVAL || error == ENOSYS;
}

/* Up to `len` bytes; how many were copied, 0 at the end, or -errno. */
static ssize_t copy_some(const struct ovl_lane_ask *ask, struct ovl_lane_file *from, uint64_t offset, int to, uint64_t to_offset,
			 size_t len)
{
	ovl_err_t err = ovl_lane_file_find(ask->fs, from);
	unsigned char *piece;
	ssize_t got;
	int fd;

	if (err)
		return err;
	fd = from->upper ? from->fd : follow_copy_up(ask->fs, from);
	if (fd == IS_MOVING)
		return -EREMCHG;
	if (fd < 0 && !from->tar)
		fd = from->fd;
	if (fd >= 0) {
		off_t in = (off_t)offset, out = (off_t)to_offset;

		got = copy_file_range(fd, &in, to, &out, len, 0);
		if (got >= 0)
			return got;
		if (!is_not_in_kernel(errno))
			return -errno;
	}
	piece = malloc(PIECE);
	if (!piece)
		return -ENOMEM;
	got = read_file(ask, from, piece, len < PIECE ? len : PIECE, offset);
	if (got > 0) {
		got = pwrite(to, piece, (size_t)got, (off_t)to_offset);
		if (got < 0)
			got = -errno;
	}
	free(piece);
	return got;
}

enum ovl_lane_verdict ovl_lane_copy(struct ovl_lane_ask *ask)
{
	struct ovl_lane_file *from, *to;
	struct fuse_copy_file_range_in in;
	struct fuse_write_out out = {0};
	uint64_t done = 0;
	ssize_t n = -EBADF;

	if (!ovl_lane_head(ask, &in, sizeof(in)))
		return ovl_lane_fail(ask, EIO);
	if (in.flags || in.off_in > INT64_MAX || in.off_out > INT64_MAX)
		return ovl_lane_fail(ask, EINVAL);
	if (in.len > COPY_MAX)
		in.len = COPY_MAX;
	ovl_lane_yield(ask->answer->reader);
	from = ovl_lane_file_get(ask->fs, in.fh_in, ask->header.nodeid);
	to = ovl_lane_file_get(ask->fs, in.fh_out, in.nodeid_out);
	if (from && to && to->upper && wants_write(to->flags)) {
		for (n = 0; done < in.len; done += (uint64_t)n) {
			n = copy_some(ask, from, in.off_in + done, to->fd, in.off_out + done, (size_t)(in.len - done));
			if (n <= 0)
				break;
		}
		if (done > 0 && kill_for_caller(ask, to))
			n = -EIO;
	}
	if (from)
		ovl_lane_file_put(ask->fs, from);
	if (to)
		ovl_lane_file_put(ask->fs, to);
	if (n < 0 && done == 0)
		return ovl_lane_fail(ask, n == -EREMCHG ? EIO : (int)-n);
	if (ask->header.opcode == FUSE_COPY_FILE_RANGE) {
		out.size = (uint32_t)done;
		ovl_lane_put(ask->answer, &out, sizeof(out));
	} else {
		ovl_lane_put(ask->answer, &done, sizeof(done));
	}
	return OVL_LANE_ANSWERED;
}
