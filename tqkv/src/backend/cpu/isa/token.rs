//! What an instruction set offers, as a token: a value that exists only where its instructions do, as memchr's `Finder::new`
//! makes one. Whoever holds a token may compute; only what reads or writes memory is `unsafe`.
//!
//! Every kernel is written once, generic over [`Simd`]. A module for each instruction set says how it does each step.

use super::table::LevelTable;

/// The bits of 1.5 · 2^23, where floats step by one.
pub(super) const INTEGERS: i32 = 0x4b40_0000;

/// A kernel, or a part of one that is to be a function of its own: many small ones compile much faster than a large one.
pub(in crate::backend::cpu) trait Job {
    type Output;
    fn run<S: Simd>(self, isa: S) -> Self::Output;
}

/// Which word each lane of two vectors of pairs holds: words are paired within each 128 bits, the lower half first.
pub(in crate::backend::cpu) const fn word_of_pair(lane: usize) -> usize {
    let (vector, lane) = (lane / 16, lane % 16);
    lane / 4 * 8 + vector * 4 + lane % 4
}

/// A vector of f32 lanes and what is done with it.
///
/// Pointers need no more alignment than their elements. Code pointers must be readable for 16 bytes, whatever a row holds, and
/// for 64 where four vectors are decoded together.
pub(in crate::backend::cpu) trait Simd: Copy + Send + Sync + 'static {
    /// Lanes of a vector: 8 or 16, so that a vector's codes are whole bytes at every width.
    const LANES: usize;
    /// How many bits `look_up` looks up quickly; 0 if none.
    const LOOK_UP: usize = 0;
    /// Whether integers of 16 bits ("words", two a lane) are looked up and multiplied quickly: the methods of words are there.
    const WORDS: bool = false;
    type F: Copy;
    /// As many integers of 32 bits.
    type I: Copy;
    /// A codebook, in registers as far as it fits.
    type Levels<'t>: Copy;

    /// Runs a job that is compiled for these instructions.
    fn run<J: Job>(self, job: J) -> J::Output;

    fn splat(self, x: f32) -> Self::F;
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    /// Of the bits.
    fn xor(self, a: Self::F, b: Self::F) -> Self::F;
    /// a · b + c, rounded once where the machine can.
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// To the nearest integer.
    fn round(self, x: Self::F) -> Self::F;
    /// 2^n of integral lanes in -126..=127; NaN may give anything.
    fn pow2(self, n: Self::F) -> Self::F;
    /// `y` where x ≥ limit or x is NaN, else 0.
    fn zero_below(self, x: Self::F, limit: Self::F, y: Self::F) -> Self::F;
    /// The nearer of x and the ends of -limit to limit; one of these ends if x is NaN.
    fn clamp(self, x: Self::F, limit: Self::F) -> Self::F;
    /// Lane i exchanged with lane i ^ H.
    fn swap<const H: usize>(self, x: Self::F) -> Self::F;
    /// The sum of each vector's lanes, the last addition or more in f64.
    fn sum4(self, x: [Self::F; 4]) -> [f64; 4];

    fn integers(self, x: i32) -> Self::I;
    /// Bits as integers.
    fn bits(self, x: Self::F) -> Self::I;
    /// The integer n of x = 1.5 · 2^23 + n.
    fn integer(self, x: Self::F) -> Self::I;
    /// Adds `step` to the lanes of `n` where x > bound.
    fn count(self, x: Self::F, bound: Self::F, n: Self::I, step: i32) -> Self::I;
    fn plus(self, x: Self::I, n: i32) -> Self::I;
    fn and(self, a: Self::I, b: Self::I) -> Self::I;
    fn or(self, a: Self::I, b: Self::I) -> Self::I;
    fn left(self, x: Self::I, by: i32) -> Self::I;
    /// Zeros come in.
    fn right(self, x: Self::I, by: i32) -> Self::I;

    /// # Safety
    /// Readable for so many lanes.
    unsafe fn load(self, from: *const f32) -> Self::F;
    /// # Safety
    /// Readable for so many lanes.
    unsafe fn load_f16(self, from: *const u16) -> Self::F;
    /// Bytes, each as an integer.
    ///
    /// # Safety
    /// Readable for so many lanes.
    unsafe fn load_bytes(self, from: *const u8) -> Self::I;
    /// Bytes of two places, each as an integer: half of the lanes from each.
    ///
    /// # Safety
    /// Readable for half so many lanes.
    #[inline(always)]
    unsafe fn load_half_bytes(self, from: [*const u8; 2]) -> Self::I {
        let mut bytes = [0u8; 16];
        let half = Self::LANES / 2;
        // SAFETY: the caller's promise; both halves are within sixteen bytes.
        unsafe {
            from[0].copy_to_nonoverlapping(bytes.as_mut_ptr(), half);
            from[1].copy_to_nonoverlapping(bytes.as_mut_ptr().add(half), half);
            self.load_bytes(bytes.as_ptr())
        }
    }
    /// Integers of 16 bits, each as one of 32.
    ///
    /// # Safety
    /// Readable for so many lanes.
    unsafe fn load_words(self, from: *const u8) -> Self::I;
    /// # Safety
    /// Readable for so many lanes.
    unsafe fn load_integers(self, from: *const u8) -> Self::I;
    /// # Safety
    /// Writable for so many lanes.
    unsafe fn store(self, to: *mut f32, x: Self::F);
    /// # Safety
    /// Writable for so many lanes.
    unsafe fn store_integers(self, to: *mut u8, x: Self::I);
    /// Lanes of 0..=255 as bytes.
    ///
    /// # Safety
    /// Writable for so many lanes.
    unsafe fn store_bytes(self, to: *mut u8, n: Self::I);
    /// Stores past the caches.
    ///
    /// # Safety
    /// Writable for so many lanes; the address must be a multiple of what a vector takes.
    unsafe fn stream(self, to: *mut f32, x: Self::F);
    /// Ends a run of such stores.
    #[inline(always)]
    fn fence(self) {}
    /// A hint that this line will be read.
    #[inline(always)]
    fn prefetch(self, _: *const u8) {}

    /// Both of `from[n]`, lane by lane.
    ///
    /// # Safety
    /// Every n must be an index within `from`.
    unsafe fn pairs(self, from: *const [f32; 2], n: Self::I) -> [Self::F; 2];
    /// `from[n]`.
    ///
    /// # Safety
    /// Sixteen floats must be readable, and every n below 16.
    unsafe fn gather16(self, from: *const f32, n: Self::I) -> Self::F;

    fn levels<const BITS: usize>(self, table: &LevelTable) -> Self::Levels<'_>;
    /// The levels of so many codes: packed densely, or one a byte.
    ///
    /// # Safety
    /// Readable for 16 bytes.
    unsafe fn decode<const BITS: usize, const BYTE: bool>(self, codes: *const u8, levels: &Self::Levels<'_>)
    -> Self::F;
    /// As `decode` for four vectors, which may be cheaper together.
    ///
    /// # Safety
    /// Readable for 64 bytes.
    #[inline(always)]
    unsafe fn decode4<const BITS: usize, const BYTE: bool>(
        self,
        codes: *const u8,
        levels: &Self::Levels<'_>,
    ) -> [Self::F; 4] {
        let step = Self::LANES * if BYTE { 8 } else { BITS } / 8;
        // SAFETY: the caller's promise: four times the step, and 16 bytes from the last on, are within 64.
        unsafe {
            [
                self.decode::<BITS, BYTE>(codes, levels),
                self.decode::<BITS, BYTE>(codes.add(step), levels),
                self.decode::<BITS, BYTE>(codes.add(2 * step), levels),
                self.decode::<BITS, BYTE>(codes.add(3 * step), levels),
            ]
        }
    }

    /// Level `n` of the first so many, by the low `LOOK_UP` bits of n; there where `LOOK_UP` is not 0.
    #[inline(always)]
    fn look_up(self, _levels: Self::F, _n: Self::I) -> Self::F {
        unreachable!("nothing is looked up quickly")
    }
    /// To the nearest integers.
    #[inline(always)]
    fn nearest(self, _x: Self::F) -> Self::I {
        unreachable!("no words")
    }
    /// Integers as floats.
    #[inline(always)]
    fn float(self, _x: Self::I) -> Self::F {
        unreachable!("no words")
    }
    /// Stores lanes as words; those that are too large become the largest.
    ///
    /// # Safety
    /// Writable for so many words as there are lanes.
    #[inline(always)]
    unsafe fn store_words(self, _to: *mut i16, _x: Self::I) {
        unreachable!("no words")
    }
    /// Bytes, each as a word: two for each lane.
    ///
    /// # Safety
    /// Readable for so many bytes.
    #[inline(always)]
    unsafe fn load_bytes_as_words(self, _from: *const u8) -> Self::I {
        unreachable!("no words")
    }
    /// Densely packed codes, two for each lane, each in the low bits of its word. Others follow it there.
    ///
    /// # Safety
    /// Readable for 64 bytes.
    #[inline(always)]
    unsafe fn spread_words<const BITS: usize>(self, _codes: *const u8) -> Self::I {
        unreachable!("no words")
    }
    /// Words shifted right; zeros come in.
    #[inline(always)]
    fn right_words(self, _x: Self::I, _by: i32) -> Self::I {
        unreachable!("no words")
    }
    /// Sixteen bytes of each row, one after the other.
    ///
    /// # Safety
    /// Readable for so many.
    #[inline(always)]
    unsafe fn load_quarters(self, _rows: [*const u8; 4]) -> Self::I {
        unreachable!("no words")
    }
    /// Eight bytes of each row, as words.
    ///
    /// # Safety
    /// Readable for so many.
    #[inline(always)]
    unsafe fn load_quarters_as_words(self, _rows: [*const u8; 4]) -> Self::I {
        unreachable!("no words")
    }
    /// Sixteen bytes of two rows by turns, as words.
    ///
    /// # Safety
    /// Readable for so many.
    #[inline(always)]
    unsafe fn load_paired_as_words(self, _rows: [*const u8; 2]) -> Self::I {
        unreachable!("no words")
    }
    /// The same sixteen bytes four times.
    ///
    /// # Safety
    /// Readable for so many.
    #[inline(always)]
    unsafe fn load_quarter(self, _from: *const u8) -> Self::I {
        unreachable!("no words")
    }
    /// Words of 32 bytes of two rows by turns.
    ///
    /// # Safety
    /// Readable for so many.
    #[inline(always)]
    unsafe fn load_paired(self, _rows: [*const u8; 2]) -> Self::I {
        unreachable!("no words")
    }
    /// The sums of the quarters of four vectors: of each vector, by its quarters.
    #[inline(always)]
    fn sum_quarters(self, _x: [Self::F; 4]) -> [f32; 16] {
        unreachable!("no words")
    }
    /// What `look_up_words` needs.
    #[inline(always)]
    fn word_levels<const BITS: usize>(self, _table: &LevelTable) -> [Self::I; 4] {
        unreachable!("no words")
    }
    /// The levels of the low BITS bits of words; codes of 8 bits are bytes, with nothing above.
    #[inline(always)]
    fn look_up_words<const BITS: usize>(self, _levels: &[Self::I; 4], _n: Self::I) -> Self::I {
        unreachable!("no words")
    }
    /// Adds to each lane the products of its two words.
    #[inline(always)]
    fn dot_words(self, _sum: Self::I, _a: Self::I, _b: Self::I) -> Self::I {
        unreachable!("no words")
    }
    /// Words of a beside those of b, in the order of `word_of_pair`.
    #[inline(always)]
    fn pair_words(self, _a: Self::I, _b: Self::I) -> [Self::I; 2] {
        unreachable!("no words")
    }
    /// Lane `from` of x shifted right by `by`; there where `LOOK_UP` is not 0.
    #[inline(always)]
    fn pick_right(self, _x: Self::I, _from: Self::I, _by: Self::I) -> Self::I {
        unreachable!("nothing is looked up quickly")
    }
}

