/* The experts' functions alone, as a module for tests: built with amx.h they have a kernel "amx". */
#include "native.h"

#define ENTRY(name) {#name, (PyCFunction)(void (*)(void))native_##name, METH_FASTCALL, NULL}

static PyMethodDef functions[] = {ENTRY(ffn_kernels), ENTRY(ffn), {NULL, NULL, 0, NULL}};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "emulated_amx", NULL, -1, functions};

PyMODINIT_FUNC PyInit_emulated_amx(void) { return PyModule_Create(&module); }
