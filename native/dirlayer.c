/*
 * dirlayer.c - answers from a directory on disk; see dirlayer.h for the dialects and the rule of confinement
 *
 * Kernel: fs/overlayfs/util.c: ovl_is_whiteout(), ovl_path_check_xwhiteout_xattr(), ovl_get_opaquedir_val(),
 * ovl_check_metacopy_xattr(), ovl_get_redirect_xattr().
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "dirlayer.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/xattr.h>
#include <unistd.h>

#define WHITEOUT_PREFIX ".wh."
#define WHITEOUT_PREFIX_LEN 4u
#define OPAQUE_NAME ".wh..wh..opq"
#define FUSE_OVERLAYFS "user.fuseoverlayfs."
#define OVERRIDE_XATTR "user.containers.override_stat"

/* ---- openat2 ------------------------------------------------------------------------------------------ */

#ifndef SYS_openat2
#define SYS_openat2 437
#endif
#define RESOLVE_NO_MAGICLINKS 0x02ull
#define RESOLVE_NO_SYMLINKS 0x04ull
#define RESOLVE_BENEATH 0x08ull

/* include/uapi/linux/openat2.h, which older distributions do not ship */
struct ovl_open_how {
	uint64_t flags;
	uint64_t mode;
	uint64_t resolve;
};
static_assert(sizeof(struct ovl_open_how) == 24, "struct open_how is 24 bytes in its first version");

/* openat2 takes at most PATH_MAX bytes; deeper paths are walked in pieces of whole components. */
#define CHUNK_BYTES 3500u
static_assert(CHUNK_BYTES + OVL_NAME_MAX < PATH_MAX, "a piece fits openat2");

static int open_piece(int dirfd, const uint8_t *path, size_t len, int flags)
{
	struct ovl_open_how how = {
		.flags = (uint64_t)(unsigned)flags | O_CLOEXEC,
		.resolve = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS,
	};
	char text[PATH_MAX];

	if (len >= sizeof(text))
		return -ENAMETOOLONG;
	memcpy(text, path, len);
	text[len] = 0;
	for (;;) {
		long fd = syscall(SYS_openat2, dirfd, len ? text : ".", &how, sizeof(how));

		if (fd >= 0)
			return (int)fd;
		/* EAGAIN: a rename raced with the check of "beneath"; the kernel asks for another try. */
		if (errno != EAGAIN && errno != EINTR)
			return -errno;
	}
}

int ovl_dirlayer_open(const struct ovl_dirlayer *layer, const uint8_t *path, size_t len, int flags)
{
	int at = layer->root;
	int fd;

	while (len > CHUNK_BYTES) {
		size_t cut = CHUNK_BYTES;

		while (cut > 0 && path[cut] != '/')
			cut--;
		if (cut == 0) {
			fd = -ENAMETOOLONG;
			goto out;
		}
		fd = open_piece(at, path, cut, O_PATH | O_DIRECTORY);
		if (fd < 0)
			goto out;
		if (at != layer->root)
			close(at);
		at = fd;
		path += cut + 1;
		len -= cut + 1;
	}
	fd = open_piece(at, path, len, flags);
out:
	if (at != layer->root)
		close(at);
	return fd;
}

/* ---- xattrs ------------------------------------------------------------------------------------------- */

/* "/proc/self/fd/N/NAME": a path of the object itself, which l*xattr calls do not follow. */
struct proc_path {
	char text[sizeof("/proc/self/fd/2147483647/") + OVL_NAME_MAX + 1];
};

static ovl_err_t proc_path(struct proc_path *at, int dirfd, const uint8_t *name, size_t len)
{
	int head = snprintf(at->text, sizeof(at->text), "/proc/self/fd/%d/", dirfd);

	if (head < 0 || len == 0 || len > OVL_NAME_MAX)
		return -ENAMETOOLONG;
	memcpy(at->text + head, name, len);
	at->text[(size_t)head + len] = 0;
	return 0;
}

