//! Ids to text as they come: whole characters, no stop string, no control token, whatever the cut.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod reference;

use std::sync::{Arc, LazyLock};

use herd_text::{
    BUNDLE_FILE_NAMES, BundleFiles, MAX_STOP_BYTES, MAX_STOPS, OutputStream, Piece, Stops, TextModel,
};
use proptest::prelude::*;
use serde_json::Value;

static TINY: LazyLock<Arc<TextModel>> =
    LazyLock::new(|| Arc::new(TextModel::from_files(&reference::tiny()).unwrap()));
const EOT: u32 = 1021;

fn stream(stops: &[&str]) -> OutputStream {
    OutputStream::new(&TINY, stops.iter().map(|&stop| stop.to_owned()).collect::<Vec<_>>()).unwrap()
}

/// The ids of single bytes.
fn bytes(bytes: &[u8]) -> Vec<u32> {
    bytes.iter().map(|&byte| (0..256).find(|&id| TINY.token_text(id).1 == [byte]).unwrap()).collect()
}

fn texts(stream: &mut OutputStream, ids: &[u32]) -> Vec<String> {
    ids.iter().map(|&id| stream.push(id).text).collect()
}

/// What the stream should say in the end, in one go: decode everything, cut at the stop string that is complete first.
fn batch(ids: &[u32], stops: &[String]) -> (String, bool) {
    let mut text = String::new();
    for run in ids.split(|&id| TINY.is_special(id)) {
        let bytes: Vec<u8> = run.iter().flat_map(|&id| TINY.token_text(id).1).collect();
        text.push_str(&String::from_utf8_lossy(&bytes));
    }
    for end in (1..=text.len()).filter(|&end| text.is_char_boundary(end)) {
        if let Some(stop) =
            stops.iter().filter(|stop| text[..end].ends_with(*stop)).max_by_key(|stop| stop.len())
        {
            text.truncate(end - stop.len());
            return (text, true);
        }
    }
    (text, false)
}

/// Two bytes that are no beginning of a character, yet waited for as the reference does.
fn ends_in_half_a_surrogate(ids: &[u32]) -> bool {
    let since_control = ids.rsplit(|&id| TINY.is_special(id)).next().unwrap_or_default();
    let bytes: Vec<u8> = since_control.iter().flat_map(|&id| TINY.token_text(id).1).collect();
    matches!(bytes[..], [.., 0xED, 0xA0..=0xBF])
}

fn check_pieces(model: &Arc<TextModel>, case: &Value, remap: impl Fn(u32) -> u32) {
    let mut stream = OutputStream::new(model, Stops::default()).unwrap();
    let pieces = case["pieces"].as_array().unwrap();
    for (index, (id, expected)) in case["ids"].as_array().unwrap().iter().zip(pieces).enumerate() {
        let piece = stream.push(remap(u32::try_from(id.as_u64().unwrap()).unwrap()));
        assert_eq!(piece.text, expected.as_str().unwrap(), "{}{} at {index}", case["name"], case["text"]);
    }
    assert_eq!(stream.finish(), case["at_end"].as_str().unwrap_or_default(), "{}", case["name"]);
}

#[test]
fn llama31_ids_stream_as_the_reference_says() {
    let Some(cases) = reference::reference("llama31-tokenizer/cases.json") else { return };
    let Some(files) = reference::llama31("") else { return };
    let model = Arc::new(TextModel::from_files(&files).unwrap());
    let cases: Vec<Value> = serde_json::from_slice(&cases).unwrap();
    let streaming = reference::data("llama31-streaming.json");
    let streaming = streaming.as_array().unwrap();
    assert_eq!((cases.len(), streaming.len()), (95, 40));
    for case in cases.iter().chain(streaming) {
        check_pieces(&model, case, |id| id);
    }
}

/// The first 256 ids of both tokenizers are the bytes, in the same order.
#[test]
fn bytes_stream_as_the_reference_says() {
    let streaming = reference::data("llama31-streaming.json");
    let of_bytes = |case: &&Value| {
        case["ids"].as_array().unwrap().iter().all(|id| !(256..128_000).contains(&id.as_u64().unwrap()))
    };
    let cases: Vec<&Value> = streaming.as_array().unwrap().iter().filter(of_bytes).collect();
    assert_eq!(cases.len(), 30);
    for case in cases {
        check_pieces(&TINY, case, |id| if id < 256 { id } else { EOT });
    }
}

