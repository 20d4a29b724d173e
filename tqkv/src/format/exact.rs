//! Rotate and encode, one element at a time: the definition to the last bit (`docs/format.md`) that every backend is held to.

use super::{Codebook, DType, Encoding, MAX_HEAD_DIM, Packing, RowFormat, Scaling, SignWords, ZERO_NORM};
use half::{bf16, f16};

/// Elements that one norm of the seed codec covers at head_dim 512.
const RMS_BLOCK: usize = 256;

/// Encodes and rotates rows of one format.
///
/// ```
/// use tqkv::format::{Codec, RowFormat, exact::Coder};
/// let row = RowFormat::new(Codec::tq(4), 64)?;
/// let mut v: Vec<f32> = (0..64).map(|i| i as f32).collect();
/// let (mut codes, mut scale) = (vec![0; row.row_bytes()], [0; 2]);
/// Coder::new(&row).encode(&mut v, &mut codes, &mut scale);
/// assert!(codes.iter().any(|&byte| byte != 0));
/// # Ok::<(), tqkv::Error>(())
/// ```
pub struct Coder {
    row: RowFormat,
    signs: SignWords,
    book: Option<&'static Codebook>,
    encoding: Encoding,
}

impl Coder {
    /// For rows of this format.
    pub fn new(row: &RowFormat) -> Self {
        Coder { row: *row, signs: row.signs(), book: row.codebook(), encoding: Encoding::default() }
    }

    /// With codes chosen so.
    pub fn with_encoding(self, encoding: Encoding) -> Self {
        Coder { encoding, ..self }
    }

    /// T·S·x in place, for `row_dim` elements.
    pub fn rotate(&self, v: &mut [f32]) {
        if self.row.is_rotated() {
            self.apply_signs(v);
            self.transform(v);
        }
    }

    /// S·T·x in place, for `row_dim` elements: undoes [`rotate`](Coder::rotate).
    pub fn restore(&self, v: &mut [f32]) {
        if self.row.is_rotated() {
            self.transform(v);
            self.apply_signs(v);
        }
    }

    fn apply_signs(&self, v: &mut [f32]) {
        for (chunk, word) in v.chunks_mut(32).zip(self.signs) {
            for (j, x) in chunk.iter_mut().enumerate() {
                *x = f32::from_bits(x.to_bits() ^ ((word >> j & 1) << 31));
            }
        }
    }

    fn transform(&self, v: &mut [f32]) {
        let block = self.row.block();
        let norm = 1.0 / (block as f32).sqrt();
        for x in v.chunks_exact_mut(block) {
            let mut h = 1;
            while h < block {
                for pair in x.chunks_exact_mut(2 * h) {
                    let (low, high) = pair.split_at_mut(h);
                    for (a, b) in low.iter_mut().zip(high) {
                        (*a, *b) = (*a + *b, *a - *b);
                    }
                }
                h *= 2;
            }
            x.iter_mut().for_each(|a| *a *= norm);
        }
        let blocks = v.len() / block;
        if blocks > 1 {
            let factor = 2.0 / blocks as f32;
            for j in 0..block {
                let sum = (1..blocks).fold(v[j], |sum, b| sum + v[b * block + j]) * factor;
                (0..blocks).for_each(|b| v[b * block + j] -= sum);
            }
        }
    }

    /// Stores the vector `v` of `row_dim` elements, which is overwritten, as `row_bytes` bytes of codes and the bytes of its scales.
    ///
    /// # Panics
    /// If `v` has more elements than a row, or one of the others is shorter than it must be.
    pub fn encode(&self, v: &mut [f32], codes: &mut [u8], scales: &mut [u8]) {
        let Some(book) = self.book else {
            let Packing::Float(dtype) = self.row.packing() else { unreachable!("only floats have no codebook") };
            return store_floats(dtype, v, codes);
        };
        self.rotate(v);
        let root = (v.len() as f32).sqrt();
        let mut code = [0u16; MAX_HEAD_DIM];
        let code = &mut code[..v.len()];
        match self.row.scaling() {
            Scaling::Norm => {
                let norm = sum_of_squares(v, self.row.block()).sqrt();
                assign_codes(book, v, gain(norm, root), norm, code);
                store_f32(if norm.is_finite() { norm } else { f32::NAN }, scales);
            }
            Scaling::BlockRms => {
                for ((v, code), scale) in v.chunks(RMS_BLOCK).zip(code.chunks_mut(RMS_BLOCK)).zip(scales.chunks_mut(4))
                {
                    let rms = (sum_of_squares(v, RMS_BLOCK) / RMS_BLOCK as f32).sqrt();
                    assign_codes(book, v, gain(rms, self.row.scale_factor_d512()), rms, code);
                    store_f32(if rms.is_finite() { rms } else { f32::NAN }, scale);
                }
            }
            Scaling::Corrected => {
                let norm = sum_of_squares(v, self.row.block()).sqrt();
                assign_codes(book, v, self.best_gain(book, v, gain(norm, root), norm), norm, code);
                v.iter_mut().zip(code.iter()).for_each(|(v, &c)| *v = book.levels[c as usize]);
                let scale = norm / sum_of_squares(v, self.row.block()).sqrt();
                let scale = if norm.is_finite() { f16::from_f32(scale) } else { f16::NAN };
                scales.copy_from_slice(&scale.to_le_bytes());
            }
            Scaling::None => unreachable!("dense floats have no codebook"),
        }
        self.row.pack(code, codes);
    }

