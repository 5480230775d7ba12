/*
 * py_tree.c - Tree and Inode: the live tree of tree.h for Python, with the methods of ovlfs.layer.tree.Tree
 *
 * Where the core says OVL_ASK, this file asks the reference: it drops everything (the core's lock is never held out
 * here), calls ovlfs.layer.tree.resolve_name() or ovlfs.layer.merge.names() on the Layer objects, hands the answer to
 * the core, and calls the core again.
 *
 *      Tree --owns--> struct ovl_tree --borrows--> index images, descriptors
 *        |                                              ^
 *        +--owns--> layers (the Python objects) --own---+          so the layers outlive the core
 *
 * Inode is a view: the Tree and a nodeid.  Its attributes are read from the core each time, so they are always those
 * of now; ESTALE once the inode is not known any more.
 *
 * GIL: released around what may read the disk (everything that can merge or resolve) or free what was removed from it
 * (forget), kept around the rest.  A thread
 * that waits for the core's lock with the GIL held cannot deadlock: who holds that lock never wants the GIL.
 *
 * Errors: NULL or -1 with an exception set.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "lane_trace.h"
#include "module.h"
#include "tree.h"

struct tree {
	PyObject_HEAD
	struct ovl_tree *core;
	PyObject *layers;        /* sequence of Layer objects or None */
	PyObject *keep;          /* list: what the core borrows from */
	PyObject *attr_class;    /* ovlfs.layer.base.Attr */
	PyObject *source_class;  /* ovlfs.layer.merge.Source */
	PyObject *resolve_name;  /* ovlfs.layer.tree.resolve_name */
	PyObject *merge_names;   /* ovlfs.layer.merge.names */
	PyObject *devices;       /* ovlfs.layer.native.devices */
	PyObject *trace;         /* who is told of merges, or NULL */
	Py_ssize_t device_count; /* how many of them the core was told */
};

struct inode {
	PyObject_HEAD
	struct tree *tree;
	uint64_t nodeid;
};

static struct ovl_module_state *state_of(PyTypeObject *type)
{
	return PyType_GetModuleState(type);
}

static PyObject *raise_stale(void)
{
	return ovl_raise(-ESTALE);
}

/* A converter for PyArg_Parse: a whole number from 0 to 2^64 - 1. */
static int to_u64(PyObject *object, void *out)
{
	unsigned long long value = PyLong_AsUnsignedLongLong(object);

	if (value == (unsigned long long)-1 && PyErr_Occurred())
		return 0;
	*(uint64_t *)out = value;
	return 1;
}

static PyObject *bytes_of(const uint8_t *bytes, size_t len)
{
	return PyBytes_FromStringAndSize((const char *)bytes, (Py_ssize_t)len);
}

/* ---- attributes, sources and inodes from Python ------------------------------------------------------- */

/* An unsigned attribute of an object, at most `most`; false with an exception set. */
static bool take_unsigned(PyObject *object, const char *name, uint64_t most, uint64_t *out)
{
	PyObject *value = PyObject_GetAttrString(object, name);
	bool ok = value && to_u64(value, out);

	Py_XDECREF(value);
	if (ok && *out > most) {
		PyErr_Format(PyExc_OverflowError, "%s is too large", name);
		return false;
	}
	return ok;
}

static bool take_u32(PyObject *object, const char *name, uint32_t *out)
{
	uint64_t value = 0;

	if (!take_unsigned(object, name, UINT32_MAX, &value))
		return false;
	*out = (uint32_t)value;
	return true;
}

/* A time; what does not fit saturates, as everywhere. */
static bool take_ns(PyObject *object, const char *name, int64_t *out)
{
	PyObject *value = PyObject_GetAttrString(object, name);
	int overflow = 0;

	if (!value)
		return false;
	*out = PyLong_AsLongLongAndOverflow(value, &overflow);
	Py_DECREF(value);
	if (overflow)
		*out = overflow > 0 ? INT64_MAX : INT64_MIN;
	return overflow || *out != -1 || !PyErr_Occurred();
}

static bool take_bool(PyObject *object, const char *name, bool *out)
{
	PyObject *value = PyObject_GetAttrString(object, name);
	int yes = value ? PyObject_IsTrue(value) : -1;

	Py_XDECREF(value);
	*out = yes == 1;
	return yes >= 0;
}

static bool take_attr(PyObject *object, struct ovl_attr *out)
{
	*out = (struct ovl_attr){0};
	return take_u32(object, "mode", &out->mode) && take_u32(object, "nlink", &out->nlink) &&
	       take_u32(object, "uid", &out->uid) && take_u32(object, "gid", &out->gid) &&
	       take_u32(object, "rdev", &out->rdev) && take_unsigned(object, "size", UINT64_MAX, &out->size) &&
	       take_unsigned(object, "blocks", UINT64_MAX, &out->blocks) &&
	       take_ns(object, "atime_ns", &out->atime_ns) && take_ns(object, "mtime_ns", &out->mtime_ns) &&
	       take_ns(object, "ctime_ns", &out->ctime_ns);
}

/* A Source(layer, ref) of Python. */
static bool take_source(const struct ovl_stack *stack, PyObject *object, bool is_dir, struct ovl_source *out)
{
	PyObject *number = NULL, *ref = NULL;
	bool ok = false;
	long layer;

	*out = (struct ovl_source){0};
	if (!PyTuple_Check(object) || PyTuple_GET_SIZE(object) != 2) {
		PyErr_SetString(PyExc_TypeError, "a source is (layer, ref)");
		return false;
	}
	number = PyTuple_GET_ITEM(object, 0);
	ref = PyTuple_GET_ITEM(object, 1);
	layer = PyLong_AsLong(number);
	if (layer == -1 && PyErr_Occurred())
		return false;
	if (layer < 0 || (size_t)layer >= stack->count || stack->layers[layer].kind == OVL_LAYER_NONE) {
		PyErr_SetString(PyExc_ValueError, "a source of no layer of the stack");
		return false;
	}
	out->layer = (uint32_t)layer;
	if (PyLong_Check(ref) && stack->layers[layer].kind != OVL_LAYER_DIR) {
		out->ref.number = PyLong_AsLongLong(ref);
		ok = out->ref.number != -1 || !PyErr_Occurred();
	} else if (PyBytes_Check(ref) && stack->layers[layer].kind != OVL_LAYER_TAR) {
		const void *bytes = PyBytes_AS_STRING(ref);
		size_t len = (size_t)PyBytes_GET_SIZE(ref);

		ok = true;
		if (stack->layers[layer].kind == OVL_LAYER_DIR && is_dir) {
			if (len > 0) {
				out->ref.path = ovl_path_new(NULL, bytes, len);
				ok = out->ref.path;
			}
		} else {
			out->name = ovl_blob_new(bytes, len);
			ok = out->name;
		}
		if (!ok)
			PyErr_NoMemory();
	} else {
		PyErr_SetString(PyExc_TypeError, "a source that does not fit its layer");
	}
	return ok;
}

