/*
 * py_lane.c - Lane: the request lane of lane.h for Python
 *
 * Ownership: the object owns the lane, and with it both descriptors, from __new__ (also from one that fails, once it
 * knows which they are) to close() or dealloc; `lane` is NULL after close().  Threads: the lane's own threads never touch Python.  close,
 * stop and reply run without the GIL; `users` (changed with the GIL held) keeps close() from freeing what another
 * thread is using.  A `tree` is referred to as long as the lane's threads may look into it; it refers to no lane, so
 * there is no cycle to collect.  What answers natively (`fs`) lives as long as the lane, and ends after its threads.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <linux/fuse.h>

#include "lane_trace.h"
#include "lane_tree.h"
#include "module.h"

struct lane_object {
	PyObject_HEAD
	struct ovl_lane *lane;
	struct ovl_lane_fs *fs; /* owned; NULL: nothing is answered natively */
	PyObject *tree;         /* owned; what `fs` answers from */
	PyObject *trace;        /* owned, or NULL */
	Py_ssize_t users;
};

static struct ovl_lane *get(PyObject *object)
{
	struct ovl_lane *lane = ((struct lane_object *)object)->lane;

	if (!lane)
		PyErr_SetString(PyExc_ValueError, "the lane is closed");
	return lane;
}

static int layer_of(void *tree, uint64_t nodeid)
{
	return ovl_tree_layer(tree, nodeid);
}

/* Ends the threads first: they use what is freed after. */
static void lane_end(struct ovl_lane *lane, struct ovl_lane_fs *fs)
{
	Py_BEGIN_ALLOW_THREADS
	ovl_lane_stop(lane);
	if (fs)
		ovl_lane_fs_destroy(fs);
	ovl_lane_free(lane);
	Py_END_ALLOW_THREADS
	if (fs && fs->trace)
		ovl_lane_trace_ask(fs->trace, NULL, NULL); /* it may live longer than the tree */
	free(fs);
}

/* `upper`: (work_fd, prefix, direct, may_chown, devices, volatile, metacopy), or None. */
static int take_upper(PyObject *upper, struct ovl_lane_upper *out)
{
	const char *prefix;
	int direct, may_chown, devices, is_volatile, metacopy;

	*out = (struct ovl_lane_upper){.work_fd = -1, .prefix = "user.overlay."};
	if (upper == Py_None)
		return 0;
	if (!PyTuple_Check(upper)) {
		PyErr_SetString(PyExc_TypeError, "upper is a tuple, or None");
		return -1;
	}
	if (!PyArg_ParseTuple(upper, "isppppp:upper", &out->work_fd, &prefix, &direct, &may_chown, &devices, &is_volatile,
			      &metacopy))
		return -1;
	out->direct = direct;
	out->may_chown = may_chown;
	out->devices = devices;
	out->is_volatile = is_volatile;
	out->metacopy = metacopy;
	if (strcmp(prefix, "trusted.overlay.") == 0)
		out->prefix = "trusted.overlay.";
	else if (strcmp(prefix, "user.overlay.") != 0) {
		PyErr_SetString(PyExc_ValueError, "there are two namespaces");
		return -1;
	}
	return 0;
}

/* What answers natively, from a tree. */
static struct ovl_lane_fs *make_fs(PyTypeObject *type, PyObject *tree, PyObject *upper, int dev_fd, int no_open, int passthrough)
{
	struct ovl_tree *core = ovl_tree_from_object(PyType_GetModule(type), tree);
	struct ovl_lane_upper described;
	struct ovl_lane_fs *fs;
	ovl_err_t err;

	if (!core || take_upper(upper, &described) < 0)
		return NULL;
	fs = malloc(sizeof(*fs));
	if (!fs) {
		PyErr_NoMemory();
		return NULL;
	}
	err = ovl_lane_fs_init(fs, core, &described, dev_fd, no_open, passthrough);
	if (err) {
		free(fs);
		ovl_raise(err);
		return NULL;
	}
	return fs;
}

