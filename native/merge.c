/*
 * merge.c - looks one name up in a stack of layers, and lists a merged directory; see merge.h
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "merge.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>
#include <unistd.h>

/* ---- blobs, paths, sources ---------------------------------------------------------------------------- */

struct ovl_blob *ovl_blob_new(const void *bytes, size_t len)
{
	struct ovl_blob *blob;

	if (len > UINT32_MAX || len > SIZE_MAX - sizeof(*blob))
		return NULL;
	blob = malloc(sizeof(*blob) + len);
	if (!blob)
		return NULL;
	blob->refs = 1;
	blob->len = (uint32_t)len;
	if (len > 0)
		memcpy(blob->bytes, bytes, len);
	return blob;
}

struct ovl_blob *ovl_blob_ref(struct ovl_blob *blob)
{
	blob->refs++;
	return blob;
}

void ovl_blob_unref(struct ovl_blob *blob)
{
	if (blob && --blob->refs == 0)
		free(blob);
}

struct ovl_path *ovl_path_new(struct ovl_path *parent, const void *bytes, size_t len)
{
	struct ovl_path *path;

	if (len > UINT32_MAX || len > SIZE_MAX - sizeof(*path))
		return NULL;
	path = malloc(sizeof(*path) + len);
	if (!path)
		return NULL;
	path->refs = 1;
	path->len = (uint32_t)len;
	path->parent = ovl_path_ref(parent);
	if (len > 0)
		memcpy(path->bytes, bytes, len);
	return path;
}

struct ovl_path *ovl_path_ref(struct ovl_path *path)
{
	if (path)
		path->refs++;
	return path;
}

void ovl_path_unref(struct ovl_path *path)
{
	while (path && --path->refs == 0) {
		struct ovl_path *parent = path->parent;

		free(path);
		path = parent;
	}
}

void ovl_source_clear(const struct ovl_stack *stack, struct ovl_source *source)
{
	if (stack->layers[source->layer].kind == OVL_LAYER_DIR)
		ovl_path_unref(source->ref.path);
	ovl_blob_unref(source->name);
	memset(source, 0, sizeof(*source));
}

ovl_err_t ovl_source_path(const struct ovl_source *source, uint8_t **path, size_t *len)
{
	size_t need = source->name ? source->name->len : 0;
	uint8_t *text, *end;

	for (const struct ovl_path *at = source->ref.path; at; at = at->parent)
		if (__builtin_add_overflow(need, (size_t)at->len + (need > 0), &need))
			return -ENAMETOOLONG;
	text = malloc(need + 1);
	if (!text)
		return -ENOMEM;
	end = text + need;
	*end = 0;
	if (source->name) {
		end -= source->name->len;
		memcpy(end, source->name->bytes, source->name->len);
	}
	for (const struct ovl_path *at = source->ref.path; at; at = at->parent) {
		if (end != text + need)
			*--end = '/';
		end -= at->len;
		memcpy(end, at->bytes, at->len);
	}
	*path = text;
	*len = need;
	return 0;
}

bool ovl_layer_is_same(const struct ovl_layer *layer)
{
	struct stat st;

	return fstat(layer->data_fd, &st) == 0 && st.st_dev == layer->data_dev && st.st_ino == layer->data_ino &&
	       (uint64_t)st.st_size == layer->data_size &&
	       ovl_ns(st.st_mtim.tv_sec, st.st_mtim.tv_nsec) == layer->data_mtime_ns;
}

/* ---- inode numbers ------------------------------------------------------------------------------------ */

#define INO_BITS 48

uint64_t ovl_ino_of(uint64_t device_number, uint64_t number)
{
	if (number >> INO_BITS)
		number = (number ^ (number >> 17)) & ((1ull << INO_BITS) - 1);
	return device_number << INO_BITS | number;
}

ovl_err_t ovl_stack_ino(const struct ovl_stack *stack, uint64_t device, uint64_t number, uint64_t *ino)
{
	for (size_t i = 0; i < stack->device_count; i++)
		if (stack->devices[i].device == device) {
			*ino = ovl_ino_of(stack->devices[i].number, number);
			return 0;
		}
	return OVL_ASK;
}

/* ---- one merged directory ----------------------------------------------------------------------------- */

