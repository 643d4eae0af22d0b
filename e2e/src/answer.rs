//! What a stream of events comes to.

use anyhow::{Context as _, Result, bail, ensure};
use herd_proto::v1::generate_event::Event;
use herd_proto::v1::{Delta, Finished, GenerateEvent, Started, finished};

/// All choices of one request, ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Of the model that gave it.
    pub digest: String,
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// By index.
    pub choices: Vec<Choice>,
}

/// One of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// Generated.
    pub ids: Vec<u32>,
    /// Their text.
    pub text: String,
    /// Why there are no more.
    pub reason: finished::Reason,
}

#[derive(Default)]
struct Open {
    digest: Option<String>,
    ids: Vec<u32>,
    text: String,
    finished: Option<Finished>,
}

impl Answer {
    /// Events in the order they came; each choice is whole, and its positions have no gap.
    pub fn of(choices: u32, events: Vec<GenerateEvent>) -> Result<Self> {
        let mut open: Vec<Open> = (0..choices).map(|_| Open::default()).collect();
        for GenerateEvent { choice, position, event } in events {
            let of = open
                .get_mut(choice as usize)
                .with_context(|| format!("choice {choice} was not asked for"))?;
            of.add(position, event).with_context(|| format!("choice {choice}"))?;
        }
        let (mut digest, mut prompt_tokens) = (String::new(), 0);
        let mut ended = Vec::with_capacity(open.len());
        for (index, open) in open.into_iter().enumerate() {
            let finished = open.finished.with_context(|| {
                format!("choice {index} is broken off after {} tokens: {:?}", open.ids.len(), open.text)
            })?;
            prompt_tokens = finished.usage.unwrap_or_default().prompt_tokens;
            digest = open.digest.unwrap_or_default();
            ended.push(Choice { ids: open.ids, text: open.text, reason: finished.reason() });
        }
        Ok(Self { digest, prompt_tokens, choices: ended })
    }
}

impl Open {
    fn add(&mut self, position: u32, event: Option<Event>) -> Result<()> {
        ensure!(self.finished.is_none(), "goes on after it has finished: {event:?}");
        match event {
            Some(Event::Started(Started { seed: _, model_digest })) => {
                ensure!(self.digest.is_none(), "starts twice");
                self.digest = Some(model_digest);
            }
            Some(Event::Delta(Delta { token_ids, text, logprobs: _ })) => {
                ensure!(self.digest.is_some(), "has tokens before it has started");
                let expected = self.ids.len();
                ensure!(position as usize == expected, "position {position} comes where {expected} is due");
                self.ids.extend(token_ids);
                self.text.push_str(&text);
            }
            Some(Event::Finished(finished)) => {
                ensure!(position as usize == self.ids.len(), "{position} tokens of {} came", self.ids.len());
                self.finished = Some(finished);
            }
            Some(Event::Prompt(_)) => bail!("how likely the prompt is was not asked for"),
            None => bail!("an event of a kind that is not known"),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(position: u32, event: Event) -> GenerateEvent {
        GenerateEvent { choice: 0, position, event: Some(event) }
    }

    fn started() -> GenerateEvent {
        event(0, Event::Started(Started { seed: 1, model_digest: "d".to_owned() }))
    }

    fn delta(position: u32, ids: &[u32]) -> GenerateEvent {
        let (token_ids, text) = (ids.to_vec(), "x".repeat(ids.len()));
        event(position, Event::Delta(Delta { token_ids, text, logprobs: Vec::new() }))
    }

    fn finished(position: u32) -> GenerateEvent {
        event(position, Event::Finished(Finished { reason: finished::Reason::Stop.into(), usage: None }))
    }

    #[test]
    fn a_whole_stream_is_an_answer() {
        let answer = Answer::of(1, vec![started(), delta(0, &[5, 6]), delta(2, &[7]), finished(3)]).unwrap();
        let choice = Choice { ids: vec![5, 6, 7], text: "xxx".to_owned(), reason: finished::Reason::Stop };
        assert_eq!(answer, Answer { digest: "d".to_owned(), prompt_tokens: 0, choices: vec![choice] });
    }

    #[test]
    fn a_broken_stream_is_none() {
        let broken = |events| format!("{:#}", Answer::of(1, events).unwrap_err());
        assert!(broken(vec![started(), delta(0, &[5])]).contains("broken off after 1 tokens"));
        assert!(broken(vec![started(), delta(1, &[5])]).contains("position 1 comes where 0 is due"));
        assert!(broken(vec![started(), delta(0, &[5]), delta(0, &[5])]).contains("position 0 comes where 1"));
        assert!(broken(vec![started(), delta(0, &[5]), finished(2)]).contains("2 tokens of 1 came"));
        assert!(broken(vec![delta(0, &[5])]).contains("before it has started"));
        assert!(broken(vec![started(), started()]).contains("starts twice"));
        assert!(broken(vec![started(), finished(0), delta(0, &[5])]).contains("goes on after"));
    }
}
