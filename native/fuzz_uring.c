/*
 * fuzz_uring.c - what uring.c makes of the memory that the kernel fills
 *
 * Input: the bytes of struct ovl_uring_header, then two for the room of the payload.  Whatever they say, a message is
 * either refused or as long as its header says, and lies between the memory before the payload and the end of it; nothing
 * else is touched (AddressSanitizer watches).  Without OVL_LIBFUZZER: mutations of good requests, from a fixed seed.
 */
#include "uring.c"

#include <stdio.h>

#define BEFORE (sizeof(struct fuse_in_header) + OVL_URING_OP_BYTES)

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t len);

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t len)
{
	struct ovl_uring_header header;
	struct fuse_in_header in;
	unsigned char *memory, *message;
	size_t room, size = 0;
	int accepted = 0;

	if (len < sizeof(header) + 2)
		return -1;
	memcpy(&header, bytes, sizeof(header));
	room = (size_t)(bytes[sizeof(header)] | bytes[sizeof(header) + 1] << 8);
	memory = malloc(BEFORE + room);
	if (!memory)
		return -1;
	memset(memory, 0xA5, BEFORE + room);
	message = ovl_uring_flatten(&header, memory + BEFORE, room, &size);
	if (message) {
		size_t op;

		memcpy(&in, header.in_out, sizeof(in));
		op = size - sizeof(in) - header.payload_bytes;
		if (size != in.len || message < memory || message + size != memory + BEFORE + header.payload_bytes ||
		    header.payload_bytes > room || op > OVL_URING_OP_BYTES || memcmp(message, &in, sizeof(in)) != 0 ||
		    memcmp(message + sizeof(in), header.op_in, op) != 0)
			abort();
		for (const unsigned char *at = memory; at < message; at++)
			if (*at != 0xA5)
				abort();
		for (const unsigned char *at = memory + BEFORE; at < memory + BEFORE + room; at++)
			if (*at != 0xA5)
				abort();
		accepted = 1;
	}
	free(memory);
	return accepted ? 0 : -1;
}

#ifndef OVL_LIBFUZZER

static uint32_t random32(void)
{
	static uint64_t state = 1;

	state = state * 6364136223846793005u + 1442695040888963407u;
	return (uint32_t)(state >> 32);
}

/* Sizes at and around every limit. */
static uint32_t pick_size(void)
{
	static const uint32_t edges[] = {0, 1, 40, 41, 128, 168, 169, 4096, 65535, 65536, UINT32_MAX - 40, UINT32_MAX};

	return edges[random32() % 12] + random32() % 3 - 1;
}

static void expect_cpus(const char *text, size_t count)
{
	if (ovl_uring_count_cpus(text) != count) {
		fprintf(stderr, "%s is not %zu CPUs\n", text, count);
		exit(1);
	}
}

int main(int argc, char **argv)
{
	unsigned long rounds = argc > 1 ? strtoul(argv[1], NULL, 10) : 0, accepted = 0;
	uint8_t bytes[sizeof(struct ovl_uring_header) + 2];

	expect_cpus("0\n", 1);
	expect_cpus("0-1\n", 2);
	expect_cpus("0-3,8-11", 8);
	expect_cpus("0,2-", 0);
	expect_cpus("3-1", 0);
	expect_cpus("0-99999999999", 0);
	expect_cpus("", 0);
	expect_cpus("x", 0);
	for (unsigned long i = 0; i < rounds; i++) {
		struct ovl_uring_header header;
		struct fuse_in_header in = {0};
		uint32_t payload = random32() % 4 ? random32() % 600 : pick_size();

		for (size_t at = 0; at < sizeof(bytes); at++)
			bytes[at] = (uint8_t)random32();
		in.len = random32() % 4 ? (uint32_t)sizeof(in) + payload + random32() % 140 : pick_size();
		memcpy(&header, bytes, sizeof(header));
		memcpy(header.in_out, &in, sizeof(in));
		header.payload_bytes = payload;
		memcpy(bytes, &header, sizeof(header));
		accepted += LLVMFuzzerTestOneInput(bytes, sizeof(bytes)) == 0;
	}
	printf("%lu of %lu requests accepted\n", accepted, rounds);
	return 0;
}

#endif
