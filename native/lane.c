/*
 * lane.c - see lane.h for what goes where, who waits for whom, and how it ends
 *
 * Order below: state; writing to the kernel; INIT; handlers and their table; the three threads; life and death.
 *
 * References: include/uapi/linux/fuse.h; Linux fs/fuse/dev.c (fuse_dev_do_read, fuse_dev_do_write, fuse_read_forget);
 * Linux net/unix/af_unix.c (unix_dgram_sendmsg: the size of one message); libfuse lib/fuse_lowlevel.c (do_init).
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "lane.h"
#include "gate.h"
#include "lane_trace.h"
#include "uring.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

/* Tests put their own in place, to have every errno. */
#ifndef OVL_LANE_READ
#define OVL_LANE_READ read
#endif
#ifndef OVL_LANE_WRITEV
#define OVL_LANE_WRITEV writev
#endif
#ifndef OVL_LANE_SEND
#define OVL_LANE_SEND send
#endif

#define HEADER_BYTES 4096u /* beside max_write: what the kernel wants in a read buffer, and more (FUSE_MIN_READ_BUFFER) */
#define FORGETS_MAX 2048u  /* in one message: 32 KiB */
#define SOCKET_BYTES (1 << 20)
#define SEND_TRIES 50
#define SEND_PAUSE_NS 10000000L
#define STOP_SECONDS 5
#define WAKE_SIGNAL (SIGRTMAX - 1) /* ends a read(2); nothing else is done with it */
#define WAKE_EVERY_NS 5000000L
#define LEADERS_MAX 8u
#define URING_OPEN 1
#define LINGER_NS 30000L /* how long to look for the next request before waiting for it */
#define LINGER_MISSES 6u
#define LINGER_BUSY 16u /* requests without looking, after somebody else wanted the CPU */

static_assert(sizeof(struct fuse_in_header) == 40, "wire format");
static_assert(sizeof(struct fuse_out_header) == 16, "wire format");
static_assert(sizeof(struct fuse_init_out) == 64, "wire format");
static_assert(sizeof(struct fuse_read_in) == 40, "wire format");
static_assert(sizeof(struct fuse_forget_one) == 16, "wire format");
static_assert(sizeof(struct fuse_batch_forget_in) == 8, "wire format");
static_assert(sizeof(struct fuse_in_header) + sizeof(struct fuse_batch_forget_in) +
	      FORGETS_MAX * sizeof(struct fuse_forget_one) <= OVL_LANE_MESSAGE_MAX, "a cut BATCH_FORGET fits");
static_assert(sizeof(struct fuse_out_header) + OVL_LANE_LIST_MAX <= OVL_LANE_MESSAGE_MAX, "a listing fits");

struct counters {
	atomic_uint_fast64_t forwarded, extra, answered;
};

struct ovl_lane_reader {
	struct ovl_lane *lane;
	pthread_t thread;
	bool leads; /* the thread's own */
	unsigned char *request, *answer; /* buffer_bytes each */
	size_t room;                     /* in `answer` */
	unsigned misses, skip;           /* the thread's own: see linger() */
	long preempted;                  /* the thread's own: how often it was */
};

struct ovl_lane {
	int dev_fd, session_fd;          /* owned; immutable */
	int stop_fd, ended_fd, extra_fd; /* owned; immutable; eventfds */
	size_t buffer_bytes, max_write;  /* immutable */
	size_t queue_bytes_max, queue_count_max;

	unsigned char *reply;   /* the writer's; buffer_bytes */
	struct ovl_lane_native native; /* immutable; .answer NULL: nothing is answered natively */
	struct ovl_lane_trace *trace;  /* immutable; borrowed */

	struct ovl_lane_reader readers[OVL_LANE_READERS]; /* protected by lock: which there are */
	size_t reader_count;                     /* protected by lock */
	size_t leaders, leaders_max, followers;  /* protected by lock; leaders_max immutable; followers: who wait for the lead */
	pthread_cond_t lead;                     /* protected by lock: there is one leader less, or we stop */
	pthread_t writer, notifier;
	bool started, writer_runs; /* the owner's thread only */

	atomic_bool stopping;
	atomic_int end_reason;
	atomic_uint_fast64_t init_unique; /* of the INIT under way, 0 otherwise; written before it is forwarded */
	atomic_uint_fast64_t init_offered;
	bool may_linger;         /* immutable */
	atomic_flag lingering;   /* one does */
	bool wants_uring;        /* immutable */
	struct ovl_uring *_Atomic uring; /* NULL: not used (any more); changed by the writer, with INIT's reply, only */
	int uring_state;         /* protected by lock; URING_OPEN until it is decided, then as ovl_lane_uring */
	pthread_cond_t decided;  /* protected by lock */

	pthread_mutex_t lock; /* a leaf: nothing else is locked, and nothing but eventfds written, while it is held */
	pthread_cond_t room;  /* protected by lock: the queue has become shorter, or we stop */
	pthread_cond_t noted; /* protected by lock: a notification has come, or we stop */
	struct ovl_lane_request *first, **last;       /* the queue; protected by lock */
	size_t queue_bytes, queue_count;              /* protected by lock */
	struct ovl_lane_request *note, **last_note;   /* notifications; protected by lock */
	bool notifier_runs;                           /* protected by lock */
	struct ovl_lane_pending *pending;             /* protected by lock; only with native answers; a hash table by
	                                                 unique, which is never 0 */
	size_t pending_count, pending_mask;           /* protected by lock */

	struct counters counters[OVL_LANE_OPCODES];
	atomic_uint_fast64_t replies, interrupted, refused, undeliverable, notifications, dropped;
};

static void count(atomic_uint_fast64_t *counter)
{
	atomic_fetch_add_explicit(counter, 1, memory_order_relaxed);
}

static uint64_t value(const atomic_uint_fast64_t *counter)
{
	return atomic_load_explicit(counter, memory_order_relaxed);
}

static unsigned slot(uint32_t opcode)
{
	return opcode < OVL_LANE_OPCODES ? opcode : 0;
}

static void raise_event(int fd)
{
	uint64_t one = 1;
	ssize_t n;

	do
		n = write(fd, &one, sizeof(one));
	while (n < 0 && errno == EINTR);
	/* EAGAIN: the counter is full, so it is readable: all that is wanted */
}

static void clear_event(int fd)
{
	uint64_t number;
	ssize_t n;

	do
		n = read(fd, &number, sizeof(number));
	while (n < 0 && errno == EINTR);
}

/* ---- writing to the kernel --------------------------------------------------------------------------------------- */

