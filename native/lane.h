/*
 * lane.h - the request lane: between /dev/fuse and those who answer
 *
 * Problem.  pyfuse3 owns a session, not the device: it binds a part of the protocol (no fallocate, lseek,
 * copy_file_range, tmpfile), and what it answers to INIT cannot be changed.  So the lane owns /dev/fuse.  It reads
 * every request once and gives it to one of three, or has it answered at once (struct ovl_lane_native):
 *
 *        clients                                                           pyfuse3 (trio thread)
 *           |                                                                 ^          |
 *     +-----v------+   reader threads   +----- FORWARD: socket, blocking -----+          |
 *     | /dev/fuse  |====================+----- EXTRA: queue, bounded ---> ovlfs.fuse.lane (trio thread)
 *     |            |                    +----- ANSWERED: here              |             |
 *     +-----^------+                                                       |             |
 *           +----------------------- ovl_lane_reply -----------------------+             |
 *           +----------------------- writer thread <--- socket, always drained ----------+
 *           +----------------------- notifier thread <-- list, unbounded: notifications that can wait (unique 0)
 *
 * Routes are a table by opcode (lane.c: handlers[]): a handler looks at the request and says FORWARD, EXTRA or
 * ANSWERED; an opcode without one is forwarded.  To answer an opcode natively is to write a handler.
 *
 * Why READ and WRITE are EXTRA.  A message of a SEQPACKET socket is one skb: it must fit SO_SNDBUF, and what
 * exceeds about 84 KiB is one piece of contiguous memory.  1 MiB is an allocation of order 8 that fails with
 * ENOBUFS on a machine that is up for a week, and libfuse loses a reply that it cannot send: the client hangs for
 * ever.  So nothing large goes through the socket: data goes through the queue and leaves by ovl_lane_reply,
 * listings are asked for in pieces of OVL_LANE_LIST_MAX, a BATCH_FORGET is cut.  The largest message that is left
 * is an xattr (64 KiB); ovl_lane_new checks that it fits.
 *
 * Who waits for whom (no cycle, so no deadlock):
 *
 *      client  ->  reader    the reader waits while the socket or the queue is full
 *      reader  ->  Python    Python empties both from one event loop and waits for neither's requests
 *      Python  ->  writer    libfuse's reply blocks while the socket back is full
 *      writer  ->  kernel    a reply is copied, which waits for nobody: the writer never waits for Python
 *      notifier -> client    NOTIFY_INVAL_* waits for inode and page locks, which clients hold while they wait for
 *                            replies.  That is why notifications have a thread of their own, and why no reply is
 *                            ever written by it.
 *
 * What is under way is bounded by the socket (SO_SNDBUF each way), the queue (bytes and requests, one request at
 * least) and, on Python's side, by pyfuse3's workers and the handlers of ovlfs.fuse.lane.
 *
 * Order, and who may change the mount when: gate.h.  Python's replies wait for native answers that were looked up before.
 * What Python has in its hands is known by unique (`pending`).
 *
 * Every request gets one reply.  A reply that the kernel refuses (EINVAL, ENOMEM, ...) is replaced by EIO; a request
 * that the socket refuses is answered here; FORGET, BATCH_FORGET have none; INTERRUPT is answered ENOSYS once, after
 * which the kernel sends no more (pyfuse3 would only remember them).
 *
 * Ends.  The mount went away or was aborted: read says ENODEV, the reader stops and `ended_fd` becomes readable; the
 * writer goes on emptying the socket, so that nobody blocks in a reply, until it is closed or ovl_lane_stop.
 * Process death: the kernel closes the device, which aborts the connection; nothing here keeps it open.
 * ENOENT from read or write: the request was interrupted; the other side needs no answer.
 *
 * Threads.  A reader that leads reads a request, answers it, and reads the next, with no other thread to be
 * woken in between.  Before it does what may wait (for the disk, for room in the socket), it gives the lead to another
 * (ovl_lane_yield), which is started if there is none; then it follows.  So one that waits stops nobody else.  With one CPU
 * one leads, with more two, or half as many; README.md has what that gains, and that cloned descriptors gain nothing.
 *
 * With io_uring most requests come to the threads of uring.h instead, which dispatch them as a reader does; what is asked
 * for there is answered there (`put_for`).  /dev/fuse keeps its reader for the rest.
 *
 * Concurrency: new, start, stop and free from one thread; receive from one thread; reply, stats from any.
 * Errors: 0 or -errno, errno is not set.
 */
#ifndef OVL_LANE_H
#define OVL_LANE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef int ovl_err_t;

#define OVL_LANE_OPCODES 64u          /* counters and handlers; the highest opcode today is 53 */
#define OVL_LANE_LIST_MAX 65536u      /* bytes asked for in one READDIR or READDIRPLUS */
#define OVL_LANE_READERS 16u
#define OVL_LANE_MESSAGE_MAX 73728u   /* bytes of the largest message through the socket: an xattr, names, headers */

struct ovl_lane;
struct ovl_lane_trace; /* lane_trace.h */

enum ovl_lane_verdict {
	OVL_LANE_PASS,     /* on, as if there were no native part; the message can have become shorter */
	OVL_LANE_ANSWERED, /* `answer` is the reply */
	OVL_LANE_SILENT,   /* done, and the request has no reply */
};

struct ovl_lane_answer {
	int error;  /* a positive errno, or 0 */
	size_t size; /* of the body */
	size_t room; /* at least 4 KiB */
	unsigned char *body;
	bool looking; /* the gate's ovl_gate_looked is to be called when it is written */
	bool changed; /* the gate's barrier is to be passed before it is written */
	struct ovl_lane_reader *reader; /* for ovl_lane_yield; NULL: nobody else reads */
};

