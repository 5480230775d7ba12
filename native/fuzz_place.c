/*
 * fuzz_place.c - see fuzz_place.h
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "fuzz_place.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/xattr.h>
#include <unistd.h>

#include "tarscan.h"

#define BLOCK 512u
#define FILE_BYTES 700u

static char base_path[] = "fuzz-lane-XXXXXX";
static int base_fd = -1;
static bool is_mounted;

void ovl_require(bool ok, const char *what)
{
	if (!ok) {
		fprintf(stderr, "fuzz_lane: %s\n", what);
		abort();
	}
}

/* ---- the device ------------------------------------------------------------------------------------------------------ */

static pthread_mutex_t backing_lock = PTHREAD_MUTEX_INITIALIZER;
static bool backing_open[1 << 16];
static size_t backing_count, backing_next;

/* In the place of the C library's: the device registers what it is given, now and then it has no room, and what is not
 * registered cannot be given back. */
int ioctl(int fd, unsigned long request, ...)
{
	va_list list;
	void *arg;
	int result = 0;

	va_start(list, request);
	arg = va_arg(list, void *);
	va_end(list);
	if (fd != OVL_PLACE_DEVICE) {
		errno = ENOTTY;
		return -1;
	}
	pthread_mutex_lock(&backing_lock);
	if ((request & 0xff) == 1) { /* FUSE_DEV_IOC_BACKING_OPEN: begins with the descriptor */
		int32_t file;

		memcpy(&file, arg, sizeof(file));
		ovl_require(fcntl(file, F_GETFL) >= 0, "a closed file is to be passed through");
		backing_next = (backing_next + 1) % (sizeof(backing_open) / sizeof(backing_open[0]));
		if (backing_next % 8 == 0 || backing_open[backing_next]) {
			errno = ENOMEM;
			result = -1;
		} else {
			backing_open[backing_next] = true;
			backing_count++;
			result = (int)backing_next;
		}
	} else {
		uint32_t id;

		memcpy(&id, arg, sizeof(id));
		ovl_require(id < sizeof(backing_open) / sizeof(backing_open[0]) && backing_open[id],
			    "what was not registered is given back");
		backing_open[id] = false;
		backing_count--;
	}
	pthread_mutex_unlock(&backing_lock);
	return result;
}

size_t ovl_place_backings(void)
{
	size_t count;

	pthread_mutex_lock(&backing_lock);
	count = backing_count;
	pthread_mutex_unlock(&backing_lock);
	return count;
}

/* ---- where ----------------------------------------------------------------------------------------------------------- */

void ovl_place_confine(void)
{
	const struct rlimit most = {.rlim_cur = 1 << 20, .rlim_max = 1 << 20};
	const struct rlimit files = {.rlim_cur = OVL_PLACE_FILES, .rlim_max = OVL_PLACE_FILES};
	struct mount_attr read_only = {.attr_set = MOUNT_ATTR_RDONLY};
	char words[64];

	ovl_require(mkdtemp(base_path) != NULL, "no directory can be made here");
	if (geteuid() == 0) {
		ovl_require(unshare(CLONE_NEWNS) == 0 && mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) == 0,
			    "root without the right to mount");
		snprintf(words, sizeof(words), "mode=755,size=%u", OVL_PLACE_BYTES);
		ovl_require(mount_setattr(AT_FDCWD, "/", AT_RECURSIVE, &read_only, sizeof(read_only)) == 0 &&
				    mount("tmpfs", base_path, "tmpfs", MS_NODEV | MS_NOSUID, words) == 0,
			    "no tmpfs can be mounted");
		is_mounted = true;
	}
	base_fd = open(base_path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	ovl_require(base_fd >= 0, base_path);
	umask(0);
	ovl_require(setrlimit(RLIMIT_FSIZE, &most) == 0 && setrlimit(RLIMIT_NOFILE, &files) == 0, "no limits");
}

/* Everything in a directory; never across a symlink or, as all is below it, out of it. */
static void empty(int parent, const char *name)
{
	int fd = openat(parent, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
	DIR *dir = fd >= 0 ? fdopendir(fd) : NULL;
	struct dirent *entry;

	ovl_require(dir && fchmod(fd, 0700) == 0, name);
	while ((entry = readdir(dir))) {
		if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0)
			continue;
		if (unlinkat(fd, entry->d_name, 0) == 0)
			continue;
		empty(fd, entry->d_name);
		ovl_require(unlinkat(fd, entry->d_name, AT_REMOVEDIR) == 0, entry->d_name);
	}
	closedir(dir);
}