ovl_err_t ovl_merge_open(struct ovl_merge *merge, const struct ovl_stack *stack, const struct ovl_source *sources,
			 size_t count, bool upper, const uint8_t *path, size_t path_len)
{
	*merge = (struct ovl_merge){
		.stack = stack,
		.sources = sources,
		.count = count,
		.upper = upper,
		.path = path,
		.path_len = path_len,
	};
	merge->fds = merge->few;
	if (count + 1 > sizeof(merge->few) / sizeof(merge->few[0])) {
		merge->fds = calloc(count + 1, sizeof(int));
		if (!merge->fds)
			return -ENOMEM;
	}
	for (size_t i = 0; i <= count; i++)
		merge->fds[i] = -1;
	return 0;
}

void ovl_merge_close(struct ovl_merge *merge)
{
	if (!merge->fds)
		return;
	for (size_t i = 0; i <= merge->count; i++)
		if (merge->fds[i] >= 0)
			close(merge->fds[i]);
	if (merge->fds != merge->few)
		free(merge->fds);
	merge->fds = NULL;
}

/* Sources by number: 0 is the upperdir's, i the one at sources[i - 1]. */
static size_t first_source(const struct ovl_merge *merge)
{
	return merge->upper ? 0 : 1;
}

static const struct ovl_layer *layer_of(const struct ovl_merge *merge, size_t i)
{
	return &merge->stack->layers[i == 0 ? 0 : merge->sources[i - 1].layer];
}

/* The path of source `i`, a directory of a DIR layer.  `*path` to be freed is in `*owned`. */
static ovl_err_t path_of(const struct ovl_merge *merge, size_t i, const uint8_t **path, size_t *len, uint8_t **owned)
{
	ovl_err_t err;

	*owned = NULL;
	*path = merge->path;
	*len = merge->path_len;
	if (i == 0)
		return 0;
	err = ovl_source_path(&merge->sources[i - 1], owned, len);
	*path = *owned;
	return err;
}

/* A descriptor of source `i`, opened at the first question. */
static int fd_of(struct ovl_merge *merge, size_t i, bool readable)
{
	const uint8_t *path;
	uint8_t *owned;
	size_t len;
	ovl_err_t err;

	if (merge->fds[i] >= 0 && (merge->readable || !readable))
		return merge->fds[i];
	err = path_of(merge, i, &path, &len, &owned);
	if (err)
		return err;
	if (merge->fds[i] >= 0)
		close(merge->fds[i]);
	merge->fds[i] = ovl_dirlayer_open(&layer_of(merge, i)->dir, path, len, (readable ? O_RDONLY : O_PATH) | O_DIRECTORY);
	free(owned);
	return merge->fds[i];
}

/* ---- lookup ------------------------------------------------------------------------------------------- */

void ovl_found_clear(const struct ovl_stack *stack, struct ovl_found *found)
{
	for (size_t i = 0; i < found->lower_count; i++)
		ovl_source_clear(stack, &found->lower[i]);
	if (found->lower != &found->one)
		free(found->lower);
	found->lower = NULL;
	found->lower_count = 0;
}

/* What one layer says of the name. */
struct said {
	enum ovl_what what;
	bool opaque;
	bool implied;
	uint32_t ref;   /* TAR */
	struct stat st; /* DIR */
};

static ovl_err_t ask_layer(struct ovl_merge *merge, size_t i, const uint8_t *name, size_t len, struct said *out)
{
	const struct ovl_layer *layer = layer_of(merge, i);
	struct ovl_index_entry entry;
	struct ovl_dir_entry dir;
	ovl_err_t err;
	int fd;

	switch (layer->kind) {
	case OVL_LAYER_TAR:
		err = ovl_index_lookup(layer->index, (uint32_t)merge->sources[i - 1].ref.number, name, len, &entry);
		if (err)
			return err == -ENOENT ? OVL_ABSENT : err;
		out->what = entry.what;
		out->ref = entry.ref;
		out->opaque = entry.flags & OVL_IX_OPAQUE;
		out->implied = entry.flags & OVL_IX_IMPLIED;
		return entry.what == OVL_LINK_BELOW ? OVL_ASK : 0;
	case OVL_LAYER_DIR:
		fd = fd_of(merge, i, false);
		if (fd < 0)
			return fd;
		err = ovl_dirlayer_lookup(&layer->dir, fd, name, len, &dir);
		if (err)
			return err;
		out->what = dir.what;
		out->opaque = dir.opaque;
		out->implied = false;
		out->st = dir.st;
		return 0;
	default:
		return OVL_ASK;
	}
}

