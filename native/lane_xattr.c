/*
 * lane_xattr.c - what else is asked for without a decision: xattrs, symlink targets, statfs
 *
 * The overlay's own xattrs, and where owners are kept without privileges, are ovlfs/overlay/xattr.py's business: only
 * names that nothing of the kind can hide behind are answered here.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "lane_fs.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/statvfs.h>
#include <sys/xattr.h>
#include <unistd.h>

static_assert(sizeof(struct fuse_getxattr_in) == 8, "wire format");
static_assert(sizeof(struct fuse_statfs_out) == 80, "wire format");

/* The kernel clears, or takes, as much memory as it is offered room (fs/xattr.c: do_getxattr()): 64 KiB cost more than all
 * the rest of a request.  So no more is offered than is asked for, or is likely. */
#define VALUE_MAX 65536u /* XATTR_SIZE_MAX, XATTR_LIST_MAX */
#define LIST_LIKELY 1024u

static bool starts(const char *name, const char *prefix)
{
	return strncmp(name, prefix, strlen(prefix)) == 0;
}

static bool is_plain(const char *name)
{
	if (starts(name, "security.") || starts(name, "system.posix_acl_"))
		return true;
	return starts(name, "user.") && !starts(name, "user.overlay.") && !starts(name, "user.containers.") &&
	       !starts(name, "user.fuseoverlayfs.");
}

/* A value or a list of `size` bytes, or how long it is: what FUSE_GETXATTR and FUSE_LISTXATTR answer. */
static enum ovl_lane_verdict give(struct ovl_lane_ask *ask, uint32_t wanted, const void *value, size_t size)
{
	struct fuse_getxattr_out out = {.size = (uint32_t)size};

	if (wanted == 0) {
		ovl_lane_put(ask->answer, &out, sizeof(out));
		return OVL_LANE_ANSWERED;
	}
	if (size > wanted)
		return ovl_lane_fail(ask, ERANGE);
	if (size > ask->answer->room)
		return OVL_LANE_PASS;
	if (size > 0)
		ovl_lane_put(ask->answer, value, size);
	return OVL_LANE_ANSWERED;
}

/* No such xattr.  Labels of SELinux, where the machine has none: "not supported" makes ls(1) ask once a run and not once a
 * file (coreutils, ls.c: getfilecon_cache()), a message each. */
static enum ovl_lane_verdict give_none(struct ovl_lane_ask *ask, const char *name)
{
	return ovl_lane_fail(ask, !ask->fs->selinux && strcmp(name, "security.selinux") == 0 ? EOPNOTSUPP : ENODATA);
}

static enum ovl_lane_verdict get_from_tar(struct ovl_lane_ask *ask, uint32_t wanted, const struct ovl_data *meta,
					  const char *name)
{
	struct ovl_index_xattr_iter iter;
	const uint8_t *key, *value;
	size_t key_len, value_len;
	int more;

	if (ovl_index_xattrs(meta->layer->index, meta->ref, &iter))
		return OVL_LANE_PASS;
	while ((more = ovl_index_next_xattr(&iter, &key, &key_len, &value, &value_len)) == 1)
		if (key_len == strlen(name) && memcmp(key, name, key_len) == 0)
			return give(ask, wanted, value, value_len);
	return more < 0 ? OVL_LANE_PASS : give_none(ask, name);
}

enum ovl_lane_verdict ovl_lane_getxattr(struct ovl_lane_ask *ask)
{
	struct fuse_getxattr_in in;
	struct ovl_data meta;
	const char *name;
	ssize_t size;
	size_t room;
	int error;

	if (ask->size <= sizeof(in) || ask->body[ask->size - 1] != 0)
		return ovl_lane_fail(ask, EIO);
	memcpy(&in, ask->body, sizeof(in));
	name = (const char *)ask->body + sizeof(in);
	if (strcmp(name, "security.capability") == 0 && ovl_lane_file_is_bare(ask->fs, ask->header.nodeid))
		return ovl_lane_fail(ask, ENODATA);
	if (!is_plain(name) || ovl_tree_open_meta(ask->fs->tree, ask->header.nodeid, &meta))
		return OVL_LANE_PASS;
	if (meta.kind == OVL_DATA_TAR)
		return get_from_tar(ask, in.size, &meta, name);
	room = in.size < VALUE_MAX ? in.size : VALUE_MAX;
	if (room > ask->answer->room)
		room = ask->answer->room;
	size = getxattr(ovl_lane_proc(meta.fd).text, name, ask->answer->body, room);
	error = errno;
	close(meta.fd);
	if (size >= 0 && in.size == 0)
		return give(ask, 0, NULL, (size_t)size);
	if (size >= 0) {
		ask->answer->size = (size_t)size; /* it is there already */
		return OVL_LANE_ANSWERED;
	}
	if (error == ERANGE && room == in.size)
		return ovl_lane_fail(ask, ERANGE);
	/* EOPNOTSUPP, EPERM: a kind of object, or a file system, that has no such xattrs (directory.py: getxattr()). */
	if (error == ENODATA || error == EOPNOTSUPP || error == EPERM)
		return give_none(ask, name);
	return OVL_LANE_PASS;
}

