//! GGUF files that are damaged or lie: a clear error each, no panic, and nothing allocated that the file could not fill.

mod common;

use candle_core::quantized::GgmlDType;
use common::architectures::named;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::path::Path;
use tempfile::{TempDir, tempdir};
use tqkv_candle::{Error, GgufError, Metadata, Model};

/// The system's allocator, which remembers each thread's largest request.
struct Largest;

thread_local! {
    static LARGEST: Cell<usize> = const { Cell::new(0) };
}

// SAFETY: it does what the system's allocator does.
unsafe impl GlobalAlloc for Largest {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LARGEST.set(LARGEST.get().max(layout.size()));
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Largest = Largest;

/// A file in a directory that goes with it.
struct File(TempDir);

impl File {
    fn new() -> Self {
        Self(tempdir().unwrap())
    }

    fn load(&self, bytes: &[u8]) -> Result<Model, Error> {
        let path = self.0.path().join("model.gguf");
        std::fs::write(&path, bytes).unwrap();
        LARGEST.set(0);
        let result = Model::load(&path);
        let largest = LARGEST.get();
        assert!(largest <= 8 * bytes.len() + (1 << 20), "{largest} bytes asked for, of a file of {}", bytes.len());
        result
    }

    fn error(&self, bytes: &[u8]) -> GgufError {
        match self.load(bytes).err() {
            Some(Error::Gguf { cause, .. }) => cause,
            other => panic!("{other:?}"),
        }
    }
}

/// A file with these values and tensors, and so many bytes of data.
struct Builder {
    head: Vec<u8>,
    values: (u64, Vec<u8>),
    tensors: (u64, Vec<u8>),
    data: usize,
}

impl Builder {
    fn new() -> Self {
        let head = [b"GGUF", &3u32.to_le_bytes()[..]].concat();
        Self { head, values: (0, vec![]), tensors: (0, vec![]), data: 0 }
    }

    fn value(mut self, key: &str, kind: u32, value: &[u8]) -> Self {
        self.values.0 += 1;
        self.values.1.extend([&text(key.as_bytes())[..], &kind.to_le_bytes(), value].concat());
        self
    }

    fn tensor(mut self, name: &str, shape: &[u64], kind: u32, offset: u64) -> Self {
        self.tensors.0 += 1;
        self.tensors.1.extend([&text(name.as_bytes())[..], &(shape.len() as u32).to_le_bytes()].concat());
        shape.iter().for_each(|n| self.tensors.1.extend(n.to_le_bytes()));
        self.tensors.1.extend([&kind.to_le_bytes()[..], &offset.to_le_bytes()].concat());
        self
    }

    fn data(mut self, bytes: usize) -> Self {
        self.data = bytes;
        self
    }

