//! Chat templates: a conversation as one text.

use super::Tokenizer;
use super::contain::contain;
use crate::error::{Error, Result};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Value};
use minijinja::{Environment, ErrorKind};
use serde::{Deserialize, Serialize};
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};
use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::PathBuf;

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Message {
    /// Who speaks: usually "system", "user" or "assistant".
    pub role: String,
    /// What is said.
    pub content: String,
}

/// A model's chat template, in the dialect of Jinja that transformers has.
pub struct ChatTemplate {
    environment: Environment<'static>,
    /// `bos_token` and the like.
    tokens: BTreeMap<&'static str, String>,
    path: PathBuf,
}

/// Instructions that a template may take for one conversation, so that none runs forever.
const FUEL: u64 = 10_000_000;
const NAME: &str = "chat template";

impl Tokenizer {
    /// # Errors
    /// [`Error::NoChatTemplate`]; [`Error::ChatTemplate`] if it is no template.
    pub(super) fn chat_template(&self) -> Result<ChatTemplate> {
        let Some(source) = self.chat_template.clone() else {
            return Err(Error::NoChatTemplate { path: self.path.clone() });
        };
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|e| self.bad_template(cause(&e)))?);
        environment.set_fuel(Some(FUEL));
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |message: String| -> Result<Value, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_filter("tojson", to_json);
        contain(|| environment.add_template_owned(NAME, source).map_err(|e| cause(&e)))
            .and_then(|result| result)
            .map_err(|message| self.bad_template(message))?;
        Ok(ChatTemplate { environment, tokens: self.names.clone(), path: self.path.clone() })
    }

    fn bad_template(&self, message: String) -> Error {
        Error::ChatTemplate { path: self.path.clone(), message }
    }
}

impl ChatTemplate {
    /// The text of a conversation; with `answer`, up to where the assistant's next turn begins.
    ///
    /// # Errors
    /// [`Error::ChatTemplate`] if the template fails, or refuses the conversation: some want turns of user and assistant in
    /// turn, or no system's.
    pub fn render(&self, messages: &[Message], answer: bool) -> Result<String> {
        let message = |m: &Message| Value::from_pairs([("role", m.role.clone()), ("content", m.content.clone())]);
        let messages: Vec<Value> = messages.iter().map(message).collect();
        let fixed = [
            ("messages", Value::from(messages)),
            ("add_generation_prompt", answer.into()),
            ("tools", ().into()),
            ("documents", ().into()),
        ];
        let tokens = self.tokens.iter().map(|(&name, token)| (name, token.clone().into()));
        let values = Value::from_pairs(fixed.into_iter().chain(tokens));
        let render = || self.environment.get_template(NAME).and_then(|t| t.render(values)).map_err(|e| cause(&e));
        contain(render)
            .and_then(|result| result)
            .map_err(|message| Error::ChatTemplate { path: self.path.clone(), message })
    }
}

/// What went wrong, without the template's text.
fn cause(error: &minijinja::Error) -> String {
    let line = error.line().map_or(String::new(), |line| format!(" (line {line})"));
    format!("{}{line}", error.detail().map_or(error.kind().to_string(), str::to_owned))
}

/// As Python's `json.dumps` writes, which transformers puts in place of Jinja's.
fn to_json(value: Value, options: Kwargs) -> Result<String, minijinja::Error> {
    let indent: Option<usize> = options.get("indent")?;
    // What else there is changes nothing here, or is not used by templates.
    let _: (Option<bool>, Option<Value>) = (options.get("ensure_ascii")?, options.get("separators")?);
    let failed = |e: serde_json::Error| minijinja::Error::new(ErrorKind::BadSerialization, e.to_string());
    let mut text = Vec::new();
    match indent {
        None => value.serialize(&mut Serializer::with_formatter(&mut text, Spaced)).map_err(failed)?,
        Some(indent) => {
            let indent = " ".repeat(indent.min(16));
            let formatter = PrettyFormatter::with_indent(indent.as_bytes());
            value.serialize(&mut Serializer::with_formatter(&mut text, formatter)).map_err(failed)?;
        }
    }
    Ok(String::from_utf8_lossy(&text).into_owned())
}

/// A space after each comma and colon.
struct Spaced;

impl Formatter for Spaced {
    fn begin_array_value<W: ?Sized + Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        out.write_all(b": ")
    }
}