/* A request that is with Python. */
struct ovl_lane_pending {
	uint64_t unique, nodeid;
	uint32_t opcode;
	uint32_t flags; /* of an OPEN, CREATE, TMPFILE */
	bool kill;      /* of an OPEN: FUSE_OPEN_KILL_SUIDGID */
};

struct ovl_gate;

/* Who answers without Python; borrowed, and all of it optional. */
struct ovl_lane_native {
	/* `message` is a whole request with its header, and may be changed (its size stays).  A reader's thread; must not
	 * wait for Python, nor for a client. */
	enum ovl_lane_verdict (*answer)(void *arg, unsigned char *message, size_t size, struct ovl_lane_answer *answer);
	/* A reply of Python without an error, before the kernel sees it; a positive errno takes its place.  Any thread;
	 * as above. */
	int (*patch)(void *arg, const struct ovl_lane_pending *request, unsigned char *body, size_t size);
	/* What the kernel offered in INIT, and what it was told. */
	void (*agree)(void *arg, uint64_t offered, uint64_t agreed);
	struct ovl_gate *gate;
	uint64_t init_flags; /* told in INIT, too, if they are offered */
	void *arg;
};

/* Newer than the headers of some distributions: include/uapi/linux/fuse.h. */
#define OVL_LANE_INIT_PASSTHROUGH (1ull << 37)
#define OP_SYNCFS 50u
#define OP_TMPFILE 51u
#define OP_STATX 52u
#define OP_COPY_FILE_RANGE_64 53u

struct ovl_lane_config {
	int dev_fd;           /* /dev/fuse, mounted */
	int session_fd;       /* our end of the SEQPACKET socket pair; the other is pyfuse3's */
	size_t max_write;     /* bytes of data in one READ or WRITE: a multiple of the page size, 4 KiB to 4 MiB */
	size_t queue_bytes;   /* the reader waits when the queue holds so much */
	size_t queue_count;   /* or so many requests */
	bool io_uring;        /* requests by io_uring, if the kernel offers it: uring.h */
	struct ovl_lane_native native; /* .answer NULL: nothing is answered natively */
	struct ovl_lane_trace *trace;  /* borrowed; told of native answers; may be NULL */
};

/* One EXTRA request.  `message` starts with struct fuse_in_header, whose len is `size`. */
struct ovl_lane_request {
	struct ovl_lane_request *next;
	size_t size;
	unsigned char message[];
};

struct ovl_lane_counts {
	uint64_t forwarded, extra, answered;
};

struct ovl_lane_stats {
	struct ovl_lane_counts opcode[OVL_LANE_OPCODES]; /* [0]: opcodes beyond the table */
	uint64_t replies;       /* written to the kernel, from everywhere */
	uint64_t interrupted;   /* replies that nobody waited for any more */
	uint64_t refused;       /* replies that the kernel refused, answered EIO instead */
	uint64_t undeliverable; /* requests that could not be handed on, answered here */
	uint64_t notifications; /* passed on */
	uint64_t dropped;       /* messages that were neither: malformed, or without memory */
};

/* Takes ownership of both descriptors, also on failure.  -EMSGSIZE: the socket cannot hold OVL_LANE_MESSAGE_MAX
 * (net.core.wmem_max); -EINVAL: limits that make no sense. */
ovl_err_t ovl_lane_new(struct ovl_lane **out, const struct ovl_lane_config *config);

/* Start the threads.  Once. */
ovl_err_t ovl_lane_start(struct ovl_lane *lane);

/* End the threads and wait for them; pyfuse3's next read or write on its socket fails.  Requests that have no reply
 * yet get none until ovl_lane_free closes the device.  May be called twice, and from any state. */
void ovl_lane_stop(struct ovl_lane *lane);

/* Stop, close the descriptors, free everything.  NULL is fine. */
void ovl_lane_free(struct ovl_lane *lane);

/* Borrowed descriptors, to poll for reading. */
int ovl_lane_ended_fd(const struct ovl_lane *lane); /* readable: no request will come any more */
int ovl_lane_extra_fd(const struct ovl_lane *lane); /* readable: ovl_lane_receive has something */

/* Why the reader ended: 0 unmounted or stopped, else -errno.  Meaningful once ended_fd is readable. */
ovl_err_t ovl_lane_end_reason(const struct ovl_lane *lane);

/* The next EXTRA request, owned by the caller (free()); -EAGAIN: none. */
ovl_err_t ovl_lane_receive(struct ovl_lane *lane, struct ovl_lane_request **out);

/* Answer an EXTRA request: `error` is 0 or a positive errno, then without data.  -EINVAL: not such an errno. */
ovl_err_t ovl_lane_reply(struct ovl_lane *lane, uint64_t unique, int error, const void *data, size_t size);

/* By a handler, before what may wait: somebody else reads the next request.  NULL is fine; so is a second call. */
void ovl_lane_yield(struct ovl_lane_reader *reader);

/* Gives the kernel's page cache the first `size` bytes of a file (FUSE_NOTIFY_STORE).  Waits for whoever reads from the file
 * at that moment.  Any thread of a handler. */
ovl_err_t ovl_lane_store(struct ovl_lane_reader *reader, uint64_t nodeid, const void *bytes, size_t size);

void ovl_lane_stats(const struct ovl_lane *lane, struct ovl_lane_stats *out);

/* Do requests come by io_uring?  0, or -errno: why not; -EOPNOTSUPP: the kernel did not offer it.  Waits until INIT is
 * answered.  Any thread. */
ovl_err_t ovl_lane_uring(struct ovl_lane *lane);

#endif
