/*
 * uring.c - see uring.h for queues, entries and their life
 *
 * Order below: the wire; io_uring by system calls; a thread's life; replies; starting and ending.
 *
 * References: Linux fs/fuse/dev_uring.c (fuse_uring_register, fuse_uring_commit_fetch, fuse_uring_copy_to_ring);
 * io_uring/uring_cmd.c; io_uring_setup(2), io_uring_enter(2).
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "uring.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <linux/io_uring.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define REGISTER 1u
#define COMMIT_AND_FETCH 2u
#define SQ_ENTRIES 2u
#define SQE_BYTES 128u
#define WAKE_EVERY_NS 5000000L

/* struct fuse_uring_cmd_req */
struct command {
	uint64_t flags, commit_id;
	uint16_t qid;
	uint8_t padding[6];
};

static_assert(sizeof(struct ovl_uring_header) == 288, "wire format");
static_assert(sizeof(struct command) == 24, "wire format");
static_assert(sizeof(struct io_uring_sqe) == 64, "half of what IORING_SETUP_SQE128 makes");
static_assert(offsetof(struct io_uring_sqe, addr3) == 48, "where a command's own bytes start");
static_assert(sizeof(struct ovl_uring_header) + sizeof(struct fuse_in_header) + OVL_URING_OP_BYTES <= 4096, "one page");

enum state { IDLE, OUT, FILLED, DEAD };

struct entry {
	struct ovl_uring *uring;
	unsigned queue;
	uint64_t tag;
	pthread_t thread;
	bool registered; /* the thread's own until it has reported, immutable then */

	/* The thread's own. */
	int fd; /* -1: none */
	unsigned char *rings, *sqes;
	size_t rings_bytes, sqes_bytes;
	struct io_uring_params params;
	int broken; /* -errno of a submission */

	unsigned char *memory; /* owned; memory_bytes of the ring */
	struct ovl_uring_header *header;
	unsigned char *payload, *answer;
	struct iovec parts[2]; /* as registered */

	pthread_mutex_t lock;
	pthread_cond_t changed; /* protected by lock: the state, or we stop */
	enum state state;       /* protected by lock */
	uint64_t unique;        /* protected by lock; of the request that is OUT, with its tag, until its answer is the kernel's */
};

struct ovl_uring {
	struct ovl_uring_config config; /* immutable */
	size_t page, memory_bytes;      /* immutable */
	cpu_set_t allowed;              /* immutable */
	struct entry **entries;         /* immutable after ovl_uring_new */
	size_t entry_count, queue_count; /* immutable after ovl_uring_new; entry i is of queue i % queue_count */

	pthread_mutex_t lock;
	pthread_cond_t changed; /* protected by lock: any of these, or we stop */
	size_t opened, registered; /* protected by lock; how many threads have done it, or failed */
	int error;              /* protected by lock; the first of theirs */
	bool going;             /* protected by lock */
	atomic_bool stopping;
};

/* ---- the wire ---------------------------------------------------------------------------------------------------- */

unsigned char *ovl_uring_flatten(const struct ovl_uring_header *header, unsigned char *payload, size_t payload_room,
				 size_t *size)
{
	struct fuse_in_header in;
	unsigned char *message;
	size_t op;

	memcpy(&in, header->in_out, sizeof(in));
	if (header->payload_bytes > payload_room || in.len < sizeof(in) || in.len - sizeof(in) < header->payload_bytes)
		return NULL;
	op = in.len - sizeof(in) - header->payload_bytes;
	if (op > OVL_URING_OP_BYTES)
		return NULL;
	message = payload - op - sizeof(in);
	memcpy(message, &in, sizeof(in));
	memcpy(message + sizeof(in), header->op_in, op);
	*size = in.len;
	return message;
}

