//! The header of a GGUF file: the metadata, and where the tensors lie. Nothing in it is believed: every length is held
//! against what is left of the file before anything is allocated.
//!
//! The format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>.

use candle_core::quantized::GgmlDType;
use std::collections::BTreeMap;
use std::io::{BufReader, Read, Seek, SeekFrom};

/// What is wrong with a GGUF file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GgufError {
    /// Reading failed.
    #[error("cannot read: {cause}")]
    Read {
        /// What the operating system said.
        cause: std::io::Error,
    },
    /// The file does not begin as a GGUF file does.
    #[error("the file begins with {got:?}, expected \"GGUF\"")]
    Magic {
        /// Its first four bytes.
        got: String,
    },
    /// A version that is too old, too new, or of the other byte order.
    #[error("version {got}, expected 2 or 3 (little-endian)")]
    Version {
        /// The version.
        got: u32,
    },
    /// The file ends before something that it announces.
    #[error("{what} needs {needed} bytes, but {left} are left of the file")]
    Truncated {
        /// What was to be read.
        what: String,
        /// How long it claims to be, or is at least.
        needed: u64,
        /// How many bytes there are.
        left: u64,
    },
    /// A value of a kind that the format does not have.
    #[error("the value of {key} is of kind {got}, expected one from 0 to 12")]
    Kind {
        /// The key.
        key: String,
        /// The number of the kind.
        got: u32,
    },
    /// A truth value that is neither 0 nor 1.
    #[error("{key} holds the truth value {got}, expected 0 or 1")]
    Truth {
        /// The key.
        key: String,
        /// The byte.
        got: u8,
    },
    /// A name that is not UTF-8.
    #[error("{what} is called {got:?}, expected UTF-8")]
    Name {
        /// What has the name.
        what: &'static str,
        /// The name, its wrong bytes replaced.
        got: String,
    },
    /// A key or a tensor that is there twice.
    #[error("{name} is there twice")]
    Twice {
        /// Its name.
        name: String,
    },
    /// An alignment that is no power of two.
    #[error("general.alignment is {got}, expected a power of two up to 2^20")]
    Alignment {
        /// The alignment.
        got: String,
    },
    /// A tensor with too many dimensions.
    #[error("tensor {name} has {got} dimensions, expected 1 to 4")]
    Dimensions {
        /// The tensor.
        name: String,
        /// How many it has.
        got: u32,
    },
    /// A tensor of a type that is not computed with.
    #[error(
        "tensor {name} is of ggml's type {got}, expected F32 (0), F16 (1), BF16 (30), \
         Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 (2, 3, 6, 7, 8) or Q2_K to Q6_K (10 to 14)"
    )]
    Type {
        /// The tensor.
        name: String,
        /// The number of the type.
        got: u32,
    },
    /// A tensor whose rows are no whole blocks.
    #[error("tensor {name} has rows of {got} elements, expected a multiple of {block}")]
    Blocks {
        /// The tensor.
        name: String,
        /// Elements of a row.
        got: u64,
        /// Elements of a block.
        block: usize,
    },
    /// A tensor that does not begin at a multiple of the alignment.
    #[error("tensor {name} begins at byte {got} of the data, expected a multiple of {alignment}")]
    Offset {
        /// The tensor.
        name: String,
        /// Where it begins.
        got: u64,
        /// The alignment.
        alignment: u64,
    },
}

type Result<T, E = GgufError> = std::result::Result<T, E>;

/// A value of the metadata. Numbers of all widths are one kind.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// A whole number.
    Integer(i128),
    /// A number.
    Float(f64),
    /// True or false.
    Bool(bool),
    /// A text; what is no UTF-8 is replaced.
    Text(String),
    /// A list of whole numbers.
    Integers(Vec<i64>),
    /// A list of numbers.
    Floats(Vec<f64>),
    /// A list of truth values.
    Bools(Vec<bool>),
    /// A list of texts.
    Texts(Vec<String>),
    /// A list of lists, which is not read.
    Nested,
}

/// Where a tensor lies and what it is.
#[derive(Debug, Clone)]
pub(crate) struct TensorInfo {
    pub dtype: GgmlDType,
    /// Outermost first, as everywhere but in this format.
    pub shape: Vec<usize>,
    /// From the beginning of the file.
    pub offset: u64,
}

/// The header of a file.
#[derive(Debug)]
pub(crate) struct Header {
    pub metadata: BTreeMap<String, Value>,
    pub tensors: BTreeMap<String, TensorInfo>,
}