/// dynamo#12630: characters of several tokens became U+FFFD where chunks met.
#[test]
fn a_character_of_several_tokens_is_never_replaced_at_a_chunk_edge() {
    let mut stream = stream(&[]);
    assert_eq!(texts(&mut stream, &bytes("你🤦".as_bytes())), ["", "", "你", "", "", "", "🤦"]);
    assert_eq!(stream.finish(), "");
}

/// vllm#48853: a prompt that ended inside a character came back whole in the first delta.
#[test]
fn a_prompt_that_ends_inside_a_character_leaks_nothing() {
    let mut stream = stream(&[]);
    // The prompt ended in the first byte of a character; the first token of the output is the rest.
    assert_eq!(texts(&mut stream, &bytes(&[0xBD, 0xA0, b'a'])), ["\u{FFFD}", "\u{FFFD}", "a"]);
}

/// sglang PR#34852: a real U+FFFD was waited for for ever, over a window that grew.
#[test]
fn a_real_replacement_character_is_sent_at_once() {
    let mut stream = stream(&[]);
    assert_eq!(texts(&mut stream, &bytes("\u{FFFD}a".as_bytes())), ["", "", "\u{FFFD}", "a"]);
    let broken = vec![bytes(&[0xFF])[0]; 100_000];
    assert!(texts(&mut stream, &broken).iter().all(|text| text == "\u{FFFD}"));
}

/// vllm#51641: text was held back for a stop string, its ids and logprobs were not.
#[test]
fn tokens_are_counted_when_their_text_is_out() {
    let mut stream = stream(&["END"]);
    let tokens = |stream: &mut OutputStream, text: &str| -> Vec<(String, usize)> {
        bytes(text.as_bytes())
            .into_iter()
            .map(|id| stream.push(id))
            .map(|piece| (piece.text, piece.tokens))
            .collect()
    };
    let expect = |pairs: &[(&str, usize)]| -> Vec<(String, usize)> {
        pairs.iter().map(|&(text, count)| (text.to_owned(), count)).collect()
    };
    assert_eq!(tokens(&mut stream, "aENa"), expect(&[("a", 1), ("", 0), ("", 0), ("ENa", 3)]));
    assert_eq!(tokens(&mut stream, "é"), expect(&[("", 0), ("é", 2)]));
    // Control tokens count as soon as what came before them does.
    assert_eq!(stream.push(EOT), Piece { text: String::new(), tokens: 1, stopped: false });
    assert_eq!(tokens(&mut stream, "E"), expect(&[("", 0)]));
    assert_eq!(stream.push(EOT).tokens, 0);
    assert_eq!(tokens(&mut stream, "x"), expect(&[("Ex", 3)]));
    // Of "bEND" only "b" is out, and only its token.
    assert_eq!(tokens(&mut stream, "bEND"), expect(&[("b", 1), ("", 0), ("", 0), ("", 0)]));
}

#[test]
fn the_first_tokens_end_no_text_and_a_stop_string_may_be_part_of_it() {
    let end = |included, min_tokens, said: &str| {
        let strings = vec!["ab".to_owned(), "aa".to_owned()];
        let mut stream = OutputStream::new(&TINY, Stops { strings, included, min_tokens }).unwrap();
        let mut out = String::new();
        let mut tokens = 0;
        for id in bytes(said.as_bytes()) {
            let piece = stream.push(id);
            out.push_str(&piece.text);
            tokens += piece.tokens;
            if piece.stopped {
                return (out, tokens, true);
            }
        }
        (out + &stream.finish(), tokens, false)
    };
    let out = |text: &str, tokens, stopped| (text.to_owned(), tokens, stopped);
    assert_eq!(end(false, 0, "xaby"), out("x", 1, true));
    assert_eq!(end(true, 0, "xaby"), out("xab", 3, true));
    // Complete with the third token: one too early, and in time.
    assert_eq!(end(false, 3, "xaby"), out("xaby", 4, false));
    assert_eq!(end(false, 2, "xaby"), out("x", 1, true));
    // What did not count is part of the text, and may be the beginning of what does.
    assert_eq!(end(false, 3, "xaaab"), out("xa", 2, true));
    assert_eq!(end(true, 4, "xaabab"), out("xaabab", 6, true));
}

#[test]
fn a_token_that_ends_the_choice_has_no_text_of_its_own() {
    let mut stream = stream(&["END"]);
    let ids = bytes("aENx".as_bytes());
    assert_eq!(stream.push(ids[0]).text, "a");
    assert_eq!(stream.push(ids[1]).text, "");
    assert_eq!(stream.push_stop(ids[3]), Piece { text: String::new(), tokens: 0, stopped: false });
    assert_eq!(stream.finish(), "E");
}

