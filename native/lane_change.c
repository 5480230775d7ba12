/*
 * lane_change.c - changes that need no decision: of objects that are in the upperdir, in directories that are, too
 *
 * What overlayfs does then is little more than what the file system below does (Linux fs/overlayfs/dir.c:
 * ovl_create_upper(), ovl_remove_upper(), ovl_remove_and_whiteout(); inode.c: ovl_setattr()).  The reference is
 * ovlfs/overlay/dir.py and attr.py, which also do all that is passed on from here:
 *
 *      passed on                                     because
 *      a parent that is not in the upperdir          it has to be copied up
 *      a name where a whiteout is                    it has to be exchanged for what is made, and that be opaque
 *      a parent with a default ACL                   overlay/acl.py knows what is inherited
 *      renames of directories, and of metacopies     redirects
 *      owners that cannot be stored directly         overlay/owner.py
 *
 * Every function: under the gate (gate.h: nobody else changes anything); whatever can fail comes first; one system call
 * makes the change; then the tree is told, and the parent's times are read anew.  What is made with something that one
 * call cannot give (another owner, an xattr) is made aside and moved into its place.
 *
 * Confinement: a directory is opened through ovl_dirlayer_open (openat2, beneath, no symlinks); below it single names
 * are used, and never followed.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "lane_fs.h"
#include "lane_trace.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/xattr.h>
#include <unistd.h>

#define SET_KILL_SUIDGID (1u << 11) /* FATTR_KILL_SUIDGID */
#define WHITEOUT "#whiteout" /* in workdir: overlay/upper.py */
#define NS 1000000000ll

static_assert(sizeof(struct fuse_setattr_in) == 88, "wire format");
static_assert(sizeof(struct fuse_create_in) == 16, "wire format");
static_assert(sizeof(struct fuse_mkdir_in) == 8, "wire format");
static_assert(sizeof(struct fuse_link_in) == 8, "wire format");
static_assert(sizeof(struct fuse_rename_in) == 8, "wire format");
static_assert(sizeof(struct fuse_rename2_in) == 16, "wire format");

struct temp_name {
	char text[24];
};

/* Beside those of overlay/upper.py, "#1" and so on, which Python gives. */
static struct temp_name temp_name(struct ovl_lane_fs *fs)
{
	struct temp_name temp;

	snprintf(temp.text, sizeof(temp.text), "#n%x", fs->next_temp++);
	return temp;
}

static int terminated(const uint8_t *name, size_t len, char text[OVL_NAME_MAX + 1])
{
	if (len > OVL_NAME_MAX)
		return -ENAMETOOLONG;
	memcpy(text, name, len);
	text[len] = 0;
	return 0;
}

uint32_t ovl_lane_mode_killed(uint32_t mode)
{
	if (S_ISDIR(mode))
		return mode;
	mode &= ~(uint32_t)S_ISUID;
	return mode & S_IXGRP ? mode & ~(uint32_t)S_ISGID : mode;
}

/* False: pass the request on.  A disk may have to be waited for. */
static bool enter_gate(struct ovl_lane_ask *ask)
{
	if (ask->fs->upper.may_wait)
		ovl_lane_yield(ask->answer->reader);
	return ovl_gate_change(&ask->fs->gate);
}

/* ---- attributes of upper objects ----------------------------------------------------------------------- */

/* Stack.refresh(): what the object at `fd` says now. */
ovl_err_t ovl_lane_refresh(struct ovl_lane_fs *fs, uint64_t nodeid, int fd, struct ovl_entry *out)
{
	struct ovl_description is;
	struct ovl_attr attr;
	struct stat st;
	ovl_err_t err;

	if (fstat(fd, &st) != 0)
		return -errno;
	err = ovl_tree_describe(fs->tree, nodeid, false, &is);
	if (err)
		return err;
	ovl_attr_of_stat(&st, &attr);
	if (!fs->upper.direct) { /* what is shown of owner and mode can be in an xattr, and has not changed */
		attr.mode = is.entry.attr.mode;
		attr.uid = is.entry.attr.uid;
		attr.gid = is.entry.attr.gid;
		attr.rdev = is.entry.attr.rdev;
	}
	if (S_ISDIR(attr.mode) && is.has_lower)
		attr.nlink = 1;
	if (is.metacopy)
		attr.blocks = is.entry.attr.blocks;
	err = ovl_tree_set_attr(fs->tree, nodeid, &attr);
	out->nodeid = nodeid;
	out->ino = is.entry.ino;
	out->attr = attr;
	return err;
}

/* ---- directories ---------------------------------------------------------------------------------------- */

void ovl_lane_dirs_close(struct ovl_lane_fs *fs)
{
	for (size_t i = 0; i < OVL_LANE_DIRS; i++) {
		if (fs->dirs[i].nodeid)
			close(fs->dirs[i].fd);
		fs->dirs[i].nodeid = 0;
	}
}

