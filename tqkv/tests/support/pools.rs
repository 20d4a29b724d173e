//! Pools of tqkv's own, or over memory of someone else's with strides of his.

use super::{Rng, download};
use std::cell::Cell;
use tqkv::compute::DeviceKind;
use tqkv::format::RowFormat;
use tqkv::ops::{PagePool, Strides};
use tqkv::{Buffer, DType, Device, Result};

thread_local! {
    /// Whether pools of this thread's test lie in borrowed memory, and how many did.
    static FOREIGN: Cell<Option<usize>> = const { Cell::new(None) };
}

/// From here on this thread's test has its pools in borrowed memory, in one layout after the other.
pub fn use_foreign_pools() {
    FOREIGN.set(Some(0));
}

/// Whether [`use_foreign_pools`] was called.
pub fn are_foreign() -> bool {
    FOREIGN.get().is_some()
}

thread_local! {
    /// Whether page tables, lengths and slots of this thread's test lie on the device.
    static TABLES_ON_DEVICE: Cell<bool> = const { Cell::new(false) };
}

/// From here on this thread's test has page tables, lengths and slots on the device, where it can.
pub fn use_tables_on_device() {
    TABLES_ON_DEVICE.set(true);
}

/// Whether [`use_tables_on_device`] was called.
pub fn are_tables_on_device() -> bool {
    TABLES_ON_DEVICE.get()
}

/// A pool of zeros, or of garbage if it is foreign.
pub fn new_pool(device: &Device, row: RowFormat, kv_heads: usize, page_size: usize, pages: usize) -> Result<PagePool> {
    match FOREIGN.get() {
        None => PagePool::new(device, row, kv_heads, page_size, pages),
        Some(n) => {
            FOREIGN.set(Some(n + 1));
            foreign(device, row, [pages, kv_heads, page_size], n % 4)
        }
    }
}

/// The last row ends where the memory does, or with the padding that its alignment asks for; what follows cannot be read.
fn foreign(device: &Device, row: RowFormat, shape: [usize; 3], layout: usize) -> Result<PagePool> {
    let [pages, kv_heads, page_size] = shape;
    let (codes, rows) = (row.row_bytes(), kv_heads * page_size);
    let gap = codes.next_multiple_of(4);
    let whole = gap + row.scale_bytes().next_multiple_of(4);
    let (stride, scales_from, scale_stride) = match layout {
        // Dense, scales after all codes.
        0 => {
            let dense = |bytes| Strides::dense(kv_heads, page_size, bytes);
            (dense(codes), (pages * rows * codes).next_multiple_of(4), dense(row.scale_bytes()))
        }
        // By position, a row's scales after its codes.
        1 => {
            let by_position = Strides { page: rows * whole, head: whole, row: kv_heads * whole };
            (by_position, gap, by_position)
        }
        // Dense rows, a page's scales after its codes; room for another pool in every page.
        2 => {
            let page = 2 * rows * whole;
            let dense = |bytes| Strides { page, ..Strides::dense(kv_heads, page_size, bytes) };
            (dense(codes), (rows * codes).next_multiple_of(4), dense(row.scale_bytes()))
        }
        // Heads apart from each other, and rows from rows.
        _ => {
            let head = pages * page_size * (whole + 8);
            let apart = Strides { page: page_size * (whole + 8), head, row: whole + 8 };
            (apart, gap, apart)
        }
    };
    let last = |s: Strides, bytes| (pages - 1) * s.page + (kv_heads - 1) * s.head + (page_size - 1) * s.row + bytes;
    let end = last(stride, codes).max(match row.scale_bytes() {
        0 => 0,
        bytes => scales_from + last(scale_stride, bytes),
    });
    let memory = guarded(device, end);
    let scales = (row.scales_per_row() > 0).then(|| memory.slice(scales_from..end).unwrap());
    PagePool::strided(row, shape, (&memory, stride), scales.as_ref().map(|s| (s, scale_stride)))
}

/// Bytes of garbage, aligned to 4: borrowed on the CPU.
fn guarded(device: &Device, bytes: usize) -> Buffer {
    if device.info().kind != DeviceKind::Cpu {
        let buffer = device.zeros(DType::U8, &[bytes]).unwrap();
        buffer.write(&Rng(bytes as u64).bytes(bytes)).unwrap();
        return buffer;
    }
    let owner = Pages::new(bytes.next_multiple_of(4));
    let start = owner.start;
    // SAFETY: `Pages` has as many bytes, which it keeps for the buffer alone.
    let buffer = unsafe { Buffer::from_host_ptr(device, start, DType::U8, &[bytes], Box::new(owner)) }.unwrap();
    buffer.write(&Rng(bytes as u64).bytes(bytes)).unwrap();
    buffer
}

