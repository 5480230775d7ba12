/*
 * lane_ioctl.c - what stat(2) does not say: when an object was made, and its flags (lsattr, chattr)
 *
 * Flags are those of the object in the upperdir or in a directory layer; in a tar there are none.  What can be set are those
 * of an upper object, but for immutable and append-only: the kernel's overlay keeps these two in overlay.protattr, so that
 * it can still change the object itself (fs/overlayfs/util.c: ovl_set_protattr()); here they are refused.
 *
 * Kernel: fs/fuse/ioctl.c: fuse_fileattr_get(), fuse_fileattr_set(); dir.c: fuse_do_statx(); fs/overlayfs/inode.c:
 * ovl_fileattr_get(), ovl_getattr().
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "lane_fs.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

/* include/uapi/linux/fuse.h, 7.39 */
struct statx_in {
	uint32_t getattr_flags, reserved;
	uint64_t fh;
	uint32_t sx_flags, sx_mask;
};
struct sx_time {
	int64_t sec;
	uint32_t nsec;
	int32_t reserved;
};
struct statx_out {
	uint64_t attr_valid;
	uint32_t attr_valid_nsec, flags;
	uint64_t spare[2];
	uint32_t mask, blksize;
	uint64_t attributes;
	uint32_t nlink, uid, gid;
	uint16_t mode, spare0;
	uint64_t ino, size, blocks, attributes_mask;
	struct sx_time atime, btime, ctime, mtime;
	uint32_t rdev_major, rdev_minor, dev_major, dev_minor;
	uint64_t spare2[14];
};
static_assert(sizeof(struct statx_in) == 24, "wire format");
static_assert(sizeof(struct statx_out) == 288, "wire format");
static_assert(sizeof(struct fuse_ioctl_in) == 32, "wire format");
static_assert(sizeof(struct fuse_ioctl_out) == 16, "wire format");

static struct sx_time time_of(uint64_t sec, uint32_t nsec)
{
	return (struct sx_time){.sec = (int64_t)sec, .nsec = nsec};
}

enum ovl_lane_verdict ovl_lane_statx(struct ovl_lane_ask *ask)
{
	struct statx_out out = {.attr_valid = OVL_LANE_VALID_S, .mask = STATX_BASIC_STATS};
	struct ovl_entry entry;
	struct fuse_attr attr;
	struct ovl_data meta;
	struct statx made;

	if (ask->size < sizeof(struct statx_in))
		return ovl_lane_fail(ask, EIO);
	if (ovl_tree_get(ask->fs->tree, ask->header.nodeid, &entry))
		return ovl_lane_fail(ask, ESTALE);
	ovl_lane_fill_attr(&entry, &attr);
	out.blksize = attr.blksize;
	out.nlink = attr.nlink;
	out.uid = attr.uid;
	out.gid = attr.gid;
	out.mode = (uint16_t)attr.mode;
	out.ino = attr.ino;
	out.size = attr.size;
	out.blocks = attr.blocks;
	out.atime = time_of(attr.atime, attr.atimensec);
	out.mtime = time_of(attr.mtime, attr.mtimensec);
	out.ctime = time_of(attr.ctime, attr.ctimensec);
	out.rdev_major = attr.rdev >> 8 & 0xfff; /* new_decode_dev() */
	out.rdev_minor = (attr.rdev & 0xff) | (attr.rdev >> 12 & 0xfff00);
	/* Without one in the layer: what there is. */
	if (!ovl_tree_open_meta(ask->fs->tree, ask->header.nodeid, &meta) && meta.kind == OVL_DATA_FILE) {
		if (statx(meta.fd, "", AT_EMPTY_PATH, STATX_BTIME, &made) == 0 && made.stx_mask & STATX_BTIME) {
			out.mask |= STATX_BTIME;
			out.btime = (struct sx_time){.sec = made.stx_btime.tv_sec, .nsec = made.stx_btime.tv_nsec};
		}
		close(meta.fd);
	}
	ovl_lane_put(ask->answer, &out, sizeof(out));
	return OVL_LANE_ANSWERED;
}

