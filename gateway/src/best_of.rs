//! `best_of`: more choices are computed than are wanted, and the likeliest are the answer.

use std::collections::VecDeque;

use crate::event::{Delta, EventKind, Finished, GenerationEvent, Prompt};

/// Collects all choices of a generation. What it holds is bounded by what they may say.
pub(crate) struct BestOf {
    /// Choices of a prompt that are wanted, and that are computed.
    n: usize,
    computed: usize,
    /// By index over all prompts.
    choices: Vec<Whole>,
}

/// All that a choice said.
#[derive(Clone, Default)]
struct Whole {
    prompt: Option<Prompt>,
    delta: Delta,
    finished: Option<Finished>,
}

impl BestOf {
    pub(crate) fn new(prompts: usize, n: u32, best_of: u32) -> Self {
        let (n, best_of) = (n as usize, best_of as usize);
        Self { n, computed: best_of, choices: vec![Whole::default(); prompts * best_of] }
    }

    pub(crate) fn take(&mut self, event: GenerationEvent) {
        let GenerationEvent { choice, kind } = event;
        let Some(whole) = self.choices.get_mut(choice as usize) else { return };
        match kind {
            EventKind::Started => {}
            EventKind::Prompt(prompt) => match &mut whole.prompt {
                Some(known) => known.tokens.extend(prompt.tokens),
                None => whole.prompt = Some(prompt),
            },
            EventKind::Delta(Delta { position: _, token_ids, text, logprobs }) => {
                whole.delta.token_ids.extend(token_ids);
                whole.delta.text.push_str(&text);
                whole.delta.logprobs.extend(logprobs);
            }
            EventKind::Finished(finished) => whole.finished = Some(finished),
        }
    }

    /// The choices with the largest sum of log probabilities, largest first, equal ones by index; numbered anew.
    pub(crate) fn finish(self) -> VecDeque<GenerationEvent> {
        let Self { n, computed, mut choices } = self;
        let mut events = VecDeque::new();
        for (prompt, of_prompt) in choices.chunks_mut(computed.max(1)).enumerate() {
            let told = of_prompt.iter_mut().find_map(|choice| choice.prompt.take());
            let sum =
                |choice: &Whole| choice.finished.map_or(f64::NEG_INFINITY, |finished| finished.logprob_sum);
            // Stable: equal ones stay in order.
            of_prompt.sort_by(|a, b| sum(b).total_cmp(&sum(a)));
            let (kept, left_out) = of_prompt.split_at_mut(n.min(of_prompt.len()));
            let tokens = |choice: &Whole| choice.finished.map_or(0, |finished| finished.completion_tokens);
            let mut discarded_tokens: u32 = left_out.iter().map(tokens).sum();
            let mut told = told.map(EventKind::Prompt);
            for (choice, Whole { prompt: _, delta, finished }) in kept.iter_mut().enumerate() {
                let choice = (prompt * n + choice) as u32;
                let mut say = |kind| events.push_back(GenerationEvent { choice, kind });
                say(EventKind::Started);
                if let Some(told) = told.take() {
                    say(told);
                }
                if !(delta.token_ids.is_empty() && delta.text.is_empty()) {
                    say(EventKind::Delta(std::mem::take(delta)));
                }
                if let Some(finished) = *finished {
                    let discarded_tokens = std::mem::take(&mut discarded_tokens);
                    say(EventKind::Finished(Finished { discarded_tokens, ..finished }));
                }
            }
        }
        events
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::FinishReason;

    #[test]
    fn the_likeliest_choices_of_each_prompt_are_kept() {
        let mut best = BestOf::new(2, 2, 3);
        let sums = [-3.0, -1.0, -2.0, -5.0, -5.0, -4.0];
        for (choice, logprob_sum) in (0..).zip(sums) {
            let text = choice.to_string();
            let delta = |position| Delta {
                position,
                token_ids: vec![choice],
                text: text.clone(),
                ..Delta::default()
            };
            best.take(GenerationEvent { choice, kind: EventKind::Started });
            if choice % 3 == 0 {
                best.take(GenerationEvent {
                    choice,
                    kind: EventKind::Prompt(Prompt { position: 1, tokens: Vec::new() }),
                });
            }
            best.take(GenerationEvent { choice, kind: EventKind::Delta(delta(0)) });
            best.take(GenerationEvent { choice, kind: EventKind::Delta(delta(1)) });
            let finished = Finished {
                reason: FinishReason::Length,
                completion_tokens: 10 + choice,
                cached_tokens: 0,
                logprob_sum,
                discarded_tokens: 0,
            };
            best.take(GenerationEvent { choice, kind: EventKind::Finished(finished) });
        }
        let events = best.finish();
        let mut texts = Vec::new();
        let mut told = Vec::new();
        let mut discarded = Vec::new();
        for GenerationEvent { choice, kind } in events {
            match kind {
                EventKind::Started => {}
                EventKind::Prompt(_) => told.push(choice),
                EventKind::Delta(delta) => texts.push((choice, delta.text)),
                EventKind::Finished(finished) => discarded.push(finished.discarded_tokens),
            }
        }
        let expected =
            [(0, "11"), (1, "22"), (2, "55"), (3, "33")].map(|(choice, text)| (choice, text.to_owned()));
        assert_eq!(texts, expected);
        assert_eq!(told, [0, 2]);
        assert_eq!(discarded, [10, 0, 14, 0]);
    }
}
