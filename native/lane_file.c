/*
 * lane_file.c - open files: which are there, and who carries their bytes?
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
 * Reference: ovlfs/overlay/file.py (Handle), ovlfs/fuse/lane.py.
 *
 * Locks: files.lock for the tables and counts; data is moved without it: a file is counted by who uses it.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "lane_file.h"

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
#define OPEN_KILL_SUIDGID (1u << 0)

static_assert(sizeof(struct fuse_open_in) == 8, "wire format");
static_assert(sizeof(struct fuse_open_out) == 16, "wire format");
static_assert(sizeof(struct fuse_release_in) == 24, "wire format");

/* ---- tables ------------------------------------------------------------------------------------------- */

int ovl_lane_files_init(struct ovl_lane_files *files)
{
	*files = (struct ovl_lane_files){0};
	pthread_cond_init(&files->filled, NULL);
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

struct ovl_lane_file *ovl_lane_file_get(struct ovl_lane_fs *fs, uint64_t fh, uint64_t nodeid)
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

void ovl_lane_file_put(struct ovl_lane_fs *fs, struct ovl_lane_file *file)
{
	pthread_mutex_lock(&fs->files.lock);
	if (--file->users == 0)
		file_free(fs, file);
	pthread_mutex_unlock(&fs->files.lock);
}

size_t ovl_lane_files_count(struct ovl_lane_fs *fs)
{
	struct ovl_lane_files *files = &fs->files;
	size_t count = 0;

	pthread_mutex_lock(&files->lock);
	for (size_t i = 0; i < files->slot_count; i++)
		count += files->slots[i] != NULL;
	pthread_mutex_unlock(&files->lock);
	return count;
}

void ovl_lane_files_destroy(struct ovl_lane_fs *fs)
{
	struct ovl_lane_files *files = &fs->files;

	for (size_t i = 0; i < files->slot_count; i++)
		if (files->slots[i])
			file_free(fs, files->slots[i]);
	free(files->slots);
	pthread_cond_destroy(&files->filled);
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

/* The upper file of `io`, opened if need be.  The lock is held. */
static ovl_err_t open_upper_file(struct ovl_lane_fs *fs, struct ovl_lane_io *io, struct ovl_lane_file *file)
{
	struct ovl_data data;
	ovl_err_t err;

	file->upper = true;
	atomic_store(&file->found, true);
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

ovl_err_t ovl_lane_file_find(struct ovl_lane_fs *fs, struct ovl_lane_file *file)
{
	struct ovl_data data;
	ovl_err_t err = 0;

	if (atomic_load(&file->found))
		return 0;
	pthread_mutex_lock(&fs->files.lock);
	if (!atomic_load(&file->found))
		err = ovl_tree_open_data(fs->tree, file->nodeid, O_RDONLY, &data);
	if (!err && !atomic_load(&file->found)) {
		file->upper = data.upper; /* it was copied up meanwhile */
		file->tar = data.kind == OVL_DATA_TAR;
		file->fd = data.fd;
		file->size = data.size;
		file->layer = data.layer;
		file->ref = data.ref;
		atomic_store(&file->found, true);
	}
	pthread_mutex_unlock(&fs->files.lock);
	return err == OVL_ASK ? -EIO : err;
}

ovl_err_t ovl_lane_file_open(struct ovl_lane_fs *fs, uint64_t nodeid, uint32_t flags, int fd, struct fuse_open_out *out)
{
	struct ovl_lane_files *files = &fs->files;
	struct ovl_lane_file *file = malloc(sizeof(*file));
	struct ovl_lane_io *io = NULL;
	struct ovl_entry entry;
	ovl_err_t err = -ENOMEM;

	pthread_mutex_lock(&files->lock);
	while (nodeid && files->filling == nodeid)
		pthread_cond_wait(&files->filled, &files->lock);
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
	if (ovl_tree_has_upper_data(fs->tree, nodeid))
		err = open_upper_file(fs, io, file);
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

struct ovl_lane_io *ovl_lane_io_hold(struct ovl_lane_fs *fs, uint64_t nodeid, int *fd)
{
	struct ovl_lane_io *io;

	pthread_mutex_lock(&fs->files.lock);
	io = *io_slot(&fs->files, nodeid);
	if (io && io->fd < 0)
		io = NULL;
	if (io) {
		io->handles++;
		*fd = io->fd;
	}
	pthread_mutex_unlock(&fs->files.lock);
	return io;
}

void ovl_lane_io_let_go(struct ovl_lane_fs *fs, struct ovl_lane_io *io)
{
	pthread_mutex_lock(&fs->files.lock);
	io->handles--;
	io_drop_if_unused(fs, io);
	pthread_mutex_unlock(&fs->files.lock);
}

/* The upper file of a handle that nobody else has heard of yet, borrowed; -1: it is none. */
static int fresh_fd(struct ovl_lane_fs *fs, uint64_t fh, uint64_t nodeid)
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
	int fd = fresh_fd(fs, fh, nodeid);
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

/* Somebody made the file set-user-ID while it was open passed through, so it goes on that way for all, and we shall not
 * see the writes that have to take the bits away: they go now. */
static ovl_err_t kill_at_open(struct ovl_lane_fs *fs, uint64_t nodeid, uint64_t fh)
{
	int fd = fresh_fd(fs, fh, nodeid);
	struct ovl_entry entry;
	ovl_err_t err = 0;
	struct stat st;

	if (fd < 0 || !atomic_load(&fs->killpriv))
		return 0;
	if (fstat(fd, &st) != 0)
		err = -errno;
	else if (ovl_lane_mode_killed(st.st_mode) != st.st_mode) {
		if (fchmod(fd, ovl_lane_mode_killed(st.st_mode) & 07777) != 0)
			err = -errno;
		else
			err = ovl_lane_refresh(fs, nodeid, fd, &entry);
	}
	if (err)
		ovl_lane_file_release(fs, fh);
	return err;
}

/* ---- filling ------------------------------------------------------------------------------------------ */

/*
 * The data of a small file of a layer goes into the page cache at its first open, before the open is answered.  That spares
 * the READ, and the GETATTR of the next stat: after a READ the kernel takes the access time for unknown
 * (fs/fuse/file.c: fuse_invalidate_atime()).
 *
 * It must not store what a client has changed meanwhile, nor wait for a page that a client holds while it waits for us:
 *   - nobody copies up, as the gate is ours from before the inode is seen to be a layer's until the data is stored;
 *   - nobody else has the inode open, and who wants to waits for us (`filling`): nobody reads from it.
 */
#define FILL_MAX 65536u

/* The data, in the body of the answer; 0: there is nothing to fill. */
static size_t data_to_fill(struct ovl_lane_ask *ask, uint32_t flags)
{
	size_t size;

	if (!ask->answer->reader || flags & O_DIRECT || !ovl_tree_fill(ask->fs->tree, ask->header.nodeid, FILL_MAX, &size))
		return 0;
	if (size > ask->answer->room || ovl_lane_read_inode(ask, ask->answer->body, size, 0) != (ssize_t)size)
		return 0; /* who reads is told why */
	return size;
}

static void fill(struct ovl_lane_ask *ask, size_t size)
{
	struct ovl_lane_files *files = &ask->fs->files;
	uint64_t nodeid = ask->header.nodeid;
	struct ovl_lane_io *io;

	pthread_mutex_lock(&files->lock);
	io = *io_slot(files, nodeid);
	if (io && io->handles == 1)
		files->filling = nodeid;
	else
		size = 0;
	pthread_mutex_unlock(&files->lock);
	if (size == 0)
		return;
	(void)ovl_lane_store(ask->answer->reader, nodeid, ask->answer->body, size); /* if not, the kernel asks for it */
	pthread_mutex_lock(&files->lock);
	files->filling = 0;
	pthread_cond_broadcast(&files->filled);
	pthread_mutex_unlock(&files->lock);
}

/* Opens a file to read from it, and fills the page cache if that is the time for it. */
static ovl_err_t open_to_read(struct ovl_lane_ask *ask, uint32_t flags, struct fuse_open_out *out)
{
	struct ovl_lane_fs *fs = ask->fs;
	size_t size = data_to_fill(ask, flags);
	ovl_err_t err;

	if (size == 0 || !ovl_gate_change(&fs->gate))
		return ovl_lane_file_open(fs, ask->header.nodeid, flags, -1, out);
	err = ovl_lane_file_open(fs, ask->header.nodeid, flags, -1, out);
	if (!err && !ovl_tree_has_upper_data(fs->tree, ask->header.nodeid))
		fill(ask, size);
	ovl_gate_changed(&fs->gate);
	return err;
}

enum ovl_lane_verdict ovl_lane_open(struct ovl_lane_ask *ask)
{
	struct ovl_lane_fs *fs = ask->fs;
	struct fuse_open_out out;
	struct fuse_open_in in;
	bool change, gated;
	ovl_err_t err;
	int fd = -1;

	if (!ovl_lane_head(ask, &in, sizeof(in)))
		return ovl_lane_fail(ask, EIO);
	change = wants_write(in.flags) || in.flags & O_TRUNC;
	if (fs->no_open)
		return ovl_lane_fail(ask, change ? EROFS : ENOSYS);
	gated = in.flags & O_TRUNC || (change && !ovl_tree_has_upper_data(fs->tree, ask->header.nodeid));
	if (gated && fs->upper.may_wait)
		ovl_lane_yield(ask->answer->reader);
	if (gated && !ovl_gate_change(&fs->gate))
		return OVL_LANE_PASS;
	if (gated && !ovl_tree_has_upper_data(fs->tree, ask->header.nodeid)) {
		err = ovl_lane_copy_up(fs, ask->header.nodeid, in.flags & O_TRUNC ? OVL_LANE_COPY_EMPTY : OVL_LANE_COPY_DATA,
				       &fd);
		if (err) {
			ovl_gate_changed(&fs->gate);
			/* What is passed on Python copies up; then ovl_lane_fs_patch opens it. */
			return err > 0 ? OVL_LANE_PASS : ovl_lane_fail(ask, -err);
		}
	}
	if (change)
		err = ovl_lane_file_open(fs, ask->header.nodeid, in.flags | (in.flags & O_TRUNC ? O_RDWR : 0), fd, &out);
	else
		err = open_to_read(ask, in.flags, &out);
	if (!gated && (err == -ESTALE || err == -ENOENT)) { /* somebody renames: again, when it is over */
		if (!ovl_gate_change(&fs->gate))
			return OVL_LANE_PASS;
		err = ovl_lane_file_open(fs, ask->header.nodeid, in.flags, -1, &out);
		ovl_gate_changed(&fs->gate);
	}
	if (gated) {
		if (!err && in.flags & O_TRUNC) {
			err = ovl_lane_truncate_opened(fs, ask->header.nodeid, out.fh, in.open_flags & OPEN_KILL_SUIDGID);
			if (err)
				ovl_lane_file_release(fs, out.fh);
		}
		ovl_gate_changed(&fs->gate);
		ask->answer->changed = true;
	}
	if (!err && out.open_flags & OPENED_PASSTHROUGH && wants_write(in.flags) && ask->header.uid != 0)
		err = kill_at_open(fs, ask->header.nodeid, out.fh);
	if (err)
		return ovl_lane_fail(ask, -err);
	ovl_lane_put(ask->answer, &out, sizeof(out));
	return OVL_LANE_ANSWERED;
}

enum ovl_lane_verdict ovl_lane_release(struct ovl_lane_ask *ask)
{
	struct fuse_release_in in;

	if (!ovl_lane_head(ask, &in, sizeof(in)))
		return ovl_lane_fail(ask, EIO);
	ovl_lane_file_release(ask->fs, in.fh);
	return OVL_LANE_ANSWERED;
}