/* One message to the kernel, whole.  -ENOENT: nobody waits for it (any more); other errors as writev(2). */
static ovl_err_t put(struct ovl_lane *lane, const struct iovec *parts, int number)
{
	for (;;) {
		struct pollfd writable = {.fd = lane->dev_fd, .events = POLLOUT};

		if (OVL_LANE_WRITEV(lane->dev_fd, parts, number) >= 0)
			return 0;
		if (errno == EINTR)
			continue;
		if (errno != EAGAIN)
			return -errno;
		if (atomic_load(&lane->stopping))
			return -ENODEV;
		poll(&writable, 1, 100);
	}
}

/* To where the request came from. */
static ovl_err_t put_for(struct ovl_lane *lane, uint64_t unique, const struct iovec *parts, int number)
{
	struct ovl_uring *uring;

	if (!ovl_uring_owns(unique))
		return put(lane, parts, number);
	uring = atomic_load(&lane->uring);
	return uring ? ovl_uring_reply(uring, unique, parts, number) : -ENOENT;
}

static bool is_gone(ovl_err_t err)
{
	return err == -ENOENT || err == -ENODEV || err == -ECONNABORTED || err == -ENOTCONN || err == -EPIPE ||
	       err == -EPERM; /* EPERM: not mounted yet or any more */
}

static bool has_reply(uint32_t opcode)
{
	return opcode != FUSE_FORGET && opcode != FUSE_BATCH_FORGET;
}

static void put_error(struct ovl_lane *lane, uint64_t unique, int error)
{
	struct fuse_out_header header = {.len = sizeof(header), .error = -error, .unique = unique};
	struct iovec part = {.iov_base = &header, .iov_len = sizeof(header)};

	if (put_for(lane, unique, &part, 1) == 0)
		count(&lane->replies);
	else
		count(&lane->interrupted);
}

/* A reply, or EIO in its place: the client waits for one of them. */
static void put_reply(struct ovl_lane *lane, uint64_t unique, const struct iovec *parts, int number)
{
	ovl_err_t err = put_for(lane, unique, parts, number);

	if (err == 0) {
		count(&lane->replies);
	} else if (is_gone(err)) {
		count(&lane->interrupted);
	} else {
		count(&lane->refused);
		put_error(lane, unique, EIO);
	}
}

/* ---- what is with Python ----------------------------------------------------------------------------------------- */

static bool is_rename(uint32_t opcode)
{
	return opcode == FUSE_RENAME || opcode == FUSE_RENAME2;
}

static size_t pending_home(const struct ovl_lane *lane, uint64_t unique)
{
	return (size_t)(unique * 0x9E3779B97F4A7C15ull >> 32) & lane->pending_mask;
}

static void pending_enter(struct ovl_lane *lane, const struct ovl_lane_pending *request)
{
	size_t at = pending_home(lane, request->unique);

	while (lane->pending[at].unique)
		at = (at + 1) & lane->pending_mask;
	lane->pending[at] = *request;
	lane->pending_count++;
}

static ovl_err_t pending_reserve(struct ovl_lane *lane)
{
	size_t before = lane->pending ? lane->pending_mask + 1 : 0, room = before ? before * 2 : 256;
	struct ovl_lane_pending *old = lane->pending, *table;

	if (lane->pending_count < before / 2)
		return 0;
	table = calloc(room, sizeof(*table));
	if (!table)
		return -ENOMEM;
	lane->pending = table;
	lane->pending_mask = room - 1;
	lane->pending_count = 0;
	for (size_t i = 0; i < before; i++)
		if (old[i].unique)
			pending_enter(lane, &old[i]);
	free(old);
	return 0;
}

static struct ovl_lane_pending describe_request(const struct fuse_in_header *header, const unsigned char *message)
{
	struct ovl_lane_pending request = {.unique = header->unique, .nodeid = header->nodeid, .opcode = header->opcode};
	struct fuse_open_in in;

	/* All three begin with the flags of open(2). */
	if ((header->opcode == FUSE_OPEN || header->opcode == FUSE_CREATE || header->opcode == OP_TMPFILE) &&
	    header->len >= sizeof(*header) + sizeof(in)) {
		memcpy(&in, message + sizeof(*header), sizeof(in));
		request.flags = in.flags;
		request.kill = header->opcode == FUSE_OPEN && in.open_flags & 1u; /* FUSE_OPEN_KILL_SUIDGID */
	}
	return request;
}

/* Before it is handed on.  -ENOMEM: it must not be. */
static ovl_err_t note_request(struct ovl_lane *lane, const struct fuse_in_header *header, const unsigned char *message)
{
	struct ovl_lane_pending request;
	ovl_err_t err;

	if (!lane->native.answer || !has_reply(header->opcode) || header->unique == 0)
		return 0;
	request = describe_request(header, message);
	ovl_gate_hand_over(lane->native.gate, is_rename(header->opcode));
	pthread_mutex_lock(&lane->lock);
	err = pending_reserve(lane);
	if (!err)
		pending_enter(lane, &request);
	pthread_mutex_unlock(&lane->lock);
	if (err)
		ovl_gate_returned(lane->native.gate, is_rename(header->opcode));
	return err;
}

/* Its reply is here; opcode 0: it is not known. */
static struct ovl_lane_pending take_request(struct ovl_lane *lane, uint64_t unique)
{
	struct ovl_lane_pending found = {0};

	if (!lane->native.answer || unique == 0)
		return found;
	pthread_mutex_lock(&lane->lock);
	if (lane->pending) {
		size_t mask = lane->pending_mask, hole = pending_home(lane, unique);

		while (lane->pending[hole].unique && lane->pending[hole].unique != unique)
			hole = (hole + 1) & mask;
		found = lane->pending[hole];
		if (found.unique)
			lane->pending_count--;
		for (size_t at = (hole + 1) & mask; found.unique && lane->pending[at].unique; at = (at + 1) & mask) {
			size_t home = pending_home(lane, lane->pending[at].unique);

			if (((at - home) & mask) >= ((at - hole) & mask)) {
				lane->pending[hole] = lane->pending[at];
				hole = at;
			}
		}
		if (found.unique)
			lane->pending[hole].unique = 0;
	}
	pthread_mutex_unlock(&lane->lock);
	if (found.unique)
		ovl_gate_returned(lane->native.gate, is_rename(found.opcode));
	return found;
}

/* A reply of Python is about to be written: native answers that were looked up before are written first. */
static void await_order(struct ovl_lane *lane)
{
	if (lane->native.answer)
		ovl_gate_barrier(lane->native.gate);
}

/* ---- INIT -------------------------------------------------------------------------------------------------------- */

/*
 * What the kernel is told that libfuse would not tell it, if it offers it.  DONT_MASK: the umask is ours to apply,
 * because a default ACL takes its place (fs/posix_acl.c: posix_acl_create).
 */