void ovl_place_leave(void)
{
	struct mount_attr writable = {.attr_clr = MOUNT_ATTR_RDONLY};

	close(base_fd);
	if (is_mounted)
		ovl_require(umount2(base_path, 0) == 0 &&
				    mount_setattr(AT_FDCWD, "/", AT_RECURSIVE, &writable, sizeof(writable)) == 0,
			    "the tmpfs stays");
	ovl_require(rmdir(base_path) == 0, "the directory stays");
}

static size_t count_descriptors(void)
{
	size_t count = 0;

	for (int fd = 0; fd < (int)OVL_PLACE_FILES; fd++)
		count += fcntl(fd, F_GETFD) >= 0;
	return count;
}

/* ---- layers ---------------------------------------------------------------------------------------------------------- */

static void feed_block(const struct ovl_place *place, struct ovl_tarscan *scan, const unsigned char *block)
{
	ovl_require(write(place->tar, block, BLOCK) == (ssize_t)BLOCK && ovl_tarscan_feed(scan, block, BLOCK) == 0,
		    "the tar is refused");
}

static void feed(const struct ovl_place *place, struct ovl_tarscan *scan, const char *name, char type, const char *target)
{
	unsigned char block[BLOCK] = {0};
	const unsigned size = type == '0' ? FILE_BYTES : 0;
	unsigned sum = 0;

	snprintf((char *)block, 100, "%s", name);
	snprintf((char *)block + 100, 8, "%07o", type == '5' ? 0755u : 0644u);
	snprintf((char *)block + 108, 8, "%07o", 0u);
	snprintf((char *)block + 116, 8, "%07o", 0u);
	snprintf((char *)block + 124, 12, "%011o", size);
	snprintf((char *)block + 136, 12, "%011o", 0u);
	memset(block + 148, ' ', 8);
	block[156] = (unsigned char)type;
	snprintf((char *)block + 157, 100, "%s", target);
	memcpy(block + 257, "ustar\00000", 8);
	for (size_t i = 0; i < BLOCK; i++)
		sum += block[i];
	snprintf((char *)block + 148, 8, "%06o", sum & 0777777u);
	feed_block(place, scan, block);
	memset(block, 't', sizeof(block));
	for (unsigned given = 0; given < size; given += BLOCK)
		feed_block(place, scan, block);
}

static void make_tar(struct ovl_place *place)
{
	static const unsigned char end[BLOCK];
	struct ovl_tarscan *scan;
	char name[64];
	size_t len;

	place->tar = memfd_create("tar", MFD_CLOEXEC);
	ovl_require(place->tar >= 0 && ovl_tarscan_new(true, NULL, &scan) == 0, "no scanner");
	for (unsigned i = 0; i < OVL_PLACE_NAMES; i++) {
		char type = i % 5 == 0 ? '5' : i % 5 == 1 ? '2' : '0';

		snprintf(name, sizeof(name), "%sn%u", i > 20 ? "n5/" : "", i);
		feed(place, scan, name, type, type == '2' ? "n5/target" : "");
	}
	feed_block(place, scan, end);
	feed_block(place, scan, end);
	ovl_require(ovl_tarscan_finish(scan, &place->image, &len) == 0, "no index");
	ovl_tarscan_free(scan);
	ovl_require(ovl_index_open(&place->index, place->image, len, true, NULL) == 0, "the index does not open");
}

static void make_file(int dir, const char *name, size_t size)
{
	static const char content[FILE_BYTES];
	int fd = openat(dir, name, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);

	ovl_require(fd >= 0 && write(fd, content, size) == (ssize_t)size, name);
	(void)fsetxattr(fd, "user.some", "value", 5, 0); /* not everywhere */
	close(fd);
}

