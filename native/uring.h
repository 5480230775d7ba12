/*
 * uring.h - requests by io_uring instead of read(2) and write(2) of /dev/fuse
 *
 * Problem.  A message over /dev/fuse wakes a reader on whatever CPU the scheduler likes, mostly another one than the
 * client's, and that wake-up is most of what a message costs.  Since Linux 6.14 a FUSE server can register entries, each
 * bound to a queue, and there is a queue for each CPU: a request is put into an entry of the CPU that its client runs on,
 * and the thread that registered the entry, bound to this CPU, wakes up beside the client.  One system call gives the
 * answer back and asks for the next request.
 *
 *     client on CPU 0 ---> queue 0:  thread + ring + entry      (as many as may wait at the same time)
 *                                    thread + ring + entry
 *                                    ...
 *     client on CPU 1 ---> queue 1:  thread + ring + entry
 *     ...
 *     INIT, FORGET, INTERRUPT, notifications ------------> /dev/fuse, as ever (lane.c)
 *
 * A thread, a ring and an entry are one.  The kernel copies a request in the context of the thread that armed the entry,
 * so an entry of a thread that waits for the disk would swallow a request.  A thread with one entry has none armed while
 * it works: nothing can be stuck behind it.  The kernel takes the entry that was armed last (a stack), so as long as
 * nothing waits one thread of a queue does it all, with its caches warm.
 *
 * Why all threads are there from the start.  A request that finds no armed entry is queued, and the kernel gives it to
 * the next entry that commits, never to one that is newly registered.  So a thread that is started when the others are
 * busy comes too late for what has queued up behind a copy-up.  A thread that never gets anything costs a stack.
 *
 * An entry's memory is one mapping, registered once, and in it a request is whole without being copied:
 *
 *     | struct ovl_uring_header |   free   | fuse_in_header | operation's header | payload .........  | room for answers |
 *     ^ page 0                             ^ message                             ^ page 1
 *                                          `--- put there, from the header ---'
 *
 * What a WRITE brings is written to the file from where the kernel put it.  An answer to a request without payload (READ,
 * READDIR) is made where the kernel fetches it; others are made apart and copied, because their handlers still read the
 * request.
 *
 * An entry's life:
 *
 *     IDLE ---- the kernel completes the command ----> OUT ---- reply by its own thread ------------------.
 *      ^                                                |                                                  |
 *      |                                                `------ reply by another (Python's) --> FILLED     |
 *      `--------------------- commit: the answer is the kernel's, the entry armed again <---------'--------'
 *
 * The thread commits what others have filled in, because who commits is who gets the next request; they wait until it
 * has.  So ovl_uring_reply is like write(2): when it returns the kernel has the answer (gate.h depends on it).  Whoever
 * hands a request on must not look at the message after.
 *
 * Which entry is a reply for?  The number of the entry is in the upper 16 bits of `unique` in the message, from where it
 * comes back with the reply; the kernel counts requests by 2 and would need decades to get there.
 *
 * Sizes.  The kernel says how many bytes of a request are payload; header.len says how many there are in all.  What is
 * between them must be 0 to 128 bytes: the header of the operation.  All else is refused by ovl_uring_flatten.
 *
 * Ends.  Unmounted, aborted: the kernel completes with ENOTCONN, and the thread ends.  Stop: a signal ends the wait, a
 * flag the thread.  Process death: the kernel cancels what is armed and closes the device.  Any other error is told by
 * `failed`; the mount cannot go on then.  If an entry cannot be registered the kernel goes on with /dev/fuse by itself.
 *
 * Concurrency: new, go, stop and free from one thread at a time; reply from any.
 * Locks: an entry's, and the ring's; never both, and neither while a handler runs.
 * Kernel: fs/fuse/dev_uring.c; include/uapi/linux/fuse.h (7.42); io_uring_enter(2).
 */
#ifndef OVL_URING_H
#define OVL_URING_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

#define OVL_URING_INIT_FLAG (1ull << 41) /* FUSE_OVER_IO_URING; newer than the headers of some distributions */
#define OVL_URING_DEPTH_MIN 4u           /* threads of a queue: requests of one CPU that can wait at the same time */
#define OVL_URING_DEPTH_MAX 16u
#define OVL_URING_THREADS 128u           /* in all; on large machines as many as DEPTH_MIN asks for */
#define OVL_URING_QUEUES_MAX 4096u
#define OVL_URING_TAG_SHIFT 48
#define OVL_URING_OP_BYTES 128u

/* struct fuse_uring_req_header */
struct ovl_uring_header {
	unsigned char in_out[128];                /* struct fuse_in_header; struct fuse_out_header */
	unsigned char op_in[OVL_URING_OP_BYTES];  /* the first argument of the request */
	uint64_t flags, commit_id;                /* struct fuse_uring_ent_in_out */
	uint32_t payload_bytes, padding;
	uint64_t reserved;
};

struct ovl_uring;

struct ovl_uring_request {
	unsigned char *message; /* whole, with its header; the unique is tagged */
	size_t size;
	unsigned char *answer;  /* where a reply can be made */
	size_t room;
};

struct ovl_uring_config {
	int dev_fd;            /* borrowed; mounted */
	size_t payload_bytes;  /* at least what INIT's reply says of max_write and max_pages */
	size_t answer_bytes;   /* of the largest answer to a request with payload */
	int wake_signal;       /* with a handler that does nothing; without SA_RESTART */
	void (*begin)(void);   /* at the start of each thread; NULL: nothing */
	void (*request)(void *arg, const struct ovl_uring_request *request); /* to be replied to, now or later, by anybody */
	void (*failed)(void *arg, int err);                                  /* -errno: no request will come this way any more */
	void *arg;
};

/* Is a reply with this unique one for ovl_uring_reply? */
static inline bool ovl_uring_owns(uint64_t unique)
{
	return unique >> OVL_URING_TAG_SHIFT != 0;
}

/* Queues, threads and rings: all that can fail without the kernel noticing.  To be called before INIT is answered. */
int ovl_uring_new(struct ovl_uring **out, const struct ovl_uring_config *config);

/* After INIT's reply: register.  -errno: a queue has no entry, and no requests will come. */
int ovl_uring_go(struct ovl_uring *uring);

/* As writev(2) to /dev/fuse.  -EINVAL: it does not fit; -ENOENT: it is not known; -ENODEV: nobody is there any more. */
int ovl_uring_reply(struct ovl_uring *uring, uint64_t unique, const struct iovec *parts, int number);

/* End the threads and wait for them.  NULL is fine; so is a second call. */
void ovl_uring_stop(struct ovl_uring *uring);
void ovl_uring_free(struct ovl_uring *uring);

/* A request in one piece: `payload` is at least sizeof(struct fuse_in_header) + OVL_URING_OP_BYTES behind the start of
 * its memory.  NULL: sizes that contradict each other. */
unsigned char *ovl_uring_flatten(const struct ovl_uring_header *header, unsigned char *payload, size_t payload_room,
				 size_t *size);

/* How many CPUs `text` lists ("0-3,8"), as the kernel counts them; 0: it cannot be read. */
size_t ovl_uring_count_cpus(const char *text);

#endif
