//! Codes without a search.

/// The line of scaled elements, cut into cells that hold one decision boundary at most.
#[derive(Debug)]
pub(crate) struct Cells {
    /// Boundary (infinity if none) and number of boundaries in the cells before.
    pub entries: Vec<(f32, u32)>,
    /// Cells in a unit, a power of two.
    pub per_unit: f32,
    /// Elements beyond are in the outermost cell.
    pub limit: f32,
    /// u · per_unit + this has the cell's number in the low bits of its mantissa.
    pub first: f32,
}

impl Cells {
    pub fn new(boundaries: &[f32]) -> Self {
        let narrowest = boundaries.windows(2).map(|w| w[1] - w[0]).fold(f32::INFINITY, f32::min);
        let mut per_unit = 1.0f32;
        while 1.0 / per_unit >= narrowest {
            per_unit *= 2.0;
        }
        let outermost = boundaries.iter().fold(0f32, |m, b| m.max(b.abs()));
        let half = (outermost * per_unit).ceil() + 1.0;
        // 1.5 · 2^23: floats there step by one.
        let first = 12_582_912.0 + half;
        let mut entries = vec![(f32::INFINITY, 0); 2 * half as usize + 1];
        for &b in boundaries {
            let cell = (b * per_unit + first - 12_582_912.0) as usize;
            entries[cell].0 = b;
            entries[cell + 1..].iter_mut().for_each(|e| e.1 += 1);
        }
        Cells { entries, per_unit, limit: half / per_unit, first }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::{Codec, RowFormat};

    #[test]
    fn cells_give_the_code() {
        let codecs = (2..=8).map(Codec::tq).chain([2, 3, 4, 5, 6, 8].map(Codec::seed));
        for codec in codecs {
            let row = RowFormat::new(codec, 128).unwrap();
            let book = row.codebook().unwrap();
            let cells = Cells::new(&book.boundaries);
            // As the kernel does it.
            let code = |u: f32| {
                let u = u.clamp(-cells.limit, cells.limit);
                let (boundary, below) = cells.entries[(u * cells.per_unit + cells.first - 12_582_912.0) as usize];
                (below + (u > boundary) as u32) as u16
            };
            let near = book.boundaries.iter().flat_map(|&b| [b, b.next_up(), b.next_down(), b + 0.01, b - 0.01]);
            let far = (-4000..=4000).map(|i| i as f32 / 333.0).chain([f32::MAX, f32::MIN, 0.0, -0.0]);
            for u in near.chain(far) {
                assert_eq!(code(u), book.code(u), "{codec} {u}");
            }
            assert_eq!(code(0.0), book.zero_code(), "{codec}: a zero vector's code is that of zeros");
            assert!(cells.entries.len() <= 1024, "{codec}: {} cells", cells.entries.len());
        }
    }
}
