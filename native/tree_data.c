/*
 * tree_data.c - where is an inode's data, and what is kept for an inode that has lost its name?  See tree.h.
 *
 * A file's data is in the upperdir, in a file of a directory layer, or in a piece of a tar.  A metacopy has its
 * attributes in the upperdir and its data below.  The reference is ovlfs/overlay/file.py (Handle) and copy_up.py
 * (data_source).
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "tree_impl.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* ---- what is kept ------------------------------------------------------------------------------------- */

static struct kept **kept_at(const struct node *node)
{
	if (node->flags & NODE_DIR)
		return &node->u.dir->kept;
	return node->u.extra ? &node->u.extra->kept : NULL;
}

struct kept *ovl_node_kept(const struct node *node)
{
	return node->flags & NODE_KEPT ? *kept_at(node) : NULL;
}

struct kept *ovl_node_keep(struct node *node)
{
	struct kept *kept = ovl_node_kept(node);

	if (kept)
		return kept;
	if (!(node->flags & NODE_DIR) && !node->u.extra && ovl_node_reserve_extra(node))
		return NULL;
	kept = malloc(sizeof(*kept));
	if (!kept)
		return NULL;
	*kept = (struct kept){.orphan = -1, .live = -1};
	*kept_at(node) = kept;
	node->flags |= NODE_KEPT;
	return kept;
}

void ovl_node_drop_kept(struct node *node)
{
	struct kept *kept = ovl_node_kept(node);

	if (!kept)
		return;
	if (kept->orphan >= 0)
		close(kept->orphan);
	free(kept);
	*kept_at(node) = NULL;
	node->flags &= NODE_FLAGS & ~(unsigned)(NODE_KEPT | NODE_LIVE);
}

ovl_err_t ovl_tree_set_orphan(struct ovl_tree *tree, uint64_t nodeid, int fd)
{
	struct kept *kept = NULL;
	struct node *node;
	int before = fd;
	ovl_err_t err;

	pthread_rwlock_wrlock(&tree->lock);
	err = ovl_tree_find(tree, nodeid, &node);
	if (!err) {
		kept = ovl_node_keep(node);
		err = kept ? 0 : -ENOMEM;
	}
	if (!err) {
		before = kept->orphan;
		kept->orphan = fd;
	}
	pthread_rwlock_unlock(&tree->lock);
	if (before >= 0)
		close(before);
	return err;
}

int ovl_tree_orphan(struct ovl_tree *tree, uint64_t nodeid)
{
	const struct kept *kept = NULL;
	struct node *node;
	int fd = -1;

	pthread_rwlock_rdlock(&tree->lock);
	if (ovl_tree_find(tree, nodeid, &node) == 0)
		kept = ovl_node_kept(node);
	if (kept)
		fd = kept->orphan;
	pthread_rwlock_unlock(&tree->lock);
	return fd;
}

ovl_err_t ovl_tree_set_last_parent(struct ovl_tree *tree, uint64_t nodeid, uint64_t parent)
{
	struct kept *kept;
	struct node *node;
	ovl_err_t err;

	pthread_rwlock_wrlock(&tree->lock);
	err = ovl_tree_find(tree, nodeid, &node);
	if (!err) {
		kept = ovl_node_keep(node);
		if (kept)
			kept->last_parent = parent;
		else
			err = -ENOMEM;
	}
	pthread_rwlock_unlock(&tree->lock);
	return err;
}

uint64_t ovl_tree_last_parent(struct ovl_tree *tree, uint64_t nodeid)
{
	const struct kept *kept = NULL;
	struct node *node;
	uint64_t parent = 0;

	pthread_rwlock_rdlock(&tree->lock);
	if (ovl_tree_find(tree, nodeid, &node) == 0)
		kept = ovl_node_kept(node);
	if (kept)
		parent = kept->last_parent;
	pthread_rwlock_unlock(&tree->lock);
	return parent;
}

/* ---- live files --------------------------------------------------------------------------------------- */

void ovl_node_read_live(const struct node *node, struct ovl_attr *attr)
{
	const struct kept *kept = ovl_node_kept(node);
	struct ovl_attr now;
	struct stat st;

	/* A file that cannot be stat'ed any more (its file system is gone) keeps what it had. */
	if (!kept || kept->live < 0 || fstat(kept->live, &st) != 0)
		return;
	ovl_attr_of_stat(&st, &now);
	attr->size = now.size;
	attr->blocks = now.blocks;
	attr->atime_ns = now.atime_ns;
	attr->mtime_ns = now.mtime_ns;
	attr->ctime_ns = now.ctime_ns;
}

