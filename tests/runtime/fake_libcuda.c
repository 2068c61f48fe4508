/* A libcuda.so.1 without a GPU, which the real bindings load: whether what the runtime hands to them arrives.

   Compiled against cuda.h, so layouts of structures are those of the driver. Device memory is host memory, everything is
   done at once, and kernels are run by a callback. Handles carry a mark, and whatever is wrong is counted and said. */

#include <cuda.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef void (*Run)(const char *name, const uint64_t *arguments, unsigned grid, unsigned threads, unsigned shared,
                    unsigned cluster, int graph);
enum { MOST = 32, STREAM = 0x5712EA, EVENT, MODULE, FUNCTION, GRAPH, NODE, EXECUTABLE, POOL, CONTEXT };

typedef struct {
    int mark, count, shared;
    char name[64];
} Code;

typedef struct {
    Code *code;
    uint64_t arguments[MOST];
    unsigned grid, threads, shared, cluster;
} Launch;

typedef struct Node {
    int mark;
    Launch launch;
    struct Node *next;
} Node;

typedef struct {
    int mark;
    Node *first, *last;
} Graph;

typedef struct {
    int mark, count;
    Node *nodes[MOST];
    Launch launches[MOST];
} Executable;

static Run run;
static int problems, alive, retained, ended;
static _Thread_local int depth;
static int context_mark = CONTEXT;

void fake_set_run(Run given) { run = given; }
void fake_end(void) { ended = 1; } /* as when the process ends: every call fails */
int fake_problems(void) { return problems; }
int fake_alive(void) { return alive + retained; }

static CUresult wrong(const char *text, ...) {
    va_list arguments;
    va_start(arguments, text);
    fputs("fake libcuda: ", stderr);
    vfprintf(stderr, text, arguments);
    fputc('\n', stderr);
    va_end(arguments);
    problems++;
    return CUDA_ERROR_INVALID_VALUE;
}

static void *handle(int mark, size_t bytes) {
    int *made = calloc(1, bytes);
    *made = mark;
    alive++;
    return made;
}

static int is(const void *handle, int mark) { return handle && *(const int *)handle == mark; }

static CUresult end(void *handle, int mark) {
    if (!is(handle, mark)) return wrong("a handle is no %x", mark);
    *(int *)handle = 0; /* and stays allocated, so that use after the end is seen */
    alive--;
    return CUDA_SUCCESS;
}

static CUresult ready(const char *function, CUstream stream) {
    if (!depth) return wrong("%s without a context", function);
    if ((uintptr_t)stream > 2 && !is(stream, STREAM)) return wrong("%s with no stream", function);
    return CUDA_SUCCESS;
}
#define READY(stream) if (ready(__func__, stream)) return CUDA_ERROR_INVALID_HANDLE

