//! What the step loop tells an observer.

use std::sync::Mutex;

use super::*;
use crate::{Observer, StepDone, TokenLogprob};

#[derive(Debug, Default)]
struct Seen {
    started: usize,
    steps: Vec<(usize, usize)>,
    later_tokens: usize,
}

#[derive(Debug, Default)]
struct Watching(Mutex<Seen>);

impl Observer for Watching {
    fn started(&self, _: Duration) {
        self.0.lock().unwrap().started += 1;
    }

    fn stepped(&self, StepDone { time: _, tokens, sequences }: StepDone) {
        self.0.lock().unwrap().steps.push((tokens, sequences));
    }

    fn token(&self, _: Duration) {
        self.0.lock().unwrap().later_tokens += 1;
    }
}

#[tokio::test]
async fn an_observer_sees_starts_steps_and_the_time_between_tokens() {
    let watching = Arc::new(Watching::default());
    let observer: Arc<dyn Observer> = Arc::<Watching>::clone(&watching);
    let engine = Engine::start_with(Box::new(FakeModel::new(options())), None, LIMITS, observer);
    // Two chunks of the prompt, then a step for each token but the first.
    ids(&engine, prompt(20, 1), greedy(3)).await;
    let mut prefill = engine.prefill(prompt(5, 2), greedy(1)).unwrap();
    tokens(&mut prefill).await;
    // From KV that came from elsewhere: the time to its own first token is one between two tokens.
    let reservation = within(engine.reserve(4, 3).unwrap().ready()).await.unwrap();
    let first = SampledToken { position: 0, token: TokenLogprob { id: 7, logprob: 0.0 }, top: vec![] };
    let mut decode = engine.decode(reservation, prompt(4, 3), &first, greedy(3)).unwrap();
    assert_eq!(tokens(&mut decode).await.len(), 2);

    let seen = watching.0.lock().unwrap();
    assert_eq!(seen.started, 3, "the reservation too");
    assert_eq!(seen.steps, [(16, 1), (4, 1), (1, 1), (1, 1), (5, 1), (1, 1), (1, 1)]);
    assert_eq!(seen.later_tokens, 2 + 2);
    assert_eq!(engine.counters().steps as usize, seen.steps.len());
    assert_eq!(engine.busy(), *engine.load().borrow());
}
