/*
 * uring_mount.c - uring.c against the kernel: a file system without a name in it, and everything that can go wrong
 *
 * Usage: uring_mount [DIR].  Each scenario mounts on DIR, answers INIT itself, and ends the mount.  LOOKUP is answered
 * ENOENT, by the thread that got it or (names that start with `d`) by another; names that start with `k` are kept, and
 * never answered.  Needs root, and enable_uring; without DIR there are only those scenarios that need neither.  Built by
 * test_uring.py with the sanitizers.
 */
#include "uring.c"

#include <stdio.h>
#include <sys/mount.h>
#include <sys/stat.h>

#define CLIENTS 6
#define ROUNDS 150

#define CHECK(what)                                                                        \
	do {                                                                               \
		if (!(what)) {                                                             \
			fprintf(stderr, "%s:%d: not so: %s\n", __func__, __LINE__, #what); \
			exit(1);                                                           \
		}                                                                          \
	} while (0)

struct server {
	const char *dir;
	int fd;
	struct ovl_uring *uring;
	pthread_t helper;
	pthread_mutex_t lock;
	pthread_cond_t changed;
	uint64_t deferred[CLIENTS]; /* protected by lock */
	size_t count, kept;         /* protected by lock */
	uint64_t last_kept;         /* protected by lock */
	bool ending;                /* protected by lock */
	atomic_int failed, by_device;
};

static int answer_with(struct server *server, uint64_t unique, int error, const void *body, size_t size)
{
	struct fuse_out_header out = {.len = (uint32_t)(sizeof(out) + size), .error = -error, .unique = unique};
	struct iovec parts[2] = {{.iov_base = &out, .iov_len = sizeof(out)},
				 {.iov_base = (void *)(uintptr_t)body, .iov_len = size}};

	if (ovl_uring_owns(unique))
		return ovl_uring_reply(server->uring, unique, parts, size ? 2 : 1);
	return writev(server->fd, parts, size ? 2 : 1) < 0 ? -errno : 0;
}

static void look_up(struct server *server, uint64_t unique, const char *name)
{
	bool bad = name[0] == 'b' && ovl_uring_owns(unique); /* the device takes a wrong reply for an answer */

	if (bad) {
		static const char big[1 << 20];

		CHECK(answer_with(server, unique, 0, big, sizeof(big)) == -EINVAL);
		CHECK(answer_with(server, unique ^ 2, ENOENT, NULL, 0) == -ENOENT);
		CHECK(answer_with(server, unique, 600, NULL, 0) == -EINVAL);
	}
	if (name[0] == 'd' || name[0] == 'k') {
		pthread_mutex_lock(&server->lock);
		if (name[0] == 'd')
			server->deferred[server->count++] = unique;
		else
			server->last_kept = unique, server->kept++;
		pthread_cond_broadcast(&server->changed);
		pthread_mutex_unlock(&server->lock);
		return;
	}
	CHECK(answer_with(server, unique, ENOENT, NULL, 0) == 0);
	CHECK(!bad || answer_with(server, unique, ENOENT, NULL, 0) == -ENOENT);
}

static void answer_message(struct server *server, const unsigned char *message, unsigned char *body)
{
	struct fuse_attr_out attr = {.attr = {.ino = 1, .mode = S_IFDIR | 0755, .nlink = 2}};
	struct fuse_in_header in;

	memcpy(&in, message, sizeof(in));
	if (in.opcode == FUSE_LOOKUP) {
		CHECK(memchr(message + sizeof(in), '\0', in.len - sizeof(in)));
		look_up(server, in.unique, (const char *)message + sizeof(in));
	} else if (in.opcode == FUSE_GETATTR) {
		memcpy(body, &attr, sizeof(attr)); /* where the kernel fetches it: the request has no payload */
		CHECK(answer_with(server, in.unique, 0, body, sizeof(attr)) == 0);
	} else if (in.opcode != FUSE_FORGET && in.opcode != FUSE_BATCH_FORGET && in.opcode != FUSE_INTERRUPT) {
		(void)answer_with(server, in.unique, ENOSYS, NULL, 0);
	}
}

static void got(void *arg, const struct ovl_uring_request *request)
{
	answer_message(arg, request->message, request->answer);
}

static void *help(void *arg)
{
	struct server *server = arg;

	pthread_mutex_lock(&server->lock);
	while (!server->ending) {
		if (server->count) {
			uint64_t unique = server->deferred[--server->count];

			pthread_mutex_unlock(&server->lock);
			CHECK(answer_with(server, unique, ENOENT, NULL, 0) == 0);
			pthread_mutex_lock(&server->lock);
		} else {
			pthread_cond_wait(&server->changed, &server->lock);
		}
	}
	pthread_mutex_unlock(&server->lock);
	return NULL;
}

static void failed(void *arg, int err)
{
	atomic_store(&((struct server *)arg)->failed, err);
}

static void woken(int number)
{
	(void)number;
}

/* Mount, and answer INIT; `payload` is what entries of the last queue are registered with.  What ovl_uring_go says. */
static int start(struct server *server, const char *dir, size_t payload)
{
	struct sigaction wake = {.sa_handler = woken};
	struct ovl_uring_config config = {
		.payload_bytes = 8192, .answer_bytes = 4096, .wake_signal = SIGRTMAX - 1,
		.request = got, .failed = failed, .arg = server,
	};
	struct {
		struct fuse_out_header header;
		struct fuse_init_out init;
	} reply = {{.len = sizeof(reply)}, {.major = 7, .minor = 42, .max_write = 4096, .max_pages = 1}};
	_Alignas(8) unsigned char message[1 << 16];
	struct fuse_in_header in;
	struct fuse_init_in init;
	char words[100];

	*server = (struct server){.dir = dir};
	pthread_mutex_init(&server->lock, NULL);
	pthread_cond_init(&server->changed, NULL);
	sigaction(SIGRTMAX - 1, &wake, NULL);
	server->fd = open("/dev/fuse", O_RDWR | O_CLOEXEC);
	CHECK(server->fd >= 0);
	snprintf(words, sizeof(words), "fd=%d,rootmode=40000,user_id=0,group_id=0", server->fd);
	CHECK(mount("uring", dir, "fuse.uring", 0, words) == 0);
	CHECK(read(server->fd, message, sizeof(message)) > 0);
	memcpy(&in, message, sizeof(in));
	memcpy(&init, message + sizeof(in), sizeof(init));
	CHECK(in.opcode == FUSE_INIT);
	CHECK((init.flags | (uint64_t)init.flags2 << 32) & OVL_URING_INIT_FLAG);
	config.dev_fd = server->fd;
	CHECK(ovl_uring_new(&server->uring, &config) == 0);
	if (payload)
		for (size_t i = server->uring->queue_count - 1; i < server->uring->entry_count; i += server->uring->queue_count)
			server->uring->entries[i]->parts[1].iov_len = payload;
	reply.header.unique = in.unique;
	reply.init.flags = FUSE_INIT_EXT | FUSE_MAX_PAGES;
	reply.init.flags2 = (uint32_t)(OVL_URING_INIT_FLAG >> 32);
	CHECK(write(server->fd, &reply, sizeof(reply)) == sizeof(reply));
	CHECK(pthread_create(&server->helper, NULL, help, server) == 0);
	return ovl_uring_go(server->uring);
}

static void end(struct server *server, int how)
{
	pthread_mutex_lock(&server->lock);
	server->ending = true;
	pthread_cond_broadcast(&server->changed);
	pthread_mutex_unlock(&server->lock);
	pthread_join(server->helper, NULL);
	(void)umount2(server->dir, how); /* some scenarios have done it */
	ovl_uring_free(server->uring);
	close(server->fd);
	CHECK(atomic_load(&server->failed) == 0);
}

static void *ask(void *arg)
{
	static atomic_int number;
	int n = atomic_fetch_add(&number, 1);
	struct server *server = arg;
	char path[4200];
	struct stat st;

	for (int i = 0; i < ROUNDS; i++) {
		snprintf(path, sizeof(path), "%s/%c%d-%d", server->dir, "adb"[i % 3], n, i);
		CHECK(stat(path, &st) == -1 && errno == ENOENT);
		CHECK(stat(server->dir, &st) == 0 && S_ISDIR(st.st_mode));
	}
	return NULL;
}

static void *ask_for_what_is_kept(void *arg)
{
	struct server *server = arg;
	char path[4200];
	struct stat st;

	snprintf(path, sizeof(path), "%s/kept", server->dir);
	CHECK(stat(path, &st) == -1 && (errno == ENOTCONN || errno == ECONNABORTED));
	return NULL;
}

static void serves_many_clients(const char *dir)
{
	pthread_t clients[CLIENTS];
	struct server server;

	CHECK(start(&server, dir, 0) == 0);
	for (int i = 0; i < CLIENTS; i++)
		CHECK(pthread_create(&clients[i], NULL, ask, &server) == 0);
	for (int i = 0; i < CLIENTS; i++)
		pthread_join(clients[i], NULL);
	end(&server, 0);
}

static void *read_device(void *arg)
{
	_Alignas(8) unsigned char message[1 << 16], body[4096];
	struct server *server = arg;

	while (read(server->fd, message, sizeof(message)) > 0) {
		atomic_fetch_add(&server->by_device, 1);
		answer_message(server, message, body);
	}
	return NULL;
}

static void goes_on_by_the_device_when_a_queue_is_refused(const char *dir)
{
	struct server server;
	pthread_t reader;

	CHECK(start(&server, dir, 4096) == -EINVAL);
	ovl_uring_free(server.uring); /* with entries of the other queues still armed */
	server.uring = NULL;
	CHECK(pthread_create(&reader, NULL, read_device, &server) == 0);
	ask(&server);
	CHECK(atomic_load(&server.by_device) >= ROUNDS);
	umount2(dir, 0);
	pthread_join(reader, NULL);
	end(&server, 0);
}

static void await_kept(struct server *server)
{
	pthread_mutex_lock(&server->lock);
	while (!server->kept)
		pthread_cond_wait(&server->changed, &server->lock);
	pthread_mutex_unlock(&server->lock);
}

/* A request is out: 0 the mount is forced away, 1 we stop. */
static void ends_with_a_request_out(const char *dir, int how)
{
	struct server server;
	pthread_t client;

	CHECK(start(&server, dir, 0) == 0);
	CHECK(pthread_create(&client, NULL, ask_for_what_is_kept, &server) == 0);
	await_kept(&server);
	if (how == 0) {
		umount2(dir, MNT_FORCE); /* EBUSY, or not: the connection is aborted */
		pthread_join(client, NULL);
		(void)answer_with(&server, server.last_kept, ENOENT, NULL, 0); /* in vain */
		end(&server, MNT_DETACH);
	} else {
		ovl_uring_stop(server.uring);
		CHECK(answer_with(&server, server.last_kept, ENOENT, NULL, 0) == -ENODEV);
		end(&server, MNT_DETACH); /* which closes the device */
		pthread_join(client, NULL);
	}
}

static void stops_before_it_has_gone(const char *dir)
{
	struct ovl_uring_config config = {.dev_fd = -1, .payload_bytes = 8192, .wake_signal = SIGRTMAX - 1};
	struct ovl_uring *uring;

	(void)dir;
	CHECK(ovl_uring_new(&uring, &config) == 0);
	ovl_uring_free(uring);
	CHECK(ovl_uring_new(&uring, &config) == 0);
	CHECK(ovl_uring_go(uring) == -EBADF);
	ovl_uring_stop(uring);
	ovl_uring_stop(uring);
	ovl_uring_free(uring);
}

/* ---- an entry without a kernel --------------------------------------------------------------------------------------- */

struct late {
	struct ovl_uring *uring;
	uint64_t unique;
	int said;
};

static void *reply_late(void *arg)
{
	struct late *late = arg;
	struct fuse_out_header out = {.len = sizeof(out), .error = -ENOENT, .unique = late->unique};
	struct iovec part = {.iov_base = &out, .iov_len = sizeof(out)};

	late->said = ovl_uring_reply(late->uring, late->unique, &part, 1);
	return NULL;
}

/* What another thread is told of its reply if this one, whose entry it is, does `then` with it. */
static int reply_said(void (*then)(struct entry *entry))
{
	_Alignas(8) unsigned char rings[64] = {0}, sqes[2 * SQE_BYTES], payload[64];
	struct ovl_uring_header header;
	struct ovl_uring uring = {.config = {.dev_fd = -1}, .entry_count = 1};
	struct entry entry = {.uring = &uring, .tag = 1ull << OVL_URING_TAG_SHIFT, .thread = pthread_self(), .fd = -1,
			      .rings = rings, .sqes = sqes, .params = {.sq_entries = 2, .sq_off = {.array = 8}},
			      .header = &header, .payload = payload, .state = OUT};
	struct entry *entries[] = {&entry};
	struct late late = {.uring = &uring, .unique = entry.tag | 2};
	pthread_t other;

	uring.entries = entries;
	entry.unique = late.unique;
	pthread_mutex_init(&entry.lock, NULL);
	pthread_cond_init(&entry.changed, NULL);
	CHECK(pthread_create(&other, NULL, reply_late, &late) == 0);
	pthread_mutex_lock(&entry.lock);
	while (entry.state != FILLED)
		pthread_cond_wait(&entry.changed, &entry.lock);
	then(&entry);
	pthread_cond_broadcast(&entry.changed);
	pthread_mutex_unlock(&entry.lock);
	pthread_join(other, NULL);
	pthread_cond_destroy(&entry.changed);
	pthread_mutex_destroy(&entry.lock);
	return late.said;
}

static void ends(struct entry *entry)
{
	entry->state = DEAD;
}

static void tells_who_replies_that_the_answer_has_not_left(void)
{
	CHECK(reply_said(ends) == -ENODEV);
	CHECK(reply_said(commit) == -ENODEV); /* there is no ring */
}

int main(int argc, char **argv)
{
	if (argc > 2)
		return 2;
	tells_who_replies_that_the_answer_has_not_left();
	if (argc == 1) {
		puts("what needs no mount passed");
		return 0;
	}
	serves_many_clients(argv[1]);
	goes_on_by_the_device_when_a_queue_is_refused(argv[1]);
	ends_with_a_request_out(argv[1], 0);
	ends_with_a_request_out(argv[1], 1);
	stops_before_it_has_gone(argv[1]);
	puts("all scenarios passed");
	return 0;
}
