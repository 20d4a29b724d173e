//! mlx-native's surface: its two contracts, its results against the oracle, and its errors with those it missed.

mod errors;
mod results;
#[path = "../support/mod.rs"]
mod support;

use errors::*;
use half::f16;
use results::*;
use support::*;
use tqkv::format::RowFormat;
use tqkv::mlx::ops::{flash_attn_vec_tq::tmp_buffer_bytes, flash_attn_vec_tq_hb::compute_nsg};
use tqkv::mlx::*;
use tqkv::{Codec, Device, reference};

const KV_HEADS: usize = 2;
const CAPACITY: usize = 8;

/// A cache of random codes and plausible norms.
struct Cache {
    device: MlxDevice,
    registry: KernelRegistry,
    row: RowFormat,
    codes: Vec<u8>,
    scales: Vec<f32>,
    packed: MlxBuffer,
    norms: MlxBuffer,
}

impl Cache {
    fn new(device: &Device, rng: &mut Rng, bits: u8, d: usize, factor: f32) -> Cache {
        let row = RowFormat::new(Codec::seed(bits), d).unwrap().with_scale_factor_d512(factor).unwrap();
        let rows = KV_HEADS * CAPACITY;
        let codes = rng.bytes(rows * row.row_bytes());
        let scales: Vec<f32> = (0..rows * row.scales_per_row()).map(|_| 0.5 + rng.unit() as f32).collect();
        let packed = device.upload(&codes, &[codes.len()]).unwrap().into();
        let norms = device.upload(&scales, &[scales.len()]).unwrap().into();
        Cache { device: device.clone().into(), registry: KernelRegistry::new(), row, codes, scales, packed, norms }
    }

    /// What the oracle decodes at a position of a head.
    fn expected(&self, head: usize, position: usize) -> Vec<f32> {
        let (r, n) = (head * CAPACITY + position, self.row.scales_per_row());
        let codes = &self.codes[r * self.row.row_bytes()..][..self.row.row_bytes()];
        reference::dequantize(&self.row, codes, &self.scales[r * n..][..n])
    }

    fn run(
        &mut self,
        record: impl FnOnce(&Cache, &mut CommandEncoder, &mut KernelRegistry) -> Result<()>,
    ) -> Result<()> {
        let mut encoder = self.device.command_encoder()?;
        let mut registry = std::mem::take(&mut self.registry);
        let recorded = record(self, &mut encoder, &mut registry);
        self.registry = registry;
        recorded?;
        encoder.commit_and_wait()
    }

    /// The bits of one decoded position, by the dispatch for its width.
    fn single(&mut self, position: usize) -> Vec<u32> {
        let (d, bits) = (self.row.head_dim(), self.row.bits());
        let dst = poisoned(&self.device, DType::F32, KV_HEADS * d);
        self.run(|c, e, r| {
            let (h, d, n, p) = (KV_HEADS as u32, d as u32, CAPACITY as u32, position as u32);
            let f = c.row.scale_factor_d512();
            match bits {
                4 => dispatch_tq_dequantize_kv(e, r, &c.device, &c.packed, &c.norms, &dst, h, d, n, p, f),
                b => dispatch_tq_dequantize_hb_kv(e, r, &c.device, &c.packed, &c.norms, &dst, h, d, n, p, f, b as u32),
            }
        })
        .unwrap();
        dst.as_slice().unwrap()
    }

    /// The bits of several decoded positions.
    fn sequence(&mut self, start: usize, n: usize) -> Vec<u32> {
        let (d, bits) = (self.row.head_dim(), self.row.bits());
        let dst = poisoned(&self.device, DType::F32, KV_HEADS * n * d);
        self.run(|c, e, r| {
            let (h, d, cap, f) = (KV_HEADS as u32, d as u32, CAPACITY as u32, c.row.scale_factor_d512());
            let (start, n, b) = (start as u32, n as u32, bits as u32);
            dispatch_tq_dequantize_hb_kv_seq(e, r, &c.device, &c.packed, &c.norms, &dst, h, d, cap, start, n, f, b)
        })
        .unwrap();
        dst.as_slice().unwrap()
    }
}

fn poisoned(device: &MlxDevice, dtype: DType, n: usize) -> MlxBuffer {
    upload(device.device(), dtype, &vec![f32::NAN; n], &[n]).into()
}

#[test]
fn users_may_move_everything_between_threads() {
    fn send_and_sync<T: Send + Sync>() {}
    send_and_sync::<(MlxDevice, MlxBuffer, MlxError, KernelRegistry)>();
    fn send<T: Send>() {}
    send::<CommandEncoder>();
    assert_eq!(MlxDevice::new().unwrap().device().info().id, Device::best().info().id);
}

/// A slice that cannot be written back is no silent loss.
#[test]
fn a_lost_write_fails_what_follows() {
    use std::sync::{Arc, Mutex, mpsc::channel};
    let device = Device::cpu_with_threads(1).unwrap();
    let mut b = MlxBuffer::from(device.upload(&[1f32; 256], &[256]).unwrap());
    let held = b.buffer().clone();
    let ((entered, is_entered), (leave, may_leave)) = (channel(), channel());
    let may_leave = Mutex::new(may_leave);
    let hold = Arc::new(move |_: &mut [&mut [u8]], _: &[u32]| {
        entered.send(()).unwrap();
        may_leave.lock().unwrap().recv().unwrap()
    });
    device.kernels().register("hold", tqkv::compute::KernelSource::Cpu(hold));
    let slice = b.as_mut_slice::<f32>().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| run(&device, |e| e.dispatch("hold", [1, 1, 1], &[&held], &[])));
        is_entered.recv().unwrap();
        drop(slice);
        leave.send(()).unwrap();
    });
    let mlx = MlxDevice::from(device.clone());
    let (mut e, mut r) = (mlx.command_encoder().unwrap(), KernelRegistry::new());
    let late = dispatch_fwht_sign_undo_f32(&mut e, &mut r, &mlx, &b, 1, 256);
    assert!(matches!(late, Err(MlxError::CommandBufferError(m)) if m.contains("in use by another thread")));
    assert!(b.as_slice::<f32>().is_err());
}

suite!(cpu, wgpu, cuda: (
    decoders_keep_their_contracts,
    the_f16_decoder_rounds_the_f32_one,
    a_sequence_encodes_as_its_tokens_do,
    dual_encoders_equal_two_calls,
    attention_matches_the_oracle,
    decoding_errors,
    encoding_errors,
    attention_errors,
    encoders_are_used_once,
    buffers,
));
