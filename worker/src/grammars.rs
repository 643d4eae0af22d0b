//! Grammars of requests: compiled beside the reactor and the step loop, a few at a time, the last ones kept.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use herd_engine::Constraint;
use herd_grammar::{Compiled, Compiler, Grammar, GrammarError};
use herd_proto::internal::v1 as wire;
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tonic::Status;

use crate::bundle::vocabulary;
use crate::refusal::full;

/// Grammars compiled at once. One that takes too long keeps its place until it is done.
const COMPILING: usize = 2;

/// For a place, and for compiling: together less than a decode gang waits for the answer of a prefill gang.
const COMPILE_DEADLINE: Duration = Duration::from_secs(4);

/// Compiled grammars that are kept.
const KEPT: usize = 32;

/// How a refusal for a grammar begins. The words are part of the protocol.
pub(crate) const AT_GRAMMAR: &str = "sampling.grammar: ";

/// What a worker needs to compile grammars for its model. Nothing is read before the first one comes.
#[derive(Debug)]
pub(crate) struct Grammars {
    /// Where the tokenizer is.
    bundle: Option<PathBuf>,
    compiler: Mutex<Option<Arc<Compiler>>>,
    /// The one used last comes first.
    kept: Mutex<VecDeque<(Grammar, Arc<Compiled>)>>,
    places: Arc<Semaphore>,
}

/// A request that is refused for its grammar.
pub(crate) fn refused(problem: impl std::fmt::Display) -> Status {
    Status::invalid_argument(format!("{AT_GRAMMAR}{problem}"))
}

impl Grammars {
    pub(crate) fn new(bundle: Option<PathBuf>) -> Self {
        let places = Arc::new(Semaphore::new(COMPILING));
        Self { bundle, compiler: Mutex::default(), kept: Mutex::default(), places }
    }

    /// The state of a choice that has these tokens already.
    pub(crate) async fn constraint(
        self: &Arc<Self>,
        grammar: Grammar,
        said: Vec<u32>,
    ) -> Result<Box<dyn Constraint>, Status> {
        let place = timeout(COMPILE_DEADLINE, Arc::clone(&self.places).acquire_owned()).await;
        let place = place.map_err(|_| full(format!("{COMPILING} grammars are being compiled already")))?;
        let grammars = Arc::clone(self);
        let kind = grammar.kind();
        let work = tokio::task::spawn_blocking(move || {
            let _place = place;
            let compiled = grammars.compiled(&grammar)?;
            let constraint: Box<dyn Constraint> = Box::new(compiled.constraint(&said)?);
            Ok::<_, GrammarError>(constraint)
        });
        match timeout(COMPILE_DEADLINE, work).await {
            Ok(Ok(Ok(constraint))) => Ok(constraint),
            Ok(Ok(Err(error @ GrammarError::Vocabulary(_)))) => Err(Status::internal(error.to_string())),
            Ok(Ok(Err(error))) => Err(refused(error)),
            Ok(Err(error)) => Err(Status::internal(format!("compiling a grammar: {error}"))),
            Err(_) => Err(refused(format!("the {kind} takes longer than {COMPILE_DEADLINE:?} to compile"))),
        }
    }

    fn compiled(&self, grammar: &Grammar) -> Result<Arc<Compiled>, GrammarError> {
        if let Some(compiled) = self.found(grammar) {
            return Ok(compiled);
        }
        let compiled = Arc::new(self.compiler()?.compile(grammar)?);
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.push_front((grammar.clone(), Arc::clone(&compiled)));
        kept.truncate(KEPT);
        Ok(compiled)
    }

    /// Moves it to the front.
    fn found(&self, grammar: &Grammar) -> Option<Arc<Compiled>> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let at = kept.iter().position(|(other, _)| other == grammar)?;
        let entry = kept.remove(at)?;
        let compiled = Arc::clone(&entry.1);
        kept.push_front(entry);
        Some(compiled)
    }

    /// Made once; whoever comes meanwhile waits.
    fn compiler(&self) -> Result<Arc<Compiler>, GrammarError> {
        let mut compiler = self.compiler.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(compiler) = &*compiler {
            return Ok(Arc::clone(compiler));
        }
        let unusable = |error: &dyn std::fmt::Display| GrammarError::Vocabulary(error.to_string());
        let dir = self.bundle.as_ref().ok_or_else(|| unusable(&"this worker's model has no files"))?;
        let vocabulary = vocabulary(dir).map_err(|error| unusable(&error))?;
        let made = Arc::new(Compiler::new(&vocabulary)?);
        *compiler = Some(Arc::clone(&made));
        Ok(made)
    }
}

