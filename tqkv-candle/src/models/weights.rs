//! The tensors of safetensors and GGUF files, read one at a time as the model asks for them.

use super::gguf::{Header, TensorInfo, Value};
use super::linear::Matrix;
use crate::error::{Error, Result};
use crate::fields::Fields;
use candle_core::quantized::k_quants::{
    BlockQ2K, BlockQ3K, BlockQ4_0, BlockQ4_1, BlockQ4K, BlockQ5_0, BlockQ5_1, BlockQ5K, BlockQ6K, BlockQ8_0,
};
use candle_core::quantized::{GgmlDType, GgmlType, QStorage, QTensor, QuantizedType};
use candle_core::{Device, Tensor};
use half::{bf16, f16};
use safetensors::tensor::Metadata;
use safetensors::{Dtype, SafeTensorError};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{Cursor, Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The tensors of a model, by name. Their bytes stay in the files until they are asked for.
pub struct Weights {
    files: Vec<(PathBuf, Box<dyn Source>)>,
    tensors: BTreeMap<String, Located>,
    /// Those that the model has asked for.
    taken: BTreeSet<String>,
    gguf: bool,
    dequantize: bool,
}

trait Source: Read + Seek + Send {}
impl<T: Read + Seek + Send> Source for T {}

/// A tensor and the number of its file.
struct Located {
    file: usize,
    info: TensorInfo,
}

/// Which rows of a matrix are read, and in which order.
pub(crate) enum Rows {
    All,
    /// Of a matrix that holds several.
    Range(Range<usize>),
    /// All, of which each head has its elements i and i + head_dim/2 side by side: they are put back where they belong.
    Interleaved {
        head_dim: usize,
    },
}

impl Weights {
    fn new() -> Self {
        Self { files: vec![], tensors: BTreeMap::new(), taken: BTreeSet::new(), gguf: false, dequantize: false }
    }

    /// Opens the `model.safetensors` of a directory, or the shards that `model.safetensors.index.json` names. All headers
    /// are checked; of the tensors nothing is read yet.
    pub fn load(dir: &Path) -> Result<Self> {
        let mut weights = Self::new();
        let single = dir.join("model.safetensors");
        if single.exists() {
            weights.add_file(&single)?;
            return Ok(weights);
        }
        let index = dir.join("model.safetensors.index.json");
        if !index.exists() {
            return Err(Error::NoWeights { dir: dir.into() });
        }
        let json = super::parse_json(&super::read(&index)?, &index)?;
        let fields = Fields::new(&index, &json)?;
        fields.required("weight_map", fields.find("weight_map")?)?;
        let weight_map = fields.within(&["weight_map"])?.texts()?;
        for (tensor, shard) in &weight_map {
            if Path::new(shard).file_name() != Some(shard.as_ref()) {
                return Err(Error::ShardName { path: index, tensor: tensor.clone(), got: shard.clone() });
            }
        }
        for shard in weight_map.values().collect::<BTreeSet<_>>() {
            for name in weights.add_file(&dir.join(shard))? {
                let expected = weight_map.get(&name).map_or("nothing", String::as_str);
                if expected != shard {
                    return Err(Error::ShardMismatch { name, got: shard.clone(), expected: expected.into() });
                }
            }
        }
        Ok(weights)
    }

    /// The tensors of one safetensors file in memory; `path` is for the error message.
    pub fn parse(bytes: &[u8], path: &Path) -> Result<Self> {
        let mut weights = Self::new();
        weights.add(path, Box::new(Cursor::new(bytes.to_vec())))?;
        Ok(weights)
    }

    /// The tensors and the metadata of a GGUF file.
    pub(crate) fn load_gguf(path: &Path) -> Result<(Self, BTreeMap<String, Value>)> {
        let mut file = open(path)?;
        let header = Header::read(&mut file).map_err(|cause| Error::Gguf { path: path.into(), cause })?;
        let tensors = header.tensors.into_iter().map(|(name, info)| (name, Located { file: 0, info })).collect();
        Ok((Self { files: vec![(path.into(), Box::new(file))], tensors, gguf: true, ..Self::new() }, header.metadata))
    }

    /// The same tensors, all as f32: none stays in blocks or in 16 bits.
    pub fn dequantized(mut self) -> Self {
        self.dequantize = true;
        self
    }

    fn add_file(&mut self, path: &Path) -> Result<Vec<String>> {
        self.add(path, Box::new(open(path)?))
    }

    /// Adds a safetensors file's tensors and returns their names.
    fn add(&mut self, path: &Path, mut source: Box<dyn Source>) -> Result<Vec<String>> {
        let (start, metadata) = safetensors_header(path, &mut source)?;
        let file = self.files.len();
        self.files.push((path.into(), source));
        let mut names = Vec::new();
        for (name, info) in metadata.tensors() {
            let dtype = match info.dtype {
                Dtype::F32 => GgmlDType::F32,
                Dtype::F16 => GgmlDType::F16,
                Dtype::BF16 => GgmlDType::BF16,
                got => return Err(Error::TensorDtype { name, got }),
            };
            let offset = start + info.data_offsets.0 as u64;
            let info = TensorInfo { dtype, shape: info.shape.clone(), offset };
            self.tensors.insert(name.clone(), Located { file, info });
            names.push(name);
        }
        Ok(names)
    }

    /// What the names of all tensors begin with in safetensors; nothing in GGUF, which has names of its own.
    pub(crate) fn base(&self) -> Option<&'static str> {
        // The others are those of models of text and images, old and new.
        let bases = ["model", "language_model.model", "model.language_model"];
        let found = bases.into_iter().find(|base| self.has(&format!("{base}.embed_tokens.weight")));
        (!self.gguf).then_some(found.unwrap_or(bases[0]))
    }

    /// Whether there is a tensor of this name.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// The shape of a tensor, if it is there.
    pub(crate) fn shape(&self, name: &str) -> Option<&[usize]> {
        self.tensors.get(name).map(|located| &located.info.shape[..])
    }

    /// Reads a list of numbers, as f32.
    pub(crate) fn vector(&mut self, name: &str, len: usize) -> Result<Tensor> {
        Ok(self.read(name, &[len], &Rows::All)?.dequantize(&Device::Cpu)?)
    }

    /// Reads rows of a matrix of this shape.
    pub(crate) fn matrix(&mut self, name: &str, shape: [usize; 2], rows: &Rows) -> Result<Matrix> {
        self.matrix_as(name, shape, rows, |dense| Ok(dense.t()?.contiguous()?))
    }

    /// Reads a whole matrix, of which rows will be looked up too.
    pub(crate) fn table(&mut self, name: &str, shape: [usize; 2]) -> Result<Matrix> {
        self.matrix_as(name, shape, &Rows::All, |dense| Ok(dense.t()?))
    }

    /// Reads the bias of a matrix whose rows are in this order, whole.
    pub(crate) fn bias(&mut self, name: &str, len: usize, rows: &Rows) -> Result<Tensor> {
        let bias = self.vector(name, len)?;
        match *rows {
            Rows::Interleaved { head_dim } => {
                Ok(bias.reshape((len / head_dim, head_dim / 2, 2))?.transpose(1, 2)?.contiguous()?.flatten_all()?)
            }
            _ => Ok(bias),
        }
    }

    fn matrix_as(
        &mut self,
        name: &str,
        shape: [usize; 2],
        rows: &Rows,
        turn: impl Fn(Tensor) -> Result<Tensor>,
    ) -> Result<Matrix> {
        let matrix = self.read(name, &shape, rows)?;
        Ok(match matrix.dtype() == GgmlDType::F32 || self.dequantize {
            true => Matrix::Dense(turn(matrix.dequantize(&Device::Cpu)?)?),
            false => Matrix::Packed(Arc::new(matrix)),
        })
    }

    /// Reads rows of a tensor, which must have this shape.
    fn read(&mut self, name: &str, shape: &[usize], rows: &Rows) -> Result<QTensor> {
        let Some(Located { file, info }) = self.tensors.get(name) else {
            return Err(Error::MissingTensor { name: name.into(), expected: shape.into() });
        };
        if info.shape != shape {
            return Err(Error::TensorShape { name: name.into(), got: info.shape.clone(), expected: shape.into() });
        }
        let (path, source) = &mut self.files[*file];
        let mut shape = shape.to_vec();
        let height = if shape.len() == 1 { 1 } else { shape[0] };
        let mut range = 0..height;
        if let Rows::Range(rows) = rows {
            shape[0] = rows.len();
            range = rows.clone();
        }
        // The header was checked against the file: the tensor is in it and its rows are whole blocks.
        let row = (info.bytes() / height as u64) as usize;
        let fill = |bytes: &mut [u8]| {
            source.seek(SeekFrom::Start(info.offset + (range.start * row) as u64))?;
            source.read_exact(bytes)?;
            if let &Rows::Interleaved { head_dim } = rows {
                let mut head = vec![0; head_dim * row];
                for bytes in bytes.chunks_exact_mut(head_dim * row) {
                    head.copy_from_slice(bytes);
                    for (i, from) in head.chunks_exact(row).enumerate() {
                        let to = (i / 2 + i % 2 * (head_dim / 2)) * row;
                        bytes[to..to + row].copy_from_slice(from);
                    }
                }
            }
            Ok(())
        };
        let blocks = blocks(info.dtype, range.len() * row, fill);
        let blocks = blocks.map_err(|cause| Error::Read { path: path.clone(), cause })?;
        let tensor = QTensor::new(QStorage::Cpu(blocks), shape)?;
        self.taken.insert(name.into());
        Ok(tensor)
    }

    /// Complains about what has not been asked for: a tensor that is left would change the model. `surplus` are those that
    /// would not.
    pub(crate) fn finish(self, surplus: impl Fn(&str) -> bool) -> Result<()> {
        match self.tensors.into_keys().find(|name| !self.taken.contains(name) && !surplus(name)) {
            Some(name) => Err(Error::UnexpectedTensor { name }),
            None => Ok(()),
        }
    }
}

