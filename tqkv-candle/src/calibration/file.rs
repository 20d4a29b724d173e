//! Calibrations in safetensors files.
//!
//! Tensors `layers.N.shift` and `layers.N.scale`, f32 \[kv_heads, head_dim\]; metadata `tqkv.calibration`, a JSON object of
//! `about`, what the calibration was made from, and `checksum`, XXH3 of that text and of all tensors. One entry, since
//! safetensors writes several in any order, and the same calibration should be the same file.

use super::{Calibration, CalibrationError, Layer, Origin, Plan};
use crate::error::{Error, Result};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use std::collections::{BTreeMap, HashMap};
use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use xxhash_rust::xxh3::Xxh3Default;

/// Of the format of files.
const VERSION: u64 = 1;

/// The entry of the metadata.
const ENTRY: &str = "tqkv.calibration";

/// What the entry holds.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry<'a> {
    checksum: String,
    #[serde(borrow)]
    about: &'a RawValue,
}

/// What the metadata says of the calibration.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct About {
    version: u64,
    layers: usize,
    origin: Origin,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    plan: Option<Plan>,
}

/// What every version says.
#[derive(Deserialize)]
struct AnyVersion {
    version: u64,
}

/// The name of a layer's tensor.
pub(super) fn name(layer: usize, what: &str) -> String {
    format!("layers.{layer}.{what}")
}

impl Calibration {
    /// Writes it to a file, which is there as a whole or not at all.
    ///
    /// # Errors
    /// [`Error::Write`].
    pub fn save(&self, path: &Path) -> Result<()> {
        let failed = |cause| Error::Write { path: path.into(), cause };
        let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let mut file = tempfile::NamedTempFile::new_in(dir).map_err(failed)?;
        file.write_all(&self.to_bytes()?).map_err(failed)?;
        file.as_file().sync_all().map_err(failed)?;
        file.persist(path).map_err(|e| failed(e.error))?;
        Ok(())
    }

    /// Reads a file that [`save`](Calibration::save) wrote.
    ///
    /// # Errors
    /// [`Error::Read`]; [`Error::CalibrationFile`] for a file that is damaged, of another version, or of something else.
    pub fn load(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(|cause| Error::Read { path: path.into(), cause })?;
        Self::from_bytes(&bytes).map_err(|cause| Error::CalibrationFile { path: path.into(), cause })
    }

    /// What a file of it holds.
    ///
    /// # Errors
    /// [`CalibrationError::Json`] and [`CalibrationError::File`], which no calibration is known to bring about.
    pub fn to_bytes(&self) -> Result<Vec<u8>, CalibrationError> {
        let (layers, origin, plan) = (self.layers.len(), self.origin.clone(), self.plan.clone());
        let about = About { version: VERSION, layers, origin, plan };
        let about = serde_json::value::to_raw_value(&about).map_err(CalibrationError::Json)?;
        let mut tensors = BTreeMap::new();
        for (i, layer) in self.layers.iter().enumerate() {
            for (what, values) in [("shift", &layer.shift), ("scale", &layer.scale)] {
                let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
                tensors.insert(name(i, what), (vec![layer.kv_heads, layer.head_dim], bytes));
            }
        }
        let views = tensors.iter().map(|(name, (shape, bytes))| {
            let view = TensorView::new(Dtype::F32, shape.clone(), bytes).map_err(CalibrationError::File)?;
            Ok((name.clone(), view))
        });
        let views = views.collect::<Result<BTreeMap<_, _>, CalibrationError>>()?;
        file_of(&about, &views)
    }