/* The length of an xattr, its start in `value`; -ENODATA when there is none.  A value longer than `size` gives
 * size + 1 and no content. */
static ssize_t get_xattr(const char *path, int fd, const char *name, void *value, size_t size)
{
	ssize_t got = path ? lgetxattr(path, name, value, size) : fgetxattr(fd, name, value, size);

	if (got >= 0)
		return got;
	switch (errno) {
	case ENODATA:    /* absent */
	case EOPNOTSUPP: /* a file system without xattrs */
	case EPERM:      /* user.* on what cannot have it */
		return -ENODATA;
	case ERANGE:
		return (ssize_t)size + 1;
	default:
		return -errno;
	}
}

/* The same of the overlay's own xattr `name`, in the first namespace that has it. */
static ssize_t own_xattr(const struct ovl_dirlayer *layer, const char *path, int fd, const char *name, void *value,
			 size_t size)
{
	char full[64];

	for (size_t i = 0; i < layer->prefix_count; i++) {
		int len = snprintf(full, sizeof(full), "%s%s", layer->prefix[i], name);
		ssize_t got;

		if (len < 0 || (size_t)len >= sizeof(full))
			return -EINVAL;
		got = get_xattr(path, fd, full, value, size);
		if (got != -ENODATA)
			return got;
	}
	return -ENODATA;
}

/* 1: the object has it; 0: not; -errno. */
static int has_own_xattr(const struct ovl_dirlayer *layer, const char *path, const char *name)
{
	ssize_t got = own_xattr(layer, path, -1, name, NULL, 0);

	if (got == -ENODATA)
		return 0;
	return got < 0 ? (int)got : 1;
}

/* 1: the overlay's xattr "opaque" is the one letter; 0: not; -errno. */
static int opaque_is(const struct ovl_dirlayer *layer, const char *path, int fd, char letter)
{
	char value = 0;
	ssize_t got = own_xattr(layer, path, fd, "opaque", &value, 1);

	if (got < 0)
		return got == -ENODATA ? 0 : (int)got;
	return got == 1 && value == letter;
}

bool ovl_dirlayer_hides(const struct ovl_dirlayer *layer, const char *xattr)
{
	static const char escape[] = "overlay.";

	if (((layer->override || layer->oci) && strcmp(xattr, OVERRIDE_XATTR) == 0) ||
	    (layer->oci && strncmp(xattr, FUSE_OVERLAYFS, sizeof(FUSE_OVERLAYFS) - 1) == 0))
		return true;
	for (size_t i = 0; i < layer->prefix_count; i++) {
		size_t len = strlen(layer->prefix[i]);

		if (strncmp(xattr, layer->prefix[i], len) == 0)
			return strncmp(xattr + len, escape, sizeof(escape) - 1) != 0;
	}
	return false;
}

/* listxattrat(2), Linux 6.13: spares the way through /proc, which is most of what asking for an xattr costs. */
#ifndef SYS_listxattrat
#define SYS_listxattrat 465
#endif
#define LIST_BYTES 1024u

/* Which xattrs an object has that say something about a layer: bits, one or more. */
enum {
	OWN_OPAQUE = 1,
	OWN_REDIRECT = 2,
	OWN_METACOPY = 4,
	OWN_WHITEOUT = 8,
	OWN_FUSE_OVERLAYFS = 16,
	OWN_UNKNOWN = 31,
};