fn open(path: &Path) -> Result<File> {
    File::open(path).map_err(|cause| Error::Read { path: path.into(), cause })
}

/// Where the data of a safetensors file begin, and what it says of them.
fn safetensors_header(path: &Path, source: &mut dyn Source) -> Result<(u64, Metadata)> {
    let io = |cause| Error::Read { path: path.into(), cause };
    let wrong = |cause| Error::Safetensors { path: path.into(), cause };
    let size = source.seek(SeekFrom::End(0)).map_err(io)?;
    source.rewind().map_err(io)?;
    if size < 8 {
        return Err(wrong(SafeTensorError::HeaderTooSmall));
    }
    let mut length = [0; 8];
    source.read_exact(&mut length).map_err(io)?;
    let length = u64::from_le_bytes(length);
    if length > size - 8 {
        return Err(wrong(SafeTensorError::InvalidHeaderLength));
    }
    let mut header = vec![0; length as usize];
    source.read_exact(&mut header).map_err(io)?;
    let text = std::str::from_utf8(&header).map_err(|e| wrong(SafeTensorError::InvalidHeader(e)))?;
    let metadata: Metadata =
        serde_json::from_str(text).map_err(|e| wrong(SafeTensorError::InvalidHeaderDeserialization(e)))?;
    if metadata.data_len() as u64 != size - 8 - length {
        return Err(wrong(SafeTensorError::MetadataIncompleteBuffer));
    }
    Ok((8 + length, metadata))
}

