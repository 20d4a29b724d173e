//! Kernels before they are compiled: a text and the values of its macros, which are all that tells two of them apart.

use super::nvrtc::Source;
use crate::format::DType;
use crate::problem::PagePool;
use std::hash::{Hash, Hasher};

/// A kernel's text. There is one of each.
pub(super) struct KernelText {
    /// Its function, and what errors call it.
    pub name: &'static str,
    pub text: &'static str,
    pub options: &'static [&'static str],
    /// Names of its macros, all of which are numbers. `SHARED_BYTES` is its dynamic shared memory.
    pub macros: &'static [&'static str],
    /// What holds its parameters to the host's layout: see `kernel_struct`.
    pub asserts: fn() -> String,
    /// The module's variable that holds its dynamic shared memory, where no macro does.
    pub shared_memory_symbol: Option<&'static str>,
}

/// The most macros of a kernel.
const MOST: usize = 48;

/// A specialisation: what a kernel is looked up by.
#[derive(Clone, Copy)]
pub(super) struct KernelKey {
    text: &'static KernelText,
    values: [u32; MOST],
    /// Whether rows of pools are where strides say (codec/row.cuh).
    strided: bool,
}

impl KernelText {
    /// With these values, in the order of the macros.
    pub fn with<const N: usize>(&'static self, values: [u32; N]) -> KernelKey {
        debug_assert_eq!(N, self.macros.len(), "{}", self.name);
        let mut all = [0; MOST];
        all[..N].copy_from_slice(&values);
        KernelKey { text: self, values: all, strided: false }
    }
}

impl PartialEq for KernelKey {
    fn eq(&self, other: &Self) -> bool {
        std::ptr::eq(self.text, other.text) && self.values == other.values && self.strided == other.strided
    }
}

impl Eq for KernelKey {}

impl Hash for KernelKey {
    fn hash<H: Hasher>(&self, state: &mut H) {
        std::ptr::from_ref(self.text).hash(state);
        bytemuck::bytes_of(&self.values).hash(state);
        self.strided.hash(state);
    }
}

impl KernelKey {
    /// The same for pools of which one has strides.
    pub fn for_pools<'a>(self, pools: impl IntoIterator<Item = &'a PagePool>) -> Self {
        KernelKey { strided: !pools.into_iter().all(PagePool::is_dense), ..self }
    }

    /// What the compiler gets: made when there is no such kernel yet.
    pub fn source(&self) -> Source {
        let KernelText { name, text, options, macros, asserts, shared_memory_symbol } = self.text;
        let defines = macros.iter().zip(&self.values);
        let shared_memory = defines.clone().find(|(name, _)| **name == "SHARED_BYTES").map_or(0, |(_, &bytes)| bytes);
        let options = options.iter().map(|&o| o.to_owned());
        let strided = self.strided.then(|| "-DSTRIDED=1".to_owned());
        Source {
            name: (*name).to_owned(),
            entry: (*name).to_owned(),
            text: format!("{text}{}", asserts()),
            options: options.chain(defines.map(|(name, value)| format!("-D{name}={value}"))).chain(strided).collect(),
            shared_memory,
            shared_memory_symbol: *shared_memory_symbol,
        }
    }
}

/// How kernels number float types.
pub(super) fn type_number(dtype: DType) -> u32 {
    match dtype {
        DType::F16 => 1,
        DType::BF16 => 2,
        _ => 0,
    }
}

/// Declares a struct that kernels get, with the name that it has there, and `asserts`: what fails to compile there unless every field
/// lies where it lies here.
macro_rules! kernel_struct {
    ($(#[$meta:meta])* $visibility:vis struct $name:ident as $c:literal { $($field:ident: $type:ty),* $(,)? }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
        #[repr(C)]
        $visibility struct $name {
            $(pub $field: $type),*
        }

        impl $name {
            $visibility fn asserts() -> String {
                let mut text = format!("\nstatic_assert(sizeof({}) == {}, \"as on the host\");", $c, size_of::<Self>());
                // NVRTC 13.0 does not know `__builtin_offsetof`; the one that CI installs does.
                text += "\n#if __CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ >= 1305";
                $(
                    let (field, offset) = (stringify!($field), std::mem::offset_of!($name, $field));
                    text += &format!("\nstatic_assert(__builtin_offsetof({}, {field}) == {offset}, \"as on the host\");", $c);
                )*
                text + "\n#endif\n"
            }
        }
    };
}
pub(super) use kernel_struct;
