/*
 * lane_file.c - open files: where do the bytes come from, and who carries them?
 *
 *      handle (fh) ---> struct ovl_lane_file     what was opened: upper file, lower file, piece of a tar
 *                           |
 *                           v
 *      nodeid ------> struct ovl_lane_io         what all handles of one inode share: the upper file's descriptor,
 *                                                who writes, passthrough or page cache
 *
 * Passthrough (FUSE_PASSTHROUGH): the kernel reads and writes the upper file itself.  All handles of an inode must agree
 * (Linux fs/fuse/iomode.c), so the choice is made by the first: passthrough if nobody has the inode open through the
 * page cache, the page cache as long as somebody has.  Traps, each with its test in tests/fuse:
 *   - only files whose data is in the upperdir: a descriptor of a lower file would let the kernel write to the layer;
 *   - a reader that opened the lower file keeps the inode in the page cache until it closes, also over a copy-up;
 *   - what was written so is not in the page cache, so a later open through it must not keep old pages;
 *   - the size and times are those of the file, asked for when they are told (ovl_tree_set_live).
 *   - set-user-ID files are written through the page cache: who passes writes through does not take the bits away.
 *
 * A handle that was opened on a lower file goes over to the upper file at its next read after a copy-up, so it sees what
 * others write (kernel: file.c: ovl_real_fdget(), since 4.19).
 *
 * Reference: ovlfs/overlay/file.py (Handle), ovlfs/fuse/lane.py.
 *
 * Locks: files.lock for the tables and counts; data is moved without it: a file is counted by who uses it.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "lane_fs.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/uio.h>
#include <sys/xattr.h>
#include <unistd.h>

/* Newer than the headers of some distributions: include/uapi/linux/fuse.h. */
struct backing_map {
	int32_t fd;
	uint32_t flags;
	uint64_t padding;
};
static_assert(sizeof(struct backing_map) == 16, "wire format");
#define BACKING_OPEN _IOW(229, 1, struct backing_map)
#define BACKING_CLOSE _IOW(229, 2, uint32_t)
#define OPENED_PASSTHROUGH (1u << 7)
#define OPENED_NOFLUSH (1u << 5)
#define WRITE_KILL_SUIDGID (1u << 2)
#define OPEN_KILL_SUIDGID (1u << 0)
#define COPY_MAX (64u << 20) /* what one copy does at most; the caller asks again */
#define PIECE 65536u

static_assert(sizeof(struct fuse_open_in) == 8, "wire format");
static_assert(sizeof(struct fuse_open_out) == 16, "wire format");
static_assert(sizeof(struct fuse_read_in) == 40, "wire format");
static_assert(sizeof(struct fuse_write_in) == 40, "wire format");
static_assert(sizeof(struct fuse_write_out) == 8, "wire format");
static_assert(sizeof(struct fuse_release_in) == 24, "wire format");
static_assert(sizeof(struct fuse_fsync_in) == 16, "wire format");
static_assert(sizeof(struct fuse_fallocate_in) == 32, "wire format");
static_assert(sizeof(struct fuse_lseek_in) == 24, "wire format");
static_assert(sizeof(struct fuse_copy_file_range_in) == 56, "wire format");

struct ovl_lane_io {
	struct ovl_lane_io *next;
	uint64_t nodeid;
	int fd;         /* the upper file, O_RDWR; -1: not open, or not to be had */
	int32_t backing; /* its id in the kernel; 0: none */
	size_t handles, cached, passed, writers;
	bool bare; /* made here, and nobody has set an xattr since: there are no capabilities to ask the disk for */
};

struct ovl_lane_file {
	struct ovl_lane_io *io;
	size_t users;   /* protected by files.lock: the handle is one */
	uint64_t nodeid;
	uint32_t flags; /* of the open */
	bool upper, tar, passed;
	int fd;         /* not tar: where to read and write; io->fd, or owned */
	atomic_int followed; /* a lower file's: the upper file since a copy-up, owned; -1: none yet */
	uint64_t size;  /* lower: what there has to be */
	const struct ovl_layer *layer; /* tar */
	uint32_t ref;                  /* tar */
};

