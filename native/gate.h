/*
 * gate.h - who may change the mount now, and when may an answer leave?
 *
 * Problem.  Two parties change the upperdir and the live tree: Python (the rules, one thread) and the lane's threads
 * (what needs no decision).  Python's functions are atomic to each other only because nobody else changes anything
 * between two of its steps.  And the kernel keeps what it is told, so an answer from before a change must not arrive
 * after the reply to that change.
 *
 *      the lane                                         Python
 *      ---------------------------------------------    ----------------------------------------------
 *      look      read the tree, write the answer        has a request from ovl_gate_hand_over
 *      change    disk, tree, barrier, reply             until ovl_gate_returned
 *
 * Rules:
 *   1. A native change happens only while Python has no request at all (else the request is handed to Python), and
 *      one at a time.  Requests are handed over only while no native change is under way.
 *   2. An answer that the kernel keeps (entry, attributes, listing) is looked up and written between ovl_gate_look and
 *      ovl_gate_looked.  Whoever changed something calls ovl_gate_barrier between the change and the reply: all
 *      answers that could be from before have left then.
 *   3. While Python has a RENAME, no layer is asked from here (a path could lead elsewhere): ovl_gate_look says so.
 *      Handing a RENAME over waits for those who look already.
 *
 * Filling the page cache at a first open (lane_file.c) changes nothing, but is a change by these rules: nobody else may change
 * what it stores.
 *
 * Lock order: change, then order, then count.  None is held while Python runs, nor while waiting for a client; `order`
 * is held over a write to /dev/fuse, which waits for nobody.
 */
#ifndef OVL_GATE_H
#define OVL_GATE_H

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct ovl_gate {
	pthread_mutex_t change;
	pthread_rwlock_t order;
	pthread_mutex_t count; /* protects what follows; a leaf */
	size_t handed;         /* requests that Python has */
	size_t renames;        /* of them */
	uint64_t generation;   /* protected by change: how often Python was handed something */
};

/* 0 or -errno. */
int ovl_gate_init(struct ovl_gate *gate);
void ovl_gate_destroy(struct ovl_gate *gate);

/* Python gets a request that has a reply, and has answered one. */
void ovl_gate_hand_over(struct ovl_gate *gate, bool rename);
void ovl_gate_returned(struct ovl_gate *gate, bool rename);

/* True: layers may be asked. */
bool ovl_gate_look(struct ovl_gate *gate);
void ovl_gate_looked(struct ovl_gate *gate);

/* True: the caller is the one who changes, until ovl_gate_changed.  False: Python has to do it. */
bool ovl_gate_change(struct ovl_gate *gate);
void ovl_gate_changed(struct ovl_gate *gate);

/* Not between look and looked. */
void ovl_gate_barrier(struct ovl_gate *gate);

#endif
