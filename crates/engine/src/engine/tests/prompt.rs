//! How likely prompts are: the same however they are cut, and no more rows a step than are bounded.

use herd_scheduler::{LogitRows, MAX_PROMPT_ROWS, StepEntry};

use super::*;

/// What is told of a prompt, and the tokens after it.
async fn told(sequence: &mut Sequence) -> (Vec<SampledToken>, Vec<SampledToken>) {
    let (mut of_prompt, mut tokens) = (Vec::new(), Vec::new());
    for event in events(sequence).await {
        match event {
            Event::Prompt(more) => {
                assert!(tokens.is_empty(), "before the first token");
                of_prompt.extend(more);
            }
            Event::Token(token) => tokens.push(token),
            _ => {}
        }
    }
    (of_prompt, tokens)
}

fn asking(top: usize) -> Sampling {
    Sampling { prompt_logprobs: Some(top), temperature: 1.0, seed: 4, ..greedy(6) }
}

#[tokio::test]
async fn every_token_but_the_first_is_told_of_once_however_the_prompt_is_cut() {
    let mut whole = None;
    for max_step_tokens in [512, 1, 3, 16, 61] {
        let (engine, control) = start(Limits { max_step_tokens, ..LIMITS });
        control.close();
        let prompt = prompt(70, 0);
        // Two of them share the steps, with one that does not ask.
        let mut first = engine.generate(prompt.clone(), asking(3)).unwrap();
        let mut other = engine.generate(super::prompt(30, 5), greedy(9)).unwrap();
        let mut second = engine.prefill(prompt.clone(), asking(3)).unwrap();
        control.open();
        let (of_prompt, answer) = told(&mut first).await;
        let (of_prefill, first_token) = told(&mut second).await;
        assert_eq!(told(&mut other).await.0, []);
        let at: Vec<_> = of_prompt.iter().map(|token| (token.position, token.token.id)).collect();
        let expected: Vec<_> = prompt.iter().copied().enumerate().skip(1).collect();
        assert_eq!(at, expected);
        assert!(of_prompt.iter().all(|token| token.top.len() == 3));
        assert_eq!(of_prefill, of_prompt);
        assert_eq!(first_token[..], answer[..1]);
        drop(second);
        let all = (of_prompt, answer);
        assert_eq!(whole.get_or_insert_with(|| all.clone()), &all, "{max_step_tokens} tokens a step");
    }
    // Asking changes no token.
    let (engine, _control) = start(LIMITS);
    let silent = Sampling { prompt_logprobs: None, ..asking(3) };
    let mut sequence = engine.generate(prompt(70, 0), silent).unwrap();
    let (of_prompt, answer) = told(&mut sequence).await;
    assert_eq!((of_prompt, answer), (Vec::new(), whole.unwrap().1));
}

#[tokio::test]
async fn a_step_returns_no_more_rows_than_are_bounded() {
    let (engine, control) = start(Limits { max_step_tokens: 512, ..LIMITS });
    control.close();
    let mut sequences: Vec<_> =
        (0..4).map(|salt| engine.generate(prompt(100, salt), asking(0)).unwrap()).collect();
    let mut rows = 0;
    while rows < 400 {
        let plan = within(control.pass()).await;
        let prompts = plan.entries.iter().filter(|entry| entry.logits == LogitRows::All);
        let of_step: usize = prompts.map(StepEntry::rows).sum();
        assert!(of_step <= MAX_PROMPT_ROWS, "{of_step}");
        rows += of_step;
    }
    assert_eq!(rows, 400, "each prompt token once");
    control.open();
    for sequence in &mut sequences {
        assert_eq!(told(sequence).await.0.len(), 99);
    }
}

#[tokio::test]
async fn logits_of_a_prompt_that_are_no_numbers_fail_it() {
    let (engine, _control) = start_with(FakeOptions { nan_token: Some(7), ..options() }, LIMITS);
    let mut sequence = engine.generate(vec![1, 7, 1], asking(0)).unwrap();
    assert!(matches!(events(&mut sequence).await.last(), Some(Event::Failed(_))));
    let error = engine.generate(vec![1], asking(1001)).unwrap_err();
    assert!(matches!(error, SubmitError::BadSampling { field: "prompt_logprobs", .. }));
}