/* What ovlfs.layer.tree.Inode says.  On success `out` is the caller's. */
static bool take_inode(const struct ovl_stack *stack, PyObject *object, struct ovl_found *out)
{
	PyObject *attr = NULL, *lower = NULL;
	bool ok = false;
	size_t count;

	*out = (struct ovl_found){0};
	attr = PyObject_GetAttrString(object, "attr");
	lower = PyObject_GetAttrString(object, "lower");
	if (!attr || !lower || !take_attr(attr, &out->attr) || !take_unsigned(object, "ino", UINT64_MAX, &out->ino) ||
	    !take_unsigned(object, "upper_ino", UINT64_MAX, &out->upper_ino) ||
	    !take_bool(object, "upper", &out->upper) || !take_bool(object, "metacopy", &out->metacopy) ||
	    !take_bool(object, "redirect", &out->redirect))
		goto out;
	if (!PyTuple_Check(lower)) {
		PyErr_SetString(PyExc_TypeError, "lower is a tuple");
		goto out;
	}
	count = (size_t)PyTuple_GET_SIZE(lower);
	out->lower = count > 1 ? calloc(count, sizeof(*out->lower)) : &out->one;
	if (!out->lower) {
		PyErr_NoMemory();
		goto out;
	}
	for (size_t i = 0; i < count; i++) {
		if (!take_source(stack, PyTuple_GET_ITEM(lower, (Py_ssize_t)i), S_ISDIR(out->attr.mode), &out->lower[i]))
			goto out;
		out->lower_count++;
	}
	ok = true;
out:
	if (!ok)
		ovl_found_clear(stack, out);
	Py_XDECREF(attr);
	Py_XDECREF(lower);
	return ok;
}

/* ---- and to Python ------------------------------------------------------------------------------------ */

static PyObject *make_attr(struct tree *self, const struct ovl_attr *attr)
{
	return PyObject_CallFunction(self->attr_class, "IIIIIKKLLL", attr->mode, attr->nlink, attr->uid, attr->gid,
				     attr->rdev, (unsigned long long)attr->size, (unsigned long long)attr->blocks,
				     (long long)attr->atime_ns, (long long)attr->mtime_ns, (long long)attr->ctime_ns);
}

static PyObject *make_source(struct tree *self, const struct ovl_source_copy *source)
{
	if (source->path)
		return PyObject_CallFunction(self->source_class, "Iy#", source->layer, (const char *)source->path,
					     (Py_ssize_t)source->path_len);
	return PyObject_CallFunction(self->source_class, "IL", source->layer, (long long)source->number);
}

/* The sources below the upperdir; before them, if `path` is not NULL, the upperdir's own. */
static PyObject *make_sources(struct tree *self, const struct ovl_description *description, const uint8_t *path,
			      size_t path_len)
{
	struct ovl_source_copy upper = {.path = (uint8_t *)(uintptr_t)path, .path_len = path_len};
	Py_ssize_t first = path ? 1 : 0;
	PyObject *tuple = PyTuple_New((Py_ssize_t)description->lower_count + first);

	if (!tuple)
		return NULL;
	for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tuple); i++) {
		PyObject *source = make_source(self, i < first ? &upper : &description->lower[i - first]);

		if (!source) {
			Py_DECREF(tuple);
			return NULL;
		}
		PyTuple_SET_ITEM(tuple, i, source);
	}
	return tuple;
}

/* Everything that serves an inode, as a tuple of Source, and its path if it has one. */
static PyObject *sources_of(struct tree *self, uint64_t nodeid, PyObject **path_object)
{
	struct ovl_description description;
	PyObject *sources = NULL;
	uint8_t *path = NULL;
	size_t len = 0;
	ovl_err_t err = ovl_tree_describe(self->core, nodeid, true, &description);

	if (err)
		return ovl_raise(err);
	err = ovl_tree_path(self->core, nodeid, &path, &len);
	if (err && err != -ENOENT) {
		ovl_raise(err);
		goto out;
	}
	sources = make_sources(self, &description, description.upper ? path : NULL, len);
	if (sources && path_object) {
		*path_object = bytes_of(path ? path : (const uint8_t *)"", path ? len : 0);
		if (!*path_object)
			Py_CLEAR(sources);
	}
out:
	free(path);
	ovl_description_clear(&description);
	return sources;
}

/* ---- asking the reference ----------------------------------------------------------------------------- */

/* Tells the core of file systems that the reference has numbered meanwhile. */
static int tell_devices(struct tree *self)
{
	PyObject *devices = PyObject_CallFunctionObjArgs(self->devices, self->layers, NULL);
	PyObject *device, *number;
	Py_ssize_t at = 0;
	int result = -1;

	if (!devices)
		return -1;
	if (!PyDict_Check(devices)) {
		PyErr_SetString(PyExc_TypeError, "devices is a dict");
		goto out;
	}
	if (PyDict_GET_SIZE(devices) != self->device_count) {
		self->device_count = PyDict_GET_SIZE(devices);
		while (PyDict_Next(devices, &at, &device, &number)) {
			uint64_t key, value;

			if (!to_u64(device, &key) || !to_u64(number, &value))
				goto out;
			/* -ENOSPC only means that those of the rest are asked for each time. */
			(void)ovl_tree_add_device(self->core, key, value);
		}
	}
	result = 0;
out:
	Py_DECREF(devices);
	return result;
}

