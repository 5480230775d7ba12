/*
 * lane_trace.c - see lane_trace.h
 *
 * References: include/uapi/linux/fuse.h for where the names are.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "lane_trace.h"

#include <assert.h>
#include <errno.h>
#include <linux/fuse.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define OP_TMPFILE 51u
#define STEPS 4u /* buckets to a power of two */

struct ovl_lane_trace {
	atomic_uint_fast64_t latencies[OVL_LANE_OPCODES][OVL_TRACE_BUCKETS];
	atomic_uint_fast64_t told[OVL_TRACE_KINDS], copied;
	atomic_bool on; /* a hint: the ring says what is true */
	int (*layer_of)(void *arg, uint64_t nodeid); /* immutable while a lane runs; or NULL */
	void *layer_arg;

	pthread_mutex_t lock;          /* a leaf */
	struct ovl_trace_record *ring; /* protected by lock; NULL: nobody looks */
	size_t capacity, first, count; /* protected by lock */
	uint64_t dropped;              /* protected by lock; since the last drain */
	pthread_t starter;             /* protected by lock */
};

ovl_err_t ovl_lane_trace_new(struct ovl_lane_trace **out)
{
	struct ovl_lane_trace *trace = calloc(1, sizeof(*trace));

	if (!trace)
		return -ENOMEM;
	pthread_mutex_init(&trace->lock, NULL);
	*out = trace;
	return 0;
}

void ovl_lane_trace_free(struct ovl_lane_trace *trace)
{
	if (!trace)
		return;
	free(trace->ring);
	pthread_mutex_destroy(&trace->lock);
	free(trace);
}

