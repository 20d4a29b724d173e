//! Parts of attention that are compiled for each number of rows of queries and each way to read K or V.

use crate::backend::cpu::codec::{Read, Visit, VisitWords, Words};
use crate::backend::cpu::isa::{Job, Simd};
use std::marker::PhantomData;

/// A part for M rows of queries.
pub(super) trait Kernel {
    fn run<S: Simd, R: Read, const M: usize>(self, isa: S);
}

/// A part that multiplies words, for M rows of queries.
pub(super) trait WordKernel {
    fn run<S: Simd, W: Words, const M: usize>(self, isa: S);
}

/// A kernel that is to be run for 1 to 4 rows of queries.
pub(super) struct ForRows<K> {
    pub rows: usize,
    pub kernel: K,
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

impl<K: WordKernel> VisitWords for ForRows<K> {
    type Output = ();
    #[inline(always)]
    fn visit<S: Simd, W: Words>(self, isa: S) {
        let kernel = self.kernel;
        match self.rows {
            1 => isa.run(WordFunction::<W, K, 1> { kernel, rows_are: PhantomData }),
            2 => isa.run(WordFunction::<W, K, 2> { kernel, rows_are: PhantomData }),
            3 => isa.run(WordFunction::<W, K, 3> { kernel, rows_are: PhantomData }),
            _ => isa.run(WordFunction::<W, K, 4> { kernel, rows_are: PhantomData }),
        }
    }
}

/// A kernel that is to be run for one row of queries, and exists for no other number.
pub(super) struct ForOne<K>(pub K);

impl<K: Kernel> Visit for ForOne<K> {
    type Output = ();
    #[inline(always)]
    fn visit<S: Simd, R: Read>(self, isa: S) {
        isa.run(Function::<R, K, 1> { kernel: self.0, rows_are: PhantomData });
    }
}

impl<K: WordKernel> VisitWords for ForOne<K> {
    type Output = ();
    #[inline(always)]
    fn visit<S: Simd, W: Words>(self, isa: S) {
        isa.run(WordFunction::<W, K, 1> { kernel: self.0, rows_are: PhantomData });
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

struct WordFunction<W, K, const M: usize> {
    kernel: K,
    rows_are: PhantomData<W>,
}

impl<W: Words, K: WordKernel, const M: usize> Job for WordFunction<W, K, M> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, isa: S) {
        self.kernel.run::<S, W, M>(isa);
    }
}
