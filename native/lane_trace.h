/*
 * lane_trace.h - how long do native answers take, and which ones were just given?
 *
 * Two things for those who look at a mount (`ovlfs stats`, `ovlfs trace`), told by the code that answers:
 *
 *   - always: a histogram of latencies by opcode.  Buckets are logarithmic, four to a power of two, so that a percentile
 *     is right to an eighth; counting is an atomic add.  And how often each decision was made.
 *   - while somebody looks (between start and stop): a ring of records, one for each native answer, each directory that
 *     was merged, and each decision that was carried out natively.
 *
 *      lane threads --- record ---> [ | | | ] --- drain ---> Python, a few times a second
 *                                   bounded: when it is full, what comes is dropped, and counted
 *
 * When nobody looks a record costs one relaxed load.  Names are copied from requests that are not believed: every offset
 * and length is checked, and a request without a name that can be had is recorded without.
 *
 * Concurrency: new and free from one thread, while no lane uses it; everything else from any.  One mutex, a leaf,
 * protects the ring; it is held for the copying of a record, never for I/O.
 * Errors: 0 or -errno, errno is not set.
 */
#ifndef OVL_LANE_TRACE_H
#define OVL_LANE_TRACE_H

#include "lane.h"

#define OVL_TRACE_NAME_MAX 255u
#define OVL_TRACE_BUCKETS 176u       /* the last is for all that took longer than about 8 hours */
#define OVL_TRACE_RECORDS_MAX 65536u /* of one ring: about 20 MiB */

struct ovl_lane_trace;

enum ovl_trace_kind {
	OVL_TRACE_ANSWER,
	OVL_TRACE_MERGE,
	/* Decisions that were carried out natively.  Those of Python are told by ovlfs/events.py. */
	OVL_TRACE_COPY_UP,
	OVL_TRACE_WHITEOUT,
	OVL_TRACE_OPAQUE,
	OVL_TRACE_RENAME,
	OVL_TRACE_KINDS,
};

struct ovl_trace_record {
	uint64_t at_ns;   /* when it was over, by CLOCK_MONOTONIC */
	uint64_t took_ns;
	uint64_t nodeid;  /* of the request's header; of the directory that was merged */
	/* a LOOKUP: the nodeid that was found, 0 for none; a BATCH_FORGET: how many inodes; a merge: the names; a copy-up:
	 * the bytes of data; a rename: the nodeid of the new directory */
	uint64_t number;
	uint32_t kind;
	uint32_t opcode;
	int32_t error;    /* a positive errno, or 0 */
	int32_t layer;    /* a LOOKUP: which layer serves what was found; -1: not known */
	bool by_starter;  /* by the thread that called start, which is Python's */
	uint32_t name_len; /* in bytes */
	/* of the request; a merge: the layers, as uint16_t; a rename: the old name, NUL, the new one; a copy-up: "directory",
	 * "metadata", or nothing: data */
	uint8_t name[OVL_TRACE_NAME_MAX + 1];
};

ovl_err_t ovl_lane_trace_new(struct ovl_lane_trace **out);
void ovl_lane_trace_free(struct ovl_lane_trace *trace); /* NULL is fine */

/* The time in ns; 0 without a trace. */
uint64_t ovl_lane_trace_began(const struct ovl_lane_trace *trace);

/* A native answer to `message` (a whole request with its header) was written, or needed none.  NULL is fine. */
void ovl_lane_trace_answer(struct ovl_lane_trace *trace, const unsigned char *message, size_t size,
			   const struct ovl_lane_answer *answer, uint64_t began_ns);

/* A decision was carried out; `name` (may be NULL) is in the directory `nodeid`.  `began_ns` 0: it is not measured.  A
 * NULL trace is fine. */
void ovl_lane_trace_told(struct ovl_lane_trace *trace, enum ovl_trace_kind kind, uint64_t nodeid, const void *name,
			 size_t len, uint64_t number, uint64_t began_ns);
/* How often each kind was told; `*copied`: how much data was copied up. */
void ovl_lane_trace_counts(const struct ovl_lane_trace *trace, uint64_t out[OVL_TRACE_KINDS], uint64_t *copied);

/* A directory was merged from these layers, and has so many names (an ovl_tree_told).  NULL is fine. */
void ovl_lane_trace_merge(void *trace, uint64_t nodeid, size_t names, const uint16_t *layers, size_t count,
			  uint64_t began_ns);

/* Whom to ask which layer serves an inode; before any lane uses the trace, which must not outlive `arg`. */
void ovl_lane_trace_ask(struct ovl_lane_trace *trace, int (*layer_of)(void *arg, uint64_t nodeid), void *arg);

/* Begin to record; -EALREADY: somebody records; -EINVAL: no such capacity; -ENOMEM. */
ovl_err_t ovl_lane_trace_start(struct ovl_lane_trace *trace, size_t capacity);
/* Stop, and forget what was not drained. */
void ovl_lane_trace_stop(struct ovl_lane_trace *trace);
/* Up to `most` records, oldest first; `*dropped`: how many were lost since the last time. */
size_t ovl_lane_trace_drain(struct ovl_lane_trace *trace, struct ovl_trace_record *out, size_t most, uint64_t *dropped);

/* How many native answers to an opcode there were in each bucket. */
void ovl_lane_trace_latencies(const struct ovl_lane_trace *trace, uint32_t opcode, uint64_t out[OVL_TRACE_BUCKETS]);
/* The bucket of a duration, and the shortest duration that is in a bucket. */
unsigned ovl_trace_bucket(uint64_t ns);
uint64_t ovl_trace_bucket_ns(unsigned bucket);

#endif