/// Blocks of a type, so many bytes of them, as `fill` writes them.
fn blocks(
    dtype: GgmlDType,
    bytes: usize,
    fill: impl FnOnce(&mut [u8]) -> std::io::Result<()>,
) -> std::io::Result<Box<dyn QuantizedType>> {
    fn typed<T: GgmlType + 'static>(
        bytes: usize,
        fill: impl FnOnce(&mut [u8]) -> std::io::Result<()>,
    ) -> std::io::Result<Box<dyn QuantizedType>> {
        let mut blocks = vec![T::zeros(); bytes / size_of::<T>()];
        // SAFETY: these are all the bytes of the vector's elements, which it alone holds. Every `T` below is a float, or
        // `repr(C)` of halves and bytes without padding, so that any bytes are a value and all bytes are initialized.
        let raw = unsafe { std::slice::from_raw_parts_mut(blocks.as_mut_ptr().cast::<u8>(), size_of_val(&blocks[..])) };
        fill(raw)?;
        Ok(Box::new(blocks))
    }
    match dtype {
        GgmlDType::F32 => typed::<f32>(bytes, fill),
        GgmlDType::F16 => typed::<f16>(bytes, fill),
        GgmlDType::BF16 => typed::<bf16>(bytes, fill),
        GgmlDType::Q4_0 => typed::<BlockQ4_0>(bytes, fill),
        GgmlDType::Q4_1 => typed::<BlockQ4_1>(bytes, fill),
        GgmlDType::Q5_0 => typed::<BlockQ5_0>(bytes, fill),
        GgmlDType::Q5_1 => typed::<BlockQ5_1>(bytes, fill),
        GgmlDType::Q8_0 => typed::<BlockQ8_0>(bytes, fill),
        GgmlDType::Q2K => typed::<BlockQ2K>(bytes, fill),
        GgmlDType::Q3K => typed::<BlockQ3K>(bytes, fill),
        GgmlDType::Q4K => typed::<BlockQ4K>(bytes, fill),
        GgmlDType::Q5K => typed::<BlockQ5K>(bytes, fill),
        GgmlDType::Q6K => typed::<BlockQ6K>(bytes, fill),
        GgmlDType::Q8_1 | GgmlDType::Q8K => Err(std::io::Error::other("a type of activations and not of weights")),
    }
}
