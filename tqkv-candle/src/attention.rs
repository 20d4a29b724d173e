//! Attention of a candle model over a tqkv cache: where tensors are handed over.

use crate::error::{Error, Result};
use candle_core::{CpuStorage, DType, Storage, Tensor, WithDType};
use half::{bf16, f16};
use tqkv::cache::Step;
use tqkv::compute::{DeviceKind, Element};
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
        let step = self.cache.step(new)?;
        let on_cpu = step.device().info().kind == DeviceKind::Cpu;
        Ok(AttentionStep { step, on_cpu, tap: self.tap.as_deref_mut().map(|tap| tap as &mut dyn Tap) })
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
    on_cpu: bool,
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
        if self.on_cpu && [q, k, v].iter().all(|x| x.device().is_cpu()) {
            return match q.dtype() {
                DType::F16 => self.attend_in_place::<f16>(layer, q, k, v, params),
                DType::BF16 => self.attend_in_place::<bf16>(layer, q, k, v, params),
                _ => self.attend_in_place::<f32>(layer, q, k, v, params),
            };
        }
        let device = self.step.device().clone();
        let out = device.zeros(dtype(q)?, q.dims())?;
        let (q_buffer, k, v) = (hand_over(&device, q)?, hand_over(&device, k)?, hand_over(&device, v)?);
        self.attend(layer, &q_buffer, &k, &v, &out, params)?;
        take_back(&out, q)
    }

    fn attend(
        &mut self,
        layer: usize,
        q: &Buffer,
        k: &Buffer,
        v: &Buffer,
        out: &Buffer,
        params: &AttentionParams,
    ) -> Result<()> {
        let mut encoder = self.step.device().encoder()?;
        self.step.append_and_attend(&mut encoder, layer, k, v, q, out, None, params)?;
        Ok(encoder.submit_and_wait()?)
    }

    /// Where both are on the CPU: tensors are read where they are, and the result, of type `T` as `q`, is written where its
    /// tensor will be.
    fn attend_in_place<T: Element + WithDType>(
        &mut self,
        layer: usize,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        params: &AttentionParams,
    ) -> Result<Tensor> {
        let device = self.step.device().clone();
        let (q, k, v) = (q.contiguous()?, k.contiguous()?, v.contiguous()?);
        // Until the end nobody writes there.
        let (q_storage, k_storage, v_storage) =
            (q.storage_and_layout().0, k.storage_and_layout().0, v.storage_and_layout().0);
        let mut out = vec![T::zeroed(); q.elem_count()];
        // SAFETY: the tensors and the vector outlive the buffers, which end with this function, and so do the guards that keep others
        // from writing to the tensors; only `out` is written to, and nobody else has it. Work on the CPU ends before `attend` does.
        unsafe {
            let [q_buffer, k, v] =
                [borrow(&device, &q_storage, &q)?, borrow(&device, &k_storage, &k)?, borrow(&device, &v_storage, &v)?];
            let start = out.as_mut_ptr().cast();
            let out = Buffer::from_host_ptr(&device, start, <T as Element>::DTYPE, q.dims(), Box::new(()))?;
            self.attend(layer, &q_buffer, &k, &v, &out, params)?;
        }
        Ok(Tensor::from_vec(out, q.dims(), q.device())?)
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

/// A contiguous tensor's own memory as a buffer of the CPU.
///
/// # Safety
/// The tensor outlives the buffer, nothing writes to its memory meanwhile, and nothing is written through the buffer.
unsafe fn borrow(device: &Device, storage: &Storage, x: &Tensor) -> Result<Buffer> {
    fn start<T>(all: &[T], x: &Tensor) -> *mut u8 {
        let start = x.layout().start_offset();
        all[start..start + x.elem_count()].as_ptr().cast_mut().cast()
    }
    let (start, dtype) = match storage {
        Storage::Cpu(CpuStorage::F32(all)) => (start(all, x), tqkv::DType::F32),
        Storage::Cpu(CpuStorage::F16(all)) => (start(all, x), tqkv::DType::F16),
        Storage::Cpu(CpuStorage::BF16(all)) => (start(all, x), tqkv::DType::BF16),
        _ => return Err(Error::TensorType { got: x.dtype() }),
    };
    // SAFETY: the slice above is what the buffer has; the rest is the caller's promise.
    Ok(unsafe { Buffer::from_host_ptr(device, start, dtype, x.dims(), Box::new(()))? })
}

/// A copy of a tensor as a buffer.
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
