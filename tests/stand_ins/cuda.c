/* A card of SM 90 where there is none: it copies, captures and counts, and computes nothing.

   Preloaded into a process it takes the place of CUDA's runtime, driver and cuBLAS under torch's and Triton's own code,
   which call it as they would a card, and refuses in a capture what CUDA refuses there. Kernels are loaded and
   launched, and what they would have written keeps what was there. A refused call has a line on standard error at once,
   and when the process ends another one says what was called. Not played: cuDNN, CUPTI, NCCL. `scripts/check-cuda`
   compiles it and runs what a card would.

   CUDA_STAND_IN_DEVICES      cards, 1 unless it is set
   CUDA_STAND_IN_MODULES=1    a line for each kernel that is loaded, with the captures before it
   CUDA_STAND_IN_FRAMES=1     where a refused call came from */

#define _GNU_SOURCE
#include <cublasLt.h>
#include <cublas_v2.h>
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <execinfo.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#define DONE { return 0; }
enum { RANGES = 1 << 16, MIB = 1 << 20, PINNED = -1 };
static const char NAME[] = "NVIDIA H200 (stand-in)";
static const size_t MEMORY = 139UL << 30;

typedef struct { char *start; size_t bytes; int device; } Range;  /* of a card's memory, or PINNED */
typedef struct { int capturing, broken; enum cudaStreamCaptureMode mode; unsigned long long number; } Stream;
typedef struct { double seconds; } Event;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static Range ranges[RANGES];
static int number_of_ranges;
static size_t used[64];
static Stream legacy;
static _Atomic int global_captures;  /* that are under way, and keep every thread from what is unsafe */
static _Atomic long launches, own_launches, modules, captures, replays, copies, refused;
static _Thread_local int current, own_captures;
static _Thread_local enum cudaStreamCaptureMode own_mode = cudaStreamCaptureModeGlobal;
static _Thread_local cudaError_t last;

__attribute__((destructor)) static void say(void) {
  if (launches || captures)
    fprintf(stderr, "CUDA stand-in: %ld launches, %ld of them of %ld loaded modules, %ld captures, %ld replays, "
            "%ld copies, %ld calls refused\n", launches, own_launches, modules, captures, replays, copies, refused);
}

static cudaError_t fail(cudaError_t error) { return error ? (last = error) : error; }
static int failed(const char *what) {
  void *frames[32];
  refused++;
  fprintf(stderr, "CUDA stand-in: refused in a capture: %s\n", what);
  if (getenv("CUDA_STAND_IN_FRAMES")) backtrace_symbols_fd(frames, backtrace(frames, 32), 2);
  return fail(cudaErrorStreamCaptureUnsupported);
}

/* Whether a call that is unsafe in a capture is one now: by this thread's mode, of any capture or of its own. */
static int unsafe(void) {
  if (own_mode == cudaStreamCaptureModeRelaxed) return 0;
  return own_captures || (own_mode == cudaStreamCaptureModeGlobal && global_captures);
}
static Stream *of(const void *stream) { return (uintptr_t)stream <= 2 ? &legacy : (Stream *)stream; }
static int broken(Stream *stream, const char *what) { stream->broken = 1; return failed(what); }
#define SAFE if (unsafe()) return failed(__func__);
#define WAITS if (of(stream)->capturing) return broken(of(stream), __func__); SAFE

/* Memory. */

static void *take(size_t bytes, int device) {
  bytes = bytes ? (bytes + 511) & ~511UL : 512;
  void *start = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (start == MAP_FAILED) return NULL;
  pthread_mutex_lock(&lock);
  ranges[number_of_ranges++] = (Range){start, bytes, device};
  if (device != PINNED) used[device] += bytes;
  pthread_mutex_unlock(&lock);
  return start;
}

static Range *range_of(const void *pointer) {  /* with the lock held */
  for (int at = 0; at < number_of_ranges; at++)
    if ((char *)pointer >= ranges[at].start && (char *)pointer < ranges[at].start + ranges[at].bytes)
      return ranges + at;
  return NULL;
}

static cudaError_t give(void *pointer) {
  pthread_mutex_lock(&lock);
  Range *range = range_of(pointer);
  if (range) {
    if (range->device != PINNED) used[range->device] -= range->bytes;
    munmap(range->start, range->bytes);
    *range = ranges[--number_of_ranges];
  }
  pthread_mutex_unlock(&lock);
  return fail(range ? cudaSuccess : cudaErrorInvalidValue);
}

