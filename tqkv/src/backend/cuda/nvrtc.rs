//! NVIDIA's run-time compiler, loaded when it is first needed. It needs no GPU.

use super::cache;
use super::codec::{self, header};
use crate::error::{Error, Result};
use libloading::Library;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::PathBuf;
use std::sync::OnceLock;

/// Names the library of NVRTC to load, for where it is not on the system's paths.
const PATH_VARIABLE: &str = "TQKV_NVRTC";

/// What the kernels include besides codecs, by the names that they include it by.
const HEADERS: &[(&str, &str)] = &[
    header!("attention/fetch.cuh"),
    header!("attention/item.cuh"),
    header!("attention/layout.cuh"),
    header!("attention/near.cuh"),
    header!("attention/params.cuh"),
    header!("attention/parts.cuh"),
    header!("attention/queries.cuh"),
    header!("attention/rows.cuh"),
    header!("attention/scores.cuh"),
    header!("attention/softmax.cuh"),
    header!("attention/sum.cuh"),
    header!("attention/values.cuh"),
    header!("common.cuh"),
    header!("hopper.cuh"),
    header!("ptx.cuh"),
    header!("transform.cuh"),
];

fn headers() -> impl Iterator<Item = (&'static str, &'static str)> {
    HEADERS.iter().chain(codec::HEADERS).copied()
}

/// A kernel before it is compiled.
#[derive(Clone, Debug)]
pub(super) struct Source {
    /// What errors call it.
    pub name: String,
    /// Its function.
    pub entry: String,
    pub text: String,
    pub options: Vec<String>,
    /// Dynamic shared memory in bytes, or the module's variable that holds it.
    pub shared_memory: u32,
    pub shared_memory_symbol: Option<&'static str>,
}

impl Source {
    /// What the compiled code is kept under.
    pub fn key(&self, architecture: &str, version: (i32, i32)) -> u128 {
        let mut digest = cache::Digest::new();
        // Headers that it includes, directly or through others.
        let mut included = vec![self.text.as_str()];
        let mut i = 0;
        while i < included.len() {
            for (name, text) in headers() {
                if included[i].contains(&format!("#include \"{name}\"")) && !included.contains(&text) {
                    included.push(text);
                }
            }
            digest.add(included[i].as_bytes());
            i += 1;
        }
        digest.add(architecture.as_bytes());
        for option in &self.options {
            digest.add(option.as_bytes());
        }
        digest.add(&version.0.to_le_bytes()).add(&version.1.to_le_bytes()).value()
    }
}

/// Machine code, and what the compiler said about it (registers, spills).
pub(super) struct Compiled {
    pub cubin: Vec<u8>,
    #[cfg_attr(not(test), allow(dead_code))] // Tests look for spills.
    pub log: String,
}

type Program = *mut c_void;
type Status = c_int;

pub(super) struct Nvrtc {
    pub version: (i32, i32),
    error_string: unsafe extern "C" fn(Status) -> *const c_char,
    create: unsafe extern "C" fn(
        *mut Program,
        *const c_char,
        *const c_char,
        c_int,
        *const *const c_char,
        *const *const c_char,
    ) -> Status,
    compile: unsafe extern "C" fn(Program, c_int, *const *const c_char) -> Status,
    destroy: unsafe extern "C" fn(*mut Program) -> Status,
    log_size: unsafe extern "C" fn(Program, *mut usize) -> Status,
    log: unsafe extern "C" fn(Program, *mut c_char) -> Status,
    cubin_size: unsafe extern "C" fn(Program, *mut usize) -> Status,
    cubin: unsafe extern "C" fn(Program, *mut c_char) -> Status,
    /// Keeps the functions loaded.
    _library: Library,
}

/// The compiler, or why there is none.
pub(super) fn load() -> Result<&'static Nvrtc, String> {
    static NVRTC: OnceLock<Result<Nvrtc, String>> = OnceLock::new();
    NVRTC.get_or_init(find).as_ref().map_err(Clone::clone)
}

/// Where the library may be, the likeliest first: named by the user, on the system's paths, in a toolkit.
fn candidates() -> Vec<PathBuf> {
    if let Some(path) = std::env::var_os(PATH_VARIABLE) {
        return vec![path.into()];
    }
    let names: &[&str] = if cfg!(windows) {
        &["nvrtc64_130_0.dll", "nvrtc64_120_0.dll"]
    } else {
        &["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"]
    };
    let toolkits = ["CUDA_PATH", "CUDA_HOME"].into_iter().filter_map(std::env::var_os).map(PathBuf::from);
    let toolkits = toolkits.chain([PathBuf::from("/usr/local/cuda")]);
    let folders = if cfg!(windows) { ["bin", "bin/x64"] } else { ["lib64", "lib"] };
    let mut all: Vec<PathBuf> = names.iter().map(PathBuf::from).collect();
    all.extend(toolkits.flat_map(|t| folders.map(|f| t.join(f))).flat_map(|f| names.iter().map(move |n| f.join(n))));
    all
}