impl Header {
    /// Reads and checks the header of a file, which ends within the tensors at the latest.
    pub fn read(file: &mut (impl Read + Seek)) -> Result<Self> {
        let cause = |cause| GgufError::Read { cause };
        let size = file.seek(SeekFrom::End(0)).map_err(cause)?;
        file.rewind().map_err(cause)?;
        let mut reader = Reader { inner: BufReader::new(file), left: size };

        let magic: [u8; 4] = reader.array("the magic number")?;
        if &magic != b"GGUF" {
            return Err(GgufError::Magic { got: String::from_utf8_lossy(&magic).into() });
        }
        let version = reader.u32("the version")?;
        if !(2..=3).contains(&version) {
            return Err(GgufError::Version { got: version });
        }
        // Of no more than can stand in the file: a tensor takes 24 bytes at least, a value 13.
        let tensor_count = reader.u64("the number of tensors")?;
        let value_count = reader.u64("the number of values")?;
        reader.expect("the list of tensors", tensor_count, 24)?;
        reader.expect("the metadata", value_count, 13)?;

        let mut metadata = BTreeMap::new();
        for _ in 0..value_count {
            let key = reader.name("a value")?;
            let kind = reader.u32(&key)?;
            let value = reader.value(&key, kind)?;
            if metadata.insert(key.clone(), value).is_some() {
                return Err(GgufError::Twice { name: key });
            }
        }
        let alignment = alignment(&metadata)?;
        let mut tensors = BTreeMap::new();
        for _ in 0..tensor_count {
            let name = reader.name("a tensor")?;
            let info = reader.tensor(&name, alignment)?;
            if tensors.insert(name.clone(), info).is_some() {
                return Err(GgufError::Twice { name });
            }
        }
        // Offsets count from the first multiple of the alignment after the header.
        let data = (size - reader.left).next_multiple_of(alignment);
        for (name, info) in &mut tensors {
            let bytes = info.bytes();
            let fits = data.checked_add(info.offset).filter(|start| bytes <= size.saturating_sub(*start));
            let left = size.saturating_sub(data.saturating_add(info.offset));
            let truncated = || GgufError::Truncated { what: format!("tensor {name}"), needed: bytes, left };
            info.offset = fits.ok_or_else(truncated)?;
        }
        Ok(Self { metadata, tensors })
    }
}

fn alignment(metadata: &BTreeMap<String, Value>) -> Result<u64> {
    match metadata.get("general.alignment") {
        None => Ok(32),
        Some(Value::Integer(n)) if (1..=1 << 20).contains(n) && n.count_ones() == 1 => Ok(*n as u64),
        Some(Value::Integer(n)) => Err(GgufError::Alignment { got: n.to_string() }),
        Some(_) => Err(GgufError::Alignment { got: "no whole number".into() }),
    }
}

impl TensorInfo {
    /// Bytes of the tensor: whole blocks, as the header was checked.
    pub fn bytes(&self) -> u64 {
        let elements: u64 = self.shape.iter().map(|&n| n as u64).product();
        elements / self.dtype.block_size() as u64 * self.dtype.type_size() as u64
    }
}

/// A file from its beginning on.
struct Reader<R> {
    inner: R,
    left: u64,
}

impl<R: Read> Reader<R> {
    /// Fails if so many things of so many bytes each do not fit into what is left.
    fn expect(&self, what: &str, count: u64, each: u64) -> Result<()> {
        let needed = count.saturating_mul(each);
        if needed > self.left {
            return Err(GgufError::Truncated { what: what.into(), needed, left: self.left });
        }
        Ok(())
    }

    fn fill(&mut self, what: &str, bytes: &mut [u8]) -> Result<()> {
        self.expect(what, bytes.len() as u64, 1)?;
        self.left -= bytes.len() as u64;
        self.inner.read_exact(bytes).map_err(|cause| GgufError::Read { cause })
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.fill(what, &mut bytes)?;
        Ok(bytes)
    }

    fn u32(&mut self, what: &str) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    fn u64(&mut self, what: &str) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    fn bytes(&mut self, what: &str) -> Result<Vec<u8>> {
        let length = self.u64(what)?;
        self.expect(what, length, 1)?;
        let mut bytes = vec![0; length as usize];
        self.fill(what, &mut bytes)?;
        Ok(bytes)
    }

    fn name(&mut self, what: &'static str) -> Result<String> {
        let bytes = self.bytes(what)?;
        String::from_utf8(bytes)
            .map_err(|e| GgufError::Name { what, got: String::from_utf8_lossy(e.as_bytes()).into() })
    }

    fn text(&mut self, key: &str) -> Result<String> {
        let bytes = self.bytes(key)?;
        Ok(String::from_utf8(bytes).unwrap_or_else(|e| String::from_utf8_lossy(e.as_bytes()).into()))
    }

    fn truth(&mut self, key: &str) -> Result<bool> {
        match self.array(key)? {
            [0] => Ok(false),
            [1] => Ok(true),
            [got] => Err(GgufError::Truth { key: key.into(), got }),
        }
    }

    fn value(&mut self, key: &str, kind: u32) -> Result<Value> {
        Ok(match kind {
            6 | 12 => Value::Float(self.float(key, kind)?),
            7 => Value::Bool(self.truth(key)?),
            8 => Value::Text(self.text(key)?),
            9 => self.list(key)?,
            _ => Value::Integer(self.integer(key, kind)?),
        })
    }

