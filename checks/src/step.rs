//! What may happen to a cache, drawn from bytes.

use arbitrary::{Result, Unstructured};

/// How tokens are appended.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum How {
    /// With `append`, layer by layer.
    ByLayer,
    /// As a step.
    Step,
    /// As a step that is dropped after so many layers, submitted or not.
    Abandoned(usize, bool),
    /// As a step that is recorded once and run so many times.
    Replay(usize),
}

/// One thing that happens to a cache. Sequences are numbers that a model takes modulo those it has.
#[derive(Clone, Debug, PartialEq)]
pub enum Step {
    /// A new sequence.
    Add,
    /// New tokens for some sequences at once: which, and how many.
    Append(Vec<(usize, usize)>, How),
    /// Queries of some sequences at once, each at so many of its newest positions.
    Attend(Vec<(usize, usize)>),
    /// A twin of a sequence.
    Fork(usize),
    /// So many tokens are taken back.
    Truncate(usize, usize),
    /// The end of a sequence.
    Free(usize),
    /// All positions are decoded.
    Check(usize),
    /// A sequence without so many tokens, or everything, is written aside.
    Save(Option<(usize, usize)>),
    /// What was written last comes back beside what is there.
    Load,
}

impl Step {
    /// The next step, for a cache of so many layers.
    ///
    /// # Errors
    /// None but those of `arbitrary`, which gives zeros where the bytes are at their end.
    pub fn draw(u: &mut Unstructured, layers: usize) -> Result<Step> {
        Ok(match u.int_in_range(0..=23)? {
            0..=7 => {
                let tokens = some(u, 3, 19)?;
                let how = match u.int_in_range(0..=9)? {
                    0..=2 => How::ByLayer,
                    3..=5 => How::Step,
                    6..=7 => How::Replay(u.int_in_range(1..=3)?),
                    _ => How::Abandoned(u.int_in_range(0..=layers)?, u.arbitrary()?),
                };
                Step::Append(tokens, how)
            }
            8..=10 => Step::Attend(some(u, 2, 6)?),
            11..=12 => Step::Fork(sequence(u)?),
            13..=15 => Step::Truncate(sequence(u)?, back(u)?),
            16 => Step::Free(sequence(u)?),
            17 => Step::Check(sequence(u)?),
            18..=19 => Step::Save(if u.ratio(2, 3)? { Some((sequence(u)?, back(u)?)) } else { None }),
            20..=21 => Step::Load,
            _ => Step::Add,
        })
    }
}

fn sequence(u: &mut Unstructured) -> Result<usize> {
    u.int_in_range(0..=255)
}

/// Some sequences, each with a number.
fn some(u: &mut Unstructured, sequences: usize, most: usize) -> Result<Vec<(usize, usize)>> {
    let n = u.int_in_range(1..=sequences)?;
    (0..n).map(|_| Ok((sequence(u)?, u.int_in_range(0..=most)?))).collect()
}

/// How many tokens are taken back: a few, or all.
fn back(u: &mut Unstructured) -> Result<usize> {
    Ok(match u.int_in_range(0..=31)? {
        31 => usize::MAX,
        30 => 90,
        n => n,
    })
}
