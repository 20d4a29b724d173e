//! Bytes to text as they arrive.

/// How many U+FFFD stand for a beginning of a character that does not go on.
#[derive(Clone, Copy, PartialEq)]
pub enum Replace {
    /// One for each of its bytes, as SentencePiece does.
    Byte,
    /// One, as [`String::from_utf8_lossy`] does.
    Sequence,
}

/// Holds back the bytes that may be the beginning of a character: three at most.
pub struct Utf8 {
    replace: Replace,
    held: Vec<u8>,
}

impl Utf8 {
    pub fn new(replace: Replace) -> Self {
        Self { replace, held: Vec::new() }
    }

    /// The text that `bytes` complete. What is no UTF-8 becomes U+FFFD.
    pub fn push(&mut self, bytes: &[u8]) -> String {
        self.held.extend(bytes);
        let (text, used) = self.decode(false);
        self.held.drain(..used);
        text
    }

    /// The text for what is held back when no more bytes come.
    pub fn finish(&mut self) -> String {
        let (text, _) = self.decode(true);
        self.held.clear();
        text
    }

    /// The text of the bytes held, and how many of them it stands for.
    fn decode(&self, end: bool) -> (String, usize) {
        let (mut text, mut used) = (String::new(), 0);
        for chunk in self.held.utf8_chunks() {
            text.push_str(chunk.valid());
            used += chunk.valid().len();
            let invalid = chunk.invalid();
            // Only the last chunk can be the beginning of a character.
            let incomplete = used + invalid.len() == self.held.len()
                && std::str::from_utf8(invalid).is_err_and(|e| e.error_len().is_none());
            if !invalid.is_empty() && (end || !incomplete) {
                let count = if self.replace == Replace::Byte { invalid.len() } else { 1 };
                text.extend(std::iter::repeat_n(char::REPLACEMENT_CHARACTER, count));
                used += invalid.len();
            }
        }
        (text, used)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_characters_come_at_once() {
        let text = "a\u{e9}\u{20ac}\u{1f600}b";
        let mut utf8 = Utf8::new(Replace::Sequence);
        let pieces: Vec<String> = text.bytes().map(|b| utf8.push(&[b])).collect();
        assert_eq!(pieces.concat(), text);
        assert!(pieces.iter().all(|p| p.chars().count() <= 1));
        assert_eq!(utf8.finish(), "");
    }

    #[test]
    fn what_is_no_utf8_is_replaced() {
        let bytes = b"a\xffb\xe2\x82c\xf0\x9f\x98";
        for (replace, expected) in [
            (Replace::Sequence, "a\u{fffd}b\u{fffd}c\u{fffd}"),
            (Replace::Byte, "a\u{fffd}b\u{fffd}\u{fffd}c\u{fffd}\u{fffd}\u{fffd}"),
        ] {
            let mut utf8 = Utf8::new(replace);
            let text: String = bytes.iter().map(|&b| utf8.push(&[b])).collect();
            assert_eq!(text + &utf8.finish(), expected);
        }
    }
}