static void forget_dir(struct ovl_lane_fs *fs, uint64_t nodeid)
{
	for (size_t i = 0; i < OVL_LANE_DIRS; i++)
		if (fs->dirs[i].nodeid == nodeid) {
			close(fs->dirs[i].fd);
			fs->dirs[i].nodeid = 0;
		}
}

/* What is known of it is good until Python has had a request. */
struct ovl_lane_dir *ovl_lane_need_dir(struct ovl_lane_fs *fs, uint64_t nodeid)
{
	struct ovl_description is;
	struct ovl_lane_dir *dir;
	int fd;

	for (size_t i = 0; i < OVL_LANE_DIRS; i++) {
		dir = &fs->dirs[i];
		if (dir->nodeid == nodeid && dir->generation == fs->gate.generation)
			return dir;
	}
	if (fs->upper.work_fd < 0 || ovl_tree_describe(fs->tree, nodeid, false, &is) || !is.is_linked ||
	    !S_ISDIR(is.entry.attr.mode) || (!is.upper && ovl_lane_copy_up_dir(fs, nodeid)))
		return NULL;
	fd = ovl_tree_open_upper(fs->tree, nodeid, O_PATH | O_DIRECTORY);
	if (fd < 0)
		return NULL;
	forget_dir(fs, nodeid);
	dir = &fs->dirs[fs->next_dir++ % OVL_LANE_DIRS];
	if (dir->nodeid)
		close(dir->fd);
	*dir = (struct ovl_lane_dir){.nodeid = nodeid, .generation = fs->gate.generation, .fd = fd};
	dir->has_lower = is.has_lower;
	/* ENODATA: none; EOPNOTSUPP: no such thing here. */
	if (getxattr(ovl_lane_proc(fd).text, "system.posix_acl_default", NULL, 0) >= 0 ||
	    (errno != ENODATA && errno != EOPNOTSUPP))
		dir->default_acl = true;
	return dir;
}

static void refresh_dir(struct ovl_lane_fs *fs, const struct ovl_lane_dir *dir)
{
	struct ovl_entry entry;

	/* The change is made; times that could not be read are as they were. */
	(void)ovl_lane_refresh(fs, dir->nodeid, dir->fd, &entry);
}

void ovl_lane_set_impure(struct ovl_lane_fs *fs, struct ovl_lane_dir *dir)
{
	char name[64];

	if (dir->impure)
		return;
	snprintf(name, sizeof(name), "%simpure", fs->upper.prefix);
	dir->impure = setxattr(ovl_lane_proc(dir->fd).text, name, "y", 1, 0) == 0; /* good to have */
}

/* What a request wants to do with a name.  `child` is its inode, nodeid 0: there is none. */
struct place {
	uint64_t parent;
	struct ovl_lane_dir *dir; /* after open_place, until the next */
	char name[OVL_NAME_MAX + 1];
	const uint8_t *bytes;
	size_t len;
	struct ovl_description child;
};

/* False: pass the request on. */
static bool find_place(struct ovl_lane_fs *fs, uint64_t parent, const uint8_t *name, size_t len, struct place *out)
{
	struct ovl_entry entry;
	struct ovl_ask asked;

	*out = (struct place){.parent = parent, .bytes = name, .len = len};
	if (len == 0 || terminated(name, len, out->name) || (name[0] == '.' && (len == 1 || (len == 2 && name[1] == '.'))))
		return false;
	if (fs->upper.work_fd < 0 || ovl_tree_lookup(fs->tree, parent, name, len, 0, &entry, &asked))
		return false;
	return entry.nodeid == 0 || ovl_tree_describe(fs->tree, entry.nodeid, false, &out->child) == 0;
}

/* Have its directory in the upperdir: when it is clear that something will be done there.  False: pass it on. */
static bool open_place(struct ovl_lane_fs *fs, struct place *at)
{
	at->dir = ovl_lane_need_dir(fs, at->parent);
	return at->dir != NULL;
}

/* ---- making --------------------------------------------------------------------------------------------- */

/* What is to be made. */
struct maker {
	uint32_t mode, uid, gid;
	const char *target; /* of a symlink */
	bool ours;          /* a plain call gives it the right owner */
	bool opaque;
};