    /// A calibration from what a file of it holds.
    ///
    /// # Errors
    /// A [`CalibrationError`] for bytes that are damaged, of another version, or of something else.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, CalibrationError> {
        let (_, header) = SafeTensors::read_metadata(bytes).map_err(CalibrationError::File)?;
        let entry = header.metadata().as_ref().and_then(|m| m.get(ENTRY));
        let entry = entry.ok_or(CalibrationError::Metadata { missing: ENTRY })?;
        let Entry { checksum: expected, about } = serde_json::from_str(entry).map_err(CalibrationError::Json)?;
        let about = about.get();
        let AnyVersion { version } = serde_json::from_str(about).map_err(CalibrationError::Json)?;
        if version != VERSION {
            return Err(CalibrationError::Version { got: version, expected: VERSION });
        }
        let file = SafeTensors::deserialize(bytes).map_err(CalibrationError::File)?;
        let mut tensors: BTreeMap<String, TensorView> = file.tensors().into_iter().collect();
        let got = checksum(about, &tensors);
        if got != expected {
            return Err(CalibrationError::Checksum { got, expected });
        }
        let About { layers: count, origin, plan, .. } = serde_json::from_str(about).map_err(CalibrationError::Json)?;
        // Not from the number in the file: nothing is allocated for layers that are not there.
        let mut layers = vec![];
        for i in 0..count {
            layers.push(take_layer(i, count, &mut tensors)?);
        }
        if let Some(got) = plan.as_ref().map(|plan| plan.layers.len()).filter(|&got| got != count) {
            return Err(CalibrationError::Layers { got, expected: count });
        }
        match tensors.into_keys().next() {
            Some(tensor) => Err(CalibrationError::UnexpectedTensor { tensor, layers: count }),
            None => Ok(Calibration { origin, layers, plan }),
        }
    }
}

/// A layer of `count`, taken out of the tensors.
fn take_layer(i: usize, count: usize, tensors: &mut BTreeMap<String, TensorView>) -> Result<Layer, CalibrationError> {
    let mut read = |what| {
        let tensor = name(i, what);
        let Some(view) = tensors.remove(&tensor) else {
            return Err(CalibrationError::MissingLayer { tensor, layers: count });
        };
        if view.dtype() != Dtype::F32 {
            return Err(CalibrationError::Dtype { tensor, got: view.dtype() });
        }
        let &[kv_heads, head_dim] = view.shape() else {
            let expected = "[kv_heads, head_dim]".to_owned();
            return Err(CalibrationError::Shape { tensor, got: view.shape().to_vec(), expected });
        };
        let values: Arc<[f32]> = view.data().as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect();
        Ok(([kv_heads, head_dim], values))
    };
    let ([kv_heads, head_dim], shift) = read("shift")?;
    let (got, scale) = read("scale")?;
    if got != [kv_heads, head_dim] {
        let expected = format!("[{kv_heads}, {head_dim}] as the shift");
        return Err(CalibrationError::Shape { tensor: name(i, "scale"), got: got.to_vec(), expected });
    }
    if let Some(&got) = shift.iter().find(|x| !x.is_finite()) {
        return Err(CalibrationError::Value { tensor: name(i, "shift"), got, expected: "finite numbers" });
    }
    if let Some(&got) = scale.iter().find(|x| !(**x > 0.0 && x.is_normal() && (1.0 / **x).is_normal())) {
        let expected = "positive numbers with a finite inverse";
        return Err(CalibrationError::Value { tensor: name(i, "scale"), got, expected });
    }
    Ok(Layer { kv_heads, head_dim, shift, scale })
}

/// A file that says this of these tensors.
fn file_of(about: &RawValue, views: &BTreeMap<String, TensorView>) -> Result<Vec<u8>, CalibrationError> {
    let entry = Entry { checksum: checksum(about.get(), views), about };
    let entry = serde_json::to_string(&entry).map_err(CalibrationError::Json)?;
    safetensors::serialize(views, Some(HashMap::from([(ENTRY.to_owned(), entry)]))).map_err(CalibrationError::File)
}

