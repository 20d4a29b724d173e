//! The driver: contexts, streams, memory, modules, launches. Everything unsafe about CUDA is here.

use super::kernel::KernelKey;
use super::nvrtc;
use crate::error::{Error, Result};
use cudarc::driver::{result, sys};
use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::sync::atomic::{AtomicPtr, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock, Weak};
use std::time::Duration;
use sys::CUdevice_attribute_enum as Attribute;

/// CUDA 12.0: the first driver that takes what NVRTC 12 compiles.
const OLDEST_DRIVER: i32 = 12000;

pub(super) type Code = result::DriverError;

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn unavailable(device: &str, reason: impl Into<String>) -> Error {
    Error::DeviceUnavailable { device: device.to_owned(), reason: reason.into() }
}

fn words(code: Code) -> String {
    let text =
        |s: Result<&std::ffi::CStr, Code>| s.map_or_else(|_| "?".to_owned(), |s| s.to_string_lossy().into_owned());
    format!("{} ({})", text(code.error_string()), text(code.error_name()))
}

/// Loads and initialises the driver, once.
fn init() -> Result<i32, String> {
    static DRIVER: OnceLock<Result<i32, String>> = OnceLock::new();
    DRIVER
        .get_or_init(|| {
            let library = if cfg!(windows) { "nvcuda.dll" } else { "libcuda.so.1" };
            // SAFETY: the library's initialisers are NVIDIA's. Without it cudarc would panic.
            if unsafe { libloading::Library::new(library) }.is_err() {
                return Err(format!("{library} is not found: install the NVIDIA driver (CUDA 12.0 or later)"));
            }
            result::init().map_err(|e| match e.0 {
                sys::CUresult::CUDA_ERROR_NO_DEVICE => "the driver finds no NVIDIA GPU".to_owned(),
                _ => format!("the NVIDIA driver does not start: {}", words(e)),
            })?;
            let mut version = 0;
            // SAFETY: writes one integer.
            unsafe { sys::cuDriverGetVersion(&mut version) }.result().map_err(words)?;
            if version < OLDEST_DRIVER {
                let (major, minor) = (version / 1000, version % 1000 / 10);
                return Err(format!(
                    "the NVIDIA driver supports CUDA {major}.{minor}: install one for CUDA 12.0 or later"
                ));
            }
            Ok(version)
        })
        .clone()
}

/// How many GPUs there are.
pub(super) fn count() -> Result<usize> {
    init().map_err(|reason| unavailable("cuda", reason))?;
    let n = result::device::get_count().map_err(|e| unavailable("cuda", words(e)))?;
    Ok(n.max(0) as usize)
}

/// What kernels are made for.
#[derive(Clone, Debug)]
pub(super) struct Limits {
    pub name: String,
    pub memory: usize,
    pub capability: (i32, i32),
    pub multiprocessors: u32,
    /// Shared memory that a block can have.
    pub shared_memory: u32,
    pub driver: i32,
    pools: bool,
}

impl Limits {
    /// Whether a kernel may be started while the one before it ends, in graphs too: from compute capability 9.0 on, by CUDA 12.3.
    fn starts_early(&self) -> bool {
        self.capability >= (9, 0) && self.driver >= 12030
    }
}

/// A compiled kernel, or the lock of those who wait for it.
type Slot = Arc<Mutex<Option<Arc<Kernel>>>>;

/// A GPU's primary context and the kernels loaded into it: one for the whole process.
pub(super) struct Context {
    pub id: String,
    pub limits: Limits,
    raw: sys::CUcontext,
    device: sys::CUdevice,
    kernels: RwLock<HashMap<KernelKey, Arc<Kernel>>>,
    /// By the digest of their sources.
    compiled: Mutex<HashMap<u128, Slot>>,
}

// SAFETY: the driver's handles may be used from any thread.
unsafe impl Send for Context {}
// SAFETY: as above; what is shared is behind locks.
unsafe impl Sync for Context {}

