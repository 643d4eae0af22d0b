//! The byte-level BPE tokenizer in a GGUF file, as Hugging Face's `tokenizer.json` and `tokenizer_config.json`.

use std::collections::HashMap;

use serde_json::{Map, Value as Json, json};

use super::ConvertError;
use super::gguf::Gguf;

/// How text is cut before the merges: GGUF has a name for it, Hugging Face the rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum PreTokenizer {
    /// `llama-bpe`: the regular expression of Llama 3; a piece that is a token is taken whole.
    Llama,
    /// `smollm`: digits one by one, then GPT-2's regular expression.
    Smollm,
}

/// From Llama 3's tokenizer.
const LLAMA_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Tokens by which a Llama 3 model ends its text or its turn, whichever of them the file names as its end of sequence.
const LLAMA_ENDS: [&str; 3] = ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"];

const TYPE_UNKNOWN: i32 = 2;
const TYPE_CONTROL: i32 = 3;
const TYPE_USER_DEFINED: i32 = 4;
const TYPE_BYTE: i32 = 6;

/// A tokenizer as read from a GGUF file.
#[derive(Debug)]
pub(super) struct Tokenizer<'a> {
    tokens: &'a [String],
    types: &'a [i32],
    merges: Vec<(&'a str, &'a str)>,
    pre: PreTokenizer,
    add_bos: bool,
    chat_template: Option<&'a str>,
    pub(super) bos: Option<u32>,
    /// Ids that end a text, ascending.
    pub(super) eos: Vec<u32>,
    /// The first of the file's own.
    eos_token: Option<u32>,
    pub(super) pad: Option<u32>,
    unknown: Option<u32>,
}

impl<'a> Tokenizer<'a> {
    /// Reads the keys `tokenizer.*`, and checks that there is a token for each of the `vocab` rows of the embedding.
    pub(super) fn read(gguf: &'a Gguf, vocab: usize) -> Result<Self, ConvertError> {
        let model = gguf.text("tokenizer.ggml.model")?;
        if model != "gpt2" {
            let what = "is not supported: only byte-level BPE (gpt2) is";
            return Err(gguf.error(format!("key tokenizer.ggml.model: {model} {what}")));
        }
        let pre = match gguf.text("tokenizer.ggml.pre")? {
            "llama-bpe" => PreTokenizer::Llama,
            "smollm" => PreTokenizer::Smollm,
            other => {
                let what = "is not supported: llama-bpe and smollm are";
                return Err(gguf.error(format!("key tokenizer.ggml.pre: pre-tokenizer {other} {what}")));
            }
        };
        let tokens = gguf.texts("tokenizer.ggml.tokens")?;
        let types = gguf.ints("tokenizer.ggml.token_type")?;
        if tokens.len() != vocab || types.len() != vocab {
            return Err(gguf.error(format!(
                "{} tokens and {} token types do not fit the {vocab} rows of token_embd.weight",
                tokens.len(),
                types.len()
            )));
        }
        let mut ids: HashMap<&str, usize> = HashMap::with_capacity(tokens.len());
        for (id, (token, &ty)) in tokens.iter().zip(types).enumerate() {
            if ty == TYPE_BYTE {
                return Err(gguf.error(format!("token {id} is a byte token, which byte-level BPE has not")));
            }
            if let Some(first) = ids.insert(token, id) {
                return Err(gguf.error(format!("tokens {first} and {id} are both {token:?}")));
            }
        }
        let mut merges = Vec::new();
        for (index, merge) in gguf.texts("tokenizer.ggml.merges")?.iter().enumerate() {
            let known = |(a, b): &(&str, &str)| {
                ids.contains_key(a) && ids.contains_key(b) && ids.contains_key(format!("{a}{b}").as_str())
            };
            let merge = merge.split_once(' ').filter(known);
            let invalid =
                || gguf.error(format!("key tokenizer.ggml.merges: merge {index} is not of two known tokens"));
            merges.push(merge.ok_or_else(invalid)?);
        }

        let id = |key: &str| match gguf.optional_u32(key)? {
            Some(id) if id as usize >= vocab => Err(gguf.error(format!("key {key}: there is no token {id}"))),
            id => Ok(id),
        };
        let bos = id("tokenizer.ggml.bos_token_id")?;
        let eos_token = id("tokenizer.ggml.eos_token_id")?;
        let mut eos: Vec<u32> = eos_token.into_iter().collect();
        eos.extend(id("tokenizer.ggml.eot_token_id")?);
        eos.extend(id("tokenizer.ggml.eom_token_id")?);
        if pre == PreTokenizer::Llama {
            let ends =
                LLAMA_ENDS.iter().filter_map(|end| ids.get(end)).filter(|&&id| types[id] == TYPE_CONTROL);
            eos.extend(ends.map(|&id| id as u32));
        }
        eos.sort_unstable();
        eos.dedup();
        let add_bos =
            gguf.optional_bool("tokenizer.ggml.add_bos_token")?.unwrap_or(pre == PreTokenizer::Llama);
        if add_bos && bos.is_none() {
            return Err(gguf
                .error("key tokenizer.ggml.bos_token_id is missing, though each text shall begin with it"));
        }
        Ok(Self {
            tokens,
            types,
            merges,
            pre,
            add_bos,
            chat_template: gguf.optional_text("tokenizer.chat_template")?,
            bos,
            eos,
            eos_token,
            pad: id("tokenizer.ggml.padding_token_id")?,
            unknown: id("tokenizer.ggml.unknown_token_id")?,
        })
    }

