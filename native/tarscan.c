/*
 * tarscan.c - the tar format, block by block
 *
 * Problem.  The tar in the wild is five dialects (V7, ustar, GNU, PAX, star), three ways to write a sparse file, and
 * two ways to lie about a length.  The scanner accepts what image builders write and refuses, with an offset and a
 * rule, whatever two readers could take for different things.
 *
 * Structure.  Everything in a tar begins at a multiple of 512 bytes, so the scanner is a small machine that takes
 * one block at a time, except for file data, which it skips without looking:
 *
 *            +-------------------- zero block ------------------> ENDED
 *            |
 *      +-> HEADER --x g L K--> META ----------+
 *      |     |                 (collect, parse)|
 *      |     +--S, extended--> SPARSE_BLOCK --+|   old GNU: more of the map
 *      |     +--PAX 1.0------> SPARSE_MAP ----+|   the map is decimal text in front of the data
 *      |     v                                vv
 *      +-- SKIP <---- entry complete: handed to the builder
 *
 * What extended headers say is kept in `pending` until the entry they describe.
 *
 * Invariants: `offset` is a multiple of 512 whenever a block is handled; all sizes are below 2^62, so sums of a few
 * of them do not overflow; what `pending` holds is bounded by OVL_TAR_META_MAX.
 *
 * Complexity: O(headers); a skip costs the same for one byte and for a terabyte.
 *
 * References: POSIX pax(1); GNU tar manual, "Standard Format", "Sparse Formats"; Go archive/tar for the dialects
 * that container tools write.
 */
#include "tarscan.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "build.h"

#define BLOCK 512u

struct tar_header {
	uint8_t name[100];
	uint8_t mode[8];
	uint8_t uid[8];
	uint8_t gid[8];
	uint8_t size[12];
	uint8_t mtime[12];
	uint8_t checksum[8];
	uint8_t type;
	uint8_t link[100];
	uint8_t magic[6];
	uint8_t version[2];
	uint8_t uname[32];
	uint8_t gname[32];
	uint8_t major[8];
	uint8_t minor[8];
	uint8_t prefix[155];
	uint8_t pad[12];
};
static_assert(sizeof(struct tar_header) == BLOCK, "a tar header is one block");

/* One region of an old GNU sparse map. */
struct gnu_region {
	uint8_t offset[12];
	uint8_t length[12];
};

#define GNU_REGIONS_AT 386u /* in the header: 4 regions, "more" flag, real size */
#define GNU_MORE_AT 482u
#define GNU_SIZE_AT 483u
#define GNU_BLOCK_REGIONS 21u /* in a block of their own, then a "more" flag */
#define GNU_BLOCK_MORE_AT 504u
static_assert(sizeof(struct gnu_region) == 24, "a region of a sparse map is 24 bytes");

enum state { HEADER, META, SPARSE_BLOCK, SPARSE_MAP, SKIP, ENDED, FAILED };

struct bytes {
	uint8_t *at;
	size_t len;
	size_t room;
};

/* What extended headers say about the next entry. */
struct pending {
	bool any;
	bool has_path, has_link, has_size, has_uid, has_gid, has_mtime;
	bool has_gnu_path, has_gnu_link, has_sparse_name;
	struct bytes path, link, gnu_path, gnu_link, sparse_name;
	uint64_t size;
	uint32_t uid, gid;
	int64_t mtime_sec;
	uint32_t mtime_nsec;
	struct bytes xattrs; /* records as on disk */
	uint32_t xattr_count;
	size_t meta_bytes; /* of the extended headers so far */
	/* GNU.sparse.* */
	bool has_major, has_minor, has_sparse_size, has_map, has_region_offset;
	uint64_t major, minor, sparse_size, region_offset;
	struct bytes regions; /* struct ovl_disk_extent, physical not yet set */
};

struct ovl_tarscan {
	enum state state;
	uint64_t offset;       /* of the next byte of the stream */
	uint64_t header_at;    /* of the header whose entry is being read */
	uint64_t skip;         /* bytes of data and padding still to pass */
	uint64_t entries;
	uint64_t entries_max;
	uint64_t tar_end;      /* offset behind the last entry */
	uint8_t block[BLOCK];  /* a block that came in pieces */
	size_t block_len;
	uint8_t meta_type;
	uint64_t meta_left;    /* bytes of the extended header still to come, padding not counted */
	struct bytes meta;
	struct pending pending;
	/* The entry whose sparse map is being read. */
	struct ovl_build_entry entry;
	struct bytes name;
	struct bytes link;
	uint64_t stored;       /* bytes of its data in the tar, map included */
	uint64_t map_bytes;    /* bytes of the map so far */
	uint64_t map_left;     /* PAX 1.0: numbers still to come; UINT64_MAX: the count itself */
	uint64_t map_number;   /* PAX 1.0: the number being read */
	bool map_digits;
	struct ovl_build *build;
	struct ovl_tar_error error;
};

static ovl_err_t fail(struct ovl_tarscan *s, const char *rule)
{
	s->state = FAILED;
	s->error.offset = s->header_at;
	s->error.rule = rule;
	s->error.name = s->name.at;
	s->error.name_len = s->name.len;
	return -EBADMSG;
}

/* ---- bytes -------------------------------------------------------------------------------------------- */