static const struct {
	uint64_t set, clear;
	bool native; /* only with native answers, which know plain READDIR */
} init_flags[] = {
	{.set = FUSE_DONT_MASK},
	{.set = FUSE_PARALLEL_DIROPS, .native = true},
	{.set = FUSE_CACHE_SYMLINKS, .native = true},
	{.set = FUSE_DO_READDIRPLUS | FUSE_READDIRPLUS_AUTO, .native = true},
	/* Who writes loses set-user-ID bits and capabilities: seen to in lane_file.c and lane_change.c, so that the kernel
	 * need not ask for security.capability at every write. */
	{.set = FUSE_HANDLE_KILLPRIV_V2, .native = true},
	/* Nobody else writes, so pages stay until we say so, whatever mtime says. */
	{.set = FUSE_EXPLICIT_INVAL_DATA, .clear = FUSE_AUTO_INVAL_DATA, .native = true},
	{.set = FUSE_ASYNC_DIO, .native = true},
};

#define MAX_BACKGROUND 64u
#define CONGESTION 48u
#define STACK_DEPTH 1u /* with passthrough: files of the upperdir lie on no stacked file system */

/* The request, before pyfuse3 sees it: without MAX_PAGES libfuse keeps to buffers of 128 KiB, and so much is never
 * sent through the socket. */
static void note_init(struct ovl_lane *lane, unsigned char *message, size_t size)
{
	struct fuse_in_header header;
	struct fuse_init_in in = {0};
	size_t at = sizeof(header), known = size - at < sizeof(in) ? size - at : sizeof(in);
	uint64_t offered;

	memcpy(&header, message, sizeof(header));
	memcpy(&in, message + at, known);
	offered = in.flags;
	if (in.flags & FUSE_INIT_EXT)
		offered |= (uint64_t)in.flags2 << 32;
	if (known >= offsetof(struct fuse_init_in, flags) + sizeof(in.flags)) {
		in.flags &= ~(uint32_t)FUSE_MAX_PAGES;
		memcpy(message + at, &in, known);
	}
	atomic_store(&lane->init_offered, offered);
	atomic_store(&lane->init_unique, header.unique);
}

static bool open_uring(struct ovl_lane *lane, uint64_t offered, size_t payload_bytes);

/* pyfuse3's reply, before the kernel sees it. */
static void patch_init(struct ovl_lane *lane, unsigned char *message, size_t size)
{
	struct fuse_out_header header;
	struct fuse_init_out out;
	uint64_t offered = atomic_load(&lane->init_offered), flags;
	size_t page = (size_t)sysconf(_SC_PAGESIZE), most = lane->max_write;

	memcpy(&header, message, sizeof(header));
	if (header.error || size != sizeof(header) + sizeof(out))
		return;
	memcpy(&out, message + sizeof(header), sizeof(out));
	flags = out.flags | (uint64_t)out.flags2 << 32;
	for (size_t i = 0; i < sizeof(init_flags) / sizeof(init_flags[0]); i++) {
		if (init_flags[i].native && !lane->native.answer)
			continue;
		flags |= init_flags[i].set & offered;
		flags &= ~init_flags[i].clear;
	}
	if (offered & FUSE_MAX_PAGES) {
		flags |= FUSE_MAX_PAGES;
		out.max_pages = (uint16_t)(most / page < UINT16_MAX ? most / page : UINT16_MAX);
	} else if (most > 32 * page) {
		most = 32 * page; /* what a request holds in such a kernel: FUSE_DEFAULT_MAX_PAGES_PER_REQ */
	}
	out.max_write = (uint32_t)most;
	if (lane->native.answer) {
		flags |= lane->native.init_flags & offered;
		if (flags >> 32 && offered & FUSE_INIT_EXT)
			flags |= FUSE_INIT_EXT;
		if (flags & OVL_LANE_INIT_PASSTHROUGH)
			out.unused[0] = STACK_DEPTH; /* max_stack_depth, in newer headers */
		out.max_background = MAX_BACKGROUND;
		out.congestion_threshold = CONGESTION;
		if (lane->native.agree)
			lane->native.agree(lane->native.arg, offered, flags);
	}
	if (lane->wants_uring && open_uring(lane, offered, (size_t)out.max_pages * page))
		flags |= OVL_URING_INIT_FLAG | FUSE_INIT_EXT;
	out.flags = (uint32_t)flags;
	out.flags2 = (uint32_t)(flags >> 32);
	memcpy(message + sizeof(header), &out, sizeof(out));
}

/* ---- handlers ---------------------------------------------------------------------------------------------------- */

enum route { FORWARD, EXTRA, ANSWERED };

/* Looks at a request (which it may change) and answers it or says who shall.  The reader's thread. */
typedef enum route (*handler_t)(struct ovl_lane_reader *reader, unsigned char *message, size_t size);

/* One message to pyfuse3; waits while the socket is full. */
static ovl_err_t send_to_session(struct ovl_lane_reader *reader, const unsigned char *message, size_t size)
{
	const struct timespec pause = {.tv_nsec = SEND_PAUSE_NS};
	struct ovl_lane *lane = reader->lane;
	int how = MSG_NOSIGNAL | MSG_DONTWAIT;

	for (int tries = 0;;) {
		if (OVL_LANE_SEND(lane->session_fd, message, size, how) >= 0)
			return 0;
		if (errno == EINTR)
			continue;
		if (errno == EAGAIN && how & MSG_DONTWAIT) {
			ovl_lane_yield(reader);
			how = MSG_NOSIGNAL;
			continue;
		}
		if ((errno != ENOBUFS && errno != ENOMEM) || ++tries == SEND_TRIES || atomic_load(&lane->stopping))
			return -errno;
		ovl_lane_yield(reader);
		nanosleep(&pause, NULL);
	}
}

static enum route answer_extra(struct ovl_lane_reader *reader, unsigned char *message, size_t size)
{
	(void)reader, (void)message, (void)size;
	return EXTRA;
}

static enum route answer_unknown(struct ovl_lane_reader *reader, unsigned char *message, size_t size)
{
	struct fuse_in_header header;

	(void)size;
	memcpy(&header, message, sizeof(header));
	put_error(reader->lane, header.unique, ENOSYS);
	return ANSWERED;
}

static enum route answer_init(struct ovl_lane_reader *reader, unsigned char *message, size_t size)
{
	note_init(reader->lane, message, size);
	return FORWARD;
}

static enum route answer_listing(struct ovl_lane_reader *reader, unsigned char *message, size_t size)
{
	struct fuse_read_in in;

	(void)reader;
	if (size >= sizeof(struct fuse_in_header) + sizeof(in)) {
		memcpy(&in, message + sizeof(struct fuse_in_header), sizeof(in));
		if (in.size > OVL_LANE_LIST_MAX)
			in.size = OVL_LANE_LIST_MAX;
		memcpy(message + sizeof(struct fuse_in_header), &in, sizeof(in));
	}
	return FORWARD;
}