CUresult cuInit(unsigned flags) { return flags ? wrong("cuInit: flags") : CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { return *version = 13000, CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult error, const char **text) { return (void)error, *text = "some error", CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int *count) { return *count = 1, CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { return *device = ordinal, CUDA_SUCCESS; }
CUresult cuDeviceTotalMem(size_t *bytes, CUdevice device) { return (void)device, *bytes = 1u << 30, CUDA_SUCCESS; }

CUresult cuDeviceGetName(char *name, int length, CUdevice device) {
    return device ? wrong("no such device") : (snprintf(name, length, "C GPU"), CUDA_SUCCESS);
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = 9; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = 0; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = 227 << 10; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
    case CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED: *value = 1; break;
    default: *value = 1000000;
    }
    return device ? wrong("no such device") : CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    return (void)device, retained++, *context = (CUcontext)&context_mark, CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRelease(CUdevice device) {
    if (ended) return CUDA_ERROR_DEINITIALIZED;
    return (void)device, --retained < 0 ? wrong("released twice") : CUDA_SUCCESS;
}
CUresult cuCtxPushCurrent(CUcontext context) {
    if (ended) return CUDA_ERROR_DEINITIALIZED;
    return is(context, CONTEXT) && retained ? (depth++, CUDA_SUCCESS) : wrong("no context");
}
CUresult cuCtxPopCurrent(CUcontext *context) {
    return *context = (CUcontext)&context_mark, depth-- ? CUDA_SUCCESS : wrong("popped too often");
}
CUresult cuCtxSynchronize(void) { READY(0); return CUDA_SUCCESS; }

CUresult cuMemGetInfo(size_t *free, size_t *total) { return *free = *total = 1u << 30, CUDA_SUCCESS; }
CUresult cuMemAlloc(CUdeviceptr *address, size_t count) {
    READY(0);
    *address = (CUdeviceptr)aligned_alloc(256, (count + 255) / 256 * 256);
    memset((void *)*address, 0xA5, count);
    return alive++, count ? CUDA_SUCCESS : wrong("no bytes");
}
CUresult cuMemFree(CUdeviceptr address) { READY(0); return free((void *)address), alive--, CUDA_SUCCESS; }
CUresult cuMemHostAlloc(void **address, size_t count, unsigned flags) {
    return flags ? wrong("flags") : cuMemAlloc((CUdeviceptr *)address, count);
}
CUresult cuMemFreeHost(void *address) { return cuMemFree((CUdeviceptr)address); }

CUresult cuMemPoolCreate(CUmemoryPool *pool, const CUmemPoolProps *properties) {
    READY(0);
    static const unsigned char zeros[sizeof properties->reserved];
    if (properties->allocType != CU_MEM_ALLOCATION_TYPE_PINNED || properties->handleTypes != CU_MEM_HANDLE_TYPE_NONE ||
        properties->location.type != CU_MEM_LOCATION_TYPE_DEVICE || properties->location.id || properties->maxSize ||
        properties->win32SecurityAttributes || memcmp(zeros, properties->reserved, sizeof zeros))
        return wrong("properties of a pool");
    return *pool = handle(POOL, 4), CUDA_SUCCESS;
}
CUresult cuMemPoolSetAttribute(CUmemoryPool pool, CUmemPool_attribute attribute, void *value) {
    return is(pool, POOL) && attribute == CU_MEMPOOL_ATTR_RELEASE_THRESHOLD && *(cuuint64_t *)value == UINT64_MAX
               ? CUDA_SUCCESS : wrong("attribute of a pool");
}
CUresult cuMemPoolDestroy(CUmemoryPool pool) { READY(0); return end(pool, POOL); }
CUresult cuMemAllocFromPoolAsync(CUdeviceptr *address, size_t count, CUmemoryPool pool, CUstream stream) {
    READY(stream);
    return is(pool, POOL) ? cuMemAlloc(address, count) : wrong("no pool");
}
CUresult cuMemFreeAsync(CUdeviceptr address, CUstream stream) { READY(stream); return cuMemFree(address); }

CUresult cuMemcpyHtoDAsync(CUdeviceptr target, const void *source, size_t count, CUstream stream) {
    READY(stream);
    return memcpy((void *)target, source, count), CUDA_SUCCESS;
}
CUresult cuMemcpyDtoHAsync(void *target, CUdeviceptr source, size_t count, CUstream stream) {
    READY(stream);
    return memcpy(target, (void *)source, count), CUDA_SUCCESS;
}
CUresult cuMemcpyDtoDAsync(CUdeviceptr target, CUdeviceptr source, size_t count, CUstream stream) {
    READY(stream);
    return memcpy((void *)target, (void *)source, count), CUDA_SUCCESS;
}
CUresult cuMemsetD8Async(CUdeviceptr target, unsigned char value, size_t count, CUstream stream) {
    READY(stream);
    return memset((void *)target, value, count), CUDA_SUCCESS;
}
CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr address) {
    if (attribute == CU_POINTER_ATTRIBUTE_MEMORY_TYPE) return CUDA_ERROR_INVALID_VALUE; /* memory it does not know */
    if (attribute != CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL || !address) return wrong("attribute of a pointer");
    return *(int *)value = 0, CUDA_SUCCESS;
}

CUresult cuStreamCreate(CUstream *stream, unsigned flags) {
    READY(0);
    return *stream = handle(STREAM, 4), flags == CU_STREAM_NON_BLOCKING ? CUDA_SUCCESS : wrong("flags of a stream");
}
CUresult cuStreamDestroy(CUstream stream) { READY(stream); return end(stream, STREAM); }
CUresult cuStreamSynchronize(CUstream stream) { READY(stream); return CUDA_SUCCESS; }
CUresult cuStreamWaitEvent(CUstream stream, CUevent event, unsigned flags) {
    READY(stream);
    return is(event, EVENT) && !flags ? CUDA_SUCCESS : wrong("no event to wait for");
}
CUresult cuEventCreate(CUevent *event, unsigned flags) {
    READY(0);
    return (void)flags, *event = handle(EVENT, 4), CUDA_SUCCESS;
}
CUresult cuEventDestroy(CUevent event) { READY(0); return end(event, EVENT); }
CUresult cuEventRecord(CUevent event, CUstream stream) {
    READY(stream);
    return is(event, EVENT) ? CUDA_SUCCESS : wrong("no event to record");
}
CUresult cuEventSynchronize(CUevent event) { return is(event, EVENT) ? CUDA_SUCCESS : wrong("no event"); }
CUresult cuEventElapsedTime(float *time, CUevent begin, CUevent last) {
    return *time = 0.5f, is(begin, EVENT) && is(last, EVENT) ? CUDA_SUCCESS : wrong("no event");
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
    READY(0);
    Code *code = handle(MODULE, sizeof *code);
    *module = (CUmodule)code;
    return sscanf(image, "FAKE cubin sm_90 %63s %d", code->name, &code->count) == 2 ? CUDA_SUCCESS : wrong("image");
}
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
    Code *code = (Code *)module;
    if (!is(module, MODULE) || strcmp(name, code->name)) return wrong("no function %s", name);
    Code *made = malloc(sizeof *made); /* ends with its module */
    *made = *code, made->mark = FUNCTION, made->shared = 48 << 10;
    return *function = (CUfunction)made, CUDA_SUCCESS;
}
CUresult cuModuleUnload(CUmodule module) { READY(0); return end(module, MODULE); }
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
    if (!is(function, FUNCTION) || attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES)
        return wrong("attribute of a function");
    return ((Code *)function)->shared = value, CUDA_SUCCESS;
}