static ovl_err_t bytes_append(struct bytes *bytes, const void *from, size_t len)
{
	if (len > bytes->room - bytes->len) {
		size_t room = bytes->len + len + bytes->len / 2 + 64;
		uint8_t *at = realloc(bytes->at, room);

		if (!at)
			return -ENOMEM;
		bytes->at = at;
		bytes->room = room;
	}
	if (len > 0)
		memcpy(bytes->at + bytes->len, from, len);
	bytes->len += len;
	return 0;
}

static ovl_err_t bytes_set(struct bytes *bytes, const void *from, size_t len)
{
	bytes->len = 0;
	return bytes_append(bytes, from, len);
}

static void bytes_free(struct bytes *bytes)
{
	free(bytes->at);
	*bytes = (struct bytes){0};
}

static void pending_reset(struct pending *p)
{
	if (!p->any)
		return;
	*p = (struct pending){
		.path = {p->path.at, 0, p->path.room},
		.link = {p->link.at, 0, p->link.room},
		.gnu_path = {p->gnu_path.at, 0, p->gnu_path.room},
		.gnu_link = {p->gnu_link.at, 0, p->gnu_link.room},
		.sparse_name = {p->sparse_name.at, 0, p->sparse_name.room},
		.xattrs = {p->xattrs.at, 0, p->xattrs.room},
		.regions = {p->regions.at, 0, p->regions.room},
	};
}

static size_t field_len(const uint8_t *field, size_t size)
{
	const uint8_t *end = size > 0 ? memchr(field, 0, size) : NULL;

	return end ? (size_t)(end - field) : size;
}

/* ---- numbers ------------------------------------------------------------------------------------------ */

enum number { NUMBER_OK, NUMBER_BAD, NUMBER_TOO_BIG, NUMBER_TOO_SMALL };

/* A numeric field: octal digits between spaces, or base-256 if the first bit is set (GNU, star). */
static enum number read_number(const uint8_t *field, size_t size, int64_t *out)
{
	uint64_t value = 0;
	size_t i = 0;

	*out = 0;
	if (field[0] & 0x80) {
		bool negative = (field[0] & 0x40) != 0;
		uint8_t flip = negative ? 0xff : 0;

		for (; i < size; i++) {
			uint8_t byte = field[i] ^ flip;

			if (i == 0)
				byte &= 0x7f;
			if (value >> 55)
				return negative ? NUMBER_TOO_SMALL : NUMBER_TOO_BIG;
			value = value << 8 | byte;
		}
		*out = negative ? -(int64_t)value - 1 : (int64_t)value;
		return NUMBER_OK;
	}
	while (i < size && (field[i] == ' ' || field[i] == 0))
		i++;
	for (; i < size && field[i] >= '0' && field[i] <= '7'; i++)
		value = value << 3 | (uint64_t)(field[i] - '0'); /* 12 digits at most: 36 bits */
	while (i < size && field[i] == ' ')
		i++;
	if (i < size && field[i] != 0)
		return NUMBER_BAD;
	*out = (int64_t)value;
	return NUMBER_OK;
}

/* A decimal number that is all of `text`, not above OVL_TAR_SIZE_MAX. */
static bool read_decimal(const uint8_t *text, size_t len, uint64_t *out)
{
	uint64_t value = 0;

	if (len == 0)
		return false;
	for (size_t i = 0; i < len; i++) {
		if (text[i] < '0' || text[i] > '9')
			return false;
		value = value * 10 + (uint64_t)(text[i] - '0');
		if (value > OVL_TAR_SIZE_MAX)
			return false;
	}
	*out = value;
	return true;
}

static void saturate(int64_t *sec, uint32_t *nsec)
{
	if (*sec > OVL_TAR_MTIME_MAX) {
		*sec = OVL_TAR_MTIME_MAX;
		*nsec = 0;
	} else if (*sec < -OVL_TAR_MTIME_MAX) {
		*sec = -OVL_TAR_MTIME_MAX;
		*nsec = 0;
	}
}

/* PAX time: [-]digits[.digits]; rounded down to ns, as time goes. */
static bool read_time(const uint8_t *text, size_t len, int64_t *sec_out, uint32_t *nsec_out)
{
	size_t i = 0, digits = 0;
	bool negative = len > 0 && text[0] == '-';
	int64_t sec = 0;
	uint32_t nsec = 0, unit = 100000000;
	bool beyond = false; /* digits after the ninth that are not 0 */

	for (i = negative; i < len && text[i] >= '0' && text[i] <= '9'; i++, digits++)
		if (sec <= OVL_TAR_MTIME_MAX)
			sec = sec * 10 + (text[i] - '0');
	if (i < len && text[i] == '.') {
		for (i++; i < len && text[i] >= '0' && text[i] <= '9'; i++, unit /= 10, digits++) {
			nsec += unit * (uint32_t)(text[i] - '0');
			beyond = beyond || (unit == 0 && text[i] != '0');
		}
	}
	if (i < len || digits == 0)
		return false;
	if (negative) {
		sec = -sec;
		if (beyond)
			nsec++;
		if (nsec > 0) {
			sec--;
			nsec = 1000000000u - nsec;
		}
	}
	saturate(&sec, &nsec);
	*sec_out = sec;
	*nsec_out = nsec;
	return true;
}

/* ---- sparse maps -------------------------------------------------------------------------------------- */

