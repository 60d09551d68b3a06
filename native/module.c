/* Module expertmesh_native: what the data plane does for every layer, natively. */
#include "native.h"

#define ENTRY(name, where) \
    {#name, (PyCFunction)(void (*)(void))native_##name, METH_FASTCALL, "See " where "."}

static PyMethodDef functions[] = {
    ENTRY(summands_of, "router.moe.permute.summands_of"),
    ENTRY(route, "router.moe.permute.route"),
    ENTRY(gather, "router.moe.permute.gather"),
    ENTRY(combine, "router.moe.combine"),
    ENTRY(view, "cluster.wire.tensors.to_bytes"),
    ENTRY(send, "cluster.transport.stream.channel.Channel.send"),
    ENTRY(write, "cluster.transport.stream.channel.Channel.write"),
    ENTRY(receive, "cluster.transport.stream.channel.Channel.receive"),
    ENTRY(send_layer, "router.moe.exchange"),
    ENTRY(receive_layer, "router.moe.exchange"),
    ENTRY(attention_kernels, "router.model.cpu.native_attention"),
    ENTRY(attend, "router.model.cpu.native_attention"),
    ENTRY(store, "router.model.cpu.native_attention"),
    ENTRY(normalise, "router.model.cpu.native_layer"),
    ENTRY(linear, "router.model.cpu.native_modules"),
    ENTRY(attention_inputs, "router.model.cpu.native_layer"),
    ENTRY(attention_outputs, "router.model.cpu.native_layer"),
    ENTRY(attention_half, "router.model.cpu.native_layer"),
    ENTRY(choose, "router.model.cpu.native_layer"),
    ENTRY(forbid, "router.engine.sampling"),
    ENTRY(draw, "router.engine.sampling"),
    ENTRY(ffn_kernels, "experts.compute.native_ffn"),
    ENTRY(ffn, "experts.compute.native_ffn"),
#ifdef __linux__
    ENTRY(answer_lone, "experts.lone"),
#endif
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "expertmesh_native", "The data plane, natively.", -1, functions,
};

PyMODINIT_FUNC PyInit_expertmesh_native(void) {
    if (PyType_Ready(&native_View)) return NULL;
    return PyModule_Create(&module);
}