/* ---- tables ------------------------------------------------------------------------------------------- */

int ovl_lane_files_init(struct ovl_lane_files *files)
{
	*files = (struct ovl_lane_files){0};
	return -pthread_mutex_init(&files->lock, NULL);
}

static struct ovl_lane_io **io_slot(struct ovl_lane_files *files, uint64_t nodeid)
{
	uint64_t hash = nodeid * 0x9E3779B97F4A7C15ull;
	struct ovl_lane_io **at = &files->io[hash >> 56];

	while (*at && (*at)->nodeid != nodeid)
		at = &(*at)->next;
	return at;
}

static ovl_err_t io_need(struct ovl_lane_files *files, uint64_t nodeid, struct ovl_lane_io **out)
{
	struct ovl_lane_io **slot = io_slot(files, nodeid);

	if (!*slot) {
		*slot = malloc(sizeof(**slot));
		if (!*slot)
			return -ENOMEM;
		**slot = (struct ovl_lane_io){.nodeid = nodeid, .fd = -1};
	}
	*out = *slot;
	return 0;
}

static void io_drop_if_unused(struct ovl_lane_fs *fs, struct ovl_lane_io *io)
{
	struct ovl_lane_io **slot = io_slot(&fs->files, io->nodeid);

	if (io->handles > 0)
		return;
	if (io->backing > 0) {
		uint32_t id = (uint32_t)io->backing;

		(void)ioctl(fs->dev_fd, BACKING_CLOSE, &id); /* the connection is gone: so are its backing files */
	}
	if (io->fd >= 0)
		close(io->fd);
	*slot = io->next;
	free(io);
}

static ovl_err_t slot_reserve(struct ovl_lane_files *files)
{
	size_t more = files->slot_count ? files->slot_count * 2 : 64;
	struct ovl_lane_file **slots;

	while (files->free_slot < files->slot_count && files->slots[files->free_slot])
		files->free_slot++;
	if (files->free_slot < files->slot_count)
		return 0;
	if (more > SIZE_MAX / sizeof(*slots))
		return -ENFILE;
	slots = reallocarray(files->slots, more, sizeof(*slots));
	if (!slots)
		return -ENOMEM;
	memset(slots + files->slot_count, 0, (more - files->slot_count) * sizeof(*slots));
	files->slots = slots;
	files->slot_count = more;
	return 0;
}

/* The file of a handle, counted; NULL: there is no such handle of this inode. */
static struct ovl_lane_file *file_get(struct ovl_lane_fs *fs, uint64_t fh, uint64_t nodeid)
{
	struct ovl_lane_files *files = &fs->files;
	struct ovl_lane_file *file = NULL;

	pthread_mutex_lock(&files->lock);
	if (fh > 0 && fh <= files->slot_count)
		file = files->slots[fh - 1];
	if (file && file->nodeid != nodeid)
		file = NULL;
	if (file)
		file->users++;
	pthread_mutex_unlock(&files->lock);
	return file;
}

static void file_free(struct ovl_lane_fs *fs, struct ovl_lane_file *file)
{
	struct ovl_lane_io *io = file->io;
	int followed = atomic_load(&file->followed);

	if (file->fd >= 0 && file->fd != io->fd)
		close(file->fd);
	if (followed >= 0)
		close(followed);
	io->handles--;
	if (file->passed)
		io->passed--;
	else
		io->cached--;
	if (file->upper && (file->flags & O_ACCMODE) != O_RDONLY && --io->writers == 0)
		(void)ovl_tree_set_live(fs->tree, io->nodeid, -1); /* -ESTALE: it is forgotten already */
	io_drop_if_unused(fs, io);
	free(file);
}