/// Absent kinds are of a caller that this version does not know.
pub(crate) fn grammar_from(grammar: wire::Grammar) -> Result<Grammar, Status> {
    match grammar.kind {
        Some(wire::grammar::Kind::JsonSchema(text)) => Ok(Grammar::JsonSchema(text)),
        Some(wire::grammar::Kind::Regex(text)) => Ok(Grammar::Regex(text)),
        Some(wire::grammar::Kind::Lark(text)) => Ok(Grammar::Lark(text)),
        Some(wire::grammar::Kind::Choices(wire::Choices { texts })) => Ok(Grammar::Choices(texts)),
        None => Err(refused("it is of a kind that this worker does not know")),
    }
}

pub(crate) fn grammar_to(grammar: &Grammar) -> wire::Grammar {
    let kind = match grammar.clone() {
        Grammar::JsonSchema(text) => wire::grammar::Kind::JsonSchema(text),
        Grammar::Regex(text) => wire::grammar::Kind::Regex(text),
        Grammar::Lark(text) => wire::grammar::Kind::Lark(text),
        Grammar::Choices(texts) => wire::grammar::Kind::Choices(wire::Choices { texts }),
    };
    wire::Grammar { kind: Some(kind) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grammars() -> Arc<Grammars> {
        let bundle = concat!(env!("CARGO_MANIFEST_DIR"), "/../fixtures/tiny-llama31/tiny-llama31-bf16");
        Arc::new(Grammars::new(Some(bundle.into())))
    }

    fn kept(grammars: &Grammars) -> Vec<Grammar> {
        grammars.kept.lock().unwrap().iter().map(|(grammar, _)| grammar.clone()).collect()
    }

    #[tokio::test]
    async fn the_last_ones_are_kept_and_bad_ones_are_not() {
        let grammars = grammars();
        let number = |at: usize| Grammar::Regex(format!("[0-9]{{{at}}}"));
        for at in 1..=KEPT {
            grammars.constraint(number(at), Vec::new()).await.unwrap();
        }
        grammars.constraint(number(1), Vec::new()).await.unwrap();
        grammars.constraint(number(KEPT + 1), Vec::new()).await.unwrap();
        let kept_now = kept(&grammars);
        assert_eq!(kept_now.len(), KEPT);
        assert_eq!(kept_now[..2], [number(KEPT + 1), number(1)]);
        assert!(!kept_now.contains(&number(2)), "the one that nobody asked for again went");

        let bad = grammars.constraint(Grammar::Regex("(".to_owned()), Vec::new()).await.unwrap_err();
        assert_eq!(bad.code(), tonic::Code::InvalidArgument);
        assert!(
            bad.message().starts_with("sampling.grammar: the regular expression cannot be used: "),
            "{bad}"
        );
        assert_eq!(kept(&grammars), kept_now);
    }

    #[tokio::test]
    async fn a_model_without_files_is_no_fault_of_the_request() {
        let grammars = Arc::new(Grammars::new(None));
        let status = grammars.constraint(Grammar::Regex("a".to_owned()), Vec::new()).await.unwrap_err();
        assert_eq!(status.code(), tonic::Code::Internal);
    }

    #[test]
    fn grammars_survive_both_ways() {
        let text = || "x".to_owned();
        for grammar in [
            Grammar::JsonSchema(text()),
            Grammar::Regex(text()),
            Grammar::Lark(text()),
            Grammar::Choices(vec![text(), text()]),
        ] {
            assert_eq!(grammar_from(grammar_to(&grammar)).unwrap(), grammar);
        }
        assert_eq!(
            grammar_from(wire::Grammar { kind: None }).unwrap_err().code(),
            tonic::Code::InvalidArgument
        );
    }
}