static ovl_err_t attr_of(struct ovl_merge *merge, size_t i, const uint8_t *name, size_t len, const struct said *said,
			 struct ovl_attr *out)
{
	const struct ovl_layer *layer = layer_of(merge, i);
	struct ovl_index_attr attr;
	ovl_err_t err;
	int64_t ns;

	if (layer->kind == OVL_LAYER_DIR)
		return ovl_dirlayer_attr(&layer->dir, merge->fds[i], name, len, &said->st, out);
	err = ovl_index_attr(layer->index, said->ref, &attr);
	if (err)
		return err;
	ns = ovl_ns(attr.mtime_sec, attr.mtime_nsec);
	*out = (struct ovl_attr){
		.size = attr.size,
		.blocks = attr.blocks,
		.atime_ns = ns,
		.mtime_ns = ns,
		.ctime_ns = ns,
		.mode = attr.mode,
		.nlink = attr.nlink,
		.uid = attr.uid,
		.gid = attr.gid,
		.rdev = attr.rdev,
	};
	return 0;
}

static ovl_err_t ino_of(const struct ovl_merge *merge, size_t i, const struct said *said, uint64_t *ino)
{
	const struct ovl_layer *layer = layer_of(merge, i);

	if (layer->kind == OVL_LAYER_DIR)
		return ovl_stack_ino(merge->stack, said->st.st_dev, said->st.st_ino, ino);
	*ino = layer->ino_base + said->ref;
	return 0;
}

/* Appends what source `i` has to out->lower; `room` is how many can come. */
static ovl_err_t add_lower(struct ovl_merge *merge, size_t i, const uint8_t *name, size_t len, struct ovl_blob *shared,
			   const struct said *said, size_t room, struct ovl_found *out)
{
	const struct ovl_source *in = &merge->sources[i - 1];
	struct ovl_source *source;

	if (!out->lower) {
		out->lower = room == 1 ? &out->one : calloc(room, sizeof(*out->lower));
		if (!out->lower)
			return -ENOMEM;
	}
	source = &out->lower[out->lower_count];
	*source = (struct ovl_source){.layer = in->layer};
	if (layer_of(merge, i)->kind == OVL_LAYER_TAR) {
		source->ref.number = said->ref;
	} else if (said->what == OVL_DIRECTORY) {
		source->ref.path = ovl_path_new(in->ref.path, name, len);
		if (!source->ref.path)
			return -ENOMEM;
	} else {
		source->name = shared ? ovl_blob_ref(shared) : ovl_blob_new(name, len);
		if (!source->name)
			return -ENOMEM;
		source->ref.path = ovl_path_ref(in->ref.path);
	}
	out->lower_count++;
	return 0;
}

ovl_err_t ovl_merge_lookup(struct ovl_merge *merge, const uint8_t *name, size_t len, size_t from,
			   struct ovl_blob *shared, struct ovl_found *out)
{
	bool is_dir = false, has_attr = false, has_ino = false;
	struct said said, top;
	size_t found = 0, top_at = 0;
	ovl_err_t err;