static PyObject *lane_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
	static char *names[] = {"dev_fd", "session_fd", "max_write", "queue_bytes", "queue_count",
				"tree", "upper", "no_open", "passthrough", "trace", "io_uring", NULL};
	struct ovl_lane_config config = {.dev_fd = -1, .session_fd = -1};
	Py_ssize_t max_write = 1 << 20, bytes = 16 << 20, count = 256;
	PyObject *tree = Py_None, *upper = Py_None, *trace = Py_None;
	int no_open = 0, passthrough = 0, io_uring = 0;
	struct ovl_lane_fs *fs = NULL;
	struct lane_object *self;
	ovl_err_t err;

	if (!PyArg_ParseTupleAndKeywords(args, kwargs, "ii|$nnnOOppOp:Lane", names, &config.dev_fd, &config.session_fd,
					 &max_write, &bytes, &count, &tree, &upper, &no_open, &passthrough, &trace, &io_uring))
		return NULL;
	if (trace != Py_None) {
		config.trace = ovl_trace_from_object(PyType_GetModule(type), trace);
		if (!config.trace)
			goto refused;
	}
	if (tree != Py_None) {
		fs = make_fs(type, tree, upper, config.dev_fd, no_open, passthrough);
		if (!fs)
			goto refused;
		config.native = (struct ovl_lane_native){
			.answer = ovl_lane_fs_answer,
			.patch = ovl_lane_fs_patch,
			.agree = ovl_lane_fs_agree,
			.gate = &fs->gate,
			.init_flags = passthrough ? OVL_LANE_INIT_PASSTHROUGH : 0,
			.arg = fs,
		};
	}
	if (fs)
		fs->trace = config.trace;
	config.io_uring = io_uring;
	config.max_write = max_write < 0 ? 0 : (size_t)max_write;
	config.queue_bytes = bytes < 0 ? 0 : (size_t)bytes;
	config.queue_count = count < 0 ? 0 : (size_t)count;
	self = (struct lane_object *)type->tp_alloc(type, 0);
	if (!self) {
		if (fs)
			ovl_lane_fs_destroy(fs);
		free(fs);
		goto refused;
	}
	err = ovl_lane_new(&self->lane, &config);
	if (err) {
		if (fs)
			ovl_lane_fs_destroy(fs);
		free(fs);
		Py_DECREF(self);
		return ovl_raise(err);
	}
	if (tree != Py_None) {
		Py_INCREF(tree);
		self->tree = tree;
		self->fs = fs;
		if (fs->trace)
			ovl_lane_trace_ask(fs->trace, layer_of, fs->tree);
	}
	if (trace != Py_None) {
		Py_INCREF(trace);
		self->trace = trace;
	}
	return (PyObject *)self;
refused: /* as ovl_lane_new would have done */
	if (config.dev_fd >= 0)
		close(config.dev_fd);
	if (config.session_fd >= 0)
		close(config.session_fd);
	return NULL;
}

static void lane_dealloc(PyObject *object)
{
	struct lane_object *self = (struct lane_object *)object;
	PyTypeObject *type = Py_TYPE(object);

	if (self->lane)
		lane_end(self->lane, self->fs);
	Py_CLEAR(self->tree);
	Py_CLEAR(self->trace);
	type->tp_free(object);
	Py_DECREF(type);
}

static PyObject *lane_close(PyObject *object, PyObject *Py_UNUSED(unused))
{
	struct lane_object *self = (struct lane_object *)object;
	struct ovl_lane *lane = self->lane;
	struct ovl_lane_fs *fs = self->fs;

	if (self->users) {
		PyErr_SetString(PyExc_RuntimeError, "the lane is in use by another thread");
		return NULL;
	}
	self->lane = NULL;
	self->fs = NULL;
	if (lane)
		lane_end(lane, fs);
	Py_CLEAR(self->tree);
	Py_CLEAR(self->trace);
	Py_RETURN_NONE;
}

static PyObject *lane_start(PyObject *object, PyObject *Py_UNUSED(unused))
{
	struct ovl_lane *lane = get(object);
	ovl_err_t err;

	if (!lane)
		return NULL;
	err = ovl_lane_start(lane);
	if (err)
		return ovl_raise(err);
	Py_RETURN_NONE;
}