/// Of all that a file says.
fn checksum(about: &str, tensors: &BTreeMap<String, TensorView>) -> String {
    let mut hash = Xxh3Default::new();
    hash.update(about.as_bytes());
    for (name, view) in tensors {
        hash.update(format!("\n{name} {:?} {:?} ", view.dtype(), view.shape()).as_bytes());
        hash.update(view.data());
    }
    format!("xxh3-128:{:032x}", hash.digest128())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer_of(shift: f32) -> Layer {
        Layer { kv_heads: 1, head_dim: 4, shift: vec![shift; 4].into(), scale: vec![0.5; 4].into() }
    }

    fn calibration() -> Calibration {
        let origin = Origin { model: "xxh3-128:12".into(), texts: vec!["a \"text\".txt".into()], tokens: 77 };
        Calibration { origin, layers: vec![layer_of(-1.5), layer_of(2.5)], plan: None }
    }

    /// A file with a right checksum that says `about` and holds what `change` makes of a calibration's tensors.
    fn made(about: &str, change: impl FnOnce(&mut BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>)) -> Vec<u8> {
        let bytes = calibration().to_bytes().unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let own = |v: &TensorView| (v.dtype(), v.shape().to_vec(), v.data().to_vec());
        let mut tensors = file.tensors().iter().map(|(name, view)| (name.clone(), own(view))).collect();
        change(&mut tensors);
        let view = |(d, s, b): &'_ (Dtype, Vec<usize>, Vec<u8>)| (*d, s.clone(), b.clone());
        let owned: Vec<_> = tensors.iter().map(|(name, tensor)| (name.clone(), view(tensor))).collect();
        let views = owned.iter().map(|(name, (d, s, b))| (name.clone(), TensorView::new(*d, s.clone(), b).unwrap()));
        let views: BTreeMap<_, _> = views.collect();
        file_of(&RawValue::from_string(about.to_owned()).unwrap(), &views).unwrap()
    }

    const ABOUT_TWO: &str = r#"{"version":1,"layers":2,"origin":{"model":"m","texts":[],"tokens":1}}"#;

    fn error(bytes: &[u8]) -> CalibrationError {
        Calibration::from_bytes(bytes).unwrap_err()
    }

    #[test]
    fn what_is_written_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.calibration");
        calibration().save(&path).unwrap();
        assert!((0..20).all(|_| calibration().to_bytes().unwrap() == std::fs::read(&path).unwrap()));
        assert_eq!(Calibration::load(&path).unwrap(), calibration());
        let codec = "k4v4+s1f16".parse().unwrap();
        let layers = vec!["k4v3".parse().unwrap(), "k5v2".parse().unwrap()];
        let planned = calibration().with_plan(Plan { codec, layers, budget: 4.25, context: 2048 });
        planned.save(&path).unwrap();
        assert_eq!(Calibration::load(&path).unwrap(), planned);
        // In place of what was there, and with nothing left beside it.
        Calibration { layers: vec![layer_of(0.0)], ..calibration() }.save(&path).unwrap();
        assert_eq!(Calibration::load(&path).unwrap().layers(), 1);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
        assert!(matches!(calibration().save(&dir.path().join("no/x")), Err(Error::Write { .. })));
        assert!(matches!(Calibration::load(&dir.path().join("no/x")), Err(Error::Read { .. })));
    }

    #[test]
    fn every_damaged_byte_is_noticed() {
        let bytes = calibration().to_bytes().unwrap();
        for i in 0..bytes.len() {
            for bit in 0..8 {
                let mut damaged = bytes.clone();
                damaged[i] ^= 1 << bit;
                assert!(Calibration::from_bytes(&damaged).is_err(), "bit {bit} of byte {i}");
            }
            assert!(matches!(error(&bytes[..i]), CalibrationError::File(_)), "the first {i} bytes");
        }
        let mut damaged = bytes.clone();
        *damaged.last_mut().unwrap() ^= 1;
        assert!(matches!(error(&damaged), CalibrationError::Checksum { .. }));
        assert!(matches!(error(&[&bytes[..], b"x"].concat()), CalibrationError::File(_)));
    }

    #[test]
    fn each_rule_has_its_error() {
        assert!(Calibration::from_bytes(&made(ABOUT_TWO, |_| ())).is_ok());
        let no_metadata = safetensors::serialize(Vec::<(&str, TensorView)>::new(), None).unwrap();
        assert!(matches!(error(&no_metadata), CalibrationError::Metadata { missing: ENTRY }));
        let newer = ABOUT_TWO.replace("\"version\":1", "\"version\":2,\"new\":0");
        assert!(matches!(error(&made(&newer, |_| ())), CalibrationError::Version { got: 2, expected: 1 }));
        for other in ["[]", "{\"version\":1}", &ABOUT_TWO.replace("\"layers\"", "\"leaves\"")] {
            assert!(matches!(error(&made(other, |_| ())), CalibrationError::Json(_)), "{other}");
        }
        let planned = |layers: &str| {
            let plan = format!(r#","plan":{{"codec":"k4v4+s1f16","layers":[{layers}],"budget":4.25,"context":64}}}}"#);
            made(&format!("{}{plan}", &ABOUT_TWO[..ABOUT_TWO.len() - 1]), |_| ())
        };
        assert!(Calibration::from_bytes(&planned(r#""k4v3","k5v2""#)).unwrap().plan().is_some());
        assert!(matches!(error(&planned(r#""k4v3""#)), CalibrationError::Layers { got: 1, expected: 2 }));
        assert!(error(&planned(r#""k4v3","k9v3""#)).to_string().contains("k9v3"));
        for layers in ["3", "18446744073709551615"] {
            let more = ABOUT_TWO.replace("\"layers\":2", &format!("\"layers\":{layers}"));
            let error = error(&made(&more, |_| ()));
            assert!(matches!(&error, CalibrationError::MissingLayer { tensor, .. } if tensor == "layers.2.shift"));
        }
        let fewer = ABOUT_TWO.replace("\"layers\":2", "\"layers\":1");
        assert!(matches!(error(&made(&fewer, |_| ())), CalibrationError::UnexpectedTensor { layers: 1, .. }));
        let missing = error(&made(ABOUT_TWO, |t| drop(t.remove("layers.1.scale"))));
        assert_eq!(missing.to_string(), "tensor layers.1.scale is missing, expected 2 layers");
        let change = |name: &str, value: (Dtype, Vec<usize>, Vec<u8>)| {
            error(&made(ABOUT_TWO, |t| drop(t.insert(name.into(), value)))).to_string()
        };
        let words = change("layers.0.shift", (Dtype::F16, vec![1, 4], vec![0; 8]));
        assert_eq!(words, "tensor layers.0.shift is F16, expected F32");
        let words = change("layers.0.scale", (Dtype::F32, vec![4, 1], vec![0; 16]));
        assert_eq!(words, "tensor layers.0.scale has shape [4, 1], expected [1, 4] as the shift");
        let words = change("layers.0.shift", (Dtype::F32, vec![4], vec![0; 16]));
        assert_eq!(words, "tensor layers.0.shift has shape [4], expected [kv_heads, head_dim]");
        let values =
            |x: f32| (Dtype::F32, vec![1, 4], [1.0, 1.0, x, 1.0].into_iter().flat_map(f32::to_le_bytes).collect());
        for bad in [f32::NAN, f32::INFINITY] {
            assert!(change("layers.1.shift", values(bad)).ends_with("expected finite numbers"));
        }
        for bad in [f32::NAN, f32::INFINITY, 0.0, -1.0, 1e-45, f32::MAX] {
            assert!(change("layers.1.scale", values(bad)).contains("layers.1.scale holds"), "{bad}");
        }
    }

    #[test]
    fn it_is_for_its_model_alone() {
        let calibration = calibration();
        calibration.expect_model("xxh3-128:12").unwrap();
        let error = calibration.expect_model("xxh3-128:13").unwrap_err().to_string();
        assert_eq!(error, "calibration: made for the model xxh3-128:12, expected xxh3-128:13");
        let apply = |layers, kv_heads, head_dim| calibration.apply(tqkv::CacheConfig::new(layers, kv_heads, head_dim));
        let expected = tqkv::CacheConfig::new(2, 1, 4);
        let expected = expected.channels_at(0, vec![-1.5; 4], vec![0.5; 4]).channels_at(1, vec![2.5; 4], vec![0.5; 4]);
        assert_eq!(apply(2, 1, 4).unwrap(), expected);
        assert_eq!(apply(3, 1, 4).unwrap_err().to_string(), "calibration: 2 layers, expected 3");
        for (kv_heads, head_dim) in [(2, 4), (1, 8)] {
            let error = apply(2, kv_heads, head_dim).unwrap_err().to_string();
            assert!(error.contains("layers.0.shift has shape [1, 4]"), "{error}");
        }
    }
}