	*out = (struct ovl_found){0};
	if (from == 0)
		from = 1;
	for (size_t i = merge->upper ? 0 : from; i <= merge->count; i = i ? i + 1 : from) {
		err = ask_layer(merge, i, name, len, &said);
		if (err == OVL_ABSENT)
			continue;
		if (err)
			goto out;
		if (said.what == OVL_WHITEOUT || (said.what == OVL_OTHER && found > 0))
			break; /* gone, or a file where a directory is needed: hides what is below */
		if (found++ == 0) {
			top = said;
			top_at = i;
			is_dir = said.what == OVL_DIRECTORY;
		}
		if (!has_attr && !said.implied) {
			has_attr = true;
			err = attr_of(merge, i, name, len, &said, &out->attr);
			if (err)
				goto out;
		}
		if (i == 0) {
			out->upper = true;
			out->upper_ino = said.st.st_ino;
		} else {
			err = add_lower(merge, i, name, len, shared, &said, is_dir ? merge->count - i + 1 : 1, out);
			if (err)
				goto out;
			if (!has_ino) {
				has_ino = true;
				err = ino_of(merge, i, &said, &out->ino);
				if (err)
					goto out;
			}
		}
		if (!is_dir || said.opaque)
			break;
	}
	err = OVL_ABSENT;
	if (found == 0)
		goto out;
	if (!has_attr) {
		err = attr_of(merge, top_at, name, len, &top, &out->attr);
		if (err)
			goto out;
	}
	if (!has_ino) {
		/* Only the upperdir has it: what it was copied up from, if anything, gives the number. */
		err = ovl_dirlayer_origin(&layer_of(merge, 0)->dir, merge->fds[0], name, len);
		if (!err)
			err = ino_of(merge, 0, &top, &out->ino);
		if (err)
			goto out;
	}
	err = -EUCLEAN;
	if (is_dir != (bool)S_ISDIR(out->attr.mode))
		goto out;
	if (is_dir && found > 1)
		out->attr.nlink = 1; /* as the kernel: a merged directory does not count its subdirectories */
	err = 0;
out:
	if (err)
		ovl_found_clear(merge->stack, out);
	return err;
}

/* ---- names -------------------------------------------------------------------------------------------- */

/* The names that layers above have taken away, in an open-addressing table. */
struct hidden {
	struct ovl_blob **slots;
	size_t mask; /* slots - 1, or 0 without any */
	size_t count;
};

static bool hidden_has(const struct hidden *hidden, const uint8_t *name, size_t len)
{
	if (hidden->count == 0)
		return false;
	for (size_t at = ovl_hash(name, len) & hidden->mask; hidden->slots[at]; at = (at + 1) & hidden->mask)
		if (hidden->slots[at]->len == len && memcmp(hidden->slots[at]->bytes, name, len) == 0)
			return true;
	return false;
}

static void hidden_enter(struct hidden *hidden, struct ovl_blob *blob)
{
	size_t at = ovl_hash(blob->bytes, blob->len) & hidden->mask;

	while (hidden->slots[at])
		at = (at + 1) & hidden->mask;
	hidden->slots[at] = blob;
	hidden->count++;
}

static ovl_err_t hidden_add(struct hidden *hidden, const uint8_t *name, size_t len)
{
	struct ovl_blob *blob;

	if (hidden_has(hidden, name, len))
		return 0;
	if (!hidden->slots || hidden->count >= hidden->mask / 2) {
		size_t slots = hidden->slots ? (hidden->mask + 1) * 2 : 16;
		struct hidden more = {.slots = calloc(slots, sizeof(*more.slots)), .mask = slots - 1};

		if (!more.slots)
			return -ENOMEM;
		for (size_t i = 0; hidden->slots && i <= hidden->mask; i++)
			if (hidden->slots[i])
				hidden_enter(&more, hidden->slots[i]);
		free(hidden->slots);
		*hidden = more;
	}
	blob = ovl_blob_new(name, len);
	if (!blob)
		return -ENOMEM;
	hidden_enter(hidden, blob);
	return 0;
}

static void hidden_free(struct hidden *hidden)
{
	for (size_t i = 0; hidden->slots && i <= hidden->mask; i++)
		ovl_blob_unref(hidden->slots[i]);
	free(hidden->slots);
}

/* A layer's own names are not hidden by its own whiteouts, so those are collected in `fresh`, and count from the
 * next layer on. */
struct listing {
	struct hidden hidden;
	struct hidden fresh;
	ovl_merge_emit emit;
	void *arg;
	size_t from; /* the source that is listed */
};

static ovl_err_t list_name(struct listing *list, enum ovl_what what, const uint8_t *name, size_t len, bool borrowed)
{
	if (hidden_has(&list->hidden, name, len))
		return 0;
	if (what == OVL_WHITEOUT)
		return hidden_add(&list->fresh, name, len);
	return list->emit(list->arg, name, len, list->from, borrowed);
}

static ovl_err_t list_dir_name(void *arg, enum ovl_what what, const uint8_t *name, size_t len)
{
	return list_name(arg, what, name, len, false);
}

static ovl_err_t list_tar(struct listing *list, const struct ovl_index *index, uint32_t ref)
{
	struct ovl_index_entry entry;
	struct ovl_index_iter iter;
	ovl_err_t err = ovl_index_list(index, ref, &iter, NULL);
	int more = 0;

	while (!err && (more = ovl_index_next(&iter, &entry)) == 1)
		err = list_name(list, entry.what, entry.name, entry.name_len, true);
	return err ? err : more;
}