/* The reply to the request that is OUT.  -EINVAL: it does not fit, or is none. */
static int fill(struct entry *entry, const struct iovec *parts, int number)
{
	struct fuse_out_header out;
	unsigned char *to = entry->payload;
	size_t size = 0;

	for (int i = 0; i < number; i++)
		size += parts[i].iov_len;
	if (number < 1 || parts[0].iov_len < sizeof(out) || size - sizeof(out) > entry->parts[1].iov_len)
		return -EINVAL;
	memcpy(&out, parts[0].iov_base, sizeof(out));
	if (out.error > 0 || out.error <= -512 || out.len != size)
		return -EINVAL;
	for (int i = 0; i < number; i++) {
		const unsigned char *from = parts[i].iov_base;
		size_t skip = i == 0 ? sizeof(out) : 0;

		if (from + skip != to && parts[i].iov_len > skip)
			memmove(to, from + skip, parts[i].iov_len - skip);
		to += parts[i].iov_len - skip;
	}
	out.unique = entry->unique & ~entry->tag;
	memcpy(entry->header->in_out, &out, sizeof(out));
	entry->header->flags = 0;
	entry->header->payload_bytes = (uint32_t)(size - sizeof(out));
	return 0;
}

size_t ovl_uring_count_cpus(const char *text)
{
	size_t count = 0;

	while (*text >= '0' && *text <= '9') {
		char *end;
		unsigned long first = strtoul(text, &end, 10), last = first;

		if (*end == '-') {
			text = end + 1;
			if (*text < '0' || *text > '9')
				return 0;
			last = strtoul(text, &end, 10);
		}
		if (last < first || last > UINT16_MAX)
			return 0;
		count += last - first + 1;
		text = end + (*end == ',');
	}
	return *text == '\0' || *text == '\n' ? count : 0;
}

/* ---- io_uring ---------------------------------------------------------------------------------------------------- */

static int enter(int fd, unsigned submit, unsigned wait)
{
	return (int)syscall(__NR_io_uring_enter, fd, submit, wait, wait ? IORING_ENTER_GETEVENTS : 0u, NULL, 0);
}

static atomic_uint *ring_word(const struct entry *entry, uint32_t offset)
{
	return (atomic_uint *)(void *)(entry->rings + offset);
}

static void ring_close(struct entry *entry)
{
	if (entry->sqes)
		munmap(entry->sqes, entry->sqes_bytes);
	if (entry->rings)
		munmap(entry->rings, entry->rings_bytes);
	if (entry->fd >= 0)
		close(entry->fd);
	entry->sqes = entry->rings = NULL;
	entry->fd = -1;
}

/* By the thread that will use it (SINGLE_ISSUER).  DEFER_TASKRUN: requests are copied when it waits for them, not in
 * between. */
static int ring_open(struct entry *entry)
{
	struct io_uring_params *p = &entry->params;
	size_t sq_bytes, cq_bytes;
	void *at;

	*p = (struct io_uring_params){
		.flags = IORING_SETUP_SQE128 | IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN,
	};
	entry->fd = (int)syscall(__NR_io_uring_setup, SQ_ENTRIES, p);
	if (entry->fd < 0)
		return -errno;
	if (!(p->features & IORING_FEAT_SINGLE_MMAP))
		return -ENOSYS;
	sq_bytes = p->sq_off.array + p->sq_entries * sizeof(uint32_t);
	cq_bytes = p->cq_off.cqes + p->cq_entries * sizeof(struct io_uring_cqe);
	entry->rings_bytes = sq_bytes > cq_bytes ? sq_bytes : cq_bytes;
	entry->sqes_bytes = p->sq_entries * SQE_BYTES;
	at = mmap(NULL, entry->rings_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, entry->fd, IORING_OFF_SQ_RING);
	if (at == MAP_FAILED)
		return -errno;
	entry->rings = at;
	at = mmap(NULL, entry->sqes_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, entry->fd, IORING_OFF_SQES);
	if (at == MAP_FAILED)
		return -errno;
	entry->sqes = at;
	return 0;
}

