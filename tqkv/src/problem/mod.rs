//! What an operation is asked: sequences, pools, parameters, what a query sees, and the operations as data.

mod batch;
mod channels;
pub(crate) mod checks;
mod device_batch;
pub(crate) mod op;
mod params;
mod pool;
mod strides;
mod visible;

#[cfg_attr(not(feature = "cuda"), allow(unused_imports))]
pub(crate) use batch::Plan;
#[cfg_attr(not(feature = "cuda"), allow(unused_imports))]
pub(crate) use batch::SpanInfo;
pub use batch::{Batch, Bounds, NO_PAGE, Span};
pub use channels::ChannelMap;
pub(crate) use device_batch::check_integers;
pub use device_batch::{DeviceTables, Lengths};
pub use params::{AttentionParams, Direction, Domain, Positions, Precision, RowOrder};
pub use pool::PagePool;
pub(crate) use pool::check_geometry;
pub use strides::Strides;
pub(crate) use visible::Visible;