static ovl_err_t add_region(struct ovl_tarscan *s, uint64_t offset, uint64_t length)
{
	struct ovl_disk_extent region = {.logical = offset, .length = length};

	return bytes_append(&s->pending.regions, &region, sizeof(region));
}

/* GNU.sparse.map of format 0.1: offset,length,offset,length... */
static ovl_err_t read_sparse_list(struct ovl_tarscan *s, const uint8_t *text, size_t len)
{
	const uint8_t *end = text + len;
	uint64_t number, offset = 0;
	bool odd = false;

	s->pending.regions.len = 0;
	while (text < end) {
		const uint8_t *comma = memchr(text, ',', (size_t)(end - text));
		size_t n = comma ? (size_t)(comma - text) : (size_t)(end - text);
		ovl_err_t err = 0;

		if (!read_decimal(text, n, &number))
			return fail(s, "a sparse map must hold decimal numbers");
		if (odd)
			err = add_region(s, offset, number);
		if (err)
			return err;
		offset = number;
		odd = !odd;
		text += n + 1;
	}
	return odd ? fail(s, "a sparse map must hold pairs of offset and length") : 0;
}

/* Checks the map, drops empty regions, and says where in the tar each begins.  `data`: offset of the first data byte,
 * `stored`: how many there are. */
static ovl_err_t finish_regions(struct ovl_tarscan *s, uint64_t data, uint64_t stored)
{
	struct ovl_disk_extent *regions = (struct ovl_disk_extent *)(void *)s->pending.regions.at;
	size_t count = s->pending.regions.len / sizeof(*regions);
	uint64_t floor = 0, total = 0;
	size_t kept = 0;

	for (size_t i = 0; i < count; i++) {
		struct ovl_disk_extent region = regions[i];

		if (region.logical < floor)
			return fail(s, "regions of a sparse map must ascend and not overlap");
		if (region.logical > s->entry.size || region.length > s->entry.size - region.logical)
			return fail(s, "regions of a sparse map must lie within the file");
		floor = region.logical + region.length;
		if (region.length > stored - total)
			return fail(s, "a sparse map must match the length of the stored data");
		if (region.length == 0)
			continue;
		region.physical = data + total;
		total += region.length;
		if (kept > 0 && regions[kept - 1].logical + regions[kept - 1].length == region.logical)
			regions[kept - 1].length += region.length;
		else
			regions[kept++] = region;
	}
	if (total != stored)
		return fail(s, "a sparse map must match the length of the stored data");
	s->entry.sparse = true;
	s->entry.extents = regions;
	s->entry.extent_count = (uint32_t)kept;
	return 0;
}

/* ---- entries ------------------------------------------------------------------------------------------ */

/* The entry is complete; what is left of its data is skipped. */
static ovl_err_t complete(struct ovl_tarscan *s)
{
	uint64_t left = s->stored - s->map_bytes;
	uint64_t padded = (left + BLOCK - 1) / BLOCK * BLOCK;
	const char *rule = NULL;
	ovl_err_t err;

	if (padded > OVL_TAR_SIZE_MAX - s->offset)
		return fail(s, "a size must be below 2^62");
	s->entry.data = s->offset;
	if (s->entry.sparse) {
		err = finish_regions(s, s->offset, left);
		if (err)
			return err;
	}
	s->entry.name = (struct ovl_bytes){s->name.at, s->name.len};
	s->entry.link = (struct ovl_bytes){s->link.at, s->link.len};
	s->entry.xattrs = (struct ovl_bytes){s->pending.xattrs.at, s->pending.xattrs.len};
	s->entry.xattr_count = s->pending.xattr_count;
	err = ovl_build_add(s->build, &s->entry, &rule);
	if (err)
		return err == -EBADMSG ? fail(s, rule) : err;
	pending_reset(&s->pending);
	s->skip = padded;
	s->tar_end = s->offset + padded;
	s->state = padded > 0 ? SKIP : HEADER;
	return 0;
}

/* Regions of an old GNU map, until one that is not filled in. */
static ovl_err_t read_gnu_regions(struct ovl_tarscan *s, const uint8_t *block, size_t at, size_t count)
{
	for (size_t i = 0; i < count; i++) {
		struct gnu_region region;
		int64_t offset, length;
		ovl_err_t err;

		memcpy(&region, block + at + i * sizeof(region), sizeof(region));
		if (region.length[0] == 0)
			break;
		if (read_number(region.offset, sizeof(region.offset), &offset) != NUMBER_OK ||
		    read_number(region.length, sizeof(region.length), &length) != NUMBER_OK || offset < 0 ||
		    length < 0 || (uint64_t)offset > OVL_TAR_SIZE_MAX || (uint64_t)length > OVL_TAR_SIZE_MAX)
			return fail(s, "regions of a sparse map must be numbers below 2^62");
		err = add_region(s, (uint64_t)offset, (uint64_t)length);
		if (err)
			return err;
	}
	return 0;
}