/* A BATCH_FORGET can be as long as the read buffer: cut it.  The header is put anew before each part, over what was
 * sent already. */
static enum route answer_batch_forget(struct ovl_lane_reader *reader, unsigned char *message, size_t size)
{
	struct fuse_in_header header;
	struct fuse_batch_forget_in in;
	const size_t before = sizeof(header) + sizeof(in);
	size_t at = before, left;

	if (size < before)
		return FORWARD;
	memcpy(&header, message, sizeof(header));
	memcpy(&in, message + sizeof(header), sizeof(in));
	left = (size - before) / sizeof(struct fuse_forget_one);
	if (left > in.count)
		left = in.count;
	while (left > 0) {
		size_t now = left < FORGETS_MAX ? left : FORGETS_MAX, bytes = now * sizeof(struct fuse_forget_one);

		in.count = (uint32_t)now;
		header.len = (uint32_t)(before + bytes);
		memcpy(message + at - before, &header, sizeof(header));
		memcpy(message + at - sizeof(in), &in, sizeof(in));
		if (send_to_session(reader, message + at - before, header.len) < 0)
			count(&reader->lane->dropped);
		at += bytes;
		left -= now;
	}
	return ANSWERED;
}

static const handler_t handlers[OVL_LANE_OPCODES] = {
	[FUSE_INIT] = answer_init,
	[FUSE_READ] = answer_extra,
	[FUSE_WRITE] = answer_extra,
	[FUSE_READDIR] = answer_listing,
	[FUSE_READDIRPLUS] = answer_listing,
	[FUSE_BATCH_FORGET] = answer_batch_forget,
	[FUSE_SETXATTR] = answer_extra, /* pyfuse3 does not pass the flags on */
	[FUSE_INTERRUPT] = answer_unknown,
	[FUSE_IOCTL] = answer_extra,
	[FUSE_FALLOCATE] = answer_extra,
	[FUSE_LSEEK] = answer_extra,
	[FUSE_COPY_FILE_RANGE] = answer_extra,
	[OP_SYNCFS] = answer_extra,
	[OP_TMPFILE] = answer_extra,
	[OP_STATX] = answer_unknown,
	[OP_COPY_FILE_RANGE_64] = answer_extra,
};

static void refuse(struct ovl_lane *lane, const struct fuse_in_header *header, int error)
{
	count(&lane->undeliverable);
	(void)take_request(lane, header->unique);
	if (has_reply(header->opcode))
		put_error(lane, header->unique, error);
}

static void forward(struct ovl_lane_reader *reader, const struct fuse_in_header *header, const unsigned char *message)
{
	ovl_err_t err = send_to_session(reader, message, header->len);

	if (err)
		refuse(reader->lane, header, err == -ENOBUFS || err == -ENOMEM ? ENOMEM : EIO);
}

/* Append to the queue; waits while it is full. */
static bool queue_is_full(const struct ovl_lane *lane, size_t more)
{
	return lane->first && !atomic_load(&lane->stopping) &&
	       (lane->queue_count >= lane->queue_count_max || lane->queue_bytes + more > lane->queue_bytes_max);
}

static void enqueue(struct ovl_lane_reader *reader, const struct fuse_in_header *header, const unsigned char *message)
{
	struct ovl_lane *lane = reader->lane;
	struct ovl_lane_request *request = malloc(sizeof(*request) + header->len);

	if (!request) {
		refuse(lane, header, ENOMEM);
		return;
	}
	request->next = NULL;
	request->size = header->len;
	memcpy(request->message, message, header->len);
	pthread_mutex_lock(&lane->lock);
	if (queue_is_full(lane, request->size)) {
		pthread_mutex_unlock(&lane->lock);
		ovl_lane_yield(reader);
		pthread_mutex_lock(&lane->lock);
	}
	while (queue_is_full(lane, request->size))
		pthread_cond_wait(&lane->room, &lane->lock);
	if (!lane->first)
		raise_event(lane->extra_fd);
	*lane->last = request;
	lane->last = &request->next;
	lane->queue_count++;
	lane->queue_bytes += request->size;
	pthread_mutex_unlock(&lane->lock);
}

#define SMALL_BYTES 240u

/* In one piece, and within a page, if it is small: the kernel pins each piece anew (fs/fuse/dev.c: fuse_copy_fill()). */
static void put_answer(struct ovl_lane *lane, const struct fuse_out_header *header, const struct ovl_lane_answer *answer)
{
	_Alignas(256) unsigned char small[sizeof(*header) + SMALL_BYTES];
	struct iovec parts[2] = {
		{.iov_base = (void *)(uintptr_t)header, .iov_len = sizeof(*header)}, /* writev does not write to it */
		{.iov_base = answer->body, .iov_len = answer->size},
	};

	static_assert(sizeof(small) == 256, "within a page");
	if (answer->size > SMALL_BYTES) {
		put_reply(lane, header->unique, parts, 2);
		return;
	}
	memcpy(small, header, sizeof(*header));
	memcpy(small + sizeof(*header), answer->body, answer->size);
	parts[0] = (struct iovec){.iov_base = small, .iov_len = header->len};
	put_reply(lane, header->unique, parts, 1);
}

/* False: the request, which may have changed, has to be handed on. */
static bool answer_natively(struct ovl_lane_reader *reader, size_t size)
{
	struct ovl_lane *lane = reader->lane;
	struct ovl_lane_answer answer = {.body = reader->answer, .reader = reader};
	struct fuse_in_header request;
	struct fuse_out_header header;
	enum ovl_lane_verdict verdict;
	uint64_t began_ns = ovl_lane_trace_began(lane->trace);

	answer.room = reader->room;
	memcpy(&request, reader->request, sizeof(request));
	verdict = lane->native.answer(lane->native.arg, reader->request, size, &answer);
	if (verdict != OVL_LANE_PASS) { /* first: once an answer has left, the next request can be where this one was */
		count(&lane->counters[slot(request.opcode)].answered);
		ovl_lane_trace_answer(lane->trace, reader->request, size, &answer, began_ns);
	}
	if (verdict == OVL_LANE_ANSWERED) {
		header = (struct fuse_out_header){
			.len = (uint32_t)(sizeof(header) + answer.size),
			.error = -answer.error,
			.unique = request.unique,
		};
		if (answer.changed)
			ovl_gate_barrier(lane->native.gate);
		put_answer(lane, &header, &answer);
	}
	if (answer.looking)
		ovl_gate_looked(lane->native.gate);
	return verdict != OVL_LANE_PASS;
}

/* pyfuse3 does not bind READDIR, which comes only with FUSE_READDIRPLUS_AUTO. */
static enum route route_of(struct ovl_lane_reader *reader, uint32_t opcode, unsigned char *message, size_t size)
{
	handler_t handler = opcode < OVL_LANE_OPCODES ? handlers[opcode] : NULL;