ovl_err_t ovl_tree_set_live(struct ovl_tree *tree, uint64_t nodeid, int fd)
{
	struct kept *kept;
	struct node *node;
	ovl_err_t err;

	pthread_rwlock_wrlock(&tree->lock);
	err = ovl_tree_find(tree, nodeid, &node);
	if (!err && fd >= 0) {
		kept = ovl_node_keep(node);
		if (kept) {
			kept->live = fd;
			node->flags |= NODE_LIVE;
		} else {
			err = -ENOMEM;
		}
	} else if (!err && node->flags & NODE_LIVE) {
		kept = ovl_node_kept(node);
		ovl_node_read_live(node, &node->attr);
		kept->live = -1;
		node->flags &= NODE_FLAGS & ~(unsigned)NODE_LIVE;
		if (kept->orphan < 0 && kept->last_parent == 0)
			ovl_node_drop_kept(node);
	}
	pthread_rwlock_unlock(&tree->lock);
	return err;
}

/* ---- data --------------------------------------------------------------------------------------------- */

/* Opens an object of the upperdir anew, without a name if need be.  Whoever renames changes the disk first and the tree
 * after, so for a moment a path can lead nowhere, or to another object: -ESTALE then. */
static int open_upper(const struct ovl_tree *tree, const struct node *node, int flags)
{
	const struct kept *kept = ovl_node_kept(node);
	char proc[sizeof("/proc/self/fd/2147483647")];
	struct stat st;
	uint8_t *path;
	size_t len;
	ovl_err_t err;
	int fd;

	if (kept && kept->orphan >= 0) {
		/* It is ours and no symlink that could be followed: the descriptor was opened with O_NOFOLLOW. */
		snprintf(proc, sizeof(proc), "/proc/self/fd/%d", kept->orphan);
		fd = open(proc, (flags & ~O_NOFOLLOW) | O_CLOEXEC);
		return fd < 0 ? -errno : fd;
	}
	err = ovl_node_path(tree, node, &path, &len);
	if (err)
		return err;
	fd = ovl_dirlayer_open(&tree->stack.layers[0].dir, path, len, flags);
	free(path);
	if (fd == -ENOENT || fd == -ENOTDIR)
		return -ESTALE;
	if (fd >= 0 && (fstat(fd, &st) != 0 || st.st_ino != node->upper_ino)) {
		close(fd);
		return -ESTALE;
	}
	return fd;
}

static bool has_upper_data(const struct node *node)
{
	return node->flags & NODE_UPPER && !(node->flags & NODE_METACOPY);
}

bool ovl_tree_has_upper_data(struct ovl_tree *tree, uint64_t nodeid)
{
	struct node *node;
	bool yes;

	pthread_rwlock_rdlock(&tree->lock);
	yes = ovl_tree_find(tree, nodeid, &node) == 0 && has_upper_data(node);
	pthread_rwlock_unlock(&tree->lock);
	return yes;
}

static bool wants_fill(const struct node *node, size_t most)
{
	return S_ISREG(node->attr.mode) && !has_upper_data(node) && !(node->flags & NODE_FILLED) && node->attr.size > 0 &&
	       node->attr.size <= most;
}

bool ovl_tree_fill(struct ovl_tree *tree, uint64_t nodeid, size_t most, size_t *size)
{
	struct node *node;
	bool yes;

	pthread_rwlock_rdlock(&tree->lock);
	yes = ovl_tree_find(tree, nodeid, &node) == 0 && wants_fill(node, most);
	pthread_rwlock_unlock(&tree->lock);
	if (!yes)
		return false;
	pthread_rwlock_wrlock(&tree->lock);
	yes = ovl_tree_find(tree, nodeid, &node) == 0 && wants_fill(node, most);
	if (yes) {
		node->flags |= NODE_FILLED;
		*size = (size_t)node->attr.size;
	}
	pthread_rwlock_unlock(&tree->lock);
	return yes;
}

static ovl_err_t open_lower(const struct ovl_tree *tree, const struct node *node, struct ovl_data *out)
{
	struct ovl_source source;
	const struct ovl_layer *layer;
	uint8_t *path;
	size_t len;
	ovl_err_t err;

	if (node->u.extra && node->u.extra->has_data)
		source = node->u.extra->data;
	else if (node->flags & NODE_LOWER)
		source = ovl_node_source(node);
	else
		return -EIO;
	layer = &tree->stack.layers[source.layer];
	out->size = node->attr.size;
	if (layer->kind == OVL_LAYER_TAR) {
		if (source.name || source.ref.number < 0 || source.ref.number > UINT32_MAX || layer->data_fd < 0)
			return OVL_ASK;
		out->kind = OVL_DATA_TAR;
		out->layer = layer;
		out->ref = (uint32_t)source.ref.number;
		return 0;
	}
	if (layer->kind != OVL_LAYER_DIR)
		return OVL_ASK;
	err = ovl_source_path(&source, &path, &len);
	if (err)
		return err;
	out->kind = OVL_DATA_FILE;
	/* Reading leaves no trace in a layer; only a file's owner may ask for that. */
	out->fd = ovl_dirlayer_open(&layer->dir, path, len, O_RDONLY | O_NONBLOCK | O_NOCTTY | O_NOATIME);
	if (out->fd == -EPERM)
		out->fd = ovl_dirlayer_open(&layer->dir, path, len, O_RDONLY | O_NONBLOCK | O_NOCTTY);
	free(path);
	return out->fd < 0 ? out->fd : 0;
}