/* A sparse file, in whichever way it says so; `*block_state`: the rest of the map follows in blocks of that state. */
static ovl_err_t start_sparse(struct ovl_tarscan *s, const uint8_t *block, uint8_t type, enum state *block_state)
{
	struct pending *p = &s->pending;
	int64_t size;

	if (type == 'S') {
		if (read_number(block + GNU_SIZE_AT, 12, &size) != NUMBER_OK || size < 0 ||
		    (uint64_t)size > OVL_TAR_SIZE_MAX)
			return fail(s, "the real size of a sparse file must be a number below 2^62");
		s->entry.size = (uint64_t)size;
		s->entry.sparse = true;
		p->any = true;
		p->regions.len = 0;
		if (block[GNU_MORE_AT])
			*block_state = SPARSE_BLOCK;
		return read_gnu_regions(s, block, GNU_REGIONS_AT, 4);
	}
	if (p->has_major && p->major == 1 && (!p->has_minor || p->minor == 0)) {
		if (!p->has_sparse_size)
			return fail(s, "a sparse file must state its real size");
		s->entry.size = p->sparse_size;
		s->entry.sparse = true;
		p->regions.len = 0;
		s->map_left = UINT64_MAX;
		s->map_number = 0;
		s->map_digits = false;
		*block_state = SPARSE_MAP;
		return 0;
	}
	if (p->has_major && (p->major != 0 || p->minor > 1))
		return fail(s, "GNU.sparse.major and minor must be 0.0, 0.1 or 1.0");
	if (p->has_map || (p->has_major && p->has_sparse_size)) {
		if (!p->has_sparse_size)
			return fail(s, "a sparse file must state its real size");
		if (p->has_region_offset)
			return fail(s, "a sparse map must hold pairs of offset and length");
		s->entry.size = p->sparse_size;
		s->entry.sparse = true;
	}
	return 0;
}

static ovl_err_t read_id(struct ovl_tarscan *s, const uint8_t field[8], bool has_pax, uint32_t pax, uint32_t *out)
{
	int64_t value;

	if (has_pax) {
		*out = pax;
		return 0;
	}
	if (read_number(field, 8, &value) != NUMBER_OK || value < 0 || value >= UINT32_MAX)
		return fail(s, "uid and gid must be numbers from 0 to 2^32-2");
	*out = (uint32_t)value;
	return 0;
}

static ovl_err_t read_device(struct ovl_tarscan *s, const struct tar_header *h)
{
	int64_t major, minor;

	if (read_number(h->major, sizeof(h->major), &major) != NUMBER_OK ||
	    read_number(h->minor, sizeof(h->minor), &minor) != NUMBER_OK || major < 0 || major > 0xfff || minor < 0 ||
	    minor > 0xfffff)
		return fail(s, "device numbers must be at most 4095 and 1048575");
	s->entry.rdev = (uint32_t)((minor & 0xff) | major << 8 | (minor & 0xfff00) << 12);
	return 0;
}

/* The name and link of the entry: the strongest source wins. */
static ovl_err_t read_names(struct ovl_tarscan *s, const struct tar_header *h)
{
	const struct pending *p = &s->pending;
	size_t name_len = field_len(h->name, sizeof(h->name));
	size_t prefix_size = 0;
	ovl_err_t err;

	if (p->has_sparse_name) {
		err = bytes_set(&s->name, p->sparse_name.at, p->sparse_name.len);
	} else if (p->has_path) {
		err = bytes_set(&s->name, p->path.at, p->path.len);
	} else if (p->has_gnu_path) {
		err = bytes_set(&s->name, p->gnu_path.at, p->gnu_path.len);
	} else {
		/* star keeps times at the end of the prefix; GNU's magic has a space for the NUL, and no prefix. */
		if (memcmp(h->magic, "ustar", 6) == 0)
			prefix_size = memcmp(h->pad + 8, "tar", 4) == 0 ? 131 : sizeof(h->prefix);
		prefix_size = field_len(h->prefix, prefix_size);
		err = bytes_set(&s->name, h->prefix, prefix_size);
		if (!err && prefix_size > 0)
			err = bytes_append(&s->name, "/", 1);
		if (!err)
			err = bytes_append(&s->name, h->name, name_len);
	}
	if (err)
		return err;
	if (p->has_link)
		return bytes_set(&s->link, p->link.at, p->link.len);
	if (p->has_gnu_link)
		return bytes_set(&s->link, p->gnu_link.at, p->gnu_link.len);
	return bytes_set(&s->link, h->link, field_len(h->link, sizeof(h->link)));
}

/* The size field of any header. */
static ovl_err_t read_size(struct ovl_tarscan *s, const struct tar_header *h, uint64_t *out)
{
	int64_t size;
	enum number number = read_number(h->size, sizeof(h->size), &size);

	if (number == NUMBER_BAD)
		return fail(s, "a size must be an octal or base-256 number");
	if (number != NUMBER_OK || size < 0 || (uint64_t)size > OVL_TAR_SIZE_MAX)
		return fail(s, "a size must be below 2^62 and not negative");
	*out = (uint64_t)size;
	return 0;
}

