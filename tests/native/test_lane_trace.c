/*
 * test_lane_trace.c - lane_trace.c by itself: buckets, damaged messages, and many threads at once
 *
 * Built by test_lane_trace.py with the address and the thread sanitizer.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/fuse.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "lane_trace.h"

#define TELLERS 4
#define TOLD 20000

static int failures;

#define CHECK(what) \
	do { \
		if (!(what)) { \
			printf("line %d: %s\n", __LINE__, #what); \
			failures++; \
		} \
	} while (0)

/* A bucket holds what is between its shortest duration and the next one's, and no duration falls through. */
static void buckets_hold_what_they_should(void)
{
	unsigned before = 0;

	for (uint64_t ns = 0; ns < 100000; ns++) {
		unsigned bucket = ovl_trace_bucket(ns);

		CHECK(bucket == before || bucket == before + 1);
		CHECK(ovl_trace_bucket_ns(bucket) <= ns);
		CHECK(ns < ovl_trace_bucket_ns(bucket + 1));
		before = bucket;
	}
	CHECK(ovl_trace_bucket(UINT64_MAX) == OVL_TRACE_BUCKETS - 1);
	CHECK(ovl_trace_bucket_ns(OVL_TRACE_BUCKETS + 1000) == ovl_trace_bucket_ns(OVL_TRACE_BUCKETS - 1));
}

/* A request of exactly so many bytes, so that the sanitizer sees the first one too far. */
static void tell(struct ovl_lane_trace *trace, uint32_t opcode, const char *body, size_t size, size_t answered)
{
	struct fuse_in_header header = {.len = (uint32_t)(sizeof(header) + size), .opcode = opcode, .nodeid = 7};
	unsigned char *message = malloc(sizeof(header) + size), reply[8] = {42};
	struct ovl_lane_answer answer = {.size = answered, .body = reply};

	memcpy(message, &header, sizeof(header));
	memcpy(message + sizeof(header), body, size);
	ovl_lane_trace_answer(trace, message, sizeof(header) + size, &answer, ovl_lane_trace_began(trace));
	free(message);
}

static void names_are_taken_from_what_is_there(void)
{
	struct ovl_trace_record record;
	struct ovl_lane_trace *trace;
	char rename[17 + 8] = {0}, longest[400];
	uint64_t dropped;

	CHECK(ovl_lane_trace_new(&trace) == 0);
	CHECK(ovl_lane_trace_start(trace, 0) == -EINVAL);
	CHECK(ovl_lane_trace_start(trace, OVL_TRACE_RECORDS_MAX + 1) == -EINVAL);
	CHECK(ovl_lane_trace_start(trace, 8) == 0);
	CHECK(ovl_lane_trace_start(trace, 8) == -EALREADY);

	tell(trace, FUSE_LOOKUP, "name", 5, 8);
	CHECK(ovl_lane_trace_drain(trace, &record, 1, &dropped) == 1);
	CHECK(record.name_len == 4 && memcmp(record.name, "name", 4) == 0 && record.number == 42 && record.nodeid == 7);
	tell(trace, FUSE_LOOKUP, "name", 4, 0); /* not terminated */
	CHECK(ovl_lane_trace_drain(trace, &record, 1, &dropped) == 1 && record.name_len == 0 && record.number == 0);
	tell(trace, FUSE_LOOKUP, "", 0, 4);
	CHECK(ovl_lane_trace_drain(trace, &record, 1, &dropped) == 1 && record.name_len == 0);
	memcpy(rename + 16, "from\0to", 8);
	tell(trace, FUSE_RENAME2, rename, 16 + 8, 0);
	CHECK(ovl_lane_trace_drain(trace, &record, 1, &dropped) == 1 && record.name_len == 4);
	for (size_t size = 0; size < 16; size++)
		tell(trace, FUSE_RENAME2, rename, size, 0);
	CHECK(ovl_lane_trace_drain(trace, &record, 1, &dropped) == 1);
	CHECK(dropped == 8 && record.name_len == 0);
	ovl_lane_trace_stop(trace);
	CHECK(ovl_lane_trace_start(trace, 8) == 0);
	memset(longest, 'n', sizeof(longest));
	longest[sizeof(longest) - 1] = 0;
	tell(trace, FUSE_LOOKUP, longest, sizeof(longest), 8);
	CHECK(ovl_lane_trace_drain(trace, &record, 1, &dropped) == 1 && record.name_len == OVL_TRACE_NAME_MAX);
	tell(trace, 12345, "x", 2, 8); /* an opcode beyond the table */
	CHECK(ovl_lane_trace_drain(trace, &record, 1, &dropped) == 1 && record.opcode == 12345 && record.name_len == 0);
	ovl_lane_trace_answer(trace, (const unsigned char *)"short", 5, NULL, 0);
	CHECK(ovl_lane_trace_drain(trace, &record, 1, &dropped) == 0 && dropped == 0);
	ovl_lane_trace_free(trace);
	ovl_lane_trace_answer(NULL, NULL, 0, NULL, 0);
	ovl_lane_trace_merge(NULL, 1, 1, NULL, 0, 0);
	CHECK(ovl_lane_trace_began(NULL) == 0);
	ovl_lane_trace_free(NULL);
}

static struct ovl_lane_trace *shared;
static atomic_int telling;

static void *tell_much(void *arg)
{
	static const uint16_t layers[200] = {1, 2};

	(void)arg;
	for (int i = 0; i < TOLD; i++) {
		tell(shared, FUSE_LOOKUP, "name", 5, 8);
		if (i % 16 == 0)
			ovl_lane_trace_merge(shared, 1, 5, layers, 200, ovl_lane_trace_began(shared));
	}
	atomic_fetch_sub(&telling, 1);
	return NULL;
}

/* Records are told by several threads while another starts, drains and stops; every latency is counted. */
static void all_at_once(void)
{
	static struct ovl_trace_record records[64];
	uint64_t latencies[OVL_TRACE_BUCKETS], counted = 0, dropped;
	pthread_t threads[TELLERS];

	CHECK(ovl_lane_trace_new(&shared) == 0);
	atomic_store(&telling, TELLERS);
	for (int i = 0; i < TELLERS; i++)
		pthread_create(&threads[i], NULL, tell_much, NULL);
	while (atomic_load(&telling) > 0) {
		CHECK(ovl_lane_trace_start(shared, 32) == 0);
		for (int i = 0; i < 20; i++) {
			size_t got = ovl_lane_trace_drain(shared, records, 64, &dropped);

			CHECK(got <= 32);
			for (size_t at = 0; at < got; at++)
				CHECK(records[at].kind == OVL_TRACE_MERGE || records[at].name_len == 4);
		}
		ovl_lane_trace_stop(shared);
	}
	for (int i = 0; i < TELLERS; i++)
		pthread_join(threads[i], NULL);
	ovl_lane_trace_latencies(shared, FUSE_LOOKUP, latencies);
	for (size_t i = 0; i < OVL_TRACE_BUCKETS; i++)
		counted += latencies[i];
	CHECK(counted == (uint64_t)TELLERS * TOLD);
	ovl_lane_trace_latencies(shared, OVL_LANE_OPCODES, latencies);
	CHECK(latencies[0] == 0);
	ovl_lane_trace_free(shared);
}

int main(void)
{
	buckets_hold_what_they_should();
	names_are_taken_from_what_is_there();
	all_at_once();
	printf("done\n");
	return failures != 0;
}