#[test]
fn a_token_cut_by_a_stop_string_counts_as_out() {
    let model = &*TINY;
    let ids = model.encode("se", false).unwrap();
    assert_eq!(ids.len(), 1, "one token of two letters");
    assert_eq!(stream(&["e"]).push(ids[0]), Piece { text: "s".to_owned(), tokens: 1, stopped: true });
    assert_eq!(stream(&["s"]).push(ids[0]), Piece { text: String::new(), tokens: 0, stopped: true });
}

/// vllm PR#47616: tokens after the stop were still returned. vllm#57052: stop strings leaked for prompts of ids.
#[test]
fn nothing_comes_after_a_stop_string() {
    let mut stream = stream(&["\n\n", "stop"]);
    let mut out = String::new();
    let mut stopped_at = None;
    for (index, id) in bytes(b"one\n\ntwo stop").into_iter().enumerate() {
        let piece = stream.push(id);
        out.push_str(&piece.text);
        if piece.stopped {
            assert!(stopped_at.is_some() || piece.text.is_empty());
            stopped_at.get_or_insert(index);
        }
        assert_eq!(piece.stopped, stopped_at.is_some());
    }
    assert_eq!((out.as_str(), stopped_at), ("one", Some(4)));
    assert_eq!(stream.finish(), "");
}

#[test]
fn what_was_held_back_is_released_at_the_end_once() {
    let mut stream = stream(&["stop"]);
    assert_eq!(texts(&mut stream, &bytes(b"a sto")), ["a", " ", "", "", ""]);
    assert_eq!(stream.finish(), "sto");
    assert_eq!(stream.finish(), "");

    let mut stream = self::stream(&["\u{FFFD}"]);
    assert_eq!(texts(&mut stream, &bytes(&[b'a', 0xE4])), ["a", ""]);
    assert_eq!(stream.finish(), "", "the end makes U+FFFD, which is the stop string");
}

#[test]
fn the_stop_string_complete_first_wins_and_of_two_the_longest() {
    for (stops, text, expected) in [
        (&["bcd", "c"][..], "abcd", "ab"),
        (&["c", "abc"], "xabc", "x"),
        (&["aab"], "aaab", "a"),
        (&["abab", "bac"], "ababac", ""),
        (&["é"], "cafés", "caf"),
    ] {
        let mut stream = stream(stops);
        assert_eq!(texts(&mut stream, &bytes(text.as_bytes())).concat(), expected, "{stops:?} in {text}");
    }
}

#[test]
fn control_tokens_and_unknown_ids_have_no_text() {
    let mut stream = stream(&[]);
    assert_eq!(texts(&mut stream, &[EOT, 1015, 5_000_000]), ["", "", ""]);
    assert_eq!(stream.finish(), "");
}

#[test]
fn a_control_tokens_literal_as_text_is_text() {
    let mut stream = stream(&[]);
    let ids = TINY.encode("<|eot_id|>", false).unwrap();
    assert_eq!(texts(&mut stream, &ids).concat(), "<|eot_id|>");
}

#[test]
fn stop_strings_are_bounded() {
    let refused = |stops: Vec<String>| {
        let error = OutputStream::new(&TINY, stops).err().unwrap();
        assert_eq!(error.field().as_deref(), Some("stop"));
        error.to_string()
    };
    assert_eq!(refused(vec!["x".to_owned(); MAX_STOPS + 1]), "stop has 17 strings; at most 16 are allowed");
    assert_eq!(refused(vec!["x".to_owned(), String::new()]), "stop[1] is empty; leave it out");
    assert_eq!(
        refused(vec!["x".repeat(MAX_STOP_BYTES + 1)]),
        "stop[0] has 1025 bytes; at most 1024 are allowed"
    );
    assert!(OutputStream::new(&TINY, vec!["x".repeat(MAX_STOP_BYTES); MAX_STOPS]).is_ok());
}

