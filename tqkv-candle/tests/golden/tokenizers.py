"""Writes tokenizers.json: 200 lines of text and their tokens by two GGUF files' tokenizers, each computed twice.

    pip install gguf==0.19.0 tokenizers==0.23.3 sentencepiece==0.2.3 protobuf regex
    python tokenizers.py MODELS    # the folder with both GGUF files

SmolLM2: by the few lines of byte-level BPE below, and by Hugging Face's tokenizers with the pre-tokenizer that the model's
tokenizer.json has. Gemma 3: by SentencePiece itself, from a model of the file's pieces and scores, and by Hugging Face's
tokenizers with merges as its conversion (transformers, convert_slow_tokenizer.generate_merges) makes them of scores. Each
pair must agree on every line.
"""

import json
import random
import sys
from pathlib import Path

import regex
import sentencepiece
import tokenizers
from gguf import GGUFReader
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

LINES = [
    "The quick brown fox jumps over the lazy dog.",
    "It's what you'd expect, isn't it? They've said we'll see; I'm sure you're right.",
    "IT'S WHAT YOU'D EXPECT, ISN'T IT? THEY'VE SAID WE'LL SEE.",
    "In 1969, Apollo 11 travelled 384,400 km (238,855 miles) at up to 39,897 km/h.",
    "pi = 3.14159265358979323846, e = 2.71828, 0x1F4A9, 1e-12, 1_000_000, 007",
    "", " ", "  ", "   ", "\t", "\n", "\n\n", "\r\n", " \n", "\n ", "\t\t\n\n  ", "x ", " x", "  x", "x  ", " x  y   z    w",
    "Once upon a time there was a tokenizer which had never met an emoji. \U0001f600",
    "fn main() -> Result<(), Box<dyn Error>> {\n    let x: Vec<u32> = (0..10).map(|i| i * 2).collect();\n    println!(\"{x:?}\");\n    Ok(())\n}",
    "def f(x: int) -> int:\n    \"\"\"Doc.\"\"\"\n    return x ** 2 if x % 2 == 0 else -x  # comment\n",
    "#include <stdio.h>\nint main(void) {\n\tfor (int i = 0; i < 10; ++i) {\n\t\tprintf(\"%d\\n\", i);\n\t}\n\treturn 0;\n}\n",
    "{\"a\": [1, 2.5, -3e10, null, true], \"b\": {\"c\": \"\\u00e9\\n\"}}",
    "<html><body><h1>Title</h1><p class=\"x\">Some <b>bold</b> &amp; <i>italic</i> text.</p><table><tr><td>1</td></tr></table></body></html>",
    "SELECT name, COUNT(*) FROM users WHERE age >= 18 GROUP BY name HAVING COUNT(*) > 1;",
    "https://example.com/path/to/page?query=value&other=%20x#fragment, user.name+tag@example.co.uk",
    "git commit -m 'fix: off-by-one' && cargo test --release -- --nocapture 2>&1 | tee log.txt",
    "\\begin{align} E &= mc^2 \\\\ \\int_0^\\infty e^{-x^2} dx &= \\frac{\\sqrt{\\pi}}{2} \\end{align}",
    "| a | b |\n|---|---|\n| 1 | 2 |\n\n- item\n- [ ] todo\n1. one\n2. two\n\n```rust\nlet x = 1;\n```\n",
    "\u4f60\u597d\uff0c\u4e16\u754c\uff01\u4eca\u5929\u5929\u6c14\u5f88\u597d\uff0c\u6211\u4eec\u53bb\u516c\u56ed\u6563\u6b65\u5427\u3002",
    "\u4eba\u5de5\u667a\u80fd\u6b63\u5728\u6539\u53d8\u6211\u4eec\u7684\u751f\u6d3b\u65b9\u5f0f\uff0c\u4ece2023\u5e74\u5f00\u59cb\u3002",
    "\u7e41\u9ad4\u4e2d\u6587\uff1a\u9f8d\u3001\u9f9c\u3001\u61c2\u3001\u8b93\u3001\u9ad4\u9a57\u3002",
    "\u7f55\u89c1\u5b57\uff1a\u9f98\u3001\U00020000\U0002070e\U0002a6d6\u3001\u3400\u4db5",
    "\u3053\u3093\u306b\u3061\u306f\u3001\u4e16\u754c\uff01\u30ab\u30bf\u30ab\u30ca\u3068\u3072\u3089\u304c\u306a\u3002\uff8a\uff9d\uff76\uff78",
    "\uc548\ub155\ud558\uc138\uc694, \uc138\uacc4! \uc624\ub298 \ub0a0\uc528\uac00 \uc88b\uc2b5\ub2c8\ub2e4.",
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440! \u0421\u044a\u0435\u0448\u044c \u0435\u0449\u0451 \u044d\u0442\u0438\u0445 \u043c\u044f\u0433\u043a\u0438\u0445 \u0444\u0440\u0430\u043d\u0446\u0443\u0437\u0441\u043a\u0438\u0445 \u0431\u0443\u043b\u043e\u043a.",
    "\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645\u060c \u0643\u064a\u0641 \u062d\u0627\u0644\u0643 \u0627\u0644\u064a\u0648\u0645\u061f",
    "\u05e9\u05dc\u05d5\u05dd \u05e2\u05d5\u05dc\u05dd, \u05de\u05d4 \u05e9\u05dc\u05d5\u05de\u05da?",
    "\u0928\u092e\u0938\u094d\u0924\u0947 \u0926\u0941\u0928\u093f\u092f\u093e, \u0906\u092a \u0915\u0948\u0938\u0947 \u0939\u0948\u0902?",
    "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35\u0e0a\u0e32\u0e27\u0e42\u0e25\u0e01 \u0e27\u0e31\u0e19\u0e19\u0e35\u0e49\u0e2d\u0e32\u0e01\u0e32\u0e28\u0e14\u0e35",
    "Xin ch\u00e0o th\u1ebf gi\u1edbi, h\u00f4m nay tr\u1eddi \u0111\u1eb9p.",
    "\u0393\u03b5\u03b9\u03ac \u03c3\u03bf\u03c5 \u039a\u03cc\u03c3\u03bc\u03b5! \u03b1 \u03b2 \u03b3 \u03b4 \u03c0 \u03a3",
    "\u12a0\u121b\u122d\u129b \u1200\u1208\u1210\u1218, \u10e5\u10d0\u10e0\u10d7\u10e3\u10da\u10d8, \u0540\u0561\u0575\u0565\u0580\u0565\u0576, \u0f56\u0f7c\u0f51\u0f0b\u0f66\u0f90\u0f51",
    "Caf\u00e9 na\u00efve \u00fcber Stra\u00dfe \u0152uvre \u0141\u00f3d\u017a \u00c5ngstr\u00f6m",
    "Cafe\u0301 nai\u0308ve u\u0308ber A\u030angstro\u0308m (decomposed)",
    "Z\u0351\u036b\u0343\u036a\u0302\u036b\u033d\u034f\u0334\u0319a\u0316\u0317l\u031fgo\u0321",
    "\U0001f600\U0001f602\U0001f923\U0001f60d\U0001f914\U0001f644\U0001f389\U0001f525\U0001f4af",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 \U0001f44d\U0001f3fd \U0001f1e9\U0001f1ea\U0001f1fa\U0001f1f8 \u2764\ufe0f 1\ufe0f\u20e3 \U0001f3f4\u200d\u2620\ufe0f",
    "\U0001fae8\U0001fabf\U0001faf8\U0001f6dc\U0001fac3 new emoji",
    "\u2200x\u2208\u211d: \u2308x\u2309 = \u2212\u230a\u2212x\u230b, \u03b1 \u2227 \u00ac\u03b2 = \u00ac(\u00ac\u03b1 \u2228 \u03b2), \u2115 \u2286 \u2124 \u2282 \u211a",
    "\u201cQuotes\u201d \u2018single\u2019 \u00abguillemets\u00bb \u2026 \u2014 \u2013 \u2022 \u2122 \u00a9 \u00ae \u20ac \u00a3 \u00a5 \u20bf",
    "\uff26\uff55\uff4c\uff4c\uff57\uff49\uff44\uff54\uff48 \uff11\uff12\uff13 \u2460\u2461\u2462 \u2167 \u00bd\u00be \u00b2\u00b3 \u0664\u0665\u0666 \u0967\u0968\u0969 \U0001d54f\U0001d7d8",
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "<|endoftext|>", "<|im_start|><|im_end|>", "a<|im_end|>b <|im_end|> c", "<repo_name>x<file_sep>y<empty_output>", "<|im_start", "<|im_start|",
    "<bos><start_of_turn>user\nWhy is the sky blue?<end_of_turn>\n<start_of_turn>model\n",
    "<eos>", "<pad><unk><mask>", "<unused0><unused99>x", "[multimodal]", "<start_of_turn> <end_of_turn>", "<bos", "</s><s>",
    "<0x41><0xFF>", "<0x0A>", "a\u2581b", "\u2581", "\u2581\u2581\u2581", "\u0120hello\u010a",
    "x\u00a0y\u2003z\u3000w\u200bv\u2028u\u2029t\u0085s", "a\u0000b", "\u0001\u0002\u0007\u001b[31m", "\u007f\u0080\u009f", "\ufeffBOM", "\ufffd \ufffe \uffff",
    "\ue000\uf8ff \U000f0000\U0010fffd", "\u200e\u200f\u202aembedding\u202c", "\u0378\u0530\U0001ffff unassigned",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "ababababababababababababab", "----------------------------------------", "================", "!!!!????....,,,,",
    "....", "...a", "(((())))[[[]]]{{{}}}", "\"\"''``", "@@##$$%%^^&&**", "a.b.c::d->e=>f", "x+=1;y-=2;z*=3;", "!=", "===", "</", "/>", "<!--", "-->",
    "CamelCaseIdentifier snake_case_identifier SCREAMING_SNAKE kebab-case-identifier PascalCase2Number3",
    "1", "12", "123", "1234", "12345", "123456", "1234567890", "3.14", "1,234", "2024-01-31T23:59:59Z", "v1.2.3-rc.4+build5", "192.168.0.1", "50%", "$5.00", "#42",
    "a1b2c3", "B2B", "H2O", "x86_64", "GPT-4o", "\u00b2", "x\u00b2+y\u00b2", "12\u00bd", "\u0661\u0662\u0663",
    "don't", "DON'T", "don\u2019t", "'tis", "'s", "'S", " 's", "rock'n'roll", "y'all'd've", "O'Neill's", "'re're", "'LL",
    "line one\nline two\n\nline four\n\n\n\nline eight", "trailing   \n   leading", "tab\tseparated\tvalues", "mixed \t \n \t\n", "a\r\nb\rc\n\rd", "\n\n\n\n\n\n\n\n\n\nx", "x\n \n  \n   \ny",
    "    four spaces", "        eight spaces", "\tone tab", "\t\ttwo tabs", "   \t mixed", "if x:\n        pass\n    else:\n            pass",
    "supercalifragilisticexpialidocious antidisestablishmentarianism pneumonoultramicroscopicsilicovolcanoconiosis",
    "Donaudampfschifffahrtsgesellschaftskapit\u00e4n", "qwxzvkj zzyzx bcdfg", "TheQuickBrownFoxJumpsOverTheLazyDog",
    "The  double  spaces   and    more     spaces", "hello,world;foo:bar", "What?!", "Hmm...okay", "e.g., i.e., etc.", "Mr. Smith went to Washington, D.C., on Jan. 5th.",
    "To be, or not to be, that is the question: Whether 'tis nobler in the mind to suffer the slings and arrows of outrageous fortune",
    "We hold these truths to be self-evident, that all men are created equal", "Lorem ipsum dolor sit amet, consectetur adipiscing elit, sed do eiusmod tempor",
    "Il \u00e9tait une fois une petite fille qu'on appelait le Petit Chaperon rouge.", "Der Mond ist aufgegangen, die goldnen Sternlein prangen.",
    "En un lugar de la Mancha, de cuyo nombre no quiero acordarme.", "Nel mezzo del cammin di nostra vita mi ritrovai per una selva oscura.",
    "W Szczebrzeszynie chrz\u0105szcz brzmi w trzcinie.", "P\u0159\u00edli\u0161 \u017elu\u0165ou\u010dk\u00fd k\u016f\u0148 \u00fap\u011bl \u010f\u00e1belsk\u00e9 \u00f3dy.", "\u0130stanbul'da \u015fi\u015f kebap yedim, \u0131\u011fd\u0131r.",
    "\u7b2c\u4e00\u7ae0 abc \u7b2c\u4e8c\u7ae0 123 \u7b2c\u4e09\u7ae0", "\u6df7\u5408English\u548c\u4e2d\u6587\u7684text", "\u65e5\u672c\u8a9e\u3068English\u306e\u6df7\u5728", "emoji\U0001f600in\U0001f680words",
]