static int answer_name(struct tree *self, const struct ovl_ask *ask)
{
	PyObject *sources = NULL, *path = NULL, *name = NULL, *inode = NULL;
	struct ovl_found found;
	int result = -1;
	ovl_err_t err;

	sources = sources_of(self, ask->nodeid, &path);
	if (!sources)
		goto out;
	name = bytes_of(ask->name, ask->name_len);
	if (!name)
		goto out;
	inode = PyObject_CallFunctionObjArgs(self->resolve_name, self->layers, sources, name, path, NULL);
	if (!inode || tell_devices(self) < 0)
		goto out;
	if (inode != Py_None && !take_inode(ovl_tree_stack(self->core), inode, &found))
		goto out;
	err = ovl_tree_adopt(self->core, ask->nodeid, ask->name, ask->name_len, inode == Py_None ? NULL : &found);
	if (err)
		ovl_raise(err);
	else
		result = 0;
out:
	Py_XDECREF(sources);
	Py_XDECREF(path);
	Py_XDECREF(name);
	Py_XDECREF(inode);
	return result;
}

static int answer_names(struct tree *self, const struct ovl_ask *ask)
{
	PyObject *sources = NULL, *names = NULL, *iterator = NULL, *name;
	struct ovl_tree_names_in *in = NULL;
	int result = -1;
	ovl_err_t err;

	sources = sources_of(self, ask->nodeid, NULL);
	if (!sources)
		goto out;
	names = PyObject_CallFunctionObjArgs(self->merge_names, self->layers, sources, NULL);
	if (!names)
		goto out;
	iterator = PyObject_GetIter(names);
	if (!iterator)
		goto out;
	err = ovl_tree_adopt_begin(&in);
	while (!err && (name = PyIter_Next(iterator)) != NULL) {
		if (PyBytes_Check(name))
			err = ovl_tree_adopt_name(in, (const uint8_t *)PyBytes_AS_STRING(name),
						  (size_t)PyBytes_GET_SIZE(name));
		else
			err = -EINVAL;
		Py_DECREF(name);
	}
	if (!err && !PyErr_Occurred()) {
		err = ovl_tree_adopt_end(self->core, ask->nodeid, in, true);
		in = NULL;
		result = err ? -1 : 0;
	}
	if (err && !PyErr_Occurred())
		ovl_raise(err);
out:
	if (in)
		(void)ovl_tree_adopt_end(self->core, 0, in, false);
	Py_XDECREF(sources);
	Py_XDECREF(names);
	Py_XDECREF(iterator);
	return result;
}

/* What to do after a call of the core: 1: the reference has answered, call again; 0: it is done (or failed with an
 * errno that is the caller's to raise); -1: an exception is set. */
static int answer(struct tree *self, ovl_err_t err, const struct ovl_ask *ask)
{
	int result = 0;

	if (err == OVL_ASK)
		result = answer_name(self, ask);
	else if (err == OVL_ASK_NAMES)
		result = answer_names(self, ask);
	else
		return 0;
	return result < 0 ? -1 : 1;
}

/* Calls the core, without the GIL, until it asks no more.  Leaves the function with NULL if the answer raised. */
#define CALL(self, err, ask, expression)                  \
	do {                                              \
		int again_;                               \
							  \
		do {                                      \
			Py_BEGIN_ALLOW_THREADS            \
			(err) = (expression);             \
			Py_END_ALLOW_THREADS              \
			again_ = answer(self, err, &ask); \
		} while (again_ == 1);                    \
		if (again_ < 0)                           \
			return NULL;                      \
	} while (0)

/* ---- Tree: life --------------------------------------------------------------------------------------- */

static const struct ovl_index *index_of(PyTypeObject *type, PyObject *object)
{
	return ovl_index_from_object(PyType_GetModule(type), object);
}

/* What the glue says of a layer: None (only the reference can ask it), (index, ino of inode 0, fd, offset, identity), or
 * (fd, trusted first?, how many namespaces, oci, override). */
static int take_layer(PyTypeObject *type, PyObject *layer, PyObject *said, struct ovl_layer *out)
{
	static const char *const namespaces[2] = {"trusted.overlay.", "user.overlay."};
	int fd, first, count, oci, override;
	unsigned long long base, offset, dev, ino, size;
	long long mtime;
	PyObject *index;

	if (layer == Py_None) {
		out->kind = OVL_LAYER_NONE;
		return 0;
	}
	out->kind = OVL_LAYER_FOREIGN;
	if (said == Py_None)
		return 0;
	if (!PyTuple_Check(said)) {
		PyErr_SetString(PyExc_TypeError, "a layer's description is a tuple");
		return -1;
	}
	if (PyTuple_GET_SIZE(said) == 5 && PyTuple_Check(PyTuple_GET_ITEM(said, 4))) {
		if (!PyArg_ParseTuple(said, "OKiK(KKKL)", &index, &base, &out->data_fd, &offset, &dev, &ino, &size, &mtime))
			return -1;
		out->data_offset = offset;
		out->data_dev = dev;
		out->data_ino = ino;
		out->data_size = size;
		out->data_mtime_ns = mtime;
		out->index = index_of(type, index);
		out->ino_base = base;
		out->kind = OVL_LAYER_TAR;
		return out->index ? 0 : -1;
	}
	if (!PyArg_ParseTuple(said, "iiipp", &fd, &first, &count, &oci, &override))
		return -1;
	if (first < 0 || first > 1 || count < 0 || count > 2) {
		PyErr_SetString(PyExc_ValueError, "there are two namespaces");
		return -1;
	}
	out->kind = OVL_LAYER_DIR;
	out->dir = (struct ovl_dirlayer){
		.root = fd,
		.oci = oci,
		.override = override,
		.prefix_count = (size_t)count,
		.prefix = {namespaces[first], namespaces[1 - first]},
	};
	return 0;
}

/* Imports `module`, and puts its attribute `name` into `*out`. */
static int import_name(const char *module, const char *name, PyObject **out)
{
	PyObject *imported = PyImport_ImportModule(module);

	if (!imported)
		return -1;
	*out = PyObject_GetAttrString(imported, name);
	Py_DECREF(imported);
	return *out ? 0 : -1;
}

/* Makes the core.  The glue is ovlfs/layer/native.py: describe(layers) -> (root, upper_device, one description per
 * layer). */