/// Ids that make characters, halves of characters, runs of letters that stop strings are made of, and control tokens.
fn any_ids() -> impl Strategy<Value = Vec<u32>> {
    let pieces = prop_oneof![
        6 => prop::sample::select(vec!["a", "b", "ab", "é", "你", "🤦", " ", "\n", "se", "in", "\u{FFFD}"])
            .prop_map(|text| bytes(text.as_bytes())),
        2 => prop::sample::select(vec![0x80u8, 0xE4, 0xBD, 0xED, 0xA0, 0xF0, 0x9F, 0xC3, 0xA9, 0xFF]).prop_map(|byte| bytes(&[byte])),
        2 => (0u32..1015).prop_map(|id| vec![id]),
        1 => Just(vec![EOT]),
    ];
    prop::collection::vec(pieces, 0..24).prop_map(|pieces| pieces.concat())
}

fn any_stops() -> impl Strategy<Value = Vec<String>> {
    let stop = prop_oneof![
        "[ab]{1,4}",
        "(a|é|你| |\n|s|e){1,3}",
        Just("\u{FFFD}".to_owned()),
        Just("🤦".to_owned())
    ];
    prop::collection::vec(stop, 0..4)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn pieces_are_the_batch_result(ids in any_ids(), stops in any_stops()) {
        let (expected, expect_stop) = batch(&ids, &stops);
        let mut stream = OutputStream::new(&TINY, stops.clone()).unwrap();
        let mut out = String::new();
        let mut stopped = false;
        let mut tokens = 0;
        for (index, &id) in ids.iter().enumerate() {
            let piece = stream.push(id);
            out.push_str(&piece.text);
            stopped = piece.stopped;
            tokens += piece.tokens;
            prop_assert!(expected.starts_with(&out), "{:?} is not the beginning of {:?}", out, expected);
            prop_assert!(tokens <= index + 1);
            // Nothing is held back without need: what is not out is the beginning of a stop string or of a character.
            let (so_far, cut) = batch(&ids[..=index], &stops);
            let held = &so_far[out.len()..];
            let begun = if ends_in_half_a_surrogate(&ids[..=index]) { "\u{FFFD}\u{FFFD}" } else { "\u{FFFD}" };
            let held = held.strip_suffix(begun).unwrap_or(held);
            prop_assert!(cut || stops.iter().any(|stop| stop.starts_with(held)) || held.is_empty());
        }
        out.push_str(&stream.finish());
        prop_assert_eq!(&out, &expected);
        // Only the end can complete a stop string without a token: by the U+FFFD of a character cut off.
        let by_the_end = stops.iter().any(|stop| stop.ends_with(char::REPLACEMENT_CHARACTER));
        prop_assert!(stopped == expect_stop || by_the_end);
        prop_assert!(stopped || tokens <= ids.len());
    }

    #[test]
    fn the_same_text_in_other_tokens_gives_the_same_output(text in "[ab 你\n]{0,20}", stops in any_stops()) {
        let whole = TINY.encode(&text, false).unwrap();
        let collect = |ids: &[u32]| {
            let mut stream = OutputStream::new(&TINY, stops.clone()).unwrap();
            texts(&mut stream, ids).concat() + &stream.finish()
        };
        prop_assert_eq!(collect(&whole), collect(&bytes(text.as_bytes())));
    }
}

#[test]
fn every_character_survives_the_way_there_and_back() {
    // Six ASCII controls have no token in SmolLM2.
    let lacks = |character: char| "\x04\x06\x13\x14\x16\x1d".contains(character);
    let text: String = ('\0'..='\u{2FFF}').chain('\u{1F300}'..='\u{1F6FF}').filter(|&c| !lacks(c)).collect();
    for files in [Some(reference::tiny()), reference::smollm2()].into_iter().flatten() {
        let model = Arc::new(TextModel::from_files(&files).unwrap());
        let ids = model.encode(&text, false).unwrap();
        let mut stream = OutputStream::new(&model, Vec::new()).unwrap();
        assert!(texts(&mut stream, &ids).concat() + &stream.finish() == text);
    }
}

#[test]
fn a_token_begins_after_what_an_earlier_one_left_broken() {
    let ids = bytes(&[0xC3, b'A', 0xC3, 0xA9, 0xE4, 0xB8, b'B', 0xF0, 0x9F, 0xE4]);
    let ids = [&ids[..], &[EOT], &bytes(b"C")].concat();
    let mut stream = stream(&[]);
    let begins: Vec<usize> = ids
        .iter()
        .map(|&id| {
            stream.push(id);
            stream.token_begin()
        })
        .collect();
    // U+FFFD A é(two tokens) U+FFFD(two tokens) B U+FFFD(two tokens) U+FFFD, the control token, C
    assert_eq!(begins, [0, 1, 2, 2, 3, 3, 4, 5, 5, 6, 7, 7]);
}
