//! Weights out of safetensors files, as f32 tensors.

use crate::config::{parse_json, read};
use crate::error::{Error, Result};
use candle_core::{Device, Tensor};
use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;

/// The tensors of a model, by name.
pub struct Weights {
    tensors: HashMap<String, Tensor>,
}

impl Weights {
    /// Reads `model.safetensors`, or the shards that `model.safetensors.index.json` names.
    ///
    /// Files are read whole, one at a time, and not mapped: a file that shrinks meanwhile is an
    /// error here and not a signal.
    pub fn load(dir: &Path) -> Result<Self> {
        let mut weights = Self { tensors: HashMap::new() };
        let single = dir.join("model.safetensors");
        if single.exists() {
            weights.add(&read(&single)?, &single)?;
            return Ok(weights);
        }
        let index = dir.join("model.safetensors.index.json");
        if !index.exists() {
            return Err(Error::NoWeights { dir: dir.into() });
        }
        #[derive(Deserialize)]
        struct Index {
            weight_map: BTreeMap<String, String>,
        }
        let Index { weight_map } = parse_json(&read(&index)?, &index)?;
        for (tensor, shard) in &weight_map {
            if Path::new(shard).file_name() != Some(shard.as_ref()) {
                return Err(Error::ShardName { path: index, tensor: tensor.clone(), got: shard.clone() });
            }
        }
        for shard in weight_map.values().collect::<BTreeSet<_>>() {
            let path = dir.join(shard);
            for name in weights.add(&read(&path)?, &path)? {
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
        let mut weights = Self { tensors: HashMap::new() };
        weights.add(bytes, path)?;
        Ok(weights)
    }

    /// Adds a file's tensors and returns their names.
    fn add(&mut self, bytes: &[u8], path: &Path) -> Result<Vec<String>> {
        let file = SafeTensors::deserialize(bytes).map_err(|cause| Error::Safetensors { path: path.into(), cause })?;
        let mut names = Vec::new();
        for (name, view) in file.iter() {
            let data = view.data();
            let values: Vec<f32> = match view.dtype() {
                Dtype::F32 => data.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect(),
                Dtype::F16 => data.as_chunks().0.iter().map(|&b| f16::from_le_bytes(b).to_f32()).collect(),
                Dtype::BF16 => data.as_chunks().0.iter().map(|&b| bf16::from_le_bytes(b).to_f32()).collect(),
                got => return Err(Error::TensorDtype { name: name.into(), got }),
            };
            let tensor = Tensor::from_vec(values, view.shape(), &Device::Cpu)?;
            self.tensors.insert(name.into(), tensor);
            names.push(name.into());
        }
        Ok(names)
    }

    /// Takes a tensor out, which must have the given shape.
    pub(crate) fn take(&mut self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let tensor = self
            .tensors
            .remove(name)
            .ok_or_else(|| Error::MissingTensor { name: name.into(), expected: shape.into() })?;
        if tensor.dims() != shape {
            return Err(Error::TensorShape { name: name.into(), got: tensor.dims().into(), expected: shape.into() });
        }
        Ok(tensor)
    }

    /// Complains about what has not been taken: a tensor that is left would change the model.
    pub(crate) fn finish(mut self, tied: bool) -> Result<()> {
        if tied {
            // Some files repeat the embedding as the output layer.
            self.tensors.remove("lm_head.weight");
        }
        // Old files hold these frequencies, which follow from the configuration.
        self.tensors.retain(|name, _| !name.ends_with(".rotary_emb.inv_freq"));
        match self.tensors.into_keys().min() {
            Some(name) => Err(Error::UnexpectedTensor { name }),
            None => Ok(()),
        }
    }
}