static unsigned own_bit(const struct ovl_dirlayer *layer, const char *xattr)
{
	static const struct {
		const char *name;
		unsigned bit;
	} known[] = {
		{"opaque", OWN_OPAQUE}, {"redirect", OWN_REDIRECT}, {"metacopy", OWN_METACOPY}, {"whiteout", OWN_WHITEOUT},
	};

	if (strncmp(xattr, FUSE_OVERLAYFS, sizeof(FUSE_OVERLAYFS) - 1) == 0)
		return OWN_FUSE_OVERLAYFS;
	for (size_t i = 0; i < layer->prefix_count; i++) {
		size_t len = strlen(layer->prefix[i]);

		if (strncmp(xattr, layer->prefix[i], len) != 0)
			continue;
		for (size_t k = 0; k < sizeof(known) / sizeof(known[0]); k++)
			if (strcmp(xattr + len, known[k].name) == 0)
				return known[k].bit;
	}
	return 0;
}

/* `size`: what listing the xattrs has given. */
static unsigned own_bits(const struct ovl_dirlayer *layer, const char *list, long size)
{
	unsigned bits = 0;

	if (size < 0)
		return errno == EOPNOTSUPP ? 0 : OWN_UNKNOWN;
	for (long at = 0; at < size; at += (long)strlen(list + at) + 1) {
		if (!memchr(list + at, 0, (size_t)(size - at)))
			return OWN_UNKNOWN; /* a file system that does not end its names */
		bits |= own_bit(layer, list + at);
	}
	return bits;
}

static unsigned own_of_name(const struct ovl_dirlayer *layer, int dirfd, const char *name)
{
	char list[LIST_BYTES];

	return own_bits(layer, list, syscall(SYS_listxattrat, dirfd, name, AT_SYMLINK_NOFOLLOW, list, sizeof(list)));
}

static unsigned own_of_fd(const struct ovl_dirlayer *layer, int fd)
{
	char list[LIST_BYTES];

	return own_bits(layer, list, flistxattr(fd, list, sizeof(list)));
}

/* ---- lookup ------------------------------------------------------------------------------------------- */

static int exists_at(int dirfd, const char *name)
{
	struct stat st;

	if (fstatat(dirfd, name, &st, AT_SYMLINK_NOFOLLOW) == 0)
		return 1;
	return errno == ENOENT ? 0 : -errno;
}

/* 1: there is a .wh.NAME; 0: not; -errno. */
static int whited_out(const struct ovl_dirlayer *layer, int dirfd, const uint8_t *name, size_t len)
{
	char text[OVL_NAME_MAX + 1];

	if (!layer->oci || len + WHITEOUT_PREFIX_LEN > OVL_NAME_MAX)
		return 0;
	memcpy(text, WHITEOUT_PREFIX, WHITEOUT_PREFIX_LEN);
	memcpy(text + WHITEOUT_PREFIX_LEN, name, len);
	text[WHITEOUT_PREFIX_LEN + len] = 0;
	return exists_at(dirfd, text);
}

static bool has_whiteout_prefix(const uint8_t *name, size_t len)
{
	return len >= WHITEOUT_PREFIX_LEN && memcmp(name, WHITEOUT_PREFIX, WHITEOUT_PREFIX_LEN) == 0;
}

static int is_opaque(const struct ovl_dirlayer *layer, int dirfd, const struct proc_path *at, const uint8_t *name,
		     size_t len, unsigned own)
{
	int yes = own & OWN_OPAQUE ? opaque_is(layer, at->text, -1, 'y') : 0;
	char value = 0;
	ssize_t got;
	int fd;

	if (yes != 0)
		return yes;
	yes = whited_out(layer, dirfd, name, len);
	if (yes != 0 || !layer->oci)
		return yes;
	fd = open_piece(dirfd, name, len, O_PATH | O_DIRECTORY);
	if (fd < 0)
		return fd;
	yes = exists_at(fd, OPAQUE_NAME);
	close(fd);
	if (yes != 0 || !(own & OWN_FUSE_OVERLAYFS))
		return yes;
	got = get_xattr(at->text, -1, FUSE_OVERLAYFS "opaque", &value, 1);
	if (got < 0)
		return got == -ENODATA ? 0 : (int)got;
	return got == 1 && value == 'y';
}

