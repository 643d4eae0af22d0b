//! A prompt in the answer: how likely its tokens are as `vLLM` tells it, and the text that is echoed.

use herd_text::{OutputStream, Stops};
use serde::ser::SerializeSeq as _;
use serde::{Serialize, Serializer};

use super::answer::About;
use super::completions::name_of;
use crate::event::TokenDetail;

/// A list with one entry a token of the prompt: `null` for the first one, then by id the alternatives and the token itself.
pub(super) struct PromptLogprobs<'a>(&'a [TokenDetail]);

impl<'a> PromptLogprobs<'a> {
    /// Of the prompt with this index, where it is asked for and known.
    pub(super) fn of(about: &'a About, prompt: usize) -> Option<Self> {
        let asked = about.delivery.prompt_logprobs && !about.delivery.stream;
        asked.then(|| Self(about.prompt_details.get(prompt).map_or(&[][..], Vec::as_slice)))
    }
}

impl Serialize for PromptLogprobs<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut list = serializer.serialize_seq(Some(self.0.len() + 1))?;
        list.serialize_element(&None::<()>)?;
        for detail in self.0 {
            list.serialize_element(&Position(detail))?;
        }
        list.end()
    }
}

struct Position<'a>(&'a TokenDetail);

#[derive(Serialize)]
struct Entry<'a> {
    logprob: f32,
    /// Not known of a token that is none of the alternatives.
    rank: Option<usize>,
    decoded_token: &'a str,
}

impl Serialize for Position<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let TokenDetail { token, top, text_offset: _ } = self.0;
        let itself = (!top.iter().any(|other| other.id == token.id)).then_some((token, None));
        let entries = top.iter().zip((1..).map(Some)).chain(itself);
        serializer.collect_map(entries.map(|(token, rank)| {
            (token.id.to_string(), Entry { logprob: token.logprob, rank, decoded_token: &token.text })
        }))
    }
}

/// What of a prompt an answer begins with.
#[derive(Default)]
pub(super) struct Echo {
    pub(super) text: String,
    /// Of the text.
    pub(super) characters: usize,
    /// Of its tokens.
    pub(super) names: Vec<String>,
    pub(super) offsets: Vec<usize>,
}

impl Echo {
    /// Of each prompt; none where it is not asked for.
    pub(super) fn of(about: &About) -> Vec<Self> {
        let prompts = about.prompts.iter().filter(|_| about.delivery.echo);
        prompts.map(|prompt| Self::new(about, prompt)).collect()
    }

    fn new(about: &About, prompt: &[u32]) -> Self {
        let mut echo = Self::default();
        // No stop strings, so nothing can be wrong with them.
        let Ok(mut stream) = OutputStream::new(&about.text, Stops::default()) else { return echo };
        for &id in prompt {
            echo.text.push_str(&stream.push(id).text);
            echo.offsets.push(stream.token_begin());
            let (text, bytes) = about.text.token_text(id);
            echo.names.push(name_of(&text, &bytes));
        }
        echo.text.push_str(&stream.finish());
        echo.characters = echo.text.chars().count();
        echo
    }
}