	if (reader->lane->native.answer && opcode == FUSE_READDIR)
		return EXTRA;
	return handler ? handler(reader, message, size) : FORWARD;
}

static void dispatch(struct ovl_lane_reader *reader, size_t size)
{
	struct ovl_lane *lane = reader->lane;
	unsigned char *message = reader->request;
	struct fuse_in_header header;
	struct counters *counters;
	enum route route;

	if (size < sizeof(header)) {
		count(&lane->dropped);
		return;
	}
	memcpy(&header, message, sizeof(header));
	if (header.len != size) {
		count(&lane->dropped);
		header.len = (uint32_t)size;
		refuse(lane, &header, EIO);
		return;
	}
	counters = &lane->counters[slot(header.opcode)];
	if (lane->native.answer && answer_natively(reader, size))
		return;
	route = route_of(reader, header.opcode, message, size);
	if (route == ANSWERED) {
		count(&counters->answered);
		return;
	}
	count(route == FORWARD ? &counters->forwarded : &counters->extra);
	if (note_request(lane, &header, message) < 0)
		refuse(lane, &header, ENOMEM);
	else if (route == FORWARD)
		forward(reader, &header, message);
	else
		enqueue(reader, &header, message);
}

/* ---- threads ----------------------------------------------------------------------------------------------------- */

/* Wait until `fd` is readable (or broken, which reading will say).  False: we stop. */
static bool wait_readable(struct ovl_lane *lane, int fd)
{
	struct pollfd both[2] = {{.fd = fd, .events = POLLIN}, {.fd = lane->stop_fd, .events = POLLIN}};

	while (!atomic_load(&lane->stopping)) {
		if (poll(both, 2, -1) < 0 && errno != EINTR)
			return true;
		if (both[0].revents)
			return !atomic_load(&lane->stopping);
	}
	return false;
}

/* Signals are Python's, but for `wake` (0: none). */
static ovl_err_t start_thread(pthread_t *thread, void *(*run)(void *), void *arg, const char *name, int wake)
{
	sigset_t blocked, before;
	int err;

	sigfillset(&blocked);
	if (wake)
		sigdelset(&blocked, wake);
	pthread_sigmask(SIG_SETMASK, &blocked, &before);
	err = pthread_create(thread, NULL, run, arg);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	if (!err)
		pthread_setname_np(*thread, name);
	return -err;
}

static void *read_requests(void *arg);

/* One more reader, unless there are enough; the lock is held. */
static ovl_err_t add_reader(struct ovl_lane *lane)
{
	struct ovl_lane_reader *reader = &lane->readers[lane->reader_count];
	ovl_err_t err = -ENOMEM;

	if (lane->reader_count == OVL_LANE_READERS)
		return 0;
	*reader = (struct ovl_lane_reader){.lane = lane};
	reader->request = malloc(lane->buffer_bytes);
	reader->answer = lane->native.answer ? malloc(lane->buffer_bytes) : NULL;
	reader->room = lane->buffer_bytes - sizeof(struct fuse_out_header);
	if (reader->request && (reader->answer || !lane->native.answer))
		err = start_thread(&reader->thread, read_requests, reader, "ovl-read", WAKE_SIGNAL);
	if (err) {
		free(reader->request);
		free(reader->answer);
		return err;
	}
	lane->reader_count++;
	lane->followers++; /* it will, in a moment */
	return 0;
}

void ovl_lane_yield(struct ovl_lane_reader *reader)
{
	struct ovl_lane *lane;

	if (!reader || !reader->leads)
		return;
	lane = reader->lane;
	pthread_mutex_lock(&lane->lock);
	if (lane->followers == 0 && !atomic_load(&lane->stopping))
		(void)add_reader(lane); /* without one, who waits waits for this one */
	if (lane->followers > 0) {
		reader->leads = false;
		lane->leaders--;
		pthread_cond_signal(&lane->lead);
	}
	pthread_mutex_unlock(&lane->lock);
}

/* Waits for the lead.  False: we stop. */
static bool take_lead(struct ovl_lane_reader *reader)
{
	struct ovl_lane *lane = reader->lane;

	pthread_mutex_lock(&lane->lock);
	while (lane->leaders == lane->leaders_max && !atomic_load(&lane->stopping))
		pthread_cond_wait(&lane->lead, &lane->lock);
	lane->followers--;
	lane->leaders++;
	pthread_mutex_unlock(&lane->lock);
	reader->leads = true;
	return !atomic_load(&lane->stopping);
}

static void follow(struct ovl_lane_reader *reader)
{
	pthread_mutex_lock(&reader->lane->lock);
	reader->lane->followers++;
	pthread_mutex_unlock(&reader->lane->lock);
}

/* What is made for clients has the mode that they asked for; the umask is then this thread's own. */
static void own_umask(void)
{
	if (unshare(CLONE_FS) == 0)
		umask(0);
}

/*
 * A client that was just answered often asks again within microseconds, but to wake a thread that waits takes tens of
 * them when it sleeps on another CPU.  So look for a moment before waiting.  Who does not find anything looks at every
 * 2nd, 4th, ... 64th request only: the client is slow, or runs on this CPU and cannot go on while we look.  Who was
 * preempted does not for long: the machine is busy, there is no CPU to spare, and who has used his share waits longest.
 * At rest nobody looks, and with one CPU never.
 */
static void linger(struct ovl_lane_reader *reader)
{
	struct ovl_lane *lane = reader->lane;
	struct pollfd request = {.fd = lane->dev_fd, .events = POLLIN};
	struct timespec start, now;
	struct rusage usage;
	bool found = false;

	if (!lane->may_linger || reader->skip > 0) {
		reader->skip -= reader->skip > 0;
		return;
	}
	if (atomic_flag_test_and_set(&lane->lingering))
		return;
	clock_gettime(CLOCK_MONOTONIC, &start);
	do {
		found = poll(&request, 1, 0) != 0;
		clock_gettime(CLOCK_MONOTONIC, &now);
	} while (!found && (now.tv_sec - start.tv_sec) * 1000000000L + now.tv_nsec - start.tv_nsec < LINGER_NS);
	atomic_flag_clear(&lane->lingering);
	getrusage(RUSAGE_THREAD, &usage);
	if (usage.ru_nivcsw != reader->preempted) {
		reader->preempted = usage.ru_nivcsw;
		reader->skip = LINGER_BUSY;
		return;
	}
	if (found)
		reader->misses = 0;
	else if (reader->misses < LINGER_MISSES)
		reader->misses++;
	reader->skip = found ? 0 : (1u << reader->misses) - 1;
}

