//! Tokenizers out of the metadata of GGUF files.

use super::contain::contain;
use super::{Tokenizer, Vocabulary, failed};
use crate::error::{Error, Result};
use crate::models::Metadata;
use std::collections::HashMap;
use std::path::Path;
use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::fuse::Fuse;
use tokenizers::decoders::sequence::Sequence as Decoders;
use tokenizers::decoders::strip::Strip;
use tokenizers::models::bpe::{BPE, Merges, Vocab};
use tokenizers::normalizers::{NFC, Prepend, Replace, Sequence as Normalizers};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence as PreTokenizers;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, SplitDelimiterBehavior, Tokenizer as HfTokenizer};

/// What a GGUF file says about its tokenizer: the values of `tokenizer.ggml.…`.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GgufTokenizer {
    /// `model`: "gpt2" for byte-level BPE, "llama" for SentencePiece's BPE.
    pub model: String,
    /// `pre`: how byte-level BPE cuts a text into words.
    pub pre: Option<String>,
    /// `tokens`: the strings, by token.
    pub tokens: Vec<String>,
    /// `scores`, by token: of two merges SentencePiece makes that with the higher one.
    pub scores: Option<Vec<f32>>,
    /// `token_type`, by token: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte.
    pub token_types: Option<Vec<i32>>,
    /// `merges`, the earliest first: two strings with a space between.
    pub merges: Option<Vec<String>>,
    /// `bos_token_id`: starts a text.
    pub bos: Option<u32>,
    /// `eos_token_id`: ends a text.
    pub eos: Option<u32>,
    /// `unknown_token_id`: stands for what has no token.
    pub unk: Option<u32>,
    /// `padding_token_id`.
    pub pad: Option<u32>,
    /// `add_bos_token`: whether a prompt begins with `bos`.
    pub add_bos: Option<bool>,
    /// `add_eos_token`: whether a prompt ends with `eos`.
    pub add_eos: Option<bool>,
    /// `add_space_prefix`: whether a text gets a space before it.
    pub add_space_prefix: Option<bool>,
    /// `tokenizer.chat_template`.
    pub chat_template: Option<String>,
}

const NORMAL: i32 = 1;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;

/// SentencePiece's space.
const SPACE: &str = "\u{2581}";

impl Vocabulary {
    /// The vocabulary of a GGUF file; `path` is for messages.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] for a `model` or `pre` that is not supported, and for values that do not fit
    /// together.
    pub fn from_gguf(gguf: GgufTokenizer, path: &Path) -> Result<Self> {
        let fail = |message| failed(path, message);
        gguf.check().map_err(fail)?;
        let is_byte_level = gguf.model == "gpt2";
        let add_bos = gguf.add_bos.unwrap_or(if is_byte_level { gguf.cut().map_err(fail)?.add_bos } else { true });
        let inner = contain(|| if is_byte_level { gguf.byte_level() } else { gguf.sentence_piece() })
            .map_err(|message| fail(format!("the tokenizers crate panics: {message}")))?
            .map_err(fail)?;
        let mut tokenizer = Tokenizer::new(inner, path)?;
        tokenizer.start = gguf.bos.filter(|_| add_bos);
        tokenizer.end = gguf.eos.filter(|_| gguf.add_eos == Some(true));
        let names =
            [("bos_token", gguf.bos), ("eos_token", gguf.eos), ("unk_token", gguf.unk), ("pad_token", gguf.pad)];
        let string = |(name, token): (_, Option<u32>)| Some((name, gguf.tokens[token? as usize].clone()));
        tokenizer.names = names.into_iter().filter_map(string).collect();
        tokenizer.chat_template = gguf.chat_template;
        Ok(Self::Tokenizer(Box::new(tokenizer)))
    }
}

impl GgufTokenizer {
    /// What a file's metadata says.
    ///
    /// # Errors
    /// [`Error::MissingField`] without a `model` or `tokens`, [`Error::FieldType`] for values of other types.
    pub fn new(metadata: &Metadata) -> Result<Self> {
        let missing = |field: &str| Error::MissingField {
            path: metadata.path().into(),
            field: format!("tokenizer.ggml.{field}"),
        };
        let key = |name: &str| format!("tokenizer.ggml.{name}");
        let text = |name: &str| Ok::<_, Error>(metadata.text(&key(name))?.map(String::from));
        let texts = |name: &str| Ok::<_, Error>(metadata.texts(&key(name))?.map(<[String]>::to_vec));
        let token = |name: &str| metadata.token(&key(&format!("{name}_token_id")));
        let scores = metadata.numbers(&key("scores"))?;
        let types = metadata.integers(&key("token_type"))?;
        Ok(Self {
            model: text("model")?.ok_or_else(|| missing("model"))?,
            pre: text("pre")?,
            tokens: texts("tokens")?.ok_or_else(|| missing("tokens"))?,
            scores: scores.map(|scores| scores.iter().map(|&score| score as f32).collect()),
            // Kinds that do not exist are none of those that matter.
            token_types: types.map(|types| types.iter().map(|&kind| kind.try_into().unwrap_or(NORMAL)).collect()),
            merges: texts("merges")?,
            bos: token("bos")?,
            eos: token("eos")?,
            unk: token("unknown")?,
            pad: token("padding")?,
            add_bos: metadata.flag(&key("add_bos_token"))?,
            add_eos: metadata.flag(&key("add_eos_token"))?,
            add_space_prefix: metadata.flag(&key("add_space_prefix"))?,
            chat_template: metadata.text("tokenizer.chat_template")?.map(String::from),
        })
    }