fn find() -> Result<Nvrtc, String> {
    let candidates = candidates();
    // SAFETY: the library's initialisers are NVIDIA's.
    let Some(library) = candidates.iter().find_map(|path| unsafe { Library::new(path) }.ok()) else {
        let names: Vec<_> = candidates.iter().take(3).map(|p| p.display().to_string()).collect();
        return Err(format!(
            "NVRTC is not found ({}): install the CUDA toolkit 12 or 13, or the PyPI package nvidia-cuda-nvrtc with \
             {PATH_VARIABLE} set to its library",
            names.join(", ")
        ));
    };
    macro_rules! symbol {
        ($name:literal) => {
            // SAFETY: the types are those of nvrtc.h, the same since CUDA 11.
            *unsafe { library.get($name) }.map_err(|e| format!("NVRTC is too old: {e}; install CUDA 12 or 13's"))?
        };
    }
    // SAFETY: as in `symbol`.
    let version: unsafe extern "C" fn(*mut c_int, *mut c_int) -> Status = symbol!(b"nvrtcVersion\0");
    let (mut major, mut minor) = (0, 0);
    // SAFETY: writes two integers.
    unsafe { version(&mut major, &mut minor) };
    if major < 12 {
        return Err(format!("NVRTC is of CUDA {major}.{minor}: install CUDA 12 or 13's"));
    }
    Ok(Nvrtc {
        version: (major, minor),
        error_string: symbol!(b"nvrtcGetErrorString\0"),
        create: symbol!(b"nvrtcCreateProgram\0"),
        compile: symbol!(b"nvrtcCompileProgram\0"),
        destroy: symbol!(b"nvrtcDestroyProgram\0"),
        log_size: symbol!(b"nvrtcGetProgramLogSize\0"),
        log: symbol!(b"nvrtcGetProgramLog\0"),
        cubin_size: symbol!(b"nvrtcGetCUBINSize\0"),
        cubin: symbol!(b"nvrtcGetCUBIN\0"),
        _library: library,
    })
}

impl Nvrtc {
    pub fn compile(&self, source: &Source, architecture: &str) -> Result<Compiled> {
        let failed = |log: String| Error::KernelCompile { name: source.name.clone(), log };
        let text = |s: &str| CString::new(s).map_err(|_| failed("the source holds a NUL character".to_owned()));
        let check = |status: Status| match status {
            0 => Ok(()),
            // SAFETY: NVRTC returns a static string for every number.
            _ => Err(failed(unsafe { CStr::from_ptr((self.error_string)(status)) }.to_string_lossy().into_owned())),
        };
        let (code, name) = (text(&source.text)?, text(&source.name)?);
        let headers = headers().map(|(n, t)| Ok((text(n)?, text(t)?))).collect::<Result<Vec<_>>>()?;
        let names: Vec<_> = headers.iter().map(|h| h.0.as_ptr()).collect();
        let texts: Vec<_> = headers.iter().map(|h| h.1.as_ptr()).collect();
        let fixed =
            [&format!("--gpu-architecture={architecture}"), "--std=c++17", "-default-device", "--ptxas-options=-v"];
        let options = fixed.into_iter().chain(source.options.iter().map(String::as_str));
        let options = options.map(text).collect::<Result<Vec<_>>>()?;
        let options: Vec<_> = options.iter().map(|o| o.as_ptr()).collect();
        let mut program = std::ptr::null_mut();
        // SAFETY: all strings live to the end of the call, buffers have the sizes that NVRTC says, and the program is
        // destroyed once.
        unsafe {
            check((self.create)(
                &mut program,
                code.as_ptr(),
                name.as_ptr(),
                headers.len() as c_int,
                texts.as_ptr(),
                names.as_ptr(),
            ))?;
            let status = (self.compile)(program, options.len() as c_int, options.as_ptr());
            let mut size = 0;
            (self.log_size)(program, &mut size);
            let mut log = vec![0u8; size.max(1)];
            (self.log)(program, log.as_mut_ptr().cast());
            let log = String::from_utf8_lossy(&log).trim_end_matches('\0').trim().to_owned();
            let result = match status {
                0 => (|| {
                    let mut size = 0;
                    check((self.cubin_size)(program, &mut size))?;
                    let mut cubin = vec![0u8; size];
                    check((self.cubin)(program, cubin.as_mut_ptr().cast()))?;
                    Ok(Compiled { cubin, log })
                })(),
                _ if log.is_empty() => check(status).and(Err(failed(String::new()))),
                _ => Err(failed(log)),
            };
            (self.destroy)(&mut program);
            result
        }
    }
}
