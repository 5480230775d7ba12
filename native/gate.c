/*
 * gate.c - see gate.h for the rules
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "gate.h"

int ovl_gate_init(struct ovl_gate *gate)
{
	pthread_rwlockattr_t kind;
	int err;

	*gate = (struct ovl_gate){0};
	pthread_mutex_init(&gate->change, NULL);
	pthread_mutex_init(&gate->count, NULL);
	/* Many who look must not starve the one who has changed something. */
	pthread_rwlockattr_init(&kind);
	pthread_rwlockattr_setkind_np(&kind, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
	err = -pthread_rwlock_init(&gate->order, &kind);
	pthread_rwlockattr_destroy(&kind);
	return err;
}

void ovl_gate_destroy(struct ovl_gate *gate)
{
	pthread_rwlock_destroy(&gate->order);
	pthread_mutex_destroy(&gate->count);
	pthread_mutex_destroy(&gate->change);
}

void ovl_gate_hand_over(struct ovl_gate *gate, bool rename)
{
	pthread_mutex_lock(&gate->change);
	gate->generation++;
	pthread_mutex_lock(&gate->count);
	gate->handed++;
	gate->renames += rename;
	pthread_mutex_unlock(&gate->count);
	if (rename)
		ovl_gate_barrier(gate); /* who looks now may ask layers; who comes later is told not to */
	pthread_mutex_unlock(&gate->change);
}

void ovl_gate_returned(struct ovl_gate *gate, bool rename)
{
	pthread_mutex_lock(&gate->count);
	gate->handed--;
	gate->renames -= rename;
	pthread_mutex_unlock(&gate->count);
}

bool ovl_gate_look(struct ovl_gate *gate)
{
	bool renaming;

	pthread_rwlock_rdlock(&gate->order);
	pthread_mutex_lock(&gate->count);
	renaming = gate->renames > 0;
	pthread_mutex_unlock(&gate->count);
	return !renaming;
}

void ovl_gate_looked(struct ovl_gate *gate)
{
	pthread_rwlock_unlock(&gate->order);
}

bool ovl_gate_change(struct ovl_gate *gate)
{
	bool free;

	pthread_mutex_lock(&gate->change);
	pthread_mutex_lock(&gate->count);
	free = gate->handed == 0;
	pthread_mutex_unlock(&gate->count);
	if (!free)
		pthread_mutex_unlock(&gate->change);
	return free;
}

void ovl_gate_changed(struct ovl_gate *gate)
{
	pthread_mutex_unlock(&gate->change);
}

void ovl_gate_barrier(struct ovl_gate *gate)
{
	pthread_rwlock_wrlock(&gate->order);
	pthread_rwlock_unlock(&gate->order);
}