/* False: pass it on. */
static bool plan(struct ovl_lane_fs *fs, const struct ovl_lane_ask *ask, struct place *at, uint32_t mode,
		 uint32_t umask, struct maker *out)
{
	struct ovl_entry parent;

	if (at->child.entry.nodeid || ovl_tree_get(fs->tree, at->parent, &parent))
		return false;
	*out = (struct maker){.mode = S_ISLNK(mode) ? mode : mode & ~(umask & 0777), .uid = ask->header.uid};
	out->gid = ask->header.gid;
	if (parent.attr.mode & S_ISGID) { /* fs/inode.c: inode_init_owner() */
		out->gid = parent.attr.gid;
		if (S_ISDIR(mode))
			out->mode |= S_ISGID;
	}
	out->ours = out->uid == fs->uid && out->gid == fs->gid;
	if (!out->ours && !(fs->upper.direct && fs->upper.may_chown))
		return false;
	/* Without the right to store what is shown, only what the object can say itself. */
	return (fs->upper.direct || (out->mode & 0600) == 0600) && open_place(fs, at) && !at->dir->default_acl;
}

/* Gives what was just made, at `fd`, what the call could not. */
static ovl_err_t finish(const struct maker *what, int fd, struct stat *st)
{
	if (fstat(fd, st) != 0)
		return -errno;
	if (st->st_uid == what->uid && st->st_gid == what->gid && (S_ISLNK(what->mode) || !((st->st_mode ^ what->mode) & 07777)))
		return 0;
	if ((st->st_uid != what->uid || st->st_gid != what->gid) && fchownat(fd, "", what->uid, what->gid, AT_EMPTY_PATH) != 0)
		return -errno;
	/* A chown takes bits away, and the process's umask has. */
	if (!S_ISLNK(what->mode) && ((st->st_mode ^ what->mode) & 07777 || st->st_uid != what->uid || st->st_gid != what->gid) &&
	    chmod(ovl_lane_proc(fd).text, what->mode & 07777) != 0)
		return -errno;
	return fstat(fd, st) != 0 ? -errno : 0;
}

/* The new object into the tree: it is in its place.  On an error it is still there. */
static ovl_err_t enter(struct ovl_lane_fs *fs, const struct place *at, const struct stat *st, struct ovl_entry *out)
{
	struct ovl_attr attr;
	struct ovl_ask asked;
	ovl_err_t err;

	ovl_attr_of_stat(st, &attr);
	out->attr = attr;
	err = ovl_stack_ino(ovl_tree_stack(fs->tree), st->st_dev, st->st_ino, &out->ino);
	if (!err)
		err = ovl_tree_add(fs->tree, at->dir->nodeid, at->bytes, at->len, &attr, st->st_ino, out->ino, &out->nodeid,
				   &asked);
	if (!err)
		err = ovl_tree_ref(fs->tree, out->nodeid);
	refresh_dir(fs, at->dir);
	return err > 0 ? -EIO : err;
}

/* A regular file, opened for reading and writing.  1: pass it on; nothing was made. */
static int make_file(struct ovl_lane_fs *fs, const struct place *at, const struct maker *what, int *out, struct stat *st)
{
	ovl_err_t err;
	int fd;

	(void)fs;
	if (what->ours && !(what->mode & 07000)) {
		fd = openat(at->dir->fd, at->name, O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, what->mode & 0777);
		if (fd < 0)
			return errno == EEXIST ? 1 : -errno; /* a whiteout */
		err = finish(what, fd, st);
		if (err)
			unlinkat(at->dir->fd, at->name, 0);
	} else {
		fd = openat(at->dir->fd, ".", O_RDWR | O_TMPFILE | O_CLOEXEC, 0600);
		if (fd < 0)
			return errno == EOPNOTSUPP || errno == EISDIR ? 1 : -errno;
		err = finish(what, fd, st);
		if (!err && linkat(AT_FDCWD, ovl_lane_proc(fd).text, at->dir->fd, at->name, AT_SYMLINK_FOLLOW) != 0)
			err = errno == EEXIST ? 1 : -errno;
		if (!err && fstat(fd, st) != 0)
			err = -errno;
	}
	if (err) {
		close(fd);
		return err;
	}
	*out = fd;
	return 0;
}

/* A directory or a symlink.  1: pass it on. */
static int make_other(struct ovl_lane_fs *fs, const struct place *at, const struct maker *what, struct stat *st)
{
	const bool aside = !what->ours || what->opaque || what->mode & S_ISVTX;
	struct temp_name temp = temp_name(fs);
	const char *name = aside ? temp.text : at->name;
	const int dir = aside ? fs->upper.work_fd : at->dir->fd;
	char xattr[64];
	ovl_err_t err = 0;
	int fd;

	if ((S_ISDIR(what->mode) ? mkdirat(dir, name, what->mode & 0777) : symlinkat(what->target, dir, name)) != 0)
		return errno == EEXIST ? 1 : -errno;
	fd = openat(dir, name, O_PATH | O_NOFOLLOW | O_CLOEXEC);
	if (fd < 0)
		err = -errno;
	if (!err)
		err = finish(what, fd, st);
	snprintf(xattr, sizeof(xattr), "%sopaque", fs->upper.prefix);
	if (!err && what->opaque && setxattr(ovl_lane_proc(fd).text, xattr, "y", 1, 0) != 0)
		err = -errno;
	if (!err && aside && renameat2(dir, name, at->dir->fd, at->name, RENAME_NOREPLACE) != 0)
		err = errno == EEXIST || errno == EINVAL ? 1 : -errno;
	if (!err && aside && fstat(fd, st) != 0)
		err = -errno;
	if (fd >= 0)
		close(fd);
	if (err)
		unlinkat(dir, name, S_ISDIR(what->mode) ? AT_REMOVEDIR : 0);
	return err;
}

