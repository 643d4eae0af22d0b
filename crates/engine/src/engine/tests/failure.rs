//! What goes wrong is told to everyone it concerns.

use std::sync::atomic::{AtomicBool, Ordering};

use herd_scheduler::StepPlan;

use super::*;
use crate::{ExecutorError, StepOutput};

#[tokio::test]
async fn a_failed_step_fails_everyone_and_stops_the_engine() {
    let (engine, control) = start(Limits { max_sequences: 2, ..LIMITS });
    let reservation = within(engine.reserve(9, 3).unwrap().ready()).await.unwrap();
    control.close();
    let mut running = engine.generate(prompt(4, 0), greedy(5)).unwrap();
    within(control.held()).await;
    let mut waiting = engine.generate(prompt(4, 1), greedy(5)).unwrap();
    let reserving = engine.reserve(4, 4).unwrap();
    let stopped = engine.stopped();
    control.fail("out of luck");
    control.open();
    let reason = within(stopped).await;
    assert_eq!(reason, "rank 0 stopped: out of luck");
    assert_eq!(events(&mut running).await.last(), Some(&Event::Failed(reason.clone())));
    assert_eq!(events(&mut waiting).await, [Event::Failed(reason.clone())]);
    let expected = SubmitError::Stopped(reason);
    assert_eq!(within(reserving.ready()).await.unwrap_err(), expected);
    let first =
        SampledToken { position: 0, token: crate::TokenLogprob { id: 1, logprob: 0.0 }, top: Vec::new() };
    assert_eq!(engine.decode(reservation, prompt(9, 0), &first, greedy(3)).unwrap_err(), expected);
    assert_eq!(engine.generate(prompt(4, 0), greedy(1)).unwrap_err(), expected);
    assert_eq!(engine.reserve(4, 1).unwrap_err(), expected);
    assert_eq!(*engine.load().borrow(), Load::default());
}

#[tokio::test]
async fn logits_that_are_no_numbers_fail_their_sequence_alone() {
    let options = FakeOptions { nan_token: Some(13), ..options() };
    let (engine, control) = start_with(options, LIMITS);
    control.close();
    let mut good = engine.generate(prompt(4, 0), greedy(3)).unwrap();
    let mut bad = engine.generate(vec![1, 2, 13], greedy(3)).unwrap();
    control.open();
    assert_eq!(tokens(&mut good).await.len(), 3);
    let failed = Event::Failed("the logit of token 0 is not a number".to_owned());
    assert_eq!(events(&mut bad).await[1..], [Event::Computed { computed: 3 }, failed]);
    idle(&engine).await;
}

/// Delegates, or misbehaves.
struct Odd {
    model: FakeModel,
    panics: bool,
    gone: Arc<AtomicBool>,
}

impl Drop for Odd {
    fn drop(&mut self) {
        self.gone.store(true, Ordering::SeqCst);
    }
}

impl Executor for Odd {
    fn step(&mut self, plan: &StepPlan) -> Result<StepOutput, ExecutorError> {
        assert!(!self.panics, "this one panics");
        let mut output = self.model.step(plan)?;
        if plan.entries[0].tokens[0] == 999 {
            output.logits.pop();
        }
        Ok(output)
    }

    fn kv(&self) -> Vec<Arc<dyn KvStore>> {
        self.model.kv()
    }

    fn vocab_size(&self) -> usize {
        self.model.vocab_size()
    }
}

fn odd(panics: bool) -> (Engine, FakeControl, Arc<AtomicBool>) {
    let gone = Arc::new(AtomicBool::new(false));
    let model = FakeModel::new(options());
    let control = model.control();
    let executor = Odd { model, panics, gone: Arc::clone(&gone) };
    (Engine::start(Box::new(executor), LIMITS), control, gone)
}

#[tokio::test]
async fn a_panic_in_a_step_is_a_failure_like_any_other() {
    let (engine, _control, _gone) = odd(true);
    let mut sequence = engine.generate(vec![1], greedy(1)).unwrap();
    assert_eq!(within(engine.stopped()).await, "the step loop panicked: this one panics");
    assert!(matches!(events(&mut sequence).await.last(), Some(Event::Failed(_))));
}

#[tokio::test]
async fn a_step_with_too_few_logits_stops_the_engine() {
    let (engine, _control, _gone) = odd(false);
    let mut sequence = engine.generate(vec![999], greedy(1)).unwrap();
    let reason = within(engine.stopped()).await;
    assert_eq!(reason, "a step returned 999 logits instead of 1 rows of 1000");
    assert_eq!(events(&mut sequence).await.last(), Some(&Event::Failed(reason)));
}

#[tokio::test]
async fn dropping_the_last_handle_joins_the_thread() {
    let (engine, control, gone) = odd(false);
    control.close();
    let mut sequence = engine.generate(prompt(5, 0), greedy(50)).unwrap();
    within(control.held()).await;
    let mut waiting = engine.generate(prompt(5, 1), greedy(50)).unwrap();
    drop(engine.clone());
    assert!(!gone.load(Ordering::SeqCst));
    // The first thing the drop does; here, because the gate must open after it and before the join.
    engine.inner.shared.close();
    control.open();
    drop(engine);
    assert!(gone.load(Ordering::SeqCst), "the executor outlives its engine");
    let failed = Event::Failed("the engine was shut down".to_owned());
    assert_eq!(events(&mut sequence).await.last(), Some(&failed));
    assert_eq!(events(&mut waiting).await.last(), Some(&failed));
}
