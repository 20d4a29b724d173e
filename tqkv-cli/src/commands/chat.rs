//! `tqkv chat`

use crate::codecs::Choice;
use crate::language::{Drafter, Drafting, Drawing, Language, Report, Source};
use crate::session::Session;
use crate::{interrupt, output};
use anyhow::{Context, Result};
use serde::Serialize;
use std::io::{BufRead, IsTerminal, stdin};
use std::path::PathBuf;
use std::process::ExitCode;
use tqkv::Device;
use tqkv_candle::{ChatTemplate, Message, SequenceCache, fingerprint};

/// Holds a conversation with a model on a compressed cache: one message a line of standard input.
///
/// Ctrl-C ends the answer and the conversation; with --session it goes on from there the next time.
#[derive(clap::Args)]
pub struct Chat {
    #[command(flatten)]
    source: Source,
    /// What the model is told before the conversation
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Keep the conversation and its cache in this file, and go on with what it holds
    #[arg(long, value_name = "F")]
    session: Option<PathBuf>,
    /// Chat template in place of the model's
    #[arg(long, value_name = "FILE")]
    template: Option<PathBuf>,
    /// Tokens that the conversation may have in all [default: the model's context, at most 8192]
    #[arg(long, value_name = "N")]
    context: Option<usize>,
    #[command(flatten)]
    drafting: Drafting,
    #[command(flatten)]
    drawing: Drawing,
    /// Print one JSON object an answer instead of the text as it comes
    #[arg(long)]
    json: bool,
}

/// What a cache is made of.
struct CacheOf {
    device: Device,
    codec: Choice,
    room: usize,
}

/// A conversation and its cache.
struct Conversation {
    language: Language,
    template: ChatTemplate,
    cache: SequenceCache,
    remake: CacheOf,
    drafter: Option<Drafter>,
    /// What the drafter's cache belongs to.
    drafted: Vec<u32>,
    session: Session,
    /// Of the model, where there is a file to keep.
    model_id: String,
}

#[derive(Serialize)]
struct Turn<'a> {
    role: &'a str,
    #[serde(flatten)]
    report: &'a Report,
}

impl Chat {
    pub fn run(self) -> Result<ExitCode> {
        // Before the work, which may take long.
        self.drawing.check()?;
        if let Some(path) = &self.session {
            output::expect_replaceable(path)?;
        }
        let template = self
            .template
            .as_ref()
            .map(|path| std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display())));
        let template = template.transpose()?;
        let device = Device::open(&self.source.device)?;
        interrupt::watch()?;
        let mut language = Language::load(&self.source.model, self.source.calibration.as_deref())?;
        language.encoding = self.source.encode.into();
        if let Some(template) = template {
            language.vocabulary.set_chat_template(template);
        }
        let template = language.vocabulary.chat_template()?;
        let mut conversation = self.open(language, template, &device)?;
        self.talk(&mut conversation)?;
        Ok(ExitCode::SUCCESS)
    }

    /// A new conversation, or the one in the session's file.
    fn open(&self, mut language: Language, template: ChatTemplate, device: &Device) -> Result<Conversation> {
        let context = language.model.config().max_position_embeddings;
        let room = self.context.unwrap_or(8192).min(context);
        let model_id = if self.session.is_some() { fingerprint(&language.path)? } else { String::new() };
        let kept = self.session.as_deref().filter(|path| path.exists());
        let loaded = kept.map(Session::open).transpose()?;
        let codec = self.source.codec.or(loaded.as_ref().and_then(|(_, codec)| *codec));
        if let Some(center) = loaded.as_ref().map(|(session, _)| session.center()).transpose()?.flatten() {
            language.center_as(center);
        }
        let mut cache = language.cache(device, codec, room)?;
        if let Some(path) = kept {
            cache.load(path, model_id.as_bytes()).with_context(|| path.display().to_string())?;
        }
        let session = loaded.map_or_else(Session::default, |(session, _)| session);
        let drafter = self.drafting.load(&language, room)?;
        let remake = CacheOf { device: device.clone(), codec, room };
        let mut conversation =
            Conversation { language, template, cache, remake, drafter, drafted: vec![], session, model_id };
        if let Some(system) = self.system.as_deref().filter(|_| conversation.session.messages.is_empty()) {
            conversation.session.messages.push(message("system", system));
        }
        Ok(conversation)
    }

    fn talk(&self, conversation: &mut Conversation) -> Result<()> {
        let asks = stdin().is_terminal();
        let mut line = String::new();
        while !interrupt::requested() {
            if asks {
                output::ask("> ");
            }
            line.clear();
            let read = interrupt::idle(|| stdin().lock().read_line(&mut line)).context("cannot read standard input")?;
            if read == 0 {
                break;
            }
            if !line.trim().is_empty() {
                self.answer(conversation, line.trim_end_matches(['\r', '\n']))?;
            }
        }
        Ok(())
    }

    /// Says what the model answers, and keeps it.
    fn answer(&self, conversation: &mut Conversation, said: &str) -> Result<()> {
        let Conversation { language, template, cache, remake, drafter, drafted, session, model_id } = conversation;
        let mut messages = session.messages.clone();
        messages.push(message("user", said));
        let tokens = language.vocabulary.encode_chat(&template.render(&messages, true)?)?;
        if self.source.center.is_some() && language.center().is_none() {
            // The keys of all that has been said are those of the first prompt.
            language.center_on(&tokens)?;
            *cache = language.cache(&remake.device, remake.codec, remake.room)?;
        }
        keep_common(cache, &session.tokens, &tokens)?;
        if let Some(drafter) = drafter {
            keep_common(&mut drafter.cache, drafted, &tokens)?;
        }
        let decoder = language.vocabulary.decoder();
        let answer = language.go_on(cache, drafter.as_mut(), &tokens, &self.drawing, decoder, |piece| {
            if self.json { Ok(()) } else { output::print(piece) }
        })?;
        messages.push(message("assistant", &answer.report.text));
        drafted.clone_from(&answer.tokens);
        *session = Session::new(answer.tokens, messages).centered(language.center())?;
        if let Some(path) = &self.session {
            session.write(cache, path, model_id)?;
        }
        answer.emitted?;
        if self.json {
            return output::print_json(&Turn { role: "assistant", report: &answer.report });
        }
        output::print("\n")?;
        output::note(&answer.report.line());
        Ok(())
    }
}

/// Keeps the beginning of a cache that the new tokens have too, short of the last of them: its logits are needed. Templates
/// may write what was said before in another way once more is said.
fn keep_common(cache: &mut SequenceCache, old: &[u32], new: &[u32]) -> Result<()> {
    let common = old.iter().zip(new).take_while(|(a, b)| a == b).count();
    let keep = common.min(cache.tokens()?).min(new.len().saturating_sub(1));
    // A layer with a window may have dropped what the next token would see: then all runs again.
    if cache.truncate(keep).is_err() {
        cache.truncate(0)?;
    }
    Ok(())
}

fn message(role: &str, content: &str) -> Message {
    Message { role: role.into(), content: content.into() }
}
