//! Files that are missing, broken or of different models: one clear error each, at load.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod reference;

use herd_text::{BUNDLE_FILE_NAMES, BundleFiles, TextError, TextModel};
use serde_json::{Value, json};

/// What is said of the tiny model with one file changed as JSON.
fn refused(file: &str, change: impl FnOnce(&mut Value)) -> String {
    let mut files = reference::tiny();
    let mut json: Value = serde_json::from_slice(files.get(file).unwrap()).unwrap();
    change(&mut json);
    files.insert(file, serde_json::to_vec(&json).unwrap());
    error_of(&files)
}

fn error_of(files: &BundleFiles) -> String {
    let error = TextModel::from_files(files).err().unwrap();
    assert_eq!(error.field(), None, "no request is at fault");
    error.to_string()
}

fn without(missing: &str) -> BundleFiles {
    reference::tiny().iter().filter(|(name, _)| *name != missing).collect()
}

#[test]
fn the_files_a_model_needs_are_named_when_missing() {
    for file in ["tokenizer.json", "tokenizer_config.json", "config.json"] {
        assert_eq!(error_of(&without(file)), format!("the model has no {file}"));
    }
    let model = TextModel::from_files(&without("generation_config.json")).unwrap();
    assert_eq!(model.stop_ids(), [1016, 1020, 1021], "config.json has them too");
}

#[test]
fn a_file_that_is_not_json_is_named() {
    for file in ["tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json"] {
        let mut files = reference::tiny();
        files.insert(file, "{");
        assert!(error_of(&files).starts_with(&format!("{file} is not usable: EOF")), "{}", error_of(&files));
    }
    let mut files = reference::tiny();
    files.insert("chat_template.jinja", [0xFF]);
    assert!(error_of(&files).starts_with("chat_template.jinja is not usable: invalid utf-8"));
}

#[test]
fn a_tokenizer_of_another_model_is_refused() {
    for vocab_size in [1023, 1024 + 512] {
        assert_eq!(
            refused("config.json", |config| config["vocab_size"] = json!(vocab_size)),
            format!(
                "tokenizer.json has ids up to 1023 and config.json a vocab_size of {vocab_size}: they are not of one model"
            )
        );
    }
    let mut files = reference::tiny();
    let config = String::from_utf8(files.get("config.json").unwrap().to_vec()).unwrap();
    files.insert("config.json", config.replace("\"vocab_size\": 1024", "\"vocab_size\": 1152"));
    assert_eq!(TextModel::from_files(&files).unwrap().vocab_size(), 1152, "padding rows are usual");
}

#[test]
fn an_end_of_sequence_outside_the_vocabulary_is_refused() {
    assert_eq!(
        refused("generation_config.json", |config| config["eos_token_id"] = json!([1016, 1024])),
        "generation_config.json is not usable: eos_token_id 1024 is outside the vocabulary of 1024"
    );
}

#[test]
fn only_byte_level_bpe_is_served() {
    let changes: [(&str, Value, &str); 4] = [
        ("decoder", json!({"type": "Metaspace"}), "a decoder of type Metaspace"),
        ("decoder", Value::Null, "a decoder of type none"),
        ("model", json!({"type": "Unigram", "vocab": []}), "a model of type Unigram"),
        ("pre_tokenizer", json!({"type": "Whitespace"}), "a pre_tokenizer of type Whitespace"),
    ];
    for (part, value, what) in changes {
        assert_eq!(
            refused("tokenizer.json", |tokenizer| tokenizer[part] = value),
            format!(
                "tokenizer.json has {what}; only byte-level BPE is served (model BPE, pre-tokenizer and decoder ByteLevel)"
            )
        );
    }
}

#[test]
fn a_tokenizer_that_contradicts_itself_is_refused() {
    let one_id_twice = refused("tokenizer.json", |tokenizer| tokenizer["model"]["vocab"]["zzzz"] = json!(0));
    assert!(one_id_twice.starts_with("tokenizer.json is not usable: id 0 stands for"), "{one_id_twice}");
    let unknown_merge = refused("tokenizer.json", |tokenizer| {
        tokenizer["model"]["merges"].as_array_mut().unwrap().push(json!(["zz", "zzzz"]));
    });
    assert!(unknown_merge.starts_with("tokenizer.json is not usable: "), "{unknown_merge}");
    let merged_control = refused("tokenizer.json", |tokenizer| {
        // Merging letters must not be a way to a control token.
        let last = tokenizer["added_tokens"].as_array_mut().unwrap().last_mut().unwrap();
        last["content"] = json!("zq");
        tokenizer["model"]["vocab"]["zq"] = json!(1023);
        tokenizer["model"]["merges"].as_array_mut().unwrap().push(json!(["z", "q"]));
    });
    assert!(merged_control.starts_with("tokenizer.json is not usable: "), "{merged_control}");
}

#[test]
fn a_broken_template_is_refused_with_its_line() {
    let mut files = reference::tiny();
    files.insert("chat_template.jinja", "line\n{% for %}");
    let error = error_of(&files);
    assert!(error.starts_with("the chat template is not usable: "), "{error}");
    assert!(error.ends_with("(line 2 of the template)"), "{error}");
}

#[test]
fn files_are_bounded() {
    let mut files = reference::tiny();
    files.insert("chat_template.jinja", vec![b'x'; (1 << 20) + 1]);
    assert_eq!(error_of(&files), "chat_template.jinja has 1048577 bytes; at most 1048576 are read");
    let inside =
        refused("tokenizer_config.json", |config| config["chat_template"] = json!("x".repeat((1 << 20) + 1)));
    assert_eq!(inside, "tokenizer_config.json has 1048577 bytes; at most 1048576 are read");
    let mut files = reference::tiny();
    files.insert("config.json", vec![b' '; (4 << 20) + 1]);
    assert!(matches!(
        TextModel::from_files(&files),
        Err(TextError::FileTooLarge { file: "config.json", .. })
    ));
}

#[test]
fn a_template_may_be_a_file_or_one_of_several_by_name() {
    let chat = |files: &BundleFiles| {
        let model = TextModel::from_files(files).unwrap();
        let message = herd_text::Message { role: "user".to_owned(), content: "x".to_owned() };
        let ids = model.render_chat(&[message], std::time::UNIX_EPOCH).unwrap();
        ids.into_iter().map(|id| model.token_text(id).0).collect::<String>()
    };
    let mut files = reference::tiny();
    let named = json!({"chat_template": [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]});
    files.insert("tokenizer_config.json", named.to_string());
    assert_eq!(chat(&files), "yes");
    files.insert("chat_template.jinja", "{{ 'the' }}\r\n{% if true %}\r\nfile{% endif %}");
    assert_eq!(chat(&files), "the\nfile", "the file comes first, and its line ends are all alike");
}

#[test]
fn the_names_of_the_bundle_are_those_it_reads() {
    let model = TextModel::from_files(&reference::tiny()).unwrap();
    assert!(model.has_chat_template());
    assert_eq!(BUNDLE_FILE_NAMES.len(), 5);
    assert!(reference::tiny().iter().all(|(name, _)| BUNDLE_FILE_NAMES.contains(&name)));
}