impl Context {
    pub fn get(ordinal: usize) -> Result<Arc<Context>> {
        static OPEN: Mutex<Vec<(usize, Weak<Context>)>> = Mutex::new(Vec::new());
        let id = format!("cuda:{ordinal}");
        let driver = init().map_err(|reason| unavailable(&id, reason))?;
        let mut open = lock(&OPEN);
        open.retain(|(_, c)| c.strong_count() > 0);
        if let Some(context) = open.iter().find(|(o, _)| *o == ordinal).and_then(|(_, c)| c.upgrade()) {
            return Ok(context);
        }
        let devices = count()?;
        if ordinal >= devices {
            return Err(unavailable(&id, format!("the driver finds {devices} GPUs")));
        }
        let failed = |e| unavailable(&id, words(e));
        let device = result::device::get(ordinal as i32).map_err(failed)?;
        // SAFETY: `device` comes from the driver.
        let attribute = |a| unsafe { result::device::get_attribute(device, a) }.map_err(failed);
        let limits = Limits {
            name: result::device::get_name(device).map_err(failed)?,
            // SAFETY: as above.
            memory: unsafe { result::device::total_mem(device) }.map_err(failed)?,
            capability: (
                attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
                attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
            ),
            multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as u32,
            shared_memory: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)? as u32,
            driver,
            pools: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED)? != 0,
        };
        if limits.capability < (8, 0) {
            let (major, minor) = limits.capability;
            return Err(unavailable(
                &id,
                format!("{} has compute capability {major}.{minor}: 8.0 is the oldest supported", limits.name),
            ));
        }
        // SAFETY: `device` comes from the driver; released in `drop`.
        let raw = unsafe { result::primary_ctx::retain(device) }.map_err(failed)?;
        let context =
            Arc::new(Context { id, limits, raw, device, kernels: RwLock::default(), compiled: Mutex::default() });
        open.push((ordinal, Arc::downgrade(&context)));
        Ok(context)
    }

    /// Makes this thread's driver calls go to this GPU.
    pub fn enter(&self) -> Result<()> {
        // SAFETY: `raw` is retained as long as `self` lives.
        unsafe { result::ctx::set_current(self.raw) }.map_err(|e| self.failed(e))
    }

    pub fn failed(&self, code: Code) -> Error {
        Error::DeviceFailed { device: self.id.clone(), reason: words(code) }
    }

    /// The architecture that kernels are compiled for.
    pub fn architecture(&self) -> String {
        let (major, minor) = self.limits.capability;
        // Hopper's own instructions exist only in the variant with an `a`.
        format!("sm_{major}{minor}{}", if (major, minor) == (9, 0) { "a" } else { "" })
    }

    /// The kernel of this key. One that was asked for before costs a look-up.
    pub fn kernel(&self, key: &KernelKey) -> Result<Arc<Kernel>> {
        if let Some(found) = self.kernels.read().unwrap_or_else(PoisonError::into_inner).get(key) {
            return Ok(found.clone());
        }
        let kernel = self.compiled(&key.source())?;
        self.kernels.write().unwrap_or_else(PoisonError::into_inner).insert(*key, kernel.clone());
        Ok(kernel)
    }

    /// The kernel of this source, from memory, from disk, or compiled now.
    pub fn compiled(&self, source: &nvrtc::Source) -> Result<Arc<Kernel>> {
        let nvrtc = nvrtc::load().map_err(|reason| unavailable(&self.id, reason))?;
        let architecture = self.architecture();
        let key = source.key(&architecture, nvrtc.version);
        let slot = lock(&self.compiled).entry(key).or_default().clone();
        // Others wait for the one that compiles this kernel; different kernels compile side by side.
        let mut slot = lock(&slot);
        if let Some(kernel) = &*slot {
            return Ok(kernel.clone());
        }
        let kernel = match super::cache::load(key).and_then(|cubin| self.load(source, &cubin).ok()) {
            Some(kernel) => kernel,
            None => {
                let compiled = nvrtc.compile(source, &architecture)?;
                let kernel = self.load(source, &compiled.cubin).map_err(|e| {
                    let (major, minor) = (self.limits.driver / 1000, self.limits.driver % 1000 / 10);
                    let (compiler, _) = nvrtc.version;
                    if compiler > major {
                        return unavailable(
                            &self.id,
                            format!("the driver supports CUDA {major}.{minor} but NVRTC is of CUDA {compiler}: install a newer driver, or NVRTC {major}"),
                        );
                    }
                    self.failed(e)
                })?;
                super::cache::store(key, &compiled.cubin);
                kernel
            }
        };
        let kernel = Arc::new(kernel);
        *slot = Some(kernel.clone());
        Ok(kernel)
    }

    fn load(&self, source: &nvrtc::Source, cubin: &[u8]) -> Result<Kernel, Code> {
        // SAFETY: the context is current; the image is a cubin of NVRTC's, checked by its digest if it was stored. Modules
        // live as long as their context.
        unsafe {
            result::ctx::set_current(self.raw)?;
            let module = result::module::load_data(cubin.as_ptr().cast())?;
            let name = |s: &str| CString::new(s).unwrap_or_default();
            let raw = result::module::get_function(module, name(&source.entry))?;
            let mut shared = source.shared_memory;
            if let Some(symbol) = source.shared_memory_symbol {
                let (at, _) = result::module::get_global(module, name(symbol))?;
                let mut bytes = [0u8; 4];
                result::memcpy_dtoh_sync(&mut bytes, at)?;
                shared = u32::from_le_bytes(bytes);
            }
            if shared > 48 << 10 {
                let attribute = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
                result::function::set_function_attribute(raw, attribute, shared as i32)?;
            }
            let threads = result::function::get_function_attribute(
                raw,
                sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK,
            )?;
            Ok(Kernel { raw, shared_memory: shared, threads: threads as u32 })
        }
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: retained in `get`; nothing that uses the context outlives it. Its modules go with it.
        let _ = unsafe { result::primary_ctx::release(self.device) };
    }
}