static ovl_err_t list_source(struct ovl_merge *merge, size_t i, struct listing *list)
{
	const struct ovl_layer *layer = layer_of(merge, i);
	bool is_root = i == 0 ? merge->path_len == 0 : !merge->sources[i - 1].ref.path;
	int fd;

	list->from = i;
	if (layer->kind == OVL_LAYER_TAR)
		return list_tar(list, layer->index, (uint32_t)merge->sources[i - 1].ref.number);
	fd = fd_of(merge, i, true);
	return fd < 0 ? fd : ovl_dirlayer_list(&layer->dir, fd, is_root, list_dir_name, list);
}

ovl_err_t ovl_merge_names(struct ovl_merge *merge, ovl_merge_emit emit, void *arg)
{
	struct listing list = {.emit = emit, .arg = arg};
	ovl_err_t err = 0;

	for (size_t i = first_source(merge); i <= merge->count; i++)
		if (layer_of(merge, i)->kind != OVL_LAYER_TAR && layer_of(merge, i)->kind != OVL_LAYER_DIR)
			return OVL_ASK;
	for (size_t i = first_source(merge); !err && i <= merge->count; i++) {
		err = list_source(merge, i, &list);
		for (size_t slot = 0; !err && list.fresh.slots && slot <= list.fresh.mask; slot++)
			if (list.fresh.slots[slot])
				err = hidden_add(&list.hidden, list.fresh.slots[slot]->bytes,
						 list.fresh.slots[slot]->len);
		hidden_free(&list.fresh);
		list.fresh = (struct hidden){0};
	}
	merge->readable = !err;
	hidden_free(&list.hidden);
	return err;
}

/* ---- SipHash-1-3 -------------------------------------------------------------------------------------- */

static uint64_t hash_key[2];
static pthread_once_t hash_once = PTHREAD_ONCE_INIT;

static void make_hash_key(void)
{
	if (getrandom(hash_key, sizeof(hash_key), GRND_NONBLOCK) != (ssize_t)sizeof(hash_key)) {
		/* Early at boot: better a guessable key than no mount. */
		struct timespec now;

		clock_gettime(CLOCK_MONOTONIC, &now);
		hash_key[0] = (uint64_t)now.tv_nsec ^ (uint64_t)(uintptr_t)&now;
		hash_key[1] = (uint64_t)now.tv_sec ^ (uint64_t)getpid() << 32;
	}
}

static inline uint64_t rotate(uint64_t x, unsigned r)
{
	return x << r | x >> (64 - r);
}

static inline void sip_round(uint64_t v[4])
{
	v[0] += v[1];
	v[1] = rotate(v[1], 13) ^ v[0];
	v[0] = rotate(v[0], 32);
	v[2] += v[3];
	v[3] = rotate(v[3], 16) ^ v[2];
	v[0] += v[3];
	v[3] = rotate(v[3], 21) ^ v[0];
	v[2] += v[1];
	v[1] = rotate(v[1], 17) ^ v[2];
	v[2] = rotate(v[2], 32);
}

uint64_t ovl_hash(const void *bytes, size_t len)
{
	const uint8_t *p = bytes;
	uint64_t last = (uint64_t)len << 56;
	uint64_t v[4], word;

	pthread_once(&hash_once, make_hash_key);
	v[0] = hash_key[0] ^ 0x736f6d6570736575ull;
	v[1] = hash_key[1] ^ 0x646f72616e646f6dull;
	v[2] = hash_key[0] ^ 0x6c7967656e657261ull;
	v[3] = hash_key[1] ^ 0x7465646279746573ull;
	for (; len >= 8; len -= 8, p += 8) {
		memcpy(&word, p, 8);
		v[3] ^= word;
		sip_round(v);
		v[0] ^= word;
	}
	for (size_t i = 0; i < len; i++)
		last |= (uint64_t)p[i] << (8 * i);
	v[3] ^= last;
	sip_round(v);
	v[0] ^= last;
	v[2] ^= 0xff;
	sip_round(v);
	sip_round(v);
	sip_round(v);
	return v[0] ^ v[1] ^ v[2] ^ v[3];
}