static int known(const void *pointer, int *device) {
  pthread_mutex_lock(&lock);
  Range *range = range_of(pointer);
  if (range) *device = range->device;
  pthread_mutex_unlock(&lock);
  return range != NULL;
}

static cudaError_t copy(void *to, const void *from, size_t bytes, Stream *stream) {
  int device;
  copies++;
  if (!stream->capturing) memmove(to, from, bytes);
  else if (bytes && !(known(to, &device) && known(from, &device))) return broken(stream, "a copy of pageable memory");
  return cudaSuccess;
}

cudaError_t cudaMalloc(void **pointer, size_t bytes) {
  SAFE
  *pointer = used[current] + bytes > MEMORY ? NULL : take(bytes, current);
  return fail(*pointer ? cudaSuccess : cudaErrorMemoryAllocation);
}
cudaError_t cudaHostAlloc(void **pointer, size_t bytes, unsigned) {
  SAFE
  return fail((*pointer = take(bytes, PINNED)) ? cudaSuccess : cudaErrorMemoryAllocation);
}
cudaError_t cudaFree(void *pointer) { SAFE return pointer ? give(pointer) : cudaSuccess; }
cudaError_t cudaFreeHost(void *pointer) { SAFE return give(pointer); }
cudaError_t cudaMemGetInfo(size_t *left, size_t *all) { *all = MEMORY, *left = MEMORY - used[current]; return 0; }
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *told, const void *pointer) {
  int device;
  memset(told, 0, sizeof *told);
  told->hostPointer = (void *)pointer;
  if (!known(pointer, &device)) return cudaSuccess;
  told->type = device == PINNED ? cudaMemoryTypeHost : cudaMemoryTypeDevice;
  told->device = device == PINNED ? current : device;
  told->devicePointer = (void *)pointer;
  return cudaSuccess;
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind) {
  SAFE
  return copy(to, from, bytes, &legacy);
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind, cudaStream_t stream) {
  return copy(to, from, bytes, of(stream));
}
cudaError_t cudaMemcpyPeerAsync(void *to, int, const void *from, int, size_t bytes, cudaStream_t stream) {
  return copy(to, from, bytes, of(stream));
}
cudaError_t cudaMemset(void *at, int value, size_t bytes) { SAFE memset(at, value, bytes); return cudaSuccess; }
cudaError_t cudaMemsetAsync(void *at, int value, size_t bytes, cudaStream_t stream) {
  if (!of(stream)->capturing) memset(at, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemcpyToSymbol(const void *, const void *, size_t, size_t, enum cudaMemcpyKind) DONE
cudaError_t cudaGetSymbolAddress(void **pointer, const void *symbol) { *pointer = (void *)symbol; return 0; }

/* Cards. */

cudaError_t cudaGetDeviceCount(int *count) {
  const char *told = getenv("CUDA_STAND_IN_DEVICES");
  *count = told ? atoi(told) : 1;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int *device) { *device = current; return cudaSuccess; }
cudaError_t cudaSetDevice(int device) {
  int count;
  cudaGetDeviceCount(&count);
  if (device < 0 || device >= count) return fail(cudaErrorInvalidDevice);
  current = device;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; break;
    case cudaDevAttrMultiProcessorCount: *value = 132; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
    case cudaDevAttrMaxRegistersPerBlock:
    case cudaDevAttrMaxRegistersPerMultiprocessor: *value = 65536; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = 49152; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 232448; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = 233472; break;
    case cudaDevAttrL2CacheSize: *value = 60 * MIB; break;
    case cudaDevAttrMemoryClockRate: *value = 3201000; break;
    case cudaDevAttrClockRate: *value = 1980000; break;
    case cudaDevAttrGlobalMemoryBusWidth: *value = 6144; break;
    default: *value = 1;
  }
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *told, int device) {
  memset(told, 0, sizeof *told);
  strcpy(told->name, NAME);
  told->totalGlobalMem = MEMORY;
  told->sharedMemPerBlock = 49152;
  told->sharedMemPerBlockOptin = 232448;
  told->sharedMemPerMultiprocessor = 233472;
  told->regsPerBlock = told->regsPerMultiprocessor = 65536;
  told->warpSize = 32;
  told->maxThreadsPerBlock = 1024;
  told->maxThreadsPerMultiProcessor = 2048;
  told->maxBlocksPerMultiProcessor = 32;
  for (int axis = 0; axis < 3; axis++) {
    told->maxThreadsDim[axis] = axis < 2 ? 1024 : 64;
    told->maxGridSize[axis] = axis ? 65535 : 2147483647;
  }
  told->major = 9;
  told->multiProcessorCount = 132;
  told->l2CacheSize = 60 * MIB;
  told->memoryBusWidth = 6144;
  told->pciBusID = device;
  told->cooperativeLaunch = told->unifiedAddressing = told->concurrentKernels = 1;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetPCIBusId(char *text, int length, int device) {
  snprintf(text, length, "0000:%02x:00.0", device);
  return cudaSuccess;
}
cudaError_t cudaDeviceCanAccessPeer(int *can, int a, int b) { *can = a != b; return cudaSuccess; }
cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) DONE
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *most) { *least = 0, *most = -5; return cudaSuccess; }
cudaError_t cudaDeviceSynchronize(void) { SAFE return cudaSuccess; }
cudaError_t cudaDriverGetVersion(int *version) { *version = CUDART_VERSION; return cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *version) { *version = CUDART_VERSION; return cudaSuccess; }
cudaError_t cudaGetLastError(void) { cudaError_t error = last; last = cudaSuccess; return error; }
cudaError_t cudaPeekAtLastError(void) { return last; }
cudaError_t cudaProfilerStart(void) DONE
cudaError_t cudaProfilerStop(void) DONE

