"""Run a program as if this machine had an H100: `python bench/stand_in.py PROGRAM [ARGUMENT...]`. Needs a CUDA build of torch and gcc.

Two libraries in build/stand_in/ take the place of the CUDA runtime and driver. The device calls itself an H100, its memory is the
host's, and every other function says that all went well and does nothing. That is enough for tensors without data, and for compilers,
which run to their end by their rules for a GPU; no kernel runs and no number computed there means anything.
"""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

BUILD = Path(__file__).parents[1] / "build" / "stand_in"  # a folder that nothing else looks into
SITE = Path(find_spec("torch").origin).parents[1]  # torch itself must not be imported: it would load the real libraries
RUNTIME = """
#include <driver_types.h>
#include <string.h>
#include <stdlib.h>
int cudaGetDeviceCount(int *n) { *n = 1; return 0; }
int cudaGetDevice(int *n) { *n = 0; return 0; }
int cudaDriverGetVersion(int *n) { *n = VERSION * 1000; return 0; }
int cudaRuntimeGetVersion(int *n) { *n = VERSION * 1000; return 0; }
int cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
    memset(p, 0, sizeof *p);
    strcpy(p->name, "stand-in for an H100");
    p->major = 9; p->multiProcessorCount = 132; p->totalGlobalMem = 80ul << 30; p->l2CacheSize = 50 << 20; p->warpSize = 32;
    p->maxThreadsPerBlock = 1024; p->maxThreadsPerMultiProcessor = 2048; p->regsPerBlock = p->regsPerMultiprocessor = 65536;
    p->sharedMemPerBlock = 49152; p->sharedMemPerBlockOptin = 232448; p->sharedMemPerMultiprocessor = 233472;
    return 0;
}
int cudaDeviceGetAttribute(int *v, int what, int device) { return attribute(v, what); }
int cudaMalloc(void **p, size_t n) { *p = aligned_alloc(512, (n + 511) / 512 * 512); return 0; }
int cudaMallocAsync(void **p, size_t n, void *stream) { return cudaMalloc(p, n); }
int cudaHostAlloc(void **p, size_t n, unsigned flags) { return cudaMalloc(p, n); }
int cudaFree(void *p) { free(p); return 0; }
int cudaFreeAsync(void *p, void *stream) { free(p); return 0; }
int cudaFreeHost(void *p) { free(p); return 0; }
int cudaMemGetInfo(size_t *left, size_t *all) { *left = *all = 80ul << 30; return 0; }
int cudaMemcpy(void *to, const void *from, size_t n, int kind) { memcpy(to, from, n); return 0; }
int cudaMemcpyAsync(void *to, const void *from, size_t n, int kind, void *stream) { memcpy(to, from, n); return 0; }
int cudaMemset(void *p, int v, size_t n) { memset(p, v, n); return 0; }
int cudaMemsetAsync(void *p, int v, size_t n, void *stream) { memset(p, v, n); return 0; }
int cudaStreamIsCapturing(void *stream, int *status) { *status = 0; return 0; }
int cudaDeviceGetStreamPriorityRange(int *least, int *most) { *least = 0; *most = -1; return 0; }
int cudaEventElapsedTime(float *ms, void *a, void *b) { *ms = 1; return 0; }
int cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *p) { memset(a, 0, sizeof *a); return 0; }
int cudaGetDriverEntryPointByVersion(const char *name, void **p, unsigned v, unsigned long long flags, int *found) {
    *p = 0; if (found) *found = 1; return 0;
}
const char *cudaGetErrorString(int e) { return "stand-in"; }
const char *cudaGetErrorName(int e) { return "stand-in"; }
void **__cudaRegisterFatBinary(void *code) { static void *handle; return &handle; }
"""
DRIVER = """
int cuDriverGetVersion(int *n) { *n = VERSION * 1000; return 0; }
int cuDeviceGetCount(int *n) { *n = 1; return 0; }
int cuDeviceGet(int *device, int n) { *device = 0; return 0; }
int cuDeviceGetAttribute(int *v, int what, int device) { return attribute(v, what); }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 0; *active = 1; return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)1; return 0; }
int cuCtxGetCurrent(void **context) { *context = (void *)1; return 0; }
int cuModuleLoadData(void **module, const void *code) { *module = (void *)1; return 0; }
int cuModuleGetFunction(void **f, void *module, const char *name) { *f = (void *)1; return 0; }
int cuFuncGetAttribute(int *v, int what, void *f) { *v = what ? 0 : 1024; return 0; }
int cuGetErrorString(int e, const char **text) { *text = "stand-in"; return 0; }
int cuGetProcAddress_v2(const char *name, void **p, int v, unsigned long long flags, int *found) {
    *p = 0; if (found) *found = 1; return 0;
}
"""
ATTRIBUTE = """
static int attribute(int *v, int what) {  // of a device: capability 9.0, 132 SMs, shared memory, warp, threads
    *v = what == 75 ? 9 : what == 76 ? 0 : what == 16 ? 132 : what == 97 ? 232448 : what == 81 ? 233472 : what == 10 ? 32
       : what == 39 ? 2048 : 1;
    return 0;
}
"""


def make_library(name: str, version: str, source: str, wanted: set[str], includes: list[Path]) -> Path:
    """`source` and, for each further name in `wanted`, a function that does nothing, as a library."""
    missing = sorted(wanted - set(re.findall(r"(\w+)\(", source)))
    code = BUILD / f"{name}.c"
    code.write_text(f"#define VERSION {version}\n{ATTRIBUTE}{source}" + "".join(f"long {f}() {{ return 0; }}\n" for f in missing))
    symbols = BUILD / f"{name}.map"
    symbols.write_text(f"{name} {{ global: *; }};\n")
    subprocess.run(["gcc", "-w", "-shared", "-fPIC", *(f"-I{folder}" for folder in includes), code, "-o", BUILD / name,
                    f"-Wl,--version-script={symbols}", f"-Wl,-soname,{name}"], check=True)
    return BUILD / name


def make() -> dict[str, str]:
    """Build both. Returns the variables that make a process use them."""
    BUILD.mkdir(parents=True, exist_ok=True)
    libraries = [*(SITE / "torch" / "lib").glob("*.so"), *SITE.glob("nvidia/**/*.so.*")]
    unresolved = "".join(subprocess.run(["nm", "-D", "--undefined-only", f], capture_output=True, text=True).stdout for f in libraries)
    used = re.findall(r" (\w+)@libcudart\.so\.(\d+)", unresolved)
    runtime, versions = {name for name, _ in used}, sorted({version for _, version in used})
    if len(versions) != 1:
        sys.exit(f"error: torch in {SITE} links {len(versions)} versions of the CUDA runtime, expected one: install a CUDA build")
    # The driver's functions are looked up by name: torch's and Triton's names are strings in them.
    files = *(SITE / "torch" / "lib").glob("lib*cuda*.so"), SITE / "triton" / "backends" / "nvidia" / "driver.c"
    names = {m.decode() for f in files if f.exists() for m in re.findall(rb"\bcu[A-Z]\w+\b", f.read_bytes())}
    headers = [*(f.parent for f in SITE.glob("nvidia/*/include/driver_types.h")), SITE / "triton" / "backends" / "nvidia" / "include"]
    preload = make_library(f"libcudart.so.{versions[0]}", versions[0], RUNTIME, runtime, headers)
    make_library("libcuda.so.1", versions[0], DRIVER, names, [])
    return dict(LD_PRELOAD=str(preload), LD_LIBRARY_PATH=str(BUILD))


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    os.execve(sys.executable, [sys.executable, *sys.argv[1:]], os.environ | make())