static enum ovl_lane_verdict done(struct ovl_lane_ask *ask, ovl_err_t err)
{
	ovl_gate_changed(&ask->fs->gate);
	ask->answer->changed = true;
	if (err) {
		ask->answer->size = 0;
		return ovl_lane_fail(ask, -err);
	}
	return OVL_LANE_ANSWERED;
}

static enum ovl_lane_verdict pass(struct ovl_lane_ask *ask)
{
	ovl_gate_changed(&ask->fs->gate);
	return OVL_LANE_PASS;
}

enum ovl_lane_verdict ovl_lane_create(struct ovl_lane_ask *ask)
{
	struct ovl_lane_fs *fs = ask->fs;
	struct fuse_open_out opened;
	struct fuse_entry_out out;
	struct fuse_create_in in;
	struct ovl_entry entry = {0};
	struct maker what;
	struct place at;
	struct stat st;
	size_t len;
	int fd = -1;
	ovl_err_t err;

	len = ovl_lane_head_and_name(ask, &in, sizeof(in));
	if (len == 0)
		return ovl_lane_fail(ask, EIO);
	if (!enter_gate(ask))
		return OVL_LANE_PASS;
	if (!find_place(fs, ask->header.nodeid, ask->body + sizeof(in), len, &at) ||
	    !plan(fs, ask, &at, S_IFREG | (in.mode & 07777), in.umask, &what))
		return pass(ask);
	err = make_file(fs, &at, &what, &fd, &st);
	if (err > 0)
		return pass(ask);
	if (err)
		return done(ask, err);
	err = enter(fs, &at, &st, &entry);
	if (err) {
		close(fd);
		unlinkat(at.dir->fd, at.name, 0);
		return done(ask, err);
	}
	err = ovl_lane_file_open(fs, entry.nodeid, (in.flags & ~(uint32_t)O_TRUNC) | O_CREAT, fd, &opened);
	if (err) { /* the file is there, as with open(2) at the limit of descriptors */
		bool gone;

		ovl_tree_forget(fs->tree, entry.nodeid, 1, &gone);
		return done(ask, err > 0 ? -EIO : err);
	}
	ovl_lane_fill_entry(&entry, &out);
	ovl_lane_put(ask->answer, &out, sizeof(out));
	ovl_lane_put(ask->answer, &opened, sizeof(opened));
	return done(ask, 0);
}

static enum ovl_lane_verdict make(struct ovl_lane_ask *ask, const uint8_t *name, size_t len, uint32_t mode, uint32_t umask,
				  const char *target)
{
	struct ovl_lane_fs *fs = ask->fs;
	struct fuse_entry_out out;
	struct ovl_entry entry = {0};
	struct maker what;
	struct place at;
	struct stat st;
	ovl_err_t err;

	if (!enter_gate(ask))
		return OVL_LANE_PASS;
	if (!find_place(fs, ask->header.nodeid, name, len, &at) || !plan(fs, ask, &at, mode, umask, &what))
		return pass(ask);
	what.target = target;
	what.opaque = S_ISDIR(mode) && at.dir->has_lower;
	/* Without the right to store owners a symlink of somebody else is a file (overlay/owner.py). */
	err = make_other(fs, &at, &what, &st);
	if (err > 0)
		return pass(ask);
	if (err)
		return done(ask, err);
	err = enter(fs, &at, &st, &entry);
	if (err) {
		unlinkat(at.dir->fd, at.name, S_ISDIR(mode) ? AT_REMOVEDIR : 0);
		return done(ask, err);
	}
	if (what.opaque)
		ovl_lane_trace_told(fs->trace, OVL_TRACE_OPAQUE, at.dir->nodeid, at.bytes, at.len, 0, 0);
	ovl_lane_fill_entry(&entry, &out);
	ovl_lane_put(ask->answer, &out, sizeof(out));
	return done(ask, 0);
}

enum ovl_lane_verdict ovl_lane_mkdir(struct ovl_lane_ask *ask)
{
	struct fuse_mkdir_in in;
	size_t len;

	len = ovl_lane_head_and_name(ask, &in, sizeof(in));
	if (len == 0)
		return ovl_lane_fail(ask, EIO);
	return make(ask, ask->body + sizeof(in), len, S_IFDIR | (in.mode & 07777), in.umask, NULL);
}

