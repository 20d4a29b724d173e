//! Parameters of kernels: one declaration for both sides.

/// What a kernel is given by value. In WGSL it is the uniform `a`, after `groups` (of the grid) and `zero`.
pub trait Params: bytemuck::Pod {
    /// Names and types in WGSL, in order.
    const FIELDS: &'static [(&'static str, &'static str)];
}

/// Declares a struct of u32 and f32 fields that implements [`Params`].
macro_rules! params {
    ($(#[$meta:meta])* $vis:vis struct $name:ident { $($(#[$doc:meta])* $field:ident: $ty:tt,)* }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, Default, bytemuck::Pod, bytemuck::Zeroable)]
        #[repr(C)]
        $vis struct $name { $($(#[$doc])* pub $field: $ty,)* }

        impl $crate::backend::wgpu::wgsl::params::Params for $name {
            const FIELDS: &'static [(&'static str, &'static str)] = &[$((stringify!($field), stringify!($ty)),)*];
        }
    };
}
pub(in crate::backend::wgpu) use params;