static void file_put(struct ovl_lane_fs *fs, struct ovl_lane_file *file)
{
	pthread_mutex_lock(&fs->files.lock);
	if (--file->users == 0)
		file_free(fs, file);
	pthread_mutex_unlock(&fs->files.lock);
}

void ovl_lane_files_destroy(struct ovl_lane_fs *fs)
{
	struct ovl_lane_files *files = &fs->files;

	for (size_t i = 0; i < files->slot_count; i++)
		if (files->slots[i])
			file_free(fs, files->slots[i]);
	free(files->slots);
	pthread_mutex_destroy(&files->lock);
}

/* ---- opening ------------------------------------------------------------------------------------------ */

/* Has the kernel carry the data of `io` itself?  The lock is held. */
static bool pass_through(struct ovl_lane_fs *fs, struct ovl_lane_io *io, uint32_t mode)
{
	struct backing_map map = {.fd = io->fd};
	int id;

	if (io->passed > 0)
		return true; /* all must agree */
	if (!atomic_load(&fs->passthrough) || io->cached > 0 || io->fd < 0 || mode & (S_ISUID | S_ISGID))
		return false;
	if (io->backing == 0) {
		id = ioctl(fs->dev_fd, BACKING_OPEN, &map);
		if (id <= 0) {
			/* EPERM: not CAP_SYS_ADMIN; ELOOP: the upperdir is on a stacked file system.  It stays so. */
			if (errno == EPERM || errno == ELOOP || errno == ENOTTY || errno == EINVAL || errno == EOPNOTSUPP)
				atomic_store(&fs->passthrough, false);
			return false;
		}
		io->backing = id;
	}
	return true;
}

static bool wants_write(uint32_t flags)
{
	return (flags & O_ACCMODE) != O_RDONLY;
}

/* The upper file of `io`, opened if need be.  The lock is held. */
static ovl_err_t open_upper_file(struct ovl_lane_fs *fs, struct ovl_lane_io *io, struct ovl_lane_file *file)
{
	struct ovl_data data;
	ovl_err_t err;

	file->upper = true;
	if (io->fd >= 0) {
		file->fd = io->fd;
		return 0;
	}
	err = ovl_tree_open_data(fs->tree, file->nodeid, O_RDWR, &data);
	if (!err) {
		file->fd = io->fd = data.fd;
		return 0;
	}
	if (wants_write(file->flags) || (err != -EACCES && err != -EPERM && err != -EROFS && err != -ETXTBSY))
		return err;
	err = ovl_tree_open_data(fs->tree, file->nodeid, O_RDONLY, &data); /* this handle's own */
	file->fd = data.fd;
	return err;
}

static ovl_err_t open_lower_file(struct ovl_lane_fs *fs, struct ovl_lane_file *file)
{
	struct ovl_data data;
	ovl_err_t err = ovl_tree_open_data(fs->tree, file->nodeid, O_RDONLY, &data);

	if (err)
		return err;
	file->upper = data.upper; /* copied up just now */
	file->tar = data.kind == OVL_DATA_TAR;
	file->fd = data.fd;
	file->size = data.size;
	file->layer = data.layer;
	file->ref = data.ref;
	return 0;
}

