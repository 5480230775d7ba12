/*
 * fuzz_tarscan.c - any bytes as a tar, and any bytes as an index: nothing may be read or written out of bounds
 *
 * The input is taken twice.  As a tar it is scanned (first byte: whiteouts or not, chunk size), and the index that
 * comes out is opened and walked from end to end.  As an index image it is opened without its checksum and walked.
 * A scan that succeeds must yield an index that opens with its checksum and has no damage: abort() says so.
 *
 * With libFuzzer:  clang -fsanitize=fuzzer,address,undefined -DOVL_LIBFUZZER -Inative \
 *                        native/fuzz_tarscan.c native/tarscan.c native/build.c native/index.c
 * Without it, main() replays: fuzz_tarscan MUTATIONS FILE...  (each file as it is, then that many seeded mutations
 * of it as a tar, and as many of the index it gives).  tests/native/test_sanitizers.py runs it.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "index.h"
#include "tarscan.h"

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t len);

static volatile uint8_t sink;

/* Reads every byte that an answer points at. */
static void touch(const uint8_t *at, size_t len)
{
	for (size_t i = 0; i < len; i++)
		sink = (uint8_t)(sink ^ at[i]);
}

/* Asks everything about one inode.  False: damage was reported. */
static bool walk_inode(const struct ovl_index *ix, uint32_t ref, unsigned *paths)
{
	struct ovl_index_extent_iter extents;
	struct ovl_index_xattr_iter xattrs;
	struct ovl_index_name_iter names;
	struct ovl_index_extent extent;
	struct ovl_index_attr attr;
	const uint8_t *name, *value;
	size_t name_len, value_len;
	static uint8_t path[1 << 16];
	uint32_t parent;
	bool ok = ovl_index_attr(ix, ref, &attr) == 0;
	ovl_err_t err = ovl_index_readlink(ix, ref, &value, &value_len);
	int more = 0;

	if (err == 0)
		touch(value, value_len);
	ok = ok && (err == 0 || err == -EINVAL);
	err = ovl_index_extents(ix, ref, &extents);
	if (err == 0)
		while ((more = ovl_index_next_extent(&extents, &extent)) == 1)
			;
	ok = ok && (err == 0 || err == -EINVAL) && more == 0;
	err = ovl_index_xattrs(ix, ref, &xattrs);
	if (err == 0)
		while ((more = ovl_index_next_xattr(&xattrs, &name, &name_len, &value, &value_len)) == 1) {
			touch(name, name_len);
			touch(value, value_len);
		}
	ok = ok && err == 0 && more == 0;
	err = ovl_index_names(ix, ref, &names);
	if (err == 0)
		for (unsigned n = 0; n < 64 && (more = ovl_index_next_name(&names, &parent, &name, &name_len)) == 1;
		     n++) {
			touch(name, name_len);
			more = 0;
			if (*paths == 0)
				break; /* a path of 2000 directories takes its time */
			--*paths;
			err = ovl_index_path(ix, parent, name, name_len, path, sizeof(path), &value_len);
			if (err == 0)
				touch(path, value_len);
			ok = ok && (err == 0 || err == -ERANGE);
		}
	return ok && more == 0;
}

static bool walk_index(const struct ovl_index *ix)
{
	uint32_t count = ix->inode_count < 20000 ? ix->inode_count : 20000;
	unsigned paths = 50;
	bool ok = true;

	for (uint32_t ref = 0; ref < count; ref++) {
		struct ovl_index_entry entry, again;
		struct ovl_index_iter iter;
		ovl_err_t err = ovl_index_list(ix, ref, &iter, NULL);
		uint32_t budget = 2000;
		int more = 0;

		ok = walk_inode(ix, ref, &paths) && ok;
		if (err != 0) {
			ok = ok && err == -ENOTDIR;
			continue;
		}
		while (budget-- > 0 && (more = ovl_index_next(&iter, &entry)) == 1) {
			touch(entry.name, entry.name_len);
			if (entry.target)
				touch(entry.target, entry.target_len);
			err = ovl_index_lookup(ix, ref, entry.name, entry.name_len, &again);
			ok = ok && err == 0 && again.ref == entry.ref && again.what == entry.what;
		}
		ok = ok && more >= 0;
		(void)ovl_index_lookup(ix, ref, "no such name", 12, &again);
	}
	return ok;
}

/* Scans, and gives the index to the caller if there is one. */
static void try_tar(const uint8_t *bytes, size_t len, bool whiteouts, size_t chunk, uint8_t **image, size_t *image_len)
{
	struct ovl_tar_limits limits = {.entries = 100000, .memory = 64u << 20};
	struct ovl_tarscan *scan = NULL;
	struct ovl_index ix;
	size_t at = 0;
	ovl_err_t err;

	*image = NULL;
	*image_len = 0;
	if (ovl_tarscan_new(whiteouts, &limits, &scan) != 0)
		return;
	do {
		size_t part = len - at < chunk ? len - at : chunk;
		uint64_t skip = ovl_tarscan_skippable(scan);

		if (chunk % 2 && skip > 0 && skip <= len - at) {
			err = ovl_tarscan_skip(scan, skip);
			part = (size_t)skip;
		} else {
			err = ovl_tarscan_feed(scan, bytes + at, part);
		}
		at += part;
	} while (!err && at < len);
	if (!err)
		err = ovl_tarscan_finish(scan, image, image_len);
	if (err == -EBADMSG) {
		const struct ovl_tar_error *error = ovl_tarscan_error(scan);

		touch((const uint8_t *)error->rule, strlen(error->rule));
		touch(error->name, error->name_len);
		if (error->offset > at)
			abort();
	}
	ovl_tarscan_free(scan);
	if (!err && (ovl_index_open(&ix, *image, *image_len, true, NULL) != 0 || !walk_index(&ix)))
		abort(); /* what the scanner writes, the reader accepts */
}

