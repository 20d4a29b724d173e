//! Rotary embeddings: by which angle each pair of a head's elements turns from one position to the next.

use super::config::value;
use crate::error::Result;

/// A rotary embedding.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Rope {
    /// How many elements at a head's beginning are rotated; even. Element i turns with element i + dim/2.
    pub dim: usize,
    /// Base of the frequencies.
    pub theta: f32,
    /// How they are rescaled.
    pub scaling: RopeScaling,
}

/// A rescaling of the rotary frequencies for contexts that are longer than those at first trained with.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum RopeScaling {
    /// None.
    None,
    /// All are divided by this.
    Linear {
        /// The divisor.
        factor: f32,
    },
    /// Llama 3's: long wavelengths are stretched, short ones kept, with a smooth transition between.
    Llama3 {
        /// How much the long wavelengths are stretched.
        factor: f32,
        /// Wavelengths above the original context divided by this are stretched fully.
        low_freq_factor: f32,
        /// Wavelengths below the original context divided by this are kept.
        high_freq_factor: f32,
        /// The context that the model was first trained at.
        original_context: usize,
    },
    /// YaRN (arXiv:2309.00071): pairs that turn often within the original context are kept, those that turn seldom are
    /// stretched.
    Yarn {
        /// How much they are stretched.
        factor: f32,
        /// The context that the model was first trained at.
        original_context: usize,
        /// Pairs that turn more often than this are kept.
        beta_fast: f32,
        /// Pairs that turn less often than this are stretched fully.
        beta_slow: f32,
        /// Whether the pairs at which the transition begins and ends are whole.
        truncate: bool,
        /// What sines and cosines are multiplied by.
        attention_factor: f32,
    },
    /// Each frequency has a divisor of its own (LongRoPE; the `rope_freqs` of GGUF's Llama 3).
    Divisors {
        /// One a pair.
        divisors: Vec<f32>,
        /// What sines and cosines are multiplied by.
        attention_factor: f32,
    },
}

impl Rope {
    /// Without rescaling.
    pub fn new(dim: usize, theta: f32) -> Self {
        Self { dim, theta, scaling: RopeScaling::None }
    }

    /// The angle that each pair of a head's elements turns by from one position to the next, computed in f32 as the
    /// models' authors do.
    pub fn inverse_frequencies(&self) -> Vec<f32> {
        let plain = (0..self.dim / 2).map(|i| 1.0 / self.theta.powf((2 * i) as f32 / self.dim as f32));
        match &self.scaling {
            RopeScaling::None => plain.collect(),
            RopeScaling::Linear { factor } => plain.map(|f| f / factor).collect(),
            &RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
                let original = original_context as f32;
                plain.map(|f| llama3(f, factor, low_freq_factor, high_freq_factor, original)).collect()
            }
            &RopeScaling::Yarn { factor, original_context, beta_fast, beta_slow, truncate, .. } => {
                let [low, high] = self.yarn_transition(original_context, beta_fast, beta_slow, truncate);
                let kept = |i: usize| 1.0 - ((i as f32 - low) / (high - low)).clamp(0.0, 1.0);
                plain.enumerate().map(|(i, f)| f / factor * (1.0 - kept(i)) + f * kept(i)).collect()
            }
            RopeScaling::Divisors { divisors, .. } => plain.zip(divisors).map(|(f, divisor)| f / divisor).collect(),
        }
    }

    /// What sines and cosines are multiplied by.
    pub fn attention_factor(&self) -> f32 {
        match self.scaling {
            RopeScaling::Yarn { attention_factor, .. } | RopeScaling::Divisors { attention_factor, .. } => {
                attention_factor
            }
            _ => 1.0,
        }
    }

    /// The pairs at which the transition begins and ends.
    fn yarn_transition(&self, original_context: usize, fast: f32, slow: f32, truncate: bool) -> [f32; 2] {
        let (dim, theta) = (self.dim as f64, f64::from(self.theta));
        // The pair that turns so often within the original context.
        let pair = |turns: f32| {
            dim * (original_context as f64 / (f64::from(turns) * 2.0 * std::f64::consts::PI)).ln() / (2.0 * theta.ln())
        };
        let (mut low, mut high) = (pair(fast), pair(slow));
        if truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        (low, high) = (low.max(0.0), high.min(dim - 1.0));
        if low == high {
            high += 0.001;
        }
        [low as f32, high as f32]
    }

    /// Fails for values that make no sense; `name` makes the field's full name.
    pub(crate) fn check(&self, name: impl Fn(&str) -> String) -> Result<()> {
        let above_0 = |field: &str, got: f32| match got.is_finite() && got > 0.0 {
            true => Ok(()),
            false => Err(value(&name(field), got, "a finite number above 0")),
        };
        let context = |got: usize| match got {
            0 => Err(value(&name("original_max_position_embeddings"), 0, "at least 1")),
            _ => Ok(()),
        };
        above_0("rope_theta", self.theta)?;
        match &self.scaling {
            RopeScaling::None => Ok(()),
            RopeScaling::Linear { factor } => above_0("factor", *factor),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
                above_0("factor", *factor)?;
                above_0("low_freq_factor", *low_freq_factor)?;
                above_0("high_freq_factor", *high_freq_factor)?;
                if high_freq_factor <= low_freq_factor {
                    let expected = format!("more than low_freq_factor ({low_freq_factor})");
                    return Err(value(&name("high_freq_factor"), high_freq_factor, expected));
                }
                context(*original_context)
            }
            RopeScaling::Yarn { factor, original_context, beta_fast, beta_slow, attention_factor, .. } => {
                above_0("factor", *factor)?;
                above_0("beta_fast", *beta_fast)?;
                above_0("beta_slow", *beta_slow)?;
                above_0("attention_factor", *attention_factor)?;
                context(*original_context)
            }
            RopeScaling::Divisors { divisors, attention_factor } => {
                if divisors.len() != self.dim / 2 {
                    let expected = format!("{} (one a pair)", self.dim / 2);
                    return Err(value(&name("short_factor"), format!("a list of {}", divisors.len()), expected));
                }
                for (i, &divisor) in divisors.iter().enumerate() {
                    above_0(&format!("short_factor[{i}]"), divisor)?;
                }
                above_0("attention_factor", *attention_factor)
            }
        }
    }
}

fn llama3(frequency: f32, factor: f32, low: f32, high: f32, original: f32) -> f32 {
    let wavelength = 2.0 * std::f32::consts::PI / frequency;
    if wavelength > original / low {
        frequency / factor
    } else if wavelength < original / high {
        frequency
    } else {
        let smooth = (original / wavelength - low) / (high - low);
        (1.0 - smooth) * frequency / factor + smooth * frequency
    }
}

/// YaRN's factor on sines and cosines where the files do not say one (its section 3.4).
pub(crate) fn yarn_attention_factor(factor: f32, mscale: Option<f32>, mscale_all_dim: Option<f32>) -> f32 {
    let scaled = |m: f32| if factor <= 1.0 { 1.0 } else { 0.1 * m * factor.ln() + 1.0 };
    match (mscale.filter(|&m| m != 0.0), mscale_all_dim.filter(|&m| m != 0.0)) {
        (Some(mscale), Some(all)) => scaled(mscale) / scaled(all),
        _ => scaled(1.0),
    }
}

/// LongRoPE's factor on sines and cosines where the files do not say one (arXiv:2402.13753).
pub(crate) fn longrope_attention_factor(factor: f32, original_context: usize) -> f32 {
    if factor <= 1.0 { 1.0 } else { (1.0 + factor.ln() / (original_context as f32).ln()).sqrt() }
}