static int tree_build(PyTypeObject *type, struct tree *self)
{
	PyObject *describe = NULL, *said = NULL, *root, *each;
	struct ovl_stack stack = {0};
	struct ovl_found found = {0};
	unsigned long long upper_device;
	PyObject *fast = NULL;
	int result = -1;
	ovl_err_t err;

	if (import_name("ovlfs.layer.base", "Attr", &self->attr_class) < 0 ||
	    import_name("ovlfs.layer.merge", "Source", &self->source_class) < 0 ||
	    import_name("ovlfs.layer.merge", "names", &self->merge_names) < 0 ||
	    import_name("ovlfs.layer.tree", "resolve_name", &self->resolve_name) < 0 ||
	    import_name("ovlfs.layer.native", "devices", &self->devices) < 0 ||
	    import_name("ovlfs.layer.native", "describe", &describe) < 0)
		goto out;
	fast = PySequence_Fast(self->layers, "a stack is a sequence of layers");
	if (!fast)
		goto out;
	said = PyObject_CallFunctionObjArgs(describe, self->layers, NULL);
	if (!said)
		goto out;
	if (!PyArg_ParseTuple(said, "OKO!", &root, &upper_device, &PyList_Type, &each))
		goto out;
	stack.count = (size_t)PySequence_Fast_GET_SIZE(fast);
	stack.upper_device = upper_device;
	if (stack.count == 0 || (size_t)PyList_GET_SIZE(each) != stack.count) {
		PyErr_SetString(PyExc_ValueError, "a stack has an upperdir, or None, and layers");
		goto out;
	}
	self->keep = each;
	Py_INCREF(each);
	stack.layers = calloc(stack.count, sizeof(*stack.layers));
	if (!stack.layers) {
		PyErr_NoMemory();
		goto out;
	}
	for (size_t i = 0; i < stack.count; i++)
		if (take_layer(type, PySequence_Fast_GET_ITEM(fast, i), PyList_GET_ITEM(each, i), &stack.layers[i]) < 0)
			goto out;
	if (!take_inode(&stack, root, &found))
		goto out;
	err = ovl_tree_new(&stack, &found, &self->core);
	if (err) {
		ovl_found_clear(&stack, &found);
		ovl_raise(err);
		goto out;
	}
	stack.layers = NULL;
	result = tell_devices(self);
out:
	free(stack.layers);
	Py_XDECREF(fast);
	Py_XDECREF(said);
	Py_XDECREF(describe);
	return result;
}

static PyObject *tree_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
	static char *names[] = {"layers", NULL};
	struct tree *self;
	PyObject *layers;

	if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O:Tree", names, &layers))
		return NULL;
	self = (struct tree *)type->tp_alloc(type, 0);
	if (!self)
		return NULL;
	Py_INCREF(layers);
	self->layers = layers;
	if (tree_build(type, self) < 0) {
		Py_DECREF(self);
		return NULL;
	}
	return (PyObject *)self;
}

static int tree_traverse(PyObject *object, visitproc visit, void *arg)
{
	struct tree *self = (struct tree *)object;

	Py_VISIT(Py_TYPE(object));
	Py_VISIT(self->layers);
	Py_VISIT(self->keep);
	Py_VISIT(self->attr_class);
	Py_VISIT(self->source_class);
	Py_VISIT(self->resolve_name);
	Py_VISIT(self->merge_names);
	Py_VISIT(self->devices);
	Py_VISIT(self->trace);
	return 0;
}

/* No tp_clear: the core reads what the layers own until the end.  Layers do not refer to trees. */
static void tree_dealloc(PyObject *object)
{
	struct tree *self = (struct tree *)object;
	PyTypeObject *type = Py_TYPE(object);

	PyObject_GC_UnTrack(object);
	ovl_tree_free(self->core);
	Py_XDECREF(self->layers);
	Py_XDECREF(self->keep);
	Py_XDECREF(self->attr_class);
	Py_XDECREF(self->source_class);
	Py_XDECREF(self->resolve_name);
	Py_XDECREF(self->merge_names);
	Py_XDECREF(self->devices);
	Py_XDECREF(self->trace);
	type->tp_free(object);
	Py_DECREF(type);
}

/* ---- Inode -------------------------------------------------------------------------------------------- */

static PyObject *make_inode(struct tree *self, uint64_t nodeid)
{
	PyTypeObject *type = state_of(Py_TYPE(self))->inode_type;
	struct inode *inode = (struct inode *)type->tp_alloc(type, 0);

	if (!inode)
		return NULL;
	Py_INCREF(self);
	inode->tree = self;
	inode->nodeid = nodeid;
	return (PyObject *)inode;
}

static int inode_traverse(PyObject *object, visitproc visit, void *arg)
{
	Py_VISIT(Py_TYPE(object));
	Py_VISIT(((struct inode *)object)->tree);
	return 0;
}

static int inode_clear(PyObject *object)
{
	Py_CLEAR(((struct inode *)object)->tree);
	return 0;
}

static void inode_dealloc(PyObject *object)
{
	PyTypeObject *type = Py_TYPE(object);

	PyObject_GC_UnTrack(object);
	inode_clear(object);
	type->tp_free(object);
	Py_DECREF(type);
}

/* Which attribute a getter is for. */
enum field { INO, ATTR, UPPER, LOWER, METACOPY, REDIRECT, UPPER_INO, NLOOKUP, IS_DIR, IS_LINKED };

static PyObject *inode_get(PyObject *object, void *closure)
{
	struct inode *self = (struct inode *)object;
	enum field field = (enum field)(uintptr_t)closure;
	struct ovl_description description = {0};
	PyObject *result = NULL;
	ovl_err_t err;

	if (!self->tree)
		return raise_stale();
	if (field == ATTR)
		err = ovl_tree_get(self->tree->core, self->nodeid, &description.entry);
	else
		err = ovl_tree_describe(self->tree->core, self->nodeid, field == LOWER, &description);
	if (err)
		return ovl_raise(err);
	switch (field) {
	case INO:
		result = PyLong_FromUnsignedLongLong(description.entry.ino);
		break;
	case ATTR:
		result = make_attr(self->tree, &description.entry.attr);
		break;
	case UPPER:
		result = PyBool_FromLong(description.upper);
		break;
	case LOWER:
		result = make_sources(self->tree, &description, NULL, 0);
		break;
	case METACOPY:
		result = PyBool_FromLong(description.metacopy);
		break;
	case REDIRECT:
		result = PyBool_FromLong(description.redirect);
		break;
	case UPPER_INO:
		result = PyLong_FromUnsignedLongLong(description.upper_ino);
		break;
	case NLOOKUP:
		result = PyLong_FromUnsignedLongLong(description.nlookup);
		break;
	case IS_DIR:
		result = PyBool_FromLong(S_ISDIR(description.entry.attr.mode));
		break;
	case IS_LINKED:
		result = PyBool_FromLong(description.is_linked);
		break;
	}
	ovl_description_clear(&description);
	return result;
}