ovl_err_t ovl_dirlayer_lookup(const struct ovl_dirlayer *layer, int dirfd, const uint8_t *name, size_t len,
			      struct ovl_dir_entry *out)
{
	struct proc_path at;
	ovl_err_t err = proc_path(&at, dirfd, name, len);
	const char *base = strrchr(at.text, '/') + 1;
	unsigned own;
	int yes;

	if (err)
		return err;
	if (layer->oci && has_whiteout_prefix(name, len))
		return OVL_ABSENT;
	*out = (struct ovl_dir_entry){.what = OVL_OTHER};
	if (fstatat(dirfd, base, &out->st, AT_SYMLINK_NOFOLLOW) != 0) {
		if (errno != ENOENT)
			return -errno;
		yes = whited_out(layer, dirfd, name, len);
		out->what = OVL_WHITEOUT;
		return yes == 1 ? 0 : yes == 0 ? OVL_ABSENT : yes;
	}
	switch (out->st.st_mode & S_IFMT) {
	case S_IFDIR:
		out->what = OVL_DIRECTORY;
		own = own_of_name(layer, dirfd, base);
		yes = is_opaque(layer, dirfd, &at, name, len, own);
		if (yes < 0)
			return yes;
		out->opaque = yes == 1;
		if (!(own & OWN_REDIRECT))
			return 0;
		yes = has_own_xattr(layer, at.text, "redirect");
		return yes == 1 ? OVL_ASK : yes;
	case S_IFCHR:
		if (out->st.st_rdev == 0)
			out->what = OVL_WHITEOUT;
		return 0;
	case S_IFREG:
		own = own_of_name(layer, dirfd, base);
		if (own & OWN_WHITEOUT && out->st.st_size == 0) {
			yes = has_own_xattr(layer, at.text, "whiteout");
			if (yes == 1)
				out->what = OVL_WHITEOUT;
			if (yes != 0)
				return yes == 1 ? 0 : yes;
		}
		if (!(own & OWN_METACOPY))
			return 0;
		yes = has_own_xattr(layer, at.text, "metacopy");
		return yes == 1 ? OVL_ASK : yes;
	default:
		return 0;
	}
}

ovl_err_t ovl_dirlayer_origin(const struct ovl_dirlayer *layer, int dirfd, const uint8_t *name, size_t len)
{
	struct proc_path at;
	ovl_err_t err = proc_path(&at, dirfd, name, len);
	int yes;

	if (err)
		return err;
	yes = has_own_xattr(layer, at.text, "origin");
	return yes == 1 ? OVL_ASK : yes;
}

/* ---- attributes --------------------------------------------------------------------------------------- */

int64_t ovl_ns(int64_t sec, int64_t nsec)
{
	int64_t ns;

	if (__builtin_mul_overflow(sec, 1000000000, &ns) || __builtin_add_overflow(ns, nsec, &ns))
		return sec < 0 ? INT64_MIN : INT64_MAX;
	return ns;
}

void ovl_attr_of_stat(const struct stat *st, struct ovl_attr *out)
{
	*out = (struct ovl_attr){
		.size = (uint64_t)st->st_size,
		.blocks = (uint64_t)st->st_blocks,
		.atime_ns = ovl_ns(st->st_atim.tv_sec, st->st_atim.tv_nsec),
		.mtime_ns = ovl_ns(st->st_mtim.tv_sec, st->st_mtim.tv_nsec),
		.ctime_ns = ovl_ns(st->st_ctim.tv_sec, st->st_ctim.tv_nsec),
		.mode = st->st_mode,
		.nlink = (uint32_t)st->st_nlink,
		.uid = st->st_uid,
		.gid = st->st_gid,
		.rdev = (uint32_t)st->st_rdev,
	};
}