/// A loaded kernel.
pub(super) struct Kernel {
    raw: sys::CUfunction,
    shared_memory: u32,
    /// Threads that a block can have: those of its `__launch_bounds__`, if it has any.
    threads: u32,
}

// SAFETY: the handle is only read.
unsafe impl Send for Kernel {}
// SAFETY: as above.
unsafe impl Sync for Kernel {}

/// A queue of work on a GPU, with the pool that its memory comes from.
pub(super) struct Stream {
    pub context: Arc<Context>,
    /// The driver's stream that work goes to from now on.
    current: AtomicPtr<sys::CUstream_st>,
    /// What is destroyed with it: no stream of the caller's.
    own: Option<sys::CUstream>,
    pub(super) pool: Option<sys::CUmemoryPool>,
    /// Memory that was given up while a graph was captured, which is freed later.
    pub(super) given_up: Mutex<Vec<u64>>,
}

// SAFETY: the driver's handles may be used from any thread.
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Sync for Stream {}

impl Stream {
    /// A stream of its own.
    pub fn new(context: &Arc<Context>) -> Result<Self> {
        context.enter()?;
        let raw = result::stream::create(result::stream::StreamKind::NonBlocking).map_err(|e| context.failed(e))?;
        Self::with(context, raw, Some(raw))
    }

    /// The caller's stream.
    ///
    /// # Safety
    /// The stream must be one of this GPU's primary context and outlive the result.
    pub unsafe fn borrowed(context: &Arc<Context>, raw: *mut c_void) -> Result<Self> {
        context.enter()?;
        Self::with(context, raw.cast(), None)
    }

    /// Without a pool.
    fn bare(context: &Arc<Context>, raw: sys::CUstream, own: Option<sys::CUstream>) -> Self {
        Stream { context: context.clone(), current: AtomicPtr::new(raw), own, pool: None, given_up: Mutex::default() }
    }

    fn with(context: &Arc<Context>, raw: sys::CUstream, own: Option<sys::CUstream>) -> Result<Self> {
        let mut stream = Self::bare(context, raw, own);
        if context.limits.pools {
            // SAFETY: all fields of these structs may be zero.
            let mut properties: sys::CUmemPoolProps = unsafe { std::mem::zeroed() };
            properties.allocType = sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED;
            // The kind of place and its number; bindings of different CUDA versions name the second differently.
            let device = sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE as i32;
            // SAFETY: the struct begins with these two integers in every version.
            unsafe { (&raw mut properties.location).cast::<[i32; 2]>().write([device, context.device]) };
            // Small blocks that come and go every step, such as page tables, are kept.
            let mut keep: u64 = 64 << 20;
            let threshold = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
            // SAFETY: the pool lives until `drop`; the attribute is a 64-bit integer.
            unsafe {
                let pool = result::mem_pool::create(&properties).map_err(|e| context.failed(e))?;
                stream.pool = Some(pool);
                result::mem_pool::set_attribute(pool, threshold, (&raw mut keep).cast())
                    .map_err(|e| context.failed(e))?;
            }
        }
        Ok(stream)
    }

    /// The driver's stream that work goes to.
    pub(super) fn raw(&self) -> sys::CUstream {
        self.current.load(Relaxed)
    }

    /// Sends work to another stream of the caller's from now on, behind all that was sent before. Where one of both is captured in a
    /// graph, which knows of no work outside, the caller sees to the order.
    ///
    /// # Safety
    /// As [`borrowed`](Stream::borrowed).
    pub unsafe fn move_to(&self, raw: *mut c_void) -> Result<()> {
        let (from, to) = (self.raw(), raw.cast());
        if from == to {
            return Ok(());
        }
        self.context.enter()?;
        if !is_capturing(from) && !is_capturing(to) {
            let failed = |e| self.context.failed(e);
            let event = result::event::create(sys::CUevent_flags_enum::CU_EVENT_DISABLE_TIMING).map_err(failed)?;
            let wait = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
            // SAFETY: both streams and the event are alive; the driver keeps the event until it has passed.
            let ordered = unsafe {
                let ordered =
                    result::event::record(event, from).and_then(|()| result::stream::wait_event(to, event, wait));
                result::event::destroy(event).and(ordered)
            };
            ordered.map_err(failed)?;
        }
        self.current.store(to, Relaxed);
        Ok(())
    }