    fn integer(&mut self, key: &str, kind: u32) -> Result<i128> {
        Ok(match kind {
            0 => u8::from_le_bytes(self.array(key)?).into(),
            1 => i8::from_le_bytes(self.array(key)?).into(),
            2 => u16::from_le_bytes(self.array(key)?).into(),
            3 => i16::from_le_bytes(self.array(key)?).into(),
            4 => u32::from_le_bytes(self.array(key)?).into(),
            5 => i32::from_le_bytes(self.array(key)?).into(),
            10 => u64::from_le_bytes(self.array(key)?).into(),
            11 => i64::from_le_bytes(self.array(key)?).into(),
            got => return Err(GgufError::Kind { key: key.into(), got }),
        })
    }

    fn float(&mut self, key: &str, kind: u32) -> Result<f64> {
        Ok(match kind {
            6 => f32::from_le_bytes(self.array(key)?).into(),
            _ => f64::from_le_bytes(self.array(key)?),
        })
    }

    fn list(&mut self, key: &str) -> Result<Value> {
        let kind = self.u32(key)?;
        let count = self.u64(key)?;
        // The bytes of an element, or the fewest of a text. What is allocated is at most 8 times that.
        let each = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            8 | 10..=12 => 8,
            9 => 12,
            got => return Err(GgufError::Kind { key: key.into(), got }),
        };
        self.expect(key, count, each)?;
        Ok(match kind {
            6 | 12 => Value::Floats((0..count).map(|_| self.float(key, kind)).collect::<Result<_>>()?),
            7 => Value::Bools((0..count).map(|_| self.truth(key)).collect::<Result<_>>()?),
            8 => Value::Texts((0..count).map(|_| self.text(key)).collect::<Result<_>>()?),
            9 => {
                self.skip_lists(key, count)?;
                Value::Nested
            }
            // Those above i64's largest have no meaning anywhere.
            _ => Value::Integers(
                (0..count)
                    .map(|_| Ok(i64::try_from(self.integer(key, kind)?).unwrap_or(i64::MAX)))
                    .collect::<Result<_>>()?,
            ),
        })
    }

    /// Passes over the elements of a list of lists, however deep: a count of what is still to come, and no recursion.
    fn skip_lists(&mut self, key: &str, count: u64) -> Result<()> {
        let mut lists = count;
        while lists > 0 {
            lists -= 1;
            let kind = self.u32(key)?;
            let count = self.u64(key)?;
            match kind {
                9 => {
                    self.expect(key, count, 12)?;
                    // Each takes 12 bytes of the file, so their number cannot overflow.
                    lists += count;
                }
                8 => {
                    self.expect(key, count, 8)?;
                    for _ in 0..count {
                        self.bytes(key)?;
                    }
                }
                _ => {
                    for _ in 0..count {
                        self.value(key, kind)?;
                    }
                }
            }
        }
        Ok(())
    }

    fn tensor(&mut self, name: &str, alignment: u64) -> Result<TensorInfo> {
        let dimensions = self.u32(name)?;
        if !(1..=4).contains(&dimensions) {
            return Err(GgufError::Dimensions { name: name.into(), got: dimensions });
        }
        let mut shape: Vec<u64> = (0..dimensions).map(|_| self.u64(name)).collect::<Result<_>>()?;
        let number = self.u32(name)?;
        let dtype = dtype(number).ok_or_else(|| GgufError::Type { name: name.into(), got: number })?;
        let (row, block) = (shape[0], dtype.block_size());
        if !row.is_multiple_of(block as u64) {
            return Err(GgufError::Blocks { name: name.into(), got: row, block });
        }
        shape.reverse();
        // Its elements, and its bytes, are no more than a file can have: the products within do not overflow.
        let elements = shape.iter().try_fold(1u64, |product, &n| product.checked_mul(n)).filter(|&n| n < 1 << 56);
        let truncated =
            || GgufError::Truncated { what: format!("tensor {name} of {shape:?}"), needed: u64::MAX, left: self.left };
        elements.ok_or_else(truncated)?;
        let shape = shape.iter().map(|&n| usize::try_from(n)).collect::<Result<_, _>>().map_err(|_| truncated())?;
        let offset = self.u64(name)?;
        if !offset.is_multiple_of(alignment) {
            return Err(GgufError::Offset { name: name.into(), got: offset, alignment });
        }
        Ok(TensorInfo { dtype, shape, offset })
    }
}

/// The types that weights have: those of activations (Q8_1, Q8_K) are none.
fn dtype(number: u32) -> Option<GgmlDType> {
    Some(match number {
        0 => GgmlDType::F32,
        1 => GgmlDType::F16,
        2 => GgmlDType::Q4_0,
        3 => GgmlDType::Q4_1,
        6 => GgmlDType::Q5_0,
        7 => GgmlDType::Q5_1,
        8 => GgmlDType::Q8_0,
        10 => GgmlDType::Q2K,
        11 => GgmlDType::Q3K,
        12 => GgmlDType::Q4K,
        13 => GgmlDType::Q5K,
        14 => GgmlDType::Q6K,
        30 => GgmlDType::BF16,
        _ => return None,
    })
}
