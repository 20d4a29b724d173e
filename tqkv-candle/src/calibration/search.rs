//! Bits by layer and side, and what is kept besides, for a budget: found by measuring.

use super::plan::Plan;
use super::{Calibration, CalibrationError};
use crate::cache::SequenceCache;
use crate::error::Result;
use crate::eval::{Windows, evaluate};
use crate::models::Model;
use std::ops::ControlFlow;
use tqkv::cache::CacheCodec;
use tqkv::{CacheConfig, Codec, CodecPair, Device};

/// What is tried besides the positions' own codecs.
const BESIDES: [&str; 4] = ["", "+s1f16", "+s1f16+r16k8v8", "+s1f16+r64k8v8"];

/// Squared errors of the native codecs with 2 to 8 bits (Lloyd and Max, of a Gaussian of variance 1).
const ERRORS: [f64; 7] = [0.1175, 0.03454, 0.009497, 0.002499, 0.000644, 0.000164, 0.0000417];

/// Bits at which a layer's share in the divergence is measured, all else in f16.
const PROBED: u8 = 3;
const BESIDES_PROBED: &str = "+s1f16+r16f16";

/// Caches that are compared with one run of the reference.
const BATCH: usize = 6;

/// A search for the bits of a cache.
pub struct Search<'a> {
    /// The model.
    pub model: &'a Model,
    /// Its calibration.
    pub calibration: &'a Calibration,
    /// Text that what keeps to the budget is compared with: other than what was calibrated with, or its results will look too
    /// good.
    pub windows: &'a Windows,
    /// Text that the share of each layer is measured with; less of it will do.
    pub probes: &'a Windows,
    /// Bits an element, all counted, at most.
    pub budget: f64,
    /// Positions of the sequences that the budget is for.
    pub context: usize,
}

/// Something that was tried.
#[derive(Debug, Clone, PartialEq)]
pub struct Tried {
    /// What.
    pub name: String,
    /// What it is.
    pub plan: Plan,
    /// Bits an element at the budget's context.
    pub bits: f64,
    /// Mean divergence of a token, in nats.
    pub kld: f64,
}

