//! How the codes of a row lie in its bytes.

use super::DType;

/// How a row of codes is packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Packing {
    /// Not codes but little-endian floats.
    Float(DType),
    /// Element i in bits [i·b, (i+1)·b) of the row, which is read as one little-endian integer.
    Dense,
    /// Codes of 3 bits in three planes of head_dim / 8 bytes, each byte two nibbles. Of elements 8r to 8r + 7, byte r of plane
    /// p holds elements 8r + 2p and 8r + 2p + 1 in its nibbles' low three bits; the nibbles' top bits hold bit p of the
    /// elements 8r + 6 and 8r + 7.
    Planes,
    /// One code a byte; readers ignore the bits above the code.
    Byte,
}

impl Packing {
    /// Bytes of a row of `elements` codes (or floats) of so many bits.
    pub(super) fn row_bytes(self, elements: usize, bits: usize) -> usize {
        match self {
            Packing::Byte => elements,
            _ => elements * bits / 8,
        }
    }

    /// The code of element `i` of a row of `elements`.
    pub(super) fn code(self, row: &[u8], elements: usize, bits: usize, i: usize) -> u16 {
        let mask = ((1u32 << bits) - 1) as u16;
        match self {
            Packing::Byte => u16::from(row[i]) & mask,
            Packing::Planes => {
                let (run, nibble) = (i / 8, 4 * (i % 2));
                let byte = |plane: usize| u16::from(row[plane * elements / 8 + run] >> nibble);
                match i % 8 / 2 {
                    3 => (0..3).map(|plane| (byte(plane) >> 3 & 1) << plane).sum(),
                    plane => byte(plane) & mask,
                }
            }
            _ => {
                let (byte, shift) = (i * bits / 8, i * bits % 8);
                let low = u16::from(row[byte]);
                let high = if shift + bits > 8 { u16::from(row[byte + 1]) } else { 0 };
                (low | high << 8) >> shift & mask
            }
        }
    }

    /// Packs codes, each below 2^bits, overwriting the row.
    pub(super) fn pack(self, codes: &[u16], bits: usize, row: &mut [u8]) {
        match self {
            Packing::Byte => row.iter_mut().zip(codes).for_each(|(byte, &code)| *byte = code as u8),
            Packing::Planes => {
                for (plane, bytes) in row.chunks_exact_mut(codes.len() / 8).enumerate() {
                    for (byte, run) in bytes.iter_mut().zip(codes.chunks_exact(8)) {
                        let nibble = |half: usize| (run[2 * plane + half] | (run[6 + half] >> plane & 1) << 3) as u8;
                        *byte = nibble(0) | nibble(1) << 4;
                    }
                }
            }
            _ => {
                let (mut held, mut count, mut out) = (0u32, 0, row.iter_mut());
                for &code in codes {
                    held |= u32::from(code) << count;
                    count += bits;
                    while count >= 8 {
                        if let Some(byte) = out.next() {
                            *byte = held as u8;
                        }
                        held >>= 8;
                        count -= 8;
                    }
                }
            }
        }
    }
}