    fn check(&self) -> Result<(), String> {
        let expected = self.tokens.len();
        if !["gpt2", "llama"].contains(&&*self.model) {
            return Err(format!(
                "tokenizer.ggml.model is {:?}, but only \"gpt2\" and \"llama\" are supported",
                self.model
            ));
        }
        if expected == 0 || u32::try_from(expected).is_err() {
            return Err(format!("tokenizer.ggml.tokens has {expected} values, expected 1 to 2^32 - 1"));
        }
        let lengths =
            [("scores", self.scores.as_ref().map(Vec::len)), ("token_type", self.token_types.as_ref().map(Vec::len))];
        for (name, got) in lengths {
            if let Some(got) = got.filter(|&got| got != expected) {
                return Err(format!("tokenizer.ggml.{name} has {got} values, expected {expected}, one a token"));
            }
        }
        for (name, id) in [("bos", self.bos), ("eos", self.eos), ("unknown", self.unk), ("padding", self.pad)] {
            if let Some(got) = id.filter(|&id| id as usize >= expected) {
                return Err(format!("tokenizer.ggml.{name}_token_id is {got}, expected less than {expected}"));
            }
        }
        for (name, add, id) in [("bos", self.add_bos, self.bos), ("eos", self.add_eos, self.eos)] {
            if add == Some(true) && id.is_none() {
                return Err(format!("tokenizer.ggml.add_{name}_token is true, but there is no {name}_token_id"));
            }
        }
        if self.model == "gpt2" && self.add_space_prefix == Some(true) {
            return Err("tokenizer.ggml.add_space_prefix is true, but with \"gpt2\" only false is supported".into());
        }
        let needed =
            if self.model == "gpt2" { ("merges", self.merges.is_some()) } else { ("scores", self.scores.is_some()) };
        match needed {
            (name, false) => Err(format!("tokenizer.ggml.{name} is missing")),
            (_, true) => Ok(()),
        }
    }

    fn kind(&self, token: usize) -> i32 {
        self.token_types.as_ref().map_or(NORMAL, |types| types[token])
    }

    /// Tokens by string; of equal strings the first counts.
    fn vocab(&self, strings: &[String]) -> Vocab {
        let mut vocab = Vocab::default();
        for (token, string) in (0..).zip(strings) {
            vocab.entry(string.clone()).or_insert(token);
        }
        vocab
    }

    /// Tokens that stand for themselves wherever they stand in a text: control tokens, which have no text, and user-defined
    /// ones.
    fn added(&self, strings: &[String]) -> Vec<AddedToken> {
        let added =
            strings.iter().enumerate().filter(|&(token, _)| [CONTROL, USER_DEFINED].contains(&self.kind(token)));
        // Those with spaces are looked for after spaces were replaced.
        added
            .map(|(token, string)| {
                AddedToken::from(string.clone(), self.kind(token) == CONTROL).normalized(string.contains(SPACE))
            })
            .collect()
    }

    /// Byte-level BPE.
    fn byte_level(&self) -> Result<HfTokenizer, String> {
        let Cut { patterns, nfc, ignore_merges, .. } = self.cut()?;
        let merges = self.merges.iter().flatten().map(|merge| {
            let parts = merge.split_once(' ').ok_or_else(|| format!("merge {merge:?}: expected two strings"))?;
            Ok((parts.0.to_owned(), parts.1.to_owned()))
        });
        let merges = merges.collect::<Result<Merges, String>>()?;
        let vocab = self.vocab(&self.tokens);
        // The crate below panics at one that is longer than every token.
        let missing = merges.iter().find(|(a, b)| !vocab.contains_key(&format!("{a}{b}")));
        if let Some((a, b)) = missing {
            return Err(format!("merge \"{a} {b}\": what it gives is no token"));
        }
        let bpe = BPE::builder().vocab_and_merges(vocab, merges).ignore_merges(ignore_merges);
        let mut tokenizer = HfTokenizer::new(bpe.build().map_err(text)?);

        let mut steps = Vec::new();
        for pattern in patterns {
            let pattern = SplitPattern::Regex((*pattern).to_owned());
            steps.push(Split::new(pattern, SplitDelimiterBehavior::Isolated, false).map_err(text)?.into());
        }
        steps.push(ByteLevel::new(false, true, false).into());
        if nfc {
            tokenizer.with_normalizer(Some(NFC)).map_err(text)?;
        }
        tokenizer.with_pre_tokenizer(Some(PreTokenizers::new(steps)));
        tokenizer.with_decoder(Some(ByteLevel::default()));
        tokenizer.add_tokens(self.added(&self.tokens)).map_err(text)?;
        Ok(tokenizer)
    }