/// Memory that ends where a page of the machine does, and no page follows.
struct Pages {
    start: *mut u8,
    #[cfg(target_os = "linux")]
    mapped: (*mut std::ffi::c_void, usize),
    #[cfg(not(target_os = "linux"))]
    _bytes: Vec<u32>,
}

// SAFETY: plain bytes.
unsafe impl Send for Pages {}
// SAFETY: as above.
unsafe impl Sync for Pages {}

#[cfg(target_os = "linux")]
impl Pages {
    fn new(bytes: usize) -> Self {
        use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap_anonymous, mprotect};
        let page = rustix::param::page_size();
        let size = bytes.next_multiple_of(page);
        // SAFETY: new memory, whose last page is taken from itself.
        unsafe {
            let flags = ProtFlags::READ | ProtFlags::WRITE;
            let all = mmap_anonymous(std::ptr::null_mut(), size + page, flags, MapFlags::PRIVATE).unwrap();
            let start = all.cast::<u8>().add(size - bytes);
            mprotect(all.cast::<u8>().add(size).cast(), page, MprotectFlags::empty()).unwrap();
            Pages { start, mapped: (all, size + page) }
        }
    }
}

#[cfg(target_os = "linux")]
impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`, and the buffer that borrowed it is gone.
        unsafe { rustix::mm::munmap(self.mapped.0, self.mapped.1) }.unwrap();
    }
}

#[cfg(not(target_os = "linux"))]
impl Pages {
    fn new(bytes: usize) -> Self {
        let mut words = vec![0u32; bytes / 4];
        Pages { start: words.as_mut_ptr().cast(), _bytes: words }
    }
}

/// Codes, or scales.
#[derive(Clone, Copy)]
pub enum Part {
    Codes,
    Scales,
}

/// Shows the bytes of every row, by (page · kv_heads + head) · page_size + slot, and takes back what is changed.
pub fn edit_rows(pool: &PagePool, part: Part, mut edit: impl FnMut(usize, &mut [u8])) {
    let (buffer, strides, bytes) = match (part, pool.scales()) {
        (Part::Codes, _) => (pool.codes(), pool.strides().0, pool.row().row_bytes()),
        (Part::Scales, Some(scales)) => (scales, pool.strides().1, pool.row().scale_bytes()),
        (Part::Scales, None) => return,
    };
    let mut all = vec![0; buffer.bytes()];
    buffer.read_bytes(&mut all).unwrap();
    let before = all.clone();
    for i in 0..pool.pages() * pool.kv_heads() * pool.page_size() {
        let (page, slot) = (i / (pool.kv_heads() * pool.page_size()), i % pool.page_size());
        let head = i / pool.page_size() % pool.kv_heads();
        edit(i, &mut all[page * strides.page + head * strides.head + slot * strides.row..][..bytes]);
    }
    if all != before {
        buffer.write_bytes(&all).unwrap();
    }
}

/// Codes, u8 [pages, kv_heads, page_size, row_bytes].
pub fn pool_codes(pool: &PagePool) -> Vec<u8> {
    let mut codes = vec![];
    edit_rows(pool, Part::Codes, |_, row| codes.extend_from_slice(row));
    codes
}

/// Scales, [pages, kv_heads, page_size, scales_per_row].
pub fn pool_scales(pool: &PagePool) -> Vec<f32> {
    let mut bytes = vec![];
    edit_rows(pool, Part::Scales, |_, row| bytes.extend_from_slice(row));
    let Some(scales) = pool.scales() else { return vec![] };
    let copy = Device::cpu().zeros(scales.dtype(), &[bytes.len() / scales.dtype().size()]).unwrap();
    copy.write_bytes(&bytes).unwrap();
    download(&copy)
}

/// Overwrites all codes and scales, in the order in which they are read.
pub fn write_pool(pool: &PagePool, codes: &[u8], scales: &[f32]) {
    edit_rows(pool, Part::Codes, |i, row| row.copy_from_slice(&codes[i * row.len()..][..row.len()]));
    let (n, dtype) = (pool.row().scales_per_row(), pool.row().scale_dtype());
    edit_rows(pool, Part::Scales, |i, row| {
        for (scale, to) in scales[i * n..][..n].iter().zip(row.chunks_mut(dtype.size())) {
            match dtype {
                DType::F16 => to.copy_from_slice(&half::f16::from_f32(*scale).to_le_bytes()),
                _ => to.copy_from_slice(&scale.to_le_bytes()),
            }
        }
    });
}