    pub(super) fn is_captured(&self) -> bool {
        is_capturing(self.raw())
    }

    /// Fails while the caller captures the stream in a graph: memory would be the graph's, and each launch would copy once more
    /// from the host's, which may be gone.
    pub(super) fn expect_no_capture(&self, what: &str) -> Result<()> {
        if self.is_captured() {
            let what = format!("{what} while its stream is captured in a graph");
            return Err(Error::Unsupported { device: self.context.id.clone(), what });
        }
        Ok(())
    }

    /// Enqueues a kernel. The context must be this thread's: see `Context::enter`.
    pub fn launch(&self, launch: &Launch) -> Result<()> {
        let params = launch.params.bytes();
        let mut size = params.len();
        let mut extra = [
            sys::CU_LAUNCH_PARAM_BUFFER_POINTER_AS_INT as usize as *mut c_void,
            params.as_ptr().cast_mut().cast(),
            sys::CU_LAUNCH_PARAM_BUFFER_SIZE_AS_INT as usize as *mut c_void,
            (&raw mut size).cast(),
            sys::CU_LAUNCH_PARAM_END_AS_INT as usize as *mut c_void,
        ];
        let mut early = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let [x, y, z] = launch.grid;
        let config = sys::CUlaunchConfig {
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: launch.kernel.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: launch.kernel.shared_memory,
            hStream: self.raw(),
            attrs: &raw mut early,
            numAttrs: (launch.waits && self.context.limits.starts_early()) as u32,
        };
        // SAFETY: the parameters are the kernel's (a custom kernel's: its author's promise), their memory is kept alive by
        // stream order, and the driver copies parameters and attributes before it returns.
        unsafe { sys::cuLaunchKernelEx(&config, launch.kernel.raw, std::ptr::null_mut(), extra.as_mut_ptr()) }
            .result()
            .map_err(|e| self.context.failed(e))
    }

    /// What `enqueue` enqueues on the stream that it is given, as one piece of work: between its kernels the GPU does not wait for
    /// the host.
    pub fn graph(&self, enqueue: impl FnOnce(&Stream) -> Result<()>) -> Result<Graph> {
        let context = &self.context;
        context.enter()?;
        let failed = |e| context.failed(e);
        // Not on this one: the caller's may be the legacy stream, which cannot be captured.
        let raw = result::stream::create(result::stream::StreamKind::NonBlocking).map_err(failed)?;
        let aside = Stream::bare(context, raw, Some(raw));
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is alive, and a capture that has begun is ended whatever happens.
        let (enqueued, captured) = unsafe {
            result::stream::begin_capture(raw, mode).map_err(failed)?;
            (enqueue(&aside), result::stream::end_capture(raw))
        };
        let mut graph = Graph { context: context.clone(), graph: captured.map_err(failed)?, run: std::ptr::null_mut() };
        enqueued?;
        let flags = sys::CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
        // SAFETY: the graph is alive; uploading it now keeps that out of the launch.
        unsafe {
            graph.run = result::graph::instantiate(graph.graph, flags).map_err(failed)?;
            sys::cuGraphUpload(graph.run, self.raw()).result().map_err(failed)?;
        }
        Ok(graph)
    }

    pub fn launch_graph(&self, graph: &Graph) -> Result<()> {
        self.context.enter()?;
        // SAFETY: the graph is instantiated; what it uses is kept alive by stream order.
        unsafe { result::graph::launch(graph.run, self.raw()) }.map_err(|e| self.context.failed(e))
    }

    /// Enqueues a copy within the GPU. The context must be this thread's.
    pub fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<()> {
        // SAFETY: both are within buffers that are kept alive by stream order.
        unsafe { result::memcpy_dtod_async(to, from, bytes, self.raw()) }.map_err(|e| self.context.failed(e))
    }

    /// A mark behind all work enqueued so far.
    pub fn mark(self: &Arc<Self>) -> Result<Mark> {
        self.mark_with(sys::CUevent_flags_enum::CU_EVENT_DISABLE_TIMING)
    }

    /// A mark that knows when the GPU came to it.
    pub fn timed_mark(self: &Arc<Self>) -> Result<Mark> {
        self.mark_with(sys::CUevent_flags_enum::CU_EVENT_DEFAULT)
    }