/* Streams and captures. */

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned, int) {
  *stream = calloc(1, sizeof(Stream));
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) {
  return cudaStreamCreateWithPriority(stream, flags, 0);
}
cudaError_t cudaStreamCreate(cudaStream_t *stream) { return cudaStreamCreateWithPriority(stream, 0, 0); }
cudaError_t cudaStreamDestroy(cudaStream_t stream) { free(stream); return cudaSuccess; }
cudaError_t cudaStreamGetPriority(cudaStream_t, int *priority) { *priority = 0; return cudaSuccess; }
cudaError_t cudaStreamQuery(cudaStream_t stream) { WAITS return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t stream) { WAITS return cudaSuccess; }
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) DONE
cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t call, void *data, unsigned) {
  call(stream, cudaSuccess, data);
  return cudaSuccess;
}
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t call, void *data) {
  if (!of(stream)->capturing) call(data);
  return cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) {
  enum cudaStreamCaptureMode before = own_mode;
  own_mode = *mode, *mode = before;
  return cudaSuccess;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode) {
  if (of(stream) == &legacy || of(stream)->capturing) return failed(__func__);
  *of(stream) = (Stream){.capturing = 1, .mode = mode, .number = ++captures};
  own_captures++;
  global_captures += mode == cudaStreamCaptureModeGlobal;
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
  Stream *ended = of(stream);
  if (!ended->capturing) return fail(cudaErrorIllegalState);
  ended->capturing = 0;
  own_captures--;
  global_captures -= ended->mode == cudaStreamCaptureModeGlobal;
  *graph = ended->broken ? NULL : malloc(1);
  return fail(ended->broken ? cudaErrorStreamCaptureInvalidated : cudaSuccess);
}
static enum cudaStreamCaptureStatus status_of(cudaStream_t stream) {
  return of(stream)->capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
  if (of(stream) == &legacy && unsafe()) return failed("the legacy stream");
  *status = status_of(stream);
  return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id,
                                     cudaGraph_t *graph, const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges,
                                     size_t *count) {
  *status = status_of(stream);
  if (id) *id = of(stream)->number;
  if (graph) *graph = NULL;
  if (nodes) *nodes = NULL;
  if (edges) *edges = NULL;
  if (count) *count = 0;
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *made, cudaGraph_t, unsigned long long) {
  *made = malloc(1);
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *made, cudaGraph_t graph, unsigned long long flags) {
  return cudaGraphInstantiateWithFlags(made, graph, flags);
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t, cudaStream_t stream) {
  if (of(stream)->capturing) return broken(of(stream), __func__);
  replays++;
  return cudaSuccess;
}
cudaError_t cudaGraphGetNodes(cudaGraph_t, cudaGraphNode_t *, size_t *count) { *count = 1; return cudaSuccess; }
cudaError_t cudaGraphDestroy(cudaGraph_t graph) { SAFE free(graph); return cudaSuccess; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) { SAFE free(graph); return cudaSuccess; }

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned) { *event = calloc(1, sizeof(Event)); return 0; }
cudaError_t cudaEventCreate(cudaEvent_t *event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t event) { SAFE free(event); return cudaSuccess; }
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t, unsigned) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  ((Event *)event)->seconds = now.tv_sec + 1e-9 * now.tv_nsec;
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return cudaEventRecordWithFlags(event, stream, 0);
}
cudaError_t cudaEventQuery(cudaEvent_t) { SAFE return cudaSuccess; }
cudaError_t cudaEventSynchronize(cudaEvent_t) { SAFE return cudaSuccess; }
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t from, cudaEvent_t to) {
  double took = 1e3 * (((Event *)to)->seconds - ((Event *)from)->seconds);
  *ms = took > 1e-3 ? took : 1e-3;
  return cudaSuccess;
}

