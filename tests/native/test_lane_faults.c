/*
 * test_lane_faults.c - what lane.c does with every error that the device and the socket can give
 *
 * lane.c is compiled in with its system calls replaced by ones that fail as told: a fault is an errno that the next
 * call gives, once, before the real call is made.  Built by test_lane.py with the sanitizers.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdatomic.h>
#include <stdio.h>
#include <sys/socket.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static ssize_t faulty_read(int fd, void *buffer, size_t size);
static ssize_t faulty_writev(int fd, const struct iovec *parts, int number);
static ssize_t faulty_send(int fd, const void *buffer, size_t size, int flags);

#define OVL_LANE_READ faulty_read
#define OVL_LANE_WRITEV faulty_writev
#define OVL_LANE_SEND faulty_send
#include "lane.c"

static atomic_int read_fault, writev_fault, send_fault, send_faults;

static ssize_t faulty_read(int fd, void *buffer, size_t size)
{
	int fault = atomic_exchange(&read_fault, 0);

	if (fault) {
		errno = fault;
		return -1;
	}
	return read(fd, buffer, size);
}

static ssize_t faulty_writev(int fd, const struct iovec *parts, int number)
{
	int fault = atomic_exchange(&writev_fault, 0);

	if (fault) {
		errno = fault;
		return -1;
	}
	return writev(fd, parts, number);
}

static ssize_t faulty_send(int fd, const void *buffer, size_t size, int flags)
{
	if (atomic_load(&send_faults) > 0) {
		atomic_fetch_sub(&send_faults, 1);
		errno = atomic_load(&send_fault);
		return -1;
	}
	return send(fd, buffer, size, flags);
}

static int failures;

#define CHECK(what) \
	do { \
		if (!(what)) { \
			printf("line %d: %s\n", __LINE__, #what); \
			failures++; \
		} \
	} while (0)

struct bench {
	struct ovl_lane *lane;
	int kernel, session;
};

static struct bench open_bench(void)
{
	const struct timeval patience = {.tv_sec = 5};
	struct bench bench = {0};
	int device[2], socket[2];

	if (socketpair(AF_UNIX, SOCK_SEQPACKET, 0, device) < 0 || socketpair(AF_UNIX, SOCK_SEQPACKET, 0, socket) < 0)
		_exit(2);
	bench.kernel = device[1];
	bench.session = socket[1];
	setsockopt(bench.kernel, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
	setsockopt(bench.session, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
	struct ovl_lane_config config = {
		.dev_fd = device[0], .session_fd = socket[0], .max_write = 65536, .queue_bytes = 1 << 20, .queue_count = 8,
	};
	if (ovl_lane_new(&bench.lane, &config) < 0 || ovl_lane_start(bench.lane) < 0)
		_exit(2);
	return bench;
}

static void close_bench(struct bench *bench)
{
	ovl_lane_free(bench->lane);
	close(bench->kernel);
	close(bench->session);
}

static void ask(struct bench *bench, uint32_t opcode, uint64_t unique)
{
	struct {
		struct fuse_in_header header;
		char body[40];
	} message = {.header = {.len = sizeof(message), .opcode = opcode, .unique = unique, .nodeid = 1}};

	CHECK(send(bench->kernel, &message, sizeof(message), 0) == (ssize_t)sizeof(message));
}

/* The error of the next reply that the kernel gets, 1 if there is none or it is not for `unique`. */
static int heard(struct bench *bench, uint64_t unique)
{
	struct fuse_out_header header;

	if (recv(bench->kernel, &header, sizeof(header), 0) < (ssize_t)sizeof(header) || header.unique != unique)
		return 1;
	return header.error;
}

static void answer(struct bench *bench, uint64_t unique)
{
	struct fuse_out_header header = {.len = sizeof(header), .unique = unique};
	char request[256];

	CHECK(recv(bench->session, request, sizeof(request), 0) > 0);
	CHECK(send(bench->session, &header, sizeof(header), 0) == (ssize_t)sizeof(header));
}

static void reading_goes_on_after(int error)
{
	struct bench bench = open_bench();

	atomic_store(&read_fault, error);
	ask(&bench, FUSE_LOOKUP, 2);
	answer(&bench, 2);
	CHECK(heard(&bench, 2) == 0);
	close_bench(&bench);
}

static void reading_ends_with(int error, int reason)
{
	struct bench bench = open_bench();
	struct pollfd ended = {.fd = ovl_lane_ended_fd(bench.lane), .events = POLLIN};

	atomic_store(&read_fault, error);
	ask(&bench, FUSE_LOOKUP, 2);
	CHECK(poll(&ended, 1, 5000) == 1);
	CHECK(ovl_lane_end_reason(bench.lane) == reason);
	close_bench(&bench);
}