ovl_err_t ovl_lane_file_open(struct ovl_lane_fs *fs, uint64_t nodeid, uint32_t flags, int fd, struct fuse_open_out *out)
{
	struct ovl_lane_files *files = &fs->files;
	struct ovl_lane_file *file = malloc(sizeof(*file));
	struct ovl_lane_io *io = NULL;
	struct ovl_entry entry;
	ovl_err_t err = -ENOMEM;

	pthread_mutex_lock(&files->lock);
	if (!file)
		goto out;
	*file = (struct ovl_lane_file){.users = 1, .nodeid = nodeid, .flags = flags, .fd = -1};
	atomic_init(&file->followed, -1);
	err = slot_reserve(files);
	if (!err)
		err = ovl_tree_get(fs->tree, nodeid, &entry);
	if (!err)
		err = io_need(files, nodeid, &io);
	if (err)
		goto out;
	if (fd >= 0 && io->fd < 0) {
		io->fd = fd;
		io->bare = true;
		fd = -1;
	}
	err = ovl_tree_has_upper_data(fs->tree, nodeid) ? open_upper_file(fs, io, file) : open_lower_file(fs, file);
	if (!err && wants_write(flags) && (!file->upper || io->fd < 0))
		err = -EIO; /* whoever passed it on has seen to the copy-up */
	if (!err && wants_write(flags) && io->writers == 0)
		err = ovl_tree_set_live(fs->tree, nodeid, io->fd);
	if (err)
		goto out;
	file->io = io;
	file->passed = file->upper && file->fd == io->fd && pass_through(fs, io, entry.attr.mode);
	io->handles++;
	if (file->passed)
		io->passed++;
	else
		io->cached++;
	if (wants_write(flags))
		io->writers++;
	files->slots[files->free_slot] = file;
	*out = (struct fuse_open_out){.fh = files->free_slot + 1};
	/* Where some opens pass the page cache by, what is in it may be old. */
	if (file->passed) {
		out->open_flags = OPENED_PASSTHROUGH | OPENED_NOFLUSH;
		out->padding = (uint32_t)io->backing;
	} else {
		out->open_flags = OPENED_NOFLUSH;
		if (!file->upper || !atomic_load(&fs->passthrough))
			out->open_flags |= FOPEN_KEEP_CACHE;
	}
	file = NULL;
out:
	if (file) {
		if (file->fd >= 0 && (!io || file->fd != io->fd))
			close(file->fd);
		free(file);
	}
	if (err && io)
		io_drop_if_unused(fs, io);
	pthread_mutex_unlock(&files->lock);
	if (fd >= 0)
		close(fd);
	return err;
}

void ovl_lane_file_release(struct ovl_lane_fs *fs, uint64_t fh)
{
	struct ovl_lane_files *files = &fs->files;
	struct ovl_lane_file *file = NULL;

	pthread_mutex_lock(&files->lock);
	if (fh > 0 && fh <= files->slot_count) {
		file = files->slots[fh - 1];
		files->slots[fh - 1] = NULL;
		if (fh - 1 < files->free_slot)
			files->free_slot = fh - 1;
	}
	if (file && --file->users == 0)
		file_free(fs, file);
	pthread_mutex_unlock(&files->lock);
}

/* The descriptor to change a file by, if a client has it open for writing. */
int ovl_lane_file_fd(struct ovl_lane_fs *fs, uint64_t fh, uint64_t nodeid)
{
	struct ovl_lane_files *files = &fs->files;
	int fd = -1;

	pthread_mutex_lock(&files->lock);
	if (fh > 0 && fh <= files->slot_count && files->slots[fh - 1] && files->slots[fh - 1]->nodeid == nodeid &&
	    files->slots[fh - 1]->upper)
		fd = files->slots[fh - 1]->io->fd;
	pthread_mutex_unlock(&files->lock);
	return fd;
}

bool ovl_lane_file_is_bare(struct ovl_lane_fs *fs, uint64_t nodeid)
{
	const struct ovl_lane_io *io;
	bool yes;

	pthread_mutex_lock(&fs->files.lock);
	io = *io_slot(&fs->files, nodeid);
	yes = io && io->bare;
	pthread_mutex_unlock(&fs->files.lock);
	return yes;
}

void ovl_lane_file_dress(struct ovl_lane_fs *fs, uint64_t nodeid)
{
	struct ovl_lane_io *io;

	pthread_mutex_lock(&fs->files.lock);
	io = *io_slot(&fs->files, nodeid);
	if (io)
		io->bare = false;
	pthread_mutex_unlock(&fs->files.lock);
}

