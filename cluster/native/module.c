/* Module expertmesh_native: what the data plane does for every layer, natively. */
#include "native.h"

#define ENTRY(name, where) \
    {#name, (PyCFunction)(void (*)(void))native_##name, METH_FASTCALL, "See " where "."}

static PyMethodDef functions[] = {
    ENTRY(slots, "router.rows.slots_of"),
    ENTRY(route, "router.rows.route"),
    ENTRY(gather, "router.rows.gather"),
    ENTRY(combine, "router.combine"),
    ENTRY(pack, "cluster.frames.encode"),
    ENTRY(decode, "cluster.frames.decode"),
    ENTRY(view, "cluster.tensors.to_bytes"),
    ENTRY(pieces, "cluster.tensors.pieces_of"),
    ENTRY(send, "cluster.stream.channel.Channel.send"),
    ENTRY(receive, "cluster.stream.channel.Channel.receive"),
    ENTRY(is_wide, "router.decoding.can_attend_cached"),
    ENTRY(attend, "router.decoding.attend_cached"),
    ENTRY(rotate, "router.attention"),
    ENTRY(store, "router.cache"),
    ENTRY(normalise, "router.norms"),
    ENTRY(may_tile, "experts.tiled"),
    ENTRY(tiled_ffns, "experts.tiled"),
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "expertmesh_native", "The data plane, natively.", -1, functions,
};

PyMODINIT_FUNC PyInit_expertmesh_native(void) {
    if (PyType_Ready(&native_View)) return NULL;
    return PyModule_Create(&module);
}