/* Hand one command to the kernel.  What comes of it is a completion; -errno: there will be none. */
static int submit(struct entry *entry, uint32_t operation, uint64_t commit_id)
{
	atomic_uint *tail = ring_word(entry, entry->params.sq_off.tail);
	unsigned at = atomic_load_explicit(tail, memory_order_relaxed), slot = at & (entry->params.sq_entries - 1);
	struct command command = {.commit_id = commit_id, .qid = (uint16_t)entry->queue};
	struct io_uring_sqe sqe = {
		.opcode = IORING_OP_URING_CMD,
		.fd = entry->uring->config.dev_fd,
		.addr = (uint64_t)(uintptr_t)entry->parts,
		.len = 2,
	};

	sqe.cmd_op = operation;
	memset(entry->sqes + slot * SQE_BYTES, 0, SQE_BYTES);
	memcpy(entry->sqes + slot * SQE_BYTES, &sqe, sizeof(sqe));
	memcpy(entry->sqes + slot * SQE_BYTES + offsetof(struct io_uring_sqe, addr3), &command, sizeof(command));
	atomic_store_explicit(ring_word(entry, entry->params.sq_off.array) + slot, slot, memory_order_relaxed);
	atomic_store_explicit(tail, at + 1, memory_order_release);
	while (enter(entry->fd, 1, 0) < 0) {
		if (errno != EINTR && errno != EAGAIN && errno != EBUSY)
			return -errno;
		if (atomic_load(&entry->uring->stopping))
			return -ESHUTDOWN;
	}
	return 0;
}

/* A completion that is there already.  False: none is. */
static bool take_completion(struct entry *entry, int *result)
{
	atomic_uint *head = ring_word(entry, entry->params.cq_off.head);
	unsigned at = atomic_load_explicit(head, memory_order_relaxed), slot = at & (entry->params.cq_entries - 1);
	struct io_uring_cqe cqe;

	if (at == atomic_load_explicit(ring_word(entry, entry->params.cq_off.tail), memory_order_acquire))
		return false;
	memcpy(&cqe, entry->rings + entry->params.cq_off.cqes + slot * sizeof(cqe), sizeof(cqe));
	atomic_store_explicit(head, at + 1, memory_order_release);
	*result = cqe.res;
	return true;
}

/* 0: a request is in the entry.  -ESHUTDOWN: we stop. */
static int await_completion(struct entry *entry)
{
	int result;

	while (!take_completion(entry, &result)) {
		if (atomic_load(&entry->uring->stopping))
			return -ESHUTDOWN;
		if (entry->broken)
			return entry->broken;
		if (enter(entry->fd, 0, 1) < 0 && errno != EINTR && errno != EAGAIN && errno != EBUSY)
			return -errno;
	}
	return result < 0 ? result : 0;
}

/* ---- a thread's life --------------------------------------------------------------------------------------------- */

static void *serve(void *arg);

static void entry_free(struct entry *entry)
{
	if (!entry)
		return;
	if (entry->memory)
		munmap(entry->memory, entry->uring->memory_bytes);
	pthread_cond_destroy(&entry->changed);
	pthread_mutex_destroy(&entry->lock);
	free(entry);
}