ovl_err_t ovl_lane_truncate_opened(struct ovl_lane_fs *fs, uint64_t nodeid, uint64_t fh, bool kill)
{
	const struct timespec times[2] = {{.tv_nsec = UTIME_OMIT}, {.tv_nsec = UTIME_NOW}};
	int fd = ovl_lane_file_fd(fs, fh, nodeid);
	struct ovl_entry entry;
	struct stat st;

	if (fd < 0 || fstat(fd, &st) != 0)
		return fd < 0 ? -EIO : -errno;
	if (ftruncate(fd, 0) != 0)
		return -errno;
	if (kill && fs->upper.direct && ovl_lane_mode_killed(st.st_mode) != st.st_mode &&
	    fchmod(fd, ovl_lane_mode_killed(st.st_mode) & 07777) != 0)
		return -errno;
	if (futimens(fd, times) != 0)
		return -errno;
	return ovl_lane_refresh(fs, nodeid, fd, &entry);
}

enum ovl_lane_verdict ovl_lane_open(struct ovl_lane_ask *ask)
{
	struct ovl_lane_fs *fs = ask->fs;
	struct fuse_open_out out;
	struct fuse_open_in in;
	bool change, gated;
	ovl_err_t err;

	if (ask->size < sizeof(in))
		return ovl_lane_fail(ask, EIO);
	memcpy(&in, ask->body, sizeof(in));
	change = wants_write(in.flags) || in.flags & O_TRUNC;
	if (fs->no_open)
		return ovl_lane_fail(ask, change ? EROFS : ENOSYS);
	gated = in.flags & O_TRUNC || (change && !ovl_tree_has_upper_data(fs->tree, ask->header.nodeid));
	if (gated && fs->upper.may_wait)
		ovl_lane_yield(ask->answer->reader);
	if (gated && !ovl_gate_change(&fs->gate))
		return OVL_LANE_PASS;
	if (gated && !ovl_tree_has_upper_data(fs->tree, ask->header.nodeid)) {
		err = ovl_lane_copy_up(fs, ask->header.nodeid, in.flags & O_TRUNC ? OVL_LANE_COPY_EMPTY : OVL_LANE_COPY_DATA);
		if (err) {
			ovl_gate_changed(&fs->gate);
			/* What is passed on Python copies up; then ovl_lane_fs_patch opens it. */
			return err > 0 ? OVL_LANE_PASS : ovl_lane_fail(ask, -err);
		}
	}
	err = ovl_lane_file_open(fs, ask->header.nodeid, in.flags | (in.flags & O_TRUNC ? O_RDWR : 0), -1, &out);
	if (gated) {
		if (!err && in.flags & O_TRUNC) {
			err = ovl_lane_truncate_opened(fs, ask->header.nodeid, out.fh, in.open_flags & OPEN_KILL_SUIDGID);
			if (err)
				ovl_lane_file_release(fs, out.fh);
		}
		ovl_gate_changed(&fs->gate);
		ask->answer->changed = true;
	}
	if (err == OVL_ASK)
		err = -EIO; /* there is no layer that could not be read from here (session.py) */
	if (err)
		return ovl_lane_fail(ask, -err);
	ovl_lane_put(ask->answer, &out, sizeof(out));
	return OVL_LANE_ANSWERED;
}

enum ovl_lane_verdict ovl_lane_release(struct ovl_lane_ask *ask)
{
	struct fuse_release_in in;

	if (ask->size < sizeof(in))
		return ovl_lane_fail(ask, EIO);
	memcpy(&in, ask->body, sizeof(in));
	ovl_lane_file_release(ask->fs, in.fh);
	return OVL_LANE_ANSWERED;
}

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

static ssize_t read_lower(struct ovl_lane_reader *reader, const struct ovl_lane_file *file, unsigned char *to, size_t size, uint64_t offset)
{
	ssize_t got;

	if (file->tar)
		return read_tar(reader, file->layer, file->ref, file->size, to, size, offset);
	if (offset >= file->size)
		return 0;
	if (size > file->size - offset)
		size = (size_t)(file->size - offset);
	got = read_all(reader, file->fd, to, size, offset);
	return got >= 0 && (size_t)got < size ? -EIO : got; /* the layer is shorter than it was */
}