/* The header of a file, directory, link, device: everything but extended headers. */
static ovl_err_t start_entry(struct ovl_tarscan *s, const uint8_t *block, const struct tar_header *h)
{
	struct pending *p = &s->pending;
	enum state block_state = HEADER; /* no block of a sparse map follows */
	uint8_t type = h->type;
	enum number number;
	int64_t value;
	ovl_err_t err;

	s->entry = (struct ovl_build_entry){0};
	s->stored = 0;
	s->map_bytes = 0;
	err = read_names(s, h);
	if (!err)
		err = read_id(s, h->uid, p->has_uid, p->uid, &s->entry.uid);
	if (!err)
		err = read_id(s, h->gid, p->has_gid, p->gid, &s->entry.gid);
	if (!err)
		err = p->has_size ? 0 : read_size(s, h, &p->size);
	if (err)
		return err;
	if (read_number(h->mode, sizeof(h->mode), &value) != NUMBER_OK || value < 0)
		return fail(s, "a mode must be an octal number");
	s->entry.mode = (uint32_t)value & 07777;
	s->entry.mtime_sec = p->mtime_sec;
	s->entry.mtime_nsec = p->mtime_nsec;
	if (!p->has_mtime) {
		number = read_number(h->mtime, sizeof(h->mtime), &value);
		if (number == NUMBER_BAD)
			return fail(s, "an mtime must be an octal or base-256 number");
		if (number == NUMBER_TOO_BIG)
			value = INT64_MAX;
		if (number == NUMBER_TOO_SMALL)
			value = INT64_MIN;
		s->entry.mtime_sec = value;
		s->entry.mtime_nsec = 0;
		saturate(&s->entry.mtime_sec, &s->entry.mtime_nsec);
	}
	/* V7 had no type for directories. */
	if (type == 0 && s->name.len > 0 && s->name.at[s->name.len - 1] == '/')
		type = '5';
	switch (type) {
	case 0:
	case '0':
	case 'S':
		s->entry.mode |= S_IFREG;
		s->entry.size = p->size;
		s->stored = p->size;
		err = start_sparse(s, block, type, &block_state);
		if (err)
			return err;
		break;
	case '1':
		s->entry.is_hard_link = true;
		break;
	case '2':
		s->entry.mode |= S_IFLNK;
		break;
	case '3':
	case '4':
		s->entry.mode |= type == '3' ? S_IFCHR : S_IFBLK;
		err = read_device(s, h);
		if (err)
			return err;
		break;
	case '5':
		s->entry.mode |= S_IFDIR;
		break;
	case '6':
		s->entry.mode |= S_IFIFO;
		break;
	default:
		return fail(s, "an entry's type must be a file, link, directory, device or fifo");
	}
	if (block_state != HEADER) {
		s->state = block_state;
		return 0;
	}
	return complete(s);
}

/* ---- extended headers --------------------------------------------------------------------------------- */

/* Names that must not reach the merged tree: the overlay's own, and what belongs to the machine that made the tar. */
static bool drop_xattr(const uint8_t *name, size_t len)
{
	static const struct {
		const char *text;
		bool whole;
	} drop[] = {
		{"trusted.overlay.", false},
		{"user.overlay.", false},
		{"user.fuseoverlayfs.", false},
		{"user.containers.override_", false},
		{"security.selinux", true},
	};

	for (size_t i = 0; i < sizeof(drop) / sizeof(drop[0]); i++) {
		size_t n = strlen(drop[i].text);

		if (len >= n && memcmp(name, drop[i].text, n) == 0 && (!drop[i].whole || len == n))
			return true;
	}
	return false;
}

static ovl_err_t add_xattr(struct ovl_tarscan *s, const uint8_t *name, size_t name_len, const uint8_t *value,
			   size_t value_len)
{
	struct bytes *list = &s->pending.xattrs;
	struct ovl_disk_xattr head;
	size_t at = 0;
	ovl_err_t err;

	if (name_len == 0 || name_len > OVL_TAR_NAME_MAX || memchr(name, 0, name_len))
		return fail(s, "an xattr's name must be 1 to 255 bytes, none of them NUL");
	if (value_len > OVL_TAR_XATTR_VALUE_MAX)
		return fail(s, "an xattr's value must not be longer than 65536 bytes");
	if (drop_xattr(name, name_len))
		return 0;
	/* The last value of a name counts. */
	while (at < list->len) {
		size_t whole;

		memcpy(&head, list->at + at, sizeof(head));
		whole = sizeof(head) + head.name_len + head.value_len;
		if (head.name_len == name_len && memcmp(list->at + at + sizeof(head), name, name_len) == 0) {
			memmove(list->at + at, list->at + at + whole, list->len - at - whole);
			list->len -= whole;
			s->pending.xattr_count--;
			break;
		}
		at += whole;
	}
	if (s->pending.xattr_count == OVL_TAR_XATTRS_MAX)
		return fail(s, "an entry must not have more than 1024 xattrs");
	head = (struct ovl_disk_xattr){.value_len = (uint32_t)value_len, .name_len = (uint16_t)name_len};
	err = bytes_append(list, &head, sizeof(head));
	if (!err)
		err = bytes_append(list, name, name_len);
	if (!err)
		err = bytes_append(list, value, value_len);
	s->pending.xattr_count++;
	return err;
}

static bool is_key(const uint8_t *key, size_t len, const char *text)
{
	return len == strlen(text) && memcmp(key, text, len) == 0;
}

static ovl_err_t pax_id(struct ovl_tarscan *s, const uint8_t *value, size_t len, bool *has, uint32_t *out)
{
	uint64_t number;

	*has = len > 0;
	if (len == 0)
		return 0;
	if (!read_decimal(value, len, &number) || number >= UINT32_MAX)
		return fail(s, "uid and gid must be numbers from 0 to 2^32-2");
	*out = (uint32_t)number;
	return 0;
}

static ovl_err_t pax_text(struct bytes *text, const uint8_t *value, size_t len, bool *has)
{
	*has = len > 0; /* an empty value takes the keyword back (POSIX) */
	return bytes_set(text, value, len);
}