static CUresult take(Launch *launch, CUfunction function, void **parameters, const unsigned *grid,
                     const unsigned *block, unsigned shared) {
    READY(0);
    Code *code = (Code *)function;
    if (!is(function, FUNCTION)) return wrong("launch of no function");
    if (!grid[0] || grid[1] != 1 || grid[2] != 1 || !block[0] || block[0] > 1024 || block[1] != 1 || block[2] != 1)
        return wrong("grid or block of %s", code->name);
    if ((int)shared > code->shared) return wrong("shared memory of %s", code->name);
    launch->code = code, launch->grid = grid[0], launch->threads = block[0], launch->shared = shared;
    for (int index = 0; index < code->count; index++) memcpy(&launch->arguments[index], parameters[index], 8);
    return CUDA_SUCCESS;
}

static CUresult start(const Launch *launch, int graph) {
    if (launch->cluster && launch->grid % launch->cluster) return wrong("clusters of %s", launch->code->name);
    if (run)
        run(launch->code->name, launch->arguments, launch->grid, launch->threads, launch->shared, launch->cluster,
            graph);
    return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **parameters, void **extra) {
    READY(config->hStream);
    Launch launch = {0};
    if (extra) return wrong("extra");
    for (unsigned index = 0; index < config->numAttrs; index++) {
        const CUlaunchAttribute *one = &config->attrs[index];
        if (one->id != CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION || one->value.clusterDim.y != 1 ||
            one->value.clusterDim.z != 1)
            return wrong("attribute of a launch");
        launch.cluster = one->value.clusterDim.x;
    }
    const unsigned grid[] = {config->gridDimX, config->gridDimY, config->gridDimZ};
    const unsigned block[] = {config->blockDimX, config->blockDimY, config->blockDimZ};
    CUresult taken = take(&launch, function, parameters, grid, block, config->sharedMemBytes);
    return taken ? taken : start(&launch, 0);
}

