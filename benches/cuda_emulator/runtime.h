// Appended after a kernel: how the driver calls it. EMU_KERNEL, EMU_THREADS.
#undef threadIdx
#undef blockIdx
#undef gridDim
#undef blockDim
#include <sys/mman.h>
EmuBlock emu_block;
extern "C" { __attribute__((aligned(1024))) unsigned char emu_dynamic[256 << 10]; }
asm(R"(
.text
.globl emu_switch
.hidden emu_switch
emu_switch:
    pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
    ret
)");
static void emu_start() {
    EmuBlock& b = emu_block;
    b.kernel(b.params);
    Fiber& f = me();
    f.done = 1, b.live--, b.progress++;
    Warp& w = b.warps[f.warp];
    w.live--;
    if (b.live && b.arrived && b.arrived >= b.live) b.arrived = 0, b.generation++;
    if (w.live && w.arrived && w.arrived >= w.live) w.arrived = 0, w.generation++;
    int from = b.current;
    if (b.live == 0) { void* x; emu_switch(&x, b.main_sp); }
    int to = from;
    do to = to + 1 == b.n ? 0 : to + 1; while (b.fibers[to].done);
    b.current = to;
    void* x;
    emu_switch(&x, b.fibers[to].sp);
    abort();
}
extern "C" int emu_threads() { return EMU_THREADS; }
extern "C" void emu_run(const unsigned* grid, unsigned threads, const void* params, size_t bytes) {
    static char* stacks;
    const size_t STACK = 128 << 10;
    if (!stacks) stacks = (char*)mmap(0, STACK * 1024, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    EmuBlock& b = emu_block;
    alignas(64) static unsigned char copy[8192];
    memcpy(copy, params, bytes);
    for (unsigned z = 0; z < grid[2]; z++) for (unsigned y = 0; y < grid[1]; y++) for (unsigned x = 0; x < grid[0]; x++) {
        memset(emu_dynamic, 0xa5, sizeof emu_dynamic);
        memset(b.named, 0, sizeof b.named);
        b.arrived = 0, b.live = b.n = threads, b.current = 0;
        b.block_idx = {x, y, z}, b.grid_dim = {grid[0], grid[1], grid[2]}, b.block_dim = {threads, 1, 1};
        b.kernel = [](const void* p) { EMU_CALL };
        b.params = copy;
        for (int i = 0; i < (int)threads; i++) {
            Fiber& f = b.fibers[i];
            f.warp = i / 32, f.lane = i % 32, f.done = 0, f.tid = {(unsigned)i, 0, 0}, f.phase = 0;
            Warp& w = b.warps[i / 32];
            if (i % 32 == 0) w.arrived = w.live = 0;
            w.live++;
            void** sp = (void**)(stacks + STACK * (i + 1) - 64);
            *--sp = 0;
            *--sp = (void*)emu_start;
            for (int k = 0; k < 6; k++) *--sp = 0;
            f.sp = sp;
        }
        emu_switch(&b.main_sp, b.fibers[0].sp);
    }
}