static ovl_err_t pax_number(struct ovl_tarscan *s, const uint8_t *value, size_t len, bool *has, uint64_t *out,
			    const char *rule)
{
	*has = len > 0;
	if (len > 0 && !read_decimal(value, len, out))
		return fail(s, rule);
	return 0;
}

static ovl_err_t pax_time(struct ovl_tarscan *s, const uint8_t *value, size_t len, bool *has, int64_t *sec,
			  uint32_t *nsec)
{
	*has = len > 0;
	if (len > 0 && !read_time(value, len, sec, nsec))
		return fail(s, "a PAX time must be a decimal number");
	return 0;
}

static ovl_err_t pax_sparse(struct ovl_tarscan *s, const uint8_t *key, size_t len, const uint8_t *value,
			    size_t value_len)
{
	static const char *rule = "GNU.sparse numbers must be decimal and below 2^62";
	struct pending *p = &s->pending;
	uint64_t number = 0;
	bool has;
	ovl_err_t err;

	if (is_key(key, len, "name"))
		return pax_text(&p->sparse_name, value, value_len, &p->has_sparse_name);
	if (is_key(key, len, "map")) {
		p->has_map = true;
		return read_sparse_list(s, value, value_len);
	}
	if (is_key(key, len, "major"))
		return pax_number(s, value, value_len, &p->has_major, &p->major, rule);
	if (is_key(key, len, "minor"))
		return pax_number(s, value, value_len, &p->has_minor, &p->minor, rule);
	if (is_key(key, len, "size") || is_key(key, len, "realsize"))
		return pax_number(s, value, value_len, &p->has_sparse_size, &p->sparse_size, rule);
	/* Format 0.0 repeats these two, in this order. */
	if (is_key(key, len, "offset") || is_key(key, len, "numbytes")) {
		bool is_offset = key[0] == 'o';

		err = pax_number(s, value, value_len, &has, &number, rule);
		if (err)
			return err;
		if (!has || is_offset == p->has_region_offset)
			return fail(s, "a sparse map must hold pairs of offset and length");
		p->has_map = true;
		p->has_region_offset = is_offset;
		if (is_offset)
			p->region_offset = number;
		else
			return add_region(s, p->region_offset, number);
	}
	return 0;
}

static ovl_err_t pax_record(struct ovl_tarscan *s, const uint8_t *key, size_t len, const uint8_t *value,
			    size_t value_len)
{
	static const char xattr[] = "SCHILY.xattr.";
	static const char sparse[] = "GNU.sparse.";
	struct pending *p = &s->pending;
	uint32_t nsec;
	int64_t sec;
	bool has;

	if (is_key(key, len, "path"))
		return pax_text(&p->path, value, value_len, &p->has_path);
	if (is_key(key, len, "linkpath"))
		return pax_text(&p->link, value, value_len, &p->has_link);
	if (is_key(key, len, "size"))
		return pax_number(s, value, value_len, &p->has_size, &p->size,
				  "a PAX size must be decimal and below 2^62");
	if (is_key(key, len, "uid"))
		return pax_id(s, value, value_len, &p->has_uid, &p->uid);
	if (is_key(key, len, "gid"))
		return pax_id(s, value, value_len, &p->has_gid, &p->gid);
	if (is_key(key, len, "mtime"))
		return pax_time(s, value, value_len, &p->has_mtime, &p->mtime_sec, &p->mtime_nsec);
	if (is_key(key, len, "atime") || is_key(key, len, "ctime"))
		return pax_time(s, value, value_len, &has, &sec, &nsec); /* checked, not kept */
	if (len >= sizeof(xattr) - 1 && memcmp(key, xattr, sizeof(xattr) - 1) == 0)
		return add_xattr(s, key + sizeof(xattr) - 1, len - (sizeof(xattr) - 1), value, value_len);
	if (len >= sizeof(sparse) - 1 && memcmp(key, sparse, sizeof(sparse) - 1) == 0)
		return pax_sparse(s, key + sizeof(sparse) - 1, len - (sizeof(sparse) - 1), value, value_len);
	return 0;
}

/* "length key=value\n", the length counting itself.  Global records are checked and mean nothing. */
static ovl_err_t read_pax(struct ovl_tarscan *s, bool global)
{
	const uint8_t *at = s->meta.at;
	const uint8_t *end;

	if (s->meta.len == 0)
		return 0;
	end = at + s->meta.len;
	while (at < end) {
		size_t left = (size_t)(end - at);
		const uint8_t *space, *equal;
		uint64_t length;
		ovl_err_t err = 0;

		if (*at == 0) { /* some writers pad with zeros */
			for (; at < end; at++)
				if (*at != 0)
					return fail(s, "a PAX record must start with its length");
			break;
		}
		space = memchr(at, ' ', left < 21 ? left : 21);
		if (!space || !read_decimal(at, (size_t)(space - at), &length))
			return fail(s, "a PAX record must start with its length");
		if (length > left || length < (uint64_t)(space - at) + 2)
			return fail(s, "a PAX record must end where its length says");
		if (at[length - 1] != '\n')
			return fail(s, "a PAX record must end with a newline");
		equal = memchr(space + 1, '=', (size_t)(at + length - (space + 1)));
		if (!equal || equal == space + 1)
			return fail(s, "a PAX record must be keyword=value");
		if (!global)
			err = pax_record(s, space + 1, (size_t)(equal - space - 1), equal + 1,
					 (size_t)(at + length - 1 - (equal + 1)));
		if (err)
			return err;
		at += length;
	}
	return 0;
}