static void *read_requests(void *arg)
{
	struct ovl_lane_reader *reader = arg;
	struct ovl_lane *lane = reader->lane;
	ovl_err_t reason = 0;

	own_umask();
	while (reader->leads || take_lead(reader)) {
		ssize_t n;

		if (atomic_load(&lane->stopping))
			break;
		n = OVL_LANE_READ(lane->dev_fd, reader->request, lane->buffer_bytes);
		if (n > 0) {
			dispatch(reader, (size_t)n);
			if (!reader->leads)
				follow(reader);
			else if (!lane->uring)
				linger(reader);
			continue;
		}
		if (n == 0)
			break;
		if (errno == EINTR || errno == EAGAIN || errno == ENOENT)
			continue;
		if (errno != ENODEV && errno != ECONNABORTED)
			reason = -errno;
		break;
	}
	if (reason)
		atomic_store(&lane->end_reason, reason);
	raise_event(lane->ended_fd);
	return NULL;
}

static void *write_notifications(void *arg)
{
	struct ovl_lane *lane = arg;

	pthread_mutex_lock(&lane->lock);
	for (;;) {
		struct ovl_lane_request *note;
		struct iovec part;

		while (!lane->note && !atomic_load(&lane->stopping))
			pthread_cond_wait(&lane->noted, &lane->lock);
		if (atomic_load(&lane->stopping))
			break;
		note = lane->note;
		lane->note = note->next;
		if (!lane->note)
			lane->last_note = &lane->note;
		pthread_mutex_unlock(&lane->lock);
		part = (struct iovec){.iov_base = note->message, .iov_len = note->size};
		put(lane, &part, 1); /* ENOENT: the kernel does not have what we tell it to drop */
		count(&lane->notifications);
		free(note);
		pthread_mutex_lock(&lane->lock);
	}
	pthread_mutex_unlock(&lane->lock);
	return NULL;
}

static void notify(struct ovl_lane *lane, const unsigned char *message, size_t size)
{
	struct ovl_lane_request *note = malloc(sizeof(*note) + size);

	if (!note) {
		count(&lane->dropped);
		return;
	}
	note->next = NULL;
	note->size = size;
	memcpy(note->message, message, size);
	pthread_mutex_lock(&lane->lock);
	if (!lane->notifier_runs)
		lane->notifier_runs = start_thread(&lane->notifier, write_notifications, lane, "ovl-notify", 0) == 0;
	*lane->last_note = note;
	lane->last_note = &note->next;
	pthread_cond_signal(&lane->noted);
	pthread_mutex_unlock(&lane->lock);
}

ovl_err_t ovl_lane_store(struct ovl_lane_reader *reader, uint64_t nodeid, const void *bytes, size_t size)
{
	struct {
		struct fuse_out_header header;
		struct fuse_notify_store_out store;
	} head = {
		.header = {.len = (uint32_t)(sizeof(head) + size), .error = FUSE_NOTIFY_STORE},
		.store = {.nodeid = nodeid, .size = (uint32_t)size},
	};
	struct iovec parts[2] = {
		{.iov_base = &head, .iov_len = sizeof(head)},
		{.iov_base = (void *)(uintptr_t)bytes, .iov_len = size}, /* writev does not write to it */
	};

	static_assert(sizeof(head) == 40, "wire format");
	count(&reader->lane->notifications);
	return put(reader->lane, parts, 2);
}

/* An invalidation of attributes only: it takes no lock that a client could hold, so it need not leave the order in which
 * the replies come; a reply that was sent after it must not overtake it. */
static bool is_attr_only(const unsigned char *message, size_t size)
{
	struct fuse_out_header header;
	struct fuse_notify_inval_inode_out out;

	if (size != sizeof(header) + sizeof(out))
		return false;
	memcpy(&header, message, sizeof(header));
	memcpy(&out, message + sizeof(header), sizeof(out));
	return header.error == FUSE_NOTIFY_INVAL_INODE && out.off < 0;
}

/* ---- io_uring: uring.h ------------------------------------------------------------------------------------------- */

static void answer_uring(void *arg, const struct ovl_uring_request *request)
{
	struct ovl_lane_reader reader = {
		.lane = arg,
		.request = request->message,
		.answer = request->answer,
		.room = request->room,
	};

	dispatch(&reader, request->size);
}

/* Nothing comes by it any more, and not by /dev/fuse either. */
static void fail_uring(void *arg, ovl_err_t err)
{
	struct ovl_lane *lane = arg;

	atomic_store(&lane->end_reason, err);
	raise_event(lane->ended_fd);
}

/* Before INIT is answered: all that can fail by itself.  True: the kernel is to be told. */
static bool open_uring(struct ovl_lane *lane, uint64_t offered, size_t payload_bytes)
{
	struct ovl_uring_config config = {
		.dev_fd = lane->dev_fd,
		.payload_bytes = payload_bytes > lane->max_write ? payload_bytes : lane->max_write,
		.answer_bytes = OVL_LANE_MESSAGE_MAX,
		.wake_signal = WAKE_SIGNAL,
		.begin = own_umask,
		.request = answer_uring,
		.failed = fail_uring,
		.arg = lane,
	};
	struct ovl_uring *made;
	ovl_err_t err = offered & FUSE_INIT_EXT && offered & OVL_URING_INIT_FLAG ? 0 : -EOPNOTSUPP;

	if (config.payload_bytes < 2 * HEADER_BYTES)
		config.payload_bytes = 2 * HEADER_BYTES; /* FUSE_MIN_READ_BUFFER */
	if (!err)
		err = ovl_uring_new(&made, &config);
	if (!err)
		atomic_store(&lane->uring, made);
	pthread_mutex_lock(&lane->lock);
	lane->uring_state = err ? err : URING_OPEN;
	pthread_mutex_unlock(&lane->lock);
	return !err;
}

/* INIT is answered: the kernel waits until every queue has its entries, or goes on with /dev/fuse if it refuses one
 * itself.  It does not see what others refuse (an LSM, say): then it would wait for ever. */
static void decide_uring(struct ovl_lane *lane)
{
	struct ovl_uring *uring = atomic_load(&lane->uring);
	ovl_err_t err = uring ? ovl_uring_go(uring) : 0;

	if (err) {
		atomic_store(&lane->uring, NULL);
		ovl_uring_free(uring);
		if (err != -EINVAL && err != -ENOMEM)
			fail_uring(lane, err);
	}
	pthread_mutex_lock(&lane->lock);
	if (lane->uring_state == URING_OPEN)
		lane->uring_state = err;
	pthread_cond_broadcast(&lane->decided);
	pthread_mutex_unlock(&lane->lock);
}

ovl_err_t ovl_lane_uring(struct ovl_lane *lane)
{
	ovl_err_t err;

	pthread_mutex_lock(&lane->lock);
	while (lane->uring_state == URING_OPEN && !atomic_load(&lane->stopping))
		pthread_cond_wait(&lane->decided, &lane->lock);
	err = lane->uring_state == URING_OPEN ? -ESHUTDOWN : lane->uring_state;
	pthread_mutex_unlock(&lane->lock);
	return err;
}