    /// The gain whose levels' direction is nearest to the vector's, of those that are tried; of equals the first.
    fn best_gain(&self, book: &Codebook, v: &[f32], usual: f32, norm: f32) -> f32 {
        let (mut best, mut nearest) = (usual, 0.0);
        let (mut code, mut levels) = ([0u16; MAX_HEAD_DIM], [0f32; MAX_HEAD_DIM]);
        let (code, levels) = (&mut code[..v.len()], &mut levels[..v.len()]);
        for gain in self.encoding.gains().iter().filter(|_| has_gain(norm)).map(|factor| usual * factor) {
            assign_codes(book, v, gain, norm, code);
            levels.iter_mut().zip(code.iter()).for_each(|(l, &c)| *l = book.levels[c as usize]);
            let product = sum_of_products(v, levels, self.row.block()) * usual;
            let near = product / sum_of_squares(levels, self.row.block()) * product;
            if near > nearest {
                (best, nearest) = (gain, near);
            }
        }
        best
    }
}

/// What elements are multiplied with: `unit` / `norm`, the reciprocal first.
fn gain(norm: f32, unit: f32) -> f32 {
    1.0 / norm * unit
}

/// Whether a vector of this norm is neither zero nor without a finite one.
fn has_gain(norm: f32) -> bool {
    norm.is_finite() && norm > ZERO_NORM
}

/// Little-endian floats, rounded to nearest even.
fn store_floats(dtype: DType, v: &[f32], bytes: &mut [u8]) {
    for (x, bytes) in v.iter().zip(bytes.chunks_exact_mut(dtype.size())) {
        match dtype {
            DType::F16 => bytes.copy_from_slice(&f16::from_f32(*x).to_le_bytes()),
            DType::BF16 => bytes.copy_from_slice(&bf16::from_f32(*x).to_le_bytes()),
            _ => bytes.copy_from_slice(&x.to_le_bytes()),
        }
    }
}

fn store_f32(scale: f32, bytes: &mut [u8]) {
    bytes.copy_from_slice(&scale.to_le_bytes());
}

/// Codes of `v` times `gain`. A zero vector gets the zero code, one that is not finite code 0.
fn assign_codes(book: &Codebook, v: &[f32], gain: f32, norm: f32, codes: &mut [u16]) {
    if !has_gain(norm) {
        return codes.fill(if norm.is_finite() { book.zero_code() } else { 0 });
    }
    codes.iter_mut().zip(v).for_each(|(c, x)| *c = book.code(x * gain));
}

/// Σ v²; see [`sum_of_products`].
fn sum_of_squares(v: &[f32], block: usize) -> f32 {
    sum_of_products(v, v, block)
}

/// Σ v·w, summed in a fixed order so that every backend rounds alike: blocks first, one after the other, then halves
/// folded onto each other.
fn sum_of_products(v: &[f32], w: &[f32], block: usize) -> f32 {
    let mut sum = [0f32; MAX_HEAD_DIM];
    let sum = &mut sum[..block];
    for (v, w) in v.chunks_exact(block).zip(w.chunks_exact(block)) {
        sum.iter_mut().zip(v.iter().zip(w)).for_each(|(s, (x, y))| *s += x * y);
    }
    let mut half = block / 2;
    while half > 0 {
        let (low, high) = sum.split_at_mut(half);
        low.iter_mut().zip(high.iter()).for_each(|(a, b)| *a += b);
        half /= 2;
    }
    sum[0]
}