static PyObject *lane_stop(PyObject *object, PyObject *Py_UNUSED(unused))
{
	struct lane_object *self = (struct lane_object *)object;
	struct ovl_lane *lane = get(object);

	if (!lane)
		return NULL;
	self->users++;
	Py_BEGIN_ALLOW_THREADS
	ovl_lane_stop(lane);
	Py_END_ALLOW_THREADS
	self->users--;
	Py_RETURN_NONE;
}

/* (opcode, unique, nodeid, uid, gid, pid, args, data): data is what WRITE writes, args the rest of the body. */
static PyObject *describe(const struct ovl_lane_request *request)
{
	struct fuse_in_header header;
	const char *body = (const char *)request->message + sizeof(header);
	size_t length = request->size - sizeof(header), args = length;

	memcpy(&header, request->message, sizeof(header));
	if (header.opcode == FUSE_WRITE && length > sizeof(struct fuse_write_in))
		args = sizeof(struct fuse_write_in);
	return Py_BuildValue("IKKIIIy#y#", header.opcode, (unsigned long long)header.unique,
			     (unsigned long long)header.nodeid, header.uid, header.gid, header.pid, body,
			     (Py_ssize_t)args, body + args, (Py_ssize_t)(length - args));
}

static PyObject *lane_receive(PyObject *object, PyObject *Py_UNUSED(unused))
{
	struct ovl_lane *lane = get(object);
	struct ovl_lane_request *request;
	PyObject *out;

	if (!lane)
		return NULL;
	if (ovl_lane_receive(lane, &request) < 0)
		Py_RETURN_NONE;
	out = describe(request);
	free(request);
	return out;
}

static PyObject *lane_reply(PyObject *object, PyObject *args)
{
	struct lane_object *self = (struct lane_object *)object;
	struct ovl_lane *lane = get(object);
	unsigned long long unique;
	Py_buffer data = {0};
	int error;
	ovl_err_t err;

	if (!lane || !PyArg_ParseTuple(args, "Ki|y*:reply", &unique, &error, &data))
		return NULL;
	self->users++;
	Py_BEGIN_ALLOW_THREADS
	err = ovl_lane_reply(lane, unique, error, data.buf, (size_t)data.len);
	Py_END_ALLOW_THREADS
	self->users--;
	if (data.obj)
		PyBuffer_Release(&data);
	if (err)
		return ovl_raise(err);
	Py_RETURN_NONE;
}

static int put_number(PyObject *dict, const char *name, uint64_t number)
{
	PyObject *value = PyLong_FromUnsignedLongLong(number);
	int err = value ? PyDict_SetItemString(dict, name, value) : -1;

	Py_XDECREF(value);
	return err;
}

static int put_opcode(PyObject *dict, size_t opcode, const struct ovl_lane_counts *counts)
{
	PyObject *key = PyLong_FromSize_t(opcode);
	PyObject *value = Py_BuildValue("KKK", (unsigned long long)counts->forwarded,
					(unsigned long long)counts->extra, (unsigned long long)counts->answered);
	int err = key && value ? PyDict_SetItem(dict, key, value) : -1;

	Py_XDECREF(key);
	Py_XDECREF(value);
	return err;
}

static PyObject *lane_stats(PyObject *object, PyObject *Py_UNUSED(unused))
{
	struct ovl_lane *lane = get(object);
	struct ovl_lane_stats stats;
	PyObject *totals, *opcodes;

	if (!lane)
		return NULL;
	ovl_lane_stats(lane, &stats);
	totals = PyDict_New();
	opcodes = PyDict_New();
	if (!totals || !opcodes)
		goto error;
	for (size_t i = 0; i < OVL_LANE_OPCODES; i++) {
		const struct ovl_lane_counts *counts = &stats.opcode[i];

		if ((counts->forwarded || counts->extra || counts->answered) && put_opcode(opcodes, i, counts) < 0)
			goto error;
	}
	if (put_number(totals, "replies", stats.replies) < 0 ||
	    put_number(totals, "interrupted", stats.interrupted) < 0 ||
	    put_number(totals, "refused", stats.refused) < 0 ||
	    put_number(totals, "undeliverable", stats.undeliverable) < 0 ||
	    put_number(totals, "notifications", stats.notifications) < 0 ||
	    put_number(totals, "dropped", stats.dropped) < 0)
		goto error;
	return Py_BuildValue("NN", opcodes, totals);
error:
	Py_XDECREF(totals);
	Py_XDECREF(opcodes);
	return NULL;
}