    fn build(self) -> Vec<u8> {
        let counts = [self.tensors.0.to_le_bytes(), self.values.0.to_le_bytes()].concat();
        let mut file = [self.head, counts, self.values.1, self.tensors.1].concat();
        file.resize(file.len().next_multiple_of(32) + self.data, 0);
        file
    }
}

fn text(bytes: &[u8]) -> Vec<u8> {
    [&(bytes.len() as u64).to_le_bytes()[..], bytes].concat()
}

fn tiny() -> Vec<u8> {
    let dir = tempdir().unwrap();
    let path = dir.path().join("tiny.gguf");
    named("qwen3").write_gguf(&path, GgmlDType::Q4_0);
    std::fs::read(path).unwrap()
}

#[test]
fn what_is_no_gguf_is_refused() {
    let file = File::new();
    assert!(matches!(file.error(b""), GgufError::Truncated { left: 0, .. }));
    assert!(matches!(file.error(b"GGU"), GgufError::Truncated { left: 3, .. }));
    assert!(matches!(file.error(b"\x7fELF\0\0\0\0\0\0\0\0"), GgufError::Magic { .. }));
    for version in [0, 1, 4, 3 << 24] {
        let bytes = [b"GGUF", &u32::to_le_bytes(version)[..], &[0; 16]].concat();
        assert!(matches!(file.error(&bytes), GgufError::Version { got } if got == version));
    }
}

#[test]
fn lengths_are_held_against_the_file() {
    let file = File::new();
    for huge in [1 << 20, 1 << 40, 1 << 62, u64::MAX] {
        let lie = huge.to_le_bytes();
        let list = |kind: u32| [&kind.to_le_bytes()[..], &lie].concat();
        let mut wrong = vec![
            [&Builder::new().head[..], &lie, &[0; 8]].concat(),
            [&Builder::new().head[..], &[0; 8], &lie].concat(),
            [&Builder::new().head[..], &[0; 8], &1u64.to_le_bytes(), &lie, &[0; 8]].concat(),
            Builder::new().value("a", 8, &lie).build(),
            Builder::new().value("a", 9, &[&list(8)[..], &lie].concat()).build(),
            Builder::new().value("a", 9, &[&list(9)[..], &list(9)].concat()).build(),
            // One list within one list, which claims to hold many.
            Builder::new().value("a", 9, &[&9u32.to_le_bytes()[..], &1u64.to_le_bytes(), &list(0)].concat()).build(),
        ];
        wrong.extend((0..13).map(|kind| Builder::new().value("a", 9, &list(kind)).build()));
        for shape in [vec![32, huge], vec![huge, 32], vec![huge, huge, huge, huge]] {
            wrong.push(Builder::new().tensor("a", &shape, 0, 0).data(256).build());
        }
        wrong.push(Builder::new().tensor("a", &[32], 0, huge & !31).data(128).build());
        for bytes in wrong {
            let error = file.error(&bytes);
            assert!(matches!(error, GgufError::Truncated { .. }), "{huge}: {error}");
        }
    }
}

#[test]
fn what_makes_no_sense_is_named() {
    let file = File::new();
    let error = |builder: Builder| file.error(&builder.build()).to_string();
    let one = 1u32.to_le_bytes();
    assert_eq!(
        error(Builder::new().value("a.b", 13, &one)),
        "the value of a.b is of kind 13, expected one from 0 to 12"
    );
    assert_eq!(error(Builder::new().value("a", 7, &[2])), "a holds the truth value 2, expected 0 or 1");
    assert_eq!(error(Builder::new().value("a", 4, &one).value("a", 4, &one)), "a is there twice");
    for alignment in [0u32, 3, 48, 1 << 21] {
        let error = error(Builder::new().value("general.alignment", 4, &alignment.to_le_bytes()));
        assert!(error.starts_with("general.alignment is "), "{error}");
    }
    let twice = Builder::new().tensor("a", &[8], 0, 0).tensor("a", &[8], 0, 0).data(64);
    assert_eq!(error(twice), "a is there twice");
    assert_eq!(error(Builder::new().tensor("a", &[], 0, 0)), "tensor a has 0 dimensions, expected 1 to 4");
    assert_eq!(error(Builder::new().tensor("a", &[1; 5], 0, 0)), "tensor a has 5 dimensions, expected 1 to 4");
    for kind in [4, 5, 9, 15, 16, 20, 24, 31, 39, u32::MAX] {
        let error = error(Builder::new().tensor("a", &[256], kind, 0).data(1024));
        assert!(error.starts_with(&format!("tensor a is of ggml's type {kind}, expected ")), "{error}");
    }
    let blocks = Builder::new().tensor("a", &[33, 32], 2, 0).data(4096);
    assert_eq!(error(blocks), "tensor a has rows of 33 elements, expected a multiple of 32");
    let offset = Builder::new().tensor("a", &[8], 0, 8).data(64);
    assert_eq!(error(offset), "tensor a begins at byte 8 of the data, expected a multiple of 32");
    let mut bad_name = Builder::new().tensor("abc", &[8], 0, 0).data(64);
    bad_name.tensors.1[9] = 0xff;
    assert_eq!(error(bad_name), "a tensor is called \"a\u{fffd}c\", expected UTF-8");
}

/// Lists within lists, as deep as a file can hold them, are passed over without recursion.
#[test]
fn lists_within_lists_are_passed_over() {
    let deep = [&9u32.to_le_bytes()[..], &1u64.to_le_bytes()].concat().repeat(1 << 18);
    let inner = [&8u32.to_le_bytes()[..], &2u64.to_le_bytes(), &text(b"x"), &text(b"")].concat();
    let wide =
        [&9u32.to_le_bytes()[..], &2u64.to_le_bytes(), &inner, &5u32.to_le_bytes(), &0u64.to_le_bytes()].concat();
    let bytes = Builder::new().value("deep", 9, &[deep, inner].concat()).value("wide", 9, &wide).build();
    // All of it is read: what is missing is the architecture.
    let error = File::new().load(&bytes).err().unwrap();
    assert!(matches!(&error, Error::MissingField { field, .. } if field == "general.architecture"), "{error}");
}

#[test]
fn a_file_cut_anywhere_is_an_error() {
    let (file, good) = (File::new(), tiny());
    assert!(file.load(&good).is_ok());
    // The last 32 bytes may be padding.
    for end in (0..4000).chain((4000..good.len() - 32).step_by(997)) {
        assert!(matches!(file.load(&good[..end]), Err(Error::Gguf { .. })), "{end} of {}", good.len());
    }
}

/// Whatever bytes of the header are wrong, there is a model or an error.
#[test]
fn a_damaged_header_never_panics() {
    let (file, good) = (File::new(), tiny());
    let mut rng = ChaCha8Rng::seed_from_u64(16);
    let mut failed = 0;
    for _ in 0..1500 {
        let mut bytes = good.clone();
        for _ in 0..rng.random_range(1..4) {
            let at = rng.random_range(0..3000);
            bytes[at] = rng.random();
        }
        if let Err(error) = file.load(&bytes) {
            assert!(!error.to_string().is_empty());
            failed += 1;
        }
    }
    assert!(failed > 500, "{failed}");
}

#[test]
fn configurations_are_checked() {
    let file = File::new();
    let string = |s: &str| text(s.as_bytes());
    let model = |arch: &str| Builder::new().value("general.architecture", 8, &string(arch));
    let message = |builder: Builder| file.load(&builder.build()).err().unwrap().to_string();
    let int = |n: u32| n.to_le_bytes();
    let whole = |arch: &str| {
        let key = |name: &str| format!("{arch}.{name}");
        model(arch)
            .value(&key("embedding_length"), 4, &int(64))
            .value(&key("attention.head_count"), 4, &int(4))
            .value(&key("block_count"), 4, &int(1))
            .value(&key("context_length"), 4, &int(64))
            .value(&key("feed_forward_length"), 4, &int(96))
            .tensor("token_embd.weight", &[64, 256], 0, 0)
            .data(64 * 256 * 4)
    };
    for (builder, expected) in [
        (
            model("mamba"),
            "general.architecture is \"mamba\", but only one of llama, qwen2, qwen3, gemma2, gemma3, phi3",
        ),
        (Builder::new().value("general.architecture", 4, &int(1)), "general.architecture is 1, expected a text"),
        (model("llama"), "llama.embedding_length is missing"),
        (whole("llama").value("llama.expert_count", 4, &int(8)), "llama.expert_count is 8, but only 0 is supported"),
        (whole("llama").value("split.count", 2, &3u16.to_le_bytes()), "split.count is 3, but only 1 (one file)"),
        (whole("gemma3").value("gemma3.attention.causal", 7, &[0]), "gemma3.attention.causal is false, but only true"),
        (
            whole("llama").value("llama.attention.head_count_kv", 4, &int(3)),
            "llama.attention.head_count_kv is 3, expected a divisor",
        ),
        (
            whole("llama").value("llama.attention.value_length", 4, &int(32)),
            "llama.attention.value_length is 32, but only 16 as in the keys",
        ),
        (
            whole("llama").value("llama.rope.scaling.type", 8, &string("dynamic")),
            "llama.rope.scaling.type is \"dynamic\"",
        ),
        (whole("llama").value("llama.rope.freq_base", 6, &0f32.to_le_bytes()), "llama.rope.freq_base is 0, expected"),
        (
            whole("qwen2").value("qwen2.attention.sliding_window", 4, &int(8)),
            "qwen2.attention.sliding_window is 8, but only 0",
        ),
        (whole("llama"), "tensor blk.0.attn_q.weight is missing, expected shape [64, 64]"),
        (
            // Heads that differ from layer to layer.
            whole("llama").value(
                "llama.attention.head_count_kv",
                9,
                &[&int(4)[..], &2u64.to_le_bytes(), &int(2), &int(4)].concat(),
            ),
            "llama.attention.head_count_kv is a list of 2 whole numbers, expected a whole number",
        ),
        (whole("llama").value("tokenizer.ggml.eos_token_id", 4, &int(256)), "token 256 is outside of the vocabulary"),
    ] {
        let got = message(builder);
        assert!(got.contains(expected), "got {got:?}, expected {expected:?}");
    }
    // A list of equal numbers is a number.
    let equal = [&int(4)[..], &2u64.to_le_bytes(), &int(2), &int(2)].concat();
    let got = message(whole("llama").value("llama.attention.head_count_kv", 9, &equal));
    assert!(got.contains("tensor blk.0.attn_q.weight is missing"), "{got}");
}

#[test]
fn metadata_are_typed() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("a.gguf");
    let list = |kind: u32, values: &[u8], count: u64| [&kind.to_le_bytes()[..], &count.to_le_bytes(), values].concat();
    let bytes = Builder::new()
        .value("text", 8, &text("\u{e9}".as_bytes()))
        .value("broken", 8, &text(b"a\xff"))
        .value("small", 0, &[7])
        .value("negative", 5, &(-3i32).to_le_bytes())
        .value("half", 12, &0.5f64.to_le_bytes())
        .value("flag", 7, &[1])
        .value("texts", 9, &list(8, &[text(b"a"), text(b"")].concat(), 2))
        .value("numbers", 9, &list(6, &[1.5f32.to_le_bytes(), (-2f32).to_le_bytes()].concat(), 2))
        .value("integers", 9, &list(3, &[1i16.to_le_bytes(), (-1i16).to_le_bytes()].concat(), 2))
        .build();
    std::fs::write(&path, bytes).unwrap();
    let metadata = Metadata::load(&path).unwrap();
    assert_eq!(metadata.text("text").unwrap(), Some("\u{e9}"));
    assert_eq!(metadata.text("broken").unwrap(), Some("a\u{fffd}"));
    assert_eq!(metadata.text("nothing").unwrap(), None);
    assert_eq!((metadata.count("small").unwrap(), metadata.number("small").unwrap()), (Some(7), Some(7.0)));
    assert_eq!(metadata.number("half").unwrap(), Some(0.5));
    assert_eq!(metadata.flag("flag").unwrap(), Some(true));
    assert_eq!(metadata.texts("texts").unwrap().unwrap(), ["a", ""]);
    assert_eq!(metadata.numbers("numbers").unwrap().unwrap(), [1.5, -2.0]);
    assert_eq!(metadata.integers("integers").unwrap().unwrap(), [1, -1]);
    let message = metadata.count("negative").unwrap_err().to_string();
    assert!(message.ends_with("a.gguf: negative is -3, expected a whole number of at least 0"), "{message}");
    let message = metadata.flag("texts").unwrap_err().to_string();
    assert!(message.ends_with("texts is a list of 2 texts, expected true or false"), "{message}");
    assert!(matches!(Metadata::load(Path::new("/nowhere")), Err(Error::Read { .. })));
}