/* A number of plain digits that ends at `stop`; false: not written that way. */
static bool take_number(const char **text, unsigned base, char stop, uint64_t most, uint64_t *out)
{
	const char *p = *text;
	uint64_t value = 0;

	for (; *p >= '0' && *p < (char)('0' + base); p++) {
		value = value * base + (uint64_t)(*p - '0');
		if (value > most)
			return false;
	}
	if (p == *text || *p != stop)
		return false;
	*text = *p ? p + 1 : p;
	*out = value;
	return true;
}

static bool take_type(const char *text, struct ovl_attr *out)
{
	static const struct {
		const char *name;
		uint32_t type;
	} types[] = {
		{"file", S_IFREG}, {"dir", S_IFDIR}, {"symlink", S_IFLNK}, {"pipe", S_IFIFO}, {"socket", S_IFSOCK},
	};
	uint64_t major_number, minor_number;
	uint32_t type = 0;

	for (size_t i = 0; i < sizeof(types) / sizeof(types[0]); i++)
		if (strcmp(text, types[i].name) == 0)
			type = types[i].type;
	if (!type && strncmp(text, "block-", 6) == 0) {
		type = S_IFBLK;
		text += 6;
	} else if (!type && strncmp(text, "char-", 5) == 0) {
		type = S_IFCHR;
		text += 5;
	}
	if (type == S_IFBLK || type == S_IFCHR) {
		if (!take_number(&text, 10, '-', 0xfff, &major_number) ||
		    !take_number(&text, 10, 0, 0xfffff, &minor_number))
			return false;
		out->rdev = (uint32_t)makedev((unsigned)major_number, (unsigned)minor_number);
	}
	if (type && type != S_IFREG && type != S_IFLNK && type != S_IFDIR)
		out->size = 0;
	if (type)
		out->mode = type | (out->mode & 07777);
	return type != 0;
}

/* `uid:gid:mode[:type]`, written as the tools write it (ovlfs/layer/override.py).  False: read it with more care. */
static bool take_override(const char *text, struct ovl_attr *out)
{
	uint64_t uid, gid, mode;
	const char *colon = strchr(text, ':');

	colon = colon ? strchr(colon + 1, ':') : NULL;
	if (!colon || !take_number(&text, 10, ':', 0xfffffffe, &uid) ||
	    !take_number(&text, 10, ':', 0xfffffffe, &gid) ||
	    !take_number(&text, 8, strchr(colon + 1, ':') ? ':' : 0, UINT32_MAX, &mode))
		return false;
	out->uid = (uint32_t)uid;
	out->gid = (uint32_t)gid;
	out->mode = (out->mode & S_IFMT) | ((uint32_t)mode & 07777);
	out->rdev = 0;
	return text[-1] != ':' || take_type(text, out);
}

ovl_err_t ovl_dirlayer_attr(const struct ovl_dirlayer *layer, int dirfd, const uint8_t *name, size_t len,
			    const struct stat *st, struct ovl_attr *out)
{
	struct proc_path at;
	char value[64];
	ssize_t got;
	ovl_err_t err;

	ovl_attr_of_stat(st, out);
	if (!layer->override || (!S_ISREG(st->st_mode) && !S_ISDIR(st->st_mode)))
		return 0;
	err = proc_path(&at, dirfd, name, len);
	if (err)
		return err;
	got = get_xattr(at.text, -1, OVERRIDE_XATTR, value, sizeof(value) - 1);
	if (got == -ENODATA)
		return 0;
	if (got < 0)
		return (ovl_err_t)got;
	if ((size_t)got >= sizeof(value))
		return OVL_ASK;
	while (got > 0 && value[got - 1] == 0)
		got--;
	value[got] = 0;
	return strlen(value) == (size_t)got && take_override(value, out) ? 0 : OVL_ASK;
}

/* ---- list --------------------------------------------------------------------------------------------- */

struct listing {
	const struct ovl_dirlayer *layer;
	int fd;
	bool xattr_whiteouts; /* the directory says that there are some */
};

