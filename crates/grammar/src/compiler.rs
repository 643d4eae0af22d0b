//! From a grammar's text and a vocabulary to constraints.

use std::sync::{Mutex, PoisonError};
use std::thread;

use herd_text::Vocabulary;
use llguidance::api::ParserLimits;
use llguidance::toktrie::{ApproximateTokEnv, InferenceCapabilities, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory};

use crate::error::reason;
use crate::{Grammar, GrammarConstraint, GrammarError};

/// What one grammar may cost. Fuel is work of the lexer: about 50,000 a millisecond for the first, 14,000 for the second.
const LIMITS: ParserLimits = ParserLimits {
    max_items_in_row: 2000,
    initial_lexer_fuel: 1_000_000,
    step_lexer_fuel: 200_000,
    step_max_items: 50_000,
    // One to two kilobytes each, of every choice.
    max_lexer_states: 25_000,
    max_grammar_size: 200_000,
    precompute_large_lexemes: true,
    verbose_errors: false,
};

/// For the recursion of parsers over a text as long as [`crate::MAX_GRAMMAR_BYTES`]. Reserved, and used where a grammar is
/// nested that deep.
const STACK_BYTES: usize = 256 << 20;

/// Compiles grammars for one vocabulary.
pub struct Compiler {
    factory: ParserFactory,
    vocab_size: usize,
}

impl std::fmt::Debug for Compiler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Compiler").field("vocab_size", &self.vocab_size).finish_non_exhaustive()
    }
}

impl Compiler {
    /// Sorts the vocabulary's bytes; hundreds of milliseconds for one of 128,256.
    pub fn new(vocabulary: &Vocabulary) -> Result<Self, GrammarError> {
        let vocab_size = vocabulary.size();
        // Control tokens have no text, so no grammar allows one. Which of them end a choice is the sampler's business: the
        // end that llguidance asks for is an id past the vocabulary.
        let mut tokens: Vec<Vec<u8>> =
            (0..vocab_size as u32).map(|id| vocabulary.text_bytes(id).unwrap_or_default().to_vec()).collect();
        tokens.push(Vec::new());
        let info = TokRxInfo::new(tokens.len() as u32, vocab_size as u32);
        let environment = ApproximateTokEnv::new(TokTrie::from(&info, &tokens));
        let environment: llguidance::toktrie::TokEnv = std::sync::Arc::new(environment);
        let slices = llguidance::earley::SlicedBiasComputer::general_slices();
        let mut factory = ParserFactory::new(&environment, InferenceCapabilities::default(), &slices)
            .map_err(|error| GrammarError::Vocabulary(reason(&error)))?;
        factory.quiet();
        *factory.limits_mut() = LIMITS;
        Ok(Self { factory, vocab_size })
    }

    /// Ids are below it.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// Checks and compiles a grammar: milliseconds, seconds at worst. Runs on a thread of its own and waits for it.
    pub fn compile(&self, grammar: &Grammar) -> Result<Compiled, GrammarError> {
        let kind = grammar.kind();
        let bad = |reason| GrammarError::Bad { kind, reason };
        thread::scope(|scope| {
            let work = || {
                let parser = self.factory.create_parser(grammar.top_level()?);
                let matcher = Matcher::new(parser);
                if let Some(error) = matcher.get_error() {
                    return Err(bad(reason(&error)));
                }
                let compiled = Compiled { start: Mutex::new(matcher), kind, vocab_size: self.vocab_size };
                // One that allows nothing at all is said to be bad now rather than at the first token.
                compiled.constraint(&[])?;
                Ok(compiled)
            };
            let thread = thread::Builder::new()
                .name("grammar".to_owned())
                .stack_size(STACK_BYTES)
                .spawn_scoped(scope, work);
            let thread = thread.map_err(|error| bad(format!("no thread to compile it: {error}")))?;
            thread.join().unwrap_or_else(|_| Err(bad("compiling it failed".to_owned())))
        })
    }
}

/// A compiled grammar, to be shared by choices.
pub struct Compiled {
    /// As it was compiled: copied, never used.
    start: Mutex<Matcher>,
    kind: &'static str,
    vocab_size: usize,
}

impl std::fmt::Debug for Compiled {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Compiled").field("kind", &self.kind).finish_non_exhaustive()
    }
}

impl Compiled {
    /// The state after these tokens of a choice, which no other choice shares. Takes some microseconds a token.
    pub fn constraint(&self, said: &[u32]) -> Result<GrammarConstraint, GrammarError> {
        let start = self.start.lock().unwrap_or_else(PoisonError::into_inner).deep_clone();
        GrammarConstraint::new(start, self.kind, self.vocab_size, said)
    }
}
