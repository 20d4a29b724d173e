//! The instruction set that is used, chosen when the program runs.

#[cfg(target_arch = "x86_64")]
use super::avx2::Avx2;
#[cfg(target_arch = "x86_64")]
use super::avx512::Avx512;
#[cfg(target_arch = "aarch64")]
use super::neon::Neon;
use super::portable::Portable;
use super::token::{Job, Simd};
use crate::error::{Error, Result};

/// A token of one of this architecture's instruction sets.
#[derive(Clone, Copy)]
pub(in crate::backend::cpu) enum Isa {
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512),
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    #[cfg(target_arch = "aarch64")]
    Neon(Neon),
    Portable(Portable),
}

/// Names of this architecture's instruction sets and their tokens, if this processor has them: the best first.
fn all() -> Vec<(&'static str, Option<Isa>)> {
    vec![
        #[cfg(target_arch = "x86_64")]
        ("avx512", Avx512::new().map(Isa::Avx512)),
        #[cfg(target_arch = "x86_64")]
        ("avx2", Avx2::new().map(Isa::Avx2)),
        #[cfg(target_arch = "aarch64")]
        ("neon", Neon::new().map(Isa::Neon)),
        ("portable", Some(Isa::Portable(Portable))),
    ]
}

impl Isa {
    /// The best of this processor, or what the environment variable `TQKV_CPU` names.
    ///
    /// # Errors
    /// Those of [`Isa::named`].
    pub fn choose() -> Result<Self> {
        match std::env::var("TQKV_CPU") {
            Ok(name) => Isa::named(&name),
            Err(std::env::VarError::NotPresent) => Ok(Isa::available()[0]),
            Err(std::env::VarError::NotUnicode(name)) => Isa::named(&name.to_string_lossy()),
        }
    }

    /// The instruction set of this name; never another in its place.
    ///
    /// # Errors
    /// [`Error::DeviceUnavailable`] if there is none, or this processor lacks it.
    pub fn named(name: &str) -> Result<Self> {
        let unavailable = |reason| Error::DeviceUnavailable { device: format!("cpu with TQKV_CPU={name}"), reason };
        match all().into_iter().find(|(other, _)| *other == name) {
            Some((_, Some(isa))) => Ok(isa),
            Some(_) => Err(unavailable("this processor lacks these instructions".to_owned())),
            None => {
                let names: Vec<_> = all().into_iter().map(|(name, _)| name).collect();
                Err(unavailable(format!("expected one of {}", names.join(", "))))
            }
        }
    }

    /// Every instruction set of this processor, the best first.
    pub fn available() -> Vec<Self> {
        all().into_iter().filter_map(|(_, isa)| isa).collect()
    }

    /// What `TQKV_CPU` calls it.
    pub fn name(self) -> &'static str {
        match self {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512(_) => "avx512",
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2(_) => "avx2",
            #[cfg(target_arch = "aarch64")]
            Isa::Neon(_) => "neon",
            Isa::Portable(_) => "portable",
        }
    }

    /// Runs a job with these instructions.
    pub fn run<J: Job>(self, job: J) -> J::Output {
        match self {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512(isa) => isa.run(job),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2(isa) => isa.run(job),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon(isa) => isa.run(job),
            Isa::Portable(isa) => isa.run(job),
        }
    }
}