    fn token(&self, id: Option<u32>) -> Option<&str> {
        id.and_then(|id| self.tokens.get(id as usize)).map(String::as_str)
    }

    /// The file that the `tokenizers` library reads.
    pub(super) fn tokenizer_json(&self) -> Json {
        let is_added = |ty: i32| matches!(ty, TYPE_UNKNOWN | TYPE_CONTROL | TYPE_USER_DEFINED);
        let added: Vec<Json> = self
            .tokens
            .iter()
            .zip(self.types)
            .enumerate()
            .filter(|(_, (_, ty))| is_added(**ty))
            .map(|(id, (content, &ty))| {
                json!({
                    "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                    "normalized": false, "special": ty != TYPE_USER_DEFINED,
                })
            })
            .collect();
        // Added tokens are also in the vocabulary where others follow them, or the library would number them anew; the ones
        // at the end are not, as in Llama's own file.
        let in_vocab = self.types.iter().rposition(|&ty| !is_added(ty)).map_or(0, |last| last + 1);
        let vocab: Map<String, Json> = self.tokens[..in_vocab]
            .iter()
            .enumerate()
            .map(|(id, token)| (token.clone(), json!(id)))
            .collect();
        json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": added,
            "normalizer": null,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": self.pretokenizers()},
            "post_processor": self.post_processor(),
            "decoder": byte_level(true, true),
            "model": {
                "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
                "ignore_merges": self.pre == PreTokenizer::Llama,
                "vocab": vocab,
                "merges": self.merges,
            },
        })
    }

    fn pretokenizers(&self) -> Json {
        match self.pre {
            PreTokenizer::Llama => json!([
                {"type": "Split", "pattern": {"Regex": LLAMA_SPLIT}, "behavior": "Isolated", "invert": false},
                byte_level(false, false),
            ]),
            PreTokenizer::Smollm => {
                json!([{"type": "Digits", "individual_digits": true}, byte_level(false, true)])
            }
        }
    }

    /// Puts the beginning-of-text token before a text that is encoded with special tokens, where the model wants it.
    fn post_processor(&self) -> Json {
        let (true, Some(id), Some(bos)) = (self.add_bos, self.bos, self.token(self.bos)) else {
            return Json::Null;
        };
        let special = |type_id: u32| json!({"SpecialToken": {"id": bos, "type_id": type_id}});
        let sequence = |name: &str, type_id: u32| json!({"Sequence": {"id": name, "type_id": type_id}});
        json!({
            "type": "TemplateProcessing",
            "single": [special(0), sequence("A", 0)],
            "pair": [special(0), sequence("A", 0), special(1), sequence("B", 1)],
            "special_tokens": {bos: {"id": bos, "ids": [id], "tokens": [bos]}},
        })
    }

    /// What `tokenizer.json` does not say: the chat template and the roles of special tokens.
    pub(super) fn tokenizer_config(&self, context: u32) -> Json {
        let mut config = json!({
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": context,
            "clean_up_tokenization_spaces": false,
            "add_bos_token": self.add_bos,
        });
        for (name, value) in [
            ("bos_token", self.token(self.bos)),
            ("eos_token", self.token(self.eos_token)),
            ("pad_token", self.token(self.pad)),
            ("unk_token", self.token(self.unknown)),
            ("chat_template", self.chat_template),
        ] {
            if let Some(value) = value {
                config[name] = json!(value);
            }
        }
        config
    }
}

fn byte_level(add_prefix_space: bool, use_regex: bool) -> Json {
    json!({"type": "ByteLevel", "add_prefix_space": add_prefix_space, "trim_offsets": true, "use_regex": use_regex})
}