/* Kernels of torch. */

cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *entry) { *kernel = (cudaKernel_t)entry; return 0; }
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void **, size_t, cudaStream_t) { launches++; return 0; }
cudaError_t cudaLaunchKernel(const void *, dim3, dim3, void **, size_t, cudaStream_t) { launches++; return 0; }
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *, const void *, void **) { launches++; return 0; }
cudaError_t cudaFuncSetAttribute(const void *, enum cudaFuncAttribute, int) DONE
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *told, const void *) {
  *told = (struct cudaFuncAttributes){.maxThreadsPerBlock = 1024, .numRegs = 32, .ptxVersion = 90, .binaryVersion = 90};
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *, int, size_t, unsigned) {
  *blocks = 2;
  return cudaSuccess;
}

/* The driver, which Triton calls. */

CUresult cuInit(unsigned) DONE
CUresult cuDriverGetVersion(int *version) { *version = CUDA_VERSION; return CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int *count) { return (CUresult)cudaGetDeviceCount(count); }
CUresult cuDeviceGet(CUdevice *device, int number) { *device = number; return CUDA_SUCCESS; }
CUresult cuDeviceGetName(char *name, int length, CUdevice) { snprintf(name, length, NAME); return CUDA_SUCCESS; }
CUresult cuDeviceTotalMem(size_t *bytes, CUdevice) { *bytes = MEMORY; return CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  return (CUresult)cudaDeviceGetAttribute(value, (enum cudaDeviceAttr)attribute, device);  /* their numbers agree */
}
CUresult cuCtxGetCurrent(CUcontext *context) { *context = (CUcontext)(current + 1UL); return CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext) DONE
CUresult cuCtxGetDevice(CUdevice *device) { *device = current; return CUDA_SUCCESS; }
CUresult cuCtxPushCurrent(CUcontext) DONE
CUresult cuCtxPopCurrent(CUcontext *context) { return cuCtxGetCurrent(context); }
CUresult cuCtxGetLimit(size_t *value, CUlimit) { *value = MIB; return CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit, size_t) DONE
CUresult cuCtxSynchronize(void) { return (CUresult)cudaDeviceSynchronize(); }
CUresult cuStreamGetCtx(CUstream, CUcontext *context) { return cuCtxGetCurrent(context); }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
  *context = (CUcontext)(device + 1UL);
  return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRelease(CUdevice) DONE
CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned *flags, int *active) { *flags = 0, *active = 1; return 0; }
CUresult cuGetErrorString(CUresult, const char **text) { *text = "an error of the stand-in"; return CUDA_SUCCESS; }
CUresult cuGetErrorName(CUresult error, const char **text) { return cuGetErrorString(error, text); }
CUresult cuModuleLoadData(CUmodule *module, const void *) {
  if (unsafe()) return (CUresult)failed("loading a module");
  modules++;
  *module = malloc(1);
  return CUDA_SUCCESS;
}
CUresult cuModuleLoad(CUmodule *module, const char *path) { return cuModuleLoadData(module, path); }
CUresult cuModuleLoadDataEx(CUmodule *module, const void *image, unsigned, CUjit_option *, void **) {
  return cuModuleLoadData(module, image);
}
CUresult cuModuleUnload(CUmodule module) { free(module); return CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  if (getenv("CUDA_STAND_IN_MODULES")) fprintf(stderr, "CUDA stand-in: %s, after %ld captures\n", name, captures);
  *function = (CUfunction)module;
  return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute, int) DONE
CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) DONE
CUresult cuLaunchKernelEx(const CUlaunchConfig *, CUfunction, void **, void **) {
  launches++;
  own_launches++;
  return CUDA_SUCCESS;
}
CUresult cuLaunchKernel(CUfunction function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                        CUstream, void **arguments, void **extra) {
  return cuLaunchKernelEx(NULL, function, arguments, extra);
}
CUresult cuOccupancyMaxActiveClusters(int *clusters, CUfunction, const CUlaunchConfig *) { *clusters = 66; return 0; }
CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  int device;
  if (!known((void *)pointer, &device)) return CUDA_ERROR_INVALID_VALUE;
  if (attribute == CU_POINTER_ATTRIBUTE_DEVICE_POINTER) *(CUdeviceptr *)value = pointer;
  else if (attribute == CU_POINTER_ATTRIBUTE_MEMORY_TYPE)
    *(unsigned *)value = device == PINNED ? CU_MEMORYTYPE_HOST : CU_MEMORYTYPE_DEVICE;
  else *(int *)value = device == PINNED ? current : device;
  return CUDA_SUCCESS;
}
CUresult cuTensorMapEncodeTiled(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *, const cuuint64_t *,
                                const cuuint64_t *, const cuuint32_t *, const cuuint32_t *, CUtensorMapInterleave,
                                CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) DONE
cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **entry, unsigned, unsigned long long,
                                             enum cudaDriverEntryPointQueryResult *result) {
  *entry = dlsym(RTLD_DEFAULT, name);
  if (result) *result = *entry ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return fail(*entry ? cudaSuccess : cudaErrorSymbolNotFound);
}

/* cuBLAS, whose descriptions are looked at by nobody, and whose products by none of these. */

cublasStatus_t cublasCreate_v2(cublasHandle_t *made) { *made = malloc(1); return CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasDestroy_v2(cublasHandle_t made) { free(made); return CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasSetStream_v2(cublasHandle_t, cudaStream_t) DONE
cublasStatus_t cublasSetWorkspace_v2(cublasHandle_t, void *, size_t) DONE
cublasStatus_t cublasSetMathMode(cublasHandle_t, cublasMath_t) DONE
cublasStatus_t cublasGetMathMode(cublasHandle_t, cublasMath_t *mode) { *mode = CUBLAS_DEFAULT_MATH; return 0; }
cublasStatus_t cublasSetPointerMode_v2(cublasHandle_t, cublasPointerMode_t) DONE
cublasStatus_t cublasGetPointerMode_v2(cublasHandle_t, cublasPointerMode_t *mode) { *mode = 0; return 0; }
cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *made, cublasComputeType_t, cudaDataType_t) {
  *made = malloc(1);
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t made) { free(made); return CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t, cublasLtMatmulDescAttributes_t, const void *,
                                              size_t) DONE
cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *made, cudaDataType, uint64_t, uint64_t, int64_t) {
  *made = malloc(1);
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t made) { free(made); return CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t, cublasLtMatrixLayoutAttribute_t, const void *,
                                                size_t) DONE
cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *made) { *made = malloc(1); return 0; }
cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t made) { free(made); return 0; }
cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t, cublasLtMatmulPreferenceAttributes_t,
                                                    const void *, size_t) DONE
cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t, cublasLtMatrixLayout_t,
                                              cublasLtMatrixLayout_t, cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
                                              cublasLtMatmulPreference_t, int,
                                              cublasLtMatmulHeuristicResult_t results[], int *found) {
  memset(results, 0, sizeof *results);
  *found = 1;
  return CUBLAS_STATUS_SUCCESS;
}
__attribute__((used)) int a_product(void) { launches++; return CUBLAS_STATUS_SUCCESS; }
#define PRODUCT(name) __asm__(".globl " #name "\n.type " #name ", @function\n.set " #name ", a_product");
PRODUCT(cublasLtMatmul)
PRODUCT(cublasGemmEx)
PRODUCT(cublasGemmStridedBatchedEx)
PRODUCT(cublasSgemm_v2)
PRODUCT(cublasSgemmEx)
PRODUCT(cublasSgemmStridedBatched)
PRODUCT(cublasSgemv_v2)
PRODUCT(cublasDgemm_v2)
PRODUCT(cublasDgemv_v2)
PRODUCT(cublasSdot_v2)
PRODUCT(cublasDotEx)