static PyObject *inode_nodeid(PyObject *object, void *Py_UNUSED(closure))
{
	return PyLong_FromUnsignedLongLong(((struct inode *)object)->nodeid);
}

static PyObject *inode_compare(PyObject *a, PyObject *b, int operation)
{
	struct inode *one = (struct inode *)a, *other = (struct inode *)b;
	bool same;

	if ((operation != Py_EQ && operation != Py_NE) || Py_TYPE(a) != Py_TYPE(b))
		Py_RETURN_NOTIMPLEMENTED;
	same = one->tree == other->tree && one->nodeid == other->nodeid;
	return PyBool_FromLong(same == (operation == Py_EQ));
}

static Py_hash_t inode_hash(PyObject *object)
{
	struct inode *self = (struct inode *)object;
	Py_hash_t hash = (Py_hash_t)(self->nodeid ^ (uintptr_t)self->tree >> 4);

	return hash == -1 ? -2 : hash;
}

static PyObject *inode_repr(PyObject *object)
{
	return PyUnicode_FromFormat("<ovlfs._native.Inode %llu>", (unsigned long long)((struct inode *)object)->nodeid);
}

#define FIELD(name, number, doc) {name, inode_get, NULL, doc, (void *)(uintptr_t)(number)}

static PyGetSetDef inode_getset[] = {
	{"nodeid", inode_nodeid, NULL, "Names the inode in FUSE messages.", NULL},
	FIELD("ino", INO, "The st_ino to show."),
	FIELD("attr", ATTR, "The attributes to show."),
	FIELD("upper", UPPER, "Whether the upperdir has it."),
	FIELD("lower", LOWER, "The sources below the upperdir."),
	FIELD("metacopy", METACOPY, "Whether the data is in `lower` while the rest is in the upperdir."),
	FIELD("redirect", REDIRECT, "Whether the upper object carries overlay.redirect."),
	FIELD("upper_ino", UPPER_INO, "The real inode number in the upperdir, 0 without."),
	FIELD("nlookup", NLOOKUP, "How many times the kernel was told of it and has not forgotten."),
	FIELD("is_dir", IS_DIR, "Whether it is a directory."),
	FIELD("is_linked", IS_LINKED, "Whether it still has a name."),
	{NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot inode_slots[] = {
	{Py_tp_doc, "One inode of a Tree as it is now.  OSError(ESTALE) once it is known no longer."},
	{Py_tp_traverse, (void *)inode_traverse},
	{Py_tp_clear, (void *)inode_clear},
	{Py_tp_dealloc, (void *)inode_dealloc},
	{Py_tp_getset, inode_getset},
	{Py_tp_richcompare, (void *)inode_compare},
	{Py_tp_hash, (void *)inode_hash},
	{Py_tp_repr, (void *)inode_repr},
	{0, NULL},
};

static PyType_Spec inode_spec = {
	.name = "ovlfs._native.Inode",
	.basicsize = sizeof(struct inode),
	.flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_DISALLOW_INSTANTIATION,
	.slots = inode_slots,
};

/* ---- Tree: reading ------------------------------------------------------------------------------------ */

static PyObject *tree_get(PyObject *object, PyObject *number)
{
	struct tree *self = (struct tree *)object;
	struct ovl_entry entry;
	uint64_t nodeid;

	if (!to_u64(number, &nodeid))
		return NULL;
	if (ovl_tree_get(self->core, nodeid, &entry))
		return raise_stale();
	return make_inode(self, nodeid);
}

/* A name as bytes; any length, as a directory simply does not have it. */
struct name {
	const uint8_t *bytes;
	size_t len;
};

static int to_name(PyObject *object, void *out)
{
	struct name *name = out;

	if (!PyBytes_Check(object)) {
		PyErr_Format(PyExc_TypeError, "a name is bytes, not %.100s", Py_TYPE(object)->tp_name);
		return 0;
	}
	name->bytes = (const uint8_t *)PyBytes_AS_STRING(object);
	name->len = (size_t)PyBytes_GET_SIZE(object);
	return 1;
}

static PyObject *tree_lookup(PyObject *object, PyObject *const *args, Py_ssize_t count)
{
	struct tree *self = (struct tree *)object;
	struct ovl_entry entry;
	struct ovl_ask ask;
	struct name name;
	uint64_t parent;
	ovl_err_t err;

	if (count != 2) {
		PyErr_SetString(PyExc_TypeError, "lookup(parent: int, name: bytes)");
		return NULL;
	}
	if (!to_u64(args[0], &parent) || !to_name(args[1], &name))
		return NULL;
	CALL(self, err, ask, ovl_tree_lookup(self->core, parent, name.bytes, name.len, false, &entry, &ask));
	return err ? ovl_raise(err) : PyLong_FromUnsignedLongLong(entry.nodeid);
}

/* What a list has given so far: items, and their names one after the other. */
struct listed {
	struct listed_item {
		uint64_t cookie;
		uint64_t nodeid;
		size_t at;
		size_t len;
	} *items;
	uint8_t *names;
	size_t count, room;
	size_t used, size;
	bool no_memory;
};

static bool list_emit(void *arg, uint64_t cookie, const uint8_t *name, size_t len, const struct ovl_entry *entry)
{
	struct listed *listed = arg;

	if (listed->count == listed->room) {
		size_t room = listed->room ? listed->room * 2 : 64;
		void *items = reallocarray(listed->items, room, sizeof(*listed->items));

		if (!items)
			goto fail;
		listed->items = items;
		listed->room = room;
	}
	if (listed->size - listed->used < len) {
		size_t size = (listed->size ? listed->size * 2 : 1024) + len;
		void *names = realloc(listed->names, size);

		if (!names)
			goto fail;
		listed->names = names;
		listed->size = size;
	}
	memcpy(listed->names + listed->used, name, len);
	listed->items[listed->count++] = (struct listed_item){cookie, entry->nodeid, listed->used, len};
	listed->used += len;
	return true;
fail:
	listed->no_memory = true;
	return false;
}

/* Lists without the GIL, going on where the reference had to be asked.  -1 with an exception set. */
static int list_all(struct tree *self, uint64_t nodeid, uint64_t after, size_t most, struct listed *listed)
{
	struct ovl_ask ask;
	ovl_err_t err;
	int again;

	do {
		if (listed->count > 0)
			after = listed->items[listed->count - 1].cookie;
		Py_BEGIN_ALLOW_THREADS
		err = ovl_tree_list(self->core, nodeid, after, most - listed->count, list_emit, listed, &ask);
		Py_END_ALLOW_THREADS
		again = answer(self, err, &ask);
	} while (again == 1);
	if (again < 0)
		return -1;
	if (listed->no_memory)
		err = -ENOMEM;
	if (err)
		ovl_raise(err);
	return err ? -1 : 0;
}

static PyObject *tree_list(PyObject *object, PyObject *args, PyObject *kwargs)
{
	static char *names[] = {"nodeid", "after", "most", NULL};
	struct tree *self = (struct tree *)object;
	struct listed listed = {0};
	PyObject *result = NULL;
	long long most = 1 << 30, after;
	uint64_t nodeid;

	if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O&L|L:list", names, to_u64, &nodeid, &after, &most))
		return NULL;
	if (list_all(self, nodeid, after < 0 ? 0 : (uint64_t)after, most < 0 ? 0 : (size_t)most, &listed) < 0)
		goto out;
	result = PyList_New((Py_ssize_t)listed.count);
	for (size_t i = 0; result && i < listed.count; i++) {
		const struct listed_item *item = &listed.items[i];
		PyObject *tuple = Py_BuildValue("Ky#K", (unsigned long long)item->cookie,
						(const char *)listed.names + item->at, (Py_ssize_t)item->len,
						(unsigned long long)item->nodeid);

		if (tuple)
			PyList_SET_ITEM(result, (Py_ssize_t)i, tuple);
		else
			Py_CLEAR(result);
	}
out:
	free(listed.items);
	free(listed.names);
	return result;
}

static PyObject *tree_is_empty(PyObject *object, PyObject *number)
{
	struct tree *self = (struct tree *)object;
	struct listed listed = {0};
	uint64_t nodeid;
	int failed;

	if (!to_u64(number, &nodeid))
		return NULL;
	failed = list_all(self, nodeid, 0, 1, &listed);
	free(listed.items);
	free(listed.names);
	return failed ? NULL : PyBool_FromLong(listed.count == 0);
}

static PyObject *tree_path(PyObject *object, PyObject *number)
{
	struct tree *self = (struct tree *)object;
	PyObject *result;
	uint64_t nodeid;
	uint8_t *path;
	size_t len;
	ovl_err_t err;

	if (!to_u64(number, &nodeid))
		return NULL;
	err = ovl_tree_path(self->core, nodeid, &path, &len);
	if (err == -ENOENT)
		Py_RETURN_NONE;
	if (err)
		return ovl_raise(err);
	result = bytes_of(path, len);
	free(path);
	return result;
}

static PyObject *tree_names(PyObject *object, PyObject *number)
{
	struct tree *self = (struct tree *)object;
	struct ovl_tree_name *names;
	PyObject *result;
	uint64_t nodeid;
	size_t count;
	ovl_err_t err;

	if (!to_u64(number, &nodeid))
		return NULL;
	err = ovl_tree_names(self->core, nodeid, &names, &count);
	if (err)
		return ovl_raise(err);
	result = PyList_New((Py_ssize_t)count);
	for (size_t i = 0; result && i < count; i++) {
		PyObject *tuple = Py_BuildValue("Ky#", (unsigned long long)names[i].parent, (const char *)names[i].name,
						(Py_ssize_t)names[i].len);

		if (tuple)
			PyList_SET_ITEM(result, (Py_ssize_t)i, tuple);
		else
			Py_CLEAR(result);
	}
	free(names);
	return result;
}

static PyObject *tree_sources(PyObject *object, PyObject *inode)
{
	struct tree *self = (struct tree *)object;
	uint64_t nodeid;

	if (!take_unsigned(inode, "nodeid", UINT64_MAX, &nodeid))
		return NULL;
	return sources_of(self, nodeid, NULL);
}

static Py_ssize_t tree_length(PyObject *object)
{
	return (Py_ssize_t)ovl_tree_count(((struct tree *)object)->core);
}

static PyObject *tree_iter(PyObject *object)
{
	struct tree *self = (struct tree *)object;
	PyObject *list, *iterator;
	uint64_t *nodeids;
	size_t count;
	ovl_err_t err = ovl_tree_nodeids(self->core, &nodeids, &count);

	if (err)
		return ovl_raise(err);
	list = PyList_New((Py_ssize_t)count);
	for (size_t i = 0; list && i < count; i++) {
		PyObject *inode = make_inode(self, nodeids[i]);

		if (inode)
			PyList_SET_ITEM(list, (Py_ssize_t)i, inode);
		else
			Py_CLEAR(list);
	}
	free(nodeids);
	if (!list)
		return NULL;
	iterator = PyObject_GetIter(list);
	Py_DECREF(list);
	return iterator;
}

/* ---- Tree: mutations ---------------------------------------------------------------------------------- */

/* A precondition that the caller broke: as the reference's assert. */
static PyObject *raise_exists(ovl_err_t err)
{
	if (err != -EEXIST)
		return ovl_raise(err);
	PyErr_SetString(PyExc_AssertionError, "the directory has the name already");
	return NULL;
}

static PyObject *tree_add(PyObject *object, PyObject *args, PyObject *kwargs)
{
	static char *names[] = {"parent", "name", "attr", "upper_ino", "ino", NULL};
	struct tree *self = (struct tree *)object;
	uint64_t parent, upper_ino, ino, nodeid = 0;
	PyObject *attr_object;
	struct ovl_attr attr;
	struct ovl_ask ask;
	struct name name;
	ovl_err_t err;

	if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O&O&OO&O&:add", names, to_u64, &parent, to_name, &name,
					 &attr_object, to_u64, &upper_ino, to_u64, &ino) ||
	    !take_attr(attr_object, &attr))
		return NULL;
	CALL(self, err, ask,
	     ovl_tree_add(self->core, parent, name.bytes, name.len, &attr, upper_ino, ino, &nodeid, &ask));
	return err ? raise_exists(err) : PyLong_FromUnsignedLongLong(nodeid);
}