/* One more, with its thread. */
static int add_entry(struct ovl_uring *uring, unsigned queue)
{
	struct entry *entry = calloc(1, sizeof(*entry));
	sigset_t blocked, before;
	void *memory;
	int err;

	if (!entry)
		return -ENOMEM;
	entry->uring = uring;
	entry->queue = queue;
	entry->tag = (uint64_t)(uring->entry_count + 1) << OVL_URING_TAG_SHIFT;
	entry->fd = -1;
	pthread_mutex_init(&entry->lock, NULL);
	pthread_cond_init(&entry->changed, NULL);
	memory = mmap(NULL, uring->memory_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (memory == MAP_FAILED) {
		entry_free(entry);
		return -ENOMEM;
	}
	entry->memory = memory;
	entry->header = memory;
	entry->payload = entry->memory + uring->page;
	entry->answer = entry->payload + uring->config.payload_bytes;
	entry->parts[0] = (struct iovec){.iov_base = entry->header, .iov_len = sizeof(*entry->header)};
	entry->parts[1] = (struct iovec){.iov_base = entry->payload, .iov_len = uring->config.payload_bytes};
	sigfillset(&blocked);
	sigdelset(&blocked, uring->config.wake_signal);
	pthread_sigmask(SIG_SETMASK, &blocked, &before);
	err = -pthread_create(&entry->thread, NULL, serve, entry);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	if (err) {
		entry_free(entry);
		return err;
	}
	pthread_setname_np(entry->thread, "ovl-uring");
	uring->entries[uring->entry_count++] = entry;
	return 0;
}

/* The answer becomes the kernel's, and the entry is armed. */
static void commit(struct entry *entry)
{
	entry->broken = submit(entry, COMMIT_AND_FETCH, entry->unique & ~entry->tag);
	if (!entry->broken)
		entry->unique = 0;
	entry->state = IDLE;
}

/* The request in the entry is whole; `size` 0: it is not. */
static void answer(struct entry *entry, unsigned char *message, size_t size)
{
	const struct ovl_uring_config *config = &entry->uring->config;
	bool has_payload = message + size > entry->payload;
	struct ovl_uring_request request = {
		.message = message,
		.size = size,
		.answer = has_payload ? entry->answer : entry->payload,
		.room = has_payload ? config->answer_bytes : config->payload_bytes,
	};
	struct fuse_out_header error = {.len = sizeof(error), .error = -EIO, .unique = entry->unique};
	struct iovec part = {.iov_base = &error, .iov_len = sizeof(error)};

	if (size)
		config->request(config->arg, &request);
	else
		(void)ovl_uring_reply(entry->uring, entry->unique, &part, 1);
}

/* One request, until its answer is the kernel's.  -ESHUTDOWN: it has none. */
static int serve_one(struct entry *entry)
{
	struct ovl_uring *uring = entry->uring;
	struct fuse_in_header in;
	unsigned char *message;
	size_t size = 0;
	bool abandoned;

	memcpy(&in, entry->header->in_out, sizeof(in));
	if (ovl_uring_owns(in.unique))
		return -EOVERFLOW;
	message = ovl_uring_flatten(entry->header, entry->payload, uring->config.payload_bytes, &size);
	in.unique |= entry->tag;
	if (message)
		memcpy(message, &in, sizeof(in));
	pthread_mutex_lock(&entry->lock);
	entry->unique = in.unique;
	entry->state = OUT;
	pthread_mutex_unlock(&entry->lock);
	answer(entry, message, size);
	pthread_mutex_lock(&entry->lock);
	while (entry->state == OUT && !atomic_load(&uring->stopping))
		pthread_cond_wait(&entry->changed, &entry->lock);
	if (entry->state == FILLED) {
		commit(entry);
		pthread_cond_broadcast(&entry->changed);
	}
	abandoned = entry->state == OUT;
	pthread_mutex_unlock(&entry->lock);
	return abandoned ? -ESHUTDOWN : 0;
}

/* Tell the one who starts us how it went, and whether we may go on. */
static bool report(struct entry *entry, size_t *counter, int err)
{
	struct ovl_uring *uring = entry->uring;
	bool on;

	pthread_mutex_lock(&uring->lock);
	++*counter;
	if (err && !uring->error)
		uring->error = err;
	pthread_cond_broadcast(&uring->changed);
	while (!err && !uring->going && !atomic_load(&uring->stopping))
		pthread_cond_wait(&uring->changed, &uring->lock);
	on = !err && !atomic_load(&uring->stopping);
	pthread_mutex_unlock(&uring->lock);
	return on;
}

static bool register_entry(struct entry *entry)
{
	int result = 0, err = submit(entry, REGISTER, 0);

	if (!err && take_completion(entry, &result)) {
		err = result < 0 ? result : 0;
		if (!err)
			err = serve_one(entry); /* so soon */
	}
	entry->registered = !err;
	return report(entry, &entry->uring->registered, err);
}

/* To the CPU whose clients it serves, if this process may run there. */
static void bind_thread(const struct entry *entry)
{
	cpu_set_t cpus;

	if (entry->queue >= CPU_SETSIZE || !CPU_ISSET(entry->queue, &entry->uring->allowed))
		return;
	CPU_ZERO(&cpus);
	CPU_SET(entry->queue, &cpus);
	(void)pthread_setaffinity_np(pthread_self(), sizeof(cpus), &cpus); /* else it is only slower */
}

static bool is_end(int err)
{
	return err == -ENOTCONN || err == -ECONNABORTED || err == -ECANCELED || err == -ENODEV || err == -ESHUTDOWN;
}

static void *serve(void *arg)
{
	struct entry *entry = arg;
	struct ovl_uring *uring = entry->uring;
	int err = 0;

	bind_thread(entry);
	if (uring->config.begin)
		uring->config.begin();
	if (report(entry, &uring->opened, ring_open(entry)) && register_entry(entry)) {
		while (!err) {
			err = await_completion(entry);
			if (!err)
				err = serve_one(entry);
		}
		if (!is_end(err) && uring->config.failed)
			uring->config.failed(uring->config.arg, err);
	}
	pthread_mutex_lock(&entry->lock);
	entry->state = DEAD;
	pthread_cond_broadcast(&entry->changed);
	pthread_mutex_unlock(&entry->lock);
	ring_close(entry);
	return NULL;
}

/* ---- replies ----------------------------------------------------------------------------------------------------- */

int ovl_uring_reply(struct ovl_uring *uring, uint64_t unique, const struct iovec *parts, int number)
{
	size_t index = (size_t)(unique >> OVL_URING_TAG_SHIFT) - 1;
	struct entry *entry;
	int err;

	if (index >= uring->entry_count)
		return -ENOENT;
	entry = uring->entries[index];
	pthread_mutex_lock(&entry->lock);
	err = entry->state == DEAD ? -ENODEV : entry->state != OUT || entry->unique != unique ? -ENOENT : 0;
	if (!err)
		err = fill(entry, parts, number);
	if (!err && pthread_equal(pthread_self(), entry->thread)) {
		commit(entry);
		err = entry->broken ? -ENODEV : 0;
	} else if (!err) {
		entry->state = FILLED;
		pthread_cond_broadcast(&entry->changed);
		while (entry->state == FILLED && entry->unique == unique)
			pthread_cond_wait(&entry->changed, &entry->lock);
		if (entry->unique == unique) /* its thread has ended without, or could not */
			err = -ENODEV;
	}
	pthread_mutex_unlock(&entry->lock);
	return err;
}

/* ---- starting and ending ----------------------------------------------------------------------------------------- */

/* As the kernel counts queues: num_possible_cpus(). */
static int possible_cpus(size_t *out)
{
	int fd = open("/sys/devices/system/cpu/possible", O_RDONLY | O_CLOEXEC);
	char text[4096];
	ssize_t n;

	if (fd < 0)
		return -errno;
	n = read(fd, text, sizeof(text) - 1);
	close(fd);
	if (n <= 0)
		return -EIO;
	text[n] = '\0';
	*out = ovl_uring_count_cpus(text);
	return *out == 0 || *out > OVL_URING_QUEUES_MAX ? -E2BIG : 0;
}

int ovl_uring_new(struct ovl_uring **out, const struct ovl_uring_config *config)
{
	struct ovl_uring *uring = calloc(1, sizeof(*uring));
	size_t depth = 0;
	int err;

	if (!uring)
		return -ENOMEM;
	uring->config = *config;
	uring->page = (size_t)sysconf(_SC_PAGESIZE);
	uring->memory_bytes = uring->page + config->payload_bytes + config->answer_bytes;
	pthread_mutex_init(&uring->lock, NULL);
	pthread_cond_init(&uring->changed, NULL);
	if (sched_getaffinity(getpid(), sizeof(uring->allowed), &uring->allowed) != 0)
		CPU_ZERO(&uring->allowed);
	err = possible_cpus(&uring->queue_count);
	if (!err) {
		depth = OVL_URING_THREADS / uring->queue_count;
		depth = depth < OVL_URING_DEPTH_MIN ? OVL_URING_DEPTH_MIN : depth > OVL_URING_DEPTH_MAX ? OVL_URING_DEPTH_MAX : depth;
		uring->entries = calloc(uring->queue_count * depth, sizeof(struct entry *));
		err = uring->entries ? 0 : -ENOMEM;
	}
	for (size_t i = 0; !err && i < uring->queue_count * depth; i++)
		err = add_entry(uring, (unsigned)(i % uring->queue_count));
	pthread_mutex_lock(&uring->lock);
	while (!err && uring->opened < uring->entry_count)
		pthread_cond_wait(&uring->changed, &uring->lock);
	if (!err)
		err = uring->error;
	pthread_mutex_unlock(&uring->lock);
	if (err) {
		ovl_uring_free(uring);
		return err;
	}
	*out = uring;
	return 0;
}

/* The kernel uses the ring as soon as every queue has an entry, and not before. */
static bool is_complete(const struct ovl_uring *uring)
{
	for (size_t queue = 0; queue < uring->queue_count; queue++) {
		size_t i = queue;

		while (i < uring->entry_count && !uring->entries[i]->registered)
			i += uring->queue_count;
		if (i >= uring->entry_count)
			return false;
	}
	return true;
}

int ovl_uring_go(struct ovl_uring *uring)
{
	int err;

	pthread_mutex_lock(&uring->lock);
	uring->going = true;
	pthread_cond_broadcast(&uring->changed);
	while (uring->registered < uring->entry_count && !atomic_load(&uring->stopping))
		pthread_cond_wait(&uring->changed, &uring->lock);
	err = atomic_load(&uring->stopping) ? -ESHUTDOWN : is_complete(uring) ? 0 : uring->error;
	pthread_mutex_unlock(&uring->lock);
	return err;
}

/* A thread may be about to wait, so one signal is not enough. */
static void join(const struct ovl_uring *uring, pthread_t thread)
{
	struct timespec until;

	do {
		pthread_kill(thread, uring->config.wake_signal);
		clock_gettime(CLOCK_REALTIME, &until);
		until.tv_nsec += WAKE_EVERY_NS;
		if (until.tv_nsec >= 1000000000L) {
			until.tv_nsec -= 1000000000L;
			until.tv_sec++;
		}
	} while (pthread_timedjoin_np(thread, NULL, &until) != 0);
}

void ovl_uring_stop(struct ovl_uring *uring)
{
	if (!uring || atomic_exchange(&uring->stopping, true))
		return;
	pthread_mutex_lock(&uring->lock);
	pthread_cond_broadcast(&uring->changed);
	pthread_mutex_unlock(&uring->lock);
	for (size_t i = 0; i < uring->entry_count; i++) {
		struct entry *entry = uring->entries[i];

		pthread_mutex_lock(&entry->lock);
		pthread_cond_broadcast(&entry->changed);
		pthread_mutex_unlock(&entry->lock);
	}
	for (size_t i = 0; i < uring->entry_count; i++)
		join(uring, uring->entries[i]->thread);
}

void ovl_uring_free(struct ovl_uring *uring)
{
	if (!uring)
		return;
	ovl_uring_stop(uring);
	for (size_t i = 0; i < uring->entry_count; i++)
		entry_free(uring->entries[i]);
	free(uring->entries);
	pthread_cond_destroy(&uring->changed);
	pthread_mutex_destroy(&uring->lock);
	free(uring);
}