/* Opens a file or a directory for an ioctl; -1: in a tar. */
static int open_object(struct ovl_lane_ask *ask, bool *upper, int *error)
{
	struct ovl_entry entry;
	struct ovl_data meta;
	int fd;

	*error = ENOTTY;
	if (ovl_tree_get(ask->fs->tree, ask->header.nodeid, &entry) ||
	    (!S_ISREG(entry.attr.mode) && !S_ISDIR(entry.attr.mode)) ||
	    ovl_tree_open_meta(ask->fs->tree, ask->header.nodeid, &meta))
		return -1;
	*error = 0;
	*upper = meta.upper;
	if (meta.kind == OVL_DATA_TAR)
		return -1;
	fd = open(ovl_lane_proc(meta.fd).text, O_RDONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
	if (fd < 0)
		*error = errno;
	close(meta.fd);
	return fd;
}

static enum ovl_lane_verdict set_flags(struct ovl_lane_ask *ask, const struct fuse_ioctl_in *in, const unsigned char *value)
{
	struct fuse_ioctl_out out = {0};
	struct ovl_entry entry;
	struct fsxattr extended;
	bool upper = false;
	long flags = 0;
	int fd, error;

	if (in->cmd == FS_IOC_SETFLAGS) {
		memcpy(&flags, value, in->in_size < sizeof(flags) ? in->in_size : sizeof(flags));
		if (flags & (FS_IMMUTABLE_FL | FS_APPEND_FL))
			return ovl_lane_fail(ask, EOPNOTSUPP);
	} else {
		memcpy(&extended, value, sizeof(extended));
		if (extended.fsx_xflags & (FS_XFLAG_IMMUTABLE | FS_XFLAG_APPEND))
			return ovl_lane_fail(ask, EOPNOTSUPP);
	}
	fd = open_object(ask, &upper, &error);
	if (fd >= 0 && !upper)
		error = EOPNOTSUPP; /* it would have to be copied up for that: change something else of it first */
	if (fd < 0 && !error)
		error = EOPNOTSUPP;
	if (!error && ioctl(fd, in->cmd, in->cmd == FS_IOC_SETFLAGS ? (void *)&flags : (void *)&extended) != 0)
		error = errno;
	if (!error && ovl_gate_change(&ask->fs->gate)) {
		(void)ovl_lane_refresh(ask->fs, ask->header.nodeid, fd, &entry); /* its ctime */
		ovl_gate_changed(&ask->fs->gate);
	}
	if (fd >= 0)
		close(fd);
	if (error)
		return ovl_lane_fail(ask, error);
	ovl_lane_put(ask->answer, &out, sizeof(out));
	return OVL_LANE_ANSWERED;
}

enum ovl_lane_verdict ovl_lane_ioctl(struct ovl_lane_ask *ask)
{
	union {
		long flags;
		struct fsxattr extended;
	} value = {0};
	struct fuse_ioctl_out out = {0};
	struct fuse_ioctl_in in;
	bool upper;
	int fd, error;

	if (!ovl_lane_head(ask, &in, sizeof(in)))
		return ovl_lane_fail(ask, EIO);
	if (in.in_size > ask->size - sizeof(in))
		return ovl_lane_fail(ask, EIO);
	switch (in.cmd) {
	case FS_IOC_SETFLAGS:
		if (in.in_size < sizeof(int))
			return ovl_lane_fail(ask, EINVAL);
		return set_flags(ask, &in, ask->body + sizeof(in));
	case FS_IOC_FSSETXATTR:
		if (in.in_size < sizeof(struct fsxattr))
			return ovl_lane_fail(ask, EINVAL);
		return set_flags(ask, &in, ask->body + sizeof(in));
	case FS_IOC_GETFLAGS:
	case FS_IOC_FSGETXATTR:
		break;
	default:
		return ovl_lane_fail(ask, ENOTTY);
	}
	fd = open_object(ask, &upper, &error);
	if (fd >= 0 && ioctl(fd, in.cmd, &value) != 0)
		error = errno;
	if (fd >= 0)
		close(fd);
	if (error)
		return ovl_lane_fail(ask, error);
	ovl_lane_put(ask->answer, &out, sizeof(out));
	ovl_lane_put(ask->answer, &value, in.out_size < sizeof(value) ? in.out_size : sizeof(value));
	return OVL_LANE_ANSWERED;
}