/* An exact copy on the heap, so that the sanitizer sees the image's end. */
static void try_index(const uint8_t *bytes, size_t len)
{
	uint8_t *copy = malloc(len > 0 ? len : 1);
	struct ovl_index ix;

	if (!copy)
		return;
	if (len > 0)
		memcpy(copy, bytes, len);
	if (ovl_index_open(&ix, copy, len, false, NULL) == 0)
		(void)walk_index(&ix);
	free(copy);
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t len)
{
	uint8_t *image;
	size_t image_len;

	try_index(bytes, len);
	if (len > 0) {
		try_tar(bytes + 1, len - 1, bytes[0] & 1, (size_t)bytes[0] * 7 + 1, &image, &image_len);
		free(image);
	}
	return 0;
}

#ifndef OVL_LIBFUZZER

static uint64_t seed = 0x9e3779b97f4a7c15ull;

static uint32_t random32(void)
{
	seed ^= seed << 13;
	seed ^= seed >> 7;
	seed ^= seed << 17;
	return (uint32_t)(seed >> 32);
}

static size_t random_at(size_t below)
{
	return random32() % (below > 0 ? below : 1);
}

/* Makes the header that holds byte `at` valid again, so that the mutation is seen by what comes after the check. */
static void fix_checksum(uint8_t *tar, size_t len, size_t at)
{
	uint8_t *block = tar + at / 512 * 512;
	unsigned sum = 8 * ' ';
	char text[8];

	if ((size_t)(block - tar) + 512 > len)
		return;
	for (size_t i = 0; i < 512; i++)
		sum += i >= 148 && i < 156 ? 0 : block[i];
	snprintf(text, sizeof(text), "%06o", sum & 0777777);
	memcpy(block + 148, text, 7);
	block[155] = ' ';
}

static void mutate(uint8_t *bytes, size_t len, bool is_tar)
{
	for (unsigned n = random32() % 4 + 1; n > 0; n--) {
		size_t at = random_at(len);
		static const uint8_t liked[] = {0, 0xff, 0x80, '/', '.', '=', '\n', ' ', '0', '7', '9', 'S', 'x', 'L', '1'};

		if (is_tar && random32() % 2) /* where headers are dense: numbers and the type */
			at = at / 512 * 512 + 100 + random_at(60);
		if (at >= len)
			continue;
		bytes[at] = random32() % 3 ? (uint8_t)random32() : liked[random32() % sizeof(liked)];
		if (is_tar && random32() % 8)
			fix_checksum(bytes, len, at);
	}
}

static uint8_t *read_file(const char *path, size_t *len)
{
	FILE *file = fopen(path, "rb");
	uint8_t *bytes = NULL;
	long size;

	if (!file)
		return NULL;
	if (fseek(file, 0, SEEK_END) == 0 && (size = ftell(file)) >= 0 && fseek(file, 0, SEEK_SET) == 0) {
		bytes = malloc((size_t)size + 1);
		if (bytes)
			*len = fread(bytes, 1, (size_t)size, file);
	}
	fclose(file);
	return bytes;
}

int main(int argc, char **argv)
{
	unsigned long mutations = argc > 1 ? strtoul(argv[1], NULL, 10) : 0;
	unsigned long tars = 0, indexes = 0;

	for (int i = 2; i < argc; i++) {
		uint8_t *image, *made, *copy;
		size_t len = 0, image_len, made_len;
		uint8_t *bytes = read_file(argv[i], &len);

		copy = bytes ? malloc(len + 1) : NULL;
		if (!copy) {
			fprintf(stderr, "%s: cannot be read\n", argv[i]);
			return 2;
		}
		try_index(bytes, len);
		try_tar(bytes, len, true, len + 1, &image, &image_len);
		for (unsigned long n = 0; n < mutations; n++) {
			size_t cut = random32() % 8 ? len : random_at(len);

			memcpy(copy, bytes, len);
			mutate(copy, len, true);
			try_tar(copy, cut, random32() % 4 > 0, random_at(2000) + 1, &made, &made_len);
			tars += made != NULL;
			free(made);
			if (!image)
				continue;
			made = malloc(image_len);
			if (!made)
				return 2;
			memcpy(made, image, image_len);
			mutate(made, random32() % 4 ? image_len : sizeof(struct ovl_disk_header), false);
			try_index(made, image_len);
			indexes++;
			free(made);
		}
		free(image);
		free(copy);
		free(bytes);
	}
	printf("%d files, %lu mutated tars accepted, %lu mutated indexes walked\n", argc - 2, tars, indexes);
	return 0;
}

#endif