ovl_err_t ovl_tree_open_data(struct ovl_tree *tree, uint64_t nodeid, int flags, struct ovl_data *out)
{
	struct node *node;
	ovl_err_t err;

	*out = (struct ovl_data){.fd = -1};
	pthread_rwlock_rdlock(&tree->lock);
	err = ovl_tree_find(tree, nodeid, &node);
	if (err)
		goto out;
	err = -EISDIR;
	if (node->flags & NODE_DIR)
		goto out;
	err = -ENXIO;
	if (!S_ISREG(node->attr.mode))
		goto out;
	if (has_upper_data(node)) {
		out->upper = true;
		out->fd = open_upper(tree, node, flags | O_NONBLOCK | O_NOCTTY);
		err = out->fd < 0 ? out->fd : 0;
	} else {
		err = open_lower(tree, node, out);
	}
out:
	pthread_rwlock_unlock(&tree->lock);
	return err;
}

static bool is_implied(const struct ovl_layer *layer, const struct ovl_source *source)
{
	struct ovl_index_attr attr;

	return layer->kind == OVL_LAYER_TAR && !ovl_index_attr(layer->index, (uint32_t)source->ref.number, &attr) &&
	       attr.flags & OVL_IX_IMPLIED;
}

/* False: there is nothing below the upperdir. */
static bool meta_source(const struct ovl_tree *tree, const struct node *node, struct ovl_source *out)
{
	if (!(node->flags & NODE_DIR)) {
		*out = ovl_node_source(node);
		return node->flags & NODE_LOWER;
	}
	for (uint32_t i = 0; i < node->u.dir->lower_count; i++) {
		*out = node->u.dir->lower[i];
		if (!is_implied(&tree->stack.layers[out->layer], out))
			return true;
	}
	if (node->u.dir->lower_count == 0)
		return false;
	*out = node->u.dir->lower[0];
	return true;
}

ovl_err_t ovl_tree_open_meta(struct ovl_tree *tree, uint64_t nodeid, struct ovl_data *out)
{
	const struct ovl_layer *layer;
	struct ovl_source source;
	struct node *node;
	uint8_t *path;
	size_t len;
	ovl_err_t err;

	*out = (struct ovl_data){.fd = -1};
	pthread_rwlock_rdlock(&tree->lock);
	err = ovl_tree_find(tree, nodeid, &node);
	if (err)
		goto out;
	if (node->flags & NODE_UPPER) {
		out->upper = true;
		out->fd = open_upper(tree, node, O_PATH | O_NOFOLLOW);
		err = out->fd < 0 ? out->fd : 0;
		goto out;
	}
	err = OVL_ASK;
	if (!meta_source(tree, node, &source))
		goto out;
	layer = &tree->stack.layers[source.layer];
	if (layer->kind == OVL_LAYER_TAR && !source.name && source.ref.number >= 0 && source.ref.number <= UINT32_MAX) {
		out->kind = OVL_DATA_TAR;
		out->layer = layer;
		out->ref = (uint32_t)source.ref.number;
		err = 0;
	} else if (layer->kind == OVL_LAYER_DIR) {
		err = ovl_source_path(&source, &path, &len);
		if (err)
			goto out;
		out->layer = layer;
		out->fd = ovl_dirlayer_open(&layer->dir, path, len, O_PATH | O_NOFOLLOW);
		free(path);
		err = out->fd < 0 ? out->fd : 0;
	}
out:
	pthread_rwlock_unlock(&tree->lock);
	return err;
}

int ovl_tree_open_upper(struct ovl_tree *tree, uint64_t nodeid, int flags)
{
	struct node *node;
	int fd;

	pthread_rwlock_rdlock(&tree->lock);
	fd = ovl_tree_find(tree, nodeid, &node);
	if (fd == 0)
		fd = node->flags & NODE_UPPER ? open_upper(tree, node, flags) : -EROFS;
	pthread_rwlock_unlock(&tree->lock);
	return fd;
}

#define REDIRECT_MAX 256u /* kernel: super.c: ovl_redirect_max */

ovl_err_t ovl_tree_redirect(struct ovl_tree *tree, uint64_t nodeid, uint8_t **path, size_t *len)
{
	uint8_t *plain = NULL;
	struct node *node;
	ovl_err_t err;

	*path = NULL;
	pthread_rwlock_rdlock(&tree->lock);
	err = ovl_tree_find(tree, nodeid, &node);
	for (const struct node *at = err ? NULL : node; at; at = at->parent)
		if (at->flags & NODE_REDIRECT)
			err = OVL_ASK;
	if (!err)
		err = ovl_node_path(tree, node, &plain, len);
	pthread_rwlock_unlock(&tree->lock);
	if (!err && *len + 1 > REDIRECT_MAX)
		err = OVL_ASK;
	if (!err) {
		*path = malloc(*len + 1);
		if (*path) {
			(*path)[0] = '/';
			memcpy(*path + 1, plain, *len);
			*len += 1;
		} else {
			err = -ENOMEM;
		}
	}
	free(plain);
	return err;
}