def lines():
    """The lines above, and as many of random characters as make 200."""
    rng = random.Random(16)
    pieces = [" ", "  ", "\n", "\t", "e", "the", "The", "ing", "'s", "9", "42", ".", ",", "\u00e9", "\u4e2d", "\u6587", "\U0001f600", "\u200d", "_", "{", "}", "<b>", "\u0639", "\u0301"]
    found = list(LINES)
    while len(found) < 200:
        found.append("".join(rng.choice(pieces) for _ in range(rng.randrange(3, 30))))
    assert len(found) == 200, len(found)
    return found


def metadata(path):
    fields = GGUFReader(path).fields
    get = lambda name: fields[f"tokenizer.ggml.{name}"].contents() if f"tokenizer.ggml.{name}" in fields else None
    return {name: get(name) for name in ["tokens", "scores", "token_type", "merges"]}


def byte_characters():
    """GPT-2's characters for bytes."""
    printable = [b for b in range(256) if 0x21 <= b <= 0x7E or 0xA1 <= b <= 0xAC or 0xAE <= b <= 0xFF]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def smollm2_by_hand(meta):
    vocab = {token: i for i, token in enumerate(meta["tokens"])}
    ranks = {tuple(merge.split(" ")): i for i, merge in enumerate(meta["merges"])}
    control = [t for t, kind in zip(meta["tokens"], meta["token_type"]) if kind == 3]
    special = regex.compile("(" + "|".join(regex.escape(t) for t in sorted(control, key=len, reverse=True)) + ")")
    characters = byte_characters()

    def word_tokens(word):
        parts = [characters[b] for b in word.encode()]
        while len(parts) > 1:
            rank, at = min((ranks.get((parts[i], parts[i + 1]), len(ranks)), i) for i in range(len(parts) - 1))
            if rank == len(ranks):
                break
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        return [vocab[p] for p in parts]

    def encode(text):
        ids = []
        for piece in special.split(text):
            if piece in control:
                ids.append(vocab[piece])
                continue
            for run in regex.split(r"(\p{N})", piece):
                for word in regex.findall(GPT2, run):
                    ids += word_tokens(word)
        return ids

    return encode