enum ovl_lane_verdict ovl_lane_symlink(struct ovl_lane_ask *ask)
{
	size_t len = ovl_lane_name(ask->body, ask->size);
	const char *target;

	if (len == 0 || len + 1 >= ask->size || ask->body[ask->size - 1] != 0)
		return ovl_lane_fail(ask, EIO);
	target = (const char *)ask->body + len + 1;
	if (strlen(target) + len + 2 != ask->size)
		return ovl_lane_fail(ask, EIO);
	return make(ask, ask->body, len, S_IFLNK | 0777, 0, target);
}

/* An inode with a name, no directory, that has an object in the upperdir, now or already.  False: pass it on. */
static bool need_upper(struct ovl_lane_fs *fs, uint64_t nodeid, struct ovl_description *is)
{
	if (ovl_tree_describe(fs->tree, nodeid, false, is) || S_ISDIR(is->entry.attr.mode) || !is->is_linked)
		return false;
	if (is->upper)
		return true;
	return ovl_lane_copy_up(fs, nodeid, OVL_LANE_COPY_META, NULL) == 0 && !ovl_tree_describe(fs->tree, nodeid, false, is);
}

enum ovl_lane_verdict ovl_lane_link(struct ovl_lane_ask *ask)
{
	struct ovl_lane_fs *fs = ask->fs;
	struct ovl_description is;
	struct fuse_entry_out out;
	struct ovl_entry entry;
	struct fuse_link_in in;
	struct ovl_ask asked;
	struct place at;
	size_t len;
	ovl_err_t err;
	int fd;

	len = ovl_lane_head_and_name(ask, &in, sizeof(in));
	if (len == 0)
		return ovl_lane_fail(ask, EIO);
	if (!enter_gate(ask))
		return OVL_LANE_PASS;
	if (!find_place(fs, ask->header.nodeid, ask->body + sizeof(in), len, &at) || at.child.entry.nodeid ||
	    !need_upper(fs, in.oldnodeid, &is) || !open_place(fs, &at))
		return pass(ask);
	fd = ovl_tree_open_upper(fs->tree, in.oldnodeid, O_PATH | O_NOFOLLOW);
	if (fd < 0)
		return pass(ask);
	if (is.metacopy && !is.redirect && ovl_lane_redirect_metacopy(fs, in.oldnodeid, ovl_lane_proc(fd).text)) {
		close(fd);
		return pass(ask);
	}
	err = linkat(AT_FDCWD, ovl_lane_proc(fd).text, at.dir->fd, at.name, AT_SYMLINK_FOLLOW) != 0 ? -errno : 0;
	if (err == -EEXIST || err == -ENOENT || err == -EPERM) { /* a whiteout; a rule for others than plain files */
		close(fd);
		return pass(ask);
	}
	if (!err) {
		err = ovl_tree_link(fs->tree, in.oldnodeid, at.dir->nodeid, at.bytes, at.len, &asked);
		if (err)
			unlinkat(at.dir->fd, at.name, 0);
	}
	if (!err)
		err = ovl_tree_ref(fs->tree, in.oldnodeid);
	if (!err)
		err = ovl_lane_refresh(fs, in.oldnodeid, fd, &entry);
	close(fd);
	if (err)
		return done(ask, err > 0 ? -EIO : err);
	refresh_dir(fs, at.dir);
	ovl_lane_fill_entry(&entry, &out);
	ovl_lane_put(ask->answer, &out, sizeof(out));
	return done(ask, 0);
}

/* ---- taking away ---------------------------------------------------------------------------------------- */

/* The shared whiteout under one more name.  1: pass it on; nothing has changed. */
static int link_whiteout(struct ovl_lane_fs *fs, int dir, const char *name)
{
	for (int tries = 0; tries < 2; tries++) {
		if (linkat(fs->upper.work_fd, WHITEOUT, dir, name, 0) == 0)
			return 0;
		/* EMLINK, EEXIST, ...: overlay/upper.py knows what to do */
		if (errno != ENOENT || mknodat(fs->upper.work_fd, WHITEOUT, S_IFCHR, 0) != 0)
			return 1;
	}
	return 1;
}

/* A whiteout at a name, in the place of an object if `over`.  1: pass it on; nothing has changed. */
static int put_whiteout(struct ovl_lane_fs *fs, const struct place *at, bool over)
{
	struct temp_name temp;
	int error;

	if (!fs->upper.devices)
		return 1;
	if (!over)
		return link_whiteout(fs, at->dir->fd, at->name);
	temp = temp_name(fs);
	if (link_whiteout(fs, fs->upper.work_fd, temp.text))
		return 1;
	if (renameat(fs->upper.work_fd, temp.text, at->dir->fd, at->name) == 0)
		return 0;
	error = errno;
	unlinkat(fs->upper.work_fd, temp.text, 0);
	return -error;
}

