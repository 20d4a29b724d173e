//! Calibration files, as they are and with a right checksum.

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use std::collections::{BTreeMap, HashMap};
use tqkv_candle::Calibration;
use xxhash_rust::xxh3::Xxh3Default;

const ENTRY: &str = "tqkv.calibration";

pub fn run(bytes: &[u8]) {
    let [mode, about, tensors] = super::parts::<3>(bytes);
    let built = (!mode.is_empty()).then(|| built(about, tensors)).flatten();
    super::in_folder(&[("calibration", built.as_deref().unwrap_or(bytes))], |folder| {
        let path = folder.join("calibration");
        let Ok(calibration) = Calibration::load(&path) else { return };
        let again = folder.join("again");
        calibration.save(&again).expect("a temporary file");
        assert!(Calibration::load(&again).expect("what was just written") == calibration);
        for (kv_heads, head_dim) in [(1, 4), (2, 16)] {
            let config = calibration.apply(tqkv::CacheConfig::new(calibration.layers(), kv_heads, head_dim));
            drop(config.map(|config| config.bytes()));
        }
    });
}

/// A file whose metadata hold `about`, under a right checksum, and tensors of these bytes: names, shapes and types follow.
fn built(about: &[u8], mut bytes: &[u8]) -> Option<Vec<u8>> {
    let about =
        std::str::from_utf8(about).ok().filter(|text| serde_json::from_str::<serde_json::Value>(text).is_ok())?;
    // As it stands in an object: no space around it.
    let about = about.trim();
    let mut tensors = BTreeMap::new();
    for layer in 0..3 {
        for what in ["shift", "scale"] {
            let Some((&[dtype, kv_heads, head_dim], rest)) = bytes.split_first_chunk::<3>() else { break };
            let (dtype, size) = [(Dtype::F32, 4), (Dtype::F16, 2), (Dtype::U8, 1)][usize::from(dtype.min(2))];
            let shape = vec![usize::from(kv_heads), usize::from(head_dim)];
            let wanted = shape[0] * shape[1] * size;
            let (data, rest) = rest.split_at_checked(wanted)?;
            tensors.insert(format!("layers.{layer}.{what}"), TensorView::new(dtype, shape, data).ok()?);
            bytes = rest;
        }
    }
    let mut hash = Xxh3Default::new();
    hash.update(about.as_bytes());
    for (name, view) in &tensors {
        hash.update(format!("\n{name} {:?} {:?} ", view.dtype(), view.shape()).as_bytes());
        hash.update(view.data());
    }
    let entry = format!("{{\"checksum\":\"xxh3-128:{:032x}\",\"about\":{about}}}", hash.digest128());
    let file = safetensors::serialize(&tensors, Some(HashMap::from([(ENTRY.to_owned(), entry)]))).ok()?;
    SafeTensors::deserialize(&file).ok()?;
    Some(file)
}

pub fn seeds() -> Vec<Vec<u8>> {
    let about = br#"{"version":1,"layers":2,"origin":{"model":"m","texts":["t"],"tokens":9},"plan":{"codec":"k4v4+s1f16","layers":["k4v3","k5v2"],"budget":4.25,"context":64}}"#;
    let tensor = |x: f32| [&[0, 1, 4][..], &[x; 4].map(f32::to_le_bytes).concat()].concat();
    let tensors = [tensor(1.5), tensor(0.5), tensor(-2.5), tensor(2.0)].concat();
    let built = built(about, &tensors).expect("a calibration");
    vec![super::joined([&b"x"[..], about, &tensors]), [&[0; 4][..], &built].concat(), built]
}
