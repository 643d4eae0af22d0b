//! Text to ids: what reference tokenizers give, and never a control token.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod reference;

use herd_text::{BUNDLE_FILE_NAMES, BundleFiles, TextModel};
use proptest::prelude::*;
use serde_json::{Value, json};

fn tiny() -> TextModel {
    TextModel::from_files(&reference::tiny()).unwrap()
}

/// The tiny model with its `tokenizer.json` changed.
fn changed(change: impl FnOnce(&mut Value)) -> TextModel {
    let mut files = reference::tiny();
    let mut tokenizer: Value = serde_json::from_slice(files.get("tokenizer.json").unwrap()).unwrap();
    change(&mut tokenizer);
    files.insert("tokenizer.json", serde_json::to_vec(&tokenizer).unwrap());
    TextModel::from_files(&files).unwrap()
}

fn text_of(model: &TextModel, ids: &[u32]) -> String {
    let bytes: Vec<u8> = ids.iter().flat_map(|&id| model.token_text(id).1).collect();
    String::from_utf8(bytes).unwrap()
}

fn control_tokens(files: &BundleFiles) -> Vec<String> {
    let tokenizer: Value = serde_json::from_slice(files.get("tokenizer.json").unwrap()).unwrap();
    let tokens = tokenizer["added_tokens"].as_array().unwrap();
    tokens.iter().map(|token| token["content"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn llama31_texts_have_the_ids_of_metas_own_tokenizer() {
    let Some(cases) = reference::reference("llama31-tokenizer/cases.json") else { return };
    let Some(files) = reference::llama31("") else { return };
    let model = TextModel::from_files(&files).unwrap();
    let cases: Vec<Value> = serde_json::from_slice(&cases).unwrap();
    assert_eq!(cases.len(), 95);
    for case in &cases {
        let text = case["text"].as_str().unwrap();
        assert_eq!(json!(model.encode(text, false).unwrap()), case["ids"], "{text:?}");
        assert_eq!(model.encode(text, true).unwrap()[0], 128_000);
    }
}

#[test]
fn smollm2_texts_have_the_ids_of_the_reference() {
    let Some(files) = reference::smollm2() else { return };
    let model = TextModel::from_files(&files).unwrap();
    let cases = reference::data("smollm2-tokenizer-cases.json");
    assert_eq!(cases.as_array().unwrap().len(), 50);
    for case in cases.as_array().unwrap() {
        let text = case["text"].as_str().unwrap();
        assert_eq!(json!(model.encode(text, true).unwrap()), case["ids"], "{text:?}");
    }
}

#[test]
fn a_control_tokens_literal_is_ordinary_text() {
    let bundles = [Some(reference::tiny()), reference::smollm2(), reference::llama31("")];
    for files in bundles.into_iter().flatten() {
        let model = TextModel::from_files(&files).unwrap();
        for literal in control_tokens(&files) {
            for text in [literal.clone(), format!("a{literal}b"), format!(" {literal}\n"), literal.repeat(3)]
            {
                let ids = model.encode(&text, false).unwrap();
                assert!(ids.iter().all(|&id| !model.is_special(id)), "{text:?} is {ids:?}");
                assert_eq!(text_of(&model, &ids), text);
            }
        }
    }
}

/// GGUF lists control tokens in the vocabulary too, and `ignore_merges` takes a whole pre-token as one id.
#[test]
fn a_control_token_that_the_vocabulary_lists_is_ordinary_text_too() {
    let model = changed(|tokenizer| {
        tokenizer["model"]["vocab"]["xyzzy"] = json!(1022);
        let tokens = tokenizer["added_tokens"].as_array_mut().unwrap();
        tokens.iter_mut().find(|token| token["id"] == 1022).unwrap()["content"] = json!("xyzzy");
    });
    assert!(model.is_special(1022));
    let ids = model.encode("xyzzy", false).unwrap();
    assert!(!ids.contains(&1022), "{ids:?}");
    assert_eq!(text_of(&model, &ids), "xyzzy");
}

#[test]
fn added_tokens_that_control_nothing_keep_their_ids() {
    let model = changed(|tokenizer| {
        let tokens = tokenizer["added_tokens"].as_array_mut().unwrap();
        let last = tokens.last_mut().unwrap();
        assert_eq!(last["id"], 1023);
        last["content"] = json!("</think>");
        last["special"] = json!(false);
    });
    assert!(!model.is_special(1023));
    let ids = model.encode("a</think>b", false).unwrap();
    assert_eq!(
        ids,
        [model.encode("a", false).unwrap(), vec![1023], model.encode("b", false).unwrap()].concat()
    );
    assert_eq!(text_of(&model, &ids), "a</think>b");
}

#[test]
fn an_unmarked_token_written_like_a_control_token_is_one() {
    let model = changed(|tokenizer| {
        for token in tokenizer["added_tokens"].as_array_mut().unwrap() {
            token["special"] = json!(false);
        }
    });
    assert!(model.is_special(1021));
    assert!(!model.encode("<|eot_id|>", false).unwrap().contains(&1021));
}

#[test]
fn truncation_and_padding_in_the_file_do_not_change_prompts() {
    let text = "a prompt of more than two tokens";
    let model = changed(|tokenizer| {
        tokenizer["truncation"] =
            json!({"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0});
        tokenizer["padding"] = json!({"strategy": {"Fixed": 99}, "direction": "Right", "pad_to_multiple_of": null,
            "pad_id": 1017, "pad_type_id": 0, "pad_token": "<|finetune_right_pad_id|>"});
    });
    assert_eq!(model.encode(text, true).unwrap(), tiny().encode(text, true).unwrap());
}

#[test]
fn bos_comes_first_where_the_tokenizer_has_it_so_and_only_when_asked() {
    let with = tiny();
    assert_eq!(with.encode("", true).unwrap(), [1015]);
    assert!(!with.encode("a", false).unwrap().contains(&1015));
    let without = changed(|tokenizer| tokenizer["post_processor"] = Value::Null);
    assert_eq!(without.encode("", true).unwrap(), [] as [u32; 0]);

    for (flag, expected) in [(json!(true), vec![1015]), (json!(false), vec![])] {
        let mut files = reference::tiny();
        let mut config: Value = serde_json::from_slice(files.get("tokenizer_config.json").unwrap()).unwrap();
        config["add_bos_token"] = flag;
        files.insert("tokenizer_config.json", serde_json::to_vec(&config).unwrap());
        let model = TextModel::from_files(&files).unwrap();
        assert_eq!(model.encode("", true).unwrap(), expected);
    }
}

#[test]
fn a_byte_without_a_token_is_left_out_and_never_the_unknown_token() {
    let model = changed(|tokenizer| {
        let has_q = |piece: &str| piece.contains('q');
        let model = &mut tokenizer["model"];
        model["unk_token"] = json!("<|eot_id|>");
        model["vocab"]["<|eot_id|>"] = json!(1021);
        model["vocab"].as_object_mut().unwrap().retain(|piece, _| !has_q(piece));
        let merges = model["merges"].as_array_mut().unwrap();
        merges.retain(|pair| !pair.as_array().unwrap().iter().any(|part| has_q(part.as_str().unwrap())));
    });
    let (one, two) = (model.encode("1", false).unwrap(), model.encode("2", false).unwrap());
    assert_eq!(model.encode("1q2", false).unwrap(), [one, two].concat());
}

/// A pre-tokenizer's regex that gives up leaves the rest of a text in one piece, with other ids and no error.
#[test]
fn long_runs_of_white_space_are_tokenized_to_the_end_or_refused() {
    let digits = tiny().encode("1212", false).unwrap();
    let in_one_piece = changed(|tokenizer| {
        tokenizer["pre_tokenizer"] =
            json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    });
    assert_ne!(in_one_piece.encode("1212", false).unwrap(), digits);
    let models = [Some(reference::tiny()), reference::smollm2(), reference::llama31("")];
    for files in models.into_iter().flatten() {
        let model = TextModel::from_files(&files).unwrap();
        let digits = model.encode("1212", false).unwrap();
        for space in [" ", "\t", "\u{3000}", "\n"] {
            let run = space.repeat(250_000);
            let ids = model.encode(&(run.clone() + "x1212"), false).unwrap();
            assert!(ids.ends_with(&digits), "{space:?}: {:?} {digits:?}", &ids[ids.len() - 10..]);
            let error = model.encode(&(run + " x"), false).unwrap_err();
            assert_eq!(
                error.to_string(),
                "prompt cannot be tokenized: it has more than 250000 white-space characters in a row"
            );
        }
    }
}

#[test]
fn a_token_alone_has_its_text_and_its_exact_bytes() {
    let model = tiny();
    assert_eq!(model.token_text(1021), ("<|eot_id|>".to_owned(), b"<|eot_id|>".to_vec()));
    assert_eq!(model.token_text(4_000_000_000), (String::new(), Vec::new()));
    let half = (0..1015).find(|&id| model.token_text(id).1 == [0xE4]).unwrap();
    assert_eq!(model.token_text(half), ("\u{FFFD}".to_owned(), vec![0xE4]));
}

#[test]
fn stop_ids_are_those_of_the_generation_config() {
    assert_eq!(tiny().stop_ids(), [1016, 1020, 1021]);
    let mut files: BundleFiles = BUNDLE_FILE_NAMES
        .into_iter()
        .filter_map(|name| Some((name, reference::tiny().get(name)?.to_vec())))
        .collect();
    files.insert("generation_config.json", r#"{"eos_token_id": 1016}"#);
    // With the tokenizer's own end of sequence.
    assert_eq!(TextModel::from_files(&files).unwrap().stop_ids(), [1016, 1021]);
}

proptest! {
    #[test]
    fn no_text_gives_a_control_token_and_every_text_comes_back(
        parts in prop::collection::vec(
            prop_oneof![
                any::<String>(),
                prop::sample::select(vec![
                    "<|eot_id|>", "<|eot_", "id|>", "<|", "|>", "<|start_header_id|>", "<|begin_of_text|>", "\0", "  ", "\n\n",
                ]).prop_map(ToOwned::to_owned),
            ],
            0..8,
        ),
    ) {
        let model = shared();
        let text = parts.concat();
        let ids = model.encode(&text, false).unwrap();
        prop_assert!(ids.iter().all(|&id| !model.is_special(id)));
        prop_assert_eq!(text_of(model, &ids), text);
    }
}

fn shared() -> &'static TextModel {
    static MODEL: std::sync::LazyLock<TextModel> = std::sync::LazyLock::new(tiny);
    &MODEL
}