/* An extended header has arrived in full. */
static ovl_err_t finish_meta(struct ovl_tarscan *s)
{
	struct pending *p = &s->pending;
	size_t text = field_len(s->meta.at, s->meta.len);

	s->state = HEADER;
	switch (s->meta_type) {
	case 'x':
		p->any = true;
		return read_pax(s, false);
	case 'g':
		return read_pax(s, true);
	case 'L':
		p->any = true;
		p->has_gnu_path = true;
		return bytes_set(&p->gnu_path, s->meta.at, text);
	default: /* K */
		p->any = true;
		p->has_gnu_link = true;
		return bytes_set(&p->gnu_link, s->meta.at, text);
	}
}

static ovl_err_t start_meta(struct ovl_tarscan *s, const struct tar_header *h)
{
	uint64_t size;
	ovl_err_t err = read_size(s, h, &size);

	if (err)
		return err;
	if (size > OVL_TAR_META_MAX)
		return fail(s, "an extended header must not be longer than 1 MiB");
	if (h->type != 'g') {
		s->pending.meta_bytes += size;
		s->pending.any = true;
		if (s->pending.meta_bytes > OVL_TAR_META_MAX)
			return fail(s, "an entry's extended headers must not be longer than 1 MiB");
	}
	s->meta_type = h->type;
	s->meta_left = size;
	s->meta.len = 0;
	if (size > 0) {
		s->state = META;
		return 0;
	}
	return finish_meta(s);
}

/* ---- blocks ------------------------------------------------------------------------------------------- */

static bool is_zero(const uint8_t *block)
{
	return block[0] == 0 && memcmp(block, block + 1, BLOCK - 1) == 0;
}

/* The sum of all bytes, the checksum field taken as spaces.  Ancient tars summed signed chars. */
static bool checksum_ok(const uint8_t *block, const struct tar_header *h)
{
	uint32_t sum = 8 * ' ';
	int32_t signed_sum = 8 * ' ';
	int64_t stated;

	if (read_number(h->checksum, sizeof(h->checksum), &stated) != NUMBER_OK)
		return false;
	for (size_t i = 0; i < BLOCK; i++)
		sum += block[i];
	for (size_t i = 0; i < sizeof(h->checksum); i++)
		sum -= h->checksum[i];
	if (stated == (int64_t)sum)
		return true;
	for (size_t i = 0; i < BLOCK; i++)
		signed_sum += (int8_t)block[i];
	for (size_t i = 0; i < sizeof(h->checksum); i++)
		signed_sum -= (int8_t)h->checksum[i];
	return stated == signed_sum;
}

static ovl_err_t read_header(struct ovl_tarscan *s, const uint8_t *block)
{
	struct tar_header h;

	s->header_at = s->offset - BLOCK;
	s->name.len = 0;
	if (is_zero(block)) {
		if (s->pending.any)
			return fail(s, "an extended header must be followed by its entry");
		s->state = ENDED;
		return 0;
	}
	memcpy(&h, block, sizeof(h));
	if (!checksum_ok(block, &h))
		return fail(s, "a header must match its checksum");
	if (++s->entries > s->entries_max)
		return fail(s, "a layer must not have more entries than the limit");
	switch (h.type) {
	case 'x':
	case 'g':
	case 'L':
	case 'K':
		return start_meta(s, &h);
	default:
		return start_entry(s, block, &h);
	}
}

static ovl_err_t read_meta(struct ovl_tarscan *s, const uint8_t *block)
{
	size_t part = s->meta_left < BLOCK ? (size_t)s->meta_left : BLOCK;
	ovl_err_t err = bytes_append(&s->meta, block, part);

	if (err)
		return err;
	s->meta_left -= part;
	return s->meta_left > 0 ? 0 : finish_meta(s);
}

static ovl_err_t read_sparse_block(struct ovl_tarscan *s, const uint8_t *block)
{
	ovl_err_t err;

	/* These blocks are no part of the stored size, so they count apart from map_bytes. */
	s->pending.meta_bytes += BLOCK;
	if (s->pending.meta_bytes > OVL_TAR_SPARSE_MAX)
		return fail(s, "a sparse map must not be longer than 1 MiB");
	err = read_gnu_regions(s, block, 0, GNU_BLOCK_REGIONS);
	if (err || block[GNU_BLOCK_MORE_AT])
		return err;
	return complete(s);
}

/* Format 1.0: the number of regions, then offset and length of each, each on a line of its own. */
static ovl_err_t read_sparse_map(struct ovl_tarscan *s, const uint8_t *block)
{
	s->map_bytes += BLOCK;
	if (s->map_bytes > OVL_TAR_SPARSE_MAX)
		return fail(s, "a sparse map must not be longer than 1 MiB");
	if (s->map_bytes > s->stored)
		return fail(s, "a sparse map must match the length of the stored data");
	for (size_t i = 0; i < BLOCK && s->map_left > 0; i++) {
		uint8_t c = block[i];
		ovl_err_t err = 0;

		if (c >= '0' && c <= '9') {
			s->map_number = s->map_number * 10 + (uint64_t)(c - '0');
			s->map_digits = true;
			if (s->map_number > OVL_TAR_SIZE_MAX)
				return fail(s, "regions of a sparse map must be numbers below 2^62");
			continue;
		}
		if (c != '\n' || !s->map_digits)
			return fail(s, "a sparse map must hold decimal numbers");
		if (s->map_left == UINT64_MAX) {
			if (s->map_number > OVL_TAR_SPARSE_MAX / 4)
				return fail(s, "a sparse map must not be longer than 1 MiB");
			s->map_left = 2 * s->map_number;
		} else {
			if (s->map_left % 2 == 0)
				s->pending.region_offset = s->map_number;
			else
				err = add_region(s, s->pending.region_offset, s->map_number);
			s->map_left--;
		}
		if (err)
			return err;
		s->map_number = 0;
		s->map_digits = false;
	}
	return s->map_left > 0 ? 0 : complete(s);
}