/* The descriptor of the upper file, for a handle that was opened before the copy-up; -1: there was none so far. */
static int follow_copy_up(struct ovl_lane_fs *fs, struct ovl_lane_file *file)
{
	int fd = atomic_load(&file->followed), none = -1;
	struct ovl_data data;

	if (fd >= 0 || !ovl_tree_has_upper_data(fs->tree, file->nodeid))
		return fd;
	if (ovl_tree_open_data(fs->tree, file->nodeid, O_RDONLY, &data))
		return -1; /* the lower file still says what it said */
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
	int fd = file->upper ? file->fd : follow_copy_up(ask->fs, file);

	return fd >= 0 ? read_all(reader, fd, to, size, offset) : read_lower(reader, file, to, size, offset);
}

/* Without an open: the inode alone says what to read. */
static ssize_t read_inode(const struct ovl_lane_ask *ask, unsigned char *to, size_t size, uint64_t offset)
{
	struct ovl_lane_reader *reader = ask->answer->reader;
	struct ovl_lane_file file = {.nodeid = ask->header.nodeid, .fd = -1};
	ovl_err_t err = open_lower_file(ask->fs, &file);
	ssize_t got;

	if (err)
		return err == OVL_ASK ? -EIO : err;
	got = file.upper ? read_all(reader, file.fd, to, size, offset) : read_lower(reader, &file, to, size, offset);
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

	if (ask->size < sizeof(in))
		return ovl_lane_fail(ask, EIO);
	memcpy(&in, ask->body, sizeof(in));
	size = in.size < ask->answer->room ? in.size : ask->answer->room;
	if (in.offset > (uint64_t)INT64_MAX - size)
		return ovl_lane_fail(ask, EINVAL);
	if (ask->fs->no_open) {
		got = read_inode(ask, ask->answer->body, size, in.offset);
	} else {
		file = file_get(ask->fs, in.fh, ask->header.nodeid);
		if (!file)
			return ovl_lane_fail(ask, EBADF);
		got = read_file(ask, file, ask->answer->body, size, in.offset);
		file_put(ask->fs, file);
	}
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

	if (ask->size < sizeof(in))
		return ovl_lane_fail(ask, EIO);
	memcpy(&in, ask->body, sizeof(in));
	if (in.size != ask->size - sizeof(in) || in.offset > (uint64_t)INT64_MAX - in.size)
		return ovl_lane_fail(ask, EIO);
	if (ask->fs->no_open)
		return ovl_lane_fail(ask, EROFS); /* remounted read-write: the kernel did not ask */
	file = file_get(ask->fs, in.fh, ask->header.nodeid);
	if (!file)
		return ovl_lane_fail(ask, EBADF);
	if (ask->fs->upper.may_wait)
		ovl_lane_yield(ask->answer->reader); /* for memory to be written back */
	if (file->upper && wants_write(file->flags))
		n = write_file(ask->fs, file, &in, ask->body + sizeof(in));
	file_put(ask->fs, file);
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
	int error = 0;

	if (ask->size < sizeof(in))
		return ovl_lane_fail(ask, EIO);
	memcpy(&in, ask->body, sizeof(in));
	if (ask->fs->upper.may_wait)
		ovl_lane_yield(ask->answer->reader);
	if (ask->header.opcode == FUSE_FSYNCDIR) {
		int fd = ask->fs->upper.is_volatile ? -EROFS : ovl_tree_open_upper(ask->fs->tree, ask->header.nodeid,
										      O_RDONLY | O_DIRECTORY);

		if (fd == -EROFS || fd == -ENOENT) /* not in the upperdir, or removed: nothing is to be synced */
			return OVL_LANE_ANSWERED;
		if (fd < 0)
			return ovl_lane_fail(ask, -fd);
		error = fsync(fd) != 0 ? errno : 0;
		close(fd);
		return ovl_lane_fail(ask, error);
	}
	if (ask->fs->no_open)
		return OVL_LANE_ANSWERED;
	file = file_get(ask->fs, in.fh, ask->header.nodeid);
	if (!file)
		return ovl_lane_fail(ask, EBADF);
	if (file->upper && !ask->fs->upper.is_volatile &&
	    (in.fsync_flags & FUSE_FSYNC_FDATASYNC ? fdatasync(file->fd) : fsync(file->fd)) != 0)
		error = errno;
	file_put(ask->fs, file);
	return ovl_lane_fail(ask, error);
}

