//! Parts of attention that are compiled for each number of rows of queries and each way to read K or V.

use crate::backend::cpu::codec::{Read, Visit, Way};
use crate::backend::cpu::isa::{Job, Simd};
use std::marker::PhantomData;

/// A part for M rows of queries.
pub(super) trait Kernel {
    fn run<S: Simd, R: Read, const M: usize>(self, isa: S);
}

/// Runs a kernel for 1 to 4 rows of queries.
#[inline(always)]
pub(super) fn for_rows<S: Simd, K: Kernel>(isa: S, way: Way, rows: usize, kernel: K) {
    way.visit(isa, ForRows { rows, kernel });
}

/// Runs a kernel for one row of queries, which exists for no other number.
#[inline(always)]
pub(super) fn for_one<S: Simd, K: Kernel>(isa: S, way: Way, kernel: K) {
    way.visit(isa, ForOne(kernel));
}

struct ForRows<K> {
    rows: usize,
    kernel: K,
}

impl<K: Kernel> Visit for ForRows<K> {
    type Output = ();
    #[inline(always)]
    fn visit<S: Simd, R: Read>(self, isa: S) {
        let kernel = self.kernel;
        match self.rows {
            1 => isa.run(Function::<R, K, 1> { kernel, rows_are: PhantomData }),
            2 => isa.run(Function::<R, K, 2> { kernel, rows_are: PhantomData }),
            3 => isa.run(Function::<R, K, 3> { kernel, rows_are: PhantomData }),
            _ => isa.run(Function::<R, K, 4> { kernel, rows_are: PhantomData }),
        }
    }
}

struct ForOne<K>(K);

impl<K: Kernel> Visit for ForOne<K> {
    type Output = ();
    #[inline(always)]
    fn visit<S: Simd, R: Read>(self, isa: S) {
        isa.run(Function::<R, K, 1> { kernel: self.0, rows_are: PhantomData });
    }
}

struct Function<R, K, const M: usize> {
    kernel: K,
    rows_are: PhantomData<R>,
}

impl<R: Read, K: Kernel, const M: usize> Job for Function<R, K, M> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, isa: S) {
        self.kernel.run::<S, R, M>(isa);
    }
}