static void pass_reply(struct ovl_lane *lane, unsigned char *message, size_t size)
{
	struct fuse_out_header header;
	struct iovec part = {.iov_base = message, .iov_len = size};
	struct ovl_lane_pending request;
	bool is_init = false;
	int error = 0;

	if (size < sizeof(header)) {
		count(&lane->dropped);
		return;
	}
	memcpy(&header, message, sizeof(header));
	if (size > lane->buffer_bytes || header.len != size) {
		count(&lane->dropped);
		if (header.unique)
			put_error(lane, header.unique, EIO);
		return;
	}
	if (header.unique == 0) {
		await_order(lane);
		if (is_attr_only(message, size)) {
			put(lane, &part, 1); /* ENOENT: the kernel does not have it */
			count(&lane->notifications);
		} else {
			notify(lane, message, size);
		}
		return;
	}
	if (header.unique == atomic_load(&lane->init_unique)) {
		patch_init(lane, message, size);
		atomic_store(&lane->init_unique, 0);
		is_init = true;
	}
	request = take_request(lane, header.unique);
	if (request.opcode && !header.error && lane->native.patch)
		error = lane->native.patch(lane->native.arg, &request, message + sizeof(header), size - sizeof(header));
	await_order(lane);
	if (error)
		put_error(lane, header.unique, error);
	else
		put_reply(lane, header.unique, &part, 1);
	if (is_init)
		decide_uring(lane);
}

static void *write_replies(void *arg)
{
	struct ovl_lane *lane = arg;

	while (wait_readable(lane, lane->session_fd)) {
		ssize_t n = recv(lane->session_fd, lane->reply, lane->buffer_bytes, MSG_TRUNC);

		if (n > 0)
			pass_reply(lane, lane->reply, (size_t)n);
		else if (n == 0 || (errno != EINTR && errno != EAGAIN && errno != ENOBUFS))
			break;
	}
	return NULL;
}

/* ---- life and death ---------------------------------------------------------------------------------------------- */

static void close_fd(int *fd)
{
	if (*fd >= 0)
		close(*fd);
	*fd = -1;
}

static void free_list(struct ovl_lane_request *list)
{
	while (list) {
		struct ovl_lane_request *next = list->next;

		free(list);
		list = next;
	}
}

/* Room for many small messages; the largest must fit (one message: sk_sndbuf - 32 bytes). */
static ovl_err_t size_socket(int fd)
{
	int wanted = SOCKET_BYTES, got = 0;
	socklen_t length = sizeof(got);

	if (setsockopt(fd, SOL_SOCKET, SO_SNDBUFFORCE, &wanted, sizeof(wanted)) < 0)
		setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &wanted, sizeof(wanted));
	if (getsockopt(fd, SOL_SOCKET, SO_SNDBUF, &got, &length) < 0)
		return -errno;
	return (size_t)got < OVL_LANE_MESSAGE_MAX + 32 ? -EMSGSIZE : 0;
}

static void destroy(struct ovl_lane *lane)
{
	ovl_uring_free(lane->uring);
	close_fd(&lane->dev_fd);
	close_fd(&lane->session_fd);
	close_fd(&lane->stop_fd);
	close_fd(&lane->ended_fd);
	close_fd(&lane->extra_fd);
	free_list(lane->first);
	free_list(lane->note);
	for (size_t i = 0; i < lane->reader_count; i++) {
		free(lane->readers[i].request);
		free(lane->readers[i].answer);
	}
	free(lane->reply);
	free(lane->pending);
	pthread_cond_destroy(&lane->room);
	pthread_cond_destroy(&lane->noted);
	pthread_cond_destroy(&lane->lead);
	pthread_cond_destroy(&lane->decided);
	pthread_mutex_destroy(&lane->lock);
	free(lane);
}

/* On how many CPUs may this process run? */
static size_t usable_cpus(void)
{
	long online = sysconf(_SC_NPROCESSORS_ONLN);
	cpu_set_t cpus;

	if (sched_getaffinity(0, sizeof(cpus), &cpus) == 0)
		return (size_t)CPU_COUNT(&cpus);
	return online > 0 ? (size_t)online : 1; /* EINVAL: more than cpu_set_t holds */
}

/* With one CPU one; else two at least: one can look for the next request (linger) while the other answers. */
static size_t most_leaders(size_t cpus)
{
	size_t half = cpus / 2;

	return cpus <= 1 ? 1 : half < 2 ? 2 : half < LEADERS_MAX ? half : LEADERS_MAX;
}

ovl_err_t ovl_lane_new(struct ovl_lane **out, const struct ovl_lane_config *config)
{
	size_t page = (size_t)sysconf(_SC_PAGESIZE);
	size_t cpus = usable_cpus();
	struct ovl_lane *lane = calloc(1, sizeof(*lane));
	ovl_err_t err;
	int flags;

	if (!lane) {
		if (config->dev_fd >= 0)
			close(config->dev_fd);
		if (config->session_fd >= 0)
			close(config->session_fd);
		return -ENOMEM;
	}
	lane->dev_fd = config->dev_fd;
	lane->session_fd = config->session_fd;
	lane->stop_fd = lane->ended_fd = lane->extra_fd = -1;
	lane->max_write = config->max_write;
	lane->buffer_bytes = config->max_write + HEADER_BYTES;
	lane->queue_bytes_max = config->queue_bytes;
	lane->queue_count_max = config->queue_count;
	lane->last = &lane->first;
	lane->last_note = &lane->note;
	lane->native = config->native;
	lane->trace = config->trace;
	pthread_mutex_init(&lane->lock, NULL);
	pthread_cond_init(&lane->room, NULL);
	pthread_cond_init(&lane->noted, NULL);
	pthread_cond_init(&lane->lead, NULL);
	pthread_cond_init(&lane->decided, NULL);
	lane->may_linger = cpus > 1;
	atomic_flag_clear(&lane->lingering);
	lane->wants_uring = config->io_uring;
	lane->uring_state = config->io_uring ? URING_OPEN : -EOPNOTSUPP;
	lane->leaders_max = most_leaders(cpus);

	err = -EINVAL;
	if (lane->dev_fd < 0 || lane->session_fd < 0 || lane->max_write % page || lane->max_write < page ||
	    lane->max_write > 4u << 20 || config->queue_bytes == 0 || config->queue_count == 0)
		goto out;
	if (lane->buffer_bytes < OVL_LANE_MESSAGE_MAX)
		lane->buffer_bytes = OVL_LANE_MESSAGE_MAX;
	err = size_socket(lane->session_fd);
	if (err)
		goto out;
	err = -ENOMEM;
	lane->reply = malloc(lane->buffer_bytes);
	if (!lane->reply)
		goto out;
	flags = fcntl(lane->dev_fd, F_GETFL);
	if (flags < 0 || fcntl(lane->dev_fd, F_SETFL, flags & ~O_NONBLOCK) < 0) {
		err = -errno;
		goto out;
	}
	lane->stop_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	lane->ended_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	lane->extra_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (lane->stop_fd < 0 || lane->ended_fd < 0 || lane->extra_fd < 0) {
		err = -errno;
		goto out;
	}
	*out = lane;
	return 0;
out:
	destroy(lane);
	return err;
}

