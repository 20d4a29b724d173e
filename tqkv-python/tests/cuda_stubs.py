"""Empty CUDA libraries, so that PyPI's CUDA build of torch loads for work on the CPU without 2.4 GB of nvidia-* wheels:

    python cuda_stubs.py SITE_PACKAGES FOLDER

Every undefined symbol of torch's libraries that has a CUDA library's version, or whose name is one of CUDA's, becomes a function that
says that there is no device. Needs gcc, nm and readelf."""

import collections
import glob
import os
import re
import subprocess
import sys

CUDA = re.compile(
    r"lib(cudart|cublas|cublasLt|cudnn|cufft|cufile|curand|cusparse|cusparseLt|cusolver|cupti|nccl|nvrtc|nvshmem_host|nvJitLink)\.so"
)
PREFIX = re.compile(
    r"^(cuda|cu[A-Z]|cublas|cudnn|cufft|cuFile|curand|cusparse|cusolver|cupti|nccl|pnccl|nvrtc|nvshmem|nvJitLink|__cuda|_?_?nvshmem)"
)


def run(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def symbols(libraries):
    """CUDA's libraries with their versions, and what is undefined, by name, with versions."""
    needed, versions = set(), collections.defaultdict(set)
    undefined, defined = collections.defaultdict(set), set()
    for path in libraries:
        needed |= {n for n in re.findall(r"NEEDED.*\[(.*?)\]", run("readelf", "-dW", path)) if CUDA.match(n)}
        file = None
        for line in run("readelf", "-VW", path).split("\n"):
            if found := re.search(r"File: (\S+)", line):
                file = found[1]
            elif (found := re.search(r"Name: (\S+)", line)) and file and CUDA.match(file):
                versions[file].add(found[1])
        for line in run("nm", "-D", path).split("\n"):
            parts = line.split()
            if len(parts) == 2 and parts[0] in "Uwv":
                name, _, version = parts[1].partition("@")
                undefined[name].add(version.lstrip("@"))
            elif len(parts) == 3:
                defined.add(parts[2].partition("@")[0])
    return needed, versions, {n: v for n, v in undefined.items() if n not in defined}


def body(name):
    # Static initialisers register kernels, which must do nothing; every query says that there is no device.
    if name in ("cudaGetErrorString", "cudaGetErrorName"):
        return f'const char* {name}(void) {{ return "stub"; }}\n'
    return f"long {name}(void) {{ return {100 if name.startswith('cuda') else 0}; }}\n"


def write(folder, library, mine):
    """A library that defines symbols, each with its version if it has one."""
    source, script = os.path.join(folder, "stub.c"), os.path.join(folder, "stub.map")
    with open(source, "w") as file:
        file.write("int tqkv_stub;\n" + "".join(body(n) for n in sorted(mine) if re.fullmatch(r"\w+", n)))
    groups = collections.defaultdict(list)
    for name, version in mine.items():
        groups[version].append(name)
    with open(script, "w") as file:
        file.write("".join(f"{v} {{ global: {'; '.join(names)}; }};\n" for v, names in groups.items() if v))
    version = [f"-Wl,--version-script={script}"] if any(groups) else []
    options = ["-w", "-shared", "-fPIC", "-fno-builtin", "-O0", f"-Wl,-soname,{library}", *version]
    run("gcc", *options, "-o", os.path.join(folder, library), source)


def main(site_packages, folder):
    os.makedirs(folder, exist_ok=True)
    files = glob.glob(os.path.join(site_packages, "torch", "lib", "*.so*"))
    needed, versions, left = symbols([p for p in files if open(p, "rb").read(4) == b"\x7fELF"])
    for library in sorted(needed):
        mine = {n: next(iter(v & versions[library])) for n, v in left.items() if v & versions[library]}
        if not versions[library]:
            mine = {n: None for n, v in left.items() if PREFIX.match(n) and v == {""}}
        write(folder, library, mine)


if __name__ == "__main__":
    main(*sys.argv[1:])
