//! What a device can do, and what kernels are put together for.

/// Found out when a device is opened.
#[derive(Clone, Debug, Default)]
pub(super) struct Caps {
    /// pack2x16float and unpack2x16float are exact, subnormals and ties included.
    pub native_f16: bool,
    /// Threads of the smallest subgroup; 0: no subgroup operations.
    pub subgroup: usize,
    /// A shuffle takes only the low bits of a lane's number.
    pub shuffles_wrap: bool,
    /// Threads of every subgroup, where one can work by itself; else 0.
    pub team: usize,
    /// Workgroups that keep the device busy.
    pub busy: usize,
    /// The most threads of a workgroup of attention.
    pub threads: usize,
    /// The most query rows of a workgroup of attention. Few in software, where each makes kernels slower to compile.
    pub query_rows: usize,
    /// Floats that a workgroup holds for exchange. Few, so that many workgroups run at once; many in software, where each
    /// barrier makes kernels slower to compile.
    pub held: usize,
    /// Positions whose values a thread of attention loads before it uses them. Few in software, as with query rows.
    pub ahead: usize,
}