uint64_t ovl_lane_trace_began(const struct ovl_lane_trace *trace)
{
	struct timespec now;

	if (!trace)
		return 0;
	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* ---- latencies --------------------------------------------------------------------------------------------------- */

unsigned ovl_trace_bucket(uint64_t ns)
{
	unsigned power, bucket;

	if (ns < STEPS)
		return (unsigned)ns;
	power = 63u - (unsigned)__builtin_clzll(ns); /* at least 2 */
	bucket = (power - 1u) * STEPS + (unsigned)(ns >> (power - 2u) & (STEPS - 1u));
	return bucket < OVL_TRACE_BUCKETS ? bucket : OVL_TRACE_BUCKETS - 1u;
}

uint64_t ovl_trace_bucket_ns(unsigned bucket)
{
	if (bucket >= OVL_TRACE_BUCKETS)
		bucket = OVL_TRACE_BUCKETS - 1u;
	if (bucket < STEPS)
		return bucket;
	return (uint64_t)(STEPS + bucket % STEPS) << (bucket / STEPS - 1u);
}

static_assert((OVL_TRACE_BUCKETS - 1u) / STEPS < 62u, "the shift above");

void ovl_lane_trace_latencies(const struct ovl_lane_trace *trace, uint32_t opcode, uint64_t out[OVL_TRACE_BUCKETS])
{
	for (size_t i = 0; i < OVL_TRACE_BUCKETS; i++)
		out[i] = opcode < OVL_LANE_OPCODES
				 ? atomic_load_explicit(&trace->latencies[opcode][i], memory_order_relaxed)
				 : 0;
}

/* ---- names in requests ------------------------------------------------------------------------------------------- */

/* Where the name begins in the body of a request, + 1; 0: it has none. */
static const uint8_t name_at[OVL_LANE_OPCODES] = {
	[FUSE_LOOKUP] = 1,
	[FUSE_UNLINK] = 1,
	[FUSE_RMDIR] = 1,
	[FUSE_SYMLINK] = 1,
	[FUSE_REMOVEXATTR] = 1,
	[FUSE_MKNOD] = sizeof(struct fuse_mknod_in) + 1,
	[FUSE_MKDIR] = sizeof(struct fuse_mkdir_in) + 1,
	[FUSE_LINK] = sizeof(struct fuse_link_in) + 1,
	[FUSE_RENAME] = sizeof(struct fuse_rename_in) + 1,
	[FUSE_RENAME2] = sizeof(struct fuse_rename2_in) + 1,
	[FUSE_CREATE] = sizeof(struct fuse_create_in) + 1,
	[FUSE_GETXATTR] = sizeof(struct fuse_getxattr_in) + 1,
};

static void take_name(struct ovl_trace_record *record, const unsigned char *body, size_t size)
{
	size_t at = record->opcode < OVL_LANE_OPCODES ? name_at[record->opcode] : 0, len;

	if (at == 0 || at - 1 >= size)
		return;
	body += at - 1;
	size -= at - 1;
	len = strnlen((const char *)body, size);
	if (len == size) /* not terminated: damaged */
		return;
	record->name_len = (uint32_t)(len < OVL_TRACE_NAME_MAX ? len : OVL_TRACE_NAME_MAX);
	memcpy(record->name, body, record->name_len);
}

/* ---- the ring ---------------------------------------------------------------------------------------------------- */

static void put(struct ovl_lane_trace *trace, struct ovl_trace_record *record)
{
	pthread_mutex_lock(&trace->lock);
	if (trace->ring && trace->count < trace->capacity) {
		record->by_starter = pthread_equal(pthread_self(), trace->starter);
		trace->ring[(trace->first + trace->count++) % trace->capacity] = *record;
	} else if (trace->ring) {
		trace->dropped++;
	}
	pthread_mutex_unlock(&trace->lock);
}

void ovl_lane_trace_answer(struct ovl_lane_trace *trace, const unsigned char *message, size_t size,
			   const struct ovl_lane_answer *answer, uint64_t began_ns)
{
	struct ovl_trace_record record = {.kind = OVL_TRACE_ANSWER, .layer = -1};
	struct fuse_in_header header;

	if (!trace || size < sizeof(header))
		return;
	memcpy(&header, message, sizeof(header));
	record.at_ns = ovl_lane_trace_began(trace);
	record.took_ns = record.at_ns - began_ns;
	record.opcode = header.opcode;
	if (header.opcode < OVL_LANE_OPCODES)
		atomic_fetch_add_explicit(&trace->latencies[header.opcode][ovl_trace_bucket(record.took_ns)], 1,
					  memory_order_relaxed);
	if (!atomic_load_explicit(&trace->on, memory_order_relaxed))
		return;
	record.nodeid = header.nodeid;
	record.error = answer->error;
	if (header.opcode == FUSE_LOOKUP && !answer->error && answer->size >= sizeof(record.number))
		memcpy(&record.number, answer->body, sizeof(record.number)); /* struct fuse_entry_out begins with it */
	if (record.number && trace->layer_of)
		record.layer = trace->layer_of(trace->layer_arg, record.number);
	if (header.opcode == FUSE_BATCH_FORGET && size >= sizeof(header) + sizeof(struct fuse_batch_forget_in)) {
		struct fuse_batch_forget_in in;

		memcpy(&in, message + sizeof(header), sizeof(in));
		record.number = in.count;
	}
	take_name(&record, message + sizeof(header), size - sizeof(header));
	put(trace, &record);
}

void ovl_lane_trace_told(struct ovl_lane_trace *trace, enum ovl_trace_kind kind, uint64_t nodeid, const void *name,
			 size_t len, uint64_t number, uint64_t began_ns)
{
	struct ovl_trace_record record = {.kind = kind, .nodeid = nodeid, .number = number, .layer = -1};

	if (!trace || kind >= OVL_TRACE_KINDS)
		return;
	atomic_fetch_add_explicit(&trace->told[kind], 1, memory_order_relaxed);
	if (kind == OVL_TRACE_COPY_UP)
		atomic_fetch_add_explicit(&trace->copied, number, memory_order_relaxed);
	if (!atomic_load_explicit(&trace->on, memory_order_relaxed))
		return;
	record.at_ns = ovl_lane_trace_began(trace);
	record.took_ns = began_ns ? record.at_ns - began_ns : 0;
	record.name_len = (uint32_t)(len < OVL_TRACE_NAME_MAX ? len : OVL_TRACE_NAME_MAX);
	if (name)
		memcpy(record.name, name, record.name_len);
	put(trace, &record);
}

void ovl_lane_trace_counts(const struct ovl_lane_trace *trace, uint64_t out[OVL_TRACE_KINDS], uint64_t *copied)
{
	for (size_t i = 0; i < OVL_TRACE_KINDS; i++)
		out[i] = atomic_load_explicit(&trace->told[i], memory_order_relaxed);
	*copied = atomic_load_explicit(&trace->copied, memory_order_relaxed);
}

void ovl_lane_trace_ask(struct ovl_lane_trace *trace, int (*layer_of)(void *arg, uint64_t nodeid), void *arg)
{
	trace->layer_of = layer_of;
	trace->layer_arg = arg;
}

void ovl_lane_trace_merge(void *arg, uint64_t nodeid, size_t names, const uint16_t *layers, size_t count,
			  uint64_t began_ns)
{
	struct ovl_lane_trace *trace = arg;
	struct ovl_trace_record record = {.kind = OVL_TRACE_MERGE, .nodeid = nodeid, .number = names, .layer = -1};

	if (!trace || !atomic_load_explicit(&trace->on, memory_order_relaxed))
		return;
	record.at_ns = ovl_lane_trace_began(trace);
	record.took_ns = record.at_ns - began_ns;
	if (count > OVL_TRACE_NAME_MAX / sizeof(*layers))
		count = OVL_TRACE_NAME_MAX / sizeof(*layers);
	record.name_len = (uint32_t)(count * sizeof(*layers));
	memcpy(record.name, layers, record.name_len);
	put(trace, &record);
}

ovl_err_t ovl_lane_trace_start(struct ovl_lane_trace *trace, size_t capacity)
{
	struct ovl_trace_record *ring;
	ovl_err_t err = 0;

	if (capacity == 0 || capacity > OVL_TRACE_RECORDS_MAX)
		return -EINVAL;
	ring = calloc(capacity, sizeof(*ring));
	if (!ring)
		return -ENOMEM;
	pthread_mutex_lock(&trace->lock);
	if (trace->ring) {
		err = -EALREADY;
	} else {
		trace->ring = ring;
		trace->capacity = capacity;
		trace->first = trace->count = 0;
		trace->dropped = 0;
		trace->starter = pthread_self();
		ring = NULL;
	}
	pthread_mutex_unlock(&trace->lock);
	free(ring);
	if (!err)
		atomic_store(&trace->on, true);
	return err;
}

void ovl_lane_trace_stop(struct ovl_lane_trace *trace)
{
	struct ovl_trace_record *ring;

	atomic_store(&trace->on, false);
	pthread_mutex_lock(&trace->lock);
	ring = trace->ring;
	trace->ring = NULL;
	trace->count = 0;
	pthread_mutex_unlock(&trace->lock);
	free(ring);
}

size_t ovl_lane_trace_drain(struct ovl_lane_trace *trace, struct ovl_trace_record *out, size_t most, uint64_t *dropped)
{
	size_t got = 0;

	pthread_mutex_lock(&trace->lock);
	while (got < most && trace->count > 0) {
		out[got++] = trace->ring[trace->first];
		trace->first = (trace->first + 1) % trace->capacity;
		trace->count--;
	}
	*dropped = trace->dropped;
	trace->dropped = 0;
	pthread_mutex_unlock(&trace->lock);
	return got;
}