static CUresult take_node(Launch *launch, const CUDA_KERNEL_NODE_PARAMS *given) {
    const unsigned grid[] = {given->gridDimX, given->gridDimY, given->gridDimZ};
    const unsigned block[] = {given->blockDimX, given->blockDimY, given->blockDimZ};
    if (given->extra || given->kern || given->ctx) return wrong("parameters of a node");
    return take(launch, given->func, given->kernelParams, grid, block, given->sharedMemBytes);
}

CUresult cuGraphCreate(CUgraph *graph, unsigned flags) {
    return *graph = handle(GRAPH, sizeof(Graph)), flags ? wrong("flags of a graph") : CUDA_SUCCESS;
}
CUresult cuGraphAddKernelNode(CUgraphNode *made, CUgraph given, const CUgraphNode *before, size_t count,
                              const CUDA_KERNEL_NODE_PARAMS *parameters) {
    Graph *graph = (Graph *)given;
    if (!is(graph, GRAPH)) return wrong("node of no graph");
    if (count != (graph->last != NULL) || (count && before[0] != (CUgraphNode)graph->last)) return wrong("no chain");
    Node *node = calloc(1, sizeof *node);
    node->mark = NODE;
    if (graph->last) graph->last->next = node;
    else graph->first = node;
    graph->last = node;
    *made = (CUgraphNode)node;
    return take_node(&node->launch, parameters);
}
CUresult cuGraphKernelNodeSetAttribute(CUgraphNode node, CUkernelNodeAttrID kind, const CUkernelNodeAttrValue *value) {
    if (!is(node, NODE) || kind != CU_KERNEL_NODE_ATTRIBUTE_CLUSTER_DIMENSION) return wrong("attribute of a node");
    ((Node *)node)->launch.cluster = value->clusterDim.x;
    return value->clusterDim.y == 1 && value->clusterDim.z == 1 ? CUDA_SUCCESS : wrong("clusters of a node");
}
CUresult cuGraphInstantiate(CUgraphExec *made, CUgraph given, unsigned long long flags) {
    READY(0);
    if (!is(given, GRAPH) || flags) return wrong("instantiation");
    Executable *executable = handle(EXECUTABLE, sizeof *executable);
    for (Node *node = ((Graph *)given)->first; node && executable->count < MOST; node = node->next) {
        executable->nodes[executable->count] = node;
        executable->launches[executable->count++] = node->launch;
    }
    return *made = (CUgraphExec)executable, CUDA_SUCCESS;
}
CUresult cuGraphExecKernelNodeSetParams(CUgraphExec given, CUgraphNode node, const CUDA_KERNEL_NODE_PARAMS *parameters) {
    Executable *executable = (Executable *)given;
    for (int index = 0; is(given, EXECUTABLE) && index < executable->count; index++)
        if (executable->nodes[index] == (Node *)node) return take_node(&executable->launches[index], parameters);
    return wrong("node of another graph");
}
CUresult cuGraphLaunch(CUgraphExec given, CUstream stream) {
    READY(stream);
    Executable *executable = (Executable *)given;
    if (!is(given, EXECUTABLE)) return wrong("launch of no graph");
    for (int index = 0; index < executable->count; index++)
        if (start(&executable->launches[index], 1)) return CUDA_ERROR_INVALID_VALUE;
    return CUDA_SUCCESS;
}
CUresult cuGraphExecDestroy(CUgraphExec executable) { READY(0); return end(executable, EXECUTABLE); }
CUresult cuGraphDestroy(CUgraph graph) { READY(0); return end(graph, GRAPH); }

