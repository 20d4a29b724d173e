//! Chat templates, with what transformers makes of them.

use serde_json::{Value, json};
use std::path::Path;
use tqkv_candle::{ChatTemplate, Error, GgufTokenizer, Message, ModelConfig, Vocabulary};

/// A GGUF file's vocabulary with this template.
fn vocabulary(template: Option<&str>) -> Vocabulary {
    let gguf = GgufTokenizer {
        model: "gpt2".into(),
        pre: Some("gpt-2".into()),
        tokens: ["<s>", "</s>", "a", "b"].map(String::from).to_vec(),
        token_types: Some(vec![3, 3, 1, 1]),
        merges: Some(vec![]),
        bos: Some(0),
        eos: Some(1),
        add_bos: Some(true),
        chat_template: template.map(String::from),
        ..GgufTokenizer::default()
    };
    Vocabulary::from_gguf(gguf, Path::new("model.gguf")).unwrap()
}

fn conversation(turns: &[(&str, &str)]) -> Vec<Message> {
    turns.iter().map(|&(role, content)| Message { role: role.into(), content: content.into() }).collect()
}

fn render(template: &str, turns: &[(&str, &str)], answer: bool) -> Result<String, Error> {
    vocabulary(Some(template)).chat_template()?.render(&conversation(turns), answer)
}

const TURNS: [(&str, &str); 3] = [("user", "Hi"), ("assistant", " Hello. "), ("user", "Bye\n")];

/// That of SmolLM2.
const CHATML: &str = "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou \
    are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + \
    '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}\
    {% endif %}";