static PyObject *tree_link(PyObject *object, PyObject *args, PyObject *kwargs)
{
	static char *names[] = {"nodeid", "parent", "name", NULL};
	struct tree *self = (struct tree *)object;
	uint64_t nodeid, parent;
	struct ovl_ask ask;
	struct name name;
	ovl_err_t err;

	if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O&O&O&:link", names, to_u64, &nodeid, to_u64, &parent, to_name,
					 &name))
		return NULL;
	CALL(self, err, ask, ovl_tree_link(self->core, nodeid, parent, name.bytes, name.len, &ask));
	if (err)
		return raise_exists(err);
	Py_RETURN_NONE;
}

static PyObject *tree_remove(PyObject *object, PyObject *args, PyObject *kwargs)
{
	static char *names[] = {"parent", "name", NULL};
	struct tree *self = (struct tree *)object;
	struct ovl_ask ask;
	struct name name;
	uint64_t parent;
	ovl_err_t err;

	if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O&O&:remove", names, to_u64, &parent, to_name, &name))
		return NULL;
	CALL(self, err, ask, ovl_tree_remove(self->core, parent, name.bytes, name.len, &ask));
	if (err == OVL_ABSENT) {
		PyErr_SetObject(PyExc_KeyError, PyTuple_Check(args) && PyTuple_GET_SIZE(args) > 1
							? PyTuple_GET_ITEM(args, 1)
							: Py_None);
		return NULL;
	}
	if (err)
		return ovl_raise(err);
	Py_RETURN_NONE;
}