/* Before an inode loses a name (overlay/dir.py: _unlinking): what leads to its upper object then; -1: nothing need. */
static int hold_last(struct ovl_lane_fs *fs, const struct place *at)
{
	if (!at->child.upper || at->child.name_count != 1 || ovl_tree_orphan(fs->tree, at->child.entry.nodeid) >= 0)
		return -1;
	return openat(at->dir->fd, at->name, O_PATH | O_NOFOLLOW | O_CLOEXEC);
}

/* After it has: `held` is taken over. */
static void lost_name(struct ovl_lane_fs *fs, const struct place *at, int held)
{
	const uint64_t nodeid = at->child.entry.nodeid;
	struct ovl_entry entry;
	int fd;

	if (at->child.name_count == 1)
		(void)ovl_tree_set_last_parent(fs->tree, nodeid, at->dir->nodeid); /* -ESTALE: nobody holds it */
	if (at->child.upper) {
		fd = held >= 0 ? held : ovl_tree_open_upper(fs->tree, nodeid, O_PATH | O_NOFOLLOW);
		if (fd >= 0)
			(void)ovl_lane_refresh(fs, nodeid, fd, &entry); /* fewer links; -ESTALE as above */
		if (held < 0 && fd >= 0)
			close(fd);
	}
	if (held >= 0)
		(void)ovl_tree_set_orphan(fs->tree, nodeid, held); /* takes it over */
	forget_dir(fs, nodeid);
}

static enum ovl_lane_verdict take_away(struct ovl_lane_ask *ask, bool is_dir)
{
	struct ovl_lane_fs *fs = ask->fs;
	size_t len = ovl_lane_name(ask->body, ask->size);
	struct ovl_ask asked;
	struct place at;
	uint64_t began_ns;
	bool below;
	ovl_err_t err;
	int held;

	if (len == 0)
		return ovl_lane_fail(ask, EIO);
	if (!enter_gate(ask))
		return OVL_LANE_PASS;
	if (!find_place(fs, ask->header.nodeid, ask->body, len, &at) || at.child.entry.nodeid == 0 ||
	    (bool)S_ISDIR(at.child.entry.attr.mode) != is_dir || (is_dir && (!at.child.upper || at.child.has_lower)))
		return pass(ask);
	/* What is seen, and is not in the upperdir, is below. */
	err = at.child.upper ? ovl_tree_below(fs->tree, at.parent, at.bytes, at.len) : 0;
	if (err && err != OVL_ABSENT)
		return pass(ask);
	below = err == 0;
	if ((below && is_dir) || !open_place(fs, &at))
		return pass(ask);
	held = hold_last(fs, &at);
	if (held < 0 && at.child.upper && at.child.name_count == 1 && ovl_tree_orphan(fs->tree, at.child.entry.nodeid) < 0)
		return pass(ask);
	began_ns = ovl_lane_trace_began(fs->trace);
	if (below) {
		err = put_whiteout(fs, &at, at.child.upper);
	} else {
		err = unlinkat(at.dir->fd, at.name, is_dir ? AT_REMOVEDIR : 0) != 0 ? -errno : 0;
		if (err == -ENOTEMPTY || err == -EEXIST)
			err = 1; /* whiteouts in it, or names: Python tells them apart */
	}
	if (err) {
		if (held >= 0)
			close(held);
		return err > 0 ? pass(ask) : done(ask, err);
	}
	if (below)
		ovl_lane_trace_told(fs->trace, OVL_TRACE_WHITEOUT, at.dir->nodeid, at.bytes, at.len, 0, began_ns);
	err = ovl_tree_remove(fs->tree, at.dir->nodeid, at.bytes, at.len, &asked);
	lost_name(fs, &at, held);
	refresh_dir(fs, at.dir);
	return done(ask, err > 0 ? -EIO : err);
}

enum ovl_lane_verdict ovl_lane_unlink(struct ovl_lane_ask *ask)
{
	return take_away(ask, false);
}

enum ovl_lane_verdict ovl_lane_rmdir(struct ovl_lane_ask *ask)
{
	return take_away(ask, true);
}

/* ---- renaming ------------------------------------------------------------------------------------------- */

enum ovl_lane_verdict ovl_lane_rename(struct ovl_lane_ask *ask)
{
	struct ovl_lane_fs *fs = ask->fs;
	struct fuse_rename2_in in = {0};
	const size_t head = ask->header.opcode == FUSE_RENAME2 ? sizeof(in) : sizeof(struct fuse_rename_in);
	struct place from, to;
	struct ovl_entry entry;
	struct ovl_ask asked;
	size_t len, new_len;
	uint64_t began_ns;
	unsigned flags = 0;
	bool below;
	int fd, held = -1;
	ovl_err_t err;