CUresult cuGetProcAddress(const char *symbol, void **found, int version, cuuint64_t flags,
                          CUdriverProcAddressQueryResult *status);

#define ENTRY(function, version) {#function, (void *)(function), version}
static const struct {
    const char *name;
    void *function;
    int version; /* since when the function is what cuda.h declares */
} ENTRIES[] = {
    ENTRY(cuInit, 2000), ENTRY(cuDriverGetVersion, 2020), ENTRY(cuGetErrorString, 6000), ENTRY(cuDeviceGetCount, 2000),
    ENTRY(cuDeviceGet, 2000), ENTRY(cuDeviceTotalMem, 3020), ENTRY(cuDeviceGetName, 2000),
    ENTRY(cuDeviceGetAttribute, 2000), ENTRY(cuDevicePrimaryCtxRetain, 7000), ENTRY(cuDevicePrimaryCtxRelease, 11000),
    ENTRY(cuCtxPushCurrent, 4000), ENTRY(cuCtxPopCurrent, 4000), ENTRY(cuCtxSynchronize, 2000),
    ENTRY(cuMemGetInfo, 3020), ENTRY(cuMemAlloc, 3020), ENTRY(cuMemFree, 3020), ENTRY(cuMemHostAlloc, 2020),
    ENTRY(cuMemFreeHost, 2000), ENTRY(cuMemPoolCreate, 11020), ENTRY(cuMemPoolSetAttribute, 11020),
    ENTRY(cuMemPoolDestroy, 11020), ENTRY(cuMemAllocFromPoolAsync, 11020), ENTRY(cuMemFreeAsync, 11020),
    ENTRY(cuMemcpyHtoDAsync, 3020), ENTRY(cuMemcpyDtoHAsync, 3020), ENTRY(cuMemcpyDtoDAsync, 3020),
    ENTRY(cuMemsetD8Async, 3020), ENTRY(cuPointerGetAttribute, 4000), ENTRY(cuStreamCreate, 2000),
    ENTRY(cuStreamDestroy, 4000), ENTRY(cuStreamSynchronize, 2000), ENTRY(cuStreamWaitEvent, 3020),
    ENTRY(cuEventCreate, 2000), ENTRY(cuEventDestroy, 4000), ENTRY(cuEventRecord, 2000),
    ENTRY(cuEventSynchronize, 2000), ENTRY(cuEventElapsedTime, 2000), ENTRY(cuModuleLoadData, 2000),
    ENTRY(cuModuleGetFunction, 2000), ENTRY(cuModuleUnload, 2000), ENTRY(cuFuncSetAttribute, 9000),
    ENTRY(cuLaunchKernelEx, 11060), ENTRY(cuGraphCreate, 10000), ENTRY(cuGraphAddKernelNode, 12000),
    ENTRY(cuGraphKernelNodeSetAttribute, 11000), ENTRY(cuGraphInstantiate, 12000),
    ENTRY(cuGraphInstantiateWithFlags, 11040), ENTRY(cuGraphLaunch, 10000),
    ENTRY(cuGraphExecKernelNodeSetParams, 12000), ENTRY(cuGraphExecDestroy, 10000), ENTRY(cuGraphDestroy, 10000),
    ENTRY(cuGetProcAddress, 12000),
};

CUresult cuGetProcAddress(const char *symbol, void **found, int version, cuuint64_t flags,
                          CUdriverProcAddressQueryResult *status) {
    (void)flags;
    *found = NULL;
    for (size_t index = 0; index < sizeof ENTRIES / sizeof *ENTRIES; index++)
        if (!strcmp(symbol, ENTRIES[index].name) && version >= ENTRIES[index].version) *found = ENTRIES[index].function;
    if (status) *status = *found ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
    return *found ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}