typedef ovl_err_t (*mover)(struct ovl_tree *, uint64_t, const uint8_t *, size_t, uint64_t, const uint8_t *, size_t,
			   struct ovl_ask *);

static PyObject *move_with(PyObject *object, PyObject *args, PyObject *kwargs, mover move)
{
	static char *names[] = {"parent", "name", "new_parent", "new_name", NULL};
	struct tree *self = (struct tree *)object;
	struct name name, new_name;
	uint64_t parent, new_parent;
	struct ovl_ask ask;
	ovl_err_t err;

	if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O&O&O&O&", names, to_u64, &parent, to_name, &name, to_u64,
					 &new_parent, to_name, &new_name))
		return NULL;
	CALL(self, err, ask,
	     move(self->core, parent, name.bytes, name.len, new_parent, new_name.bytes, new_name.len, &ask));
	if (err)
		return ovl_raise(err);
	Py_RETURN_NONE;
}

static PyObject *tree_move(PyObject *object, PyObject *args, PyObject *kwargs)
{
	return move_with(object, args, kwargs, ovl_tree_move);
}

static PyObject *tree_exchange(PyObject *object, PyObject *args, PyObject *kwargs)
{
	return move_with(object, args, kwargs, ovl_tree_exchange);
}

static PyObject *none_or_raise(ovl_err_t err)
{
	if (err)
		return ovl_raise(err);
	Py_RETURN_NONE;
}

static PyObject *tree_set_upper(PyObject *object, PyObject *args, PyObject *kwargs)
{
	static char *names[] = {"nodeid", "upper_ino", "metacopy", NULL};
	struct tree *self = (struct tree *)object;
	uint64_t nodeid, upper_ino;
	int metacopy = -1;

	if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O&O&$p:set_upper", names, to_u64, &nodeid, to_u64, &upper_ino,
					 &metacopy))
		return NULL;
	if (metacopy < 0) {
		PyErr_SetString(PyExc_TypeError, "set_upper() needs the keyword metacopy");
		return NULL;
	}
	return none_or_raise(ovl_tree_set_upper(self->core, nodeid, upper_ino, metacopy));
}

static PyObject *tree_set_redirect(PyObject *object, PyObject *number)
{
	uint64_t nodeid;

	if (!to_u64(number, &nodeid))
		return NULL;
	return none_or_raise(ovl_tree_set_redirect(((struct tree *)object)->core, nodeid));
}

static PyObject *tree_set_attr(PyObject *object, PyObject *args, PyObject *kwargs)
{
	static char *names[] = {"nodeid", "attr", NULL};
	struct tree *self = (struct tree *)object;
	PyObject *attr_object;
	struct ovl_attr attr;
	uint64_t nodeid;

	if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O&O:set_attr", names, to_u64, &nodeid, &attr_object) ||
	    !take_attr(attr_object, &attr))
		return NULL;
	return none_or_raise(ovl_tree_set_attr(self->core, nodeid, &attr));
}

static PyObject *tree_ref(PyObject *object, PyObject *number)
{
	uint64_t nodeid;

	if (!to_u64(number, &nodeid))
		return NULL;
	return none_or_raise(ovl_tree_ref(((struct tree *)object)->core, nodeid));
}

static PyObject *tree_forget(PyObject *object, PyObject *args, PyObject *kwargs)
{
	static char *names[] = {"nodeid", "nlookup", NULL};
	uint64_t nodeid, nlookup;
	bool gone;

	if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O&O&:forget", names, to_u64, &nodeid, to_u64, &nlookup))
		return NULL;
	Py_BEGIN_ALLOW_THREADS
	ovl_tree_forget(((struct tree *)object)->core, nodeid, nlookup, &gone);
	Py_END_ALLOW_THREADS
	return PyBool_FromLong(gone);
}

static PyObject *tree_set_orphan(PyObject *object, PyObject *args)
{
	uint64_t nodeid;
	int fd;

	if (!PyArg_ParseTuple(args, "O&i:set_orphan", to_u64, &nodeid, &fd))
		return NULL;
	return none_or_raise(ovl_tree_set_orphan(((struct tree *)object)->core, nodeid, fd));
}

static PyObject *tree_orphan(PyObject *object, PyObject *number)
{
	uint64_t nodeid;
	int fd;

	if (!to_u64(number, &nodeid))
		return NULL;
	fd = ovl_tree_orphan(((struct tree *)object)->core, nodeid);
	if (fd < 0)
		Py_RETURN_NONE;
	return PyLong_FromLong(fd);
}

static PyObject *tree_set_last_parent(PyObject *object, PyObject *args)
{
	uint64_t nodeid, parent;

	if (!PyArg_ParseTuple(args, "O&O&:set_last_parent", to_u64, &nodeid, to_u64, &parent))
		return NULL;
	return none_or_raise(ovl_tree_set_last_parent(((struct tree *)object)->core, nodeid, parent));
}