    fn mark_with(self: &Arc<Self>, flags: sys::CUevent_flags_enum) -> Result<Mark> {
        self.context.enter()?;
        let failed = |e| self.context.failed(e);
        let event = result::event::create(flags).map_err(failed)?;
        let mark = Mark { stream: self.clone(), event };
        // SAFETY: both are alive.
        unsafe { result::event::record(event, self.raw()) }.map_err(failed)?;
        Ok(mark)
    }

    pub(super) fn synchronize(&self) -> Result<()> {
        // SAFETY: the stream is alive.
        unsafe { result::stream::synchronize(self.raw()) }.map_err(|e| self.context.failed(e))
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if self.context.enter().is_err() {
            return;
        }
        if !self.is_captured() {
            self.free_given_up();
        }
        // SAFETY: all memory of the pool holds this stream, so it is freed by now.
        unsafe {
            if let Some(pool) = self.pool {
                let _ = result::mem_pool::destroy(pool);
            }
            if let Some(own) = self.own {
                let _ = result::stream::destroy(own);
            }
        }
    }
}

/// Whether a stream is captured in a graph. The legacy stream cannot be, and does not say so while others are.
fn is_capturing(raw: sys::CUstream) -> bool {
    // SAFETY: the stream is alive.
    let status = unsafe { result::stream::is_capturing(raw) };
    matches!(status, Ok(sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_ACTIVE))
}

/// Work that is handed to the GPU as one piece.
pub(super) struct Graph {
    context: Arc<Context>,
    graph: sys::CUgraph,
    /// Null until it is instantiated.
    run: sys::CUgraphExec,
}

// SAFETY: the driver's handles may be used from any thread.
unsafe impl Send for Graph {}

impl Drop for Graph {
    fn drop(&mut self) {
        if self.context.enter().is_err() {
            return;
        }
        // SAFETY: both are this graph's own; the driver keeps what is running.
        unsafe {
            if !self.run.is_null() {
                let _ = result::graph::exec_destroy(self.run);
            }
            let _ = result::graph::destroy(self.graph);
        }
    }
}

/// A point in a stream.
pub(super) struct Mark {
    stream: Arc<Stream>,
    event: sys::CUevent,
}

// SAFETY: the driver's handles may be used from any thread.
unsafe impl Send for Mark {}

impl Mark {
    pub fn wait(&self) -> Result<()> {
        self.stream.context.enter()?;
        // SAFETY: the event is alive.
        unsafe { result::event::synchronize(self.event) }.map_err(|e| self.stream.context.failed(e))
    }

    /// The time from one timed mark to a later one, both passed.
    pub fn until(&self, later: &Mark) -> Result<Duration> {
        self.stream.context.enter()?;
        // SAFETY: both events are alive.
        let ms = unsafe { result::event::elapsed(self.event, later.event) };
        ms.map(|ms| Duration::from_secs_f64(f64::from(ms) / 1e3)).map_err(|e| self.stream.context.failed(e))
    }
}

impl Drop for Mark {
    fn drop(&mut self) {
        if self.stream.context.enter().is_ok() {
            // SAFETY: the event is alive; the driver keeps it until work before it is done.
            let _ = unsafe { result::event::destroy(self.event) };
        }
    }
}

/// A kernel with its arguments.
pub(super) struct Launch {
    pub kernel: Arc<Kernel>,
    /// Blocks; each has as many threads as the kernel's `__launch_bounds__` says.
    pub grid: [u32; 3],
    pub params: ParamBytes,
    /// Whether it waits for the work before it by itself, so that it may be started while that ends.
    pub waits: bool,
}

/// Parameters as the kernel finds them in memory.
#[allow(clippy::large_enum_variant)] // In place is the point.
pub(super) enum ParamBytes {
    /// So many bytes of these: all kernels' but a caller's own.
    Short([u64; SHORT], usize),
    Long(Vec<u8>),
}

/// Words of parameters that are kept in place.
const SHORT: usize = 128;

impl ParamBytes {
    pub fn new(bytes: &[u8]) -> Self {
        let mut words = [0; SHORT];
        match bytemuck::cast_slice_mut(&mut words).get_mut(..bytes.len()) {
            Some(to) => {
                to.copy_from_slice(bytes);
                ParamBytes::Short(words, bytes.len())
            }
            None => ParamBytes::Long(bytes.to_vec()),
        }
    }

    pub fn bytes(&self) -> &[u8] {
        match self {
            ParamBytes::Short(words, n) => &bytemuck::cast_slice(words)[..*n],
            ParamBytes::Long(bytes) => bytes,
        }
    }
}