/// Methods that only compute.
macro_rules! computes {
    ($($(#[$doc:meta])* fn $name:ident $(<const $n:ident: usize>)? ($self:ident $(, $arg:ident: $of:ty)*) -> $out:ty $body:block)*) => { $(
        $(#[$doc])*
        #[inline(always)]
        fn $name $(<const $n: usize>)? ($self $(, $arg: $of)*) -> $out {
            // SAFETY: the token proves that the instructions are there; memory is touched only behind references.
            unsafe { $body }
        }
    )* };
}
pub(super) use computes;

/// Methods that read or write.
macro_rules! touches {
    ($($(#[$doc:meta])* unsafe fn $name:ident ($self:ident $(, $arg:ident: $of:ty)*) $(-> $out:ty)? $body:block)*) => { $(
        $(#[$doc])*
        #[inline(always)]
        unsafe fn $name ($self $(, $arg: $of)*) $(-> $out)? {
            // SAFETY: the token proves that the instructions are there; the caller promises that the memory is.
            unsafe { $body }
        }
    )* };
}
pub(super) use touches;

/// `Simd::run` with these features, and the only way to a token.
macro_rules! token {
    ($(#[$doc:meta])* $isa:ident, [$($feature:tt),*], $detect:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy)]
        pub(in crate::backend::cpu) struct $isa(());

        impl $isa {
            /// A token, if this processor has the instructions.
            pub fn new() -> Option<Self> {
                ($(std::arch::$detect!($feature))&&*).then_some($isa(()))
            }

            /// # Safety
            /// Needs the instructions.
            $(#[target_feature(enable = $feature)])*
            #[inline(never)] // Inlined, they would be one function again.
            unsafe fn run_with<J: $crate::backend::cpu::isa::Job>(self, job: J) -> J::Output {
                job.run(self)
            }
        }
    };
}
pub(super) use token;