static PyObject *tree_last_parent(PyObject *object, PyObject *number)
{
	uint64_t nodeid, parent;

	if (!to_u64(number, &nodeid))
		return NULL;
	parent = ovl_tree_last_parent(((struct tree *)object)->core, nodeid);
	if (!parent)
		Py_RETURN_NONE;
	return PyLong_FromUnsignedLongLong(parent);
}

static PyObject *tree_check(PyObject *object, PyObject *Py_UNUSED(unused))
{
	const char *what;

	if (ovl_tree_check(((struct tree *)object)->core, &what)) {
		PyErr_SetString(PyExc_AssertionError, what);
		return NULL;
	}
	Py_RETURN_NONE;
}

static PyObject *tree_counts(PyObject *object, PyObject *Py_UNUSED(unused))
{
	struct ovl_tree_counts counts;

	ovl_tree_counts(((struct tree *)object)->core, &counts);
	return Py_BuildValue("nnn", (Py_ssize_t)counts.inodes, (Py_ssize_t)counts.merged, (Py_ssize_t)counts.names);
}

static PyObject *tree_tell_merged(PyObject *object, PyObject *trace)
{
	struct tree *self = (struct tree *)object;
	struct ovl_lane_trace *told = ovl_trace_from_object(PyType_GetModule(Py_TYPE(self)), trace);

	if (!told)
		return NULL;
	ovl_tree_tell_merged(self->core, ovl_lane_trace_merge, told);
	Py_INCREF(trace);
	Py_XSETREF(self->trace, trace);
	Py_RETURN_NONE;
}

static PyObject *tree_layers(PyObject *object, void *Py_UNUSED(closure))
{
	struct tree *self = (struct tree *)object;

	Py_INCREF(self->layers);
	return self->layers;
}

#define WITH_KEYWORDS(function) ((PyCFunction)(void (*)(void))(function)), METH_VARARGS | METH_KEYWORDS

static PyMethodDef tree_methods[] = {
	{"get", tree_get, METH_O, "get(nodeid) -> Inode; ESTALE"},
	{"lookup", (PyCFunction)(void (*)(void))tree_lookup, METH_FASTCALL, "lookup(parent, name) -> nodeid or 0"},
	{"list", WITH_KEYWORDS(tree_list), "list(nodeid, after, most) -> [(cookie, name, nodeid)]"},
	{"is_empty", tree_is_empty, METH_O, "is_empty(nodeid) -> bool"},
	{"path", tree_path, METH_O, "path(nodeid) -> bytes or None"},
	{"names", tree_names, METH_O, "names(nodeid) -> [(nodeid of the directory, name)]"},
	{"sources", tree_sources, METH_O, "sources(inode) -> (Source, ...)"},
	{"add", WITH_KEYWORDS(tree_add), "add(parent, name, attr, upper_ino, ino) -> nodeid"},
	{"link", WITH_KEYWORDS(tree_link), "link(nodeid, parent, name)"},
	{"remove", WITH_KEYWORDS(tree_remove), "remove(parent, name)"},
	{"move", WITH_KEYWORDS(tree_move), "move(parent, name, new_parent, new_name)"},
	{"exchange", WITH_KEYWORDS(tree_exchange), "exchange(parent, name, new_parent, new_name)"},
	{"set_upper", WITH_KEYWORDS(tree_set_upper), "set_upper(nodeid, upper_ino, *, metacopy)"},
	{"set_redirect", tree_set_redirect, METH_O, "set_redirect(nodeid)"},
	{"set_attr", WITH_KEYWORDS(tree_set_attr), "set_attr(nodeid, attr)"},
	{"ref", tree_ref, METH_O, "ref(nodeid)"},
	{"forget", WITH_KEYWORDS(tree_forget), "forget(nodeid, nlookup) -> bool"},
	{"set_orphan", tree_set_orphan, METH_VARARGS, "set_orphan(nodeid, fd): takes over the descriptor"},
	{"orphan", tree_orphan, METH_O, "orphan(nodeid) -> descriptor or None"},
	{"set_last_parent", tree_set_last_parent, METH_VARARGS, "set_last_parent(nodeid, parent)"},
	{"last_parent", tree_last_parent, METH_O, "last_parent(nodeid) -> nodeid or None"},
	{"counts", tree_counts, METH_NOARGS, "counts() -> (inodes, merged directories, names in those)"},
	{"tell_merged", tree_tell_merged, METH_O, "tell_merged(trace): a Trace that is told of each merge"},
	{"check", tree_check, METH_NOARGS, "check(): AssertionError if an invariant does not hold; for tests"},
	{NULL, NULL, 0, NULL},
};

static PyGetSetDef tree_getset[] = {
	{"layers", tree_layers, NULL, "The stack.", NULL},
	{NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot tree_slots[] = {
	{Py_tp_doc, "Tree(layers)\n--\n\nThe live tree over a stack of layers; see ovlfs.layer.tree.Tree."},
	{Py_tp_new, (void *)tree_new},
	{Py_tp_traverse, (void *)tree_traverse},
	{Py_tp_dealloc, (void *)tree_dealloc},
	{Py_tp_methods, tree_methods},
	{Py_tp_getset, tree_getset},
	{Py_tp_iter, (void *)tree_iter},
	{Py_mp_length, (void *)tree_length},
	{0, NULL},
};

static PyType_Spec tree_spec = {
	.name = "ovlfs._native.Tree",
	.basicsize = sizeof(struct tree),
	.flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
	.slots = tree_slots,
};

struct ovl_tree *ovl_tree_from_object(PyObject *module, PyObject *object)
{
	if (!PyObject_TypeCheck(object, ovl_module_state(module)->tree_type)) {
		PyErr_Format(PyExc_TypeError, "a native Tree is expected, not %.100s", Py_TYPE(object)->tp_name);
		return NULL;
	}
	return ((struct tree *)object)->core;
}

int ovl_add_tree(PyObject *module)
{
	struct ovl_module_state *state = ovl_module_state(module);

	state->tree_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &tree_spec, NULL);
	if (!state->tree_type || PyModule_AddType(module, state->tree_type) < 0)
		return -1;
	state->inode_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &inode_spec, NULL);
	if (!state->inode_type || PyModule_AddType(module, state->inode_type) < 0)
		return -1;
	return 0;
}