/// As Gemma's and Llama 2's go about it, on lines of their own.
const TURN_BY_TURN: &str = r#"{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set first = messages[0]['content'] | trim + '\n\n' -%}
    {%- set rest = messages[1:] -%}
{%- else -%}
    {%- set first = "" -%}
    {%- set rest = messages -%}
{%- endif -%}
{%- for message in rest -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- set role = "model" if message.role == 'assistant' else message.role -%}
    {{ '<start_of_turn>' + role + '\n' + (first if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'].strip() }}
    {%- endif -%}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<start_of_turn>model\n' }}
{%- endif -%}
"#;

#[test]
fn conversations_are_rendered_as_transformers_does() {
    let system = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n";
    let turns = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n Hello. <|im_end|>\n<|im_start|>user\nBye\n<|im_end|>\n";
    assert_eq!(render(CHATML, &TURNS, false).unwrap(), format!("{system}{turns}"));
    assert_eq!(render(CHATML, &TURNS, true).unwrap(), format!("{system}{turns}<|im_start|>assistant\n"));
    let own = render(CHATML, &[("system", "Be brief."), ("user", "a")], true).unwrap();
    assert_eq!(own, "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n");

    let turns = "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nHello.<end_of_turn>\n<start_of_turn>user\nBye\
                 <end_of_turn>\n<start_of_turn>model\n";
    assert_eq!(render(TURN_BY_TURN, &TURNS, true).unwrap(), format!("<s>{turns}"));
    let own = render(TURN_BY_TURN, &[("system", " Be brief. "), ("user", "a")], false).unwrap();
    assert_eq!(own, "<s><start_of_turn>user\nBe brief.\n\na<end_of_turn>\n");
}

#[test]
fn a_template_may_do_what_python_does() {
    let cases = [
        ("{{ messages[0].content.split(' ')[1].upper() }}", "B"),
        ("{{ 'x'.startswith('x') }} {{ messages[0].get('name', 'none') }}", "True none"),
        ("{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}", "role=user;content=a b;"),
        ("{% if tools is none and not documents %}no tools{% endif %}", "no tools"),
        ("{% if strftime_now is defined %}{{ strftime_now('%Y') }}{% else %}26 Jul 2024{% endif %}", "26 Jul 2024"),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "1"),
        ("{% for i in [1, 2, 3] %}{% if i == 2 %}{% continue %}{% endif %}{{ i }}{% endfor %}", "13"),
        ("{{ {'a': [1, 2.5, 'é<'], 'b': none} | tojson }}", "{\"a\": [1, 2.5, \"é<\"], \"b\": null}"),
        ("{{ {'a': [1]} | tojson(indent=2) }}", "{\n  \"a\": [\n    1\n  ]\n}"),
        ("{{ eos_token }}{{ pad_token }}", "</s>"),
        ("    {% if true %}\nx\n    {% endif %}\ny\n", "x\ny"),
        ("{% macro f(x) %}<{{ x }}>{% endmacro %}{{ f(messages | length) }}", "<1>"),
    ];
    for (template, expected) in cases {
        assert_eq!(render(template, &[("user", "a b")], true).unwrap(), expected, "{template}");
    }
}

#[test]
fn templates_that_fail_are_errors_that_say_why() {
    let fails = |template: &str, turns: &[(&str, &str)], words: &str| {
        let error = render(template, turns, true).unwrap_err();
        assert!(matches!(error, Error::ChatTemplate { .. }), "{error}");
        let text = error.to_string();
        assert!(text.starts_with("model.gguf: chat template: ") && text.contains(words), "{text}");
    };
    fails("{% for %}", &TURNS, "unexpected");
    fails("{{ messages[0].content.fly() }}", &TURNS, "fly");
    fails(TURN_BY_TURN, &[("assistant", "a")], "must alternate user/assistant");
    fails("{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}", &TURNS, "fuel");
    fails(&"{% if a %}".repeat(100_000), &TURNS, "");
    fails(&format!("{{{{ {}1{} }}}}", "(".repeat(100_000), ")".repeat(100_000)), &TURNS, "");
    let error = vocabulary(None).chat_template().err();
    assert!(matches!(error, Some(Error::NoChatTemplate { path }) if path == Path::new("model.gguf")));
    assert!(matches!(Vocabulary::Bytes.chat_template(), Err(Error::NoChatTemplate { .. })));
}

#[test]
fn a_directory_says_it_in_one_of_three_ways() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
    let config = json!({
        "vocab_size": 2, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1,
        "max_position_embeddings": 64,
    });
    let config = ModelConfig::parse(config.to_string().as_bytes(), Path::new("")).unwrap();
    write(
        "tokenizer.json",
        r#"{"added_tokens": [], "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"}}"#,
    );
    let rendered = || {
        let template: ChatTemplate = Vocabulary::load(dir.path(), &config)?.chat_template()?;
        template.render(&conversation(&[("user", "a")]), true)
    };
    let of = |value: Value| {
        write("tokenizer_config.json", &json!({"bos_token": {"content": "b"}, "chat_template": value}).to_string());
        rendered()
    };
    assert!(matches!(rendered(), Err(Error::NoChatTemplate { .. })));
    assert!(matches!(of(Value::Null), Err(Error::NoChatTemplate { .. })));
    assert_eq!(of("one {{ bos_token }}".into()).unwrap(), "one b");
    let named = json!([{"name": "tool_use", "template": "x"}, {"name": "default", "template": "two"}]);
    assert_eq!(of(named).unwrap(), "two");
    write("chat_template.jinja", "three");
    assert_eq!(rendered().unwrap(), "three");
    let mut vocabulary = Vocabulary::load(dir.path(), &config).unwrap();
    vocabulary.set_chat_template("four".into());
    assert_eq!(vocabulary.chat_template().unwrap().render(&[], true).unwrap(), "four");
}

#[test]
fn the_text_of_a_conversation_gets_no_second_start_token() {
    let vocabulary = vocabulary(Some("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"));
    let text = vocabulary.chat_template().unwrap().render(&conversation(&[("user", "ab")]), true).unwrap();
    assert_eq!(vocabulary.encode_chat(&text).unwrap(), [0, 2, 3, 1]);
    assert_eq!(vocabulary.encode_prompt("ab").unwrap(), [0, 2, 3]);
}