enum ovl_lane_verdict ovl_lane_fallocate(struct ovl_lane_ask *ask)
{
	struct fuse_fallocate_in in;
	struct ovl_lane_file *file;
	int error = EBADF;

	if (ask->size < sizeof(in))
		return ovl_lane_fail(ask, EIO);
	memcpy(&in, ask->body, sizeof(in));
	if (in.offset > INT64_MAX || in.length > INT64_MAX)
		return ovl_lane_fail(ask, EINVAL);
	file = file_get(ask->fs, in.fh, ask->header.nodeid);
	if (!file)
		return ovl_lane_fail(ask, EBADF);
	if (ask->fs->upper.may_wait || in.length > COPY_MAX)
		ovl_lane_yield(ask->answer->reader);
	if (file->upper && wants_write(file->flags))
		error = fallocate(file->fd, (int)in.mode, (off_t)in.offset, (off_t)in.length) != 0
				? errno
				: -kill_for_caller(ask, file);
	file_put(ask->fs, file);
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

enum ovl_lane_verdict ovl_lane_lseek(struct ovl_lane_ask *ask)
{
	struct fuse_lseek_out out = {0};
	struct ovl_lane_file *file;
	struct fuse_lseek_in in;
	int64_t at;
	int fd;

	if (ask->size < sizeof(in))
		return ovl_lane_fail(ask, EIO);
	memcpy(&in, ask->body, sizeof(in));
	if ((in.whence != SEEK_DATA && in.whence != SEEK_HOLE) || in.offset > INT64_MAX)
		return ovl_lane_fail(ask, EINVAL);
	if (ask->fs->no_open)
		return ovl_lane_fail(ask, ENOSYS);
	file = file_get(ask->fs, in.fh, ask->header.nodeid);
	if (!file)
		return ovl_lane_fail(ask, EBADF);
	fd = file->upper ? file->fd : follow_copy_up(ask->fs, file);
	if (fd < 0 && file->tar) {
		at = seek_tar(file, in.offset, in.whence == SEEK_HOLE);
	} else {
		at = lseek(fd >= 0 ? fd : file->fd, (off_t)in.offset, (int)in.whence);
		if (at < 0)
			at = -errno;
	}
	file_put(ask->fs, file);
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
	int fd = from->upper ? from->fd : follow_copy_up(ask->fs, from);
	unsigned char *piece;
	ssize_t got;

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

	if (ask->size < sizeof(in))
		return ovl_lane_fail(ask, EIO);
	memcpy(&in, ask->body, sizeof(in));
	if (in.flags || in.off_in > INT64_MAX || in.off_out > INT64_MAX)
		return ovl_lane_fail(ask, EINVAL);
	if (in.len > COPY_MAX)
		in.len = COPY_MAX;
	ovl_lane_yield(ask->answer->reader);
	from = file_get(ask->fs, in.fh_in, ask->header.nodeid);
	to = file_get(ask->fs, in.fh_out, in.nodeid_out);
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
		file_put(ask->fs, from);
	if (to)
		file_put(ask->fs, to);
	if (n < 0 && done == 0)
		return ovl_lane_fail(ask, (int)-n);
	if (ask->header.opcode == FUSE_COPY_FILE_RANGE) {
		out.size = (uint32_t)done;
		ovl_lane_put(ask->answer, &out, sizeof(out));
	} else {
		ovl_lane_put(ask->answer, &done, sizeof(done));
	}
	return OVL_LANE_ANSWERED;
}