/* `expected`: what the client hears in the end, 1: nothing. */
static void writing_fails_with(int error, int expected)
{
	struct bench bench = open_bench();
	struct ovl_lane_stats stats;

	ask(&bench, FUSE_LOOKUP, 2);
	atomic_store(&writev_fault, error);
	answer(&bench, 2);
	if (expected != 1) {
		CHECK(heard(&bench, 2) == expected);
	}
	ask(&bench, FUSE_LOOKUP, 4);
	answer(&bench, 4);
	CHECK(heard(&bench, 4) == 0);
	ovl_lane_stats(bench.lane, &stats);
	CHECK(stats.interrupted == (expected == 1));
	CHECK(stats.refused == (expected == -EIO));
	close_bench(&bench);
}

static void sending_fails_with(int error, int times, int expected)
{
	struct bench bench = open_bench();
	struct ovl_lane_stats stats;

	atomic_store(&send_fault, error);
	atomic_store(&send_faults, times);
	ask(&bench, FUSE_LOOKUP, 2);
	if (expected == 0)
		answer(&bench, 2);
	CHECK(heard(&bench, 2) == expected);
	atomic_store(&send_faults, 0);
	ask(&bench, FUSE_LOOKUP, 4);
	answer(&bench, 4);
	CHECK(heard(&bench, 4) == 0);
	ovl_lane_stats(bench.lane, &stats);
	CHECK(stats.undeliverable == (expected != 0));
	close_bench(&bench);
}

static void *answer_extra_requests(void *arg)
{
	struct bench *bench = arg;
	struct pollfd extra = {.fd = ovl_lane_extra_fd(bench->lane), .events = POLLIN};

	for (int done = 0; done < 2000;) {
		struct ovl_lane_request *request;

		if (poll(&extra, 1, 5000) != 1)
			break;
		while (ovl_lane_receive(bench->lane, &request) == 0) {
			struct fuse_in_header header;

			memcpy(&header, request->message, sizeof(header));
			CHECK(ovl_lane_reply(bench->lane, header.unique, 0, NULL, 0) == 0);
			free(request);
			done++;
		}
	}
	return NULL;
}

static void *answer_session(void *arg)
{
	for (int done = 0; done < 2000; done++) {
		struct bench *bench = arg;
		struct fuse_in_header header;
		char request[256];
		struct fuse_out_header reply = {.len = sizeof(reply)};

		if (recv(bench->session, request, sizeof(request), 0) <= 0)
			break;
		memcpy(&header, request, sizeof(header));
		reply.unique = header.unique;
		send(bench->session, &reply, sizeof(reply), 0);
	}
	return NULL;
}

static void *ask_much(void *arg)
{
	for (uint64_t i = 0; i < 4000; i++)
		ask(arg, i & 1 ? FUSE_LOOKUP : FUSE_READ, i + 2);
	return NULL;
}

/* All threads at once, for the thread sanitizer: every request gets one reply. */
static void all_at_once(void)
{
	struct bench bench = open_bench();
	pthread_t threads[3];
	void *(*const run[3])(void *) = {answer_extra_requests, answer_session, ask_much};
	static unsigned char seen[4000];

	for (int i = 0; i < 3; i++)
		pthread_create(&threads[i], NULL, run[i], &bench);
	for (int i = 0; i < 4000; i++) {
		struct fuse_out_header header = {0};

		if (recv(bench.kernel, &header, sizeof(header), 0) != (ssize_t)sizeof(header))
			break;
		if (header.unique >= 2 && header.unique < 4002)
			seen[header.unique - 2]++;
	}
	for (int i = 0; i < 3; i++)
		pthread_join(threads[i], NULL);
	for (int i = 0; i < 4000; i++)
		CHECK(seen[i] == 1);
	close_bench(&bench);
}

int main(void)
{
	reading_goes_on_after(EINTR);
	reading_goes_on_after(EAGAIN);
	reading_goes_on_after(ENOENT);
	reading_ends_with(ENODEV, 0);
	reading_ends_with(ECONNABORTED, 0);
	reading_ends_with(EFAULT, -EFAULT);
	writing_fails_with(EINTR, 0);
	writing_fails_with(EAGAIN, 0);
	writing_fails_with(ENOENT, 1);
	writing_fails_with(ENODEV, 1);
	writing_fails_with(EINVAL, -EIO);
	writing_fails_with(ENOMEM, -EIO);
	sending_fails_with(EINTR, 3, 0);
	sending_fails_with(ENOBUFS, 3, 0);
	sending_fails_with(ENOBUFS, 1000, -ENOMEM);
	sending_fails_with(EMSGSIZE, 1, -EIO);
	all_at_once();
	return failures != 0;
}