static void woken(int number)
{
	(void)number; /* read(2) says EINTR */
}

ovl_err_t ovl_lane_start(struct ovl_lane *lane)
{
	struct sigaction wake = {.sa_handler = woken};
	ovl_err_t err;

	if (lane->started || lane->writer_runs || atomic_load(&lane->stopping))
		return -EALREADY;
	sigemptyset(&wake.sa_mask);
	if (sigaction(WAKE_SIGNAL, &wake, NULL) < 0)
		return -errno;
	err = start_thread(&lane->writer, write_replies, lane, "ovl-write", 0);
	if (err)
		return err;
	lane->writer_runs = true;
	pthread_mutex_lock(&lane->lock);
	for (size_t i = 0; !err && i < lane->leaders_max; i++)
		err = add_reader(lane); /* on failure the caller frees, which stops the others */
	pthread_mutex_unlock(&lane->lock);
	lane->started = true;
	return err;
}

/* A reader may be about to call read(2), so one signal is not enough. */
static void join_reader(pthread_t thread)
{
	struct timespec until;

	do {
		pthread_kill(thread, WAKE_SIGNAL);
		clock_gettime(CLOCK_REALTIME, &until);
		until.tv_nsec += WAKE_EVERY_NS;
		if (until.tv_nsec >= 1000000000L) {
			until.tv_nsec -= 1000000000L;
			until.tv_sec++;
		}
	} while (pthread_timedjoin_np(thread, NULL, &until) != 0);
}

void ovl_lane_stop(struct ovl_lane *lane)
{
	size_t readers;

	pthread_mutex_lock(&lane->lock);
	atomic_store(&lane->stopping, true);
	readers = lane->reader_count; /* there will be no more */
	pthread_cond_broadcast(&lane->room);
	pthread_cond_broadcast(&lane->noted);
	pthread_cond_broadcast(&lane->lead);
	pthread_cond_broadcast(&lane->decided);
	pthread_mutex_unlock(&lane->lock);
	raise_event(lane->stop_fd);
	shutdown(lane->session_fd, SHUT_RDWR); /* a reader that waits for room in it */
	for (size_t i = 0; lane->started && i < readers; i++)
		join_reader(lane->readers[i].thread);
	if (lane->writer_runs)
		pthread_join(lane->writer, NULL);
	ovl_uring_stop(lane->uring); /* after the writer, which starts it; it does not wait for the writer */
	lane->started = lane->writer_runs = false;
}

/* False: it waits in the kernel for a lock whose holder waits for a reply that it will not get.  It must not be
 * waited for then, nor may what it uses be freed; it ends with the process, or when the mount is aborted. */
static bool join_notifier(struct ovl_lane *lane)
{
	struct timespec until;

	if (!lane->notifier_runs)
		return true;
	clock_gettime(CLOCK_REALTIME, &until);
	until.tv_sec += STOP_SECONDS;
	if (pthread_timedjoin_np(lane->notifier, NULL, &until) != 0) {
		pthread_detach(lane->notifier);
		return false;
	}
	return true;
}

void ovl_lane_free(struct ovl_lane *lane)
{
	if (!lane)
		return;
	ovl_lane_stop(lane);
	if (join_notifier(lane))
		destroy(lane);
}

int ovl_lane_ended_fd(const struct ovl_lane *lane)
{
	return lane->ended_fd;
}

int ovl_lane_extra_fd(const struct ovl_lane *lane)
{
	return lane->extra_fd;
}

ovl_err_t ovl_lane_end_reason(const struct ovl_lane *lane)
{
	return atomic_load(&lane->end_reason);
}

ovl_err_t ovl_lane_receive(struct ovl_lane *lane, struct ovl_lane_request **out)
{
	struct ovl_lane_request *request;

	pthread_mutex_lock(&lane->lock);
	request = lane->first;
	if (request) {
		lane->first = request->next;
		lane->queue_count--;
		lane->queue_bytes -= request->size;
		if (!lane->first) {
			lane->last = &lane->first;
			clear_event(lane->extra_fd);
		}
		pthread_cond_signal(&lane->room);
	}
	pthread_mutex_unlock(&lane->lock);
	if (!request)
		return -EAGAIN;
	request->next = NULL;
	*out = request;
	return 0;
}

ovl_err_t ovl_lane_reply(struct ovl_lane *lane, uint64_t unique, int error, const void *data, size_t size)
{
	struct fuse_out_header header = {.error = -error, .unique = unique};
	struct iovec parts[2] = {
		{.iov_base = &header, .iov_len = sizeof(header)},
		{.iov_base = (void *)(uintptr_t)data, .iov_len = size}, /* writev does not write to it */
	};
	struct ovl_lane_pending request;
	unsigned char small[256]; /* the largest reply that is patched is that to CREATE */

	if (error < 0 || error >= 512 || (error && size) || size > lane->buffer_bytes || unique == 0)
		return -EINVAL;
	request = take_request(lane, unique);
	if (request.opcode && !error && size <= sizeof(small) && lane->native.patch) {
		if (size > 0)
			memcpy(small, data, size);
		error = lane->native.patch(lane->native.arg, &request, small, size);
		if (error)
			size = 0;
		header.error = -error;
		parts[1] = (struct iovec){.iov_base = small, .iov_len = size};
	}
	header.len = (uint32_t)(sizeof(header) + size);
	await_order(lane);
	put_reply(lane, unique, parts, size ? 2 : 1);
	return 0;
}

void ovl_lane_stats(const struct ovl_lane *lane, struct ovl_lane_stats *out)
{
	for (size_t i = 0; i < OVL_LANE_OPCODES; i++)
		out->opcode[i] = (struct ovl_lane_counts){
			.forwarded = value(&lane->counters[i].forwarded),
			.extra = value(&lane->counters[i].extra),
			.answered = value(&lane->counters[i].answered),
		};
	out->replies = value(&lane->replies);
	out->interrupted = value(&lane->interrupted);
	out->refused = value(&lane->refused);
	out->undeliverable = value(&lane->undeliverable);
	out->notifications = value(&lane->notifications);
	out->dropped = value(&lane->dropped);
}