	len = ovl_lane_head_and_name(ask, &in, head);
	if (len == 0 || head + len + 1 >= ask->size)
		return ovl_lane_fail(ask, EIO);
	new_len = ovl_lane_name(ask->body + head + len + 1, ask->size - head - len - 1);
	if (new_len == 0)
		return ovl_lane_fail(ask, EIO);
	if (in.flags & ~(uint32_t)RENAME_NOREPLACE || !enter_gate(ask))
		return OVL_LANE_PASS;
	if (!find_place(fs, ask->header.nodeid, ask->body + head, len, &from) ||
	    !find_place(fs, in.newdir, ask->body + head + len + 1, new_len, &to))
		return pass(ask);
	if (from.child.entry.nodeid == 0 || S_ISDIR(from.child.entry.attr.mode) ||
	    to.child.entry.nodeid == from.child.entry.nodeid)
		return pass(ask);
	if (to.child.entry.nodeid && in.flags & RENAME_NOREPLACE)
		return done(ask, -EEXIST);
	below = !from.child.upper;
	if ((to.child.entry.nodeid && S_ISDIR(to.child.entry.attr.mode)) ||
	    !need_upper(fs, from.child.entry.nodeid, &from.child))
		return pass(ask);
	/* The second may take the slot of the first, which then is opened anew. */
	if (!open_place(fs, &from) || !open_place(fs, &to) || !open_place(fs, &from))
		return pass(ask);
	err = below ? 0 : ovl_tree_below(fs->tree, from.parent, from.bytes, from.len);
	if (err && err != OVL_ABSENT)
		return pass(ask);
	if (err == 0) {
		if (!fs->upper.devices)
			return pass(ask);
		flags = RENAME_WHITEOUT;
	}
	began_ns = ovl_lane_trace_began(fs->trace);
	fd = openat(from.dir->fd, from.name, O_PATH | O_NOFOLLOW | O_CLOEXEC);
	if (fd < 0)
		return pass(ask);
	if (from.child.metacopy && !from.child.redirect &&
	    ovl_lane_redirect_metacopy(fs, from.child.entry.nodeid, ovl_lane_proc(fd).text)) {
		close(fd);
		return pass(ask);
	}
	if (to.child.entry.nodeid)
		held = hold_last(fs, &to);
	if (held < 0 && to.child.upper && to.child.name_count == 1 && ovl_tree_orphan(fs->tree, to.child.entry.nodeid) < 0)
		err = -EIO;
	else
		err = renameat2(from.dir->fd, from.name, to.dir->fd, to.name, flags) != 0 ? -errno : 0;
	if (err) { /* RENAME_WHITEOUT is not everywhere; what else it is, Python finds out */
		close(fd);
		if (held >= 0)
			close(held);
		return pass(ask);
	}
	if (flags)
		ovl_lane_trace_told(fs->trace, OVL_TRACE_WHITEOUT, from.dir->nodeid, from.bytes, from.len, 0, began_ns);
	ovl_lane_trace_told(fs->trace, OVL_TRACE_RENAME, from.dir->nodeid, ask->body + head, len + 1 + new_len,
			    in.newdir, began_ns);
	err = ovl_tree_move(fs->tree, from.dir->nodeid, from.bytes, from.len, to.dir->nodeid, to.bytes, to.len, &asked);
	if (to.child.entry.nodeid)
		lost_name(fs, &to, held);
	if (from.dir->has_lower)
		ovl_lane_set_impure(fs, from.dir);
	if (to.dir->has_lower)
		ovl_lane_set_impure(fs, to.dir);
	refresh_dir(fs, from.dir);
	if (to.dir != from.dir)
		refresh_dir(fs, to.dir);
	(void)ovl_lane_refresh(fs, from.child.entry.nodeid, fd, &entry); /* its ctime */
	close(fd);
	return done(ask, err > 0 ? -EIO : err);
}

/* ---- attributes ------------------------------------------------------------------------------------------ */

static struct timespec time_of(uint32_t valid, uint32_t bit, uint64_t sec, uint32_t nsec)
{
	if (!(valid & bit))
		return (struct timespec){.tv_nsec = UTIME_OMIT};
	return (struct timespec){.tv_sec = (time_t)sec, .tv_nsec = nsec};
}

/* What the kernel left to us (HANDLE_KILLPRIV_V2), as mode bits for whoever is given the request. */
static void spell_kill_out(struct ovl_lane_ask *ask, const struct ovl_description *is, struct fuse_setattr_in *in)
{
	uint32_t mode = is->entry.attr.mode, killed = ovl_lane_mode_killed(mode);

	if (in->valid & FATTR_MODE || S_ISDIR(mode) || killed == mode ||
	    !(in->valid & (SET_KILL_SUIDGID | FATTR_UID | FATTR_GID)) || !atomic_load(&ask->fs->killpriv))
		return;
	in->valid |= FATTR_MODE;
	in->mode = killed;
}