enum ovl_lane_verdict ovl_lane_setxattr(struct ovl_lane_ask *ask)
{
	ovl_lane_file_dress(ask->fs, ask->header.nodeid);
	return OVL_LANE_PASS;
}

static ssize_t list(const struct ovl_lane_ask *ask, const struct ovl_data *meta)
{
	struct ovl_lane_proc path = ovl_lane_proc(meta->fd);
	ssize_t size = listxattr(path.text, (char *)ask->answer->body, LIST_LIKELY); /* room is 4 KiB and more */

	if (size < 0 && errno == ERANGE)
		size = listxattr(path.text, (char *)ask->answer->body, ask->answer->room < VALUE_MAX ? ask->answer->room : VALUE_MAX);
	return size;
}

enum ovl_lane_verdict ovl_lane_listxattr(struct ovl_lane_ask *ask)
{
	struct ovl_index_xattr_iter iter;
	struct fuse_getxattr_in in;
	struct ovl_data meta;
	ssize_t size;

	if (!ovl_lane_head(ask, &in, sizeof(in)))
		return ovl_lane_fail(ask, EIO);
	if (ovl_tree_open_meta(ask->fs->tree, ask->header.nodeid, &meta))
		return OVL_LANE_PASS;
	if (meta.kind == OVL_DATA_TAR) /* those that have none, which is nearly all */
		return ovl_index_xattrs(meta.layer->index, meta.ref, &iter) || iter.left > 0 ? OVL_LANE_PASS
											      : give(ask, in.size, "", 0);
	size = list(ask, &meta);
	close(meta.fd);
	if (size < 0)
		return OVL_LANE_PASS;
	for (size_t at = 0; at < (size_t)size; at += strlen((char *)ask->answer->body + at) + 1)
		if (!is_plain((char *)ask->answer->body + at))
			return OVL_LANE_PASS;
	if (in.size > 0 && (size_t)size <= in.size) {
		ask->answer->size = (size_t)size;
		return OVL_LANE_ANSWERED;
	}
	return give(ask, in.size, ask->answer->body, (size_t)size);
}

enum ovl_lane_verdict ovl_lane_readlink(struct ovl_lane_ask *ask)
{
	const uint8_t *target;
	struct ovl_data meta;
	ssize_t got;
	size_t len;
	ovl_err_t err = ovl_tree_readlink(ask->fs->tree, ask->header.nodeid, &target, &len);

	if (!err && len <= ask->answer->room) {
		ovl_lane_put(ask->answer, target, len);
		return OVL_LANE_ANSWERED;
	}
	if (err != OVL_ASK || ovl_tree_open_meta(ask->fs->tree, ask->header.nodeid, &meta))
		return OVL_LANE_PASS;
	if (meta.kind == OVL_DATA_TAR)
		return OVL_LANE_PASS;
	got = readlinkat(meta.fd, "", (char *)ask->answer->body, ask->answer->room);
	close(meta.fd);
	if (got <= 0 || (size_t)got == ask->answer->room)
		return OVL_LANE_PASS; /* no symlink on disk: a file that stands for one (overlay/owner.py) */
	ask->answer->size = (size_t)got;
	return OVL_LANE_ANSWERED;
}

/* attr.statvfs(): the numbers of the upperdir's file system, or of the topmost lower directory's. */
enum ovl_lane_verdict ovl_lane_statfs(struct ovl_lane_ask *ask)
{
	const struct ovl_stack *stack = ovl_tree_stack(ask->fs->tree);
	struct fuse_statfs_out out = {0};
	struct statvfs is;

	for (size_t i = 0; i < stack->count; i++) {
		if (stack->layers[i].kind == OVL_LAYER_FOREIGN)
			return OVL_LANE_PASS;
		if (stack->layers[i].kind != OVL_LAYER_DIR)
			continue;
		if (fstatvfs(stack->layers[i].dir.root, &is) != 0)
			return ovl_lane_fail(ask, errno);
		out.st = (struct fuse_kstatfs){
			.blocks = is.f_blocks,
			.bfree = is.f_bfree,
			.bavail = is.f_bavail,
			.files = is.f_files,
			.ffree = is.f_ffree,
			.bsize = (uint32_t)is.f_bsize,
			.namelen = (uint32_t)is.f_namemax,
			.frsize = (uint32_t)is.f_frsize,
		};
		ovl_lane_put(ask->answer, &out, sizeof(out));
		return OVL_LANE_ANSWERED;
	}
	return OVL_LANE_PASS;
}
