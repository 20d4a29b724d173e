//! Attention of a candle model over a tqkv cache: where tensors are handed over.

use crate::error::{Error, Result};
use candle_core::{CpuStorage, DType, Storage, Tensor, WithDType};
use half::{bf16, f16};
use tqkv::cache::Step;
use tqkv::compute::Element;
use tqkv::ops::AttentionParams;
use tqkv::{Buffer, CacheConfig, Device, KvCache, SequenceId};

/// The attention of all layers of a candle model, over a [`KvCache`] that it owns.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use tqkv::{CacheConfig, ops::AttentionParams};
///
/// // 2 layers, 2 KV heads of 64; 5 bits a key element, 4 a value element.
/// let config = CacheConfig::new(2, 2, 64).codec("k5v4".parse()?).capacity(1024);
/// let mut attention = tqkv_candle::Attention::new(&tqkv::Device::cpu(), config)?;
/// let sequence = attention.cache_mut().add_sequence();
///
/// let q = Tensor::randn(0f32, 1.0, (3, 8, 64), &Device::Cpu)?; // [tokens, heads, head_dim]
/// let k = Tensor::randn(0f32, 1.0, (3, 2, 64), &Device::Cpu)?; // [tokens, kv_heads, head_dim]
/// let mut step = attention.step(&[(sequence, 3)])?;
/// for layer in 0..2 {
///     let out = step.forward(layer, &q, &k, &k, &AttentionParams::for_head_dim(64))?;
///     assert_eq!(out.dims(), [3, 8, 64]);
/// }
/// step.commit()?;
/// assert_eq!(attention.cache().len(sequence)?, 3);
/// # Ok::<(), tqkv_candle::Error>(())
/// ```
pub struct Attention {
    cache: KvCache,
    tap: Option<Box<dyn Tap>>,
}

/// What sees the rows of each layer before they are stored: to measure them, or to store others in their place.
pub(crate) trait Tap: Send + Sync {
    /// `q`, `k` and `v` as [`AttentionStep::forward`] takes them. Keys and values to be stored instead, or none if as they are.
    fn pass(&mut self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Option<[Tensor; 2]>>;
}

impl Attention {
    /// With an empty cache.
    pub fn new(device: &Device, config: CacheConfig) -> Result<Self> {
        Ok(Self { cache: KvCache::new(device, config)?, tap: None })
    }

    /// The cache.
    pub fn cache(&self) -> &KvCache {
        &self.cache
    }

    /// The cache: to add sequences, fork them, cut them back, free them.
    pub fn cache_mut(&mut self) -> &mut KvCache {
        &mut self.cache
    }

    /// Starts a step of the model: `new` names each sequence with its number of new tokens.
    ///
    /// # Errors
    /// Those of [`KvCache::step`]. Nothing has changed then.
    pub fn step(&mut self, new: &[(SequenceId, usize)]) -> Result<AttentionStep<'_>> {
        Ok(AttentionStep { step: self.cache.step(new)?, tap: self.tap.as_deref_mut().map(|tap| tap as &mut dyn Tap) })
    }

    /// Lets all rows to come pass through a tap.
    pub(crate) fn set_tap(&mut self, tap: impl Tap + 'static) {
        self.tap = Some(Box::new(tap));
    }
}

/// New tokens of some sequences on their way through the layers. Made by [`Attention::step`].
///
/// The tokens count when the step is [`commit`](AttentionStep::commit)ted; if it is dropped instead, the cache holds what it
/// held before.
#[must_use = "a step that is dropped appends nothing"]
pub struct AttentionStep<'a> {
    step: Step<'a>,
    tap: Option<&'a mut dyn Tap>,
}

impl AttentionStep<'_> {
    /// Stores the keys and values of the new tokens in one layer, and attends with their queries over all that the layer then
    /// holds of their sequences. Returns a tensor like `q`.
    ///
    /// `q` is `[tokens, heads, head_dim]`, `k` and `v` are `[tokens, kv_heads, head_dim]`, each f32, f16 or bf16: one
    /// sequence's tokens after the other's, as [`Attention::step`] named them.
    ///
    /// # Errors
    /// [`Error::TensorType`], and those of [`Step::append_and_attend`].
    pub fn forward(
        &mut self,
        layer: usize,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        params: &AttentionParams,
    ) -> Result<Tensor> {
        let passed = match &mut self.tap {
            Some(tap) => tap.pass(layer, q, k, v)?,
            None => None,
        };
        let [k, v] = passed.as_ref().map_or([k, v], |[k, v]| [k, v]);
        let device = self.step.device().clone();
        let out = device.zeros(dtype(q)?, q.dims())?;
        let (q_buffer, k, v) = (hand_over(&device, q)?, hand_over(&device, k)?, hand_over(&device, v)?);
        let mut encoder = device.encoder()?;
        self.step.append_and_attend(&mut encoder, layer, &k, &v, &q_buffer, &out, None, params)?;
        encoder.submit_and_wait()?;
        take_back(&out, q)
    }

    /// Says that all layers are done: the tokens count from now on.
    ///
    /// # Errors
    /// [`tqkv::Error::UnevenLayers`] if a layer was left out. The tokens do not count then.
    pub fn commit(self) -> Result<()> {
        Ok(self.step.commit()?)
    }
}

fn dtype(x: &Tensor) -> Result<tqkv::DType> {
    match x.dtype() {
        DType::F32 => Ok(tqkv::DType::F32),
        DType::F16 => Ok(tqkv::DType::F16),
        DType::BF16 => Ok(tqkv::DType::BF16),
        got => Err(Error::TensorType { got }),
    }
}

/// A tensor as a buffer. The only place where one becomes the other.
fn hand_over(device: &Device, x: &Tensor) -> Result<Buffer> {
    fn upload<T: Element>(device: &Device, all: &[T], x: &Tensor) -> Result<Buffer> {
        let start = x.layout().start_offset();
        Ok(device.upload(&all[start..start + x.elem_count()], x.dims())?)
    }
    let x = x.to_device(&candle_core::Device::Cpu)?.contiguous()?;
    let (storage, _) = x.storage_and_layout();
    match &*storage {
        Storage::Cpu(CpuStorage::F32(all)) => upload(device, all, &x),
        Storage::Cpu(CpuStorage::F16(all)) => upload(device, all, &x),
        Storage::Cpu(CpuStorage::BF16(all)) => upload(device, all, &x),
        _ => Err(Error::TensorType { got: x.dtype() }),
    }
}

/// A buffer as a tensor on the device of another.
fn take_back(buffer: &Buffer, like: &Tensor) -> Result<Tensor> {
    fn read<T: Element + WithDType>(buffer: &Buffer, like: &Tensor) -> Result<Tensor> {
        Ok(Tensor::from_vec(buffer.read::<T>()?, buffer.shape(), like.device())?)
    }
    match buffer.dtype() {
        tqkv::DType::F16 => read::<f16>(buffer, like),
        tqkv::DType::BF16 => read::<bf16>(buffer, like),
        _ => read::<f32>(buffer, like),
    }
}