static PyObject *lane_ended_fd(PyObject *object, void *Py_UNUSED(closure))
{
	struct ovl_lane *lane = get(object);

	return lane ? PyLong_FromLong(ovl_lane_ended_fd(lane)) : NULL;
}

static PyObject *lane_extra_fd(PyObject *object, void *Py_UNUSED(closure))
{
	struct ovl_lane *lane = get(object);

	return lane ? PyLong_FromLong(ovl_lane_extra_fd(lane)) : NULL;
}

static PyObject *lane_open_files(PyObject *object, void *Py_UNUSED(closure))
{
	struct lane_object *self = (struct lane_object *)object;

	if (!get(object))
		return NULL;
	return PyLong_FromSize_t(self->fs ? ovl_lane_files_count(self->fs) : 0);
}

static PyObject *lane_end_reason(PyObject *object, void *Py_UNUSED(closure))
{
	struct ovl_lane *lane = get(object);

	return lane ? PyLong_FromLong(-ovl_lane_end_reason(lane)) : NULL;
}

static PyObject *lane_io_uring(PyObject *object, void *Py_UNUSED(closure))
{
	struct lane_object *self = (struct lane_object *)object;
	struct ovl_lane *lane = get(object);
	ovl_err_t err;

	if (!lane)
		return NULL;
	self->users++;
	Py_BEGIN_ALLOW_THREADS
	err = ovl_lane_uring(lane);
	Py_END_ALLOW_THREADS
	self->users--;
	return PyLong_FromLong(-err);
}

static PyMethodDef lane_methods[] = {
	{"start", lane_start, METH_NOARGS, "start(): start the threads."},
	{"stop", lane_stop, METH_NOARGS, "stop(): end the threads and wait for them."},
	{"close", lane_close, METH_NOARGS, "close(): stop, and close both descriptors."},
	{"receive", lane_receive, METH_NOARGS,
	 "receive() -> (opcode, unique, nodeid, uid, gid, pid, args, data), or None: no extra request waits."},
	{"reply", lane_reply, METH_VARARGS, "reply(unique, errno, data=b''): answer an extra request."},
	{"stats", lane_stats, METH_NOARGS, "stats() -> ({opcode: (forwarded, extra, answered)}, {what: number})."},
	{NULL, NULL, 0, NULL},
};

static PyGetSetDef lane_getset[] = {
	{"ended_fd", lane_ended_fd, NULL, "Readable once no request will come any more.", NULL},
	{"extra_fd", lane_extra_fd, NULL, "Readable while an extra request waits.", NULL},
	{"open_files", lane_open_files, NULL, "How many files are open that the lane opened itself.", NULL},
	{"io_uring", lane_io_uring, NULL,
	 "0: requests come by io_uring; else the errno that says why not (EOPNOTSUPP: not asked for, or not offered).", NULL},
	{"end_reason", lane_end_reason, NULL, "The errno that ended it; 0: unmounted, aborted or stopped.", NULL},
	{NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot lane_slots[] = {
	{Py_tp_doc, "Lane(dev_fd, session_fd, *, max_write, queue_bytes, queue_count, tree, upper, no_open, passthrough, trace, io_uring)\n--\n\n"
		    "Stands between /dev/fuse and those who answer; owns both descriptors."},
	{Py_tp_new, (void *)lane_new},
	{Py_tp_dealloc, (void *)lane_dealloc},
	{Py_tp_methods, lane_methods},
	{Py_tp_getset, lane_getset},
	{0, NULL},
};

static PyType_Spec lane_spec = {
	.name = "ovlfs._native.Lane",
	.basicsize = sizeof(struct lane_object),
	.flags = Py_TPFLAGS_DEFAULT,
	.slots = lane_slots,
};

int ovl_add_lane(PyObject *module)
{
	PyObject *type = PyType_FromModuleAndSpec(module, &lane_spec, NULL);
	int err = type ? PyModule_AddType(module, (PyTypeObject *)type) : -1;

	Py_XDECREF(type);
	return err;
}