/* What the list says of a name, with as few system calls as will do. */
static ovl_err_t what_of(const struct listing *list, const struct dirent64 *d, size_t len, enum ovl_what *out)
{
	unsigned char type = d->d_type;
	struct proc_path at;
	struct stat st;
	ovl_err_t err;
	int yes;

	*out = OVL_OTHER;
	if (type == DT_DIR)
		*out = OVL_DIRECTORY;
	if (type != DT_UNKNOWN && type != DT_CHR && (type != DT_REG || !list->xattr_whiteouts))
		return 0;
	if (fstatat(list->fd, d->d_name, &st, AT_SYMLINK_NOFOLLOW) != 0)
		return -errno;
	if (S_ISDIR(st.st_mode))
		*out = OVL_DIRECTORY;
	if (S_ISCHR(st.st_mode) && st.st_rdev == 0)
		*out = OVL_WHITEOUT;
	if (!S_ISREG(st.st_mode) || !list->xattr_whiteouts || st.st_size != 0)
		return 0;
	err = proc_path(&at, list->fd, (const uint8_t *)d->d_name, len);
	if (err)
		return err;
	yes = has_own_xattr(list->layer, at.text, "whiteout");
	if (yes == 1)
		*out = OVL_WHITEOUT;
	return yes < 0 ? yes : 0;
}

static ovl_err_t list_one(const struct listing *list, const struct dirent64 *d, ovl_dirlayer_emit emit, void *arg)
{
	const uint8_t *name = (const uint8_t *)d->d_name;
	size_t len = strlen(d->d_name);
	enum ovl_what what;
	ovl_err_t err;

	if (strcmp(d->d_name, ".") == 0 || strcmp(d->d_name, "..") == 0)
		return 0;
	if (len > OVL_NAME_MAX)
		return -ENAMETOOLONG;
	if (list->layer->oci && has_whiteout_prefix(name, len)) {
		int yes;

		name += WHITEOUT_PREFIX_LEN;
		len -= WHITEOUT_PREFIX_LEN;
		if (len == 0 || strcmp(d->d_name, OPAQUE_NAME) == 0)
			return 0;
		yes = exists_at(list->fd, (const char *)name); /* its own names are never hidden */
		if (yes != 0)
			return yes < 0 ? yes : 0;
		return emit(arg, OVL_WHITEOUT, name, len);
	}
	err = what_of(list, d, len, &what);
	return err ? err : emit(arg, what, name, len);
}

ovl_err_t ovl_dirlayer_list(const struct ovl_dirlayer *layer, int dirfd, bool is_root, ovl_dirlayer_emit emit, void *arg)
{
	enum { BUFFER_BYTES = 1 << 15 };
	struct listing list = {.layer = layer, .fd = dirfd, .xattr_whiteouts = true};
	uint8_t *buffer;
	ovl_err_t err;

	err = -ENOMEM;
	buffer = malloc(BUFFER_BYTES);
	if (!buffer)
		goto out;
	if (lseek(dirfd, 0, SEEK_SET) != 0) {
		err = -errno;
		goto out;
	}
	if (!is_root) {
		int yes = own_of_fd(layer, dirfd) & OWN_OPAQUE ? opaque_is(layer, NULL, dirfd, 'x') : 0;

		if (yes < 0) {
			err = yes;
			goto out;
		}
		list.xattr_whiteouts = yes == 1;
	}
	for (;;) {
		long got = syscall(SYS_getdents64, dirfd, buffer, (size_t)BUFFER_BYTES);

		if (got <= 0) {
			err = got < 0 ? -errno : 0;
			goto out;
		}
		for (long at = 0; at < got;) {
			const struct dirent64 *d = (const struct dirent64 *)(const void *)(buffer + at);

			err = list_one(&list, d, emit, arg);
			if (err)
				goto out;
			at += d->d_reclen;
		}
	}
out:
	free(buffer);
	return err;
}