/* Names that are in the tar, others, and some in the upperdir from the start. */
static void make_directories(struct ovl_place *place)
{
	char name[64];

	ovl_require(mkdirat(place->lower, "n5", 0755) == 0 && mkdirat(place->upper, "n5", 0755) == 0 &&
			    mkdirat(place->upper, "n60", 0755) == 0 && mkdirat(place->lower, "n61", 0700) == 0 &&
			    symlinkat("n5/n22", place->lower, "n62") == 0 && symlinkat("n2", place->upper, "n63") == 0,
		    "no directories");
	for (unsigned i = 2; i < 20; i += 6) {
		snprintf(name, sizeof(name), "n%u", i);
		make_file(place->upper, name, FILE_BYTES);
		snprintf(name, sizeof(name), "n5/n%u", i);
		make_file(place->lower, name, FILE_BYTES);
		snprintf(name, sizeof(name), "n60/n%u", i);
		make_file(place->upper, name, 0);
	}
}

static int make_dir(const struct ovl_place *place, const char *what)
{
	char name[64];
	int fd;

	snprintf(name, sizeof(name), "%s%u", what, place->number);
	ovl_require(mkdirat(place->base, name, 0755) == 0, name);
	fd = openat(place->base, name, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	ovl_require(fd >= 0, name);
	return fd;
}

static void make_tree(struct ovl_place *place, const char *prefix)
{
	struct ovl_found root = {.upper = true, .lower_count = 2};
	struct ovl_stack stack = {.count = 3, .device_count = 1};
	struct stat st;

	stack.layers = calloc(stack.count, sizeof(*stack.layers));
	root.lower = calloc(root.lower_count, sizeof(*root.lower));
	ovl_require(stack.layers && root.lower && fstat(place->upper, &st) == 0, "no memory");
	stack.devices[0].device = st.st_dev;
	stack.layers[0] = (struct ovl_layer){.kind = OVL_LAYER_DIR, .dir = {.root = place->upper}};
	stack.layers[1] = (struct ovl_layer){
		.kind = OVL_LAYER_TAR, .ino_base = OVL_PLACE_INO_BASE, .index = &place->index, .data_fd = place->tar};
	stack.layers[2] = (struct ovl_layer){.kind = OVL_LAYER_DIR, .dir = {.root = place->lower}};
	for (size_t i = 0; i < 3; i += 2) {
		stack.layers[i].dir.prefix_count = 1;
		stack.layers[i].dir.prefix[0] = prefix;
	}
	root.lower[0].layer = 1;
	root.lower[1].layer = 2;
	ovl_attr_of_stat(&st, &root.attr);
	root.ino = root.upper_ino = st.st_ino;
	ovl_require(ovl_tree_new(&stack, &root, &place->tree) == 0, "no tree");
}

void ovl_place_open(struct ovl_place *place, bool direct, bool is_volatile, bool no_open)
{
	static unsigned number;
	const bool is_root = geteuid() == 0;
	struct ovl_lane_upper upper = {
		.prefix = is_root ? "trusted.overlay." : "user.overlay.",
		.direct = direct && is_root,
		.may_chown = direct && is_root,
		.devices = is_root,
		.is_volatile = is_volatile,
		.metacopy = direct,
	};

	signal(SIGXFSZ, SIG_IGN); /* libFuzzer has set it after we did */
	*place = (struct ovl_place){.base = base_fd, .number = number++, .descriptors = count_descriptors()};
	place->upper = make_dir(place, "upper");
	place->work = make_dir(place, "work");
	place->lower = make_dir(place, "lower");
	make_tar(place);
	make_directories(place);
	make_tree(place, upper.prefix);
	upper.work_fd = place->work;
	ovl_require(ovl_lane_fs_init(&place->fs, place->tree, &upper, OVL_PLACE_DEVICE, no_open, !no_open) == 0, "no lane");
	ovl_lane_fs_agree(&place->fs, UINT64_MAX, UINT64_MAX);
}

void ovl_place_close(struct ovl_place *place)
{
	static const char *const names[] = {"upper", "work", "lower"};
	const char *what = NULL;
	char name[64];

	ovl_require(ovl_tree_check(place->tree, &what) == 0, what);
	ovl_lane_fs_destroy(&place->fs);
	ovl_tree_free(place->tree);
	free(place->image);
	close(place->upper);
	close(place->work);
	close(place->lower);
	close(place->tar);
	ovl_require(ovl_place_backings() == 0, "a backing file stays registered");
	ovl_require(count_descriptors() == place->descriptors, "a descriptor stays open");
	for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++) {
		snprintf(name, sizeof(name), "%s%u", names[i], place->number);
		empty(place->base, name);
		ovl_require(unlinkat(place->base, name, AT_REMOVEDIR) == 0, name);
	}
}