    /// SentencePiece's BPE, as Hugging Face's conversion has it.
    fn sentence_piece(&self) -> Result<HfTokenizer, String> {
        // GGUF files have user-defined tokens with plain spaces.
        let string = |(token, string): (usize, &String)| {
            if self.kind(token) == USER_DEFINED { string.replace(' ', SPACE) } else { string.clone() }
        };
        let strings: Vec<String> = self.tokens.iter().enumerate().map(string).collect();
        let mut bpe = BPE::builder()
            .vocab_and_merges(self.vocab(&strings), self.merges_by_score(&strings))
            .fuse_unk(true)
            .byte_fallback(true);
        if let Some(unk) = self.unk {
            bpe = bpe.unk_token(strings[unk as usize].clone());
        }
        let mut tokenizer = HfTokenizer::new(bpe.build().map_err(text)?);

        let prefix = self.add_space_prefix.unwrap_or(true);
        let replace = Replace::new(" ".to_owned(), SPACE).map_err(text)?;
        let steps = prefix.then(|| Prepend::new(SPACE.to_owned()).into()).into_iter().chain([replace.into()]);
        tokenizer.with_normalizer(Some(Normalizers::new(steps.collect()))).map_err(text)?;
        let replace = Replace::new(SPACE.to_owned(), " ").map_err(text)?;
        let mut steps = vec![replace.into(), ByteFallback::new().into(), Fuse::new().into()];
        if prefix {
            steps.push(Strip::new(' ', 1, 0).into());
        }
        tokenizer.with_decoder(Some(Decoders::new(steps)));
        tokenizer.add_tokens(self.added(&strings)).map_err(text)?;
        Ok(tokenizer)
    }

    /// The merges that scores stand for: every way to make a token of two others, the highest score first.
    fn merges_by_score(&self, strings: &[String]) -> Merges {
        struct Merge<'a> {
            score: f32,
            characters: (usize, usize),
            parts: (&'a str, &'a str),
        }
        let tokens: HashMap<&str, usize> =
            strings.iter().enumerate().filter(|&(t, _)| self.kind(t) == NORMAL).map(|(t, s)| (&**s, t)).collect();
        let mut merges = Vec::new();
        for (token, string) in strings.iter().enumerate().filter(|&(t, _)| self.kind(t) == NORMAL) {
            let score = self.scores.as_ref().map_or(0.0, |scores| scores[token]);
            let first = merges.len();
            let count = string.chars().count();
            for (n, (at, _)) in string.char_indices().enumerate().skip(1) {
                let parts = string.split_at(at);
                if tokens.contains_key(parts.0) && tokens.contains_key(parts.1) {
                    merges.push(Merge { score, characters: (n, count - n), parts });
                }
            }
            merges[first..].sort_by_key(|m| (tokens[m.parts.0], tokens[m.parts.1]));
        }
        // Hugging Face's order.
        merges.sort_by(|a, b| b.score.total_cmp(&a.score).then(b.characters.cmp(&a.characters)));
        merges.into_iter().map(|m| (m.parts.0.to_owned(), m.parts.1.to_owned())).collect()
    }

    /// What `pre` stands for.
    fn cut(&self) -> Result<Cut, String> {
        let plain = |patterns| Cut { patterns, nfc: false, ignore_merges: false, add_bos: false };
        Ok(match self.pre.as_deref().unwrap_or("default") {
            "default" => plain(&[PUNCTUATION, GPT2, r"\p{N}+", "[0-9][0-9][0-9]"]),
            "gpt-2" | "phi-2" | "olmo" | "mpt" => plain(&[GPT2]),
            "smollm" | "starcoder" | "refact" | "command-r" => plain(&[r"\p{N}", GPT2]),
            "llama3" | "llama-v3" | "llama-bpe" => {
                Cut { patterns: &[LLAMA3], nfc: false, ignore_merges: true, add_bos: true }
            }
            "dbrx" | "smaug-bpe" => plain(&[LLAMA3]),
            "qwen2" | "deepseek-r1-qwen" => Cut { nfc: true, ..plain(&[QWEN2]) },
            "tekken" => Cut { ignore_merges: true, ..plain(&[TEKKEN]) },
            "gpt-4o" | "llama4" => plain(&[GPT4O]),
            other => return Err(format!("tokenizer.ggml.pre is {other:?}, which is not supported")),
        })
    }
}

/// How byte-level BPE cuts a text into words.
struct Cut {
    /// What matches is cut out, by one pattern after the other.
    patterns: &'static [&'static str],
    /// Whether characters are composed first.
    nfc: bool,
    /// Whether a word that is a token is not merged from its parts.
    ignore_merges: bool,
    /// Whether a prompt begins with the start token unless the file says otherwise.
    add_bos: bool,
}

const PUNCTUATION: &str = r"[\p{P}\$\+<=>\^~\|]+";
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

fn text(error: impl ToString) -> String {
    error.to_string()
}