impl Search<'_> {
    /// All that was tried, the best first; none if `on_run` says that this is enough. It is called after each run of the model
    /// over the windows with the number done and the number of all.
    ///
    /// # Errors
    /// [`tqkv::Error::Zero`] for a context of 0, [`CalibrationError::Budget`] if not even 2 bits keep to the budget; those of
    /// [`evaluate`].
    pub fn run(&self, mut on_run: impl FnMut(usize, usize) -> ControlFlow<()>) -> Result<Option<Vec<Tried>>> {
        if self.context == 0 {
            return Err(tqkv::Error::Zero { what: "context" }.into());
        }
        let least = self.plan(BESIDES[0], vec![2; 2 * self.calibration.layers()])?;
        let expected = self.bits(&least)?;
        if expected > self.budget || self.budget.is_nan() {
            return Err(CalibrationError::Budget { got: self.budget, expected }.into());
        }
        let probes = self.probe_plans()?;
        // As many candidates at most as are made of each kind of what is kept besides.
        let (mut done, all) = (0, probes.len() + 3 * BESIDES.len());
        let mut measure = |plans: &[Plan], windows: &Windows| -> Result<Option<Vec<f64>>> {
            let mut results = vec![];
            for batch in plans.chunks(BATCH) {
                results.extend(self.measure(batch, windows)?);
                done += batch.len();
                if on_run(done, all).is_break() {
                    return Ok(None);
                }
            }
            Ok(Some(results))
        };
        let Some(shares) = measure(&probes, self.probes)? else { return Ok(None) };
        let mut candidates = vec![];
        for besides in BESIDES {
            candidates.extend(self.candidates(besides, &shares)?);
        }
        let plans: Vec<Plan> = candidates.iter().map(|(_, plan)| plan.clone()).collect();
        let Some(results) = measure(&plans, self.windows)? else { return Ok(None) };
        let tried = candidates.into_iter().zip(results).map(|((name, plan), kld)| {
            let bits = self.bits(&plan)?;
            Ok(Tried { name, plan, bits, kld })
        });
        let mut tried = tried.collect::<Result<Vec<_>>>()?;
        tried.sort_by(|a, b| a.kld.total_cmp(&b.kld));
        Ok(Some(tried))
    }

    /// For each layer and side a plan that stores all else in f16.
    fn probe_plans(&self) -> Result<Vec<Plan>> {
        let layers = self.calibration.layers();
        let probe = |probed: usize| {
            let mut plan = self.plan(BESIDES_PROBED, vec![16; 2 * layers])?;
            let layer = &mut plan.layers[probed / 2];
            *if probed.is_multiple_of(2) { &mut layer.key } else { &mut layer.value } = Codec::tq(PROBED);
            Ok(plan)
        };
        (0..2 * layers).map(probe).collect()
    }

    /// What keeps to the budget with this besides: bits by layer and side, and the same bits everywhere, shared evenly and with
    /// more for keys.
    fn candidates(&self, besides: &str, shares: &[f64]) -> Result<Vec<(String, Plan)>> {
        let mut found = vec![];
        let mut add = |name: String, plan: Plan| -> Result<()> {
            if self.bits(&plan)? <= self.budget {
                found.push((name, plan));
            }
            Ok(())
        };
        let by_layer = self.by_layer(besides, shares)?;
        add(format!("by layer{besides}"), by_layer)?;
        let mut pairs: Vec<(u8, u8)> = (2..=8).flat_map(|k| (2..=k).map(move |v| (k, v))).collect();
        // The most bits first; of as many, the most even.
        pairs.sort_by_key(|&(k, v)| (std::cmp::Reverse(k + v), k - v));
        let uniform = |(k, v): (u8, u8)| self.plan(besides, [k, v].repeat(self.calibration.layers()));
        let mut fitting = 0;
        for pair in pairs {
            let plan = uniform(pair)?;
            if fitting < 2 && self.bits(&plan)? <= self.budget {
                fitting += 1;
                add(format!("k{}v{}{besides}", pair.0, pair.1), plan)?;
            }
        }
        Ok(found)
    }

    /// From 2 bits everywhere on, one bit more where it takes most of the divergence for what it costs, while there is budget.
    fn by_layer(&self, besides: &str, shares: &[f64]) -> Result<Plan> {
        let mut bits = vec![2u8; shares.len()];
        let costs: Vec<f64> = (0..shares.len()).map(|i| self.cost(i / 2)).collect();
        let gain = |i: usize, b: u8| {
            let [now, then] = [b, b + 1].map(|b| ERRORS[usize::from(b) - 2]);
            shares[i].max(0.0) * (now - then) / ERRORS[usize::from(PROBED) - 2] / costs[i]
        };
        let mut full = vec![false; shares.len()];
        loop {
            let open = (0..shares.len()).filter(|&i| !full[i] && bits[i] < 8);
            let Some(next) = open.max_by(|&a, &b| gain(a, bits[a]).total_cmp(&gain(b, bits[b]))) else { break };
            bits[next] += 1;
            if self.bits(&self.plan(besides, bits.clone())?)? > self.budget {
                bits[next] -= 1;
                full[next] = true;
            }
        }
        self.plan(besides, bits)
    }

    /// Elements of one side that a layer holds, in those of a whole context.
    fn cost(&self, layer: usize) -> f64 {
        let config = self.model.config();
        let held = config.windows.get(layer).copied().flatten().map_or(self.context, |w| w.min(self.context));
        held as f64 / self.context as f64
    }

    /// `bits` of keys and values, layer by layer; 16 for f16.
    fn plan(&self, besides: &str, bits: Vec<u8>) -> Result<Plan> {
        let codec = |bits: u8| if bits == 16 { Codec::F16 } else { Codec::tq(bits) };
        let layers = bits.as_chunks().0.iter().map(|&[k, v]| CodecPair { key: codec(k), value: codec(v) });
        let codec: CacheCodec = format!("k4v4{besides}").parse()?;
        Ok(Plan { codec, layers: layers.collect(), budget: self.budget, context: self.context })
    }

    /// Bits an element of a plan, all counted.
    fn bits(&self, plan: &Plan) -> Result<f64> {
        Ok(plan.apply(self.config(self.context))?.bits_per_element(self.context)?)
    }

    fn config(&self, positions: usize) -> CacheConfig {
        self.model.config().cache_config_for(1, positions, positions)
    }

    /// Mean divergences with these plans.
    fn measure(&self, plans: &[Plan], windows: &Windows) -> Result<Vec<f64>> {
        let length = windows.run_length();
        let cache = |config| SequenceCache::new(&Device::cpu(), config);
        let mut caches = vec![];
        for plan in plans {
            caches.push(cache(self.calibration.apply(plan.apply(self.config(length))?)?)?);
        }
        let mut reference = cache(self.config(length).codec(CodecPair::both(Codec::F32)))?;
        let (_, results) = evaluate(self.model, &mut reference, &mut caches, windows, length, |_| ())?;
        Ok(results.iter().map(|result| result.kld()).collect())
    }
}
