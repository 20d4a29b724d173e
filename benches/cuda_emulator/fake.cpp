// libcuda and NVRTC, for kernels run by emu.h. EMU_DIR: where this lies. EMU_SMS: multiprocessors.
#include <dlfcn.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <map>
#include <mutex>
#include <regex>
#include <sstream>
#include <string>
#include <vector>
typedef int R;
typedef uint64_t P;
#define API extern "C" __attribute__((visibility("default")))
static std::recursive_mutex big;
#define LOCK std::lock_guard<std::recursive_mutex> lock(big)
static int env(const char* n, int d) { const char* s = getenv(n); return s ? atoi(s) : d; }
struct Graph { std::vector<std::function<void()>> work; };
struct StreamS { Graph* capture = nullptr; };
struct Module { void* so; };
struct Function { void (*run)(const unsigned*, unsigned, const void*, size_t); int threads; };
static void enqueue(StreamS* s, std::function<void()> f) { if (s && s->capture) s->capture->work.push_back(f); else f(); }
API R cuInit(unsigned) { return 0; }
API R cuDriverGetVersion(int* v) { *v = 13000; return 0; }
API R cuDeviceGetCount(int* n) { *n = 1; return 0; }
API R cuDeviceGet(int* d, int i) { *d = i; return i ? 101 : 0; }
API R cuDeviceGetName(char* s, int n, int) { snprintf(s, n, "emulated"); return 0; }
API R cuDeviceTotalMem_v2(size_t* n, int) { *n = 8ull << 30; return 0; }
API R cuDeviceGetAttribute(int* v, int a, int) {
    switch (a) { case 75: *v = 9; break; case 76: *v = 0; break; case 16: *v = env("EMU_SMS", 8); break; case 97: *v = env("EMU_SHARED", 227) << 10; break; case 115: *v = 1; break; default: *v = 0; }
    return 0;
}
API R cuDevicePrimaryCtxRetain(void** c, int) { *c = (void*)1; return 0; }
API R cuDevicePrimaryCtxRelease_v2(int) { return 0; }
static thread_local bool entered;
static uint64_t set_current_calls, launches;
API R cuCtxSetCurrent(void*) { entered = true; set_current_calls++; return 0; }
API R cuCtxGetCurrent(void** c) { *c = entered ? (void*)1 : nullptr; return 0; }
API R cuStreamCreate(void** s, unsigned) { *s = new StreamS; return 0; }
API R cuStreamDestroy_v2(void* s) { delete (StreamS*)s; return 0; }
API R cuStreamSynchronize(void*) { return 0; }
API R cuStreamIsCapturing(void* s, int* st) { *st = s && ((StreamS*)s)->capture ? 1 : 0; return 0; }
API R cuStreamBeginCapture_v2(void* s, int) { ((StreamS*)s)->capture = new Graph; return 0; }
API R cuStreamEndCapture(void* s, void** g) { *g = ((StreamS*)s)->capture; ((StreamS*)s)->capture = nullptr; return 0; }
API R cuStreamWaitEvent(void*, void*, unsigned) { return 0; }
API R cuGraphInstantiateWithFlags(void** e, void* g, uint64_t) { *e = new Graph(*(Graph*)g); return 0; }
API R cuGraphUpload(void*, void*) { return 0; }
API R cuGraphLaunch(void* e, void*) { LOCK; for (auto& f : ((Graph*)e)->work) f(); return 0; }
API R cuGraphExecDestroy(void* e) { delete (Graph*)e; return 0; }
API R cuGraphDestroy(void* g) { delete (Graph*)g; return 0; }
API R cuMemPoolCreate(void** p, const void*) { *p = (void*)2; return 0; }
API R cuMemPoolDestroy(void*) { return 0; }
API R cuMemPoolSetAttribute(void*, int, void*) { return 0; }
static std::map<P, std::pair<char*, size_t>> live;
static R alloc(P* p, size_t n) {
    LOCK;
    size_t page = 4096, rounded = (n + 255) / 256 * 256, whole = (rounded + page - 1) / page * page;
    char* m = (char*)mmap(0, whole + 2 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (m == MAP_FAILED) return 2;
    mprotect(m, page, PROT_NONE), mprotect(m + page + whole, page, PROT_NONE);
    char* at = m + page + whole - rounded;
    memset(at, 0xa5, rounded);
    *p = (P)at;
    live[*p] = {m, whole + 2 * page};
    return 0;
}
static R release(P p) { LOCK; auto i = live.find(p); if (i == live.end()) return 1; munmap(i->second.first, i->second.second); live.erase(i); return 0; }
API R cuMemAlloc_v2(P* p, size_t n) { return alloc(p, n); }
API R cuMemAllocFromPoolAsync(P* p, size_t n, void*, void*) { return alloc(p, n); }
API R cuMemAllocAsync(P* p, size_t n, void*) { return alloc(p, n); }
API R cuMemFree_v2(P p) { return release(p); }
API R cuMemFreeAsync(P p, void*) { return release(p); }
API R cuMemcpyDtoHAsync_v2(void* d, P s, size_t n, void*) { LOCK; memcpy(d, (void*)s, n); return 0; }
API R cuMemcpyDtoH_v2(void* d, P s, size_t n) { LOCK; memcpy(d, (void*)s, n); return 0; }
API R cuMemcpyHtoDAsync_v2(P d, const void* s, size_t n, void* st) { LOCK; memcpy((void*)d, s, n); return 0; }
API R cuPointerGetAttribute(void*, int, P) { return 1; }
API R cuPointerGetAttributes(unsigned, int*, void**, P) { return 0; }
API R cuMemcpyHtoD_v2(P d, const void* s, size_t n) { LOCK; memcpy((void*)d, s, n); return 0; }
API R cuMemcpyDtoDAsync_v2(P d, P s, size_t n, void* st) { LOCK; enqueue((StreamS*)st, [=] { memmove((void*)d, (void*)s, n); }); return 0; }
API R cuMemsetD8Async(P d, unsigned char v, size_t n, void* st) { LOCK; enqueue((StreamS*)st, [=] { memset((void*)d, v, n); }); return 0; }
API R cuMemHostAlloc(void** p, size_t n, unsigned) { *p = aligned_alloc(4096, (n + 4095) / 4096 * 4096); return 0; }
API R cuMemFreeHost(void* p) { free(p); return 0; }
API R cuModuleLoadData(void** m, const void* image) {
    LOCK;
    void* so = dlopen((const char*)image, RTLD_NOW | RTLD_LOCAL);
    if (!so) { fprintf(stderr, "emu: %s\n", dlerror()); return 200; }
    *m = new Module{so};
    return 0;
}
API R cuModuleGetFunction(void** f, void* m, const char*) {
    void* so = ((Module*)m)->so;
    auto threads = (int (*)())dlsym(so, "emu_threads");
    *f = new Function{(void (*)(const unsigned*, unsigned, const void*, size_t))dlsym(so, "emu_run"), threads()};
    return 0;
}
API R cuModuleGetGlobal_v2(P* p, size_t* n, void* m, const char* name) { *p = (P)dlsym(((Module*)m)->so, name); if (n) *n = 4; return *p ? 0 : 500; }
API R cuFuncSetAttribute(void*, int, int) { return 0; }
API R cuFuncGetAttribute(int* v, int, void* f) { *v = ((Function*)f)->threads; return 0; }
API R cuLaunchKernel(void* f, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned, unsigned, unsigned shared, void* st, void** params, void** extra) {
    LOCK;
    launches++;
    if (shared > 227 << 10 || bx > 1024 || !x) return 1;
    const void* data = nullptr; size_t size = 0;
    if (extra) for (int i = 0; extra[i]; i += 2) { if (extra[i] == (void*)1) data = extra[i + 1]; else if (extra[i] == (void*)2) size = *(size_t*)extra[i + 1]; }
    else data = params[0], size = 4096;
    std::vector<char> copy((const char*)data, (const char*)data + size);
    Function* fn = (Function*)f;
    enqueue((StreamS*)st, [=] { unsigned g[3] = {x, y, z}; fn->run(g, bx, copy.data(), copy.size()); });
    return 0;
}
struct LaunchConfig { unsigned grid[3], block[3], shared; void* stream; void* attributes; unsigned count; };
API R cuLaunchKernelEx(const LaunchConfig* c, void* f, void** params, void** extra) {
    return cuLaunchKernel(f, c->grid[0], c->grid[1], c->grid[2], c->block[0], c->block[1], c->block[2], c->shared, c->stream, params, extra);
}
struct Event { std::chrono::steady_clock::time_point t; };
API R cuEventCreate(void** e, unsigned) { *e = new Event; return 0; }
API R cuEventRecord(void* e, void*) { ((Event*)e)->t = std::chrono::steady_clock::now(); return 0; }
API R cuEventSynchronize(void*) { return 0; }
API R cuEventQuery(void*) { return 0; }
API R cuEventElapsedTime(float* ms, void* a, void* b) { *ms = std::chrono::duration<float, std::milli>(((Event*)b)->t - ((Event*)a)->t).count(); return 0; }
API R cuEventElapsedTime_v2(float* ms, void* a, void* b) { return cuEventElapsedTime(ms, a, b); }
API R cuEventDestroy_v2(void* e) { delete (Event*)e; return 0; }
API R cuGetErrorString(R, const char** s) { *s = "error"; return 0; }
API R cuGetErrorName(R, const char** s) { *s = "EMU"; return 0; }

// ---- NVRTC
struct Program { std::string text, name, out, log; std::vector<std::pair<std::string, std::string>> headers; };
API const char* nvrtcGetErrorString(R) { return "nvrtc error"; }
API R nvrtcVersion(int* a, int* b) { *a = 13, *b = 99; return 0; }
API R nvrtcCreateProgram(void** p, const char* src, const char* name, int n, const char* const* texts, const char* const* names) {
    auto* q = new Program{src, name, "", ""};
    for (int i = 0; i < n; i++) q->headers.push_back({names[i], texts[i]});
    *p = q;
    return 0;
}
static std::string fixed(std::string s) { return std::regex_replace(s, std::regex("extern __shared__[^;]*shared_memory\\[\\];"), "\n#define shared_memory emu_dynamic\n"); }
API R nvrtcCompileProgram(void* pp, int n, const char* const* opts) {
    Program& p = *(Program*)pp;
    if (const char* k = getenv("EMU_KERNELS")) {
        auto slurp = [](std::string f, std::string& to) { std::ifstream in(f); if (in) { std::stringstream ss; ss << in.rdbuf(); to = ss.str(); } };
        slurp(std::string(k) + "/" + p.name + ".cu", p.text);
        for (auto& h : p.headers) slurp(std::string(k) + "/" + h.first, h.second);
    }
    std::string dir = getenv("EMU_DIR") ? getenv("EMU_DIR") : ".", flags, all = p.text;
    for (int i = 0; i < n; i++) if (!strncmp(opts[i], "-D", 2)) flags += std::string(" '") + opts[i] + "'";
    for (auto& h : p.headers) all += h.first + h.second;
    for (const char* f : {"emu.h", "ptx.cuh", "hopper.cuh", "runtime.h"}) { std::ifstream in(dir + "/" + f); std::stringstream ss; ss << in.rdbuf(); all += ss.str(); }
    uint64_t h1 = 1469598103934665603ull, h2 = 7;
    for (unsigned char c : all + flags) h1 = (h1 ^ c) * 1099511628211ull, h2 = h2 * 6364136223846793005ull + c + 1;
    char key[40]; snprintf(key, 40, "%016lx%016lx", h1, h2);
    std::string so = dir + "/cache/" + key + ".so";
    struct stat st;
    if (!stat(so.c_str(), &st)) { p.out = so; return 0; }
    std::string work = dir + "/cache/" + key + "." + std::to_string(getpid()) + std::to_string((uint64_t)pp);
    mkdir(work.c_str(), 0777);
    for (auto& h : p.headers) {
        std::string path = work + "/" + h.first;
        for (size_t i = work.size() + 1; (i = path.find('/', i)) != std::string::npos; i++) mkdir(path.substr(0, i).c_str(), 0777);
        if (h.first == "ptx.cuh" || h.first == "hopper.cuh") std::ofstream(path) << std::ifstream(dir + "/" + h.first).rdbuf();
        else std::ofstream(path) << fixed(h.second);
    }
    std::smatch m;
    std::regex kernel("extern \"C\" __global__ void[ \n]*(__launch_bounds__\\()?([^{]*?)\\)?\\s+(\\w+)\\(([^{]*)\\)\\s*\\{");
    // name(const __grid_constant__ Params p)
    std::regex call("__global__ void[^{]*?(\\w+)\\(\\s*const __grid_constant__ (\\w+) \\w+\\)");
    std::string threads = "256", invoke = "";
    if (std::regex_search(p.text, m, call)) {
        invoke = m[1].str() + "(*(const " + m[2].str() + "*)p);";
        std::string head = m[0].str();
        size_t a = head.find("__launch_bounds__(");
        if (a != std::string::npos) { size_t b = a + 18, depth = 0, e = b; while (head[e] != ',' && !(head[e] == ')' && depth == 0)) { if (head[e] == '(') depth++; if (head[e] == ')') depth--; e++; } threads = head.substr(b, e - b); }
    } else { p.log = "emu: no kernel with a struct of parameters"; return 6; }
    std::string cpp = "#include \"" + dir + "/emu.h\"\n#line 1 \"" + p.name + "\"\n" + fixed(p.text) + "\n#define EMU_THREADS (" + threads + ")\n#define EMU_CALL " + invoke + "\n#include \"" + dir + "/runtime.h\"\n";
    std::ofstream(work + "/k.cpp") << cpp;
    std::string tmp = work + "/k.so", cmd = "cd " + work + " && g++ -std=c++17 -w -O1 -fno-strict-aliasing -ffp-contract=off -march=native -shared -fPIC -fno-gnu-unique -Wl,-Bsymbolic -I. " + flags + " k.cpp -o k.so > log 2>&1";
    if (system(cmd.c_str())) { std::ifstream in(work + "/log"); std::stringstream ss; ss << in.rdbuf(); p.log = ss.str().substr(0, 4000); return 6; }
    rename(tmp.c_str(), so.c_str());
    if (!getenv("EMU_KEEP")) system(("rm -rf " + work).c_str());
    p.out = so;
    return 0;
}
API R nvrtcDestroyProgram(void** p) { delete (Program*)*p; *p = nullptr; return 0; }
API R nvrtcGetProgramLogSize(void* p, size_t* n) { *n = ((Program*)p)->log.size() + 1; return 0; }
API R nvrtcGetProgramLog(void* p, char* s) { strcpy(s, ((Program*)p)->log.c_str()); return 0; }
API R nvrtcGetCUBINSize(void* p, size_t* n) { *n = ((Program*)p)->out.size() + 1; return 0; }
API R nvrtcGetCUBIN(void* p, char* s) { strcpy(s, ((Program*)p)->out.c_str()); return 0; }