def smollm2_by_tokenizers(meta):
    vocab = {token: i for i, token in enumerate(meta["tokens"])}
    merges = [tuple(merge.split(" ")) for merge in meta["merges"]]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [t for t, kind in zip(meta["tokens"], meta["token_type"]) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


def gemma3_by_sentencepiece(meta):
    model = sentencepiece_model_pb2.ModelProto()
    kinds = sentencepiece_model_pb2.ModelProto.SentencePiece
    # Of the file's kinds: its <unk> is a control token, which SentencePiece needs as the unknown one.
    types = {1: kinds.NORMAL, 3: kinds.CONTROL, 4: kinds.USER_DEFINED, 6: kinds.BYTE}
    for token, score, kind in zip(meta["tokens"], meta["scores"], meta["token_type"]):
        text = token.replace(" ", "\u2581") if kind == 4 else token
        piece = kinds.UNKNOWN if token == "<unk>" else types[kind]
        model.pieces.add(piece=text, score=score, type=piece)
    model.trainer_spec.model_type = sentencepiece_model_pb2.TrainerSpec.BPE
    model.trainer_spec.byte_fallback = True
    model.trainer_spec.unk_id, model.trainer_spec.bos_id, model.trainer_spec.eos_id, model.trainer_spec.pad_id = 3, 2, 1, 0
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = False
    model.normalizer_spec.remove_extra_whitespaces = False
    model.normalizer_spec.escape_whitespaces = True
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
    # Control tokens in a text are the tokenizer's business, not SentencePiece's.
    control = {t: i for i, (t, kind) in enumerate(zip(meta["tokens"], meta["token_type"])) if kind == 3}
    special = regex.compile("(" + "|".join(regex.escape(t) for t in sorted(control, key=len, reverse=True)) + ")")

    def encode(text):
        ids = []
        for piece in special.split(text):
            ids += [control[piece]] if piece in control else processor.encode(piece)
        return ids

    return encode


def generate_merges(vocab, scores):
    """As transformers' convert_slow_tokenizer has it."""
    merges = []
    for token, score in scores.items():
        local = []
        for index in range(1, len(token)):
            left, right = token[:index], token[index:]
            if left in vocab and right in vocab:
                local.append((left, right, score))
        merges += sorted(local, key=lambda x: (vocab[x[0]], vocab[x[1]]))
    merges.sort(key=lambda x: (x[2], len(x[0]), len(x[1])), reverse=True)
    return [(left, right) for left, right, _ in merges]


def gemma3_by_tokenizers(meta):
    strings = [t.replace(" ", "\u2581") if kind == 4 else t for t, kind in zip(meta["tokens"], meta["token_type"])]
    vocab = {token: i for i, token in enumerate(strings)}
    # User-defined pieces have score 0 in the original; the GGUF file lost that.
    scores = {t: 0.0 if kind == 4 else s for t, s, kind in zip(strings, meta["scores"], meta["token_type"]) if kind in (1, 4)}
    merges = generate_merges(vocab, scores)
    bpe = models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = tokenizers.Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    kinds = zip(strings, meta["token_type"])
    tokenizer.add_tokens([AddedToken(t, special=kind == 3, normalized=False) for t, kind in kinds if kind in (3, 4)])
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


def main():
    folder = Path(sys.argv[1])
    golden = {"lines": lines()}
    for name, file, references in [
        ("smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", [smollm2_by_hand, smollm2_by_tokenizers]),
        ("gemma3", "gemma-3-270m-q4_k_m.gguf", [gemma3_by_sentencepiece, gemma3_by_tokenizers]),
    ]:
        meta = metadata(folder / file)
        first, second = [reference(meta) for reference in references]
        golden[name] = []
        for line in golden["lines"]:
            ids, other = first(line), second(line)
            if ids != other:
                print(name, repr(line), [meta["tokens"][i] for i in ids], [meta["tokens"][i] for i in other], sep="\n  ")
            golden[name].append(ids)
    text = json.dumps(golden, separators=(",", ":"))
    Path(__file__).with_name("tokenizers.json").write_text(text.replace("],[", "],\n[").replace('","', '",\n"') + "\n")


if __name__ == "__main__":
    main()
