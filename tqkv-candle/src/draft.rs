//! Speculative decoding: a small model that proposes what a large one checks.

use crate::cache::SequenceCache;
use crate::error::{Error, Result};
use crate::models::Model;
use crate::room;
use crate::sampling::Sampler;
use candle_core::IndexOp;
use tqkv::cache::RECENT_SLACK;

/// A small model that proposes tokens for [`generate_with_draft`](crate::generate_with_draft). Its tokens must stand for the same
/// text as the large model's, else little that it proposes is taken.
pub struct Draft<'a> {
    model: &'a Model,
    cache: &'a mut SequenceCache,
    tokens: usize,
    /// Made from the large model's when it is first needed.
    sampler: Option<Sampler>,
}

/// A proposed token, and what it was drawn from: tokens in order, with their probabilities.
pub(crate) struct Proposal {
    pub token: u32,
    pub distribution: Vec<(u32, f64)>,
}

impl<'a> Draft<'a> {
    /// `tokens` are proposed at a time. What `cache` holds must be a beginning of the text to come. Layers with a window should
    /// be kept whole in it: else it may have to begin anew where proposals are taken back.
    ///
    /// # Errors
    /// [`Error::DraftTokens`] unless 1 to [`RECENT_SLACK`], as many as a cache takes back without a trace.
    pub fn new(model: &'a Model, cache: &'a mut SequenceCache, tokens: usize) -> Result<Self> {
        match (1..=RECENT_SLACK).contains(&tokens) {
            true => Ok(Self { model, cache, tokens, sampler: None }),
            false => Err(Error::DraftTokens { got: tokens }),
        }
    }

    /// Runs all that is known but its last token, if there is room.
    pub(crate) fn read(&mut self, known: &[u32], chunk: usize) -> Result<()> {
        let end = known.len().saturating_sub(1);
        while self.can_run(known, 0)? && self.cache.tokens()? < end {
            let held = self.cache.tokens()?;
            self.model.forward(&known[held..end.min(held.saturating_add(chunk))], self.cache)?;
        }
        Ok(())
    }

    /// At most `most` tokens to follow what is known, drawn as `sampler` draws for `model`.
    pub(crate) fn propose(
        &mut self,
        known: &[u32],
        most: usize,
        sampler: &Sampler,
        model: &Model,
    ) -> Result<Vec<Proposal>> {
        self.keep(known.len().saturating_sub(1))?;
        let most = most.min(self.tokens);
        let mut proposals = Vec::with_capacity(most);
        if most == 0 || !self.can_run(known, most)? {
            return Ok(proposals);
        }
        let own = self.sampler.get_or_insert_with(|| sampler.for_drafts());
        own.see_what(sampler);
        // Numbers above are only one model's.
        let vocab_size = model.config().vocab_size.min(self.model.config().vocab_size);
        let mut new = known[self.cache.tokens()?..].to_vec();
        while proposals.len() < most {
            let hidden = self.model.forward(&new, self.cache)?;
            let logits = self.model.logits(&hidden.i(new.len() - 1..)?)?.flatten_all()?.to_vec1::<f32>()?;
            let Some(proposal) = own.propose(&logits[..vocab_size]) else { break };
            own.see(&[proposal.token]);
            new = vec![proposal.token];
            proposals.push(proposal);
        }
        Ok(proposals)
    }

    /// Forgets all after the first `tokens`.
    pub(crate) fn keep(&mut self, tokens: usize) -> Result<()> {
        if self.cache.tokens()? > tokens && self.cache.truncate(tokens).is_err() {
            // A layer with a window has dropped what the next token would see.
            self.cache.truncate(0)?;
        }
        Ok(())
    }

    /// Whether the model has these tokens, and room for them and some more.
    fn can_run(&self, known: &[u32], more: usize) -> Result<bool> {
        let config = self.model.config();
        let room = config.max_position_embeddings.min(room::positions(self.cache)?);
        let new = &known[self.cache.tokens()?.min(known.len())..];
        Ok(known.len().saturating_add(more) <= room && new.iter().all(|&token| (token as usize) < config.vocab_size))
    }
}