enum ovl_lane_verdict ovl_lane_setattr(struct ovl_lane_ask *ask)
{
	struct ovl_lane_fs *fs = ask->fs;
	const uint64_t nodeid = ask->header.nodeid;
	struct fuse_attr_out out = {.attr_valid = OVL_LANE_VALID_S};
	struct fuse_setattr_in in;
	struct ovl_description is;
	struct timespec times[2];
	struct ovl_entry entry;
	struct ovl_lane_proc proc;
	ovl_err_t err = 0;
	struct ovl_lane_io *io = NULL;
	bool by_path, by_handle, emptied = false;
	int fd = -1;

	if (!ovl_lane_head(ask, &in, sizeof(in)))
		return ovl_lane_fail(ask, EIO);
	if (ovl_tree_describe(fs->tree, nodeid, false, &is))
		return OVL_LANE_PASS;
	spell_kill_out(ask, &is, &in);
	in.valid &= ~SET_KILL_SUIDGID;
	memcpy(ask->body, &in, sizeof(in));
	if (fs->upper.work_fd < 0 || (in.valid & FATTR_SIZE && (is.metacopy || in.size > INT64_MAX)) ||
	    (in.valid & (FATTR_MODE | FATTR_UID | FATTR_GID) && !fs->upper.direct) ||
	    (in.valid & (FATTR_UID | FATTR_GID) && !fs->upper.may_chown))
		return OVL_LANE_PASS;
	if (!enter_gate(ask))
		return OVL_LANE_PASS;
	if (!is.upper) {
		emptied = in.valid & FATTR_SIZE && in.size == 0 && is.entry.attr.size > 0;
		err = ovl_lane_copy_up(fs, nodeid, !(in.valid & FATTR_SIZE) ? OVL_LANE_COPY_META
						   : in.size == 0	    ? OVL_LANE_COPY_EMPTY
									    : OVL_LANE_COPY_DATA,
				       &fd);
		if (err > 0)
			return pass(ask);
		if (err)
			return done(ask, err);
	}
	if (fd < 0)
		io = ovl_lane_io_hold(fs, nodeid, &fd);
	by_path = fd < 0;
	if (by_path)
		fd = ovl_tree_open_upper(fs->tree, nodeid, O_PATH | O_NOFOLLOW);
	if (fd < 0)
		return pass(ask);
	proc = ovl_lane_proc(fd);
	/* By an open file's descriptor, or through that of the object (O_PATH), which takes another path.  The client's own
	 * ftruncate(2) also sets the times of a file that has the size already, truncate(2) does not: fs/open.c. */
	by_handle = in.valid & FATTR_FH && !by_path;
	if (in.valid & FATTR_SIZE &&
	    (by_handle ? ftruncate(fd, (off_t)in.size) : truncate(proc.text, (off_t)in.size)) != 0)
		err = -errno;
	if (!err && in.valid & (FATTR_UID | FATTR_GID) &&
	    fchownat(fd, "", in.valid & FATTR_UID ? in.uid : (uid_t)-1, in.valid & FATTR_GID ? in.gid : (gid_t)-1,
		     AT_EMPTY_PATH) != 0)
		err = -errno;
	if (!err && in.valid & FATTR_MODE && !S_ISLNK(is.entry.attr.mode) &&
	    (by_path ? chmod(proc.text, in.mode & 07777) : fchmod(fd, in.mode & 07777)) != 0)
		err = -errno;
	times[0] = time_of(in.valid, FATTR_ATIME, in.atime, in.atimensec);
	times[1] = time_of(in.valid, FATTR_MTIME, in.mtime, in.mtimensec);
	if (emptied && !(in.valid & FATTR_MTIME)) {
		times[1].tv_nsec = UTIME_NOW; /* the copy was empty from the start */
		in.valid |= FATTR_MTIME;
	}
	if (!err && in.valid & (FATTR_ATIME | FATTR_MTIME) &&
	    (by_path ? utimensat(fd, "", times, AT_EMPTY_PATH) : futimens(fd, times)) != 0)
		err = -errno;
	/* Also what failed half way has changed something. */
	if (ovl_lane_refresh(fs, nodeid, fd, &entry) && !err)
		err = -EIO;
	if (io)
		ovl_lane_io_let_go(fs, io);
	else
		close(fd);
	if (err)
		return done(ask, err);
	ovl_lane_fill_attr(&entry, &out.attr);
	ovl_lane_put(ask->answer, &out, sizeof(out));
	return done(ask, 0);
}