static ovl_err_t read_block(struct ovl_tarscan *s, const uint8_t *block)
{
	switch (s->state) {
	case HEADER:
		return read_header(s, block);
	case META:
		return read_meta(s, block);
	case SPARSE_BLOCK:
		return read_sparse_block(s, block);
	case SPARSE_MAP:
		return read_sparse_map(s, block);
	default:
		return -EINVAL;
	}
}

/* ---- the interface ------------------------------------------------------------------------------------ */

ovl_err_t ovl_tarscan_feed(struct ovl_tarscan *s, const void *bytes, size_t len)
{
	const uint8_t *at = bytes;
	ovl_err_t err = 0;

	if (s->state == FAILED)
		return -EINVAL;
	while (len > 0 && !err) {
		size_t part;

		if (s->state == ENDED) {
			s->offset += len;
			break;
		}
		if (s->state == SKIP) {
			part = len < s->skip ? len : (size_t)s->skip;
			s->offset += part;
			s->skip -= part;
			if (s->skip == 0)
				s->state = HEADER;
		} else if (s->block_len == 0 && len >= BLOCK) {
			part = BLOCK;
			s->offset += part;
			err = read_block(s, at);
		} else {
			part = BLOCK - s->block_len < len ? BLOCK - s->block_len : len;
			memcpy(s->block + s->block_len, at, part);
			s->block_len += part;
			s->offset += part;
			if (s->block_len == BLOCK) {
				s->block_len = 0;
				err = read_block(s, s->block);
			}
		}
		at += part;
		len -= part;
	}
	if (err && err != -EBADMSG)
		s->state = FAILED;
	return err;
}

uint64_t ovl_tarscan_skippable(const struct ovl_tarscan *s)
{
	if (s->state == ENDED)
		return OVL_TAR_SIZE_MAX;
	return s->state == SKIP ? s->skip : 0;
}

ovl_err_t ovl_tarscan_skip(struct ovl_tarscan *s, uint64_t len)
{
	if (len > ovl_tarscan_skippable(s))
		return -EINVAL;
	s->offset += len;
	if (s->state == SKIP) {
		s->skip -= len;
		if (s->skip == 0)
			s->state = HEADER;
	}
	return 0;
}

uint64_t ovl_tarscan_offset(const struct ovl_tarscan *s)
{
	return s->offset;
}

bool ovl_tarscan_ended(const struct ovl_tarscan *s)
{
	return s->state == ENDED;
}

const struct ovl_tar_error *ovl_tarscan_error(const struct ovl_tarscan *s)
{
	return &s->error;
}

ovl_err_t ovl_tarscan_finish(struct ovl_tarscan *s, uint8_t **image, size_t *image_len)
{
	const char *rule = NULL;
	ovl_err_t err;

	if (s->state == FAILED)
		return -EINVAL;
	if (s->state != ENDED) {
		if (s->state != HEADER || s->block_len > 0 || s->pending.any) {
			bool in_data = s->state == SKIP;

			s->header_at = s->offset;
			return fail(s, in_data ? "the tar must not end within a file's data"
					       : "the tar must not end within a header");
		}
	}
	s->name.len = 0;
	s->header_at = s->offset;
	err = ovl_build_finish(s->build, s->tar_end, image, image_len, &rule);
	s->state = FAILED; /* the builder is spent */
	return err == -EBADMSG ? fail(s, rule) : err;
}

ovl_err_t ovl_tarscan_new(bool whiteouts, const struct ovl_tar_limits *limits, struct ovl_tarscan **out)
{
	uint64_t memory = limits && limits->memory ? limits->memory : OVL_TAR_MEMORY_MAX;
	struct ovl_tarscan *s;
	ovl_err_t err = -ENOMEM;

	s = calloc(1, sizeof(*s));
	if (!s)
		goto out;
	s->entries_max = limits && limits->entries ? limits->entries : OVL_TAR_ENTRIES_MAX;
	err = ovl_build_new(whiteouts, memory, &s->build);
	if (err)
		goto out;
	*out = s;
	s = NULL;
out:
	ovl_tarscan_free(s);
	return err;
}

void ovl_tarscan_free(struct ovl_tarscan *s)
{
	if (!s)
		return;
	ovl_build_free(s->build);
	bytes_free(&s->meta);
	bytes_free(&s->name);
	bytes_free(&s->link);
	bytes_free(&s->pending.path);
	bytes_free(&s->pending.link);
	bytes_free(&s->pending.gnu_path);
	bytes_free(&s->pending.gnu_link);
	bytes_free(&s->pending.sparse_name);
	bytes_free(&s->pending.xattrs);
	bytes_free(&s->pending.regions);
	free(s);
}
